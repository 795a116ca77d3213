"""transformers' own GGUF loader on a small file: same weights, same logits, same tokens.

On SmolLM2-135M it takes about a minute; that comparison was made once (docs/log.md) and is not repeated here.
"""

from __future__ import annotations

import gguf
import pytest
import torch

from edgewright.io.gguf.model import load_gguf


# Not qwen3: transformers ignores the head width in the file. llama.cpp is the judge of that family.
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_same_weights_and_logits(tiny, write_gguf, architecture):
    from transformers import AutoModelForCausalLM

    types = gguf.GGMLQuantizationType
    quantize = {"blk.0.ffn_gate.weight": types.Q4_1, "blk.1.attn_q.weight": types.Q8_0}
    path = write_gguf(tiny(architecture), quantize=quantize)
    ours, _tokenizer = load_gguf(path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    ids = torch.tensor([[1, 40, 262, 77, 5, 100]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id


def test_same_tokens(tiny, write_gguf):
    from transformers import AutoTokenizer

    path = write_gguf(tiny(), pre="gpt-2")
    _, ours = load_gguf(path)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in [
        "the thing on the string",
        "Don't  stop\n\n\tat 1234!",
        "naïve 日本語 😀",
        "<|im_start|>hi<|im_end|> the",
    ]:
        ids = ours(text)["input_ids"]
        # The file asks for no token in front; transformers 5.0 puts one there all the same.
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.chat_template == theirs.chat_template
