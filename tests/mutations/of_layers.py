"""Mutations of the mixers and of the MLPs."""

from tests.mutations import Mutation

HMF, PARITY, INVARIANCE = (
    "tests/convert/test_hmf.py",
    "tests/convert/test_transformers_parity.py",
    "tests/layers/test_invariance.py",
)
PRIMING = "tests/priming/test_priming.py"
ATTENTION, INITIALIZE = "hybrid_jax/layers/attention.py", "hybrid_jax/priming/initialize.py"
MIXING, ROLES = "hybrid_jax/layers/mixing.py", "hybrid_jax/evaluate/instruments/mixing.py"
MATRICES = "tests/layers/test_mixing.py"
EXPERTS, OF_EXPERTS = "hybrid_jax/parallel/experts.py", "tests/parallel/test_experts.py"
PREFILL = f"{INVARIANCE}::test_prefill_in_parts_and_decoding_equal_the_whole"
FORMULAS = "tests/layers/test_formulas.py"
GKA, GDN, MAMBA2 = "hybrid_jax/layers/gka.py", "hybrid_jax/layers/gdn.py", "hybrid_jax/layers/mamba2.py"
DISCRETE = "hybrid_jax/layers/discrete_mamba2.py"
RECURRENT, MLP, BMOJO = "hybrid_jax/layers/recurrent.py", "hybrid_jax/layers/mlp.py", "hybrid_jax/layers/bmojo.py"

HEADS, HYBRID = "tests/layers/test_head_hybrid.py", "hybrid_jax/layers/head_hybrid.py"
QWEN3_NEXT = "tests/convert/test_qwen3_next.py"
NEXT = f"{PARITY}::test_logits_equal_transformers[qwen3 next]"
OWN_HEADS = f"{QWEN3_NEXT}::test_a_gated_deltanet_with_heads_of_its_own_begins_with_attention_s_values_and_outputs"
KEPT = f"{HEADS}::test_kept_heads_compute_what_they_compute_in_the_source"
CONTRACT = "tests/convert/test_family_contract.py"

MUTATIONS = [
    Mutation(ATTENTION, "o * jax.nn.sigmoid(self.g_proj(x))", "o", "attention's output gate is left out", (NEXT,)),
    Mutation(
        MLP,
        "jax.nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)",
        "self.shared_expert(x)",
        "the shared expert is not gated",
        (NEXT,),
    ),
    Mutation(RECURRENT, "(sizes.k, sizes.N) == (H, D)", "True", "queries of other heads are copied to a mixer", (OWN_HEADS,)),
    Mutation(HYBRID, 'in ("q_proj", "g_proj")', 'in ("q_proj",)', "gates of other heads are kept", (QWEN3_NEXT,)),
    Mutation(
        "hybrid_jax/families/base.py",
        "or (i + 1) % step != 0",
        "or i % step != 0",
        "decoder_sparse_step counts from the first layer",
        (f"{QWEN3_NEXT}::test_dense_layers_are_transformers",),
    ),
    Mutation(
        "hybrid_jax/config.py",
        "teachers = {kind: kind for kind in self.source_kinds}",
        "teachers = {}",
        "a source's own recurrent layers learn from attention that they do not have",
        (f"{QWEN3_NEXT}::test_layers_of_the_source_s_own_mixer_run_on_both_streams_of_a_fused_model",),
    ),
    Mutation(
        "hybrid_jax/model.py",
        "out = self.mlp(self.mixer_input(hidden))",
        "out = self.mlp(self.mixer_input(hidden + mixed))",
        "the MLP of a parallel block reads what attention adds",
        (f"{CONTRACT}::test_both_streams_of_a_fused_phi_run_its_parallel_block",),
    ),
    Mutation(
        "hybrid_jax/layers/linear.py",
        "rms_normalize(f - jnp.mean(f, axis=-1, keepdims=True),",
        "rms_normalize(f,",
        "a LayerNorm does not take off the mean",
        (f"{CONTRACT}::test_both_streams_of_a_fused_phi_run_its_parallel_block",),
    ),
    Mutation(
        "hybrid_jax/layers/recurrent.py",
        "(x - jnp.mean(x, axis=-1, keepdims=True)).reshape(maps[name].shape)",
        "x.reshape(maps[name].shape)",
        "mixers begin with queries whose mean a LayerNorm would take off",
        (f"{CONTRACT}::test_mixers_begin_with_what_a_layer_norm_of_each_head_makes_of_queries_but_for_its_bias",),
    ),
    Mutation(
        "hybrid_jax/layers/attention.py",
        "return window if own is None else min(own, window)",
        "return window",
        "SWA shows a layer more tokens than its own window did",
        (f"{CONTRACT}::test_sliding_windows_in_place_of_a_source_s_own_shorter_ones_do_not_show_it_more_tokens",),
    ),
    Mutation(
        "hybrid_jax/layers/linear.py",
        "weight.astype(jnp.float32) + self.offset if self.offset else weight",
        "weight",
        "Gemma's norms multiply by the weight alone",
        (PARITY,),
    ),
    Mutation(
        MAMBA2,
        'source[f"{x}_norm.weight"] + config.norm_offset',
        'source[f"{x}_norm.weight"]',
        "a mixer's norms begin without what Gemma's norms add to their weights",
        ("tests/convert/test_family_contract.py::test_a_mixer_s_norms_begin_with_what_gemma_s_norms_multiply_by",),
    ),
    Mutation(
        ATTENTION,
        "(c.head_dim / c.query_pre_attn_scalar) ** 0.5",
        "(c.head_dim / c.query_pre_attn_scalar)",
        "Gemma's scale of queries is squared",
        (PARITY,),
    ),
    Mutation(
        "hybrid_jax/layers/recurrent.py",
        'x * (source[f"{name[0]}_norm.weight"] + config.norm_offset)',
        "x",
        "mixers ignore the weights of a norm over all heads",
        (
            "tests/convert/test_family_contract.py::"
            "test_mixers_begin_with_the_directions_of_queries_that_a_norm_over_all_heads_gives",
        ),
    ),
    Mutation(
        "hybrid_jax/config.py",
        "if self.window_rope is None or self.attention_windows[layer] is None else self.window_rope",
        "if self.window_rope is None or self.attention_windows[layer] is not None else self.window_rope",
        "layers with and without a window have each other's rotary embedding",
        ("tests/convert/test_transformers_parity.py::test_logits_equal_transformers[olmo3 windowed, tied, two ropes]",),
    ),
    Mutation(
        HYBRID,
        ".set(0)",
        ".set(1e-3)",
        "a kept head counts twice in the sum",
        (f"{HEADS}::test_the_sum_begins_with_every_head_once",),
    ),
    Mutation(
        HYBRID, 'heads if module in ("q_proj", "g_proj") else kv_heads', "kv_heads", "queries of other heads are kept", (KEPT,)
    ),
    Mutation(HYBRID, "return (a * deviation + mean)", "return (a * deviation)", "the mean is not matched", (HEADS,)),
    Mutation(HYBRID, "safe_sqrt(", "jnp.sqrt(", "the deviation has no gradient at 0", (HEADS,)),
    Mutation(
        ATTENTION,
        "None if len({found.count(h) for h in found}) == 1 else found",
        "None",
        "unequal groups are not repeated",
        (KEPT,),
    ),
    Mutation(
        INITIALIZE,
        "new.kind in old.kinds and new.attention_heads != old.attention_heads",
        "False",
        "a mixer becomes a hybrid of heads without attention to take them from",
        (f"{HEADS}::test_only_attention_becomes_a_hybrid_of_heads",),
    ),
    Mutation(
        GKA,
        'beta = jax.nn.sigmoid(y["b"]) + 1e-6 if "b" in y else None',
        "beta = None",
        "beta does not gate k and v",
        (HMF,),
    ),
    Mutation(
        GKA,
        "jnp.ones((B, T, H), jnp.float32)",
        "jnp.zeros((B, T, H), jnp.float32)",
        "without the alpha connection the solve is left out",
        (FORMULAS,),
    ),
    Mutation(
        GKA,
        "self.sizes.N**-0.5 if self.config.options(GKAConfig).gla_rescale else 1.0",
        "self.sizes.N**-0.5",
        "gla_rescale is ignored",
        (FORMULAS,),
    ),
    Mutation(
        GKA,
        'HeadNorm("l2", N, eps_outside=True)',
        'HeadNorm("l2", N)',
        "q and k are normalized with another epsilon",
        (FORMULAS, HMF),
    ),
    Mutation(
        "hybrid_jax/layers/linear.py",
        "together = dict(zip(small, ",
        "together = dict(zip(small[::-1], ",
        "joint products give their parts in another order",
        ("tests/layers/test_tpu_path.py",),
    ),
    Mutation(
        "hybrid_jax/parallel/norms.py",
        "return q.swapaxes(1, 2), k.swapaxes(1, 2)",
        "return q.reshape(q.shape[0], q.shape[2], q.shape[1], -1), k.swapaxes(1, 2)",
        "heads and tokens of queries are mixed up",
        (FORMULAS, "tests/layers/test_tpu_path.py"),
    ),
    Mutation(
        "kernels_pallas/gated_rms_norm/reference.py",
        "(rms_normalize(o, weight, eps) * jax.nn.silu(gate))",
        "(rms_normalize(o, weight, eps) * jax.nn.sigmoid(gate))",
        "the output gate is a sigmoid",
        (HMF,),
    ),
    Mutation(
        GKA,
        "num_iter = self.num_iter if",
        "num_iter = self.num_iter - 1 if",
        "one iteration of the solve is missing",
        (HMF, FORMULAS),
    ),
    Mutation(GDN, "beta = 2 * beta", "beta = 1 * beta", "allow_neg_eigval is ignored", (FORMULAS,)),
    Mutation(
        GDN,
        'HeadNorm("l2", N)',
        'HeadNorm("l2", N, eps_outside=True)',
        "q and k are normalized with another epsilon",
        (FORMULAS, HMF),
    ),
    Mutation(
        GDN,
        "gated_norm(o, self.g_proj(x).reshape(o.shape), self.o_norm.weight[...], self.o_norm.eps)",
        "o * jax.nn.silu(self.g_proj(x).reshape(o.shape))",
        "the output is not normalized",
        (HMF,),
    ),
    Mutation(
        MAMBA2,
        "NORM_EPS, gate_first=True)",
        "NORM_EPS)",
        "the norm comes before the gate",
        (HMF,),
    ),
    Mutation(MAMBA2, "skip = self.D[...]", "skip = 0 * self.D[...]", "the skip D x is missing", (HMF,)),
    Mutation(
        MAMBA2,
        "config.norms_queries(layer) and options.use_qk_norm",
        "config.norms_queries(layer)",
        "use_qk_norm is ignored",
        (FORMULAS, "tests/priming/test_priming.py"),
    ),
    Mutation(
        "kernels_pallas/heads.py",
        "return jnp.repeat(x, H // heads, axis=-2)",
        "return jnp.concatenate([x] * (H // heads), axis=-2)",
        "heads are tiled instead of repeated in place",
        (HMF,),
    ),
    Mutation(RECURRENT, "-jnp.exp(a_log.astype(f32))", "-jnp.exp(-a_log.astype(f32))", "the decay's rate is inverted", (HMF,)),
    Mutation(
        BMOJO,
        "scores(fading_q, fading, W)",
        "scores(fading_q, fading, W - 1)",
        "decoding sees one fading token too many",
        (INVARIANCE,),
    ),
    Mutation(BMOJO, "((0, W), (W, 2 * W))", "((0, W), (W, 2 * W - 1))", "the fading window is one token short", (HMF, INVARIANCE)),
    Mutation(
        BMOJO,
        "_, k, v = self.project(f, positions, suffix, ",
        "_, k, v = self.project(f, positions, ",
        "untied fading keys use the first projections",
        (FORMULAS,),
    ),
    Mutation(MLP, "if moe.norm_topk_prob else weights", "if True else weights", "norm_topk_prob is ignored", (PARITY,)),
    Mutation(
        MLP,
        "jax.nn.softmax(scores, axis=-1)",
        "jax.nn.sigmoid(scores)",
        "the router is a sigmoid",
        (PARITY,),
    ),
    Mutation(
        EXPERTS,
        "return jnp.where(groups.own[..., None], rows[groups.places], 0)",
        "return jnp.where(groups.own[..., None], rows[groups.order].reshape(*groups.own.shape, -1), 0)",
        "experts' rows come back in the order of the experts",
        (PARITY, HMF),
    ),
    Mutation(
        EXPERTS,
        "each = jnp.where(groups.own[..., None], d[groups.places], 0)",
        "each = d[groups.places]",
        "rows of other experts, which nobody computes, are part of the gradient",
        (OF_EXPERTS,),
    ),
    Mutation(EXPERTS, "- counts + jnp.cumsum(sizes)", "+ jnp.cumsum(sizes)", "blocks of choices overlap", (OF_EXPERTS,)),
    Mutation(
        MLP,
        "(self.gate_proj(x)) * self.up_proj(x)",
        "(self.up_proj(x)) * self.gate_proj(x)",
        "gate and up are exchanged",
        (PARITY,),
    ),
    Mutation(
        "kernels_pallas/numerics.py",
        "f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)",
        "f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True)) + eps",
        "epsilon is added after the root",
        (FORMULAS, PARITY),
    ),
    Mutation(
        ATTENTION, "mask & (distance < window)", "mask & (distance <= window)", "a decoded window has one key too many", (PREFILL,)
    ),
    Mutation(
        ATTENTION,
        "min(self.window - 1, max_length)",
        "min(self.window - 2, max_length)",
        "a window's cache is one token short",
        (PREFILL,),
    ),
    Mutation(
        RECURRENT,
        "minval=1e-4, maxval=16.0",
        "minval=1e-4, maxval=8.0",
        "new decays are drawn from half their range",
        (f"{PRIMING}::test_decays_are_drawn_evenly_from_0_to_16_and_steps_log_evenly_from_a_thousandth_to_a_tenth",),
    ),
    Mutation(
        RECURRENT,
        "dt + jnp.log(-jnp.expm1(-dt))",
        "jnp.log(dt)",
        "a new dt_bias is the logarithm, not the inverse of softplus",
        (f"{PRIMING}::test_a_new_step_is_what_softplus_makes_of_its_bias",),
    ),
    Mutation(
        RECURRENT,
        'jnp.repeat(source["v_proj.kernel"], groups, axis=1)',
        'jnp.concatenate([source["v_proj.kernel"]] * groups, axis=1)',
        "the output gate takes v's columns head by head",
        (f"{HMF}::test_stage_0_takes_from_attention_what_the_reference_takes",),
    ),
    Mutation(
        MAMBA2,
        'for ours, x in ("Cq", "Bk")',
        'for ours, x in ("Cq", "Bq")',
        "B takes the norm of q",
        (f"{PRIMING}::test_mamba2_takes_q_k_v_o_and_the_norms_in_its_own_order",),
    ),
    Mutation(
        DISCRETE,
        "-jax.nn.softplus(a.astype(jnp.float32))",
        "-jax.nn.softplus(-a.astype(jnp.float32))",
        "the decay of Discrete Mamba-2 has the wrong sign of a",
        (FORMULAS,),
    ),
    Mutation(
        DISCRETE,
        '"vkq" if sizes',
        '"vqk" if sizes',
        "Discrete Mamba-2 takes keys for queries",
        (f"{PRIMING}::test_discrete_mamba2_takes_v_k_q_of_every_query_head_o_and_their_biases_and_its_gate_is_open",),
    ),
    Mutation(
        DISCRETE,
        "and o.qk_heads in (None, H) else",
        "else",
        "Discrete Mamba-2 takes keys of other heads that are as wide together",
        (f"{PRIMING}::test_a_state_of_discrete_mamba2_that_is_not_attention_s_takes_only_v_and_o",),
    ),
    Mutation(
        "hybrid_jax/priming/fresh.py",
        'stated[f"{module}.kernel"].own_start',
        "False",
        "torch's draws take the place of a mixer's own start",
        (f"{PRIMING}::test_a_new_discrete_mamba2_begins_as_mohawk_s_student_however_other_parameters_are_drawn",),
    ),
    Mutation(
        "hybrid_jax/layers/mamba3.py",
        "rest.at[:, rest.shape[1] - o.angles(D) :].set(0)",
        "rest",
        "a converted Mamba-3 turns its channels from the beginning",
        (f"{PRIMING}::test_mamba3_takes_q_k_v_o_and_the_norms_and_neither_turns_nor_adds_a_bias_at_first",),
    ),
    Mutation(
        "hybrid_jax/parallel/mamba3.py",
        "before[:, 0, :, None, None] * jnp",
        "0 * jnp",
        "a row that continues a state leaves out the product of the token before",
        ("tests/layers/test_invariance.py::test_prefill_in_parts_and_decoding_equal_the_whole",),
    ),
    Mutation(
        "hybrid_jax/layers/mamba3.py",
        "jnp.maximum(_positive(A.astype(f32)), o.decay_floor)",
        "_positive(A.astype(f32))",
        "Mamba-3's decay has no floor",
        ("tests/layers/test_formulas.py::test_a_mixer_is_its_formula",),
    ),
    Mutation(MIXING, "m * weight[..., None]", "m", "what a value is weighted with is no part of the matrix", (MATRICES,)),
    Mutation(MIXING, "m + skip[:, None] * unit", "m + skip[:, None]", "the skip is on every entry of the matrix", (MATRICES,)),
    Mutation(
        MIXING,
        "jnp.repeat(v, groups, axis=2)",
        "jnp.concatenate([v] * groups, axis=2)",
        "values of key heads are tiled instead of repeated in place",
        (MATRICES,),
    ),
    Mutation(
        "hybrid_jax/layers/mamba3.py",
        'jnp.einsum("btohic,hoi->bthc"',
        'jnp.einsum("btohic,hio->bthc"',
        "the factors of inputs and outputs are exchanged",
        (f"{MATRICES}::test_a_mixer_s_output_is_its_matrices_times_its_values",),
    ),
    Mutation(
        ROLES,
        "begins[last] = max(first - key_tokens, 0)",
        "begins[last] = first",
        "a fact is its value without its key",
        ("tests/evaluate/test_mixing.py",),
    ),
    Mutation(
        ROLES,
        "1 - entropy / jnp.log1p(jnp.maximum(position, 1))",
        "1 - entropy / jnp.log(time.size)",
        "rows of equal shares are sharp where few tokens are seen",
        ("tests/evaluate/test_mixing.py",),
    ),
    Mutation(
        "hybrid_jax/priming/fresh.py",
        "shape[1 if taps else 0]",
        "shape[0]",
        "torch's draw of a convolution is bounded by its channels",
        (f"{PRIMING}::test_torch_as_the_option_draws_uniformly_by_the_fan_in_and_changes_nothing_else",),
    ),
]
