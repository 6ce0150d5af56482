"""Names of what there is to choose from, and plug-ins that add to them.

A registry knows the names and where their classes are; a class is imported when it is asked for. What a user registers
(`bayeslora.register`) comes beside: from a file of their own, or from an installed package that names its module as an
entry point of the group ``bayeslora.plugins``. A saved posterior holds names alone, and reading it imports nothing
that its user has not installed or imported.
"""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from bayeslora import files
from bayeslora.errors import SettingError, unknown
from bayeslora.settings import build

__all__ = ["FROM_PLUGIN", "Registry", "check_names", "load_file", "loaded_files"]

T = TypeVar("T")

GROUP = "bayeslora.plugins"
#: What to do about a name in a saved posterior that nothing bears.
FROM_PLUGIN = "One that comes from a plug-in needs it: import its module before, or give --plugin FILE in a shell."
#: Files that `load_file` was asked for, and the fingerprint of each when it was imported.
_LOADED: dict[Path, str] = {}


class Registry(Generic[T]):
    """Names of one sort of thing, and the things by their names.

    Args:
        sort: what they are, for messages.
        homes: each by its name, or where it is: "module:attribute".
        reserved: whether a name stands for something of the library's own that is kept elsewhere.
    """

    def __init__(
        self, sort: str, homes: Mapping[str, T | str], reserved: Callable[[str], bool] = lambda name: False
    ) -> None:
        self.sort = sort
        self._homes = dict(homes)
        self._own, self._reserved = frozenset(homes), reserved

    def __getitem__(self, name: str) -> T:
        home = self._home(name)
        if isinstance(home, str):
            module, _, attribute = home.partition(":")
            home = self._homes[name] = cast(T, getattr(import_module(module), attribute))
        return home

    def _home(self, name: str) -> T | str:
        if name not in self:
            raise SettingError(unknown(self.sort, name, self))
        return self._homes[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._homes:
            _load_installed()
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        _load_installed()
        return iter(sorted(self._homes))

    def __len__(self) -> int:
        _load_installed()
        return len(self._homes)

    def __repr__(self) -> str:
        return f"Registry of each {self.sort}: {', '.join(self)}"

    def items(self) -> Iterator[tuple[str, T]]:
        """Each name and its thing, by name."""
        return ((name, self[name]) for name in self)

    def build(self, name: str, settings: Mapping[str, Any]) -> Any:
        """An instance of the class of a name; strings are read by the type of their setting.

        Raises:
            SettingError: the name or a setting is unknown, or a setting has a value that it cannot take.
        """
        cls: Any = self[name]
        return build(cls, settings)

    def check(self, name: str, settings: Iterable[str]) -> None:
        """Make sure that a name and its settings are spelled right, without an import of what the class needs.

        Raises:
            SettingError: one is unknown.
        """
        home = self._home(name)
        if isinstance(home, str):
            check_names(name, home, settings)

    def add(self, name: str, thing: T) -> None:
        """Let a thing of a user's own go by a name; the same one may be made again, as a notebook's cell does.

        Raises:
            SettingError: the name is another one's.
        """
        taken = self._homes.get(name)
        if self._reserved(name) or (taken is not None and not self._again(name, taken, thing)):
            whose = "of the library's own" if name in self._own or taken is None else f"at {_origin(taken)}"
            raise SettingError(f"There is a {self.sort} '{name}' already, {whose}. Choose another name.")
        self._homes[name] = thing

    def _again(self, name: str, taken: T | str, thing: T) -> bool:
        """Whether one and the same thing is made again; what is no class does not say where it was made."""
        if isinstance(thing, type):
            return _origin(taken) == _origin(thing)
        return taken == thing if name in self._own else type(taken) is type(thing)


def check_names(title: str, home: str, settings: Iterable[str]) -> None:
    """Make sure that a dataclass of the package, which is read but not imported, has fields of these names.

    Raises:
        SettingError: it has not.
    """
    known = _declared(*home.split(":")) if settings else []
    for name in settings:
        if name not in known:
            raise SettingError(unknown(f"setting of {title}", name, known))


@cache
def _declared(module: str, attribute: str) -> list[str]:
    """Names of the fields of a dataclass and of its bases."""
    path = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    imported = {each.name: node.module for node in body if isinstance(node, ast.ImportFrom) for each in node.names}
    found = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == attribute)
    fields = [
        item.target.id
        for item in found.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and "ClassVar" not in ast.unparse(item)
    ]
    for base in [base.id for base in found.bases if isinstance(base, ast.Name)]:
        home = imported.get(base, module)
        if home is not None and home.startswith("bayeslora."):
            fields += _declared(home, base)
    return fields


def _origin(thing: object) -> str:
    if isinstance(thing, str):
        return thing
    return f"{thing.__module__}:{thing.__qualname__}" if isinstance(thing, type) else type(thing).__name__


@cache
def _load_installed() -> None:
    """Import the plug-ins of installed packages, once; one that cannot be imported does not stop the others."""
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(f"The plug-in {entry.name} ({entry.value}) cannot be imported: {error!r}", stacklevel=2)


def load_file(path: str | Path) -> None:
    """Import a file of a user's own that registers something, once.

    Raises:
        SettingError: there is no such file, or it cannot be imported.
    """
    file = Path(path).expanduser().resolve()
    if any(getattr(module, "__file__", None) == str(file) for module in list(sys.modules.values())):
        if file not in _LOADED and file.is_file():
            _LOADED[file] = files.fingerprint(file)
        return
    name = file.stem if file.stem not in sys.modules else f"{file.stem}_plugin"
    spec = spec_from_file_location(name, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise SettingError(f"There is no plug-in '{path}': expected a file of Python.")
    found = files.fingerprint(file)
    sys.modules[name] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise SettingError(f"The plug-in '{path}' cannot be imported: {type(error).__name__}: {error}") from error
    _LOADED[file] = found


def loaded_files() -> dict[Path, str]:
    """The files of a user's own that `load_file` was asked for, and the fingerprint of each when it was imported."""
    return dict(_LOADED)
