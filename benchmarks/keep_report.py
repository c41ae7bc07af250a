# SPDX-License-Identifier: Apache-2.0
"""Keeps a run's report as a small result file: without learning curves and refusals.

python benchmarks/keep_report.py build/demo/report.json benchmarks/results/demo_2d.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(report: str, output: str) -> None:
    """Copy ``report`` to ``output``."""
    write(json.loads(Path(report).read_text()), Path(output))


def write(results: dict[str, Any], output: Path) -> None:
    """Write a report's contents as a result file."""
    for row in results["arms"]:
        row.pop("curve", None)
    results["cohort"].pop("refused", None)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
