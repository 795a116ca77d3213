"""metrics.csv: exact numbers, no lost row, no ghost row."""

from __future__ import annotations

from pathlib import Path

from edgewright.training.metrics import MetricsLog, write_loss_plot

ROWS = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-17, "extra": 5.0}, {"step": 3, "loss": 2.0}]


def test_rows_are_on_disk_at_once_and_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = MetricsLog(path)
    for count, row in enumerate(ROWS, 1):
        log.append(row)
        assert len(path.read_text().splitlines()) == 1 + count  # before any close
    assert path.read_text() == "step,loss,extra\n1,0.30000000000000004,\n2,1e-17,5.0\n3,2.0,\n"
    assert MetricsLog(path, keep=3).rows == ROWS


def test_resume_cuts_ghosts_and_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    with MetricsLog(path) as log:
        for row in ROWS:
            log.append(row)
    with path.open("a") as file:
        file.write("4,0.")  # torn by a crash
    with MetricsLog(path, keep=1) as log:
        assert path.read_text() == "step,loss\n1,0.30000000000000004\n"
        log.append(ROWS[1])
    assert path.read_text() == "step,loss,extra\n1,0.30000000000000004,\n2,1e-17,5.0\n"
    with MetricsLog(path) as log:
        assert log.rows == [] and path.read_text() == ""


def test_damaged_or_missing_files_do_not_stop_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert MetricsLog(path, keep=9).rows == []
    path.write_bytes(b"step,loss\n1,2.0\n\xff\xfe,zero\n3,4.0\n")
    assert MetricsLog(path, keep=9).rows == [{"step": 1, "loss": 2.0}]
    path.write_text("step,loss\n1,2.0\n2," + "9" * 200_000 + "\n")  # longer than a cell may be
    assert MetricsLog(path, keep=9).rows == [{"step": 1, "loss": 2.0}]
    write_loss_plot(tmp_path / "loss.png", [{"step": 1}, {"step": 2, "loss": 2.0}], "title")  # a column was renamed


def test_plot_without_a_display(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    rows = [{"step": step, "loss": 1 / step, **({"eval_loss": 0.5} if step % 10 == 0 else {})} for step in range(1, 40)]
    write_loss_plot(tmp_path / "loss.png", rows, "title")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
