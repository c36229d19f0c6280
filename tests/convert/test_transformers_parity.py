"""Logits equal transformers' own classes on random models, odd configurations included."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file

from hybrid_jax import load_model, save_model
from tests.conftest import relative_error

torch = pytest.importorskip("torch")

BASE = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    initializer_range=0.2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
MINISTRAL3_ROPE = {
    **YARN,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 16,
}
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75, short_factor=[1.0, 1.1, 1.3], long_factor=[1.0, 2.5, 7.0]
)
PHI_ROPE = dict(rope_type="linear", rope_theta=777.0, factor=4.0, partial_rotary_factor=0.4)
QWEN3_NEXT = dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=12)
LLAMA4 = dict(head_dim=10, attention_chunk_size=7, intermediate_size=40, num_local_experts=5, floor_scale=5, attn_scale=0.3)
TOKENS = dict(pad_token_id=1, bos_token_id=2, eos_token_id=3)  # where the defaults are beyond our vocabulary
CASES = {
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3 tied, biased, MHA, odd head_dim": (
        "Qwen3",
        dict(head_dim=10, tie_word_embeddings=True, attention_bias=True, num_key_value_heads=6),
    ),
    "qwen3 yarn": ("Qwen3", dict(head_dim=16, rope_parameters=YARN)),
    "qwen3 linear rope": ("Qwen3", dict(head_dim=8, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0))),
    "qwen3 some layers windowed": ("Qwen3", dict(head_dim=16, use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2 one key head, windowed": (
        "Qwen2",
        dict(num_key_value_heads=1, use_sliding_window=True, sliding_window=7, max_window_layers=2),
    ),
    "llama3 rope": ("Llama", dict(rope_parameters=LLAMA3_ROPE)),
    "llama biases, GQA 8": (
        "Llama",
        dict(attention_bias=True, mlp_bias=True, num_attention_heads=8, num_key_value_heads=1, head_dim=12),
    ),
    "mistral windowed": ("Mistral", dict(sliding_window=11, head_dim=14)),
    "mistral without window": ("Mistral", dict(sliding_window=None)),
    "ministral alternating": (
        "Ministral",
        dict(sliding_window=8, head_dim=8, layer_types=["full_attention", "sliding_attention", "full_attention"]),
    ),
    "ministral3 yarn, scaled queries": ("Ministral3", dict(head_dim=16, rope_parameters=MINISTRAL3_ROPE)),
    "smollm3 every second layer without rope, tied": (
        "SmolLM3",
        dict(no_rope_layer_interval=2, tie_word_embeddings=True, **TOKENS),
    ),
    "smollm3 untied, biased, windows in layers without rope": (
        "SmolLM3",
        dict(
            tie_word_embeddings=False,
            attention_bias=True,
            mlp_bias=True,
            head_dim=10,
            num_key_value_heads=1,
            no_rope_layers=[0, 1, 0],
            use_sliding_window=True,
            sliding_window=7,
            **TOKENS,
        ),
    ),
    "phi one key head, odd head_dim": ("Phi", dict(num_key_value_heads=1, head_dim=20, rope_parameters=PHI_ROPE)),
    "phi normed queries and keys": ("Phi", dict(qk_layernorm=True, layer_norm_eps=1e-3)),
    "phi3 windowed, part of the head rotated": (
        "Phi3",
        dict(sliding_window=9, rope_parameters=dict(rope_type="default", rope_theta=777.0, partial_rotary_factor=0.5), **TOKENS),
    ),
    "phi3 short documents of longrope, tied": (
        "Phi3",
        dict(
            tie_word_embeddings=True,
            num_key_value_heads=1,
            original_max_position_embeddings=128,
            rope_parameters=LONGROPE,
            **TOKENS,
        ),
    ),
    "phi3 long documents of longrope, windowed": (
        "Phi3",
        dict(head_dim=8, sliding_window=7, original_max_position_embeddings=12, rope_parameters=LONGROPE, **TOKENS),
    ),
    "mixtral": ("Mixtral", dict(num_local_experts=5, num_experts_per_tok=3, head_dim=10)),
    "mixtral windowed, tied, one key head": (
        "Mixtral",
        dict(num_local_experts=3, sliding_window=6, tie_word_embeddings=True, num_key_value_heads=1, intermediate_size=24),
    ),
    "olmo2 yarn, one key head, biased": (
        "Olmo2",
        dict(rope_parameters=YARN, num_key_value_heads=1, attention_bias=True, head_dim=10, **TOKENS),
    ),
    "olmo3 windowed, tied, two ropes": (
        "Olmo3",
        dict(
            sliding_window=7,
            tie_word_embeddings=True,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=dict(full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=777.0)),
            **TOKENS,
        ),
    ),
    "gemma2 windowed, soft-capped": (
        "Gemma2",
        dict(head_dim=8, sliding_window=7, attn_logit_softcapping=1.5, final_logit_softcapping=4.0),
    ),
    "gemma2 untied, no soft caps, own query scale": (
        "Gemma2",
        dict(
            head_dim=10,
            tie_word_embeddings=False,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            query_pre_attn_scalar=21,
            layer_types=["full_attention", "full_attention", "sliding_attention"],
            sliding_window=5,
        ),
    ),
    "gemma3 tied, one key head, own query scale": ("Gemma3", dict(num_key_value_heads=1, head_dim=10, query_pre_attn_scalar=7)),
    "gemma3 untied, windowed, biased, soft-capped, two ropes": (
        "Gemma3",
        dict(
            tie_word_embeddings=False,
            head_dim=8,
            sliding_window=7,
            attention_bias=True,
            final_logit_softcapping=5.0,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=4.0, rope_theta=5000.0),
                sliding_attention=dict(rope_type="default", rope_theta=77.0),
            ),
        ),
    ),
    "qwen3 next, odd heads, a dense layer, tied": (
        "Qwen3Next",
        dict(
            **QWEN3_NEXT,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            linear_num_key_heads=3,
            linear_num_value_heads=9,
            linear_key_head_dim=6,
            linear_value_head_dim=5,
            linear_conv_kernel_dim=3,
            mlp_only_layers=[2],
            tie_word_embeddings=True,
            attention_bias=True,
            rope_parameters=dict(rope_type="default", rope_theta=777.0, partial_rotary_factor=0.5),
        ),
    ),
    "qwen3 next": (
        "Qwen3Next",
        dict(
            **QWEN3_NEXT,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=6,
            linear_key_head_dim=8,
            linear_value_head_dim=4,
            norm_topk_prob=False,
        ),
    ),
    "qwen3.5 text": (
        "Qwen3_5",
        dict(
            num_hidden_layers=2,
            head_dim=24,
            layer_types=["full_attention", "linear_attention"],
            linear_num_key_heads=1,
            linear_num_value_heads=3,
            linear_key_head_dim=6,
            linear_value_head_dim=10,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=777.0,
                partial_rotary_factor=0.5,
                mrope_section=[2, 2, 2],
                mrope_interleaved=True,
            ),
        ),
    ),
    "qwen3.5 moe text": (
        "Qwen3_5Moe",
        dict(
            num_hidden_layers=2,
            head_dim=24,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=1,
            linear_num_value_heads=3,
            linear_key_head_dim=6,
            linear_value_head_dim=10,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=12,
            tie_word_embeddings=True,
            attention_bias=True,
        ),
    ),
    "llama4 chunks, a dense layer, a layer without rope, biased": (
        "Llama4",
        dict(
            **LLAMA4,
            **TOKENS,
            intermediate_size_mlp=80,
            moe_layers=[0, 2],
            no_rope_layers=[1, 0, 1],
            attention_bias=True,
            rope_parameters={**LLAMA3_ROPE, "high_freq_factor": 1.0},
        ),
    ),
    "llama4 two experts per token, no norms, chunks in other layers, tied": (
        "Llama4",
        dict(
            **{**LLAMA4, "head_dim": 8, "attention_chunk_size": 16},
            **TOKENS,
            intermediate_size_mlp=24,
            interleave_moe_layer_step=2,
            num_experts_per_tok=2,
            num_key_value_heads=1,
            no_rope_layer_interval=2,
            layer_types=["full_attention", "chunked_attention", "chunked_attention"],
            use_qk_norm=False,
            attn_temperature_tuning=False,
            tie_word_embeddings=True,
            rope_parameters=YARN,
        ),
    ),
    "qwen3 moe windowed": (  # its window is every layer's: max_window_layers and layer_types mean nothing here
        "Qwen3Moe",
        dict(head_dim=16, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, use_sliding_window=True, sliding_window=7),
    ),
    "qwen3 moe": (
        "Qwen3Moe",
        dict(head_dim=16, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True),
    ),
}


CONFIGS = {name: f"{name}TextConfig" for name in ("Gemma3", "Llama4", "Qwen3_5", "Qwen3_5Moe")}


def make(case, **more):
    torch.manual_seed(0)
    name, changes = CASES[case]
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**{**BASE, **changes, **more})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # norms and biases away from their trivial initial values
        for n, p in model.named_parameters():
            if "norm" in n or "bias" in n:
                p.add_(0.3 * torch.randn_like(p))
    return model


def run(model, ids):
    return nnx.jit(lambda m, x: m(x))(model, jnp.asarray(ids))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    theirs = make(case)
    theirs.save_pretrained(tmp_path / "hf")
    ids = np.random.default_rng(0).integers(0, 97, (2, 70))
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids)).logits.numpy()
    error = relative_error(run(load_model(tmp_path / "hf"), ids), want)
    print(f"PARITY {case}: {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize(
    "case", ["qwen3", "qwen3 tied, biased, MHA, odd head_dim", "llama3 rope", "ministral alternating", "qwen3 moe"]
)
def test_our_export_is_loaded_by_transformers_with_the_same_bits(case, tmp_path):
    theirs = make(case)
    theirs.save_pretrained(tmp_path / "hf")
    save_model(load_model(tmp_path / "hf"), tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="eager")
    for (name, a), (_, b) in zip(theirs.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, again.eval()(ids).logits)


def test_sharded_checkpoints_load_and_are_written(tmp_path):
    theirs = make("qwen3")
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    model = load_model(tmp_path / "hf")
    save_model(model, tmp_path / "ours", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    tensors = {name: load_file(tmp_path / "ours" / name) for name in set(index["weight_map"].values())}
    sizes = {name: [x.nbytes for x in values.values()] for name, values in tensors.items()}
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert all(sum(size) <= 50_000 for size in sizes.values())
    assert index["weight_map"] == {name: file for file, values in tensors.items() for name in values}
    ids = np.arange(30)[None]
    assert np.array_equal(run(model, ids), run(load_model(tmp_path / "ours"), ids))
    assert type(theirs).from_pretrained(tmp_path / "ours") is not None


def test_both_rope_schemas_are_read_and_only_one_dict_is_written(tmp_path):
    theirs = make("llama3 rope")
    theirs.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    new = load_model(tmp_path / "hf").config
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    path.write_text(json.dumps(config))
    old = load_model(tmp_path / "hf")
    assert old.config.rope == new.rope
    save_model(old, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["rope_theta"] == 500000.0 and written["rope_parameters"] == {**rope, "rope_theta": 500000.0}
    assert "rope_scaling" not in written  # transformers would take it before an edited rope_parameters


def test_bfloat16_checkpoints_keep_their_dtype_and_can_be_cast(tmp_path):
    make("qwen3").to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    assert load_model(tmp_path / "hf").norm.weight[...].dtype == jnp.bfloat16
    assert load_model(tmp_path / "hf", dtype="float32").norm.weight[...].dtype == jnp.float32
