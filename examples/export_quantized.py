"""Quantise a language model without training and export it to GGUF: python examples/export_quantized.py MODEL FILE.gguf

MODEL is a Hugging Face folder, a .gguf file or smollm2-135m. The file is decoded again, run in llama.cpp and compared
with the model before it gets its name.
"""

from __future__ import annotations

import copy
import sys

import edgewright
from edgewright import QuantConfig, gptq_, load_texts, token_blocks


def main(source: str, target: str) -> None:
    model, tokenizer = edgewright.load(source)
    original = copy.deepcopy(model)
    calibration = token_blocks(load_texts(None, "calibration"), tokenizer, block_length=64, max_blocks=8)
    gptq_(model, QuantConfig.weights("int4", granularity=32), calibration)
    edgewright.convert_(model)
    done = edgewright.export_gguf(model, tokenizer, target, original=original)
    print(f"{done.path}: {done.path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:3])
