"""One job a recipe and seed: found by its files, trained, tested, and watched while it runs."""

import csv
import fcntl
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from cbam_pl.commands.compare.plan import Plan, flatten, same_settings
from cbam_pl.training.run import Run

State = Literal["new", "cut off", "trained", "done"]


@dataclass(frozen=True, eq=False)
class Job:
    """The run of one recipe with one seed.

    Args:
        name: of the recipe.
        seed: of the run.
        config: file that `fit --config` reads.
        settings: as `fit` saves them, by key with dots, with the seed.
        defaults: value of each setting that a saved run may lack.
        root: folder that holds checkpoints and logs, absolute.
        folder: where the commands run, absolute.
    """

    name: str
    seed: int
    config: Path
    settings: dict[str, Any]
    defaults: dict[str, Any]
    root: Path
    folder: Path

    @property
    def epochs(self) -> int:
        """Epochs of the whole training."""
        return self.settings["trainer.max_epochs"]

    @property
    def log(self) -> Path:
        """What the job's commands print; also its lock, so the same for every comparison that has this job."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        return self.root / "logs" / self.name / f"job-seed{self.seed}-{digest}.log"

    @property
    def test_options(self) -> list[str]:
        """Options of `test`, beside the checkpoint."""
        given = {key: self.settings.get(f"trainer.{key}") for key in ("accelerator", "precision")}
        return [word for key, value in given.items() if value for word in (f"--trainer.{key}", str(value))]


def jobs_of(plan: Plan) -> list[Job]:
    """Every recipe with every seed: seed by seed, so that pairs are complete early."""
    folder = Path.cwd()
    return [
        Job(
            name,
            seed,
            plan.config_file(name).absolute(),
            {**settings, "seed": seed},
            plan.defaults,
            plan.root.absolute(),
            folder,
        )
        for seed in plan.seeds
        for name, settings in plan.configs.items()
    ]


def find(job: Job) -> tuple[State, Run | None]:
    """How far the job is, and its run, from the files alone.

    Of several runs with the job's settings the furthest counts, and of those the first; never the better result.
    """
    order: list[State] = ["new", "cut off", "trained", "done"]
    best: tuple[State, Run | None] = ("new", None)
    for run in _runs_of(job):
        state = _state(run, job)
        if order.index(state) > order.index(best[0]):
            best = state, run
    return best


def _runs_of(job: Job) -> list[Run]:
    runs = []
    for file in (job.root / "logs" / job.name).glob("version_*/config.yaml"):
        number = file.parent.name.removeprefix("version_")
        if number.isdigit() and same_settings(
            _saved_settings(file, file.stat().st_mtime_ns), job.settings, job.defaults
        ):
            runs.append(Run(job.root, job.name, int(number)))
    return sorted(runs, key=lambda run: run.version)


_SAVED: dict[tuple[Path, int], dict[str, Any]] = {}  # a live table asks for them again and again


def _saved_settings(file: Path, written: int) -> dict[str, Any]:
    if (file, written) not in _SAVED:
        try:
            content = yaml.safe_load(file.read_text())
        except (OSError, ValueError, yaml.YAMLError):
            content = None
        # A file that is not a run's has no settings, so it is no job's.
        _SAVED[file, written] = flatten(content) if isinstance(content, dict) else {"broken": True}
    return _SAVED[file, written]


def _state(run: Run, job: Job) -> State:
    last, best = (_progress(run.checkpoints / f"{name}.ckpt") for name in ("last", "best"))
    if last is None:
        return "new"  # nothing to resume from
    limit = job.settings.get("trainer.max_steps", -1)
    if last["epochs"] < job.epochs and not 0 <= limit <= last["steps"]:
        return "cut off"
    if best is None:
        return "new"
    try:
        tested = json.loads((run.logs / "test.json").read_text())
    except (OSError, ValueError):
        return "trained"
    same = tested.get("epoch") == best["epoch"] and tested.get("options") == job.test_options
    return "done" if same else "trained"


def _progress(path: Path) -> dict[str, int] | None:
    """Whole epochs, steps and the epoch of a checkpoint, without its weights; None where there is none."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {
            "epochs": checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"],
            "steps": checkpoint["global_step"],
            "epoch": checkpoint["epoch"] + 1,
        }
    except Exception:  # whatever is wrong with the file, it is not there for us; `fit` says more
        return None


@dataclass(frozen=True)
class Failure:
    """Why a job did not end.

    Args:
        reason: what it said last.
        stopped: whether it was stopped from outside, rather than failed.
    """

    reason: str
    stopped: bool = False


def run_job(job: Job, environment: dict[str, str] | None = None, stop: "Stop | None" = None) -> Failure | None:
    """Bring a job to its end, from wherever it is: train, resume, test, or nothing.

    Args:
        job: the job.
        environment: variables of its processes, beside those of this one.
        stop: ends its processes early.

    Returns:
        What went wrong, or None.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log:
        # Whoever else has this job is waited for; its processes hold the lock, too, through their output.
        fcntl.flock(log, fcntl.LOCK_EX)
        call = partial(_call, job, log, environment or {}, stop)
        state, run = find(job)
        if state in ("new", "cut off"):
            resume = [] if run is None else ["--ckpt_path", str(run.checkpoints / "last.ckpt")]
            failure = call(["fit", "--config", str(job.config), "--seed", str(job.seed), *resume])
            if failure is not None:
                return failure
            state, run = find(job)
            if state == "cut off":
                return Failure("the training was stopped", stopped=True)
        if state == "trained" and run is not None:
            failure = call(["test", "--ckpt_path", str(run.checkpoints / "best.ckpt"), *job.test_options])
            if failure is not None:
                return failure
            state, run = find(job)
        return None if state == "done" else Failure("its run was not found afterwards")


class Stop:
    """Ends the processes of all jobs, each with its state saved, and lets no new one begin."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen] = set()
        self.stopped = False

    def add(self, start: Callable[[], subprocess.Popen]) -> subprocess.Popen | None:
        """Start a process, unless all was stopped."""
        with self._lock:
            if self.stopped:
                return None
            child = start()
            self._children.add(child)
            return child

    def now(self) -> None:
        """End them."""
        with self._lock:
            self.stopped = True
            for child in self._children:
                if child.stdin and not child.stdin.closed:
                    child.stdin.close()  # see child.py


def _call(
    job: Job, log: Any, environment: dict[str, str], stop: Stop | None, arguments: Sequence[str]
) -> Failure | None:
    """One command in a process of its own; what it prints goes to the job's log."""
    begin = job.log.stat().st_size
    package = str(Path(__file__).parents[3])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    start = partial(
        subprocess.Popen,
        [sys.executable, "-m", "cbam_pl.commands.compare.child", *arguments],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        cwd=job.folder,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )
    child = (stop or Stop()).add(start)
    status = -15 if child is None else child.wait()
    if status == 0:
        return None
    if status in (130, 143, -2, -15):
        return Failure("it was stopped", stopped=True)
    with job.log.open(errors="replace") as stream:
        stream.seek(begin)
        lines = [line.strip() for line in stream if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    reason = errors[-1].removeprefix("error: ") if errors else lines[-1] if lines else "it said nothing"
    return Failure(f"{arguments[0]} ended with status {status}: {reason}")


# Where jobs run


def threads_per_job() -> int:
    """CPU threads of each job, whatever the number of jobs, as sums in another order round otherwise.

    One, unless OMP_NUM_THREADS says otherwise: threads of one job wait for one another at every layer, jobs do not.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else 1


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def uses_cuda(plan: Plan) -> bool:
    """Whether the jobs run on GPUs."""
    wanted = {settings.get("trainer.accelerator", "auto") for settings in plan.configs.values()}
    return torch.cuda.is_available() and bool(wanted & {"auto", "gpu", "cuda"})


def environments(jobs: int | None, cuda: bool, devices: Any, bytes_per_job: int = 0) -> list[dict[str, str]]:
    """The variables of each place where a job may run.

    Args:
        jobs: how many at once; None: one for each core, or as many as fit on the GPUs, at most four on each.
        cuda: whether they run on GPUs.
        devices: trainer.devices.
        bytes_per_job: GPU memory that the largest job needs.
    """
    if not cuda:
        threads = threads_per_job()
        count = devices if isinstance(devices, int) and devices > 0 else 1
        places = jobs or max(1, num_cores() // (threads * count))
        return [{"OMP_NUM_THREADS": str(threads)}] * places
    if devices != 1:
        return [{}] * (jobs or 1)  # each job takes several GPUs, and Lightning chooses which
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if jobs is None:
        free = min(torch.cuda.mem_get_info(index)[0] for index in range(len(names)))
        jobs = len(names) * max(1, min(4, int(0.8 * free) // max(bytes_per_job, 1)))
    return [{"CUDA_VISIBLE_DEVICES": names[index % len(names)]} for index in range(jobs)]


def start_locally(jobs: Iterable[Job], places: Sequence[dict[str, str]], stop: Stop) -> dict[Job, Future]:
    """Run jobs on this machine, as many at once as there are places."""
    free: queue.Queue[dict[str, str]] = queue.Queue()
    for place in places:
        free.put(place)

    def run(job: Job) -> Failure | None:
        place = free.get()
        try:
            return run_job(job, place, stop)
        finally:
            free.put(place)

    pool = ThreadPoolExecutor(len(places))
    return {job: pool.submit(run, job) for job in jobs}


# Watching


def read_epochs(run: Run) -> list[dict[str, float]]:
    """The rows of metrics.csv so far, one an epoch."""
    try:
        with (run.logs / "metrics.csv").open(newline="") as stream:
            rows = {int(row["epoch"]): row for row in csv.DictReader(stream)}
    except (OSError, ValueError, KeyError, TypeError):
        return []  # not there yet, or in the midst of being written
    return [{name: float(value or "nan") for name, value in rows[epoch].items()} for epoch in sorted(rows)]


class Watch:
    """What is shown while jobs run: a live table on a terminal, elsewhere a line for each job that begins or ends.

    Args:
        jobs: all jobs.
        places: how many run at once.
        remote: whether they run on a cluster, which does not say when it begins one.
    """

    def __init__(self, jobs: Sequence[Job], places: int, remote: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self._jobs = jobs
        self._places = places
        self._remote = remote
        self._states: dict[tuple[str, int], str] = {}
        self._began: dict[tuple[str, int], tuple[float, int]] = {}  # time and epochs when first seen running

    def follow(self, futures: dict[Job, Future], seconds: float = 1.0) -> None:
        """Show the jobs until the last has ended."""
        from rich.live import Live

        live: AbstractContextManager[Any] = nullcontext()
        if self.console.is_terminal:
            live = Live(console=self.console, auto_refresh=False, transient=True)
        with live as shown:
            while True:
                ended = all(future.done() for future in futures.values())
                table = self._look(futures)
                if shown is not None:
                    shown.update(table, refresh=True)
                if ended:
                    return
                # Ends early when the last job does.
                pending = [future for future in futures.values() if not future.done()]
                _wait(pending, seconds)

    def _look(self, futures: dict[Job, Future]) -> Any:
        from rich.table import Table

        table = Table("recipe", "seed", "state", "epoch", "val/acc", "time left")
        rows, left, speed = [], 0.0, []
        for job in self._jobs:
            key, future = (job.name, job.seed), futures[job]
            runs = _runs_of(job)
            epochs = read_epochs(runs[-1]) if runs else []
            state = "waiting"
            remaining = job.epochs - len(epochs)
            if future.done():
                failure = future.exception() or future.result()
                state = "done" if failure is None else "stopped" if getattr(failure, "stopped", False) else "failed"
                remaining = 0
            elif future.running() or (self._remote and runs):
                state = "running"
                began, before = self._began.setdefault(key, (time.monotonic(), len(epochs)))
                if len(epochs) > before:
                    speed.append((time.monotonic() - began) / (len(epochs) - before))
            left += remaining
            accuracy = f"{100 * epochs[-1]['val/acc']:.2f} %" if epochs and "val/acc" in epochs[-1] else ""
            time_left = _clock(speed[-1] * remaining) if state == "running" and speed and remaining else ""
            rows.append((state, [job.name, str(job.seed), state, f"{len(epochs)}/{job.epochs}", accuracy, time_left]))
            if state != self._states.get(key, "waiting") and not self.console.is_terminal:
                self.console.print(f"{job.name} seed {job.seed}: {state} {accuracy}".rstrip(), highlight=False)
            self._states[key] = state
        room = self.console.height - 8
        hidden = ("done", "waiting") if len(rows) > room else ()
        for state, row in rows:
            if state not in hidden:
                table.add_row(*row)
        counts = {state: sum(one == state for one, _ in rows) for state in dict(rows)}
        table.caption = ", ".join(f"{count} {state}" for state, count in counts.items())
        if speed and left:
            table.caption += f"; about {_clock(sum(speed) / len(speed) * left / self._places)} left"
        return table


def _wait(futures: Sequence[Future], seconds: float) -> None:
    from concurrent.futures import ALL_COMPLETED, wait

    wait(futures, timeout=seconds, return_when=ALL_COMPLETED)


def _clock(seconds: float) -> str:
    minutes = int(seconds) // 60
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {int(seconds) % 60:02} s"


def failures_of(futures: dict[Job, Future]) -> dict[Job, Failure]:
    """The jobs that have not reached their end."""
    failures = {}
    for job, future in futures.items():
        error = future.exception()
        failure = future.result() if error is None else Failure(f"{type(error).__name__}: {error}")
        if failure is not None:
            failures[job] = failure
    return failures
