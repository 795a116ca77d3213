"""A small recommendation model, its data and its state, for the tests of checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.training.batches import BlockBatches

SIZES = (23, 60)
DIM = 6


class Clicks(nn.Module):
    """Two tables and a linear layer; draws random numbers when it trains, so that their state matters."""

    def __init__(self, seed: int = 0, sizes: tuple[int, ...] = SIZES, sparse: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(n, DIM, mode="sum", sparse=sparse, _weight=torch.randn(n, DIM, generator=generator))
            for n in sizes
        )
        self.top = nn.Linear(DIM * len(sizes), 1)
        self.register_buffer("seen", torch.zeros(()))
        with torch.no_grad():
            self.top.weight.normal_(generator=generator)
            self.top.bias.zero_()

    def forward(self, ids: Tensor) -> Tensor:
        sums = [table(ids[:, k : k + 1]) for k, table in enumerate(self.tables)]
        return self.top(torch.cat(sums, 1)).squeeze(1)


class Run:
    """A model in training: `step` is one update."""

    def __init__(self, seed: int = 0, kind: str = "rowwise", sparse: bool = True) -> None:
        from edgewright.systems.dlrm.optimizers import RowwiseAdagrad

        self.model = Clicks(seed, sparse=sparse)
        rows = [table.weight for table in self.model.tables]
        self.tables: torch.optim.Optimizer = {
            "rowwise": lambda: RowwiseAdagrad(rows, lr=0.1),
            "adagrad": lambda: torch.optim.Adagrad(rows, lr=0.1),
            "sparse adam": lambda: torch.optim.SparseAdam(rows, lr=0.1),
            "sgd": lambda: torch.optim.SGD(rows, lr=0.1),
            "adam": lambda: torch.optim.Adam(rows, lr=0.1),
            "momentum": lambda: torch.optim.SGD(rows, lr=0.1, momentum=0.9),
        }[kind]()
        self.networks = torch.optim.Adam(self.model.top.parameters(), lr=0.01)
        data = torch.Generator().manual_seed(7)
        ids = torch.stack([torch.randint(0, n, (64,), generator=data) for n in SIZES], 1)
        labels = torch.randint(0, 2, (64,), generator=data).float()
        self.reader = BlockBatches({"ids": ids, "labels": labels}, 4, seed=1)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.networks, self.tables]

    def step(self) -> None:
        batch = next(self.reader)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        noise = torch.randn(4) * 0.1  # from torch's global generator
        F.binary_cross_entropy_with_logits(self.model(batch["ids"]) + noise, batch["labels"]).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.seen += 1

    def state(self) -> dict[str, Any]:
        """Everything that a restore must bring back, in memory of its own."""
        found = {f"model.{name}": tensor.clone() for name, tensor in self.model.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, entries in optimizer.state_dict()["state"].items():
                found |= {f"opt.{number}.{index}.{name}": torch.as_tensor(v).clone() for name, v in entries.items()}
        found["random"] = torch.get_rng_state()
        found["position"] = torch.tensor(self.reader.position)
        return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].nan_to_num(7.0), b[name].nan_to_num(7.0)) for name in a
    )
