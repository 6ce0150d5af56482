"""Makes what bayeslora/demo ships: the rows of its task, and a BERT of 0.15 million weights that has read such reviews.

    OMP_NUM_THREADS=1 nice -n 10 python scripts/demo/make.py         # all of it
    python scripts/demo/make.py --rows                               # the rows alone

It learns to fill in masked words, as BERT does, and to tell which of fifteen sentences comes next (a verdict
on what was reviewed), which trains BERT's pooler. The run is seeded, downloads nothing and takes about three
minutes on one core; it prints the figures that bayeslora/demo/README.md quotes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import torch
from lexicon import VERDICTS
from pyarrow import parquet
from text import corpus, rows
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForPreTraining, BertTokenizer

TRAIN_SEED, HELDOUT_SEED = 100, 101
#: Split: domain, rows, seed of the generator. The seeds are not those of the pretraining text.
SPLITS = {
    "train": ("restaurant", 4_000, 1),
    "validation": ("restaurant", 1_000, 2),
    "test": ("restaurant", 2_000, 3),
    "test_ood": ("hotel", 1_000, 4),
}
BATCH, POOL = 64, 1024
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
Batch = dict[str, Tensor]


def make_tokenizer() -> BertTokenizer:
    """A lower-casing word-piece tokenizer, learned on the pretraining text."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789'!?")
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=letters)
    pieces.train_from_iterator((text for text, _ in corpus(20_000, TRAIN_SEED)), trainer)
    return BertTokenizer(vocab=pieces.get_vocab(), model_max_length=64)


def make_network(vocabulary: int) -> BertForPreTraining:
    """An untrained BERT of 2 layers, 64 units wide, whose second objective is to choose among the verdicts."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    network = BertForPreTraining(config)
    network.cls.seq_relationship = nn.Linear(config.hidden_size, len(VERDICTS))
    return network


def batches(tokenizer: BertTokenizer, documents: int, seed: int) -> Iterator[Batch]:
    """Batches of reviews with masked words ("labels") and the index of the sentence that follows ("next")."""
    generator = torch.Generator().manual_seed(seed)
    text = list(corpus(documents, seed))
    for start in range(0, documents, POOL):
        # Reviews of about the same length share a batch, which saves half of the padding.
        pool = sorted(text[start : start + POOL], key=lambda document: document[0].count(" "))
        for part in torch.randperm(POOL // BATCH, generator=generator).tolist():
            reviews, verdicts = zip(*pool[part * BATCH : (part + 1) * BATCH], strict=True)
            batch = dict(tokenizer(list(reviews), padding=True, return_tensors="pt"))
            yield mask_words(batch, generator, tokenizer) | {"next": torch.tensor(verdicts)}


def mask_words(batch: Batch, generator: torch.Generator, tokenizer: BertTokenizer) -> Batch:
    """Hides a fifth of the words: 8 of 10 become [MASK], 1 a random word, 1 stays (Devlin et al. 2019)."""
    words = batch["input_ids"]
    chosen = (torch.rand(words.shape, generator=generator) < 0.2) & (words >= len(SPECIAL))
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


def pretrain(network: BertForPreTraining, tokenizer: BertTokenizer, documents: int) -> None:
    """One pass over fresh documents with AdamW, 5 % of warm-up and a linear decay."""
    steps = documents // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))
    )
    started = time.perf_counter()
    network.train()
    for step, batch in enumerate(batches(tokenizer, documents, TRAIN_SEED)):
        measured = losses(network, batch)
        (measured["masked_word_loss"] + measured["next_sentence_loss"]).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 0:
            figures = "  ".join(f"{name} {value.item():.3f}" for name, value in measured.items())
            print(f"step {step:5d} of {steps}  {figures}  {time.perf_counter() - started:.0f} s", flush=True)


@torch.no_grad()
def evaluate(network: BertForPreTraining, tokenizer: BertTokenizer) -> dict[str, float]:
    """The figures of `losses` on text of another seed."""
    network.eval()
    figures = [losses(network, batch) for batch in batches(tokenizer, 8 * POOL, HELDOUT_SEED)]
    return {name: sum(part[name].item() for part in figures) / len(figures) for name in figures[0]}


def save(network: BertForPreTraining, tokenizer: BertTokenizer, folder: Path) -> None:
    """Saves the encoder without its pretraining heads, in float32."""
    network.config.initializer_range = 0.02  # of the head that fine-tuning adds: it should start near zero
    network.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:9,d}  {path.name}")


def save_rows(folder: Path) -> None:
    """Saves the rows of every split: text, label, and the true probabilities of the classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (domain, size, seed) in SPLITS.items():
        table = pa.Table.from_pylist(rows(size, seed, domain))
        path = folder / f"{name}.parquet"
        parquet.write_table(table, path, compression="zstd", compression_level=19)
        print(f"{path.stat().st_size:9,d}  {path.name}")


def main() -> None:
    """Trains, measures and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "bayeslora" / "demo"
    parser.add_argument("--output", type=Path, default=default, help="folder of encoder/ and rows/")
    parser.add_argument("--rows", action="store_true", help="make the rows alone")
    parser.add_argument("--pools", type=int, default=160, help=f"pools of {POOL} reviews to learn from")
    options = parser.parse_args()

    save_rows(options.output / "rows")
    if options.rows:
        return
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    network = make_network(len(tokenizer))
    weights = sum(weight.numel() for weight in network.bert.parameters())
    print(f"{weights:,} weights, {len(tokenizer)} word pieces")
    pretrain(network, tokenizer, options.pools * POOL)
    print(json.dumps(evaluate(network, tokenizer), indent=2))
    save(network, tokenizer, options.output / "encoder")


if __name__ == "__main__":
    main()
