"""Mutations of the operations: references, chunked forms and their gradients, TPU kernels."""

from tests.mutations import Mutation

GOLDEN, PROPERTIES, PALLAS = "tests/kernels/test_golden_ops.py", "tests/kernels/test_properties.py", "tests/kernels/test_pallas.py"
MANY = "tests/kernels/test_many_chunks.py"
CHUNKS, LINEAR = "kernels_pallas/chunks.py", "kernels_pallas/linear_attention/chunked.py"
EXTREMES, MESHES = "tests/kernels/test_extremes.py", "tests/kernels/test_meshes.py"
WEAK_KEY = f"{EXTREMES}::test_a_zero_key_after_a_strong_decay_still_solves_for_what_is_left"
NORMS, STEP = "kernels_pallas/gated_kalmanet/tpu_norms.py", "kernels_pallas/gated_kalmanet/tpu_step.py"
SOLVERS = "tests/kernels/test_solvers.py"
KALMANET, CHEBYSHEV = "kernels_pallas/gated_kalmanet/chunked.py", "kernels_pallas/gated_kalmanet/chebyshev.py"

MUTATIONS = [
    Mutation(
        CHUNKS,
        "coarse = jax.lax.stop_gradient(jnp.round(g * 64) / 64)",
        "coarse = jax.lax.stop_gradient(jnp.zeros_like(g))",
        "cumulative decays lose their last bits",
        (PROPERTIES,),
    ),
    Mutation(
        CHUNKS,
        "sees_start, survives, through = seg == carried, seg == seg[..., -1:], (seg[..., -1:] == carried)[..., 0]",
        "sees_start, survives, through = seg == carried, seg == seg, (seg[..., -1:] == carried)[..., 0]",
        "earlier segments stay in the state",
        (PROPERTIES,),
    ),
    Mutation(
        CHUNKS,
        "inside &= seg[..., :, None] == seg[..., None, :]",
        "inside &= seg[..., :, None] >= seg[..., None, :]",
        "a segment sees the one before it",
        (PROPERTIES,),
    ),
    Mutation(
        CHUNKS,
        "jnp.tril(jnp.ones((chunk_size, chunk_size), bool))",
        "jnp.tril(jnp.ones((chunk_size, chunk_size), bool), -1)",
        "a token does not see itself",
        (GOLDEN,),
    ),
    Mutation(
        CHUNKS,
        "return total[..., None, None] * state + update, state",
        "return total[..., None, None] * state + update, total[..., None, None] * state + update",
        "a chunk starts from the state at its end",
        (GOLDEN, PROPERTIES),
    ),
    Mutation(CHUNKS, "- carried[..., None]  # the", "# the", "packed rows lose the state at every chunk on a CPU", (PROPERTIES,)),
    Mutation(LINEAR, "dK = kept + matmul", "dK = matmul", "keys get no gradient from later chunks", (MANY,)),
    Mutation(LINEAR, "dV = dV + decay.keep", "dV = dV + 0 * decay.keep", "values get no gradient from later chunks", (MANY,)),
    Mutation(
        LINEAR,
        "+ decay.total * jnp.sum(dH * H0, axis=(-2, -1))",
        "",
        "decays get no gradient from the state that passes a chunk",
        (MANY,),
    ),
    Mutation(
        LINEAR,
        "- jnp.sum(E, axis=-2) - kept",
        "- jnp.sum(E, axis=-2)",
        "decays get no gradient from what a chunk keeps",
        (MANY,),
    ),
    Mutation(
        CHEBYSHEV,
        "s = 1.0 / (F * (ridge_strength + 0.5))",
        "s = 1.0 / (F * (ridge_strength + 1.0))",
        "the first step of the solve is too short",
        (GOLDEN,),
    ),
    Mutation(
        CHEBYSHEV,
        "- (omega - 1.0) * previous, x, omega",
        "- omega * previous, x, omega",
        "the iteration forgets its momentum",
        (GOLDEN,),
    ),
    Mutation(
        "kernels_pallas/gated_kalmanet/solvers.py",
        '"chebyshev": {"fast": 8',
        '"chebyshev": {"fast": 0',
        "no iteration of the fast solve is accurate",
        (PALLAS,),
    ),
    Mutation(
        "kernels_pallas/gated_kalmanet/conjugate_gradients.py",
        "r + new / jnp.maximum(old, LEAST) * p, new",
        "r, new",
        "conjugate gradients are steepest descent",
        (f"{SOLVERS}::test_eighteen_iterations_are_as_exact_as_thirty_of_chebyshev",),
    ),
    Mutation(
        "kernels_pallas/gated_kalmanet/tpu_solve.py",
        "scale[h] = scale[h] * largest",
        "scale[h] = scale[h] * 1.0",
        "the solution is of a right-hand side whose largest entry is 1",
        (f"{SOLVERS}::test_gradients_are_the_implicit_ones_of_the_reference_however_small[pallas_tpu]",),
    ),
    Mutation(KALMANET, "return (w, *pull(-w))", "return (w, *pull(w))", "the solve's gradient has the wrong sign", (GOLDEN,)),
    Mutation(
        KALMANET,
        "ridge_strength * (norms if bp_lambda else jax.lax.stop_gradient(norms))",
        "ridge_strength * jax.lax.stop_gradient(norms)",
        "bp_lambda is ignored",
        (GOLDEN, PROPERTIES),
    ),
    Mutation(KALMANET, "2 * rho * cross", "rho * cross", "the norm counts its cross term once", (GOLDEN, PROPERTIES)),
    Mutation(
        KALMANET, "bp_lambda, solver) - q)", "bp_lambda, solver))", "alpha adds the solution instead of interpolating", (GOLDEN,)
    ),
    Mutation(
        "kernels_pallas/linear_attention/reference.py",
        "jnp.where(begin.reshape(-1, *(1,) * (s.ndim - 1)), 0, s)",
        "s",
        "the reference does not reset the state of a segment",
        (PROPERTIES,),
    ),
    Mutation(
        "kernels_pallas/mamba3/__init__.py",
        "causal * both[:, :, None, None]",
        "both[:, :, None, None]",
        "an output of Mamba-3 loses what later inputs of its own token add",
        ("tests/kernels/test_mamba3.py",),
    ),
    Mutation(
        "kernels_pallas/mamba3/rotation.py",
        "(angle - turns * HIGH) - turns * LOW",
        "angle - turns * TURN",
        "angles lose digits with every turn",
        ("tests/kernels/test_mamba3.py::test_angles_of_long_rows_lose_no_digits",),
    ),
    Mutation(
        "kernels_pallas/ssd.py",
        "(x * dt[..., None]).astype(x.dtype), dt * a",
        "x, dt * a",
        "dt does not scale the input",
        (PROPERTIES, "tests/convert/test_hmf.py"),
    ),
    Mutation(
        "kernels_pallas/short_conv/__init__.py",
        'short_conv_update(*alike("short_conv_step", x, weight, bias, state.astype(x.dtype)))',
        'short_conv_update(*alike("short_conv_step", x, weight[:, ::-1], bias, state.astype(x.dtype)))',
        "decoding convolves backwards in time",
        (PROPERTIES,),
    ),
    Mutation(
        NORMS,
        "jnp.where(s > 0, w.beta, 0.0)",
        "jnp.where(s >= 0, w.beta, 0.0)",
        "a key of zeros in a weak state has no finite gradient",
        (f"{WEAK_KEY}[pallas_tpu]",),
    ),
    Mutation(
        NORMS,
        "lambda h, t, k, u, w: w.weak * (t * h",
        "lambda h, t, k, u, w: w.weak * (t * t * h",
        "the norm's gradient of the state is squared",
        (f"{PALLAS}::test_outputs_states_and_gradients_equal_the_float64_recurrence[gated_kalmanet-pallas_tpu-float32-0.3]",),
    ),
    Mutation(
        STEP,
        "n * (2.0**30 / unit)",
        "n * (2.0**29 / unit)",
        "the step's norm is scaled back by another power",
        (f"{PALLAS}::test_a_step_on_tpu_equals_the_recurrence_and_has_its_gradient",),
    ),
    Mutation(
        CHEBYSHEV,
        "alive = norm > empty_norm(norm.dtype)",
        "alive = norm > 1e-20",
        "a weak state counts as empty",
        (f"{WEAK_KEY}[reference]",),
    ),
    Mutation(
        "kernels_pallas/linear_attention/__init__.py",
        "jnp.pad(g[:, 1:], ((0, 0), (0, 1), (0, 0)))",
        "g",
        "a summary decays every token once too often",
        (f"{EXTREMES}::test_a_summary_after_a_strong_decay_is_exact",),
    ),
    Mutation(
        "kernels_pallas/linear_attention/__init__.py",
        "jnp.where(last == 0, total, 0)",
        "total",
        "a state passes the segment that begins after it, from device to device",
        ("tests/parallel/test_parts.py::test_a_summary_does_to_a_state_what_the_tokens_do",),
    ),
    Mutation(
        "kernels_pallas/arguments.py",
        "math.isfinite(scale) and scale != 0",
        "math.isfinite(scale)",
        "a scale of 0, by which gradients are divided, is accepted",
        (f"{PROPERTIES}::test_options_that_mean_nothing_are_refused_by_name",),
    ),
    Mutation(
        "kernels_pallas/ssd.py",
        "y + (d[:, None] * x)",
        "y - (d[:, None] * x)",
        "the skip has the wrong sign",
        (f"{PROPERTIES}::test_the_recurrence_is_the_formula",),
    ),
    Mutation(
        "kernels_pallas/short_conv/chunked.py",
        "jnp.where((_owner(segments, W)[:, T:] == segments[:, -1:])[..., None], tail, 0)",
        "tail",
        "the convolution's state has inputs of earlier segments",
        (f"{PROPERTIES}::test_a_convolution_carries_on_inputs_of_the_last_segment_only",),
    ),
    Mutation(
        "hybrid_jax/parallel/tiles.py",
        'alike("loss_of_logits", tuple(jnp.zeros(x.shape, dtype) for x in arrays), arrays)',
        "(tuple(jnp.zeros(x.shape, dtype) for x in arrays), None)",
        "a loss has no gradient inside a shard_map that checks varying axes",
        (f"{MESHES}::test_tiled_attention_and_loss_in_a_shard_map_that_checks_varying_axes_are_those_without",),
    ),
]
