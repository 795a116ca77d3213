"""MobileLLM (arXiv 2402.14905): deep and thin language models, with blocks that run twice."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.models.decoder.native import share_blocks as share_blocks
    from edgewright.systems.mobilellm.presets import mobilellm_config as mobilellm_config

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "mobilellm_config": "edgewright.systems.mobilellm.presets",
        "share_blocks": "edgewright.models.decoder.native",
    },
)
