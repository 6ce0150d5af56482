"""Tries mutants of a file: changes one thing at a time, at random places, and prints which changes no test notices.

    python scripts/mutants.py bayeslora/predict/resampling.py tests/predict/test_metrics.py --count 20

A mutant is another comparison, another operator, a number that is one more, a truth value turned round, a call that is
not made, or an argument by name that is withheld. It is made in a copy of the checkout, and survives if the tests stay
green. Not every survivor is a fault of the tests: some changes change nothing that matters.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("bayeslora", "models", "inference", "tests", "benchmarks", "scripts")
PAIRS = (
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.Is, ast.IsNot),
    (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or),
)  # fmt: skip
OTHER = {one: two for pair in PAIRS for one, two in (pair, pair[::-1])}


def changes(tree: ast.AST) -> Iterator[tuple[ast.AST, Callable[[], None]]]:
    """Every place of a tree that can be changed, and what changes it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
            yield node, lambda node=node: node.ops.__setitem__(0, OTHER[type(node.ops[0])]())
        elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OTHER:
            yield node, lambda node=node: setattr(node, "op", OTHER[type(node.op)]())
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, lambda node=node: setattr(node, "value", not node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield node, lambda node=node: setattr(node, "value", node.value + 1)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, lambda node=node: setattr(node, "value", ast.Constant(None))
        elif isinstance(node, ast.keyword) and node.arg:
            for call in ast.walk(tree):
                if isinstance(call, ast.Call) and node in call.keywords:
                    yield node, lambda node=node, call=call: call.keywords.remove(node)


def survives(source: str, place: int, file: Path, copy: Path, tests: list[str]) -> str | None:
    """The line as it was and as it is, if no test notices the change at a place."""
    tree = ast.parse(source)
    node, change = list(changes(tree))[place]
    change()
    before, line = source.splitlines()[node.lineno - 1].strip(), node.lineno
    (copy / file).write_text(ast.unparse(tree), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"}
    try:
        ended = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        return None
    return (
        f"{file}:{line}: {type(node).__name__}, {ast.unparse(node)!r} now: {before}" if not ended.returncode else None
    )


def main() -> None:
    """Try mutants of one file, and print the survivors and how many there were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path, help="of the package, from the root of the checkout")
    parser.add_argument("tests", nargs="+", help="arguments of pytest")
    parser.add_argument("--count", type=int, default=20, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source = (ROOT / options.file).read_text(encoding="utf-8")
    places = list(range(len(list(changes(ast.parse(source))))))
    chosen = random.Random(options.seed).sample(places, min(options.count, len(places)))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in PARTS:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, copy / part, symlinks=True)
        shutil.copy(ROOT / "pyproject.toml", copy)
        tried = [survives(source, place, options.file, copy, options.tests) for place in chosen]
    found = [survivor for survivor in tried if survivor]
    print("\n".join([*found, f"{len(found)} of {len(chosen)} mutants of {options.file} survived"]))


if __name__ == "__main__":
    main()
