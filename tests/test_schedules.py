import math
from functools import partial

import pytest
import torch

from cbam_pl.schedules import PiecewiseConstantLR, WarmupCosineLR


def rates(schedule, steps, lr=0.1):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = schedule(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_piecewise_rates_hold_from_their_epochs_on():
    seen = rates(partial(PiecewiseConstantLR, rates={60: 0.02, 120: 0.004}), 130)
    assert seen == pytest.approx([0.1] * 60 + [0.02] * 60 + [0.004] * 10)


def test_piecewise_resumes_where_it_was():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    first = PiecewiseConstantLR(optimizer, {2: 0.01, 5: 0.001})
    for _ in range(3):
        optimizer.step()
        first.step()
    resumed = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    second = PiecewiseConstantLR(resumed, {2: 0.01, 5: 0.001})
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    seen = []
    for _ in range(4):
        seen.append(resumed.param_groups[0]["lr"])
        resumed.step()
        second.step()
    assert seen == pytest.approx([0.01, 0.01, 0.001, 0.001])


def test_cosine_rises_and_falls_to_zero():
    seen = rates(partial(WarmupCosineLR, warmup=0.2, total_steps=10), 11)
    rise = [0.1 / 3, 0.2 / 3]
    fall = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]
    assert seen == pytest.approx(rise + fall)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (partial(PiecewiseConstantLR, rates={0: 0.1}), "epochs of at least 1"),
        (partial(PiecewiseConstantLR, rates={1: -0.1}), "rates of at least 0"),
        (partial(WarmupCosineLR, warmup=1.0, total_steps=10), "warmup=1.0 must be"),
        (partial(WarmupCosineLR), "total_steps=None must be at least 1"),
    ],
)
def test_bad_schedules_are_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        rates(schedule, 1)
