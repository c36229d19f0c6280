"""Which mixer begins from which other one than attention: the parameters and the options that it takes over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hybrid_jax.mixers import ATTENTION, KINDS
from hybrid_jax.options import MixerOptions
from hybrid_jax.pattern import MixerSpec
from hybrid_jax.recurrent_options import GDNConfig, GKAConfig, HeadsOptions

_HEADS = tuple(field.name for field in dataclasses.fields(HeadsOptions))


@dataclasses.dataclass(frozen=True)
class MixerCopy:
    """How one mixer begins from another.

    Parameters of the same name are copied, and those in `renamed`; what the other mixer does not have is drawn.

    Args:
      source, wanted: the options classes of the other mixer and of the one that begins.
      renamed: names of parameters of the one that begins -> those of the other.
      taken: options that both have and that begin as the other's.
      only: options of the other that the one that begins does not have -> the only value with which it can begin.
      needed: options of the one that begins that the other does not have -> the only value with which nothing of it is lost.
    """

    source: type[MixerOptions]
    wanted: type[MixerOptions]
    renamed: Mapping[str, str]
    taken: tuple[str, ...]
    only: Mapping[str, Any]
    needed: Mapping[str, Any]

    def options(self, of: Callable[[type[Any]], Any], *, fixed: bool) -> MixerOptions:
        """Returns the options of the mixer that begins.

        Args:
          of: a model's options by their class (`ModelConfig.options`).
          fixed: layers of the model have the mixer already, so that its options stay as they are.

        Raises:
          ValueError: an option cannot be taken over, or contradicts one that the mixer has already.
        """
        source, wanted, default = of(self.source), of(self.wanted), self.wanted()
        for name, value in self.only.items():
            if getattr(source, name) != value:
                raise ValueError(
                    f"{source.KEY}.{name} = {getattr(source, name)!r}: {wanted.KEY} has no such option, so only a mixer with "
                    f"{value!r} can be copied to it; convert other layers"
                )
        for name, value in self.needed.items():
            if getattr(wanted, name) != value:
                raise ValueError(
                    f"{wanted.KEY}.{name} = {getattr(wanted, name)!r} would leave out a part of the layers that are copied to this "
                    f"mixer, which begin with {value!r}; leave it out, or convert other layers"
                )
        taken = {name: getattr(source, name) for name in self.taken}
        for name, value in taken.items():
            given = getattr(wanted, name)
            if given != value and (fixed or given != getattr(default, name)):
                raise ValueError(
                    f"{wanted.KEY}.{name} = {given!r} contradicts {source.KEY}.{name} = {value!r} of the layers that are copied to "
                    "this mixer; leave it out, or convert other layers"
                )
        return dataclasses.replace(wanted, **taken)

    def parameters(self, source: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
        """Returns the parameters that the other mixer gives, by their names in the one that begins.

        Args:
          source: the other mixer's parameters, by their names in it.
          wanted: the names of those of the one that begins.
        """
        names = {name: self.renamed.get(name, name) for name in wanted}
        return {name: source[other] for name, other in names.items() if other in source}


# (a layer's mixer, the mixer that begins from it), keys of `mixers.KINDS`. Source: hybrid-model-factory's conversion of Qwen3-Next.
COPIES: dict[tuple[str, str], MixerCopy] = {
    ("gdn", "gka"): MixerCopy(
        GDNConfig,
        GKAConfig,
        renamed={"a_proj.kernel": "gk_proj.kernel"},
        taken=("conv_size", "norm_eps", "use_gate", *_HEADS),
        only={"conv_bias": False, "use_short_conv": True, "allow_neg_eigval": False},
        needed={"use_v_conv": True, "use_beta_gate": True, "use_forgetting_gate": True},
    ),
}


def begins_from(old: MixerSpec, kind: str) -> str | None:
    """Returns the kind of the mixer in a layer from which a new mixer of `kind` begins: attention, if the layer has it.

    None: the layer has the mixer already, or none from which it could begin.
    """
    if kind in old.kinds:
        return None
    if ATTENTION in old.kinds:
        return ATTENTION
    return next((other for other in old.kinds if (other, kind) in COPIES and not old.attention_heads), None)


def copied_pairs() -> str:
    """Returns the rows of `COPIES` in words, for messages."""
    return ", ".join(f"{KINDS[old].symbol} to {KINDS[new].symbol}" for old, new in COPIES)
