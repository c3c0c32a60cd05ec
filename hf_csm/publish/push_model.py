"""Publish a trained adapter, or the model merged with it, on the Hugging Face Hub, so that it serves there."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
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

from hf_csm.errors import UserError
from hf_csm.hub import hub_errors
from hf_csm.mixture.provenance import CORPORA_NAME, CorpusTerms, read_corpora
from hf_csm.models.emotion_control import read_emotion_control, write_emotion_control
from hf_csm.models.moshi.checkpoint import CONSOLIDATED_NAME, LORA_KEYS, find_checkpoint
from hf_csm.models.moshi.export import LORA_NAME, check_adapter, named_base
from hf_csm.models.moshi.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, read_adapter
from hf_csm.models.moshi.merge import WEIGHTS_NAME, check_loadable, merge_adapter
from hf_csm.models.moshi.pull import CONFIG_NAME, EMOTIONS_NAME, find_folder
from hf_csm.models.moshi.verify import verify_export
from hf_csm.publish.card import CARD_NAME, facts_of, write_card
from hf_csm.publish.licenses import LICENCE_FILE, base_terms, check_card_values, check_licences, with_stated
from hf_csm.publish.resolve_base import HubBase, find_base
from hf_csm.publish.run_artifacts import RUN_FILES, SAMPLES_NAME, copy_run_files, run_folder
from hf_csm.publish.upload import Target, check_may_write, log_in, open_repository, send_files


if TYPE_CHECKING:
    from huggingface_hub import HfApi

ADAPTER_FILES = (LORA_NAME, ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)
MODEL_FILES = (CARD_NAME, LICENCE_FILE, CONFIG_NAME, EMOTIONS_NAME, WEIGHTS_NAME, *ADAPTER_FILES)
PATTERNS = (*MODEL_FILES, *RUN_FILES, f"{SAMPLES_NAME}/*.wav")
"""Of what is ours in a model's repository; `*` takes subfolders too."""
CACHED = "snapshots"
"""Folder in which the Hub's cache has the commits of a repository; nothing else belongs there."""


@dataclass(frozen=True)
class Trained:
    """What a checkpoint or an export has.

    Attributes:
        folder: as it was given, links followed.
        native: folder with moshi's config.json and weights.
        adapter: folder of the PEFT adapter; None for merged weights.
        base: name or path of the base model.
        base_revision: of it, if one was asked for.
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

    `python -m moshi.server --hf-repo user/name` serves it, PEFT loads it. Run again after an interruption, it sends
    only what has not arrived. What the repository has besides files of these names stays.

    Args:
        checkpoint: of a run, a folder that `hf-csm export` wrote, or a repository on the Hub that was pushed before,
            whose samples are not copied.
        repo_id: `user/name`; made if it does not exist.
        merged: send the weights of the whole model with the adapter merged in, instead of the adapter.
        private: whether a repository that is made is private; one that exists has to be so already.
        revision: branch to push to, made if it does not exist; the main one by default.
        checkpoint_revision: branch, tag or commit of a `checkpoint` on the Hub.
        base_model: repository that has the same base model, where that was trained on as a local folder.
        stated: licence id of the Hub by corpus, for corpora whose licence nobody has stated.
        cleared: corpora whose terms, which the user has signed, allow publishing such models.
        device: on which the trained model and what is pushed are compared.

    Raises:
        UserError: a licence forbids it, nobody else could load it, a file is damaged, the repository holds something
            else, or the Hub cannot be reached, does not know the user or does not let him write.
    """
    wanted = (ADAPTER_WEIGHTS_NAME, *RUN_FILES)
    trained = read_trained(find_folder(checkpoint, checkpoint_revision, also=wanted))
    is_merged = merged or trained.adapter is None
    api = log_in(repo_id, "ann/moshiko-happy")
    corpora = with_stated(_read_terms(run_folder(trained.folder)), stated or {})
    config = read_json(trained.native / CONFIG_NAME)
    if trained.adapter is not None:
        check_adapter(trained.native, trained.adapter)
    base = find_base(api, config, trained.base, trained.base_revision, base_model, merged=is_merged)
    terms = base_terms(base.repo_id, base.license)
    check_licences(corpora, repo_id, private=private, cleared=cleared, base=terms)
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
    """Return what there is to push.

    Raises:
        UserError: it is neither a checkpoint nor an export, or does not say what it was trained on.
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
    """Return the corpora that a run was trained on; nothing for runs of before, which did not write them down."""
    return read_corpora(run) if (run / CORPORA_NAME).is_file() else []


def check_same_model(repo_id: str, base: str, merged: bool, api: HfApi, revision: str | None, names: set[str]) -> None:
    """Raise if the repository has anything but an earlier push of an adapter, or a merged model, of the same base."""
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
    """Yield an empty folder beside `checkpoint`, which goes at the end; one that a killed push left is emptied first.

    Where nothing can be written there, and for what is in the Hub's cache, it is a new one among the temporary files.

    Raises:
        UserError: another process pushes the same checkpoint, or something else has the folder's name.
    """
    if not os.access(checkpoint.parent, os.W_OK) or checkpoint.parent.name == CACHED:
        with tempfile.TemporaryDirectory(prefix="hf-csm-push-") as new:
            yield Path(new)
        return
    folder = checkpoint.parent / f".{checkpoint.name}.push"
    handle = _lock(folder, checkpoint)
    try:
        _empty(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _lock(folder: Path, checkpoint: Path) -> int:
    """Make the folder if need be, and return a handle that holds its lock, which goes with the process."""
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # a push that ends has just removed it
            continue
        except OSError as error:
            raise _in_the_way(folder) from error
        try:
            if os.fstat(handle).st_uid != os.getuid():
                raise _in_the_way(folder)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.lstat(folder)):
                    return handle
        except BlockingIOError as error:
            os.close(handle)
            raise UserError(f"{checkpoint} is being pushed by another process.", "Wait until that is done.") from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # of a folder that was removed before it was locked


def _in_the_way(folder: Path) -> UserError:
    return UserError(f"{folder} is a link, a file or another user's, so it is not used.", "Remove it and push again.")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _gather(
    trained: Trained,
    config: Mapping[str, Any],
    base: HubBase,
    corpora: Sequence[CorpusTerms],
    merged: bool,
    folder: Path,
    device: torch.device | str,
) -> None:
    """Put all but the card into `folder`, with names that mean something to everybody."""
    trained_on = None if trained.adapter is None else find_checkpoint(trained.base, trained.base_revision)
    if not merged:
        assert trained.adapter is not None and trained_on is not None
        verify_export(trained.native, trained.adapter, trained_on, device=device)
        _link(trained.native / LORA_NAME, folder)
        _link(trained.adapter / ADAPTER_WEIGHTS_NAME, folder)
        peft_config = read_json(trained.adapter / ADAPTER_CONFIG_NAME)
        own = {"base_model_name_or_path": base.repo_id, "revision": base.revision}
        _write_json(peft_config | own, folder / ADAPTER_CONFIG_NAME)
        config = {**config, **base.names}
    else:
        if trained.adapter is None or trained_on is None:  # verified when it was exported
            check_loadable(trained.folder / WEIGHTS_NAME, find_checkpoint(str(trained.folder)))
            _link(trained.folder / WEIGHTS_NAME, folder)
        else:
            merge_adapter(trained.adapter, trained_on, folder)
            verify_export(folder, trained.adapter, trained_on, device=device)
        kept = {key: value for key, value in config.items() if key not in LORA_KEYS}
        config = {**kept, **base.names, "moshi_name": WEIGHTS_NAME}
    _write_json(config, folder / CONFIG_NAME)
    control = read_emotion_control(trained.folder)
    write_emotion_control(dataclasses.replace(control, base_model=base.repo_id, base_revision=base.revision), folder)
    copy_run_files(trained.folder, folder, corpora=corpora, base_model=base.repo_id)


def _link(path: Path, folder: Path) -> None:
    try:
        os.link(path.resolve(), folder / path.name)
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(path, folder / path.name)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged: {error}", "Export it again from its checkpoint.") from error


def _write_json(value: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
