"""Insert attention into any network, without editing its code."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cbam_pl.attention import AttentionConfig, AttentionKind, is_attention


def matching_modules(network: nn.Module, pattern: str, setting: str) -> dict[str, nn.Module]:
    """The modules whose names match, part by part between dots; a ValueError that names the setting if there is none.

    `*`, `?` and `[…]` stand for parts of a name between two dots.
    """
    modules = {name: module for name, module in network.named_modules() if name}
    found = {
        name: module
        for name, module in modules.items()
        if name.count(".") == pattern.count(".") and all(map(fnmatchcase, name.split("."), pattern.split(".")))
    }
    if not found:
        near = difflib.get_close_matches(pattern, modules, n=5, cutoff=0.3) or list(modules)[:5]
        raise ValueError(f"{setting}={pattern!r} matches no module of the network; it has {', '.join(near)} …")
    return found


def _chosen(network: nn.Module, where: Sequence[str]) -> dict[str, nn.Module]:
    chosen: dict[str, nn.Module] = {}
    for pattern in where:
        chosen |= matching_modules(network, pattern, "where")
    if not chosen:
        raise ValueError(f"where={where!r} must name at least one module")
    for name, module in chosen.items():
        place = f"where={name!r}: {type(module).__name__}"
        if hasattr(module, "attention"):
            raise ValueError(f"{place} already has an attribute `attention`; choose another module")
        overrides = isinstance(module, nn.Sequential) and type(module).forward is not nn.Sequential.forward
        if overrides or isinstance(module, (nn.ModuleDict, nn.ModuleList)):
            raise ValueError(
                f"{place} does not run its children one after another, so it would not run the attention; choose a "
                "module inside it, or the one after it"
            )
    return chosen


def _works_on_last_dimension(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer) is nn.LayerNorm  # LayerNorm2d, which permutes, is a subclass


def _width(layer: nn.Module) -> int | None:
    names = ("out_channels", "num_features", "num_channels")  # of a convolution, batch norm or group norm
    return next((getattr(layer, name) for name in names if isinstance(getattr(layer, name, None), int)), None)


def _declared_channels(name: str, module: nn.Module) -> int:
    """The output channels of the last layer in `module`, by order of declaration, that declares them.

    Layers of attention do not count: it gives as many channels as it takes.
    """
    of_attention = {layer for part in module.modules() if is_attention(part) for layer in part.modules()}
    layers = [layer for layer in module.modules() if layer not in of_attention]
    with_weights = [layer for layer in layers if next(layer.parameters(recurse=False), None) is not None]
    ends_in_layer_norm = with_weights and type(with_weights[-1]) is nn.LayerNorm  # its output may be (B, H, W, C)
    widths = [width for layer in layers if (width := _width(layer)) is not None]
    if ends_in_layer_norm or not widths:
        raise ValueError(f"where={name!r}: the channels of {type(module).__name__} are unknown; give an example input")
    return widths[-1]


class _Run(NamedTuple):
    """One run of a module: the shape of its output, and the layer that ran last before its end, with its shape."""

    shape: tuple[int, ...]
    layer: nn.Module | None
    layer_shape: tuple[int, ...]

    def is_channels_last(self) -> bool | None:
        """Whether the output is (B, H, W, C), judged by that layer; None: either is possible."""
        if self.layer is None:
            return False
        batch, channels, *size = self.layer_shape
        if not _works_on_last_dimension(self.layer):
            return self.shape == (batch, *size, channels) and self.shape != self.layer_shape
        first, last = (self.shape[dim] == self.layer_shape[-1] for dim in (1, 3))
        return None if first and last else last


def _runs(network: nn.Module, modules: Mapping[str, nn.Module], example: Tensor) -> dict[str, list[_Run]]:
    """Each run of each module that runs on the example; modules in the order of their last ends. Changes nothing."""
    runs: dict[str, list[_Run]] = {}
    last: tuple[nn.Module | None, tuple[int, ...]] = None, ()

    def note_layer(layer: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal last
        is_layer = _works_on_last_dimension(layer) or _width(layer) is not None
        if is_layer and isinstance(output, Tensor) and output.ndim == 4:
            last = layer, tuple(output.shape)

    def note_run(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        run = _Run(tuple(output.shape) if isinstance(output, Tensor) else (), *last)
        runs[name] = [*runs.pop(name, []), run]  # reinserted, so that the order is that of the last ends

    # In evaluation mode, as the example must not move the batch norms' statistics.
    with torch.no_grad(), evaluating(network), ExitStack() as hooks:
        for module in network.modules():
            hooks.enter_context(module.register_forward_hook(note_layer))
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(note_run, name)))
        network(example)
    return runs


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode; restores the mode of each module."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        network.train(modes[network])  # which may undo what `eval` did, such as merging weights
        for module, training in modes.items():
            module.training = training


def last_layer(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str:
    """Name of the last layer of these kinds outside attention; empty: there is none."""
    last, inside = "", list[str]()
    for name, module in network.named_modules():
        if is_attention(module):
            inside.append(f"{name}.")
        elif isinstance(module, kinds) and not name.startswith(tuple(inside)):
            last = name
    return last


def map_shapes(network: nn.Module, example: Tensor) -> dict[str, tuple[int, int, int]]:
    """C, H and W of each module whose output is (B, C, H, W), by name, in the order in which the modules end."""
    modules = {name: module for name, module in network.named_modules() if name}
    shapes = {}
    for name, runs in _runs(network, modules, example).items():
        last = runs[-1]
        if len(last.shape) == 4 and last.is_channels_last() is False:
            shapes[name] = (last.shape[1], last.shape[2], last.shape[3])
    return shapes


def _seen_channels(name: str, module: nn.Module, runs: list[_Run]) -> int:
    output = f"where={name!r}: the output of {type(module).__name__}"
    if not runs:
        raise ValueError(f"where={name!r}: {type(module).__name__} does not run for the example; choose another module")
    for run in runs:
        if len(run.shape) != 4:
            raise ValueError(f"{output} is {run.shape or 'no tensor'}; choose a module that gives (B, C, H, W)")
        is_channels_last = run.is_channels_last()
        if is_channels_last is None:
            raise ValueError(
                f"{output}, {run.shape}, may be (B, C, H, W) or (B, H, W, C); use an example of another size "
                "(data.image_size)"
            )
        if is_channels_last:
            raise ValueError(f"{output}, {run.shape}, is (B, H, W, C); choose a module that gives (B, C, H, W)")
    channels = {run.shape[1] for run in runs}
    if len(channels) > 1:
        raise ValueError(f"{output} has {' or '.join(map(str, sorted(channels)))} channels; choose another module")
    return channels.pop()


def _check_input(channels: int, followed: str, attention: nn.Module, arguments: tuple[Any, ...]) -> None:
    """The attention's pre-hook: reject an input of other channels, with which some attention would still run."""
    x = arguments[0]
    if isinstance(x, torch.fx.Proxy):
        name = type(attention).__name__
        raise ValueError(f"torch.fx cannot trace {name}; make it a leaf: tracer_kwargs={{'leaf_modules': [{name}]}}")
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != channels:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"the attention after {followed} is for (B, {channels}, H, W), but the output is {got}; "
            "choose another module, or give insert_attention an example input to see the channels from"
        )


def _attend(module: nn.Module, arguments: Any, output: Any) -> Tensor:
    """The forward hook. A plain function that reads the attention off the module, so that copies use their own."""
    return module.attention(output)  # type: ignore[operator]


def attach_attention(network: nn.Module) -> list[RemovableHandle]:
    """Attach inserted attention to the modules that have it as a child, and to which it is not attached yet.

    A module may be replaced by one that takes over its children, but not its hooks: SyncBatchNorm's
    convert_sync_batchnorm does so with batch norms, and back. So every forward pass of a network into which attention
    was inserted does this first; whoever compiles it, or calls a part of it, must have done it before.
    """
    handles = []
    for name, attention in network.named_modules(remove_duplicate=False):
        parent, _, child = name.rpartition(".")
        # Other parents are wrappers of the attention, or know it by a name of their own. `vars` is several times as
        # fast as hasattr of a Module.
        if child != "attention" or "is_inserted" not in vars(attention):
            continue
        module = network.get_submodule(parent)
        if "is_attended" not in vars(module):
            module.is_attended = True  # type: ignore[assignment]
            if not isinstance(module, nn.Sequential):  # which runs its new last child by itself
                handles.append(module.register_forward_hook(_attend))
    return handles


def _attach_first(network: nn.Module, arguments: Any) -> None:
    if not torch.compiler.is_compiling():
        attach_attention(network)


def _check_insertion(
    network: nn.Module, before: Mapping[str, list[_Run]], attentions: Mapping[str, nn.Module], example: Tensor
) -> None:
    """Reject a network that does not run each attention exactly on the output of the module that it follows."""
    try:
        after = _runs(network, attentions, example)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"where={list(before)!r}: with attention there, the network fails with {reason}") from error
    for name, runs in before.items():
        runs_after = after.get(name, [])
        if [run.shape for run in runs] != [run.shape for run in runs_after]:
            raise ValueError(
                f"where={name!r}: the network runs the attention {len(runs_after)} times, "
                f"{type(network.get_submodule(name)).__name__} {len(runs)} times; choose another module"
            )


def insert_attention(
    network: nn.Module, kind: AttentionKind | AttentionConfig, where: str | Sequence[str], example: Tensor | None = None
) -> nn.Module:
    """Put attention after chosen modules of `network`, in place, and return it: each output becomes attention(output).

        network = insert_attention(torchvision.models.resnet18(), "cbam", "layer?.*.bn2")

    The attention becomes a child named `attention` of the module it follows. Names, classes and weights of what was
    there before stay as they are, so that `load_state_dict(..., strict=False)` still loads the network's own
    checkpoints. Create the optimizer after inserting attention.

    Args:
        network: any module whose chosen modules give (B, C, H, W).
        kind: a kind, or an AttentionConfig without place, stages and where, which the next argument replaces.
        where: names of modules as in `network.named_modules()`; `*`, `?` and `[…]` stand for parts of a name between
            dots: `layer?.*` are the residual blocks of torchvision's ResNets.
        example: an input of the network, to see each module's channels from and to check the result with. Without it
            the channels are those of the last convolution or norm declared in the module, which is right for most
            blocks; where it is not, the first forward pass says so.

    Raises:
        ValueError: an option or pattern is wrong, or attention cannot follow the module. The network is then unchanged.
    """
    config = kind if isinstance(kind, AttentionConfig) else AttentionConfig(kind)
    for name in ("place", "stages", "where"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name}={getattr(config, name)!r} has no effect in insert_attention; use where")
    chosen = _chosen(network, [where] if isinstance(where, str) else where)
    runs = {} if example is None else _runs(network, chosen, example)
    attentions: dict[str, nn.Module] = {}
    for name, module in chosen.items():
        channels = (
            _declared_channels(name, module) if example is None else _seen_channels(name, module, runs.get(name, []))
        )
        attention = config.build(channels).train(module.training)
        if (parameter := next(chain(module.parameters(), network.parameters()), None)) is not None:
            attention.to(parameter.device, parameter.dtype)
        attention.register_forward_pre_hook(partial(_check_input, channels, type(module).__name__))
        attention.is_inserted = True  # type: ignore[assignment]
        attentions[name] = attention
    for name, module in chosen.items():
        module.attention = attentions[name]
    hooks = [*attach_attention(network), network.register_forward_pre_hook(_attach_first)]
    try:
        if example is not None:
            _check_insertion(network, runs, attentions, example)
    except BaseException:  # an interruption, too, leaves the network as it was
        for hook in hooks:
            hook.remove()
        for module in chosen.values():
            del module.attention, module.is_attended
        raise
    return network
