"""CREMA-D: 91 actors speak twelve sentences in six emotions, one of the sentences in three intensities.

7,442 clips of 2.5 seconds, 16 kHz, in a Git repository (audio in Git LFS) and its mirror. A clone, the mirror, or a
folder with the wavs is read; MP3s and videos are ignored. `emotion` is the acted emotion. The ratings of 4 to 12
listeners (voice alone) are in `processedResults/`, which only the clone has; they agree with the acted emotion for
42 % of the clips. There is no official split: 63 actors are for training, 9 for validation, 19 for testing, the lists
of TensorFlow Datasets. The twelve sentences occur in every split.

Known defects, all handled: LFS pointers instead of audio; one silent clip (1076_MTI_SAD_XX); three recordings stored
under two labels each; 1040_ITH_SAD_X, misnamed until October 2022; ties among the raters. Some MP3s and videos are
damaged; their wavs are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from hf_csm.errors import UserError
from hf_csm.prepare.archive import Member
from hf_csm.prepare.builder import CorpusBuilder
from hf_csm.prepare.tabular import read_rows
from hf_csm.prepare.utterance import Skipped, Utterance


EMOTIONS = {"ANG": "angry", "DIS": "disgust", "FEA": "fearful", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
VOTES = {emotion[0]: shared for emotion, shared in EMOTIONS.items()}
INTENSITIES = {"LO": "low", "MD": "medium", "HI": "high", "XX": None}
SENTENCES = {
    "IEO": "It's eleven o'clock",
    "TIE": "That is exactly what happened",
    "IOM": "I'm on my way to the meeting",
    "IWW": "I wonder what this is about",
    "TAI": "The airplane is almost full",
    "MTI": "Maybe tomorrow it will be cold",
    "IWL": "I would like a new alarm clock",
    "ITH": "I think I have a doctor's appointment",
    "DFA": "Don't forget a jacket",
    "ITS": "I think I've seen this before",
    "TSI": "The surface is slick",
    "WSI": "We'll stop in a couple of minutes",
}
FILE_NAME = re.compile(
    rf"(?P<actor>10(?:0[1-9]|[1-8]\d|9[01]))_(?P<sentence>{'|'.join(SENTENCES)})_(?P<emotion>{'|'.join(EMOTIONS)})"
    r"_(?P<level>LO|MD|HI|XX?)\.(?:wav|WAV)"
)
# Pairs of names for one recording; the right label of the two is unknown.
CONFLICTING = frozenset(
    (
        *("1006_TIE_HAP_XX", "1006_TIE_NEU_XX"),
        *("1013_WSI_DIS_XX", "1013_WSI_SAD_XX"),
        *("1017_IWW_ANG_XX", "1017_IWW_FEA_XX"),
    )
)
HELD_OUT = {
    "validation": "1015 1020 1021 1030 1050 1070 1079 1089 1090",
    "test": "1010 1013 1022 1026 1037 1038 1040 1045 1047 1048 1059 1065 1066 1068 1071 1073 1084 1086 1088",
}
SPLIT_OF = {actor: split for split, actors in HELD_OUT.items() for actor in actors.split()}
MEN = (
    "1001 1005 1011 1014 1015 1016 1017 1019 1022 1023 1026 1027 1031 1032 1033 1034 1035 1036 1038 1039 1040 1041 "
    "1042 1044 1045 1048 1050 1051 1057 1059 1062 1064 1065 1066 1067 1068 1069 1070 1071 1077 1080 1081 1083 1085 "
    "1086 1087 1088 1090"
)
"""For a folder without VideoDemographics.csv."""
TIE = ":"
"""Separator of the letters of a tied vote: A:D."""
MIRROR = "https://gitlab.com/cs-cooper-lab/crema-d-mirror.git"
POINTER = b"version https://git-lfs"
LARGEST_POINTER_BYTES = 1_024
VOICE = 1
"""Rows of tabulatedVotes.csv are numbered modality * 100,000 + stimulus: 1 voice alone, 2 face alone, 3 both."""


class CremaD(CorpusBuilder):
    """The Crowd-Sourced Emotional Multimodal Actors Dataset, wav files."""

    NAME = "crema_d"
    TITLE = "CREMA-D"
    LICENSE = "odbl"
    NOTICE = (
        "Cao H, Cooper DG, Keutmann MK, Gur RC, Nenkova A, Verma R (2014) CREMA-D: Crowd-Sourced Emotional Multimodal "
        "Actors Dataset. IEEE Transactions on Affective Computing 5(4): 377-390. "
        "https://doi.org/10.1109/TAFFC.2014.2336244. Database under the Open Database License (ODbL) 1.0, contents "
        "under the Database Contents License (DbCL) 1.0: keep this notice, and share databases made of it alike."
    )
    HOMEPAGE = "https://github.com/CheyneyComputerScience/CREMA-D"
    HOW_TO_GET = f"git clone {HOMEPAGE} and git lfs pull in it (or git clone {MIRROR})"
    LABELS = {**EMOTIONS, **VOTES}
    FILE_NAME = FILE_NAME
    NAMES_ARE = "1001_IEO_ANG_HI.wav: actor, sentence, emotion, level"

    def utterances(self, members: list[Member]) -> Iterator[Utterance | Skipped]:
        """Read the file names, and the tables that exist."""
        clips = list(self.named_clips(members))
        check_no_pointers([member for member, _ in clips])
        tables = {member.file_name.lower(): member for member in reversed(members)}  # the topmost of several
        genders = read_genders(tables.get("videodemographics.csv"))
        votes = read_votes(tables.get("summarytable.csv"))
        agreements = read_agreements(tables.get("tabulatedvotes.csv")) if votes else {}
        names = set()
        for member, match in clips:
            name = match.string[: -len(".wav")]
            if match["level"] == "X":
                name += "X"
                yield Skipped(member, "named with one X instead of two, as before October 2022", action="repaired")
            names.add(name)
            if votes and name not in votes:
                yield Skipped(member, "no entry in summaryTable.csv", is_fault=True, action="noted")
            if name in CONFLICTING:
                yield Skipped(member, "one recording under two labels")
                continue
            actor, vote = match["actor"], votes.get(name)
            yield Utterance(
                id=f"crema_d-{name}",
                member=member,
                text=SENTENCES[match["sentence"]],
                emotion_raw=match["emotion"],
                emotion_perceived_raw=None if vote is None or TIE in vote else vote,
                emotion_agreement=agreements.get(name),
                intensity=INTENSITIES[name[-2:]],
                speaker_id=f"crema_d-{actor}",
                gender=genders[actor],
                split=SPLIT_OF.get(actor, "train"),
            )
        for name in sorted(votes.keys() - names):
            yield Skipped(name, "in summaryTable.csv without a wav", is_fault=True)


def check_no_pointers(clips: Sequence[Member]) -> None:
    """Raise if clips are Git LFS pointers, three lines of text, as in a clone without Git LFS.

    Raises:
        UserError: there are pointers; names the first.
    """
    pointers = [clip for clip in clips if clip.num_bytes <= LARGEST_POINTER_BYTES and clip.read().startswith(POINTER)]
    if pointers:
        raise UserError(
            f"{pointers[0]}: a Git LFS pointer instead of audio, as {len(pointers):,} of {len(clips):,} wavs.",
            f'Run git lfs pull --include="AudioWAV/*" in the clone; if GitHub refuses, clone {MIRROR} instead.',
        )


def read_genders(demographics: Member | None) -> dict[str, str | None]:
    """Return the gender of each actor, from VideoDemographics.csv if it exists."""
    men = MEN.split()
    genders: dict[str, str | None] = {str(a): "male" if str(a) in men else "female" for a in range(1001, 1092)}
    if demographics is not None:
        for actor, sex in read_table(demographics, ("ActorID", "Sex")):
            genders[actor] = sex.lower() if sex.lower() in ("male", "female") else None
    return genders


def read_votes(summary: Member | None) -> dict[str, str]:
    """Return the majority vote of the listeners on each clip, from summaryTable.csv; empty without it.

    Raises:
        UserError: a vote has unknown letters.
    """
    if summary is None:
        return {}
    votes: dict[str, str] = {}
    for name, vote in read_table(summary, ("FileName", "VoiceVote")):
        if not set(vote.split(TIE)) <= set(VOTES):
            raise UserError(
                f"{summary}: {name} has the unknown vote {vote!r}.",
                f"Votes are {' '.join(VOTES)}, with a colon between them on a tie. Get the table again.",
            )
        if votes.setdefault(name, vote) != vote:
            raise UserError(
                f"{summary}: two votes on {name}, {votes[name]} and {vote}.",
                "Remove the wrong row, or get the table again.",
            )
    return votes


def read_agreements(counts: Member | None) -> dict[str, float]:
    """Return the share of listeners behind the majority of each clip, from tabulatedVotes.csv; empty without it."""
    if counts is None:
        return {}
    rows = list(read_table(counts, ("", "fileName", "agreement")))
    try:
        return {name: float(agreement) for number, name, agreement in rows if int(number) // 100_000 == VOICE}
    except ValueError as error:
        raise UserError(f"{counts}: {error}.", "Get the table again.") from error


def read_table(member: Member, columns: Sequence[str]) -> Iterator[list[str]]:
    """Yield the named columns of each row; case is ignored in their names, because it differs between tables.

    Raises:
        UserError: a table without rows, a missing column, or see `read_rows`.
    """
    remedy = f"Get the table again from {CremaD.HOMEPAGE}, or remove it."
    where = None
    for where, cells in read_rows(member):
        row = {column.lower(): cell for column, cell in cells.items()}
        missing = [column for column in columns if column.lower() not in row]
        if missing:
            raise UserError(f"{where}: no column {missing[0]!r}; its columns are {', '.join(cells)}.", remedy)
        yield [row[column.lower()] for column in columns]
    if where is None:
        raise UserError(f"{member}: no rows.", remedy)
