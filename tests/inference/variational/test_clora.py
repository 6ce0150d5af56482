"""C-LoRA: noise of each row that depends on the input, and what a posterior is not that has it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scenarios import saved_base, text_program, text_rows, tiny_batch, tiny_choices, tiny_program, tiny_rows

from bayeslora.diagnostics import khat_by_block, loo
from bayeslora.errors import AdapterError, PosteriorError, SettingError
from bayeslora.inference import fit, load
from bayeslora.inference.training import trainer
from bayeslora.inference.variational.clora import CLoRALoss, CLoRAPosterior
from bayeslora.inference.variational.contextual import ContextGuide, Contextual, SiteNets, linear_sites, standard_noise
from bayeslora.models import Gaussian
from bayeslora.models.guides.auto import make_guide
from bayeslora.observations import Choices
from bayeslora.passes import Rows, undisturbed
from bayeslora.program import Program
from bayeslora.rng import isolated

QUICK = {"backend": "c-lora", "epochs": 2, "batch_size": 5, "log_every": 1, "progress": False}


@pytest.fixture(scope="module")
def posterior() -> CLoRAPosterior:
    return fit(tiny_program(Gaussian()), tiny_rows(12), **QUICK)


def functions(posterior: CLoRAPosterior, batch: Any, rows: list[int], noisy: bool = True) -> tuple[Any, Any, Any]:
    """A site of matrices A, its noise, and the functions that stand for its layers."""
    program = posterior.program
    sites = linear_sites(program)
    noise = standard_noise(sites, rows, seed=3, draw=0)
    values = Contextual(sites, posterior.guide, noise if noisy else None)(posterior.mean(), batch)
    return sites[0], noise[sites[0].name], values[sites[0].name]


def test_what_stands_between_has_the_moments_that_the_networks_say() -> None:
    """Over many rows of the same tokens, E(x) A x has mean m A x and the deviation of independent entries."""
    posterior = fit(tiny_program(Gaussian()), tiny_rows(12), **QUICK)
    count = 4000
    batch = {"input_ids": torch.ones(count, 1)}
    site, _, (layer, *_) = functions(posterior, batch, list(range(count)))
    inputs = torch.randn(1, 1, site.initial.shape[1], generator=torch.Generator().manual_seed(0))
    nets: Any = posterior.guide.nets[site.name.replace(".", "/")]
    reduced = (inputs @ posterior.mean()[site.name][0]).squeeze()
    with torch.no_grad():
        nets.second.normal_(generator=torch.Generator().manual_seed(1))
        mean, deviation = nets.moments(0, reduced)
        found = layer(inputs.expand(count, 1, -1)).squeeze(1)
    spread = (deviation.square() @ reduced.square()).sqrt()
    # 4,000 independent rows: standard errors of 1/63 of the spread, and 1/89 of it in itself.
    assert ((found.mean(0) - mean @ reduced) / spread).abs().max() < 4 / 63
    torch.testing.assert_close(found.std(0) / spread, torch.ones(len(spread)), rtol=0, atol=4 / 89)


def test_rows_have_noise_of_their_own_and_equal_tokens_of_a_row_the_same(posterior: CLoRAPosterior) -> None:
    batch = {"input_ids": torch.ones(2, 3)}
    site, noise, layers = functions(posterior, batch, [0, 1])
    inputs = torch.randn(1, 1, site.initial.shape[1]).expand(2, 3, -1)
    with torch.no_grad():
        found = layers[0](inputs)
        torch.testing.assert_close(found[:, 1], found[:, 0])
        torch.testing.assert_close(found[:, 2], found[:, 0])
        assert not torch.allclose(found[0], found[1])
    if len(layers) > 1:
        assert not torch.allclose(noise[0], noise[1])  # and layers
    with torch.no_grad():
        still = functions(posterior, batch, [0, 1], noisy=False)[2][0](inputs)
    torch.testing.assert_close(still[0], still[1])


def test_without_noise_and_at_the_identity_it_is_plain_lora(posterior: CLoRAPosterior) -> None:
    program, rows = posterior.program, tiny_rows(5)
    fresh = CLoRAPosterior(program, posterior.record, posterior.guide)
    before = {name: value.clone() for name, value in fresh.guide.nets.state_dict().items()}
    with torch.no_grad(), undisturbed(program):
        plain = Rows.of(program, rows).outputs(program, posterior.mean())
    assert not torch.allclose(fresh.predict(rows, method="mean", progress=False).outputs[0], plain, atol=1e-4)
    for site in linear_sites(program):
        nets: Any = fresh.guide.nets[site.name.replace(".", "/")]
        nets.load_state_dict(SiteNets(site, 64, 0.2).state_dict())
    try:
        found = fresh.predict(rows, method="mean", progress=False).outputs
        torch.testing.assert_close(found[0], plain, rtol=1e-4, atol=1e-5)
        noisy = fresh.predict(rows, draws=2, progress=False).outputs
        assert found.shape[0] == 1 and noisy.shape[0] == 2 and not torch.allclose(noisy[0], noisy[1])
    finally:
        fresh.guide.nets.load_state_dict(before)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_noise_is_a_rows_own_whatever_the_batch(posterior: CLoRAPosterior, batch_size: int) -> None:
    rows = tiny_rows(9)
    whole = posterior.predict(rows, draws=3, seed=2, progress=False).outputs
    parts = posterior.predict(rows, draws=3, seed=2, progress=False, batch_size=batch_size).outputs
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)  # sums in another order
    torch.testing.assert_close(posterior.predict(rows, draws=2, seed=2, progress=False).outputs, whole[:2])
    assert not torch.allclose(posterior.predict(rows, draws=3, seed=1, progress=False).outputs, whole)


def test_choices_that_a_row_lacks_are_no_part_of_the_loss() -> None:
    found = []
    for most in (2, 5):
        with isolated(0, torch.device("cpu")):
            program = tiny_choices(Gaussian())
            program.observation = Choices(most)
            sites = linear_sites(program)
            guide = ContextGuide(make_guide("delta", program.model, program.sites), sites, 4, 0.2)
            for nets in guide.nets.children():
                nets.second.data.normal_()  # without it the divergence is the same for all tokens
            rows = Dataset.from_dict({"input_ids": [[[5, 6, 7], [8, 9]], [[1, 2], [3, 4, 5]]], "labels": [0, 1]})
            loss = CLoRALoss(program, guide, 2, 1.0)
            found.append(float(loss(tiny_batch(program, rows)).detach()))
            assert loss.parts()["kl/noise"] > 1
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_choices_of_a_row_share_its_noise() -> None:
    program = tiny_choices(Gaussian())
    sites = linear_sites(program)
    batch = {"input_ids": torch.ones(2, 3, 4)}
    nets = {site.name.replace(".", "/"): SiteNets(site, 4, 0.2) for site in sites}
    guide: Any = type("Nets", (), {"nets": nets})
    weights = {site.name: site.initial for site in program.sites}
    layer: Any = Contextual(sites, guide, standard_noise(sites, [0, 1], 0, 0))(weights, batch)[sites[0].name][0]
    inputs = torch.randn(1, 1, sites[0].initial.shape[1]).expand(6, 4, -1)
    with torch.no_grad():
        found = layer(inputs)
    torch.testing.assert_close(found[:3], found[:1].expand(3, -1, -1))
    assert not torch.allclose(found[0], found[3])
    with pytest.raises(AdapterError, match="a batch has 6 sequences: whose they are is not known"):
        layer(inputs.flatten(0, 1))


def test_the_divergence_is_that_of_the_entries_over_the_tokens_that_there_are() -> None:
    program = tiny_program(Gaussian())
    sites = linear_sites(program)
    nets: Any = SiteNets(sites[0], 4, 0.3)
    with torch.no_grad():
        nets.second.normal_()
        reduced = torch.randn(2, 3, sites[0].initial.shape[-1])
        mean, deviation = nets.moments(0, reduced)
        assert (deviation < 1).all()
        q, p = torch.distributions.Normal(mean, deviation), torch.distributions.Normal(torch.eye(mean.shape[-1]), 0.3)
        exact = torch.distributions.kl_divergence(q, p).sum((-2, -1))
        torch.testing.assert_close(nets.divergence(mean, deviation), exact)
    guide: Any = type("Nets", (), {"nets": {site.name.replace(".", "/"): nets for site in sites[:1]}})
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    contextual = Contextual(sites[:1], guide, None, mask.bool())
    batch = {"input_ids": torch.ones(2, 3)}
    eye = torch.eye(reduced.shape[-1]).expand(len(sites[0].layers), -1, -1)
    layer: Any = contextual({sites[0].name: eye}, batch)[sites[0].name][0]
    layer(reduced)
    torch.testing.assert_close(contextual.divergences[0], exact[mask.bool()].mean())
    layer(reduced[:, :1])  # of a head that sees a vector of each sequence
    torch.testing.assert_close(contextual.divergences[1], exact[:, 0].mean())


def test_networks_and_weights_learn_by_the_loss_and_the_divergence() -> None:
    def moved(**settings: Any) -> tuple[CLoRAPosterior, float]:
        found = fit(tiny_program(Gaussian()), tiny_rows(12), **QUICK | settings)
        nets: Any = next(iter(found.guide.nets.values()))
        return found, float(nets.second.detach().square().mean().sqrt())

    found, free = moved(temperature=1e-6, epochs=6)
    _, held = moved(temperature=1e3, epochs=6)
    assert 0 < held < free / 2
    history = [entry for entry in found.record.history if "loss" in entry]
    assert all("kl/noise" in entry and "log_likelihood" in entry for entry in history)
    assert found.cost["extra_parameters"] == sum(value.numel() for value in found.guide.nets.parameters())
    assert not any(torch.equal(found.mean()[site.name], site.initial) for site in found.program.sites)


def test_what_is_of_weights_is_refused_and_the_rest_is_given(posterior: CLoRAPosterior) -> None:
    rows = tiny_rows(12)
    for ask in (lambda: posterior.sample(2), lambda: posterior.log_prob(posterior.mean())):
        with pytest.raises(PosteriorError, match="'c-lora' is noise that depends on the input, not a distribution"):
            ask()
    assert not posterior.dense
    with pytest.raises(PosteriorError, match="k-hat by block needs a posterior with a density"):
        khat_by_block(posterior, rows, progress=False)
    with pytest.raises(PosteriorError, match="'c-lora' is not a distribution over weights"):
        posterior.generate("w1")
    data = posterior.to_inference_data(rows, draws=30, progress=False)
    assert data.attrs["draws_are"] == "passes of the network"
    assert data["log_likelihood"]["y"].shape == (1, 30, 12)
    with pytest.raises(PosteriorError, match="predicts otherwise than by draws of its weights"):
        loo(data)
    assert posterior.predict(rows, progress=False).metrics(intervals=False)["nll"].value > 0


def test_networks_are_saved_and_read_and_a_resumed_fit_is_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_base(tmp_path / "base", dropout=0.1)
    data = text_rows(12)

    def fitted(**settings: Any) -> CLoRAPosterior:
        return fit(text_program(tmp_path / "base", Gaussian()), data, **QUICK, **settings)

    whole = fitted()
    with monkeypatch.context() as patched:
        end = trainer._Steps.on_step_end

        def hooked(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            end(self, args, state, control, **kwargs)

        patched.setattr(trainer._Steps, "on_step_end", hooked)
        with pytest.raises(KeyboardInterrupt):
            fitted(output_dir=tmp_path / "run")
    resumed = fitted(output_dir=tmp_path / "run", resume=True)
    for found in (resumed, load(tmp_path / "run")):
        assert type(found) is CLoRAPosterior
        assert found.state().keys() == whole.state().keys() and any(".second" in name for name in found.state())
        assert all(torch.equal(value, whole.state()[name]) for name, value in found.state().items())
        outputs = [each.predict(data, draws=2, progress=False).outputs for each in (whole, found)]
        assert torch.equal(*outputs)
    with pytest.raises(PosteriorError, match="do not fit the guide 'c-lora'"):
        CLoRAPosterior.from_state(whole.program, whole.record, {})


def test_layers_of_another_sort_are_refused() -> None:
    config = LoraConfig(r=2, target_modules=["word_embeddings"], task_type="SEQ_CLS")
    network = get_peft_model(tiny_program().weights.base, config)
    program = Program(network, tiny_program().observation, Gaussian())
    with pytest.raises(SettingError, match="word_embeddings' is none, or does more"):
        fit(program, tiny_rows(4), **QUICK)
