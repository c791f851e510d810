import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from cbam_pl.commands.compare import controls as controls_module
from cbam_pl.commands.compare.controls import (
    add_controls,
    control_line,
    describe,
    match_width,
    note_left_out,
    search_width,
    with_more_epochs,
)
from cbam_pl.commands.compare.plan import nest
from cbam_pl.errors import UserError
from cbam_pl.models import build_network
from cbam_pl.settings import command_parser
from tests.helpers import one_line, plan_of

# What timing is made to find: the step takes as long at width 1.25, and half as long again as the baseline's.
FOUND = {"width": 1.25, "recipe": 150.0, "baseline": 100.0, "control": 153.0}


# The width


@pytest.mark.parametrize(("start", "power"), [(1.0, 1.0), (1.0, 2.0), (0.75, 1.4)])
@pytest.mark.parametrize("wanted", [1.1, 1.8, 4.5])
def test_the_search_ends_at_the_whole_width_that_takes_as_long(start, power, wanted):
    tried = {}

    def time_ratio(width):
        tried[width] = (width / start) ** power / wanted
        return tried[width]

    chosen = search_width(time_ratio, start, 64)
    assert len(tried) <= 8
    exact = start * wanted ** (1 / power)
    assert chosen * 64 == int(chosen * 64)
    # Within 3 %, or the nearest of the whole widths.
    assert abs(math.log(tried[chosen])) <= 0.03 or abs(chosen - exact) < 1 / 64
    assert not [width for width in tried if width > chosen and abs(math.log(tried[width])) <= 0.03]


@pytest.mark.parametrize("start", [1.0, 2.0])
def test_of_the_widths_that_take_as_long_the_widest_is_chosen(start):
    # One channel more than 32 costs as much as four; beyond, the time jumps again.
    chosen = search_width(lambda width: (0.85, 1.0, 1.2)[(width > start) + (width > 1.125 * start)], start, 128)
    assert 1.09 < chosen / start <= 1.125


def test_where_no_width_is_close_the_nearest_is_chosen():
    assert search_width(lambda width: 0.7 if width < 1.3 else 1.2, 1.0, 16) == 21 / 16
    assert search_width(lambda width: 0.9 if width < 1.3 else 1.2, 1.0, 16) == 20 / 16
    assert search_width({1.0: 1.3}.__getitem__, 1.0, 16) == 1.0  # already slower: no other is tried


def test_the_chosen_width_is_timed_again_against_the_recipe_of_the_same_round(monkeypatch):
    class Recipe:
        device = torch.device("cpu")

        def __init__(self, settings):
            self.seconds = 0.05 if settings["model.attention.kind"] == "cbam" else 0.03 * settings["model.width"] ** 2

        def train_step(self):
            raise AssertionError

    def time_in_turns(works, rounds, *_):
        # Every other round is twice as slow for all, which changes no ratio.
        return {key: [work.__self__.seconds * (1 + turn % 2) for turn in range(rounds)] for key, work in works.items()}

    monkeypatch.setattr(controls_module, "TimedRecipe", Recipe)
    monkeypatch.setattr(controls_module, "time_in_turns", time_in_turns)
    kinds = [{"model.attention.kind": kind, "model.width": 1.0} for kind in ("none", "cbam")]
    found = match_width(*kinds, 64, 3, 0.0)
    assert found["width"] == pytest.approx((5 / 3) ** 0.5, abs=1 / 64)
    assert found["control"] / found["recipe"] == pytest.approx(0.03 * found["width"] ** 2 / 0.05)
    assert found["baseline"] / found["recipe"] == pytest.approx(0.6)


@pytest.mark.slow
def test_real_steps_are_timed(recipes, tmp_path):
    plan = plan_of("--configs", recipes["none"], recipes["cbam"], "--output", tmp_path)
    found = match_width(plan.configs["none"], plan.configs["cbam"], 128, 3, 0.05)
    assert 1 <= found["width"] < 3
    assert found["baseline"] < found["recipe"]
    assert found["control"] == pytest.approx(found["recipe"], rel=0.3)  # the machine may be busy


# More epochs


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("StepLR", ["--model.lr_scheduler.step_size", "4"]),
        ("MultiStepLR", ["--model.lr_scheduler.milestones", "[4, 8]"]),
        ("CosineAnnealingLR", ["--model.lr_scheduler.T_max", "12"]),
        ("CosineAnnealingWarmRestarts", ["--model.lr_scheduler.T_0", "4"]),
        ("LinearLR", ["--model.lr_scheduler.total_iters", "8"]),
        ("ConstantLR", ["--model.lr_scheduler.total_iters", "8"]),
        ("PolynomialLR", ["--model.lr_scheduler.total_iters", "12"]),
        ("ExponentialLR", ["--model.lr_scheduler.gamma", "0.9"]),
        (
            "CyclicLR",
            [
                *["--model.lr_scheduler.base_lr", "0.01", "--model.lr_scheduler.max_lr", "0.1"],
                *["--model.lr_scheduler.step_size_up", "4", "--model.lr_scheduler.cycle_momentum", "false"],
                *["--model.lr_scheduler.mode", "exp_range", "--model.lr_scheduler.gamma", "0.9"],
            ],
        ),
        ("cbam_pl.schedules.PiecewiseConstantLR", ["--model.lr_scheduler.rates", "{4: 0.01, 6: 0.005}"]),
    ],
)
def test_a_stretched_schedule_has_the_same_rate_at_the_same_share_of_the_training(schedule, options, recipes, tmp_path):
    plan = plan_of(
        *["--configs", recipes["none"], recipes["cbam"], "--output", tmp_path, "--trainer.max_epochs", 12],
        *["--model.lr_scheduler", schedule, *options],
    )
    before = plan.configs["none"]
    rates = []
    for settings in (before, with_more_epochs(before, 18)):
        parser = command_parser("fit")
        model = parser.instantiate(parser.parse_object(nest(settings))).model
        optimizer = model.optimizer([nn.Parameter(torch.zeros(1))])
        scheduler = model.lr_scheduler(optimizer)
        own = []
        for _ in range(settings["trainer.max_epochs"]):
            own.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        rates.append(own)
    assert len(rates[1]) == 18
    assert rates[1][::3] == pytest.approx(rates[0][::2], rel=1e-6, abs=1e-9)


def test_a_period_is_not_rounded_to_whole_epochs():
    settings = {"trainer.max_epochs": 20, "trainer.max_steps": -1, "model.lr_interval": "epoch"}
    given = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args.step_size": 2, "init_args.gamma": 0.5}
    steps = settings | {f"model.lr_scheduler.{name}": value for name, value in given.items()}
    stretched = with_more_epochs(steps, 24)
    assert "model.lr_scheduler.init_args.step_size" not in stretched
    assert stretched["model.lr_scheduler.class_path"] == "torch.optim.lr_scheduler.MultiStepLR"
    # As many as the nine that 20 epochs have, each at the same share of the training.
    assert stretched["model.lr_scheduler.init_args.milestones"] == [2, 5, 7, 10, 12, 14, 17, 19, 22]
    given = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts", "init_args.T_0": 10}
    restarts = settings | {f"model.lr_scheduler.{name}": value for name, value in given.items()}
    assert with_more_epochs(restarts, 22)["model.lr_scheduler.init_args.T_0"] == 11
    with pytest.raises(
        UserError, match=r"model\.lr_scheduler\.T_0=10 cannot be stretched to 23 epochs in whole ones; use"
    ):
        with_more_epochs(restarts, 23)


def test_what_spans_the_training_by_itself_stays_and_the_limit_of_steps_grows():
    settings = {"trainer.max_epochs": 20, "trainer.max_steps": -1, "model.width": 1.0}
    for path in ("torch.optim.lr_scheduler.OneCycleLR", "lightning.pytorch.cli.ReduceLROnPlateau"):
        schedule = settings | {"model.lr_scheduler.class_path": path}
        assert with_more_epochs(schedule, 31) == schedule | {"trainer.max_epochs": 31}
    assert with_more_epochs(settings, 31) == settings | {"trainer.max_epochs": 31}
    steps = {"model.lr_scheduler.class_path": "OneCycleLR", "model.lr_scheduler.init_args.total_steps": 1000}
    assert with_more_epochs(settings | steps, 31)["model.lr_scheduler.init_args.total_steps"] == 1550
    epochs = {"model.lr_scheduler.class_path": "OneCycleLR", "model.lr_scheduler.init_args.epochs": 20}
    assert with_more_epochs(settings | epochs, 31)["model.lr_scheduler.init_args.epochs"] == 31
    limited = settings | {"trainer.max_steps": 64_000}
    assert with_more_epochs(limited, 31)["trainer.max_steps"] == 99_200
    with pytest.raises(UserError, match=r"LambdaLR cannot be stretched to more epochs; use one of ConstantLR, .*"):
        with_more_epochs(settings | {"model.lr_scheduler.class_path": "torch.optim.lr_scheduler.LambdaLR"}, 31)


# The number of parameters


@pytest.mark.parametrize(
    ("arch", "kind"),
    [("resnet18", "cbam"), ("resnet20", "cbam"), pytest.param("resnet56", "bam", marks=pytest.mark.slow)],
)
def test_the_nearest_number_of_parameters(arch, kind, recipes, tmp_path):
    options = ["--configs", recipes["none"], recipes["cbam"], "--output", tmp_path, "--model.arch", arch]
    plan = plan_of(*options)
    plan.configs["cbam"]["model.attention.kind"] = kind
    (control,) = add_controls(plan, ["parameters"], may_choose=True).controls

    def count(attention, width):
        with torch.device("meta"):
            network = build_network(arch, 3, attention, width=width)
        return sum(parameter.numel() for parameter in network.parameters())

    finest = {"resnet18": 512, "resnet20": 64, "resnet56": 64}[arch]
    wanted = count(kind, 1.0)
    counts = {number / finest: count("none", number / finest) for number in range(finest, finest + 12)}
    nearest = min(counts, key=lambda width: abs(counts[width] - wanted))
    assert control.change == ({"model.width": nearest} if nearest > 1 else {})
    assert control.name == (f"none-width={nearest}" if nearest > 1 else "none")
    assert control.measured == {"recipe": wanted, "control": counts[nearest]}
    assert (nearest > 1) == (arch != "resnet20")


# The command


@pytest.fixture
def measured(monkeypatch):
    """What timing finds, by recipe, in place of timing; the calls are kept."""
    found, calls = {}, []

    def in_new_process(threads, work, baseline, recipe, *_):
        assert work is match_width
        calls.append(recipe["model.attention.kind"])
        return found.get(calls[-1], FOUND)

    monkeypatch.setattr(controls_module, "in_new_process", in_new_process)
    return SimpleNamespace(found=found, calls=calls)


@pytest.mark.slow
def test_controls_are_added_to_a_finished_comparison_and_kept(compared, recipes, command, quick, tmp_path, measured):
    root = shutil.copytree(compared[0], tmp_path / "copy")
    report = root / "report"
    record = json.loads((report / "comparison.json").read_text())
    del record["controls"]  # as it was written before there were any
    (report / "comparison.json").write_text(json.dumps(record))
    words = ["compare", "--configs", *recipes.values(), "--seeds", 0, 1, "--jobs", 1, "--output", report]
    words += ["--trainer.default_root_dir", root]
    controls = ["--controls", "time", "parameters"]
    assert "no control of se with the same time yet" in one_line(command(*words, *controls, "--recompute"))

    measured.found["se"] = {"width": 1.0, "recipe": 101.0, "baseline": 100.0, "control": 100.0}
    quick.clear()
    outcome = command(*words, *controls)
    assert outcome.status == 0, outcome.err
    assert measured.calls == ["se", "cbam"]
    names = ["none-width=1.25", "none-max_epochs=3"]
    assert quick == [[name, seed, step] for seed in (0, 1) for name in names for step in ("fit", "test")]
    assert "control of cbam (150 ms a step), same time: none width=1.25: 153 ms a step, +2.0%" in outcome.out
    assert (
        "control of cbam (2 epochs, 150 ms a step), same time: none max_epochs=3: 3 epochs, 100 ms a step, +0.0%"
        in (outcome.out)
    )
    assert "control of se (1,147,011 parameters), same parameters: none: 1,144,323 parameters, -0.2%; the base" in (
        outcome.out
    )
    saved = yaml.safe_load((report / "configs/none-width=1.25.yaml").read_text())
    run = yaml.safe_load((root / "logs/none-width=1.25/version_1/config.yaml").read_text())
    assert saved["model"] == run["model"]
    assert run["model"]["width"] == 1.25
    assert run["seed"] == 1

    content = json.loads((report / "report.json").read_text())
    assert list(content["recipes"]) == ["none", "se", "cbam", *names]
    assert content["title"] == "se and cbam against none and its controls"
    assert [(one["recipe"], one["name"]) for one in content["controls"]] == [
        *[("se", "none"), ("se", "none"), ("cbam", names[0]), ("cbam", names[1])],
        *[("se", "none"), ("cbam", "none")],
    ]
    accuracies = {(run["recipe"], run["seed"]): run["test_acc"] for run in content["runs"]}
    difference = content["controls"][2]["difference"]
    assert difference["pairs"] == pytest.approx([accuracies["cbam", s] - accuracies[names[0], s] for s in (0, 1)])
    # se, cbam and both controls against none, and cbam against both controls.
    assert len([line for line in content["sentences"] if " − " in line.split(":")[0]]) == 6
    text = (report / "report.md").read_text()
    sentence = content["sentences"][0]
    # Unknown where the differences of both seeds are equal, as two of 21 images may be.
    assert re.match("(se does not significantly beat|Whether se beats) the same cost spent otherwise", sentence)
    assert text.split("\n\n")[1].startswith(f"- {sentence}\n")
    assert not any("same data and budget" in note for note in content["notes"])
    page = (report / "report.html").read_text()
    assert page.index(sentence) < page.index("The same cost spent otherwise</h2>")
    assert "cbam minus" in page

    # The same command later, on a machine with other speeds, and then without --controls.
    measured.found["cbam"] = FOUND | {"width": 2.0}
    quick.clear()
    for more, count in ((controls, 5), (["--recompute"], 3)):
        again = command(*words, *more)
        assert again.status == 0, again.err
        content = json.loads((report / "report.json").read_text())
        assert len(content["recipes"]) == count
        assert any("includes them" in note for note in content["notes"]) == (count == 3)
    assert len(measured.calls) == 2
    assert not quick
    assert len(json.loads((report / "comparison.json").read_text())["controls"]) == 6


def test_controls_that_are_left_out_are_noted(recipes, tmp_path, measured):
    plan = plan_of("--configs", recipes["none"], recipes["cbam"], "--output", tmp_path)
    add_controls(plan, ["time", "parameters"], may_choose=True).claim_output()
    for costs, left_out in (
        ([], "with the same time and parameters, which are left out here, .*; --controls time parameters includes"),
        (["parameters"], "with the same time, which are left out here, .*; --controls parameters time includes"),
    ):
        (note,) = note_left_out(plan, costs).notes
        assert re.search(left_out, note)
    assert note_left_out(plan, ["time", "parameters"]) == plan


def test_recipes_share_an_equal_control(recipes, tmp_path, measured):
    plan = plan_of("--configs", *recipes.values(), "--output", tmp_path)
    plan = add_controls(plan, ["time"], may_choose=True)
    assert plan.added == ["none-width=1.25", "none-max_epochs=3"]
    assert [control.recipe for control in plan.controls] == ["se", "se", "cbam", "cbam"]
    assert list(plan.given) == ["none", "se", "cbam"]


@pytest.mark.parametrize(("key", "short"), [("model.network.class_path", "model.network"), ("model.weights",) * 2])
def test_a_network_of_fixed_width_is_only_trained_for_longer(key, short, recipes, tmp_path, measured):
    plan = plan_of("--configs", recipes["none"], recipes["cbam"], "--output", tmp_path)
    plan.configs["none"][key] = "given"
    assert add_controls(plan, ["time"], may_choose=True).added == ["none-max_epochs=3"]
    with pytest.raises(UserError, match=rf"the {short} of none cannot be widened; use --controls time"):
        add_controls(plan, ["time", "parameters"], may_choose=True)


@pytest.mark.parametrize(
    ("milliseconds", "epochs", "line", "note"),
    [
        (149.0, 2, "none: 2 epochs, 100 ms a step, -32.9%; one epoch more would exceed its time",
         "The training of none takes 33% less time than that of cbam; with one epoch more it would exceed that."),
        (199.0, 3, "none max_epochs=3: 3 epochs, 100 ms a step, -24.6%",
         "The training of none max_epochs=3 takes 25% less time than that of cbam; with one epoch more it would "
         "exceed that."),
        (90.0, 2, "none: 2 epochs, 100 ms a step, +11.1%; one epoch more would exceed its time",
         "The training of none takes 11% more time than that of cbam, although it has no more epochs."),
        (152.0, 3, "none max_epochs=3: 3 epochs, 100 ms a step, -1.3%", None),
    ],
)  # fmt: skip
def test_epochs_that_do_not_fill_the_time_are_noted(milliseconds, epochs, line, note, recipes, tmp_path, measured):
    measured.found["cbam"] = FOUND | {"recipe": milliseconds}
    plan = plan_of("--configs", recipes["none"], recipes["cbam"], "--output", tmp_path)
    plan = add_controls(plan, ["time"], may_choose=True)
    control = plan.controls[1]
    assert control_line(control, plan).endswith(f"same time: {line}")
    assert describe(control, plan)["note"] == note
    assert plan.configs[control.name]["trainer.max_epochs"] == epochs


def test_memory_that_runs_out_is_reported(recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(controls_module, "in_new_process", lambda *_: None)
    plan = plan_of("--configs", recipes["none"], recipes["cbam"], "--output", tmp_path)
    with pytest.raises(UserError, match=r"--controls time: out of memory; lower data.batch_size"):
        add_controls(plan, ["time"], may_choose=True)
