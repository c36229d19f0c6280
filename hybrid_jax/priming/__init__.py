"""Priming: initialize mixers from attention (stage 0), fuse them with it for alignment (stage 1), unfuse for post-training."""
