"""Train a small decoder from nothing on text and let it write: python examples/pretrain_small.py FOLDER [STEPS]"""

from __future__ import annotations

import sys

import torch

from edgewright import BlockBatches, TrainConfig, fit, load_texts, token_blocks
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import new_decoder
from edgewright.models.decoder.next_token import NextToken
from edgewright.models.decoder.tokenizer import train_tokenizer


def main(folder: str, steps: str = "200") -> None:
    texts = load_texts(None, "calibration")
    tokenizer = train_tokenizer(texts, 1024)
    config = EdgeDecoderConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
    )
    model = new_decoder(config, seed=0)
    batches = BlockBatches(token_blocks(texts, tokenizer, block_length=128), 8)
    training = TrainConfig(int(steps), learning_rate=2e-3, schedule="cosine", warmup_steps=int(steps) // 10)
    result = fit(
        NextToken(model), lambda objective, ids: objective(ids), batches, training, output=f"{folder}/training"
    )
    print(f"loss: {result.history[0]['loss']:.2f} -> {result.history[-1]['loss']:.2f} nats a token")
    prompt = torch.tensor([tokenizer("The ")["input_ids"]])
    print(tokenizer.decode(model.eval().generate(prompt, max_new_tokens=16, do_sample=False)[0]))
    model.save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")


if __name__ == "__main__":
    main(*sys.argv[1:])
