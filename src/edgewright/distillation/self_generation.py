"""Training data that a language model writes itself (LLM-QAT, arXiv 2305.17888, section 2.1).

One sequence per pair (start token i, j): the prompt is the token i alone, the sequence is continued greedily until it
has j tokens (a sensible opening), then by sampling from the full softmax at temperature 1 until the end token or
`max_length`. No beginning-of-text token, no top-k, no top-p, no penalties: the distribution is the model's own.

Every sequence has random numbers of its own, drawn from (seed, i, j, round), and its batch is fixed by its index, so
the data do not depend on where a run was interrupted. Token ids are stored: decoding and encoding is not the identity.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgewright.checks import check, one_of, whole
from edgewright.distillation.language import check_evaluating
from edgewright.distillation.manifest import claim_shards, fingerprint, read_manifest, shard_paths, track
from edgewright.distillation.sequences import distinct_n, pack_sequences
from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import atomic_file
from edgewright.io.hashing import blake2b
from edgewright.io.transformers_names import with_cache

__all__ = ["GeneratedData", "StartTokenError", "distinct_n", "pack_sequences", "self_generate"]

KIND = "self-generated data set"
START = "{start}"  # place of the start token in a prompt template
MODES = ("hybrid", "greedy", "sampled")


class StartTokenError(UsageError, IndexError):
    """A start token outside the vocabulary."""


@dataclass(frozen=True)
class SequenceJob:
    """One sequence: start token id, tokens the greedy opening has with the start token, round over all pairs."""

    start: int
    greedy: int
    round: int


@dataclass(frozen=True)
class GeneratedData:
    """Sequences that a model wrote.

    Args:
        tokens: int64 [N, T], right-padded with `end_token`.
        lengths: int64 [N], end token counted.
        starts: int64 [N], the start tokens.
        end_token: its id.
    """

    tokens: Tensor
    lengths: Tensor
    starts: Tensor
    end_token: int

    def blocks(self, block_length: int) -> Tensor:
        """Training blocks of all sequences joined; see `pack_sequences`.

        Args:
            block_length: tokens of a block.

        Returns:
            int64 [M, block_length]

        Raises:
            UsageError: too few tokens for one block.
        """
        return pack_sequences(self.tokens, self.lengths, block_length, self.end_token)

    @classmethod
    def from_folder(cls, folder: str | Path) -> GeneratedData:
        """Read an output folder of `self_generate`.

        Args:
            folder: finished.

        Raises:
            UsageError: it is another's or unfinished.
            FormatError: it is damaged.
        """
        folder = Path(folder)
        settings = read_manifest(folder, KIND)
        try:
            count = -(-settings["n_sequences"] // settings["batch_size"])
            vocabulary, end_token, start = (settings[name] for name in ("vocabulary", "end_token", "prefix_length"))
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise FormatError(f"the manifest of {folder} is damaged ({error!r})") from error
        rows: list[list[int]] = []
        for path in shard_paths(folder, count, "jsonl"):
            if not path.exists():
                raise UsageError(f"{folder} is unfinished ({path.name} is missing); call self_generate again to go on")
            rows += _read_shard(path, vocabulary)
        return _collect(rows, end_token, start)


@torch.no_grad()
def self_generate(
    teacher: nn.Module,
    tokenizer: Any,
    *,
    n_sequences: int,
    max_length: int,
    greedy_tokens: Sequence[int] = (3, 4, 5),
    batch_size: int = 64,
    seed: int = 0,
    start_tokens: Sequence[int] | None = None,
    prompt_template: str | None = None,
    output: str | Path | None = None,
    mode: Literal["hybrid", "greedy", "sampled"] = "hybrid",
    progress: bool = True,
) -> GeneratedData:
    """Let a language model write its own training data (LLM-QAT, arXiv 2305.17888, section 2.1).

    Args:
        teacher: in evaluation mode.
        tokenizer: its own, with an end token.
        n_sequences: at least 1. Fewer than pairs (start token i, j): one pair from each of n equal strata of the list;
            more: several rounds over it.
        max_length: tokens of a sequence, at least 2.
        greedy_tokens: the values of j, how many tokens a sequence has before sampling begins; the paper has 3, 4, 5.
        batch_size: sequences written together.
        seed: of pairs and samples.
        start_tokens: ids to start from; None: all but special and unused ones.
        prompt_template: text around the start token for models that know only their chat format, such as
            "<|im_start|>user\\n{start}"; its tokens count neither for j nor for max_length, and are part of the
            sequence.
        output: folder of JSONL shards (ids and text), continued if it exists; None: none.
        mode: "hybrid"; "greedy" and "sampled" are the paper's two ablations.
        progress: show a bar.

    Returns:
        The sequences.

    Raises:
        UsageError: a number out of its range, a teacher in training mode, other settings in `output`.
        StartTokenError: a start token outside the vocabulary; an IndexError too.
    """
    vocabulary = int(teacher.config.vocab_size)  # type: ignore[union-attr,arg-type]
    _check(teacher, n_sequences, max_length, greedy_tokens, batch_size, mode)
    end_token = tokenizer.eos_token_id
    if end_token is None:
        raise UsageError("the tokenizer has no end token (eos_token_id); sequences could not be told apart")
    starts = usable_tokens(tokenizer, vocabulary) if start_tokens is None else _checked_starts(start_tokens, vocabulary)
    openings = tuple(greedy_tokens) if mode == "hybrid" else (max_length if mode == "greedy" else 1,)
    if mode == "greedy" and n_sequences > len(starts):
        raise UsageError(f"n_sequences={n_sequences}, but greedy text from {len(starts)} start tokens repeats itself")
    jobs = plan(starts, openings, n_sequences, seed)
    prefix, suffix = _template_ids(tokenizer, prompt_template)
    around = len(prefix) + len(suffix)
    settings = {
        "n_sequences": n_sequences,
        "max_length": max_length,
        "greedy_tokens": list(greedy_tokens),
        "batch_size": batch_size,
        "seed": seed,
        "mode": mode,
        "prompt_template": prompt_template,
        "prefix_length": len(prefix),
        "vocabulary": vocabulary,
        "end_token": end_token,
        "starts": blake2b(json.dumps(starts), size=12),
        "teacher": fingerprint(teacher),
    }
    batches = [jobs[first : first + batch_size] for first in range(0, n_sequences, batch_size)]
    paths: list[Path | None] = [None] * len(batches)
    if output is not None:
        paths = list(shard_paths(claim_shards(output, KIND, settings), len(batches), "jsonl"))
    rows: list[list[int]] = []
    with track("generating", n_sequences * (max_length + around), progress) as advance:
        for batch, path in zip(batches, paths, strict=True):
            if path is not None and path.exists():
                batch_rows = _read_shard(path, vocabulary)
                advance(sum(map(len, batch_rows)), False)
            else:
                batch_rows = _generate(teacher, batch, max_length, end_token, seed, prefix, suffix, advance)
                if path is not None:
                    _write_shard(path, batch, batch_rows, tokenizer)
            rows += batch_rows
    return _collect(rows, end_token, len(prefix))


def usable_tokens(tokenizer: Any, vocabulary: int) -> list[int]:
    """Ids that stand for text: in the tokenizer's vocabulary, not special, and not empty when decoded."""
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", None) or {})
    known = {index for index in tokenizer.get_vocab().values() if index < vocabulary and index not in special}
    ids = sorted(known)
    texts = tokenizer.batch_decode([[index] for index in ids])
    return [index for index, text in zip(ids, texts, strict=True) if text]


def plan(starts: Sequence[int], openings: Sequence[int], n_sequences: int, seed: int) -> list[SequenceJob]:
    """The sequences of a run, in the order of their indices: shuffled, so that a part of them is a fair sample."""
    pairs = [(start, opening) for start in starts for opening in openings]
    rounds, rest = divmod(n_sequences, len(pairs))
    generator = torch.Generator().manual_seed(_seed(seed, "plan"))
    jobs = [SequenceJob(*pair, index) for index in range(rounds) for pair in pairs]
    # One pair from each of `rest` strata: ids are ordered by frequency, so common and rare tokens are both met.
    bounds = [index * len(pairs) // max(rest, 1) for index in range(rest + 1)]
    for low, high, share in zip(bounds, bounds[1:], torch.rand(rest, generator=generator).tolist(), strict=False):
        jobs.append(SequenceJob(*pairs[low + int(share * (high - low))], rounds))
    return [jobs[index] for index in torch.randperm(len(jobs), generator=generator).tolist()]


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [B] by inverse CDF of softmax(logits [B, V]) at uniform [B] in [0, 1)."""
    cumulative = torch.softmax(logits.float(), dim=-1).cumsum(-1)
    point = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    # right=True: the first entry above the point, which never is a token of probability zero.
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _generate(
    teacher: nn.Module,
    jobs: Sequence[SequenceJob],
    max_length: int,
    end_token: int,
    seed: int,
    prefix: list[int],
    suffix: list[int],
    advance: Any,
) -> list[list[int]]:
    """The sequences of one batch. All rows have one length at any time, so nothing is padded; finished rows leave."""
    from transformers import DynamicCache

    device = next(teacher.parameters()).device
    # float64 uniforms [B, max_length], column t for the token at place t; float32 would reach 1.0 times the total.
    uniforms = torch.stack([_uniforms(seed, job, max_length) for job in jobs]).to(device)
    openings = torch.tensor([job.greedy for job in jobs], device=device)
    rows = [[*prefix, job.start, *suffix] for job in jobs]
    advance(sum(map(len, rows)), True)
    alive = list(range(len(jobs)))
    inputs = torch.tensor(rows, device=device)
    cache = DynamicCache(config=teacher.config)  # type: ignore[arg-type]
    for place in range(1, max_length):
        logits = teacher(input_ids=inputs, use_cache=True, logits_to_keep=1, **with_cache(cache)).logits[:, -1]
        active = torch.tensor(alive, device=device)
        chosen = sample(logits, uniforms[active, place])
        chosen = torch.where(openings[active] > place, logits.argmax(-1), chosen)
        tokens = chosen.tolist()
        for row, token in zip(alive, tokens, strict=True):
            rows[row].append(token)
        advance(len(tokens), True)
        keep = [index for index, token in enumerate(tokens) if token != end_token]
        if not keep:
            break
        inputs = chosen.unsqueeze(-1)
        if len(keep) < len(tokens):
            kept = torch.tensor(keep, device=device)
            inputs = inputs[kept]
            cache.batch_select_indices(kept)
            alive = [alive[index] for index in keep]
    return rows


def _uniforms(seed: int, job: SequenceJob, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(_seed(seed, job.start, job.greedy, job.round))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _seed(*parts: object) -> int:
    """A 63-bit seed that mixes its parts well, the same on every machine."""
    digest = blake2b("/".join(str(part) for part in parts), size=8)
    return int.from_bytes(bytes.fromhex(digest), "little") >> 1


def _collect(rows: list[list[int]], end_token: int, start_place: int) -> GeneratedData:
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), end_token)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    return GeneratedData(tokens, lengths, tokens[:, start_place].clone(), end_token)


def _write_shard(path: Path, jobs: Sequence[SequenceJob], rows: list[list[int]], tokenizer: Any) -> None:
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for job, row, text in zip(jobs, rows, texts, strict=True):
            line = {"start": job.start, "greedy": job.greedy, "round": job.round, "tokens": row, "text": text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _read_shard(path: Path, vocabulary: int) -> list[list[int]]:
    try:
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line)["tokens"] for line in file]
        valid = bool(rows) and all(row and all(type(t) is int and 0 <= t < vocabulary for t in row) for row in rows)
    except (ValueError, KeyError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise FormatError(f"{path} is damaged; delete it and call self_generate again to make it anew")
    return rows


def _template_ids(tokenizer: Any, template: str | None) -> tuple[list[int], list[int]]:
    """Token ids before and after the start token."""
    if template is None:
        return [], []
    if template.count(START) != 1:
        raise UsageError(f"prompt_template={template!r} must hold {START} once, such as '<|im_start|>user\\n{START}'")
    before, after = template.split(START)
    prefix, suffix = (list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after))
    return prefix, suffix


def _checked_starts(starts: Sequence[int], vocabulary: int) -> list[int]:
    for start in starts:
        if not 0 <= start < vocabulary:
            raise StartTokenError(f"start token {start} is outside the vocabulary, ids 0 to {vocabulary - 1}")
    if not starts:
        raise UsageError("start_tokens is empty; give at least one id, or None for all that are in use")
    return list(dict.fromkeys(starts))


def _check(
    teacher: nn.Module, n_sequences: int, max_length: int, greedy_tokens: Sequence[int], batch_size: int, mode: str
) -> None:
    check_evaluating(teacher)
    check("n_sequences", n_sequences, whole(1))
    check("batch_size", batch_size, whole(1))
    check("max_length", max_length, whole(2), "the start token and one more")
    check("mode", mode, one_of(*MODES))
    if not greedy_tokens or min(greedy_tokens) < 1 or len(set(greedy_tokens)) != len(greedy_tokens):
        raise UsageError(f"greedy_tokens={tuple(greedy_tokens)}; give different counts from 1, such as (3, 4, 5)")
