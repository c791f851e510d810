"""Lightning's Trainer with the run's logger, checkpoints and progress bar, and its errors in one line."""

import errno
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from cbam_pl.errors import LESS_MEMORY, Interrupted, UserError, as_user_error
from cbam_pl.training.callbacks import (
    EvaluationInterrupt,
    InterruptCheckpoint,
    RunCheckpoint,
    TrainingProgress,
)
from cbam_pl.training.checkpoint import AtomicCheckpointIO
from cbam_pl.training.logger import RunLogger
from cbam_pl.training.losses import StepLosses
from cbam_pl.training.run import Run, disk_error
from cbam_pl.training.state import TrainingState

# Callbacks that need attributes which the network does not have, or change what a run records; and what to do instead.
_INSTEAD = {
    LearningRateFinder: "give model.optimizer.lr instead",
    BatchSizeFinder: "give data.batch_size instead",
    BackboneFinetuning: "give model.freeze and model.lr_factors instead",
    GradientAccumulationScheduler: "give trainer.accumulate_grad_batches instead",
    # From whose file Lightning would resume the next training, without a word.
    OnExceptionCheckpoint: "leave it out: last.ckpt is written anyway",
}
METRICS = ("val/loss", "val/acc", "train/loss", "train/acc", "lr")


def check_settings(settings: Namespace) -> None:
    """Reject settings with which nothing is trained, or figures are not those of the weights that are saved."""
    interval = settings.val_check_interval
    if interval not in (None, 1.0) or isinstance(interval, int):
        raise UserError(
            f"trainer.val_check_interval={interval} must be 1.0: figures and checkpoints are those of whole "
            "epochs; make epochs shorter with trainer.limit_train_batches, or validate less often with "
            "trainer.check_val_every_n_epoch"
        )
    if 0 in (settings.max_epochs, settings.max_steps, settings.limit_train_batches):
        raise UserError("trainer.max_epochs, max_steps and limit_train_batches must not be 0: nothing would be trained")
    if any(word in str(settings.strategy) for word in ("spawn", "fork", "notebook")):
        raise UserError(f"trainer.strategy={settings.strategy} does not work here; use ddp")
    if settings.barebones:
        raise UserError("trainer.barebones=true leaves no checkpoint and no figures; leave it out")
    for name, default, fix in (
        ("limit_test_batches", None, "give it to test"),
        ("limit_predict_batches", None, "leave it out"),
        ("use_distributed_sampler", True, "leave it out, since each process gets images of its own"),
    ):
        if settings[name] != default:
            raise UserError(f"trainer.{name}={settings[name]} has no effect on a training; {fix}")


def training_trainer(
    settings: Namespace, run: Run | None, resumed: dict[str, Any] | None, minutes: float, own: list[Callback]
) -> Trainer:
    """The Trainer of `fit`: for a run (None where nothing is written), resumed from a checkpoint that was read.

    `minutes` is the longest time between two checkpoints; the command's `own` callbacks come first.

    Raises:
        UserError: a setting that Lightning rejects, or that would give wrong figures.
    """
    options = dict(**settings)
    check_settings(settings)
    users = _users_callbacks(settings)
    _check_monitors(settings, users)
    losses = StepLosses()
    callbacks = [*own, *users, losses, TrainingState(resumed)]
    if options["max_time"] is not None:
        try:
            callbacks.append(Timer(options["max_time"]))  # before InterruptCheckpoint, which acts on it
        except (MisconfigurationException, TypeError) as error:
            raise UserError(f"trainer.max_time={options['max_time']} must be DD:HH:MM:SS, as 00:12:00:00") from error
        options["max_time"] = None
    if options["enable_checkpointing"] is False:
        callbacks.append(InterruptCheckpoint(None, minutes))
    else:
        folder = None if run is None else run.checkpoints  # the first process's folder is everyone's
        checkpoint = partial(RunCheckpoint, folder, save_on_train_epoch_end=True, enable_version_counter=False)
        # In this order last.ckpt knows of the best.
        last = checkpoint(filename="last")
        best = checkpoint(filename="best", monitor="val/acc", mode="max")
        callbacks += [InterruptCheckpoint(None if settings.fast_dev_run else last, minutes), best, last]
    # Not none, which callbacks that log reject: in a dry run, and in processes that write nothing.
    logger = DummyLogger() if run is None else RunLogger(run.logs, resumed=resumed)
    return _trainer(options, callbacks, TrainingProgress(losses), logger)


def _check_monitors(settings: Namespace, callbacks: list[Callback]) -> None:
    """Reject what callbacks monitor where it is not logged, or only after they act."""
    logged = [name for name in METRICS if settings.limit_val_batches != 0 or not name.startswith("val/")]
    known = (EarlyStopping, ModelCheckpoint)
    logs_more = any(not isinstance(callback, known) for callback in callbacks)
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and str(settings.precision) in ("16-true", "bf16-true", "64-true"):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} does not work with trainer.precision="
                f"{settings.precision}, which would round its averages; use bf16-mixed or 32-true"
            )
        if not isinstance(callback, known) or callback.monitor is None:
            continue
        names = [*logged, "epoch", "step"] if isinstance(callback, ModelCheckpoint) else logged  # which Lightning adds
        if callback.monitor not in names:
            # Another callback may log what it likes, but hardly what differs from ours by a sign alone.
            if not logs_more or str(callback.monitor).replace("_", "/") in METRICS:
                raise UserError(
                    f"trainer.callbacks: monitor={callback.monitor} is not logged; use one of {', '.join(names)}"
                )
        elif settings.check_val_every_n_epoch != 1 and callback.monitor in ("train/loss", "train/acc", "lr"):
            raise UserError(
                f"trainer.callbacks: monitor={callback.monitor} would be that of the epoch before, with "
                f"trainer.check_val_every_n_epoch={settings.check_val_every_n_epoch}; monitor a validation figure"
            )


def evaluating_trainer(settings: Namespace, logger: RunLogger | None = None, own: Sequence[Callback] = ()) -> Trainer:
    """The Trainer of `test`, `validate` and `predict`, with the same settings and errors; figures go to `logger`.

    The command's `own` callbacks come first.
    """
    options = {**dict(**settings), "enable_checkpointing": False}
    return _trainer(options, [*own, *_users_callbacks(settings), EvaluationInterrupt()], TrainingProgress(), logger)


def _trainer(
    options: dict[str, Any], callbacks: list[Callback], bar: TrainingProgress, logger: Logger | None
) -> Trainer:
    """Lightning's Trainer; with plain numbers, as the parser's own types cannot be in a checkpoint."""
    numbers = (PositiveInt, NonNegativeInt, NonNegativeFloat)
    options = {name: value.real if isinstance(value, numbers) else value for name, value in options.items()}
    if options["logger"] in (None, True):
        options["logger"] = logger or False
    options["callbacks"] = callbacks if options["enable_progress_bar"] is False else [*callbacks, bar]
    options["plugins"] = [*listed(options["plugins"]), AtomicCheckpointIO()]
    try:
        with as_user_error():
            if SLURMEnvironment.detect():
                _keep_out_slurms_requeueing(options)
            return Trainer(**options)
    except (ImportError, RuntimeError, TypeError) as error:
        raise UserError(f"the trainer's settings conflict with each other or with this machine: {error}") from error


def _keep_out_slurms_requeueing(options: dict[str, Any]) -> None:
    """Lightning's own way on SLURM: at SIGUSR1 it saves hpc_ckpt_N.ckpt, from which all later commands would start."""
    if found := sorted(Path(options["default_root_dir"]).glob("hpc_ckpt_*")):
        raise UserError(f"{found[0]} would be loaded by Lightning on SLURM, whatever you name; move or remove it")
    environments = [one for one in options["plugins"] if isinstance(one, ClusterEnvironment)]
    environments += listed(getattr(options["strategy"], "cluster_environment", None))
    if not environments and not TorchElasticEnvironment.detect():  # which Lightning prefers
        options["plugins"].append(SLURMEnvironment(auto_requeue=False))


def _users_callbacks(settings: Namespace) -> list[Callback]:
    callbacks = listed(settings.callbacks)
    for callback in callbacks:
        for kind, instead in _INSTEAD.items():
            if isinstance(callback, kind):
                raise UserError(f"trainer.callbacks: {kind.__name__} does not work here; {instead}")
    return callbacks


def listed(values: Any) -> list[Any]:
    """The values of a setting that may be one, several or none."""
    return [] if values is None else [*values] if isinstance(values, list) else [values]


@contextmanager
def running(logs: Path | None = None, less_memory: str = LESS_MEMORY) -> Iterator[None]:
    """Turn what fails for the user's reasons while Lightning runs - memory, the disk of `logs` - into a UserError.

    `less_memory` is the fix where memory ran out.
    """
    of_the_disk = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
    existed = logs is not None and logs.is_dir()
    bug: ValueError | None = None
    try:
        with as_user_error(less_memory):
            try:
                yield
            except ValueError as error:
                if _is_raised_by_a_library(error):
                    raise
                bug = error
    except SIGTERMException as error:  # a SystemExit without a status
        raise Interrupted("stopped by SIGTERM", signal.SIGTERM) from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # at which Lightning ends the process with status 1
            raise KeyboardInterrupt from error
        raise
    except (OSError, UserError) as error:
        if logs is not None and existed and not logs.is_dir():
            raise UserError(f"{logs} was deleted or moved meanwhile; start the run again") from error
        if isinstance(error, UserError):
            raise
        if error.errno == errno.ENOMEM:
            with as_user_error(less_memory):
                raise MemoryError from error
        if logs is None or error.errno not in of_the_disk:
            raise
        raise disk_error(Path(error.filename or logs), error) from error
    if bug is not None:
        raise bug


def _is_raised_by_a_library(error: ValueError) -> bool:
    """Whether this program, Lightning or torch raised it, not the user's own code, whose bugs keep their traceback."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("cbam_pl", "lightning", "torch")
