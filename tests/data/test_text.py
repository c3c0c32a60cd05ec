import pytest

from hf_csm.data.text import normalize_text, split_words
from hf_csm.errors import UserError


def test_white_space_and_unicode_are_normalized():
    assert normalize_text("\ufeff  Cafe\u0301 \t\n au lait ", "clip") == "Caf\u00e9 au lait"


@pytest.mark.parametrize("text", ["", "  \n", "...", "\u200b"])
def test_a_transcript_without_words_is_an_error(text):
    with pytest.raises(UserError, match="clip"):
        normalize_text(text, "clip")


def test_words_keep_their_punctuation():
    assert split_words("Dogs are - oh! - by the door.") == ["Dogs", "are -", "oh! -", "by", "the", "door."]


def test_an_opening_mark_joins_the_next_word():
    assert split_words("- Yes, it is") == ["- Yes,", "it", "is"]


def test_chinese_is_split_by_character():
    assert split_words("打远一看，它们。") == ["打", "远", "一", "看，", "它", "们。"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("“打远一看”", ["“打", "远", "一", "看”"]),
        ("“ 打远", ["“ 打", "远"]),
        ("- “打", ["- “打"]),
    ],
)
def test_a_mark_joins_its_word_with_the_space_that_the_text_has(text, words):
    assert split_words(text) == words
