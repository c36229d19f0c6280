"""XLA's tiled attention: the tiles that the mask or the segments leave empty are not computed, forward or backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.flops import traced_flops
from hybrid_jax.parallel import attention_block
from hybrid_jax.parallel.attention import Part, attend, parts_attention
from hybrid_jax.parallel.attention_block import Mask, block_backward, block_forward, visible_tiles

MASKS = [Mask(), Mask(0, 5), Mask(5, 10), Mask(None), Mask(None, 7, offset=-3), Mask(0, 9, offset=12), Mask(40, 44)]


@pytest.mark.parametrize("mask", MASKS)
def test_exactly_the_tiles_in_which_a_query_sees_a_key_are_visited(mask):
    T, S, tile = 19, 31, 4
    seen = np.asarray(mask.visible(jnp.arange(T), jnp.arange(S)))
    want = [(i, j) for i in range(5) for j in range(8) if seen[tile * i : tile * i + tile, tile * j : tile * j + tile].any()]
    assert [tuple(pair) for pair in visible_tiles(mask, T, S, tile).tolist()] == want


def flops(T, window):
    """Of attention forward and of forward and backward, in products of a query with a key of one head of one dimension."""
    q = jax.ShapeDtypeStruct((1, T, 1, 1), jnp.float32)

    def forward(q, k, v):
        return attend(q, k, v, jnp.ones((1, T), jnp.int32), window)

    both = jax.grad(lambda *x: jnp.sum(forward(*x) ** 2), argnums=(0, 1, 2))
    return [traced_flops(f, q, q, q) / 2 for f in (forward, both)]


@pytest.mark.parametrize("window, tiles, tile", [(None, 10, 1024), (4096, 10, 1024), (512, 8 + 7, 512), (64, 32 + 31, 128)])
def test_a_row_costs_the_tiles_on_and_near_the_diagonal(monkeypatch, window, tiles, tile):
    """4096 tokens: 4 x 4 tiles of which 10 are causal; with windows of 512, two tiles of 512 for every one of queries."""
    monkeypatch.setattr(attention_block, "CPU_TILE", attention_block.TILE)
    forward, both = flops(4096, window)
    assert forward == 2 * tiles * tile**2  # scores and values
    assert both == (2 + 5) * tiles * tile**2  # backward: scores again, and the gradients of p, v, q and k


@pytest.mark.parametrize("window, tiles", [(None, 32 * 33 // 2), (512, 4 * 32 + 32 - 10), (64, 32 + 31)])
def test_tiles_are_small_on_cpus(window, tiles):
    """4096 tokens: 32 tiles of 128 queries; a window of 512 reaches into four tiles of keys before the diagonal one."""
    forward, both = flops(4096, window)
    assert forward == 2 * tiles * 128**2 and both == (2 + 5) * tiles * 128**2


@pytest.mark.parametrize("window", [None, 6])
def test_tiles_of_other_segments_are_not_computed(monkeypatch, window):
    """Values of the first and the last document are NaN: 0 x NaN would be NaN, were their tiles computed and masked."""
    monkeypatch.setattr(attention_block, "TILE", 8)
    rng = np.random.default_rng(0)
    q, k, v, do = (jnp.asarray(rng.normal(size=(2, 32, 2, 4)), jnp.float32) for _ in range(4))
    segments = jnp.repeat(jnp.asarray([[1, 2, 2, 0], [1, 3, 3, 4]], jnp.int32), 8, axis=1)
    poisoned = v.at[:, :8].set(jnp.nan).at[:, 24:].set(jnp.nan)

    def gradients(v):
        o, pull = jax.vjp(lambda *x: attend(*x, segments, window), q, k, v)
        return [np.asarray(x)[:, 8:24] for x in (o, *pull(do))]

    for got, want in zip(gradients(poisoned), gradients(v), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_mask_that_shows_nothing_costs_nothing_and_gives_nothing():
    """A row shorter than a B'MOJO window has no fading memory to attend to."""
    q = jnp.ones((1, 8, 2, 4))
    ids = jnp.ones((1, 8), jnp.int32)
    mask = Mask(8, 16)
    o, lse = block_forward(q, q, q, ids, ids, mask)
    assert not o.any() and (lse == attention_block.EMPTY).all()
    assert not any(x.any() for x in block_backward(q, q, q, ids, ids, mask, o, lse, q))
    assert traced_flops(lambda q: block_forward(q, q, q, ids, ids, mask), q) == 0
    alone, together = (
        parts_attention(tuple(Part(q, q, q, ids) for _ in masks), ids, masks) for masks in ((Mask(0, 8),), (Mask(0, 8), mask))
    )
    np.testing.assert_array_equal(alone, together)
