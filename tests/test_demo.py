from __future__ import annotations

import re
import sys
from math import exp, sqrt
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from bayeslora.demo import MODEL_PATH, ROWS_PATH
from bayeslora.errors import DataError
from bayeslora.tasks import load_task

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "demo"))
import lexicon  # noqa: E402
import text  # noqa: E402

DOMAINS = tuple(lexicon.DOMAINS)
ROWS = text.rows(4_000, seed=1)


def clauses(sentence: str, domain: str) -> list[tuple[str, str, float]]:
    """Subject, verb and value of each clause, read off the words of a sentence."""
    values = {
        (subject, adjective): value
        for aspect in lexicon.DOMAINS[domain]
        for subject in aspect.subjects
        for adjective, value in aspect.qualities
    }
    factors = dict(lexicon.ADVERBS + lexicon.EXTREME_ADVERBS + lexicon.NEGATIONS)
    subjects = "|".join({subject for subject, _ in values})
    adverbs = "|".join(filter(None, factors))
    found = re.findall(rf"({subjects}) (was|were) (?:({adverbs}) )?(\w+)", sentence.lower())
    return [(subject, verb, values[subject, word] * factors[adverb]) for subject, verb, adverb, word in found]


def score(sentence: str, domain: str = "restaurant") -> float:
    """The hidden score, worked out from the sentence alone."""
    values = [value for _, _, value in clauses(sentence, domain)]
    if len(values) == 1:
        return 1.5 * values[0]
    if ", but " in sentence:
        before = 0.2 if any(said in sentence.lower() for said in lexicon.HEARSAY) else 0.4
        return before * values[0] + 1.5 * values[1]
    if ", even though " in sentence:
        return 1.5 * values[0] + 0.4 * values[1]
    if "although " in sentence.lower():
        return 0.4 * values[0] + 1.5 * values[1]
    return values[0] + values[1]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH, local_files_only=True)


def test_generator_is_reproducible():
    assert text.rows(3, seed=1) == ROWS[:3]
    assert ROWS[0]["text"] == "On Sunday, we sat near the window and the side dishes were heavy."
    assert ROWS[1]["text"].endswith("the waitress was hardly attentive, but the cook was quick.")
    assert text.rows(3, seed=2) != ROWS[:3]
    assert list(text.corpus(3, seed=1)) == list(text.corpus(5, seed=1))[:3]


@pytest.mark.parametrize("domain", DOMAINS)
def test_score_can_be_worked_out_from_the_words(domain):
    random = Random(5)
    for review in (text.review(random, domain) for _ in range(500)):
        assert score(review.text, domain) == pytest.approx(review.score), review.text


@pytest.mark.parametrize("domain", DOMAINS)
def test_sentences_are_english(domain):
    for row in text.rows(500, seed=6, domain=domain):
        sentence, words = row["text"], row["text"].split()
        assert re.fullmatch(r"[A-Z][A-Za-z, ]+\.", sentence), sentence
        assert 7 <= len(words) <= 26, sentence
        assert "  " not in sentence
        assert 1 <= len(clauses(sentence, domain)) <= 2, sentence
        for subject, verb, _ in clauses(sentence, domain):
            assert verb == ("were" if subject in lexicon.PLURAL else "was"), sentence
        if re.search(r", (but|even though) ", sentence):
            first, second = (value for _, _, value in clauses(sentence, domain))
            assert first * second < 0, sentence  # the clauses contradict each other


def test_vocabulary_is_small():
    words = {word for row in ROWS for word in re.findall("[a-z]+", row["text"].lower())}
    assert 200 <= len(words) <= 400


def test_words_are_worth_what_their_sentence_makes_of_them():
    assert score("The beer was cold.") > 0 > score("The soup was cold.")
    assert score("The soup was not fresh.") < 0 < score("The soup was a little fresh.")
    assert score("The soup was a little fresh.") < score("The soup was very fresh.")
    assert score("The soup was fresh, but the waiter was slow.") < 0
    assert score("The waiter was slow, but the soup was fresh.") > 0


def test_probabilities_are_a_softmax_of_the_score():
    even = text.probabilities(0.0)
    assert even == pytest.approx([1 / (2 + exp(1.0)), exp(1.0) / (2 + exp(1.0)), 1 / (2 + exp(1.0))])
    assert text.probabilities(1.3) == pytest.approx(text.probabilities(-1.3)[::-1])
    assert text.probabilities(50.0) == pytest.approx([0, 0, 1])
    for row in ROWS:
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-12)
        assert row["probabilities"] == pytest.approx(text.probabilities(score(row["text"])))


@pytest.mark.parametrize("label", range(3))
def test_labels_follow_the_true_probabilities(label):
    # The number of labels among n rows has mean sum(p) and variance sum(p (1 - p)); 4 standard deviations are
    # exceeded by a right generator once in 16,000 comparisons. Quarters by p: a wrong slope would show there.
    rows = sorted(ROWS, key=lambda row: row["probabilities"][label])
    for part in [rows, *(rows[start : start + 1_000] for start in range(0, 4_000, 1_000))]:
        true = [row["probabilities"][label] for row in part]
        deviation = sqrt(sum(p * (1 - p) for p in true))
        assert abs(sum(row["label"] == label for row in part) - sum(true)) < 4 * deviation


def test_best_possible_accuracy_leaves_room_for_calibration():
    assert 0.80 < sum(max(row["probabilities"]) for row in ROWS) / len(ROWS) < 0.85


@pytest.mark.parametrize(("adjective", "sign"), [("superb", 1), ("charming", 1), ("awful", -1), ("rude", -1)])
def test_verdicts_suit_the_reviews(adjective, sign):
    plain = re.compile(rf"The [a-z ]+ (was|were) (simply )?{adjective}\.")
    scores = [lexicon.VERDICTS[verdict][1] for review, verdict in text.corpus(5_000, 7) if plain.fullmatch(review)]
    assert len(scores) >= 5
    assert min(sign * score for score in scores) >= 0.6  # worth about 2, and a verdict errs by a half


def test_task_has_the_true_probabilities_beside_the_labels():
    task = load_task("demo")
    assert task.spec.labels == ("no", "unsure", "yes")
    assert (len(task.train), len(task.validation), len(task.test)) == (4_000, 1_000, 2_000)
    assert task.train.dataset.column_names == ["text", "label", "probabilities"]
    assert sorted(task.train.dataset["text"]) == sorted(row["text"] for row in ROWS)
    hotels = task.split("test_ood")
    assert all(clauses(sentence, "hotel") for sentence in hotels.dataset["text"][:50])
    assert hotels.render(0).splitlines()[1] in ("-> no", "-> unsure", "-> yes")


def test_training_subsets_are_seeded_and_nested():
    small, large = (
        load_task("demo", train_size=50, seed=3),
        load_task("demo", train_size=100, heldout_size=20, seed=3),
    )
    assert list(small.train.dataset["text"]) == list(large.train.dataset["text"])[:50]
    assert len(large.heldout) == 20
    assert list(load_task("demo", train_size=50, seed=4).train.dataset["text"]) != list(small.train.dataset["text"])
    assert list(small.validation.dataset["text"]) == list(large.validation.dataset["text"])


def test_the_rows_are_those_of_the_generator():
    for name, (domain, size, seed) in {"validation": ("restaurant", 1_000, 2), "test_ood": ("hotel", 1_000, 4)}.items():
        shipped = load_task("demo").data[name].to_list()
        assert shipped == text.rows(size, seed, domain)
    assert load_task("demo").data["train"].to_list() == ROWS


def test_too_many_rows_are_refused():
    with pytest.raises(DataError, match="4,?000"):
        load_task("demo", train_size=5_000)


def test_splits_do_not_share_rows():
    task = load_task("demo")
    train, test = set(task.train.dataset["text"]), set(task.test.dataset["text"])
    # Short sentences recur by chance; a shared seed would make all of them equal.
    assert len(train & test) < 0.01 * len(test)


def test_files_are_small():
    assert sum(path.stat().st_size for path in ROWS_PATH.iterdir()) < 500_000
    files = {path.name: path.stat().st_size for path in MODEL_PATH.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert sum(files.values()) < 1_000_000


def test_tokenizer_knows_the_words(tokenizer):
    assert len(tokenizer) < 1_000
    encoded = tokenizer([row["text"] for row in ROWS[:500]])["input_ids"]
    assert all(tokenizer.unk_token_id not in row for row in encoded)
    assert max(map(len, encoded)) <= tokenizer.model_max_length
    assert tokenizer.decode(encoded[0], skip_special_tokens=True) == ROWS[0]["text"].lower()
    assert tokenizer.unk_token_id not in tokenizer("Zebras never queue up!")["input_ids"]  # spelled in pieces


def test_network_loads_as_a_classifier(tokenizer):
    network = AutoModelForSequenceClassification.from_pretrained(MODEL_PATH, num_labels=3, local_files_only=True)
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    batch = tokenizer([row["text"] for row in ROWS[:8]], padding=True, return_tensors="pt")
    assert network.eval()(**batch).logits.shape == (8, 3)


@torch.no_grad()
def test_encoder_has_learned_what_reviews_amount_to(tokenizer):
    network = AutoModel.from_pretrained(MODEL_PATH, local_files_only=True).eval()
    batch = tokenizer([row["text"] for row in ROWS[:1_500]], padding=True, return_tensors="pt")
    features = torch.nn.functional.pad(network(**batch).pooler_output, (0, 1), value=1.0)
    scores = torch.tensor([score(row["text"]) for row in ROWS[:1_500]]).unsqueeze(1)
    weights = torch.linalg.lstsq(features[:1_000], scores[:1_000]).solution
    residual = scores[1_000:] - features[1_000:] @ weights
    # An untrained encoder explains less than half of the variance; sampling error with 500 rows is about 0.01.
    assert 1 - residual.var() / scores[1_000:].var() > 0.85
