"""LoRA on Moshi with PEFT: choose the layers to adapt, save and load the adapter."""

from __future__ import annotations

import contextlib
import copy
import difflib
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import peft
import torch
from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingTransformer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_csm.errors import UserError
from hf_csm.hub import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from hf_csm.models.moshi.model import MoshiLM


ALL_LINEAR = "all-linear"

NATIVE_NAMES = {
    "q_proj": "in_projs",
    "k_proj": "in_projs",
    "v_proj": "in_projs",
    "o_proj": "out_projs",
    "gate_proj": "linear_in",
    "up_proj": "linear_in",
    "down_proj": "linear_out",
}
"""Layers of Moshi's temporal and depth transformers, by the common names of projections."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
PAIR = {"linear_in", "linear_out"}


def target_pattern(names: str | Sequence[str], lm: LMModel) -> str:
    """Return the regular expression, for PEFT, that matches the linear layers of `lm` with these names.

    Args:
        names: any of the keys of `NATIVE_NAMES`, of Moshi's own names (`in_projs`, `out_projs`, `linear_in`,
            `linear_out`, `text_linear`, `linears`, `depformer_in`), or "all-linear" alone for every linear layer.

    Raises:
        UserError: an unknown name; no name; `linear_in` without `linear_out` or the reverse.
    """
    names = [names] if isinstance(names, str) else list(names)
    paths = linear_paths(lm)
    if names == [ALL_LINEAR]:
        return _regex(paths)
    own_names = {_own_name(path) for path in paths}
    known = sorted(own_names | NATIVE_NAMES.keys())
    if not names:
        raise UserError("lora.target_modules is empty.", f"Give some of {', '.join(known)}, or {ALL_LINEAR}.")
    chosen = set()
    for name in names:
        native = NATIVE_NAMES.get(name, name)
        if native not in own_names:
            nearest = difflib.get_close_matches(name, [*known, ALL_LINEAR], n=1, cutoff=0)[0]
            raise UserError(
                f"lora.target_modules: Moshi has no {name!r}; nearest is {nearest!r}.",
                f"Use {', '.join(known)}, or {ALL_LINEAR} alone.",
            )
        chosen.add(native)
    if len(chosen & PAIR) == 1:
        (lonely,), (missing,) = chosen & PAIR, PAIR - chosen
        raise UserError(
            f"lora.target_modules adapts {lonely} without {missing}, which Moshi's gating cannot run.",
            "Give gate_proj, up_proj and down_proj together, or none of them.",
        )
    for parts in FUSED:
        given = [part for part in parts if part in names]
        if given and len(given) < len(parts) and NATIVE_NAMES[parts[0]] not in names:
            warnings.warn(
                f"Moshi keeps {', '.join(parts)} in one matrix, {NATIVE_NAMES[parts[0]]}: "
                f"{', '.join(given)} adapts them all.",
                stacklevel=2,
            )
    return _regex([path for path in paths if _own_name(path) in chosen])


def linear_paths(lm: torch.nn.Module) -> list[str]:
    """Return the path of every linear layer of an `LMModel` without adapter, in its order."""
    return [path for path, module in lm.named_modules() if isinstance(module, torch.nn.Linear)]


def _own_name(path: str) -> str:
    return next(part for part in reversed(path.split(".")) if not part.isdigit())


def _regex(paths: Sequence[str]) -> str:
    # One pattern for all layers and steps keeps adapter_config.json readable.
    return "|".join(sorted({re.sub(r"\\\.\d+", r"\\.\\d+", re.escape(path)) for path in paths}))


def add_lora(
    model: MoshiLM,
    *,
    rank: int,
    alpha: float,
    target_modules: str | Sequence[str],
    dropout: float = 0.0,
    seed: int = 0,
) -> MoshiLM:
    """Wrap the language model of `model` in a fresh adapter, in place, and return `model`.

    The adapter is float32 for any base, and only it requires gradients. Initially it changes nothing.

    Args:
        alpha: the adapter's output is scaled by `alpha / rank`.
        target_modules: see `target_pattern`.
        seed: of the adapter's weights; the caller's random state is unchanged.

    Raises:
        UserError: see `target_pattern`; dropout together with gradient checkpointing.
    """
    lm = native_lm(model)
    assert not has_adapter(model), "the model has an adapter already"
    if dropout > 0 and any(part.checkpointing for part in _transformers(lm)):
        # moshi's checkpointing recomputes layers without restoring the random state, so dropout would differ between
        # forward and backward pass and the gradients would be wrong.
        raise UserError(
            f"lora.dropout {dropout} cannot be combined with gradient checkpointing in Moshi.",
            "Set dropout to 0, or advanced.gradient_checkpointing to false.",
        )
    return _wrap(model, rank, alpha, target_pattern(target_modules, lm), dropout, seed)


def _wrap(model: MoshiLM, rank: int, alpha: float, pattern: str, dropout: float, seed: int) -> MoshiLM:
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=pattern,
        lora_dropout=dropout,
        bias="none",
        base_model_name_or_path=native_lm(model).name_or_path,
        revision=native_lm(model).revision,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.lm = peft.get_peft_model(native_lm(model), config, autocast_adapter_dtype=True)
    return model


def has_adapter(model: MoshiLM) -> bool:
    """Return whether the language model has an adapter."""
    return isinstance(model.lm, peft.PeftModel)


def native_lm(model: MoshiLM) -> LMModel:
    """Return moshi's `LMModel` inside `model`; with an adapter, its linear layers are PEFT's."""
    return model.lm.get_base_model() if isinstance(model.lm, peft.PeftModel) else model.lm


def lora_config(model: MoshiLM) -> peft.LoraConfig:
    """Return the configuration of the adapter of `model`."""
    assert isinstance(model.lm, peft.PeftModel), "the model has no adapter"
    return model.lm.peft_config["default"]


@contextlib.contextmanager
def adapter_disabled(model: MoshiLM) -> Iterator[None]:
    """Context in which `model` equals its base model, bit for bit."""
    assert isinstance(model.lm, peft.PeftModel), "the model has no adapter"
    with model.lm.disable_adapter():
        yield


def adapter_parameters(model: MoshiLM) -> list[torch.nn.Parameter]:
    """Return the weights that train, in a fixed order."""
    return [weight for name, weight in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]


def adapter_state(model: MoshiLM) -> dict[str, torch.Tensor]:
    """Return the adapter's weights under the names PEFT gives them on disk."""
    return get_peft_model_state_dict(model.lm, save_embedding_layers=False)


def save_adapter(model: MoshiLM, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained` reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(lora_config(model))
    config.inference_mode = True
    weights = {name: weight.detach().cpu().contiguous() for name, weight in adapter_state(model).items()}
    save_file(weights, folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def load_adapter(model: MoshiLM, folder: Path) -> MoshiLM:
    """Load the adapter in `folder` into `model`, adding one of the same shape if `model` has none; return `model`.

    Raises:
        UserError: a file is missing or damaged, or the adapter has another rank or other layers than that of `model`.
    """
    config, weights = read_adapter(folder)
    if not has_adapter(model):
        pattern = config.target_modules
        if isinstance(pattern, (list, set)):
            pattern = _regex([path for path in linear_paths(native_lm(model)) if _is_target(path, pattern)])
        try:
            _wrap(model, config.r, config.lora_alpha, pattern, config.lora_dropout, seed=0)
        except (ValueError, TypeError, re.error) as error:
            raise UserError(
                f"{folder / ADAPTER_CONFIG_NAME} does not fit the model: {' '.join(str(error).split())[:200]}",
                "Give the base model that the adapter was trained on, or use an earlier checkpoint.",
            ) from error
    own = lora_config(model)
    if own.r != config.r:
        raise UserError(
            f"The adapter in {folder} has rank {config.r}, the model's has rank {own.r}.",
            f"Set lora.rank to {config.r}, or start from another checkpoint.",
        )
    if own.lora_alpha != config.lora_alpha:
        raise UserError(
            f"The adapter in {folder} has alpha {config.lora_alpha}, the model's has alpha {own.lora_alpha}.",
            f"Set lora.alpha to {config.lora_alpha}, or start from another checkpoint.",
        )
    state = adapter_state(model)
    differing = sorted(
        name for name in state.keys() | weights.keys() if name not in state or name not in weights
        or state[name].shape != weights[name].shape
    )  # fmt: skip
    if differing:
        raise UserError(
            f"The adapter in {folder} and the model's differ in {len(differing)} weights, such as {differing[0]}.",
            "Take the same lora.target_modules and base model as in the run that wrote it.",
        )
    set_peft_model_state_dict(model.lm, weights)
    return model


def _is_target(path: str, names: set[str] | list[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def read_adapter(folder: Path) -> tuple[peft.LoraConfig, dict[str, torch.Tensor]]:
    """Return configuration and weights of the PEFT adapter in `folder`.

    Raises:
        UserError: a file is missing or damaged, or it is not a plain LoRA.
    """
    folder = Path(folder)
    for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}.", "Give the adapter folder of a checkpoint, or an earlier checkpoint."
            )
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        weights = load_file(folder / ADAPTER_WEIGHTS_NAME)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"The adapter in {folder} is damaged or truncated: {' '.join(str(error).split())}",
            "Use an earlier checkpoint.",
        ) from error
    if not isinstance(config, peft.LoraConfig) or any(
        (config.rank_pattern, config.alpha_pattern, config.use_rslora, config.layers_to_transform)
    ):
        raise UserError(
            f"The adapter in {folder} is not a LoRA of one rank and one scaling, the only kind Moshi loads.",
            "Train it without rank_pattern, alpha_pattern, layers_to_transform and use_rslora.",
        )
    for name, value in {"r": config.r, "lora_alpha": config.lora_alpha}.items():
        is_number = isinstance(value, int) or (name == "lora_alpha" and isinstance(value, float))
        if not is_number or not 0 < value < math.inf:
            raise UserError(f"{folder / ADAPTER_CONFIG_NAME}: {name} is {value!r}.", "Use an earlier checkpoint.")
    return config, weights


def _transformers(lm: LMModel) -> list[StreamingTransformer]:
    return [part for part in lm.modules() if isinstance(part, StreamingTransformer)]
