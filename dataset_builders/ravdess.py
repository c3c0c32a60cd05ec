"""RAVDESS: 24 North American actors speak and sing two sentences in eight emotions and two intensities.

Two zips at Zenodo hold 2,452 audio-only clips of about 4 seconds at 48 kHz: 1,440 spoken, which are the default, and
1,012 sung (actor 18 did not sing). Extracted copies are recognized by their file names. The labels are the acted
emotions; the archives do not contain the ratings. There is no official split: actors 1-16 are for training, 17-20 for
validation, 21-24 for testing, with as many women as men in each. Both sentences occur in every split.

Known defects of version 1.0.0, all handled: six stereo clips, one take of actor 7 stored twice, chunks other than
`fmt ` and `data` in every wav; in the copy on Kaggle, every file twice. The audio inside the video files (modality 01)
is that of the audio-only files, so files of other modalities are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hf_csm.errors import UserError
from hf_csm.prepare.archive import Member
from hf_csm.prepare.builder import CorpusBuilder, CorpusConfig
from hf_csm.prepare.download import RemoteArchive
from hf_csm.prepare.utterance import Skipped, Utterance


ARCHIVES = {
    "speech": RemoteArchive(
        "https://zenodo.org/records/1188976/files/Audio_Speech_Actors_01-24.zip?download=1",
        md5="bc696df654c87fed845eb13823edef8a",
        num_bytes=208_468_073,
    ),
    "song": RemoteArchive(
        "https://zenodo.org/records/1188976/files/Audio_Song_Actors_01-24.zip?download=1",
        md5="5411230427d67a21e18aa4d466e6d1b9",
        num_bytes=225_505_317,
    ),
}
FILE_NAME = re.compile(
    r"(?P<modality>01|02|03)-(?P<channel>01|02)-(?P<emotion>0[1-8])-(?P<intensity>01|02)"
    r"-(?P<statement>01|02)-(?P<repetition>01|02)-(?P<actor>0[1-9]|1\d|2[0-4])\.(?:wav|mp4)",
    re.IGNORECASE,
)
AUDIO_ONLY = "03"
SUBSETS = {"01": "speech", "02": "song"}
EMOTIONS = {
    "01": "neutral",
    "02": "calm",
    "03": "happy",
    "04": "sad",
    "05": "angry",
    "06": "fearful",
    "07": "disgust",
    "08": "surprised",
}
# The corpus has "normal" and "strong" only.
INTENSITIES = {"01": "medium", "02": "high"}
STATEMENTS = {"01": "Kids are talking by the door", "02": "Dogs are sitting by the door"}
VALIDATION_ACTORS = range(17, 21)
TEST_ACTORS = range(21, 25)


@dataclass
class RavdessConfig(CorpusConfig):
    """Options of RAVDESS.

    Attributes:
        subsets: speech, song or both.
    """

    subsets: tuple[str, ...] = ("speech",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.subsets or not set(self.subsets) <= set(ARCHIVES):
            raise UserError(f"ravdess: unknown subsets {self.subsets}.", "Choose speech, song or both.")


class Ravdess(CorpusBuilder):
    """The Ryerson Audio-Visual Database of Emotional Speech and Song, audio-only files."""

    BUILDER_CONFIG_CLASS = RavdessConfig
    NAME = "ravdess"
    TITLE = "RAVDESS"
    LICENSE = "cc-by-nc-sa-4.0"
    NOTICE = (
        "Livingstone SR, Russo FA (2018) The Ryerson Audio-Visual Database of Emotional Speech and Song (RAVDESS). "
        "PLoS ONE 13(5): e0196391. https://doi.org/10.5281/zenodo.1188976. CC BY-NC-SA 4.0: not for commercial use; "
        "copies and what is made of them carry this notice and the same licence."
    )
    HOMEPAGE = "https://zenodo.org/records/1188976"
    LABELS = {emotion: emotion for emotion in EMOTIONS.values()}
    FILE_NAME = FILE_NAME
    NAMES_ARE = "03-01-06-01-02-01-12.wav: seven numbers"

    def archives(self) -> list[RemoteArchive]:
        """Return the Zenodo zips of the chosen subsets."""
        return [ARCHIVES[subset] for subset in self.config.subsets]

    def utterances(self, members: list[Member]) -> Iterator[Utterance | Skipped]:
        """Read the file names, which encode all labels of a clip."""
        for member, match in self.named_clips(members, (".wav", ".mp4")):
            if match["modality"] != AUDIO_ONLY:
                yield Skipped(member, "video or audio-visual file with the sound of the audio-only file")
            elif SUBSETS[match["channel"]] in self.config.subsets:
                yield describe(member, match)
            else:
                yield Skipped(member, f"{SUBSETS[match['channel']]} was not selected")


def describe(member: Member, match: re.Match[str]) -> Utterance:
    """Return the utterance of a clip, from the seven numbers of its name."""
    emotion, actor = EMOTIONS[match["emotion"]], int(match["actor"])
    if emotion == "neutral" and match["intensity"] == "02":
        raise UserError(
            f"{member}: neutral with strong intensity, which RAVDESS does not have.", "Remove or rename the file."
        )
    is_validation, is_test = actor in VALIDATION_ACTORS, actor in TEST_ACTORS
    return Utterance(
        id=f"ravdess-{match.string[:20]}",
        member=member,
        text=STATEMENTS[match["statement"]],
        emotion_raw=emotion,
        intensity=INTENSITIES[match["intensity"]],
        speaker_id=f"ravdess-{actor:02d}",
        gender="male" if actor % 2 else "female",
        split="validation" if is_validation else "test" if is_test else "train",
    )
