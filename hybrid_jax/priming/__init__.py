"""Priming: select layers, initialize (stage 0), align (stage 1), unfuse, post-train (stage 2)."""
