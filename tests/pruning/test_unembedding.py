"""The cut output layer: same logits, same answers, same bits after saving; what cannot be cut is refused."""

from __future__ import annotations

import copy
import json
import math
from itertools import chain, combinations
from pathlib import Path

import pytest
import torch
from torch import nn

import edgewright
from edgewright.errors import FormatError, Unsupported, UsageError
from edgewright.io.packed import PackedLinear
from edgewright.pruning.cut_folder import is_cut, load_cut, save_cut
from edgewright.pruning.unembedding import PrunedHead, answer_ids, output_vocabulary, prune_unembedding_
from edgewright.quantization.config import ActivationConfig, QuantConfig, Rule, WeightConfig
from tests.toy_llama import make_tiny_llama

KEPT = (2, 5, 17, 100, 255)
TOKENS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
CODES = [f"S{i}" for i in range(1, 14)]
ANSWERS = [" safe", *(f" unsafe\n{','.join(pair)}" for pair in chain(combinations(CODES, 1), combinations(CODES, 2)))]


def int4(model: nn.Module, tied: str = "together") -> nn.Module:
    weight = WeightConfig("int4", 32, scale="full_range")
    rules = (Rule("*embed_tokens", weight), Rule("*", weight, ActivationConfig(8, symmetric=False)))
    # the head takes its input as every linear layer does
    config = QuantConfig(rules=rules, skip=(), tied=tied)
    return edgewright.convert_(edgewright.quantize_(model, config))


def test_logits_are_bitwise_those_of_the_whole_head() -> None:
    """Small integers: their sums are exact in any order, and a product of another shape may add in another order."""
    model = make_tiny_llama(tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(0)
    model.lm_head.weight.data = torch.randint(-99, 99, (256, 64), generator=generator).float()
    hidden = torch.randint(-999, 999, (3, 7, 64), generator=generator).float()
    whole = model.lm_head(hidden)
    rows = model.lm_head.weight.detach().clone()
    prune_unembedding_(model, KEPT)
    assert torch.equal(model.lm_head.rows.weight, rows[list(KEPT)])
    assert torch.equal(model.lm_head(hidden), whole[..., list(KEPT)])


@pytest.mark.parametrize("packed", [False, True])
def test_logits_of_a_model(packed: bool) -> None:
    model = int4(make_tiny_llama()) if packed else make_tiny_llama()
    cut = copy.deepcopy(model)
    notes = prune_unembedding_(cut, KEPT)
    assert len(notes) == 1 and "untied" in notes[0]
    assert cut.config.vocab_size == 256 and not cut.config.tie_word_embeddings
    with torch.no_grad():
        whole, part = model(TOKENS).logits, cut(TOKENS).logits
    assert part.shape == (2, 12, 5)
    # the order of addition inside the product, see above
    torch.testing.assert_close(part, whole[..., list(KEPT)], rtol=1.3e-6, atol=1e-5)
    embedding = cut.model.embed_tokens
    assert embedding.num_embeddings == 256 and isinstance(cut.lm_head.rows, PackedLinear if packed else nn.Linear)


def test_the_expanded_output_has_exactly_the_kept_entries() -> None:
    model = make_tiny_llama()
    prune_unembedding_(model, KEPT, expand=True)
    with torch.no_grad():
        logits = model(TOKENS).logits
    assert logits.shape == (2, 12, 256)
    finite = torch.isfinite(logits)
    assert (finite.sum(-1) == len(KEPT)).all() and finite[..., list(KEPT)].all()
    assert logits[0, 0, 0] == -math.inf


def test_greedy_choices_equal_the_constrained_ones_of_the_whole_model() -> None:
    model = make_tiny_llama(initializer_range=0.3)
    cut = copy.deepcopy(model)
    prune_unembedding_(cut, KEPT)
    prompts = torch.randint(3, 250, (200, 10), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, part = model(prompts).logits[:, -1], cut(prompts).logits[:, -1]
    constrained = torch.full_like(whole, -math.inf)
    constrained[:, list(KEPT)] = whole[:, list(KEPT)]
    assert torch.equal(torch.tensor(KEPT)[part.argmax(-1)], constrained.argmax(-1))
    # renormalised over the kept set
    p = whole.softmax(-1)[:, list(KEPT)]
    torch.testing.assert_close(part.softmax(-1), p / p.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)


def test_published_saving() -> None:
    with torch.device("meta"):
        head = nn.Linear(2048, 128256, bias=False)
    assert head.weight.numel() == 262_668_288
    assert round((head.weight.numel() - 20 * 2048) / 2 / 1e6, 1) == 131.3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded(packed: bool, tied: bool, tmp_path: Path, smollm2) -> None:
    model = make_tiny_llama(tie_word_embeddings=tied, attention_bias=True)
    model = int4(model, "together" if tied else "refuse") if packed else model
    tokenizer = smollm2[1]
    prune_unembedding_(model, KEPT, expand=packed)
    for module in model.modules():  # input quantisers are the caller's
        if isinstance(module, PackedLinear):
            module.input_quantizer = None
    save_cut(model, tokenizer, tmp_path / "cut")
    assert is_cut(tmp_path / "cut") and not is_cut(tmp_path)
    again, _ = load_cut(tmp_path / "cut")
    assert type(again) is type(model) and again.lm_head.kept_ids.tolist() == list(KEPT)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_broken_folders_are_refused(tmp_path: Path, smollm2) -> None:
    model = make_tiny_llama()
    with pytest.raises(UsageError, match="head is whole"):
        save_cut(model, smollm2[1], tmp_path / "cut")
    prune_unembedding_(model, KEPT)
    save_cut(model, smollm2[1], tmp_path / "cut")
    path = tmp_path / "cut" / "pruned_head.json"
    good = json.loads(path.read_text())
    wrong = {"class": "os", "kept_ids": [2, 5, 17, 100, 256], "vocabulary": 999, "expand": 1, "grid": "int5"}
    for key, value in (
        *wrong.items(),
        ("kept_ids", [5, 2]),
        ("kept_ids", []),
        ("class", "LlamaForTokenClassification"),
    ):
        path.write_text(json.dumps(good | {key: value}))
        with pytest.raises(FormatError):
            load_cut(tmp_path / "cut")
    for key in wrong:
        path.write_text(json.dumps({name: value for name, value in good.items() if name != key}))
        with pytest.raises(FormatError):
            load_cut(tmp_path / "cut")
    path.write_text(json.dumps(good | {"kept_ids": [2, 5, 17, 100, 254, 255]}))
    with pytest.raises(FormatError, match="5 rows for 6 kept tokens"):
        load_cut(tmp_path / "cut")
    with pytest.raises(UsageError, match="cannot read"):
        load_cut(tmp_path)


def test_kept_words_come_from_the_real_tokenisation(smollm2) -> None:
    tokenizer = smollm2[1]
    kept = output_vocabulary(tokenizer, ["User: hi\nVerdict:"], ANSWERS)
    pieces = {tokenizer.decode([token]) for token in kept}
    assert pieces == {" safe", " unsafe", "\n", "S", ",", *"0123456789", "<|im_end|>"} and len(kept) == 16
    _prompt, answers = answer_ids(tokenizer, "Verdict:", [" unsafe\nS12"])
    assert [tokenizer.decode([t]) for t in answers[0]] == [" unsafe", "\n", "S", "1", "2"]
    # a control token in a text is plain text
    assert tokenizer.eos_token_id not in answer_ids(tokenizer, "<|im_end|> Verdict:", [" safe"])[0]


class MergingTokenizer:
    """A letter a token, except that a digit after a digit is another token than a digit after a letter."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[self.number(text, i) for i in range(len(text))] for text in texts]}

    def number(self, text: str, i: int) -> int:
        return ord(text[i]) + 256 * (i > 0 and text[i].isdigit() and text[i - 1].isdigit())

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token % 256) for token in ids)


def test_answers_that_cannot_be_pinned_down_are_refused(smollm2) -> None:
    tokenizer = smollm2[1]
    with pytest.raises(ValueError, match="there is no answer"):
        output_vocabulary(tokenizer, ["Verdict:"], [])
    with pytest.raises(ValueError, match="an empty one"):
        output_vocabulary(tokenizer, ["Verdict:"], ["yes", ""])
    with pytest.raises(ValueError, match="at least one prompt"):
        output_vocabulary(tokenizer, [], [" safe"])
    with pytest.raises(ValueError, match=r"1 pieces escape the list that the first prompt gives: '1'"):
        output_vocabulary(MergingTokenizer(), ["on", "12"], ["1", "x"])
    with pytest.raises(ValueError, match="melts into the end of its prompt"):
        output_vocabulary(tokenizer, ["Verdict: un"], ["safe"])


def test_heads_that_cannot_be_cut_are_refused() -> None:
    model = make_tiny_llama()
    for ids in ((), (256,), (-1, 3)):
        with pytest.raises(UsageError, match="kept_ids must be token ids from 0 to 255"):
            prune_unembedding_(model, ids)
    prune_unembedding_(model, KEPT)
    assert isinstance(model.lm_head, PrunedHead)
    with pytest.raises(UsageError, match="cut already, to 5 tokens"):
        prune_unembedding_(model, KEPT)
    under = edgewright.quantize_(
        make_tiny_llama(tie_word_embeddings=False), QuantConfig.weights("int4", scale="absmax")
    )
    under.lm_head = under.model.layers[0].mlp.up_proj
    with pytest.raises(Unsupported, match="call convert_ before"):
        prune_unembedding_(under, KEPT)
