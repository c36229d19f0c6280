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
        "gated_kalmanet": (42.68, 1.96),
        "gated_kalmanet.backward": (94.62, 11.02),
        "gated_kalmanet_accurate": (68.32, 2.43),
        "gated_kalmanet_accurate.backward": (142.22, 11.96),
        "short_conv": (1.32, 0.94),
        "short_conv.backward": (4.22, 2.82),
        "linear_attention_step": (80.38, 241.65),
        "gated_delta_rule_step": (83.88, 241.65),
        "gated_kalmanet_step": (602.81, 481.42),
    },
    "v5p": {
        "linear_attention": (1.44, 0.75),
        "linear_attention.backward": (4.24, 2.40),
        "gated_delta_rule": (3.05, 0.75),
        "gated_delta_rule.backward": (8.01, 3.14),
        "gated_kalmanet": (21.58, 0.76),
        "gated_kalmanet.backward": (47.66, 4.29),
        "gated_kalmanet_accurate": (34.39, 0.94),
        "gated_kalmanet_accurate.backward": (71.44, 4.65),
        "short_conv": (0.70, 0.37),
        "short_conv.backward": (2.17, 1.10),
        "linear_attention_step": (42.56, 93.97),
        "gated_delta_rule_step": (45.00, 93.98),
        "gated_kalmanet_step": (301.44, 187.22),
    },
    "v6e": {
        "linear_attention": (2.42, 1.12),
        "linear_attention.backward": (6.53, 3.61),
        "gated_delta_rule": (5.29, 1.12),
        "gated_delta_rule.backward": (12.89, 4.71),
        "gated_kalmanet": (36.40, 1.14),
        "gated_kalmanet.backward": (82.97, 6.43),
        "gated_kalmanet_accurate": (57.52, 1.42),
        "gated_kalmanet_accurate.backward": (119.95, 6.97),
        "short_conv": (0.96, 0.55),
        "short_conv.backward": (3.40, 1.64),
        "linear_attention_step": (71.12, 140.96),
        "gated_delta_rule_step": (81.00, 140.96),
        "gated_kalmanet_step": (566.88, 280.83),
    },
    "tpu7x": {
        "linear_attention": (2.46, 0.62),
        "linear_attention.backward": (6.58, 2.01),
        "gated_delta_rule": (5.12, 0.63),
        "gated_delta_rule.backward": (12.74, 2.63),
        "gated_kalmanet": (37.24, 0.64),
        "gated_kalmanet.backward": (84.03, 3.58),
        "gated_kalmanet_accurate": (54.41, 0.79),
        "gated_kalmanet_accurate.backward": (114.28, 3.89),
        "short_conv": (0.96, 0.31),
        "short_conv.backward": (3.37, 0.92),
        "linear_attention_step": (71.00, 78.55),
        "gated_delta_rule_step": (82.12, 78.55),
        "gated_kalmanet_step": (597.88, 156.48),
    },
}
