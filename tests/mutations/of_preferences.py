"""Mutations of preference pairs, DPO and answers to files of prompts."""

from tests.mutations import Mutation

PACKING, TOKENS, ANSWERS = "hybrid_jax/data/packing.py", "hybrid_jax/data/tokens.py", "hybrid_jax/generation/answers.py"
OBJECTIVES, LOOP = "hybrid_jax/train/objectives.py", "hybrid_jax/train/loop.py"
PAIRS, DPO, PROMPTS = "tests/data/test_pairs.py", "tests/train/test_dpo.py", "tests/test_generate_prompts.py"
ALONE = f"{DPO}::test_the_loss_is_that_of_each_answer_alone"
STOPPED = f"{PROMPTS}::test_a_stopped_run_goes_on_to_the_same_file"

MUTATIONS = [
    Mutation(OBJECTIVES, "beta * (chosen - rejected)", "beta * (rejected - chosen)", "rejected answers are preferred", (ALONE,)),
    Mutation(
        OBJECTIVES,
        "(answers[0] > 0) & (answers[1] > 0)",
        "answers[0] >= 0",
        "padding counts as pairs",
        (ALONE,),
    ),
    Mutation(
        "hybrid_jax/train/phase_layout.py",
        "m.frozen and m.compute and computed",
        "m.frozen",
        "the reference of what trains is rounded",
        (f"{DPO}::test_a_frozen_dtype_does_not_round_the_reference_of_what_trains",),
    ),
    Mutation(
        "hybrid_jax/commands/generate.py",
        "model_files(args.model)}",
        "sorted(pathlib.Path(args.model).iterdir())}",
        "answers in the model's own directory cannot be continued",
        (f"{PROMPTS}::test_answers_in_the_model_s_own_directory_go_on_until_a_file_of_the_model_changes",),
    ),
    Mutation(
        PACKING,
        "least=-(-length // PAIRS_IN_ROW)",
        "least=0",
        "rows have more pairs than the objective sums over",
        (f"{PAIRS}::test_a_row_has_a_bounded_number_of_pairs",),
    ),
    Mutation(
        TOKENS,
        "spans=answers.spans[-1:]",
        "spans=answers.spans",
        "earlier answers of a pair count too",
        (f"{PAIRS}::test_only_the_last_answers_of_both_conversations_are_learned_prepared_or_not",),
    ),
    Mutation(
        "hybrid_jax/generation/sampling.py",
        "jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row[0]), row[1])",
        "jax.random.fold_in(jax.random.key(seed), row[0])",
        "all samples of a prompt are the same",
        (f"{PROMPTS}::test_batches_do_not_change_what_is_drawn",),
    ),
    Mutation(ANSWERS, 'split(b"\\n")[:-1]', 'split(b"\\n")', "half a line of a killed run is read", (STOPPED,)),
    Mutation(ANSWERS, "sorted(self.found)", "self.found", "answers come in the order in which they were made", (STOPPED,)),
]
