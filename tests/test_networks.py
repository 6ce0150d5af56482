"""Base networks: how they are padded, how long a text may be, their settings, classes and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from scenarios import SPEC, VOCABULARY, saved_base, text_program, text_rows, tiny_bert
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    MambaConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
)  # fmt: skip

from bayeslora.app.config import read_config
from bayeslora.app.resolving import resolve
from bayeslora.app.runs import build_program
from bayeslora.errors import AdapterError, DataError, SettingError
from bayeslora.inference import fit, load
from bayeslora.models import Gaussian
from bayeslora.networks import NetworkSettings, load_base
from bayeslora.observations import Choices, Classes, Encoder, of_task
from bayeslora.positions import numbered_from_mask, positions
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.tasks import Split, Task, TaskSpec

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 6, "progress": False, "cpu": True}


def logits(posterior: Posterior, **settings: Any) -> torch.Tensor:
    return posterior.predict(text_rows(), 2, progress=False, **settings).outputs


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

    def test_sides_that_were_set_later_come_back(self, tmp_path: Path) -> None:
        program = text_program(saved_base(tmp_path / "base"))
        tokenizer = program.encoder.tokenizer
        tokenizer.padding_side = tokenizer.truncation_side = "left"
        program.encoder = Encoder(tokenizer, SPEC, 16)
        posterior = fit(program, text_rows(), "mle", **QUICK)
        posterior.save(tmp_path / "saved")
        loaded = load(tmp_path / "saved")
        assert loaded.program.encoder.tokenizer.truncation_side == "left"
        assert loaded.program.padding == program.padding and program.padding.side == "left"
        assert torch.equal(logits(loaded), logits(posterior))

    def test_rows_that_are_padded_already_may_name_another_token(self) -> None:
        network = get_peft_model(gpt2(pad_token_id=0), LoraConfig(r=2, target_modules=["c_attn"]))
        program = Program(network, Classes(3), Gaussian())
        plain = {"input_ids": [[3, 4, 5, 6], [8, 2]], "attention_mask": [[1] * 4, [1] * 2], "labels": [0, 1]}
        padded = {**plain, "input_ids": [[3, 4, 5, 6], [8, 2, 7, 7]], "attention_mask": [[1] * 4, [1, 1, 0, 0]]}
        posterior = fit(program, Dataset.from_dict(plain), "mle", **QUICK)
        one, two = (posterior.predict(Dataset.from_dict(each), progress=False).outputs for each in (plain, padded))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)

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

    def test_a_base_is_found_from_another_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        saved_base(tmp_path / "base")
        monkeypatch.chdir(tmp_path)
        posterior = fit(text_program(Path("base")), text_rows(), "mle", **QUICK)
        posterior.save("saved")
        monkeypatch.chdir("/")
        assert torch.equal(logits(load(tmp_path / "saved")), logits(posterior))

    def test_settings_of_a_run_are_those_of_its_network(self, tmp_path: Path) -> None:
        flags = {"base": str(saved_base(tmp_path)), "task": "demo"}
        config = resolve(read_config(None, flags, ["network.dtype=bfloat16", "network.attention=eager"]))
        program = build_program(config, Task(SPEC, text_rows()))
        assert program.base == NetworkSettings(str(tmp_path), "bfloat16", attention="eager")
        assert next(program.network.parameters()).dtype == torch.bfloat16

    def test_a_type_that_torch_lacks_is_refused(self) -> None:
        with pytest.raises(SettingError, match="dtype is 'float33', expected one of torch's"):
            NetworkSettings("demo", "float33")

    @pytest.mark.parametrize("bits", ["4bit", "8bit"])
    def test_quantisation_is_by_bitsandbytes(self, monkeypatch: pytest.MonkeyPatch, bits: Any) -> None:
        monkeypatch.setattr("transformers.utils.quantization_config.BitsAndBytesConfig.post_init", lambda config: None)
        found = NetworkSettings("demo", "bfloat16", quantisation=bits).arguments()["quantization_config"]
        assert (found.load_in_4bit, found.load_in_8bit) == (bits == "4bit", bits == "8bit")
        assert found.bnb_4bit_compute_dtype == torch.bfloat16

    def test_a_quantisation_that_there_is_not_is_refused(self) -> None:
        wrong: Any = "2bit"
        with pytest.raises(SettingError, match="quantisation should be '4bit' or '8bit', found '2bit'"):
            NetworkSettings("demo", quantisation=wrong)


class TestClasses:
    """What a network's outputs mean is said by it, not by the first rows of a file."""

    OTHER = ("more", "none", "one")

    def named_base(self, folder: Path) -> Path:
        saved_base(folder)
        network = tiny_bert()
        network.config.id2label = dict(enumerate(self.OTHER))
        network.save_pretrained(folder)
        return folder

    def test_the_classes_of_a_trained_head_keep_their_numbers(self, tmp_path: Path) -> None:
        base = self.named_base(tmp_path / "base")
        program = text_program(base)
        assert program.encoder.labels == self.OTHER and program.encoder.spec.labels == SPEC.labels
        posterior = fit(program, text_rows(), "mle", **(QUICK | {"learning_rate": 1e-12}))
        posterior.save(tmp_path / "saved")
        for each in (posterior, load(tmp_path / "saved")):
            found = each.predict(text_rows(), progress=False)
            assert found.label_names == self.OTHER
            names = [found.label_names[number] for number in found.labels]
            assert names == [SPEC.labels[number] for number in text_rows().labels()]
        plain = AutoModelForSequenceClassification.from_pretrained(base).eval()
        batch = AutoTokenizer.from_pretrained(base)(
            list(text_rows().dataset["text"]), padding=True, return_tensors="pt"
        )
        torch.testing.assert_close(found.outputs[0], plain(**batch).logits, rtol=0, atol=1e-5)

    def test_a_run_is_gone_on_with_in_its_own_classes(self, tmp_path: Path) -> None:
        first = fit(text_program(saved_base(tmp_path / "base")), text_rows(), "map", **(QUICK | {"epochs": 30}))
        first.save(tmp_path / "run")
        spec = replace(SPEC, labels=self.OTHER)
        names = [SPEC.labels[number] for number in text_rows().labels()]
        rows = Split(Dataset.from_dict({"text": text_rows().dataset["text"], "label": names}), spec)
        program = Program.from_pretrained(
            tmp_path / "base", Task(spec, rows), adapter=tmp_path / "run", model=Gaussian(centre="zero"), max_length=16
        )
        second = fit(program, rows, "laplace", mode="given", tune="none", progress=False, cpu=True)
        one, two = first.predict(text_rows(), method="mean"), second.predict(rows, method="mean")
        assert two.label_names == SPEC.labels and torch.equal(one.labels, two.labels)
        torch.testing.assert_close(one.outputs, two.outputs)

    def test_an_adapter_for_other_classes_is_refused_by_both_names(self, tmp_path: Path) -> None:
        fit(text_program(saved_base(tmp_path / "base")), text_rows(), "map", **QUICK).save(tmp_path / "run")
        spec = replace(SPEC, labels=("a", "b", "c"))
        task = Task(spec, replace(text_rows(), spec=spec))
        with pytest.raises(AdapterError, match=r"\(none, one, more\), and task 'counting' has \(a, b, c\)"):
            Program.from_pretrained(tmp_path / "base", task, adapter=tmp_path / "run")

    def test_an_adapter_whose_configuration_is_damaged_is_named(self, tmp_path: Path) -> None:
        fit(text_program(saved_base(tmp_path / "base")), text_rows(), "map", **QUICK).save(tmp_path / "run")
        (tmp_path / "run" / "config.json").write_text("{")
        with pytest.raises(AdapterError, match="configuration in '.*run' cannot be read: .*config.json"):
            Program.from_pretrained(tmp_path / "base", Task(SPEC, text_rows()), adapter=tmp_path / "run")

    def test_a_head_for_other_classes_is_taken_as_it_is_and_said(self, tmp_path: Path) -> None:
        spec = replace(SPEC, labels=("a", "b", "c"))
        task = Task(spec, replace(text_rows(), spec=spec))
        with pytest.warns(UserWarning, match=r"is for \(more, none, one\).*for \(a, b, c\)"):
            assert Program.from_pretrained(self.named_base(tmp_path), task).encoder.labels == ("a", "b", "c")


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
        with pytest.raises(AdapterError, match=r"no MultipleChoice for .* \(gpt2\), which the observation"):
            load_base(NetworkSettings(str(tmp_path)), of_task(spec), spec)

    def test_a_head_of_another_size_is_replaced_and_said(self, tmp_path: Path) -> None:
        saved_base(tmp_path)
        spec = replace(SPEC, labels=("a", "b"))
        with pytest.warns(UserWarning, match="a head of another size .*classifier.weight.* drawn at random"):
            program = Program.from_pretrained(tmp_path, Task(spec, replace(text_rows(), spec=spec)), max_length=16)
        assert program.network.get_parameter("base_model.model.classifier.original_module.weight").shape == (2, 16)

    def test_an_encoder_does_not_go_on_with_a_text(self, tmp_path: Path) -> None:
        spec = TaskSpec("pairs", "completion", ("prompt",), completion=" {completion}")
        with pytest.raises(
            AdapterError, match="is a BertForSequenceClassification, and .* needs a causal language mod"
        ):
            load_base(NetworkSettings(str(saved_base(tmp_path))), of_task(spec), spec)

    def test_choices_are_of_encoders(self, tmp_path: Path) -> None:
        spec = TaskSpec("quiz", "multiple-choice", ("question",), "answer", ("A", "B"), choices=("choices",))
        found = load_base(NetworkSettings(str(saved_base(tmp_path))), Choices(2), spec)
        assert "classifier.weight" in found.drawn

    def test_a_folder_that_is_no_network_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match=f"base network '{tmp_path}' cannot be loaded"):
            Program.from_pretrained(tmp_path, Task(SPEC, text_rows()))

    def test_files_that_were_not_copied_to_their_end_are_named(self, tmp_path: Path) -> None:
        program = text_program(saved_base(tmp_path / "base"))
        program.network.save_pretrained(tmp_path / "adapter")
        cut = tmp_path / "adapter" / "adapter_model.safetensors"
        cut.write_bytes(cut.read_bytes()[:-8])
        with pytest.raises(AdapterError, match="adapter' does not fit .*: Error while deserializing"):
            text_program(tmp_path / "base", adapter=tmp_path / "adapter")
        cut = tmp_path / "base" / "model.safetensors"
        cut.write_bytes(cut.read_bytes()[:-8])
        with pytest.raises(AdapterError, match="base' cannot be loaded: Error while deserializing"):
            text_program(tmp_path / "base")

    def test_a_network_without_a_head_for_classes_is_named(self, tmp_path: Path) -> None:
        saved_base(tmp_path)
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
        with pytest.raises(AdapterError, match=r"no SequenceClassification for .* \(mamba\)"):
            Program.from_pretrained(tmp_path, Task(SPEC, text_rows()))

    def test_files_that_do_not_fit_their_configuration_are_no_head(self, tmp_path: Path) -> None:
        saved_base(tmp_path)
        BertConfig.from_pretrained(tmp_path, intermediate_size=25).save_pretrained(tmp_path)
        with pytest.raises(AdapterError, match="do not fit its configuration: 'bert.encoder.layer.0.intermediate"):
            Program.from_pretrained(tmp_path, Task(SPEC, text_rows()))

    def test_tokens_that_the_network_does_not_know_are_refused_before_training(self, tmp_path: Path) -> None:
        program = text_program(saved_base(tmp_path))
        rows = Dataset.from_dict({"input_ids": [[3, 4], [VOCABULARY]], "labels": [0, 1]})
        with pytest.raises(DataError, match="token ids from 3 to 40, and the network knows those from 0 to 39"):
            fit(program, rows, "mle", **QUICK)

    def test_rows_with_more_tokens_than_the_network_has_places_for_are_refused_before_training(
        self, tmp_path: Path
    ) -> None:
        program = text_program(saved_base(tmp_path))
        rows = Dataset.from_dict({"input_ids": [[3] * 32, [3] * 33], "labels": [0, 1]})
        with pytest.raises(DataError, match="Row 1 has 33 tokens, and the network has positions for 32"):
            fit(program, rows, "mle", **QUICK)
        fit(program, rows.select([0]), "mle", **QUICK)
