"""What the command line and YAML may say, and what is said of what they may not."""

import os
import re
from pathlib import Path

import pytest

from cbam_pl.command_options import command_parser
from cbam_pl.errors import UserError
from cbam_pl.settings import parse


def refusal(*options: str) -> str:
    """The one line that a fit's options are refused with."""
    with pytest.raises(UserError) as caught:
        parse(command_parser("fit"), list(options))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for jargon in ("Parser key", "Namespace", "typing.", "<class", "subtypes", "NoneType"):
        assert jargon not in message
    return message


UNKNOWN = {
    "model.atention.kind": "model.attention.kind",
    "model.attention.knid": "model.attention.kind",
    "trainer.max_epoch": "trainer.max_epochs",
    "data.batchsize": "data.batch_size",
    "seeds": "seed",
    "batch_size": "data.batch_size",
    "max_epochs": "trainer.max_epochs",
    "trainer.batch_size": "data.batch_size",
    "model.optimizer.init_args.learning_rate": "model.optimizer.init_args.lr",
    "model.optimizer.init_args.weight_dekay": "model.optimizer.init_args.weight_decay",
}


def nested(key: str, value: object) -> str:
    """YAML with one value at the end of its keys."""
    for name in reversed(key.split(".")):
        value = f"{{{name}: {value}}}"
    return str(value)


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(key: str, tmp_path: Path) -> None:
    expected = f"unknown key {key}; did you mean {UNKNOWN[key]}?"
    assert refusal(f"--{key}", "3") == refusal(f"--{key}=3") == expected
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(nested(key, 3))
    assert refusal("--config", str(recipe)).removeprefix(f"{recipe}: ") == expected


def test_a_key_like_no_other_is_named() -> None:
    assert re.match("unknown key qqqqqq; use one of config, .*seed", refusal("--qqqqqq", "3"))
    assert refusal("--trainer.qqqqqq", "3") == "unknown key trainer.qqqqqq; see --help"
    assert refusal("cnn") == "'cnn' belongs to no option; the name of an option begins with --"
    assert re.match(
        r"unknown key model\.optimizer\.init_args\.qqqq; use one of .*\.momentum",
        refusal("--model.optimizer", "SGD", "--model.optimizer.qqqq", "3"),
    )


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("data.batch_size", "many", "data.batch_size=many must be an integer"),
        ("data.batch_size", "1.5", "data.batch_size=1.5 must be an integer"),
        ("data.batch_size", "null", "data.batch_size=(null|None) must be an integer"),
        ("trainer.max_epochs", "abc", "trainer.max_epochs=abc must be an integer or null"),
        ("model.arch", "resnet81", "model.arch=resnet81 must be one of cnn, .*, resnet152; did you mean resnet18"),
        ("model.attention.kind", "cbma", "model.attention.kind=cbma must be one of none, .*; did you mean cbam"),
        ("model.label_smoothing", "[0.1]", r"model.label_smoothing=\[0.1\] must be a finite number"),
        ("model.channels_last", "maybe", "model.channels_last=maybe must be true or false or null"),
        ("model.optimizer.init_args.lr", "fast", "model.optimizer.init_args.lr='fast' must be a finite number"),
        ("model.optimizer", "Foo", "model.optimizer=Foo must be the class of an Optimizer, with its module"),
        ("model.optimizer", "torch.optim.SDG", "model.optimizer: torch.optim has no SDG; did you mean SGD"),
        (
            "model.lr_scheduler",
            "torch.optim.lr_scheduler.StepLR",
            "model.lr_scheduler: torch.optim.lr_scheduler.StepLR needs step_size; give --model.lr_scheduler.step_size",
        ),
        (
            "model.lr_scheduler",
            "{class_path: torch.optim.lr_scheduler.ReduceLROnPlateau, init_args: {mode: up}}",
            "model.lr_scheduler.init_args.mode='up' must be one of 'min', 'max'",
        ),
        ("model.optimizer", "torch.nn.Linear", "model.optimizer=torch.nn.Linear must be the class of an Optimizer"),
        ("trainer.precision", "half", "trainer.precision=half must be one of .*16-mixed.*"),
        ("trainer", "3", "trainer=3 must be a mapping of its keys"),
        ("seed", "x", "seed=x must be an integer"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_is_expected(
    key: str, value: str, rule: str, tmp_path: Path
) -> None:
    assert re.match(rule, refusal(f"--{key}", value))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(nested(key, value))
    assert re.search(rule.replace("=3", ".*"), refusal("--config", str(recipe)))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("seed", ["-1", str(2**32), "1" + "0" * 30]),
        ("checkpoint_minutes", ["0", "-1"]),
        ("trainer.max_epochs", ["0", "-2"]),
        ("trainer.max_steps", ["0", "-2"]),
        ("trainer.min_epochs", ["0"]),
        ("trainer.devices", ["0", "-2", "1000000"]),
        ("trainer.num_nodes", ["0"]),
        ("trainer.accumulate_grad_batches", ["0", "-1"]),
        ("trainer.limit_train_batches", ["0", "-1", "0.0", "1.5"]),
        ("trainer.limit_val_batches", ["-1", "1.5"]),
        ("trainer.val_check_interval", ["0", "1.5"]),
        ("trainer.check_val_every_n_epoch", ["0"]),
        ("trainer.log_every_n_steps", ["-1"]),
        ("trainer.gradient_clip_val", ["-0.5"]),
        ("trainer.fast_dev_run", ["-1"]),
    ],
)
def test_a_number_out_of_its_range_is_named_with_the_rule(key: str, values: list[str]) -> None:
    for value in values:
        rule = rf"{re.escape(key)}={re.escape(value)}(\.0)? must be (above|at least|from|a number of batches)"
        assert re.match(rule, refusal(f"--{key}", value))


def test_the_ends_of_the_ranges_are_taken() -> None:
    options = [
        "--seed", str(2**32 - 1), "--checkpoint_minutes", "0.1", "--pictures_every", "0", "--trainer.max_epochs", "-1",
        "--trainer.devices", "auto", "--trainer.limit_train_batches", "1.0", "--trainer.limit_val_batches", "0",
        "--trainer.log_every_n_steps", "0", "--trainer.fast_dev_run", "true",
    ]  # fmt: skip
    settings = parse(command_parser("fit"), options)
    assert (settings.seed, settings.trainer.max_epochs, settings.trainer.limit_val_batches) == (2**32 - 1, -1, 0)


def laughs(levels: int) -> str:
    """A billion laughs: each level holds the one before ten times."""
    lines = ["a0: &a0 [ha]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no settings"),
        (b"# a comment\n", "holds no settings"),
        (b"[1, 2]", "holds no settings"),
        (b"cnn", "holds no settings"),
        (b"\x00\x01\x02", "is no valid YAML"),
        (b"\xff\xfe\x00d", "is no text in UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "is no text in UTF-8"),
        (b"model: {arch: cnn", "is no valid YAML"),
        (b"seed: 1\n---\nseed: 2", "is no valid YAML"),
        (b"1: 2", "Key must be a string"),
        (b"seed: 1\nseed: 2", "the key seed is given twice"),
        (b"data:\n  batch_size: 3\nseed: 1\ndata: {}", "the key data is given twice"),
        (b"model: {optimizer: {init_args: {lr: 1, lr: 2}}}", "the key model.optimizer.init_args.lr is given twice"),
        (b"trainer: {callbacks: [{class_path: a, class_path: b}]}", "the key trainer.callbacks.class_path is given tw"),
        (b"data: &d {root: *d}", r"\*d stands before the end of &d"),
        (laughs(12).encode(), "more than 10,000 values"),
        (b"[" * 100_000, "more than 20 deep"),
        (b"{a: " * 100_000, "more than 20 deep"),
        (b"- " * 100_000, "more than 20 deep"),
        (b"seed: " + b"1" * 5000, "is no valid YAML"),
        (b"a" * 2_000_000, "characters are too many"),
        (b"seed: !!python/object/apply:os.getcwd []", "the tag tag:yaml.org,2002:python/object/apply:os.getcwd"),
        (b'data: {root: "a\\0b"}', "zero character"),
        (b"data: {root: null}", "data.root=null must be text; leave it out for its default"),
        (b"data:\nseed: 1", "data=null must be a mapping of its keys, or left out"),
        (b"data: 3", "data=3 must be a mapping of its keys, or left out"),
        (b"config: 3", "a recipe does not name another"),
        (b"trainer: null\nseed: 1", "trainer=null must be a mapping"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    refused = refusal("--config", str(recipe))
    assert re.search(message, refused)
    assert "recipe.yaml" in refused or message.startswith(("data", "trainer"))
    assert len(refused) < 500


def test_no_ordinary_file_is_read_as_a_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "no ordinary file" in refusal("--config", str(tmp_path))
    assert "no ordinary file" in refusal("--config", str(tmp_path / "pipe"))
    assert "does not exist" in refusal("--config", str(tmp_path / "loop"))
    assert "does not exist" in refusal("--config", "nope.yaml")
    assert "does not exist" in refusal("--config", "seed: 3")  # jsonargparse's own option takes YAML in place of a name
    assert "File name too long" in refusal("--config", "x" * 5000)
    assert "--config needs a value" in refusal("--config")


def test_anchors_and_a_second_recipe_are_fine(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: {attention: &both {kind: se, reduction: &r 8}}\ndata: {batch_size: *r}\nseed: 5")
    second.write_text("seed: 6")
    settings = parse(command_parser("fit"), ["--config", str(first), "--config", str(second)])
    assert (settings.data.batch_size, settings.model.attention.reduction, settings.seed) == (8, 8, 6)


def test_a_number_of_batches_is_an_integer_however_it_was_read() -> None:
    def read(text: str) -> object:
        return parse(command_parser("fit"), ["--trainer.limit_train_batches", text]).trainer.limit_train_batches

    values = [read(text) for text in ("40", "40.0", "0.5", "1.0")]
    assert values == [40, 40, 0.5, 1.0]
    assert [type(value) for value in values] == [int, int, float, float]


def test_clipping_a_fused_optimizer_in_mixed_precision_is_refused_with_the_mend() -> None:
    fused = ["--model.optimizer", "torch.optim.Adam", "--model.optimizer.init_args.fused", "true"]
    clipped = [*fused, "--trainer.gradient_clip_val", "1.0"]
    for precision in ("bf16-mixed", "16-mixed"):
        message = refusal(*clipped, "--trainer.precision", precision)
        assert message.endswith("add --model.optimizer.init_args.fused false")
    for fine in (
        clipped,
        [*clipped, "--trainer.precision", "bf16-true"],
        [*fused, "--trainer.precision", "bf16-mixed"],
    ):
        parse(command_parser("fit"), fine)
