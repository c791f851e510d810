"""A page to look through: what networks make of the same images, as bytes that gallery.js draws in a browser.

The page needs no other file. Of 200 images and three networks it has at most 10 MB, of others in proportion: each gate
is stored as one byte for each position or channel, and where a network has so many that they exceed the limit, the
largest maps are averaged to fewer positions, and of the longest channel gates every n-th channel is kept. The page says
so beside each.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor, nn

from cbam_pl.inspect.drawing import COLOURS, OPACITY, check_finite, gate_scale
from cbam_pl.inspect.gates import AttentionMaps, attention_maps, identity_factors, logits_of
from cbam_pl.inspect.scores import grad_cam

_BATCH_SIZE = 50  # images at once: Grad-CAM keeps all activations of them
# Bytes of a network's maps and of its part of an image: base64 writes three as four characters of the 10 MB.
_BUDGET = 3 / 4 * 10_000_000 / (200 * 3)
_OVERHEAD = 200  # bytes of them for the predictions and the page itself
_LIMITS = [side**2 for side in (64, 56, 48, 40, 32, 28, 24, 20, 16, 14, 12, 10, 8, 6, 4)]  # values of one gate
_TOP = 3  # classes of which the probability is shown
_SMALL, _LARGEST = 64, 128  # pixels: up to which an image is stored without loss, and beyond which it is made smaller


@dataclass(frozen=True)
class NetworkView:
    """What a network makes of images, on the CPU."""

    name: str  # a short one, that no other network of the page has
    description: str
    logits: Tensor  # (N, classes)
    cams: Tensor  # (N, H, W) ≥ 0, Grad-CAM of the predicted class
    maps: dict[str, AttentionMaps]  # block → its gates for all images; empty without attention
    factors: dict[str, float] = field(default_factory=dict)  # block → α, where its attention began as the identity


def view_network(
    network: nn.Module, inputs: Tensor, name: str, description: str, flip: bool = False, layer: str | None = None
) -> NetworkView:
    """Predictions, gates and Grad-CAM of normalised images (N, 3, H, W).

    Args:
        network: (B, 3, H, W) → (B, classes).
        inputs: normalised as in training.
        name: of the network, on the page.
        description: what it is, in a few words.
        flip: predict by the mean of the logits of each image and its mirror image; gates and Grad-CAM are the image's.
        layer: of Grad-CAM, see `grad_cam`.
    """
    logits, cams, maps = [], [], []
    for batch in inputs.split(_BATCH_SIZE):
        scores = logits_of(network, batch, flip)
        logits.append(scores.double().cpu())
        cams.append(grad_cam(network, batch, scores.argmax(1), layer).cpu())
        maps.append(attention_maps(network, batch))
    gates = {block: AttentionMaps(*(_join(maps, block, kind) for kind in ("channel", "spatial"))) for block in maps[0]}
    return NetworkView(name, description, torch.cat(logits), torch.cat(cams), gates, identity_factors(network))


def _join(parts: Sequence[dict[str, AttentionMaps]], block: str, kind: str) -> Tensor | None:
    gates = [getattr(part[block], kind) for part in parts]
    return None if gates[0] is None else torch.cat([gate.cpu() for gate in gates])


def render_gallery(
    title: str,
    pixels: Tensor,
    labels: Tensor,
    numbers: Sequence[int],
    classes: Sequence[str],
    networks: Sequence[NetworkView],
) -> str:
    """The page, as HTML.

    Args:
        title: its heading.
        pixels: images (N, 3, H, W) uint8.
        labels: (N,) int64, their true classes.
        numbers: of the images, in the test split.
        classes: names, by label.
        networks: views of these images, in the order of the columns.

    Raises:
        ValueError: a network's logits, Grad-CAM or gates are not finite.
    """
    pictures = [_as_url(one) for one in pixels]
    spent = sum(map(len, pictures)) * 3 / 4 / len(pictures)  # a picture belongs to all networks
    limit = _values_for_each_gate(networks, len(networks) * (_BUDGET - _OVERHEAD) - spent)
    content = {
        "classes": list(classes),
        "images": {"number": list(numbers), "label": labels.tolist(), "picture": pictures},
        "networks": [_describe(network, labels, limit) for network in networks],
        "colours": b64encode(COLOURS(np.arange(256), bytes=True).tobytes()).decode(),
    }
    here = Path(__file__)
    template, script = (here.with_name(f"gallery.{end}").read_text("utf-8") for end in ("html.jinja", "js"))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    opacity = {"opacity": OPACITY}
    return environment.from_string(template).render(title=title, content=content, script=Markup(script), **opacity)


def _values_for_each_gate(networks: Sequence[NetworkView], budget: float) -> int:
    """The largest number of values of one gate for one image with which all gates of an image fit into the budget."""
    sizes = [network.cams[0].numel() for network in networks]
    for network in networks:
        for gates in network.maps.values():
            sizes += [gate[0].numel() for gate in (gates.channel, gates.spatial) if gate is not None]
    fitting = (limit for limit in _LIMITS if sum(min(size, limit) for size in sizes) <= budget)
    return next(fitting, _LIMITS[-1])


def _describe(network: NetworkView, labels: Tensor, limit: int) -> dict[str, Any]:
    check_finite(f"the output of {network.name}", network.logits)
    logs = network.logits.log_softmax(1)
    top = logs.exp().topk(min(_TOP, logs.shape[1]))
    losses = -logs.gather(1, labels[:, None])[:, 0]
    return {
        "name": network.name,
        "description": network.description,
        "top": [
            [(label, round(value, 6)) for label, value in zip(*pair, strict=True)]
            for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
        "loss": [round(loss, 6) for loss in losses.tolist()],  # nats
        "cam": _cams(network, limit),
        "blocks": [
            {
                "name": block,
                "note": f"α {network.factors[block]:.2g}" if block in network.factors else "",
                "spatial": _spatial_gate(f"the spatial gate of {block} in {network.name}", gates.spatial, limit),
                "channel": _channel_gate(f"the channel gate of {block} in {network.name}", gates.channel, limit),
            }
            for block, gates in network.maps.items()
        ],
    }


def _cams(network: NetworkView, limit: int) -> dict[str, Any]:
    """Relative to each image's maximum: logits of different images and classes have no common unit."""
    check_finite(f"Grad-CAM of {network.name}", network.cams)
    maps = _shrink(network.cams, limit)
    maps = maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-30)
    return {"shape": maps.shape[1:], "low": 0, "high": 1, "bytes": _encode(maps * 255)}


def _spatial_gate(what: str, gate: Tensor | None, limit: int) -> dict[str, Any] | None:
    if gate is None:
        return None
    check_finite(what, gate)
    maps = _shrink(gate, limit)
    low, high = gate_scale(maps)
    scaled = _encode((maps - low) / (high - low) * 255)
    return {"shape": maps.shape[1:], "full": gate.shape[1:], "low": low, "high": high, "bytes": scaled}


def _channel_gate(what: str, gate: Tensor | None, limit: int) -> dict[str, Any] | None:
    """The channels by their mean over all images, highest first, so that a channel's bar is always in one place."""
    if gate is None:
        return None
    check_finite(what, gate)
    order = gate.mean(0).argsort(descending=True)
    kept = gate[:, order[:: -(-len(order) // limit)]]
    low, high = min(0.0, float(kept.min())), max(1.0, float(kept.max()))  # a network's own gate may exceed 1
    scaled = _encode((kept - low) / (high - low) * 255)
    return {"shape": kept.shape[1:], "full": gate.shape[1:], "low": low, "high": high, "bytes": scaled}


def _shrink(maps: Tensor, limit: int) -> Tensor:
    """Maps (N, H, W) with at most `limit` positions, each the mean of those that it takes the place of."""
    scale = sqrt(limit / maps[0].numel())
    if scale >= 1:
        return maps
    height, width = (max(1, int(side * scale)) for side in maps.shape[1:])
    return F.adaptive_avg_pool2d(maps[:, None], (height, width))[:, 0]


def _encode(values: Tensor) -> str:
    """Values from 0 to 255 as bytes, in base64."""
    return b64encode(values.round().to(torch.uint8).numpy().tobytes()).decode()


def _as_url(pixels: Tensor) -> str:
    """An image (3, H, W) uint8 as a data URL."""
    image, stream = Image.fromarray(pixels.permute(1, 2, 0).numpy()), BytesIO()
    small = max(image.size) <= _SMALL
    image.thumbnail((_LARGEST, _LARGEST))  # which never enlarges
    image.save(stream, "PNG" if small else "JPEG", optimize=True)
    return f"data:image/{'png' if small else 'jpeg'};base64,{b64encode(stream.getvalue()).decode()}"
