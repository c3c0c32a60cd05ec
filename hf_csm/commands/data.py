"""The data commands: prepare, encode, describe, plan, export-manifest, push-dataset."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_csm.corpora import corpus_names
from hf_csm.errors import UserError


SHARED_OPTIONS = ("corpus", "raw", "out", "num_workers", "align_model", "prosody", "overwrite", "progress", "name")
"""Names that are reserved: no corpus may have an option of this name."""
CORPUS_OPTIONS = """corpus-specific options:
  ravdess       --subsets speech song
  esd           --languages en zh
  msp_podcast   --test-sets Test1 Test2 Test3   --keep-unknown-speakers   --allow-missing-text
  csv_manifest  --corpus-name NAME   --license LICENSE"""


def add_data_commands(add_command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the data commands to the parser of `hf-csm`."""
    prepare = add_command(
        "prepare",
        _prepare,
        "Convert a raw corpus to labeled, aligned utterances at 24 kHz (Parquet).",
        takes_more=True,
        epilog=CORPUS_OPTIONS,
    )
    prepare.add_argument("corpus", help=f"{', '.join(corpus_names())} (csv_manifest: your own files)")
    prepare.add_argument(
        "--raw",
        nargs="+",
        help="folder, zip files or URLs of the raw corpus (default: download it, if its license allows)",
    )
    prepare.add_argument("--out", type=Path, required=True, help="folder to write")
    prepare.add_argument("--num-workers", type=int, help="number of processes (default: one per core)")
    prepare.add_argument("--align-model", help="CTC model (Hub id or folder) for word alignment, instead of energy")
    prepare.add_argument(
        "--prosody", action="store_true", help="measure pitch, loudness and speech rate of every clip"
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace an existing table")

    encode = add_command(
        "encode", _encode, "Compose conversations from utterances and encode them with the codec of the base model."
    )
    encode.add_argument("prepared", help="folder or Hub id of a prepared table, or a JSONL manifest of stereo WAVs")
    encode.add_argument("--out", type=Path, required=True, help="folder to write")
    encode.add_argument("--base-model", required=True, help="Hub id or folder of the base model")
    encode.add_argument("--revision", help="branch, tag or commit of the base model")
    _add_composition(encode)
    encode.add_argument("--device", help="such as cuda or cpu (default: a GPU if available)")
    encode.add_argument(
        "--batch-sec", type=float, help="seconds of audio per batch (default: 640 on a GPU, 80 on a CPU)"
    )

    describe = add_command(
        "describe",
        _describe,
        "Show the training mixture of a configuration: groups, probabilities, repeats, hours.",
        takes_more=True,
        epilog="Training options can follow: --dataset.balance.temperature 0",
    )
    describe.add_argument("config", help="YAML file with the options of a run")
    describe.add_argument("--out", type=Path, default=Path("mixture.png"), help="plot to write (default: mixture.png)")

    plan = add_command(
        "plan",
        _plan,
        "Print what a run needs and which tables are missing, as shell variable assignments.",
        takes_more=True,
        epilog="Training options can follow: --run_dir DIR",
    )
    plan.add_argument("config", help="YAML file with the options of a run")

    manifest = add_command(
        "export-manifest",
        _export_manifest,
        "Write conversations in the format of moshi-finetune: WAV, JSON and JSONL.",
    )
    manifest.add_argument("prepared", help="folder or Hub id of a prepared table")
    manifest.add_argument("--out", type=Path, required=True, help="folder to write")
    _add_composition(manifest)

    push = add_command(
        "push-dataset", _push_dataset, "Publish a table on the Hugging Face Hub, if its license permits."
    )
    push.add_argument("folder", type=Path, help="folder that `hf-csm prepare` or `hf-csm encode` wrote")
    push.add_argument("--repo-id", required=True, help="USER/NAME on the Hub; created if it does not exist")
    push.add_argument("--private", action="store_true", help="create the repository as private")


def _add_composition(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--label", choices=("acted", "perceived", "agreed"), default="acted",
        help="emotion label of a clip: acted, perceived by raters, or only where both agree (default: acted)",
    )  # fmt: skip
    parser.add_argument(
        "--variants", type=int, default=1, help="number of different sets of conversations (default: 1)"
    )
    parser.add_argument(
        "--duration-sec", type=float, default=80.0, help="maximum length of a conversation (default: 80)"
    )
    parser.add_argument(
        "--lead-in-s", type=float, nargs=2, default=(1.0, 2.0), metavar=("MIN", "MAX"),
        help="seconds of room tone before the first turn (default: 1 2)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")


def _composition(options: argparse.Namespace) -> Any:
    from hf_csm.encode.compose import Composition

    if options.variants < 1:
        raise UserError(f"--variants is {options.variants}.", "Give a whole number of at least 1.")
    return Composition(duration_s=options.duration_sec, lead_in_s=tuple(options.lead_in_s), seed=options.seed)


def corpus_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Split the options of a corpus: `--languages en zh` -> `{"languages": ("en", "zh")}`.

    The corpus checks names and types.

    Raises:
        UserError: a value without an option, or an option that all corpora share.
    """
    options: dict[str, list[str]] = {}
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name in SHARED_OPTIONS:
                raise UserError(f"{argument} is not an option.", "See hf-csm prepare --help for its spelling.")
            options[name] = [value] if equals else []
        elif name is None:
            raise UserError(f"{argument!r} is not an option.", "Name the raw corpus with --raw.")
        else:
            options[name].append(argument)
    return {name: tuple(values) for name, values in options.items()}


def _print_report(report: Any, out: Path) -> None:
    if not report.is_new:
        print(f"{out} already exists, made from the same input with the same options: nothing to do.")
    print(report.render())


def _prepare(options: argparse.Namespace) -> None:
    from hf_csm.prepare.run import prepare

    if options.num_workers is not None and options.num_workers < 1:
        raise UserError(f"--num-workers is {options.num_workers}.", "Give a whole number of at least 1.")
    report = prepare(
        options.corpus,
        options.raw,
        options.out,
        num_workers=options.num_workers,
        align_model=options.align_model,
        prosody=options.prosody,
        overwrite=options.overwrite,
        **corpus_options(options.more),
    )
    _print_report(report, options.out)


def _encode(options: argparse.Namespace) -> None:
    import torch

    from hf_csm.encode.dialogues import encode_manifest
    from hf_csm.encode.run import encode
    from hf_csm.hub import find_table
    from hf_csm.models import get_family
    from hf_csm.models.device import choose_device

    composition = _composition(options)
    if options.batch_sec is not None and not options.batch_sec > 0:
        raise UserError(f"--batch-sec is {options.batch_sec:g}.", "Give more than 0 seconds.")
    rank, world_size = launched_as()
    gpu = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    device = choose_device(options.device or (gpu if torch.cuda.is_available() else "cpu"))
    is_manifest = options.prepared.endswith(".jsonl")
    if is_manifest and (options.label != "acted" or options.variants != 1):
        raise UserError(
            f"{options.prepared} is a manifest of whole conversations: --label and --variants do not apply.",
            'Leave them out; a row\'s own "emotion" is its label.',
        )
    prepared = Path(options.prepared) if is_manifest else find_table(options.prepared)
    family = get_family(options.base_model, options.revision)
    base = family.find_checkpoint(options.base_model, options.revision)
    codec, sha256 = family.load_codec(base, device), family.codec_sha256(base)
    shared: dict[str, Any] = {
        "composition": composition,
        "batch_s": options.batch_sec,
        "rank": rank,
        "world_size": world_size,
        "progress": rank == 0,
    }
    if is_manifest:
        report = encode_manifest(prepared, options.out, codec, sha256, **shared)
    else:
        report = encode(prepared, options.out, codec, sha256, label=options.label, variants=options.variants, **shared)
    if rank == 0:
        _print_report(report, options.out)


def launched_as() -> tuple[int, int]:
    """Return rank and number of processes, as set by `accelerate launch`.

    Raises:
        UserError: they are inconsistent.
    """
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE is {world_size}.",
            "Let `accelerate launch` set them, or number N processes from 0 to N - 1.",
        )
    return int(rank), int(world_size)


def _describe(options: argparse.Namespace) -> None:
    from hf_csm.config_parser import parse_run_config
    from hf_csm.mixture.report import describe

    description = describe(parse_run_config(["--config", options.config, *options.more], prog="hf-csm describe"))
    print(description.render())
    description.draw(options.out)
    print(f"The plot is in {options.out}.")


def _plan(options: argparse.Namespace) -> None:
    from hf_csm.commands.plan import render_plan
    from hf_csm.config_parser import parse_run_config

    print(render_plan(parse_run_config(["--config", options.config, *options.more], prog="hf-csm plan")))


def _export_manifest(options: argparse.Namespace) -> None:
    from hf_csm.encode.moshi_finetune import export_manifest
    from hf_csm.hub import find_table

    report = export_manifest(
        find_table(options.prepared),
        options.out,
        composition=_composition(options),
        variants=options.variants,
        label=options.label,
    )
    _print_report(report, options.out)


def _push_dataset(options: argparse.Namespace) -> None:
    from hf_csm.publish.push_table import push_table

    print(push_table(options.folder, options.repo_id, private=options.private))
