"""Resolve the base model of an adapter on the Hub: URLs for a published config.json, and a check that files match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_csm.errors import UserError
from hf_csm.hub import hub_errors, split_url
from hf_csm.mixture.provenance import license_id
from hf_csm.publish.upload import file_oid, oid_of


if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

HUB, LOCAL = "hf://", "file://"


@dataclass(frozen=True)
class HubBase:
    """The base model of a published adapter.

    Attributes:
        repo_id: of the base model.
        revision: used for training, if one was given.
        license: on its card; several are joined by commas.
        urls: `hf://user/name/file` by the URLs of the trained base.
    """

    repo_id: str
    revision: str | None
    license: str | None
    urls: dict[str, str]


def resolve_base(
    api: HfApi,
    name_or_path: str,
    revision: str | None,
    base_model: str | None,
    *,
    weights: str | None,
    others: Sequence[str],
    merged: bool = False,
) -> HubBase:
    """Return the base of an adapter on the Hub.

    Args:
        name_or_path: of the base, as configured for the run.
        revision: of the base, if one was given.
        base_model: repository with the same files, if the base is a local folder.
        weights: URL of the weights, if they are available.
        others: URLs of the other files of the base.
        merged: weights are pushed merged, so those of a base on the Hub may have changed there.

    Raises:
        UserError: the base is local only, is not `base_model`, or has changed on the Hub.
    """
    urls = [*([weights] if weights else []), *others]
    if base_model == "":
        raise UserError("--base-model is empty.", "Give USER/NAME, or omit it.")
    is_local = Path(name_or_path).is_absolute() or any(url.startswith(LOCAL) for url in urls)
    if is_local and base_model is None:
        raise UserError(
            f"The base model is the local folder {name_or_path}.",
            "Give a Hub repository with the same files as --base-model USER/NAME; upload the folder if there is none.",
        )
    if not is_local and base_model not in (None, name_or_path):
        raise UserError(f"The adapter was trained on {name_or_path}, not on {base_model}.", "Leave --base-model out.")
    repo_id = base_model or name_or_path
    with hub_errors(f"{repo_id}, the base model: "):
        card = api.model_info(repo_id).card_data
        used = others if merged and not is_local else urls
        found = _same_on_hub(api, repo_id, used) if is_local else {url: url for url in used}
        for repo in sorted({split_url(url)[0] for url in found.values()}):
            files = [split_url(url)[1] for url in found.values() if split_url(url)[0] == repo]
            _check_served(api, repo, files, revision if repo == repo_id and not is_local else None)
    return HubBase(repo_id, None if is_local else revision, license_id(card.license if card else None) or None, found)


def _same_on_hub(api: HfApi, repo_id: str, urls: Sequence[str]) -> dict[str, str]:
    """Return, for each `file://` URL, the URL of the file in the repository with the same size and hash."""
    from huggingface_hub.hf_api import RepoFile

    files = [entry for entry in api.list_repo_tree(repo_id, recursive=True) if isinstance(entry, RepoFile)]
    found = {url: url for url in urls}
    for url in urls:
        if not url.startswith(LOCAL):
            continue
        path = Path(url.removeprefix(LOCAL))
        if not path.is_file():
            raise UserError(
                f"{path} is missing, so it cannot be compared with {repo_id}.",
                "Push from the machine with the base model, or copy it back.",
            )
        same = _same_file(path, files)
        if same is None:
            raise UserError(
                f"{repo_id} has no file identical to {path}.",
                "Name the repository of the base model that the adapter was trained on, or upload that folder.",
            )
        found[url] = f"{HUB}{repo_id}/{same}"
    return found


def _same_file(path: Path, files: list[RepoFile]) -> str | None:
    num_bytes = path.stat().st_size
    hashes: dict[int, str] = {}
    for file in sorted(files, key=lambda file: (file.path != path.name, file.path)):
        if file.size == num_bytes:
            oid = oid_of(file)
            hashes.setdefault(len(oid), file_oid(path, oid))
            if hashes[len(oid)] == oid:
                return file.path
    return None


def _check_served(api: HfApi, repo_id: str, files: list[str], revision: str | None) -> None:
    """Check that the main branch, the only one moshi reads, has these files, unchanged since `revision`."""
    served = _oids(api, repo_id, files, None)
    missing = sorted(set(files) - served.keys())
    if missing:
        raise UserError(f"{repo_id}, the base model, has no {missing[0]}.", "Train on a base that is on the Hub.")
    if revision is None:
        return
    trained = _oids(api, repo_id, files, revision)
    changed = sorted(file for file in files if trained.get(file) != served[file])
    if changed:
        raise UserError(
            f"{repo_id}: {changed[0]} has changed since the training revision {revision}; moshi reads the newest.",
            "Push merged weights (--merged), which need only Mimi and the tokenizer, or train on the newest base.",
        )


def _oids(api: HfApi, repo_id: str, files: list[str], revision: str | None) -> dict[str, str]:
    from huggingface_hub.hf_api import RepoFile

    entries = api.get_paths_info(repo_id, files, revision=revision)
    return {entry.path: oid_of(entry) for entry in entries if isinstance(entry, RepoFile)}
