"""One suite that every mixer passes: packing, padding side, split prefill, token-by-token decoding, batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.mixers import mixer_symbols
from tests.conftest import relative_error, tiny_model

MIXERS = [*mixer_symbols(), "GDN[1,2,3]"]  # of kept heads, those of unequal groups have the most to get wrong
IDS = np.random.default_rng(0).integers(0, 61, (2, 21))
LEARNED = dict(kv_proj_rank=3, kv_learnable_residual=True)


@functools.cache
def model(symbol):
    return tiny_model(f"{symbol}-{symbol}")


@nnx.jit
def forward(model, ids, segments=None):
    return model(ids, segments)


def logits(symbol, ids, segments=None):
    return np.asarray(forward(model(symbol), ids, segments))


@pytest.mark.parametrize("symbol", MIXERS)
def test_packed_rows_equal_separate_rows(symbol):
    segments = np.tile(np.repeat([1, 2, 3], [8, 1, 12]), (2, 1))
    packed = logits(symbol, IDS, segments)
    for a, b in ((0, 8), (8, 9), (9, 21)):
        assert relative_error(packed[:, a:b], logits(symbol, IDS[:, a:b])) < 1e-4


@pytest.mark.parametrize("symbol", MIXERS)
def test_gradients_of_packed_rows_equal_those_of_separate_rows(symbol):
    segments = np.tile(np.repeat([1, 2], [9, 12]), (2, 1))

    def packed(m):
        return jnp.sum(jnp.sin(m(IDS, jnp.asarray(segments))))

    def separate(m):
        return jnp.sum(jnp.sin(m(IDS[:, :9]))) + jnp.sum(jnp.sin(m(IDS[:, 9:])))

    got, want = (jax.tree.leaves(nnx.jit(nnx.grad(f))(model(symbol))) for f in (packed, separate))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-3


@pytest.mark.parametrize("symbol", MIXERS)
@pytest.mark.parametrize("left", [True, False])
def test_padding_on_either_side_changes_nothing(symbol, left):
    pad = ((0, 0), (5, 0)) if left else ((0, 0), (0, 5))
    where = slice(5, None) if left else slice(0, 21)
    segments = np.pad(np.ones_like(IDS), pad)
    assert relative_error(logits(symbol, np.pad(IDS, pad), segments)[:, where], logits(symbol, IDS)) < 1e-4


@nnx.jit
def part_of(model, ids, positions, state):
    return model.hidden_states(ids, None, positions, state)


@pytest.mark.parametrize("symbol", MIXERS)
@pytest.mark.parametrize("cuts", [(7,), (1, 2, 13), tuple(range(1, 21))])
def test_prefill_in_parts_and_decoding_equal_the_whole(symbol, cuts):
    m = model(symbol)
    state, parts = m.init_state(2, 21), []
    for a, b in zip((0, *cuts), (*cuts, 21), strict=True):
        positions = jnp.broadcast_to(jnp.arange(a, b), (2, b - a))
        hidden, state = part_of(m, jnp.asarray(IDS[:, a:b]), positions, state)
        parts.append(m.head(hidden))
    assert relative_error(jnp.concatenate(parts, axis=1), logits(symbol, IDS)) < 1e-4


@pytest.mark.parametrize("symbol", MIXERS)
def test_a_row_does_not_depend_on_its_batch(symbol):
    assert relative_error(logits(symbol, IDS)[:1], logits(symbol, IDS[:1])) < 1e-5


@pytest.mark.parametrize("symbol", MIXERS)
def test_no_token_sees_a_later_one(symbol):
    changed = IDS.copy()
    changed[:, 13:] = (changed[:, 13:] + 1) % 61
    a, b = logits(symbol, IDS), logits(symbol, changed)
    assert relative_error(a[:, :13], b[:, :13]) < 1e-5
    assert relative_error(a[:, 13:], b[:, 13:]) > 1e-2


@pytest.mark.parametrize("symbol", MIXERS)
def test_bfloat16_activations_follow_float32(symbol):
    m = tiny_model(f"{symbol}-{symbol}")
    want = forward(m, IDS)
    m.compute_dtype = jnp.dtype(jnp.bfloat16)
    got = forward(m, IDS)
    assert m.hidden_states(IDS)[0].dtype == jnp.bfloat16 and got.dtype == jnp.float32  # logits are those of the losses
    assert relative_error(got, want) < 0.05


@pytest.mark.parametrize(
    "options", [dict(use_short_conv=False), dict(allow_neg_eigval=True), dict(use_gate=False, conv_bias=True), LEARNED]
)
def test_gdn_options_keep_decoding_equal(options):
    from hybrid_jax.config import GDNConfig

    check_decoding(tiny_model("GDN-*", gdn=GDNConfig(**options)))


@pytest.mark.parametrize(
    "options",
    [
        dict(use_v_conv=False, use_gate=False),
        dict(use_alpha_connection=False, use_beta_gate=False),
        dict(use_forgetting_gate=False),
        dict(gla_rescale=False, num_iter=0),
        dict(key_heads=2, value_heads=6, value_size=5, state_size=3, **LEARNED),
    ],
)
def test_gka_options_keep_decoding_equal(options):
    from hybrid_jax.config import GKAConfig

    check_decoding(tiny_model("GKA-*", gka=GKAConfig(**options)))


@pytest.mark.parametrize(
    "options",
    [
        dict(rank=3, out_norm=False),
        dict(state_size=4, rope_fraction=1.0, rotate_halves=True),
        dict(rope_fraction=0.0),
        dict(rank=2, state_size=12),
        dict(groups=2, norm_per_head=True),
    ],
)
def test_mamba3_options_keep_decoding_equal(options):
    from hybrid_jax.config import Mamba3Config

    check_decoding(tiny_model("M3-*", mamba3=Mamba3Config(**options)))


@pytest.mark.parametrize("options", [dict(bias=True, conv_activation=True), dict(state_size=3, qk_heads=1, conv_bias=False)])
def test_discrete_mamba2_options_keep_decoding_equal(options):
    from hybrid_jax.config import DiscreteMamba2Config

    check_decoding(tiny_model("DM2-*", discrete_mamba2=DiscreteMamba2Config(**options)))


def test_untied_bmojo_and_its_mixers_keep_decoding_equal():
    from hybrid_jax.config import BMojoConfig

    for mixer in ("gdn", "mamba2", "mamba3"):
        check_decoding(tiny_model("BMF-*", bmojo=BMojoConfig(4, mixer, tie_attn_weights=False)))


def check_decoding(m):
    want = forward(m, IDS)
    hidden, state = part_of(m, IDS[:, :20], jnp.tile(jnp.arange(20), (2, 1)), m.init_state(2, 21))
    last, _ = part_of(m, IDS[:, 20:], jnp.full((2, 1), 20), state)
    assert relative_error(m.head(jnp.concatenate([hidden, last], axis=1)), want) < 1e-4
