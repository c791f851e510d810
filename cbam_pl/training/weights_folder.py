"""A trained network to hand on: a folder of model.safetensors, config.json and a card, of which no part can run code.

config.json has what a checkpoint has beside the weights and the state of the training, what is known of the run, and
the SHA-256 of every file. Whatever reads checkpoints gets the same from a folder (checkpoint.py), without the state.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from cbam_pl.errors import UserError, cannot_write
from cbam_pl.training.run import atomic_write
from cbam_pl.training.schema import SchemaError, check_folder

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_SPLIT = "split.safetensors"  # ids of a folder's images that were trained on and held out, where the data has them
NAMES = (WEIGHTS, CONFIG, CARD, _SPLIT)
_NETWORK = "network."  # what the names of weights begin with in a checkpoint, where they are a Classifier's
# What is kept of a checkpoint, beside the weights and the ids.
_KEPT = (
    *("format", "epoch", "global_step", "saved_at", "hyper_parameters", "datamodule_hyper_parameters"),
    *("ImageDataModule", "figures", "run_conditions", "environments", "optimization", "started_from"),
)

Precision = Literal["float32", "float16"]


def is_weights_folder(path: Path) -> bool:
    """Whether a path is such a folder, complete or not."""
    return path.is_dir() and any((path / name).exists() for name in (WEIGHTS, CONFIG))


def read_folder(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, without the state of the training; `record` is what is known of the run.

    Raises:
        UserError: a file is missing, damaged, or not the one that was written.
    """
    content = _read(path, CONFIG)
    try:
        config = json.loads(content)
        check_folder(config)
        expected = config["sha256"]
        if unknown := expected.keys() - {*NAMES}:
            raise SchemaError(f"has the unknown file {min(unknown)}")
        files = {name: _read(path, name) for name in (WEIGHTS, CARD, *({_SPLIT} & expected.keys()))}
        for name, found in {CONFIG: _canonical(config), **files}.items():
            if hashlib.sha256(found).hexdigest() != expected.get(name):
                raise UserError(
                    f"{path / name} is not the file that was written (its SHA-256 differs from the one in {CONFIG}); "
                    "restore it, or export the checkpoint again"
                )
        weights = safetensors.torch.load(files[WEIGHTS])
        data = config["checkpoint"]["ImageDataModule"]
        data |= safetensors.torch.load(files[_SPLIT]) if _SPLIT in files else {}
    except (ValueError, KeyError, RecursionError, safetensors.SafetensorError) as error:
        reason = str(error) if isinstance(error, SchemaError) else "is damaged, or was not written by this program"
        fix = getattr(error, "fix", "") or "restore it, or export the checkpoint again"
        raise UserError(f"{path / CONFIG} {reason}; {fix}") from error
    record = config["record"]
    if config["precision"] == "float16":
        record["rounded"] = True  # also of a folder that is written from this one
    return {**config["checkpoint"], "state_dict": _unpack(weights), "record": record}


def write_folder(
    path: Path, checkpoint: Mapping[str, Any], precision: Precision, record: dict[str, Any], card: str
) -> dict[str, int]:
    """Write a checkpoint's network, what is known of it, and its card. Gives the size of each file in bytes.

    Raises:
        UserError: the folder holds other files, or cannot be written.
    """
    ids = {name: value for name, value in checkpoint["ImageDataModule"].items() if isinstance(value, Tensor)}
    data = {name: value for name, value in checkpoint["ImageDataModule"].items() if name not in ids}
    kept = {name: checkpoint[name] for name in _KEPT if name in checkpoint} | {"ImageDataModule": data}
    files = {WEIGHTS: _bytes_of(_pack(checkpoint["state_dict"], precision)), CARD: card.encode()}
    if ids:
        files[_SPLIT] = _bytes_of(ids)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    config = {"format": 1, "precision": precision, "checkpoint": kept, "record": record, "sha256": hashes}
    hashes[CONFIG] = hashlib.sha256(_canonical(config)).hexdigest()
    files[CONFIG] = f"{json.dumps(config, indent=1, ensure_ascii=False)}\n".encode()  # the last: without it, incomplete
    check_free(path)
    try:
        with ExitStack() as unfinished:  # all are written before any replaces that of an earlier folder
            for name, content in reversed(files.items()):  # the last to begin is the first to replace
                stream = unfinished.enter_context(atomic_write(path / name))
                stream.write(content)
                stream.flush()
        if _SPLIT not in files:
            (path / _SPLIT).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error, "name another folder with --output") from error
    return {name: len(content) for name, content in files.items()}


def check_free(path: Path) -> None:
    """Reject a folder of other files, or that cannot be read, with a UserError."""
    try:
        others = [one.name for one in path.glob("*") if one.name not in NAMES and not one.name.startswith(".")]
    except OSError as error:
        raise cannot_write(path, error, "name another folder with --output") from error
    if others:
        raise UserError(f"{path} holds other files, such as {min(others)}; name another folder with --output")


def as_stored(state_dict: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """The weights of a checkpoint as the folder gives them back: rounded, where they are stored in half precision.

    Raises:
        UserError: a weight is too large for half precision.
    """
    return _unpack(_pack(state_dict, precision))


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} has no {name} that can be read ({error.strerror}); restore it, or export the checkpoint again"
        ) from error


def _canonical(config: Mapping[str, Any]) -> bytes:
    """What config.json's own SHA-256 is of: all of it but that."""
    hashes = {name: value for name, value in config["sha256"].items() if name != CONFIG}
    plain = json.loads(json.dumps({**config, "sha256": hashes}))  # numbers as keys become text, which sorts otherwise
    return json.dumps(plain, sort_keys=True).encode()


def _pack(state_dict: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """Weights by the network's own names. Half precision is only for matrices and kernels.

    Biases and batch norm's factors and statistics, one in a hundred numbers, decide over all others.
    """
    packed = {}
    for name, tensor in state_dict.items():
        if precision == "float16" and tensor.ndim > 1 and tensor.dtype == torch.float32:
            half = tensor.half()
            if not half.isfinite().all():
                raise UserError(f"{name} has weights that are too large for --precision float16; use float32")
            tensor = half
        packed[name.removeprefix(_NETWORK)] = tensor.contiguous().clone()
    return packed


def _unpack(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_NETWORK + name: one.float() if one.dtype == torch.float16 else one for name, one in weights.items()}


def _bytes_of(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(tensors, metadata={"format": "pt"})
