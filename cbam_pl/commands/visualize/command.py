"""The command: choose checkpoints and images, write pictures, tables and pages."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from cbam_pl.commands.visualize.pictures import LoadedCheckpoint, evenly, gallery_of, pictures_of
from cbam_pl.data.images import Images
from cbam_pl.errors import UserError, as_user_error, cannot_write
from cbam_pl.inspect import drawing
from cbam_pl.inspect.ablation import ablate_gates
from cbam_pl.inspect.charts import draw_ablation, draw_randomisation
from cbam_pl.inspect.curves import History, draw_curves, read_history
from cbam_pl.inspect.randomisation import cascading_randomisation
from cbam_pl.inspect.scores import measure
from cbam_pl.inspect.tables import print_ablation, print_randomisation, print_scores
from cbam_pl.settings import command_parser, given_data, parse
from cbam_pl.training.checkpoint import find_checkpoint
from cbam_pl.training.run import read_result, run_of

RANDOMISED_EVERY = 4  # of the images measured on: a mean of correlations needs fewer than an accuracy


def visualize(options: list[str]) -> None:
    """Draw what one checkpoint or several see; pictures that cannot be drawn are reported after the others."""
    parser = command_parser("visualize")
    settings = parse(parser, options)
    _check_options(settings)
    loaded, root = [], Path(settings.trainer.default_root_dir)
    for name in settings.ckpt_path:
        path, content = find_checkpoint(root, name)
        data = content["datamodule_hyper_parameters"] | given_data(settings)
        loaded.append(LoadedCheckpoint(path, content, data, settings.trust, root))
    folder = loaded[0].logs / "pictures" if settings.output is None else Path(settings.output).expanduser()
    with as_user_error("draw fewer images, measure on fewer (--measure_images), or lower data.batch_size"):
        (_write_page if settings.page else _write_pictures)(settings, loaded, folder)


@contextmanager
def _writing_into(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise cannot_write(error.filename or folder, error, "name another folder with --output") from error


def _write_page(settings: Any, loaded: Sequence[LoadedCheckpoint], folder: Path) -> None:
    paths = [one.path for one in loaded]
    recipes = [_name_of(path) if (run := run_of(path)) is None else run.recipe for path in paths]
    names = recipes if len({*recipes}) == len(recipes) else unique_names(paths)
    named = dict(zip(names, loaded, strict=True))
    chosen = {name: settings[name] for name in ("indices", "class_name", "num_images", "layer")}
    page, path = gallery_of(named, **chosen), folder / "gallery.html"
    with _writing_into(folder):
        path.write_text(page, "utf-8")
    print(path)


def _write_pictures(settings: Any, loaded: Sequence[LoadedCheckpoint], folder: Path) -> None:
    chosen = {name: settings[name] for name in ("images", "indices", "class_name", "num_images")}
    file_format = settings.format or "png"
    pictures: dict[str, Callable[[], Figure]] = {}
    measured = {}
    failures = []
    for one, name in zip(loaded, unique_names([one.path for one in loaded]), strict=True):
        title, prefix = f"{name} ({one.description})", f"{name}-" if len(loaded) > 1 else ""
        drawn = pictures_of(one, title, **chosen, layer=settings.layer)
        if "attention" not in drawn:
            print(f"{title}: this network has no gates, so there is no picture of them")
        if tested := _read_test(one):
            drawn["reliability"] = partial(_draw_reliability, tested, f"Reliability\n{title}")
        else:
            print(f"{title}: there is no test of it, so there is no reliability diagram; run: test --calibrate")
        pictures |= {prefix + kind: draw for kind, draw in drawn.items()}
        measured[prefix] = one, title + ("; without the mirror images of test_time_flip" if one.flips else "")
    if histories := _read_histories(loaded):
        pictures["curves"] = partial(draw_curves, histories)
    with _writing_into(folder):
        for name, draw in pictures.items():
            path = folder / f"{name}.{file_format}"
            try:
                draw().savefig(path)
                print(path)
            except ValueError as error:
                failures.append(f"no {path.name}: {error}")
        for prefix, (one, title) in measured.items() if settings.measure else ():
            images = one.test_images
            subset = images.subset(torch.tensor(evenly(len(images), settings.measure_images or 1000)))
            _measure(one, title, subset, settings.layer, folder / f"{prefix}measures.csv")
            failures += _intervene(one, title, subset, settings.layer, folder, prefix, file_format)
    if failures:
        raise UserError("; ".join(failures))


def _check_options(settings: Any) -> None:
    given = [name for name in ("images", "indices", "class_name") if settings[name] is not None]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} exclude one another; give one of them")
    if settings.num_images is not None and given and given[0] != "class_name":
        raise UserError(f"--num_images has no effect with --{given[0]}, which names every image; leave it out")
    if settings.measure and settings.images is not None:
        raise UserError("--measure needs images whose classes are known; leave --images out")
    if settings.measure_images is not None and not settings.measure:
        raise UserError("--measure_images has no effect without --measure")
    if settings.page and settings.images is not None:
        raise UserError("--page needs images whose classes are known; leave --images out")
    for name in ("measure", "format"):
        if settings.page and settings[name]:
            raise UserError(
                f"--{name} has no effect with --page, which writes only gallery.html; leave one of them out"
            )
    if settings.measure_images == 1:
        raise UserError("--measure_images 1 leaves no other image, whose gates are needed; use at least 2")


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Recipe and version of each checkpoint's run, or the file's name; checkpoints of one run add the file's name."""
    names = [_name_of(path) for path in paths]
    pairs = list(zip(names, paths, strict=True))
    return _number([f"{n}-{path.stem}" if names.count(n) > 1 and n != path.stem else n for n, path in pairs])


def _name_of(path: Path) -> str:
    if path.is_dir():
        return path.resolve().name
    run = run_of(path)
    return path.stem if run is None else f"{run.recipe}-version_{run.version}"


def _number(names: Sequence[str]) -> list[str]:
    unique: list[str] = []
    for name in names:
        candidates = [name, *(f"{name}-{number}" for number in range(2, len(names) + 1))]
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return unique


def _read_histories(loaded: Sequence[LoadedCheckpoint]) -> list[History]:
    runs = {one.logs.resolve(): one for one in loaded}
    histories = []
    for (logs, one), name in zip(runs.items(), _number([_name_of(one.path) for one in runs.values()]), strict=True):
        kind = one.content["hyper_parameters"]["attention"]["kind"]
        if history := read_history(logs, f"{name} ({kind})"):
            histories.append(history)
        else:
            print(f"{name}: no logs of its run were found, so there are no curves")
    return histories


def _read_test(loaded: LoadedCheckpoint) -> dict[str, Any]:
    """What `test` wrote of this checkpoint; empty without a test, or where that was of another one."""
    tested = read_result(loaded.logs, "test.json", loaded.content) or {}
    return tested if "reliability" in tested else {}


def _draw_reliability(tested: dict[str, Any], title: str) -> Figure:
    calibration = tested.get("calibration")
    figures = f"{tested['images']:,} test images: ECE {tested['measures']['ece']:.4f}"
    if calibration:
        figures += f"; {calibration['measures']['ece']:.4f} with temperature {calibration['temperature']:.3f}"
    after = calibration["reliability"] if calibration else None
    return drawing.draw_reliability(tested["reliability"], after, f"{title}\n{figures}")


def _measure(loaded: LoadedCheckpoint, title: str, images: Images, layer: str | None, path: Path) -> None:
    """Score the maps: write what is found, and print it."""
    inputs = loaded.normalise(images.pixels)
    rows = measure(loaded.network, inputs, images.labels, images.masks, loaded.batch_size, layer)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{title}, {len(images):,} test images:")
    print_scores(rows)
    print(path)


def _intervene(
    loaded: LoadedCheckpoint,
    title: str,
    images: Images,
    layer: str | None,
    folder: Path,
    prefix: str,
    file_format: str,
) -> list[str]:
    """Replace the gates and randomise the layers: write, draw and print what changes. Returns what cannot be made."""
    network, inputs = loaded.network, loaded.normalise(images.pixels)

    def save(name: str, result: dict[str, Any], figure: Figure) -> str:
        table, picture = folder / f"{prefix}{name}.json", folder / f"{prefix}{name}.{file_format}"
        table.write_text(json.dumps({"network": title, **result}, indent=2) + "\n")
        figure.savefig(picture)
        return f"{table}\n{picture}"

    failures = []
    try:
        ablation = ablate_gates(network, inputs, images.labels, loaded.batch_size)
    except ValueError as error:  # attention that is not its input times its gates
        failures.append(f"no {prefix}ablation.json: {error}")
        ablation = {"rows": []}
    if ablation["rows"]:
        paths = save("ablation", ablation, draw_ablation(ablation, f"Accuracy where gates are replaced\n{title}"))
        print(f"Gates replaced, {title}, {len(inputs):,} test images:")
        print_ablation(ablation)
        print(paths)
    elif not failures:
        print(f"{title}: this network has no gates, so there is no ablation of them")
    randomisation = cascading_randomisation(network, inputs[::RANDOMISED_EVERY], loaded.batch_size, layer=layer)
    heading = f"Similarity to the trained network's maps\n{title}"
    paths = save("randomisation", randomisation, draw_randomisation(randomisation, heading))
    print(f"Layers randomised, {title}, {randomisation['images']:,} test images:")
    print_randomisation(randomisation)
    print(paths)
    return failures
