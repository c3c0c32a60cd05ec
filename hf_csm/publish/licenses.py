"""What the terms of the corpora mean for an adapter that learned from them: its licence, and when it is not published.

Whether weights are a work derived from the recordings they were trained on is not settled. hf-csm decides for caution:
an adapter is passed on as if it were made of its corpora. What a licence asks of material made from it, such as not to
be sold, or to be shared alike, is asked of the adapter too. What the Open Database License asks of databases only is
not, since an adapter is none: its notice goes along. That is a decision of this project and no legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from hf_csm.errors import UserError
from hf_csm.mixture.provenance import LANGUAGE, LICENSES, UNSTATED, CorpusTerms, licence_id


UNSTATED_LICENSES = ("", "other", UNSTATED)
LICENCE_FILE = "LICENSE.md"
"""Holds all terms where the Hub has no name for them together."""
PERMISSIVE = frozenset(
    ("apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0", "cdla-permissive-1.0")
    + ("cdla-permissive-2.0", "mit", "odbl", "odc-by", "pddl", "unlicense", "wtfpl")
)
"""What is made of material under these may be passed on under other terms, with their notice."""
COPYLEFT = frozenset(
    ("agpl-3.0", "cdla-sharing-1.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "osl-3.0")
)
"""What is made of material under these is shared alike, as with Creative Commons' `sa`."""
BASE = "base-model"
"""Stands for the base model among the corpora: its licence is asked of the adapter too."""
_SUCH = "such as cc-by-4.0"
_CLAUSES = {
    "by": "name its authors and say what was changed",
    "nc": "no commercial use",
    "sa": "pass on what is made of it under the same licence",
    "nd": "do not pass on what is made of it",
}


@dataclass(frozen=True)
class Licence:
    """A licence as a model card states it.

    Attributes:
        id: of the Hub; `other` where several terms hold at once or the Hub does not know them.
        name: of these terms, for `other`.
        link: where they are, for `other`.
    """

    id: str
    name: str | None = None
    link: str | None = None


def with_stated(corpora: Sequence[CorpusTerms], stated: Mapping[str, str]) -> list[CorpusTerms]:
    """Return the corpora with the licences that a user states for those that have none.

    Args:
        stated: licence id of the Hub by corpus.

    Raises:
        UserError: no such corpus, or one whose terms are known.
    """
    open_ones = [terms.corpus for terms in corpora if _is_unstated(terms)]
    for corpus, licence in stated.items():
        known = next((terms for terms in corpora if terms.corpus == corpus), None)
        if corpus not in open_ones or known is None:
            raise UserError(
                f"The licence of {corpus} was stated as {licence}, but "
                + (f"it is {known.license}." if known else "the adapter was not trained on that."),
                f"State it for {', '.join(open_ones)}." if open_ones else "Leave it out: all licences are known.",
            )
        if not _is_known(licence_id(licence)) or not set(_clauses(known.license)) <= set(
            _clauses(licence_id(licence))
        ):
            raise UserError(
                f"The licence of {corpus} was stated as {licence}, "
                + (
                    "which is no licence id of the Hub." if not _clauses(known.license) else f"not as {known.license}."
                ),
                f"Give the id that the Hub has for it, {_SUCH}; https://huggingface.co/docs/hub/repositories-licenses "
                "lists them.",
            )
    return [replace(t, license=stated[t.corpus]) if t.corpus in stated else t for t in corpora]


def base_terms(base_model: str, base_license: str | None) -> list[CorpusTerms]:
    """Return the terms of the base model, one for each licence that its card states."""
    licences = (base_license or UNSTATED).split(", ")
    return [CorpusTerms(BASE, f"the base model {base_model}", licence) for licence in licences]


def check_card_values(corpora: Sequence[CorpusTerms], repo_id: str) -> None:
    """Check what the Hub would refuse in the card of an adapter, before anything is made.

    Raises:
        UserError: a language is none of the Hub's.
    """
    for terms in corpora:
        for language in terms.languages:
            if not LANGUAGE.fullmatch(language):
                raise UserError(
                    f"{repo_id}: the adapter learned from {terms.title} in the language {language!r}, which the Hub "
                    "does not know.",
                    "Write its ISO 639 code, such as en, in the run's corpora.json, or before training in the corpus.",
                )


def check_licences(
    corpora: Sequence[CorpusTerms],
    repo_id: str,
    *,
    private: bool,
    cleared: Collection[str] = (),
    base: Sequence[CorpusTerms] = (),
) -> None:
    """Check that nothing which is known of the corpora speaks against publishing an adapter trained on them.

    Args:
        private: the repository is; then nothing is published, and nothing is refused.
        cleared: corpora whose terms the user has read and found to allow it, where nobody else can read them.
        base: terms of the base model, which need not be stated.

    Raises:
        UserError: `cleared` names what was not trained on, or the repository is public, and it is not known what was
            trained on, or on what terms, or the terms are against it, or are known only to those who signed them.
    """
    names = [terms.corpus for terms in corpora] + [BASE]
    for name in cleared:
        if name not in names:
            raise UserError(
                f"The terms of {name} were said to allow it, but the adapter was not trained on that.",
                f"--terms-allow takes {', '.join(dict.fromkeys(names))}.",
            )
    if private:
        return
    if not corpora:
        raise UserError(
            f"{repo_id}: nothing says whose speech the adapter learned from, so a public card cannot state its terms.",
            "Push from the run's folder, where training wrote corpora.json, or push with --private.",
        )
    for terms in corpora:
        if terms.not_to_be_published and terms.corpus not in cleared:
            raise UserError(
                f"{repo_id}: the adapter learned from {terms.title}, and {terms.not_to_be_published}.",
                f"Push with --private; or, if the terms that you signed let such models be published, add "
                f"--terms-allow {terms.corpus}.",
            )
        _check_derivable(terms, repo_id, "train without that corpus")
        if _is_unstated(terms):
            of_whom = "whose licence nobody has stated"
            if terms.license not in UNSTATED_LICENSES:
                of_whom = f"under {terms.license}, which is no licence id of the Hub"
            raise UserError(
                f"{repo_id}: the adapter learned from {terms.title}, {of_whom}.",
                f"State it with --license-of {terms.corpus}=ID ({_SUCH}), or push with --private.",
            )
    for terms in base:
        _check_derivable(terms, repo_id, "train on another base model")
    _check_share_alike([terms for terms in (*corpora, *base) if terms.corpus not in cleared], repo_id)


def _check_derivable(terms: CorpusTerms, repo_id: str, remedy: str) -> None:
    if "nd" in _clauses(terms.license):
        source = f"is made with {terms.title}" if terms.corpus == BASE else f"learned from {terms.title}"
        raise UserError(
            f"{repo_id}: the adapter {source}, under {terms.license}: what is made of it may not be passed on.",
            f"Push with --private, or {remedy}.",
        )


def licence_of(corpora: Sequence[CorpusTerms], base_license: str | None = None) -> Licence:
    """Return the licence of a model: the strictest of all, if what is under the others may be passed on under it.

    Args:
        base_license: that the card of the base model states, several with commas between; None if it states none.
    """
    if not corpora:
        return Licence("other", "unstated", LICENCE_FILE)
    ids = {_id_of(terms) for terms in (*corpora, *base_terms("", base_license))}
    named = sorted(ids, key=lambda id_: (len(_clauses(id_)), id_), reverse=True)
    for strictest in named:
        if strictest in LICENSES and all(_fits_under(other, strictest) for other in named):
            return Licence(strictest)
    kept = [id_ for id_ in ids if not any(_fits_under(id_, other) for other in ids - {id_})]
    return Licence("other", "-and-".join(sorted(kept or ids)), LICENCE_FILE)


def _check_share_alike(all_terms: Sequence[CorpusTerms], repo_id: str) -> None:
    for terms in all_terms:
        for other in all_terms:
            if not _shares_alike(terms.license) or _fits_under(other.license, terms.license):
                continue
            if other.corpus == BASE and _is_unstated(other):  # its page has more than an id
                continue
            raise UserError(
                f"{repo_id}: {terms.title} asks that what is made of it is under {terms.license}; {other.title}, "
                f"which the adapter is made with too, under {other.license}, does not allow that.",
                f"Push with --private, train without one of them, or if you have leave, add --terms-allow "
                f"{terms.corpus}.",
            )


def meaning(terms: CorpusTerms) -> str:
    """Say in a sentence what a corpus's terms ask of an adapter that was trained on it."""
    clauses = _clauses(terms.license)
    if terms.not_to_be_published:
        return (
            f"Not to be passed on: {terms.not_to_be_published}. The adapter holds none of its audio, codes, texts or "
            "labels; whether it may be used or passed on is for those to say who read the terms."
        )
    if clauses:
        return f"{'; '.join(_CLAUSES[clause] for clause in clauses)}.".capitalize()
    if terms.license == "odbl":
        return (
            "Keep its notice. Databases made of it are shared alike; an adapter is taken for something made with the "
            "database, and is none."
        )
    if _is_unstated(terms):
        return "Nobody has stated its terms: ask its owner before you use or pass on the adapter."
    return f"Keep its notice; the terms are those of {terms.license}."


def licence_text(corpora: Sequence[CorpusTerms], licence: Licence, base_model: str, base_license: str | None) -> str:
    """Return the file with all terms, for a model that no single licence describes."""
    lines = [
        "# Terms of this model",
        "",
        f"No licence of the Hub describes them together; the model is under all of these at once ({licence.name}).",
        "Use it, and pass it on, only as all of them allow.",
        "",
        f"- **{base_model}**, the base model: {base_license or 'licence not stated; see its page'}.",
    ]
    lines += [f"- **{t.title}**: {t.license}. {meaning(t)} {t.notice}".rstrip() for t in corpora]
    return "\n".join(lines) + "\n"


def slug(name: str) -> str:
    """Return a name as the Hub takes it for a licence or a dataset: lower case, without spaces."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "unnamed"


def _is_known(licence: str) -> bool:
    return licence in LICENSES and licence not in UNSTATED_LICENSES


def _is_unstated(terms: CorpusTerms) -> bool:
    return not _is_known(terms.license) and not terms.not_to_be_published


def _id_of(terms: CorpusTerms) -> str:
    return terms.license if _is_known(terms.license) else f"{slug(terms.corpus)}-terms"


def _clauses(license_: str) -> list[str]:
    """Return the parts of a Creative Commons licence, such as by, nc, sa, however it is spelt; nothing for others."""
    words = re.split(r"[^a-z0-9]+", license_.lower())
    return [word for word in words if word in _CLAUSES] if {"cc", "creativecommons"} & set(words) else []


def _shares_alike(license_: str) -> bool:
    return "sa" in _clauses(license_) or license_ in COPYLEFT


def _fits_under(own: str, other: str) -> bool:
    """Say whether what is made of material under `own` may be under `other`."""
    clauses = _clauses(own)
    is_open = bool(clauses) and not {"sa", "nd"} & set(clauses) and set(clauses) <= set(_clauses(other))
    return own == other or own in PERMISSIVE or is_open or (clauses == ["by"] and other in COPYLEFT)
