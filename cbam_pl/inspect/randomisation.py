"""Do the maps depend on what the network has learned? The cascading randomisation of its layers."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from cbam_pl.inspect.gates import (
    as_input,
    attention_maps,
    convolution_blocks,
    evaluation_mode,
    last_activation,
    logits_of,
    plain_name,
    unwrap,
)
from cbam_pl.inspect.scores import grad_cam
from cbam_pl.models.cnn import CNN
from cbam_pl.models.insertion import map_shapes
from cbam_pl.models.resnet import ResNet


def rank_correlation(maps: Tensor, others: Tensor) -> np.ndarray:
    """Spearman's rank correlation of each image's map with its other one, NaN where one of the two is constant.

    Ties have their mean rank. Maps (N, H, W) → (N,) in [−1, 1].
    """
    ranks = [rankdata(one.flatten(1).cpu().numpy(), axis=1) for one in (maps, others)]
    first, second = (one - one.mean(1, keepdims=True) for one in ranks)
    scale = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    return np.divide((first * second).sum(1), scale, out=np.full(len(first), np.nan), where=scale > 0)


def cascading_randomisation(
    network: nn.Module, images: Tensor, batch_size: int = 250, seed: int = 0, layer: str | None = None
) -> dict[str, Any]:
    """How similar Grad-CAM and the spatial gates stay when layers are re-initialised from the top down.

    A map that hardly changes does not show what the network has learned. Source: Adebayo et al., "Sanity Checks for
    Saliency Maps", NeurIPS 2018, arXiv:1810.03292, section 3.1. A step re-initialises one more convolution block, with
    its attention, by PyTorch's `reset_parameters` of its layers, batch norm with its statistics; the first step is the
    classifier, all that runs after the blocks. In a network that is not of cbam_pl.models the last step, "the rest", is
    what else runs before and between them. Weights that no `reset_parameters` resets stay. Grad-CAM is of the class
    that the unchanged network predicts. `network` stays as it is.

    Args:
        network: one that grad_cam takes.
        images: (N, 3, H, W), normalised.
        batch_size: images in one forward pass.
        seed: decides the new weights.
        layer: of Grad-CAM, by default its own.

    Returns:
        `images`, N; `seed`; `layer`, of Grad-CAM; `layers`, in the order in which they are re-initialised; `spearman`:
        Grad-CAM and each block with a spatial gate → after each step the mean rank correlation with the unchanged
        network's map; it is over the images where neither of the two maps is constant (Grad-CAM is zero where nothing
        speaks for the class), of which there are as many as `compared` says, and None where there is none.
    """
    network = unwrap(network)
    example = as_input(images[:1], network)
    groups = _groups(network, example)
    target = last_activation(network, example)
    layer_name = layer or next(plain_name(name) for name, module in network.named_modules() if module is target)
    fresh = copy.deepcopy(network).cpu()  # on the CPU, so that a seed gives the same weights everywhere
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in fresh.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    changed = copy.deepcopy(network)
    batches = images.split(batch_size)
    classes = [logits_of(network, batch).argmax(1) for batch in batches]
    before = [_maps(network, *batch, layer) for batch in zip(batches, classes, strict=True)]
    spearman: dict[str, list[float | None]] = {name: [] for name in before[0]}
    compared: dict[str, list[int]] = {name: [] for name in spearman}
    trained, names = network.state_dict(), list(groups)
    for count in range(len(names), -1, -1):  # groups that keep their weights
        kept = {trained[key].data_ptr() for name in names[:count] for key in groups[name]}
        state = fresh.state_dict()
        state.update({key: one for key, one in trained.items() if one.data_ptr() in kept})  # by all of their names
        changed.load_state_dict(state)
        after = [_maps(changed, *batch, layer) for batch in zip(batches, classes, strict=True)]
        for name, values in spearman.items():
            parts = [rank_correlation(*(maps[name] for maps in pair)) for pair in zip(before, after, strict=True)]
            known = np.concatenate(parts)
            known = known[~np.isnan(known)]
            values.append(float(known.mean()) if len(known) else None)
            compared[name].append(len(known))
    layers = ["classifier", *names[::-1]]
    found = {"images": len(images), "seed": seed, "layer": layer_name, "layers": layers}
    return found | {"spearman": spearman, "compared": compared}


def _groups(network: nn.Module, example: Tensor) -> dict[str, list[str]]:
    """Keys of the weights that each step but the first re-initialises, by its name, the lowest first.

    Blocks are those of cbam_pl.models, or the outermost modules with weights that give maps (of any size), but for the
    one that holds the classifier; where there is one alone, those in it.
    """
    state = network.state_dict()
    keys = list(state)
    if isinstance(network, (CNN, ResNet)):
        blocks = list(convolution_blocks(network, example))
        return {name: [key for key in keys if plain_name(key).startswith(f"{name}.")] for name in blocks}
    started = _started(network, example)
    classifier = max(keys, key=lambda key: started[key.rpartition(".")[0]])
    found = [name for name in map_shapes(network, example) if not f"{classifier}.".startswith(f"{name}.")]
    found = [name for name in found if network.get_submodule(name).state_dict()]
    blocks = _outermost(found)
    while len(blocks) == 1 and (inside := _outermost([name for name in found if name.startswith(f"{blocks[0]}.")])):
        blocks = inside
    groups = {name: [key for key in keys if key.startswith(f"{name}.")] for name in blocks}
    last = max((started[key.rpartition(".")[0]] for own in groups.values() for key in own), default=-1)
    grouped = {state[key].data_ptr() for own in groups.values() for key in own}
    others = [key for key in keys if state[key].data_ptr() not in grouped]
    rest = [key for key in others if started[key.rpartition(".")[0]] <= last]
    return ({"the rest": rest} if rest else {}) | groups


def _outermost(names: Sequence[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _started(network: nn.Module, example: Tensor) -> dict[str, int]:
    """When each module first ran, by its name; one whose weights another uses, when that ran."""
    order: list[str] = []
    named = dict(network.named_modules(remove_duplicate=False))  # of a shared module, the state has each name
    with evaluation_mode(network), torch.no_grad(), ExitStack() as hooks:
        for name, module in named.items():
            hooks.enter_context(module.register_forward_pre_hook(lambda *_, name=name: order.append(name)))
        network(example)
    started = {name: place for place, name in reversed(list(enumerate(order)))}
    for name in named:  # parents first
        started.setdefault(name, started.get(name.rpartition(".")[0], 0))
    return started


def _maps(network: nn.Module, images: Tensor, classes: Tensor, layer: str | None) -> Mapping[str, Tensor]:
    """Grad-CAM and the spatial gates, (B, h, w) each."""
    found = attention_maps(network, images)
    spatial = {name: block.spatial for name, block in found.items() if block.spatial is not None}
    return {"Grad-CAM": grad_cam(network, images, classes, layer), **spatial}
