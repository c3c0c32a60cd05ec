import dataclasses
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

import hf_csm
from hf_csm.corpora import make_builder
from hf_csm.data.audio import decode_audio, hash_samples, to_int16
from hf_csm.data.schema import ALIGNMENT_SOURCES, UTTERANCE_FEATURES
from hf_csm.errors import UserError
from hf_csm.prepare.archive import Member
from hf_csm.prepare.checks import hash_listing
from hf_csm.prepare.utterance import Shard, Tally, Utterance
from hf_csm.testing.ravdess import clip_bytes, write_ravdess


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_ravdess(
        tmp_path_factory.mktemp("raw"), actors=(1, 2, 17, 21), emotions=("happy", "sad"), intensities=(1,)
    )


def test_streaming_gives_complete_rows_of_every_split(raw):
    streams = hf_csm.load_corpus("ravdess", raw)
    assert {split: stream.num_shards for split, stream in streams.items()} == {"train": 2, "validation": 1, "test": 1}
    rows = list(streams["train"])
    assert len(rows) == 16
    assert streams["train"].features == UTTERANCE_FEATURES
    for row in rows:
        samples = decode_audio(row["audio"])
        assert row["sha256"] == hash_samples(to_int16(samples))
        assert row["duration_s"] == pytest.approx(len(samples) / 24_000)
        assert [word["word"] for word in row["words"]] == row["text"].split()
        assert row["words"][0]["start_s"] >= 0 and row["words"][-1]["end_s"] <= row["duration_s"]
        assert row["alignment_source"] == 2


def test_streaming_writes_nothing(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    before = sorted(raw.rglob("*"))
    next(iter(hf_csm.load_corpus("ravdess", raw, split="test")))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list((tmp_path / "tmp").iterdir()) == []
    assert sorted(raw.rglob("*")) == before


def test_shards_can_be_distributed_to_workers(raw):
    stream = hf_csm.load_corpus("ravdess", raw, split="train")
    ids = [[row["id"] for row in stream.shard(num_shards=2, index=index)] for index in range(2)]
    assert all(len(found) == 8 for found in ids)
    assert ids[0] + ids[1] == [row["id"] for row in stream]


def test_a_builder_can_be_pickled(raw):
    builder = pickle.loads(pickle.dumps(make_builder("ravdess", raw)))
    assert len(builder.shards()[0]) == 4


def test_without_streaming_rows_can_be_accessed_in_any_order(raw, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    table = hf_csm.load_corpus("ravdess", raw, split="validation", streaming=False)
    assert len(table) == 8
    assert table[3]["speaker_id"] == "ravdess-17"


def test_an_unknown_corpus_is_an_error_with_the_nearest_name():
    with pytest.raises(UserError, match=r"'ravdes'.*'ravdess'"):
        hf_csm.load_corpus("ravdes", "somewhere")


def test_an_unknown_option_or_split_is_an_error(raw):
    with pytest.raises(UserError, match="colour"):
        hf_csm.load_corpus("ravdess", raw, colour="red")
    with pytest.raises(UserError, match="'dev'"):
        hf_csm.load_corpus("ravdess", raw, split="dev")


def test_digital_silence_is_dropped_and_counted(tmp_path):
    from hf_csm.testing.ravdess import wav_bytes

    folder = tmp_path / "Actor_01"
    folder.mkdir()
    (folder / "03-01-03-01-01-01-01.wav").write_bytes(wav_bytes(np.zeros(48_000, np.float32)))
    (folder / "03-01-03-01-01-02-01.wav").write_bytes(clip_bytes("03-01-03-01-01-02-01"))
    builder = make_builder("ravdess", tmp_path)
    (shard,), _ = builder.shards()
    tally = Tally()
    assert len(list(builder.rows(shard, tally))) == 1
    assert tally.counts == {("dropped", "digital silence"): 1}


def test_an_invalid_wav_stops_the_stream_and_is_named(tmp_path):
    (tmp_path / "03-01-03-01-01-01-01.wav").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"03-01-03-01-01-01-01\.wav"):
        list(hf_csm.load_corpus("ravdess", Path(tmp_path), split="train"))


def test_the_listing_hash_depends_on_the_files_and_not_on_their_location(raw, tmp_path):
    clip = clip_bytes("03-01-03-01-01-01-01")
    for place in ("here", "there/Actor_01"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "03-01-03-01-01-01-01.wav").write_bytes(clip)
    hashes = [hash_listing(make_builder("ravdess", tmp_path / place).shards()[0]) for place in ("here", "there")]
    (tmp_path / "here" / "03-01-03-01-01-01-01.wav").write_bytes(clip + b"xx")
    assert hashes[0] == hashes[1] != hash_listing(make_builder("ravdess", tmp_path / "here").shards()[0])


def test_a_speaker_in_two_splits_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    """Also for those who only stream: `prepare` checks again at its end."""
    import dataset_builders.ravdess as ravdess

    write_ravdess(tmp_path, actors=(1,), emotions=("happy",), intensities=(1,), repetitions=(1,), layout="actors")
    real = ravdess.describe

    def leaking(member, match):
        utterance = real(member, match)
        return dataclasses.replace(utterance, split="test") if match["statement"] == "02" else utterance

    monkeypatch.setattr(ravdess, "describe", leaking)
    with pytest.raises(UserError, match="ravdess-01.* two splits"):
        hf_csm.load_corpus("ravdess", tmp_path)


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        ("csv_manifest", {"license": True}, "license cannot be True"),
        ("csv_manifest", {"license": ("cc", "by")}, "license cannot be"),
        ("csv_manifest", {"license": ()}, "license cannot be"),
        ("csv_manifest", {"corpus_name": 1.5}, r"corpus_name cannot be 1\.5"),
        ("ravdess", {"subsets": True}, "subsets cannot be True"),
        ("esd", {"languages": ("en", 3)}, "languages cannot be"),
        ("msp_podcast", {"test_sets": 1}, "test_sets cannot be 1"),
        ("msp_podcast", {"allow_missing_text": "maybe"}, "allow_missing_text cannot be 'maybe'"),
        ("ravdess", {"prosody": "yes"}, "prosody cannot be 'yes'"),
        ("ravdess", {"align_model": True}, "align_model cannot be True"),
    ],
)
def test_an_option_of_another_type_is_an_error_that_names_it(corpus, options, message):
    with pytest.raises(UserError, match=message):
        make_builder(corpus, "raw", **options)


def test_options_from_a_command_line_and_from_python_are_converted_to_their_types(tmp_path):
    options = {"keep_unknown_speakers": ("False",), "allow_missing_text": (), "test_sets": ("Test1",)}
    config = make_builder("msp_podcast", "raw", **options).config
    assert (config.keep_unknown_speakers, config.allow_missing_text) == (False, True)
    assert config.test_sets == ("Test1",)
    config = make_builder("msp_podcast", "raw", keep_unknown_speakers="true", test_sets="Test1").config
    assert (config.keep_unknown_speakers, config.test_sets) == (True, ("Test1",))
    (tmp_path / "a.csv").write_text("path,text,emotion,speaker\n")
    assert make_builder("csv_manifest", tmp_path, corpus_name=("2024",)).corpus == "2024"


@pytest.mark.parametrize(
    ("times", "source", "repaired"),
    [
        ((0.1, 0.5), "corpus", 0),
        ((0.1, 1.04), "corpus", 0),
        ((0.1, 1.06), "energy", 1),
        ((-0.1, 0.5), "energy", 1),
    ],
)
def test_word_times_of_the_corpus_are_used_if_they_are_within_the_clip(tmp_path, times, source, repaired):
    samples = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    samples[9] = 1.5
    soundfile.write(tmp_path / "a.wav", samples, 24_000, subtype="FLOAT")
    member = Member("a.wav", str(tmp_path), 1, is_zipped=False)
    utterance = Utterance("a", member, "Dogs", "happy", "s", "train", words=(("Dogs", *times),))
    tally = Tally()
    (row,) = make_builder("ravdess", "raw").rows(Shard("train", (utterance,)), tally)
    assert row["alignment_source"] == ALIGNMENT_SOURCES.index(source)
    assert 0 <= row["words"][0]["start_s"] < row["words"][-1]["end_s"] <= 1
    assert tally.counts.get(("repaired", "word times lie beyond the clip"), 0) == repaired
    assert tally.counts[("noted", "samples beyond full scale clipped")] == 1


def test_a_clip_of_msp_podcast_may_have_an_upper_case_suffix(tmp_path):
    columns = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"
    row = "MSP-PODCAST_0001_0001.wav,N,4,4,4,1,Male,Train"
    (tmp_path / "labels_consensus.csv").write_text(f"{columns}\n{row}\n")
    (tmp_path / "MSP-PODCAST_0001_0001.txt").write_text("So it is.")
    (tmp_path / "MSP-PODCAST_0001_0001.WAV").write_bytes(b"x")
    ((utterance,),) = (shard.utterances for shard in make_builder("msp_podcast", tmp_path).shards()[0])
    assert (utterance.id, len(utterance.sidecars)) == ("msp_podcast-0001_0001", 1)
