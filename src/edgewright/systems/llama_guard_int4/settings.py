"""What is kept beside a guard's weights: its policy, threshold and form, as guard.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from edgewright.errors import FormatError, UsageError
from edgewright.io.atomic import write_text
from edgewright.io.json_file import read_object
from edgewright.io.typed import from_json
from edgewright.quantization.config import ActivationConfig
from edgewright.systems.llama_guard_int4.policy import GuardPolicy

SETTINGS = "guard.json"


@dataclass(frozen=True)
class GuardSettings:
    """What is kept beside a guard's weights. program: name of an exported file, see `guard_program`."""

    policy: GuardPolicy
    threshold: float = 0.5
    activation: ActivationConfig | None = None
    program: str | None = None


def write_settings(settings: GuardSettings, folder: str | Path) -> None:
    """The policy as guard.json."""
    write_text(Path(folder) / SETTINGS, json.dumps(asdict(settings), indent=1, ensure_ascii=False) + "\n")


def read_settings(folder: str | Path) -> GuardSettings:
    """The policy beside a saved guard. Raises UsageError without one, FormatError for a broken one."""
    path = Path(folder) / SETTINGS
    try:
        data = read_object(path)
        activation = data["activation"]
        program = data["program"]
        if program is not None and Path(program).name != program:
            raise ValueError(f"the program {program!r} is not a file of this folder")
        return GuardSettings(
            from_json(GuardPolicy, data["policy"], path),
            float(data["threshold"]),
            None if activation is None else from_json(ActivationConfig, activation, path),
            program,
        )
    except UsageError as error:
        raise UsageError(f"{folder} holds no guard ({error}); save_guard writes one") from error
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} does not describe a guard: {error}") from error
