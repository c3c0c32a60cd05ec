import json
import shutil

import peft
import pytest
import torch
from huggingface_hub import HfApi

from hf_csm.cli import main
from hf_csm.errors import UserError
from hf_csm.mixture.provenance import read_corpora
from hf_csm.models.emotion_control import EmotionControl, read_emotion_control
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.lora import adapter_parameters, load_adapter, save_adapter
from hf_csm.models.moshi.model import load_moshi
from hf_csm.models.moshi.verify import verify_export
from hf_csm.publish.export import export_checkpoint
from hf_csm.publish.push_model import push_model
from tests.doubles.random_adapter import PROJECTIONS, random_adapter


@pytest.fixture(scope="module")
def base(tiny_moshi):
    return find_checkpoint(str(tiny_moshi))


@pytest.fixture(scope="module")
def model(base):
    return random_adapter(base, names=PROJECTIONS)


@pytest.fixture
def checkpoint_dir(model, tmp_path):
    folder = tmp_path / "checkpoint_000010"
    save_adapter(model, folder / "adapter")
    return folder


def test_a_folder_with_other_things_is_not_replaced(checkpoint_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        export_checkpoint(checkpoint_dir, out)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_files_of_the_names_of_an_export_are_not_replaced(checkpoint_dir, tmp_path):
    (tmp_path / "mine" / "samples").mkdir(parents=True)
    for name in ("README.md", "model.safetensors", "samples/recording.wav"):
        (tmp_path / "mine" / name).write_text("years of work")
    with pytest.raises(UserError, match=r"mine: is not an export.*README\.md"):
        export_checkpoint(checkpoint_dir, tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file"):
        export_checkpoint(checkpoint_dir, tmp_path / "file")
    assert (tmp_path / "mine" / "samples" / "recording.wav").read_text() == "years of work"


def test_an_export_replaces_an_older_one_behind_a_link_and_the_leftovers_of_a_killed_one(checkpoint_dir, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / ".real.export" / "samples").mkdir(parents=True)
    (tmp_path / ".real.export" / "lora.safetensors").write_text("half")
    for _ in range(2):
        export_checkpoint(checkpoint_dir, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "lora.safetensors").stat().st_size > 1000
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert "lock" not in {path.name for path in (tmp_path / "real").iterdir()}


def test_an_export_leaves_the_parts_of_an_interrupted_table_and_the_target_of_a_link_alone(checkpoint_dir, tmp_path):
    part = tmp_path / ".out.partial" / "parts" / "a.arrow"
    part.parent.mkdir(parents=True)
    part.write_text("hours of work")
    export_checkpoint(checkpoint_dir, tmp_path / "out")
    assert part.read_text() == "hours of work"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / ".other.export").symlink_to("mine")
    with pytest.raises(UserError, match="is a link"):
        export_checkpoint(checkpoint_dir, tmp_path / "other")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    "change",
    [
        {"r": "x"},
        {"r": 0},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"target_modules": "nothing"},
        {"target_modules": ["nothing"]},
        {"target_modules": "("},
        {"target_modules": 3},
        {"layers_to_transform": [0]},
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_a_damaged_adapter_config_is_an_error_of_two_lines(checkpoint_dir, tmp_path, change, merged):
    path = checkpoint_dir / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        export_checkpoint(checkpoint_dir, tmp_path / "out", merged=merged)
    assert str(checkpoint_dir) in error.value.problem
    assert "\n" not in error.value.problem + error.value.remedy and not (tmp_path / "out").exists()


def test_a_training_checkpoint_becomes_a_folder_for_peft_and_for_moshi(checkpoint_dir, model, base, tmp_path):
    out = export_checkpoint(checkpoint_dir, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "emotions.json",
        "lora.safetensors",
    ]
    assert verify_export(out, checkpoint_dir / "adapter", base, dtype=torch.float32) < 1e-4
    assert isinstance(peft.PeftModel.from_pretrained(load_moshi(base).lm, str(out)), peft.PeftModel)
    loaded = load_adapter(load_moshi(base), out)
    assert all(torch.equal(a, b) for a, b in zip(adapter_parameters(loaded), adapter_parameters(model), strict=True))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_checkpoint_with_a_truncated_or_missing_file_is_refused(checkpoint_dir, tmp_path, name):
    path = checkpoint_dir / "adapter" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=name):
        export_checkpoint(checkpoint_dir, tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match=name):
        export_checkpoint(checkpoint_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_adapter_or_base_is_refused(checkpoint_dir, tmp_path):
    config_path = checkpoint_dir / "adapter" / "adapter_config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone"):
        export_checkpoint(checkpoint_dir, tmp_path / "out")
    shutil.rmtree(checkpoint_dir / "adapter")
    with pytest.raises(UserError, match="adapter/"):
        export_checkpoint(checkpoint_dir, tmp_path / "out")


def test_an_export_lists_the_emotions_of_the_run(run, base_on_hub, tmp_path):
    out = export_checkpoint(run / "best", tmp_path / "out")
    assert read_emotion_control(out) == EmotionControl("prefix", "({emotion})", ("happy",), base_on_hub, None, 10)
    assert read_corpora(out) == read_corpora(run)


def test_an_adapter_on_the_hub_is_exported_at_its_revision(run, base_on_hub, tmp_path):
    push_model(run / "checkpoint_000005", "user/adapter", revision="old")
    push_model(run / "checkpoint_000010", "user/adapter")
    out = tmp_path / "out"
    for step, more in ((5, ["--revision", "old"]), (10, [])):
        assert main(["export", "user/adapter", "--out", str(out), *more]) == 0
        trained = run / f"checkpoint_{step:06d}"
        for name in ("config.json", "lora.safetensors"):
            assert (out / name).read_bytes() == (trained / "consolidated" / name).read_bytes()
        weights = (trained / "adapter" / "adapter_model.safetensors").read_bytes()
        assert (out / "adapter_model.safetensors").read_bytes() == weights
        assert read_emotion_control(out) == EmotionControl(
            "prefix", "({emotion})", ("happy",), base_on_hub, None, step
        )
        assert [terms.corpus for terms in read_corpora(out)] == ["ravdess"]


@pytest.mark.slow
def test_an_adapter_on_the_hub_is_merged_as_its_checkpoint_is(run, base_on_hub, tmp_path):
    push_model(run / "best", "user/adapter")
    local, pulled = (
        export_checkpoint(source, tmp_path / name, merged=True)
        for source, name in ((run / "best", "local"), ("user/adapter", "pulled"))
    )
    names = {path.name for path in local.iterdir()}
    assert names == {path.name for path in pulled.iterdir()} == {
        "config.json", "config.yaml", "corpora.json", "emotions.json", "model.safetensors"
    }  # fmt: skip
    assert all((local / name).read_bytes() == (pulled / name).read_bytes() for name in names)


def test_an_adapter_of_peft_alone_is_exported(run, base_on_hub, tmp_path):
    HfApi().create_repo("user/peft")
    HfApi().upload_folder(folder_path=run / "best" / "adapter", repo_id="user/peft")
    out = export_checkpoint("user/peft", tmp_path / "out")
    weights = (run / "best" / "consolidated" / "lora.safetensors").read_bytes()
    assert (out / "lora.safetensors").read_bytes() == weights
    assert read_emotion_control(out) == EmotionControl(base_model=base_on_hub)
    assert find_checkpoint(str(out)).lora_weights == out / "lora.safetensors"


def test_a_repository_without_adapter_is_refused_before_weights_are_downloaded(hub, base_on_hub, tmp_path, capsys):
    with pytest.raises(UserError, match="kyutai/tiny has no folder adapter/") as error:
        export_checkpoint(base_on_hub, tmp_path / "out")
    assert "Hub repository with an adapter" in error.value.remedy
    assert not [request for request in hub.requests if "safetensors" in request and "adapter_model" not in request]
    capsys.readouterr()
    assert main(["export", "user/none", "--out", str(tmp_path / "out")]) == 1
    problem, remedy = capsys.readouterr().err.splitlines()
    assert "user/none: no such folder, and the Hub has no such repository" in problem and "spelling" in remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", [None, 5, ""])
def test_an_adapter_that_names_no_base_is_refused(run, tmp_path, base):
    path = run / "checkpoint_000010" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(UserError, match="which base model"):
        export_checkpoint(run / "best", tmp_path / "out")
