from collections import Counter
from itertools import islice

import numpy as np
import pytest

from hf_csm.config import Balance, DatasetConfig, Source
from hf_csm.data.labels import EMOTIONS
from hf_csm.data.layout import NO_TOKEN
from hf_csm.data.mixture import (
    Cell,
    MixtureLoader,
    WindowTable,
    cell_probabilities,
    draw_windows,
    group_by_length,
    validation_batches,
)
from hf_csm.errors import UserError
from hf_csm.models.moshi import codec_sha256, find_checkpoint, load_moshi, load_tokenizer


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
    return MixtureLoader(table, layout, tokenize, config, **{"seed": 0, **numbers})


def cell(duration_s, weight=1.0, rows=(0,)):
    return Cell("c", "happy", weight, np.array(rows), duration_s)


def codes_of(batches):
    return [batch.codes.numpy().tobytes() for batch in batches]


@pytest.mark.parametrize(
    ("cells", "balance", "expected"),
    [
        ([cell(300), cell(100)], Balance(temperature=1), [0.75, 0.25]),
        ([cell(300), cell(100)], Balance(temperature=0), [0.5, 0.5]),
        ([cell(300), cell(100, weight=3)], Balance(temperature=1), [0.5, 0.5]),
        ([cell(900), cell(100)], Balance(temperature=0.5), [0.75, 0.25]),
        # the second would be passed five times; two at the most
        ([cell(90), cell(10)], Balance(temperature=0, max_repeats=2), [0.8, 0.2]),
        # what the capped ones give up goes to the others in proportion
        ([cell(60), cell(30), cell(10)], Balance(temperature=0, max_repeats=1.5), [0.425, 0.425, 0.15]),
        ([cell(60), cell(30), cell(10)], Balance(temperature=0, max_repeats=1), [0.6, 0.3, 0.1]),
        ([cell(5)], Balance(), [1.0]),
    ],
)
def test_cell_probabilities(cells, balance, expected):
    assert cell_probabilities(cells, balance).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_no_cell_is_passed_more_often_than_allowed(seed):
    rng = np.random.default_rng(seed)
    cells = [cell(rng.uniform(1, 1000), weight=rng.uniform(0.1, 10)) for _ in range(rng.integers(1, 9))]
    balance = Balance(temperature=rng.uniform(0, 1), max_repeats=rng.uniform(1, 5))
    probabilities = cell_probabilities(cells, balance)
    total_s = sum(c.duration_s for c in cells)
    assert probabilities.sum() == pytest.approx(1)
    assert all(
        p * total_s / c.duration_s <= balance.max_repeats + 1e-9 for p, c in zip(probabilities, cells, strict=True)
    )


def test_drawn_shares_match_the_probabilities():
    cells = [cell(1, rows=range(0, 7)), cell(1, rows=range(7, 10)), cell(1, rows=range(10, 30))]
    drawn = np.array(list(islice(draw_windows(cells, [0.5, 0.3, 0.2], seed=0), 10_000)))
    shares = [(drawn < 7).mean(), ((drawn >= 7) & (drawn < 10)).mean(), (drawn >= 10).mean()]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.01)


def test_a_cell_is_passed_whole_before_it_repeats_and_in_a_new_order():
    rows = list(islice(draw_windows([cell(1, rows=range(8))], [1.0], seed=0), 24))
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


def test_padding_is_little(table, layout, tokenize):
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
def test_processes_deal_out_the_batches_of_one(table, layout, tokenize, world_size):
    straight = codes_of(islice(make_loader(table, layout, tokenize).batches(), 12))
    for rank in range(world_size):
        loader = make_loader(table, layout, tokenize, rank=rank, world_size=world_size)
        assert codes_of(islice(loader.batches(), 12 // world_size)) == straight[rank::world_size]


def test_a_run_goes_on_with_another_number_of_processes(table, layout, tokenize):
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


def test_only_the_wanted_emotions_are_kept(base, codes):
    table = WindowTable([Source(str(codes))], "train", codec_sha256=codec_sha256(base), emotions=["sad"])
    assert set(table.emotions) == {"sad"}
    assert [c.emotion for c in table.cells()] == ["sad"]


def test_long_windows_are_cut(base, codes, layout, tokenize):
    table = WindowTable([Source(str(codes))], "train", codec_sha256=codec_sha256(base), max_frames=60)
    assert table.num_frames.max() == 60
    assert 0 < table.num_cut <= len(table)
    batch = next(make_loader(table, layout, tokenize, duration_sec=4.8).batches())
    assert batch.codes.shape[2] <= 60 + layout.max_delay


def test_a_weight_moves_the_share_of_a_table(base, codes):
    sources = [Source(str(codes), 1.0), Source(str(codes), 3.0)]
    cells = WindowTable(sources, "train", codec_sha256=codec_sha256(base)).cells()
    shares = cell_probabilities(cells, Balance(temperature=1))
    assert sum(share for share, c in zip(shares, cells, strict=True) if c.weight == 3.0) == pytest.approx(0.75)


def test_validation_windows_are_a_fixed_set(table):
    config = DatasetConfig(duration_sec=12.0, batch_size=2)
    batches = validation_batches(table, config, max_windows=6)
    assert batches == validation_batches(table, config, max_windows=6)
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows)) == 6


@pytest.mark.parametrize("emotion", ["joyful", "Happy"])
def test_an_unknown_emotion_is_named(base, codes, emotion):
    with pytest.raises(UserError, match=emotion):
        WindowTable([Source(str(codes))], "train", codec_sha256=codec_sha256(base), emotions=[emotion])


def test_codes_of_another_codec_are_refused(codes):
    with pytest.raises(UserError, match=r"codes of codec .*; the base model's is 000000000000"):
        WindowTable([Source(str(codes))], "train", codec_sha256="0" * 64)


def test_a_prepared_corpus_is_not_taken_for_codes(prepared):
    with pytest.raises(UserError, match="not a table of codes"):
        WindowTable([Source(str(prepared))], "train", codec_sha256="0" * 64)


def test_no_window_left_is_an_error(base, codes, layout, tokenize):
    table = WindowTable([Source(str(codes))], "train", codec_sha256=codec_sha256(base), emotions=["disgust"])
    assert "disgust" in EMOTIONS
    with pytest.raises(UserError, match="No training windows"):
        make_loader(table, layout, tokenize)
