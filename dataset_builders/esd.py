"""ESD, the Emotional Speech Dataset: 350 sentences in five emotions by ten speakers of English and ten of Mandarin.

35,000 clips of 3 seconds, 16 kHz, in one zip that has to be asked for. Both releases are read, extracted or not, under
any top folder: the old one with a folder for each official partition, and the flat one. The number of a clip says its
emotion and its sentence; `emotion` is what the speaker was asked for.

The official partition has every speaker on all sides. Here speakers and sentences are disjoint: of the test speakers
0009, 0010, 0018 and 0020 the 30 sentences of the official test set, of the validation speakers 0007, 0008, 0014 and
0017 the 20 of the official evaluation set, of the other twelve the 300 that are left. The other 16,000 clips are held
out.

Known defects, all handled: transcripts in five encodings, with spaces for tabs, tabs inside, blank lines and emotions
in Chinese; texts of one sentence that differ between emotions (its number, not its text, makes it one).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
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
"""Of a speaker in an emotion; clip 1 to 350 is Neutral, 351 to 700 Angry."""
LANGUAGES = {"en": "English", "zh": "Mandarin"}
FIRST_ENGLISH_SPEAKER = 11
MEN = frozenset((4, 5, 6, 8, 10, 11, 12, 13, 14, 20))
VALIDATION_SPEAKERS, LAST_VALIDATION_SENTENCE = (7, 8, 14, 17), 20
TEST_SPEAKERS, LAST_TEST_SENTENCE = (9, 10, 18, 20), 50

# The last column of a transcript row. It is not read: folder and number say the same in one spelling.
CHINESE_LABELS = ("中立", "生气", "快乐", "伤心", "惊喜", "开心", "愤怒", "惊讶")
ROW = re.compile(r"(?P<name>\d{4}_\d{6})\s+(?P<rest>.+)")
BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# The first that can be is right. The last is Latin-1 as Windows has it, with curly quotes.
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

    def utterances(self, members: list[Member]) -> Iterator[Utterance | Skipped]:
        """Read the file names and the transcripts of the speakers that are asked for."""
        clips: list[tuple[Member, re.Match[str]]] = []
        transcripts: dict[str, Member] = {}
        for member in members:
            if match := TRANSCRIPT_NAME.fullmatch(member.file_name):
                transcripts.setdefault(match["speaker"], member)  # the topmost, if there are more
            elif match := FILE_NAME.fullmatch(member.file_name):
                clips.append((member, match))
            elif member.file_name.lower().endswith(".wav"):
                raise UserError(
                    f"{member}: not an ESD file name.",
                    "Names are speaker and number, as in 0011_000351.wav. Remove it or name another folder.",
                )
        texts: dict[str, str] = {}
        for speaker, member in transcripts.items():
            if language_of(speaker) in self.config.languages:
                for row in read_transcript(member, language_of(speaker)):
                    if isinstance(row, Skipped):
                        yield row
                    elif texts.setdefault(*row) != row[1]:
                        yield Skipped(row[0], "two transcript rows that differ: the first counts", action="noted")
        names = set()
        for member, match in clips:
            name = match.string[: -len(".wav")]
            names.add(name)
            language = language_of(match["speaker"])
            if language not in self.config.languages:
                yield Skipped(member, f"{LANGUAGES[language]} was not asked for")
            elif name not in texts:
                yield Skipped(member, "no row in its speaker's transcript", is_fault=True)
            else:
                yield describe(member, match, texts[name], language)
        for name in sorted(texts.keys() - names):
            yield Skipped(name, "transcript row without a wav", is_fault=True)


def describe(member: Member, match: re.Match[str], text: str, language: str) -> Utterance | Skipped:
    """Return what the name of a clip says, or that speaker and sentence are of two splits.

    Raises:
        UserError: a number that ESD does not have, or one in the folder of another emotion.
    """
    speaker, number = int(match["speaker"]), int(match["number"])
    if not 1 <= number <= NUM_SENTENCES * len(EMOTIONS):
        raise UserError(
            f"{member}: clip {number:,} of its speaker.", f"ESD has 1 to {NUM_SENTENCES * len(EMOTIONS):,}: remove it."
        )
    emotion = emotion_of(number)
    sentence = (number - 1) % NUM_SENTENCES + 1
    folders = [folder.capitalize() for folder in member.name.split("/")[:-1]]
    folder = next((folder for folder in reversed(folders) if folder in EMOTIONS), emotion)
    if folder != emotion:
        raise UserError(
            f"{member}: in the folder {folder}, but clip {number:,} is {emotion}.",
            "Put it where it belongs, or get it from the corpus again.",
        )
    split = split_of_speaker(speaker)
    if split != split_of_sentence(sentence):
        return Skipped(member, "held out: its speaker and its sentence are of two splits")
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
    """Return the emotion of a clip's number; `None` if ESD does not have it."""
    return dict(enumerate(EMOTIONS)).get((number - 1) // NUM_SENTENCES)


def language_of(speaker: str) -> str:
    """Return the language of a speaker's four digits."""
    return "en" if int(speaker) >= FIRST_ENGLISH_SPEAKER else "zh"


def split_of_speaker(speaker: int) -> str:
    """Return the only split that may have clips of the speaker; the small two have a woman and a man a language."""
    return "validation" if speaker in VALIDATION_SPEAKERS else "test" if speaker in TEST_SPEAKERS else "train"


def split_of_sentence(sentence: int) -> str:
    """Return the only split that may have the sentence, 1 to 350: the official partition."""
    if sentence <= LAST_VALIDATION_SENTENCE:
        return "validation"
    return "test" if sentence <= LAST_TEST_SENTENCE else "train"


def read_transcript(member: Member, language: str) -> Iterator[tuple[str, str] | Skipped]:
    """Yield name and text of each row, and what is no row.

    Raises:
        UserError: the encoding cannot be told.
    """
    for number, line in enumerate(decode_transcript(member, language).splitlines(), start=1):
        match = ROW.fullmatch(line.strip())
        fields = [field.strip() for field in match["rest"].split("\t") if field.strip()] if match else []
        if match and len(fields) == 1:  # spaces for tabs; a sentence may end in the name of another emotion
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
    """Return the text of a file whose encoding is one of five, told by which of them makes text of the language.

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
        # A curly quote of Windows and the letter after it are a rare character in GB 18030.
        is_language = has_hanzi if language == "zh" else not (has_hanzi and encoding == "gb18030")
        if is_language and not NEVER_IN_TEXT.search(text):
            return text
        if encoding == "utf-8-sig":  # what is valid UTF-8 is nothing else, and makes garbage in the others
            break
    raise UserError(
        f"{member}: no {LANGUAGES[language]} text in UTF-8, UTF-16, GB 18030 or Windows-1252.",
        "Save it as UTF-8, rows as 0011_000351<TAB>text<TAB>Angry, or get it from the corpus again.",
    )
