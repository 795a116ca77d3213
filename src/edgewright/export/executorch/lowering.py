"""From an exported program to a .pte: expand the packed layers, delegate to XNNPACK, count what it took."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from edgewright.errors import EdgewrightError, Unsupported, in_one_line
from edgewright.export.executorch.graph import RewriteForXnnpack
from edgewright.runtime.executorch_library import library
from edgewright.runtime.pte_metadata import METHOD, pack

if TYPE_CHECKING:
    from torch.export import ExportedProgram

NOT_COUNTED = ("getitem", "sym_size", "sym_numel", "_assert", "alloc")


@dataclass(frozen=True)
class Delegation:
    """How many graph nodes XNNPACK computes, of how many; kept: name -> count of those it does not."""

    delegated: int
    total: int
    kept: dict[str, int]

    @property
    def share(self) -> float:
        return self.delegated / self.total if self.total else 0.0


def lower(program: ExportedProgram, metadata: dict[str, Any]) -> tuple[Any, Delegation]:
    """(ExecuTorch's program manager, ready to be written, and what was delegated).

    Raises Unsupported naming operator and module where no kernel of the runtime computes a node.
    """
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    names = _modules(program)
    with quiet():
        try:
            edge = to_edge_transform_and_lower(
                program,
                transform_passes=[RewriteForXnnpack()],
                partitioner=[_partitioner(metadata.get("kind") == "language")],
                # the verifier knows neither our operator nor the attention kernel; the run afterwards checks that
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods={METHOD: pack(metadata)},
            )
            delegation = _count(edge.exported_program(), names)
            manager = edge.to_executorch(ExecutorchBackendConfig())
        except EdgewrightError:
            raise
        except Exception as error:  # a compiler of many authors: anything it raises means that it cannot
            raise Unsupported(f"ExecuTorch cannot lower the model: {in_one_line(error.__cause__ or error)}") from error
    return manager, delegation


def _partitioner(language: bool) -> Any:
    """XNNPACK's; for language models its compiler runs only the one pass of its own that they need.

    The other sixteen look for batch norms, upsampling, image layouts and such in every delegate, which is most of the
    time of a lowering. The verification would show one that was missed.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    partitioner = XnnpackPartitioner()
    if language:
        name = partitioner.delegation_spec.backend_id
        partitioner.delegation_spec = DelegationSpec(name, [CompileSpec("dqlinear_partitioner", b"")])
    return partitioner


def _count(program: Any, names: dict[str, str]) -> Delegation:
    module = program.graph_module
    kernels = {name.split(".")[0] for name in library()._get_operator_names()}
    delegated, kept = 0, Counter[str]()
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", str(node.target))
        if "executorch_call_delegate" in str(node.target):
            lowered = getattr(module, node.args[0].target)
            inner = lowered.original_module.graph.nodes
            delegated += sum(n.op == "call_function" and _counted(n.target) for n in inner)
            continue
        if not _counted(node.target):
            continue
        kept[name.removesuffix(".default")] += 1
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.name not in kernels:
            where = _where(node, names)
            raise Unsupported(f"ExecuTorch has no kernel for the operator {schema.name}, used in {where}")
    return Delegation(delegated, delegated + sum(kept.values()), dict(kept.most_common()))


def _counted(target: Any) -> bool:
    """Whether a node computes something: indexing into results and arithmetic on sizes do not."""
    return hasattr(target, "_schema") and not any(part in str(target) for part in NOT_COUNTED)


def _modules(program: ExportedProgram) -> dict[str, str]:
    """Operator -> module of its first use in the traced graph, for operators whose trail is lost on the way down."""
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.meta.get("nn_module_stack"):
            found.setdefault(_operator(node), _trail(node))
    return found


def _where(node: Any, names: dict[str, str]) -> str:
    return _trail(node) if node.meta.get("nn_module_stack") else names.get(_operator(node), "the model")


def _operator(node: Any) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(node.target) if schema is None else str(schema.name)


def _trail(node: Any) -> str:
    path, kind = list(node.meta["nn_module_stack"].values())[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    path = path.split("L['self'].")[-1].removeprefix("model.")
    kind = kind.rsplit(".", 1)[-1]
    return f"{kind} itself" if path in ("", "model") else f"module {path} ({kind})"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that ExecuTorch's passes write about every experimental part of itself."""
    loggers = [logging.getLogger(name) for name in ("executorch", "torch.export", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
