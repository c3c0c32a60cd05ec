"""Prepare: turn a raw corpus into `prepared/<corpus>`, a checked table of utterance rows.

The rows of each corpus shard become a part of a `StagedTable`, named by a hash of the shard's files and the options.
Whatever stopped a run and whichever files were replaced since, the next run makes only the parts that are missing.
Parts are then merged by split and emotion, and one rename publishes the table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_csm.corpora import make_builder
from hf_csm.data.schema import UTTERANCE_FEATURES
from hf_csm.data.staged_table import StagedTable, merge_pieces, plan_shards
from hf_csm.data.table import count_splits, read_card_metadata, write_card
from hf_csm.errors import UserError
from hf_csm.prepare.builder import CorpusBuilder
from hf_csm.prepare.checks import hash_listing, hash_shard
from hf_csm.prepare.parts import GroupCounts, Part, make_part, plan_pieces, read_part
from hf_csm.prepare.pool import run_tasks, usable_cores
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
    """Result of a prepare.

    Attributes:
        corpus: its name.
        out: folder of the table.
        is_new: `False` if the table existed already.
        rows: one per split and emotion that has clips.
        adjustments: `[action, reason, count, example]` of clips that were dropped, repaired or otherwise changed.
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
        """Return the report as Markdown tables, readable in a terminal too."""
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
    /,
    *,
    num_workers: int | None = None,
    align_model: str | None = None,
    prosody: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> PrepareReport:
    """Turn a raw corpus into a prepared table. Run again after an interruption, it continues where it stopped.

    Args:
        corpus: a module of `dataset_builders`.
        raw: folder, zip or URL of the raw corpus, or several; `None` downloads it.
        out: folder of the table, or a link to it. It must not exist, unless it is the table of the same files (by
            name and size) and options.
        num_workers: processes; all cores by default (at most 4 with `align_model`).
        align_model: a CTC model for word times; `None` takes the energy of the clip.
        prosody: measure pitch, loudness and speaking rate of every clip, and plot them in the card.
        overwrite: replace the table at `out` if it is of other input or options.
        progress: show a progress bar.
        options: of the corpus.

    Raises:
        UserError: raw corpus or options are invalid, `out` holds something else, cannot be written or is being
            written by another run, no clip is left, or a speaker or a recording is in two splits. Nothing is
            published then.
    """
    out = Path(out).expanduser()
    builder = make_builder(corpus, raw, align_model=align_model, prosody=prosody, **options)
    shards, tally = builder.shards()
    fingerprint = _fingerprint(builder, hash_listing(shards))
    staged = StagedTable(
        out,
        fingerprint,
        overwrite=overwrite,
        remedy="Give the options that it was made with, --overwrite to replace it, or another folder with --out.",
    )
    num_workers = num_workers or (usable_cores() if align_model is None else min(4, usable_cores()))
    try:
        if staged.is_published() and not staged.folder.exists():
            return _report_from_card(out)
        with staged.lock():
            if staged.is_published():  # by a run that was killed before it could clean up, or that ended just now
                staged.remove()
                return _report_from_card(out)
            parts = _make_parts(builder, shards, staged, num_workers, progress)
            pieces, counts, dropped = plan_pieces(parts)
            for reason, id_ in dropped:
                tally.add("dropped", reason, id_)
            report = _report(corpus, out, parts, counts, tally)
            if not report.rows:
                reasons = "; ".join(f"{count:,} {reason}" for _, reason, count, _ in report.adjustments)
                raise UserError(
                    f"{builder.TITLE}: no clips are left: {reasons}.",
                    "Check that the raw corpus is complete, or choose other options.",
                )
            names = "".join(part.path.name for part in parts)
            table = staged.table(hashlib.sha256(names.encode()).hexdigest()[:16])
            tasks: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
                (merge_pieces, (shard_pieces, path, UTTERANCE_FEATURES))
                for path, shard_pieces in plan_shards(table, pieces).items()
                if not path.exists()
            ]
            for _ in run_tasks(tasks, num_workers, "fork"):
                pass
            languages = sorted({utterance.language for shard in shards for utterance in shard.utterances})
            _write_card(builder, table, report, fingerprint, languages)
            staged.publish(table)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: cannot be written ({error.strerror or error}).",
            "Free space, or name another folder with --out. Completed work is kept.",
        ) from error
    return report


def _fingerprint(builder: CorpusBuilder, listing: str) -> str:
    config = dataclasses.asdict(builder.config)
    ours = {key: value for key, value in sorted(config.items()) if key not in ("sources", "data_dir", "data_files")}
    facts = [ROWS_VERSION, builder.corpus, str(ours), str(UTTERANCE_FEATURES), listing]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _make_parts(
    builder: CorpusBuilder, shards: list[Shard], staged: StagedTable, num_workers: int, progress: bool
) -> list[Part]:
    paths = [staged.part(_fingerprint(builder, hash_shard(shard))) for shard in shards]
    parts: dict[int, Part] = {}
    tasks: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    indices = []
    for index, path in enumerate(paths):
        if path.exists():
            parts[index] = read_part(path)
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


def _report(
    corpus: str, out: Path, parts: list[Part], counts: Mapping[tuple[str, str], GroupCounts], tally: Tally
) -> PrepareReport:
    for part in parts:
        tally.add_rows(part.tally)
    rows = [
        ReportRow(split, emotion, count.num_clips, round(count.duration_s / 3600, 6), len(count.speaker_ids))
        for (split, emotion), count in counts.items()
    ]
    alignments = sum((count.alignments for count in counts.values()), Counter[str]())
    return PrepareReport(corpus, out, True, rows, tally.rows(), dict(sorted(alignments.items())))


def _write_card(
    builder: CorpusBuilder, table: Path, report: PrepareReport, fingerprint: str, languages: list[str]
) -> None:
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

Source: {builder.HOMEPAGE}. License: {builder.LICENSE}.
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
        splits=count_splits(table),
        metadata=metadata,
        body=body,
        languages=languages,
    )


def _report_from_card(out: Path) -> PrepareReport:
    metadata = read_card_metadata(out)
    stored = metadata["report"]
    rows = [ReportRow(*row) for row in stored["rows"]]
    return PrepareReport(metadata["corpus"], out, False, rows, stored["adjustments"], stored["alignments"])


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
