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

from hf_csm.data.terms import UNSTATED, CorpusTerms
from hf_csm.errors import UserError


UNSTATED_LICENSES = ("", "other", UNSTATED)
LICENCE_FILE = "LICENSE.md"
"""Holds all terms where the Hub has no name for them together."""
PERMISSIVE = frozenset(
    ("apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0", "cdla-permissive-1.0")
    + ("cdla-permissive-2.0", "mit", "odbl", "odc-by", "pddl", "unlicense", "wtfpl")
)
"""What is made of material under these may be passed on under other terms, with their notice."""
_CREATIVE_COMMONS = re.compile(r"cc-(by(?:-nc)?(?:-sa|-nd)?)-[\d.]+")
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
        if corpus not in open_ones:
            known = next((terms for terms in corpora if terms.corpus == corpus), None)
            raise UserError(
                f"The licence of {corpus} was stated as {licence}, but "
                + (f"it is {known.license}." if known else "the adapter was not trained on that."),
                f"State it for {', '.join(open_ones)}." if open_ones else "Leave it out: all licences are known.",
            )
    return [replace(t, license=stated[t.corpus]) if t.corpus in stated else t for t in corpora]


def check_licences(
    corpora: Sequence[CorpusTerms], repo_id: str, *, private: bool, cleared: Collection[str] = ()
) -> None:
    """Check that nothing which is known of the corpora speaks against publishing an adapter trained on them.

    Args:
        private: the repository is; then nothing is published, and nothing is refused.
        cleared: corpora whose terms the user has read and found to allow it, where nobody else can read them.

    Raises:
        UserError: the repository is public, and it is not known what was trained on, or on what terms, or the terms
            are against it, or are known only to those who signed them.
    """
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
        if _is_unstated(terms):
            raise UserError(
                f"{repo_id}: the adapter learned from {terms.title}, whose licence nobody has stated.",
                f"State it with --license-of {terms.corpus}=ID (such as cc-by-4.0), or push with --private.",
            )
        if "nd" in _clauses(terms.license):
            raise UserError(
                f"{repo_id}: the adapter learned from {terms.title}, under {terms.license}: what is made of it may "
                "not be passed on.",
                "Push with --private, or train without that corpus.",
            )
    _check_share_alike([terms for terms in corpora if terms.corpus not in cleared], repo_id)


def licence_of(corpora: Sequence[CorpusTerms], base_license: str | None = None) -> Licence:
    """Return the licence of a model: the strictest of all, if what is under the others may be passed on under it.

    Args:
        base_license: licence id of the base model; None if it is not known.
    """
    if not corpora:
        return Licence("other", "unstated", LICENCE_FILE)
    ids = {_id_of(terms) for terms in corpora}
    if base_license is not None and base_license not in UNSTATED_LICENSES:
        ids.add(base_license)
    named = sorted(ids, key=lambda id_: (len(_clauses(id_)), id_), reverse=True)
    for strictest in named:
        if not strictest.endswith("-terms") and all(_fits_under(other, strictest) for other in named):
            return Licence(strictest)
    kept = [id_ for id_ in ids if not any(_fits_under(id_, other) for other in ids - {id_})]
    return Licence("other", "-and-".join(sorted(kept)), LICENCE_FILE)


def _check_share_alike(corpora: Sequence[CorpusTerms], repo_id: str) -> None:
    for terms in corpora:
        for other in corpora:
            if "sa" in _clauses(terms.license) and not _fits_under(other.license, terms.license):
                raise UserError(
                    f"{repo_id}: {terms.title} asks that what is made of it is under {terms.license}; {other.title}, "
                    f"which the adapter learned from too, under {other.license}, does not allow that.",
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


def _is_unstated(terms: CorpusTerms) -> bool:
    return terms.license in UNSTATED_LICENSES and not terms.not_to_be_published


def _id_of(terms: CorpusTerms) -> str:
    return f"{terms.corpus}-terms" if terms.license in UNSTATED_LICENSES else terms.license


def _clauses(license_: str) -> list[str]:
    """Return the parts of a Creative Commons licence, such as by, nc, sa; nothing for others."""
    found = _CREATIVE_COMMONS.fullmatch(license_)
    return found[1].split("-") if found else []


def _fits_under(own: str, other: str) -> bool:
    """Say whether what is made of material under `own` may be under `other`."""
    clauses = _clauses(own)
    is_open = bool(clauses) and not {"sa", "nd"} & set(clauses) and set(clauses) <= set(_clauses(other))
    return own == other or own in PERMISSIVE or is_open
