"""Mutations of the operations: references, chunked forms and their gradients, TPU kernels."""

from tests.mutations import Mutation

GOLDEN, PROPERTIES, PALLAS = "tests/kernels/test_golden_ops.py", "tests/kernels/test_properties.py", "tests/kernels/test_pallas.py"
MANY = "tests/kernels/test_many_chunks.py"
GROUPS = "tests/kernels/test_groups.py"
CHUNKS, LINEAR = "kernels_pallas/chunks.py", "kernels_pallas/linear_attention/chunked.py"
EXTREMES, MESHES = "tests/kernels/test_extremes.py", "tests/kernels/test_meshes.py"
WEAK_KEY = f"{EXTREMES}::test_a_zero_key_after_a_strong_decay_still_solves_for_what_is_left"
NORMS, STEP = "kernels_pallas/gated_kalmanet/tpu_norms.py", "kernels_pallas/gated_kalmanet/tpu_step.py"
HEADS, OF_NORMS = "kernels_pallas/mosaic_norms.py", "tests/kernels/test_norms.py"
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
        "b, x, dt * a, dt)",
        "b, x, dt * a, jnp.ones_like(dt))",
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
        HEADS,
        "jnp.where(positive, 1.0 + norm.eps * inverse, 0.0)",
        "1.0",
        "eps outside the root has the gradient of eps inside",
        (
            f"{OF_NORMS}::test_the_convolution_and_its_norm_in_one_kernel_equal_float64_in_packed_rows[l2_eps_outside-128-2-float32]",
        ),
    ),
    Mutation(
        HEADS,
        "jnp.where(first, row_sum(jnp.where(first, x, 0.0)), row_sum(jnp.where(first, 0.0, x)))",
        "row_sum(x)",
        "two heads of 64 channels are normed together",
        (f"{OF_NORMS}::test_the_gated_norm_equals_float64",),
    ),
    Mutation(
        "kernels_pallas/rms_norm/tpu.py",
        "drows + dtotal[0][0].astype(jnp.float32) if dtotal else drows",
        "drows",
        "the sum before a norm passes no gradient on",
        (f"{OF_NORMS}::test_the_hidden_norm_and_the_sum_before_it_equal_float64[128-float32]",),
    ),
    Mutation(
        "kernels_pallas/short_conv/tpu.py",
        "initial[0], _inputs(before[0], added, norm)[0])",
        "initial[0], _inputs(before[0], added, None)[0])",
        "the backward pass takes inputs before a block that are not normed",
        (f"{OF_NORMS}::test_the_convolution_and_its_norm_in_one_kernel_equal_float64_in_packed_rows[rms-128-2-float32]",),
    ),
    Mutation(
        "kernels_pallas/qk_norm_rope/tpu.py",
        "d * c + pltpu.roll(d * s, D // 2, 1)",
        "d * c - pltpu.roll(d * s, D // 2, 1)",
        "the gradient is rotated the wrong way",
        (f"{OF_NORMS}::test_queries_and_keys_normed_and_rotated_in_one_kernel_equal_float64",),
    ),
    Mutation(
        "kernels_pallas/gated_rms_norm/tpu.py",
        "(dx * x * slope)",
        "(dx * g * slope)",
        "a gate before the norm gets another gradient",
        (f"{OF_NORMS}::test_the_gated_norm_equals_float64",),
    ),
    Mutation(
        NORMS,
        "jnp.where(square > 0, d.mask * small, 0.0)",
        "d.mask * small",
        "a key of zeros in a weak state has no finite gradient",
        (f"{WEAK_KEY}[pallas_tpu]",),
    ),
    Mutation(
        NORMS,
        "w.weak * (t * h + dot(",
        "w.weak * (t * t * h + dot(",
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
        "kernels_pallas/linear_attention/composed.py",
        "+ skip[:, None] * wide",
        "- skip[:, None] * wide",
        "the skip has the wrong sign",
        (f"{PROPERTIES}::test_the_recurrence_is_the_formula",),
    ),
    Mutation(
        "kernels_pallas/short_conv/chunked.py",
        "jnp.where((_owner(segments, W)[:, segments.shape[1] :] == segments[:, -1:])[..., None], tail, 0)",
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
    Mutation(
        "kernels_pallas/heads.py",
        "jnp.sum(groups.astype(jnp.promote_types(d.dtype, jnp.float32)), axis=-2)",
        "sum(groups[..., i, :] for i in range(H // heads))",
        "the gradients of a group are added up in bfloat16",
        (f"{GROUPS}::test_a_group_s_gradients_are_added_up_before_they_are_rounded_to_bfloat16",),
    ),
    Mutation(
        "kernels_pallas/mosaic_chunk.py",
        "functools.reduce(jnp.add, values[h * group : (h + 1) * group])",
        "values[h * group]",
        "a group's keys have the gradient of its first head only",
        (f"{GROUPS}::test_outputs_states_and_gradients_are_those_of_repeated_heads_in_float64",),
    ),
    Mutation(
        "kernels_pallas/mosaic_chunk.py",
        "[slices[h // group] for h in range(heads)]",
        "[slices[h % (heads // group)] for h in range(heads)]",
        "heads of a group are not neighbours",
        (f"{GROUPS}::test_outputs_states_and_gradients_are_those_of_repeated_heads_in_float64",),
    ),
    Mutation(
        "kernels_pallas/gated_kalmanet/tpu_backward.py",
        "store_tokens(ref, each(jnp.multiply, beta, gradients), scale, group)",
        "store_tokens(ref, gradients, scale, 1 * group)",
        "the gradients of Gated KalmaNet's keys and values are those of what beta made of them",
        (f"{GROUPS}::test_outputs_states_and_gradients_are_those_of_repeated_heads_in_float64",),
    ),
    Mutation(
        "kernels_pallas/gated_kalmanet/tpu_backward.py",
        "(b * x.astype(jnp.float32)).astype(x.dtype)",
        "b.astype(x.dtype) * x",
        "beta is rounded before it multiplies keys and values",
        (f"{GROUPS}::test_the_kernel_of_a_tpu_rounds_keys_and_values_times_beta_as_the_other_forms_do",),
    ),
    Mutation(
        "hybrid_jax/parallel/recurrence.py",
        "if x.ndim == 4 and not divides_heads(x.shape[2]) else x",
        "if x.ndim == 4 else x",
        "keys are repeated where the mesh could divide their heads",
        ("tests/distributed/test_groups.py",),
    ),
    Mutation(
        "kernels_pallas/mosaic_chunk.py",
        "[columns[h // group] for h in range(heads)]",
        "[columns[h % (heads // group)] for h in range(heads)]",
        "heads of a group are not neighbours where their tokens are in lanes",
        (f"{GROUPS}::test_outputs_states_and_gradients_are_those_of_repeated_heads_in_float64",),
    ),
    Mutation(
        "kernels_pallas/mosaic_chunk.py",
        "iota(pairs.shape, 0) < iota(pairs.shape, 1)",
        "iota(pairs.shape, 0) <= iota(pairs.shape, 1)",
        "a token decays what it reads of itself",
        (
            "tests/kernels/test_pallas.py::test_outputs_states_and_gradients_equal_the_float64_recurrence[gated_delta_rule-pallas_tpu-float32-0.3]",
        ),
    ),
    Mutation(
        "kernels_pallas/mosaic_chunk.py",
        "seg_row == carried, seg_row == seg_row[:, end]",
        "seg_row == seg_row[:, end], seg_row == carried",
        "the tokens of the last segment read the state before the chunk, those of the first write the one after it",
        (
            "tests/kernels/test_pallas.py::test_outputs_states_and_gradients_equal_the_float64_recurrence[linear_attention-pallas_tpu-float32-0.3]",
        ),
    ),
    Mutation(
        "kernels_pallas/linear_attention/tpu.py",
        "return across - kept + jnp.where(end, at_end, 0.0)",
        "return across - kept",
        "no decay is learned from what is left at the end of a chunk",
        (
            "tests/kernels/test_pallas.py::test_outputs_states_and_gradients_equal_the_float64_recurrence[linear_attention-pallas_tpu-float32-0.3]",
        ),
    ),
    Mutation(
        "kernels_pallas/gated_kalmanet/tpu_backward.py",
        "d.total * h + 0.5 * (a + a.T)",
        "d.total * h + a",
        "the gradient of Gated KalmaNet's state is not symmetric",
        (
            "tests/kernels/test_pallas.py::test_outputs_states_and_gradients_equal_the_float64_recurrence[gated_kalmanet-pallas_tpu-float32-0.3]",
        ),
    ),
    Mutation(
        "kernels_pallas/gated_delta_rule/tpu.py",
        "2 * block + 1  # the columns",
        "2 * block  # the columns",
        "the inverse of a chunk has no blocks beside the diagonal",
        (
            "tests/kernels/test_pallas.py::test_outputs_states_and_gradients_equal_the_float64_recurrence[gated_delta_rule-pallas_tpu-float32-0.3]",
        ),
    ),
]
