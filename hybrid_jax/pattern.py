"""The pattern language: which token mixer every decoder layer has.

It is hybrid-model-factory's: one symbol per layer, joined by `-`.

    *            attention                  GKA  GDN  M2  DM2  M3  SWA  BMF   mixers
    GKA*  SWA*   the mixer (student) beside the attention it learns from (teacher)
    *DA          one attention layer run on both streams with the same weights; GDNDA, a source's own Gated DeltaNet likewise
    GDN>GKA      a mixer (teacher) beside another mixer that learns from it
    GDN[3,17]    a mixer whose heads 3 and 17 stay attention
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import NoReturn

from hybrid_jax.mixers import ATTENTION, KINDS, kinds_by_symbol


@dataclasses.dataclass(frozen=True)
class MixerSpec:
    """One decoder layer's token mixer.

    Args:
      kind: what the layer computes (the student, in a fused layer); a key of `mixers.KINDS`.
      teacher: in a fused layer, the kind the student learns from; `None` otherwise.
        A kind beside itself means one set of weights for both streams (`*DA`, `GDNDA`).
      attention_heads: heads that stay attention in a head-level hybrid.
    """

    kind: str
    teacher: str | None = None
    attention_heads: tuple[int, ...] = ()

    @property
    def fused(self) -> bool:
        return self.teacher is not None

    @property
    def shared(self) -> bool:
        """True when teacher and student are the same layer (`*DA`, `GDNDA`)."""
        return self.teacher == self.kind

    @property
    def teaching(self) -> str:
        """The kind that the teacher stream computes: the teacher's, or the only one."""
        return self.teacher or self.kind

    @property
    def kinds(self) -> tuple[str, ...]:
        """The mixers whose weights the layer holds, student first."""
        return (self.kind,) if self.teacher in (None, self.kind) else (self.kind, self.teacher)

    @property
    def attends(self) -> bool:
        """True when the layer attends to earlier keys, with all heads or some."""
        return KINDS[self.kind].attends or bool(self.attention_heads)

    @property
    def symbol(self) -> str:
        symbol = KINDS[self.kind].symbol
        if self.shared:
            return f"{symbol}DA"
        if self.attention_heads:
            symbol += "[" + ",".join(map(str, self.attention_heads)) + "]"
        if self.teacher == ATTENTION:
            return symbol + "*"
        return f"{KINDS[self.teacher].symbol}>{symbol}" if self.teacher else symbol

    def unfused(self) -> MixerSpec:
        """The layer without its teacher."""
        return dataclasses.replace(self, teacher=None)

    def fused_with(self, teacher: str) -> MixerSpec:
        """The layer beside a teacher of this kind: the attention that it replaces, or itself."""
        return dataclasses.replace(self, teacher=teacher)


def _parse_symbol(text: str, where: str) -> MixerSpec:
    symbols = kinds_by_symbol()

    def fail(why: str) -> NoReturn:
        known = ", ".join(symbols)
        raise ValueError(
            f"hybrid pattern, {where}: {text!r} {why}; a symbol is one of {known}, a mixer "
            "followed by '*' (fused with attention), '*DA', 'TEACHER>STUDENT', or a mixer with the "
            "heads kept as attention, 'GDN[3,17]'"
        )

    if text.endswith("DA") and (shared := symbols.get(text.removesuffix("DA"))):
        return MixerSpec(shared, teacher=shared)
    if text == "*":
        return MixerSpec(ATTENTION)
    teacher = None
    body = text
    if ">" in body:
        teacher_symbol, _, body = body.partition(">")
        if teacher_symbol not in symbols or teacher_symbol == "*":
            fail(f"names no mixer before '>' ({teacher_symbol!r})")
        teacher = symbols[teacher_symbol]
    elif body.endswith("*"):
        teacher, body = ATTENTION, body[:-1]
    match = re.fullmatch(r"([A-Z0-9]+)(?:\[([0-9,]*)\])?", body)
    if match is None or match[1] not in symbols:
        fail("is not a known symbol")
    kind = symbols[match[1]]
    if teacher == kind:
        fail("fuses a mixer with itself")
    heads: tuple[int, ...] = ()
    if match[2] is not None:
        fields = match[2].split(",")
        if not all(fields):
            fail("has an empty head list or an empty place in it")
        heads = tuple(int(h) for h in fields)
        if list(heads) != sorted(set(heads)):
            fail("must list its heads in rising order, each once")
        if not KINDS[kind].recurrent:
            fail("keeps heads of a mixer that is attention already")
    return MixerSpec(kind, teacher, heads)


def parse_pattern(pattern: str | Sequence[str], num_layers: int | None = None) -> tuple[MixerSpec, ...]:
    """Parses a hybrid pattern into one `MixerSpec` per layer.

    Args:
      pattern: symbols joined by `-` (`"*-GKA-*-GDN[3,17]"`), or a sequence of symbols.
      num_layers: how many layers the model has, if known.

    Raises:
      ValueError: an unknown symbol (the message names the layer and the symbol) or a wrong length.
    """
    symbols = pattern.split("-") if isinstance(pattern, str) else list(pattern)
    specs = tuple(_parse_symbol(s.strip(), f"layer {i}") for i, s in enumerate(symbols))
    if num_layers is not None and len(specs) != num_layers:
        raise ValueError(
            f"the hybrid pattern has {len(specs)} symbols, the model has {num_layers} layers; "
            "give one symbol per layer, e.g. '*-GKA-*-GKA' for four"
        )
    return specs


def format_pattern(layers: Sequence[MixerSpec]) -> str:
    """The pattern that `parse_pattern` reads back."""
    return "-".join(layer.symbol for layer in layers)
