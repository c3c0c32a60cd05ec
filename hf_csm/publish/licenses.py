"""The license of an adapter, from those of its corpora and base model, and whether it may be published.

Whether weights are a derivative work of the recordings they were trained on is not settled. hf-csm takes the cautious
view: an adapter is treated as derived from its corpora, so non-commercial and share-alike clauses apply to it too. The
Open Database License sets share-alike for databases only; an adapter is none, so only its notice is kept. That is a
decision of this project, not legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from hf_csm.errors import UserError
from hf_csm.mixture.provenance import LANGUAGE, LICENSES, UNSTATED, UNSTATED_LICENSES, CorpusTerms, license_id


LICENSE_FILE = "LICENSE.md"
"""Lists all terms when no single license id of the Hub describes them."""
PERMISSIVE = frozenset(
    ("apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0", "cdla-permissive-1.0")
    + ("cdla-permissive-2.0", "mit", "odbl", "odc-by", "pddl", "unlicense", "wtfpl")
)
"""Derived material may be distributed under other terms, with the notice."""
COPYLEFT = frozenset(
    ("agpl-3.0", "cdla-sharing-1.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "osl-3.0")
)
"""Derived material must have the same license, as with Creative Commons' `sa`."""
BASE = "base-model"
"""Name of the base model among the corpora: its license applies to the adapter too."""
_SUCH = "such as cc-by-4.0"
_CLAUSES = {
    "by": "attribute its authors and state changes",
    "nc": "no commercial use",
    "sa": "distribute derived material under the same license",
    "nd": "do not distribute derived material",
}


@dataclass(frozen=True)
class License:
    """A license as a model card states it.

    Attributes:
        id: of the Hub; `other` for several terms at once, or terms without an id.
        name: of these terms, for `other`.
        link: file with these terms, for `other`.
    """

    id: str
    name: str | None = None
    link: str | None = None


def with_stated(corpora: Sequence[CorpusTerms], stated: Mapping[str, str]) -> list[CorpusTerms]:
    """Return the corpora with the licenses that the user gives for those without one.

    Args:
        stated: license id of the Hub by corpus.

    Raises:
        UserError: no such corpus, its license is known, or it is no license id of the Hub.
    """
    open_ones = [terms.corpus for terms in corpora if _is_unstated(terms)]
    for corpus, license in stated.items():
        known = next((terms for terms in corpora if terms.corpus == corpus), None)
        given = f"--license-of gives {license} for {corpus}"
        if known is None or corpus not in open_ones:
            raise UserError(
                f"{given}, but "
                + (f"it is {known.license}." if known else "the adapter was not trained on that corpus."),
                f"Use it for {', '.join(open_ones)}." if open_ones else "Leave it out: all licenses are known.",
            )
        clauses = _clauses(known.license)
        if not _is_known(license_id(license)) or not set(clauses) <= set(_clauses(license_id(license))):
            raise UserError(
                f"{given}, which is " + (f"not {known.license}." if clauses else "no license id of the Hub."),
                f"Give an id, {_SUCH}, from https://huggingface.co/docs/hub/repositories-licenses.",
            )
    return [replace(t, license=stated[t.corpus]) if t.corpus in stated else t for t in corpora]


def base_terms(base_model: str, base_license: str | None) -> list[CorpusTerms]:
    """Return the terms of the base model, one entry per license on its card."""
    licenses = (base_license or UNSTATED).split(", ")
    return [CorpusTerms(BASE, f"the base model {base_model}", license) for license in licenses]


def check_card_values(corpora: Sequence[CorpusTerms], repo_id: str) -> None:
    """Check what the Hub would refuse in the card of an adapter, before a repository is created.

    Raises:
        UserError: a language has no ISO 639 code.
    """
    for terms in corpora:
        for language in terms.languages:
            if not LANGUAGE.fullmatch(language):
                raise UserError(
                    f"{repo_id}: {terms.title} has the language {language!r}, which is no language code of the Hub.",
                    "Write its ISO 639 code, such as en, in the run's corpora.json, or in the corpus before training.",
                )


def check_licenses(
    corpora: Sequence[CorpusTerms],
    repo_id: str,
    *,
    private: bool,
    cleared: Collection[str] = (),
    base: Sequence[CorpusTerms] = (),
) -> None:
    """Check that the terms of the corpora and the base model allow publishing an adapter.

    Args:
        private: of the repository; nothing is published then, so nothing is refused.
        cleared: corpora whose signed terms allow it, according to the user.
        base: terms of the base model, which may be unknown.

    Raises:
        UserError: `cleared` names a corpus that was not trained on; or the repository is public, and the corpora or
            their terms are unknown, or a license forbids it.
    """
    names = [terms.corpus for terms in corpora] + [BASE]
    for name in cleared:
        if name not in names:
            raise UserError(
                f"--terms-allow names {name}, but the adapter was not trained on that corpus.",
                f"--terms-allow takes {', '.join(dict.fromkeys(names))}.",
            )
    if private:
        return
    if not corpora:
        raise UserError(
            f"{repo_id}: the training data are unknown (no corpora.json), so a public card cannot state their terms.",
            "Push from the run's folder, where training wrote corpora.json, or push with --private.",
        )
    for terms in corpora:
        if terms.not_to_be_published and terms.corpus not in cleared:
            raise UserError(
                f"{repo_id}: the adapter was trained on {terms.title}, and {terms.not_to_be_published}.",
                f"Push with --private; or, if the terms that you signed allow publishing such models, add "
                f"--terms-allow {terms.corpus}.",
            )
        _check_derivable(terms, repo_id, "train without that corpus")
        if _is_unstated(terms):
            problem = "whose license is not stated"
            if terms.license not in UNSTATED_LICENSES:
                problem = f"under {terms.license}, which is no license id of the Hub"
            raise UserError(
                f"{repo_id}: the adapter was trained on {terms.title}, {problem}.",
                f"State it with --license-of {terms.corpus}=ID ({_SUCH}), or push with --private.",
            )
    for terms in base:
        _check_derivable(terms, repo_id, "train on another base model")
    _check_share_alike([terms for terms in (*corpora, *base) if terms.corpus not in cleared], repo_id)


def _check_derivable(terms: CorpusTerms, repo_id: str, remedy: str) -> None:
    if "nd" in _clauses(terms.license):
        raise UserError(
            f"{repo_id}: {terms.title} is under {terms.license}: derived material may not be distributed.",
            f"Push with --private, or {remedy}.",
        )


def license_of(corpora: Sequence[CorpusTerms], base_license: str | None = None) -> License:
    """Return the license of a model: the strictest one, if it may cover material under all others.

    Args:
        base_license: on the base model's card; several are joined by commas; None if there is none.
    """
    if not corpora:
        return License("other", "unstated", LICENSE_FILE)
    ids = {_id_of(terms) for terms in (*corpora, *base_terms("", base_license))}
    named = sorted(ids, key=lambda id_: (len(_clauses(id_)), id_), reverse=True)
    for strictest in named:
        if strictest in LICENSES and all(_fits_under(other, strictest) for other in named):
            return License(strictest)
    kept = [id_ for id_ in ids if not any(_fits_under(id_, other) for other in ids - {id_})]
    return License("other", "-and-".join(sorted(kept or ids)), LICENSE_FILE)


def _check_share_alike(all_terms: Sequence[CorpusTerms], repo_id: str) -> None:
    for terms in all_terms:
        for other in all_terms:
            if not _shares_alike(terms.license) or _fits_under(other.license, terms.license):
                continue
            if other.corpus == BASE and _is_unstated(other):  # its page may have terms without an id
                continue
            raise UserError(
                f"{repo_id}: {terms.title} requires derived material to be under {terms.license}; {other.title}, "
                f"under {other.license}, does not allow that.",
                f"Push with --private, train without one of them, or, with permission, add --terms-allow "
                f"{terms.corpus}.",
            )


def meaning(terms: CorpusTerms) -> str:
    """Return what the terms of a corpus mean for an adapter trained on it, in a sentence."""
    clauses = _clauses(terms.license)
    if terms.not_to_be_published:
        return (
            f"Not for distribution: {terms.not_to_be_published}. The adapter contains none of its audio, codes, texts "
            "or labels; whether it may be used or distributed depends on the signed terms."
        )
    if clauses:
        return f"{'; '.join(_CLAUSES[clause] for clause in clauses)}.".capitalize()
    if terms.license == "odbl":
        return "Keep its notice. Derived databases are shared alike; an adapter is treated as no database."
    if _is_unstated(terms):
        return "Terms not stated: ask the owner before you use or distribute the adapter."
    return f"Keep its notice; the terms are those of {terms.license}."


def license_text(corpora: Sequence[CorpusTerms], license: License, base_model: str, base_license: str | None) -> str:
    """Return LICENSE.md with all terms, for a model without a single license."""
    lines = [
        "# Terms of this model",
        "",
        f"No single license covers this model; all of these terms apply at once ({license.name}).",
        "Use and distribute it only as all of them allow.",
        "",
        f"- **{base_model}**, the base model: {base_license or 'license not stated; see its page'}.",
    ]
    lines += [f"- **{t.title}**: {t.license}. {meaning(t)} {t.notice}".rstrip() for t in corpora]
    return "\n".join(lines) + "\n"


def slug(name: str) -> str:
    """Return a valid license or dataset name for the Hub: lower case, without spaces."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "unnamed"


def _is_known(license: str) -> bool:
    return license in LICENSES and license not in UNSTATED_LICENSES


def _is_unstated(terms: CorpusTerms) -> bool:
    return not _is_known(terms.license) and not terms.not_to_be_published


def _id_of(terms: CorpusTerms) -> str:
    return terms.license if _is_known(terms.license) else f"{slug(terms.corpus)}-terms"


def _clauses(license_: str) -> list[str]:
    """Return the clauses of a Creative Commons license, such as by, nc, sa, in any spelling; empty for others."""
    words = re.split(r"[^a-z0-9]+", license_.lower())
    return [word for word in words if word in _CLAUSES] if {"cc", "creativecommons"} & set(words) else []


def _shares_alike(license_: str) -> bool:
    return "sa" in _clauses(license_) or license_ in COPYLEFT


def _fits_under(own: str, other: str) -> bool:
    """Return whether material derived from work under `own` may be under `other`."""
    clauses = _clauses(own)
    is_open = bool(clauses) and not {"sa", "nd"} & set(clauses) and set(clauses) <= set(_clauses(other))
    return own == other or own in PERMISSIVE or is_open or (clauses == ["by"] and other in COPYLEFT)
