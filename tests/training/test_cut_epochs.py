"""An epoch is the steps that the Trainer was told to take; one that is cut short is completed by a resume."""

import csv
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from tests.helpers import (
    EPOCHS,
    RUN,
    STEPS,
    Break,
    PowerCut,
    assert_same_run,
    callbacks,
    checkpoint,
    fit,
    one_line,
    scalars,
)


class StopAt(Callback):
    """Asks the training to stop after a step, as max_time does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= self.step


def stop_by_steps(step):
    return ["--trainer.max_steps", step]


def stop_by_flag(step):
    name = "tests.training.test_cut_epochs.StopAt"
    return ["--trainer.callbacks", f"[{{class_path: {name}, init_args: {{step: {step}}}}}]"]


def stop_by_signal(step):
    name = "tests.helpers.Break"
    return ["--trainer.callbacks", f"[{{class_path: {name}, init_args: {{step: {step}}}}}]"]


STOPS = {"max_steps": stop_by_steps, "should_stop": stop_by_flag, "signal": stop_by_signal}
# Setting → steps of an epoch.
SETTINGS = {
    (): STEPS,
    ("--trainer.limit_train_batches", 2): 2,
    ("--trainer.limit_train_batches", 0.7): 2,
    ("--trainer.overfit_batches", 2): 2,
    ("--trainer.accumulate_grad_batches", 2): 2,
    ("--trainer.check_val_every_n_epoch", 2): STEPS,
    ("--trainer.limit_val_batches", 0): STEPS,
    ("--trainer.limit_train_batches", 2, "--trainer.reload_dataloaders_every_n_epochs", 1): 2,
    ("--trainer.min_epochs", 1): STEPS,
    ("--trainer.num_sanity_val_steps", 1): STEPS,
}
ONE_CYCLE = ["--model.lr_scheduler", "torch.optim.lr_scheduler.OneCycleLR", "--model.lr_interval", "step",
             "--model.lr_scheduler.init_args.max_lr", 0.004]  # fmt: skip
ONCE = ("--trainer.limit_train_batches", 0.7)
SLOW = [pytest.param(setting, marks=pytest.mark.slow) for setting in SETTINGS if setting != ONCE]


def rows(root):
    with (root / "logs" / RUN / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


# max_steps is the end of a schedule over the whole training, too, which a resume without it stretches.
CUTS = [("max_steps", "plateau"), ("should_stop", "one cycle"), ("signal", "plateau"), ("signal", "one cycle")]


@pytest.mark.parametrize(("stop", "schedule"), [CUTS[0], *(pytest.param(*c, marks=pytest.mark.slow) for c in CUTS[1:])])
@pytest.mark.parametrize("setting", [ONCE, *SLOW], ids=lambda setting: " ".join(map(str, setting[-2:])))
def test_stops_at_each_quarter_equal_one_go(setting, stop, schedule, command, recipe, tmp_path):
    options = [*setting, *(ONE_CYCLE if schedule == "one cycle" else [])]
    whole = command(*fit(recipe, tmp_path / "whole", *options))
    assert whole.status == 0, whole.err
    total = EPOCHS * SETTINGS[setting]
    for number in (1, 2, 3):
        step = number * total // 4 + (total % 4 == 0)  # in the middle of an epoch, but for the last
        resume = [] if number == 1 else ["--ckpt_path", "last"]
        part = command(*fit(recipe, tmp_path / "parts", *options, *STOPS[stop](step), *resume))
        assert part.status == (143 if stop == "signal" else 0), part.err
        assert checkpoint(tmp_path / "parts")["global_step"] == step
        complete = step // SETTINGS[setting]
        if stop != "signal" and (tmp_path / "parts/logs" / RUN / "metrics.csv").exists():
            assert [int(row["epoch"]) for row in rows(tmp_path / "parts")] == list(range(1, complete + 1))
    rest = command(*fit(recipe, tmp_path / "parts", *options, "--ckpt_path", "last"))
    assert rest.status == 0, rest.err
    if "--trainer.limit_val_batches" in options:
        last, expected = (checkpoint(root)["state_dict"] for root in (tmp_path / "parts", tmp_path / "whole"))
        assert all(torch.equal(last[name], expected[name]) for name in expected)
        assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    else:
        assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.check_val_every_n_epoch", 2],
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(ONE_CYCLE, marks=pytest.mark.slow),
        pytest.param(["--trainer.accumulate_grad_batches", 2], marks=pytest.mark.slow),
    ],
    ids=["validated every other epoch", "plateau", "one cycle", "accumulated"],
)
def test_with_max_steps_too_a_stop_between_two_epochs_changes_nothing(options, command, recipe, tmp_path):
    options = [*options, "--trainer.max_steps", 7]  # the third or fourth epoch is cut off
    whole = command(*fit(recipe, tmp_path / "whole", *options))
    assert whole.status == 0, whole.err
    with pytest.raises(PowerCut):
        command(*fit(recipe, tmp_path / "parts", *options, *callbacks(Break, epoch=1)))
    with pytest.raises(PowerCut):
        command(*fit(recipe, tmp_path / "parts", *options, *callbacks(Break, epoch=2), "--ckpt_path", "last"))
    rest = command(*fit(recipe, tmp_path / "parts", *options, "--ckpt_path", "last"))
    assert rest.status == 0, rest.err
    assert checkpoint(tmp_path / "parts")["global_step"] == 7
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_the_next_epoch_begins_at_its_own_first_batch(command, recipe, tmp_path):
    """Two epochs of two of three batches are the first two batches of the first two whole epochs."""
    losses = {}
    for name, options in (("whole", []), ("limited", ["--trainer.limit_train_batches", 2])):
        # A rate of 0, so that the loss depends on the images alone.
        frozen = ["--model.optimizer", "SGD", "--model.optimizer.lr", 0, "--model.arch", "resnet20"]
        assert command(*fit(recipe, tmp_path / name, *frozen, *options)).status == 0
        losses[name] = dict(scalars(tmp_path / name / "logs" / RUN)["train/loss_step"])
    for epoch in range(EPOCHS):
        for batch in (1, 2):
            assert losses["limited"][2 * epoch + batch] == losses["whole"][STEPS * epoch + batch]


@pytest.mark.slow
def test_overfitting_trains_on_the_same_batches_in_every_epoch(command, recipe, tmp_path):
    frozen = ["--model.optimizer", "SGD", "--model.optimizer.lr", 0, "--model.arch", "resnet20"]
    assert command(*fit(recipe, tmp_path, *frozen, "--trainer.overfit_batches", 2)).status == 0
    losses = [loss for _, loss in scalars(tmp_path / "logs" / RUN)["train/loss_step"]]
    assert len(losses) == 2 * EPOCHS
    assert losses[2:] == losses[:2] * (EPOCHS - 1)
    assert losses[0] != losses[1]


def test_a_training_shorter_than_an_epoch_can_be_tested(command, recipe, tmp_path):
    outcome = command(*fit(recipe, tmp_path, "--trainer.max_steps", 2))
    assert outcome.status == 0, outcome.err
    assert "stopped by trainer.max_steps in epoch 1 after step 2; the state is saved" in outcome.err
    assert "\nresume with a higher --trainer.max_steps: python train.py fit " in outcome.err
    outcome = command(*fit(recipe, tmp_path, "--trainer.max_steps", 2, "--ckpt_path", "last"))
    assert "0 epochs and 2 steps; train further with a higher --trainer.max_steps\n" in outcome.out
    assert not (tmp_path / "logs" / RUN / "metrics.csv").exists()
    best = checkpoint(tmp_path, "best")
    assert best["global_step"] == 2
    validated = command("validate", "--trainer.default_root_dir", tmp_path)
    assert f"val/acc  {best['figures']['val/acc']:.4f}" in validated.out
    # A resumed training replaces it by the best of whole epochs.
    assert command(*fit(recipe, tmp_path, "--ckpt_path", "last", "--trainer.max_epochs", 1)).status == 0
    assert checkpoint(tmp_path, "best")["global_step"] == STEPS


def test_max_time_that_is_used_up(command, recipe, tmp_path):
    assert command(*fit(recipe, tmp_path, "--trainer.max_steps", 2)).status == 0
    stopped = command(*fit(recipe, tmp_path, "--ckpt_path", "last", "--trainer.max_time", "00:00:00:00"))
    assert (stopped.status, checkpoint(tmp_path)["global_step"]) == (0, 2)
    assert "nothing left to do" in stopped.out
    assert "trainer.max_time" in stopped.out


@pytest.mark.filterwarnings("ignore:Be aware that when using")  # Lightning's, of the callback that is left out
def test_early_stopping_that_ended_a_training_is_remembered(command, recipe, tmp_path):
    stop = ["--trainer.callbacks", "[{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: "
            "{monitor: val/loss, patience: 1, min_delta: 100}}]"]  # fmt: skip
    assert command(*fit(recipe, tmp_path, *stop)).status == 0
    assert checkpoint(tmp_path)["global_step"] == 2 * STEPS
    again = command(*fit(recipe, tmp_path, *stop, "--ckpt_path", "last"))
    assert again.status == 0
    assert "nothing left to do" in again.out
    assert "EarlyStopping ended it" in again.out
    assert checkpoint(tmp_path)["global_step"] == 2 * STEPS
    further = command(*fit(recipe, tmp_path, "--ckpt_path", "last"))
    assert (further.status, checkpoint(tmp_path)["global_step"]) == (0, EPOCHS * STEPS)


EARLY = "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/loss, min_delta: 100, "


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_what_is_to_stop_waits_for_the_least_epochs_after_a_resume_too(command, recipe, tmp_path):
    stop = f"{EARLY}patience: 1}}}}"  # asks in the second epoch
    options = ["--trainer.min_epochs", 3]
    broken = command(*fit(recipe, tmp_path, *options, *callbacks(stop, Break, step=2 * STEPS + 1)))
    assert broken.status == 143, broken.err
    easy = stop.replace("min_delta: 100", "min_delta: -100")  # every epoch is an improvement, which comes too late
    for one in (easy, stop):
        root = shutil.copytree(tmp_path, tmp_path.with_name(f"{one is stop}"))
        outcome = command(*fit(recipe, root, *options, "--trainer.callbacks", f"[{one}]", "--ckpt_path", "last"))
        assert (outcome.status, checkpoint(root)["global_step"]) == (0, 3 * STEPS), outcome.out


class Improves(EarlyStopping):
    """Takes the third epoch, and each that follows, for an improvement, which comes after the request to stop."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.wait_count = 0 if trainer.current_epoch >= 2 else self.wait_count

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch < 2:
            super().on_train_epoch_end(trainer, pl_module)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_request_to_stop_outlives_an_improvement(command, recipe, tmp_path):
    stop = EARLY.replace("lightning.pytorch.callbacks.EarlyStopping", f"{__name__}.Improves") + "patience: 1}}"
    options = ["--trainer.min_epochs", 3]
    options += ["--trainer.callbacks", f"[{stop}]"]
    whole = command(*fit(recipe, tmp_path / "whole", *options))
    assert (whole.status, checkpoint(tmp_path / "whole")["global_step"]) == (0, 3 * STEPS), whole.err
    broken = command(*fit(recipe, tmp_path / "parts", *options[:2], *callbacks(stop, Break, step=2 * STEPS + 1)))
    assert broken.status == 143, broken.err
    resumed = command(*fit(recipe, tmp_path / "parts", *options, "--ckpt_path", "last"))
    assert (resumed.status, checkpoint(tmp_path / "parts")["global_step"]) == (0, 3 * STEPS), resumed.err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using")
@pytest.mark.parametrize(("epochs", "least"), [(1, []), (2, ["--trainer.min_epochs", 3])])  # before it asks, and after
def test_a_resume_with_more_patience_has_it(epochs, least, command, recipe, tmp_path):
    stop = callbacks(f"{EARLY}patience: 1}}}}", Break, step=epochs * STEPS + 1)
    broken = command(*fit(recipe, tmp_path, *least, *stop))
    assert broken.status == 143, broken.err
    patient = ["--trainer.callbacks", f"[{EARLY}patience: 9}}}}]", "--ckpt_path", "last"]
    outcome = command(*fit(recipe, tmp_path, *patient, *least))
    assert (outcome.status, checkpoint(tmp_path)["global_step"]) == (0, EPOCHS * STEPS), outcome.err


class AskAt(Callback):
    """Asks the training to stop after a batch, once, which may be inside a step."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.place = epoch, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or (trainer.current_epoch, batch_idx) == self.place


def test_a_stop_inside_an_accumulated_step_waits_for_its_end(command, recipe, tmp_path):
    options = ["--trainer.accumulate_grad_batches", 2]
    assert command(*fit(recipe, tmp_path / "whole", *options)).status == 0
    stopped = command(*fit(recipe, tmp_path / "parts", *options, *callbacks(AskAt, epoch=1, batch=0)))
    assert stopped.status == 0, stopped.err
    assert "stopped by trainer.max_time or a callback in epoch 2 after step 3; the state is saved" in stopped.err
    assert [row["epoch"] for row in rows(tmp_path / "parts")] == ["1"]
    rest = command(*fit(recipe, tmp_path / "parts", *options, "--ckpt_path", "last"))
    assert rest.status == 0, rest.err
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# Checkpoints of the user's own: Setting → when they are saved.
OWN = {
    (): "monitor: val/loss, mode: min",  # with the bar, whose line of an epoch has its figures
    ("--trainer.check_val_every_n_epoch", 2): "monitor: val/loss, mode: min",  # at the end of the validation
    ("--trainer.check_val_every_n_epoch", 2, "--trainer.limit_train_batches", 2): "monitor: val/loss, mode: min",
    ("--trainer.enable_progress_bar", "false"): f"every_n_train_steps: {STEPS - 1}",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using")
@pytest.mark.parametrize("setting", OWN, ids=str)
def test_a_checkpoint_of_the_users_own_resumes_exactly(setting, command, recipe, tmp_path):
    name, place = "lightning.pytorch.callbacks.ModelCheckpoint", tmp_path / "own"
    own = f"{{class_path: {name}, init_args: {{dirpath: {place}, save_top_k: -1, {OWN[setting]}}}}}"
    whole = command(*fit(recipe, tmp_path / "whole", *setting, "--trainer.callbacks", f"[{own}]"))
    assert whole.status == 0, whole.err
    first = min(place.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])
    rest = command(*fit(recipe, tmp_path / "rest", *setting, "--ckpt_path", first))
    assert rest.status == 0, rest.err
    last, expected = (checkpoint(root) for root in (tmp_path / "rest", tmp_path / "whole"))
    assert all(torch.equal(last["state_dict"][name], value) for name, value in expected["state_dict"].items())
    assert last["figures"] == expected["figures"]
    later = rows(tmp_path / "rest")
    assert later == rows(tmp_path / "whole")[-len(later) :]


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_checkpoint_between_the_last_batch_and_the_validation_is_rejected(command, recipe, tmp_path):
    name, place = "lightning.pytorch.callbacks.ModelCheckpoint", tmp_path / "own"
    own = f"{{class_path: {name}, init_args: {{dirpath: {place}, every_n_train_steps: {STEPS}}}}}"
    whole = command(*fit(recipe, tmp_path / "whole", "--trainer.callbacks", f"[{own}]", "--trainer.max_epochs", 1))
    assert whole.status == 0, whole.err
    (file,) = place.glob("*.ckpt")
    error = one_line(command(*fit(recipe, tmp_path / "rest", "--ckpt_path", file)))
    assert "saved between an epoch's last batch and its end, from where Lightning cannot resume" in error


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_early_stopping_did_not_end_what_max_time_ended(command, recipe, tmp_path):
    stop = ["--trainer.callbacks", "[{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: "
            "{monitor: val/loss, patience: 100}}]"]  # fmt: skip
    outcome = command(*fit(recipe, tmp_path, *stop, "--trainer.max_time", "{milliseconds: 1}"))
    assert "stopped by trainer.max_time" in outcome.err
    further = command(*fit(recipe, tmp_path, *stop, "--trainer.max_time", "01:00:00:00", "--ckpt_path", "last"))
    assert (further.status, checkpoint(tmp_path)["global_step"]) == (0, EPOCHS * STEPS)


# Stopped after a step of the second epoch, resumed with other settings → steps in the end. One order of the images is
# dealt out to all processes: of the three batches of one process, eight have done more than two with the first step.
CHANGES = {
    "fewer batches": (STEPS + 2, ["--trainer.limit_train_batches", 2], 1, STEPS + 2 + 1 + 2 * 2),
    "a part of the batches": (STEPS + 2, ["--trainer.limit_train_batches", 0.7], 1, STEPS + 2 + 1 + 2 * 2),
    "more batches a step": (STEPS + 1, ["--trainer.accumulate_grad_batches", 2], 1, STEPS + 1 + 2 + 2 * 2),
    "fewer processes": (STEPS + 1, [], 8, STEPS + 1 + 1 + 2 * STEPS),
    "fewer processes and batches": (STEPS + 1, ["--trainer.limit_train_batches", 2], 8, STEPS + 1 + 1 + 2 * 2),
}


@pytest.mark.parametrize(
    "change",
    [
        c if c in ("a part of the batches", "fewer processes") else pytest.param(c, marks=pytest.mark.slow)
        for c in CHANGES
    ],
)
def test_an_epoch_goes_on_with_other_batches(change, command, recipe, tmp_path):
    stop, options, processes, steps = CHANGES[change]
    assert command(*fit(recipe, tmp_path, *ONE_CYCLE, "--trainer.max_steps", stop)).status == 0
    path = tmp_path / "checkpoints" / RUN / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["run_conditions"]["processes"] = processes
    torch.save(content, path)
    outcome = command(*fit(recipe, tmp_path, *ONE_CYCLE, *options, "--ckpt_path", "last"))
    assert outcome.status == 0, outcome.err
    last = checkpoint(tmp_path)
    assert last["global_step"] == steps
    assert last["lr_schedulers"][0]["total_steps"] == steps
    assert [int(row["epoch"]) for row in rows(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [2, 0.7])
def test_a_validation_inside_an_epoch_is_rejected(value, command, recipe, tmp_path):
    outcome = command(*fit(recipe, tmp_path, "--trainer.val_check_interval", value))
    assert outcome.status == 2
    assert f"trainer.val_check_interval={value} must be 1.0" in outcome.err
    assert not (tmp_path / "logs/tiny").exists()


def test_epochs_without_validation_leave_val_and_the_plateau_alone(command, recipe, tmp_path):
    options = ["--trainer.check_val_every_n_epoch", 2, "--model.lr_scheduler.init_args.patience", 0,
               "--model.lr_scheduler.init_args.threshold", 1e9]  # fmt: skip
    assert command(*fit(recipe, tmp_path, *options)).status == 0
    assert [bool(row["val/loss"]) for row in rows(tmp_path)] == [False, True, False, True]
    rates = [float(row["lr"]) for row in rows(tmp_path)]
    assert rates == [0.002, 0.002, 0.001, 0.001]  # halved once a validation: none is good enough
    assert checkpoint(tmp_path)["optimizer_states"][0]["param_groups"][0]["lr"] == 0.0005


@pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging")
def test_what_differs_on_resume_is_printed(command, recipe, tmp_path):
    assert command(*fit(recipe, tmp_path, "--trainer.max_epochs", 1)).status == 0
    changed = ["--trainer.limit_train_batches", 2, "--trainer.gradient_clip_val", 1.0]
    outcome = command(*fit(recipe, tmp_path, *changed, "--ckpt_path", "last"))
    assert outcome.status == 0
    assert "differs      limit_train_batches: 2 now, 1.0 before" in outcome.out
    assert "differs      gradient_clip_val: 1.0 now, None before" in outcome.out
    averaging = ["--trainer.callbacks", "[lightning.pytorch.callbacks.EMAWeightAveraging]"]
    outcome = command(*fit(recipe, tmp_path, "--trainer.max_epochs", 5, *averaging, "--ckpt_path", "last"))
    assert outcome.status == 0, outcome.err
    assert "differs      averaging: EMAWeightAveraging now, none before" in outcome.out
    config = (tmp_path / "logs/tiny/version_0/config.yaml").read_text()
    assert [line for line in config.splitlines() if line.startswith("#")] == [
        "# resumed after 1 epochs, limit_train_batches: 2 now, 1.0 before",
        "# resumed after 1 epochs, gradient_clip_val: 1.0 now, None before",
        "# resumed after 4 epochs, limit_train_batches: 1.0 now, 2 before",
        "# resumed after 4 epochs, gradient_clip_val: None now, 1.0 before",
        "# resumed after 4 epochs, averaging: EMAWeightAveraging now, none before",
    ]


def test_one_batch_differs_from_all_of_them(command, recipe, tmp_path):
    options = ["--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1]
    assert command(*fit(recipe, tmp_path, *options)).status == 0
    outcome = command(*fit(recipe, tmp_path, "--trainer.max_epochs", 2, "--ckpt_path", "last"))
    assert "differs      limit_train_batches: 1.0 now, 1 before" in outcome.out


def test_a_one_cycle_with_a_rise_of_one_step_names_the_key(command, recipe, tmp_path):
    options = [*ONE_CYCLE, "--model.lr_scheduler.init_args.pct_start", 1 / (EPOCHS * STEPS)]
    outcome = command(*fit(recipe, tmp_path, *options))
    assert outcome.status == 2
    assert "model.lr_scheduler: a phase of the schedule has fewer than two steps" in outcome.err


def test_half_precision_is_averaged_in_float32_and_rows_have_one_line_ending(command, recipe, tmp_path):
    options = ["--trainer.precision", "bf16-true", "--trainer.max_epochs"]
    assert command(*fit(recipe, tmp_path, *options, 1)).status == 0
    outcome = command(*fit(recipe, tmp_path, *options, 2, "--ckpt_path", "last"))
    assert outcome.status == 0, outcome.err
    assert b"\r" not in (tmp_path / "logs" / RUN / "metrics.csv").read_bytes()
    for row in rows(tmp_path):
        loss = torch.tensor(float(row["val/loss"]), dtype=torch.float64)
        assert loss != loss.bfloat16().double()


def test_more_steps_stretch_the_schedule_and_that_is_noted(command, recipe, tmp_path):
    assert command(*fit(recipe, tmp_path, *ONE_CYCLE, "--trainer.max_steps", 5)).status == 0
    outcome = command(*fit(recipe, tmp_path, *ONE_CYCLE, "--ckpt_path", "last"))
    change = "max_steps: -1 now, 5 before; the schedule is stretched to its end"
    assert f"differs      {change}\n" in outcome.out
    config = tmp_path / "logs" / RUN / "config.yaml"
    assert config.read_text().startswith(f"# resumed after 1 epochs, {change}\n")
    assert checkpoint(tmp_path)["changes"] == [f"after 1 epochs, {change}"]
