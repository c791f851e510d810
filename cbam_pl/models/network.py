"""A network that this program does not know: imported by its path, fitted to the classes, checked, given attention."""

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from cbam_pl.attention import AttentionConfig
from cbam_pl.models.insertion import evaluating, insert_attention, last_layer, map_shapes

# What a checkpoint may name without being asked for. Not all of cbam_pl: a Classifier is a module, too, and imports the
# network that its arguments name.
TRUSTED = ("cbam_pl.models", "torchvision.models", "timm")

# Arguments that ask for trained weights, and what asks for none.
_OF_WEIGHTS = {"weights": None, "pretrained": False, "checkpoint_path": None}


@dataclass(frozen=True)
class NetworkConfig:
    """A class or function that makes a network.

    Args:
        class_path: its import path, such as torchvision.models.resnet18, timm.create_model or my_package.MyNet; the
            working directory can be imported from.
        init_args: its arguments, without the number of classes.
    """

    class_path: str = ""
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.class_path:
            raise ValueError("network needs a class_path, an import path such as torchvision.models.resnet18")
        if not isinstance(self.class_path, str) or not isinstance(self.init_args, dict):
            raise ValueError(
                f"network: class_path={self.class_path!r} must be an import path, and init_args={self.init_args!r} a "
                "mapping of arguments"
            )

    @property
    def name(self) -> str:
        """The path, with what timm.create_model makes."""
        model = self.init_args.get("model_name")
        return f"{self.class_path} {model}" if isinstance(model, str) else self.class_path

    @property
    def has_weights(self) -> bool:
        """Whether its arguments ask for trained weights: torchvision's weights, timm's pretrained, checkpoint_path."""
        return any(self.init_args.get(name) for name in _OF_WEIGHTS)

    def without_weights(self) -> "NetworkConfig":
        """The same network, without a download or a file of weights."""
        arguments = {name: _OF_WEIGHTS.get(name, value) for name, value in self.init_args.items()}
        return NetworkConfig(self.class_path, arguments)


def make_network(
    config: NetworkConfig, num_classes: int, attention: AttentionConfig, image_size: int
) -> tuple[nn.Module, str]:
    """Make a network for (B, 3, image_size, image_size), with attention where its `where` says.

    `num_classes` is passed where the class or function takes it; else the last linear layer is replaced. Outputs that
    are no tensor, but have `logits`, are replaced by these.

    Returns:
        The network, and the name of the layer that was replaced, or an empty text.

    Raises:
        ValueError: the path is not one of a network, it fails, or it gives other than (B, num_classes).
    """
    called = f"network={config.name}"
    network = _construct(_find(config.class_path), config.init_args, num_classes, called)
    network.register_forward_hook(_give_logits)
    example = torch.zeros(1, 3, image_size, image_size)
    logits = _run(network, example, called)
    replaced = ""
    if isinstance(logits, Tensor) and logits.shape != (1, num_classes):
        replaced = _replace_last_linear(network, num_classes, called)
        logits = _run(network, example, called)
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__} without logits"
        raise ValueError(f"{called} gives {got} for one image; it must give (1, {num_classes}), the classes' logits")
    for name in ("place", "stages"):
        if (value := getattr(attention, name)) is not None:
            raise ValueError(f"attention.{name}={value!r} has no effect with {called}; use attention.where")
    if attention.kind != "none":
        if attention.where is None:
            raise ValueError(
                f"attention.kind={attention.kind} needs attention.where with {called}: patterns of the modules that "
                f"attention follows; these give (C, H, W): {_summary(map_shapes(network, example))}"
            )
        insert_attention(network, replace(attention, where=None), attention.where, example)
    return network, replaced


def check_rebuilt(
    network: nn.Module, config: NetworkConfig, num_classes: int, attention: AttentionConfig, image_size: int
) -> None:
    """Reject a network that cannot be made again without its library's weights, as from a checkpoint.

    In torchvision, some weights bring arguments with them, such as GoogLeNet's transform_input.

    Raises:
        ValueError: it has other weights then, or gives other logits.
    """
    called = f"network={config.name}"
    if any(parameter.is_meta for parameter in network.parameters()):
        return  # only its parameters are counted
    try:
        example = torch.linspace(0, 1, 3 * image_size**2).view(1, 3, image_size, image_size)
        again, _ = make_network(config.without_weights(), num_classes, attention, image_size)
        again.load_state_dict(network.state_dict())
        is_same = torch.equal(_run(again, example, called), _run(network, example, called))
    except (RuntimeError, ValueError):
        is_same = False
    if not is_same:
        raise ValueError(
            f"{called}: its weights set arguments that a checkpoint does not have, so that it could not be loaded; "
            "give them in init_args, such as aux_logits: false, transform_input: true or image_size: 384"
        )


def check_trusted(config: NetworkConfig, trusted: Collection[str]) -> None:
    """Reject what a checkpoint may not import: all but networks of TRUSTED with plain arguments, and of `trusted`.

    Raises:
        ValueError: with the name, and how to allow it.
    """
    path = config.class_path
    refused = f"network={path} is not imported, since importing it could run any code"
    if _is_inside(path, trusted):
        return
    package = path.partition(".")[0]
    if not _is_inside(path, TRUSTED):
        raise ValueError(f"{refused}; allow it with --trust {package}, if you know where the checkpoint comes from")
    try:
        made = _find(path)
        returned = made if isinstance(made, type) else get_type_hints(made).get("return")
    except (ValueError, NameError, TypeError) as error:
        raise ValueError(f"{refused}: {error}") from error
    # A module has more names than its own: those that it imports.
    is_own = _is_inside(str(getattr(made, "__module__", "")), TRUSTED)
    if not is_own or not (isinstance(returned, type) and issubclass(returned, nn.Module)):
        raise ValueError(f"{refused}: it is not a network of {package}; allow it with --trust {path}")
    if not _is_plain(config.init_args):
        raise ValueError(f"{refused}: its arguments must be numbers, words and lists; allow it with --trust {path}")


def _is_inside(path: str, packages: Collection[str]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return all(map(_is_plain, [*value, *value.values()] if isinstance(value, dict) else value))
    # No paths and no URLs: timm takes these, too, as names of models, and would load what is there.
    is_place = isinstance(value, str) and not set(value).isdisjoint(":/\\")
    return value is None or (isinstance(value, (bool, int, float, str)) and not is_place)


def _find(path: str) -> Callable[..., Any]:
    module, dot, name = path.rpartition(".")
    if not dot or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"network={path} is not an import path; use one such as torchvision.models.resnet18")
    try:
        found = getattr(import_module(module), name)
    except AttributeError as error:
        raise ValueError(f"network={path}: {module} has no {name}") from error
    except Exception as error:  # whatever a file of the user's may raise
        raise ValueError(f"network={path}: importing {module} fails with {_last_line(error)}") from error
    if not callable(found):
        raise ValueError(f"network={path} is a {type(found).__name__}; name a class or function that makes a network")
    return found


def _construct(make: Callable[..., Any], arguments: Mapping[str, Any], num_classes: int, called: str) -> nn.Module:
    if "num_classes" in arguments:
        raise ValueError(f"{called}: num_classes={arguments['num_classes']} comes from the data; leave it out")
    parameters = inspect.signature(make).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    attempts: list[dict[str, Any]] = [{}]
    if "num_classes" in parameters:
        attempts = [{"num_classes": num_classes}]
    elif takes_any and not arguments.get("weights"):  # with its own weights, torchvision accepts only their classes
        attempts = [{"num_classes": num_classes}, {}]
    for classes in attempts:
        try:
            network = make(**arguments, **classes)
            break
        except Exception as error:  # whatever a network of the user's may raise
            if isinstance(error, TypeError) and classes is not attempts[-1]:
                continue
            fix = "; if its weights cannot be downloaded here, give a file of them with model.weights"
            fix = fix if isinstance(error, OSError) else ""
            raise ValueError(f"{called} fails with {_last_line(error)}{fix}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{called} makes a {type(network).__name__}, not a torch.nn.Module")
    return network


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _give_logits(network: nn.Module, arguments: Any, output: Any) -> Any:
    """The forward hook. The logits of an output: itself, or what a dictionary, dataclass or named tuple calls so."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def _run(network: nn.Module, example: Tensor, called: str) -> Any:
    try:
        with torch.no_grad(), evaluating(network):
            return network(example)
    except Exception as error:  # whatever a network of the user's may raise
        raise ValueError(f"{called} fails on images {tuple(example.shape)} with {_last_line(error)}") from error


def _replace_last_linear(network: nn.Module, num_classes: int, called: str) -> str:
    name = last_layer(network, (nn.Linear,))
    if not name:
        raise ValueError(
            f"{called} takes no num_classes and has no linear layer to replace; give it an argument num_classes"
        )
    last: Any = network.get_submodule(name)
    network.set_submodule(name, nn.Linear(last.in_features, num_classes, last.bias is not None))
    return name


def _summary(shapes: Mapping[str, tuple[int, int, int]], longest: int = 60) -> str:
    """Patterns of names with their shapes: names that differ in numbers alone are one, where the maps' size is one."""
    alike: dict[tuple[str, int, int], list[str]] = {}
    for name, (_, height, width) in shapes.items():
        alike.setdefault((re.sub(r"\d+", "0", name), height, width), []).append(name)
    texts = []
    for (_, height, width), names in alike.items():
        # Texts and numbers in turns, "layer1.0" as "layer", "1", ".", "0": the same number, or `*`.
        pieces = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
        pattern = "".join(piece[0] if len(set(piece)) == 1 else "*" for piece in pieces)
        channels = sorted({shapes[name][0] for name in names})
        texts.append(f"{pattern} ({'–'.join(map(str, dict.fromkeys([channels[0], channels[-1]])))}, {height}, {width})")
    if not texts:
        return "none of its modules"
    return ", ".join(texts[:longest]) + (f" and {len(texts) - longest} more" if len(texts) > longest else "")
