import pytest

from hf_csm.data.corpus import all_builders
from hf_csm.data.terms import CorpusTerms
from hf_csm.errors import UserError
from hf_csm.export.licences import Licence, check_licences, licence_of, licence_text, meaning, with_stated


BUILDERS = {builder.NAME: builder for builder in all_builders()}


def terms(name, license_=None, **more):
    """A corpus of ours by its name, or one of the user's own under `license_`."""
    if license_ is not None:
        return CorpusTerms(name, name.title(), license_, **more)
    builder = BUILDERS[name]
    return CorpusTerms(
        name, builder.TITLE, builder.LICENSE, builder.NOTICE, not_to_be_published=builder.NOT_TO_BE_PUBLISHED
    )


RAVDESS, CREMA_D, ESD, MSP = (terms(name) for name in ("ravdess", "crema_d", "esd", "msp_podcast"))
OWN = terms("own", "cc-by-4.0")
UNSTATED = terms("dialogues", "unknown", replay=True)


@pytest.mark.parametrize(
    ("corpora", "base", "expected"),
    [
        ([RAVDESS], None, "cc-by-nc-sa-4.0"),
        ([RAVDESS], "cc-by-4.0", "cc-by-nc-sa-4.0"),
        ([RAVDESS, CREMA_D], "cc-by-4.0", "cc-by-nc-sa-4.0"),
        ([RAVDESS, OWN], "apache-2.0", "cc-by-nc-sa-4.0"),
        ([RAVDESS], "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
        ([CREMA_D], None, "odbl"),
        ([CREMA_D], "cc-by-4.0", "cc-by-4.0"),
        ([OWN], "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ([terms("a", "cc-by-3.0"), terms("b", "mit")], None, "cc-by-3.0"),
        ([terms("a", "cc-by-sa-4.0"), OWN], None, "cc-by-sa-4.0"),
        ([terms("a", "cc0-1.0")], "other", "cc0-1.0"),
    ],
)
def test_the_strictest_licence_that_takes_the_others_holds(corpora, base, expected):
    assert licence_of(corpora, base) == Licence(expected)


@pytest.mark.parametrize(
    ("corpora", "name"),
    [
        ([ESD], "esd-terms"),
        ([MSP, RAVDESS], "cc-by-nc-sa-4.0-and-msp_podcast-terms"),
        ([RAVDESS, terms("talk", "cc-by-sa-4.0")], "cc-by-nc-sa-4.0-and-cc-by-sa-4.0"),
        ([terms("a", "cc-by-nc-4.0"), terms("talk", "cc-by-sa-4.0")], "cc-by-nc-4.0-and-cc-by-sa-4.0"),
        ([terms("a", "gpl-3.0"), RAVDESS], "cc-by-nc-sa-4.0-and-gpl-3.0"),
        ([UNSTATED, OWN], "cc-by-4.0-and-dialogues-terms"),
        ([], "unstated"),
    ],
)
def test_terms_that_no_licence_says_together_have_a_name_and_a_file(corpora, name):
    licence = licence_of(corpora)
    assert licence == Licence("other", name, "LICENSE.md")
    text = licence_text(corpora, licence, "kyutai/moshiko", "cc-by-4.0")
    assert name in text and "**kyutai/moshiko**, the base model: cc-by-4.0" in text
    for corpus in corpora:
        assert f"**{corpus.title}**: {corpus.license}" in text and corpus.notice in text


def test_what_may_be_published_is_let_through():
    check_licences([RAVDESS, CREMA_D, OWN, terms("free", "cc0-1.0")], "ann/x", private=False)
    check_licences([terms("talk", "cc-by-sa-4.0"), OWN], "ann/x", private=False)


REFUSED = [
    ([], "nothing says whose speech", "corpora.json"),
    ([RAVDESS, ESD], "learned from ESD, and its authors give it", "--terms-allow esd"),
    ([MSP], "learned from MSP-Podcast, and the licence signed", "--terms-allow msp_podcast"),
    ([RAVDESS, UNSTATED], "learned from Dialogues, whose licence nobody has stated", "--license-of dialogues=ID"),
    ([terms("own", "other")], "nobody has stated", "--license-of own=ID"),
    ([terms("own", "")], "nobody has stated", "--license-of own=ID"),
    ([terms("own", "cc-by-nd-4.0")], "under cc-by-nd-4.0: what is made of it may not", "--private"),
    ([terms("own", "cc-by-nc-nd-4.0")], "under cc-by-nc-nd-4.0", "--private"),
    (
        [terms("talk", "cc-by-sa-4.0"), RAVDESS],
        "Talk asks that what is made of it is under cc-by-sa-4.0; RAVDESS",
        "--terms-allow talk",
    ),
    ([RAVDESS, terms("a", "gpl-3.0")], "under cc-by-nc-sa-4.0; A", "--terms-allow ravdess"),
]


@pytest.mark.parametrize(("corpora", "problem", "remedy"), REFUSED)
def test_what_would_break_a_licence_is_refused_in_public(corpora, problem, remedy):
    with pytest.raises(UserError) as error:
        check_licences(corpora, "ann/moshiko-happy", private=False)
    assert error.value.problem.startswith("ann/moshiko-happy: ")
    assert problem in error.value.problem and remedy in error.value.remedy and "--private" in error.value.remedy
    assert "\n" not in error.value.problem + error.value.remedy


@pytest.mark.parametrize("corpora", [corpora for corpora, _, _ in REFUSED])
def test_nothing_is_refused_in_private(corpora):
    check_licences(corpora, "ann/x", private=True)


def test_who_has_read_the_terms_may_say_so_of_each_corpus():
    check_licences([ESD, RAVDESS], "ann/x", private=False, cleared=["esd"])
    with pytest.raises(UserError, match="MSP-Podcast"):
        check_licences([ESD, MSP], "ann/x", private=False, cleared=["esd"])
    with pytest.raises(UserError, match="nobody has stated"):
        check_licences([UNSTATED], "ann/x", private=False, cleared=["dialogues"])
    check_licences([RAVDESS, terms("talk", "cc-by-sa-4.0")], "ann/x", private=False, cleared=["talk"])


def test_a_licence_that_nobody_stated_can_be_stated():
    stated = with_stated([RAVDESS, UNSTATED], {"dialogues": "cc-by-4.0"})
    assert [corpus.license for corpus in stated] == ["cc-by-nc-sa-4.0", "cc-by-4.0"]
    assert with_stated([RAVDESS, UNSTATED], {}) == [RAVDESS, UNSTATED]


@pytest.mark.parametrize(
    ("corpus", "problem", "remedy"),
    [
        ("ravdess", "ravdess was stated as mit, but it is cc-by-nc-sa-4.0", "for dialogues"),
        ("esd", "esd was stated as mit, but it is other", "for dialogues"),
        ("typo", "typo was stated as mit, but the adapter was not trained on that", "for dialogues"),
    ],
)
def test_a_licence_that_is_known_cannot_be_stated_otherwise(corpus, problem, remedy):
    with pytest.raises(UserError) as error:
        with_stated([RAVDESS, ESD, UNSTATED], {corpus: "mit"})
    assert problem in error.value.problem and remedy in error.value.remedy


@pytest.mark.parametrize(
    ("corpus", "parts"),
    [
        (RAVDESS, ["Name its authors", "no commercial use", "under the same licence"]),
        (CREMA_D, ["Keep its notice", "Databases made of it are shared alike"]),
        (ESD, ["Not to be passed on", "sign a form", "none of its audio"]),
        (MSP, ["Not to be passed on", "prohibits distribution"]),
        (OWN, ["Name its authors and say what was changed."]),
        (terms("a", "cc-by-nd-4.0"), ["do not pass on"]),
        (terms("a", "mit"), ["terms are those of mit"]),
        (UNSTATED, ["Nobody has stated its terms"]),
    ],
)
def test_what_a_corpus_asks_is_said_in_words(corpus, parts):
    for part in parts:
        assert part in meaning(corpus)
