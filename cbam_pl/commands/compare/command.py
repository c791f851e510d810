"""python train.py compare: plan, run, report."""

import math
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ALL_COMPLETED, Future, wait
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from cbam_pl.commands.compare import report
from cbam_pl.commands.compare.bands import Bands
from cbam_pl.commands.compare.controls import add_controls, control_line, note_left_out
from cbam_pl.commands.compare.costs import in_new_process, measure_costs, time_recipes
from cbam_pl.commands.compare.jobs import (
    STOPPED,
    Job,
    begun_last,
    environments,
    failure_of,
    find,
    jobs_of,
    left_out,
    num_devices,
    read_epochs,
    start_locally,
    start_on_ray,
    threads_per_job,
    uses_cuda,
)
from cbam_pl.commands.compare.page import render, write_gallery
from cbam_pl.commands.compare.plan import Plan, make_plan, nest, parse_options
from cbam_pl.data.corruptions import SEVERITIES
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.errors import Interrupted, UserError
from cbam_pl.tables import print_table
from cbam_pl.training.run import write_text

_COST_ROUNDS, _COST_SECONDS = 9, 0.5


def compare(arguments: list[str]) -> None:
    """Run what is not done yet, and write the report; runs that failed are reported after it."""
    options, settings = parse_options(arguments)
    plan = note_left_out(make_plan(options, settings), options.controls)
    if options.controls:
        plan = add_controls(plan, options.controls, may_choose=not options.recompute)
        for control in plan.controls:
            print(control_line(control, plan))
    jobs = jobs_of(plan)
    for line in (line for job in jobs for line in left_out(job)):
        print(line)
    if options.dry_run:
        _print_estimate(plan, options.jobs)
        return
    if options.recompute and not any(find(job)[0] in ("tested", "done") for job in jobs):
        raise UserError("--recompute: no run with these settings is done yet; leave it out, to train them")
    plan.claim_output()
    failures = {} if options.recompute else _run(plan, jobs, options)
    if results := report.read_results(jobs):
        trained = {name: plan.configs[name] for name in plan.configs if any(one["recipe"] == name for one in results)}
        costs = report.earlier_costs(plan.output, trained) if options.recompute else None
        if costs is None:
            try:
                costs = measure_costs(trained, threads_per_job(), _COST_ROUNDS, _COST_SECONDS)
            except UserError as error:  # the runs may have been trained on other machines
                earlier = report.earlier_costs(plan.output, trained)
                costs, which = earlier or dict.fromkeys(trained), "; these are earlier ones" if earlier else ""
                plan = replace(plan, notes=[*plan.notes, f"The costs could not be measured{which}: {error}."])
        content = report.analyse(plan, results, costs)
        page = plan.output / "report.html"
        try:
            report.write_report(plan.output, content)
            no_gallery = write_gallery(plan.output / "gallery.html", plan, results)
            write_text(page, render(plan, content, results, no_gallery))
        except OSError as error:
            raise UserError(f"cannot write the report to {plan.output} ({error.strerror}); free some space") from error
        report.print_report(content)
        print(page)
    if failures:
        job, failure = next(iter(failures.items()))
        raise UserError(
            f"{len(failures)} of {len(jobs)} runs failed: {job.name} seed {job.seed}: {failure}; its whole "
            f"output is in {job.log}; the same command tries again"
        )


def _run(plan: Plan, jobs: list[Job], options: Any) -> dict[Job, str]:
    """Finish every job. Returns those that failed."""
    bands = Bands(plan, jobs)
    num_jobs, jobs = len(jobs), [job for job in jobs if find(job)[0] != "done"]
    seeds = f"{len(plan.seeds)} {'seed' if len(plan.seeds) == 1 else 'seeds'}"
    print(f"{num_jobs} runs: {len(plan.configs)} recipes with {seeds}; {num_jobs - len(jobs)} are done")
    if not jobs:
        bands.close()
        return {}
    # Once, before all jobs would download or decode at the same time.
    for data in {str(one): one for one in (nest(settings)["data"] for settings in plan.configs.values())}.values():
        ImageDataModule(**data).prepare_data()
    stop = threading.Event()
    if options.ray:
        futures = start_on_ray(jobs, options.ray)
    else:
        futures = start_locally(jobs, environments(plan, options.jobs), stop)
    received: list[int] = []  # signals, in place of ending the process
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        for _ in watch(futures, remote=bool(options.ray)):
            bands.update()
            if received and not stop.is_set():
                print("stopping: the runs save their state", file=sys.stderr)
                stop.set()
            if received and options.ray:  # which ends its tasks when this process ends
                break
    finally:
        stop.set()  # after an error here, too, the runs save their state
        for number, handler in before.items():
            signal.signal(number, handler)
    bands.close()
    if received:
        print("stopped; the same command goes on from there", file=sys.stderr)
        raise Interrupted("stopped", received[0])
    failures = {job: failure for job, future in futures.items() if (failure := failure_of(future))}
    for job, failure in failures.items():
        print(f"failed: {job.name} seed {job.seed}: {failure} ({job.log})", file=sys.stderr)
    return failures


def watch(futures: dict[Job, Future], remote: bool, seconds: float = 1.0) -> Iterator[None]:
    """Show a bar for each job on a terminal, and a line for each that begins or ends; yields at every look at them."""
    console = Console(stderr=True)
    # The speed is estimated from all epochs so far, which may take minutes each.
    options: dict[str, Any] = {"transient": True, "disable": not console.is_terminal, "speed_estimate_period": 1e6}
    with Progress(console=console, **options) as progress:
        epochs: dict[Job, int] = {}
        overall = progress.add_task(f"{len(futures)} runs", total=sum(job.epochs for job in futures))
        tasks = {job: progress.add_task("", total=job.epochs, visible=False) for job in futures}
        states = dict.fromkeys(futures, "waiting")
        while True:
            ended = all(future.done() for future in futures.values())
            for job, future in futures.items():
                run = begun_last(job)
                rows = read_epochs(run) if run else []
                epochs[job] = job.epochs if future.done() else len(rows)
                state = _state(future, remote and run is not None)  # a cluster's future does not tell that it runs
                name = f"{job.name} seed {job.seed}"
                validated = [row["val/acc"] for row in rows if "val/acc" in row]
                best = f", best val/acc {100 * max(validated):.2f} %" if validated else ""
                if state != states[job]:
                    if (states[job], state) != ("waiting", "stopped"):  # those that never began would fill the screen
                        progress.console.print(f"{name}: {state}{best}", highlight=False, markup=False)
                    states[job] = state
                text = escape(f"{name} epoch {epochs[job]}/{job.epochs}{best}")
                progress.update(tasks[job], description=text, completed=epochs[job], visible=state == "running")
            progress.update(overall, completed=sum(epochs.values()))
            if ended:
                return
            yield
            wait([future for future in futures.values() if not future.done()], seconds, ALL_COMPLETED)


def _state(future: Future, begun: bool) -> str:
    if not future.done():
        return "running" if begun or future.running() else "waiting"
    failure = failure_of(future)
    return "done" if failure is None else "stopped" if failure == STOPPED else "failed"


class _Budget:
    """How many epochs a recipe trains for, and how many images an epoch and the test take."""

    def __init__(self, settings: dict[str, Any]) -> None:
        data = ImageDataModule(**nest(settings)["data"])
        data.prepare_data()
        data.setup("fit")
        self.val, self.test = len(data.images("val")), len(data.images("test"))
        self.flips = settings.get("model.test_time_flip", False)
        overfit = settings.get("trainer.overfit_batches")
        batch = data.batch_size * num_devices(settings)

        def limited(images: int, split: str, batch_size: int) -> int:
            limit = overfit or settings.get(f"trainer.limit_{split}_batches", 1.0)
            return min(images, limit * batch_size) if isinstance(limit, int) else int(images * limit)

        self.train = limited(len(data.images("train")), "train", batch)
        validated = limited(self.val, "val", 4 * batch)  # as ImageDataModule's batches are
        self.validated = validated / settings.get("trainer.check_val_every_n_epoch", 1)  # an epoch, on average
        self.epochs = settings["trainer.max_epochs"]
        if (steps := settings.get("trainer.max_steps", -1)) >= 0:
            step = batch * settings.get("trainer.accumulate_grad_batches", 1)
            self.epochs = min(self.epochs, math.ceil(steps / math.ceil(self.train / step)))


def _print_estimate(plan: Plan, jobs: int | None) -> None:
    measured = in_new_process(threads_per_job(), time_recipes, plan.configs, 2, 1.0, ())
    if measured is None:
        raise UserError("out of memory; lower data.batch_size")
    budgets = {name: _Budget(settings) for name, settings in plan.configs.items()}
    rows = []
    hours, work = 0.0, 0.0
    for job in jobs_of(plan):
        state, run = find(job)
        budget, cost = budgets[job.name], measured[job.name]
        left = budget.epochs - (len(read_epochs(run)) if run else 0) if state in ("new", "interrupted") else 0
        # A training step takes as long as three forward passes. To calibrate takes one over the validation images.
        tests = 0 if state == "done" else budget.val + budget.test * (1 + len(SEVERITIES) * len(job.corruptions))
        passes = left * 3 * budget.train + (left * budget.validated + tests) * (2 if budget.flips else 1)
        needed = passes / (3 * cost["train_images_per_second"]) / 3600
        teraflop = passes * cost["flops"] / 1e12
        hours, work = hours + needed, work + teraflop
        rows.append([job.name, str(job.seed), state, str(left), f"{needed:.2f}", f"{teraflop:,.1f}"])
    print_table(["recipe", "seed", "state", "epochs left", "hours", "TFLOP"], rows)
    unit = "GPU" if uses_cuda(plan) else "core"
    places = max(1, min(len(environments(plan, jobs)), sum(state != "done" for _, _, state, *_ in rows)))
    rates = ", ".join(f"{name} {cost['train_images_per_second']:,.0f}" for name, cost in measured.items())
    print(f"training images/s, measured for two seconds each: {rates}")
    print(f"about {hours:.2f} {unit} hours and {work:,.1f} TFLOP; {places} at once: {hours / places:.2f} hours")
