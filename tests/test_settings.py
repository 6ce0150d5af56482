from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest

from bayeslora.errors import SettingError
from bayeslora.settings import Count, Positive, Settings, build, coerce


@dataclass(frozen=True)
class Base(Settings):
    """Settings that others share.

    Attributes:
        epochs: passes over the
            training rows.
        seed: of the run.
    """

    epochs: Count = 3
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
    rate: Positive = 1e-3
    bayes: bool = True
    prior: Literal["paper", "hierarchical"] = "paper"
    rank: int | None = None
    layers: tuple[int, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    targets: str | tuple[str, ...] = "all-linear"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate > 1:
            raise ValueError("a rate of more than 1 diverges")


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
        ("targets", """['query', "it's", '2']""", ("query", "it's", "2")),
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
        ("epochs", "2.5", "should be a valid integer, unable to parse string as an integer"),
        ("epochs", "1.2.3e4", "should be a valid integer, unable to parse string as an integer"),
        ("epochs", True, "should be a valid integer, unable to parse string as an integer"),
        ("epochs", "inf", "should be a valid integer, unable to parse string as an integer"),
        ("epochs", 0, "should be greater than or equal to 1"),
        ("rate", "fast", "should be a valid number, unable to parse string as a number"),
        ("rate", False, "should be a valid number, unable to parse string as a number"),
        ("rate", float("nan"), "should be a finite number"),
        ("bayes", "maybe", "should be a valid boolean, unable to interpret input"),
        ("prior", "papers", "should be 'paper' or 'hierarchical', found 'papers'. Did you mean 'paper'?"),
        ("rank", "x", "should be a valid integer, unable to parse string as an integer"),
        ("layers", "1,x", "should be a valid integer, unable to parse string as an integer"),
        ("betas", "0.9", "Field required"),
        ("extra", "a", "should be a valid dictionary"),
    ],
)
def test_a_wrong_value_names_setting_type_and_value(name: str, given: Any, expected: str) -> None:
    with pytest.raises(SettingError) as error:
        build(Method, {name: given})
    assert f"method: {name} {expected}" in str(error.value) and "found" in str(error.value)
    with pytest.raises(SettingError, match=f"method: {name}"):
        Method(**{name: given})


def test_an_unknown_name_gets_the_nearest_spelling() -> None:
    misspelt: dict[str, Any] = {"epoch": 1}
    with pytest.raises(SettingError, match="Unknown setting of method 'epoch'. Did you mean 'epochs'"):
        build(Method, {"epoch": 1})
    with pytest.raises(SettingError, match="Unknown setting of method 'name'"):  # a class variable
        build(Method, {"name": "x"})
    with pytest.raises(SettingError, match="Unknown setting of method 'epoch'. Did you mean 'epochs'"):
        Method(**misspelt)


def test_what_the_class_refuses_is_a_setting_error() -> None:
    with pytest.raises(SettingError, match="method: a rate of more than 1 diverges"):
        build(Method, {"rate": "2"})


def test_nested_dataclasses_are_built_from_mappings() -> None:
    assert build(Outer, {"method": {"epochs": "7"}}).method == Method(epochs=7)
    with pytest.raises(SettingError, match="Outer needs a value for method"):
        build(Outer, {})
    with pytest.raises(SettingError, match="Unknown setting of method 'epcohs'"):
        build(Outer, {"method": {"epcohs": 7}})


def test_a_union_prefers_the_values_own_type() -> None:
    assert coerce(1, float | int, "x") == 1 and type(coerce(1, float | int, "x")) is int
    assert coerce("auto", int | str, "x") == "auto"
