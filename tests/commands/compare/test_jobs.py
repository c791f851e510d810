import fcntl
import json
import shutil
import threading
from concurrent.futures import Future

import pytest
import torch

from cbam_pl.commands.compare import jobs as jobs_module
from cbam_pl.commands.compare.jobs import (
    Failure,
    Stop,
    Watch,
    environments,
    failures_of,
    find,
    jobs_of,
    run_job,
    start_locally,
)
from cbam_pl.commands.compare.plan import nest
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.training.callbacks import InterruptCheckpoint
from tests.commands.compare.test_plan import plan_of


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
    for job in jobs_of(plan_in(root, recipes)):
        state, run = find(job)
        assert (state, run.recipe, run.version) == ("done", job.name, job.seed)
        assert (run.checkpoints / "best.ckpt").exists()
        assert (run.logs / "metrics.csv").exists()
    (other, *_) = jobs_of(plan_in(root, recipes, "--model.label_smoothing", 0.1))
    assert find(other) == ("new", None)


def test_the_files_tell_how_far_a_job_is(compared, recipes, tmp_path):
    root = copy_of(compared, tmp_path)
    job = jobs_of(plan_in(root, recipes))[0]
    logs, checkpoints = root / "logs/none/version_0", root / "checkpoints/none/version_0"

    tested = json.loads((logs / "test.json").read_text())
    (logs / "test.json").write_text(json.dumps(tested | {"options": ["--data.dataset", "shapes"]}))
    assert find(job)[0] == "trained", "it was tested, but not as the comparison does"
    (logs / "test.json").write_text(json.dumps(tested | {"epoch": 9}))
    assert find(job)[0] == "trained", "another checkpoint was tested"
    (logs / "test.json").unlink()
    assert find(job)[0] == "trained"

    last = torch.load(checkpoints / "last.ckpt", weights_only=True)
    last["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] = 1  # of 2 epochs
    torch.save(last, checkpoints / "last.ckpt")
    assert find(job)[0] == "cut off"
    (checkpoints / "last.ckpt").write_bytes(b"cut")
    assert find(job)[0] == "new"
    (logs / "config.yaml").write_text("not: [a run")
    assert find(job) == ("new", None)


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


def test_a_job_that_was_cut_off_resumes_and_ends_like_one_that_was_not(compared, recipes, quick, tmp_path):
    root = copy_of(compared, tmp_path)
    job = jobs_of(plan_in(root, recipes))[2]
    assert (job.name, job.seed) == ("none", 1)
    whole = json.loads((root / "logs/none/version_1/test.json").read_text())
    shutil.rmtree(root / "logs/none/version_1")
    shutil.rmtree(root / "checkpoints/none/version_1")
    plan = plan_in(root, recipes)
    plan.claim_output()

    def die_in_the_second_epoch(self, trainer, pl_module):
        if trainer.current_epoch:
            raise SystemExit(9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterruptCheckpoint, "on_train_epoch_start", die_in_the_second_epoch)
        failure = run_job(job)
    assert failure is not None
    assert not failure.stopped
    state, run = find(job)
    assert state == "cut off"
    quick.clear()
    assert run_job(job) is None
    assert find(job) == ("done", run)
    assert [call[2] for call in quick] == ["fit", "test"]
    again = json.loads((run.logs / "test.json").read_text())
    assert {**again, "environment": 0} == {**whole, "environment": 0}


def test_a_job_runs_in_processes_of_its_own_and_says_why_it_failed(recipes, processes, tmp_path):
    plan = plan_in(tmp_path, recipes)
    job = jobs_of(plan)[0]  # its recipe is not written, so that fit refuses
    stop = Stop()
    futures = start_locally([job], environments(1, False, 1), stop)
    failure = failures_of(futures)[job]
    assert failure.reason.startswith("fit ended with status 2: ")
    assert "none.yaml" in failure.reason
    assert not failure.stopped
    assert failure.reason.removeprefix("fit ended with status 2: ") in job.log.read_text()
    stop.now()
    assert failures_of(start_locally([job], [{}], stop))[job].stopped, "nothing begins once all is stopped"


def test_a_job_that_someone_else_has_is_waited_for(recipes, tmp_path, monkeypatch):
    job = jobs_of(plan_in(tmp_path, recipes))[0]
    monkeypatch.setattr(jobs_module, "find", lambda job: ("done", None))
    job.log.parent.mkdir(parents=True)
    ended = threading.Event()
    with job.log.open("a") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        ours = threading.Thread(target=lambda: (run_job(job), ended.set()))
        ours.start()
        assert not ended.wait(0.3)
    assert ended.wait(10)
    ours.join()


def test_places_on_cpu_do_not_change_the_threads_of_a_job(monkeypatch):
    monkeypatch.setattr(jobs_module, "num_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environments(None, False, 1) == [{"OMP_NUM_THREADS": "1"}] * 8
    assert environments(3, False, 1) == [{"OMP_NUM_THREADS": "1"}] * 3
    assert len(environments(None, False, 2)) == 4  # each job has two processes
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert environments(None, False, 1) == [{"OMP_NUM_THREADS": "4"}] * 2


def test_places_on_gpus_are_as_many_as_fit(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((10 << 30, 9 << 30)[index], 16 << 30))
    devices = [one["CUDA_VISIBLE_DEVICES"] for one in environments(None, True, 1, 3 << 30)]
    assert devices == ["0", "1", "0", "1"]  # 0.8 · 9 GiB are 2 of 3 GiB each
    assert len(environments(None, True, 1, 1 << 20)) == 8  # at most four on each
    assert len(environments(None, True, 1, 64 << 30)) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments(3, True, 1)] == ["3", "5", "3"]
    assert environments(None, True, 4) == [{}]


def test_the_table_shows_how_far_each_job_is(compared, recipes):
    root = compared[0]
    jobs = jobs_of(plan_in(root, recipes))
    futures = [Future() for _ in jobs]
    futures[0].set_result(None)
    futures[1].set_result(Failure("no memory"))
    futures[2].set_running_or_notify_cancel()
    watch = Watch(jobs, 1)
    watch.console.height = 100
    table = watch._look(dict(zip(jobs, futures, strict=True)))
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["recipe"] == ["none", "cbam", "none", "cbam"]
    assert columns["state"] == ["done", "failed", "running", "waiting"]
    assert columns["epoch"] == ["2/2"] * 4
    assert all(cell.endswith(" %") for cell in columns["val/acc"])
    assert table.caption == "1 done, 1 failed, 1 running, 1 waiting"
