"""What tells one program's network from another's, and what a posterior keeps because no file of the base has it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scenarios import SPEC, saved_base, text_program, text_rows, tiny_bert
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)  # fmt: skip

from bayeslora.errors import PosteriorError
from bayeslora.identity import fingerprint
from bayeslora.inference import fit, load
from bayeslora.models import Gaussian
from bayeslora.observations import Classes, Encoder
from bayeslora.posterior import Posterior
from bayeslora.program import Program
from bayeslora.tasks import Task

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 6, "progress": False, "cpu": True}

#: Frozen weights, one with matrices beside it and one without.
ADAPTED = "base_model.model.bert.encoder.layer.0.output.dense.base_layer.weight"
READ = "base_model.model.bert.embeddings.word_embeddings.weight"


def logits(posterior: Posterior, **settings: Any) -> torch.Tensor:
    return posterior.predict(text_rows(), 2, progress=False, **settings).outputs


def adapted(folder: Path, lora: str) -> Program:
    """A program with all linear layers adapted, of which there is a posterior in the folder ``saved``."""
    base, rows = saved_base(folder / "base"), text_rows()
    program = Program.from_pretrained(base, Task(SPEC, train=rows), lora=lora, model=Gaussian(), max_length=16)
    fit(program, rows, "mle", **QUICK).save(folder / "saved")
    return program


def masked_language_model(folder: Path) -> Path:
    """A base without a pooler or a head, which both are then drawn at random."""
    saved_base(folder)
    config = BertConfig.from_pretrained(folder)
    BertForMaskedLM(config).save_pretrained(folder)
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

    def test_a_network_of_ones_own_keeps_what_its_files_lack(self, tmp_path: Path) -> None:
        base = masked_language_model(tmp_path / "base")
        network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        network = get_peft_model(network, LoraConfig(r=2, target_modules=["query"]))
        program = Program(network, Classes(3), encoder=Encoder(AutoTokenizer.from_pretrained(base), SPEC, 16))
        posterior = fit(program, text_rows(), "mle", **QUICK)
        posterior.save(tmp_path / "saved")
        assert {name.partition(".")[0] for name in program.drawn} == {"bert", "classifier"}
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
        weights["bert.embeddings.word_embeddings.weight"][7, 3] += 1  # one value of all
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
        written = json.loads(path.read_text())
        for name, value, then in (("lora_alpha", 128, "4"), ("use_rslora", True, "False"), ("use_dora", True, "False")):
            path.write_text(json.dumps({**written, name: value}))
            expected = f"adapter_config.json is not what was written \\(then and now\\): {name}: {then} and {value}"
            with pytest.raises(PosteriorError, match=expected):
                load(tmp_path / "saved")

    @pytest.mark.parametrize("changed", [{"use_rslora": True}, {"init_lora_weights": "gaussian"}])
    def test_a_program_whose_adapter_is_made_otherwise_is_another(
        self, tmp_path: Path, changed: dict[str, Any]
    ) -> None:
        def program(**settings: Any) -> Program:
            torch.manual_seed(0)
            return Program(
                get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"], **settings)), Classes(3)
            )

        rows = Dataset.from_dict({"input_ids": [[3, 4], [5]], "labels": [0, 1]})
        fit(program(), rows, "mle", **QUICK).save(tmp_path / "saved")
        with pytest.raises(PosteriorError, match=f"lora.{next(iter(changed))}: "):
            load(tmp_path / "saved", program=program(**changed))

    def test_a_fingerprint_of_a_large_network_is_quick(self, tmp_path: Path) -> None:
        program = text_program(saved_base(tmp_path / "base"))
        embeddings = program.network.get_base_model().bert.embeddings
        # More values than single precision can count.
        embeddings.word_embeddings.weight = nn.Parameter(torch.zeros(30522, 768), requires_grad=False)
        began = time.perf_counter()
        before = fingerprint(program)
        assert time.perf_counter() - began < 0.1
        embeddings.word_embeddings.weight[0] = 1.0
        assert fingerprint(program) != before

    def test_rounding_of_what_the_start_of_an_adapter_left_makes_no_other_network(self, tmp_path: Path) -> None:
        program = adapted(tmp_path, "pissa")
        left = program.network.get_parameter(ADAPTED)
        left.data *= 1 + 1e-6
        load(tmp_path / "saved", program=program)
        with torch.no_grad():  # as of an adapter that was merged
            change = torch.randn(len(left), 2) @ torch.randn(2, left.shape[1])
            left.add_(change * (1e-3 * left.norm() / change.norm()))
        with pytest.raises(PosteriorError, match=f"another program.*: computed.{ADAPTED}: ") as refused:
            load(tmp_path / "saved", program=program)
        assert "torch.set_num_threads" not in str(refused.value)

    @pytest.mark.parametrize(("lora", "name"), [("lora", ADAPTED), ("pissa", READ)])
    def test_each_bit_counts_of_what_is_read_from_a_file(self, tmp_path: Path, lora: str, name: str) -> None:
        program = adapted(tmp_path, lora)
        program.network.get_parameter(name).data *= 1 + 1e-6
        with pytest.raises(PosteriorError, match="another program.*: frozen: "):
            load(tmp_path / "saved", program=program)

    def test_a_digest_of_a_former_version_is_of_all_bits(self, tmp_path: Path) -> None:
        program = adapted(tmp_path, "pissa")
        path = tmp_path / "saved" / "posterior.json"
        record = json.loads(path.read_text())
        del record["program"]["computed"]
        record["program"]["frozen"] = fingerprint(program)
        path.write_text(json.dumps(record))
        load(tmp_path / "saved", program=program)
        program.network.get_parameter(ADAPTED).data *= 1 + 1e-6
        with pytest.raises(PosteriorError, match="another program.*frozen: .*another number of threads"):
            load(tmp_path / "saved", program=program)

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
