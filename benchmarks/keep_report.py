# SPDX-License-Identifier: Apache-2.0
"""Keeps a run's report as a small result file: without learning curves and refusals, judged by the rules of today.

python benchmarks/keep_report.py build/demo/report.json benchmarks/results/demo_2d.json

A result file that was kept by an earlier version is judged again where it is both input and output.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from monai_salm.release.commit import write_atomically
from monai_salm.verification.results import build_results
from monai_salm.verification.verdict import VerdictRules


def main(report: str, output: str) -> None:
    """Copy ``report`` to ``output``."""
    results = json.loads(Path(report).read_text())
    taken = inspect.signature(build_results).parameters.keys() & results.keys()
    rules = VerdictRules(**results["verdict_rules"])
    judged = build_results(rows=results["arms"], rules=rules, **{name: results[name] for name in taken})
    write(results | judged, Path(output))


def write(results: dict[str, Any], output: Path) -> None:
    """Write a report's contents as a result file."""
    for row in results["arms"]:
        row.pop("curve", None)
    results["cohort"].pop("refused", None)
    write_atomically(json.dumps(results, indent=1) + "\n", output)


if __name__ == "__main__":
    main(*sys.argv[1:])
