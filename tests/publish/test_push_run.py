import json
import runpy
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hf_csm import cli
from hf_csm.config import DatasetConfig, MoshiPaths, Replay, RunConfig, Source, TrainingConfig
from hf_csm.data.table import read_card_metadata
from hf_csm.errors import UserError
from hf_csm.mixture.provenance import CorpusTerms, write_corpora
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.publish import push_run as module
from hf_csm.publish.push_model import push_model
from hf_csm.publish.push_run import check_push, push_run
from hf_csm.training.checkpoint import options_of


BASE = "kyutai/tiny"


@pytest.fixture
def config(run, codes):
    def make(repo_id="user/happy", private=False, base=BASE, table=codes, replay=None, merged=False):
        return RunConfig(
            run_dir=str(run),
            moshi_paths=MoshiPaths(hf_repo_id=str(base)),
            dataset=DatasetConfig(sources=[Source(str(table))], replay=replay and Replay(str(replay), 0.5)),
            training=TrainingConfig(push_to_hub=repo_id, push_merged=merged, hub_private=private),
        )

    return make


def test_without_push_to_hub_no_request_is_made(hub, config, run):
    assert check_push(config(None)) is None and push_run(config(None), run / "best") is None
    assert not hub.requests


def test_the_check_creates_an_empty_repository(hub, base_on_hub, config):
    check_push(config(private=True))
    assert HfApi().model_info("user/happy").private
    assert HfApi().list_repo_files("user/happy") == [".gitattributes"]


def test_the_best_checkpoint_is_pushed(hub, base_on_hub, config, run):
    check_push(config())
    assert push_run(config(), run / "checkpoint_000005") == f"{hub.endpoint}/user/happy"
    emotions = HfApi().hf_hub_download("user/happy", "emotions.json")
    assert json.loads(Path(emotions).read_text())["step"] == 10
    check_push(config())  # the next run goes to the same place


def test_options_of_the_push_are_not_part_of_the_trajectory(config):
    assert options_of(config("user/other", True, merged=True)) == options_of(config(None))


def test_merged_weights_are_pushed_when_asked_for(hub, base_on_hub, config, run):
    check_push(config(merged=True))
    push_run(config(merged=True), run / "checkpoint_000010")
    files = HfApi().list_repo_files("user/happy")
    assert "model.safetensors" in files and "lora.safetensors" not in files
    with pytest.raises(UserError, match="holds a merged model"):
        check_push(config())


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


def test_a_push_that_would_fail_stops_the_run_before_it_starts(hub, base_on_hub, config, codes, tiny_moshi, tmp_path):
    esd = with_card(codes, tmp_path / "esd", **{"builder: ravdess": "builder: esd"})
    refused(config(table=esd), "its authors give it", "training.hub_private", hub)
    refused(config(replay=esd), "its authors give it", "training.hub_private", hub)
    refused(config(table="dialogues/train.jsonl"), "license is not stated", "hf-csm push", hub)
    refused(config(base=tiny_moshi), "local folder", "moshi_paths.hf_repo_id", hub)
    refused(
        config(base="kyutai/none"), "kyutai/none: no such folder, and the Hub has no such repository", "spelling", hub
    )
    with pytest.raises(UserError, match="not let|may not do this"):
        check_push(config("another/happy"))
    check_push(config(table=esd, private=True))


def test_a_base_that_has_changed_since_its_revision_stops_the_run(hub, base_on_hub, config):
    pinned = config()
    pinned.moshi_paths.revision = HfApi().model_info(BASE).sha
    check_push(pinned)
    HfApi().delete_repo("user/happy")
    content = bytearray(find_checkpoint(BASE).moshi_weights.read_bytes())
    content[-1] ^= 1
    api = HfApi(token=next(token for token, user in hub.users.items() if user.name == "kyutai"))
    api.upload_file(repo_id=BASE, path_or_fileobj=bytes(content), path_in_repo="model.safetensors")
    refused(pinned, "model.safetensors has changed", "newest base", hub)


def test_corpora_of_an_earlier_part_of_the_run_count(hub, base_on_hub, config, run):
    write_corpora([CorpusTerms("esd", "ESD", "other")], run)
    (run / "checkpoint_000010" / "state").mkdir()
    (run / "checkpoint_000010" / "state" / "trainer.pt").touch()
    resumed = config()
    resumed.resume_from_checkpoint = "latest"
    refused(resumed, "trained on ESD", "training.hub_private", hub)
    resumed.run_dir, resumed.resume_from_checkpoint = str(run.parent / "branch"), str(run / "best")
    refused(resumed, "trained on ESD", "training.hub_private", hub)


@pytest.mark.parametrize("license, problem", [("cc-by-nc-nd-4.0", "the base model"), ("gpl-3.0", "does not allow")])
def test_a_base_license_that_forbids_it_stops_run_and_push(hub, base_on_hub, config, run, license, problem):
    api = HfApi(token=next(token for token, user in hub.users.items() if user.name == "kyutai"))
    card = f"---\nlicense: {license}\n---\n# Tiny\n".encode()
    api.upload_file(repo_id=BASE, path_or_fileobj=card, path_in_repo="README.md")
    refused(config(), problem, "training.hub_private", hub)
    for merged in (False, True):
        with pytest.raises(UserError, match=problem):
            push_model(run / "best", "user/happy", merged=merged)
    assert not HfApi().repo_exists("user/happy")


@pytest.mark.parametrize("license, expected", [("[mit, apache-2.0]", "cc-by-nc-sa-4.0"), ("other", "other")])
def test_the_license_of_the_base_is_on_the_card(hub, base_on_hub, run, license, expected):
    api = HfApi(token=next(token for token, user in hub.users.items() if user.name == "kyutai"))
    card = f"---\nlicense: {license}\n---\n# Tiny\n".encode()
    api.upload_file(repo_id=BASE, path_or_fileobj=card, path_in_repo="README.md")
    push_model(run / "best", "user/happy")
    assert HfApi().model_info("user/happy").card_data.license == expected
    assert ("LICENSE.md" in HfApi().list_repo_files("user/happy")) == (expected == "other")


def test_a_language_without_iso_code_stops_the_run_and_the_push(hub, base_on_hub, config, run, monkeypatch):
    spoken = CorpusTerms("mine", "Mine", "mit", languages=["english"])
    monkeypatch.setattr(module, "corpora_of", lambda dataset: [spoken])
    refused(config(), "language 'english'", "ISO 639", hub)
    write_corpora([spoken], run)
    with pytest.raises(UserError, match="language 'english'"):
        push_model(run / "best", "user/happy")
    assert not HfApi().repo_exists("user/happy")


def test_a_token_that_may_only_read_stops_the_push_before_the_base_is_loaded(hub, base_on_hub, run, tmp_path):
    HfApi().create_repo("user/happy")
    reader = hub.add_user("user", can_write=False)
    with hub.connected(tmp_path / "home", reader), pytest.raises(UserError, match="may not do this") as error:
        push_model(run / "best", "user/happy", merged=True)
    assert "token that may write" in error.value.remedy
    assert not [request for request in hub.requests if request.endswith("model.safetensors")]


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
    with pytest.raises(UserError, match="holds something other"):
        check_push(config())


@pytest.mark.parametrize("flags", [[], ["private"], ["merged", "private"]])
def test_a_push_that_fails_gives_the_command_and_changes_nothing(hub, base_on_hub, config, run, flags):
    before = sorted(run.rglob("*"))
    hub.fail_after(0)
    with pytest.raises(UserError) as error:
        push_run(config(**dict.fromkeys(flags, True)), run / "checkpoint_000010")
    assert f"{run}/best" in error.value.problem
    command = " ".join([f"hf-csm push {run}/best --repo-id user/happy", *(f"--{flag}" for flag in flags)])
    assert f"{command} (" in error.value.remedy and "\n" not in error.value.problem + error.value.remedy
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("rank, expected", [("0", ["check", "train", "push"]), ("1", ["train"])])
def test_the_recipe_checks_first_and_pushes_last_on_the_main_process_only(
    monkeypatch, tmp_path, tiny_moshi, rank, expected
):
    from hf_csm.training import loop

    done = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(module, "check_push", lambda config: done.append("check"))
    monkeypatch.setattr(module, "push_run", lambda config, checkpoint: done.append("push"))
    monkeypatch.setattr(loop, "train", lambda config, family: done.append("train") or tmp_path)
    recipe = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "train.py"))
    recipe["main"](["--training.push_to_hub", "user/happy", "--moshi_paths.hf_repo_id", str(tiny_moshi)])
    assert done == expected


def test_a_push_to_a_branch_names_the_server_that_reads_it(hub, base_on_hub, run, capsys):
    assert cli.main(["push", str(run / "best"), "--repo-id", "user/happy", "--revision", "v1"]) == 0
    said = capsys.readouterr().out
    assert "hf-csm serve user/happy --revision v1\n" in said and "moshi.server" not in said
    assert cli.main(["push", str(run / "best"), "--repo-id", "user/other", "--revision", "refs/pr/1"]) == 1
    assert "refs/pr/1 is not the name of a branch" in capsys.readouterr().err
    assert not HfApi().repo_exists("user/other")
