"""How a context is composed: which keys and values, which recurrent states, and chunks of how many tokens."""

from __future__ import annotations

import dataclasses

from hybrid_jax.checks import check_choice, check_integer
from hybrid_jax.composition.states import COMPOSABLE
from hybrid_jax.config import BMojoConfig, ModelConfig
from hybrid_jax.mixers import KINDS

KEYS = ("full", "concat", "sw")
STATES = ("kv_only", "soup", "fuse", "exact", "ordinary")


@dataclasses.dataclass(frozen=True)
class Composition:
    """How the chunks of a context become one state; the package's docstring has the table.

    Args:
      keys: keys and values: `full`, `concat` or `sw`.
      states: recurrent states: `kv_only`, `soup`, `fuse`, `exact`, or, with `full` only, `ordinary`.
      chunk: tokens of a chunk at most. A context has as few chunks as that allows, all of equal length but for the last one,
        which is shorter by less than their number.
    """

    keys: str = "concat"
    states: str = "soup"
    chunk: int = 4096

    def __post_init__(self):
        check_choice("the composition of keys and values", self.keys, KEYS)
        check_choice("the composition of states", self.states, STATES)
        check_integer("chunk", self.chunk, minimum=1)
        if self.states == "ordinary" and self.keys != "full":
            raise ValueError(f"states of an ordinary pass go with 'full' only, got {str(self)!r}")

    @classmethod
    def parse(cls, text: str, chunk: int = 4096) -> Composition:
        """Returns the composition that `KEYS:STATES` names, e.g. `concat:soup`.

        Raises:
          ValueError: it is not that.
        """
        keys, colon, states = str(text).partition(":")
        if not colon:
            known = f"KEYS of {', '.join(KEYS)} and STATES of {', '.join(STATES)}"
            raise ValueError(f"a composition is KEYS:STATES, with {known}, got {text!r}")
        return cls(keys, states, chunk)

    def __str__(self) -> str:
        return f"{self.keys}:{self.states}"

    def chunks(self, length: int) -> tuple[int, int, int]:
        """Returns how many chunks of equal length a context has, their length, and that of a shorter last one (0: none)."""
        size = -(-length // -(-length // self.chunk))
        return length // size, size, length % size

    @property
    def reads_chunks(self) -> bool:
        """Whether something of the chunks is used: not where the keys are of an ordinary pass and no state is the chunks'."""
        return self.keys != "full" or self.states not in ("kv_only", "ordinary")

    def begin_of_question(self, prefix: int, context: int) -> int:
        """Returns the position of the question's first token behind a prefix and a context of so many tokens."""
        return prefix + (context if self.keys == "full" else self.chunks(context)[1])

    def check(self, config: ModelConfig) -> None:
        """Checks that the states of all layers of a model can be composed so.

        Raises:
          ValueError: names the first layer whose states cannot, and what it has.
        """
        for layer, spec in enumerate(config.layers):
            kind = config.options(BMojoConfig).ssm_mixer if spec.kind == "bmojo" else spec.kind
            if KINDS[kind].recurrent and self.states not in COMPOSABLE.get(kind, ()):
                known = ", ".join(COMPOSABLE.get(kind, ())) or "none"
                raise ValueError(
                    f"layer {layer} ({spec.symbol}): states of {KINDS[kind].symbol} cannot be composed by {self.states!r}; "
                    f"it has: {known}"
                )

    def check_positions(self, config: ModelConfig, prefix: int, context: int, after: int) -> None:
        """Checks that a model has positions for a context that is read so.

        Args:
          prefix, context: their tokens; the context has at least one.
          after: tokens of question and answer.

        Raises:
          ValueError: it needs more positions than the model has, or than can be decoded with caches (`ModelConfig.check_cache`).
        """
        needed, most = self.begin_of_question(prefix, context) + after, config.max_position_embeddings
        if needed > most and any(layer.attends for layer in config.layers):
            raise ValueError(
                f"{self}: a prefix of {prefix} tokens, a context of {context} in chunks of at most {self.chunk}, and {after} "
                f"tokens of question and answer need {needed} positions, more than the model's {most} (max_position_embeddings); "
                "take smaller chunks, or keys and values other than 'full'"
            )
        config.check_cache(needed)
