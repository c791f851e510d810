"""`fit`: the files that it writes, the points that it logs, and the run that it resumes or begins."""

import shutil

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from tests.helpers import Break, callbacks, checkpoint, fit, one_line, scalars


def test_fit_writes_the_files_of_a_run(trained):
    root, outcome = trained
    run = root / "checkpoints/tiny/version_0"
    logs = root / "logs/tiny/version_0"
    assert sorted(path.name for path in run.iterdir()) == ["best.ckpt", "last.ckpt"]
    names = sorted(path.name for path in logs.iterdir() if not path.name.startswith("events"))
    assert names == [".lock", "config.yaml", "metrics.csv"]
    assert f"test it      python train.py test --ckpt_path {run}/best.ckpt" in outcome.out
    assert "1,147,305 parameters" in outcome.out  # three classes: 7 · 513 fewer than 1,150,896
    assert "84 training and 9 validation images" in outcome.out


def test_fit_writes_the_tags_at_their_steps(trained):
    root, _ = trained
    logged = scalars(root / "logs/tiny/version_0")
    gates = {tag for tag in logged if tag.startswith("val_gates/")}  # see inspect/test_monitor.py
    assert set(logged) - gates == {"train/loss_step", "train/loss", "train/acc", "val/loss", "val/acc", "lr"}
    assert [step for step, _ in logged["train/loss_step"]] == list(range(1, 13))  # 84 images are 6 batches of 16
    for tag in ("train/loss", "train/acc", "val/loss", "val/acc", "lr"):
        assert [step for step, _ in logged[tag]] == [1, 2]
    sizes = torch.tensor([16, 16, 16, 16, 16, 4] * 2)
    losses = torch.tensor([value for _, value in logged["train/loss_step"]])
    means = (losses * sizes).view(2, 6).sum(1) / 84
    assert [value for _, value in logged["train/loss"]] == pytest.approx(means.tolist(), abs=1e-6)
    assert logged["lr"][0][1] == pytest.approx(0.002)


def test_best_is_the_epoch_of_the_highest_validation_accuracy(trained):
    root, _ = trained
    accuracies = [value for _, value in scalars(root / "logs/tiny/version_0")["val/acc"]]
    assert checkpoint(root, "best")["epoch"] == accuracies.index(max(accuracies))
    assert checkpoint(root, "last")["epoch"] == 1


def test_a_second_run_takes_the_next_version(trained, command, recipe, tmp_path):
    root = shutil.copytree(trained[0], tmp_path / "run")
    assert command("fit", "--config", recipe, "--trainer.default_root_dir", root, "--seed", 4).status == 0
    assert (root / "checkpoints/tiny/version_1/best.ckpt").is_file()
    first, second = checkpoint(root), checkpoint(root, version=1)
    assert not torch.equal(*(c["state_dict"]["network.blocks.0.conv.weight"] for c in (first, second)))


def test_a_saved_configuration_trains_the_same_again(trained, command, tmp_path):
    saved = trained[0] / "logs/tiny/version_0/config.yaml"
    outcome = command("fit", "--config", saved, "--trainer.default_root_dir", tmp_path)
    assert outcome.status == 0, outcome.err
    weights = [checkpoint(root)["state_dict"]["network.blocks.0.conv.weight"] for root in (trained[0], tmp_path)]
    assert torch.equal(*weights)


def test_val_size_zero_validates_on_the_test_split_and_says_so(command, recipe, tmp_path):
    with pytest.warns(UserWarning, match="selected on the test set"):
        outcome = command(
            "fit", "--config", recipe, "--data.val_size", 0, "--trainer.max_epochs", 1,
            "--trainer.default_root_dir", tmp_path,
        )  # fmt: skip
    assert outcome.status == 0, outcome.err
    tested = command("test", "--trainer.default_root_dir", tmp_path, "--ckpt_path", "last")
    figures = checkpoint(tmp_path)["figures"]
    assert f"test/loss  {figures['val/loss']:.4f}" in tested.out


def test_a_last_batch_of_one_image_is_rejected_before_the_first_step(command, recipe, tmp_path):
    # 64 training images, of which resnet18 at the end has one position each.
    options = ["--model.arch", "resnet18", "--data.image_size", 8, "--data.batch_size", 63]
    error = one_line(command(*fit(recipe, tmp_path, *options)))
    assert "data.batch_size=63 leaves a batch of one image of 64" in error
    assert not list(tmp_path.glob("*/*"))
    # Frozen batch norm has no need of the batch's variance.
    frozen = ["--model.freeze", "stages.3", "--trainer.max_epochs", 1]
    outcome = command(*fit(recipe, tmp_path, *options, *frozen))
    assert outcome.status == 0, outcome.err


def test_a_dry_run_writes_nothing(command, recipe, tmp_path):
    outcome = command(*fit(recipe, tmp_path, "--trainer.fast_dev_run", "true"))
    assert outcome.status == 0, outcome.err
    assert not list(tmp_path.iterdir())
    outcome = command(*fit(recipe, tmp_path, "--trainer.fast_dev_run", 3, *callbacks(Break, step=2)))
    assert outcome.status == 143, outcome.err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_does_not_resume(trained, command, recipe):
    error = one_line(command(*fit(recipe, trained[0], "--trainer.fast_dev_run", "true", "--ckpt_path", "last")))
    assert error == "error: trainer.fast_dev_run tries a new training; leave it out, or --ckpt_path"


def test_a_process_of_several_does_not_train_alone(command, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 3)  # as RANK, LOCAL_RANK or SLURM_PROCID have it
    error = one_line(command(*fit(recipe, tmp_path)))
    assert error.startswith("error: this is process 3 of several, but trainer.devices × trainer.num_nodes is 1; give ")
    assert not list(tmp_path.iterdir())
