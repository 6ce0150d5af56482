"""Base networks: what their files lack, how they are padded, how long a text may be, and what a load verifies."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from scenarios import SPEC, VOCABULARY, saved_base, text_program, text_rows, tiny_bert
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
)  # fmt: skip

from bayeslora.errors import AdapterError, PosteriorError, SettingError
from bayeslora.identity import fingerprint
from bayeslora.inference import fit, load
from bayeslora.models import Gaussian
from bayeslora.networks import NetworkSettings, load_base, numbered_from_mask, positions
from bayeslora.observations import Choices, Classes, of_task
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.tasks import Task, TaskSpec

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 6, "progress": False, "cpu": True}


def logits(posterior: Posterior, **settings: Any) -> torch.Tensor:
    return posterior.predict(text_rows(), 2, progress=False, **settings).outputs


def masked_language_model(folder: Path) -> Path:
    """A base without a pooler or a head, which both are then drawn at random."""
    saved_base(folder)
    config = BertConfig.from_pretrained(folder)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def gpt2(**settings: Any) -> GPT2ForSequenceClassification:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=3, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **settings,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config)


def saved_gpt2(folder: Path, side: str) -> Path:
    saved_base(folder)
    gpt2(pad_token_id=0).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side, truncation_side="left")
    tokenizer.save_pretrained(folder)
    return folder


class TestWhatIsDrawn:
    def test_weights_that_the_base_lacks_are_saved_with_the_posterior(self, tmp_path: Path) -> None:
        base = masked_language_model(tmp_path / "base")
        lora = LoraConfig(r=2, target_modules=["query"])
        program = Program.from_pretrained(base, Task(SPEC, text_rows()), lora=lora, max_length=16)
        assert {name.rpartition(".")[0] for name in program.drawn} == {"bert.pooler.dense"}
        posterior = fit(program, text_rows(), "mle", **QUICK)
        posterior.save(tmp_path / "saved")
        found = [logits(load(tmp_path / "saved")) for _ in range(2)]
        assert torch.equal(found[0], logits(posterior)) and torch.equal(found[0], found[1])
        load(tmp_path / "saved").save(tmp_path / "again")
        assert torch.equal(logits(load(tmp_path / "again")), found[0])

    def test_drawn_weights_that_carry_lora_are_saved_too(self, tmp_path: Path) -> None:
        base = masked_language_model(tmp_path / "base")
        posterior = fit(text_program(base), text_rows(), "map", **QUICK)
        posterior.save(tmp_path / "saved")
        assert torch.equal(logits(load(tmp_path / "saved")), logits(posterior))

    def test_a_network_of_ones_own_with_a_random_head_is_told_from_another(self, tmp_path: Path) -> None:
        def program(seed: int) -> Program:
            torch.manual_seed(seed)
            body = tiny_bert()
            torch.manual_seed(7)
            nn.init.normal_(body.bert.embeddings.word_embeddings.weight)
            return Program(get_peft_model(body, LoraConfig(r=2, target_modules=["query"])), Classes(3), Gaussian())

        rows = Dataset.from_dict({"input_ids": [[3, 4], [5]], "labels": [0, 1]})
        fit(program(0), rows, "mle", **QUICK).save(tmp_path / "saved")
        load(tmp_path / "saved", program=program(0))
        with pytest.raises(PosteriorError, match="another program.*frozen: "):
            load(tmp_path / "saved", program=program(1))


class TestIdentity:
    def test_a_base_with_other_weights_is_refused(self, tmp_path: Path) -> None:
        base = saved_base(tmp_path / "base")
        fit(text_program(base), text_rows(), "mle", **QUICK).save(tmp_path / "saved")
        other = shutil.copytree(base, tmp_path / "other")
        weights = load_file(other / "model.safetensors")
        weights["bert.encoder.layer.1.output.dense.weight"] *= 1.01
        save_file(weights, other / "model.safetensors", {"format": "pt"})
        with pytest.raises(PosteriorError, match=f"'{base}' and now '{other}'.*frozen: "):
            load(tmp_path / "saved", base=other)

    def test_a_configuration_that_gained_a_key_is_no_other_base(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fit(text_program(saved_base(tmp_path / "base")), text_rows(), "mle", **QUICK).save(tmp_path / "saved")
        plain = BertConfig.to_dict
        monkeypatch.setattr(BertConfig, "to_dict", lambda config: plain(config) | {"a_newer_key": 1})
        load(tmp_path / "saved")
        monkeypatch.setattr(BertConfig, "to_dict", lambda config: plain(config) | {"hidden_act": "relu"})
        with pytest.raises(PosteriorError, match="configuration.hidden_act: gelu and relu"):
            load(tmp_path / "saved")

    def test_a_changed_scale_of_the_adapter_is_refused(self, tmp_path: Path) -> None:
        fit(text_program(saved_base(tmp_path / "base")), text_rows(), "mle", **QUICK).save(tmp_path / "saved")
        path = tmp_path / "saved" / "adapter_config.json"
        path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 128'))
        with pytest.raises(PosteriorError, match="adapter_config.json is not what was written"):
            load(tmp_path / "saved")

    def test_the_fingerprint_sees_frozen_weights_alone(self, tmp_path: Path) -> None:
        program = text_program(saved_base(tmp_path / "base"))
        before = fingerprint(program)
        program.weights.write({site.name: site.initial + 1 for site in program.sites})
        program.weights.install({site.name: site.initial - 1 for site in program.sites})
        assert fingerprint(program) == before
        program.weights.restore()
        assert fingerprint(text_program(tmp_path / "base", seed=3)) == before
        with torch.no_grad():
            program.network.get_parameter("base_model.model.bert.encoder.layer.0.output.dense.base_layer.weight").add_(
                1e-3
            )
        assert fingerprint(program) != before


class TestPadding:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_sides_come_back_and_batches_do_not_matter(self, tmp_path: Path, side: str) -> None:
        base = saved_gpt2(tmp_path / "base", side)
        posterior = fit(text_program(base), text_rows(), "mle", **QUICK)
        posterior.save(tmp_path / "saved")
        AutoTokenizer.from_pretrained(base, padding_side="right" if side == "left" else "left").save_pretrained(base)
        loaded = load(tmp_path / "saved")
        tokenizer = loaded.program.encoder.tokenizer
        assert (tokenizer.padding_side, tokenizer.truncation_side) == (side, "left")
        alone = logits(posterior, batch_size=1)
        # The same sums in another order: single precision.
        torch.testing.assert_close(logits(posterior, batch_size=12), alone, rtol=0, atol=1e-5)
        assert torch.equal(logits(loaded, batch_size=1), alone)

    @pytest.mark.parametrize("token", [None, 0, 7])
    def test_tokenised_rows_are_padded_as_the_network_says(self, token: int | None) -> None:
        network = get_peft_model(gpt2(pad_token_id=token), LoraConfig(r=2, target_modules=["c_attn"]))
        program = Program(network, Classes(3), Gaussian())
        rows = Dataset.from_dict({"input_ids": [[3, 4, 5, 6], [8], [9, 3]], "labels": [0, 1, 2]})
        posterior = fit(program, rows, "mle", **QUICK)
        one, all_of_them = (posterior.predict(rows, batch_size=size, progress=False).outputs for size in (1, 3))
        torch.testing.assert_close(one, all_of_them, rtol=0, atol=1e-5)

    def test_positions_are_numbered_where_the_network_would_count_padding(self) -> None:
        roberta = RobertaForSequenceClassification(
            RobertaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        )
        assert numbered_from_mask(gpt2()) and numbered_from_mask(tiny_bert())
        assert not numbered_from_mask(roberta)  # it passes padding by


class TestLimits:
    def test_positions_that_a_network_has_for_tokens(self) -> None:
        def network(config: Any, offset: int | None = None) -> nn.Module:
            module = nn.Module()
            module.config = config
            module.position_embeddings = nn.Embedding(4, 2, padding_idx=offset)
            return module

        assert positions(network(BertConfig(max_position_embeddings=32))) == 32
        assert positions(network(RobertaConfig(max_position_embeddings=514), offset=1)) == 512
        assert positions(network(XLNetConfig())) is None
        assert positions(nn.Module()) is None

    def test_a_long_text_fits_a_network_whose_positions_begin_behind_the_padding(self, tmp_path: Path) -> None:
        saved_base(tmp_path)
        config = RobertaConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=12, pad_token_id=0,
        )  # fmt: skip
        RobertaForSequenceClassification(config).save_pretrained(tmp_path)
        program = Program.from_pretrained(
            tmp_path, Task(SPEC, text_rows()), lora=LoraConfig(r=2, target_modules=["query"])
        )
        assert program.encoder.max_length == 11
        posterior = fit(program, text_rows(), "mle", **QUICK)
        long = replace(text_rows(2), dataset=Dataset.from_dict({"text": [" ".join(["w3"] * 40)] * 2, "label": [0, 1]}))
        assert torch.isfinite(posterior.predict(long, progress=False).outputs).all()


class TestSettings:
    def test_settings_reach_transformers(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        seen: dict[str, Any] = {}
        plain = AutoModelForSequenceClassification.from_pretrained

        def spy(path: str, **arguments: Any) -> Any:
            seen.update(arguments)
            arguments.pop("device_map", None)
            return plain(path, **arguments)

        monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", spy)
        settings = NetworkSettings(str(saved_base(tmp_path)), "bfloat16", attention="eager", device_map="auto")
        base = load_base(settings, Classes(3), SPEC)
        assert (seen["dtype"], seen["attn_implementation"], seen["device_map"]) == (torch.bfloat16, "eager", "auto")
        assert base.network.dtype == torch.bfloat16 and base.network.config._attn_implementation == "eager"

    def test_settings_are_kept_and_used_again(self, tmp_path: Path) -> None:
        settings = NetworkSettings(str(saved_base(tmp_path / "base")), "bfloat16", attention="eager")
        program = Program.from_pretrained(settings, Task(SPEC, text_rows()), max_length=16)
        fit(program, text_rows(), "mle", **QUICK).save(tmp_path / "saved")
        assert load(tmp_path / "saved").program.base == settings

    def test_a_type_that_torch_lacks_is_refused(self) -> None:
        with pytest.raises(SettingError, match="dtype is 'float33', expected one of torch's"):
            NetworkSettings("demo", "float33")


class TestPlainUse:
    def test_a_posterior_folder_tells_plain_transformers_all(self, tmp_path: Path) -> None:
        base = saved_base(tmp_path / "base")
        tiny_bert().half().save_pretrained(base)
        posterior = fit(text_program(base), text_rows(), "mle", **QUICK)
        posterior.save(tmp_path / "saved")
        config = AutoConfig.from_pretrained(tmp_path / "saved")
        assert config.id2label == dict(enumerate(SPEC.labels)) and config.dtype == torch.float32
        plain = AutoModelForSequenceClassification.from_pretrained(base, config=config, dtype=config.dtype)
        adapted = PeftModel.from_pretrained(plain, tmp_path / "saved").eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
        texts = list(text_rows().dataset["text"])
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        mean = posterior.predict(text_rows(), method="mean", progress=False).outputs[0]
        with torch.no_grad():
            torch.testing.assert_close(adapted(**batch).logits, mean, rtol=0, atol=1e-5)
            merged = adapted.merge_and_unload()
            torch.testing.assert_close(merged(**batch).logits, mean, rtol=0, atol=1e-5)
        assert merged.config.id2label == dict(enumerate(SPEC.labels))


class TestRefusals:
    def test_a_decoder_has_no_choices(self, tmp_path: Path) -> None:
        saved_gpt2(tmp_path, "right")
        spec = TaskSpec("quiz", "multiple-choice", ("question",), "answer", ("A", "B"), choices=("choices",))
        with pytest.raises(AdapterError, match=r"no MultipleChoice for .* \(gpt2\), which a task of"):
            load_base(NetworkSettings(str(tmp_path)), of_task(spec), spec)

    def test_a_head_of_another_size_is_replaced_and_said(self, tmp_path: Path) -> None:
        saved_base(tmp_path)
        spec = replace(SPEC, labels=("a", "b"))
        with pytest.warns(UserWarning, match="a head of another size .*classifier.weight.* drawn at random"):
            found = load_base(NetworkSettings(str(tmp_path)), Classes(2), spec)
        assert found.network.classifier.weight.shape == (2, 16) and "classifier.weight" in found.drawn

    def test_choices_are_of_encoders(self, tmp_path: Path) -> None:
        spec = TaskSpec("quiz", "multiple-choice", ("question",), "answer", ("A", "B"), choices=("choices",))
        found = load_base(NetworkSettings(str(saved_base(tmp_path))), Choices(2), spec)
        assert "classifier.weight" in found.drawn
