import dataclasses
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest

from hf_csm.data.audio import decode_audio, hash_samples, to_int16
from hf_csm.data.schema import UTTERANCE_FEATURES
from hf_csm.data.staged_table import StagedTable
from hf_csm.errors import UserError
from hf_csm.prepare.builder import CorpusBuilder
from hf_csm.prepare.run import prepare
from hf_csm.testing.ravdess import clip_bytes, wav_bytes, write_ravdess
from tests.doubles.waiting import wait_until


ACTORS = (1, 7, 17, 18, 21)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Three stereo clips less one, a duplicate take, and an actor without song."""
    return write_ravdess(
        tmp_path_factory.mktemp("raw"), actors=ACTORS, emotions=("calm", "happy"), intensities=(1,), layout="actors"
    )


@pytest.fixture(scope="module")
def done(raw, tmp_path_factory):
    """The table and the report of an undisturbed run. Do not write to it."""
    out = tmp_path_factory.mktemp("prepared") / "ravdess"
    return out, prepare("ravdess", raw, out, num_workers=2, progress=False)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_table_loads_and_its_rows_are_right(done, tmp_path):
    out, _ = done
    table = datasets.load_dataset(str(out), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in table.items()} == {"train": 15, "validation": 16, "test": 8}
    assert table["train"].features == UTTERANCE_FEATURES
    streamed = datasets.load_dataset(str(out), streaming=True)
    for split, rows in table.items():
        assert list(streamed[split]) == list(rows)
        for row in rows:
            assert row["split"] == split
            assert row["sha256"] == hash_samples(to_int16(decode_audio(row["audio"])))
            assert row["words"][-1]["end_s"] <= row["duration_s"]
    assert sorted(path.name for path in (out / "data" / "train").iterdir()) == [
        "calm-00000-of-00001.parquet",
        "happy-00000-of-00001.parquet",
    ]


def test_the_report_counts_clips_and_adjustments(done):
    _, report = done
    assert report.is_new and report.num_clips == 39
    happy = next(row for row in report.rows if (row.split, row.emotion) == ("train", "happy"))
    assert (happy.num_clips, happy.num_speakers) == (7, 2)
    assert {(action, count) for action, _, count, _ in report.adjustments} == {("dropped", 1), ("repaired", 1)}
    text = report.render()
    assert "03-01-03-01-02-02-07.wav" in text and "03-01-02-01-01-02-01.wav" in text
    assert all(len(line) == len(text.splitlines()[0]) for line in text.split("\n\n")[0].splitlines())


def test_no_staging_folder_remains(done):
    out, _ = done
    assert list(out.parent.iterdir()) == [out]


def test_one_worker_and_many_write_the_same_bytes(raw, done, tmp_path):
    prepare("ravdess", raw, tmp_path / "ravdess", num_workers=1, progress=False)
    assert contents(tmp_path / "ravdess") == contents(done[0])


def test_a_second_run_does_nothing_and_reports_the_same(raw, done):
    out, report = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = prepare("ravdess", raw, out, num_workers=1, progress=False)
    assert not again.is_new
    assert dataclasses.replace(again, is_new=True) == report
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_an_interrupted_run_resumes_with_the_same_result(raw, done, tmp_path, monkeypatch):
    out = tmp_path / "ravdess"
    read = []
    rows = CorpusBuilder.rows

    def failing(self, shard, tally):
        read.append(shard.utterances[0].speaker_id)
        if len(read) == 3:
            yield next(rows(self, shard, tally))
            raise KeyboardInterrupt
        yield from rows(self, shard, tally)

    monkeypatch.setattr(CorpusBuilder, "rows", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare("ravdess", raw, out, num_workers=1, progress=False)
    assert not out.exists()
    found = [path.suffix for path in (tmp_path / ".ravdess.partial" / "parts").iterdir()]
    assert found == [".arrow", ".arrow"]
    prepare("ravdess", raw, out, num_workers=1, progress=False)
    assert read == [f"ravdess-{actor:02d}" for actor in (1, 7, 17, 17, 18, 21)]
    assert contents(out) == contents(done[0])


@pytest.mark.parametrize(
    "step",
    ["hf_csm.prepare.run.plan_shards", "hf_csm.data.staged_table.StagedTable.publish"],
    ids=["merge", "publish"],
)
@pytest.mark.parametrize("is_missing", [True, False])
def test_parts_of_files_that_have_changed_are_not_reused(raw, done, tmp_path, monkeypatch, step, is_missing):
    changed = tmp_path / "raw"
    shutil.copytree(raw, changed)
    victim = changed / "Actor_21" / "03-01-03-01-01-01-21.wav"
    if is_missing:
        victim.unlink()
    else:  # other sound of the same size
        content = bytearray(victim.read_bytes())
        content[150_000:150_100] = bytes(range(100))
        victim.write_bytes(content)
        os.utime(victim, ns=(1, 1))
    monkeypatch.setattr(step, _interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare("ravdess", changed, tmp_path / "ravdess", num_workers=1, progress=False)
    monkeypatch.undo()
    victim.write_bytes((raw / "Actor_21" / victim.name).read_bytes())
    prepare("ravdess", changed, tmp_path / "ravdess", num_workers=1, progress=False)
    assert contents(tmp_path / "ravdess") == contents(done[0])


def _interrupt(*arguments):
    raise KeyboardInterrupt


def test_a_killed_run_leaves_no_table_and_no_process_and_resumes(raw, done, tmp_path):
    out = tmp_path / "ravdess"
    code = f"""
import time
from hf_csm.prepare.builder import CorpusBuilder
from hf_csm.prepare.run import prepare
rows = CorpusBuilder.rows
def slow(self, shard, tally):
    for row in rows(self, shard, tally):
        time.sleep(0.1)
        yield row
CorpusBuilder.rows = slow
prepare("ravdess", {str(raw)!r}, {str(out)!r}, num_workers=2, progress=False)
"""
    run = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    wait_until(lambda: run.poll() is not None or list(tmp_path.glob(".ravdess.partial/parts/*.arrow")))
    assert run.poll() is None
    run.kill()
    run.wait()
    assert not out.exists()
    prepare("ravdess", raw, out, num_workers=1, progress=False)  # waits for the workers, which end with their parent
    assert contents(out) == contents(done[0])
    wait_until(lambda: not is_alive(run.pid))


def is_alive(process_group):
    try:
        os.killpg(process_group, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_runs_with_one_output_exclude_each_other(raw, done, tmp_path, monkeypatch):
    out, staging = tmp_path / "ravdess", tmp_path / ".ravdess.partial"
    monkeypatch.setattr("hf_csm.data.staged_table.LOCK_TIMEOUT_S", 0.0)
    with (
        StagedTable(out, "0").lock(),
        pytest.raises(UserError, match=r"Another process is writing .*ravdess"),
    ):
        prepare("ravdess", raw, out, num_workers=1, progress=False)
    assert [path.name for path in staging.iterdir()] == ["lock"] and not out.exists()
    prepare("ravdess", raw, out, num_workers=1, progress=False)
    assert contents(out) == contents(done[0])


def test_an_output_that_is_a_link_is_written_to_its_target(raw, done, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "ravdess").symlink_to(disk)
    prepare("ravdess", raw, tmp_path / "ravdess", num_workers=1, progress=False)
    assert (tmp_path / "ravdess").is_symlink()
    assert contents(disk) == contents(done[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "ravdess"]


def test_after_a_bad_file_is_replaced_only_missing_parts_are_made(raw, done, tmp_path, monkeypatch):
    shutil.copytree(raw, tmp_path / "raw")
    bad = tmp_path / "raw" / "Actor_17" / "03-01-02-01-01-01-17.wav"
    good = bad.read_bytes()
    bad.write_bytes(good[:1_000])
    read = []
    rows = CorpusBuilder.rows

    def noting(self, shard, tally):
        read.append(int(shard.utterances[0].speaker_id[-2:]))
        return rows(self, shard, tally)

    monkeypatch.setattr(CorpusBuilder, "rows", noting)
    with pytest.raises(UserError, match=bad.name):
        prepare("ravdess", tmp_path / "raw", tmp_path / "out" / "ravdess", num_workers=1, progress=False)
    bad.write_bytes(good)
    prepare("ravdess", tmp_path / "raw", tmp_path / "out" / "ravdess", num_workers=1, progress=False)
    assert read == [1, 7, 17, 17, 18, 21]
    assert contents(tmp_path / "out" / "ravdess") == contents(done[0])


def test_if_no_clip_is_left_the_error_lists_the_reasons(tmp_path):
    (tmp_path / "raw").mkdir()
    for repetition in (1, 2):
        path = tmp_path / "raw" / f"03-01-03-01-01-0{repetition}-01.wav"
        path.write_bytes(wav_bytes(np.zeros(48_000)))
    with pytest.raises(UserError, match=r"no clips are left: 2 digital silence") as caught:
        prepare("ravdess", tmp_path / "raw", tmp_path / "out", num_workers=1, progress=False)
    assert "\n" not in caught.value.problem + caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_not_touched(raw, tmp_path):
    (tmp_path / "ravdess").mkdir()
    (tmp_path / "ravdess" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not a table"):
            prepare("ravdess", raw, tmp_path / "ravdess", overwrite=overwrite, num_workers=1, progress=False)
    assert (tmp_path / "ravdess" / "thesis.txt").read_text() == "precious"


def test_a_table_of_other_options_is_replaced_only_with_overwrite(raw, done, tmp_path):
    out = tmp_path / "ravdess"
    small = tmp_path / "small"
    small.mkdir()
    (small / "03-01-03-01-01-01-01.wav").write_bytes(clip_bytes("03-01-03-01-01-01-01"))
    prepare("ravdess", small, out, num_workers=1, progress=False)
    with pytest.raises(UserError, match="--overwrite"):
        prepare("ravdess", raw, out, num_workers=1, progress=False)
    assert len(list(out.rglob("*.parquet"))) == 1
    prepare("ravdess", raw, out, num_workers=1, overwrite=True, progress=False)
    assert contents(out) == contents(done[0])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_bad_file_stops_the_run_and_is_named(tmp_path, num_workers):
    raw = write_ravdess(
        tmp_path / "raw", actors=(1, 2), emotions=("calm",), statements=(1,), intensities=(1,), layout="actors"
    )
    bad = raw / "Actor_02" / "03-01-02-01-01-01-02.wav"
    good = bad.read_bytes()
    bad.write_bytes(good[:1_000])
    with pytest.raises(UserError, match=bad.name):
        prepare("ravdess", raw, tmp_path / "out", num_workers=num_workers, progress=False)
    assert not (tmp_path / "out").exists()
    bad.write_bytes(good)
    assert prepare("ravdess", raw, tmp_path / "out", num_workers=num_workers, progress=False).num_clips == 4


def test_the_same_recording_in_two_splits_is_refused(tmp_path):
    clip = clip_bytes("03-01-03-01-01-01-01")
    for actor in ("01", "21"):
        (tmp_path / f"03-01-03-01-01-01-{actor}.wav").write_bytes(clip)
    with pytest.raises(UserError, match=r"two splits.*-01 \(train\).*-21 \(test\)"):
        prepare("ravdess", tmp_path, tmp_path / "out", num_workers=1, progress=False)
    assert not (tmp_path / "out").exists()


def test_the_same_recording_of_two_speakers_of_a_split_is_dropped_once(tmp_path):
    (tmp_path / "raw").mkdir()
    for name, content in [("01", "01"), ("02", "01"), ("03", "03")]:
        path = tmp_path / "raw" / f"03-01-03-01-01-01-{name}.wav"
        path.write_bytes(clip_bytes(f"03-01-03-01-01-01-{content}"))
    report = prepare("ravdess", tmp_path / "raw", tmp_path / "out", num_workers=1, progress=False)
    assert report.num_clips == 2
    assert report.adjustments == [
        ["dropped", "same samples as another clip of the split", 1, "ravdess-03-01-03-01-01-01-02"]
    ]
    ids = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))["id"]
    assert list(ids) == ["ravdess-03-01-03-01-01-01-01", "ravdess-03-01-03-01-01-01-03"]


def test_large_groups_are_split_and_unlabelled_clips_have_their_own_files(raw, tmp_path, monkeypatch):
    from dataset_builders.ravdess import Ravdess

    monkeypatch.setattr(Ravdess, "LABELS", {**Ravdess.LABELS, "happy": None})
    monkeypatch.setattr("hf_csm.data.staged_table.MAX_SHARD_BYTES", 100_000)
    report = prepare("ravdess", raw, tmp_path / "out", num_workers=1, progress=False)
    names = [path.name for path in (tmp_path / "out" / "data" / "validation").iterdir()]
    for emotion in ("calm", "unlabelled"):
        (total,) = {name[-13:-8] for name in names if name.startswith(emotion)}
        assert int(total) == len([name for name in names if name.startswith(emotion)]) > 1
    table = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert sum(len(rows) for rows in table.values()) == report.num_clips == 39


def test_one_recording_under_two_labels_is_dropped_with_both(tmp_path):
    (tmp_path / "raw").mkdir()
    for name, content in [("03-01", "03-01"), ("04-01", "03-01"), ("05-01", "05-01")]:
        path = tmp_path / "raw" / f"03-01-{name}-01-01-01.wav"
        path.write_bytes(clip_bytes(f"03-01-{content}-01-01-01"))
    report = prepare("ravdess", tmp_path / "raw", tmp_path / "out", num_workers=1, progress=False)
    assert [(row.emotion, row.num_clips) for row in report.rows] == [("angry", 1)]
    assert report.adjustments == [["dropped", "one recording under two labels", 2, "ravdess-03-01-03-01-01-01-01"]]


def test_an_output_that_cannot_be_written_is_an_error(raw, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        prepare("ravdess", raw, tmp_path / "file" / "out", num_workers=1, progress=False)


def test_clips_without_a_label_have_their_own_file(tmp_path, monkeypatch):
    from dataset_builders.ravdess import Ravdess

    monkeypatch.setattr(Ravdess, "LABELS", {"happy": "happy", "sad": None})
    for name in ("03-01-03-01-01-01-01", "03-01-04-01-01-01-01"):
        (tmp_path / f"{name}.wav").write_bytes(clip_bytes(name))
    report = prepare("ravdess", tmp_path, tmp_path / "out", num_workers=1, progress=False)
    assert [row.emotion for row in report.rows] == ["happy", "unlabelled"]
    assert (tmp_path / "out" / "data" / "train" / "unlabelled-00000-of-00001.parquet").is_file()
    table = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(table["emotion"], key=str) == [2, None]


def test_word_times_match_the_audio(done):
    from hf_csm.testing.ravdess import known_words

    errors_s = []
    for row in datasets.load_dataset(str(done[0]), split="validation", streaming=True):
        for found, known in zip(row["words"], known_words(row["id"].removeprefix("ravdess-")), strict=True):
            errors_s += [abs(found["start_s"] - known["start_s"]), abs(found["end_s"] - known["end_s"])]
    assert np.median(errors_s) < 0.06
