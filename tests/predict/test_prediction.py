from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import logsumexp
from scipy.stats import kstest, norm

from bayeslora import files
from bayeslora.errors import DataError, PosteriorError
from bayeslora.predict import prediction as predictive
from bayeslora.predict.prediction import ClassPrediction, Prediction
from bayeslora.predict.sequences import SequencePrediction
from bayeslora.predict.values import ValuePrediction


def classes(draws: int = 6, n: int = 40, width: int = 3, seed: int = 0) -> ClassPrediction:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(draws, n, width, generator=generator)
    labels = torch.randint(width, (n,), generator=generator)
    return ClassPrediction(logits, labels, "sample", ("a", "b", "c")[:width])


def reals(draws: int = 5, n: int = 30) -> ClassPrediction:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(draws, n, 1, generator=generator)
    return ValuePrediction(logits, torch.randn(n, generator=generator), scale=0.5)


def test_probabilities_are_averaged_and_not_logits() -> None:
    """A posterior that is wide in logits is flat in probabilities, though its mean logits are certain."""
    spread = 30 * torch.randn(4000, 1, 1, generator=torch.Generator().manual_seed(0))
    logits = torch.cat([spread, torch.zeros_like(spread)], dim=-1) + torch.tensor([6.0, 0.0])
    wide = ClassPrediction(logits, None).probabilities[0, 0]
    mean_logits = logits.mean(0).softmax(-1)[0, 0]
    # P(6 + 30 z > 0) = 0.58 with a Monte Carlo error of 0.008 at 4000 draws.
    assert wide == pytest.approx(0.58, abs=0.04)
    assert mean_logits > 0.95


def test_probabilities_are_the_mean_over_draws() -> None:
    found = classes()
    assert torch.allclose(found.probabilities, found.logits.double().softmax(-1).mean(0))
    assert torch.allclose(found.probabilities.sum(-1), torch.ones(40, dtype=torch.float64))
    assert torch.equal(found.predictions, found.probabilities.argmax(-1))


def test_uncertainty_splits_into_expected_entropy_and_mutual_information() -> None:
    found = classes()
    assert (found.expected_entropy <= found.entropy + 1e-12).all()
    assert (found.mutual_information >= 0).all() and found.mutual_information.max() > 0.1
    assert torch.allclose(found.expected_entropy + found.mutual_information, found.entropy)
    alike = ClassPrediction(found.logits[:1].expand(7, -1, -1), None)
    assert torch.allclose(alike.mutual_information, torch.zeros(40, dtype=torch.float64), atol=1e-12)
    torn = torch.tensor([[[50.0, -50.0]], [[-50.0, 50.0]]])  # each draw is certain, and they disagree
    assert ClassPrediction(torn, None).mutual_information.item() == pytest.approx(math.log(2))


def test_nll_is_that_of_the_mixture() -> None:
    found = classes()
    assert found.labels is not None
    at_label = found.probabilities[torch.arange(40), found.labels]
    assert torch.allclose(found.log_predictive_density, at_label.log())
    assert found.log_likelihood.shape == (6, 40)
    assert found.metrics()["nll"].value == pytest.approx(-at_label.log().mean().item())
    assert found.metrics()["accuracy"].value == pytest.approx((found.predictions == found.labels).double().mean())


def test_choices_that_a_row_lacks_are_impossible_without_nan() -> None:
    found = classes()
    logits = found.logits.clone()
    logits[:, ::2, 2] = -math.inf
    labels = torch.zeros(40, dtype=torch.long)
    masked = ClassPrediction(logits, labels)
    assert (masked.probabilities[::2, 2] == 0).all()
    for tensor in (masked.entropy, masked.expected_entropy, masked.mutual_information):
        assert tensor.isfinite().all()
    two = ClassPrediction(found.logits[:, ::2, :2], labels[::2])
    assert torch.allclose(masked.entropy[::2], two.entropy)
    assert all(math.isfinite(interval.value) for interval in masked.metrics().values())
    labels[0] = 2
    assert ClassPrediction(logits, labels).metrics()["nll"].value == math.inf


def test_very_small_probabilities_keep_their_logarithm() -> None:
    logits = torch.tensor([[[0.0, -2000.0]], [[0.0, -1000.0]]])
    found = ClassPrediction(logits, torch.tensor([1]))
    assert found.log_probabilities[0, 1] == pytest.approx(-1000 - math.log(2))
    assert found.metrics()["nll"].value == pytest.approx(1000 + math.log(2))


def test_real_labels_have_a_mixture_of_normals() -> None:
    found = reals()
    assert found.labels is not None
    outputs = found.outputs.squeeze(-1).double().numpy()
    expected = logsumexp(norm(outputs, 0.5).logpdf(found.labels.numpy()), axis=0) - math.log(5)
    assert found.log_predictive_density.numpy() == pytest.approx(expected)
    assert found.mean.numpy() == pytest.approx(outputs.mean(0))
    assert found.variance.numpy() == pytest.approx(0.25 + outputs.var(0))
    assert torch.equal(found.predictions, found.mean)
    assert found.metrics()["nll"].value == pytest.approx(-expected.mean())
    assert list(found.metrics()) == ["rmse", "nll", "pearson", "spearman", "coverage_90"]
    assert found.disagreement.numpy() == pytest.approx(outputs.std(0))
    assert found.below.numpy() == pytest.approx(norm(outputs, 0.5).cdf(found.labels.numpy()).mean(0))


def test_labels_of_true_predictions_are_where_they_are_said_to_be() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(1, 2000, 1, generator=generator)
    labels = means[0, :, 0] + 3 * torch.randn(2000, generator=generator)
    found = {scale: ValuePrediction(means, labels, scale=scale) for scale in (1.5, 3.0, 6.0)}
    assert kstest(found[3.0].below.numpy(), "uniform").pvalue > 0.01  # one seed in a hundred has less
    coverage = {scale: each.metrics(intervals=False)["coverage_90"].value for scale, each in found.items()}
    # In the middle 90 % of N(0, scale) are |z| < 1.645 scale / 3 of the true law; four standard errors of 2,000 rows.
    expected = {scale: 2 * norm.cdf(norm.ppf(0.95) * scale / 3) - 1 for scale in found}
    assert all(abs(coverage[scale] - at) < 4 * (at * (1 - at) / 2000) ** 0.5 for scale, at in expected.items())


def test_metrics_say_how_they_were_made() -> None:
    plain = classes().metrics().to_dict()
    assert list(plain) == [
        "accuracy", "nll", "brier", "ece_10", "ece_15", "ece_20", "ece_15_by_chance", "ece_adaptive", "mcc",
        "interval", "n", "draws", "method",
    ]  # fmt: skip
    assert (plain["n"], plain["draws"], plain["method"]) == (40, 6, "sample")
    assert set(plain["accuracy"]) == {"value", "low", "high"}


def test_derived_tensors_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = classes()
    expected = whole.log_probabilities, whole.expected_entropy, whole.log_likelihood
    monkeypatch.setattr(predictive, "CHUNK", 6 * 3 * 7)
    parts = classes()
    for first, second in zip(
        expected, (parts.log_probabilities, parts.expected_entropy, parts.log_likelihood), strict=True
    ):
        assert torch.allclose(first, second)
    assert not ClassPrediction(torch.zeros(2, 0, 3), None).probabilities.numel()


@pytest.mark.parametrize("found", [classes(), reals(), ClassPrediction(torch.zeros(1, 4, 2), None, "mean")])
def test_save_and_load(found: Prediction, tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictive.safetensors"
    found.save(path)
    found.save(path)  # over the old one
    again = Prediction.load(path)
    assert type(again) is type(found) and torch.equal(again.outputs, found.outputs)
    assert (again.labels is None) == (found.labels is None)
    assert again.labels is None or found.labels is None or torch.equal(again.labels, found.labels)
    plain = [each.name for each in fields(found) if not isinstance(getattr(found, each.name), torch.Tensor)]
    assert all(getattr(again, name) == getattr(found, name) for name in plain)
    assert [each.name for each in path.parent.iterdir()] == ["predictive.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "predictive.safetensors"
    classes().save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        classes(seed=1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_predictive_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PosteriorError, match="Cannot read a prediction from"):
        ClassPrediction.load(tmp_path / "missing")
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(PosteriorError, match="Cannot read a prediction from"):
        ClassPrediction.load(tmp_path / "text")
    save_file({"logits": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(PosteriorError, match="holds no prediction: its format is None"):
        ClassPrediction.load(tmp_path / "other")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_wrong_shapes_and_what_is_not_finite_are_refused(value: float) -> None:
    with pytest.raises(DataError, match=r"Expected outputs \(draws, examples, outputs\), found the shape \(4, 2\)"):
        ClassPrediction(torch.zeros(4, 2), None)
    with pytest.raises(DataError, match="Expected names of 2 classes, found 3"):
        ClassPrediction(torch.zeros(1, 4, 2), None, label_names=("a", "b", "c"))
    with pytest.raises(DataError, match="Expected 4 labels"):
        ClassPrediction(torch.zeros(1, 4, 2), torch.zeros(3, dtype=torch.long))
    logits = torch.zeros(2, 4, 2)
    logits[1, 3, 0] = -math.inf  # of a choice that the row lacks
    assert ClassPrediction(logits).probabilities[3].tolist() == [0.25, 0.75]
    logits[1, 3, 0] = value
    with pytest.raises(DataError, match="The outputs of row 3 are NaN or infinity"):
        ClassPrediction(logits)


def test_rows_without_labels_have_no_metrics() -> None:
    with pytest.raises(DataError, match="no labels"):
        ClassPrediction(torch.zeros(1, 4, 2), None).metrics()


def test_a_prediction_says_what_it_is_on_one_line() -> None:
    assert repr(classes()) == "ClassPrediction(40 rows, 6 draws, method='sample', labels known)"
    assert repr(ClassPrediction(torch.zeros(1, 4, 2))) == "ClassPrediction(4 rows, 1 draws, method='sample', no labels)"


def test_tables_have_a_row_for_each_example() -> None:
    found = classes()
    table = found.to_pandas()
    assert list(table) == ["class", "p(a)", "p(b)", "p(c)", "entropy", "mutual_information"] and len(table) == 40
    np.testing.assert_array_equal(table[["p(a)", "p(b)", "p(c)"]].to_numpy(), found.probabilities.numpy())
    assert table["class"].tolist() == ["abc"[number] for number in found.predictions.tolist()]
    np.testing.assert_array_equal(table["mutual_information"], found.mutual_information.numpy())
    values = reals().to_pandas()
    np.testing.assert_array_equal(values["deviation"], reals().variance.sqrt().numpy())
    assert values["mean"].tolist() == reals().mean.tolist()


def test_a_table_of_sequences_says_how_far_draws_are_apart() -> None:
    found = SequencePrediction(torch.tensor([[[-3.0], [-2.0]], [[-5.0], [-2.0]]]), torch.tensor([4, 2]))
    table = found.to_pandas()
    likelihood = [math.log((math.exp(-3) + math.exp(-5)) / 2), -2.0]
    assert table["log_likelihood"].tolist() == pytest.approx(likelihood) and table["tokens"].tolist() == [4, 2]
    assert table["perplexity"].tolist() == pytest.approx([math.exp(-likelihood[0] / 4), math.exp(1)])
    assert table["deviation"].tolist() == [1.0, 0.0]
    one = SequencePrediction(found.outputs[:1], found.labels).to_pandas()
    assert one["deviation"].tolist() == [0.0, 0.0]  # and not a number that is none
