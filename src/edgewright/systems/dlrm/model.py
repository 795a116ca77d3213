"""DLRM: embedding tables, two small networks and the products of all pairs (arXiv 1906.00091).

    z0 = bottom(dense)                                [B, d]
    e_k = sum of the rows of bag k                    [B, d], k = 1 .. T
    r = [z0, <z_i, z_j> for i > j]                    [B, d + F (F - 1) / 2], F = T + 1 vectors z0, e_1 .. e_T
    logit = top(r)                                    [B]

Shapes: B samples, T tables, d the width of every vector.

Tables are plain, as quotient and remainder, or narrow and projected. All take (values [nnz], offsets [B + 1], weights
[nnz] or None) and give [B, d]; an empty bag gives zeros. Gradients of tables are sparse: a step touches the rows that
the batch asked for and no others.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.checks import Allowed, check, check_fields, one_of, optional, whole
from edgewright.errors import FormatError, UsageError, in_one_line
from edgewright.io.atomic import atomic_directory
from edgewright.io.json_file import read_object
from edgewright.io.safetensors_header import check_safetensors
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.io.typed import from_json
from edgewright.systems.dlrm.clicks import ClickData, JaggedBatch, Schema, check_ids, predict

COMBINATIONS = ("mult", "add", "concat")


class EmbeddingTable(nn.EmbeddingBag):
    """torch's EmbeddingBag as DLRM uses it: sums, sparse gradients, rows from U(-sqrt(1/n), sqrt(1/n))."""

    def __init__(self, rows: int, dim: int, generator: torch.Generator | None = None) -> None:
        weight = torch.empty(rows, dim).uniform_(-(rows**-0.5), rows**-0.5, generator=generator)
        super().__init__(rows, dim, mode="sum", sparse=True, include_last_offset=True, _weight=weight)

    @property
    def rows(self) -> int:
        """Ids that the table knows."""
        return self.num_embeddings


class QREmbeddingBag(nn.Module):
    """Two short tables in place of a long one (quotient and remainder, arXiv 1909.02107).

    Id i is row i // c of the quotients [ceil(n / c), d] and row i % c of the remainders [c, d], combined by "mult"
    (default), "add", or "concat" (both of width d / 2): every id keeps a vector of its own.

    deviation: each id's vector is formed before the bag is summed, so a bag is the sum of its ids' vectors whatever the
    combination. The official code multiplies the two sums, which is the same for bags of one id only. Remainders of
    "mult" start around 1, so that a product starts at the size of a plain table's row.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        collisions: int = 4,
        combine: str = "mult",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("combine", combine, one_of(*COMBINATIONS))
        check("collisions", collisions, whole(1, rows))
        if combine == "concat" and dim % 2:
            raise UsageError(f"combine='concat' halves the width, and dim={dim} is odd")
        self.rows, self.dim, self.collisions, self.combine = rows, dim, collisions, combine
        width = dim // 2 if combine == "concat" else dim
        reach = rows**-0.5
        quotient = torch.empty(-(-rows // collisions), width).uniform_(-reach, reach, generator=generator)
        remainder = torch.empty(collisions, width)
        remainder.uniform_(*((0.5, 1.5) if combine == "mult" else (-reach, reach)), generator=generator)
        self.quotient, self.remainder = nn.Parameter(quotient), nn.Parameter(remainder)

    def forward(self, values: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        each = self.vectors(values, sparse=True)
        places = torch.arange(len(values), device=values.device)
        return F.embedding_bag(places, each, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)

    def vectors(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """The vector of every id: [...] -> [..., d]."""
        return quotient_vectors(
            ids,
            self.collisions,
            self.combine,
            lambda rows: F.embedding(rows, self.quotient, sparse=sparse),
            lambda rows: F.embedding(rows, self.remainder, sparse=sparse),
        )


def quotient_vectors(
    ids: Tensor,
    collisions: int,
    combine: str,
    quotient: Callable[[Tensor], Tensor],
    remainder: Callable[[Tensor], Tensor],
) -> Tensor:
    """The vector of every id [...] from the look-ups of its quotient and its remainder: [..., d]."""
    high, low = quotient(torch.div(ids, collisions, rounding_mode="floor")), remainder(ids % collisions)
    if combine == "concat":
        return torch.cat([high, low], -1)
    return high * low if combine == "mult" else high + low


class ProjectedTable(nn.Module):
    """A narrow table [n, w] and a matrix that lifts its sums to d (mixed dimensions, arXiv 1909.11810)."""

    def __init__(self, rows: int, width: int, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.table = EmbeddingTable(rows, width, generator)
        lift = torch.empty(dim, width).normal_(0.0, (2.0 / (dim + width)) ** 0.5, generator=generator)
        self.lift = nn.Parameter(lift)

    @property
    def rows(self) -> int:
        """Ids that the table knows."""
        return self.table.num_embeddings

    def forward(self, values: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.project(self.table(values, offsets, weights))

    def project(self, sums: Tensor) -> Tensor:
        """[B, w] -> [B, d]."""
        return F.linear(sums, self.lift)


Table = EmbeddingTable | QREmbeddingBag | ProjectedTable


def row_parameters(table: Table) -> list[nn.Parameter]:
    """The parameters of a table whose gradients are sparse."""
    if isinstance(table, QREmbeddingBag):
        return [table.quotient, table.remainder]
    return [(table.table if isinstance(table, ProjectedTable) else table).weight]  # type: ignore[list-item]


def table_vectors(table: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """The sum of padded bags in operators that every runtime has: ids [B, m], weights [B, m] -> [B, d].

    table: one of the above, or any module with `vectors(ids)`.
    ExecuTorch's portable runtime has no kernel for EmbeddingBag: a lookup, a mask and a sum compute the same.
    """
    if isinstance(table, ProjectedTable):
        return table.project(table_vectors(table.table, ids, weights))
    vectors = F.embedding(ids, table.weight) if isinstance(table, EmbeddingTable) else table.vectors(ids)  # type: ignore[operator, union-attr]
    return (vectors * weights.unsqueeze(-1)).sum(1)


INTERACTIONS = ("dot", "cat")
OUT_OF_RANGE = ("error", "mod", "default_row")
MODEL_TYPE = "edgewright_dlrm"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MOST_CONFIG = 64 * 2**20  # bytes; a table is a few of them


@dataclass(frozen=True)
class DLRMConfig:
    """The shape of a DLRM.

    Args:
        num_dense: dense features.
        table_sizes: rows of every table.
        dim: d, the width of every vector.
        bottom: widths of the bottom network, the last one is `dim`.
        top: widths of the top network, the last one is 1.
        interaction: "dot" (products of pairs) or "cat" (all vectors side by side).
        interaction_itself: products of each vector with itself too.
        on_oob: what becomes of an id that its table does not have: "error", "mod" or "default_row" (row 0).
        qr_threshold: tables with more rows are stored as quotient and remainder (arXiv 1909.02107); 0: none.
        qr_collisions: ids that share a row of quotients.
        qr_combine: "mult", "add" or "concat" of quotient and remainder.
        table_dims: widths of the tables where they are not `dim`; narrower ones are projected up (arXiv 1909.11810).
        table_names: for messages and `names`; numbers by default.
        dropout: of the vectors that the pairs are made of, and of the top network's hidden units, in training.

    Raises:
        UsageError: a field breaks its rule, or the bottom network does not end in `dim`.
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
        positive = whole(1).holds
        widths = Allowed("widths of at least 1", lambda value: value and all(map(positive, value)))
        shares = Allowed("two shares from 0 below 1", lambda value: len(value) == 2 and all(0 <= p < 1 for p in value))
        narrow = Allowed(
            f"one width from 1 to dim={self.dim} for every table",
            lambda value: len(value) == tables and all(whole(1, self.dim).holds(width) for width in value),
        )
        check_fields(
            self,
            {
                "num_dense": whole(1),
                "table_sizes": Allowed("one table or more, each of a row", widths.holds),
                "bottom": widths,
                "top": Allowed("widths that end in 1", lambda value: widths.holds(value) and value[-1] == 1),
                "interaction": one_of(*INTERACTIONS),
                "on_oob": one_of(*OUT_OF_RANGE),
                "qr_threshold": whole(0),
                "qr_collisions": whole(1),
                "qr_combine": one_of(*COMBINATIONS),
                "table_names": optional(Allowed("a name for every table", lambda value: len(set(value)) == tables)),
                "table_dims": optional(narrow),
                "dropout": shares,
            },
        )
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
    """The model; `forward` gives logits.

    Args:
        config: its shape.
        seed: of the initial weights; the same seed gives the same weights.
    """

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
        """Logits of B samples.

        Args:
            dense: float32 [B, num_dense].
            bags: the ids of B samples in every table.

        Returns:
            float32 [B].

        Raises:
            UsageError: sizes that differ, a NaN in `dense` (with its row), or bags that cannot be.
            OutOfRangeId: an id without a row (an IndexError too), with on_oob="error".
        """
        self.check_inputs(dense, bags)
        return self.join(self.bottom(dense), self.lookup(bags))

    def lookup(self, bags: JaggedBatch) -> list[Tensor]:
        """The sums of all bags.

        Args:
            bags: of B samples.

        Returns:
            T tensors [B, d].
        """
        return [
            table(self.row_ids(k, bags.values[k], bags.offsets[k]), bags.offsets[k], bags.weight(k))
            for k, table in enumerate(self.tables)
        ]

    def row_ids(self, k: int, values: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Ids of a table as rows that it has, by `config.on_oob`.

        Args:
            k: number of the table.
            values: ids [nnz].
            offsets: where each bag begins, to name the sample in an error.

        Raises:
            OutOfRangeId: an id without a row, with on_oob="error".
        """
        rows = self.config.table_sizes[k]
        if self.config.on_oob == "error":
            check_ids(values, rows, self.config.names[k], offsets)
            return values
        if self.config.on_oob == "mod":
            return values % rows
        return torch.where((values >= 0) & (values < rows), values, torch.zeros_like(values))

    def join(self, z0: Tensor, sums: list[Tensor]) -> Tensor:
        """The top network over the interaction.

        Args:
            z0: of the bottom network, [B, d].
            sums: of the bags, T tensors [B, d].

        Returns:
            Logits [B].
        """
        return self.top(self.interact(self.drop_vectors(torch.stack([z0, *sums], 1)))).squeeze(1)

    def interact(self, vectors: Tensor) -> Tensor:
        """The first vector and the products of the pairs, or all vectors side by side.

        Args:
            vectors: z0 and the sums, [B, F, d].

        Returns:
            [B, interaction_width].
        """
        if self.config.interaction == "cat":
            return vectors.flatten(1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return torch.cat([vectors[:, 0], products.index_select(1, self.pairs)], 1)

    def check_inputs(self, dense: Tensor, bags: JaggedBatch) -> None:
        """Hold dense features and bags against the model.

        Args:
            dense: [B, num_dense].
            bags: of B samples.

        Raises:
            UsageError: another shape or dtype, a value that is not finite, by row and column, or bags that cannot be.
        """
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
        bags.check(len(self.config.table_sizes), self.config.names)
        if bags.size != len(dense):
            raise UsageError(f"{len(dense)} rows of dense features and bags of {bags.size} samples; give as many")

    def sparse_parameters(self) -> Iterator[nn.Parameter]:
        """Rows of tables: their gradients are sparse."""
        for table in self.tables:
            yield from row_parameters(table)  # type: ignore[arg-type]

    def dense_parameters(self) -> Iterator[nn.Parameter]:
        """Everything else."""
        rows = {id(parameter) for parameter in self.sparse_parameters()}
        return (parameter for parameter in self.parameters() if id(parameter) not in rows)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, the folder whole or not at all.

        Args:
            folder: that does not exist, or is empty.
        """
        with atomic_directory(folder) as temporary:
            self.write_into(temporary)

    def write_into(self, folder: Path) -> None:
        """Write the two files of `save_pretrained` into a folder that the caller finishes.

        Args:
            folder: that exists.
        """
        fields = {"model_type": MODEL_TYPE, **dataclasses.asdict(self.config)}
        (folder / CONFIG).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        save_tensors(folder / WEIGHTS, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DLRM:
        """Load a saved model.

        Args:
            folder: what `save_pretrained` or `edgewright train dlrm` wrote.

        Raises:
            UsageError: there is no such folder.
            FormatError: its files are not those of a DLRM.
        """
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
            rows = -(-rows // min(config.qr_collisions, rows))
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


def zipf_ids(count: int, rows: int, exponent: float, generator: torch.Generator) -> Tensor:
    """Row numbers [count], row r with a probability proportional to 1 / (r + 1)^exponent, int64."""
    weights = torch.arange(1, rows + 1, dtype=torch.float64).pow(-exponent).cumsum(0)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64) * weights[-1]
    return torch.searchsorted(weights, drawn).clamp_max(rows - 1)


def synthetic_ctr(
    samples: int,
    sizes: tuple[int, ...] = (1000, 500, 100),
    num_dense: int = 4,
    dim: int = 8,
    most_ids: int = 1,
    exponent: float = 1.05,
    seed: int = 0,
) -> tuple[ClickData, DLRM]:
    """Clicks of a planted DLRM: ids that follow Zipf's law, labels drawn from the teacher's own probabilities.

    Args:
        samples: how many.
        sizes: rows of every table.
        num_dense: dense features, from N(0, 1).
        dim: width of the teacher's vectors.
        most_ids: longest bag; bags have 0 to that many ids where it is above 1.
        exponent: row r is drawn with a probability proportional to 1 / (r + 1)^exponent.
        seed: of data and teacher.

    Returns:
        (the samples, the teacher).
    """
    check("samples", samples, whole(1))
    check("most_ids", most_ids, whole(1))
    generator = torch.Generator().manual_seed(seed)
    teacher = DLRM(DLRMConfig(num_dense, sizes, dim, (16, dim), (16, 1)), seed=seed)
    with torch.no_grad():
        for parameter in teacher.sparse_parameters():
            parameter.normal_(0.0, 0.7, generator=generator)  # rows that matter: fresh ones are close to zero
    columns = []
    for rows in sizes:
        ids = zipf_ids(samples * most_ids, rows, exponent, generator).view(samples, most_ids)
        if most_ids > 1:
            lengths = torch.randint(0, most_ids + 1, (samples, 1), generator=generator)
            ids = torch.where(torch.arange(most_ids) < lengths, ids, -1)
        columns.append(ids.to(torch.int32))
    names = tuple(f"table{k}" for k in range(len(sizes)))
    schema = Schema(tuple(f"dense{i}" for i in range(num_dense)), names, tuple(sizes), (most_ids,) * len(sizes))
    dense = torch.randn(samples, num_dense, generator=generator)
    data = ClickData(schema, dense, torch.cat(columns, 1), torch.zeros(samples))
    chance = predict(teacher, data).sigmoid()
    labels = (torch.rand(samples, generator=generator) < chance).float()
    return ClickData(schema, dense, data.ids, labels), teacher
