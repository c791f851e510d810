"""One job for each recipe and seed: find its run by its files, train and test it, here or on a Ray cluster."""

import hashlib
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import BadZipFile

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout

from cbam_pl.commands.compare.plan import Plan, flatten, same_settings, trusted, with_effect
from cbam_pl.commands.robustness import decisive_options, read_robustness
from cbam_pl.data.corruptions import SEVERITIES
from cbam_pl.environment import num_cores
from cbam_pl.errors import UserError
from cbam_pl.inspect.curves import read_metrics
from cbam_pl.training.run import RESUMED, Run, is_result_of, read_json
from cbam_pl.training.schema import completed_epochs

State = Literal[
    "new", "interrupted", "trained", "tested", "done"
]  # tested: without the calibration, predictions or corruptions that the report needs
STOPPED = "it was stopped"
_POLL_SECONDS = 1.0
_PACKAGE = str(Path(__file__).parents[3])  # the folder that holds cbam_pl


@dataclass(frozen=True, eq=False)
class Job:
    """The run of one recipe with one seed."""

    name: str  # of the recipe
    seed: int
    config: Path  # for `fit --config`
    settings: dict[str, Any]  # as `fit` saves them, by dotted key, with the seed
    defaults: dict[str, Any]  # of the settings that a saved run may lack
    folder: Path  # where the commands run, absolute
    corruptions: tuple[str, ...] = ()  # of images to test on, too

    @property
    def root(self) -> Path:
        """Folder that holds checkpoints and logs, absolute."""
        return self.folder / self.settings["trainer.default_root_dir"]

    @property
    def epochs(self) -> int:
        """Epochs of the whole training."""
        return self.settings["trainer.max_epochs"]

    @property
    def log(self) -> Path:
        """What the job's commands print; the same for every comparison that has this job, as is the lock beside it."""
        text = json.dumps(with_effect(self.settings), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return self.root / "logs" / self.name / f"job-seed{self.seed}-{digest}.log"

    @property
    def test_options(self) -> list[str]:
        """Options of `test`, besides the checkpoint."""
        given = {key: self.settings.get(f"trainer.{key}") for key in ("accelerator", "precision")}
        words = [word for key, value in given.items() if value for word in (f"--trainer.{key}", str(value))]
        trust = trusted(self.settings)
        return [*words, *(["--trust", *trust] if trust else [])]


def jobs_of(plan: Plan) -> list[Job]:
    """Every recipe with every seed: seed by seed, so that pairs are complete early."""
    same = plan.defaults, Path.cwd(), plan.corruptions
    return [
        Job(name, seed, plan.config_file(name).absolute(), {**settings, "seed": seed}, *same)
        for seed in plan.seeds
        for name, settings in plan.configs.items()
    ]


def find(job: Job) -> tuple[State, Run | None]:
    """The job's state, and its run, from the files alone.

    Of several runs with the job's settings the most advanced counts, and of those the first; never the better result.
    """

    def progress(found: tuple[State, Run]) -> tuple[bool, int, int]:
        state, run = found
        epochs = (read_progress(run, "last") or {}).get("epochs", 0) if state == "interrupted" else 0
        may_be_done = state != "tested" or run.best.exists()
        return may_be_done, get_args(State).index(state), epochs

    found = [(state, run) for run in runs_of(job) if (state := _state(run, job)) != "new"]
    return max(found, key=progress, default=("new", None))


def begun_last(job: Job) -> Run | None:
    """The run with the job's settings that `fit` began or resumed last: the one that it trains while the job runs."""
    times = {}
    for run in runs_of(job):
        with suppress(OSError):  # deleted at this moment
            times[run.version] = (run.logs / "config.yaml").stat().st_mtime_ns, run
    return max(times.values(), key=lambda one: one[0], default=(0, None))[1]


def runs_of(job: Job) -> list[Run]:
    """The runs with the job's settings, whoever started them, the oldest first; without those that a resume changed."""
    return [run for run, change in _runs_with_changes(job) if not change]


def left_out(job: Job) -> list[str]:
    """A line for each run that has the job's settings, but not their result, since a resume changed it."""
    return [f"{run.logs} is left out: {change}" for run, change in _runs_with_changes(job) if change]


def _runs_with_changes(job: Job) -> list[tuple[Run, str]]:
    runs = []
    for file in (job.root / "logs" / job.name).glob("version_*/config.yaml"):
        number = file.parent.name.removeprefix("version_")
        with suppress(OSError):  # deleted at this moment
            saved, change = _read_config(file, file.stat().st_mtime_ns)
            if number.isdigit() and same_settings(saved, job.settings, job.defaults):
                runs.append((Run(job.root, job.name, int(number)), change))
    return sorted(runs, key=lambda one: one[0].version)


@cache
def _read_config(file: Path, written: int) -> tuple[dict[str, Any], str]:
    """The settings of a run by dotted key, and the first thing that a resume changed, if any.

    `written`, the file's time of modification, makes the cache read a changed file again.
    """
    try:
        text = file.read_text()
        content = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return {}, ""
    change = text.partition("\n")[0].removeprefix("# ") if text.startswith(RESUMED) else ""
    return flatten(content) if isinstance(content, dict) else {}, change


def _state(run: Run, job: Job) -> State:
    last, best, tested = read_progress(run, "last"), read_best(run), read_test(run)
    limit = job.settings.get("trainer.max_steps", -1)
    if last is not None and last["epochs"] < job.epochs and not 0 <= limit <= last["steps"]:
        return "interrupted"
    is_of_best = best is not None and is_result_of(tested, best["epoch"], best.get("steps"))
    same = is_of_best and decisive_options(tested.get("options", [])) == decisive_options(job.test_options)
    predictions = read_predictions(run, tested)
    complete = "calibration" in tested and predictions is not None and _has_corruptions(run, job, tested)
    trained = last is not None or len(read_epochs(run)) == job.epochs
    if same and trained:
        return "done" if complete else "tested"  # whether its checkpoints are still there or not
    if not trained or read_progress(run, "best") is None:
        return "new"  # nothing to resume from, or to test
    return "trained"


def read_progress(run: Run, name: str) -> dict[str, Any] | None:
    """Completed epochs, steps, epoch (from 1) and val/acc of a checkpoint; None if it is missing or damaged."""
    path = run.checkpoints / f"{name}.ckpt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # without reading the weights
        return {
            "epochs": completed_epochs(checkpoint),
            "steps": checkpoint["global_step"],
            "epoch": checkpoint["epoch"] + 1,
            "val/acc": checkpoint["figures"].get("val/acc", float("nan")),
        }
    except Exception:  # many types, of torch and of the archive; `fit` says what is wrong with the file
        return None


def read_best(run: Run) -> dict[str, Any] | None:
    """Epoch (from 1) and val/acc of best.ckpt, or of the best row of metrics.csv if it was deleted; None without."""
    validated = [row for row in read_epochs(run) if "val/acc" in row]
    return read_progress(run, "best") or max(validated, key=lambda row: row["val/acc"], default=None)


def read_test(run: Run) -> dict[str, Any]:
    """The figures of the run's test; empty if there are none."""
    return read_json(run.logs / "test.json")


def read_predictions(run: Run, test: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The arrays (N,) of test.npz, and `correct`, 1.0 or 0.0; None where it is missing, damaged, or of another test."""
    try:
        with (run.logs / "test.npz").open("rb") as stream, np.load(stream) as file:
            arrays = {name: file[name] for name in file.files if name != "probabilities"}
        counts = np.zeros_like(test["confusion"])
        np.add.at(counts, (arrays["label"], arrays["predicted"]), 1)
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, BadZipFile, zlib.error):
        return None
    correct = (arrays["predicted"] == arrays["label"]).astype(np.float32)
    return arrays | {"correct": correct} if counts.tolist() == test["confusion"] else None


def _has_corruptions(run: Run, job: Job, test: dict[str, Any]) -> bool:
    """Whether the job's corruptions, if any, were measured at all severities."""
    accuracy = read_robustness(run.logs, test).get("accuracy", {}) if job.corruptions else {}
    return all(len(accuracy.get(name, {})) == len(SEVERITIES) for name in job.corruptions)


def read_epochs(run: Run) -> list[dict[str, float]]:
    """What the run has logged by epoch so far."""
    try:
        return read_metrics(run.logs)
    except (OSError, ValueError, KeyError, TypeError):
        return []  # missing, or being written


def run_job(job: Job, environment: dict[str, str] | None = None, stop: threading.Event | None = None) -> str | None:
    """Train, resume or test a job. Returns why it is not done, or None; STOPPED if it was stopped from outside."""
    stop = stop or threading.Event()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(job.log.with_suffix(".lock"))
    while not lock.is_locked:  # another comparison may be running this job
        if stop.is_set():
            return STOPPED
        with suppress(Timeout):
            lock.acquire(timeout=_POLL_SECONDS)
    try:
        # A `fit` may be training one of the job's runs. Its lock must be free again: the job's own `fit` takes it.
        while find(job)[0] in ("new", "interrupted") and any(map(_is_training, runs_of(job))):
            if stop.wait(_POLL_SECONDS):
                return STOPPED
        return _train_and_test(job, partial(_call, job, environment or {}, stop))
    finally:
        lock.release()


def _is_training(run: Run) -> bool:
    try:
        with FileLock(run.lock_file, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # deleted, or not writable
        return False


def _train_and_test(job: Job, call: Callable[[Sequence[str]], str | None]) -> str | None:
    state, run = find(job)
    if state in ("new", "interrupted"):
        resume = [] if run is None else ["--ckpt_path", str(run.last)]
        if failure := call(["fit", "--config", str(job.config), "--seed", str(job.seed), *resume]):
            return failure
        state, run = find(job)
    if state in ("trained", "tested") and run is not None:
        best = run.best
        if not best.exists():
            return f"{best} was deleted, so it cannot be tested again; to train it again, delete {run.logs}"
        corruptions = ["--corruptions", *job.corruptions] if job.corruptions else []
        test = ["test", "--ckpt_path", str(best), "--calibrate", *job.test_options, *corruptions]
        if failure := call(test):
            return failure
        state, run = find(job)
    if state == "interrupted":
        return f"the training ended before trainer.max_epochs={job.epochs}"
    if state != "done":
        return f"its run is no longer in {job.root / 'logs' / job.name}; it was deleted or changed meanwhile"
    return None


def _call(job: Job, environment: dict[str, str], stop: threading.Event, arguments: Sequence[str]) -> str | None:
    paths = os.pathsep.join([_PACKAGE, *filter(None, [os.environ.get("PYTHONPATH")])])
    with job.log.open("a") as log:
        begin = log.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "cbam_pl.commands.compare.child", *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=job.folder,
            env={**os.environ, "PYTHONPATH": paths, **environment},
        )
    with child:  # which closes its standard input and waits for its end: see child.py
        while child.poll() is None and not stop.wait(_POLL_SECONDS / 5):
            pass
    if child.returncode == 0:
        return None
    if child.returncode in (130, 143, -2, -15):
        return STOPPED
    with job.log.open(errors="replace") as stream:
        stream.seek(begin)
        lines = [line.strip() for line in stream if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    reason = errors[-1].removeprefix("error: ") if errors else lines[-1] if lines else "it printed nothing"
    return f"{arguments[0]} ended with status {child.returncode}: {reason}"


def failure_of(future: Future) -> str | None:
    """Why a job that has ended is not done."""
    error = future.exception()
    return future.result() if error is None else f"{type(error).__name__}: {error}"


def threads_per_job() -> int:
    """CPU threads of each job, whatever the number of jobs, since another number rounds sums in another order.

    One, unless OMP_NUM_THREADS says otherwise: threads of one job wait for one another at every layer, jobs do not.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else 1


def num_devices(settings: dict[str, Any]) -> int:
    """The devices that a run takes; 1 where Lightning chooses."""
    devices = settings.get("trainer.devices", 1)  # a number, a list or a word
    return len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) and devices > 0 else 1


def uses_cuda(plan: Plan) -> bool:
    """Whether the jobs run on GPUs."""
    wanted = {settings.get("trainer.accelerator", "auto") for settings in plan.configs.values()}
    return torch.cuda.is_available() and bool(wanted & {"auto", "gpu", "cuda"})


def environments(plan: Plan, jobs: int | None) -> list[dict[str, str]]:
    """The variables of each place where a job may run: so many `jobs` at once, or one per GPU, or as cores allow."""
    if not uses_cuda(plan):
        threads, processes = threads_per_job(), max(map(num_devices, plan.configs.values()))
        return [{"OMP_NUM_THREADS": str(threads)}] * (jobs or max(1, num_cores() // (threads * processes)))
    if any(settings.get("trainer.devices", 1) != 1 for settings in plan.configs.values()):
        return [{}] * (jobs or 1)  # each job takes those that it names, or several, which Lightning chooses
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return [{"CUDA_VISIBLE_DEVICES": names[index % len(names)]} for index in range(jobs or len(names))]


def start_locally(jobs: Iterable[Job], places: Sequence[dict[str, str]], stop: threading.Event) -> dict[Job, Future]:
    """Run jobs on this machine, as many at once as there are places."""
    unused, here = iter(places), threading.local()
    # Each thread of the pool has a place of its own.
    pool = ThreadPoolExecutor(len(places), initializer=lambda: setattr(here, "place", next(unused)))
    return {job: pool.submit(lambda job: run_job(job, here.place, stop), job) for job in jobs}


def start_on_ray(jobs: Sequence[Job], address: str) -> dict[Job, Future]:
    """Start all jobs on the cluster at `address`; each takes one GPU if the cluster has any, else a core.

    Each is a task, which Ray starts again elsewhere when its machine is lost. The machines share the file system that
    holds the program, the data, checkpoints and logs, so it continues from the last checkpoint, whoever wrote it.
    """
    try:
        ray: Any = importlib.import_module("ray")  # optional, and slow to import
    except ImportError as error:
        raise UserError("--ray needs Ray: pip install ray") from error
    threads = str(threads_per_job())
    try:
        host, colon, port = address.rpartition(":")
        if colon and "/" not in address:  # where nothing listens, Ray would wait for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": _PACKAGE}})
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address}: {error}; start one (ray start --head --port 6379)") from error
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    # Endless retries: Ray repeats a task only where its machine or process was lost. A job that fails says so.
    task = ray.remote(num_cpus=int(threads), num_gpus=gpus, max_retries=-1)(run_job)
    return {job: task.remote(job, {"OMP_NUM_THREADS": threads}).future() for job in jobs}
