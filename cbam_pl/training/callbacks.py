"""What Lightning's callbacks lack: checkpoints that can move and that signals leave, and a bar that never waits."""

import signal
import threading
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cbam_pl.errors import Interrupted
from cbam_pl.training.classifier import Classifier


class RunCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that still knows its best after the run's folder was moved or copied.

    Lightning forgets the best so far when the folder's path has changed; a worse epoch would then replace best.ckpt.
    """

    # Lightning asks for it at every hook of every step, and puts it together anew each time.
    state_key = cached_property(ModelCheckpoint.state_key.fget)  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state, with the paths that its files have now."""

        def here(path: str) -> str:
            return str(Path(self.dirpath or ".") / Path(path).name) if path else path

        moved = {name: here(state_dict[name]) for name in state_dict if name.endswith("_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": best, "dirpath": self.dirpath})
        self.current_score = state_dict["current_score"]  # Lightning leaves it out


class Safeguard(Callback):
    """Write last.ckpt in the middle of an epoch: every few minutes, and when a signal asks the process to stop.

    SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (which SLURM sends before the time is up) end the training at the next
    optimizer step; Lightning ends it without a checkpoint.

    Args:
        last: the callback that writes last.ckpt.
        minutes: longest time between two writes.

    Raises:
        Interrupted: after the state was saved on a signal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    # Processes must agree to stop, which they are asked at every step of this many.
    AGREE_EVERY = 10

    def __init__(self, last: RunCheckpoint, minutes: float) -> None:
        self._last = last
        self._seconds = 60 * minutes
        self._saved_at = 0.0
        self._received: int | None = None
        self._epoch_ended = False
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals; only now, as Lightning took them when it began."""
        self._saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        if self._received is None:  # a second one changes nothing: the state is being saved already
            self._received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time, between two optimizer steps."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return  # a checkpoint does not hold half a step's gradients
        stop, due = self._received is not None, time.monotonic() - self._saved_at > self._seconds
        if trainer.world_size > 1:
            if (batch_idx + 1) % self.AGREE_EVERY:
                return
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
        # The last batch of an epoch is followed by validation and the ordinary checkpoint.
        if (stop or due) and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            trainer.save_checkpoint(self._last.format_checkpoint_name({}))
            self._saved_at = time.monotonic()
            if stop:
                number = self._received or signal.SIGTERM
                raise Interrupted(number, trainer.current_epoch + 1, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch's own checkpoint is about to be written."""
        self._saved_at = time.monotonic()
        self._epoch_ended = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs, too; an epoch may be a single batch, or too few for the processes to agree."""
        if self._epoch_ended and trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            raise Interrupted(self._received or signal.SIGTERM, trainer.current_epoch + 1, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back; not in `teardown`, which comes after Lightning has given its own back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self.on_train_end(trainer, pl_module)


class TrainingProgress(ProgressBar):
    """A bar with loss, accuracy and images/s of the last steps, and a line for each finished epoch.

    Lightning's RichProgressBar fetches every metric from the device at every step; this one shows the figures that
    the classifier has fetched already.
    """

    _SECONDS_PER_MOVE = 0.5

    def __init__(self) -> None:
        super().__init__()
        self._moved = 0.0
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._enabled = True
        self._epoch_started = 0.0
        self._finished_epoch: tuple[int, float] | None = None  # number from 1, seconds

    def disable(self) -> None:
        """Show nothing; Lightning calls it on every process but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def _begin(self, description: str, total: int | float) -> None:
        if not self._enabled:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
                refresh_per_second=2,  # each drawing takes the interpreter 2 ms, of which training gets nothing
                transient=True,
                expand=True,
            )
            self._progress.start()
        if self._task is not None:
            self._progress.remove_task(self._task)
        known = None if total == float("inf") else total
        self._task = self._progress.add_task(description, total=known, figures="")

    def _update(self, completed: int, figures: str = "") -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=completed, figures=figures)

    def _end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress, self._task = None, None

    def _print_finished_epoch(self, trainer: Trainer) -> None:
        if self._finished_epoch is None or not self._enabled:
            return
        epoch, seconds = self._finished_epoch
        self._finished_epoch = None
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if "train/loss" not in measured:
            return  # the epoch ended with an error
        line = f"epoch {epoch:3}/{trainer.max_epochs}  train {measured['train/loss']:.4f} {measured['train/acc']:.4f}"
        if "val/loss" in measured:
            line += f"  val {measured['val/loss']:.4f} {measured['val/acc']:.4f}"
        self._console.print(f"{line}  lr {measured['lr']:.2g}  {seconds:.1f} s", highlight=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the figures of the lines are, and begin the bar."""
        if self._enabled:
            self._console.print("figures of an epoch: mean loss, accuracy", style="dim")
        self._begin_epoch(trainer)  # which Lightning does not announce where an epoch was broken off and goes on

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last epoch, whose figures are complete only now, and begin the bar."""
        self._print_finished_epoch(trainer)
        self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: Trainer) -> None:
        self._epoch_started = time.monotonic()
        self._begin(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", self.total_train_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, a few times a second."""
        now = time.monotonic()
        if now - self._moved < self._SECONDS_PER_MOVE and batch_idx + 1 < self.total_train_batches:
            return
        self._moved = now
        figures = ""
        if isinstance(pl_module, Classifier) and pl_module.recent:
            recent = pl_module.recent
            figures = f"loss {recent['loss']:.3f}  acc {recent['acc']:.3f}  {recent['images/s']:,.0f} images/s"
        self._update(batch_idx + 1, figures)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how long training and validation took."""
        self._finished_epoch = (trainer.current_epoch + 1, time.monotonic() - self._epoch_started)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last epoch."""
        self._end()
        self._print_finished_epoch(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a bar."""
        self._begin("validating", sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar."""
        self._update(batch_idx + 1)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a bar."""
        self._begin("testing", sum(trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar."""
        self._update(batch_idx + 1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._end()
        self._print_finished_epoch(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._end()
