"""Data: text, conversations and synthetic rows; tokenized ahead of time or on the fly, packed, mixed and batched by grain."""

from hybrid_jax.data.corpus import Corpus, read_corpus, read_sources, read_tasks
from hybrid_jax.data.pipeline import training_batches
from hybrid_jax.data.tokenizer import check_same_ids, check_tokenizer_fits, load_tokenizer

__all__ = [
    "HELD_OUT_SEED",
    "SELECTION_SEED",
    "Corpus",
    "check_same_ids",
    "check_tokenizer_fits",
    "load_tokenizer",
    "read_corpus",
    "read_sources",
    "read_tasks",
    "training_batches",
]

HELD_OUT_SEED = 987_654_321  # of synthetic rows for evaluation; no training seed should be the same
SELECTION_SEED = 876_543_210  # of synthetic rows by which layers are chosen
