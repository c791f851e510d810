import os
import subprocess
import sys
import time

import pytest
import torch

from cbam_pl.commands.compare import command as command_module
from cbam_pl.commands.compare.costs import (
    TimedRecipe,
    in_new_process,
    measure_costs,
    peak_training_memory,
    time_recipes,
)
from cbam_pl.data.augmentation import augment
from cbam_pl.errors import UserError
from tests.helpers import one_line, plan_of


@pytest.fixture(scope="module")
def plan(recipes, tmp_path_factory):
    return plan_of("--configs", recipes["none"], recipes["cbam"], "--output", tmp_path_factory.mktemp("out"))


def test_a_step_is_the_training_step_of_the_recipe_and_an_update(plan, monkeypatch):
    torch.manual_seed(0)
    recipe = TimedRecipe(plan.configs["cbam"])
    assert recipe.batch_size == 16
    step, losses = recipe.classifier.training_step, []
    monkeypatch.setattr(recipe.classifier, "training_step", lambda *batch: losses.append(step(*batch)) or losses[-1])
    network = recipe.classifier.network
    before = [weights.clone() for weights in network.parameters()]
    recipe.train_step()
    assert len(losses) == 1
    assert sum(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)) > len(before) / 2
    after = [weights.clone() for weights in network.parameters()]
    recipe.forward_pass(2)()
    assert not recipe.classifier.training
    assert all((a == b).all() for a, b in zip(after, network.parameters(), strict=True))


def test_crops_are_those_of_the_recipe(plan, monkeypatch):
    seen = []

    def note(pixels, draws, augmentation, *crop):
        seen.append((augmentation, tuple(pixels.shape), *crop))
        return augment(pixels, draws, augmentation, *crop)

    monkeypatch.setattr("cbam_pl.data.loader.augment", note)
    crop = {"data.augmentation": "resized_crop", "data.crop_scale": 0.5, "data.image_size": 28}
    TimedRecipe(plan.configs["none"] | crop).train_step()
    assert seen == [("resized_crop", (16, 3, 32, 32), 28, 0.5)]  # a folder's images are kept 256 / 224 times as large


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_every_precision_can_be_timed(plan, precision):
    costs = time_recipes({"cbam": plan.configs["cbam"] | {"trainer.precision": precision}}, 1, 0.0, (1, 32))["cbam"]
    assert costs["parameters"] == 1_147_305
    assert 1 < costs["train_images_per_second"] < 1e6
    assert 0 < costs["latency_1"] < costs["latency_32"]


def test_recipes_that_differ_in_their_epochs_alone_are_measured_as_one(plan):
    none = plan.configs["none"]
    longer = none | {"trainer.max_epochs": 9, "model.lr_scheduler.init_args.max_lr": 0.5}
    costs = measure_costs({"none": none, "longer": longer, "cbam": plan.configs["cbam"]}, 1, 1, 0.0)
    assert costs["longer"] == costs["none"] != costs["cbam"]
    assert set(costs["none"]) >= {"memory", "latency_1", "latency_256", "measured_on"}


def test_a_compiled_recipe_is_timed_compiled(plan, monkeypatch):
    compiled = []

    def compile_(forward, **options):
        return lambda images: (compiled.append(len(images)), forward(images))[1]

    monkeypatch.setattr("torch.compile", compile_)
    monkeypatch.setattr("cbam_pl.training.classifier.missing_to_compile", lambda device: "")
    recipe = TimedRecipe(plan.configs["cbam"] | {"model.compile": True})
    recipe.train_step()
    assert compiled == [recipe.batch_size]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [("trainer.accelerator", "tpu", "torch_xla"), ("trainer.precision", "transformer-engine", "transformer")],
)
def test_a_device_or_precision_that_is_not_here_is_a_users_mistake(key, value, reason, plan):
    message = rf"the trainer's settings conflict with each other or with this machine: .*(?i:{reason})"
    with pytest.raises(UserError, match=message):
        TimedRecipe(plan.configs["cbam"] | {key: value})


@pytest.mark.slow
def test_a_dry_run_says_so_in_one_line(recipes, command, tmp_path, monkeypatch):
    monkeypatch.setattr(command_module, "in_new_process", in_new_process)  # not that of quicker tests
    words = ["--configs", recipes["none"], recipes["se"], "--output", tmp_path / "report", "--dry-run"]
    message = "the trainer's settings conflict with each other or with this machine: "
    assert message in one_line(command("compare", *words, "--trainer.accelerator", "tpu"))


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(plan):
    hog = bytearray(1_500_000_000)
    hog[::4096] = b"x" * len(hog[::4096])  # resident here, so that it would show if it were counted
    memory = in_new_process(1, peak_training_memory, plan.configs["cbam"])
    assert 100 < memory < 1400
    del hog


def _fail():
    raise RuntimeError(f"{torch.get_num_threads()} threads")


@pytest.mark.slow
def test_costs_are_left_out_only_where_memory_ran_out():
    assert in_new_process(1, os._exit, 9) is None
    with pytest.raises(RuntimeError, match="3 threads"):
        in_new_process(3, _fail)


_MEASURE = """
from cbam_pl.commands.compare.costs import in_new_process
from tests.commands.compare.test_costs import measure_forever
if __name__ == "__main__":
    in_new_process(1, measure_forever)
"""


def measure_forever():
    print("measuring", flush=True)
    while True:
        time.sleep(0.01)


@pytest.mark.slow
def test_a_measurement_ends_with_its_program_even_if_that_is_killed(tmp_path):
    file = tmp_path / "measure.py"
    file.write_text(_MEASURE)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, file], env=environment, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout.readline() == "measuring\n"
        program.kill()
        assert program.communicate(timeout=60)[0] == ""  # ends when both processes have
