"""Files that are never half written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["digests", "fingerprint", "read_tensors", "recover", "staged", "write_json", "write_tensors"]

#: Name of a folder with all files that are to be moved together.
WHOLE = ".saved-"

#: What a configuration says of where and how it was loaded, rather than of the network's shape.
VOLATILE = frozenset(
    {
        "_name_or_path", "architectures", "dtype", "id2label", "label2id", "name_or_path", "num_labels", "pad_token_id",
        "problem_type", "torch_dtype", "transformers_version", "use_cache", "gradient_checkpointing",
    }
)  # fmt: skip


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside the final files; move what it holds into ``folder`` if the block succeeds.

    Each file replaces its namesake in one step. A process that is killed between two steps, or an error of the system
    there, leaves the others in a folder from which `recover` goes on.
    """
    stage = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield stage
        recover(folder)
        whole = stage.rename(folder / stage.name.replace(".saving-", WHOLE))
        moved = False
        try:
            for _ in _move(whole, folder):
                moved = True
        except OSError:
            if not moved:  # nothing is replaced, and nothing shall be later
                shutil.rmtree(whole, ignore_errors=True)
            raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def recover(folder: Path) -> None:
    """Bring to its end what a process that was killed had begun to move into ``folder``."""
    for stage in folder.glob(f"{WHOLE}*"):
        for _ in _move(stage, folder):
            pass


def _move(stage: Path, folder: Path) -> Iterator[Path]:
    """Move every file of ``stage`` to its place in ``folder``, one after the other."""
    for path in [path for path in stage.rglob("*") if path.is_file()]:
        target = folder / path.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process has moved it
            os.replace(path, target)
        yield target
    shutil.rmtree(stage, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path.parent) as stage:
        (stage / path.name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors."""
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `write_tensors` wrote."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(str(path))
    return tensors


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each tensor file in ``folder``."""
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def fingerprint(config: Mapping[str, Any]) -> str:
    """Digest of a network's configuration that does not depend on where or in which precision it was loaded."""
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    return sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
