"""The networks of weights/: small, complete, and as accurate as their cards say."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import cbam_pl
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.errors import UserError
from cbam_pl.training.classifier import Classifier
from cbam_pl.training.weights_folder import write_folder
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


@pytest.mark.slow
def test_the_python_of_the_page_runs(tmp_path):
    """docs/weights.md, on a network of the same kind that was not trained."""
    data = ImageDataModule("cifar10")
    checkpoint = {
        "format": 2, "epoch": 0, "global_step": 1, "figures": {}, "run_conditions": {},
        "state_dict": (classifier := Classifier(10, "resnet20")).state_dict(),
        "hyper_parameters": dict(classifier.hparams), "datamodule_hyper_parameters": dict(data.hparams),
        "ImageDataModule": {**data.state_dict(), "classes": [f"class {index}" for index in range(10)]},
    }  # fmt: skip
    write_folder(tmp_path / "weights/cbam_resnet20_cifar10", checkpoint, "float16", {}, "card")
    (tmp_path / "docs").symlink_to(REPOSITORY / "docs")
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/weights.md").read_text(), re.DOTALL)
    script = "\n".join(block for block in blocks if "push_to_hub" not in block)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"\['class \d', 'class \d'\]\n", run.stdout)
