"""Where numbers went bad: the first parameter, or the first layer's output, that is not finite."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import whole_array
from hybrid_jax.parameters import split_model
from hybrid_jax.priming.fuse import unfuse


def first_bad(model: Decoder, batch: Mapping[str, jax.Array], teacher: Decoder | None = None) -> str:
    """In words. Runs the model without its teacher path, and beside it the teacher where there is one, layer by layer.

    Args:
      teacher: a model of one stream, as `PhaseLayout.source` makes it.
    """

    def finite(x) -> bool:
        return bool(whole_array(jnp.all(jnp.isfinite(x))))

    model = unfuse(model)
    models = {"": model} if teacher is None else {" of the student": model, " of the teacher": teacher}
    streams = {}
    for whose, one in models.items():
        for name, value in split_model(one)[1].items():
            if not finite(value):
                return f"the parameter {name}{whose} is not finite"
        streams[whose], at = one.inputs(batch["input_ids"], batch["segment_ids"], batch["positions"])
        if not finite(streams[whose]):
            return f"the embeddings{whose} are not finite"
    for i in range(max(one.config.num_layers for one in models.values())):
        for name, hidden in streams.items():
            if i >= models[name].config.num_layers:
                continue
            layer = models[name].layers[i]
            out, _ = jax.jit(lambda h, layer=layer: layer.run(layer.spec.kind, h, **at))(hidden)
            for part in ("mixer", "mlp", "hidden"):
                if not finite(getattr(out, part)):
                    return f"layer {i} ({layer.spec.symbol}) is the first whose output{name} is not finite: its {part}"
            streams[name] = out.hidden
    return "every layer's output is finite; the loss, or a gradient, is not"
