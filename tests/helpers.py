"""What several tests share."""

import hashlib
import io
import os
import pickle
import re
import signal
import socket
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.datasets import CIFAR10, CIFAR100

from cbam_pl.commands.compare.plan import make_plan, parse_options
from cbam_pl.training.schema import completed_epochs

REPOSITORY = Path(__file__).parents[1]

# Of the image folder of conftest.py; no batch size or number of processes divides the numbers.
COLOURS = {"blue": (60, 90, 220), "green": (50, 200, 80), "red": (220, 60, 50)}
TRAIN_PER_CLASS, TEST_PER_CLASS = 31, 7

# Of the runs that `fit` below gives the options of.
RUN = "tiny/version_0"
EPOCHS, STEPS = 4, 3  # 84 training images of which 20 are held out, in batches of 24


# Commands


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and how it ended."""

    status: int
    out: str
    err: str


def one_line(outcome: Outcome) -> str:
    """The error of a command that ended as a user's mistake should."""
    assert outcome.status == 2, outcome.err
    assert "Traceback" not in outcome.err, outcome.err
    (line,) = re.findall("^error: .*$", outcome.err, re.MULTILINE)
    assert outcome.err.endswith(f"{line}\n")
    return line


def wait_until(done: Callable[[], bool], process, output: Path, seconds: float = 300) -> None:
    """Wait for what a process of `launch` is to do."""
    end = time.monotonic() + seconds
    while not done():
        assert process.is_alive(), output.read_text()
        assert time.monotonic() < end, output.read_text()
        time.sleep(0.01)


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def plan_of(*words):
    """The plan of `compare` with these options."""
    options, settings = parse_options([str(word) for word in words])
    return make_plan(options, settings)


def callbacks(*classes: str | type, **arguments: object) -> list[str]:
    """The option that gives `fit` callbacks, the last of them with arguments."""
    names = [name if isinstance(name, str) else f"{name.__module__}.{name.__qualname__}" for name in classes]
    words = ", ".join(f"{name}: {value}" for name, value in arguments.items())
    *others, last = names
    return ["--trainer.callbacks", f"[{', '.join([*others, f'{{class_path: {last}, init_args: {{{words}}}}}'])}]"]


class PowerCut(Exception):
    """What ends a training with nothing saved."""


class Break(Callback):
    """Ends the training: with signals after an optimizer step, or at once where an epoch begins."""

    def __init__(self, step: int = -1, epoch: int = -1, number: int = int(signal.SIGTERM), times: int = 1) -> None:
        self.step, self.epoch, self.number, self.times = step, epoch, number, times

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise PowerCut


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some grain."""
    generator = np.random.default_rng(seed)
    image = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray(
        np.clip(np.asarray(image) + generator.normal(0, 4, (height, width, 3)), 0, 255).astype(np.uint8)
    )


# Runs


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def checkpoint(root, name="last", version=0):
    return torch.load(root / f"checkpoints/tiny/version_{version}/{name}.ckpt", weights_only=True)


def without_places(saved):
    """All of a checkpoint but where and when it was written, and where that part of the training was to stop."""
    saved = {name: value for name, value in saved.items() if name not in ("saved_at", "environments")}
    saved["run_conditions"] = {**saved["run_conditions"], "max_steps": None}
    loop = saved["loops"]["fit_loop"]  # the rest of Lightning's counters depends on how often it was started
    saved["loops"] = (loop["epoch_loop.batch_progress"]["current"], loop["state_dict"], completed_epochs(saved))
    saved["callbacks"] = {
        name: {key: value for key, value in state.items() if "path" not in key and key != "best_k_models"}
        for name, state in saved["callbacks"].items()
    }
    return saved


def assert_equal(ours, theirs, place="checkpoint"):
    """Equality to the bit, through dictionaries and lists."""
    assert type(ours) is type(theirs), place
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), place
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{place}[{key!r}]")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), place
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{place}[{index}]")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, place
        assert torch.equal(ours, theirs), place
    else:
        assert ours == theirs, place


def assert_same_run(ours: Path, theirs: Path):
    """Both checkpoints, every point of TensorBoard and every row of metrics.csv."""
    for name in ("best", "last"):
        assert_equal(*(without_places(checkpoint(root, name)) for root in (ours, theirs)), name)
    logged = [scalars(root / "logs" / RUN) for root in (ours, theirs)]
    assert logged[0] == logged[1]
    assert [step for step, _ in logged[0]["train/loss_step"]] == list(range(1, len(logged[0]["train/loss_step"]) + 1))
    rows = [(root / "logs" / RUN / "metrics.csv").read_text() for root in (ours, theirs)]
    assert rows[0] == rows[1]
    assert [path.name for path in (ours / "logs/tiny").iterdir()] == ["version_0"]


def fit(recipe, root, *options):
    return (
        "fit", "--config", recipe, "--trainer.default_root_dir", root, "--trainer.max_epochs", EPOCHS,
        "--data.val_size", 29, "--data.batch_size", 24, "--pictures_every", 0, *options,
    )  # fmt: skip


# Images


def png_bomb(width: int, height: int) -> bytes:
    """A small PNG file that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# CIFAR

REFUSED = "http://127.0.0.1:1/archive.tar.gz"


class Python2Pickler(pickle._Pickler):
    """Writes str as Python 2 did and True as 1, so that a dtype has the official files' align=0."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_str(self, text: str) -> None:
        data = text.encode("latin1")
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(text)

    def save_bytes(self, data: bytes) -> None:
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(data)

    def save_bool(self, flag: bool) -> None:
        self.save_long(int(flag))

    dispatch[str] = save_str
    dispatch[bytes] = save_bytes
    dispatch[bool] = save_bool


def to_pickle(content: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(content)
    return file.getvalue()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


class Official:
    """A tiny CIFAR that torchvision takes for the official one: four training and two test images."""

    def __init__(self, name: Literal["cifar10", "cifar100"], root: Path, monkeypatch: pytest.MonkeyPatch):
        self.name = name
        self.dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
        self.root = root
        self.archive = root / self.dataset.filename
        self.folder = root / self.dataset.base_folder
        self.rows = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
        self.labels = [3, 0, 1, 2, 2, 3]
        self.classes = ["zebra", "apple", "mole", "bat"]
        key = "labels" if name == "cifar10" else "fine_labels"
        if name == "cifar10":
            batches = {"data_batch_1": [0, 1], "data_batch_2": [2, 3], "test_batch": [4, 5]}
            meta_name, meta = "batches.meta", {"label_names": self.classes}
        else:
            batches = {"train": [0, 1, 2, 3], "test": [4, 5]}
            meta_name, meta = "meta", {"fine_label_names": self.classes, "coarse_label_names": ["x"]}
        self.files = {
            batch: to_pickle({"data": self.rows[chosen], key: [self.labels[i] for i in chosen]})
            for batch, chosen in batches.items()
        }
        listed = [[batch, md5(data)] for batch, data in self.files.items()]
        self.files[meta_name] = to_pickle(meta)
        monkeypatch.setattr(self.dataset, "url", REFUSED)
        monkeypatch.setattr(self.dataset, "train_list", listed[:-1])
        monkeypatch.setattr(self.dataset, "test_list", listed[-1:])
        official_meta = {**self.dataset.meta, "md5": md5(self.files[meta_name])}
        monkeypatch.setattr(self.dataset, "meta", official_meta)
        self.monkeypatch = monkeypatch

    def write_archive(self, without: str = "") -> None:
        with tarfile.open(self.archive, "w:gz") as tar:
            for file, data in self.files.items():
                if file != without:
                    member = tarfile.TarInfo(f"{self.dataset.base_folder}/{file}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        self.monkeypatch.setattr(self.dataset, "tgz_md5", md5(self.archive.read_bytes()))

    def unpack(self) -> None:
        with tarfile.open(self.archive) as tar:
            tar.extractall(self.root, filter="data")
