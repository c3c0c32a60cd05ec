import pyarrow.parquet as pq
import pytest

from hf_csm.data.labels import EMOTIONS
from hf_csm.data.schema import UTTERANCE_FEATURES
from hf_csm.data.table import ROWS_PER_GROUP, ShardWriter
from hf_csm.encode.compose import MODEL, USER, Composition
from hf_csm.encode.prepared_corpus import PreparedCorpus, plan_units
from hf_csm.errors import UserError


COMPOSITION = Composition(duration_s=20.0)
WORDS = [{"word": "hello", "start_s": 0.5, "end_s": 0.9}, {"word": "there", "start_s": 1.0, "end_s": 1.4}]


def make_row(id_, acted, perceived=None, *, words=WORDS, duration_s=2.0):
    return {
        "id": id_,
        "speaker_id": id_[0],
        "language": "en",
        "split": "train",
        "emotion": None if acted is None else EMOTIONS.index(acted),
        "emotion_perceived": None if perceived is None else EMOTIONS.index(perceived),
        "duration_s": duration_s,
        "words": words,
    }


def write_rows(folder, rows):
    with ShardWriter(folder / "rows.parquet", UTTERANCE_FEATURES) as writer:
        writer.write(rows)
    return [folder / "rows.parquet"]


def turns_of(units, channel):
    return [turn.clip for unit in units for c in unit.conversations for turn in c.turns if turn.channel == channel]


VOTED = [make_row("a1", "happy", "happy"), make_row("a2", "happy", "sad"), make_row("b1", "angry", None)]


@pytest.mark.parametrize(
    ("label", "expected", "dropped"),
    [
        ("acted", {"a1": "happy", "a2": "happy", "b1": "angry"}, {}),
        ("perceived", {"a1": "happy", "a2": "sad"}, {"without a perceived emotion": 1}),
        ("agreed", {"a1": "happy"}, {"without a perceived emotion that is the acted one": 2}),
    ],
)
def test_the_label_selects_the_emotion(tmp_path, label, expected, dropped):
    units, counts = plan_units(write_rows(tmp_path, VOTED), COMPOSITION, 1, label)
    assert {clip.id: clip.emotion for clip in turns_of(units, MODEL)} == expected
    assert {(unit.group, c.emotion) for unit in units for c in unit.conversations} == {
        (emotion, emotion) for emotion in expected.values()
    }
    assert counts == dropped


def test_a_clip_without_the_label_can_be_used_for_the_user(tmp_path):
    files = write_rows(tmp_path, [*VOTED, *(make_row(f"a{i}", "happy", "happy") for i in range(3, 20))])
    units, _ = plan_units(files, COMPOSITION, 1, "agreed")
    assert {clip.id for clip in turns_of(units, USER)} == {"b1"}


@pytest.mark.parametrize("label", ["perceived", "agreed"])
def test_a_corpus_without_raters_has_no_perceived_label(tmp_path, label):
    files = write_rows(tmp_path, [make_row("a1", "happy"), make_row("b1", "sad")])
    with pytest.raises(UserError, match=f"--label {label}"):
        plan_units(files, COMPOSITION, 1, label)


def test_an_unknown_label_is_refused(tmp_path):
    with pytest.raises(UserError, match="'heard'"):
        plan_units(write_rows(tmp_path, VOTED), COMPOSITION, 1, "heard")


def test_skipped_rows_are_counted_by_reason(tmp_path):
    rows = [
        make_row("a1", "happy"),
        make_row("b1", None),
        make_row("b2", "sad", words=[]),
        make_row("b3", "sad", words=[{**WORDS[0], "end_s": 30.0}], duration_s=31.0),
    ]
    units, dropped = plan_units(write_rows(tmp_path, rows), COMPOSITION, 1)
    assert {clip.id for clip in turns_of(units, MODEL)} == {"a1"}
    assert dropped == {
        "without an emotion label": 1,
        "without a transcript": 1,
        "longer than a conversation may be": 1,
    }


def test_clips_are_trimmed_to_their_words(tmp_path):
    rows = [
        make_row("a1", "happy", words=[]),
        make_row("a2", "happy", words=[{"word": "oh", "start_s": 1.0, "end_s": 1.25}]),
        make_row("a3", "happy"),
    ]
    units, _ = plan_units(write_rows(tmp_path, rows), Composition(duration_s=20.0, margin_s=0.0), 1)
    parts = {clip.id: (clip.offset / 24_000, clip.num_samples / 24_000) for clip in turns_of(units, MODEL)}
    assert parts == {"a2": (1.0, 0.25), "a3": (0.5, pytest.approx(0.9, abs=1e-4))}


def test_conversations_read_each_row_group_once(prepared, monkeypatch):
    corpus = PreparedCorpus(prepared)
    units, _ = corpus.plan(COMPOSITION, 2, "acted")
    conversations = [conversation for unit in units for conversation in unit.conversations]
    places = {turn.clip.place for conversation in conversations for turn in conversation.turns}
    real, reads = pq.ParquetFile.read_row_group, []

    def count(file, group, **options):
        reads.append(group)
        return real(file, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    clips = corpus.read(conversations, COMPOSITION)
    assert set(clips.rows) == places
    assert len(reads) == len({(file, row // ROWS_PER_GROUP) for file, row in places}) > 1
