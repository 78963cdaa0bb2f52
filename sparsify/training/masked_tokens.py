"""Hiding tokens for a masked language model so that an interrupted training goes on with the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling


class TokenHider:
    """A collator that hides other tokens of a text in each epoch, and in one epoch always the same.

    What it hides follows from seed, epoch and the texts of a batch. A generator that runs on from batch to batch would
    have to be stored with each checkpoint, ahead by the batches that are read before their step.

    Args:
        tokenizer: The model's tokenizer.
        seed: Chooses the tokens.

    Attributes:
        epoch: The epoch, from 0; whoever trains keeps it up to date.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._collate = DataCollatorForLanguageModeling(tokenizer, seed=seed)
        self._seed, self.epoch = seed, 0

    def __call__(self, rows: Sequence[Any]) -> Any:
        """One batch, as `DataCollatorForLanguageModeling` makes it."""
        digest = hashlib.sha256(f"{self._seed} {self.epoch}".encode())
        for row in rows:
            digest.update(repr(torch.as_tensor(row["input_ids"]).tolist()).encode())
        own_seed = int.from_bytes(digest.digest()[:8], "little") >> 1
        self._collate.generator = torch.Generator().manual_seed(own_seed)
        return self._collate(list(rows))
