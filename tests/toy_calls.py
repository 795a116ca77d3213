"""Calls for a child process: they live here because a child cannot import a test module."""

from __future__ import annotations

import os

import numpy as np

from edgewright.errors import UsageError


def allocate(megabytes: int) -> int:
    block = np.ones(megabytes * 2**20, dtype=np.uint8)
    return int(block[-1]) * megabytes


def fail() -> None:
    raise UsageError("on purpose")


def die() -> None:
    os._exit(7)


def unpicklable() -> object:
    return lambda: None
