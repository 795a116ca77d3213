"""Models and tokenizers for the export tests: tiny, random, converted without the quantisation room."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgewright.io.packed import CODE_RANGES, PackedEmbedding, PackedLinear, PackedTensor


def random_packed(grid: str, rows: int, columns: int, group: int | None = None, seed: int = 0) -> PackedTensor:
    """Random codes of a grid with random bf16 steps of both signs."""
    generator = torch.Generator().manual_seed(seed)
    low, high, _ = CODE_RANGES[grid]
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator).to(torch.int8)
    if grid == "binary":
        codes[codes == 0] = 1
    step = 0.01 * (0.5 + torch.rand(rows, columns // (group or columns), generator=generator))
    step *= torch.randint(0, 2, step.shape, generator=generator) * 2 - 1
    return PackedTensor(codes, step.bfloat16().float(), grid)


def rounded(weight: Tensor, grid: str, group: int | None = None) -> PackedTensor:
    """Round to nearest on a grid with bf16 steps from the largest weight of each group."""
    low, high, offset = CODE_RANGES[grid]
    groups = weight.detach().float().unflatten(1, (-1, group or weight.shape[1]))
    step = groups.abs().mean(-1) if grid == "binary" else groups.abs().amax(-1) / (high + offset)
    step = step.clamp_min(1e-4).bfloat16().float()
    codes = (groups / step.unsqueeze(-1) - offset).round().clamp(low, high)
    if grid == "binary":
        codes = torch.where(groups >= 0, 1.0, -1.0)
    return PackedTensor(codes.reshape(weight.shape).to(torch.int8), step, grid)


def pack_layers(model: nn.Module, grid: str, group: int | None = None, table: str | None = None) -> nn.Module:
    """Replace, in place, the linear layers of the decoder (and, with `table`, embedding and head) by packed ones."""
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, PackedLinear(rounded(child.weight, grid, group), child.bias))
    if table is not None:
        packed = rounded(model.model.embed_tokens.weight, table, 32)
        model.model.embed_tokens = PackedEmbedding(packed)
        model.lm_head = PackedLinear(packed)
    return model


def make_tokenizer(pre: str = "smollm"):
    """A byte-level BPE tokenizer with 256 bytes, three merges, three special tokens; 262 tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from edgewright.io.gguf.tokenizer import SPLITTERS

    splitter = SPLITTERS[pre]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *letters, "th", "the", "Ġthe"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=splitter.whole_words)
    tokenizer = Tokenizer(model)
    steps = [pre_tokenizers.Digits(individual_digits=True)] if splitter.digits else []
    if splitter.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitter.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_llama(seed: int = 0, **overrides):
    """A tiny random Llama whose rows K-quants can take: hidden 256, 4 / 2 heads, ffn 512, vocabulary 272."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _make(LlamaConfig, LlamaForCausalLM, seed, overrides)


def make_qwen(version: int, seed: int = 0, **overrides):
    import transformers

    name = f"Qwen{version}"
    return _make(getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM"), seed, overrides)


def _make(config, factory, seed, overrides):
    settings = {
        "vocab_size": 272,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        # wide enough that tokens differ and logits are not all alike
        "initializer_range": 0.08,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = factory(config(**settings | overrides))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.2)
                elif "norm" in name:
                    parameter.uniform_(0.5, 1.5)
    return model.eval()
