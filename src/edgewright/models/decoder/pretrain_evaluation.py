"""How a model is doing while it is trained: loss on held-out rows with its standard error, and what it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.errors import FormatError
from edgewright.io.atomic import write_text
from edgewright.io.shards import TokenShards
from edgewright.io.typed import from_json
from edgewright.models.decoder.next_token import NextToken
from edgewright.training.token_stream import TokenStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = "samples.jsonl"
PROMPT_TOKENS = 8


@dataclass(frozen=True)
class Sample:
    """A line of samples.jsonl: what the model wrote after a prompt at a step."""

    step: int
    prompt: str
    text: str


class Validation:
    """The `evaluate` of a run of `fit`: {"loss", "loss_se", "bits_per_byte"}, and samples appended to samples.jsonl.

    rows: at most so many rows of the validation split, evenly spaced; the standard error is that of their mean. The
    processes share the rows. prompts: texts to go on from; by default the beginnings of held-out rows. `stream` tells
    the step. kept: samples of an earlier call up to this step stay in the file.
    """

    def __init__(
        self,
        shards: TokenShards,
        tokenizer: PreTrainedTokenizerBase,
        stream: TokenStream,
        rows_an_update: int,
        rows: int,
        accelerator: Any,
        output: Path,
        prompts: Sequence[str] = (),
        samples: int = 2,
        sample_tokens: int = 48,
        temperature: float = 0.8,
        kept: int = 0,
    ) -> None:
        held_out = TokenStream(shards, "validation", stream.length, 1)
        count = min(rows, held_out.rows)
        self.rows = held_out.read((torch.arange(count) * held_out.rows // count).numpy())
        self.bytes_per_token = shards.total("validation", "bytes") / shards.total("validation")
        self.tokenizer, self.stream, self.rows_an_update = tokenizer, stream, rows_an_update
        self.accelerator, self.path = accelerator, output / SAMPLES
        self.end, self.tokens, self.temperature = shards.end_token, sample_tokens, temperature
        chosen = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        self.prompts = [ids for ids in chosen if ids] or self.rows[:samples, :PROMPT_TOKENS].tolist()
        self.written = [sample for sample in _read(self.path) if sample["step"] <= kept]

    def __call__(self, model: nn.Module) -> dict[str, float]:
        objective: Any = getattr(model, "module", model)  # inside DDP's wrapper: nothing is to be reduced here
        losses = self._losses(objective)
        mean = float(losses.mean())
        error = float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else math.nan
        self._write(objective)
        return {"loss": mean, "loss_se": error, "bits_per_byte": mean / math.log(2) / self.bytes_per_token}

    def _losses(self, objective: NextToken) -> Tensor:
        """float64 [rows]; each process computes every P-th, all of them equally many (a split model needs that)."""
        count, index, processes = len(self.rows), self.accelerator.process_index, self.accelerator.num_processes
        device = next(objective.parameters()).device
        mine = [(index + turn * processes) % count for turn in range(math.ceil(count / processes))]
        losses = torch.zeros(count, dtype=torch.float64)
        for start in range(0, len(mine), self.stream.batch_size):
            part = mine[start : start + self.stream.batch_size]
            losses[part] = objective(self.rows[part].to(device), what="rows").double().cpu()
        if processes > 1:  # a row that two processes computed counts once
            shared = self.accelerator.gather(losses.to(device)[None]).cpu()
            losses = torch.stack([shared[row % processes, row] for row in range(count)])
        return losses

    def _write(self, objective: NextToken) -> None:
        step = self.stream.position // self.rows_an_update
        self.written = [sample for sample in self.written if sample["step"] < step]
        for number, prompt in enumerate(self.prompts):
            generator = torch.Generator().manual_seed(10**6 * number + step)
            ids = sample(objective, prompt, self.tokens, self.end, self.temperature, generator)
            texts = [self.tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (prompt, ids)]
            self.written.append({"step": step, "prompt": texts[0], "text": texts[1]})
        if self.accelerator.is_main_process and self.prompts:
            lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.written]
            write_text(self.path, "".join(lines))


@torch.no_grad()
def sample(
    objective: NextToken, prompt: Sequence[int], count: int, end: int, temperature: float, generator: torch.Generator
) -> list[int]:
    """At most `count` tokens behind a prompt, until the end token; temperature 0 takes the likeliest."""
    from transformers.cache_utils import DynamicCache

    decoder: Any = objective.decoder
    cache, device = DynamicCache(config=decoder.config), next(objective.parameters()).device
    count = min(count, decoder.config.max_position_embeddings - len(prompt))
    tokens, written = torch.tensor([list(prompt)]), list[int]()
    while len(written) < count:
        logits = objective(tokens.to(device), what="next", cache=cache)[0].cpu()
        if temperature > 0:
            chosen = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        else:
            chosen = int(logits.argmax())
        if chosen == end:
            break
        written.append(chosen)
        tokens = torch.tensor([[chosen]])
    return written


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [asdict(from_json(Sample, json.loads(line), path)) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} does not hold samples, one JSON object a line: {error}; remove it") from error
