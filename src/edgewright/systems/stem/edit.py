"""Knowledge edited by exchanging rows: where the text says A, every STEM layer reads the rows of B.

The text itself, the embeddings and attention stay those of A. `override_tokens` changes positions of one prompt,
`edit_rows` the rows themselves, for every text, until `undo`. Source: STEM, arXiv 2601.10639, knowledge editing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.checks import check, one_of
from edgewright.errors import FormatError, UsageError, in_one_line
from edgewright.io.tensors import read_tensors, save_tensors
from edgewright.io.transformers_names import CACHE_NAMES
from edgewright.systems.stem.layer import StemFeedForward, stem_blocks
from edgewright.systems.stem.store import EmbeddingStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODES = ("auto", "pad", "copy", "subset", "average")
FORMAT = "edgewright stem edit 1"
Rule = tuple[tuple[int, ...], ...]  # for each token of A, the tokens of B whose rows are averaged in its place


def length_rule(a: Sequence[int], b: Sequence[int], mode: str = "auto") -> Rule:
    """Which tokens of B stand for each token of A; one token or more each.

    Equal lengths go one to one. A longer: "pad" repeats B's first token on the left, "copy" repeats B from its start.
    A shorter: "subset" takes B's last tokens (our choice). "average" gives every position the mean of B's rows. "auto"
    is pad or subset, as the lengths ask. Raises UsageError for a mode that these lengths do not have.
    """
    check("mode", mode, one_of(*MODES))
    if mode == "average":
        return tuple(tuple(b) for _ in a)
    if mode == "auto":
        mode = "pad" if len(a) >= len(b) else "subset"
    if (len(a) < len(b)) != (mode == "subset") and len(a) != len(b):
        size, others = ("longer", "'subset'") if len(a) < len(b) else ("shorter", "'pad', 'copy'")
        raise UsageError(
            f"mode={mode!r} is for a {size} entity; {len(a)} tokens would read the rows of {len(b)}: "
            f"use {others} or 'average'"
        )
    if mode == "copy":
        return tuple((b[i % len(b)],) for i in range(len(a)))
    padded = [b[0]] * (len(a) - len(b)) + list(b)
    return tuple((token,) for token in padded[len(padded) - len(a) :])


def entity_tokens(tokenizer: PreTrainedTokenizerBase, entity: str, spaced: bool) -> list[int]:
    """Tokens of an entity as they are within a text (spaced) or at its start."""
    ids = tokenizer(f" {entity}" if spaced else entity, add_special_tokens=False)["input_ids"]
    if not ids or not entity.strip():
        raise UsageError(f"the entity {entity!r} has no tokens")
    return list(ids)


def find_entity(ids: Sequence[int], entity: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int, bool]]:
    """Where an entity stands in a prompt: (start, tokens, whether with the space before it), in order.

    Raises UsageError where it is not in the prompt as tokens of its own.
    """
    places: list[tuple[int, int, bool]] = []
    inside = False
    for spaced in (True, False):
        expected = entity_tokens(tokenizer, entity, spaced)
        size = len(expected)
        for start in range(len(ids) - size + 1):
            if list(ids[start : start + size]) != expected:
                continue
            before = tokenizer.decode([ids[start - 1]]) if start else " "
            after = tokenizer.decode([ids[start + size]]) if start + size < len(ids) else " "
            if str(after)[:1].isalnum() or (not spaced and str(before)[-1:].isalnum()):
                inside = True
            elif not any(start < s + n and s < start + size for s, n, _ in places):
                places.append((start, size, spaced))
    if places:
        return sorted(places)
    text = tokenizer.decode(list(ids))
    if inside or entity in text:
        raise UsageError(
            f"{entity!r} is in the prompt only as a part of a larger word or of other tokens; name the whole word as "
            f"it stands there: {text!r}"
        )
    raise UsageError(f"{entity!r} is not in the prompt {text!r}; edits act where the text names the entity")


class _Positions:
    """Rows exchanged at positions of a batch of prompts, wherever a forward holds them."""

    def __init__(self, prompts: Tensor, rules: list[dict[int, tuple[int, ...]]]) -> None:
        self.prompts, self.rules, self.offset = prompts, rules, 0

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward of the decoder: how many positions the cache holds already."""
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        self.offset = 0 if cache is None else int(cache.get_seq_length())

    def __call__(self, lookup: Any, input_ids: Tensor) -> Tensor:
        batch, length = input_ids.shape
        copies = batch // len(self.rules)
        if batch % len(self.rules):
            raise UsageError(
                f"a batch of {batch} is no multiple of the {len(self.rules)} prompts given to override_tokens"
            )
        ids, means = input_ids.clone(), []
        for row in range(batch):
            prompt, rule = self.prompts[row // copies], self.rules[row // copies]
            for position, tokens in rule.items():
                place = position - self.offset
                if not 0 <= place < length:
                    continue
                if int(input_ids[row, place]) != int(prompt[position]):
                    raise UsageError(
                        f"token {int(input_ids[row, place])} is at position {position} and not the prompt's "
                        f"{int(prompt[position])}; give override_tokens the ids that the model gets"
                    )
                ids[row, place] = tokens[0]
                if len(tokens) > 1:
                    means.append((row, place, tokens))
        if torch.equal(ids, input_ids):
            return lookup(input_ids)
        rows = lookup(ids)
        if means:
            rows = rows.clone()
            for row, place, tokens in means:
                rows[row, place] = lookup(torch.tensor([tokens], device=ids.device))[0].mean(0)
        return rows


@contextmanager
def override_tokens(
    model: nn.Module,
    prompt_ids: Tensor | Sequence[int],
    *,
    source: str,
    target: str,
    tokenizer: PreTrainedTokenizerBase,
    mode: str = "auto",
) -> Iterator[list[int]]:
    """Inside, forwards and `generate` of the prompt read `target`'s rows at every place of `source`.

    Args:
        model: an edge decoder with STEM layers, offloaded or not.
        prompt_ids: int64 [T] or [B, T], exactly as the model gets them; beams and several samples a prompt may follow.
        source: the entity in the prompts.
        target: the entity whose rows are read.
        tokenizer: the model's.
        mode: of entities of different lengths, see `length_rule`; "auto" is the paper's default where A is longer.

    Yields:
        The positions of the first prompt.

    Raises:
        UsageError: a prompt does not hold the entity as tokens of its own, the lengths do not have that mode, or rows
            are overridden already.
    """
    layers = stem_blocks(model)
    prompts = torch.as_tensor(prompt_ids)
    prompts = prompts.unsqueeze(0) if prompts.ndim == 1 else prompts
    rules: list[dict[int, tuple[int, ...]]] = []
    for prompt in prompts.tolist():
        rule: dict[int, tuple[int, ...]] = {}
        for start, size, spaced in find_entity(prompt, source, tokenizer):
            chosen = length_rule(prompt[start : start + size], entity_tokens(tokenizer, target, spaced), mode)
            rule |= {start + i: tokens for i, tokens in enumerate(chosen)}
        rules.append(rule)
    if any(layer.override is not None for layer in layers.values()):
        raise UsageError("rows of this model are overridden already; leave that block first")
    positions = _Positions(prompts, rules)
    hook = model.model.register_forward_pre_hook(positions.begin, with_kwargs=True)  # type: ignore[union-attr]
    try:
        for layer in layers.values():
            layer.override = positions
        yield sorted(rules[0])
    finally:
        hook.remove()
        for layer in layers.values():
            layer.override = None


class Edit:
    """Rows that were exchanged: `after`, layer -> rows [n, f] of `ids`; kept until `undo`.

    store: of an offloaded model, which then answers otherwise and keeps its files; else the model's own tables change.
    """

    def __init__(
        self,
        model: nn.Module,
        store: EmbeddingStore | None,
        ids: Tensor,
        after: dict[int, Tensor],
        note: dict[str, str],
    ) -> None:
        self.model, self.store, self.ids, self.after, self.note = model, store, ids, after, note
        self.before: dict[int, Any] = {}  # rows [n, f], or of each token the overlay's row, None without one
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Put the new rows in."""
        for layer, rows in self.after.items():
            if self.store is not None:
                self.before[layer] = [self.store.overlays[layer].get(key) for key in self.ids.tolist()]
                self.store.overlay(layer, self.ids, rows)
            else:
                weight = self._weight(layer)
                self.before[layer] = weight[self.ids]
                weight[self.ids] = rows.to(weight.device, weight.dtype)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the old rows back, bit for bit."""
        for layer, old in self.before.items():
            if self.store is None:
                self._weight(layer)[self.ids] = old
            else:
                for i, row in enumerate(old):
                    self.store.overlay(layer, self.ids[i : i + 1], None if row is None else row.unsqueeze(0))

    def _weight(self, layer: int) -> Tensor:
        table = stem_blocks(self.model)[layer].table
        if not isinstance(table, nn.Embedding):
            raise UsageError(
                f"the table of layer {layer} is a {type(table).__name__}; offload the model and pass its store"
            )
        return table.weight.detach()

    def save(self, path: str | Path) -> Path:
        """Write the new rows as a safetensors file, which `load_edit` reads."""
        tensors = {"ids": self.ids} | {
            f"stem.layers.{layer}.rows": rows.contiguous() for layer, rows in self.after.items()
        }
        save_tensors(path, tensors, {"format": "pt", "edit": FORMAT, "note": json.dumps(self.note)})
        return Path(path)


@torch.no_grad()
def edit_rows(
    model: nn.Module,
    source: str,
    target: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mode: str = "auto",
    store: EmbeddingStore | None = None,
    spaced: bool = True,
) -> Edit:
    """Give every token of `source` the rows of `target` in all STEM layers, for all texts.

    A token that comes twice in `source` gets the mean (our choice). Warns where the tokens are parts that other words
    share. Undo edits of the same tokens in the reverse order.

    Args:
        model: an edge decoder with STEM layers; without a store its own tables change.
        source: the entity whose rows change.
        target: the entity whose rows they become.
        tokenizer: the model's.
        mode: of entities of different lengths, see `length_rule`.
        store: of an offloaded model; an overlay changes, and its files stay as they are.
        spaced: the form of the names within a text, with the space before them.

    Returns:
        The edit, applied: `undo` takes it back bit for bit, `save` writes it as a file for `load_edit`.

    Raises:
        UsageError: a store for a model that has its own tables or none for one that does not, quantised tables, or a
            mode that the lengths do not have.
    """
    layers = stem_blocks(model)
    offloaded = any(layer.table is None for layer in layers.values())
    if offloaded != (store is not None):
        what = "is offloaded: pass its store" if offloaded else "has its own tables: pass no store"
        raise UsageError(f"the model {what}")
    a, b = (entity_tokens(tokenizer, name, spaced) for name in (source, target))
    rule = length_rule(a, b, mode)
    if len(a) > 1:
        parts = ", ".join(repr(tokenizer.decode([token])) for token in a)
        warnings.warn(
            f"{source!r} is {len(a)} tokens ({parts}); their rows change in every word that has them", stacklevel=2
        )
    by_token: dict[int, list[tuple[int, ...]]] = {}
    for token, tokens in zip(a, rule, strict=True):
        by_token.setdefault(token, []).append(tokens)
    ids = torch.tensor(sorted(by_token))
    after = {}
    for layer in layers:
        needed = sorted({token for tokens in rule for token in tokens})
        rows = _rows(layers[layer], layer, torch.tensor(needed), store)
        new = []
        for token in ids.tolist():
            means = [_mean(rows[[needed.index(t) for t in tokens]]) for tokens in by_token[token]]
            new.append(_mean(torch.stack(means)))
        after[layer] = torch.stack(new)
    return Edit(model, store, ids, after, {"source": source, "target": target, "mode": mode})


def _mean(rows: Tensor) -> Tensor:
    """Of rows [n, f]; one row is itself."""
    return rows[0] if len(rows) == 1 else rows.mean(0)


def load_edit(model: nn.Module, path: str | Path, store: EmbeddingStore | None = None) -> Edit:
    """Apply a saved edit. Raises FormatError for another kind of file, UsageError for a model that it does not fit."""
    tensors, metadata = read_tensors(path)
    if metadata.get("edit") != FORMAT or "ids" not in tensors:
        raise FormatError(f"{path} is not an edit that edgewright wrote")
    layers, after = stem_blocks(model), {}
    ids = tensors.pop("ids")
    try:
        note = dict(json.loads(metadata.get("note", "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{path} has a damaged note: {in_one_line(error)}") from error
    if ids.dim() != 1 or not len(ids):
        raise FormatError(f"{path} has ids of shape {list(ids.shape)}; a list of tokens is needed")
    for name, rows in tensors.items():
        layer = int(name.split(".")[2]) if name.startswith("stem.layers.") and name.split(".")[2].isdigit() else -1
        fits = layer in layers and rows.shape == (len(ids), layers[layer].intermediate)
        if not fits or ids.dtype != torch.int64 or int(ids.min()) < 0 or int(ids.max()) >= layers[layer].vocabulary:
            raise UsageError(f"{path} holds {name} of shape {list(rows.shape)}, which this model has no place for")
        after[layer] = rows
    return Edit(model, store, ids, after, note)


def _rows(layer: StemFeedForward, block: int, ids: Tensor, store: EmbeddingStore | None) -> Tensor:
    if store is not None:
        return store.fetch(block, ids)
    lookup = layer.lookup or layer.table
    assert lookup is not None
    return lookup(ids.unsqueeze(0))[0]
