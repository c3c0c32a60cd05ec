"""Files and folders written beside their place and renamed, and readers of JSON and YAML with clear errors."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from hf_csm.errors import UserError


@contextlib.contextmanager
def replaced_folder(folder: Path, ours: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its place when the context ends well, and goes when it fails.

    Args:
        ours: names of files that may be replaced.

    Raises:
        UserError: `folder` holds something that is not an export, so replacing it would lose it.
    """
    folder = Path(folder)
    if folder.exists():
        entries = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        strange = sorted(entries - set(ours))
        if strange:
            raise UserError(
                f"{folder} holds {strange[0]}, which is not part of an export.", "Give a new or an empty folder."
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    beside.chmod(0o755)
    try:
        yield beside
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
