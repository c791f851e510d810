"""What `compare` shows while jobs run: a bar for each on a terminal, and a line for each that begins or ends."""

from collections.abc import Iterator
from concurrent.futures import ALL_COMPLETED, Future, wait
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cbam_pl.commands.compare.jobs import STOPPED, Job, failure_of, read_epochs, runs_of


def watch(futures: dict[Job, Future], remote: bool, seconds: float = 1.0) -> Iterator[None]:
    """Show the jobs until the last one has ended; yields at every look at them.

    Args:
        futures: of all jobs.
        remote: whether they run on a cluster, whose futures do not tell when a job begins.
        seconds: between two looks.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}", markup=False),
        TimeRemainingColumn(),
    )
    # The speed is estimated from all epochs so far, which may take minutes each.
    options: dict[str, Any] = {"transient": True, "disable": not console.is_terminal, "speed_estimate_period": 1e6}
    with Progress(*columns, console=console, **options) as progress:
        epochs = {job: len(_epochs(job)) for job in futures}
        total = sum(job.epochs for job in futures)
        overall = progress.add_task(f"{len(futures)} runs", total=total, completed=sum(epochs.values()), accuracy="")
        tasks: dict[Job, TaskID] = {}
        states = dict.fromkeys(futures, "waiting")
        while True:
            ended = all(future.done() for future in futures.values())
            for job, future in futures.items():
                rows = _epochs(job)
                epochs[job] = job.epochs if future.done() else len(rows)
                state = _state(future, remote and bool(runs_of(job)))
                name = f"{job.name} seed {job.seed}"
                accuracy = f"{100 * rows[-1]['val/acc']:.2f} %" if rows and "val/acc" in rows[-1] else ""
                if state != states[job]:
                    progress.console.print(f"{name}: {state} {accuracy}".rstrip(), highlight=False, markup=False)
                    states[job] = state
                if state == "running" and job not in tasks:
                    tasks[job] = progress.add_task(name, total=job.epochs, completed=len(rows), accuracy="")
                if job in tasks:
                    progress.update(tasks[job], completed=epochs[job], accuracy=accuracy, visible=state == "running")
            progress.update(overall, completed=sum(epochs.values()))
            if ended:
                return
            yield
            wait([future for future in futures.values() if not future.done()], seconds, ALL_COMPLETED)


def _epochs(job: Job) -> list[dict[str, float]]:
    runs = runs_of(job)
    return read_epochs(runs[-1]) if runs else []


def _state(future: Future, begun: bool) -> str:
    if not future.done():
        return "running" if begun or future.running() else "waiting"
    failure = failure_of(future)
    return "done" if failure is None else "stopped" if failure == STOPPED else "failed"
