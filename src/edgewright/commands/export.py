"""Write a model as files for real runtimes, each read back, run and compared with the model before it is kept.

MODEL is anything that `edgewright.load` reads; a folder of a quantised model keeps its codes. Targets: gguf (for
llama.cpp), pte (for ExecuTorch), onnx (for ONNX Runtime), hf (a folder with the packed codes), hf-float (an ordinary
checkpoint with the quantised values). An image classifier (efficientnet-lite0, or the folder that `edgewright compress`
made of it) becomes pte or onnx.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from edgewright.compression.settings import VISION_MODELS
from edgewright.errors import UsageError

TARGETS = ("gguf", "pte", "onnx", "hf", "hf-float")
# Calls and arguments of the Python interface as this command says them (see `commands.option_names`).
WORDS = (
    (r"give tensors to trace it with, e\.g\. export_executorch\(.*\)$", "--to onnx writes other classes"),
    (r"give them, e\.g\. export_onnx\(.*\)$", "--to hf writes it as a folder"),
    (
        r"\bembedding must be one of (.*auto.*), got '?(\w+)'?; e\.g\. embedding='auto'",
        r"--table must be one of \1, got \2",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model folder, a .gguf file or a bundled name")
    parser.add_argument(
        "--to", default="gguf", metavar="TARGETS", help=f"comma-separated: {', '.join(TARGETS)} (default: gguf)"
    )
    parser.add_argument("--output", default="export", metavar="DIR", help="folder for the files (default: export)")
    parser.add_argument("--name", help="name of the files (default: from MODEL)")
    parser.add_argument(
        "--layout", default="auto", help="auto, portable, small or fast: which GGUF types hold the codes"
    )
    parser.add_argument("--embedding", default="Q8_0", help="type of an unquantised embedding: Q8_0, F16 or F32")
    parser.add_argument("--float-type", default="F16", help="type of other unquantised matrices: F16 or F32")
    parser.add_argument("--kv", type=int, help="4 or 8: run the file with a quantised key-value cache")
    parser.add_argument("--context", type=int, help="pte: tokens that its cache holds (default: 1024)")
    parser.add_argument(
        "--table", default="auto", help="pte: embedding and head: auto, exact, int8 or float (default: auto)"
    )
    parser.add_argument(
        "--min-delegated", type=float, default=0.5, help="pte: least share that XNNPACK must take (default: 0.5)"
    )
    parser.add_argument(
        "--lenient", action="store_true", help="mark tensors that cannot have their type instead of failing"
    )
    parser.add_argument("--no-verify", action="store_true", help="skip reading back and running (not recommended)")
    parser.add_argument("--all", action="store_true", help="print every tensor of the layout table")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    targets = parse_targets(args.to)
    name = args.name or default_name(args.model)
    if Path(name).name != name or name in ("", ".", ".."):
        raise UsageError(f"--name {name!r} must be a plain file name, for example --name my-model")
    output = Path(args.output)

    if "gguf" in targets:  # before the model is loaded
        from edgewright.export.gguf.exporter import check_settings

        check_settings(output / f"{name}.gguf", args.layout, args.float_type, args.embedding, args.kv)
    if "pte" in targets:
        from edgewright.export.executorch.exporter import check_arguments

        check_arguments(output / f"{name}.pte", args.table, args.min_delegated)
    from edgewright.compression.vision_files import is_vision

    if is_vision(args.model):
        files = _write_vision(targets, output, name, args)
    else:
        from edgewright.io.models import load

        model, tokenizer = load(args.model)
        files = [_write(target, model, tokenizer, output, name, args) for target in targets]
    if args.json:
        print(json.dumps({"model": args.model, "files": files}, indent=1, ensure_ascii=False))
    return 0


def parse_targets(text: str) -> list[str]:
    """The targets of --to, in order, each once. Raises UsageError for unknown ones."""
    targets = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not targets:
        raise UsageError(f"--to names no target; choose from {', '.join(TARGETS)}, for example --to gguf")
    for target in targets:
        if target not in TARGETS:
            raise UsageError(f"unknown target {target!r} in --to; choose from {', '.join(TARGETS)}")
    return targets


def default_name(model: str) -> str:
    """A file name from the model's own: the last part of the path, without .gguf."""
    name = Path(model.rstrip("/\\")).name
    name = (Path(model).resolve().name if name in ("", "..") else name).removesuffix(".gguf")
    return re.sub(r"-\d{5}-of-\d{5}$", "", name)  # the number of a part of a split file


def _write(
    target: str, model: Any, tokenizer: Any, output: Path, name: str, args: argparse.Namespace
) -> dict[str, Any]:
    from edgewright.export.huggingface import packed_modules, save_dequantized, save_quantized

    if target in ("pte", "onnx"):
        # A model without quantised weights is its own original; a quantised folder does not hold its original.
        original = None if packed_modules(model) else model
        return _write_program(target, model, tokenizer, output / f"{name}.{target}", args, original=original)
    from edgewright.export.gguf.exporter import export_gguf

    if target == "gguf":
        export = export_gguf(
            model,
            tokenizer,
            output / f"{name}.gguf",
            layout=args.layout,
            strict=not args.lenient,
            verify=not args.no_verify,
            float_type=args.float_type,
            embedding=args.embedding,
            kv=args.kv,
            progress=not args.json,
        )
        if not args.json:
            _print_gguf(export, args.all, args.kv)
        return {"target": target, **export.to_dict()}
    quantized = target == "hf" and bool(packed_modules(model))
    folder = (save_quantized if quantized else save_dequantized)(model, tokenizer, output / f"{name}-{target}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if not args.json:
        print(f"{folder}: {size / 1e6:.1f} MB, {'packed codes' if quantized else 'ordinary checkpoint'}")
    return {"target": target, "path": str(folder), "bytes": size, "quantized": quantized}


def _write_vision(targets: list[str], output: Path, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    from edgewright.compression.vision_files import ONNX_TOLERANCE, load_vision
    from edgewright.models.efficientnet_lite import load_efficientnet_lite0

    unfit = [target for target in targets if target not in ("pte", "onnx")]
    if unfit:
        given = "--to was left out, which means gguf" if args.to == "gguf" else f"not {', '.join(unfit)}"
        raise UsageError(f"{args.model} is an image classifier: --to takes pte and onnx; {given}")
    model, image = load_vision(args.model)
    tolerance = None if args.model in VISION_MODELS else ONNX_TOLERANCE
    original = load_efficientnet_lite0()
    return [_write_program(t, model, None, output / f"{name}.{t}", args, image, tolerance, original) for t in targets]


def _write_program(
    target: str,
    model: Any,
    tokenizer: Any,
    path: Path,
    args: argparse.Namespace,
    image: Any = None,
    tolerance: float | None = None,
    original: Any = None,
) -> dict[str, Any]:
    if target == "onnx":
        from edgewright.export.onnx.exporter import export_onnx

        onnx = export_onnx(model, path, example_inputs=image, tolerance=tolerance, original=original)
        if not args.json:
            print(f"{onnx.path}: {onnx.path.stat().st_size / 1e6:.1f} MB, run and compared with the model")
            if found := onnx.checks.get("original"):
                print(
                    f"against the original float model: outputs differ by {found['relative_error']:.3g} of their spread"
                )
        return {"target": target, **onnx.to_dict()}
    from edgewright.export.executorch.exporter import export_executorch

    export = export_executorch(
        model,
        tokenizer,
        path,
        example_inputs=None if image is None else [image],
        context=args.context,
        embedding=args.table,
        min_delegated=args.min_delegated,
        verify=not args.no_verify,
        original=None if image is None else original,
    )
    if not args.json:
        print("\n".join(export.summary()))
        print(f"run it: edgewright {'chat' if image is None else 'bench'} {export.path}")
    return {"target": target, **export.to_dict()}


def _print_gguf(export: Any, every: bool, kv: int | None) -> None:
    from rich.console import Console

    from edgewright.export.gguf.exporter import command_lines

    # a pipe has no width of its own: one line a row, so that grep and awk can read the table
    console = Console() if sys.stdout.isatty() else Console(width=160)
    export.print(console, every)
    console.print(
        f"{export.path}: {export.bytes / 1e6:.1f} MB, {export.bits_per_weight:.3g} bits per weight",
        highlight=False,
        markup=False,
    )
    checks = export.checks
    if checks:
        confirmed = ", ".join(f"{reader} {count}" for reader, count in checks["tensors_equal"].items())
        console.print(
            f"verified: {checks['tensors']} tensors decode to the model (by {confirmed}); llama.cpp chooses "
            f"PyTorch's token at {checks['top1_agreement']:.1%} of {checks['positions']} places, KL {checks['kl']:.2g}",
            highlight=False,
            markup=False,
        )
    if original := checks.get("original"):
        console.print(
            f"against the original float model: KL {original['kl']:.3g}, the same token at "
            f"{original['top1_agreement']:.1%} of {checks['positions']} places",
            highlight=False,
            markup=False,
        )
    console.print(f"run it: {command_lines(export.path, kv)['chat']}", highlight=False, markup=False)
