import shutil

import pytest

from hf_csm.models.emotion_control import EmotionControl, write_emotion_control
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.export import export_adapter
from tests.doubles.random_adapter import random_adapter


def _write_adapter(base_folder, out, control, *, seed=0, rank=4, std=0.2):
    """Export an adapter with random weights."""
    base = find_checkpoint(str(base_folder))
    model = random_adapter(base, rank=rank, alpha=2 * rank, std=std, seed=1000 * seed)
    export_adapter(model, base, out)
    write_emotion_control(control, out)
    return out


@pytest.fixture(scope="session")
def write_adapter():
    """The function `(base_folder, out, control, *, seed, rank, std)` that exports an adapter of random weights."""
    return _write_adapter


@pytest.fixture(scope="session")
def expressive(tiny_moshi, tmp_path_factory):
    """An adapter with an emotion prefix: happy, sad or angry. Do not write."""
    control = EmotionControl("prefix", "({emotion})", ("happy", "sad", "angry"), str(tiny_moshi))
    return _write_adapter(tiny_moshi, tmp_path_factory.mktemp("adapters") / "expressive", control)


@pytest.fixture(scope="session")
def calm(tiny_moshi, tmp_path_factory):
    """An adapter of another rank that was trained for one emotion, without prefix. Do not write."""
    control = EmotionControl("none", emotions=("calm",), base_model=str(tiny_moshi))
    return _write_adapter(tiny_moshi, tmp_path_factory.mktemp("adapters") / "calm", control, seed=1, rank=2)


@pytest.fixture(scope="session")
def as_checkpoint(expressive, tmp_path_factory):
    """The same adapter as a run left it: `run/checkpoint_000500`. Do not write."""
    checkpoint = tmp_path_factory.mktemp("runs") / "moody" / "checkpoint_000500"
    (checkpoint / "adapter").mkdir(parents=True)
    shutil.copytree(expressive, checkpoint / "consolidated", ignore=shutil.ignore_patterns("emotions.json"))
    (checkpoint.parent / "config.yaml").write_text(
        "dataset: {control: prefix, prefix_template: '({emotion})', emotions: [happy, sad]}\n"
        "moshi_paths: {hf_repo_id: tiny, revision: null}\n"
    )
    return checkpoint
