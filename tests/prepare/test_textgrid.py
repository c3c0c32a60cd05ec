import pytest

from hf_csm.errors import UserError
from hf_csm.prepare.textgrid import place_words, read_words


LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1.5
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 1.5
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 1.5
            text = "AH0"
    item [2]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1.5
        intervals: size = 4
        intervals [1]:
            xmin = 0
            xmax = 0.25
            text = ""
        intervals [2]:
            xmin = 0.25
            xmax = 0.75
            text = "\"\"say\"\""
        intervals [3]:
            xmin = 0.75
            xmax = 1
            text = "sp"
        intervals [4]:
            xmin = 1
            xmax = 1.5
            text = "café"
"""
SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

0
1.5
<exists>
2
"IntervalTier"
"phones"
0
1.5
1
0
1.5
"AH0"
"IntervalTier"
"words"
0
1.5
4
0
0.25
""
0.25
0.75
"\"\"say\"\""
0.75
1
"sp"
1
1.5
"café"
"""
WORDS = (('"say"', 0.25, 0.75), ("café", 1.0, 1.5))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("text", [LONG, SHORT, SHORT.rstrip(), LONG.replace("\n", "\r\n")])
def test_both_formats_in_all_encodings_give_the_same_words(text, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    assert read_words((mark + text).encode(encoding), "a.TextGrid") == WORDS


@pytest.mark.parametrize("name", ["words", "Words", "word", "WORD", "speaker 12 - words"])
def test_the_word_tier_is_found_by_name(name):
    assert read_words(LONG.replace('"words"', f'"{name}"').encode(), "a.TextGrid") == WORDS


def test_without_a_word_tier_the_first_interval_tier_is_used():
    assert read_words(LONG.replace('"words"', '"Mary"').encode(), "a.TextGrid") == (("AH0", 0.0, 1.5),)
    points = SHORT.replace(
        '"IntervalTier"\n"phones"\n0\n1.5\n1\n0\n1.5\n"AH0"', '"TextTier"\n"x"\n0\n1.5\n1\n0.5\n"a"'
    )
    assert read_words(points.replace('"words"', '"Mary"').encode(), "a.TextGrid") == WORDS


@pytest.mark.parametrize("silence", ["", "sil", "SIL", "sp", "spn", "<eps>"])
def test_silences_are_not_words(silence):
    assert read_words(LONG.replace('"""say"""', f'"{silence}"').encode(), "a.TextGrid") == WORDS[1:]


@pytest.mark.parametrize("text", [LONG, SHORT])
def test_a_truncated_file_is_an_error(text):
    for num_characters in range(len(text.rstrip())):
        with pytest.raises(UserError, match=r"^a\.TextGrid.* cannot be read"):
            read_words(text[:num_characters].encode(), "a.TextGrid")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xff\xff" + LONG.encode(), id="encoding"),
        pytest.param(b"{}", id="json"),
        pytest.param(b"12", id="a number"),
        pytest.param(LONG.replace("xmin = 0.25", "xmin = soon").encode(), id="no time"),
        pytest.param(SHORT.replace("0.25\n0.75", "soon\n0.75").encode(), id="no time, short"),
        pytest.param(LONG.replace("xmax = 0.75", "xmax = 0.1").encode(), id="ends before it starts"),
        pytest.param(LONG.replace("xmin = 1\n", "xmin = 0.3\n").encode(), id="overlaps"),
        pytest.param(LONG.replace('"café"', '"""café""').encode(), id="a label without end"),
        pytest.param(LONG.replace("size = 4", "size = 5").encode(), id="an interval too few"),
        pytest.param(LONG.replace("size = 2", "size = 3").encode(), id="a tier too few"),
        pytest.param(LONG.replace("IntervalTier", "TextTier").encode(), id="only points"),
    ],
)
def test_a_damaged_file_is_an_error_of_two_lines_that_names_it(content):
    with pytest.raises(UserError, match=r"^a\.TextGrid: the TextGrid") as error:
        read_words(content, "a.TextGrid")
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("transcript", "heard", "placed"),
    [
        (["Say", "it."], ["say", "it"], [("Say", 0, 1), ("it.", 1, 2)]),
        (["Well-known,", "Zyx!"], ["well", "known", "<unk>"], [("Well-known,", 0, 2), ("Zyx!", 2, 3)]),
        (["Don't"], ["do", "n't"], [("Don't", 0, 2)]),
        (["Zyx"], ["<UNK>"], [("Zyx", 0, 1)]),
        (["say", "it"], ["say", "that"], None),
        (["say", "it"], ["say"], None),
        (["say"], ["say", "it"], None),
        (["saying"], ["say"], None),
        (["say"], [], None),
    ],
)
def test_words_of_a_transcript_get_times_only_if_they_match_the_aligned_words(transcript, heard, placed):
    timed = tuple((word, float(index), float(index + 1)) for index, word in enumerate(heard))
    assert place_words(transcript, timed) == (None if placed is None else tuple(placed))
