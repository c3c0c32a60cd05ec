"""Raw corpora as published: files in folders and members of zips, read in place without extraction."""

from __future__ import annotations

import functools
import os
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hf_csm.errors import UserError


@dataclass(frozen=True, order=True, slots=True)
class Member:
    """A file in a folder or in a zip.

    Attributes:
        name: path inside its source, with `/`.
        source: the folder or zip.
        num_bytes: size once read.
        is_zipped: whether `source` is a zip.
    """

    name: str
    source: str
    num_bytes: int
    is_zipped: bool

    @property
    def file_name(self) -> str:
        """The last part of the path."""
        return self.name.rsplit("/", 1)[-1]

    def read(self) -> bytes:
        """Return the content.

        Raises:
            UserError: the file or its zip is damaged, encrypted, gone or not readable.
        """
        try:
            if self.is_zipped:
                return _open_zip(self.source, os.getpid()).read(self.name)
            with open(os.path.join(self.source, self.name), "rb") as file:
                return file.read()
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, NotImplementedError) as error:
            raise UserError(
                f"{self}: the zip member cannot be read ({error}).", "The zip is damaged: download it again."
            ) from error
        except OSError as error:
            raise UserError(
                f"{self}: cannot be read ({error.strerror or error}).", "Check that it exists and may be read."
            ) from error

    def __str__(self) -> str:
        return f"{self.source}:{self.name}" if self.is_zipped else os.path.join(self.source, self.name)


def list_members(sources: Iterable[str | Path]) -> list[Member]:
    """List every file of folders and zips, those of zips inside folders too, sorted by depth and name.

    Hidden files and metadata files of macOS and Windows are not listed.

    Raises:
        UserError: a source is missing, empty, not a folder or zip, a damaged zip, or a zip with unsafe names.
    """
    members: list[Member] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found = _list_folder(path)
            if not found:
                raise UserError(f"{path}: the folder holds no files.", "Name the folder or zip that holds the corpus.")
        elif path.is_file():
            found = _list_zip(path)
            if not found:
                raise UserError(f"{path}: the zip holds no files.", "Download it again.")
        else:
            raise UserError(f"{path}: no such file or folder.", "Name the folder or zip that holds the corpus.")
        members += found
    return sorted(members, key=lambda member: (member.name.count("/"), member.name, member.source))


def _list_folder(folder: Path) -> list[Member]:
    members: list[Member] = []
    seen_folders: set[str] = set()

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}).", "Check its permissions.") from error

    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real_root = os.path.realpath(root)
        if real_root in seen_folders:  # a link to a parent folder would loop forever
            folders.clear()
            continue
        seen_folders.add(real_root)
        folders[:] = [name for name in folders if not _is_hidden(name)]
        inside = os.path.relpath(root, folder).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        for name in files:
            if _is_hidden(name):
                continue
            path = os.path.join(root, name)  # no `Path`: there may be a million files
            if name.lower().endswith(".zip"):
                members += _list_zip(Path(path))
                continue
            try:
                num_bytes = os.stat(path).st_size
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be read ({error.strerror}).", "Repair the link or remove it."
                ) from error
            members.append(Member(prefix + name, str(folder), num_bytes, is_zipped=False))
    return members


def _list_zip(path: Path) -> list[Member]:
    members = []
    for info in _open_zip(str(path), os.getpid()).infolist():
        # `filename` is cleaned of NUL and of the platform's separators only.
        parts = PurePosixPath(info.filename.replace("\\", "/")).parts
        if ".." in parts or info.filename.startswith(("/", "\\")) or (parts and ":" in parts[0]):
            raise UserError(
                f"{path}: the member {info.filename!r} points outside the zip.",
                "This is not a zip as its corpus publishes it: download it from the source.",
            )
        if info.is_dir() or any(_is_hidden(part) for part in parts):
            continue
        members.append(Member(info.filename, str(path), info.file_size, is_zipped=True))
    return members


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


@functools.lru_cache(maxsize=8)
def _open_zip(path: str, process_id: int) -> zipfile.ZipFile:
    # By process: a forked worker that shares the parent's file handle also shares its position.
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        num_bytes = os.path.getsize(path)
        raise UserError(
            f"{path}: not a zip, or a truncated one ({num_bytes:,} bytes; {error}).", "Download it again."
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).", "Check its permissions.") from error
