"""Publish a table with its card on the Hugging Face Hub, if its license allows."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_csm.corpora import all_builders
from hf_csm.data.schema import SPLITS
from hf_csm.data.table import CARD_NAME, read_card_metadata, read_columns, split_files
from hf_csm.errors import UserError
from hf_csm.hub import TABLE_FILES, hub_errors, is_whole
from hf_csm.mixture.provenance import UNSTATED_LICENSES, license_id
from hf_csm.publish.upload import Target, log_in, open_repository, send_files


if TYPE_CHECKING:
    from huggingface_hub import HfApi


def push_table(folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a prepared or codes table with its card in one commit, and return its address.

    After an interruption, another run sends only the missing files. Other files than the card, `data/` and `plots/`
    stay in the repository.

    Args:
        folder: of the table.
        repo_id: `user/name`; created if missing.
        private: create the repository as private; an existing one must be private.
        revision: branch to push to, created if missing (default: the main branch).

    Raises:
        UserError: the license forbids it or is not stated, the table is incomplete, the repository holds something
            else, or the Hub cannot be reached or refuses the user.
    """
    folder = Path(folder)
    metadata = check_publishable(folder)
    api = log_in(repo_id, "ann/ravdess")
    target = Target(repo_id, "dataset", TABLE_FILES, private, revision)
    with hub_errors(f"{repo_id}: "):
        present = open_repository(api, target, partial(_check_same_table, repo_id, metadata))
        files = {file.relative_to(folder).as_posix(): file for file in table_files(folder)}
        return send_files(api, target, files, present, f"Upload {metadata['corpus']}, {metadata['stage']}")


def table_files(folder: Path) -> list[Path]:
    """Return the published files of a table: its card, Parquet files and plots."""
    plots = sorted(file for file in (folder / "plots").rglob("*") if file.is_file() and not file.name.startswith("."))
    return [folder / CARD_NAME, *(file for split in SPLITS for file in split_files(folder, split)), *plots]


def check_publishable(folder: Path) -> dict[str, Any]:
    """Return the card metadata of a table that may be published.

    The corpora in the rows count as well as the card, so that editing the card does not bypass a license.

    Raises:
        UserError: the license forbids it or is not stated, or it is not a complete hf-csm table.
    """
    from huggingface_hub.repocard import metadata_load

    metadata = read_card_metadata(folder)
    named = metadata.get("corpus")
    again = "Prepare or encode it again; its card and its files belong together."
    if metadata.get("stage") not in ("prepared", "codes") or not is_whole(folder):
        raise UserError(f"{folder}: not a whole table: files are missing or changed.", again)
    rows = read_columns([file for file in table_files(folder) if file.suffix == ".parquet"], ["corpus"])
    in_rows = set(rows["corpus"].unique().to_pylist()) if rows.column_names else set()
    builders = {builder.NAME: builder for builder in all_builders()}
    for corpus in sorted({str(name) for name in (*in_rows, named, metadata.get("builder"))}):
        builder = builders.get(corpus)
        if builder is not None and builder.NOT_TO_BE_PUBLISHED is not None:
            reason = builder.NOT_TO_BE_PUBLISHED.strip().rstrip(".")
            raise UserError(
                f"{folder}: {builder.TITLE} may not be published: {reason}.",
                f"Keep this table; others make it from their own copy of the corpus ({builder.HOMEPAGE}).",
            )
    if in_rows != {named}:
        found = ", ".join(sorted(map(str, in_rows)))
        raise UserError(f"{folder}: the card names the corpus {named}, the rows {found}.", again)
    card = folder / CARD_NAME
    stated = (metadata_load(card) or {}).get("license")
    builder = builders.get(str(named))
    if builder is None:
        if license_id(stated) in UNSTATED_LICENSES:
            raise UserError(
                f"{folder}: the license of the corpus {named} is not stated.",
                "State it in `hf-csm prepare csv_manifest --license cc-by-4.0`; a dialogue manifest cannot state one.",
            )
    elif stated != builder.LICENSE or builder.NOTICE not in card.read_text(encoding="utf-8").split("---\n", 2)[2]:
        raise UserError(f"{folder}: the card has lost the license or the notice that {builder.TITLE} asks for.", again)
    return metadata


def _check_same_table(
    repo_id: str, metadata: dict[str, Any], api: HfApi, revision: str | None, names: set[str]
) -> None:
    """Raise unless the repository holds an earlier version of this table."""
    found: dict[str, Any] = {}
    if CARD_NAME in names:
        with tempfile.TemporaryDirectory() as beside:  # not in the cache, where a lone card would pass for the table
            api.hf_hub_download(repo_id, CARD_NAME, repo_type="dataset", revision=revision, local_dir=beside)
            try:
                found = read_card_metadata(beside)
            except UserError:
                found = {}
    mine, theirs = ([card.get("corpus"), card.get("stage")] for card in (metadata, found))
    if mine != theirs:
        what = f"{theirs[0]}, {theirs[1]}" if found else "something other than a table of hf-csm"
        raise UserError(
            f"{repo_id}: the repository exists and holds {what}.", "Name another one; this one is left as it is."
        )
