"""Puts the folder above on the path: `toy_gguf` and `toy_calls` are shared by several rooms and by child processes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
