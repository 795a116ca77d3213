"""Edited rows: which token stands for which, at which positions, and back again bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from edgewright.errors import FormatError, UsageError
from edgewright.io.tensors import read_tensors, save_tensors
from edgewright.io.transformers_names import cache_of, with_cache
from edgewright.systems.stem.edit import edit_rows, entity_tokens, find_entity, length_rule, load_edit, override_tokens
from edgewright.systems.stem.files import load_offloaded, save_stem
from edgewright.systems.stem.layer import stem_blocks
from edgewright.systems.stem.store import offload_
from tests.systems.stem.toys import logits, stem
from tests.toy_llama import make_byte_tokenizer

PROMPT = "we saw Oslo and Oslo again"
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_byte_tokenizer()


def model(layers: Any = (1, 3)) -> Any:
    return stem(layers=layers, vocab_size=512)


def ids_of(tokenizer: Any, text: str = PROMPT) -> torch.Tensor:
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def test_which_token_stands_for_which() -> None:
    assert length_rule([1, 2], [8, 9]) == ((8,), (9,))
    assert length_rule([1, 2, 3], [8, 9]) == length_rule([1, 2, 3], [8, 9], "pad") == ((8,), (8,), (9,))
    assert length_rule([1, 2, 3], [8, 9], "copy") == ((8,), (9,), (8,))
    assert length_rule([1, 2], [7, 8, 9]) == length_rule([1, 2], [7, 8, 9], "subset") == ((8,), (9,))
    assert length_rule([1, 2], [7, 8, 9], "average") == ((7, 8, 9), (7, 8, 9))


@pytest.mark.parametrize(
    ("target", "mode"), [("Rome", "auto"), ("Ur", "pad"), ("Ur", "copy"), ("Berlin", "subset"), ("Berlin", "average")]
)
@pytest.mark.parametrize("offloaded", [False, True])
def test_rows_are_exchanged_at_the_entity_alone(target: str, mode: str, offloaded: bool, tokenizer: Any) -> None:
    """The model with its tables' rows replaced by hand at these positions."""
    ours, ids = model(), ids_of(tokenizer)
    found = find_entity(ids[0].tolist(), "Oslo", tokenizer)
    assert len(found) == 2
    expected_rows = {}
    for block, layer in stem_blocks(ours).items():
        rows = layer.table(ids)[0].detach().clone()  # type: ignore[misc]
        for start, size, spaced in found:
            new = entity_tokens(tokenizer, target, spaced)
            rule = length_rule(ids[0, start : start + size].tolist(), new, mode)
            for i, tokens in enumerate(rule):
                rows[start + i] = layer.table.weight[list(tokens)].mean(0)  # type: ignore[union-attr,index]
        expected_rows[block] = rows.detach()
    byhand = model()
    for block, layer in stem_blocks(byhand).items():
        layer.lookup = lambda _, block=block: expected_rows[block].unsqueeze(0)  # type: ignore[misc]
    expected, before = logits(byhand, ids), logits(ours, ids)
    made = ours.generate(ids, **OPTIONS)
    if offloaded:
        offload_(ours, cache_rows=7)
    with override_tokens(ours, ids, source="Oslo", target=target, tokenizer=tokenizer, mode=mode) as positions:
        assert len(positions) == sum(size for _, size, _ in found)
        torch.testing.assert_close(logits(ours, ids), expected)
        out = ours.generate(ids, **OPTIONS)
        assert torch.equal(out, ours.generate(ids, use_cache=False, **OPTIONS))
        assert torch.equal(ours.generate(ids, num_return_sequences=2, num_beams=2, **OPTIONS)[:1, : ids.shape[1]], ids)
    assert not torch.allclose(expected, before)
    assert torch.equal(logits(ours, ids), before) and torch.equal(ours.generate(ids, **OPTIONS), made)


def test_a_prompt_in_two_pieces_is_the_prompt(tokenizer: Any) -> None:
    ours, ids = model(), ids_of(tokenizer)
    with override_tokens(ours, ids, source="Oslo", target="Rome", tokenizer=tokenizer), torch.no_grad():
        whole = ours(ids).logits
        first = ours(ids[:, :9], use_cache=True)
        second = ours(ids[:, 9:], **with_cache(cache_of(first)))
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole)
        with pytest.raises(UsageError, match="give override_tokens the ids that the model gets"):
            ours(ids.flip(1))


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_persistent_edit_is_every_position_and_undo_restores_bytes(
    offloaded: bool, tokenizer: Any, tmp_path: Path
) -> None:
    ours, ids = model(), ids_of(tokenizer, "go to X now")
    before = logits(ours, ids)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    save_stem(ours, tmp_path / "m")
    files = {file: file.read_bytes() for file in (tmp_path / "m").glob("*.safetensors")}
    store = None
    if offloaded:
        ours, store = load_offloaded(tmp_path / "m", cache_rows=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with override_tokens(ours, ids, source="X", target="Y", tokenizer=tokenizer):
            expected = logits(ours, ids)
        edit = edit_rows(ours, "X", "Y", tokenizer, store=store, spaced=False)
    assert torch.equal(logits(ours, ids), expected) and not torch.equal(expected, before)
    edit.save(tmp_path / "edit.safetensors")
    if offloaded:
        save_stem(ours, tmp_path / "edited", store=store)
        assert torch.equal(logits(load_offloaded(tmp_path / "edited")[0], ids), expected)
    edit.undo()
    assert torch.equal(logits(ours, ids), before)
    assert all(file.read_bytes() == data for file, data in files.items())
    if not offloaded:
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    again = load_edit(ours, tmp_path / "edit.safetensors", store)
    assert torch.equal(logits(ours, ids), expected) and again.note["target"] == "Y"


def test_edits_one_upon_the_other(tokenizer: Any) -> None:
    ours, ids = model(), ids_of(tokenizer, "X")
    store = offload_(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logits(ours, ids)
        first = edit_rows(ours, "X", "Y", tokenizer, store=store, spaced=False)
        between = logits(ours, ids)
        second = edit_rows(ours, "X", "Z", tokenizer, store=store, spaced=False)
    second.undo()
    assert torch.equal(logits(ours, ids), between)
    first.undo()
    assert torch.equal(logits(ours, ids), before)


def test_shared_parts_are_warned_about(tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match="'Oslo' is .* tokens .*; their rows change in every word that has them"):
        edit_rows(model(), "Oslo", "Rome", tokenizer)


def test_what_cannot_be_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    ours, ids = model(), ids_of(tokenizer)

    def use(source: str, target: str = "Rome", mode: str = "auto") -> None:
        with override_tokens(ours, ids, source=source, target=target, tokenizer=tokenizer, mode=mode):
            pass

    for call, message in (
        (lambda: use("Paris"), "'Paris' is not in the prompt 'we saw Oslo and Oslo again'"),
        (lambda: use("Osl"), "'Osl' is in the prompt only as a part of a larger word"),
        (lambda: use("Oslo", mode="stretch"), "mode='stretch'"),
        (lambda: use("Oslo", "Reykjavik", "pad"), "mode='pad' is for a longer entity"),
        (lambda: use("Oslo", "Ur", "subset"), "mode='subset' is for a shorter entity"),
        (lambda: use("  "), "has no tokens"),
        (lambda: edit_rows(ours, "X", "Y", tokenizer, store=offload_(model())), "has its own tables: pass no store"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            call()
    save_stem(ours, tmp_path / "m")
    with pytest.raises(FormatError, match="is not an edit that edgewright wrote"):
        load_edit(ours, tmp_path / "m" / "model-backbone.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = edit_rows(model([2]), "X", "Y", tokenizer).save(tmp_path / "e.safetensors")
    with pytest.raises(UsageError, match="holds stem.layers.2.rows .* has no place for"):
        load_edit(ours, path)
    tensors, texts = read_tensors(path)
    for ids, note, message in (
        (tensors["ids"], '{"source": ', "a damaged note"),
        (tensors["ids"], "[1]", "a damaged note"),
        (torch.zeros(0, dtype=torch.int64), "{}", "ids of shape"),
        (torch.zeros((), dtype=torch.int64), "{}", "ids of shape"),
    ):
        save_tensors(path, tensors | {"ids": ids}, texts | {"note": note})
        with pytest.raises(FormatError, match=message):
            load_edit(model([2]), path)
