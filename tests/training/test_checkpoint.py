"""Checkpoints that were edited, damaged or written by others: one line that names what is wrong, and nothing is run."""

import copy
import io
import os
import random
import re
import resource
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cbam_pl.attention import AttentionConfig
from cbam_pl.errors import UserError
from cbam_pl.training.checkpoint import load_classifier, read_checkpoint, save_final_checkpoint
from cbam_pl.training.classifier import Classifier
from tests.helpers import RUN, assert_equal, checkpoint, one_line


def put(path, value):
    """An edit that sets a value at the end of a path of keys."""

    def edit(saved):
        *place, last = path.split(".") if isinstance(path, str) else path
        for key in place:
            saved = saved[int(key) if isinstance(saved, list) else key]
        saved[int(last) if isinstance(saved, list) else last] = value

    return edit


def drop(path):
    def edit(saved):
        *place, last = path.split(".")
        for key in place:
            saved = saved[key]
        del saved[last]

    return edit


# Edit → what the message names.
EVERY_COMMAND = {
    "newer format": (put("format", 99), "format 99"),
    "no hyper_parameters": (drop("hyper_parameters"), "is not a checkpoint of this program"),
    "no loops": (drop("loops"), "is not a checkpoint of this program"),
    "no callbacks": (drop("callbacks"), "has no callbacks"),
    "empty loops": (put("loops", {}), "has no loops.fit_loop"),
    "text as epoch": (put("epoch", "x"), "has epoch of type str, which must be int"),
    "negative epoch": (put("epoch", -1), "epoch=-1"),
    "fraction as step": (put("global_step", 1.5), "has global_step of type float"),
    "list of weights": (put("state_dict", [1]), "has state_dict of type list"),
    "number as weight": (put("state_dict", {"network.blocks.0.conv.weight": 3}), "state_dict.network.blocks.0.conv"),
    "unknown setting": (put("hyper_parameters.from_the_future", 3), "from_the_future"),
    "other network": (put("hyper_parameters.arch", "resnet20"), "weights that do not match its settings"),
    "unknown network": (put("hyper_parameters.arch", "vgg"), "hyper_parameters.*arch='vgg'"),
    "unknown attention": (put("hyper_parameters.attention", {"kind": "foo"}), "hyper_parameters.*kind='foo'"),
    "text as attention": (put("hyper_parameters.attention", "cbam"), "hyper_parameters"),
    "text as num_classes": (put("hyper_parameters.num_classes", "3"), "hyper_parameters.num_classes"),
    "many classes": (put("hyper_parameters.num_classes", 10**12), "mean, std or classes of another length"),
    "number as classes": (put("ImageDataModule.classes", 3), "ImageDataModule.classes"),
    "text as mean": (put("ImageDataModule.mean", ["a", "b", "c"]), "ImageDataModule.mean"),
    "two means": (put("ImageDataModule.mean", [0.5, 0.5]), "ImageDataModule.mean, std or classes"),
    "fractions as ids": (
        put("ImageDataModule.train_ids", torch.zeros(3)),
        "ImageDataModule.train_ids other than an int64 tensor",
    ),
    "text as figure": (put(["figures", "val/acc"], "high"), "figures.val/acc"),
}
FIT = {
    "broken loops": (put("loops.fit_loop", {"epoch_progress": {"current": {"processed": 1}}}), "has no loops.fit_loop"),
    "text as counter": (put("loops.fit_loop.epoch_progress.total", "x"), "loops.fit_loop.epoch_progress.total"),
    "two optimizers": (put("optimizer_states", [{}, {}]), "optimizer_states"),
    "empty optimizer": (put("optimizer_states", [{}]), "has no optimizer_states.0.state"),
    "moment of another shape": (
        put(["optimizer_states", "0", "state", 0, "exp_avg"], torch.ones(3)),
        "optimizer_states.state.0.exp_avg of another shape",
    ),
    "moment of no parameter": (put(["optimizer_states", "0", "state", 99], {}), "optimizer_states.state.99, which"),
    "no learning rate": (
        put(["optimizer_states", "0", "param_groups", "0", "lr"], "x"),
        "optimizer_states.0.param_groups.0.lr of type str, which must be float",
    ),
    "other parameters": (
        put(["optimizer_states", "0", "param_groups", "0", "params"], [0, 1]),
        "optimizer_states.param_groups for other than",
    ),
    "text as schedule": (put("lr_schedulers", ["x"]), "lr_schedulers"),
    "two sums": (put("interrupted_epoch.sums", [1.0, 2.0]), "interrupted_epoch.sums other than three"),
    "text as sums": (put("interrupted_epoch.sums", "x"), "interrupted_epoch.sums"),
    "empty state of a callback": (put("callbacks", {"TrainingState": {}, "X": 3}), "callbacks.X"),
    "newer setting of the data": (put("datamodule_hyper_parameters.from_the_future", 3), "from_the_future"),
}


@pytest.fixture(scope="module")
def original(trained):
    return checkpoint(trained[0])


def edited(original, edit, root):
    saved = copy.deepcopy(original)
    edit(saved)
    path = root / "checkpoints/tiny/version_0/last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(saved, path)
    return path


def assert_one_line(outcome, path, text):
    assert outcome.status == 2, outcome.err
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith(f"error: {path} ")
    assert re.search(text, outcome.err), outcome.err


@pytest.mark.parametrize("name", EVERY_COMMAND)
def test_what_is_wrong_in_a_checkpoint_is_named(name, original, command, tmp_path):
    edit, text = EVERY_COMMAND[name]
    path = edited(original, edit, tmp_path)
    assert_one_line(command("test", "--ckpt_path", path), path, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_COMMAND)
@pytest.mark.parametrize("which", ["validate", "predict", "visualize", "fit"])
def test_every_command_names_what_is_wrong(which, name, original, command, recipe, image_folder, tmp_path):
    edit, text = EVERY_COMMAND[name]
    path = edited(original, edit, tmp_path)
    options = {"predict": ["--images", image_folder / "test/red/0.png"], "fit": ["--config", recipe]}.get(which, [])
    outcome = command(which, *options, "--ckpt_path", path)
    if (which == "fit" and "hyper_parameters" in text) or name in ("other network", "unknown setting"):
        text = "hyper_parameters|trained with other settings|" + text
    assert_one_line(outcome, path, text)


@pytest.mark.parametrize("name", FIT)
def test_what_only_a_resume_needs_is_named(name, original, command, recipe, tmp_path):
    edit, text = FIT[name]
    path = edited(original, edit, tmp_path)
    options = ["--trainer.default_root_dir", tmp_path, "--trainer.max_epochs", 4]
    outcome = command("fit", "--config", recipe, *options, "--ckpt_path", path)
    assert_one_line(outcome, path, text)
    assert torch.load(path, weights_only=True).keys() == original.keys()


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


# Files that are damaged, or of another program


@pytest.fixture(scope="module")
def damaged(trained, tmp_path_factory):
    """A copy of a finished run, whose last.ckpt a test may break."""
    root = tmp_path_factory.mktemp("damaged")
    return shutil.copytree(trained[0], root, dirs_exist_ok=True)


def rejected(command, root, *arguments):
    """What `last` says of the broken last.ckpt; it names best.ckpt instead."""
    folder = root / "checkpoints" / RUN
    error = one_line(command(*arguments, "--trainer.default_root_dir", root, "--ckpt_path", "last"))
    assert error.startswith(f"error: {folder}/last.ckpt "), error
    assert error.endswith(f"; the newest complete one is {folder}/best.ckpt"), error
    return error


def test_a_checkpoint_cut_off_at_twenty_places(trained, damaged, command, recipe):
    whole = (trained[0] / "checkpoints" / RUN / "last.ckpt").read_bytes()
    last = damaged / "checkpoints" / RUN / "last.ckpt"
    for length in [0, 1, 100, *(len(whole) * part // 16 for part in range(1, 16)), len(whole) - 22, len(whole) - 1]:
        last.write_bytes(whole[:length])
        assert "cannot be read as a checkpoint" in rejected(command, damaged, "validate")
    assert "cannot be read as a checkpoint" in rejected(
        command, damaged, "fit", "--config", recipe, "--trainer.max_epochs", 3
    )


def test_a_checkpoint_with_a_flipped_bit(trained, damaged, command):
    whole = (trained[0] / "checkpoints" / RUN / "last.ckpt").read_bytes()
    last = damaged / "checkpoints" / RUN / "last.ckpt"
    places = random.Random(0)
    for _ in range(5):  # in the weights and the optimizer's state, which are nearly all of it
        flipped = bytearray(whole)
        flipped[places.randrange(len(whole) // 10, len(whole) * 9 // 10)] ^= 1 << places.randrange(8)
        last.write_bytes(flipped)
        assert "cannot be read as a checkpoint" in rejected(command, damaged, "validate")


@pytest.mark.slow
def test_no_flipped_bit_changes_what_is_read(trained, tmp_path):
    content = checkpoint(trained[0])
    content["state_dict"] = {"weight": torch.arange(64.0)}
    content["optimizer_states"] = [{"state": {0: {"exp_avg": torch.arange(16.0)}}}]
    path = tmp_path / "small.ckpt"
    torch.save(content, path)
    whole = path.read_bytes()
    content = read_checkpoint(path)
    bits = random.Random(0)
    # Every byte of the archive's directory at the end, and every seventh of the rest; and, of each part, the bit by
    # which torch would take it for a folder, and read nothing.
    archive = zipfile.ZipFile(path)
    places = [
        (place, bits.randrange(8)) for place in [*range(0, archive.start_dir, 7), *range(archive.start_dir, len(whole))]
    ]
    entry = archive.start_dir
    for part in archive.infolist():
        places.append((entry + 38, 4))  # of its external attributes
        entry += 46 + len(part.filename) + len(part.extra)
    rejected = 0
    for place, bit in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            found = read_checkpoint(path)
        except UserError:
            rejected += 1
        else:  # in padding, or in what both readers know twice
            assert_equal(found, content)
    print(f"{rejected} of {len(places)} rejected, the others harmless")
    assert rejected > len(places) // 2


def archive(name, data):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as stream:
        stream.writestr(name, data)
    return content.getvalue()


def file_of(content, zipped=True):
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def test_a_checkpoint_of_another_program_or_with_code(damaged, command, tmp_path):
    last = damaged / "checkpoints" / RUN / "last.ckpt"
    executed = tmp_path / "executed"
    complete = torch.load(last.with_name("best.ckpt"), weights_only=True)
    for content, message in [
        (b"a text file\n" * 100, "cannot be read as a checkpoint"),
        (archive("notes.txt", "a random archive"), "cannot be read as a checkpoint"),
        (file_of(torch.nn.Linear(3, 3).state_dict()), "is not a checkpoint of this program"),
        (file_of({"state_dict": {}, "epoch": 3}), "is not a checkpoint of this program"),
        (file_of([1, 2, 3]), "is not a checkpoint of this program"),
        (file_of({**complete, "extra": Payload(executed)}), "could run code"),
        (file_of(Payload(executed)), "could run code"),
        (file_of({**complete, "extra": Payload(executed)}, zipped=False), "cannot be read as a checkpoint"),
    ]:
        last.unlink()
        last.write_bytes(content)
        assert message in rejected(command, damaged, "validate")
        assert not executed.exists()
    last.unlink()
    last.mkdir()
    assert "is a folder" in rejected(command, damaged, "validate")
    last.rmdir()
    last.symlink_to(last)
    assert f"no checkpoint at {last}" in one_line(command("validate", "--ckpt_path", last))
    last.unlink()
    # The payload is a real one.
    torch.load(io.BytesIO(file_of(Payload(executed))), weights_only=False)
    assert executed.exists()


# Code


PLACES = [
    "hyper_parameters.arch", "hyper_parameters.attention", "ImageDataModule.classes", "callbacks.TrainingState",
    "optimizer_states", "lr_schedulers", "loops.fit_loop", "state_dict", "figures", "interrupted_epoch",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_code_in_a_checkpoint_is_not_run(place, original, command, tmp_path):
    witness = tmp_path / "witness"
    path = edited(original, put(place, {"a": [Payload(witness)]}), tmp_path)
    assert_one_line(command("test", "--ckpt_path", path), path, "is not loaded, since that could run code")
    assert not witness.exists()


def test_a_checkpoint_of_the_first_format_is_read(original, command, recipe, tmp_path):
    """As the version before wrote it: other names, and means in place of sums."""

    def edit(saved):
        lr, (loss, acc, count) = saved["interrupted_epoch"]["lr"], saved.pop("interrupted_epoch")["sums"]
        saved["broken_off"] = {"lr": lr, "means": {"loss": [loss, count], "acc": [acc, count]}}
        saved["trained_with"] = {key: saved["run_conditions"][key] for key in ("max_epochs", "processes", "precision")}
        del saved["run_conditions"], saved["format"], saved["hyper_parameters"]["width"]
        loader = saved["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
        loader["taken"] = loader.pop("batches_done")

    path = edited(original, edit, tmp_path)
    options = ["--trainer.default_root_dir", tmp_path, "--trainer.max_epochs", 3]
    outcome = command("fit", "--config", recipe, *options, "--ckpt_path", path)
    assert outcome.status == 0, outcome.err
    assert torch.load(path, weights_only=True)["format"] == 2
    assert command("test", "--trainer.default_root_dir", tmp_path).status == 0


def test_a_copied_checkpoint_begins_a_run_that_has_a_best(trained, command, recipe, tmp_path):
    path = tmp_path / "elsewhere/checkpoints/tiny/version_5/last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes((trained[0] / "checkpoints/tiny/version_0/last.ckpt").read_bytes())
    outcome = command("fit", "--config", recipe, "--trainer.max_epochs", 3, "--ckpt_path", path)
    assert outcome.status == 0, outcome.err
    assert path.with_name("best.ckpt").exists()


def test_weights_that_are_not_finite_are_reported(original, command, image_folder, tmp_path):
    def edit(saved):
        saved["state_dict"]["network.blocks.0.conv.weight"].fill_(float("nan"))

    path = edited(original, edit, tmp_path)
    logs = tmp_path / "logs/tiny/version_0"
    logs.mkdir(parents=True)
    for which in ("test", "validate"):
        outcome = command(which, "--ckpt_path", path)
        assert outcome.status == 2
        assert "/loss of" in outcome.err
        assert "is not finite: the network has diverged" in outcome.err
    outcome = command("predict", "--ckpt_path", path, "--images", image_folder / "test/red/0.png")
    assert_one_line(outcome, path, "gives probabilities that are not finite")
    assert not list(logs.iterdir())  # nothing is written of them


def test_a_final_best_that_cannot_be_written_is_named(original, tmp_path):
    last, best = (tmp_path / f"{name}.ckpt" for name in ("last", "best"))
    torch.save(original, last)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=rf"cannot write {best} \(File too large\)"):
            save_final_checkpoint(SimpleNamespace(callback_metrics={}), last, best)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_names_of_recipes_are_not_patterns(trained, command, tmp_path, recipe):
    odd = tmp_path / "a[1]|b.yaml"
    odd.write_text(recipe.read_text())
    options = ["--trainer.default_root_dir", tmp_path, "--trainer.limit_train_batches", 1]
    assert command("fit", "--config", odd, *options, "--trainer.max_epochs", 1).status == 0
    outcome = command("fit", "--config", odd, *options, "--trainer.max_epochs", 2, "--ckpt_path", "last")
    assert outcome.status == 0, outcome.err
    assert "resumed      after 1 epochs" in outcome.out
    best = f"{tmp_path}/checkpoints/a[1]|b/version_0/best.ckpt"
    assert f"test it      python train.py test --ckpt_path '{best}'" in outcome.out


def test_a_file_that_the_network_was_made_with_is_neither_asked_for_nor_read():
    network = {"class_path": "torchvision.models.resnet18", "init_args": {}}
    trained = Classifier(3, network=network, attention=AttentionConfig("none"))
    network = {**network, "init_args": {"weights": "runs/mine.pth"}}
    settings = {**trained.hparams, "network": network}
    saved = {"epoch": 0, "hyper_parameters": settings, "state_dict": trained.state_dict()}
    loaded = load_classifier(Path("x.ckpt"), saved)
    assert loaded.hparams["network"]["init_args"] == {"weights": None}
