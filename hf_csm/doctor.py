"""`hf-csm doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


BASE_WEIGHTS_GB = 16.5
"""Moshi 7B in bfloat16 with Mimi and the tokenizer."""


def examine() -> tuple[str, bool]:
    """Return a report, one finding a line, and whether all that is needed is there."""
    lines = [f"  python {platform.python_version()} at {sys.executable}"]
    problems = _packages(lines)
    problems += _accelerator(lines)
    _disk(lines)
    _access(lines)
    return "\n".join(lines + [f"! {problem}" for problem in problems]), not problems


def _packages(lines: list[str]) -> list[str]:
    problems = []
    for text in metadata.requires("hf-csm") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is missing: pip install '{requirement}'")
            continue
        lines.append(f"  {requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(
                f"{requirement.name} {version} is not {requirement.specifier}: pip install '{requirement}'"
            )
    return problems


def _accelerator(lines: list[str]) -> list[str]:
    try:
        import torch
    except Exception as error:  # a broken install fails in many ways
        return [f"torch does not import ({error}): install it again"]
    if not torch.cuda.is_available():
        lines.append("  no GPU: the demo and the tests run; Moshi 7B needs one with 24 GB (80 GB for long windows)")
        return []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(f"  GPU {index}: {device.name}, {device.total_memory / 1e9:.0f} GB")
    return []


def _disk(lines: list[str]) -> None:
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for name, path in (("this folder", Path.cwd()), ("the Hugging Face cache", cache)):
        while not path.exists():
            path = path.parent
        free_gb = shutil.disk_usage(path).free / 1e9
        note = "" if free_gb > BASE_WEIGHTS_GB else f" (Moshi 7B takes {BASE_WEIGHTS_GB:.0f} GB)"
        lines.append(f"  disk of {name}: {free_gb:.0f} GB free{note}")


def _access(lines: list[str]) -> None:
    from huggingface_hub import get_token

    has_token = get_token() is not None
    lines.append(
        "  Hub token: found" if has_token else "  Hub token: none (needed only to push: huggingface-cli login)"
    )
