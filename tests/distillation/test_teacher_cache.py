"""The teacher on disk: faithful to the live teacher, resumable, strict about what a folder holds."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from edgewright.distillation.language import LanguageDistillation
from edgewright.distillation.teacher_cache import TeacherCache, cache_teacher
from edgewright.errors import FormatError, UsageError
from edgewright.training.batches import BlockBatches


def blocks(count: int = 10) -> torch.Tensor:
    return torch.randint(0, 256, (count, 12), generator=torch.Generator().manual_seed(0))


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def test_what_is_stored_is_the_head_of_the_distribution(tiny_llama, tmp_path):
    cache = cache_teacher(tiny_llama, blocks(), tmp_path / "t", k=8, shard_blocks=4, batch_size=3, progress=False)
    stored = cache.blocks()
    p = torch.softmax(tiny_llama(blocks()).logits, -1)
    values, _indices = p.topk(8)
    assert len(cache) == 10 and torch.equal(stored["tokens"], blocks())
    assert stored["values"].dtype == torch.float16 and stored["indices"].dtype == torch.int32
    # Batches of another size give logits with other float32 rounding: order may differ only between equals.
    torch.testing.assert_close(p.gather(-1, stored["indices"].long()), values, rtol=1e-5, atol=0)
    torch.testing.assert_close(stored["values"].float(), values, rtol=2**-11 + 1e-5, atol=0)  # float16
    total = stored["values"].float().sum(-1) + stored["tail"].float()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2**-11)  # float16 tail


def test_the_whole_vocabulary_cached_equals_the_live_teacher(tiny_llama, student_of, tmp_path):
    student = student_of(tiny_llama)
    cache = cache_teacher(tiny_llama, blocks(), tmp_path / "t", k=256, progress=False)
    batch = next(BlockBatches(cache.blocks(), 4, seed=1))
    cached, from_cache = LanguageDistillation()(student, batch)
    live, from_teacher = LanguageDistillation(tiny_llama)(student, batch["tokens"])
    torch.testing.assert_close(cached, live, rtol=1e-3, atol=0)  # float16 probabilities
    assert from_cache["kl"] == pytest.approx(from_teacher["kl"], rel=0.05)


def test_resumes_to_the_same_bytes(tiny_llama, tmp_path):
    settings = {"k": 4, "shard_blocks": 3, "batch_size": 2, "progress": False}
    cache_teacher(tiny_llama, blocks(), tmp_path / "whole", **settings)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    broken = copy.deepcopy(tiny_llama)
    broken.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(broken, blocks(), tmp_path / "parts", **settings)
    assert {path.suffix for path in (tmp_path / "parts").iterdir()} == {".json", ".safetensors"}
    with pytest.raises(UsageError, match="unfinished"):
        TeacherCache(tmp_path / "parts")
    cache_teacher(tiny_llama, blocks(), tmp_path / "parts", **settings)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_bad_input_is_named(tiny_llama, tmp_path):
    folder = tmp_path / "t"
    cache_teacher(tiny_llama, blocks(), folder, k=4, progress=False)
    with pytest.raises(UsageError, match="made with k=4, not 5"):
        cache_teacher(tiny_llama, blocks(), folder, k=5, progress=False)
    with pytest.raises(UsageError, match="made with data="):
        cache_teacher(tiny_llama, blocks().flip(0), folder, k=4, progress=False)
    other = copy.deepcopy(tiny_llama)
    other.model.norm.weight.data[0] += 1
    with pytest.raises(UsageError, match="made with teacher="):
        cache_teacher(other, blocks(), folder, k=4, progress=False)
    with pytest.raises(UsageError, match="k=300; it must be a whole number from 1 to 256"):
        cache_teacher(tiny_llama, blocks(), tmp_path / "u", k=300)
    with pytest.raises(UsageError, match="token id 999"):
        cache_teacher(tiny_llama, torch.full((1, 3), 999), tmp_path / "u")
    with pytest.raises(UsageError, match="at least one row"):
        cache_teacher(tiny_llama, torch.zeros(0, 3), tmp_path / "u")
    with pytest.raises(UsageError, match=r"teacher.eval\(\)"):
        cache_teacher(copy.deepcopy(tiny_llama).train(), blocks(), tmp_path / "u")
    assert not (tmp_path / "u").exists()
    with pytest.raises(UsageError, match="no teacher cache"):
        TeacherCache(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, b"\x00\x00\x00\x00\x00\x00\x00\x7f{}"])
def test_damaged_shards_are_named(tiny_llama, tmp_path, damage):
    cache = cache_teacher(tiny_llama, blocks(), tmp_path / "t", k=4, progress=False)
    (tmp_path / "t" / "shard-00000.safetensors").write_bytes(damage)
    with pytest.raises(FormatError, match="shard-00000.safetensors"):
        cache.blocks()


def test_manifests_of_something_else_are_refused(tiny_llama, tmp_path):
    for text in ("[]", "{", json.dumps({"kind": "recipe"})):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UsageError, match="manifest.json"):
            cache_teacher(tiny_llama, blocks(), tmp_path, progress=False)
