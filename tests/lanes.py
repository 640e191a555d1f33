"""What the programs that run for long have found, as ``benchmarks/results/reliability.json`` keeps it: figures by lane."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.measure import environment


def note(file: Path | None, lane: str, **figures: Any) -> None:
    """Write the figures of one lane, with the machine's line, and leave those of the others. None writes nothing."""
    if file is not None:
        lanes = json.loads(file.read_text()) if file.exists() else {}
        lanes[lane] = {"environment": environment(), **figures}
        file.write_text(json.dumps(dict(sorted(lanes.items())), indent=1) + "\n")
