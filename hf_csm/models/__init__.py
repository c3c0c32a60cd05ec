"""Model families behind one record of functions, `family.Family`."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from hf_csm.models.family import Family


def get_family(name_or_checkpoint: str) -> Family:
    """Return the model family of a checkpoint, or of this name. There is one so far: Moshi."""
    from hf_csm.models.moshi import MOSHI  # slow, as it imports moshi and torch

    return MOSHI
