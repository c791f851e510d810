"""A command of a job: the ordinary `train.py fit` or `test`, which stops when its parent has ended."""

import os
import signal
import threading

from cbam_pl.cli import main


def _follow_parent() -> None:
    # The parent holds the other end of this pipe and never writes; it ends with the parent, however that ends.
    os.read(0, 1)  # not sys.stdin, whose lock would be held when this process ends
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_follow_parent, daemon=True).start()
    main()
