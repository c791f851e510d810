"""Accuracy on corrupted test images: python train.py test --corruptions"""

import argparse
import difflib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from cbam_pl.data.corruptions import COMMON, CORRUPTIONS, EXTRA, SEVERITIES, check_size, corrupt
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.environment import describe_environment
from cbam_pl.errors import UserError
from cbam_pl.inspect.charts import draw_robustness
from cbam_pl.tables import print_table
from cbam_pl.training.classifier import Classifier
from cbam_pl.training.run import atomic_write, is_result_of, read_json, write_text
from cbam_pl.training.trainer import running

_FILE, _UNFINISHED = "robustness.json", "robustness.partial.json"
SEED = 0  # of the corruptions' random numbers: every network is tested on the same images
Accuracies = dict[str, dict[str, float]]  # corruption → severity → accuracy in [0, 1]


def find_corruptions(words: Sequence[str]) -> list[str]:
    """The corruptions that words name, in full or by an unambiguous beginning; of no words, all 19.

    Raises:
        UserError: an unknown or ambiguous word, with the nearest name, or a repeated one.
    """
    names = []
    for word in words:
        begun = [word] if word in CORRUPTIONS else [name for name in CORRUPTIONS if word and name.startswith(word)]
        if not begun:
            known = {name.partition("_")[0]: name for name in CORRUPTIONS} | {name: name for name in CORRUPTIONS}
            near = difflib.get_close_matches(word, known, 1)
            hint = f"did you mean {known[near[0]]}?" if near else f"use some of {', '.join(CORRUPTIONS)}"
            raise UserError(f"--corruptions {word} is unknown; {hint}")
        if len(begun) > 1:
            raise UserError(f"--corruptions {word} is ambiguous; use {' or '.join(begun)}")
        if begun[0] in names:
            raise UserError(f"--corruptions names {begun[0]} twice; name each once")
        names += begun
    return names or list(CORRUPTIONS)


def choose_conditions(settings: Any, image_size: int) -> list[tuple[str, int]]:
    """Corruption and severity of each pass over the test images that the settings of `test` ask for, if any.

    Raises:
        UserError: settings that cannot be used.
    """
    if settings.get("corruptions") is None:  # `validate` has no such setting
        if settings.get("severities") is not None:
            raise UserError("--severities has no effect without --corruptions")
        return []
    names = find_corruptions(settings.corruptions)
    severities = SEVERITIES if settings.severities is None else sorted(settings.severities)
    for severity in severities:
        if severity not in SEVERITIES:
            raise UserError(f"--severities {severity} is unknown; use some of {' '.join(map(str, SEVERITIES))}")
        if list(severities).count(severity) > 1:
            raise UserError(f"--severities names {severity} twice; name each once")
    limit = settings.trainer.limit_test_batches
    parts = {"limit_test_batches": limit} if limit not in (None, 1.0) or isinstance(limit, int) else {}
    parts |= {"fast_dev_run": settings.trainer.fast_dev_run} if settings.trainer.fast_dev_run else {}
    for name, value in parts.items():
        raise UserError(
            f"trainer.{name}={value} does not work with --corruptions, which tests all images; leave it out, and name "
            "fewer corruptions or --severities to save time"
        )
    check_size(image_size, image_size)
    return [(name, severity) for name in names for severity in severities]


def decisive_options(options: Sequence[str]) -> list[str]:
    """Options of `test` that decide its figures: without those that only add some, and without the default device."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--calibrate", action="store_true")
    for name in ("--corruptions", "--severities"):
        parser.add_argument(name, nargs="*")
    for name in ("--trainer.default_root_dir", "--trainer.enable_progress_bar"):
        parser.add_argument(name)
    parser.add_argument("--trainer.accelerator", dest="accelerator", default="auto")
    known, others = parser.parse_known_args(options)
    return others if known.accelerator == "auto" else ["--trainer.accelerator", known.accelerator, *others]


class CorrectPredictions(Callback):
    """Counts, over the batches of `trainer.predict`, images and those that are classified correctly."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from zero."""
        self.counts = torch.zeros(2, dtype=torch.int64, device=pl_module.device)  # correct, all

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        """Outputs: probabilities (B, classes); batch: images and labels (B,)."""
        correct = (outputs.argmax(1) == batch[1]).sum()
        self.counts += torch.stack((correct, torch.full_like(correct, len(batch[1]))))

    def accuracy(self, trainer: Trainer) -> float:
        """Over all processes, all of which must call this."""
        counts: Tensor = trainer.strategy.reduce(self.counts, reduce_op="sum")
        correct, count = counts.tolist()
        return correct / count


def measure_robustness(
    trainer: Trainer,
    model: Classifier,
    data: ImageDataModule,
    conditions: Sequence[tuple[str, int]],
    correct: CorrectPredictions,
    tested: Mapping[str, Any],
    logs: Path | None,
) -> None:
    """Test a classifier on the corrupted test images; print a table, and write robustness.json and .png.

    All processes take part. `correct` is among the trainer's callbacks; `tested` has the checkpoint's epoch and step,
    the figures of the images as they are, which `trainer` has measured before, and the options of that test. What the
    files have of the same test on other corruptions stays in them. What is measured is in robustness.partial.json until
    all of it is, so that a measurement that was stopped goes on where it was.
    """
    if not conditions:
        return
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.disable()  # a bar for all conditions instead of one for each
    record = _new_record(trainer, data, tested)
    earlier, begun = ({} if logs is None else read_robustness(logs, tested, name) for name in (_FILE, _UNFINISHED))
    known_earlier, known_begun = (
        one["accuracy"] if _is_repeatable(one, record) else Accuracies() for one in (earlier, begun)
    )
    known = trainer.strategy.broadcast(_merged(known_earlier, known_begun))
    accuracies: Accuracies = {name: {} for name, _ in conditions}
    console = Console(stderr=True, quiet=not trainer.is_global_zero)
    seconds = 0.0
    with running(logs), Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("corruptions", total=len(conditions))
        for name, row in accuracies.items():
            severities = [severity for one, severity in conditions if one == name]
            row |= {str(one): known[name][str(one)] for one in severities if str(one) in known.get(name, {})}
            new = [severity for severity in severities if str(severity) not in row]
            progress.advance(task, len(row))
            begin = time.monotonic()
            for severity in new:
                progress.update(task, description=f"{name} {severity}")
                change = partial(_corrupt, name, severity)
                trainer.predict(model, data.changed_test_dataloader(change), return_predictions=False)
                row[str(severity)] = correct.accuracy(trainer)
                progress.advance(task)
            seconds += (elapsed := time.monotonic() - begin)
            accuracies[name] = dict(sorted(row.items()))
            text = " ".join(f"{100 * value:.2f}" for value in accuracies[name].values())
            how = f"{elapsed:.0f} s" if new else "measured before"
            progress.console.print(f"{name}: {text} %  ({how})", highlight=False)
            record |= {"accuracy": {name: row for name, row in accuracies.items() if row}, "seconds": seconds}
            if logs is not None and trainer.is_global_zero:
                unfinished = record | {"accuracy": _merged(known_begun, record["accuracy"])}
                # An error of one process alone would leave the others waiting.
                with nullcontext() if trainer.world_size == 1 else suppress(OSError):
                    write_text(logs / _UNFINISHED, json.dumps(unfinished))
    if not trainer.is_global_zero:
        return
    _print(record)
    if logs is not None:
        with running(logs):
            written = _with_earlier(record, earlier)
            _write(logs, written)
            if _merged(known_begun, written["accuracy"]) == written["accuracy"]:
                (logs / _UNFINISHED).unlink(missing_ok=True)  # it has nothing of a longer measurement that was stopped


def _new_record(trainer: Trainer, data: ImageDataModule, tested: Mapping[str, Any]) -> dict[str, Any]:
    """What robustness.json says of the test, without what is measured."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "pillow"))
    return {
        **{name: tested.get(name) for name in ("epoch", "step", "saved_at", "test/acc", "options")},
        "images": len(data.images("test")),
        "seed": SEED,
        "environment": {**describe_environment(trainer.strategy.root_device), "libraries": libraries},
    }


def _write(logs: Path, record: dict[str, Any]) -> None:
    title = f"{logs.parent.name} {logs.name.replace('version_', 'version ')}, epoch {record['epoch']}\n"
    title += f"{100 * record['test/acc']:.1f} % without corruption"
    with atomic_write(logs / "robustness.png") as stream:
        draw_robustness(_rows(record), _columns(record), title).savefig(stream, format="png")
    write_text(logs / _FILE, f"{json.dumps(record | {'mean': means(record['accuracy'])})}\n")


def read_robustness(logs: Path, tested: Mapping[str, Any], name: str = _FILE) -> dict[str, Any]:
    """What robustness.json holds of the checkpoint that was `tested`, with the same options; empty if there is none."""
    record = read_json(logs / name)
    options, tested_options = (decisive_options(one.get("options", [])) for one in (record, tested))
    same = options == tested_options and record.get("seed") == SEED
    place = tested.get("epoch"), tested.get("step"), tested.get("saved_at")
    return record if same and is_result_of(record, *place) else {}


def _is_repeatable(earlier: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether another measurement would give the earlier one's figures: by the same machine and unchanged program."""
    commit = record["environment"]["commit"]
    return _is_same_test(earlier, record) and commit != "unknown" and not commit.endswith("-dirty")


def _is_same_test(*records: dict[str, Any]) -> bool:
    """Whether machine and program are the same, and as far as the accuracy without corruption tells, the images."""
    before, now = ({**one.get("environment", {}), "date": ""} for one in records)
    return before == now and all(records[0].get(name) == records[1][name] for name in ("images", "test/acc"))


def _with_earlier(record: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """A record with the accuracies of an earlier one, too, if that was measured by the same machine and program.

    And if all corruptions then have the same severities, which their means are over.
    """
    if not _is_same_test(earlier, record):
        return record
    both = _merged(earlier["accuracy"], record["accuracy"])
    if len({tuple(row) for row in both.values()}) > 1:
        return record
    return record | {"accuracy": both, "seconds": earlier["seconds"] + record["seconds"]}


def _merged(old: Accuracies, new: Accuracies) -> Accuracies:
    """The accuracies of both; the new one where both have it."""
    names = [name for name in CORRUPTIONS if name in old or name in new]
    return {name: dict(sorted({**old.get(name, {}), **new.get(name, {})}.items())) for name in names}


def _corrupt(name: str, severity: int, pixels: Tensor, indices: Tensor) -> Tensor:
    return corrupt(pixels, name, severity, indices.tolist(), SEED)


def means(accuracies: Accuracies) -> dict[str, float | None]:
    """The mean over the common corruptions that were measured, and over the extra ones; None where there are none."""
    found = {}
    for kind, names in (("common", COMMON), ("extra", EXTRA)):
        values = [value for name, row in accuracies.items() if name in names for value in row.values()]
        found[kind] = float(np.mean(values)) if values else None
    return found


def _rows(record: dict[str, Any]) -> list[tuple[str, list[float]]]:
    """Label, and accuracy in per cent by severity with the mean behind: of each corruption, and means of each kind."""
    rows = []
    for kind, names in (("common", COMMON), ("extra", EXTRA)):
        own = {name: list(row.values()) for name, row in record["accuracy"].items() if name in names}
        rows += list(own.items())
        if own:
            rows.append((f"mean of {len(own)} {kind}", np.mean(list(own.values()), axis=0).tolist()))
    return [(label, [100 * value for value in (*values, float(np.mean(values)))]) for label, values in rows]


def _columns(record: dict[str, Any]) -> list[str]:
    return [*next(iter(record["accuracy"].values())), "mean"]


def _print(record: dict[str, Any]) -> None:
    print(f"accuracy on corrupted test images, %; without corruption {100 * record['test/acc']:.2f}:")
    rows = ([label, *(f"{value:.2f}" for value in values)] for label, values in _rows(record))
    print_table(["severity", *_columns(record)], rows)
