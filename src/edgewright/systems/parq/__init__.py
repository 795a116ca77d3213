"""PARQ (arXiv 2503.15748): quantisation inside the optimizer, by proximal steps that harden into a grid."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.parq.lsbq import LSBQ as LSBQ, Uniform as Uniform
    from edgewright.systems.parq.model import convert_parq_ as convert_parq_, quantized_groups as quantized_groups
    from edgewright.systems.parq.optimizer import QuantOptimizer as QuantOptimizer
    from edgewright.systems.parq.proximal import (
        AProx as AProx,
        ProxBinaryRelax as ProxBinaryRelax,
        ProxHard as ProxHard,
        ProxPARQ as ProxPARQ,
        ProxSoft as ProxSoft,
        par_penalty as par_penalty,
        prox_par as prox_par,
    )

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "AProx": "edgewright.systems.parq.proximal",
        "LSBQ": "edgewright.systems.parq.lsbq",
        "ProxBinaryRelax": "edgewright.systems.parq.proximal",
        "ProxHard": "edgewright.systems.parq.proximal",
        "ProxPARQ": "edgewright.systems.parq.proximal",
        "ProxSoft": "edgewright.systems.parq.proximal",
        "QuantOptimizer": "edgewright.systems.parq.optimizer",
        "Uniform": "edgewright.systems.parq.lsbq",
        "convert_parq_": "edgewright.systems.parq.model",
        "par_penalty": "edgewright.systems.parq.proximal",
        "prox_par": "edgewright.systems.parq.proximal",
        "quantized_groups": "edgewright.systems.parq.model",
    },
)
