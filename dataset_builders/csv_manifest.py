"""A corpus of your own: a table of sound files with their texts and labels.

    path,text,emotion,speaker
    anna/0001.flac,Where have you been?,angry,anna

The table is a .csv, .tsv or .jsonl (one object a line) in UTF-8, with paths relative to it, of any sound libsndfile
reads: wav, flac, ogg, mp3. Its columns, in any order and case, are `path`, `text`, `emotion` (a name of the shared
label space or a common synonym; empty for none) and `speaker`; optional are `split`, `language` (default en), `gender`
(male, female, other), `intensity` (low, medium, high), `arousal`, `valence`, `dominance` (0 to 1), `sentence` (all its
clips must be in one split), `emotion_perceived` and `emotion_agreement` (share of the raters, 0 to 1).

Without a column `split`, a tenth of the speakers is for validation and a tenth for testing, by hashes of their names.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_csm.data.labels import EMOTIONS, INTENSITIES
from hf_csm.data.text import normalize_text
from hf_csm.errors import UserError
from hf_csm.prepare.archive import Member
from hf_csm.prepare.builder import CorpusBuilder, CorpusConfig
from hf_csm.prepare.download import RemoteArchive
from hf_csm.prepare.tabular import read_rows
from hf_csm.prepare.utterance import Skipped, Utterance


SUFFIXES = (".csv", ".tsv", ".jsonl")
REQUIRED = ("path", "text", "emotion", "speaker")
NUMBERS = ("arousal", "valence", "dominance", "emotion_agreement")
OPTIONAL = ("split", "language", "gender", "intensity", "sentence", "emotion_perceived", *NUMBERS)
SYNONYMS = {
    "calmness": "calm",
    "relaxed": "calm",
    "happiness": "happy",
    "joy": "happy",
    "joyful": "happy",
    "sadness": "sad",
    "anger": "angry",
    "fear": "fearful",
    "afraid": "fearful",
    "scared": "fearful",
    "disgusted": "disgust",
    "surprise": "surprised",
    "contemptuous": "contempt",
}
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "development": "validation",
    "dev": "validation",
    "test": "test",
}
GENDERS = {"m": "male", "f": "female", "male": "male", "female": "female", "other": "other"}


@dataclass
class CsvManifestConfig(CorpusConfig):
    """Options of a corpus of your own.

    Attributes:
        corpus_name: name in the rows and prefix of ids; the table's name without suffix by default.
        license: license id of the Hugging Face Hub.
    """

    corpus_name: str | None = None
    license: str = "other"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.corpus_name or (find_table(self.sources).stem if self.sources else CsvManifest.NAME)
        self.corpus_name = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-")
        is_taken = self.corpus_name in {builder.NAME for builder in CorpusBuilder.__subclasses__()}
        if self.sources and (is_taken or not self.corpus_name):
            why = "is the name of a built-in corpus" if is_taken else "has no letter or digit of a to z, 0 to 9"
            raise UserError(f"{name!r} {why}.", "Give another name with corpus_name.")


class CsvManifest(CorpusBuilder):
    """A corpus of your own, described by a csv, tsv or jsonl."""

    BUILDER_CONFIG_CLASS = CsvManifestConfig
    NAME = "csv_manifest"
    TITLE = "your own corpus"
    NOTICE = "Made from a table of sound files by their owner, who sets the terms."
    HOMEPAGE = "the owner of the files"
    LABELS = {**{emotion: emotion for emotion in EMOTIONS}, **SYNONYMS}

    @property
    def LICENSE(self) -> str:  # type: ignore[override]
        """License id that the user gave."""
        return self.config.license

    @property
    def corpus(self) -> str:
        """Name in the rows and prefix of ids."""
        return self.config.corpus_name

    def archives(self) -> list[RemoteArchive]:
        """Return nothing: the files are local."""
        if not self.config.sources:
            raise UserError("csv_manifest: no table was given.", "Name a .csv, .tsv or .jsonl, or its folder.")
        return []

    def members(self, paths: list[str]) -> list[Member]:
        """Return the table and those of its files that exist.

        Raises:
            UserError: there is not exactly one table, it is damaged, or it names files outside its folder.
        """
        table = find_table(paths)
        folder = table.absolute().parent
        members = [Member(table.name, str(folder), table.stat().st_size, is_zipped=False)]
        names = {_name_in(folder, row["path"], where): None for where, row in _rows(members[0])}
        for name in names:
            if (folder / name).is_file():
                members.append(Member(name, str(folder), (folder / name).stat().st_size, is_zipped=False))
        return members

    def utterances(self, members: list[Member]) -> Iterator[Utterance | Skipped]:
        """Join the rows of the table, the first member, with their files."""
        table, files = members[0], {member.name: member for member in members[1:]}
        rows = [(where, _name_in(Path(table.source), row["path"], where), row) for where, row in _rows(table)]
        if not rows:
            raise UserError(f"{table}: has no rows.", f"Write the columns {', '.join(REQUIRED)} and a row per clip.")
        unused = {column: None for _, _, row in rows for column in row if column not in (*REQUIRED, *OPTIONAL)}
        yield from (Skipped(f"column {column}", "unused column", action="noted") for column in unused)
        splits: dict[str, str] = {}
        if not any("split" in row for _, _, row in rows):
            splits = split_speakers({row["speaker"] for _, name, row in rows if name in files})
            if set(splits.values()) == {"train"}:
                yield Skipped(table, "fewer than three speakers: all are for training", action="noted")
        name_of_id: dict[str, str] = {}
        first_of: dict[str, tuple[str, dict[str, str]]] = {}
        for where, name, row in rows:
            if name not in files:
                yield Skipped(name, "row without its file", is_fault=True)
                continue
            first_where, first = first_of.setdefault(name, (where, row))
            if {**row, "path": ""} != {**first, "path": ""}:
                raise UserError(f"{where}: {name} differs from its row in {first_where}.", "Remove the wrong one.")
            utterance = self._utterance(files[name], row, splits, where)
            if name_of_id.setdefault(utterance.id, name) != name:
                raise UserError(
                    f"{where}: {name} and {name_of_id[utterance.id]} have the same id, {utterance.id}.",
                    "Rename one of the files.",
                )
            yield utterance

    def _utterance(self, member: Member, row: dict[str, str], splits: dict[str, str], where: str) -> Utterance:
        for column in ("speaker", *(("split",) if not splits else ())):
            if not row.get(column):
                raise UserError(f"{where}: no {column}.", f"Give every clip its {column}.")
        stem = os.path.splitext(member.name)[0].replace("/", "-")
        sentence, gender = row.get("sentence"), _choose(row, "gender", GENDERS, where)
        return Utterance(
            id=f"{self.corpus}-{stem}",
            member=member,
            text=normalize_text(row["text"], where),
            emotion_raw=_choose(row, "emotion", self.LABELS, where),
            emotion_perceived_raw=_choose(row, "emotion_perceived", self.LABELS, where),
            emotion_agreement=_share(row, "emotion_agreement", where),
            intensity=_choose(row, "intensity", INTENSITIES, where),
            arousal=_share(row, "arousal", where),
            valence=_share(row, "valence", where),
            dominance=_share(row, "dominance", where),
            speaker_id=f"{self.corpus}-{row['speaker']}",
            gender=GENDERS[gender] if gender else None,
            split=splits[row["speaker"]] if splits else SPLIT_NAMES[_choose(row, "split", SPLIT_NAMES, where) or ""],
            language=row.get("language", "").lower() or "en",
            sentence_id=f"{self.corpus}-{sentence}" if sentence else None,
        )


def find_table(paths: list[str]) -> Path:
    """Return the table at the given path, or the only one in the given folder.

    Raises:
        UserError: there is none, or more than one.
    """
    if len(paths) != 1:
        raise UserError(f"csv_manifest: {len(paths)} sources.", "Name one .csv, .tsv or .jsonl, or its folder.")
    path = Path(paths[0]).expanduser()
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return path
    if not path.is_dir():
        raise UserError(f"{path}: not a table or folder.", "Name a .csv, .tsv or .jsonl, or the folder that holds it.")
    tables = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if len(tables) != 1:
        found = ", ".join(table.name for table in tables) or "none"
        raise UserError(f"{path}: not exactly one .csv, .tsv or .jsonl: {found}.", "Name the table itself.")
    return tables[0]


def split_speakers(speakers: Iterable[str]) -> dict[str, str]:
    """Return the split of each speaker: by hash, a tenth test and validation (at least one each), the others train.

    With fewer than three speakers, all are for training.
    """
    ranked = sorted(speakers, key=lambda speaker: hashlib.sha256(speaker.encode()).digest())
    share = max(1, round(len(ranked) / 10)) if len(ranked) >= 3 else 0
    names = ["test"] * share + ["validation"] * share
    return {speaker: names[rank] if rank < len(names) else "train" for rank, speaker in enumerate(ranked)}


def _rows(table: Member) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield location and cells of each row, columns in lower case."""
    for where, cells in read_rows(table):
        row = {column.lower(): cell for column, cell in cells.items()}
        missing = [column for column in REQUIRED if column not in row]
        if missing:
            raise UserError(
                f"{where}: no column {', '.join(missing)}; there are {', '.join(cells) or 'none'}.",
                f"A table needs {', '.join(REQUIRED)}; leave the emotion empty if there is none.",
            )
        yield where, row


def _name_in(folder: Path, path: str, where: str) -> str:
    """Return a path relative to `folder`, with `/`. Links are followed: they are the user's own."""
    below = os.path.relpath(os.path.normpath(folder / path.replace("\\", "/")), folder) if path else "."
    if below == "." or below.split(os.sep)[0] == "..":
        raise UserError(
            f"{where}: the path {path!r} is not below {folder}.", "Put the table in a folder that holds its files."
        )
    return Path(below).as_posix()


def _choose(row: dict[str, str], column: str, known: Collection[str], where: str) -> str | None:
    """Return a cell in lower case; `None` if it is empty."""
    name = row.get(column, "").lower()
    if name and name not in known:
        raise UserError(f"{where}: unknown {column} {row[column]!r}.", f"Choose from {', '.join(known)}.")
    return name or None


def _share(row: dict[str, str], column: str, where: str) -> float | None:
    """Return a number from 0 to 1, `None` if the cell is empty."""
    cell = row.get(column, "")
    try:
        number = float(cell or "0")
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise UserError(f"{where}: {column} is {cell!r}.", "Give a number from 0 to 1, or leave it empty.")
    return number if cell else None
