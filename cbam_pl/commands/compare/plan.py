"""What is compared: recipes, grids, seeds and settings, checked before anything is trained."""

import argparse
import difflib
import itertools
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from cbam_pl.attention import AttentionConfig, options_of
from cbam_pl.errors import UserError, as_user_error
from cbam_pl.settings import command_parser, load_yaml, parse

# What decides how much a network sees; data.* is compared as a whole.
_BUDGET = (
    "max_epochs",
    "max_steps",
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "accumulate_grad_batches",
    "check_val_every_n_epoch",
    "devices",
)
# What leaves a run's result as it is.
_WITHOUT_EFFECT = {
    "config",
    "ckpt_path",
    "checkpoint_minutes",
    "pictures_every",
    "trainer.default_root_dir",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
}
_REFUSED = {
    "trainer.max_time": "it ends a run by the clock, so that no two have the same budget",
    "trainer.fast_dev_run": "it writes no run",
    "trainer.barebones": "it writes no run",
}


@dataclass(frozen=True)
class Plan:
    """A comparison. The first recipe is the baseline.

    Args:
        configs: recipe → its settings as `fit` saves them, by key with dots, without the seed.
        labels: recipe → what it is called in the report: its name, or of one recipe's grid the values alone.
        seeds: one run of each recipe with each.
        defaults: value of each setting that is not given.
        root: folder that holds checkpoints and logs.
        output: folder of the report.
        unequal: settings of the data or the budget that differ between the recipes, with their values.
    """

    configs: dict[str, dict[str, Any]]
    labels: dict[str, str]
    seeds: list[int]
    defaults: dict[str, Any]
    root: Path
    output: Path
    unequal: list[str]

    def config_file(self, name: str) -> Path:
        """Where the recipe stands with every setting, for `fit --config`."""
        return self.output / "configs" / f"{name}.yaml"

    @property
    def _record(self) -> Path:
        return self.output / "comparison.json"

    def check_output(self) -> None:
        """Refuse an output folder that holds something else.

        Raises:
            UserError: the folder holds a comparison with other settings, or is none.
        """
        try:
            if self.output.exists() and not self.output.is_dir():
                raise OSError("it is no folder")
            differing = self._differing(json.loads(self._record.read_text())) if self._record.exists() else ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._refusal(error) from error
        if differing:
            raise UserError(
                f"{self.output} holds a comparison with other {differing}; name another folder with --output (runs "
                "that are done are not done again)"
            )

    def _refusal(self, error: Exception) -> UserError:
        return UserError(f"cannot use {self.output} ({error}); name another folder with --output")

    def claim_output(self) -> None:
        """Write the settings into the output folder.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            for name, settings in self.configs.items():
                file = self.config_file(name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(f"# Written by compare.\n{yaml.safe_dump(nest(settings), sort_keys=False)}")
            self._record.write_text(json.dumps({"configs": self.configs, "seeds": self.seeds}, indent=1) + "\n")
        except OSError as error:
            raise self._refusal(error) from error

    def _differing(self, there: dict[str, Any]) -> str:
        if there["seeds"] != self.seeds:
            return f"seeds ({' '.join(map(str, there['seeds']))})"
        if list(there["configs"]) != list(self.configs):
            return f"configs ({', '.join(there['configs'])})"
        for name, settings in self.configs.items():
            if not same_settings(there["configs"][name], settings, self.defaults):
                return f"settings of {name}"
        return ""


class _OptionParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python train.py compare --help)")


def option_parser() -> argparse.ArgumentParser:
    """The options of `compare` itself; whatever it does not know is a setting of `fit`."""
    parser = _OptionParser(
        prog="train.py compare",
        description="Train several recipes with several seeds, and report whether they differ, how surely, at what "
        "cost. Any setting of `fit` may be given too (python train.py fit --help) and applies to all recipes.",
        usage="python train.py compare --configs FILE FILE ... --seeds 0 1 2 --output DIR [OPTIONS] [SETTINGS]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--configs", nargs="+", required=True, metavar="FILE", help="recipes; the first is the baseline")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="SEED", help="default: 0 1 2 3 4")
    add("--output", required=True, metavar="DIR", help="folder of the report")
    add(
        "--grid",
        nargs="+",
        default=[],
        metavar="KEY=A,B",
        help="make one recipe for each value, such as attention.kind=none,se,cbam; of several keys, each combination",
    )
    add("--unequal", action="store_true", help="allow recipes with different data or budget; the report says so")
    add("--jobs", type=int, metavar="N", help="runs at once (default: one a core, or as many as fit on the GPUs)")
    add("--ray", metavar="ADDRESS", help="run on a Ray cluster: auto, or its address (pip install 'cbam_pl[cluster]')")
    add("--dry-run", action="store_true", help="print the runs, the time and the cost to expect, and train nothing")
    add("--recompute", action="store_true", help="make the report again from the runs that are done; train nothing")
    return parser


def make_plan(options: argparse.Namespace, settings: Sequence[str]) -> Plan:
    """Resolve every recipe with its settings, and check that they can be compared.

    Args:
        options: of `option_parser`.
        settings: options of `fit` that apply to all recipes.

    Raises:
        UserError: a bad option, recipe, grid or setting, or recipes that must not be compared.
    """
    if len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds {' '.join(map(str, options.seeds))} names a seed twice; name each once")
    if any(seed < 0 for seed in options.seeds):
        raise UserError("--seeds must be at least 0")
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs {options.jobs} must be at least 1")
    if options.jobs is not None and options.ray:
        raise UserError("--jobs has no effect with --ray, where the cluster's processors and GPUs decide; leave it out")
    for name in ("--config", "--seed", "--ckpt_path"):
        if any(word == name or word.startswith(f"{name}=") for word in settings):
            instead = {"--config": "--configs", "--seed": "--seeds"}.get(
                name, "nothing: runs are resumed by themselves"
            )
            raise UserError(f"compare takes no {name}; give {instead}")
    parser = command_parser("fit")
    defaults = _as_saved(parser, parser.get_defaults())
    grid = _read_grid(options.grid, parser)
    configs: dict[str, dict[str, Any]] = {}
    labels: dict[str, str] = {}
    roots = set()
    for file in options.configs:
        own_grid = _read_grid_of(file, parser)
        for variation in _variations(own_grid | grid):
            name = "-".join([Path(file).stem, *_labels(variation)])
            varied = [
                f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in variation.items()
            ]
            parsed = _parse_recipe(parser, file, bool(own_grid), [*settings, *varied])
            _check(name, parser, parsed)
            if name in configs:
                raise UserError(f"two recipes are called {name}; rename a file, since runs are kept by that name")
            roots.add(parsed.trainer.default_root_dir)
            configs[name] = _as_saved(parser, parsed)
            labels[name] = name if len(options.configs) > 1 else _title(variation)
    if len(configs) < 2:
        raise UserError(f"there is one recipe, {next(iter(configs))}; name at least two with --configs, or use --grid")
    if len(roots) > 1:
        raise UserError("the recipes have different trainer.default_root_dir; give one on the command line")
    unequal = _unequal(configs)
    if unequal and not options.unequal:
        raise UserError(
            f"the recipes do not have the same data and budget: {'; '.join(unequal)}; make them equal, or allow "
            "it with --unequal, which the report will say"
        )
    return Plan(configs, labels, options.seeds, defaults, Path(str(roots.pop())), Path(options.output), unequal)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by key with dots."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `flatten`."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, last = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return nested


def same_settings(saved: dict[str, Any], asked: dict[str, Any], defaults: dict[str, Any]) -> bool:
    """Whether two runs with these settings, by key with dots, have the same result.

    A setting that `saved` lacks is newer than it, and had its default.
    """
    saved, asked = ({key: value for key, value in one.items() if key not in _WITHOUT_EFFECT} for one in (saved, asked))
    missing = object()
    return saved.keys() <= asked.keys() and all(
        saved.get(key, defaults.get(key, missing)) == value for key, value in asked.items()
    )


def _as_saved(parser: Any, settings: Any) -> dict[str, Any]:
    """Settings as `fit` writes them to config.yaml, by key with dots, without the seed."""
    flat = flatten(yaml.safe_load(parser.dump(settings)))
    return {key: value for key, value in flat.items() if key not in ("seed", "config", "ckpt_path")}


def _read_grid_of(file: str, parser: Any) -> dict[str, list[Any]]:
    """The grid that a recipe's file may hold besides its settings."""
    try:
        content = load_yaml(Path(file).read_text())
    except (OSError, ValueError, UserError, yaml.YAMLError):
        return {}  # the parser says what is wrong with it
    if not isinstance(content, dict) or "grid" not in content:
        return {}
    grid = content["grid"]
    if (
        not isinstance(grid, dict)
        or not grid
        or not all(isinstance(values, list) and values for values in grid.values())
    ):
        raise UserError(f"grid in {file} must give a list of values for each key, such as attention.kind: [none, cbam]")
    return {_full_key(key, parser): values for key, values in grid.items()}


def _parse_recipe(parser: Any, file: str, has_grid: bool, options: list[str]) -> Any:
    """What `fit --config FILE OPTIONS` would train, but for the grid in the file, which `fit` does not know."""
    if not has_grid:
        return parse(parser, ["--config", file, *options])
    content = load_yaml(Path(file).read_text())
    del content["grid"]
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / Path(file).name
        recipe.write_text(json.dumps(content))  # which is YAML, too
        try:
            return parse(parser, ["--config", str(recipe), *options])
        except UserError as error:
            raise UserError(str(error).replace(str(recipe), file)) from error


def _read_grid(words: Sequence[str], parser: Any) -> dict[str, list[Any]]:
    grid = {}
    for word in words:
        key, equals, values = word.partition("=")
        try:
            parsed = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            parsed = None
        if not equals or not parsed:
            raise UserError(f"--grid {word} must have the form KEY=VALUE,VALUE,…, such as attention.kind=none,se,cbam")
        # YAML takes 1e-3 for a text.
        grid[_full_key(key, parser)] = [float(value) if _is_number(value) else value for value in parsed]
    return grid


def _is_number(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+[eE][+-]?\d+", value) is not None


def _full_key(key: str, parser: Any) -> str:
    """The setting that a grid's key names; its group may be left out.

    Raises:
        UserError: there is none.
    """
    groups = ("model.", "data.", "trainer.")
    known = [option[2:] for option in parser._option_string_actions if option[2:].startswith(groups)]
    for candidate in (key, *(group + key for group in groups)):
        above = [candidate.rsplit(".", depth)[0] for depth in range(1, candidate.count("."))]
        # Arguments of a class, such as model.optimizer.lr, are known only once the class is.
        if candidate in known or any(name in ("model.optimizer", "model.lr_scheduler") for name in above):
            return candidate
    near = difflib.get_close_matches(key, [*known, *(name.split(".", 1)[1] for name in known)], 1)
    hint = f"did you mean {near[0]}?" if near else "python train.py fit --help lists the settings"
    raise UserError(f"--grid: {key} is no setting of model, data or trainer; {hint}")


def _variations(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Each combination of the grid's values once, without options that its kind of attention has no use for."""
    variations: list[dict[str, Any]] = []
    for values in itertools.product(*grid.values()):
        variation = dict(zip(grid, values, strict=True))
        kind = variation.get("model.attention.kind")
        if kind is not None:
            for name in AttentionConfig.__dataclass_fields__.keys() - {"kind", *options_of(kind)}:
                variation.pop(f"model.attention.{name}", None)
        if variation not in variations:
            variations.append(variation)
    return variations


def _labels(variation: dict[str, Any]) -> list[str]:
    """KEY=VALUE of each, as short as it is clear, and fit for a folder's name."""
    last = [key.rsplit(".", 1)[1] for key in variation]
    labels = []
    for (key, value), short in zip(variation.items(), last, strict=True):
        text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        labels.append(re.sub(r"[^\w.+=-]+", "_", f"{short if last.count(short) == 1 else key}={text}"))
    return labels


def _title(variation: dict[str, Any]) -> str:
    """What the report calls a variation: the kind of attention alone, other settings with their key."""
    return " ".join(label.removeprefix("kind=") for label in _labels(variation))


def _check(name: str, parser: Any, settings: Any) -> None:
    """Refuse what `fit` would refuse, and what cannot be compared."""
    for key, reason in _REFUSED.items():
        if settings.get(key):
            raise UserError(f"{name}: compare takes no {key}, since {reason}")
    if settings.trainer.logger is False or settings.trainer.enable_checkpointing is False:
        raise UserError(
            f"{name}: compare needs trainer.logger and trainer.enable_checkpointing, which hold the results"
        )
    if (settings.trainer.max_epochs or 0) < 1:
        raise UserError(f"{name}: trainer.max_epochs={settings.trainer.max_epochs} must be at least 1")
    if "EarlyStopping" in str(settings.trainer.callbacks):
        raise UserError(f"{name}: compare gives all recipes the same budget; leave EarlyStopping out")
    if settings.data.val_size == 0:
        raise UserError(
            f"{name}: data.val_size=0 would choose the epochs on the test images; leave it out, or hold images out"
        )
    from cbam_pl.data.datamodule import ImageDataModule
    from cbam_pl.training.classifier import Classifier

    with as_user_error():
        values = parser.instantiate(settings)
        data = ImageDataModule(**values.data)
        Classifier(num_classes=data.num_classes, image_size=data.image_size, **values.model)


def _unequal(configs: dict[str, dict[str, Any]]) -> list[str]:
    """Settings of data and budget that are not the same in all recipes, with the values."""
    unequal = []
    names = {key: None for settings in configs.values() for key in settings}
    for key in names:
        if key.startswith("data.") or key in [f"trainer.{name}" for name in _BUDGET]:
            values = [settings.get(key) for settings in configs.values()]
            if any(value != values[0] for value in values):
                given = ", ".join(f"{value} in {name}" for name, value in zip(configs, values, strict=True))
                unequal.append(f"{key} is {given}")
    return unequal
