"""Where numbers went bad: the first parameter, or the first layer's output, that is not finite."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import whole_array
from hybrid_jax.parameters import split_model


def first_bad(model: Decoder, batch: Mapping[str, jax.Array]) -> str:
    """In words. Runs the model layer by layer."""

    def finite(x) -> bool:
        return bool(whole_array(jnp.all(jnp.isfinite(x))))

    _, parameters = split_model(model)
    for name, value in parameters.items():
        if not finite(value):
            return f"the parameter {name} is not finite"
    hidden, at = model.inputs(batch["input_ids"], batch["segment_ids"], batch["positions"])
    if not finite(hidden):
        return "the embeddings are not finite"
    streams = {"": hidden}
    if model.config.is_fused:
        streams = {" of the student": hidden, " of the teacher": hidden}
    for i, layer in enumerate(model.layers):
        for name, hidden in streams.items():
            kind = layer.spec.teacher if name.endswith("teacher") else layer.spec.kind
            out, _ = jax.jit(lambda h, layer=layer, kind=kind: layer.run(kind, h, **at))(hidden)
            for part in ("mixer", "mlp", "hidden"):
                if not finite(getattr(out, part)):
                    return f"layer {i} ({layer.spec.symbol}) is the first whose output{name} is not finite: its {part}"
            streams[name] = out.hidden
    return "every layer's output is finite; the loss, or a gradient, is not"
