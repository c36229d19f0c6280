"""A hook that runs an instrument of `hybrid_jax.evaluate.instruments` during training.

"hooks": {"needles": {"hook": "hybrid_jax.train.instrument_hook:InstrumentHook", "every": 100, "instrument": "recall",
                      "options": {"task": "needles", "seq_len": 1024, "rows": 16}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from hybrid_jax.evaluate.instruments import Subject, make_instrument
from hybrid_jax.train.hook import Hook, StepView


class InstrumentHook(Hook):
    """Logs what an instrument measures: `NAME/MEASURE`, and `NAME/MEASURE/COORDINATE=VALUE` where it is at coordinates.

    NAME is the hook's name in the config. Confidence intervals are not logged.

    Args:
      every: steps between two calls, at least 1.
      instrument: a name of `INSTRUMENTS`.
      options: the instrument's options.

    Raises:
      ValueError: an unknown instrument or option, or an option out of range; at the first call, an option that does not fit the
        model, the data or the mesh, e.g. rows longer than the model's positions, or an instrument of one device on a mesh.
    """

    def __init__(self, every: int, *, instrument: str, options: Mapping[str, Any] | None = None):
        super().__init__(every)
        given = options.to_dict() if isinstance(options, ConfigDict) else dict(options or {})
        self.instrument = make_instrument(instrument, {"instrument": instrument, **given})

    def __call__(self, view: StepView) -> dict[str, float]:
        self.instrument.check(view.model.config, view.corpus, view.mesh)
        subject = Subject(view.model, view.corpus.tokenizer, view.corpus, view.mesh)
        values = {}
        for found in self.instrument.measure(subject):
            place = "".join(f"/{name}={value}" for name, value in found.at.items())
            values[f"{self.name}/{found.measure}{place}"] = found.value
        return values
