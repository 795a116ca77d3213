"""The figures that the README shows, gathered from the other results: results/figures.csv."""

from __future__ import annotations

from edgewright.measure.report import Report
from results import load, save


def main() -> None:
    demo, step, decode, end_to_end = (load(name) for name in ("demo", "qat-step", "decode-speed", "end-to-end"))
    report = Report("figures")
    peer = demo.value("kl", "llama.cpp-Q4_0")
    calibrated = min(demo.value("kl", name) for name in ("rtn", "mse", "gptq"))

    def add(subject: str, value: float, bar: float, unit: str = "") -> None:
        report.add("measured", value, subject=subject, unit=unit)
        report.add("bar", bar, subject=subject, unit=unit)

    add("KL at 4.5 bits without training / llama.cpp's own Q4_0", calibrated / peer, 0.8)
    add("KL at 4.5 bits with training / llama.cpp's own Q4_0", demo.value("kl", "qat") / peer, 0.5)
    add("training step under quantisation / plain step", step.value("step_ratio", "edgewright"), 1.3)
    add("the same for torchao's QAT", step.value("step_ratio", "torchao"), 1.3)
    add("peak memory of that step / plain", step.value("memory_ratio", "edgewright"), 1.15)
    add("the same for torchao's QAT (memory)", step.value("memory_ratio", "torchao"), 1.15)
    for kind in ("Q4_0", "Q8_0"):
        ratio = decode.value("decode_ratio", f"edgewright-{kind}")
        add(f"decoding speed of our {kind} file / llama.cpp's own", ratio, 0.95)
    add("compress --method rtn, files proved (seconds)", end_to_end.value("wall_time", "compress --method rtn"), 60)
    add("compress --method gptq, files proved (seconds)", end_to_end.value("wall_time", "compress --method gptq"), 480)
    add("loading SmolLM2-135M (seconds)", end_to_end.value("wall_time", "load"), 5)
    report.print_table()
    print(save(report, "figures"))
