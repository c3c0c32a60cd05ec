import shutil

import numpy as np
import pytest
import torch

from hf_csm.errors import UserError
from hf_csm.serving.loaded import BASE, check_strength, choose_device, find_models, load_models, load_speaker
from hf_csm.serving.server.steering import Opening, Steering, Talk, Wish
from hf_csm.units import SAMPLES_PER_FRAME


NUM_FRAMES = 4


@pytest.fixture(scope="module")
def speaker(expressive, calm):
    speaker = load_speaker([str(expressive), str(calm)], device="cpu", use_sampling=False)
    yield speaker
    speaker.close()


def talk(speaker, voice, emotion=None, strength=1.0):
    """Return the text tokens and codes of a conversation, `[1 + Q, T]`."""
    rng = np.random.default_rng(0)
    speaker.engine.reset(0, seed=0)
    speaker.steer(0, speaker.choose(emotion, voice), emotion, strength)
    tokens = []
    for _ in range(NUM_FRAMES):
        frame = 0.1 * rng.standard_normal(SAMPLES_PER_FRAME, dtype=np.float32)
        tokens += [np.append(said.text_token, said.codes) for said in speaker.engine.step({0: frame}).values()]
    return np.stack(tokens, axis=1)


def test_each_voice_speaks_with_its_adapter_alone(speaker, expressive, calm, tiny_moshi):
    """Loaded together, each gives what it gives loaded by itself, and the base what it gives without any."""
    said = [talk(speaker, name) for name in ("expressive", "calm", BASE)]
    for together, place in zip(said, (expressive, calm, tiny_moshi), strict=True):
        alone = load_speaker([str(place)], device="cpu", use_sampling=False)
        assert np.array_equal(together, talk(alone, alone.voices[0].name)), place
        alone.close()
    assert not np.array_equal(said[0], said[1])
    assert not np.array_equal(said[0], said[2])
    assert not np.array_equal(said[1], said[2])


def test_strength_0_is_the_base_and_others_lie_between(speaker):
    base, none, half, whole = (
        talk(speaker, *how) for how in ((BASE,), ("calm", None, 0.0), ("calm", None, 0.5), ("calm", None, 1.0))
    )
    assert np.array_equal(base, none)
    assert not np.array_equal(half, none)
    assert not np.array_equal(half, whole)


def test_the_prefix_is_told_to_a_voice_that_takes_it_and_to_no_other(speaker):
    prefix = speaker.tokenizer.encode("(sad)")
    assert talk(speaker, "expressive", "sad")[0].tolist() == prefix[: NUM_FRAMES - 1]
    assert np.array_equal(talk(speaker, BASE, "sad"), talk(speaker, BASE))
    assert speaker.prefix(speaker.choose("sad"), "sad") == prefix
    assert speaker.prefix(speaker.choose("sad"), None) == []
    assert speaker.prefix(speaker.choose("calm"), "calm") == []


FRAME = np.zeros(SAMPLES_PER_FRAME, dtype=np.float32)


def texts(speaker, num_frames):
    """Return the next text tokens, and those of them that Moshi was told."""
    said = [frame for _ in range(num_frames) for frame in speaker.engine.step({0: FRAME}).values()]
    return [frame.text_token for frame in said], [frame.text_token for frame in said if frame.is_forced]


def begin(speaker):
    """Begin a conversation with the voice that takes prefixes; return what steers it."""
    opening = Opening(Steering("expressive", "happy", 1.0), 0, "opus", False)
    talk = Talk(speaker, 0, opening)
    talk.begin()
    return lambda **wish: talk.wish(Wish(names_emotion="emotion" in wish, **wish))


def test_the_last_of_several_wishes_is_what_moshi_is_told(speaker):
    wish = begin(speaker)
    for emotion in ("sad", "angry", None, "happy", "sad"):
        wish(emotion=emotion)
    for _ in range(100):
        wish(now=True)
    prefix = speaker.tokenizer.encode("(sad)")
    tokens, told = texts(speaker, len(prefix) + 6)
    assert tokens[: len(prefix)] == told == prefix


def test_a_prefix_that_is_half_told_is_followed_by_the_whole_new_one(speaker):
    wish = begin(speaker)
    delay = max(speaker.engine.lm.delays)
    texts(speaker, delay + 2)
    wish(emotion="sad")
    happy, sad = (speaker.tokenizer.encode(f"({emotion})") for emotion in ("happy", "sad"))
    tokens, told = texts(speaker, len(sad) + 6)
    assert tokens[: delay + len(sad)] == told == happy[2 : 2 + delay] + sad


@pytest.mark.parametrize("change", [{"voice": BASE}, {"voice": "calm"}, {"emotion": None}])
def test_a_voice_without_prefix_is_not_told_the_one_before(speaker, change):
    begin(speaker)(**change)
    tokens, told = texts(speaker, 8)
    assert told == []
    speaker.engine.reset(0, seed=0)
    speaker.steer(0, speaker.choose(None, change.get("voice")), None)
    assert texts(speaker, 8)[0] == tokens


def test_a_change_of_strength_leaves_what_is_still_to_be_told(speaker):
    wish = begin(speaker)
    wish(strength=0.5)
    assert texts(speaker, 12)[1] == speaker.tokenizer.encode("(happy)")


def test_strength_changes_in_a_conversation_without_a_word(speaker):
    voice = speaker.choose(None, "calm")
    speaker.engine.reset(0, seed=0)
    speaker.steer(0, voice, "calm", 1.0)
    speaker.weigh(0, voice, 0.0)
    frame = np.zeros(SAMPLES_PER_FRAME, dtype=np.float32)
    changed = [speaker.engine.step({0: frame}) for _ in range(4)][-1][0]
    speaker.engine.reset(0, seed=0)
    speaker.steer(0, speaker.choose(None, BASE), None)
    base = [speaker.engine.step({0: frame}) for _ in range(4)][-1][0]
    assert np.array_equal(changed.codes, base.codes)


def test_slots_have_voices_of_their_own(expressive, calm):
    speaker = load_speaker([str(expressive), str(calm)], device="cpu", num_slots=2, use_sampling=False)
    speaker.steer(0, speaker.choose("happy"), "happy")
    speaker.steer(1, speaker.choose("calm"), "calm")
    frame = np.zeros(SAMPLES_PER_FRAME, dtype=np.float32)
    said = [speaker.engine.step({0: frame, 1: frame}) for _ in range(6)]
    first, second = ([frames[slot] for frames in said if slot in frames] for slot in (0, 1))
    prefix = speaker.tokenizer.encode("(happy)")
    assert [said.text_token for said in first] == prefix[: len(first)]
    assert [said.text_token for said in second] != prefix[: len(second)]
    speaker.close()


def test_a_base_alone_can_be_steered_to_itself(tiny_moshi):
    speaker = load_speaker([str(tiny_moshi)], device="cpu")
    assert talk(speaker, None).shape[0] == 9
    assert (speaker.base_name, speaker.emotions) == (str(tiny_moshi), [])
    speaker.close()


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_is_float32_on_a_cpu_unless_said(tiny_moshi, dtype, expected):
    speaker = load_speaker([str(tiny_moshi)], device="cpu", dtype=dtype)
    assert speaker.engine.lm.dtype == expected
    speaker.close()


def test_sampling_is_as_config_json_says_unless_said(tiny_moshi):
    models = find_models([str(tiny_moshi)])
    models.base.lm_gen_config = {"temp": 0.1, "top_k_text": 3, "use_sampling": True, "cfg_coef": 2.0}
    with pytest.warns(UserWarning, match="cfg_coef: ignored"):
        speaker = load_models(models, text_temperature=0.2, temperature=None)
    generator = speaker.engine._generator
    assert (generator.temp, generator.temp_text, generator.top_k_text, generator.cfg_coef) == (0.1, 0.2, 3, 1.0)
    speaker.close()


def test_an_adapter_whose_shapes_are_of_another_base_is_refused(expressive, calm, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(calm, wrong)
    shutil.copy(expressive / "lora.safetensors", wrong)
    with pytest.raises(UserError, match=r"(?s)wrong.*rank 2"):
        load_speaker([str(wrong)], device="cpu")


@pytest.mark.parametrize("name", ["cuda:99", "abacus"])
def test_a_device_that_cannot_be_used_is_refused(name):
    with pytest.raises(UserError, match=f"--device {name} cannot be used"):
        choose_device(name)


def test_memory_that_does_not_suffice_is_said(tiny_moshi, monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("hf_csm.serving.loaded.load_moshi", no_memory)
    with pytest.raises(UserError, match="does not fit in the memory of the device with 1 slot"):
        load_speaker([str(tiny_moshi)], device="cpu")


@pytest.mark.parametrize("strength", [-0.1, 2.1, float("nan"), float("inf")])
def test_strengths_outside_the_range_are_refused(strength):
    assert check_strength(0.0) == 0.0
    assert check_strength(2.0) == 2.0
    with pytest.raises(UserError, match="Give 0"):
        check_strength(strength)
