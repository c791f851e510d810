import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cbam_pl.errors import UserError
from tests.helpers import REPOSITORY, checkpoint, scalars

EPOCHS, STEPS = 12, 6


def start(recipe, root, *options):
    command = [
        sys.executable, "train.py", "fit", "--config", recipe, "--trainer.max_epochs", EPOCHS,
        "--trainer.default_root_dir", root, *options,
    ]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)),
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    process = start(recipe, root)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return root


def same(ours, theirs):
    assert ours["epoch"] == theirs["epoch"]
    for name, value in theirs["state_dict"].items():
        assert torch.equal(value, ours["state_dict"][name]), name
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    assert ours["figures"] == theirs["figures"]


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT], [signal.SIGUSR1]])
def test_a_signal_saves_and_the_resumed_run_equals_the_undisturbed_one(numbers, recipe, undisturbed, tmp_path):
    process = start(recipe, tmp_path)
    wait_for(tmp_path / "checkpoints/tiny/version_0/last.ckpt", process)
    for number in numbers:
        process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + numbers[0], err
    assert f"stopped by {signal.Signals(numbers[0]).name} in epoch" in err
    command = re.search(r"^resume: python (train\.py fit .*)$", err, re.MULTILINE).group(1)
    assert "Traceback" not in err
    saved = checkpoint(tmp_path)
    step = saved["global_step"]
    assert 0 < step < EPOCHS * STEPS

    resumed = subprocess.run(
        [sys.executable, *command.split()], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert resumed.returncode == 0, resumed.stderr
    same(checkpoint(tmp_path), checkpoint(undisturbed))
    logged, reference = (scalars(root / "logs/tiny/version_0") for root in (tmp_path, undisturbed))
    assert logged == reference
    rows = [(root / "logs/tiny/version_0/metrics.csv").read_text() for root in (tmp_path, undisturbed)]
    assert rows[0] == rows[1]


def test_signals_are_given_back(recipe, command, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    root = ("--trainer.default_root_dir", tmp_path, "--trainer.max_epochs", 1)
    assert command("fit", "--config", recipe, *root).status == 0
    assert [signal.getsignal(number) for number in numbers] == before
    broken = command(
        "fit",
        "--config",
        recipe,
        *root,
        "--trainer.callbacks",
        '[{"class_path": "tests.training.test_callbacks.Stop"}]',
    )
    assert broken.status == 2
    assert [signal.getsignal(number) for number in numbers] == before


class Stop(Callback):
    """Ends the training with an error."""

    def on_train_batch_end(self, *_):
        raise UserError("enough")


def test_checkpoints_in_time_survive_kill(recipe, undisturbed, tmp_path):
    process = start(recipe, tmp_path, "--checkpoint_minutes", "0.0001")
    last = tmp_path / "checkpoints/tiny/version_0/last.ckpt"
    wait_for(last, process)
    for _ in range(200):  # until one was written in the middle of an epoch
        if torch.load(last, weights_only=True)["global_step"] % STEPS:
            break
        time.sleep(0.01)
    process.kill()
    process.communicate()
    resumed = start(recipe, tmp_path, "--ckpt_path", "last")
    _, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    same(checkpoint(tmp_path), checkpoint(undisturbed))
    assert scalars(tmp_path / "logs/tiny/version_0") == scalars(undisturbed / "logs/tiny/version_0")


def test_a_loss_that_is_not_finite_stops_and_leaves_the_checkpoint(recipe, command, tmp_path, trained):
    root = shutil.copytree(trained[0], tmp_path / "run")
    outcome = command(
        "fit", "--config", recipe, "--ckpt_path", "last", "--trainer.default_root_dir", root,
        "--trainer.max_epochs", 9, "--model.optimizer.lr", 0.002, "--data.batch_size", 16,
        "--trainer.callbacks", '[{"class_path": "tests.training.test_callbacks.Poison"}]',
    )  # fmt: skip
    assert outcome.status == 2, outcome.err
    last = root / "checkpoints/tiny/version_0/last.ckpt"
    message = rf"error: the loss is not finite at step \d+ \(learning rate 0\.00\d+\); the last good .* {last}"
    assert re.search(message, outcome.err), outcome.err
    assert all(value.isfinite().all() for value in checkpoint(root)["state_dict"].values())


class Poison(Callback):
    """Breaks a weight in the fourth epoch, as an overflow would."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 3 and batch_idx == 2:
            pl_module.network.classifier[-1].weight.data.fill_(float("inf"))
