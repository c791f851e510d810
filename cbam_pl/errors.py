"""What ends a command early: a mistake of the user's, or a signal."""

import signal


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
