"""The folder of a fit: what it holds, and whether a fit may begin or go on in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bayeslora import files
from bayeslora.errors import SettingError
from bayeslora.posterior import RECORD, TENSORS, check_foreign, describe, read_record
from bayeslora.program import Program
from bayeslora.settings import differing

__all__ = [
    "CHAIN",
    "CHECKPOINTS",
    "check_new",
    "check_same",
    "has_checkpoint",
    "holds_fit",
    "is_finished",
    "last_checkpoint",
    "seconds_before",
]

CHECKPOINTS = "checkpoints"
#: What the folders of independent fits begin with, within that of their mixture.
CHAIN = "chain-"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a fit that was written to its end; None if there is none."""
    found = {}
    for state in (folder / CHECKPOINTS).glob("checkpoint-*/trainer_state.json"):  # which the Trainer writes last
        with suppress(ValueError):  # half of a file
            found[int(json.loads(state.read_text(encoding="utf-8"))["global_step"])] = state.parent
    return found[max(found)] if found else None


def has_checkpoint(folder: Path) -> bool:
    """Whether a fit could be resumed from the folder: from a checkpoint of its own, or from one of its chains."""
    return last_checkpoint(folder) is not None or any(map(holds_fit, folder.glob(f"{CHAIN}*")))


def holds_fit(folder: Path) -> bool:
    """Whether there is something in the folder that took time to make."""
    files.recover(folder)
    return (folder / RECORD).is_file() or has_checkpoint(folder)


def is_finished(folder: Path) -> bool:
    """Whether a fit in the folder has come to its end."""
    return bool(read_record(folder).get("record", {}).get("finished"))


def check_new(folder: Path) -> None:
    """Make sure that a fit into the folder replaces nothing that took time to make.

    Raises:
        SettingError: it would replace a fit.
        PosteriorError: it would replace another adapter.
    """
    check_foreign(folder)
    if holds_fit(folder):
        raise SettingError(
            f"'{folder}' holds a fit already: give resume=True to go on with it, or choose another output_dir."
        )


def check_same(folder: Path, record: Mapping[str, Any], program: Program) -> None:
    """Make sure that the fit that is to be resumed is the one that was begun in the folder.

    Args:
        folder: of the fit.
        record: entries of the fit's record that must be what they were.
        program: of the fit. The place of the base network may change.

    Raises:
        SettingError: something differs; the message says what.
    """
    saved = read_record(folder)
    if not saved:  # stopped before its first posterior was written
        return
    there = {name: saved["record"].get(name) for name in record} | {"program": saved["program"] | {"base": ""}}
    now = {**record, "program": {**describe(program), "base": ""}}
    changed = differing(there, json.loads(json.dumps(now)))
    if not changed:
        centre = files.read_tensors(folder / TENSORS)
        changed = [
            f"initial value of {site.name}"
            for site in program.sites
            if not torch.allclose(centre[f"centre/{site.name}"], site.initial.cpu())
        ]
    if changed:
        raise SettingError(
            f"'{folder}' holds another fit (there and now): {'; '.join(changed)}. Resume with what it was begun with, "
            "or choose another output_dir."
        )


def seconds_before(folder: Path) -> float:
    """Seconds that the fit in the folder took up to its last checkpoint; 0 if there is none."""
    saved = read_record(folder)
    return float(saved["record"]["cost"].get("seconds", 0.0)) if saved else 0.0
