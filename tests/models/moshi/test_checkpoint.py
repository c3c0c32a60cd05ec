import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import reset_sessions
from moshi.models import loaders

from hf_csm.errors import UserError
from hf_csm.models.family import TokenNLL
from hf_csm.models.moshi.checkpoint import base_urls, codec_sha256, find_checkpoint, load_mimi, load_tokenizer
from hf_csm.models.moshi.engine import open_engine
from hf_csm.models.moshi.lora import adapter_parameters, add_lora
from hf_csm.models.moshi.model import load_moshi, masked_nll
from tests.doubles.hub import LocalHub
from tests.doubles.random_adapter import randomize


@pytest.fixture(scope="module")
def checkpoint(tiny_moshi):
    return find_checkpoint(str(tiny_moshi))


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_moshi(checkpoint, dtype=torch.float32)


def random_codes(layout, batch=2, num_frames=9, seed=0, tail=None):
    """Codes `[B, K, T]` that end with `tail` frames of no token, by default as many as the largest delay."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(layout.text_card, (batch, 1, num_frames), generator=generator)
    audio = torch.randint(layout.card, (batch, layout.num_streams - 1, num_frames), generator=generator)
    codes = torch.cat([text, audio], dim=1)
    return torch.nn.functional.pad(codes, (0, layout.max_delay if tail is None else tail), value=-1)


def naive_nll(lm, codes):
    """One position after the other, from moshi's logits."""
    output = lm(codes)
    nll = torch.zeros(codes.shape)
    for b, k, t in torch.cartesian_prod(*(torch.arange(size) for size in codes.shape)).tolist():
        if codes[b, k, t] < 0 or k > lm.dep_q:
            continue
        logits = output.text_logits[b, 0, t] if k == 0 else output.logits[b, k - 1, t]
        if not logits.isnan().any():
            nll[b, k, t] = -logits.log_softmax(0)[codes[b, k, t]]
    return nll


def test_nll_is_that_of_moshis_logits_position_by_position(model):
    codes = random_codes(model.layout)
    codes[1, :, 6:] = -1
    codes[0, 0, :3] = -1
    with torch.no_grad():
        output = model(codes)
        expected = naive_nll(model.lm, codes)
    assert isinstance(output, TokenNLL)
    assert output.nll.dtype == torch.float32
    torch.testing.assert_close(output.nll, expected)
    assert torch.equal(output.mask, expected > 0)


def test_layout_is_that_of_moshi_7b(model):
    layout = model.layout
    assert (layout.num_streams, layout.num_predicted_streams, layout.max_delay) == (17, 9, 1)
    assert (layout.text_padding_id, layout.end_of_text_padding_id) == (3, 0)


def test_the_users_streams_and_missing_tokens_are_not_scored(model):
    codes = random_codes(model.layout)
    codes[:, 3, 2] = -1
    output = model(codes)
    assert not output.mask[:, 9:].any()
    assert not output.mask[codes == -1].any()
    assert (output.nll[~output.mask] == 0).all()
    assert (output.nll[output.mask] > 0).all()


def test_with_a_tail_of_the_largest_delay_no_target_is_lost_and_without_it_some_are(model):
    codes = random_codes(model.layout)
    assert torch.equal(model(codes).mask[:, :9], codes[:, :9] != -1)
    without_tail = random_codes(model.layout, tail=0)
    assert model(without_tail).mask[:, :9].sum() < without_tail[:, :9].numel()


def test_more_padding_changes_nothing(model):
    codes = random_codes(model.layout, tail=1)
    longer = random_codes(model.layout, tail=7)
    short, long = model(codes), model(longer)
    torch.testing.assert_close(long.nll[..., : codes.shape[-1]], short.nll)
    assert torch.equal(long.mask[..., : codes.shape[-1]], short.mask)
    assert not long.mask[..., codes.shape[-1] :].any()


@pytest.mark.parametrize("stream", [0, 1, 4, 8, 9, 13])
def test_changing_a_token_changes_no_nll_before_it(model, stream):
    codes = random_codes(model.layout, num_frames=10)
    changed = codes.clone()
    changed[:, stream, 6] = (changed[:, stream, 6] + 1) % model.layout.card
    before, after = model(codes).nll, model(changed).nll
    # Streams with a delay see the others' future by that delay and no more; in a frame, codebooks come in order.
    torch.testing.assert_close(before[:, :2, :6], after[:, :2, :6], rtol=0, atol=0)
    torch.testing.assert_close(before[..., :5], after[..., :5], rtol=0, atol=0)
    assert not torch.equal(before, after)


def test_the_logits_of_a_token_do_not_depend_on_it(model):
    codes = random_codes(model.layout)
    for stream in range(9):
        changed = codes.clone()
        changed[:, stream, 4] = (changed[:, stream, 4] + 1) % model.layout.card
        logits, other = model.lm(codes), model.lm(changed)
        if stream == 0:
            assert torch.equal(logits.text_logits[:, 0, 4], other.text_logits[:, 0, 4])
        else:
            assert torch.equal(logits.logits[:, stream - 1, 4], other.logits[:, stream - 1, 4])


def test_gradients_are_finite_although_logits_are_not(model):
    codes = random_codes(model.layout, tail=0)
    assert model.lm(codes).logits.isnan().any()
    output = model(codes)
    model.zero_grad()
    output.nll[output.mask].mean().backward()
    gradients = [weight.grad for weight in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    model.zero_grad()


def test_masked_nll_ignores_positions_outside_the_mask():
    logits = torch.tensor([[[[0.0, 0.0], [float("nan"), float("nan")]]]], requires_grad=True)
    nll = masked_nll(logits, torch.tensor([[[1, -7]]]), torch.tensor([[[True, False]]]))
    torch.testing.assert_close(nll, torch.tensor([[[0.6931472, 0.0]]]))
    nll.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[[[0.5, -0.5], [0.0, 0.0]]]]))


def test_gradient_checkpointing_gives_the_same_gradients_to_an_adapter_on_a_frozen_base(checkpoint):
    gradients = []
    for gradient_checkpointing in (False, True):
        model = load_moshi(checkpoint, dtype=torch.float32, gradient_checkpointing=gradient_checkpointing)
        add_lora(model, rank=2, alpha=4, target_modules="all-linear")
        model.train()
        randomize(model, std=0.05)
        model(random_codes(model.layout)).nll.mean().backward()
        gradients.append([weight.grad for weight in adapter_parameters(model)])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 9, 5), (17, 5), (1, 17, 0)])
def test_codes_of_another_shape_are_refused_with_the_shape_wanted(model, shape):
    with pytest.raises(ValueError, match=r"codes must be \[B, 17, T\]"):
        model(torch.zeros(shape, dtype=torch.int64))


def test_codes_of_another_dtype_are_refused(model):
    with pytest.raises(ValueError, match="int64"):
        model(torch.zeros(1, 17, 4, dtype=torch.int16))


def test_mimi_has_all_its_codebooks(checkpoint):
    mimi = load_mimi(checkpoint)
    assert mimi.num_codebooks == mimi.total_codebooks == 16


def test_codec_hash_follows_weights_and_settings_but_not_the_order_of_the_config(tiny_moshi, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_moshi, folder)
    original = codec_sha256(find_checkpoint(str(tiny_moshi)))
    config = json.loads((folder / "mimi.json").read_text())
    (folder / "mimi.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert codec_sha256(find_checkpoint(str(folder))) == original
    (folder / "mimi.json").write_text(json.dumps({**config, "frame_rate": 25.0}))
    assert codec_sha256(find_checkpoint(str(folder))) != original
    shutil.copy(tiny_moshi / "mimi.json", folder)
    weights = bytearray((folder / "mimi.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "mimi.safetensors").write_bytes(weights)
    assert codec_sha256(find_checkpoint(str(folder))) != original


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "mimi.safetensors", "tokenizer.model", "mimi.json"]
)
def test_a_folder_without_a_file_is_refused_by_its_name(tiny_moshi, tmp_path, name):
    folder = tmp_path / "base"
    shutil.copytree(tiny_moshi, folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name) as error:
        find_checkpoint(str(folder))
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_config_that_is_no_json_object_is_refused(tiny_moshi, tmp_path, content):
    folder = tmp_path / "base"
    shutil.copytree(tiny_moshi, folder)
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is not"):
        find_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "mimi.safetensors", "tokenizer.model"])
def test_a_truncated_file_is_refused_by_its_name(tiny_moshi, tmp_path, name):
    folder = tmp_path / "base"
    shutil.copytree(tiny_moshi, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    checkpoint = find_checkpoint(str(folder))
    load = {"model.safetensors": load_moshi, "mimi.safetensors": load_mimi, "tokenizer.model": load_tokenizer}[name]
    with pytest.raises(UserError, match=name) as error:
        load(checkpoint)
    assert len(str(error.value).splitlines()) == 2


def test_weights_of_another_size_than_in_the_config_are_refused(tiny_moshi, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_moshi, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dim": 32}))
    with pytest.raises(UserError, match="does not fit"):
        load_moshi(find_checkpoint(str(folder)))


def test_names_in_a_config_may_point_elsewhere(tiny_moshi, tmp_path):
    config = json.loads((tiny_moshi / "config.json").read_text())
    names = {key: f"file://{tiny_moshi / config[key]}" for key in config if key.endswith("_name")}
    (tmp_path / "config.json").write_text(json.dumps({**config, **names}))
    checkpoint = find_checkpoint(str(tmp_path))
    assert checkpoint.moshi_weights == tiny_moshi / "model.safetensors"
    assert checkpoint.mimi_weights == tiny_moshi / "mimi.safetensors"
    assert codec_sha256(checkpoint) == codec_sha256(find_checkpoint(str(tiny_moshi)))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nowhere", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_repository_is_refused(name):
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoint(name)


def test_a_repository_that_cannot_be_reached_is_refused_with_a_remedy():
    with pytest.raises(UserError, match="nobody/nothing"):
        find_checkpoint("nobody/nothing")


@pytest.fixture(scope="module")
def hub(tiny_moshi, tmp_path_factory):
    """A Hub with a base, whose main branch has gone on to other weights, and an adapter that was trained on `v1`."""
    with LocalHub(tmp_path_factory.mktemp("hub")) as running, running.connected(tmp_path_factory.mktemp("home")):
        api, folder = HfApi(), tmp_path_factory.mktemp("adapter")
        for name in ("base", "adapter", "merged", "peft", "nowhere"):
            api.create_repo(f"user/{name}")
        api.upload_folder(folder_path=tiny_moshi, repo_id="user/base")
        api.create_tag("user/base", tag="v1")
        api.upload_file(path_or_fileobj=b"other", path_in_repo="model.safetensors", repo_id="user/base")
        base = json.loads((tiny_moshi / "config.json").read_text())
        names = {key: f"hf://user/base/{name}" for key, name in base.items() if key.endswith("_name")}
        lora = {"lora": True, "lora_name": "lora.safetensors", "lora_rank": 4, "lora_scaling": 1.0}
        pinned = {"base_model_name_or_path": "user/base", "revision": "v1", "peft_type": "LORA"}
        emotions = {"control": "none", "emotions": [], "base_model": "user/base", "base_revision": "v1"}
        for name, files in (
            ("adapter", {"config.json": base | names | lora, "adapter_config.json": pinned}),
            ("merged", {"config.json": base | names | {"moshi_name": "model.safetensors"}, "emotions.json": emotions}),
            ("peft", {"adapter_config.json": pinned}),
            ("nowhere", {"config.json": base | names | {"mimi_name": "hf://user/base/lost.safetensors"}}),
        ):
            for path, content in files.items():
                (folder / path).write_text(json.dumps(content))
            for path in {"adapter": ["lora.safetensors"], "merged": ["model.safetensors"]}.get(name, []):
                (folder / path).write_text(name)
            if name == "peft":
                (folder / "adapter_model.safetensors").write_text("-")
            api.upload_folder(folder_path=folder, repo_id=f"user/{name}")
            for path in folder.iterdir():
                path.unlink()
        api.create_branch("user/adapter", branch="better")
    return running


@pytest.fixture
def connected(hub, tmp_path):
    with LocalHub(hub.folder) as running, running.connected(tmp_path / "home"):
        yield running


def test_a_hub_repository_remembers_its_name_and_revision(connected, tiny_moshi):
    checkpoint = find_checkpoint("user/base", revision="v1")
    assert (checkpoint.name_or_path, checkpoint.revision, checkpoint.is_local) == ("user/base", "v1", False)
    assert checkpoint.moshi_weights.read_bytes() == (tiny_moshi / "model.safetensors").read_bytes()
    lm = load_moshi(checkpoint).lm
    assert (lm.name_or_path, lm.revision) == ("user/base", "v1")
    assert find_checkpoint("user/base").moshi_weights.read_text() == "other"


@pytest.mark.parametrize("revision", [None, "better"])
def test_the_revision_of_an_adapter_is_not_that_of_its_base(connected, tiny_moshi, revision):
    checkpoint = find_checkpoint("user/adapter", revision)
    assert (checkpoint.name_or_path, checkpoint.revision) == ("user/adapter", revision)
    assert checkpoint.lora_weights.read_text() == "adapter"
    assert checkpoint.lm_config["lora_rank"] == 4
    # The base is the one that the adapter was trained on.
    assert checkpoint.moshi_weights.read_bytes() == (tiny_moshi / "model.safetensors").read_bytes()
    assert codec_sha256(checkpoint) == codec_sha256(find_checkpoint(str(tiny_moshi)))


def test_a_merged_repository_has_its_own_weights_and_the_codec_of_its_base(connected, tiny_moshi):
    checkpoint = find_checkpoint("user/merged")
    assert checkpoint.moshi_weights.read_text() == "merged"
    assert checkpoint.lora_weights is None
    assert checkpoint.mimi_weights == find_checkpoint("user/base", "v1").mimi_weights


def test_cached_checkpoints_need_no_network(connected, monkeypatch):
    found = find_checkpoint("user/adapter")
    connected.fail_after(0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    assert find_checkpoint("user/adapter") == found
    with pytest.raises(UserError, match="user/merged"):
        find_checkpoint("user/merged")
    found.mimi_weights.unlink()
    with pytest.raises(UserError, match="user/base.*mimi.safetensors.* cache"):
        find_checkpoint("user/adapter")


def test_the_first_repositories_have_no_config_and_are_moshi_7b(connected):
    api = HfApi()
    api.create_repo("user/legacy")
    for name in (loaders.MOSHI_NAME, loaders.MIMI_NAME, loaders.TEXT_TOKENIZER_NAME):
        api.upload_file(path_or_fileobj=name.encode(), path_in_repo=name, repo_id="user/legacy")
    checkpoint = find_checkpoint("user/legacy")
    assert checkpoint.moshi_weights.read_text() == loaders.MOSHI_NAME
    assert (checkpoint.lm_config, checkpoint.raw_config, checkpoint.mimi_config) == (None, None, None)
    assert (checkpoint.model_type, checkpoint.name_or_path) == ("moshi", "user/legacy")


def test_an_adapter_without_moshis_files_is_refused_with_the_way_to_them(connected):
    with pytest.raises(UserError, match="PEFT adapter without config.json") as error:
        find_checkpoint("user/peft")
    assert "hf-csm export user/peft" in error.value.remedy


def test_a_file_that_another_repository_lacks_is_named(connected):
    with pytest.raises(UserError, match=r"user/nowhere: hf://user/base/lost.safetensors \(mimi_name"):
        find_checkpoint("user/nowhere")


def test_only_the_named_files_of_a_repository_are_downloaded(connected):
    folder = find_checkpoint("user/adapter").lora_weights.parent
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert names == {"config.json", "adapter_config.json", "lora.safetensors"}


def test_the_urls_of_a_base_are_those_of_an_exported_config(connected, tiny_moshi):
    urls = [f"hf://user/base/{name}" for name in ("mimi.safetensors", "tokenizer.model", "mimi.json")]
    assert base_urls("user/base", "v1") == ("hf://user/base/model.safetensors", urls)
    assert base_urls("user/merged")[1] == urls
    assert base_urls(str(tiny_moshi))[0] == f"file://{tiny_moshi}/model.safetensors"


@pytest.mark.parametrize(
    "names, problem",
    [
        ({"moshi_name": "model.pt"}, r"model\.pt \(moshi_name\), which is not in safetensors"),
        ({"mimi_name": "hf://user/base/mimi.bin"}, r"mimi\.bin \(mimi_name\), which is not in safetensors"),
        ({"tokenizer_name": "file:///etc/passwd"}, "file:///etc/passwd"),
        ({"moshi_name": "../../../x.safetensors"}, "outside of the repository"),
        (None, "config.json is not JSON"),
        ({"moshi_name": "gone.safetensors"}, "the Hub repository user/hostile has no such file"),
    ],
)
def test_a_wrong_config_of_a_repository_is_refused(tmp_path, names, problem):
    with LocalHub(tmp_path / "hub") as hub, hub.connected(tmp_path / "home"):
        HfApi().create_repo("user/hostile")
        content = b"{" if names is None else json.dumps(names).encode()
        HfApi().upload_file(path_or_fileobj=content, path_in_repo="config.json", repo_id="user/hostile")
        with pytest.raises(UserError, match=problem) as error:
            find_checkpoint("user/hostile")
    assert error.value.remedy
    assert not [request for request in hub.requests if "passwd" in request or "x.safetensors" in request]


def test_a_repository_without_a_model_is_refused(connected):
    HfApi().create_repo("user/empty", exist_ok=True)
    HfApi().upload_file(path_or_fileobj=b"-", path_in_repo="README.md", repo_id="user/empty")
    with pytest.raises(UserError, match="has no such file") as error:
        find_checkpoint("user/empty")
    assert "Moshi model or adapter" in error.value.remedy


@pytest.fixture
def training_checkpoint(tiny_moshi, tmp_path):
    """`run/checkpoint_000500` with what moshi loads, which names files of the tiny base, and a PEFT config."""
    folder = tmp_path / "run" / "checkpoint_000500"
    shutil.copytree(tiny_moshi, folder / "consolidated")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


def test_of_a_training_checkpoint_moshis_files_are_taken(training_checkpoint):
    (training_checkpoint.parent / "best").symlink_to(training_checkpoint.name)
    for folder in (training_checkpoint, training_checkpoint.parent / "best"):
        found = find_checkpoint(str(folder))
        assert found.moshi_weights == training_checkpoint / "consolidated" / "model.safetensors"


def test_a_training_checkpoint_remembers_the_revision_of_its_base(connected, training_checkpoint, tiny_moshi):
    config_path = training_checkpoint / "consolidated" / "config.json"
    config = json.loads(config_path.read_text()) | {"moshi_name": "hf://user/base/model.safetensors"}
    config_path.write_text(json.dumps(config))
    assert find_checkpoint(str(training_checkpoint)).moshi_weights.read_text() == "other"
    pinned = {"base_model_name_or_path": "user/base", "revision": "v1"}
    (training_checkpoint / "adapter" / "adapter_config.json").write_text(json.dumps(pinned))
    weights = find_checkpoint(str(training_checkpoint)).moshi_weights
    assert weights.read_bytes() == (tiny_moshi / "model.safetensors").read_bytes()


def test_the_folder_of_a_run_is_refused_with_a_checkpoint_of_it(training_checkpoint):
    with pytest.raises(UserError, match="run has no config.json") as error:
        find_checkpoint(str(training_checkpoint.parent))
    assert "checkpoint_000500" in error.value.remedy


def test_a_local_folder_has_no_revision(tiny_moshi):
    with pytest.raises(UserError, match="no revision 'v1'"):
        find_checkpoint(str(tiny_moshi), "v1")


@pytest.mark.parametrize(
    "change",
    [
        {"lm_gen_config": 3},
        {"lm_gen_config": {"temp": "hot"}},
        {"mimi_config_name": "config.json"},
        {"dim": 0},
        {"dim": 65},
        {"num_heads": 3},
    ],
)
def test_an_odd_config_is_an_error_of_two_lines(tiny_moshi, tmp_path, change):
    folder = tmp_path / "odd"
    shutil.copytree(tiny_moshi, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as error:
        open_engine(find_checkpoint(str(folder)))
    assert "odd" in error.value.problem and "\n" not in error.value.problem + error.value.remedy
    assert not error.value.problem.endswith(": ")
