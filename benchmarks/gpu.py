"""What only a GPU can answer, in one table and ten minutes: python -m benchmarks.gpu

    python -m benchmarks.gpu --data.dataset folder --data.root my_images             on images of your own
    python -m benchmarks.gpu --parts networks layers --output networks.md            some of it
    python -m benchmarks.gpu --device cpu --tiny --output /tmp/gpu.md                does it run at all?

Each part is a process of its own, which is ended when its time is over. Every figure is printed, and written to the
output, as soon as it is known, so that a cut leaves what was measured. Options with a dot are those of `train.py fit`.
Without them it is CIFAR-10 below data/ or, where there is none, generated images; nothing is downloaded.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from benchmarks import variants as loops
from benchmarks.measure import REPOSITORY, Child, Spread, ratio
from benchmarks.throughput import shapes_as_files
from cbam_pl.cli import main as command_line
from cbam_pl.environment import describe_environment
from cbam_pl.timing import time_in_turns

Row = tuple[str, str, str]  # what, the figure, what is asked
_COMPILES = "torch.compile works"
_PRECISIONS = {"float32": "32-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}


@dataclass(frozen=True)
class Setup:
    """What every part needs.

    Args:
        device: cpu or cuda.
        tiny: few and short rounds of small networks, to see whether it runs.
        folder: for the runs, gone afterwards.
        data: options of `train.py fit` that choose the images.
        real: whether these are photographs, not generated.
        compiled: whether torch.compile works here.
    """

    device: str
    tiny: bool
    folder: Path
    data: list[str]
    real: bool
    compiled: bool

    @property
    def turns(self) -> tuple[int, float]:
        """Rounds, and seconds of each variant's turn in a round."""
        return (1, 0.05) if self.tiny else (5, 1.0)

    @property
    def modes(self) -> list[str]:
        """Ways to run a network."""
        return ["eager", "compiled"] if self.compiled else ["eager"]

    def rows(self, part: str) -> Path:
        """The file to which a part appends its rows."""
        return self.folder / f"{part}.jsonl"

    def fit(self, name: str, recipe: str, *options: str) -> list[str]:
        """Words of a command line after `train.py fit`, for a run below a folder of its own."""
        accelerator = "gpu" if self.device == "cuda" else "cpu"
        config = str(REPOSITORY / "configs" / f"{recipe}.yaml")
        root = str(self.folder / name)
        return ["--config", config, *self.data, "--trainer.default_root_dir", root,
                "--trainer.accelerator", accelerator, *options]  # fmt: skip


Part = Callable[[Setup], Iterator[Row]]


def _in_turns(
    setup: Setup, variants: dict[str, tuple[Callable[..., None], dict[str, Any]]], memory: dict[str, float]
) -> Iterator[dict[str, list[float]]]:
    """Images per second of each variant so far, after each round; at the end the peak memory of each in MB."""
    # All start at once, since each imports and compiles for up to a minute, and stand still but for their turns.
    with ThreadPoolExecutor(len(variants)) as pool:
        threads = 1 if setup.tiny else torch.get_num_threads()
        starting = {name: pool.submit(Child, work, threads, setup.device, given) for name, (work, given) in
                    variants.items()}  # fmt: skip
    children = {name: future.result() for name, future in starting.items() if future.exception() is None}
    rates: dict[str, list[float]] = {name: [] for name in children}
    rounds, seconds = setup.turns
    try:
        for _ in range(rounds):
            for name, child in children.items():
                rates[name].append(child.time(seconds))
            yield rates
        memory |= {name: child.finish() for name, child in children.items()}
    finally:
        for child in children.values():
            child.stop()


def compiler(setup: Setup) -> Iterator[Row]:
    """Whether torch.compile works on this machine, so that nothing else fails for its sake."""
    x = torch.ones(8, 8, device=setup.device, requires_grad=True)
    try:
        torch.compile(lambda x: torch.relu(x).sum())(x).backward()
        yield _COMPILES, "yes", "yes"
    except Exception as error:  # whatever a missing compiler or Triton raises
        yield _COMPILES, f"no: {type(error).__name__}: {str(error).splitlines()[0][:200]}", "yes"


def training_loops(setup: Setup) -> Iterator[Row]:
    """`train.py fit` against a notebook's loop, in each precision, eager and compiled, and the data alone."""

    def options(name: str, mode: str = "eager", precision: str = "32-true") -> dict[str, Any]:
        given = ["--model.compile", str(mode == "compiled").lower(), "--trainer.precision", precision]
        # Without pictures: the epochs of generated images take a fraction of a second each.
        return {"options": setup.fit(name, "cbam_cnn", *given, "--pictures_every", "0")}

    variants: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
        "plain loop, 0 workers": (loops.plain_loop, options("plain0") | {"workers": 0}),
        "data alone": (loops.our_data, options("data")),
    }
    if not setup.tiny:
        variants["plain loop, 2 workers"] = (loops.plain_loop, options("plain2") | {"workers": 2})
        variants["plain loop's data alone"] = (loops.plain_data, options("plain_data"))
    for mode in setup.modes:
        for name, precision in _PRECISIONS.items():
            if name == "float32" or not setup.tiny:
                run = f"fit, {name}, {mode}"
                variants[run] = (loops.fit, options(f"fit_{name}_{mode}", mode, precision))
    asked = {"plain loop, 0 workers": "≥ 20", "plain loop, 2 workers": "≥ 8"}
    for rates in _in_turns(setup, variants, {}):
        for name in variants:
            yield f"{name}: images/s", Spread.of(rates[name]).text() if name in rates else "failed", ""
        for run in (name for name in rates if name.startswith("fit")):
            for plain, least in asked.items():
                if plain in rates:
                    yield f"{run} ÷ {plain}", ratio(rates[run], rates[plain]).text(1), least
        if "plain loop's data alone" in rates:
            quotient = ratio(rates["data alone"], rates["plain loop's data alone"])
            yield "data alone ÷ plain loop's data alone", quotient.text(0), "≥ 200"


def networks(setup: Setup) -> Iterator[Row]:
    """Training steps of each network with CBAM and without, in bfloat16, and their memory."""
    from benchmarks.attention import training_steps  # noqa: PLC0415  # with timm, which may be missing here

    asked = {"cnn": "≤ 1.25", "resnet20": "≤ 1.3", "resnet18": "≤ 1.15", "resnet50": ""}
    archs = ["resnet20"] if setup.tiny else list(asked)
    batch_size = 4 if setup.tiny else 128
    for mode in setup.modes:
        variants = {
            f"{arch} {kind}": (
                training_steps,
                {"arch": arch, "kind": kind, "mode": mode, "dtype": "bfloat16", "batch_size": batch_size},
            )
            for arch in archs
            for kind in ("none", "cbam")
        }
        memory: dict[str, float] = {}
        batches = f"{mode}, batches of {batch_size}"
        for rates in _in_turns(setup, variants, memory):
            for name in variants:
                yield f"{name}, {batches}: images/s", Spread.of(rates[name]).text() if name in rates else "failed", ""
            for arch in archs:
                none, cbam = rates.get(f"{arch} none"), rates.get(f"{arch} cbam")
                if none and cbam:
                    yield f"{arch}, {batches}: step with CBAM ÷ without", ratio(none, cbam).text(2), asked[arch]
        for arch in archs:
            none, cbam = memory.get(f"{arch} none"), memory.get(f"{arch} cbam")
            if none and cbam:
                megabytes = f"{cbam:,.0f} ÷ {none:,.0f} MB = {cbam / none:.2f}"
                yield f"{arch}, {batches}: peak memory with CBAM ÷ without", megabytes, ""


def layers(setup: Setup) -> Iterator[Row]:
    """Our CBAM of timm's form against timm's own, forward and backward, in bfloat16."""
    from benchmarks.attention import SHAPES, TIMMS_FORM, layer_calls  # noqa: PLC0415  # likewise

    batch_size = 4 if setup.tiny else 128
    rounds, seconds = setup.turns
    for mode in setup.modes:
        for arch in ["resnet20"] if setup.tiny else SHAPES:
            for channels, size in SHAPES[arch]:
                torch.compiler.reset()  # of one function dynamo compiles eight shapes at most
                x = torch.randn(batch_size, channels, size, size, device=setup.device, dtype=torch.bfloat16)
                x = x.to(memory_format=torch.channels_last)
                works = {kind: layer_calls(kind, channels, x, x.dtype, mode)[1] for kind in (TIMMS_FORM, "timm")}
                times = time_in_turns(works, rounds, seconds / 5, x.device)
                ours = f"{1e6 * Spread.of(times[TIMMS_FORM]).median:,.0f} µs"
                name = f"{channels}×{size}×{size} of {arch}, {mode}, batches of {batch_size}"
                quotient = ratio(times[TIMMS_FORM], times["timm"]).text(2)
                yield f"{name}: ours, preset timm", ours, ""
                yield f"{name}: ours, preset timm ÷ timm's CbamModule", quotient, "≤ 1"


class InterruptAt(Callback):
    """Ends the training as Ctrl-C or a cluster does, after one step.

    Args:
        step: the optimizer step, from 1.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Send the signal."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def _call(options: list[str]) -> tuple[int, str]:
    """Exit status and standard error of `train.py fit OPTIONS`, in this process."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        try:
            command_line(["fit", *options])
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    return status, errors.getvalue()


def _difference(one: Path, other: Path) -> str:
    """Between the weights of two runs of the recipe cbam_cnn."""
    saved = [
        torch.load(root / "checkpoints/cbam_cnn/version_0/last.ckpt", map_location="cpu", weights_only=True)[
            "state_dict"
        ]
        for root in (one, other)
    ]
    largest = max(float((saved[0][name] - saved[1][name]).abs().max()) for name in saved[0])
    return "none, bit for bit" if largest == 0 else f"up to {largest:.1e} in a weight"


def resume(setup: Setup) -> Iterator[Row]:
    """Whether a training that was interrupted and resumed ends with the same weights."""
    # For the deterministic one; cuBLAS reads it once, at the first of the trainings in this process.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    steps = 4 if setup.tiny else 40
    variants = {"float32, deterministic": ["--trainer.deterministic", "true"]}
    variants |= {name: ["--trainer.precision", precision] for name, precision in _PRECISIONS.items()}
    for name, options in variants.items():
        if setup.tiny and name != "float32":
            continue
        roots = [f"{name} {run}" for run in ("whole", "again", "resumed")]
        short = [*options, "--model.compile", "false", "--trainer.max_epochs", "2", "--trainer.limit_val_batches", "1",
                 "--trainer.limit_train_batches", str(steps), "--pictures_every", "0"]  # fmt: skip
        commands = [setup.fit(root, "cbam_cnn", *short) for root in roots]
        interrupted = [*commands[2], "--trainer.callbacks+", "benchmarks.gpu.InterruptAt",
                       "--trainer.callbacks.step", str(steps * 3 // 2)]  # fmt: skip
        wanted = {"whole": (commands[0], 0), "again": (commands[1], 0), "interrupted": (interrupted, 143),
                  "resumed": ([*commands[2], "--ckpt_path", "last"], 0)}  # fmt: skip
        for run, (command, expected) in wanted.items():
            status, errors = _call(command)
            if status != expected:
                raise RuntimeError(f"the {run} run, {name}, ended with status {status}: {errors.strip()}")
        whole, again, resumed = (setup.folder / root for root in roots)
        yield f"{name}: difference of two equal runs", _difference(whole, again), ""
        yield f"{name}: difference after an interruption", _difference(whole, resumed), "none"


def out_of_memory(setup: Setup) -> Iterator[Row]:
    """A batch that no device's memory holds ends with one line."""
    if setup.device == "cpu":  # as if the machine had little more than is in use
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**30, resource.RLIM_INFINITY))
    # Smaller on a CPU, where even building a network of 152 layers takes its time.
    arch = "resnet152" if setup.device == "cuda" else "resnet18"
    huge = ["--model.arch", arch, "--data.batch_size", "4000", "--model.compile", "false", "--pictures_every", "0"]
    status, errors = _call(setup.fit("memory", "cbam_cnn", *huge))
    lines = [line for line in errors.splitlines() if line.strip()]
    yield "exit status", str(status), "2"
    yield "tracebacks", str(errors.count("Traceback")), "0"
    yield "last line on standard error", lines[-1][:200] if lines else "", "error: out of memory; …"


class AccuracyClock(Callback):
    """Notes when the validation accuracy first reaches 94 and 95 %.

    Args:
        path: the file of rows.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._started = 0.0
        self._best = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the accuracy."""
        acc, epoch = float(trainer.callback_metrics["val/acc"]), trainer.current_epoch + 1
        reached = f"epoch {epoch}, {time.perf_counter() - self._started:.0f} s"
        rows = [
            (f"{goal:.0%} of the validation images", reached, "") for goal in (0.94, 0.95) if self._best < goal <= acc
        ]
        self._best = max(self._best, acc)
        for row in [*rows, ("the best so far", f"{self._best:.4f}, {reached}", "")]:
            _write(row, self.path)


def accuracy(setup: Setup) -> Iterator[Row]:
    """cbam_resnet18_fast on real images: epochs and seconds, compilation and validation included, to an accuracy."""
    if not (setup.real or setup.tiny):
        yield "cbam_resnet18_fast", "not measured: needs CIFAR-10 below data/, or --data.dataset and --data.root", ""
        return
    options = ["--model.compile", str(setup.compiled).lower(), "--trainer.callbacks+", "benchmarks.gpu.AccuracyClock",
               "--trainer.callbacks.path", str(setup.rows("accuracy"))]  # fmt: skip
    if setup.tiny:
        options += ["--model.arch", "resnet20", "--data.batch_size", "8", "--trainer.max_epochs", "1",
                    "--trainer.limit_train_batches", "10", "--trainer.limit_val_batches", "1"]  # fmt: skip
    status, errors = _call(setup.fit("accuracy", "cbam_resnet18_fast", *options))
    yield "cbam_resnet18_fast in full", "done" if status == 0 else f"status {status}: {errors.strip()[-200:]}", ""


# Name → what it does, and its time at most in seconds. The most wanted come first.
PARTS: dict[str, tuple[Part, float]] = {
    "compiler": (compiler, 60),
    "loops": (training_loops, 170),
    "networks": (networks, 200),
    "resume": (resume, 80),
    "memory": (out_of_memory, 45),
    "layers": (layers, 60),
    "accuracy": (accuracy, 600),
}


def _write(row: Row, path: Path) -> None:
    """Append a row to the file that the parent reads."""
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def _run_part(name: str, work: Part, setup: Setup) -> None:
    """In a process of its own: measure one part."""
    os.setsid()  # so that it can be ended with all its children
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # many processes compile at once
    try:
        for row in work(setup):
            _write(row, setup.rows(name))
    except Exception as error:  # the other parts are still worth measuring
        traceback.print_exc()
        _write(("failed", f"{type(error).__name__}: {error}".splitlines()[0][:300], ""), setup.rows(name))


def _page(header: dict[str, str], rows: dict[tuple[str, str], tuple[str, str]], notes: list[str]) -> str:
    """The result as Markdown."""
    lines = ["# On a GPU", "", "`python -m benchmarks.gpu`: the median of the rounds (lowest to highest).", ""]
    lines += [f"- {name}: {value}" for name, value in header.items()]
    lines += ["", "| part | | measured | asked |", "|---|---|---|---|"]
    lines += [
        f"| {part} | {what} | {figure.replace('|', '/')} | {asked} |" for (part, what), (figure, asked) in rows.items()
    ]
    return "\n".join([*lines, "", *notes, ""])


def run_bounded(name: str, work: Part, setup: Setup, seconds: float) -> Iterator[Row | None]:
    """Run a part in a process of its own; its rows as they come, and None at the end if it was cut off."""
    path = setup.rows(name)
    path.touch()
    process = multiprocessing.get_context("spawn").Process(target=_run_part, args=(name, work, setup))
    process.start()
    end, num_read = time.monotonic() + seconds, 0
    try:
        running = True
        while running:
            process.join(0.2)
            running = process.is_alive() and time.monotonic() < end
            lines = path.read_text().splitlines()
            yield from (tuple(json.loads(line)) for line in lines[num_read:])
            num_read = len(lines)
        if process.is_alive():
            yield None
    finally:
        if process.is_alive() and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # while it still imports, it has no session of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        process.join()


def measure(names: list[str], setup: Setup, minutes: float, output: Path) -> None:
    """Run the parts one by one, and write each figure as it comes."""
    header = describe_environment(torch.device(setup.device)) | {"data": " ".join(setup.data)}
    rows: dict[tuple[str, str], tuple[str, str]] = {}
    notes: list[str] = []
    end = time.monotonic() + 60 * minutes
    for name in names:
        seconds = min((5 if setup.tiny else 1) * PARTS[name][1], end - time.monotonic())
        if seconds < 5:
            notes.append(f"Not measured, since the time was over: {name}.")
            continue
        for row in run_bounded(name, PARTS[name][0], setup, seconds):
            if row is None:
                notes.append(f"Cut off after its {seconds:.0f} s: {name}.")
                continue
            what, figure, asked = row
            print(f"{name:<10} {what}: {figure}" + (f"   (asked: {asked})" if asked else ""), flush=True)
            rows[name, what] = figure, asked
            output.write_text(_page(header, rows, notes))
        if name == "compiler":
            setup = replace(setup, compiled=rows.get((name, _COMPILES), ("", ""))[0] == "yes")
    output.write_text(_page(header, rows, notes))


def main() -> None:
    """Measure and write."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--device", choices=["cpu", "cuda"], default=device, help=f"default here: {device}")
    options.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    options.add_argument("--minutes", type=float, default=9.5, help="at most (default: %(default)s)")
    page = REPOSITORY / "docs/results/gpu.md"
    options.add_argument("--output", type=Path, help=f"Markdown file (default of a whole measurement: {page})")
    options.add_argument("--tiny", action="store_true", help="small and short, eager, to see whether it runs")
    given, data = options.parse_known_args()
    if given.device == "cpu" and not given.tiny:
        options.error("no GPU is found here; --tiny runs on a CPU, to see whether it runs")
    if given.output is None and (given.tiny or given.parts != list(PARTS)):
        options.error(f"name an --output: {page.name} in docs/results is for a whole measurement on a GPU")
    output = given.output or page
    cifar = REPOSITORY / "data"
    with tempfile.TemporaryDirectory() as folder:
        real = bool(data)
        if not data and not given.tiny and (cifar / "cifar-10-batches-py").is_dir():
            data, real = ["--data.dataset", "cifar10", "--data.root", str(cifar)], True
        elif not data:
            data = shapes_as_files(Path(folder) / "shapes")
        setup = Setup(given.device, given.tiny, Path(folder), data, real, compiled=False)
        names = [name for name in given.parts if name != "compiler" or not given.tiny]
        if not given.tiny and "compiler" not in names:
            names = ["compiler", *names]
        measure(names, setup, given.minutes, output)
    print(f"written to {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
