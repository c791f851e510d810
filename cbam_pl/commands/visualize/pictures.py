"""A checkpoint with its network and test images, and the pictures and the page of what it sees."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from cbam_pl.data.datamodule import data_for_test, in_proportion
from cbam_pl.data.folder import decode, find_images
from cbam_pl.data.images import Images
from cbam_pl.data.loader import Normalise
from cbam_pl.errors import UserError
from cbam_pl.inspect import drawing
from cbam_pl.inspect.gallery import render_gallery, view_network
from cbam_pl.inspect.gates import attention_maps, feature_maps, identity_factors, logits_of, map_layer
from cbam_pl.inspect.scores import grad_cam
from cbam_pl.training.checkpoint import load_classifier, network_name
from cbam_pl.training.run import results_folder


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint to draw."""

    path: Path
    content: dict[str, Any]
    data: dict[str, Any]  # arguments of its ImageDataModule
    trust: Sequence[str] = ()  # packages of networks that it may import
    root: Path = Path()  # the folder that holds checkpoints and logs

    @property
    def logs(self) -> Path:
        """The folder of its results; the checkpoint's own folder where its run is not known."""
        return results_folder(self.path, self.root) or self.path.absolute().parent

    @property
    def description(self) -> str:
        """Its network, attention and epoch."""
        model = self.content["hyper_parameters"]
        return f"{network_name(model)}, attention {model['attention']['kind']}, epoch {self.content['epoch'] + 1}"

    @cached_property
    def network(self) -> nn.Module:
        """The network with its weights, on the GPU if there is one."""
        network = load_classifier(self.path, self.content, trust=self.trust).network
        return network.to("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def flips(self) -> bool:
        """Whether it predicts by the mean of each image and its mirror image."""
        return self.content["hyper_parameters"].get("test_time_flip", False)

    @property
    def batch_size(self) -> int:
        """Images in one forward pass of a measurement: no more than `test` takes."""
        return min(250, 4 * self.data["batch_size"])

    @cached_property
    def test_images(self) -> Images:
        """The test split of its data."""
        data = data_for_test(self.content, self.data)
        data.prepare_data()
        data.setup("test")
        return data.images("test")

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) uint8 → the network's input, on its device."""
        device = next(self.network.parameters()).device
        data = self.content["ImageDataModule"]
        return Normalise(data["mean"], data["std"], device)(pixels.to(device))


def pictures_of(
    loaded: LoadedCheckpoint,
    title: str,
    images: list[str] | None = None,
    indices: list[int] | None = None,
    class_name: str | None = None,
    num_images: int | None = None,
    layer: str | None = None,
) -> dict[str, Callable[[], Figure]]:
    """What draws each picture of what a network sees, by name, as the options of `visualize` say."""
    classes = loaded.content["ImageDataModule"]["classes"]
    if images is not None:
        files = find_images(images)
        size = loaded.content["hyper_parameters"]["image_size"]
        proportional = in_proportion(loaded.content["datamodule_hyper_parameters"])
        pixels = torch.stack([decode(file, size, proportional) for file in files])
        headings = [file.name for file in files]
    else:
        test = loaded.test_images
        indices = _choose(test, classes, indices, class_name, num_images or 3)
        pixels = test.pixels[indices]
        headings = [f"test image {index}\ntrue: {classes[test.labels[index]]}" for index in indices]
    network, inputs = loaded.network, loaded.normalise(pixels)
    features, maps = feature_maps(network, inputs), attention_maps(network, inputs)
    factors = {block: f"{block}, α {factor:.2g}" for block, factor in identity_factors(network).items()}
    maps = {factors.get(block, block): gates for block, gates in maps.items()}
    logits = logits_of(network, inputs, loaded.flips)
    if layer is not None:
        map_layer(network, inputs, layer)  # rejects an unknown one before anything is drawn
    shown = drawing.CaptionedImages(pixels, drawing.describe(logits, classes, headings))

    def draw_grad_cam() -> Figure:
        cams = grad_cam(network, inputs, logits.argmax(1), layer)
        return drawing.draw_grad_cam(shown, cams, maps, f"Grad-CAM\n{title}", layer)

    drawn: dict[str, Callable[[], Figure]] = {
        "features": partial(drawing.draw_features, shown, features, f"Features\n{title}"),
        "heat_maps": partial(drawing.draw_heat_maps, shown, features, f"Most active channels\n{title}"),
        "attention": partial(drawing.draw_attention, shown, maps, f"Attention\n{title}"),
        "grad_cam": draw_grad_cam,
    }
    return {name: draw for name, draw in drawn.items() if maps or name != "attention"}


def gallery_of(
    named: Mapping[str, LoadedCheckpoint],
    indices: list[int] | None = None,
    class_name: str | None = None,
    num_images: int | None = None,
    layer: str | None = None,
) -> str:
    """The page on what networks, by name, make of the same test images; all of them must have the same data.

    Raises:
        UserError: the networks have other classes or test images than the first, or an option names none.
    """
    (first, test), *others = ((name, one.test_images) for name, one in named.items())
    classes = named[first].content["ImageDataModule"]["classes"]
    chosen = torch.tensor(_choose(test, classes, indices, class_name, num_images or 200))
    shown = test.subset(chosen)
    for name, images in others:
        if named[name].content["ImageDataModule"]["classes"] != classes:
            raise UserError(f"{name} and {first} do not have the same classes; make a page for each")
        if not (torch.equal(images.labels, test.labels) and torch.equal(images.take(chosen), shown.pixels)):
            raise UserError(f"{name} and {first} do not have the same test images; make a page for each")
    views = []
    for name, one in named.items():
        what = f"{one.description}, {one.path}" + (f"; Grad-CAM of {layer}" if layer else "")
        views.append(view_network(one.network, one.normalise(shown.pixels), name, what, one.flips, layer))
    *most, last = named
    who = f"{', '.join(most)} and {last} see" if most else f"{last} sees"
    title = f"{len(chosen):,} of {len(test):,} test images, as {who} them"
    return render_gallery(title, shown.pixels, shown.labels, chosen.tolist(), classes, views)


def _choose(
    test: Images, classes: list[str], indices: list[int] | None, class_name: str | None, count: int
) -> list[int]:
    if indices is None:
        return _choose_of(test.labels, classes, class_name, count)
    for index in indices:
        if not 0 <= index < len(test):
            raise UserError(f"--indices {index} is outside the test split; use 0 to {len(test) - 1}")
    return indices


def _choose_of(labels: Tensor, classes: list[str], class_name: str | None, count: int) -> list[int]:
    if class_name is None:
        return evenly(len(labels), count)
    if class_name not in classes:
        near = difflib.get_close_matches(class_name, classes, 1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(classes[:20])}"
        raise UserError(f"--class_name {class_name} is not a class of the data; {hint}")
    members = (labels == classes.index(class_name)).nonzero()[:, 0]
    if len(members) == 0:
        raise UserError(f"--class_name {class_name} has no test image; choose another")
    return members[:count].tolist()


def evenly(total: int, count: int) -> list[int]:
    """Indices of `count` of `total` images, or of all, evenly spread: folders list their images class by class."""
    return [position * total // min(count, total) for position in range(min(count, total))]
