"""What a Classifier brings into every training: checkpoints that resume exactly.

Private names of Lightning that this uses:

- `fit_loop._combined_loader`: `estimated_stepping_batches` builds the training loader before its state is restored, and
  Lightning then skips the restoring. Reset, it is built again. tests/training/test_resume.py resumes in the middle of
  an epoch with a one-cycle schedule, and fails without it.
"""

import time
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, tensor
from torch.optim import Optimizer

from cbam_pl.data.datamodule import ImageDataModule, may_have_seen
from cbam_pl.environment import describe_environment
from cbam_pl.errors import UserError
from cbam_pl.training.schema import FORMAT, completed_epochs, upgrade

if TYPE_CHECKING:
    from cbam_pl.training.classifier import Classifier  # which imports this file


class TrainingState(Callback):
    """Write what Lightning leaves out of a checkpoint, and resume exactly from the one that was read, if any."""

    def __init__(self, resumed: dict[str, Any] | None = None) -> None:
        self._resumed = resumed
        self._all_batches_done = False  # of the interrupted epoch, of which the validation alone is left
        self._interrupted: dict[str, Any] = {}
        self._changes: list[str] = []
        self._environments: list[dict[str, str]] = []  # in which it was trained, in their order

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier training of the same Trainer."""
        if stage == "fit":
            self._changes = []
            self._environments = [] if self._resumed is None else self._resumed["environments"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what was resumed: the next training may begin anew."""
        if stage == "fit":
            self._resumed = None

    def total_steps(self, trainer: Trainer) -> int | float:
        """Optimizer steps of the whole training, for a schedule over all of it."""
        total = trainer.estimated_stepping_batches
        trainer.fit_loop._combined_loader = None  # see the head of this file
        if self._resumed is not None and trainer.max_steps < 0:
            # With other processes or another accumulation than before, an epoch has another number of steps.
            batches = _loader_state(self._resumed)["batches_done"]
            per_epoch = total // max(1, trainer.max_epochs or 1)
            epochs = completed_epochs(self._resumed) + self._all_batches_done
            behind = epochs * per_epoch + batches // trainer.accumulate_grad_batches
            total += self._resumed["global_step"] - behind
        return max(1, total)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adapt the checkpoint to the trainer's processes and epochs, as far as these differ."""
        upgrade(checkpoint)
        self._resumed = checkpoint
        if not trainer.training:
            return
        classifier = cast("Classifier", pl_module)
        classifier.started_from = checkpoint.get("started_from", "")
        _check_optimization(classifier, checkpoint.get("optimization", {}))
        self._changes, self._environments = lasting_changes(checkpoint, trainer, classifier), checkpoint["environments"]
        loader, loop = _loader_state(checkpoint), checkpoint["loops"]["fit_loop"]
        progress = loop["epoch_loop.batch_progress"]["current"]
        _give_patience(trainer, checkpoint)
        if _is_interrupted(checkpoint):
            if loop["epoch_loop.batch_progress"]["is_last_batch"] and progress["completed"] < progress["processed"]:
                raise UserError(
                    "the checkpoint was saved between an epoch's last batch and its end, from where Lightning cannot "
                    "resume; resume from another one"
                )
            self._interrupted = {"figures": checkpoint["figures"], **checkpoint["interrupted_epoch"]}
            self._all_batches_done = not loader["batches_done"]
        else:  # Lightning counts the epoch as completed after its checkpoint is written
            for counts in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
                counts["completed"] = counts["processed"]
        decisive = {"processes", "limit_train_batches", "overfit_batches", "accumulate_grad_batches"}
        if loader["batches_done"] and decisive & differences(checkpoint, trainer, classifier).keys():
            _convert_batches_done(trainer, checkpoint["run_conditions"], loader, progress)
        if classifier.schedule_spans_training:
            for state in checkpoint["lr_schedulers"]:
                for name in ("total_steps", "_schedule_phases"):  # the schedule just built has the new ones
                    state.pop(name, None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on in an epoch that was interrupted, and on a schedule that was stretched; note where it is trained."""
        here = describe_environment(trainer.strategy.root_device)
        if self._environments[-1:] != [here]:
            self._environments = [*self._environments, here]
        interrupted, self._interrupted = self._interrupted, {}
        classifier = cast("Classifier", pl_module)
        for optimizer in trainer.optimizers:
            _match_memory_layout(optimizer)
        if self._resumed is not None and not interrupted:
            # With max_steps, Lightning takes every resume for one inside an epoch, and would end the last one again.
            trainer.fit_loop.epoch_loop.restarting = False
        if self._resumed is not None and self._resumed.get("stopped_early"):
            # A request to stop that waits for min_epochs or min_steps, which Lightning does not restore.
            stops = [one for one in trainer.callbacks if isinstance(one, EarlyStopping)]  # type: ignore[attr-defined]
            trainer.should_stop = any(stop.state_key in self._resumed["callbacks"] for stop in stops)
        # An epoch keeps its rate. The next one would keep it, too: a schedule by epochs is stepped after it again.
        by_step = classifier.lr_interval == "step"
        if self._resumed is not None and classifier.schedule_spans_training and (by_step or not interrupted):
            for config in trainer.lr_scheduler_configs:
                _set_rates(config.scheduler)
        if interrupted:
            classifier.epoch_lr = interrupted["lr"]
            classifier.val_figures = {name: v for name, v in interrupted["figures"].items() if name.startswith("val/")}
            classifier.validated = bool(classifier.val_figures)
            if trainer.is_global_zero:  # the sums are those of all processes
                classifier.train_metric.add(*interrupted["sums"])
            # torchmetrics warns of a mean over what `update` has not seen, where no batch of the epoch is left.
            classifier.train_metric.update(tensor(0.0), tensor([]).view(0, 1), tensor([]))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the epoch's figures, and in the middle of an epoch what it has summed up so far."""
        classifier = cast("Classifier", pl_module)
        for logger in trainer.loggers:
            logger.save()
        loader = _loader_state(checkpoint)
        if classifier.epoch_ended or trainer.is_last_batch:
            loader["batches_done"] = 0  # Lightning leaves an epoch with fewer batches than the loader has unfinished
        # What was measured of this epoch, not of an earlier one.
        measured = {"val": classifier.validated, "train": classifier.epoch_ended, "lr": classifier.epoch_ended}
        metrics = sorted(trainer.callback_metrics.items())
        figures = {name: float(value) for name, value in metrics if measured.get(name.partition("/")[0], True)}
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        out_of_time = any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)
        checkpoint |= {
            "format": FORMAT,
            "saved_at": time.time(),  # all that was logged up to now is on the disk
            "stopped_early": trainer.should_stop and not out_of_time,
            "run_conditions": run_conditions(trainer),
            "changes": self._changes,
            "environments": self._environments,
            "started_from": classifier.started_from,
            "optimization": {"seed": classifier.seed, **classifier.optimization},
            "figures": figures,
            "interrupted_epoch": {"lr": classifier.epoch_lr, "sums": classifier.train_metric.sums()},
        }


def _check_optimization(classifier: "Classifier", saved: Mapping[str, Any]) -> None:
    ours = {"seed": classifier.seed, **classifier.optimization}
    if changed := changed_settings("", ours, {name: saved[name] for name in ours.keys() & saved.keys()}):
        raise UserError(
            f"the checkpoint was trained with other settings: {'; '.join(changed)}; give the same to Classifier or "
            "load_from_checkpoint"
        )


def check_data(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Reject a resume with other data than the checkpoint's; warn of a validation on images that it was trained on."""
    data, saved = trainer.datamodule, checkpoint.get("datamodule_hyper_parameters", {})  # type: ignore[attr-defined]
    if not isinstance(data, ImageDataModule):
        return
    if trainer.training and (changed := changed_settings("data.", data.hparams, saved)):
        raise UserError(
            f"the checkpoint was trained with other settings: {'; '.join(changed)}; give the same to ImageDataModule, "
            "or use ImageDataModule.load_from_checkpoint"
        )
    # The images of a folder are known one by one, and compared by the data module itself.
    if trainer.validating and data.dataset != "folder" and may_have_seen(saved, data):
        rank_zero_warn(
            f"the checkpoint was trained with seed={saved.get('seed')} and data.val_size={saved.get('val_size')}: it "
            "may have seen images that are held out for validation here, so that val/loss and val/acc are too good; "
            "use ImageDataModule.load_from_checkpoint"
        )


def _give_patience(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let EarlyStopping have the patience that is given now, not the checkpoint's."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and (state := checkpoint["callbacks"].get(callback.state_key)):
            if callback.patience > max(state["patience"], state["wait_count"]):
                checkpoint["stopped_early"] = False  # by its new patience it has not asked for that
            state["patience"] = callback.patience


def _convert_batches_done(
    trainer: Trainer, before: Mapping[str, Any], loader: dict[str, int], progress: dict[str, int]
) -> None:
    """Convert the number of batches done, where an epoch goes on with other processes or other batches.

    One order of the images is dealt out to all processes: as many are done as before, rounded down to whole steps; at
    least one batch is left, as Lightning begins an epoch without any again.
    """
    done = loader["batches_done"] * before.get("processes", trainer.world_size) // trainer.world_size
    batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches  # type: ignore[attr-defined]
    done = min(done, (min(batches, limit) if isinstance(limit, int) else int(batches * limit)) - 1)
    loader["batches_done"] = done - done % trainer.accumulate_grad_batches
    completed = loader["batches_done"] + progress["completed"] - progress["ready"]
    progress |= dict.fromkeys(("ready", "started", "processed"), loader["batches_done"])
    progress["completed"] = completed


def _set_rates(scheduler: Any) -> None:
    """Give the optimizer the rates of a stretched schedule's present step, in place of the old schedule's."""
    state = scheduler.state_dict()
    scheduler.last_epoch -= 1
    scheduler.step()
    scheduler.load_state_dict({**state, "_last_lr": scheduler.get_last_lr()})  # with the count of its steps


def _match_memory_layout(optimizer: Optimizer) -> None:
    """Lay out what the optimizer keeps of each parameter as the parameter itself.

    Resumed with another model.channels_last, the two differ, and torch's fused steps take both in the order of memory.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _is_interrupted(checkpoint: dict[str, Any]) -> bool:
    """Whether its epoch has not ended, by the images summed up: all of its batches may be done, as in a validation."""
    return bool(checkpoint["interrupted_epoch"].get("sums", [0, 0, 0])[2])


def _loader_state(checkpoint: dict[str, Any]) -> dict[str, int]:
    """Where in the epoch the training loader is; may be changed, without effect where the loader is not ours."""
    states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader") or [{}]
    if "taken" in states[0]:  # before format 2
        states[0]["batches_done"] = states[0].pop("taken")
    return states[0] if "batches_done" in states[0] else {"batches_done": 0}


def changed_settings(prefix: str, ours: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """A text for each setting that a checkpoint has otherwise."""
    changed = []
    for name in sorted(saved.keys() - {"root"}):
        owner = name.partition(".")[0]
        if owner != name and ours.get(owner) != saved.get(owner):
            continue  # another optimizer has other options, of course
        here, there = (tuple(one) if isinstance(one, list) else one for one in (ours.get(name), saved[name]))
        if here != there:
            changed.append(f"{prefix}{name} ({saved[name]} in the checkpoint, {ours.get(name)} now)")
    return changed


def is_equal(name: str, one: Any, other: Any) -> bool:
    """Whether two values of a setting mean the same. Of a limit, 1 is one batch and 1.0 all of them."""
    return one == other and (not name.endswith("_batches") or one != 1 or type(one) is type(other))


def run_conditions(trainer: Trainer) -> dict[str, Any]:
    """What may differ when a training is resumed, and is printed then."""
    names = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "limit_train_batches",
             "limit_val_batches", "overfit_batches", "gradient_clip_val", "gradient_clip_algorithm",
             "check_val_every_n_epoch")  # fmt: skip
    values = {name: getattr(trainer, name) for name in names}
    averaging = [type(one).__name__ for one in trainer.callbacks if isinstance(one, WeightAveraging)]  # type: ignore[attr-defined]
    return {
        "processes": trainer.world_size,
        **{name: value.value if isinstance(value, Enum) else value for name, value in values.items()},
        "averaging": ", ".join(averaging) or "none",
    }


def differences(
    checkpoint: Mapping[str, Any], trainer: Trainer, model: "Classifier", batch_size: int | None = None
) -> dict[str, str]:
    """A text for each run condition, by its name, that is not the checkpoint's; all of these are allowed."""
    here = run_conditions(trainer)
    there = {name: checkpoint["run_conditions"].get(name, value) for name, value in here.items()}
    notes = {}
    if batch_size is not None:
        before, now = (conditions["processes"] * batch_size for conditions in (there, here))
        notes["processes"] = f"; a step takes {now} images now, {before} before"
    if model.lr_scheduler is not None:
        schedule = "is stretched to its end" if model.schedule_spans_training else "stays as it was"
        notes |= dict.fromkeys(("max_epochs", "max_steps"), f"; the schedule {schedule}")
    changed = [name for name in here if not is_equal(name, there[name], here[name])]
    return {name: f"{name}: {here[name]} now, {there[name]} before{notes.get(name, '')}" for name in changed}


def lasting_changes(checkpoint: Mapping[str, Any], trainer: Trainer, model: "Classifier") -> list[str]:
    """A text for each change, by this resume or an earlier one, that makes the result other than an unbroken run's."""
    changed = differences(checkpoint, trainer, model)
    if not model.schedule_spans_training:  # more of the same is what one training would have done
        changed = {name: text for name, text in changed.items() if name not in ("max_epochs", "max_steps")}
    epochs = completed_epochs(checkpoint)
    return [*checkpoint.get("changes", []), *(f"after {epochs} epochs, {text}" for text in changed.values())]
