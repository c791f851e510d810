"""The command line: `python train.py fit --config configs/cbam_cnn.yaml`, then `python train.py test`."""

import difflib
import io
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cbam_pl.command_options import COMMANDS, command_parser
from cbam_pl.errors import Interrupted, UserError, is_out_of_memory, refusals_are_mendable

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from lightning import Trainer

    from cbam_pl.data.datamodule import ImageDataModule
    from cbam_pl.training.classifier import Classifier
    from cbam_pl.training.run import Run

# Imports that take seconds stand inside the functions that need them, so that help and mistakes answer at once.


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 4
    lines = [f"  {name:<{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python train.py COMMAND [OPTIONS]",
            "",
            "Train, evaluate and inspect CIFAR attention networks.",
            "",
            "commands:",
            *lines,
            "",
            "options of a command: python train.py COMMAND --help",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Run a command and end the process: status 0 when done, 2 with one line for what the user can mend."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold bytes that are no text
    if arguments and arguments[0] in ("-h", "--help"):
        print(_overview())
        return
    try:
        if not arguments:
            raise UserError(f"no command given; use one of {', '.join(COMMANDS)} (python train.py --help)")
        command, *options = arguments
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMMANDS)}"
            raise UserError(f"unknown command {command!r}; {hint}")
        if command == "fit":
            fit(options)
        elif command == "predict":
            predict(options)
        elif command == "visualize":
            visualize(options)
        elif command == "compare":
            from cbam_pl.commands.compare.command import compare

            compare(options)
        else:
            evaluate(command, options)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        name = str(error.filename)
        name = name if len(name) <= 300 else f"{name[:300]}…"
        print(f"error: {error.strerror}: {name!r}", file=sys.stderr)  # such as a name that is too long
        sys.exit(2)
    except Interrupted as interruption:
        sys.exit(128 + interruption.number)
    except KeyboardInterrupt:
        print("interrupted before the first step; there is nothing to save", file=sys.stderr)
        sys.exit(130)


# Commands


def fit(options: list[str]) -> None:
    """Train a network, or resume its training."""
    from cbam_pl.settings import parse

    parser = command_parser("fit")
    settings = parse(parser, options)

    from lightning import seed_everything
    from lightning.fabric.utilities.rank_zero import _get_rank
    from lightning.pytorch.callbacks import LambdaCallback

    from cbam_pl.data.datamodule import ImageDataModule
    from cbam_pl.training.classifier import Classifier
    from cbam_pl.training.logger import RunLogger
    from cbam_pl.training.monitor import NetworkMonitor
    from cbam_pl.training.run import epochs_of, find_checkpoint, new_run, run_of, written_whole

    root, recipe = Path(settings.trainer.default_root_dir), _recipe(settings)
    with refusals_are_mendable():
        values = parser.instantiate(settings)
        monitor = NetworkMonitor(settings.pictures_every)
        seed_everything(settings.seed, verbose=False)
        data = ImageDataModule(**values.data, seed=settings.seed)
        model = Classifier(num_classes=data.num_classes, image_size=data.image_size, seed=settings.seed, **values.model)
        model.check_optimizers()
    first = not _get_rank()  # None or 0: the first process, or the one that will start the others
    run, checkpoint, checkpoint_path = None, None, None
    if settings.ckpt_path is not None:
        checkpoint_path, checkpoint = find_checkpoint(root, settings.ckpt_path, recipe)
        _refuse_other_settings(checkpoint_path, checkpoint, model, data)
        run = run_of(checkpoint_path)
        if _is_complete(checkpoint, values.trainer):
            if first:
                print(
                    f"nothing left to do: {checkpoint_path} has done {epochs_of(checkpoint)} epochs and "
                    f"{checkpoint['global_step']} steps; train further with --trainer.max_epochs"
                )
            return
    if first and run is None and not settings.trainer.fast_dev_run:
        run = new_run(root, recipe)
    lock = None
    try:
        if first and run is not None:
            lock = run.take()
        with refusals_are_mendable():
            trainer = _trainer(values.trainer, run, checkpoint, minutes=settings.checkpoint_minutes)
            trainer.callbacks.insert(0, monitor)  # type: ignore[attr-defined]
        if first:
            # Data comes last, since it may take long to load: a mistake in the settings is told at once.
            data.prepare_data()
            data.setup()
        if trainer.is_global_zero:
            _print_summary(model, data, trainer, run)
            if checkpoint is not None:
                _print_differences(checkpoint, model, data, trainer)
            if run is not None and trainer.loggers:
                settings.ckpt_path = None
                text, file = parser.dump(settings), run.logs / "config.yaml"

                def begin(trainer: "Trainer", *_: object) -> None:
                    """Change what is there, once nothing can be refused any more; a run without config.yaml is none."""
                    with written_whole(file) as stream:
                        stream.write(text.encode())
                    for logger in trainer.loggers:
                        if isinstance(logger, RunLogger):
                            logger.go_on()

                trainer.callbacks.insert(0, LambdaCallback(on_train_start=begin))  # type: ignore[attr-defined]
        with _refusals_of_lightning_are_mendable(run):
            trainer.fit(model, data, ckpt_path=checkpoint_path, weights_only=True)
    except Interrupted as interruption:
        if trainer.is_global_zero and run is not None:
            again = [*_without(options, "--ckpt_path"), "--ckpt_path", str(run.checkpoints / "last.ckpt")]
            print(f"{interruption}; the state is saved", file=sys.stderr)
            print(f"resume: python train.py fit {shlex.join(again)}", file=sys.stderr)
        raise
    finally:
        if run is not None:
            run.discard_if_unused()
        if lock is not None:
            lock.release()
    if trainer.is_global_zero and run is not None:
        _print_outcome(run)


def evaluate(command: str, options: list[str]) -> None:
    """Measure a checkpoint on the test or the validation images."""
    from cbam_pl.settings import parse

    parser = command_parser(command)
    path, checkpoint = _chosen_checkpoint(parse(parser, options))
    saved = checkpoint["datamodule_hyper_parameters"]
    settings = parse(parser, options, {f"data.{name}": saved[name] for name in saved if name != "seed"})

    from cbam_pl.data.datamodule import ImageDataModule
    from cbam_pl.training.classifier import Classifier
    from cbam_pl.training.run import run_of, write_test

    with refusals_are_mendable():
        values = parser.instantiate(settings)
        data = ImageDataModule(**values.data, seed=saved["seed"])
        model = Classifier.of_checkpoint(checkpoint, settings.model.test_time_flip)
        run = run_of(path) if command == "test" else None
        epoch = checkpoint["epoch"] + 1
        earlier = [] if run is None else list(run.logs.glob(f"events*{_test_suffix(epoch)}"))
        trainer = _trainer(values.trainer, run, tested_epoch=epoch)
    data.load_state_dict(checkpoint["ImageDataModule"])
    with _refusals_of_lightning_are_mendable(run):
        measure = trainer.test if command == "test" else trainer.validate
        measure(model, datamodule=data, verbose=False)
    counts = model.test_confusion.compute().tolist() if command == "test" else []  # all processes take part
    if run is not None and run.logs.is_dir() and trainer.is_global_zero:
        write_test(run, checkpoint, data.classes, trainer, counts, _without(options, "--ckpt_path"))
        for events in earlier:
            events.unlink(missing_ok=True)  # testing again replaces the point
    if trainer.is_global_zero:
        split: Literal["test", "val"] = "test" if command == "test" else "val"
        count = len(data.images(split))
        print(f"{path}, epoch {checkpoint['epoch'] + 1}, on {count:,} {split} images of {data.dataset}:")
        for name, value in trainer.callback_metrics.items():
            print(f"{name}  {value:.4f}")


def predict(options: list[str]) -> None:
    """Classify the user's own images with a checkpoint, as a table and a CSV file."""
    from cbam_pl.settings import parse

    parser = command_parser("predict")
    settings = parse(parser, options)
    _, checkpoint = _chosen_checkpoint(settings)

    import csv

    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from cbam_pl.data.folder import decode, find_images, show
    from cbam_pl.data.images import Images
    from cbam_pl.data.loader import EvaluationLoader, Normalise, Share
    from cbam_pl.training.classifier import Classifier

    data = checkpoint["ImageDataModule"]
    top = min(settings.top, len(data["classes"]))
    with refusals_are_mendable():
        values = parser.instantiate(settings)
        model = Classifier.of_checkpoint(checkpoint, settings.model.test_time_flip)
        trainer = _trainer(values.trainer, None, tested_epoch=checkpoint["epoch"] + 1)
    files = find_images(settings.images)
    print(f"decoding {len(files):,} images")
    pixels = torch.stack([decode(file, checkpoint["hyper_parameters"]["image_size"]) for file in files])
    images = Images(pixels, torch.zeros(len(files), dtype=torch.int64))
    device = trainer.strategy.root_device
    loader = EvaluationLoader(images, 256, Normalise(data["mean"], data["std"], device), device, Share())
    with _refusals_of_lightning_are_mendable():
        batches: Any = trainer.predict(model, loader)
    probabilities, labels = torch.cat(batches).cpu().topk(top)  # (N, top)

    table = Table("image", *("class", "probability") * top)
    rows = []
    for file, row_probabilities, row_labels in zip(files, probabilities.tolist(), labels.tolist(), strict=True):
        row = [str(file)]
        for probability, label in zip(row_probabilities, row_labels, strict=True):
            row += [data["classes"][label], f"{probability:.4f}"]
        rows.append(row)
        table.add_row(*map(escape, (show(file), *row[1:])))  # a name may look like rich's markup
    Console().print(table)
    try:
        with open(settings.output, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            writer = csv.writer(stream)
            ranks = range(1, top + 1)
            writer.writerow(["image", *(f"{name}_{rank}" for rank in ranks for name in ("class", "probability"))])
            writer.writerows(rows)
    except OSError as error:
        raise UserError(
            f"cannot write {settings.output} ({error.strerror}); name another file with --output"
        ) from error
    print(f"saved {settings.output}")


def visualize(options: list[str]) -> None:
    """Draw what one checkpoint or several see, and print the pictures' paths."""
    from dataclasses import fields

    from cbam_pl.settings import parse

    parser = command_parser("visualize")
    settings = parse(parser, options)

    from cbam_pl.commands.visualize import Choice, Subject, draw
    from cbam_pl.training.run import find_checkpoint

    root = Path(settings.trainer.default_root_dir)
    subjects = []
    for name in settings.ckpt_path:
        path, checkpoint = find_checkpoint(root, name)
        saved = checkpoint["datamodule_hyper_parameters"]
        # What is not given here is as the checkpoint was trained with.
        given = parse(parser, options, {f"data.{key}": saved[key] for key in saved if key != "seed"})
        subjects.append(Subject(path, checkpoint, {**given.data, "seed": saved["seed"]}))
    choice = Choice(**{field.name: settings[field.name] for field in fields(Choice)})
    with refusals_are_mendable():
        draw(subjects, choice, settings.output, settings.format, settings.measure)


# What the commands share


@contextmanager
def _refusals_of_lightning_are_mendable(run: "Run | None" = None) -> Iterator[None]:
    """Turn what is refused only when Lightning runs - a setting, memory, the disk - into a UserError.

    Args:
        run: the run whose logs are written.
    """
    import errno
    import threading

    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from torch.jit import TracingCheckError

    from cbam_pl.training.run import cannot_write

    no_memory = UserError(
        "out of memory; lower data.batch_size, and raise trainer.accumulate_grad_batches to keep the number of images "
        "per step"
    )
    of_the_disk = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
    hook = threading.excepthook
    # TensorBoard writes in a thread of its own, and raises what that meets in this one, too, at the next event.
    threading.excepthook = lambda met: None if isinstance(met.exc_value, OSError) else hook(met)
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        raise UserError(f"trainer.{' '.join(str(error).replace('`', '').split())}") from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise no_memory from error
        if run is None or error.errno not in of_the_disk:
            raise
        raise cannot_write(Path(error.filename or run.logs), str(error.strerror)) from error
    except (RuntimeError, MemoryError, TracingCheckError) as error:  # the last one from the graph's second tracing
        if str(error).startswith("Early stopping conditioned on metric"):
            raise UserError(f"trainer.callbacks: {error}") from error
        if is_out_of_memory(error):
            raise no_memory from error
        raise
    finally:
        threading.excepthook = hook


def _without(options: list[str], name: str) -> list[str]:
    """Options without one of them and its value."""
    kept = []
    words = iter(options)
    for word in words:
        if word == name:
            next(words, None)
        elif not word.startswith(f"{name}="):
            kept.append(word)
    return kept


def _recipe(settings: "Namespace") -> str:
    """Name of the configuration file without .yaml; a saved config.yaml has that of its run."""
    if not settings.config:
        return "default"
    path = Path(str(settings.config[0])).absolute()
    if path.name == "config.yaml" and path.parent.name.startswith("version_"):
        return path.parents[1].name
    return path.stem


def _chosen_checkpoint(settings: "Namespace") -> "tuple[Path, dict[str, Any]]":
    """The checkpoint that --ckpt_path names, and what it holds."""
    from cbam_pl.training.run import find_checkpoint

    return find_checkpoint(Path(settings.trainer.default_root_dir), settings.ckpt_path)


def _refuse_other_settings(
    path: Path, checkpoint: dict[str, Any], model: "Classifier", data: "ImageDataModule"
) -> None:
    """Refuse to resume with another network, optimizer, schedule or other data than the checkpoint's.

    Raises:
        UserError: with the keys that differ.
    """
    differing = []
    for group, ours, saved in (
        ("model", model.hparams, checkpoint["hyper_parameters"]),
        # Its own state, which the checkpoint restores, would otherwise win without a word.
        ("model", model.optimization, checkpoint.get("optimization", model.optimization)),
        ("data", data.hparams, checkpoint["datamodule_hyper_parameters"]),
    ):
        for name in sorted(ours.keys() | saved.keys()):
            owner = name.partition(".")[0]
            if owner != name and ours.get(owner) != saved.get(owner):
                continue  # another optimizer has other options, of course
            if name != "root" and ours.get(name) != saved.get(name):
                differing.append(f"{group}.{name} ({saved.get(name)} there, {ours.get(name)} here)")
    if differing:
        raise UserError(f"{path} was trained with other settings: {'; '.join(differing)}; resume with its own")


def _is_complete(checkpoint: dict[str, Any], settings: "Namespace") -> bool:
    """Whether the trainer's settings leave nothing to train."""
    from cbam_pl.training.run import epochs_of

    limits = ((settings.max_epochs, epochs_of(checkpoint)), (settings.max_steps, checkpoint["global_step"]))
    return any(limit is not None and 0 <= limit <= done for limit, done in limits)


def _print_differences(
    checkpoint: dict[str, Any], model: "Classifier", data: "ImageDataModule", trainer: "Trainer"
) -> None:
    """Where the training goes on, and what is allowed to differ from before."""
    from cbam_pl.training.classifier import trained_with
    from cbam_pl.training.run import epochs_of

    print(f"resumed      after {epochs_of(checkpoint)} epochs, {checkpoint['global_step']} steps")
    here = trained_with(trainer)
    there = checkpoint.get("trained_with", here)
    notes = {
        "processes": f"; a step takes {there['processes'] * data.batch_size} images there, "
        f"{here['processes'] * data.batch_size} here"
    }
    if model.fits_schedule:
        notes["max_epochs"] = "; the schedule is stretched to its end"
    for name, value in here.items():
        if there[name] != value:
            print(f"differs      {name}: {there[name]} there, {value} here{notes.get(name, '')}")


def _test_suffix(epoch: int) -> str:
    """Of the event file that holds the test of an epoch's checkpoint."""
    return f".test-epoch{epoch}"


def _trainer(
    settings: "Namespace",
    run: "Run | None",
    resumed: dict[str, Any] | None = None,
    minutes: float | None = None,
    tested_epoch: int | None = None,
) -> "Trainer":
    """Lightning's Trainer with the run's logger, checkpoints and progress bar, unless the settings say otherwise."""
    import logging
    import os
    import warnings

    import torch
    from lightning import Trainer

    from cbam_pl.memory import keep_freed_memory
    from cbam_pl.training.callbacks import RunCheckpoint, Safeguard, TrainingProgress
    from cbam_pl.training.logger import RunLogger
    from cbam_pl.training.run import AtomicCheckpointIO

    # Its tips and device lists; the summary says what matters. Warnings and errors stay.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning 2.6 uses what torch 2.14 deprecates.
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)
    # A resumed run's folder is meant to hold its checkpoints.
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty", UserWarning)
    keep_freed_memory()
    if not torch.cuda.is_available():
        # Lightning sets it for the sake of forked processes. With it, where there is no GPU, torch 2.14 looks for
        # NVIDIA's library at every optimizer step, which takes as long as the rest of a small network's update.
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    options = dict(**settings)
    callbacks = options["callbacks"] or []
    options["callbacks"] = callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
    if options["enable_progress_bar"] is not False:
        callbacks.append(TrainingProgress())
    if options["logger"] is None or options["logger"] is True:
        options["logger"] = False
        if run is not None:
            suffix = "" if tested_epoch is None else _test_suffix(tested_epoch)
            options["logger"] = RunLogger(run.logs, suffix, resumed)
    if tested_epoch is not None or options["enable_checkpointing"] is False:
        options["enable_checkpointing"] = False
    else:
        folder = None if run is None else run.checkpoints  # the first process's folder is everyone's
        checkpoint = partial(RunCheckpoint, folder, save_on_train_epoch_end=True, enable_version_counter=False)
        # In this order last.ckpt knows of the best.
        last = checkpoint(filename="last")
        callbacks += [checkpoint(filename="best", monitor="val/acc", mode="max"), last]
        if minutes is not None:
            callbacks.append(Safeguard(last, minutes))
    plugins = options["plugins"] or []
    options["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
    try:
        return Trainer(**options)
    except (ImportError, RuntimeError, TypeError) as error:  # beside ValueError and its own, which the callers catch
        raise UserError(f"the trainer's settings do not fit together or this machine: {error}") from error


def _print_summary(model: "Classifier", data: "ImageDataModule", trainer: "Trainer", run: "Run | None") -> None:
    """What is trained, on what, where, and what it writes."""
    from cbam_pl.models.cost import count_flops, count_parameters

    size = data.image_size
    megaflops = count_flops(model.network, (3, size, size)) / 1e6
    train, val = len(data.images("train")), len(data.images("val"))
    lines = [
        f"network      {model.hparams['arch']}, attention {model.hparams['attention']['kind']}",
        f"cost         {count_parameters(model.network):,} parameters; {megaflops:,.1f} MFLOPs per image, where a "
        "multiplication and an addition are two",
        f"data         {data.dataset}: {train:,} training and {val:,} validation images of {size}×{size}, "
        f"{data.num_classes} classes",
        f"device       {trainer.strategy.root_device}, precision {trainer.precision}, processes {trainer.world_size}",
    ]
    if run is not None:
        lines += [f"checkpoints  {run.checkpoints}", f"logs         {run.logs}  (tensorboard --logdir logs)"]
    print("\n".join(lines))


def _print_outcome(run: "Run") -> None:
    """The best epoch, its figures, and the command that tests it."""
    from cbam_pl.training.run import read_checkpoint

    best = run.checkpoints / "best.ckpt"
    if not best.exists():
        return
    checkpoint = read_checkpoint(best)
    loss, acc = checkpoint["figures"]["val/loss"], checkpoint["figures"]["val/acc"]
    print(f"best epoch   {checkpoint['epoch'] + 1}: val/loss {loss:.4f}, val/acc {acc:.4f}")
    print(f"test it      python train.py test --ckpt_path {best}")
