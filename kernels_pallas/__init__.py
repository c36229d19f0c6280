"""Recurrent sequence-mixing operations for JAX and the norms around them, one public function each.

Layout everywhere: q [B,T,H,K]; k [B,T,Hk,K] and v [B,T,Hv,V], Hk and Hv divisors of H, whose heads are read as if each were
repeated in place; o [B,T,H,V]; per-head scalars [B,T,H]; states [B,H,K,V] float32.
Decays are logs (<= 0). `segment_ids` [B,T] packs several sequences in a row: a state is reset where the
id changes, and `initial_state` belongs to the first segment of a row.

Every operation takes `implementation=None | "reference" | "xla" | "pallas_tpu" | "pallas_gpu"`: the reference is
the recurrence token by token, `xla` its chunked form; None is `pallas_tpu` on TPU, `xla` elsewhere (README.md).
"""

from kernels_pallas.angle_sums import angle_sums
from kernels_pallas.gated_delta_rule import gated_delta_rule, gated_delta_rule_step, gated_delta_rule_summary
from kernels_pallas.gated_kalmanet import (
    gated_kalmanet,
    gated_kalmanet_queries,
    gated_kalmanet_step,
    gated_kalmanet_summary,
)
from kernels_pallas.gated_rms_norm import gated_rms_norm
from kernels_pallas.linear_attention import linear_attention, linear_attention_step, linear_attention_summary
from kernels_pallas.mamba3 import mamba3, mamba3_step
from kernels_pallas.qk_norm_rope import qk_norm_rope
from kernels_pallas.qk_norm_turn import qk_norm_turn
from kernels_pallas.rms_norm import rms_norm
from kernels_pallas.short_conv import HeadNorm, short_conv, short_conv_step
from kernels_pallas.ssd import ssd, ssd_inputs, ssd_step

__all__ = [
    "HeadNorm",
    "angle_sums",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gated_delta_rule_summary",
    "gated_kalmanet",
    "gated_kalmanet_queries",
    "gated_kalmanet_step",
    "gated_kalmanet_summary",
    "gated_rms_norm",
    "linear_attention",
    "linear_attention_step",
    "linear_attention_summary",
    "mamba3",
    "mamba3_step",
    "qk_norm_rope",
    "qk_norm_turn",
    "rms_norm",
    "short_conv",
    "short_conv_step",
    "ssd",
    "ssd_inputs",
    "ssd_step",
]
