"""What the next checkpoint builds upon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgewright.systems.check_n_run.config import Saved
from edgewright.systems.check_n_run.manifest import Manifest, Table
from edgewright.systems.check_n_run.policies import Policy


@dataclass
class Lineage:
    """parent: [id, digest] of the last checkpoint; chain: of those that a difference needs, the full one first.

    sizes: shares of the differences since the full one, of `base_bytes`; tables: as they were described in it.
    """

    parent: list[str] | None = None
    chain: list[list[str]] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    base_bytes: int = 0
    tables: dict[str, Table] | None = None

    def adopt(self, saved: Saved, tables: dict[str, Table], policy: Policy) -> None:
        """A checkpoint exists: what comes next builds upon it."""
        self.parent = [saved.id, saved.digest]
        if saved.kind == "full":
            self.chain, self.sizes, self.tables, self.base_bytes = [self.parent], [], tables, saved.data_bytes
            return
        self.sizes.append(saved.ratio)
        if policy == "consecutive":
            self.chain.append(self.parent)


def continued(
    chain: list[Manifest], digests: Mapping[str, str], policy: Policy, tables: dict[str, Table]
) -> Lineage | None:
    """The lineage after a restore of `chain`; None where its differences are not of this policy: begin with a full one.

    One-shot and intermittent need all rows since the full one in a single difference.
    """
    if policy == "full" or (policy != "consecutive" and len(chain) > 2):
        return None
    links = [[link.id, digests[link.id]] for link in chain]
    base = chain[0].data_bytes
    sizes = [link.data_bytes / max(base, 1) for link in chain[1:]]
    if policy != "consecutive":
        sizes = [*chain[-1].sizes, *sizes]
    return Lineage(links[-1], links if policy == "consecutive" else links[:1], sizes, base, tables)
