import math

import pytest
import torch
import torch.nn.functional as F

from cbam_pl.training.metrics import LossAndAccuracy


def test_means_are_over_images_not_over_batches():
    metric = LossAndAccuracy()
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(23, 4, generator=generator), torch.randint(4, (23,), generator=generator)
    for part in (slice(0, 8), slice(8, 16), slice(16, 23)):
        metric.update(F.cross_entropy(logits[part], labels[part]), logits[part], labels[part])
    loss, acc, count = metric.compute()
    assert loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert (acc, count) == ((logits.argmax(1) == labels).double().mean(), 23)


def test_a_reset_metric_begins_anew():
    metric = LossAndAccuracy()
    for value in (1.0, 3.0):
        metric.update(torch.tensor(value), torch.eye(2), torch.tensor([0, 0]))
        assert metric.compute() == (value, 0.5, 2)
        metric.reset()


def test_training_follows_a_test_in_inference_mode():
    metric = LossAndAccuracy()
    with torch.inference_mode():
        metric.reset()
    metric.update(torch.tensor(2.0), torch.eye(2), torch.tensor([0, 0]))
    assert metric.compute() == (2.0, 0.5, 2)


def test_sums_restore_the_middle_of_an_epoch():
    whole, first, second = LossAndAccuracy(), LossAndAccuracy(), LossAndAccuracy()
    for metric in (whole, first):
        metric.update(torch.tensor(0.1), torch.eye(3), torch.tensor([0, 1, 0]))
    second.add(*first.sums())
    for metric in (whole, second):
        metric.update(torch.tensor(0.7), torch.eye(2), torch.tensor([0, 1]))
    assert second.compute() == whole.compute()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sums_are_float64_whatever_the_network_is(dtype):
    metric = torch.nn.Sequential(LossAndAccuracy()).to(dtype)[0]
    for _ in range(1000):
        metric.update(torch.tensor(0.1, dtype=dtype), torch.eye(2, dtype=dtype), torch.tensor([0, 1]))
    assert metric.compute()[0] == pytest.approx(float(torch.tensor(0.1, dtype=dtype)), rel=1e-12)


def test_a_loss_that_is_not_finite_stays_so_and_accuracy_stays_a_fraction():
    metric = LossAndAccuracy()
    metric.update(torch.tensor(math.nan), torch.full((4, 3), math.nan), torch.tensor([0, 1, 2, 0]))
    metric.update(torch.tensor(1.0), torch.eye(3), torch.tensor([0, 1, 2]))
    loss, acc, _ = metric.compute()
    assert math.isnan(loss)
    assert 0 <= acc <= 1
