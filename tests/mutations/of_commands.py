"""Mutations of sweeps, evaluation, reports and the command line."""

from tests.mutations import Mutation

SWEEP = "tests/test_sweep.py"

MUTATIONS = [
    Mutation(
        "hybrid_jax/sweep.py",
        "process.terminate()",
        "process.kill()",
        "a sweep asked to stop kills its point before it has saved",
        (f"{SWEEP}::test_a_sweep_asked_to_stop_waits_until_its_point_has_saved",),
    ),
    Mutation(
        "hybrid_jax/sweep.py",
        "sum(e in other for other in ends.values()) == 1",
        "sum(e in other for other in ends.values()) >= 1",
        "two fields of one short name are not told apart",
        (f"{SWEEP}::test_a_point_is_named_by_what_varies_and_no_two_names_are_equal",),
    ),
]
