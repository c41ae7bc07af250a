# SPDX-License-Identifier: Apache-2.0
"""What a finished release gives to later ones of the same task: its key, its classes, its surrogate, its cases."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from monai_salm.release import commit as door
from monai_salm.release.catalog import Catalog
from monai_salm.release.gates import Refusal
from monai_salm.release.identity import owner_id
from monai_salm.release.manifest import read_manifest

CLASSES = f"{door.PRIVATE}/classes.json"
FOLLOWED = f"{door.PRIVATE}/like.json"
"""Names the folder of the release that this one followed."""
PATIENTS = f"{door.PRIVATE}/patients.json"
"""Pseudonyms of the patients who have cases of split test, and of those who have released ones."""
_MODEL = "models/model.pt"


class EarlierRelease:
    """A release whose surrogate, key and classes later cases are protected with.

    Args:
        output_dir: its output folder, with the private side.

    Raises:
        ValueError: When it lacks what later cases need.
    """

    def __init__(self, output_dir: Path | str) -> None:
        self.folder = Path(output_dir).absolute()
        for name in (CLASSES, _MODEL):
            if not (self.folder / name).is_file():
                raise ValueError(
                    f"{self.folder} has no {name}; name the output folder of a finished release, with its private side"
                )

    @property
    def model_file(self) -> str:
        """Weights of its surrogate."""
        return str(self.folder / _MODEL)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of its classes, in their order."""
        return tuple(json.loads((self.folder / CLASSES).read_text()))

    def _chain(self) -> Iterator[Path]:
        """Its folder, and that of the release that it followed, and so on; all of them share a key."""
        out: Path | None = self.folder
        seen: set[Path] = set()
        while out is not None and out not in seen:
            if not (out / door.PRIVATE).is_dir():
                raise ValueError(
                    f"{self.folder} follows a release that is not at {out} any more; put it back, so that no case is "
                    "released twice under one key"
                )
            seen.add(out)
            yield out
            followed = out / FOLLOWED
            out = Path(json.loads(followed.read_text())["like"]) if followed.is_file() else None

    def shared_patients(self, patients: Mapping[str, Collection[str]]) -> int:
        """How many patients have cases of split test on one side and released ones on the other.

        Args:
            patients: of the later cases, as ``Cohort.patients``.
        """
        shared: set[str] = set()
        for out in self._chain():
            with suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged: only a warning needs it
                its = json.loads((out / PATIENTS).read_text())
                shared |= {*patients["test"]} & {*its["released"]} | {*patients["released"]} & {*its["test"]}
        return len(shared)

    def without_its_cases(self, catalog: Catalog) -> Catalog:
        """Refuse cases that it has protected already: under one key two copies of an image would share their UIDs."""
        released = {row.sample_id for out in self._chain() for row in read_manifest(out)}
        again = [case for case in catalog.cases if owner_id(case) in released]
        detail = "the earlier release has a case of this name; leave it out, or give other data another name"
        refusals = [Refusal(case.sample_id, "already_released", detail) for case in again]
        return replace(
            catalog,
            cases=tuple(case for case in catalog.cases if owner_id(case) not in released),
            refusals=(*catalog.refusals, *refusals),
            refused_names=catalog.refused_names | {case.sample_id: case.names for case in again},
        )
