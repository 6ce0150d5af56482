from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, Literal

import pytest

from bayeslora.errors import SettingError
from bayeslora.settings import build, coerce, describe


@dataclass(frozen=True)
class Base:
    """Settings that others share.

    Attributes:
        epochs: passes over the
            training rows.
        seed: of the run.
    """

    epochs: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Method(Base):
    """A method.

    A paragraph with a colon: it is no attribute.

    Attributes:
        rate: step size: of the optimiser.
        seed: of the method.

    Returns:
        nothing, really.
    """

    name: ClassVar[str] = "method"
    rate: float = 1e-3
    bayes: bool = True
    prior: Literal["paper", "hierarchical"] = "paper"
    rank: int | None = None
    layers: tuple[int, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    targets: str | tuple[str, ...] = "all-linear"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError("rate must be positive")


@dataclass(frozen=True)
class Outer:
    method: Method
    note: str = ""


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("epochs", "5", 5),
        ("epochs", 5, 5),
        ("epochs", "1e4", 10_000),
        ("epochs", 4.0, 4),
        ("rate", "1e-4", 1e-4),
        ("rate", 1, 1.0),
        ("bayes", "false", False),
        ("bayes", "On", True),
        ("prior", "hierarchical", "hierarchical"),
        ("rank", "none", None),
        ("rank", "8", 8),
        ("rank", None, None),
        ("layers", "1, 2,3", (1, 2, 3)),
        ("layers", [4], (4,)),
        ("layers", "", ()),
        ("betas", "0.5,0.6", (0.5, 0.6)),
        ("targets", "query", "query"),
        ("targets", "query,value", ("query", "value")),
        ("targets", ["query"], ("query",)),
        ("extra", {"a": 1}, {"a": 1}),
    ],
)
def test_values_are_read_by_the_annotation(name: str, given: Any, expected: Any) -> None:
    value = getattr(build(Method, {name: given}), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("epochs", "2.5", "int"),
        ("epochs", True, "int"),
        ("epochs", "inf", "int"),
        ("rate", "fast", "float"),
        ("rate", False, "float"),
        ("bayes", "maybe", "bool"),
        ("bayes", 1, "bool"),
        ("prior", "papers", "Literal['paper', 'hierarchical']"),
        ("rank", "x", "int | None"),
        ("layers", "1,x", "tuple[int, ...]"),
        ("betas", "0.9", "tuple[float, float]"),
        ("extra", "a", "dict[str, Any]"),
    ],
)
def test_a_wrong_value_names_setting_type_and_value(name: str, given: Any, expected: str) -> None:
    with pytest.raises(SettingError) as error:
        build(Method, {name: given})
    assert f"method: {name} expects {expected}, found {given!r}" in str(error.value)


def test_an_unknown_name_gets_the_nearest_spelling() -> None:
    with pytest.raises(SettingError, match="Unknown setting of method 'epoch'. Did you mean 'epochs'"):
        build(Method, {"epoch": 1})
    with pytest.raises(SettingError, match="Unknown setting of method 'name'"):  # a class variable
        build(Method, {"name": "x"})


def test_what_the_class_refuses_is_a_setting_error() -> None:
    with pytest.raises(SettingError, match="method: rate must be positive"):
        build(Method, {"rate": "-1"})


def test_nested_dataclasses_are_built_from_mappings() -> None:
    assert build(Outer, {"method": {"epochs": "7"}}).method == Method(epochs=7)
    with pytest.raises(SettingError, match="Outer needs a value for method"):
        build(Outer, {})
    with pytest.raises(SettingError, match="Unknown setting of method 'epcohs'"):
        build(Outer, {"method": {"epcohs": 7}})


def test_a_union_prefers_the_values_own_type() -> None:
    assert coerce(1, float | int, "x") == 1 and type(coerce(1, float | int, "x")) is int
    assert type(coerce("1", int | float | str, "x")) is int
    assert coerce("auto", int | str, "x") == "auto"


def test_help_comes_from_the_docstrings() -> None:
    settings = {setting.name: setting for setting in describe(Method)}
    assert list(settings) == [
        "epochs", "seed", "rate", "bayes", "prior", "rank", "layers", "betas", "targets", "extra",
    ]  # fmt: skip
    assert settings["epochs"] == ("epochs", "int", 3, "passes over the training rows.")
    assert settings["seed"].help == "of the method."
    assert settings["rate"].help == "step size: of the optimiser."
    assert settings["rank"] == ("rank", "int | None", None, "")
    assert settings["extra"].default == {}
    assert describe(Outer)[0].default is MISSING
