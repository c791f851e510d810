"""Grad-CAM, and scores: does attention fall on the object, and does the network need what it attends to?"""

from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam  # takes a second to import; training does without this file
from torch import Tensor, nn

from cbam_pl.errors import is_out_of_memory
from cbam_pl.inspect import gates
from cbam_pl.inspect.gates import attention_maps, logits_of, unwrap, upsample

DELETED = tuple(range(10, 100, 10))  # percent of the pixels
ROAD_PERCENTS = (10, 30, 50, 70, 90)  # also of the pixels that are left
ROAD_EVERY = 4  # of the images, since imputation takes as long as the network


def grad_cam(network: nn.Module, images: Tensor, classes: Tensor, layer: str | None = None) -> Tensor:
    """Evidence for a class at each position of the output of a layer, by default that of `gates.last_activation`.

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, arXiv:1610.02391, equations 1 and 2, by captum's LayerGradCam.

    Shape:
        images (B, 3, H, W), classes (B,) → (B, H, W) ≥ 0, in units of the logits, upsampled bilinearly.

    Raises:
        ValueError: the layer is unknown, or no gradient of the logits reaches it, as where it runs in torch.no_grad().
    """
    network = unwrap(network)
    with gates.evaluation_mode(network), torch.enable_grad():
        images = gates.as_input(images, network)
        module = (
            gates.last_activation(network, images[:1]) if layer is None else gates.map_layer(network, images, layer)
        )
        explain = LayerGradCam(network, module)
        try:
            coarse = explain.attribute(images, target=classes.to(images.device), relu_attributions=True)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            which = "the last map" if layer is None else layer
            raise ValueError(f"no gradient of the classes reaches {which}; name another with --layer") from error
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


def mean_colour(images: Tensor, missing: Tensor) -> Tensor:
    """Normalised images (B, C, H, W) with zero, the mean colour normalised, in missing (B, 1, H, W) bool places."""
    return images.masked_fill(missing, 0.0)


def noisy_linear(images: Tensor, missing: Tensor, noise: float = 0.01) -> Tensor:
    """Images with each missing pixel the weighted mean of its eight neighbours, missing ones included, plus noise.

    Without the noise, a network could tell imputed pixels by their smoothness, and so see the mask. Source: Rong et
    al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods" (ROAD), ICML 2022, arXiv:2202.00449,
    section 4.2: weights 1/6 for direct and 1/12 for diagonal neighbours, in proportion where some are outside.

    Args:
        images: (B, C, H, W), normalised.
        missing: (B, 1, H, W) bool; an image without a known pixel becomes zero, the mean colour.
        noise: standard deviation, in units of the normalised images, as in the authors' code.

    Returns:
        (B, C, H, W).
    """
    # On a CPU so few images at once that each operation stays in a core's cache: several times as fast as all 250.
    count = 8 if images.device.type == "cpu" else len(images)
    solved = [_interpolate(*part) for part in zip(images.split(count), missing.split(count), strict=True)]
    generator = torch.Generator().manual_seed(0)  # on the CPU, so that it is the same everywhere
    random = torch.randn(images.shape, generator=generator).to(images)
    return torch.where(missing, torch.cat(solved) + noise * random, images)


def _interpolate(images: Tensor, missing: Tensor) -> Tensor:
    """Each missing pixel's weighted mean of its neighbours, zero elsewhere.

    With total, the sum of the neighbours' weights, the missing pixels x solve total · x − neighbours(x) =
    neighbours(known pixels), which is symmetric and positive definite: here by conjugate gradients, to a relative
    residual of 1e-5, far below the noise.
    """
    gap = missing.to(images.dtype)

    def neighbours(values: Tensor) -> Tensor:  # weights [1 2 1; 2 0 2; 1 2 1] / 12
        rows = F.pad(values, (1, 1, 1, 1))
        rows = rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]
        return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:] - 4 * values) / 12

    def dot(values: Tensor, others: Tensor) -> Tensor:
        return (values * others).sum((2, 3), keepdim=True)  # of each image and channel, (B, C, 1, 1)

    total, solution = neighbours(torch.ones_like(gap[:1])), torch.zeros_like(images)
    residual = gap * neighbours(images * (1 - gap))
    direction, squares = residual, dot(residual, residual)
    goal, least = 1e-10 * squares, torch.finfo(images.dtype).tiny
    for _ in range(missing[0].numel()):  # the most that exact arithmetic would need
        if (squares <= goal).all():
            break
        product = total * direction - gap * neighbours(direction)
        step = squares / dot(direction, product).clamp_min(least)
        solution = solution + step * direction
        residual = residual - step * product
        before, squares = squares, dot(residual, residual)
        direction = residual + squares / before.clamp_min(least) * direction
    return solution


def deletion_curve(
    classify: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    maps: Tensor,
    impute: Callable[[Tensor, Tensor], Tensor] = mean_colour,
    percents: Sequence[int] = DELETED,
    batch_size: int = 250,
) -> dict[int, float]:
    """Accuracy after the most important pixels were replaced, by percent of them deleted.

    Source: Petsiuk, Das, Saenko, "RISE", BMVC 2018, arXiv:1806.07421, section 4.2, with accuracy for probability.
    `classify` gives the classes (B,) of normalised images (B, 3, H, W); maps (N, H, W) are each pixel's importance;
    `impute` fills the missing (B, 1, H, W) places of images.
    """
    order = deletion_order(maps).to(images.device)
    accuracy = {}
    for percent in percents:
        removed = order[:, : round(order.shape[1] * percent / 100)]
        missing = torch.zeros_like(order, dtype=torch.bool).scatter_(1, removed, True).view(-1, 1, *images.shape[2:])
        batches = zip(images.split(batch_size), missing.split(batch_size), strict=True)
        classes = torch.cat([classify(impute(*batch)) for batch in batches])
        accuracy[percent] = float((classes == labels).double().mean())
    return accuracy


def _road_scores(
    classify: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, maps: Tensor
) -> dict[str, float]:
    road = partial(deletion_curve, classify, images, labels, impute=noisy_linear, percents=ROAD_PERCENTS)
    deleted, kept = road(maps=maps), road(maps=-maps)  # the most important pixels, and the least important ones
    deletion = {f"road_without_{percent}_percent": accuracy for percent, accuracy in deleted.items()}
    return deletion | {f"road_with_{percent}_percent": kept[100 - percent] for percent in ROAD_PERCENTS}


def measure(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Tensor | None,
    batch_size: int = 250,
    layer: str | None = None,
) -> list[dict[str, Any]]:
    """Score every spatial gate, Grad-CAM of the predicted class at `layer`, and a uniform map, deleted at random.

    For each `map`: `inside` (energy_inside) and `pointing` (pointing_game), means over the images, None without
    masks (N, 1, H, W) bool; `…_error`, their standard errors; `accuracy_without_N_percent` (deletion_curve), 0 for the
    whole image. With noisy linear imputation (ROAD) for the mean colour, on every fourth image, `road_images` of them:
    `road_without_N_percent`, also for 0, and `road_with_N_percent`, where only the N % most important pixels are shown.
    Images (N, 3, H, W) are normalised.
    """
    size = images.shape[2:]

    def classify(images: Tensor) -> Tensor:
        return torch.cat([logits_of(network, batch).argmax(1).cpu() for batch in images.split(batch_size)])

    labels = labels.cpu()
    predicted = classify(images)
    parts: dict[str, list[Tensor]] = {}
    for batch, classes in zip(images.split(batch_size), predicted.split(batch_size), strict=True):
        for name, block in attention_maps(network, batch).items():
            if block.spatial is not None:
                parts.setdefault(name, []).append(upsample(block.spatial, size).cpu())
        parts.setdefault(f"Grad-CAM of {layer}" if layer else "Grad-CAM", []).append(
            grad_cam(network, batch, classes, layer).cpu()
        )
    maps = {name: torch.cat(part) for name, part in parts.items()}
    maps["uniform"] = torch.ones(len(images), *size)
    right, some = (predicted == labels).double(), slice(None, None, ROAD_EVERY)
    whole = {0: float(right.mean())}
    rows = []
    for name, values in maps.items():
        row: dict[str, Any] = {"map": name}
        for score, function in (("inside", energy_inside), ("pointing", pointing_game)):
            known = None if masks is None else function(values, masks[:, 0].cpu()).double()
            error = None if known is None else float(known.std(correction=0)) / sqrt(max(1, len(known) - 1))
            row |= {score: None if known is None else float(known.mean()), f"{score}_error": error}
        curve = whole | deletion_curve(classify, images, labels, values, batch_size=batch_size)
        row |= {f"accuracy_without_{percent}_percent": value for percent, value in curve.items()}
        row |= {"road_images": len(images[some]), "road_without_0_percent": float(right[some].mean())}
        row |= _road_scores(classify, images[some], labels[some], values[some])
        rows.append(row)
    return rows
