import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from io import BytesIO
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock

from cbam_pl.commands.compare import jobs as jobs_module
from cbam_pl.commands.compare.command import watch
from cbam_pl.commands.compare.jobs import (
    STOPPED,
    begun_last,
    environments,
    find,
    jobs_of,
    left_out,
    run_job,
    start_locally,
)
from cbam_pl.commands.compare.plan import nest
from cbam_pl.commands.compare.report import read_results
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.training.callbacks import InterruptCheckpoint
from tests.helpers import REPOSITORY, plan_of


def plan_in(root, recipes, *more):
    words = ("--configs", recipes["none"], recipes["cbam"], "--seeds", 0, 1, "--output", root / "report")
    return plan_of(*words, "--trainer.default_root_dir", root, *more)


def copy_of(compared, tmp_path):
    return shutil.copytree(compared[0], tmp_path / "copy")


def test_seed_k_gives_every_recipe_the_same_images_in_the_same_order_with_the_same_draws(recipes, tmp_path):
    def batches(settings, seed):
        data = ImageDataModule(**nest(settings)["data"], seed=seed)
        data.setup("fit")
        return data.images("val").pixels, torch.cat([images for images, _ in data.train_dataloader()])

    plan = plan_in(tmp_path, recipes)
    (none_val, none_train), (cbam_val, cbam_train) = (batches(one, 1) for one in plan.configs.values())
    assert torch.equal(none_val, cbam_val)
    assert torch.equal(none_train, cbam_train)
    other_val, other_train = batches(plan.configs["none"], 2)
    assert not torch.equal(none_val, other_val)
    assert not torch.equal(none_train, other_train)


def test_the_jobs_of_a_comparison_are_ordinary_runs_that_are_found_again(compared, recipes):
    root, _, _, _, calls = compared
    fits = [(name, seed) for seed in (0, 1) for name in ("none", "se", "cbam")]
    assert [tuple(call) for call in calls] == [(*job, command) for job in fits for command in ("fit", "test")]
    held_out = {}
    for job in jobs_of(plan_in(root, recipes)):
        state, run = find(job)
        assert (state, run.recipe, run.version) == ("done", job.name, job.seed)
        assert (run.checkpoints / "best.ckpt").exists()
        assert (run.logs / "metrics.csv").exists()
        trained = torch.load(run.best, weights_only=True)
        assert trained["datamodule_hyper_parameters"]["seed"] == job.seed
        held_out.setdefault(job.seed, []).append(trained["ImageDataModule"]["val_ids"])
    assert all(torch.equal(ids, other) for same in held_out.values() for ids, other in combinations(same, 2))
    assert not torch.equal(held_out[0][0], held_out[1][0])
    (other, *_) = jobs_of(plan_in(root, recipes, "--model.label_smoothing", 0.1))
    assert find(other) == ("new", None)


def test_recipes_may_have_roots_of_their_own(compared, recipes, tmp_path):
    files, root = [], copy_of(compared, tmp_path)
    for kind in ("none", "cbam"):
        for folder in ("checkpoints", "logs"):
            shutil.copytree(root / folder / kind, tmp_path / kind / folder / kind)
        settings = yaml.safe_load(recipes[kind].read_text())
        settings["trainer"]["default_root_dir"] = str(tmp_path / kind)
        files.append(tmp_path / f"{kind}.yaml")
        files[-1].write_text(yaml.safe_dump(settings))
    jobs = jobs_of(plan_of("--configs", *files, "--seeds", 0, 1, "--output", tmp_path / "report"))
    assert [find(job)[0] for job in jobs] == ["done"] * 4
    assert [find(job)[1].root.name for job in jobs] == ["none", "cbam"] * 2
    checkpoint = tmp_path / "none/checkpoints/none/version_1/best.ckpt"
    assert [row["checkpoint"] for row in read_results(jobs)][2] == str(checkpoint)


def test_the_files_tell_how_far_a_job_is(compared, recipes, tmp_path):
    root = copy_of(compared, tmp_path)
    job = jobs_of(plan_in(root, recipes))[0]
    logs, checkpoints = root / "logs/none/version_0", root / "checkpoints/none/version_0"

    tested = json.loads((logs / "test.json").read_text())
    plain = ["--trainer.default_root_dir", "x", "--trainer.accelerator", "cpu", "--calibrate"]
    (logs / "test.json").write_text(json.dumps(tested | {"options": plain}))
    assert find(job)[0] == "done", "an earlier version stored all options"
    (logs / "test.json").write_text(json.dumps(tested | {"options": ["--data.dataset", "shapes"]}))
    assert find(job)[0] == "trained", "it was tested, but not as the comparison does"
    older = {key: value for key, value in tested.items() if key != "calibration"}
    (logs / "test.json").write_text(json.dumps(older))
    assert find(job)[0] == "tested", "by an earlier version"
    (logs / "test.json").write_text(json.dumps(tested | {"epoch": 9}))
    assert find(job)[0] == "trained", "another checkpoint was tested"
    (logs / "test.json").unlink()
    assert find(job)[0] == "trained"

    last = torch.load(checkpoints / "last.ckpt", weights_only=True)
    last["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] = 1  # of 2 epochs
    torch.save(last, checkpoints / "last.ckpt")
    assert find(job)[0] == "interrupted"
    (checkpoints / "last.ckpt").write_bytes(b"cut")
    assert find(job)[0] == "trained", "all epochs are logged, and best.ckpt is there"
    for file in checkpoints.iterdir():
        file.unlink()
    assert find(job)[0] == "new", "it is not tested"
    (logs / "test.json").write_text(json.dumps(tested))
    assert find(job)[0] == "done", "and needs its checkpoints no more"
    (logs / "test.json").write_text(json.dumps(older))
    assert find(job)[0] == "tested", "which is reported as it is"
    (logs / "test.json").write_text(json.dumps(tested | {"epoch": 9}))
    assert find(job)[0] == "new", "it is not tested, and no longer can be"
    (logs / "test.json").write_text(json.dumps(tested))
    rows = (logs / "metrics.csv").read_text().splitlines()
    (logs / "metrics.csv").write_text("\n".join([*rows[:-1], ""]))
    assert find(job)[0] == "new", "an epoch is missing"
    (logs / "config.yaml").write_text("not: [a run")
    assert find(job) == ("new", None)


def test_predictions_are_those_of_the_test(compared, recipes, tmp_path):
    root = copy_of(compared, tmp_path)
    run = find(jobs_of(plan_in(root, recipes))[0])[1]
    test = jobs_module.read_test(run)
    arrays = jobs_module.read_predictions(run, test)
    assert 100 * arrays["correct"].mean() == pytest.approx(100 * test["test/acc"])
    assert "probabilities" not in arrays
    assert jobs_module.read_predictions(run, test | {"confusion": [[21, 0, 0], [0, 0, 0], [0, 0, 0]]}) is None
    whole = (run.logs / "test.npz").read_bytes()
    number = BytesIO()
    np.save(number, 1)
    for damaged in (b"", b"cut", whole[:60] + bytes(8) + whole[68:], number.getvalue()):
        (run.logs / "test.npz").write_bytes(damaged)
        assert jobs_module.read_predictions(run, test) is None
        assert find(jobs_of(plan_in(root, recipes))[0])[0] == "tested", "and is tested again"
    (run.logs / "test.npz").unlink()
    assert find(jobs_of(plan_in(root, recipes))[0])[0] == "tested"


def test_of_several_runs_the_furthest_counts_and_never_the_better(compared, recipes, tmp_path):
    root = copy_of(compared, tmp_path)
    job = jobs_of(plan_in(root, recipes))[0]
    for kind in ("checkpoints", "logs"):
        shutil.copytree(root / kind / "none/version_0", root / kind / "none/version_7")
    better = json.loads((root / "logs/none/version_7/test.json").read_text()) | {"test/acc": 1.0}
    (root / "logs/none/version_7/test.json").write_text(json.dumps(better))
    assert find(job)[1].version == 0
    (root / "logs/none/version_0/test.json").unlink()
    assert find(job)[1].version == 7


def test_a_run_that_can_be_tested_comes_before_one_whose_checkpoints_are_gone(compared, recipes, tmp_path):
    root = copy_of(compared, tmp_path)
    job = jobs_of(plan_in(root, recipes))[0]
    for kind in ("checkpoints", "logs"):
        shutil.copytree(root / kind / "none/version_0", root / kind / "none/version_7")
    for version in (0, 7):
        (root / f"logs/none/version_{version}/test.npz").unlink()  # tested, with fewer figures
    shutil.rmtree(root / "checkpoints/none/version_0")
    assert [find(job)[0], find(job)[1].version] == ["tested", 7]
    (root / "logs/none/version_7/test.json").unlink()
    assert [find(job)[0], find(job)[1].version] == ["trained", 7]
    shutil.rmtree(root / "logs/none/version_7")
    assert [find(job)[0], find(job)[1].version] == ["tested", 0]


def test_of_several_interrupted_runs_the_furthest_is_resumed(compared, recipes, tmp_path):
    root = copy_of(compared, tmp_path)
    job = jobs_of(plan_in(root, recipes, "--trainer.max_epochs", 3))[0]
    for version, epochs in ((0, 1), (7, 2), (8, 2)):
        logs, checkpoints = (root / kind / f"none/version_{version}" for kind in ("logs", "checkpoints"))
        if version:
            shutil.copytree(root / "logs/none/version_0", logs)
            shutil.copytree(root / "checkpoints/none/version_0", checkpoints)
        text = (compared[0] / "logs/none/version_0/config.yaml").read_text()
        (logs / "config.yaml").write_text(text.replace("max_epochs: 2", "max_epochs: 3"))
        last = torch.load(checkpoints / "last.ckpt", weights_only=True)
        last["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] = epochs
        torch.save(last, checkpoints / "last.ckpt")
    state, run = find(job)
    assert (state, run.version) == ("interrupted", 7)
    os.utime(root / "logs/none/version_0/config.yaml", (4e9, 4e9))
    assert begun_last(job).version == 0, "the one whose progress is shown"


def test_a_run_that_a_resume_changed_is_another(compared, recipes, tmp_path):
    root = copy_of(compared, tmp_path)
    job, config = jobs_of(plan_in(root, recipes))[0], root / "logs/none/version_0/config.yaml"
    assert find(job)[0] == "done"
    config.write_text(f"# resumed after 1 epochs, max_epochs: 2 now, 1 before\n{config.read_text()}")
    assert find(job) == ("new", None)
    (line,) = left_out(job)
    assert line.endswith("none/version_0 is left out: resumed after 1 epochs, max_epochs: 2 now, 1 before")


def test_a_finished_run_without_its_last_checkpoint_is_only_tested(compared, recipes, tmp_path):
    root = copy_of(compared, tmp_path)
    (root / "checkpoints/none/version_0/last.ckpt").unlink()
    assert find(jobs_of(plan_in(root, recipes))[0])[0] == "done"
    assert find(jobs_of(plan_in(root, recipes, "--corruptions", "fog"))[0])[0] == "tested"
    (root / "logs/none/version_0/test.json").unlink()
    assert find(jobs_of(plan_in(root, recipes))[0])[0] == "trained"


def test_an_interrupted_job_resumes_and_ends_like_one_that_was_not(compared, recipes, quick, tmp_path):
    root = copy_of(compared, tmp_path)
    job = jobs_of(plan_in(root, recipes))[2]
    assert (job.name, job.seed) == ("none", 1)
    whole = json.loads((root / "logs/none/version_1/test.json").read_text())
    shutil.rmtree(root / "logs/none/version_1")
    shutil.rmtree(root / "checkpoints/none/version_1")
    shutil.rmtree(root / "report")  # of three recipes
    plan_in(root, recipes).claim_output()

    def die_in_the_second_epoch(self, trainer, pl_module):
        if trainer.current_epoch:
            raise SystemExit(9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterruptCheckpoint, "on_train_epoch_start", die_in_the_second_epoch)
        failure = run_job(job)
    assert failure == "fit ended with status 9"
    state, run = find(job)
    assert state == "interrupted"
    quick.clear()
    assert run_job(job) is None
    assert find(job) == ("done", run)
    assert [call[2] for call in quick] == ["fit", "test"]
    again = json.loads((run.logs / "test.json").read_text())
    elsewhere = {"environment": 0, "saved_at": 0}
    assert again | elsewhere == whole | elsewhere


def test_a_job_runs_in_processes_of_its_own_and_says_why_it_failed(recipes, processes, tmp_path, monkeypatch):
    program = tmp_path / "python"  # as the recipe is not written, `fit` would say this, once it has imported torch
    program.write_text('#!/bin/sh\necho "epoch 1"\necho "error: $5 does not exist" >&2\nexit 2\n')
    program.chmod(0o755)
    monkeypatch.setattr(jobs_module.sys, "executable", str(program))
    job = jobs_of(plan_in(tmp_path, recipes))[0]
    stop = threading.Event()
    (future,) = start_locally([job], [{}], stop).values()
    failure = future.result()
    assert failure.startswith("fit ended with status 2: ")
    assert "none.yaml" in failure
    assert failure.removeprefix("fit ended with status 2: ") in job.log.read_text()
    stop.set()
    (future,) = start_locally([job], [{}], stop).values()
    assert future.result() == STOPPED, "nothing begins once all is stopped"


# Runs that others are training


def test_a_job_of_another_comparison_is_waited_for(recipes, tmp_path, monkeypatch):
    job = jobs_of(plan_in(tmp_path, recipes))[0]
    other = jobs_of(plan_in(tmp_path, recipes, "--pictures_every", 7))[0]  # which changes nothing in the result
    monkeypatch.setattr(jobs_module, "find", lambda job: ("done", None))
    monkeypatch.setattr(jobs_module, "_train_and_test", lambda job, call: None)
    job.log.parent.mkdir(parents=True)
    ended = threading.Event()
    with FileLock(job.log.with_suffix(".lock")):
        ours = threading.Thread(target=lambda: (run_job(other), ended.set()))
        ours.start()
        assert not ended.wait(0.5)
    assert ended.wait(10)
    ours.join()


@pytest.mark.slow
def test_a_run_that_fit_is_training_is_waited_for_and_then_only_tested(recipes, quick, command, launch, tmp_path):
    root, epochs = tmp_path, ["--trainer.max_epochs", 12]
    fit = ["fit", "--config", recipes["none"], "--seed", 0, *epochs, "--trainer.default_root_dir", root]
    theirs = launch(tmp_path / "fit.log", *fit)
    config = root / "logs/none/version_0/config.yaml"
    limit = time.monotonic() + 120
    while not config.exists():
        assert theirs.is_alive(), (tmp_path / "fit.log").read_text()
        assert time.monotonic() < limit
        time.sleep(0.01)
    quick.clear()
    options = ["--configs", recipes["none"], recipes["se"], "--seeds", 0, "--jobs", 1, "--output", root / "report"]
    outcome = command("compare", *options, *epochs, "--trainer.default_root_dir", root)
    theirs.join(60)
    assert theirs.exitcode == 0
    assert outcome.status == 0, outcome.err
    assert quick == [["none", 0, "test"], ["se", 0, "fit"], ["se", 0, "test"]]
    assert [path.name for path in (root / "checkpoints/none").iterdir()] == ["version_0"]


@pytest.mark.parametrize("lock", ["job", "run"])
def test_waiting_ends_when_all_is_stopped(compared, recipes, quick, lock, tmp_path):
    root = copy_of(compared, tmp_path)
    job = jobs_of(plan_in(root, recipes))[0]
    shutil.rmtree(root / "checkpoints/none/version_0")
    (root / "logs/none/version_0/test.json").unlink()  # so that there is something to train
    quick.clear()
    stop = threading.Event()
    with FileLock(job.log.with_suffix(".lock") if lock == "job" else root / "logs/none/version_0/.lock"):
        (future,) = start_locally([job], [{}], stop).values()
        time.sleep(0.5)
        assert not future.done()
        stop.set()
        assert future.result(10) == STOPPED
    assert not quick


@pytest.mark.slow
def test_ctrl_c_ends_a_comparison_that_waits(recipes, tmp_path):
    words = ["--configs", recipes["none"], recipes["cbam"], "--seeds", 0, "--output", tmp_path / "report"]
    words += ["--trainer.default_root_dir", tmp_path, "--jobs", 2]
    plan = plan_of(*words)
    locks = [FileLock(job.log.with_suffix(".lock")) for job in jobs_of(plan)]
    for lock in locks:
        Path(lock.lock_file).parent.mkdir(parents=True)
        lock.acquire()
    script = [sys.executable, "train.py", "compare", *map(str, words)]
    with subprocess.Popen(script, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for kind in ("none", "cbam"):
            assert process.stderr.readline() == f"{kind} seed 0: running\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped; the same command goes on from there"
    assert not list(tmp_path.glob("logs/*/version_*")), "nothing was trained"


# Runs with few steps, and runs that vanish


@pytest.mark.slow
def test_a_budget_below_one_epoch_is_trained_tested_and_found_again(recipes, quick, command, tmp_path):
    options = [
        "--configs",
        recipes["none"],
        recipes["cbam"],
        "--seeds",
        0,
        "--jobs",
        1,
        "--output",
        tmp_path / "report",
    ]
    options += ["--trainer.default_root_dir", tmp_path, "--trainer.max_steps", 3]  # of 6 steps in an epoch
    for calls in (4, 0):
        quick.clear()
        outcome = command("compare", *options)
        assert outcome.status == 0, outcome.err
        assert len(quick) == calls
    content = json.loads((tmp_path / "report/report.json").read_text())
    for run in content["runs"]:
        best = torch.load(tmp_path / f"checkpoints/{run['recipe']}/version_0/best.ckpt", weights_only=True)
        assert best["global_step"] == 3
        assert run["val_acc"] == pytest.approx(100 * best["figures"]["val/acc"])
        assert 0 <= run["val_acc"] <= 100


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in its training", "after its training"])
def test_a_run_that_is_deleted_is_reported_in_one_line(moment, recipes, quick, command, tmp_path, monkeypatch):
    ordinary, logs = jobs_module._call, tmp_path / "logs/se/version_0"

    def delete(self, trainer, pl_module):
        if trainer.current_epoch:
            shutil.rmtree(logs, ignore_errors=True)

    def call(job, environment, stop, arguments):
        with pytest.MonkeyPatch.context() as patch:
            if job.name == "se" and moment == "in its training":
                patch.setattr(InterruptCheckpoint, "on_train_epoch_start", delete)
            failure = ordinary(job, environment, stop, arguments)
        if job.name == "se" and arguments[0] == "fit":
            shutil.rmtree(logs, ignore_errors=True)
        return failure

    monkeypatch.setattr(jobs_module, "_call", call)
    options = ["--configs", recipes["none"], recipes["se"], "--seeds", 0, "--jobs", 1, "--output", tmp_path / "report"]
    outcome = command("compare", *options, "--trainer.default_root_dir", tmp_path)
    assert outcome.status == 2
    error = outcome.err.splitlines()[-1]
    if moment == "in its training":
        (log,) = logs.parent.glob("job-*.log")
        assert log.read_text().splitlines()[-1] == f"error: {logs} was deleted or moved meanwhile; start the run again"
        assert error.startswith("error: 1 of 2 runs failed: se seed 0: fit ended with status 2; ")
    else:
        reason = f"its run is no longer in {logs.parent}; it was deleted or changed meanwhile; "
        assert error.startswith(f"error: 1 of 2 runs failed: se seed 0: {reason}")
    assert (tmp_path / "report/report.md").exists()


# Places, and what is shown


def places(jobs, **trainer):
    return environments(
        SimpleNamespace(configs={"a": {f"trainer.{key}": value for key, value in trainer.items()}}), jobs
    )


def test_places_on_cpu_do_not_change_the_threads_of_a_job(monkeypatch):
    monkeypatch.setattr(jobs_module, "num_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert places(None, accelerator="cpu") == [{"OMP_NUM_THREADS": "1"}] * 8
    assert places(3, accelerator="cpu") == [{"OMP_NUM_THREADS": "1"}] * 3
    assert len(places(None, accelerator="cpu", devices=2)) == 4  # each job has two processes
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert places(None, accelerator="cpu") == [{"OMP_NUM_THREADS": "4"}] * 2


def test_each_gpu_has_one_job_unless_more_are_asked_for(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert places(None) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [one["CUDA_VISIBLE_DEVICES"] for one in places(3)] == ["3", "5", "3"]
    assert places(None, devices=4) == places(None, devices=[1]) == [{}]


def test_a_line_with_the_best_epoch_is_printed_for_each_job_that_begins_or_ends(compared, recipes, capsys, tmp_path):
    root = shutil.copytree(compared[0], tmp_path / "copy")
    for kind in ("checkpoints", "logs"):
        (root / kind / "none").rename(root / kind / "none[v1]")
    path = tmp_path / "none[v1].yaml"
    shutil.copy(recipes["none"], path)
    metrics = root / "logs/none[v1]/version_0/metrics.csv"
    header, *rows = metrics.read_text().splitlines()
    accuracies = ["0.75", *["0.5"] * (len(rows) - 1)]
    rows = [",".join([row.rpartition(",")[0], value]) for row, value in zip(rows, accuracies, strict=True)]
    metrics.write_text("\n".join([header, *rows]))
    jobs = jobs_of(plan_in(root, {"none": path, "cbam": recipes["cbam"]}, "--seeds", 0, 1, 2))
    futures = {job: Future() for job in jobs}
    look = watch(futures, remote=False, seconds=0.01)
    first, second, third, fourth, *others = futures.values()
    for change in (
        lambda: first.set_running_or_notify_cancel(),
        lambda: (first.set_result(None), second.set_running_or_notify_cancel()),
        lambda: (second.set_result("no memory"), fourth.set_running_or_notify_cancel()),
        lambda: (third.set_exception(OSError("disk")), *(one.set_result(STOPPED) for one in (fourth, *others))),
    ):
        next(look)
        change()
    assert list(look) == []
    best = []
    for name, version in (("none[v1]", 0), ("cbam", 0), ("none[v1]", 1), ("cbam", 1)):
        rows = (root / f"logs/{name}/version_{version}/metrics.csv").read_text().splitlines()[1:]
        best.append(f"best val/acc {100 * max(float(row.split(',')[-1]) for row in rows):.2f} %")
    assert best[0] == "best val/acc 75.00 %"
    assert capsys.readouterr().err.splitlines() == [
        f"none[v1] seed 0: running, {best[0]}",
        f"none[v1] seed 0: done, {best[0]}",
        f"cbam seed 0: running, {best[1]}",
        f"cbam seed 0: failed, {best[1]}",
        f"cbam seed 1: running, {best[3]}",
        f"none[v1] seed 1: failed, {best[2]}",
        f"cbam seed 1: stopped, {best[3]}",
    ]
