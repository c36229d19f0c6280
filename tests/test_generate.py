"""Generation: the cache equals the full forward; rows do not disturb each other; sampling."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import generate
from tests.conftest import tiny_model

PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [9]]


@nnx.jit
def logits(model, ids, segments):
    return model(ids, segments)


def greedy_without_cache(model, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        pad = 20 - len(ids)
        segments = np.pad(np.ones((1, len(ids)), np.int32), ((0, 0), (0, pad)))
        ids.append(int(jnp.argmax(logits(model, np.pad([ids], ((0, 0), (0, pad))), segments)[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("pattern", ["*-GKA-SWA", "GDN-M2-BMF"])
def test_greedy_generation_equals_the_model_without_a_cache_in_any_batch(pattern):
    model = tiny_model(pattern)
    want = [greedy_without_cache(model, p, 8) for p in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=8) == want
    assert generate(model, PROMPTS[:1], max_new_tokens=8) == want[:1]


def test_generation_stops_at_the_end_of_text_row_by_row():
    model = tiny_model("*-GKA")
    want = generate(model, PROMPTS, max_new_tokens=8)
    end = want[0][3]
    got = generate(model, PROMPTS, max_new_tokens=8, eos_id=end)
    for whole, cut in zip(want, got, strict=True):
        assert cut == whole[: whole.index(end)] if end in whole else cut == whole


def test_sampling_depends_on_its_seed_and_a_tiny_nucleus_is_greedy():
    model = tiny_model("*-GKA")
    a, b, c = (generate(model, PROMPTS, max_new_tokens=8, temperature=2.0, seed=s) for s in (1, 1, 2))
    assert a == b != c
    assert generate(model, PROMPTS, max_new_tokens=8, temperature=2.0, top_p=1e-6) == generate(model, PROMPTS, max_new_tokens=8)


def test_bad_prompts_are_refused():
    model = tiny_model("*")
    with pytest.raises(ValueError, match="at least one"):
        generate(model, [[]])
    with pytest.raises(ValueError, match="0 ... 60"):
        generate(model, [[61]])
