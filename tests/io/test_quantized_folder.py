"""Packed codes in files: exact round trips; folders that contradict themselves are refused with one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import edgewright
from edgewright.errors import EdgewrightError, FormatError
from edgewright.io.packed import CODE_RANGES, PackedEmbedding, PackedLinear, PackedTensor
from edgewright.io.quantized_folder import CODE_BITS, QUANTIZATION_KEY, load_quantized, pack_grid, unpack_grid

LAYER = "model.layers.0.mlp.up_proj"


def random_codes(grid: str, rows: int, columns: int) -> torch.Tensor:
    low, high, _ = CODE_RANGES[grid]
    codes = torch.randint(low, high + 1, (rows, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    return torch.where(codes == 0, 1, codes).to(torch.int8) if grid == "binary" else codes


@pytest.mark.parametrize("grid", CODE_BITS)
@pytest.mark.parametrize("shape", [(4, 64), (3, 5), (1, 1), (7, 9)])
def test_codes_round_trip(grid, shape):
    codes = random_codes(grid, *shape)
    packed = pack_grid(codes, grid)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-codes.numel() * CODE_BITS[grid] // 8)
    assert torch.equal(unpack_grid(packed, grid, shape), codes)


def test_every_code_has_its_place():
    """The layout as the docstring says it: codes minus the lowest, row after row, lowest bits first."""
    assert pack_grid(torch.tensor([[-2, -1, 0, 1], [1, 0, -1, -2]], dtype=torch.int8), "seq2").tolist() == [228, 27]
    assert pack_grid(torch.tensor([[-8, 7, 1]], dtype=torch.int8), "int4").tolist() == [0xF0, 0x09]
    assert pack_grid(torch.tensor([[1, -1, -1, 1]], dtype=torch.int8), "binary").tolist() == [0b1001]


def test_codes_beyond_the_grid():
    for grid, byte in (("ternary", 3), ("int3", 8)):
        with pytest.raises(FormatError, match=grid):
            unpack_grid(torch.tensor([byte], dtype=torch.uint8), grid, (1, 1))


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A quantised folder: one packed layer, the embedding packed and shared with the head."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from edgewright.export.huggingface import save_quantized

    layer = PackedTensor(random_codes("int4", 128, 64), torch.full((128, 2), 0.01).bfloat16().float(), "int4")
    tiny_llama.model.layers[0].mlp.up_proj = PackedLinear(layer)
    table = PackedTensor(random_codes("int8", 256, 64), torch.full((256, 1), 2.0**-8), "int8")
    tiny_llama.model.embed_tokens = PackedEmbedding(table, padding_idx=2)
    tiny_llama.lm_head = PackedLinear(table)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return save_quantized(tiny_llama, PreTrainedTokenizerFast(tokenizer_object=tokenizer), tmp_path / "q")


def test_the_model_comes_back(folder, tiny_llama):
    loaded, tokenizer = load_quantized(folder)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, tiny_llama(input_ids=ids).logits)
    assert type(loaded.model.embed_tokens) is PackedEmbedding and loaded.model.embed_tokens.padding_idx == 2
    assert loaded.lm_head.codes.data_ptr() == loaded.model.embed_tokens.codes.data_ptr()
    assert len(tokenizer) == 256
    assert not any(value.is_meta for value in (*loaded.parameters(), *loaded.buffers()))


def test_other_dtypes(folder):
    loaded, _ = load_quantized(folder, torch.bfloat16)
    assert loaded.model.norm.weight.dtype == torch.bfloat16 and loaded.lm_head.step.dtype == torch.float32
    with torch.no_grad():
        assert loaded(input_ids=torch.tensor([[3, 4]])).logits.dtype == torch.bfloat16


def test_a_sentence_encoder(folder, tmp_path):
    """Not every model is causal: buffers that BERT computes for itself are there again."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    from edgewright.export.huggingface import save_quantized

    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 128, "max_position_embeddings": 32}
    model = BertModel(BertConfig(**sizes)).eval()
    codes = random_codes("ternary", 128, 64)
    old = model.encoder.layer[0].intermediate.dense
    assert isinstance(old, nn.Linear)
    model.encoder.layer[0].intermediate.dense = PackedLinear(
        PackedTensor(codes, torch.full((128, 1), 0.01), "ternary"), old.bias
    )
    save_quantized(model, AutoTokenizer.from_pretrained(folder), tmp_path / "bert")
    loaded, _ = edgewright.load(tmp_path / "bert")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)


def describe(folder, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def set_field(key, value):
    return lambda config: config[QUANTIZATION_KEY]["modules"][LAYER].__setitem__(key, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.__setitem__(QUANTIZATION_KEY, [1]),
        lambda c: c[QUANTIZATION_KEY].__setitem__("format", 2),
        lambda c: c[QUANTIZATION_KEY].pop("modules"),
        lambda c: c[QUANTIZATION_KEY].__setitem__("shared", {"lm_head": 3}),
        lambda c: c[QUANTIZATION_KEY].__setitem__("shared", {"lm_head": LAYER}),
        lambda c: c[QUANTIZATION_KEY].__setitem__("shared", {"nowhere": "model.embed_tokens"}),
        lambda c: c[QUANTIZATION_KEY].__setitem__("shared", {}),
        lambda c: c[QUANTIZATION_KEY]["modules"].__setitem__(
            "model.norm", {"kind": "linear", "grid": "int4", "shape": [64, 1]}
        ),
        lambda c: c[QUANTIZATION_KEY]["modules"].__setitem__("x", {"kind": "linear", "grid": "int4", "shape": [64, 1]}),
        lambda c: c[QUANTIZATION_KEY]["modules"].pop(LAYER),
        set_field("grid", "int5"),
        set_field("grid", "int8"),
        set_field("grid", None),
        set_field("kind", "embedding"),
        set_field("shape", [128]),
        set_field("shape", [64, 128]),
        set_field("shape", [-128, -64]),
        set_field("shape", [1 << 30, 1 << 30]),
        set_field("shape", "128x64"),
        lambda c: c.__setitem__("architectures", ["Evil"]),
        lambda c: c.__setitem__("architectures", ["AutoModel"]),
        lambda c: c.__setitem__("architectures", ["BertModel"]),
        lambda c: c.__setitem__("model_type", "nothing"),
        lambda c: c.__setitem__("hidden_size", "many"),
        lambda c: c.__setitem__("hidden_size", 128),
        lambda c: c.__setitem__("num_hidden_layers", 3),
        lambda c: c.__setitem__("num_hidden_layers", 10**9),
    ],
)
def test_descriptions_that_contradict_the_file(folder, change):
    describe(folder, change)
    with pytest.raises(EdgewrightError) as caught:
        edgewright.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(f"{LAYER}.codes"),
        lambda t: t.pop(f"{LAYER}.step"),
        lambda t: t.pop("model.norm.weight"),
        lambda t: t.__setitem__("model.surplus", torch.zeros(2)),
        lambda t: t.__setitem__(f"{LAYER}.codes", t[f"{LAYER}.codes"][:-1].clone()),
        lambda t: t.__setitem__(f"{LAYER}.codes", t[f"{LAYER}.codes"].view(torch.int8)),
        lambda t: t.__setitem__(f"{LAYER}.step", torch.ones(128, 3)),
        lambda t: t.__setitem__(f"{LAYER}.step", torch.ones(128, 0)),
        lambda t: t.__setitem__(f"{LAYER}.step", torch.ones(128, 2, dtype=torch.int32)),
        lambda t: t[f"{LAYER}.step"].fill_(float("nan")),
        lambda t: t.__setitem__("model.norm.weight", torch.ones(65)),
        lambda t: t["model.norm.weight"].fill_(float("inf")),
    ],
)
def test_weights_that_contradict_the_description(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError) as caught:
        edgewright.load(folder)
    assert "\n" not in str(caught.value)


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="truncated"):
        edgewright.load(folder)
