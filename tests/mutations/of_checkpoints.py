"""Mutations of config.json, tensors of checkpoints, and generation."""

from tests.mutations import Mutation

DEFAULTS, FILES = "tests/convert/test_family_defaults.py", "tests/convert/test_files.py"
PARITY, GENERATE = "tests/convert/test_transformers_parity.py", "tests/test_generate.py"
ROPE, SAVE, WRITER = "hybrid_jax/families/rope.py", "hybrid_jax/convert/save.py", "hybrid_jax/convert/writer.py"
STREAM, QUANTIZED = "tests/convert/test_stream.py", "tests/convert/test_quantized.py"
SAMPLING, OPTIONS = "hybrid_jax/generation/sampling.py", "hybrid_jax/generation/defaults.py"
RELEASED = "tests/convert/test_released.py"
PRECEDENCE = f"{DEFAULTS}::test_rope_precedence_and_frequencies_are_transformers"
ABSENT = f"{DEFAULTS}::test_absent_keys_mean_what_they_mean_to_transformers"
SHARDED = f"{PARITY}::test_sharded_checkpoints_load_and_are_written"

MUTATIONS = [
    Mutation(
        ROPE,
        'hf.get("original_max_position_embeddings", context)',
        "context",
        "the context at the top level of config.json does not count",
        (PRECEDENCE,),
    ),
    Mutation(
        ROPE,
        'dict(hf.get("rope_scaling") or (absent or {} if given is None else given))',
        'dict((absent or {} if given is None else given) or hf.get("rope_scaling") or {})',
        "rope_parameters come before rope_scaling",
        (PRECEDENCE,),
    ),
    Mutation(
        "hybrid_jax/families/qwen3.py",
        'layer >= hf["max_window_layers"]',
        'layer > hf["max_window_layers"]',
        "one layer more has full attention",
        (f"{DEFAULTS}::test_windows_are_transformers",),
    ),
    Mutation(
        "hybrid_jax/families/smollm3.py",
        '(i + 1) % hf["no_rope_layer_interval"]',
        'i % hf["no_rope_layer_interval"]',
        "the first layer has no rotary embedding instead of the last of the interval",
        (ABSENT,),
    ),
    Mutation(
        "hybrid_jax/config.py",
        "if not self.rotary_layers[layer]:",
        "if not self.rotary_layers:",
        "every layer has a rotary embedding",
        (f"{PARITY}::test_logits_equal_transformers[smollm3 every second layer without rope, tied]",),
    ),
    Mutation(
        "hybrid_jax/convert/names.py",
        "sum(sizes[: ours.index(match[2])])",
        "sum(sizes[ours.index(match[2]) + 1 :])",
        "fused linear maps are taken in reverse order",
        (f"{PARITY}::test_logits_equal_transformers[phi3 windowed, part of the head rotated]",),
    ),
    Mutation(
        "hybrid_jax/convert/names.py",
        "family.groups(config).get(theirs, 1)",
        "1",
        "linear maps that alternate head by head in a tensor are taken one after the other",
        (f"{PARITY}::test_logits_equal_transformers[qwen3 next]",),
    ),
    Mutation(
        "hybrid_jax/layers/rope.py",
        'segment_ids, positions) >= rope.number("original_max_position_embeddings")',
        'segment_ids, positions) > rope.number("original_max_position_embeddings")',
        "a document one token longer than the original context has the short factors of LongRoPE",
        (
            "tests/convert/test_family_contract.py::"
            "test_each_packed_document_takes_the_frequencies_of_longrope_that_its_length_asks_for",
        ),
    ),
    Mutation(
        "hybrid_jax/families/base.py",
        '"norm_topk_prob": False}',
        '"norm_topk_prob": True}',
        "absent norm_topk_prob means true",
        (ABSENT,),
    ),
    Mutation(
        "hybrid_jax/families/mistral.py",
        '"num_key_value_heads": 8, "sliding_window": 4096}',
        '"num_key_value_heads": 8, "sliding_window": None}',
        "an absent sliding_window means none",
        (ABSENT,),
    ),
    Mutation(
        SAVE,
        "return value if expert is None else value[expert]",
        "return value if expert is None else value[-1 - expert]",
        "experts are written in reverse order",
        (f"{PARITY}::test_our_export_is_loaded_by_transformers_with_the_same_bits[qwen3 moe]",),
    ),
    Mutation(WRITER, "sum(sizes.values())}", "0}", "the index has another size than its files", (SHARDED,)),
    Mutation(WRITER, "+ size > max_shard_bytes", "> max_shard_bytes", "files are larger than asked", (SHARDED,)),
    Mutation(
        WRITER,
        "key=lambda n: -planned[n][0].itemsize",
        "key=lambda n: planned[n][0].itemsize",
        "tensors of large items are not aligned",
        (f"{STREAM}::test_a_writer_makes_files_that_safetensors_reads_and_knows_what_is_missing",),
    ),
    Mutation(
        "hybrid_jax/priming/fresh.py",
        "np.uint32(self._drawn[layer])",
        "np.uint32(self._drawn[0])",
        "every layer draws what the first one draws",
        (f"{STREAM}::test_layers_are_drawn_one_by_one_as_a_new_decoder_draws_them",),
    ),
    Mutation(
        "hybrid_jax/convert/quantized.py",
        "numbers = np.arange(rows.start, min(rows.stop, len(out))) // self.rows",
        "numbers = np.arange(rows.start, min(rows.stop, len(out))) * 0",
        "FP8 has the scales of the first blocks everywhere",
        (f"{QUANTIZED}::test_fp8_in_blocks_is_read_as_bfloat16_with_every_block_s_scale",),
    ),
    Mutation(
        SAVE,
        "if rows > small:",
        "if True:",
        "decays and gates of heads are quantized",
        (f"{QUANTIZED}::test_an_export_in_integers_is_generated_with_and_says_what_it_costs",),
    ),
    Mutation(
        "hybrid_jax/convert/weights.py",
        "return all(np.array_equal(",
        "return any(np.array_equal(",
        "tensors that differ in some rows are taken for equal",
        (f"{FILES}::test_tensors_that_differ_in_one_part_are_not_equal",),
    ),
    Mutation(
        "hybrid_jax/convert/load.py",
        "if jnp.finfo(dtype).max < jnp.finfo(value.dtype).max and",
        "if jnp.finfo(dtype).bits < jnp.finfo(value.dtype).bits // 2 and",
        "values beyond a dtype become infinite",
        (f"{FILES}::test_a_value_beyond_the_range_of_the_dtype_is_refused_by_name",),
    ),
    Mutation(
        "hybrid_jax/convert/load.py",
        "dataclasses.replace(config, tie_embeddings=False)",
        "config",
        "a head that differs from the tied embedding is dropped",
        (f"{FILES}::test_a_head_that_differs_from_the_tied_embedding_is_kept_as_in_transformers",),
    ),
    Mutation(
        "hybrid_jax/data/chat.py",
        'if "added_tokens_decoder" not in config and older.is_file():',
        "if older.is_file():",
        "special tokens come from a file that transformers does not read",
        ("tests/data/test_tokenizer_files.py::test_special_tokens_of_a_template_are_transformers",),
    ),
    Mutation(
        "hybrid_jax/generation/__init__.py",
        "alive &= ~np.isin(token, ends)",
        "alive = ~np.isin(token, ends)",
        "a row that ended goes on",
        (f"{GENERATE}::test_generation_stops_at_the_end_of_text_row_by_row",),
    ),
    Mutation(
        SAMPLING,
        "before = jnp.cumsum(p, axis=-1) - p",
        "before = jnp.cumsum(p, axis=-1)",
        "the token that fills the nucleus is left out",
        (f"{GENERATE}::test_tokens_are_drawn_with_the_probabilities_computed_by_hand",),
    ),
    Mutation(
        OPTIONS,
        '"top_p": 1.0, "top_k": 50}',
        '"top_p": 1.0, "top_k": 0}',
        "a file that samples keeps all tokens where transformers keeps 50",
        (f"{GENERATE}::test_the_defaults_of_a_model_directory_are_those_of_transformers",),
    ),
    Mutation(
        OPTIONS,
        "NOT_APPLIED | (NOT_APPLIED_SAMPLING if samples else {})",
        "NOT_APPLIED | NOT_APPLIED_SAMPLING if samples else {}",
        "greedy generation does not name the options that it ignores",
        (f"{GENERATE}::test_options_that_change_greedy_generation_too_are_named",),
    ),
    Mutation(
        "hybrid_jax/families/mamba3.py",
        '"rotate_halves": mimo',
        '"rotate_halves": False',
        "a released MIMO model rotates neighbouring channels",
        (f"{RELEASED}::test_logits_equal_the_released_model_s",),
    ),
    Mutation(
        "hybrid_jax/families/mamba3.py",
        'for name in ("up", "gate")',
        'for name in ("gate", "up")',
        "the halves of Mamba-3's MLP are exchanged",
        (f"{RELEASED}::test_logits_equal_the_released_model_s",),
    ),
    Mutation(
        "hybrid_jax/families/phi_mamba.py",
        "first.get(key) != core.get(key)",
        "False",
        "blocks of Phi-Mamba with other options are read as the last one",
        (f"{RELEASED}::test_what_cannot_be_honoured_is_refused_by_name",),
    ),
    Mutation(
        "hybrid_jax/families/released.py",
        "check_known(name, given, keys)",
        "pass",
        "unknown options of a released mixer are ignored",
        (f"{RELEASED}::test_what_cannot_be_honoured_is_refused_by_name",),
    ),
    Mutation(
        "hybrid_jax/convert/load.py",
        'embedding = hf_tensors("embed_tokens.embedding", "same", config)[0].name',
        'embedding = "model.embed_tokens.weight"',
        "the head of a tied model with other names is not taken for its embedding",
        (f"{RELEASED}::test_a_tied_head_that_is_stored_beside_the_embedding_is_read_as_one",),
    ),
    Mutation(
        "hybrid_jax/schema.py",
        'options["high_freq_factor"] < options["low_freq_factor"]',
        'options["high_freq_factor"] < 0 * options["low_freq_factor"]',
        "a ramp of the rotary embedding that falls",
        (f"{DEFAULTS}::test_rope_parameters_that_cannot_be_honoured_are_refused",),
    ),
    Mutation(
        "hybrid_jax/pattern.py",
        "list(heads) != sorted(set(heads))",
        "list(heads) != sorted(heads)",
        "a head can be kept twice",
        ("tests/test_config.py::test_an_invalid_symbol_is_refused_naming_layer_and_symbol",),
    ),
]
