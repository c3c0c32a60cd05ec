"""Row schemas of the tables that stages exchange: an utterance (after prepare) and a window (after encode)."""

from __future__ import annotations

from datasets import Audio, ClassLabel, Features, List, Value

from hf_csm.data.labels import EMOTIONS, INTENSITIES
from hf_csm.units import SAMPLE_RATE


SPLITS = ("train", "validation", "test")
ALIGNMENT_SOURCES = ("corpus", "ctc", "energy")
PROSODY_COLUMNS = ("f0_median_hz", "f0_range_st", "loudness_range_db", "words_per_s", "voiced_share")

WORD = {"word": Value("string"), "start_s": Value("float32"), "end_s": Value("float32")}

# `decode=False`, because `datasets` decodes `Audio` only with torchcodec, which needs FFmpeg on the system.
# `hf_csm.data.audio.decode_audio(row["audio"])` returns the samples without either.
UTTERANCE_FEATURES = Features(
    {
        "id": Value("string"),
        "corpus": Value("string"),
        "audio": Audio(sampling_rate=SAMPLE_RATE, decode=False),
        "duration_s": Value("float32"),
        "text": Value("string"),
        "language": Value("string"),
        "words": List(WORD),
        "alignment_source": ClassLabel(names=list(ALIGNMENT_SOURCES)),
        "emotion": ClassLabel(names=list(EMOTIONS)),
        "emotion_raw": Value("string"),
        "emotion_perceived": ClassLabel(names=list(EMOTIONS)),
        "emotion_agreement": Value("float32"),
        "intensity": ClassLabel(names=list(INTENSITIES)),
        "arousal": Value("float32"),
        "valence": Value("float32"),
        "dominance": Value("float32"),
        "speaker_id": Value("string"),
        "gender": Value("string"),
        "split": Value("string"),
        "license": Value("string"),
        "sha256": Value("string"),
        "sentence_id": Value("string"),
        **{name: Value("float32") for name in PROSODY_COLUMNS},
    }
)
"""One clip of one speaker. Times are seconds from its first sample; null where unknown.

The last five are set by `prepare --prosody`, otherwise null; `hf_csm.prepare.prosody` documents the measures.
`sentence_id` is shared by all clips of a sentence that is kept in one split.
"""

WINDOW_FEATURES = Features(
    {
        "id": Value("string"),
        "corpus": Value("string"),
        "split": Value("string"),
        "emotion": ClassLabel(names=list(EMOTIONS)),
        "speaker_id": Value("string"),
        "language": Value("string"),
        "codes": List(List(List(Value("int16")))),
        "num_frames": Value("int32"),
        "words": List({**WORD, "channel": Value("int8")}),
        "turns": List(
            {
                "clip_id": Value("string"),
                "channel": Value("int8"),
                "start_s": Value("float32"),
                "end_s": Value("float32"),
            }
        ),
        "variant": Value("int32"),
    }
)
"""One conversation. `codes` is `[2, Q, T]`: Moshi's channel (0), the user's (1); Q codebooks, T frames.

`emotion` is null where Moshi's channel has none, as in dialogues for replay.
"""
