"""Where a run writes: checkpoints/RECIPE/version_N and logs/RECIPE/version_N, and how they are found again."""

import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO

from cbam_pl.data.datamodule import ImageDataModule
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

    def discard_if_unused(self) -> None:
        """Remove the run's folders where training never began: no config.yaml, no checkpoint."""
        if not (self.logs / "config.yaml").exists() and not any(self.checkpoints.glob("*")):
            for folder in (self.checkpoints, self.logs):
                shutil.rmtree(folder, ignore_errors=True)


def new_run(root: Path, recipe: str) -> Run:
    """Take the next free version; two runs started at once get two.

    Raises:
        UserError: the folders cannot be made.
    """
    version = 0
    for kind in ("checkpoints", "logs"):
        taken = (root / kind / recipe).glob("version_*")
        numbers = [int(path.name[8:]) for path in taken if path.name[8:].isdigit()]
        version = max([version, *(number + 1 for number in numbers)])
    while True:
        run = Run(root, recipe, version)
        try:
            run.checkpoints.mkdir(parents=True)
            run.logs.mkdir(parents=True)
            return run
        except FileExistsError:
            version += 1  # another run took it in this moment
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


def newest_checkpoint(root: Path, name: str, recipe: str = "*") -> Path:
    """The most recently written NAME.ckpt of a recipe, or of any.

    Args:
        root: the folder that holds `checkpoints`.
        name: best or last.
        recipe: the recipe's name.

    Raises:
        UserError: there is none.
    """
    found = list((root / "checkpoints").glob(f"{recipe}/version_*/{name}.ckpt"))
    if not found:
        of = "" if recipe == "*" else f" of {recipe}"
        raise UserError(
            f"no {name}.ckpt{of} under {root / 'checkpoints'}; train first (python train.py fit --config "
            "configs/cbam_cnn.yaml), or name a checkpoint with --ckpt_path"
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this program, on the CPU; code that it may carry is not run.

    Raises:
        UserError: it is missing, broken, or another program's.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; check --ckpt_path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is broken, or holds more than tensors and plain values and is not loaded, since that could run "
            "code; name a checkpoint of this program"
        ) from error
    except (OSError, EOFError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint: it is broken or cut off; name another") from error
    needed = {"state_dict", "epoch", "hyper_parameters", "datamodule_hyper_parameters", "ImageDataModule"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of this program; name one that `train.py fit` wrote")
    return checkpoint


def write_test(
    run: Run,
    checkpoint: dict[str, Any],
    data: ImageDataModule,
    trainer: Trainer,
    confusion: list[list[int]],
    options: list[str],
) -> None:
    """Write the figures of a test into the run's logs, as test.json.

    Args:
        run: whose checkpoint was tested.
        checkpoint: what was tested.
        data: the data module that was tested on.
        trainer: what tested.
        confusion: images by true class (rows) and predicted class (columns).
        options: of the command line, but for the checkpoint's path.
    """
    record = {
        "epoch": checkpoint["epoch"] + 1,
        "images": sum(map(sum, confusion)),
        **{name: float(value) for name, value in trainer.callback_metrics.items()},
        "classes": data.classes,
        "confusion": confusion,
        "options": options,
        "environment": describe_environment(trainer.strategy.root_device),
    }
    (run.logs / "test.json").write_text(json.dumps(record) + "\n")


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
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(path)
        except (OSError, RuntimeError) as error:
            beside.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
            raise UserError(
                f"cannot write {path} ({getattr(error, 'strerror', None) or error}); {free / 1e6:,.1f} MB are free "
                "there; earlier checkpoints are intact; make room, then resume with --ckpt_path last"
            ) from error
