import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torchmetrics.functional.classification import multiclass_calibration_error

from cbam_pl.inspect.calibration import fit_temperature, measure_images, reliability


def predictions(classes=4, images=300, scale=2.0):
    generator = np.random.default_rng(classes)
    logits = scale * generator.normal(size=(images, classes))
    return logits, generator.integers(classes, size=images)


def ece_by_loops(probabilities, labels):
    total = 0.0
    for index in range(15):
        members = [
            (max(row), max(range(len(row)), key=row.__getitem__) == label)
            for row, label in zip(probabilities, labels, strict=True)
            if index / 15 < max(row) <= (index + 1) / 15
        ]
        if members:
            accuracy = sum(right for _, right in members) / len(members)
            confidence = sum(value for value, _ in members) / len(members)
            total += len(members) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("classes", [2, 4, 25])
def test_the_measures_by_plain_loops(classes):
    logits, labels = predictions(classes)
    probabilities = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits.tolist()]
    expected = {
        "nll": [-math.log(row[label]) for row, label in zip(probabilities, labels, strict=True)],
        "brier": [
            sum((p - (index == label)) ** 2 for index, p in enumerate(row))
            for row, label in zip(probabilities, labels, strict=True)
        ],
    }
    if classes >= 20:
        expected["top5"] = [label in np.argsort(row)[-5:] for row, label in zip(probabilities, labels, strict=True)]
    found = measure_images(log_softmax(logits, axis=1), labels)
    assert set(found) == {*expected, "ece"}
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.array(values, dtype=float)), name
    assert found["ece"].mean() == pytest.approx(ece_by_loops(probabilities, labels))
    tensors = torch.tensor(probabilities), torch.tensor(labels)
    assert found["ece"].mean() == pytest.approx(float(multiclass_calibration_error(*tensors, classes, 15)), abs=1e-6)


def test_of_equal_probabilities_the_first_classes_are_the_five_highest_as_the_first_is_the_predicted():
    logs = log_softmax(np.zeros((25, 25)), axis=1)  # such rows are common among half-precision outputs
    assert measure_images(logs, np.arange(25))["top5"].tolist() == [1] * 5 + [0] * 20


def test_a_bin_includes_its_right_end_and_the_last_one_a_confidence_of_1():
    probabilities = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.6, 0.4], [0.25, 0.35, 0.4]])
    labels = np.array([0, 1, 1, 2])
    with np.errstate(divide="ignore"):
        logs = np.log(probabilities)
    bins = reliability(logs, labels)
    assert {index: row["images"] for index, row in enumerate(bins) if row["images"]} == {5: 1, 8: 1, 14: 2}
    assert bins[14] == {"images": 2, "confidence": 1.0, "accuracy": 0.5}
    # Half of the images are off by one half, the others by 0.4 and 0.6.
    assert measure_images(logs, labels)["ece"].mean() == pytest.approx((2 * 0.5 + 0.4 + 0.6) / 4)


def test_the_bins_give_the_calibration_error():
    logits, labels = predictions()
    logs = log_softmax(logits, axis=1)
    bins = reliability(logs, labels)
    total = sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / len(labels)
    assert measure_images(logs, labels)["ece"].mean() == pytest.approx(total)


@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_the_temperature_has_the_least_nll(temperature):
    logits, _ = predictions(5, 4000)
    generator = np.random.default_rng(1)
    true = np.exp(log_softmax(logits / temperature, axis=1))
    labels = np.array([generator.choice(5, p=row) for row in true])
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.1)

    def nll(value):
        return float(torch.nn.functional.cross_entropy(torch.tensor(logits / value), torch.tensor(labels)))

    grid = found * np.linspace(0.9, 1.1, 41)
    assert min(grid, key=nll) == pytest.approx(found)


def test_without_mistakes_the_temperature_is_the_lowest():
    assert fit_temperature(np.eye(3), np.arange(3)) == pytest.approx(0.05, rel=1e-3)
