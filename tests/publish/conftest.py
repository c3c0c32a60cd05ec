import dataclasses
import shutil

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import http_backoff

from hf_csm.config import DatasetConfig, MoshiPaths, RunConfig, Source
from hf_csm.config_parser import dump_run_config
from hf_csm.mixture.provenance import CorpusTerms, write_corpora
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.export import export_adapter
from hf_csm.models.moshi.lora import save_adapter
from tests.doubles.hub import LocalHub
from tests.doubles.random_adapter import random_adapter


BASE = "kyutai/tiny"
RAVDESS = CorpusTerms("ravdess", "RAVDESS", "cc-by-nc-sa-4.0", num_windows=4, duration_s=40.0, emotions={"happy": 4})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for wait in ("base_wait_time", "max_wait_time"):
        monkeypatch.setitem(http_backoff.__kwdefaults__, wait, 0)
    with LocalHub(tmp_path / "hub") as running, running.connected(tmp_path / "home"):
        yield running


@pytest.fixture
def base_on_hub(hub, tiny_moshi):
    """The tiny base, as `kyutai/tiny`, with a card that states a license."""
    api = HfApi(token=hub.add_user("kyutai"))
    api.create_repo(BASE)
    api.upload_folder(repo_id=BASE, folder_path=tiny_moshi)
    card = b"---\nlicense: cc-by-4.0\n---\n# Tiny\n"
    api.upload_file(repo_id=BASE, path_or_fileobj=card, path_in_repo="README.md")
    hub.requests.clear()
    return BASE


def write_run(folder, tiny_moshi, base=BASE):
    """Write a run with two checkpoints of random adapters, as training leaves them, but for the metrics."""
    found = find_checkpoint(str(tiny_moshi))
    found = dataclasses.replace(found, name_or_path=str(tiny_moshi) if base is None else base)
    for step in (5, 10):
        model = random_adapter(found, seed=step)
        checkpoint = folder / f"checkpoint_{step:06d}"
        save_adapter(model, checkpoint / "adapter")
        export_adapter(model, found, checkpoint / "consolidated")
    (folder / "best").symlink_to("checkpoint_000010")
    config = RunConfig(
        run_dir=str(folder),
        moshi_paths=MoshiPaths(hf_repo_id=found.name_or_path),
        dataset=DatasetConfig(sources=[Source(str(folder / "codes" / "ravdess"))]),
    )
    (folder / "config.yaml").write_text(dump_run_config(config))
    write_corpora([RAVDESS], folder)
    return folder


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory, tiny_moshi):
    return write_run(tmp_path_factory.mktemp("shared") / "run", tiny_moshi)


@pytest.fixture(scope="session")
def shared_local_run(tmp_path_factory, tiny_moshi):
    return write_run(tmp_path_factory.mktemp("shared") / "run", tiny_moshi, base=None)


@pytest.fixture
def run(shared_run, tmp_path):
    """A run on the base `kyutai/tiny`, to write to."""
    return shutil.copytree(shared_run, tmp_path / "runs" / "expressive", symlinks=True)


@pytest.fixture
def local_run(shared_local_run, tmp_path):
    """A run on the tiny base as a local folder, to write to."""
    return shutil.copytree(shared_local_run, tmp_path / "runs" / "local", symlinks=True)
