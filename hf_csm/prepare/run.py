"""Prepare: a raw corpus becomes `prepared/<corpus>`, a table of utterance rows, checked, whole or not at all.

All work goes into `.<name>.partial` beside the table. One process makes the rows of a shard and leaves them there as
a part, which is named by the files of its shard and the options: whatever stopped a run and whatever was mended
since, the next one makes only the parts that are missing. Parts are then merged by split and emotion, and one rename
publishes the table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_csm.corpora import make_builder
from hf_csm.data.labels import EMOTIONS, UNLABELLED
from hf_csm.data.schema import SPLITS, UTTERANCE_FEATURES
from hf_csm.data.table import CARD_NAME, SplitInfo, read_card_metadata, shard_name, split_files, write_card
from hf_csm.errors import UserError
from hf_csm.prepare.builder import CorpusBuilder
from hf_csm.prepare.checks import hash_listing, hash_shard
from hf_csm.prepare.parts import Part, Piece, make_part, merge_pieces, plan_pieces, read_part
from hf_csm.prepare.pool import alone_in, remove_folder, run_tasks, usable_cores
from hf_csm.prepare.prosody_plots import draw_prosody
from hf_csm.prepare.utterance import Shard, Tally


# Part of the fingerprint: raise it when the same raw files give other rows.
ROWS_VERSION = 3


@dataclass(frozen=True)
class ReportRow:
    """Clips, hours and speakers of one emotion in one split."""

    split: str
    emotion: str
    num_clips: int
    hours: float
    num_speakers: int


@dataclass(frozen=True)
class PrepareReport:
    """What a prepare did.

    Attributes:
        corpus: its name.
        out: folder of the table.
        is_new: `False` if the table was there already.
        rows: one per split and emotion that has clips.
        adjustments: `[action, reason, count, example]` of what was dropped, repaired or done otherwise.
        alignments: number of clips by source of their word times.
    """

    corpus: str
    out: Path
    is_new: bool
    rows: list[ReportRow]
    adjustments: list[list[Any]] = field(default_factory=list)
    alignments: dict[str, int] = field(default_factory=dict)

    @property
    def num_clips(self) -> int:
        """Clips in the table."""
        return sum(row.num_clips for row in self.rows)

    @property
    def hours(self) -> float:
        """Hours in the table."""
        return sum(row.hours for row in self.rows)

    def render(self) -> str:
        """Return the report as Markdown tables, which read well in a terminal too."""
        cells = [[r.split, r.emotion, f"{r.num_clips:,}", f"{r.hours:.3f}", str(r.num_speakers)] for r in self.rows]
        cells.append(["all", "", f"{self.num_clips:,}", f"{self.hours:.3f}", ""])
        parts = [_markdown(["split", "emotion", "clips", "hours", "speakers"], cells, num_left=2)]
        if self.adjustments:
            adjusted = [[action, str(count), reason, example] for action, reason, count, example in self.adjustments]
            parts.append(_markdown(["action", "clips", "why", "example"], adjusted, num_left=4))
        else:
            parts.append("Nothing was dropped or repaired.")
        sources = ", ".join(f"{source} ({count:,})" for source, count in sorted(self.alignments.items()))
        parts.append(f"Word times from: {sources}.")
        return "\n\n".join(parts)


def prepare(
    corpus: str,
    raw: Any,
    out: str | Path,
    *,
    num_workers: int | None = None,
    align_model: str | None = None,
    prosody: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> PrepareReport:
    """Turn a raw corpus into a prepared table. Run again after an interruption, it goes on where it stopped.

    Args:
        corpus: a module of `dataset_builders`.
        raw: folder, zip or URL of the raw corpus, or several; `None` downloads it.
        out: folder of the table, or a link to it, which must not exist, unless it is this very table: of files of
            these names and sizes, with these options.
        num_workers: processes; all cores by default (at most 4 with `align_model`).
        align_model: a CTC model for word times; `None` takes the energy of the clip.
        prosody: measure pitch, loudness and rate of every clip, and draw them in the card.
        overwrite: replace the table at `out` if it is of other input or options.
        progress: show a bar.
        options: of the corpus.

    Raises:
        UserError: raw corpus or options are wrong, `out` holds something else, cannot be written or is being written
            by another run, no clip is left, or a check failed: no speaker and no identical audio in two splits.
            Nothing is published then.
    """
    out = Path(out).expanduser()
    builder = make_builder(corpus, raw, align_model=align_model, prosody=prosody, **options)
    shards, tally = builder.shards()
    fingerprint = _fingerprint(builder, hash_listing(shards))
    target = Path(os.path.realpath(out))
    staging = target.parent / f".{target.name}.partial"
    refusal = UserError(f"Another prepare is writing {out}.", "Wait for it, or name another folder with --out.")
    num_workers = num_workers or (usable_cores() if align_model is None else min(4, usable_cores()))
    try:
        if _is_done(out, fingerprint, overwrite) and not staging.exists():
            return _report_from_card(out)
        with alone_in(staging, refusal):
            if _is_done(out, fingerprint, overwrite):  # a run cut short after it, or one that ended just now
                remove_folder(staging)
                return _report_from_card(out)
            parts = _make_parts(builder, shards, staging / "parts", num_workers, progress)
            pieces, dropped = plan_pieces(parts)
            for reason, id_ in dropped:
                tally.add("dropped", reason, id_)
            report = _report(corpus, out, parts, pieces, tally)
            if not report.rows:
                reasons = "; ".join(f"{count:,} {reason}" for _, reason, count, _ in report.adjustments)
                raise UserError(
                    f"{builder.TITLE}: no clips are left: {reasons}.",
                    "Check that the raw corpus is whole, or choose other options.",
                )
            table = _open_table(staging, parts)
            _merge(pieces, table, num_workers)
            languages = sorted({utterance.language for shard in shards for utterance in shard.utterances})
            _write_card(builder, table, report, fingerprint, languages)
            _publish(table, staging, target)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: cannot be written ({error.strerror or error}).",
            "Free space, or name another folder with --out. What is done so far is kept.",
        ) from error
    return report


def _fingerprint(builder: CorpusBuilder, listing: str) -> str:
    config = dataclasses.asdict(builder.config)
    ours = {key: value for key, value in sorted(config.items()) if key not in ("sources", "data_dir", "data_files")}
    facts = [ROWS_VERSION, builder.corpus, str(ours), str(UTTERANCE_FEATURES), listing]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _is_done(out: Path, fingerprint: str, overwrite: bool) -> bool:
    """Say whether `out` is this table; raise if it is something that must stay."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        metadata = read_card_metadata(out)
    except UserError as error:
        raise UserError(
            f"{out}: exists and is not a table of hf-csm.", "Name another folder with --out; this one is left alone."
        ) from error
    if metadata.get("stage") == "prepared" and metadata.get("fingerprint") == fingerprint and not overwrite:
        return True
    if not overwrite:
        raise UserError(
            f"{out}: exists, made of other files or with other options.",
            "Give --overwrite to replace it, or name another folder with --out.",
        )
    return False


def _make_parts(
    builder: CorpusBuilder, shards: list[Shard], folder: Path, num_workers: int, progress: bool
) -> list[Part]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{_fingerprint(builder, hash_shard(shard))}.arrow" for shard in shards]
    parts: dict[int, Part] = {}
    tasks: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    indices = []
    for index, path in enumerate(paths):
        found = read_part(path)
        if found is not None:
            parts[index] = found
        else:
            indices.append(index)
            tasks.append((make_part, (builder, shards[index], path)))
    num_clips = sum(len(shard.utterances) for shard in shards)
    num_found = sum(len(shards[index].utterances) for index in parts)
    with tqdm(total=num_clips, initial=num_found, desc=builder.corpus, unit="clip", disable=not progress) as bar:
        # A forked process must not have imported torch, and cannot use a GPU.
        method = "fork" if builder.config.align_model is None else "spawn"
        for task_index, part in run_tasks(tasks, num_workers, method):
            parts[indices[task_index]] = part
            bar.update(len(shards[indices[task_index]].utterances))
    return [parts[index] for index in range(len(shards))]


def _open_table(staging: Path, parts: list[Part]) -> Path:
    """Return the folder for the table of these very parts; a table begun from others is removed."""
    names = hashlib.sha256("".join(Path(part.path).name for part in parts).encode()).hexdigest()[:16]
    table = staging / f"table-{names}"
    for other in staging.glob("table*"):
        if other != table:
            shutil.rmtree(other, ignore_errors=True)
    return table


def _merge(pieces: dict[tuple[str, str], list[list[Piece]]], table: Path, num_workers: int) -> None:
    tasks: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    for (split, emotion), files in pieces.items():
        for index, file_pieces in enumerate(files):
            path = table / "data" / split / shard_name(emotion, index, len(files))
            if not path.exists():  # it was renamed when whole, and the plan follows from the parts
                tasks.append((merge_pieces, (file_pieces, path)))
    for _ in run_tasks(tasks, num_workers, "fork"):
        pass


def _report(
    corpus: str, out: Path, parts: Iterable[Part], pieces: dict[tuple[str, str], list[list[Piece]]], tally: Tally
) -> PrepareReport:
    alignments: dict[str, int] = {}
    for part in parts:
        tally.add_rows(part.tally)
    rows = []
    for split in SPLITS:
        for emotion in (*EMOTIONS, UNLABELLED):
            found = [piece for file in pieces.get((split, emotion), []) for piece in file]
            if not found:
                continue
            for piece in found:
                for source, count in piece.alignments.items():
                    alignments[source] = alignments.get(source, 0) + count
            seconds = sum(piece.duration_s for piece in found)
            speakers = frozenset[str]().union(*(piece.speaker_ids for piece in found))
            num_clips = sum(piece.num_rows for piece in found)
            rows.append(ReportRow(split, emotion, num_clips, round(seconds / 3600, 6), len(speakers)))
    return PrepareReport(corpus, out, True, rows, tally.rows(), dict(sorted(alignments.items())))


def _write_card(
    builder: CorpusBuilder, table: Path, report: PrepareReport, fingerprint: str, languages: list[str]
) -> None:
    splits = {}
    for split in SPLITS:
        files = split_files(table, split)
        if files:
            num_rows = sum(row.num_clips for row in report.rows if row.split == split)
            splits[split] = SplitInfo(num_rows, sum(file.stat().st_size for file in files))
    prosody = f"\n{draw_prosody(table).strip()}\n" if builder.config.prosody else ""
    body = f"""
{builder.TITLE}, prepared by hf-csm: one row is one clip of one speaker, 24 kHz mono FLAC with its transcript, word
times and emotion in the label space that all corpora share.

```python
from datasets import load_dataset
from hf_csm.data.audio import decode_audio

row = next(iter(load_dataset("{builder.corpus}", split="train", streaming=True)))  # this folder or its Hub id
samples = decode_audio(row["audio"])  # float32, 24 kHz
```

No speaker and no recording is in two splits.

{report.render()}
{prosody}
## Source and terms

{builder.NOTICE}

Source: {builder.HOMEPAGE}. Licence: {builder.LICENSE}.
"""
    metadata = {
        "stage": "prepared",
        "corpus": builder.corpus,
        "builder": builder.NAME,
        "title": builder.TITLE,
        "license": builder.LICENSE,
        "notice": builder.NOTICE,
        "fingerprint": fingerprint,
        "report": {
            "rows": [list(dataclasses.astuple(row)) for row in report.rows],
            "adjustments": report.adjustments,
            "alignments": report.alignments,
        },
    }
    write_card(
        table,
        features=UTTERANCE_FEATURES,
        title=f"{builder.TITLE}, prepared",
        license=builder.LICENSE,
        splits=splits,
        metadata=metadata,
        body=body,
        languages=languages,
    )


def _report_from_card(out: Path) -> PrepareReport:
    metadata = read_card_metadata(out)
    stored = metadata["report"]
    rows = [ReportRow(*row) for row in stored["rows"]]
    return PrepareReport(metadata["corpus"], out, False, rows, stored["adjustments"], stored["alignments"])


def _publish(table: Path, staging: Path, out: Path) -> None:
    """Rename the table to its place. What `overwrite` replaces stays until the new one is there."""
    assert (table / CARD_NAME).is_file(), table
    replaced = staging / "replaced"
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(out, replaced)
    os.replace(table, out)
    remove_folder(staging)


def _markdown(header: list[str], rows: list[list[str]], num_left: int) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if column < num_left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
