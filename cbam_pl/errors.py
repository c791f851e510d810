"""What ends a command early: a mistake of the user's, or a signal."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can mend; the command line turns it into one line and exit status 2.

    Its message is one line that names the thing and the mend.
    """


class Interrupted(Exception):
    """A signal stopped the training, after its state was saved.

    Args:
        number: the signal's number; the exit status is 128 more.
        epoch: the epoch that was broken off, from 1.
        step: optimizer steps done.
    """

    def __init__(self, number: int, epoch: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} in epoch {epoch} after step {step}")
        self.number = number


@contextmanager
def refusals_are_mendable() -> Iterator[None]:
    """Turn what a constructor refuses into a UserError; its message names the parameter, its value and the rule."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (ValueError, MisconfigurationException) as error:
        raise UserError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "this network does not fit into memory; check model.attention.kernel_size and data.image_size"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the machine or of a GPU."""
    # torch.cuda.OutOfMemoryError is a RuntimeError; the CPU's allocator raises a plain one, and so does oneDNN, whose
    # convolutions leave the reason out: what else they would refuse, torch never asks of them.
    words = "out of memory|can't allocate memory|bad_alloc|could not (create|execute) a (primitive|memory)"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))
