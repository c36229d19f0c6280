"""The generation options of a task, `generation_kwargs` of its yaml file, as this project generates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from hybrid_jax.checks import check_boolean, check_integer, check_number
from hybrid_jax.generation.defaults import NOT_APPLIED, NOT_APPLIED_SAMPLING
from hybrid_jax.generation.sampling import Sampling

DEFAULT_NEW_TOKENS = 256  # as in the harness
APPLIED = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated.

    Args:
      until: any of these texts ends it, and is not part of it.
      max_new_tokens: it has at most so many tokens.
      sampling: how tokens are chosen.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling

    @classmethod
    def from_task(cls, values: Mapping[str, Any], eos: str) -> GenerationOptions:
        """Reads the options of a request; the harness's names and defaults, 256 tokens and greedy.

        With `do_sample`, or a `temperature` above 0, tokens are drawn from all that `top_p` and `top_k` leave; both keep
        everything by default, also where the model's generation_config.json says otherwise.

        Args:
          values: the request's; they are not changed.
          eos: the text of the token that ends a document; it always ends an answer.

        Raises:
          ValueError: a wrong value, or an option that would change the result and is not one of `APPLIED`.
        """
        found: dict[str, Any] = dict(normalize_gen_kwargs(dict(values), DEFAULT_NEW_TOKENS))
        neutral = NOT_APPLIED | NOT_APPLIED_SAMPLING
        for name in sorted(found.keys() - set(APPLIED)):
            if found[name] is not None and found[name] not in neutral.get(name, ()):
                raise ValueError(f"generation_kwargs: {name} = {found[name]!r} is not supported; known: {', '.join(APPLIED)}")
        until = handle_stop_sequences(found["until"], eos)
        if wrong := [text for text in until if not isinstance(text, str)]:
            raise ValueError(f"generation_kwargs: 'until' must be texts, got {wrong[0]!r}")
        sampling = Sampling()
        if check_boolean("generation_kwargs: do_sample", found["do_sample"]):
            temperature = check_number("generation_kwargs: temperature", found.get("temperature", 1.0), minimum=0)
            sampling = Sampling(temperature, found.get("top_p", 1.0), found.get("top_k", 0))
        new = check_integer("generation_kwargs: max_gen_toks", found["max_gen_toks"], minimum=1)
        return cls(tuple(text for text in until if text), new, sampling)
