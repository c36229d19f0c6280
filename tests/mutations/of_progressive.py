"""Mutations of phases that change the pattern: how mixers begin, what is refused, and a run's model within such a phase."""

from tests.mutations import Mutation

EXPERIMENT, CONFIG, WORKDIR = "hybrid_jax/experiment.py", "hybrid_jax/experiment_config.py", "hybrid_jax/workdir.py"
TESTS = "tests/train/test_progressive.py"
BEGIN = f"{TESTS}::test_mixers_begin_as_the_experiment_says_though_the_phase_before_had_none_of_them"
EXPORT = f"{TESTS}::test_a_checkpoint_within_a_phase_is_exported_in_the_phase_s_pattern"
REFUSED = f"{TESTS}::test_a_pattern_that_cannot_be_is_refused_before_anything_is_written"

MUTATIONS = [
    Mutation(
        EXPERIMENT,
        "seed=experiment.seed + number, mesh=mesh, **experiment.begin)",
        "seed=experiment.seed, mesh=mesh, **experiment.begin)",
        "mixers of a later phase begin with the experiment's seed",
        (f"{TESTS}::test_a_phase_draws_what_attention_does_not_give_from_a_seed_of_its_own",),
    ),
    Mutation(
        EXPERIMENT,
        "        model.config = experiment.with_mixer_options(model.config)\n        model = initialize_hybrid(",
        "        model = initialize_hybrid(",
        "mixers of a later phase have their defaults, whatever the config says",
        (BEGIN,),
    ),
    Mutation(CONFIG, ", copy_attention=self.copy_attention)", ")", "mixers are always copied from attention", (BEGIN,)),
    Mutation(
        "hybrid_jax/train/phase.py",
        'return self.form == "fused" or (self.form == "as_is" and before.is_fused)',
        'return self.form == "fused"',
        "a phase that leaves the form loses the teachers",
        (f"{TESTS}::test_a_phase_that_leaves_the_form_keeps_the_teachers",),
    ),
    Mutation(
        CONFIG,
        "            check_convertible(have, model)\n",
        "",
        "a phase that cannot convert fails when it begins",
        (REFUSED,),
    ),
    Mutation(
        CONFIG,
        "if selects and (changing := [name for name, phase in phases if phase.pattern]):",
        "if selects and (changing := []):",
        "a phase may convert layers that a selection has not chosen yet",
        (f"{TESTS}::test_a_pattern_that_is_no_text_and_one_after_a_selection_are_refused",),
    ),
    Mutation(
        WORKDIR,
        "drawn = jnp.float32 if of_phase.pattern else dtype",
        "drawn = dtype",
        "a checkpoint exported in bfloat16 has other new parameters than the run",
        (EXPORT,),
    ),
    Mutation(
        WORKDIR,
        "Experiment.of_conversions(config), number, of_phase",
        "Experiment.of_conversions(config), number - 1, of_phase",
        "an exported checkpoint has new parameters of another seed than the run's",
        (EXPORT,),
    ),
]
