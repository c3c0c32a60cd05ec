import json
import shutil

import peft
import pytest
import torch
from huggingface_hub import HfApi
from moshi.models import loaders
from safetensors.torch import load_file, save_file

from hf_csm.cli import main
from hf_csm.data.terms import read_corpora
from hf_csm.errors import UserError
from hf_csm.export.emotions import EmotionControl, read_emotion_control
from hf_csm.export.native import (
    ExportError,
    check_native_keys,
    export_checkpoint,
    export_native,
    serving_config,
    verify_native,
)
from hf_csm.export.push_model import push_model
from hf_csm.models.lora import adapter_parameters, add_lora, linear_paths, load_adapter, save_adapter
from hf_csm.models.moshi import find_checkpoint, load_moshi
from hf_csm.testing.hub import LocalHub


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tiny_moshi):
    return find_checkpoint(str(tiny_moshi))


def trained(base, names=PROJECTIONS, dtype=torch.float32):
    model = add_lora(load_moshi(base, dtype=dtype), rank=4, alpha=6, target_modules=names)
    for number, weight in enumerate(adapter_parameters(model)):
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(number))
    return model.eval()


@pytest.fixture(scope="module")
def model(base):
    return trained(base)


@pytest.fixture
def exported(model, base, tmp_path):
    return export_native(model, base, tmp_path / "native")


@pytest.mark.parametrize("names", [PROJECTIONS, ["out_projs"], "all-linear"])
def test_what_moshi_loads_is_the_trained_model(base, tmp_path, names):
    model = trained(base, names)
    folder = export_native(model, base, tmp_path / "native")
    assert verify_native(folder, model, base) < 1e-4
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "lora.safetensors"]


def test_in_bfloat16_only_rounding_differs(base, tmp_path):
    model = trained(base, dtype=torch.bfloat16)
    assert 0 < verify_native(export_native(model, base, tmp_path / "native"), model, base) < 0.2


def test_every_linear_layer_has_weights_and_the_untouched_ones_are_zero(base, tmp_path):
    model = trained(base, ["out_projs"])
    weights = load_file(export_native(model, base, tmp_path / "native") / "lora.safetensors")
    paths = linear_paths(load_moshi(base).lm)
    assert weights.keys() == {f"{path}.lora_{part}.weight" for path in paths for part in "AB"}
    for path in paths:
        assert weights[f"{path}.lora_B.weight"].any() == ("out_projs" in path)


def test_the_config_serves_from_anywhere(exported, tiny_moshi):
    config = json.loads((exported / "config.json").read_text())
    assert (config["lora"], config["lora_name"], config["lora_rank"]) == (True, "lora.safetensors", 4)
    assert config["lora_scaling"] == 1.5
    assert config["moshi_name"] == f"file://{tiny_moshi}/model.safetensors"
    # As `moshi.server --hf-repo user/adapter` does, with the adapter's own files already downloaded.
    found = loaders.CheckpointInfo.from_hf_repo(
        "user/adapter", config_path=exported / "config.json", lora_weights=exported / "lora.safetensors"
    )
    assert found.get_moshi(fuse_lora=True).dim == 64
    assert found.get_mimi().frame_rate == 12.5
    assert found.get_text_tokenizer().vocab_size() == 512


def test_a_base_on_the_hub_is_named_by_its_repository(tiny_moshi, tmp_path):
    with LocalHub(tmp_path / "hub") as hub, hub.connected(tmp_path / "home"):
        HfApi().create_repo("user/tiny")
        HfApi().upload_folder(folder_path=tiny_moshi, repo_id="user/tiny")
        config = serving_config(find_checkpoint("user/tiny"))
    assert config["moshi_name"] == "hf://user/tiny/model.safetensors"
    assert config["mimi_name"] == "hf://user/tiny/mimi.safetensors"
    assert config["mimi_config_name"] == "hf://user/tiny/mimi.json"
    assert config["tokenizer_name"] == "hf://user/tiny/tokenizer.model"
    assert config["dim"] == 64


def test_a_base_without_config_is_moshi_7b(base):
    legacy = type(base)(**{**vars(base), "lm_config": None, "raw_config": None, "name_or_path": "someone/legacy"})
    config = serving_config(legacy)
    assert config["dim"] == 4096
    assert config["moshi_name"] == "hf://someone/legacy/model.safetensors"
    assert "mimi_config_name" not in config


def test_an_exported_folder_is_found_as_an_adapter_and_refused_as_a_base(exported):
    found = find_checkpoint(str(exported))
    assert found.get_moshi(fuse_lora=True).dim == 64
    with pytest.raises(UserError, match="LoRA adapter, not a base"):
        load_moshi(found)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda state: state.pop("text_linear.lora_A.weight"), "text_linear.lora_A.weight: missing"),
        (lambda state: state.update(other=torch.zeros(1)), "other"),
        (lambda state: state.update({"text_linear.lora_A.weight": torch.zeros(3, 64)}), "(3, 64) instead of (4, 64)"),
    ],
)
def test_weights_that_moshi_could_not_load_are_an_error(exported, base, damage, complaint):
    state = load_file(exported / "lora.safetensors")
    damage(state)
    save_file(state, exported / "lora.safetensors")
    with pytest.raises(ExportError) as error:
        check_native_keys(exported, base)
    assert complaint in str(error.value)


def test_a_weight_off_by_little_is_an_error_that_says_by_how_much(exported, model, base):
    state = load_file(exported / "lora.safetensors")
    state["transformer.layers.0.gating.linear_in.lora_A.weight"][0, 0] += 0.25
    save_file(state, exported / "lora.safetensors")
    check_native_keys(exported, base)
    with pytest.raises(ExportError, match=r"linear_in\.lora_A.* by up to 0\.25"):
        verify_native(exported, model, base)


def test_another_scaling_is_an_error(exported, model, base):
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, "lora_scaling": 1.0}))
    with pytest.raises(ExportError, match="scaling"):
        verify_native(exported, model, base)


def test_another_base_is_an_error_that_says_how_far_off_the_logits_are(exported, model, base, tiny_moshi, tmp_path):
    weights = load_file(tiny_moshi / "model.safetensors")
    weights["text_linear.weight"] = weights["text_linear.weight"] * 1.5
    save_file(weights, tmp_path / "other.safetensors")
    config = json.loads((exported / "config.json").read_text())
    moved = {**config, "moshi_name": f"file://{tmp_path}/other.safetensors"}
    (exported / "config.json").write_text(json.dumps(moved))
    with pytest.raises(ExportError, match="off by up to"):
        verify_native(exported, model, base)


@pytest.mark.parametrize("name", ["config.json", "lora.safetensors"])
def test_a_truncated_export_is_refused(exported, base, name):
    content = (exported / name).read_bytes()
    (exported / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name):
        check_native_keys(exported, base)


def test_a_failed_export_leaves_the_old_one_and_nothing_beside_it(exported, model, base, monkeypatch):
    before = (exported / "lora.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_csm.export.native.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_native(model, base, exported)
    assert (exported / "lora.safetensors").read_bytes() == before
    assert [path.name for path in exported.parent.iterdir()] == ["native"]


def test_a_folder_with_other_things_is_not_replaced(model, base, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        export_native(model, base, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.fixture
def checkpoint_dir(model, tmp_path):
    folder = tmp_path / "checkpoint_000010"
    save_adapter(model, folder / "adapter")
    return folder


def test_a_training_checkpoint_becomes_a_folder_for_peft_and_for_moshi(checkpoint_dir, model, base, tmp_path):
    out = export_checkpoint(checkpoint_dir, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "emotions.json",
        "lora.safetensors",
    ]
    assert verify_native(out, model, base) < 1e-4
    assert isinstance(peft.PeftModel.from_pretrained(load_moshi(base).lm, str(out)), peft.PeftModel)
    loaded = load_adapter(load_moshi(base), out)
    assert all(torch.equal(a, b) for a, b in zip(adapter_parameters(loaded), adapter_parameters(model), strict=True))


def test_the_adapter_folder_alone_gives_the_same_files_as_the_model(checkpoint_dir, exported, base, tmp_path):
    out = export_native(checkpoint_dir / "adapter", base, tmp_path / "again")
    for name in ("config.json", "lora.safetensors"):
        assert (out / name).read_bytes() == (exported / name).read_bytes()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_checkpoint_with_a_truncated_or_missing_file_is_refused(checkpoint_dir, tmp_path, name):
    path = checkpoint_dir / "adapter" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged or cut short"):
        export_checkpoint(checkpoint_dir, tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match=name):
        export_checkpoint(checkpoint_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_adapter_or_whose_base_is_gone_is_refused(checkpoint_dir, tmp_path):
    config_path = checkpoint_dir / "adapter" / "adapter_config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone"):
        export_checkpoint(checkpoint_dir, tmp_path / "out")
    shutil.rmtree(checkpoint_dir / "adapter")
    with pytest.raises(UserError, match="adapter/"):
        export_checkpoint(checkpoint_dir, tmp_path / "out")


def test_an_export_says_which_emotions_the_run_was_trained_on(run, base_on_hub, tmp_path):
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


def test_what_has_no_adapter_is_refused_before_weights_are_fetched(hub, base_on_hub, tmp_path, capsys):
    with pytest.raises(UserError, match="kyutai/tiny has no folder adapter/ and is no PEFT adapter") as error:
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
    with pytest.raises(UserError, match="does not say which base model"):
        export_checkpoint(run / "best", tmp_path / "out")
