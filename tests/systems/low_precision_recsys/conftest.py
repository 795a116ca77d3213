"""A small DLRM and clicks drawn from its own probabilities, so that it is the best model of its data."""

from __future__ import annotations

import pytest
import torch

from edgewright.systems.dlrm.clicks import ClickData, Schema, predict
from edgewright.systems.dlrm.model import DLRM, DLRMConfig

SLOTS = (1, 3, 1)
CONFIG = DLRMConfig(6, (40, 30, 60), 8, (16, 8), (16, 1), table_names=("user", "tags", "item"))


def make_model(seed: int = 0) -> DLRM:
    """Rows and weights large enough that the tables matter to the logits."""
    model = DLRM(CONFIG, seed).eval()
    with torch.no_grad():
        for table in model.tables:
            table.weight.mul_(6.0)
        model.top[-1].weight.mul_(3.0)
    return model


def make_clicks(model: DLRM, samples: int, seed: int) -> ClickData:
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(0, 40, (samples, 1), generator=generator)]
    tags = torch.randint(-1, 30, (samples, 3), generator=generator)
    columns += [tags, torch.randint(0, 60, (samples, 1), generator=generator)]
    ids = torch.cat(columns, 1).to(torch.int32)
    schema = Schema(("a", "b", "c", "d", "e", "f"), ("user", "tags", "item"), (40, 30, 60), SLOTS)
    data = ClickData(schema, torch.randn(samples, 6, generator=generator), ids, torch.zeros(samples), ids[:, 0].long())
    chance = predict(model, data).sigmoid()
    labels = (torch.rand(samples, generator=generator) < chance).float()
    return ClickData(schema, data.dense, ids, labels, data.users)


@pytest.fixture(scope="session")
def model() -> DLRM:
    return make_model()


@pytest.fixture(scope="session")
def clicks(model: DLRM) -> ClickData:
    return make_clicks(model, 3000, 1)
