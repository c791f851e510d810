"""Where a run writes: checkpoints/RECIPE/version_N and logs/RECIPE/version_N, and how they are found again."""

import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO

from cbam_pl.environment import describe_environment
from cbam_pl.errors import UserError


@dataclass(frozen=True)
class Run:
    """One training of a recipe.

    Args:
        root: the folder that holds `checkpoints` and `logs`.
        recipe: name of the configuration file, without .yaml.
        version: number of the run, from 0.
    """

    root: Path
    recipe: str
    version: int

    @property
    def checkpoints(self) -> Path:
        """Folder of best.ckpt and last.ckpt."""
        return self.root / "checkpoints" / self.recipe / f"version_{self.version}"

    @property
    def logs(self) -> Path:
        """Folder of the TensorBoard events, config.yaml and metrics.csv."""
        return self.root / "logs" / self.recipe / f"version_{self.version}"

    def take(self) -> FileLock:
        """See that both folders take a file, and remove what a killed process left half written.

        Returns:
            What keeps other processes from training this run, until it is released or this process ends.

        Raises:
            UserError: a folder cannot be made or written, or another process trains this run.
        """
        lock = FileLock(self.logs / ".lock", timeout=0)
        for folder in (self.logs, self.checkpoints):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if not lock.is_locked:
                    lock.acquire()
                for leftover in folder.glob(".*.[0-9]*"):
                    leftover.unlink()
                with tempfile.TemporaryFile(dir=folder) as probe:
                    probe.write(b"probe")
            except Timeout:
                raise UserError(
                    f"another process is training {self.checkpoints}; wait until it ends, or stop it"
                ) from None
            except OSError as error:
                raise UserError(
                    f"cannot write into the run's folder {folder} ({error.strerror}); make it writable, or name "
                    "another with --trainer.default_root_dir"
                ) from error
        return lock

    def discard_if_unused(self) -> None:
        """Remove the run's folders where training never began: no config.yaml, no checkpoint."""
        if not (self.logs / "config.yaml").exists() and not any(self.checkpoints.glob("*")):
            for folder in (self.checkpoints, self.logs):
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # the recipe's other runs stand there
                    folder.parent.rmdir()


def new_run(root: Path, recipe: str) -> Run:
    """Take the next free version; two runs started at once get two.

    Raises:
        UserError: the folders cannot be made.
    """
    version = 0
    try:
        for kind in ("checkpoints", "logs"):
            folder = root / kind / recipe
            # By itself, since of what is in the way here no higher version gets rid.
            folder.mkdir(parents=True, exist_ok=True)
            numbers = [int(path.name[8:]) for path in folder.glob("version_*") if path.name[8:].isdigit()]
            version = max([version, *(number + 1 for number in numbers)])
        while True:
            run = Run(root, recipe, version)
            with suppress(FileExistsError):  # another run took it in this moment
                run.checkpoints.mkdir(parents=True)  # the recipe's folder, too: a refused run may just have removed it
                run.logs.mkdir(parents=True)
                return run
            version += 1
    except OSError as error:
        raise UserError(
            f"cannot make the run's folder {error.filename} ({error.strerror}); make it writable, or name another "
            "with --trainer.default_root_dir"
        ) from error


def run_of(checkpoint: Path) -> Run | None:
    """The run that wrote a checkpoint, by where it lies; None where it was moved elsewhere."""
    folder = checkpoint.absolute().parent
    number = folder.name.removeprefix("version_")
    if folder.name == number or not number.isdigit() or folder.parent.parent.name != "checkpoints":
        return None
    return Run(folder.parents[2], folder.parent.name, int(number))


def _newest_first(root: Path, pattern: str) -> list[Path]:
    """The checkpoints of the runs under `root`, the last written first."""
    found = (root / "checkpoints").glob(pattern)
    return sorted(found, key=lambda path: path.lstat().st_mtime_ns, reverse=True)


def newest_checkpoint(root: Path, name: str, recipe: str = "*") -> Path:
    """The most recently written NAME.ckpt of a recipe, or of any.

    Args:
        root: the folder that holds `checkpoints`.
        name: best or last.
        recipe: the recipe's name.

    Raises:
        UserError: there is none.
    """
    found = _newest_first(root, f"{recipe}/version_*/{name}.ckpt")
    if not found:
        of = "" if recipe == "*" else f" of {recipe}"
        raise UserError(
            f"no {name}.ckpt{of} under {root / 'checkpoints'}; train first (python train.py fit --config "
            "configs/cbam_cnn.yaml), or name a checkpoint with --ckpt_path"
        )
    return found[0]


def find_checkpoint(root: Path, name: str, recipe: str = "*") -> tuple[Path, dict[str, Any]]:
    """The checkpoint that --ckpt_path names, and what it holds.

    Args:
        root: the folder that holds `checkpoints`.
        name: a file; or best or last, for the most recently written best.ckpt or last.ckpt.
        recipe: the recipe whose runs are searched, or * for any.

    Raises:
        UserError: there is none; or it is broken, with the newest one that is complete.
    """
    if name not in ("best", "last"):
        return Path(name), read_checkpoint(Path(name))
    newest = newest_checkpoint(root, name, recipe)
    try:
        return newest, read_checkpoint(newest)
    except UserError as error:
        # Named, not taken: it may be hours older, or another run's.
        others = (path for path in _newest_first(root, f"{recipe}/version_*/*.ckpt") if path != newest)
        complete = next(filter(_is_complete, others), None)
        instead = "no other one is complete" if complete is None else f"the newest complete one is {complete}"
        raise UserError(f"{error}; {instead}") from error


def _is_complete(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except UserError:
        return False
    return True


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this program, on the CPU; code that it may carry is not run.

    Raises:
        UserError: it is missing, broken, or another program's.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a checkpoint in it with --ckpt_path")
        if not path.is_file():
            raise UserError(f"no checkpoint at {path}; check --ckpt_path")
        with path.open("rb") as stream:
            _check_sums(stream)
            checkpoint = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values and is not loaded, since that could run code; name a "
            "checkpoint of this program"
        ) from error
    except UserError:
        raise
    except Exception as error:  # whatever a reader of archives and of their contents may stumble over
        reason = getattr(error, "strerror", None) or "it is cut off, damaged, or no checkpoint at all"
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}); name another with --ckpt_path") from error
    needed = {
        "state_dict", "epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers",
        "hyper_parameters", "datamodule_hyper_parameters", "ImageDataModule", "figures", "broken_off",
    }  # fmt: skip
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of this program; name one that `train.py fit` wrote")
    return checkpoint


def epochs_of(checkpoint: dict[str, Any]) -> int:
    """Epochs that a checkpoint has completed; its own `epoch` counts from 0 and may be broken off."""
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def _check_sums(stream: BinaryIO) -> None:
    """Hold each part of a checkpoint to its CRC-32, which torch writes but does not check.

    Raises:
        zipfile.BadZipFile: a part is not what was written.
    """
    with zipfile.ZipFile(stream) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)
    stream.seek(0)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A stream that becomes the file at `path` once all of it is on the disk; before, and on errors, nothing changes.

    The half-written file lies beside it, since a rename is not possible from another file system.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def cannot_write(path: Path, reason: str) -> UserError:
    """What to tell the user when a file of a run cannot be written.

    Args:
        path: the file or folder.
        reason: what the system says.
    """
    place = Path(os.path.realpath(path))
    there = next(folder for folder in (place, *place.parents) if folder.is_dir())
    return UserError(
        f"cannot write {path} ({reason}); {shutil.disk_usage(there).free / 1e6:,.1f} MB are free there; earlier "
        "checkpoints are intact; make room, then resume with --ckpt_path last"
    )


def write_test(
    run: Run,
    checkpoint: dict[str, Any],
    classes: list[str],
    trainer: Trainer,
    confusion: list[list[int]],
    options: list[str],
) -> None:
    """Write the figures of a test into the run's logs, as test.json.

    Args:
        run: whose checkpoint was tested.
        checkpoint: what was tested.
        classes: names of the classes.
        trainer: what tested.
        confusion: images by true class (rows) and predicted class (columns).
        options: of the command line, but for the checkpoint's path.
    """
    record = {
        "epoch": checkpoint["epoch"] + 1,
        "images": sum(map(sum, confusion)),
        **{name: float(value) for name, value in trainer.callback_metrics.items()},
        "classes": classes,
        "confusion": confusion,
        "options": options,
        "environment": describe_environment(trainer.strategy.root_device),
    }
    with written_whole(run.logs / "test.json") as stream:
        stream.write(f"{json.dumps(record)}\n".encode())


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or not there, whenever the process or the machine dies.

    Lightning writes through a temporary file in another folder, which is a copy, not a rename, where that folder is
    another file system's (lightning issue 21253).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the target, wait for the disk, then rename.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:
            # torch's writer hides the system's error behind one of its own.
            cause = error if isinstance(error, OSError) else error.__context__
            raise cannot_write(path, getattr(cause, "strerror", None) or str(error)) from error
