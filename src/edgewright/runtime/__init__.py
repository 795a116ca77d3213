"""Run an exported file: one small interface, a real runtime behind it."""

from edgewright.runtime.engine import open_engine
from edgewright.runtime.interfaces import Engine, Generation

__all__ = ["Engine", "Generation", "open_engine"]
