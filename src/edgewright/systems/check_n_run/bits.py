"""How many bits a stored row gets, from how often the job expects to be restored (arXiv 2010.08679, section on L).

Every restore replaces float32 rows by their quantised values once; L = expected restores says how much of that a job
will live through. L <= 1: 2 bits, L <= 3: 3 bits, L < 20: 4 bits, otherwise 8. Once more restores have happened than
were expected, every later checkpoint has 8.
"""

from __future__ import annotations

from typing import Literal

from edgewright.errors import UsageError
from edgewright.io.row_codes import ROW_BITS

Bits = Literal[2, 3, 4, 8, "auto", "none"]
METHODS = ("adaptive", "minmax", "symmetric")


def check_bits(bits: object) -> None:
    """Raise UsageError unless `bits` is 2, 3, 4, 8, "auto" or "none"."""
    # True == 1 and 4.0 == 4 in Python; neither is a number of bits
    if not (type(bits) is int and bits in ROW_BITS) and bits not in ("auto", "none"):
        raise UsageError(f"bits={bits!r}; rows are stored at 2, 3, 4 or 8 bits, by the rule 'auto', or 'none' (float)")


def bits_for(expected_restores: float) -> int:
    """Bits for L expected restores. Raises UsageError for a negative number or NaN."""
    if not expected_restores >= 0:
        raise UsageError(f"expected_restores={expected_restores}: it is job length x failure rate, at least 0")
    return 2 if expected_restores <= 1 else 3 if expected_restores <= 3 else 4 if expected_restores < 20 else 8


def stored_bits(bits: Bits, expected: float, happened: int) -> int | None:
    """Bits of the next checkpoint, None for plain float rows. happened: restores in this job's history so far."""
    check_bits(bits)
    if bits == "none":
        return None
    if happened > expected:
        return 8
    return bits_for(expected) if bits == "auto" else int(bits)
