"""What is installed: a wheel that works elsewhere, a quick import, and no second copy of a room."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

USE = """
import bayeslora, bayeslora.models, bayeslora.inference, bayeslora.demo
task = bayeslora.load_task("demo", train_size=8)
program = bayeslora.Program.from_pretrained("demo", task)
print(bayeslora.__file__, bayeslora.models.__file__, bayeslora.inference.__file__, len(program.sites))
"""


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_a_wheel_works_in_another_folder(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    site = tmp_path / "site"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    ran = python(USE, tmp_path, PYTHONPATH=str(site))
    assert ran.returncode == 0, ran.stderr
    *files, sites = ran.stdout.split()
    assert [Path(file).relative_to(site).as_posix() for file in files] == [
        "bayeslora/__init__.py",
        "bayeslora/models/__init__.py",
        "bayeslora/inference/__init__.py",
    ]
    assert int(sites) > 0
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "bayeslora").rglob("__init__.py")}
    for room in ("models", "inference"):
        found = (ROOT / room).rglob("__init__.py")
        rooms |= {f"bayeslora/{path.parent.relative_to(ROOT).as_posix()}" for path in found}
    assert rooms == {path.parent.relative_to(site).as_posix() for path in site.rglob("__init__.py")}
    # Nothing called models or inference lands beside the package.
    assert sorted(path.name for path in site.iterdir() if path.suffix != ".dist-info") == ["bayeslora"]


def test_rooms_refuse_to_be_imported_under_another_name() -> None:
    for room in ("models", "inference"):
        ran = python(f"import {room}", ROOT)
        assert ran.returncode != 0
        assert f"import bayeslora.{room}, not {room}" in ran.stderr


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("torch", "transformers", "datasets", "arviz", "matplotlib", "pyro")
    code = f"import sys, bayeslora; print([name for name in {heavy} if name in sys.modules])"
    ran = python(code, tmp_path)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_an_unknown_public_name_is_an_attribute_error(tmp_path: Path) -> None:
    ran = python("import bayeslora; bayeslora.fitt", tmp_path)
    assert "AttributeError" in ran.stderr
