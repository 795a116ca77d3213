"""Losses between hidden states and attention maps of a teacher and a student, layer by layer.

Lists are what transformers returns with `output_hidden_states` and `output_attentions`: L + 1 hidden states, the
embedding's first, and L attention maps. `layer_map` says which teacher layer each student layer answers to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgewright.errors import UsageError


def even_layer_map(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """A teacher layer for each student layer, spread evenly, the last one onto the last.

    Args:
        student_layers: at least 1, at most teacher_layers.
        teacher_layers: how many there are.

    Returns:
        Indices of teacher layers, ascending.

    Raises:
        UsageError: more student layers than teacher layers.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise UsageError(f"{student_layers} student layers cannot be spread over {teacher_layers} teacher layers")
    return tuple(round((i + 1) * teacher_layers / student_layers) - 1 for i in range(student_layers))


def hidden_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    layer_map: Sequence[int] | None = None,
) -> Tensor:
    """Sum over layers of the mean squared error of hidden states; entry 0 is the embedding's output.

    Args:
        student, teacher: L + 1 tensors [B, T, H] each.
        mask: [B, T], true where a token counts; the mean is over the entries of those tokens. None: all count.
        layer_map: a teacher layer for each student layer; None: `even_layer_map`.

    Returns:
        A scalar.

    Raises:
        UsageError: a map that names a layer that the teacher does not have, widths that differ, no token that counts.
    """
    pairs = _pairs(len(student) - 1, len(teacher) - 1, layer_map)
    total = _mean_square(student[0], teacher[0], mask)
    for i, j in pairs:
        total = total + _mean_square(student[i + 1], teacher[j + 1], mask)
    return total


def attention_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    layer_map: Sequence[int] | None = None,
) -> Tensor:
    """Sum over layers of the mean squared error of attention maps.

    Args:
        student, teacher: L tensors [B, heads, T, S] each.
        mask: [B, T], true where a query counts; None: all count.
        layer_map: a teacher layer for each student layer; None: `even_layer_map`.

    Returns:
        A scalar.

    Raises:
        UsageError: as `hidden_loss`.
    """
    total = student[0].new_zeros(())
    for i, j in _pairs(len(student), len(teacher), layer_map):
        if mask is None:
            total = total + _mean_square(student[i], teacher[j], None)
        else:  # [B, heads, T, S] -> [B, T, heads, S], so that the mask meets the queries
            total = total + _mean_square(student[i].transpose(1, 2), teacher[j].transpose(1, 2), mask)
    return total


def layer_errors(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> list[float]:
    """Mean squared error of each pair of hidden states, for a log or a table.

    Args:
        student, teacher: tensors [B, T, H], as many of one as of the other.
        mask: [B, T], true where a token counts; None: all count.

    Raises:
        UsageError: shapes that differ, no token that counts.
    """
    with torch.no_grad():
        return [float(_mean_square(s, t, mask)) for s, t in zip(student, teacher, strict=True)]


def _pairs(students: int, teachers: int, layer_map: Sequence[int] | None) -> list[tuple[int, int]]:
    chosen = tuple(layer_map) if layer_map is not None else even_layer_map(students, teachers)
    if len(chosen) != students or not all(0 <= j < teachers for j in chosen):
        raise UsageError(
            f"layer_map={chosen} does not give each of {students} student layers one of the teacher's layers "
            f"0 to {teachers - 1}"
        )
    return list(enumerate(chosen))


def _mean_square(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    if student.shape != teacher.shape:
        raise UsageError(f"features differ in shape: student {list(student.shape)}, teacher {list(teacher.shape)}")
    square = (student - teacher.detach().to(student.dtype)).square()
    if mask is None:
        return square.mean()
    weight = mask.to(square.dtype)
    if weight.sum() == 0:
        raise UsageError("the mask leaves no token; at least one must count")
    return (square.flatten(2).mean(-1) * weight).sum() / weight.sum()
