"""How far word times are from where the words are. Prints the rows of a Markdown table.

    python recipes/benchmarks/align.py
    python recipes/benchmarks/align.py energy

Clips of the synthesizer say words of random syllables in the voices of many speakers and emotions, with a pause of 0.2
to 0.6 s inside. `energy` is the aligner without a model. `ctc` first trains a tiny wav2vec2, from the texts alone, on
clips of other speakers, and aligns with it: what the method gives with a model that knows the sounds. What either
gives on real speech, no synthetic clip can say.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_data import machine
from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from hf_csm.prepare.align_ctc import CtcAligner
from hf_csm.prepare.align_energy import energy_align
from hf_csm.testing.synthesizer import STYLES, synthesize
from hf_csm.units import SAMPLE_RATE


Words = list[dict[str, Any]]
Aligner = Callable[[np.ndarray, list[str]], Words | None]

NUM_CLIPS = 200
SPEAKERS = range(1, 25)
# One letter for each consonant that the synthesizer tells apart, so that a model can tell them apart too.
CONSONANTS, VOWELS = "mst", "aeiou"

MODEL_RATE = 16_000
TRAINING_SPEAKERS = range(101, 141)
NUM_TRAINING_CLIPS, NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 600, 1_000, 16, 3e-3
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "|", *CONSONANTS, *VOWELS]
WINDOW = 400
"""Samples under one frame of the model, 25 ms."""


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


def write_trained_model(folder: Path) -> None:
    """Train a tiny CTC model on clips and their texts, without word times.

    Its one convolution is a fixed bank of tones, so that its features are computed once; all above it is learnt.
    """
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(VOCABULARY)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    extractor.save_pretrained(folder)
    torch.set_num_threads(1)  # its matrices are too small to share
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=192,
        conv_dim=(160,),
        conv_kernel=(WINDOW,),
        conv_stride=(320,),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        layerdrop=0.0,
        mask_time_prob=0.0,
    )
    model: Any = Wav2Vec2ForCTC(config).eval()  # no dropout: clips are many and epochs few
    model.wav2vec2.feature_extractor.conv_layers[0].conv.weight.data.copy_(tones())
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    features, targets = [], []
    for seed in range(NUM_TRAINING_CLIPS):
        samples, words = random_clip(TRAINING_SPEAKERS, seed, MODEL_RATE, (1 + seed % 3,))
        values = extractor(samples, sampling_rate=MODEL_RATE, return_tensors="pt").input_values
        with torch.no_grad():
            features.append(model.wav2vec2.feature_extractor(values)[0].T)
        targets.append(torch.tensor([ids[letter] for letter in "|".join(word["word"] for word in words)]))
    learnt = [parameter for name, parameter in model.named_parameters() if "feature_extractor" not in name]
    optimizer = torch.optim.AdamW(learnt, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=NUM_STEPS)
    draw = np.random.default_rng(0)
    for step in range(NUM_STEPS):
        chosen = draw.choice(len(features), BATCH_SIZE, replace=False)
        lengths = torch.tensor([len(features[index]) for index in chosen])
        padded = torch.nn.utils.rnn.pad_sequence([features[index] for index in chosen], batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        hidden = model.wav2vec2.encoder(model.wav2vec2.feature_projection(padded)[0], attention_mask=mask)
        log_probs = model.lm_head(hidden.last_hidden_state).log_softmax(-1).transpose(0, 1)
        own = [targets[index] for index in chosen]
        loss = torch.nn.functional.ctc_loss(
            log_probs, torch.cat(own), lengths, torch.tensor([len(target) for target in own]), zero_infinity=True
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item():.3f} nats a letter", file=sys.stderr, flush=True)
    model.save_pretrained(folder)


def tones() -> torch.Tensor:
    """Return 40 tones on the mel scale in four phases under a Hann window, `[160, 1, WINDOW]`."""
    mel = torch.linspace(*(1127 * math.log(1 + hz / 700) for hz in (80, 7_000)), 40)
    hz = 700 * (torch.exp(mel / 1127) - 1)
    angle = 2 * torch.pi * hz[:, None] * torch.arange(WINDOW) / MODEL_RATE
    waves = torch.cat([angle.cos(), -angle.cos(), angle.sin(), -angle.sin()])
    return (torch.hann_window(WINDOW) * waves)[:, None]


def energy() -> Aligner:
    """Return the aligner that needs no model."""
    return lambda samples, words: energy_align(samples, SAMPLE_RATE, words)


def ctc() -> Aligner:
    """Return the CTC aligner with a model trained here."""
    with tempfile.TemporaryDirectory() as folder:
        write_trained_model(Path(folder))
        aligner = CtcAligner(folder)
    return lambda samples, words: aligner.align([samples], SAMPLE_RATE, [words])[0]


ALIGNERS: dict[str, Callable[[], Aligner]] = {"energy": energy, "ctc": ctc}


def benchmark(name: str) -> str:
    """Return a table row: the errors of an aligner, and its time for a second of audio."""
    begin = time.perf_counter()
    align = ALIGNERS[name]()
    training_s = time.perf_counter() - begin
    errors_ms: dict[str, list[float]] = {"start_s": [], "end_s": []}
    num_declined, audio_s, align_s = 0, 0.0, 0.0
    for seed in range(NUM_CLIPS):
        samples, known = random_clip(SPEAKERS, seed, SAMPLE_RATE, (3, 3))
        begin = time.perf_counter()
        aligned = align(samples, [word["word"] for word in known])
        align_s += time.perf_counter() - begin
        audio_s += len(samples) / SAMPLE_RATE
        if aligned is None:
            num_declined += 1
            continue
        for key, errors in errors_ms.items():
            errors += [1_000 * abs(ours[key] - theirs[key]) for ours, theirs in zip(aligned, known, strict=True)]
    cells = [
        f"{name}, {NUM_CLIPS} clips, {audio_s / 60:.0f} min",
        *("{:.0f} / {:.0f} ms".format(*np.percentile(errors, [50, 95])) for errors in errors_ms.values()),
        str(num_declined),
        f"{1_000 * align_s / audio_s:.1f} ms",
        f"{training_s:.0f} s",
        machine(),
        datetime.date.today().isoformat(),
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "aligner | starts, median / 95 % | ends, median / 95 % | declined | per s of audio | training | machine | date"
)


def main(arguments: list[str] | None = None) -> None:
    """Measure the named aligners, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(ALIGNERS)}; everything by default")
    names = parser.parse_args(arguments).names
    for name in names:
        if name not in ALIGNERS:
            parser.error(f"unknown aligner {name!r}; choose from {', '.join(ALIGNERS)}")
    print(f"| {HEADER} |\n|{'---|' * (HEADER.count('|') + 1)}")
    for name in names or list(ALIGNERS):
        print(benchmark(name))


if __name__ == "__main__":
    main()
