import dataclasses
import os
import re
import zipfile

import pytest

from hf_csm.errors import UserError
from hf_csm.prepare.archive import Member, list_members
from hf_csm.prepare.checks import SHARD_CLIPS, hash_listing, hash_shard, list_clips, looks_like
from hf_csm.prepare.utterance import Skipped, Utterance


LABELS = {"H": "happy", "X": None}


def member(name):
    return Member(name, "raw", 100, is_zipped=False)


def clip(number, speaker="s1", split="train", **facts):
    return Utterance(f"c-{number:05d}", member(f"{number:05d}.wav"), "Hello", "H", speaker, split, **facts)


def shapes(shards):
    return [(shard.split, [utterance.id[-3:] for utterance in shard.utterances]) for shard in shards]


def test_a_shard_is_a_speaker_in_the_order_of_splits_speakers_and_ids():
    found = [clip(4, "b"), clip(2, "t", "test"), clip(1, "t", "test"), clip(3, "b"), clip(5, "a"), clip(6, "a")]
    shards, tally = list_clips(found, LABELS, "C")
    assert shapes(shards) == [("train", ["005", "006"]), ("train", ["003", "004"]), ("test", ["001", "002"])]
    assert not tally.counts


def test_speakers_of_one_clip_share_a_shard_within_their_split():
    found = [clip(n, f"s{n}") for n in range(3)] + [clip(n, "z") for n in (3, 4)] + [clip(5, "t", "test")]
    assert shapes(list_clips(found, LABELS, "C")[0]) == [
        ("train", ["000", "001", "002"]),
        ("train", ["003", "004"]),
        ("test", ["005"]),
    ]


@pytest.mark.parametrize("speaker", ["s", "s{n}"])
def test_no_shard_has_more_clips_than_allowed(speaker):
    found = [clip(n, speaker.format(n=n)) for n in range(2 * SHARD_CLIPS + 5)]
    shards, _ = list_clips(found, LABELS, "C")
    assert sorted(len(shard.utterances) for shard in shards) == [5, SHARD_CLIPS, SHARD_CLIPS]


def test_the_second_clip_of_an_id_is_dropped_and_counted():
    shards, tally = list_clips([clip(1), clip(1), clip(2)], LABELS, "C")
    assert len(shards[0].utterances) == 2
    assert tally.rows() == [["dropped", "second copy of a file", 1, "raw/00001.wav"]]


@pytest.mark.parametrize("field", ["emotion_raw", "emotion_perceived_raw"])
def test_an_unknown_label_is_refused_before_any_audio_is_read(field):
    with pytest.raises(UserError, match=r"00001\.wav.* label 'Q'"):
        list_clips([dataclasses.replace(clip(1), **{field: "Q"})], LABELS, "C")


def test_a_missing_label_is_not_an_unknown_label():
    list_clips([dataclasses.replace(clip(1), emotion_raw=None)], LABELS, "C")


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("Speaker s1", {}, {}),
        ("Sentence k7", {"speaker": "a", "sentence_id": "k7"}, {"speaker": "b", "sentence_id": "k7"}),
    ],
)
def test_a_leak_between_splits_is_refused(kind, first, second):
    found = [clip(1, **first), clip(2, split="validation", **second)]
    with pytest.raises(UserError, match=rf"{kind} is in two splits: train \(c-00001\) and validation \(c-00002\)"):
        list_clips(found, LABELS, "C")


@pytest.mark.parametrize(("num_faults", "is_refused"), [(1, False), (2, True)])
def test_more_than_one_percent_of_faults_is_refused_with_the_first_five_names(num_faults, is_refused):
    found = [clip(n, f"s{n}") for n in range(100)]
    found += [Skipped(f"x{n}.wav", "no audio of this name", is_fault=True) for n in range(num_faults)]
    if is_refused:
        with pytest.raises(UserError, match=r"2 of 102 .*no audio.* x0\.wav, x1\.wav"):
            list_clips(found, LABELS, "C")
        return
    _, tally = list_clips(found, LABELS, "C")
    assert tally.rows() == [["dropped", "no audio of this name", 1, "x0.wav"]]


def test_a_long_list_of_faults_names_five_and_counts_the_rest():
    found = [clip(1), *(Skipped(f"x{n}", "no label", is_fault=True) for n in range(9))]
    with pytest.raises(UserError, match=r"no label: x0, x1, x2, x3, x4 and 4 more\.$"):
        try:
            list_clips(found, LABELS, "C")
        except UserError as error:
            raise UserError(error.problem, "") from error


def test_clips_left_out_on_purpose_are_not_faults():
    found = [clip(1), *(Skipped(member(f"{n}.wav"), "not asked for") for n in range(50))]
    assert list_clips(found, LABELS, "C")[1].rows() == [["dropped", "not asked for", 50, "0.wav"]]


def test_a_corpus_is_recognized_by_most_of_the_file_names():
    members = [member(name) for name in ("a/1.wav", "a/2.wav", "x.flac", "notes.txt")]
    patterns = {"W": re.compile(r"\d\.wav"), "F": re.compile(r".\.flac")}
    assert looks_like(members, patterns) == ("W", 2)
    assert looks_like(members[3:], patterns) is None


def test_the_listing_hash_depends_on_metadata_and_file_sizes():
    def hash_of(**changes):
        return hash_listing(list_clips([dataclasses.replace(clip(1), **changes)], LABELS, "C")[0])

    hashes = [
        hash_of(),
        hash_of(text="Bye"),
        hash_of(arousal=0.5),
        hash_of(member=Member("00001.wav", "raw", 101, is_zipped=False)),
        hash_of(sidecars=(member("00001.txt"),)),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_of(member=Member("elsewhere/00001.wav", "other", 100, is_zipped=True)) == hashes[0]


@pytest.mark.parametrize("is_zipped", [False, True])
@pytest.mark.parametrize("victim", ["1.wav", "1.txt"])
def test_a_changed_modification_time_changes_the_shard_hash_only(tmp_path, is_zipped, victim):
    for name in ("1.wav", "1.txt"):
        (tmp_path / name).write_text("content")
    changing = tmp_path / victim
    if is_zipped:
        changing = tmp_path.with_suffix(".zip")
        with zipfile.ZipFile(changing, "w") as archive:
            for name in ("1.wav", "1.txt"):
                archive.writestr(name, "content")
    hashes = []
    for time_ns in (10**18, 10**18, 10**18 + 4_000_000):
        os.utime(changing, ns=(time_ns, time_ns))
        text, sound = list_members([changing if is_zipped else tmp_path])
        (shard,), _ = list_clips([dataclasses.replace(clip(1), member=sound, sidecars=(text,))], LABELS, "C")
        hashes.append((hash_shard(shard), hash_listing([shard])))
    assert hashes[0] == hashes[1]
    assert hashes[0][0] != hashes[2][0] and hashes[0][1] == hashes[2][1]
