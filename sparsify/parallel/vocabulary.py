"""The two ends of a language model, divided by the vocabulary: the embedding and the scores of the next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.parallel.collectives import summed


class VocabularyEmbedding(nn.Module):
    """An embedding of which each rank has the vectors of some neighbouring tokens.

    Attributes:
        weight: `(tokens, H)` vectors of this rank's tokens.
        start: Number of the first of them.
        num_embeddings: Tokens of all ranks together.
        embedding_dim: `H`.
        padding_idx: Token whose vector gets no gradient.
    """

    def __init__(self, whole: nn.Embedding, weight: nn.Parameter, start: int, group: Any) -> None:
        super().__init__()
        self.weight, self.start = weight, start
        self.num_embeddings, self.embedding_dim = whole.num_embeddings, whole.embedding_dim
        self.padding_idx = whole.padding_idx
        # A function, unlike a process group, can be copied with the model.
        self._sum: Callable[[Tensor], Tensor] = lambda x: summed(x, group)

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors `(..., H)` of tokens `(...)`: every rank looks up its own, and the sum is whole."""
        own = ids - self.start
        elsewhere = (own < 0) | (own >= self.weight.shape[0])
        padding = None if self.padding_idx is None else self.padding_idx - self.start
        padding = padding if padding is not None and 0 <= padding < self.weight.shape[0] else None
        found = F.embedding(own.masked_fill(elsewhere, 0), self.weight, padding)
        return self._sum(found.masked_fill(elsewhere[..., None], 0))

    def extra_repr(self) -> str:
        """Tokens here and in all, for `print(model)`."""
        end = self.start + self.weight.shape[0]
        return f"tokens {self.start} to {end} of {self.num_embeddings}, {self.embedding_dim}"


def own_rows(embedding: nn.Embedding, rows: Tensor) -> nn.Parameter:
    """The vectors of some tokens, copied."""
    weight = embedding.weight
    with torch.no_grad():
        return nn.Parameter(weight[rows.to(weight.device)].clone(), requires_grad=weight.requires_grad)
