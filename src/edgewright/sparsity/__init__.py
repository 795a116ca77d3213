"""Smaller models by leaving parts out: importance statistics, depth, width and output-vocabulary pruning."""
