"""Recipes: files of settings, read as plain YAML and laid over one another."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from cbam_pl.data.folder import show
from cbam_pl.errors import UserError


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML with only plain values. A duplicate key is an error: PyYAML would use the last one, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, or a ConstructorError."""
        keys = [key.value for key, _ in node.value]
        for key, _ in reversed(node.value):
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
        return super().construct_mapping(node, deep)


# As in YAML 1.2 and JSON; to YAML 1.1 it is text without a dot.
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), [*"-+0123456789"])


def read_recipe(path: str) -> dict[str, Any]:
    """The nested settings of a YAML file; a UserError where it is missing, is not YAML, or holds none."""
    name = show(path)
    try:
        if not Path(path).is_file():  # reading a pipe would wait forever
            raise UserError(f"--config {name} is not a file; name a YAML file such as configs/cbam_cnn.yaml")
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--config {name} is not UTF-8 text; name a YAML file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--config {name} cannot be read ({getattr(error, 'strerror', error)})") from error
    try:
        content = yaml.load(text, _StrictLoader)
        json.dumps(content, skipkeys=True, default=str)  # a ValueError where an alias stands in its own anchor
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as an integer of 5,000 digits
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} has no settings; give it keys, such as model: and data:")
    if content.get("config") is not None:
        raise UserError(f"{name} names another recipe; leave config out, and give --config twice: the later file wins")
    return content


def merge(
    below: Mapping[str, Any], above: Mapping[str, Any], names: Collection[str], prefix: str = ""
) -> dict[str, Any]:
    """Lay settings over others. Each replaces the other as a whole; of the same class, single arguments are replaced.

    `names` are the dotted keys of settings, such as model.arch; any other key, such as model, is a group of settings.
    `prefix` is the dotted key of the group that is merged, with a dot at its end.
    """
    merged = dict(below)
    for name, value in above.items():
        old, key = merged.get(name), f"{prefix}{name}"
        if isinstance(old, str) and isinstance(value, dict) and _is_class(value):
            old = {"class_path": old}  # as one may write a class without arguments
        if isinstance(old, dict) and isinstance(value, dict):
            if key not in names:  # a group, such as model
                value = merge(old, value, names, f"{key}.")
            elif _is_class(old) and _is_class(value) and value.get("class_path") in (None, old.get("class_path")):
                arguments = {**(old.get("init_args") or {}), **(value.get("init_args") or {})}
                value = {**old, **value, "init_args": arguments}
        merged[name] = value
    for one, other in (("arch", "network"), ("network", "arch")):  # of the two the later wins
        if above.get(one) is not None and above.get(other) is None:
            merged.pop(other, None)
    return merged


def _is_class(value: Mapping[str, Any]) -> bool:
    return bool(value) and value.keys() <= {"class_path", "init_args"}
