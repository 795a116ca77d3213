"""Split GGUF files: the first part stands for all, and a part alone is named as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgewright.errors import FormatError
from edgewright.io.gguf.model import load_gguf
from edgewright.io.gguf.reader import GGUFFile
from edgewright.measure.size import bits_per_weight, bytes_by_part, gguf_parameters
from edgewright.runtime.benchmark import benchmark_files
from edgewright.runtime.llamacpp import LlamaCppEngine


def split(whole: Path, count: int, **changes: Any) -> list[Path]:
    """The file cut in parts as llama.cpp's gguf-split does it."""
    reader = gguf.GGUFReader(whole)
    paths = [whole.with_name(f"cut-{number + 1:05d}-of-{count:05d}.gguf") for number in range(count)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    kind = field.types[0]
                    writer.add_key_value(
                        field.name,
                        field.contents(),
                        kind,
                        field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None,
                    )
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", changes.get("said", count))
        writer.add_int32("split.tensors.count", len(reader.tensors) + changes.get("more", 0))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_the_first_part_is_the_whole(tiny: Any, write_gguf: Any) -> None:
    whole = write_gguf(tiny())
    paths = split(whole, 3)
    one, cut = GGUFFile(whole), GGUFFile(paths[0])
    assert cut.parts == tuple(paths) and one.parts == (whole,)
    assert cut.size == sum(path.stat().st_size for path in paths)
    assert set(cut.tensors) == set(one.tensors)
    for name in one.tensors:
        assert np.array_equal(cut.dequantize(name), one.dequantize(name)), name
    assert gguf_parameters(paths[0]) == gguf_parameters(whole) and bits_per_weight(paths[0]) == bits_per_weight(whole)
    assert sum(bytes_by_part(paths[0]).values()) == cut.size
    first, again = load_gguf(whole)[0].state_dict(), load_gguf(paths[0])[0].state_dict()
    assert all(bool((first[name] == again[name]).all()) for name in first)
    ids = [5, 9, 200, 31, 7]
    with LlamaCppEngine(whole, threads=1, context=256) as a, LlamaCppEngine(paths[0], threads=1, context=256) as b:
        assert np.array_equal(a.logits(ids), b.logits(ids))
    report = benchmark_files([paths[0]], prompt_tokens=4, decode_tokens=2, repeats=1, threads=1)
    size = next(row.value for row in report.rows if row.metric == "file_size")
    assert size == pytest.approx(cut.size / 1e6)


def test_what_is_no_whole_is_refused(tiny: Any, write_gguf: Any, tmp_path: Path) -> None:
    paths = split(write_gguf(tiny()), 3)
    with pytest.raises(FormatError, match=r"part 2 of 3 of a split GGUF file; pass the first, .*00001-of-00003.gguf"):
        GGUFFile(paths[1])
    other = tmp_path / "other.gguf"
    other.write_bytes(paths[0].read_bytes())
    with pytest.raises(FormatError, match="is part 1 of 3 of a split GGUF file, but not named as one"):
        GGUFFile(other)
    third = paths[2].read_bytes()
    paths[2].unlink()
    with pytest.raises(FormatError, match=r"part 1 of 3 of a split GGUF file, and part 3 is missing: .*00003-of-00003"):
        LlamaCppEngine(paths[0], threads=1)
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(FormatError, match="does not say that it is part 3 of 3"):
        GGUFFile(paths[0])
    paths[2].write_bytes(third)
    assert len(GGUFFile(paths[0]).parts) == 3
    with pytest.raises(FormatError, match=r"hold \d+ tensors, the first names \d+"):
        GGUFFile(split(write_gguf(tiny(), name="b.gguf"), 2, more=1)[0])
    with pytest.raises(FormatError, match="split.no 1 of split.count 1"):
        GGUFFile(split(write_gguf(tiny(), name="c.gguf"), 2, said=1)[1])
