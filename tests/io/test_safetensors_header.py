"""The safetensors header check: accepts what the library writes, refuses everything that breaks a rule."""

from __future__ import annotations

import json
import random
import struct
import time
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edgewright.errors import FormatError, UsageError
from edgewright.io.safetensors_header import check_safetensors


def build(header: object, data: int = 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def tensor(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def check(tmp_path):
    def check(content: bytes):
        path = tmp_path / "case.safetensors"
        path.write_bytes(content)
        return check_safetensors(path)

    return check


def test_accepts_what_the_library_writes(tmp_path):
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
    dtypes += [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(dtype): torch.zeros(3, 5).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 7), "naïve": torch.zeros(2, 1, 2)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    entries = check_safetensors(tmp_path / "a.safetensors")
    assert entries.keys() == tensors.keys()
    content = (tmp_path / "a.safetensors").read_bytes()
    for name, value in tensors.items():
        entry = entries[name]
        assert entry.shape == tuple(value.shape)
        assert content[entry.start : entry.end] == value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


DEEP = b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"
BROKEN = {
    "no length": (b"\x01\x02", "header length alone takes 8"),
    "length beyond file": (build({}, length=10**6), "claims 1000000 bytes"),
    "huge length": (build({}, length=2**63), "claims 9223372036854775808 bytes"),
    "not an object": (build(b"[]"), "does not start with"),
    "not JSON": (build(b'{"a": }'), "not JSON"),
    "not UTF-8": (build(b'{"\xff": 1}'), "not JSON in UTF-8"),
    "deep nesting": (build(DEEP), "nested more deeply"),
    "name twice": (build(b'{"w":1,"w":2}'), "'w' occurs twice"),
    "field twice": (build(b'{"w":{"dtype":"F32","dtype":"F16"}}'), "'dtype' occurs twice"),
    "metadata": (build({"__metadata__": {"a": 1}}), "__metadata__ is not a table of strings"),
    "not a table": (build({"w": 3}), "does not have exactly"),
    "field missing": (build({"w": {"dtype": "F32", "shape": [4]}}), "does not have exactly"),
    "field too many": (build({"w": {**tensor(), "x": 1}}), "does not have exactly"),
    "dtype": (build({"w": tensor("Q4")}), "unknown dtype 'Q4'"),
    "dtype list": (build({"w": tensor([])}), "unknown dtype"),
    "negative size": (build({"w": tensor(shape=[-4])}), "a shape that is not"),
    "size not whole": (build({"w": tensor(shape=[4.0])}), "a shape that is not"),
    "size true": (build({"w": tensor("U8", [True], [0, 1])}, 1), "a shape that is not"),
    "too many sizes": (build({"w": tensor(shape=[1] * 65)}), "a shape that is not"),
    "enormous size": (build({"w": tensor(shape=[10**400])}), "a shape that is not"),
    "offsets reversed": (build({"w": tensor(offsets=[16, 0])}), "data_offsets that are not"),
    "three offsets": (build({"w": tensor(offsets=[0, 8, 16])}), "data_offsets that are not"),
    "span": (build({"w": tensor(offsets=[0, 12])}), "spans 12 bytes, but F32 .4. takes 16"),
    "odd bits": (build({"w": tensor("F4", [3], [0, 1])}, 1), "spans 1 bytes"),
    "beyond file": (build({"w": tensor(shape=[8], offsets=[0, 32])}), "truncated or padded"),
    "hole before": (build({"w": tensor(offsets=[16, 32])}, 32), "leaves a hole"),
    "hole between": (build({"a": tensor(), "b": tensor(offsets=[32, 48])}, 48), "'b' leaves a hole"),
    "overlap": (build({"a": tensor(), "b": tensor(offsets=[8, 24])}, 24), "'b' overlaps"),
    "rest": (build({"w": tensor()}, 20), "truncated or padded"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_names_file_and_field(check, case):
    content, words = BROKEN[case]
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=words) as caught:
            check(content)
        assert tracemalloc.get_traced_memory()[1] < 300_000 + 30 * len(content)
    finally:
        tracemalloc.stop()
    assert "case.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        check_safetensors(tmp_path / "none.safetensors")


def test_fuzzed_headers_never_pass_what_the_library_refuses(check, tmp_path):
    good = tmp_path / "good.safetensors"
    save_file({f"layer.{i}": torch.randn(3, i + 1) for i in range(6)}, good)
    content = good.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    rng = random.Random(0)
    passed, slowest = 0, 0.0
    for _ in range(2000):
        data = bytearray(content)
        place = rng.randrange(header)
        kind = rng.randrange(5)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[rng.randrange(len(data)) :]
        elif kind == 2:
            data[:8] = struct.pack("<Q", rng.choice([0, 1, header, 2**31, 2**40, 2**64 - 1, rng.getrandbits(64)]))
        elif kind == 3:
            data[place : place + 1] = rng.choice(
                [b"9", b"0", b"-", b"[", b"{", b'"', b",", b"\\", b"e", b"99999999999"]
            )
        else:
            del data[place : place + rng.randint(1, 5)]
        start = time.process_time()
        try:
            check(bytes(data))
        except FormatError as error:
            assert "\n" not in str(error)
        else:
            passed += 1
            with safe_open(tmp_path / "case.safetensors", "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    file.get_tensor(name)
        slowest = max(slowest, time.process_time() - start)
    assert passed > 10 and slowest < 0.5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**64) | st.floats() | st.text(max_size=5) | st.just("F32"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "w"]), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_any_json_header(check, tmp_path, header):
    try:
        check(build(header))
    except FormatError:
        return
    try:
        with safe_open(tmp_path / "case.safetensors", "pt"):
            pass
    except SafetensorError as error:
        raise AssertionError("the library refuses a header that the check accepted") from error
