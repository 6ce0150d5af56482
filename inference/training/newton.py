"""An optimiser that is variational inference: that of IVON, for a normal posterior with a deviation for each weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, overload

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from bayeslora.rng import derived_short_seed

__all__ = ["OnlineNewton"]


class OnlineNewton(AdamW):
    r"""Improved variational online Newton over N(m, s^2), s^-2 = ess (h + d), against the prior N(m0, (ess d)^-1).

    The gradient g of the loss per example is taken at m + e, with e drawn once a step. With weights that decay as b_1
    and b_2, and both sides of the division by entry,

        g' <- b_1 g' + (1 - b_1) g,    h^ = ess (h + d) e g,
        h  <- b_2 h + (1 - b_2) h^ + (1 - b_2)^2 (h - h^)^2 / (2 (h + d)),
        m  <- m - lr clip((g' / (1 - b_1^t) + d (m - m0)) / (h + d), -radius, radius).

    The last term of h keeps s real. Parameters of groups without a ``precision`` are points: AdamW moves them.

    The ``ivon-opt`` package has the same update, and tests compare the two. It is not used since its prior is around
    zero and of one width, several batches of a step count twice there, a resumed run begins its count of steps anew,
    and its licence is another one. Here the noise of a step is drawn by the seed and the step's number: batches of one
    step share it as one batch would, processes of a launcher do as well, and nothing else is random.

    Args:
        groups: of parameters. One of random weights has ``precision``, the prior's, and ``centre``, its mean m0, each
            broadcastable to the parameter, of which it has one.
        lr: of groups that do not say.
        ess: number of examples that the loss counts for, N / temperature.
        hessian: h at the start.
        betas: b_1 and b_2.
        radius: longest step of an entry, before it is multiplied by lr.
        seed: of the noise.

    References:
        Shen et al., *Variational learning is effective for large deep networks*, ICML 2024, algorithm 1; Lin, Schmidt
        and Khan, *Handling the positive-definite constraint in the Bayesian learning rule*, ICML 2020 (the term).
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        *,
        ess: float,
        hessian: float,
        betas: tuple[float, float],
        radius: float,
        seed: int,
    ) -> None:
        super().__init__(groups, lr=lr, weight_decay=0.0)
        self._ess, self._hessian, self._newton, self._radius, self._seed = ess, hessian, betas, radius, seed
        self._noise: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def context(self) -> Iterator[None]:
        """Forward and backward within are at a draw of the weights, the same one until the next step."""
        self._noise = self._drawn()
        means = {parameter: parameter.data for parameter in self._noise}
        for parameter, noise in self._noise.items():
            parameter.data = means[parameter] + noise
        try:
            yield
        finally:
            for parameter, mean in means.items():
                parameter.data = mean

    # A closure evaluates the loss again, and the draw that it would be of is gone when the means move.
    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> NoReturn: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Move the means, their curvatures, and the points, by the gradients that were taken within `context`.

        Raises:
            TypeError: there is a closure.
        """
        if closure is not None:
            raise TypeError(f"{type(self).__name__}.step takes no closure: gradients are those taken within context().")
        gradients = {parameter: parameter.grad for parameter in self._noise}
        for parameter in gradients:
            parameter.grad = None  # AdamW passes over it
        super().step()
        for group in self._random():
            (parameter,) = group["params"]
            if (gradient := gradients[parameter]) is not None:
                self._move(parameter, gradient, group)
            parameter.grad = gradient
        self._noise = {}

    def deviation(self, parameter: nn.Parameter) -> Tensor:
        """Standard deviation of each entry of a random parameter."""
        (group,) = (group for group in self._random() if group["params"][0] is parameter)
        return (self._ess * (self._state_of(parameter)["hessian"] + self._decay(group, parameter))).rsqrt()

    def _random(self) -> Iterator[dict[str, Any]]:
        return (group for group in self.param_groups if "precision" in group)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(parameter.data)}
            state["hessian"] = torch.full_like(parameter.data, self._hessian)
        return state

    def _decay(self, group: dict[str, Any], parameter: nn.Parameter) -> Tensor:
        """d, by entry or broadcastable to it."""
        group["precision"] = group["precision"].to(parameter.device)
        return group["precision"] / self._ess

    def _drawn(self) -> dict[nn.Parameter, Tensor]:
        parameters = [group["params"][0] for group in self._random()]
        number = int(self._state_of(parameters[0])["step"])
        generator = torch.Generator(parameters[0].device)
        generator.manual_seed(derived_short_seed(self._seed, number))
        return {
            parameter: self.deviation(parameter)
            * torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
            for parameter in parameters
        }

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state, decay = self._state_of(parameter), self._decay(group, parameter)
        beta1, beta2 = self._newton
        hessian, momentum = state["hessian"], state["momentum"]
        state["step"] += 1
        momentum.lerp_(gradient, 1 - beta1)
        curvature = hessian + decay
        gain = self._ess * curvature * self._noise[parameter] * gradient - hessian  # h^ - h
        hessian.add_((1 - beta2) * gain + (1 - beta2) ** 2 * gain.square() / (2 * curvature))
        group["centre"] = group["centre"].to(parameter.device)
        slope = momentum / (1 - beta1 ** int(state["step"])) + decay * (parameter - group["centre"])
        parameter.sub_(group["lr"] * (slope / (hessian + decay)).clamp_(-self._radius, self._radius))
