"""The settings of every command: the one parser of options and of recipes."""

import argparse
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from inspect import Parameter, signature
from itertools import zip_longest
from pydoc import locate
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, restricted_number_type
from lightning import Callback, Trainer

from cbam_pl.attention import AttentionConfig
from cbam_pl.cli import PROGRAM
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.data.folder import show
from cbam_pl.errors import UserError
from cbam_pl.recipes import merge, read_recipe
from cbam_pl.training.classifier import Classifier

Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
# int before float, so that 1 is one batch and 1.0 all of them. Lightning's own Optional[Union[int, float]] is whichever
# order of the two was asked for first in the process.
_Batches = int | float | None
_TRAINER_TYPES: dict[str, Any] = {
    **{f"limit_{stage}_batches": _Batches for stage in ("train", "val", "test", "predict")},
    "overfit_batches": int | float,
    "val_check_interval": _Batches,
    "callbacks": Callback | list[Callback] | None,  # so that an error is about the one callback, not about a list
    "devices": int | list[int] | str,  # so that 2 is a number, from a file and from the command line
    # What Lightning accepts, and then divides by zero or trains with the wrong sign.
    "accumulate_grad_batches": PositiveInt,
    "check_val_every_n_epoch": PositiveInt | None,
    "gradient_clip_val": NonNegativeFloat | None,
    "log_every_n_steps": NonNegativeInt | None,
    "num_nodes": PositiveInt,
}
# Settings of the Trainer that the evaluation commands do not offer, besides the limit_*_batches of other stages.
_TRAINING_ONLY = {
    "accumulate_grad_batches", "check_val_every_n_epoch", "detect_anomaly", "enable_checkpointing", "gradient_clip_val",
    "gradient_clip_algorithm", "log_every_n_steps", "max_epochs",
    "max_steps", "max_time", "min_epochs", "min_steps", "num_sanity_val_steps", "overfit_batches",
    "reload_dataloaders_every_n_epochs", "val_check_interval", "barebones", "enable_model_summary",
}  # fmt: skip
OWN_LIMIT = {"test": "limit_test_batches", "validate": "limit_val_batches"}
# Settings of the data that evaluation commands offer; all others, and those not given, are the checkpoint's.
_EVALUATION_DATA = {"dataset", "root", "batch_size"}
_TRAINER_DEFAULTS = {
    "max_epochs": 50,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "default_root_dir": ".",
    "devices": 1,  # so that a recipe means the same on every machine
}


@cache
def command_parser(command: Literal["fit", "test", "validate", "predict", "visualize", "export"]) -> ArgumentParser:
    """The options of a command; those of model, data and trainer are parameters of classes, which document them."""
    usage = f"{PROGRAM} {command} [OPTIONS]"
    parser = ArgumentParser(prog=f"train.py {command}", exit_on_error=False, allow_abbrev=False, usage=usage)
    add = parser.add_argument
    if command == "fit":
        _add_fit_options(parser)
    elif command == "visualize":
        _add_visualize_options(parser)
    else:
        checkpoint_help = "checkpoint FILE, folder of weights, or best or last: the newest best.ckpt or last.ckpt"
        add("--ckpt_path", type=str, default="best", help=checkpoint_help)
        add(
            "--model.test_time_flip",
            type=bool | None,
            help="classify by the mean of the logits of each image and its mirror image; by default as in training",
        )
    if command != "fit":
        trust_help = "packages whose networks a checkpoint may import, besides cbam_pl, torchvision and timm"
        add("--trust", nargs="+", type=str, default=[], help=trust_help)
    if command == "test":
        add("--calibrate", action="store_true", help="also with a temperature, fitted on the validation images")
        names_help = "also test on corrupted images: all 19 corruptions, or the named ones, such as fog jpeg"
        add("--corruptions", nargs="*", type=str, metavar="NAME", help=names_help)
        add("--severities", nargs="+", type=int, metavar="N", help="severities of --corruptions (default: 1 2 3 4 5)")
    if command == "export":
        _add_export_options(parser)
    if command == "predict":
        add("--images", nargs="+", type=str, help="image files, or folders of them", required=True)
        add("--output", type=str, default="predictions.csv", help="the CSV file to write")
        add("--top", type=PositiveInt, default=3, help="classes to show for each image")
    else:
        used = _EVALUATION_DATA - ({"batch_size"} if command == "export" else set())
        skipped = set() if command == "fit" else signature(ImageDataModule).parameters.keys() - used
        parser.add_class_arguments(ImageDataModule, "data", skip={"seed", *skipped}, instantiate=False)
        if command != "fit":
            parser.set_defaults({f"data.{name}": None for name in used})
    if command not in ("visualize", "export"):
        _add_trainer_options(parser, command)
    return parser


def make_training(values: Namespace, seed: int = 0) -> tuple[Classifier, ImageDataModule]:
    """The network and the data of `fit`'s instantiated settings; the classes and the images' size are the data's."""
    data = ImageDataModule(**values.data, seed=seed)
    return Classifier(num_classes=data.num_classes, image_size=data.image_size, seed=seed, **values.model), data


def given_data(settings: Namespace) -> dict[str, Any]:
    """The settings of the data that a command was given, to replace those that the checkpoint was trained with."""
    return {name: value for name, value in settings.data.items() if value is not None}


def _add_fit_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=str, help="YAML file of settings; of several the later wins, and options win over all")
    add("--seed", type=Seed, default=0, help="decides initial weights, held-out images, order, augmentation, dropout")
    add("--ckpt_path", type=str, help="checkpoint FILE to resume from, or last: this recipe's newest last.ckpt")
    add("--checkpoint_minutes", type=PositiveFloat, default=5.0, help="longest time between two checkpoints")
    pictures_help = "epochs between two sets of pictures in TensorBoard; the first and last always have one; 0: none"
    add("--pictures_every", type=NonNegativeInt, default=5, help=pictures_help)
    owned_by_data = {"num_classes", "image_size", "seed"}
    parser.add_class_arguments(Classifier, "model", skip=owned_by_data, instantiate=False, sub_configs=True)


def _add_visualize_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    checkpoint_help = "checkpoint FILES, folders of weights, or best or last: the newest best.ckpt or last.ckpt"
    add("--ckpt_path", nargs="+", type=str, default=["best"], help=checkpoint_help)
    add("--images", nargs="+", type=str, help="your own image files, or folders of them")
    add("--indices", nargs="+", type=int, help="test images, by number from 0")
    add("--class_name", type=str, help="the first test images of a class")
    add("--num_images", type=PositiveInt, help="number of images, unless they are named (default: 3; with --page 200)")
    add("--layer", type=str, help="module for Grad-CAM and measures (default: the last that gives (B, C, H, W))")
    add("--output", type=str, help="folder to write to (default: pictures, in the log folder of the first run)")
    add("--format", type=Literal["png", "svg", "pdf"] | None, help="file format of the pictures (default: png)")
    add("--page", action="store_true", help="not pictures, but gallery.html: a page to look through test images")
    add("--measure", action="store_true", help="also measure: do maps fall on what matters, do the gates matter?")
    add("--measure_images", type=PositiveInt, help="number of test images to measure on, evenly chosen (default: 1000)")
    add("--trainer.default_root_dir", type=str, default=".", help="the folder that holds checkpoints and logs")


def _add_export_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    format_help = "onnx (opset 18), pt2 (torch.export), or safetensors: a folder of the weights and their card"
    add("--format", type=Literal["onnx", "pt2", "safetensors"], required=True, help=format_help)
    add("--output", type=str, required=True, help="folder to write to, new or with nothing but earlier exports")
    add("--gates", action="store_true", help="also output the gates of each block, named after the block")
    precision_help = "of the weights and activations; in safetensors float16 rounds only matrices and kernels"
    add("--precision", type=Literal["float32", "float16"], default="float32", help=precision_help)
    input_help = "type of the images' values: float32 in [0, 1], or uint8 from 0 to 255"
    add("--input_type", type=Literal["float32", "uint8"], default="float32", help=input_help)
    add("--licence", type=str, help="licence of the weights, such as mit; whoever trained them decides it")
    add(
        "--benchmark",
        action="store_true",
        help="time the network in PyTorch, pt2 and onnxruntime, at batch sizes 1 and 64",
    )
    add("--trainer.default_root_dir", type=str, default=".", help="the folder that holds checkpoints and logs")


def _add_trainer_options(parser: ArgumentParser, command: str) -> None:
    """Those of Lightning's Trainer that the command can honour."""
    others = {name for name in _TRAINER_TYPES if name.startswith("limit_")} - {OWN_LIMIT.get(command)}
    skipped = set() if command == "fit" else _TRAINING_ONLY | others
    if command == "predict":
        skipped |= {"fast_dev_run"}  # which classifies the first images alone
    parser.add_class_arguments(Trainer, "trainer", skip={*_TRAINER_TYPES, *skipped}, instantiate=False)
    for name, kind in _TRAINER_TYPES.items():
        if name not in skipped:
            default = signature(Trainer).parameters[name].default
            parser.add_argument(f"--trainer.{name}", type=kind, default=default, help="see Lightning's Trainer")
    parser.set_defaults({f"trainer.{name}": value for name, value in _TRAINER_DEFAULTS.items() if name not in skipped})


def parse(parser: ArgumentParser, options: list[str], recipe: Mapping[str, Any] | None = None) -> Namespace:
    """The settings that options give, over a recipe's nested ones; a mistake is a UserError with the nearest key."""
    names = setting_names(parser)
    recipe, options = _with_network(recipe or {}, options) if "model.network" in names else (recipe or {}, options)
    in_recipe, in_options = [*_flatten(recipe, names)], list[tuple[str, Any]]()
    for word, following in zip_longest(options, options[1:], fillvalue=""):
        key, equals, value = word.partition("=")
        if key.startswith("--"):
            in_options.append((key[2:].removesuffix("+"), value if equals or following.startswith("--") else following))
    for key, value in (*in_recipe, *in_options):
        _check(key, value, names)
    if (place := next((i for i, word in enumerate(options) if word.endswith(".help")), None)) is not None:
        options = options[place : place + 2]  # of a class, whose parser is given nothing but the class's name
    try:
        settings = parser.parse_args(options, namespace=parser.parse_object(dict(recipe)) if recipe else None)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(_reason(error)) from error
    for name in ("model.optimizer", "model.lr_scheduler"):
        _restore_defaults(name, settings.get(name), _named(name, in_recipe), _named(name, in_options))
    for key, value in settings.items():
        if isinstance(value, (Seed, PositiveInt, NonNegativeInt, PositiveFloat, NonNegativeFloat)):
            settings[key] = value.real  # a plain number, as everything else that a checkpoint holds
    if (root := settings.get("trainer.default_root_dir")) is not None:
        settings["trainer.default_root_dir"] = os.path.expandvars(os.path.expanduser(root))  # as parts of Lightning do
    for key, default in parser.get_defaults().items():
        if default is not None and "init_args" not in key and key in settings and settings[key] is None:
            raise UserError(f"{key}=null must have a value; leave it out for its default, {default}")
    return settings


def _named(name: str, given: Iterable[tuple[str, Any]]) -> tuple[str, set[str]]:
    """The class, without its module, that is given for a setting, or empty, and the arguments that are given for it."""
    path, arguments = "", set[str]()
    for key, value in given:
        if key in (name, f"{name}.class_path"):
            value = yaml.safe_load(value) if isinstance(value, str) else value
            value = value if isinstance(value, Mapping) else {"class_path": value}
            path = str(value.get("class_path") or path)
            arguments |= {*(value.get("init_args") or ())}
        elif key.startswith(f"{name}."):
            arguments.add(key.removeprefix(f"{name}.").removeprefix("init_args.").partition(".")[0])
    return path.rpartition(".")[2], arguments


def _restore_defaults(
    name: str, chosen: Any, in_recipe: tuple[str, set[str]], in_options: tuple[str, set[str]]
) -> None:
    """Give a class's arguments that nobody gave their defaults.

    jsonargparse passes on what the class before it, the default or the recipe's, has too: AdamW had no weight decay.
    """
    if not isinstance(chosen, Namespace):  # none, or a function
        return
    given = in_options[1] | (in_recipe[1] if in_options[0] in ("", in_recipe[0]) else set())
    made = locate(chosen.class_path)
    parameters = signature(made).parameters if callable(made) else {}
    for argument, value in vars(chosen.get("init_args") or Namespace()).items():
        if argument in given or argument not in parameters or value == (default := parameters[argument].default):
            continue
        if default is Parameter.empty:
            raise UserError(f"{name}: {chosen.class_path} needs {argument}; give it with --{name}.{argument}")
        chosen.init_args[argument] = default


def _reason(error: BaseException) -> str:
    """What is wrong with the value of a setting: the first cause, after the keys that lead to it.

    The errors that it caused repeat it beside all types that the setting may have.
    """
    keys = []
    while (cause := error.__cause__) is not None:
        lines = str(error).splitlines()
        if type(error) is ValueError and len(lines) > 1 and cause.__cause__ is None:
            break  # a list of alternatives, of which the cause is only the first
        keys += lines[:1] if isinstance(error, ArgumentError) and len(lines) > 1 else []
        error = cause
    return " ".join(f"{' '.join(keys)} {error}".split())


def _with_network(recipe: Mapping[str, Any], options: list[str]) -> tuple[Mapping[str, Any], list[str]]:
    """Move the options of model.network, in any form that an optimizer may be given, into the recipe.

    A network in the options replaces the recipe's arch, and an arch its network; the Classifier rejects both from one
    place.
    """
    if not isinstance(recipe.get("model", {}), (Mapping, type(None))):
        return recipe, options  # to be rejected as such
    named, arguments, rest = _network_options(options)
    model = dict(recipe.get("model") or {})
    network = None if any(word.partition("=")[0] == "--model.arch" for word in rest) else model.get("network")
    if named is not None and not (isinstance(network, Mapping) and network.get("class_path") == named):
        network = None if named == "null" else named
    if isinstance(network, str):
        network = {"class_path": network}
    if isinstance(network, Mapping):
        if unknown := network.keys() - {"class_path", "init_args"}:
            raise UserError(f"unknown key model.network.{unknown.pop()}; use class_path and init_args")
        if arguments:
            network = {**network, "init_args": {**(network.get("init_args") or {}), **arguments}}
        if named is not None:
            model.pop("arch", None)
    elif arguments:
        raise UserError(f"model.network.{next(iter(arguments))} is an argument of a network; give --model.network")
    if network is not None or "network" in model:
        model["network"] = network
    return ({**recipe, "model": model} if model else recipe), rest


def _network_options(options: list[str]) -> tuple[Any, dict[str, Any], list[str]]:
    """What --model.network gives (None: it is not there), its arguments, and the other words."""
    named: Any = None
    arguments: dict[str, Any] = {}
    rest = []
    words = iter(options)
    for word in words:
        key, equals, value = word.partition("=")
        name = key.removeprefix("--model.network")
        if name == key or name[:1] not in ("", "."):
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        name = name.removeprefix(".init_args").removeprefix(".")
        is_path = name in ("", "class_path")
        try:
            read = value if is_path and not value.startswith("{") else get_loader("yaml")(value)
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{key}={value} is not valid YAML") from error
        if is_path:
            named = read
        else:
            arguments[name] = read
    return named, arguments, rest


def parse_with_recipes(parser: ArgumentParser, options: list[str]) -> Namespace:
    """The settings of `fit`: options over the recipes that --config names. `config` becomes the first one's path."""
    files, options = split_option(options, "--config")
    recipe: dict[str, Any] = {}
    names = setting_names(parser)
    for file in files:
        content = read_recipe(file)
        if "grid" in content:
            raise UserError(f"{show(file)} has a grid, which means several trainings; use {PROGRAM} compare")
        try:
            parse(parser, [], content)  # by itself, so that a mistake is reported with the file that has it
        except UserError as error:
            raise UserError(f"{show(file)}: {error}") from error
        recipe = merge(recipe, content, names)
    settings = parse(parser, options, recipe)
    settings.config = files[0] if files else None
    return settings


def split_option(options: list[str], name: str) -> tuple[list[str], list[str]]:
    """The values of one option, and the other options; a UserError where it has no value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(name, action="append", default=[], dest="values")
    try:
        found, rest = parser.parse_known_args(options)
    except argparse.ArgumentError as error:
        raise UserError(f"{name}: expected one argument") from error
    return found.values, rest


def setting_names(parser: ArgumentParser) -> list[str]:
    """The keys of a parser, such as model.arch; arguments of a class that is itself a setting are not among them."""
    keys = parser.get_defaults().keys()
    return list(dict.fromkeys(key.partition(".class_path")[0].partition(".init_args")[0] for key in keys))


def _flatten(settings: Mapping[str, Any], names: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Key with dots and value of each setting; a UserError where a group, such as model, has a value instead."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        is_group = any(known.startswith(f"{key}.") for known in names)
        if is_group and not isinstance(value, Mapping):
            raise UserError(f"{key}={'null' if value is None else value} must be a mapping of its keys, or left out")
        if isinstance(value, Mapping) and key not in names:
            yield from _flatten(value, names, f"{key}.")
        else:
            yield key, value


def _words(kind: Any) -> list[str]:
    """The allowed words of a Literal, or of a union of Literals and None; empty for any other type."""
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    parts = [_words(part) for part in get_args(kind) if part is not NoneType]
    is_choice = get_origin(kind) in (Union, UnionType) and all(parts)
    return list(dict.fromkeys(word for part in parts for word in part)) if is_choice else []


# The words that a key may have, for each key that is a choice among words.
_CHOICES = {
    prefix + name: words
    for prefix, owner in (
        ("model.", Classifier),
        ("model.attention.", AttentionConfig),
        ("data.", ImageDataModule),
        ("trainer.", Trainer),
    )
    for name, hint in get_type_hints(owner.__init__).items()
    if (words := _words(hint))
}


def _check(key: str, value: Any, names: list[str]) -> None:
    """Reject an unknown key or word. What follows a class's name, as in model.optimizer.lr, is left to the parser."""
    above = [key.rsplit(".", count)[0] for count in range(key.count(".") + 1)]
    is_known = any(name in names for name in above) or any(name.startswith(f"{key}.") for name in names)
    if not is_known and key not in ("help", "") and not key.endswith(".help"):
        raise UserError(f"unknown key {key}{closest(key, names)}")
    choices = _CHOICES.get(key, [])
    if choices and value not in (None, "") and str(value) not in (*choices, "null"):
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(choices)}"
        raise UserError(f"{key}={value} is unknown; {hint}")


def closest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the one that was probably meant, or where to look."""
    names = list(names)
    leaf = name.rpartition(".")[2]
    near = [known for known in names if known.rpartition(".")[2] == leaf]  # in another group
    near += difflib.get_close_matches(name, names, 1)
    similar = difflib.get_close_matches(leaf, [known.rpartition(".")[2] for known in names], 1)
    near += [known for known in names if known.rpartition(".")[2] in similar]
    return f"; did you mean {near[0]}?" if near else "; see --help"
