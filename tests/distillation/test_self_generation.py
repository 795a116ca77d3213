"""Self-generated data: the published procedure step by step, the same data however a run is cut, strict folders."""

from __future__ import annotations

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from edgewright.distillation.self_generation import GeneratedData, StartTokenError, plan, sample, self_generate
from edgewright.errors import FormatError, UsageError

END = 2


class ToyTokenizer:
    """256 tokens: 0 to 2 are special, 9 decodes to nothing, all others to a letter and their number."""

    eos_token_id = END
    all_special_ids = [0, 1, 2]
    added_tokens_decoder: dict[int, str] = {}

    def get_vocab(self):
        return {f"t{index}": index for index in range(256)}

    def batch_decode(self, rows, skip_special_tokens=False):
        drop = self.all_special_ids if skip_special_tokens else []
        return ["".join(f"t{token} " for token in row if token != 9 and token not in drop) for row in rows]

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [100 + ord(letter) % 100 for letter in text]}


def generate(model, **changes) -> GeneratedData:
    settings = {"n_sequences": 10, "max_length": 12, "batch_size": 4, "seed": 3, "progress": False}
    return self_generate(model, ToyTokenizer(), **{**settings, **changes})


def sharp(model):
    """Peaked distributions, so that greedy and sampled tokens differ visibly from uniform ones."""
    model.model.norm.weight.data *= 6
    return model


@torch.no_grad()
def test_openings_are_greedy_and_the_rest_is_sampled(tiny_llama):
    model = sharp(tiny_llama)
    for opening in (1, 3, 5):
        data = generate(model, greedy_tokens=(opening,))
        greedy = model(data.tokens).logits.argmax(-1)
        for row, length, best in zip(data.tokens, data.lengths, greedy, strict=True):
            assert torch.equal(row[1 : min(opening, length)], best[: min(opening, length) - 1])
        assert not torch.equal(data.tokens[:, opening:], greedy[:, opening - 1 : -1])
    data = generate(model, mode="greedy")
    greedy = model(data.tokens).logits.argmax(-1)
    for row, length, best in zip(data.tokens, data.lengths.tolist(), greedy, strict=True):
        assert torch.equal(row[1:length], best[: length - 1])


@torch.no_grad()
def test_sampling_follows_the_full_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, float("-inf"), 1.0])
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    counts = torch.bincount(sample(logits.expand(20000, 5), uniform), minlength=5)
    # Equally spaced points: each token's count is exact up to the two ends of its interval.
    assert (counts - torch.softmax(logits, -1) * 20000).abs().max() <= 2
    ends = sample(logits.expand(2, 5), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert ends.tolist() == [0, 4]


def test_sequences_stop_at_the_end_token(tiny_llama):
    model = tiny_llama
    with torch.no_grad():
        model.model.embed_tokens.weight[END] *= 8  # often the likeliest, often the least likely token
    data = generate(model, n_sequences=40, max_length=30)
    assert len(set(data.lengths.tolist())) > 3 and data.lengths.max() == 30
    for row, length in zip(data.tokens.tolist(), data.lengths.tolist(), strict=True):
        assert END not in row[: length - 1] and set(row[length:]) <= {END}
        assert length == 30 or row[length - 1] == END


def test_same_seed_same_data_and_other_seed_other_data(tiny_llama):
    first, second = generate(tiny_llama), generate(tiny_llama)
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.lengths, second.lengths)
    assert not torch.equal(first.tokens, generate(tiny_llama, seed=4).tokens)


@pytest.mark.parametrize("interrupted_at", [1, 12, 25])
def test_interrupted_runs_end_with_the_same_files(tiny_llama, tmp_path, interrupted_at):
    whole = generate(tiny_llama, output=tmp_path / "whole")
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == interrupted_at:
            raise KeyboardInterrupt

    broken = copy.deepcopy(tiny_llama)
    broken.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(broken, output=tmp_path / "parts")
    if interrupted_at < 12 * 2:
        with pytest.raises(UsageError, match="unfinished"):
            GeneratedData.from_folder(tmp_path / "parts")
    resumed = generate(tiny_llama, output=tmp_path / "parts")
    assert torch.equal(resumed.tokens, whole.tokens)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "parts").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    loaded = GeneratedData.from_folder(tmp_path / "whole")
    assert torch.equal(loaded.tokens, whole.tokens) and torch.equal(loaded.starts, whole.starts)


def test_shards_hold_ids_text_and_origin(tiny_llama, tmp_path):
    data = generate(tiny_llama, output=tmp_path)
    lines = [json.loads(line) for path in sorted(tmp_path.glob("*.jsonl")) for line in path.open()]
    assert len(lines) == 10
    for line, row, length in zip(lines, data.tokens.tolist(), data.lengths.tolist(), strict=True):
        assert line["tokens"] == row[:length] and line["start"] == row[0] and line["greedy"] in (3, 4, 5)
        assert line["text"].startswith(f"t{row[0]} ")


def test_start_tokens_are_spread_and_usable():
    starts = list(range(3, 259))
    jobs = plan(starts, (3, 4, 5), 100, seed=0)
    assert len({(job.start, job.greedy) for job in jobs}) == 100
    ordered = sorted(job.start for job in jobs)
    assert max(b - a for a, b in itertools.pairwise(ordered)) <= 6  # strata of 2.56 ids
    assert {job.greedy for job in jobs} == {3, 4, 5}
    assert ordered != [job.start for job in jobs]
    every = plan(starts, (3, 4, 5), 2 * 768 + 5, seed=0)
    assert len({(job.start, job.greedy, job.round) for job in every}) == 2 * 768 + 5


def test_special_and_empty_tokens_start_nothing(tiny_llama):
    data = generate(tiny_llama, n_sequences=252, max_length=2, batch_size=64, greedy_tokens=(2,))
    assert sorted(data.starts.tolist()) == [index for index in range(3, 256) if index != 9]


def test_template_surrounds_the_start_token(tiny_llama):
    data = generate(tiny_llama, prompt_template="ab{start}c", start_tokens=[7, 8], n_sequences=4, max_length=5)
    assert data.tokens[:, :2].unique(dim=0).tolist() == [[197, 198]]
    assert set(data.tokens[:, 2].tolist()) == {7, 8} == set(data.starts.tolist())
    assert set(data.tokens[:, 3].tolist()) == {199} and data.lengths.max() == 5 + 3
    with pytest.raises(UsageError, match="once"):
        generate(tiny_llama, prompt_template="no place")


def test_blocks_join_all_sequences(tiny_llama):
    data = generate(tiny_llama)
    blocks = data.blocks(16)
    assert blocks.shape[1] == 16 and blocks[0, :12].tolist() == data.tokens[0].tolist()


def test_bad_input_is_named(tiny_llama, tmp_path):
    for changes, message in (
        ({"n_sequences": 0}, "n_sequences=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 1}, "max_length=1"),
        ({"mode": "beam"}, "hybrid, greedy, sampled"),
        ({"greedy_tokens": ()}, "greedy_tokens"),
        ({"greedy_tokens": (0, 3)}, "greedy_tokens"),
        ({"start_tokens": []}, "empty"),
        ({"mode": "greedy", "start_tokens": [5, 6], "n_sequences": 3}, "repeats itself"),
    ):
        with pytest.raises(UsageError, match=message):
            generate(tiny_llama, **changes)
    for bad in (-1, 256):
        with pytest.raises(IndexError, match=f"start token {bad} "):
            generate(tiny_llama, start_tokens=[5, bad])
        with pytest.raises(StartTokenError):
            generate(tiny_llama, start_tokens=[bad])
    with pytest.raises(UsageError, match=r"teacher.eval\(\)"):
        generate(copy.deepcopy(tiny_llama).train())
    with pytest.raises(UsageError, match="no end token"):
        self_generate(tiny_llama, SimpleNamespace(eos_token_id=None), n_sequences=1, max_length=4)


def test_folders_of_another_run_are_refused(tiny_llama, tmp_path):
    generate(tiny_llama, output=tmp_path)
    for changes in ({"seed": 9}, {"max_length": 13}, {"mode": "sampled"}, {"start_tokens": [5]}, {"n_sequences": 11}):
        with pytest.raises(UsageError, match="was made with"):
            generate(tiny_llama, output=tmp_path, **changes)
    (tmp_path / "shard-00001.jsonl").write_text('{"tokens": [5, 99999]}\n')
    with pytest.raises(FormatError, match="shard-00001.jsonl"):
        generate(tiny_llama, output=tmp_path)
    with pytest.raises(FormatError, match="shard-00001.jsonl"):
        GeneratedData.from_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        generate(tiny_llama, output=tmp_path / "file")


def test_real_model_hybrid_text_is_more_varied_than_greedy(smollm2):
    from edgewright.distillation.sequences import distinct_n

    model, tokenizer = smollm2
    found = {}
    for mode in ("hybrid", "greedy"):
        data = self_generate(
            model, tokenizer, n_sequences=8, max_length=24, batch_size=8, seed=1, mode=mode, progress=False
        )
        found[mode] = distinct_n(data.tokens, 2, data.lengths)
        assert not set(data.starts.tolist()) & set(tokenizer.all_special_ids)
    assert found["hybrid"] > found["greedy"]
