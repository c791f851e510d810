"""The Trainer's settings that are rejected, and what its failures become."""

import errno
import os
import re
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cbam_pl.errors import UserError
from cbam_pl.training.run import new_run
from cbam_pl.training.trainer import running
from tests.helpers import callbacks, fit, one_line

EARLY = ("--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor")
STALE = ("--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.monitor", "train/loss")
COSINE = ("--model.lr_scheduler", "cbam_pl.schedules.WarmupCosineLR")
MORE = ("--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor",)  # which logs, too
# Setting → what its line says. test_cut_epochs.py has what changes an epoch.
REJECTED = {
    ("--trainer.max_epochs", 0): "trainer.max_epochs, max_steps and limit_train_batches must not be 0",
    ("--trainer.max_steps", 0): "trainer.max_epochs, max_steps and limit_train_batches must not be 0",
    ("--trainer.limit_train_batches", 0): "trainer.max_epochs, max_steps and limit_train_batches must not be 0",
    ("--trainer.max_time", "abc"): "trainer.max_time=abc must be DD:HH:MM:SS, as 00:12:00:00",
    ("--trainer.max_time", "{weeks: x}"): "trainer.max_time={weeks: x} must be DD:HH:MM:SS, as 00:12:00:00",
    ("--trainer.barebones", "true"): "trainer.barebones=true leaves no checkpoint and no figures; leave it out",
    ("--trainer.limit_test_batches", 2): "trainer.limit_test_batches=2 has no effect on a training; give it to test",
    ("--trainer.limit_predict_batches", 0.5): "trainer.limit_predict_batches=0.5 has no effect on a training; leave it",
    ("--trainer.use_distributed_sampler", "false"): "use_distributed_sampler=False has no effect on a training; leave",
    (*EARLY, "foo"): (
        "trainer.callbacks: monitor=foo is not logged; use one of val/loss, val/acc, train/loss, train/acc, lr"
    ),
    (*EARLY, "val_loss", *MORE): "trainer.callbacks: monitor=val_loss is not logged; use one of val/loss, val/acc, ",
    (*EARLY, "val/loss", "--trainer.limit_val_batches", 0): (
        "trainer.callbacks: monitor=val/loss is not logged; use one of train/loss, train/acc, lr"
    ),
    ("--trainer.callbacks", "LearningRateFinder"): "LearningRateFinder does not work here; give model.optimizer.lr",
    ("--trainer.callbacks", "BatchSizeFinder"): "BatchSizeFinder does not work here; give data.batch_size instead",
    ("--trainer.callbacks", "BackboneFinetuning"): "BackboneFinetuning does not work here; give model.freeze and ",
    ("--trainer.callbacks", "OnExceptionCheckpoint", "--trainer.callbacks.dirpath", "d"): (
        "OnExceptionCheckpoint does not work here; leave it out: last.ckpt is written anyway"
    ),
    ("--trainer.strategy", "ddp_spawn"): "trainer.strategy=ddp_spawn does not work here; use ddp",
    (
        "--trainer.check_val_every_n_epoch",
        2,
        *STALE,
    ): "monitor=train/loss would be that of the epoch before, with trainer.check_val_every_n_epoch=2; ",
    ("--trainer.precision", "bf16-true", "--trainer.callbacks", "EMAWeightAveraging"): (
        "EMAWeightAveraging does not work with trainer.precision=bf16-true, which would round its averages; use bf16-m"
    ),
    ("--trainer.max_epochs", -1, "--trainer.max_steps", 9, *COSINE): (
        "model.lr_scheduler: a schedule by epochs needs their number; set trainer.max_epochs, or model.lr_interval=step"
    ),
    ("--trainer.callbacks", "GradientAccumulationScheduler", "--trainer.callbacks.scheduling", "{0: 1, 1: 3}"): (
        "GradientAccumulationScheduler does not work here; give trainer.accumulate_grad_batches instead"
    ),
    ("--model.lr_scheduler.init_args.mode", "max"): "model.lr_scheduler: ReduceLROnPlateau follows val/loss, which ",
    ("--model.lr_scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor", "val/acc"): (
        "ReduceLROnPlateau follows val/loss, which should decrease; leave out mode, and give monitor=val/loss where it"
    ),
    ("--trainer.callbacks", "ModelPruning", "--trainer.callbacks.pruning_fn", "l1_unstructured"): (
        "trainer.callbacks: ModelPruning changes the weights after they were validated, and others are saved; prune"
    ),
    ("--trainer.precision", "bf16-mixed", "--trainer.gradient_clip_val", 1): (
        "model.optimizer: fused=true does not work with trainer.gradient_clip_val in mixed precision; add "
    ),
    ("--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.monitor", "val_acc"): (
        "trainer.callbacks: monitor=val_acc is not logged; use one of val/loss"
    ),
}


@pytest.mark.parametrize("options", REJECTED, ids=lambda options: " ".join(map(str, options)))
def test_a_setting_that_cannot_give_true_figures_is_rejected(options, command, recipe, tmp_path):
    assert REJECTED[options] in one_line(command(*fit(recipe, tmp_path, *options)))
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("monitor", ["step", "val/loss"])
def test_what_is_logged_can_be_monitored(monitor, command, recipe, tmp_path):
    words = ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.monitor", monitor]
    words += ["--trainer.callbacks.dirpath", tmp_path / "own", "--trainer.callbacks.mode", "max"]
    outcome = command(*fit(recipe, tmp_path, *words))
    assert outcome.status == 0, outcome.err
    assert list((tmp_path / "own").glob("*.ckpt"))


class EarlySignal(Callback):
    """Sends SIGTERM in the validation before the first step, where Lightning's own handler notes it."""

    def on_validation_batch_start(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_before_the_first_step_ends_the_command_with_its_status(command, recipe, tmp_path):
    options = ["--trainer.num_sanity_val_steps", 2, "--data.batch_size", 2, *callbacks(EarlySignal)]
    outcome = command(*fit(recipe, tmp_path, *options))
    assert outcome.status == 143, outcome.err
    assert not list(tmp_path.glob("*/*"))


class Handler(Callback):
    """Notes what is done at SIGUSR1 before the training's own handler."""

    def on_fit_start(self, trainer, pl_module):
        Handler.found = signal.getsignal(signal.SIGUSR1)


def test_on_slurm_lightning_neither_requeues_nor_loads_what_it_left(command, recipe, tmp_path, monkeypatch):
    for name, value in {"NTASKS": 1, "NTASKS_PER_NODE": 1, "JOB_NAME": "train", "JOB_ID": 1, "PROCID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    dry_run = fit(recipe, tmp_path, "--trainer.fast_dev_run", "true", *callbacks(Handler))
    outcome = command(*dry_run)
    assert outcome.status == 0, outcome.err
    assert Handler.found == signal.SIG_DFL
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    assert f"error: {tmp_path}/hpc_ckpt_1.ckpt would be loaded by Lightning" in one_line(command(*dry_run))


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"cannot write /full/file \(No space left on device\); [\d,.]+ MB are free there"),
        (errno.ENOMEM, "out of memory; lower data.batch_size"),
    ],
)
def test_what_fails_for_the_machines_reasons_is_one_line(number, message, tmp_path):
    run = new_run(tmp_path, "tiny")
    with pytest.raises(UserError) as caught, running(run.logs):
        raise OSError(number, os.strerror(number), "/full/file")
    assert re.match(message, str(caught.value))


def test_a_bug_keeps_its_traceback(tmp_path):
    for error in (
        OSError(errno.ENOENT, "No such file"),
        KeyError("x"),
        RuntimeError("shapes cannot be multiplied"),
        ValueError("max() arg is an empty sequence"),
    ):
        with pytest.raises(type(error)), running(new_run(tmp_path, "tiny").logs):
            raise error
    with pytest.raises(UserError, match="Please ensure they have the same size"), running():
        torch.nn.functional.binary_cross_entropy(torch.zeros(2), torch.zeros(3))
