"""Interruptions, checkpoints in time, losses that are not finite, and the lines that a training prints."""

import re
import shlex
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Callback

from cbam_pl.errors import Interrupted, UserError
from cbam_pl.training.callbacks import InterruptCheckpoint
from cbam_pl.training.checkpoint import AtomicCheckpointIO, read_checkpoint
from tests.helpers import EPOCHS, RUN, STEPS, Break, assert_same_run, callbacks, checkpoint, fit, one_line, scalars


@pytest.fixture(scope="module")
def whole(command, recipe, tmp_path_factory):
    """A run of four epochs that nothing stopped: its root, and what it printed."""
    root = tmp_path_factory.mktemp("whole")
    outcome = command(*fit(recipe, root))
    assert outcome.status == 0, outcome.err
    return root, outcome


# Interruptions


@pytest.mark.parametrize(
    ("number", "times"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_the_state_and_prints_the_command_that_resumes(number, times, whole, command, recipe, tmp_path):
    stop = callbacks(Break, step=STEPS + 2, number=int(number), times=times)
    outcome = command(*fit(recipe, tmp_path, *stop))
    assert outcome.status == 128 + number, outcome.err
    assert f"stopped by {number.name} in epoch 2 after step {STEPS + 2}; the state is saved\n" in outcome.err
    assert "Traceback" not in outcome.err
    assert checkpoint(tmp_path)["global_step"] == STEPS + 2
    words = shlex.split(re.search(r"^resume: python train\.py (fit .*)$", outcome.err, re.MULTILINE)[1])
    place = words.index("--trainer.callbacks")  # which would stop it again
    outcome = command(*words[:place], *words[place + 2 :])
    assert outcome.status == 0, outcome.err
    assert_same_run(tmp_path, whole[0])


@pytest.mark.parametrize("accumulated", [1, 3, 7, 16, 64])
def test_processes_agree_to_stop_at_a_step_soon(accumulated):
    """Two processes of epochs of 700 batches: the one here has received the signal with the first batch."""
    trainer = SimpleNamespace(global_step=0, should_stop=False, is_last_batch=False, max_steps=-1, world_size=2)
    trainer.accumulate_grad_batches, trainer.current_epoch, trainer.strategy = accumulated, 0, SimpleNamespace()
    trainer.strategy.reduce_boolean_decision = lambda decision, all: decision
    interrupt = InterruptCheckpoint(None, 5.0)
    interrupt._received, interrupt._saved_at = signal.SIGTERM, time.monotonic()

    def train(batches):
        for batch in range(batches):
            trainer.global_step = (batch + 1) // accumulated
            interrupt.on_train_batch_end(trainer, None, None, None, batch)

    with pytest.raises(Interrupted, match="stopped by SIGTERM in epoch 1"):
        train(2 * max(accumulated, interrupt.AGREE_EVERY))


class Stop(Callback):
    """Ends the training with an error."""

    def on_train_batch_end(self, *_):
        raise UserError("enough")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_without_checkpoints_ends_the_training_and_says_so(number, command, recipe, tmp_path):
    options = [*callbacks(Break, step=STEPS + 1, number=int(number)), "--trainer.enable_checkpointing", "false"]
    outcome = command(*fit(recipe, tmp_path, *options))
    assert outcome.status == 128 + number
    assert f"stopped by {number.name} in epoch 2 after step {STEPS + 1}; nothing is saved" in outcome.err
    assert "resume" not in outcome.err
    assert len((tmp_path / "logs" / RUN / "metrics.csv").read_text().splitlines()) == 2  # nothing of the second epoch


def test_signal_handlers_are_restored(recipe, command, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    assert command(*fit(recipe, tmp_path, "--trainer.max_epochs", 1)).status == 0
    assert [signal.getsignal(number) for number in numbers] == before
    assert one_line(command(*fit(recipe, tmp_path, *callbacks(Stop)))) == "error: enough"
    assert [signal.getsignal(number) for number in numbers] == before


def test_at_most_checkpoint_minutes_are_lost(command, recipe, tmp_path, monkeypatch):
    now, saved, save = [0.0], [], AtomicCheckpointIO.save_checkpoint

    class Tick(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            now[0] += 25  # seconds a step

    def spy(self, content, path, storage_options=None):
        saved.append((Path(path).name, content["global_step"]))
        save(self, content, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", spy)
    monkeypatch.setattr("cbam_pl.training.callbacks.time.monotonic", lambda: now[0])
    monkeypatch.setattr("tests.training.test_callbacks.Tick", Tick, raising=False)
    options = ["--trainer.default_root_dir", tmp_path, "--checkpoint_minutes", 1]
    options += ["--trainer.callbacks", "[tests.training.test_callbacks.Tick]"]
    outcome = command("fit", "--config", recipe, *options)
    assert outcome.status == 0, outcome.err
    # Epochs of six steps; the first step that ends more than a minute after the last write is the third.
    assert [step for name, step in saved if name == "last.ckpt"] == [3, 6, 9, 12]


# Losses


class Poison(Callback):
    """Breaks a weight at an optimizer step, as an overflow would."""

    last_step = 0

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        Poison.last_step = trainer.global_step + 1
        if Poison.last_step == self.step:
            pl_module.network.classifier[-1].weight.data.fill_(float("nan"))


@pytest.mark.parametrize("minutes", [5, 1e-5])
def test_a_loss_that_is_not_finite_stops_soon(minutes, command, recipe, tmp_path):
    # Epochs of 64 steps, of which the second breaks at its tenth.
    options = ["--data.batch_size", 1, "--data.image_size", 8, "--checkpoint_minutes", minutes]
    error = one_line(command(*fit(recipe, tmp_path, *options, *callbacks(Poison, step=74))))
    last = tmp_path / "checkpoints" / RUN / "last.ckpt"
    message = rf"the loss is not finite at step 74 \(learning rate 0\.00\d+\); the last good checkpoint is {last}"
    assert re.search(message, error), error
    assert Poison.last_step <= 74 + 50
    for name in ("best", "last"):
        saved = read_checkpoint(last.with_name(f"{name}.ckpt"))
        assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert saved["global_step"] == (64 if minutes == 5 else 73)


@pytest.mark.parametrize("every", [0, 3])
def test_step_losses_are_logged_as_often_as_asked_for(every, whole, command, recipe, tmp_path):
    assert command(*fit(recipe, tmp_path, "--trainer.log_every_n_steps", every)).status == 0
    expected = [
        point for point in scalars(whole[0] / "logs" / RUN)["train/loss_step"] if every and point[0] % every == 0
    ]
    assert scalars(tmp_path / "logs" / RUN).get("train/loss_step", []) == expected


# What is printed


def test_each_epoch_has_a_line_with_its_figures(whole):
    root, outcome = whole
    logged = scalars(root / "logs" / RUN)
    expected = [
        f"epoch   {step}/{EPOCHS}  train {logged['train/loss'][step - 1][1]:.4f} {logged['train/acc'][step - 1][1]:.4f}"
        f"  val {logged['val/loss'][step - 1][1]:.4f} {logged['val/acc'][step - 1][1]:.4f}"
        f"  lr {logged['lr'][step - 1][1]:.2g}"
        for step in range(1, EPOCHS + 1)
    ]
    lines = [line for line in outcome.err.splitlines() if line.startswith("epoch ")]
    assert [line.rsplit("  ", 1)[0] for line in lines] == expected
    assert all(re.fullmatch(r"\d+\.\d s", line.rsplit("  ", 1)[1]) for line in lines)
    assert outcome.err.count("figures of an epoch: mean loss, accuracy\n") == 1


class Clock(Callback):
    """A clock by which a step takes one second and a validation a thousand; keeps what the bar would show."""

    now = 0.0
    shown: list[str]

    def on_train_start(self, *_):
        Clock.shown = []

    def on_train_batch_start(self, *_):
        Clock.now += 1

    def on_validation_end(self, trainer, pl_module):
        bar = trainer.progress_bar_callback
        Clock.shown.append(bar.get_metrics(trainer, pl_module))

    def on_validation_batch_start(self, *_):
        Clock.now += 1000


def test_images_per_second_leave_validation_out(command, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("cbam_pl.training.callbacks.time.monotonic", lambda: Clock.now)
    options = ["--trainer.max_epochs", 3, "--trainer.callbacks", "[tests.training.test_callbacks.Clock]"]
    assert command(*fit(recipe, tmp_path, *options)).status == 0
    # 64 images in three steps of a second. What is shown at a validation was fetched before it.
    speeds = [shown["images/s"] for shown in Clock.shown]
    assert speeds == ["21", "21", "21"]


@pytest.mark.slow
def test_an_epoch_that_goes_on_is_timed_from_there(command, recipe, tmp_path, monkeypatch):
    assert command(*fit(recipe, tmp_path, *callbacks(Break, step=STEPS + 2))).status == 143
    clock = time.monotonic
    monkeypatch.setattr("cbam_pl.training.callbacks.time.monotonic", lambda: clock() + 1e6)
    outcome = command(*fit(recipe, tmp_path, "--ckpt_path", "last"))
    assert outcome.status == 0, outcome.err
    seconds = [float(found) for found in re.findall(r"^epoch .* ([\d.]+) s$", outcome.err, re.MULTILINE)]
    assert len(seconds) == EPOCHS - 1
    assert max(seconds) < 1e6


def test_a_terminal_shows_a_bar_with_the_last_figures(command, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for a terminal
    outcome = command(*fit(recipe, tmp_path, "--trainer.max_epochs", 2))
    assert outcome.status == 0, outcome.err
    text = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", outcome.err).split())  # without colours and line breaks
    assert re.search(r"epoch 2/2 .*loss: \d\.\d{3} images/s: [\d,]+", text), text
    assert len(re.findall(r"epoch \d/2 train \d\.\d{4} ", text)) == 2
