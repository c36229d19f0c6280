"""Longer contexts than a model was trained on, without training: read a context in chunks and compose their caches and states.

A context is divided into equal chunks. All are read as one batch, each behind its own copy of the prefix and from the positions
where the prefix ends; what they leave is merged into one state, with which the question is read and the answer written. The ways
to merge keys and values and those to merge recurrent states go together freely; the nine published ones (Priming, arXiv
2605.08301; PICASO, arXiv 2502.17605) are the products of three and three:

| published name | `Composition` | keys and values | recurrent states |
| --- | --- | --- | --- |
| full_kv_only, full_kv_soup_ssm, full_kv_fuse_ssm | full:kv_only, full:soup, full:fuse | of one ordinary pass | zero, mean, fused |
| concat_kv_only, concat_kv_soup_ssm, concat_kv_fuse_ssm | concat:kv_only, ... | the prefix's once, then every chunk's | the same |
| sw_kv_only, sw_soup_ssm, sw_fuse_ssm | sw:kv_only, ... | the prefix's, then the last chunk's | the same |
| (ours) | full:exact, concat:exact, sw:exact | as above | the chunks' affine maps, applied in order |
| (none) | full:ordinary | of one ordinary pass | of the same pass |

*Positions.* Chunks have the positions P ... P + C - 1 behind a prefix of P tokens; the last chunk, if it is shorter, the last of
them. The question follows at P + C, as in the published code's recommended setting, or, with `full`, behind all tokens.

*Windows.* Attention with a window and B'MOJO-F keep what the last chunk leaves in theirs, or, with `full`, the ordinary pass.

*Convolutions.* Tails are the mean of the chunks' with `soup` and `fuse`, zero with `kv_only` (as in the published code), and the
last chunk's with `exact`.

Deep models: a layer reads what the layer before made of each chunk alone, so that `exact` is an ordinary pass of every recurrent
layer over its own inputs, and of a model only where it has one layer.
"""

from hybrid_jax.composition.composition import KEYS, STATES, Composition
from hybrid_jax.composition.generate import compose, composed_scores, generate_composed

__all__ = ["KEYS", "STATES", "Composition", "compose", "composed_scores", "generate_composed"]
