import json

import numpy as np
import pytest

from hf_csm.data.align import CtcAligner, energy_align, voiced_spans
from hf_csm.errors import UserError
from hf_csm.testing.synthesizer import synthesize


WORDS = ["Kids", "are", "talking", "by", "the", "door"]


def check_words(aligned, words, duration_s):
    assert [word["word"] for word in aligned] == words
    times = [time for word in aligned for time in (word["start_s"], word["end_s"])]
    assert all(word["end_s"] > word["start_s"] for word in aligned)
    assert times == sorted(times)
    assert times[0] >= 0 and times[-1] <= duration_s


def test_words_are_found_near_where_they_are():
    errors_s = []
    for speaker, emotion in [(1, "neutral"), (2, "happy"), (7, "sad"), (12, "angry"), (13, "fearful")]:
        samples, known = synthesize(
            " ".join(WORDS), speaker=speaker, emotion=emotion, sample_rate=24_000, seed=speaker
        )
        aligned = energy_align(samples, 24_000, WORDS)
        check_words(aligned, WORDS, len(samples) / 24_000)
        errors_s += [abs(a[key] - k[key]) for a, k in zip(aligned, known, strict=True) for key in ("start_s", "end_s")]
    assert np.median(errors_s) < 0.05
    assert max(errors_s) < 0.25


def test_a_pause_between_words_belongs_to_no_word():
    first, _ = synthesize("Hello", speaker=1, sample_rate=24_000, lead_s=(0.2, 0.2), tail_s=(0.3, 0.3))
    second, _ = synthesize("Hello", speaker=1, sample_rate=24_000, lead_s=(0.3, 0.3), tail_s=(0.2, 0.2))
    aligned = energy_align(np.concatenate([first, second]), 24_000, ["Hello", "Hello"])
    seam_s = len(first) / 24_000
    assert aligned[0]["end_s"] < seam_s - 0.2
    assert aligned[1]["start_s"] > seam_s + 0.2


@pytest.mark.parametrize("num_samples", [1, 100, 24_000])
@pytest.mark.parametrize("level", [0.0, 1e-4, 0.9])
def test_any_clip_gives_ascending_words_inside_it(num_samples, level):
    samples = (level * np.random.default_rng(0).uniform(-1, 1, num_samples)).astype(np.float32)
    check_words(energy_align(samples, 24_000, WORDS), WORDS, num_samples / 24_000)


def test_quiet_has_no_voiced_span_before_the_voice():
    samples, known = synthesize("Dogs are sitting", speaker=3, sample_rate=24_000)
    spans_s = voiced_spans(samples, 24_000)
    assert spans_s[0, 0] > known[0]["start_s"] - 0.1
    assert spans_s[-1, 1] < known[-1]["end_s"] + 0.1


@pytest.fixture(scope="module")
def ctc_folder(tmp_path_factory):
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    folder = tmp_path_factory.mktemp("ctc")
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return str(folder)


def test_ctc_gives_every_word_a_time(ctc_folder):
    samples, _ = synthesize(" ".join(WORDS), speaker=1, sample_rate=24_000)
    aligned = CtcAligner(ctc_folder).align([samples], 24_000, [WORDS])[0]
    assert aligned is not None
    check_words(aligned, WORDS, len(samples) / 24_000)


def test_ctc_declines_words_it_cannot_spell_and_clips_too_short(ctc_folder):
    aligner = CtcAligner(ctc_folder)
    samples, _ = synthesize("Kids", speaker=1, sample_rate=24_000)
    assert aligner.align([samples], 24_000, [["Kids", "42"]]) == [None]
    assert aligner.align([samples[:2_400]], 24_000, [WORDS]) == [None]


def test_prepare_uses_ctc_where_it_can_and_says_where_not(ctc_folder):
    from hf_csm.data.archive import Member
    from hf_csm.data.corpus import make_builder
    from hf_csm.data.utterance import Shard, Tally, Utterance

    builder = make_builder("ravdess", align_model=ctc_folder)

    class Sound(Member):
        def read(self):
            from hf_csm.testing.ravdess import clip_bytes

            return clip_bytes(self.name)

    utterances = [
        Utterance(name, Sound(name, "x", 1, False), text, "happy", "ravdess-01", "train")
        for name, text in [("03-01-03-01-01-01-01", "Kids"), ("03-01-03-01-02-01-01", "Dogs 2")]
    ]
    tally = Tally()
    rows = list(builder.rows(Shard("train", tuple(utterances)), tally))
    assert [row["alignment_source"] for row in rows] == [1, 2]
    assert sum(tally.counts.values()) == 1


def test_a_folder_without_a_ctc_model_is_an_error(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        CtcAligner(str(tmp_path))
