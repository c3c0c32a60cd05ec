"""Errors of word times against known ones, on synthetic clips. Prints a Markdown table.

    python recipes/benchmarks/align.py                        # the aligner without a model
    python recipes/benchmarks/align.py --align-model FOLDER   # a wav2vec2 CTC model, folder or Hub id

The clips are words of random syllables by many synthetic speakers with many emotions, with a pause of 0.2 to 0.6 s
inside. A model of real speech is at a disadvantage here, and no figure on synthetic clips holds for real speech.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from paired_timing import print_header, print_row, timed

from hf_csm.prepare.align_ctc import CtcAligner
from hf_csm.prepare.align_energy import energy_align
from hf_csm.testing.synthesizer import STYLES, synthesize
from hf_csm.units import SAMPLE_RATE


Words = list[dict[str, Any]]
Aligner = Callable[[np.ndarray, list[str]], Words | None]

SPEAKERS = range(1, 25)
# One letter for each consonant that the synthesizer can tell apart.
CONSONANTS, VOWELS = "mst", "aeiou"


def random_clip(speakers: range, seed: int, sample_rate: int, num_words: tuple[int, ...]) -> tuple[np.ndarray, Words]:
    """Return a clip and its words with their times: phrases of so many words, a pause between them."""
    rng = np.random.default_rng([speakers.start, seed])
    speaker, emotion = int(rng.choice(speakers)), str(rng.choice(list(STYLES)))
    phrases, words, begin_s = [], Words(), 0.0
    for phrase, count in enumerate(num_words):
        samples, timed = synthesize(
            " ".join(random_word(rng) for _ in range(count)),
            speaker=speaker,
            emotion=emotion,
            sample_rate=sample_rate,
            seed=seed * len(num_words) + phrase,
            lead_s=(0.1, 0.3),
            tail_s=(0.1, 0.3),
        )
        phrases.append(samples)
        words += [{**word, "start_s": word["start_s"] + begin_s, "end_s": word["end_s"] + begin_s} for word in timed]
        begin_s += len(samples) / sample_rate
    return np.concatenate(phrases), words


def random_word(rng: np.random.Generator) -> str:
    """Return one to three syllables."""
    syllables = rng.integers(1, 4)
    letters = [(rng.choice(list(CONSONANTS)), rng.choice(list(VOWELS))) for _ in range(syllables)]
    ending = rng.choice(["", *CONSONANTS])
    return "".join(consonant + vowel for consonant, vowel in letters) + str(ending)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--align-model", help="wav2vec2 CTC model; the energy aligner by default")
    parser.add_argument("--clips", type=int, default=200, help="default: 200")
    options = parser.parse_args()
    align: Aligner
    if options.align_model:
        aligner = CtcAligner(options.align_model)
        align = lambda samples, words: aligner.align([samples], SAMPLE_RATE, [words])[0]  # noqa: E731
    else:
        align = lambda samples, words: energy_align(samples, SAMPLE_RATE, words)  # noqa: E731
    errors_ms: dict[str, list[float]] = {"start_s": [], "end_s": []}
    num_declined, audio_s, align_s = 0, 0.0, 0.0
    for seed in range(options.clips):
        samples, known = random_clip(SPEAKERS, seed, SAMPLE_RATE, (3, 3))
        found: list[Words | None] = []
        align_s += timed(lambda: found.append(align(samples, [word["word"] for word in known])))  # noqa: B023
        audio_s += len(samples) / SAMPLE_RATE
        if found[0] is None:
            num_declined += 1
            continue
        for key, errors in errors_ms.items():
            errors += [1_000 * abs(ours[key] - theirs[key]) for ours, theirs in zip(found[0], known, strict=True)]
    print_header("aligner", "starts, median / 95 %", "ends, median / 95 %", "declined", "per s of audio")
    print_row(
        f"{options.align_model or 'energy'}, {options.clips} clips, {audio_s / 60:.0f} min",
        *("{:.0f} / {:.0f} ms".format(*np.percentile(errors, [50, 95])) for errors in errors_ms.values()),
        str(num_declined),
        f"{1_000 * align_s / audio_s:.1f} ms",
    )


if __name__ == "__main__":
    main()
