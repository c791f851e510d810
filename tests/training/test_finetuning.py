"""Weights from a file, frozen modules, and learning rates by module."""

import os
import pydoc
import shutil
import warnings
from functools import partial

import pytest
import torch
from lightning import Trainer
from safetensors.torch import save_file
from torch import nn

from cbam_pl.attention import AttentionConfig
from cbam_pl.commands.export.weights import write_pretrained
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.errors import UserError
from cbam_pl.training.checkpoint import read_checkpoint
from cbam_pl.training.classifier import Classifier
from tests.helpers import RUN, assert_equal, checkpoint, one_line, plan_of

RESNET = {"class_path": "torchvision.models.resnet18", "init_args": {}}
CBAM = AttentionConfig("cbam", where="layer?.*.bn2")
NONE = AttentionConfig("none")


def classifier(num_classes=3, attention=CBAM, network=RESNET, seed=0, **options):
    torch.manual_seed(seed)
    return Classifier(num_classes, network=network, attention=attention, image_size=64, **options)


@pytest.fixture(scope="module")
def trained_elsewhere():
    """A state dict of the network without attention, for seven classes."""
    return classifier(7, NONE, seed=1).network.state_dict()


def save(weights, folder, form):
    path = folder / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(weights, path)
    else:
        wrap = {"module": lambda w: {f"module.{name}": tensor for name, tensor in w.items()}}.get(form)
        torch.save(
            {"state_dict": weights, "epoch": 3} if form == "wrapped" else wrap(weights) if wrap else weights, path
        )
    return path


@pytest.mark.parametrize("form", ["plain", "wrapped", "module", "safetensors"])
def test_weights_are_loaded_and_what_is_not_is_said(form, trained_elsewhere, tmp_path):
    path = save(trained_elsewhere, tmp_path, form)
    model = classifier(weights=str(path))
    start = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    assert model.load_weights() == (
        f"120 of 154 tensors from {path}; at their start: fc.bias (7 classes in the file, 3 in the network), "
        "fc.weight (7 classes in the file, 3 in the network); attention at its start: 32 tensors"
    )
    for name, tensor in model.network.state_dict().items():
        from_file = name in trained_elsewhere and not name.startswith("fc.")
        assert torch.equal(tensor, trained_elsewhere[name] if from_file else start[name]), name


class Own(nn.Module):
    def __init__(self, num_classes, name="network", weights=None, pretrained=False, checkpoint_path=None):
        super().__init__()
        self.add_module(name, nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, num_classes)))

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


@pytest.mark.parametrize("name", ["network", "module", "other"])
@pytest.mark.parametrize("before", ["", "module.", "network.", "_orig_mod.", "network._orig_mod.", "module._orig_mod."])
def test_a_prefix_may_be_the_networks_own(name, before, tmp_path):
    own = {"class_path": f"{__name__}.Own", "init_args": {"name": name}}
    weights = classifier(3, NONE, own, seed=1).network.state_dict()
    torch.save({before + key: tensor for key, tensor in weights.items()}, tmp_path / "own.pth")
    model = classifier(3, NONE, own, weights=str(tmp_path / "own.pth"))
    assert model.load_weights() == f"2 of 2 tensors from {tmp_path / 'own.pth'}"
    assert_equal(dict(model.network.state_dict()), dict(weights))


def test_the_network_with_weights_begins_as_it_was_without_attention(trained_elsewhere, tmp_path):
    path = save(trained_elsewhere, tmp_path, "plain")
    model = classifier(7, weights=str(path))
    assert model.hparams["attention"]["start"] == "identity"
    model.load_weights()
    plain = classifier(7, NONE)
    plain.network.load_state_dict(trained_elsewhere)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), plain.eval()(images))


def test_the_start_is_the_papers_unless_there_are_weights():
    assert classifier().hparams["attention"]["start"] == "paper"
    assert Classifier(3).hparams["attention"]["start"] == "paper"
    assert classifier(attention=NONE).hparams["attention"]["start"] is None
    assert Classifier(3, weights="x.pth").hparams["attention"]["start"] == "identity"
    chosen = AttentionConfig("cbam", start="paper")
    assert Classifier(3, attention=chosen, weights="x.pth").hparams["attention"]["start"] == "paper"


def test_missing_and_unknown_weights_are_summarised(trained_elsewhere, tmp_path):
    part = {name: tensor for name, tensor in trained_elsewhere.items() if not name.startswith("layer4.1.bn")}
    path = save({**part, "ema": torch.zeros(1)}, tmp_path, "plain")
    text = classifier(7, NONE, weights=str(path)).load_weights()
    assert text == (
        f"112 of 122 tensors from {path}; not in the file, at their start: layer4.1.bn1.weight, layer4.1.bn1.bias, "
        "layer4.1.bn1.running_mean and 5 more; in the file, not in the network: ema"
    )


class Payload:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def test_files_that_are_not_weights_of_the_network_are_named(trained_elsewhere, tmp_path):
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    torch.save({"a": Payload(tmp_path / "witness")}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(Classifier(3).network.state_dict(), tmp_path / "cnn.pth")
    torch.save({**trained_elsewhere, "conv1.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "stem.pth")
    for name, message in {
        "nowhere.pth": r"cannot be read \(No such file or directory\)",
        "text.pth": "is not loaded, since that could run code|cannot be read",
        "text.safetensors": "cannot be read",
        "code.pth": "holds more than tensors and plain values and is not loaded, since that could run code",
        "list.pth": "is not a state dict, which maps names to tensors",
        "cnn.pth": r"another network: it has blocks.0.conv.weight, .* and \d+ more; the network has conv1.weight, bn1",
        "stem.pth": r"another network: conv1.weight is \(64, 3, 3, 3\) in the file and \(64, 3, 7, 7\) in",
    }.items():
        model = classifier(weights=str(tmp_path / name))
        before = {key: tensor.clone() for key, tensor in model.network.state_dict().items()}
        with pytest.raises(ValueError, match=f"^weights=.*{name} .*({message})") as caught:
            model.load_weights()
        assert "\n" not in str(caught.value)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.network.state_dict().items())
    assert not (tmp_path / "witness").exists()


@pytest.fixture
def data(image_folder):
    return ImageDataModule("folder", str(image_folder), image_size=64, batch_size=24)


def fit(model, data, tmp_path, epochs=1):
    Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=epochs,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path, limit_train_batches=2,
    ).fit(model, data)  # fmt: skip


def test_frozen_modules_keep_weights_and_statistics_and_train_their_attention(data, tmp_path):
    model = classifier(freeze=("conv1", "bn1", "layer[123]"), optimizer=partial(torch.optim.SGD, lr=0.1))
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    fit(model, data, tmp_path, epochs=2)  # the second follows a validation
    for name, after in model.network.state_dict().items():
        frozen = name.startswith(("conv1", "bn1", "layer1", "layer2", "layer3")) and ".attention." not in name
        assert torch.equal(after, before[name]) == frozen, name


@pytest.mark.parametrize(
    ("pattern", "is_frozen"),
    [("blocks.0.*", False), ("*.?.*.*", False), ("blocks.0.att*", True), ("blocks.0.attention.*", True)],
)
def test_a_wildcard_alone_does_not_name_attention(pattern, is_frozen):
    model = Classifier(3, freeze=(pattern, "blocks.0.*"))
    parameters = dict(model.network.blocks[0].named_parameters())
    assert not parameters["conv.weight"].requires_grad
    assert parameters["attention.channel.reduce.weight"].requires_grad != is_frozen


@pytest.mark.parametrize("seed", [3, 4])
def test_weights_that_may_have_seen_the_validation_images_are_noted(seed, trained, command, recipe, tmp_path):
    weights = trained[0] / "checkpoints" / RUN / "best.ckpt"
    words = ["--seed", seed, "--model.weights", weights, "--trainer.default_root_dir", tmp_path]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert command("fit", "--config", recipe, *words).status == 0
    messages = [str(one.message) for one in caught]
    assert sum("model.weights were trained on folder with seed=3" in one for one in messages) == (seed != 3)
    plan = plan_of("--configs", recipe, "--grid", "dropout=0.1,0.2", "--seeds", 3, seed + 1, "--output", tmp_path,
                   "--model.weights", weights)  # fmt: skip
    assert len(plan.notes) == 2
    assert f"with seed=3 and data.val_size=None. With the seeds {seed + 1} they may" in plan.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": "layr1"}, "^freeze='layr1' matches no module of the network; it has layer1"),
        ({"freeze": ("*",), "attention": NONE}, r"^freeze=\['\*'\] leaves nothing to train; leave a module out of it$"),
        ({"lr_factors": {"layer9": 0.1}}, "^lr_factors='layer9' matches no module"),
        ({"lr_factors": {9: 0.1}}, "^lr_factors='9' matches no module"),  # as YAML reads such a name
        ({"lr_factors": {"fc": 0.0}}, "^lr_factors: fc=0.0 must be above 0 and finite; to keep weights, use freeze$"),
        ({"lr_factors": {"fc": 0.1, "f?": 0.2}}, "^lr_factors: fc has no weights, or later patterns match them"),
        ({"lr_factors": {"relu": 0.1}}, "^lr_factors: relu has no weights"),
    ],
)
def test_patterns_without_effect_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        classifier(**options)


def test_rates_are_multiplied_by_module():
    factors = {"layer?": 0.1, "layer4": 0.5, "fc": 10.0, "layer4.*.bn2.attention": 3.0}
    model = classifier(lr_factors=factors, optimizer=partial(torch.optim.SGD, lr=0.01))
    optimizer = model.make_optimizer()
    rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
    for name, parameter in model.network.named_parameters():
        expected = 1.0
        if ".attention." in name:
            expected = 3.0 if name.startswith("layer4") else 1.0
        elif name.startswith("layer"):
            expected = 0.5 if name.startswith("layer4") else 0.1
        elif name.startswith("fc"):
            expected = 10.0
        assert rates[id(parameter)] == pytest.approx(0.01 * expected), name
    assert optimizer.param_groups[0]["lr"] == 0.01  # the one that is logged


def test_the_rate_without_factors_is_logged_where_patterns_match_all_weights(data, tmp_path):
    optimizer = partial(torch.optim.SGD, lr=0.01)
    model = Classifier(3, image_size=64, attention=NONE, lr_factors={"*": 0.5}, optimizer=optimizer)
    fit(model, data, tmp_path)
    assert model.trainer.callback_metrics["lr"] == 0.01


@pytest.mark.parametrize("name", ["OneCycleLR", "CosineAnnealingLR"])
def test_schedules_keep_the_factors(name, data, tmp_path):
    options = {"OneCycleLR": {"max_lr": 0.1, "total_steps": None}, "CosineAnnealingLR": {"T_max": 3}}[name]
    schedule = partial(getattr(torch.optim.lr_scheduler, name), **options)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    model = classifier(attention=NONE, lr_factors={"fc": 4.0}, optimizer=optimizer, lr_scheduler=schedule)
    model.lr_interval = "step"
    fit(model, data, tmp_path, epochs=2)
    (rest, fc), base = model.trainer.optimizers[0].param_groups, model.trainer.optimizers[0].defaults["lr"]
    assert fc["lr"] == pytest.approx(4 * rest["lr"])
    assert rest["lr"] != base


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("torch.optim.lr_scheduler.ReduceLROnPlateau", {"min_lr": 0.02, "patience": 0}),
        ("torch.optim.lr_scheduler.ReduceLROnPlateau", {"min_lr": [0.02, 0.002], "patience": 0}),
        ("torch.optim.lr_scheduler.CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3}),
        ("torch.optim.lr_scheduler.CosineAnnealingWarmRestarts", {"T_0": 4, "eta_min": 0.0}),
        ("cbam_pl.schedules.PiecewiseConstantLR", {"rates": {2: 0.01, 4: 0.001}}),
        ("cbam_pl.schedules.WarmupCosineLR", {"total_steps": 6, "warmup": 0.5}),
    ],
)
def test_every_rate_of_a_schedule_keeps_the_factors(schedule, options):
    optimizer, factors = partial(torch.optim.SGD, lr=0.1, momentum=0.9), {"fc": 0.1}
    make = partial(pydoc.locate(schedule), **options)
    model = classifier(attention=NONE, lr_factors=factors, optimizer=optimizer, lr_scheduler=make)
    model.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    made = model.configure_optimizers()
    rates = []
    for _ in range(6):
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step(*[1.0] * ("Plateau" in schedule))
        rates.append([group["lr"] for group in made["optimizer"].param_groups])
    assert len({rest for rest, _ in rates}) > 1
    for rest, fc in rates:
        assert fc == pytest.approx(0.1 * rest)


@pytest.mark.parametrize(("name", "length"), [("CosineAnnealingLR", "T_max"), ("CosineAnnealingWarmRestarts", "T_0")])
def test_a_rate_to_which_all_modules_fall_is_rejected_beside_factors(name, length):
    make = partial(getattr(torch.optim.lr_scheduler, name), eta_min=0.001, **{length: 3})
    model = classifier(attention=NONE, lr_factors={"fc": 0.1}, lr_scheduler=make)
    model.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    message = "^model.lr_scheduler: the schedule cannot keep model.lr_factors with eta_min=0.001; leave it out$"
    with pytest.raises(UserError, match=message):
        model.configure_optimizers()


def test_a_resumed_run_keeps_what_is_frozen_and_its_rates(command, recipe, tmp_path):
    options = ["--config", recipe, "--model.freeze", "blocks.1", "--model.lr_factors", "{blocks.0: 0.1, classifier: 2}"]
    options += ["--pictures_every", 0, "--trainer.default_root_dir"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for root, *more in ((whole, 2), (parts, 1), (parts, 2, "--ckpt_path", "last")):
        outcome = command("fit", *options, root, "--trainer.max_epochs", *more)
        assert outcome.status == 0, outcome.err
    ours, theirs = checkpoint(whole), checkpoint(parts)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(ours[key], theirs[key])
    groups = ours["optimizer_states"][0]["param_groups"]
    assert [(group["name"], group["lr_factor"]) for group in groups] == [
        ("the rest", 1.0),
        ("blocks.0", 0.1),
        ("classifier", 2.0),
    ]
    changed = [word for word in options if word != "--model.freeze" and word != "blocks.1"]
    error = one_line(command("fit", *changed, parts, "--trainer.max_epochs", 3, "--ckpt_path", "last"))
    assert "was trained with other settings: model.freeze (['blocks.1'] in the checkpoint, [] now)" in error


def test_what_a_run_started_from_is_kept_over_resumes_and_on_its_card(command, recipe, trained, tmp_path):
    weights = trained[0] / "checkpoints" / RUN / "best.ckpt"
    words = ["fit", "--config", recipe, "--pictures_every", 0, "--trainer.default_root_dir", tmp_path]
    resume = ("--ckpt_path", "last")
    for more in (
        (1, "--model.weights", weights),
        (2, *resume),
        (3, *resume, "--model.weights", os.path.relpath(weights)),
    ):
        outcome = command(*words, "--trainer.max_epochs", *more)
        assert outcome.status == 0, outcome.err
        assert checkpoint(tmp_path)["started_from"] == str(weights)
    error = one_line(
        command(*words, *resume, "--trainer.max_epochs", 4, "--model.weights", weights.with_name("last.ckpt"))
    )
    assert (
        f"model.weights ({weights} in the checkpoint, {weights.with_name('last.ckpt')} now); resume with its" in error
    )
    assert checkpoint(trained[0])["started_from"] == ""
    last = tmp_path / "checkpoints" / RUN / "last.ckpt"
    for source, output in ((last, "one"), (tmp_path / "one", "two")):
        write_pretrained(source, tmp_path / output)
        assert f"| started from | {weights} |" in (tmp_path / output / "README.md").read_text()
    write_pretrained(trained[0] / "checkpoints" / RUN / "last.ckpt", tmp_path / "anew")
    assert "started from" not in (tmp_path / "anew/README.md").read_text()
    content = checkpoint(tmp_path)
    torch.save({**content, "started_from": 3}, last)
    with pytest.raises(UserError, match="has started_from of type int, which must be str"):
        read_checkpoint(last)


@pytest.mark.parametrize("argument", [{"weights": "DEFAULT"}, {"pretrained": True}, {"checkpoint_path": "y.pth"}])
def test_what_a_network_starts_from_is_a_file_or_its_own_weights(argument):
    assert Classifier(3).started_from == ""
    assert Classifier(3, weights="x.pth").started_from == "x.pth"
    own = {"class_path": f"{__name__}.Own", "init_args": argument}
    assert classifier(attention=NONE, network=own).started_from == "the network's own weights"
    assert classifier(attention=NONE, network=own, weights="x.pth").started_from == "x.pth"


def test_frozen_batch_norms_that_a_strategy_replaces_keep_their_statistics():
    model = classifier(freeze=("bn1", "layer1"))
    model.network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.network).train()
    model.on_train_start()
    frozen = {name for name, module in model.network.named_modules() if isinstance(module, torch.nn.SyncBatchNorm)}
    frozen = {name for name in frozen if not model.network.get_submodule(name).training}
    assert frozen == {"bn1", *(f"layer1.{block}.bn{number}" for block in (0, 1) for number in (1, 2))}


def test_attention_after_batch_norms_that_a_strategy_replaces_is_in_the_training_step():
    model = classifier()
    model.network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.network)
    model.on_train_start()
    runs = []
    for name, module in model.network.named_modules():
        if name.endswith(".attention"):
            module.register_forward_hook(lambda *_: runs.append(1))
    # Without the root's hook, which does nothing in a compiled step.
    model.network.eval().forward(torch.randn(2, 3, 32, 32))
    assert len(runs) == 8


@pytest.mark.parametrize("start", ["paper", "identity"])
def test_trained_attention_goes_on_where_it_was(start, trained, image_folder, tmp_path):
    path = tmp_path / "trained.ckpt"
    torch.manual_seed(1)
    other = Classifier(3, attention=AttentionConfig("cbam", start=start))
    content = {"state_dict": other.state_dict(), "hyper_parameters": dict(other.hparams)}
    torch.save(content, path)
    torch.manual_seed(2)
    model = Classifier(3, weights=str(path))
    assert model.hparams["attention"]["start"] == start
    model.load_weights()
    assert_equal(dict(model.state_dict()), dict(other.state_dict()))
    # Other attention begins anew, whatever the names of its weights are.
    for config in (AttentionConfig("se"), AttentionConfig(reduction=8), AttentionConfig(order="parallel")):
        model = Classifier(3, attention=config, weights=str(path))
        assert model.hparams["attention"]["start"] == "identity"
        fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert "attention at its start" in model.load_weights()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, fresh[name] if ".attention." in name else other.state_dict()[name]), name
    # Unless the user says that it is to go on.
    model = Classifier(3, attention=AttentionConfig(order="parallel", start=start), weights=str(path))
    model.load_weights()
    assert_equal(dict(model.state_dict()), dict(other.state_dict()))


def test_the_attention_of_an_exported_folder_goes_on(command, recipe, tmp_path):
    options = ["--model.attention.pools", "[avg]", "--trainer.max_epochs", 1, "--trainer.default_root_dir", tmp_path]
    assert command("fit", "--config", recipe, *options).status == 0
    words = ["--format", "safetensors", "--output", tmp_path / "weights", "--trainer.default_root_dir", tmp_path]
    assert command("export", *words).status == 0
    model = Classifier(3, attention=AttentionConfig(pools=("avg",)), weights=str(tmp_path / "weights"))
    assert model.hparams["attention"]["start"] == "paper"
    assert "at its start" not in model.load_weights()


def test_trained_attention_is_not_dropped_without_a_word(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(Classifier(3).network.state_dict(), path)  # which does not say how it began
    message = (
        r"^weights=\S+ have trained attention \(blocks.0.*\); give attention.start=paper to go on with it, or .*anew$"
    )
    with pytest.raises(ValueError, match=message):
        Classifier(3, weights=str(path)).load_weights()
    for start, loaded in (("paper", 34), ("identity", 25)):
        model = Classifier(3, attention=AttentionConfig("cbam", start=start), weights=str(path))
        assert model.load_weights().startswith(f"{loaded} of ")


def test_a_fine_tuning_resumes_without_its_file_of_weights(trained, command, recipe, tmp_path):
    weights = shutil.copy(trained[0] / "checkpoints" / RUN / "best.ckpt", tmp_path / "weights.ckpt")
    words = ["fit", "--config", recipe, "--trainer.default_root_dir", tmp_path, "--model.weights", weights]
    assert command(*words, "--trainer.max_epochs", 1).status == 0
    assert checkpoint(tmp_path)["hyper_parameters"]["attention"]["start"] == "paper"
    weights.unlink()
    outcome = command(*words, "--ckpt_path", "last")
    assert outcome.status == 0, outcome.err
