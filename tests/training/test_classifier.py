import math
from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
import torch._dynamo.testing
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback, StochasticWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, StepLR

from cbam_pl.attention import AttentionConfig
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.errors import UserError
from cbam_pl.schedules import WarmupCosineLR
from cbam_pl.training.classifier import Classifier
from cbam_pl.training.losses import StepLosses


@pytest.fixture
def data(image_folder):
    return ImageDataModule("folder", str(image_folder), batch_size=16)


def trainer(tmp_path, **options):
    fixed = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }  # fmt: skip
    return Trainer(**fixed | options)


class StepLossLogger(DummyLogger):
    """Keeps train/loss_step."""

    def __init__(self):
        super().__init__()
        self.step_losses = []

    def log_metrics(self, metrics, step=None):
        if "train/loss_step" in metrics:
            self.step_losses.append((step, metrics["train/loss_step"]))


def test_label_smoothing_changes_the_loss_as_defined():
    model = Classifier(3, label_smoothing=0.3)
    logits, labels = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0])
    target = torch.tensor([0.7 + 0.1, 0.1, 0.1])
    assert float(model._loss(logits, labels)) == pytest.approx(float(-(target * logits.log_softmax(1)).sum()))
    with pytest.raises(ValueError, match=r"label_smoothing=1\.0 must be at least 0 and below 1"):
        Classifier(3, label_smoothing=1.0)


def test_memory_layout_changes_nothing_but_rounding():
    torch.manual_seed(0)
    fast = Classifier(10).eval()
    plain = Classifier(10, channels_last=False).eval()
    plain.load_state_dict(fast.state_dict())
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(fast(images), plain(images), atol=1e-5)


def learning_rates(model, data, tmp_path, **options):
    seen = []
    original = model.training_step

    def step(batch, batch_idx):
        seen.append(model.trainer.optimizers[0].param_groups[0]["lr"])
        return original(batch, batch_idx)

    model.training_step = step
    trainer(tmp_path, **options).fit(model, data)
    return seen


def test_one_cycle_gets_the_trainings_steps_and_moves_at_each(data, tmp_path):
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=None)
    model = Classifier(3, lr_scheduler=cycle, lr_interval="step")
    seen = learning_rates(model, data, tmp_path, max_epochs=2)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=12)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert seen == pytest.approx(expected)


def test_a_one_cycle_of_a_given_length_keeps_it():
    for given, spans in (({}, True), ({"epochs": 4, "steps_per_epoch": 100}, False), ({"total_steps": 9}, False)):
        cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.01, **{"total_steps": None, **given})
        assert Classifier(3, lr_scheduler=cycle).schedule_spans_training == spans


def test_an_epoch_schedule_over_the_training_ends_where_max_steps_does(data, tmp_path):
    seen = [
        learning_rates(Classifier(3, lr_scheduler=partial(WarmupCosineLR, total_steps=None)), data, tmp_path, **options)
        for options in ({"max_epochs": 4}, {"max_epochs": 50, "max_steps": 24}, {"max_epochs": 50, "max_steps": 19})
    ]
    assert seen[1] == pytest.approx(seen[0])
    assert seen[2] == pytest.approx(seen[0][:19])
    assert len(set(seen[0])) == 4


def test_a_plateau_has_no_interval():
    model = Classifier(3, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau, lr_interval="step")
    model._trainer = Trainer(logger=False, accelerator="cpu")
    with pytest.raises(UserError, match=r"model\.lr_interval=step has no effect with ReduceLROnPlateau"):
        model.configure_optimizers()


def test_an_epoch_schedule_moves_once_an_epoch(data, tmp_path):
    model = Classifier(3, lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.1))
    seen = learning_rates(model, data, tmp_path, max_epochs=3)
    assert seen == pytest.approx([1e-3] * 6 + [1e-4] * 6 + [1e-5] * 6)


def test_a_plateau_is_judged_by_the_validation_loss_once_an_epoch(data, tmp_path):
    # A threshold that no loss can pass: every epoch but the first is a bad one.
    plateau = partial(
        torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5, threshold=1e9, threshold_mode="abs"
    )
    model = Classifier(3, lr_scheduler=plateau)
    seen = learning_rates(model, data, tmp_path, max_epochs=4)
    assert seen[::6] == pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4])


class SeenDropout(torch.nn.Module):
    """Dropout that keeps which units it left out, in training."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def forward(self, x):
        mask = torch.nn.functional.dropout(torch.ones_like(x), 0.5, self.training)
        if self.training:
            self.masks.append(tuple(mask[0].tolist()))  # (units,) of the first image
        return x * mask


def test_dropout_is_a_function_of_seed_epoch_batch_and_process(data, tmp_path, monkeypatch):
    def masks(seed=0, rank=0, disturbance=0):
        monkeypatch.setattr(Classifier, "global_rank", rank)
        model = Classifier(3, seed=seed)
        model.network.classifier[3] = dropout = SeenDropout()
        torch.manual_seed(disturbance)
        trainer(tmp_path, max_epochs=2).fit(model, data)
        return dropout.masks

    first = masks()
    assert first == masks(disturbance=1)
    every = {*first, *masks(seed=1), *masks(rank=1)}
    assert len(first) == 12  # two epochs of six batches
    assert len(every) == 36


def test_an_optimizer_that_rejects_its_settings_is_a_mistake_of_the_user(data, tmp_path):
    model = Classifier(3, optimizer=partial(torch.optim.SGD, lr=-1.0))
    with pytest.raises(UserError, match=r"model\.optimizer: Invalid learning rate"):
        trainer(tmp_path, max_epochs=1).fit(model, data)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.SparseAdam, "model.optimizer: SparseAdam needs sparse gradients"),
        (torch.optim.LBFGS, "model.optimizer: LBFGS computes each batch up to 20 times"),
        (
            partial(torch.optim.NAdam, differentiable=True),
            "model.optimizer: differentiable=true is for gradients of the",
        ),
        (partial(torch.optim.Adam, lr=torch.tensor(0.1)), r"model.optimizer: lr=0.1\d* must be a number, not a tensor"),
        (partial(torch.optim.Adam, lr=float("inf")), "model.optimizer: lr=inf must be finite"),
    ],
)
def test_an_optimizer_that_cannot_train_is_named(optimizer, message):
    model = Classifier(3, optimizer=optimizer)
    # The first two want parameters without groups.
    model.parameter_groups = model.parameters
    with pytest.raises(UserError, match=message):
        model.make_optimizer()


@pytest.mark.parametrize("other", [{"lr_factors": {"blocks": 0.1}}, {"lr_scheduler": partial(StepLR, step_size=1)}])
def test_rprop_has_neither_schedule_nor_factors(other):
    assert Classifier(3, optimizer=torch.optim.Rprop).make_optimizer()
    with pytest.raises(UserError, match=r"model\.optimizer: Rprop finds its own rates, on which .* have no effect"):
        Classifier(3, optimizer=torch.optim.Rprop, **other).make_optimizer()


def cycle_of_a_function(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lr_scheduler": partial(OneCycleLR, max_lr=0.1, total_steps=None, pct_start=1.0)},
            "a phase of the schedule has fewer than two steps",
        ),
        ({"lr_scheduler": partial(OneCycleLR, max_lr=-0.1, total_steps=None)}, "its rate is below 0"),
        ({"lr_scheduler": partial(CyclicLR, base_lr=0.1, max_lr=0.2, step_size_up=0)}, "a length or factor of it is 0"),
        ({"lr_scheduler": partial(LambdaLR, lr_lambda=math.cos)}, "it has a built-in function, which cannot be saved"),
        ({"lr_scheduler": partial(StepLR, step_size=2, last_epoch=5)}, "leave last_epoch out; --ckpt_path resumes"),
        ({"lr_scheduler": cycle_of_a_function, "lr_factors": {"blocks": 0.1}}, "made by a function, it does not keep"),
    ],
)
def test_a_schedule_that_cannot_do_what_is_asked_is_rejected_before_the_first_step(options, message, data, tmp_path):
    model = Classifier(3, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), **options)
    with pytest.raises(UserError, match=rf"model\.lr_scheduler: {message}"):
        trainer(tmp_path, max_epochs=2).fit(model, data)


def test_rates_that_are_given_for_each_group_stay(data, tmp_path):
    cycle = partial(CyclicLR, base_lr=[0.1, 0.01], max_lr=[0.2, 0.3], step_size_up=50)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    model = Classifier(3, optimizer=sgd, lr_scheduler=cycle, lr_interval="step", lr_factors={"blocks": 0.5})
    fitted = trainer(tmp_path, max_epochs=1, limit_train_batches=1)
    fitted.fit(model, data)
    rates = [group["lr"] for group in fitted.optimizers[0].param_groups]
    assert rates == pytest.approx([0.1 + 0.1 / 50, 0.01 + 0.29 / 50])


def test_averaging_whose_weights_are_not_those_that_are_saved_is_rejected(data, tmp_path):
    averaging = StochasticWeightAveraging(swa_lrs=0.01)
    with pytest.raises(
        UserError, match=r"StochasticWeightAveraging changes the weights after .*; use EMAWeightAveraging"
    ):
        trainer(tmp_path, max_epochs=2, callbacks=[averaging]).fit(Classifier(3), data)


def test_what_is_for_gpus_is_rejected_on_a_cpu(data, tmp_path):
    model = Classifier(3, optimizer=partial(torch.optim.NAdam, capturable=True))
    with pytest.raises(UserError, match="capturable=true is for GPUs; leave it out"):
        trainer(tmp_path, max_epochs=1).fit(model, data)


def test_a_schedule_that_fails_at_a_step_is_a_mistake_of_the_user(data, tmp_path):
    model = Classifier(3, lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=0))
    with pytest.raises(UserError, match=r"model\.lr_scheduler: .*zero; a length or factor of it is 0, set it above 0"):
        trainer(tmp_path, max_epochs=1).fit(model, data)


def test_gradient_accumulation_logs_one_loss_per_optimizer_step(data, tmp_path):
    losses, logger = [], StepLossLogger()
    model = Classifier(3)
    original = model.training_step

    def step(batch, batch_idx):
        loss = original(batch, batch_idx)
        losses.append((loss.detach(), len(batch[1])))
        return loss

    model.training_step = step
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 1, "callbacks": StepLosses()}
    trainer(tmp_path, max_epochs=1, **options | {"logger": logger}).fit(model, data)
    pairs = [losses[index : index + 2] for index in range(0, len(losses), 2)]
    means = [sum(float(loss) * size for loss, size in pair) / sum(size for _, size in pair) for pair in pairs]
    assert [step for step, _ in logger.step_losses] == [1, 2, 3]
    assert [loss for _, loss in logger.step_losses] == pytest.approx(means, rel=1e-6)


def test_a_checkpoint_rebuilds_the_network(data, tmp_path):
    model = Classifier(3, arch="resnet18", attention=AttentionConfig(kind="spatial", kernel_size=3))
    fitted = trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    fitted.fit(model, data)
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.hparams["attention"]["kernel_size"] == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.slow
def test_compiled_training_writes_the_same_checkpoint_and_shows_the_same_gates(image_folder, tmp_path):
    # 20 training images: a compiled step, dropout included, and one on a smaller batch.
    data = ImageDataModule("folder", str(image_folder), batch_size=16, val_size=73)
    checkpoints = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Classifier(3, optimizer=partial(torch.optim.SGD, lr=0.01), compile=compiled)
        fitted = trainer(tmp_path, max_epochs=1)
        fitted.fit(model, data)
        assert (model._compiled is not None) == compiled
        path = tmp_path / f"{compiled}.ckpt"
        fitted.save_checkpoint(path)
        checkpoints.append(torch.load(path))
    eager, compiled = (checkpoint["state_dict"] for checkpoint in checkpoints)
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        assert torch.allclose(value.float(), compiled[name].float(), atol=1e-5), name
    # The network itself is not replaced: its gates can be read as before.
    images = torch.randn(2, 3, 32, 32)
    seen = []
    for network in (Classifier.load_from_checkpoint(tmp_path / "False.ckpt").network, model.network):
        attention = network.eval().blocks[0].attention
        attention.register_forward_hook(lambda module, inputs, output: seen.append(module.gates(inputs[0])))
        with torch.no_grad():
            network(images)
    assert seen[0].keys() == seen[1].keys() == {"channel", "spatial"}
    for name in seen[0]:
        assert torch.allclose(seen[0][name], seen[1][name], atol=1e-5), name


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # as the first step is left out
def test_a_fused_momentum_begins_at_zero_where_the_first_step_overflows(data, tmp_path):
    weights = {}
    cycle = partial(OneCycleLR, max_lr=0.01, total_steps=3)  # which sets the momentum
    for fused, (momentum, schedule) in product((True, False), ((0.9, None), (0.0, cycle))):
        torch.manual_seed(0)
        make = partial(torch.optim.SGD, lr=0.01, momentum=momentum, fused=fused)
        model = Classifier(3, image_size=8, optimizer=make, lr_scheduler=schedule, lr_interval="step")
        # The first step is left out, and the scale is then one that all others can take.
        scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-36)
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        fitted = trainer(tmp_path, max_epochs=1, limit_train_batches=3, plugins=[precision])
        fitted.fit(model, ImageDataModule(**data.hparams | {"image_size": 8}))
        assert scaler.get_scale() == pytest.approx(100)
        weights[fused, momentum] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for momentum in (0.9, 0.0):
        torch.testing.assert_close(weights[True, momentum], weights[False, momentum])


def test_a_fused_momentum_with_dampening_is_rejected_where_gradients_are_scaled(data, tmp_path):
    make = partial(torch.optim.SGD, lr=0.01, momentum=0.9, dampening=0.5, fused=True)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(UserError, match="fused=true does not work with dampening in 16-mixed precision; add --model"):
        trainer(tmp_path, max_epochs=1, plugins=[precision]).fit(Classifier(3, optimizer=make), data)


def test_a_resumed_epoch_that_has_only_its_smaller_batch_left_does_not_compile_that(data, tmp_path, monkeypatch):
    compiled = []

    def compile_(forward, **options):
        return lambda images: (compiled.append(len(images)), forward(images))[1]

    monkeypatch.setattr("torch.compile", compile_)
    monkeypatch.setattr("cbam_pl.training.classifier.missing_to_compile", lambda device: "")
    options = {"max_epochs": 2, "limit_val_batches": 0}
    save = LambdaCallback(
        on_train_batch_end=lambda trainer, model, outputs, batch, index: (
            trainer.save_checkpoint(tmp_path / "cut.ckpt") if trainer.global_step == 5 else None
        )
    )
    trainer(tmp_path, **options, callbacks=[save]).fit(Classifier(3, compile=True), data)
    assert compiled == [16] * 10  # of twice 93 − 9 = 84 images, all but the last batches, of four
    compiled.clear()
    trainer(tmp_path, **options).fit(Classifier(3, compile=True), data, ckpt_path=tmp_path / "cut.ckpt")
    assert compiled == [16] * 5


def test_a_network_with_synchronised_batch_norm_is_not_compiled(data, tmp_path, monkeypatch):
    monkeypatch.setattr("cbam_pl.training.classifier.missing_to_compile", lambda device: "")
    for compile_, context in (
        (None, nullcontext()),
        (True, pytest.raises(UserError, match="sync_batchnorm; leave one")),
    ):
        model = Classifier(3, compile=compile_)
        model.trainer = trainer(tmp_path)
        model.configure_memory_format_and_compile(torch.device("cuda"), training=True)
        model.network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.network)
        with context:
            model.on_train_start()
            assert model._compiled is None


def test_a_training_that_begins_with_a_smaller_batch_compiles_the_full_ones_too():
    compiled = []
    model = Classifier(3)
    model._compiled = lambda images: (compiled.append(len(images)), model.network(images))[1]
    for size in (2, 4, 2, 4):
        assert model.training_logits(torch.zeros(size, 3, 32, 32)).shape == (size, 3)
    assert compiled == [2, 4, 4]


@pytest.mark.parametrize(
    ("device", "stage", "expected"), [("cuda", "fit", True), ("cuda", "test", False), ("cpu", "fit", False)]
)
def test_only_training_on_cuda_is_compiled_by_default(device, stage, expected, monkeypatch):
    monkeypatch.setattr("cbam_pl.training.classifier.missing_to_compile", lambda device: "")
    model = Classifier(3)
    model._compiled_size = 128  # of an earlier training
    model.configure_memory_format_and_compile(torch.device(device), stage == "fit")
    assert (model._compiled is not None) == expected
    assert model._compiled_size == (0 if expected else 128)
    weight = model.network.blocks[0].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_compiling_on_a_cpu_without_a_compiler_is_an_error(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError, match=r"model\.compile=true needs a C\+\+ compiler on a CPU: install no-such-compiler"
    ):
        Classifier(3, compile=True).configure_memory_format_and_compile(torch.device("cpu"), training=True)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({"triton": None}, "Triton on a GPU: pip install triton"),
        ({"CC": "no-such-compiler"}, "a C compiler on a GPU: install no-such-compiler"),
        ({"PATH": ""}, "a C compiler on a GPU: install gcc or clang"),
        ({"include": "/nowhere"}, "Python.h on a GPU: install python3-dev"),
    ],
)
def test_a_gpu_without_what_compiling_needs_trains_eagerly_unless_it_is_asked_for(found, text, monkeypatch, capsys):
    monkeypatch.setattr("cbam_pl.environment.find_spec", lambda name: found.get(name, name))
    monkeypatch.setattr("cbam_pl.environment.get_path", lambda name, scheme: found.get(name, name))
    monkeypatch.setenv("CC", "sh")  # which any machine has
    for name in {"CC", "PATH"} & found.keys():
        monkeypatch.delenv("CC")
        monkeypatch.setenv(name, found[name])
    with pytest.raises(UserError, match=f"model.compile=true needs {text}; or set model.compile=false"):
        Classifier(3, compile=True).configure_memory_format_and_compile(torch.device("cuda"), training=True)
    model = Classifier(3)
    model.configure_memory_format_and_compile(torch.device("cuda"), training=True)
    assert model._compiled is None
    assert capsys.readouterr().out == f"the training step is not compiled, which needs {text}\n"
    model.configure_memory_format_and_compile(torch.device("cuda"), training=False)
    assert not capsys.readouterr().out


def test_more_than_eight_networks_of_one_class_are_compiled(monkeypatch):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr("torch.compile", lambda function, dynamic, options: compile_(function, backend=counter))
    monkeypatch.setattr("cbam_pl.training.classifier.missing_to_compile", lambda device: "")
    for width in range(1, 11):
        model = Classifier(3, attention=AttentionConfig("none"), width=width / 4, compile=True)
        model.configure_memory_format_and_compile(torch.device("cpu"), training=True)
        model.training_logits(torch.zeros(1, 3, 32, 32))
        assert counter.frame_count == width
    torch._dynamo.reset()


def test_a_compiled_step_runs_the_hooks_of_the_network_itself_in_one_graph(monkeypatch):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr("torch.compile", lambda function, dynamic, options: compile_(function, backend=counter))
    monkeypatch.setattr("cbam_pl.training.classifier.missing_to_compile", lambda device: "")
    own = {"class_path": "torchvision.models.resnet18"}
    model = Classifier(3, network=own, attention=AttentionConfig("cbam", where="layer?"), compile=True).eval()
    model.network.register_forward_pre_hook(lambda network, arguments: (2 * arguments[0] - 1,))
    model.configure_memory_format_and_compile(torch.device("cpu"), training=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.training_logits(images), model(images))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_test_time_flip_takes_the_mean_of_an_image_and_its_mirror_image():
    torch.manual_seed(0)
    flipping, plain = Classifier(3, test_time_flip=True).eval(), Classifier(3).eval()
    plain.load_state_dict(flipping.state_dict())
    images, labels = torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)
    mirrored = torch.stack([images[..., 31 - column] for column in range(32)], 3)
    with torch.no_grad():
        straight, back = plain.network(images), plain.network(mirrored)
        assert not torch.allclose(straight, back, atol=1e-3)
        assert torch.allclose(flipping.predict_step((images, labels), 0), ((straight + back) / 2).softmax(1), atol=1e-6)
        assert torch.allclose(plain.predict_step((images, labels), 0), straight.softmax(1), atol=1e-6)
    flipping.validation_step((images, labels), 0)
    expected = float(torch.nn.functional.cross_entropy((straight + back) / 2, labels))
    assert flipping.eval_metric.compute()[0] == pytest.approx(expected, rel=1e-5)
