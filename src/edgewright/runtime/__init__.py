"""Run an exported file: one small interface, a real runtime behind it."""

from edgewright.runtime.engine import Engine, Generation, open_engine

__all__ = ["Engine", "Generation", "open_engine"]
