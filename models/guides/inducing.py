"""Sparse Gaussian-process posteriors of LoRA matrices: a few inducing values a matrix carry what is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pyro
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Normal

from bayeslora.errors import SettingError
from bayeslora.models.distributions import ColumnNormal, base_of
from bayeslora.models.guides.base import Guide, GuideList
from bayeslora.models.guides.inducing_flow import Flow
from bayeslora.models.guides.inducing_laws import AugmentedNormal, DrawnNormal, Frames, InducedNormal
from bayeslora.rng import isolated
from bayeslora.settings import Count, Positive, Settings

if TYPE_CHECKING:
    from bayeslora.models.base import WeightModel
    from bayeslora.sites import Site

__all__ = ["FlowGuide", "Inducing", "InducingGuide", "InducingSettings"]

#: Draws of a flow whose average stands for its mean, which is not known in closed form.
MEAN_DRAWS = 256


@dataclass(frozen=True, kw_only=True)
class InducingSettings(Settings):
    """Settings of the guide "inducing".

    Attributes:
        m: inducing values of either side of a matrix, as many as the side has entries at most.
        sd: standard deviation of the inducing values at the start, as a multiple of the prior's.
        lam: standard deviation of a matrix given its inducing values at the start, as a multiple of the prior's.
        explained: part of a direction's variance that inducing values explain at the start, on either side.
        bound: divergence in the bound of ``elbo="mean-field"`` where there is no flow: "marginal", that of the matrix,
            or "augmented", which is larger: that of matrix and inducing values jointly, as published.
        flow: hidden units of a masked autoregressive flow of the inducing values; none by default. The divergence is
            then the augmented one, estimated, and k-hat and leave-one-out are by the densities of both jointly.
    """

    name: ClassVar[str] = "inducing"

    m: Count = 9
    sd: Positive = 1.0
    lam: Positive = 1.0
    explained: Annotated[float, Field(gt=0, lt=1)] = 0.9
    bound: Literal["marginal", "augmented"] = "marginal"
    flow: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flow is not None and self.flow < self.m:
            raise SettingError(f"flow needs at least as many hidden units as there are values, m={self.m}.")


class Inducing(GuideList):
    """Inducing matrices for LoRA matrices whose entries are normal and independent under the prior.

    Under the prior inducing values are auxiliary (`bayeslora.models.guides.inducing_laws`), so this is a family of
    posteriors for the model that the other guides are for. Without a flow it is a normal law with independent noise in
    m x m rotated directions of a layer's matrix, and with noise of one size, ``lam``, in all others. Towards ``sd`` and
    ``lam`` zero it is LoRA.

    Otherwise than published: frames and spectra are parameters in place of inducing inputs; inducing values are
    independent in the frames; the mean has an offset, which starts at LoRA's own start and learns as LoRA does; ``lam``
    and the spread of inducing values have no upper limit. A flow is evaluated without dropout.

    Args:
        model: of the weights.
        sites: that are random.
        settings: of the guide.

    Raises:
        SettingError: the prior of a matrix is another one.

    References:
        Lin et al., *Bayesian-LoRA*, arXiv 2601.21003, ICML 2026; Ritter, Kukla, Zhang and Li, *Sparse uncertainty
        representation in deep learning with inducing weights*, NeurIPS 2021.
    """

    name: ClassVar[str] = "inducing"
    settings = InducingSettings

    def __init__(self, model: WeightModel, sites: Sequence[Site], settings: InducingSettings) -> None:
        scales = _prior_scales(model, sites)
        with torch.random.fork_rng(devices=[]):
            kind = InducingGuide if settings.flow is None else FlowGuide
            super().__init__([kind(site, scales[site.name], settings) for site in sites])


class InducingGuide(Guide):
    """Posterior family of one site, with normal inducing values.

    Args:
        site: of the matrix.
        scale: prior standard deviation of an entry, (layers, 1, 1).
        settings: of the guide.
    """

    scale: Tensor

    def __init__(self, site: Site, scale: Tensor, settings: InducingSettings) -> None:
        super().__init__([site.name])
        self.name = site.name
        self.law = AugmentedNormal if settings.bound == "augmented" else InducedNormal
        layers, *sides = site.initial.shape
        columns, rank = (min(settings.m, side) for side in sides)
        logit = math.log(settings.explained / (1 - settings.explained))
        self.register_buffer("scale", scale.detach().clone())
        self.mu = nn.Parameter(site.start.clone())
        self.inducing_mean = nn.Parameter(site.initial.new_zeros(layers, columns, rank))
        self.log_sd = nn.Parameter(torch.full_like(self.inducing_mean, math.log(settings.sd)))
        self.log_lam = nn.Parameter(torch.full_like(scale, math.log(settings.lam)))
        self.columns = nn.Parameter(_directions(site.initial, sides[0], columns))
        self.rank = nn.Parameter(_directions(site.initial, sides[1], rank))
        self.column_logits = nn.Parameter(site.initial.new_full((layers, columns, 1), logit))
        self.rank_logits = nn.Parameter(site.initial.new_full((layers, 1, rank), logit))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the matrix."""
        return {self.name: pyro.sample(self.name, self.marginal().to_event(1))}

    def marginal(self) -> InducedNormal:
        """The law of the matrix where there is no flow, (layers,) of events (columns, rank)."""
        frames, sd, lam = self.frames(), self.log_sd.exp(), self.log_lam.exp()
        return self.law(self.mu, self.scale, frames, self.inducing_mean, sd, lam, validate_args=False)

    def frames(self) -> Frames:
        """Directions of both sides, and the parts of their variance that inducing values explain."""
        explained = self.column_logits.sigmoid() * self.rank_logits.sigmoid()
        return Frames(_orthonormal(self.columns), _orthonormal(self.rank), explained)

    def mean(self) -> dict[str, Tensor]:
        """The posterior means (layers, columns, rank)."""
        with torch.no_grad():
            return {self.name: self.marginal().mean}

    def noise_scales(self) -> dict[str, Tensor]:
        """Lam (layers, 1, 1), and the standard deviation of the inducing values (layers, k_c, k_r), before a flow."""
        return {f"{self.name}.lam": self.log_lam.detach().exp(), f"{self.name}.sd": self.log_sd.detach().exp()}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What the mean is made of under "location", all else under "scale"."""
        location = {"mu", "inducing_mean"}
        named = list(self.named_parameters())
        return {
            "location": [value for name, value in named if name in location],
            "scale": [value for name, value in named if name not in location],
        }


class FlowGuide(InducingGuide):
    """The same with a flow of the inducing values.

    The density of the matrix is not known, but jointly with the values U0 that the flow makes inducing values of, which
    are auxiliary: they have the name of the site and ``.base``.
    """

    def __init__(self, site: Site, scale: Tensor, settings: InducingSettings) -> None:
        super().__init__(site, scale, settings)
        assert settings.flow is not None
        self.auxiliary = (f"{site.name}.base",)
        self.flow = Flow(self.inducing_mean.detach(), settings.flow)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the matrix."""
        return {self.name: pyro.sample(self.name, self.given(self.base().rsample()).to_event(1))}

    def base(self) -> Normal:
        """The law of U0, by entry (layers, k_c, k_r)."""
        return Normal(self.inducing_mean, self.log_sd.exp(), validate_args=False)

    def given(self, base: Tensor) -> DrawnNormal:
        """The law of the matrix given U0, (layers,) of events (columns, rank)."""
        drawn, log_det = self.flow(base)
        density = self.base().log_prob(base).sum((-2, -1)) - log_det
        return DrawnNormal(self.mu, self.scale, self.frames(), drawn, density, self.log_lam.exp(), validate_args=False)

    def draw(self) -> dict[str, Tensor]:
        """The matrix, and the U0 that it was drawn with."""
        with torch.no_grad():
            base = self.base().rsample()
            return {self.name: self.given(base).rsample(), self.auxiliary[0]: base}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """What stands for the density in a ratio, log q(W, U) - log p(U | W), a scalar, at a matrix and its U0.

        Given W the mean of p(W) p(U | W) / q(W, U) is p(W) / q(W), which varies less (Rao and Blackwell).

        Raises:
            PosteriorError: a value is missing.
        """
        self._require(values)
        return self.given(values[self.auxiliary[0]]).log_prob(values[self.name]).sum()

    def mean(self) -> dict[str, Tensor]:
        """The posterior means (layers, columns, rank), by the average of some draws of the inducing values."""
        with torch.no_grad():
            frames = self.frames()
            with isolated(0, self.mu.device):
                values, _ = self.flow(self.base().rsample(torch.Size([MEAN_DRAWS])))
            return {self.name: self.mu + self.scale * frames.matrix(frames.explained.sqrt() * values.mean(0))}


def _prior_scales(model: WeightModel, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Prior standard deviation of an entry, (layers, 1, 1), by site."""
    laws = {name: base_of(law) for name, law in model.prior_laws(sites).items()}
    scales = {
        name: law.scale for name, law in laws.items() if isinstance(law, ColumnNormal) and law.independent_entries
    }
    if scales.keys() != laws.keys() or scales.keys() != {site.name for site in sites}:
        raise SettingError(
            "guide='inducing' is for LoRA matrices whose entries are normal and independent given nothing else, as "
            f"under the model 'gaussian'; those of '{model.name}' are not. Choose that model, or guide='structured'."
        )
    return scales


def _directions(like: Tensor, side: int, number: int) -> Tensor:
    """Random orthogonal directions (layers, side, number), of entries with root mean square one."""
    # Drawn where every device draws the same.
    drawn = torch.randn(len(like), side, number, dtype=torch.float64)
    return (torch.linalg.qr(drawn).Q * math.sqrt(side)).to(like).contiguous()


def _orthonormal(directions: Tensor) -> Tensor:
    """Orthonormal frames (..., side, number) of the same spaces: by Gram's matrix, without waiting for the device."""
    for _ in range(2):  # the second time takes away what rounding has left, however skew the directions were
        factor = torch.linalg.cholesky_ex(directions.mT @ directions).L
        directions = torch.linalg.solve_triangular(factor.mT, directions, upper=True, left=False)
    return directions
