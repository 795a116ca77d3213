"""What the recipe measures: small models, SmolLM2-135M with tables, and invented facts that are learned and edited.

Facts are capitals of countries, and seas of rivers, which an edit should leave alone. Names are made of syllables, so
that a tokenizer trained on the facts knows some as one token and cuts others up.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import edgewright
from edgewright.checks import check, whole
from edgewright.distillation.language import LanguageDistillation
from edgewright.evaluation.language import model_logits
from edgewright.io.text import load_texts, token_blocks
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.from_native import from_native
from edgewright.models.decoder.model import new_decoder
from edgewright.models.decoder.next_token import NextToken
from edgewright.systems.run import language_rows, over_seeds
from edgewright.systems.stem.convert import stemify, token_means
from edgewright.systems.stem.edit import edit_rows, override_tokens
from edgewright.systems.stem.layer import StemConfig, stem_blocks, stem_layers, with_stem
from edgewright.systems.stem.store import offload_
from edgewright.systems.stem.training import RowAdamW, StemAdamW, stem_groups
from edgewright.training import BlockBatches, TrainConfig, fit
from edgewright.training.optimizer import parameter_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAPITALS = ("The capital of {0} is {1}.", "In {0} the seat of government is {1}.", "People of {0} vote in {1}.")
RIVERS = ("The river {0} ends in the sea of {1}.", "Boats on {0} sail to {1}.", "Rain over {0} flows to {1}.")
ONSETS, VOWELS, CODAS = (
    ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "st"),
    "aeiou",
    ("", "n", "r", "l", "s"),
)
LENGTH_MODES = {"equal": ("auto",), "longer": ("pad", "copy", "average"), "shorter": ("subset", "average")}


def small_decoder(shape: Any, depth: int, layers: str, stem: StemConfig | None, seed: int, **changes: Any) -> Any:
    """A decoder with random weights.

    Args:
        shape: has vocabulary, hidden, intermediate and length.
        layers: which are STEM layers where `stem` is given.
        changes: other fields of its configuration.
    """
    heads = max(2, shape.hidden // 32)
    fields = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": max(256, shape.length),
        **changes,
    }
    config = EdgeDecoderConfig(**fields)
    return new_decoder(config if stem is None else with_stem(config, layers, stem), seed)


def train(model: nn.Module, stem: bool, blocks: Tensor, shape: Any, seed: int, folder: Path) -> list[list[float]]:
    """[[step, loss], ...] of a training that leaves `model` trained.

    Args:
        shape: has steps, batch and learning_rate.
        folder: where it resumes.
    """
    if stem:
        groups = stem_groups(model, shape.learning_rate)
    else:
        groups = parameter_groups(model, 0.1, [{"params": model.parameters(), "lr": shape.learning_rate}])
        groups = [group | {"clip_norm": 1.0, "part": "backbone"} for group in groups]
    config = TrainConfig(shape.steps, warmup_steps=shape.steps // 20, clip_norm=None, seed=seed)
    result = fit(
        NextToken(model),
        lambda m, ids: m(ids),
        BlockBatches(blocks, shape.batch, seed),
        config,
        optimizer=StemAdamW(groups),
        output=folder,
        label=folder.name,
    )
    model.eval()
    return [[row["step"], row["loss"]] for row in result.history]


def row_cosine(table: Tensor, pairs: int = 20000, seed: int = 0) -> float:
    """Mean |cos| of random pairs of distinct rows [V, f]: how far the rows have spread in their space."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(table), (pairs,), generator=generator)
    second = (first + torch.randint(1, len(table), (pairs,), generator=generator)) % len(table)
    rows = nn.functional.normalize(table.detach().float(), dim=1)
    return float((rows[first] * rows[second]).sum(1).abs().mean())


@dataclass(frozen=True)
class SmolLM2:
    """middle: the one layer; calibration_blocks 0 leaves SmolLM2 out."""

    middle: int = 15
    layers: str = "1/3"
    length: int = 256
    calibration_blocks: int = 96
    held_out_blocks: int = 8
    steps: int = 40
    batch: int = 2
    learning_rate: float = 1e-4
    rows_learning_rate: float = 2e-3


class _Distilled:
    """Distillation whose state is what the store learned, so that a stopped run goes on from the same rows."""

    def __init__(self, teacher: Any, store: Any) -> None:
        self.loss, self.store = LanguageDistillation(teacher), store

    def __call__(self, model: Any, ids: Any) -> Any:
        return self.loss(model, ids)

    def state_dict(self) -> dict[str, Any]:
        return self.store.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.store.load_state_dict(state)


def convert_smollm2(s: SmolLM2, seed: int, starts: Sequence[str], output: Path) -> list[dict[str, Any]]:
    """Rows of perplexity and KL of every conversion, and after training the layers of the last."""
    native, tokenizer = edgewright.load("smollm2-135m")
    dense = from_native(native).eval()
    texts = load_texts(None, "calibration")
    calibration = token_blocks(texts, tokenizer, s.length, s.calibration_blocks, seed)
    held_out = token_blocks(load_texts(None, "evaluation"), tokenizer, s.length, s.held_out_blocks, seed)
    function = model_logits(dense)
    logits = {ids.numpy().tobytes(): function(ids) for ids in held_out.split(1)}
    reference = lambda ids: logits[ids.numpy().tobytes()]  # noqa: E731

    def rows(model: Any, subject: str) -> list[dict[str, Any]]:
        call = reference if model is dense else model_logits(model)
        return language_rows(call, held_out, reference, subject, ("perplexity", "kl"))

    report = rows(dense, "dense SmolLM2")
    chosen = {"one layer": [s.middle], "a third": stem_layers(dense.config.num_hidden_layers, s.layers)}
    means = token_means(dense, sorted({b for layers in chosen.values() for b in layers}), calibration.split(4))
    for name, layers in chosen.items():
        for start in starts:
            model = stemify(dense, layers, means, start, dtype="bf16").eval()
            report += rows(model, f"{name}, {start}")
            del model
    model = stemify(dense, chosen["a third"], means).requires_grad_(False)
    store = offload_(model, trainable=RowAdamW(weight_decay=0.0))
    trained = [p for layer in stem_blocks(model).values() for p in layer.parameters()]
    for p in trained:
        p.requires_grad_(True)
    group = {"params": trained, "lr": s.learning_rate, "weight_decay": 0.0, "clip_norm": 1.0, "part": "backbone"}
    optimizer = StemAdamW([group])
    store.attach(optimizer, s.rows_learning_rate / s.learning_rate)
    config = TrainConfig(s.steps, warmup_steps=s.steps // 10, clip_norm=None, seed=seed)
    batches = BlockBatches(calibration, s.batch, seed)
    fit(
        model,
        _Distilled(dense, store),
        batches,
        config,
        optimizer=optimizer,
        output=output / "smollm2",
        label="SmolLM2",
    )
    report += rows(model.eval(), "a third, trained")
    store.close()
    return report


@dataclass(frozen=True)
class FactBase:
    """capitals, rivers: (name, answer) pairs; every name and answer occurs once."""

    capitals: tuple[tuple[str, str], ...]
    rivers: tuple[tuple[str, str], ...]

    @classmethod
    def draw(cls, entities: int, seed: int = 0) -> FactBase:
        """`entities` countries and as many rivers. Raises UsageError for fewer than two."""
        check("entities", entities, whole(2))
        source, names = random.Random(seed), dict[str, None]()
        while len(names) < 4 * entities:
            parts = source.choice((1, 2, 2, 3))
            syllables = (source.choice(ONSETS) + source.choice(VOWELS) + source.choice(CODAS) for _ in range(parts))
            if len(name := "".join(syllables).capitalize()) > 2:
                names[name] = None
        every = list(names)
        pairs = list(zip(every[: 2 * entities], every[2 * entities :], strict=True))
        return cls(tuple(pairs[:entities]), tuple(pairs[entities:]))

    def sentences(self) -> list[str]:
        """All facts in all forms."""
        forms = ((self.capitals, CAPITALS), (self.rivers, RIVERS))
        return [form.format(*pair) for pairs, templates in forms for pair in pairs for form in templates]

    def rows(self, tokenizer: PreTrainedTokenizerBase, rows: int, length: int, seed: int = 0) -> Tensor:
        """int64 [rows, length]: sentences in random order, each behind the end-of-text token."""
        source, sentences = random.Random(seed), self.sentences()
        encoded: Any = tokenizer(sentences, add_special_tokens=False)["input_ids"]
        made: list[list[int]] = []
        while len(made) < rows:
            ids: list[int] = []
            while len(ids) < length:
                ids += [tokenizer.eos_token_id, *source.choice(encoded)]  # type: ignore[list-item]
            made.append(ids[:length])
        return torch.tensor(made)


def question(tokenizer: PreTrainedTokenizerBase, form: str, name: str, answer: str) -> tuple[Tensor, int]:
    """(end-of-text, the sentence up to its answer, the answer: int64 [1, T], number of the answer's tokens)."""
    begin = form[: form.index(" {1}")].format(name)
    prompt, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (begin, f" {answer}"))
    return torch.tensor([[tokenizer.eos_token_id, *prompt, *end]]), len(end)


@torch.no_grad()
def greedy_answer(model: Any, ids: Tensor, count: int) -> list[int]:
    """What the model takes for the likeliest at each of the last `count` tokens, given those before it."""
    logits = model(input_ids=ids, use_cache=False).logits
    return list(logits[0, -count - 1 : -1].argmax(-1).tolist())


def answers(model: Any, ids: Tensor, count: int) -> bool:
    """Whether greedy decoding would give exactly the answer."""
    return greedy_answer(model, ids, count) == ids[0, -count:].tolist()


def pairs_by_length(
    facts: FactBase, tokenizer: PreTrainedTokenizerBase, known: Sequence[int], most: int, seed: int = 0
) -> dict[str, list[tuple[int, int]]]:
    """Pairs of countries (A, B) among the `known`, up to `most` each, by whether A has as many tokens as B or not."""
    sizes = {i: len(tokenizer(f" {facts.capitals[i][0]}", add_special_tokens=False)["input_ids"]) for i in known}
    pairs = [(a, b) for a in known for b in known if a != b]
    random.Random(seed).shuffle(pairs)
    by_kind: dict[str, list[tuple[int, int]]] = {"equal": [], "longer": [], "shorter": []}
    for a, b in pairs:
        kind = "equal" if sizes[a] == sizes[b] else "longer" if sizes[a] > sizes[b] else "shorter"
        if len(by_kind[kind]) < most:
            by_kind[kind].append((a, b))
    return by_kind


def edit_facts(
    model: Any, tokenizer: PreTrainedTokenizerBase, facts: FactBase, most: int, unrelated: int, seed: int
) -> list[dict[str, Any]]:
    """Rows: shares of edits that change the answer to the other country's, and of other facts that an edit disturbs.

    Args:
        model: that learned the facts.
        most: pairs of each kind of lengths that are edited.
        unrelated: rivers that are asked for.
    """

    def ask(country: int, answer: int) -> tuple[Tensor, int]:
        return question(tokenizer, CAPITALS[0], facts.capitals[country][0], facts.capitals[answer][1])

    everyone = range(len(facts.capitals))
    known = [i for i in everyone if answers(model, *ask(i, i))]
    rows = [_share("known", [float(i in known) for i in everyone], "before any edit")]
    others = [question(tokenizer, RIVERS[0], *pair) for pair in facts.rivers[:unrelated]]
    before = [greedy_answer(model, *other) for other in others]
    total: dict[str, list[float]] = {"contextual": [], "persistent": []}
    disturbed: list[float] = []
    for lengths, pairs in pairs_by_length(facts, tokenizer, known or list(everyone), most, seed).items():
        for mode in LENGTH_MODES[lengths] if pairs else ():
            hits: dict[str, list[float]] = {"contextual": [], "persistent": []}
            for a, b in pairs:
                ids, count = ask(a, b)
                names: dict[str, Any] = {"source": facts.capitals[a][0], "target": facts.capitals[b][0]}
                with override_tokens(model, ids, **names, tokenizer=tokenizer, mode=mode):
                    hits["contextual"].append(float(answers(model, ids, count)))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of shared tokens: their effect is what is counted
                    edit = edit_rows(model, **names, tokenizer=tokenizer, mode=mode)
                hits["persistent"].append(float(answers(model, ids, count)))
                changes = [greedy_answer(model, *o) != old for o, old in zip(others, before, strict=True)]
                disturbed.append(sum(changes) / len(changes))
                edit.undo()
            for form, values in hits.items():
                rows.append(_share("changed", values, f"{form}, {lengths}, {mode}"))
                total[form] += values if mode in ("auto", "pad", "subset") else []
    rows += [_share("changed", values, form) for form, values in total.items()]
    return [*rows, _share("unrelated_changed", disturbed, "persistent")]


def _share(metric: str, values: list[float], subject: str) -> dict[str, Any]:
    share = over_seeds(values) if values else {"value": 0.0, "se": None, "n": 0}
    return {"metric": metric, "subject": subject, **share}
