"""The LightningModule: a network with its loss, metrics, optimizer and schedule."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
import torch.compiler.config
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from cbam_pl.attention import AttentionConfig
from cbam_pl.data.datamodule import ImageDataModule, may_have_seen, whole_number
from cbam_pl.environment import missing_to_compile
from cbam_pl.errors import UserError
from cbam_pl.models import Architecture, NetworkConfig, Stem, build_network, make_network
from cbam_pl.models.insertion import attach_attention
from cbam_pl.models.network import check_rebuilt
from cbam_pl.process import socket_timeout
from cbam_pl.seeds import derive_seed, seed_device
from cbam_pl.training.finetuning import freeze_modules, load_weights, parameter_groups, start_of_trained
from cbam_pl.training.losses import StepLosses
from cbam_pl.training.metrics import LossAndAccuracy
from cbam_pl.training.optimization import (
    check_factors,
    check_optimizer,
    check_schedule,
    describe_factory,
    plain_numbers,
    with_factors,
    zero_fused_momentum,
)
from cbam_pl.training.state import TrainingState, check_data

# Callbacks of Lightning whose checkpoints are not of the weights that were validated, and what to do instead.
_CHANGING_WEIGHTS = {
    ModelPruning: "prune the trained network",
    StochasticWeightAveraging: "use EMAWeightAveraging",
}
_UNUSED = {"stem": "cifar", "dropout": None, "width": 1.0}  # of the networks of this program alone


class Classifier(LightningModule):
    """A network that is trained with cross-entropy and measured by loss and accuracy.

    Args:
        num_classes: classes to tell apart.
        arch: the network; None: cnn, or the one that `network` names.
        network: a network of a library or of your own in its place: a class or function that makes it, such as
            torchvision.models.resnet18 or timm.create_model, with its arguments, as an optimizer is given.
        attention: the attention of each of its blocks, or of the modules that its `where` names.
        image_size: height and width of the images in pixels.
        stem: of resnet18 to 152: cifar (3×3, stride 1) or imagenet (7×7, stride 2, then a max pool, for large images).
        dropout: of the cnn: share of its hidden units that each training step leaves out; None: 0.5.
        width: factor on the channels of the network's convolutions, rounded to whole channels, at least 8.
        weights: a file of weights to start from: a state dict (.pth, .safetensors), a checkpoint of this program, or a
            folder of weights/.
        freeze: patterns of modules, as of attention.where, whose weights and batch norm statistics stay as they are;
            attention in them is trained unless a pattern names it, for which a `*` alone is not enough.
        lr_factors: pattern of modules, as in freeze: factor on the learning rate of their weights. Attention in them
            keeps the plain rate unless a pattern names it. Where several patterns match, the last one counts.
        optimizer: any of torch.optim but LBFGS and SparseAdam, without its parameters.
        lr_scheduler: any of torch.optim.lr_scheduler or cbam_pl.schedules, without its optimizer. ReduceLROnPlateau
            follows val/loss. A total_steps of None (null) becomes the length of the whole training.
        lr_interval: step the schedule once an epoch or once an optimizer step.
        label_smoothing: share of the target that is spread evenly over all classes, in training and evaluation.
        channels_last: lay out images and weights in memory with the channels innermost, which convolutions are
            faster on; results differ only by rounding. By default on for CPU and CUDA.
        compile: let torch.compile write kernels for the training steps; results differ by rounding, and at ties of a
            maximum by which place has the gradient. By default on for CUDA with Triton, a C compiler and Python.h, and
            off elsewhere: on a CPU it needs a C++ compiler and half a minute, after which a step of the cnn with CBAM
            takes a seventh less time, and one without attention as long as before.
        test_time_flip: classify by the mean of the logits of each image and of its mirror image, in validation, test
            and prediction.
        seed: what the dropout of each epoch depends on; the initial weights are drawn before, from torch's own state.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        num_classes: int,
        arch: Architecture | None = None,
        attention: AttentionConfig = AttentionConfig(),  # noqa: B008 - frozen
        image_size: int = 32,
        stem: Stem = "cifar",
        dropout: float | None = None,
        width: float = 1.0,
        network: dict[str, Any] | None = None,
        weights: str | None = None,
        freeze: tuple[str, ...] | str = (),
        lr_factors: dict[str, float] | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        label_smoothing: float = 0.0,
        channels_last: bool | None = None,
        compile: bool | None = None,
        test_time_flip: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        num_classes, image_size = whole_number("num_classes", num_classes), whole_number("image_size", image_size)
        dropout, width = dropout if dropout is None else float(dropout), float(width)
        label_smoothing, seed = float(label_smoothing), whole_number("seed", seed)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
        if isinstance(attention, dict):  # as load_from_checkpoint gives it, and below
            attention = AttentionConfig(**attention)
        made_by = None if network is None else NetworkConfig(**network)
        has_own = made_by is not None and made_by.has_weights
        # What the training starts from, for its checkpoints; empty where it begins anew.
        self.started_from = str(weights) if weights else "the network's own weights" if has_own else ""
        self._chosen_start = attention.start
        if attention.kind != "none" and attention.start is None:
            start = start_of_trained(weights, attention) if weights else None
            attention = replace(attention, start=start or ("identity" if self.started_from else "paper"))
        own: dict[str, Any] = {"stem": stem, "dropout": dropout, "width": width}
        self.replaced_layer = ""  # name of the linear layer that was replaced for the number of classes, if any
        if made_by is None:
            arch = arch or "cnn"
            self.network = build_network(arch, num_classes, attention, image_size, stem, dropout, width)
        else:
            given = {name: value for name, value in own.items() if value != _UNUSED[name]}
            for name, value in {"arch": arch, **given}.items():
                if value is not None:
                    raise ValueError(f"{name}={value} has no effect with network={made_by.name}; give one of the two")
            with socket_timeout(60):
                self.network, self.replaced_layer = make_network(made_by, num_classes, attention, image_size)
            if made_by.has_weights:
                check_rebuilt(self.network, made_by, num_classes, attention, image_size)
        # What rebuilds the network, as plain values, so that a checkpoint is loaded without running code.
        saved: dict[str, Any] = {"num_classes": num_classes, "arch": arch, "image_size": image_size, **own}
        saved |= {"network": None if made_by is None else asdict(made_by), "attention": asdict(attention)}
        self.save_hyperparameters({**saved, "label_smoothing": label_smoothing, "test_time_flip": test_time_flip})
        self.weights = weights  # the file that is still to be loaded
        self.weights_data: dict[str, Any] = {}  # what is known of the data that they were trained on
        self.freeze_patterns = [freeze] if isinstance(freeze, str) else list(freeze)
        # As text, since YAML reads the name 0 as a number.
        self.lr_factors = {str(pattern): factor for pattern, factor in (lr_factors or {}).items()}
        self.frozen_norms = freeze_modules(self.network, self.freeze_patterns)  # names: some strategies replace them
        self.parameter_groups()  # so that a mistake in a pattern is reported at once
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.label_smoothing = label_smoothing
        self.channels_last = channels_last
        self.compile_training = compile
        self.test_time_flip = test_time_flip
        self.seed = seed
        self.train_metric, self.eval_metric = LossAndAccuracy(), LossAndAccuracy()
        self.epoch_lr = 0.0  # the learning rate in which the epoch began
        self.tested_epoch = 0  # of the weights that `test` measures, from 1
        self.validated = False  # whether this epoch was
        self.val_figures: dict[str, float] = {}  # of the last validation
        self.epoch_ended = False  # whether a checkpoint would be of a complete epoch
        self.num_evaluated = 0  # images of the last validation or test
        self._memory_format = torch.contiguous_format
        # A function beside the network, not a module around it: checkpoints keep their keys, and code that inspects
        # the network finds it as it was built.
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._compiled_size = 0  # images in the batches that it takes

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> "Classifier":
        """A trained network in evaluation mode, with `push_to_hub(repository)`. It needs huggingface_hub.

        Args:
            name: a folder of weights, or a repository on the Hugging Face Hub that holds one.
            options: those of huggingface_hub.ModelHubMixin.from_pretrained, such as revision and token, and `trust`,
                packages of networks that it may import.

        Raises:
            UserError: huggingface_hub is not installed, or what `name` holds is not a folder of weights.
        """
        try:
            hub = import_module("cbam_pl.training.hub")  # an optional package, and slow to import
        except ImportError as error:
            raise UserError(
                "from_pretrained needs huggingface_hub: pip install huggingface_hub; without it, cbam_pl.load_network "
                "reads a folder"
            ) from error
        return hub.HubClassifier.from_pretrained(name, **options)

    # The network

    def configure_callbacks(self) -> list[Callback]:
        """What every training needs; a trainer that has one of them already keeps its own, in its place."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return []
        present = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [make() for make in (StepLosses, TrainingState) if make not in present]

    def setup(self, stage: str) -> None:
        """Load the weights to start from, choose what is fast on the device, and forget what was cut off before."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            for kind, instead in _CHANGING_WEIGHTS.items():
                if isinstance(callback, kind):
                    raise UserError(
                        f"trainer.callbacks: {kind.__name__} changes the weights after they were validated, and others "
                        f"are saved; {instead}"
                    )
        self.load_weights()
        self.eval_metric.reset()
        if stage == "fit":
            self.train_metric.reset()
            self.validated = self.epoch_ended = False
            self._warn_of_seen_images()
        self.configure_memory_format_and_compile(self.trainer.strategy.root_device, stage == "fit")

    def configure_memory_format_and_compile(self, device: torch.device, training: bool) -> None:
        """Lay out the network's memory, and compile its training steps, as the settings or the device want it."""
        channels_last = device.type in ("cpu", "cuda") if self.channels_last is None else self.channels_last
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self._memory_format)
        wanted = device.type == "cuda" if self.compile_training is None else self.compile_training
        if not (training and wanted):
            return
        if missing := missing_to_compile(device.type):
            if self.compile_training:
                raise UserError(f"model.compile=true needs {missing}; or set model.compile=false")
            said = f"the training step is not compiled, which needs {missing}"
        else:
            said = "compiling the training step, once, which takes half a minute or more"
            # Networks of one class share the code of its forward, of which torch compiles eight forms by default; the
            # others it would run eagerly, and only log that.
            torch.compiler.config.recompile_limit = max(64, torch.compiler.config.recompile_limit)
            # A call, as the network's own hooks are not in its `forward`; with torch's own random numbers, so that
            # dropout is the same with and without it.
            self._compiled = torch.compile(
                lambda images: self.network(images), dynamic=False, options={"fallback_random": True}
            )
            self._compiled_size = 0
        if self.global_rank == 0:
            print(said, flush=True)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised → logits (B, num_classes)."""
        return self.network(images.to(memory_format=self._memory_format))

    def training_logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised → logits (B, num_classes), compiled where that was chosen."""
        if self._compiled is None:
            return self(images)
        if len(images) < self._compiled_size:
            return self(images)  # an epoch's last, smaller batch is not worth a compilation of its own
        self._compiled_size = len(images)
        return self._compiled(images.to(memory_format=self._memory_format))

    def evaluation_logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised → logits (B, num_classes), of both mirror images where that was chosen."""
        return (self(images) + self(images.flip(3))) / 2 if self.test_time_flip else self(images)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    # Training

    def load_weights(self) -> str:
        """Start from the file of weights, if one is given and not loaded yet. Returns what was loaded, and what not."""
        path, self.weights = self.weights, None
        if path is None:
            return ""
        attention = AttentionConfig(**self.hparams["attention"])
        loaded, self.weights_data = load_weights(self.network, path, attention, self._chosen_start)
        return loaded

    def _warn_of_seen_images(self) -> None:
        trained, data = self.weights_data, getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageDataModule) and may_have_seen(trained, data):
            rank_zero_warn(
                f"model.weights were trained on {data.dataset} with seed={trained.get('seed')} and "
                f"data.val_size={trained.get('val_size')}: they may have seen images that are held out for validation "
                "now, so that val/loss, val/acc and the epoch chosen by them are too good; give the seed, val_size and "
                "images that they were trained with"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note of which epoch the weights are, and compare the data; the data module is restored only after it."""
        self.tested_epoch = checkpoint.get("epoch", -1) + 1  # a file of weights alone has none
        try:
            trainer = self.trainer
        except RuntimeError:  # there is none in load_from_checkpoint
            return
        check_data(trainer, checkpoint)

    def on_train_start(self) -> None:
        """Prepare the network, and choose what of it is compiled."""
        self.prepare_network()
        self._limit_compilation()

    def prepare_network(self) -> None:
        """Keep the statistics of frozen batch norms; only when training starts: Lightning warns of such a mode before.

        By now a strategy has replaced batch norms, too, and attention after them must be in what is compiled.
        """
        attach_attention(self.network)
        for name in self.frozen_norms:
            self.network.get_submodule(name).eval()

    def _limit_compilation(self) -> None:
        """Compile no network with SyncBatchNorm, and no smaller batch than the full ones."""
        if self._compiled is None:
            return
        if any(isinstance(module, torch.nn.SyncBatchNorm) for module in self.network.modules()):
            if self.compile_training:
                raise UserError("model.compile=true does not work with trainer.sync_batchnorm; leave one of them out")
            self._compiled = None  # torch.compile would split the network at each
        if self.trainer.num_training_batches > 1:  # a resumed epoch may begin with the last batch, which is smaller
            self._compiled_size = getattr(self.trainer.train_dataloader, "batch_size", None) or 0

    def on_train_epoch_start(self) -> None:
        """Note the epoch's learning rate, without a factor."""
        group = self.trainer.optimizers[0].param_groups[0]  # with a factor where patterns match all weights
        self.epoch_lr = group["lr"] / group.get("lr_factor", 1.0)
        self.validated = self.epoch_ended = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Images (B, 3, H, W) and labels (B,) → the batch's mean loss ()."""
        # Dropout is a function of seed, epoch and batch, so that any step can be done again.
        seed_device(derive_seed("dropout", self.seed, self.current_epoch, batch_idx, self.global_rank), self.device)
        images, labels = batch
        logits = self.training_logits(images)
        loss = self._loss(logits, labels)
        self.train_metric.update(loss, logits, labels)
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the epoch, and step a plateau schedule before the checkpoint is written, so that none of it is lost."""
        figures = self._finish_epoch("train", self.train_metric, lr=self.epoch_lr)
        self.epoch_ended = True
        self.tested_epoch = self.current_epoch + 1
        if self.validated:
            figures |= self.val_figures
            if not self.val_figures.keys() <= self.trainer.callback_metrics.keys():  # of a validation before a resume
                self._tell_callbacks(self.val_figures)
        self._log(figures, self.current_epoch + 1)
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, ReduceLROnPlateau) and (self.validated or not self.trainer.enable_validation):
            scheduler.step(figures.get("val/loss", figures["train/loss"]))

    # Evaluation

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Images (B, 3, H, W) and labels (B,) → logits (B, num_classes), for callbacks."""
        images, labels = batch
        logits = self.evaluation_logits(images)
        self.eval_metric.update(self._loss(logits, labels), logits, labels)
        return logits

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Images (B, 3, H, W) → probabilities (B, num_classes)."""
        return self.evaluation_logits(batch[0]).float().softmax(1)

    def on_validation_epoch_end(self) -> None:
        """Make val/loss and val/acc known to schedules and checkpoints."""
        self.val_figures = self._finish_epoch("val", self.eval_metric)
        self.validated = not self.trainer.sanity_checking

    def on_test_epoch_end(self) -> None:
        """Log the test figures at the epoch of the tested checkpoint."""
        self._log(self._finish_epoch("test", self.eval_metric), self.tested_epoch)

    # Optimizer and schedule

    @property
    def schedule_spans_training(self) -> bool:
        """Whether the schedule's length is left to the trainer."""
        if not isinstance(self.lr_scheduler, partial):
            return False
        given = self.lr_scheduler.keywords  # OneCycleLR takes its length in two ways
        return given.get("total_steps", 0) is None and given.get("epochs") is None

    @property
    def optimization(self) -> dict[str, Any]:
        """How the weights are updated, as plain values, such as "Adam" for optimizer and 0.001 for optimizer.lr."""
        return {
            "lr_interval": self.lr_interval,
            "freeze": self.freeze_patterns,
            "lr_factors": self.lr_factors,
            **describe_factory("optimizer", self.optimizer),
            **describe_factory("lr_scheduler", self.lr_scheduler),
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters, by the factor of their learning rate."""
        return parameter_groups(self.network, self.lr_factors)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer over all parameters, or a UserError with the setting that it rejects."""
        try:
            optimizer = self.optimizer(self.parameter_groups())
            check_optimizer(optimizer)
            for group in optimizer.param_groups:
                group |= plain_numbers({name: value for name, value in group.items() if name != "params"})
                group["lr"] *= group.get("lr_factor", 1.0)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"model.optimizer: {error}") from error
        if isinstance(optimizer, torch.optim.Rprop) and (self.lr_factors or self.lr_scheduler):
            raise UserError(
                "model.optimizer: Rprop finds its own rates, on which model.lr_scheduler and model.lr_factors have no "
                "effect; leave them out, or set them to null"
            )
        return optimizer

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule with its interval, or a UserError with the setting that they reject."""
        optimizer = self.make_optimizer()
        fused = any(group.get("fused") for group in optimizer.param_groups)
        if fused and self.trainer.gradient_clip_val and str(self.trainer.precision).endswith("mixed"):
            raise UserError(
                "model.optimizer: fused=true does not work with trainer.gradient_clip_val in mixed precision; add "
                "--model.optimizer.init_args.fused false"
            )
        if optimizer.defaults.get("capturable") and self.trainer.strategy.root_device.type == "cpu":
            raise UserError("model.optimizer: capturable=true is for GPUs; leave it out")
        scheduler = None if self.lr_scheduler is None else self._make_schedule(optimizer)
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            zero_fused_momentum(optimizer)  # only now, as a schedule may set the momentum
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, ReduceLROnPlateau):
            self._check_plateau(scheduler)
        # Lightning asks for a monitor; on_train_epoch_end steps a plateau by val/loss.
        schedule = {"scheduler": scheduler, "interval": self.lr_interval, "monitor": "train/loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _make_schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        make: Any = self.lr_scheduler
        if isinstance(make, partial):
            make = partial(make.func, *make.args, **plain_numbers(make.keywords))
        try:
            if self.schedule_spans_training:
                make = partial(make, total_steps=self._training_steps())
            if self.lr_factors and isinstance(make, partial):
                make = with_factors(make, [group["lr_factor"] for group in optimizer.param_groups])
            scheduler = make(optimizer)
            check_schedule(scheduler, optimizer, self._training_steps)
            if self.lr_factors and make is self.lr_scheduler:  # of which a function knows nothing
                check_factors(optimizer)
        except (ValueError, TypeError) as error:
            raise UserError(f"model.lr_scheduler: {error}") from error
        except KeyError as error:
            if "initial_lr" not in str(error):
                raise
            raise UserError("model.lr_scheduler: leave last_epoch out; --ckpt_path resumes a schedule") from error
        except ZeroDivisionError as error:
            fix = "a length or factor of it is 0; set it above 0"
            if self.optimization["lr_scheduler"] == "OneCycleLR":
                fix = (
                    "a phase of the schedule has fewer than two steps; train for more epochs, or change pct_start so "
                    "that the rise and the fall each have at least two"
                )
            raise UserError(f"model.lr_scheduler: {fix}") from error
        return scheduler

    def _check_plateau(self, scheduler: ReduceLROnPlateau) -> None:
        judge = "val/loss" if self.trainer.enable_validation else "train/loss"
        if scheduler.mode != "min" or getattr(scheduler, "monitor", judge) != judge:
            raise UserError(
                f"model.lr_scheduler: ReduceLROnPlateau follows {judge}, which should decrease; leave out mode, and "
                f"give monitor={judge} where it is required"
            )
        if self.lr_interval == "step":
            raise UserError(
                "model.lr_interval=step has no effect with ReduceLROnPlateau, which is stepped once after each epoch; "
                "leave it out"
            )

    def _training_steps(self) -> int:
        """Steps of the schedule over the whole training, in the unit of `lr_interval`."""
        trainer = self.trainer
        if self.lr_interval == "epoch" and trainer.max_steps < 0:
            total: float = trainer.max_epochs or -1
        else:
            states = [one for one in trainer.callbacks if isinstance(one, TrainingState)]  # type: ignore[attr-defined]
            total = states[0].total_steps(trainer) if states else trainer.estimated_stepping_batches
            if self.lr_interval == "epoch":
                if trainer.num_training_batches == math.inf:
                    raise ValueError(
                        "a schedule by epochs needs their number; set trainer.max_epochs, or model.lr_interval=step"
                    )
                total = math.ceil(total / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
        if total < 1 or total == math.inf:
            raise ValueError("a schedule over the whole training needs its end; set trainer.max_epochs")
        return int(total)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step any schedule but a plateau, which on_train_epoch_end steps (lightning issue 14699)."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            try:
                scheduler.step()
            except ZeroDivisionError as error:  # such as of step_size=0
                raise UserError(
                    f"model.lr_scheduler: {error}; a length or factor of it is 0, set it above 0"
                ) from error

    # Logging

    def _finish_epoch(self, split: str, metric: LossAndAccuracy, **others: float) -> dict[str, float]:
        """Reset a metric, and make its figures and others known to callbacks; they are means over all processes."""
        loss, acc, self.num_evaluated = metric.compute()
        metric.reset()
        figures = {f"{split}/loss": loss, f"{split}/acc": acc, **others}
        self._tell_callbacks(figures)
        return figures

    def _tell_callbacks(self, figures: dict[str, float]) -> None:
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}
        self.log_dict(tensors, logger=False, on_epoch=True, on_step=False, batch_size=1, rank_zero_only=False)

    def _log(self, values: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log_metrics(values, step)
