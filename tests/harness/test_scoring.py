"""Log-likelihoods of continuations under draws, against one pass for each text alone."""

from __future__ import annotations

import pytest
import torch
from harness_scenarios import posterior_of
from torch import Tensor

from bayeslora.harness import scoring
from bayeslora.harness.scoring import Pair, scored
from bayeslora.observations import completions
from bayeslora.posterior import Posterior

PAIRS: list[Pair] = [([5, 9, 30], [40, 41, 42]), ([7], [8]), ([7], [11]), ([3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13])]


@pytest.fixture(scope="module", params=[("llama",), ("gpt2",), ("llama", "lm_head")], ids="-".join)
def posterior(request: pytest.FixtureRequest) -> Posterior:
    network, *also = request.param
    return posterior_of(network, "bytes", *also)


def logits(posterior: Posterior, weights: dict[str, Tensor], read: list[int]) -> Tensor:
    posterior.program.weights.install(weights)
    with torch.no_grad():
        found: Tensor = posterior.program.network(input_ids=torch.tensor([read])).logits[0].double().log_softmax(-1)
    posterior.program.weights.restore()
    return found


def exact(posterior: Posterior, weights: dict[str, Tensor], pair: Pair) -> float:
    before, after = pair
    found = logits(posterior, weights, before + after)[len(before) - 1 : -1]
    return float(found.gather(-1, torch.tensor(after).unsqueeze(-1)).sum())


@pytest.mark.parametrize(("batch_size", "held"), [(8, 2**24), (1, 2**24), (3, 2000)])
def test_every_draw_scores_every_continuation(
    posterior: Posterior, batch_size: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "LOGITS", held)
    posterior.program.eval()
    draws = list(posterior.draws(3))
    log_probs, greedy = scored(posterior.program, draws, PAIRS, batch_size)
    expected = torch.tensor([[exact(posterior, weights, pair) for weights in draws] for pair in PAIRS])
    # Sums over tokens in single precision, whose errors are parts of 1e-7 of logits that are larger than the sum.
    torch.testing.assert_close(log_probs, expected.double(), atol=1e-5, rtol=5e-6)
    assert greedy.tolist() == [False] * len(PAIRS)
    assert log_probs.std(1).min() > 0.01


@pytest.mark.parametrize("held", [2**24, 2000])
def test_greedy_is_the_mixtures(posterior: Posterior, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "LOGITS", held)
    prompts = ["Question: is this good?", "Answer", "What is the moon made of?"]
    settings = {"max_new_tokens": 6, "temperature": 0, "progress": False}
    mixture = posterior.generate(prompts, 1, "mixture", draws=4, **settings)
    mean = posterior.generate(prompts, 1, "mean", draws=4, **settings)
    read = [posterior.program.encoder.tokenizer(prompt)["input_ids"] for prompt in prompts]
    posterior.program.eval()
    draws, alone = list(posterior.draws(4)), [posterior.mean()]
    said = [(before, list(each.tokens[0])) for before, each in zip(read, mixture, strict=True)]
    by_mean = [(before, list(each.tokens[0])) for before, each in zip(read, mean, strict=True)]
    others = [(before, [*after[:-1], (after[-1] + 1) % 300]) for before, after in said]
    assert all(scored(posterior.program, draws, said).greedy)
    assert all(scored(posterior.program, alone, by_mean).greedy)
    assert not any(scored(posterior.program, draws, others).greedy)
    # What one of them says greedily is not what the other does.
    assert [each.tokens for each in mixture] != [each.tokens for each in mean]
    assert not all(scored(posterior.program, draws, by_mean).greedy)


def test_what_is_read_alike_is_read_once(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, ...]] = []
    original = scoring.hidden_states

    def counted(network: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        read.append(tuple(batch["input_ids"].shape))
        return original(network, batch)

    monkeypatch.setattr(scoring, "hidden_states", counted)
    scored(posterior.program, [posterior.mean()], [([5, 6], [token]) for token in range(10, 20)])
    assert read == [(1, 2)]
