"""Rows of a fixed length cut from a stream of tokenised documents, with segments and positions.

A row is a dict: `input_ids`, `segment_ids` (1, 2, ... within the row; 0 is padding), `loss_weights`
(the weight of predicting this token from those before it).
"""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from hybrid_jax.data.text import Document


def tokenize(documents: list[Document], tokenizer: Tokenizer, end_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The documents' tokens in one stream, each document closed by `end_id`, and where each begins."""
    encoded = tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    lengths = [len(e.ids) + 1 for e in encoded]
    tokens = np.concatenate([np.asarray([*e.ids, end_id], np.int32) for e in encoded])
    return tokens, np.cumsum([0, *lengths[:-1]])


class PackedRows:
    """Row i holds tokens i*length ... of the stream; a document's part in a row is one segment."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, length: int):
        if len(tokens) < length:
            raise ValueError(f"the text has {len(tokens)} tokens, fewer than one row of {length}; give more text")
        self.tokens, self.length = tokens, length
        self.document = np.zeros(len(tokens), np.int32)
        self.document[starts[1:]] = 1
        self.document = np.cumsum(self.document, dtype=np.int32)

    def __len__(self):
        return len(self.tokens) // self.length

    def __getitem__(self, i) -> dict[str, np.ndarray]:
        where = slice(i * self.length, (i + 1) * self.length)
        document = self.document[where]
        segments = document - document[0] + 1
        weights = np.ones(self.length, np.float32)
        weights[1:] = segments[1:] == segments[:-1]  # a document's first token is not predicted from another's
        weights[0] = 0
        return {"input_ids": self.tokens[where], "segment_ids": segments.astype(np.int32), "loss_weights": weights}
