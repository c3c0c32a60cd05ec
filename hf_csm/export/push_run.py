"""What `training.push_to_hub` does: see before the first step that a push will be let through, and push at the end."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

from hf_csm.config import RunConfig
from hf_csm.data.hub import hub_errors
from hf_csm.data.terms import corpora_of
from hf_csm.errors import UserError
from hf_csm.export.base_on_hub import find_base
from hf_csm.export.hub import Target, check_may_write, log_in, open_repository
from hf_csm.export.licences import check_licences
from hf_csm.export.push_model import PATTERNS, check_same_model, push_model


def check_push(config: RunConfig) -> None:
    """Check all that would stop the push at the end of a run, and make the repository if it does not exist.

    Raises:
        UserError: nobody is logged in, may not write there, the corpora forbid it, the base model is nobody else's, or
            the repository holds something else.
    """
    repo_id, private = config.training.push_to_hub, config.training.hub_private
    if repo_id is None:
        return
    api = log_in(repo_id, "ann/moshiko-happy")
    try:
        check_licences(corpora_of(config.dataset), repo_id, private=private)
    except UserError as error:
        raise UserError(
            error.problem,
            "Set training.hub_private to true, or training.push_to_hub to null and push by hand with `hf-csm push`, "
            "which can be told more of the terms.",
        ) from error
    base, revision = config.moshi_paths.hf_repo_id, config.moshi_paths.revision
    if Path(base).expanduser().is_dir():
        raise UserError(
            f"training.push_to_hub is {repo_id}, but the base model is the folder {base}, which nobody else has.",
            "Name its repository in moshi_paths.hf_repo_id, or push by hand with --base-model USER/NAME.",
        )
    find_base(api, {}, base, revision, None)
    target = Target(repo_id, "model", PATTERNS, private)
    with hub_errors(f"{repo_id}: "):
        open_repository(api, target, partial(check_same_model, repo_id, base, False))
        check_may_write(api, target)


def push_run(config: RunConfig, checkpoint: Path) -> str | None:
    """Push the best checkpoint of a finished run, or its last one without evaluations; return the address.

    Args:
        checkpoint: the last one.

    Raises:
        UserError: the push failed; the remedy is the command that tries again.
    """
    repo_id, private = config.training.push_to_hub, config.training.hub_private
    if repo_id is None:
        return None
    best = Path(config.run_dir, "best")
    chosen = best if best.is_dir() else checkpoint
    try:
        return push_model(chosen, repo_id, private=private)
    except UserError as error:
        command = shlex.join(
            ["hf-csm", "push", str(chosen), "--repo-id", repo_id, *(["--private"] if private else [])]
        )
        raise UserError(
            f"The run is done and {chosen} is whole, but it was not pushed: {error.problem}",
            f"Push it by hand: {command} ({error.remedy})",
        ) from error
