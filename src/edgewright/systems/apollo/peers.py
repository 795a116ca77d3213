"""APOLLO and the optimizers that it stands beside, made by name over the same weights, and the training of the recipe.

A byte-level Llama learns the text that is built in.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from edgewright.errors import MissingPackage, UsageError
from edgewright.io.text import load_texts
from edgewright.systems.apollo.groups import apollo_param_groups
from edgewright.systems.apollo.optimizer import APOLLO, APOLLOMini
from edgewright.systems.apollo.state import state_bytes
from edgewright.training.batches import BlockBatches
from edgewright.training.loop import TrainConfig, fit

OPTIMIZERS = (
    "AdamW",
    "AdamW 8-bit (torchao)",
    "Adafactor",
    "Muon",
    "GaLore",
    "SGD with momentum",
    "APOLLO",
    "APOLLO without limiter",
    "APOLLO rank 1 by channel",
    "APOLLO-Mini",
)
# Learning rates that are tried: GaLore's are AdamW's over its scale of 0.25, Adafactor's are relative to the weights.
USUAL = (1e-3, 3e-3, 1e-2)
RATES: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(OPTIMIZERS, USUAL),
    "Adafactor": (1e-2, 3e-2, 1e-1),
    "GaLore": (4e-3, 1.2e-2, 4e-2),
    "SGD with momentum": (0.1, 0.3, 1.0),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "APOLLO": {},
    "APOLLO without limiter": {"norm_growth": None},
}


def named_optimizer(method: str, model: nn.Module, rate: float, rank: int) -> torch.optim.Optimizer:
    """An optimizer over the trainable weights; one with a rank sketches the seven projections of each layer alone.

    Raises UsageError for an unknown method, MissingPackage where a peer is not installed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if method == "AdamW":
        return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    if method == "AdamW, foreach":
        return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, foreach=True)
    if method == "SGD with momentum":
        return torch.optim.SGD(trained, lr=rate, momentum=0.9)
    if method == "Adafactor":
        return torch.optim.Adafactor(trained, lr=rate)
    if method == "AdamW 8-bit (torchao)":
        return _peer("torchao.optim", "AdamW8bit", "torchao")(trained, lr=rate, weight_decay=0.0)
    if method == "APOLLO rank 1 by channel":
        return APOLLO(apollo_param_groups(model, 1), rate, scale="auto")
    if method == "APOLLO-Mini":
        return APOLLOMini(apollo_param_groups(model, 1), rate)
    sketched, *rest = apollo_param_groups(model, rank)
    matrices, others = [p for _, p in sketched["params"]], [p for group in rest for _, p in group["params"]]
    if method == "Muon":
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        return Several(muon, torch.optim.AdamW(others, lr=rate, weight_decay=0.0))
    if method == "GaLore":
        low = {"params": matrices, "rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        made = _peer("galore_torch", "GaLoreAdamW", "galore-torch bitsandbytes")
        return made([low, {"params": others}], lr=rate, no_deprecation_warning=True)
    if method not in VARIANTS:
        raise UsageError(f"no optimizer is called {method!r}; e.g. AdamW, Adafactor, Muon, GaLore, APOLLO, APOLLO-Mini")
    return APOLLO([sketched, *rest], rate, scale="auto", **VARIANTS[method])


class Several(torch.optim.Optimizer):
    """Optimizers of different parameters as one, for the loop: Muon takes matrices alone."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
            self.state.update(part.state)
        return loss


def _peer(module: str, name: str, package: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise MissingPackage(
            f"{name} is not installed ({error}); pip install {package}, or leave it out with --set methods=..."
        ) from error


# -- the training of the recipe ----------------------------------------------------------------------------------------


def byte_blocks(split: Any, context: int) -> Tensor:
    """The built-in text as int64 [blocks, context] of its bytes."""
    data = torch.frombuffer(bytearray("\n".join(load_texts(None, split)).encode()), dtype=torch.uint8).long()
    return data[: len(data) // context * context].view(-1, context)


def byte_llama(width: int, layers: int, context: int, seed: int) -> nn.Module:
    """A Llama of bytes with random weights."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def smollm2_shapes() -> nn.Module:
    """SmolLM2-135M without its weights."""
    shape: dict[str, Any] = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=49152)
    heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True))
    model.tie_weights()  # not done without memory by transformers 5.0
    return model


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of tokens [B, T]."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def trained(
    model: nn.Module,
    optimizer: Any,
    blocks: Tensor,
    held_out: Tensor,
    steps: int,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Losses of the training, loss on held-out text, and bytes of state."""
    config = TrainConfig(steps, schedule="cosine", warmup_steps=steps // 10, seed=seed)
    # torchao compiles its step for every shape, which takes minutes on a CPU; the arithmetic is the same.
    compiles = type(optimizer).__module__.startswith("torchao")
    with torch.compiler.set_stance("force_eager") if compiles else nullcontext():
        data = BlockBatches(blocks, batch, seed)
        result = fit(model, next_token_loss, data, config, optimizer=optimizer, progress=False)
    model.eval()
    with torch.no_grad():
        losses = [float(next_token_loss(model, part)) for part in held_out.split(16)]
    sizes = [len(part) for part in held_out.split(16)]
    facts = optimizer.layer_facts() if isinstance(optimizer, APOLLO) else {}
    return {
        "loss": sum(a * b for a, b in zip(losses, sizes, strict=True)) / sum(sizes),
        "losses": [float(row["loss"]) for row in result.history],
        "state": state_bytes(optimizer),
        "scales": {name: float(fact.scale) for name, fact in facts.items()},
    }
