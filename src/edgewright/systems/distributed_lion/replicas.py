"""Are the processes of a run what they should be: equal copies of the parameters, gradients of their own?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from edgewright.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from edgewright.systems.distributed_lion.exchange import Exchange

CHUNK = 2**20  # elements hashed at a time
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def local(tensor: Any) -> Tensor:
    """The part of a parameter or gradient that this process updates: the tensor itself, or its shard under FSDP."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor

    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def check_shards(parameter: Tensor, exchange: Exchange | None) -> None:
    """UsageError for a parameter that is split among the processes that vote: no two of them hold the same part."""
    if local(parameter) is parameter or exchange is None:
        return
    split = set(parameter.device_mesh.mesh.flatten().tolist())  # type: ignore[attr-defined]
    if len(split & set(exchange.ranks())) > 1:
        raise UsageError(
            "the weights are split over the processes that would vote on them (FSDP): split over one row of a mesh and "
            "vote over the other, as mesh = init_device_mesh('cuda', (2, 4), mesh_dim_names=('replicate', 'shard')), "
            "fully_shard(model, mesh=mesh['shard']), DistributedLion(..., process_group=mesh['replicate'].get_group())"
        )


def checksum(tensor: Tensor) -> int:
    """64 bits that depend on every bit of a tensor and on its place; the same on every device."""
    bits = tensor.detach().contiguous().flatten()
    bits = bits.view(_INTEGERS[bits.element_size()])
    total = 0
    for start in range(0, len(bits), CHUNK):
        piece = bits[start : start + CHUNK].to(torch.int64)
        odd = torch.arange(2 * start + 1, 2 * (start + len(piece)) + 1, 2, device=piece.device)
        total += int((piece * odd).sum()) + len(piece)
    return (total + 2**63) % 2**64 - 2**63


def check_replicas(exchange: Exchange | None, parameters: Sequence[Tensor], names: Sequence[str]) -> list[int]:
    """The checksums of `parameters`; CheckFailed, naming the first that differs, unless all processes have the same."""
    found = [checksum(local(parameter)) for parameter in parameters]
    if exchange is None:
        return found
    device = local(parameters[0]).device
    if spread(exchange, [len(found)], device):
        raise CheckFailed(f"process {exchange.rank} trains {len(found)} parameters, others have more or fewer")
    differing = spread(exchange, found, device)
    if differing:
        raise CheckFailed(
            f"the processes hold different values of {names[differing[0]]}: start all from the same weights (DDP "
            "broadcasts those of the first) and change them by the optimizer alone"
        )
    return found


def check_gradients_differ(exchange: Exchange, gradients: Sequence[Tensor | None]) -> None:
    """UsageError when all processes have the same gradients to the last bit: somebody has averaged them."""
    found = [0 if gradient is None else checksum(gradient) for gradient in gradients]
    device = next((gradient.device for gradient in gradients if gradient is not None), torch.device("cpu"))
    if not spread(exchange, found, device) and any(found):
        raise UsageError(
            "all processes have the same gradient, bit for bit: DDP has averaged it already, which spends the bytes "
            "that Lion saves; call disable_gradient_allreduce(model) before the first backward. If every process "
            "really reads the same data, pass DistributedLion(..., check_gradients=False)"
        )


def spread(exchange: Exchange, values: Sequence[int], device: torch.device) -> list[int]:
    """The places at which the processes hold different integers."""
    row = torch.tensor(list(values), dtype=torch.int64, device=device)
    largest = exchange.all_reduce(torch.cat([row, ~row]))  # ~x orders the other way round: the least comes with it
    high, low = largest.chunk(2)
    return (high != ~low).nonzero().flatten().tolist()
