import pytest
import torch

from hf_csm.config import OptimizerConfig, SchedulerConfig
from hf_csm.training.optim import build_optimizer, learning_rate, set_learning_rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (9, 0.5), (14, 0.0), (99, 0.0)],
)
def test_warm_up_then_half_a_cosine(step, expected):
    config = SchedulerConfig(num_warmup_steps=4)
    assert learning_rate(step, max_steps=14, peak=1.0, config=config) == pytest.approx(expected)


def test_the_floor_is_a_share_of_the_peak():
    config = SchedulerConfig(num_warmup_steps=0, min_lr_ratio=0.1)
    assert learning_rate(10, max_steps=10, peak=2.0, config=config) == pytest.approx(0.2)


def test_the_first_step_already_learns():
    assert learning_rate(0, max_steps=10, peak=1.0, config=SchedulerConfig(num_warmup_steps=100)) > 0


def test_the_optimizer_takes_its_options():
    config = OptimizerConfig(lr=0.5, weight_decay=0.2, betas=(0.7, 0.8))
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], config)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.2, (0.7, 0.8))
    set_learning_rate(optimizer, 0.1)
    assert group["lr"] == 0.1
