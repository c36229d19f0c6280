"""Every implementation gives the reference kernels' outputs, states and gradients (tests/golden/README.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from tests.conftest import GOLDEN, relative_error

OPS = {
    "gla": (kernels_pallas.linear_attention, ["q", "k", "v", "log_decay"], 1e-5, 1e-4),
    "gdn": (kernels_pallas.gated_delta_rule, ["q", "k", "v", "log_decay", "beta"], 1e-5, 1e-4),
    "gka": (kernels_pallas.gated_kalmanet, ["q", "k", "v", "alpha", "log_decay"], 5e-5, 1e-4),
}


def load(name):
    with np.load(GOLDEN / "ops" / f"{name}.npz") as z:
        return {k: z[k] for k in z.files}


def options(z):
    extra = {"scale": float(z["scale"])}
    if "num_iter" in z:
        extra |= {"ridge_strength": float(z["ridge_strength"]), "num_iter": int(z["num_iter"])}
    return extra


@pytest.mark.parametrize(
    "implementation, chunk_size", [("reference", None), ("xla", 16), ("xla", 64), ("pallas_tpu", None), ("pallas_gpu", 32)]
)
@pytest.mark.parametrize(
    "name",
    [
        "gla_weak_decay",
        "gla_strong_decay_no_init",
        "gdn_weak_decay",
        "gdn_strong_decay_no_init",
        "gka_30iter",
        "gka_10iter_strong_decay",
    ],
)
def test_output_state_and_gradients_equal_the_reference_kernels(name, chunk_size, implementation):
    z = load(name)
    op, names, tolerance, grad_tolerance = OPS[name[:3]]
    inputs = {n: jnp.asarray(z[n]) for n in names}
    if "initial_state" in z:
        inputs["initial_state"] = jnp.asarray(z["initial_state"])

    def run(inputs):
        return op(**inputs, **options(z), chunk_size=chunk_size, implementation=implementation)

    def objective(inputs):
        o, state = run(inputs)
        total = jnp.sum(o * z["do"])
        return total + jnp.sum(state * z["dfinal_state"]) if "dfinal_state" in z else total

    o, state = jax.jit(run)(inputs)
    assert relative_error(o, z["o"]) < tolerance
    if isinstance(state, tuple):
        assert relative_error(state[0], z["final_h_kk"]) < 1e-5
        assert relative_error(state[1], z["final_h_kv"]) < 1e-5
    else:
        assert relative_error(state, z["final_state"]) < 1e-5
    for n, grad in jax.jit(jax.grad(objective))(inputs).items():
        assert relative_error(grad, z["d" + n]) < grad_tolerance, n


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_packed_segments_equal_the_reference_kernels(implementation):
    """Each golden segment has its own initial state: run alone it must match; packed, so must the first."""
    z = load("gdn_packed")
    names = ["q", "k", "v", "log_decay", "beta"]
    bounds = z["cu_seqlens"]
    ids = np.repeat(np.arange(1, len(bounds)), np.diff(bounds))[None]
    for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        o, state = kernels_pallas.gated_delta_rule(
            *(jnp.asarray(z[n][:, a:b]) for n in names),
            scale=float(z["scale"]),
            initial_state=jnp.asarray(z["initial_state"][i : i + 1]),
            implementation=implementation,
        )
        assert relative_error(o, z["o"][:, a:b]) < 1e-5
        assert relative_error(state, z["final_state"][i : i + 1]) < 1e-5
    o, _ = kernels_pallas.gated_delta_rule(
        *(jnp.asarray(z[n]) for n in names),
        scale=float(z["scale"]),
        segment_ids=jnp.asarray(ids),
        initial_state=jnp.asarray(z["initial_state"][:1]),
        implementation=implementation,
    )
    assert relative_error(o[:, : bounds[1]], z["o"][:, : bounds[1]]) < 1e-5
