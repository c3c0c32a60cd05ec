"""Checkpoints of a run: `checkpoint_000500/{consolidated/, adapter/, state/}`, written beside and renamed.

`adapter/` is in PEFT's format, `consolidated/` in that of the model family's loader. `state/` holds the optimizer and
random states, so that a run resumes bit for bit. The base model is not written.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_csm.config import RunConfig
from hf_csm.errors import UserError
from hf_csm.models.family import Checkpoint, Family, SpeechLM


if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT_NAME = re.compile(r"^checkpoint_(\d{6,})$")


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        step: optimizer steps taken.
        num_micro_batches: consumed by all processes together.
        evaluated_step: step of the last evaluation, -1 for none.
        evaluated_loss: its loss with the adapter.
        best_step: step of the checkpoint with the lowest evaluation loss, -1 for none.
        best_loss: that loss.
    """

    step: int = 0
    num_micro_batches: int = 0
    evaluated_step: int = -1
    evaluated_loss: float = float("inf")
    best_step: int = -1
    best_loss: float = float("inf")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_dir / f"checkpoint_{step:06d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob("checkpoint_*") if CHECKPOINT_NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]))


def find_checkpoint_to_resume(run_dir: Path, wanted: str | None) -> Path | None:
    """Return the checkpoint that `resume_from_checkpoint` names; None for a new run.

    Raises:
        UserError: there is no such checkpoint, or a new run would overwrite the checkpoints of another.
    """
    existing = list_checkpoints(run_dir)
    if wanted is None:
        if existing:
            raise UserError(
                f"{run_dir} already holds {len(existing)} checkpoints, up to {existing[-1].name}.",
                "Continue with --resume-from-checkpoint latest, or choose another --run_dir.",
            )
        return None
    if wanted == "latest":
        return existing[-1] if existing else None
    path = Path(wanted)
    if not (path / "state" / "trainer.pt").is_file() or not (path / "adapter").is_dir():
        raise UserError(
            f"{path} is not a checkpoint of a run.",
            "Give a folder such as checkpoints/run/checkpoint_000500, or `latest`.",
        )
    if existing and path.resolve().parent == run_dir.resolve() and path.resolve() != existing[-1].resolve():
        raise UserError(
            f"{run_dir} has checkpoints up to {existing[-1].name}; {path.resolve().name} is an earlier one.",
            "Choose another --run_dir for the branch, or move the later checkpoints away.",
        )
    return path


def save_checkpoint(
    run_dir: Path,
    progress: Progress,
    family: Family,
    model: SpeechLM,
    base: Checkpoint,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    accelerator: Accelerator,
) -> Path:
    """Write the checkpoint of the step in `progress`; all processes call this together."""
    path = checkpoint_path(run_dir, progress.step)
    unfinished = path.with_name(f".{path.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "state").mkdir(parents=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        family.save_adapter(model, unfinished / "adapter")
        family.export_adapter(model, base, unfinished / "consolidated")
        torch.save(
            {"optimizer": optimizer.state_dict(), "progress": asdict(progress), "config": options_of(config)},
            unfinished / "state" / "trainer.pt",
        )
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    random_state = {"torch": torch.get_rng_state(), "cuda": cuda}
    torch.save(random_state, unfinished / "state" / f"rng_{accelerator.process_index:05d}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
    accelerator.wait_for_everyone()
    return path


def options_of(config: RunConfig) -> dict[str, object]:
    """Return the options that change the weights of a run, by dotted name, as plain data."""
    tree = json.loads(json.dumps(asdict(config)))
    flat: dict[str, object] = {"seed": tree["seed"]}
    for group in ("moshi_paths", "dataset", "lora", "loss", "training", "optimizer", "scheduler"):
        flat |= {f"{group}.{name}": value for name, value in tree[group].items()}
    reporting = ("trackers", "eval_every", "eval_windows", "log_every", "push_to_hub", "push_merged", "hub_private")
    for name in (*reporting, "save_every", "keep_checkpoints"):
        del flat[f"training.{name}"]
    return flat


def load_state(path: Path, optimizer: torch.optim.Optimizer, process_index: int) -> tuple[Progress, dict[str, object]]:
    """Restore the optimizer and this process's random numbers; the adapter is loaded with the model.

    Returns:
        The progress of the run, and its `options_of`.

    Raises:
        UserError: a state file is damaged.
    """
    try:
        state = torch.load(path / "state" / "trainer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        rng_path = path / "state" / f"rng_{process_index:05d}.pt"
        if rng_path.exists():  # a run may continue with more processes
            random_state = torch.load(rng_path, map_location="cpu", weights_only=True)
            torch.set_rng_state(random_state["torch"])
            if random_state["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(random_state["cuda"])
    except (RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
        raise UserError(
            f"{path}/state cannot be read: {' '.join(str(error).split())[:200]}",
            "Resume from an earlier checkpoint with --resume-from-checkpoint PATH.",
        ) from error
    return Progress(**state["progress"]), state["config"]


def mark_best(run_dir: Path, step: int) -> None:
    """Let the link `best` point to the checkpoint of a step."""
    unfinished = run_dir / ".best.tmp"
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(checkpoint_path(run_dir, step).name)
    unfinished.replace(run_dir / "best")


def remove_old_checkpoints(run_dir: Path, keep: int, best_step: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one; 0 keeps all."""
    for path in list_checkpoints(run_dir)[: -keep or None] if keep else []:
        if path != checkpoint_path(run_dir, best_step):
            shutil.rmtree(path)
