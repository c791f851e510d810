"""Classify your own images with a checkpoint: python train.py predict --images FILE_OR_FOLDER ..."""

import csv
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cbam_pl.data.datamodule import in_proportion
from cbam_pl.data.folder import decode, find_images, raise_failures, show
from cbam_pl.data.images import Images
from cbam_pl.data.loader import EvaluationLoader, Normalise, Shard
from cbam_pl.errors import UserError, as_user_error, cannot_write
from cbam_pl.settings import command_parser, parse
from cbam_pl.training.checkpoint import find_checkpoint, load_classifier
from cbam_pl.training.trainer import evaluating_trainer, running

_MAX_BATCH_SIZE = 256
_MAX_DECODED = 4096  # images in memory at once: 0.6 GB at 224 pixels


def predict(options: list[str]) -> None:
    """Print the most probable classes of each image, and write them to a CSV file, by the command line's options."""
    parser = command_parser("predict")
    settings = parse(parser, options)
    path, checkpoint = find_checkpoint(Path(settings.trainer.default_root_dir), settings.ckpt_path)
    with as_user_error():
        model = load_classifier(path, checkpoint, settings.model.test_time_flip, settings.trust)
        trainer = evaluating_trainer(parser.instantiate(settings).trainer)
    if trainer.world_size > 1:
        raise UserError("predict works in one process; leave trainer.devices, num_nodes and strategy out")

    files = find_images(settings.images)
    if Path(settings.output).resolve() in {file.resolve() for file in files}:
        raise UserError(f"--output {settings.output} is one of the images; name another file")
    _check_output(Path(settings.output))
    print(f"decoding {len(files):,} images")
    size = checkpoint["hyper_parameters"]["image_size"]
    proportional = in_proportion(checkpoint["datamodule_hyper_parameters"])
    data, device = checkpoint["ImageDataModule"], trainer.strategy.root_device
    # No more than `test` takes at once, whose memory the network was trained in.
    batch_size = min(_MAX_BATCH_SIZE, 4 * checkpoint["datamodule_hyper_parameters"]["batch_size"])
    normalise = Normalise(data["mean"], data["std"], device)
    batches: list[Any] = []
    decoded: list[Path] = []
    failures: list[str] = []
    for start in range(0, len(files), _MAX_DECODED):
        pixels = []
        for file in files[start : start + _MAX_DECODED]:
            try:
                pixels.append(decode(file, size, proportional))
                decoded.append(file)
            except UserError as error:  # raised in the end, since the others are worth their figures
                failures.append(str(error))
        if not pixels:
            continue
        images = Images(torch.stack(pixels), torch.zeros(len(pixels), dtype=torch.int64))
        with running(less_memory="give fewer --images at once"):
            batches += trainer.predict(model, EvaluationLoader(images, batch_size, normalise, device, Shard())) or []
    if not decoded:
        raise_failures(failures)
    probabilities = torch.cat(batches).cpu()  # (N, classes)
    if not probabilities.isfinite().all():
        raise UserError(f"{path} gives probabilities that are not finite: it has diverged; choose an earlier one")

    classes = data["classes"]
    top = min(settings.top, len(classes))
    rows = []
    for file, values, labels in zip(decoded, *map(torch.Tensor.tolist, probabilities.topk(top)), strict=True):
        pairs = zip(labels, values, strict=True)
        rows.append([str(file), *(text for label, value in pairs for text in (classes[label], f"{value:.4f}"))])
    try:
        with open(settings.output, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            writer = csv.writer(stream)
            ranks = range(1, top + 1)
            writer.writerow(["image", *(f"{name}_{rank}" for rank in ranks for name in ("class", "probability"))])
            writer.writerows(rows)
    except OSError as error:
        raise cannot_write(settings.output, error, "name another file with --output") from error
    table = Table(Column("image", overflow="fold"), *(f"{rank}" for rank in range(1, top + 1)))
    for file, (_, *texts) in zip(decoded, rows, strict=True):
        cells = [f"{name} {probability}" for name, probability in zip(texts[::2], texts[1::2], strict=True)]
        table.add_row(*map(escape, (show(file), *cells)))  # a name may look like rich's markup
    Console().print(table)
    print(f"saved {settings.output}")
    raise_failures(failures)


def _check_output(output: Path) -> None:
    """Reject a file that cannot be written before the images are decoded."""
    is_new = not output.exists()
    try:
        output.open("ab").close()
    except OSError as error:
        raise cannot_write(output, error, "name another file with --output") from error
    if is_new:
        output.resolve().unlink()  # resolved, since it may be a link to a file that is not there yet
