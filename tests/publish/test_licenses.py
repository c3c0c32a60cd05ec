import pytest

from hf_csm.corpora import all_builders
from hf_csm.errors import UserError
from hf_csm.mixture.provenance import CorpusTerms
from hf_csm.publish.licenses import (
    Licence,
    base_terms,
    check_card_values,
    check_licences,
    licence_of,
    licence_text,
    meaning,
    with_stated,
)


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
        ([RAVDESS], "mit", "cc-by-nc-sa-4.0"),
        ([RAVDESS], "cc-by-4.0", "cc-by-nc-sa-4.0"),
        ([RAVDESS, CREMA_D], "cc-by-4.0", "cc-by-nc-sa-4.0"),
        ([RAVDESS, OWN], "apache-2.0", "cc-by-nc-sa-4.0"),
        ([RAVDESS], "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
        ([CREMA_D], "odbl", "odbl"),
        ([CREMA_D], "cc-by-4.0", "cc-by-4.0"),
        ([OWN], "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ([terms("a", "cc-by-3.0"), terms("b", "mit")], "mit", "cc-by-3.0"),
        ([terms("a", "cc-by-sa-4.0"), OWN], "mit", "cc-by-sa-4.0"),
        ([terms("a", "CC-BY-4.0")], "mit, apache-2.0", "cc-by-4.0"),
        ([OWN], "gpl-3.0", "gpl-3.0"),
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
    licence = licence_of(corpora, "mit")
    assert licence == Licence("other", name, "LICENSE.md")
    text = licence_text(corpora, licence, "kyutai/moshiko", "cc-by-4.0")
    assert name in text and "**kyutai/moshiko**, the base model: cc-by-4.0" in text
    for corpus in corpora:
        assert f"**{corpus.title}**: {corpus.license}" in text and corpus.notice in text


@pytest.mark.parametrize("base", [None, "other", "somebody's own", "unknown"])
def test_a_base_whose_terms_have_no_id_leaves_them_in_the_licence(base):
    expected = Licence("other", "base-model-terms-and-cc-by-nc-sa-4.0", "LICENSE.md")
    assert licence_of([RAVDESS, CREMA_D], base) == expected


def test_names_of_licences_are_such_as_the_hub_takes():
    licence = licence_of([terms("My own Voices!", "unknown")], "mit")
    assert licence.name == "my-own-voices-terms"


@pytest.mark.parametrize(
    ("corpora", "base", "problem"),
    [
        ([RAVDESS], "cc-by-nd-4.0", "the base model kyutai/x, under cc-by-nd-4.0: what is made of it may not"),
        ([OWN], "CC-BY-NC-ND-4.0", "the base model kyutai/x, under cc-by-nc-nd-4.0"),
        ([OWN], "mit, cc-by-nc-nd-4.0", "the base model kyutai/x, under cc-by-nc-nd-4.0"),
        ([RAVDESS], "cc-by-sa-4.0", "RAVDESS asks .*; the base model kyutai/x"),
        ([RAVDESS], "gpl-3.0", "the base model kyutai/x, .* does not allow"),
        ([terms("talk", "cc-by-nc-4.0")], "gpl-3.0", "the base model kyutai/x asks that .* under gpl-3.0; Talk"),
    ],
)
def test_the_licence_of_the_base_counts_too(corpora, base, problem):
    of_base = base_terms("kyutai/x", base)
    with pytest.raises(UserError, match=problem) as error:
        check_licences(corpora, "ann/x", private=False, base=of_base)
    assert "--private" in error.value.remedy
    check_licences(corpora, "ann/x", private=True, base=of_base)


@pytest.mark.parametrize("base", [None, "other", "cc-by-4.0", "mit, apache-2.0", "cc-by-nc-sa-4.0"])
def test_bases_that_allow_it_or_say_nothing_stop_nobody(base):
    check_licences([RAVDESS, CREMA_D], "ann/x", private=False, base=base_terms("kyutai/x", base))


SPELT = ["CC-BY-NC-ND-4.0", "cc-by-nc-nd", "cc-by-nc-nd-2.5-ch", "CC BY-ND 4.0", " cc-by-nd-4.0 ", "cc_by_nd"]


@pytest.mark.parametrize("licence", SPELT)
def test_clauses_are_known_however_they_are_spelt(licence):
    with pytest.raises(UserError, match="what is made of it may not be passed on"):
        check_licences([terms("own", licence)], "ann/x", private=False)


@pytest.mark.parametrize("licence", ["foo", "cc-by", "Apache 2", "mit, foo"])
def test_a_licence_that_the_hub_does_not_know_is_refused(licence):
    with pytest.raises(UserError, match="which is no licence id of the Hub") as error:
        check_licences([terms("own", licence)], "ann/x", private=False)
    assert "--license-of own=ID" in error.value.remedy
    with pytest.raises(UserError, match="which is no licence id of the Hub") as error:
        with_stated([UNSTATED], {"dialogues": licence})
    assert "repositories-licenses" in error.value.remedy


def test_what_is_stated_for_a_licence_the_hub_does_not_know_keeps_its_clauses():
    vague = terms("own", "CC BY-NC-SA")
    assert with_stated([vague], {"own": "cc-by-nc-sa-4.0"})[0].license == "cc-by-nc-sa-4.0"
    with pytest.raises(UserError, match="stated as mit, not as cc by-nc-sa"):
        with_stated([vague], {"own": "mit"})


def test_terms_of_what_was_not_trained_on_are_not_read():
    with pytest.raises(UserError, match="The terms of nonsense") as error:
        check_licences([ESD, RAVDESS], "ann/x", private=True, cleared=["esd", "nonsense"])
    assert error.value.remedy == "--terms-allow takes esd, ravdess, base-model."


def test_a_language_that_the_hub_does_not_know_is_refused():
    check_card_values([terms("own", "mit", languages=["en", "gsw"])], "ann/x")
    with pytest.raises(UserError, match="'English', which the Hub does not know") as error:
        check_card_values([terms("own", "mit", languages=["English"])], "ann/x")
    assert "ISO 639" in error.value.remedy and "corpora.json" in error.value.remedy


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
