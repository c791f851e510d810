import io
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.inspect import drawing
from cbam_pl.inspect.curves import read_metrics
from cbam_pl.inspect.gates import attention_maps, gate_health
from cbam_pl.inspect.monitor import NetworkMonitor
from cbam_pl.training.checkpoint import load_classifier, read_checkpoint
from tests.helpers import checkpoint


def events_of(root, version=0):
    events = EventAccumulator(str(root / f"logs/tiny/version_{version}"), {"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def fit(command, recipe, root, *options):
    outcome = command("fit", "--config", recipe, "--trainer.default_root_dir", root, "--pictures_every", 5, *options)
    assert outcome.status == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def four(tmp_path_factory, command, recipe):
    """A run of four epochs with pictures every third."""
    root = tmp_path_factory.mktemp("four")
    fit(command, recipe, root, "--trainer.max_epochs", 4, "--pictures_every", 3)
    return root


def picture(event):
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))


def test_pictures_are_of_the_first_each_third_and_the_last_epoch(four):
    events = events_of(four)
    assert set(events.Tags()["images"]) == {"pictures/attention", "pictures/features", "pictures/confusion"}
    for tag in events.Tags()["images"]:
        assert [event.step for event in events.Images(tag)] == [1, 3, 4]
        pictures = [picture(event) for event in events.Images(tag)]
        assert not np.array_equal(pictures[0], pictures[1])  # the network has changed
        for pixels in pictures:
            assert len(np.unique(pixels.astype(int) @ [65536, 256, 1])) > 100


def test_pictures_show_eight_fixed_validation_images(four, image_folder):
    data = ImageDataModule("folder", str(image_folder), seed=3)
    data.setup()
    images = data.images("val")  # nine
    for event in events_of(four).Images("pictures/attention"):
        pixels = picture(event)
        for index in range(8):
            top = len(pixels) - 40 - (8 - index) * 142  # 40 pixels below the images, and 14 from one to the next
            shown = pixels[top : top + 128, 160:288].reshape(32, 4, 32, 4, 3)[:, 1, :, 1]  # each pixel is 4×4
            assert np.array_equal(shown, images.pixels[index].permute(1, 2, 0).numpy())


def test_captions_are_of_both_mirror_images_where_the_validation_is(
    tmp_path, command, recipe, image_folder, monkeypatch
):
    shown = []
    describe = drawing.describe
    monkeypatch.setattr(drawing, "describe", lambda logits, *more: shown.append(logits) or describe(logits, *more))
    fit(command, recipe, tmp_path, "--trainer.max_epochs", 1, "--model.test_time_flip", "true")
    path = tmp_path / "checkpoints/tiny/version_0/last.ckpt"
    model = load_classifier(path, checkpoint(tmp_path)).eval()
    data = ImageDataModule("folder", str(image_folder), seed=3)
    data.setup()
    with torch.no_grad():
        expected = model.evaluation_logits(data.normalise(data.images("val").pixels[:8]))
    torch.testing.assert_close(shown[0], expected)


def test_health_is_that_of_the_networks_gates(four, image_folder):
    events = events_of(four)
    last = checkpoint(four)
    classifier = load_classifier(four, last)
    data = ImageDataModule("folder", str(image_folder), seed=3)
    data.setup()
    pixels = data.images("val").pixels / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    for block, maps in attention_maps(classifier.network, (pixels - mean) / std).items():
        for name, value in gate_health(maps).items():
            logged = events.Scalars(f"val_gates/{block}/{name}")
            assert [event.step for event in logged] == [1, 2, 3, 4]
            assert logged[-1].value == pytest.approx(value, abs=1e-5)


def test_confusion_adds_up_to_the_validation_accuracy(tmp_path, command, recipe, image_folder, monkeypatch):
    drawn, draw = [], drawing.draw_confusion
    monkeypatch.setattr(drawing, "draw_confusion", lambda counts, *more: drawn.append(counts) or draw(counts, *more))
    fit(command, recipe, tmp_path, "--trainer.max_epochs", 3, "--pictures_every", 1)
    accuracies = [row["val/acc"] for row in read_metrics(tmp_path / "logs/tiny/version_0")]
    assert len(drawn) == len(accuracies) == 3
    for counts, accuracy in zip(drawn, accuracies, strict=True):
        assert counts.dtype == torch.int64
        assert counts.sum(1).tolist() == [3, 3, 3]  # nine validation images, the same share of each class
        assert counts.trace() / 9 == pytest.approx(accuracy)
    last = tmp_path / "checkpoints/tiny/version_0/last.ckpt"
    data = ImageDataModule("folder", str(image_folder), seed=3)
    data.setup()
    images, expected = data.images("val"), torch.zeros(3, 3, dtype=torch.int64)
    with torch.no_grad():
        predicted = load_classifier(last, read_checkpoint(last)).eval()(data.normalise(images.pixels)).argmax(1)
    for true, guess in zip(images.labels, predicted, strict=True):
        expected[true, guess] += 1
    assert torch.equal(drawn[-1], expected)


def test_hyperparameters_stand_beside_the_final_figures(four):
    folder = four / "logs/tiny/version_0"
    assert [path for path in folder.iterdir() if path.is_dir()] == []  # no second run in TensorBoard's list
    events = events_of(four)
    plugin = events.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(plugin["_hparams_/session_start_info"]).session_start_info
    values = {name: value.string_value or value.number_value for name, value in start.hparams.items()}
    assert values["model.arch"] == "cnn"
    assert values["model.attention.kind"] == "cbam"
    assert values["optimizer"] == "Adam"
    assert values["lr"] == pytest.approx(0.002)
    assert values["data.batch_size"] == 16
    assert values["max_epochs"] == 4
    assert "momentum" not in values  # Adam has none
    experiment = plugin_data_pb2.HParamsPluginData.FromString(plugin["_hparams_/experiment"]).experiment
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert metrics == {"train/loss", "train/acc", "val/loss", "val/acc"}
    for tag in metrics:  # measured once an epoch, and not once more for the table
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4]


def test_a_training_that_max_steps_ends_inside_an_epoch_has_hyperparameters_but_no_picture_of_it(
    command, recipe, tmp_path
):
    fit(command, recipe, tmp_path, "--trainer.max_epochs", 4, "--trainer.max_steps", 15)  # epochs of six steps
    events = events_of(tmp_path)
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
    assert [event.step for event in events.Images("pictures/features")] == [1]


def test_the_graph_is_there(four):
    names = [node.name for node in events_of(four).Graph().node]
    assert any("attention" in name and "blocks" in name for name in names)


def test_training_with_pictures_is_training_without_them_bit_for_bit(four, tmp_path, command, recipe, monkeypatch):
    for hook in ("on_train_start", "on_validation_batch_end", "on_train_epoch_end", "on_train_end"):
        monkeypatch.setattr(NetworkMonitor, hook, lambda *_: None)
    fit(command, recipe, tmp_path, "--trainer.max_epochs", 4)
    assert events_of(tmp_path).Tags()["images"] == []
    ours, theirs = checkpoint(four)["state_dict"], checkpoint(tmp_path)["state_dict"]
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    table = "logs/tiny/version_0/metrics.csv"
    assert (four / table).read_text() == (tmp_path / table).read_text()


def test_zero_switches_the_pictures_off(tmp_path, command, recipe):
    fit(command, recipe, tmp_path, "--trainer.max_epochs", 1, "--pictures_every", 0)
    events = events_of(tmp_path)
    assert events.Tags()["images"] == []
    assert len(events.Scalars("val_gates/blocks.0/spatial_std")) == 1


def test_a_resumed_run_goes_on_with_its_pictures(four, tmp_path, command, recipe):
    root = shutil.copytree(four, tmp_path / "run")
    fit(command, recipe, root, "--trainer.max_epochs", 5, "--pictures_every", 3, "--ckpt_path", "last")
    # Those of a run of five epochs at once: epoch 4 had them as the last one, which it no longer is.
    assert [event.step for event in events_of(root).Images("pictures/features")] == [1, 3, 5]


def test_a_constant_gate_is_warned_of_once(tmp_path, command, recipe):
    # A gate of logits zero everywhere: the authors' form starts so, and at this learning rate it stays so.
    options = ("--model.attention.preset", "official", "--model.optimizer.init_args.lr", "1e-12")
    with pytest.warns(UserWarning, match="the spatial gate of blocks") as caught:
        fit(command, recipe, tmp_path, *options)
    messages = [str(warning.message) for warning in caught if "spatial gate of" in str(warning.message)]
    constant = [message for message in messages if "is constant in epoch 1" in message]
    assert len(constant) == 3  # each block once, though there are two epochs
    assert "0.500 everywhere, with a standard deviation below 0.001 in each of 9 validation images" in constant[0]
    assert "scales all positions alike, so it attends to none" in constant[0]


def test_a_channel_gate_without_effect_is_warned_of_too(tmp_path, command, recipe):
    # Weight decay leaves nothing of the weights; in long trainings this has happened to the gates alone.
    decay = ("--model.optimizer.lr", "1e-6", "--model.optimizer.weight_decay", "1e6", "--pictures_every", 0)
    options = ("--model.attention.kind", "se", "--model.optimizer", "AdamW", *decay)
    with pytest.warns(UserWarning, match="the channel gate of blocks") as caught:
        fit(command, recipe, tmp_path, *options)
    (message,) = [str(warning.message) for warning in caught if "gate of blocks.0 " in str(warning.message)]
    assert "is constant in epoch 1: 0.500 everywhere, with a standard deviation below 0.001" in message
    assert "it scales all channels alike, so it attends to none" in message
    assert "val_gates/blocks.0/channel_std" in message
    (first, _) = events_of(tmp_path).Scalars("val_gates/blocks.0/channel_std")
    assert first.value < 1e-3


@pytest.mark.slow
def test_a_picture_that_cannot_be_drawn_does_not_end_the_training(tmp_path, command, recipe, monkeypatch):
    def fail(*arguments):
        raise ValueError("the output of blocks.0 holds NaN or infinity")

    monkeypatch.setattr("cbam_pl.inspect.drawing.draw_features", fail)
    with pytest.warns(UserWarning, match="no pictures/features in epoch 1: the output of blocks.0 holds NaN") as caught:
        fit(command, recipe, tmp_path)
    assert sum("no pictures/features" in str(warning.message) for warning in caught) == 1
    assert set(events_of(tmp_path).Tags()["images"]) == {"pictures/attention", "pictures/confusion"}


NETWORKS = """
from torch import nn
from cbam_pl import CBAM

class Shares(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.attention, self.head = nn.Conv2d(3, 8, 3), CBAM(8), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.attention(self.attention(self.conv(x))).mean((2, 3)))

class Expert(nn.Conv2d):
    def gates(self, x):
        return x.mean((2, 3)).softmax(1)

class Experts(Shares):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.attention = Expert(8, 8, 1)

    def forward(self, x):
        return self.head(self.attention(self.conv(x)).mean((2, 3)))

class Router(nn.Conv2d):
    def gates(self, pooled):
        return self(pooled[..., None, None]).softmax(1)

class Routed(Experts):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.attention = Router(8, 8, 1)

class Flat(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1))
"""


@pytest.mark.parametrize(
    ("network", "message", "count"),
    [
        ("Shares", "^no (statistics of the gates|pictures/.*) in TensorBoard: the attention of CBAM runs twice", 2),
        ("Experts", "^no (statistics of the gates|pictures/.*) in TensorBoard: the attention of Expert has gates", 2),
        ("Routed", "^no (statistics of the gates|pictures/.*) in TensorBoard: the attention of Router has gates", 2),
        ("Flat", "^no pictures/features and pictures/attention in TensorBoard: no module of .* gives", 1),
    ],
)
def test_what_cannot_be_seen_in_a_network_does_not_end_its_training(
    network, message, count, tmp_path, command, image_folder, monkeypatch
):
    (tmp_path / "odd_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"model: {{network: odd_networks.{network}, attention: {{kind: none}}}}\n"
        f"data: {{dataset: folder, root: {image_folder}, batch_size: 16}}\n"
        "trainer: {max_epochs: 2, accelerator: cpu}\n"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        outcome = command("fit", "--config", recipe, "--trainer.default_root_dir", tmp_path)
    assert outcome.status == 0, outcome.err
    assert len([one for one in caught if re.search(message, str(one.message))]) == count
    assert "pictures/confusion" in events_of(tmp_path).Tags()["images"]


@pytest.mark.parametrize("kind", ["none", "se"])
def test_networks_without_spatial_gates_are_monitored_too(tmp_path, command, recipe, kind):
    fit(command, recipe, tmp_path, "--model.attention.kind", kind, "--trainer.max_epochs", 1)
    events = events_of(tmp_path)
    assert ("pictures/attention" in events.Tags()["images"]) == (kind == "se")
    assert "pictures/features" in events.Tags()["images"]
    assert any("val_gates" in tag for tag in events.Tags()["scalars"]) == (kind == "se")


def test_a_negative_interval_is_rejected():
    with pytest.raises(ValueError, match="pictures_every=-1 must be at least 0, which means no pictures"):
        NetworkMonitor(-1)


def test_confusion_is_only_of_epochs_that_were_validated(command, recipe, tmp_path):
    options = ["--trainer.check_val_every_n_epoch", 2, "--pictures_every", 1]
    fit(command, recipe, tmp_path, *options)
    events = events_of(tmp_path)
    assert [event.step for event in events.Images("pictures/confusion")] == [2]
    assert [event.step for event in events.Images("pictures/attention")] == [1, 2]
