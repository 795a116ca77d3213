"""Which GGUF type each tensor gets, and why: the table that an export prints, returns and answers for.

A layout is a preference among the types that hold a grid exactly. What a matrix *wants* follows from its grid, row
length and group; what is *written* differs only when a step is no fp16 number or no type fits at all, and then the row
is marked as a departure, which strict exports refuse.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.checks import check, one_of
from edgewright.export.gguf.blocks import ENCODINGS, bits_per_weight, ggml_type, inexact, misfit
from edgewright.io.packed import PackedTensor

if TYPE_CHECKING:
    from rich.console import Console

LAYOUTS = ("auto", "portable", "small", "fast")
FLOAT_TYPES = ("F32", "F16")
EMBEDDING_TYPES = ("Q8_0", *FLOAT_TYPES)

# Younger than most installed llama.cpp builds; `portable` does without them.
RECENT_TYPES = ("Q1_0", "Q2_0")

# CPU time of a decoding step per weight, relative to Q4_0. x86: one thread of an AVX2 machine, 1024 x 2816 matrices
# in cache, best of three. Q2_0 has no SIMD kernel there.
X86_COST = {
    "Q4_0": 1.0,
    "TQ2_0": 1.1,
    "Q2_K": 1.4,
    "Q1_0": 1.65,
    "TQ1_0": 1.7,
    "Q3_K": 1.85,
    "Q8_0": 2.5,
    "Q2_0": 18.0,
}
# Not measured: ARM has a SIMD kernel for every type, so Q2_0 is put beside its neighbours.
ARM_COST = {**X86_COST, "Q2_0": 1.5}

SLOW = 3.0  # a type above this cost is left to `small`
SIMILAR = 1.15  # `fast` takes the smaller of two types whose costs differ by less
# `auto` leaves the smallest type for one that is at most a quarter larger and at least half as fast again.
MOST_LARGER, LEAST_FASTER = 1.25, 1.5


@dataclass(frozen=True)
class LayoutRow:
    """One tensor of the file. holds: what the model has ("seq2, one step a row", "float32"). lossless: what is written
    decodes to the model's values. departure: the wanted type could not be written.
    """

    tensor: str
    shape: tuple[int, ...]
    holds: str
    wanted: str
    written: str
    why: str
    bytes: int
    lossless: bool = True
    departure: bool = False

    @property
    def weights(self) -> int:
        return int(np.prod(self.shape))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "bits_per_weight": round(self.bits_per_weight, 4)}


def costs(machine: str | None = None) -> Mapping[str, float]:
    """Relative decoding cost of each type on a machine (`platform.machine()` of this one when None)."""
    name = (machine or platform.machine()).lower()
    return ARM_COST if name.startswith(("arm", "aarch")) else X86_COST


def preference(grid: str, layout: str, machine: str | None = None) -> list[str]:
    """All types that hold a grid, the most wanted first."""
    check_layout(layout)
    by_size = sorted(ENCODINGS[grid], key=bits_per_weight)
    cost = costs(machine)
    if layout == "small":
        return by_size
    if layout == "portable":
        return [name for name in by_size if name not in RECENT_TYPES]
    if layout == "fast":
        return sorted(by_size, key=lambda name: (max(cost[name], SIMILAR), bits_per_weight(name)))
    order = [name for name in by_size if cost[name] <= SLOW] + [name for name in by_size if cost[name] > SLOW]
    for i in range(len(order) - 1):
        small, large = order[i], order[i + 1]
        larger, faster = bits_per_weight(large) / bits_per_weight(small), cost[small] / cost[large]
        if 1 <= larger <= MOST_LARGER and faster >= LEAST_FASTER:
            order[i], order[i + 1] = large, small
    return order


def check_layout(layout: str) -> None:
    check("layout", layout, one_of(*LAYOUTS))


def plan_packed(name: str, packed: PackedTensor, layout: str = "auto", machine: str | None = None) -> LayoutRow:
    """Decide the type of a packed matrix."""
    _rows, columns = packed.codes.shape
    groups = packed.step.shape[1]
    holds = f"{packed.grid}, " + ("one step a row" if groups == 1 else f"groups of {packed.group}")
    order = preference(packed.grid, layout, machine)
    problems = {kind: misfit(packed.grid, kind, columns, packed.group) for kind in order}
    fitting = [kind for kind in order if problems[kind] is None]
    if not fitting:
        written, lossless = _float_for(packed)
        reason = f"no GGUF type fits: {problems[order[-1]]}"
        return layout_row(name, packed.codes.shape, holds, order[0], written, reason, lossless, departure=True)

    wanted = fitting[0]
    why = _reason(packed.grid, wanted, order, problems, layout, machine)
    obstacles: list[str] = []
    for kind in fitting:
        obstacle = inexact(packed, kind)
        if obstacle is None:
            if not obstacles:
                return layout_row(name, packed.codes.shape, holds, wanted, kind, why)
            return layout_row(name, packed.codes.shape, holds, wanted, kind, obstacles[0], departure=True)
        obstacles.append(obstacle)
    written, lossless = _float_for(packed)
    return layout_row(name, packed.codes.shape, holds, wanted, written, obstacles[0], lossless, departure=True)


def plan_float(
    name: str, values: np.ndarray[Any, Any], wanted: str, holds: str = "float32", fixed: str | None = None
) -> LayoutRow:
    """Decide the type of an unquantised tensor. `fixed` is the reason why it is not the user's choice."""
    kind, why, departure = wanted, fixed or "float in the model", False
    if wanted not in FLOAT_TYPES and values.shape[-1] % ggml_type(wanted).block:
        kind, departure = "F16", True
        why = f"{wanted} needs rows divisible by {ggml_type(wanted).block}, this one has {values.shape[-1]}"
    lossless = True
    if kind == "F16":
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float16).astype(np.float32)
        if not np.isfinite(rounded).all():
            kind, departure, why = "F32", True, "values beyond fp16's 65504"
        elif not np.array_equal(rounded, values):
            lossless, why = False, why + "; rounded to fp16"
    elif kind != "F32":
        lossless = False
        why += f"; rounded to {kind} by the exporter"
    return layout_row(name, values.shape, holds, wanted, kind, why, lossless, departure)


def layout_row(
    name: str,
    shape: Sequence[int],
    holds: str,
    wanted: str,
    written: str,
    why: str,
    lossless: bool = True,
    departure: bool = False,
) -> LayoutRow:
    """A row with its size in bytes worked out."""
    kind = ggml_type(written)
    size = int(np.prod(shape)) // kind.block * kind.bytes
    return LayoutRow(name, tuple(shape), holds, wanted, written, why, size, lossless, departure)


def _float_for(packed: PackedTensor) -> tuple[str, bool]:
    """F16 when it holds every value, else F32, which always does."""
    values = packed.dequantize()
    return ("F16" if bool((values.half().float() == values).all()) else "F32"), True


def _reason(
    grid: str,
    wanted: str,
    order: Sequence[str],
    problems: Mapping[str, str | None],
    layout: str,
    machine: str | None,
) -> str:
    """One clause: what the layout looks for, and what kept the better or smaller types out."""
    cost = costs(machine)
    parts = {
        "small": ["smallest that fits"],
        "portable": ["smallest that older llama.cpp builds read"],
        "fast": ["fastest here"],
        "auto": ["smallest that is not slow here"],
    }[layout]
    blocked = [problem for kind in order[: order.index(wanted)] if (problem := problems[kind])]
    if blocked:
        parts.append(blocked[0])
    if layout == "auto":
        smaller = [
            kind
            for kind in ENCODINGS[grid]
            if problems.get(kind) is None and bits_per_weight(kind) < bits_per_weight(wanted)
        ]
        parts += [
            f"{kind} ({bits_per_weight(kind):g} bits) decodes {cost[kind] / cost[wanted]:.2g}x slower"
            for kind in smaller
        ]
    return "; ".join(parts)


def print_table(rows: Sequence[LayoutRow], console: Console | None = None, every: bool = False) -> None:
    """The layout on screen: one line for all tensors that are treated alike, or one for each when `every` is set."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    table = Table(title="layout", title_justify="left", title_style="bold")
    for heading in ("tensors", "model holds", "wanted", "written"):
        table.add_column(heading, overflow="fold")
    table.add_column("MB", justify="right")
    table.add_column("why", overflow="fold")
    for members in [[row] for row in rows] if every else alike(rows):
        row = members[0]
        size = sum(member.bytes for member in members)
        style = "yellow" if row.departure else None
        cells = (_names(members), row.holds, row.wanted, row.written, f"{size / 1e6:.2f}", row.why)
        table.add_row(*map(escape, cells), style=style)
    console.print(table)


def alike(rows: Sequence[LayoutRow]) -> list[list[LayoutRow]]:
    """Rows in groups that share everything but name, size and place, in file order."""
    groups: dict[tuple[Any, ...], list[LayoutRow]] = {}
    for row in rows:
        groups.setdefault((row.holds, row.wanted, row.written, row.why), []).append(row)
    return list(groups.values())


def _names(members: Sequence[LayoutRow]) -> str:
    """ "attn_q, attn_k (60)": the parts that the members are, and how many there are."""
    parts = dict.fromkeys(row.tensor.split(".")[2 if row.tensor.startswith("blk.") else 0] for row in members)
    return ", ".join(parts) + (f" ({len(members)})" if len(members) > 1 else "")
