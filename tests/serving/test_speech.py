import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from hf_csm.cli import main
from hf_csm.errors import UserError
from hf_csm.models.moshi.forced_text import script_of, words_in
from hf_csm.serving import speech as offline
from hf_csm.serving.loaded import LoadedModel, load_model
from hf_csm.serving.resolve import BASE
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
def model(expressive, calm):
    torch.set_num_threads(1)
    model = load_model([str(expressive), str(calm)], device="cpu")
    yield model
    model.close()


@pytest.fixture(autouse=True)
def short_ends(monkeypatch):
    """The tiny Moshi never falls silent."""
    monkeypatch.setattr(offline, "MAX_FADING_S", 0.24)


TEXT = "Hello,  doctor's -- appointment"


def test_every_word_is_spoken_once_in_order(model):
    speech_ = say(model, TEXT, emotion="happy", seed=3)
    words = ["Hello,", "doctor's --", "appointment"]
    assert speech_.text == " ".join(words)
    assert [word["word"] for word in speech_.words] == words
    prefix = model.tokenizer.encode("(happy)")
    assert speech_.text_tokens[: len(prefix)] == prefix
    spoken = [token for token in speech_.text_tokens[len(prefix) :] if token not in model.engine.padding_ids]
    assert spoken == list(itertools.chain(*map(model.tokenizer.encode, words)))
    for word in speech_.words:
        tokens = model.tokenizer.encode(word["word"])
        first = round(word["start_s"] * 12.5)
        assert speech_.text_tokens[first : first + len(tokens)] == tokens
    assert len(speech_.audio) == len(speech_.user) == len(speech_.text_tokens) * SAMPLES_PER_FRAME
    assert speech_.text_tokens[-3:] == [3, 3, 3]
    assert speech_.text_tokens[-4] != 3
    assert -70 < level_db(speech_.user) < -50
    assert (speech_.adapter, speech_.emotion, speech_.seed) == ("expressive", "happy", 3)


def test_speech_depends_on_the_seed(model):
    first, same, other = (say(model, "hello", emotion="calm", seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.audio, same.audio)
    assert first.describe() == same.describe()
    assert first.text_tokens[0] in model.engine.padding_ids  # calm takes no prefix
    assert not np.array_equal(first.audio[:SAMPLES_PER_FRAME], other.audio[:SAMPLES_PER_FRAME])


def test_strength_0_speaks_like_the_base_model(model):
    none, base, whole = (
        say(model, "hello", adapter=adapter, strength=strength)
        for adapter, strength in (("calm", 0.0), (BASE, 1.0), ("calm", 1.0))
    )
    assert np.array_equal(none.audio, base.audio)
    assert none.text_tokens == base.text_tokens
    assert not np.array_equal(whole.audio[: len(base.audio)], base.audio[: len(whole.audio)])


class FakeEngine:
    """An engine that generates a script: `(text token, amplitude)` of each frame, the last one repeated."""

    def __init__(self, script, tokenizer):
        self.script, self.tokenizer = script, tokenizer
        self.num_slots, self.padding_ids, self.words = 1, frozenset({0, 3}), None
        self.inputs, self.forced = [], []

    def reset(self, slot, *, seed=None):
        self.inputs.clear()
        self.words = None

    def force_words(self, slot, words):
        self.words = script_of(words, self.tokenizer, num_given=0, padding_id=3, end_of_padding_id=0)

    def last_word_frame(self, slot):
        return self.words.last_frame

    def words_in(self, text_tokens):
        return words_in(text_tokens, self.tokenizer, self.padding_ids)

    def set_strength(self, slot, adapter, strength):
        pass

    def force_text(self, slot, tokens):
        self.forced = list(tokens)

    def step(self, frames):
        self.inputs.append(frames[0])
        number = len(self.inputs) - 2  # the first step gives nothing
        if number < 0:
            return {}
        token, amplitude = self.script[min(number, len(self.script) - 1)]
        if self.words is not None:
            token = self.words.follow(token)
        wave = amplitude * np.where(np.arange(SAMPLES_PER_FRAME) % 2, 1.0, -1.0)
        return {0: offline.Frame(token, wave.astype(np.float32), np.zeros(8, dtype=np.int64))}


@pytest.fixture
def script(model, monkeypatch):
    """Make the model generate a script; returns the engine."""

    def use_script(script):
        monkeypatch.setattr(model, "engine", FakeEngine(script, model.tokenizer))
        return model.engine

    return use_script


QUIET, LOUD = 0.001, 0.3
LEAD_IN = 13
"""Silent frames before a question."""


def test_speech_ends_after_the_last_word_has_faded(model, script, monkeypatch):
    monkeypatch.setattr(offline, "MAX_FADING_S", 4.0)
    (word,) = model.tokenizer.encode("hello")[:1]
    script([(word, LOUD)] * 20 + [(3, QUIET)] * 5 + [(3, LOUD)] * 2 + [(3, QUIET)])
    speech_ = say(model, "hello", adapter="calm")
    assert len(speech_.text_tokens) == 20 + 5 + 2 + 10
    script([(word, LOUD)])
    last = say(model, "hello", adapter="calm").words[-1]["start_s"] * 12.5 + len(model.tokenizer.encode("hello"))
    assert len(say(model, "hello", adapter="calm").text_tokens) == last + 50


def question(num_frames=4, amplitude=0.2):
    return np.full(num_frames * SAMPLES_PER_FRAME - 100, amplitude, dtype=np.float32)


def test_reply_ends_after_silence(model, script):
    (word,) = model.tokenizer.encode("yes")[:1]
    quiet, talking, thinking = (3, QUIET), (word, LOUD), (0, LOUD)
    engine = script([quiet] * (LEAD_IN + 6) + [talking] * 2 + [thinking] * 3 + [quiet] * 4 + [(word, QUIET)] + [quiet])
    speech_ = reply(model, question(), adapter="calm", tail_s=0.4)
    assert len(speech_.text_tokens) == LEAD_IN + 6 + 2 + 3 + 4 + 1 + 5
    assert speech_.question_s == pytest.approx(0.32, abs=0.01)
    assert speech_.lead_in_s == 1.04
    assert speech_.question_end_s == pytest.approx(1.36, abs=0.01)
    assert speech_.words[0]["start_s"] == pytest.approx(0.08 * (LEAD_IN + 6))
    # Input: one second of room tone, the question, room tone.
    heard = np.concatenate(engine.inputs[1:])
    begin = LEAD_IN * SAMPLES_PER_FRAME
    end = begin + len(question())
    assert np.array_equal(heard[begin:end], question())
    for quiet_part in (heard[:begin], heard[end:]):
        assert -70 < level_db(quiet_part) < -50
    assert np.array_equal(speech_.user, heard[: len(speech_.user)])
    assert level_db(engine.inputs[0]) < -50


def test_silence_during_the_question_does_not_end_the_reply(model, script):
    script([(3, QUIET)])
    speech_ = reply(model, question(20), adapter="calm", tail_s=0.4)
    assert len(speech_.text_tokens) == LEAD_IN + 20 + 5
    assert speech_.is_silent
    assert speech_.text == ""


def test_reply_has_a_maximum_duration(model, script):
    script([(3, LOUD)])
    assert len(reply(model, question(), adapter="calm", max_s=0.8).text_tokens) == LEAD_IN + 4 + 10


@pytest.mark.parametrize(("length", "lead_in"), [(3, 13), (20, 21)])
def test_question_starts_after_the_prefix_and_one_second(model, script, monkeypatch, length, lead_in):
    engine = script([(3, QUIET)])
    monkeypatch.setattr(LoadedModel, "prefix", lambda *_: [7] * length)
    assert reply(model, question(), emotion="sad", tail_s=0.4).lead_in_s == lead_in * 0.08
    assert engine.forced == [7] * length
    loud = [level_db(frame) > -40 for frame in engine.inputs[1:]]
    assert loud.index(True) == lead_in


def test_reply_is_reproducible_and_depends_on_the_question(model):
    first, same = (reply(model, question(), emotion="sad", max_s=0.4, seed=5) for _ in range(2))
    other = reply(model, question(amplitude=-0.1), emotion="sad", max_s=0.4, seed=5)
    assert np.array_equal(first.audio, same.audio)
    assert not np.array_equal(first.audio, other.audio)
    assert first.text_tokens[:3] == model.tokenizer.encode("(sad)")[:3]
    assert "(" not in first.text  # forced text is not in the transcript


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "does not fit in device memory"),
        (RuntimeError("CUDA error: no luck\nmore"), "The engine failed: RuntimeError: CUDA error: no luck"),
    ],
)
def test_failed_engine_is_reported(model, monkeypatch, failure, words):
    def fail(_):
        raise failure

    monkeypatch.setattr(model.engine, "step", fail)
    for speak in (lambda: say(model, "hello"), lambda: reply(model, question())):
        with pytest.raises(UserError, match=words) as caught:
            speak()
        assert len(str(caught.value).splitlines()) == 2
        assert caught.value.__cause__ is failure


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"text": "  "}, "is empty"),
        ({"text": " ?! "}, "is empty"),
        ({"text": "hello", "emotion": "hapy"}, "nearest is 'happy'"),
        ({"text": "hello", "strength": 3.0}, "strength is 3"),
        ({"text": "hello", "adapter": BASE, "strength": 0.5}, "'base' has no adapter"),
    ],
)
def test_invalid_arguments_are_refused(model, arguments, problem):
    with pytest.raises(UserError, match=problem.replace("?", ".")):
        say(model, **arguments)


@pytest.mark.parametrize(
    "times", [{"tail_s": 0.0}, {"max_s": -1.0}, {"max_s": float("inf")}, {"tail_s": float("nan")}]
)
def test_invalid_times_are_refused(model, times):
    with pytest.raises(UserError, match="more than 0 seconds"):
        reply(model, question(), **times)


def speech(num_frames=2):
    audio = np.linspace(-1.5, 0.5, num_frames * SAMPLES_PER_FRAME, dtype=np.float32)
    return Speech(audio, audio[::-1] / 4, "hi", [], [3] * num_frames, "calm", None, 1.0, 0)


@pytest.mark.parametrize("name", ["a.wav", "new/a.flac"])
def test_audio_is_written_as_mono_or_stereo(tmp_path, name):
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


def test_failed_write_keeps_the_previous_file(tmp_path, monkeypatch):
    out = tmp_path / "a.wav"
    out.write_bytes(b"before")

    def fail(*args):
        raise soundfile.LibsndfileError(2)

    monkeypatch.setattr(soundfile, "write", fail)
    with pytest.raises(UserError, match=r"a\.wav cannot be written: System error"):
        write_audio(out, speech())
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


@pytest.mark.parametrize("name", ["a", "a.txt", "a.mp4", "folder.wav"])
def test_unsupported_output_names_are_refused(tmp_path, name):
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(UserError, match="--out"):
        check_out(tmp_path / name)


@pytest.mark.parametrize(("sample_rate", "channels"), [(24_000, 1), (8_000, 2), (44_100, 6)])
def test_question_with_any_sample_rate_and_channels(tmp_path, sample_rate, channels):
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(sample_rate) / sample_rate)
    soundfile.write(tmp_path / "q.wav", np.repeat(tone[:, None], channels, axis=1), sample_rate)
    heard = read_question(tmp_path / "q.wav")
    assert heard.dtype == np.float32
    assert len(heard) == SAMPLE_RATE
    inside = slice(1000, -1000)
    expected = 0.3 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    assert np.abs(heard[inside] - expected[inside]).max() < 0.01


def test_invalid_question_files_are_refused(tmp_path):
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


def test_text_without_words_is_refused():
    with pytest.raises(UserError, match="^The text ' [?]! ' is empty"):
        check_text(" ?! ")


def test_unwritable_output_is_reported_under_its_name(tmp_path):
    for out in (Path("/proc/z.wav"), tmp_path / "file" / "z.wav"):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=f"^{out} cannot be written") as caught:
            write_audio(out, speech())
        assert "/." not in str(caught.value)


def hf_csm(*arguments):
    return main([*map(str, arguments), "--device", "cpu"])


def test_say_writes_audio_and_json(expressive, calm, tmp_path, capsys):
    out = tmp_path / "x.wav"
    command = ("say", "yes no", "--model", f"moody={expressive}", calm, "--emotion", "happy", "--out", out)
    assert hf_csm(*command, "--seed", 4, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["out"] == str(out)
    assert record["text"] == "yes no"
    assert [word["word"] for word in record["words"]] == ["yes", "no"]
    assert [record[key] for key in ("emotion", "voice", "seed", "strength")] == ["happy", "moody", 4, 1.0]
    assert soundfile.info(out).duration == pytest.approx(record["duration_s"])
    assert soundfile.info(out).channels == 1
    first = out.read_bytes()
    assert hf_csm(*command, "--seed", 4) == 0
    assert capsys.readouterr().out == f"{out}: {record['duration_s']:.1f} s, moody (happy): yes no\n"
    assert out.read_bytes() == first


def test_reply_to_a_file(calm, tmp_path, capsys, monkeypatch):
    soundfile.write(tmp_path / "q.wav", np.stack([question(), question()], axis=1), 24_000)
    monkeypatch.setenv("HF_CSM_MODEL", str(calm))
    out = tmp_path / "y.flac"
    assert hf_csm("reply", tmp_path / "q.wav", "--out", out, "--seconds", 0.4, "--stereo", "--voice", "base") == 0
    samples, _ = soundfile.read(out)
    assert samples.shape == ((LEAD_IN + 9) * SAMPLES_PER_FRAME, 2)
    asked = samples[LEAD_IN * SAMPLES_PER_FRAME :, 0]
    assert np.abs(asked[: len(question())] - question()).max() < 1e-3
    assert ", base: " in capsys.readouterr().out


def test_warning_if_the_emotion_is_ignored(calm, tmp_path, capsys):
    out = tmp_path / "x.wav"
    assert hf_csm("say", "no", "--model", calm, "--out", out, "--voice", "base", "--emotion", "sad") == 0
    assert "sad was ignored" in capsys.readouterr().err


def test_warning_if_the_speech_is_silent(calm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(offline, "SILENCE_DB", 20.0)
    assert hf_csm("say", "no", "--model", calm, "--out", tmp_path / "x.wav") == 0
    assert "warning: the speech is silent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["say", ""], "is empty"),
        (["say", "no", "--strength", "5"], "strength is 5"),
        (["say", "no", "--seed", "-1"], "--seed is -1"),
        (["say", "no", "--temperature", "0"], "--temperature is 0"),
        (["say", "no", "--emotion", "hapy"], "nearest is 'happy'"),
        (["say", "no", "--voice", "me"], "no adapter 'me'"),
        (["say", "no", "--out", "x.mp9"], "x.mp9"),
        (["say", "no", "--device", "abacus"], "--device abacus cannot be used"),
        (["reply", "nothing.wav"], "nothing.wav: cannot be read"),
        (["reply", __file__], "not a sound file"),
        (["reply", "nothing.wav", "--tail-s", "0"], "--tail-s is 0"),
    ],
)
def test_invalid_options_are_reported_before_loading(expressive, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr("hf_csm.serving.loaded.load_weights", None)
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "x.wav")]
    assert main([*arguments[:2], "--device", "cpu", "--model", str(expressive), *out, *arguments[2:]]) == 1
    problem, remedy = capsys.readouterr().err.splitlines()
    assert words in problem
    assert problem.startswith("error: ")
    assert remedy.strip()


def test_emotion_requires_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_CSM_MODEL", raising=False)
    assert hf_csm("say", "no", "--emotion", "happy", "--out", tmp_path / "x.wav") == 1
    problem, remedy = capsys.readouterr().err.splitlines()
    assert "No model was given" in problem
    assert "--model REPO_OR_FOLDER" in remedy


def test_a_text_that_is_not_utf_8_is_named(model):
    with pytest.raises(UserError, match="not UTF-8"):
        say(model, "hi\udcff")
