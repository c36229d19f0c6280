"""Models of this project in EleutherAI's lm-evaluation-harness, under the name `hybrid_jax`.

Importing this module registers it: `lm_eval.simple_evaluate(model="hybrid_jax", model_args="pretrained=DIR", tasks=[...])`.
The package `lm_eval` is needed (`pip install 'hybrid_jax[lm-eval]'`), torch is not.
"""

from hybrid_jax.evaluate.lm_eval.model import HybridLM

__all__ = ["HybridLM"]
