import bisect
import json
import math
import shutil

import numpy as np
import pytest
import soundfile
from datasets import load_dataset
from sentencepiece import SentencePieceProcessor

import hf_csm.encode.moshi_finetune as module
from hf_csm.data.labels import EMOTIONS
from hf_csm.data.table import read_card_metadata
from hf_csm.encode.compose import Composition
from hf_csm.encode.dialogues import Dialogues, encode_manifest
from hf_csm.encode.moshi_finetune import export_manifest
from hf_csm.encode.prepared_corpus import PreparedCorpus
from hf_csm.errors import UserError
from hf_csm.models.family import Layout
from hf_csm.models.moshi.checkpoint import codec_sha256, find_checkpoint
from hf_csm.models.moshi.codec import load_codec
from hf_csm.models.moshi.layout import text_stream
from hf_csm.models.moshi.tiny import TOKENIZER_NAME
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME


COMPOSITION = Composition(duration_s=12.0)  # of the fixture `codes`
SPLITS = ("train", "validation", "test")


def export(prepared, out, **options):
    return export_manifest(prepared, out, composition=COMPOSITION, progress=False, **options)


@pytest.fixture(scope="module")
def exported(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "ravdess"
    export(prepared, out)
    return out


@pytest.fixture(scope="module")
def windows(codes):
    return {row["id"]: row for rows in load_dataset(str(codes)).values() for row in rows}


def read_lines(manifest):
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def read_as_moshi_finetune(manifest, duration_s):
    """Yield id, start, samples `[2, S]` and the main speaker's words of each chunk, by the rules of its loader.

    A path starts from the manifest's folder; a recording is cut every `duration_s` seconds for as long as the manifest
    says it lasts; a chunk's words are found by bisection on their begin, count from the chunk's begin, and are kept if
    the main speaker says them and they last.
    """
    for line in read_lines(manifest):
        path = manifest.parent / line["path"]
        samples, sample_rate = soundfile.read(path, always_2d=True)
        assert (sample_rate, samples.shape[1]) == (SAMPLE_RATE, 2)
        alignments = json.loads(path.with_suffix(".json").read_text())["alignments"]
        for chunk in range(math.ceil(line["duration"] / duration_s)):
            start_s = chunk * duration_s
            first, end = (
                bisect.bisect_left(alignments, t, key=lambda a: a[1][0]) for t in (start_s, start_s + duration_s)
            )
            words = [
                {"word": word.strip(), "start_s": begin_s - start_s, "end_s": end_s - start_s}
                for word, (begin_s, end_s), speaker in alignments[first:end]
                if speaker == "SPEAKER_MAIN" and begin_s < end_s
            ]
            heard = samples[round(start_s * SAMPLE_RATE) : round((start_s + duration_s) * SAMPLE_RATE)].T
            yield path.stem, start_s, heard, words


def test_there_is_a_manifest_of_each_split(exported, windows):
    assert sorted(path.name for path in exported.iterdir()) == sorted(
        ["README.md", *SPLITS, *(f"{split}.jsonl" for split in SPLITS)]
    )
    lines = [(split, line) for split in SPLITS for line in read_lines(exported / f"{split}.jsonl")]
    assert {line["path"]: line["emotion"] for _, line in lines} == {
        f"{row['split']}/{id_}.wav": EMOTIONS[row["emotion"]] for id_, row in windows.items()
    }
    for split, line in lines:
        info = soundfile.info(exported / line["path"])
        assert line["path"].startswith(f"{split}/")
        assert (info.channels, info.samplerate, info.subtype) == (2, SAMPLE_RATE, "PCM_16")
        assert line["duration"] == info.frames / SAMPLE_RATE > 0


@pytest.mark.parametrize("split", SPLITS)
def test_moshi_finetune_reads_the_text_stream_of_the_table(exported, windows, tiny_moshi, split):
    layout = Layout((0,) * 17, 8, 8, text_padding_id=3, end_of_text_padding_id=0, text_card=100, card=64)
    tokenize = SentencePieceProcessor(str(tiny_moshi / TOKENIZER_NAME)).encode
    ids = set()
    for id_, start_s, heard, words in read_as_moshi_finetune(exported / f"{split}.jsonl", duration_s=12.0):
        row = windows[id_]
        assert (start_s, heard.shape[1]) == (0.0, row["num_frames"] * SAMPLES_PER_FRAME)
        own = [word for word in row["words"] if word["channel"] == 0]
        assert own
        streams = [text_stream(each, row["num_frames"], tokenize, layout) for each in (own, words)]
        np.testing.assert_array_equal(*streams)
        ids.add(id_)
    assert ids == {id_ for id_, row in windows.items() if row["split"] == split}


def test_no_word_is_lost_between_chunks(exported, windows):
    chunks = list(read_as_moshi_finetune(exported / "train.jsonl", duration_s=3.0))
    assert max(start_s for _, start_s, _, _ in chunks) >= 6.0
    for id_ in {id_ for id_, *_ in chunks}:
        words = [(w["word"], start_s + w["start_s"]) for own, start_s, _, ws in chunks if own == id_ for w in ws]
        expected = [(w["word"], pytest.approx(w["start_s"])) for w in windows[id_]["words"] if w["channel"] == 0]
        assert words == expected


def test_both_speakers_are_named_and_words_are_sorted_by_time(exported):
    alignments = [json.loads(path.read_text())["alignments"] for path in exported.glob("*/*.json")]
    assert {entry[2] for entries in alignments for entry in entries} == {"SPEAKER_MAIN", "SPEAKER_USER"}
    assert all(entries == sorted(entries, key=lambda entry: entry[1][0]) for entries in alignments)


def test_exported_audio_equals_the_conversations_to_16_bits(exported, prepared):
    corpus = PreparedCorpus(prepared)
    units, _ = corpus.plan(COMPOSITION, 1, "acted")
    conversations = [c for unit in units if unit.split == "train" for c in unit.conversations]
    clips = corpus.read(conversations, COMPOSITION)
    dialogues = Dialogues(exported / "train.jsonl", "again", COMPOSITION)
    assert len(dialogues.segments) == len(conversations)
    assert not dialogues.noted
    for segment, conversation in zip(dialogues.segments, conversations, strict=True):
        assert segment.lead == 0  # there is room for the prefix already
        np.testing.assert_allclose(
            dialogues.waveform(segment), clips.waveform(conversation), rtol=0, atol=0.5 / 32768 + 1e-9
        )


def test_an_encoded_export_equals_the_table_of_encode_up_to_rounding(
    exported, windows, prepared, tiny_moshi, tmp_path
):
    """The words are the same; so are nearly all codes: a sample that is rounded may flip one, and all that follow."""
    base = find_checkpoint(str(tiny_moshi))
    out = tmp_path / "again"
    encode_manifest(
        exported / "test.jsonl", out, load_codec(base), codec_sha256(base), composition=COMPOSITION, progress=False
    )
    rows = list(load_dataset(str(out), split="train"))
    assert len(rows) == sum(row["split"] == "test" for row in windows.values())
    for row in rows:
        original = windows[row["id"].removeprefix("ravdess-").removesuffix("-0000")]
        assert row["emotion"] == original["emotion"]
        assert row["words"] == original["words"]
        codes, expected = np.asarray(row["codes"]), np.asarray(original["codes"])
        assert codes.shape == expected.shape
        assert (codes[:, 0] == expected[:, 0]).mean() > 0.95


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("num_calls", [1, 4])
def test_an_interrupted_export_resumes(exported, prepared, tmp_path, monkeypatch, num_calls):
    real, calls = soundfile.write, []

    def stop(*args, **options):
        calls.append(args)
        if len(calls) == num_calls:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module.soundfile, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        export(prepared, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(prepared, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(exported)
    assert len(calls) == 1 + len(list(exported.glob("*/*.wav")))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_exporting_again_does_nothing(exported, prepared):
    before = {path: path.stat().st_mtime_ns for path in exported.rglob("*")}
    assert not export(prepared, exported).is_new
    assert {path: path.stat().st_mtime_ns for path in exported.rglob("*")} == before


def test_another_table_at_out_is_not_replaced(codes, prepared, exported):
    for out, options in ((codes, {}), (exported, {"variants": 2})):
        with pytest.raises(UserError, match="holds something else"):
            export(prepared, out, **options)


def test_codes_are_not_exported(codes, tmp_path):
    with pytest.raises(UserError, match="not a prepared corpus"):
        export(codes, tmp_path / "out")


def test_the_card_has_the_terms_of_the_corpus(exported, prepared):
    card = (exported / "README.md").read_text()
    assert read_card_metadata(prepared)["notice"] in card
    assert "license: cc-by-nc-sa-4.0" in card


def test_an_encoded_export_keeps_corpus_and_terms(exported, tiny_moshi, tmp_path):
    """So that a corpus that may not be published is not under another name."""
    raw = shutil.copytree(exported, tmp_path / "raw")
    card = raw / "README.md"
    card.write_text(card.read_text().replace("builder: ravdess", "builder: esd"))
    base = find_checkpoint(str(tiny_moshi))
    encode_manifest(
        raw / "test.jsonl", tmp_path / "out", load_codec(base), "0", composition=COMPOSITION, progress=False
    )
    metadata = read_card_metadata(tmp_path / "out")
    expected = {**read_card_metadata(exported), "builder": "esd"}
    for key in ("corpus", "builder", "title", "license", "notice"):
        assert metadata[key] == expected[key]


def test_ids_are_quoted_in_file_names():
    metadata = {"corpus": "mine"}
    unit = type("Unit", (), {"split": "train"})
    conversation = type("Conversation", (), {"id": "a/b c-happy-v0-0000"})
    assert module._path(metadata, unit, conversation, ".wav") == "train/mine-a%2Fb%20c-happy-v0-0000.wav"
