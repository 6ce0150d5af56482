"""Independent fits of one program to the same data: as many chains, and as a posterior their mixture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import ClassVar

import torch
from torch import Tensor

from bayeslora.errors import PosteriorError
from bayeslora.inference.base import posterior_class
from bayeslora.inference.softening import Softened, without
from bayeslora.passes import Rows
from bayeslora.posterior import Posterior
from bayeslora.predictors import Outputs
from bayeslora.program import Program
from bayeslora.record import Record

__all__ = ["MixturePosterior", "mixture_of"]


class MixturePosterior(Softened):
    """The mixture of independent fits, each as likely as any other.

    Predictions average the members' probabilities; members of `svi` or `laplace` that chose a temperature each are
    averaged without, and have one together. The mean averages their weights, which no member may be near: A and B are
    known up to a rotation of the rank; a saved adapter is the first member's. Each member has its own initial weights,
    and so a prior of its own.

    Args:
        members: posteriors of one program, by the same backend and settings, with seeds of their own.
        record: of the whole.
    """

    kind: ClassVar[str] = "mixture"

    def __init__(self, members: Sequence[Posterior], record: Record) -> None:
        super().__init__(members[0].program, record)
        self.members = tuple(members)
        self.random = members[0].random
        first, ways = members[0], members[0].predictors
        if isinstance(first, Softened):
            ways, self.coldest = first.untempered, first.coldest
        self.predictors = {name: _OfEach(self.members, name, each.by_draws) for name, each in ways.items()}

    @property
    def chains(self) -> tuple[Posterior, ...]:
        """The members; of those that are mixtures, theirs."""
        return tuple(chain for member in self.members for chain in member.chains)

    @property
    def dense(self) -> bool:
        """Whether the members have a density, of the weights alone."""
        return self.members[0].dense and not self.auxiliary

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """The members'."""
        return self.members[0].auxiliary

    @property
    def learned_means(self) -> tuple[str, ...]:
        """The members'."""
        return self.members[0].learned_means

    @property
    def most_draws(self) -> int | None:
        """As many of each member as the one with the fewest has."""
        known = [member.most_draws for member in self.members if member.most_draws is not None]
        return len(self.members) * min(known) if known else None

    def differing(self, draws: int) -> int:
        """As many as the members have together, each an equal part."""
        each = -(-draws // len(self.members))
        return min(draws, sum(member.differing(each) for member in self.members))

    def draw(self) -> dict[str, Tensor]:
        """A draw of one of the members."""
        return self.members[int(torch.randint(len(self.members), ()))].draw()

    def draws(self, n: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """Draws of the members in turn, as many of each, up to one."""
        count = len(self.members)
        own = [
            member.draws(-(-(n - place) // count), seed + place)
            for place, member in enumerate(self.members)
            if place < n
        ]
        for number in range(n):
            yield next(own[number % count])

    def mean(self) -> dict[str, Tensor]:
        """The average of the members' means."""
        means = [member.mean() for member in self.members]
        return {name: torch.stack([mean[name] for mean in means]).mean(0) for name in means[0]}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of the mixture.

        Raises:
            PosteriorError: the members have no density, or one with auxiliary values of their own.
        """
        if self.auxiliary:
            raise PosteriorError(
                f"The density of each fit is known with values of its own alone ({self.auxiliary[0]}), and that of "
                "their mixture is not: ask one of its chains."
            )
        densities = torch.stack([member.log_prob(values) for member in self.members])
        return densities.logsumexp(0) - math.log(len(densities))

    def log_prior(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """None: members may have tuned or learned priors of their own.

        Raises:
            PosteriorError: always; each of `chains` has one.
        """
        raise PosteriorError("A mixture of fits has no prior in common: ask one of its chains.")

    def prior_draw(self) -> dict[str, Tensor]:
        """A draw of the prior of one of the members."""
        return self.members[int(torch.randint(len(self.members), ()))].prior_draw()

    def state(self) -> dict[str, Tensor]:
        """What the members need, with their place and kind before each name, their initial weights, a temperature."""
        return super().state() | {
            f"{place}.{member.kind}/{part}/{name}": value
            for place, member in enumerate(self.members)
            for part, values in (("state", member.state()), ("centre", self._centre(member)))
            for name, value in values.items()
        }

    def _centre(self, member: Posterior) -> dict[str, Tensor]:
        """The initial weights of a member, where they are not those of the whole."""
        pairs = zip(member.program.sites, self.program.sites, strict=True)
        return {site.name: site.initial for site, ours in pairs if not torch.equal(site.initial, ours.initial)}

    @classmethod
    def from_state(cls, program: Program, record: Record, state: Mapping[str, Tensor]) -> MixturePosterior:
        """Rebuild the members."""
        parts: dict[tuple[int, str], dict[str, dict[str, Tensor]]] = {}
        for key, value in without(state).items():
            member, part, name = key.split("/", 2)
            place, _, kind = member.partition(".")
            parts.setdefault((int(place), kind), {"state": {}, "centre": {}})[part][name] = value
        whole = {site.name: site.initial for site in program.sites}
        members = [
            posterior_class(kind).from_state(
                program.around(whole | part["centre"]), Record(**record.members[place]), part["state"]
            )
            for (place, kind), part in sorted(parts.items(), key=lambda item: item[0])
        ]
        mixture = cls(members, record)
        mixture.soften_as(state)
        return mixture


class _OfEach:
    """One of the members' ways to predict, by as many draws of each, so that all weigh the same."""

    def __init__(self, members: Sequence[Posterior], method: str, by_draws: bool) -> None:
        self.members, self.method = members, method
        self.by_draws = by_draws

    def __call__(self, posterior: Posterior, rows: Rows, draws: int, seed: int) -> Outputs:
        """The outputs of all members."""
        each = -(-draws // len(self.members))
        found = [
            member.predictors[self.method](member, rows, each, seed + place)
            for place, member in enumerate(self.members)
        ]
        known = [each.aleatoric for each in found if each.aleatoric is not None]
        aleatoric = torch.stack(known).mean(0) if known else None
        outputs = [each.outputs for each in found]
        # Those that are by draws have the order of `MixturePosterior.draws`: the members in turn.
        whole = torch.stack(outputs, 1).flatten(0, 1) if self.by_draws else torch.cat(outputs)
        return Outputs(whole, aleatoric, found[0].averaged)


def mixture_of(fits: Iterable[Posterior]) -> MixturePosterior:
    """The mixture of fits, and their costs together."""
    members = list(fits)
    records = [member.record for member in members]
    cost = {
        name: (max if name == "peak_memory_bytes" else sum)(record.cost[name] for record in records)
        for name in records[0].cost
    }
    members_of = [asdict(record) for record in records]
    return MixturePosterior(
        members, replace(records[0], cost=cost, history=[], chains=len(members), members=members_of)
    )
