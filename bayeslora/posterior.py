"""The contract of every posterior: draws, predictions, densities, a mean, and a place on disk.

A saved posterior is a folder: a PEFT adapter that holds the mean, of several fits the first one's
(``PeftModel.from_pretrained`` loads it as plain LoRA), ``posterior.safetensors`` with what is needed beyond it, and
``posterior.json``, which says what it all is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pyro import poutine
from torch import Tensor

from bayeslora import files, store
from bayeslora.errors import PosteriorError, unknown
from bayeslora.identity import describe
from bayeslora.passes import Rows, undisturbed
from bayeslora.predictors import Draws, Mean, Predictor
from bayeslora.program import Program, one_draw
from bayeslora.record import TENSORS, Record, write_record
from bayeslora.rng import seeded
from bayeslora.settings import Count, Seed, coerce

if TYPE_CHECKING:
    from datasets import Dataset

    from bayeslora.generation import Generation
    from bayeslora.generation.writing import Said
    from bayeslora.predict.prediction import Prediction
    from bayeslora.tasks import Split

__all__ = ["Posterior"]


class Posterior(ABC):
    """A distribution over the weights of a program, given data.

    One draw is one set of weights for a whole pass over the data: all examples and all tokens of that pass see the same
    weights, and a seed reproduces it.
    """

    #: What `inference.load` looks up to rebuild the posterior.
    kind: ClassVar[str]
    #: Whether draws differ; a point estimate needs one pass to predict.
    random: bool = True
    #: Whether draws follow one another as those of a Markov chain do.
    markov: bool = False
    #: Ways to predict by name, the default first.
    predictors: Mapping[str, Predictor] = MappingProxyType({"sample": Draws(), "mean": Mean()})

    def __init__(self, program: Program, record: Record) -> None:
        self.program = program
        self.record = record

    def __repr__(self) -> str:
        record, method = self.record, next(iter(self.predictors))
        shown = f"{record.backend}, {self.program.model.name}, {record.n_data:,} rows, predicts by '{method}'"
        return f"{type(self).__name__}({shown})"

    @abstractmethod
    def draw(self) -> dict[str, Tensor]:
        """One draw of every latent site, by the global generators of torch; hyper-sites come with the weights."""

    @abstractmethod
    def mean(self) -> dict[str, Tensor]:
        """Posterior mean of the weights, by site."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that `from_state` needs beyond the program."""

    @classmethod
    @abstractmethod
    def from_state(cls, program: Program, record: Record, state: Mapping[str, Tensor]) -> Posterior:
        """Rebuild a posterior from its saved state."""

    @abstractmethod
    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of one draw.

        With values U that are `auxiliary` it is log q(w, U) - log r(U | w), where r is a law of U given w: what stands
        for the density in importance weights.

        Raises:
            PosteriorError: the posterior has no density (a point estimate, for example).
        """

    @property
    def cost(self) -> dict[str, float]:
        """What the fit cost: seconds, bytes of peak memory, parameters."""
        return self.record.cost

    def draws(self, n: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yield ``n`` draws as `draw` makes them; of independent draws the first ones do not depend on n."""
        for _ in seeded(coerce(n, Count, "n"), seed, self.program.device):
            yield self.draw()

    def pairs(self, n: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yield ``n`` draws of the weights, every second one the mirror image of the one before.

        Raises:
            PosteriorError: it is not known to be symmetric.
        """
        raise PosteriorError(f"Draws in pairs are those of a symmetric guide, and this is a {type(self).__name__}.")

    def differing(self, draws: int) -> int:
        """How many of so many draws may differ: of point estimates one of each fit."""
        return draws if self.random else min(draws, len(self.chains))

    @property
    def chains(self) -> tuple[Posterior, ...]:
        """The independent fits of which this is the mixture: itself, if it is one."""
        return (self,)

    def means(self) -> list[dict[str, Tensor]]:
        """The posterior mean of each of `chains`: no one set of weights stands for several fits.

        A and B are known up to an invertible matrix between them, so that an average over fits is near none of them.
        """
        return [chain.mean() for chain in self.chains]

    @property
    def dense(self) -> bool:
        """Whether `log_prob` gives a density."""
        return self.random

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Names of values that draws have besides, where the density of the weights is known with those alone."""
        return ()

    @property
    def independent_layers(self) -> bool:
        """Whether the weights of one layer say nothing of another's."""
        return False

    @property
    def learned_means(self) -> tuple[str, ...]:
        """Random sites around a prior mean that was learned from all rows."""
        return ()

    def noise_scales(self) -> dict[str, Tensor]:
        """What a guide keeps of its noise, by name; nothing of other posteriors."""
        return {}

    def _prior(self) -> dict[str, Tensor]:
        """Pyro model of the weights alone, as `Program.prior`, around the means that a guide has learned, if any."""
        return self.program.prior()

    def prior_draw(self) -> dict[str, Tensor]:
        """One draw of every latent site, and the weights, from the prior."""
        with torch.no_grad():
            return one_draw(self._prior)

    def log_prior(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log density of the prior at a draw, by site, of the sites that are random; the model's factors with them."""
        if not self.random:
            return {}
        fixed = set(self.record.point_sites)
        with torch.no_grad():
            trace = poutine.trace(poutine.condition(self._prior, data=dict(values))).get_trace()
            return {
                name: node["fn"].log_prob(node["value"]).sum()
                for name, node in trace.nodes.items()
                if node["type"] == "sample" and not node["infer"].get("_deterministic") and name not in fixed
            }

    def sample(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """Draw ``n`` values of every latent site, each stacked as (n, ...).

        Raises:
            SettingError: n is no number from 1 on.
        """
        draws = list(self.draws(coerce(n, Count, "n"), seed))
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    @property
    def most_draws(self) -> int | None:
        """How many draws there are to be had; None where there is no end of them."""
        return None

    def check_weights(self) -> None:
        """Make sure that the network predicts by weights alone, as what writes text or asks for tokens takes it to.

        Raises:
            PosteriorError: it has passes of its own.
        """
        if not any(each.by_draws for each in self.predictors.values()):
            raise PosteriorError(
                f"The posterior of '{self.record.backend}' is not a distribution over weights: its passes "
                f"({', '.join(self.predictors)}) make predictions of rows, and nothing else."
            )

    def predictor(self, method: str | None = None) -> tuple[str, Predictor]:
        """Name and predictor, the first by default.

        Raises:
            PosteriorError: there is none of that name.
        """
        name = next(iter(self.predictors)) if method is None else method
        if name not in self.predictors:
            raise PosteriorError(unknown("method of prediction", name, self.predictors))
        return name, self.predictors[name]

    def predict(
        self,
        data: Any,
        draws: int = 10,
        method: str | None = None,
        seed: int = 0,
        batch_size: int = 64,
        progress: bool = True,
    ) -> Prediction:
        """Predict every row of ``data`` under draws of the weights, in the memory of one.

        Args:
            data: rows of a task; a tokenised data set; or new rows as they come, without labels: texts, pairs of
                texts, mappings from column to value, a DataFrame, a data set. Rows of another multiple-choice task may
                have another number of choices.
            draws: number of weight draws; a point estimate makes one pass in any case.
            method: name of one of `predictors`, by default the first. ``"sample"`` averages probabilities over draws,
                ``"pairs"`` over as many that lie two by two on opposite sides of the mean, which is more precise;
                ``"tempered"`` is the posterior's default under a temperature that the fit chose, if it did;
                ``"mean"`` is the one pass at the posterior mean, the plain-LoRA prediction; of several fits
                the average over those of each.
            seed: of the draws; the global generators are left as they were.
            batch_size: rows a pass; it does not change the result.
            progress: show a bar.

        Raises:
            PosteriorError: unknown method.
            SettingError: a number that is none, draws or a batch size below 1, or a seed that no generator takes.
            DataError: the rows cannot be read (the message says what was expected).
            TaskError: the rows are of a task with other classes.
        """
        name, predictor = self.predictor(method)
        seed, batch_size = coerce(seed, Seed, "seed"), coerce(batch_size, Count, "batch_size")
        draws = coerce(draws, Count, "draws")
        rows = Rows.of(self.program, data, batch_size, progress)
        with undisturbed(self.program), torch.no_grad():
            found = predictor(self, rows, draws, seed)
        return rows.predicted(*found, method=name)

    def generate(
        self,
        prompts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | Split,
        samples: int = 1,
        method: str = "draw",
        *,
        draws: int = 10,
        seed: int = 0,
        batch_size: int = 8,
        progress: bool = True,
        said: Said | None = None,
        first: int = 0,
        **decoding: Any,
    ) -> list[Generation]:
        """Let a causal language model go on after each prompt, and say how sure the posterior is of each text.

        Args:
            prompts: one or several; a text is read as it is, a row of the task as its template says.
            samples: number of texts after each.
            method: ``"draw"`` writes each text by one draw of the weights, taken by chance: an exact sample of the
                posterior predictive. ``"mixture"`` writes token by token by all draws, each weighed by the probability
                that it gave to what was said so far, which is exact, too. ``"mean"`` writes at the
                posterior mean; those of several fits write as a mixture.
            draws: number of weight draws that write, and under which each text is scored; no more than there are.
            seed: of the draws and of the tokens' choice; the global generators are left as they were.
            batch_size: texts written at once, each counted for every draw that reads it; it does not change the result.
            progress: show a bar.
            said: called with the number of a prompt, that of a sample, and its text so far, whenever that has one more
                token. What may still become a text of ``stop`` is not said yet.
            first: number of the first prompt, for prompts that come some at a time: chance depends on it.
            decoding: fields of `bayeslora.generation.Decoding`, such as ``max_new_tokens=64`` and ``temperature=0``.

        Raises:
            PosteriorError: the network cannot generate, the method is unknown, or the posterior is none over weights.
            SettingError: a setting is unknown or out of its bounds, or there are too few positions.
            DataError: a prompt is empty, or neither text nor row.
        """
        from bayeslora.generation import Decoding, generate

        self.check_weights()
        seed = coerce(seed, Seed, "seed")
        return generate(
            self,
            prompts,
            coerce(samples, Count, "samples"),
            method,
            Decoding(**decoding),
            draws=coerce(draws, Count, "draws"),
            seed=seed,
            batch_size=coerce(batch_size, Count, "batch_size"),
            progress=progress,
            said=said,
            first=first,
        )

    def to_inference_data(self, data: Split | Dataset, **settings: Any) -> Any:
        """The posterior as data of arviz: see `bayeslora.diagnostics.to_inference_data`."""
        from bayeslora.diagnostics.inference_data import to_inference_data

        return to_inference_data(self, data, **settings)

    def save(self, path: str | Path) -> None:
        """Write the posterior as the folder ``path``: whoever reads there finds the old one or the new one, whole.

        The folder is a PEFT adapter as well: the posterior mean, of several fits the first one's.
        Of several processes that a launcher started, the main one writes.

        Raises:
            PosteriorError: the folder holds something that no posterior's folder does.
            SettingError: another process is writing there.
        """
        if not store.is_main_process():
            return
        tensors = {f"state/{name}": value for name, value in self.state().items()}
        tensors |= {f"centre/{site.name}": site.initial for site in self.program.sites}
        tensors |= {f"drawn/{name}": value for name, value in self.program.drawn.items()}
        with store.written(Path(path)) as folder:
            self._save_adapter(folder)
            self.program.save_settings(folder)
            files.write_tensors(folder / TENSORS, tensors)
            versions = {name: version(name) for name in ("torch", "pyro-ppl", "transformers", "peft")}
            write_record(folder, kind=self.kind, record=self.record, program=describe(self.program), versions=versions)

    def _save_adapter(self, folder: Path) -> None:
        adapters = self.program.weights
        with adapters.holding(self.chains[0].mean()):
            # "auto" would ask the hub whether the vocabulary has grown.
            peft = {"save_embedding_layers": False, "selected_adapters": [adapters.name]}
            self.program.network.save_pretrained(folder, **({} if adapters.name is None else peft))
        (folder / "README.md").unlink(missing_ok=True)  # a form to fill in, and the folder may have one of its own
        if adapters.name not in (None, "default"):  # then PEFT makes a folder of that name
            for path in (folder / adapters.name).iterdir():
                path.rename(folder / path.name)
