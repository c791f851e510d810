"""Measure a checkpoint on the test or the validation images: python train.py test"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Literal

from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.environment import describe_environment
from cbam_pl.errors import UserError, as_user_error
from cbam_pl.settings import EVALUATION_DATA, command_parser, parse, split_option
from cbam_pl.training.checkpoint import find_checkpoint, load_classifier
from cbam_pl.training.logger import RunLogger
from cbam_pl.training.run import atomic_write, run_of
from cbam_pl.training.trainer import evaluating_trainer, running


def evaluate(command: Literal["test", "validate"], options: list[str]) -> None:
    """Print the loss and accuracy of a checkpoint; of `test`, also write them into its run's log folder."""
    parser = command_parser(command)
    names = parse(parser, options)
    path, checkpoint = find_checkpoint(Path(names.trainer.default_root_dir), names.ckpt_path)

    # What is not given here is as the checkpoint was trained with.
    saved = checkpoint["datamodule_hyper_parameters"]
    settings = parse(parser, options, {"data": {name: saved[name] for name in EVALUATION_DATA}})
    epoch = checkpoint["epoch"] + 1
    run = run_of(path)
    if command == "validate" or settings.trainer.fast_dev_run or (run is not None and not run.logs.is_dir()):
        run = None
    suffix = f".test-epoch{epoch}"
    earlier = [] if run is None else list(run.logs.glob(f"events*{suffix}"))
    with as_user_error():
        values = parser.instantiate(settings)
        data = ImageDataModule(**saved | dict(values.data))
        model = load_classifier(path, checkpoint, settings.model.test_time_flip, settings.trust)
        trainer = evaluating_trainer(values.trainer, None if run is None else RunLogger(run.logs, suffix))
    data.load_state_dict(checkpoint["ImageDataModule"])

    with running(run):
        (trainer.test if command == "test" else trainer.validate)(model, datamodule=data, verbose=False)
    counts = model.test_confusion.compute().tolist() if command == "test" else []  # all processes take part
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name, value in figures.items():
        if not math.isfinite(value):
            raise UserError(f"{name} of {path} is not finite: the network has diverged; choose an earlier checkpoint")
    if not trainer.is_global_zero:
        return
    if run is not None:
        record = {
            "epoch": epoch,
            "images": model.num_evaluated,
            **figures,
            "classes": data.classes,
            "confusion": counts,  # images by true class (rows) and predicted class
            "options": split_option(options, "--ckpt_path")[1],
            "environment": describe_environment(trainer.strategy.root_device),
        }
        with atomic_write(run.logs / "test.json") as stream:
            stream.write(f"{json.dumps(record)}\n".encode())
        for events in earlier:
            events.unlink(missing_ok=True)  # testing again replaces the point
    split: Literal["test", "val"] = "test" if command == "test" else "val"
    count, total = model.num_evaluated, len(data.images(split))
    part = "" if count == total else f" of {total:,}"
    print(f"{path}, epoch {epoch}, on {count:,}{part} {split} images of {data.dataset}:")
    for name, value in figures.items():
        print(f"{name}  {value:.4f}")


test, validate = partial(evaluate, "test"), partial(evaluate, "validate")
