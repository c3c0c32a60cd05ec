"""A true ESD of synthetic clips: its names, both releases, the encodings and slips of its transcripts, at any size.

    from tests.doubles.esd import write_esd
    write_esd("raw", speakers=(1, 11), numbers=range(51, 61))      # raw/0001/Neutral/train/0001_000051.wav

The whole corpus is 35,000 files of about 90 KB.
"""

from __future__ import annotations

import codecs
import io
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import soundfile

from hf_csm.testing.synthesizer import synthesize


Layout = Literal["partitioned", "flat"]

SPEAKERS = range(1, 21)
NUMBERS = range(1, 1751)
EMOTIONS = {"Neutral": "neutral", "Angry": "angry", "Happy": "happy", "Sad": "sad", "Surprise": "surprised"}
CHINESE_LABELS = dict(zip(EMOTIONS, ("中立", "生气", "快乐", "伤心", "惊喜"), strict=True))
MEN = frozenset((4, 5, 6, 8, 10, 11, 12, 13, 14, 20))
FLAT_ROOT = "Emotion Speech Dataset"
OLD_ENCODINGS = {
    **dict.fromkeys((1, 2, 4, 5, 9, 16, 17), "gb2312"),
    **dict.fromkeys((3, 6, 7, 8, 10, 12, 13, 14, 18, 19), "utf-16-le"),
    **dict.fromkeys((11, 15, 20), "utf-8"),
}
"""Of the transcripts in the old release, by speaker; UTF-16 begins with a byte order mark."""
SPACED = frozenset(
    (
        *("0012_001355", "0013_000431", "0013_000914"),
        *("0015_000137", "0015_000138", "0015_000175", "0015_000187", "0015_000217", "0015_000668", "0015_000690"),
        *("0015_000875", "0015_001015", "0015_001531", "0015_001578"),
    )
)
"""Clips whose transcript row has a space for its first tab, in the old release."""
WITH_TAB_INSIDE = "0014_001590"
SHORTENED = "0015_001531"
"""A clip without the first word of its sentence, which the same speaker says in the other emotions."""
_NUM_SENTENCES = 350
_FIRST_ENGLISH_SPEAKER = 11
_SAMPLE_RATE = 16_000
# Ten, seven and five parts make the 350 sentences of a language.
_WHO = ("The old man", "A tall girl", "My brother", "The captain", "Our cook", "The boy", "A rich queen", "His dog")
_ENGLISH = (
    (*_WHO, "Her friend", "The poet"),
    ("sees", "finds", "leaves", "wants", "paints", "follows", "forgets"),
    ("the miller's house.", "a small, green boat.", "the way home.", "nine eggs every day.", "me and you!"),
)
_MANDARIN = (
    ("老人", "小姑娘", "我哥哥", "船长", "厨师", "男孩", "王后", "小狗", "她的朋友", "诗人"),
    ("看见", "找到", "离开", "想要", "画出", "跟着", "忘记"),
    ("磨坊，", "绿色的小船。", "回家的路。", "九个鸡蛋，", "你和我！"),
)
_FIRST_SENTENCES = {
    "en": ("The nine the eggs, I keep.", "I did go, and made many prisoners."),
    "zh": ("打远一看，它们的确很是美丽，",),
}
_SYLLABLES = ("da", "yuan", "yi", "kan", "ta", "men", "de", "que", "hen", "shi", "mei", "li", "guo", "nao", "xin")


def write_esd(
    folder: str | Path,
    *,
    speakers: Iterable[int] = SPEAKERS,
    numbers: Iterable[int] = NUMBERS,
    layout: Layout = "partitioned",
    encodings: Mapping[int, str] | None = None,
    defects: bool = True,
    seed: int = 0,
) -> Path:
    """Write the chosen clips with the rows of their transcripts and return `folder`.

    Args:
        folder: is made.
        speakers: 1 to 10 speak Mandarin, 11 to 20 English.
        numbers: of the clips of each speaker, 1 to 1750: 350 sentences in five emotions.
        layout: `partitioned` (the old release: `0001/Angry/train/`) or `flat` (`Emotion Speech Dataset/0001/Angry/`).
        encodings: of the transcripts, by speaker: names of Python's codecs; those of the release by default.
        defects: of the layout: spaces for tabs, a tab inside a text, blank lines, emotions in Chinese and a sentence
            cut short in the old release; what macOS leaves behind in both.
        seed: of all clips.
    """
    folder = Path(folder)
    root = folder / (FLAT_ROOT if layout == "flat" else "")
    root.mkdir(parents=True, exist_ok=True)
    (root / "ReadMe.txt").write_text("ESD of synthetic clips\n")
    release = OLD_ENCODINGS if layout == "partitioned" else dict.fromkeys(SPEAKERS, "utf-8")
    numbers = sorted(numbers)
    for speaker in speakers:
        home = root / f"{speaker:04d}"
        for number in numbers:
            path = home / folder_of(number, layout) / f"{speaker:04d}_{number:06d}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(clip_bytes(speaker, number, seed=seed))
        rows = transcript_rows(speaker, numbers, defects=defects, old=layout == "partitioned")
        encoding = {**release, **(encodings or {})}[speaker]
        (home / f"{speaker:04d}.txt").write_bytes(encode_transcript("\n".join(rows) + "\n", encoding))
        if defects:
            (home / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return folder


def folder_of(number: int, layout: Layout) -> str:
    """Return the folder of a clip inside its speaker's."""
    emotion, sentence = _place(number)
    partition = "evaluation" if sentence <= 20 else "test" if sentence <= 50 else "train"
    return emotion if layout == "flat" else f"{emotion}/{partition}"


def sentence(speaker: int, number: int) -> str:
    """Return what is said in a clip: the same for all speakers of a language and in all emotions."""
    language = "en" if speaker >= _FIRST_ENGLISH_SPEAKER else "zh"
    index = _place(number)[1] - 1
    if index < len(_FIRST_SENTENCES[language]):
        return _FIRST_SENTENCES[language][index]
    who, does, what = _ENGLISH if language == "en" else _MANDARIN
    parts = (who[index % 10], does[index // 10 % 7], what[index // 70])
    return (" " if language == "en" else "").join(parts)


def transcript_rows(speaker: int, numbers: Iterable[int], *, defects: bool = True, old: bool = True) -> Iterator[str]:
    """Yield the lines of a speaker's transcript: name, text and emotion, with tabs between them.

    Args:
        speaker: 1 to 20.
        numbers: of the clips.
        defects: as in `write_esd`.
        old: the release is the old one, of which most defects are.
    """
    for number in numbers:
        emotion, sentence_number = _place(number)
        name, text = f"{speaker:04d}_{number:06d}", sentence(speaker, number)
        if defects and old:
            if sentence_number == 1:
                yield ""
            if name == SHORTENED:
                text = text.partition(" ")[2]
            if name == WITH_TAB_INSIDE:
                text = text.replace(" ", "\t", 1)
        label = CHINESE_LABELS[emotion] if defects and speaker < _FIRST_ENGLISH_SPEAKER else emotion
        space = " " if defects and old and name in SPACED else "\t"
        yield f"{name}{space}{text}\t{label}"


def encode_transcript(text: str, encoding: str) -> bytes:
    """Return the file: UTF-16 with its byte order mark; quotes are curly in English with a Chinese encoding."""
    if encoding == "utf-16-le":
        return codecs.BOM_UTF16_LE + text.encode(encoding)
    return (text.replace("'", "’") if encoding == "gb2312" else text).encode(encoding)


def clip_bytes(speaker: int, number: int, *, seed: int = 0) -> bytes:
    """Return the wav of a clip: 16 kHz, 16 bit, mono. A Mandarin character sounds as some syllable."""
    text = sentence(speaker, number)
    if speaker < _FIRST_ENGLISH_SPEAKER:
        text = " ".join(_SYLLABLES[ord(letter) % len(_SYLLABLES)] for letter in text if letter.isalnum())
    samples, _ = synthesize(
        text,
        speaker=2 * speaker + (speaker in MEN),
        emotion=EMOTIONS[_place(number)[0]],
        intensity="high",
        sample_rate=_SAMPLE_RATE,
        seed=zlib.crc32(f"{seed}:{speaker:04d}_{number:06d}".encode()),
        lead_s=(0.2, 0.4),
        tail_s=(0.2, 0.4),
    )
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, _SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def _place(number: int) -> tuple[str, int]:
    """Return emotion and sentence, 1 to 350, of a clip number."""
    return list(EMOTIONS)[(number - 1) // _NUM_SENTENCES], (number - 1) % _NUM_SENTENCES + 1
