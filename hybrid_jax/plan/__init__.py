"""Plans what a job needs on a TPU or GPU mesh before it is rented: the real step, compiled ahead of time for TPUs."""
