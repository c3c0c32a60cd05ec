import json

import numpy as np
import pytest
import soundfile
import soxr
from datasets import load_dataset

from hf_csm.data.table import read_card_metadata, split_files
from hf_csm.encode.compose import Composition
from hf_csm.encode.dialogues import Dialogues, encode_manifest
from hf_csm.errors import UserError
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.codec import MimiCodec, load_codec
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME


COMPOSITION = Composition(duration_s=8.0)
TALK = [
    ["hi", [0.3, 0.6], "SPEAKER_MAIN"],
    ["hello", [1.0, 1.5], "SPEAKER_USER"],
    ["well", [9.0, 9.4], "SPEAKER_MAIN"],
]


@pytest.fixture(scope="module")
def mimi(tiny_moshi):
    return load_codec(find_checkpoint(str(tiny_moshi)))


def tones(duration_s, sample_rate, frequencies=(200, 300)):
    times = np.arange(round(duration_s * sample_rate)) / sample_rate
    return np.stack([0.3 * np.sin(2 * np.pi * frequency * times) for frequency in frequencies], axis=1)


def write_dialogue(folder, path, alignments=TALK, *, duration_s=10.0, sample_rate=SAMPLE_RATE, samples=None, **row):
    """Write audio and alignments; returns the manifest's row."""
    audio = folder / path
    audio.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(audio, tones(duration_s, sample_rate) if samples is None else samples, sample_rate)
    audio.with_suffix(".json").write_text(json.dumps({"alignments": alignments}))
    return {"path": path, "duration": duration_s, **row}


def write_manifest(folder, rows):
    manifest = folder / "talk.jsonl"
    manifest.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return manifest


def open_dialogues(folder, rows, composition=COMPOSITION):
    return Dialogues(write_manifest(folder, rows), "talk", composition)


def test_a_recording_becomes_windows_of_both_channels(tmp_path):
    samples = tones(17.5, SAMPLE_RATE).astype(np.float32)
    rows = [write_dialogue(tmp_path, "stereo/a.wav", samples=samples, duration_s=17.5)]
    dialogues = open_dialogues(tmp_path, rows)
    assert [segment.num_samples / SAMPLES_PER_FRAME for segment in dialogues.segments] == [100, 100, 18]
    heard = np.concatenate([dialogues.waveform(segment) for segment in dialogues.segments], axis=1)
    np.testing.assert_allclose(heard, samples[: heard.shape[1]].T, atol=1e-4)
    assert dialogues.noted == {}


def test_words_go_to_the_window_they_begin_in(tmp_path):
    alignments = [["late", [7.9, 8.3], "SPEAKER_MAIN"], ["early", [0.5, 0.7], "B"], ["next", [8.0, 8.2], "B"]]
    dialogues = open_dialogues(tmp_path, [write_dialogue(tmp_path, "a.wav", alignments)])
    words = [
        [(w["word"], w["start_s"], w["end_s"], w["channel"]) for w in dialogues.words(s)] for s in dialogues.segments
    ]
    assert words == [[("early", 0.5, 0.7, 1), ("late", 7.9, 8.0, 0)], [("next", 0.0, pytest.approx(0.2), 1)]]


def test_a_turn_is_a_run_of_words_of_one_channel(tmp_path):
    alignments = [
        ["a", [1.0, 1.5], "X"],
        ["b", [2.0, 2.5], "X"],
        ["c", [3.0, 3.5], "SPEAKER_MAIN"],
        ["d", [4.0, 5.0], "X"],
    ]
    (segment, _) = open_dialogues(tmp_path, [write_dialogue(tmp_path, "a.wav", alignments)]).segments
    turns = [(turn.channel, turn.start / SAMPLE_RATE, turn.end / SAMPLE_RATE) for turn in segment.turns]
    assert turns == [(1, 1.0, 2.5), (0, 3.0, 3.5), (1, 4.0, 5.0)]


@pytest.mark.parametrize(("sample_rate", "duration_s"), [(8_000, 6.0), (16_000, 6.64), (44_100, 6.0), (44_100, 6.64)])
def test_resampled_windows_join_without_a_seam(tmp_path, sample_rate, duration_s):
    samples = tones(17.0, sample_rate, frequencies=(200.3, 300.7))
    rows = [write_dialogue(tmp_path, "a.flac", samples=samples, duration_s=17.0, sample_rate=sample_rate)]
    dialogues = open_dialogues(tmp_path, rows, Composition(duration_s=duration_s))
    heard = np.concatenate([dialogues.waveform(segment) for segment in dialogues.segments], axis=1)
    whole = soxr.resample(samples, sample_rate, SAMPLE_RATE)[: heard.shape[1]].T
    assert heard.shape[1] > 16.9 * SAMPLE_RATE
    np.testing.assert_allclose(heard, whole, atol=2e-3)


@pytest.mark.parametrize(
    ("speakers", "channels"),
    [
        ((("SPEAKER_USER", "SPEAKER_MAIN"), ("A",)), ((1, 0), (1,))),
        ((("A", "B"), ("B", "A")), ((0, 1), (0, 1))),
    ],
    ids=["the main speaker is Moshi wherever there is one", "else who speaks first in a recording"],
)
def test_moshi_is_the_main_or_the_first_speaker(tmp_path, speakers, channels):
    rows = [
        write_dialogue(
            tmp_path, f"{i}.wav", [["w", [j + 1.0, j + 1.5], who] for j, who in enumerate(names)], duration_s=5
        )
        for i, names in enumerate(speakers)
    ]
    dialogues = open_dialogues(tmp_path, rows)
    found = tuple(tuple(word["channel"] for word in dialogues.words(segment)) for segment in dialogues.segments)
    assert found == channels


def test_room_tone_is_inserted_where_the_prefix_has_no_room(tmp_path):
    rows = [
        write_dialogue(tmp_path, "early.wav", [["hi", [0.3, 0.6], "SPEAKER_MAIN"]], duration_s=5.0, emotion="happy"),
        write_dialogue(tmp_path, "user.wav", [["hi", [0.3, 0.6], "B"]], duration_s=5.0, emotion="happy"),
        write_dialogue(tmp_path, "late.wav", [["hi", [1.3, 1.6], "SPEAKER_MAIN"]], duration_s=5.0, emotion="happy"),
        write_dialogue(tmp_path, "plain.wav", [["hi", [0.3, 0.6], "SPEAKER_MAIN"]], duration_s=5.0),
    ]
    dialogues = open_dialogues(tmp_path, rows)
    early, user, late, plain = dialogues.segments
    assert late.lead == plain.lead == 0
    for segment in (early, user):
        assert 1.0 <= segment.lead / SAMPLE_RATE <= 2.0
        (word,) = dialogues.words(segment)
        assert word["start_s"] == pytest.approx(0.3 + segment.lead / SAMPLE_RATE)
        assert segment.turns[0].start / SAMPLE_RATE == pytest.approx(word["start_s"], abs=1e-4)
        waveform = dialogues.waveform(segment)
        assert waveform.shape == (2, segment.num_samples)
        assert 1e-5 < waveform[:, : segment.lead].std() < 3e-3
        assert waveform[:, segment.lead + 100 :].std() > 0.1


def test_windows_with_room_for_the_prefix_are_no_longer_and_lose_nothing(tmp_path):
    words = [["w", [start / 2, start / 2 + 0.2], "SPEAKER_MAIN"] for start in range(60)]
    dialogues = open_dialogues(tmp_path, [write_dialogue(tmp_path, "a.wav", words, duration_s=30.0, emotion="sad")])
    assert all(segment.lead and segment.num_samples <= 8 * SAMPLE_RATE for segment in dialogues.segments)
    assert sum(len(dialogues.words(segment)) for segment in dialogues.segments) == 60


def test_skipped_recordings_are_counted(tmp_path):
    odd = [["w", [4.0, 4.0], "SPEAKER_MAIN"], ["w", [-1.0, 1.0], "SPEAKER_MAIN"], ["w", [30.0, 31.0], "SPEAKER_MAIN"]]
    rows = [
        write_dialogue(tmp_path, "a.wav", [*TALK, *odd], duration_s=8.9),
        {**write_dialogue(tmp_path, "b.wav"), "duration": 12.0},
    ]
    dialogues = open_dialogues(tmp_path, rows)
    assert len(dialogues.segments) == 3
    assert dialogues.noted == {
        "rests of under 1 s, left out": 1,
        "words outside their recording or without duration, left out": 4,
        "recordings of another duration than the manifest says": 1,
    }


def test_recordings_of_one_name_in_two_folders_get_different_ids(tmp_path):
    rows = [write_dialogue(tmp_path, f"{folder}/talk.wav", duration_s=5.0) for folder in "ab"]
    segments = open_dialogues(tmp_path, rows).segments
    assert [segment.speaker_id for segment in segments] == ["talk-a-talk", "talk-b-talk"]


def encode_talk(manifest, out, mimi, **options):
    return encode_manifest(manifest, out, mimi, "0", composition=COMPOSITION, progress=False, **options)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def manifest(tmp_path):
    rows = [write_dialogue(tmp_path / "raw", f"{name}.wav") for name in "abc"]
    rows.append(write_dialogue(tmp_path / "raw", "glad.wav", emotion="happy"))
    return write_manifest(tmp_path / "raw", rows)


def test_the_table_has_groups_with_and_without_emotion(manifest, mimi, tmp_path):
    report = encode_talk(manifest, tmp_path / "out", mimi)
    assert {group: count for group, (count, _) in report.groups.items()} == {
        ("train", "unlabelled"): 6,
        ("train", "happy"): 2,
    }
    assert "noted" not in report.render()
    table = load_dataset(str(tmp_path / "out"))
    assert set(table) == {"train"}
    rows = {row["id"]: row for row in table["train"]}
    assert set(rows) == {f"talk-{name}-000{i}" for name in ("a", "b", "c", "glad") for i in (0, 1)}
    plain, glad = rows["talk-a-0000"], rows["talk-glad-0000"]
    assert (plain["emotion"], plain["language"], plain["speaker_id"], plain["num_frames"]) == (
        None,
        None,
        "talk-a",
        100,
    )
    assert np.asarray(plain["codes"]).shape == (2, 16, 100)
    assert [word["channel"] for word in plain["words"]] == [0, 1]
    assert table["train"].features["emotion"].int2str(glad["emotion"]) == "happy"
    metadata = read_card_metadata(tmp_path / "out")
    assert (metadata["corpus"], metadata["manifest"], metadata["license"]) == ("talk", "talk.jsonl", "other")
    assert "license: other" in (tmp_path / "out" / "README.md").read_text()


def test_interrupted_and_shared_runs_give_the_same_table(manifest, mimi, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_csm.encode.compose.BLOCK_CONVERSATIONS", 2)
    encode_talk(manifest, tmp_path / "straight", mimi)
    real, calls = MimiCodec.encode, []

    def stop_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(MimiCodec, "encode", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        encode_talk(manifest, tmp_path / "out", mimi)
    assert not encode_talk(manifest, tmp_path / "out", mimi, rank=1, world_size=2).is_complete
    assert encode_talk(manifest, tmp_path / "out", mimi, rank=0, world_size=2).is_complete
    assert files_of(tmp_path / "out") == files_of(tmp_path / "straight")


def test_other_recordings_make_another_table(manifest, mimi, tmp_path):
    encode_talk(manifest, tmp_path / "out", mimi)
    alignments = manifest.parent / "a.json"
    alignments.write_text(alignments.read_text().replace("hi", "ho"))
    with pytest.raises(UserError, match="holds something else"):
        encode_talk(manifest, tmp_path / "out", mimi)


@pytest.mark.parametrize("second", [0, 15, 29.9], ids=["begin", "middle", "end"])
def test_an_edited_recording_of_the_same_size_is_another(tmp_path, second):
    samples = tones(30.0, SAMPLE_RATE)
    before = open_dialogues(tmp_path, [write_dialogue(tmp_path, "a.wav", samples=samples, duration_s=30.0)]).sha256
    samples[round(second * SAMPLE_RATE) :][:100] = 0
    after = open_dialogues(tmp_path, [write_dialogue(tmp_path, "a.wav", samples=samples, duration_s=30.0)]).sha256
    assert after != before


def test_a_row_may_name_the_language(tmp_path):
    rows = [write_dialogue(tmp_path, f"{name}.wav", duration_s=5.0, language=name) for name in ("EN", "zh", None)]
    assert [segment.language for segment in open_dialogues(tmp_path, rows).segments] == ["en", "zh", None]


def test_a_byte_order_mark_in_a_manifest_is_ignored(tmp_path):
    manifest = write_manifest(tmp_path, [write_dialogue(tmp_path, "a.wav", duration_s=5.0)])
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes())
    assert len(Dialogues(manifest, "talk", COMPOSITION).segments) == 1


def test_a_manifest_named_after_a_split_takes_its_folders_name(tmp_path, mimi):
    rows = [write_dialogue(tmp_path / "Daily Talk", "a.wav", duration_s=2.0)]
    manifest = write_manifest(tmp_path / "Daily Talk", rows)
    manifest = manifest.rename(manifest.with_name("train.jsonl"))
    assert encode_talk(manifest, tmp_path / "out", mimi).is_new
    assert read_card_metadata(tmp_path / "out")["corpus"] == "daily_talk"
    assert not encode_talk(manifest, tmp_path / "out", mimi).is_new


def test_the_corpus_is_named_after_the_manifest_by_default(manifest, mimi, tmp_path):
    renamed = manifest.rename(manifest.with_name("Daily Talk-2.jsonl"))
    encode_talk(renamed, tmp_path / "out", mimi)
    assert read_card_metadata(tmp_path / "out")["corpus"] == "daily_talk_2"
    encode_talk(renamed, tmp_path / "replay", mimi, corpus="replay")
    assert read_card_metadata(tmp_path / "replay")["corpus"] == "replay"
    assert len(split_files(tmp_path / "replay", "train")) == 2


BAD_INPUT = {
    "no manifest": (lambda raw: (raw / "talk.jsonl").unlink(), "talk.jsonl: no manifest"),
    "no text": (lambda raw: (raw / "talk.jsonl").write_bytes(b"\xff\xfe"), "not UTF-8"),
    "empty": (lambda raw: (raw / "talk.jsonl").write_text("\n"), "empty"),
    "not JSON": (lambda raw: add_line(raw, "{"), "line 2: not JSON"),
    "not an object": (lambda raw: add_line(raw, '"a.wav"'), "line 2: no path"),
    "no path": (lambda raw: add_line(raw, '{"duration": 1.0}'), "line 2: no path"),
    "folder": (lambda raw: add_line(raw, '{"path": "./"}'), "line 2: no path"),
    "absolute": (lambda raw: add_line(raw, '{"path": "/etc/a.wav"}'), "line 2: /etc/a.wav is not inside"),
    "outside": (lambda raw: add_line(raw, '{"path": "x/../../a.wav"}'), r"line 2: x/../../a.wav is not inside"),
    "twice": (lambda raw: add_line(raw, '{"path": "./a.wav"}'), "named in line 1"),
    "no duration": (lambda raw: add_line(raw, '{"path": "b.wav", "duration": "5"}'), "duration of b.wav is '5'"),
    "unknown emotion": (
        lambda raw: add_line(raw, '{"path": "b.wav", "emotion": "glad"}'),
        "line 2: unknown .* 'glad'",
    ),
    "no language": (lambda raw: add_line(raw, '{"path": "b.wav", "language": 3}'), "language of b.wav is 3"),
    "no audio": (lambda raw: add_line(raw, '{"path": "b.wav"}'), "line 2: .*b.wav does not exist"),
    "no sound": (lambda raw: (raw / "a.wav").write_text("hello"), "a.wav is not a sound file"),
    "mono": (
        lambda raw: write_dialogue(raw, "a.wav", samples=tones(5.0, 24_000)[:, 0]),
        "1 channel.\nTwo .* left.* right",
    ),
    "no alignments": (lambda raw: (raw / "a.json").unlink(), "a.json: no such file"),
    "alignments cut short": (lambda raw: (raw / "a.json").write_text('{"alignments": [["'), "a.json: not valid JSON"),
    "no list of them": (lambda raw: (raw / "a.json").write_text('{"alignments": 3}'), "damaged .* entry 0 is '3'"),
    "no times": (lambda raw: write_dialogue(raw, "a.wav", [TALK[0], ["x", 3, "A"]]), "damaged .* entry 1"),
    "times of text": (lambda raw: write_dialogue(raw, "a.wav", [["x", ["1", "2"], "A"]]), "damaged .* entry 0"),
    "times without end": (lambda raw: write_dialogue(raw, "a.wav", [["x", [1, float("inf")], "A"]]), "damaged"),
    "nothing long enough": (lambda raw: write_dialogue(raw, "a.wav", duration_s=0.9), "as long as 1 s"),
}


def add_line(raw, line):
    with (raw / "talk.jsonl").open("a") as manifest:
        manifest.write(line + "\n")


@pytest.mark.parametrize(("damage", "problem"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_by_name(tmp_path, damage, problem):
    manifest = write_manifest(tmp_path, [write_dialogue(tmp_path, "a.wav", duration_s=5.0)])
    damage(tmp_path)
    with pytest.raises(UserError, match=problem) as error:
        encode_talk(manifest, tmp_path / "out", mimi=None)
    assert "\n" not in error.value.problem and "\n" not in error.value.remedy
    assert not (tmp_path / "out").exists()


def test_windows_too_short_for_a_lead_in_are_refused(tmp_path):
    with pytest.raises(UserError, match="Windows of 3 seconds"):
        open_dialogues(tmp_path, [write_dialogue(tmp_path, "a.wav")], Composition(duration_s=3.0))
