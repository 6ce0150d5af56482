"""Files that are never half written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["digests", "fingerprint", "read_tensors", "staged", "write_json", "write_tensors"]

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

    Each file replaces its namesake in one step, and the files' own order is kept with JSON last, so that what a killed
    run leaves is recognised by its digests.
    """
    stage = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield stage
        written = [path for path in stage.rglob("*") if path.is_file()]
        for path in sorted(written, key=lambda path: (path.suffix == ".json", path.name)):
            target = folder / path.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
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
