"""Measure a checkpoint on the test or the validation images: python train.py test"""

import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from scipy.special import log_softmax

from cbam_pl.commands.robustness import CorrectPredictions, choose_conditions, decisive_options, measure_robustness
from cbam_pl.data.datamodule import ImageDataModule, data_for_test, images_digest
from cbam_pl.environment import describe_environment
from cbam_pl.errors import UserError, as_user_error
from cbam_pl.inspect.calibration import fit_temperature, measure_images, reliability
from cbam_pl.settings import EVALUATION_DATA, OWN_LIMIT, command_parser, parse, split_option
from cbam_pl.training.callbacks import EvaluatedImages
from cbam_pl.training.checkpoint import find_checkpoint, load_classifier
from cbam_pl.training.logger import RunLogger
from cbam_pl.training.run import atomic_write, results_folder
from cbam_pl.training.trainer import evaluating_trainer, running


def evaluate(command: Literal["test", "validate"], options: list[str]) -> None:
    """Print how good a checkpoint is; of `test`, also write it into its log folder."""
    parser = command_parser(command)
    names = parse(parser, options)
    root = Path(names.trainer.default_root_dir)
    path, checkpoint = find_checkpoint(root, names.ckpt_path)

    # What is not given here is as the checkpoint was trained with.
    saved = checkpoint["datamodule_hyper_parameters"]
    settings = parse(parser, options, {"data": {name: saved[name] for name in EVALUATION_DATA}})
    epoch = checkpoint["epoch"] + 1
    writes = command == "test" and not settings.trainer.fast_dev_run
    logs = results_folder(path, root) if writes else None
    suffix = f".test-epoch{epoch}"
    earlier = [] if logs is None else list(logs.glob(f"events*{suffix}"))
    evaluated, correct = EvaluatedImages(), CorrectPredictions()
    if settings.trainer[limit := OWN_LIMIT[command]] == 0:
        raise UserError(f"trainer.{limit}={settings.trainer[limit]} evaluates no image; leave it out")
    validates = command == "validate" or settings.calibrate
    with as_user_error():
        values = parser.instantiate(settings)
        if validates:
            data = ImageDataModule(**saved | dict(values.data))
            data.load_state_dict(checkpoint["ImageDataModule"])
        else:
            data = data_for_test(checkpoint, dict(values.data))
        model = load_classifier(path, checkpoint, settings.model.test_time_flip, settings.trust)
        logger = None if logs is None else RunLogger(logs, suffix)
        trainer = evaluating_trainer(values.trainer, logger, [evaluated, correct])
        conditions = choose_conditions(settings, data.image_size)

    def measure(split: Literal["test", "val"]) -> dict[str, float]:
        with running(logs):
            (trainer.test if split == "test" else trainer.validate)(model, datamodule=data, verbose=False)
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
            _remove_events(set() if logs is None else {*logs.glob(f"events*{suffix}")} - {*earlier})
            fix = "the network has diverged; choose an earlier checkpoint"
            raise UserError(f"{bad[0]} of {path} is not finite: {fix}")
        return figures

    calibration: dict[str, Any] = {}
    if command == "test" and settings.calibrate:
        if data.val_size == 0:
            raise UserError(
                f"--calibrate: {path} was trained with data.val_size=0, so all images that are not test images were "
                "trained on; leave it out, or train with validation images"
            )
        measure("val")
        temperature = fit_temperature(evaluated.logits.double().numpy(), evaluated.labels.numpy())
        calibration = {"temperature": temperature, "images": len(evaluated.labels)}
    split: Literal["test", "val"] = "test" if command == "test" else "val"
    figures = measure(split)
    options = decisive_options(split_option(options, "--ckpt_path")[1])
    tested = {"epoch": epoch, "step": checkpoint["global_step"], "saved_at": checkpoint.get("saved_at"), **figures}
    if trainer.is_global_zero:
        count, total = model.num_evaluated, len(data.images(split))
        described, arrays = _describe(evaluated, data.classes, calibration)
        if logs is not None:
            record = {
                **tested,
                "images": count,
                **described,
                "options": options,
                "environment": describe_environment(trainer.strategy.root_device),
                "trained_on": checkpoint["environments"],
                "trained_images": images_digest(checkpoint["ImageDataModule"]),
            }
            with atomic_write(logs / "test.npz") as stream:
                np.savez_compressed(stream, allow_pickle=False, **arrays)
            with atomic_write(logs / "test.json") as stream:
                stream.write(f"{json.dumps(record)}\n".encode())
            _remove_events(earlier)  # testing again replaces the point
        part = "" if count == total else f" of {total:,}"
        images = "test images, as data.val_size=0," if split == "val" and data.val_size == 0 else f"{split} images"
        print(f"{path}, epoch {epoch}, on {count:,}{part} {images} of {data.dataset}:")
        for name, value in figures.items():
            print(f"{name}  {value:.4f}")
        if command == "test":
            _print(described)
    # Last, so that a long measurement that is stopped loses nothing else.
    measure_robustness(trainer, model, data, conditions, correct, {**tested, "options": options}, logs)


def _remove_events(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _describe(
    evaluated: EvaluatedImages, classes: list[str], calibration: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What test.json says of the predictions, and the arrays of test.npz, a row for each image."""
    logits, labels = evaluated.logits.double().numpy(), evaluated.labels.numpy()
    log_probabilities = log_softmax(logits, axis=1)
    predicted = logits.argmax(1)
    confusion = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(confusion, (labels, predicted), 1)
    accuracies = [row[label] / sum(row) if sum(row) else None for label, row in enumerate(confusion.tolist())]
    record: dict[str, Any] = {
        "classes": classes,
        "confusion": confusion.tolist(),  # images by true class (rows) and predicted class
        "class_accuracy": dict(zip(classes, accuracies, strict=True)),
        **_summary(log_probabilities, labels),
    }
    measures = measure_images(log_probabilities, labels)
    if calibration:
        scaled = log_softmax(logits / calibration["temperature"], axis=1)
        record["calibration"] = calibration | _summary(scaled, labels)
        measures |= {f"calibrated_{name}": values for name, values in measure_images(scaled, labels).items()}
    arrays = {
        "image": evaluated.numbers.numpy().astype(np.int32),  # its number in the test split
        "label": labels.astype(np.int32),
        "predicted": predicted.astype(np.int32),
        "probabilities": np.exp(log_probabilities).astype(np.float16),  # (N, C)
        **{name: values.astype(np.float32) for name, values in measures.items()},
    }
    return record, arrays


def _summary(log_probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    measures = {name: float(values.mean()) for name, values in measure_images(log_probabilities, labels).items()}
    return {"measures": measures, "reliability": reliability(log_probabilities, labels)}


def _print(record: dict[str, Any]) -> None:
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
