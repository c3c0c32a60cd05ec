import pickle
from collections import Counter
from itertools import islice

import pytest
from datasets import Audio, load_dataset
from datasets.distributed import split_dataset_by_node
from huggingface_hub.utils import http_backoff
from torch.utils.data import DataLoader

import hf_csm
from hf_csm.config import Balance, DatasetConfig, Source
from hf_csm.data.audio import decode_audio
from hf_csm.data.labels import EMOTIONS, emotion_id
from hf_csm.data.schema import UTTERANCE_FEATURES
from hf_csm.data.table import ShardWriter, SplitInfo, shard_name, split_files, write_card
from hf_csm.errors import UserError
from hf_csm.mixture.loader import mix
from hf_csm.mixture.windows import training_table
from hf_csm.publish.push_table import push_table
from tests.doubles.codes import RandomWindow, write_random_codes
from tests.doubles.hub import LocalHub


CORPORA = {
    "ravdess": {"happy": 40, "sad": 8},
    "esd": {"happy": 100, "sad": 100, "angry": 2},
}
"""Rows of each emotion, of one second each."""


def write_prepared(folder, sizes, split="train"):
    """Write a prepared table of rows of one second without sound; the corpus is named after the folder."""
    number = 0
    for emotion, size in sizes.items():
        rows = []
        for _ in range(size):
            row = dict.fromkeys(UTTERANCE_FEATURES)
            row |= {
                "id": f"{folder.name}-{number}",
                "corpus": folder.name,
                "audio": {"bytes": bytes([number % 256]), "path": None},
                "duration_s": 1.0,
                "emotion": emotion_id(emotion),
                "speaker_id": f"{folder.name}-{number % 2}",
                "language": "en",
                "split": split,
                "words": [{"word": "a", "start_s": 0.25, "end_s": 0.5}],
            }
            rows.append(row)
            number += 1
        file = folder / "data" / split / shard_name(emotion, 0, 1)
        with ShardWriter(file, UTTERANCE_FEATURES) as writer:
            writer.write(rows)
    num_bytes = sum(file.stat().st_size for file in split_files(folder, split))
    write_card(
        folder,
        features=UTTERANCE_FEATURES,
        title=folder.name,
        license="other",
        splits={split: SplitInfo(number, num_bytes)},
        metadata={"stage": "prepared", "corpus": folder.name},
        body="Rows.",
    )
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return [write_prepared(folder / name, sizes) for name, sizes in CORPORA.items()]


def group_of(row):
    return row["corpus"], EMOTIONS[row["emotion"]]


def ids(rows):
    return [row["id"] for row in rows]


def epochs(stream, number):
    """Yield the rows of the first epochs."""
    for epoch in range(number):
        stream.set_epoch(epoch)
        yield from stream


@pytest.mark.parametrize(
    ("temperature", "max_repeats", "weights"),
    [(0.5, 4.0, None), (0.0, 100.0, None), (0.0, 2.0, None), (1.0, 4.0, None), (0.5, 100.0, [3.0, 1.0])],
)
def test_shares_are_the_probabilities_that_training_computes(tables, tmp_path, temperature, max_repeats, weights):
    codes = [
        write_random_codes(
            tmp_path / name, [RandomWindow(emotion, 25) for emotion, size in sizes.items() for _ in range(size)]
        )
        for name, sizes in CORPORA.items()
    ]
    sources = [Source(str(folder), weight) for folder, weight in zip(codes, weights or [1.0, 1.0], strict=True)]
    config = DatasetConfig(sources=sources, balance=Balance(temperature=temperature, max_repeats=max_repeats))
    groups, probabilities = mix(training_table(config, None), config)
    stream = hf_csm.interleave_corpora(tables, weights, temperature=temperature, max_repeats=max_repeats)
    counts = Counter(map(group_of, epochs(stream, 40)))
    for group, probability in zip(groups, probabilities, strict=True):
        assert counts[group.names] / counts.total() == pytest.approx(probability, abs=0.015)


def test_an_epoch_has_the_seconds_of_the_tables_and_small_groups_repeat_up_to_the_cap(tables):
    stream = hf_csm.interleave_corpora(tables, temperature=0, max_repeats=3)
    rows = list(stream)
    assert len(rows) == 250
    repeats = Counter(map(group_of, epochs(stream, 40)))
    assert repeats["esd", "angry"] / 2 / 40 == pytest.approx(3, abs=0.3)
    assert repeats["ravdess", "sad"] / 8 / 40 == pytest.approx(3, abs=0.3)
    counts = Counter(ids(rows))
    for corpus, sizes in CORPORA.items():  # no row repeats before all rows of its group were drawn
        for emotion in sizes:
            own = {row["id"]: counts[row["id"]] for row in rows if group_of(row) == (corpus, emotion)}
            assert max(own.values()) - min(own.values()) <= 1


def test_rows_are_those_of_the_table(tables):
    stream = hf_csm.interleave_corpora(tables[:1])
    known = {row["id"]: row for row in load_dataset(str(tables[0]), split="train", streaming=True)}
    for row in stream:
        assert row == known[row["id"]]
    assert stream.features == UTTERANCE_FEATURES
    assert stream.split == "train"


def test_the_order_depends_on_the_seed_and_the_epoch_alone(tables):
    stream = hf_csm.interleave_corpora(tables)
    straight = ids(stream)
    assert ids(stream) == straight == ids(hf_csm.interleave_corpora(tables))
    assert ids(hf_csm.interleave_corpora(tables, seed=1)) != straight
    stream.set_epoch(1)
    second = ids(stream)
    assert set(second) != set(straight)  # not the same rows in another order
    assert second == ids(stream)


@pytest.mark.parametrize("epoch", [0, 2])
def test_it_resumes_at_the_exact_row_and_again(tables, epoch):
    def new():
        stream = hf_csm.interleave_corpora(tables)
        stream.set_epoch(epoch)
        return stream

    straight = ids(new())
    first = new()
    assert ids(islice(first, 70)) == straight[:70]
    second = new()
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert ids(islice(second, 50)) == straight[70:120]
    third = new()
    third.load_state_dict(second.state_dict())
    assert ids(third) == straight[120:]


def test_a_mapped_and_batched_stream_resumes(tables):
    def new():
        stream = hf_csm.interleave_corpora(tables)
        return stream.map(lambda row: {"text": row["id"]}).select_columns("text").batch(3)

    straight = [batch["text"] for batch in new()]
    first = new()
    assert [batch["text"] for batch in islice(first, 5)] == straight[:5]
    second = new()
    second.load_state_dict(first.state_dict())
    assert [batch["text"] for batch in second] == straight[5:]


def test_two_workers_share_an_epoch(tables):
    stream = hf_csm.interleave_corpora(tables).select_columns(["id", "emotion"])
    straight = ids(stream)
    assert ids(DataLoader(stream, batch_size=None, num_workers=2)) == straight  # they take turns


@pytest.mark.parametrize("num_nodes", [2, 3, 7])
def test_nodes_share_an_epoch_in_turns(tables, num_nodes):
    stream = hf_csm.interleave_corpora(tables)
    straight = ids(stream)
    for rank in range(num_nodes):
        assert ids(split_dataset_by_node(stream, rank, num_nodes)) == straight[rank::num_nodes]


def test_workers_of_a_node_share_its_part(tables):
    stream = hf_csm.interleave_corpora(tables).select_columns(["id"])
    node = split_dataset_by_node(stream, 1, 2)
    assert Counter(ids(DataLoader(node, batch_size=None, num_workers=2))) == Counter(ids(stream)[1::2])


def test_a_node_resumes(tables):
    node = split_dataset_by_node(hf_csm.interleave_corpora(tables), 1, 2)
    straight = ids(node)
    assert ids(islice(node, 30)) == straight[:30]
    again = split_dataset_by_node(hf_csm.interleave_corpora(tables), 1, 2)
    again.load_state_dict(node.state_dict())
    assert ids(again) == straight[30:]


@pytest.mark.parametrize(
    ("by", "weights", "expected"),
    [
        (("emotion",), {"happy": 2.0}, {"happy": 0.5, "sad": 0.25, "angry": 0.25}),
        ("emotion", None, {"happy": 1 / 3, "sad": 1 / 3, "angry": 1 / 3}),
        (("corpus", "emotion"), {("esd", "angry"): 6.0}, {"happy": 0.2, "sad": 0.2, "angry": 0.6}),
    ],
)
def test_a_group_may_have_a_weight(tables, by, weights, expected):
    stream = hf_csm.interleave_corpora(tables, weights, by, temperature=0, max_repeats=1e6)
    counts = Counter(EMOTIONS[row["emotion"]] for row in epochs(stream, 20))
    shares = {emotion: count / counts.total() for emotion, count in counts.items()}
    assert shares == pytest.approx(expected, abs=0.02)


def test_weights_by_table_and_by_group_multiply(tables):
    weights = {str(tables[0]): 3.0, ("ravdess", "sad"): 2.0}
    stream = hf_csm.interleave_corpora(tables, weights, temperature=0, max_repeats=1e6)
    counts = Counter(map(group_of, epochs(stream, 20)))
    shares = [counts[group] / counts.total() for group in [("ravdess", "happy"), ("ravdess", "sad"), ("esd", "sad")]]
    assert shares == pytest.approx([3 / 12, 6 / 12, 1 / 12], abs=0.02)


def test_a_real_prepared_corpus_has_sound(prepared):
    stream = hf_csm.interleave_corpora([prepared])
    row = next(iter(stream))
    assert len(decode_audio(row["audio"])) == pytest.approx(24_000 * row["duration_s"], abs=1)
    assert stream.features["audio"] == Audio(sampling_rate=24_000, decode=False)
    validation = {row["speaker_id"] for row in hf_csm.interleave_corpora([prepared], split="validation")}
    assert validation == {"ravdess-17", "ravdess-18"}


def test_a_table_may_be_on_the_hub(tables, prepared, tmp_path, monkeypatch):
    for wait in ("base_wait_time", "max_wait_time"):
        monkeypatch.setitem(http_backoff.__kwdefaults__, wait, 0)
    with LocalHub(tmp_path / "hub") as hub, hub.connected(tmp_path / "home"):
        push_table(str(prepared), "user/ravdess")
        stream = hf_csm.interleave_corpora(["user/ravdess", tables[1]], {"user/ravdess": 2.0})
        assert {row["corpus"] for row in stream} == {"ravdess", "esd"}


@pytest.mark.parametrize(
    ("arguments", "problem", "remedy"),
    [
        ({"by": ("corpus", "mood")}, "'mood'", "emotion"),
        ({"by": ()}, "by", "emotion"),
        ({"temperature": 1.5}, "temperature is 1.5", "0 to 1"),
        ({"temperature": float("nan")}, "temperature", "0 to 1"),
        ({"max_repeats": 0.5}, "max_repeats is 0.5", "1"),
        ({"split": "dev"}, "'dev'", "validation"),
        ({"split": "test"}, "ravdess has no test split", "another split"),
        ({"weights": [1.0]}, "for 2 tables", "each table"),
        ({"weights": 2.0}, "weights is 2.0", "each table"),
        ({"weights": ["a", "b"]}, "is a", "above 0"),
        ({"temperature": "x"}, "temperature is 'x'", "number"),
        ({"max_repeats": None}, "max_repeats is None", "number"),
        ({"by": None}, "by", "emotion"),
        ({"seed": -1}, "seed is -1", "at least 0"),
        ({"seed": 1.5}, "seed is 1.5", "whole number"),
        ({"weights": [1.0, 0.0]}, "is 0.0", "above 0"),
        ({"weights": {"crema_d": 1.0}}, "crema_d", "groups are ('esd', 'angry')"),
        ({"weights": {("esd", "fearful"): 1.0}}, "fearful", "Tables are"),
        ({"weights": {"joyful": 1.0}, "by": "emotion"}, "joyful", "groups are angry, happy, sad."),
    ],
)
def test_bad_arguments_are_named(tables, arguments, problem, remedy):
    with pytest.raises(UserError) as caught:
        hf_csm.interleave_corpora(tables, **arguments)
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy
    assert str(caught.value).count("\n") == 1


def test_tables_of_codes_repeated_and_missing_tables_are_named(tables, tmp_path):
    codes = write_random_codes(tmp_path / "codes", [RandomWindow("sad")])
    for given, problem in [
        ([codes], "is not a prepared corpus"),
        ([tables[0], f"{tables[0]}/."], "are one table"),
        ([tmp_path / "nothing"], "no such folder"),
        ([], "no tables"),
    ]:
        with pytest.raises(UserError, match=problem):
            hf_csm.interleave_corpora(given)


def test_part_of_a_table_is_refused(tmp_path):
    table = write_prepared(tmp_path / "esd", {"sad": 3, "happy": 3})
    split_files(table, "train")[0].unlink()
    with pytest.raises(UserError, match="not a whole table"):
        hf_csm.interleave_corpora([table])


def test_an_epoch_of_rows_of_unequal_length_has_the_seconds_of_the_table(prepared):
    stream = hf_csm.interleave_corpora([prepared], temperature=0)
    total_s = sum(row["duration_s"] for row in load_dataset(str(prepared), split="train", streaming=True))
    assert sum(row["duration_s"] for row in stream) == pytest.approx(total_s, rel=0.1)
