import json

import numpy as np
import pytest

from hf_csm.errors import UserError
from hf_csm.prepare.align_ctc import CtcAligner, fill_gaps, load_ctc_aligner
from hf_csm.prepare.archive import Member
from hf_csm.testing.synthesizer import synthesize


WORDS = ["Kids", "are", "talking", "by", "the", "door"]
UPPER = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
LOWER = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyzüß"]
CHINESE = ["<pad>", "<s>", "</s>", "<unk>", "|", *"打远一看她们的确很是美丽"]
HINDI = ["<pad>", "<s>", "</s>", "<unk>", "|", *sorted(set("हिंदी में"))]


def write_model(folder, vocabulary, norm="group", **changes):
    """Write a random CTC model: 16 units, one layer; `norm` as in base-960h ("group") or large-960h-lv60 ("layer")."""
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=norm == "layer").save_pretrained(folder)
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
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        **changes,
    )
    model = Wav2Vec2ForCTC(config)
    model.lm_head.weight.data *= 50  # paths that hang on the sound, not on rounding
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["group", "layer"])
def aligner(request, tmp_path_factory):
    return CtcAligner(write_model(tmp_path_factory.mktemp("ctc"), UPPER, request.param))


@pytest.fixture(scope="module")
def clips():
    texts = ["Kids are talking by the door", "Dogs", "Dogs are sitting by the door, aren't they?"]
    return [synthesize(text, speaker=n, seed=n, sample_rate=24_000)[0] for n, text in enumerate(texts)], [
        text.split() for text in texts
    ]


def check_words(aligned, words, duration_s):
    assert [word["word"] for word in aligned] == words
    times = [time for word in aligned for time in (word["start_s"], word["end_s"])]
    assert all(word["end_s"] > word["start_s"] for word in aligned)
    assert times == sorted(times)
    assert times[0] >= 0 and times[-1] <= duration_s


def test_every_word_gets_a_time(aligner, clips):
    for aligned, clip, words in zip(aligner.align(clips[0], 24_000, clips[1]), *clips, strict=True):
        check_words(aligned, words, len(clip) / 24_000)


def test_alignment_does_not_depend_on_the_batch(aligner, clips):
    together = aligner.align(clips[0], 24_000, clips[1])
    alone = [aligner.align([clip], 24_000, [words])[0] for clip, words in zip(*clips, strict=True)]
    assert together == alone


def test_batched_outputs_equal_those_of_the_plain_model(aligner, clips):
    import torch

    sounds = [clip[::2].copy() for clip in clips[0]]
    for sound, ours in zip(sounds, aligner._log_probs(sounds), strict=True):
        values = aligner._extractor(sound, sampling_rate=16_000, return_tensors="pt").input_values
        with torch.inference_mode():
            theirs = aligner._model(values).logits.log_softmax(-1)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_adapter_after_the_transformer_gets_no_padding(tmp_path, clips):
    adapted = CtcAligner(write_model(tmp_path, UPPER, "layer", add_adapter=True, num_adapter_layers=1))
    words = [["Kids"], ["Dogs"], ["Dogs"]]
    alone = [adapted.align([clip], 24_000, [of_clip])[0] for clip, of_clip in zip(clips[0], words, strict=True)]
    assert adapted.align(clips[0], 24_000, words) == alone


@pytest.mark.parametrize(
    ("words", "seconds"),
    [(["Kids", "42"], 2.0), (["naïve"], 2.0), (WORDS, 0.1), (WORDS, 0.001), (["aaaaaaaaaa"], 0.3)],
    ids=[
        "digits",
        "a letter the model lacks",
        "too many letters",
        "shorter than a frame",
        "no blanks between repeats",
    ],
)
def test_words_that_cannot_be_spelled_or_do_not_fit_are_declined_clip_by_clip(aligner, words, seconds):
    samples = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    aligned = aligner.align([samples, samples[: round(seconds * 24_000)], samples], 24_000, [WORDS, words, WORDS])
    assert aligned[1] is None
    check_words(aligned[0], WORDS, 2.0)
    assert aligned[0] == aligned[2]


SPELLINGS = [
    (UPPER, ["Don't", "go!"], "DON'T|GO"),
    (UPPER, ["Don’t"], "DON'T"),
    (LOWER, ["Don't", "go!"], "dontgo"),
    (LOWER, ["STRAẞE", "Über"], "straßeüber"),
    (UPPER, ["Straße"], "STRASSE"),
    (UPPER, ["«Oh»", "-", "dear"], None),
    (CHINESE, ["打", "远", "一", "看，"], "打远一看"),
    (CHINESE, ["打", "狗"], None),
    (HINDI, ["हिंदी", "में"], "हिंदी|में"),
]


@pytest.mark.parametrize(("vocabulary", "words", "spelt"), SPELLINGS)
def test_words_are_spelled_with_the_vocabulary_of_the_model(tmp_path, vocabulary, words, spelt):
    ids = CtcAligner(write_model(tmp_path, vocabulary))._spell_all(words)
    assert spelt == (None if ids is None else "".join(vocabulary[id_] for of_word in ids for id_ in of_word))


BORDERS = {
    "half-way where the sound goes on": ([(0.3, 0.5), (0.7, 0.8)], [[0.2, 1.0]], [(0.2, 0.6), (0.6, 1.0)]),
    "to the pause between": ([(0.3, 0.4), (0.7, 0.8)], [[0.2, 0.45], [0.65, 1.0]], [(0.2, 0.45), (0.65, 1.0)]),
    "to the longest pause": ([(0.1, 0.2), (0.8, 0.9)], [[0, 0.3], [0.35, 0.4], [0.6, 1]], [(0, 0.4), (0.6, 1)]),
    "not to breath and click": ([(0.5, 0.6)], [[0.1, 0.2], [0.4, 0.7], [0.9, 1.0]], [(0.4, 0.7)]),
    "to the ends of a clip that is cut close": ([(0.1, 0.9)], [[0.0, 1.0]], [(0.0, 1.0)]),
    "not at all in silence": ([(0.1, 0.2), (0.3, 0.4)], np.zeros((0, 2)), [(0.1, 0.2), (0.3, 0.4)]),
    "not far into noise": ([(2.0, 2.1), (5.0, 5.1)], [[0.0, 8.0]], [(1.5, 2.6), (4.5, 5.6)]),
}


@pytest.mark.parametrize(("spikes_s", "sound_s", "expected"), BORDERS.values(), ids=BORDERS.keys())
def test_words_extend_to_pauses(spikes_s, sound_s, expected):
    duration_s = 8.0 if spikes_s[-1][1] > 1 else 1.0
    assert fill_gaps(spikes_s, np.array(sound_s), duration_s) == [pytest.approx(span) for span in expected]


def test_prepare_falls_back_to_energy_and_reports_it(tmp_path):
    from hf_csm.corpora import make_builder
    from hf_csm.prepare.utterance import Shard, Tally, Utterance

    builder = make_builder("ravdess", align_model=write_model(tmp_path, UPPER))

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
    assert load_ctc_aligner(str(tmp_path)) is load_ctc_aligner(str(tmp_path))


def test_a_folder_without_a_ctc_model_is_an_error(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        CtcAligner(str(tmp_path))


def test_a_model_without_a_trained_ctc_head_is_an_error(tmp_path):
    from transformers import Wav2Vec2Model

    folder = write_model(tmp_path / "whole", UPPER)
    Wav2Vec2Model.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(UserError, match="lacks lm_head"):
        CtcAligner(folder)


def test_a_blank_outside_the_outputs_is_an_error(tmp_path):
    folder = write_model(tmp_path, UPPER)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (tmp_path / name).unlink(missing_ok=True)
    renamed = ["[PAD]", *UPPER[1:]]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(renamed)}))
    with pytest.raises(UserError, match="<pad>"):
        CtcAligner(folder)


def break_blank(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": None}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"garbage" * 9), "can be loaded"),
        (lambda folder: (folder / "vocab.json").unlink(), "can be loaded"),
        (lambda folder: (folder / "vocab.json").write_text('["a", "b"]'), "can be loaded"),
        (lambda folder: (folder / "vocab.json").write_text('{"a": "b"}'), "can be loaded"),
        (break_blank, "its blank None"),
    ],
)
def test_a_damaged_model_is_an_error_of_two_lines(tmp_path, break_it, message):
    folder = write_model(tmp_path, UPPER)
    break_it(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        CtcAligner(folder)
    assert len(str(error.value).splitlines()) == 2
