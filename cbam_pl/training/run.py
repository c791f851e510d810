"""Where a run writes: checkpoints/RECIPE/version_N and logs/RECIPE/version_N, its lock, and files that are complete."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from cbam_pl.errors import UserError, cannot_write

RESUMED = "# resumed "  # begins a line of config.yaml, for what a resume changed
_FIX = "make it writable, or name another with --trainer.default_root_dir"


@dataclass
class Run:
    """One training of a recipe, with its folders: `checkpoints`, and `logs`, of events, config.yaml and metrics.csv.

    `best` and `last` are the paths of best.ckpt and last.ckpt.

    Args:
        root: the folder that holds `checkpoints` and `logs`.
        recipe: name of the configuration file, without .yaml.
        version: number of the run, from 0.
    """

    root: Path
    recipe: str
    version: int

    def __post_init__(self) -> None:
        self.checkpoints = self.root / "checkpoints" / self.recipe / f"version_{self.version}"
        self.best, self.last = (self.checkpoints / f"{name}.ckpt" for name in ("best", "last"))
        self.logs = self.root / "logs" / self.recipe / f"version_{self.version}"
        self.lock_file = self.logs / ".lock"  # which a process that trains the run holds locked

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training this run, and remove it in the end if no training began."""
        with ExitStack() as stack:
            stack.callback(self.discard_if_unused)
            try:
                for folder in (self.logs, self.checkpoints):
                    folder.mkdir(parents=True, exist_ok=True)
                    if folder == self.logs:
                        stack.enter_context(FileLock(self.lock_file, timeout=0))
                    for leftover in folder.glob(".*.[0-9]*"):
                        leftover.unlink()
                    with tempfile.TemporaryFile(dir=folder) as probe:
                        probe.write(b"probe")
            except Timeout as error:
                raise UserError(
                    f"another process is training {self.checkpoints}; wait until it ends, or stop it"
                ) from error
            except OSError as error:
                raise cannot_write(f"into the run's folder {folder}", error, _FIX) from error
            yield

    def discard_if_unused(self) -> None:
        """Remove the run's folders where training never began: no config.yaml, no checkpoint."""
        if not (self.logs / "config.yaml").exists() and not any(self.checkpoints.glob("*")):
            for folder in (self.checkpoints, self.logs):
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # the recipe has other runs
                    folder.parent.rmdir()


def new_run(root: Path, recipe: str) -> Run:
    """Make the folders of the next free version; two runs started at once get two."""
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


def results_folder(checkpoint: Path, root: Path) -> Path | None:
    """Where the results of a checkpoint go: into its run's log folder; None where that is not known.

    Those of a folder of weights go into root/logs/weights/NAME, so that it stays as it was written.
    """
    if checkpoint.is_dir():
        return root / "logs" / "weights" / checkpoint.resolve().name
    run = run_of(checkpoint)
    return None if run is None or not run.logs.is_dir() else run.logs


def read_result(logs: Path, name: str, checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a JSON file in a log folder holds of this checkpoint; None where it has nothing of it."""
    content = read_json(logs / name)
    place = checkpoint["epoch"] + 1, checkpoint["global_step"], checkpoint.get("saved_at")
    return content if is_result_of(content, *place) else None


def read_json(path: Path) -> dict[str, Any]:
    """The content of a result's file; empty where it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_result_of(result: Mapping[str, Any], epoch: int | None, step: int | None, saved_at: float | None = None) -> bool:
    """Whether a result is of the checkpoint of that epoch, from 1, that step, and that time, as far as they are known.

    An epoch that was interrupted, and the same epoch once it is complete, have other weights, and so have two folders
    of weights of one name; earlier versions did not note step and time.
    """
    others = {"step": step, "saved_at": saved_at}
    known = all(value is None or result.get(name, value) in (value, None) for name, value in others.items())
    return result.get("epoch") == epoch and known


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

    The unfinished file is in the same folder, since a rename is not possible from another file system. The folder is
    made if there is none.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
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


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write(text.encode())


def disk_error(path: Path, error: OSError) -> UserError:
    """What to report when a file of a run cannot be written during training: the space that is free, and the way on."""
    place = Path(os.path.realpath(path))
    there = next(folder for folder in (place, *place.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free / 1e6
    fix = f"{free:,.1f} MB are free there; earlier checkpoints are intact; make room, then run the command again"
    return cannot_write(path, error, f"{fix} (fit: with --ckpt_path last, to resume)")
