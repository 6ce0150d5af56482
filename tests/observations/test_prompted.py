"""Prompted classes have the probabilities of their words' tokens behind the prompt, as the whole network gives them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_scenarios import CHAT, POSITIONS, causal_base, tokenizer_of
from curvature_scenarios import dense_curvature, given, matrix_of, relative
from datasets import Dataset
from peft import LoraConfig
from scenarios import awake, saved_base, tiny_batch
from torch import Tensor

import bayeslora as bl
from bayeslora.errors import AdapterError, DataError, SettingError
from bayeslora.models import Gaussian
from bayeslora.observations import Classes, Prompted, TextChoices, build, of_task
from bayeslora.passes import Rows
from bayeslora.program import Program
from bayeslora.tasks import Split, Task, TaskSpec

PROMPT = "Review: {text}\nIs it good or bad?\nAnswer:"
SPEC = TaskSpec("films", labels=("negative", "positive", "neutral"), prompt=PROMPT)
FILMS = Dataset.from_dict(
    {
        "text": ["The film is great", "dull", "What a film, the sun and the moon of it", "not good"],
        "label": [1, 0, 1, 2],
    }
)
QUIZ = TaskSpec("quiz", "multiple-choice", ("ask",), labels=("1", "2", "3"), choices=("choices",))
ASKED = Dataset.from_dict(
    {
        "ask": ["Is the film good", "Which stone is it", "What"],
        "choices": [["yes", "it is not good"], ["the dull one", "moon stone", "(sun)"], ["a stone", "A"]],
        "label": [0, 2, 1],
    }
)
PAIRS = [("llama", "bytes"), ("llama", "unigram"), ("gpt2", "bytes-bos-eos"), ("qwen2", "bytes-bos")]
MODEL = Gaussian(sites="both", centre="zero")


def program(
    network: str = "llama",
    tokenizer: str = "bytes",
    side: str = "right",
    spec: TaskSpec = SPEC,
    rows: Dataset = FILMS,
    targets: Sequence[str] = (),
    chat: str | None = None,
    **settings: Any,
) -> Program:
    """With no LoRA matrix at its zero start."""
    names = list(targets) or (["c_attn"] if network == "gpt2" else ["q_proj", "v_proj"])
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=names)
    arguments = {"max_length": POSITIONS, "observation": "prompted", "model": MODEL} | settings
    base = causal_base(network, tokenizer, chat, side)
    return awake(Program.from_pretrained(base, Task(spec, train=Split(rows, spec)), lora=lora, **arguments))


def outputs(found: Program, rows: Split, batch_size: int = 4) -> Tensor:
    with torch.no_grad():
        return Rows.of(found, rows, batch_size).outputs(found, {site.name: site.initial for site in found.sites})


def logits_after(found: Program, text: str) -> Tensor:
    """Logits of the whole vocabulary behind a text, which the tokenizer reads on its own."""
    tokenizer: Any = found.encoder.tokenizer
    ids = tokenizer(text)["input_ids"]
    ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    found.weights.install({site.name: site.initial for site in found.sites})
    with torch.no_grad():
        return found.network(input_ids=torch.tensor([ids])).logits[0, -1]


def token(found: Program, text: str, word: str) -> int:
    """The one token that a word adds to a text."""
    tokenizer: Any = found.encoder.tokenizer
    one, two = (
        [each for each in tokenizer(part)["input_ids"] if each != tokenizer.eos_token_id]
        for part in (text, f"{text} {word}")
    )
    assert two[:-1] == one
    return int(two[-1])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("network", "tokenizer"), PAIRS)
def test_outputs_are_the_logits_of_the_labels_tokens(network: str, tokenizer: str, side: str) -> None:
    found, rows = program(network, tokenizer, side), Split(FILMS, SPEC)
    assert isinstance(found.observation, Prompted)
    scored = outputs(found, rows)
    for number, row in enumerate(FILMS):
        text = PROMPT.replace("{text}", row["text"])
        expected = logits_after(found, text)[[token(found, text, word) for word in SPEC.labels]]
        torch.testing.assert_close(scored[number], expected, rtol=1e-4, atol=1e-4)
    for batch_size in (1, 3):
        torch.testing.assert_close(outputs(found, rows, batch_size), scored, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("likelihood", ["restricted", "vocabulary"])
def test_likelihood_among_the_labels_or_the_whole_vocabulary(likelihood: str) -> None:
    found, rows = program(observation_settings={"likelihood": likelihood}), Split(FILMS, SPEC)
    scored = outputs(found, rows)
    density = found.observation.log_prob(scored, rows.labels())
    for number, row in enumerate(FILMS):
        text = PROMPT.replace("{text}", row["text"])
        logits, tokens = logits_after(found, text), [token(found, text, word) for word in SPEC.labels]
        among = logits[tokens] if likelihood == "restricted" else logits
        expected = logits[tokens[row["label"]]] - among.logsumexp(0)
        torch.testing.assert_close(density[number], expected, rtol=1e-4, atol=1e-4)
    made = Rows.of(found, rows).predicted(scored.unsqueeze(0))
    assert made.names == (*SPEC.labels, *(["(other)"] if likelihood == "vocabulary" else []))
    with pytest.raises(DataError, match="Row 0 has label 3; expected a class number from 0 to 2"):
        found.observation.check([3])


@pytest.mark.parametrize("likelihood", ["restricted", "vocabulary"])
def test_a_row_has_the_letters_of_its_own_choices(likelihood: str) -> None:
    rows = Split(ASKED, QUIZ)
    found = program(spec=QUIZ, rows=ASKED, observation_settings={"likelihood": likelihood})
    assert found.observation.words == tuple("ABCDE")  # as many as the tokenizer has tokens for
    scored = outputs(found, rows)
    for number, row in enumerate(ASKED):
        letters = "ABC"[: len(row["choices"])]
        lines = [f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True)]
        text = "\n".join([row["ask"], *lines, "Answer:"])
        logits, tokens = logits_after(found, text), [token(found, text, letter) for letter in letters]
        torch.testing.assert_close(scored[number, : len(letters)], logits[tokens], rtol=1e-4, atol=1e-4)
        assert (scored[number, len(letters) : 3] == -torch.inf).all()
        if likelihood == "vocabulary":
            torch.testing.assert_close(scored[number].logsumexp(0), logits.logsumexp(0), rtol=1e-4, atol=1e-4)


def test_rows_of_another_task_may_have_more_choices_or_fewer() -> None:
    found = program(spec=QUIZ, rows=ASKED)
    for count in (2, 5, 6):
        spec = TaskSpec("other", "multiple-choice", ("ask",), labels=tuple("123456"[:count]), choices=("choices",))
        rows = Split(Dataset.from_dict({"ask": ["What"], "choices": [["sun"] * count], "label": [1]}), spec)
        if count > 5:
            with pytest.raises(DataError, match="up to 6 choices, and there are tokens of 5 letters"):
                outputs(found, rows)
        else:
            assert outputs(found, rows).shape == (1, count) and outputs(found, rows).isfinite().all()


@pytest.mark.parametrize(("tokenizer", "first"), [("bytes", "Ġpositive"), ("unigram", "▁positive")])
def test_a_label_is_the_token_of_its_word_with_the_blank_before_it(tokenizer: str, first: str) -> None:
    read, words = tokenizer_of(tokenizer), ("positive", "negative")
    for prompt in (PROMPT, f"{PROMPT} "):  # which would be a token of its own
        spec = TaskSpec("films", labels=("a", "b"), prompt=prompt, words=words)
        found = Prompted(2).for_tokenizer(read, spec)
        assert read.convert_ids_to_tokens(list(found.label_tokens))[0] == first and found.words == words


def test_a_label_at_the_beginning_of_a_line_has_no_blank() -> None:
    spec, read = TaskSpec("films", labels=("A", "B"), prompt="{text}\n"), tokenizer_of()
    assert read.convert_ids_to_tokens(list(Prompted(2).for_tokenizer(read, spec).label_tokens)) == ["A", "B"]


def test_a_prompt_may_be_what_a_user_says_in_a_chat() -> None:
    settings = {"chat": True, "words": "A,B,C"}
    found = program(chat=CHAT, observation_settings=settings)
    text = PROMPT.replace("{text}", "dull")
    text = f"<|user|>\n{text}</s>\n<|assistant|>\n"
    ids = found.encoder.tokenizer.convert_tokens_to_ids(["A", "B", "C"])  # no blank at the beginning of a line
    row = Split(FILMS, SPEC).select([1])
    torch.testing.assert_close(outputs(found, row)[0], logits_after(found, text)[ids], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tokenizer", "words", "message"),
    [
        ("bytes", ("positive", "wonderful", "neutral"), r"'wonderful' takes \d tokens \(' wo?', "),
        ("bytes", ("positive", "negative", " positive"), "' positive' has the token of 'positive'"),
        ("bytes", ("positive", "negative", "positive"), "'positive' has the token of 'positive'"),
        ("unigram", ("positive", "négative", "neutral"), "'négative' is unknown to the tokenizer"),
        ("bytes", ("positive", "negative"), "has 3 classes or choices and 2 words to answer by"),
    ],
)
def test_labels_without_a_token_of_their_own(tokenizer: str, words: tuple[str, ...], message: str) -> None:
    spec = TaskSpec("films", labels=SPEC.labels, prompt=PROMPT, words=words)
    with pytest.raises(DataError, match=message):
        program(tokenizer=tokenizer, spec=spec)


def test_a_word_that_changes_the_tokens_of_the_prompt() -> None:
    spec, read = TaskSpec("films", labels=("x", "B"), prompt="{text}<"), tokenizer_of()
    read.add_tokens(["< x"])
    with pytest.raises(DataError, match="'x' changes the tokens before it"):
        Prompted(2).for_tokenizer(read, spec)


def test_a_tokenizer_without_a_chat_template() -> None:
    with pytest.raises(DataError, match="has no chat template"):
        program(observation_settings={"chat": True})


def test_a_template_names_a_column_that_is_not_there() -> None:
    with pytest.raises(DataError, match="Unknown column 'words'"):
        bl.load_task(FILMS, prompt="Review: {words}\nAnswer:")


def test_a_prompt_that_is_longer_than_the_networks_positions() -> None:
    found = program(max_length=10**4)
    films = Dataset.from_dict({"text": ["film " * 500], "label": [0]})
    (ids,) = Rows.of(found, Split(films, SPEC)).dataset["input_ids"][:]
    assert len(ids) == POSITIONS  # the text is cut, and neither the template's beginning nor its end
    text = found.encoder.tokenizer.decode(ids)
    assert text.startswith("Review: film") and text.endswith("film film\nIs it good or bad?\nAnswer:")
    long = TaskSpec("films", labels=SPEC.labels, prompt="film " * 200 + "{text}\nAnswer:")
    with pytest.raises(DataError, match=f"there is room for {POSITIONS}"):
        Rows.of(program(spec=long, max_length=10**4), Split(FILMS, long))


@pytest.mark.parametrize(
    ("spec", "causal", "name", "expected"),
    [
        (SPEC, True, None, Prompted),
        (SPEC, False, None, Classes),
        (SPEC, True, "classes", Classes),
        (QUIZ, True, None, TextChoices),
        (QUIZ, True, "prompted", Prompted),
    ],
)
def test_task_and_base_choose_unless_one_is_named(
    spec: TaskSpec, causal: bool, name: str | None, expected: type
) -> None:
    assert type(of_task(spec, name, causal)) is expected


def test_settings() -> None:
    with pytest.raises(SettingError, match="likelihood is 'all', expected 'restricted' or 'vocabulary'"):
        Prompted(2, likelihood="all")
    found = Prompted(2, ("a", "b"), (3, 4), "vocabulary", chat=True)
    assert build(found.to_dict()) == found == build({**found.to_dict(), "label_tokens": [3, 4], "words": ["a", "b"]})
    assert found.outputs == 3


def test_a_network_that_is_no_causal_language_model(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is a BertForSequenceClassification, and the observation 'prompted' needs"):
        Program.from_pretrained(saved_base(tmp_path), Task(SPEC, Split(FILMS, SPEC)), observation="prompted")


def test_labels_whose_tokens_nobody_knows() -> None:
    found = program()
    with pytest.raises(SettingError, match="Of 3 labels 0 have a token"):
        Program(found.network, Prompted(3))
    rows = Dataset.from_dict({"input_ids": [[5, 6], [7]], "labels": [0, 1]})
    one = Program(found.network, Prompted(3, label_tokens=(7, 8, 9)))
    assert one.outputs({site.name: site.initial for site in one.sites}, tiny_batch(one, rows)).shape == (2, 3)


@pytest.mark.parametrize(
    ("network", "targets", "side", "likelihood"),
    [
        ("llama", ["q_proj", "v_proj"], "left", "restricted"),
        ("llama", ["o_proj", "down_proj"], "right", "vocabulary"),
        ("llama", ["v_proj", "lm_head"], "left", "restricted"),
        ("qwen2", ["q_proj", "lm_head"], "right", "vocabulary"),
        ("gpt2", ["c_attn", "c_fc"], "left", "restricted"),
    ],
)
def test_curvature_is_the_dense_one(network: str, targets: list[str], side: str, likelihood: str) -> None:
    settings = {"likelihood": likelihood}
    found, rows = program(network, side=side, targets=targets, observation_settings=settings), Split(FILMS, SPEC)
    exact = dense_curvature(found, rows)
    assert relative(matrix_of(given(found, rows, curvature="full", batch_size=3)), exact) < 1e-4
    diagonal = matrix_of(given(found, rows, curvature="diag", batch_size=3)).diagonal()
    torch.testing.assert_close(diagonal, exact.diagonal(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("spec", [SPEC, QUIZ])
def test_chance_is_a_guess_among_the_labels_of_a_row(spec: TaskSpec) -> None:
    data = FILMS if spec is SPEC else ASKED
    rows, guesses = Split(data, spec), torch.tensor([3, 3, 3, 3] if spec is SPEC else [2, 3, 2]).log().neg()
    of = {}
    for likelihood in ("restricted", "vocabulary"):
        found = program(spec=spec, rows=data, observation_settings={"likelihood": likelihood})
        scored, labels = outputs(found, rows), rows.labels()
        own = scored[:, :-1].logsumexp(-1) if likelihood == "vocabulary" else scored.logsumexp(-1)
        of[likelihood] = found.observation.chance(scored, labels) - (own - scored.logsumexp(-1))
        # What is better than chance is so by either likelihood.
        better = found.observation.log_prob(scored, labels) - found.observation.chance(scored, labels)
        of[f"{likelihood}, better"] = better
    torch.testing.assert_close(of["restricted"], guesses)
    torch.testing.assert_close(of["vocabulary"], guesses)
    torch.testing.assert_close(of["vocabulary, better"], of["restricted, better"], rtol=1e-4, atol=1e-4)


def test_a_mode_to_which_other_words_are_more_probable_is_not_worse_than_chance() -> None:
    found, rows = program(observation_settings={"likelihood": "vocabulary"}), Split(FILMS, SPEC)
    scored = outputs(found, rows)
    assert found.observation.log_prob(scored, rows.labels()).mean() < -4  # other words are more probable by far
    settings = {"mode": "given", "tune": "none", "progress": False, "cpu": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The mode explains")
        bl.fit(found, rows, "laplace", **settings)
    worst = FILMS.remove_columns("label").add_column("label", scored[:, :-1].argmin(-1).tolist())
    with pytest.warns(UserWarning, match="far worse than chance"):
        bl.fit(found, Split(worst, SPEC), "laplace", **settings)


def test_curvature_of_rows_with_fewer_choices_is_the_dense_one() -> None:
    found, rows = program(spec=QUIZ, rows=ASKED), Split(ASKED, QUIZ)
    exact = dense_curvature(found, rows)
    assert relative(matrix_of(given(found, rows, curvature="full", batch_size=3)), exact) < 1e-4


@pytest.mark.parametrize("backend", ["svi", "laplace", "map"])
@pytest.mark.parametrize("tokenizer", ["bytes", "unigram"])
def test_a_posterior_predicts_the_same_once_it_is_loaded(tmp_path: Path, tokenizer: str, backend: str) -> None:
    rows = Split(FILMS, SPEC)
    posterior = bl.fit(program(tokenizer=tokenizer, side="left"), rows, backend, epochs=1, batch_size=3, progress=False)
    found = posterior.predict(rows, draws=3, progress=False)
    posterior.save(tmp_path / "saved")
    loaded = bl.load(tmp_path / "saved")
    assert loaded.program.observation == posterior.program.observation
    assert torch.equal(loaded.predict(rows, draws=3, progress=False).outputs, found.outputs)
    assert set(found.metrics(intervals=False)) >= {"accuracy", "nll", "ece_15"}
