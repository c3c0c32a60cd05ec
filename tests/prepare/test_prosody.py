import multiprocessing

import numpy as np
import pytest

from hf_csm.data.schema import PROSODY_COLUMNS
from hf_csm.prepare.prosody import measure_prosody
from hf_csm.testing.synthesizer import STYLES, synthesize, voice


RATE = 24_000
TEXT = "Kids are talking by the door"


def measure(emotion="neutral", speaker=1, gain=1.0):
    samples, words = synthesize(TEXT, speaker=speaker, emotion=emotion, sample_rate=RATE, seed=speaker)
    return measure_prosody(gain * samples, RATE, words)


@pytest.mark.parametrize("speaker", [1, 2, 4, 7])
@pytest.mark.parametrize("emotion", ["neutral", "sad", "surprised"])
def test_pitch_is_that_of_the_voice_and_the_emotion(speaker, emotion):
    known_hz = voice(speaker).f0_hz * STYLES[emotion].pitch ** 0.75
    assert measure(emotion, speaker)["f0_median_hz"] == pytest.approx(known_hz, rel=0.06)


@pytest.mark.parametrize("speaker", [1, 2])
def test_angry_and_surprised_are_higher_wider_and_faster_than_sad(speaker):
    sad = measure("sad", speaker)
    for emotion in ("angry", "surprised"):
        lively = measure(emotion, speaker)
        assert lively["f0_median_hz"] > 1.2 * sad["f0_median_hz"]
        assert lively["f0_range_st"] > 1.5 * sad["f0_range_st"]
        assert lively["words_per_s"] > 1.1 * sad["words_per_s"]


def buzz(f0_hz):
    """Return ten harmonics of a pitch given for each sample, float32 `[S]`."""
    phase = 2 * np.pi * np.cumsum(f0_hz) / RATE
    return sum(0.1 / n * np.sin(n * phase) for n in range(1, 11)).astype(np.float32)


def test_a_held_note_has_its_pitch_and_no_range():
    found = measure_prosody(buzz(np.full(2 * RATE, 220.0)), RATE, [{"word": "a", "start_s": 0.5, "end_s": 1.5}])
    assert found["f0_median_hz"] == pytest.approx(220, rel=0.01)
    assert found["f0_range_st"] < 0.1
    assert found["loudness_range_db"] < 0.1
    assert found["voiced_share"] == 1.0
    assert found["words_per_s"] == pytest.approx(1.0)


def test_a_glide_of_an_octave_ranges_over_nine_tenths_of_it():
    glide = buzz(150 * 2 ** np.linspace(0, 1, 3 * RATE))
    found = measure_prosody(glide, RATE, [{"word": "a", "start_s": 0.0, "end_s": 3.0}])
    assert found["f0_range_st"] == pytest.approx(0.9 * 12, abs=0.3)


def test_loudness_range_ignores_pauses():
    tone = np.sin(2 * np.pi * 220 * np.arange(6 * RATE) / RATE)
    level_db = np.where(np.arange(6 * RATE) < 3 * RATE, -30.0, -20.0)
    level_db[2 * RATE : 4 * RATE] = -55.0
    samples = (tone * 10 ** (level_db / 20)).astype(np.float32)
    found = measure_prosody(samples, RATE, [{"word": "a", "start_s": 0.0, "end_s": 6.0}])
    assert found["loudness_range_db"] == pytest.approx(10.0, abs=0.5)


def test_gain_changes_nothing():
    assert measure(gain=0.25) == pytest.approx(measure(), rel=0.02)


def test_audio_outside_the_words_is_ignored():
    samples, words = synthesize(TEXT, speaker=1, sample_rate=RATE)
    hum = 0.3 * np.sin(2 * np.pi * 500 * np.arange(2 * RATE) / RATE).astype(np.float32)
    moved = [{**word, "start_s": word["start_s"] + 2, "end_s": word["end_s"] + 2} for word in words]
    with_hum = measure_prosody(np.concatenate([hum, samples]), RATE, moved)
    assert with_hum == pytest.approx(measure_prosody(samples, RATE, words), rel=0.02)


WORD = [{"word": "Oh", "start_s": 0.1, "end_s": 1.9}]
UNDEFINED = [
    ("silence", np.zeros(2 * RATE), WORD, {"words_per_s": 1 / 1.8, "voiced_share": 0.0}),
    ("silence without words", np.zeros(2 * RATE), [], {"voiced_share": 0.0}),
    ("one sample", np.ones(1), [], {}),
    ("no samples", np.zeros(0), [], {}),
    ("a word without length", np.zeros(RATE), [{"word": "Oh", "start_s": 0.1, "end_s": 0.1}], {}),
    ("a word beyond the clip", np.zeros(100), WORD, {"words_per_s": 1 / 1.8}),
]


@pytest.mark.parametrize(
    ("samples", "words", "defined"), [row[1:] for row in UNDEFINED], ids=[r[0] for r in UNDEFINED]
)
def test_undefined_measures_are_null(samples, words, defined):
    found = measure_prosody(samples.astype(np.float32), RATE, words)
    assert tuple(found) == PROSODY_COLUMNS
    assert {name: value for name, value in found.items() if value is not None} == pytest.approx(defined)


def test_noise_has_a_loudness_range_and_no_pitch():
    noise = np.random.default_rng(0).normal(0, 0.1, 2 * RATE).astype(np.float32)
    found = measure_prosody(noise, RATE, WORD)
    assert found["f0_median_hz"] is None and found["f0_range_st"] is None
    assert found["voiced_share"] < 0.05
    assert found["loudness_range_db"] < 1.0


def test_without_a_transcript_only_the_rate_is_undefined():
    samples, words = synthesize(TEXT, speaker=1, sample_rate=RATE, seed=1)
    found, known = measure_prosody(samples, RATE, []), measure_prosody(samples, RATE, words)
    assert found.pop("words_per_s") is None and known.pop("words_per_s") is not None
    assert found == pytest.approx(known, rel=0.05, abs=0.3)


def test_a_forked_process_can_measure_after_its_parent():
    expected = measure()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(measure).get(timeout=600) == expected
