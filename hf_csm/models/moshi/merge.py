"""Merge a PEFT adapter into the weights file of its base, piece by piece.

Neither the base nor the result is in memory as a whole: the new file has the header, names and dtypes of the base, so
a piece needs only the same piece of the base and two small matrices.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import peft
import torch
from safetensors import SafetensorError, safe_open

from hf_csm.errors import UserError
from hf_csm.hub import CONFIG_NAME
from hf_csm.models.moshi.checkpoint import MoshiCheckpoint
from hf_csm.models.moshi.export import PEFT_PREFIX, ExportError, checkpoint_name, serving_config
from hf_csm.models.moshi.lora import read_adapter


WEIGHTS_NAME = "model.safetensors"
PIECE_NUMBERS = 1 << 22
"""Maximum numbers of a weight that are merged at once: 16 MB in float32, and as much again for the update."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FUSED = {"in_projs": ("in_proj_weight", "in_proj.weight"), "out_projs": ("out_proj.weight",)}
"""Names in older files, which hold the projections of all steps in one matrix; moshi splits it when it loads."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        start: of its bytes in the file.
        num_bytes: of them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of `tensor[0]`."""
        return self.num_bytes // self.shape[0]


@dataclass(frozen=True)
class Update:
    """Update of some rows of a weight by the adapter: `scaling * high @ low`.

    Attributes:
        first_row: of the weight.
        low: `[rank, in]`.
        high: `[out, rank]`.
    """

    first_row: int
    low: torch.Tensor
    high: torch.Tensor
    scaling: float


def merge_adapter(adapter: Path, checkpoint: MoshiCheckpoint, folder: Path) -> None:
    """Write the merged weights and their config.json to `folder` without loading a model.

    The file is read again and compared, byte by byte.

    Args:
        adapter: folder of a PEFT adapter.

    Raises:
        UserError: the adapter is damaged or was made for another base.
        ExportError: the file differs from what was written.
    """
    config, weights = read_adapter(adapter)
    _write(config, weights, checkpoint, folder)
    check_merged(folder / WEIGHTS_NAME, config, weights, checkpoint)


def check_merged(
    path: Path, config: peft.LoraConfig, weights: Mapping[str, torch.Tensor], checkpoint: MoshiCheckpoint
) -> None:
    """Check that the file at `path` is the base with the adapter merged in, bit for bit, a piece at a time.

    Raises:
        ExportError: it is not.
    """
    stored = {tensor.name: tensor for tensor in read_header(path)[1]}
    tensors = read_header(checkpoint.moshi_weights)[1]
    if {t.name: (t.dtype, t.shape) for t in tensors} != {t.name: (t.dtype, t.shape) for t in stored.values()}:
        raise ExportError(f"{path} has other weights than {checkpoint_name(checkpoint)}.")
    updates = find_updates(config, weights, tensors, checkpoint)
    with open(checkpoint.moshi_weights, "rb") as base, open(path, "rb") as file:
        for tensor in tensors:
            file.seek(stored[tensor.name].start)
            for piece in _pieces(tensor, updates.get(tensor.name, []), base):
                if file.read(len(piece)) != bytes(piece):
                    raise ExportError(f"{path}: {tensor.name} is not the merged weight.")


def read_header(path: Path) -> tuple[bytes, list[StoredTensor]]:
    """Return the header of a safetensors file, with its length in front, and its tensors in the order of their bytes.

    The file is not mapped into memory: pages that were read would count as memory of the process.

    Raises:
        UserError: it is truncated or missing.
    """
    try:
        with safe_open(path, "pt"):  # checks sizes and places
            pass
        with open(path, "rb") as file:
            length = file.read(8)
            text = file.read(int.from_bytes(length, "little"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or truncated: {error}", "Copy or download it again.") from error
    start = len(length) + len(text)
    tensors = [
        StoredTensor(
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in json.loads(text).items()
        if name != "__metadata__"
    ]
    return length + text, sorted(tensors, key=lambda tensor: tensor.start)


def find_updates(
    config: peft.LoraConfig,
    weights: Mapping[str, torch.Tensor],
    tensors: list[StoredTensor],
    checkpoint: MoshiCheckpoint,
) -> dict[str, list[Update]]:
    """Return the updates of the tensors of the base's file, by their names.

    Raises:
        UserError: a matrix of the adapter has no place in the base.
    """
    known = {tensor.name: tensor for tensor in tensors}
    updates: dict[str, list[Update]] = {}
    for name in weights:
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
        low, high = weights[name], weights[name.replace(".lora_A.", ".lora_B.")]
        place = _place(path, len(high), known)
        if place is None or known[place[0]].shape[1:] != low.shape[1:] or known[place[0]].dtype not in DTYPES:
            found = "nothing" if place is None else f"{known[place[0]].dtype} {list(known[place[0]].shape)}"
            raise UserError(
                f"The adapter's {path} [{len(high)}, {low.shape[1]}] of rank {len(low)} has no place in "
                f"{checkpoint_name(checkpoint)}, which has {found} there.",
                "Give the base model that the adapter was trained on.",
            )
        updates.setdefault(place[0], []).append(Update(place[1], low, high, config.lora_alpha / config.r))
    for own in updates.values():
        own.sort(key=lambda update: update.first_row)
    return updates


def _place(path: str, num_rows: int, known: Mapping[str, StoredTensor]) -> tuple[str, int] | None:
    """Return the tensor and the first row that hold the weight of a linear layer."""
    own = known.get(f"{path}.weight")
    if own is not None:
        return (own.name, 0) if own.shape[0] == num_rows else None
    found = re.fullmatch(r"(.*\.)(in_projs|out_projs)\.(\d+)", path)
    for fused in _FUSED[found[2]] if found else ():
        tensor = known.get(found[1] + fused) if found else None
        if tensor is not None and found and tensor.shape[0] % num_rows == 0:
            first_row = int(found[3]) * num_rows
            return (tensor.name, first_row) if first_row < tensor.shape[0] else None
    return None


def _write(
    config: peft.LoraConfig, weights: Mapping[str, torch.Tensor], checkpoint: MoshiCheckpoint, folder: Path
) -> None:
    header, tensors = read_header(checkpoint.moshi_weights)
    updates = find_updates(config, weights, tensors, checkpoint)
    part = folder / f".{WEIGHTS_NAME}.tmp"
    with open(checkpoint.moshi_weights, "rb") as base, open(part, "wb") as file:
        file.write(header)
        for tensor in tensors:
            for piece in _pieces(tensor, updates.get(tensor.name, []), base):
                file.write(piece)
    os.replace(part, folder / WEIGHTS_NAME)
    text = json.dumps(serving_config(checkpoint) | {"moshi_name": WEIGHTS_NAME}, indent=2)
    (folder / CONFIG_NAME).write_text(text + "\n")


def _pieces(tensor: StoredTensor, updates: list[Update], base: BufferedReader) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a merged tensor in order."""
    base.seek(tensor.start)
    if not updates:
        for first in range(0, tensor.num_bytes, 4 * PIECE_NUMBERS):
            yield base.read(min(4 * PIECE_NUMBERS, tensor.num_bytes - first))
        return
    num_columns = math.prod(tensor.shape[1:])
    most_rows = max(1, PIECE_NUMBERS // num_columns)
    row = 0
    for update in updates:
        while row < update.first_row:
            num_rows = min(most_rows, update.first_row - row)
            yield base.read(num_rows * tensor.row_bytes)
            row += num_rows
        for first in range(0, len(update.high), most_rows):
            high = update.high[first : first + most_rows]
            stored = torch.empty(len(high), num_columns, dtype=DTYPES[tensor.dtype])
            base.readinto(memoryview(stored.view(torch.uint8).numpy()))
            weight = stored.float()
            weight += update.scaling * (high.detach().cpu().float() @ update.low.detach().cpu().float())
            yield memoryview(weight.to(stored.dtype).view(torch.uint8).numpy()).cast("B")
        row += len(update.high)
    while row < tensor.shape[0]:
        num_rows = min(most_rows, tensor.shape[0] - row)
        yield base.read(num_rows * tensor.row_bytes)
        row += num_rows
