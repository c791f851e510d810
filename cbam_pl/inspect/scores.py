"""Grad-CAM, and scores: does attention fall on the object, and does the network need what it attends to?"""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from captum.attr import LayerGradCam  # takes a second to import; training does without this file
from torch import Tensor, nn

from cbam_pl.inspect import gates
from cbam_pl.inspect.gates import attention_maps, feature_maps, unwrap, upsample

DELETED = tuple(range(10, 100, 10))  # percent of the pixels


def grad_cam(network: nn.Module, images: Tensor, classes: Tensor, layer: str | None = None) -> Tensor:
    """Evidence for a class at each position of the output of a layer, by default that of `gates.last_activation`.

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, arXiv:1610.02391, equations 1 and 2, by captum's LayerGradCam.

    Shape:
        images (B, 3, H, W), classes (B,) → (B, H, W) ≥ 0, in units of the logits, upsampled bilinearly.
    """
    network = unwrap(network)
    with gates.evaluation_mode(network), torch.enable_grad():
        images = gates.as_input(images, network)
        module = (
            gates.last_activation(network, images[:1]) if layer is None else gates.map_layer(network, images, layer)
        )
        explain = LayerGradCam(network, module)
        coarse = explain.attribute(images, target=classes.to(images.device), relu_attributions=True)
    return upsample(coarse.detach()[:, 0].float(), images.shape[-2:])


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Fraction of a map's energy, the map minus its minimum in the image, inside the object.

    That of a constant map is the object's fraction of the image. Maps and masks (N, H, W) → (N,) in [0, 1].
    """
    energy = (maps - maps.amin((1, 2), keepdim=True)).double()
    energy = torch.where(energy.sum((1, 2), keepdim=True) > 0, energy, 1.0)
    return (energy * masks).sum((1, 2)) / energy.sum((1, 2))


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Whether a map's maximum is inside the object; with several equal maxima, their fraction inside.

    Source: Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, arXiv:1608.00507, section 4.2,
    without its tolerance of 15 pixels. Maps and masks (N, H, W) → (N,) in [0, 1].
    """
    highest = maps == maps.amax((1, 2), keepdim=True)
    return (highest & masks).sum((1, 2)) / highest.sum((1, 2))


def deletion_order(maps: Tensor) -> Tensor:
    """Indices of each image's pixels, most important first, ties in random order. (N, H, W) → (N, H · W) int64."""
    flat = maps.flatten(1).cpu()
    shuffled = torch.rand(flat.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    ranked = flat.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    return shuffled.gather(1, ranked)


def deletion_curve(
    classify: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, maps: Tensor
) -> dict[int, float]:
    """Accuracy after the most important pixels were replaced by the data's mean colour, by percent of them deleted.

    Source: Petsiuk, Das, Saenko, "RISE", BMVC 2018, arXiv:1806.07421, section 4.2, with accuracy for probability.
    `classify` gives the classes (B,) of normalised images (B, 3, H, W); maps (N, H, W) are each pixel's importance.
    """
    order = deletion_order(maps).to(images.device)
    accuracy = {}
    for percent in DELETED:
        removed = order[:, : round(order.shape[1] * percent / 100)]
        kept = torch.ones_like(order, dtype=images.dtype).scatter_(1, removed, 0.0).view(-1, 1, *images.shape[2:])
        accuracy[percent] = float((classify(images * kept) == labels).double().mean())
    return accuracy


def measure(
    network: nn.Module, images: Tensor, labels: Tensor, masks: Tensor | None, batch_size: int = 250
) -> list[dict[str, Any]]:
    """Score every spatial gate, Grad-CAM of the predicted class, and a uniform map, whose deletion is random.

    For each `map`: `inside` (energy_inside) and `pointing` (pointing_game), means over the images, None without
    masks (N, 1, H, W) bool; `…_error`, their standard errors; `accuracy_without_N_percent` (deletion_curve), 0 for the
    whole image. Images (N, 3, H, W) are normalised.
    """
    size = images.shape[2:]

    def classify(images: Tensor) -> Tensor:
        return torch.cat([feature_maps(network, batch).logits.argmax(1).cpu() for batch in images.split(batch_size)])

    labels = labels.cpu()
    predicted = classify(images)
    parts: dict[str, list[Tensor]] = {}
    for batch, classes in zip(images.split(batch_size), predicted.split(batch_size), strict=True):
        for name, block in attention_maps(network, batch).items():
            if block.spatial is not None:
                parts.setdefault(name, []).append(upsample(block.spatial, size).cpu())
        parts.setdefault("Grad-CAM", []).append(grad_cam(network, batch, classes).cpu())
    maps = {name: torch.cat(part) for name, part in parts.items()}
    maps["uniform"] = torch.ones(len(images), *size)
    whole = {0: float((predicted == labels).double().mean())}
    rows = []
    for name, values in maps.items():
        row: dict[str, Any] = {"map": name}
        for score, function in (("inside", energy_inside), ("pointing", pointing_game)):
            known = None if masks is None else function(values, masks[:, 0].cpu()).double()
            error = None if known is None else float(known.std(correction=0)) / sqrt(max(1, len(known) - 1))
            row |= {score: None if known is None else float(known.mean()), f"{score}_error": error}
        curve = whole | deletion_curve(classify, images, labels, values)
        rows.append(row | {f"accuracy_without_{percent}_percent": value for percent, value in curve.items()})
    return rows
