import json
import re
from dataclasses import replace

import pytest

from cbam_pl.commands.compare.jobs import jobs_of
from cbam_pl.commands.compare.plan import (
    Control,
    _full_key,
    _read_grid,
    _variations,
    flatten,
    labels_of,
    name_of,
    nest,
    same_settings,
    split_settings,
)
from cbam_pl.errors import UserError
from cbam_pl.settings import command_parser
from tests.helpers import REPOSITORY, plan_of


def test_settings_apply_to_every_recipe_and_the_first_is_the_baseline(recipes, tmp_path):
    plan = plan_of(
        "--configs", recipes["se"], recipes["cbam"], "--seeds", 4, 2, "--output", tmp_path, "--trainer.max_epochs", 7
    )
    assert list(plan.configs) == ["se", "cbam"]
    assert plan.seeds == [4, 2]
    assert [one["trainer.max_epochs"] for one in plan.configs.values()] == [7, 7]
    assert [one["model.attention.kind"] for one in plan.configs.values()] == ["se", "cbam"]
    assert "seed" not in plan.configs["se"]
    assert not plan.unequal
    assert list(plan.labels.values()) == ["se", "cbam"]


def test_a_setting_with_a_space_is_no_seed(recipes, image_folder, tmp_path):
    words = ("--configs", recipes["se"], recipes["cbam"], "--output", tmp_path, "--seeds", 0, 1)
    root = tmp_path / "my = data"
    root.symlink_to(image_folder)
    for more in ([f"--data.root={root}"], [f"--data.root={root}", "--trainer.max_epochs=7"], ["--data.root", root]):
        plan = plan_of(*words, *more)
        assert plan.seeds == [0, 1]
        assert [one["data.root"] for one in plan.configs.values()] == [str(root)] * 2
    assert plan_of(*words[:3], f"--output={root}").output == root


def test_the_recipes_written_are_read_as_the_same_settings(recipes, tmp_path):
    output = tmp_path / "report"
    plan = plan_of("--configs", recipes["cbam"], "--grid", "model.optimizer.lr=0.1,1e-3", "--output", output)
    plan.claim_output()
    files = sorted((output / "configs").glob("*.yaml"))
    assert [file.stem for file in files] == ["cbam-lr=0.001", "cbam-lr=0.1"]
    again = plan_of("--configs", *files, "--output", tmp_path / "other")
    assert again.configs == plan.configs
    assert again.configs["cbam-lr=0.1"]["model.optimizer.init_args.lr"] == 0.1


def test_schedules_and_optimizers_keep_their_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    files = ("configs/resnet18.yaml", "configs/cbam_resnet18.yaml")
    plan = plan_of("--configs", *files, "--output", tmp_path / "report")
    plan.claim_output()
    again = plan_of("--configs", *(plan.config_file(name) for name in plan.configs), "--output", tmp_path / "other")
    assert again.configs == plan.configs
    assert again.configs["resnet18"]["model.lr_scheduler.init_args.rates.60"] == 0.02


def test_a_grid_makes_every_combination_with_a_name_of_its_own(recipes, tmp_path):
    grid = ("--grid", "attention.pools=[avg],[avg,max]", "model.attention.reduction=4,8")
    plan = plan_of("--configs", recipes["cbam"], *grid, "--output", tmp_path)
    keys = ("model.attention.pools", "model.attention.reduction")
    assert {name: tuple(one[key] for key in keys) for name, one in plan.configs.items()} == {
        "cbam-pools=avg-reduction=4": (["avg"], 4),
        "cbam-pools=avg-reduction=8": (["avg"], 8),
        "cbam-pools=avg+max-reduction=4": (["avg", "max"], 4),
        "cbam-pools=avg+max-reduction=8": (["avg", "max"], 8),
    }  # fmt: skip
    assert list(plan.labels.values())[1] == "pools=avg reduction=8"


def test_options_that_a_kind_has_no_use_for_are_left_out_and_make_no_second_run():
    grid = {"model.attention.kind": ["none", "se", "cbam"], "model.attention.kernel_size": [3, 7]}
    variations = _variations(grid)
    assert [labels_of(one) for one in variations] == [
        ["kind=none"],
        ["kind=se"],
        ["kind=cbam", "kernel_size=3"],
        ["kind=cbam", "kernel_size=7"],
    ]
    assert _variations({}) == [{}]


def test_one_batch_is_not_all_of_them():
    key = "trainer.limit_train_batches"
    assert _variations({key: [1, 1.0], "model.width": [2, 2.0]}) == [{key: 1, "model.width": 2}] * 2
    assert not same_settings({key: 1}, {key: 1.0}, {})
    assert not same_settings({}, {key: 1}, {key: 1.0})
    assert same_settings({key: 1.0, "model.width": 1}, {key: 1.0, "model.width": 1.0}, {})
    assert split_settings({"one": {key: 1}, "all": {key: 1.0}}) == ({}, {key: [1, 1.0]})
    none = "trainer.overfit_batches"
    assert same_settings({none: 0}, {none: 0.0}, {})


def test_labels_are_as_given_and_names_fit_for_a_folder():
    variation = {"model.a.lr": 0.1, "trainer.a.lr": "x/y z", "model.attention.where": "layer?.*.bn2"}
    assert labels_of(variation) == ["model.a.lr=0.1", "trainer.a.lr=x/y z", "where=layer?.*.bn2"]
    assert name_of("tiny", variation) == "tiny-model.a.lr=0.1-trainer.a.lr=x_y_z-where=layer_._.bn2"


def test_a_grid_may_stand_in_the_recipe(recipes, tmp_path):
    path = tmp_path / "order.yaml"
    path.write_text(recipes["cbam"].read_text() + "grid: {attention.order: [channel_spatial, parallel]}\n")
    plan = plan_of("--configs", path, "--output", tmp_path)
    assert list(plan.configs) == ["order-order=channel_spatial", "order-order=parallel"]


def test_a_grid_in_the_recipe_has_names_as_keys(recipes, tmp_path):
    path = tmp_path / "orders.yaml"
    path.write_text(recipes["cbam"].read_text() + "grid: {1: [2, 3]}\n")
    with pytest.raises(UserError, match=r"grid in .*orders.yaml must give a list of values for each key"):
        plan_of("--configs", path, "--output", tmp_path)


def test_grid_values_are_yaml():
    parser = command_parser("fit")
    grid = _read_grid(["attention.kernel_size=3,7", "optimizer.lr=1e-3,x"], parser)
    assert grid == {"model.attention.kernel_size": [3, 7], "model.optimizer.lr": [0.001, "x"]}
    assert _full_key("max_epochs", parser) == "trainer.max_epochs"
    assert _full_key("attention.kind", parser) == "model.attention.kind"
    assert _full_key("model.optimizer.lr", parser) == "model.optimizer.lr"
    with pytest.raises(UserError, match=r"attention.knd is not a setting .* did you mean (model\.)?attention.kind"):
        _full_key("attention.knd", parser)


def test_flatten_and_nest():
    nested = {"a": 1, "b": {"c": [2], "d": {"e": None}}}
    assert flatten(nested) == {"a": 1, "b.c": [2], "b.d.e": None}
    assert nest(flatten(nested)) == nested


def test_the_same_settings_have_the_same_result():
    asked = {"seed": 1, "model.lr": 0.1, "data.new": 3, "trainer.default_root_dir": "here"}
    saved = {"seed": 1, "model.lr": 0.1, "trainer.default_root_dir": "there", "pictures_every": 2}
    assert same_settings(saved, asked, {"data.new": 3})  # a setting newer than the run has its default there
    assert not same_settings(saved, asked, {"data.new": 4})
    for text, same in (("2", True), ("1", False), ("auto", False)):  # as earlier versions saved the command line's
        assert same_settings({"trainer.devices": text}, {"trainer.devices": 2}, {}) == same
    assert not same_settings(saved, asked, {})
    assert not same_settings(saved | {"seed": 2}, asked, {"data.new": 3})
    assert not same_settings(saved | {"model.more": 2}, asked, {"data.new": 3})


BAD = {
    "one recipe": (["--configs", "{cbam}"], "there is one recipe, cbam"),
    "two of one name": (["--configs", "{cbam}", "{cbam}"], "two recipes are called cbam"),
    "a missing file": (["--configs", "{cbam}", "missing.yaml"], "missing.yaml"),
    "a mistyped setting": (["--configs", "{none}", "{cbam}", "--trainer.max_epoch", "3"], "max_epoch"),
    "a mistyped option": (["--configs", "{none}", "{cbam}", "--sedes", "3"], "sedes"),
    "a seed twice": (["--configs", "{none}", "{cbam}", "--seeds", "1", "1"], "names a seed twice"),
    "no number": (["--configs", "{none}", "{cbam}", "--seeds", "a"], "invalid Seed value: 'a'"),
    "no jobs": (["--configs", "{none}", "{cbam}", "--jobs", "0"], "--jobs: invalid PositiveInt value: '0'"),
    "jobs and Ray": (["--configs", "{none}", "{cbam}", "--jobs", "2", "--ray", "auto"], "--ray: not allowed with"),
    "a seed": (["--configs", "{none}", "{cbam}", "--seed", "3"], "does not accept --seed; give --seeds"),
    "a checkpoint": (["--configs", "{none}", "{cbam}", "--ckpt_path=last"], "does not accept --ckpt_path"),
    "an unknown key": (["--configs", "{cbam}", "--grid", "attention.ordr=parallel"], "did you mean .*attention.order"),
    "a grid without values": (["--configs", "{cbam}", "--grid", "attention.kind="], "must have the form KEY=VALUE"),
    "a bad grid value": (["--configs", "{cbam}", "--grid", "attention.kind=none,sem"], "sem"),
    "a grid of a list": (["--configs", "{cbam}", "--grid", "attention.kind=[none,se]"], "attention.kind"),
    "a grid's key twice": (["--configs", "{cbam}", "--grid", "attention.kind=none,se", "model.attention.kind=cbam,bam"],
                           "duplicate key model.attention.kind; give all its values at once"),
    "two grid values of one name": (["--configs", "{cbam}", "--data.dataset", "shapes", "--grid", "data.root=a?,a*"],
                                    "two recipes are called cbam-root=a_, .* or move one of the grid's two values"),
    "a key without its group": (["--configs", "{cbam}", "--grid", "kernel_size=3"], "attention.kernel_size"),
    "an option without use": (["--configs", "{none}", "{se}", "--model.attention.kernel_size", "3"], "kernel_size"),
    "the clock as budget": (["--configs", "{none}", "{se}", "--trainer.max_time", "00:00:01:00"], "trainer.max_time"),
    "an end of its own": (["--configs", "{none}", "{se}", "--trainer.callbacks", "[{{class_path: lightning.pytorch."
                           "callbacks.EarlyStopping, init_args: {{monitor: val/loss}}}}]"], "leave EarlyStopping out"),
    "half an epoch": (["--configs", "{none}", "{se}", "--trainer.val_check_interval", "0.5"], "must be 1.0: figures"),
    "another logger": (["--configs", "{none}", "{se}", "--trainer.logger", "lightning.pytorch.loggers.CSVLogger",
                        "--trainer.logger.save_dir", "."], "trainer.logger=.* must be left out: compare needs the"),
    "no validation": (["--configs", "{none}", "{se}", "--trainer.limit_val_batches", "0"], "limit_val_batches=0 must"),
    "some test images": (["--configs", "{none}", "{se}", "--trainer.limit_test_batches", "2"],
                         "limit_test_batches=2 has no effect on a training"),
    "no checkpoints": (["--configs", "{none}", "{se}", "--trainer.enable_checkpointing", "false"], "must be true"),
    "no epochs": (["--configs", "{none}", "{se}", "--trainer.max_epochs", "0"], "max_epochs=0 must be at least 1"),
    "chosen on test images": (["--configs", "{none}", "{se}", "--data.val_size", "0"], "data.val_size=0"),
    "another budget": (["--configs", "{cbam}", "--grid", "max_epochs=1,2"], r"max_epochs is 1 in .*, 2 in .*--unequal"),
    "other data": (["--configs", "{cbam}", "--grid", "augmentation=none,rich"], "data.augmentation is none in"),
    "an unknown control": (["--configs", "{none}", "{se}", "--controls", "tim"], "--controls: invalid choice: 'tim'"),
    "controls of attention": (["--configs", "{se}", "{cbam}", "--controls", "time"], "se has model.attention.kind=se;"),
    "controls of nothing": (["--configs", "{none}", "--grid", "dropout=0,0.5", "--controls", "time"],
                            "none of none-dropout=0.5 has attention"),
    "unequal controls": (["--configs", "{none}", "{se}", "--controls", "time", "--unequal"], "not allowed with"),
    "a fixed schedule": (["--configs", "{none}", "{se}", "--controls", "time", "--model.lr_scheduler",
                          "LambdaLR", "--model.lr_scheduler.lr_lambda", "math.cos"], "LambdaLR cannot be stretched"),
    "nothing done": (["--configs", "{none}", "{se}", "--recompute"], "no run with these settings is done yet"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_and_status_two(name, recipes, command, tmp_path):
    words, message = BAD[name]
    words = [word.format(**recipes) for word in words]
    outcome = command("compare", *words, "--output", tmp_path / "report", "--trainer.default_root_dir", tmp_path)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("error: ")

    assert re.search(message, outcome.err), outcome.err
    assert not list(tmp_path.iterdir()), "a rejected comparison writes nothing"


def test_an_output_with_other_settings_is_rejected(recipes, command, tmp_path):
    words = ("--configs", recipes["none"], recipes["se"], "--output", tmp_path / "report")
    words += ("--trainer.default_root_dir", tmp_path)
    plan = plan_of(*words)
    plan.claim_output()
    for other in (["--seeds", 0, 1], ["--trainer.max_epochs", 3], ["--grid", "attention.kind=none,se"]):
        with pytest.raises(UserError, match="recipes or settings, or of seeds that are not given; name another"):
            plan_of(*words, *other).recorded_controls()
    plan_of(*words, "--pictures_every", 3).claim_output()
    for damaged in ('{"seeds": [0', json.dumps({"seeds": plan.seeds, "configs": []})):
        (tmp_path / "report/comparison.json").write_text(damaged)
        with pytest.raises(UserError, match=r"cannot use .*report|of other recipes"):
            plan.claim_output()


def test_seeds_may_be_added_and_keep_the_controls_that_were_chosen(recipes, tmp_path):
    words = ("--configs", recipes["none"], recipes["se"], "--output", tmp_path)
    change = {"model.width": 1.5}
    control = Control("se", "time", "width", "none-width=1.5", change, {"recipe": 2.0, "control": 2.1})
    first = plan_of(*words, "--seeds", 0, 1)
    replace(first, controls=[control]).claim_output()
    more = plan_of(*words, "--seeds", 3, 1, 0)
    for _ in range(2):  # and are kept
        assert more.recorded_controls() == [control]
        more.claim_output()
    with pytest.raises(UserError, match="of seeds that are not given"):
        first.claim_output()


def test_controls_that_another_comparison_has_chosen_meanwhile_are_kept_alone(recipes, tmp_path):
    plan = plan_of("--configs", recipes["none"], recipes["se"], "--output", tmp_path)
    first = Control("se", "time", "width", "none-width=1.5", {"model.width": 1.5}, {"recipe": 2.0, "control": 2.1})
    second = replace(first, name="none-width=1.25", change={"model.width": 1.25})
    replace(plan, controls=[first]).claim_output()
    with pytest.raises(UserError, match=r"another comparison has just chosen controls in .*; run the command again"):
        replace(plan, controls=[second]).claim_output()
    assert plan.recorded_controls() == [first]
    same_parameters = replace(second, cost="parameters")
    replace(plan, controls=[first, same_parameters]).claim_output()
    assert plan.recorded_controls() == [first, same_parameters]


def test_unequal_recipes_may_be_allowed(recipes, tmp_path):
    plan = plan_of("--configs", recipes["se"], "--grid", "max_epochs=1,2", "--unequal", "--output", tmp_path)
    assert plan.unequal == ["trainer.max_epochs is 1 in se-max_epochs=1, 2 in se-max_epochs=2"]


def test_a_network_by_its_path_is_compared_with_and_without_attention(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        """
model:
  network: {class_path: torchvision.models.resnet18, init_args: {zero_init_residual: true}}
  attention: {kind: cbam, where: layer?.*.bn2, start: identity, reduction: 8}
  lr_factors: {layer1.0: 0.1}
data: {dataset: shapes}
"""
    )
    words = ("--seeds", 0, "--output", tmp_path / "report")
    plan = plan_of("--configs", recipe, "--grid", "attention.kind=none,se", *words)
    plan.claim_output()
    baseline, with_se = plan.configs.values()
    names = ("where", "start", "reduction")
    assert [with_se.get(f"model.attention.{name}") for name in names] == ["layer?.*.bn2", "identity", 8]
    assert [baseline.get(f"model.attention.{name}") for name in names] == [None] * 3
    assert baseline["model.network.init_args.zero_init_residual"] is True
    assert baseline["model.lr_factors"] == {"layer1.0": 0.1}  # a name, not a key in a key
    again = plan_of("--configs", *(plan.config_file(name) for name in plan.configs), *words[:2], "--output", tmp_path)
    assert again.configs == plan.configs
    for job in jobs_of(plan):
        assert job.test_options == ["--trainer.accelerator", "auto", "--trust", "torchvision.models.resnet18"]


def test_networks_are_compared_by_a_grid(recipes, tmp_path):
    grid = ["model.network=torchvision.models.resnet18,torchvision.models.resnet34", "attention.kind=none"]
    plan = plan_of("--configs", recipes["cbam"], "--grid", *grid, "--output", tmp_path)
    assert [one["model.network.class_path"][-8:] for one in plan.configs.values()] == ["resnet18", "resnet34"]
    assert {one.get("model.arch") for one in plan.configs.values()} == {None}
