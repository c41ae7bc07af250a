# SPDX-License-Identifier: Apache-2.0
"""The embedded demo cohort: T1-weighted brain MR with simulated lesions, as a hospital would export it.

The anatomy is the MNI152 template with its gray and white matter maps, from the nilearn wheel (no download); MONAI's
random transforms vary it per study. There are two tasks: classification (studies with and without a lesion, DICOM and
NIfTI) and segmentation (images and voxel labels in the Decathlon layout). ``labels.csv`` is written last: an export
that has one is complete.

Example:
    ``python -m monai_salm.cohorts.demo --dim 2 --output build/demo/export``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from monai_salm.cohorts import classification, segmentation

__all__ = ["write_demo_export"]

PLANS = {"classification": classification.plan, "segmentation": segmentation.plan}


def write_demo_export(
    output: str | Path,
    spatial_dims: int,
    seed: int = 0,
    n_patients: int | None = None,
    progress: bool = True,
    task: str = "classification",
) -> bool:
    """Write the demo cohort; the same arguments give the same bytes.

    Args:
        output: folder to write; it is created, and may hold nothing but the same export.
        spatial_dims: 2 for slices or 3 for volumes; see the tasks' `plan` for their files and shapes.
        seed: decides labels, split, names, UIDs and pixels.
        n_patients: number of patients, at least 6; by default 96 in 2D, and in 3D 153 (classification) or 160.
        progress: whether to show a progress bar.
        task: ``"classification"`` or ``"segmentation"``.

    Returns:
        Whether anything was written; False when the export was already there.

    Raises:
        ValueError: When `spatial_dims` is not 2 or 3, `seed` is negative, there are fewer than 6 patients or `task` is
            unknown.
        FileExistsError: When `output` holds anything else than this export.
        ImportError: When nilearn is not installed.
    """
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims is {spatial_dims!r}; use 2 or 3")
    if seed < 0:
        raise ValueError(f"seed is {seed}; use 0 or more")
    if n_patients is not None and not 6 <= n_patients <= 999:
        raise ValueError(f"n_patients is {n_patients}; use 6 to 999, so that no split is empty")
    if task not in PLANS:
        raise ValueError(f"task is {task!r}; use one of {', '.join(PLANS)}")
    output = Path(output)
    plan = PLANS[task](spatial_dims, seed, n_patients)
    if plan.is_written(output):
        return False
    plan.write(output, progress)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``python -m monai_salm.cohorts.demo``."""
    parser = argparse.ArgumentParser(prog="python -m monai_salm.cohorts.demo", description="Write the demo cohort.")
    parser.add_argument("--dim", type=int, choices=(2, 3), required=True, help="2D slices or 3D volumes")
    parser.add_argument("--task", choices=PLANS, default="classification", help="default: classification")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another cohort (default: 0)")
    options = parser.parse_args(arguments)
    try:
        written = write_demo_export(options.output, options.dim, options.seed, task=options.task)
    except (FileExistsError, ImportError, ValueError) as error:
        parser.error(str(error))
    print(f"{options.output}: {'written' if written else 'already there'}")


if __name__ == "__main__":
    main()
