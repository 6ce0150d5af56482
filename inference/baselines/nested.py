"""Backends over another backend, whose settings are among theirs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bayeslora.inference import BACKENDS
from bayeslora.inference.base import Backend, Run, default_model_of, fits_of, rows_wanted
from bayeslora.settings import Settings

if TYPE_CHECKING:
    from bayeslora.program import Program

__all__ = ["Over"]


@dataclass(frozen=True, kw_only=True)
class Over(Settings):
    """A backend over another one.

    Attributes:
        of: name of the other one.
        of_settings: its settings by name; in a shell ``of.epochs=3``.
    """

    of: str = "mle"
    of_settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        # With those that were left out, so that a record says them all.
        object.__setattr__(self, "of_settings", asdict(self.inner))

    @cached_property
    def inner(self) -> Backend:
        """The other backend."""
        found: Backend = BACKENDS.build(self.of, self.of_settings)
        return found

    @property
    def default_model(self) -> tuple[str, dict[str, Any]]:
        """The Pyro model, and its settings, that the other backend has by default."""
        return default_model_of(self.inner)

    @property
    def fits(self) -> int:
        """How many independent fits the other backend makes."""
        return fits_of(self.inner)

    def sets_aside(self, program: Program, rows: int, run: Run) -> int:
        """How many of so many training rows the other backend sets aside."""
        return rows_wanted(self.inner, program, rows, run)
