"""Every implementation of every operation fulfils `kernels_pallas.contract`, and a stranger's one can count on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import contract, gated_delta_rule, gated_kalmanet, linear_attention, short_conv
from kernels_pallas.arguments import pick_implementation
from tests.conftest import relative_error

B, T, H, K, V, W = 2, 5, 2, 8, 8, 4


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation, the module with its table, and the widths of its arrays after [B, T]."""

    function: object
    table: dict
    widths: tuple
    options: dict = dataclasses.field(default_factory=dict)


def table_of(name):
    return __import__(f"kernels_pallas.{name}", fromlist=["IMPLEMENTATIONS"]).IMPLEMENTATIONS


HEADS = ((H, K), (H, K), (H, V))
OPERATIONS = {
    "linear_attention": Operation(linear_attention, table_of("linear_attention"), (*HEADS, (H,))),
    "gated_delta_rule": Operation(gated_delta_rule, table_of("gated_delta_rule"), (*HEADS, (H,), (H,))),
    "gated_kalmanet": Operation(gated_kalmanet, table_of("gated_kalmanet"), (*HEADS, (H,), (H,)), dict(num_iter=8)),
    "short_conv": Operation(short_conv, table_of("short_conv"), ((16,),)),
}
ROWS = [(name, row) for name, operation in OPERATIONS.items() for row in operation.table]
SEGMENTS = np.array([[7, 7, 7, 2, 2], [4, 4, 4, 4, 4]], np.int32)


def arguments(name, dtype):
    """Arrays of an operation: unit keys, decays below 0, gates between 0 and 1."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    arrays = [jax.random.normal(next(keys), (B, T, *width)) for width in OPERATIONS[name].widths]
    if name == "short_conv":
        arrays += [jax.random.normal(next(keys), (16, W)), jax.random.normal(next(keys), (16,))]
        return [x.astype(dtype) for x in arrays]
    arrays[:2] = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in arrays[:2]]
    scalars = [-jnp.abs(x) if n == (1 if name == "gated_kalmanet" else 0) else jax.nn.sigmoid(x) for n, x in enumerate(arrays[3:])]
    return [*(x.astype(dtype) for x in arrays[:3]), *scalars]


def states(name, dtype):
    """An initial state that is not zero."""
    if name == "short_conv":
        return jax.random.normal(jax.random.key(9), (B, W - 1, 16)).astype(dtype)
    S = jax.random.normal(jax.random.key(9), (B, H, K, V))
    root = jax.random.normal(jax.random.key(8), (B, H, K, K))
    return (root @ root.mT, S) if name == "gated_kalmanet" else S


@pytest.mark.parametrize("name, row", ROWS)
def test_an_implementation_returns_what_the_contract_says(name, row):
    operation = OPERATIONS[name]
    arrays, state = arguments(name, jnp.bfloat16), states(name, jnp.bfloat16)
    run = lambda row: operation.function(  # noqa: E731
        *arrays, initial_state=state, segment_ids=SEGMENTS, implementation=row, **operation.options
    )
    (o, final), (want, want_final) = run(row), run("reference")
    assert o.shape == arrays[0].shape[:2] + (arrays[2] if len(arrays) > 3 else arrays[0]).shape[2:] and o.dtype == jnp.bfloat16
    kept = jnp.bfloat16 if name == "short_conv" else jnp.float32
    for got, like in zip(jax.tree.leaves(final), jax.tree.leaves(want_final), strict=True):
        assert got.shape == like.shape and got.dtype == kept
        assert relative_error(got, like) < 2e-2
    assert relative_error(o, want) < 3e-2


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_an_implementation_can_count_on(name, monkeypatch):
    """Of a row that only records: arguments in the contract's order, a state that is never None, segments that count from 0."""
    operation, seen = OPERATIONS[name], []

    def recorder(*given):
        seen.append(given)
        return operation.table["reference"](*given)

    monkeypatch.setitem(operation.table, "toy", recorder)
    arrays = arguments(name, jnp.bfloat16)
    o, _ = operation.function(*arrays, segment_ids=SEGMENTS, implementation="toy", **operation.options)
    want, _ = operation.function(*arrays, segment_ids=SEGMENTS, implementation="reference", **operation.options)
    assert np.array_equal(np.asarray(o, np.float32), np.asarray(want, np.float32))
    (given,) = seen
    protocol = {"linear_attention": "LinearAttention", "gated_delta_rule": "GatedDeltaRule", "gated_kalmanet": "GatedKalmaNet"}
    names = list(getattr(contract, protocol.get(name, "ShortConv")).__call__.__annotations__)[:-1]
    assert len(given) == len(names)
    got = dict(zip(names, given, strict=True))
    assert np.array_equal(got["segments"], [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    for state in jax.tree.leaves(got["state"]):
        assert not np.asarray(state, np.float32).any()
        assert state.dtype == (jnp.bfloat16 if name == "short_conv" else jnp.float32)
    for n, x in zip(names, arrays, strict=False):
        assert got[n].dtype == x.dtype and got[n].shape == x.shape  # nothing is cast or padded
    if "scale" in got:
        assert got["scale"] == K**-0.5 and got["chunk_size"] is None
    operation.function(*arrays, implementation="toy", **operation.options)
    assert dict(zip(names, seen[1], strict=True))["segments"] is None


def test_kernels_are_never_given_float64_and_an_unknown_row_is_named():
    table = {"xla": "the chunked form", "pallas_tpu": "the kernel"}
    with jax.enable_x64(True):
        double = jnp.zeros(3, jnp.float64)
        assert pick_implementation("toy", None, table, double) == "the chunked form"
        with pytest.raises(ValueError, match="toy: pallas_tpu has no float64"):
            pick_implementation("toy", "pallas_tpu", table, double)
    with pytest.raises(ValueError, match="toy: unknown implementation 'cuda'; have xla, pallas_tpu"):
        pick_implementation("toy", "cuda", table)
