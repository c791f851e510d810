"""How a checkpoint is found, read and written, and what a training that resumes from one checks before."""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.trainer.states import RunningStage

from cbam_pl.cli import PROGRAM
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.errors import UserError
from cbam_pl.models.network import NetworkConfig, check_trusted
from cbam_pl.training.classifier import Classifier
from cbam_pl.training.run import atomic_write, disk_error
from cbam_pl.training.schema import SchemaError, check_checkpoint, check_resumable, completed_epochs, upgrade
from cbam_pl.training.state import changed_settings
from cbam_pl.training.weights_folder import is_weights_folder, read_folder

_OWN = f"name a checkpoint that `{PROGRAM} fit` wrote"
_IS_FOLDER = 0x10  # MS-DOS's attribute of a part of an archive


def find_checkpoint(root: Path, name: str, recipe: str = "") -> tuple[Path, dict[str, Any]]:
    """The checkpoint that --ckpt_path names, and what it holds.

    `name` is a file, a folder of weights, or best or last: the most recently written best.ckpt or last.ckpt, of one
    recipe or of all. Where that is broken, the UserError names the newest one that is complete.
    """
    if name not in ("best", "last"):
        return Path(name), read_checkpoint(Path(name))
    newest = newest_checkpoint(root, name, recipe)
    try:
        return newest, read_checkpoint(newest)
    except UserError as error:
        # Named, not used: it may be hours older, or another run's.
        instead = "no other one is complete"
        for path in _newest_first(root, "*.ckpt", recipe):
            with suppress(UserError):
                read_checkpoint(path)
                instead = f"the newest complete one is {path}"
                break
        raise UserError(f"{error}; {instead}") from error


def newest_checkpoint(root: Path, name: str, recipe: str = "") -> Path:
    """The most recently written NAME.ckpt of a recipe, or of any; a UserError where there is none."""
    found = _newest_first(root, f"{name}.ckpt", recipe)
    if not found:
        of = f" of {recipe}" if recipe else ""
        raise UserError(
            f"no {name}.ckpt{of} under {root / 'checkpoints'}; train first ({PROGRAM} fit --config "
            "configs/cbam_cnn.yaml), or name a checkpoint with --ckpt_path"
        )
    return found[0]


def _newest_first(root: Path, name: str, recipe: str) -> list[Path]:
    folders = (root / "checkpoints").glob("*/version_*")  # a recipe's name is no pattern
    found = [path for folder in folders if recipe in ("", folder.parent.name) for path in folder.glob(name)]
    return sorted(found, key=lambda path: path.lstat().st_mtime_ns, reverse=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this program, on the CPU. Code that it may carry is not run; anything else is a UserError.

    A folder of weights gives the same, without the state of the training, and with the `record` of its run.
    """
    if is_weights_folder(path):
        return _checked(path, read_folder(path), has_state=False)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a checkpoint in it with --ckpt_path")
        if not path.is_file():
            raise UserError(f"no checkpoint at {path}; check --ckpt_path")
        with path.open("rb") as stream:
            with zipfile.ZipFile(stream) as archive:
                if damaged := archive.testzip():  # torch writes a CRC-32 of each part, but does not check it
                    raise zipfile.BadZipFile(damaged)
                if any(part.external_attr & _IS_FOLDER for part in archive.infolist()):
                    raise zipfile.BadZipFile("a part is marked as a folder, of which torch reads no byte")
            stream.seek(0)
            checkpoint = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values and is not loaded, since that could run code; name a "
            "checkpoint of this program"
        ) from error
    except UserError:
        raise
    except Exception as error:  # whatever a reader of archives and of their contents may raise
        reason = getattr(error, "strerror", None) or "it is incomplete, damaged, or not a checkpoint at all"
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}); name another with --ckpt_path") from error
    own = {"state_dict", "loops", "hyper_parameters", "figures"}
    if not isinstance(checkpoint, dict) or not own <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of this program; {_OWN}")
    return _checked(path, checkpoint, has_state=True)


def _checked(path: Path, checkpoint: dict[str, Any], has_state: bool) -> dict[str, Any]:
    try:
        upgrade(checkpoint)
        check_checkpoint(checkpoint, has_state)
    except (SchemaError, KeyError, TypeError) as error:
        fix = getattr(error, "fix", "") or _OWN
        raise UserError(f"{path} {error}; {fix}") from error
    return checkpoint


def load_classifier(
    path: Path,
    checkpoint: dict[str, Any],
    test_time_flip: bool | None = None,
    trust: Sequence[str] = (),
    make: type[Classifier] = Classifier,
) -> Classifier:
    """The network of a checkpoint, with its weights, in a `make`; `test_time_flip` overrides its own.

    A network that is not of this program is imported only from torchvision.models, timm and the packages of `trust`.

    Raises:
        UserError: the settings or weights are not those of a network of this program, or it is not to be imported.
    """
    settings = dict(checkpoint["hyper_parameters"])
    if test_time_flip is not None:
        settings["test_time_flip"] = test_time_flip
    try:
        if settings.get("network") is not None:
            network = NetworkConfig(**settings["network"]).without_weights()
            check_trusted(network, trust)
            settings["network"] = asdict(network)
        classifier = make(**settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} has hyper_parameters from which no network can be made: {error}") from error
    ours, saved = classifier.state_dict(), checkpoint["state_dict"]
    for key in [*ours, *saved]:
        shapes = [tuple(weights[key].shape) if key in weights else "missing" for weights in (saved, ours)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path} has weights that do not match its settings: {key} is {shapes[0]} in it, but {shapes[1]} in "
                f"{network_name(settings)}; name another checkpoint"
            )
    classifier.load_state_dict(saved)
    classifier.tested_epoch = checkpoint["epoch"] + 1
    return classifier


def network_name(hyper_parameters: Mapping[str, Any]) -> str:
    """The network of a checkpoint, as titles and summaries call it."""
    network = hyper_parameters.get("network")
    return str(hyper_parameters["arch"]) if network is None else NetworkConfig(**network).name


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are complete or not there, whenever the process or the machine dies.

    Lightning's own are written in another folder, and copied where that is on another file system (its issue 21253).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write into the same folder, wait for the disk, then rename; a UserError where the disk is full."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:
            # torch's writer hides the system's error inside one of its own.
            cause = error if isinstance(error, OSError) else error.__context__
            raise disk_error(path, cause if isinstance(cause, OSError) else OSError(0, str(error))) from error


def save_final_checkpoint(trainer: Trainer, last: Path, best: Path) -> None:
    """Write best.ckpt from last.ckpt, with the figures of the validation that the trainer has just made.

    last.ckpt does not know of it, so that a resumed training replaces it at the end of its first complete epoch.
    """
    checkpoint = torch.load(last, map_location="cpu", weights_only=True)
    checkpoint["figures"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    AtomicCheckpointIO().save_checkpoint(checkpoint, best)


def check_same_settings(path: Path, checkpoint: dict[str, Any], model: Classifier, data: ImageDataModule) -> None:
    """Reject a resume with another network, optimizer, schedule or other data, in a UserError with their keys."""
    if "optimizer_states" not in checkpoint:
        raise UserError(
            f"{path} has weights, but not the state of a training to resume; start from its weights with "
            f"--model.weights {path} instead of --ckpt_path"
        )
    optimization = checkpoint.get("optimization", {})  # its seed is the data's, too
    groups: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...] = (
        ("model", model.hparams, checkpoint["hyper_parameters"]),
        # Its own state, which the checkpoint restores, would otherwise win without a word.
        ("model", model.optimization, {name: value for name, value in optimization.items() if name != "seed"}),
        ("data", data.hparams, checkpoint["datamodule_hyper_parameters"]),
    )
    differing = [one for group, ours, saved in groups for one in changed_settings(f"{group}.", ours, saved)]
    if model.weights is not None and "started_from" in checkpoint:
        here, there = model.weights, checkpoint["started_from"]  # which may be gone by now
        if Path(here).resolve() != Path(there).resolve():
            differing.append(f"model.weights ({there or None} in the checkpoint, {here} now)")
    if differing:
        raise UserError(f"{path} was trained with other settings: {'; '.join(differing)}; resume with its settings")


def reason_to_stop(path: Path, checkpoint: dict[str, Any], trainer: Trainer, model: Classifier) -> str:
    """Why there is nothing left to train, or empty; a UserError where what only `fit` restores is wrong."""
    try:
        check_resumable(checkpoint, trainer, model.parameter_groups())
    except SchemaError as error:
        raise UserError(f"{path} {error}; {error.fix or 'resume from another checkpoint'}") from error
    epochs, steps = completed_epochs(checkpoint), checkpoint["global_step"]
    done = f"has completed {epochs} epochs and {steps} steps"
    limits = {"--trainer.max_epochs": (trainer.max_epochs, epochs), "--trainer.max_steps": (trainer.max_steps, steps)}
    reached = [name for name, (limit, there) in limits.items() if limit is not None and 0 <= limit <= there]
    if reached:
        return f"{done}; train further with a higher {' and '.join(reached)}"
    if epochs < (trainer.min_epochs or 0) or steps < (trainer.min_steps or 0):
        return ""  # what asked to stop before had to wait
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        state = checkpoint["callbacks"].get(callback.state_key)
        if isinstance(callback, Timer) and (state or callback.time_remaining() == 0):
            elapsed = state["time_elapsed"][RunningStage.TRAINING.value] if state else 0
            if (left := callback.time_remaining()) is not None and elapsed >= left:
                return f"{done}, and has used up trainer.max_time; give more"
        if isinstance(callback, EarlyStopping) and state and checkpoint.get("stopped_early"):
            return f"{done}, where EarlyStopping ended it; train further without it"
    return ""
