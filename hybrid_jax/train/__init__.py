"""Training: objectives, phases, optimizer, checkpoints and the loop."""

from hybrid_jax.stopped import Stopped
from hybrid_jax.train.loop import train_phase
from hybrid_jax.train.metrics import MetricWriter, NoMetrics, read_metrics
from hybrid_jax.train.objectives import OBJECTIVES
from hybrid_jax.train.phase import Phase

__all__ = ["OBJECTIVES", "MetricWriter", "NoMetrics", "Phase", "Stopped", "read_metrics", "train_phase"]
