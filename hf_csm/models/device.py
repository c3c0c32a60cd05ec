"""The device to run on."""

from __future__ import annotations

import torch

from hf_csm.errors import UserError


def choose_device(name: str | None = None) -> torch.device:
    """Return the device of this name; by default a GPU if there is one.

    Raises:
        UserError: it cannot be used.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used: {reason}", "Give cpu, or cuda with a GPU.") from error
    return device
