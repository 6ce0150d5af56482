"""Makes the encoder that ships in bayeslora/demo/encoder: a BERT of 0.2 million weights, pretrained on generated reviews.

    OMP_NUM_THREADS=1 python scripts/make_demo.py

takes about four minutes on one core, downloads nothing and is seeded. It learns to fill in masked words
and to tell which of fifteen sentences comes next (a verdict on what was reviewed); the latter trains BERT's pooler. The figures that it prints are those of
bayeslora/demo/README.md; copy them there if they change.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForPreTraining, BertTokenizer

from bayeslora.demo.lexicon import VERDICTS
from bayeslora.demo.text import corpus

TRAIN_SEED, HELDOUT_SEED = 100, 101
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
Batch = dict[str, Tensor]


def make_tokenizer(vocabulary: int) -> BertTokenizer:
    """A lower-casing word-piece tokenizer, learned on the pretraining text."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789'!?")
    )
    pieces.train_from_iterator((f"{text} {VERDICTS[verdict][0]}" for text, verdict in corpus(20_000, TRAIN_SEED)), trainer)
    special = [(token, pieces.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return BertTokenizer(vocab=pieces.get_vocab(), model_max_length=64)


def batches(tokenizer: BertTokenizer, documents: int, size: int, seed: int) -> Iterator[Batch]:
    """Batches of reviews with masked words ("labels") and the index of the sentence that follows ("next")."""
    generator = torch.Generator().manual_seed(seed)
    text = list(corpus(documents, seed))
    pool = 16 * size
    for start in range(0, documents - pool + 1, pool):
        alike = sorted(text[start : start + pool], key=lambda document: document[0].count(" "))  # saves padding
        for part in torch.randperm(16, generator=generator).tolist():
            reviews, verdicts = zip(*alike[part * size : (part + 1) * size], strict=True)
            batch = dict(tokenizer(list(reviews), padding=True, return_tensors="pt"))
            yield mask_words(batch, tokenizer, generator) | {"next": torch.tensor(verdicts)}


def mask_words(batch: Batch, tokenizer: BertTokenizer, generator: torch.Generator, share: float = 0.2) -> Batch:
    """Hides a share of the words; of these 80 % become [MASK], 10 % a random word, 10 % stay (Devlin et al. 2019)."""
    words = batch["input_ids"]
    chosen = (torch.rand(words.shape, generator=generator) < share) & (words >= len(SPECIAL))
    action = torch.rand(words.shape, generator=generator)
    replacement = torch.randint(len(SPECIAL), len(tokenizer), words.shape, generator=generator)
    batch["labels"] = words.masked_fill(~chosen, -100)
    hidden = words.masked_fill(chosen & (action < 0.8), tokenizer.mask_token_id)
    batch["input_ids"] = torch.where(chosen & (action >= 0.9), replacement, hidden)
    return batch


def losses(network: BertForPreTraining, batch: Batch) -> dict[str, Tensor]:
    """Mean log-loss and accuracy of both objectives; word logits are computed for the masked words alone."""
    hidden, pooled = network.bert(batch["input_ids"], batch["attention_mask"], return_dict=False)
    chosen = batch["labels"] != -100
    words, following = network.cls.predictions(hidden[chosen]), network.cls.seq_relationship(pooled)
    return {
        "masked_word_loss": cross_entropy(words, batch["labels"][chosen]),
        "masked_word_accuracy": (words.argmax(-1) == batch["labels"][chosen]).float().mean(),
        "next_sentence_loss": cross_entropy(following, batch["next"]),
        "next_sentence_accuracy": (following.argmax(-1) == batch["next"]).float().mean(),
    }


def pretrain(network: BertForPreTraining, tokenizer: BertTokenizer, documents: int, size: int, rate: float) -> None:
    """One pass over fresh documents with AdamW, a tenth of warm-up and a linear decay."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)
    steps = documents // (16 * size) * 16
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    started = time.perf_counter()
    network.train()
    for step, batch in enumerate(batches(tokenizer, documents, size, TRAIN_SEED)):
        measured = losses(network, batch)
        (measured["masked_word_loss"] + measured["next_sentence_loss"]).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0:
            figures = "  ".join(f"{name} {value.item():.3f}" for name, value in measured.items())
            print(f"step {step:5d} of {steps}  {figures}  {time.perf_counter() - started:.0f} s", flush=True)


@torch.no_grad()
def evaluate(network: BertForPreTraining, tokenizer: BertTokenizer, documents: int = 6_400) -> dict[str, float]:
    """The figures of `losses` on text of another seed."""
    network.eval()
    figures = [losses(network, batch) for batch in batches(tokenizer, documents, 128, HELDOUT_SEED)]
    return {name: sum(part[name].item() for part in figures) / len(figures) for name in figures[0]}


def save(network: BertForPreTraining, tokenizer: BertTokenizer, folder: Path) -> None:
    """Saves the encoder without its pretraining heads, in float32."""
    network.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:9,d}  {path.name}")


def main() -> None:
    """Trains, measures and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "bayeslora" / "demo" / "encoder"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=600)
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = make_tokenizer(options.vocabulary)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        intermediate_size=4 * options.width,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    network = BertForPreTraining(config)
    network.cls.seq_relationship = nn.Linear(options.width, len(VERDICTS))
    print(f"{sum(weight.numel() for weight in network.bert.parameters()):,} weights, {len(tokenizer)} word pieces")
    pretrain(network, tokenizer, options.documents, options.batch_size, options.learning_rate)
    print(json.dumps(evaluate(network, tokenizer), indent=2))
    save(network, tokenizer, options.output)


if __name__ == "__main__":
    main()
