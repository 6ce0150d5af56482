"""Settings as dataclasses, which are their one home: checked by pydantic, and read from command line strings.

Fields give names, types with their bounds and defaults; the ``Attributes:`` of the docstring says what they are.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic import Field as Bound
from typing_extensions import Self, TypedDict

from bayeslora.errors import SettingError, unknown

__all__ = [
    "Count",
    "Deviation",
    "Finite",
    "NotNegative",
    "Part",
    "Positive",
    "Seed",
    "Settings",
    "Size",
    "build",
    "coerce",
]

T = TypeVar("T")

Positive = Annotated[float, Bound(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Bound(allow_inf_nan=False)]
NotNegative = Annotated[float, Bound(ge=0, allow_inf_nan=False)]
#: A prior standard deviation: one whose square single precision cannot hold would be no prior, without a word.
Deviation = Annotated[float, Bound(gt=0, lt=1e15)]
#: A part of a whole, up to all of it.
Part = Annotated[float, Bound(ge=0, le=1)]
Count = Annotated[int, Bound(ge=1)]
Size = Annotated[int, Bound(ge=0)]
#: What every generator takes: numpy's takes 32 bits.
Seed = Annotated[int, Bound(ge=0, lt=2**32)]

NONE = {"none", "null", ""}


class Settings:
    """Base of dataclasses whose fields are checked when they are made.

    A wrong name or value is a `SettingError`; a subclass may check in ``__post_init__`` what fields say of each other.
    """

    def __new__(cls, *_: Any, **values: Any) -> Self:
        """Refuse names that no field has, as `build` does."""
        _known(cls, values)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, value in _checked(type(self), vars(self)).items():
            object.__setattr__(self, name, value)


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make an instance of a dataclass from values by field name; strings are read by the type of their field.

    Args:
        cls: a dataclass.
        values: field name to value; a nested dataclass may be a mapping.

    Raises:
        SettingError: for a name that is no field, a value of another type, a value that the class itself
            refuses, or a field without default that is missing.
    """
    found = _checked(cls, values)
    needed = [field.name for field in _settings(cls) if field.default is field.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise SettingError(f"{_title(cls)} needs a value for {', '.join(missing)}.")
    try:
        return cls(**found)
    except (TypeError, ValueError) as error:
        raise SettingError(f"{_title(cls)}: {error}") from error


def coerce(value: Any, annotation: Any, name: str) -> Any:
    """One value, a string of the command line or one of YAML or Python, in an annotated type.

    Raises:
        SettingError: the value cannot be read as that type.
    """
    try:
        return TypeAdapter(annotation).validate_python(_read(value, annotation))
    except ValidationError as error:
        raise SettingError(_message(name, error)) from None


def _known(cls: type, names: Iterable[str]) -> None:
    """Refuse a name that no field has."""
    hints, _ = _schema(cls)
    for name in names:
        if name not in hints:
            raise SettingError(unknown(f"setting of {_title(cls)}", str(name), hints))


def _checked(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of fields in their types."""
    hints, adapter = _schema(cls)
    _known(cls, values)
    try:
        found: dict[str, Any] = adapter.validate_python(
            {name: _read(value, hints[name]) for name, value in values.items()}
        )
    except ValidationError as error:
        raise SettingError(_message(f"{_title(cls)}: {error.errors()[0]['loc'][0]}", error)) from None
    return found


@cache
def _schema(cls: type) -> tuple[dict[str, Any], TypeAdapter[Any]]:
    """The types of a dataclass's fields, and what checks values by name against them."""
    hints = get_type_hints(cls, include_extras=True)
    hints = {field.name: hints[field.name] for field in _settings(cls)}
    # Type checkers accept TypedDict with a literal mapping alone. Here the fields of a dataclass are the mapping, known
    # when the program runs, so that a partial set of values is checked by pydantic as the whole is.
    shape: Any = TypedDict(cls.__name__, hints, total=False)  # type: ignore[misc]
    return hints, TypeAdapter(with_config(ConfigDict(arbitrary_types_allowed=True))(shape))


def _message(name: str, error: ValidationError) -> str:
    first, *others = error.errors()
    expected = [each["msg"] for each in (first, *others) if each["loc"][:1] == first["loc"][:1]]
    said = " or ".join(dict.fromkeys(text.removeprefix("Input ") for text in expected))
    choices = re.findall(r"'([^']+)'", str(first.get("ctx", {}).get("expected", "")))
    near = get_close_matches(str(first["input"]), choices, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{name} {said}, found {first['input']!r}.{hint}"


def _read(value: Any, annotation: Any) -> Any:
    """What pydantic does not read of text: none, lists with commas, whole numbers such as 1e4; nested settings."""
    is_union = get_origin(annotation) in (Union, types.UnionType)
    members = [_bare(member) for member in (get_args(annotation) if is_union else [annotation])]
    if isinstance(value, Mapping):
        nested = next((member for member in members if isinstance(member, type) and is_dataclass(member)), None)
        return value if nested is None else build(nested, value)
    if isinstance(value, bool) and bool not in members and {int, float} & set(members):
        return repr(value)  # a truth is no number
    if not isinstance(value, str):
        return value
    if types.NoneType in members and value.lower() in NONE:
        return None
    is_list = any(get_origin(member) in (tuple, list, Sequence) for member in members)
    if is_list and ("," in value or str not in members):
        return [_unquoted(item.strip()) for item in value.strip("()[] ").split(",") if item.strip()]
    if int in members and re.fullmatch(r"\d+\.?\d*[eE]\+?\d+", value):
        return float(value)
    return value


def _unquoted(text: str) -> str:
    """A word of a list without the quotation marks around it, which are those of a list as Python writes it."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _settings(cls: type) -> list[Field[Any]]:
    if not is_dataclass(cls):
        raise TypeError(f"{cls!r} is no dataclass")
    return [field for field in fields(cls) if field.init]


def _title(cls: type) -> str:
    """What a person calls the class: the registry name where it has one."""
    name = getattr(cls, "name", None)
    is_setting = any(field.name == "name" for field in _settings(cls))
    return name if isinstance(name, str) and not is_setting else cls.__name__
