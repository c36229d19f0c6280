"""Mutations of the planner, of what it counts, and of how layers are stacked."""

from tests.mutations import Mutation

FORMULA, PLANNER, PROGRAM, WIRE = (f"hybrid_jax/plan/{name}.py" for name in ("formula", "planner", "program", "wire"))
FLOPS, HARDWARE, REPEATS, STACKING = (f"hybrid_jax/{name}.py" for name in ("flops", "hardware", "repeats", "stacking"))
PLAN, PARTS = "tests/plan/test_plan.py", "tests/parallel/test_parts.py"


def flops(case):
    return (f"{PLAN}::test_flops_by_formula_are_those_of_the_traced_step[{case}]",)


COPIES = (f"{PLAN}::test_gpu_traffic_of_copies_is_the_gradients_sum",)
ALIGNING = (f"{PLAN}::test_gpu_traffic_of_aligning_gathers_the_teacher_once_and_the_head_not_at_all",)
LINKS = (f"{PLAN}::test_links_between_nodes_are_the_network_s",)
FLOOR = (f"{PLAN}::test_a_step_s_floor_and_the_hours_are_those_of_its_slowest_resource",)

MUTATIONS = [
    Mutation(
        "hybrid_jax/commands/plan.py",
        " | _rounded_before(experiment, args.phase, models)",
        "",
        "a teacher beside what phases before have rounded costs nothing",
        ("tests/plan/test_phases.py::test_a_plan_counts_the_teacher_s_copies_of_what_phases_before_have_rounded",),
    ),
    Mutation(
        FORMULA,
        "(1 + c.has_mlp)",
        "2",
        "layers without an MLP sum its outputs",
        (f"{PLAN}::test_gpu_traffic_of_tensor_parallel_layers_is_their_activations",),
    ),
    Mutation(FORMULA, "w * (1 - w / (2 * T))", "w * (1 - w / T)", "a causal row shows a query no keys", flops("kept")),
    Mutation(FORMULA, "w = min(attention.window or T, T)", "w = T", "windows cost as much as the row", flops("windows")),
    Mutation(FORMULA, "(layers + 2 * seen + head)", "(layers + seen + head)", "values are free when decoding", flops("decoded")),
    Mutation(
        FORMULA,
        '(2 if job.remat == "none" else 3)',
        '(3 if job.remat == "full" else 2)',
        "keeping attention makes nothing else again",
        flops("attention kept"),
    ),
    Mutation(FORMULA, "visited if", "1 if", "every token visits every expert", flops("experts")),
    Mutation(FORMULA, "+ 2 * numbers(trains)", "+ 2 * numbers(shapes)", "what is frozen has gradients", flops("of queries")),
    Mutation(FORMULA, "4 if learned in trains else 3", "4", "a frozen head has a gradient", flops("a frozen head")),
    Mutation(FORMULA, "4 if learned in trains else 3", "3", "a head that trains has none", flops("a head that trains")),
    Mutation(
        PLANNER,
        "fits=False if program.at_least > hardware.hbm else None,",
        "fits=program.at_least <= hardware.hbm,",
        "what must be held is taken for all that is needed",
        (f"{PLAN}::test_of_gpus_is_known_what_a_step_must_hold_and_not_whether_it_fits",),
    ),
    Mutation(FORMULA, "forward if name in own else 1)", "forward)", "the teacher is gathered for a gradient", ALIGNING),
    Mutation(FORMULA, "elif head and not job.aligns:", "elif head:", "aligning gathers the head", ALIGNING),
    Mutation(FORMULA, "hidden * (1 + learned))", "hidden * (1 + backward))", "a frozen table sends gradients", ALIGNING),
    Mutation(FORMULA, "(SUM / COMPUTE if table else 1)", "1", "the table's gradient is summed in bf16", COPIES),
    Mutation(
        FORMULA,
        'again = 1 if job.remat == "attention" else forward',
        "again = forward",
        "attention that is kept is made again",
        (f"{PLAN}::test_gpu_traffic_of_the_ring_without_attention_made_again",),
    ),
    Mutation(FORMULA, "max(places) < hardware.node", "max(places) <= hardware.node", "a neighbour node is inside", LINKS),
    Mutation(FORMULA, "beside * hardware.network", "hardware.network", "a node has one adapter", LINKS),
    Mutation(PLANNER, "self.bound / efficiency", "self.bound * efficiency", "a lower efficiency is faster", FLOOR),
    Mutation(
        PLANNER, "self.parameters + self.optimizer + self.caches", "self.parameters + self.caches", "moments are not read", FLOOR
    ),
    Mutation(PLANNER, "return max(self.floors.values())", "return sum(self.floors.values())", "floors add up", FLOOR),
    Mutation(
        PLANNER,
        "abstract_mesh(sizes), with_rows(job, sizes).rows_at_a_time, tokens, job.teacher)",
        "abstract_mesh(sizes), with_rows(dataclasses.replace(job, rows=0), sizes).rows_at_a_time, tokens, job.teacher)",
        "a mesh is chosen whatever the rows",
        (f"{PLAN}::test_a_mesh_is_chosen_for_the_rows_that_are_asked_for",),
    ),
    Mutation(
        PLANNER,
        "dataclasses.replace(asked, remat=remat)",
        "dataclasses.replace(asked, remat=remat, rows=0)",
        "the advice is for fewer rows",
        (f"{PLAN}::test_advice_is_for_as_many_rows_as_were_asked_for",),
    ),
    Mutation(
        PROGRAM,
        "kept=2.0 * local",
        "kept=4.0 * local",
        "layers keep float32",
        (f"{PLAN}::test_a_plan_s_bytes_are_those_of_its_parameters_and_their_optimizer",),
    ),
    Mutation(
        WIRE,
        "size = n * _size(shape)",
        "size = _size(shape)",
        "a scatter sends a part of what it scatters",
        (f"{PLAN}::test_every_array_of_a_collective_is_counted_once",),
    ),
    Mutation(
        FLOPS,
        "inner * (1 + 1 / queries) / 2",
        "inner / 2",
        "a causal kernel's diagonal is half computed",
        ("tests/test_flops.py::test_flops_of_splash_attention_leave_out_what_a_causal_mask_hides",),
    ),
    Mutation(
        HARDWARE,
        "max(found, key=len)",
        "min(found, key=len)",
        "a v5e is taken for a v5p",
        ("tests/train/test_steps.py::test_the_share_of_the_peak_is_measured_where_the_peak_is_known",),
    ),
    Mutation(
        STACKING,
        "config.programs, own, strict",
        "config.programs, range(config.num_layers), strict",
        "no layer repeats in training",
        (f"{PARTS}::test_stacked_training_gives_the_gradients_of_layers_by_themselves",),
    ),
    Mutation(
        STACKING,
        "zip(config.programs, own, strict=True)",
        "zip(config.layers, own, strict=True)",
        "layers of different windows share a program",
        (f"{PARTS}::test_layers_of_different_windows_are_not_stacked_together",),
    ),
    Mutation(
        REPEATS,
        "key=lambda o: o[:2]",
        "key=lambda o: o[0]",
        "more runs than are needed",
        (f"{PARTS}::test_repeated_layers_are_found",),
    ),
]
