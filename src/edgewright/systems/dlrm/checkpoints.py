"""A sharded DLRM and the checkpoints of changed rows: which rows of which tables this process holds.

    shards = row_shards(sharded)
    ck = DiffCheckpointer("runs/ck", sharded, [networks, tables], shards=shards)   # every process
    info = restore("runs/ck", sharded, [networks, tables], shards=shards)          # any number of processes, any plan

Give the optimizer of the tables last: a process without tables has none.
"""

from __future__ import annotations

from edgewright.systems.dlrm.sharded import ShardedDLRM
from edgewright.systems.dlrm.tables import QREmbeddingBag, row_parameters
from edgewright.training.checkpoint.capture import RowShard


def row_shards(sharded: ShardedDLRM) -> list[RowShard]:
    """The rows that this process holds, under the names of the whole DLRM's tables."""
    found = []
    for shard, table in zip(sharded.plan.of_rank(sharded.rank), sharded.shards, strict=True):
        parameters = row_parameters(table)  # type: ignore[arg-type]
        if isinstance(table, QREmbeddingBag):  # never split
            names = (f"tables.{shard.table}.quotient", f"tables.{shard.table}.remainder")
            found += [RowShard(parameter, name) for parameter, name in zip(parameters, names, strict=True)]
        else:
            rows = sharded.model.config.table_sizes[shard.table]
            found.append(RowShard(parameters[0], f"tables.{shard.table}.weight", shard.first, rows))
    return found
