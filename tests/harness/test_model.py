"""A posterior as a model of the harness: against the harness's own model, and against averages by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_scenarios import LONG, QUIZ, TEXTS, posterior_of, write_tasks
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel, PromptTuningConfig, get_peft_model
from scenarios import tiny_program
from transformers import AutoModelForCausalLM, AutoTokenizer

from bayeslora.errors import DataError, PosteriorError, SettingError
from bayeslora.harness import PosteriorLM
from bayeslora.inference.mixture import MixturePosterior
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.models.guides.auto import make_guide
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.record import Record

DRAWS = 3


def lm(posterior: Posterior, average: str = "sequence", **settings: Any) -> PosteriorLM:
    return PosteriorLM(posterior, average, **{"draws": DRAWS, "progress": False} | settings)


def request(kind: str, *arguments: Any, doc: int = 0, task: str = "quiz") -> Instance:
    return Instance(kind, {}, arguments, 0, (task, doc, 1))


def quiz() -> list[Instance]:
    """Questions with their choices, and one text that is alone in its document."""
    rows = [(doc, f"Question: {row['question']}\nAnswer:", row["choices"]) for doc, row in enumerate(QUIZ)]
    choices = [(doc, asked, f" {choice}") for doc, asked, each in rows for choice in each]
    found = [request("loglikelihood", asked, choice, doc=doc) for doc, asked, choice in choices]
    return [*found, request("loglikelihood", "The moon", " is a stone", task="texts")]


def test_a_learned_prompt_leaves_less_room() -> None:
    posterior = posterior_of()
    whole = lm(posterior).max_length
    network, tokens = AutoModelForCausalLM.from_pretrained(posterior.program.base.path), 5
    prompted = get_peft_model(network, PromptTuningConfig(num_virtual_tokens=tokens, task_type="CAUSAL_LM"))
    program = Program(prompted, posterior.program.observation, encoder=posterior.program.encoder)
    guide = make_guide("delta", program.model, program.sites, 0.1)
    assert lm(VariationalPosterior(program, posterior.record, guide)).max_length == whole - tokens


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return posterior_of()


@pytest.fixture(scope="module")
def exact(posterior: Posterior) -> torch.Tensor:
    """Log-likelihoods (requests, draws) of the quiz, by one pass for each text under each draw."""
    return torch.tensor([[by_hand(posterior, each, draw) for draw in range(DRAWS)] for each in quiz()]).double()


def by_hand(posterior: Posterior, each: Instance, draw: int) -> float:
    read = posterior.program.encoder.tokenizer
    context, more = each.args
    whole, before = read(context + more)["input_ids"], read(context.rstrip())["input_ids"]
    with posterior.program.weights.holding(list(posterior.draws(DRAWS))[draw]), torch.no_grad():
        logits = posterior.program.network(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return float(sum(logits[place - 1, whole[place]] for place in range(len(before), len(whole))))


@pytest.mark.parametrize(("network", "tokenizer"), [("llama", "bytes-bos"), ("gpt2", "bytes")])
def test_the_mean_is_the_harnesss_own_model_of_the_saved_adapter(network: str, tokenizer: str, tmp_path: Path) -> None:
    posterior, files = posterior_of(network, tokenizer), write_tasks(tmp_path)
    posterior.save(tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(posterior.program.base.name)
    saved = PeftModel.from_pretrained(base, tmp_path / "saved")
    own = HFLM(pretrained=saved, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "saved"), batch_size=2)
    found = []
    for model in (own, lm(posterior, "mean", batch_size=2)):
        tasks = TaskManager(include_defaults=False).load([str(files["quiz"]), str(files["texts"])])
        found.append(evaluator.evaluate(model, tasks, bootstrap_iters=0))
    for name, count in {"quiz": len([*QUIZ, LONG]), "texts": len(TEXTS)}.items():
        pairs = list(zip(*(each["samples"][name] for each in found), strict=True))
        assert len(pairs) == count
        for expected, got in pairs:
            assert expected["arguments"] == got["arguments"]
            answers = [torch.tensor(each["resps"]).double() for each in (got, expected)]
            torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-6)
        numbers = [{k: v for k, v in each["results"][name].items() if not isinstance(v, str)} for each in found]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-5) and len(numbers[0]) > 1


def test_the_mean_of_several_fits_is_the_average_over_each() -> None:
    fits = [posterior_of("llama", "bytes") for _ in range(2)]
    with torch.no_grad():
        for parameter in fits[1].guide.parameters():
            parameter.mul_(2)
    both = MixturePosterior(fits, fits[0].record)
    asked = quiz()
    each = [[score for score, _ in lm(one, "mean").loglikelihood(asked)] for one in fits]
    found = [score for score, _ in lm(both, "mean").loglikelihood(asked)]
    expected = torch.tensor(each).double().logsumexp(0) - math.log(2)
    torch.testing.assert_close(torch.tensor(found).double(), expected, atol=1e-5, rtol=1e-5)
    assert max(abs(one - other) for one, other in zip(*each, strict=True)) > 0.01


def test_sequences_are_averages_of_probabilities(posterior: Posterior, exact: torch.Tensor) -> None:
    found = lm(posterior).loglikelihood(quiz())
    expected = exact.exp().mean(1).log()
    torch.testing.assert_close(torch.tensor([each for each, _ in found]).double(), expected, atol=1e-5, rtol=1e-5)
    assert (expected - exact.mean(1)).abs().max() > 0.01  # which an average of log-likelihoods is not


def test_choices_are_averages_of_their_softmax(posterior: Posterior, exact: torch.Tensor) -> None:
    found = torch.tensor([each for each, _ in lm(posterior, "choices").loglikelihood(quiz())]).double()
    for doc in range(len(QUIZ)):
        mine = slice(3 * doc, 3 * doc + 3)
        torch.testing.assert_close(found[mine].exp(), exact[mine].softmax(0).mean(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[mine].softmax(0), found[mine].exp())  # as the harness makes it
    # A text that is alone is no choice.
    assert float(found[-1]) == pytest.approx(float(exact[-1].exp().mean().log()), abs=1e-5)


def test_neither_repetitions_nor_unasked_choices_are_choices(posterior: Posterior) -> None:
    requests = quiz()[:3]
    unasked = [request("loglikelihood", "", each.args[1]) for each in requests]
    alone = [each for each, _ in lm(posterior, "choices").loglikelihood(requests)]
    among = lm(posterior, "choices").loglikelihood([*requests, *unasked, *requests])
    assert [each for each, _ in among[:3]] == pytest.approx(alone) == [each for each, _ in among[6:]]
    assert sum(math.exp(each) for each, _ in among[3:6]) == pytest.approx(1)


def test_windows_are_summed_within_a_draw(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PosteriorLM, "max_length", 16)
    (found,) = lm(posterior).loglikelihood_rolling([request("loglikelihood_rolling", TEXTS[1])])
    read = posterior.program.encoder.tokenizer(TEXTS[1])["input_ids"]
    sums = torch.zeros(DRAWS).double()
    for draw, weights in enumerate(posterior.draws(DRAWS)):
        with posterior.program.weights.holding(weights), torch.no_grad():
            for start in range(0, len(read), 16):
                end = min(start + 16, len(read))
                shown = [1, *read][max(0, end - 16) : end]
                logits = posterior.program.network(input_ids=torch.tensor([shown])).logits[0].double().log_softmax(-1)
                sums[draw] += sum(logits[place - end, read[place]] for place in range(start, end))
    assert len(read) > 40
    assert found == pytest.approx(float(sums.logsumexp(0) - math.log(DRAWS)), rel=1e-5)
    assert lm(posterior, "choices").loglikelihood_rolling([request("loglikelihood_rolling", TEXTS[1])]) == [found]


def test_neither_global_generators_nor_the_network_are_disturbed(posterior: Posterior) -> None:
    posterior.program.network.train()
    before, first = torch.get_rng_state(), lm(posterior).loglikelihood(quiz())
    assert torch.equal(torch.get_rng_state(), before) and posterior.program.network.training
    assert lm(posterior, batch_size=1).loglikelihood(quiz()) == [(pytest.approx(each), said) for each, said in first]


class TestCache:
    def test_holds_averages_alone(
        self, posterior: Posterior, tmp_path: Path, exact: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = lm(posterior)
        cached = CachingLM(model, str(tmp_path / "cache.db"))
        early: list[Any] = []  # what a model itself keeps before it has an answer
        monkeypatch.setattr(CacheHook, "add_partial", lambda self, *values: early.append(values))
        rolling = [request("loglikelihood_rolling", text) for text in TEXTS]
        found = [*cached.loglikelihood(quiz()), *cached.loglikelihood_rolling(rolling)]
        kept = list(cached.dbdict.values())
        assert len(kept) == len(found) and all(each in found for each in kept) and not early
        averages = exact.exp().mean(1).log().tolist()
        assert [value for value, _ in kept[: len(averages)]] == pytest.approx(averages, abs=1e-5)
        model._scores = None  # nothing is asked twice
        assert [*cached.loglikelihood(quiz()), *cached.loglikelihood_rolling(rolling)] == found
        cached.dbdict.close()

    def test_knows_no_documents(self, posterior: Posterior, tmp_path: Path) -> None:
        with pytest.raises(SettingError, match="depend on all choices of a document: leave out use_cache"):
            CachingLM(lm(posterior, "choices"), str(tmp_path / "cache.db"))


class TestGeneration:
    def texts(self, model: PosteriorLM, prompts: list[str], repeats: int = 1, **asked: Any) -> list[str]:
        requests = [request("generate_until", prompt, asked) for prompt in prompts]
        return model.generate_until([each for each in requests for _ in range(repeats)])

    def test_texts_are_the_posteriors(self, posterior: Posterior) -> None:
        prompts = [f"Question: {row['question']}\nAnswer:" for row in QUIZ]
        settings: dict[str, Any] = {"draws": DRAWS, "max_new_tokens": 6, "progress": False}
        for average, method in {"sequence": "mixture", "choices": "mixture", "mean": "mean"}.items():
            expected = [each.texts[0] for each in posterior.generate(prompts, 1, method, temperature=0, **settings)]
            assert self.texts(lm(posterior, average), prompts, max_gen_toks=6, do_sample=False) == expected
        sampled = posterior.generate(prompts, 2, "draw", temperature=0.7, top_p=0.9, **settings)
        asked = {"max_gen_toks": 6, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
        found = self.texts(lm(posterior, method="draw"), prompts, 2, **asked)
        assert found == [text for each in sampled for text in each]

    def test_a_text_stops(self, posterior: Posterior) -> None:
        (free,) = self.texts(lm(posterior), ["Answer"], max_gen_toks=8)
        stop = free[3]
        assert self.texts(lm(posterior), ["Answer"], max_gen_toks=8, until=[stop, "</s>"]) == [free.split(stop)[0]]
        assert self.texts(lm(posterior), ["Answer"], max_gen_toks=8, until=stop) == [free.split(stop)[0]]

    def test_requests_of_several_kinds(self, posterior: Posterior) -> None:
        asked = [request("generate_until", "Answer", {"max_gen_toks": count}) for count in (2, 5, 2)]
        texts = lm(posterior).generate_until(asked)
        assert texts[0] == texts[2] and texts[1].startswith(texts[0]) and len(texts[1]) > len(texts[0])

    @pytest.mark.parametrize("tokenizer", ["bytes-bos", "bytes"])
    def test_a_long_context_keeps_its_end(self, tokenizer: str) -> None:
        posterior = posterior_of(tokenizer=tokenizer)
        model, question = lm(posterior), "Question: is the moon a stone?\nAnswer:"
        read = posterior.program.encoder.tokenizer
        room = model.max_length - 6
        kept = model._end("The sun is good. " * 40 + question, room)
        assert kept.endswith(question) and room - 3 < len(read(kept)["input_ids"]) <= room
        long = self.texts(model, ["The sun is good. " * 40 + question], max_gen_toks=6)
        assert long == self.texts(model, [kept], max_gen_toks=6)
        assert model._end(question, room) == question

    def test_what_cannot_be_asked(self, posterior: Posterior) -> None:
        with pytest.raises(SettingError, match="top_k"):
            self.texts(lm(posterior), ["Answer"], max_gen_toks=6, top_k=3)
        with pytest.raises(SettingError, match="lower max_new_tokens"):
            self.texts(lm(posterior), ["Answer"])  # 256, and there are positions for 128


class TestRefusals:
    def test_an_encoder(self) -> None:
        program = tiny_program()
        guide = make_guide("delta", program.model, program.sites, 0.1)
        with pytest.raises(PosteriorError, match="asks a causal language model .* its program is of classes"):
            lm(VariationalPosterior(program, Record("mle", {}, n_data=24), guide))

    def test_settings(self, posterior: Posterior) -> None:
        with pytest.raises(SettingError, match="average over draws 'choice'.*Did you mean 'choices'"):
            lm(posterior, "choice")
        for name in ("draws", "batch_size", "seed"):
            with pytest.raises(SettingError, match=name):
                lm(posterior, **{name: -1})

    def test_continuations(self, posterior: Posterior) -> None:
        with pytest.raises(DataError, match="'' has 0 tokens of its own"):
            lm(posterior).loglikelihood([request("loglikelihood", "Answer", "")])
        with pytest.raises(DataError, match="no more than the 128"):
            lm(posterior).loglikelihood([request("loglikelihood", "Answer", " no" * 200)])
