"""LoRA adapters with a run-time scale, the strength, separate for each slot of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from moshi.models.lm import LMModel
from moshi.modules.lora import LoRALinear
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_csm.errors import UserError
from hf_csm.models.family import RuntimeAdapter
from hf_csm.models.moshi.lora import linear_paths


LOW, HIGH = ".lora_A.weight", ".lora_B.weight"


class Strengths:
    """Strength of each adapter in each slot: 0 is the base model, 1 the trained adapter; initially 0.

    Attributes:
        scales: `[A, B, 1, 1]`, float32: strength times scaling. Adapted layers read it in every step; it is written in
            place, so CUDA graphs see the change.
    """

    def __init__(self, scalings: Sequence[float], num_slots: int, device: torch.device | str):
        self.scalings = tuple(scalings)
        self.scales = torch.zeros(len(self.scalings), num_slots, 1, 1, dtype=torch.float32, device=device)

    def set(self, slot: int, adapter: int, strength: float) -> None:
        """Set the strength of one adapter in one slot, from the next step on."""
        self.scales[adapter, slot] = strength * self.scalings[adapter]


class SteeredLinear(LoRALinear):
    """A linear layer with adapters, each scaled for each row of the batch.

    It is a `LoRALinear` because moshi checks for that type where it must not read a layer's weight directly. With one
    adapter at strength 1 it equals `LoRALinear` bit for bit, at strength 0 the base layer.
    """

    def __init__(self, base: torch.nn.Linear, adapters: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
        """Wrap the base layer without a copy.

        Args:
            adapters: of each that acts on this layer the scale, `[B, 1, 1]`, A and B, these in the dtype of the base.
        """
        torch.nn.Module.__init__(self)
        self.frozen_W = base
        self.adapters = tuple(adapters)  # plain, not parameters: this runs hundreds of times a frame

    @property
    def lora_A(self) -> torch.nn.Linear:  # noqa: N802
        """Layer from which moshi reads device and dtype."""
        return self.frozen_W

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[B, T, out]` for `[B, T, in]`."""
        y = self.frozen_W(x)
        for scale, low, high in self.adapters:
            change = torch.nn.functional.linear(torch.nn.functional.linear(x, low), high)
            # In float32, as the product of a tensor and a plain number is taken.
            y = y + (change.float() * scale).to(y.dtype)
        return y

    def __repr__(self) -> str:
        return f"SteeredLinear({self.frozen_W}, {len(self.adapters)} adapters)"


def add_adapters(
    lm: LMModel, adapters: Sequence[RuntimeAdapter], *, num_slots: int, base_name: str = "the base"
) -> Strengths:
    """Give `lm`, a base without adapter, the adapters, in place; layers that none of them changes stay as they are.

    Args:
        num_slots: conversations in a batch, B.
        base_name: what to call the base in messages.

    Raises:
        UserError: an adapter cannot be read or was made for another base; `lm` is untouched then.
    """
    layers = {path: lm.get_submodule(path) for path in linear_paths(lm)}
    device = next(lm.parameters()).device
    loaded = [_read(adapter, layers, base_name, lm.dtype, device) for adapter in adapters]
    strengths = Strengths([adapter.scaling for adapter in adapters], num_slots, device)
    for path, layer in layers.items():
        acting = [index for index, weights in enumerate(loaded) if path in weights]
        if acting:
            parent, _, name = path.rpartition(".")
            # `strengths.scales[index]` is a view: what is written there later is seen here.
            steered = SteeredLinear(layer, [(strengths.scales[index], *loaded[index][path]) for index in acting])
            setattr(lm.get_submodule(parent), name, steered)
    _complete_gating(lm)
    return strengths


def _complete_gating(lm: LMModel) -> None:
    """Where one layer of moshi's gating is adapted, make the other one of the same type: moshi runs no mixture."""
    for module in lm.modules():
        for one, other in (("linear_in", "linear_out"), ("linear_out", "linear_in")):
            if isinstance(getattr(module, one, None), SteeredLinear):
                plain = getattr(module, other)
                if not isinstance(plain, SteeredLinear):
                    setattr(module, other, SteeredLinear(plain, []))


def _read(
    adapter: RuntimeAdapter,
    layers: dict[str, torch.nn.Module],
    base_name: str,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B of every layer that the adapter changes, by its path."""
    try:
        weights = load_file(adapter.weights, device=str(device))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{adapter.weights} cannot be read: {error}", "Export the adapter again, or download it again."
        ) from error
    remedy = f"Take an adapter that was trained on {base_name}, or serve this one with its own base."
    changed = {}
    for path in sorted({name.removesuffix(LOW).removesuffix(HIGH) for name in weights}):
        layer, low, high = layers.get(path), weights.get(path + LOW), weights.get(path + HIGH)
        if layer is None or low is None or high is None:
            raise UserError(
                f"The adapter {adapter.name} is not one for {base_name}: it has {path}, which "
                + ("the base has not." if layer is None else "lacks one of its two matrices."),
                remedy,
            )
        expected = ((adapter.rank, layer.in_features), (layer.out_features, adapter.rank))
        found = (tuple(low.shape), tuple(high.shape))
        if found != expected:
            raise UserError(
                f"The adapter {adapter.name} is not one for {base_name}: at {path} its matrices are {found[0]} and "
                f"{found[1]}; rank {adapter.rank} and this base ask for {expected[0]} and {expected[1]}.",
                remedy,
            )
        if high.any() and low.any():  # what a layer was left alone is written as zeros
            changed[path] = (low.to(dtype), high.to(dtype))
    return changed
