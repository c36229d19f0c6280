"""cuDNN's attention: the same function as the tiled form where rows hold one document; GPUs are not needed.

JAX's own XLA implementation stands for cuDNN's in the values; the program for GPUs is lowered, not run.
"""

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from hybrid_jax.parallel import attention, attention_cudnn
from hybrid_jax.parallel.attention import attend
from tests.conftest import relative_error

B, T, H, HKV, D = 2, 16, 4, 2, 8
ROWS = {
    "full": [[1] * T, [1] * T],
    "padded": [[1] * 11 + [0] * 5, [3] * 16],
    "packed": [[1] * 7 + [2] * 9, [1] * 16],
    "padding in front": [[0] * 3 + [1] * 13, [1] * 16],
    "padding within": [[1] * 5 + [0] * 3 + [1] * 8, [1] * 16],
}


def arrays(dtype=jnp.float32):
    shapes = ((B, T, H, D), (B, T, HKV, D), (B, T, HKV, D), (B, T, H, D))
    return [jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)]


@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_one_document_are_told_from_all_others(rows):
    lengths, alone = attention_cudnn.document_lengths(jnp.asarray(ROWS[rows]))
    assert bool(alone) == (rows in ("full", "padded"))
    if rows == "padded":
        assert lengths.tolist() == [11, 16]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rows", ROWS)
def test_it_is_the_tiled_form_in_values_and_gradients(rows, window):
    q, k, v, do = arrays()
    segments = jnp.asarray(ROWS[rows])
    real = (segments > 0)[..., None, None]

    def both(function):
        o, pull = jax.vjp(lambda *x: jnp.where(real, function(*x, segments), 0), q, k, v)
        return o, *pull(do)

    fused = functools.partial(attention_cudnn.attend_documents, window, functools.partial(attention._packed, window))
    got, want = both(functools.partial(fused, implementation="xla")), both(functools.partial(attend, window=window))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-5


def test_the_program_for_gpus_calls_cudnn_forward_and_backward(monkeypatch):
    monkeypatch.setattr(attention, "cudnn_applies", lambda q: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    q, k, v, do = arrays(jnp.bfloat16)
    segments = jnp.asarray(ROWS["padded"])

    def gradients(q, k, v, do, segments):
        return jax.vjp(lambda *x: attend(*x, segments, 5), q, k, v)[1](do)

    text = jax.jit(gradients).trace(q, k, v, do, segments).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text and "stablehlo.case" in text
    assert "sliding_window_length" in text


@pytest.mark.parametrize(
    "backend, capability, dtype, dim, applies",
    [
        ("gpu", "8.0", jnp.bfloat16, 64, True),
        ("gpu", "9.0", jnp.float16, 128, True),
        ("tpu", "9.0", jnp.bfloat16, 64, False),  # a plan for TPUs, made on a machine with a GPU
        ("gpu", "7.5", jnp.bfloat16, 64, False),
        ("gpu", "9.0", jnp.float32, 64, False),
        ("gpu", "9.0", jnp.bfloat16, 136, False),
        ("gpu", "9.0", jnp.bfloat16, 60, False),
    ],
)
def test_it_applies_to_programs_for_gpus_that_have_it(monkeypatch, backend, capability, dtype, dim, applies):
    q = jax.ShapeDtypeStruct((1, 8, 2, dim), dtype)
    assert not attention_cudnn.cudnn_applies(q)  # this machine has none
    monkeypatch.setattr(attention_cudnn, "backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert attention_cudnn.cudnn_applies(q) == applies
