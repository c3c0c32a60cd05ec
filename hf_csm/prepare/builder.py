"""Base class of all corpus builders: from raw files to utterance rows, with the same steps for every corpus.

A builder in `dataset_builders/` describes its files (`CorpusBuilder.utterances`). Everything else happens here, so
that no row can skip it: shared labels, 24 kHz mono FLAC, normalized transcript, word times, content hash.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, get_args, get_origin, get_type_hints

import datasets
import numpy as np
import pyarrow as pa

from hf_csm.data.audio import encode_flac, hash_samples, read_audio, resample, to_int16
from hf_csm.data.labels import emotion_id, intensity_id, map_label
from hf_csm.data.schema import ALIGNMENT_SOURCES, PROSODY_COLUMNS, UTTERANCE_FEATURES
from hf_csm.data.text import normalize_text, split_words
from hf_csm.errors import UserError, require_extra
from hf_csm.prepare.align_ctc import load_ctc_aligner
from hf_csm.prepare.align_energy import energy_align
from hf_csm.prepare.archive import Member, list_members
from hf_csm.prepare.checks import list_clips, looks_like
from hf_csm.prepare.download import RemoteArchive, download, is_url
from hf_csm.prepare.utterance import Shard, Skipped, Tally, Utterance
from hf_csm.units import SAMPLE_RATE, samples_to_seconds


ROWS_PER_TABLE = 32
CLIPS_AT_ONCE = 16
"""Clips in a batch of the CTC model."""
LATEST_END_S = 0.05
"""Word times of a corpus may exceed the clip by this much and are clamped; beyond it they are rejected."""


@dataclass
class CorpusConfig(datasets.BuilderConfig):
    """Options of every corpus. A builder with more options subclasses this.

    Attributes:
        sources: folders, zips or URLs of the raw corpus; `None` to download it.
        align_model: CTC model for word times; `None` for alignment by energy.
        prosody: measure pitch, loudness and speaking rate of each clip.
        listing: hash of names and sizes of the raw files, so that the cache of other files is never reused.
    """

    sources: list[str] | None = None
    align_model: str | None = None
    prosody: bool = False
    listing: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = get_type_hints(type(self))
        for option in config_options(type(self)):
            setattr(self, option.name, _read_option(option.name, kinds[option.name], getattr(self, option.name)))
        if self.prosody:
            require_extra("prosody", "prosody", "swift_f0")


@dataclass(frozen=True)
class _Clip:
    """A clip with its audio: samples float32 `[S]` at 24 kHz and the same as int16."""

    utterance: Utterance
    text: str
    samples: np.ndarray
    pcm: np.ndarray
    sha256: str


class CorpusBuilder(datasets.ArrowBasedBuilder):
    """Turn a raw corpus into utterance rows. A subclass sets the constants and describes its files."""

    BUILDER_CONFIG_CLASS = CorpusConfig

    NAME: str
    """Name on the command line; also of the module, and prefix of ids."""
    TITLE: str
    LICENSE: str
    """License id of the Hugging Face Hub."""
    NOTICE: str
    """Attribution that the license requires with every copy: authors, source, terms."""
    HOMEPAGE: str
    HOW_TO_GET = ""
    """How to get a corpus that cannot be downloaded automatically, if the homepage does not suffice."""
    LABELS: Mapping[str, str | None]
    """Map of the corpus's emotion labels to the shared ones; `None` where raters did not agree."""
    FILE_NAME: re.Pattern[str] | None = None
    """Pattern of the corpus's audio file names, to recognize its folder; `None` if any name is possible."""
    NAMES_ARE = ""
    """Example of a file name and what its parts are, for messages."""
    NOT_TO_BE_PUBLISHED: str | None = None
    """Why audio, codes, texts and labels must not be published; `None` if the license allows it."""

    @property
    def corpus(self) -> str:
        """Name in the rows and prefix of ids."""
        return self.NAME

    def archives(self) -> list[RemoteArchive]:
        """Return the public archives of the corpus; empty if access must be requested."""
        return []

    def utterances(self, members: list[Member]) -> Iterable[Utterance | Skipped]:
        """Describe each file of the corpus; other files are ignored.

        Raises:
            UserError: a file of the corpus with an invalid name or entry.
        """
        raise NotImplementedError

    def named_clips(
        self, members: Iterable[Member], suffixes: tuple[str, ...] = (".wav",)
    ) -> Iterator[tuple[Member, re.Match[str]]]:
        """Yield the files with these suffixes and the matches of their names.

        Raises:
            UserError: a file has another name.
        """
        assert self.FILE_NAME is not None
        for member in members:
            if not member.file_name.lower().endswith(suffixes):
                continue
            match = self.FILE_NAME.fullmatch(member.file_name)
            if match is None:
                raise UserError(
                    f"{member}: not a file name of {self.TITLE}.",
                    f"Names are as {self.NAMES_ARE}. Remove it or name another folder.",
                )
            yield member, match

    def complete(self, utterance: Utterance, tally: Tally) -> Utterance:
        """Return the utterance completed from its `sidecars`; called by the worker that reads the audio.

        Irregularities are added to `tally`.
        """
        return utterance

    def members(self, paths: list[str]) -> list[Member]:
        """List the files of the sources."""
        return list_members(paths)

    def shards(self) -> tuple[list[Shard], Tally]:
        """List the raw corpus by split, speaker and id; also return the tally of dropped files.

        Raises:
            UserError: a source is missing or damaged, holds another corpus or nothing of this one, has an unknown
                label, too many files without entry or entries without file, or a speaker or sentence in two splits.
        """
        sources = self.config.sources
        archives = [RemoteArchive(source) for source in sources if is_url(source)] if sources else self.archives()
        published = {archive.url: archive for archive in self.archives()}
        paths = [source for source in sources or [] if not is_url(source)]
        paths += [str(download(published.get(archive.url, archive))) for archive in archives]
        if not paths:
            raise UserError(
                f"{self.TITLE} cannot be downloaded by a program.",
                f"{self.HOW_TO_GET or f'Get it at {self.HOMEPAGE}'}, then name its folder with --raw.",
            )
        members = self.members(paths)
        if self.FILE_NAME is not None and looks_like(members, {self.NAME: self.FILE_NAME}) is None:
            known = {
                builder.TITLE: builder.FILE_NAME
                for builder in CorpusBuilder.__subclasses__()
                if builder.FILE_NAME is not None
            }
            other = looks_like(members, known)
            is_other = f" It looks like {other[0]} ({other[1]:,} files named so)." if other else ""
            raise UserError(
                f"{', '.join(paths)}: no {self.TITLE} clips in there.{is_other}",
                f"Name the folder or zip of {self.TITLE} as published at {self.HOMEPAGE}.",
            )
        shards, tally = list_clips(self.utterances(members), self.LABELS, self.TITLE)
        if not shards:
            reasons = "; ".join(f"{count:,} {reason}" for (_, reason), count in sorted(tally.counts.items()))
            raise UserError(
                f"{', '.join(paths)}: no {self.TITLE} clips are left{f': {reasons}' if reasons else ''}.",
                f"Name the folder or zip of {self.TITLE} as published at {self.HOMEPAGE}, or choose other options.",
            )
        return shards, tally

    def rows(self, shard: Shard, tally: Tally) -> Iterator[dict[str, Any]]:
        """Yield the finished rows of a shard in the order of their ids, as `UTTERANCE_FEATURES` stores them.

        Repeated takes of a speaker (same samples, same label) are dropped. What was dropped or repaired is added to
        `tally`.

        Raises:
            UserError: a file that cannot be read, has no transcript, or carries an unknown label.
        """
        clips = self._clips(shard, tally)
        while batch := list(islice(clips, CLIPS_AT_ONCE)):
            for clip, (words, source) in zip(batch, self._words(batch, tally), strict=True):
                yield self._row(clip, words, source)

    def _clips(self, shard: Shard, tally: Tally) -> Iterator[_Clip]:
        seen: set[tuple[str, str, str | None]] = set()
        for listed in shard.utterances:
            name = str(listed.member)
            utterance = self.complete(listed, tally)
            samples, sample_rate, num_channels = read_audio(utterance.member.read(), name)
            if max(samples.max(), -samples.min()) > 1:
                tally.add("noted", "samples beyond full scale clipped", utterance.member.file_name)
            samples = resample(samples, sample_rate)
            pcm = to_int16(samples)
            if not pcm.any():
                tally.add("dropped", "digital silence", utterance.member.file_name)
                continue
            sha256 = hash_samples(pcm)
            key = (sha256, utterance.speaker_id, utterance.emotion_raw)
            if key in seen:  # `plan_pieces` handles one recording under two speakers or labels
                tally.add("dropped", "same samples as another take of the speaker", utterance.member.file_name)
                continue
            seen.add(key)
            if num_channels > 1:
                tally.add("repaired", f"{num_channels} channels averaged to one", utterance.member.file_name)
            text = "" if utterance.text is None else normalize_text(utterance.text, name)
            yield _Clip(utterance, text, samples, pcm, sha256)

    def _row(self, clip: _Clip, words: list[dict[str, Any]], alignment_source: str | None) -> dict[str, Any]:
        utterance, where = clip.utterance, str(clip.utterance.member)
        raw, perceived_raw = utterance.emotion_raw, utterance.emotion_perceived_raw
        emotion = None if raw is None else map_label(raw, self.LABELS, where)
        perceived = None if perceived_raw is None else map_label(perceived_raw, self.LABELS, where)
        return {
            "id": utterance.id,
            "corpus": self.corpus,
            "audio": {"bytes": encode_flac(clip.pcm), "path": f"{utterance.id}.flac"},
            "duration_s": samples_to_seconds(len(clip.pcm)),
            "text": clip.text,
            "language": utterance.language,
            "words": words,
            "alignment_source": None if alignment_source is None else ALIGNMENT_SOURCES.index(alignment_source),
            "emotion": emotion_id(emotion),
            "emotion_raw": raw,
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
            "sha256": clip.sha256,
            "sentence_id": utterance.sentence_id,
            **self._prosody(clip.samples, words),
        }

    def _words(self, clips: list[_Clip], tally: Tally) -> list[tuple[list[dict[str, Any]], str | None]]:
        """Return the words of each clip with their times, and their source (`None` without a transcript)."""
        found: dict[int, tuple[list[dict[str, Any]], str | None]] = {}
        for index, clip in enumerate(clips):
            timed, duration_s = clip.utterance.words, samples_to_seconds(len(clip.pcm))
            if timed is not None and all(0 <= start <= end <= duration_s + LATEST_END_S for _, start, end in timed):
                cut = [(word, min(start, duration_s), min(end, duration_s)) for word, start, end in timed]
                found[index] = [{"word": word, "start_s": start, "end_s": end} for word, start, end in cut], "corpus"
            elif not clip.text:
                found[index] = [], None
            elif timed is not None:
                tally.add("repaired", "word times lie beyond the clip", clip.utterance.member.file_name)
        left = [index for index in range(len(clips)) if index not in found]
        words = {index: split_words(clips[index].text) for index in left}
        if left and self.config.align_model is not None:
            aligner = load_ctc_aligner(self.config.align_model)
            samples = [clips[index].samples for index in left]
            for index, aligned in zip(left, aligner.align(samples, SAMPLE_RATE, [*words.values()]), strict=True):
                if aligned is not None:
                    found[index] = aligned, "ctc"
                else:
                    reason = "the CTC model cannot spell or fit the words"
                    tally.add("aligned by energy", reason, clips[index].utterance.member.file_name)
        for index in left:
            if index not in found:
                found[index] = energy_align(clips[index].samples, SAMPLE_RATE, words[index]), "energy"
        return [found[index] for index in range(len(clips))]

    def _prosody(self, samples: np.ndarray, words: list[dict[str, Any]]) -> dict[str, float | None]:
        if not self.config.prosody:
            return dict.fromkeys(PROSODY_COLUMNS)
        from hf_csm.prepare.prosody import measure_prosody  # an optional dependency

        return measure_prosody(samples, SAMPLE_RATE, words)

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
            rows = self.rows(shard, Tally())
            table_index = 0
            while batch := list(islice(rows, ROWS_PER_TABLE)):
                yield (shard_index, table_index), pa.Table.from_pylist(batch, schema=schema)
                table_index += 1


def config_options(config_class: type[CorpusConfig]) -> list[dataclasses.Field[Any]]:
    """Return the options that users can set."""
    inner = {option.name for option in dataclasses.fields(datasets.BuilderConfig)} | {"sources", "listing"}
    return [option for option in dataclasses.fields(config_class) if option.name not in inner]


def _read_option(name: str, kind: Any, value: Any) -> Any:
    """Return an option's value in its declared type.

    The command line gives a tuple of words, `()` for an option without a value; Python gives the value itself.

    Raises:
        UserError: it has another type.
    """
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    is_text = all(isinstance(item, str) for item in values)
    if kind is bool:
        text = "true" if values == () else str(value if len(values) != 1 else values[0]).lower()
        if text in ("true", "false"):
            return text == "true"
        remedy = "Give true or false."
    elif get_origin(kind) is tuple:
        if is_text:
            return values
        remedy = "Give one name or several."
    else:
        if len(values) == 1 and (is_text or (value is None and type(None) in get_args(kind))):
            return values[0]
        remedy = "Give one text, in quotes if it contains spaces."
    raise UserError(f"{name} cannot be {value!r}.", remedy)
