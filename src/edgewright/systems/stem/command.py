"""STEM: feed-forwards whose up-projection is a table with a row for each token.

`convert` replaces the up-projection of some layers of a dense model by what it gave on average for each token of a
text, and says what that costs before any training. `edit` lets one name speak with the rows of another: in the prompts
alone (contextual), and in the tables (persistent), written as a small file that `load_edit` applies and undoes.

  edgewright stem convert smollm2-135m --layers 1/3 --calib text.txt --output runs/stem
  edgewright stem edit runs/stem --source Spain --target Germany --test prompts.txt --output edit.safetensors
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import edgewright
from edgewright.checks import check, whole
from edgewright.errors import UsageError
from edgewright.io.atomic import atomic_directory
from edgewright.io.run_folder import require_empty
from edgewright.measure.report import Report

# An argument of the Python interface as this command calls it (see `commands.option_names`).
WORDS = ((r"\bblock_length=", "length="),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", required=True, metavar="convert|edit")
    convert = parts.add_parser("convert", help="a STEM model out of a dense one")
    convert.add_argument("model", metavar="MODEL", help="a model folder, a .gguf file or a bundled name")
    convert.add_argument(
        "--layers", default="1/3", help="a part such as 1/3, 'all', or numbers such as 4,9 (default 1/3)"
    )
    convert.add_argument("--calib", metavar="FILE", help="text or .jsonl file (default: Python's own documentation)")
    convert.add_argument("--init", default="weighted", help="weighted, calibrated, mean or zero (default weighted)")
    convert.add_argument("--dtype", help="of the tables: fp32, fp16 or bf16 (default: the model's)")
    convert.add_argument("--samples", type=int, default=64, help="calibration sequences (default 64)")
    convert.add_argument("--length", type=int, default=128, help="tokens a sequence (default 128)")
    convert.add_argument("--blocks", type=int, default=8, help="evaluation sequences (default 8)")
    convert.add_argument("--seed", type=int, default=0)
    convert.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the STEM model")
    edit = parts.add_parser("edit", help="rows of one name for another")
    edit.add_argument("model", metavar="FOLDER", help="a STEM model, as convert leaves it")
    edit.add_argument("--source", required=True, metavar="A", help="the name in the text")
    edit.add_argument("--target", required=True, metavar="B", help="the name whose rows are read")
    edit.add_argument("--mode", default="auto", help="auto, pad, copy, subset or average (default auto)")
    edit.add_argument("--test", metavar="FILE", help="prompts, one a line, continued before and after")
    edit.add_argument("--tokens", type=int, default=12, help="tokens of a continuation (default 12)")
    edit.add_argument("--output", required=True, metavar="FILE", help="new .safetensors file for the persistent edit")
    for part in (convert, edit):
        part.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    return _convert(args) if args.part == "convert" else _edit(args)


def _convert(args: argparse.Namespace) -> int:
    output = Path(args.output)
    require_empty(output)
    layers = _layers(args.layers)

    from edgewright.evaluation.language import add_rows, check_positions, evaluate_language, model_logits
    from edgewright.io.text import split_blocks
    from edgewright.systems.stem.convert import capacity_report, stemify
    from edgewright.systems.stem.files import save_stem

    model, tokenizer = edgewright.load(args.model)
    check_positions(model, args.length, args.model)
    calibration, held_out = split_blocks(
        args.calib, tokenizer, args.length, calibration=args.samples, evaluation=args.blocks, seed=args.seed
    )
    print(f"averaging over {calibration.numel()} tokens", file=sys.stderr)
    converted = stemify(model, layers, calibration.split(4), args.init, dtype=args.dtype).eval()
    print("evaluating before and after", file=sys.stderr)
    functions = {"dense": model_logits(model), "stem": model_logits(converted)}
    results = evaluate_language(functions, held_out, reference=functions["dense"], progress=not args.json)
    report = Report(f"{args.model} with STEM layers", vars(args))
    add_rows(report, results)
    capacity = capacity_report(converted, held_out)
    for name in ("stem_layers", "stored", "unique_tokens", "table_bytes", "fetched_bytes", "saved_flops"):
        report.add(name, getattr(capacity, name), subject="stem")
    kinds = converted.config.ffn_types
    chosen = [i for i, kind in enumerate(kinds) if kind == "stem"]
    report.notes.append(
        f"STEM layers: {', '.join(map(str, chosen))} (counted from 0); no training after the conversion"
    )
    report.notes.append("fetched_bytes and saved_flops are for each token")
    with atomic_directory(output) as folder:
        save_stem(converted, folder, tokenizer)
        report.save(folder)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    report.print_table()
    print(f"the model and report.md are in {output}")
    return 0


def _layers(text: str) -> Any:
    if "," not in text and not text.isdigit():
        return text
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"--layers {text!r}: a part such as 1/3, 'all', or numbers such as 4,9") from None


def _edit(args: argparse.Namespace) -> int:
    output = Path(args.output)
    if output.exists() or output.suffix != ".safetensors":
        raise UsageError(f"--output {output} exists already, or is no .safetensors file; choose a new one")
    check("--tokens", args.tokens, whole(1))

    import torch

    from edgewright.io.text import load_texts
    from edgewright.systems.stem.edit import edit_rows, override_tokens

    texts = load_texts(args.test) if args.test else []
    prompts = [line.strip() for text in texts for line in text.splitlines() if line.strip()]

    model: Any
    tokenizer: Any
    model, tokenizer = edgewright.load(args.model)

    def continued(ids: Any) -> str:
        made = model.generate(
            ids, max_new_tokens=args.tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id or 0
        )
        return tokenizer.decode(made[0, ids.shape[1] :])

    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        row: dict[str, Any] = {"prompt": prompt, "before": continued(ids), "contextual": None}
        if args.source in prompt:
            with override_tokens(
                model, ids, source=args.source, target=args.target, tokenizer=tokenizer, mode=args.mode
            ):
                row["contextual"] = continued(ids)
        rows.append(row)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        edit = edit_rows(model, args.source, args.target, tokenizer, mode=args.mode)
    notes = [str(warning.message) for warning in caught]
    for row in rows:
        row["persistent"] = continued(torch.tensor([tokenizer(row["prompt"])["input_ids"]]))
    edit.save(output)
    changed = sum(row["persistent"] != row["before"] for row in rows)
    if args.json:
        print(json.dumps({"prompts": rows, "changed": changed, "notes": notes, "edit": str(output)}, indent=2))
        return 0
    for row in rows:
        print(row["prompt"])
        for form in ("before", "contextual", "persistent"):
            if row[form] is not None:
                print(f"  {form:<10} {row[form]!r}")
    for note in notes:
        print(f"note: {note}")
    print(f"{changed} of {len(rows)} continuations changed under the persistent edit, which is in {output}")
    return 0
