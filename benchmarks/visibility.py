# SPDX-License-Identifier: Apache-2.0
"""How visible random signs are on a head CT (one that pydicom brings), beside its own JPEG 2000 copy at 5:1.

python benchmarks/visibility.py --output benchmarks/results/visibility.json
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from pydicom.data import get_testdata_file
from setting import command_line, write

from monai_salm.io.base import Case
from monai_salm.io.dicom import read
from monai_salm.verification.visibility import measure_visibility

IMAGE = "J2K_pixelrep_mismatch.dcm"
TISSUE = (-200, 1500)
"""HU; only voxels between are perturbed."""
PERTURBATIONS = ((2, 0.02), (2, 0.1), (5, 0.02), (5, 0.1), (12, 0.1))
"""HU, and the part of the tissue's voxels."""


def main() -> None:
    """Command line."""
    options = command_line(__doc__).parse_args()
    path = Path(get_testdata_file(IMAGE, download=False))
    image = read(Case("case", "dicom", (path,), ("head",), "patient"), 2)
    tissue = (image.stored > TISSUE[0]) & (image.stored < TISSUE[1])
    rows = []
    for units, ratio in PERTURBATIONS:
        rng = np.random.default_rng(0)
        delta = (tissue & (rng.random(tissue.shape) < ratio)) * rng.choice([-units, units], tissue.shape)
        windows = [asdict(window) for window in measure_visibility(image, delta)]
        rows.append({"hu": units, "ratio": ratio, "windows": windows})
    write("visibility", {"seed": 0, "image": IMAGE, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
