"""Mamba-3 equals the released kernels, in every implementation; it is packed, continued and decoded like every recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import angle_sums, mamba3, mamba3_step
from kernels_pallas.contract import Mamba3State
from kernels_pallas.mamba3 import IMPLEMENTATIONS, cumulative_angles, rotate
from tests.conftest import GOLDEN, relative_error

SISO = ("Q", "K", "V", "ADT", "DT", "Trap", "Q_bias", "K_bias", "Angles", "D", "Z")
MIMO = (*SISO, "MIMO_V", "MIMO_O", "MIMO_Z")


def released(z, arrays, **options):
    """The released kernels' function of their arrays, by `mamba3`: biases, skip, gate, and the weights of MIMO are around it."""
    x = dict(arrays)
    if "MIMO_V" not in x:  # R = 1
        x |= {name: x[name][:, :, None] for name in ("Q", "K")} | {name: x[name][:, None] for name in ("Q_bias", "K_bias")}
        x |= dict.fromkeys(("MIMO_V", "MIMO_O", "MIMO_Z"), jnp.ones((x["V"].shape[2], 1, x["V"].shape[3])))
    heads = x["V"].shape[2]
    q, k = (jnp.repeat(x[n], heads // x[n].shape[3], axis=3) + x[f"{n}_bias"].swapaxes(0, 1) for n in "QK")
    v, gate = (x[n][:, :, None] * x[f"MIMO_{n}"].swapaxes(0, 1) for n in "VZ")
    log_decay, dt, trap = (x[n].swapaxes(1, 2) for n in ("ADT", "DT", "Trap"))
    turn = jnp.pi * jnp.tanh(x["Angles"]) * dt[..., None]
    state = None
    if "initial_ssm_state" in z:
        angle, S, last_k, last_v = (jnp.asarray(z[f"initial_{n}_state"]) for n in ("angle", "ssm", "k", "v"))
        state = Mamba3State(angle, S.swapaxes(2, 3), last_k[:, None], last_v[:, None])
    o, state = mamba3(q, k, v, log_decay, dt, jax.nn.sigmoid(trap), turn, initial_state=state, **options)
    o = (o + x["D"][:, None] * v) * jax.nn.silu(gate)
    return jnp.sum(o * x["MIMO_O"].swapaxes(0, 1), axis=2), state


@pytest.mark.parametrize("implementation, chunk", [("reference", None), ("xla", 16), ("pallas_tpu", None), ("pallas_gpu", 32)])
@pytest.mark.parametrize("name", ["mamba3_siso", "mamba3_siso_no_init", "mamba3_mimo"])
def test_output_state_and_gradients_equal_the_released_kernels(name, implementation, chunk):
    with np.load(GOLDEN / "ops" / f"{name}.npz") as file:
        z = dict(file)
    arrays = {n: jnp.asarray(z[n]) for n in (MIMO if "MIMO_V" in z else SISO)}

    @jax.jit
    def run(arrays):
        o, pull, state = jax.vjp(lambda x: released(z, x, implementation=implementation, chunk_size=chunk), arrays, has_aux=True)
        return o, state, pull(jnp.asarray(z["do"]))[0]

    o, state, grads = run(arrays)
    assert relative_error(o, z["o"]) < 1e-6
    assert relative_error(state.S.swapaxes(2, 3), z["final_ssm_state"]) < 2e-6
    assert relative_error(state.angle, z["final_angle_state"] % (2 * np.pi)) < 2e-6
    for got, want in ((state.k, z["final_k_state"]), (state.v, z["final_v_state"])):
        assert relative_error(got, want.swapaxes(1, 2) if want.ndim == 4 else want[:, None]) < 2e-6
    for n, grad in grads.items():
        assert relative_error(grad, z[f"d{n}"]) < 3e-6, n


def draw(T, R=2, A=3, B=2, H=2, K=8, V=4, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(T), 7)
    q, k, v = (jax.random.normal(key, (B, T, R, H, d), dtype) for key, d in zip(keys, (K, K, V), strict=False))
    dt, mix = (jax.nn.sigmoid(jax.random.normal(key, (B, T, H), dtype)) for key in keys[3:5])
    return [q, k, v, -dt, dt, mix, jax.random.normal(keys[6], (B, T, H, A), dtype)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("halves", [False, True])
def test_packed_segments_are_separate_sequences_and_a_state_continues_the_first(implementation, halves):
    given, cuts, options = draw(23), (0, 9, 10, 23), dict(implementation=implementation, halves=halves, chunk_size=16)
    _, state = mamba3(*draw(5), implementation="reference", halves=halves)
    ids = jnp.asarray(np.repeat([[4, 2, 9]], np.diff(cuts), axis=1).repeat(2, axis=0))
    o, final = mamba3(*given, initial_state=state, segment_ids=ids, **options)
    for a, b in zip(cuts, cuts[1:], strict=False):
        alone = [x[:, a:b] for x in given]
        want, last = mamba3(*alone, initial_state=state if a == 0 else None, implementation="reference", halves=halves)
        assert relative_error(o[:, a:b], want) < 1e-5
    for got, want in zip(final, last, strict=True):
        assert relative_error(got, want) < 1e-5


def test_a_token_at_a_time_is_the_sequence_and_the_state_passes_between_parts():
    given = draw(11)
    want, last = mamba3(*given)
    half, state = mamba3(*(x[:, :6] for x in given))
    outs = [half]
    for t in range(6, 11):
        o, state = mamba3_step(*(x[:, t] for x in given), state=state)
        outs.append(o[:, None])
    assert relative_error(jnp.concatenate(outs, axis=1), want) < 1e-6
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(state, last, strict=True))


def test_the_chunked_form_follows_the_float64_recurrence():
    with jax.enable_x64(True):
        given = draw(50, dtype=jnp.float64)
        want, _ = mamba3(*given, implementation="reference")
        got, state = mamba3(*given)
        assert got.dtype == state.S.dtype == jnp.float64 and relative_error(got, want) < 1e-13
        low = mamba3(*(x.astype(jnp.bfloat16) for x in given[:3]), *(x.astype(jnp.float32) for x in given[3:]))
    assert low[0].dtype == jnp.bfloat16 and relative_error(low[0], want) < 2e-2


def test_angles_of_long_rows_lose_no_digits():
    turn = jax.random.uniform(jax.random.key(0), (1, 20_000, 1, 1), maxval=3.0)
    want = np.cumsum(np.asarray(turn, np.float64)) % (2 * np.pi)
    error = np.abs(np.asarray(cumulative_angles(turn)).ravel() - want)
    assert np.minimum(error, 2 * np.pi - error).max() < 3e-4
    plain = np.abs(np.asarray(jnp.cumsum(turn)).ravel() % (2 * np.pi) - want)
    assert np.minimum(plain, 2 * np.pi - plain).max() > 1e-3  # of a plain sum


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
@pytest.mark.parametrize("H, A, T", [(4, 32, 290), (3, 5, 40), (1, 128, 129)])
def test_angle_sums_and_their_gradients_follow_float64_in_packed_rows(implementation, H, A, T):
    """Segments that begin inside a chunk and with one, and one that is longer than a chunk; a state before the first token."""
    rng = np.random.default_rng(0)
    rate, dt, state = rng.standard_normal((2, T, A)), rng.uniform(0, 1, (2, T, H)), rng.uniform(0, 6, (2, H, A))
    ids = np.stack([np.arange(T) // 128, np.searchsorted([7, 8, 150], np.arange(T), side="right")])
    cotangents = rng.standard_normal((2, T, H, A)), rng.standard_normal((2, H, A))

    def run(implementation, dtype):
        given = [jnp.asarray(x, dtype) for x in (rate, dt, state)]
        call = lambda r, d, s: angle_sums(r, d, initial_state=s, segment_ids=ids, implementation=implementation)  # noqa: E731
        (angle, last), pull = jax.vjp(call, *given)
        assert angle.dtype == dtype and np.array_equal(last, angle[:, -1])
        return np.asarray(angle), pull(tuple(jnp.asarray(x, dtype) for x in cotangents))

    with jax.enable_x64(True):
        want, want_grads = run("reference", "float64")
    got, grads = run(implementation, "float32")
    error = np.abs(got - want)
    assert np.minimum(error, 2 * np.pi - error).max() < 5e-5
    assert all(relative_error(a, b) < 2e-6 for a, b in zip(grads, want_grads, strict=True))


def test_angle_sums_of_odd_requests_are_computed_by_the_formulas_or_refused():
    rate, dt = jnp.ones((1, 3, 130)), jnp.ones((1, 3, 2))
    options = dict(implementation="pallas_tpu")
    assert np.array_equal(angle_sums(rate, dt, **options)[0], angle_sums(rate, dt)[0])
    assert angle_sums(rate[..., :0], dt, **options)[0].shape == (1, 3, 2, 0)
    with pytest.raises(ValueError, match=r"rate must be \[B, T, A\], and dt \[B, T, H\] and not empty, got \(1, 3, 130\) and"):
        angle_sums(rate, dt[:, :0])
    with pytest.raises(ValueError, match=r"initial_state must be \[B, H, A\] = \(1, 2, 130\), got \(1, 2, 3\)"):
        angle_sums(rate, dt, initial_state=jnp.ones((1, 2, 3)))


def test_both_pairings_are_rotations_and_the_last_channels_stay():
    x, angle = jax.random.normal(jax.random.key(1), (5, 8)), jnp.asarray([0.5, -2.0, 1.0])
    by_two, by_half = rotate(x, angle, False), rotate(x, angle, True)
    order = np.arange(8).reshape(2, 4).T.ravel()  # channels 0, 4, 1, 5, ...
    assert relative_error(by_half[:, order], rotate(x[:, order], angle, False)) < 1e-6
    turned = (np.asarray(x[:, 0]) + 1j * np.asarray(x[:, 1])) * np.exp(0.5j)
    assert np.allclose(by_two[:, :2], np.stack([turned.real, turned.imag], axis=1), atol=1e-6)
    assert np.array_equal(by_two[:, 6:], x[:, 6:])


def test_shapes_that_do_not_fit_are_named():
    q, k, v, g, dt, mix, turn = draw(4)
    for given, message in (
        ((q[:, :, 0], k, v, g, dt, mix, turn), r"q and v must be \[B, T, R, H, D\] and turn \[B, T, H, A\]"),
        ((q, k, v, g, dt, mix, jnp.zeros((2, 4, 2, 5))), "turn has 5 angles, q 8 channels"),
        ((q, k, v, g, dt[:, :3], mix, turn), r"mamba3: dt must be \[B, T, H\] = \(2, 4, 2\), got \(2, 3, 2\)"),
        ((q[:, :0], k, v, g, dt, mix, turn), "at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            mamba3(*given)
    _, state = mamba3(q, k, v, g, dt, mix, turn)
    with pytest.raises(ValueError, match=r"state.S must be \[B, H, K, V\]"):
        mamba3(q, k, v, g, dt, mix, turn, initial_state=state._replace(S=state.S[..., :2]))
