"""The networks of weights/: small, complete, and as accurate as their cards say."""

import json

import pytest
import torch

import cbam_pl
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.errors import UserError
from tests.helpers import REPOSITORY

FOLDERS = sorted(path.parent for path in (REPOSITORY / "weights").glob("*/config.json"))


def test_together_they_have_at_most_8_mb():
    assert sum(path.stat().st_size for path in (REPOSITORY / "weights").rglob("*") if path.is_file()) <= 8e6


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_accuracy_of_the_card_is_that_of_the_network(folder):
    network = cbam_pl.load_network(folder)
    config = json.loads((folder / "config.json").read_text())
    settings, stored = config["checkpoint"]["datamodule_hyper_parameters"], config["record"]["stored"]
    root = REPOSITORY / "data"
    if not (root / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[settings["dataset"]]).is_dir():
        pytest.skip(f"{settings['dataset']} is not in {root}; `test` downloads it")
    data = ImageDataModule(settings["dataset"], str(root))
    try:
        data.prepare_data()
        data.setup("test")
    except UserError as error:
        pytest.skip(str(error))
    images = data.images("test")
    assert network.classes == data.classes
    correct = 0
    with torch.inference_mode():
        for pixels, labels in zip(images.pixels.split(500), images.labels.split(500), strict=True):
            correct += int((network(network.preprocess(pixels)).argmax(1) == labels).sum())
    assert stored["images"] == len(images) == 10_000
    # Another order of sums may decide otherwise between two classes with the same probability.
    assert correct / 10_000 == pytest.approx(stored["figures"]["accuracy"], abs=2e-4)
    assert f" {stored['figures']['accuracy']:.4f} |" in (folder / "README.md").read_text()
