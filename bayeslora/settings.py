"""Settings as dataclasses: built from keywords, YAML or command line strings, and described from docstrings.

A dataclass is the one home of a group of settings: its fields give names, types and defaults, its docstring's
``Attributes:`` section gives the help texts.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import cleandoc
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from bayeslora.errors import BayesLoraError, SettingError, unknown

__all__ = ["Setting", "build", "coerce", "describe", "differing"]

T = TypeVar("T")

TRUE = {"true", "yes", "on", "1"}
FALSE = {"false", "no", "off", "0"}
NONE = {"none", "null", ""}
SECTION = re.compile(r"^Attributes:\s*$\n((?:^[ \t]+.*\n?|^\s*\n)*)", re.MULTILINE)
ENTRY = re.compile(r"^(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


class Setting(NamedTuple):
    """One setting of a dataclass, for a person to read.

    Attributes:
        name: the field's name.
        type: its annotation as it is written in the source.
        default: its default; ``dataclasses.MISSING`` where a value must be given.
        help: its text in the ``Attributes:`` section, on one line; empty where there is none.
    """

    name: str
    type: str
    default: Any
    help: str


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make an instance of a dataclass from values by field name.

    Strings, as the command line gives them, are read by the annotation of their field; all other values are
    checked against it. A nested dataclass is built from a mapping.

    Args:
        cls: a dataclass.
        values: field name to value.

    Returns:
        The instance.

    Raises:
        SettingError: for a name that is no field, a value of another type, a value that the class itself
            refuses, or a field without default that is missing.
    """
    known = {field.name: field for field in _settings(cls)}
    title = _title(cls)
    for name in values:
        if name not in known:
            raise SettingError(unknown(f"setting of {title}", str(name), known))
    missing = [name for name, field in known.items() if name not in values and _default(field) is MISSING]
    if missing:
        raise SettingError(f"{title} needs a value for {', '.join(missing)}.")
    hints = get_type_hints(cls)
    arguments = {name: coerce(value, hints[name], f"{title}: {name}") for name, value in values.items()}
    try:
        return cls(**arguments)
    except BayesLoraError:
        raise
    except (TypeError, ValueError) as error:
        raise SettingError(f"{title}: {error}") from error


def describe(cls: type) -> list[Setting]:
    """The settings of a dataclass in the order of its fields, with the help texts of its docstring.

    A field that a base class documents keeps the text of the base class unless the class has its own.
    """
    helps: dict[str, str] = {}
    for ancestor in reversed(cls.__mro__):
        helps.update(_attributes(ancestor.__dict__.get("__doc__") or ""))
    return [
        Setting(field.name, _written(field.type), _default(field), helps.get(field.name, ""))
        for field in _settings(cls)
    ]


def coerce(value: Any, annotation: Any, name: str) -> Any:
    """Read one value by an annotation: numbers, booleans, text, tuples, lists, ``Literal`` and unions.

    Args:
        value: a string from the command line, or a value of YAML or Python.
        annotation: the resolved type of the field.
        name: what the value is, for the message.

    Returns:
        The value in the annotated type.

    Raises:
        SettingError: if the value cannot be read as that type.
    """
    try:
        return _coerce(value, annotation)
    except (TypeError, ValueError):
        found = f"{value!r} ({type(value).__name__})"
        raise SettingError(f"{name} expects {_written(annotation)}, found {found}.") from None


def _coerce(value: Any, annotation: Any) -> Any:
    """`coerce` without the message: raises TypeError or ValueError."""
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin is Literal:
        return _literal(value, get_args(annotation))
    if origin in (Union, types.UnionType):
        return _union(value, get_args(annotation))
    if origin in (tuple, list, Sequence):
        return _sequence(value, origin, get_args(annotation))
    if annotation in READERS:
        return READERS[annotation](value)
    if is_dataclass(annotation) and isinstance(annotation, type) and isinstance(value, Mapping):
        return build(annotation, value)
    kind = origin or annotation
    if isinstance(kind, type) and not isinstance(value, kind):
        raise TypeError
    return value


def _literal(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    if isinstance(value, str):
        for choice in choices:
            if choice is None and value.lower() in NONE or choice is not None and value == str(choice):
                return choice
    raise ValueError


def _union(value: Any, members: tuple[Any, ...]) -> Any:
    """The first member that takes the value: members of the value's own type first, text last."""
    if value is None and types.NoneType in members:
        return None
    own = [member for member in members if type(value) is (get_origin(member) or member)]
    if isinstance(value, str):
        own = []
        one_word = str in members and "," not in value  # a word stays a word where a tuple is possible too
        members = tuple(m for m in members if not (one_word and get_origin(m) in (tuple, list, Sequence)))
    for member in sorted([*own, *members], key=lambda m: m is str):
        try:
            return _coerce(value, member)
        except (TypeError, ValueError):
            continue
    raise ValueError


def _sequence(value: Any, origin: type, members: tuple[Any, ...]) -> Any:
    """Comma-separated text, a list or a tuple, each item by its own annotation."""
    if isinstance(value, str):
        items: list[Any] = [item.strip() for item in value.strip("()[] ").split(",") if item.strip()]
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        raise TypeError
    if origin is tuple and members and members[-1] is not Ellipsis:
        if len(items) != len(members):
            raise ValueError
        return tuple(_coerce(item, member) for item, member in zip(items, members, strict=True))
    member = members[0] if members else Any
    return (list if origin is list else tuple)(_coerce(item, member) for item in items)


def _boolean(value: Any) -> bool:
    if isinstance(value, str):
        if value.lower() in TRUE | FALSE:
            return value.lower() in TRUE
        raise ValueError
    if not isinstance(value, bool):
        raise TypeError
    return value


def _integer(value: Any) -> int:
    """Whole numbers, also written as 1e4; a boolean is no number."""
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if isinstance(value, float) and not value.is_integer():  # also infinity and NaN
        raise ValueError
    return int(value)


def _real(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)  # YAML reads 1e-4 as text


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _none(value: Any) -> None:
    if value is not None and not (isinstance(value, str) and value.lower() in NONE):
        raise ValueError


READERS: dict[Any, Callable[[Any], Any]] = {
    bool: _boolean,
    int: _integer,
    float: _real,
    str: _text,
    types.NoneType: _none,
}


def check_seed(seed: int) -> None:
    """Make sure that every generator takes a seed: numpy's takes 32 bits.

    Raises:
        SettingError: it is negative or too large.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise SettingError(f"A seed is a whole number from 0 to {2**32 - 1}, found {seed}.")


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Entries in which two nested mappings differ, each as "name: value and value" with dots between nested names."""
    first, second = _flat(one), _flat(other)
    return [
        f"{name}: {first.get(name, 'default')} and {second.get(name, 'default')}"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _settings(cls: type) -> list[Field[Any]]:
    if not is_dataclass(cls):
        raise TypeError(f"{cls!r} is no dataclass")
    return [field for field in fields(cls) if field.init]


def _title(cls: type) -> str:
    """What a person calls the class: the registry name where it has one."""
    name = getattr(cls, "name", None)
    is_setting = any(field.name == "name" for field in _settings(cls))
    return name if isinstance(name, str) and not is_setting else cls.__name__


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _written(annotation: Any) -> str:
    """An annotation as a person would write it."""
    if annotation is types.NoneType:
        return "None"
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("NoneType", "None")


def _attributes(docstring: str) -> dict[str, str]:
    """Entries of the ``Attributes:`` section of a Google docstring, each on one line."""
    section = SECTION.search(cleandoc(docstring))
    entries: dict[str, str] = {}
    name = ""
    for line in cleandoc(section.group(1)).splitlines() if section else []:
        entry = ENTRY.match(line)
        if entry:
            name = entry.group(1)
            entries[name] = entry.group(2).strip()
        elif name and line.strip():
            entries[name] = f"{entries[name]} {line.strip()}".strip()
    return entries
