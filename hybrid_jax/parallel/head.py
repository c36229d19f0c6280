"""The output head: the only definition of logits, for decoding, evaluation and every loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.arguments import accumulator


@dataclasses.dataclass(frozen=True)
class Head:
    """The map from final hidden states to logits: x = (hidden kernel + bias) / scaling, then soft_cap * tanh(x / soft_cap).

    The losses (`parallel.tiles`) apply the same two steps to one shard of the vocabulary at a time, and `derivative` in their
    backward pass. A family with another head changes `_of_products` and `derivative`, and nothing else.

    Args:
      kernel: [hidden, vocab].
      scaling: what the products are divided by (Granite's `logits_scaling`); above 0.
      soft_cap: the bound of the logits' absolute values (Gemma 2, arXiv 2408.00118, section 2), above 0; None: no bound.
      bias: [vocab] (Phi); None: there is none.
    """

    kernel: jax.Array
    scaling: float = 1.0
    soft_cap: float | None = None
    bias: jax.Array | None = None

    def arrays(self, dtype: DTypeLike) -> tuple[jax.Array, ...]:
        """Returns the kernel in `dtype`, and the bias, if there is one, as it is: it is added to float32 products."""
        kernel = self.kernel.astype(dtype)
        return (kernel,) if self.bias is None else (kernel, self.bias)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Returns the logits [..., vocab] of hidden [..., hidden], in float32 (float64 for float64 hidden states)."""
        kernel = self.kernel.astype(hidden.dtype)
        products = jnp.matmul(hidden, kernel, preferred_element_type=accumulator(hidden))
        return self._of_products(products if self.bias is None else products + self.bias.astype(products.dtype))

    def _of_products(self, products: jax.Array) -> jax.Array:
        """Returns the logits of products hidden kernel + bias, [..., vocab] both."""
        logits = products if self.scaling == 1 else products / self.scaling
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def derivative(self, logits: jax.Array) -> jax.Array | float:
        """Returns d logits / d (hidden kernel + bias), element by element, from the logits [..., vocab]."""
        if self.soft_cap is None:
            return 1 / self.scaling
        return (1 - jnp.square(logits / self.soft_cap)) / self.scaling

    def with_arrays(self, kernel: jax.Array, bias: jax.Array | None = None) -> Head:
        """Returns the same map with other `arrays`, for example one device's shards of them."""
        return dataclasses.replace(self, kernel=kernel, bias=bias)


def as_head(head: Head | jax.Array) -> Head:
    """Returns `head`, or the plain head whose kernel [hidden, vocab] is the array given."""
    return head if isinstance(head, Head) else Head(head)
