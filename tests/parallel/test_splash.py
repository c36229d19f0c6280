"""The TPU's attention kernel (splash attention), interpreted, against attention by its definition: values and gradients."""

import jax
import jax.numpy as jnp
import pytest

from hybrid_jax.parallel import attention_block
from hybrid_jax.parallel.attention import Part, parts_attention
from hybrid_jax.parallel.attention_block import FULL, Mask
from tests.conftest import relative_error
from tests.parallel.conftest import plain_attention, random

T, CASES = 256, {"causal": (Mask(),), "window": (Mask(0, 70),), "memory": (Mask(0, 70), Mask(70, 140))}
CASES |= {"soft cap": (Mask(soft_cap=0.7),), "window, soft cap": (Mask(0, 70, soft_cap=0.7),)}


@pytest.mark.parametrize("case", CASES)
def test_splash_attention_and_its_gradient_are_the_definition_s(monkeypatch, case):
    """Queries that see a window and a memory beyond it, in one softmax, see as much as a window of both."""
    monkeypatch.setattr(attention_block, "_use_splash", lambda q, k: True)
    q, k, v, do = (random(1, T, h, 64, seed=n) for n, h in enumerate((2, 1, 1, 2)))
    ids = jnp.asarray([[1] * 100 + [2] * 130 + [0] * 26], jnp.int32)
    masks = CASES[case]

    def ours(q, k, v):
        return parts_attention(tuple(Part(q, k, v, ids) for _ in masks), ids, masks)

    got, pull = jax.vjp(ours, q, k, v)
    want, pull_want = jax.vjp(lambda *x: plain_attention(*x, ids, 0, masks[-1].window, masks[0].soft_cap), q, k, v)
    for a, b in zip((got, *pull(do)), (want, *pull_want(do)), strict=True):
        assert relative_error(a, b) < 1e-5


def test_splash_attention_between_chunks_counts_from_the_offset(monkeypatch):
    """The last 128 of 256 tokens as queries; keys before them that a window of 100 reaches, and all keys."""
    q, k, v, do = (random(1, T, h, 64, seed=n) for n, h in enumerate((2, 1, 1, 2)))
    half, ids = 128, jnp.ones((1, T), jnp.int32)
    for mask in (Mask(0, 100, offset=half), FULL):
        blocks = (q[:, half:], k, v, ids[:, half:], ids)

        def both(*blocks, mask=mask):
            o, lse = attention_block.block_forward(*blocks, mask)
            return o, lse, *attention_block.block_backward(*blocks, mask, o, lse, do[:, half:])

        want = jax.jit(both)(*blocks)
        with monkeypatch.context() as m:
            m.setattr(attention_block, "_use_splash", lambda q, k: True)
            got = jax.jit(lambda *blocks, both=both: both(*blocks))(*blocks)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < 1e-5
