"""STEM models in files: checkpoints whose tables lie in shards of their own, and programs that decode one token.

`AutoModelForCausalLM` and `edgewright.load` read such a checkpoint like any other. `load_offloaded` reads the backbone
alone and serves rows from the very files, so that the tables need not fit into memory. `export_stem` writes

    forward(tokens int64 [1, 1], position int64 [1], rows [n, 1, f], keys [L, 1, G, C, h], values [L, 1, G, C, h])
        -> logits [1, V], keys, values

for ONNX or ExecuTorch: rows are those of the token in the n STEM layers (`decode_rows`), keys and values a cache of C
places that the host hands from call to call. The file holds no table, so it is as small as the backbone. With
rows="table" the tables are constants of the file and there is no rows input. GGUF has no place for such layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.checks import check, one_of, whole
from edgewright.errors import FormatError, Unsupported, UsageError, in_one_line
from edgewright.export.executorch.exporter import export_executorch
from edgewright.export.onnx.exporter import export_onnx
from edgewright.io.atomic import atomic_directory
from edgewright.io.config_bounds import check_numbers
from edgewright.io.foreign import reading
from edgewright.io.json_file import read_object
from edgewright.io.safetensors_header import check_safetensors
from edgewright.io.tensors import load_tensors
from edgewright.models.decoder.config import ATTENTION, EdgeDecoderConfig
from edgewright.models.decoder.model import EdgeDecoderForCausalLM
from edgewright.systems.stem.layer import stem_blocks
from edgewright.systems.stem.store import EmbeddingStore, offload_, table_file, table_name, write_table

BACKBONE = "model-backbone.safetensors"
INDEX = "model.safetensors.index.json"
MIN_DELEGATED = 0.1  # the state and the masks of one token are many small nodes around few large ones


@torch.no_grad()
def save_stem(
    model: EdgeDecoderForCausalLM, folder: str | Path, tokenizer: Any = None, store: EmbeddingStore | None = None
) -> Path:
    """Write the model, whole or not at all: backbone, one shard for each table, index, and the tokenizer.

    Args:
        model: an edge decoder with STEM layers.
        folder: new or empty, or one that this function wrote.
        tokenizer: saved beside the model where it is given.
        store: of an offloaded model; its rows are written as floats, overlays included.

    Returns:
        The folder.

    Raises:
        UsageError: the model has quantised tables.
    """
    layers = stem_blocks(model)
    names = {f"{table_name(block)}.weight" for block in layers}
    for block, layer in layers.items():
        if store is None and (
            type(layer.table) is not nn.Embedding or not isinstance(layer.table.weight, nn.Parameter)
        ):
            raise UsageError(
                f"the table of layer {block} is no plain one in memory; pass the store of an offloaded model"
            )
    with atomic_directory(folder) as temporary:
        backbone = {name: tensor for name, tensor in model.state_dict().items() if name not in names}
        model.save_pretrained(temporary, state_dict=backbone, max_shard_size="1000GB")
        (temporary / "model.safetensors").rename(temporary / BACKBONE)
        where = dict.fromkeys(check_safetensors(temporary / BACKBONE), BACKBONE)
        for block, layer in layers.items():
            table: Any = layer.table
            if store is None:
                rows = table.weight.detach().to(model.dtype)
            else:
                rows = store.tables[block].read(torch.arange(layer.vocabulary)).to(model.dtype)
                for key, row in store.overlays[block].items():
                    rows[key] = row
            file = table_file(temporary, block)
            write_table(file, block, {"weight": rows})
            where[f"{table_name(block)}.weight"] = file.name
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        (temporary / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return Path(folder)


def load_offloaded(
    folder: str | Path, tables: str | Path | None = None, **options: Any
) -> tuple[EdgeDecoderForCausalLM, EmbeddingStore]:
    """The model of a folder that `save_stem` wrote, with its rows read from disk as they are needed.

    Args:
        folder: with backbone, tables and config.json.
        tables: another folder for the tables, as `offload_(device="disk", path=...)` leaves it.
        options: of `offload_`.

    Returns:
        The model and the store of its rows.

    Raises:
        UsageError: the folder is none that `save_stem` wrote, or its tables have other shapes.
        FormatError: a table shard or a weight is missing or broken.
    """
    folder = Path(folder)
    if not (folder / BACKBONE).is_file() or not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no folder that save_stem wrote: it has no {BACKBONE} or no config.json")
    entries = check_safetensors(folder / BACKBONE)
    check_numbers(folder / "config.json", read_object(folder / "config.json"), entries)
    with reading(folder), torch.device("meta"):
        model = EdgeDecoderForCausalLM(EdgeDecoderConfig.from_pretrained(folder))
    config = model.config
    for layer in stem_blocks(model).values():
        layer.table = None
    state = load_tensors(folder / BACKBONE)
    # Assigned, not copied: nothing of the model's size exists twice. The rotary buffers are not in the file.
    try:
        missing = set(model.load_state_dict(state, strict=False, assign=True).missing_keys)
    except RuntimeError as error:  # a tensor of another shape
        raise FormatError(f"{folder / BACKBONE} does not fit its config.json: {in_one_line(error)}") from error
    model.tie_weights()
    if missing - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise FormatError(f"{folder / BACKBONE} lacks {len(missing)} weights, the first is {min(missing)}")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # type: ignore[arg-type]
    model.eval()
    return model, offload_(model, "disk", tables or folder, **options)


class _Cache:
    """A static cache while a model is traced: each layer's place gets the new key, chosen by a mask [1, 1, C, 1]."""

    def __init__(self, keys: Tensor, values: Tensor, here: Tensor) -> None:
        self.keys, self.values, self.here = keys, values, here
        self.new_keys: list[Tensor] = []
        self.new_values: list[Tensor] = []

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        slot = len(self.new_keys)
        self.new_keys.append(torch.where(self.here, key, self.keys[slot]))
        self.new_values.append(torch.where(self.here, value, self.values[slot]))
        return self.new_keys[-1], self.new_values[-1]


class StemDecodeProgram(nn.Module):
    """The program above around a decoder of full attention. context: C."""

    def __init__(self, model: Any, context: int, rows: str = "inputs") -> None:
        super().__init__()
        config = model.config
        kinds = set(config.mixers) - {"skip_attention"}
        if kinds != {"full_attention"} or not isinstance(config.num_key_value_heads, int):
            raise Unsupported(
                "exported STEM decoders have full attention of one size in all layers; this one has "
                f"{', '.join(sorted(kinds))}"
            )
        check("rows", rows, one_of("inputs", "table"))
        check("context", context, whole(2))
        self.model, self.context, self.rows = model, context, rows
        self.register_buffer("places", torch.arange(context), persistent=False)
        layers = stem_blocks(model)
        self.order = [block for block in config.share_map if block in layers]

    def forward(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *rows, keys, values = state
        if rows:
            waiting = list(rows[0])  # one [1, f] an executed layer, taken in order
            for layer in stem_blocks(self.model).values():
                layer.lookup = lambda ids: waiting.pop(0).unsqueeze(0)
        places: Any = self.places
        cache = _Cache(keys, values, (places == position).view(1, 1, -1, 1))
        mask = torch.where(places <= position, 0.0, -1e9).view(1, 1, 1, -1)
        output = self.model.model(
            input_ids=tokens,
            attention_mask={"full_attention": mask},
            position_ids=position.unsqueeze(0),
            cache=cache,
            use_cache=False,
        )
        logits = self.model.lm_head(output.last_hidden_state[:, -1])
        return logits, torch.stack(cache.new_keys), torch.stack(cache.new_values)

    def empty(self) -> tuple[Tensor, Tensor]:
        """Keys and values before any token."""
        config = self.model.config
        count = sum(mixer in ATTENTION for mixer in config.mixers)
        shape = (count, 1, config.num_key_value_heads, self.context, config.head_dim)
        return torch.zeros(shape), torch.zeros(shape)


def export_stem(
    model: nn.Module,
    path: str | Path,
    *,
    to: str = "executorch",
    context: int = 256,
    rows: str = "inputs",
    store: EmbeddingStore | None = None,
    **options: Any,
) -> Any:
    """Write the decode program of a STEM model in float32, run what was written, and compare.

    Args:
        model: an edge decoder with full attention of one size; it comes back as it was.
        path: the file.
        to: "executorch" or "onnx".
        context: places of the cache.
        rows: "inputs" leaves the tables to the host, "table" puts them into the file.
        store: of an offloaded model, whose rows the comparison uses.
        options: of `export_onnx` or `export_executorch`.

    Returns:
        The report of that exporter.

    Raises:
        Unsupported: GGUF, or other mixers.
        UsageError: an option outside these, or tables to put into the file that are elsewhere.
    """
    if to == "gguf":
        raise Unsupported(
            "GGUF has no architecture with STEM layers; llama.cpp could not run the file. Export to executorch or onnx"
        )
    check("to", to, one_of("executorch", "onnx"))
    layers = stem_blocks(model)
    kept = {block: (layer.table, layer.lookup) for block, layer in layers.items()}
    if rows == "table" and any(table is None for table, _ in kept.values()):
        raise UsageError(
            "rows='table' needs the tables in the model; save_stem(..., store=store) puts them back into a folder"
        )
    program = StemDecodeProgram(model, context, rows).eval()
    keys, values = program.empty()
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(x.shape, generator=generator) for x in (keys, values))
    token = torch.tensor([[min(3, model.config.vocab_size - 1)]])  # type: ignore[union-attr,operator,type-var]
    inputs = [token, torch.tensor([context // 2])]
    names = ["tokens", "position"]
    if rows == "inputs":
        inputs.append(decode_rows(model, int(token), store))
        names.append("rows")
    hook = model.model._forward_pre_hooks  # type: ignore[union-attr]
    hooks = dict(hook)  # type: ignore[call-overload]
    hook.clear()  # type: ignore[operator]
    try:
        for layer in layers.values():
            if rows == "inputs":
                layer.table = None
        if to == "onnx":
            given: dict[str, Any] = {"input_names": [*names, "keys", "values"]}
            given |= {"output_names": ["logits", "next_keys", "next_values"]}
            return export_onnx(
                program, path, example_inputs=[*inputs, keys, values], dynamic_batch=False, **given, **options
            )

        settings = {"min_delegated": MIN_DELEGATED, **options}
        return export_executorch(program, None, path, example_inputs=[*inputs, keys, values], **settings)
    finally:
        hook.update(hooks)  # type: ignore[operator]
        for block, layer in layers.items():
            layer.table, layer.lookup = kept[block]


@torch.no_grad()
def decode_rows(model: nn.Module, token: int, store: EmbeddingStore | None = None) -> Tensor:
    """The rows input for one token, float32 [n, 1, f], in the order of the executed layers."""
    layers, ids = stem_blocks(model), torch.tensor([token])
    order = [block for block in model.config.share_map if block in layers]  # type: ignore[union-attr]
    if store is not None:
        return torch.stack([store.fetch(block, ids).float().cpu() for block in order])
    lookups: list[Any] = [layers[block].lookup or layers[block].table for block in order]
    return torch.stack([lookup(ids.unsqueeze(0))[0].float() for lookup in lookups])
