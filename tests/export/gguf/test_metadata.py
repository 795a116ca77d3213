"""Key/values: architecture, rotary scaling, tokenizer; what cannot be said is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgewright.errors import Unsupported, UsageError
from edgewright.export.gguf.metadata import (
    PRE_NAMES,
    file_type,
    model_metadata,
    rope_divisors,
    splitter_name,
    tokenizer_metadata,
)
from edgewright.io.gguf.tokenizer import CONTROL
from tests.export.export_models import make_llama, make_qwen, make_tokenizer


def test_sizes_and_rotary_base():
    metadata = model_metadata(make_llama(rms_norm_eps=2e-6), "tiny")
    assert metadata["llama.attention.head_count_kv"] == ("u32", 2)
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == ("f32", 2e-6)
    assert metadata["llama.rope.freq_base"] == ("f32", 10000.0)
    assert metadata["general.quantization_version"] == ("u32", 2)
    assert metadata["general.name"] == ("str", "tiny")
    assert "qwen3.attention.key_length" in model_metadata(make_qwen(3), "tiny")


def test_llama3_divisors_are_transformers_frequencies():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = make_llama(rope_parameters=rope)
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    # rtol: transformers computes its frequencies in float32
    assert np.allclose(plain / rope_divisors(model.config), model.model.rotary_emb.inv_freq.double(), rtol=1e-5)
    assert rope_divisors(make_llama().config) is None


def test_unknown_rotary_scaling():
    model = make_llama()
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(Unsupported, match="yarn"):
        model_metadata(model, "tiny")


@pytest.mark.parametrize("pre", PRE_NAMES)
def test_splitters_are_recognised(pre):
    tokenizer = make_tokenizer(pre)
    assert tokenizer_metadata(tokenizer, 272)["tokenizer.ggml.pre"] == ("str", pre)


def test_tokens_and_roles():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    metadata = tokenizer_metadata(tokenizer, 272)
    tokens, types = metadata["tokenizer.ggml.tokens"][1], metadata["tokenizer.ggml.token_type"][1]
    assert len(tokens) == len(types) == 272
    assert tokens[:3] == ["<unk>", "<s>", "</s>"] and types[:3] == [CONTROL] * 3
    assert tokens[262] == "[PAD262]" and types[262:] == [5] * 10
    assert metadata["tokenizer.ggml.merges"] == ("[str]", ["t h", "th e", "Ġ the"])
    roles = {role: metadata[f"tokenizer.ggml.{role}_token_id"][1] for role in ("unknown", "bos", "eos", "padding")}
    assert roles == {"unknown": 0, "bos": 1, "eos": 2, "padding": 2}
    assert metadata["tokenizer.ggml.add_bos_token"] == ("bool", False)
    assert metadata["tokenizer.chat_template"][1] == tokenizer.chat_template


def test_a_tokenizer_larger_than_the_table():
    with pytest.raises(UsageError, match="the token .* with id 261, but the embedding table only 260 rows"):
        tokenizer_metadata(make_tokenizer(), 260)


def test_other_tokenizers_are_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(Unsupported, match="WordPiece"):
        tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=wordpiece), 4)
    metaspace = Tokenizer(models.BPE({"a": 0}, []))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(Unsupported, match="without byte level"):
        tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=metaspace), 4)


def test_unknown_splitters_are_refused():
    description = json.loads(make_tokenizer("qwen2").backend_tokenizer.to_str())
    description["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w+"}
    with pytest.raises(Unsupported, match="unknown pattern"):
        splitter_name(description)
    description = json.loads(make_tokenizer("llama-bpe").backend_tokenizer.to_str())
    description["model"]["ignore_merges"] = False
    with pytest.raises(Unsupported, match="no name in llama.cpp"):
        splitter_name(description)


def test_file_type_is_that_of_most_weights():
    assert file_type([("Q8_0", 100), ("Q4_0", 90), ("Q4_0", 20)]) == 2
    assert file_type([("Q2_0", 1)]) == 1024
    assert file_type([]) == 0


def test_bos_is_added_where_the_tokenizer_adds_it():
    from tokenizers import processors

    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("a")["input_ids"][0] == 1
    assert tokenizer_metadata(tokenizer, 272)["tokenizer.ggml.add_bos_token"] == ("bool", True)
