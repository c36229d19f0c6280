"""Mutations of the composition of contexts."""

from tests.mutations import Mutation

TESTS = "tests/composition/test_composition.py"
STATES = "hybrid_jax/composition/states.py"

MUTATIONS = [
    Mutation(
        STATES,
        "A = transitions[j + (j >= i)]",
        "A = transitions[j]",
        "a chunk is fused with its own decay",
        (f"{TESTS}::test_fusion_of_decays_is_the_mean_over_all_orders_of_the_chunks",),
    ),
    Mutation(
        STATES,
        "jnp.matmul(A, shorter, precision=",
        "jnp.matmul(shorter, A, precision=",
        "earlier chunks act after later ones",
        (f"{TESTS}::test_fusion_by_matrices_takes_the_products_of_later_chunks_in_their_order",),
    ),
    Mutation(
        STATES,
        "    if read.prefix.shape[1]:\n",
        "    if False:\n",
        "a chunk's decay is without that of its copy of the prefix",
        (f"{TESTS}::test_two_fused_chunks_are_the_mean_of_both_orders_in_a_model_too",),
    ),
    Mutation(
        STATES,
        "own[:, i, max(own.shape[2] - length, 0) :]",
        "own[:, i]",
        "the tail of a chunk shorter than the convolution holds the prefix",
        (f"{TESTS}::test_exact_composition_of_one_recurrent_layer_is_the_ordinary_pass",),
    ),
    Mutation(
        "hybrid_jax/layers/mamba3.py",
        "decay, first = jnp.exp(jnp.sum(log_decay, axis=1)), (1 - mix[:, 0]) * dt[:, 0]",
        "decay, first = jnp.exp(jnp.sum(log_decay, axis=1)), 0 * dt[:, 0]",
        "the first token of a chunk leaves out the product of the token before",
        (f"{TESTS}::test_exact_composition_of_one_recurrent_layer_is_the_ordinary_pass",),
    ),
    Mutation(
        "hybrid_jax/composition/reading.py",
        "P + size - rest)",
        "P)",
        "a shorter last chunk stands far from the question",
        (f"{TESTS}::test_the_question_reads_keys_at_the_positions_that_the_package_states",),
    ),
    Mutation(
        "hybrid_jax/composition/caches.py",
        "[last.count - 1 :: last.count]",
        "[:: last.count]",
        "windows keep the first chunk's tokens",
        (f"{TESTS}::test_windows_keep_the_last_chunk_s",),
    ),
]
