"""What a file says beside its weights: end tokens, added tokens, the chat template; and that verification sees them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from edgewright import cli
from edgewright.errors import CheckFailed, Unsupported
from edgewright.export.gguf import metadata as gguf_metadata
from edgewright.export.gguf.exporter import export_gguf
from edgewright.export.gguf.texts import own_token_texts
from edgewright.io.gguf.model import load_gguf
from edgewright.io.gguf.reader import GGUFFile
from edgewright.runtime.llamacpp import LlamaCppEngine
from tests.export.export_models import make_llama, make_tokenizer
from tests.toy_chat_templates import TEMPLATES

QUIET: dict[str, Any] = {"progress": False, "embedding": "F32", "float_type": "F32"}


def with_tokens(*tokens: str | AddedToken, special: bool = True) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    return tokenizer


def chain(model: Any, steps: dict[int, int]) -> None:
    """Make the next token depend on the last one alone."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.lm_head.weight.mul_(0.01)
        table = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
        for last, following in steps.items():
            model.lm_head.weight[following] += 3 * table[last]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_generation_stops_at_every_end_token(count: int, tmp_path: Path) -> None:
    names = [f"<|finish_{i}|>" for i in range(count)]
    tokenizer = with_tokens(*names)
    ends = tokenizer.convert_tokens_to_ids(names)
    model = make_llama(vocab_size=272, tie_word_embeddings=False)
    chain(model, {10 + i: end for i, end in enumerate(ends)} | {end: 40 for end in ends})
    model.generation_config.eos_token_id = ends if count > 1 else ends[0]
    path = tmp_path / "m.gguf"
    if count > 2:  # the tokenizer's own end token and two of these take all the keys there are
        with pytest.warns(
            UserWarning, match=r"GGUF has no key for the end tokens <\|finish_2\|>, <\|finish_3\|>: .*edgewright chat"
        ):
            export_gguf(model, tokenizer, path, **QUIET)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            export_gguf(model, tokenizer, path, verify=False, **QUIET)
    with LlamaCppEngine(path, threads=1, context=256) as engine:
        for i, end in enumerate(ends):
            wanted = model.generate(torch.tensor([[10 + i]]), max_new_tokens=5, do_sample=False)[0, 1:].tolist()
            assert wanted == [end]
            done = engine.generate([10 + i], 5)
            assert (done.ids, done.finish) == ((), "stop") and engine.is_end(end)
        assert not engine.is_end(40)
    again, _ = load_gguf(path)
    kept = again.generation_config.eos_token_id
    own = [] if tokenizer.eos_token_id in ends else [tokenizer.eos_token_id]
    assert (kept if isinstance(kept, list) else [kept]) == ends + own


def test_llama_cpp_itself_knows_three_end_tokens(tmp_path: Path) -> None:
    tokenizer = with_tokens("<|finish|>", "<|pause|>")
    model = make_llama(vocab_size=272)
    ends = tokenizer.convert_tokens_to_ids(["<|finish|>", "<|pause|>"])
    model.generation_config.eos_token_id = ends
    export_gguf(model, tokenizer, tmp_path / "m.gguf", verify=False, **QUIET)
    with LlamaCppEngine(tmp_path / "m.gguf", threads=1, context=256) as engine:
        engine._ends = frozenset()
        assert all(engine.is_end(token) for token in [*ends, tokenizer.eos_token_id])


@pytest.mark.parametrize(
    ("flag", "words"),
    [("lstrip", "spaces on its left"), ("rstrip", "spaces on its right"), ("single_word", "only matches whole words")],
)
def test_flags_that_gguf_lacks_are_refused_by_the_token(flag: str, words: str, tmp_path: Path) -> None:
    tokenizer = with_tokens(AddedToken("<mask>", normalized=False, **{flag: True}))
    with pytest.raises(Unsupported, match=f"'<mask>' .*{words}.*--to pte and --to onnx"):
        export_gguf(make_llama(vocab_size=272), tokenizer, tmp_path / "m.gguf", **QUIET)


def test_the_advice_about_a_flag_works(tmp_path: Path) -> None:
    tokenizer = with_tokens(AddedToken("<mask>", lstrip=True, normalized=False))
    folder = tmp_path / "model"
    make_llama(vocab_size=272).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = ["export", str(folder), "--output", str(tmp_path / "out"), "--json"]
    assert cli.main(command) == 2
    assert cli.main([*command, "--to", "onnx"]) == 0
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"lstrip": true', '"lstrip": false'))
    assert cli.main(command) == 0


def test_a_token_may_be_called_like_an_unused_row(tmp_path: Path) -> None:
    tokenizer = with_tokens("[PAD270]")
    export_gguf(make_llama(vocab_size=272), tokenizer, tmp_path / "m.gguf", **QUIET)
    again = load_gguf(tmp_path / "m.gguf")[1]
    assert again("a[PAD270]")["input_ids"] == tokenizer("a[PAD270]")["input_ids"]


def test_verification_sees_the_models_own_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the refusal, a token that takes in spaces is found by running the file."""
    original = gguf_metadata._description

    def without_flags(tokenizer: Any) -> Any:
        description = original(tokenizer)
        for entry in description["added_tokens"]:
            entry["lstrip"] = False
        return description

    tokenizer = with_tokens(AddedToken("<mask>", lstrip=True, normalized=False))
    assert any("x <mask> y" in text for text in own_token_texts(tokenizer))
    monkeypatch.setattr(gguf_metadata, "_description", without_flags)
    with pytest.raises(CheckFailed, match="splits the text differently .*first near .*<mask>"):
        export_gguf(make_llama(vocab_size=272), tokenizer, tmp_path / "m.gguf", **QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ChatML", "Gemma", "Phi"])
def test_verification_renders_the_chat_template(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = make_tokenizer(), make_llama(vocab_size=272)
    tokenizer.chat_template = TEMPLATES[name]
    done = export_gguf(model, tokenizer, tmp_path / "m.gguf", **QUIET)
    assert done.checks["chat_prompts_equal"] == 3 and done.checks["tokenizer"] == "equal"
    original = gguf_metadata.tokenizer_metadata

    def changed(*arguments: Any) -> Any:
        metadata = original(*arguments)
        template = metadata["tokenizer.chat_template"][1].replace("\\n", "\\n ").replace("\n", "\n ")
        return metadata | {"tokenizer.chat_template": ("str", template)}

    monkeypatch.setattr("edgewright.export.gguf.exporter.tokenizer_metadata", changed)
    with pytest.raises(CheckFailed, match="gives another prompt than transformers for the roles user"):
        export_gguf(model, tokenizer, tmp_path / "b.gguf", **QUIET)


def test_marks_of_the_template_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    """Where a file names no start token, llama.cpp's answer is another token of the vocabulary, not none."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    tokenizer.pad_token = "<s>"
    tokenizer.chat_template = "[{{ bos_token }}|{{ pad_token }}|{{ eos_token }}]{{ messages[0].content }}"
    export_gguf(make_llama(vocab_size=272), tokenizer, tmp_path / "m.gguf", **QUIET)
    assert "tokenizer.ggml.bos_token_id" not in GGUFFile(tmp_path / "m.gguf").metadata
    chat = [{"role": "user", "content": "x"}]
    with LlamaCppEngine(tmp_path / "m.gguf", threads=1, context=256) as engine:
        assert engine.chat_prompt(chat) == tokenizer.apply_chat_template(chat, tokenize=False)
        for text in ("++", "a++b", "\u0021\u0021\u0021"):
            assert engine.tokenize(text) == tokenizer(text)["input_ids"]
