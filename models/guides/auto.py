"""Guides by name: Pyro's automatic ones as ours, and what is made of "structured", "delta" and the other names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to, constraints, register_kl

from bayeslora.errors import PosteriorError, SettingError, unknown
from bayeslora.models.guides.base import Guide, GuideList, PointGuide, decoded, encoded
from bayeslora.registry import Registry
from bayeslora.rng import isolated
from bayeslora.settings import Settings, build

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bayeslora.models.base import WeightModel
    from bayeslora.sites import Site

__all__ = ["ALIASES", "GUIDES", "NAMED", "AutoGuide", "guide_settings", "make_guide", "settings_class"]

#: Guides beside the model's own and Pyro's, each made of a model, the sites that are random, and its settings.
GUIDES: Registry[Callable[..., Guide]] = Registry("guide", {
    "entry": "bayeslora.models.gaussian:entry_guide",
    "inducing": "bayeslora.models.guides.inducing:Inducing",
}, lambda name: _stands(name))  # fmt: skip

#: Short names of guides, beside "structured" and "delta" and the names of Pyro's classes.
ALIASES = {
    "mean-field": "AutoNormal",
    "low-rank": "AutoLowRankMultivariateNormal",
    "full": "AutoMultivariateNormal",
}

#: What the guides are that have a name and no class of their own here.
NAMED = {
    "structured": "The model's own, with its hyper-sites: the default.",
    "mean-field": "Independent normals, one for each entry of each random site (Pyro's AutoNormal).",
    "low-rank": "One normal over all random sites, of low rank beside a diagonal (AutoLowRankMultivariateNormal).",
    "full": "One normal over all random sites with full covariance, for small adapters (AutoMultivariateNormal).",
    "delta": "Points: no distribution.",
}

#: Classes that are no guide by themselves or need more than a name, or whose density nobody knows where the model has
#: sites without a distribution; AutoDelta would follow hyper-sites to where the density has no bound.
UNSUITABLE = frozenset(
    {"AutoGaussian", "AutoGuide", "AutoGuideList", "AutoCallable", "AutoContinuous", "AutoDelta",
     "AutoDiscreteParallel", "AutoHierarchicalNormalMessenger", "AutoLaplaceApproximation", "AutoMessenger",
     "AutoNormalMessenger", "AutoNormalizingFlow", "AutoRegressiveMessenger", "AutoStructured"}
)  # fmt: skip
#: All others.
SUITABLE = tuple(name for name in autoguide.__all__ if name.startswith("Auto") and name not in UNSUITABLE)
#: What does the same as some of the unsuitable ones.
INSTEAD = {
    "AutoDelta": " For point estimates there is guide='delta'.",
    "AutoGaussian": " For one normal over all random sites there is guide='full'.",
    "AutoLaplaceApproximation": " For Laplace's approximation there is backend='laplace'.",
}

#: Classes whose density is known in closed form.
DENSE = (
    autoguide.AutoNormal,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
)

#: Draws whose average stands for the mean of a guide that has no median.
MEAN_DRAWS = 100


class ChangeOfVariables(dist.Delta):
    """A value together with the Jacobian of the map from the unconstrained space in which it was drawn.

    Pyro's divergence of a Delta leaves its ``log_density`` out, which biases the mean-field bound for every site with
    a constrained support. Ours adds it.
    """


@register_kl(ChangeOfVariables, dist.Distribution)
def _kl_change_of_variables(q: ChangeOfVariables, p: dist.Distribution) -> Tensor:
    return q.log_density - p.log_prob(q.v)


class _Rename(Messenger):
    """Translate the names of sample sites between the model's and those that can be attributes of a module."""

    def __init__(self, translate: Any) -> None:
        super().__init__()
        self._translate = translate

    def _pyro_sample(self, msg: Any) -> None:
        msg["name"] = self._translate(msg["name"])
        if type(msg["fn"]) is dist.Delta:
            fn = msg["fn"]
            msg["fn"] = ChangeOfVariables(fn.v, fn.log_density, fn.event_dim, validate_args=False)


class AutoGuide(Guide):
    """One of Pyro's automatic guides over the stochastic sites of a model.

    Args:
        kind: class of `pyro.infer.autoguide`.
        model: model of the weights.
        sites: the weights.
        init_scale: standard deviation at the start, in unconstrained space, where the class has one.

    Raises:
        SettingError: the class cannot guide this model.
    """

    def __init__(
        self, kind: type[autoguide.AutoGuide], model: WeightModel, sites: Sequence[Site], init_scale: float
    ) -> None:
        latents = model.stochastic(sites)
        initial = {name: value for name, value in model.initial(sites).items() if name in latents}
        super().__init__(initial)
        self.dense = issubclass(kind, DENSE)
        self.independent_layers = issubclass(kind, autoguide.AutoNormal | autoguide.AutoDiagonalNormal)
        # "." separates modules in Pyro's attributes: "g.A" and "g.A.scale_tril" could not both exist.
        target = _Rename(encoded)(poutine.block(partial(model.sample, sites), expose=list(latents)))
        # Copies: a parameter that shared the memory of its start would move the prior's centre in training.
        start = autoguide.init_to_value(values={encoded(name): value.clone() for name, value in initial.items()})
        accepted = inspect.signature(kind.__init__).parameters
        options = {"init_loc_fn": start, "init_scale": float(init_scale)}
        try:
            with pyro.settings.context(module_local_params=True), torch.random.fork_rng():
                self.auto = kind(target, **{name: value for name, value in options.items() if name in accepted})
                # The first call makes the parameters, and must not shift the user's random numbers.
                self.auto()
        except RuntimeError as error:  # no memory for its covariance, or a support that has no bijection
            raise SettingError(f"{kind.__name__} cannot guide this model: {error}") from error

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every stochastic site."""
        with pyro.settings.context(module_local_params=True), _Rename(decoded):
            return {decoded(name): value for name, value in self.auto().items()}

    def mean(self) -> dict[str, Tensor]:
        """The latent sites at the median, for a normal guide the mean; mixture weights at the image of their median."""
        if isinstance(self.auto, autoguide.AutoNormalizingFlow):  # no median in closed form: draws have a mean
            return self._average()
        with pyro.settings.context(module_local_params=True):
            return {decoded(name): value.detach() for name, value in self.auto.median().items()}

    def _average(self) -> dict[str, Tensor]:
        """The mean of some draws, for a guide without a median."""
        with torch.no_grad(), isolated(0, next(self.parameters()).device):
            draws = [self() for _ in range(MEAN_DRAWS)]
        return {name: torch.stack([draw[name] for draw in draws]).mean(0) for name in draws[0]}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Density of the constrained values: that of the unconstrained ones over the Jacobian of the map."""
        self._require(values)
        nodes = dict(self.auto.prototype_trace.iter_stochastic_nodes())
        unconstrained, jacobian = {}, []
        for name, node in nodes.items():
            value, transform = values[decoded(name)], biject_to(node["fn"].support)
            unconstrained[name] = transform.inv(value)
            jacobian.append(transform.log_abs_det_jacobian(unconstrained[name], value).sum())
        return self._unconstrained_log_prob(unconstrained) - torch.stack(jacobian).sum()

    def _unconstrained_log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        with pyro.settings.context(module_local_params=True):
            if isinstance(self.auto, autoguide.AutoNormal):
                laws = ((dist.Normal(*self.auto._get_loc_and_scale(name)), value) for name, value in values.items())
                return torch.stack([law.log_prob(value).sum() for law, value in laws]).sum()
            if self.dense:
                flat = torch.cat([value.reshape(-1) for value in values.values()])
                return self.auto.get_posterior().log_prob(flat)
        raise PosteriorError(
            f"The density of {type(self.auto).__name__} is not available. Choose a guide that has it, such as "
            "structured, mean-field, low-rank or full."
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Locations of the real sites (of all sites, where a class keeps them in one vector), and the rest."""
        nodes = self.auto.prototype_trace.iter_stochastic_nodes()
        hyper = {f"locs.{name}_unconstrained" for name, node in nodes if not _is_real(node["fn"].support)}
        groups: dict[str, list[nn.Parameter]] = {"location": [], "scale": []}
        for name, value in self.auto.named_parameters():
            is_location = name.startswith("loc") and name not in hyper
            groups["location" if is_location else "scale"].append(value)
        return groups


def make_guide(
    kind: str,
    model: WeightModel,
    sites: Sequence[Site],
    init_scale: float = 0.1,
    settings: Mapping[str, Any] | None = None,
) -> Guide:
    """Make a guide of a model over all its latent sites.

    Args:
        kind: "structured" (the model's own), "mean-field", "low-rank", "full", "delta" (point estimates), one of
            `GUIDES`, or the name of a class of `pyro.infer.autoguide`. With "delta" hyper-sites keep their starting
            values: the joint mode is degenerate, since the density of many columns under a covariance that shrinks to
            zero around them is unbounded.
        model: model of the weights.
        sites: the weights.
        init_scale: standard deviation of an automatic guide at the start, in unconstrained space.
        settings: of a guide of `GUIDES`, by name.

    Raises:
        SettingError: nothing is called ``kind``, the class cannot guide this model, it has other sites than the model,
            or a setting is wrong.
    """
    own = _own_settings(kind, settings or {})
    if kind == "structured":
        return model.guide(sites)
    initial = model.initial(sites)
    if kind == "delta":
        columns = {name for site in model.split(sites)[0] if site.role == "A" for name in model.latents(site)}
        return GuideList([PointGuide(initial, _constrained(model, sites), columns, model.weights)])
    stochastic = model.stochastic(sites)
    points = PointGuide({name: value for name, value in initial.items() if name not in stochastic})
    if kind in GUIDES:
        guide = GUIDES[kind](model, model.split(sites)[0], *own)
        _check_latents(kind, guide, model, stochastic)
        return GuideList([guide, points])
    return GuideList([AutoGuide(_autoguide(kind), model, sites, init_scale), points], model.weights)


def _check_latents(kind: str, guide: Guide, model: WeightModel, latents: set[str]) -> None:
    """Make sure that a guide has the latent sites of the model that are random, and no others.

    Raises:
        SettingError: it has not.
    """
    for name in sorted(latents.symmetric_difference(guide.latents)):
        found = "has no such site" if name in guide.latents else "samples it"
        raise SettingError(
            f"guide='{kind}' and model '{model.name}' do not belong together: '{name}' is a site of one alone (the "
            f"model {found}). A guide samples the random matrices and their hyper-sites (its latents); the model "
            "'gaussian' has no hyper-sites."
        )


def guide_settings(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a guide, in their types.

    Args:
        kind: as in `make_guide`.
        values: those that are not to be as by default, by name.

    Raises:
        SettingError: nothing is called ``kind``, or a setting is wrong.
    """
    if kind not in ("structured", "delta") and kind not in GUIDES:
        _autoguide(kind)
    return {name: value for own in _own_settings(kind, values) for name, value in vars(own).items()}


def _own_settings(kind: str, values: Mapping[str, Any]) -> tuple[Settings, ...]:
    """The settings that a guide is made of: one dataclass, or nothing."""
    cls = settings_class(kind)
    if cls is not None:
        return (build(cls, values),)
    if values:
        known = ", ".join(name for name in GUIDES if settings_class(name) is not None) or "none"
        raise SettingError(f"guide='{kind}' has no settings, found {', '.join(values)}. Guides with settings: {known}.")
    return ()


def settings_class(kind: str) -> type[Settings] | None:
    """The dataclass of a guide's settings, if it has any."""
    return getattr(GUIDES[kind], "settings", None) if kind in GUIDES else None


def _stands(name: str) -> bool:
    """Whether a name is that of the model's own guide, of points, or of one of Pyro's."""
    return name in NAMED or hasattr(autoguide, name)


def _autoguide(kind: str) -> type[autoguide.AutoGuide]:
    name = ALIASES.get(kind, kind)
    found = getattr(autoguide, name, None)
    if name in UNSUITABLE:
        raise SettingError(f"{name} cannot guide this model.{INSTEAD.get(name, '')}")
    if not (isinstance(found, type) and issubclass(found, autoguide.AutoGuide)):
        raise SettingError(unknown("guide", kind, [*NAMED, *GUIDES, *SUITABLE]))
    return found


def _constrained(model: WeightModel, sites: Sequence[Site]) -> set[str]:
    """Latent sites whose support is not the real line, by one draw of the prior: the hyper-sites."""
    return {name for name, law in model.prior_laws(sites).items() if not _is_real(law.support)}


def _is_real(support: constraints.Constraint) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real
