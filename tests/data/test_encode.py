import shutil
from operator import attrgetter

import numpy as np
import pytest
import torch
from datasets import load_dataset

from hf_csm.data.audio import decode_audio
from hf_csm.data.conversation import Composition, compose
from hf_csm.data.encode import encode, plan_shards
from hf_csm.data.schema import SPLITS
from hf_csm.data.table import ParquetRows, read_card_metadata, split_files
from hf_csm.errors import UserError
from hf_csm.models.moshi import codec_sha256, find_checkpoint, load_mimi
from hf_csm.units import SAMPLES_PER_FRAME


COMPOSITION = Composition(duration_s=12.0)


@pytest.fixture(scope="module")
def base(tiny_moshi):
    return find_checkpoint(str(tiny_moshi))


@pytest.fixture(scope="module")
def mimi(base):
    return load_mimi(base)


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
    shards, _ = plan_shards(files, COMPOSITION, variants=1)
    conversations = [c for shard in shards if shard.split == "train" for c in shard.conversations]
    for conversation in (
        min(conversations, key=attrgetter("num_samples")),
        max(conversations, key=attrgetter("num_samples")),
    ):
        waveform = compose(conversation, lambda clip: decode_audio(clips.row(*clip.place)["audio"]), COMPOSITION)
        frames = torch.from_numpy(waveform).reshape(2, 1, -1, SAMPLES_PER_FRAME)
        with torch.no_grad(), mimi.streaming(2):
            streamed = torch.cat([mimi.encode(frames[:, :, t]) for t in range(frames.shape[2])], dim=2)
        np.testing.assert_array_equal(stored[f"ravdess-{conversation.id}"], streamed.numpy())


def test_words_lie_inside_the_turns_of_their_channel(codes):
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
    encode(prepared, codes, mimi, codec_sha256(base), composition=COMPOSITION, progress=False)
    assert {path: path.stat().st_mtime_ns for path in codes.rglob("*")} == before


def test_a_stopped_run_goes_on_and_gives_the_same_table(codes, prepared, mimi, base, tmp_path, monkeypatch):
    import hf_csm.data.encode as module

    out = tmp_path / "ravdess"
    calls = []
    real = module.encode_waveforms

    def stop_after_five(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "encode_waveforms", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        encode(prepared, out, mimi, codec_sha256(base), composition=COMPOSITION, progress=False)
    assert not out.exists()
    num_before = len(calls)
    encode(prepared, out, mimi, codec_sha256(base), composition=COMPOSITION, progress=False)
    total = len(calls) - 1
    assert total > num_before  # it had something left to do
    assert files_of(out) == files_of(codes)
    monkeypatch.setattr(module, "encode_waveforms", real)
    again = tmp_path / "again"
    encode(prepared, again, mimi, codec_sha256(base), composition=COMPOSITION, progress=False)
    assert files_of(again) == files_of(codes)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_variants_compose_other_conversations(prepared, mimi, base, tmp_path):
    report = encode(
        prepared, tmp_path / "two", mimi, codec_sha256(base), composition=COMPOSITION, variants=2, progress=False
    )
    rows = load_dataset(str(tmp_path / "two"), split="train")
    assert set(rows["variant"]) == {0, 1}
    assert len(set(rows["id"])) == len(rows)
    assert sum(count for count, _ in report.cells.values()) == sum(
        len(split) for split in load_dataset(str(tmp_path / "two")).values()
    )


def test_another_table_at_out_is_kept(prepared, mimi, base, tmp_path):
    shutil.copytree(prepared, tmp_path / "out")
    with pytest.raises(UserError, match="holds something else"):
        encode(prepared, tmp_path / "out", mimi, codec_sha256(base), progress=False)


def test_codes_are_not_encoded_again(codes, mimi, base, tmp_path):
    with pytest.raises(UserError, match="not a prepared corpus"):
        encode(codes, tmp_path / "out", mimi, codec_sha256(base), progress=False)
