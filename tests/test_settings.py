"""What the command line and YAML may hold, and the messages about what they may not."""

import os
import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

from cbam_pl.errors import UserError
from cbam_pl.recipes import read_recipe
from cbam_pl.settings import closest, command_parser, parse, parse_with_recipes
from tests.helpers import REPOSITORY


def message(*options: str) -> str:
    """The one line about a fit's options that are rejected."""
    with pytest.raises(UserError) as caught:
        parse_with_recipes(command_parser("fit"), list(options))
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def nested(key: str, value: object) -> str:
    """YAML with one value at the end of its keys."""
    for name in reversed(key.split(".")):
        value = f"{{{name}: {value}}}"
    return str(value)


UNKNOWN = {
    "model.atention.kind": "model.attention.kind",
    "model.attention.knid": "model.attention.kind",
    "trainer.max_epoch": "trainer.max_epochs",
    "data.batchsize": "data.batch_size",
    "seeds": "seed",
    "batch_size": "data.batch_size",
    "max_epochs": "trainer.max_epochs",
    "trainer.batch_size": "data.batch_size",
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(key: str, tmp_path: Path) -> None:
    expected = f"unknown key {key}; did you mean {UNKNOWN[key]}?"
    assert message(f"--{key}", "3") == message(f"--{key}=3") == expected
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(nested(key, 3))
    assert message("--config", str(recipe)) == f"{recipe}: {expected}"


def test_a_key_like_no_other_is_named() -> None:
    assert message("--qqqqqq", "3") == "unknown key qqqqqq; see --help"
    assert "cnn" in message("cnn")
    assert "qqqq" in message("--model.optimizer", "SGD", "--model.optimizer.qqqq", "3")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("data.batch_size", "many", "data.batch_size"),
        ("data.batch_size", "1.5", "data.batch_size"),
        ("data.batch_size", "null", "data.batch_size"),
        ("trainer.max_epochs", "abc", "trainer.max_epochs"),
        ("model.arch", "resnet81", "model.arch=resnet81 is unknown; did you mean resnet18?"),
        ("model.arch", "q", "model.arch=q is unknown; use one of cnn, "),
        ("model.attention.kind", "cbma", "model.attention.kind=cbma is unknown; did you mean cbam?"),
        ("data.dataset", "cifar", "data.dataset=cifar is unknown; did you mean cifar10"),
        ("model.label_smoothing", "[0.1]", "model.label_smoothing"),
        ("model.channels_last", "maybe", "model.channels_last"),
        ("model.optimizer", "{class_path: torch.optim.Adam, init_args: {lr: fast}}", "model.optimizer.*lr"),
        ("model.optimizer", "Foo", "model.optimizer"),
        ("model.optimizer", "torch.optim.SDG", "model.optimizer.*SDG"),
        ("model.lr_scheduler", "torch.optim.lr_scheduler.StepLR", "model.lr_scheduler.*step_size"),
        ("model.optimizer", "torch.nn.Linear", "model.optimizer"),
        ("trainer.precision", "half", "trainer.precision"),
        ("trainer", "3", "trainer"),
        ("seed", "x", "seed"),
    ],
)
def test_a_value_of_the_wrong_type_is_reported_with_its_key(key: str, value: str, text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(nested(key, value))
    for words in ([f"--{key}", value], ["--config", str(recipe)]):
        said = message(*words)
        assert re.search(text, said)
        assert "unknown key" not in said


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("seed", ["-1", str(2**32), "1" + "0" * 30]),
        ("checkpoint_minutes", ["0", "-1"]),
        ("pictures_every", ["-1"]),
        ("trainer.num_nodes", ["0"]),
        ("trainer.accumulate_grad_batches", ["0", "-1"]),
        ("trainer.check_val_every_n_epoch", ["0"]),
        ("trainer.log_every_n_steps", ["-1"]),
        ("trainer.gradient_clip_val", ["-0.5"]),
    ],
)
def test_a_number_out_of_its_range_is_reported_with_its_key(key: str, values: list[str]) -> None:
    for value in values:
        said = message(f"--{key}", value)
        assert key in said
        assert "unknown key" not in said


def test_the_ends_of_the_ranges_are_valid() -> None:
    options = [
        "--seed", str(2**32 - 1), "--checkpoint_minutes", "0.1", "--pictures_every", "0", "--trainer.max_epochs", "-1",
        "--trainer.devices", "auto", "--trainer.limit_val_batches", "0", "--trainer.log_every_n_steps", "0",
        "--trainer.fast_dev_run", "true",
    ]  # fmt: skip
    settings = parse(command_parser("fit"), options)
    assert (settings.seed, settings.trainer.max_epochs, settings.trainer.limit_val_batches) == (2**32 - 1, -1, 0)
    assert type(settings.seed) is int


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "has no settings"),
        (b"# a comment\n", "has no settings"),
        (b"[1, 2]", "has no settings"),
        (b"cnn", "has no settings"),
        (b"\x00\x01\x02", "is not valid YAML"),
        (b"\xff\xfe\x00d", "is not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8 text"),
        (b"model: {arch: cnn", "is not valid YAML"),
        (b"seed: 1\n---\nseed: 2", "is not valid YAML"),
        (b"1: 2", "unknown key 1"),
        (b"seed: 1\nseed: 2", "duplicate key seed .*line 2"),
        (b"data:\n  batch_size: 3\nseed: 1\ndata: {}", "duplicate key data"),
        (b"model: {optimizer: {init_args: {lr: 1, lr: 2}}}", "duplicate key lr"),
        (b"trainer: {callbacks: [{class_path: a, class_path: b}]}", "duplicate key class_path"),
        (b"seed: " + b"1" * 5000, "is not valid YAML"),
        (b"model: &a {attention: *a}", "is not valid YAML: Circular reference"),
        (b"seed: !!python/object/apply:os.getcwd []", "is not valid YAML: could not determine a constructor"),
        (b"data: {root: null}", "data.root=null must have a value"),
        (b"data:\nseed: 1", "data=null must be a mapping of its keys, or left out"),
        (b"data: 3", "data=3 must be a mapping of its keys, or left out"),
        (b"config: other.yaml", "names another recipe"),
        (b"grid: {attention.kind: [none, cbam]}", "has a grid, .*; use .* compare"),
    ],
)
def test_yaml_that_is_not_a_recipe_is_rejected(content: bytes, text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    rejected = message("--config", str(recipe))
    assert re.search(text, rejected)
    assert "recipe.yaml" in rejected


def test_only_ordinary_files_are_read_as_recipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "loop", "nope.yaml", "seed: 3"):
        assert "is not a file" in message("--config", str(path))
    assert "File name too long" in message("--config", "x" * 5000)
    assert message("--config") == "--config: expected one argument"


def merged(tmp_path: Path, *recipes: str) -> Namespace:
    """The settings of several recipes, of which the later wins."""
    files = [tmp_path / f"{number}.yaml" for number in range(len(recipes))]
    for file, recipe in zip(files, recipes, strict=True):
        file.write_text(recipe)
    return parse_with_recipes(command_parser("fit"), [f"--config={file}" for file in files])


def test_a_later_recipe_wins_and_options_win_over_both(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: {attention: &both {kind: se, reduction: &r 8}}\ndata: {batch_size: *r}\nseed: 5")
    second.write_text("{seed: 6, data: {val_size: 7}}")
    options = ["--config", str(first), f"--config={second}", "--data.val_size", "9"]
    settings = parse_with_recipes(command_parser("fit"), options)
    assert (settings.data.batch_size, settings.model.attention.reduction, settings.seed) == (8, 8, 6)
    assert (settings.data.val_size, settings.config) == (9, str(first))


def test_a_rate_in_exponent_notation_is_a_number(tmp_path: Path) -> None:
    recipe = "{model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1e-3}}}, data: {root: 1e}}"
    settings = merged(tmp_path, recipe)
    assert (settings.model.optimizer.init_args.lr, settings.data.root) == (0.001, "1e")


def test_another_class_in_a_later_recipe_has_its_own_arguments(tmp_path: Path) -> None:
    first = "model: {optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.1, amsgrad: true}}}"
    second = "model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.2}}}"
    settings = merged(tmp_path, first, second)
    assert settings.model.optimizer.class_path == "torch.optim.SGD"
    assert settings.model.optimizer.init_args.lr == 0.2


def test_arguments_alone_are_those_of_the_class_before(tmp_path: Path) -> None:
    first = "model: {optimizer: SGD, lr_factors: {}}"
    settings = merged(tmp_path, first, "model: {optimizer: {init_args: {lr: 0.2}}, lr_factors: {}}")
    assert settings.model.optimizer.class_path == "torch.optim.SGD"
    assert settings.model.optimizer.init_args.lr == 0.2
    assert settings.model.lr_factors == {}


def test_a_later_recipe_replaces_each_setting_as_a_whole(tmp_path: Path) -> None:
    schedule = "lr_scheduler: {class_path: cbam_pl.schedules.PiecewiseConstantLR, init_args: {rates: %s}}"
    settings = merged(
        tmp_path,
        "model: {optimizer: {class_path: torch.optim.SGD, init_args: {momentum: 0.5}}}",
        f"model: {{{schedule % '{60: 0.02, 120: 0.004}'}, lr_factors: {{blocks: 0.1, classifier: 10}}}}",
        f"model: {{{schedule % '{30: 0.5}'}, lr_factors: {{}}}}",
        "model: {optimizer: {init_args: {lr: 0.2}}}",  # of the class before
    )
    assert settings.model.lr_scheduler.init_args.rates == {30: 0.5}
    assert settings.model.lr_factors == {}
    arguments = settings.model.optimizer.init_args
    assert (arguments.lr, arguments.momentum) == (0.2, 0.5)


@pytest.mark.parametrize("key", ["limit_train_batches", "limit_val_batches", "overfit_batches"])
def test_one_batch_and_all_batches_differ(key: str, tmp_path: Path) -> None:
    for text, value in (("40", 40), ("1", 1), ("1.0", 1.0), ("0.5", 0.5)):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"trainer: {{{key}: {text}}}")
        for options in ([f"--trainer.{key}", text], ["--config", str(recipe)]):
            read = parse_with_recipes(command_parser("fit"), options).trainer[key]
            assert (read, type(read)) == (value, type(value))


def test_the_closest_name_may_be_in_another_group() -> None:
    names = ["model.arch", "data.root", "trainer.max_epochs"]
    assert closest("archs", names) == "; did you mean model.arch?"
    assert closest("model.root", names) == "; did you mean data.root?"
    assert closest("zzz", names) == "; see --help"


RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_header_names_itself(path: Path) -> None:
    settings = parse_with_recipes(command_parser("fit"), ["--config", str(path)])
    written = yaml.safe_load(path.read_text())
    assert settings.trainer.max_epochs == written["trainer"]["max_epochs"]
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"--config configs/{path.name}" in line for line in header)
    assert any(line.startswith("# Expect: ") and len(line) > 20 for line in header)


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        ("", ["--model.optimizer", "AdamW"], {"lr": 1e-3, "weight_decay": 0.01}),
        ("", ["--model.optimizer", "Adadelta"], {"lr": 1.0}),
        ("AdamW", [], {"weight_decay": 0.01}),
        ("{class_path: torch.optim.AdamW, init_args: {lr: 2}}", [], {"lr": 2, "weight_decay": 0.01}),
        ("{class_path: torch.optim.SGD, init_args: {lr: 2}}", ["--model.optimizer", "AdamW"], {"lr": 1e-3}),
        ("{class_path: torch.optim.SGD, init_args: {lr: 2}}", ["--model.optimizer", "SGD"], {"lr": 2}),
        ("SGD", ["--model.optimizer={class_path: AdamW, init_args: {lr: 2}}"], {"lr": 2, "weight_decay": 0.01}),
        ("SGD", ["--model.optimizer.lr=2", "--model.optimizer=AdamW"], {"lr": 2, "weight_decay": 0.01}),
    ],
)
def test_another_optimizer_has_its_own_defaults(recipe, options, expected, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {{optimizer: {recipe}}}" if recipe else "seed: 0")
    settings = parse(command_parser("fit"), options, read_recipe(file))
    assert {name: settings.model.optimizer.init_args[name] for name in expected} == expected


def test_a_schedule_does_not_take_what_it_needs_from_the_one_before(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 3}}}")
    recipe = read_recipe(file)
    message = "^model.lr_scheduler: torch.optim.lr_scheduler.ExponentialLR needs gamma; give it with --"
    with pytest.raises(UserError, match=message):
        parse(command_parser("fit"), ["--model.lr_scheduler", "ExponentialLR"], recipe)
    options = ["--model.lr_scheduler", "ExponentialLR", "--model.lr_scheduler.gamma", "0.9"]
    assert parse(command_parser("fit"), options, recipe).model.lr_scheduler.init_args.gamma == 0.9


RESNET18 = {"class_path": "torchvision.models.resnet18"}
TIMM = {"class_path": "timm.create_model", "init_args": {"model_name": "resnet18", "drop_rate": 0.1}}


@pytest.mark.parametrize(
    ("options", "network"),
    [
        (["--model.network", "torchvision.models.resnet18"], RESNET18),
        (["--model.network={class_path: torchvision.models.resnet18}"], RESNET18),
        (["--model.network.class_path=timm.create_model", "--model.network.init_args.model_name", "resnet18",
          "--model.network.init_args.drop_rate=0.1"], TIMM),
        (["--model.network", "timm.create_model", "--model.network.model_name", "resnet18",
          "--model.network.drop_rate", "1e-1"], TIMM),
        (["--config", "timm.yaml", "--model.network.drop_rate", "0.1"], TIMM),
        (["--config", "timm.yaml", "--model.network", "torchvision.models.resnet18"], RESNET18),
        (["--config", "name.yaml"], RESNET18),
        (["--config", "cnn.yaml", "--config", "name.yaml"], RESNET18),
        (["--config", "cnn.yaml", "--model.network", "torchvision.models.resnet18"], RESNET18),
        (["--config", "name.yaml", "--config", "cnn.yaml"], None),
        (["--config", "name.yaml", "--model.arch", "cnn"], None),
        (["--config", "name.yaml", "--model.network", "null"], None),
    ],
)  # fmt: skip
def test_a_network_is_given_as_an_optimizer_is_and_replaces_an_earlier_arch(
    options: list[str], network: dict | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("timm.yaml").write_text("model: {network: {class_path: timm.create_model, init_args: {model_name: resnet18}}}")
    Path("name.yaml").write_text("model: {network: torchvision.models.resnet18}")
    Path("cnn.yaml").write_text("model: {arch: cnn}")
    settings = parse_with_recipes(command_parser("fit"), options)
    assert settings.model.network == network
    assert network is None or settings.model.arch is None


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{class: torchvision.models.resnet18}", "unknown key model.network.class; use class_path and init_args"),
        ("[a, b]", "Expected a <class 'dict'> - Expected a <class 'NoneType'> Given value type: <class 'list'>"),
    ],
)
def test_a_network_in_another_form_is_named(content: str, text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{network: {content}}}")
    assert text in message("--config", str(recipe))


@pytest.mark.parametrize(
    ("option", "keys", "text"),
    [
        ("--data.batch_size=1.5", ["data.batch_size"], "Expected a <class 'int'>. Got value: 1.5"),
        ("--trainer.limit_val_batches=x", ["trainer.limit_val_batches"], "[<class 'int'>, <class 'float'>, <class 'No"),
        ("--model.attention.stages=4", ["model.attention.stages"], "Expected a <class 'tuple'> - Expected a <class 'N"),
        ("--model.attention.pools=[av]", ["model.attention.pools"], "'avg', 'max', 'lse', 'lp'"),
        ("--seed=-1", ["seed"], "-1 does not conform to restriction v>=0 and v<4294967296"),
        ("--trainer.gradient_clip_val=-1", ["trainer.gradient_clip_val"], "-1 does not conform to restriction v>=0"),
        ("--model.optimizer=Foo", ["model.optimizer"], "Expected a dot import path string: Foo"),
        ("--model.optimizer=torch.nn.Linear", ["model.optimizer"], "subclass of <class 'Optimizer'>"),
        ("--model.optimizer.lr=abc", ["model.optimizer", "lr"], "Subtypes: [<class 'float'>, <class 'torch.Tensor'>]"),
        ("--model.optimizer.nestrov=true", ["model.optimizer"], "Option 'nestrov' is not accepted"),
        ("--model.lr_scheduler=StepLR", ["model.lr_scheduler"], "arguments are required: step_size"),
        ("--trainer.callbacks=EarlyStopping", ["trainer.callbacks"], "arguments are required: monitor"),
    ],
)
def test_of_a_wrong_value_the_keys_and_the_first_cause_are_named(option: str, keys: list[str], text: str) -> None:
    words = message(option)
    assert re.findall(r'key "([^"]+)":', words) == keys
    assert text in words
    assert len(words) < 400


def test_of_a_wrong_value_in_a_list_of_callbacks_nothing_is_left_out() -> None:
    for option in ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks=[{class_path: EarlyStopping}]"):
        assert re.search('^Parser key "trainer.callbacks": .*arguments are required: monitor', message(option))


def test_a_choice_of_the_trainers_is_named_with_the_nearest_word() -> None:
    assert message("--trainer.precision=bf16mixed") == (
        "trainer.precision=bf16mixed is unknown; did you mean bf16-mixed?"
    )
    assert message("--model.arch=[cnn]").startswith("model.arch=[cnn] is unknown; did you mean cnn?")
    assert parse(command_parser("fit"), ["--trainer.precision", "16"]).trainer.precision in (16, "16")
    with pytest.raises(UserError, match=r"trainer\.precision=8 is unknown; use one of 64, 32, 16, "):
        parse(command_parser("fit"), [], {"trainer": {"precision": 8}})


def test_an_argument_of_a_network_that_is_not_yaml_is_named() -> None:
    assert message("--model.network", "a.B", "--model.network.x", "[1") == "--model.network.x=[1 is not valid YAML"
    assert message("--model.network", "{a") == "--model.network={a is not valid YAML"
