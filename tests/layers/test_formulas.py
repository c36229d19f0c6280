"""Every mixer and every option of it against its formula, token by token in numpy and float64.

Written from the papers and from hybrid-model-factory's description of its layers; nothing of the project computes here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.config import BMojoConfig, DiscreteMamba2Config, GDNConfig, GKAConfig, Mamba2Config, Mamba3Config
from hybrid_jax.layers import make_mixer
from hybrid_jax.mixers import KINDS
from tests.conftest import relative_error, tiny_config

T, H, HKV, D, HID = 9, 4, 2, 8, 24


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def conv(p, name, x, activation=silu):
    """The activation of the causal depthwise convolution of x [T, channels]."""
    kernel = p[f"{name}.kernel"]
    padded = np.concatenate([np.zeros((kernel.shape[1] - 1, x.shape[1])), x])
    y = np.stack([(padded[t : t + kernel.shape[1]] * kernel.T).sum(0) for t in range(len(x))])
    return activation(y + p.get(f"{name}.bias", 0))


def linear(p, name, x):
    return x @ p[f"{name}.kernel"] + p.get(f"{name}.bias", 0)


def heads(x, size=D, count=H):
    """[T, heads * size] -> [T, count, size], every key head repeated for its queries."""
    x = x.reshape(T, -1, size)
    return np.repeat(x, count // x.shape[1], axis=1)


def expanded(p, name, x, size, count):
    """Heads of keys or values: repeated or mixed, and what their low-rank map adds."""
    if f"{name}_rep" in p:
        repeated = np.einsum("nh,thd->tnd", p[f"{name}_rep"], x.reshape(T, -1, size))
    else:
        repeated = heads(x, size, count)
    if f"proj_{name}.linearA.kernel" not in p:
        return repeated
    return repeated + linear(p, f"proj_{name}.linearB", silu(linear(p, f"proj_{name}.linearA", x))).reshape(repeated.shape)


def log_decay(p, x):
    return -np.exp(p["A_log"]) * np.log1p(np.exp(x + p["dt_bias"]))


def gated(p, o, x, eps, use_gate):
    o = rms(o, p["o_norm.weight"], eps).reshape(T, -1)
    return linear(p, "o_proj", o * silu(linear(p, "g_proj", x)) if use_gate else o)


def gka(p, x, c):
    c = c.options(GKAConfig)
    N, count, size = c.state_size or D, c.value_heads or H, c.value_size or D
    q, k = (conv(p, f"{n}_conv1d", linear(p, f"{n}_proj", x)) for n in "qk")
    v = linear(p, "v_proj", x)
    v = conv(p, "v_conv1d", v) if c.use_v_conv else v
    q, k, v = heads(q, N, count), expanded(p, "k", k, N, count), expanded(p, "v", v, size, count)
    q, k = (a / (np.linalg.norm(a, axis=-1, keepdims=True) + 1e-6) for a in (q, k))
    if c.use_beta_gate:
        beta = sigmoid(linear(p, "b_proj", x))[..., None] + 1e-6
        k, v = beta * k, beta * v
    alpha = sigmoid(linear(p, "alpha_proj", x)) if c.use_alpha_connection else np.ones((T, count))
    g = log_decay(p, linear(p, "a_proj", x)) if c.use_forgetting_gate else np.zeros((T, count))
    o = np.zeros((T, count, size))
    for h in range(count):
        M, S = np.zeros((N, N)), np.zeros((N, size))
        for t in range(T):
            M = np.exp(g[t, h]) * M + np.outer(k[t, h], k[t, h])
            S = np.exp(g[t, h]) * S + np.outer(k[t, h], v[t, h])
            query = q[t, h]
            if c.num_iter:
                solved = np.linalg.solve(M + c.ridge_strength * np.linalg.norm(M) * np.eye(N), query)
                query = query + alpha[t, h] * (solved - query)
            o[t, h] = (N**-0.5 if c.gla_rescale else 1) * S.T @ query
    return gated(p, o, x, c.norm_eps, c.use_gate)


def gdn(p, x, c):
    c = c.options(GDNConfig)
    N, count, size = c.state_size or D, c.value_heads or H, c.value_size or D
    q, k, v = (linear(p, f"{n}_proj", x) for n in "qkv")
    q, k, v = (conv(p, f"{n}_conv1d", a) if c.use_short_conv else silu(a) for n, a in zip("qkv", (q, k, v), strict=True))
    q, k, v = heads(q, N, count), expanded(p, "k", k, N, count), expanded(p, "v", v, size, count)
    q, k = (a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
    beta = sigmoid(linear(p, "b_proj", x)) * (2 if c.allow_neg_eigval else 1)
    g = log_decay(p, linear(p, "gk_proj", x))
    o = np.zeros((T, count, size))
    for h in range(count):
        S = np.zeros((N, size))
        for t in range(T):
            S = np.exp(g[t, h]) * S
            S = S + beta[t, h] * np.outer(k[t, h], v[t, h] - S.T @ k[t, h])
            o[t, h] = N**-0.5 * S.T @ q[t, h]
    return gated(p, o, x, c.norm_eps, c.use_gate)


def mamba2(p, x, c):
    N = c.options(Mamba2Config).state_size or D
    z, v, b, cc, dt = np.split(linear(p, "in_proj", x), np.cumsum([H * D, HKV * D, HKV * N, H * N]), axis=1)
    if c.qk_norm and c.options(Mamba2Config).use_qk_norm:
        b = rms(b.reshape(T, -1, N), p["B_norm.weight"], 1e-6).reshape(T, -1)
        cc = rms(cc.reshape(T, -1, N), p["C_norm.weight"], 1e-6).reshape(T, -1)
    mixed = conv(p, "conv1d", np.concatenate([v, b, cc], axis=1))
    v, b, cc = np.split(mixed, [HKV * D, HKV * (D + N)], axis=1)
    v, b, cc = heads(v), heads(b, N), heads(cc, N)
    dt = np.log1p(np.exp(dt + p["dt_bias"]))
    y = np.zeros((T, H, D))
    for h in range(H):
        S = np.zeros((N, D))
        for t in range(T):
            S = np.exp(-np.exp(p["A_log"][h]) * dt[t, h]) * S + dt[t, h] * np.outer(b[t, h], v[t, h])
            y[t, h] = cc[t, h] @ S + p["D"][h] * v[t, h]
    y = rms(y * silu(z).reshape(T, H, D), p["norm.weight"].reshape(H, D), 1e-5)
    return linear(p, "out_proj", y.reshape(T, H * D))


def discrete_mamba2(p, x, c):
    c = c.options(DiscreteMamba2Config)
    N, G = c.state_size or D, c.qk_heads or H
    xbc, z, a = np.split(linear(p, "in_proj", x), np.cumsum([H * D + 2 * G * N, H * D]), axis=1)
    mixed = conv(p, "conv1d", xbc, silu if c.conv_activation else lambda x: x)
    v, b, cc = np.split(mixed, [H * D, H * D + G * N], axis=1)
    v, b, cc = heads(v), heads(b, N), heads(cc, N)
    y = np.zeros((T, H, D))
    for h in range(H):
        S = np.zeros((N, D))
        for t in range(T):
            S = S / (1 + np.exp(a[t, h])) + np.outer(b[t, h], v[t, h])
            y[t, h] = cc[t, h] @ S + p["D"][h] * v[t, h]
    return linear(p, "out_proj", y.reshape(T, H * D) * silu(z + p.get("z_bias", 0)))


def mamba3(p, x, c):
    c = c.options(Mamba3Config)
    R, N = c.rank, c.state_size or D
    A = int(N * c.rope_fraction) // 2
    of_b, of_c = c.groups or HKV, c.groups or H
    parts = np.split(linear(p, "in_proj", x), np.cumsum([H * D, HKV * D, of_b * R * N, of_c * R * N, H, H, H]), axis=1)
    z, v, b, cc, dt, decay, trap, angle = parts
    one = np.ones((H, R, D))
    z, v = heads(z)[:, :, None] * p.get("mimo_z", one), heads(v)[:, :, None] * p.get("mimo_x", one)
    b, cc = (
        np.repeat(rms(a.reshape(T, R, -1, N), p[f"{n}_norm.weight"], c.norm_eps), H * R * N // a.shape[1], axis=2).swapaxes(1, 2)
        + p[f"{n}_bias"]
        for n, a in (("B", b), ("C", cc))
    )
    dt, trap = np.log1p(np.exp(dt + p["dt_bias"])), sigmoid(trap)
    decay = np.maximum(np.where(decay >= 0, 1 + decay, 1 / (1 - np.minimum(decay, 0))), c.decay_floor)
    turned = np.cumsum(np.pi * np.tanh(angle)[:, None] * dt[..., None], axis=0)
    y = np.zeros((T, H, D))
    for h in range(H):
        S, added = np.zeros((N, D)), np.zeros((N, D))
        for t in range(T):
            turn = np.eye(N)
            for j in range(A):
                pair = [j, j + N // 2] if c.rotate_halves else [2 * j, 2 * j + 1]
                cos, sin = np.cos(turned[t, h, j]), np.sin(turned[t, h, j])
                turn[np.ix_(pair, pair)] = [[cos, -sin], [sin, cos]]
            S = np.exp(-decay[t, h] * dt[t, h]) * (S + (1 - trap[t, h]) * dt[t, h] * added)
            added = sum(np.outer(turn @ b[t, h, r], v[t, h, r]) for r in range(R))
            S = S + trap[t, h] * dt[t, h] * added
            for r in range(R):
                o = S.T @ turn @ cc[t, h, r] + p["D"][h] * v[t, h, r]
                o = rms(o, p["norm.weight"].reshape(-1, D)[h if c.norm_per_head else 0], c.norm_eps) if c.out_norm else o
                y[t, h] += p.get("mimo_o", one)[h, r] * o * silu(z[t, h, r])
    return linear(p, "out_proj", y.reshape(T, H * D))


def rotary(x, theta):
    angle = np.arange(T)[:, None] * theta ** -(np.arange(0, D, 2) / D)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def bmojo(p, x, c):
    bmojo = c.options(BMojoConfig)
    kind, W = bmojo.ssm_mixer, bmojo.window_size
    key = KINDS[kind].parameter_key
    f = FORMULAS[kind]({n.removeprefix(f"{key}."): v for n, v in p.items() if n.startswith(f"{key}.")}, x, c)
    p = {n.removeprefix("bmojo_attn."): v for n, v in p.items() if n.startswith("bmojo_attn.")}
    second = "" if bmojo.tie_attn_weights else "_"

    def project(inputs, name, suffix):
        y = linear(p, f"{name}_proj{suffix}", inputs).reshape(T, -1, D)
        if name in "qk" and c.qk_norm:
            y = rms(y, p[f"{name}_norm{suffix}.weight"], c.rms_norm_eps)
        y = rotary(y, c.rope.theta) if name in "qk" else y
        return np.repeat(y, H // y.shape[1], axis=1)

    q, k, v = (project(x, n, "") for n in "qkv")
    fading_q, fading_k, fading_v = project(x, "q", second), project(f, "k", second), project(f, "v", second)
    o = np.zeros((T, H, D))
    for h in range(H):
        for t in range(T):
            near, far = range(max(0, t - W + 1), t + 1), range(max(0, t - 2 * W + 1), max(0, t - W + 1))
            scores = [q[t, h] @ k[s, h] for s in near] + [fading_q[t, h] @ fading_k[s, h] for s in far]
            weights = np.exp(np.array(scores) * D**-0.5)
            o[t, h] = weights / weights.sum() @ np.array([v[s, h] for s in near] + [fading_v[s, h] for s in far])
    return linear(p, "o_proj", o.reshape(T, H * D))


FORMULAS = {"gka": gka, "gdn": gdn, "mamba2": mamba2, "discrete_mamba2": discrete_mamba2, "mamba3": mamba3, "bmojo": bmojo}
SOLVED = dict(num_iter=150)  # so many iterations reach the exact solution

OWN = dict(key_heads=2, value_heads=6, value_size=5, state_size=3)
LOW_RANK = dict(kv_proj_rank=3)
LEARNED = dict(kv_proj_rank=3, kv_learnable_residual=True)

CASES = {
    "gka": ("gka", dict(gka=GKAConfig(**SOLVED))),
    "gka without v's convolution": ("gka", dict(gka=GKAConfig(use_v_conv=False, **SOLVED))),
    # a unit key's first system is of rank one: at the usual ridge its rounding in float32 is 50 times that of the input
    "gka without alpha": ("gka", dict(gka=GKAConfig(use_alpha_connection=False, ridge_strength=0.3, **SOLVED))),
    "gka without beta": ("gka", dict(gka=GKAConfig(use_beta_gate=False, ridge_strength=0.3, **SOLVED))),
    "gka without decay": ("gka", dict(gka=GKAConfig(use_forgetting_gate=False, **SOLVED))),
    "gka without gate, other eps and taps": ("gka", dict(gka=GKAConfig(use_gate=False, norm_eps=0.1, conv_size=3, **SOLVED))),
    "gka without rescaling": ("gka", dict(gka=GKAConfig(gla_rescale=False, norm_eps=0.1, ridge_strength=0.3, **SOLVED))),
    "gka without the solve": ("gka", dict(gka=GKAConfig(num_iter=0))),
    "gka of a small state": ("gka", dict(gka=GKAConfig(state_size=3, ridge_strength=0.3, **SOLVED))),
    "gka of heads of its own": ("gka", dict(gka=GKAConfig(ridge_strength=0.3, **OWN, **SOLVED))),
    "gka of heads of its own, learned expansion": ("gka", dict(gka=GKAConfig(num_iter=0, **OWN, **LEARNED))),
    "gka, low-rank expansion": ("gka", dict(gka=GKAConfig(use_v_conv=False, ridge_strength=0.3, **LOW_RANK, **SOLVED))),
    "gdn": ("gdn", dict(gdn=GDNConfig())),
    "gdn of heads of its own, low-rank expansion": ("gdn", dict(gdn=GDNConfig(**OWN, **LOW_RANK))),
    "gdn, learned expansion": ("gdn", dict(gdn=GDNConfig(state_size=3, **LEARNED))),
    "gdn of a small state": ("gdn", dict(gdn=GDNConfig(state_size=3))),
    "gdn without convolutions": ("gdn", dict(gdn=GDNConfig(use_short_conv=False))),
    "gdn of small inputs": ("gdn", dict(gdn=GDNConfig(use_short_conv=False))),
    "gdn with negative eigenvalues": ("gdn", dict(gdn=GDNConfig(allow_neg_eigval=True))),
    "gdn without gate, with biases": ("gdn", dict(gdn=GDNConfig(use_gate=False, conv_bias=True, norm_eps=0.1, conv_size=3))),
    "mamba2": ("mamba2", {}),
    "mamba2 of a large state": ("mamba2", dict(mamba2=Mamba2Config(state_size=12))),
    "mamba2 without norms": ("mamba2", dict(mamba2=Mamba2Config(use_qk_norm=False))),
    "mamba2 of a source without norms": ("mamba2", dict(qk_norm=False)),
    "discrete mamba2": ("discrete_mamba2", {}),
    "discrete mamba2 of a small state, few keys, no bias of the convolution": (
        "discrete_mamba2",
        dict(discrete_mamba2=DiscreteMamba2Config(state_size=3, qk_heads=2, conv_bias=False, conv_size=3)),
    ),
    "discrete mamba2 with biases, SiLU behind the convolution": (
        "discrete_mamba2",
        dict(discrete_mamba2=DiscreteMamba2Config(bias=True, conv_activation=True)),
    ),
    "mamba3": ("mamba3", {}),
    "mamba3 of one group, with a norm per head": ("mamba3", dict(mamba3=Mamba3Config(rank=2, groups=1, norm_per_head=True))),
    "mamba3 of three inputs per token": ("mamba3", dict(mamba3=Mamba3Config(rank=3, norm_eps=0.1))),
    "mamba3 of a small state, in halves": ("mamba3", dict(mamba3=Mamba3Config(4, rotate_halves=True, rope_fraction=0.75))),
    "mamba3 without output norm": ("mamba3", dict(mamba3=Mamba3Config(12, 2, out_norm=False, rope_fraction=1.0))),
    "mamba3 without rotation, with least decay": ("mamba3", dict(mamba3=Mamba3Config(rope_fraction=0.0, decay_floor=1.5))),
    "bmojo": ("bmojo", dict(bmojo=BMojoConfig(3, "gdn"))),
    "bmojo untied": ("bmojo", dict(bmojo=BMojoConfig(3, "mamba2", tie_attn_weights=False))),
    "bmojo untied, no norms": (
        "bmojo",
        dict(bmojo=BMojoConfig(3, "gka", tie_attn_weights=False), gka=GKAConfig(**SOLVED), qk_norm=False),
    ),
}

SCALES = {"gdn of small inputs": 3e-3}  # where the epsilon in the norms of q and k matters


@pytest.mark.parametrize("case", list(CASES))
def test_a_mixer_is_its_formula(case):
    kind, options = CASES[case]
    config = tiny_config("*", **options)
    mixer = make_mixer(kind, config, 0, rngs=nnx.Rngs(0))
    rng, parameters = np.random.default_rng(0), {}
    for path, variable in nnx.to_flat_state(nnx.state(mixer, nnx.Param)):
        value = rng.standard_normal(variable.shape) * (0.3 if path[-1] == "kernel" else 0.5) + (path[-1] == "weight")
        variable.set_value(jnp.asarray(value, jnp.float32))
        parameters[".".join(map(str, path))] = np.asarray(variable.get_value(), np.float64)
    x = SCALES.get(case, 1) * rng.standard_normal((T, HID))
    positions, ones = jnp.arange(T)[None], jnp.ones((1, T), jnp.int32)
    got, _ = jax.jit(lambda x: mixer(x, positions=positions, segment_ids=ones))(jnp.asarray(x[None], jnp.float32))
    assert relative_error(got[0], FORMULAS[kind](parameters, np.asarray(x, np.float32).astype(np.float64), config)) < 2e-5
