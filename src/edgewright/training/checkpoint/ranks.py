"""The processes that make a checkpoint together: they agree on when and what, and hear of each other's failures."""

from __future__ import annotations

import datetime
from typing import Any

import torch.distributed as dist

from edgewright import errors
from edgewright.errors import OutputError


class Ranks:
    """The processes of a run; outside a process group there is one, and everything here is immediate.

    timeout: seconds that they wait for each other.
    """

    def __init__(self, timeout: float = 600.0, group: Any = None) -> None:
        self.world, self.rank = 1, 0
        self._now: Any = None
        self._behind: Any = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
            members = dist.get_process_group_ranks(group or dist.group.WORLD)
            limit = datetime.timedelta(seconds=timeout)
            self._now = dist.new_group(members, backend="gloo", timeout=limit)
            self._behind = dist.new_group(members, backend="gloo", timeout=limit)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def first(self) -> bool:
        """Whether this process writes the manifest."""
        return self.rank == 0

    def gather(self, value: Any, behind: bool = False) -> list[Any]:
        """Everybody's values, on every process. behind: from the background. Raises OutputError when one is gone."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(found, value, group=self._behind if behind else self._now)
        except (RuntimeError, EOFError) as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise OutputError(
                f"process {self.rank} of {self.world} lost another one while they made a checkpoint ({reason}); the "
                "checkpoints before it are untouched: start the job again and restore"
            ) from error
        return found

    def agree(self, value: Any) -> Any:
        """The first process's value."""
        return self.gather(value)[0] if self.world > 1 else value

    def together(self, error: BaseException | None, behind: bool = False) -> None:
        """Raise everywhere what went wrong anywhere; also a barrier."""
        if self.world == 1:
            if error is not None:
                raise error
            return
        said = None if error is None else (type(error).__name__, str(error) or type(error).__name__)
        heard = self.gather(said, behind)
        if error is not None:
            raise error
        for rank, found in enumerate(heard):
            if found is not None:
                kind = getattr(errors, found[0], OutputError)
                raise kind(f"process {rank} of {self.world}: {found[1]}")

    def close(self) -> None:
        """Leave the groups."""
        if self.world > 1 and dist.is_initialized():
            for group in (self._now, self._behind):
                try:
                    dist.destroy_process_group(group)
                except (RuntimeError, ValueError, AssertionError):
                    continue
