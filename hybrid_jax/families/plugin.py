"""What hybrid-model-factory's plugin for vLLM does with an export that is not what was trained."""

from __future__ import annotations

from hybrid_jax.config import ATTENTION, GDNConfig, GKAConfig, ModelConfig

SERVED = ("qwen2", "qwen3", "qwen3_moe")
_RECURRENT = ("gka", "gdn", "mamba2")
_MAMBA2_QK_NORM_EPS = 1e-6  # of B_norm and C_norm, whatever rms_norm_eps is


def _norm_notes(config: ModelConfig, used: set[str]) -> list[str]:
    eps, notes = config.rms_norm_eps, []
    if "gdn" in used and config.gdn.norm_eps != GDNConfig().norm_eps:
        notes.append(
            f"gdn_config.norm_eps = {config.gdn.norm_eps}: it serves the output norm with {GDNConfig().norm_eps} and the "
            f"block norms with {config.gdn.norm_eps} instead of {eps}"
        )
    if "gka" in used and config.gka.norm_eps not in (GKAConfig().norm_eps, eps):
        notes.append(f"gka_config.norm_eps = {config.gka.norm_eps}: it serves the block norms with it instead of {eps}")
    if "mamba2" in used and config.qk_norm and config.mamba2.use_qk_norm and eps != _MAMBA2_QK_NORM_EPS:
        notes.append(f"Mamba-2's B and C are normed with rms_norm_eps = {eps} instead of {_MAMBA2_QK_NORM_EPS}")
    return notes


def plugin_notes(config: ModelConfig) -> list[str]:
    """What hybrid-model-factory's plugin for vLLM cannot serve of an export, or serves differently; empty if nothing.

    A model without mixers needs no plugin and gets no notes. Each note is one line to print. Source: hybrid-model-factory's
    vllm-inference/src/primed_vllm.
    """
    return [f"the vLLM plugin of hybrid-model-factory: {note}" for note in _notes(config)]


def _notes(config: ModelConfig) -> list[str]:
    if not config.is_hybrid:
        return []
    if config.family not in SERVED:
        return [f"it serves hybrids of {', '.join(SERVED)} only, not of {config.family}"]
    if config.is_fused:
        return ["it serves no fused models; export without the teacher"]
    used = {kind for layer in config.layers for kind in layer.kinds}
    windowed = any(w for w, layer in zip(config.attention_windows, config.layers, strict=True) if layer.kind == ATTENTION)
    if "bmojo" in used:
        used.add(config.bmojo.ssm_mixer)
    mixed = [kind for kind in _RECURRENT if kind in used]
    notes = []
    if len(mixed) > 1:
        notes.append(f"it cannot serve {' and '.join(mixed)} in one model")
    if windowed:
        notes.append("it knows no sliding windows of attention layers, and serves them with full attention; use SWA layers")
    if config.o_bias:
        notes.append("it has no bias for the attention's output projection")
    if "gdn" in used and not (config.gdn.use_gate and config.gdn.use_short_conv):
        notes.append("it has no GDN without gate or convolution")
    if "bmojo" in used and config.bmojo.window_size % 2:
        notes.append(f"it raises the odd bmojo_config.window_size {config.bmojo.window_size} by 1")
    return notes + _norm_notes(config, used)
