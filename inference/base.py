"""What every backend shares: the protocol, and the circumstances of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from bayeslora.errors import AdapterError, DataError, PosteriorError, SettingError
from bayeslora.inference import POSTERIORS
from bayeslora.observations import digest
from bayeslora.passes import Rows
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.record import Record
from bayeslora.registry import FROM_PLUGIN
from bayeslora.store import CHAIN, holds_fit
from bayeslora.tasks import Split

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from bayeslora.sites import Site

__all__ = [
    "Backend",
    "Run",
    "check_random",
    "default_model_of",
    "fits_of",
    "labelled",
    "posterior_class",
    "rows_wanted",
]


@dataclass(frozen=True)
class Run:
    """The circumstances of one fit, as against the settings of its algorithm.

    Attributes:
        seed: of everything random.
        output_dir: where checkpoints and the posterior go; None writes nothing.
        resume: go on from the last checkpoint in ``output_dir``.
        progress: show a bar.
        task: arguments that load the task again, kept with the posterior.
        data: digest of the training rows, kept with the posterior.
        heldout: tokenised rows that nothing is trained on, for what is chosen on such rows.
        aside: their numbers, where `fit` set them aside of the rows that it was given.
        start: weights by site that learning starts from; the program's initial ones, if left out.
    """

    seed: int = 0
    output_dir: Path | None = None
    resume: bool = False
    progress: bool = True
    task: dict[str, Any] | None = None
    data: str = ""
    heldout: Dataset | None = None
    aside: tuple[int, ...] = ()
    start: Mapping[str, Tensor] | None = None

    def sites(self, program: Program) -> Sequence[Site]:
        """The program's weights, with those to start from, where the program is now."""
        if self.start is None:
            return program.sites
        return [replace(site, given=self.start[site.name].to(site.initial)) for site in program.sites]

    @property
    def started(self) -> str:
        """Digest of the weights to start from."""
        values = (value.detach().float().cpu().numpy().tobytes() for value in (self.start or {}).values())
        return sha256(b"".join(values)).hexdigest()[:16] if self.start else ""

    @property
    def tuned_on(self) -> str:
        """Digest of the rows that the weights are not trained on."""
        return "" if self.heldout is None else digest(self.heldout)

    def chain(self, number: int) -> Run:
        """One of several fits with seeds of their own, each in a folder of its own, in which it may have begun."""
        folder = None if self.output_dir is None else self.output_dir / f"{CHAIN}{number}"
        begun = folder is not None and holds_fit(folder)
        return replace(self, seed=self.seed + number, output_dir=folder, resume=self.resume and begun)

    def record(
        self, backend: str, settings: dict[str, Any], n_data: int, temperature: float, point_sites: Iterable[str]
    ) -> Record:
        """What is known of a posterior before it is fitted: all but what the fit costs and logs."""
        return Record(
            backend=backend,
            settings=settings,
            n_data=n_data,
            data=self.data,
            seed=self.seed,
            temperature=temperature,
            point_sites=sorted(point_sites),
            task=self.task,
            start=self.started,
            finished=False,
            heldout=list(self.aside),
            tuned_on=self.tuned_on,
        )


class Backend(Protocol):
    """An inference algorithm: a frozen dataclass whose fields are its settings.

    Attributes:
        name: of the backend.
        paper: source of the algorithm.

    A class variable ``default_model`` may name the Pyro model, and its settings, that a run has by default in place of
    "monteclora". A method ``sets_aside(program, rows, run)`` may say how many of so many training rows are to be set
    aside as those of `Run.heldout`. A property ``fits`` may say that it makes several independent ones.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def fit(self, program: Program, data: Dataset, run: Run) -> Posterior:
        """Infer the posterior of the program's weights given tokenised rows."""


def default_model_of(algorithm: Backend) -> tuple[str, dict[str, Any]]:
    """Name and settings of the Pyro model that a run of a backend has by default."""
    found: tuple[str, dict[str, Any]] = getattr(algorithm, "default_model", ("monteclora", {}))
    return found


def fits_of(algorithm: Backend) -> int:
    """How many independent fits a backend makes."""
    found: int = getattr(algorithm, "fits", 1)
    return found


def rows_wanted(algorithm: Backend, program: Program, rows: int, run: Run) -> int:
    """How many of so many training rows a backend wants to have set aside."""
    wanted = getattr(algorithm, "sets_aside", None)
    return wanted(program, rows, run) if wanted else 0


def posterior_class(kind: str) -> type[Posterior]:
    """The class of a kind of posterior.

    Raises:
        PosteriorError: there is no such kind.
    """
    try:
        return POSTERIORS[kind]
    except SettingError as error:
        raise PosteriorError(f"{error} {FROM_PLUGIN}") from error


def check_random(program: Program) -> None:
    """Make sure that the program has weights that are random, which a posterior beyond a point could be of.

    Raises:
        AdapterError: it has none.
    """
    if not program.model.stochastic(program.sites):
        raise AdapterError(
            f"Nothing is random in this program: the model '{program.model.name}' is of LoRA matrices, and the network "
            "has none of its sites. Choose 'map' or 'mle' (chains=5 for an ensemble), or add LoRA layers."
        )


def labelled(program: Program, data: Split | Dataset, purpose: str = "train on") -> Dataset:
    """Tokenised rows, each with a label that can be observed.

    Args:
        program: whose network reads them.
        data: rows of a task, or a tokenised data set.
        purpose: what they are there to do, for messages.

    Raises:
        DataError: no rows, no labels, or a label that cannot be (the message names the row).
    """
    if isinstance(data, Split) and not len(data):
        raise DataError(f"There is nothing to {purpose}: split '{data.name}' of task '{data.spec.name}' has no rows.")
    rows = Rows.of(program, data).dataset
    if "labels" not in rows.column_names:
        raise DataError(
            f"The rows to {purpose} have no column 'labels': give a split of a task, such as task.train, or a "
            "tokenised data set with labels."
        )
    program.observation.check(rows["labels"][:])
    return rows
