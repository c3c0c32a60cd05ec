import pytest

from hf_csm.corpora import all_builders
from hf_csm.errors import UserError
from hf_csm.mixture.provenance import CorpusTerms
from hf_csm.publish.licenses import (
    License,
    base_terms,
    check_card_values,
    check_licenses,
    license_of,
    license_text,
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
def test_the_strictest_license_that_covers_the_others_applies(corpora, base, expected):
    assert license_of(corpora, base) == License(expected)


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
def test_terms_without_a_common_license_have_a_name_and_a_file(corpora, name):
    license = license_of(corpora, "mit")
    assert license == License("other", name, "LICENSE.md")
    text = license_text(corpora, license, "kyutai/moshiko", "cc-by-4.0")
    assert name in text and "**kyutai/moshiko**, the base model: cc-by-4.0" in text
    for corpus in corpora:
        assert f"**{corpus.title}**: {corpus.license}" in text and corpus.notice in text


@pytest.mark.parametrize("base", [None, "other", "somebody's own", "unknown"])
def test_unknown_terms_of_the_base_are_part_of_the_license(base):
    expected = License("other", "base-model-terms-and-cc-by-nc-sa-4.0", "LICENSE.md")
    assert license_of([RAVDESS, CREMA_D], base) == expected


def test_license_names_are_valid_on_the_hub():
    license = license_of([terms("My own Voices!", "unknown")], "mit")
    assert license.name == "my-own-voices-terms"


@pytest.mark.parametrize(
    ("corpora", "base", "problem"),
    [
        ([RAVDESS], "cc-by-nd-4.0", "kyutai/x is under cc-by-nd-4.0"),
        ([OWN], "CC-BY-NC-ND-4.0", "the base model kyutai/x is under cc-by-nc-nd-4.0"),
        ([OWN], "mit, cc-by-nc-nd-4.0", "the base model kyutai/x is under cc-by-nc-nd-4.0"),
        ([RAVDESS], "cc-by-sa-4.0", "RAVDESS requires .*; the base model kyutai/x"),
        ([RAVDESS], "gpl-3.0", "the base model kyutai/x, .* does not allow"),
        ([terms("talk", "cc-by-nc-4.0")], "gpl-3.0", "the base model kyutai/x requires .* under gpl-3.0; Talk"),
    ],
)
def test_the_license_of_the_base_counts(corpora, base, problem):
    of_base = base_terms("kyutai/x", base)
    with pytest.raises(UserError, match=problem) as error:
        check_licenses(corpora, "ann/x", private=False, base=of_base)
    assert "--private" in error.value.remedy
    check_licenses(corpora, "ann/x", private=True, base=of_base)


@pytest.mark.parametrize("base", [None, "other", "cc-by-4.0", "mit, apache-2.0", "cc-by-nc-sa-4.0"])
def test_permissive_or_unknown_bases_are_accepted(base):
    check_licenses([RAVDESS, CREMA_D], "ann/x", private=False, base=base_terms("kyutai/x", base))


SPELLINGS = ["CC-BY-NC-ND-4.0", "cc-by-nc-nd", "cc-by-nc-nd-2.5-ch", "CC BY-ND 4.0", " cc-by-nd-4.0 ", "cc_by_nd"]


@pytest.mark.parametrize("license", SPELLINGS)
def test_clauses_are_recognized_in_any_spelling(license):
    with pytest.raises(UserError, match="may not be distributed"):
        check_licenses([terms("own", license)], "ann/x", private=False)


@pytest.mark.parametrize("license", ["foo", "cc-by", "Apache 2", "mit, foo"])
def test_an_unknown_license_id_is_refused(license):
    with pytest.raises(UserError, match="no license id") as error:
        check_licenses([terms("own", license)], "ann/x", private=False)
    assert "--license-of own=ID" in error.value.remedy
    with pytest.raises(UserError, match="no license id") as error:
        with_stated([UNSTATED], {"dialogues": license})
    assert "repositories-licenses" in error.value.remedy


def test_a_license_given_for_an_unknown_id_must_keep_its_clauses():
    vague = terms("own", "CC BY-NC-SA")
    assert with_stated([vague], {"own": "cc-by-nc-sa-4.0"})[0].license == "cc-by-nc-sa-4.0"
    with pytest.raises(UserError, match="is not cc by-nc-sa"):
        with_stated([vague], {"own": "mit"})


def test_terms_allow_takes_only_corpora_of_the_training_data():
    with pytest.raises(UserError, match="--terms-allow names nonsense") as error:
        check_licenses([ESD, RAVDESS], "ann/x", private=True, cleared=["esd", "nonsense"])
    assert error.value.remedy == "--terms-allow takes esd, ravdess, base-model."


def test_a_language_without_iso_code_is_refused():
    check_card_values([terms("own", "mit", languages=["en", "gsw"])], "ann/x")
    with pytest.raises(UserError, match="'English'.* no language code") as error:
        check_card_values([terms("own", "mit", languages=["English"])], "ann/x")
    assert "ISO 639" in error.value.remedy and "corpora.json" in error.value.remedy


def test_publishable_corpora_are_accepted():
    check_licenses([RAVDESS, CREMA_D, OWN, terms("free", "cc0-1.0")], "ann/x", private=False)
    check_licenses([terms("talk", "cc-by-sa-4.0"), OWN], "ann/x", private=False)


REFUSED = [
    ([], "training data are unknown", "corpora.json"),
    ([RAVDESS, ESD], "trained on ESD, and its authors", "--terms-allow esd"),
    ([MSP], "trained on MSP-Podcast, and the", "--terms-allow msp_podcast"),
    ([RAVDESS, UNSTATED], "trained on Dialogues, whose license is not stated", "--license-of dialogues=ID"),
    ([terms("own", "other")], "license is not stated", "--license-of own=ID"),
    ([terms("own", "")], "license is not stated", "--license-of own=ID"),
    ([terms("own", "cc-by-nd-4.0")], "under cc-by-nd-4.0: derived material", "--private"),
    ([terms("own", "cc-by-nc-nd-4.0")], "under cc-by-nc-nd-4.0", "--private"),
    (
        [terms("talk", "cc-by-sa-4.0"), RAVDESS],
        "Talk requires derived material to be under cc-by-sa-4.0; RAVDESS",
        "--terms-allow talk",
    ),
    ([RAVDESS, terms("a", "gpl-3.0")], "under cc-by-nc-sa-4.0; A", "--terms-allow ravdess"),
]


@pytest.mark.parametrize(("corpora", "problem", "remedy"), REFUSED)
def test_license_violations_are_refused_for_public_repositories(corpora, problem, remedy):
    with pytest.raises(UserError) as error:
        check_licenses(corpora, "ann/moshiko-happy", private=False)
    assert error.value.problem.startswith("ann/moshiko-happy: ")
    assert problem in error.value.problem and remedy in error.value.remedy and "--private" in error.value.remedy
    assert "\n" not in error.value.problem + error.value.remedy


@pytest.mark.parametrize("corpora", [corpora for corpora, _, _ in REFUSED])
def test_nothing_is_refused_for_private_repositories(corpora):
    check_licenses(corpora, "ann/x", private=True)


def test_the_user_may_clear_signed_terms_by_corpus():
    check_licenses([ESD, RAVDESS], "ann/x", private=False, cleared=["esd"])
    with pytest.raises(UserError, match="MSP-Podcast"):
        check_licenses([ESD, MSP], "ann/x", private=False, cleared=["esd"])
    with pytest.raises(UserError, match="license is not stated"):
        check_licenses([UNSTATED], "ann/x", private=False, cleared=["dialogues"])
    check_licenses([RAVDESS, terms("talk", "cc-by-sa-4.0")], "ann/x", private=False, cleared=["talk"])


def test_a_missing_license_can_be_given():
    stated = with_stated([RAVDESS, UNSTATED], {"dialogues": "cc-by-4.0"})
    assert [corpus.license for corpus in stated] == ["cc-by-nc-sa-4.0", "cc-by-4.0"]
    assert with_stated([RAVDESS, UNSTATED], {}) == [RAVDESS, UNSTATED]


@pytest.mark.parametrize(
    ("corpus", "problem", "remedy"),
    [
        ("ravdess", "for ravdess, but it is cc-by-nc-sa-4.0", "for dialogues"),
        ("esd", "for esd, but it is other", "for dialogues"),
        ("typo", "for typo, but the adapter was not trained on that", "for dialogues"),
    ],
)
def test_a_known_license_cannot_be_overridden(corpus, problem, remedy):
    with pytest.raises(UserError) as error:
        with_stated([RAVDESS, ESD, UNSTATED], {corpus: "mit"})
    assert problem in error.value.problem and remedy in error.value.remedy


@pytest.mark.parametrize(
    ("corpus", "parts"),
    [
        (RAVDESS, ["Attribute its authors", "no commercial use", "under the same license"]),
        (CREMA_D, ["Keep its notice", "Derived databases are shared alike"]),
        (ESD, ["Not for distribution", "sign a form", "none of its audio"]),
        (MSP, ["Not for distribution", "prohibits distribution"]),
        (OWN, ["Attribute its authors and state changes."]),
        (terms("a", "cc-by-nd-4.0"), ["do not distribute"]),
        (terms("a", "mit"), ["terms are those of mit"]),
        (UNSTATED, ["Terms not stated"]),
    ],
)
def test_the_conditions_of_a_corpus_are_explained(corpus, parts):
    for part in parts:
        assert part in meaning(corpus)
