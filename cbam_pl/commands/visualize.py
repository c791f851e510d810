"""Draw what checkpoints see: python train.py visualize"""

import csv
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.data.folder import decode, find_images
from cbam_pl.data.images import Images
from cbam_pl.data.loader import Normalise
from cbam_pl.errors import UserError, as_user_error, cannot_write
from cbam_pl.inspect import drawing
from cbam_pl.inspect.curves import History, draw_curves, read_history
from cbam_pl.inspect.gates import attention_maps, feature_maps
from cbam_pl.inspect.grad_cam import grad_cam
from cbam_pl.inspect.scores import DELETED, Measure, measure
from cbam_pl.settings import EVALUATION_DATA, command_parser, parse
from cbam_pl.training.checkpoint import find_checkpoint, load_classifier
from cbam_pl.training.run import run_of

_NUM_IMAGES = 3
_MEASURE_IMAGES = 1000
_OTHER_FOLDER = "name another folder with --output"


@dataclass(frozen=True)
class Choice:
    """Which images to draw and to measure on.

    Args:
        images: the user's own files and folders.
        indices: of test images, from 0.
        class_name: of test images.
        num_images: how many, unless each is named; None: 3.
        measure_images: test images to measure on; None: 1000.

    Raises:
        UserError: options that exclude one another.
    """

    images: list[str] | None = None
    indices: list[int] | None = None
    class_name: str | None = None
    num_images: int | None = None
    measure_images: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("images", "indices", "class_name") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]} exclude one another; give one of them")
        if self.num_images is not None and given and given[0] != "class_name":
            raise UserError(f"--num_images has no effect with --{given[0]}, which names every image; leave it out")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint to draw.

    Args:
        path: its file.
        name: of its files and titles.
        content: what it holds.
        data: arguments of its ImageDataModule.
    """

    path: Path
    name: str
    content: dict[str, Any]
    data: dict[str, Any]

    @property
    def title(self) -> str:
        """The name, with the network and how long it was trained."""
        settings = self.content["hyper_parameters"]
        attention = settings["attention"]["kind"]
        return f"{self.name} ({settings['arch']}, attention {attention}, epoch {self.content['epoch'] + 1})"

    def network(self) -> nn.Module:
        """The network with its weights, on the GPU if there is one."""
        classifier = load_classifier(self.path, self.content)
        return classifier.network.to("cuda" if torch.cuda.is_available() else "cpu")

    def test_images(self) -> Images:
        """The test split of its data."""
        data = ImageDataModule(**self.data)
        data.prepare_data()
        data.setup("test")
        data.load_state_dict(self.content["ImageDataModule"])
        return data.images("test")

    def normalise(self, pixels: Tensor, network: nn.Module) -> Tensor:
        """Pixels (B, 3, H, W) uint8 → the network's input, on its device."""
        device = next(network.parameters()).device
        data = self.content["ImageDataModule"]
        return Normalise(data["mean"], data["std"], device)(pixels.to(device).float() / 255)


def visualize(options: list[str]) -> None:
    """Draw what one checkpoint or several see, and print the paths of the pictures.

    Args:
        options: words of the command line after `visualize`.
    """
    parser = command_parser("visualize")
    settings = parse(parser, options)
    found = [find_checkpoint(Path(settings.trainer.default_root_dir), name) for name in settings.ckpt_path]
    loaded = []
    for name, (path, content) in zip(unique_names([path for path, _ in found]), found, strict=True):
        saved = content["datamodule_hyper_parameters"]
        data = parse(parser, options, {"data": {name: saved[name] for name in EVALUATION_DATA}}).data
        loaded.append(LoadedCheckpoint(path, name, content, {**saved, **data}))
    choice = Choice(**{field.name: settings[field.name] for field in fields(Choice)})
    if settings.measure and choice.images is not None:
        raise UserError("--measure needs images whose classes are known; leave --images out")
    if choice.measure_images is not None and not settings.measure:
        raise UserError("--measure_images has no effect without --measure")
    with as_user_error():
        _draw(loaded, choice, settings.output, settings.format, settings.measure)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Recipe and version of each checkpoint's run, or the file's name; checkpoints of one run add the file's name."""
    names = [_name_of(path) for path in paths]
    pairs = list(zip(names, paths, strict=True))
    return _number([f"{n}-{path.stem}" if names.count(n) > 1 and n != path.stem else n for n, path in pairs])


def _name_of(path: Path) -> str:
    run = run_of(path)
    return path.stem if run is None else f"{run.recipe}-version_{run.version}"


def _number(names: Sequence[str]) -> list[str]:
    """The names, with a number after each that is used already."""
    unique: list[str] = []
    for name in names:
        candidates = [name, *(f"{name}-{number}" for number in range(2, len(names) + 1))]
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return unique


def _draw(loaded: Sequence[LoadedCheckpoint], choice: Choice, output: str | None, suffix: str, measured: bool) -> None:
    """Write the pictures of each checkpoint, their curves, and the measures where asked for.

    Raises:
        UserError: after all others are written, the pictures that cannot be drawn; or a folder cannot be written.
    """
    run = run_of(loaded[0].path)
    beside = loaded[0].path.absolute().parent if run is None or not run.logs.is_dir() else run.logs
    folder = beside / "pictures" if output is None else Path(output).expanduser()
    failures: list[str] = []

    def write(name: str, draw: Callable[..., Figure], *arguments: Any) -> None:
        path = folder / f"{name}.{suffix}"
        try:
            draw(*arguments).savefig(path)
        except ValueError as error:
            failures.append(f"no {path.name}: {error}")
        except OSError as error:
            raise cannot_write(path, error, _OTHER_FOLDER) from error
        else:
            print(path)

    looks = [look(one, choice) for one in loaded]  # before anything is written, so that mistakes come first
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error, _OTHER_FOLDER) from error
    names = [f"{one.name}-" if len(loaded) > 1 else "" for one in loaded]
    for one, name, (network, images, inputs) in zip(loaded, names, looks, strict=True):
        features, maps = feature_maps(network, inputs), attention_maps(network, inputs)
        write(f"{name}features", drawing.draw_features, images, features, f"Features\n{one.title}")
        write(f"{name}heat_maps", drawing.draw_heat_maps, images, features, f"Most active channels\n{one.title}")
        if maps:
            write(f"{name}attention", drawing.draw_attention, images, maps, f"Attention\n{one.title}")
        else:
            print(f"{one.title}: this network has no gates, so there is no picture of them")
        cams = grad_cam(network, inputs, features.logits.argmax(1))
        write(f"{name}grad_cam", drawing.draw_grad_cam, images, cams, maps, f"Grad-CAM\n{one.title}")
    histories = _read_histories(loaded)
    if histories:
        write("curves", draw_curves, histories)
    for one, name, (network, _, _) in zip(loaded, names, looks, strict=True) if measured else ():
        _measure(one, network, choice.measure_images or _MEASURE_IMAGES, folder / f"{name}measures.csv")
    if failures:
        raise UserError("; ".join(failures))


def look(loaded: LoadedCheckpoint, choice: Choice) -> tuple[nn.Module, drawing.CaptionedImages, Tensor]:
    """The network, the chosen images with their captions, and the same images as its input (B, 3, H, W)."""
    network = loaded.network()
    classes = loaded.content["ImageDataModule"]["classes"]
    if choice.images is not None:
        files = find_images(choice.images)
        pixels = torch.stack([decode(file, loaded.content["hyper_parameters"]["image_size"]) for file in files])
        headings = [file.name for file in files]
    else:
        images = loaded.test_images()
        indices = _choose(choice, images.labels, classes)
        pixels = images.pixels[indices]
        headings = [f"test image {index}\ntrue: {classes[images.labels[index]]}" for index in indices]
    inputs = loaded.normalise(pixels, network)
    logits = feature_maps(network, inputs).logits
    return network, drawing.CaptionedImages(pixels, drawing.describe(logits, classes, headings)), inputs


def _choose(choice: Choice, labels: Tensor, classes: list[str]) -> list[int]:
    """Indices of the chosen test images, whose labels (N,) are given."""
    count = choice.num_images or _NUM_IMAGES
    if choice.indices is not None:
        for index in choice.indices:
            if not 0 <= index < len(labels):
                raise UserError(f"--indices {index} is outside the test split; use 0 to {len(labels) - 1}")
        return choice.indices
    if choice.class_name is not None:
        if choice.class_name not in classes:
            near = difflib.get_close_matches(choice.class_name, classes, 1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(classes[:20])}"
            raise UserError(f"--class_name {choice.class_name} is not a class of the data; {hint}")
        members = (labels == classes.index(choice.class_name)).nonzero()[:, 0]
        if len(members) == 0:
            raise UserError(f"--class_name {choice.class_name} has no test image; choose another")
        return members[:count].tolist()
    return _evenly(len(labels), count)


def _evenly(total: int, count: int) -> list[int]:
    """Indices of `count` of `total` images, or of all, evenly spread: folders list their images class by class."""
    return [position * total // min(count, total) for position in range(min(count, total))]


def _read_histories(loaded: Sequence[LoadedCheckpoint]) -> list[History]:
    """What each run logged; once, though several of its checkpoints may be given."""
    runs = {run.logs.resolve(): one for one in loaded if (run := run_of(one.path)) is not None}
    names = _number([_name_of(one.path) for one in runs.values()])
    histories: dict[Path, History | None] = {}
    for (logs, one), name in zip(runs.items(), names, strict=True):
        histories[logs] = read_history(logs, f"{name} ({one.content['hyper_parameters']['attention']['kind']})")
    for one in loaded:
        run = run_of(one.path)
        if run is None or histories[run.logs.resolve()] is None:
            print(f"{one.title}: no logs of its run were found, so there are no curves")
    return [history for history in histories.values() if history is not None]


def _measure(loaded: LoadedCheckpoint, network: nn.Module, count: int, path: Path) -> None:
    """Measure on evenly chosen test images, print the table and save it."""
    images = loaded.test_images()
    images = images.subset(torch.tensor(_evenly(len(images), count)))
    measures = measure(network, loaded.normalise(images.pixels, network), images.labels, images.masks)
    print(f"{loaded.title}, {len(images):,} test images:")
    table = Table()
    headings = ["map"] if images.masks is None else ["map", "inside %", "pointing %"]
    for heading in [*headings, "whole", *(f"-{percent} %" for percent in DELETED)]:
        table.add_column(heading, justify="left" if heading == "map" else "right", no_wrap=True)
    for row in measures:
        shown = [f"{100 * mean.value:.1f} ± {100 * mean.error:.1f}" for mean in (row.inside, row.pointing) if mean]
        table.add_row(escape(row.name), *shown, *(f"{100 * accuracy:.1f}" for accuracy in row.accuracy.values()))
    Console(width=160).print(table)
    if images.masks is not None:
        print("inside: fraction of the map's energy (above its minimum) on the object; ± is one standard error")
        print("pointing: how often the map's maximum is on the object")
    print("-10 % …: accuracy in % without the most important pixels; for uniform, without random pixels")
    try:
        _write_measures(measures, path)
    except OSError as error:
        raise cannot_write(path, error, _OTHER_FOLDER) from error
    print(path)


def _write_measures(measures: Sequence[Measure], path: Path) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        accuracies = [f"accuracy_without_{percent}_percent" for percent in measures[0].accuracy]
        writer.writerow(["map", "inside", "inside_error", "pointing", "pointing_error", *accuracies])
        for row in measures:
            means = [("", "") if mean is None else (mean.value, mean.error) for mean in (row.inside, row.pointing)]
            writer.writerow([row.name, *means[0], *means[1], *row.accuracy.values()])
