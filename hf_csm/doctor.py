"""`hf-csm doctor`: installed versions, GPU and disk space, and what is missing."""

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
EXTRAS = ("serve", "prosody", "trackers")


def examine() -> tuple[str, bool]:
    """Return a report, one finding per line, and whether all requirements are met."""
    from huggingface_hub import get_token

    lines = [f"  python {platform.python_version()} at {sys.executable}"]
    problems = _packages(lines)
    problems += _accelerator(lines)
    _disk(lines)
    lines.append(f"  Hub token: {'found' if get_token() else 'none (needed only to push: huggingface-cli login)'}")
    return "\n".join(lines + [f"! {problem}" for problem in problems]), not problems


def _packages(lines: list[str]) -> list[str]:
    problems = []
    for text in metadata.requires("hf-csm") or []:
        requirement = Requirement(text)
        marker = requirement.marker
        extra = next((extra for extra in ("", *EXTRAS) if marker is None or marker.evaluate({"extra": extra})), None)
        if extra is None:
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if extra:
                lines.append(f"  {requirement.name} is not installed (optional): pip install 'hf-csm[{extra}]'")
            else:
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
    except Exception as error:  # a broken installation raises anything
        return [f"torch cannot be imported ({error}): reinstall it"]
    if not torch.cuda.is_available():
        lines.append(
            "  no GPU: enough for the demo and the tests; Moshi 7B needs 24 GB of GPU memory (80 GB for long windows)"
        )
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
