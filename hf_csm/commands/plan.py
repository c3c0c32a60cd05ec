"""`hf-csm plan`: what a run needs and what is missing, as shell assignments for `run_expressive_finetuning.sh`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from hf_csm.config import RunConfig, Source
from hf_csm.config_parser import parse_run_config


def render_plan(run: RunConfig) -> str:
    """Return the shell variables of a run, one assignment per line.

    `missing` lists the tables in a folder `codes` that do not exist; `mixture` is `dataset.sources` without them as
    JSON; `trained_mixture` is that of the run in the same folder, empty if there is none.

    Raises:
        UserError: no training data is configured.
    """
    sources = run.dataset.training_sources()
    missing = [source for source in sources if _is_local(source) and not Path(source.path).exists()]
    earlier = Path(run.run_dir, "config.yaml")
    trained = parse_run_config(["--config", str(earlier)]).dataset.sources if earlier.exists() else []
    variables = {
        "run_dir": run.run_dir,
        "base_model": run.moshi_paths.hf_repo_id,
        "revision": run.moshi_paths.revision or "",
        "duration_sec": str(run.dataset.duration_sec),
        "last_checkpoint": f"{run.run_dir}/checkpoint_{run.training.max_steps:06d}",
        "mixture": _as_json(source for source in sources if source not in missing),
        "trained_mixture": _as_json(trained) if trained else "",
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join([*lines, f"missing=({shlex.join(source.path for source in missing)})"])


def _is_local(source: Source) -> bool:
    """Whether the table is one that the script makes: not a Hub dataset, nor a folder of another kind."""
    return Path(source.path).parent.name == "codes"


def _as_json(sources: Iterable[Source]) -> str:
    return json.dumps([asdict(source) for source in sources])
