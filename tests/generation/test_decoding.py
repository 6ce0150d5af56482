"""Decoding by a mixture of draws against all texts that there are: five tokens, four at a time."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, Qwen2MoeConfig

from bayeslora import Program
from bayeslora.errors import PosteriorError, SettingError
from bayeslora.generation.decoding import Decoding, Reader, decode
from bayeslora.observations import Classes
from bayeslora.observations.decoder import hidden_states

VOCABULARY, LENGTH = 5, 4
ALL = torch.tensor(list(product(range(VOCABULARY), repeat=LENGTH)))
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.5}
LLAMA = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIGURATIONS = {
    "llama": LlamaConfig(**SIZES, **LLAMA, num_hidden_layers=2, max_position_embeddings=16),
    "gpt2": GPT2Config(**SIZES, n_embd=8, n_layer=2, n_head=2, n_positions=16),
    "moe": Qwen2MoeConfig(
        **SIZES,
        **LLAMA,
        num_hidden_layers=2,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    ),
}
PROMPTS = torch.tensor([[0, 0, 3], [4, 1, 2]])
MASK = torch.tensor([[0, 0, 1], [1, 1, 1]])


class Causal(Classes):
    causal: ClassVar[bool] = True


TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "head": ["q_proj", "lm_head"],
    "gpt2": ["c_attn"],
    "moe": ["q_proj", "shared_expert.up_proj"],
}


def program_of(name: str) -> Program:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(CONFIGURATIONS["llama" if name == "head" else name]).eval()
    targets = TARGETS[name]
    return Program(get_peft_model(network, LoraConfig(r=2, target_modules=targets)).eval(), Causal(2))


def draws_of(program: Program, count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {site.name: 0.7 * torch.randn(site.initial.shape, generator=generator) for site in program.sites}
        for _ in range(count)
    ]


def enumerated(program: Program, draws: list[dict[str, Tensor]], row: int) -> Tensor:
    """Log-probability of every text after a prompt under every draw (texts, draws), one text and no cache at a time."""
    prompt = PROMPTS[row, MASK[row].bool()]
    read = torch.cat([prompt.expand(len(ALL), -1), ALL], dim=1)
    mask = torch.ones_like(read)
    found = []
    for weights in draws:
        program.weights.install(weights)
        with torch.no_grad():
            logits = program.network(input_ids=read, attention_mask=mask).logits.double().log_softmax(-1)
        each = logits[:, len(prompt) - 1 : -1].gather(-1, ALL.unsqueeze(-1)).squeeze(-1)
        found.append(each.sum(-1))
    return torch.stack(found, dim=1)


def batch_of(times: int) -> dict[str, Tensor]:
    mask = MASK.repeat_interleave(times, 0)
    return {
        "input_ids": PROMPTS.repeat_interleave(times, 0),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


@pytest.mark.parametrize("name", ["llama", "head", "gpt2"])
def test_a_mixture_is_the_average_of_the_draws_texts(name: str) -> None:
    program, times = program_of(name), 3000
    draws = draws_of(program)
    decoding = Decoding(max_new_tokens=LENGTH)
    uniform = torch.rand(2 * times, LENGTH, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        texts, log_probs = decode(
            Reader(program, draws), len(draws), batch_of(times), decoding, uniform, lambda _: False
        )
    number = (torch.tensor(texts) * VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)
    for row in range(2):
        mine = slice(row * times, (row + 1) * times)
        exact = enumerated(program, draws, row)
        # Single precision in the network: 1e-7 of logits of tens, four times.
        torch.testing.assert_close(log_probs[mine], exact[number[mine]], atol=2e-4, rtol=0)
        average = exact.logsumexp(1).exp() / len(draws)
        assert float(average.sum()) == pytest.approx(1, abs=1e-6)
        counts = torch.bincount(number[mine], minlength=len(ALL)).double()
        # Texts that are hardly ever expected count as one, so that the statistic is chi-square's.
        often = average * times >= 5
        seen = torch.cat([counts[often], counts[~often].sum()[None]])
        expected = torch.cat([average[often], average[~often].sum()[None]]) * times
        assert stats.chisquare(seen.numpy(), (expected * times / expected.sum()).numpy()).pvalue > 1e-3
        assert len(expected) > 20


class Seen(Decoding):
    """Notes the distributions that tokens are chosen from."""

    seen: ClassVar[list[Tensor]] = []

    def choose(self, log_probs: Tensor, uniform: Tensor) -> Tensor:
        self.seen.append(log_probs)
        return super().choose(log_probs, uniform)


def test_every_conditional_is_the_mixtures_own() -> None:
    program = program_of("llama")
    draws, decoding = draws_of(program), Seen(max_new_tokens=LENGTH)
    decoding.seen.clear()
    uniform = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        texts, _ = decode(Reader(program, draws), len(draws), batch_of(1), decoding, uniform, lambda _: False)
    for row in range(2):
        average = enumerated(program, draws, row).logsumexp(1).exp().reshape((VOCABULARY,) * LENGTH)
        for step in range(LENGTH):
            rest = average[tuple(texts[row][:step])].reshape(VOCABULARY, -1).sum(1)
            torch.testing.assert_close(decoding.seen[step][row].exp(), rest / rest.sum(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "passes"), [("llama", [6]), ("head", [6]), ("moe", [6, 2, 2, 2])])
def test_draws_are_read_by_one_pass_where_layers_allow_it(
    name: str, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, made = program_of(name), []

    def counted(network: nn.Module, inputs: dict[str, Tensor], cache: Any = None) -> Tensor:
        made.append(len(inputs["input_ids"]))
        return hidden_states(network, inputs, cache)

    monkeypatch.setattr("bayeslora.generation.decoding.hidden_states", counted)
    with torch.no_grad():
        Reader(program, draws_of(program))(batch_of(1))
    assert made == passes  # three draws of two rows; of experts the first pass is in vain


def test_experts_that_are_given_tokens_read_one_draw_after_another() -> None:
    program = program_of("moe")
    draws, calls = draws_of(program), []
    program.network.register_forward_pre_hook(lambda _, given: calls.append(given))
    decoding, uniform = Decoding(max_new_tokens=LENGTH), torch.rand(2, LENGTH)
    with torch.no_grad():
        texts, log_probs = decode(Reader(program, draws), 3, batch_of(1), decoding, uniform, lambda _: False)
    assert len(calls) == 1 + 3 * LENGTH
    number = (torch.tensor(texts) * VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)
    exact = torch.stack([enumerated(program, draws, row)[number[row]] for row in range(2)])
    torch.testing.assert_close(log_probs, exact, atol=2e-4, rtol=0)


def test_a_network_without_keys_and_values_does_not_write() -> None:
    config = MambaConfig(**SIZES, hidden_size=8, num_hidden_layers=1)
    network = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, target_modules=["in_proj"]))
    program = Program(network, Causal(2))
    with pytest.raises(PosteriorError, match="A mamba network keeps no keys and values"):
        Reader(program, draws_of(program))(batch_of(1))


def test_a_text_ends_and_others_go_on() -> None:
    table = torch.full((3, 1, 4), -math.inf).double()
    table[..., 1:3] = -math.log(2)

    def reader(batch: dict[str, Tensor]) -> Tensor:
        return table

    heard: list[tuple[int, int]] = []
    prompts = {"input_ids": torch.zeros(3, 1, dtype=torch.long), "attention_mask": torch.ones(3, 1, dtype=torch.long)}
    lengths = iter([2, 1, 3])
    ends = {row: next(lengths) for row in range(3)}
    rows = iter([0, 1, 2, 0, 2, 2])
    texts, log_probs = decode(
        reader,
        1,
        prompts,
        Decoding(max_new_tokens=9),
        torch.zeros(3, 9),
        lambda text: len(text) == ends[next(rows)],
        lambda row, text: heard.append((row, len(text))),
    )
    assert [len(text) for text in texts] == [2, 1, 3]
    # Two tokens are as probable; a uniform number of zero takes the first of those that are possible.
    assert {token for text in texts for token in text} == {1}
    assert log_probs.squeeze(1).tolist() == pytest.approx([-2 * math.log(2), -math.log(2), -3 * math.log(2)])
    assert heard == [(0, 1), (1, 1), (2, 1), (0, 2), (2, 2), (2, 3)]


class TestChoice:
    LOGS: ClassVar[Tensor] = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def shares(self, decoding: Decoding) -> Tensor:
        places = (torch.arange(1000) + 0.5) / 1000
        chosen = decoding.choose(self.LOGS.expand(1000, -1), places)
        return torch.bincount(chosen, minlength=4) / 1000

    def test_by_probability(self) -> None:
        torch.testing.assert_close(self.shares(Decoding()), self.LOGS[0].exp(), atol=0.001, rtol=0)

    def test_by_temperature(self) -> None:
        powered = self.LOGS[0].exp() ** 2
        torch.testing.assert_close(self.shares(Decoding(temperature=0.5)), powered / powered.sum(), atol=0.001, rtol=0)

    def test_of_the_most_probable(self) -> None:
        shares = self.shares(Decoding(top_p=0.7))
        torch.testing.assert_close(shares, torch.tensor([0.625, 0.375, 0, 0]), atol=0.001, rtol=0)

    def test_greedy(self) -> None:
        assert self.shares(Decoding(temperature=0)).tolist() == [1, 0, 0, 0]

    @pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"top_k": 3}])
    def test_bounds(self, wrong: dict[str, float]) -> None:
        with pytest.raises(SettingError, match=next(iter(wrong))):
            Decoding(**wrong)
