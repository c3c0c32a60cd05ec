import hashlib
import shutil
import zipfile

import pytest

import hf_csm
from dataset_builders.ravdess import ARCHIVES, FILE_NAME
from hf_csm.corpora import make_builder
from hf_csm.data.schema import UTTERANCE_FEATURES
from hf_csm.errors import UserError
from hf_csm.prepare.download import RemoteArchive
from hf_csm.prepare.utterance import Tally
from hf_csm.testing.ravdess import DUPLICATE, clip_bytes, clip_names, write_ravdess


BOTH = ("speech", "song")
SMALL = {"emotions": ("neutral", "happy"), "statements": (1,), "repetitions": (1,), "intensities": (1,)}


def listing(raw, **options):
    shards, tally = make_builder("ravdess", raw, **options).shards()
    return [utterance for shard in shards for utterance in shard.utterances], tally


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"RIFF")
    return folder


def test_the_example_of_the_corpus_reads_as_its_authors_say(tmp_path):
    (tmp_path / "03-01-06-01-02-01-12.wav").write_bytes(clip_bytes("03-01-06-01-02-01-12"))
    (row,) = hf_csm.load_corpus("ravdess", tmp_path, split="train")
    names = UTTERANCE_FEATURES
    assert row["id"] == "ravdess-03-01-06-01-02-01-12"
    assert names["emotion"].int2str(row["emotion"]) == row["emotion_raw"] == "fearful"
    assert names["intensity"].int2str(row["intensity"]) == "medium"
    assert row["text"] == "Dogs are sitting by the door"
    assert (row["speaker_id"], row["gender"], row["split"]) == ("ravdess-12", "female", "train")
    assert (row["corpus"], row["language"], row["license"]) == ("ravdess", "en", "cc-by-nc-sa-4.0")
    assert row["emotion_perceived"] is row["emotion_agreement"] is row["arousal"] is None


def test_every_name_of_the_grid_is_known_and_the_splits_are_by_actor(tmp_path):
    names = [*clip_names("01", range(1, 25)), *clip_names("02", range(1, 25))]
    assert len(names) == 1_440 + 1_012
    touch(tmp_path, *(f"{name}.wav" for name in names))
    shards, tally = make_builder("ravdess", tmp_path, subsets=BOTH).shards()
    actors = {
        split: [int(s.utterances[0].speaker_id[-2:]) for s in shards if s.split == split]
        for split in ("train", "validation", "test")
    }
    assert actors == {"train": [*range(1, 17)], "validation": [*range(17, 21)], "test": [*range(21, 25)]}
    assert {len(shard.utterances) for shard in shards if shard.utterances[0].speaker_id != "ravdess-18"} == {104}
    assert not tally.counts
    women = {u.speaker_id for shard in shards for u in shard.utterances if u.gender == "female"}
    assert women == {f"ravdess-{actor:02d}" for actor in range(2, 25, 2)}
    assert sum(u.intensity == "high" for shard in shards for u in shard.utterances) == 672 + 460


@pytest.mark.parametrize("layout", ["zips", "actors", "speech_root", "merged"])
def test_every_layout_gives_the_same_clips(tmp_path, layout):
    raw = write_ravdess(tmp_path, actors=(17, 18), song=True, layout=layout, **SMALL)
    utterances, tally = listing(raw, subsets=BOTH)
    assert [u.id for u in utterances] == [
        f"ravdess-{name}" for actor in (17, 18) for c in ("01", "02") for name in clip_names(c, [actor], **SMALL)
    ]
    assert len(utterances) == 6
    assert not tally.counts
    assert all(u.member.read()[:4] == b"RIFF" for u in utterances)


def test_one_zip_or_a_list_of_zips_can_be_named(tmp_path):
    raw = write_ravdess(tmp_path, actors=(1,), song=True, **SMALL)
    zips = sorted(raw.glob("*.zip"))
    assert len(zips) == 2
    assert [len(listing(source, subsets=BOTH)[0]) for source in (zips[0], zips[1], zips)] == [2, 2, 4]


def test_speech_is_the_default_and_clips_of_other_subsets_are_counted(tmp_path):
    raw = write_ravdess(tmp_path, actors=(1,), song=True, **SMALL)
    utterances, tally = listing(raw, subsets=("song",))
    assert {u.id[8:13] for u in utterances} == {"03-02"}
    assert tally.counts == {("dropped", "speech was not selected"): 2}
    utterances, tally = listing(raw)
    assert {u.id[8:13] for u in utterances} == {"03-01"}
    assert tally.counts == {("dropped", "song was not selected"): 2}
    with pytest.raises(UserError, match="subsets"):
        listing(raw, subsets=("video",))


def test_the_nested_copy_on_kaggle_counts_once(tmp_path):
    raw = write_ravdess(tmp_path, actors=(1, 2), layout="actors", **SMALL)
    shutil.copytree(raw, raw.parent / "copy")
    shutil.move(raw.parent / "copy", raw / "audio_speech_actors_01-24")
    utterances, tally = listing(raw)
    assert len(utterances) == 4
    assert all(u.member.name.startswith("Actor_") for u in utterances)
    assert tally.counts == {("dropped", "second copy of a file"): 4}


def test_video_files_are_dropped_and_counted(tmp_path):
    touch(tmp_path, "03-01-03-01-01-01-01.wav", "01-01-03-01-01-01-01.mp4", "02-01-03-01-01-01-01.wav", "notes.txt")
    utterances, tally = listing(tmp_path)
    assert len(utterances) == 1
    assert list(tally.counts.values()) == [2]


def test_stereo_is_averaged_and_the_second_take_dropped_each_counted(tmp_path):
    folder = write_ravdess(tmp_path, actors=(7, 20), emotions=("happy",), layout="actors")
    builder = make_builder("ravdess", folder)
    tally, ids = Tally(), []
    for shard in builder.shards()[0]:
        ids += [row["id"] for row in builder.rows(shard, tally)]
    assert len(ids) == 15 and f"ravdess-{DUPLICATE}" not in ids
    assert {action: (count, tally.examples[action, reason]) for (action, reason), count in tally.counts.items()} == {
        "dropped": (1, f"{DUPLICATE}.wav"),
        "repaired": (1, "03-01-03-01-02-01-20.wav"),
    }


@pytest.mark.parametrize(
    "name", ["hello.wav", "03-01-09-01-01-01-01.wav", "03-01-03-01-01-01-25.wav", "03-01-03-01-01-01.wav"]
)
def test_a_wav_named_like_nothing_is_an_error_that_names_it(tmp_path, name):
    with pytest.raises(UserError, match=name):
        listing(touch(tmp_path, name, "03-01-03-01-01-01-01.wav"))


def test_strong_neutral_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"03-01-01-02-01-01-01\.wav: neutral with strong"):
        listing(touch(tmp_path, "03-01-01-02-01-01-01.wav"))


def test_a_folder_of_something_else_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no RAVDESS clips"):
        listing(touch(tmp_path, "notes.txt"))


def test_a_zip_with_an_unsafe_member_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("../03-01-03-01-01-01-01.wav", b"x")
    with pytest.raises(UserError, match="outside"):
        listing(tmp_path / "z.zip")


def test_file_names_are_seven_known_numbers():
    assert FILE_NAME.fullmatch("03-02-06-02-02-02-24.WAV")
    assert not FILE_NAME.fullmatch("03-03-06-02-02-02-24.wav")
    assert not FILE_NAME.fullmatch("x03-01-06-02-02-02-24.wav")


def test_without_a_source_the_published_zips_are_fetched_and_read(tmp_path, monkeypatch):
    raw = write_ravdess(tmp_path / "server", actors=(1,), song=True, **SMALL)
    asked = []

    def fake_download(archive: RemoteArchive):
        asked.append(archive)
        return raw / archive.url.rpartition("/")[2].partition("?")[0]

    monkeypatch.setattr("hf_csm.prepare.builder.download", fake_download)
    assert len(listing(None)[0]) == 2
    assert asked == [ARCHIVES["speech"]]
    asked.clear()
    assert len(listing(None, subsets=BOTH)[0]) == 4
    assert asked == list(ARCHIVES.values())
    assert all(len(archive.md5) == 32 and archive.num_bytes for archive in asked)


def test_a_url_is_downloaded_once_and_read_as_a_zip(tmp_path, monkeypatch):
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    raw = write_ravdess(tmp_path / "server", actors=(1,), **SMALL)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *arguments: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(raw))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/Audio_Speech_Actors_01-24.zip"
        assert len(list(hf_csm.load_corpus("ravdess", url, split="train"))) == 2
        server.shutdown()
    assert len(list(hf_csm.load_corpus("ravdess", url, split="train"))) == 2
    (found,) = (tmp_path / "home").rglob("*.zip")
    assert hashlib.md5(found.read_bytes()).digest() == hashlib.md5(next(raw.glob("*.zip")).read_bytes()).digest()
