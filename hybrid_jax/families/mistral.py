"""Mistral (one window for every layer), Ministral (a window for some) and Ministral 3 (YaRN, scaled queries)."""

from hybrid_jax.families.base import Family


def _window(hf, layer):
    return bool(hf.get("sliding_window"))


def _read_ministral3(hf):
    rope = hf.get("rope_parameters") or {}
    beta = rope.get("llama_4_scaling_beta")
    return {} if beta is None else {"query_scaling": (beta, rope["original_max_position_embeddings"])}


MISTRAL = Family("mistral", "MistralForCausalLM", lambda hf: {}, _window, {"max_position_embeddings": 131072})
MINISTRAL = Family("ministral", "MinistralForCausalLM", lambda hf: {}, _window, {"max_position_embeddings": 131072})
MINISTRAL3 = Family("ministral3", "Ministral3ForCausalLM", _read_ministral3, _window, {"rms_norm_eps": 1e-5})
