import time

import pytest
import torch

from cbam_pl.commands.compare.costs import Subject, measure_memory, measure_rates, median_times
from tests.commands.compare.test_plan import plan_of


@pytest.fixture(scope="module")
def plan(recipes, tmp_path_factory):
    return plan_of("--configs", recipes["none"], recipes["cbam"], "--output", tmp_path_factory.mktemp("out"))


def test_works_are_timed_in_turns_and_the_median_counts():
    order, durations = [], {"slow": iter([0, 0, 0, 0.03, 0, 0.01, 0, 0.02]), "quick": iter([0.0] * 8)}

    def work(name):
        def run():
            order.append(name)
            time.sleep(next(durations[name]))

        return run

    works = {name: work(name) for name in durations}
    times = median_times(works, rounds=3, seconds=0, device=torch.device("cpu"))
    assert order == ["slow"] * 2 + ["quick"] * 2 + ["slow", "slow", "quick", "quick"] * 3
    assert times["slow"] >= 0.02  # of at least 0.03, 0.01 and 0.02
    assert set(times) == {"slow", "quick"}


def test_a_step_trains_the_recipe_that_it_is_of(plan):
    subject = Subject(plan.configs["cbam"])
    assert subject.batch_size == 16
    before = [weights.clone() for weights in subject.classifier.network.parameters()]
    subject.train_step()
    assert all((a != b).any() for a, b in zip(before, subject.classifier.network.parameters(), strict=True))
    after = [weights.clone() for weights in subject.classifier.network.parameters()]
    subject.forward_pass(2)()
    assert not subject.classifier.training
    assert all((a == b).all() for a, b in zip(after, subject.classifier.network.parameters(), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(subject.classifier, "forward", lambda images: seen.append(images.shape))
        subject.forward_pass(256)()
        assert seen == [(256, 3, 32, 32)]


def test_rates_are_images_a_second(plan):
    rates = measure_rates({"cbam": plan.configs["cbam"]}, 1, 0.0)
    assert 1 < rates["cbam"] < 1e6


def test_memory_is_that_of_a_process_of_its_own(plan):
    hog = bytearray(1_500_000_000)
    hog[::4096] = b"x" * len(hog[::4096])  # resident here, so that it would show if it were counted
    memory = measure_memory(plan.configs["cbam"], 1)
    assert 100 < memory < 1400
    del hog
