import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cbam_pl.commands.compare import command as command_module
from cbam_pl.commands.compare import jobs as jobs_module
from cbam_pl.errors import UserError
from tests.helpers import REPOSITORY, plan_of


def test_it_trains_tests_and_reports(compared):
    root, _, outcome, content, _ = compared
    assert outcome.out.startswith("6 runs: 3 recipes with 2 seeds; 0 are done\n")
    assert outcome.out.rstrip().endswith(str(root / "report/report.html"))
    names = sorted(path.name for path in (root / "report").iterdir())
    assert names == [
        "comparison.json",
        "configs",
        "gallery.html",
        "report.csv",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert [content["runs"][index]["recipe"] for index in range(3)] == ["none", "se", "cbam"]


def again(root, recipes, *more):
    words = ["--configs", *recipes.values(), "--seeds", 0, 1, "--jobs", 1, "--trainer.default_root_dir", root]
    return ["compare", *words, *more]


def test_the_report_needs_only_the_logs_of_runs_that_are_done(compared, recipes, command, quick, tmp_path):
    kept = ("config.yaml", "metrics.csv", "test.json", "test.npz")
    for file in (compared[0] / "logs").glob("*/version_*/*"):
        if file.name in kept:
            copy = tmp_path / file.relative_to(compared[0])
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    quick.clear()
    outcome = command(*again(tmp_path, recipes, "--output", tmp_path / "report"))
    assert outcome.status == 0, outcome.err
    assert "6 are done" in outcome.out
    assert not quick
    content = json.loads((tmp_path / "report/report.json").read_text())
    for after, before in zip(content["runs"], compared[3]["runs"], strict=True):
        same = ("recipe", "seed", "epoch", "test_acc", "test_loss", "nll", "calibrated_nll")
        assert {key: after[key] for key in same} == {key: before[key] for key in same}
        assert after["val_acc"] == pytest.approx(before["val_acc"])
    for name in ("none", "se", "cbam"):
        assert content["recipes"][name]["difference"] == compared[3]["recipes"][name]["difference"]
    page = (tmp_path / "report/report.html").read_text()
    assert "none: no pictures: " in page
    assert "best.ckpt is not there" in page

    (tmp_path / "logs/se/version_1/test.npz").unlink()
    options = again(tmp_path, recipes, "--output", tmp_path / "report")
    recomputed = command(*options, "--recompute")
    assert recomputed.status == 0, recomputed.err
    assert len(json.loads((tmp_path / "report/report.json").read_text())["runs"]) == 6, "what there is"
    for more in ([], ["--corruptions", "fog"]):
        outcome = command(*options, *more)
        assert outcome.status == 2
        assert not quick, "nothing is trained again"
        first = ("se", "version_1") if not more else ("none", "version_0")
        best = tmp_path / "checkpoints" / first[0] / first[1] / "best.ckpt"
        reason = f"{best} was deleted, so it cannot be tested again; to train it again, delete {tmp_path / 'logs'}"
        assert reason in outcome.err.splitlines()[-1]
        assert len(json.loads((tmp_path / "report/report.json").read_text())["runs"]) == 6


def test_costs_that_cannot_be_measured_do_not_lose_the_report(compared, recipes, command, tmp_path, monkeypatch):
    def reject(*_):
        raise UserError(
            "the trainer's settings conflict with each other or with this machine: No supported gpu backend found!"
        )

    monkeypatch.setattr(command_module, "measure_costs", reject)
    outcome = command(*again(compared[0], recipes, "--output", tmp_path / "report"))
    assert outcome.status == 0, outcome.err
    content = json.loads((tmp_path / "report/report.json").read_text())
    assert [one["cost"] for one in content["recipes"].values()] == [None] * 3
    assert content["notes"][0].startswith("The costs could not be measured: the trainer's settings conflict")
    for name in ("report.md", "report.html"):
        assert "The costs could not be measured" in (tmp_path / "report" / name).read_text()
    assert "The costs could not be measured" in outcome.out

    root = shutil.copytree(compared[0], tmp_path / "copy")  # whose report has costs
    outcome = command(*again(root, recipes, "--output", root / "report"))
    assert outcome.status == 0, outcome.err
    content = json.loads((root / "report/report.json").read_text())
    assert {name: one["cost"] for name, one in content["recipes"].items()} == {
        name: one["cost"] for name, one in compared[3]["recipes"].items()
    }
    assert content["notes"][0].startswith("The costs could not be measured; these are earlier ones: the trainer's")


def test_costs_are_of_recipes_with_runs_as_others_may_not_train(compared, recipes, command, tmp_path, monkeypatch):
    root = shutil.copytree(compared[0], tmp_path / "copy")
    shutil.rmtree(root / "logs/se")
    measured = []
    monkeypatch.setattr(command_module, "measure_costs", lambda configs, *_: measured.append([*configs]) or {})
    outcome = command(*again(root, recipes, "--output", tmp_path / "report"), "--recompute")
    assert outcome.status == 0, outcome.err
    assert measured == [[name for name in recipes if name != "se"]]


def test_an_error_while_runs_are_watched_stops_them(command, recipes, tmp_path, monkeypatch):
    stopped = threading.Event()

    def run_job(job, environment, stop):
        assert stop.wait(30)
        stopped.set()
        return jobs_module.STOPPED

    def fail(self):
        raise UserError("cannot write into logs (No space left on device)")

    monkeypatch.setattr(jobs_module, "run_job", run_job)
    monkeypatch.setattr(command_module.Bands, "update", fail)
    outcome = command(*again(tmp_path, recipes, "--output", tmp_path / "report"))
    assert outcome.status == 2
    assert stopped.wait(5)


@pytest.mark.slow
def test_tests_of_an_earlier_version_are_recomputed_as_they_are_or_tested_again(
    compared, recipes, command, quick, tmp_path
):
    root = shutil.copytree(compared[0], tmp_path / "copy")
    new = ("measures", "calibration", "class_accuracy", "reliability")
    for folder in (root / "logs").glob("*/version_*"):
        tested = json.loads((folder / "test.json").read_text())
        (folder / "test.json").write_text(json.dumps({key: tested[key] for key in tested if key not in new}))
        (folder / "test.npz").unlink()
    quick.clear()
    outcome = command(*again(root, recipes, "--output", root / "report", "--recompute"))
    assert outcome.status == 0, outcome.err
    assert not quick
    content = json.loads((root / "report/report.json").read_text())
    assert set(content["tables"]) == {"accuracy", "costs"}
    before = compared[3]["recipes"]["cbam"]["difference"]
    after = content["recipes"]["cbam"]["difference"]
    assert after["images_interval"] is None
    for key in ("mean", "interval", "p"):
        assert after[key] == before[key]
    outcome = command(*again(root, recipes, "--output", root / "report"))
    assert outcome.status == 0, outcome.err
    assert [call[2] for call in quick] == ["test"] * 6
    content = json.loads((root / "report/report.json").read_text())
    assert {"nll", "calibrated_nll"} <= content["recipes"]["cbam"]["measures"].keys()
    assert content["recipes"]["cbam"]["difference"] == before
    assert content["recipes"]["cbam"]["measures"] == compared[3]["recipes"]["cbam"]["measures"]


@pytest.mark.slow
def test_a_run_that_fails_is_reported_and_the_others_go_on(compared, recipes, command, quick, tmp_path, monkeypatch):
    root = shutil.copytree(compared[0], tmp_path / "copy")
    for kind in ("se", "cbam"):
        shutil.rmtree(root / f"logs/{kind}/version_1")
    ordinary = jobs_module._call

    def call(job, *arguments):
        return "out of luck" if job.name == "se" else ordinary(job, *arguments)

    monkeypatch.setattr(jobs_module, "_call", call)
    quick.clear()
    outcome = command(*again(root, recipes, "--output", root / "report"))
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].startswith("error: 1 of 6 runs failed: se seed 1: out of luck; ")
    assert quick == [["cbam", 1, "fit"], ["cbam", 1, "test"]]
    content = json.loads((root / "report/report.json").read_text())
    assert "se seed 1" in content["notes"][0]
    assert content["recipes"]["cbam"]["difference"]["n"] == 2


def test_a_dry_run_trains_and_writes_nothing(recipes, command, quick, tmp_path, monkeypatch):
    measured = {kind: {"train_images_per_second": 84 / 3600, "flops": 1e10} for kind in recipes}
    monkeypatch.setattr(command_module, "in_new_process", lambda *_: measured)
    monkeypatch.setattr(jobs_module, "num_cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    quick.clear()
    words = ["--configs", *recipes.values(), "--seeds", 5, 6, "--output", tmp_path / "report", "--dry-run"]
    words += ["--corruptions", "fog", "jpeg"]
    outcome = command("compare", *words, "--trainer.default_root_dir", tmp_path, "--trainer.max_epochs", 5)
    assert outcome.status == 0, outcome.err
    assert not quick
    assert not list(tmp_path.iterdir())
    # A training step, at 84 images an hour, takes three times as long as a forward pass, and as many operations.
    # 84 images to train on and 9 to validate on in an epoch; 9 to calibrate on; 21 to test on, clean and as two
    # corruptions of five severities.
    passes = 6 * (5 * (3 * 84 + 9) + 9 + 21 * (1 + 2 * 5))
    assert f"about {passes / (3 * 84):.2f} core hours and {passes / 100:,.1f} TFLOP" in outcome.out
    assert f"2 at once: {passes / (3 * 84) / 2:.2f} hours" in outcome.out
    assert outcome.out.count(" new ") == 6
    # 84 images are 6 steps, so 5 steps are less than an epoch; and six runs are six at once at most.
    monkeypatch.setattr(jobs_module, "num_cores", lambda: 64)
    for devices, epochs in ((1, 1), (2, 2)):  # of two devices, 84 images are 3 steps
        options = ["--trainer.default_root_dir", tmp_path, "--trainer.max_steps", 5, "--trainer.devices", devices]
        outcome = command("compare", *words, *options)
        passes = 6 * (epochs * (3 * 84 + 9) + 9 + 21 * (1 + 2 * 5))
        assert f"6 at once: {passes / (3 * 84) / 6:.2f} hours" in outcome.out


@pytest.mark.parametrize(
    ("options", "passes"),  # of 10 epochs of 84 images to train on and 9 to validate on, and of 21 to test on
    [
        ([], 10 * (3 * 84 + 9) + 9 + 21),
        (["--model.test_time_flip", "true"], 10 * (3 * 84 + 2 * 9) + 2 * (9 + 21)),  # which training does not
        (["--trainer.limit_train_batches", 2], 10 * (3 * 32 + 9) + 9 + 21),
        (["--trainer.limit_train_batches", 2, "--trainer.devices", 2], 10 * (3 * 64 + 9) + 9 + 21),
        (["--trainer.limit_train_batches", 0.5, "--trainer.limit_val_batches", 0.5], 10 * (3 * 42 + 4) + 9 + 21),
        (["--trainer.overfit_batches", 1], 10 * (3 * 16 + 9) + 9 + 21),
        (["--trainer.check_val_every_n_epoch", 5], 10 * 3 * 84 + 2 * 9 + 9 + 21),
    ],
)
def test_a_dry_run_counts_what_a_training_takes(options, passes, recipes, command, tmp_path, monkeypatch):
    measured = {kind: {"train_images_per_second": 1e6, "flops": 1e12} for kind in recipes}
    monkeypatch.setattr(command_module, "in_new_process", lambda *_: measured)
    words = ["--configs", *recipes.values(), "--seeds", 0, "--output", tmp_path / "report", "--dry-run", *options]
    outcome = command("compare", *words, "--trainer.default_root_dir", tmp_path, "--trainer.max_epochs", 10)
    assert outcome.status == 0, outcome.err
    assert f" and {len(recipes) * passes:,}.0 TFLOP" in outcome.out


@pytest.mark.slow
def test_sigterm_lets_the_runs_save_their_state_and_the_same_command_goes_on(recipes, quick, command, tmp_path):
    words = ["--configs", recipes["none"], recipes["cbam"], "--seeds", "0", "--output", tmp_path / "report"]
    words += ["--jobs", "2", "--trainer.max_epochs", "2000", "--trainer.default_root_dir", tmp_path]
    script = [sys.executable, "train.py", "compare", *map(str, words)]
    with subprocess.Popen(script, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        begun = [tmp_path / f"checkpoints/{kind}/version_0/last.ckpt" for kind in ("none", "cbam")]
        limit = time.monotonic() + 240
        while not all(path.exists() for path in begun):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < limit
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert errors.rstrip().endswith("stopped; the same command goes on from there")
    for kind in ("none", "cbam"):
        (log,) = (tmp_path / f"logs/{kind}").glob("job-seed0-*.log")
        assert "stopped by SIGTERM in epoch" in log.read_text()


def test_help_names_the_settings(command):
    outcome = command("compare", "--help")
    assert outcome.status == 0
    assert "python train.py fit --help" in " ".join(outcome.out.split())


@pytest.mark.parametrize("name", ["pooling", "spatial", "order"])
def test_the_ablations_are_ready_and_their_headers_name_them(name, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    path = Path(f"configs/ablations/{name}.yaml")
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    (line,) = [line for line in header if line.startswith("# Run: python train.py compare ")]
    assert any(line.startswith("# Expect: ") and len(line) > 30 for line in header)
    plan = plan_of(*line.removeprefix("# Run: python train.py compare ").split())
    assert len(plan.seeds) == 5
    labels = {
        "pooling": ["kind=none", "kind=channel-pools=avg", "kind=channel-pools=max", "kind=channel-pools=avg+max"],
        "spatial": [
            "kind=channel",
            *(f"kind=cbam-descriptor={d}-kernel_size={k}" for d in ("learned", "mean_max") for k in (3, 7)),
        ],
        "order": ["kind=none", *(f"kind=cbam-order={o}" for o in ("channel_spatial", "spatial_channel", "parallel"))],
    }
    assert list(plan.configs) == [f"{name}-{label}" for label in labels[name]]
