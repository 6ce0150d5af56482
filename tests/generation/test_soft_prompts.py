"""Learned prompts of causal language models: what is written and scored behind one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from causal_scenarios import POSITIONS
from peft import PrefixTuningConfig, PromptTuningConfig
from soft_prompt_scenarios import COUNT, METHODS, NETWORKS, after, likelihood, own, own_program, program, read, same

from bayeslora.errors import SettingError
from bayeslora.harness.scoring import scored
from bayeslora.inference.mcmc.posterior import EmpiricalPosterior
from bayeslora.program import Program
from bayeslora.record import Record

ASKED = ["Question: is this good?", "Answer", "What is the moon made of, and is it not a stone?"]


def chain(found: Program) -> EmpiricalPosterior:
    """Of two draws."""
    draws = {site.name: torch.stack([site.initial, -site.initial]) for site in found.sites}
    return EmpiricalPosterior(found, Record("sgld", {}, n_data=4), draws)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_texts_are_written_behind_the_prompt(method: str, network: str) -> None:
    posterior = chain(program(method, network=network))
    settings: dict[str, Any] = {"draws": 2, "max_new_tokens": 5, "seed": 1, "temperature": 0, "progress": False}
    for way in ("mixture", "draw"):
        made = posterior.generate(ASKED, 2, way, **settings)
        for each in made:
            asked = read(posterior.program, each.prompt)
            for text, scores in zip(each.tokens, each.log_probs, strict=True):
                whole = [*asked, *text]
                exact = [likelihood(posterior.program, whole, len(text), draw) for draw in posterior.draws(2)]
                same(scores, torch.stack(exact))
        alone = [posterior.generate(ASKED, 2, way, batch_size=1, **settings)]
        assert [each.tokens for each in alone[0]] == [each.tokens for each in made]
    for each in made:  # a draw a text
        greedy = set()
        for draw in posterior.draws(2):
            said = read(posterior.program, each.prompt)
            for _ in range(5):
                said = [*said, int(after(posterior.program, said, draw)[-1].argmax())]
            greedy.add(tuple(said[-5:]))
        assert set(each.tokens) == greedy


@pytest.mark.parametrize("kind", ["window", "window in some layers", "alibi", "positions from the mask"])
@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_padding_parts_no_text_that_is_written_from_the_prompt(config: Any, kind: str) -> None:
    posterior = chain(own_program(kind, config(num_virtual_tokens=COUNT)))
    for each in posterior.generate(ASKED, 1, "mixture", draws=2, max_new_tokens=3, progress=False):
        (text,), whole = each.tokens, [*read(posterior.program, each.prompt), *each.tokens[0]]
        exact = [likelihood(posterior.program, whole, len(text), draw) for draw in posterior.draws(2)]
        same(each.log_probs[0], torch.stack(exact))


@pytest.mark.parametrize("method", METHODS)
def test_the_harness_scores_behind_the_prompt(method: str) -> None:
    found = program(method)
    pairs = [([5, 9, 30], [40, 41, 42]), ([7], [8]), ([3, 4, 5, 6, 7, 8, 9], [10, 11])]
    log_probs, _ = scored(found.eval(), [own(found)], pairs, 3)
    same(log_probs[:, 0], torch.stack([likelihood(found, before + more, len(more)) for before, more in pairs]))


def test_texts_have_the_room_that_the_prompt_leaves() -> None:
    posterior = chain(program("prefix-tuning", network="gpt2"))
    left = POSITIONS - COUNT - len(read(posterior.program, "Answer"))
    (text,) = posterior.generate("Answer", 1, "draw", draws=1, max_new_tokens=left, progress=False)
    assert len(text.tokens) == 1
    with pytest.raises(SettingError, match=f"has positions for {POSITIONS - COUNT}"):
        posterior.generate("Answer", 1, max_new_tokens=left + 1, progress=False)
