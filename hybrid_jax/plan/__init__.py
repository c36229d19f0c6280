"""What a job needs on a given TPU or GPU mesh, before renting it: the real step, compiled ahead of time."""
