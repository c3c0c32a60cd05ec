"""The label space that all corpora share, and the mapping of corpus labels to it."""

from __future__ import annotations

from collections.abc import Mapping

from hf_csm.errors import UserError


EMOTIONS = (
    "neutral",
    "calm",
    "happy",
    "sad",
    "angry",
    "fearful",
    "disgust",
    "surprised",
    "contempt",
    "other",
)
"""Emotions in the order of their class index. No label (null) means that raters did not agree."""

INTENSITIES = ("low", "medium", "high")

UNLABELLED = "unlabelled"
"""Name of the group without a label, in file names and reports; a row has null."""


def map_label(raw: str, label_map: Mapping[str, str | None], where: str) -> str | None:
    """Map a label of a corpus to the shared one; `None` for labels that mean that raters did not agree.

    Args:
        raw: the label in the corpus.
        label_map: from the corpus's labels to `EMOTIONS` (or `None`), complete.
        where: file or row with the label, for the message.

    Raises:
        UserError: the label is not in the map.
    """
    if raw not in label_map:
        raise UserError(
            f"{where}: unknown emotion label {raw!r}.",
            f"Known labels are {', '.join(sorted(label_map))}. Correct the file or remove it.",
        )
    emotion = label_map[raw]
    assert emotion is None or emotion in EMOTIONS, f"{raw!r} maps to {emotion!r}, which is not in the shared space"
    return emotion


def emotion_id(emotion: str | None) -> int | None:
    """Return the class index of an emotion, null for none."""
    return None if emotion is None else EMOTIONS.index(emotion)


def emotion_name(index: int | None) -> str:
    """Return the emotion of a class index, `UNLABELLED` for null."""
    return UNLABELLED if index is None else EMOTIONS[index]


def intensity_id(intensity: str | None) -> int | None:
    """Return the class index of an intensity, null for none."""
    return None if intensity is None else INTENSITIES.index(intensity)
