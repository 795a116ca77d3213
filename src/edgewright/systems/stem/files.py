"""STEM checkpoints: a transformers folder whose tables lie in shards of their own.

`AutoModelForCausalLM` and `edgewright.load` read such a folder like any other. `load_offloaded` reads the backbone
alone and serves rows from the very files, so that the tables need not fit into memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError, UsageError, in_one_line
from edgewright.io.atomic import atomic_directory
from edgewright.io.config_bounds import check_numbers
from edgewright.io.foreign import reading
from edgewright.io.json_file import read_object
from edgewright.io.safetensors_header import check_safetensors
from edgewright.io.tensors import load_tensors
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import EdgeDecoderForCausalLM
from edgewright.systems.stem.layer import StemFeedForward, stem_blocks
from edgewright.systems.stem.offload import offload_, table_file, table_name
from edgewright.systems.stem.rows import AT_ONCE, FLOATS, RowFormat, write_rows
from edgewright.systems.stem.store import EmbeddingStore

BACKBONE = "model-backbone.safetensors"
INDEX = "model.safetensors.index.json"


@torch.no_grad()
def save_stem(
    model: EdgeDecoderForCausalLM, folder: str | Path, tokenizer: Any = None, store: EmbeddingStore | None = None
) -> Path:
    """Write the model, whole or not at all: backbone, one shard for each table, index, and the tokenizer.

    store: of an offloaded model; its rows are written as floats, overlays included. Raises UsageError for quantised
    tables in the model.
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
            format = RowFormat(next(n for n, d in FLOATS.items() if d == model.dtype), layer.intermediate)
            file = table_file(temporary, block)
            write_rows(file, table_name(block), layer.vocabulary, format, _rows(layer, block, store))
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

    tables: another folder for them, as `offload_(device="disk", path=...)` leaves it. options: of `offload_`. Raises
    FormatError naming a table shard or a weight that is missing.
    """
    folder = Path(folder)
    if not (folder / BACKBONE).is_file() or not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no folder that save_stem wrote: it has no {BACKBONE} or no config.json")
    entries = check_safetensors(folder / BACKBONE)
    check_numbers(folder / "config.json", read_object(folder / "config.json"), entries)
    with reading(folder), torch.device("meta"):
        model = EdgeDecoderForCausalLM(EdgeDecoderConfig.from_pretrained(folder))
    config = model.config
    for block, layer in stem_blocks(model).items():
        layer.table = None
        if not (file := table_file(Path(tables or folder), block)).is_file():
            raise FormatError(f"the table shard {file} is missing; layer {block} reads its rows from it")
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


def _rows(layer: StemFeedForward, block: int, store: EmbeddingStore | None) -> Any:
    for ids in torch.arange(layer.vocabulary).split(AT_ONCE):
        if store is not None:
            yield store.tables[block].read(ids).float() if not store.overlays[block] else _overlaid(store, block, ids)
        else:
            yield layer.table.weight[ids].detach().cpu()  # type: ignore[union-attr,index]


def _overlaid(store: EmbeddingStore, block: int, ids: Tensor) -> Tensor:
    rows = store.tables[block].read(ids).float()
    for key, row in store.overlays[block].items():
        if int(ids[0]) <= key <= int(ids[-1]):
            rows[key - int(ids[0])] = row.float().cpu()
    return rows
