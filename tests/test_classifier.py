from functools import partial

import pytest
import torch
from lightning import Trainer

from cbam_pl.attention import AttentionConfig
from cbam_pl.classifier import Classifier, EpochMeans
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.errors import UserError


@pytest.fixture
def data(image_folder):
    return ImageDataModule("folder", str(image_folder), batch_size=16)


def trainer(tmp_path, **options):
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path, **options,
    )  # fmt: skip


def test_means_are_over_images_not_over_batches():
    means = EpochMeans()
    means.to(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(23, 4, generator=generator), torch.randint(4, (23,), generator=generator)
    for part in (slice(0, 8), slice(8, 16), slice(16, 23)):
        means.note(torch.nn.functional.cross_entropy(logits[part], labels[part]), logits[part], labels[part])
    loss, acc = means.finish()
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-6)
    assert acc == (logits.argmax(1) == labels).double().mean()


def test_means_start_anew_after_each_epoch():
    means = EpochMeans()
    means.to(torch.device("cpu"))
    for value in (1.0, 3.0):
        means.note(torch.tensor(value), torch.eye(2), torch.tensor([0, 0]))
        assert means.finish() == (value, 0.5)


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


def test_dropout_is_a_function_of_seed_and_epoch(data, tmp_path):
    weights = []
    for disturbance in (1, 2):
        torch.manual_seed(0)
        model = Classifier(3)
        torch.manual_seed(disturbance)
        trainer(tmp_path, max_epochs=1).fit(model, data)
        weights.append(model.state_dict()["network.classifier.1.weight"])
    assert torch.equal(*weights)


def test_an_optimizer_that_refuses_its_settings_is_a_mistake_of_the_user(data, tmp_path):
    model = Classifier(3, optimizer=partial(torch.optim.SGD, lr=-1.0))
    with pytest.raises(UserError, match=r"model\.optimizer or model\.lr_scheduler: Invalid learning rate"):
        trainer(tmp_path, max_epochs=1).fit(model, data)


def test_gradient_accumulation_logs_one_loss_per_optimizer_step(data, tmp_path):
    logged = []

    model = Classifier(3)
    model._log = lambda values, step: logged.append((step, values))
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=1).fit(model, data)
    steps = [step for step, values in logged if "train/loss_step" in values]
    assert steps == [1, 2, 3]


def test_a_checkpoint_rebuilds_the_network(data, tmp_path):
    model = Classifier(3, arch="resnet18", attention=AttentionConfig(kind="spatial", kernel_size=3))
    fitted = trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    fitted.fit(model, data)
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.hparams["attention"]["kernel_size"] == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
