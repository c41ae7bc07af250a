# SPDX-License-Identifier: Apache-2.0
"""Companions of the images: which belong to a release, and what they refer to that is not in it.

A companion (segmentation, contours, report, key objects, presentation state, registration) is released with the images
it refers to, under new UIDs and otherwise as it was. Fail closed: one that refers to no released image is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from monai_salm.io import dicom, worker
from monai_salm.io.base import FileCheck, RefusedError
from monai_salm.release import commit as door
from monai_salm.release.gates import Refused
from monai_salm.release.identity import UidMap, pseudonym
from monai_salm.release.manifest import COMPANION, ManifestRow, read_chain

REFERENCES = f"{door.PRIVATE}/references.jsonl"
"""Chain with a line per companion: how many instances it refers to, and how many of these are not released."""
ALONE = RefusedError(
    "companion_without_image", "it refers to no image of the release; it may describe one that was refused"
)


@dataclass(frozen=True)
class Companion:
    """A file that refers to images and holds none.

    Args:
        sample_id: pseudonym of its SOPInstanceUID.
        file: absolute path.
        name: its POSIX path relative to the export.
        uid: its SOPInstanceUID.
        references: how many instances it refers to, by ``sample_id`` of the case or companion that these are part of;
            ``""`` stands for those that are not in the export or cannot be protected.
    """

    sample_id: str
    file: Path
    name: str
    uid: str
    references: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Number of instances that it refers to."""
        return sum(count for _, count in self.references)

    def lost(self, released: Collection[str]) -> int:
        """Number of instances that it refers to and that are not in the release."""
        return sum(count for owner, count in self.references if owner not in released)


class CompanionFiles:
    """Companions that a scan has found."""

    def __init__(self) -> None:
        self._found: dict[Path, tuple[str, str, frozenset[str]]] = {}

    def add(self, path: Path, name: str) -> None:
        """Take one file; ``name`` is its path relative to the export.

        Raises:
            RefusedError: As ``dicom.read_companion`` does.
        """
        self._found[path] = name, *worker.call(dicom.read_companion, path)

    def uids(self) -> Iterator[tuple[Path, str]]:
        """Each file and its SOPInstanceUID."""
        return ((path, uid) for path, (_, uid, _) in self._found.items())

    def resolve(
        self, cases: Collection[str], owners: Mapping[str, str], broken: Mapping[Path, RefusedError]
    ) -> tuple[list[Companion], list[Refused]]:
        """Divide the companions into those that belong to cases, and all others, which are refused.

        Args:
            cases: ``sample_id`` of every case.
            owners: ``sample_id`` of the case that an instance is part of, by UID.
            broken: files that are refused, with the reason.
        """
        sound = {path: found for path, found in self._found.items() if path not in broken}
        known = {uid: owner for uid, owner in owners.items() if owner in cases}
        known |= {uid: pseudonym(uid) for _, uid, _ in sound.values()}
        companions = []
        for path, (name, uid, instances) in sound.items():
            references = Counter(known.get(instance, "") for instance in instances)
            companions.append(Companion(pseudonym(uid), path, name, uid, tuple(sorted(references.items()))))
        kept = belonging(companions, cases)
        alone = {each.sample_id for each in companions} - {each.sample_id for each in kept}
        refused: list[Refused] = [
            ([self._found[path][0]], error, "") for path, error in broken.items() if path in self._found
        ]
        refused += [([each.name, each.uid], ALONE, "") for each in companions if each.sample_id in alone]
        return kept, refused


def belonging(companions: Sequence[Companion], released: Iterable[str]) -> list[Companion]:
    """Those that refer to a released case, or to another companion that belongs to the release."""
    known, kept = set(released), set()
    while new := {
        companion.sample_id
        for companion in companions
        if companion.sample_id not in kept and any(owner in known for owner, _ in companion.references)
    }:
        kept |= new
        known |= new
    return [companion for companion in companions if companion.sample_id in kept]


def write_companions(
    output_dir: Path, companions: Sequence[Companion], released: Collection[str], uids: UidMap, part: str = ""
) -> tuple[list[ManifestRow], list[tuple[Companion, RefusedError]]]:
    """Write those that belong to the released cases, each verified before it becomes visible.

    Args:
        output_dir: the output folder.
        companions: of the export.
        released: ``sample_id`` of every case that was written.
        uids: the release's UID map.
        part: of the staging folder.

    Returns:
        A row for each file, and what was refused.
    """
    chosen = belonging(companions, released)
    rows = []
    known = {companion.sample_id for companion in chosen}
    refused = [(companion, ALONE) for companion in companions if companion.sample_id not in known]
    for companion in chosen:
        try:
            rows.append(_write(output_dir, companion, uids, part))
        except RefusedError as error:
            refused.append((companion, error))
    return rows, refused


def closure(companions: Sequence[Companion], released: Collection[str]) -> list[dict[str, str | int]]:
    """Records of :py:data:`REFERENCES` for the released companions, so that no reference dangles unseen."""
    return [
        {"sample_id": each.sample_id, "references": each.total, "not_released": each.lost(released)}
        for each in companions
        if each.sample_id in released
    ]


def reference_summary(output_dir: Path) -> str:
    """A line on the companions of a release and what they refer to that is not in it; empty where there are none."""
    counts, _ = read_chain(output_dir / REFERENCES)
    if not counts:
        return ""
    lost = [int(each["not_released"]) for each in counts if each["not_released"]]
    dangling = f", {sum(lost)} of them (in {len(lost)} files) are not in the copy: {REFERENCES}" if lost else ""
    return (
        f"companions: {len(counts)} files with {sum(int(each['references']) for each in counts)} references{dangling}"
    )


def _write(output_dir: Path, companion: Companion, uids: UidMap, part: str) -> ManifestRow:
    name, content = worker.call(dicom.protect_companion, companion.file, uids)
    digest = door.sha256(content)
    if not door.holds(output_dir / door.PROTECTED / name, digest):

        def verify(staged: Path) -> FileCheck:
            worker.call(dicom.verify_companion, companion.file, staged)
            return FileCheck(0, 0.0)

        door.commit(output_dir, [door.Staged(door.PROTECTED / name, content, verify)], part)
    return ManifestRow(
        companion.sample_id,
        name.as_posix(),
        digest,
        *(0, 0.0, 0, 0),
        digest,
        state=COMPANION,
        source=companion.name,
        source_uid=companion.uid,
    )
