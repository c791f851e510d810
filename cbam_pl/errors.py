"""What ends a command early: a mistake of the user's, or an interruption."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException


class UserError(Exception):
    """A mistake that the user can fix: one line that names the thing and the fix, and exit status 2."""


class Interrupted(Exception):
    """A command was stopped: by the signal `number`, or, where that is 0, by a limit or callback of the training.

    The exit status after a signal is 128 + number.
    """

    def __init__(self, reason: str, number: int = 0) -> None:
        super().__init__(reason)
        self.number = number


LESS_MEMORY = (
    "lower data.batch_size (and raise trainer.accumulate_grad_batches to keep the number of images per step), "
    "data.image_size or model.attention.kernel_size"
)


@contextmanager
def as_user_error(less_memory: str = LESS_MEMORY) -> Iterator[None]:
    """Turn an invalid argument, which a constructor rejects, and a lack of memory into a UserError.

    `less_memory` is the fix in the latter case.
    """
    try:
        yield
    except (ValueError, MisconfigurationException) as error:
        raise UserError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory; {less_memory}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the machine or of a GPU."""
    # torch.cuda.OutOfMemoryError is a RuntimeError. On the CPU there is no type for it: torch's allocator and oneDNN,
    # whose convolutions leave the reason out, raise a plain RuntimeError.
    words = (
        "out of memory|can't allocate memory|bad_alloc|could not (create|execute) a (primitive|memory)|"
        "(CUBLAS|CUDNN)_STATUS_\\w*ALLOC|unable to find an engine to execute this computation"
    )
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


def cannot_write(path: str | Path, error: OSError, fix: str) -> UserError:
    """The UserError for a file or folder that cannot be written: the system's reason, and the fix."""
    return UserError(f"cannot write {path} ({error.strerror}); {fix}")
