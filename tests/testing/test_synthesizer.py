import numpy as np
import pytest

from hf_csm.testing.synthesizer import STYLES, synthesize, voice


TEXT = "Kids are talking by the door"
RATE = 24_000


def clip(**options):
    return synthesize(TEXT, **{"speaker": 1, "sample_rate": RATE, **options})


def voiced(samples, words):
    return samples[round(words[0]["start_s"] * RATE) : round(words[-1]["end_s"] * RATE)]


def pitch_hz(samples, words):
    """Median pitch of the loudest 40 ms frames, from the highest peak of their autocorrelation."""
    found = voiced(samples, words)
    frames = found[: len(found) // 960 * 960].reshape(-1, 960)
    loud = frames[np.argsort((frames**2).sum(axis=1))[-len(frames) // 3 :]]
    lags = range(RATE // 500, RATE // 70)
    best = [max(lags, key=lambda lag: float(np.dot(f[:-lag], f[lag:]) / (960 - lag))) for f in loud]  # noqa: B023
    return RATE / float(np.median(best))


def test_the_same_arguments_give_the_same_samples_and_another_seed_does_not():
    assert np.array_equal(clip(seed=3)[0], clip(seed=3)[0])
    assert not np.array_equal(clip(seed=3)[0][:40_000], clip(seed=4)[0][:40_000])


@pytest.mark.parametrize("emotion", STYLES)
def test_words_are_in_order_and_cover_the_audible_part(emotion):
    samples, words = clip(emotion=emotion, intensity="high")
    assert [word["word"] for word in words] == TEXT.split()
    times = [time for word in words for time in (word["start_s"], word["end_s"])]
    assert times == sorted(times) and times[-1] < len(samples) / RATE
    assert np.abs(samples).max() < 1
    for word in words:
        inside = samples[round(word["start_s"] * RATE) : round(word["end_s"] * RATE)]
        assert inside.std() > 10 * samples[:2_400].std()


def test_a_clip_is_quiet_at_both_ends_but_never_silent():
    samples, words = clip()
    for end in (samples[: round(words[0]["start_s"] * RATE)], samples[round(words[-1]["end_s"] * RATE) :]):
        assert 1e-5 < end.std() < 1e-3
        assert np.abs(np.rint(end * 32767)).reshape(-1)[:4_800].any()


def test_pitch_follows_sex_and_emotion():
    neutral = {speaker: pitch_hz(*clip(speaker=speaker)) for speaker in (1, 2)}
    assert neutral[1] == pytest.approx(voice(1).f0_hz, rel=0.2)
    assert neutral[2] == pytest.approx(voice(2).f0_hz, rel=0.2)
    assert pitch_hz(*clip(emotion="surprised", intensity="high")) > 1.2 * neutral[1]


def test_loudness_and_rate_follow_emotion():
    level = {emotion: voiced(*clip(emotion=emotion)).std() for emotion in ("sad", "neutral", "angry")}
    assert level["sad"] < 0.8 * level["neutral"] < level["neutral"] * 1.25 < level["angry"]
    spoken_s = {emotion: len(voiced(*clip(emotion=emotion))) for emotion in ("sad", "fearful")}
    assert spoken_s["sad"] > 1.2 * spoken_s["fearful"]


def test_intensity_widens_the_difference():
    levels = [voiced(*clip(emotion="angry", intensity=i)).std() for i in ("low", "medium", "high")]
    assert levels == sorted(levels)
