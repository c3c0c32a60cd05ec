"""RAVDESS with synthetic clips: its file names, zips, RIFF chunks and known defects, at any size.

    from hf_csm.testing.ravdess import write_ravdess
    write_ravdess("raw", actors=(1, 2, 17, 21))      # raw/Audio_Speech_Actors_01-24.zip

The whole spoken grid is 1,440 files of about 400 KB.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hf_csm.testing.synthesizer import synthesize


Layout = Literal["zips", "actors", "speech_root", "merged"]

SPEECH, SONG = "01", "02"
ROOTS = {SPEECH: "Audio_Speech_Actors_01-24", SONG: "Audio_Song_Actors_01-24"}
EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
NUM_SONG_EMOTIONS = 6
ACTOR_WITHOUT_SONG = 18
STEREO = frozenset(
    (
        "03-01-02-01-01-02-01",
        "03-01-08-01-02-02-01",
        "03-01-02-01-02-02-05",
        "03-01-03-01-02-01-20",
        "03-01-06-01-01-02-20",
        "03-02-01-01-01-01-24",
    )
)
DUPLICATE, ORIGINAL = "03-01-03-01-02-02-07", "03-01-03-01-02-01-07"
_STATEMENTS = ("Kids are talking by the door", "Dogs are sitting by the door")
_SAMPLE_RATE = 48_000
_EXTRA_BYTES = 53_000
_FEWEST_FOR_PROCESSES = 100


def write_ravdess(
    folder: str | Path,
    *,
    actors: Iterable[int] = range(1, 25),
    speech: bool = True,
    song: bool = False,
    emotions: Sequence[str] = EMOTIONS,
    statements: Sequence[int] = (1, 2),
    repetitions: Sequence[int] = (1, 2),
    intensities: Sequence[int] = (1, 2),
    layout: Layout = "zips",
    defects: bool = True,
    seed: int = 0,
) -> Path:
    """Write a part of the grid and return `folder`.

    Args:
        folder: is made.
        actors: 1 to 24; odd ones are men.
        speech: write the spoken clips.
        song: write the sung clips: six emotions, no actor 18.
        emotions: names, as in `EMOTIONS`.
        statements: 1 and 2.
        repetitions: 1 and 2.
        intensities: 1 normal, 2 strong; neutral is never strong.
        layout: `zips` as published, or a common way to extract them: `actors` (`Actor_01/`), `speech_root`
            (`Audio_Speech_Actors_01-24/Actor_01/`), `merged` (`Audio/Actor_01/`, speech and song together).
        defects: the six stereo clips and the duplicate take of actor 7, where they are in the part.
        seed: of all clips.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    actors = sorted(actors)
    for channel in [channel for channel, wanted in ((SPEECH, speech), (SONG, song)) if wanted]:
        names = list(clip_names(channel, actors, emotions, statements, repetitions, intensities))
        clips = _clips(names, defects, seed)
        if layout == "zips":
            _write_zip(folder / f"{ROOTS[channel]}.zip", actors, clips)
            continue
        root = folder / {"actors": "", "speech_root": ROOTS[channel], "merged": "Audio"}[layout]
        for name, content in clips:
            path = root / f"Actor_{name[-2:]}" / f"{name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


def clip_names(
    channel: str,
    actors: Iterable[int],
    emotions: Sequence[str] = EMOTIONS,
    statements: Sequence[int] = (1, 2),
    repetitions: Sequence[int] = (1, 2),
    intensities: Sequence[int] = (1, 2),
) -> Iterator[str]:
    """Yield the file names, without `.wav`, of a part of the grid."""
    for actor in actors:
        if channel == SONG and actor == ACTOR_WITHOUT_SONG:
            continue
        for number, emotion in enumerate(EMOTIONS, start=1):
            if emotion not in emotions or (channel == SONG and number > NUM_SONG_EMOTIONS):
                continue
            for intensity in intensities:
                if emotion == "neutral" and intensity == 2:
                    continue
                for statement in statements:
                    for repetition in repetitions:
                        numbers = (number, intensity, statement, repetition, actor)
                        yield "-".join(["03", channel, *(f"{part:02d}" for part in numbers)])


def known_words(name: str, *, defects: bool = True, seed: int = 0) -> list[dict[str, Any]]:
    """Return the exact word times of a clip that `write_ravdess` wrote with the same `defects` and `seed`."""
    return _synthesize(_take(name, defects), seed)[1]


def clip_bytes(name: str, *, defects: bool = True, seed: int = 0) -> bytes:
    """Return the wav file of a clip name: 48 kHz, 16 bit, with the chunks that RAVDESS files carry."""
    samples, _ = _synthesize(_take(name, defects), seed)
    return wav_bytes(samples, num_channels=2 if defects and name in STEREO else 1)


def wav_bytes(samples: np.ndarray, num_channels: int = 1) -> bytes:
    """Return a wav of float samples `[S]`, the same in all channels, between `bext`, `FLLR`, `LIST` and `_PMX`."""
    pcm = np.rint(samples * 32767).astype("<i2")
    data = np.repeat(pcm, num_channels).tobytes()
    fmt = struct.pack("<HHIIHH", 1, num_channels, _SAMPLE_RATE, 2 * num_channels * _SAMPLE_RATE, 2 * num_channels, 16)
    listing = b"INFO" + _chunk(b"ISFT", b"Adobe Audition (synthetic)\0\0")
    packet = b"<?xpacket begin='' id='W5M0MpCehiHzreSzNTczkc9d'?>\n<x:xmpmeta xmlns:x='adobe:ns:meta/'/>\n"
    before = _chunk(b"bext", b"synthetic RAVDESS".ljust(602, b"\0")) + _chunk(b"fmt ", fmt)
    after = _chunk(b"LIST", listing) + _chunk(b"_PMX", packet)
    filler = _chunk(b"FLLR", bytes(_EXTRA_BYTES - len(before) - len(after)))
    body = b"WAVE" + before + filler + _chunk(b"data", data) + after
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _take(name: str, defects: bool) -> str:
    return ORIGINAL if defects and name == DUPLICATE else name


def _synthesize(name: str, seed: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    _, channel, emotion, intensity, statement, _, actor = (int(part) for part in name.split("-"))
    speaking_time = 1.0 if channel == int(SPEECH) else 0.8
    return synthesize(
        _STATEMENTS[statement - 1],
        speaker=actor,
        emotion=EMOTIONS[emotion - 1],
        intensity="medium" if intensity == 1 else "high",
        sample_rate=_SAMPLE_RATE,
        seed=zlib.crc32(f"{seed}:{name}".encode()),
        lead_s=(0.8 / speaking_time, 1.1 / speaking_time),
        tail_s=(0.7 / speaking_time, 1.1 / speaking_time),
    )


def _clip(arguments: tuple[str, bool, int]) -> bytes:
    name, defects, seed = arguments
    return clip_bytes(name, defects=defects, seed=seed)


def _clips(names: list[str], defects: bool, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield names and wavs in order, made by a process per core if there are many."""
    arguments = [(name, defects, seed) for name in names]
    if len(names) < _FEWEST_FOR_PROCESSES:
        yield from zip(names, map(_clip, arguments), strict=True)
        return
    method = "fork" if os.name == "posix" and os.uname().sysname == "Linux" else "spawn"
    with ProcessPoolExecutor(mp_context=get_context(method)) as pool:
        step = 240  # bounds the memory of wavs that are not yet written
        for first in range(0, len(names), step):
            wavs = pool.map(_clip, arguments[first : first + step], chunksize=8)
            yield from zip(names[first : first + step], wavs, strict=True)


def _write_zip(path: Path, actors: Sequence[int], clips: Iterable[tuple[str, bytes]]) -> None:
    """Write a zip as published: no top folder, a folder member for every actor, also for one without files."""
    buffer: io.BufferedWriter
    with open(path, "wb") as buffer, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for actor in actors:
            archive.writestr(zipfile.ZipInfo(f"Actor_{actor:02d}/"), b"")
        for name, content in clips:
            info = zipfile.ZipInfo(f"Actor_{name[-2:]}/{name}.wav")
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content, compresslevel=1)
