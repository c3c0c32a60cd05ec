"""`training.push_to_hub`: check permissions and licenses before the first step, push at the end."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

from hf_csm.config import RunConfig
from hf_csm.errors import UserError
from hf_csm.hub import hub_errors
from hf_csm.mixture.provenance import corpora_of, with_earlier
from hf_csm.models import get_family
from hf_csm.models.device import choose_device
from hf_csm.publish.licenses import base_terms, check_card_values, check_licenses
from hf_csm.publish.push_model import check_same_model, file_patterns, push_model
from hf_csm.publish.resolve_base import resolve_base
from hf_csm.publish.upload import Target, check_may_write, log_in, open_repository
from hf_csm.training.checkpoint import find_checkpoint_to_resume


def check_push(config: RunConfig) -> None:
    """Check everything that could stop the push at the end of a run, and create the repository if missing.

    Raises:
        UserError: not logged in, no write permission, a license forbids it, the base model is a local folder, or the
            repository holds something else.
    """
    options = config.training
    repo_id, private, merged = options.push_to_hub, options.hub_private, options.push_merged
    if repo_id is None:
        return
    api = log_in(repo_id, "ann/moshiko-happy")
    name, revision = config.moshi_paths.hf_repo_id, config.moshi_paths.revision
    if Path(name).expanduser().is_dir():
        raise UserError(
            f"training.push_to_hub is {repo_id}, but the base model is the local folder {name}.",
            "Name its repository in moshi_paths.hf_repo_id, or push by hand with --base-model USER/NAME.",
        )
    family = get_family(name, revision)
    weights, others = family.base_urls(name, revision)
    base = resolve_base(api, name, revision, None, weights=weights, others=others, merged=merged)
    corpora = corpora_of(config.dataset)
    wanted = config.resume_from_checkpoint
    resumed = find_checkpoint_to_resume(Path(config.run_dir), wanted) if wanted else None
    if resumed is not None:
        corpora = with_earlier(corpora, resumed.resolve().parent)
    check_card_values(corpora, repo_id)
    try:
        check_licenses(corpora, repo_id, private=private, base=base_terms(name, base.license))
    except UserError as error:
        raise UserError(
            error.problem,
            "Set training.hub_private to true, or training.push_to_hub to null and push later with `hf-csm push`, "
            "which has options for the terms.",
        ) from error
    target = Target(repo_id, "model", file_patterns(family), private)
    with hub_errors(f"{repo_id}: "):
        open_repository(api, target, partial(check_same_model, repo_id, name, merged, family))
        check_may_write(api, target)


def push_run(config: RunConfig, checkpoint: Path) -> str | None:
    """Push the best checkpoint of a finished run, or its last one without evaluations; return the address.

    Args:
        checkpoint: the last one.

    Raises:
        UserError: the push failed; the remedy has the command to try again.
    """
    options = config.training
    repo_id, private, merged = options.push_to_hub, options.hub_private, options.push_merged
    if repo_id is None:
        return None
    best = Path(config.run_dir, "best")
    chosen = best if best.is_dir() else checkpoint
    try:
        return push_model(chosen, repo_id, merged=merged, private=private, device=choose_device())
    except UserError as error:
        flags = [*(["--merged"] if merged else []), *(["--private"] if private else [])]
        command = shlex.join(["hf-csm", "push", str(chosen), "--repo-id", repo_id, *flags])
        raise UserError(
            f"Training is complete and {chosen} is saved, but the push failed: {error.problem}",
            f"Push it with: {command} ({error.remedy})",
        ) from error
