"""Shared by the tests of the kernels: inputs of every operation, by name."""

import jax.numpy as jnp
import numpy as np

import kernels_pallas as kp

ODD = 1, 3, 24, 40, 130  # B, H, K, V, D of `make`: nothing a multiple of anything
B, H, K, V = 2, 2, 8, 12  # of `make_inputs`


def make_inputs(op, T, seed=0, strength=0.3, dtype=np.float32, beta_max=2.0):
    """Arguments of `op` by name; decays log-uniform up to `strength`, q and k of unit length."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape)

    def unit(*shape):
        x = normal(*shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    g = -strength * rng.uniform(0, 1, (B, T, H))
    qkv = dict(q=unit(B, T, H, K), k=unit(B, T, H, K), v=normal(B, T, H, V), log_decay=g)
    inputs = {
        "linear_attention": lambda: qkv,
        "gated_delta_rule": lambda: qkv | dict(beta=rng.uniform(0, beta_max, (B, T, H))),
        "gated_kalmanet": lambda: qkv | dict(alpha=rng.uniform(0, 1, (B, T, H))),
        "ssd": lambda: dict(
            x=normal(B, T, H, V),
            dt=rng.uniform(0, strength, (B, T, H)),
            a=-rng.uniform(0.5, 2, H),
            b=unit(B, T, 1, K),
            c=unit(B, T, 1, K),
            d=normal(H),
        ),
        "short_conv": lambda: dict(x=normal(B, T, 6), weight=normal(6, 4), bias=normal(6)),
    }[op]()
    return {n: jnp.asarray(x, dtype) for n, x in inputs.items()}


def make_state(op, seed=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((B, H, K, K))
    kv = jnp.asarray(rng.standard_normal((B, H, K, V)), dtype)
    return {
        "gated_kalmanet": (jnp.asarray(h @ h.swapaxes(-1, -2), dtype), kv),
        "short_conv": jnp.asarray(rng.standard_normal((B, 3, 6)), dtype),
    }.get(op, kv)


def cut(inputs, where):
    """The tokens `where` of every array that has a time axis."""
    return {n: x[:, where] if n not in ("a", "d", "weight", "bias") else x for n, x in inputs.items()}


def run(op, inputs, implementation="xla", chunk=8, **kw):
    if op != "short_conv":
        kw["chunk_size"] = chunk
    return getattr(kp, op)(**inputs, implementation=implementation, **kw)


def make(op, T, strength, seed=0):
    """(arguments by name, initial state, segment ids with an empty-looking border, a one-token and a long segment)."""
    B, H, K, V, D = ODD
    rng = np.random.default_rng(seed)
    unit = rng.standard_normal((2, B, T, H, K))
    q, k = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    kk = rng.standard_normal((B, H, K, K))
    kv = rng.standard_normal((B, H, K, V))
    shared = dict(q=q, k=k, v=rng.standard_normal((B, T, H, V)), log_decay=-strength * rng.uniform(0, 1, (B, T, H)))
    gate = rng.uniform(0, 1, (B, T, H))
    inputs, state = {
        "linear_attention": (shared, kv),
        "gated_delta_rule": (shared | dict(beta=2 * gate), kv),
        "gated_kalmanet": (shared | dict(alpha=gate), (kk @ kk.swapaxes(-1, -2), kv)),
        "short_conv": (
            dict(x=rng.standard_normal((B, T, D)), weight=rng.standard_normal((D, 4)), bias=rng.standard_normal(D)),
            rng.standard_normal((B, 3, D)),
        ),
    }[op]
    borders = [b for b in (0, 20, 21, 100) if b < T]
    ids = np.repeat([4, 2, 2 if T < 22 else 9, 4][: len(borders)], np.diff([*borders, T]))[None]
    return inputs, state, jnp.asarray(ids)
