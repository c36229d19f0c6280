"""FLOPs of a program, from its jaxpr: loops multiplied out, Pallas grids and every device of a mesh counted.

Matmuls only. Of a conditional the dearest branch counts. Splash attention skips the tiles above the diagonal of a causal
call: half of those off the diagonal are left out of a square call that has a mask.
"""

from __future__ import annotations

import math

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count_flops(jaxpr, kernels: tuple[str, ...] = ()) -> float:
    """FLOPs (2 a multiply-add) of one run of a closed jaxpr, on all devices together.

    Args:
      kernels: if given, only Pallas kernels in whose names one of these is count.
    """
    return _count(jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr, 1, kernels)


def _count(jaxpr, experts: int = 1, kernels: tuple[str, ...] = ()) -> float:
    """Counts a jaxpr's FLOPs; the rows of a grouped product are spread over `experts` devices, each with its own groups."""
    return sum(_equation(e, experts, kernels) for e in jaxpr.eqns)


def _equation(e, experts: int, kernels: tuple[str, ...]) -> float:
    name, params = e.primitive.name, e.params
    if kernels and (name in ("dot_general", "ragged_dot", "ragged_dot_general")):
        return 0.0
    if kernels and name == "pallas_call":
        return _pallas(e, experts) if any(kernel in _name_of(e) for kernel in kernels) else 0.0
    if name == "dot_general":
        ((contracted, _), _) = params["dimension_numbers"]
        return 2.0 * math.prod(e.outvars[0].aval.shape) * math.prod(e.invars[0].aval.shape[i] for i in contracted)
    if name in ("ragged_dot", "ragged_dot_general"):
        lhs, rhs = (v.aval.shape for v in e.invars[:2])
        # rows [n, k] each through one group's matrix [g, k, m]; of the matrices' gradient rows [n, m] come second
        return 2.0 * math.prod(lhs) * (e.outvars[0].aval.shape[-1] if len(rhs) == 3 else rhs[-1]) / experts
    if name == "pallas_call":
        return _pallas(e, experts)
    if name == "shard_map":  # rows visit every device of the axis `expert`, and are in its groups on one
        experts = dict(params["mesh"].shape).get("expert", 1)
    inner = sum(_count(j, experts, kernels) for j in _jaxprs({k: v for k, v in params.items() if k != "branches"}))
    if name == "cond":
        return max(_count(b.jaxpr, experts, kernels) for b in params["branches"])
    if name == "scan":
        return params["length"] * inner
    if name == "shard_map":
        return params["mesh"].size * inner
    return inner


def _name_of(e) -> str:
    """Returns the name of a Pallas kernel."""
    return str(e.params.get("name") or e.params.get("name_and_src_info") or "")


def _pallas(e, experts: int) -> float:
    grid = e.params["grid_mapping"].grid
    if not all(isinstance(n, int) for n in grid):  # as many steps as its groups need: Megablox says what all rows cost
        return e.params["cost_estimate"].flops / experts
    inner = math.prod(grid) * _count(e.params["jaxpr"])
    name = _name_of(e)
    if "splash" in name and len(grid) == 3:
        queries, keys = grid[1:] if "dkv" not in name else (grid[0], grid[2])
        # of operands with two axes: the segments of queries and of keys, and the places that a mask compares
        masked = sum(len(v.aval.shape) == 2 for v in e.invars) > 2
        if masked and queries == keys:
            return inner * (1 + 1 / queries) / 2
    return inner


def _jaxprs(params):
    for value in params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, core.ClosedJaxpr):
                yield x.jaxpr
            elif isinstance(x, core.Jaxpr) or type(x).__name__ == "Jaxpr":
                yield x


def traced(function, *arguments):
    """Returns the jaxpr of a function on abstract arguments without what reaches no result, as compilers remove it."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def traced_flops(function, *arguments) -> float:
    """Returns the FLOPs of a function on abstract arguments; see `count_flops` and `traced`."""
    return count_flops(traced(function, *arguments))
