from __future__ import annotations

import math

import pytest
from scenarios import tiny_program, tiny_rows

import bayeslora as bl
from bayeslora.diagnostics.guide import khat_by_block, layer_blocks
from bayeslora.errors import SettingError
from bayeslora.inference.presets import PRESETS, over, preset


def test_the_published_setting_of_bayesian_lora() -> None:
    preset = bl.preset("bayesian-lora")
    program = tiny_program(preset.build_model(), rank=8)
    sites = program.sites
    deviations = {site.name: program.model.sigma0(site) for site in sites if site.stacked}
    # 0.1 / sqrt(inputs) in either matrix; LoRA draws A, whose root mean square over 128 entries is 4 % off at most.
    assert float(deviations["linear_16x16.A"].mean()) == pytest.approx(0.1 / math.sqrt(16), rel=0.04)
    backend = preset.build_backend(epochs=1, log_every=1, cpu=True)
    posterior = bl.fit(program, tiny_rows(12), backend, progress=False)
    assert len(posterior.predict(tiny_rows(2), preset.draws, progress=False).logits) == 4
    guide = posterior.guide.parts[0].parts[0]
    assert guide.inducing_mean.shape[1:] == (9, 8) and guide.flow.net.first.shape[1] == 16
    scales = posterior.noise_scales()
    assert len(scales) == 2 * len(deviations)  # of A and B
    for value in scales.values():
        assert float(value.log().mean()) == pytest.approx(math.log(1e-3), abs=1e-2)  # two steps from its start
    # 0.1 / (batches an epoch) times the divergence beside a mean loss: of 12 rows in 2 batches, 0.6 / 12.
    assert posterior.record.temperature / len(tiny_rows(12)) == pytest.approx(0.1 / 2)


def test_the_divergence_of_bayesian_lora_counts_from_the_third_of_its_six_epochs_on() -> None:
    preset = bl.preset("bayesian-lora")
    program = tiny_program(preset.build_model(), targets=["query"])
    posterior = bl.fit(program, tiny_rows(12), preset.build_backend(log_every=1, cpu=True), progress=False)
    weights = [entry["kl_weight"] for entry in posterior.record.history if "loss" in entry]
    assert weights == [0.0] * 4 + [0.6] * 8  # of two batches an epoch


@pytest.mark.parametrize("flow", [None, 16])
def test_it_has_a_k_hat(flow: int | None) -> None:
    preset, rows = bl.preset("bayesian-lora"), tiny_rows(12)
    program = tiny_program(preset.build_model(), targets=["query"])
    block, found = {"last": layer_blocks(program).popitem()[1]}, []
    # Noise as small as published is far from the posterior; as wide as the prior, which 12 rows hardly narrow, it is
    # not.
    for width in (1e-3, 1.0):
        guide = {"flow": flow, "sd": width, "lam": width, "explained": 0.9}
        backend = preset.build_backend(epochs=1, cpu=True, guide_settings=guide)
        posterior = bl.fit(program, rows, backend, progress=False)
        found.append(khat_by_block(posterior, rows, 50, blocks=block, progress=False)["last"])
    assert found[1] < 0.7 < found[0]


def test_what_is_said_goes_over_a_preset() -> None:
    preset = bl.preset("bayesian-lora")
    backend = preset.build_backend(temperature=1, guide_settings={"flow": "none", "bound": "augmented"})
    assert backend.temperature == 1.0 and backend.batch_size == 6
    assert backend.guide_settings == {
        "m": 9, "sd": 1e-3, "lam": 1e-3, "explained": 0.999, "bound": "augmented", "flow": None,
    }  # fmt: skip
    assert preset.build_model(sites="B").sites == "B"
    with pytest.raises(SettingError, match="Unknown setting of inducing 'n'"):
        preset.build_backend(guide_settings={"n": 1})


def test_settings_of_one_guide_are_none_of_another() -> None:
    own = {"guide": "a", "guide_settings": {"x": 1, "y": 2}, "epochs": 3}
    assert over(own, {}) == own
    assert over(own, {"guide": "a", "guide_settings": {"x": 4}}) == own | {"guide_settings": {"x": 4, "y": 2}}
    assert over(own, {"guide": "b"}) == {"guide": "b", "guide_settings": {}, "epochs": 3}
    assert over(own, {"guide": "b", "guide_settings": {"z": 1}})["guide_settings"] == {"z": 1}
    assert over({"epochs": 3}, {"guide": "b", "guide_settings": {"z": 1}})["guide_settings"] == {"z": 1}


def test_no_preset_has_a_temperature_of_predictions_since_none_was_published_so() -> None:
    of_svi = [PRESETS[name].build_backend() for name in PRESETS if PRESETS[name].backend == "svi"]
    assert [each.heldout_size for each in of_svi] == [0, 0, 0]
    # Second moments are AdamW's own, too.
    assert [each.beta2 for each in of_svi] == [0.999] * 3


def test_no_preset_learns_its_prior_mean_since_none_was_published_so() -> None:
    of_svi = [preset(name) for name in PRESETS if preset(name).backend == "svi"]
    assert len(of_svi) == 3
    assert all(each.build_backend().prior_mean == "model" for each in of_svi)
