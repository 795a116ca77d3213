"""STEM models as ONNX or ExecuTorch files whose table rows are an input, fed by the host from a store.

    forward(tokens int64 [1, 1], position int64 [1], rows [n, 1, f], keys [L, 1, G, C, h], values [L, 1, G, C, h])
        -> logits [1, V], keys, values

decodes one token: rows are those of the token in the n STEM layers, keys and values a cache of C places that the host
hands from call to call. The file holds no table, so it is as small as the backbone. With rows="table" the tables are
constants of the file and there is no rows input. GGUF has no place for such layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.errors import Unsupported, UsageError
from edgewright.export.executorch.exporter import export_executorch
from edgewright.export.onnx.exporter import export_onnx
from edgewright.models.decoder.config import ATTENTION
from edgewright.runtime.program import open_program
from edgewright.systems.stem.layer import stem_blocks
from edgewright.systems.stem.store import EmbeddingStore

SUFFIXES = {"executorch": ".pte", "onnx": ".onnx"}
ROWS = ("inputs", "table")
MIN_DELEGATED = 0.1  # the state and the masks of one token are many small nodes around few large ones
NO_GGUF = "GGUF has no architecture with STEM layers; llama.cpp could not run the file. Export to executorch or onnx"


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
        if rows not in ROWS or context < 2:
            raise UsageError(
                f"rows={rows!r}, context={context}; choose rows from {', '.join(ROWS)} and 2 places or more"
            )
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
    """Write the decode program of a STEM model in float32, run what was written, compare, and return its report.

    store: of an offloaded model, whose rows the comparison uses; options go to `export_onnx` or `export_executorch`.
    The model comes back as it was. Raises Unsupported for GGUF and for other mixers, and what the exporters raise.
    """
    if to == "gguf":
        raise Unsupported(NO_GGUF)
    if to not in SUFFIXES:
        raise UsageError(f"to={to!r} is unknown; choose from {', '.join(SUFFIXES)}")
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
    layers = stem_blocks(model)
    found = []
    for block in model.config.share_map:  # type: ignore[union-attr]
        if block in layers:
            ids = torch.tensor([token])
            if store is not None:
                found.append(store.fetch(block, ids).float().cpu())
            else:
                lookup: Any = layers[block].lookup or layers[block].table
                found.append(lookup(ids.unsqueeze(0))[0].float())
    return torch.stack(found)


class StemSession:
    """An exported file at work, its rows fed from a store or a model: `feed` tokens, `generate` greedily."""

    def __init__(self, path: str | Path, model: nn.Module, store: EmbeddingStore | None = None) -> None:
        self.program, self.model, self.store = open_program(Path(path)), model, store
        self.with_rows = len(self.program.inputs) == 5
        shape = tuple(int(n or 1) for n in self.program.inputs[-1].shape)
        self.keys, self.values, self.position, self.context = torch.zeros(shape), torch.zeros(shape), 0, shape[-2]

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Logits [V] after the last of one token or more. Raises UsageError when the cache is full."""
        logits = torch.empty(0)
        for token in ids:
            if self.position >= self.context:
                raise UsageError(
                    f"the file's cache holds {self.context} tokens and is full; export with a larger context"
                )
            inputs = [torch.tensor([[token]]), torch.tensor([self.position])]
            if self.with_rows:
                inputs.append(decode_rows(self.model, token, self.store))
            arrays = [x.numpy() for x in (*inputs, self.keys, self.values)]
            out, keys, values = self.program.run(arrays)
            logits, self.keys, self.values = torch.from_numpy(out)[0], torch.from_numpy(keys), torch.from_numpy(values)
            self.position += 1
        return logits

    def generate(self, ids: Sequence[int], tokens: int) -> list[int]:
        """`tokens` more, each the likeliest."""
        made: list[int] = []
        while len(made) < tokens:
            made.append(int(self.feed(ids if not made else made[-1:]).argmax()))
        return made

    def close(self) -> None:
        self.program.close()
