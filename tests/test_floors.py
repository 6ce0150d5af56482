"""Imports run down only, those within functions counted; what is for type checkers alone may look up.

The floors stand from the bricks up. The data of arviz that a posterior becomes (`diagnostics.inference_data` and what
it is made of) stand below the posterior, which offers them as a method; the rest of the diagnostics fits and loads.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = """
    errors files rng progress signals settings registry identity record demo tasks predict observations positions
    networks store recipes sites adapters finding joined switches weights models program passes predictors generation
    diagnostics.versions diagnostics.summaries diagnostics.inference_data
    posterior inference diagnostics harness app __main__
""".split()


def modules() -> dict[str, Path]:
    """Every module of the package, by its name under ``bayeslora``."""
    found = {}
    for top in ("bayeslora", "models", "inference"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            inside = parts[1:] if top == "bayeslora" else parts
            if top == "bayeslora" and inside[0] in ("models", "inference"):
                continue  # the same files, by a link
            found[".".join(part for part in inside if part != "__init__")] = path
    return found


def floor(name: str) -> int:
    fitting = [each for each in FLOORS if name == each or name.startswith(f"{each}.")]
    assert fitting, f"'{name}' has no floor: name one here"
    return FLOORS.index(max(fitting, key=len))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Names under ``bayeslora`` that a file imports when it runs, and where."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {id(child) for node in typed for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bayeslora":
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("bayeslora."))


@pytest.mark.parametrize("name", sorted(name for name in modules() if name))
def test_imports_run_down(name: str) -> None:
    here = floor(name)
    for line, found in imported(modules()[name]):
        target = found.removeprefix("bayeslora.")
        assert floor(target) <= here, f"{name}, line {line}: {found} is on a floor above"


def test_the_floors_are_those_that_there_are() -> None:
    tops = {name.split(".")[0] for name in modules() if name}
    assert {each.split(".")[0] for each in FLOORS} == tops


def test_a_floor_is_seen(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bayeslora.app import cli\n"
        "def f():\n    from bayeslora.posterior import Posterior\n"
    )
    assert list(imported(tmp_path / "x.py")) == [(5, "bayeslora.posterior.Posterior")]
    assert floor("posterior") > floor("program") > floor("models.gaussian") > floor("tasks.spec")
