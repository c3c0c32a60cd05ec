import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from hf_csm.config_parser import parse_run_config
from hf_csm.errors import UserError
from hf_csm.models.moshi import MOSHI
from hf_csm.models.moshi.model import MoshiLM
from hf_csm.training import loop
from hf_csm.training.checkpoint import list_checkpoints
from hf_csm.training.loop import train
from hf_csm.training.metrics_log import read_metrics


def losses(run_dir, key="loss"):
    return {line["step"]: line[key] for line in read_metrics(run_dir / "metrics.jsonl") if key in line}


def adapter(checkpoint):
    return load_file(checkpoint / "adapter" / "adapter_model.safetensors")


def assert_same_weights(one, other, **tolerance):
    one, other = adapter(one), adapter(other)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, module_run_options):
    """A run of ten steps without interruption."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(parse_run_config(module_run_options(run_dir=run_dir)), MOSHI)
    return run_dir


def test_a_run_writes_the_documented_files(straight):
    assert {path.name for path in straight.iterdir()} == {
        "config.yaml",
        "corpora.json",
        "metrics.jsonl",
        "logs",
        "checkpoint_000005",
        "checkpoint_000010",
        "best",
    }
    for checkpoint in list_checkpoints(straight):
        assert {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()} == {
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
            "consolidated/config.json",
            "consolidated/lora.safetensors",
            "state/trainer.pt",
            "state/rng_00000.pt",
        }


def test_loss_falls_and_every_stream_is_logged(straight):
    lines = [line for line in read_metrics(straight / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert {"text_words", "text_padding", "codebook_0", "codebooks_rest", "tokens_per_s", "lr"} <= lines[0].keys()


def test_evaluation_compares_adapter_and_base(straight):
    lines = [line for line in read_metrics(straight / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 5, 10]
    assert lines[0]["eval_loss"] == lines[0]["eval_base_loss"]  # a fresh adapter is the identity
    assert lines[-1]["eval_base_loss"] == lines[0]["eval_base_loss"]
    assert lines[-1]["eval_loss"] < lines[-1]["eval_base_loss"]


def test_best_names_the_checkpoint_with_the_lowest_evaluation_loss(straight):
    by_step = losses(straight, "eval_loss")
    best = min((5, 10), key=by_step.__getitem__)
    assert (straight / "best").resolve().name == f"checkpoint_{best:06d}"


def test_the_written_configuration_gives_the_same_run(straight, run_config):
    config = parse_run_config(["--config", str(straight / "config.yaml")])
    assert config.lora.rank == 4
    assert config.run_dir == str(straight)


def test_resuming_continues_bit_for_bit(straight, run_config, tmp_path):
    config = run_config(resume_from_checkpoint=straight / "checkpoint_000005")
    last = train(config, MOSHI)
    expected = losses(straight)
    assert losses(tmp_path / "run") == {step: expected[step] for step in range(6, 11)}
    assert_same_weights(last, straight / "checkpoint_000010")


def test_dropout_is_on_and_resumes_bit_for_bit(straight, run_config, tmp_path):
    options = {"lora__dropout": 0.5, "training__max_steps": 4, "training__save_every": 2, "training__eval_every": 0}
    train(run_config(**options, run_dir=tmp_path / "dropout"), MOSHI)
    dropped = losses(tmp_path / "dropout")
    assert dropped[1] == losses(straight)[1]  # a fresh adapter adds nothing to drop from
    assert dropped[3] != losses(straight)[3]
    train(run_config(**options, resume_from_checkpoint=tmp_path / "dropout" / "checkpoint_000002"), MOSHI)
    assert losses(tmp_path / "run") == {step: dropped[step] for step in (3, 4)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_latest_goes_on(straight, run_config, tmp_path, monkeypatch, number):
    real, calls = loop.train_step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(SystemExit) as caught:
        train(run_config(), MOSHI)
    assert caught.value.code == 128 + number
    run_dir = tmp_path / "run"
    assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint_000003"]
    last = train(run_config(resume_from_checkpoint="latest"), MOSHI)
    assert losses(run_dir) == losses(straight)
    assert losses(run_dir, "eval_loss") == losses(straight, "eval_loss")
    assert_same_weights(last, straight / "checkpoint_000010")


def test_a_run_resumed_beyond_its_last_step_ends(straight, run_config):
    last = train(run_config(resume_from_checkpoint=straight / "checkpoint_000005", training__max_steps=3), MOSHI)
    assert last.name == "checkpoint_000005"


def test_a_branch_is_not_mixed_with_the_later_checkpoints_of_its_run(straight, run_config):
    config = run_config(run_dir=straight, resume_from_checkpoint=straight / "checkpoint_000005")
    with pytest.raises(UserError, match=r"checkpoint_000010.*checkpoint_000005.* earlier"):
        train(config, MOSHI)
    assert [path.name for path in list_checkpoints(straight)] == ["checkpoint_000005", "checkpoint_000010"]


def test_a_branch_has_a_best_of_its_own(straight, run_config, tmp_path):
    """The best of the run it comes from is not in its folder."""
    train(run_config(resume_from_checkpoint=straight / "checkpoint_000005"), MOSHI)
    assert (tmp_path / "run" / "best").resolve() == tmp_path / "run" / "checkpoint_000010"


def test_a_branch_that_gets_no_better_still_has_a_best(straight, run_config, tmp_path):
    options = {"optimizer__lr": 1.0, "training__max_steps": 7}
    train(run_config(resume_from_checkpoint=straight / "checkpoint_000005", **options), MOSHI)
    assert losses(tmp_path / "run", "eval_loss")[7] > losses(straight, "eval_loss")[5]
    assert (tmp_path / "run" / "best").resolve() == tmp_path / "run" / "checkpoint_000007"


def test_best_is_named_again_after_a_kill_before_it_was(run_config, tmp_path):
    options = {"training__max_steps": 2, "training__save_every": 1, "training__eval_every": 1}
    train(run_config(**options), MOSHI)
    best = tmp_path / "run" / "best"
    target = best.resolve()
    best.unlink()
    train(run_config(**options, resume_from_checkpoint="latest"), MOSHI)
    assert best.resolve() == target


def test_a_run_prints_its_training_data(run_config, capsys):
    train(run_config(training__max_steps=1, training__eval_every=0), MOSHI)
    shown = capsys.readouterr().out
    assert "ravdess       happy" in shown
    assert "weights are trained" in shown


def test_options_that_change_on_resume_are_warned_of(straight, run_config, caplog):
    config = run_config(
        resume_from_checkpoint=straight / "checkpoint_000005", optimizer__lr=0.001, training__max_steps=6
    )
    train(config, MOSHI)
    (message,) = [record.message for record in caplog.records if "differs" in record.message]
    assert "optimizer.lr 0.003 -> 0.001" in message
    assert "training.max_steps 10 -> 6" in message
    assert "lora" not in message


def test_gradients_are_clipped(run_config, tmp_path):
    """Adam does not mind the scale of gradients until they vanish beside its epsilon."""
    moved = {}
    for max_norm in (1.0, 1e-11):
        options = {"training__max_steps": 1, "training__eval_every": 0, "training__max_grad_norm": max_norm}
        last = train(run_config(run_dir=tmp_path / str(max_norm), **options), MOSHI)
        moved[max_norm] = max(weight.abs().max() for name, weight in adapter(last).items() if "lora_B" in name)
    assert moved[1e-11] < 0.1 * moved[1.0]


def test_latest_without_checkpoint_starts_afresh(run_config, tmp_path):
    train(run_config(resume_from_checkpoint="latest", training__max_steps=1), MOSHI)
    assert list(losses(tmp_path / "run")) == [1]


def test_a_fresh_run_does_not_write_over_another(straight, run_config):
    with pytest.raises(UserError, match="already holds 2 checkpoints"):
        train(run_config(run_dir=straight), MOSHI)


def test_a_checkpoint_of_another_rank_is_refused(straight, run_config):
    config = run_config(resume_from_checkpoint=straight / "checkpoint_000005", lora__rank=8)
    with pytest.raises(UserError, match=r"rank 4.*rank 8"):
        train(config, MOSHI)


def test_a_folder_that_is_no_checkpoint_is_refused(run_config, tmp_path):
    with pytest.raises(UserError, match="is not a checkpoint"):
        train(run_config(resume_from_checkpoint=tmp_path), MOSHI)


def test_a_damaged_checkpoint_is_named(straight, run_config, tmp_path):
    import shutil

    copy = shutil.copytree(straight / "checkpoint_000005", tmp_path / "checkpoint_000005")
    state = copy / "state" / "trainer.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        train(run_config(resume_from_checkpoint=copy), MOSHI)


def test_accumulated_micro_batches_equal_one_batch(straight, run_config, monkeypatch):
    """The same windows as one micro-batch of eight, or as eight of one, take the same steps."""
    traces, checkpoints = [], []
    for pieces in (1, 8):
        monkeypatch.setattr(loop, "MixtureLoader", fixed_batches(pieces))
        config = run_config(
            run_dir=straight.parent / f"pieces{pieces}",
            training__gradient_accumulation_steps=pieces,
            training__max_steps=4,
            training__eval_every=0,
        )
        checkpoints.append(train(config, MOSHI))
        traces.append(list(losses(straight.parent / f"pieces{pieces}").values()))
    assert traces[0] == pytest.approx(traces[1], rel=1e-5)
    # Adam divides by the size of the gradient: where that is near 0, rounding moves a weight visibly. lr is 3e-3.
    assert_same_weights(*checkpoints, rtol=1e-3, atol=2e-4)


def fixed_batches(pieces):
    """A loader of the same eight ragged windows in every step, cut in `pieces` micro-batches."""
    from hf_csm.mixture.collate import collate
    from hf_csm.mixture.loader import MixtureLoader

    class FixedLoader(MixtureLoader):
        def batches(self, start=0):
            windows = [self._window(row, row) for row in range(8)]
            size = 8 // pieces
            while True:
                for first in range(0, 8, size):
                    yield collate(windows[first : first + size], self.layout)

    return FixedLoader


def test_a_loss_that_is_not_finite_stops_before_the_step(run_config, tmp_path, monkeypatch):
    real = MoshiLM.forward
    calls = []

    def broken(self, codes):
        output = real(self, codes)
        calls.append(codes)
        if len(calls) == 3:
            output.nll[0, 1, 3] = math.nan
        return output

    monkeypatch.setattr(MoshiLM, "forward", broken)
    with pytest.raises(UserError, match="The loss is nan"):
        train(run_config(training__eval_every=0, training__save_every=1), MOSHI)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint_000001", "checkpoint_000002"]
    assert list(losses(tmp_path / "run")) == [1, 2]


def test_a_gradient_that_is_not_finite_stops_before_the_step(run_config, tmp_path, monkeypatch):
    real = MoshiLM.forward

    def broken(self, codes):
        output = real(self, codes)
        if output.nll.requires_grad:
            output.nll.register_hook(lambda gradient: gradient * math.inf)
        return output

    monkeypatch.setattr(MoshiLM, "forward", broken)
    with pytest.raises(UserError, match="The gradient norm is"):
        train(run_config(training__eval_every=0), MOSHI)
    assert not list_checkpoints(tmp_path / "run")


def test_a_validation_split_without_windows_is_refused(run_config, codes, tmp_path):
    import shutil

    from tests.doubles.codes import restate_sizes

    copy = shutil.copytree(codes, tmp_path / "codes")
    shutil.rmtree(copy / "data" / "validation")
    restate_sizes(copy)
    with pytest.raises(UserError, match="validation split has no windows"):
        train(run_config(dataset__manifest_path=copy), MOSHI)
    train(run_config(dataset__manifest_path=copy, training__eval_every=0, training__max_steps=1), MOSHI)


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "4 steps"), ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8")],
)
def test_accelerate_settings_that_change_the_training_are_refused(run_config, monkeypatch, variable, value, named):
    from accelerate.state import AcceleratorState, PartialState

    monkeypatch.setenv(variable, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises((UserError, ValueError), match=named):
            train(run_config(), MOSHI)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        assert PartialState._shared_state == {}


def test_only_the_newest_checkpoints_and_the_best_are_kept(run_config, tmp_path):
    train(
        run_config(
            training__max_steps=5, training__save_every=1, training__keep_checkpoints=2, training__eval_every=0
        ),
        MOSHI,
    )
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint_000004", "checkpoint_000005"]


def test_gradient_checkpointing_changes_nothing(straight, run_config, tmp_path):
    train(
        run_config(advanced__gradient_checkpointing="true", training__max_steps=10, training__eval_every=0),
        MOSHI,
    )
    ours, theirs = losses(tmp_path / "run"), losses(straight)
    assert [ours[step] for step in range(1, 11)] == pytest.approx([theirs[step] for step in range(1, 11)], rel=1e-5)


def test_trackers_get_the_metrics(run_config, tmp_path):
    train(run_config(training__trackers="[tensorboard]", training__max_steps=1), MOSHI)
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))


def test_a_tracker_that_is_not_installed_is_named(run_config):
    with pytest.raises(UserError, match=r"training.trackers needs wandb\.\n.*'hf-csm\[wandb\]'"):
        train(run_config(training__trackers="[wandb]"), MOSHI)
