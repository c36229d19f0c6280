"""Mutations of what Llama 4 and Qwen3.5's mixtures of experts have beside other families."""

from tests.mutations import Mutation

ATTENTION, MLP, NAMES = "hybrid_jax/layers/attention.py", "hybrid_jax/layers/mlp.py", "hybrid_jax/convert/names.py"
CHUNKS, LLAMA4, STACKED = "tests/layers/test_chunks.py", "tests/convert/test_llama4.py", "tests/convert/test_stacked_experts.py"
LOGITS = "tests/convert/test_transformers_parity.py::test_logits_equal_transformers"
PARITY = f"{LOGITS}[llama4 chunks, a dense layer, a layer without rope, biased]"
BOTH_FORMS = f"{STACKED}::test_both_forms_are_the_same_model_and_are_exported_as_they_came"
RETURNED = f"{STACKED}::test_every_stacked_tensor_is_proven_to_come_back"

MUTATIONS = [
    Mutation(ATTENTION, "2 * segment_ids + positions // chunk % 2", "2 * segment_ids", "windows slide over chunks", (CHUNKS,)),
    Mutation(
        ATTENTION,
        "seen_ids = chunk_ids(seen.segment_ids, seen.positions, self.chunk)",
        "seen_ids = chunk_ids(seen.segment_ids, seen.positions + 1, self.chunk)",
        "chunks of cached keys begin a token earlier",
        (CHUNKS,),
    ),
    Mutation(
        ATTENTION, "q = _scaled(q, positions + 1,", "q = _scaled(q, positions,", "queries of chunked models count from 0", (PARITY,)
    ),
    Mutation(
        ATTENTION,
        "        if self.rope is None:\n            q, k = norm_heads(q_norm, q), norm_heads(k_norm, k)\n            if c.unr",
        "        if c.unrotated_query_scaling is not None:\n            q = _scaled(q, positions + 1, *c.unrotated_query_scaling)\n"
        "        if self.rope is None:\n            q, k = norm_heads(q_norm, q), norm_heads(k_norm, k)\n            if c.unr",
        "queries of chunked models are scaled in layers with rotary embeddings too",
        (PARITY,),
    ),
    Mutation(
        ATTENTION,
        "(rms_normalize(x, None, c.rms_norm_eps) for",
        "(x for",
        "rotated queries of chunked models are not normed",
        (PARITY,),
    ),
    Mutation(
        "hybrid_jax/layers/rope.py",
        "(rotated[..., ::2], rotated[..., 1::2])",
        "(rotated[..., 1::2], rotated[..., ::2])",
        "pairs of channels turn the other way in chunked models",
        (PARITY,),
    ),
    Mutation(
        "hybrid_jax/layers/rope.py",
        "if high > low else turns >= low",
        "if high > low else turns < low",
        "the step of llama3's frequencies is reversed, which a chunked model has",
        ("tests/convert/test_family_defaults.py::test_rope_precedence_and_frequencies_are_transformers",),
    ),
    Mutation(
        MLP, "weights = jnp.ones_like(weights)", "weights = 1 * weights", "experts of chunked models are weighted twice", (PARITY,)
    ),
    Mutation(
        MLP,
        "weights = jax.nn.sigmoid(weights)",
        "weights = weights",
        "routers of chunked models have no sigmoid",
        (PARITY,),
    ),
    Mutation(
        "hybrid_jax/layers/mamba2.py",
        "config.norms_queries(layer) and",
        "config.qk_norm and",
        "Mamba-2 of a chunked model does not norm C and B",
        (f"{LLAMA4}::test_mamba2_norms_what_takes_the_place_of_queries_where_the_source_norms_them",),
    ),
    Mutation(
        "hybrid_jax/families/llama4.py",
        "i not in experts",
        "i in experts",
        "dense layers of chunked models have experts",
        ("tests/convert/test_llama4.py::test_published_configs_are_read_and_written",),
    ),
    Mutation(
        "hybrid_jax/families/llama4.py",
        'hf["no_rope_layers"] or None',
        'hf["no_rope_layers"]',
        "an empty list of the layers of chunked models is one without entries",
        ("tests/convert/test_llama4.py::test_published_configs_are_read_and_written",),
    ),
    Mutation(
        NAMES,
        '0 if leaf == "gate_proj" else width',
        '0 if leaf == "up_proj" else width',
        "stacked gates come second",
        (BOTH_FORMS,),
    ),
    Mutation(
        NAMES,
        "(_same, 2) if inputs_first else (_swapped, 1)",
        "(_same, 2)",
        "stacked experts have inputs first in every family",
        (BOTH_FORMS,),
    ),
    Mutation(
        "hybrid_jax/convert/writer.py",
        "begin + (n * full[axis] + row) * size",
        "begin + row * size",
        "rows of stacked experts are written over each other",
        (BOTH_FORMS,),
    ),
    Mutation(
        "hybrid_jax/parity_report.py",
        "[along(axis, row, row + value.shape[axis])]",
        "[along(0, row, row + value.shape[axis])]",
        "other rows of stacked experts are compared",
        (RETURNED,),
    ),
    Mutation(
        "hybrid_jax/convert/load.py",
        "dataclasses.replace(config, stacked_experts=stacked) if config.moe else config",
        "config",
        "stacked experts are not found",
        (BOTH_FORMS,),
    ),
    Mutation(
        "hybrid_jax/families/__init__.py",
        "{**keys, **{name: hf[name] for name in _OF_BOTH if name in hf},",
        "{**keys,",
        "of a checkpoint with images and stacked experts the tying is not read",
        (f"{STACKED}::test_the_decoder_of_a_checkpoint_with_images_is_read_and_exported_alone",),
    ),
    Mutation(
        "hybrid_jax/convert/weights.py",
        "(name for name in self if not name.startswith(ignored))",
        "self",
        "layers of a chunked model's images count",
        (f"{LLAMA4}::test_the_decoder_of_a_checkpoint_with_images_is_read_and_exported_alone",),
    ),
]
