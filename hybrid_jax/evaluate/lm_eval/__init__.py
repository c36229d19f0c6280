"""Models of this project in EleutherAI's lm-evaluation-harness, under the name `hybrid_jax`.

Importing this module registers it: `lm_eval.simple_evaluate(model="hybrid_jax", model_args="pretrained=DIR", tasks=[...])`.
The package `lm_eval` is needed (`pip install 'hybrid_jax[lm-eval]'`), torch is not.
"""

import os

from hybrid_jax.evaluate.lm_eval.model import HybridLM

# The harness estimates standard errors of some metrics, such as LAMBADA's perplexity, in a pool of forked processes. A fork of a
# process in which JAX runs may never end; with this setting the harness computes them in this process.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

__all__ = ["HybridLM"]
