"""Models in every form that is read, built small for `fuzz_readers`: folders, packed folders, GGUF."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def tokenizer(template: bool = True) -> Any:
    from tests.toy_gguf import TEMPLATE
    from tests.toy_llama import make_byte_tokenizer

    made = make_byte_tokenizer()
    made.chat_template = TEMPLATE if template else None
    return made


def _save(model: Any, folder: Path) -> None:
    from edgewright.pruning.cut_folder import save_checkpoint

    save_checkpoint(model, tokenizer(), folder / "model")


def build_llama(folder: Path) -> None:
    from tests.toy_llama import make_tiny_llama

    _save(make_tiny_llama(hidden_size=32, intermediate_size=48), folder)


def _family(kind: str, **fields: Any) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

        config = AutoConfig.for_model(kind, vocab_size=256, bos_token_id=1, eos_token_id=2, pad_token_id=2, **fields)
        factory = AutoModel if kind == "bert" else AutoModelForCausalLM
        _save(factory.from_config(config).eval(), folder)

    return build


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def build_quantized(folder: Path) -> None:
    from edgewright.quantization.api import convert_, quantize_
    from edgewright.quantization.config import QuantConfig
    from tests.toy_llama import make_tiny_llama

    model = make_tiny_llama(hidden_size=32, intermediate_size=64)
    convert_(quantize_(model, QuantConfig.weights("int4", 32, scale="absmax")))
    _save(model, folder)


def build_decoder(folder: Path) -> None:
    from tests.systems.stem.toys import stem

    _save(stem(vocab_size=256), folder)


def load_model(folder: Path) -> None:
    import edgewright

    model, tokenizer = edgewright.load(folder / "model")
    ids = tokenizer(["hello"], return_tensors="pt")["input_ids"][:, :4]
    if ids.numel() and int(ids.max()) < model.get_input_embeddings().weight.shape[0]:
        with torch.no_grad():
            model(ids)


def build_binary(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    from edgewright.systems.bit.folder import save_binary
    from edgewright.systems.bit.linear import pack_binary_
    from edgewright.systems.bit.model import BitConfig, binarize_encoder_

    config = BertConfig(vocab_size=99, max_position_embeddings=40, **SMALL)
    model = binarize_encoder_(BertModel(config).eval(), BitConfig())
    with torch.no_grad():
        model(torch.randint(5, 99, (2, 8)))
    save_binary(pack_binary_(model), BitConfig(), folder / "model")


def read_binary(folder: Path) -> None:
    from edgewright.systems.bit.folder import load_binary

    load_binary(folder / "model")


def build_cut(folder: Path) -> None:
    from edgewright.pruning.cut_folder import save_cut
    from edgewright.pruning.unembedding import prune_unembedding_
    from tests.toy_llama import make_tiny_llama

    model = make_tiny_llama(hidden_size=32, intermediate_size=48)
    prune_unembedding_(model, (2, 5, 17, 100))
    save_cut(model, tokenizer(), folder / "cut")


def read_cut(folder: Path) -> None:
    from edgewright.pruning.cut_folder import load_cut

    load_cut(folder / "cut")


def build_stem(folder: Path) -> None:
    from edgewright.systems.stem.edit import edit_rows
    from edgewright.systems.stem.files import save_stem
    from tests.systems.stem.toys import stem

    model = stem(vocab_size=256)
    save_stem(model, folder / "model", tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edit_rows(model, "ab", "cd", tokenizer()).save(folder / "edit.safetensors")


def read_stem(folder: Path) -> None:
    from edgewright.systems.stem.edit import load_edit
    from edgewright.systems.stem.files import load_offloaded
    from tests.systems.stem.toys import stem

    load_edit(stem(vocab_size=256), folder / "edit.safetensors")
    model, _store = load_offloaded(folder / "model")
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))


def build_gguf(folder: Path) -> None:
    from tests.toy_gguf import write_toy

    write_toy(folder / "model.gguf")


def read_gguf(folder: Path) -> None:
    import edgewright

    edgewright.load(folder / "model.gguf")


def run_gguf(folder: Path) -> None:
    from edgewright.runtime.llamacpp import LlamaCppEngine

    engine = LlamaCppEngine(folder / "model.gguf", threads=1, context=64)
    try:
        engine.logits(engine.tokenize("hello")[:4] or [0])
        if engine.metadata.get("tokenizer.chat_template"):
            engine.chat_prompt([{"role": "user", "content": "hi"}])
    finally:
        engine.close()
