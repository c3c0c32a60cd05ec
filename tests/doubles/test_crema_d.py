import csv
import io
from collections import Counter

import numpy as np
import pytest
import soundfile

from tests.doubles.crema_d import (
    COPIES,
    MEN,
    MISNAMED,
    SILENT,
    clip_bytes,
    clip_names,
    demographics_csv,
    lfs_pointer,
    summary_csv,
    votes_csv,
    write_crema_d,
)


def read(content):
    return soundfile.read(io.BytesIO(content), dtype="int16")


def table(content):
    return list(csv.DictReader(io.StringIO(content.decode())))


def test_the_grid_is_that_of_the_corpus():
    names = list(clip_names())
    assert len(set(names)) == len(names) == 7_442
    by_emotion = Counter(name[9:12] for name in names)
    assert by_emotion == {**dict.fromkeys(("ANG", "DIS", "FEA", "HAP", "SAD"), 1_271), "NEU": 1_087}
    assert Counter(name[13:] for name in names) == {"XX": 6_077, "LO": 455, "MD": 455, "HI": 455}
    by_actor = Counter(name[:4] for name in names)
    short = {actor: count for actor, count in by_actor.items() if count != 82}
    assert short == {"1002": 81, "1008": 76, "1009": 76, "1019": 76, "1076": 81}
    assert {SILENT, MISNAMED, *COPIES, *COPIES.values()} <= set(names)
    assert sum(int(name[:4]) in MEN for name in names) == 3_930
    assert names[:2] == ["1001_IEO_NEU_XX", "1001_IEO_HAP_LO"] and names[-1] == "1091_WSI_DIS_XX"


def test_a_clip_is_16_khz_mono_and_its_header_44_or_46_bytes_long():
    num_extra = Counter()
    for name in clip_names((1003,)):
        content = clip_bytes(name)
        info = soundfile.info(io.BytesIO(content))
        assert (info.samplerate, info.subtype, info.channels) == (16_000, "PCM_16", 1)
        assert 1.0 < info.duration < 5.0
        num_extra[len(content) - 2 * info.frames] += 1
    assert num_extra.keys() == {44, 46} and num_extra[44] > 10 * num_extra[46]


def test_the_defects_are_there_and_can_be_left_out(tmp_path):
    assert not read(clip_bytes(SILENT))[0].any()
    assert read(clip_bytes(SILENT, defects=False))[0].any()
    for copy, original in COPIES.items():
        assert np.array_equal(read(clip_bytes(copy))[0], read(clip_bytes(original))[0])
        assert not np.array_equal(read(clip_bytes(copy, defects=False))[0], read(clip_bytes(original))[0])
    chosen = {"actors": (1040,), "sentences": ("ITH",), "emotions": ("SAD",), "layout": "bare"}
    write_crema_d(tmp_path / "old", **chosen)
    write_crema_d(tmp_path / "new", defects=False, **chosen)
    assert [path.name for path in tmp_path.rglob("*.wav")] in (
        ["1040_ITH_SAD_X.wav", "1040_ITH_SAD_XX.wav"],
        ["1040_ITH_SAD_XX.wav", "1040_ITH_SAD_X.wav"],
    )


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("bare", {"1001_TSI_SAD_XX.wav"}),
        ("audb", {"1001/1001_TSI_SAD_XX.wav"}),
        ("flat", {"AudioWAV/1001_TSI_SAD_XX.wav"}),
    ],
)
def test_a_layout_without_tables_is_wavs_alone(tmp_path, layout, expected):
    write_crema_d(tmp_path, actors=(1001,), sentences=("TSI",), emotions=("SAD",), layout=layout)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == expected


def test_the_clone_has_votes_and_the_mirror_none(tmp_path):
    for layout in ("clone", "mirror"):
        write_crema_d(tmp_path / layout, actors=(1001,), sentences=("TSI",), emotions=("SAD",), layout=layout)
    clone, mirror = (
        {path.relative_to(tmp_path / layout).as_posix() for path in (tmp_path / layout).rglob("*.*")}
        for layout in ("clone", "mirror")
    )
    assert clone - mirror == {"processedResults/summaryTable.csv", "processedResults/tabulatedVotes.csv"}
    assert mirror < clone
    assert (tmp_path / "clone/AudioMP3/1001_TSI_SAD_XX.mp3").read_bytes().startswith(b"version https://git-lfs")


def test_a_pointer_is_as_long_as_those_of_git_lfs():
    assert len(lfs_pointer(bytes(72_862))) == 130


def test_tables_are_spelled_as_published():
    names = ["1001_IEO_NEU_XX", "1001_IEO_ANG_MD"]
    summary = summary_csv(names).decode().splitlines()
    assert summary[0].startswith('"","FileName","VoiceVote","VoiceLevel","FaceVote"')
    assert summary[1].startswith('"1","1001_IEO_NEU_XX","N","')
    assert summary[2].startswith('"9","1001_IEO_ANG_MD","A:D","')
    votes = votes_csv(names).decode().splitlines()
    assert len(votes) == 1 + 3 * len(names)
    assert votes[0].startswith('"","A","D","F","H","N","S","fileName","numResponses","agreement","emoVote","mean')
    assert votes[1].startswith('"100001",0,0,0,1,10,0,"1001_IEO_NEU_XX",11,0.909090909090909')
    assert [row[:7] for row in votes[1:]] == ['"100001', '"100009', '"200001', '"200009', '"300001', '"300009']
    demographics = demographics_csv().decode().splitlines()
    assert demographics[0] == '"ActorID","Age","Sex","Race","Ethnicity"'
    assert len(demographics) == 92 and demographics[47].endswith('"Female","Unknown","Hispanic"')


def test_summary_and_counts_agree_and_some_votes_are_tied():
    names = list(clip_names((1003,)))
    counts = {row["fileName"]: row for row in table(votes_csv(names)) if row[""].startswith("1")}
    summary = table(summary_csv(names))
    assert {row["FileName"] for row in summary} == counts.keys() == set(names)
    for row in summary:
        voted = counts[row["FileName"]]
        assert row["VoiceVote"] == voted["emoVote"]
        assert len(row["VoiceVote"].split(":")) == len(row["VoiceLevel"].split(":"))
        most = max(int(voted[letter]) for letter in "ADFHNS")
        assert float(voted["agreement"]) == pytest.approx(most / int(voted["numResponses"]))
    assert 0 < sum(":" in row["VoiceVote"] for row in summary) < len(summary) / 2


def test_the_same_seed_gives_the_same_corpus():
    name = "1001_TSI_SAD_XX"
    assert clip_bytes(name) == clip_bytes(name) != clip_bytes(name, seed=1)
    assert summary_csv([name]) == summary_csv([name]) != summary_csv([name], seed=1)
