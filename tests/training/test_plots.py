from hf_csm.training.plots import plot_losses


def test_the_losses_of_a_run_are_drawn_as_png(tmp_path):
    metrics = [
        {"step": 0, "eval_loss": 3.0, "eval_base_loss": 3.0},
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 2.0},
    ]
    plot_losses(metrics, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
