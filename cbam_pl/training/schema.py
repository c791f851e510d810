"""What a checkpoint must hold, compared before any of it is used: an edited or damaged file may hold anything."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn

# Raise it when a key changes its meaning, and teach checkpoint.py the old one.
FORMAT = 2

_TYPES: dict[str, type] = {
    "state_dict": dict,
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "hyper_parameters": dict,
    "datamodule_hyper_parameters": dict,
    "ImageDataModule": dict,
    "figures": dict,
    "interrupted_epoch": dict,
    "run_conditions": dict,
}


class SchemaError(ValueError):
    """A key that is missing or has the wrong type; the message continues "PATH …"."""


def check_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Check what every command reads.

    Raises:
        SchemaError: with the key that is wrong.
    """
    version = checkpoint.get("format", 1)
    if not isinstance(version, int) or version > FORMAT:
        raise SchemaError(f"has format {version}, and this version of the program reads up to {FORMAT}: update it")
    for key, kind in _TYPES.items():
        _expect(checkpoint, key, kind)
    if checkpoint["epoch"] < 0 or checkpoint["global_step"] < 0:
        raise SchemaError(f"has epoch={checkpoint['epoch']} and global_step={checkpoint['global_step']}, below 0")
    for group, kind in (("state_dict", Tensor), ("figures", float), ("callbacks", dict)):
        for key in checkpoint[group]:
            _expect(checkpoint[group], key, kind, f"{group}.")
    _check_data(checkpoint["ImageDataModule"], checkpoint["hyper_parameters"])
    place: Any = checkpoint["loops"]
    for key in ("fit_loop", "epoch_progress", "current"):
        place = _expect(place, key, dict, "loops.")
    _expect(place, "processed", int, "loops.fit_loop.epoch_progress.current.")


def _check_data(data: dict[str, Any], network: dict[str, Any]) -> None:
    for key, kind in (("classes", str), ("mean", float), ("std", float)):
        values = _expect(data, key, list, "ImageDataModule.")
        if not all(type(value) is kind for value in values):
            raise SchemaError(f"has ImageDataModule.{key}={values!r:.80}, which must be {kind.__name__} values")
    for key in {"train_ids", "val_ids"} & data.keys():
        if _expect(data, key, Tensor, "ImageDataModule.").dtype != torch.int64:
            raise SchemaError(f"has ImageDataModule.{key} of {data[key].dtype}, which must be int64")
    num_classes = _expect(network, "num_classes", int, "hyper_parameters.")
    if [len(data[key]) for key in ("mean", "std", "classes")] != [3, 3, num_classes]:
        raise SchemaError("has ImageDataModule.mean, std or classes of another length than its network needs")
    if not 1 <= num_classes <= 1_000_000:
        raise SchemaError(f"has hyper_parameters.num_classes={num_classes}, which must be from 1 to 1,000,000")


def check_resumable(checkpoint: dict[str, Any], trainer: Trainer, network: nn.Module) -> None:
    """Check what `fit` restores besides: the loops' counters, callbacks, optimizer and schedule.

    Args:
        checkpoint: what `check_checkpoint` has passed.
        trainer: whose own states are the pattern.
        network: whose parameters the optimizer has.

    Raises:
        SchemaError: with the key that is wrong.
    """
    _expect_like(checkpoint["loops"]["fit_loop"], trainer.fit_loop.state_dict(), "loops.fit_loop")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in checkpoint["callbacks"]:
            for key in callback.state_dict():
                if key not in checkpoint["callbacks"][callback.state_key]:
                    raise SchemaError(f"has no callbacks.{callback.state_key}.{key}")
    interrupted = checkpoint["interrupted_epoch"]
    sums = _expect(interrupted, "sums", list, "interrupted_epoch.")
    if len(sums) != 3 or not all(isinstance(value, float) for value in (*sums, interrupted.get("lr"))):
        raise SchemaError("has an interrupted_epoch whose lr and three sums are not float values")
    _check_optimizer(checkpoint["optimizer_states"], [parameter.shape for parameter in network.parameters()])
    if not all(isinstance(schedule, dict) for schedule in checkpoint["lr_schedulers"]):
        raise SchemaError("has lr_schedulers that are not dicts")


def _check_optimizer(states: list[Any], shapes: list[torch.Size]) -> None:
    if len(states) != 1 or not isinstance(states[0], dict):
        raise SchemaError("has optimizer_states other than those of one optimizer")
    (optimizer,) = states
    state = _expect(optimizer, "state", dict, "optimizer_states.")
    groups = _expect(optimizer, "param_groups", list, "optimizer_states.")
    if not groups or not all(isinstance(group, dict) and isinstance(group.get("lr"), float) for group in groups):
        raise SchemaError("has optimizer_states.param_groups without a learning rate")
    if [group.get("params") for group in groups] != [list(range(len(shapes)))]:
        raise SchemaError(f"has optimizer_states.param_groups for other than {len(shapes)} parameters")
    for index, values in state.items():
        if not isinstance(index, int) or not 0 <= index < len(shapes) or not isinstance(values, dict):
            raise SchemaError(f"has optimizer_states.state.{index}, which belongs to no parameter")
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != shapes[index]:
                raise SchemaError(f"has optimizer_states.state.{index}.{key} of another shape than its parameter")


def _expect(values: Mapping[Any, Any], key: Any, kind: type, prefix: str = "") -> Any:
    """The value of a key, of a type."""
    if key not in values:
        raise SchemaError(f"has no {prefix}{key}")
    if not isinstance(values[key], kind) or (kind is int and isinstance(values[key], bool)):
        found = type(values[key]).__name__
        raise SchemaError(f"has a {found} as {prefix}{key}, which must be a {kind.__name__}")
    return values[key]


def _expect_like(value: Any, pattern: Any, key: str) -> None:
    """Compare the keys and types of nested dictionaries."""
    if isinstance(pattern, Mapping):
        if not isinstance(value, Mapping):
            raise SchemaError(f"has a {type(value).__name__} as {key}, which must be a dict")
        for name in pattern:
            _expect_like(_expect(value, name, object, f"{key}."), pattern[name], f"{key}.{name}")
    elif isinstance(pattern, (bool, int)) and (not isinstance(value, type(pattern)) or value < 0):
        raise SchemaError(f"has {key}={value!r:.80}, which must be a count or a truth value")
