import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from hf_csm.cli import main
from hf_csm.errors import UserError
from hf_csm.serving import speech as offline
from hf_csm.serving.loaded import BASE, Speaker, load_speaker
from hf_csm.serving.speech import (
    Speech,
    check_out,
    check_text,
    level_db,
    read_question,
    reply,
    say,
    write_audio,
)
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME


@pytest.fixture(scope="module")
def speaker(expressive, calm):
    torch.set_num_threads(1)
    speaker = load_speaker([str(expressive), str(calm)], device="cpu")
    yield speaker
    speaker.close()


@pytest.fixture(autouse=True)
def short_ends(monkeypatch):
    """The tiny Moshi never falls silent: do not wait for it as long."""
    monkeypatch.setattr(offline, "MAX_FADING_S", 0.24)


TEXT = "Hello,  doctor's -- appointment"


def test_every_word_of_a_text_is_said_once_and_in_order(speaker):
    said = say(speaker, TEXT, emotion="happy", seed=3)
    words = ["Hello,", "doctor's --", "appointment"]
    assert said.text == " ".join(words)
    assert [word["word"] for word in said.words] == words
    prefix = speaker.tokenizer.encode("(happy)")
    assert said.text_tokens[: len(prefix)] == prefix
    spoken = [token for token in said.text_tokens[len(prefix) :] if token not in speaker.engine.padding_ids]
    assert spoken == list(itertools.chain(*map(speaker.tokenizer.encode, words)))
    for word in said.words:
        tokens = speaker.tokenizer.encode(word["word"])
        first = round(word["start_s"] * 12.5)
        assert said.text_tokens[first : first + len(tokens)] == tokens
    assert len(said.audio) == len(said.user) == len(said.text_tokens) * SAMPLES_PER_FRAME
    assert said.text_tokens[-3:] == [3, 3, 3]
    assert said.text_tokens[-4] != 3
    assert -70 < level_db(said.user) < -50
    assert speaker.engine.text_policy is None
    assert (said.voice, said.emotion, said.seed) == ("expressive", "happy", 3)


def test_the_seed_decides(speaker):
    first, same, other = (say(speaker, "hello", emotion="calm", seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.audio, same.audio)
    assert first.describe() == same.describe()
    assert first.text_tokens[0] in speaker.engine.padding_ids  # calm is not told by a prefix
    assert not np.array_equal(first.audio[:SAMPLES_PER_FRAME], other.audio[:SAMPLES_PER_FRAME])


def test_strength_0_says_what_the_base_says(speaker):
    none, base, whole = (
        say(speaker, "hello", voice=voice, strength=strength)
        for voice, strength in (("calm", 0.0), (BASE, 1.0), ("calm", 1.0))
    )
    assert np.array_equal(none.audio, base.audio)
    assert none.text_tokens == base.text_tokens
    assert not np.array_equal(whole.audio[: len(base.audio)], base.audio[: len(whole.audio)])


class FakeEngine:
    """An engine that says what it is told: `(text token, amplitude)` of each frame, the last one for ever."""

    def __init__(self, script, lm):
        self.script, self.lm = script, lm
        self.num_slots, self.padding_ids, self.text_policy = 1, frozenset({0, 3}), None
        self.heard, self.forced = [], []

    def reset(self, slot, *, seed=None):
        self.heard.clear()

    def set_strength(self, slot, adapter, strength):
        pass

    def force_text(self, slot, tokens):
        self.forced = list(tokens)

    def step(self, frames):
        self.heard.append(frames[0])
        number = len(self.heard) - 2  # the first step gives nothing
        if number < 0:
            return {}
        token, amplitude = self.script[min(number, len(self.script) - 1)]
        if self.text_policy is not None:
            tokens = torch.tensor([token])
            self.text_policy(tokens)
            token = int(tokens[0])
        wave = amplitude * np.where(np.arange(SAMPLES_PER_FRAME) % 2, 1.0, -1.0)
        return {0: offline.Frame(token, wave.astype(np.float32), np.zeros(8, dtype=np.int64))}


@pytest.fixture
def acting(speaker, monkeypatch):
    """Make the speaker say a script; returns the engine."""

    def act(script):
        monkeypatch.setattr(speaker, "engine", FakeEngine(script, speaker.engine.lm))
        return speaker.engine

    return act


QUIET, LOUD = 0.001, 0.3
LEAD_IN = 13
"""Frames of quiet before a question."""


def test_a_text_ends_when_its_last_word_has_faded(speaker, acting, monkeypatch):
    monkeypatch.setattr(offline, "MAX_FADING_S", 4.0)
    (word,) = speaker.tokenizer.encode("hello")[:1]
    acting([(word, LOUD)] * 20 + [(3, QUIET)] * 5 + [(3, LOUD)] * 2 + [(3, QUIET)])
    said = say(speaker, "hello", voice="calm")
    assert len(said.text_tokens) == 20 + 5 + 2 + 10
    acting([(word, LOUD)])
    last = say(speaker, "hello", voice="calm").words[-1]["start_s"] * 12.5 + len(speaker.tokenizer.encode("hello"))
    assert len(say(speaker, "hello", voice="calm").text_tokens) == last + 50


def question(num_frames=4, amplitude=0.2):
    return np.full(num_frames * SAMPLES_PER_FRAME - 100, amplitude, dtype=np.float32)


def test_a_reply_ends_when_moshi_has_been_quiet(speaker, acting):
    (word,) = speaker.tokenizer.encode("yes")[:1]
    quiet, talking, thinking = (3, QUIET), (word, LOUD), (0, LOUD)
    engine = acting([quiet] * (LEAD_IN + 6) + [talking] * 2 + [thinking] * 3 + [quiet] * 4 + [(word, QUIET)] + [quiet])
    said = reply(speaker, question(), voice="calm", tail_s=0.4)
    assert len(said.text_tokens) == LEAD_IN + 6 + 2 + 3 + 4 + 1 + 5
    assert said.question_s == pytest.approx(0.32, abs=0.01)
    assert said.lead_in_s == 1.04
    assert said.question_end_s == pytest.approx(1.36, abs=0.01)
    assert said.words[0]["start_s"] == pytest.approx(0.08 * (LEAD_IN + 6))
    # The model hears room tone for a second, the question, room tone again.
    heard = np.concatenate(engine.heard[1:])
    begin = LEAD_IN * SAMPLES_PER_FRAME
    end = begin + len(question())
    assert np.array_equal(heard[begin:end], question())
    for quiet_part in (heard[:begin], heard[end:]):
        assert -70 < level_db(quiet_part) < -50
    assert np.array_equal(said.user, heard[: len(said.user)])
    assert level_db(engine.heard[0]) < -50


def test_quiet_before_the_question_ends_does_not_end_the_reply(speaker, acting):
    acting([(3, QUIET)])
    said = reply(speaker, question(20), voice="calm", tail_s=0.4)
    assert len(said.text_tokens) == LEAD_IN + 20 + 5
    assert said.is_silent
    assert said.text == ""


def test_a_reply_has_a_longest_duration(speaker, acting):
    acting([(3, LOUD)])
    assert len(reply(speaker, question(), voice="calm", max_s=0.8).text_tokens) == LEAD_IN + 4 + 10


@pytest.mark.parametrize(("length", "lead_in"), [(3, 13), (20, 21)])
def test_the_question_comes_after_the_prefix_and_after_a_second(speaker, acting, monkeypatch, length, lead_in):
    engine = acting([(3, QUIET)])
    monkeypatch.setattr(Speaker, "prefix", lambda *_: [7] * length)
    assert reply(speaker, question(), emotion="sad", tail_s=0.4).lead_in_s == lead_in * 0.08
    assert engine.forced == [7] * length
    loud = [level_db(frame) > -40 for frame in engine.heard[1:]]
    assert loud.index(True) == lead_in


def test_a_reply_is_repeatable_and_answers_what_it_heard(speaker):
    first, same = (reply(speaker, question(), emotion="sad", max_s=0.4, seed=5) for _ in range(2))
    other = reply(speaker, question(amplitude=-0.1), emotion="sad", max_s=0.4, seed=5)
    assert np.array_equal(first.audio, same.audio)
    assert not np.array_equal(first.audio, other.audio)
    assert first.text_tokens[:3] == speaker.tokenizer.encode("(sad)")[:3]
    assert "(" not in first.text  # what Moshi was told is not what it said


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "does not fit in the memory"),
        (RuntimeError("CUDA error: no luck\nmore"), "The engine failed: RuntimeError: CUDA error: no luck"),
    ],
)
def test_a_failed_engine_is_said(speaker, monkeypatch, failure, words):
    def fail(_):
        raise failure

    monkeypatch.setattr(speaker.engine, "step", fail)
    for speak in (lambda: say(speaker, "hello"), lambda: reply(speaker, question())):
        with pytest.raises(UserError, match=words) as caught:
            speak()
        assert len(str(caught.value).splitlines()) == 2
        assert caught.value.__cause__ is failure
    assert speaker.engine.text_policy is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"text": "  "}, "is empty"),
        ({"text": " ?! "}, "is empty"),
        ({"text": "hello", "emotion": "hapy"}, "nearest is 'happy'"),
        ({"text": "hello", "strength": 3.0}, "strength is 3"),
        ({"text": "hello", "voice": BASE, "strength": 0.5}, "'base' has no adapter"),
    ],
)
def test_what_cannot_be_said_is_refused(speaker, arguments, problem):
    with pytest.raises(UserError, match=problem.replace("?", ".")):
        say(speaker, **arguments)


@pytest.mark.parametrize(
    "times", [{"tail_s": 0.0}, {"max_s": -1.0}, {"max_s": float("inf")}, {"tail_s": float("nan")}]
)
def test_a_reply_needs_times(speaker, times):
    with pytest.raises(UserError, match="more than 0 seconds"):
        reply(speaker, question(), **times)


def speech(num_frames=2):
    audio = np.linspace(-1.5, 0.5, num_frames * SAMPLES_PER_FRAME, dtype=np.float32)
    return Speech(audio, audio[::-1] / 4, "hi", [], [3] * num_frames, "calm", None, 1.0, 0)


@pytest.mark.parametrize("name", ["a.wav", "new/a.flac"])
def test_sound_is_written_as_mono_or_with_the_user_on_the_left(tmp_path, name):
    out = tmp_path / name
    write_audio(out, speech())
    mono, sample_rate = soundfile.read(out)
    assert sample_rate == SAMPLE_RATE
    assert np.abs(mono - np.clip(speech().audio, -1, 1)).max() < 1e-4
    write_audio(out, speech(), stereo=True)
    both, _ = soundfile.read(out)
    assert np.abs(both[:, 0] - speech().user).max() < 1e-4
    assert np.abs(both[:, 1] - mono).max() < 1e-4
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert out.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    out = tmp_path / "a.wav"
    out.write_bytes(b"before")

    def fail(*args):
        raise soundfile.LibsndfileError(2)

    monkeypatch.setattr(soundfile, "write", fail)
    with pytest.raises(UserError, match=r"a\.wav cannot be written: System error"):
        write_audio(out, speech())
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


@pytest.mark.parametrize("name", ["a", "a.txt", "a.mp4", "folder.wav"])
def test_names_that_are_no_sound_file_are_refused(tmp_path, name):
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(UserError, match="--out"):
        check_out(tmp_path / name)


@pytest.mark.parametrize(("sample_rate", "channels"), [(24_000, 1), (8_000, 2), (44_100, 6)])
def test_questions_have_any_rate_and_channels(tmp_path, sample_rate, channels):
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(sample_rate) / sample_rate)
    soundfile.write(tmp_path / "q.wav", np.repeat(tone[:, None], channels, axis=1), sample_rate)
    heard = read_question(tmp_path / "q.wav")
    assert heard.dtype == np.float32
    assert len(heard) == SAMPLE_RATE
    inside = slice(1000, -1000)
    expected = 0.3 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    assert np.abs(heard[inside] - expected[inside]).max() < 0.01


def test_a_question_that_is_no_sound_is_refused(tmp_path):
    (tmp_path / "q.wav").write_text("hello")
    with pytest.raises(UserError, match="not a sound file") as caught:
        read_question(tmp_path / "q.wav")
    assert caught.value.remedy.startswith("Record the question again")
    soundfile.write(tmp_path / "q.wav", np.zeros(0), 24_000)
    with pytest.raises(UserError) as caught:
        read_question(tmp_path / "q.wav")
    assert caught.value.remedy.startswith("Record the question again")
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_question(tmp_path / "none.wav")
    assert caught.value.remedy.startswith("Check the path")


def test_a_text_without_words_is_told_of_as_a_text():
    with pytest.raises(UserError, match="^The text to say, ' [?]! ', is empty.\nGive at least one word.$"):
        check_text(" ?! ")


def test_a_place_that_takes_no_file_is_named_as_it_was_given(tmp_path):
    for out in (Path("/proc/z.wav"), tmp_path / "file" / "z.wav"):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=f"^{out} cannot be written") as caught:
            write_audio(out, speech())
        assert "/." not in str(caught.value)


def hf_csm(*arguments):
    return main([*map(str, arguments), "--device", "cpu"])


def test_say_writes_a_file_and_a_line_of_json(expressive, calm, tmp_path, capsys):
    out = tmp_path / "x.wav"
    command = ("say", "yes no", "--model", f"moody={expressive}", calm, "--emotion", "happy", "--out", out)
    assert hf_csm(*command, "--seed", 4, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] == str(out)
    assert told["text"] == "yes no"
    assert [word["word"] for word in told["words"]] == ["yes", "no"]
    assert [told[key] for key in ("emotion", "voice", "seed", "strength")] == ["happy", "moody", 4, 1.0]
    assert soundfile.info(out).duration == pytest.approx(told["duration_s"])
    assert soundfile.info(out).channels == 1
    first = out.read_bytes()
    assert hf_csm(*command, "--seed", 4) == 0
    assert capsys.readouterr().out == f"{out}: {told['duration_s']:.1f} s, moody (happy): yes no\n"
    assert out.read_bytes() == first


def test_reply_answers_a_file(calm, tmp_path, capsys, monkeypatch):
    soundfile.write(tmp_path / "q.wav", np.stack([question(), question()], axis=1), 24_000)
    monkeypatch.setenv("HF_CSM_MODEL", str(calm))
    out = tmp_path / "y.flac"
    assert hf_csm("reply", tmp_path / "q.wav", "--out", out, "--seconds", 0.4, "--stereo", "--voice", "base") == 0
    samples, _ = soundfile.read(out)
    assert samples.shape == ((LEAD_IN + 9) * SAMPLES_PER_FRAME, 2)
    asked = samples[LEAD_IN * SAMPLES_PER_FRAME :, 0]
    assert np.abs(asked[: len(question())] - question()).max() < 1e-3
    assert ", base: " in capsys.readouterr().out


def test_an_emotion_that_the_base_ignores_is_said(calm, tmp_path, capsys):
    out = tmp_path / "x.wav"
    assert hf_csm("say", "no", "--model", calm, "--out", out, "--voice", "base", "--emotion", "sad") == 0
    assert "warning: base speaks without emotion; sad was ignored." in capsys.readouterr().err


def test_silence_is_said(calm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(offline, "SILENCE_DB", 20.0)
    assert hf_csm("say", "no", "--model", calm, "--out", tmp_path / "x.wav") == 0
    assert "warning: nothing can be heard" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["say", ""], "is empty"),
        (["say", "no", "--strength", "5"], "strength is 5"),
        (["say", "no", "--seed", "-1"], "--seed is -1"),
        (["say", "no", "--temperature", "0"], "--temperature is 0"),
        (["say", "no", "--emotion", "hapy"], "nearest is 'happy'"),
        (["say", "no", "--voice", "me"], "no voice 'me'"),
        (["say", "no", "--out", "x.mp9"], "x.mp9"),
        (["say", "no", "--device", "abacus"], "--device abacus cannot be used"),
        (["reply", "nothing.wav"], "nothing.wav: cannot be read"),
        (["reply", __file__], "not a sound file"),
        (["reply", "nothing.wav", "--tail-s", "0"], "--tail-s is 0"),
    ],
)
def test_what_cannot_be_done_is_said_in_two_lines_before_weights_are_loaded(
    expressive, tmp_path, capsys, monkeypatch, arguments, words
):
    monkeypatch.setattr("hf_csm.serving.loaded.load_models", None)
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "x.wav")]
    assert main([*arguments[:2], "--device", "cpu", "--model", str(expressive), *out, *arguments[2:]]) == 1
    problem, remedy = capsys.readouterr().err.splitlines()
    assert words in problem
    assert problem.startswith("error: ")
    assert remedy.strip()


def test_an_emotion_needs_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_CSM_MODEL", raising=False)
    assert hf_csm("say", "no", "--emotion", "happy", "--out", tmp_path / "x.wav") == 1
    problem, remedy = capsys.readouterr().err.splitlines()
    assert "No model is named" in problem
    assert "--model REPO_OR_FOLDER" in remedy
