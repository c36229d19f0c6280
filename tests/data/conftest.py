"""Shared by the tests of data: text to put tasks in."""

import numpy as np


class Text:
    """Three rows of text, whose token at place t of row i is first + 10 i + t % 10."""

    def __init__(self, length, first=100):
        self.length, self.first = length, first

    def __len__(self):
        return 3

    def __getitem__(self, i):
        assert 0 <= i < 3
        ids = self.first + 10 * i + np.arange(self.length, dtype=np.int32) % 10
        return {"input_ids": ids, "segment_ids": np.ones_like(ids), "loss_weights": (np.arange(self.length) > 0).astype(np.float32)}
