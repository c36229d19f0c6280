"""Mutations of sources, tokens, conversations and the mix of rows."""

from tests.mutations import Mutation

DOCUMENTS, TOKENS, TOKENIZER = (f"hybrid_jax/data/{name}.py" for name in ("documents", "tokens", "tokenizer"))
PACKING, PIPELINE, CORPUS = (f"hybrid_jax/data/{name}.py" for name in ("packing", "pipeline", "corpus"))
TEACHER, CHAT, TEXT = (f"hybrid_jax/data/{name}.py" for name in ("teacher_cache", "chat", "text"))
ROWS, RECORDS, TOKENIZERS = (f"tests/data/test_{name}.py" for name in ("rows", "records", "tokenizers"))
BEGINS = f"{TOKENIZERS}::test_documents_begin_as_transformers_begins_a_text_and_end_once"
ENDS = f"{TOKENIZERS}::test_an_end_of_turn_that_takes_in_spaces_is_learned_and_nothing_of_the_next_turn"
FOREIGN = f"{TOKENIZERS}::test_synthetic_tasks_of_a_foreign_tokenizer_use_no_special_token"
MIXED = f"{ROWS}::test_sources_of_one_size_have_orders_of_their_own_whatever_order_the_mix_names_them_in"

MUTATIONS = [
    Mutation(
        DOCUMENTS,
        "h % 100 * 100 + h // 100 % 100 < 100 * percent",
        "h % 10_000 < 100 * percent",
        "other documents are held out",
        (f"{ROWS}::test_which_documents_are_held_out_never_changes",),
    ),
    Mutation(
        DOCUMENTS,
        "(100 - HELD_OUT_PERCENT) // 100",
        "HELD_OUT_PERCENT // 100",
        "almost all of a short text is held out",
        ("tests/data/test_data.py::test_a_single_document_is_split_into_its_first_and_last_part",),
    ),
    Mutation(
        DOCUMENTS,
        "file.seek(begin - 1)",
        "file.seek(begin)",
        "a line that begins a piece is lost",
        ("tests/data/test_documents.py::test_a_jsonl_file_is_cut_anywhere_and_every_line_is_read_once",),
    ),
    Mutation(
        DOCUMENTS,
        'return ({"role": "system", "content": check_text(system)}, *messages)',
        'return (*messages, {"role": "system", "content": check_text(system)})',
        "the system message comes last",
        (f"{RECORDS}::test_the_system_message_beside_a_conversation_begins_it",),
    ),
    Mutation(TOKENS, "(ends <= last)", "(ends <= end)", "an end of turn that takes in spaces is not learned", (ENDS,)),
    Mutation(TOKENS, " & (begins < end)", "", "spaces after an answer are learned", (ENDS,)),
    Mutation(
        TOKENS,
        "(ends > begin)",
        "(ends >= begin)",
        "spaces before an answer are learned",
        (f"{TOKENIZERS}::test_spaces_of_a_prompt_are_not_learned_where_the_tokenizer_trims_offsets",),
    ),
    Mutation(TOKENS, "self.end_ids = after or [", "self.end_ids = after + [", "a document ends twice", (BEGINS,)),
    Mutation(
        TOKENS,
        "np.broadcast_to(np.uint8(1), n) if w is None",
        "np.broadcast_to(np.uint8(0), n) if w is None",
        "texts beside conversations are not learned",
        ("tests/data/test_packing.py::test_shards_give_the_rows_of_their_documents_end_to_end",),
    ),
    Mutation(TOKENIZER, "eos_token_id[0] if eos_token_id", "eos_token_id[-1] if eos_token_id", "another end id", (BEGINS,)),
    Mutation(TOKENIZER, "return added_around(tokenizer)[0] +", "return", "a prompt has no beginning", (BEGINS,)),
    Mutation(TOKENIZER, "if i and i not in added)", "if i)", "synthetic tasks use special tokens", (FOREIGN,)),
    Mutation(
        TOKENIZER,
        "longest = max(longest, range(ids[begin], ids[end - 1] + 1), key=len)",
        "longest = range(ids[begin], ids[end - 1] + 1)",
        "the last run of ordinary ids instead of the longest",
        (FOREIGN,),
    ),
    Mutation(
        PACKING,
        "slot = int(np.argmax(room >= n))",
        "slot = int(np.argmax(room > n))",
        "a document that fits exactly opens another row",
        (f"{ROWS}::test_first_fit_fills_the_first_open_row_that_has_room",),
    ),
    Mutation(
        PACKING,
        "(np.diff(self.tokens.starts) > self.length)",
        "(np.diff(self.tokens.starts) >= self.length)",
        "documents of exactly a row are counted as longer",
        ("tests/data/test_packing.py::test_tokens_that_are_in_no_row_are_counted",),
    ),
    Mutation(PIPELINE, "shuffle(seed=seed + number)", "shuffle(seed=seed)", "sources share one order", (MIXED,)),
    Mutation(
        PIPELINE,
        "for name, share in sorted(mix.items()) if share}",
        "for name, share in mix.items() if share}",
        "rows depend on the order in which the mix names its sources",
        (MIXED,),
    ),
    Mutation(
        PIPELINE,
        "step * self.batch_size + self.rows[n]",
        "step * self.batch_size + n",
        "every process reads the same rows",
        ("tests/data/test_packing.py::test_processes_together_read_what_one_alone_reads",),
    ),
    Mutation(
        CORPUS,
        "any(t.weights is not None for t in shards)",
        "all(t.weights is not None for t in shards)",
        "conversations beside a shard of texts are split",
        (f"{ROWS}::test_one_shard_of_conversations_makes_a_source_of_conversations",),
    ),
    Mutation(
        TEACHER,
        "for step in range(steps) if not",
        "for step in range(steps - 1) if not",
        "a cache that lacks its last step is taken for complete",
        ("tests/data/test_teacher_cache.py::test_a_cache_says_which_step_is_the_first_that_it_lacks",),
    ),
    Mutation(
        CHAT,
        "return FIXED_DATE + self.template",
        "return self.template",
        "tokens of conversations depend on the day",
        (f"{TOKENIZERS}::test_a_template_that_writes_the_date_gives_the_same_tokens_every_day",),
    ),
    Mutation(
        TEXT,
        "text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())",
        "text.count(REPLACEMENT)",
        "characters that were U+FFFD before count as replaced",
        ("tests/data/test_prepare.py::test_what_is_replaced_or_skipped_is_counted",),
    ),
]
