"""A plain lightning.Trainer, as in a notebook: nothing of what `train.py fit` adds may be missing without a word."""

import copy
import re
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from cbam_pl import AttentionConfig, Classifier, ImageDataModule
from cbam_pl.data.shapes import load_shapes
from cbam_pl.errors import UserError
from tests.helpers import REPOSITORY, assert_equal, scalars

QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}


def parts(image_folder, **options):
    """A network with a schedule that spans the training, and images for 6 steps an epoch."""
    seed_everything(0, verbose=False)
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=None)
    data = ImageDataModule("folder", str(image_folder), batch_size=16, val_size=9)
    return Classifier(3, lr_scheduler=cycle, lr_interval="step", **options), data


def trainer(folder, name, *callbacks, **options):
    logger = TensorBoardLogger(folder, name, "", default_hp_metric=False)
    return Trainer(logger=logger, callbacks=[*callbacks], log_every_n_steps=1, **QUIET | options)


@pytest.mark.filterwarnings("ignore:.*logging interval", "ignore:.*callbacks used to create the checkpoint")
def test_the_readmes_lines_train_test_load_and_resume(image_folder, tmp_path, monkeypatch, command):
    blocks = re.findall("```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (lines,) = [block for block in blocks if "Trainer" in block]
    for theirs, ours in {
        'ImageDataModule("cifar10")': f"ImageDataModule('folder', {str(image_folder)!r}, batch_size=16)",
        "num_classes=10": "num_classes=3",
        "max_epochs=10": "max_epochs=2",
        "max_epochs=20": "max_epochs=3",
    }.items():
        assert lines.count(theirs) == 1
        lines = lines.replace(theirs, ours)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(lines, names)
    data, best = names["data"], Path(names["best"].best_model_path)
    saved = torch.load(best, weights_only=True)
    network = Classifier.load_from_checkpoint(best).network.eval()
    test = data.images("test")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    with torch.no_grad():
        logits = network((test.pixels / 255 - mean) / std)
    correct = logits.argmax(1) == test.labels
    tested = float(names["trainer"].callback_metrics["test/acc"])
    assert tested == pytest.approx(float(correct.float().mean()))
    predicted = torch.cat(Trainer(logger=False, **QUIET).predict(Classifier.load_from_checkpoint(best), data))
    assert torch.allclose(predicted, logits.softmax(1), atol=1e-5)
    logged = scalars(Path("lightning_logs/version_0"))
    assert logged["test/acc"] == [(saved["epoch"] + 1, pytest.approx(tested))]
    assert [step for step, _ in scalars(Path("lightning_logs/version_1"))["val/acc"]] == [*range(saved["epoch"] + 2, 4)]
    again = ImageDataModule.load_from_checkpoint(best)
    assert (again.classes, again.mean) == (data.classes, data.mean)
    outcome = command("test", "--ckpt_path", best)
    assert f"test/acc  {tested:.4f}" in outcome.out, outcome.err


CUTS = {
    "in an epoch": ({"every_n_train_steps": 8}, {}),
    "after short epochs": ({"every_n_epochs": 2}, {"limit_train_batches": 4}),
    "at a validation": ({"monitor": "val/acc"}, {"check_val_every_n_epoch": 2}),
    "in an epoch with two validations": ({"monitor": "val/acc"}, {"val_check_interval": 3}),
}


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize(
    "name", [name if name == "in an epoch" else pytest.param(name, marks=pytest.mark.slow) for name in CUTS]
)
def test_a_resumed_training_ends_as_one_that_was_never_stopped(name, image_folder, tmp_path):
    saving, options = CUTS[name]
    model, data = parts(image_folder)
    saved = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, **saving)
    trainer(tmp_path, "whole", saved, max_epochs=4, **options).fit(model, data)
    whole = model.state_dict()
    first = min((tmp_path / "saved").iterdir(), key=lambda path: int(path.stem.removeprefix("step=")))
    model, data = parts(image_folder)
    trainer(tmp_path, "resumed", max_epochs=4, **options).fit(model, data, ckpt_path=first)
    assert_equal(dict(model.state_dict()), dict(whole))
    logged, again = scalars(tmp_path / "whole"), scalars(tmp_path / "resumed")
    assert again.keys() == logged.keys()
    for tag, points in again.items():
        assert points == logged[tag][-len(points) :], tag


class Stop(Callback):
    """Stops the first run through a stage after some batches, as a notebook's stop button does."""

    def __init__(self, hook):
        def stop(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 1 and not self.stopped:
                self.stopped = True
                raise ZeroDivisionError

        self.stopped = False
        setattr(self, hook, stop)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end", "on_test_batch_end"])
def test_what_was_stopped_is_not_in_the_next_figures(hook, image_folder, tmp_path):
    found = {}
    for stop in (None, Stop(hook)):
        model, _ = parts(image_folder)
        data = ImageDataModule("folder", str(image_folder), batch_size=2, val_size=24)
        state = copy.deepcopy(model.network.state_dict())
        for attempt in range(2 if stop else 1):
            model.train().network.load_state_dict(state)
            name = f"{stop is None} {attempt}"
            one = trainer(tmp_path, name, *filter(None, [stop]), max_epochs=1, num_sanity_val_steps=0)
            with suppress(ZeroDivisionError):
                if hook == "on_test_batch_end":
                    one.test(model, data, verbose=False)
                else:
                    one.fit(model, data)
        assert stop is None or stop.stopped
        found[stop is None] = {name: float(value) for name, value in one.callback_metrics.items()}
    assert found[True] == found[False]


def test_weights_are_loaded_once_before_whatever_comes_first(image_folder, tmp_path):
    none = AttentionConfig("none")
    other, data = parts(image_folder, attention=none)
    torch.save(other.network.state_dict(), tmp_path / "weights.pth")
    seed_everything(1, verbose=False)
    model = Classifier(3, attention=none, weights=str(tmp_path / "weights.pth"))
    trainer(tmp_path, "a").validate(model, data, verbose=False)
    for name, weight in other.network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], weight), name
    with torch.no_grad():
        model.network.classifier[-1].bias.fill_(7)
    trainer(tmp_path, "b").validate(model, data, verbose=False)
    assert model.network.classifier[-1].bias.tolist() == [7, 7, 7]


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*defined a `validation_step`")
def test_other_loaders_train_and_a_loss_that_is_not_finite_stops(tmp_path):
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for value, message in ((0.0, None), (torch.nan, "the loss is not finite at step 3")):
        images[16:] += value
        loader = DataLoader(TensorDataset(images, torch.arange(20) % 3), batch_size=8)
        fitted = trainer(tmp_path, f"run{value}", ModelCheckpoint(tmp_path / f"saved{value}"), max_epochs=1)
        if message is None:
            fitted.fit(Classifier(3), loader)
            assert len(scalars(tmp_path / "run0.0")["train/loss_step"]) == 3
        else:
            with pytest.raises(UserError, match=message):
                fitted.fit(Classifier(3), loader)


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:.*callbacks used to create the checkpoint")
def test_a_resume_with_another_schedule_is_rejected(image_folder, tmp_path):
    model, data = parts(image_folder)
    saved = ModelCheckpoint(tmp_path / "saved")
    trainer(tmp_path, "a", saved, max_epochs=1).fit(model, data)
    again = Classifier.load_from_checkpoint(saved.best_model_path)
    with pytest.raises(
        UserError,
        match=r"lr_interval \(step in the checkpoint, epoch now\); lr_scheduler \(OneCycleLR in the checkpoint, None",
    ):
        trainer(tmp_path, "b", max_epochs=2).fit(again, data, ckpt_path=saved.best_model_path)
    given = {"lr_scheduler": model.lr_scheduler, "lr_interval": "step"}
    again = Classifier.load_from_checkpoint(saved.best_model_path, **given)
    trainer(tmp_path, "b", max_epochs=2).fit(again, data, ckpt_path=saved.best_model_path)


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:.*callbacks used to create the checkpoint")
def test_a_schedule_by_a_function_of_ones_own_is_saved_and_resumed(image_folder, tmp_path, command):
    _, data = parts(image_folder)
    halving = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.5**epoch)
    saved = ModelCheckpoint(tmp_path / "saved")
    model = Classifier(3, lr_scheduler=halving)
    trainer(tmp_path, "a", saved, max_epochs=1).fit(model, data)
    again = trainer(tmp_path, "b", max_epochs=3)
    again.fit(Classifier(3, lr_scheduler=halving), data, ckpt_path=saved.best_model_path)
    assert again.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001 / 8)
    assert command("test", "--ckpt_path", saved.best_model_path).status == 0


def test_a_classifier_can_be_copied_while_it_trains(image_folder, tmp_path):
    class Keep(Callback):
        def on_validation_end(self, trainer, pl_module):
            self.best = copy.deepcopy(pl_module)

    model, data = parts(image_folder)
    keep = Keep()
    trainer(tmp_path, "a", keep, max_epochs=1).fit(model, data)
    assert_equal(dict(keep.best.state_dict()), dict(model.state_dict()))


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_resume_by_other_words_for_the_same_is_accepted_and_another_seed_is_not(image_folder, tmp_path, trained):
    data = ImageDataModule("folder", str(image_folder), batch_size=16, seed=3, augmentation="rich")
    best = trained[0] / "checkpoints/tiny/version_0/best.ckpt"
    given = {
        "optimizer": partial(torch.optim.Adam, lr=0.002, fused=True, betas=[0.9, 0.999]),
        "lr_scheduler": partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0),
    }
    again = Classifier.load_from_checkpoint(best, **given, seed=3)
    trainer(tmp_path, "a", max_epochs=3, enable_checkpointing=False).fit(again, data, ckpt_path=best)
    other = Classifier.load_from_checkpoint(best, **given)
    with pytest.raises(UserError, match=r"other settings: seed \(3 in the checkpoint, 0 now\); give the same"):
        trainer(tmp_path, "b", max_epochs=3, enable_checkpointing=False).fit(other, data, ckpt_path=best)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_where_it_was_trained_is_kept_without_a_step_and_is_not_another_networks(image_folder, tmp_path):
    def environments(name):
        return torch.load(tmp_path / name, weights_only=True)["environments"]

    model, data = parts(image_folder)
    first = trainer(tmp_path, "first", max_epochs=1)
    first.fit(model, data)
    first.save_checkpoint(tmp_path / "first.ckpt")
    content = torch.load(tmp_path / "first.ckpt", weights_only=True)
    content["environments"][0]["commit"] = "abc"
    torch.save(content, tmp_path / "elsewhere.ckpt")

    again = trainer(tmp_path, "again", max_epochs=1)
    again.fit(*parts(image_folder), ckpt_path=tmp_path / "elsewhere.ckpt")
    again.save_checkpoint(tmp_path / "again.ckpt")
    assert environments("again.ckpt") == content["environments"]

    again.fit_loop.max_epochs = 2
    again.fit(*parts(image_folder))
    again.save_checkpoint(tmp_path / "another.ckpt")
    assert environments("another.ckpt") == environments("first.ckpt")


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:.*callbacks used to create the checkpoint")
def test_a_resume_with_other_data_is_rejected(image_folder, tmp_path):
    model, data = parts(image_folder)
    saved = ModelCheckpoint(tmp_path / "saved")
    trainer(tmp_path, "a", saved, max_epochs=1).fit(model, data)
    best = saved.best_model_path
    for changed in ({"seed": 1}, {"val_size": 12}, {"batch_size": 8}, {"augmentation": "none"}):
        other = ImageDataModule("folder", str(image_folder), **{"batch_size": 16, "val_size": 9} | changed)
        (name,) = changed
        with pytest.raises(UserError, match=rf"other settings: data\.{name} \(.* now\); give the same to ImageDataM"):
            trainer(tmp_path, "b", max_epochs=2).fit(parts(image_folder)[0], other, ckpt_path=best)
    data = ImageDataModule.load_from_checkpoint(best)
    trainer(tmp_path, "b", max_epochs=2).fit(parts(image_folder)[0], data, ckpt_path=best)


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:.*callbacks used to create the checkpoint")
def test_a_validation_of_another_split_warns(tmp_path, monkeypatch):
    few = load_shapes(0, num_train=40, num_test=10, image_size=8)
    monkeypatch.setattr("cbam_pl.data.datamodule.load_shapes", lambda *_, **__: few)
    model, kept = Classifier(10, image_size=8), {"image_size": 8, "val_size": 10, "batch_size": 40}
    one = trainer(tmp_path, "a", max_epochs=1)
    one.fit(model, ImageDataModule("shapes", **kept))
    one.save_checkpoint(tmp_path / "one.ckpt")
    for changed in ({}, {"seed": 1}, {"val_size": 20}):
        data = ImageDataModule("shapes", **kept | changed)
        with pytest.warns(UserWarning, match="may have seen images that are held") if changed else nullcontext():
            trainer(tmp_path, "b").validate(model, data, tmp_path / "one.ckpt", verbose=False)


@pytest.mark.parametrize("makes", [partial, lambda make, **given: lambda first: make(first, **given)])
def test_numpys_numbers_are_saved_as_pythons(makes, image_folder, tmp_path):
    one, half = np.int64(1), np.float64(0.5)
    adam = makes(torch.optim.Adam, lr=half, betas=(half, 0.9))
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=half, total_steps=9)
    given = {"dropout": half, "label_smoothing": half, "width": 3 * half, "image_size": 32 * one, "seed": one}
    model = Classifier(3 * one, optimizer=adam, lr_scheduler=cycle, lr_interval="step", **given)
    data = ImageDataModule("folder", str(image_folder), 16 * one, 9 * one, image_size=32 * one, seed=one)
    fitted = trainer(tmp_path, "a", max_epochs=1)
    fitted.fit(model, data)
    fitted.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert saved["optimization"]["lr_scheduler.max_lr"] == saved["hyper_parameters"]["dropout"] == 0.5
