import itertools

import numpy as np
import pytest

from hf_csm.prepare.align_energy import energy_align, voiced_spans
from hf_csm.testing.synthesizer import STYLES, synthesize


WORDS = ["Kids", "are", "talking", "by", "the", "door"]


def check_words(aligned, words, duration_s):
    assert [word["word"] for word in aligned] == words
    times = [time for word in aligned for time in (word["start_s"], word["end_s"])]
    assert all(word["end_s"] > word["start_s"] for word in aligned)
    assert times == sorted(times)
    assert times[0] >= 0 and times[-1] <= duration_s


TEXTS = [
    "Kids are talking by the door",
    "I would like a new alarm clock",
    "That is exactly what happened",
    "Maybe tomorrow it will be cold",
    "The surface is slick",
]


def errors_ms(aligned, known):
    pairs = zip(aligned, known, strict=True)
    return [1_000 * abs(ours[key] - theirs[key]) for ours, theirs in pairs for key in ("start_s", "end_s")]


def test_word_times_are_near_the_true_ones():
    found_ms = []
    for speaker, emotion in itertools.product(range(1, 6), STYLES):
        text = TEXTS[speaker - 1]
        samples, known = synthesize(text, speaker=speaker, emotion=emotion, sample_rate=24_000, seed=speaker)
        aligned = energy_align(samples, 24_000, text.split())
        check_words(aligned, text.split(), len(samples) / 24_000)
        found_ms += errors_ms(aligned, known)
    assert np.median(found_ms) < 60
    assert np.percentile(found_ms, 95) < 150


def test_word_times_next_to_a_pause_are_near_the_true_ones():
    found_ms = []
    for seed, (speaker, emotion) in enumerate(itertools.product(range(1, 6), STYLES)):
        halves, known, begin_s = [], [], 0.0
        for text in (TEXTS[seed % 5], TEXTS[(seed + 1) % 5]):
            samples, timed = synthesize(
                text,
                speaker=speaker,
                emotion=emotion,
                sample_rate=24_000,
                seed=seed,
                lead_s=(0.1, 0.3),
                tail_s=(0.1, 0.3),
            )
            known += [{**w, "start_s": w["start_s"] + begin_s, "end_s": w["end_s"] + begin_s} for w in timed]
            halves.append(samples)
            begin_s += len(samples) / 24_000
        aligned = energy_align(np.concatenate(halves), 24_000, [word["word"] for word in known])
        found_ms += errors_ms(aligned, known)
    assert np.median(found_ms) < 60
    assert np.percentile(found_ms, 95) < 150


def test_a_pause_between_words_belongs_to_no_word():
    first, _ = synthesize("Hello", speaker=1, sample_rate=24_000, lead_s=(0.2, 0.2), tail_s=(0.3, 0.3))
    second, _ = synthesize("Hello", speaker=1, sample_rate=24_000, lead_s=(0.3, 0.3), tail_s=(0.2, 0.2))
    aligned = energy_align(np.concatenate([first, second]), 24_000, ["Hello", "Hello"])
    seam_s = len(first) / 24_000
    assert aligned[0]["end_s"] < seam_s - 0.2
    assert aligned[1]["start_s"] > seam_s + 0.2


BURSTS = {
    "a pause parts the words": (["go", "international"], [0.8, 0.8], [0, 1]),
    "a breath before the words is not the first word": (["international", "organisation"], [0.15, 1.2], [0, 1]),
    "a click after the words is not the last word": (["international", "organisation"], [1.2, 0.1], [0, 0]),
    "more pauses than words": (["go"], [0.3, 0.3, 0.3], [0]),
    "two pauses beside one border": (["international", "organisation"], [1.0, 0.1, 1.0], [0, 1]),
}


@pytest.mark.parametrize(("words", "lengths_s", "begins_in"), BURSTS.values(), ids=BURSTS.keys())
def test_pauses_separate_words_where_possible(words, lengths_s, begins_in):
    quiet = np.full(9_600, 1e-4)
    sounds = [
        np.concatenate([0.3 * np.sin(np.arange(round(24_000 * length_s)) / 10), quiet]) for length_s in lengths_s
    ]
    starts_s = np.cumsum([0.4, *[len(sound) / 24_000 for sound in sounds]])
    samples = np.concatenate([quiet, *sounds]).astype(np.float32)
    aligned = energy_align(samples, 24_000, words)
    check_words(aligned, words, len(samples) / 24_000)
    for word, burst in zip(aligned, begins_in, strict=True):
        assert starts_s[burst] - 0.05 < word["start_s"] < starts_s[burst + 1]
    assert aligned[-1]["end_s"] > starts_s[-2]


@pytest.mark.parametrize("num_samples", [1, 100, 24_000])
@pytest.mark.parametrize("level", [0.0, 1e-4, 0.9])
def test_words_are_ascending_and_inside_the_clip(num_samples, level):
    samples = (level * np.random.default_rng(0).uniform(-1, 1, num_samples)).astype(np.float32)
    check_words(energy_align(samples, 24_000, WORDS), WORDS, num_samples / 24_000)


def test_silence_before_the_voice_has_no_voiced_span():
    samples, known = synthesize("Dogs are sitting", speaker=3, sample_rate=24_000)
    spans_s = voiced_spans(samples, 24_000)
    assert spans_s[0, 0] > known[0]["start_s"] - 0.1
    assert spans_s[-1, 1] < known[-1]["end_s"] + 0.1
