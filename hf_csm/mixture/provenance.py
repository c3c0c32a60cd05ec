"""Training-data provenance: the corpora of a run and their terms, for model cards and license checks.

Training writes `corpora.json` to the run's folder; it is copied into every export.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hf_csm.config import DatasetConfig
from hf_csm.corpora import all_builders
from hf_csm.data.labels import UNLABELLED
from hf_csm.data.table import read_card_metadata, read_columns, split_files
from hf_csm.errors import UserError
from hf_csm.files import write_text_atomic
from hf_csm.hub import find_table
from hf_csm.mixture.windows import WindowTable, is_manifest
from hf_csm.units import Seconds, frames_to_seconds


CORPORA_NAME = "corpora.json"
UNSTATED = "unknown"
UNSTATED_LICENSES = ("", "other", UNSTATED)
"""License ids that state no terms."""
_LICENSES = (
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research "
    "isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl "
    "ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib"
)
LICENSES = frozenset(_LICENSES.split())
"""License ids of the Hub."""
LANGUAGE = re.compile("[a-z]{2,3}")
"""A language on a card of the Hub: an ISO 639-1, 639-2 or 639-3 code."""


@dataclass(frozen=True)
class CorpusTerms:
    """A corpus that a run trains on.

    Attributes:
        corpus: its name in the rows.
        title: full name.
        license: license id of the Hub, in lower case; `unknown` if not stated.
        notice: attribution and terms to repeat.
        homepage: URL of the corpus.
        not_to_be_published: why its audio, codes, texts and labels may not be distributed; null if they may.
        table: dataset on the Hub; null for a local folder, whose path is private.
        revision: of that dataset.
        replay: ordinary dialogues, mixed in against forgetting.
        num_windows: training windows after the filters.
        duration_s: of these windows.
        emotions: number of windows by emotion; `unlabelled` for those without.
        languages: of these windows, where the table has them.
    """

    corpus: str
    title: str
    license: str
    notice: str = ""
    homepage: str = ""
    not_to_be_published: str | None = None
    table: str | None = None
    revision: str | None = None
    replay: bool = False
    num_windows: int = 0
    duration_s: Seconds = 0.0
    emotions: dict[str, int] = field(default_factory=dict)
    languages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "license", license_id(self.license) or UNSTATED)


def license_id(stated: object) -> str:
    """Return the license field of a card or file in lower case; a list is joined by commas."""
    return ", ".join(map(str, stated)).lower() if isinstance(stated, list) else str(stated or "").strip().lower()


def corpora_of(config: DatasetConfig) -> list[CorpusTerms]:
    """Return the terms of the tables in a run's configuration, without counts.

    A manifest that is not encoded yet has the corpus of the card beside it, if there is one.

    Raises:
        UserError: a table is missing or not an hf-csm table.
    """
    replay = config.replay.manifest_path if config.replay and config.replay.fraction else None
    named = [(source.path, source.revision, False) for source in config.training_sources()]
    named += [] if replay is None else [(replay, None, True)]
    found = []
    for path, revision, is_replay in named:
        place = Path(path).parent if is_manifest(path) else find_table(path, revision)
        table = None if Path(path).expanduser().exists() or is_manifest(path) else path
        found += [
            replace(terms, table=table, revision=revision if table else None, replay=is_replay)
            for terms in _terms_in(place, Path(path).stem)
        ]
    return found


def count_windows(corpora: Sequence[CorpusTerms], table: WindowTable) -> list[CorpusTerms]:
    """Return the terms with the counts of `table`, opened for the same configuration."""
    rows: dict[tuple[str, bool], list[int]] = {}
    for is_replay, groups in ((False, table.groups(["corpus"])), (True, [table.replay_group()])):
        for row in (int(row) for group in groups for row in group.rows):
            rows.setdefault((table.corpora[row], is_replay), []).append(row)
    known = {(terms.corpus, terms.replay): terms for terms in reversed(corpora)}
    counted = []
    for key, own in rows.items():
        # The corpus of a manifest is known only after encoding; no card states its license.
        terms = known.get(key) or CorpusTerms(key[0], key[0], UNSTATED, replay=key[1])
        emotions = Counter(table.emotions[row] or UNLABELLED for row in own)
        counted.append(
            replace(
                terms,
                num_windows=len(own),
                duration_s=frames_to_seconds(int(table.num_frames[own].sum())),
                emotions=dict(sorted(emotions.items())),
                languages=sorted({language for language in (table.languages[row] for row in own) if language}),
            )
        )
    return counted


def with_earlier(corpora: Sequence[CorpusTerms], run_dir: Path) -> list[CorpusTerms]:
    """Add the corpora that the run in `run_dir` has trained on so far, for a run that resumes from it."""
    names = {(terms.corpus, terms.replay) for terms in corpora}
    return [*corpora, *(terms for terms in read_corpora(run_dir) if (terms.corpus, terms.replay) not in names)]


def write_corpora(corpora: Sequence[CorpusTerms], folder: Path) -> None:
    """Write `corpora.json` atomically."""
    write_text_atomic(folder / CORPORA_NAME, json.dumps([asdict(terms) for terms in corpora], indent=2) + "\n")


def read_corpora(folder: Path) -> list[CorpusTerms]:
    """Read `corpora.json`; empty if there is none, as in older runs.

    For corpora with a builder, the builder's terms override the file, which may be edited.

    Raises:
        UserError: it is damaged.
    """
    path = folder / CORPORA_NAME
    if not path.exists():
        return []
    known = {option.name for option in fields(CorpusTerms)}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        found = [CorpusTerms(**{name: value for name, value in row.items() if name in known}) for row in rows]
        for terms in found:
            _check_types(terms)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}, the record of the training data, cannot be read ({type(error).__name__}).",
            "Training writes it; resume the run with --resume-from-checkpoint latest, or copy the whole run folder.",
        ) from error
    builders = {builder.NAME: builder for builder in all_builders()}
    return [_with_builder(terms, builders.get(terms.corpus)) for terms in found]


def _check_types(terms: CorpusTerms) -> None:
    """Raise `TypeError` for a field of a wrong type: the file may come from the Hub."""
    optional = (terms.not_to_be_published, terms.table, terms.revision)
    texts = (terms.corpus, terms.title, terms.license, terms.notice, terms.homepage, *terms.emotions, *terms.languages)
    numbers = (terms.num_windows, terms.duration_s, *terms.emotions.values())
    if not all(isinstance(text, str) for text in (*texts, *(text for text in optional if text is not None))):
        raise TypeError("not a text")
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise TypeError("not a number")


def _terms_in(folder: Path, fallback: str) -> list[CorpusTerms]:
    """Return the terms of each corpus named by the card or the rows of a table."""
    try:
        card = read_card_metadata(folder)
    except UserError:
        card = {"corpus": fallback, "title": fallback}
    files = split_files(folder, "train")
    spoken: dict[str, set[str]] = {}
    if files:
        rows = read_columns(files, ["corpus", "language"]).to_pydict()
        for name, language in zip(rows["corpus"], rows.get("language", [None] * len(rows["corpus"])), strict=True):
            spoken.setdefault(str(name), set()).update([language] if language else [])
    builders = {builder.NAME: builder for builder in all_builders()}
    of_card = CorpusTerms(
        str(card["corpus"]),
        str(card.get("title", card["corpus"])),
        UNSTATED if license_id(card.get("license")) in UNSTATED_LICENSES else license_id(card["license"]),
        str(card.get("notice", "")),
    )
    for name in (str(card["corpus"]), str(card.get("builder"))):  # renaming must not bypass the license
        of_card = replace(of_card, not_to_be_published=_with_builder(of_card, builders.get(name)).not_to_be_published)
    return [
        _with_builder(replace(of_card, corpus=name, languages=sorted(spoken.get(name, ()))), builders.get(name))
        for name in sorted(spoken) or [of_card.corpus]
    ]


def _with_builder(terms: CorpusTerms, builder: Any) -> CorpusTerms:
    if builder is None or not isinstance(builder.LICENSE, str):  # the user's own corpus
        return terms
    reason = terms.not_to_be_published or builder.NOT_TO_BE_PUBLISHED
    return replace(
        terms,
        title=builder.TITLE,
        license=builder.LICENSE,
        notice=builder.NOTICE,
        homepage=builder.HOMEPAGE,
        not_to_be_published=None if reason is None else reason.strip().rstrip("."),
    )
