from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bayeslora.app.terminal import described


@dataclass
class Base:
    """Settings that others share.

    Attributes:
        epochs: passes over the
            training rows.
        seed: of the run.
    """

    epochs: int = 3
    seed: int = 0


@dataclass
class Method(Base):
    """A method.

    A paragraph with a colon: it is no attribute.

    Attributes:
        rate (float): step size: of the optimiser.
        seed: of the method.

    Returns:
        nothing: really.
    """

    rate: float = 1e-3
    rank: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outer:
    method: Method
    note: str = ""


def test_help_comes_from_the_docstrings() -> None:
    assert described(Method) == [
        ("epochs", "int", "3", "passes over the training rows."),
        ("seed", "int", "0", "of the method."),
        ("rate", "float", "0.001", "step size: of the optimiser."),
        ("rank", "int | None", "None", ""),
        ("extra", "dict[str, Any]", "{}", ""),
    ]
    assert described(Outer)[0] == ("method", "Method", "", "")
