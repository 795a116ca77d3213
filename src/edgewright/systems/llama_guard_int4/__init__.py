"""Llama Guard INT4 (arXiv 2411.17713): a guard model for a phone, pruned, distilled and trained at 4 bits."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.llama_guard_int4.answers import (
        AnswerLoss as AnswerLoss,
        answer_scores as answer_scores,
        score_guard as score_guard,
    )
    from edgewright.systems.llama_guard_int4.model import (
        GuardModel as GuardModel,
        Verdict as Verdict,
        export_guard as export_guard,
        save_guard as save_guard,
    )
    from edgewright.systems.llama_guard_int4.policy import GuardPolicy as GuardPolicy, GuardSettings as GuardSettings

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "AnswerLoss": "edgewright.systems.llama_guard_int4.answers",
        "GuardModel": "edgewright.systems.llama_guard_int4.model",
        "GuardPolicy": "edgewright.systems.llama_guard_int4.policy",
        "GuardSettings": "edgewright.systems.llama_guard_int4.policy",
        "Verdict": "edgewright.systems.llama_guard_int4.model",
        "answer_scores": "edgewright.systems.llama_guard_int4.answers",
        "export_guard": "edgewright.systems.llama_guard_int4.model",
        "save_guard": "edgewright.systems.llama_guard_int4.model",
        "score_guard": "edgewright.systems.llama_guard_int4.answers",
    },
)
