"""Mutations of what a mixer takes over from another mixer, and of expanded heads."""

from tests.mutations import Mutation

COPIES, LOW_RANK, FORMULAS = "tests/priming/test_copies.py", "tests/layers/test_low_rank.py", "tests/layers/test_formulas.py"
RECURRENT, OPTIONS, TABLE = "hybrid_jax/layers/recurrent.py", "hybrid_jax/recurrent_options.py", "hybrid_jax/copies.py"
SAME = f"{COPIES}::test_every_parameter_is_that_of_the_deltanet_but_the_gates_that_it_has_not"
BEGINS = f"{LOW_RANK}::test_a_conversion_begins_as_without_the_expansion"

MUTATIONS = [
    Mutation(TABLE, 'renamed={"a_proj.kernel": "gk_proj.kernel"}', "renamed={}", "the decay's projection is drawn anew", (SAME,)),
    Mutation(
        TABLE,
        'taken=("conv_size", "norm_eps", "use_gate", *_HEADS)',
        'taken=("conv_size", "use_gate", *_HEADS)',
        "the output norm has another epsilon than it was trained with",
        (f"{COPIES}::test_options_are_those_of_the_deltanet_and_others_the_gated_kalmanet_s_own",),
    ),
    Mutation(
        TABLE,
        "(fixed or given != getattr(default, name))",
        "given != getattr(default, name)",
        "layers that have the mixer already get other options",
        (f"{COPIES}::test_options_of_layers_that_are_gated_kalmanet_already_do_not_change",),
    ),
    Mutation(
        TABLE,
        "in COPIES and not old.attention_heads",
        "in COPIES",
        "kept heads of attention are dropped",
        (f"{COPIES}::test_pairs_without_a_copy_are_refused_with_those_that_there_are",),
    ),
    Mutation(
        "hybrid_jax/config.py",
        "own if (own, layer.kind) in COPIES else teachers",
        "teachers",
        "a mixer that began from Gated DeltaNet learns from attention",
        (f"{COPIES}::test_alignment_learns_from_the_deltanet",),
    ),
    Mutation(RECURRENT, "jax.nn.silu(self.linearA(x))", "self.linearA(x)", "the expansion is linear", (FORMULAS,)),
    Mutation(
        RECURRENT, 'axes=(None, "heads"), std=0.0', 'axes=(None, "heads"), std=std', "the expansion begins at once", (BEGINS,)
    ),
    Mutation(
        RECURRENT,
        "jnp.repeat(jnp.eye(heads, dtype=dtype), num_heads // heads, axis=0)",
        "jnp.tile(jnp.eye(heads, dtype=dtype), (num_heads // heads, 1))",
        "mixtures of heads begin as tiled heads",
        (BEGINS,),
    ),
    Mutation(
        RECURRENT,
        "std=0.0, own_start=True, rngs",
        "std=0.0, rngs",
        "torch's draw moves what begins at 0",
        (BEGINS, f"{LOW_RANK}::test_a_new_model_begins_so_too"),
    ),
    Mutation(
        OPTIONS,
        "and heads == key_heads:",
        "and False:",
        "a rank that expands nothing is accepted",
        (f"{LOW_RANK}::test_a_rank_where_every_query_head_has_its_own_key_head_is_refused",),
    ),
]
