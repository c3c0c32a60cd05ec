"""Export a PEFT adapter to the files that moshi's loader and server read.

moshi reads one rank and one scaling for the whole model, and weights for every linear layer: layers without an adapter
get zeros.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import peft
import torch
from moshi.models import loaders
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_csm.errors import UserError
from hf_csm.hub import CONFIG_NAME
from hf_csm.models.moshi.checkpoint import MoshiCheckpoint, named_urls, without_lora
from hf_csm.models.moshi.lora import adapter_state, linear_paths, lora_config, read_adapter
from hf_csm.models.moshi.model import MoshiLM


LORA_NAME = "lora.safetensors"
PEFT_PREFIX = "base_model.model."


class ExportError(UserError):
    """An export differs from the trained model."""

    def __init__(self, problem: str, remedy: str = "Nothing was exported. If a second try fails too, report this."):
        super().__init__(problem, remedy)


def export_adapter(adapter: MoshiLM | Path, checkpoint: MoshiCheckpoint, folder: Path) -> Path:
    """Write `lora.safetensors` and `config.json` for `moshi.server` to `folder`, and return it.

    The two serve with `moshi.server --config-path folder/config.json --lora-weight folder/lora.safetensors`, or as a
    Hub repository with `moshi.server --hf-repo user/adapter`; the base's files are found where `checkpoint` has them.
    Names and shapes are checked against those that moshi builds; `verify_export` compares logits.

    Args:
        adapter: the trained model, or the folder of a PEFT adapter.
        checkpoint: the base model.

    Raises:
        UserError: the adapter is damaged or was made for another base.
    """
    if isinstance(adapter, MoshiLM):
        config, weights = lora_config(adapter), adapter_state(adapter)
    else:
        config, weights = read_adapter(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(native_state(config, weights, checkpoint), folder / LORA_NAME)
    lora = {"lora": True, "lora_name": LORA_NAME, "lora_rank": config.r, "lora_scaling": config.lora_alpha / config.r}
    (folder / CONFIG_NAME).write_text(json.dumps(serving_config(checkpoint) | lora, indent=2) + "\n")
    check_native_keys(folder, checkpoint)
    return folder


def native_state(
    config: peft.LoraConfig, weights: dict[str, torch.Tensor], checkpoint: loaders.CheckpointInfo
) -> dict[str, torch.Tensor]:
    """Return `weights` of PEFT under moshi's names, in float32, with zeros for the layers they do not cover."""
    state = {name: torch.zeros(shape) for name, shape in native_shapes(checkpoint, config.r).items()}
    for name, weight in weights.items():
        native_name = name.removeprefix(PEFT_PREFIX)
        if native_name not in state or state[native_name].shape != weight.shape:
            raise UserError(
                f"The adapter's {native_name} {list(weight.shape)} has no place in {checkpoint_name(checkpoint)}.",
                "Give the base model that the adapter was trained on.",
            )
        state[native_name] = weight.detach().to("cpu", torch.float32).contiguous()
    return state


def serving_config(checkpoint: MoshiCheckpoint) -> dict[str, Any]:
    """Return the config.json of the base with URLs for its files: `hf://repo/file`, `file:///path`."""
    if checkpoint.raw_config is None:
        config = {"model_type": "moshi", **loaders._lm_kwargs}
    else:
        config = without_lora(checkpoint.raw_config)
    return config | named_urls(checkpoint.name_or_path, config)


def checkpoint_name(checkpoint: loaders.CheckpointInfo) -> str:
    """Return the name of a checkpoint for messages."""
    return checkpoint.name_or_path if isinstance(checkpoint, MoshiCheckpoint) else str(checkpoint.moshi_weights)


def check_native_keys(folder: Path, checkpoint: loaders.CheckpointInfo) -> None:
    """Check by names and shapes alone that moshi can load the adapter in `folder`: fast enough for every checkpoint.

    Raises:
        UserError: a file is missing or truncated.
        ExportError: a weight is missing, unknown, or of another shape than in moshi's model.
    """
    config = _read_config(folder)
    shapes = {}
    try:
        with safe_open(folder / LORA_NAME, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                shapes[name] = tuple(file.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise _damaged(folder / LORA_NAME, error) from error
    expected = native_shapes(checkpoint, config["lora_rank"])
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        name = wrong[0]
        raise ExportError(
            f"{folder / LORA_NAME}: {len(wrong)} weights do not match moshi's model, such as {name}: "
            f"{shapes.get(name, 'missing')} instead of {expected.get(name, 'nothing')}."
        )


def check_adapter(folder: Path, adapter: Path, checkpoint: loaders.CheckpointInfo) -> None:
    """Check that moshi's files in `folder` are complete and hold the weights of the PEFT adapter in `adapter`.

    Args:
        checkpoint: the base model.

    Raises:
        UserError: a file is missing or truncated.
        ExportError: a weight, the rank or the scaling differs.
    """
    own = _read_config(folder)
    check_native_keys(folder, checkpoint)
    config, weights = read_adapter(adapter)
    if (own.get("lora_rank"), own.get("lora_scaling")) != (config.r, config.lora_alpha / config.r):
        raise ExportError(f"{folder / CONFIG_NAME} has another rank or scaling than the adapter in {adapter}.")
    with safe_open(folder / LORA_NAME, "pt") as file:
        for name, weight in native_state(config, weights, checkpoint).items():
            difference = (file.get_tensor(name) - weight).abs().max().item()
            if difference > 0:
                raise ExportError(
                    f"{folder / LORA_NAME} is not the adapter in {adapter}: {name} differs by up to {difference}.",
                    "Export the checkpoint again.",
                )


def native_shapes(checkpoint: loaders.CheckpointInfo, rank: int) -> dict[str, tuple[int, int]]:
    """Return name and shape of every weight that moshi expects in `lora.safetensors`, in its order."""
    config = without_lora(loaders._lm_kwargs if checkpoint.lm_config is None else checkpoint.lm_config)
    shapes = {}
    for path, (in_features, out_features) in _linear_sizes(json.dumps(config)).items():
        shapes[f"{path}.lora_A.weight"] = (rank, in_features)
        shapes[f"{path}.lora_B.weight"] = (out_features, rank)
    return shapes


@functools.lru_cache(maxsize=4)  # five seconds for Moshi 7B, and a run asks at every checkpoint
def _linear_sizes(config_json: str) -> dict[str, tuple[int, int]]:
    lm = loaders.get_moshi_lm(None, lm_kwargs=json.loads(config_json), device="meta")
    layers = {path: lm.get_submodule(path) for path in linear_paths(lm)}
    return {path: (layer.in_features, layer.out_features) for path, layer in layers.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / CONFIG_NAME).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder / CONFIG_NAME, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is missing, damaged or truncated: {error}", "Export it again from its checkpoint.")
