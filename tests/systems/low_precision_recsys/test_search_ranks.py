"""Two gloo processes share the measurements of a search through its folder and come to the recipe of one process.

Run as a script, this file is the processes: `test_search_ranks.py FOLDER`.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist

from edgewright.systems.dlrm.clicks import ClickData
from edgewright.systems.dlrm.model import DLRM
from edgewright.systems.low_precision_recsys import AccuracyGate, QuantRecipe, search
from edgewright.systems.low_precision_recsys.gate import halves
from edgewright.systems.low_precision_recsys.precision_search import EvaluationCache, sensitivities
from tests.processes import run_group, run_script

OPTIONS = {"table": ("fp32", "int8", "int4-minmax"), "linear": ("fp32", "fp16", "int8-dynamic")}
GATE = AccuracyGate(budget=0.003, resamples=50)


def _process(folder: Path, rank: int) -> None:
    from conftest import make_clicks, make_model  # beside this script

    taken = {"n": 0}
    judge = AccuracyGate.judge

    def counting(*arguments: object) -> object:
        taken["n"] += 1
        return judge(*arguments)  # type: ignore[arg-type]

    AccuracyGate.judge = counting  # type: ignore[assignment,method-assign]
    dist.init_process_group("gloo")
    model = make_model()
    clicks = make_clicks(model, 3000, 1)  # the fixtures of the same names
    bench = EvaluationCache(model, halves(clicks)[0], GATE, [], folder / "shared")
    options = {name: OPTIONS[unit.kind] for name, unit in bench.units.items()}
    sensitivities(bench, options)
    (folder / f"{rank}.json").write_text(json.dumps(taken["n"]))
    search(model, clicks, GATE, log=folder / "log", options=OPTIONS).save(folder / f"recipe-{rank}.json")
    dist.destroy_process_group()


def test_ranks_share_the_work(tmp_path: Path, model: DLRM, clicks: ClickData) -> None:
    run_script(__file__, tmp_path, timeout=180)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [7, 7]  # of 14
    recipes = [QuantRecipe.load(tmp_path / f"recipe-{rank}.json") for rank in range(2)]
    assert recipes[0] == recipes[1] and recipes[0].metrics["confirm"]["upper"] <= 0.003
    alone = search(model, clicks, GATE, options=OPTIONS)
    assert alone.assignment == recipes[0].assignment


if __name__ == "__main__":
    run_group(2, partial(_process, Path(sys.argv[1])))
