"""Parts of a `ModelConfig`: the rotary embedding and the mixture of experts."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from hybrid_jax.checks import check_boolean
from hybrid_jax.options import Options, option, optional
from hybrid_jax.schema import KEYS, check_key, check_rope


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: transformers' `rope_parameters`.

    Args:
      theta: base of the frequencies.
      kind: `default`, `linear`, `llama3`, `yarn` or `longrope`.
      options: the other keys of `rope_parameters`, sorted pairs.
    """

    theta: float = 10_000.0
    kind: str = "default"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        check_key("rope_theta", self.theta)
        check_rope(self.kind, dict(self.options))

    def option(self, name: str, default: Any = None) -> Any:
        """Returns the value of an option, or the default where it is absent."""
        return dict(self.options).get(name, default)

    def number(self, name: str) -> float:
        """Returns the value of an option that this kind must have; `check_rope` has seen it."""
        return dict(self.options)[name]

    def channels(self, head_dim: int) -> int:
        """Returns how many channels of a head are rotated, its first ones: all, or the share `partial_rotary_factor`."""
        return int(head_dim * self.option("partial_rotary_factor", 1.0))

    def check(self, head_dim: int) -> None:
        """Checks that the embedding fits heads of `head_dim`.

        Raises:
          ValueError: it rotates an odd number of channels, or none, or a list of LongRoPE's factors is not half as long.
        """
        channels = self.channels(head_dim)
        if channels % 2 or not channels:
            raise ValueError(
                f"partial_rotary_factor {self.option('partial_rotary_factor')!r} rotates {channels} of {head_dim} channels; choose "
                "one that rotates an even number of them"
            )
        for name in ("short_factor", "long_factor"):
            factors = self.option(name)
            if self.kind == "longrope" and len(factors) != channels // 2:
                raise ValueError(
                    f"rope_parameters.{name} must have {channels // 2} entries, one for each pair of rotated channels, got "
                    f"{len(factors)}"
                )


@dataclasses.dataclass(frozen=True)
class MoEConfig(Options):
    """Options of a mixture-of-experts MLP: router, top-k experts, and a shared expert or none.

    All of them belong to the source model, so a hybrid keeps them as they are.

    Args:
      num_experts: number of expert MLPs per layer.
      experts_per_token: how many experts process each token: those with the largest router scores.
      intermediate_size: hidden width of each expert.
      norm_topk_prob: rescale the router probabilities of the chosen experts so that they sum to one.
      shared_intermediate_size: hidden width of a shared expert, whose output counts sigmoid(w x) times (Qwen3-Next); None: no such.
      shared_gate: False: the shared expert's output counts once, without that gate (Llama 4).
      sigmoid_router: an expert's probability is the sigmoid of its score, not the softmax over all of them (Llama 4).
      weighted_inputs: the probabilities multiply what the chosen experts read, not what they give (Llama 4).
    """

    KEY: ClassVar[str] = "moe"

    num_experts: int = option(KEYS["num_experts"])
    experts_per_token: int = option(KEYS["num_experts_per_tok"])
    intermediate_size: int = option(KEYS["moe_intermediate_size"])
    norm_topk_prob: bool = option(check_boolean, True)
    shared_intermediate_size: int | None = option(optional(KEYS["shared_expert_intermediate_size"]), None)
    shared_gate: bool = option(check_boolean, True)
    sigmoid_router: bool = option(check_boolean, False)
    weighted_inputs: bool = option(check_boolean, False)

    def __post_init__(self):
        super().__post_init__()
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"num_experts_per_tok must be at most num_experts ({self.num_experts}), got {self.experts_per_token}")
