"""What hybrid-model-factory's plugin for vLLM does with an export that is not what was trained."""

from __future__ import annotations

from hybrid_jax.config import ATTENTION, BMojoConfig, GDNConfig, GKAConfig, Mamba2Config, ModelConfig, SWAConfig
from hybrid_jax.mixers import KINDS

SERVED = ("qwen2", "qwen3", "qwen3_moe")
_MAMBA2_QK_NORM_EPS = 1e-6  # of B_norm and C_norm, whatever rms_norm_eps is


def _norm_notes(config: ModelConfig, used: set[str]) -> list[str]:
    eps, notes, gdn, gka = config.rms_norm_eps, [], config.options(GDNConfig), config.options(GKAConfig)
    if "gdn" in used and gdn.norm_eps != GDNConfig().norm_eps:
        notes.append(
            f"gdn_config.norm_eps = {gdn.norm_eps}: it serves the output norm with {GDNConfig().norm_eps} and the "
            f"block norms with {gdn.norm_eps} instead of {eps}"
        )
    if "gka" in used and gka.norm_eps not in (GKAConfig().norm_eps, eps):
        notes.append(f"gka_config.norm_eps = {gka.norm_eps}: it serves the block norms with it instead of {eps}")
    if "mamba2" in used and config.qk_norm and config.options(Mamba2Config).use_qk_norm and eps != _MAMBA2_QK_NORM_EPS:
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
    used, gdn, bmojo = config.used_kinds(), config.options(GDNConfig), config.options(BMojoConfig)
    windowed = any(w for w, layer in zip(config.attention_windows, config.layers, strict=True) if layer.kind == ATTENTION)
    mixed = [kind for kind, row in KINDS.items() if kind in used and not row.attends]
    notes = []
    if len(mixed) > 1:
        notes.append(f"it cannot serve {' and '.join(mixed)} in one model")
    if windowed:
        notes.append("it knows no sliding windows of attention layers, and serves them with full attention; use SWA layers")
    window = config.options(SWAConfig).window_size
    if any(w and w < window for w, layer in zip(config.attention_windows, config.layers, strict=True) if layer.kind == "swa"):
        notes.append(f"it gives SWA layers the window {window}, also where the source's own window is shorter")
    if config.o_bias:
        notes.append("it has no bias for the attention's output projection")
    if "gdn" in used and not (gdn.use_gate and gdn.use_short_conv):
        notes.append("it has no GDN without gate or convolution")
    if "discrete_mamba2" in used:
        notes.append("it has no Discrete Mamba-2")
    if "mamba3" in used:
        notes.append("it has no Mamba-3")
    sizes = {kind: getattr(config.options(row.options), "state_size", None) for kind, row in KINDS.items() if row.options}
    notes += [f"it has no state_size for {kind}" for kind in mixed if (sizes[kind] or config.head_dim) != config.head_dim]
    if any(layer.attention_heads for layer in config.layers):
        notes.append("it has no layers with some heads of attention beside a mixer")
    if "bmojo" in used and bmojo.window_size % 2:
        notes.append(f"it raises the odd bmojo_config.window_size {bmojo.window_size} by 1")
    return notes + _norm_notes(config, used)
