"""Fine-tuning: weights from a file, modules that stay as they are, and learning rates by module."""

import json
import math
import pickle
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cbam_pl.attention import AttentionConfig, Start, is_attention
from cbam_pl.attention_parts import IdentityStart
from cbam_pl.errors import UserError
from cbam_pl.models.insertion import last_layer, matching_modules
from cbam_pl.training.weights_folder import is_weights_folder, read_folder

_ANOTHER = "name another file with model.weights"


class _File(NamedTuple):
    weights: dict[str, Tensor]
    data: dict[str, Any]  # what may_have_seen takes of the data that they were trained on, as far as the file has it
    attention: AttentionConfig | None  # of their network, where the file has it


def load_weights(
    network: nn.Module, path: str, attention: AttentionConfig | None = None, chosen: Start | None = None
) -> tuple[str, dict[str, Any]]:
    """Load what fits of a file of weights into `network`, and say what does not.

    A classifier for another number of classes is left at its start; so is what the file lacks, such as attention, and
    attention that the file has otherwise.

    Args:
        network: the network, attention included.
        path: a state dict (.pth, or .safetensors), alone or below the key state_dict or model, a checkpoint of this
            program, or a folder of weights. No code in it is run.
        attention: the network's.
        chosen: its start, where the user gave one: that of the file's attention loads it as far as the names go, though
            its settings are others; with any, attention may begin anew where the file does not say how its own began.

    Returns:
        What was loaded, and what is known of the data that it was trained on, as may_have_seen takes it.

    Raises:
        ValueError: the file cannot be read, holds no weights, or those of another network, with their shapes.
    """
    (saved, data, theirs), ours = _read(Path(path)), network.state_dict()
    saved = _with_names_of(ours, saved)
    inside = tuple(f"{name}." for name, module in network.named_modules() if is_attention(module))
    is_another = theirs and attention and theirs.kind != "none" and _as_json(theirs) != _as_json(attention)
    is_another = is_another and not (chosen and theirs and chosen == theirs.start)
    if is_another:
        saved = {name: tensor for name, tensor in saved.items() if not name.startswith(inside)}
    heads, differing, classifier = {}, [], last_layer(network, (nn.Linear, nn.Conv2d))
    for name in [one for one in ours.keys() & saved.keys() if saved[one].shape != ours[one].shape]:
        there, here = tuple(saved.pop(name).shape), tuple(ours[name].shape)
        if there[1:] == here[1:] and name.rpartition(".")[0] == classifier:
            heads[name] = f"{name} ({there[0]} classes in the file, {here[0]} in the network)"
        else:
            differing.append(f"{name} is {there} in the file and {here} in the network")
    loaded = saved.keys() & ours.keys()
    if differing or not loaded:
        found = "; ".join(sorted(differing)[:5]) or f"it has {_few(saved)}; the network has {_few(ours)}"
        raise ValueError(f"weights={path} are those of another network: {found}")
    if theirs is None and chosen is None and (other := _other_start(network, saved)):
        raise ValueError(
            f"weights={path} have trained attention ({other}); give attention.start=paper to go on with it, or "
            "attention.start=identity to begin anew"
        )
    network.load_state_dict(saved, strict=False)
    missing = [name for name in ours if name not in saved and not name.endswith("num_batches_tracked")]
    new = [name for name in missing if name.startswith(inside)]
    others = [name for name in missing if name not in new and name not in heads]
    parts = [f"{len(loaded)} of {len(ours)} tensors from {path}"]
    parts += [f"at their start: {', '.join(sorted(heads.values()))}"] if heads else []
    another = ", as the file has another" if is_another else ""
    parts += [f"attention at its start: {len(new)} tensors{another}"] if new else []
    parts += [f"not in the file, at their start: {_few(others)}"] if others else []
    unused = [name for name in saved if name not in ours]
    parts += [f"in the file, not in the network: {_few(unused)}"] if unused else []
    return "; ".join(parts), data


def start_of_trained(path: str, attention: AttentionConfig) -> Start | None:
    """How the attention in a file of weights began, if it is this but for `start`, so that a network can go on with it.

    Only a checkpoint or a folder of weights says so.
    """
    try:
        saved = _read(Path(path)).attention
    except (UserError, ValueError):
        return None  # load_weights says what is wrong with the file
    if saved is None or _as_json(replace(saved, start=None)) != _as_json(replace(attention, start=None)):
        return None
    return saved.start


def _as_json(attention: AttentionConfig) -> str:
    where = (attention.where,) if isinstance(attention.where, str) else attention.where
    return json.dumps(asdict(replace(attention, where=where)))  # in which lists and tuples are equal


def _read_file(path: Path) -> Any:
    """The content of a file of weights; a ValueError where it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_weights_folder(path):
            return read_folder(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights={path} holds more than tensors and plain values and is not loaded, since that could run code; "
            f"{_ANOTHER}"
        ) from error
    except Exception as error:  # whatever the readers of archives and of their contents may raise
        reason = getattr(error, "strerror", None) or "it is incomplete, damaged, or not a file of weights"
        raise ValueError(f"weights={path} cannot be read ({reason}); {_ANOTHER}") from error


def _read(path: Path) -> _File:
    content = _read_file(path)
    data, attention = dict[str, Any](), None
    with suppress(KeyError, TypeError, ValueError):  # not of this program, or damaged
        data |= content["datamodule_hyper_parameters"]
        known = content["ImageDataModule"]
        data |= {"train_ids": known["train_ids"], "classes": known["classes"]}
    with suppress(KeyError, TypeError, ValueError):  # not of this program, or damaged
        attention = AttentionConfig(**content["hyper_parameters"]["attention"])
        if attention.kind != "none":
            attention = replace(attention, start=attention.start or "paper")  # which the earliest versions leave out
    for key in ("state_dict", "model"):  # as most training programs wrap it
        if isinstance(content, dict) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(one, Tensor) for one in content.values()):
        raise ValueError(f"weights={path} is not a state dict, which maps names to tensors; {_ANOTHER}")
    return _File(dict(content), data, attention)


def _with_names_of(ours: Collection[str], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what wrappers put before their names, unless they are names of ours as they are."""
    # Of torch.compile, DistributedDataParallel, and this program's checkpoints; a network may have modules called so.
    prefixes = ("_orig_mod.", "module.", "network.")
    while not any(name in ours for name in weights):
        prefix = next((one for one in prefixes if all(name.startswith(one) for name in weights)), None)
        if prefix is None:
            break
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _other_start(network: nn.Module, saved: Mapping[str, Tensor]) -> str:
    """A weight in the file that is one of this network's attention, which has another name as the identity's part."""
    starts = [name for name, module in network.named_modules() if isinstance(module, IdentityStart)]
    for name, tensor in network.state_dict().items():
        for start in starts:
            other = name.replace(f"{start}.attention.", f"{start}.", 1)
            if other != name and other in saved and saved[other].shape == tensor.shape:
                return other
    return ""


def _few(names: Any, count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def freeze_modules(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze the weights of modules by their names. Returns the names of those with running statistics.

    These are to be kept in evaluation mode.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to train.
    """
    norms, names = list[str](), {module: name for name, module in network.named_modules()}
    for pattern in patterns:
        for module in _parts(network, pattern, "freeze"):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            norms += [names[module]] if isinstance(getattr(module, "running_mean", None), Tensor) else []
    if patterns and not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"freeze={list(patterns)} leaves nothing to train; leave a module out of it")
    return norms


def parameter_groups(network: nn.Module, factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """The optimizer's groups: what no pattern matches, and the weights of each pattern, with its factor `lr_factor`.

    Raises:
        ValueError: a pattern matches no module or no weights, or a factor is not above 0.
    """
    if not factors:
        return [{"params": list(network.parameters())}]
    owners = dict.fromkeys(network.parameters(), "")
    for pattern, factor in factors.items():
        if not 0 < factor < math.inf:
            raise ValueError(f"lr_factors: {pattern}={factor} must be above 0 and finite; to keep weights, use freeze")
        for module in _parts(network, pattern, "lr_factors"):
            owners |= dict.fromkeys(module.parameters(recurse=False), pattern)
    groups = []
    for pattern, factor in {"": 1.0, **factors}.items():
        parameters = [one for one, owner in owners.items() if owner == pattern]
        if parameters:
            groups.append({"params": parameters, "name": pattern or "the rest", "lr_factor": factor})
        elif pattern:
            raise ValueError(f"lr_factors: {pattern} has no weights, or later patterns match them; leave it out")
    return groups


def _parts(network: nn.Module, pattern: str, setting: str) -> list[nn.Module]:
    """The modules that match, with all in them but attention, unless the pattern names that itself."""
    parts: list[nn.Module] = []
    for name, module in matching_modules(network, pattern, setting).items():
        waiting = [module] if _is_named(network, name, pattern) else []
        while waiting:
            part = waiting.pop()
            parts.append(part)
            waiting += [child for child in part.children() if is_attention(part) or not is_attention(child)]
    return parts


def _is_named(network: nn.Module, name: str, pattern: str) -> bool:
    """Whether the module is outside attention, or the pattern names its attention by more than a wildcard."""
    for path, part in zip(accumulate(name.split("."), "{}.{}".format), pattern.split("."), strict=True):
        if is_attention(network.get_submodule(path)):
            return bool(part.strip("*?"))
    return True
