"""The jobs that are killed: each command that leaves more than one file, on models of a few kilobytes."""

from __future__ import annotations

from pathlib import Path

# In the parent of all forks, so that each job starts at once. No thread of torch may run before a fork.
import torch
import transformers

from tests.kills import Job
from tests.toy_gguf import write_toy
from tests.toy_pretrain import documents

torch.set_num_threads(1)
assert transformers  # imported for its time alone

TEXT = "\n\n".join(f"Paragraph {i}: the quick brown fox jumps over {i * 7} lazy dogs." for i in range(120))


def toy(folder: Path) -> None:
    write_toy(folder / "toy.gguf")
    (folder / "notes.txt").write_text(TEXT, encoding="utf-8")


def texts(folder: Path) -> None:
    (folder / "notes.txt").write_text("".join(documents(200)), encoding="utf-8")


def clicks(folder: Path) -> None:
    lines = []
    for row in range(400):
        numbers = "\t".join(str((row * k) % 17) for k in range(1, 14))
        categories = "\t".join(f"{(row * k) % 11:08x}" for k in range(1, 27))
        lines.append(f"{(row * 7) % 5 == 0:d}\t{numbers}\t{categories}")
    (folder / "clicks.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def hf(folder: Path) -> None:
    from edgewright import load

    toy(folder)
    model, tokenizer = load(folder / "toy.gguf")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


COMPRESS = ("compress", "toy.gguf", "--budget", "3", "--block-length", "32", "--blocks", "4", "--no-bench")
JOBS = {
    job.name: job
    for job in (
        Job("compress", (*COMPRESS, "--data", "notes.txt", "--output", "OUT"), toy),
        Job("compress-own-text", (*COMPRESS, "--bits", "2", "--no-baselines", "--output", "OUT"), toy),
        Job("export", ("export", "model", "--to", "gguf,onnx,hf", "--output", "OUT"), hf),
        Job(
            "pretrain",
            (
                "pretrain",
                "20000",
                "--text",
                "notes.txt",
                "--steps",
                "6",
                "--vocab",
                "300",
                "--context",
                "32",
                "--batch",
                "2",
                "--checkpoint-every",
                "2",
                "--output",
                "OUT",
            ),
            texts,
        ),
        Job(
            "train",
            ("train", "dlrm", "--data", "clicks.tsv", "--batch", "64", "--min-count", "1", "--output", "OUT"),
            clicks,
        ),
        Job("prune", ("prune", "model", "--mlp", "64", "--output", "OUT"), hf),
        Job("sparsify", ("sparsify", "model", "--output", "OUT"), hf),
        Job("run", ("run", "paretoq", "--size", "tiny", "--output", "OUT"), lambda folder: None),
    )
}
