"""Measure the figures in results/: `python benchmarks/run_all.py` runs every comparison, names pick some of them.

Each comparison is a module of this folder with a function main(); heavy ones take minutes, all of them several hours.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

COMPARISONS = (
    "demo",
    "two_bits",
    "end_to_end",
    "decode_speed",
    "qat_step",
    "gptq_memory",
    "winq_step",
    "parq_step",
    "parq_short",
    "binary_linear",
    "sparse_linear",
    "stem_offload",
    "longhorn_decode",
    "moe_inference",
    "layer_sharing",
    "apollo_step",
    "onnx_minilm",
    "static_int8",
    "executorch_smollm2",
    "ternary_decode",
    "guard_head",
    "lion_link",
    "dlrm_speed",
    "row_lookup",
    "checkpoint_stall",
    "checkpoint_faults",
    "recipes",
    "figures",
    "headlines",
    "tables",
)


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parent))
    chosen = sys.argv[1:] or COMPARISONS
    sys.argv[1:] = []
    for name in chosen:
        if name not in COMPARISONS:
            print(f"no comparison is called {name!r}; there are {', '.join(COMPARISONS)}", file=sys.stderr)
            return 2
        print(f"== {name}", flush=True)
        import_module(name).main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
