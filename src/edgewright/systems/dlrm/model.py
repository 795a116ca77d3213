"""DLRM: embedding tables, two small networks and the products of all pairs (arXiv 1906.00091).

    z0 = bottom(dense)                                [B, d]
    e_k = sum of the rows of bag k                    [B, d], k = 1 .. T
    r = [z0, <z_i, z_j> for i > j]                    [B, d + F (F - 1) / 2], F = T + 1 vectors z0, e_1 .. e_T
    logit = top(r)                                    [B]

Shapes: B samples, T tables, d the width of every vector.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError, in_one_line
from edgewright.io.atomic import atomic_directory
from edgewright.io.json_file import read_object
from edgewright.io.safetensors_header import check_safetensors
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.io.typed import from_json
from edgewright.systems.dlrm.bags import JaggedBatch, check_ids
from edgewright.systems.dlrm.tables import (
    COMBINATIONS,
    EmbeddingTable,
    ProjectedTable,
    QREmbeddingBag,
    Table,
    row_parameters,
)

INTERACTIONS = ("dot", "cat")
OUT_OF_RANGE = ("error", "mod", "default_row")
MODEL_TYPE = "edgewright_dlrm"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MOST_CONFIG = 64 * 2**20  # bytes; a table is a few of them


@dataclass(frozen=True)
class DLRMConfig:
    """The shape of a DLRM.

    bottom: widths of the bottom network, the last one is `dim`; top: of the top network, the last one is 1.
    interaction: "dot" (products of pairs, with `interaction_itself` also of each vector with itself) or "cat".
    on_oob: what becomes of an id that its table does not have: refused, taken modulo, or row 0.
    qr_threshold: tables with more rows are stored as quotient and remainder (0: none), `qr_collisions` ids a row.
    table_dims: widths of the tables where they are not `dim`; narrower ones are projected up.
    dropout: of the vectors that the pairs are made of, and of the top network's hidden units, in training.
    """

    num_dense: int
    table_sizes: tuple[int, ...]
    dim: int = 16
    bottom: tuple[int, ...] = (64, 16)
    top: tuple[int, ...] = (64, 1)
    interaction: str = "dot"
    interaction_itself: bool = False
    on_oob: str = "error"
    qr_threshold: int = 0
    qr_collisions: int = 4
    qr_combine: str = "mult"
    table_dims: tuple[int, ...] | None = None
    table_names: tuple[str, ...] | None = None
    dropout: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name in ("table_sizes", "bottom", "top", "table_dims", "table_names", "dropout"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else tuple(value))
        tables = len(self.table_sizes)
        rules = {
            "num_dense": (self.num_dense >= 1, "at least 1"),
            "table_sizes": (tables > 0 and min(self.table_sizes, default=0) >= 1, "one table or more, each of a row"),
            "bottom": (bool(self.bottom) and min(self.bottom) >= 1, "widths of at least 1"),
            "top": (bool(self.top) and min(self.top) >= 1 and self.top[-1] == 1, "widths that end in 1"),
            "interaction": (self.interaction in INTERACTIONS, f"one of {', '.join(INTERACTIONS)}"),
            "on_oob": (self.on_oob in OUT_OF_RANGE, f"one of {', '.join(OUT_OF_RANGE)}"),
            "qr_combine": (self.qr_combine in COMBINATIONS, f"one of {', '.join(COMBINATIONS)}"),
            "qr_threshold": (self.qr_threshold >= 0, "0 (no table) or more"),
            "table_names": (self.table_names is None or len(set(self.table_names)) == tables, "a name for every table"),
            "table_dims": (
                self.table_dims is None
                or (len(self.table_dims) == tables and all(1 <= width <= self.dim for width in self.table_dims)),
                f"one width from 1 to dim={self.dim} for every table",
            ),
            "dropout": (len(self.dropout) == 2 and all(0 <= p < 1 for p in self.dropout), "two shares from 0 below 1"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise UsageError(f"DLRMConfig {name}={getattr(self, name)!r:.200}: it must be {allowed}")
        if self.bottom[-1] != self.dim:
            raise UsageError(
                f"the bottom network ends with {self.bottom[-1]} units, the vectors have dim={self.dim}; e.g. "
                f"bottom={(*self.bottom[:-1], self.dim)}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tables; their numbers where none were given."""
        return self.table_names or tuple(str(k) for k in range(len(self.table_sizes)))

    @property
    def interaction_width(self) -> int:
        """Width of what the top network reads: 367 for the published Criteo model."""
        vectors = len(self.table_sizes) + 1
        if self.interaction == "cat":
            return vectors * self.dim
        return self.dim + vectors * (vectors + (1 if self.interaction_itself else -1)) // 2


def pair_indices(vectors: int, itself: bool = False) -> Tensor:
    """Places of (1,0), (2,0), (2,1), ... in a flattened [F, F]: the strict lower triangle in row order, int64.

    With `itself` the diagonal is included, as (0,0), (1,0), (1,1), ...
    """
    pairs = [i * vectors + j for i in range(vectors) for j in range(i + itself)]
    return torch.tensor(pairs, dtype=torch.int64)


def linear_layers(inputs: int, widths: tuple[int, ...], generator: torch.Generator, last_relu: bool) -> list[nn.Module]:
    """Linear layers with ReLU between (and behind, for `last_relu`), initialised as the official code does.

    Weights N(0, sqrt(2 / (fan_in + fan_out))), biases N(0, sqrt(1 / fan_out)); both numbers are standard deviations.
    """
    layers: list[nn.Module] = []
    for position, width in enumerate(widths):
        layer = nn.utils.skip_init(nn.Linear, inputs, width)
        with torch.no_grad():
            layer.weight.normal_(0.0, math.sqrt(2.0 / (inputs + width)), generator=generator)
            layer.bias.normal_(0.0, math.sqrt(1.0 / width), generator=generator)
        layers.append(layer)
        if last_relu or position < len(widths) - 1:
            layers.append(nn.ReLU())
        inputs = width
    return layers


class DLRM(nn.Module):
    """The model; `forward` gives logits. Same seed, same weights."""

    def __init__(self, config: DLRMConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.bottom = nn.Sequential(*linear_layers(config.num_dense, config.bottom, generator, last_relu=True))
        self.tables = nn.ModuleList(_table(config, k, generator) for k in range(len(config.table_sizes)))
        self.drop_vectors = nn.Dropout(config.dropout[0])
        top = linear_layers(config.interaction_width, config.top, generator, last_relu=False)
        hidden = [m for layer in top for m in ((layer, nn.Dropout(config.dropout[1])) if _is_relu(layer) else (layer,))]
        self.top = nn.Sequential(*hidden)
        pairs = pair_indices(len(config.table_sizes) + 1, config.interaction_itself)
        self.register_buffer("pairs", pairs, persistent=False)
        self.pairs: Tensor

    def forward(self, dense: Tensor, bags: JaggedBatch) -> Tensor:
        """Dense [B, num_dense] float32, bags of B samples -> logits [B].

        Raises UsageError for sizes that differ, a NaN in `dense` (with its row) and bags that cannot be; OutOfRangeId
        (an IndexError too) for an id without a row.
        """
        self.check_dense(dense)
        bags.check(len(self.tables), self.config.names)
        if bags.size != len(dense):
            raise UsageError(f"{len(dense)} rows of dense features and bags of {bags.size} samples; give as many")
        return self.join(self.bottom(dense), self.lookup(bags))

    def lookup(self, bags: JaggedBatch) -> list[Tensor]:
        """The sums of all bags: T tensors [B, d]."""
        return [
            table(self.row_ids(k, bags.values[k], bags.offsets[k]), bags.offsets[k], bags.weight(k))
            for k, table in enumerate(self.tables)
        ]

    def row_ids(self, k: int, values: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Ids of table k as rows that it has, by `config.on_oob`."""
        rows = self.config.table_sizes[k]
        if self.config.on_oob == "error":
            check_ids(values, rows, self.config.names[k], offsets)
            return values
        if self.config.on_oob == "mod":
            return values % rows
        return torch.where((values >= 0) & (values < rows), values, torch.zeros_like(values))

    def join(self, z0: Tensor, sums: list[Tensor]) -> Tensor:
        """The top network over the interaction of z0 [B, d] and T sums [B, d]: logits [B]."""
        return self.top(self.interact(self.drop_vectors(torch.stack([z0, *sums], 1)))).squeeze(1)

    def interact(self, vectors: Tensor) -> Tensor:
        """[B, F, d] -> [B, interaction_width]: the first vector and the products of the pairs, or all vectors."""
        if self.config.interaction == "cat":
            return vectors.flatten(1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return torch.cat([vectors[:, 0], products.index_select(1, self.pairs)], 1)

    def check_dense(self, dense: Tensor) -> None:
        """Raise UsageError unless `dense` is [B, num_dense], floating point and finite."""
        if dense.ndim != 2 or dense.shape[1] != self.config.num_dense or not dense.is_floating_point():
            raise UsageError(
                f"dense features are {str(dense.dtype).removeprefix('torch.')}{list(dense.shape)}; the model takes "
                f"float32 [samples, {self.config.num_dense}]"
            )
        if not bool(dense.isfinite().all()):
            row, column = (~dense.isfinite()).nonzero()[0].tolist()
            raise UsageError(
                f"dense feature {column} of row {row} is {float(dense[row, column])}; fill missing values first, e.g. "
                "dense.nan_to_num(0.0)"
            )

    def sparse_parameters(self) -> Iterator[nn.Parameter]:
        """Rows of tables: their gradients are sparse."""
        for table in self.tables:
            yield from row_parameters(table)  # type: ignore[arg-type]

    def dense_parameters(self) -> Iterator[nn.Parameter]:
        """Everything else."""
        rows = {id(parameter) for parameter in self.sparse_parameters()}
        return (parameter for parameter in self.parameters() if id(parameter) not in rows)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, the folder whole or not at all."""
        with atomic_directory(folder) as temporary:
            self.write_into(temporary)

    def write_into(self, folder: Path) -> None:
        """The two files of `save_pretrained`, into a folder that somebody else finishes."""
        fields = {"model_type": MODEL_TYPE, **dataclasses.asdict(self.config)}
        (folder / CONFIG).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        save_tensors(folder / WEIGHTS, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DLRM:
        """A saved model. Raises UsageError (no such folder), FormatError (its files are not those of a DLRM)."""
        folder = Path(folder)
        config = read_config(folder)
        check_elements(config, folder / WEIGHTS)
        model = cls(config)
        tensors = load_tensors(folder / WEIGHTS)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            reason = in_one_line(error)
            raise FormatError(f"{folder / WEIGHTS} does not hold the model of its {CONFIG}: {reason}") from error
        return model


def read_config(folder: Path) -> DLRMConfig:
    """The configuration in a folder. Raises UsageError when there is none, FormatError when it is another model's."""
    path = folder / CONFIG
    fields = read_object(path, MOST_CONFIG, f"a saved DLRM is a folder with {CONFIG}")
    if fields.pop("model_type", None) != MODEL_TYPE:
        raise FormatError(f"{path} does not describe a DLRM (model_type {MODEL_TYPE!r})")
    return from_json(DLRMConfig, fields, path)


def check_elements(config: DLRMConfig, weights: Path) -> None:
    """Raise FormatError where a configuration claims more than the file of weights holds, before any of it is built."""
    entries = check_safetensors(weights)
    held = sum(math.prod(entry.shape) for entry in entries.values())
    if len(config.table_sizes) > len(entries):
        raise FormatError(
            f"{weights} has {len(entries)} tensors for the {len(config.table_sizes)} tables of its {CONFIG}"
        )
    claimed = 0
    for k, rows in enumerate(config.table_sizes):
        width = config.dim if config.table_dims is None else config.table_dims[k]
        if width == config.dim and config.qr_threshold and rows > config.qr_threshold:
            rows = -(-rows // min(max(config.qr_collisions, 1), rows))
        claimed += rows * width
    for inputs, widths in ((config.num_dense, config.bottom), (config.interaction_width, config.top)):
        claimed += sum(a * b for a, b in zip((inputs, *widths), widths, strict=False))
    if claimed > held:
        raise FormatError(f"{weights} holds {held} numbers, its {CONFIG} describes a model of at least {claimed}")


def _table(config: DLRMConfig, k: int, generator: torch.Generator) -> Table:
    rows = config.table_sizes[k]
    width = config.dim if config.table_dims is None else config.table_dims[k]
    if width < config.dim:
        return ProjectedTable(rows, width, config.dim, generator)
    if config.qr_threshold and rows > config.qr_threshold:
        return QREmbeddingBag(rows, config.dim, min(config.qr_collisions, rows), config.qr_combine, generator)
    return EmbeddingTable(rows, config.dim, generator)


def _is_relu(layer: nn.Module) -> bool:
    return isinstance(layer, nn.ReLU)
