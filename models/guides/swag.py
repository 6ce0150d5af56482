"""SWAG's guide: a normal law with the moments of the places that training went through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayeslora.errors import PosteriorError
from bayeslora.models.guides.base import Combine, Guide, PointGuide

__all__ = ["Swag", "Trajectory"]

#: Variance of a weight that never moved, as published: less than single precision tells of it.
FLOOR = 1e-30


class Trajectory(Guide):
    """A point that is trained, and what is kept of where it was.

    Mean and squared deviations are brought up to date by Welford's formulas. The published difference of mean square
    and squared mean loses all digits in single precision where weights move by less than a thousandth of their size.

    Args:
        point: of every latent site; sites that it does not train stay where they are.
        kept: number of snapshots, the last ones, that are kept whole.
    """

    random = dense = False

    count: Tensor
    average: Tensor
    squares: Tensor
    snapshots: Tensor

    def __init__(self, point: PointGuide, kept: int) -> None:
        super().__init__(point.latents)
        self.point = point
        here = self.here()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros_like(here))
        self.register_buffer("squares", torch.zeros_like(here))
        self.register_buffer("snapshots", here.new_zeros(kept, len(here)))

    @classmethod
    def of(cls, guide: nn.Module, kept: int) -> Trajectory:
        """The trajectory of the point that a guide is, or has among its parts."""
        return cls(next(part for part in guide.modules() if isinstance(part, PointGuide)), kept)

    @property
    def moving(self) -> tuple[str, ...]:
        """Names of the sites that are trained."""
        return tuple(name for name, value in self.point.values().items() if value.requires_grad)

    def here(self) -> Tensor:
        """All weights that are trained, as they are now, in one vector."""
        values = self.point.values()
        return torch.cat([values[name].detach().flatten() for name in self.moving])

    def collect(self) -> None:
        """Count where the point is now among the places that it went through."""
        here = self.here()
        self.count += 1
        shift = here - self.average
        self.average += shift / self.count
        self.squares += shift * (here - self.average)
        self.snapshots.copy_(torch.cat([self.snapshots[1:], here.unsqueeze(0)]))

    def sites(self, flat: Tensor) -> dict[str, Tensor]:
        """The value of every latent site, where those that are trained are given in one vector."""
        values, moving = self.point.values(), self.moving
        parts = flat.split([values[name].numel() for name in moving])
        return values | {name: part.view_as(values[name]) for name, part in zip(moving, parts, strict=True)}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Declare where the point is as Delta sites."""
        return self.point(*args, **kwargs)

    def mean(self) -> dict[str, Tensor]:
        """The weights where the point is."""
        return self.point.mean()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The point's."""
        return self.point.parameter_groups()


class Swag(Guide):
    r"""N(mean, scale (V + D D^T / (k - 1))) over all weights that are trained, those of all layers in one law.

    With T snapshots: their mean; V = diag(sum_t (w_t - mean)^2) / (T - 1); and in the columns of D the deviations of
    the last k from the mean. With scale = 1/2 and k = T, each weight has the variance that it had along the trajectory,
    and half of its covariances. A weight that never moved is as good as a point.

    Published deviations are from the mean up to then, of which the first is zero; here they are from the mean at the
    end. The published V is divided by T, a fifth less at T = 5; here both parts estimate one covariance.

    Args:
        trajectory: of the point.
        scale: of the covariance.
        combine: map from the values of the sites to the weights they determine.

    References:
        Maddox, Garipov, Izmailov, Vetrov and Wilson, *A simple baseline for Bayesian uncertainty in deep learning*,
        NeurIPS 2019, equation 1.
    """

    independent_layers = False

    def __init__(self, trajectory: Trajectory, scale: float, combine: Combine = dict) -> None:
        super().__init__(trajectory.latents)
        self.trajectory = trajectory
        self.scale = scale
        self._combine = combine

    @property
    def point_sites(self) -> tuple[str, ...]:
        """Sites that are not trained."""
        return tuple(name for name in self.latents if name not in set(self.trajectory.moving))

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (weights,), factor (k, weights) of the low-rank part, and variances (weights,) of the diagonal one.

        Raises:
            PosteriorError: there are fewer than two snapshots, as while a fit is under way.
        """
        found = self.trajectory
        count, kept = int(found.count), len(found.snapshots)
        if count < 2:
            raise PosteriorError(
                f"A spread takes two snapshots of the trajectory, and this fit has come to {count}: go on with it "
                "(resume). method='mean' predicts by where it is."
            )
        last = found.snapshots[kept - min(count, kept) :]
        factor = (last - found.average) * (self.scale / (len(last) - 1)) ** 0.5
        return found.average, factor, (self.scale / (count - 1) * found.squares).clamp_min(FLOOR)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all sites by one vector of standard normal noise."""
        mean, factor, variances = self.moments()
        size = len(mean) + len(factor)
        noise = pyro.sample("_noise", dist.Normal(mean.new_zeros(size), 1.0).to_event(1), infer={"is_auxiliary": True})
        flat = mean + variances.sqrt() * noise[: len(mean)] + noise[len(mean) :] @ factor
        return {
            name: pyro.sample(name, dist.Delta(value, event_dim=value.dim(), validate_args=False))
            for name, value in self.trajectory.sites(flat).items()
        }

    def mean(self) -> dict[str, Tensor]:
        """The weights at the mean of the trajectory; before its first snapshot, where it is."""
        found = self.trajectory
        values = found.sites(found.average if found.count else found.here())
        return self._combine({name: value.detach().clone() for name, value in values.items()})

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Density of the weights that are trained, in double precision: it is a sum over all of them.

        Raises:
            PosteriorError: the value of a site is missing, or there are fewer than two snapshots.
        """
        self._require(values)
        flat = torch.cat([values[name].flatten() for name in self.trajectory.moving])
        mean, factor, variances = (each.double() for each in self.moments())
        # Its capacitance matrix of k x k (Woodbury) has eigenvalues from one to as many as there are weights.
        law = dist.LowRankMultivariateNormal(mean, factor.mT, variances, validate_args=False)
        found: Tensor = law.log_prob(flat.double())
        return found

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Those of the trajectory's point."""
        return self.trajectory.parameter_groups()
