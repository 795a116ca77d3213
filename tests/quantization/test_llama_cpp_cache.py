"""The claim behind KVConfig.llama_cpp: training sees what llama.cpp's quantised cache will do (oracle: llama.cpp)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgewright.quantization.config import KVConfig
from edgewright.quantization.kv_cache import attach_kv_quantization, detach_kv_quantization


def one_layer(family: str, vocabulary: int):
    """One layer with heads of 64 and decided attention, so that errors of the cache dominate all others."""
    import transformers

    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**settings))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_logits_are_those_of_llama_cpp(family, smollm2, tmp_path):
    from edgewright.export.gguf.exporter import export_gguf
    from edgewright.runtime.engine import open_engine

    _, tokenizer = smollm2
    model = one_layer(family, len(tokenizer))
    path = tmp_path / "one.gguf"
    # float32 throughout: llama.cpp rounds the inputs of quantised matrices, which would hide what is looked for.
    export_gguf(model, tokenizer, path, float_type="F32", embedding="F32", verify=False, progress=False)
    ids = torch.randint(100, 20000, (1, 96), generator=torch.Generator().manual_seed(0))
    plain = model(ids).logits[0].double().numpy()
    for bits in (8, 4):
        config = KVConfig.llama_cpp(bits)
        with open_engine(path, threads=1, context=128, cache_type_k=config.codec, cache_type_v=config.codec) as engine:
            expected = np.asarray(engine.logits(ids[0].tolist()), dtype=np.float64)
        attach_kv_quantization(model, config)
        found = model(ids).logits[0].double().numpy()
        detach_kv_quantization(model)
        effect = np.square(expected - plain).mean()
        left = np.square(expected - found).mean()
        # Left over: llama.cpp also rounds each query to 8 bits, and a few keys fall on the other side of a half.
        # At 8 bits that rounding is of the size of the cache's own, so there is less to explain.
        assert left < (0.02 if bits == 4 else 0.7) * effect, (bits, left / effect)
        if bits == 4:  # neither rotation nor order of entries may be left out
            attach_kv_quantization(model, KVConfig.llama_cpp(4, rotate=False))
            unrotated = model(ids).logits[0].double().numpy()
            detach_kv_quantization(model)
            assert np.square(expected - unrotated).mean() > 20 * left
