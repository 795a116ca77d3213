"""The golden file: what recipes and exporters give, bit for bit, so that a change of behaviour is never an accident.

`pytest --update-golden TESTS` writes what these tests measure into golden.json; the commit says why it changed.

Floating-point results depend on the processor and on the versions of the libraries. The file says on which of them it
was written; elsewhere only the names of the rows and files are compared, and a warning says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from edgewright.io.atomic import write_text

FILE = Path(__file__).with_name("golden.json")
LIBRARIES = (
    "torch", "transformers", "tokenizers", "numpy", "onnx", "onnxruntime", "onnxscript", "executorch", "torchao",
    "xllamacpp", "scikit-learn",
)  # fmt: skip


@cache
def numerics() -> str:
    """A digest of what sums and roundings depend on: versions, and results of operations that are coded per CPU."""
    known = [platform.machine()]
    for name in LIBRARIES:
        try:
            known.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            known.append(f"no {name}")
    generator = torch.Generator().manual_seed(0)
    digest = hashlib.sha256("\n".join(known).encode())
    for size in (33, 192):
        a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
        image = torch.randn(2, 3, size, size, generator=generator)
        kernel = torch.randn(5, 3, 3, 3, generator=generator)
        results = (
            a @ b, a.double() @ b.double(), a.bfloat16() @ b.bfloat16(), F.conv2d(image, kernel), a.exp(), a.tanh(),
            a.erf(), F.silu(a), a.softmax(-1), F.layer_norm(a, (size,)), a.sum(), a.cumsum(0), a.pow(2).mean().rsqrt(),
            F.scaled_dot_product_attention(a[None, None], b[None, None], a[None, None]),
        )  # fmt: skip
        for result in results:
            digest.update(result.float().numpy().tobytes())
    return digest.hexdigest()


def compare(name: str, measured: dict[str, Any], update: bool) -> None:
    """Assert that `measured` ({"rows": lists of texts that begin with names, "files": name -> digest}) is as before.

    With `update`, write it instead.
    """
    measured = json.loads(json.dumps(measured))
    if update:
        return _write(name, measured)
    golden = json.loads(FILE.read_text())
    before = golden["entries"].get(name)
    assert before is not None, f"golden.json does not know {name}: pytest --update-golden"
    if golden["numerics"] == numerics():
        changed = [row for row in measured["rows"] if row not in before["rows"]]
        changed += [file for file, digest in measured["files"].items() if before["files"].get(file) != digest]
        assert measured == before, f"{name} differs from golden.json in {changed}; if it should: pytest --update-golden"
    else:
        told = f"golden.json is of another processor or other versions: only names of {name} were compared"
        warnings.warn(told, stacklevel=2)
        assert _names(measured) == _names(before)


def _names(entry: dict[str, Any]) -> Any:
    return [row[:2] for row in entry["rows"]], sorted(entry["files"])


def _write(name: str, measured: dict[str, Any]) -> None:
    with open(__file__) as lock:  # workers write in turn
        fcntl.flock(lock, fcntl.LOCK_EX)
        golden = json.loads(FILE.read_text()) if FILE.exists() else {"entries": {}}
        entries = {**golden["entries"], name: measured}
        text = json.dumps({"numerics": numerics(), "entries": dict(sorted(entries.items()))}, indent=1)
        write_text(FILE, text + "\n")
