"""Write a checkpoint as a folder to hand on: its weights, settings, and a card of what its run has measured.

python train.py export --ckpt_path checkpoints/x/version_0/best.ckpt --format safetensors --output weights/x
"""

import json
import shlex
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from lightning import Trainer
from scipy.special import log_softmax

from cbam_pl.data.datamodule import data_for_test
from cbam_pl.environment import describe_environment, environments_by_key
from cbam_pl.errors import UserError
from cbam_pl.inspect.calibration import NUM_BINS, measure_images
from cbam_pl.models.cost import count_parameters
from cbam_pl.training.callbacks import EvaluatedImages
from cbam_pl.training.checkpoint import load_classifier, network_name, read_checkpoint
from cbam_pl.training.run import Run, read_result, run_of
from cbam_pl.training.trainer import running
from cbam_pl.training.weights_folder import Precision, as_stored, check_free, write_folder

_HUB_DATA = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}  # their names on the Hugging Face Hub
_DATA = {
    "cifar10": "CIFAR-10 (Krizhevsky 2009): photographs of 32×32 pixels",
    "cifar100": "CIFAR-100 (Krizhevsky 2009): photographs of 32×32 pixels",
    "shapes": "shapes that the program draws itself",
    "folder": "a folder of images that is not part of the program",
}
_MEASURES = {
    "accuracy": "accuracy",
    "nll": "NLL, nats",
    "brier": "Brier score",
    "ece": f"expected calibration error, {NUM_BINS} bins",
    "top5": "top-5 accuracy",
}
_NOT_MEASURED = "not measured"


def write_pretrained(
    path: Path, output: Path, precision: Precision = "float32", trust: Sequence[str] = (), licence: str | None = None
) -> list[str]:
    """Write the network of a checkpoint, or of such a folder, into the folder `output`, with its card.

    All figures are read from the run's records: test.json, test.npz and robustness.json in its log folder, and
    report.json of comparisons at most two folders below its root. Where the run was tested, the network is tested again
    as it is written, rounded or not, if the test images can be had. What was not measured is called so.

    Args:
        precision: float16 halves the file: kernels and matrices are rounded, biases and batch norm are not.
        trust: packages of networks that the checkpoint may import.
        licence: of the weights, an identifier such as mit; whoever trained them decides it.

    Returns:
        Lines that say what was written.

    Raises:
        UserError: the checkpoint cannot be read, or the folder cannot be written or holds other files.
    """
    check_free(output)
    checkpoint = read_checkpoint(path)
    stored = {**checkpoint, "state_dict": as_stored(checkpoint["state_dict"], precision)}
    model = load_classifier(path, stored, trust=trust)
    run = run_of(path)
    record = read_record(path, checkpoint)
    record |= {"parameters": count_parameters(model.network), "licence": licence or record.get("licence")}
    record["stored"] = None
    if record["test"] is not None:
        predicted = _read_predictions(run) if "record" not in checkpoint else None
        record["stored"] = _measure(model, stored, predicted)
    card = _card(output, stored, precision, record)
    sizes = write_folder(output, stored, precision, record, card)
    return [
        f"{output}  {sum(sizes.values()) / 1e6:.2f} MB",
        *(f"  {name}  {size:,} bytes" for name, size in sorted(sizes.items())),
        *_summary(record),
    ]


# What is known of the run


def read_record(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The run's name and figures, as far as its files, or a folder of weights, have them and they are of this epoch."""
    if "record" in checkpoint:
        return checkpoint["record"]
    run = run_of(path)
    record: dict[str, Any] = {
        "recipe": None if run is None else run.recipe,
        "version": None if run is None else run.version,
        "seed": checkpoint["datamodule_hyper_parameters"].get("seed"),
        "date": time.strftime("%Y-%m-%d", time.gmtime(checkpoint["saved_at"])) if "saved_at" in checkpoint else None,
    }
    test, robustness = (
        None if run is None else read_result(run.logs, name, checkpoint) for name in ("test.json", "robustness.json")
    )
    try:
        if test is not None:
            figures = {"accuracy": test["test/acc"], **test.get("measures", {})}
            flip = test.get("test_time_flip")  # which earlier versions did not note
            test = {"figures": figures, **{name: test[name] for name in ("images", "options", "environment")}}
            test |= {} if flip is None else {"test_time_flip": flip}
        if robustness is not None:
            names = ("images", "seed", "accuracy", "mean", "options", "environment")
            robustness = {name: robustness[name] for name in names}
    except KeyError as error:
        logs = "" if run is None else f" in {run.logs}"
        raise UserError(f"test.json or robustness.json{logs} has no {error}; test the checkpoint again") from error
    return record | {"test": test, "robustness": robustness, "reports": [] if run is None else _find_reports(run)}


def _read_predictions(run: Run | None) -> np.ndarray | None:
    """The class (N,) that the run's test predicted for each test image."""
    if run is None:
        return None
    try:
        with (run.logs / "test.npz").open("rb") as stream, np.load(stream) as file:
            return file["predicted"]
    except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error):
        return None


def _find_reports(run: Run) -> list[dict[str, Any]]:
    """The comparisons that this run is part of: mean and standard deviation of its recipe over the seeds."""
    own = run.best.resolve()
    reports = []
    for file in sorted({*run.root.glob("*/report.json"), *run.root.glob("*/*/report.json")}):
        try:
            content = json.loads(file.read_text("utf-8"))
            for one in content["runs"]:
                # A run of the same name under another root is another run; a relative path began where compare ran.
                if own in (Path(one["checkpoint"]).resolve(), (run.root / one["checkpoint"]).resolve()):
                    seeds = [other["seed"] for other in content["runs"] if other["recipe"] == one["recipe"]]
                    accuracy = {key: content["recipes"][one["recipe"]]["test_acc"][key] for key in ("mean", "sd", "n")}
                    reports.append({"title": content["title"], "seeds": seeds, "test_acc": accuracy})
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another program's, or being written
    return reports


# The network as it is written


def _measure(model: Any, checkpoint: Mapping[str, Any], predicted: np.ndarray | None) -> dict[str, Any]:
    """Test a classifier as `test` does by default, and count the predictions that are not those of the run's test."""
    with running():
        data = data_for_test(checkpoint, {})
        try:
            data.prepare_data()
            data.setup("test")
        except UserError as error:
            return {"reason": str(error)}
        evaluated = EvaluatedImages()
        trainer = Trainer(
            devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[evaluated],
        )  # fmt: skip
        trainer.test(model, datamodule=data, verbose=False)
    logits, labels = evaluated.logits.double().numpy(), evaluated.labels.numpy()
    measures = measure_images(log_softmax(logits, axis=1), labels)
    classes = logits.argmax(1)
    same_images = predicted is not None and len(predicted) == len(classes)
    return {
        "images": len(labels),
        "figures": {
            "accuracy": float((classes == labels).mean()),
            **{name: float(values.mean()) for name, values in measures.items()},
        },
        "changed": int((classes != predicted).sum()) if same_images else None,
        "environment": describe_environment(trainer.strategy.root_device),
    }


def _summary(record: Mapping[str, Any]) -> list[str]:
    test, stored = record["test"], record["stored"]
    if test is None:
        return ["the run was not tested, so the card has no figures; run `test` first"]
    lines = [f"the run's test: accuracy {test['figures']['accuracy']:.4f} on {test['images']:,} images"]
    if "reason" in stored:
        return [*lines, f"as written: not measured ({stored['reason']})"]
    changed = "" if stored["changed"] is None else f", {stored['changed']} predictions differ"
    return [
        *lines,
        f"as written: accuracy {stored['figures']['accuracy']:.4f} on {stored['images']:,} images{changed}",
    ]


# The card


def _card(output: Path, checkpoint: Mapping[str, Any], precision: Precision, record: Mapping[str, Any]) -> str:
    """README.md, with the front matter that the Hugging Face Hub reads."""
    settings, data = checkpoint["hyper_parameters"], checkpoint["datamodule_hyper_parameters"]
    stored = record["stored"] if record["stored"] and "figures" in record["stored"] else None
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["shell"] = shlex.join
    return environment.from_string(Path(__file__).with_name("card.md.jinja").read_text("utf-8")).render(
        front_matter=yaml.safe_dump(_front_matter(output.name, data["dataset"], record, stored), sort_keys=False),
        name=output.name,
        folder="/".join(output.parts[-2:]) if output.is_absolute() else output.as_posix(),
        network=network_name(settings),
        attention=settings["attention"]["kind"],
        size=settings["image_size"],
        classes=checkpoint["ImageDataModule"]["classes"],
        data=_DATA[data["dataset"]],
        precision=precision,
        epoch=checkpoint["epoch"] + 1,
        val_acc=checkpoint["figures"].get("val/acc"),
        training=_training(checkpoint),
        rows=_figure_rows(record["test"], stored),
        stored=stored,
        reason=(record["stored"] or {}).get("reason"),
        flip=settings.get("test_time_flip", False),
        record={"rounded": False, **record},
    )


def _front_matter(
    name: str, dataset: str, record: Mapping[str, Any], stored: Mapping[str, Any] | None
) -> dict[str, Any]:
    matter: dict[str, Any] = {
        "license": record["licence"] or "unknown",
        "library_name": "cbam_pl",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "pytorch", "attention", "cbam_pl"],
    }
    if dataset in _HUB_DATA:
        matter["datasets"] = [_HUB_DATA[dataset]]
    if stored is not None:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": dataset, "type": _HUB_DATA.get(dataset, dataset), "split": "test"},
            "metrics": [{"type": "accuracy", "value": stored["figures"]["accuracy"]}],
        }
        matter |= {"metrics": ["accuracy"], "model-index": [{"name": name, "results": [result]}]}
    return matter


def _figure_rows(test: Mapping[str, Any] | None, stored: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """Measure, its value in the run's test, and with the weights as they are written."""
    measured = [one["figures"] for one in (test, stored) if one] or [_MEASURES.keys() - {"top5"}]
    names = [name for name in _MEASURES if any(name in figures for figures in measured)]
    return [(_MEASURES[name], _figure(test, name), _figure(stored, name)) for name in names]


def _figure(measured: Mapping[str, Any] | None, name: str) -> str:
    value = (measured or {"figures": {}})["figures"].get(name)
    return _NOT_MEASURED if value is None else f"{value:.4f}"


def _training(checkpoint: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the settings that the network was trained with."""
    data, conditions = checkpoint["datamodule_hyper_parameters"], checkpoint["run_conditions"]
    optimization, trained_on = checkpoint.get("optimization", {}), environments_by_key(checkpoint["environments"])
    factors = optimization.get("lr_factors", {})
    held_out = "a tenth, or the folder's own" if data["val_size"] is None else f"{data['val_size']:,}"
    rows = {
        "validation images, held out": held_out if data["val_size"] != 0 else "none: validated on the test images",
        "augmentation": data["augmentation"],
        "images per step": data["batch_size"]
        * conditions.get("processes", 1)
        * conditions.get("accumulate_grad_batches", 1),
        "epochs": conditions.get("max_epochs"),
        "precision": conditions.get("precision"),
        "label smoothing": checkpoint["hyper_parameters"]["label_smoothing"],
        "optimizer": _with_options("optimizer", optimization),
        "schedule": _with_options("lr_scheduler", optimization),
        "averaging of weights": conditions.get("averaging") if conditions.get("averaging") != "none" else None,
        "started from": checkpoint.get("started_from") or None,
        "frozen modules": ", ".join(optimization.get("freeze", [])) or None,
        "factors on the learning rate": ", ".join(f"{name} {factor}" for name, factor in factors.items()) or None,
        **{key: trained_on[key] for key in ("device", "versions", "commit")},
    }
    return [(name, str(value)) for name, value in rows.items() if value is not None]


def _with_options(name: str, optimization: Mapping[str, Any]) -> str | None:
    options = {key.partition(".")[2]: value for key, value in optimization.items() if key.startswith(f"{name}.")}
    given = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
    return f"{optimization[name]} ({given})" if given and optimization.get(name) else optimization.get(name)
