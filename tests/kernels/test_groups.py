"""Keys and values of fewer heads than the queries, and the scalars of values: every implementation, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas import mosaic
from kernels_pallas.gated_delta_rule import STEPS
from kernels_pallas.gated_kalmanet.composed import gated
from kernels_pallas.heads import repeat_heads
from tests.conftest import relative_error

OPS = ["linear_attention", "gated_delta_rule", "gated_kalmanet"]
IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu", "pallas_gpu"]
# H, heads of k and v, K, V: groups of 4 and 2, and of 1 and 4
SIZES, SMALL = [(4, 1, 2, 80, 64), (4, 4, 1, 64, 80)], (4, 1, 2, 8, 6)
FORMS = [(op, form, SIZES[0], True) for op in OPS[:2] for form in IMPLEMENTATIONS]
FORMS += [(op, "pallas_tpu", sizes, True) for op, sizes in (*((op, SIZES[1]) for op in OPS), (OPS[2], SIZES[0]))]
FORMS += [("gated_kalmanet", "pallas_tpu", SIZES[0], False)]
FORMS += [("gated_kalmanet", form, SMALL, True) for form in IMPLEMENTATIONS if form != "pallas_tpu"]
SCALARS = {
    "linear_attention": ("log_decay", "value_scale"),
    "gated_delta_rule": ("log_decay", "beta"),
    "gated_kalmanet": ("alpha", "log_decay", "beta"),
}


def draw(op, T, sizes, scalars=True, seed=0):
    """(arguments by name, initial state, segment ids) in float64: unit keys, gates in (0, 1), segments of 3, 1 and more tokens."""
    H, Hk, Hv, K, V = sizes
    rng = np.random.default_rng(seed)
    inputs = {n: rng.standard_normal((1, T, *size)) for n, size in dict(q=(H, K), k=(Hk, K), v=(Hv, V)).items()}
    inputs |= {n: inputs[n] / np.linalg.norm(inputs[n], axis=-1, keepdims=True) for n in "qk"}
    inputs |= {n: rng.uniform(0, 1, (1, T, H)) * (-0.3 if n == "log_decay" else 1) for n in SCALARS[op]}
    if op == "linear_attention":
        inputs["skip"] = rng.standard_normal(H)
    if not scalars:
        for name in ("value_scale", "skip", *(("beta",) if op == "gated_kalmanet" else ())):
            inputs.pop(name, None)
    kk, kv = rng.standard_normal((1, H, K, K)), rng.standard_normal((1, H, K, V))
    ids = np.repeat([4, 2, 9], [min(3, T - 1), min(1, T - 1), max(1, T - 4)])[None, :T]
    return inputs, ((kk @ kk.swapaxes(-1, -2), kv) if op == "gated_kalmanet" else kv), jnp.asarray(ids)


def cast(x, dtype):
    """Token arrays q, k, v in a dtype; states and scalars in float32, unless it is float64."""
    wide = dtype if dtype == "float64" else "float32"
    return {n: jnp.asarray(a, dtype if n in ("q", "k", "v") else wide) for n, a in x.items()}


def few(op):
    return dict(num_iter=4) if op.startswith("gated_kalmanet") else {}


def by_hand(op, inputs, **options):
    """The operation on keys and values that are repeated and scaled before it, the skip added after it."""
    x, H = dict(inputs), inputs["q"].shape[-2]
    x |= {n: jnp.repeat(x[n], H // x[n].shape[-2], axis=-2) for n in ("k", "v") if n in x}
    v, skip = x["v"], x.pop("skip", None)
    if op.startswith("gated_kalmanet") and "beta" in x:
        beta = x.pop("beta")[..., None]
        x |= {n: beta * x[n] for n in "kv"}
    if "value_scale" in x:
        x["v"] = x.pop("value_scale")[..., None] * v
    o, state = getattr(kp, op)(**x, **options, **few(op))
    return (o if skip is None else o + skip[:, None] * v), state


def cotangents(out, op):
    rng = np.random.default_rng(5)
    found = [rng.standard_normal(x.shape) for x in jax.tree.leaves(out)]
    if op == "gated_kalmanet":
        found[1] = found[1] + found[1].swapaxes(-1, -2)  # H is symmetric
    arrays = [jnp.asarray(x, y.dtype) for x, y in zip(found, jax.tree.leaves(out), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(out), arrays)


@functools.cache
def exact(op, T, sizes, scalars):
    """The output, the states and all gradients in float64, token by token, repeated and scaled by hand."""
    inputs, state, ids = draw(op, T, sizes, scalars)
    with jax.enable_x64(True):
        inputs, state = cast(inputs, "float64"), jax.tree.map(jnp.asarray, state)
        run = lambda x, s: by_hand(op, x, initial_state=s, segment_ids=ids, implementation="reference")  # noqa: E731
        out, pull = jax.vjp(run, inputs, state)
        return jax.tree.map(np.asarray, (out, pull(cotangents(out, op))))


@pytest.mark.parametrize("op, implementation, sizes, scalars", FORMS, ids=str)
def test_outputs_states_and_gradients_are_those_of_repeated_heads_in_float64(op, implementation, sizes, scalars):
    """A chunk and a rest in the kernels of a TPU, packed segments, an initial state, scalars of the values."""
    T = 131 if implementation == "pallas_tpu" else 9
    inputs, state, ids = draw(op, T, sizes, scalars)
    state = jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), state)

    def run(x, s):
        return getattr(kp, op)(**x, initial_state=s, segment_ids=ids, implementation=implementation, **few(op))

    out, pull = jax.vjp(run, cast(inputs, "float32"), state)
    got = out, pull(cotangents(out, op))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(exact(op, T, sizes, scalars)), strict=True):
        assert a.shape == b.shape and relative_error(a, b) < 2e-5, path


def weights_of_all_tokens(q, k, v, log_decay, own_scale, skip, value_scale=None, *, state, ids, together):
    """Linear attention of scale 0.5 with all weights of a row at once: value_scale for the inputs of earlier steps, own_scale for
    those of an output's own step."""
    q, k, v, S = q[0], *(jnp.repeat(x[0], q.shape[2] // x.shape[2], axis=1) for x in (k, v)), state[0]
    a, u = jnp.cumsum(log_decay[0], axis=0), own_scale[0]
    w = jnp.ones_like(u) if value_scale is None else value_scale[0]
    segment, step = jnp.cumsum(jnp.pad(ids[0, 1:] != ids[0, :-1], (1, 0))), jnp.arange(len(q)) // together
    earlier = ((step[:, None] > step) & (segment[:, None] == segment))[..., None]
    own = (step[:, None] == step)[..., None]
    M = jnp.where(earlier, jnp.exp(jnp.where(earlier, a[:, None] - a, 0)) * w, jnp.where(own, u, 0))
    o = jnp.einsum("thk,ihk,tih,ihv->thv", q, k, M, v) + jnp.einsum("thk,th,hkv->thv", q, jnp.exp(a) * (segment == 0)[:, None], S)
    kept, total = jnp.exp(a[-1] - a) * w * (segment == segment[-1])[:, None], jnp.exp(a[-1]) * (segment[-1] == 0)
    S = total[:, None, None] * S + jnp.einsum("ih,ihk,ihv->hkv", kept, k, v)
    return (0.5 * o + skip[:, None] * v)[None], S[None]


OWN = [(form, together, True) for form in IMPLEMENTATIONS for together in (1, 2)]
OWN += [("pallas_tpu", 1, False), ("pallas_tpu", 4, False), ("pallas_tpu", 3, True), ("xla", 3, False)]


@pytest.mark.parametrize("implementation, together, scaled", OWN)
def test_a_token_s_own_step_has_weights_of_its_own(implementation, together, scaled):
    """Packed segments, an initial state, grouped heads; steps of three tokens do not fill a chunk of the kernels of a TPU."""
    T = 132 if implementation == "pallas_tpu" else 12
    inputs, state, _ = draw("linear_attention", T, (4, 2, 1, 16, 12))
    inputs["own_scale"] = np.random.default_rng(7).uniform(-1, 1, (1, T, 4))
    inputs["log_decay"][:, np.arange(T) % together != 0] = 0
    first = (np.arange(T) % together == 0)[:, None]
    ids = jnp.asarray(np.repeat([3, 5, 4], [together, 2 * together, T - 3 * together])[None])
    if not scaled:
        del inputs["value_scale"]

    def results(function, dtype):
        run = lambda x, s: function(**(x | dict(log_decay=x["log_decay"] * first)), state=s)  # noqa: E731
        out, pull = jax.vjp(run, cast(inputs, dtype), jnp.asarray(state, dtype))
        return jax.tree.map(np.asarray, (out, pull(cotangents(out, "linear_attention"))))

    def operation(state, **x):
        options = dict(scale=0.5, initial_state=state, segment_ids=ids, implementation=implementation, together=together)
        return kp.linear_attention(**x, **options)

    with jax.enable_x64(True):
        want = results(functools.partial(weights_of_all_tokens, ids=ids, together=together), "float64")
    for (path, a), b in zip(jax.tree.leaves_with_path(results(operation, "float32")), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and relative_error(a, b) < 2e-5, path


@pytest.mark.parametrize(
    "op, implementation",
    [(op, form) for op in OPS[:2] for form in IMPLEMENTATIONS] + [("gated_kalmanet", form) for form in ("reference", "pallas_tpu")],
)
def test_a_group_s_gradients_are_added_up_before_they_are_rounded_to_bfloat16(op, implementation):
    """Two heads whose gradients cancel, and one whose gradient is too small to survive between them in bfloat16."""
    inputs, _, _ = draw(op, 5, (4, 1, 1, 8, 8), scalars=False)
    for name in inputs.keys() - {"k", "v"}:
        inputs[name][:, :, 2] = inputs[name][:, :, 0]
    low = cast(inputs, "bfloat16")
    o, pull = jax.vjp(lambda x: getattr(kp, op)(**x, implementation=implementation, **few(op))[0], low)
    small, large = np.zeros(o.shape), np.zeros(o.shape)
    rng = np.random.default_rng(0)
    small[:, :, 1] = 2.0**-10 * rng.standard_normal(o[:, :, 1].shape)
    large[:, :, 0] = rng.standard_normal(o[:, :, 0].shape)
    large[:, :, 2] = -large[:, :, 0]
    (want,), (got,) = (pull(jnp.asarray(d, o.dtype)) for d in (small, small + large))
    for name in "kv":
        assert relative_error(got[name].astype(jnp.float32), want[name].astype(jnp.float32)) < 2e-2, name


def test_the_kernel_of_a_tpu_rounds_keys_and_values_times_beta_as_the_other_forms_do():
    """The states are equal to the last bit: in bfloat16 beta itself is not rounded before it multiplies."""
    inputs, _, _ = draw("gated_kalmanet", 5, (2, 1, 1, 8, 8))
    low = cast(inputs, "bfloat16")
    beta = low.pop("beta")
    scaled = low | {n: gated(low[n], beta, 2) for n in "kv"}
    run = functools.partial(kp.gated_kalmanet, implementation="pallas_tpu", num_iter=0)
    for got, want in zip(jax.tree.leaves(run(**low, beta=beta)), jax.tree.leaves(run(**scaled)), strict=True):
        assert np.array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_two_uses_of_the_values_add_up_before_they_are_rounded():
    """The skip's gradient and the state's: the sum is as exact as one rounding allows."""
    inputs, _, _ = draw("linear_attention", 5, (2, 2, 2, 8, 8))
    low = cast(inputs, "bfloat16")
    for implementation in ("xla", "pallas_tpu"):
        run = lambda x, form: kp.linear_attention(**x, implementation=form)[0]  # noqa: E731
        o, pull = jax.vjp(functools.partial(run, form=implementation), low)
        wide, exactly = jax.vjp(functools.partial(run, form="reference"), cast(inputs | {n: low[n] for n in "qkv"}, "float32"))
        (got,), (want,) = pull(jnp.ones_like(o)), exactly(jnp.ones_like(wide))
        assert relative_error(o.astype(jnp.float32), wide) < 4e-3
        for name in low:
            assert relative_error(got[name].astype(jnp.float32), want[name]) < 5e-3, (implementation, name)


@pytest.mark.parametrize("implementation", STEPS)
@pytest.mark.parametrize("op", OPS)
def test_a_step_of_grouped_heads_is_that_of_repeated_ones(op, implementation):
    inputs, state, _ = draw(op, 2, (4, 2, 1, 8, 16))
    token = {n: x if n == "skip" else x[:, 0] for n, x in cast(inputs, "float32").items()}
    state = jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), state)
    got = getattr(kp, f"{op}_step")(**token, state=state, implementation=implementation, **few(op))
    want = by_hand(f"{op}_step", token, state=state)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("op", OPS)
def test_a_summary_of_grouped_heads_does_to_a_state_what_their_tokens_do(op):
    inputs, state, _ = draw(op, 7, (4, 2, 1, 6, 5))
    inputs, state = cast(inputs, "float32"), jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), state)
    A, b = getattr(kp, f"{op}_summary")(**{n: x for n, x in inputs.items() if n not in ("q", "alpha", "skip")})
    _, want = getattr(kp, op)(**inputs, initial_state=state)
    for s, add, end in zip(*map(jax.tree.leaves, (state, b, want)), strict=True):
        moved = A @ s if A.ndim == s.ndim else A[..., None, None] * s
        assert relative_error(moved + add, end) < 1e-5


def test_mamba2_takes_fewer_heads_of_x_than_of_dt():
    rng = np.random.default_rng(0)
    x, b, c = (jnp.asarray(rng.standard_normal((2, 5, h, 3)), jnp.float32) for h in (2, 1, 4))
    dt, a, d = (jnp.asarray(rng.uniform(0.1, 1, s), jnp.float32) for s in ((2, 5, 4), 4, 4))
    got = kp.ssd(x, dt, -a, b, c, d)
    want = kp.ssd(repeat_heads(x, 4), dt, -a, repeat_heads(b, 4), c, d)
    assert all(relative_error(g, w) < 1e-6 for g, w in zip(got, want, strict=True))
    o, _ = kp.ssd_step(*(y[:, 0] for y in (x, dt)), -a, b[:, 0], c[:, 0], d, state=jnp.zeros((2, 4, 3, 3)))
    assert relative_error(o, got[0][:, 0]) < 1e-6


@pytest.mark.parametrize(
    "H, Hk, D, kept",
    [
        (32, 8, 128, 8),
        (32, 8, 80, 8),
        (32, 8, 64, 8),
        (28, 4, 128, 4),
        (40, 8, 128, 8),
        (32, 1, 128, 32),
        (2, 1, 64, 2),
        (26, 2, 128, 26),
    ],
)
def test_the_tpu_kernels_read_complete_groups_or_repeated_heads(H, Hk, D, kept):
    """40 heads in groups of 5 go five to a step, not eight; groups larger than a step, or of half a register, are repeated."""
    q, k = (jax.ShapeDtypeStruct((1, 128, n, D), jnp.bfloat16) for n in (H, Hk))
    read, _ = jax.eval_shape(lambda q, k: mosaic.complete_groups(q, k, k, 8), q, k)
    assert read.shape == (1, 128, kept, D)


@pytest.mark.parametrize("op", OPS)
def test_heads_that_do_not_divide_are_refused(op):
    inputs, state, _ = draw(op, 5, (4, 2, 2, 4, 4), scalars=False)
    inputs = cast(inputs, "float32")
    for name in "kv":
        wrong = inputs | {name: jnp.ones((1, 5, 3, 4))}
        with pytest.raises(ValueError, match=f"{op}: the heads of {name} must be a divisor of q's 4, got 3"):
            getattr(kp, op)(**wrong)
        token = {n: x[:, 0] for n, x in wrong.items()}
        with pytest.raises(ValueError, match=f"{op}_step: the heads of {name} must be a divisor of q's 4, got 3"):
            getattr(kp, f"{op}_step")(**token, state=state)
        with pytest.raises(ValueError, match=f"{op}_summary: the heads of {name} must be a divisor of log_decay's 4, got 3"):
            getattr(kp, f"{op}_summary")(**{n: x for n, x in wrong.items() if n not in ("q", "alpha")})


def test_scalars_of_the_wrong_shape_are_refused():
    inputs, state, _ = draw("linear_attention", 5, (4, 2, 2, 4, 4))
    inputs = cast(inputs, "float32")
    for name, wrong, want in (
        ("value_scale", jnp.ones((1, 5, 1)), r"\[B, T, H\] = \(1, 5, 4\)"),
        ("own_scale", jnp.ones((1, 5, 2)), r"\[B, T, H\] = \(1, 5, 4\)"),
        ("skip", jnp.ones(1), r"\[H\] = \(4,\)"),
        ("together", 5, "1 without own_scale, with it a divisor of the tokens, got 5 for 5 tokens"),
    ):
        with pytest.raises(ValueError, match=f"linear_attention: {name} must be {want}"):
            kp.linear_attention(**(inputs | {name: wrong}))
    with pytest.raises(ValueError, match="together must be .* a divisor of the tokens, got 2 for 5 tokens"):
        kp.linear_attention(**inputs, own_scale=inputs["value_scale"], together=2)
    kalmanet, _, _ = draw("gated_kalmanet", 5, (4, 2, 2, 4, 4))
    with pytest.raises(ValueError, match=r"gated_kalmanet: beta must be \[B, T, H\] = \(1, 5, 4\), got \(1, 5, 2\)"):
        kp.gated_kalmanet(**(cast(kalmanet, "float32") | {"beta": jnp.ones((1, 5, 2))}))
