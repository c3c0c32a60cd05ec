import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import peft
import pytest
import soundfile
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file

from hf_csm import cli
from hf_csm.config_parser import parse_run_config
from hf_csm.errors import UserError
from hf_csm.mixture.provenance import CorpusTerms, write_corpora
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.lora import load_adapter, read_adapter
from hf_csm.models.moshi.model import load_moshi
from hf_csm.publish.export import export_checkpoint
from hf_csm.publish.push_model import push_model, staging_folder
from hf_csm.serving.loaded import load_model
from tests.doubles.hub import puts, remote_files, remote_json, remote_oids, snapshot


BASE = "kyutai/tiny"
RAVDESS = CorpusTerms("ravdess", "RAVDESS", "cc-by-nc-sa-4.0", num_windows=4)
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "lora.safetensors"}
BESIDE = {"README.md", "LICENSE.md", "config.json", "config.yaml", "corpora.json", "emotions.json", "loss.png"} | {
    "metrics.jsonl"
}


def write_metrics(run):
    lines = [*({"step": step, "loss": 5.0 - step / 100} for step in range(1, 11)), {"step": 10, "eval_loss": 4.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def leftovers(run):
    return [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_a_pushed_adapter_loads_with_moshi_and_peft_on_another_machine(hub, base_on_hub, run, tmp_path):
    assert push_model(run / "best", "user/happy") == f"{hub.endpoint}/user/happy"
    assert remote_files("user/happy") <= BESIDE | ADAPTER_FILES and remote_files("user/happy") >= ADAPTER_FILES
    assert not leftovers(run)
    with hub.connected(tmp_path / "another home"):
        found = find_checkpoint("user/happy")
        assert found.lora_weights is not None and "another home" in str(found.moshi_weights)
        served = found.get_moshi(dtype=torch.float32, fuse_lora=False)
        folder = snapshot_download("user/happy")
        loaded = peft.PeftModel.from_pretrained(load_moshi(find_checkpoint(BASE), dtype=torch.float32).lm, folder)
    codes = torch.randint(100, (1, 17, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = served(codes), loaded.eval()(codes)
    torch.testing.assert_close(one.text_logits[one.text_mask], other.text_logits[other.text_mask])
    torch.testing.assert_close(one.logits[one.mask], other.logits[other.mask])
    trained = load_file(run / "checkpoint_000010" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(weight, trained[name]) for name, weight in read_adapter(folder)[1].items())


def test_a_model_on_the_hub_can_be_copied_or_merged(hub, base_on_hub, run, tmp_path):
    write_metrics(run)
    push_model(run / "best", "user/happy", revision="v1")
    push_model(run / "best", "user/whole", merged=True)
    with hub.connected(tmp_path / "another home"):
        push_model("user/happy", "user/copy", checkpoint_revision="v1")
        push_model("user/happy", "user/merged", checkpoint_revision="v1", merged=True)
        with pytest.raises(UserError, match=r"user/happy: .*no such revision"):
            push_model("user/happy", "user/copy", checkpoint_revision="v2")
    original = {file.path: file.lfs for file in HfApi().list_repo_tree("user/happy", revision="v1")}
    assert remote_files("user/copy") == original.keys() - {".gitattributes"}
    assert {name: oid for name, oid in remote_oids("user/copy").items() if name.endswith(".safetensors")} == {
        name: lfs.sha256 for name, lfs in original.items() if name.endswith(".safetensors")
    }
    assert remote_oids("user/merged")["model.safetensors"] == remote_oids("user/whole")["model.safetensors"]


def test_card_provenance_and_metrics_are_published(hub, base_on_hub, run):
    write_metrics(run)
    push_model(run / "best", "user/happy")
    info = HfApi().model_info("user/happy")
    assert info.card_data.base_model == BASE and info.card_data.license == "cc-by-nc-sa-4.0"
    assert remote_json("user/happy", "emotions.json")["base_model"] == BASE
    assert remote_json("user/happy", "corpora.json")[0]["corpus"] == "ravdess"
    assert (snapshot("user/happy") / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert (snapshot("user/happy") / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_local_path_is_published(hub, base_on_hub, local_run, tiny_moshi):
    push_model(local_run / "best", "user/happy", base_model=BASE)
    for path in snapshot("user/happy").rglob("*"):
        if path.is_file() and path.suffix not in (".png",):
            content = path.read_bytes()
            assert b"/tmp" not in content and str(tiny_moshi).encode() not in content, path
            assert b"file://" not in content
    config = snapshot("user/happy") / "config.yaml"
    options = parse_run_config(["--config", str(config)])
    assert options.dataset.sources[0].path == "ravdess" and options.run_dir == "run"
    assert options.moshi_paths.hf_repo_id == BASE


def test_merged_weights_are_those_of_the_trained_model(hub, base_on_hub, run):
    push_model(run / "checkpoint_000005", "user/merged", merged=True)
    assert remote_files("user/merged") <= BESIDE | {"model.safetensors"}
    assert not leftovers(run)
    found = find_checkpoint("user/merged")
    assert found.lora_weights is None
    pulled = load_moshi(found, dtype=torch.float32).lm.state_dict()
    model = load_adapter(load_moshi(find_checkpoint(BASE), dtype=torch.float32), run / "checkpoint_000005" / "adapter")
    expected = model.lm.merge_and_unload().state_dict()
    for name, weight in pulled.items():
        torch.testing.assert_close(weight, expected[name].bfloat16().float(), rtol=0, atol=0)
    assert remote_json("user/merged", "config.json")["mimi_name"] == f"hf://{BASE}/mimi.safetensors"
    assert remote_json("user/merged", "config.json")["moshi_name"] == "model.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_an_export_is_pushed_as_its_checkpoint_is(hub, base_on_hub, run, tmp_path, merged):
    push_model(run / "best", "user/run", merged=merged)
    export = export_checkpoint(run / "best", tmp_path / "export", merged=merged, dtype=torch.float32)
    push_model(export, "user/export")
    for name in {"model.safetensors"} if merged else ADAPTER_FILES - {"adapter_config.json"}:
        assert remote_oids("user/export")[name] == remote_oids("user/run")[name]
    assert remote_json("user/export", "config.json") == remote_json("user/run", "config.json")
    assert remote_json("user/export", "emotions.json") == remote_json("user/run", "emotions.json")


def test_samples_are_published(hub, base_on_hub, run):
    (run / "samples").mkdir()
    soundfile.write(run / "samples" / "trained_happy.wav", np.zeros(2400), 24000)
    (run / "samples" / "notes.txt").write_text("not a clip")
    push_model(run / "best", "user/happy")
    assert [name for name in remote_files("user/happy") if "/" in name] == ["samples/trained_happy.wav"]


@pytest.mark.parametrize("name, channels", [("03-01-03-01-01-01-01.wav", 1), ("1001_DFA_HAP_XX.wav", 1), ("a.wav", 2)])
def test_a_clip_that_may_be_of_a_corpus_is_refused(hub, base_on_hub, run, name, channels):
    (run / "samples").mkdir()
    soundfile.write(run / "samples" / name, np.zeros((2400, channels)), 24000)
    with pytest.raises(UserError, match=name) as error:
        push_model(run / "best", "user/happy")
    assert "generate_samples.py" in error.value.remedy
    assert not puts(hub) and not remote_files("user/happy") and not leftovers(run)


def test_pushing_again_changes_nothing_and_another_checkpoint_replaces_it(hub, base_on_hub, run):
    write_metrics(run)
    push_model(run / "checkpoint_000005", "user/happy")
    before, num_puts = HfApi().model_info("user/happy").sha, len(puts(hub))
    push_model(run / "checkpoint_000005", "user/happy")
    assert HfApi().model_info("user/happy").sha == before and len(puts(hub)) == num_puts
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="user/happy")
    (run / "metrics.jsonl").unlink()
    push_model(run / "best", "user/happy")
    assert remote_json("user/happy", "emotions.json")["step"] == 10
    assert "notes.txt" in remote_files("user/happy")
    assert not {"metrics.jsonl", "loss.png"} & remote_files("user/happy")


def test_a_revision_is_a_branch_of_its_own(hub, base_on_hub, run):
    push_model(run / "checkpoint_000005", "user/happy")
    url = push_model(run / "best", "user/happy", revision="v2")
    assert url.endswith("/user/happy/tree/v2")
    assert remote_json("user/happy", "emotions.json")["step"] == 5
    assert remote_json("user/happy", "emotions.json", "v2")["step"] == 10


def test_the_number_of_requests_does_not_grow_with_the_checkpoint(hub, base_on_hub, run):
    push_model(run / "best", "user/happy")
    assert len(hub.requests) <= 40, hub.requests
    hub.requests.clear()
    push_model(run / "best", "user/happy")
    assert len(hub.requests) <= 20, hub.requests


# Refused pushes


ESD = CorpusTerms("esd", "ESD", "other", num_windows=4)
MINE = CorpusTerms("mine", "My voices", "unknown", num_windows=4)


@pytest.mark.parametrize(
    "corpora, problem, remedy",
    [
        ([RAVDESS, ESD], "trained on ESD", "--private"),
        ([MINE], "license is not stated", "--license-of mine=ID"),
        (None, "training data are unknown", "--private"),
    ],
)
def test_forbidden_or_unknown_licenses_are_pushed_to_private_repositories_only(
    hub, base_on_hub, run, corpora, problem, remedy
):
    (run / "corpora.json").unlink()
    if corpora is not None:
        write_corpora(corpora, run)
    with pytest.raises(UserError, match=problem) as error:
        push_model(run / "best", "user/happy")
    assert remedy in error.value.remedy and not HfApi().repo_exists("user/happy")
    push_model(run / "best", "user/happy", private=True)
    assert HfApi().model_info("user/happy").private


def test_a_license_given_by_the_user_is_on_the_card(hub, base_on_hub, run):
    write_corpora([MINE], run)
    push_model(run / "best", "user/happy", stated={"mine": "cc-by-nc-4.0"})
    assert HfApi().model_info("user/happy").card_data.license == "cc-by-nc-4.0"
    assert remote_json("user/happy", "corpora.json")[0]["license"] == "cc-by-nc-4.0"


def make_table(api):
    api.create_repo("user/taken")
    api.upload_file(repo_id="user/taken", path_or_fileobj=b"PAR1", path_in_repo="data/train/happy.parquet")


def make_foreign(api):
    api.create_repo("user/taken")
    api.upload_file(repo_id="user/taken", path_or_fileobj=b"weights", path_in_repo="pytorch_model.bin")


def make_broken(api):
    api.create_repo("user/taken")
    api.upload_file(repo_id="user/taken", path_or_fileobj=b"[1", path_in_repo="emotions.json")


@pytest.mark.parametrize(
    "make, what",
    [(make_table, "a table"), (make_foreign, "something other than a model"), (make_broken, "something other")],
)
def test_a_repository_with_something_else_is_left_alone(hub, base_on_hub, run, make, what):
    make(HfApi())
    before = HfApi().model_info("user/taken").sha
    for revision in (None, "branch"):
        with pytest.raises(UserError, match=f"exists and holds {what}") as error:
            push_model(run / "best", "user/taken", revision=revision)
        assert "Name another one" in error.value.remedy
    assert HfApi().model_info("user/taken").sha == before
    assert [branch.name for branch in HfApi().list_repo_refs("user/taken").branches] == ["main"]


def test_adapter_and_merged_model_and_those_of_other_bases_do_not_replace_each_other(hub, base_on_hub, run, local_run):
    api = HfApi()
    push_model(run / "best", "user/adapter")
    push_model(run / "best", "user/merged", merged=True)
    with pytest.raises(UserError, match="adapter of kyutai/tiny"):
        push_model(run / "best", "user/adapter", merged=True)
    with pytest.raises(UserError, match="merged model of kyutai/tiny"):
        push_model(run / "best", "user/merged")
    api.create_repo("user/same-base")
    api.upload_folder(repo_id="user/same-base", folder_path=find_checkpoint(BASE).moshi_weights.parent)
    with pytest.raises(UserError, match="adapter of kyutai/tiny"):
        push_model(local_run / "best", "user/adapter", base_model="user/same-base")


def cut_adapter(checkpoint):
    path = checkpoint / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize("damage, problem", [(cut_adapter, "damaged or truncated"), (empty, "no folder adapter/")])
def test_a_damaged_checkpoint_is_refused_before_anything_is_made(hub, base_on_hub, run, damage, problem):
    damage(run / "checkpoint_000010")
    with pytest.raises(UserError, match=problem):
        push_model(run / "checkpoint_000010", "user/happy")
    assert not HfApi().repo_exists("user/happy")


@pytest.mark.parametrize("other", [None, "checkpoint_000005"])
def test_the_files_for_moshi_are_written_from_the_adapter(hub, base_on_hub, run, other):
    push_model(run / "best", "user/happy")
    weights = run / "checkpoint_000010" / "consolidated" / "lora.safetensors"
    weights.unlink() if other is None else shutil.copy(run / other / "consolidated" / weights.name, weights)
    push_model(run / "best", "user/again")
    assert remote_oids("user/again")["lora.safetensors"] == remote_oids("user/happy")["lora.safetensors"]


def flip_last_bit(export):
    with open(export / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))


def change_delays(export):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"delays": [0] * 17}))


@pytest.mark.parametrize("change", [flip_last_bit, change_delays])
def test_a_merged_model_that_changed_after_its_export_is_refused(hub, base_on_hub, run, tmp_path, change):
    export = export_checkpoint(run / "best", tmp_path / "export", merged=True)
    change(export)
    with pytest.raises(UserError, match="not the one that was verified") as error:
        push_model(export, "user/happy")
    assert "--merged" in error.value.remedy and not HfApi().repo_exists("user/happy")


def test_a_merged_model_that_may_not_be_published_is_refused_before_its_weights_are_read(
    hub, base_on_hub, run, tmp_path
):
    export = export_checkpoint(run / "best", tmp_path / "export", merged=True)
    write_corpora([ESD], export)
    (export / "model.safetensors").unlink()
    with pytest.raises(UserError, match="trained on ESD"):
        push_model(export, "user/happy")


def test_a_merged_model_is_served_from_its_branch_although_the_main_branch_is_damaged(hub, base_on_hub, run):
    push_model(run / "best", "user/happy", merged=True, revision="v1")
    api = HfApi()
    api.upload_file(path_or_fileobj=b"{", path_in_repo="config.json", repo_id="user/happy")
    model = load_model(["user/happy"], revision="v1", device="cpu")
    assert model.emotions == ["happy"]
    model.close()


def test_an_empty_base_model_is_named(hub, base_on_hub, local_run):
    with pytest.raises(UserError, match="--base-model is empty"):
        push_model(local_run / "best", "user/happy", base_model="")


def test_the_adapter_folder_of_a_checkpoint_is_pushed_with_the_files_of_its_run(hub, base_on_hub, run):
    push_model(run / "best" / "adapter", "user/happy")
    assert remote_json("user/happy", "corpora.json")[0]["corpus"] == "ravdess"
    assert remote_json("user/happy", "emotions.json")["emotions"] == ["happy"]


def test_two_pushes_of_one_checkpoint_do_not_mix(hub, base_on_hub, run):
    with staging_folder(run / "checkpoint_000010"), pytest.raises(UserError, match="by another process"):
        push_model(run / "best", "user/happy")
    push_model(run / "best", "user/happy")


def test_leftovers_of_a_killed_push_are_not_published(hub, base_on_hub, run):
    left = run / ".checkpoint_000010.push" / "samples"
    left.mkdir(parents=True)
    (left / "old.wav").write_bytes(b"of another time")
    (left.parent / "lora.safetensors").write_bytes(b"half")
    push_model(run / "best", "user/happy")
    assert "samples/old.wav" not in remote_files("user/happy") and not leftovers(run)
    assert (snapshot("user/happy") / "lora.safetensors").stat().st_size > 1000


def hammer(checkpoint, moments):
    for _ in range(moments):
        try:
            with staging_folder(checkpoint) as folder:
                (folder / "alone").touch(exist_ok=False)
        except UserError as error:
            assert "by another process" in error.problem


def test_concurrent_pushes_never_share_a_staging_folder(tmp_path):
    checkpoint = tmp_path / "best"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(hammer, [checkpoint] * 3, [500] * 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to(path.parent / "mine")])
def test_a_link_or_file_of_the_staging_folders_name_is_not_touched(tmp_path, make):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    make(tmp_path / ".best.push")
    with pytest.raises(UserError, match="is not used"), staging_folder(tmp_path / "best"):
        pass
    assert (tmp_path / "mine" / "thesis.txt").is_file() and (tmp_path / ".best.push").exists()


def test_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch):
    (tmp_path / ".best.push").mkdir()
    monkeypatch.setattr("os.getuid", lambda: -2)
    with pytest.raises(UserError, match="another user's"), staging_folder(tmp_path / "best"):
        pass


def test_staging_falls_back_to_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    (tmp_path / ".abc.push").symlink_to(tmp_path / "mine")
    with staging_folder(tmp_path / "snapshots" / "abc") as one, staging_folder(tmp_path / "snapshots" / "abc") as two:
        assert one != two and not list(one.iterdir()) and one.stat().st_mode & 0o077 == 0
    assert (tmp_path / "mine" / "thesis.txt").is_file() and not one.exists()


# The token


@pytest.mark.parametrize("failing", [None, 500, "cut"])
def test_the_token_is_never_printed_logged_or_written(hub, base_on_hub, run, tmp_path, capfd, caplog, failing):
    caplog.set_level(logging.DEBUG)
    if failing is not None:
        hub.fail_after(8, status=None if failing == "cut" else failing)
    assert cli.main(["push", str(run / "best"), "--repo-id", "user/happy"]) == (0 if failing is None else 1)
    with suppress(UserError):
        cli.main(["push", str(run / "best"), "--repo-id", "user/happy", "--debug"])
    said = "".join(capfd.readouterr()) + caplog.text
    assert "user/happy" in said and hub.token not in said
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or hub.token.encode() not in path.read_bytes(), path
