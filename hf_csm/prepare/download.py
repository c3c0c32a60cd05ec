"""Download of archives: resumed after an interruption, verified, then renamed into place."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from tqdm import tqdm

from hf_csm.errors import UserError


_CHUNK_BYTES = 1 << 16
_TIMEOUT_S = 30
_NUM_TRIES = 5


@dataclass(frozen=True)
class RemoteArchive:
    """A file on the web.

    Attributes:
        url: its address.
        md5: of the file, if published.
        num_bytes: of the file, if published.
    """

    url: str
    md5: str | None = None
    num_bytes: int | None = None


def is_url(source: str) -> bool:
    """Return whether a source is a URL."""
    return source.startswith(("http://", "https://"))


def download_folder() -> Path:
    """Return the folder for downloads: `hf_csm/downloads` in the Hugging Face cache (`HF_HOME`)."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(home).expanduser() / "hf_csm" / "downloads"


def download(
    archive: RemoteArchive, folder: Path | None = None, *, progress: bool = True, wait_s: float = 1.0
) -> Path:
    """Download an archive unless it exists; an interrupted transfer resumes, also in a later run.

    Args:
        archive: to download.
        folder: the cache; `download_folder()` by default.
        progress: show a progress bar.
        wait_s: pause before the second try, doubled for each further one.

    Returns:
        the path of the verified file.

    Raises:
        UserError: the server cannot be reached or refuses, or the file is not the published one.
    """
    address = archive.url.split("#")[0]
    key = hashlib.sha256(address.encode()).hexdigest()[:12]
    target = (folder or download_folder()) / key / (Path(unquote(urlsplit(address).path)).name or "archive")
    if target.is_file():
        return target
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        was_resumed = part.is_file() and part.stat().st_size > 0
        _fetch(archive, address, part, progress, wait_s)
        if was_resumed and _fault(archive, part):  # the first half may be of another file: start over
            part.unlink()
            _fetch(archive, address, part, progress, wait_s)
        fault = _fault(archive, part)
        if fault:
            part.unlink()
            raise UserError(f"{address}: {fault}.", "Try again, or download the file by hand and name its path.")
        os.replace(part, target)
    except OSError as error:
        if isinstance(error, requests.RequestException):
            raise
        raise UserError(
            f"{target.parent}: cannot be written ({error.strerror or error}).",
            "Free space or set HF_HOME to a folder that can be written.",
        ) from error
    return target


def _fetch(archive: RemoteArchive, address: str, part: Path, progress: bool, wait_s: float) -> None:
    last_error = ""
    for attempt in range(_NUM_TRIES):
        if attempt:
            time.sleep(wait_s * 2 ** (attempt - 1))
        try:
            if _fetch_once(archive, address, part, progress):
                return
            last_error = "the connection closed early"
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else None
            last_error = f"HTTP {status}" if status else type(error).__name__
            if status is not None and status < 500 and status not in (408, 429):
                break
    raise UserError(
        f"{address}: cannot be downloaded ({last_error}).",
        "Check the network and run again (the download resumes), or download by hand and name the path.",
    )


def _fetch_once(archive: RemoteArchive, address: str, part: Path, progress: bool) -> bool:
    """Append the missing bytes to `part`; return whether it now has the length that the server stated."""
    num_have = part.stat().st_size if part.is_file() else 0
    # Without `identity` the server may compress, and offsets would not be those of the file.
    headers = {"Accept-Encoding": "identity"}
    if num_have:
        headers["Range"] = f"bytes={num_have}-"
    with requests.get(address, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
        if response.status_code == 416:  # no bytes after ours: complete, or another file
            if response.headers.get("Content-Range", "").rpartition("/")[2] == str(num_have):
                return True
            part.unlink()
            return False
        response.raise_for_status()
        is_resumed = response.status_code == 206
        if is_resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {num_have}-"):
            part.unlink()
            return False
        if not is_resumed:
            num_have = 0  # the server ignores ranges and sends the whole file
        length = response.headers.get("Content-Length")
        num_total = num_have + int(length) if length else archive.num_bytes
        bar = tqdm(desc=part.stem, total=num_total, initial=num_have, unit="B", unit_scale=True, disable=not progress)
        with open(part, "ab" if is_resumed else "wb") as file, bar:
            for chunk in response.iter_content(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    return num_total is None or part.stat().st_size >= num_total


def _fault(archive: RemoteArchive, path: Path) -> str | None:
    num_bytes = path.stat().st_size
    if archive.num_bytes is not None and num_bytes != archive.num_bytes:
        return f"received {num_bytes:,} bytes, published are {archive.num_bytes:,}"
    if archive.md5 is None:
        return None
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""):
            digest.update(chunk)
    return None if digest.hexdigest() == archive.md5 else f"md5 is {digest.hexdigest()}, published is {archive.md5}"
