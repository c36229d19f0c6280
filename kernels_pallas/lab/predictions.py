"""What the compiler's schedules predict of the kernels, for comparison with times on hardware.

chip -> case -> (static bundles, cycles of HBM traffic) per token and head, at the shape of `cases.Shape`: the numbers of
`python -m kernels_pallas.lab --no-xla`, which `tests/kernels/test_lab.py` compares with its record.
"""

from __future__ import annotations

PREDICTIONS: dict[str, dict[str, tuple[float, float]]] = {
    "v5e": {
        "linear_attention": (2.87, 1.92),
        "linear_attention.backward": (8.34, 6.18),
        "gated_delta_rule": (6.05, 1.92),
        "gated_delta_rule.backward": (15.85, 8.08),
        "gated_kalmanet": (34.69, 1.95),
        "gated_kalmanet.backward": (81.14, 10.99),
        "gated_kalmanet_accurate": (61.09, 2.42),
        "gated_kalmanet_accurate.backward": (129.80, 11.93),
        "gated_kalmanet_cg": (25.48, 1.95),
        "gated_kalmanet_cg.backward": (62.74, 10.99),
        "short_conv": (1.32, 0.94),
        "short_conv.backward": (4.22, 2.82),
        "linear_attention_step": (80.38, 241.65),
        "gated_delta_rule_step": (83.88, 241.65),
        "gated_kalmanet_step": (567.62, 481.42),
        "gated_kalmanet_cg_step": (366.19, 481.42),
        "mamba3": (2.87, 1.92),
        "mamba3.backward": (8.25, 6.18),
        "mamba3_mimo": (11.21, 7.58),
        "mamba3_mimo.backward": (32.79, 24.56),
    },
    "v5p": {
        "linear_attention": (1.44, 0.75),
        "linear_attention.backward": (4.24, 2.40),
        "gated_delta_rule": (3.05, 0.75),
        "gated_delta_rule.backward": (8.01, 3.14),
        "short_conv": (0.70, 0.37),
        "short_conv.backward": (2.17, 1.10),
        "linear_attention_step": (42.56, 93.97),
        "gated_delta_rule_step": (45.00, 93.98),
        "mamba3": (1.43, 0.75),
        "mamba3.backward": (4.24, 2.40),
        "mamba3_mimo": (5.71, 2.95),
        "mamba3_mimo.backward": (16.92, 9.55),
    },
    "v6e": {
        "linear_attention": (2.42, 1.12),
        "linear_attention.backward": (6.53, 3.61),
        "gated_delta_rule": (5.29, 1.12),
        "gated_delta_rule.backward": (12.89, 4.71),
        "short_conv": (0.96, 0.55),
        "short_conv.backward": (3.40, 1.64),
        "linear_attention_step": (71.12, 140.96),
        "gated_delta_rule_step": (81.00, 140.96),
        "mamba3": (2.43, 1.12),
        "mamba3.backward": (6.45, 3.61),
        "mamba3_mimo": (9.62, 4.42),
        "mamba3_mimo.backward": (25.65, 14.32),
    },
    "tpu7x": {
        "linear_attention": (2.46, 0.62),
        "linear_attention.backward": (6.58, 2.01),
        "gated_delta_rule": (5.12, 0.63),
        "gated_delta_rule.backward": (12.74, 2.63),
        "short_conv": (0.96, 0.31),
        "short_conv.backward": (3.37, 0.92),
        "linear_attention_step": (71.00, 78.55),
        "gated_delta_rule_step": (82.12, 78.55),
        "mamba3": (2.45, 0.62),
        "mamba3.backward": (6.44, 2.01),
        "mamba3_mimo": (9.89, 2.46),
        "mamba3_mimo.backward": (25.91, 7.98),
    },
}
