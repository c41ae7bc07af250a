# SPDX-License-Identifier: Apache-2.0
"""How often the interval of a closed gap holds the true value, by the number of networks and seeds, in simulations.

python benchmarks/coverage.py --output benchmarks/results/coverage.json
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from setting import command_line, write

from monai_salm.verification.strength import CONFIDENCE, closed_gap

TRUE = 0.5
"""Closed gap that is drawn around: far from 1, where trainings are cut."""
DRAWS = 1500
"""Studies per case."""


@dataclass(frozen=True)
class Case:
    """A kind of study.

    Args:
        networks: victims.
        seeds: trainings of each.
        between_seeds: standard deviation of the closed gap between trainings of one network.
        between_networks: of the means of networks.
        between_fits: of fits; a study has one.
    """

    networks: int
    seeds: int
    between_seeds: float = 0.1
    between_networks: float = 0.0
    between_fits: float = 0.0


CASES = {
    "one network, two seeds": Case(1, 2),
    "one network, three seeds": Case(1, 3),
    "one network, five seeds": Case(1, 5),
    "two networks alike, three seeds": Case(2, 3),
    "two networks that differ, three seeds": Case(2, 3, between_networks=0.1),
    "as in make demo: two networks, three seeds, a fit": Case(2, 3, between_seeds=0.05, between_fits=0.05),
}


def coverage(case: Case, rng: np.random.Generator) -> float:
    """Share of simulated studies whose interval holds the true value."""
    held = 0
    for _ in range(DRAWS):
        gap = TRUE + rng.normal(0, case.between_fits)
        rows: list[dict[str, Any]] = []
        for victim in map(str, range(case.networks)):
            mean = gap + rng.normal(0, case.between_networks)
            for seed in range(case.seeds):
                levels = {"clean": 1.0, "protected": 1.0 - rng.normal(mean, case.between_seeds), "blind": 0.0}
                rows += [{"arm": arm, "victim": victim, "seed": seed, "score": level} for arm, level in levels.items()]
        found = closed_gap(rows, "score")
        held += found["low"] <= TRUE <= found["high"]
    return held / DRAWS


def main() -> None:
    """Command line."""
    options = command_line(__doc__).parse_args()
    rng, found = np.random.default_rng(0), []
    for name, case in CASES.items():
        found.append({"case": name, **asdict(case), "coverage": coverage(case, rng)})
        print(f"{name}: {found[-1]['coverage']:.2f}", flush=True)
    settings = {"confidence": CONFIDENCE, "seed": 0, "draws": DRAWS, "true": TRUE}
    write("coverage", {**settings, "cases": found}, options.output)


if __name__ == "__main__":
    main()
