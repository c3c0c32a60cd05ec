"""Publish a trained adapter, or the model merged with it, on the Hugging Face Hub, so that it serves there."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from hf_csm.errors import UserError
from hf_csm.files import read_json, write_text_atomic
from hf_csm.hub import hub_errors
from hf_csm.mixture.provenance import CORPORA_NAME, CorpusTerms, read_corpora
from hf_csm.models.emotion_control import read_emotion_control, write_emotion_control
from hf_csm.models.moshi.checkpoint import CONSOLIDATED_NAME, find_checkpoint, without_lora
from hf_csm.models.moshi.export import LORA_NAME, check_adapter, named_base
from hf_csm.models.moshi.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, read_adapter
from hf_csm.models.moshi.merge import WEIGHTS_NAME, check_loadable, merge_adapter
from hf_csm.models.moshi.pull import CONFIG_NAME, EMOTIONS_NAME, find_folder
from hf_csm.models.moshi.verify import verify_export
from hf_csm.publish.card import CARD_NAME, facts_of, write_card
from hf_csm.publish.licenses import LICENSE_FILE, base_terms, check_card_values, check_licenses, with_stated
from hf_csm.publish.resolve_base import HubBase, find_base
from hf_csm.publish.run_artifacts import RUN_FILES, SAMPLES_NAME, copy_run_files, run_folder
from hf_csm.publish.upload import Target, check_may_write, log_in, open_repository, send_files


if TYPE_CHECKING:
    from huggingface_hub import HfApi

ADAPTER_FILES = (LORA_NAME, ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)
MODEL_FILES = (CARD_NAME, LICENSE_FILE, CONFIG_NAME, EMOTIONS_NAME, WEIGHTS_NAME, *ADAPTER_FILES)
PATTERNS = (*MODEL_FILES, *RUN_FILES, f"{SAMPLES_NAME}/*.wav")
"""Files of hf-csm in a model repository; `*` includes subfolders."""
HUB_CACHE_NAME = "snapshots"
"""Folder of the Hub's cache that holds the commits of a repository."""
EXPORT_AGAIN = "Export the checkpoint again."


@dataclass(frozen=True)
class Trained:
    """The files of a checkpoint or an export.

    Attributes:
        folder: the given folder, links resolved.
        native: folder with moshi's config.json and weights.
        adapter: folder of the PEFT adapter; None for merged weights.
        base: name or path of the base model.
        base_revision: of the base model, if one was given.
    """

    folder: Path
    native: Path
    adapter: Path | None
    base: str
    base_revision: str | None


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
    wanted = (ADAPTER_WEIGHTS_NAME, *RUN_FILES)
    trained = read_trained(find_folder(checkpoint, checkpoint_revision, also=wanted))
    is_merged = merged or trained.adapter is None
    api = log_in(repo_id, "ann/moshiko-happy")
    corpora = with_stated(_read_terms(run_folder(trained.folder)), stated or {})
    config = read_json(trained.native / CONFIG_NAME, EXPORT_AGAIN)
    if trained.adapter is not None:
        check_adapter(trained.native, trained.adapter)
    base = find_base(api, config, trained.base, trained.base_revision, base_model, merged=is_merged)
    terms = base_terms(base.repo_id, base.license)
    check_licenses(corpora, repo_id, private=private, cleared=cleared, base=terms)
    check_card_values(corpora, repo_id)
    target = Target(repo_id, "model", PATTERNS, private, revision)
    with hub_errors(f"{repo_id}: "):
        present = open_repository(api, target, partial(check_same_model, repo_id, base.repo_id, is_merged))
        check_may_write(api, target)  # before the work of merging
    with staging_folder(trained.folder) as folder:
        _gather(trained, config, base, corpora, is_merged, folder, device)
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


def read_trained(checkpoint: Path) -> Trained:
    """Find the files to push.

    Raises:
        UserError: it is neither a checkpoint nor an export, or does not name its base model.
    """
    folder = checkpoint.expanduser().resolve()
    for adapter, native in ((folder / "adapter", folder / CONSOLIDATED_NAME), (folder, folder)):
        if (adapter / ADAPTER_CONFIG_NAME).is_file():
            config, _ = read_adapter(adapter)
            return Trained(folder, native, adapter, named_base(adapter, config), config.revision)
    if (folder / WEIGHTS_NAME).is_file() and (folder / EMOTIONS_NAME).is_file():
        control = read_emotion_control(folder)
        if control.base_model:
            return Trained(folder, folder, None, control.base_model, control.base_revision)
    raise UserError(
        f"{checkpoint} is neither a checkpoint of a run nor a folder that `hf-csm export` wrote.",
        "Give a folder such as checkpoints/run/best.",
    )


def _read_terms(run: Path) -> list[CorpusTerms]:
    """Return the corpora that a run was trained on; empty for older runs, which did not record them."""
    return read_corpora(run) if (run / CORPORA_NAME).is_file() else []


def check_same_model(repo_id: str, base: str, merged: bool, api: HfApi, revision: str | None, names: set[str]) -> None:
    """Raise unless the repository holds an earlier push of the same kind, adapter or merged, for the same base."""
    found: dict[str, Any] = {}
    if EMOTIONS_NAME in names:
        with tempfile.TemporaryDirectory() as beside, contextlib.suppress(ValueError):
            path = api.hf_hub_download(repo_id, EMOTIONS_NAME, revision=revision, local_dir=beside)
            found = json.loads(Path(path).read_text(encoding="utf-8"))
    theirs = "a merged model" if WEIGHTS_NAME in names else "an adapter" if LORA_NAME in names else None
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


def _gather(
    trained: Trained,
    config: Mapping[str, Any],
    base: HubBase,
    corpora: Sequence[CorpusTerms],
    merged: bool,
    folder: Path,
    device: torch.device | str,
) -> None:
    """Verify the model, and put all files but the card into `folder`, with names that are valid anywhere."""
    trained_on = None if trained.adapter is None else find_checkpoint(trained.base, trained.base_revision)
    if not merged:
        assert trained.adapter is not None and trained_on is not None
        verify_export(trained.native, trained.adapter, trained_on, device=device)
        _link(trained.native / LORA_NAME, folder)
        _link(trained.adapter / ADAPTER_WEIGHTS_NAME, folder)
        peft_config = read_json(trained.adapter / ADAPTER_CONFIG_NAME, EXPORT_AGAIN)
        own = {"base_model_name_or_path": base.repo_id, "revision": base.revision}
        write_text_atomic(folder / ADAPTER_CONFIG_NAME, json.dumps(peft_config | own, indent=2) + "\n")
        config = {**config, **base.names}
    else:
        if trained.adapter is None or trained_on is None:  # verified when it was exported
            check_loadable(trained.folder / WEIGHTS_NAME, find_checkpoint(str(trained.folder)))
            _link(trained.folder / WEIGHTS_NAME, folder)
        else:
            merge_adapter(trained.adapter, trained_on, folder)
            verify_export(folder, trained.adapter, trained_on, device=device)
        config = {**without_lora(config), **base.names, "moshi_name": WEIGHTS_NAME}
    write_text_atomic(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    control = read_emotion_control(trained.folder)
    write_emotion_control(dataclasses.replace(control, base_model=base.repo_id, base_revision=base.revision), folder)
    copy_run_files(trained.folder, folder, corpora=corpora, base_model=base.repo_id)


def _link(path: Path, folder: Path) -> None:
    try:
        os.link(path.resolve(), folder / path.name)
    except OSError:  # another disk, or no hard links
        shutil.copyfile(path, folder / path.name)
