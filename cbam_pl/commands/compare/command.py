"""python train.py compare: plan, run, report."""

import signal
import sys
import threading
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from cbam_pl.commands.compare.plan import Plan, make_plan, option_parser
from cbam_pl.errors import Interrupted, UserError

_COST_ROUNDS, _COST_SECONDS = 5, 0.3


class _Terminated(BaseException):
    """SIGTERM; not an Exception, so that nothing in between takes it for an error."""


def compare(arguments: list[str]) -> None:
    """Run what is not done yet, and write the report.

    Raises:
        UserError: bad input, or runs that failed; the report on the others is written before.
    """
    options, settings = option_parser().parse_known_args(arguments)
    plan = make_plan(options, settings)
    plan.check_output()

    from cbam_pl.commands.compare.jobs import find, jobs_of
    from cbam_pl.commands.compare.report import analyse, earlier_costs, print_report, read_results, write_report

    jobs = jobs_of(plan)
    if options.dry_run:
        _print_expectation(plan, options.jobs)
        return
    failures: dict[Any, Any] = {}
    if options.recompute:
        if not any(find(job)[0] == "done" for job in jobs):
            raise UserError("--recompute: no run with these settings is done yet; leave it out, to train them")
        plan.claim_output()
    else:
        plan.claim_output()
        failures = _run(plan, options)
    results = read_results(jobs)
    if results:
        costs = earlier_costs(plan) if options.recompute else None
        content = analyse(plan, results, costs or _measure_costs(plan))
        write_report(plan, content, results)
        print_report(content)
        print(plan.output / "report.html")
    if failures:
        job, failure = next(iter(failures.items()))
        raise UserError(
            f"{len(failures)} of {len(jobs)} runs failed: {job.name} seed {job.seed}: {failure.reason}; all that it "
            f"said is in {job.log}; the same command tries again"
        )


def _measure_costs(plan: Plan) -> dict[str, dict[str, Any]]:
    from cbam_pl.commands.compare.costs import measure_costs
    from cbam_pl.commands.compare.jobs import threads_per_job

    costs = measure_costs(plan.configs, threads_per_job(), _COST_ROUNDS, _COST_SECONDS)
    return {name: asdict(cost) for name, cost in costs.items()}


def _run(plan: Plan, options: Any) -> dict[Any, Any]:
    """Bring every job to its end. Returns those that failed."""
    from cbam_pl.commands.compare.jobs import Stop, Watch, failures_of, find, jobs_of, start_locally
    from cbam_pl.commands.compare.plan import nest
    from cbam_pl.data.datamodule import ImageDataModule

    open_jobs = [job for job in jobs_of(plan) if find(job)[0] != "done"]
    total = len(plan.configs) * len(plan.seeds)
    print(f"{total} runs: {len(plan.configs)} recipes with {len(plan.seeds)} seeds; {total - len(open_jobs)} are done")
    if not open_jobs:
        return {}
    # Once, before the jobs would all download or decode at the same time.
    for data in {str(one): one for one in (nest(settings)["data"] for settings in plan.configs.values())}.values():
        ImageDataModule(**data).prepare_data()
    stop = Stop()
    places: list[dict[str, str]] = [] if options.ray else _places(plan, options.jobs)

    def terminate(*_: Any) -> None:
        raise _Terminated

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if main_thread else None
    futures: dict[Any, Future] = {}
    try:
        if options.ray:
            from cbam_pl.commands.compare.cluster import start_on_ray

            futures, num_places = start_on_ray(open_jobs, options.ray)
        else:
            futures, num_places = start_locally(open_jobs, places, stop), len(places)
        Watch(open_jobs, num_places, remote=bool(options.ray)).follow(futures)
    except (KeyboardInterrupt, _Terminated) as interruption:
        number = signal.SIGINT if isinstance(interruption, KeyboardInterrupt) else signal.SIGTERM
        print("stopping: the runs save their state", file=sys.stderr)
        stop.now()
        for future in futures.values():
            future.cancel()
        if not options.ray:
            for future in futures.values():
                if not future.cancelled():
                    future.exception()
        print("stopped; the same command goes on from there", file=sys.stderr)
        raise Interrupted("stopped", number) from interruption
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)
    failures = failures_of(futures)
    for job, failure in failures.items():
        print(f"failed: {job.name} seed {job.seed}: {failure.reason} ({job.log})", file=sys.stderr)
    return failures


def _places(plan: Plan, jobs: int | None) -> list[dict[str, str]]:
    from cbam_pl.commands.compare.costs import measure_memory
    from cbam_pl.commands.compare.jobs import environments, threads_per_job, uses_cuda

    cuda = uses_cuda(plan)
    needed = 0
    if cuda and jobs is None:
        # What a process takes beside its tensors: the driver's context, and cuDNN's and cuBLAS's work spaces.
        beside = 1 << 30
        measured = [measure_memory(settings, threads_per_job()) or 0 for settings in plan.configs.values()]
        needed = int(max(measured) * 2**20) + beside
    devices = {settings.get("trainer.devices", 1) for settings in plan.configs.values()}
    return environments(jobs, cuda, devices.pop() if len(devices) == 1 else "auto", needed)


def _print_expectation(plan: Plan, jobs: int | None) -> None:
    """The runs, and the time and the cost to expect."""
    from rich.console import Console
    from rich.table import Table

    from cbam_pl.commands.compare.costs import Subject, measure_rates
    from cbam_pl.commands.compare.jobs import find, jobs_of, read_epochs, threads_per_job, uses_cuda
    from cbam_pl.commands.compare.plan import nest
    from cbam_pl.data.datamodule import ImageDataModule
    from cbam_pl.models.cost import count_flops

    rates = measure_rates(plan.configs, threads_per_job(), 2.0)
    sizes = {}
    for name, settings in plan.configs.items():
        data = ImageDataModule(**nest(settings)["data"])
        data.prepare_data()
        data.setup("fit")
        subject = Subject(settings)
        shape = (3, data.image_size, data.image_size)
        train, limit = len(data.images("train")), settings.get("trainer.limit_train_batches", 1.0)
        train = min(train, limit * data.batch_size) if isinstance(limit, int) else int(train * limit)
        sizes[name] = train, len(data.images("val")), count_flops(subject.classifier.network, shape)
    table = Table("recipe", "seed", "state", "epochs left", "hours", "TFLOP")
    hours, work = 0.0, 0.0
    for job in jobs_of(plan):
        state, run = find(job)
        left = job.epochs - (len(read_epochs(run)) if run else 0)
        train, val, flops = sizes[job.name]
        # A forward pass is a third of a training step.
        needed = left * (train + val / 3) / rates[job.name] / 3600
        teraflop = left * (3 * train + val) * flops / 1e12
        hours, work = hours + needed, work + teraflop
        table.add_row(job.name, str(job.seed), state, str(left), f"{needed:.2f}", f"{teraflop:,.1f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    cuda = uses_cuda(plan)
    places = len(_places(plan, jobs))
    unit = "GPU" if cuda else "core"
    rate = ", ".join(f"{name} {value:,.0f}" for name, value in rates.items())
    print(f"training images/s, measured now for two seconds each: {rate}")
    print(f"about {hours:.2f} {unit} hours and {work:,.1f} TFLOP; {places} at once: {hours / places:.2f} hours")
