"""Measure a checkpoint on the test or the validation images: python train.py test"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning import Trainer
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from scipy.special import log_softmax

from cbam_pl.commands.robustness import CorrectPredictions, choose_conditions, decisive_options, measure_robustness
from cbam_pl.data.datamodule import ImageDataModule, as_trained, data_for_test, images_digest
from cbam_pl.environment import describe_environment
from cbam_pl.errors import UserError, as_user_error
from cbam_pl.inspect.calibration import fit_temperature, measure_images, reliability
from cbam_pl.settings import OWN_LIMIT, command_parser, given_data, parse, split_option
from cbam_pl.training.callbacks import EvaluatedImages
from cbam_pl.training.checkpoint import find_checkpoint, load_classifier
from cbam_pl.training.classifier import Classifier
from cbam_pl.training.logger import RunLogger
from cbam_pl.training.run import atomic_write, results_folder, write_text
from cbam_pl.training.trainer import evaluating_trainer, running

Split = Literal["test", "val"]


@dataclass(frozen=True)
class _Evaluation:
    """A checkpoint, and what measures it."""

    path: Path
    checkpoint: dict[str, Any]
    model: Classifier
    data: ImageDataModule
    trainer: Trainer
    seen: EvaluatedImages  # by the trainer
    logs: Path | None  # the folder of the results; None where none are written
    earlier: set[Path]  # event files of earlier tests at this epoch

    @property
    def epoch(self) -> int:
        """The checkpoint's, from 1."""
        return self.checkpoint["epoch"] + 1

    def measure(self, split: Split) -> dict[str, float]:
        """Loss and accuracy, also as a point in TensorBoard where results are written."""
        with running(self.logs):
            run = self.trainer.test if split == "test" else self.trainer.validate
            run(self.model, datamodule=self.data, verbose=False)
        figures = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
            _remove(_events(self.logs, self.epoch) - self.earlier)
            fix = "the network has diverged; choose an earlier checkpoint"
            raise UserError(f"{bad[0]} of {self.path} is not finite: {fix}")
        return figures


def evaluate(command: Literal["test", "validate"], options: list[str]) -> None:
    """Print how good a checkpoint is; of `test`, also write it into its log folder."""
    parser = command_parser(command)
    settings = parse(parser, options)
    root, given = Path(settings.trainer.default_root_dir), given_data(settings)
    path, checkpoint = find_checkpoint(root, settings.ckpt_path)
    if settings.trainer[limit := OWN_LIMIT[command]] == 0:
        raise UserError(f"trainer.{limit}={settings.trainer[limit]} evaluates no image; leave it out")
    calibrates, writes = settings.get("calibrate"), command == "test" and not settings.trainer.fast_dev_run
    with as_user_error():
        values = parser.instantiate(settings)
        if command == "validate" or calibrates:
            data = ImageDataModule(**as_trained(checkpoint, given))
            data.load_state_dict(checkpoint["ImageDataModule"])
        else:
            data = data_for_test(checkpoint, given)
        model = load_classifier(path, checkpoint, settings.model.test_time_flip, settings.trust)
        epoch, logs = checkpoint["epoch"] + 1, results_folder(path, root) if writes else None
        logger = None if logs is None else RunLogger(logs, _suffix(epoch))
        seen, correct = EvaluatedImages(), CorrectPredictions()
        trainer = evaluating_trainer(values.trainer, logger, [seen, correct])
        conditions = choose_conditions(settings, data.image_size)
    one = _Evaluation(path, checkpoint, model, data, trainer, seen, logs, _events(logs, epoch))

    calibration = _calibrate(one) if calibrates else {}
    split: Split = "test" if command == "test" else "val"
    figures = one.measure(split)
    tested = {
        "epoch": epoch,
        "step": checkpoint["global_step"],
        "saved_at": checkpoint.get("saved_at"),
        **figures,
        "options": decisive_options(split_option(options, "--ckpt_path")[1]),
    }
    if trainer.is_global_zero:
        described, arrays = _describe(seen, data.classes, calibration)
        if logs is not None:
            with running(logs):
                _write(one, logs, tested | described, arrays)
            if logger in trainer.loggers:
                _remove(one.earlier)  # testing again replaces the point
        _print(one, split, figures, described)
        if writes and logs is None:
            print(f"nothing is written, as {path} is in no folder checkpoints/RECIPE/version_N of a run with logs")
    # Last, so that a long measurement that is stopped loses nothing else.
    measure_robustness(trainer, model, data, conditions, correct, tested, logs)


def _suffix(epoch: int) -> str:
    return f".test-epoch{epoch}"


def _events(logs: Path | None, epoch: int) -> set[Path]:
    return set() if logs is None else {*logs.glob(f"events*{_suffix(epoch)}")}


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _calibrate(one: _Evaluation) -> dict[str, Any]:
    """The temperature that fits the validation images best, and how many they are."""
    if one.data.val_size == 0:
        raise UserError(
            f"--calibrate: {one.path} was trained with data.val_size=0, so all images that are not test images were "
            "trained on; leave it out, or train with validation images"
        )
    one.measure("val")
    temperature = fit_temperature(one.seen.logits.double().numpy(), one.seen.labels.numpy())
    return {"temperature": temperature, "images": len(one.seen.labels)}


def _write(one: _Evaluation, logs: Path, tested: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    record = {
        **tested,
        "images": one.model.num_evaluated,
        "test_time_flip": one.model.test_time_flip,
        "environment": describe_environment(one.trainer.strategy.root_device),
        "trained_on": one.checkpoint["environments"],
        "trained_images": images_digest(*map(one.checkpoint["ImageDataModule"].get, ("train_ids", "val_ids"))),
        "tested_images": images_digest(one.data.images("test").ids),
    }
    with atomic_write(logs / "test.npz") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)
    write_text(logs / "test.json", f"{json.dumps(record)}\n")


def _describe(
    seen: EvaluatedImages, classes: list[str], calibration: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What test.json says of the predictions, and the arrays of test.npz, a row for each image."""
    logits, labels = seen.logits.double().numpy(), seen.labels.numpy()
    log_probabilities = log_softmax(logits, axis=1)
    predicted = logits.argmax(1)
    confusion = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(confusion, (labels, predicted), 1)
    accuracies = [row[label] / sum(row) if sum(row) else None for label, row in enumerate(confusion.tolist())]
    measures = measure_images(log_probabilities, labels)
    record: dict[str, Any] = {
        "classes": classes,
        "confusion": confusion.tolist(),  # images by true class (rows) and predicted class
        "class_accuracy": dict(zip(classes, accuracies, strict=True)),
        **_summary(log_probabilities, labels, measures),
    }
    if calibration:
        scaled = log_softmax(logits / calibration["temperature"], axis=1)
        calibrated = measure_images(scaled, labels)
        record["calibration"] = calibration | _summary(scaled, labels, calibrated)
        measures |= {f"calibrated_{name}": values for name, values in calibrated.items()}
    arrays = {
        "image": seen.numbers.numpy().astype(np.int32),  # its number in the test split
        "label": labels.astype(np.int32),
        "predicted": predicted.astype(np.int32),
        "probabilities": np.exp(log_probabilities).astype(np.float16),  # (N, C)
        **{name: values.astype(np.float32) for name, values in measures.items()},
    }
    return record, arrays


def _summary(log_probabilities: np.ndarray, labels: np.ndarray, measures: dict[str, np.ndarray]) -> dict[str, Any]:
    means = {name: float(values.mean()) for name, values in measures.items()}
    return {"measures": means, "reliability": reliability(log_probabilities, labels)}


def _print(one: _Evaluation, split: Split, figures: dict[str, float], record: dict[str, Any]) -> None:
    count, total = one.model.num_evaluated, len(one.data.images(split))
    part = "" if count == total else f" of {total:,}"
    is_test = split == "val" and one.data.val_size == 0
    images = "test images, as data.val_size=0," if is_test else f"{split} images"
    print(f"{one.path}, epoch {one.epoch}, on {count:,}{part} {images} of {one.data.dataset}:")
    for name, value in figures.items():
        print(f"{name}  {value:.4f}")
    if split == "val":
        return
    calibration = record.get("calibration")
    if calibration:
        print(
            f"temperature  {calibration['temperature']:.4f}, fitted on {calibration['images']:,} validation images; "
            "the second figure is with it"
        )
    for name, value in record["measures"].items():
        after = f" → {calibration['measures'][name]:.4f}" if calibration else ""
        print(f"{name}  {value:.4f}{after}")
    print("accuracy by class:")
    known = {name: value for name, value in record["class_accuracy"].items() if value is not None}
    Console(highlight=False).print(Columns([escape(f"{name}  {value:.4f}") for name, value in known.items()]))


test, validate = partial(evaluate, "test"), partial(evaluate, "validate")
