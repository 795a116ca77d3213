"""A Longhorn model as files for ExecuTorch and ONNX Runtime: one for a chunk of the prompt, one for a single token.

    forward(tokens int64 [1, T], window [L, 1, d, w], state [L, 1, d, m]) -> logits [1, V], window, state

T is fixed: `chunk` in prefill.*, 1 in decode.*. A prompt goes through prefill chunk by chunk, what is left over and all
new tokens through decode; the states of all L layers go in and come out, a few kB a layer however long the text is.
The chunk is the scan by doubling, unrolled, so that neither file holds a loop.
deviation: two files with weights of their own and states as inputs, where the plan was one file with two methods and
states inside it: that is what the shared exporters write, verify and open again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewright.checks import check, one_of, whole
from edgewright.errors import Unsupported, UsageError
from edgewright.export.executorch.exporter import export_executorch
from edgewright.export.onnx.exporter import export_onnx
from edgewright.runtime.program import open_program
from edgewright.systems.longhorn.layer import Longhorn

if TYPE_CHECKING:
    from edgewright.runtime.program import Program

SUFFIXES = {"executorch": ".pte", "onnx": ".onnx"}
STAGES = ("prefill", "decode")
CHUNK = 32
MIN_DELEGATED = 0.3  # of the nodes; the scan is made of cheap ones, some of which XNNPACK leaves
NO_GGUF = (
    "a Longhorn layer cannot be written as GGUF: llama.cpp's state-space operator computes decays exp(Delta A), and "
    "Longhorn's 1 - Delta k*k is none of those; use export_longhorn(model, folder, to='executorch') or to='onnx'"
)


class _States:
    """Stands in for a cache while a model is traced: states from tensors, new states into lists."""

    def __init__(self, window: Tensor, state: Tensor) -> None:
        self.window, self.state = window, state
        self.windows: list[Tensor] = []
        self.states: list[Tensor] = []

    def get_max_length(self) -> int:
        return -1

    def get_conv_state(self, layer: int) -> Tensor:
        return self.window[len(self.windows)]

    def get_recurrent_state(self, layer: int) -> Tensor:
        return self.state[len(self.states)]

    def update_conv_state(self, inputs: Tensor, layer: int, conv_kernel_size: int) -> None:
        rows = torch.cat([self.window[len(self.windows)], inputs], dim=-1)
        self.windows.append(rows[..., -conv_kernel_size:])

    def update_recurrent_state(self, state: Tensor, layer: int) -> None:
        self.states.append(state)


class LonghornProgram(nn.Module):
    """The program above around a decoder whose mixers are all Longhorn (or skipped)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, window: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = _States(window, state)
        hidden = self.model.model(input_ids=tokens, cache=states, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[:, -1])
        return logits, torch.stack(states.windows), torch.stack(states.states)

    def first_states(self) -> tuple[Tensor, Tensor]:
        """The states before any token."""
        config = self.model.config
        layers = [self.model.model.layers[b].longhorn for b, m in zip(config.share_map, config.mixers, strict=True)
                  if m == "longhorn"]  # fmt: skip
        shape = (len(layers), 1, layers[0].d_inner)
        return torch.zeros(*shape, layers[0].config.d_conv), torch.zeros(*shape, layers[0].config.d_state)


def export_longhorn(
    model: nn.Module,
    folder: str | Path,
    *,
    to: str = "executorch",
    chunk: int = CHUNK,
    stages: Sequence[str] = STAGES,
    **options: Any,
) -> dict[str, Any]:
    """Write prefill and decode as .pte or .onnx files, each run and compared with the model.

    Args:
        model: a decoder whose mixers are all Longhorn, or skipped.
        folder: gets prefill.* and decode.*.
        to: "executorch" or "onnx".
        chunk: tokens of one call of prefill.
        stages: ("prefill", "decode"), or ("decode",) for one file, which takes a prompt token by token.
        options: of `export_executorch` or `export_onnx`.

    Returns:
        The exporters' own reports by stage.

    Raises:
        Unsupported: GGUF, a model with attention layers, or int8 states.
        UsageError: an option outside these.
    """
    if to == "gguf":
        raise Unsupported(NO_GGUF)
    check("to", to, one_of(*SUFFIXES))
    if "decode" not in stages or not set(stages) <= set(STAGES):
        raise UsageError(f"stages={tuple(stages)!r}; give ('prefill', 'decode') or ('decode',)")
    check("chunk", chunk, whole(2))
    check_pure(model)
    folder = Path(folder)
    program = LonghornProgram(model).eval()
    config: Any = model.config
    done: dict[str, Any] = {}
    for name in stages:
        tokens = chunk if name == "prefill" else 1
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(config.vocab_size, (1, tokens), generator=generator)
        states = [torch.randn(s.shape, generator=generator) for s in program.first_states()]
        path = folder / f"{name}{SUFFIXES[to]}"
        if to == "onnx":
            names = {"input_names": ["tokens", "window", "state"],
                     "output_names": ["logits", "next_window", "next_state"]}  # fmt: skip
            done[name] = export_onnx(
                program, path, example_inputs=[ids, *states], dynamic_batch=False, **{**names, **options}
            )
        else:
            settings = {"min_delegated": MIN_DELEGATED, **options}
            done[name] = export_executorch(program, None, path, example_inputs=[ids, *states], **settings)
    return done


def check_pure(model: Any) -> None:
    """Raise Unsupported for anything but a decoder whose only memory is Longhorn's, in float32."""
    mixers = list(getattr(getattr(model, "config", None), "mixers", None) or [])
    if "longhorn" not in mixers or set(mixers) - {"longhorn", "skip_attention"}:
        kinds = ", ".join(sorted(set(mixers))) or "none"
        raise Unsupported(
            f"export_longhorn takes decoders of Longhorn layers alone; {type(model).__name__} mixes {kinds}"
        )
    layers = [module for module in model.modules() if isinstance(module, Longhorn)]
    if any(layer.config.state_dtype != "float32" for layer in layers):
        raise Unsupported("states of exported files are float32; set config.longhorn['state_dtype'] = 'float32'")


class LonghornSession:
    """Exported files at work: `feed` tokens, `generate` greedily; `window` and `state` are the whole memory.

    Args:
        folder: that `export_longhorn` wrote.
        threads: of the runtime.

    Raises:
        UsageError: the folder holds no decode file.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        candidates = {stage: [Path(folder) / f"{stage}{suffix}" for suffix in SUFFIXES.values()] for stage in STAGES}
        paths = {stage: next((p for p in options if p.is_file()), None) for stage, options in candidates.items()}
        if paths["decode"] is None:
            raise UsageError(f"{folder} holds no decode.pte or decode.onnx; write them with export_longhorn")
        self._programs: dict[str, Program] = {s: open_program(p, threads) for s, p in paths.items() if p is not None}
        prefill = self._programs.get("prefill")
        self.chunk = int(prefill.inputs[0].shape[1] or CHUNK) if prefill is not None else 0  # 0: token by token
        self._shapes = [tuple(int(n or 1) for n in spec.shape) for spec in self._programs["decode"].inputs[1:]]
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.window, self.state = (torch.zeros(shape).numpy() for shape in self._shapes)

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Logits, float32 [V], after the last of `ids`, one token or more."""
        check("number of tokens", len(ids), whole(1))
        start, logits = 0, None
        while start < len(ids):
            stage, count = ("prefill", self.chunk) if 0 < self.chunk <= len(ids) - start else ("decode", 1)
            tokens = torch.tensor([list(ids[start : start + count])]).numpy()
            logits, self.window, self.state = self._programs[stage].run([tokens, self.window, self.state])
            start += count
        return torch.from_numpy(logits)[0]

    def generate(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The token ids that follow, each the likeliest.

        Args:
            ids: of the prompt.
            tokens: how many follow.
        """
        made: list[int] = []
        while len(made) < tokens:
            made.append(int(self.feed(ids if not made else made[-1:]).argmax()))
        return made

    def close(self) -> None:
        """Free both programs."""
        for program in self._programs.values():
            program.close()
