import multiprocessing
import shutil
from operator import attrgetter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

import hf_csm.encode.compose
import hf_csm.encode.run
from hf_csm.data.audio import decode_audio
from hf_csm.data.schema import SPLITS, UTTERANCE_FEATURES
from hf_csm.data.table import ParquetRows, ShardWriter, read_card_metadata, read_columns, split_files
from hf_csm.encode.compose import Composition, compose
from hf_csm.encode.moshi_finetune import export_manifest
from hf_csm.encode.prepared_corpus import plan_units
from hf_csm.encode.run import encode
from hf_csm.errors import UserError
from hf_csm.models.moshi.checkpoint import codec_sha256, find_checkpoint
from hf_csm.models.moshi.codec import MimiCodec, load_codec
from hf_csm.units import SAMPLES_PER_FRAME
from tests.doubles.codes import restate_sizes


COMPOSITION = Composition(duration_s=12.0)


@pytest.fixture(scope="module")
def base(tiny_moshi):
    return find_checkpoint(str(tiny_moshi))


@pytest.fixture(scope="module")
def mimi(base):
    return load_codec(base)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_table_opens_with_load_dataset(codes):
    table = load_dataset(str(codes))
    assert set(table) == {"train", "validation", "test"}
    row = next(iter(load_dataset(str(codes), split="train", streaming=True)))
    assert np.asarray(row["codes"]).shape == (2, 16, row["num_frames"])


def test_rows_keep_the_split_of_their_speakers(codes):
    speakers = {name: set(split["speaker_id"]) for name, split in load_dataset(str(codes)).items()}
    assert not speakers["train"] & speakers["validation"]
    assert not speakers["train"] & speakers["test"]


def test_the_user_comes_from_the_same_split(codes, prepared):
    split_of = {row["id"]: name for name, rows in load_dataset(str(prepared)).items() for row in rows}
    for name, rows in load_dataset(str(codes)).items():
        for row in rows:
            assert {split_of[turn["clip_id"]] for turn in row["turns"]} == {name}


def test_stored_codes_are_those_of_the_streaming_encoder(codes, prepared, mimi):
    """From the clips on disk to the codes on disk, against moshi's streaming encoder fed 80 ms at a time."""
    stored = {row["id"]: np.asarray(row["codes"]) for row in load_dataset(str(codes), split="train")}
    files = [path for split in SPLITS for path in split_files(prepared, split)]
    clips = ParquetRows(files)
    units, _ = plan_units(files, COMPOSITION, variants=1)
    conversations = [c for unit in units if unit.split == "train" for c in unit.conversations]
    for conversation in (
        min(conversations, key=attrgetter("num_samples")),
        max(conversations, key=attrgetter("num_samples")),
    ):
        waveform = compose(conversation, lambda clip: decode_audio(clips.row(*clip.place)["audio"]), COMPOSITION)
        frames = torch.from_numpy(waveform).reshape(2, 1, -1, SAMPLES_PER_FRAME)
        with torch.no_grad(), mimi.mimi.streaming(2):
            streamed = torch.cat([mimi.mimi.encode(frames[:, :, t]) for t in range(frames.shape[2])], dim=2)
        np.testing.assert_array_equal(stored[f"ravdess-{conversation.id}"], streamed.numpy())


def test_rows_are_in_the_order_of_the_plan(codes, prepared):
    files = [path for split in SPLITS for path in split_files(prepared, split)]
    units, _ = plan_units(files, COMPOSITION, variants=1)
    planned = [f"ravdess-{conversation.id}" for unit in units for conversation in unit.conversations]
    written = [path for split in SPLITS for path in split_files(codes, split)]
    assert read_columns(written, ["id"]).column("id").to_pylist() == planned


def test_words_are_inside_the_turns_of_their_channel(codes):
    rows = load_dataset(str(codes), split="train")
    assert all(0 <= w["start_s"] < w["end_s"] <= row["num_frames"] / 12.5 for row in rows for w in row["words"])
    for row in rows:
        turns = [turn for turn in row["turns"] if turn["channel"] == 0]
        spoken = [word for word in row["words"] if word["channel"] == 0]
        assert all(any(t["start_s"] <= w["start_s"] and w["end_s"] <= t["end_s"] for t in turns) for w in spoken)


def test_the_card_names_codec_and_composition(codes, base):
    metadata = read_card_metadata(codes)
    assert metadata["codec_sha256"] == codec_sha256(base)
    assert metadata["composition"]["duration_s"] == 12.0
    assert codec_sha256(base) in (codes / "README.md").read_text()


def test_encoding_again_does_nothing(codes, prepared, mimi, base):
    before = {path: path.stat().st_mtime_ns for path in codes.rglob("*")}
    report = encode(prepared, codes, mimi, codec_sha256(base), composition=COMPOSITION, progress=False)
    assert not report.is_new
    assert {path: path.stat().st_mtime_ns for path in codes.rglob("*")} == before


@pytest.fixture
def small_units(monkeypatch):
    """Units of one or two conversations, so that every group has several, and a fast stand-in for the codec."""
    monkeypatch.setattr(hf_csm.encode.compose, "BLOCK_CONVERSATIONS", 2)
    monkeypatch.setattr(MimiCodec, "encode", loudness_codes)


def loudness_codes(mimi, waveforms):
    """Return int16 `[2, 16, T]` each: the loudness of each frame, so that other sound has other codes."""
    frames = [waveform.reshape(2, 1, -1, SAMPLES_PER_FRAME).std(axis=-1) for waveform in waveforms]
    return [np.repeat(1e5 * loudness, 16, axis=1).astype(np.int16) for loudness in frames]


def encode_some(prepared, out, mimi, **options):
    return encode(prepared, out, mimi, "0", composition=COMPOSITION, batch_s=40.0, progress=False, **options)


@pytest.fixture
def straight(small_units, prepared, mimi, tmp_path):
    """A table that one run made in one go."""
    report = encode_some(prepared, tmp_path / "straight", mimi)
    assert report.is_complete
    return files_of(tmp_path / "straight")


def test_an_interrupted_run_resumes_with_the_same_table(straight, prepared, mimi, tmp_path, monkeypatch):
    """It stops before its first batch, then three further on, and so on, until it is through."""
    calls = []

    def stop_at_every_third(*args):
        calls.append(args)
        if len(calls) % 3 == 1:
            raise KeyboardInterrupt
        return loudness_codes(*args)

    monkeypatch.setattr(MimiCodec, "encode", stop_at_every_third)
    out = tmp_path / "out"
    stops = []
    while not out.exists() and len(stops) < 50:
        try:
            encode_some(prepared, out, mimi)
        except KeyboardInterrupt:
            stops.append(out.exists())
    assert len(stops) > 3
    assert not any(stops)
    assert files_of(out) == straight
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1)])
def test_several_processes_give_the_table_of_one(straight, prepared, mimi, tmp_path, order):
    *first, last = [encode_some(prepared, tmp_path / "out", mimi, rank=rank, world_size=len(order)) for rank in order]
    assert not any(report.is_complete for report in first)
    assert "Other processes" in first[0].render()
    assert last.is_complete
    assert files_of(tmp_path / "out") == straight
    # One that comes late finds the table.
    assert encode_some(prepared, tmp_path / "out", mimi, rank=0, world_size=len(order)).is_complete


def test_the_number_of_processes_may_change_between_runs(straight, prepared, mimi, tmp_path):
    encode_some(prepared, tmp_path / "out", mimi, rank=2, world_size=3)
    assert encode_some(prepared, tmp_path / "out", mimi).is_complete
    assert files_of(tmp_path / "out") == straight


def test_two_concurrent_processes_give_the_table_of_one(straight, prepared, mimi, tmp_path):
    context = multiprocessing.get_context("fork")  # with the codec that takes no time
    processes = [
        context.Process(
            target=encode_some, args=(prepared, tmp_path / "out", mimi), kwargs={"rank": rank, "world_size": 2}
        )
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
    assert [process.exitcode for process in processes] == [0, 0]
    assert files_of(tmp_path / "out") == straight


@pytest.mark.parametrize("is_published", [True, False], ids=["published", "gone"])
def test_a_run_whose_staging_folder_is_removed_succeeds_if_the_table_is_published(
    straight, prepared, mimi, tmp_path, monkeypatch, is_published
):
    codec = MimiCodec.encode

    def overtaken(*args):
        monkeypatch.setattr(MimiCodec, "encode", codec)
        if is_published:
            encode_some(prepared, tmp_path / "out", mimi)
        else:
            shutil.rmtree(tmp_path / ".out.partial")
        return codec(*args)

    monkeypatch.setattr(MimiCodec, "encode", overtaken)
    if is_published:
        assert encode_some(prepared, tmp_path / "out", mimi).is_complete
        assert files_of(tmp_path / "out") == straight
        assert not list(tmp_path.glob(".*"))
    else:
        with pytest.raises(FileNotFoundError):
            encode_some(prepared, tmp_path / "out", mimi)


def test_an_incomplete_corpus_is_not_encoded(prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    next(copy.glob("data/train/*.parquet")).unlink()
    with pytest.raises(UserError, match="copy: not a whole table"):
        encode(copy, tmp_path / "out", None, "0", progress=False)


def test_a_prepared_table_of_another_version_is_refused_with_the_command_that_makes_it(prepared, tmp_path):
    old = shutil.copytree(prepared, tmp_path / "old")
    for path in old.rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["sentence_id"]), path)
    restate_sizes(old)
    for make in (encode, export_manifest):
        arguments = (None, "0") if make is encode else ()
        with pytest.raises(UserError, match=r"'sentence_id'.*\n.*hf-csm prepare ravdess"):
            make(old, tmp_path / "out", *arguments, progress=False)


def test_the_label_is_in_the_card(codes, prepared, mimi, tmp_path):
    assert read_card_metadata(codes)["label"] == "acted"
    assert "- label: `acted`" in (codes / "README.md").read_text()
    with pytest.raises(UserError, match="--label agreed"):
        encode_some(prepared, tmp_path / "out", mimi, label="agreed")


def test_another_label_is_another_table(small_units, prepared, mimi, tmp_path):
    voted = tmp_path / "voted"
    shutil.copytree(prepared, voted)
    for path in voted.rglob("*.parquet"):
        table = pq.read_table(path)
        column = table.schema.get_field_index("emotion_perceived")
        table = table.set_column(column, table.schema.field(column), table.column("emotion"))
        with ShardWriter(path, UTTERANCE_FEATURES) as writer:
            writer.write(table)
    restate_sizes(voted)
    encode_some(voted, tmp_path / "out", mimi, label="agreed")
    assert read_card_metadata(tmp_path / "out")["label"] == "agreed"
    with pytest.raises(UserError, match="holds something else"):
        encode_some(voted, tmp_path / "out", mimi, label="perceived")


def test_windows_and_card_name_the_language(codes):
    assert {row["language"] for split in load_dataset(str(codes)).values() for row in split} == {"en"}
    assert "\nlanguage:\n- en\n" in (codes / "README.md").read_text()


def test_variants_compose_other_conversations(prepared, mimi, base, tmp_path):
    report = encode(
        prepared, tmp_path / "two", mimi, codec_sha256(base), composition=COMPOSITION, variants=2, progress=False
    )
    rows = load_dataset(str(tmp_path / "two"), split="train")
    assert set(rows["variant"]) == {0, 1}
    assert len(set(rows["id"])) == len(rows)
    assert sum(count for count, _ in report.groups.values()) == sum(
        len(split) for split in load_dataset(str(tmp_path / "two")).values()
    )


def test_another_table_at_out_is_kept(prepared, mimi, base, tmp_path):
    shutil.copytree(prepared, tmp_path / "out")
    with pytest.raises(UserError, match="holds something else"):
        encode(prepared, tmp_path / "out", mimi, codec_sha256(base), progress=False)


def test_codes_are_not_encoded_again(codes, mimi, base, tmp_path):
    with pytest.raises(UserError, match="not a prepared corpus"):
        encode(codes, tmp_path / "out", mimi, codec_sha256(base), progress=False)
