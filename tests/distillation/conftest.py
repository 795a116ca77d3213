"""A student that is near its teacher."""

from __future__ import annotations

import copy

import pytest
import torch


@pytest.fixture
def student_of():
    """Function: teacher -> copy with a little noise on every parameter."""

    def make(teacher):
        student = copy.deepcopy(teacher)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
        return student

    return make
