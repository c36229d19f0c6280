"""Mutations of the decoder, of stacked layers, of measures and of the choice of layers."""

from tests.mutations import Mutation

MEASURES, REPORT = "tests/evaluate/test_measures.py", "tests/evaluate/test_report.py"
PARTS, INVARIANCE = "tests/parallel/test_parts.py", "tests/layers/test_invariance.py"
PARITY, PRIMING = "tests/convert/test_transformers_parity.py", "tests/priming/test_priming.py"
MODEL, STACKING, REPEATS = "hybrid_jax/model.py", "hybrid_jax/stacking.py", "hybrid_jax/repeats.py"
SELECT, EVALUATE = "hybrid_jax/selection/select.py", "hybrid_jax/evaluate/measures.py"
BUDGETS = "hybrid_jax/selection/budgets.py"
ROWS, SCORER = "hybrid_jax/selection/scorers/rows.py", "hybrid_jax/selection/scorers/swa_retrieval.py"
ITERATIONS = "tests/layers/test_iterations.py"

MUTATIONS = [
    Mutation(
        "hybrid_jax/layers/gka.py",
        "self.num_iter = config, config.iterations_of(layer)",
        "self.num_iter = config, gka.num_iter",
        "iterations that are set for inference have no effect",
        (ITERATIONS,),
    ),
    Mutation(
        "hybrid_jax/config.py",
        "self.rope_of(i), dense, n) for",
        "self.rope_of(i), dense, None) for",
        "layers of other iterations are scanned with the first one's",
        (f"{ITERATIONS}::test_only_layers_of_equal_iterations_are_scanned_together",),
    ),
    Mutation(
        "hybrid_jax/families/__init__.py",
        "    if config.gka_iterations:",
        "    if not config.layers:",
        "a model with iterations for inference is saved without them",
        (f"{ITERATIONS}::test_the_saved_model_is_not_changed_and_one_with_iterations_is_not_saved",),
    ),
    Mutation(
        MODEL,
        "else (*norms[:2], None, None)",
        "else norms",
        "a layer without an MLP keeps the norm in front of it",
        ("tests/convert/test_released.py::test_the_export_has_the_released_tensors_and_keys",),
    ),
    Mutation(
        MODEL,
        "return LayerOutputs(mixed, jnp.zeros_like(mixed), hidden)",
        "return LayerOutputs(mixed, hidden, hidden)",
        "a layer without an MLP is aligned by its output",
        ("tests/train/test_objectives.py::test_of_layers_without_an_mlp_the_mixers_are_all_that_residuals_compare",),
    ),
    Mutation(
        SELECT,
        "(scores.per_layer(), self.mixer, self.fraction)",
        "(scores.per_layer(), self.mixer, 1 - self.fraction)",
        "converts the layers that should stay",
        (PRIMING,),
    ),
    Mutation(
        BUDGETS, "key=lambda i: (scores[i], i)", "key=lambda i: (-scores[i], i)", "converts the layers that cost most", (PRIMING,)
    ),
    Mutation(
        SCORER,
        "sums[1:, :, 0] - sums[0, :, 0]",
        "sums[1:, :, 0] + sums[0, :, 0]",
        "a score is the loss, not the rise of the loss",
        (MEASURES,),
    ),
    Mutation(SCORER, "of_text[0] + of_task[0]", "of_text[0] - of_task[0]", "a layer that harms retrieval looks cheap", (MEASURES,)),
    Mutation(ROWS, "SWAConfig(window)", "SWAConfig()", "layers are scored with another window", (MEASURES,)),
    Mutation(EVALUATE, "losses * weights", "losses", "padding and prompts count in the loss", (MEASURES,)),
    Mutation(EVALUATE, "right * weights", "right", "padding and prompts count in the accuracy", (MEASURES,)),
    Mutation(
        EVALUATE,
        "range(0, len(indices), batch_size)",
        "range(0, len(indices) - batch_size + 1, batch_size)",
        "the last batch, which is not full, is left out",
        (MEASURES,),
    ),
    Mutation(
        EVALUATE,
        "np.linspace(0, available - 1, min(rows, available))",
        "np.arange(min(rows, available))",
        "rows are the first ones instead of evenly spaced",
        (MEASURES,),
    ),
    Mutation(
        "hybrid_jax/evaluate/report/tables.py",
        "(start - now) / (start - best)",
        "(start - now) / (start - now)",
        "recovery is not a share of what was lost",
        (REPORT,),
    ),
    Mutation(
        MODEL,
        "hidden = constrain(hidden + mixed, *TOKENS)",
        "hidden = constrain(hidden + mixed + hidden, *TOKENS)",
        "the residual stream is doubled",
        (PARITY,),
    ),
    Mutation(
        MODEL,
        'kind = layer.spec.teaching if stream == "teacher" else layer.spec.kind',
        "kind = layer.spec.kind",
        "the teacher's stream goes through the student's mixers",
        ("tests/train/test_distillation.py",),
    ),
    Mutation(
        STACKING,
        "axes=(None, *mark.axes)",
        "axes=(*mark.axes, None)",
        "stacked parameters are sharded along the wrong dimension",
        (f"{PARTS}::test_stacked_training_gives_the_gradients_of_layers_by_themselves",),
    ),
    Mutation(
        REPEATS,
        "range(self.start + n, self.stop, self.length)",
        "range(self.start + n, self.stop, self.length)[::-1]",
        "stacked layers are in reverse order",
        (PARTS, "tests/train/test_steps.py"),
    ),
    Mutation(
        ROWS,
        "corpus.task(self.task, self.seq_len, SELECTION_SEED,",
        "corpus.task(self.task, self.seq_len, 987_654_321, held_out=True,",
        "layers are chosen by the rows that evaluations measure",
        ("tests/selection/test_scorers.py",),
    ),
    Mutation(
        "hybrid_jax/evaluate/instruments/heads.py",
        " | (number != removed)",
        "",
        "a head is removed from every layer at once",
        ("tests/evaluate/test_heads.py",),
    ),
    Mutation(
        "hybrid_jax/evaluate/instruments/heads.py",
        "jnp.where(number == removed, x, after)",
        "x",
        "the layers below a removed head are those of the last layer's output",
        ("tests/evaluate/test_heads.py",),
    ),
]
