"""What Lightning's callbacks lack: checkpoints that can move and that interruptions leave, and a quiet bar."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from rich.console import Console
from torch import Tensor, cat, tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from cbam_pl.errors import Interrupted
from cbam_pl.training.classifier import Classifier
from cbam_pl.training.losses import StepLosses


class RunCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that still knows its best after the run's folder was moved or copied.

    Lightning forgets the best so far when the folder's path has changed; a worse epoch would then replace best.ckpt.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; the best only in an epoch that was validated, since val/acc is else that of an earlier validation."""
        if self.monitor is None or not isinstance(pl_module, Classifier) or pl_module.validated:
            super().on_train_epoch_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, with the paths that its files have now; files that are gone are forgotten."""

        def here(path: str) -> str:
            return str(Path(self.dirpath or ".") / Path(path).name) if path else path

        moved = {name: here(state_dict[name]) for name in state_dict if name.endswith("_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items() if Path(here(path)).is_file()}
        if not best:
            moved |= {"best_model_path": "", "kth_best_model_path": ""}
            state_dict = {**state_dict, "best_model_score": None, "kth_value": self.kth_value, "current_score": None}
        super().load_state_dict({**state_dict, **moved, "best_k_models": best, "dirpath": self.dirpath})
        self.current_score = state_dict["current_score"]  # Lightning leaves it out


class InterruptCheckpoint(Callback):
    """Write last.ckpt in the middle of an epoch: every few minutes, and when the training is to stop there.

    It is to stop on SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (which SLURM sends before the time is up), and where max_steps
    or max_time are used up; `Interrupted` is raised then. Lightning would take the epoch for a complete one, or leave
    no checkpoint. `last` is the callback that writes last.ckpt; with None, nothing is saved.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    AGREE_EVERY = 10  # batches, after which processes agree whether to stop

    def __init__(self, last: RunCheckpoint | None, minutes: float) -> None:
        self._last = last
        self._seconds = 60 * minutes
        self._saved_at = 0.0
        self._received: int | None = None
        self._last_step = 0
        self._asked = False  # to stop, while a step was accumulating
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle the signals; only now, as Lightning set its own handlers when it began."""
        self._saved_at = time.monotonic()
        self._last_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        if self._received is None:  # a second one changes nothing: the state is being saved already
            self._received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time, between two optimizer steps."""
        # A checkpoint does not hold the gradients of a step that is still accumulating. Before its end, Lightning is
        # not to see a request to stop: it would take the epoch for a complete one.
        asked, stepped = self._asked or trainer.should_stop, trainer.global_step > self._last_step
        self._asked, trainer.should_stop = asked and not stepped, asked and stepped
        if not stepped:
            return
        self._last_step = trainer.global_step
        if trainer.is_last_batch:
            return  # validation and the ordinary checkpoint follow
        budget = ""  # the setting that ends the training at this step
        if 0 <= trainer.max_steps <= trainer.global_step:
            budget = "trainer.max_steps"
        elif trainer.should_stop and trainer.global_step >= (trainer.min_steps or 0):
            budget = "trainer.max_time or a callback" if trainer.current_epoch >= (trainer.min_epochs or 0) else ""
        stop, due = self._received is not None, time.monotonic() - self._saved_at > self._seconds
        if trainer.world_size > 1:
            # Of the batches, only those that end a step come here.
            agree = (batch_idx + 1) % self.AGREE_EVERY < trainer.accumulate_grad_batches
            stop = agree and trainer.strategy.reduce_boolean_decision(stop, all=False)
            due = agree and trainer.strategy.reduce_boolean_decision(due, all=False)
        if self._last is not None and (stop or due or budget):
            trainer.save_checkpoint(self._last.format_checkpoint_name({}))
            self._saved_at = time.monotonic()
        if stop or budget:
            raise self._interrupted(trainer, budget if not stop else "")

    def _interrupted(self, trainer: Trainer, budget: str = "") -> Interrupted:
        place = f"in epoch {trainer.current_epoch + 1} after step {trainer.global_step}"
        if budget:
            return Interrupted(f"stopped by {budget} {place}")
        number = self._received or signal.SIGTERM
        return Interrupted(f"stopped by {signal.Signals(number).name} {place}", number)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch's own checkpoint is about to be written."""
        self._saved_at = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs, too; an epoch may be a single batch, or too few for the processes to agree."""
        ended = isinstance(pl_module, Classifier) and pl_module.epoch_ended
        if ended and trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            raise self._interrupted(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the handlers; not in `teardown`, which comes after Lightning has restored its own."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the handlers."""
        self.on_train_end(trainer, pl_module)


class EvaluationInterrupt(Callback):
    """Ends validation, test and prediction at SIGTERM, which Lightning only notes while they run."""

    def _end_at_sigterm(self, trainer: Trainer, *_: Any) -> None:
        if trainer.received_sigterm:
            raise Interrupted("stopped by SIGTERM", signal.SIGTERM)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _end_at_sigterm  # type: ignore[assignment]


class EvaluatedImages(Callback):
    """What the network said of each image in the last `validate` or `test`, of all processes, in the data's order."""

    def __init__(self) -> None:
        self.numbers = self.labels = self.logits = tensor([])  # (N,), (N,) and (N, classes) float32, on the CPU
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def _add(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        loader: Any = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        numbers = loader.indices()[batch_idx].to(outputs.device)
        self._batches.append((numbers, batch[1], outputs.float()))

    def _gather(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parts = [cat(part) for part in zip(*self._batches, strict=True)]
        self._batches = []
        if trainer.world_size > 1:
            parts = [cat(gather_all_tensors(part)) for part in parts]
        order = parts[0].argsort()
        self.numbers, self.labels, self.logits = (part[order].cpu() for part in parts)

    on_validation_batch_end = on_test_batch_end = _add  # type: ignore[assignment]
    on_validation_epoch_end = on_test_epoch_end = _gather


class TrainingProgress(RichProgressBar):
    """Lightning's bar with figures that were fetched from the device already, and a line for each finished epoch.

    Lightning's own fetches every metric at every step. Where standard error is not a terminal, only lines are printed.
    """

    def __init__(self, losses: StepLosses | None = None) -> None:
        # Each drawing takes the interpreter 2 ms, of which training gets nothing.
        super().__init__(refresh_rate=2, console_kwargs={"stderr": True})
        self._losses = losses
        self._own_console = Console(stderr=True)
        self._started = 0.0
        self._finished: tuple[int, float] | None = None  # epoch from 1, seconds
        if not self._own_console.is_terminal:
            self.disable()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict]:
        """Loss and images/s of the last batches, accuracy since the epoch began."""
        if self._losses is None or not self._losses.figures:
            return {}
        forms = {"loss": ".3f", "acc": ".3f", "images/s": ",.0f"}
        return {name: format(value, forms[name]) for name, value in self._losses.figures.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain the lines, and begin the bar."""
        super().on_train_start(trainer, pl_module)
        self._started = time.monotonic()  # Lightning does not announce an epoch that was interrupted and goes on
        self._print(trainer, "figures of an epoch: mean loss, accuracy", style="dim")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last epoch, whose figures are complete only now, and begin the bar."""
        self._print_epoch(trainer)
        self._started = time.monotonic()
        super().on_train_epoch_start(trainer, pl_module)
        if self.progress is not None and self.train_progress_bar_id is not None:  # Lightning counts epochs from 0
            name = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self.progress.update(self.train_progress_bar_id, description=name)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how long training and validation took."""
        super().on_train_epoch_end(trainer, pl_module)
        self._finished = (trainer.current_epoch + 1, time.monotonic() - self._started)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last epoch."""
        self._print_epoch(trainer)
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print the last epoch, and give the terminal back."""
        if isinstance(exception, Interrupted):
            self._print_epoch(trainer)
        super().on_exception(trainer, pl_module, exception)

    def _print_epoch(self, trainer: Trainer) -> None:
        if self._finished is None:
            return
        (epoch, seconds), self._finished = self._finished, None
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        line = f"epoch {epoch:3}/{trainer.max_epochs}  train {measured['train/loss']:.4f} {measured['train/acc']:.4f}"
        if isinstance(trainer.lightning_module, Classifier) and trainer.lightning_module.validated:
            line += f"  val {measured['val/loss']:.4f} {measured['val/acc']:.4f}"
        self._print(trainer, f"{line}  lr {measured['lr']:.2g}  {seconds:.1f} s")

    def _print(self, trainer: Trainer, line: str, style: str | None = None) -> None:
        if trainer.is_global_zero:
            console = self._own_console if self.progress is None else self.progress.console
            console.print(line, style=style, highlight=False)
