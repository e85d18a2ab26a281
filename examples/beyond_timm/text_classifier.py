"""A text classifier of transformers: pruned, trained on with its Trainer, and saved in the form that fits it.

    pip install transformers accelerate
    python examples/beyond_timm/text_classifier.py

A small BERT with random weights and made-up sentences, so that it runs anywhere in a minute.
"""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, Trainer
from transformers import TrainingArguments as Arguments

import singe_plugin
from singe_plugin import Pace

WORDS = 200


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Made-up sentences; whether more words are of the first half of the vocabulary is what is to be told."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.words = torch.randint(3, WORDS, (count, 16), generator=generator)
        self.labels = (self.words < WORDS // 2).sum(1).gt(8).long()

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = self.words[index]
        return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": self.labels[index]}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # prune says what to save the model with
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertForSequenceClassification(BertConfig(vocab_size=WORDS, **sizes))
    train, val = Sentences(256, 0), Sentences(128, 1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = Arguments(folder, max_steps=40, per_device_train_batch_size=32, report_to=[], disable_tqdm=True)
        Trainer(model, arguments, train_dataset=train).train()
        # its own loss, which it computes from the labels among its inputs, is what units are scored by
        # BertConfig has one number for the hidden layers of all blocks, and says heads by the width of the stream: what
        # it can say is pruned here. Without these three lines everything goes, and singe_plugin.save is for the model
        pace = Pace("layers", heads="keep", ratios="uniform", units_per_step="layer")
        whole = ["bert.embeddings", "bert.pooler"]
        options = {"pace": pace, "ignored_layers": whole, "finetune": 0, "val_data": val}
        result = singe_plugin.prune(model, train, target="params=0.15", **options)
        print(result.summary())
        trainer = Trainer(model, arguments, train_dataset=train)
        trainer.train()
        x: Any = {key: value[None] for key, value in val[0].items()}
        expected = model.eval()(**x).logits
        trainer.save_model(folder)  # as save_pretrained does; prune has said whether the class can say the widths
        try:
            again = AutoModelForSequenceClassification.from_pretrained(folder).eval()
            print("from_pretrained computes the same:", bool(torch.allclose(again(**x).logits, expected, atol=1e-5)))
        except (RuntimeError, ValueError) as error:
            print(f"from_pretrained cannot load it ({type(error).__name__}): singe_plugin.save and load do")
            singe_plugin.save(result, folder)
            loaded = singe_plugin.load(folder, trust=True).model
            print("loaded, it computes the same:", bool(torch.allclose(loaded(**x).logits, expected, atol=1e-5)))


if __name__ == "__main__":
    main()
