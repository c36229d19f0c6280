"""Suites of prompts in files, by name. A suite is a row of `SUITES`: how its files are read and how a continuation is scored."""

from hybrid_jax.evaluate.prompts.contract import Example, Suite
from hybrid_jax.evaluate.prompts.suites import SUITES

__all__ = ["SUITES", "Example", "Suite"]
