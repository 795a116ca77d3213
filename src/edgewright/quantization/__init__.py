"""Grids, fake quantisation, training under quantisation, calibration-only methods, KV cache, conversion."""
