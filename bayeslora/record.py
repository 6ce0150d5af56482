"""What a posterior's folder says of itself: how the posterior came about, its program, and its files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bayeslora import files
from bayeslora.errors import PosteriorError
from bayeslora.identity import Identity, adapter_settings, differences

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "RECORD",
    "TENSORS",
    "Description",
    "Record",
    "read_record",
    "refuse_links",
    "whole_record",
    "write_record",
]

RECORD, TENSORS = "posterior.json", "posterior.safetensors"
#: What every posterior's folder holds beside its record; without PEFT the last alone.
PARTS = ("adapter_config.json", "adapter_model.safetensors", TENSORS)


@dataclass(frozen=True)
class Record:
    """How a posterior came about, as plain data.

    Attributes:
        backend: name of the inference backend.
        settings: the backend's settings, by name.
        n_data: number of training examples N.
        heldout: numbers of the rows, of those that `fit` was given, that it set aside to choose something on; they are
            none of the training examples.
        data: digest of their token ids and labels.
        seed: seed of the fit.
        temperature: the posterior is p(labels | weights)^(1 / temperature) p(weights), normalised; 1 is Bayes' rule, 0
            maximum likelihood.
        cost: ``seconds``, ``peak_memory_bytes``, ``parameters`` (learned) and ``extra_parameters`` (over LoRA).
        history: what training logged, step by step.
        point_sites: latent sites that have the same value in every draw, as point estimates and fixed hyper-sites have.
        finished: false for a fit that was stopped on its way.
        task: arguments of `bayeslora.load_task` that give the task again, where they are known.
        tuned_on: digest of the rows that the fit could choose something on; empty if there were none.
        start: digest of the weights that the fit was to start from; empty for those of the program.
        chains: number of independent fits of which the posterior is the mixture.
        members: their records, as plain data; the costs of the whole are theirs together.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    backend: str
    settings: dict[str, Any]
    n_data: int
    data: str = ""
    seed: int = 0
    temperature: float = 1.0
    cost: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    point_sites: list[str] = field(default_factory=list)
    finished: bool = True
    task: dict[str, Any] | None = None
    start: str = ""
    chains: int = 1
    members: list[dict[str, Any]] = field(default_factory=list)
    heldout: list[int] = field(default_factory=list)
    tuned_on: str = ""

    def kept(self, rows: int) -> list[int]:
        """Numbers of the rows that were trained on, of so many that `fit` was given; of any other number, all."""
        aside = self.heldout if rows == self.n_data + len(self.heldout) else []
        return sorted(set(range(rows)).difference(aside))

    def trained(self, rows: Dataset) -> Dataset:
        """The rows that were trained on, of all that `fit` was given; other rows are left as they are."""
        numbers = self.kept(len(rows))
        return rows if len(numbers) == len(rows) else rows.select(numbers)


class Description(BaseModel):
    """What ``posterior.json`` says.

    Attributes:
        format: of the folder.
        kind: of the posterior.
        record: how it came about.
        program: of which program it is.
        versions: of the libraries that wrote it.
        files: SHA-256 of every other file of the folder, by name.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[2]
    kind: str
    record: Record
    program: Identity
    versions: dict[str, str]
    files: dict[str, str]


def write_record(folder: Path, **described: Any) -> None:
    """Say what the files of a folder are: to be written last."""
    found = Description(format=2, files=files.digests(folder), **described)
    (folder / RECORD).write_text(json.dumps(found.model_dump(), indent=2), encoding="utf-8")


def read_record(folder: Path) -> Description:
    """What is said of the posterior in a folder.

    Raises:
        PosteriorError: it is damaged, or of another format.
    """
    path = folder / RECORD
    refuse_links(folder, path)
    try:
        return Description.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first, *others = error.errors()
        if first["type"] == "literal_error":
            raise PosteriorError(
                f"'{folder}' has format {first['input']}; this version of bayeslora reads format "
                f"{first['ctx']['expected']}: fit again, or use the version that wrote it."
            ) from error
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in (first, *others[:2]))
        raise PosteriorError(f"'{path}' is damaged: {wrong.removeprefix(': ')}.") from error


def whole_record(folder: Path) -> Description:
    """What is said of the posterior in a folder, once its files are known to be those that were written.

    Raises:
        PosteriorError: they are not.
    """
    described = read_record(folder)
    refuse_links(*folder.iterdir())
    there, lora = files.digests(folder), described.program["lora"]
    for name in (*(PARTS[2:] if lora.get("method") == "full" else PARTS), *described.files):
        if name not in there:
            raise PosteriorError(f"'{folder}' is damaged: {name} is missing.")
        if there[name] != described.files.get(name):
            changed = _changed(folder / name, lora) if name == "adapter_config.json" else ""
            raise PosteriorError(f"'{folder}' is damaged: {name} is not what was written{changed}.")
    return described


def _changed(path: Path, then: dict[str, Any]) -> str:
    """What an adapter's configuration said when it was written, and what it says now."""
    try:
        now = adapter_settings(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError):  # no JSON object
        return ""
    found = differences(then, now, tuple(name for name in now if name in then))
    return f" (then and now): {'; '.join(found)}" if found else ""


def refuse_links(*paths: Path) -> None:
    """Make sure that nothing is read through a symbolic link, which may lead out of the folder.

    Raises:
        PosteriorError: a path is one.
    """
    for path in paths:
        if path.is_symlink():
            raise PosteriorError(f"'{path}' is a symbolic link, which is not followed: put the file itself there.")
