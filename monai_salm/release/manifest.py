# SPDX-License-Identifier: Apache-2.0
"""The manifest: one line per shared file, and the sweep that holds the folder against it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from monai_salm.io import npz
from monai_salm.io.base import Case, Mask
from monai_salm.release import commit as door
from monai_salm.release.catalog import Refusal
from monai_salm.release.identity import pseudonym


class IntegrityError(RuntimeError):
    """The protected folder is not what the manifest says; nothing in it should be shared."""


@dataclass(frozen=True)
class ManifestRow:
    """What is known of one protected file.

    Args:
        sample_id: the case, or a pseudonym of what belongs to many: an archive, a label file, ``dataset.json``.
        file: path below ``protected/``.
        sha256: of the file.
        levels: lattice steps the budget allows; 0 for files that accompany the images, which hold no perturbation.
        max_abs: largest change, in stored units, measured on the written file.
        changed: voxels that differ from the source.
        voxels: all voxels of the file that may change.
        inputs: keyed digest of source, perturbation and settings; tells a repeated run from a different one.
    """

    sample_id: str
    file: str
    sha256: str
    levels: int
    max_abs: float
    changed: int
    voxels: int
    inputs: str


def owner_id(case: Case) -> str:
    """``sample_id`` of the rows of a case's image files: the case, or its archive."""
    return case.sample_id if case.index is None else pseudonym(npz.archive_name(case).as_posix())


def mask_id(mask: Mask) -> str:
    """``sample_id`` of the row of a label file."""
    return pseudonym(mask.name)


def read_manifest(output_dir: Path | str) -> list[ManifestRow]:
    """Rows of a release's manifest; a line torn by a killed run is left out."""
    lines = whole_lines(Path(output_dir) / door.MANIFEST)
    return list({row.file: row for row in (ManifestRow(**json.loads(line)) for line in lines)}.values())


def sweep(root: Path, rows: Iterable[ManifestRow], besides: Collection[str] = ()) -> None:
    """Hold a protected folder against its manifest.

    Args:
        root: the folder.
        rows: of the manifest.
        besides: names of files that may be there without a row.

    Raises:
        IntegrityError: When it holds another file, or lacks one, or one has changed.
    """
    expected = {root / row.file: row.sha256 for row in rows}
    present = {path for path in root.rglob("*") if path.is_symlink() or not path.is_dir()}
    orphans = present - expected.keys() - {root / name for name in besides}
    if orphans:
        raise IntegrityError(
            f"{len(orphans)} files in {root} were not written by this release and may be unprotected; "
            "remove the folder and run again"
        )
    for path, digest in expected.items():
        if path.is_symlink() or not path.is_file() or door.sha256_of(path) != digest:
            raise IntegrityError(f"a file in {root} is missing or changed since it was written; run protect again")


def as_lines(rows: Iterable[ManifestRow | Refusal]) -> str:
    """JSON, one line per row."""
    return "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows)


def whole_lines(path: Path) -> list[str]:
    """Lines of a journal; one torn by a killed run is left out."""
    text = path.read_text() if path.is_file() else ""
    return text[: text.rfind("\n") + 1].splitlines()
