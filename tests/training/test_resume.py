"""A training that was interrupted and resumed equals one that was never stopped, bit for bit."""

import csv
import json
import math
import re
import shutil

import pytest
import torch
from filelock import FileLock
from lightning.pytorch.plugins import MixedPrecision

from cbam_pl import environment
from cbam_pl.schedules import WarmupCosineLR
from cbam_pl.training.schema import completed_epochs
from tests.helpers import (
    EPOCHS,
    RUN,
    STEPS,
    Break,
    PowerCut,
    assert_equal,
    assert_same_run,
    callbacks,
    checkpoint,
    fit,
    free_port,
    one_line,
    wait_until,
)


class ScaledPrecision(MixedPrecision):
    """float16 with a loss scale on the CPU; Lightning's own 16-mixed needs CUDA. The scale doubles every other step."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2))


SCHEDULES = {
    "plateau": ["--model.lr_scheduler.init_args.patience", 0],
    "epochs": ["--model.lr_scheduler", "StepLR", "--model.lr_scheduler.init_args.step_size", 1,
               "--model.lr_scheduler.init_args.gamma", 0.5],
    "cosine": ["--model.lr_scheduler", "cbam_pl.schedules.WarmupCosineLR", "--model.lr_interval", "step",
               "--model.lr_scheduler.init_args.warmup", 0.25],
    "one cycle": ["--model.lr_scheduler", "torch.optim.lr_scheduler.OneCycleLR", "--model.lr_interval", "step",
                  "--model.lr_scheduler.init_args.max_lr", 0.004],
}  # fmt: skip
NETWORKS = {
    "cnn": [],
    "resnet18": ["--model.arch", "resnet18", "--data.image_size", 8, "--model.optimizer", "SGD",
                 "--model.optimizer.lr", 0.01, "--model.optimizer.momentum", 0.9, "--model.optimizer.fused", "true"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("network", "schedule"),
    [
        pytest.param(network, schedule, marks=[] if (network, schedule) == ("cnn", "one cycle") else pytest.mark.slow)
        for network in NETWORKS
        for schedule in SCHEDULES
    ],
)
def test_half_and_half_equal_the_whole(network, schedule, command, recipe, tmp_path):
    options = [*NETWORKS[network], *SCHEDULES[schedule]]
    whole = command(*fit(recipe, tmp_path / "whole", *options))
    assert whole.status == 0, whole.err
    # Once in the middle of the second epoch, and once between the second and the third.
    outcome = command(*fit(recipe, tmp_path / "parts", *options, *callbacks(Break, step=STEPS + 2)))
    assert outcome.status == 143, outcome.err
    assert checkpoint(tmp_path / "parts")["global_step"] == STEPS + 2
    with pytest.raises(PowerCut):
        command(*fit(recipe, tmp_path / "parts", *options, *callbacks(Break, epoch=2), "--ckpt_path", "last"))
    assert checkpoint(tmp_path / "parts")["global_step"] == 2 * STEPS
    outcome = command(*fit(recipe, tmp_path / "parts", *options, "--ckpt_path", "last"))
    assert outcome.status == 0, outcome.err
    assert "resumed      after 2 epochs, 6 steps" in outcome.out
    assert "differs" not in outcome.out
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_adafactor_resumes_exactly(command, recipe, tmp_path):
    options = ["--model.optimizer", "Adafactor", "--model.optimizer.lr", 0.01]
    assert command(*fit(recipe, tmp_path / "whole", *options)).status == 0
    assert command(*fit(recipe, tmp_path / "parts", *options, *callbacks(Break, step=STEPS + 2))).status == 143
    outcome = command(*fit(recipe, tmp_path / "parts", *options, "--ckpt_path", "last"))
    assert outcome.status == 0, outcome.err
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_factors_in_another_order_do_not_exchange_the_state_of_their_weights(command, recipe, tmp_path):
    factors = ["{blocks.1: 0.1, blocks.2: 0.5}", "{blocks.2: 0.5, blocks.1: 0.1}"]
    assert command(*fit(recipe, tmp_path, "--model.lr_factors", factors[0], "--trainer.max_epochs", 1)).status == 0
    outcome = command(*fit(recipe, tmp_path, "--model.lr_factors", factors[1], "--ckpt_path", "last"))
    assert "has model.lr_factors in another order; give them in its order" in one_line(outcome)
    outcome = command(*fit(recipe, tmp_path, "--model.lr_factors", factors[0], "--ckpt_path", "last"))
    assert outcome.status == 0, outcome.err


def test_another_memory_layout_goes_on_with_the_same_momentum(command, recipe, tmp_path):
    weights, sgd = [], NETWORKS["resnet18"][-8:]
    assert command(*fit(recipe, tmp_path / "begun", *sgd, "--trainer.max_epochs", 1)).status == 0
    for channels_last in ("true", "false"):
        root = shutil.copytree(tmp_path / "begun", tmp_path / channels_last)
        options = ["--trainer.max_epochs", 2, "--model.channels_last", channels_last, "--ckpt_path", "last"]
        outcome = command(*fit(recipe, root, *sgd, *options))
        assert outcome.status == 0, outcome.err
        weights.append(checkpoint(root)["state_dict"])
    for name, value in weights[0].items():
        assert torch.allclose(value.float(), weights[1][name].float(), atol=1e-5), name


def test_a_checkpoint_knows_every_machine_and_commit_that_trained_it(command, recipe, tmp_path, monkeypatch):
    def train(commit, epochs, *options):
        monkeypatch.setattr(environment, "commit", lambda: commit)
        outcome = command(*fit(recipe, tmp_path, "--trainer.max_epochs", epochs, *options))
        assert outcome.status == 0, outcome.err

    train("abc", 1)
    train("abc", 2, "--ckpt_path", "last")
    train("def", 3, "--ckpt_path", "last")
    assert command("test", "--trainer.default_root_dir", tmp_path, "--ckpt_path", "last").status == 0
    tested = json.loads((tmp_path / "logs" / RUN / "test.json").read_text())
    here = environment.describe_environment(torch.device("cpu"))
    assert tested["trained_on"] == [{**here, "commit": commit} for commit in ("abc", "def")]

    # Of a run that an earlier version began, the first part is not known.
    path = tmp_path / "checkpoints" / RUN / "last.ckpt"
    content = torch.load(path, weights_only=True)
    del content["environments"]
    torch.save(content, path)
    train("def", 4, "--ckpt_path", "last")
    assert [one["commit"] for one in checkpoint(tmp_path)["environments"]] == ["unknown", "def"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.precision", "bf16-mixed"],
        # Small images, since convolutions of float16 take a CPU many times as long.
        ["--trainer.plugins", "[tests.training.test_resume.ScaledPrecision]", "--data.image_size", 8],
    ],
    ids=["bfloat16", "float16 with a loss scale"],
)
def test_mixed_precision_resumes_exactly(options, command, recipe, tmp_path):
    outcome = command(*fit(recipe, tmp_path / "whole", *options))
    assert outcome.status == 0, outcome.err
    assert command(*fit(recipe, tmp_path / "parts", *options, *callbacks(Break, step=5))).status == 143
    if "--trainer.plugins" in options:
        # Two doublings in five steps, and half of the way to the third.
        scaler = checkpoint(tmp_path / "parts")["ScaledPrecision"]
        assert (scaler["scale"], scaler["_growth_tracker"]) == (4096.0, 1)
    outcome = command(*fit(recipe, tmp_path / "parts", *options, "--ckpt_path", "last"))
    assert outcome.status == 0, outcome.err
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_averaged_weights_resume_exactly(command, recipe, tmp_path):
    averaging = "{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.5}}"
    outcome = command(*fit(recipe, tmp_path / "whole", "--trainer.callbacks", f"[{averaging}]"))
    assert outcome.status == 0, outcome.err
    # In the middle of the second epoch, and at the end of the third.
    assert command(*fit(recipe, tmp_path / "parts", *callbacks(averaging, Break, step=STEPS + 2))).status == 143
    options = [*callbacks(averaging, Break, step=3 * STEPS), "--ckpt_path", "last"]
    assert command(*fit(recipe, tmp_path / "parts", *options)).status == 143
    outcome = command(*fit(recipe, tmp_path / "parts", "--trainer.callbacks", f"[{averaging}]", "--ckpt_path", "last"))
    assert outcome.status == 0, outcome.err
    saved = checkpoint(tmp_path / "whole")
    assert_equal(saved["averaging_state"]["n_averaged"].item(), EPOCHS * STEPS)
    assert not torch.equal(
        *(saved[key]["network.blocks.0.conv.weight"] for key in ("state_dict", "current_model_state"))
    )
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_accumulated_gradients_resume_exactly(command, recipe, tmp_path):
    options = ["--trainer.accumulate_grad_batches", 2, *SCHEDULES["one cycle"]]
    outcome = command(*fit(recipe, tmp_path / "whole", *options))
    assert outcome.status == 0, outcome.err
    assert command(*fit(recipe, tmp_path / "parts", *options, *callbacks(Break, step=3))).status == 143
    outcome = command(*fit(recipe, tmp_path / "parts", *options, "--ckpt_path", "last"))
    assert outcome.status == 0, outcome.err
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_resume_exactly_and_one_can_go_on(launch, command, recipe, tmp_path):
    small = ["--data.batch_size", 2, "--trainer.max_epochs", 3, *SCHEDULES["one cycle"]]

    def both(root, *options):
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        arguments = fit(recipe, tmp_path / root, "--trainer.strategy", "ddp", "--trainer.devices", 2,
                        *small, *options)  # fmt: skip
        outputs = [tmp_path / f"{root}.{rank}" for rank in range(2)]
        processes = [
            launch(output, *arguments, variables=common | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"})
            for rank, output in enumerate(outputs)
        ]
        for process, output in zip(processes, outputs, strict=True):
            process.join(300)
            yield process.exitcode, output.read_text()

    for status, output in both("whole"):
        assert status == 0, output
    # 64 images are 16 steps; the processes agree at every tenth.
    for rank, (status, output) in enumerate(both("parts", *callbacks(Break, step=16 + 5))):
        assert status == 143, output
        assert ("figures of an epoch" in output) == ("epoch   1/3" in output) == (rank == 0)  # one of them prints
    assert checkpoint(tmp_path / "parts")["global_step"] == 16 + 10
    shutil.copytree(tmp_path / "parts", tmp_path / "alone")
    for status, output in both("parts", "--ckpt_path", "last"):
        assert status == 0, output
    assert_same_run(tmp_path / "parts", tmp_path / "whole")

    outcome = command(*fit(recipe, tmp_path / "alone", *small, "--trainer.precision", "bf16-mixed",
                           "--ckpt_path", "last"))  # fmt: skip
    assert outcome.status == 0, outcome.err
    differing = [line.split(maxsplit=1)[1] for line in outcome.out.splitlines() if line.startswith("differs")]
    assert differing == [
        "processes: 1 now, 2 before; a step takes 2 images now, 4 before",
        "precision: bf16-mixed now, 32-true before",
    ]
    # Of the second epoch's 64 images 40 are behind, so that 12 steps are left, and 32 in the third epoch.
    saved = checkpoint(tmp_path / "alone")
    assert saved["global_step"] == 16 + 10 + 12 + 32
    assert saved["lr_schedulers"][0]["total_steps"] == saved["global_step"]


@pytest.mark.slow
def test_epochs_of_a_single_batch_stop_and_resume_too(command, recipe, tmp_path):
    options = ["--data.batch_size", 64]
    assert command(*fit(recipe, tmp_path / "whole", *options)).status == 0
    outcome = command(*fit(recipe, tmp_path / "parts", *options, *callbacks(Break, step=2)))
    assert outcome.status == 143, outcome.err
    assert checkpoint(tmp_path / "parts")["global_step"] == 2
    outcome = command(*fit(recipe, tmp_path / "parts", *options, "--ckpt_path", "last"))
    assert outcome.status == 0, outcome.err
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_epochs_go_on_with_the_schedule_stretched(schedule, command, recipe, tmp_path):
    options = SCHEDULES[schedule]
    assert command(*fit(recipe, tmp_path, *options, "--trainer.max_epochs", 2)).status == 0
    outcome = command(*fit(recipe, tmp_path, *options, "--ckpt_path", "last"))
    assert outcome.status == 0, outcome.err
    spans = schedule in ("cosine", "one cycle")
    said = f"max_epochs: 4 now, 2 before; the schedule {'is stretched to its end' if spans else 'stays as it was'}"
    assert f"differs      {said}\n" in outcome.out
    config = (tmp_path / "logs/tiny/version_0/config.yaml").read_text()
    stretched = f"# resumed after 2 epochs, {said}\n"
    assert config.startswith(f"{stretched}seed: 3\n" if spans else "seed: 3\n")
    assert checkpoint(tmp_path)["global_step"] == 4 * STEPS
    if spans:
        # By hand: the schedule as it is when laid out over twelve steps from the start.
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.002)
        if schedule == "cosine":
            by_hand = WarmupCosineLR(optimizer, 0.25, total_steps=12)
        else:
            by_hand = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.004, total_steps=12)
        for _ in range(12):
            optimizer.step()
            by_hand.step()
        assert checkpoint(tmp_path)["lr_schedulers"][0]["_last_lr"] == pytest.approx(by_hand.get_last_lr(), abs=1e-12)


def test_a_stretched_schedule_by_epochs_is_followed_from_the_next_epoch_on(command, recipe, tmp_path):
    options = ["--model.lr_scheduler", "cbam_pl.schedules.WarmupCosineLR", "--model.lr_scheduler.warmup", 0]
    for more in (["--trainer.max_epochs", 2], ["--ckpt_path", "last"]):
        outcome = command(*fit(recipe, tmp_path, *options, *more))
        assert outcome.status == 0, outcome.err
    with (tmp_path / "logs" / RUN / "metrics.csv").open(newline="") as stream:
        rates = [float(row["lr"]) for row in csv.DictReader(stream)]
    cosine = [[0.001 * (1 + math.cos(math.pi * epoch / epochs)) for epoch in range(epochs)] for epochs in (2, 4)]
    assert rates == pytest.approx(cosine[0] + cosine[1][2:])


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_finished_run_says_that_nothing_is_left(epochs, trained, command, recipe):
    before = (trained[0] / "checkpoints" / RUN / "last.ckpt").stat().st_mtime_ns
    outcome = command("fit", "--config", recipe, "--trainer.default_root_dir", trained[0], "--ckpt_path", "last",
                      "--trainer.max_epochs", epochs)  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "nothing left to do: " in outcome.out
    assert "has completed 2 epochs and 12 steps; train further with a higher --trainer.max_epochs" in outcome.out
    assert (trained[0] / "checkpoints" / RUN / "last.ckpt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "differing"),
    [
        (
            ["--model.attention.kind", "none"],
            r"model.attention \(.*'kind': 'cbam'.* in the checkpoint, .*'kind': 'none'.* ",
        ),
        (
            ["--model.attention.kind", "se"],
            r"model.attention \(.*'kind': 'cbam'.* in the checkpoint, .*'kind': 'se'.* ",
        ),
        (["--model.optimizer.lr", 0.01], r"model.optimizer.lr \(0.002 in the checkpoint, 0.01 now\)"),
        (["--model.optimizer", "SGD"], r"model.optimizer \(Adam in the checkpoint, SGD now\)"),
        (
            ["--model.lr_scheduler.init_args.factor", 0.1],
            r"model.lr_scheduler.factor \(0.5 in the checkpoint, 0.1 now\)",
        ),
        (["--model.lr_interval", "step"], r"model.lr_interval \(epoch in the checkpoint, step now\)"),
        (["--data.augmentation", "none"], r"data.augmentation \(rich in the checkpoint, none now\)"),
        (["--seed", 4], r"data.seed \(3 in the checkpoint, 4 now\)"),
    ],
)
def test_what_the_checkpoint_would_override_is_rejected(options, differing, trained, command, recipe):
    error = one_line(command("fit", "--config", recipe, "--trainer.default_root_dir", trained[0], "--ckpt_path", "last",
                             "--trainer.max_epochs", 9, *options))  # fmt: skip
    assert re.search(f"trained with other settings: .*{differing}", error), error


@pytest.mark.slow
def test_a_run_in_training_is_not_resumed_by_another_process(launch, command, recipe, tmp_path):
    options = fit(recipe, tmp_path, "--trainer.max_epochs", 1000)
    process = launch(tmp_path / "output", *options)
    last = tmp_path / "checkpoints" / RUN / "last.ckpt"
    wait_until(last.exists, process, tmp_path / "output")
    error = one_line(command(*options, "--ckpt_path", "last"))
    assert error == f"error: another process is training {last.parent}; wait until it ends, or stop it"
    assert process.is_alive()
    process.kill()  # as nothing could announce
    process.join()
    done = completed_epochs(checkpoint(tmp_path))
    outcome = command(*options, "--ckpt_path", "last", "--trainer.max_epochs", done + 1)
    assert outcome.status == 0, outcome.err
    assert completed_epochs(checkpoint(tmp_path)) == done + 1


def test_a_run_that_is_locked_is_not_resumed(trained, command, recipe, tmp_path):
    root = shutil.copytree(trained[0], tmp_path / "run")
    with FileLock(root / "logs" / RUN / ".lock"):
        error = one_line(command("fit", "--config", recipe, "--trainer.default_root_dir", root, "--ckpt_path", "last",
                                 "--trainer.max_epochs", 3))  # fmt: skip
    assert error == f"error: another process is training {root / 'checkpoints' / RUN}; wait until it ends, or stop it"
