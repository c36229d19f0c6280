"""Mutations of training: steps, objectives, the optimizer, teachers, the loop, checkpoints, lengthening, and what is reported."""

from tests.mutations import Mutation

TRAIN = "hybrid_jax/train"
STEP, OPTIMIZER, ARRANGEMENT = f"{TRAIN}/step.py", f"{TRAIN}/optimizer.py", f"{TRAIN}/phase_layout.py"
OBJECTIVES, OBJECTIVE, INTERVAL = f"{TRAIN}/objectives.py", f"{TRAIN}/objective.py", f"{TRAIN}/interval.py"
LOOP, PHASE = f"{TRAIN}/loop.py", f"{TRAIN}/phase.py"
CHECKPOINT, HEALTH, METRICS = f"{TRAIN}/checkpoint.py", f"{TRAIN}/diagnose.py", f"{TRAIN}/metrics.py"
FUSE, MODEL, REPORT = "hybrid_jax/priming/fuse.py", "hybrid_jax/model.py", "hybrid_jax/run_report.py"

OF_OPTIMIZER, OF_INTERVAL, OF_STEPS = "tests/train/test_optimizer.py", "tests/train/test_interval.py", "tests/train/test_steps.py"
OF_TEACHERS, OF_OBJECTIVES, OF_PHASE = "tests/train/test_teachers.py", "tests/train/test_objectives.py", "tests/train/test_phase.py"
OF_CHECKPOINTS, OF_WORKDIR = "tests/train/test_checkpoints.py", "tests/train/test_workdir.py"
OF_CONTRACTS, OF_HOOKS = "tests/train/test_contracts.py", "tests/train/test_hooks.py"
OF_LENGTHENING, OF_TRAINING = "tests/train/test_lengthening.py", "tests/train/test_training.py"
PICTURE = f"{OF_INTERVAL}::test_the_picture_has_every_source_s_own_loss_and_bridges_intervals_without_one"
SPIKES = f"{OF_OPTIMIZER}::test_spikes_are_counted_against_means_of_the_steps_that_counted"
SKIPPED = f"{OF_OPTIMIZER}::test_a_skipped_step_uses_up_its_place_in_the_schedule_and_leaves_the_moments_alone"
SCHEDULES = f"{OF_OPTIMIZER}::test_schedules_at_their_boundaries"
PARTS = f"{OF_OPTIMIZER}::test_parts_of_a_batch_weigh_what_their_losses_are_means_over"
COUNTED = f"{OF_PHASE}::test_tokens_and_epochs_are_counted_in_steps"
MEANS = f"{OF_INTERVAL}::test_an_interval_is_the_mean_over_its_tokens_and_each_source_s_over_its_own"
FUSED_AGAIN = f"{OF_TEACHERS}::test_a_model_fused_again_learns_from_the_source"
TWO_MODELS = f"{OF_TEACHERS}::test_two_streams_with_a_teacher_of_its_own_are_two_models"

OTHER_TEACHERS = "tests/train/test_other_teachers.py"

MUTATIONS = [
    Mutation(
        f"{TRAIN}/teacher.py",
        'slice(config.vocab_size if axis == "vocab" else None)',
        'slice(-config.vocab_size if axis == "vocab" else None, None)',
        "of a teacher with more ids than the student the last ones are kept",
        (f"{OTHER_TEACHERS}::test_loss_and_gradients_are_the_textbook_s_and_the_teacher_takes_none",),
    ),
    Mutation(
        HEALTH,
        "range(max(one.config.num_layers for one in models.values()))",
        "range(model.config.num_layers)",
        "layers of a deeper teacher are not looked at",
        (f"{OTHER_TEACHERS}::test_the_first_layer_that_went_bad_may_be_one_that_the_student_has_not",),
    ),
    Mutation(
        STEP,
        "schedule(state.health.steps + state.health.skipped)",
        "schedule(state.health.steps)",
        "the schedule ends late by the steps that were skipped",
        (SKIPPED,),
    ),
    Mutation(STEP, "health.steps < TRUSTED", "health.steps <= TRUSTED", "the means of losses are trusted a step later", (SPIKES,)),
    Mutation(
        STEP,
        "jnp.where(health.steps == 0, 1.0, 1 - DECAY)",
        "1 - DECAY",
        "the mean loss begins at 0, so that every loss looks like a spike",
        (SPIKES,),
    ),
    Mutation(
        STEP,
        "in_a_row=(health.in_a_row + 1) * bad",
        "in_a_row=health.in_a_row + bad",
        "bad steps far apart end a phase",
        (SKIPPED,),
    ),
    Mutation(
        STEP,
        "lambda x: metrics[LOSS].weight * x, grads)",
        "lambda x: x, grads)",
        "parts of a batch weigh the same whatever is in them",
        (PARTS,),
    ),
    Mutation(
        STEP,
        "weight = jnp.where(weight > 0, weight, 1.0)",
        "weight = jnp.maximum(weight, 1.0)",
        "parts of a batch that weigh less than 1 in all are made smaller",
        (PARTS,),
    ),
    Mutation(
        STEP,
        "for x in (losses * weights, weights))",
        "for x in (losses, weights))",
        "a source's loss counts its prompts and padding",
        (f"{OF_INTERVAL}::test_a_source_s_loss_is_over_its_own_tokens_however_the_batch_is_divided",),
    ),
    Mutation(
        OBJECTIVE,
        "jnp.where(self.weight > 0, self.weight, 1.0)",
        "jnp.maximum(self.weight, 1.0)",
        "a loss whose weights are less than 1 in all is made smaller",
        (f"{OF_OBJECTIVES}::test_a_loss_does_not_depend_on_the_scale_of_its_weights",),
    ),
    Mutation(
        OBJECTIVES,
        "divergence_weight * temperature**2",
        "divergence_weight * temperature",
        "gradients of a distillation shrink with its temperature",
        (f"{OF_OBJECTIVES}::test_distillation_is_torch_s_weighed_as_its_options_say",),
    ),
    Mutation(
        OBJECTIVES,
        "objective.nothing == {n: {**known, **checked}[n]",
        "objective.nothing == {n: checked.get(n)",
        "a loss that is 0 by a default goes unnoticed",
        (f"{OF_PHASE}::test_an_option_that_would_be_ignored_or_leave_nothing_to_learn_is_refused",),
    ),
    Mutation(
        INTERVAL,
        "weight = jnp.where(counts, weight, 0.0)",
        "weight = jnp.where(counts, weight, weight)",
        "a skipped step's loss is in the mean of its interval",
        (MEANS,),
    ),
    Mutation(
        STEP,
        "Mean(totals[n], counts[n])",
        "Mean(totals[n], jnp.sum(counts))",
        "a source's loss is divided by all sources' tokens",
        (f"{OF_INTERVAL}::test_a_source_s_loss_is_over_its_own_tokens_however_the_batch_is_divided",),
    ),
    Mutation(
        STEP,
        "lambda x: metrics[LOSS].weight * x, grads), metrics",
        "lambda x: metrics[LOSS].weight * x, (grads, metrics))",
        "a metric over some tokens only is averaged by the tokens of the loss",
        (f"{OF_CONTRACTS}::test_a_metric_has_its_own_denominator_however_the_batch_is_divided",),
    ),
    Mutation(
        OPTIMIZER,
        "optax.linear_schedule(peak / phase.warmup_steps, peak, phase.warmup_steps - 1)",
        "optax.linear_schedule(0.0, peak, phase.warmup_steps)",
        "the first step of a warmup has no learning rate",
        (SCHEDULES,),
    ),
    Mutation(
        OPTIMIZER,
        "phase.decay_steps, rest - phase.decay_steps)",
        "phase.decay_steps, rest - phase.decay_steps - 1)",
        "the decay of wsd begins a step early",
        (SCHEDULES,),
    ),
    Mutation(
        OPTIMIZER,
        "math.sqrt(max(x.shape[-2:]))",
        "math.sqrt(min(x.shape[-2:]))",
        "Muon's updates of matrices that are not square are small",
        (f"{OF_OPTIMIZER}::test_muon_orthogonalizes_every_layer_s_and_every_expert_s_own_matrix",),
    ),
    Mutation(
        "hybrid_jax/layers/mamba2.py",
        'parameter(jnp.ones(H, dtype), ("heads",))',
        'parameter(jnp.ones(H, dtype), ("heads",), decay=True)',
        "Mamba-2's D decays to 0",
        (f"{OF_OPTIMIZER}::test_steps_are_torch_s_adamw_with_warmup_a_clipped_norm_and_decay_of_matrices_alone",),
    ),
    Mutation(
        ARRANGEMENT,
        "if n in self.chosen or taught[n] is not have[n]",
        "if taught[n] is not have[n]",
        "a teacher that shares what trains moves",
        (f"{OF_TEACHERS}::test_a_teacher_does_not_move_when_what_it_shares_trains",),
    ),
    Mutation(
        ARRANGEMENT,
        "if self.copied or not same_function(own.config, teacher.config):",
        "if self.copied:",
        "a teacher whose weights are all shared gets the RoPE of the student's phase",
        (f"{OF_TEACHERS}::test_a_phase_s_rope_and_context_are_the_student_s_alone",),
    ),
    Mutation(
        ARRANGEMENT,
        "if self.frozen_dtype and marks[n].frozen else p for",
        "if self.frozen_dtype else p for",
        "norms and decays are rounded with the frozen matrices",
        (f"{OF_OBJECTIVES}::test_frozen_matrices_alone_are_rounded_to_the_frozen_dtype",),
    ),
    Mutation(
        "hybrid_jax/workdir.py",
        "{**rounded, **trained}",
        "{**frozen, **trained}",
        "a checkpoint's model has other frozen weights than it was trained beside",
        (f"{OF_WORKDIR}::test_the_outcome_and_the_end_of_a_phase",),
    ),
    Mutation(
        FUSE,
        "low(a), low(b))",
        "a, b)",
        "a frozen weight that only the rounding has changed is copied for the teacher",
        (f"{OF_TEACHERS}::test_what_is_equal_and_frozen_is_shared_also_after_rounding",),
    ),
    Mutation(
        FUSE,
        "{**split_model(source)[1], **split_model(model)[1]}",
        "{**split_model(model)[1], **split_model(source)[1]}",
        "fusing again gives the student its source's weights back",
        (FUSED_AGAIN,),
    ),
    Mutation(
        MODEL,
        "(teacher or self).norm(taught)",
        "self.norm(taught)",
        "the teacher ends with the student's norm",
        (TWO_MODELS,),
    ),
    Mutation(
        MODEL,
        "start = hidden if teacher is None else teacher.inputs(input_ids, segment_ids, positions)[0]",
        "start = hidden",
        "the teacher begins with the student's embeddings",
        (TWO_MODELS,),
    ),
    Mutation(
        LOOP,
        "if any(of_every_process(stop.asked)):",
        "if told_to:",
        "a request to stop during the last step is lost",
        (f"{OF_TRAINING}::test_a_request_to_stop_during_the_last_step_is_not_lost",),
    ),
    Mutation(
        LOOP,
        "if saved.get(key) != made_of.get(key):",
        'if key == "tokenizer" and saved.get(key) != made_of.get(key):',
        "a phase goes on with another text and another teacher",
        (f"{OF_TEACHERS}::test_a_phase_is_not_resumed_with_another_text_or_another_teacher",),
    ),
    Mutation(
        CHECKPOINT,
        "agreed := min(all_of := of_every_process(step))",
        "agreed := max(all_of := of_every_process(step))",
        "processes go on from different checkpoints",
        (f"{OF_CHECKPOINTS}::test_all_processes_go_on_from_the_newest_checkpoint_that_none_finds_damaged",),
    ),
    Mutation(
        HEALTH,
        "layer = models[name].layers[i]",
        "layer = model.layers[i]",
        "the cause of bad steps is looked for in the student's copy of the teacher",
        (f"{OF_STEPS}::test_a_teacher_that_overflows_is_named_and_the_student_s_own_copy_of_it_is_not_looked_at",),
    ),
    Mutation(
        METRICS,
        "{**rows.get(key, {}), **row}",
        "{**row, **rows.get(key, {})}",
        "of a step written twice the first counts",
        (f"{OF_STEPS}::test_a_torn_line_of_a_killed_run_is_left_out",),
    ),
    Mutation(
        PHASE,
        "math.ceil(self.warmup_fraction * self.steps)",
        "round(self.warmup_fraction * self.steps)",
        "a small fraction of warmup is none",
        (COUNTED,),
    ),
    Mutation(
        PHASE,
        "steps=max(1, round(self.epochs * rows / self.batch_size))",
        "steps=max(1, int(self.epochs * rows / self.batch_size))",
        "the rest of an epoch is dropped",
        (COUNTED,),
    ),
    Mutation(
        "hybrid_jax/data/pipeline.py",
        "taken * mix[name] / total",
        "taken * mix[name]",
        "how often a source is repeated is reported wrongly where shares do not add up to 1",
        (f"{OF_PHASE}::test_a_source_with_fewer_rows_than_the_phase_takes_is_named_with_how_often_it_is_seen",),
    ),
    Mutation(
        "hybrid_jax/lengthen.py",
        "if _newest(checkpoints / name) < phase.steps:",
        "if _newest(checkpoints / name) == 0:",
        "a finished phase goes on from a checkpoint before its end",
        (f"{OF_LENGTHENING}::test_a_finished_phase_that_cannot_go_on_is_refused_with_the_reason",),
    ),
    Mutation(REPORT, 'begin += rows[-1]["step"]', "begin += len(rows)", "phases overlap in the picture", (PICTURE,)),
    Mutation(REPORT, "(values[0], values[-1])", "(values[0], min(values))", "a layer that got worse looks aligned", (PICTURE,)),
    Mutation(REPORT, "for row in reversed(rows)", "for row in rows", "a run's last loss is its first", (PICTURE,)),
    Mutation(
        REPORT,
        '[begin + step for step in steps], values, "o-"',
        'steps, values, "o-"',
        "held-out losses of a later phase are drawn at the steps of the first one",
        (f"{OF_INTERVAL}::test_the_picture_has_the_held_out_loss_of_the_evaluations_at_their_steps",),
    ),
    Mutation(
        f"{TRAIN}/hooks.py",
        "hook.name = name",
        "",
        "two hooks of one class resume each other's state",
        (f"{OF_HOOKS}::test_two_hooks_of_one_class_run_beside_each_other_and_each_resumes_its_own_state",),
    ),
    Mutation(
        f"{TRAIN}/hooks.py",
        "check_known(where, values, (CLASS, EVERY, *known))",
        "",
        "a misspelled option of a hook is left out",
        (f"{OF_HOOKS}::test_a_wrong_hook_is_refused_when_the_config_is_read",),
    ),
    Mutation(
        "hybrid_jax/experiment.py",
        "experiment.pattern or model_config.pattern",
        "model_config.pattern",
        "a new model has no layers but attention, whatever its pattern",
        ("tests/train/test_new_model.py",),
    ),
    Mutation(
        "hybrid_jax/experiment.py",
        "experiment.with_mixer_options(model_config).with_pattern(",
        "model_config.with_pattern(",
        "a new model's mixers have their defaults, whatever the config says",
        ("tests/train/test_new_model.py",),
    ),
    Mutation(
        "hybrid_jax/train/objectives.py",
        "error = jnp.square(m[:, :heads] - jax.lax.stop_gradient(a))",
        "error = jnp.square(m[:, -heads:] - jax.lax.stop_gradient(a))",
        "matrices of kept heads of attention are compared with the teacher's",
        ("tests/train/test_matrices.py",),
    ),
    Mutation(
        "hybrid_jax/train/objectives.py",
        "jnp.sum(jnp.where(inside[:, None, :, None], error, 0), axis=(2, 3))",
        "jnp.sum(error, axis=(2, 3))",
        "matrices of padding are compared",
        ("tests/train/test_matrices.py",),
    ),
]
