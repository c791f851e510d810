"""A folder of small images, and a real short run over it, that several tests share."""

import contextlib
import io
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from tensorboard.summary.writer import event_file_writer

from cbam_pl.cli import main
from tests.helpers import COLOURS, TEST_PER_CLASS, TRAIN_PER_CLASS, Outcome


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With --dist loadgroup, tests that share costly fixtures run in one process: those of a file, or of `compare`."""
    for item in items:
        place = item.path.parent if item.path.parent.name == "compare" else item.path
        item.add_marker(pytest.mark.xdist_group(str(place)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, help="random cases of bad input for tests/test_fuzz.py, in place of its own")


# Two threads beside another busy process are many times slower than one, and sums in another order round otherwise.
# For the commands that tests start, too.
os.environ["OMP_NUM_THREADS"] = "1"
# Figures are compared with those of the CPU, to the last digits; `python -m benchmarks.gpu` is for a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def event_files_in_order() -> None:
    """TensorBoard reads files by name: the second, then this process's count, which "10" puts before "9"."""
    event_file_writer._global_uid = event_file_writer.AtomicCounter(10_000)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that a colour tells apart, under noise: root/{train,test}/{blue,green,red}/*.png."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", TRAIN_PER_CLASS), ("test", TEST_PER_CLASS)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(-50, 50, (32, 32, 3), generator=generator)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def command() -> Callable[..., Outcome]:
    """Run `train.py ARGUMENTS` in this process."""

    def run(*arguments: object) -> Outcome:
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([str(argument) for argument in arguments])
            except SystemExit as end:
                status = int(end.code or 0)
        return Outcome(status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A recipe that trains in a second: 84 images, 9 held out, batches of 16."""
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(
        f"""seed: 3
model:
  arch: cnn
  attention: {{kind: cbam}}
  optimizer: {{class_path: torch.optim.Adam, init_args: {{lr: 0.002, fused: true}}}}
  lr_scheduler:
    class_path: torch.optim.lr_scheduler.ReduceLROnPlateau
    init_args: {{factor: 0.5, patience: 0}}
data: {{dataset: folder, root: {image_folder}, batch_size: 16, augmentation: rich}}
trainer: {{max_epochs: 2, accelerator: cpu}}
pictures_every: 0
"""
    )
    return path


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Outcome], recipe: Path
) -> tuple[Path, Outcome]:
    """A finished run of two epochs: its root folder and what it printed. Read only."""
    root = tmp_path_factory.mktemp("trained")
    outcome = command("fit", "--config", recipe, "--trainer.default_root_dir", root, "--pictures_every", 5)
    assert outcome.status == 0, outcome.err
    return root, outcome


def _in_a_process(arguments: list[str], output: Path, variables: Mapping[str, str], limits: Mapping[int, int]) -> None:
    os.environ.update(variables)
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    rank_zero_only.rank = int(variables.get("LOCAL_RANK", 0))  # which Lightning read when it was imported, before that
    for limit, more in limits.items():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(limit, (used + more,) * 2 if limit == resource.RLIMIT_AS else (more, more))
    sys.argv = ["train.py", *arguments]
    main(arguments)


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[..., BaseProcess]]:
    """Start `train.py ARGUMENTS` in a process of its own, which can be killed; it costs no imports.

    launch(output, *arguments, variables={}, limits={}): output, the file for what it prints; variables, of its
    environment; limits, RLIMIT_… → bytes, those of RLIMIT_AS beyond what it uses already.
    """
    # One process imports everything, before it has threads, and forks those that train.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "cbam_pl.cli",
            "cbam_pl.commands.fit",
            "cbam_pl.training.classifier",
            "cbam_pl.data.datamodule",
            "cbam_pl.inspect.monitor",
            "cbam_pl.training.callbacks",
            "cbam_pl.training.logger",
            "jsonargparse",
            "torch.utils.tensorboard",
            "tests.conftest",
        ]
    )
    started: list[BaseProcess] = []

    def start(
        output: Path,
        *arguments: object,
        variables: Mapping[str, str] | None = None,
        limits: Mapping[int, int] | None = None,
    ) -> BaseProcess:
        options = [str(argument) for argument in arguments]
        process = context.Process(target=_in_a_process, args=(options, output, variables or {}, limits or {}))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
