"""Mutations of the scorers of layers and heads, and of the budgets."""

from tests.mutations import Mutation

SCORERS, BUDGETS = "hybrid_jax/selection/scorers", "hybrid_jax/selection/budgets.py"
MEASURING, CHOOSING, COMPARING = (
    f"tests/selection/{name}.py" for name in ("test_measuring_scorers", "test_budgets", "test_compare")
)

MUTATIONS = [
    Mutation(
        f"{SCORERS}/gradient_error.py", "windowed - attention)", "attention - windowed)", "harm looks like a gain", (MEASURING,)
    ),
    Mutation(
        f"{SCORERS}/attention_distance.py",
        "distance >= scorer.window",
        "distance < scorer.window",
        "near attention counts as far",
        (MEASURING,),
    ),
    Mutation(
        f"{SCORERS}/attention_distance.py",
        "positions >= scorer.sinks",
        "positions >= 0",
        "attention to the first key counts as far",
        (MEASURING,),
    ),
    Mutation(
        f"{SCORERS}/linear_fit.py",
        "moments[1 - fold].error(fits[fold])",
        "moments[fold].error(fits[fold])",
        "the error is of the rows that were fitted",
        (MEASURING,),
    ),
    Mutation(f"{SCORERS}/linear_fit.py", "-math.log(2) / half_life", "0.0", "no feature decays", (MEASURING,)),
    Mutation(f"{SCORERS}/linear_fit.py", "self.square - 2 * np", "self.square - np", "the error is not a square", (MEASURING,)),
    Mutation(
        f"{SCORERS}/head_ablation.py",
        "losses[:, :-1] - losses[:, -1:]",
        "losses[:, -1:] - losses[:, :-1]",
        "the heads that matter most look cheapest",
        (MEASURING,),
    ),
    Mutation(f"{SCORERS}/uniform.py", '"[::-1]', '"', "layers are converted from the first to the last", (MEASURING,)),
    Mutation(BUDGETS, "np.argsort(costs.ravel()", "np.argsort(-costs.ravel()", "converts the heads that cost most", (CHOOSING,)),
    Mutation(BUDGETS, "if saved[i] <= 0:", "if saved[i] < -1e12:", "converts layers that then hold more bytes", (CHOOSING,)),
    Mutation(
        BUDGETS, "found[i, list(spec.attention_heads)] = False", "pass", "heads that stay attention count as converted", (CHOOSING,)
    ),
    Mutation(
        "hybrid_jax/selection/scorers/contract.py",
        "self.costs.sum(axis=1)",
        "self.costs.min(axis=1)",
        "a layer costs what its cheapest head does",
        (COMPARING,),
    ),
]
