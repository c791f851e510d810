"""Draw what checkpoints see: python train.py visualize"""

import csv
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.data.folder import decode, find_images
from cbam_pl.data.images import Images
from cbam_pl.data.loader import Normalise
from cbam_pl.errors import UserError, as_user_error
from cbam_pl.inspect.curves import draw_curves, read_history
from cbam_pl.inspect.drawing import Pictured, describe, draw_attention, draw_features, draw_grad_cam, draw_heat_maps
from cbam_pl.inspect.gates import attention_maps, feature_maps, grad_cam
from cbam_pl.inspect.page import save
from cbam_pl.inspect.scores import DELETED, Measure, measure
from cbam_pl.settings import command_parser, parse
from cbam_pl.training.checkpoint import find_checkpoint
from cbam_pl.training.classifier import Classifier
from cbam_pl.training.run import run_of

_NUM_IMAGES = 3
_MEASURE_IMAGES = 1000


@dataclass(frozen=True)
class Choice:
    """Which images to show and to measure on.

    Args:
        images: the user's own files and folders.
        indices: of test images, from 0.
        class_name: of test images.
        num_images: how many, where they are not named one by one; None: 3.
        measure_images: test images to measure on; None: 1000.

    Raises:
        UserError: options that exclude one another, or a number below 1.
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
        for name in ("num_images", "measure_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")


@dataclass(frozen=True)
class Subject:
    """A checkpoint to look into.

    Args:
        path: its file.
        checkpoint: what it holds.
        data: arguments of its ImageDataModule.
    """

    path: Path
    checkpoint: dict[str, Any]
    data: dict[str, Any]

    @property
    def name(self) -> str:
        """Recipe and version of the run, or the file's own name where it lies elsewhere."""
        run = run_of(self.path)
        return self.path.stem if run is None else f"{run.recipe}-version_{run.version}"

    @property
    def title(self) -> str:
        """The name, with what the network is and how long it was trained."""
        settings = self.checkpoint["hyper_parameters"]
        attention = settings["attention"]["kind"]
        return f"{self.name} ({settings['arch']}, attention {attention}, epoch {self.checkpoint['epoch'] + 1})"

    @property
    def folder(self) -> Path:
        """Where its pictures go: beside the run's logs, or beside the checkpoint."""
        run = run_of(self.path)
        return (self.path.absolute().parent if run is None or not run.logs.is_dir() else run.logs) / "pictures"

    def network(self) -> nn.Module:
        """The network with its weights, on the GPU where there is one.

        Raises:
            UserError: the checkpoint does not say which network it is of, or holds another's weights.
        """
        try:
            classifier = Classifier(**self.checkpoint["hyper_parameters"])
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.path} does not hold the settings of its network; name a checkpoint that `train.py fit` wrote"
            ) from error
        try:
            classifier.load_state_dict(self.checkpoint["state_dict"])
        except RuntimeError as error:
            raise UserError(
                f"{self.path} holds the weights of another network than its settings say; name another checkpoint"
            ) from error
        return classifier.network.to("cuda" if torch.cuda.is_available() else "cpu")

    def test_images(self) -> Images:
        """The test split of its data.

        Raises:
            UserError: the data cannot be read, or has other classes.
        """
        data = ImageDataModule(**self.data)
        data.prepare_data()
        data.setup("test")
        data.load_state_dict(self.checkpoint["ImageDataModule"])
        return data.images("test")

    def normalise(self, pixels: Tensor, network: nn.Module) -> Tensor:
        """Pixels (B, 3, H, W) uint8 → the network's input, on its device."""
        device = next(network.parameters()).device
        known = self.checkpoint["ImageDataModule"]
        return Normalise(known["mean"], known["std"], device)(pixels.to(device).float() / 255)


def draw(subjects: Sequence[Subject], choice: Choice, output: str | None, file_format: str, measured: bool) -> None:
    """Write every picture of every checkpoint, print the paths, and measure where that is asked for.

    A picture that cannot be drawn does not keep the others from being written.

    Raises:
        UserError: a bad choice or checkpoint, a picture that cannot be drawn, or a folder that cannot be written.
    """
    if measured and choice.images is not None:
        raise UserError("--measure needs images whose classes are known; leave --images out")
    if choice.measure_images is not None and not measured:
        raise UserError("--measure_images has no effect without --measure")
    folder = subjects[0].folder if output is None else Path(output).expanduser()
    failures: list[str] = []

    def write(name: str, make: Callable[..., Figure], *arguments: Any) -> None:
        path = folder / f"{name}.{file_format}"
        try:
            figure = make(*arguments)
        except ValueError as error:
            failures.append(f"no {path.name}: {error}")
            return
        try:
            save(figure, path)
        except OSError as error:
            raise _cannot_write(path, error) from error
        print(path)

    looks = [look(subject, choice) for subject in subjects]  # before anything is written, so that mistakes come first
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    for subject, (network, pictured, inputs) in zip(subjects, looks, strict=True):
        prefix = f"{subject.name}-" if len(subjects) > 1 else ""
        features, maps = feature_maps(network, inputs), attention_maps(network, inputs)
        title = subject.title
        write(f"{prefix}features", draw_features, pictured, features, f"Features\n{title}")
        write(f"{prefix}heat_maps", draw_heat_maps, pictured, features, f"Most active channels\n{title}")
        if maps:
            write(f"{prefix}attention", draw_attention, pictured, maps, f"Attention\n{title}")
        else:
            print(f"{title}: this network has no gates, so there is no picture of them")
        cams = grad_cam(network, inputs, features.logits.argmax(1))
        write(f"{prefix}grad_cam", draw_grad_cam, pictured, cams, maps, f"Grad-CAM\n{title}")
    _write_curves(subjects, write)
    if measured:
        for subject, (network, _, _) in zip(subjects, looks, strict=True):
            prefix = f"{subject.name}-" if len(subjects) > 1 else ""
            _measure(subject, network, choice.measure_images or _MEASURE_IMAGES, folder / f"{prefix}measures.csv")
    if failures:
        raise UserError("; ".join(failures))


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path} ({error.strerror}); name another folder with --output")


def look(subject: Subject, choice: Choice) -> tuple[nn.Module, Pictured, Tensor]:
    """The network, the chosen images with their captions, and as its input (B, 3, H, W)."""
    network = subject.network()
    classes = subject.checkpoint["ImageDataModule"]["classes"]
    true = None
    if choice.images is not None:
        files = find_images(choice.images)
        pixels = torch.stack([decode(file, subject.checkpoint["hyper_parameters"]["image_size"]) for file in files])
        headings = [file.name for file in files]
    else:
        images = subject.test_images()
        indices = _choose(choice, images.labels, classes)
        pixels = images.pixels[indices]
        headings = [f"test image {index}" for index in indices]
        true = [classes[label] for label in images.labels[indices]]
    inputs = subject.normalise(pixels, network)
    logits = feature_maps(network, inputs).logits
    return network, Pictured(pixels, describe(logits, classes, true, headings)), inputs


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
            raise UserError(f"--class_name {choice.class_name} is no class of the data; {hint}")
        members = (labels == classes.index(choice.class_name)).nonzero()[:, 0]
        if len(members) == 0:
            raise UserError(f"--class_name {choice.class_name} has no test image; choose another")
        return members[:count].tolist()
    return _evenly(len(labels), count)


def _evenly(total: int, count: int) -> list[int]:
    """Indices of `count` of `total` images, or of all, evenly spread: folders list their images class by class."""
    return [position * total // min(count, total) for position in range(min(count, total))]


def _write_curves(subjects: Sequence[Subject], write: Callable[..., None]) -> None:
    """Curves of all runs in one picture; each run once, though several of its checkpoints were given."""
    histories = {}
    for subject in subjects:
        run = run_of(subject.path)
        kind = subject.checkpoint["hyper_parameters"]["attention"]["kind"]
        history = None if run is None else read_history(run.logs, f"{subject.name} ({kind})")
        if history is None:
            print(f"{subject.title}: no logs of its run were found, so there are no curves")
        else:
            histories[subject.name] = history
    if histories:
        write("curves", draw_curves, list(histories.values()), "Curves: " + ", ".join(histories))


def _measure(subject: Subject, network: nn.Module, count: int, path: Path) -> None:
    """Measure on evenly chosen test images, print the table and save it."""
    from rich.console import Console
    from rich.table import Table

    images = subject.test_images()
    images = images.subset(torch.tensor(_evenly(len(images), count)))
    measures = measure(network, subject.normalise(images.pixels, network), images.labels, images.masks)
    print(f"{subject.title}, {len(images):,} test images:")
    table = Table()
    headings = ["map"] if images.masks is None else ["map", "inside %", "pointing %"]
    for heading in [*headings, "whole", *(f"-{percent} %" for percent in DELETED)]:
        table.add_column(heading, justify="left" if heading == "map" else "right", no_wrap=True)
    for row in measures:
        shown = [f"{100 * mean.value:.1f} ± {100 * mean.error:.1f}" for mean in (row.inside, row.pointing) if mean]
        table.add_row(row.name, *shown, *(f"{100 * accuracy:.1f}" for accuracy in row.accuracy.values()))
    Console(width=160).print(table)
    if images.masks is not None:
        print("inside: share of the map's mass above its lowest value that lies on the object; ± is one standard error")
        print("pointing: how often the map's maximum lies on the object")
    print("-10 % …: accuracy in % without the most important pixels; for uniform they are random ones")
    _write_measures(measures, path)
    print(path)


def _write_measures(measures: Sequence[Measure], path: Path) -> None:
    try:
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            accuracies = [f"accuracy_without_{percent}_percent" for percent in measures[0].accuracy]
            writer.writerow(["map", "inside", "inside_error", "pointing", "pointing_error", *accuracies])
            for row in measures:
                means: list[object] = []
                for mean in (row.inside, row.pointing):
                    means += ["", ""] if mean is None else [mean.value, mean.error]
                writer.writerow([row.name, *means, *row.accuracy.values()])
    except OSError as error:
        raise _cannot_write(path, error) from error


def visualize(options: list[str]) -> None:
    """Draw what one checkpoint or several see, and print the pictures' paths.

    Args:
        options: words of the command line after `visualize`.
    """
    parser = command_parser("visualize")
    settings = parse(parser, options)
    root = Path(settings.trainer.default_root_dir)
    subjects = []
    for name in settings.ckpt_path:
        path, checkpoint = find_checkpoint(root, name)
        # What is not given here is as the checkpoint was trained with.
        saved = dict(checkpoint["datamodule_hyper_parameters"])
        seed = saved.pop("seed")
        data = parse(parser, options, {"data": saved}).data
        subjects.append(Subject(path, checkpoint, {**data, "seed": seed}))
    choice = Choice(**{field.name: settings[field.name] for field in fields(Choice)})
    with as_user_error():
        draw(subjects, choice, settings.output, settings.format, settings.measure)
