import shutil

import numpy as np
import pytest
import torch

from hf_csm.errors import UserError
from hf_csm.models.device import choose_device
from hf_csm.serving.loaded import check_strength, load_model, load_weights
from hf_csm.serving.resolve import BASE, resolve_models
from hf_csm.serving.server.steering import SessionOptions, Steering, SteeringRequest, SteeringState
from hf_csm.units import SAMPLES_PER_FRAME


NUM_FRAMES = 4


@pytest.fixture(scope="module")
def model(expressive, calm):
    model = load_model([str(expressive), str(calm)], device="cpu", use_sampling=False)
    yield model
    model.close()


def converse(model, adapter, emotion=None, strength=1.0):
    """Return the text tokens and codes of a conversation, `[1 + Q, T]`."""
    rng = np.random.default_rng(0)
    model.engine.reset(0, seed=0)
    model.steer(0, model.choose(emotion, adapter), emotion, strength)
    tokens = []
    for _ in range(NUM_FRAMES):
        frame = 0.1 * rng.standard_normal(SAMPLES_PER_FRAME, dtype=np.float32)
        tokens += [np.append(frames.text_token, frames.codes) for frames in model.engine.step({0: frame}).values()]
    return np.stack(tokens, axis=1)


def test_each_choice_uses_only_its_adapter(model, expressive, calm, tiny_moshi):
    """Adapters loaded together give the same tokens as each loaded alone."""
    frames = [converse(model, name) for name in ("expressive", "calm", BASE)]
    for together, place in zip(frames, (expressive, calm, tiny_moshi), strict=True):
        alone = load_model([str(place)], device="cpu", use_sampling=False)
        assert np.array_equal(together, converse(alone, alone.choices[0].name)), place
        alone.close()
    assert not np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])
    assert not np.array_equal(frames[1], frames[2])


def test_strength_0_equals_the_base_model(model):
    base, none, half, whole = (
        converse(model, *how) for how in ((BASE,), ("calm", None, 0.0), ("calm", None, 0.5), ("calm", None, 1.0))
    )
    assert np.array_equal(base, none)
    assert not np.array_equal(half, none)
    assert not np.array_equal(half, whole)


def test_prefix_is_forced_only_for_adapters_that_take_one(model):
    prefix = model.tokenizer.encode("(sad)")
    assert converse(model, "expressive", "sad")[0].tolist() == prefix[: NUM_FRAMES - 1]
    assert np.array_equal(converse(model, BASE, "sad"), converse(model, BASE))
    assert model.prefix(model.choose("sad"), "sad") == prefix
    assert model.prefix(model.choose("sad"), None) == []
    assert model.prefix(model.choose("calm"), "calm") == []


FRAME = np.zeros(SAMPLES_PER_FRAME, dtype=np.float32)


def texts(model, num_frames):
    """Return the next text tokens, and the forced ones among them."""
    frames = [frame for _ in range(num_frames) for frame in model.engine.step({0: FRAME}).values()]
    return [frame.text_token for frame in frames], [frame.text_token for frame in frames if frame.is_forced]


def start(model):
    """Start a conversation with the adapter that takes a prefix; return a function that sends steering requests."""
    options = SessionOptions(Steering("expressive", "happy", 1.0), 0, "opus", False)
    state = SteeringState(model, 0, options)
    state.start()
    return lambda **changes: state.on_request(SteeringRequest(sets_emotion="emotion" in changes, **changes))


def test_last_of_several_requests_sets_the_prefix(model):
    request = start(model)
    for emotion in ("sad", "angry", None, "happy", "sad"):
        request(emotion=emotion)
    for _ in range(100):
        request(now=True)
    prefix = model.tokenizer.encode("(sad)")
    tokens, forced = texts(model, len(prefix) + 6)
    assert tokens[: len(prefix)] == forced == prefix


def test_partly_forced_prefix_is_followed_by_the_whole_new_one(model):
    request = start(model)
    delay = max(model.engine.lm.delays)
    texts(model, delay + 2)
    request(emotion="sad")
    happy, sad = (model.tokenizer.encode(f"({emotion})") for emotion in ("happy", "sad"))
    tokens, forced = texts(model, len(sad) + 6)
    assert tokens[: delay + len(sad)] == forced == happy[2 : 2 + delay] + sad


@pytest.mark.parametrize("change", [{"adapter": BASE}, {"adapter": "calm"}, {"emotion": None}])
def test_queued_prefix_is_dropped_by_a_choice_without_prefix(model, change):
    start(model)(**change)
    tokens, forced = texts(model, 8)
    assert forced == []
    model.engine.reset(0, seed=0)
    model.steer(0, model.choose(None, change.get("adapter")), None)
    assert texts(model, 8)[0] == tokens


def test_strength_change_keeps_the_queued_prefix(model):
    request = start(model)
    request(strength=0.5)
    assert texts(model, 12)[1] == model.tokenizer.encode("(happy)")


def test_set_strength_forces_no_text(model):
    choice = model.choose(None, "calm")
    model.engine.reset(0, seed=0)
    model.steer(0, choice, "calm", 1.0)
    model.set_strength(0, choice, 0.0)
    frame = np.zeros(SAMPLES_PER_FRAME, dtype=np.float32)
    changed = [model.engine.step({0: frame}) for _ in range(4)][-1][0]
    model.engine.reset(0, seed=0)
    model.steer(0, model.choose(None, BASE), None)
    base = [model.engine.step({0: frame}) for _ in range(4)][-1][0]
    assert np.array_equal(changed.codes, base.codes)


def test_slots_use_different_adapters(expressive, calm):
    model = load_model([str(expressive), str(calm)], device="cpu", num_slots=2, use_sampling=False)
    model.steer(0, model.choose("happy"), "happy")
    model.steer(1, model.choose("calm"), "calm")
    frame = np.zeros(SAMPLES_PER_FRAME, dtype=np.float32)
    frames = [model.engine.step({0: frame, 1: frame}) for _ in range(6)]
    first, second = ([frames[slot] for frames in frames if slot in frames] for slot in (0, 1))
    prefix = model.tokenizer.encode("(happy)")
    assert [frames.text_token for frames in first] == prefix[: len(first)]
    assert [frames.text_token for frames in second] != prefix[: len(second)]
    model.close()


def test_base_model_alone(tiny_moshi):
    model = load_model([str(tiny_moshi)], device="cpu")
    assert converse(model, None).shape[0] == 9
    assert (model.base_name, model.emotions) == (str(tiny_moshi), [])
    model.close()


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_default_dtype_on_a_cpu_is_float32(tiny_moshi, dtype, expected):
    model = load_model([str(tiny_moshi)], device="cpu", dtype=dtype)
    assert model.engine.lm.dtype == expected
    model.close()


def test_sampling_options_from_config_json_can_be_overridden(tiny_moshi):
    models = resolve_models([str(tiny_moshi)])
    models.base.lm_gen_config = {"temp": 0.1, "top_k_text": 3, "use_sampling": True, "cfg_coef": 2.0}
    with pytest.warns(UserWarning, match="cfg_coef"):
        model = load_weights(models, text_temperature=0.2, temperature=None)
    generator = model.engine._generator
    assert (generator.temp, generator.temp_text, generator.top_k_text, generator.cfg_coef) == (0.1, 0.2, 3, 1.0)
    model.close()


def test_adapter_with_shapes_of_another_base_is_refused(expressive, calm, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(calm, wrong)
    shutil.copy(expressive / "lora.safetensors", wrong)
    with pytest.raises(UserError, match=r"(?s)wrong.*rank 2"):
        load_model([str(wrong)], device="cpu")


@pytest.mark.parametrize("name", ["cuda:99", "abacus"])
def test_unavailable_device_is_refused(name):
    with pytest.raises(UserError, match=f"--device {name} cannot be used"):
        choose_device(name)


def test_out_of_memory_is_reported(tiny_moshi, monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("hf_csm.models.moshi.engine.load_moshi", no_memory)
    with pytest.raises(UserError, match="device memory with 1 slot"):
        load_model([str(tiny_moshi)], device="cpu")


@pytest.mark.parametrize("strength", [-0.1, 2.1, float("nan"), float("inf")])
def test_strength_out_of_range_is_refused(strength):
    assert check_strength(0.0) == 0.0
    assert check_strength(2.0) == 2.0
    with pytest.raises(UserError, match="strength"):
        check_strength(strength)
