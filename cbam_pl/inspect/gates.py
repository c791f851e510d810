"""Read a network's attention gates and feature maps, and summarise the gates; the network is left unchanged."""

import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from cbam_pl.attention import BAM
from cbam_pl.attention_parts import IdentityStart
from cbam_pl.errors import is_out_of_memory
from cbam_pl.models.cnn import CNN
from cbam_pl.models.insertion import evaluating, map_shapes
from cbam_pl.models.resnet import ResidualBlock, ResNet

CONSTANT_STD = 1e-3  # a gate with a lower standard deviation over its channels or positions counts as constant


@dataclass(frozen=True)
class AttentionMaps:
    """The gates of one block for a batch of images, float32, on the network's device.

    A joint gate (B, C, H, W), as BAM and the parallel order of CBAM have, is given by its means: over positions as the
    channel gate, over channels as the spatial gate. BAM multiplies its input by 1 + gate; the gate alone is given.
    """

    channel: Tensor | None  # (B, C) in (0, 1), the weight of each channel; None if there is no channel gate
    spatial: Tensor | None  # (B, H, W) in (0, 1), the weight of each position; None if there is no spatial gate


@dataclass(frozen=True)
class FeatureMaps:
    """Activations of a network for a batch of images, on its device."""

    logits: Tensor  # (B, classes)
    blocks: dict[str, Tensor]  # name of each convolution block → its output (B, C, H, W), in the order of the layers
    last: Tensor  # (B, C, H, W), the last convolution's after normalisation and ReLU, in the cnn before the pooling


def attention_maps(network: nn.Module, images: Tensor) -> dict[str, AttentionMaps]:
    """The gates of every attention module in `network`, in evaluation mode.

    Finds every module with a method `gates`, as all of `cbam_pl.attention` have, in any network, also compiled, wrapped
    by DistributedDataParallel, or trained with automatic mixed precision. Runs one forward pass in the precision of the
    weights and leaves no trace: training mode, running statistics, gradients, hooks and random state are kept.

    Args:
        network: (B, 3, H, W) → any output.
        images: (B, 3, H, W), normalised as in training; they are moved to the network's device.

    Returns:
        Name of the block → its gates, in the order in which they are computed. The block's name is that of the
        attention module without a trailing `attention`. Empty for a network without attention.

    Raises:
        ValueError: images are not (B, C, H, W), a module runs twice in one forward pass, or its `gates` are of another
            form.
    """
    network = unwrap(network)
    with evaluation_mode(network), torch.no_grad(), recorded_maps(network) as maps:
        network(as_input(images, network))
    return maps


@contextmanager
def recorded_maps(network: nn.Module) -> Iterator[dict[str, AttentionMaps]]:
    """A dictionary that the next forward pass fills with the gates of every attention module, as attention_maps does.

    Raises:
        ValueError: a module runs twice, or its `gates` are of another form.
    """
    maps: dict[str, AttentionMaps] = {}

    def record(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if name in maps:
            raise ValueError(f"the attention of {name} runs twice in one forward pass; use one module per place")
        maps[name] = _as_maps(module, gates_of(name, module, arguments))

    with ExitStack() as hooks:
        for name, module in attention_modules(network).items():
            hooks.enter_context(module.register_forward_pre_hook(partial(record, name)))
        yield maps


def logits_of(network: nn.Module, images: Tensor, flip: bool = False) -> Tensor:
    """The logits (B, classes) of images (B, 3, H, W), normalised, in evaluation mode.

    With `flip` they are the mean of those of each image and of its mirror image.
    """
    network = unwrap(network)
    with evaluation_mode(network), torch.no_grad():
        images = as_input(images, network)
        logits = network(images)
        return (logits + network(images.flip(3))) / 2 if flip else logits


def feature_maps(network: nn.Module, images: Tensor) -> FeatureMaps:
    """The logits of images (B, 3, H, W), normalised, and the outputs of the network's blocks.

    These are the blocks of a CNN or ResNet of cbam_pl.models; of another network, its top-level modules that give
    (B, C, H, W), or where there is only one with modules in it, those in it.
    """
    network = unwrap(network)
    example = as_input(images[:1], network)
    layers = {**convolution_blocks(network, example), "": last_activation(network, example)}
    seen: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
        seen[name] = output.clone()  # since an activation in place may follow

    with evaluation_mode(network), torch.no_grad(), ExitStack() as hooks:
        for name, module in layers.items():
            hooks.enter_context(module.register_forward_hook(partial(record, name)))
        logits = network(as_input(images, network))
    last = seen.pop("")
    return FeatureMaps(logits, {name: seen[name] for name in layers if name}, last)


def upsample(maps: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Bilinear, pixel centres on pixel centres. Maps (B, h, w) → (B, H, W)."""
    return F.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def gate_health(maps: AttentionMaps) -> dict[str, float]:
    """Summary statistics of the block's gates, by name, that show whether one is saturated or constant.

    `channel_std` and `spatial_std` are the standard deviations over channels and over positions, averaged over images;
    `channel_entropy` is the entropy of the gates normalised to sum 1, divided by its maximum: 1 if all channels are
    equal, 0 if one alone is open.
    """
    health = {}
    for name, gate in (("channel", maps.channel), ("spatial", maps.spatial)):
        if gate is not None:
            health[f"{name}_mean"] = gate.mean()
            health[f"{name}_below_0.05"] = (gate < 0.05).float().mean()
            health[f"{name}_above_0.95"] = (gate > 0.95).float().mean()
            health[f"{name}_std"] = gate.flatten(1).std(1, correction=0).mean()
    if maps.channel is not None and maps.channel.shape[1] > 1:
        fractions = maps.channel / maps.channel.sum(1, keepdim=True)  # (B, C)
        health["channel_entropy"] = torch.special.entr(fractions).sum(1).mean() / math.log(fractions.shape[1])
    values = torch.stack(list(health.values())).tolist()  # one fetch from the device
    return dict(zip(health, values, strict=True))


def constant_gates(maps: AttentionMaps) -> dict[str, float]:
    """The mean of each gate, channel or spatial, that is the same for all channels or positions in every image.

    Such a gate attends to nothing. One of a single channel or position is not among them.
    """
    gates = {"channel": maps.channel, "spatial": maps.spatial}
    flat = {name: gate.flatten(1) for name, gate in gates.items() if gate is not None and gate[0].numel() > 1}
    return {name: float(gate.mean()) for name, gate in flat.items() if (gate.std(1, correction=0) < CONSTANT_STD).all()}


def unwrap(network: nn.Module) -> nn.Module:
    """The network itself, without the wrappers of torch.compile, DistributedDataParallel and DataParallel."""
    while True:
        if isinstance(network, (DistributedDataParallel, DataParallel)):
            network = network.module
        elif type(network).__name__ == "OptimizedModule":  # of torch.compile, whose class is not public
            network = next(network.children())
        else:
            return network


def attention_modules(network: nn.Module) -> Mapping[str, nn.Module]:
    """Every outermost module with a method `gates`, by the name of its block, as attention_maps names it."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for path, module in network.named_modules():
        # Of the class: a network may have a layer called `gates`, which is callable.
        if callable(getattr(type(unwrap(module)), "gates", None)) and not path.startswith(inside):
            inside += (path + ".",) if path else ("",)
            name = plain_name(path)
            while name.split(".")[-1] == "attention":  # twice where it is in an IdentityStart
                name = name.rpartition(".")[0]
            found[name or type(module).__name__] = module
    return found


def identity_factors(network: nn.Module) -> dict[str, float]:
    """α of each block whose attention began as the identity: near 0, the network hardly uses the block's gates."""
    starts = [one for one in network.modules() if isinstance(one, IdentityStart)]
    factors = {one.attention: one.factor.item() for one in starts}
    return {block: factors[module] for block, module in attention_modules(network).items() if module in factors}


def gates_of(block: str, module: nn.Module, arguments: tuple[Any, ...]) -> Mapping[str, Tensor]:
    """The gates of a module for the arguments of its forward pass, by name, each with four dimensions.

    Raises:
        ValueError: its method `gates` takes or gives something else, as one of the user's network may.
    """
    expected = "gates(x) must give channel, spatial or joint → a tensor that multiplies x (B, C, H, W)"
    try:
        gates = unwrap(module).gates(*arguments[:1])  # type: ignore[operator]
    except Exception as error:  # whatever a method of the user's may raise that has the name by chance
        if is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]  # torch's own go on with the signatures that it knows
        raise ValueError(f"the attention of {block} has gates of another form ({reason}); {expected}") from error
    is_mapping = isinstance(gates, Mapping) and gates and gates.keys() <= {"channel", "spatial", "joint"}
    if not is_mapping or not all(isinstance(gate, Tensor) and gate.ndim == 4 for gate in gates.values()):
        raise ValueError(f"the attention of {block} has gates of another form; {expected}")
    return gates


def plain_name(path: str) -> str:
    """A module's name without the parts that torch.compile inserts."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _as_maps(module: nn.Module, gates: Mapping[str, Tensor]) -> AttentionMaps:
    shift = 1 if isinstance(unwrap(module), BAM) else 0
    floats = {name: gate.float() - shift for name, gate in gates.items()}  # (B, C or 1, H or 1, W or 1)
    channel, spatial = (floats.get(name, floats.get("joint")) for name in ("channel", "spatial"))
    return AttentionMaps(
        channel=None if channel is None else channel.mean((2, 3)), spatial=None if spatial is None else spatial.mean(1)
    )


def convolution_blocks(network: nn.Module, example: Tensor) -> dict[str, nn.Module]:
    """The blocks of a network for example (1, 3, H, W), by name, the first to end first.

    In networks that are not of cbam_pl.models, the top-level modules that give maps, or where one module holds all of
    them, those in it.
    """
    if isinstance(network, CNN):
        return {f"blocks.{name}": block for name, block in unwrap(network.blocks).named_children()}
    if isinstance(network, ResNet):
        blocks = [(path, module) for path, module in network.named_modules() if isinstance(module, ResidualBlock)]
        return {"stem": network.stem, **{plain_name(path): module for path, module in blocks}}
    names, prefix = _maps(network, example), ""
    while True:
        inside = [name for name in names if name.startswith(prefix) and "." not in name[len(prefix) :]]
        tops = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
        if not inside and len(tops) == 1:
            prefix += f"{tops.pop()}."  # one that holds all of them, and gives no map itself
            continue
        if len(inside) != 1 or not any(name.startswith(f"{inside[0]}.") for name in names):
            return {name: network.get_submodule(name) for name in inside or names[-1:]}
        prefix = f"{inside[0]}."


def last_activation(network: nn.Module, example: Tensor) -> nn.Module:
    """The module whose output is the last convolution's activation map, in a network for example (1, 3, H, W).

    In networks that are not of cbam_pl.models, the last that gives (B, C, H, W) with more than one position.
    """
    if not isinstance(network, (CNN, ResNet)):
        return network.get_submodule(_maps(network, example)[-1])
    block = list(convolution_blocks(network, example).values())[-1]
    return block.get_submodule("relu") if isinstance(network, CNN) else block


def map_layer(network: nn.Module, images: Tensor, name: str) -> nn.Module:
    """The module of that name, which must give (B, C, H, W) for images (B, 3, H, W)."""
    shapes = map_shapes(network, images[:1])
    if name not in shapes:
        near = difflib.get_close_matches(name, shapes, 3, cutoff=0.3) or list(shapes)[-3:]
        raise ValueError(f"--layer {name} is not a module that gives (B, C, H, W); use one such as {', '.join(near)}")
    return network.get_submodule(name)


def _maps(network: nn.Module, example: Tensor) -> list[str]:
    """Names of the modules that give maps with more than one position, or else any, the first to end first."""
    shapes = map_shapes(network, example)
    if not shapes:
        raise ValueError(f"no module of {type(network).__name__} gives (B, C, H, W), so there are no maps to draw")
    return [name for name, (_, height, width) in shapes.items() if height * width > 1] or list(shapes)


def as_input(images: Tensor, network: nn.Module) -> Tensor:
    """Images (B, 3, H, W) on the device and in the precision of the network's weights."""
    if images.ndim != 4:
        raise ValueError(f"images of shape {tuple(images.shape)} must be (B, 3, H, W)")
    weights = next((parameter for parameter in network.parameters() if parameter.is_floating_point()), images)
    return images.to(weights.device, weights.dtype)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, eager (compiled code ignores new hooks) and without autocast; restores each module's mode."""
    devices = {parameter.device.type for parameter in network.parameters()} or {"cpu"}
    with (
        evaluating(network),
        torch.compiler.set_stance("force_eager"),
        torch.autocast(devices.pop(), enabled=False),
    ):
        yield
