"""The contract that every token mixer fulfils."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx

from hybrid_jax.config import ModelConfig

Arrays = Mapping[str, jax.Array]  # parameters of one module by their names inside it, `q_proj.kernel`
State = Any  # a mixer's state: a tuple (best a NamedTuple) of arrays, None where it has no such array


@runtime_checkable
class Mixer(Protocol):
    """What the decoder, training, conversion and the planner ask of a token mixer, an `nnx.Module`.

    A class that fulfils it, one row of `hybrid_jax.mixers.KINDS` and one row of `hybrid_jax.layers.MIXERS` make a mixer;
    it is then parsed in patterns, primed from attention, trained under scan and rematerialization, sharded, exported,
    loaded, decoded and planned for without further code. The conventions:

    *Tokens.* Inputs and outputs are [B, T, hidden] in the compute dtype. A row holds several documents, one after the
    other: `segment_ids` [B, T] int32 tells them apart, 0 is padding. Nothing of one document may reach another, so states
    and convolutions restart where the segment changes, and `positions` [B, T] int32 restart with them.

    *Sequence parallelism.* Over a mesh whose `seq` axis is larger than 1 a device holds two chunks of every row (zig-zag),
    so a mixer must not look along T by itself. Tokens meet in `parallel.recurrence.recurrence` (any recurrence with an
    associative summary), `parallel.recurrence.convolution` and `parallel.attention.attend` only; a mixer that uses these
    is sequence-parallel. The rest is per token.

    *States.* `state=None` starts every document from nothing and returns what it likes for the state. With a state, its
    tokens come before `x` (prefill, then one token at a time), and the new state has the same structure, shapes and
    dtypes. A recurrent state is float32, whatever the compute dtype, because rounding adds up over thousands of tokens;
    caches of keys and convolution tails are in the compute dtype. Decoding equals the forward pass.

    *Mixing matrices.* A mixer whose heads are linear in their values may have a method `mixing(x, *, positions, segment_ids)`
    that returns them as a `layers.mixing.Mixing`: what a head's output has of every token's value, before its norm and gate.
    The instrument `mixing` asks for it, and refuses a model that has a mixer without.

    *Composition.* A recurrent mixer whose state is an affine function of the state before, S -> A S + b, may have a method
    `summary(x, *, segment_ids, state)` that returns (A, b) of x [B, T, hidden]: A is [B, H], or [B, H, K, K]; b is a tuple of
    the recurrent states, the arrays whose axes are `layers.recurrent.STATE_AXES`. Of `state` it reads the tails of convolutions
    only. With a row in `composition.states.COMPOSABLE` the contexts of its models can be read in chunks.

    *Parameters.* Every parameter is made with `layers.parameter.parameter`, or by a layer that does (`Linear`, `RMSNorm`,
    `ShortConv`), which states how it is sharded, cast, frozen, decayed, updated by Muon and laid out in a checkpoint.
    Names follow hybrid-model-factory's checkpoints where it has the mixer.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype: Any = ...):
        """Makes the parameters for layer number `layer`, in `dtype`, drawn from `rngs`.

        Layers that are scanned share one program: what the instance keeps must not depend on `layer`, unless
        `config.programs` differs there too.
        """

    def __call__(
        self,
        x: jax.Array,  # [B, T, hidden]
        *,
        positions: jax.Array,  # [B, T] int32
        segment_ids: jax.Array,  # [B, T] int32
        state: State | None = None,
    ) -> tuple[jax.Array, State | None]:
        """Returns (y [B, T, hidden], the state after x)."""
        ...

    def init_state(self, batch: int, max_length: int, dtype: Any = ...) -> State:
        """Returns the empty state of `batch` rows for up to `max_length` tokens; `dtype` is of caches, see above."""
        ...

    def state_axes(self) -> State:
        """Returns, in the structure of `init_state`, each array's logical axes (`parallel.sharding.RULES`): one name or
        None per dimension. The planner shards states by them."""
        ...

    @staticmethod
    def from_attention(source: Arrays, fresh: Arrays, config: ModelConfig, layer: int) -> dict[str, jax.Array]:
        """Returns the parameters that attention gives a new mixer; it is the recipe of stage 0 of Priming.

        A pure function, also under jit. Parameters that it leaves out stay as drawn.

        Args:
          source: the parameters of the layer's attention (`q_proj.kernel` [hidden, H * D], ...).
          fresh: the mixer's parameters as drawn.
          config: of the hybrid.
          layer: the layer's number, as in the constructor.
        """
        ...
