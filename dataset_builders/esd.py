"""ESD, the Emotional Speech Dataset: 350 sentences in five emotions by ten speakers of English and ten of Mandarin.

35,000 clips of 3 seconds, 16 kHz, in one zip, available on request. Both releases are read, extracted or not, under
any top folder: the old one with a folder for each official partition, and the flat one. The number of a clip encodes
its emotion and its sentence; `emotion` is the acted emotion.

The official partition has every speaker in all splits. Here speakers and sentences are disjoint: test has speakers
0009, 0010, 0018 and 0020 with the 30 sentences of the official test set, validation has speakers 0007, 0008, 0014 and
0017 with the 20 of the official evaluation set, train has the other twelve with the remaining 300. The other 16,000
clips are dropped.

Known defects, all handled: transcripts in five encodings, with spaces instead of tabs, tabs inside, blank lines and
emotions in Chinese; texts of one sentence that differ between emotions (a sentence is identified by its number).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from hf_csm.errors import UserError
from hf_csm.prepare.archive import Member
from hf_csm.prepare.builder import CorpusBuilder, CorpusConfig
from hf_csm.prepare.utterance import Skipped, Utterance


FILE_NAME = re.compile(r"(?P<speaker>00(?:0[1-9]|1\d|20))_(?P<number>\d{6})\.(?:wav|WAV)")
TRANSCRIPT_NAME = re.compile(r"(?P<speaker>00(?:0[1-9]|1\d|20))\.(?:txt|TXT)")
EMOTIONS = {"Neutral": "neutral", "Angry": "angry", "Happy": "happy", "Sad": "sad", "Surprise": "surprised"}
"""Folder names, in the order of the numbers."""
NUM_SENTENCES = 350
"""Sentences per speaker and emotion; clips 1 to 350 are Neutral, 351 to 700 Angry."""
LANGUAGES = {"en": "English", "zh": "Mandarin"}
FIRST_ENGLISH_SPEAKER = 11
MEN = frozenset((4, 5, 6, 8, 10, 11, 12, 13, 14, 20))
HELD_OUT_SPEAKERS = {"validation": (7, 8, 14, 17), "test": (9, 10, 18, 20)}
"""A woman and a man per language in each split."""
HELD_OUT_SENTENCES = {"validation": range(1, 21), "test": range(21, 51)}
"""As in the official partition."""

# The last column of a transcript row. It is not read: folder and number give the same in one spelling.
CHINESE_LABELS = ("中立", "生气", "快乐", "伤心", "惊喜", "开心", "愤怒", "惊讶")
ROW = re.compile(r"(?P<name>\d{4}_\d{6})\s+(?P<rest>.+)")
BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# The first possible one is right. The last is the Latin-1 of Windows, with curly quotes.
ENCODINGS = ("utf-8-sig", "gb18030", "cp1252")
NEVER_IN_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
HANZI = re.compile("[\u3400-\u9fff]")


@dataclass
class EsdConfig(CorpusConfig):
    """Options of ESD.

    Attributes:
        languages: of the speakers to read: en, zh or both.
    """

    languages: tuple[str, ...] = ("en", "zh")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.languages or not set(self.languages) <= set(LANGUAGES):
            raise UserError(f"esd: unknown languages {self.languages}.", "Choose en, zh or both.")


class Esd(CorpusBuilder):
    """The Emotional Speech Dataset of the Human Language Technology lab, National University of Singapore."""

    BUILDER_CONFIG_CLASS = EsdConfig
    NAME = "esd"
    TITLE = "ESD"
    LICENSE = "other"
    NOTICE = (
        "Zhou K, Sisman B, Liu R, Li H (2021) Seen and Unseen Emotional Style Transfer for Voice Conversion with a "
        "New Emotional Speech Dataset. ICASSP 2021, 920-924. Zhou K, Sisman B, Liu R, Li H (2022) Emotional Voice "
        "Conversion: Theory, Databases and ESD. Speech Communication 137: 1-18. For research only, under a licence "
        "form to be signed and sent to the authors; nothing lets copies be passed on."
    )
    NOT_TO_BE_PUBLISHED = (
        "its authors give it to those who sign a form, for research only, and nothing of theirs lets it be passed on"
    )
    HOMEPAGE = "https://hltsingapore.github.io/ESD/"
    LABELS = EMOTIONS
    FILE_NAME = FILE_NAME
    NAMES_ARE = "0011_000351.wav: speaker and number"

    def utterances(self, members: list[Member]) -> Iterator[Utterance | Skipped]:
        """Read the file names and the transcripts of the selected speakers."""
        clips = list(self.named_clips(members))
        transcripts: dict[str, Member] = {}
        for member in members:
            if match := TRANSCRIPT_NAME.fullmatch(member.file_name):
                transcripts.setdefault(match["speaker"], member)  # the topmost of several
        texts: dict[str, str] = {}
        for speaker, member in transcripts.items():
            if language_of(speaker) in self.config.languages:
                for row in read_transcript(member, language_of(speaker)):
                    if isinstance(row, Skipped):
                        yield row
                    elif texts.setdefault(*row) != row[1]:
                        yield Skipped(row[0], "two different transcript rows: the first is used", action="noted")
        names = set()
        for member, match in clips:
            name = match.string[: -len(".wav")]
            names.add(name)
            language = language_of(match["speaker"])
            if language not in self.config.languages:
                yield Skipped(member, f"{LANGUAGES[language]} was not selected")
            elif name not in texts:
                yield Skipped(member, "no row in its speaker's transcript", is_fault=True)
            else:
                yield describe(member, match, texts[name], language)
        for name in sorted(texts.keys() - names):
            yield Skipped(name, "transcript row without a wav", is_fault=True)


def describe(member: Member, match: re.Match[str], text: str, language: str) -> Utterance | Skipped:
    """Return the utterance of a clip, or `Skipped` if speaker and sentence are of two splits.

    Raises:
        UserError: the number is out of range, or the clip is in the folder of another emotion.
    """
    speaker, number = int(match["speaker"]), int(match["number"])
    if not 1 <= number <= NUM_SENTENCES * len(EMOTIONS):
        raise UserError(
            f"{member}: unknown clip number {number:,}.", f"ESD has 1 to {NUM_SENTENCES * len(EMOTIONS):,}: remove it."
        )
    emotion = emotion_of(number)
    sentence = (number - 1) % NUM_SENTENCES + 1
    folders = [folder.capitalize() for folder in member.name.split("/")[:-1]]
    folder = next((folder for folder in reversed(folders) if folder in EMOTIONS), emotion)
    if folder != emotion:
        raise UserError(
            f"{member}: in the folder {folder}, but clip {number:,} is {emotion}.",
            "Move it to its folder, or get it from the corpus again.",
        )
    split = split_of(speaker, HELD_OUT_SPEAKERS)
    if split != split_of(sentence, HELD_OUT_SENTENCES):
        return Skipped(member, "speaker and sentence are of two splits")
    return Utterance(
        id=f"esd-{match.string[: -len('.wav')]}",
        member=member,
        text=text,
        emotion_raw=emotion,
        speaker_id=f"esd-{match['speaker']}",
        gender="male" if speaker in MEN else "female",
        language=language,
        split=split,
        sentence_id=f"esd-{language}-{sentence:03d}",
    )


def emotion_of(number: int) -> str | None:
    """Return the emotion of a clip's number; `None` if it is out of range."""
    return dict(enumerate(EMOTIONS)).get((number - 1) // NUM_SENTENCES)


def language_of(speaker: str) -> str:
    """Return the language of a speaker, given as four digits."""
    return "en" if int(speaker) >= FIRST_ENGLISH_SPEAKER else "zh"


def split_of(number: int, held_out: Mapping[str, Container[int]]) -> str:
    """Return the split of a speaker or sentence."""
    return next((split for split, numbers in held_out.items() if number in numbers), "train")


def read_transcript(member: Member, language: str) -> Iterator[tuple[str, str] | Skipped]:
    """Yield name and text of each row, and `Skipped` for an invalid line.

    Raises:
        UserError: the encoding is unknown.
    """
    for number, line in enumerate(decode_transcript(member, language).splitlines(), start=1):
        match = ROW.fullmatch(line.strip())
        fields = [field.strip() for field in match["rest"].split("\t") if field.strip()] if match else []
        if match and len(fields) == 1:  # spaces instead of tabs; a sentence may end in the name of another emotion
            text, _, last = fields[0].rpartition(" ")
            if text and last in (emotion_of(int(match["name"][5:])), *CHINESE_LABELS):
                fields = [text.rstrip(), last]
        has_label = bool(fields) and (fields[-1].capitalize() in EMOTIONS or fields[-1] in CHINESE_LABELS)
        parts = fields[:-1] if has_label else fields
        if match and (len(parts) == 1 or (parts and has_label)):
            yield match["name"], " ".join(parts)
        elif line.strip():
            where = f"{member.file_name}, line {number}"
            yield Skipped(where, "not a transcript row: name, text, emotion", is_fault=True)


def decode_transcript(member: Member, language: str) -> str:
    """Return the text of a file, in the first of five encodings that gives text of the language.

    Raises:
        UserError: none does.
    """
    content = member.read()
    for encoding in ("utf-16",) if content.startswith(BYTE_ORDER_MARKS) else ENCODINGS:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        has_hanzi = HANZI.search(re.sub("|".join(CHINESE_LABELS), "", text)) is not None
        # A curly quote of Windows and the next letter decode as a rare character in GB 18030.
        is_language = has_hanzi if language == "zh" else not (has_hanzi and encoding == "gb18030")
        if is_language and not NEVER_IN_TEXT.search(text):
            return text
        if encoding == "utf-8-sig":  # valid UTF-8 is no other encoding, and gives garbage in the others
            break
    raise UserError(
        f"{member}: no {LANGUAGES[language]} text in UTF-8, UTF-16, GB 18030 or Windows-1252.",
        "Save it as UTF-8, rows as 0011_000351<TAB>text<TAB>Angry, or get it from the corpus again.",
    )
