"""Optimizers and schedules: which of them can train, how they begin, and their settings as plain values."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from cbam_pl.errors import UserError


def describe_factory(name: str, factory: Callable[..., Any] | None) -> dict[str, Any]:
    """What makes an optimizer or schedule, with its arguments, such as "Adam" for `name` and 0.001 for `name`.lr."""
    made, options = factory, {}
    if isinstance(factory, partial):
        # jsonargparse puts functions of its own before the class.
        made = [one for one in (factory.func, *factory.args) if callable(one)][-1]
        options = factory.keywords
    with suppress(TypeError, ValueError):  # None, or what has no signature
        known = signature(made).parameters.values()  # type: ignore[arg-type]
        options = {one.name: one.default for one in known if one.default is not one.empty} | options
    described = {f"{name}.{key}": _as_plain(one) for key, one in plain_numbers(options).items()}
    return {name: getattr(made, "__name__", None)} | described


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Reject what cannot train images, or not as it is logged, with a ValueError."""
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ValueError("SparseAdam needs sparse gradients, which images do not give; use Adam")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS computes each batch up to 20 times, and would count its images and move batch norm's statistics as "
            "often; use SGD or Adam"
        )
    if optimizer.defaults.get("differentiable"):
        raise ValueError("differentiable=true is for gradients of the steps themselves; leave it out")
    for rate in (group["lr"] for group in optimizer.param_groups):
        if isinstance(rate, Tensor):  # all groups would share it
            raise ValueError(f"lr={rate} must be a number, not a tensor")
        if not math.isfinite(rate):
            raise ValueError(f"lr={rate} must be finite")


def zero_fused_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Begin the momentum of a fused SGD at zero, where gradients are scaled.

    By itself torch 2.14 allocates it in the first step, which, if a gradient overflows, leaves it uninitialised.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else []:
        if not (group["fused"] and group["momentum"]):
            continue
        if group["dampening"]:  # which the first step is to be without
            raise UserError(
                "model.optimizer: fused=true does not work with dampening in 16-mixed precision; add "
                "--model.optimizer.init_args.fused false"
            )
        for parameter in group["params"]:
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def with_factors(make: partial[Any], factors: Sequence[float]) -> partial[Any]:
    """A schedule with the rates that it is given, which replace the optimizer's, times each group's factor."""
    if eta_min := make.keywords.get("eta_min"):  # one number, to which the rates of all groups fall
        raise ValueError(f"the schedule cannot keep model.lr_factors with eta_min={eta_min}; leave it out")
    given = {name: make.keywords.get(name) for name in ("max_lr", "base_lr", "min_lr", "swa_lr")}
    one_rate = {name: rate for name, rate in given.items() if rate is not None and not isinstance(rate, list)}
    return partial(make, **{name: [rate * factor for factor in factors] for name, rate in one_rate.items()})


def check_schedule(scheduler: Any, optimizer: torch.optim.Optimizer, training_steps: Callable[[], int]) -> None:
    """Reject a schedule that cannot be saved, ends too soon, or ascends the gradient.

    Raises:
        ValueError: with the reason.
        ZeroDivisionError: a phase of a one-cycle has no two steps, which its last step would divide by.
    """
    try:
        state = scheduler.state_dict()
    except AttributeError as error:
        raise ValueError("it has a built-in function, which cannot be saved; wrap it in one of yours") from error
    if isinstance(scheduler, OneCycleLR):
        if scheduler.total_steps < (steps := training_steps()):
            raise ValueError(f"total_steps={scheduler.total_steps} is less than the training's {steps}; leave it out")
        ends = [phase["end_step"] for phase in state["_schedule_phases"]]
        if len({*ends}) < len(ends):
            raise ZeroDivisionError
    if any(group["lr"] < 0 for group in optimizer.param_groups):
        raise ValueError("its rate is below 0; set its rates to 0 or more")


def check_factors(optimizer: torch.optim.Optimizer) -> None:
    """Reject a schedule that begins with other rates than one rate times each group's factor, with a ValueError."""
    starts = [group.get("initial_lr", group["lr"]) / group["lr_factor"] for group in optimizer.param_groups]
    if not all(math.isclose(start, starts[0]) for start in starts):
        raise ValueError("made by a function, it does not keep model.lr_factors; name a class")


def plain_numbers(value: Any) -> Any:
    """A setting with Python's own numbers, also inside it, since a checkpoint with NumPy's could not be read again."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain_numbers, value))
    if isinstance(value, dict):
        return {key: plain_numbers(one) for key, one in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _as_plain(value: Any) -> Any:
    """A setting as a checkpoint may hold it: functions and other objects, also inside lists, by their names."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_as_plain, value))
    if isinstance(value, dict):
        return {key: _as_plain(one) for key, one in value.items()}
    is_plain = value is None or type(value) in (bool, int, float, str)
    return value if is_plain else getattr(value, "__qualname__", type(value).__name__)
