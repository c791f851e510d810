"""Learning-rate schedules that torch.optim.lr_scheduler lacks in a form that YAML can name."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class PiecewiseConstantLR(LambdaLR):
    """The optimizer's own rate, then the given rates from the given epochs on, or steps with `model.lr_interval` step.

    Args:
        optimizer: the optimizer whose rate is set.
        rates: epochs done → the learning rate from then on, such as {60: 0.02, 120: 0.004}.
        last_epoch: epochs done already; −1 at the start.

    Raises:
        ValueError: an epoch below 1, or a rate below 0.
    """

    def __init__(self, optimizer: Optimizer, rates: dict[int, float], last_epoch: int = -1) -> None:
        for epoch, rate in rates.items():
            if epoch < 1 or rate < 0:
                raise ValueError(f"rates={rates} must map epochs of at least 1 to rates of at least 0")
        steps = sorted(rates.items())
        initial = optimizer.defaults["lr"]

        def factor(epoch: int) -> float:
            passed = [rate for start, rate in steps if start <= epoch]
            return passed[-1] / initial if passed else 1.0

        super().__init__(optimizer, factor, last_epoch)


class WarmupCosineLR(LambdaLR):
    """A linear rise to the optimizer's own rate, then half a cosine down to zero.

    Source: Loshchilov, Hutter, "SGDR", ICLR 2017, arXiv:1608.03983, equation 5, one cycle, after a linear warm-up.

    Args:
        optimizer: the optimizer whose rate is set.
        warmup: fraction of the steps that the rise takes, from 0 to below 1.
        total_steps: steps of the whole training, in the unit of `model.lr_interval`; None: filled in by the trainer.
        last_epoch: steps done already; −1 at the start.

    Raises:
        ValueError: warmup outside [0, 1), or no total_steps.
    """

    def __init__(
        self, optimizer: Optimizer, warmup: float = 0.05, total_steps: int | None = None, last_epoch: int = -1
    ) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup} must be at least 0 and below 1")
        if total_steps is None or total_steps < 1:
            raise ValueError(f"total_steps={total_steps} must be at least 1")
        rise = round(warmup * total_steps)

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / (rise + 1)
            progress = (step - rise) / max(1, total_steps - rise)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        super().__init__(optimizer, factor, last_epoch)
