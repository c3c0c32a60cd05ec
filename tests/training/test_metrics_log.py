import json

from accelerate import Accelerator

from hf_csm.training.metrics_log import MetricsLog, read_metrics


def test_lines_have_a_step_and_their_values(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", Accelerator(cpu=True), resumed_step=None)
    log.write(1, {"loss": 2.5})
    log.write(2, {"eval_loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5}, {"step": 2, "eval_loss": 2.0}]


def test_resuming_drops_lines_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    MetricsLog(path, Accelerator(cpu=True), resumed_step=2).write(3, {"loss": 9})
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 3), (2, 2), (3, 9)]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 3}]
