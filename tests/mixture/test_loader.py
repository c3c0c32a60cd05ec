import shutil
from collections import Counter
from functools import partial
from itertools import count, islice

import numpy as np
import pytest

from hf_csm.config import Balance, DatasetConfig, Replay, Source
from hf_csm.data.labels import EMOTIONS
from hf_csm.errors import UserError
from hf_csm.mixture.groups import Group, draw_rows, expected_repeats, group_probabilities
from hf_csm.mixture.loader import (
    MixtureLoader,
    group_by_length,
    lay_out_row,
    mix,
    validation_batches,
)
from hf_csm.mixture.windows import WindowTable, training_table
from hf_csm.models.family import NO_TOKEN
from hf_csm.models.moshi.checkpoint import codec_sha256, find_checkpoint, load_tokenizer
from hf_csm.models.moshi.layout import lay_out
from hf_csm.models.moshi.model import load_moshi
from tests.doubles.codes import RandomWindow, write_random_codes


NUMBERS = count()


@pytest.fixture(scope="module")
def base(tiny_moshi):
    return find_checkpoint(str(tiny_moshi))


@pytest.fixture(scope="module")
def layout(base):
    return load_moshi(base).layout


@pytest.fixture(scope="module")
def tokenize(base):
    return load_tokenizer(base).encode


@pytest.fixture(scope="module")
def table(base, codes):
    return WindowTable([Source(str(codes))], "train", codec_sha256=codec_sha256(base))


def make_loader(table, layout, tokenize, **options):
    numbers = {key: options.pop(key) for key in ("seed", "rank", "world_size") if key in options}
    config = DatasetConfig(**{"duration_sec": 12.0, "batch_size": 2, **options})
    return MixtureLoader(
        table, layout, partial(lay_out, layout=layout, tokenize=tokenize), config, **{"seed": 0, **numbers}
    )


def group(duration_s, weight=1.0, rows=None, names=None):
    """Return a group with a unique name and windows of one second by default."""
    rows = np.arange(duration_s) if rows is None else np.array(rows)
    return Group(names or (str(next(NUMBERS)),), weight, rows, float(duration_s))


def codes_of(batches):
    return [batch.codes.numpy().tobytes() for batch in batches]


@pytest.mark.parametrize(
    ("groups", "balance", "expected"),
    [
        ([group(300), group(100)], Balance(temperature=1), [0.75, 0.25]),
        ([group(300), group(100)], Balance(temperature=0), [0.5, 0.5]),
        ([group(300), group(100, weight=3)], Balance(temperature=1), [0.5, 0.5]),
        ([group(900), group(100)], Balance(temperature=0.5), [0.75, 0.25]),
        # the second would be repeated five times; two is the maximum
        ([group(90), group(10)], Balance(temperature=0, max_repeats=2), [0.8, 0.2]),
        # the rest of a capped share goes to the others in proportion
        ([group(60), group(30), group(10)], Balance(temperature=0, max_repeats=1.5), [0.425, 0.425, 0.15]),
        ([group(60), group(30), group(10)], Balance(temperature=0, max_repeats=1), [0.6, 0.3, 0.1]),
        ([group(5)], Balance(), [1.0]),
        ([group(300, weight=1e308), group(100, weight=1e308)], Balance(temperature=1), [0.75, 0.25]),
        ([group(300, weight=1e308), group(100, weight=1e-308)], Balance(max_repeats=1), [0.75, 0.25]),
    ],
)
def test_group_probabilities(groups, balance, expected):
    assert group_probabilities(groups, balance).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("groups", "temperature", "expected"),
    [
        # the group has 400 s at a mean weight of 1.5; within it 300 x 1 to 100 x 3
        ([group(300, 1, names=("a",)), group(100, 3, names=("a",)), group(600)], 1, [0.25, 0.25, 0.5]),
        ([group(300, 1, names=("a",)), group(100, 3, names=("a",)), group(600)], 0, [0.3, 0.3, 0.4]),
        ([group(300, 1, names=("a",)), group(100, 1, names=("a",)), group(400)], 0.5, [0.375, 0.125, 0.5]),
    ],
)
def test_a_group_of_several_tables_is_shared_by_weight_and_seconds(groups, temperature, expected):
    balance = Balance(temperature=temperature, max_repeats=100)
    assert group_probabilities(groups, balance).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_no_group_exceeds_max_repeats(seed):
    rng = np.random.default_rng(seed)
    groups = [
        group(rng.uniform(1, 1000), weight=rng.uniform(0.1, 10), rows=range(rng.integers(1, 100)))
        for _ in range(rng.integers(1, 9))
    ]
    balance = Balance(temperature=rng.uniform(0, 1), max_repeats=rng.uniform(1, 5))
    probabilities = group_probabilities(groups, balance)
    assert probabilities.sum() == pytest.approx(1)
    assert expected_repeats(groups, probabilities).max() <= balance.max_repeats + 1e-9


def test_groups_below_their_cap_keep_their_proportion():
    """Windows of 1 s and of 10 s: the caps count seconds, the probabilities windows."""
    groups = [group(1000), group(1000, rows=range(100)), group(4), group(4, rows=[0])]
    probabilities = group_probabilities(groups, Balance(temperature=0, max_repeats=2))
    assert probabilities[0] == pytest.approx(probabilities[1])
    assert expected_repeats(groups, probabilities)[2:] == pytest.approx([2, 2])


def test_expected_repeats_are_those_of_an_epoch():
    groups = [group(40, rows=range(0, 4)), group(40, rows=range(4, 44)), group(10, rows=range(44, 45))]
    window_s = np.repeat([10.0, 1.0, 10.0], [4, 40, 1])
    probabilities = group_probabilities(groups, Balance(temperature=0.5, max_repeats=2))
    drawn = np.array(list(islice(draw_rows(groups, probabilities, seed=1), 20_000)))
    num_epochs = window_s[drawn].sum() / 90
    passes = [np.isin(drawn, group.rows).sum() / len(group.rows) / num_epochs for group in groups]
    assert expected_repeats(groups, probabilities).tolist() == pytest.approx(passes, rel=0.03)


def test_drawn_shares_match_the_probabilities():
    groups = [group(1, rows=range(0, 7)), group(1, rows=range(7, 10)), group(1, rows=range(10, 30))]
    drawn = np.array(list(islice(draw_rows(groups, [0.5, 0.3, 0.2], seed=0), 10_000)))
    shares = [(drawn < 7).mean(), ((drawn >= 7) & (drawn < 10)).mean(), (drawn >= 10).mean()]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.01)


def test_a_group_is_passed_whole_before_it_repeats_and_in_a_new_order():
    rows = list(islice(draw_rows([group(1, rows=range(8))], [1.0], seed=0), 24))
    passes = [rows[:8], rows[8:16], rows[16:]]
    assert all(sorted(one) == list(range(8)) for one in passes)
    assert passes[0] != passes[1]


def test_micro_batches_stay_within_the_budget_and_lose_no_window():
    num_frames = np.random.default_rng(0).integers(10, 100, size=400)
    groups = group_by_length(iter(range(400)), num_frames, budget_frames=400, pool_size=100, seed=0)
    drawn: list[int] = []
    for group in groups:
        longest = max(num_frames[row] for _, row in group)
        assert longest * len(group) <= 400
        drawn += [draw for draw, _ in group]
        if len(drawn) == 300:
            break
    assert sorted(drawn) == list(range(300))  # three pools, each used up before the next is drawn


def test_padding_is_at_most_10_percent(table, layout, tokenize):
    batches = list(islice(make_loader(table, layout, tokenize, batch_size=8).batches(), 20))
    padded = np.concatenate([(batch.codes[:, 1] == NO_TOKEN).numpy().ravel() for batch in batches])
    assert padded.mean() <= 0.10


def test_the_sequence_depends_on_the_seed_alone(table, layout, tokenize):
    first = codes_of(islice(make_loader(table, layout, tokenize).batches(), 8))
    assert first == codes_of(islice(make_loader(table, layout, tokenize).batches(), 8))
    assert first != codes_of(islice(make_loader(table, layout, tokenize, seed=1).batches(), 8))


@pytest.mark.parametrize("start", [1, 5, 13])
def test_starting_later_gives_the_same_batches(table, layout, tokenize, start):
    straight = codes_of(islice(make_loader(table, layout, tokenize).batches(), 20))
    assert codes_of(islice(make_loader(table, layout, tokenize).batches(start), 20 - start)) == straight[start:]


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_split_the_batches_of_one_process(table, layout, tokenize, world_size):
    straight = codes_of(islice(make_loader(table, layout, tokenize).batches(), 12))
    for rank in range(world_size):
        loader = make_loader(table, layout, tokenize, rank=rank, world_size=world_size)
        assert codes_of(islice(loader.batches(), 12 // world_size)) == straight[rank::world_size]


def test_a_run_resumes_with_another_number_of_processes(table, layout, tokenize):
    straight = codes_of(islice(make_loader(table, layout, tokenize).batches(), 12))
    for rank in range(2):
        loader = make_loader(table, layout, tokenize, rank=rank, world_size=2)
        assert codes_of(islice(loader.batches(start=3), 4)) == straight[3 + rank : 11 : 2]


def test_the_prefix_is_dropped_for_its_share_of_the_windows(table, layout, tokenize):
    given = []
    for batch in islice(make_loader(table, layout, tokenize, prefix_dropout=0.25).batches(), 120):
        given += (batch.num_given > 0).tolist()
    assert np.mean(given) == pytest.approx(0.75, abs=0.08)


def test_control_none_gives_no_prefix(table, layout, tokenize):
    batches = islice(make_loader(table, layout, tokenize, control="none").batches(), 5)
    assert all((batch.num_given == 0).all() for batch in batches)


def test_the_prefix_names_the_windows_emotion(table, layout, tokenize):
    emotion_of = {table.row(i)["id"]: table.emotions[i] for i in range(len(table))}
    for batch in islice(make_loader(table, layout, tokenize, prefix_dropout=0.0).batches(), 10):
        for window_id, codes, num_given in zip(batch.ids, batch.codes, batch.num_given, strict=True):
            assert codes[0, :num_given].tolist() == tokenize(f"({emotion_of[window_id]})")


def test_batches_by_length_can_be_turned_off(table, layout, tokenize):
    batches = list(islice(make_loader(table, layout, tokenize, batch_by_length=False, batch_size=3).batches(), 10))
    assert {len(batch.ids) for batch in batches} == {3}


def test_emotions_are_drawn_equally_often_at_temperature_0(base, codes, layout, tokenize):
    table = WindowTable([Source(str(codes))], "train", codec_sha256=codec_sha256(base))
    loader = make_loader(
        table, layout, tokenize, balance=Balance(temperature=0, max_repeats=100), batch_by_length=False, batch_size=50
    )
    emotion_of = {table.row(i)["id"]: table.emotions[i] for i in range(len(table))}
    counts = Counter(emotion_of[i] for batch in islice(loader.batches(), 20) for i in batch.ids)
    assert set(counts) == {"neutral", "happy", "sad", "angry"}
    assert all(count / 1000 == pytest.approx(0.25, abs=0.04) for count in counts.values())


def test_long_windows_are_cut(base, codes, layout, tokenize):
    table = WindowTable([Source(str(codes))], "train", codec_sha256=codec_sha256(base), max_frames=60)
    assert table.num_frames.max() == 60
    assert 0 < table.num_cut <= len(table)
    batch = next(make_loader(table, layout, tokenize, duration_sec=4.8).batches())
    assert batch.codes.shape[2] <= 60 + layout.max_delay


def test_a_weight_moves_the_share_of_a_table(base, codes, tmp_path):
    copy = shutil.copytree(codes, tmp_path / "copy")
    sources = [Source(str(codes), 1.0), Source(str(copy), 3.0)]
    groups = WindowTable(sources, "train", codec_sha256=codec_sha256(base)).groups()
    shares = group_probabilities(groups, Balance(temperature=1))
    assert sum(share for share, c in zip(shares, groups, strict=True) if c.weight == 3.0) == pytest.approx(0.75)


def test_validation_windows_are_a_fixed_set(table):
    config = DatasetConfig(duration_sec=12.0, batch_size=2)
    batches = validation_batches(table, config, max_windows=6)
    assert batches == validation_batches(table, config, max_windows=6)
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows)) == 6


def test_a_mixture_without_windows_is_an_error(base, codes, layout, tokenize):
    table = WindowTable([Source(str(codes))], "train", codec_sha256=codec_sha256(base), emotions=["disgust"])
    assert "disgust" in EMOTIONS
    with pytest.raises(UserError, match="No training windows"):
        make_loader(table, layout, tokenize)


@pytest.fixture(scope="module")
def four_corpora(tmp_path_factory):
    """Four tables of 2, 4, 6 and 8 windows of each of three emotions."""
    folder = tmp_path_factory.mktemp("four")
    return [
        write_random_codes(folder / name, [RandomWindow(emotion) for emotion in EMOTIONS[:3] for _ in range(size)])
        for name, size in {"ravdess": 2, "crema_d": 4, "esd": 6, "msp_podcast": 8}.items()
    ]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    return write_random_codes(tmp_path_factory.mktemp("replay") / "dialogues", [RandomWindow(None)] * 5)


def drawn_corpora(config, num_draws=10_000):
    """Return the table, and the share of each corpus and emotion in the first draws."""
    table = training_table(config, None)
    groups, probabilities = mix(table, config)
    drawn = list(islice(draw_rows(groups, probabilities, seed=0), num_draws))
    corpora = Counter(table.corpora[row] for row in drawn)
    emotions = Counter(table.emotions[row] for row in drawn)
    return *({name: n / num_draws for name, n in counts.items()} for counts in (corpora, emotions)), drawn


def sources_of(folders, weights):
    return [Source(str(folder), weight) for folder, weight in zip(folders, weights, strict=True)]


@pytest.mark.parametrize(
    ("temperature", "weights", "expected"),
    [
        (0, (1, 1, 1, 1), (0.25, 0.25, 0.25, 0.25)),
        (0, (4, 3, 2, 1), (0.4, 0.3, 0.2, 0.1)),
        (1, (1, 1, 1, 1), (0.1, 0.2, 0.3, 0.4)),
        (1, (4, 3, 1, 0.5), (0.267, 0.4, 0.2, 0.133)),
    ],
)
def test_four_corpora_are_drawn_by_their_weights(four_corpora, temperature, weights, expected):
    balance = Balance(temperature=temperature, max_repeats=100)
    corpora, emotions, _ = drawn_corpora(DatasetConfig(sources=sources_of(four_corpora, weights), balance=balance))
    assert [corpora[folder.name] for folder in four_corpora] == pytest.approx(expected, abs=0.01)
    assert all(share == pytest.approx(1 / 3, abs=0.015) for share in emotions.values())


def test_balance_by_emotion_draws_a_corpus_by_its_seconds_within_it(four_corpora):
    balance = Balance(by=["emotion"], temperature=0, max_repeats=100)
    config = DatasetConfig(sources=sources_of(four_corpora, (1, 1, 1, 1)), balance=balance)
    corpora, emotions, _ = drawn_corpora(config)
    assert [corpora[folder.name] for folder in four_corpora] == pytest.approx((0.1, 0.2, 0.3, 0.4), abs=0.01)
    assert all(share == pytest.approx(1 / 3, abs=0.01) for share in emotions.values())


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.75])
def test_replay_has_its_share_and_the_rest_keeps_its_proportions(four_corpora, dialogues, fraction):
    config = DatasetConfig(
        sources=sources_of(four_corpora, (4, 3, 2, 1)),
        balance=Balance(temperature=0, max_repeats=100),
        replay=Replay(str(dialogues), fraction),
        emotions=["neutral", "happy"],  # not of replay
    )
    corpora, _, drawn = drawn_corpora(config)
    assert corpora.get("dialogues", 0) == pytest.approx(fraction, abs=0.01)
    assert [corpora[folder.name] for folder in four_corpora] == pytest.approx(
        [(1 - fraction) * share for share in (0.4, 0.3, 0.2, 0.1)], abs=0.01
    )
    table = training_table(config, None)
    of_replay = Counter(row for row in drawn if table.corpora[row] == "dialogues")
    assert not of_replay or max(of_replay.values()) - min(of_replay.values()) <= 1  # each window as often


def test_windows_without_emotion_get_no_prefix(dialogues, layout, tokenize):
    config = DatasetConfig(manifest_path=str(dialogues), prefix_dropout=0.0)
    table = training_table(config, None)
    assert lay_out_row(table, 0, partial(lay_out, layout=layout, tokenize=tokenize), config).num_given == 0
    assert [group.names for group in mix(table, config)[0]] == [("dialogues", "unlabelled")]


def test_a_thousand_groups_are_drawn_from():
    groups = [group(3, rows=range(3 * i, 3 * i + 3)) for i in range(1000)]
    drawn = list(islice(draw_rows(groups, [0.001] * 1000, seed=0), 5000))
    assert len({row // 3 for row in drawn}) > 950
