import json

import numpy as np
import pytest
import soundfile

from dataset_builders.csv_manifest import split_speakers
from hf_csm.corpora import make_builder
from hf_csm.errors import UserError
from hf_csm.prepare.utterance import Tally


ROWS = [
    {"path": "a/one.wav", "text": "Hello there.", "emotion": "Happiness", "speaker": "anna", "split": "train"},
    {"path": "a/two.flac", "text": "Oh no!", "emotion": "", "speaker": "anna", "split": "train"},
    {"path": "b.ogg", "text": "Go away.", "emotion": "angry", "speaker": "Bob", "split": "dev"},
]


def write(folder, rows, name="mine.csv", touch=True, encoding="utf-8"):
    """Write the rows as a table, and an empty file for each path."""
    folder.mkdir(exist_ok=True)
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        mark = "\t" if name.endswith(".tsv") else ","
        quoted = [[f'"{cell}"' if mark in str(cell) else str(cell) for cell in row.values()] for row in rows]
        text = "".join(mark.join(cells) + "\n" for cells in [list(rows[0]), *quoted])
    (folder / name).write_bytes(text.encode(encoding))
    for row in rows if touch else []:
        path = folder / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder / name


def listing(source, **options):
    shards, tally = make_builder("csv_manifest", source, **options).shards()
    return {utterance.id: utterance for shard in shards for utterance in shard.utterances}, tally


def clip(number, **changes):
    return {"path": f"{number}.wav", "text": "Hi.", "emotion": "sad", "speaker": "s", "split": "train", **changes}


@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv", "mine.jsonl", "Mine.CSV"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_clips_are_described_by_the_rows_of_the_table(tmp_path, name, encoding):
    table = write(tmp_path, ROWS, name, encoding=encoding)
    (tmp_path / "not_named.wav").write_bytes(b"x")
    for source in (table, tmp_path):
        found, tally = listing(source)
        assert [*found] == ["mine-a-one", "mine-a-two", "mine-b"]
        one, two, three = found.values()
        assert (one.emotion_raw, two.emotion_raw, three.emotion_raw) == ("happiness", None, "angry")
        assert (one.text, one.speaker_id, one.split, one.language) == ("Hello there.", "mine-anna", "train", "en")
        assert (three.speaker_id, three.split) == ("mine-Bob", "validation")
        assert one.member.read() == b"x"
        assert not tally.counts


@pytest.mark.parametrize(("suffix", "subtype"), [("wav", "FLOAT"), ("flac", None), ("ogg", None), ("mp3", None)])
def test_any_sound_that_libsndfile_reads_becomes_a_row(tmp_path, suffix, subtype):
    if suffix.upper() not in soundfile.available_formats():
        pytest.skip(f"this libsndfile has no {suffix}")
    write(tmp_path, [clip(1, path=f"one.{suffix}", emotion="Joy")])
    sound = 0.1 * np.sin(np.arange(22_050) / 20)
    soundfile.write(tmp_path / f"one.{suffix}", np.stack([sound, sound], axis=1), 22_050, subtype=subtype)
    builder = make_builder("csv_manifest", tmp_path, license="cc-by-4.0")
    (row,) = (row for shard in builder.shards()[0] for row in builder.rows(shard, Tally()))
    assert (row["id"], row["corpus"], row["license"], row["text"]) == ("mine-one", "mine", "cc-by-4.0", "Hi.")
    assert (row["emotion"], row["emotion_raw"]) == (2, "joy")
    assert row["duration_s"] == pytest.approx(1.0, abs=0.1)


def test_all_that_a_table_may_say_is_kept(tmp_path):
    optional = {"LANGUAGE": "DE", "gender": "F", "Intensity": "High", "arousal": "0.75", "valence": "0"}
    optional |= {"dominance": "1", "sentence": "s7", "emotion_perceived": "Fear", "emotion_agreement": "0.6"}
    write(tmp_path, [clip(1, **optional), clip(2, **dict.fromkeys(optional, ""))])
    full, bare = listing(tmp_path)[0].values()
    assert (full.language, full.gender, full.intensity, full.sentence_id) == ("de", "female", "high", "mine-s7")
    assert (full.arousal, full.valence, full.dominance) == (0.75, 0.0, 1.0)
    assert (full.emotion_perceived_raw, full.emotion_agreement) == ("fear", 0.6)
    assert bare.language == "en" and bare.gender is bare.intensity is bare.sentence_id is bare.arousal is None
    assert bare.valence is bare.dominance is bare.emotion_perceived_raw is bare.emotion_agreement is None


def test_cells_of_json_lines_may_be_numbers_and_null(tmp_path):
    rows = [clip(1, speaker=7, arousal=0.5, emotion=None), clip(2, speaker=7)]
    write(tmp_path, rows, "mine.jsonl")
    one, two = listing(tmp_path)[0].values()
    assert (one.speaker_id, one.arousal, one.emotion_raw, two.arousal) == ("mine-7", 0.5, None, None)


def test_columns_that_are_not_used_are_noted_once(tmp_path):
    write(tmp_path, [clip(1, mood="x", Take="1"), clip(2, mood="y", Take="2")])
    _, tally = listing(tmp_path)
    assert tally.counts == {("noted", "unused column"): 2}
    assert tally.examples == {("noted", "unused column"): "column mood"}


def test_a_path_named_twice_is_a_second_copy_and_a_missing_file_is_dropped(tmp_path):
    rows = [clip(number) for number in range(100)]
    write(tmp_path, [*rows, clip(7, path="./7.wav")])
    (tmp_path / "9.wav").unlink()
    found, tally = listing(tmp_path)
    assert len(found) == 99
    assert tally.counts == {("dropped", "second copy of a file"): 1, ("dropped", "row without its file"): 1}
    (tmp_path / "8.wav").unlink()
    with pytest.raises(UserError, match=r"2 of 100 .*without its file: 8\.wav, 9\.wav"):
        listing(tmp_path)


def test_without_a_split_column_speakers_are_dealt_by_their_hashes():
    speakers = [f"s{number}" for number in range(50)]
    splits = split_speakers(speakers)
    assert splits == split_speakers(reversed(speakers))
    assert split_speakers(["anna", "Bob", "carl"]) == {"anna": "test", "carl": "validation", "Bob": "train"}
    assert [list(splits.values()).count(split) for split in ("train", "validation", "test")] == [40, 5, 5]
    assert {split for speaker, split in splits.items() if speaker in speakers[:30]} == {"train", "validation", "test"}


@pytest.mark.parametrize("num_speakers", [3, 4, 5, 14])
def test_three_speakers_are_enough_for_all_splits(tmp_path, num_speakers):
    rows = [clip(f"{speaker}-{take}", speaker=f"s{speaker}") for speaker in range(num_speakers) for take in range(2)]
    for row in rows:
        del row["split"]
    write(tmp_path, rows)
    found, tally = listing(tmp_path)
    by_split = {
        split: {u.speaker_id for u in found.values() if u.split == split} for split in ("train", "validation", "test")
    }
    assert sorted(map(len, by_split.values())) == [1, 1, num_speakers - 2]
    assert not tally.counts


def test_fewer_than_three_speakers_all_train_and_this_is_noted(tmp_path):
    rows = [clip(number, speaker=f"s{number % 2}") for number in range(4)]
    for row in rows:
        del row["split"]
    write(tmp_path, rows)
    found, tally = listing(tmp_path)
    assert {u.split for u in found.values()} == {"train"}
    assert tally.counts == {("noted", "fewer than three speakers: all are for training"): 1}


def test_a_speaker_in_two_splits_is_an_error(tmp_path):
    write(tmp_path, [clip(1), clip(2, split="test")])
    with pytest.raises(UserError, match="mine-s.* two splits"):
        listing(tmp_path)


@pytest.mark.parametrize(
    ("table", "options", "name"),
    [
        ("My own: Größe.csv", {}, "my-own-gr-e"),
        ("mine.csv", {"corpus_name": "Other_Name"}, "other_name"),
        ("ravdess.csv", {"corpus_name": "my-ravdess"}, "my-ravdess"),
    ],
)
def test_the_corpus_is_called_by_its_table_or_as_asked(tmp_path, table, options, name):
    write(tmp_path, [clip(1)], table)
    builder = make_builder("csv_manifest", tmp_path, **options)
    assert builder.corpus == name and builder.LICENSE == "other"
    (utterance,) = builder.shards()[0][0].utterances
    assert (utterance.id, utterance.speaker_id) == (f"{name}-1", f"{name}-s")


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("ravdess.csv", {}, "'ravdess' is the name of a built-in corpus"),
        ("mine.csv", {"corpus_name": "ESD"}, "'ESD' is the name of a built-in corpus"),
        ("日本.csv", {}, "has no letter or digit"),
    ],
)
def test_a_name_that_cannot_be_is_an_error(tmp_path, table, options, message):
    with pytest.raises(UserError, match=message):
        make_builder("csv_manifest", write(tmp_path, [clip(1)], table), **options)


@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv", "mine.jsonl"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "../2.wav"}, r"the path '\.\./2\.wav' is not below"),
        ({"path": "a/../../2.wav"}, "is not below"),
        ({"path": "/etc/passwd"}, r"the path '/etc/passwd' is not below"),
        ({"path": "..\\2.wav"}, "is not below"),
        ({"path": ""}, r"the path '' is not below"),
        ({"path": "0.flac"}, r"0\.flac and 0\.wav have the same id, mine-0"),
        ({"text": " "}, r"the transcript '' is empty"),
        ({"emotion": "hangry"}, "unknown emotion 'hangry'"),
        ({"emotion_perceived": "hangry"}, "unknown emotion_perceived 'hangry'"),
        ({"gender": "womann"}, "unknown gender 'womann'"),
        ({"path": "0.wav", "text": "Ho."}, r"0\.wav differs from its row in .*row [12]"),
        ({"intensity": "loud"}, "unknown intensity 'loud'"),
        ({"split": "later"}, "unknown split 'later'"),
        ({"split": ""}, "no split"),
        ({"speaker": ""}, "no speaker"),
        ({"arousal": "5"}, "arousal is '5'"),
        ({"valence": "nan"}, "valence is 'nan'"),
        ({"emotion_agreement": "all"}, "emotion_agreement is 'all'"),
    ],
)
def test_a_row_that_cannot_be_is_an_error_with_its_number(tmp_path, name, changes, message):
    blank = dict.fromkeys(changes.keys() - clip(0).keys(), "")
    write(tmp_path / "in", [clip(0, **blank), clip(1, **changes)], name, touch=False)
    for path in ("0.wav", "1.wav", "0.flac"):
        (tmp_path / "in" / path).write_bytes(b"x")
    (tmp_path / "2.wav").write_bytes(b"x")
    number = 2 if name == "mine.jsonl" else 3
    with pytest.raises(UserError, match=rf"{name}: row {number}: .*{message}") as error:
        listing(tmp_path / "in")
    assert len(str(error.value).splitlines()) == 2


def test_absolute_paths_and_detours_are_fine_inside_the_folder(tmp_path):
    write(tmp_path, [clip(1, path=str(tmp_path / "1.wav")), clip(2, path="a/../2.wav"), clip(3, path="b\\3.wav")])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "3.wav").write_bytes(b"x")
    assert [*listing(tmp_path)[0]] == ["mine-1", "mine-2", "mine-b-3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.csv", b"path,text,speaker\n1.wav,Hi.,s\n", r"row 2: no column emotion; there are path, text, speaker"),
        ("mine.csv", b"path;text;emotion;speaker\n1.wav;a;sad;s\n", "no column path, text, emotion, speaker"),
        ("mine.csv", b"path,text,emotion,speaker\n", r"mine\.csv: has no rows"),
        ("mine.csv", b"", r"mine\.csv: has no rows"),
        ("mine.csv", b"path,text,emotion,speaker\n1.wav,caf\xe9,sad,s\n", "not UTF-8 text"),
        ("mine.csv", b"path,text,emotion,speaker,text\n", "column 'text' is there twice"),
        (
            "mine.csv",
            b"path,text,emotion,speaker\n\n1.wav,a,sad\n",
            r"from its first row on \(3 cells under 4 columns",
        ),
        ("mine.csv", b'path,text,emotion,speaker\n1.wav,"a,sad,s\n', "unexpected end of data"),
        ("mine.jsonl", b'{"path": "1.wav",\n', r"mine\.jsonl: cannot be read from its first row on"),
        ("mine.jsonl", b"[1]\n", "is not an object"),
        ("mine.jsonl", b'{"path": ["1.wav"]}\n', "'path' holds more than one value"),
    ],
)
def test_a_damaged_table_is_an_error_with_its_position(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        listing(tmp_path)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["."], r"not exactly one .*: a\.csv, b\.tsv"),
        (["sub"], r"not exactly one .*: none"),
        (["a.txt"], r"a\.txt: not a table or folder"),
        (["gone.csv"], r"gone\.csv: not a table or folder"),
        (["a.csv", "b.tsv"], "2 sources"),
    ],
)
def test_sources_without_exactly_one_table_are_an_error(tmp_path, sources, message):
    (tmp_path / "sub").mkdir()
    for name in ("a.csv", "b.tsv", "a.txt"):
        (tmp_path / name).write_text("path,text,emotion,speaker\n")
    with pytest.raises(UserError, match=message):
        listing([tmp_path / source for source in sources])


def test_a_missing_table_is_an_error():
    with pytest.raises(UserError, match="no table was given"):
        listing(None)
