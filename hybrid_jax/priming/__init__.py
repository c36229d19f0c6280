"""Priming: select layers, initialise (stage 0), align (stage 1), unfuse, post-train (stage 2)."""
