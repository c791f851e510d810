"""What `compare` shows while jobs run: a bar for each on a terminal, and a line for each that begins or ends."""

from collections.abc import Iterator
from concurrent.futures import ALL_COMPLETED, Future, wait

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
    hours = 12 * 3600  # speed is estimated from all epochs so far, which may take minutes each
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=hours
    ) as progress:
        before = {job: len(_epochs(job)) for job in futures}
        total = sum(job.epochs - before[job] for job in futures)
        overall = progress.add_task(f"{len(futures)} runs, epochs", total=total, accuracy="")
        tasks: dict[Job, TaskID] = {}
        states = dict.fromkeys(futures, "waiting")
        while True:
            ended = all(future.done() for future in futures.values())
            num_trained = 0
            for job, future in futures.items():
                epochs = _epochs(job)
                state = _state(future, remote and bool(runs_of(job)))
                accuracy = f"{100 * epochs[-1]['val/acc']:.2f} %" if epochs and "val/acc" in epochs[-1] else ""
                if state != states[job]:
                    line = f"{job.name} seed {job.seed}: {state} {accuracy}".rstrip()
                    progress.console.print(line, highlight=False, markup=False)
                    states[job] = state
                if state == "running":
                    if job not in tasks:
                        name = f"{job.name} seed {job.seed}"
                        tasks[job] = progress.add_task(name, total=job.epochs, completed=len(epochs), accuracy="")
                    progress.update(tasks[job], completed=len(epochs), accuracy=accuracy)
                elif job in tasks:
                    progress.remove_task(tasks.pop(job))
                num_trained += (job.epochs if future.done() else len(epochs)) - before[job]
            progress.update(overall, completed=num_trained)
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
