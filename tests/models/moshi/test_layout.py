import numpy as np
import pytest

from hf_csm.errors import UserError
from hf_csm.models.family import Layout
from hf_csm.models.moshi.layout import lay_out, text_stream


PAD, END = 3, 0
LAYOUT = Layout(
    delays=(0, 0, 1, 0, 1),
    num_predicted_codebooks=2,
    num_user_codebooks=2,
    text_padding_id=PAD,
    end_of_text_padding_id=END,
    text_card=100,
    card=8,
)


def tokenize(text):
    """One token for each letter: a = 10, b = 11, ..."""
    return [ord(letter) - ord("a") + 10 for letter in text]


def word(text, start_s, channel=0):
    return {"word": text, "start_s": start_s, "end_s": start_s + 0.1, "channel": channel}


def row(num_frames=6, words=(), first_turn_s=0.4, num_codebooks=4):
    codes = np.arange(2 * num_codebooks * num_frames).reshape(2, num_codebooks, num_frames) % 8
    turns = [{"clip_id": "x", "channel": 0, "start_s": first_turn_s, "end_s": 9.0}]
    return {"id": "w", "codes": codes.astype(np.int16), "words": list(words), "turns": turns}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [PAD] * 6),
        ([("a", 0.0)], [10, PAD, PAD, PAD, PAD, PAD]),
        ([("a", 0.0), ("bc", 0.24)], [10, PAD, END, 11, 12, PAD]),
        ([("a", 0.08)], [END, 10, PAD, PAD, PAD, PAD]),
        ([("a", 0.159)], [END, 10, PAD, PAD, PAD, PAD]),
        # back to back: no padding between them, so none is marked as ending
        ([("ab", 0.08), ("c", 0.24)], [END, 10, 11, 12, PAD, PAD]),
        # a long word keeps its tokens and the next waits
        ([("abc", 0.0), ("d", 0.08)], [10, 11, 12, 13, PAD, PAD]),
        # two words in one frame
        ([("a", 0.16), ("b", 0.2)], [PAD, END, 10, 11, PAD, PAD]),
        # cut at the end of the window, not wrapped
        ([("abc", 0.40)], [PAD, PAD, PAD, PAD, END, 10]),
        ([("a", 0.48)], [PAD] * 6),
    ],
)
def test_text_stream_puts_tokens_where_their_word_begins(words, expected):
    stream = text_stream([word(*item) for item in words], 6, tokenize, LAYOUT)
    assert stream.tolist() == expected


def test_streams_are_text_then_moshi_then_the_user():
    window = lay_out(row(words=[word("a", 0.4)]), LAYOUT, tokenize)
    codes = row()["codes"]
    assert window.codes.shape == (5, 6)
    assert window.codes[0].tolist() == [PAD, PAD, PAD, PAD, END, 10]
    np.testing.assert_array_equal(window.codes[1:3], codes[0, :2])
    np.testing.assert_array_equal(window.codes[3:5], codes[1, :2])


def test_the_users_words_are_not_in_moshis_monologue():
    window = lay_out(row(words=[word("a", 0.1, channel=1)]), LAYOUT, tokenize)
    assert set(window.codes[0].tolist()) == {PAD}


def test_the_prefix_is_given_in_the_first_frames():
    window = lay_out(row(words=[word("a", 0.4)]), LAYOUT, tokenize, prefix="xy")
    assert window.num_given == 2
    assert window.codes[0].tolist() == [33, 34, PAD, PAD, END, 10]


def test_without_prefix_every_frame_is_predicted():
    assert lay_out(row(), LAYOUT, tokenize).num_given == 0


def test_a_prefix_longer_than_the_lead_in_is_refused():
    with pytest.raises(UserError, match=r"5 frames.* window w .* 5"):
        lay_out(row(), LAYOUT, tokenize, prefix="abcde")


def test_too_few_codebooks_are_refused():
    with pytest.raises(UserError, match=r"needs \[2, 2 or more, T\]"):
        lay_out(row(num_codebooks=1), LAYOUT, tokenize)


def test_a_window_is_cut_at_max_frames():
    window = lay_out(row(words=[word("a", 0.4)]), LAYOUT, tokenize, max_frames=3)
    assert window.codes.shape == (5, 3)


def test_tokens_are_never_lost_while_the_window_has_room():
    rng = np.random.default_rng(0)
    for _ in range(200):
        starts = np.sort(rng.uniform(0, 4, size=8))
        words = [word("abc"[: rng.integers(1, 4)], start) for start in starts]
        stream = text_stream(words, 100, tokenize, LAYOUT)
        spoken = [token for token in stream.tolist() if token not in (PAD, END)]
        assert spoken == [token for item in words for token in tokenize(item["word"])]
        for item in words:
            first = int(item["start_s"] / 0.08)
            assert PAD not in stream[first : first + 1]  # a word's own frame is never plain padding
