"""What the benchmarks share: children that are timed in turn, medians and spreads, the machine, tables and JSON."""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from cbam_pl.environment import commit, processor_name
from cbam_pl.tables import print_table
from cbam_pl.timing import peak_memory, reset_peak_memory, synchronise

REPOSITORY = Path(__file__).parents[1]
_ENVIRONMENT = threading.Lock()  # patch.dict empties os.environ for a moment
_WARM_UP = 5  # steps before each timing: what a loader prefetched between rounds, first compilations


@dataclass(frozen=True)
class Spread:
    """The median of a quantity's rounds, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of one or more values."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 0) -> str:
        """Such as "1,234 (1,200 to 1,250)"."""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of the ratios of each round, which a slow moment of the machine falls out of."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


class _Finished(BaseException):
    """Ends a child's loop. Not an Exception, so that nothing in between takes it for an error."""


class RoundClock:
    """In a child: times the steps of a loop, round by round, and stops the loop between the rounds.

    Args:
        connection: the end of a pipe whose other end a `Child` holds.
        device: where the steps are computed.
    """

    def __init__(self, connection: Connection, device: torch.device) -> None:
        self.connection = connection
        self.device = device
        self._seconds: float | None = None  # of the round; None before the first
        self._steps = self._images = 0
        self._started = 0.0
        self._paused: float | None = None

    def step(self, num_images: int) -> None:
        """Say that a step over `num_images` is done; returns when the next may begin."""
        self._steps += 1
        if self._steps < _WARM_UP:
            return
        if self._steps == _WARM_UP:
            if self._seconds is None:
                reset_peak_memory(self.device)
                self._wait()  # for the first round; its own warm-up follows
                return
            synchronise(self.device)
            self._started = time.perf_counter()
            return
        self._images += num_images
        if time.perf_counter() - self._started < (self._seconds or 0):
            return
        synchronise(self.device)
        self.connection.send(self._images / (time.perf_counter() - self._started))
        self._wait()

    def pause(self) -> None:
        """Leave out what follows, until `resume`."""
        synchronise(self.device)
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Count again."""
        synchronise(self.device)
        if self._paused is not None:
            self._started += time.perf_counter() - self._paused
        self._paused = None

    def _wait(self) -> None:
        if self._seconds is None:
            self.connection.send("ready")
        self._seconds = self.connection.recv()
        if self._seconds is None:
            raise _Finished  # from the midst of a loop, of a training even
        self._steps = self._images = 0


def _run_child(
    work: Callable[..., None], connection: Connection, threads: int, device: str, arguments: dict[str, Any]
) -> None:
    torch.set_num_threads(threads)
    clock = RoundClock(connection, torch.device(device))
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            work(clock, **arguments)
    except _Finished:
        connection.send(peak_memory(clock.device))


class Child:
    """A process that repeats one kind of step and waits between the rounds, so that several can take turns.

    Args:
        work: takes a RoundClock and `arguments`, and calls the clock's `step` after each step, without end.
        threads: of torch.
        device: cpu or cuda.
        arguments: of `work`. Its attribute `environment`, if it has one, holds variables that the process starts with.
    """

    def __init__(self, work: Callable[..., None], threads: int, device: str, arguments: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Not a daemon: those may not have children, such as a loader's workers.
        self._process = context.Process(target=_run_child, args=(work, theirs, threads, device, arguments))
        with _ENVIRONMENT, patch.dict(os.environ, getattr(work, "environment", {})):
            self._process.start()
        theirs.close()
        self._receive()  # ready
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a benchmark's process ended with status {self._process.exitcode}") from None

    def time(self, seconds: float) -> float:
        """Images per second over a round of about `seconds`."""
        # Between its rounds it does nothing at all, not even draw its progress bar.
        self._signal(signal.SIGCONT)
        self._connection.send(seconds)
        rate = self._receive()
        self._signal(signal.SIGSTOP)
        return rate

    def finish(self) -> float:
        """End the process. Returns its peak memory in MB."""
        self._signal(signal.SIGCONT)
        self._connection.send(None)
        memory = self._receive()
        self._process.join()
        return memory

    def stop(self) -> None:
        """End the process if it still runs."""
        self._process.kill()  # `fit` handles SIGTERM by finishing its step, which waits for the next round
        self._process.join()


@dataclass(frozen=True)
class Measurement:
    """What one child gave.

    Args:
        rates: images per second of each round.
        memory: peak in MB.
    """

    rates: list[float]
    memory: float


def take_turns(
    variants: dict[str, tuple[Callable[..., None], dict[str, Any]]],
    rounds: int,
    seconds: float,
    threads: int,
    device: str,
) -> dict[str, Measurement]:
    """Time all variants in interleaved rounds, so that a busy moment of the machine meets all alike.

    Args:
        variants: name → work of a `Child`, and its arguments.
        rounds: turns of each.
        seconds: of a turn.
        threads: of torch, in each child.
        device: cpu or cuda.
    """
    children: dict[str, Child] = {}
    try:
        for name, (work, arguments) in variants.items():
            children[name] = Child(work, threads, device, arguments)
        rates: dict[str, list[float]] = {name: [] for name in children}
        for _ in range(rounds):
            for name, child in children.items():
                rates[name].append(child.time(seconds))
        return {name: Measurement(rates[name], child.finish()) for name, child in children.items()}
    finally:
        for child in children.values():
            child.stop()


def machine(device: str, threads: int) -> dict[str, str]:
    """What was measured on: processor, device, versions, commit, date, and what else the machine was doing."""
    names = [name for name in ("torch", "torchvision", "lightning", "timm") if find_spec(name)]
    return {
        "processor": f"{processor_name()}, {os.cpu_count()} cores, {threads} threads used",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": ", ".join(f"{name} {version(name)}" for name in names) + f", Python {platform.python_version()}",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load before": f"{os.getloadavg()[0]:.1f} (processes that compete; below 0.2 on a quiet machine)",
    }


@dataclass
class Table:
    """Rows for the screen and for JSON.

    Args:
        title: what the rows are.
        columns: names.
        rows: as many texts or numbers each.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]]


def parser(purpose: str, rounds: int, seconds: float) -> argparse.ArgumentParser:
    """The options that all benchmarks share, with this one's defaults; without `seconds`, turns are not timed."""
    options = argparse.ArgumentParser(description=purpose, allow_abbrev=False)
    options.add_argument("--rounds", type=int, default=rounds, help=f"turns of each variant (default: {rounds})")
    if seconds:
        options.add_argument("--seconds", type=float, default=seconds, help=f"of each turn (default: {seconds})")
    cores = os.cpu_count() or 1
    options.add_argument("--threads", type=int, default=cores, help=f"of torch (default: all cores, {cores})")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--device", choices=["cpu", "cuda"], default=device, help=f"default here: {device}")
    options.add_argument("--json", metavar="FILE", help="write the figures there too")
    return options


def report(header: dict[str, str], tables: Sequence[Table], json_path: str | None) -> None:
    """Print the machine and the tables, and write both as JSON where a path is given."""
    for name, value in header.items():
        print(f"{name:<12} {value}")
    for table in tables:
        print(table.title)
        texts = ([one.text() if isinstance(one, Spread) else str(one) for one in row] for row in table.rows)
        print_table(table.columns, texts)
    if json_path:
        plain = [
            {"title": one.title, "rows": [dict(zip(one.columns, row, strict=True)) for row in one.rows]}
            for one in tables
        ]
        text = json.dumps({"machine": header, "tables": plain}, indent=2, ensure_ascii=False, default=asdict)
        Path(json_path).write_text(text)
