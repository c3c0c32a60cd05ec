import re

import pytest
from matplotlib.figure import Figure

from hf_csm.config import Balance, DatasetConfig, Replay, RunConfig, Source
from hf_csm.data.labels import EMOTIONS
from hf_csm.errors import UserError
from hf_csm.mixture import report as module
from hf_csm.mixture.report import describe
from tests.doubles.codes import RandomWindow, write_random_codes


HOUR_FRAMES = 45_000


def write(folder, hours, **more):
    """Write a table with a window of 0.1 h for each tenth of an hour of each emotion."""
    windows = [
        RandomWindow(emotion, HOUR_FRAMES // 10)
        for emotion, length in hours.items()
        for _ in range(round(10 * length))
    ]
    return str(write_random_codes(folder, [*windows, *more.get("held_out", [])], num_codebooks=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("describe")
    held_out = [RandomWindow("sad", HOUR_FRAMES // 2, split="validation"), RandomWindow("happy", 450, split="test")]
    write(folder / "esd", {"happy": 0.6, "sad": 0.3}, held_out=held_out)
    write(folder / "ravdess", {"happy": 0.1})
    write(folder / "dialogues", {None: 0.5})
    return folder


@pytest.fixture
def config(folder):
    def make(**options):
        sources = [Source(str(folder / "esd"), 2.0), Source(str(folder / "ravdess"))]
        dataset = {"sources": sources, "duration_sec": 1e4, "balance": Balance(temperature=1), **options}
        return RunConfig(dataset=DatasetConfig(**dataset), run_dir=str(folder / "run"))

    return make


def test_every_group_has_a_line(config):
    lines = describe(config()).render().splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["corpus", "emotion", "windows", "hours", "drawn", "repeats"],
        ["esd", "happy", "6", "0.60", "63.2%", "1.05"],
        ["esd", "sad", "3", "0.30", "31.6%", "1.05"],
        ["ravdess", "happy", "1", "0.10", "5.3%", "0.53"],
        ["all", "10", "1.00", "100.0%", "1.00"],
    ]
    assert lines[5:] == [
        "repeats: passes over a group in an epoch, which draws 1.00 hours",
        "hours: train 1.00, validation 0.50, test 0.01",
    ]


def test_replay_comes_on_top_of_an_epoch(config, folder):
    text = describe(config(replay=Replay(str(folder / "dialogues"), 0.2))).render()
    lines = {line.split()[0]: line.split() for line in text.splitlines()}
    assert lines["ravdess"][-2:] == ["4.2%", "0.53"]  # an epoch of the sources is what it was
    assert lines["all"][-2:] == ["80.0%", "1.00"]
    assert lines["replay"] == ["replay", "5", "0.50", "20.0%", "0.50"]
    assert "1.00 hours and 0.25 hours of replay" in text
    assert "train 1.00" in text


def test_capped_groups_are_marked(config):
    text = describe(config(balance=Balance(temperature=0, max_repeats=2))).render()
    assert [line.split()[:2] for line in text.splitlines() if line.endswith("*")] == [["ravdess", "happy"]]
    assert re.search(r"ravdess +happy .* 2\.00 \*", text)
    assert "* capped at dataset.balance.max_repeats 2" in text
    assert "max_repeats" not in describe(config(balance=Balance(max_repeats=100))).render()


def test_a_group_of_two_tables_is_one_line(config):
    lines = describe(config(balance=Balance(by=["emotion"], temperature=1))).render().splitlines()
    assert lines[1].split() == ["happy", "7", "0.70", "68.4%", "0.98"]


def test_filters_and_cut_windows_are_named(config):
    text = describe(config(emotions=["happy"], duration_sec=180)).render()
    assert "only emotions: happy" in text
    assert re.search(r"/esd: 3 of 9 windows left out by the filters", text)
    assert "7 training windows are cut at 180 s" in text


def test_the_base_model_is_not_needed_but_the_tables_agree_on_the_codec(config, folder, tmp_path):
    other = write_random_codes(tmp_path / "other", [RandomWindow("sad")], codec_sha256="f" * 64)
    with pytest.raises(UserError, match="of codec ffffffffffff"):
        describe(config(sources=[Source(str(folder / "esd")), Source(str(other))]))


@pytest.mark.parametrize("option", ["sources", "val_manifest_path", "replay"])
def test_a_manifest_that_is_not_encoded_is_named_with_the_command(config, option):
    value = {"sources": [Source("data/t.jsonl")], "replay": Replay("data/t.jsonl", 0.1)}.get(option, "data/t.jsonl")
    command = r"`hf-csm encode data/t.jsonl --out codes/t --base-model \S+ --duration-sec 10000`"
    with pytest.raises(UserError, match=rf"data/t.jsonl .*\nRun {command}"):
        describe(config(**{option: value}))


def test_a_manifest_that_is_encoded_is_described(config, folder, monkeypatch):
    monkeypatch.setattr(module, "manifest_table", lambda manifest, run_dir, duration_s: folder / "dialogues")
    text = describe(config(sources=[Source("data/t.jsonl")])).render()
    assert re.search(r"dialogues +unlabelled +5 ", text)


def test_only_the_largest_of_many_groups_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_GROUPS", 3)
    table = write(tmp_path / "many", {emotion: 0.1 * (i + 1) for i, emotion in enumerate(EMOTIONS)})
    description = describe(RunConfig(dataset=DatasetConfig(manifest_path=table)))
    lines = description.render().splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["many", "contempt"],
        ["many", "other"],
        ["8", "others"],
        ["all", "55"],
    ]
    assert sum(line.num_windows for line in description.shown()) == 55


def test_the_plot_of_four_corpora_with_ten_emotions_is_readable(tmp_path, monkeypatch):
    sources = [
        Source(str(write_random_codes(tmp_path / name, map(RandomWindow, EMOTIONS), num_codebooks=1)))
        for name in ("ravdess", "crema_d", "esd", "msp_podcast")
    ]
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    describe(RunConfig(dataset=DatasetConfig(sources=sources))).draw(tmp_path / "new" / "mixture.png")
    assert (tmp_path / "new" / "mixture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mixture.png"]
    (figure,) = figures
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == 40
    assert all(upper.y0 >= lower.y1 for upper, lower in zip(boxes, boxes[1:], strict=False))  # no label on another
    assert min(box.x0 for box in boxes) >= 0  # nor outside


def test_the_same_mixture_gives_the_same_plot(config, tmp_path):
    for name in ("a.png", "b.png"):
        describe(config()).draw(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
