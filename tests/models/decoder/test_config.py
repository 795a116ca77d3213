"""Configurations of decoders from files: every field has the type that it declares, or is refused by name."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import edgewright
from edgewright.errors import EdgewrightError, UsageError
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import new_decoder
from edgewright.systems.stem.files import load_offloaded, save_stem
from tests.fuzz_models import tokenizer
from tests.systems.stem.toys import stem

WRONG: dict[str, tuple[Any, ...]] = {  # by the declared type, without "| None"
    "int": ("7", 1.5, True, [1]),
    "float": ("0.1", [0.1], True),
    "bool": (1, "yes", None),
    "str": (3, ["a"], None),
    "int | list[int]": ("7", 1.5, ["a"], [[1]], {"a": 1}),
    "str | list[str]": (3, [1], {"a": 1}),
    "list[int]": (3, ["a"], {"a": 1}),
    "dict[str, Any]": ("a", [1], 3),
}


@pytest.mark.parametrize("name", inspect.get_annotations(EdgeDecoderConfig))
def test_a_value_of_another_type_is_refused_by_name(name: str) -> None:
    for value in WRONG[str(inspect.get_annotations(EdgeDecoderConfig)[name]).removesuffix(" | None")]:
        with pytest.raises(UsageError, match=f"^{name} of EdgeDecoderConfig cannot be"):
            EdgeDecoderConfig(**{name: value})


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("moe", {"route_scale": "x"}),
        ("moe", {"capacity_factor": [1]}),
        ("stem", {"replace": 3}),
        ("longhorn", {"fixed_beta": "x"}),
        ("longhorn", {"d_state": 1.5}),
    ],
)
def test_layers_are_made_of_typed_fields(kind: str, fields: dict[str, Any]) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    where = {"mixers": "longhorn"} if kind == "longhorn" else {"ffn_types": ["mlp", kind]}
    with pytest.raises(UsageError, match=f"{kind} of EdgeDecoderConfig: {next(iter(fields))} of"):
        new_decoder(EdgeDecoderConfig(**shape, **where, **{kind: fields}), 0)


def test_folders_with_such_fields_are_refused(tmp_path: Path) -> None:
    save_stem(stem(vocab_size=256), tmp_path, tokenizer())
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change in ({"rms_norm_eps": "small"}, {"stem": {**config["stem"], "init": 3}}, {"hidden_act": ["silu"]}):
        path.write_text(json.dumps({**config, **change}))
        for load in (load_offloaded, edgewright.load):
            with pytest.raises(EdgewrightError):
                load(tmp_path)
