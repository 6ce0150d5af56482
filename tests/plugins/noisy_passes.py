"""Plain LoRA in a network whose own dropout stays on: its predictions are passes, not draws of a law over weights."""

from dataclasses import dataclass, replace

import torch

import bayeslora as bl
from bayeslora.rng import seeded


class Passes:
    by_draws = False

    def __call__(self, posterior, rows, draws, seed):
        program, seeds = posterior.program, seeded(draws, seed, posterior.program.device)
        for module in program.network.modules():
            module.train(isinstance(module, torch.nn.Dropout))
        return bl.predictors.Outputs(torch.stack([rows.outputs(program, posterior.mean()) for _ in seeds]))


@bl.register
class PassesPosterior(bl.Posterior):
    kind, dense, predictors = "noisy-passes", False, {"passes": Passes()}

    def __init__(self, program, record, weights):
        super().__init__(program, record)
        self.draw = self.mean = self.state = lambda: dict(weights)

    draw = mean = state = log_prob = None
    from_state = classmethod(lambda cls, program, record, state: cls(program, record, state))


@bl.register
@dataclass(frozen=True)
class NoisyPasses(bl.inference.MLE):
    name, paper = "noisy-passes", "Gal and Ghahramani, ICML 2016"

    def fit(self, program, data, run):
        plain = super().fit(program, data, run)
        return PassesPosterior(program, replace(plain.record, backend=self.name), plain.mean())
