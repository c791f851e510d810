"""Do the gates matter? The accuracy when they are replaced by constants, or by the gates of another image."""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from cbam_pl.attention import CBAM
from cbam_pl.inspect.gates import as_input, attention_modules, evaluation_mode, gates_of, unwrap

REPLACEMENTS = ("mean", "constant", "other image")
Key = tuple[str, str]  # block, and channel, spatial or joint
Gates = dict[Key, Tensor]  # the gate as it multiplies


def ablate_gates(network: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 250) -> dict[str, Any]:
    """The accuracy when gates of trained attention are replaced, per block and in all blocks, without training again.

    A gate is the factor that the module multiplies its input by (of BAM 1 + sigmoid), as the unchanged network has it
    for these images. It is replaced by

    - mean: its mean over the images, a constant for each channel and position;
    - constant: 1 rescaled to the same mean, which is one number: the mean over images, channels and positions;
    - other image: the gate of another image, in a fixed permutation without fixed points (the images in a random order
      of seed 0, each with the gate of the next in its batch, the last with that of the first).

    Everything behind a replaced gate is computed from what it lets through, CBAM's second gate as well.

    Args:
        network: (B, 3, H, W) → logits (B, classes), with modules that have `gates`, as attention_maps finds them.
        images: (N, 3, H, W), normalised, two or more.
        labels: (N,), the true classes.
        batch_size: images in one forward pass at most, or the least above it that leaves no image alone.

    Returns:
        `images`, N; `accuracy`, of the unchanged network; `rows`, for each `block` (or all) and `gate` (channel,
        spatial, joint; both of a module with two) and each of REPLACEMENTS as `replaced_by`: `accuracy`, its `change`,
        and `change_error`, the standard error over the images of that paired difference. No rows without attention.

    Raises:
        ValueError: a single image, which has no other; or attention that runs twice, is not its input times its gates,
            or has `gates` of another form.
    """
    network, labels = unwrap(network), labels.cpu()
    modules = attention_modules(network)
    if len(images) < 2:
        raise ValueError("the gates of another image need at least two images")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    labels = labels[order]
    # Of two images at least, as a gate comes from another image of the batch.
    num_batches = min(ceil(len(images) / batch_size), len(images) // 2)
    batches = images[order.to(images.device)].tensor_split(num_batches)

    intact: list[Tensor] = []
    sums: Gates = {}
    predicted: dict[tuple[str, str, str], list[Tensor]] = {}
    with evaluation_mode(network), torch.no_grad():
        for batch in batches:
            classes, own = _intact(network, batch, modules)
            intact.append(classes)
            for key, gate in own.items():
                total = gate.double().sum(0, keepdim=True)
                sums[key] = sums[key] + total if key in sums else total
        means = {key: total / len(images) for key, total in sums.items()}
        for batch in batches if means else ():
            _, own = _intact(network, batch, modules)  # again, since the gates of all images may exceed the memory
            for (block, gate_name), keys in _targets(means).items():
                chosen = {block: modules[block] for block, _ in keys}
                for replacement in REPLACEMENTS:
                    replace = partial(_replace, replacement, keys, means, own)
                    classes = _predict(network, batch, chosen, partial(_product, replace))
                    predicted.setdefault((block, gate_name, replacement), []).append(classes)
    correct = (torch.cat(intact) == labels).double()
    rows = []
    for (block, gate_name, replacement), parts in predicted.items():
        now = (torch.cat(parts) == labels).double()
        error = float((now - correct).std(correction=0)) / sqrt(len(images) - 1)
        result = {"accuracy": float(now.mean()), "change": float((now - correct).mean()), "change_error": error}
        rows.append({"block": block, "gate": gate_name, "replaced_by": replacement, **result})
    return {"images": len(images), "accuracy": float(correct.mean()), "rows": rows}


def _intact(network: nn.Module, images: Tensor, modules: Mapping[str, nn.Module]) -> tuple[Tensor, Gates]:
    """The classes (B,) and the gates of the unchanged network."""
    seen: Gates = {}

    def note(block: str, name: str, gate: Tensor) -> Tensor:
        if (block, name) in seen:
            raise ValueError(f"the attention of {block} runs twice in one forward pass; use one module per place")
        seen[block, name] = gate
        return gate

    def check(block: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
        gates_of(block, module, arguments)  # rejects another form; of CBAM, _product takes its parts' gates
        if not _same(_product(note, block, module, arguments, output), output):
            raise ValueError(
                f"the attention of {block} does not give its input times its gates, so they cannot be replaced"
            )

    return _predict(network, images, modules, check), seen


def _same(product: Tensor, output: Any) -> bool:
    """Whether they differ by rounding alone."""
    if not isinstance(output, Tensor) or output.shape != product.shape:
        return False
    # Of the largest value: another order of the same products rounds otherwise. NaN, as after divergence, passes.
    allowed = sqrt(torch.finfo(output.dtype).eps) * output.abs().max()
    return not ((product - output).abs() > allowed).any()


def _predict(
    network: nn.Module, images: Tensor, modules: Mapping[str, nn.Module], hook: Callable[..., Tensor | None]
) -> Tensor:
    """The classes (B,) where each module's output is what hook(block, module, arguments, output) gives, if anything."""
    with ExitStack() as hooks:
        for block, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(hook, block)))
        return network(as_input(images, network)).argmax(1).cpu()


def _product(
    replace: Callable[[str, str, Tensor], Tensor],
    block: str,
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    output: Any,
) -> Tensor:
    """The module's input times its gates, where each is what replace(block, name, gate) gives."""
    x, module = arguments[0], unwrap(module)
    if isinstance(module, CBAM) and module.order != "parallel":
        for name in module.order.split("_"):  # the second gate sees what the first, or its replacement, passes on
            x = x * replace(block, name, module.get_submodule(name).gate(x))  # type: ignore[operator]
        return x
    for name, gate in gates_of(block, module, arguments).items():
        x = x * replace(block, name, gate)
    return x


def _replace(
    replacement: str, keys: Collection[Key], means: Gates, own: Gates, block: str, name: str, gate: Tensor
) -> Tensor:
    if (block, name) not in keys:
        return gate
    if replacement == "other image":
        return own[block, name].roll(-1, 0)
    mean = means[block, name]
    return (mean if replacement == "mean" else mean.mean()).to(gate.dtype)


def _targets(gates: Collection[Key]) -> dict[Key, set[Key]]:
    """What to replace at a time: (block or all, gate or both) → the gates."""
    targets: dict[Key, set[Key]] = {}
    for block in [*dict.fromkeys(block for block, _ in gates), "all"]:
        found = [key for key in gates if block in (key[0], "all")]
        names = list(dict.fromkeys(name for _, name in found))
        for name in names:
            targets[block, name] = {key for key in found if key[1] == name}
        if len(names) > 1:
            targets[block, "both"] = set(found)
    return targets
