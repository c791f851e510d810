"""What a checkpoint must hold, compared before any of it is used: an edited or damaged file may hold anything."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from cbam_pl.environment import UNKNOWN

# Raise it when a key changes its meaning, and teach `upgrade` the old one.
FORMAT = 2

# A type; a list of values of one pattern; a dict with these keys, or with any keys where the key is a type.
_PATTERN: dict[Any, Any] = {
    "epoch": int,
    "global_step": int,
    "state_dict": {str: Tensor},
    "hyper_parameters": {"arch": object, "num_classes": int, "image_size": int, "attention": {"kind": str}},
    "datamodule_hyper_parameters": dict,
    "ImageDataModule": {"classes": [str], "mean": [float], "std": [float]},
    "figures": {str: float},
    "run_conditions": dict,
    "environments": [{**dict.fromkeys(UNKNOWN, str), str: str}],
}
# The state of the training, which a folder of weights does not have.
_STATE: dict[Any, Any] = {
    "loops": {"fit_loop": {"epoch_progress": {"current": {"processed": int}}}},
    "callbacks": {str: dict},
    "optimizer_states": list,
    "lr_schedulers": list,
    "interrupted_epoch": dict,
}
_FOLDER: dict[Any, Any] = {"format": int, "precision": str, "checkpoint": dict, "record": dict, "sha256": {str: str}}
_RESUMED: dict[Any, Any] = {
    "lr_schedulers": [dict],
    "interrupted_epoch": {"lr": float, "sums": [float]},
    "optimizer_states": [{"state": {int: dict}, "param_groups": [{"lr": float, "params": [int]}]}],
}


class SchemaError(ValueError):
    """A key that is missing or has the wrong type; the message continues "PATH …". `fix` replaces the reader's own."""

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem)
        self.fix = fix


def completed_epochs(checkpoint: Mapping[str, Any]) -> int:
    """Epochs that a checkpoint has completed; its own `epoch` counts from 0 and may be interrupted."""
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def upgrade(checkpoint: dict[str, Any]) -> None:
    """Give the keys of earlier formats their present names."""
    for old, new in (("broken_off", "interrupted_epoch"), ("trained_with", "run_conditions")):
        if old in checkpoint:
            checkpoint[new] = checkpoint.pop(old)
    interrupted = checkpoint.setdefault("interrupted_epoch", {})
    if isinstance(interrupted, dict) and "means" in interrupted:  # weighted sum and weight, of loss and accuracy
        means = interrupted.pop("means")
        interrupted["sums"] = [means["loss"][0], means["acc"][0], means["loss"][1]]
    checkpoint.setdefault("run_conditions", {})
    checkpoint.setdefault("environments", [UNKNOWN])
    settings = checkpoint.get("hyper_parameters")
    attention = settings.get("attention") if isinstance(settings, dict) else None
    if isinstance(attention, dict) and "start" not in attention:  # older than the identity start
        attention |= {"where": None, "start": None if attention.get("kind") == "none" else "paper"}


def check_checkpoint(checkpoint: dict[str, Any], has_state: bool = True) -> None:
    """Check what every command reads, or raise a SchemaError with the key that is wrong.

    `has_state`: whether the state of the training must be there.
    """
    version = checkpoint.get("format", 1)
    if not isinstance(version, int) or version > FORMAT:
        raise SchemaError(f"has format {version}, and this version reads up to {FORMAT}", "update the program")
    _match(checkpoint, _PATTERN | _STATE if has_state else _PATTERN)
    later = {"changes": [str], "optimization": dict, "started_from": str}  # which earlier versions did not write
    for name, pattern in later.items():
        if name in checkpoint:
            _match(checkpoint[name], pattern, name)
    if (network := checkpoint["hyper_parameters"].get("network")) is not None:
        _match(network, {"class_path": str, "init_args": {str: object}}, "hyper_parameters.network")
    if checkpoint["epoch"] < 0 or checkpoint["global_step"] < 0:
        raise SchemaError(f"has epoch={checkpoint['epoch']} and global_step={checkpoint['global_step']}, below 0")
    data, num_classes = checkpoint["ImageDataModule"], checkpoint["hyper_parameters"]["num_classes"]
    if [len(data[key]) for key in ("mean", "std", "classes")] != [3, 3, num_classes]:
        raise SchemaError("has ImageDataModule.mean, std or classes of another length than its network needs")
    for key in {"train_ids", "val_ids"} & data.keys():
        if not isinstance(data[key], Tensor) or data[key].dtype != torch.int64:
            raise SchemaError(f"has ImageDataModule.{key} other than an int64 tensor")


def check_folder(config: Any) -> None:
    """Check the config.json of a folder of weights, whose `checkpoint` check_checkpoint is for."""
    version = config.get("format") if isinstance(config, dict) else None
    if isinstance(version, int) and version > 1:
        raise SchemaError(f"has format {version}, and this version reads 1", "update the program")
    _match(config, _FOLDER)
    if unknown := config.keys() - _FOLDER.keys():
        raise SchemaError(f"has the unknown key {min(unknown)}")
    _match(config["checkpoint"], {"ImageDataModule": dict}, "checkpoint")


def check_resumable(checkpoint: dict[str, Any], trainer: Trainer, groups: list[dict[str, Any]]) -> None:
    """Check what `fit` restores besides: the loops' counters, callbacks, optimizer and schedule.

    The trainer's own states are the pattern; the optimizer must have the parameters of `groups`.
    """
    _match(checkpoint, _RESUMED)
    if len(checkpoint["interrupted_epoch"]["sums"]) != 3:
        raise SchemaError("has interrupted_epoch.sums other than three")
    _match(checkpoint["loops"]["fit_loop"], trainer.fit_loop.state_dict(), "loops.fit_loop")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in checkpoint["callbacks"]:
            pattern: dict[str, type] = dict.fromkeys(callback.state_dict(), object)
            if isinstance(callback, EarlyStopping):
                pattern |= {"wait_count": int, "patience": int}
            _match(checkpoint["callbacks"][callback.state_key], pattern, f"callbacks.{callback.state_key}")
    shapes = [parameter.shape for group in groups for parameter in group["params"]]
    optimizer = [*checkpoint["optimizer_states"], {"state": {}, "param_groups": []}][0]
    places = iter(range(len(shapes)))
    expected = [[next(places) for _ in group["params"]] for group in groups]
    if [group["params"] for group in optimizer["param_groups"]] != expected:
        raise SchemaError(f"has optimizer_states.param_groups for other than the network's {len(shapes)} parameters")
    names = [[group.get("name") for group in given] for given in (optimizer["param_groups"], groups)]
    if names[0] != names[1]:
        raise SchemaError("has model.lr_factors in another order", "give them in its order")
    for index, values in optimizer["state"].items():
        if not 0 <= index < len(shapes):
            raise SchemaError(f"has optimizer_states.state.{index}, which belongs to no parameter")
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and not _can_belong(value.shape, shapes[index]):
                raise SchemaError(f"has optimizer_states.state.{index}.{key} of another shape than its parameter")


def _can_belong(state: torch.Size, parameter: torch.Size) -> bool:
    """Whether an optimizer may keep a tensor of this shape for a parameter: Adafactor's are means over a dimension."""
    return len(state) == len(parameter) and all(one in (1, other) for one, other in zip(state, parameter, strict=True))


def _match(value: Any, pattern: Any, key: str = "") -> None:
    """Compare a value with a pattern, or with another value of the same structure."""
    kind: type = pattern if isinstance(pattern, type) else type(pattern)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SchemaError(f"has {key or 'content'} of type {type(value).__name__}, which must be {kind.__name__}")
    if isinstance(value, list) and isinstance(pattern, list) and pattern:
        for index, item in enumerate(value):
            _match(item, pattern[0], f"{key}.{index}")
    elif isinstance(value, dict) and isinstance(pattern, dict):
        for name, inner in pattern.items():
            if not isinstance(name, type) and name not in value:
                raise SchemaError(f"has no {key}.{name}".replace(" .", " "))
            for found in value if isinstance(name, type) else [name]:
                _match(found, type(found) if not isinstance(name, type) else name, f"{key}'s key")
                _match(value[found], inner, f"{key}.{found}".lstrip("."))
