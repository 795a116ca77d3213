"""Train a language model from scratch: tokenizer, token shards, training, and a checkpoint that every tool loads.

CONFIG is a published shape (125M, r1-140M, flash-350M ...), a number of weights such as 1.5e6, or a JSON file as
`edgewright design --params 1.5e6 --output FOLDER` writes. The same command again goes on where it was stopped.
Several processes: torchrun.

  edgewright pretrain 1.5e6 --text books/ notes.jsonl --steps 2000 --output runs/mine
  edgewright pretrain shapes/12.json --text corpus.txt --tokens 50e6 --precision bf16
  edgewright pretrain 125M --shards runs/mine/shards --context 1024 --steps 100000 --checkpointing
  torchrun --nproc-per-node 2 -m edgewright pretrain 1.5e6 --steps 500 --parallel fsdp
  edgewright export runs/mine --to gguf --output runs/mine-gguf
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.errors import UsageError
from edgewright.io.foreign import reading
from edgewright.io.json_file import read_object
from edgewright.io.run_folder import working_in

if TYPE_CHECKING:
    from edgewright.models.decoder.config import EdgeDecoderConfig

STEPS, VOCABULARY = 1000, 4096
DEPTHS = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 30)
SLENDER = 576 / 30  # hidden width over blocks of MobileLLM-125M


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="CONFIG", help="name of a shape, JSON file, or number of weights such as 1.5e6")
    add("--text", nargs="+", metavar="FILE", help="text, .jsonl or folders (default: the text that Python carries)")
    add(
        "--builtin", default="both", choices=("english", "python", "both"), help="without --text: which of Python's own"
    )
    add("--shards", metavar="DIR", help="token shards of an earlier run, instead of text")
    add("--tokenizer", metavar="MODEL", help="folder with a tokenizer, or any model (default: train one)")
    add(
        "--vocab", type=int, metavar="N", help=f"tokens (default: the shape's, or {VOCABULARY} for a number of weights)"
    )
    add(
        "--depth", type=int, metavar="N", help="blocks, for a number of weights (default: as slender as MobileLLM-125M)"
    )
    add("--share", action="store_true", help="run each stored block twice (MobileLLM-LS)")
    add("--steps", type=int, metavar="N", help=f"updates (default {STEPS})")
    add("--tokens", type=float, metavar="N", help="tokens to read, instead of --steps")
    add("--context", type=int, default=256, metavar="N", help="tokens that the model sees (default 256)")
    add("--batch", type=int, default=16, metavar="N", help="rows of an update, over all processes (default 16)")
    add("--micro-batch", type=int, metavar="N", help="rows at a time in one process (default: its share of --batch)")
    add("--lr", type=float, default=2e-3, help="peak learning rate (default 2e-3)")
    add(
        "--schedule",
        default="cosine-10",
        help="cosine-10 (default), cosine, linear, linear-10, constant-decay, constant",
    )
    add("--warmup", type=float, default=0.05, help="steps, or below 1 the share of the steps (default 0.05)")
    add("--weight-decay", type=float, default=0.1, help="of matrices (default 0.1)")
    add("--precision", default="no", help="no (default) or bf16")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory")
    add("--parallel", default="ddp", help="under torchrun: ddp (default) copies the model, fsdp splits its weights")
    add("--evaluate-every", type=int, default=0, metavar="N", help="steps (default: ten times)")
    add("--checkpoint-every", type=int, default=50, metavar="N", help="steps that a kill costs at most (default 50)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="what the samples go on from; may be repeated")
    add("--device", default="auto", help="cpu, cuda, ... (default auto)")
    add("--seed", type=int, default=0)
    add("--output", metavar="DIR", help="folder of the run (default runs/pretrain-CONFIG)")
    add("--fresh", action="store_true", help="start again instead of going on")
    add("--json", action="store_true", help="print the report as JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    if args.text and args.shards:
        raise UsageError("--text and --shards: give one of the two")
    from edgewright.models.decoder.pretrain import PretrainSettings, pretrain

    def say(sentence: str) -> None:
        if not args.json:
            print(sentence, file=sys.stderr, flush=True)

    settings = PretrainSettings(
        context=args.context,
        batch_size=args.batch,
        micro_batch=args.micro_batch,
        steps=STEPS if args.steps is None and args.tokens is None else args.steps,
        tokens=args.tokens,
        learning_rate=args.lr,
        schedule=args.schedule,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        precision=args.precision,
        gradient_checkpointing=args.checkpointing,
        parallel=args.parallel,
        device=args.device,
        evaluate_every=args.evaluate_every,
        checkpoint_every=args.checkpoint_every,
        seed=args.seed,
    )
    tokenizer = None if args.tokenizer is None else _tokenizer(args.tokenizer)
    if args.shards and tokenizer is None and (Path(args.shards).parent / "tokenizer").is_dir():
        tokenizer = _tokenizer(str(Path(args.shards).parent / "tokenizer"))
    if tokenizer is not None and args.vocab is not None and args.vocab < len(tokenizer):
        raise UsageError(f"--vocab {args.vocab} is less than the {len(tokenizer)} tokens of {args.tokenizer}")
    vocabulary = args.vocab if args.vocab is not None or tokenizer is None else len(tokenizer)
    config = read_config(args.config, vocabulary, args.context, args.depth, args.share)
    output = Path(args.output or f"runs/pretrain-{Path(args.config).stem if '.json' in args.config else args.config}")
    first = os.environ.get("RANK", "0") == "0"  # torchrun's number of this process
    with working_in(output) if first else nullcontext():
        result = pretrain(
            config,
            args.shards or _documents(args),
            settings,
            output,
            tokenizer=tokenizer,
            prompts=args.prompt,
            resume="never" if args.fresh else "auto",
            progress=not args.json,
            say=say,
        )
    if result.model is None:  # not the first process
        return 0
    if args.json:
        print(json.dumps(result.report.to_dict(), indent=2))
        return 0
    result.report.print_table()
    print(f"the model, loss.png and samples.jsonl are in {output}; next: edgewright export {output} --to gguf")
    return 0


def read_config(
    text: str, vocab_size: int | None, context: int, depth: int | None = None, share: bool = False
) -> EdgeDecoderConfig:
    """The shape that CONFIG names. vocab_size None: the shape's own, or VOCABULARY.

    Raises UsageError for an unknown name or a vocabulary other than a file's, FormatError for a file that is none.
    """
    weights = _number(text)
    if weights is not None:
        return _by_weights(weights, vocab_size or VOCABULARY, context, depth, share)
    if depth is not None:
        raise UsageError(f"--depth {depth} goes with a number of weights, such as 1.5e6; {text} has its own")
    if text.endswith(".json") or Path(text).is_file():
        if share:
            raise UsageError("--share goes with a number of weights or a name; a file says itself what it shares")
        return _from_file(Path(text), vocab_size)
    from edgewright.models.decoder.kinds import preset

    changes: dict[str, Any] = {} if vocab_size is None else {"vocab_size": vocab_size}
    return preset(text, share, **changes)


def _by_weights(weights: float, vocab_size: int, context: int, depth: int | None, share: bool) -> EdgeDecoderConfig:
    from edgewright.models.decoder.design import design_sweep

    longest = max(2048, context)
    depths = DEPTHS if depth is None else [depth]
    fixed: dict[str, Any] = {"layer_sharing": share, "max_position_embeddings": longest}
    found: list[EdgeDecoderConfig] = []
    for head_dim in (64, 32, None):  # the first two give widths that 8-bit tables of GGUF can hold: multiples of 32
        try:
            found += design_sweep(weights, depths, vocab_size, head_dim=head_dim, **fixed)
        except UsageError:
            if head_dim is None and not found:
                raise

    def order(shape: EdgeDecoderConfig) -> tuple[bool, float]:
        return shape.hidden_size % 32 > 0, abs(math.log(shape.hidden_size / shape.num_stored_layers / SLENDER))

    return min(found, key=order)


def _from_file(path: Path, vocab_size: int | None) -> EdgeDecoderConfig:
    from edgewright.models.decoder.config import EdgeDecoderConfig

    fields = read_object(path)
    if (kind := fields.get("model_type", EdgeDecoderConfig.model_type)) != EdgeDecoderConfig.model_type:
        raise UsageError(
            f"{path} is a configuration of {kind!r}; ones that fit are written by edgewright design --params 125e6 "
            "--output FOLDER"
        )
    with reading(path):
        config = EdgeDecoderConfig(**fields)
    if vocab_size is not None and vocab_size != config.vocab_size:
        raise UsageError(
            f"{path} has vocab_size={config.vocab_size}, the tokenizer or --vocab {vocab_size}; make them equal"
        )
    return config


def _documents(args: argparse.Namespace) -> Any:
    from edgewright.io.text import TextFiles, builtin_documents

    return TextFiles(args.text) if args.text else builtin_documents(args.builtin)


def _tokenizer(name: str) -> Any:
    from edgewright.models.decoder.pretrain_data import load_tokenizer

    if Path(name).is_dir():
        return load_tokenizer(name)
    from edgewright.io.models import load

    return load(name)[1]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    if not 1 <= value < math.inf:
        raise UsageError(f"CONFIG {text!r}: a number of weights is at least 1, such as 1.5e6")
    return value
