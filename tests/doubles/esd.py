"""ESD with synthetic clips: its file names, both releases, the encodings and defects of its transcripts, at any size.

    from tests.doubles.esd import write_esd
    write_esd("raw", speakers=(1, 11), numbers=range(51, 61))      # raw/0001/Neutral/train/0001_000051.wav

The whole corpus is 35,000 files of about 90 KB.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import soundfile

from hf_csm.testing.synthesizer import synthesize


Layout = Literal["partitioned", "flat"]

FOLDERS = ("Neutral", "Angry", "Happy", "Sad", "Surprise")
CHINESE_LABELS = ("中立", "生气", "快乐", "伤心", "惊喜")
OLD_ENCODINGS = {
    **dict.fromkeys((1, 2, 4, 5, 9, 16, 17), "gb2312"),
    **dict.fromkeys((3, 6, 7, 8, 10, 12, 13, 14, 18, 19), "utf-16-le"),
    **dict.fromkeys((11, 15, 20), "utf-8"),
}
"""Of the transcripts in the old release, by speaker; UTF-16 begins with a byte order mark."""
SPACED = frozenset(("0012_001355", "0013_000431", "0013_000914", "0015_000137", "0015_001531"))
"""Some of the clips whose transcript row has a space for its first tab, in the old release."""
WITH_TAB_INSIDE = "0014_001590"
SHORTENED = "0015_001531"
"""A clip without the first word of its sentence, which is whole in the other emotions."""
_STYLES = ("neutral", "angry", "happy", "sad", "surprised")
_ENGLISH = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_MANDARIN = "零一二三四五六七八九"


def write_esd(
    folder: str | Path,
    *,
    speakers: Iterable[int] = range(1, 21),
    numbers: Iterable[int] = range(1, 1751),
    layout: Layout = "partitioned",
    defects: bool = True,
) -> Path:
    """Write clips with the rows of their transcripts and return `folder`.

    Args:
        folder: is made.
        speakers: 1 to 10 speak Mandarin, 11 to 20 English.
        numbers: of the clips of each speaker, 1 to 1750: 350 sentences in five emotions.
        layout: `partitioned` (the old release: `0001/Angry/train/`) or `flat` (`Emotion Speech Dataset/0001/Angry/`).
        defects: in the transcripts of the old release, see `transcript_rows`.
    """
    folder, numbers, is_old = Path(folder), sorted(numbers), layout == "partitioned"
    root = folder if is_old else folder / "Emotion Speech Dataset"
    for speaker in speakers:
        home = root / f"{speaker:04d}"
        for number in numbers:
            path = home / folder_of(number, layout) / f"{speaker:04d}_{number:06d}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_clip(path, speaker, number)
        rows = transcript_rows(speaker, numbers, defects=defects and is_old)
        encoding = OLD_ENCODINGS[speaker] if is_old else "utf-8"
        (home / f"{speaker:04d}.txt").write_bytes(encode_transcript("\n".join(rows) + "\n", encoding))
        (home / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return folder


def folder_of(number: int, layout: Layout) -> str:
    """Return the folder of a clip inside its speaker's."""
    emotion, sentence = divmod(number - 1, 350)
    partition = "evaluation" if sentence < 20 else "test" if sentence < 50 else "train"
    return FOLDERS[emotion] if layout == "flat" else f"{FOLDERS[emotion]}/{partition}"


def sentence(speaker: int, number: int) -> str:
    """Return the text of a clip: equal for all speakers of a language and for all emotions."""
    index = (number - 1) % 350 + 1
    if speaker <= 10:
        # The first is that of the corpus.
        return "打远一看，它们的确很是美丽，" if index == 1 else "".join(_MANDARIN[int(d)] for d in str(index)) + "，"
    return f"It's {' '.join(_ENGLISH[int(digit)] for digit in str(index))}, she said."


def transcript_rows(speaker: int, numbers: Iterable[int], *, defects: bool = True) -> Iterator[str]:
    """Yield the lines of a speaker's transcript: name, text and emotion, with tabs between them.

    Args:
        speaker: 1 to 20.
        numbers: of the clips.
        defects: of the old release: spaces for tabs, a tab inside a text, blank lines, emotions in Chinese and a
            shortened sentence.
    """
    for number in numbers:
        emotion, index = divmod(number - 1, 350)
        name, text = f"{speaker:04d}_{number:06d}", sentence(speaker, number)
        if defects and index == 0:
            yield ""
        if defects and name == SHORTENED:
            text = text.partition(" ")[2]
        if defects and name == WITH_TAB_INSIDE:
            text = text.replace(" ", "\t", 1)
        label = (CHINESE_LABELS if defects and speaker <= 10 else FOLDERS)[emotion]
        yield f"{name}{' ' if defects and name in SPACED else chr(9)}{text}\t{label}"


def encode_transcript(text: str, encoding: str) -> bytes:
    """Return the file: UTF-16 with its byte order mark; quotes are curly in English with a Chinese encoding."""
    if encoding == "utf-16-le":
        return codecs.BOM_UTF16_LE + text.encode(encoding)
    return (text.replace("'", "’") if encoding == "gb2312" else text).encode(encoding)


def _write_clip(path: Path, speaker: int, number: int) -> None:
    samples, _ = synthesize(
        "da yuan yi kan men" if speaker <= 10 else "It is one, she said",
        speaker=speaker,
        emotion=_STYLES[(number - 1) // 350],
        intensity="high",
        sample_rate=16_000,
        seed=zlib.crc32(path.name.encode()),
        lead_s=(0.2, 0.4),
        tail_s=(0.2, 0.4),
    )
    soundfile.write(path, samples, 16_000, subtype="PCM_16")
