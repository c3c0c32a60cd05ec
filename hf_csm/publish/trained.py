"""Find a trained adapter or a merged model: a training checkpoint, an export, or a repository on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_csm.errors import UserError
from hf_csm.files import read_json
from hf_csm.hub import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, EMOTIONS_NAME, find_model
from hf_csm.models.emotion_control import read_emotion_control
from hf_csm.publish.run_artifacts import RUN_FILES


@dataclass(frozen=True)
class Trained:
    """A trained adapter, or a model that one was merged into.

    Attributes:
        folder: of the checkpoint or export, links resolved.
        adapter: folder of the PEFT adapter; None for a merged model.
        base: name or path of the base model.
        base_revision: of the base model, if one was given.
    """

    folder: Path
    adapter: Path | None
    base: str
    base_revision: str | None


def find_trained(checkpoint: str | Path, revision: str | None = None) -> Trained:
    """Find a trained model; weights of a base or merged model are not downloaded.

    Args:
        checkpoint: `checkpoint_000500/`, an export, a PEFT adapter of a supported base, or a Hub repository of one.
        revision: of the Hub repository.

    Raises:
        UserError: it is none of these, or does not name its base model.
    """
    folder = find_model(checkpoint, revision, files=(ADAPTER_WEIGHTS_NAME, *RUN_FILES)).resolve()
    for adapter in (folder / "adapter", folder):
        if (adapter / ADAPTER_CONFIG_NAME).is_file() or (adapter / ADAPTER_WEIGHTS_NAME).is_file():
            _check_weights(adapter / ADAPTER_WEIGHTS_NAME)
            return Trained(folder, adapter, *_named_base(adapter))
    if (folder / EMOTIONS_NAME).is_file():
        control = read_emotion_control(folder)
        if control.base_model:
            return Trained(folder, None, control.base_model, control.base_revision)
    raise UserError(
        f"{checkpoint} has no folder adapter/, is no PEFT adapter itself, and was not written by `hf-csm export`.",
        "Give a checkpoint folder such as checkpoints/run/best, an export, or a Hub repository with an adapter.",
    )


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, "pt"):  # checks the size of the file
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing, damaged or truncated: {error}", "Use an earlier checkpoint.") from error


def _named_base(adapter: Path) -> tuple[str, str | None]:
    """Return name and revision of the base model that the adapter's configuration names."""
    path = adapter / ADAPTER_CONFIG_NAME
    config = read_json(path, "Give the adapter folder of a checkpoint, or an earlier checkpoint.")
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{path} does not state which base model the adapter was trained on.",
            "Write its repository or folder there as base_model_name_or_path.",
        )
    return name, revision
