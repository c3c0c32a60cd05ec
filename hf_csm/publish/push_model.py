"""Publish a trained adapter, or the model merged with it, on the Hugging Face Hub, so that it serves there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from hf_csm.errors import UserError
from hf_csm.hub import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, EMOTIONS_NAME, hub_errors
from hf_csm.mixture.provenance import read_corpora
from hf_csm.models import get_family
from hf_csm.models.emotion_control import read_emotion_control
from hf_csm.models.family import Family
from hf_csm.publish.card import CARD_NAME, facts_of, write_card
from hf_csm.publish.export import hash_merged, set_base, write_verified
from hf_csm.publish.licenses import LICENSE_FILE, base_terms, check_card_values, check_licenses, with_stated
from hf_csm.publish.resolve_base import resolve_base
from hf_csm.publish.run_artifacts import RUN_FILES, SAMPLES_NAME, copy_run_files, run_folder
from hf_csm.publish.trained import find_trained
from hf_csm.publish.upload import Target, check_may_write, log_in, open_repository, send_files


if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUB_CACHE_NAME = "snapshots"
"""Folder of the Hub's cache that holds the commits of a repository."""


def push_model(
    checkpoint: str | Path,
    repo_id: str,
    *,
    merged: bool = False,
    private: bool = False,
    revision: str | None = None,
    checkpoint_revision: str | None = None,
    base_model: str | None = None,
    stated: Mapping[str, str] | None = None,
    cleared: Collection[str] = (),
    device: torch.device | str = "cpu",
) -> str:
    """Upload a trained adapter with card, metrics and samples in one commit, and return its address.

    `python -m moshi.server --hf-repo user/name` serves it, PEFT loads it. The model is verified first, see
    `verify_export`. After an interruption, another run sends only the missing files. Other files in the
    repository stay.

    Args:
        checkpoint: of a run, a folder that `hf-csm export` wrote, or a repository on the Hub that was pushed before,
            whose samples are not copied.
        repo_id: `user/name`; created if missing.
        merged: push merged weights instead of the adapter.
        private: create the repository as private; an existing one must be private.
        revision: branch to push to, created if missing (default: the main branch).
        checkpoint_revision: branch, tag or commit of a `checkpoint` on the Hub.
        base_model: repository with the same base model, if training used a local folder.
        stated: license id of the Hub by corpus, for corpora without a stated license.
        cleared: corpora whose terms, which the user has signed, allow publishing such models.
        device: on which the trained model and what is pushed are compared.

    Raises:
        UserError: a license forbids it, the base model is not on the Hub, a file is damaged, the repository holds
            something else, or the Hub cannot be reached or refuses the user.
        ExportError: the model loaded back differs from the trained one.
    """
    trained = find_trained(checkpoint, checkpoint_revision)
    is_merged = merged or trained.adapter is None
    api = log_in(repo_id, "ann/moshiko-happy")
    corpora = with_stated(read_corpora(run_folder(trained.folder)), stated or {})
    # The configuration of a merged model names the files of its base that it needs.
    named, named_revision = (trained.base, trained.base_revision) if trained.adapter else (str(trained.folder), None)
    family = get_family(named, named_revision)
    weights, others = family.base_urls(named, named_revision)
    base = resolve_base(
        api,
        trained.base,
        trained.base_revision,
        base_model,
        weights=weights if trained.adapter else None,
        others=others,
        merged=is_merged,
    )
    terms = base_terms(base.repo_id, base.license)
    check_licenses(corpora, repo_id, private=private, cleared=cleared, base=terms)
    check_card_values(corpora, repo_id)
    if trained.adapter is None:  # last, because it reads all weights
        _check_merged(family, checkpoint, checkpoint_revision, trained.folder)
    target = Target(repo_id, "model", file_patterns(family), private, revision)
    with hub_errors(f"{repo_id}: "):
        present = open_repository(api, target, partial(check_same_model, repo_id, base.repo_id, is_merged, family))
        check_may_write(api, target)  # before the work of merging
    with staging_folder(trained.folder) as folder:
        if trained.adapter is not None:
            write_verified(family, trained, folder, merged=is_merged, device=device)
        else:
            for filename in (*family.merged_files, EMOTIONS_NAME):
                _link(trained.folder / filename, folder)
        set_base(folder, base.repo_id, base.revision, urls=base.urls)
        copy_run_files(trained.folder, folder, corpora=corpora, base_model=base.repo_id)
        facts = facts_of(
            folder,
            repo_id,
            corpora,
            base_model=base.repo_id,
            base_revision=base.revision,
            base_license=base.license,
            merged=is_merged,
        )
        write_card(facts, folder)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        assert all(map(target.has, files)), sorted(files)
        with hub_errors(f"{repo_id}: "):
            what = f"merged with {base.repo_id}" if is_merged else f"for {base.repo_id}"
            return send_files(api, target, files, present, f"Upload {trained.folder.name}, {what}")


def file_patterns(family: Family) -> tuple[str, ...]:
    """Return the patterns of the files that a push may replace in a model repository; `*` includes subfolders."""
    adapter = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, *family.adapter_files)
    beside = (CARD_NAME, LICENSE_FILE, EMOTIONS_NAME, *RUN_FILES, f"{SAMPLES_NAME}/*.wav")
    return (*adapter, *family.merged_files, *beside)


def check_same_model(
    repo_id: str, base: str, merged: bool, family: Family, api: HfApi, revision: str | None, names: set[str]
) -> None:
    """Raise unless the repository holds an earlier push of the same kind, adapter or merged, for the same base."""
    found: dict[str, Any] = {}
    if EMOTIONS_NAME in names:
        with tempfile.TemporaryDirectory() as beside, contextlib.suppress(ValueError):
            path = api.hf_hub_download(repo_id, EMOTIONS_NAME, revision=revision, local_dir=beside)
            found = json.loads(Path(path).read_text(encoding="utf-8"))
    is_adapter, is_model = (names.issuperset(files) for files in (family.adapter_files, family.merged_files))
    theirs = "an adapter" if is_adapter else "a merged model" if is_model else None
    if not isinstance(found, dict) or not found.get("base_model") or theirs is None:
        theirs = "a table" if any(name.endswith(".parquet") for name in names) else "something other than a model"
        theirs += " of hf-csm" if theirs.startswith("something") else ""
    elif found["base_model"] == base and theirs == ("a merged model" if merged else "an adapter"):
        return
    else:
        theirs += f" of {found['base_model']}"
    raise UserError(
        f"{repo_id}: the repository exists and holds {theirs}.", "Name another one; this one is left as it is."
    )


@contextlib.contextmanager
def staging_folder(checkpoint: Path) -> Iterator[Path]:
    """Yield an empty folder beside `checkpoint`, removed at the end; leftovers of a killed push are removed first.

    If nothing can be written there, and for the Hub's cache, it is a temporary folder.

    Raises:
        UserError: another process pushes the same checkpoint, or the folder's name is taken.
    """
    if not os.access(checkpoint.parent, os.W_OK) or checkpoint.parent.name == HUB_CACHE_NAME:
        with tempfile.TemporaryDirectory(prefix="hf-csm-push-") as new:
            yield Path(new)
        return
    folder = checkpoint.parent / f".{checkpoint.name}.push"
    key = hashlib.sha256(f"{os.getuid()} {folder}".encode()).hexdigest()[:16]
    try:
        # Outside the folder, so that removing the folder does not remove a lock that another process waits for.
        lock = FileLock(Path(tempfile.gettempdir(), f"hf-csm-push-{key}.lock")).acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{checkpoint} is being pushed by another process.", "Wait until that is done.") from error
    with lock:
        try:
            if folder.is_dir():
                if folder.stat().st_uid != os.getuid():
                    raise PermissionError
                shutil.rmtree(folder)  # an error for a link
            folder.mkdir()
        except OSError as error:
            raise UserError(
                f"{folder} is a link, a file or another user's, so it is not used.", "Remove it and push again."
            ) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _check_merged(family: Family, name: str | Path, revision: str | None, folder: Path) -> None:
    """Check that a merged model is the one that was verified when it was written."""
    family.find_checkpoint(str(name), revision)  # downloads the weights
    if hash_merged(family, folder) != read_emotion_control(folder).merged_sha256:
        raise UserError(
            f"{name}: the merged model is not the one that was verified, or an older version wrote it.",
            "Push the checkpoint that it was made from, with --merged, or export it again.",
        )


def _link(path: Path, folder: Path) -> None:
    try:
        os.link(path.resolve(), folder / path.name)
    except OSError:  # another disk, or no hard links
        shutil.copyfile(path, folder / path.name)
