"""Atomic writes of files and folders (written beside the target, then renamed) and JSON/YAML readers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from hf_csm.errors import UserError


def read_json(path: str | Path, remedy: str = "Restore the file, or write it again.") -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: the file is missing, unreadable, or not a JSON object; `remedy` is its second line.
    """
    text = _read_text(path, remedy)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {str(error).splitlines()[0]}.", remedy) from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object.", remedy)
    return value


def read_yaml(path: str | Path, remedy: str = "Restore the file, or write it again.") -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file gives an empty dict.

    Raises:
        UserError: the file is missing, unreadable, or not a YAML mapping; `remedy` is its second line.
    """
    text = _read_text(path, remedy)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}.", remedy) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a YAML mapping.", remedy)
    return value


@contextlib.contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; renamed to `path` if the block succeeds, removed if it raises.

    The name is unique, so several processes may write the same file: the last one wins. It ends in `.tmp`, so that no
    glob for the file's own suffix finds what a killed process left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, complete or not at all."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replaced_folder(folder: Path, ours: Collection[str], mark: str) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; renamed to `folder` if the block succeeds, removed if it raises.

    A killed process leaves it behind, and the next one empties it. If `folder` is a link, its target is replaced.

    Args:
        ours: names of files that may be replaced.
        mark: the one of these that every folder of this kind has.

    Raises:
        UserError: `folder` holds something else, so replacing it would lose it, or another process writes it.
    """
    folder = Path(os.path.realpath(folder))
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        other = min(names - set(ours) or (set() if mark in names else names), default=None)
    else:
        other = "a file" if folder.exists() else None
    if other is not None:
        raise UserError(f"{folder}: is not an export, or has {other} in it.", "Give a new or an empty folder.")
    beside = folder.parent / f".{folder.name}.export"  # not `.partial`, the staging folder of a table
    if beside.is_symlink():
        raise UserError(f"{beside} is a link, so it is not used.", "Remove it and export again.")
    beside.mkdir(parents=True, exist_ok=True)
    lock = FileLock(beside / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder} is being written by another process.", "Wait until that is done.") from error
    try:
        for path in beside.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        yield beside
        (beside / "lock").unlink()
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    finally:
        lock.release()


def _read_text(path: str | Path, remedy: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.", remedy) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).", remedy) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text.", remedy) from error
