"""Causal language models that are small enough to know all about: random networks, and tokenizers of every sort."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

#: Positions of each network.
POSITIONS = 128
#: Words that are one token each, with the blank before them; any other text is several.
WORDS = (
    "Question Answer Sentence Choices Passage Review Is this The the a of is it not and what Which which film "
    "positive negative neutral yes no true false Yes No True False good bad great dull sun moon water stone "
    "A B C D E 1 2 3 4 5 none one more"
).split()
#: Turns of a chat as transformers' templates write them.
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>"]
#: Tokens that networks know and tokenizers do not.
SPARE = 2
#: Folders that go with the tests.
KEPT: list[TemporaryDirectory[str]] = []


def byte_tokenizer(bos: bool = False, eos: bool = False) -> Tokenizer:
    """Byte-level pairs, as in GPT-2, Llama 3 and Qwen: " word" is a token other than "word", and nothing is unknown."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL,
    )
    found.train_from_iterator([" ".join(["", *WORDS])] * 3, trainer)
    around = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    found.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(" ".join(around), special_tokens=[("<s>", 1), ("</s>", 2)]),
        ]
    )
    return found


def unigram_tokenizer() -> Tokenizer:
    """Pieces as SentencePiece's in Llama 2: a blank is "▁", and one goes before the first word, too."""
    single = sorted({letter for word in WORDS for letter in word} | set(".,:;?!()'\n-"))
    pieces = [("▁", -6.0), *((f"▁{word}", -3.0) for word in WORDS), *((letter, -8.0) for letter in single)]
    found = Tokenizer(models.Unigram([*((name, 0.0) for name in SPECIAL), *pieces], unk_id=0))
    found.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    found.decoder = decoders.Metaspace(prepend_scheme="always")
    found.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return found


#: Tokenizers by name; all but "bytes" put a token of their own around a text.
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_tokenizer,
    "bytes-bos": lambda: byte_tokenizer(bos=True),
    "bytes-bos-eos": lambda: byte_tokenizer(bos=True, eos=True),
    "unigram": unigram_tokenizer,
}


def tokenizer_of(name: str = "bytes", chat: str | None = None, side: str = "right") -> PreTrainedTokenizerFast:
    """A tokenizer by name, with a chat template or without; ``</s>`` ends texts, and nothing but it can pad them."""
    return PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS[name](),
        bos_token=None if name == "bytes" else "<s>",
        eos_token="</s>",
        unk_token="<unk>" if name == "unigram" else None,
        chat_template=chat,
        padding_side=side,
        model_max_length=10**6,
    )


def configuration(name: str, vocabulary: int) -> PreTrainedConfig:
    """A random network of 16 dimensions, two layers: "llama"; "gpt2", "qwen2" or "bart", whose embeddings are tied."""
    tokens: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    if name == "gpt2":
        return GPT2Config(
            **tokens, n_embd=16, n_layer=2, n_head=2, n_positions=POSITIONS, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    if name == "bart":  # which cannot be told the positions of tokens
        del tokens["initializer_range"]
        return BartConfig(
            **tokens, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=24, pad_token_id=0,
            max_position_embeddings=POSITIONS, init_std=0.3, forced_eos_token_id=None,
        )  # fmt: skip
    made: dict[str, Callable[..., PreTrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    return made[name](
        **tokens,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=name == "qwen2",
    )


def save_causal(
    folder: Path, network: str = "llama", tokenizer: str = "bytes", chat: str | None = None, side: str = "right"
) -> Path:
    """A causal language model and its tokenizer in a folder, as `Program.from_pretrained` loads them.

    Beside "qwen2" transformers reads tokenizers of bytes only.
    """
    read = tokenizer_of(tokenizer, chat, side)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(configuration(network, len(read) + SPARE)).save_pretrained(folder)
    read.save_pretrained(folder)
    return folder


@cache
def causal_base(network: str = "llama", tokenizer: str = "bytes", chat: str | None = None, side: str = "right") -> Path:
    """The folder of `save_causal`, made once and gone with the tests: not to be written into."""
    kept = TemporaryDirectory(prefix="bayeslora_causal_")
    KEPT.append(kept)
    return save_causal(Path(kept.name), network, tokenizer, chat, side)
