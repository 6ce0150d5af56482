"""The folder of a fit: what it holds, and whether a fit may begin or go on in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayeslora.errors import SettingError
from bayeslora.posterior import RECORD
from bayeslora.settings import differing

__all__ = ["CHECKPOINTS", "check_new", "check_same", "has_checkpoint", "holds_fit", "seconds_before"]

CHECKPOINTS = "checkpoints"


def has_checkpoint(folder: Path) -> bool:
    """Whether a fit could be resumed from the folder."""
    return any((folder / CHECKPOINTS).glob("checkpoint-*"))


def holds_fit(folder: Path) -> bool:
    """Whether there is something in the folder that took time to make."""
    return (folder / RECORD).is_file() or has_checkpoint(folder)


def check_new(folder: Path) -> None:
    """Make sure that a fit into the folder overwrites no other.

    Raises:
        SettingError: it would.
    """
    if holds_fit(folder):
        raise SettingError(
            f"'{folder}' holds a fit already: give resume=True to go on with it, or choose another output_dir."
        )


def check_same(folder: Path, record: Mapping[str, Any], program: Mapping[str, Any]) -> None:
    """Make sure that the fit that is to be resumed is the one that was begun in the folder.

    Args:
        folder: of the fit.
        record: entries of the fit's record that must be what they were.
        program: what `bayeslora.posterior.described` says of its program. The place of the base network may change.

    Raises:
        SettingError: something differs; the message says what.
    """
    saved = _saved(folder)
    if not saved:  # stopped before its first posterior was written
        return
    there = {name: saved["record"][name] for name in record} | {"program": saved["program"] | {"base": ""}}
    now = {**record, "program": {**program, "base": ""}}
    changed = differing(there, json.loads(json.dumps(now)))
    if changed:
        raise SettingError(
            f"'{folder}' holds another fit (there and now): {'; '.join(changed)}. Resume with what it was begun with, "
            "or choose another output_dir."
        )


def seconds_before(folder: Path) -> float:
    """Seconds that the fit in the folder took up to its last checkpoint; 0 if there is none."""
    saved = _saved(folder)
    return float(saved["record"]["cost"].get("seconds", 0.0)) if saved else 0.0


def _saved(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
