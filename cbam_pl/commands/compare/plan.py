"""What is compared: recipes, grids, seeds and settings, checked before anything is trained."""

import argparse
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import yaml
from jsonargparse import Namespace, get_loader
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import EarlyStopping

from cbam_pl.attention import AttentionConfig, options_of
from cbam_pl.cli import PROGRAM
from cbam_pl.commands.robustness import find_corruptions
from cbam_pl.data.corruptions import check_size
from cbam_pl.data.datamodule import ImageDataModule, may_have_seen
from cbam_pl.errors import UserError, as_user_error
from cbam_pl.recipes import read_recipe
from cbam_pl.settings import Seed, closest, command_parser, make_training, parse, setting_names
from cbam_pl.training.run import write_text
from cbam_pl.training.state import is_equal
from cbam_pl.training.trainer import check_settings, listed

# The Trainer's settings that must be equal, besides those of the data: the budget.
_BUDGET = {
    f"trainer.{name}"
    for name in (
        *("max_epochs", "max_steps", "limit_train_batches", "limit_val_batches", "overfit_batches"),
        *("accumulate_grad_batches", "check_val_every_n_epoch", "devices"),
    )
}
# They do not change a run's result.
_WITHOUT_EFFECT = {"config", "ckpt_path", "checkpoint_minutes", "pictures_every"} | {
    f"trainer.{name}" for name in ("default_root_dir", "enable_progress_bar", "log_every_n_steps")
}

Cost = Literal["time", "parameters"]


@dataclass(frozen=True)
class Control:
    """The baseline at the cost of a recipe with attention."""

    recipe: str
    cost: Cost  # which both have in common
    means: Literal["width", "epochs"]  # of spending it
    name: str  # of the control, a recipe itself; the baseline's, where that comes nearest
    change: dict[str, Any]  # of the baseline's settings
    measured: dict[str, float]  # "recipe" and "control": milliseconds of a training step, or parameters


@dataclass(frozen=True)
class Plan:
    """A comparison. The first recipe is the baseline."""

    configs: dict[str, dict[str, Any]]  # recipe → its settings as `fit` saves them, by dotted key, without the seed
    labels: dict[str, str]  # recipe → its name in the report; if all are of one grid, only their values
    seeds: list[int]  # one run of each recipe with each
    defaults: dict[str, Any]  # value of each setting that is not given
    output: Path  # folder of the report
    unequal: list[str]  # settings of the data or the budget that differ between the recipes, with their values
    notes: list[str] = field(default_factory=list)  # what a reader of the report should know
    corruptions: tuple[str, ...] = ()  # of images that the runs are tested on, too
    controls: list[Control] = field(default_factory=list)
    added: list[str] = field(default_factory=list)  # the recipes that are there only as controls

    def config_file(self, name: str) -> Path:
        """The recipe with every setting, for `fit --config`."""
        return self.output / "configs" / f"{name}.yaml"

    @property
    def given(self) -> dict[str, dict[str, Any]]:
        """The recipes to compare, without those that --controls added."""
        return {name: settings for name, settings in self.configs.items() if name not in self.added}

    def recorded_controls(self) -> list[Control]:
        """The controls that the output folder records; a UserError where it holds another comparison.

        Seeds may be added to a comparison.
        """
        record = self.output / "comparison.json"
        try:
            if not record.exists():
                return []
            saved, given = json.loads(record.read_text()), self.given
            same = {*saved["seeds"]} <= {*self.seeds} and list(saved["configs"]) == list(given)
            pairs = zip(saved["configs"].values(), given.values(), strict=False)
            if not same or not all(same_settings(*pair, self.defaults) for pair in pairs):
                raise UserError(
                    f"{self.output} holds a comparison of other recipes or settings, or of seeds that are not given; "
                    "name another folder with --output (runs that are done are not repeated)"
                )
            return [Control(**control) for control in saved.get("controls", [])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._unusable(error) from error

    def claim_output(self) -> None:
        """Write the settings into the output folder; the controls that it records stay."""
        chosen = self.recorded_controls()
        taken = {(one.recipe, one.cost) for one in chosen}
        if any((one.recipe, one.cost) in taken for one in self.controls if one not in chosen):
            raise UserError(
                f"another comparison has just chosen controls in {self.output}; run the command again, which then uses "
                "them"
            )
        try:
            (self.output / "configs").mkdir(parents=True, exist_ok=True)
            for name, settings in self.configs.items():
                text = f"# Written by compare.\n{yaml.safe_dump(nest(settings), sort_keys=False)}"
                self.config_file(name).write_text(text)
            controls = [asdict(one) for one in [*chosen, *(one for one in self.controls if one not in chosen)]]
            content = {"configs": self.given, "seeds": self.seeds, "controls": controls}
            write_text(self.output / "comparison.json", json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> UserError:
        return UserError(f"cannot use {self.output} ({error}); name another folder with --output")


class _OptionParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({PROGRAM} compare --help)")


def option_parser() -> argparse.ArgumentParser:
    """The options of `compare` itself; all others are settings of `fit`."""
    parser = _OptionParser(
        prog="train.py compare",
        description="Train several recipes with several seeds, and report the differences, their uncertainty and "
        f"cost. Any setting of `fit` may be given too ({PROGRAM} fit --help) and applies to all recipes.",
        usage=f"{PROGRAM} compare --configs FILE FILE ... --seeds 0 1 2 --output DIR [OPTIONS] [SETTINGS]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--configs", nargs="+", required=True, metavar="FILE", help="recipes; the first is the baseline")
    add("--seeds", nargs="+", type=Seed, default=[0, 1, 2, 3, 4], metavar="SEED", help="default: 0 1 2 3 4")
    add("--output", required=True, metavar="DIR", help="folder of the report")
    grid_help = "one recipe for each value, such as attention.kind=none,se,cbam; with several keys, each combination"
    add("--grid", nargs="+", default=[], metavar="KEY=A,B", help=grid_help)
    unequal_help = "allow recipes with different data or budget; the report says so"
    budget = parser.add_mutually_exclusive_group().add_argument
    budget("--unequal", action="store_true", help=unequal_help)
    control_help = "add the baseline at the cost of each recipe with attention: made wider, or trained for longer"
    budget("--controls", nargs="+", choices=get_args(Cost), default=[], help=control_help)
    corruptions_help = "also test each run on corrupted images: all 19 corruptions, or the named ones, such as fog jpeg"
    add("--corruptions", nargs="*", metavar="NAME", help=corruptions_help)
    place = parser.add_mutually_exclusive_group().add_argument
    place("--jobs", type=PositiveInt, metavar="N", help="runs at once (default: one per core, or one per GPU)")
    place("--ray", metavar="ADDRESS", help="run on a Ray cluster, auto or its address (pip install ray)")
    add("--dry-run", action="store_true", help="print the runs, the time and the cost to expect, and train nothing")
    add("--recompute", action="store_true", help="make the report again from the runs that are done; train nothing")
    return parser


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of `compare`, and the others, which are settings of `fit`."""
    words: list[str] = []
    for word in arguments:
        # With a space in it, argparse takes an unknown --KEY=VALUE for a value of the option before it.
        words += word.split("=", 1) if " " in word and re.match("--[^ =]+=", word) else [word]
    return option_parser().parse_known_args(words)


def make_plan(options: argparse.Namespace, settings: Sequence[str]) -> Plan:
    """Resolve every recipe with its settings, options of `fit` for all, and check that they can be compared."""
    if len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds {' '.join(map(str, options.seeds))} names a seed twice; name each once")
    given = {word.partition("=")[0] for word in settings}
    instead = {"--config": "give --configs", "--seed": "give --seeds", "--ckpt_path": "runs resume by themselves"}
    for name in instead.keys() & given:
        raise UserError(f"compare does not accept {name}; {instead[name]}")
    parser = command_parser("fit")
    grid = _read_grid(options.grid, parser)
    configs: dict[str, dict[str, Any]] = {}
    labels: dict[str, str] = {}
    notes: list[str] = []
    for file in options.configs:
        recipe = read_recipe(file)
        own_grid = _own_grid(file, recipe, parser)
        for variation in _variations(own_grid | grid):
            words = labels_of(variation)
            name = name_of(Path(file).stem, variation)
            values = {key: v if isinstance(v, str) else json.dumps(v) for key, v in variation.items()}
            parsed = parse(parser, [*settings, *(f"--{key}={value}" for key, value in values.items())], recipe)
            for option in _unused_options(variation):
                parsed[f"model.attention.{option}"] = parser.get_defaults()[f"model.attention.{option}"]
            notes += _check(name, parser, parsed, options.seeds)
            if name in configs:
                raise UserError(
                    f"two recipes are called {name}, and runs are stored by that name; rename a file, or move one of "
                    "the grid's two values with this name into a recipe of its own"
                )
            configs[name] = _as_saved(parser, parsed)
            labels[name] = name if len(options.configs) > 1 else " ".join(word.removeprefix("kind=") for word in words)
    if len(configs) < 2:
        raise UserError(f"there is one recipe, {next(iter(configs))}; name at least two with --configs, or use --grid")
    unequal = []
    for key, given_values in split_settings(configs)[1].items():
        if key.startswith("data.") or key in _BUDGET:
            pairs = zip(configs, given_values, strict=True)
            unequal.append(f"{key} is {', '.join(f'{value} in {name}' for name, value in pairs)}")
    if unequal and not options.unequal:
        raise UserError(
            f"the recipes do not have the same data and budget: {'; '.join(unequal)}; make them equal, or allow "
            "it with --unequal, which the report will say"
        )
    corruptions = () if options.corruptions is None else tuple(find_corruptions(options.corruptions))
    for size in [config["data.image_size"] for config in configs.values()] if corruptions else ():
        check_size(size, size)
    defaults = _as_saved(parser, parser.get_defaults())
    return Plan(configs, labels, options.seeds, defaults, Path(options.output), unequal, notes, corruptions)


def trusted(settings: dict[str, Any]) -> list[str]:
    """The network that the settings name, if any: the user has named it, so a checkpoint of it may import it."""
    network = settings.get("model.network.class_path")
    return [] if network is None else [network]


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        # Patterns of modules have dots of their own.
        is_group = isinstance(value, dict) and f"{prefix}{name}" != "model.lr_factors"
        flat |= flatten(value, f"{prefix}{name}.") if is_group else {f"{prefix}{name}": value}
    return flat


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `flatten`."""
    nested = Namespace()
    for key, value in flat.items():
        nested[key] = value
    return nested.as_dict()


def with_effect(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a run's result."""
    return {key: value for key, value in settings.items() if key not in _WITHOUT_EFFECT}


def same_settings(saved: dict[str, Any], asked: dict[str, Any], defaults: dict[str, Any]) -> bool:
    """Whether two runs with these settings, by dotted key, have the same result.

    A setting that `saved` lacks is newer than it, and had its default.
    """
    saved, asked = with_effect(saved), with_effect(asked)
    if (devices := str(saved.get("trainer.devices"))).isdigit():
        saved["trainer.devices"] = int(devices)  # earlier versions kept the command line's text
    known = {**defaults, **saved}
    return saved.keys() <= asked.keys() and all(
        key in known and is_equal(key, known[key], value) for key, value in asked.items()
    )


def split_settings(configs: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The settings that all recipes have in common, and the others with each recipe's value."""
    common, differing = {}, {}
    for key in {key: None for settings in configs.values() for key in settings}:
        values = [settings.get(key) for settings in configs.values()]
        if all(is_equal(key, value, values[0]) for value in values):
            common[key] = values[0]
        else:
            differing[key] = values
    return common, differing


def _as_saved(parser: Any, settings: Any) -> dict[str, Any]:
    flat = flatten(yaml.safe_load(parser.dump(settings)))
    return {key: value for key, value in flat.items() if key not in ("seed", "config", "ckpt_path")}


def _own_grid(file: str, recipe: dict[str, Any], parser: Any) -> dict[str, list[Any]]:
    grid = recipe.pop("grid", {})
    if not isinstance(grid, dict) or not all(
        isinstance(key, str) and isinstance(values, list) and values for key, values in grid.items()
    ):
        raise UserError(f"grid in {file} must give a list of values for each key, such as attention.kind: [none, cbam]")
    try:
        parse(parser, [], recipe)  # by itself, so that a mistake is reported with its file
        return {_full_key(key, parser): values for key, values in grid.items()}
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _read_grid(words: Iterable[str], parser: Any) -> dict[str, list[Any]]:
    grid = {}
    for word in words:
        key, equals, values = word.partition("=")
        try:
            parsed = get_loader("yaml")(f"[{values}]")  # jsonargparse's, for which 1e-3 is a number
        except (ValueError, yaml.YAMLError):
            parsed = None
        if not equals or not parsed:
            raise UserError(f"--grid {word} must have the form KEY=VALUE,VALUE,…, such as attention.kind=none,se,cbam")
        full = _full_key(key, parser)
        if full in grid:
            raise UserError(f"--grid {word}: duplicate key {full}; give all its values at once")
        grid[full] = parsed
    return grid


def _full_key(key: str, parser: Any) -> str:
    groups = ("model.", "data.", "trainer.")
    known = [name for name in setting_names(parser) if name.startswith(groups)]
    for candidate in (key, *(group + key for group in groups)):
        # Arguments of a class, such as model.optimizer.lr, are known only once the class is.
        if candidate in known or candidate.startswith(("model.optimizer.", "model.lr_scheduler.", "model.network.")):
            return candidate
    raise UserError(f"grid: {key} is not a setting of model, data or trainer{closest(key, known)}")


def _variations(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Each combination of the grid's values once, without options that its kind of attention does not use."""
    variations: list[dict[str, Any]] = []
    for values in itertools.product(*grid.values()):
        variation = dict(zip(grid, values, strict=True))
        for name in _unused_options(variation):
            variation.pop(f"model.attention.{name}", None)
        known = (one for one in variations if one.keys() == variation.keys())
        if not any(all(is_equal(key, one[key], value) for key, value in variation.items()) for one in known):
            variations.append(variation)
    return variations


def _unused_options(variation: dict[str, Any]) -> set[str]:
    """Options of the attention that its kind in a grid does not use, wherever they are given."""
    kind = variation.get("model.attention.kind")
    if not isinstance(kind, str):  # the parser rejects what is no kind
        return set()
    return {field.name for field in fields(AttentionConfig)} - {"kind", *options_of(kind)}


def labels_of(variation: dict[str, Any]) -> list[str]:
    """KEY=VALUE of each, as short as is unambiguous."""
    last = [key.rsplit(".", 1)[1] for key in variation]
    labels = []
    for (key, value), short in zip(variation.items(), last, strict=True):
        text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        labels.append(f"{short if last.count(short) == 1 else key}={text}")
    return labels


def name_of(recipe: str, variation: dict[str, Any]) -> str:
    """The name of a recipe's variation, by which its runs are stored: valid as a folder's name."""
    return "-".join([recipe, *(re.sub(r"[^\w.+=-]+", "_", label) for label in labels_of(variation))])


def _check(name: str, parser: Any, settings: Any, seeds: Sequence[int]) -> list[str]:
    """Reject what cannot be compared. Returns what the report should say of a recipe."""
    trainer = settings.trainer
    for key, is_bad, rule in (
        ("data.val_size", settings.data.val_size == 0, "would select the epoch on the test images; leave it out"),
        ("trainer.max_time", trainer.max_time, "must be left out: it gives each run another number of steps"),
        ("trainer.fast_dev_run", trainer.fast_dev_run, "must be left out: it saves nothing"),
        ("trainer.logger", trainer.logger not in (None, True), "must be left out: compare needs the run's own logger"),
        (
            "trainer.enable_checkpointing",
            trainer.enable_checkpointing is False,
            "must be true: the checkpoints are tested",
        ),
        ("trainer.max_epochs", (trainer.max_epochs or 0) < 1, "must be at least 1"),
        ("trainer.limit_val_batches", trainer.limit_val_batches == 0, "must be above 0: validation selects the epoch"),
    ):
        if is_bad:
            raise UserError(f"{name}: {key}={settings[key]} {rule}")
    check_settings(trainer)
    with as_user_error():
        values = parser.instantiate(settings)
        if any(isinstance(one, EarlyStopping) for one in listed(values.trainer.callbacks)):
            raise UserError(f"{name}: compare gives all recipes the same budget; leave EarlyStopping out")
        classifier, data = make_training(values)
        classifier.load_weights()
    trained, seen = classifier.weights_data, []
    for seed in seeds if trained.get("dataset") == data.dataset else ():
        # The split does not depend on the statistics, which take long.
        data = ImageDataModule(**{**data.hparams, "seed": seed, "normalisation": "imagenet"})
        data.prepare_data()
        data.setup("fit")
        seen += [str(seed)] if may_have_seen(trained, data) else []
    if not seen:
        return []
    return [
        f"The weights that {name} starts from were trained on {data.dataset} with seed={trained.get('seed')} and "
        f"data.val_size={trained.get('val_size')}. With the seeds {', '.join(seen)} they may have seen validation "
        "images, by which the epoch is chosen; the test images are not concerned."
    ]
