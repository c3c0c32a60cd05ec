import csv
import io

import numpy as np
import pytest
import soundfile

from hf_csm.prepare.textgrid import read_words
from tests.doubles.msp_podcast import (
    EMOTIONS,
    PARTITIONS,
    STEREO,
    plan_clips,
    tables,
    text_grid,
    write_msp_podcast,
)


HEADER = ["FileName", "EmoClass", "EmoAct", "EmoVal", "EmoDom", "SpkrID", "Gender", "Split_Set"]


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_labels_are_dealt_as_in_the_corpus_and_every_speaker_is_of_one_partition():
    clips = plan_clips(3_000, 40, (2.75, 8.0), defects=False)
    counts = {code: sum(clip.emotion == code for clip in clips) for code in EMOTIONS}
    shares = {code: emotion.num_clips / 73_042 for code, emotion in EMOTIONS.items()}
    assert counts == pytest.approx({code: 3_000 * share for code, share in shares.items()}, rel=0.35, abs=10)
    for partition, share in PARTITIONS.items():
        of_it = [clip for clip in clips if clip.partition == partition]
        assert len(of_it) == pytest.approx(3_000 * share, rel=0.15)
        others = {clip.speaker for clip in clips if clip.partition != partition}
        assert not others & {clip.speaker for clip in of_it}
    assert len({clip.name for clip in clips}) == 3_000
    assert 0.2 < sum(clip.name.count("_") == 3 for clip in clips) / 3_000 < 0.3


@pytest.mark.parametrize("num_speakers", [4, 5, 7, 20, 1_000])
def test_every_partition_has_speakers_however_few_there_are(num_speakers):
    clips = plan_clips(8, num_speakers, (2.0, 3.0))
    assert {clip.partition for clip in clips} == set(PARTITIONS)
    assert all(1 <= clip.speaker <= num_speakers for clip in clips)


@pytest.mark.parametrize(
    ("release", "spelling", "validation", "columns"),
    [
        ("1.6", "concensus", "Validation", {"Workers", "EmoClass_Major"}),
        ("1.8", "concensus", "Validation", {"EmoDetail"}),
        ("1.11", "consensus", "Development", {"EmoDetail"}),
        ("2.0", "consensus", "Development", {"WorkerID", "EmoClass_Major"}),
    ],
)
def test_tables_are_those_of_the_release(release, spelling, validation, columns):
    files = tables(plan_clips(20, 4, (2.0, 3.0)), release)
    assert sorted(files) == [f"labels_{spelling}.csv", f"labels_{spelling}.json", "labels_detailed.csv"]
    rows = read_csv(files[f"labels_{spelling}.csv"])
    assert list(rows[0]) == HEADER and len(rows) == 20
    assert {row["Split_Set"] for row in rows} == {"Train", validation, "Test1", "Test2"}
    assert {row["EmoClass"] for row in rows} == set(EMOTIONS)
    assert "Unknown" in {row["SpkrID"] for row in rows}
    assert columns <= read_csv(files["labels_detailed.csv"])[0].keys()


def test_the_label_of_a_clip_is_what_most_of_its_raters_chose():
    for clip in plan_clips(200, 4, (2.0, 3.0), defects=False):
        chosen = [code for _, code, *_ in clip.ratings]
        most = {code for code in chosen if chosen.count(code) == max(map(chosen.count, chosen))}
        assert (most == {clip.emotion}) if clip.emotion != "X" else len(most) == 2
        assert all(1 <= value <= 7 for rating in clip.ratings for value in rating[2:])


def test_files_are_16_khz_mono_but_one_and_no_two_are_the_same(tmp_path):
    write_msp_podcast(tmp_path, num_clips=12, num_speakers=4, duration_s=(2.0, 4.0))
    paths = sorted((tmp_path / "Audios").glob("*.wav"))
    infos = {path.stem: soundfile.info(path) for path in paths}
    odd = plan_clips(12, 4, (2.0, 4.0))[STEREO].name
    assert {stem for stem, info in infos.items() if (info.samplerate, info.channels) != (16_000, 1)} == {odd}
    assert all(1.5 < info.duration < 6.0 for info in infos.values())
    assert len({path.read_bytes() for path in paths}) == 13
    assert len(list((tmp_path / "ForceAligned").iterdir())) == len(list((tmp_path / "Transcripts").iterdir())) == 12


def test_the_words_of_a_text_grid_are_where_the_sound_is(tmp_path):
    write_msp_podcast(tmp_path, num_clips=4, num_speakers=4, defects=False)
    for path in (tmp_path / "ForceAligned").iterdir():
        samples, sample_rate = soundfile.read(tmp_path / "Audios" / f"{path.stem}.wav")
        words = read_words(path.read_bytes(), path.name)
        start, end = round(words[0][1] * sample_rate), round(words[-1][2] * sample_rate)
        assert samples[start:end].std() > 10 * np.r_[samples[:start], samples[end:]].std()


def test_a_text_grid_has_compounds_in_pieces_without_case_and_punctuation():
    words = [{"word": "Well-known", "start_s": 0.2, "end_s": 0.6}, {"word": "Zyx.", "start_s": 0.6, "end_s": 0.9}]
    assert read_words(text_grid(words).encode(), "a") == (("well", 0.2, 0.4), ("known", 0.4, 0.6), ("zyx", 0.6, 0.9))
    assert read_words(text_grid(words, has_unknown=True).encode(), "a")[0] == ("<unk>", 0.2, 0.6)
