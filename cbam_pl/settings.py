"""Settings from the command line and YAML: read strictly, and refused in one line that names the key and the mend."""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from pathlib import Path
from pydoc import locate
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, get_loader, set_loader

from cbam_pl.data.folder import show
from cbam_pl.errors import UserError

# A recipe has some thirty lines; what goes far beyond it is no recipe, or one that is made to exhaust the memory.
_MAX_CHARACTERS = 1_000_000
_MAX_DEPTH = 20
_MAX_VALUES = 10_000
_MAX_SHOWN = 100  # characters of a refused value

# The parser_mode of a parser that reads YAML by `load_yaml`.
STRICT_YAML = "strict_yaml"


# YAML


class _Collection:
    """A mapping or list of a YAML text, while it is read."""

    def __init__(self, event: yaml.CollectionStartEvent, name: str) -> None:
        self.is_mapping = isinstance(event, yaml.MappingStartEvent)
        self.anchor = event.anchor
        self.name = name  # the keys that lead to it
        self.keys: set[str] = set()
        self.key: str | None = None  # the one whose value comes next
        self.num_values = 0

    def add(self, text: str, num_values: int) -> None:
        """Take a key, or a value with all that it holds."""
        self.num_values += num_values
        if not self.is_mapping:
            return
        if self.key is not None:
            self.key = None
        elif text in self.keys:
            raise UserError(f"the key {self.child(text)} is given twice; leave one of them out")
        else:
            self.keys.add(text)
            self.key = text

    def child(self, key: str | None) -> str:
        return ".".join(filter(None, (self.name, key)))


def load_yaml(text: str) -> Any:
    """The values of a YAML text, as jsonargparse takes them.

    Raises:
        UserError: a key is given twice, where YAML would take the last silently; a tag; or a text so long, so deep, or
            with so many values behind its anchors that it cannot be a recipe.
        yaml.YAMLError: no valid YAML.
    """
    if len(text) > _MAX_CHARACTERS:
        raise UserError(f"{len(text):,} characters are too many; {_MAX_CHARACTERS:,} are allowed")
    opened: list[_Collection] = []
    anchored: dict[str, int] = {}  # finished anchors, and how many values each holds
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if getattr(event, "tag", None) is not None:
            raise UserError(f"the tag {event.tag} is not allowed; write the value alone")
        finished, key = 0, ""
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append(_Collection(event, opened[-1].child(opened[-1].key) if opened else ""))
            if len(opened) > _MAX_DEPTH:
                raise UserError(f"values are nested more than {_MAX_DEPTH} deep; no setting needs that")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            collection = opened.pop()
            finished, anchor = 1 + collection.num_values, collection.anchor
        elif isinstance(event, yaml.ScalarEvent):
            finished, anchor, key = 1, event.anchor, event.value
            if "\0" in key:
                raise UserError(f"{key!r} holds a zero character, which no name or path may")
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchored:
                raise UserError(f"*{event.anchor} stands before the end of &{event.anchor}, or there is none")
            finished, anchor = anchored[event.anchor], None
        else:
            continue
        if anchor is not None:
            anchored[anchor] = finished
        if opened:
            opened[-1].add(key, finished)
            if opened[-1].num_values > _MAX_VALUES:
                raise UserError(f"more than {_MAX_VALUES:,} values, counted where anchors are used; this is no recipe")
    try:
        return get_loader("yaml")(text)
    except ValueError as error:  # such as an integer of 5,000 digits
        raise yaml.YAMLError(str(error)) from error


set_loader(STRICT_YAML, load_yaml, exceptions=(yaml.YAMLError,))


class RecipeFile(ActionConfigFile):
    """The option that names a YAML file; jsonargparse's own would take YAML in place of a name, too."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Add the file's settings.

        Raises:
            UserError: the file is missing, no text or no mapping, with its name.
        """
        name = show(values)
        content = _read(values, name)
        try:
            settings = load_yaml(content)
            if not isinstance(settings, dict):
                raise UserError("holds no settings; give it keys, such as model: and data:")
            if settings.get("config") is not None:
                raise UserError("a recipe does not name another; give --config twice, and the later one wins")
            super().__call__(parser, cfg, values, option_string)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        except yaml.YAMLError as error:
            raise UserError(f"{name} is no valid YAML: {_one_line(error)}") from error
        except (ArgumentError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{name}: {explain(parser, str(error))}") from error


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).replace(' "<unicode string>",', "").split())


def _read(path: str, name: str) -> str:
    """The text of a recipe's file."""
    try:
        if not Path(path).exists():
            raise UserError(f"--config {name} does not exist; recipes are YAML files such as configs/cbam_cnn.yaml")
        if not Path(path).is_file():  # reading a pipe would wait for ever
            raise UserError(f"--config {name} is no ordinary file; name a YAML file such as configs/cbam_cnn.yaml")
        with open(path, encoding="utf-8") as stream:
            return stream.read(_MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise UserError(f"--config {name} is no text in UTF-8; name a YAML file") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"--config {name} cannot be read ({reason})") from error


# Parsing


def parse(parser: ArgumentParser, options: list[str], base: dict[str, Any] | None = None) -> Namespace:
    """Parse options over a checkpoint's settings.

    Raises:
        UserError: an unknown key, with the nearest valid one, a value of the wrong type or out of its range, or a
            broken file.
    """
    if base:
        parser.set_defaults(base)
    for place, word in enumerate(options):
        if re.match(r"--\S+\.help(=|$)", word):
            # Of a class; jsonargparse would give what follows to that class's own parser, which ends the process.
            options = [word, *(value for value in options[place + 1 : place + 2] if not value.startswith("-"))]
            break
    try:
        settings = parser.parse_args(options)
    except (ArgumentError, ValueError, OSError) as error:
        raise UserError(explain(parser, str(error))) from error
    for key in parser.groups or ():
        group = settings.get(key)
        if key in settings and not isinstance(group, Namespace):
            raise UserError(f"{key}={'null' if group is None else group} must be a mapping of its keys, or left out")
    defaults = parser.get_defaults()
    for key, hint in _hints(parser).items():
        # jsonargparse takes null for any type.
        if settings.get(key) is None and defaults.get(key) is not None and NoneType not in _flat(hint):
            raise UserError(f"{key}=null must be {_words(hint)}; leave it out for its default")
    check_values(settings)
    return settings


def explain(parser: ArgumentParser, message: str) -> str:
    """What jsonargparse refuses, in the words of who uses the program: the key, its value, what it must be."""
    message = " ".join(message.split())
    hints = _hints(parser)
    if found := re.search(r"unrecognized arguments: (\S+)", message):
        if found[1].startswith("--"):
            return _unknown(found[1][2:].partition("=")[0], hints)
        return f"{found[1]!r} belongs to no option; the name of an option begins with --"
    if found := re.search(r"Group '(.+?)' does not accept option '(.+?)'", message):
        return _unknown(".".join(found.groups()), hints)
    if found := re.match(r"Option '(.+?)' is not accepted", message):
        return _unknown(found[1], hints)
    if found := re.match(r"argument --(\S+): expected .*argument", message):
        return f"--{found[1]} needs a value"
    keys = re.findall(r'Parser key "(.+?)"', message)
    key = next((key for key in reversed(keys) if key in hints), None)
    if key is None:
        return message
    if found := re.search(r"module '(\S+)' has no attribute '(\S+)'", message):
        return f"{key}: {found[1]} has no {found[2]}{_suggestion(found[2], dir(locate(found[1])))}"
    if class_path := re.findall(r"class_path='(.+?)'", message):
        return _explain_class(key, hints[key], class_path[-1], message, keys[-1])
    for before_value in (
        r"(?:Got|Given) value: (.*)",
        r"dot import path string: (\S+)",
        r"load config ['\"](.*?)['\"]",
    ):
        if found := re.match(f".*{before_value}", message):
            return _refused(key, found[1], hints[key])
    return message


def _explain_class(key: str, hint: Any, class_path: str, message: str, inner: str) -> str:
    """Of a key whose value is a class with its arguments, such as model.optimizer."""
    if found := re.search(r"Option '(.+?)' is not accepted", message):
        return _unknown(f"{key}.init_args.{found[1]}", [f"{key}.init_args.{name}" for name in _arguments(class_path)])
    if found := re.search(r"arguments are required: (.+?)(?: - |\. Got| Given|$)", message):
        return f"{key}: {class_path} needs {found[1]}; give --{key}.{found[1].split(', ')[0]}"
    if inner != key and (found := re.search(rf"Namespace\(.*\b{re.escape(inner)}=('.*?'|[^,)]+)", message)):
        reason = message.split(f'Parser key "{inner}": ')[-1].split(". Got value")[0].removeprefix("- ")
        words = [_WORDS.get(locate(name), name) for name in re.findall(r"Expected an? <class '(\w+)'>", reason)]
        if choices := re.search(r"typing\.Literal\[(.*?)\]", reason):
            words.append(f"one of {choices[1]}")
        rule = f" must be {' or '.join(dict.fromkeys(words))}" if words else f": {reason}"
        return f"{key}.init_args.{inner}={found[1]}{rule}"
    if found := re.search(r"Expected '(\S+)' to be a subclass of", message):
        return _refused(key, found[1], hint)
    return f"{key}: {_short(message.rsplit('Errors: - ', 1)[-1])}"


def _arguments(class_path: str) -> list[str]:
    """What a class takes, beside what the program gives it: the parameters, or the optimizer."""
    try:
        return list(signature(locate(class_path)).parameters)[1:]  # type: ignore[arg-type]
    except (TypeError, ValueError):  # no class, or one of C
        return []


def _unknown(key: str, keys: Iterable[str]) -> str:
    return f"unknown key {key}{_suggestion(key, keys)}"


def _suggestion(name: str, names: Iterable[str]) -> str:
    """The end of a message: the name that was probably meant, or all where they are few."""
    group, _, last = name.rpartition(".")
    split = {other: other.rpartition(".") for other in names}
    beside = {leaf: other for other, (parent, _, leaf) in split.items() if parent == group and not leaf.startswith("_")}
    near = [other for other, (_, _, leaf) in split.items() if leaf == last]  # in another group
    near += [other for leaf, other in beside.items() if last == _initials(leaf) or leaf == _initials(last)]  # lr
    if beside:
        near += [beside[leaf] for leaf in difflib.get_close_matches(last, beside, 1)]
    else:  # the mistake is in the group
        near += difflib.get_close_matches(name, split, 1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; use one of {', '.join(beside.values())}" if 0 < len(beside) <= 20 else "; see --help"


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


# Types and values


def _hints(parser: ArgumentParser) -> dict[str, Any]:
    """The type of each key."""
    return {
        action.dest: getattr(action, "_typehint", None) or action.type
        for action in parser._actions
        if action.dest not in ("help", "print_config", "print_shtab")
    }


def _flat(hint: Any) -> list[Any]:
    """The types of a union."""
    if get_origin(hint) in (Union, UnionType):
        return [part for member in get_args(hint) for part in _flat(member)]
    return [hint]


_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}


def _choices(hint: Any) -> list[str]:
    """The words that a type allows."""
    return [str(choice) for part in _flat(hint) if get_origin(part) is Literal for choice in get_args(part)]


def _words(hint: Any) -> str:
    """A type in plain words."""
    words: list[str] = []
    choices = _choices(hint)
    for part in _flat(hint):
        origin = get_origin(part) or part
        if origin in _WORDS:
            words.append(_WORDS[origin])
        elif origin is Callable:
            words += [f"the class of an {kind.__name__}, with its module" for kind in _flat(get_args(part)[-1])][:1]
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            words.append("a mapping")
        elif isinstance(origin, type) and issubclass(origin, Iterable):
            choices_inside = [str(choice) for kind in get_args(part) for choice in _choices(kind)]
            words.append(f"a list of {', '.join(choices_inside)}" if choices_inside else "a list")
        elif origin is not Literal:
            words.append(f"a {origin.__name__}" if isinstance(origin, type) else "a mapping of its keys")
    if choices:
        words.insert(0, f"one of {', '.join(choices)}")
    return " or ".join(dict.fromkeys(words))


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _refused(key: str, value: object, hint: Any) -> str:
    """That a value does not have its key's type, with the choice that was probably meant."""
    text = _short(str(value))
    near = difflib.get_close_matches(text, _choices(hint), 1)
    return f"{key}={text} must be {_words(hint)}" + (f"; did you mean {near[0]}?" if near else "")


def _at_least(minimum: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value >= minimum, f"at least {minimum}"


def _count_or(special: int, meaning: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value >= 1 or value == special, f"at least 1, or {special} for {meaning}"


def _part(minimum: int) -> tuple[Callable[[Any], bool], str]:
    def holds(value: float) -> bool:
        return value >= minimum if isinstance(value, int) or not value else 0 < value <= 1

    return holds, f"a number of batches of at least {minimum}, or a fraction above 0 and at most 1.0"


# On a CPU every device is a process, of which Lightning starts as many as it is told.
_MAX_PROCESSES = max(8, os.cpu_count() or 1)

# What no constructor of the program checks, and Lightning late, with a traceback, or never.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda seed: 0 <= seed < 2**32, f"at least 0 and at most {2**32 - 1}"),
    "checkpoint_minutes": (lambda minutes: minutes > 0, "above 0"),
    "top": _at_least(1),
    "trainer.max_epochs": _count_or(-1, "no end"),
    "trainer.max_steps": _count_or(-1, "no limit"),
    "trainer.min_epochs": _at_least(1),
    "trainer.min_steps": _at_least(1),
    "trainer.devices": (lambda count: count == -1 or 1 <= count <= _MAX_PROCESSES, f"from 1 to {_MAX_PROCESSES}"),
    "trainer.num_nodes": _at_least(1),
    "trainer.accumulate_grad_batches": _at_least(1),
    "trainer.limit_train_batches": _part(1),
    "trainer.limit_val_batches": _part(0),
    "trainer.limit_test_batches": _part(1),
    "trainer.limit_predict_batches": _part(1),
    "trainer.overfit_batches": _part(0),
    "trainer.val_check_interval": _part(1),
    "trainer.check_val_every_n_epoch": _at_least(1),
    "trainer.log_every_n_steps": _at_least(0),
    "trainer.num_sanity_val_steps": _at_least(-1),
    "trainer.reload_dataloaders_every_n_epochs": _at_least(0),
    "trainer.fast_dev_run": _at_least(0),
    "trainer.gradient_clip_val": _at_least(0),
}


_FUSED = "model.optimizer.init_args.fused"


def check_values(settings: Namespace) -> None:
    """Refuse numbers out of their range, and what does not go together, before anything is built or loaded.

    A whole number of batches becomes an integer.

    Raises:
        UserError: with the key and the rule.
    """
    for key, (holds, rule) in _RULES.items():
        value = settings.get(key)
        if isinstance(value, str):  # the number of devices may be "auto", "0,1" or "2"
            value = int(value) if re.fullmatch(r"-?[0-9]{1,9}", value) else None
        # Optional[Union[int, float]] is whichever order of the two a library asked typing for first; where that was
        # the other one, a number of batches is read as 40.0.
        if rule.startswith("a number") and isinstance(value, float) and value > 1 and value.is_integer():
            settings[key] = value = int(value)
        if value is not None and not isinstance(value, (list, dict)) and not holds(value):
            raise UserError(f"{key}={value} must be {rule}")
    precision = str(settings.get("trainer.precision"))
    mixed = "16" in precision and "true" not in precision
    if mixed and settings.get("trainer.gradient_clip_val") is not None and settings.get(_FUSED):
        raise UserError(
            f"trainer.gradient_clip_val does not go with trainer.precision={precision} and a fused optimizer; "
            f"add --{_FUSED} false"
        )
