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
