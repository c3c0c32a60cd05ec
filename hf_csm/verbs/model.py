"""The verbs that take a trained model: export, push, serve, say, reply."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_model_verbs(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add them to the parser of `hf-csm`."""
    export = add_verb("export", _export, "Turn a checkpoint into a folder that PEFT and moshi's own server load.")
    export.add_argument(
        "checkpoint", help="a run's checkpoint, such as checkpoints/run/best, or a Hub repository USER/NAME"
    )
    export.add_argument("--revision", help="branch, tag or commit of the Hub repository (default: its main branch)")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.add_argument("--merged", action="store_true", help="write whole merged weights instead of the adapter")


def _export(options: argparse.Namespace) -> None:
    from hf_csm.export.native import export_checkpoint

    folder = export_checkpoint(options.checkpoint, options.out, revision=options.revision, merged=options.merged)
    print(f"{folder} loads through moshi and agrees with the checkpoint. Serve it with:")
    weights = "" if options.merged else f" --lora-weight {folder / 'lora.safetensors'}"
    print(f"python -m moshi.server --config-path {folder / 'config.json'}{weights}")
