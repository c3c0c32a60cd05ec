import itertools

import numpy as np
import pytest

from hf_csm.models.family import Layout
from hf_csm.models.moshi.checkpoint import find_checkpoint, load_tokenizer
from hf_csm.models.moshi.forced_text import Script, words_in
from hf_csm.models.moshi.layout import text_stream


PAD, END_OF_PAD, START, MIDDLE = 3, 0, 10, 11
WORDS = [[20], [21, 22], [23, 24, 25], [26]]


def script(num_given=0, max_padding=4, words=WORDS):
    return Script(
        words,
        num_given=num_given,
        word_starts=[START],
        padding_id=PAD,
        end_of_padding_id=END_OF_PAD,
        max_padding=max_padding,
    )


def stream(policy, sampled):
    return [policy.follow(token) for token in sampled]


def test_moshi_times_the_words_of_the_script():
    policy = script(words=[[20], [21, 22], [23]])
    sampled = [PAD, PAD, START, PAD, START, PAD, PAD, END_OF_PAD, PAD, PAD, START, END_OF_PAD]
    # The end of padding goes before a word, unless the word before it has only just ended.
    expected = [PAD, PAD, END_OF_PAD, 20, 21, 22, PAD, END_OF_PAD, 23, PAD, PAD, PAD]
    assert stream(policy, sampled) == expected
    assert policy.word_frames == [3, 4, 8]
    assert policy.last_frame == 8


def test_a_continued_word_does_not_begin_the_next():
    assert stream(script(), [PAD, MIDDLE, MIDDLE, START, PAD]) == [PAD, PAD, PAD, END_OF_PAD, 20]


def test_pauses_are_capped_so_that_every_text_ends():
    policy = script(max_padding=2)
    said = stream(policy, [PAD] * 40)
    assert said[:9] == [PAD, PAD, END_OF_PAD, 20, PAD, PAD, END_OF_PAD, 21, 22]
    assert policy.last_frame is not None
    assert set(said[policy.last_frame + 1 :]) == {PAD}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_given", [0, 2])
def test_the_text_is_laid_out_as_in_training(seed, num_given):
    """For any samples, the stream equals that of training for the same words and begin times."""
    rng = np.random.default_rng(seed)
    sampled = rng.choice([PAD, END_OF_PAD, START, MIDDLE], size=60, p=[0.6, 0.15, 0.15, 0.1]).tolist()
    policy = script(num_given, words=WORDS)
    said = stream(policy, sampled)
    assert said[:num_given] == sampled[:num_given]
    words = [{"word": str(number), "start_s": frame / 12.5 + 0.01} for number, frame in enumerate(policy.word_frames)]
    layout = Layout((0,), 0, 0, PAD, END_OF_PAD, 100, 100)
    laid_out = text_stream(words, len(said), lambda word: WORDS[int(word)], layout)
    assert said[num_given:] == laid_out[num_given:].tolist()
    tokens = [token for token in said[num_given:] if token not in (PAD, END_OF_PAD)]
    assert tokens == list(itertools.chain(*WORDS))


def test_words_are_read_from_a_stream(tiny_moshi):
    tokenizer = load_tokenizer(find_checkpoint(str(tiny_moshi)))
    one, two = tokenizer.encode("hello"), tokenizer.encode("doctor's")
    tokens = [3, 0, *one, 3, 3, two[0], 3, *two[1:], 2, 3]
    first, second = words_in(tokens, tokenizer, {0, 3})
    assert first == {"word": "hello", "start_s": 0.16}
    assert second == {"word": "doctor's", "start_s": (2 + len(one) + 2) / 12.5}
    assert words_in([3, 3, 2], tokenizer, {0, 3}) == []


def test_a_mark_that_stands_alone_belongs_to_the_word_before(tiny_moshi):
    tokenizer = load_tokenizer(find_checkpoint(str(tiny_moshi)))
    tokens = [*tokenizer.encode("hello"), 3, *tokenizer.encode("--"), *tokenizer.encode("door")]
    assert [word["word"] for word in words_in(tokens, tokenizer, {0, 3})] == ["hello --", "door"]
