"""A comparison of ours: every low-bit method of the package on the same task, at equal bits and training."""
