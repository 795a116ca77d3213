"""Cutting what matters least: blocks, neurons, output words, each by a measured importance."""
