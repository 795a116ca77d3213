"""Packed layers in the form that XNNPACK computes: our codes placed as they are, inputs rounded to 8 bits per token.

A linear layer becomes one operator, `edgewright::dynamic_linear`, while torch.export traces the model (tracing a
quantisation of seven operators again and again makes a lowering slow), and `executorch_graph` writes it out as the
pattern that the XNNPACK partitioner knows just before the graph is divided. In PyTorch the operator computes the same
rounding, which makes the prepared model the reference that the finished file is compared with.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgewright.errors import MissingPackage, Unsupported
from edgewright.io.own_forward import refuse_own_forwards
from edgewright.io.packed import CODE_RANGES, PackedConv2d, PackedEmbedding, PackedLinear, PackedTensor

INSTALL = "pip install 'edgewright[executorch]'"
INT4_GROUP = 32  # XNNPACK's 4-bit kernels take groups that are a multiple of this
LIBRARY = "edgewright"
TABLES = ("auto", "exact", "int8", "float")


def import_executorch() -> None:
    """Load the packages and register their operators. Raises MissingPackage naming the extra."""
    try:
        import executorch.exir
        import executorch.exir.passes._quant_patterns_and_replacements
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  (attention over a cache)
        import torchao  # noqa: F401
    except ImportError as error:
        raise MissingPackage(f"writing .pte files needs {error.name or 'executorch'}: {INSTALL}") from error
    _operators()


@cache
def _operators() -> torch.library.Library:
    """Define `edgewright::dynamic_linear` once in this process."""
    library = torch.library.Library(LIBRARY, "FRAGMENT")
    library.define(
        "dynamic_linear(Tensor x, Tensor codes, Tensor step, Tensor zero, Tensor? bias, int bits, int group) -> Tensor"
    )

    def compute(
        x: Tensor, codes: Tensor, step: Tensor, zero: Tensor, bias: Tensor | None, bits: int, group: int
    ) -> Tensor:
        return F.linear(round_tokens(x), PackedTensor(codes, step.reshape(len(codes), -1), "int8").dequantize(), bias)

    def shape(
        x: Tensor, codes: Tensor, step: Tensor, zero: Tensor, bias: Tensor | None, bits: int, group: int
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], codes.shape[0]))

    library.impl("dynamic_linear", compute, "CPU")
    torch.library.register_fake(f"{LIBRARY}::dynamic_linear", shape, lib=library)
    return library


def round_tokens(x: Tensor) -> Tensor:
    """X [..., features] rounded per token to 8 bits, asymmetric, zero included: what XNNPACK does to inputs."""
    q = torch.ops.quantized_decomposed
    step, zero = q.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    codes = q.quantize_per_token.default(x, step, zero, -128, 127, torch.int8)
    rounded: Tensor = q.dequantize_per_token.default(codes, step, zero, -128, 127, torch.int8, torch.float32)
    return rounded


class DynamicLinear(nn.Module):
    """A linear layer of 4- or 8-bit codes on inputs rounded to 8 bits. [..., in] -> [..., out], float32.

    bits 4: steps [out, in / group]. bits 8: one step a row, [out] (XNNPACK has no grouped 8-bit kernel).
    """

    codes: Tensor
    step: Tensor
    zero: Tensor

    def __init__(self, codes: Tensor, step: Tensor, bits: int, bias: Tensor | None, front: nn.Module | None) -> None:
        super().__init__()
        self.bits, self.group = bits, codes.shape[1] // step.shape[1]
        self.out_features, self.in_features = codes.shape
        step = step.float() if bits == 4 else step[:, 0].float().contiguous()
        self.register_buffer("codes", codes)
        self.register_buffer("step", step)
        self.register_buffer("zero", torch.zeros(step.shape, dtype=torch.int8 if bits == 4 else torch.int64))
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.front = front

    def forward(self, x: Tensor) -> Tensor:
        if self.front is not None:
            x = self.front(x)
        result: Tensor = torch.ops.edgewright.dynamic_linear(
            x, self.codes, self.step, self.zero, self.bias, self.bits, self.group
        )
        return result


class QuantizedTable(nn.Module):
    """An embedding of 8-, 4- or 2-bit codes for ExecuTorch's quantised look-up. int64 [...] -> [..., width]."""

    codes: Tensor
    step: Tensor

    def __init__(self, codes: Tensor, step: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.num_embeddings, self.embedding_dim = codes.shape
        stored = codes if bits == 8 else torch.ops.quant_fusion._pack_embedding_weight(codes, bits)
        self.register_buffer("codes", stored)
        self.register_buffer("step", step.float() if step.shape[1] > 1 else step[:, 0].float().contiguous())

    def forward(self, tokens: Tensor) -> Tensor:
        q = torch.ops.quantized_decomposed
        look_up = {8: q.embedding_byte, 4: q.embedding_4bit, 2: q.embedding_2bit}[self.bits]
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        rows: Tensor = look_up.default(self.codes, self.step, None, low, high, tokens)
        return rows


def prepare(model: nn.Module, table: str = "auto") -> tuple[nn.Module, list[str]]:
    """(a float32 copy in evaluation mode with every packed layer replaced, notes on what is not the model's own).

    Codes are shared, not copied. table: one of `TABLES`, what becomes of an embedding and its head (see
    `export_executorch`).
    Raises Unsupported naming the layer whose codes no kernel of ExecuTorch holds.
    """
    import_executorch()
    refuse_own_forwards(model, "a .pte file")
    notes: list[str] = []
    replaced: dict[int, Any] = {}
    tables = _tables(model, table, notes)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) and getattr(module, "quantizer", None) is not None:
            raise Unsupported(f"layer {name} is still under training quantisation; call convert_(model) first")
        if name in tables:
            codes, step, bits = tables[name]
            if isinstance(module, nn.Embedding | PackedEmbedding):
                replaced[id(module)] = QuantizedTable(codes, step, bits)
            else:
                bias: Any = module.bias
                replaced[id(module)] = DynamicLinear(codes, step, bits, bias, _front(module))
        elif isinstance(module, PackedLinear):
            codes, step, bits = linear_codes(name, module.packed)
            replaced[id(module)] = DynamicLinear(codes, step, bits, module.bias, _front(module))
        elif isinstance(module, PackedEmbedding):
            replaced[id(module)] = QuantizedTable(*table_codes(module.packed))
        elif isinstance(module, PackedConv2d):
            replaced[id(module)] = _float_conv(module)
            notes.append(f"{name}: a packed convolution is written with its values in float32")
    prepared = copy.deepcopy(model, replaced)  # what the memo holds is taken instead of being copied
    return prepared.float().eval().requires_grad_(False), notes


def linear_codes(name: str, packed: PackedTensor) -> tuple[Tensor, Tensor, int]:
    """(int8 codes, steps, 4 or 8 bits) of the kernel that computes with exactly these values.

    Raises Unsupported naming the layer for groups that XNNPACK does not have.
    """
    codes, step = _centred(packed)
    columns, group = codes.shape[1], packed.group
    if not (torch.isfinite(step).all() and (step > 0).all()):
        raise Unsupported(f"layer {name} has a step that is not positive; XNNPACK takes positive, finite steps only")
    whole_row = step.shape[1] == 1
    if packed.grid != "int8" and group % INT4_GROUP == 0:
        return codes, step, 4
    if whole_row:
        return codes, step, 8
    needed = "one step per row" if packed.grid == "int8" else f"groups that are a multiple of {INT4_GROUP}"
    raise Unsupported(
        f"layer {name} has {packed.grid} codes in groups of {group} over {columns} inputs; XNNPACK needs {needed}: "
        f"quantise it with WeightConfig({packed.grid!r}, 'row')"
        + ("" if packed.grid == "int8" or columns % INT4_GROUP else f" or WeightConfig({packed.grid!r}, {INT4_GROUP})")
    )


def table_codes(packed: PackedTensor) -> tuple[Tensor, Tensor, int]:
    """(codes, steps, 8, 4 or 2 bits) for the smallest quantised-embedding kernel that holds these codes."""
    codes, step = _centred(packed)
    low, high, offset = CODE_RANGES[packed.grid]
    if low >= -2 and high <= 1 and not offset and codes.shape[1] % 4 == 0:
        return codes, step, 2
    if packed.grid != "int8" and codes.shape[1] % 2 == 0:
        return codes, step, 4
    return codes, step, 8


def rows_of_8_bits(values: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rounding of a float table to 8 bits with one step a row, the step exact in bfloat16."""
    step = (values.abs().amax(1, keepdim=True) / 127).clamp_min(2.0**-14).to(torch.bfloat16).float()
    return (values / step).round_().clamp_(-127, 127).to(torch.int8), step, 8


def _tables(model: nn.Module, table: str, notes: list[str]) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Name -> what is stored for the token embedding and the head, where that is not simply their own codes."""
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "get_output_embeddings"):
        return {}
    language: Any = model
    owner, head = language.get_input_embeddings(), language.get_output_embeddings()
    head = getattr(head, "rows", head)  # of a head that was cut to a few tokens (`sparsity.unembedding`)
    names = {id(module): name for name, module in model.named_modules()}
    quantized = any(isinstance(module, PackedLinear) for module in model.modules())
    chosen: dict[str, tuple[Tensor, Tensor, int]] = {}
    cache: dict[int, tuple[Tensor, Tensor, int]] = {}
    for module in (owner, head):
        if id(module) not in names:
            continue
        if type(module) in (nn.Embedding, nn.Linear):
            wanted = table == "int8" or (table == "auto" and quantized)
            values, key = module.weight.detach().float(), module.weight.data_ptr()
            why = "float32 values"
        elif isinstance(module, PackedEmbedding | PackedLinear):
            # the same codes must serve look-up and product; the product has no grouped 8-bit kernel
            grouped = module.grid == "int8" and module.step.shape[1] > 1
            shared = isinstance(head, PackedLinear) and head.codes.data_ptr() == module.codes.data_ptr()
            wanted = grouped and table in ("auto", "int8") and (shared or isinstance(module, PackedLinear))
            values, key = (module.weight if wanted else module.codes), module.codes.data_ptr()
            why = f"8-bit codes in groups of {module.packed.group}"
        else:
            continue
        if wanted:
            if key not in cache:
                cache[key] = rows_of_8_bits(values)
                notes.append(
                    f"{names[id(module)]}: {why} were rounded to 8 bits with one step a row (embedding='exact' refuses)"
                )
            chosen[names[id(module)]] = cache[key]
    return chosen


def _centred(packed: PackedTensor) -> tuple[Tensor, Tensor]:
    """Codes and steps of the same values without an offset: half-integer levels become odd codes of half the step."""
    if packed.offset:
        return (2 * packed.codes + int(2 * packed.offset)).to(torch.int8), packed.step / 2
    return packed.codes, packed.step


def _front(module: nn.Module) -> nn.Module | None:
    """The layer's own input quantiser, unless it is the rounding that the kernel does anyway."""
    front = getattr(module, "input_quantizer", None)
    config = getattr(front, "config", None)
    same = getattr(config, "bits", None) == 8 and getattr(config, "granularity", "") == "token"
    return None if same and not getattr(config, "symmetric", True) else front


def _float_conv(module: PackedConv2d) -> nn.Module:
    rows, columns, *kernel = module.kernel_shape
    options: tuple[Any, Any, Any, Any, Any] = (
        kernel,
        module.stride,
        module.padding,
        module.dilation,
        module.conv_groups,
    )
    conv: nn.Module = nn.Conv2d(columns * module.conv_groups, rows, *options, bias=module.bias is not None)
    with torch.no_grad():
        conv.weight.copy_(module.weight.reshape(module.kernel_shape))  # type: ignore[operator,union-attr]
        if module.bias is not None:
            conv.bias.copy_(module.bias)  # type: ignore[operator,union-attr]
    return conv if module.input_quantizer is None else nn.Sequential(module.input_quantizer, conv)
