"""The llama.cpp engine: agreement with PyTorch, exactness of what must be exact, one clear sentence for the rest."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

from edgewright.errors import EdgewrightError, FormatError, MissingPackage, UsageError
from edgewright.io.gguf.reader import GGUFFile
from edgewright.runtime import generation, llamacpp, llamacpp_library, open_engine
from edgewright.runtime.child_check import first_run_in_child
from edgewright.runtime.generation import sample
from edgewright.runtime.llamacpp import LlamaCppEngine
from edgewright.runtime.llamacpp_library import library
from tests import toy_gguf
from tests.toy_gguf import write_toy, write_toy_gpt2

TEXT = "The tides are caused by the gravity of the Moon and, to a lesser degree, of the Sun."


# ---- against PyTorch


def test_logits_agree_with_pytorch(smollm2_engine, smollm2):
    model, tokenizer = smollm2
    ids = smollm2_engine.tokenize(TEXT)
    assert ids == tokenizer(TEXT)["input_ids"]
    got = torch.from_numpy(smollm2_engine.logits(ids))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert got.shape == expected.shape and got.dtype == torch.float32
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    # llama.cpp rounds activations to 8 bits per block: about 0.004 nat on this file. An offset of one would give 10.
    assert kl < 0.02
    assert (p.argmax(-1) == q.argmax(-1)).double().mean() > 0.85


def assert_close_in_half(got, expected):
    """Equal but for keys, values and attention sums in float16: 0.3 % of the spread on average, 5 % at worst."""
    error = np.abs(got - expected) / expected.std()
    assert error.mean() < 3e-3 and error.max() < 5e-2


def reference_logits(path, ids):
    """The toy's logits in float64, written from the definition of a Llama."""
    file = GGUFFile(path)
    w = {name: file.dequantize(name).astype(np.float64) for name in file.tensors}
    heads, eps = file.metadata["llama.attention.head_count"], file.metadata["llama.attention.layer_norm_rms_epsilon"]
    x = w["token_embd.weight"][ids]
    size, length = x.shape[1] // heads, len(ids)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[name]

    def rotate(x):  # [T, heads, size]; GGUF's Llama rotates neighbours
        angle = np.arange(length)[:, None, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
        even, odd = x[..., ::2], x[..., 1::2]
        turned = np.stack([even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)], -1)
        return turned.reshape(x.shape)

    mask = np.where(np.tril(np.ones((length, length))), 0, -np.inf)
    for i in range(file.metadata["llama.block_count"]):
        h = norm(x, f"blk.{i}.attn_norm.weight")
        q = rotate((h @ w[f"blk.{i}.attn_q.weight"].T).reshape(length, heads, size))
        k = rotate((h @ w[f"blk.{i}.attn_k.weight"].T).reshape(length, 1, size))[:, 0]
        v = h @ w[f"blk.{i}.attn_v.weight"].T
        scores = np.einsum("thd,sd->hts", q, k) / np.sqrt(size) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,sd->thd", scores / scores.sum(-1, keepdims=True), v).reshape(length, -1)
        x = x + mixed @ w[f"blk.{i}.attn_output.weight"].T
        h = norm(x, f"blk.{i}.ffn_norm.weight")
        gate = h @ w[f"blk.{i}.ffn_gate.weight"].T
        up = h @ w[f"blk.{i}.ffn_up.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"blk.{i}.ffn_down.weight"].T
    return norm(x, "output_norm.weight") @ w["token_embd.weight"].T


def test_toy_logits_agree_with_the_definition(toy, toy_file):
    ids = [5, 77, 200, 3, 256, 31, 31]
    got, expected = toy.logits(ids), reference_logits(toy_file, ids)
    assert_close_in_half(got, expected)


# ---- the same, however it is computed


def test_chunks_and_single_steps_agree(toy, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 256, 200).tolist()
    whole = toy.logits(ids)
    assert whole.shape == (200, toy.vocabulary)
    assert [len(chunk) for chunk in toy.logits_stream(ids)] == [128, 72]
    monkeypatch.setattr(llamacpp, "LOGIT_ROWS", 1)
    one_by_one = toy.logits(ids)
    assert_close_in_half(one_by_one, whole)


def test_the_same_call_gives_the_same_bits(toy):
    ids = list(range(60))
    first = toy.logits(ids)
    toy.generate([1, 2, 3], 20)
    assert np.array_equal(toy.logits(ids), first)


def test_sampling_repeats_with_its_seed(toy):
    draws = [toy.generate([1, 2, 3], 30, temperature=1.0, seed=s, ignore_end=True).ids for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_sampling_follows_the_softmax(toy):
    rng = np.random.default_rng(0)
    logits = toy.logits([1, 2, 3])[-1].astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    row = toy.next_logits([1, 2, 3])
    drawn = np.bincount([sample(row, 1.0, rng) for _ in range(4000)], minlength=toy.vocabulary) / 4000
    assert np.abs(drawn - p).max() < 0.04  # five standard errors of the likeliest entry


def test_next_logits_is_the_last_row(toy):
    ids = list(range(20))
    row = toy.next_logits(ids)
    # all rows at once or the last alone: float sums in another order
    np.testing.assert_allclose(row, toy.logits(ids)[-1], rtol=1e-4, atol=1e-4)
    assert toy.next_logits(ids[:4], reuse=True).shape == row.shape  # a copy: later calls leave it as it is
    np.testing.assert_array_equal(row, toy.next_logits(ids))
    with pytest.raises(UsageError, match="do not fit the context"):
        toy.next_logits([1] * 300)


def test_reused_prompt_gives_the_same_text(toy):
    prompt = list(range(50))
    first = toy.generate(prompt, 8)
    longer = [*prompt, *first.ids, 9, 8]
    fresh = toy.generate(longer, 8)
    toy.generate(prompt, 8)
    again = toy.generate(longer, 8, reuse=True)
    assert again.ids == fresh.ids and fresh.reused_tokens == 0
    assert len(prompt) <= again.reused_tokens < len(longer)
    assert toy.generate(longer, 8, reuse=True).reused_tokens == len(longer) - 1


# ---- behaviour


def test_greedy_continuation_is_sensible_and_repeats(smollm2_engine):
    first, second = (smollm2_engine.generate("The capital of France is", 8) for _ in range(2))
    assert "Paris" in first.text and first.ids == second.ids
    assert len(first.token_seconds) == 7 and first.prompt_tokens == 5 and first.finish == "length"
    assert first.decode_tokens_per_second > 0 and first.time_to_first_token > 0


def test_quantised_cache_changes_a_little(smollm2_engine, smollm2_file):
    ids = smollm2_engine.tokenize(TEXT)
    exact = torch.from_numpy(smollm2_engine.logits(ids)).double().log_softmax(-1)
    kl = {}
    for k, v in (("q8_0", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0")):
        with open_engine(smollm2_file, threads=1, context=64, cache_type_k=k, cache_type_v=v) as engine:
            got = torch.from_numpy(engine.logits(ids)).double().log_softmax(-1)
        kl[k, v] = (exact.exp() * (exact - got)).sum(-1).mean().item()
    assert 0 < kl["q8_0", "f16"] < 0.02 and 0 < kl["q8_0", "q8_0"] < 0.02
    assert kl["q8_0", "q8_0"] < kl["q4_0", "q4_0"] < 1


def test_answers_end(smollm2_engine):
    prompt = smollm2_engine.chat_prompt([{"role": "user", "content": "What is 2+2?"}])
    assert prompt.endswith("<|im_start|>assistant\n") and "What is 2+2?<|im_end|>" in prompt
    answer = smollm2_engine.generate(prompt, 200)
    assert answer.finish == "stop" and "4" in answer.text and "<|im_end|>" not in answer.text


def test_context_ends_the_text(toy):
    answer = toy.generate(list(range(250)), 50, ignore_end=True)
    assert answer.finish == "context" and len(answer.ids) == 256 - 250 + 1


# ---- text


@pytest.mark.parametrize("text", ["", "he", "héllo 😀 日本語\n\ttab", "<|im_start|>user\nhe<|im_end|>", "a\0b"])
def test_text_survives(toy, text):
    assert toy.detokenize(toy.tokenize(text)) == text


def test_special_marks_in_text_are_text_when_asked(toy):
    assert toy.tokenize("<|im_end|>") == [258]
    plain = toy.tokenize("<|im_end|>", special=False)
    assert len(plain) == 10 and toy.detokenize(plain) == "<|im_end|>"
    assert toy.detokenize([258], special=False) == ""


def test_start_token_comes_once(tmp_path):
    path = write_toy(tmp_path / "bos.gguf", tokenizer__ggml__add_bos_token=True)
    with open_engine(path, threads=1, context=64) as engine:
        assert engine.tokenize("he") == [257, 256]
        assert engine.tokenize("<|im_start|>he") == [257, 256]
        assert engine.tokenize("he", special=False) == [256]


def test_streaming_never_splits_a_character(toy, monkeypatch):
    written = [*list("😀é".encode()), 240, 159]
    script = iter(written)
    monkeypatch.setattr(generation, "sample", lambda row, temperature, rng: next(script))
    pieces: list[str] = []
    answer = toy.generate([1], len(written), on_token=pieces.append, ignore_end=True)
    assert pieces == ["😀", "é", "\ufffd"] and answer.text == "😀é\ufffd"
    assert toy.detokenize_bytes(written) == bytes(written)


# ---- one clear sentence


def test_bad_arguments(toy, toy_file, tmp_path):
    with pytest.raises(UsageError, match="300 tokens do not fit the context of 256"):
        toy.logits([1] * 300)
    with pytest.raises(UsageError, match="257 tokens do not fit"):
        toy.generate([1] * 256)
    with pytest.raises(UsageError, match="token 259 is not in the vocabulary"):
        toy.logits([1, 259])
    with pytest.raises(UsageError, match="no tokens"):
        toy.generate("")
    with pytest.raises(UsageError, match="max_new_tokens"):
        toy.generate("a", 0)
    for name, value in (("threads", 0), ("context", 0), ("cache_type_k", "q5"), ("cache_type_v", "int8")):
        with pytest.raises(UsageError, match=f"{name} must be"):
            open_engine(toy_file, **{name: value})
    with pytest.raises(UsageError, match="there is no file"):
        open_engine(tmp_path / "none.gguf")
    for suffix, reason in ((".pte", "there is no file"), (".onnx", "open_program runs them"), (".bin", "supported")):
        with pytest.raises(EdgewrightError, match=reason):
            open_engine(tmp_path / f"model{suffix}")


def test_an_interrupt_inside_the_log_is_not_lost(toy_file, monkeypatch, capfd):
    """An exception in a callback from C is printed and forgotten; Ctrl-C must arrive after the call."""
    log, lines = library().log, []

    def interrupted(level, text, _):
        if not lines:
            signal.raise_signal(signal.SIGINT)
        lines.append(text)

    callback = type(log.callback)(interrupted)
    library().c.llama_log_set(callback, None)
    try:
        with pytest.raises(KeyboardInterrupt):
            LlamaCppEngine(toy_file)
    finally:
        library().c.llama_log_set(log.callback, None)
    assert lines and "Exception ignored" not in capfd.readouterr().err
    with LlamaCppEngine(toy_file) as engine:  # nothing is left in the way
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and engine.vocabulary > 0


def test_closed_engine_says_so(toy_file):
    engine = open_engine(toy_file, threads=1, context=64)
    engine.close()
    engine.close()
    for call in (lambda: engine.logits([1]), lambda: engine.tokenize("a"), lambda: engine.generate("a")):
        with pytest.raises(UsageError, match="is closed"):
            call()


def test_no_template_says_so(tmp_path):
    path = write_toy(tmp_path / "plain.gguf", tokenizer__chat_template=None)
    with open_engine(path, threads=1, context=64) as engine, pytest.raises(UsageError, match="no chat template"):
        engine.chat_prompt([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "overrides",
    [
        {"llama__block_count": None},
        {"llama__block_count": 0},
        {"llama__block_count": 10**6},
        {"llama__block_count": 3},
        {"llama__embedding_length": 32},
        {"llama__attention__head_count": 0},
        {"llama__attention__head_count": 3},
        {"llama__attention__head_count_kv": 3},
        {"llama__attention__layer_norm_rms_epsilon": None},
        {"llama__context_length": 0},
        {"tokenizer__ggml__tokens": ["a", "b"]},
        {"tokenizer__ggml__tokens": None},
        {"tokenizer__ggml__tokens": [f"x{i // 2}" for i in range(259)]},
        {"tokenizer__ggml__token_type": [1]},
        {"tokenizer__ggml__eos_token_id": 259},
        {"tokenizer__ggml__model": "nonsense"},
        {"general__architecture": "nonsense"},
    ],
    ids=str,
)
def test_headers_that_cannot_be_are_refused(tmp_path, overrides):
    path = tmp_path / "bad.gguf"
    architecture = overrides.pop("general__architecture", None)
    write_toy(path, **overrides)
    if architecture:
        path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0llamb", 1))
    with pytest.raises(FormatError):
        open_engine(path, threads=1, context=64)


def test_truncated_and_foreign_files_are_refused(toy_file, tmp_path):
    data = toy_file.read_bytes()
    for name, content in (("cut", data[: len(data) // 2]), ("text", b"hello"), ("empty", b"")):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(FormatError):
            open_engine(path)


def test_a_foreign_file_runs_first_under_the_settings_of_its_caller(tmp_path, monkeypatch):
    """Heads of 16 numbers do not fit into the blocks of a quantised cache: the child finds it, not this process."""
    monkeypatch.setattr(toy_gguf, "HEADS", 4)
    path = toy_gguf.write_toy(tmp_path / "own.gguf").rename(tmp_path / "foreign.gguf")
    runs = []

    def watched(*args, **kwargs):
        runs.append(kwargs["options"])
        runs.append(first_run_in_child(*args, **kwargs))

    monkeypatch.setattr(llamacpp, "first_run_in_child", watched)
    with pytest.raises(EdgewrightError, match="cannot start .*q8_0 with block size 32 does not divide"):
        open_engine(path, threads=1, context=300, cache_type_k="q8_0")
    assert runs == [{"context": 300, "cache_type_k": "q8_0", "cache_type_v": "f16"}]  # nothing came back
    for _ in range(2):
        open_engine(path, threads=1, context=300).close()
    options = {"context": 300, "cache_type_k": "f16", "cache_type_v": "f16"}
    assert runs[1:] == [options, {"vocabulary": 259, "pieces": 3}, options, None]  # the second time it is known


def test_a_context_ends_where_learned_positions_do(tmp_path):
    """llama.cpp ends its process at the first position that has no row, whatever the context was."""
    with open_engine(write_toy_gpt2(tmp_path / "gpt2.gguf", 64), threads=1, context=2048) as engine:
        assert engine.context == 64
        written = engine.generate("a b c", 100, ignore_end=True)
        assert written.finish == "context" and written.prompt_tokens + len(written.ids) == 65
        with pytest.raises(UsageError, match="do not fit the context of 64"):
            engine.logits([1] * 65)


def test_other_library_layouts_are_refused(monkeypatch):
    known = llamacpp_library.library()
    monkeypatch.setattr(llamacpp_library, "CONTEXT_DEFAULTS", {llamacpp_library.TYPE_K: 7})
    with pytest.raises(EdgewrightError, match=f"xllamacpp {known.version} has another.*default 1 instead of 7 at byte"):
        known._check_layout()


def test_missing_package_names_the_line_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install xllamacpp"):
        llamacpp_library.library.__wrapped__()
