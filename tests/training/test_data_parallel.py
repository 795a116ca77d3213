"""Two processes over gloo, under accelerate's DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from edgewright.training import TrainConfig, fit
from tests.processes import run_script
from tests.training import training_toy as toy
from tests.training.training_toy import STEPS, Plain, cross_entropy, data, seeded


def test_two_processes_equal_one_that_accumulates_and_resume(tmp_path: Path) -> None:
    run_script(toy.__file__, "pair", tmp_path)
    model = seeded(Plain)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def loss_function(model, batch):
        return cross_entropy(model, batch), {"first": float(batch["x"][0, 0])}

    result = fit(model, loss_function, data(), TrainConfig(STEPS, 1e-2, accumulation=4), output=tmp_path / "one")
    torch.set_num_threads(threads)
    for rank in range(2):
        assert (tmp_path / f"stopped-{rank}").read_text() == "2"  # at the end of the step, both
        whole, cut = (load_file(tmp_path / f"{name}-{rank}.safetensors") for name in ("whole", "cut"))
        for name, value in model.state_dict().items():
            assert torch.equal(whole[name], cut[name])
            # four shares are added in another order: 1e-6 is a few units in the last place of weights near 1
            torch.testing.assert_close(whole[name], value, rtol=0, atol=1e-6)
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "cut")]
    assert rows[0] == rows[1] and len(rows[0]) == 1 + STEPS
    for line, row in zip(rows[0][1:], result.history, strict=True):
        cells = torch.tensor([float(cell) for cell in line.split(",")])
        torch.testing.assert_close(cells, torch.tensor(list(row.values())), rtol=1e-5, atol=1e-6)  # float32 means
