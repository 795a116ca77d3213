"""R-Sparse linear layer (arXiv 2504.19449): large inputs go through the weight, the rest through its small SVD.

    k_i = 1 where |x_i| c_i > t        y = W (k x) + A B ((1 - k) x) + b        A = U_r S_r [m, r],  B = V_r^T [r, n]
c is the column norm of W, which equals the norm of S V_i, or all ones for the plain magnitude; t is fixed offline.
Shapes: n inputs, m outputs, r rank, T tokens of a sequence.

The decomposition is done in float64 and kept in the dtype of the weight (bfloat16 for packed weights, whose own numbers
are narrower still): up = (U_r S_r)^T [r, m], down = V_r [n, r]. A lower rank is a part of a higher one.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.checks import check, one_of
from edgewright.errors import CheckFailed, FormatError, Unsupported
from edgewright.io.hashing import sha256
from edgewright.io.packed import PackedLinear
from edgewright.io.tensors import load_tensors, save_tensors
from edgewright.kernels.sparse_op import operator
from edgewright.kernels.sparse_rows import PATHS, PreparedRows, RowMatrix, sparse_rows, why_no_kernel

logger = logging.getLogger(__name__)
LAYER_PATHS = (*PATHS, "reference", "operator")


class Budget(NamedTuple):
    """What a layer may read: the share of input channels that go through W, and the rank of the rest."""

    kept: float
    rank: int


def budget(m: int, n: int, sparsity: float, rho: float) -> Budget:
    """Channels and rank whose reads add up to (1 - sparsity) of an [m, n] weight; rho is the channels' part of it.

    rank = floor(((1 - s) m n - floor(n (1 - s) rho) m) / (m + n)), and 0 where rho = 1.
    deviation: the official code rounds channels and rank up to one; here rho = 1 has no low-rank part at all.
    """
    kept = (1.0 - sparsity) * rho
    channels = math.floor(n * kept + 1e-9)  # 1e-9: 0.3 of 10 channels is 3, not 2
    rank = 0 if rho >= 1.0 else math.floor(((1.0 - sparsity) * m * n - channels * m) / (m + n) + 1e-9)
    return Budget(kept, min(rank, m, n))


def float_weight(layer: nn.Module) -> Tensor:
    """float32 weight [m, n] of a linear or packed layer, without gradient."""
    weight: Any = layer.weight
    return weight.detach().float()


def column_norms(layer: nn.Module) -> Tensor:
    """C [n], float32."""
    return torch.linalg.vector_norm(float_weight(layer), dim=0)


def weight_hash(layer: nn.Module) -> str:
    """SHA-256 of what the layer stores."""
    stored: Any = (layer.codes, layer.step) if isinstance(layer, PackedLinear) else (layer.weight,)
    return sha256(*(part for tensor in stored for part in (f"{tensor.dtype}{tuple(tensor.shape)}", tensor)))


class RSparseLinear(nn.Module):
    """A linear or packed layer that skips small inputs. [..., T, n] or [n] -> [..., T, m], dtype of the layer inside.

    One token at a time takes the kernel (path "auto"); several tokens are a prompt, of which the first `dense_tokens`
    (None: all) stay dense. path: "auto", "kernel", "torch", "reference" (masked dense product, any batch, gradients) or
    "operator" (`edgewright::sparse_gemv`, for export). active=False is the dense layer.
    counting=True adds up kept and offered inputs in `kept` and `offered`.
    """

    def __init__(
        self,
        inner: nn.Linear | PackedLinear,
        *,
        threshold: float,
        scale: Tensor,
        down: Tensor | None = None,
        up: Tensor | None = None,
        dense_tokens: int | None = None,
        path: str = "auto",
    ) -> None:
        super().__init__()
        check("path", path, one_of(*LAYER_PATHS))
        self.inner = inner
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.dense_tokens, self.path = dense_tokens, path
        self.active, self.counting, self.kept, self.offered = True, False, 0, 0
        self.register_buffer("scale", scale)
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float32))
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        self._limit = float(self.threshold)
        self._prepared: tuple[Any, PreparedRows] | None = None
        by_input_(inner)

    scale: Tensor
    threshold: Tensor
    down: Tensor | None  # B transposed [n, r]
    up: Tensor | None  # A transposed [r, m]

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    @property
    def bias(self) -> Tensor | None:
        return self.inner.bias

    @property
    def rank(self) -> int:
        return 0 if self.up is None else len(self.up)

    @property
    def A(self) -> Tensor | None:
        """[m, r]."""
        return None if self.up is None else self.up.t()

    @property
    def B(self) -> Tensor | None:
        """[r, n]."""
        return None if self.down is None else self.down.t()

    def set(self, threshold: float, down: Tensor | None = None, up: Tensor | None = None) -> None:
        """Another threshold and other factors, in place: what a search does."""
        self.threshold.fill_(threshold)
        self._limit = float(self.threshold)
        self.down, self.up = down, up
        self._prepared = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = 1 if x.ndim == 1 else x.shape[-2]
        if not self.active or (tokens > 1 and self.dense_tokens is None):
            dense: Tensor = self.inner(x)
            return dense
        inner = self.inner
        if isinstance(inner, PackedLinear) and inner.input_quantizer is not None:
            x = inner.input_quantizer(x)
        if self.path == "operator":
            return self._through_operator(x)
        if self._takes_rows(x):
            y, kept = self._one_token(x)
            if self.counting:
                self.kept, self.offered = self.kept + kept, self.offered + self.in_features
            return y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return self._reference(x, (self.dense_tokens or 0) if tokens > 1 else 0)

    def _takes_rows(self, x: Tensor) -> bool:
        """Whether this call goes row by row: one token, no gradients, no tracing, weights that the rows can be of."""
        if self.path == "reference" or torch.compiler.is_compiling():
            return False
        if x.numel() == self.in_features and not (torch.is_grad_enabled() and self._trains(x)):
            kinds = (torch.float32, torch.bfloat16)
            return self.path != "auto" or isinstance(self.inner, PackedLinear) or self.inner.weight.dtype in kinds
        if self.path != "auto":
            _say_once(f"path={self.path!r} takes one token without gradients; others go through the masked product")
        return False

    def _one_token(self, x: Tensor) -> tuple[Tensor, int]:
        path = self.path
        if path == "auto":
            path = "kernel" if x.device.type == "cpu" and why_no_kernel() is None else "torch"
        bias = self.inner.bias
        if path == "torch":
            rows, limit = self.row_matrix(), self._limit
            return sparse_rows(
                x.reshape(-1), rows, self.scale, limit, down=self.down, up=self.up, bias=bias, path="torch"
            )
        stored = self.inner.codes if isinstance(self.inner, PackedLinear) else self.inner.weight
        key = (stored.data_ptr(), None if bias is None else bias.data_ptr(), self.scale.data_ptr())
        if self._prepared is None or self._prepared[0] != key:  # .to(), load_state_dict and the like move tensors
            prepared = PreparedRows(self.row_matrix(), self.scale, self._limit, self.down, self.up, bias)
            self._prepared = (key, prepared)
        return self._prepared[1](x)

    def row_matrix(self) -> RowMatrix:
        """The stored weight by input channel; nothing is copied."""
        if isinstance(self.inner, PackedLinear):
            return RowMatrix(self.inner.codes.t(), self.inner.step.t(), self.inner.packed.offset)
        return RowMatrix(self.inner.weight.detach().t())

    def extra_repr(self) -> str:
        return f"threshold={self._limit:.4g}, rank={self.rank}, path={self.path}"

    def _trains(self, x: Tensor) -> bool:
        return x.requires_grad or any(parameter.requires_grad for parameter in self.inner.parameters())

    def keep(self, x: Tensor) -> Tensor:
        """k, bool, of the shape of x."""
        return x.detach().float().abs() * self.scale > self.threshold

    def _reference(self, x: Tensor, dense: int) -> Tensor:
        """The masked dense product; the first `dense` tokens of each sequence keep all their inputs."""
        keep = self.keep(x)
        if self.counting:
            counted = keep[..., dense:, :] if x.ndim > 1 else keep
            self.kept, self.offered = self.kept + int(counted.sum()), self.offered + counted.numel()
        if dense:
            first = torch.arange(x.shape[-2], device=x.device) < dense
            keep = keep | first.unsqueeze(-1)
        y = F.linear(x * keep, self.inner.weight.to(x.dtype), self.inner.bias)
        if self.down is not None and self.up is not None:
            y = y + (x * ~keep) @ self.down.to(x.dtype) @ self.up.to(x.dtype)
        return y

    def _through_operator(self, x: Tensor) -> Tensor:
        if isinstance(self.inner, PackedLinear):
            raise Unsupported("path='operator' takes float weights; export packed weights with path='reference'")
        weight, bias = self.inner.weight.detach(), self.inner.bias
        added = None if bias is None else bias.detach().float()
        result: Tensor = operator()(x, weight.t(), self.scale, self.threshold, self.down, self.up, added)
        return result


def by_input_(layer: nn.Module) -> None:
    """Lay the stored weight out by input channel, in place: the same values and shape, other strides."""
    if isinstance(layer, PackedLinear):
        layer.codes, layer.step = (t.t().contiguous().t() for t in (layer.codes, layer.step))
    else:
        weight: Any = layer.weight
        weight.data = weight.data.t().contiguous().t()


def by_output_(layer: nn.Module) -> None:
    """The ordinary layout again."""
    if isinstance(layer, PackedLinear):
        layer.codes, layer.step = layer.codes.contiguous(), layer.step.contiguous()
    else:
        weight: Any = layer.weight
        weight.data = weight.data.contiguous()


@functools.cache
def _say_once(sentence: str) -> None:
    logger.warning(sentence)


# -- factors -----------------------------------------------------------------------------------------------------------


class Factors:
    """Factors of layers by weight hash, in memory and, where `folder` is given, in one file for each weight there."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        self._hashes: dict[int, tuple[nn.Module, str]] = {}  # the module is held, so that its id stays its own

    def fingerprint(self, layers: Iterable[nn.Module]) -> str:
        """SHA-256 over the hashes of several layers' weights."""
        return sha256(*(self._hash(layer) for layer in layers))

    def get(self, layer: nn.Module, rank: int) -> tuple[Tensor | None, Tensor | None]:
        """(down [n, r], up [r, m]), contiguous; (None, None) for rank 0. Raises CheckFailed for NaN in the weight."""
        if rank == 0:
            return None, None
        key = self._hash(layer)
        known = self._known.get(key) or self._read(key, layer)
        if known is None or len(known[1]) < rank:
            known = truncated_svd(layer, rank)
            if self.folder is not None:
                save_tensors(self.folder / f"{key[:32]}.safetensors", {"down": known[0], "up": known[1]})
        down, up = self._known[key] = known
        return down[:, :rank].contiguous(), up[:rank].contiguous()

    def _hash(self, layer: nn.Module) -> str:
        if id(layer) not in self._hashes:
            self._hashes[id(layer)] = (layer, weight_hash(layer))
        return self._hashes[id(layer)][1]

    def _read(self, key: str, layer: Any) -> tuple[Tensor, Tensor] | None:
        """What the folder has of a weight; a file that cannot be read or does not fit is computed again."""
        path = None if self.folder is None else self.folder / f"{key[:32]}.safetensors"
        if path is None or not path.is_file():
            return None
        try:
            tensors = load_tensors(path, layer.weight.device)
            down, up = tensors["down"], tensors["up"]
        except (FormatError, KeyError):
            return None
        fits = down.ndim == up.ndim == 2 and down.dtype == up.dtype == factor_dtype(layer)
        fits = fits and down.shape == (layer.in_features, len(up)) and up.shape[1:] == (layer.out_features,)
        return (down, up) if fits else None


def factor_dtype(layer: Any) -> torch.dtype:
    """bfloat16 for packed weights, else the weight's own."""
    return torch.bfloat16 if isinstance(layer, PackedLinear) else layer.weight.dtype


def truncated_svd(layer: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    """(down [n, r], up [r, m]) with (down @ up)^T the nearest matrix of that rank to the weight."""
    weight = float_weight(layer)
    if not torch.isfinite(weight).all():
        raise CheckFailed("a weight holds NaN or infinity and has no singular values; look at the checkpoint")
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    dtype = factor_dtype(layer)
    return vh[:rank].t().to(dtype).contiguous(), (u[:, :rank] * s[:rank]).t().to(dtype).contiguous()
