import json
import runpy
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hf_csm.config import DatasetConfig, MoshiPaths, Replay, RunConfig, Source, TrainingConfig
from hf_csm.data.table import read_card_metadata
from hf_csm.errors import UserError
from hf_csm.export import push_run as module
from hf_csm.export.push_run import check_push, push_run


BASE = "kyutai/tiny"


@pytest.fixture
def config(run, codes):
    def make(repo_id="user/happy", private=False, base=BASE, table=codes, replay=None):
        return RunConfig(
            run_dir=str(run),
            moshi_paths=MoshiPaths(hf_repo_id=str(base)),
            dataset=DatasetConfig(sources=[Source(str(table))], replay=replay and Replay(str(replay), 0.5)),
            training=TrainingConfig(push_to_hub=repo_id, hub_private=private),
        )

    return make


def test_a_run_that_is_not_to_be_pushed_asks_nobody(hub, config, run):
    assert check_push(config(None)) is None and push_run(config(None), run / "best") is None
    assert not hub.requests


def test_the_repository_is_there_before_the_first_step_and_nothing_is_in_it(hub, base_on_hub, config):
    check_push(config(private=True))
    assert HfApi().model_info("user/happy").private
    assert HfApi().list_repo_files("user/happy") == [".gitattributes"]


def test_what_was_checked_is_pushed_from_the_best_checkpoint(hub, base_on_hub, config, run):
    check_push(config())
    assert push_run(config(), run / "checkpoint_000005") == f"{hub.endpoint}/user/happy"
    emotions = HfApi().hf_hub_download("user/happy", "emotions.json")
    assert json.loads(Path(emotions).read_text())["step"] == 10
    check_push(config())  # the next run goes to the same place


def test_without_evaluations_the_last_checkpoint_is_pushed(hub, base_on_hub, config, run):
    (run / "best").unlink()
    push_run(config(), run / "checkpoint_000005")
    emotions = HfApi().hf_hub_download("user/happy", "emotions.json")
    assert json.loads(Path(emotions).read_text())["step"] == 5


def with_card(table, folder, **changes):
    """Copy a table with other words in its card."""
    shutil.copytree(table, folder)
    text = (folder / "README.md").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "README.md").write_text(text)
    read_card_metadata(folder)
    return folder


def refused(config, problem, remedy, hub):
    with pytest.raises(UserError, match=problem) as error:
        check_push(config)
    assert remedy in error.value.remedy and "\n" not in error.value.problem + error.value.remedy
    assert not HfApi().repo_exists("user/happy")


def test_what_would_stop_the_push_stops_the_run_before_it_starts(
    hub, base_on_hub, config, codes, tiny_moshi, tmp_path
):
    esd = with_card(codes, tmp_path / "esd", **{"builder: ravdess": "builder: esd"})
    refused(config(table=esd), "and its authors give it to those who sign", "training.hub_private", hub)
    refused(config(replay=esd), "and its authors give it", "training.hub_private", hub)
    refused(config(table="dialogues/train.jsonl"), "whose licence nobody has stated", "hf-csm push", hub)
    refused(config(base=tiny_moshi), "which nobody else has", "moshi_paths.hf_repo_id", hub)
    refused(config(base="kyutai/none"), "the base model: the Hub has no such repository", "spelling", hub)
    with pytest.raises(UserError, match="not let|may not do this"):
        check_push(config("another/happy"))
    check_push(config(table=esd, private=True))


@pytest.mark.parametrize("exists", [False, True])
def test_a_token_that_may_only_read_stops_the_run(hub, base_on_hub, config, tmp_path, exists):
    if exists:
        HfApi().create_repo("user/happy")
    reader = hub.add_user("user", can_write=False)
    with hub.connected(tmp_path / "home", reader), pytest.raises(UserError, match="may not do this") as error:
        check_push(config())
    assert "token that may write" in error.value.remedy
    with hub.connected(tmp_path / "home", None), pytest.raises(UserError, match="not logged in"):
        check_push(config())


def test_a_repository_with_something_else_stops_the_run(hub, base_on_hub, config):
    HfApi().create_repo("user/happy")
    HfApi().upload_file(repo_id="user/happy", path_or_fileobj=b"x", path_in_repo="pytorch_model.bin")
    with pytest.raises(UserError, match="exists and holds something other"):
        check_push(config())


@pytest.mark.parametrize("private", [False, True])
def test_a_push_that_fails_names_the_command_and_loses_nothing(hub, base_on_hub, config, run, private):
    before = sorted(run.rglob("*"))
    hub.fail_after(0)
    with pytest.raises(UserError) as error:
        push_run(config(private=private), run / "checkpoint_000010")
    assert f"The run is done and {run}/best is whole" in error.value.problem
    command = f"hf-csm push {run}/best --repo-id user/happy{' --private' if private else ''} ("
    assert command in error.value.remedy and "\n" not in error.value.problem + error.value.remedy
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("rank, expected", [("0", ["check", "train", "push"]), ("1", ["train"])])
def test_the_recipe_checks_first_and_pushes_last_on_the_main_process_only(monkeypatch, tmp_path, rank, expected):
    from hf_csm.training import loop

    done = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(module, "check_push", lambda config: done.append("check"))
    monkeypatch.setattr(module, "push_run", lambda config, checkpoint: done.append("push"))
    monkeypatch.setattr(loop, "train", lambda config, consolidate: done.append("train") or tmp_path)
    recipe = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "train.py"))
    recipe["main"](["--training.push_to_hub", "user/happy"])
    assert done == expected
