"""Attention in a network of the user's own, without editing its code."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cbam_pl.attention import AttentionConfig, AttentionKind


def _matches(name: str, pattern: str) -> bool:
    """Whether each dotted part of the name matches that of the pattern, so that `*` stands for one part."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _chosen(network: nn.Module, where: Sequence[str]) -> dict[str, nn.Module]:
    modules = {name: module for name, module in network.named_modules() if name}
    chosen: dict[str, nn.Module] = {}
    for pattern in where:
        found = {name: module for name, module in modules.items() if _matches(name, pattern)}
        if not found:
            near = difflib.get_close_matches(pattern, modules, n=5, cutoff=0.3) or list(modules)[:5]
            raise ValueError(f"where={pattern!r} matches no module of the network; it has {', '.join(near)} …")
        chosen |= found
    if not chosen:
        raise ValueError(f"where={where!r} must name at least one module")
    return chosen


def _declared_channels(module: nn.Module) -> int | None:
    """The output channels of the last layer in `module`, by order of declaration, that states them."""
    for layer in reversed(list(module.modules())):
        for attribute in ("out_channels", "num_features", "num_channels"):  # convolution, batch and group norm
            if isinstance(getattr(layer, attribute, None), int):
                return getattr(layer, attribute)
    return None


def _seen_channels(network: nn.Module, chosen: dict[str, nn.Module], example: Tensor) -> dict[str, int]:
    """The channels that each chosen module gives for the example."""
    seen: dict[str, int] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                seen[name] = output.shape[1]

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in chosen.items()]
    modes = {module: module.training for module in network.modules()}
    network.eval()  # the example must not move the batch norms' statistics
    try:
        with torch.no_grad():
            network(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return seen


def _attend(channels: int, module: nn.Module, arguments: Any, output: Any) -> Tensor:
    """The forward hook. A plain function that reads the attention off the module, so that copies use their own."""
    if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[1] != channels:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the attention after {type(module).__name__} is for (B, {channels}, H, W), but the output is {got}; "
            "choose another module, or give insert_attention an example input to see the channels from"
        )
    return module.attention(output)  # type: ignore[operator]


def insert_attention(
    network: nn.Module,
    kind: AttentionKind | AttentionConfig,
    where: str | Sequence[str],
    example: Tensor | None = None,
) -> nn.Module:
    """Put attention after chosen modules of `network`, in place: each output becomes attention(output).

        network = insert_attention(torchvision.models.resnet18(), "cbam", "layer?.*.bn2")

    The attention becomes a child named `attention` of the module it follows. Names, classes and weights of what was
    there before stay as they are, so that `load_state_dict(..., strict=False)` still takes the network's own
    checkpoints. Make the optimiser afterwards.

    Args:
        network: any module whose chosen parts give (B, C, H, W).
        kind: a kind, or an AttentionConfig with its options; where it stands is for `where` to say.
        where: names of modules as in `network.named_modules()`; `*`, `?` and `[…]` stand for parts of a name between
            dots: `layer?.*` are the residual blocks of torchvision's ResNets.
        example: an input of the network, from which each module's channels are seen. Without it they are those of
            the last convolution or norm declared in the module, which is right for most blocks; where it is not,
            the first forward pass says so.

    Returns:
        The same network.

    Raises:
        ValueError: a pattern that matches nothing, a module whose channels are unknown or which has an attribute
            `attention` already, or an option out of its range. The network is then unchanged.
    """
    config = kind if isinstance(kind, AttentionConfig) else AttentionConfig(kind)
    for name in ("place", "stages"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name}={getattr(config, name)!r} has no effect in insert_attention; use where")
    chosen = _chosen(network, [where] if isinstance(where, str) else where)
    seen = {} if example is None else _seen_channels(network, chosen, example)
    attentions: dict[str, tuple[int, nn.Module]] = {}
    for name, module in chosen.items():
        if hasattr(module, "attention"):
            raise ValueError(f"where={name!r}: {type(module).__name__} has an attribute `attention` already")
        channels = _declared_channels(module) if example is None else seen.get(name)
        if channels is None:
            mend = "give an example input" if example is None else "choose a module that gives (B, C, H, W)"
            raise ValueError(f"where={name!r}: the channels of {type(module).__name__} are unknown; {mend}")
        attention = config.build(channels).train(module.training)
        for parameter in [*module.parameters(), *network.parameters()][:1]:
            attention.to(parameter.device, parameter.dtype)
        attentions[name] = (channels, attention)
    for name, (channels, attention) in attentions.items():
        module = chosen[name]
        module.attention = attention
        if type(module).forward is not nn.Sequential.forward:  # which runs its new last child by itself
            module.register_forward_hook(partial(_attend, channels))
    return network
