import contextlib

import numpy as np
import pytest
import torch
from moshi.models.lm import LMGen

from hf_csm.models.moshi.checkpoint import find_checkpoint, load_mimi, load_tokenizer
from hf_csm.models.moshi.engine import Engine
from hf_csm.models.moshi.model import MoshiLM
from hf_csm.units import SAMPLES_PER_FRAME


NUM_FRAMES = 14
PADDING = {0, 3}


@pytest.fixture(scope="module")
def base(tiny_moshi):
    return find_checkpoint(str(tiny_moshi))


@pytest.fixture(scope="module")
def mimi(base):
    return load_mimi(base)


@pytest.fixture(scope="module")
def lm(base):
    return base.get_moshi(dtype=torch.float32)


@pytest.fixture
def make_engine(lm, mimi):
    engines = []

    def make(**kwargs):
        engines.append(Engine(lm, mimi, **kwargs))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def speech(seed, num_frames=NUM_FRAMES):
    """Return `num_frames` frames of noise of changing loudness."""
    generator = np.random.default_rng(seed)
    frames = generator.normal(size=(num_frames, SAMPLES_PER_FRAME)) * generator.uniform(0, 0.3, size=(num_frames, 1))
    return list(frames.astype(np.float32))


def server_loop(lm, mimi, frames, seed):
    """Do what moshi.server does with one conversation; return tokens `[T, K]` and audio `[T, 1920]`."""
    tokens, audio = [], []
    mimi.set_num_codebooks(lm.dep_q)
    generator = LMGen(lm)
    with torch.no_grad(), mimi.streaming(1), generator.streaming(1):
        torch.manual_seed(seed)
        skip = True
        for frame in frames:
            codes = mimi.encode(torch.from_numpy(frame)[None, None])
            if skip:
                mimi.reset_streaming()
                skip = False
            said = generator.step(codes)
            if said is not None:
                tokens.append(said[0, :, 0].numpy())
                audio.append(mimi.decode(said[:, 1:])[0, 0].numpy())
    return np.stack(tokens), np.stack(audio)


def talk(engine, slot, frames):
    said = [engine.step({slot: frame}).get(slot) for frame in frames]
    return [frame for frame in said if frame is not None]


def tokens_of(said):
    return np.stack([np.concatenate([[frame.text_token], frame.codes]) for frame in said])


def streams_of(engine, frames, said):
    """Return the streams `[1, K, T + 1]` of a conversation as training lays them out, and T."""
    tokens = torch.from_numpy(tokens_of(said)).T
    audio = torch.from_numpy(np.concatenate(frames[1:]))  # the first frame only starts the model
    engine.close()  # a streaming model cannot be called on a whole window
    user = engine.mimi.encode(audio[None, None])[0, :8, : tokens.shape[1]]
    codes = torch.cat([tokens, user])[None]
    return torch.nn.functional.pad(codes, (0, 1), value=-1), tokens.shape[1]


def test_one_slot_gives_the_servers_tokens_and_audio(lm, mimi, make_engine):
    expected_tokens, expected_audio = server_loop(lm, mimi, speech(0), seed=7)
    engine = make_engine()
    engine.warm_up()
    for _ in range(2):  # a second conversation is as fresh as the first
        engine.reset(0, seed=7)
        said = talk(engine, 0, speech(0))
        assert np.array_equal(tokens_of(said), expected_tokens)
        assert np.array_equal(np.stack([frame.audio for frame in said]), expected_audio)


def test_in_bfloat16_too(base, mimi):
    lm = base.get_moshi(dtype=torch.bfloat16)
    expected, _ = server_loop(lm, mimi, speech(1), seed=1)
    engine = Engine(lm, mimi)
    engine.reset(0, seed=1)
    said = talk(engine, 0, speech(1))
    engine.close()
    assert np.array_equal(tokens_of(said), expected)


def test_the_seed_determines_the_samples(make_engine):
    engine = make_engine()
    conversations = []
    for seed in (1, 1, 2):
        engine.reset(0, seed=seed)
        conversations.append(tokens_of(talk(engine, 0, speech(0))))
    assert np.array_equal(conversations[0], conversations[1])
    assert not np.array_equal(conversations[0], conversations[2])


def test_a_seed_for_one_of_several_slots_is_refused(make_engine):
    with pytest.raises(ValueError, match="3"):
        make_engine(num_slots=2).reset(0, seed=3)


def test_slots_are_independent_and_go_at_their_own_pace(lm, mimi, make_engine):
    """Three conversations, begun, paused and begun again at different times, are those that each would be alone."""
    alone = []
    for seed in range(4):
        engine = Engine(lm, mimi, use_sampling=False)
        alone.append(talk(engine, 0, speech(seed)))
        engine.close()
    engine = make_engine(num_slots=3, use_sampling=False)
    engine.warm_up()
    order = np.random.default_rng(0)
    waiting = {slot: list(speech(slot)) for slot in range(3)}
    said = {conversation: [] for conversation in range(4)}
    conversation_of = {0: 0, 1: 1, 2: 2}
    while waiting:
        running = [slot for slot in waiting if order.random() < 0.6]
        frames = {slot: waiting[slot].pop(0) for slot in running}
        for slot, frame in engine.step(frames).items():
            said[conversation_of[slot]].append(frame)
        for slot in running:
            if not waiting[slot]:
                del waiting[slot]
                if conversation_of[slot] == 0:  # the fourth one takes the slot of the first
                    engine.reset(slot)
                    conversation_of[slot], waiting[slot] = 3, list(speech(3))
    for conversation, expected in enumerate(alone):
        assert np.array_equal(tokens_of(said[conversation]), tokens_of(expected))
        found = np.stack([frame.audio for frame in said[conversation]])
        np.testing.assert_allclose(found, np.stack([frame.audio for frame in expected]), atol=1e-4)


def test_the_first_frames_give_nothing(lm, make_engine):
    engine = make_engine(num_slots=2)
    given = [sorted(engine.step({0: frame})) for frame in speech(0, 4)]
    assert given == [[]] * max(lm.delays) + [[0]] * (4 - max(lm.delays))
    assert engine.step({}) == {}


def test_forced_text_stands_where_it_was_queued(make_engine):
    engine = make_engine(num_slots=2)
    engine.force_text(1, [300, 301])
    for frame in speech(0, 5):
        engine.step({0: frame})  # another conversation takes nothing of it
    said = [frame.text_token for frame in talk(engine, 1, speech(1, 6))]
    assert said[:2] == [300, 301]
    engine.force_text(1, [302])
    later = [engine.step({1: frame})[1].text_token for frame in speech(2, 4)]
    assert later.index(302) == 1  # after what was sampled and not yet out
    engine.force_text(1, [303])
    engine.force_text(1, [])  # what was still to be written is not
    assert 303 not in [engine.step({1: frame})[1].text_token for frame in speech(2, 4)]
    engine.force_text(1, [303])
    engine.reset(1)
    assert 303 not in [frame.text_token for frame in talk(engine, 1, speech(1, 8))]


def test_frames_of_forced_text_are_marked(make_engine):
    engine = make_engine(num_slots=2)
    for begun_at in (0, 3):  # a new conversation is as exact as the first
        engine.reset(0)
        said = talk(engine, 0, speech(0, begun_at)) if begun_at else []
        engine.force_text(0, [300, 301, 302])
        said += talk(engine, 0, speech(1, 2))
        engine.force_text(0, [303])
        said += talk(engine, 0, speech(2, 4))
        assert [frame.text_token for frame in said if frame.is_forced] == [300, 301, 303]


def test_words_are_forced_in_their_slot_after_the_forced_text(make_engine, base):
    tokenizer = load_tokenizer(base)
    engine = make_engine(num_slots=2, tokenizer=tokenizer)
    words = ["hello", "doctor", "open", "the", "door"]
    engine.force_text(0, [300, 301])
    engine.force_words(0, words)
    frames = {0: [], 1: []}
    for frame in speech(0, 90):
        for slot, generated in engine.step({0: frame, 1: frame}).items():
            frames[slot].append(generated)
        if engine.last_word_frame(0) is not None and len(frames[0]) > engine.last_word_frame(0):
            break
    tokens = [frame.text_token for frame in frames[0]]
    assert tokens[:2] == [300, 301] and [frame.is_forced for frame in frames[0][:3]] == [True, True, False]
    assert [word["word"] for word in engine.words_in(tokens[2:])] == words
    assert tokenizer.decode([t for t in tokens[2:] if t not in engine.padding_ids]) == " ".join(words)
    assert [word["word"] for word in engine.words_in([frame.text_token for frame in frames[1]])] != words
    engine.reset(0)
    engine.step({0: speech(0, 1)[0], 1: speech(0, 1)[0]})
    with pytest.raises(AssertionError, match="has begun"):
        engine.force_words(0, words)


def test_a_step_runs_on_the_device_of_the_model_in_any_thread(make_engine, monkeypatch):
    """Every thread begins with the first GPU, and CUDA graphs are captured on the current one."""
    engine, current, seen = make_engine(), [0], []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    assert engine._cuda_index == -1  # on a CPU nothing is changed
    engine._cuda_index = 1
    monkeypatch.setattr(torch.cuda, "device", device)
    for part, name in ((engine._generator, "step"), (engine.mimi, "encode"), (engine.mimi, "reset_streaming")):
        method = getattr(part, name)
        monkeypatch.setattr(part, name, lambda *args, method=method: (seen.append(current[-1]), method(*args))[1])
    engine.warm_up()
    assert set(seen) == {1} and len(seen) > 10


def test_the_models_are_free_after_close(lm, mimi, make_engine):
    make_engine().close()
    assert not mimi.is_streaming
    assert not lm.is_streaming
    make_engine()


def test_greedy_tokens_are_the_likeliest_of_the_teacher_forced_model(lm, make_engine):
    """Generation and training agree on which frame is which: prefix, delays and the user's audio included."""
    engine = make_engine(use_sampling=False)
    engine.force_text(0, [300, 301])
    frames = speech(0, 16)
    codes, num_frames = streams_of(engine, frames, talk(engine, 0, frames))
    with torch.no_grad():
        output = lm(codes)
    assert torch.equal(output.text_logits[0, 0, 2:num_frames].argmax(-1), codes[0, 0, 2:num_frames])
    # The delayed codebooks of the last frame depend on a text token that is not out yet.
    last = num_frames - 1
    assert torch.equal(output.logits[0, :, :last].argmax(-1), codes[0, 1:9, :last])
    assert output.logits[0, 0, last].argmax(-1) == codes[0, 1, last]


def test_generated_codes_are_likelier_than_others(lm, make_engine):
    engine = make_engine(temperature=0.3, text_temperature=0.3)
    engine.reset(0, seed=0)
    frames = speech(0, 16)
    codes, num_frames = streams_of(engine, frames, talk(engine, 0, frames))
    shuffled = codes.clone()
    shuffled[:, 1:9, :num_frames] = codes[:, 1:9, :num_frames].roll(3, dims=-1)
    with torch.no_grad():
        scores = [MoshiLM(lm)(c).nll.mean() for c in (codes, shuffled)]
    assert scores[0] < scores[1]


def test_the_users_first_frame_after_the_start_changes_the_next(make_engine):
    engine = make_engine(use_sampling=False)
    said = []
    for first in (speech(0)[1], speech(3)[1]):
        engine.reset(0)
        said.append(tokens_of(talk(engine, 0, [speech(4)[0], first, *speech(5, 8)])))
    assert not np.array_equal(said[0][:, 2:], said[1][:, 2:])
    assert np.array_equal(said[0][0, :2], said[1][0, :2])  # predicted before it


def test_padding_is_named(make_engine):
    assert make_engine().padding_ids == PADDING
