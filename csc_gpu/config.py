"""Settings as TOML: frozen dataclasses in, frozen dataclasses out. Knows no stage.

A setting is named by its dotted path, `segregate.purity`. Every section is a dataclass that checks
its own values when built.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from csc_gpu.errors import ConfigError

Section = TypeVar("Section")


def names(section: Any, prefix: str = "") -> list[str]:
    """Every setting below a section, by its dotted path."""
    found: list[str] = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            found += names(value, f"{prefix}{field.name}.")
        else:
            found.append(prefix + field.name)
    return found


def override(section: Section, changes: dict[str, Any]) -> Section:
    """The same settings with some replaced, each named by its dotted path.

    Raises ConfigError for an unknown name, a value of another type, or one the section refuses.
    """
    known = names(section)
    for name in changes:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}{_did_you_mean(name, known)}")
    rebuilt: Section = _rebuild(section, changes, "")
    return rebuilt


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, flattened to dotted paths."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"cannot read settings from {path}: {fault}") from fault
    except tomllib.TOMLDecodeError as fault:
        raise ConfigError(f"{path} is not TOML: {fault}") from fault
    return dict(_flatten(tree, ""))


def to_toml(section: Any) -> str:
    """The settings as TOML, every value spelled out."""
    import tomli_w  # late: machines lent without it can still run the tests and benches

    return str(tomli_w.dumps(_plain(section)))


def flattened(section: Any) -> dict[str, Any]:
    """Every setting by its dotted path, in JSON's own types."""
    return dict(_flatten(json.loads(json.dumps(_plain(section))), ""))


def explained(section: Any) -> str:
    """The settings as TOML, each below what it means: the string under its declaration."""
    import tomli_w

    meanings = _meanings(type(section))
    lines, tables = [], []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            tables.append(f"[{field.name}]\n{explained(value)}")
        else:
            lines.append(f"# {meanings[field.name]}\n{tomli_w.dumps({field.name: value})}")
    return "".join(lines) + "\n".join(tables)


def _meanings(kind: type) -> dict[str, str]:
    """The string that stands below each field of a dataclass."""
    declared = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(declared, ast.ClassDef)
    return {
        ast.unparse(field.target): " ".join(str(text.value.value).split())
        for field, text in itertools.pairwise(declared.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def parse_change(text: str) -> tuple[str, Any]:
    """`name=value` as typed after --set; the value is TOML, or else a bare word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set takes NAME=VALUE, got {text!r}")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def typed(value: Any) -> str:
    """A value as it is typed after NAME=, so that parse_change gives it back: TOML, bare words."""
    if isinstance(value, tuple):
        items = (json.dumps(item) if isinstance(item, str) else typed(item) for item in value)
        return f"[{','.join(items)}]"
    if isinstance(value, str):
        return value if value and parse_change(f"={value}") == ("", value) else json.dumps(value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def require(
    settings: Any, section: str, said: str, holds: Callable[[Any], bool], *names: str
) -> None:
    """Raise ConfigError unless each of these settings holds, naming it as the user types it."""
    for name in names:
        value = getattr(settings, name)
        if not holds(value):
            raise ConfigError(f"{section}.{name} must be {said}, got {value!r}")


def _did_you_mean(name: str, known: list[str]) -> str:
    section, _, leaf = name.rpartition(".")
    leaves = {full.rpartition(".")[2]: full for full in known}
    leaves |= {leaf: f"{section}.{leaf}" for leaf in leaves if f"{section}.{leaf}" in known}
    near = difflib.get_close_matches(leaf, leaves, n=1)
    if near:
        return f"; did you mean {leaves[near[0]]!r}?"
    beside = [full for full in known if full.rpartition(".")[0] == section]
    return f"; there are {', '.join(beside or known)}"


def _flatten(tree: dict[str, Any], prefix: str) -> typing.Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _plain(section: Any) -> dict[str, Any]:
    plain = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        plain[field.name] = _plain(value) if dataclasses.is_dataclass(value) else value
    return plain


def _rebuild(section: Any, changes: dict[str, Any], prefix: str) -> Any:
    kinds = typing.get_type_hints(type(section))
    new = {}
    for field in dataclasses.fields(section):
        value, path = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            new[field.name] = _rebuild(value, changes, path + ".")
        elif path in changes:
            new[field.name] = _convert(changes[path], kinds[field.name], path)
    return dataclasses.replace(section, **new)


def _convert(value: Any, kind: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        origin = typing.get_origin(kind)
    if origin is tuple:
        inner = typing.get_args(kind)[0]
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(item, inner, path) for item in items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a class called 1, whose name TOML reads as a number
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{path} must be {_said(kind)}, got {value!r}")
    return value


def _said(kind: type) -> str:
    spoken = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
    return spoken.get(kind, kind.__name__)
