"""Generation: the cache equals the full forward; rows do not disturb each other; sampling."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import generate
from hybrid_jax.config import GKAConfig, RopeConfig
from hybrid_jax.generation import Sampling, _forward, check_prompts, empty_state, generation_defaults
from hybrid_jax.generation.sampling import adjusted, sample
from hybrid_jax.parameters import split_model
from tests.conftest import relative_error, tiny_config, tiny_model

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
    for whole, ended in zip(want, got, strict=True):
        assert ended == whole[: whole.index(end)] if end in whole else ended == whole


def test_any_of_several_end_ids_ends_a_row():
    model = tiny_model("*-GKA")
    want = generate(model, PROMPTS, max_new_tokens=8)
    ends = [want[0][3], want[1][2]]
    got = generate(model, PROMPTS, max_new_tokens=8, eos_id=ends)
    for full, row in zip(want, got, strict=True):
        first = min((full.index(e) for e in ends if e in full), default=len(full))
        assert row == full[:first]
    assert len(got[0]) <= 3 and len(got[1]) <= 2


LOGITS = np.log(np.array([[0.05, 0.5, 0.15, 0.3], [0.4, 0.1, 0.3, 0.2]], np.float32))


def drawn(**options):
    """How often each token is drawn, of 4000 draws for each row of LOGITS."""
    logits = jnp.repeat(jnp.asarray(LOGITS), 4000, axis=0)
    tokens = np.asarray(sample(logits, jax.random.key_data(jax.random.key(0)), Sampling(**options))).reshape(2, 4000)
    return np.stack([np.bincount(row, minlength=4) / 4000 for row in tokens])


@pytest.mark.parametrize(
    "options, want",
    [
        (dict(temperature=1.0), [[0.05, 0.5, 0.15, 0.3], [0.4, 0.1, 0.3, 0.2]]),
        # p^2 over its sum: 0.0025, 0.25, 0.0225, 0.09 of 0.365; 0.16, 0.01, 0.09, 0.04 of 0.3
        (dict(temperature=0.5), [[0.0068, 0.6849, 0.0616, 0.2466], [0.5333, 0.0333, 0.3, 0.1333]]),
        # sqrt p over its sum: 0.2236, 0.7071, 0.3873, 0.5477 of 1.8657; 0.6325, 0.3162, 0.5477, 0.4472 of 1.9436
        (dict(temperature=2.0), [[0.1199, 0.3790, 0.2076, 0.2936], [0.3254, 0.1627, 0.2818, 0.2301]]),
        (dict(temperature=1.0, top_k=2), [[0, 0.625, 0, 0.375], [0.5714, 0, 0.4286, 0]]),
        # before the third token come 0.8 of row 0 and 0.7 of row 1
        (dict(temperature=1.0, top_p=0.75), [[0, 0.625, 0, 0.375], [0.4444, 0, 0.3333, 0.2222]]),
        (dict(temperature=1.0, top_p=0.01), [[0, 1, 0, 0], [1, 0, 0, 0]]),
        (dict(temperature=1e-6), [[0, 1, 0, 0], [1, 0, 0, 0]]),
        (dict(temperature=1e-300), [[0, 1, 0, 0], [1, 0, 0, 0]]),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_computed_by_hand(options, want):
    assert np.abs(drawn(**options) - np.asarray(want)).max() < 0.025  # three standard deviations of 4000 draws


@pytest.mark.parametrize("options", [(0.7, 0.8, 20), (1.5, 0.95, 0), (1.0, 1.0, 5), (0.3, 0.5, 50)], ids=str)
def test_logits_are_adjusted_as_transformers_adjusts_them(options):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    temperature, top_p, top_k = options
    logits = np.random.default_rng(0).normal(size=(3, 97)).astype(np.float32) * 3
    steps = [theirs.TemperatureLogitsWarper(temperature)]
    steps += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    steps += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
    want = torch.from_numpy(logits)
    for step in steps:
        want = step(None, want)
    got = jax.nn.softmax(adjusted(jnp.asarray(logits), Sampling(temperature, top_p, top_k)), axis=-1)
    np.testing.assert_allclose(got, torch.softmax(want, -1).numpy(), atol=1e-6)


def test_decoding_far_from_the_start_equals_the_full_forward():
    # a strong ridge, so that the solve does not multiply float32's rounding by 50
    model = tiny_model("*-SWA-GKA-GDN", max_position_embeddings=512, gka=GKAConfig(chunk_size=16, ridge_strength=0.5))
    prompt = np.random.default_rng(0).integers(0, 61, 290)
    tokens = generate(model, [prompt], max_new_tokens=8)[0]
    whole = np.concatenate([prompt, tokens])[None].astype(np.int32)
    want = np.asarray(logits(model, whole, np.ones_like(whole)))[0]
    assert tokens == want[289:-1].argmax(-1).tolist()
    structure, parameters = split_model(model)
    state = empty_state(structure, parameters, 1, 320)
    ones, at = np.ones_like(whole), np.arange(298, dtype=np.int32)[None]
    got, state = _forward(structure, parameters, whole[:, :290], ones[:, :290], at[:, :290], state)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating))
    for i in range(290, 298):
        assert got.dtype == np.float32 and relative_error(got[0], want[i - 1]) < 1e-5, i
        got, state = _forward(structure, parameters, whole[:, i : i + 1], ones[:, :1], at[:, i : i + 1], state)


def test_longrope_is_decoded_up_to_its_original_context_whatever_the_slots_and_the_padding():
    """20 tokens, in caches of 64 slots, behind padding that is longer than the context."""
    factors = (("long_factor", (9.0,) * 4), ("original_max_position_embeddings", 20), ("short_factor", (1.0, 1.5, 2.0, 2.5)))
    model = tiny_model("*-*", rope=RopeConfig(kind="longrope", options=factors))
    prompt = np.random.default_rng(0).integers(0, 61, 12).tolist()
    want = greedy_without_cache(model, prompt, 8)
    assert generate(model, [prompt], max_new_tokens=8) == [want]
    assert generate(model, [prompt, prompt[:3]], max_new_tokens=8, padded_to=32)[0] == want
    with pytest.raises(ValueError, match="longrope: .* room for 21 tokens is not supported, give at most 20"):
        check_prompts(model.config, [prompt], 9)


def test_prompts_of_various_lengths_share_one_program():
    model = tiny_model("*-GKA")
    generate(model, [[1, 2, 3]], max_new_tokens=2)
    before = _forward._cache_size()
    generate(model, [[5] * 40], max_new_tokens=20)
    generate(model, [[7]], max_new_tokens=3)
    assert _forward._cache_size() == before


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-1.0), "temperature must be a number at least 0, got -1.0"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=float("inf")), "temperature"),
        (dict(top_p=0.0), "top_p must be a number above 0 and at most 1"),
        (dict(top_p=1.7), "top_p"),
        (dict(top_p=-1.0), "top_p"),
        (dict(top_k=-1), "top_k must be an integer at least 0"),
        (dict(max_new_tokens=-3), "max_new_tokens must be an integer at least 1, got -3"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=2.0), "max_new_tokens"),
        (dict(eos_id=61), "eos_id"),
        (dict(eos_id=[3, -1]), "eos_id"),
        (dict(eos_id="3"), "eos_id"),
        (dict(seed=0.5), "seed"),
        (dict(max_new_tokens=254), "3 tokens and 254 new ones are more than the model's 256 positions"),
    ],
    ids=str,
)
def test_options_nobody_can_mean_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model("*"), [[5, 6, 7]], **options)


def test_a_model_without_positions_has_no_longest_prompt():
    assert len(check_prompts(tiny_model("GKA").config, [[1] * 300], 10)[0]) == 300


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
    with pytest.raises(ValueError, match="integer token ids"):
        generate(model, [[1.7, 2.2]])
    assert generate(model, np.array([[1, 2], [3, 4]]), max_new_tokens=1) == generate(model, [[1, 2], [3, 4]], max_new_tokens=1)


@pytest.mark.parametrize(
    "written",
    [
        dict(eos_token_id=[3, 5], do_sample=True, temperature=0.6, top_p=0.95, top_k=20),  # as Qwen3's
        dict(eos_token_id=[3, 5], do_sample=True, temperature=0.6),
        dict(eos_token_id=7, temperature=0.6, top_p=0.9),  # greedy, whatever the rest says
        dict(do_sample=True, top_k=None),
        dict(bos_token_id=1),  # and no end, whatever config.json says
        None,
    ],
    ids=str,
)
def test_the_defaults_of_a_model_directory_are_those_of_transformers(written, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": [1, 2]}))
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(written))
    name = "config.json" if written is None else "generation_config.json"
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path, config_file_name=name, _from_model_config=written is None)
    theirs.update(**theirs._get_default_generation_params(), defaults_only=True)
    ours = generation_defaults(tmp_path, tiny_config("*", extra={"eos_token_id": [1, 2]}))
    eos = theirs.eos_token_id
    assert list(ours.eos_ids) == (eos if isinstance(eos, list) else [eos] if eos is not None else [])
    assert ours.sampling.greedy == (not theirs.do_sample)
    if theirs.do_sample:
        assert ours.sampling == Sampling(theirs.temperature, theirs.top_p, theirs.top_k)


@pytest.mark.parametrize(
    "written, message",
    [
        ([], "an array"),
        (dict(eos_token_id="3"), "eos_token_id must be an integer"),
        (dict(eos_token_id=[3, None]), "eos_token_id must be an integer"),
        (dict(do_sample="false"), "do_sample must be true or false"),
        (dict(do_sample=True, temperature=-1), "temperature must be"),
        (dict(do_sample=True, top_p=0), "top_p must be"),
    ],
    ids=str,
)
def test_a_wrong_generation_config_is_refused_by_name(written, message, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=message) as e:
        generation_defaults(tmp_path, tiny_config("*"))
    assert "generation_config.json" in str(e.value)


def test_options_that_are_not_applied_are_named(tmp_path, capsys):
    values = dict(do_sample=True, repetition_penalty=1.05, num_beams=1, min_p=None)
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    generation_defaults(tmp_path, tiny_config("*"))
    error = capsys.readouterr().err
    assert "repetition_penalty = 1.05 is not applied" in error and "num_beams" not in error and "min_p" not in error


def test_a_negative_end_id_is_none(tmp_path):
    assert generation_defaults(tmp_path, tiny_config("*", extra={"eos_token_id": -1})).eos_ids == ()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [-1, 3]}')
    assert generation_defaults(tmp_path, tiny_config("*")).eos_ids == (3,)


def test_options_that_change_greedy_generation_too_are_named(tmp_path, capsys):
    values = dict(repetition_penalty=1.3, min_p=0.1, stop_strings=["."], forced_eos_token_id=3, num_beams=2)
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert generation_defaults(tmp_path, tiny_config("*")).sampling.greedy
    error = capsys.readouterr().err
    for word in ("repetition_penalty = 1.3", "num_beams = 2", "stop_strings = ['.']", "forced_eos_token_id = 3"):
        assert word in error
    assert "min_p" not in error, "it changes only what is sampled"
