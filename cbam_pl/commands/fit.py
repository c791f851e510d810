"""Train a network, or resume its training: python train.py fit --config configs/cbam_cnn.yaml"""

import shlex
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities import rank_zero_only

from cbam_pl.cli import PROGRAM
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.errors import Interrupted, UserError, as_user_error
from cbam_pl.inspect.monitor import NetworkMonitor
from cbam_pl.models.cost import count_flops, count_parameters
from cbam_pl.settings import command_parser, make_training, parse_with_recipes, split_option
from cbam_pl.training.callbacks import RunCheckpoint
from cbam_pl.training.checkpoint import (
    check_same_settings,
    find_checkpoint,
    network_name,
    read_checkpoint,
    reason_to_stop,
    save_final_checkpoint,
)
from cbam_pl.training.classifier import Classifier
from cbam_pl.training.logger import RunLogger
from cbam_pl.training.run import RESUMED, Run, new_run, run_of, write_text
from cbam_pl.training.schema import completed_epochs
from cbam_pl.training.state import differences, lasting_changes
from cbam_pl.training.trainer import running, training_trainer


def fit(options: list[str]) -> None:
    """Train, from nothing or from a checkpoint, as the words of the command line after `fit` say."""
    parser = command_parser("fit")
    settings = parse_with_recipes(parser, options)
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]  # also before Lightning starts the others
    is_first = rank == 0
    with as_user_error():
        values = parser.instantiate(settings)

    # The checkpoint that is named, with its run; else a new run, which the first process alone knows.
    root, recipe = Path(settings.trainer.default_root_dir), recipe_name(settings.config)
    path, checkpoint, run = None, None, None
    if settings.ckpt_path is not None:
        if settings.trainer.fast_dev_run:
            raise UserError("trainer.fast_dev_run tries a new training; leave it out, or --ckpt_path")
        path, checkpoint = find_checkpoint(root, settings.ckpt_path, recipe)
        attention, saved = values.model.attention, checkpoint["hyper_parameters"]["attention"]
        if attention.start is None and attention.kind == saved["kind"]:  # its file of weights may be gone
            with as_user_error():
                values.model.attention = replace(attention, start=saved.get("start"))
    with as_user_error():
        seed_everything(settings.seed, verbose=False)
        model, data = make_training(values, settings.seed)
        model.make_optimizer()  # so that a mistake in it is reported before the data is loaded
    if path is not None and checkpoint is not None:
        check_same_settings(path, checkpoint, model, data)
        run = run_of(path)
        model.weights = None  # the checkpoint's are trained further
    with as_user_error():
        loaded = model.load_weights()
    if run is None and is_first and not settings.trainer.fast_dev_run:
        run = new_run(root, recipe)

    settings.config, settings.ckpt_path = None, None
    begin = LambdaCallback(on_train_start=partial(_begin, run, parser.dump(settings), checkpoint))
    interruption = None
    with run.lock() if run is not None and is_first else nullcontext():
        callbacks = [begin, NetworkMonitor(settings.pictures_every)]
        trainer = training_trainer(values.trainer, run, checkpoint, settings.checkpoint_minutes, callbacks)
        _check_processes(rank, trainer)
        if path is not None and checkpoint is not None and (reason := reason_to_stop(path, checkpoint, trainer, model)):
            return print(f"nothing left to do: {path} {reason}") if is_first else None
        if is_first:
            with as_user_error():
                data.prepare_data()
                data.setup("fit")
                _check_last_batch(trainer, model, data)
            _print_summary(model, data, trainer, run, checkpoint, loaded)
        with running(None if run is None else run.logs):
            try:
                trainer.fit(model, data, ckpt_path=path, weights_only=True)
            except Interrupted as error:
                interruption = error
            if interruption is None or not interruption.number:
                _ensure_best(trainer, model, data, run)
    if is_first and run is not None:
        _print_outcome(run, interruption, options, trainer)
    if interruption is not None and interruption.number:
        raise interruption


def recipe_name(config: str | None) -> str:
    """Name of the configuration file without .yaml; a saved config.yaml has that of its run."""
    path = Path(config or "default").absolute()
    if path.name == "config.yaml" and path.parent.name.startswith("version_"):
        return path.parents[1].name
    return path.stem


def _begin(run: Run | None, config: str, resumed: dict[str, Any] | None, trainer: Trainer, model: Classifier) -> None:
    """Write config.yaml, and drop what a resumed run logged after its checkpoint, once nothing can fail any more."""
    if run is None or not trainer.loggers or not trainer.is_global_zero:
        return
    changes = [] if resumed is None else lasting_changes(resumed, trainer, model)
    write_text(run.logs / "config.yaml", "".join([*(f"{RESUMED}{change}\n" for change in changes), config]))
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.drop_events_after_checkpoint()


def _check_processes(rank: int, trainer: Trainer) -> None:
    """Reject a process that is not the first of several but would train alone, without a run's folder of its own."""
    if rank and trainer.world_size == 1:
        raise UserError(
            f"this is process {rank} of several, but trainer.devices × trainer.num_nodes is 1; give --trainer.devices "
            "and --trainer.strategy ddp, or unset RANK, LOCAL_RANK and SLURM_PROCID for independent trainings"
        )


def _check_last_batch(trainer: Trainer, model: Classifier, data: ImageDataModule) -> None:
    """Reject a last batch of one image before the first step, where the network's batch norm would fail on it."""
    images = len(data.images("train")) // trainer.world_size  # of each process
    limit, batches = trainer.limit_train_batches, -(-images // data.batch_size)
    has_last = limit >= batches if isinstance(limit, int) else limit == 1
    if (images % data.batch_size == 1 and has_last) or data.batch_size == 1:
        network = deepcopy(model.network).train()
        for name in model.frozen_norms:
            network.get_submodule(name).eval()
        try:
            network(torch.zeros(1, 3, data.image_size, data.image_size))
        except ValueError as error:
            raise UserError(
                f"data.batch_size={data.batch_size} leaves a batch of one image of {images:,}, on which batch norm "
                f"cannot train ({error}); choose another data.batch_size or data.val_size"
            ) from error


def _ensure_best(trainer: Trainer, model: Classifier, data: ImageDataModule, run: Run | None) -> None:
    """Where the training ended before its first complete epoch, validate its last state and save it as the best."""
    ours = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint)]
    has_best = any(callback.monitor and callback.best_model_path for callback in ours)
    if not ours or has_best or not trainer.limit_val_batches:
        return
    trainer.validate(model, datamodule=data, verbose=False)
    if run is not None and run.last.exists():
        save_final_checkpoint(trainer, run.last, run.best)


def _print_summary(
    model: Classifier,
    data: ImageDataModule,
    trainer: Trainer,
    run: Run | None,
    resumed: dict[str, Any] | None,
    loaded: str,
) -> None:
    """What is trained, on what, where, from where, and what it writes."""
    size = data.image_size
    megaflops = count_flops(model.network, (3, size, size)) / 1e6
    train, val = len(data.images("train")), len(data.images("val"))
    attention = model.hparams["attention"]
    start = " that starts as the identity" if attention["start"] == "identity" else ""
    lines = [
        f"network      {network_name(model.hparams)}, attention {attention['kind']}{start}",
        *([f"classes      {model.replaced_layer} was replaced by a linear layer"] if model.replaced_layer else []),
        *([f"weights      {loaded}"] if loaded else []),
        *_trained_parts(model),
        f"cost         {count_parameters(model.network):,} parameters; {megaflops:,.1f} MFLOPs per image, where a "
        "multiplication and an addition are two",
        f"data         {data.dataset}: {train:,} training and {val:,} validation images of {size}×{size}, "
        f"{data.num_classes} classes",
        f"device       {trainer.strategy.root_device}, precision {trainer.precision}, processes {trainer.world_size}",
    ]
    if run is not None:
        lines += [f"checkpoints  {run.checkpoints}", f"logs         {run.logs}  (tensorboard --logdir logs)"]
    if resumed is not None:
        lines.append(f"resumed      after {completed_epochs(resumed)} epochs, {resumed['global_step']} steps")
        lines += [f"differs      {line}" for line in differences(resumed, trainer, model, data.batch_size).values()]
    print("\n".join(lines))


def _trained_parts(model: Classifier) -> list[str]:
    """What is trained, at which rate, where that is not all at one; a line of the summary each."""
    lines = []
    if model.freeze_patterns:
        total = sum(parameter.numel() for parameter in model.network.parameters())
        frozen = ", ".join(model.freeze_patterns)
        lines.append(f"trained      {count_parameters(model.network):,} of {total:,} parameters, without {frozen}")
    for group in model.parameter_groups() if model.lr_factors else []:
        count = sum(parameter.numel() for parameter in group["params"] if parameter.requires_grad)
        lines.append(f"rate         × {group['lr_factor']:g} for {group['name']}: {count:,} parameters")
    return lines


def _print_outcome(run: Run, interruption: Interrupted | None, options: list[str], trainer: Trainer) -> None:
    """How to go on where the training was stopped; else the best epoch, its figures, and the command that tests it."""
    if interruption is not None and not trainer.checkpoint_callbacks:
        print(f"{interruption}; nothing is saved, since trainer.enable_checkpointing is false", file=sys.stderr)
    elif interruption is not None:
        again = [*split_option(options, "--ckpt_path")[1], "--ckpt_path", str(run.last)]
        print(f"{interruption}; the state is saved", file=sys.stderr)
        more = " with a higher --trainer.max_steps" if 0 <= trainer.max_steps <= trainer.global_step else ""
        print(f"resume{more}: {PROGRAM} fit {shlex.join(again)}", file=sys.stderr)
    if run.best.exists() and (interruption is None or not interruption.number):
        checkpoint = read_checkpoint(run.best)
        loss, acc = checkpoint["figures"]["val/loss"], checkpoint["figures"]["val/acc"]
        print(f"best epoch   {checkpoint['epoch'] + 1}: val/loss {loss:.4f}, val/acc {acc:.4f}")
        print(f"test it      {PROGRAM} test --ckpt_path {shlex.quote(str(run.best))}")
