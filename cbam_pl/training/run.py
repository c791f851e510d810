"""Where a run writes: checkpoints/RECIPE/version_N and logs/RECIPE/version_N, its lock, and files that are complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from cbam_pl.errors import UserError, cannot_write

_FIX = "make it writable, or name another with --trainer.default_root_dir"


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

    @property
    def lock_file(self) -> Path:
        """What a process that trains the run holds locked."""
        return self.logs / ".lock"

    def lock(self) -> FileLock:
        """Check that both folders can be written, and remove what a killed process left half written.

        Returns:
            What keeps other processes from training this run, until it is released or this process ends.

        Raises:
            UserError: a folder cannot be made or written, or another process trains this run.
        """
        lock = FileLock(self.lock_file, timeout=0)
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
                lock.release()
                raise cannot_write(f"into the run's folder {folder}", error, _FIX) from error
        return lock

    def discard_if_unused(self) -> None:
        """Remove the run's folders where training never began: no config.yaml, no checkpoint."""
        if not (self.logs / "config.yaml").exists() and not any(self.checkpoints.glob("*")):
            for folder in (self.checkpoints, self.logs):
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # the recipe has other runs
                    folder.parent.rmdir()


def new_run(root: Path, recipe: str) -> Run:
    """Make the folders of the next free version; two runs started at once get two.

    Raises:
        UserError: the folders cannot be made.
    """
    version = 0
    try:
        for kind in ("checkpoints", "logs"):
            folder = root / kind / recipe
            # By itself, since a higher version would not help where a file is in the way here.
            folder.mkdir(parents=True, exist_ok=True)
            numbers = [int(path.name[8:]) for path in folder.glob("version_*") if path.name[8:].isdigit()]
            version = max([version, *(number + 1 for number in numbers)])
        while True:
            run = Run(root, recipe, version)
            with suppress(FileExistsError):  # another run took the number in this moment
                run.checkpoints.mkdir(parents=True)  # with the recipe's folder, which a failed run may have removed
                run.logs.mkdir(parents=True)
                return run
            version += 1
    except OSError as error:
        raise cannot_write(f"into the run's folder {error.filename}", error, _FIX) from error


def run_of(checkpoint: Path) -> Run | None:
    """The run that wrote a checkpoint, by its path; None where it was moved elsewhere."""
    folder = checkpoint.absolute().parent
    number = folder.name.removeprefix("version_")
    if folder.name == number or not number.isdigit() or folder.parent.parent.name != "checkpoints":
        return None
    return Run(folder.parents[2], folder.parent.name, int(number))


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A stream that becomes the file at `path` once all of it is on the disk; before, and on errors, nothing changes.

    The unfinished file is in the same folder, since a rename is not possible from another file system.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def disk_error(path: Path, error: OSError) -> UserError:
    """What to report when a file of a run cannot be written during training: the space that is free, and the way on."""
    place = Path(os.path.realpath(path))
    there = next(folder for folder in (place, *place.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free / 1e6
    fix = f"{free:,.1f} MB are free there; earlier checkpoints are intact; make room, then resume with --ckpt_path last"
    return cannot_write(path, error, fix)
