"""Texts of a posterior: by whom they are written, how they end, and what is said of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from causal_scenarios import POSITIONS, causal_base
from peft import LoraConfig, get_peft_model
from scenarios import tiny_program
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bayeslora.app.generations import summary
from bayeslora.errors import DataError, PosteriorError, SettingError
from bayeslora.generation import writing
from bayeslora.generation.decoding import Decoding
from bayeslora.inference.mcmc.posterior import EmpiricalPosterior
from bayeslora.inference.mixture import MixturePosterior
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.models import Gaussian
from bayeslora.models.guides.auto import make_guide
from bayeslora.observations import Classes, Completions, Encoder, completions
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.record import Record
from bayeslora.tasks import TaskSpec

PROMPTS = ["Question: is this good?", "Answer", "What is the moon made of, and is it not a stone?"]


class Causal(Classes):
    causal: ClassVar[bool] = True


def posterior_of(name: str = "llama", kind: str = "structured", tokenizer: str = "bytes") -> VariationalPosterior:
    torch.manual_seed(0)
    folder = causal_base(name, tokenizer)
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "bart": ["q_proj", "fc1"]}[name]
    config = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "gpt2")
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    spec = TaskSpec("review", labels=("no", "yes"))
    encoder = Encoder(AutoTokenizer.from_pretrained(folder), spec, 64)
    program = Program(network, Causal(2), Gaussian(), encoder=encoder)
    guide = make_guide(kind, program.model, program.sites, 0.1)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return VariationalPosterior(program, Record("svi", {"guide": kind}, n_data=24), guide)


@pytest.fixture(scope="module", params=["llama", "gpt2", "bart"])
def posterior(request: pytest.FixtureRequest) -> Posterior:
    return posterior_of(request.param)


def log_prob(posterior: Posterior, weights: dict[str, Tensor], prompt: str, text: tuple[int, ...]) -> float:
    """Of a text after a prompt, by one pass over it alone."""
    tokenizer = posterior.program.encoder.tokenizer
    start = tokenizer(prompt)["input_ids"]
    read = torch.tensor([[*start, *text]])
    posterior.program.weights.install(weights)
    with torch.no_grad():
        logits = posterior.program.network(input_ids=read, attention_mask=torch.ones_like(read)).logits[0]
    posterior.program.weights.restore()
    return float(
        sum(logits[len(start) + place - 1].double().log_softmax(-1)[token] for place, token in enumerate(text))
    )


@pytest.mark.parametrize("method", ["draw", "mixture", "mean"])
def test_texts_are_scored_by_every_draw(posterior: Posterior, method: str) -> None:
    found = posterior.generate(PROMPTS, 3, method, draws=2, max_new_tokens=5, seed=1, progress=False)
    assert [each.prompt for each in found] == PROMPTS
    for each in found:
        assert each.log_probs.shape == (3, 2) and len(each) == 3 and each.method == method
        for text, scores in zip(each.tokens, each.log_probs, strict=True):
            exact = [log_prob(posterior, weights, each.prompt, text) for weights in posterior.draws(2, 1)]
            torch.testing.assert_close(scores, torch.tensor(exact).double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["draw", "mixture", "mean"])
def test_neither_batches_nor_other_prompts_matter(posterior: Posterior, method: str) -> None:
    settings: dict[str, Any] = {"draws": 2, "max_new_tokens": 6, "seed": 3, "progress": False}
    before = torch.get_rng_state()
    one = posterior.generate(PROMPTS, 2, method, batch_size=1, **settings)
    many = posterior.generate(PROMPTS, 2, method, batch_size=5, **settings)
    assert torch.equal(before, torch.get_rng_state())
    assert [each.tokens for each in one] == [each.tokens for each in many]
    (alone,) = posterior.generate(PROMPTS[0], 2, method, **settings)
    assert alone.tokens == one[0].tokens
    torch.testing.assert_close(alone.log_probs, one[0].log_probs, atol=1e-4, rtol=1e-4)
    other = posterior.generate(PROMPTS, 2, method, **settings | {"seed": 4})
    assert [each.tokens for each in other] != [each.tokens for each in one]


def greedy(posterior: Posterior, weights: dict[str, Tensor], prompt: str, count: int) -> tuple[int, ...]:
    """What transformers makes of it."""
    read = posterior.program.encoder.tokenizer(prompt, return_tensors="pt")
    network = posterior.program.network
    posterior.program.weights.install(weights)
    found = network.generate(**read, max_new_tokens=count, do_sample=False, pad_token_id=0)
    posterior.program.weights.restore()
    return tuple(found[0, read["input_ids"].shape[1] :].tolist())


def test_greedy_texts_are_those_of_transformers(posterior: Posterior) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "progress": False, "seed": 5}
    mean = posterior.generate(PROMPTS, 1, "mean", **settings)
    assert [each.tokens[0] for each in mean] == [greedy(posterior, posterior.mean(), each, 8) for each in PROMPTS]
    drawn = posterior.generate(PROMPTS, 3, "draw", draws=2, **settings)
    draws = list(posterior.draws(2, 5))
    for each in drawn:
        assert {*each.tokens[:2]} == {greedy(posterior, weights, each.prompt, 8) for weights in draws}
        assert each.tokens[2] == each.tokens[0]


def test_the_means_of_several_fits_write_as_their_mixture() -> None:
    fits = [posterior_of(), posterior_of(kind="mean-field")]
    both = MixturePosterior(fits, fits[0].record)
    means = [each.mean() for each in fits]
    for found in both.generate(PROMPTS, 1, "mean", max_new_tokens=6, temperature=0, progress=False):
        (text,) = found.tokens
        written: tuple[int, ...] = ()
        for _ in text:  # p(next | written) is the mixture's, so that its best token has the largest p(written, next)
            count = len(both.program.encoder.tokenizer)
            scores = torch.tensor(
                [[log_prob(both, mean, found.prompt, [*written, token]) for token in range(count)] for mean in means]
            )
            written += (int(scores.logsumexp(0).argmax()),)
        assert text == written


def test_which_draw_writes_first_is_left_to_chance() -> None:
    posterior = posterior_of()
    settings: dict[str, Any] = {"draws": 2, "max_new_tokens": 8, "temperature": 0, "progress": False}
    firsts = set()
    for seed in range(8):
        (found,) = posterior.generate(PROMPTS[2], 1, "draw", seed=seed, **settings)
        by = [greedy(posterior, weights, found.prompt, 8) for weights in posterior.draws(2, seed)]
        firsts.add(by.index(found.tokens[0]))
    assert firsts == {0, 1}  # all eight the same: 1 in 128


def test_prompts_may_come_some_at_a_time() -> None:
    posterior = posterior_of()
    settings: dict[str, Any] = {"draws": 2, "max_new_tokens": 6, "seed": 3, "progress": False}
    whole = posterior.generate([PROMPTS[0]] * 3, 2, **settings)
    assert len({each.tokens for each in whole}) > 1  # the same prompt, and other chance
    (last,) = posterior.generate(PROMPTS[0], 2, first=2, **settings)
    assert last.tokens == whole[2].tokens


def test_a_chain_writes_by_the_draws_that_it_has() -> None:
    posterior = posterior_of()
    chain = {name: torch.stack([draw[name] for draw in posterior.draws(3)]) for name in posterior.draw()}
    kept = EmpiricalPosterior(posterior.program, Record("sgld", {}, n_data=24), chain)
    (found,) = kept.generate(PROMPTS[0], 2, max_new_tokens=3, progress=False)
    assert found.draws == 3


def test_a_network_that_gives_no_numbers_is_named() -> None:
    posterior = posterior_of()
    posterior.program.weights.base.lm_head.weight.data[0] = torch.nan
    with pytest.raises(PosteriorError, match="logits are NaN"):
        posterior.generate(PROMPTS[0], max_new_tokens=3, progress=False)


def test_a_text_ends_at_the_end_and_at_a_stop(posterior: Posterior) -> None:
    (free,) = posterior.generate(PROMPTS[2], 1, "mean", max_new_tokens=12, temperature=0, progress=False)
    whole = posterior.program.encoder.tokenizer.decode(free.tokens[0])
    stop = whole[3:5]
    (cut,) = posterior.generate(PROMPTS[2], 1, "mean", max_new_tokens=12, temperature=0, stop=(stop,), progress=False)
    assert cut.texts[0] == whole[: whole.index(stop)] and free.tokens[0][: len(cut.tokens[0])] == cut.tokens[0]
    assert len(cut.tokens[0]) < 12
    config = posterior.program.weights.base.generation_config
    before, config.eos_token_id = config.eos_token_id, [free.tokens[0][3]]
    try:
        (ended,) = posterior.generate(PROMPTS[2], 1, "mean", max_new_tokens=12, temperature=0, progress=False)
    finally:
        config.eos_token_id = before
    assert ended.tokens[0] == free.tokens[0][: free.tokens[0].index(free.tokens[0][3]) + 1]


def test_of_several_stops_that_come_with_one_token_the_first_ends_a_text() -> None:
    program = posterior_of().program
    assert program.encoder is not None
    prompts, said = writing.read(program, PROMPTS[1]), program.encoder.tokenizer(PROMPTS[2])["input_ids"]
    whole = writing.Writer(program, prompts, Decoding()).text(0, said)
    stops = (whole[6:], whole[2:5], whole[4:])
    assert [whole.find(stop) for stop in stops] == [6, 2, 4]
    assert writing.Writer(program, prompts, Decoding(stop=stops)).text(0, said) == whole[:2]


def test_a_text_is_heard_as_it_grows() -> None:
    heard: list[tuple[int, int, str]] = []
    (found,) = posterior_of().generate(
        PROMPTS[0], 2, max_new_tokens=3, progress=False, said=lambda *each: heard.append(each)
    )
    assert [each[:2] for each in heard].count((0, 1)) == len(found.tokens[1])
    assert [each for each in heard if each[1] == 1][-1] == (0, 1, found.texts[1])


@pytest.mark.parametrize("tokenizer", ["bytes", "unigram"])
def test_what_is_heard_stays(tokenizer: str) -> None:
    posterior, settings = posterior_of(tokenizer=tokenizer), {"max_new_tokens": 12, "progress": False, "seed": 2}
    heard: list[str] = []
    (free,) = posterior.generate(PROMPTS[2], **settings, said=lambda *each: heard.append(each[2]))
    (whole,) = free.texts
    assert heard[-1] == whole and all(late.startswith(early) for early, late in pairwise(heard))
    assert any(len(heard[number + 1]) > len(heard[number]) for number in range(10))  # it does not all come at the end
    # Texts at which it ends that take several tokens, and one that only seems to come until the last one.
    for start, end in ((2, 6), (1, 9), (4, len(whole))):
        heard.clear()
        (cut,) = posterior.generate(
            PROMPTS[2], **settings, stop=(whole[start:end], whole[-2:] + "?"), said=lambda *each: heard.append(each[2])
        )
        assert cut.texts == (whole[: whole.index(whole[start:end])],) == (heard[-1],)
        assert all(late.startswith(early) for early, late in pairwise(heard))
    heard.clear()
    posterior.generate(PROMPTS[2], **settings, stop=(whole[-2:] + "?",), said=lambda *each: heard.append(each[2]))
    assert heard[-1] == whole


@pytest.mark.parametrize(
    ("method", "chosen", "sampled"),
    [
        ("draw", {}, True),
        ("mixture", {}, True),
        ("mean", {}, False),
        ("draw", {"temperature": 0.5}, False),
        ("mixture", {"top_p": 0.9}, False),
    ],
)
def test_which_texts_are_samples_of_the_predictive_is_said(
    method: str, chosen: dict[str, float], sampled: bool
) -> None:
    (found,) = posterior_of().generate("A", 2, method, draws=2, max_new_tokens=2, progress=False, **chosen)
    assert found.sampled == sampled == ("no samples of the posterior predictive" not in summary(found))


def test_a_point_estimate_has_one_draw() -> None:
    (found,) = posterior_of(kind="delta").generate(PROMPTS[0], 3, max_new_tokens=4, progress=False)
    assert found.log_probs.shape == (3, 1) and found.mutual_information == pytest.approx(0, abs=1e-12)
    assert len(set(found.tokens)) > 1  # the same weights, and other tokens


def test_texts_are_scored_some_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, settings = posterior_of(), {"max_new_tokens": 7, "draws": 2, "progress": False}
    whole = posterior.generate(PROMPTS, 2, **settings)
    monkeypatch.setattr(
        completions, "LOGITS", 6 * posterior.program.network.config.vocab_size
    )  # of single precision, three of double
    held, logits_at = [], writing.logits_at

    def counted(network: Any, hidden: Tensor) -> Tensor:
        held.append(len(hidden))
        return logits_at(network, hidden)

    monkeypatch.setattr(writing, "logits_at", counted)
    for one, other in zip(whole, posterior.generate(PROMPTS, 2, **settings), strict=True):
        torch.testing.assert_close(one.log_probs, other.log_probs)
    assert max(held) == 3


def test_point_estimates_of_several_fits_have_a_draw_each() -> None:
    fits = [posterior_of(kind="delta") for _ in range(2)]
    with torch.no_grad():
        for parameter in fits[1].guide.parameters():
            parameter.mul_(2)
    both = MixturePosterior(fits, fits[0].record)
    (found,) = both.generate(PROMPTS[0], 4, max_new_tokens=4, progress=False)
    assert found.log_probs.shape == (4, 2) and found.mutual_information > 0


class TestRefusals:
    def test_an_encoder_is_no_language_model(self) -> None:
        program = tiny_program()
        guide = make_guide("delta", program.model, program.sites, 0.1)
        with pytest.raises(PosteriorError, match=r"cannot generate text: its program \(classes\) has no language"):
            VariationalPosterior(program, Record("mle", {}, n_data=24), guide).generate("A")

    def test_wrong_settings(self) -> None:
        posterior = posterior_of()
        with pytest.raises(PosteriorError, match="method of generation 'drawn'.*Did you mean 'draw'"):
            posterior.generate("A", method="drawn")
        with pytest.raises(SettingError, match="max_token"):
            posterior.generate("A", max_token=3)
        for name in ("samples", "draws", "batch_size"):
            with pytest.raises(SettingError, match=name):
                posterior.generate("A", **{name: 0})

    def test_an_empty_prompt(self) -> None:
        with pytest.raises(DataError, match="Prompt 1 has no tokens"):
            posterior_of().generate(["A", ""])

    @pytest.mark.parametrize(("row", "said"), [({"text": None}, "no value in column 'text'"), ({"word": "A"}, "text")])
    def test_a_row_without_its_text(self, row: dict[str, Any], said: str) -> None:
        with pytest.raises(DataError, match=said):
            posterior_of().generate([row])

    def test_more_than_the_network_has_positions_for(self) -> None:
        with pytest.raises(
            SettingError, match=f"has 1 tokens and its text up to {POSITIONS}: .* positions for {POSITIONS}"
        ):
            posterior_of().generate("A", max_new_tokens=POSITIONS)


def test_a_row_is_shown_as_it_is_read() -> None:
    program, prompt = posterior_of(tokenizer="unigram").program, "is it not ?\nis the moon ?\n"
    program.observation = Completions()
    assert program.encoder is not None
    program.encoder.spec = TaskSpec("program", "completion", ("prompt",), completion="completion")
    program.encoder.tokenizer.clean_up_tokenization_spaces = True
    (made,) = writing.read(program, [{"prompt": prompt}])
    assert made.text == prompt and made.tokens == program.encoder.tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("tokenizer", ["bytes", "unigram"])
def test_blanks_of_a_text_are_kept(tokenizer: str) -> None:
    program = posterior_of(tokenizer=tokenizer).program
    read = program.encoder.tokenizer
    read.clean_up_tokenization_spaces = True
    prompts, whole = writing.read(program, ["Answer"]), read("Answer the moon . is it not")["input_ids"]
    writer = writing.Writer(program, prompts, Decoding())
    assert writer.text(0, whole[len(prompts[0].tokens) :]) == " the moon . is it not"
