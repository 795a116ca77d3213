"""Small models in the forms that `export_executorch` takes, and the tokenizer that travels with them."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import nn

from edgewright.io.packed import PackedEmbedding, PackedLinear, PackedTensor
from tests.export.export_models import random_packed

FOLDER = tempfile.TemporaryDirectory(prefix="edgewright-pte-")  # removed when the tests end


def byte_tokenizer():
    """A fast tokenizer of one token a byte, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=alphabet[1], eos_token=alphabet[2])
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    return fast


def packed_matrix(rows: int, columns: int, grid: str, group: int, seed: int = 0) -> PackedTensor:
    """Random codes of a grid with positive steps (XNNPACK takes no others), of the size that keeps outputs near one."""
    packed = random_packed(grid, rows, columns, group, seed)
    size = packed.dequantize().std() * columns**0.5
    return PackedTensor(packed.codes, (packed.step.abs() / size).bfloat16().float(), grid)


def packed_llama():
    """One layer with a linear layer on each grid, and a tied table of 8 bits with one step a row."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    layer = model.model.layers[0]
    grids = {
        "self_attn.q_proj": ("int4", 32), "self_attn.k_proj": ("seq2", 32), "self_attn.v_proj": ("int3", 64),
        "self_attn.o_proj": ("int8", 64), "mlp.gate_proj": ("binary", 32), "mlp.up_proj": ("ternary", 64),
        "mlp.down_proj": ("int4", 128),
    }  # fmt: skip
    for seed, (name, (grid, group)) in enumerate(grids.items()):
        old = layer.get_submodule(name)
        layer.set_submodule(name, PackedLinear(packed_matrix(*old.weight.shape, grid, group, seed)), strict=True)
    values = packed_matrix(256, 64, "int8", 64, seed=9)
    table = PackedTensor(values.codes, (values.step * 8).bfloat16().float(), "int8")
    model.model.embed_tokens = PackedEmbedding(table)
    model.lm_head = PackedLinear(table)
    return model


@cache
def language_export():
    """(packed model, its export), lowered once in a process: that takes longer than all that is asked of it."""
    from edgewright.export.executorch.exporter import export_executorch

    model = packed_llama()
    return model, export_executorch(model, byte_tokenizer(), Path(FOLDER.name) / "tiny.pte", context=96)


class TinyNet(nn.Module):
    """A CNN of two convolutions and a linear layer. [N, 1, 8, 8] -> [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1)
            )
            self.head = nn.Linear(128, 10)

    def forward(self, images):
        return self.head(self.body(images).relu().flatten(1))


class Odd(nn.Module):
    """A module with an operator that ExecuTorch has no kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = Solver()

    def forward(self, x):
        return self.middle(self.first(x))


class Solver(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x @ x.transpose(0, 1))
