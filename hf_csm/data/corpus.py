"""The base of all corpus builders: from raw files to finished utterance rows, the same way for every corpus.

A builder in `dataset_builders/` says what its files mean (`CorpusBuilder.utterances`). Everything else happens here,
so that no row can skip it: shared labels, 24 kHz mono FLAC, normalised transcript, word times, content hash.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import pkgutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow as pa

from hf_csm.data.align import energy_align, load_ctc_aligner
from hf_csm.data.archive import Member, list_members
from hf_csm.data.audio import encode_flac, hash_samples, read_audio, resample, to_int16
from hf_csm.data.download import RemoteArchive, download, is_url
from hf_csm.data.labels import emotion_id, intensity_id, map_label
from hf_csm.data.schema import ALIGNMENT_SOURCES, SPLITS, UTTERANCE_FEATURES
from hf_csm.data.text import normalise_text, split_words
from hf_csm.errors import UserError
from hf_csm.units import SAMPLE_RATE, samples_to_seconds


ROWS_PER_TABLE = 32


@dataclass(frozen=True)
class Utterance:
    """What a corpus says about one clip, before its sound is read. Fields as in `UTTERANCE_FEATURES`.

    `emotion_raw` and `emotion_perceived_raw` are the corpus's own labels, keys of the builder's `LABELS`; `words` are
    the corpus's own word times, or `None`.
    """

    id: str
    member: Member
    text: str
    emotion_raw: str
    speaker_id: str
    split: str
    gender: str | None = None
    language: str = "en"
    intensity: str | None = None
    words: tuple[tuple[str, float, float], ...] | None = None
    emotion_perceived_raw: str | None = None
    emotion_agreement: float | None = None
    arousal: float | None = None
    valence: float | None = None
    dominance: float | None = None


@dataclass(frozen=True)
class Skipped:
    """A file that belongs to the corpus and gives no row, and why (a phrase that makes sense after "dropped")."""

    member: Member
    reason: str


@dataclass(frozen=True)
class Shard:
    """All clips of one speaker: the unit that one process works on."""

    split: str
    speaker_id: str
    utterances: tuple[Utterance, ...]


@dataclass
class Tally:
    """What was dropped, repaired or done otherwise than asked: action and reason -> count and one example."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, action: str, reason: str, example: str, count: int = 1) -> None:
        """Count a case; the first example of each is kept."""
        key = (action, reason)
        self.counts[key] = self.counts.get(key, 0) + count
        self.examples.setdefault(key, example)

    def rows(self) -> list[list[Any]]:
        """Return `[action, reason, count, example]` of each case, sorted; plain data for JSON."""
        return [[*key, self.counts[key], self.examples[key]] for key in sorted(self.counts)]

    def add_rows(self, rows: Iterable[Iterable[Any]]) -> None:
        """Add what another tally's `rows` say."""
        for action, reason, count, example in rows:
            self.add(action, reason, example, count)


@dataclass
class CorpusConfig(datasets.BuilderConfig):
    """Options of every corpus. A builder with more of them subclasses this.

    Attributes:
        sources: folders, zips or URLs of the raw corpus; `None` for where the corpus is published.
        align_model: a CTC model for word times; `None` for the energy of the clip.
        listing: hash of names and sizes of the raw files, so that a cache of other files is never reused.
    """

    sources: list[str] | None = None
    align_model: str | None = None
    listing: str = ""


class CorpusBuilder(datasets.ArrowBasedBuilder):
    """Turn a raw corpus into utterance rows. A subclass sets the constants and says what its files mean."""

    BUILDER_CONFIG_CLASS = CorpusConfig

    NAME: str
    """As users type it; also the module's name and the prefix of ids."""
    TITLE: str
    LICENSE: str
    """Licence id of the Hugging Face Hub."""
    NOTICE: str
    """What the licence asks to be said with every copy: authors, source, terms."""
    HOMEPAGE: str
    LABELS: Mapping[str, str | None]
    """From the corpus's emotion labels to the shared ones; `None` where raters did not agree."""

    def archives(self) -> list[RemoteArchive]:
        """Return where the corpus is published; empty if it has to be asked for."""
        raise NotImplementedError

    def utterances(self, members: list[Member]) -> Iterable[Utterance | Skipped]:
        """Say what each file of the corpus is; files that are none of the corpus's are passed over.

        Raises:
            UserError: a file of the corpus's kind whose name or entry makes no sense.
        """
        raise NotImplementedError

    def shards(self) -> tuple[list[Shard], Tally]:
        """List the raw corpus, one shard per speaker, in the order of splits and speakers, and what was left out.

        Raises:
            UserError: a source is missing or damaged, holds nothing of this corpus, or has a speaker in two splits.
        """
        sources = self.config.sources
        archives = [RemoteArchive(source) for source in sources if is_url(source)] if sources else self.archives()
        published = {archive.url: archive for archive in self.archives()}
        paths = [source for source in sources or [] if not is_url(source)]
        paths += [str(download(published.get(archive.url, archive))) for archive in archives]
        if not paths:
            raise UserError(
                f"{self.TITLE} cannot be downloaded by a program.", f"Get it from {self.HOMEPAGE} and name its folder."
            )
        tally = Tally()
        by_id: dict[str, Utterance] = {}
        for found in self.utterances(list_members(paths)):
            if isinstance(found, Skipped):
                tally.add("dropped", found.reason, found.member.file_name)
            elif found.id in by_id:
                tally.add("dropped", "second copy of a file", str(found.member))
            else:
                by_id[found.id] = found
        if not by_id:
            raise UserError(
                f"{', '.join(paths)}: no {self.TITLE} clips in there.",
                f"Name the folder or zip of {self.TITLE} as published at {self.HOMEPAGE}.",
            )
        return _group_by_speaker(by_id), tally

    def rows(self, shard: Shard, tally: Tally) -> Iterator[dict[str, Any]]:
        """Yield the finished rows of a shard in the order of their ids, as `UTTERANCE_FEATURES` stores them.

        A take whose samples came before is dropped. What was dropped or repaired is added to `tally`.

        Raises:
            UserError: a file that cannot be read, has no transcript, or carries an unknown label.
        """
        seen: set[str] = set()
        for utterance in shard.utterances:
            name = str(utterance.member)
            samples, sample_rate, num_channels = read_audio(utterance.member.read(), name)
            samples = resample(samples, sample_rate)
            pcm = to_int16(samples)
            if not pcm.any():
                tally.add("dropped", "digital silence", utterance.member.file_name)
                continue
            sha256 = hash_samples(pcm)
            if sha256 in seen:
                tally.add("dropped", "same samples as another take of the speaker", utterance.member.file_name)
                continue
            seen.add(sha256)
            if num_channels > 1:
                tally.add("repaired", f"{num_channels} channels averaged to one", utterance.member.file_name)
            yield self._row(utterance, name, samples, pcm, sha256, tally)

    def _row(
        self, utterance: Utterance, name: str, samples: Any, pcm: Any, sha256: str, tally: Tally
    ) -> dict[str, Any]:
        text = normalise_text(utterance.text, name)
        words, alignment_source = self._words(utterance, text, samples, tally)
        perceived_raw = utterance.emotion_perceived_raw
        perceived = None if perceived_raw is None else map_label(perceived_raw, self.LABELS, name)
        return {
            "id": utterance.id,
            "corpus": self.NAME,
            "audio": {"bytes": encode_flac(pcm), "path": f"{utterance.id}.flac"},
            "duration_s": samples_to_seconds(len(pcm)),
            "text": text,
            "language": utterance.language,
            "words": words,
            "alignment_source": ALIGNMENT_SOURCES.index(alignment_source),
            "emotion": emotion_id(map_label(utterance.emotion_raw, self.LABELS, name)),
            "emotion_raw": utterance.emotion_raw,
            "emotion_perceived": emotion_id(perceived),
            "emotion_agreement": utterance.emotion_agreement,
            "intensity": intensity_id(utterance.intensity),
            "arousal": utterance.arousal,
            "valence": utterance.valence,
            "dominance": utterance.dominance,
            "speaker_id": utterance.speaker_id,
            "gender": utterance.gender,
            "split": utterance.split,
            "license": self.LICENSE,
            "sha256": sha256,
        }

    def _words(self, utterance: Utterance, text: str, samples: Any, tally: Tally) -> tuple[list[dict[str, Any]], str]:
        if utterance.words is not None:
            return [{"word": word, "start_s": start, "end_s": end} for word, start, end in utterance.words], "corpus"
        words = split_words(text)
        if self.config.align_model is not None:
            aligned = load_ctc_aligner(self.config.align_model).align(samples, SAMPLE_RATE, words)
            if aligned is not None:
                return aligned, "ctc"
            tally.add("aligned by energy", "the CTC model cannot spell or fit the words", utterance.member.file_name)
        return energy_align(samples, SAMPLE_RATE, words), "energy"

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description=self.__doc__ or "",
            features=UTTERANCE_FEATURES.copy(),
            license=self.LICENSE,
            homepage=self.HOMEPAGE,
            citation=self.NOTICE,
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        by_split: dict[str, list[Shard]] = {}
        for shard in self.shards()[0]:
            by_split.setdefault(shard.split, []).append(shard)
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"shards": shards}) for split, shards in by_split.items()
        ]

    def _generate_tables(self, shards: list[Shard]) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        schema = UTTERANCE_FEATURES.arrow_schema
        for shard_index, shard in enumerate(shards):
            rows: list[dict[str, Any]] = []
            table_index = 0
            for row in self.rows(shard, Tally()):
                rows.append(row)
                if len(rows) == ROWS_PER_TABLE:
                    yield (shard_index, table_index), pa.Table.from_pylist(rows, schema=schema)
                    rows, table_index = [], table_index + 1
            if rows:
                yield (shard_index, table_index), pa.Table.from_pylist(rows, schema=schema)


def load_corpus(
    name: str,
    data_dir: str | Iterable[str] | None = None,
    split: str | None = None,
    streaming: bool = True,
    **options: Any,
) -> Any:
    """Open a raw corpus as utterance rows (`UTTERANCE_FEATURES`), made while you iterate; nothing is written.

    Args:
        name: a module of `dataset_builders`.
        data_dir: folder, zip or URL of the raw corpus, or several; `None` downloads it from where it is published.
        split: train, validation or test; `None` for all of them in a dict.
        streaming: `False` builds a table in the cache of `datasets` first and gives random access.
        options: of the corpus, and `align_model`.

    Raises:
        UserError: unknown corpus, option or split, or a raw corpus that cannot be read.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"Unknown split {split!r}.", f"Splits are {', '.join(SPLITS)}.")
    builder = make_builder(name, data_dir, **options)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    listing = hash_listing(builder.shards()[0])
    cached = type(builder)(**{**builder.config_kwargs, "listing": listing})
    cached.download_and_prepare()
    return cached.as_dataset(split=split)


def make_builder(name: str, data_dir: Any = None, **options: Any) -> CorpusBuilder:
    """Return the builder of a corpus without touching a cache. Arguments as in `load_corpus`."""
    import dataset_builders

    names = sorted(module.name for module in pkgutil.iter_modules(dataset_builders.__path__))
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        raise UserError(
            f"Unknown corpus {name!r}.{f' Did you mean {near[0]!r}?' if near else ''}",
            f"Corpora are: {', '.join(names)}.",
        )
    module = importlib.import_module(f"dataset_builders.{name}")
    (builder_class,) = (
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, CorpusBuilder) and value.__module__ == module.__name__
    )
    known = {option.name for option in dataclasses.fields(builder_class.BUILDER_CONFIG_CLASS)}
    known -= {option.name for option in dataclasses.fields(datasets.BuilderConfig)} | {"sources", "listing"}
    for option in options:
        if option not in known:
            raise UserError(f"{name} has no option {option!r}.", f"Its options are: {', '.join(sorted(known))}.")
    sources: list[str] | None = None
    if data_dir is not None:
        sources = [str(source) for source in data_dir] if isinstance(data_dir, (list, tuple)) else [str(data_dir)]
    # `datasets` makes and locks a cache folder for every builder, although a stream needs none.
    with tempfile.TemporaryDirectory() as cache:
        return builder_class(cache_dir=cache, sources=sources, **options)


def hash_listing(shards: Iterable[Shard]) -> str:
    """Return a hash of what a listing says: every clip's name, size and description. Independent of where it lies."""
    names = [facts.name for facts in dataclasses.fields(Utterance) if facts.name != "member"]
    digest = hashlib.sha256()
    for shard in shards:
        for utterance in shard.utterances:
            facts = [getattr(utterance, name) for name in names]
            digest.update(repr([*facts, utterance.member.num_bytes]).encode())
    return digest.hexdigest()[:16]


def _group_by_speaker(by_id: Mapping[str, Utterance]) -> list[Shard]:
    grouped: dict[tuple[int, str], list[Utterance]] = {}
    split_of: dict[str, str] = {}
    for utterance in sorted(by_id.values(), key=lambda utterance: utterance.id):
        split, speaker_id = utterance.split, utterance.speaker_id
        if split_of.setdefault(speaker_id, split) != split:
            raise UserError(
                f"Speaker {speaker_id} is in two splits: {split_of[speaker_id]} and {split} ({utterance.member}).",
                "Keep all clips of a speaker in one split.",
            )
        grouped.setdefault((SPLITS.index(split), speaker_id), []).append(utterance)
    return [Shard(SPLITS[split], speaker, tuple(found)) for (split, speaker), found in sorted(grouped.items())]
