"""Experts sliced from a dense model: the model itself while every slice is on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from edgewright.errors import UsageError
from edgewright.models.decoder.config import EdgeDecoderConfig
from edgewright.models.decoder.model import new_decoder
from edgewright.systems.mobilemoe.layer import moe_layers
from edgewright.systems.mobilemoe.upcycle import balanced_kmeans, moe_from_dense
from tests.toy_llama import make_tiny_llama


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(seed))


def edge(**changes: Any) -> Any:
    fields = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 2}
    return new_decoder(EdgeDecoderConfig(**{**fields, "num_hidden_layers": 2, **changes})).eval()


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("make", [make_tiny_llama, edge, lambda: edge(share_map=[0, 0], ffn_types=["mlp", "mlp"])])
def test_all_slices_are_the_dense_model(make: Any, calibrated: bool) -> None:
    dense, batches = make().eval(), [tokens()] if calibrated else None
    ids = tokens(1)
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
        for shared in (True, False):
            routed = 16 - 2 if shared else 16
            sparse = moe_from_dense(dense, 4, 4, shared, top_k=routed, batches=batches, margin=0.0)
            # the dense product is summed piece by piece here: 3e-5, as for any whole tiny model
            torch.testing.assert_close(sparse(ids).logits, expected, rtol=3e-5, atol=3e-5)
            near = moe_from_dense(dense, 4, 4, shared, top_k=routed, batches=batches, margin=0.01)
            assert (near(ids).logits - expected).abs().max() < 0.02 * expected.abs().max()
        assert torch.equal(dense(input_ids=ids).logits, expected)


@pytest.mark.parametrize("make", [make_tiny_llama, edge])
def test_some_blocks_alone_can_be_sliced(make: Any) -> None:
    dense, ids = make().eval(), tokens(1)
    last = dense.config.num_hidden_layers - 1
    with torch.no_grad():
        sparse = moe_from_dense(dense, 4, 4, top_k=14, layers=[last], margin=0.0)
        torch.testing.assert_close(sparse(ids).logits, dense(input_ids=ids).logits, rtol=3e-5, atol=3e-5)
    assert list(moe_layers(sparse)) == [f"model.layers.{last}.mlp"]
    kept = {name: value for name, value in dense.state_dict().items() if ".mlp." in name and f".{last}." not in name}
    assert kept and all(torch.equal(value, sparse.state_dict()[name]) for name, value in kept.items())


def test_chosen_slices_are_nearer_to_the_dense_model_than_random_ones() -> None:
    dense = edge(initializer_range=0.3)
    ids = tokens(1)
    with torch.no_grad():
        hidden = dense.model(ids).last_hidden_state
        gaps = [
            (moe_from_dense(dense, 4, 4, top_k=5, batches=batches).model(ids).last_hidden_state - hidden)
            .square()
            .mean()
            for batches in (None, [tokens()])
        ]
    assert gaps[1] < 0.9 * gaps[0]


def test_it_is_repeatable_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    one, two = (moe_from_dense(edge(), 4, 4, batches=[tokens()], seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_clusters_are_equal_and_find_what_belongs_together() -> None:
    centres = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4).repeat(6)
    features = centres[labels] + 0.05 * torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    for seed in range(8):
        groups = balanced_kmeans(features, 4, torch.Generator().manual_seed(seed))
        assert sorted(groups.flatten().tolist()) == list(range(24))
        if all(len(set(labels[group].tolist())) == 1 for group in groups):
            return
    raise AssertionError("no start found the four clusters")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"experts": 5, "granularity": 4},
            "experts=5 x granularity=4 = 20 pieces do not divide the width 96",
        ),
        ({"experts": 4, "granularity": 4, "top_k": 15}, "top_k=15; it must be a whole number from 1 to 14"),
        ({"experts": 4, "granularity": 4, "margin": -1.0}, "margin=-1.0"),
        ({"experts": 4, "granularity": 4, "batches": []}, "calibration tokens=0; it must be a whole number from 2 up"),
        ({"layers": [1, 7]}, r"layers=\[1, 7\]: name one or more of the blocks .* 0, 1"),
        ({"layers": []}, r"layers=\[\]"),
    ],
)
def test_what_cannot_be_sliced_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        moe_from_dense(edge(), **arguments)
    with pytest.raises(UsageError, match="has no feed-forward of plain gate"):
        moe_from_dense(edge(ffn_types="none"), 4, 4)
