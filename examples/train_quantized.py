"""Train a language model under 2-bit quantisation with its float self as the teacher: ... MODEL FOLDER [STEPS]

The same call resumes after Ctrl-C. The folder that it writes loads with edgewright.load.
"""

from __future__ import annotations

import copy
import sys

import edgewright
from edgewright import BlockBatches, LanguageDistillation, QuantConfig, TrainConfig, fit, load_texts, token_blocks
from edgewright.export.huggingface import save_quantized


def main(source: str, folder: str, steps: str = "100") -> None:
    teacher, tokenizer = edgewright.load(source)
    student = edgewright.quantize_(copy.deepcopy(teacher), QuantConfig.weights("seq2", granularity=64))
    blocks = token_blocks(load_texts(None, "calibration"), tokenizer, block_length=64)
    config = TrainConfig(int(steps), learning_rate=1e-4)
    result = fit(student, LanguageDistillation(teacher), BlockBatches(blocks, 4), config, output=f"{folder}/training")
    print(f"divergence from the teacher: {result.history[0]['loss']:.3f} -> {result.history[-1]['loss']:.3f} nats")
    save_quantized(edgewright.convert_(student), tokenizer, f"{folder}/model")


if __name__ == "__main__":
    main(*sys.argv[1:])
