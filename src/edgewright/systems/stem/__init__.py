"""STEM (arXiv 2601.10639): tables of token rows in place of up-projections."""

from typing import TYPE_CHECKING

from edgewright.lazy import lazy

if TYPE_CHECKING:
    from edgewright.systems.stem.convert import capacity_report as capacity_report, stemify as stemify
    from edgewright.systems.stem.edit import edit_rows as edit_rows, override_tokens as override_tokens
    from edgewright.systems.stem.files import load_offloaded as load_offloaded, save_stem as save_stem
    from edgewright.systems.stem.layer import StemConfig as StemConfig, StemFeedForward as StemFeedForward
    from edgewright.systems.stem.training import StemAdamW as StemAdamW, stem_groups as stem_groups

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "StemAdamW": "edgewright.systems.stem.training",
        "StemConfig": "edgewright.systems.stem.layer",
        "StemFeedForward": "edgewright.systems.stem.layer",
        "capacity_report": "edgewright.systems.stem.convert",
        "edit_rows": "edgewright.systems.stem.edit",
        "load_offloaded": "edgewright.systems.stem.files",
        "override_tokens": "edgewright.systems.stem.edit",
        "save_stem": "edgewright.systems.stem.files",
        "stem_groups": "edgewright.systems.stem.training",
        "stemify": "edgewright.systems.stem.convert",
    },
)
