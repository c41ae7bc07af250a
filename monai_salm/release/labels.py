# SPDX-License-Identifier: Apache-2.0
"""Labels and splits of a cohort: from a table, class folders, an archive that has its own, or files of voxel labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from monai_salm.io import formats, npz, worker
from monai_salm.io.base import Case, Window
from monai_salm.perturbations.budget import Budget, as_window
from monai_salm.release.catalog import Catalog, scan
from monai_salm.release.companions import Companion
from monai_salm.release.earlier import EarlierRelease
from monai_salm.release.folders import class_folders
from monai_salm.release.gates import Refusal
from monai_salm.release.held_out import held_out_ids
from monai_salm.release.pairing import shared_mask
from monai_salm.release.table import LABELS_FILE, LabelRow, alike, match, natural, read_labels
from monai_salm.release.voxels import VoxelLabels, class_names, find_voxel_labels, other_classes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cohort:
    """Labeled cases of an export.

    Args:
        cases: all of them, in the catalog's order, with class index and split.
        classes: names of the classes; ``case.label`` is a position in it, or each voxel of ``read_mask`` is (then the
            first is the background).
        refusals: files and cases that are left out.
        root: the export.
        held_out_ids: cases the study tests on. They are the ``test`` cases where the table names some; otherwise a
            seeded part of the released cases (which are released nonetheless).
        class_voxels: voxels of each class in each case, by sample id; empty where cases are labeled as a whole.
        companions: files that refer to cases and are released with them.
        follows: output folder of the earlier release that these cases follow, if they do.
    """

    cases: tuple[Case, ...]
    classes: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    root: Path
    held_out_ids: frozenset[str] = field(default_factory=frozenset)
    class_voxels: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    companions: tuple[Companion, ...] = ()
    follows: Path | None = None

    @cached_property
    def voxelwise(self) -> bool:
        """Whether each voxel has its own label, see ``case.mask``."""
        return any(case.mask is not None for case in self.cases)

    @property
    def released(self) -> tuple[Case, ...]:
        """Cases that are fitted on, protected and written: all but split ``test``."""
        return tuple(case for case in self.cases if case.split != "test")

    @property
    def patients(self) -> dict[str, list[str]]:
        """Pseudonyms of the patients who have cases of split ``"test"``, and of those who have ``"released"`` ones."""
        test = {case.group for case in self.cases if case.split == "test"}
        return {"test": sorted(test), "released": sorted({case.group for case in self.released})}

    @property
    def held_out(self) -> tuple[Case, ...]:
        """Cases the study tests its victims on, always on their clean files."""
        return tuple(case for case in self.cases if case.sample_id in self.held_out_ids)

    @property
    def train(self) -> tuple[Case, ...]:
        """Cases the study trains its victims on: released, not held out, not split ``val``."""
        return tuple(case for case in self.cases if case.split == "train" and case.sample_id not in self.held_out_ids)

    @property
    def val(self) -> tuple[Case, ...]:
        """Released cases for choices during the study; empty where the table names none."""
        return tuple(case for case in self.cases if case.split == "val" and case.sample_id not in self.held_out_ids)

    def tested(self, split: str = "test") -> tuple[Case, ...]:
        """Cases that a study tests on: those held out, or with ``"val"`` the ones for choices.

        Raises:
            ValueError: When the split is another, or has no case of a class.
        """
        if split not in ("test", "val"):
            raise ValueError(f"eval_split is {split!r}; use 'test' or 'val'")
        cases = self.held_out if split == "test" else self.val
        if not cases:
            patients = len({case.group for case in self.cases})
            raise ValueError(
                f"no case is held out for split {split!r}; name some in the label table's column 'split' (left alone, "
                f"each class needs cases of two patients or more; {patients} are told apart, by DICOM files or by "
                "names such as sub-01 and patient_12), or do not verify"
            )
        missing = set(range(self.voxelwise, len(self.classes))) - self._classes_of(cases)
        nowhere = missing - self._classes_of(self.cases)
        names = _first([self.classes[label] for label in sorted(nowhere or missing)])
        if nowhere and self.voxelwise:
            raise ValueError(
                f"no case has a voxel of class {names}; take it out of 'labels' in dataset.json, or (without one) "
                "repair or leave out the refused label files that name it"
            )
        if missing:
            raise ValueError(
                f"no case of class {names} is held out for split {split!r} ({len(cases)} of others are); give each "
                "class cases of two patients or more, name some in the label table's column 'split', or do not verify"
            )
        return cases

    def _classes_of(self, cases: Sequence[Case]) -> set[int]:
        if not self.voxelwise:
            return {case.label for case in cases}
        counts = [self.class_voxels[case.sample_id] for case in cases]
        return {label for each in counts for label, count in enumerate(each) if count}


def load_cohort(
    dataset_dir: Path | str,
    labels: Path | str | None = None,
    spatial_dims: int = 2,
    window: Window = "auto",
    seed: int = 0,
    require_deidentified: bool = False,
    like: Path | str | None = None,
    budget: Budget | str | float | None = None,
) -> Cohort:
    """Scan an export and label its cases.

    Args:
        dataset_dir: the export, a folder or one archive.
        labels: label table; default: ``labels.csv`` in the export, if there is one.
        spatial_dims: 2 or 3, see :py:func:`monai_salm.release.catalog.scan`.
        window: ``"auto"`` or (low, high) in physical units.
        seed: decides which cases are held out where the table does not.
        require_deidentified: see :py:func:`monai_salm.release.catalog.scan`.
        like: an earlier release whose classes are to be used; its cases are refused (``already_released``).
        budget: see :py:func:`monai_salm.release.catalog.scan`.

    Raises:
        ValueError: When the window is not one, the export holds nothing usable, the table does not fit it, or it names
            classes that the earlier release does not have.
    """
    window = as_window(window)
    earlier = EarlierRelease(like) if like else None
    found = find_labels(dataset_dir, labels)  # before the scan: a typing error should not cost a scan
    if found is None:  # only archives have labels then; raise, if there are none, before every image is decoded
        label_cases(scan(dataset_dir, spatial_dims, check_pixels=False), None, seed=seed)
    catalog = scan(
        dataset_dir,
        spatial_dims,
        window=window,
        voxels=found if isinstance(found, VoxelLabels) else None,
        classes=earlier.classes if earlier else (),
        require_deidentified=require_deidentified,
        budget=None if budget is None else Budget.parse(budget),
    )
    if earlier is None:
        return label_cases(catalog, found, seed=seed)
    others = earlier.without_its_cases(catalog)
    if catalog.cases and not others.cases:
        raise ValueError(f"all {len(catalog.cases)} cases are in the earlier release already; name an export of others")
    cohort = label_cases(others, found, seed=seed, classes=earlier.classes)
    if not cohort.released:
        raise ValueError(f"no case is left: {len(cohort.cases)} are of split test, others refused or released earlier")
    if shared := earlier.shared_patients(cohort.patients):
        logger.warning("%d patients have cases both in split test and released, here or in the earlier release", shared)
    return replace(cohort, follows=earlier.folder)


def find_labels(dataset_dir: Path | str, labels: Path | str | None = None) -> list[LabelRow] | VoxelLabels | None:
    """What an export says about labels: a table, ``dataset.json``, DICOM SEG files or class folders of PNG and TIFF
    images; None where only archives can say it.

    A table ``case,label`` decides that cases are labeled as a whole, whatever else the export holds.

    Args:
        dataset_dir: the export.
        labels: label table; default: ``labels.csv`` in the export, if there is one.

    Raises:
        ValueError: When the table or ``dataset.json`` is broken.
    """
    default = Path(dataset_dir) / LABELS_FILE
    table = Path(labels) if labels else default if default.is_file() else None
    rows = read_labels(table) if table else None
    return find_voxel_labels(Path(dataset_dir), rows) or rows or class_folders(Path(dataset_dir))


def count_classes(
    dataset_dir: Path | str,
    labels: Path | str | None = None,
    spatial_dims: int = 2,
    like: Path | str | None = None,
) -> int:
    """Number of classes that the labels name (of voxels: with the background), without reading an image.

    It sizes a network before the scan. Label files are read only if neither table nor ``dataset.json`` names classes.
    With an earlier release (``like``) they are its classes.

    Raises:
        ValueError: When the export does not exist, or nothing in it tells labels.
    """
    if not Path(dataset_dir).exists():
        raise ValueError(f"there is no export at {dataset_dir}; check dataset_dir")
    if like:
        return len(EarlierRelease(like).classes)
    table = Path(labels) if labels else Path(dataset_dir) / LABELS_FILE
    found = find_labels(dataset_dir, labels) if table.is_file() or not labels else None
    if isinstance(found, VoxelLabels):
        return len(class_names(found))
    if found is not None:
        return len({row.label for row in found})
    root = Path(dataset_dir)
    archives = [root] if root.is_file() else sorted(root.rglob("*.[nN][pP][zZ]"))
    splits = [values for archive in archives for values in worker.call(npz.labels, archive, spatial_dims).values()]
    numbers = {int(label) for values in splits for label in values}
    if not numbers:
        raise ValueError(f"no label table at {table} and no archive: name the table with labels=...")
    return len(numbers)


def label_cases(
    catalog: Catalog,
    rows: Sequence[LabelRow] | VoxelLabels | None,
    *,
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> Cohort:
    """Give every case its class and split; cases without a row are refused (``no_label``).

    A row may name a file, a folder or a UID; one that covers several cases labels them all. Where no row names a case
    of an archive, the archive's own label counts. Where voxels have labels, the scan has paired them already.

    Args:
        catalog: the scanned export.
        rows: from :py:func:`find_labels`; None when the archive brings labels.
        seed: decides which cases are held out where the table names no ``test`` cases.
        classes: names of the classes in their order, of which the cases may lack some; default: those that occur. Of
            voxels the catalog knows them already.

    Raises:
        ValueError: When rows name nothing in the export or contradict each other, fewer than two classes remain, one
            that they name has no usable case, or one of them is not in ``classes``.
    """
    if isinstance(rows, VoxelLabels):
        return _label_voxels(catalog, seed, known=classes is not None)
    unlabeled = [name for names in catalog.refused_names.values() for name in names]
    unlabeled += [name for companion in catalog.companions for name in (companion.name, companion.uid)]
    by_case = match(rows or (), catalog.cases, unlabeled)
    if rows is None and all(case.label < 0 for case in catalog.cases):
        raise ValueError(
            f"the export has no {LABELS_FILE}; write one with the columns case,label[,split] (or, of PNG and TIFF "
            "images alone, move every one into the folder of its class)"
        )
    named, refusals = [], list(catalog.refusals)
    for case in catalog.cases:
        row = by_case.get(case.sample_id)
        if row is not None:
            named.append((replace(case, split=row.split or case.split), row.label))
        elif case.label >= 0:
            named.append((case, str(case.label)))
        else:
            refusals.append(Refusal(case.sample_id, "no_label", "the label table has no row for this case; add one"))
    found = tuple(sorted({label for _, label in named}, key=natural))
    if classes is None:
        _check_classes(named, found)
        lost = {row.label for row in rows or ()} - set(found)
        if lost:
            raise ValueError(
                f"{len(lost)} of {len(found) + len(lost)} classes that the labels name have no usable case; see what "
                "was refused, and repair it or take these classes out of the labels"
            )
    elif set(found) - set(classes):
        raise ValueError(other_classes(set(found) - set(classes)))
    classes = found if classes is None else tuple(classes)
    cases = tuple(replace(case, label=classes.index(label)) for case, label in named)
    held_out = held_out_ids(cases, seed)
    cohort = Cohort(cases, classes, tuple(refusals), catalog.root, held_out, companions=catalog.companions)
    _warn(cohort)
    return cohort


def _label_voxels(catalog: Catalog, seed: int, known: bool) -> Cohort:
    """Cohort of a catalog whose cases have masks.

    Args:
        catalog: the scanned export.
        seed: see :py:func:`label_cases`.
        known: whether the classes are of an earlier release; else each that occurs must occur in released cases.
    """
    tested = [unit for unit in formats.units(catalog.cases) if any(case.split == "test" for case in unit)]
    shared = {case: shared_mask(case) for unit in tested for case in unit if case.split != "test"}
    cases = [case for case in catalog.cases if case not in shared]
    refused = [Refusal(case.sample_id, error.reason, error.detail) for case, error in shared.items()]
    present = {
        case.sample_id: {label for label, count in enumerate(catalog.class_voxels.get(case.sample_id, ())) if count}
        for case in cases
    }
    if not cases or (catalog.class_voxels and not known):
        _check_foreground(cases, present, catalog.classes)
    counts = {case.sample_id: catalog.class_voxels[case.sample_id] for case in cases if catalog.class_voxels}
    held_out = held_out_ids(cases, seed, present)
    refusals = (*catalog.refusals, *refused)
    cohort = Cohort(tuple(cases), catalog.classes, refusals, catalog.root, held_out, counts, catalog.companions)
    _warn(cohort)
    return cohort


def _check_foreground(cases: Sequence[Case], present: Mapping[str, set[int]], classes: Sequence[str]) -> None:
    """Raise unless each class of voxels that occurs, and one at least, occurs in released cases."""
    if not cases:
        raise ValueError("no case with voxel labels is left; see the reasons for what was refused")
    released = set().union(*(present[case.sample_id] for case in cases if case.split != "test"))
    if not released - {0}:
        raise ValueError("no released case has a voxel of any class but the background; check the label files")
    lost = set().union(*present.values()) - released - {0}
    if lost:
        raise _only_tested(len(lost), classes)


def _check_classes(named: Sequence[tuple[Case, str]], classes: Sequence[str]) -> None:
    """Raise unless there are two classes, and each occurs in released cases."""
    if len(classes) < 2:
        found = "no case has a label" if not classes else f"all {len(named)} labeled cases are of one class"
        raise ValueError(f"{found}; a classification cohort needs two or more classes with usable cases")
    released = {label for case, label in named if case.split != "test"}
    if len(released) < len(classes):
        raise _only_tested(len(classes) - len(released), classes)


def _first(names: Sequence[str], most: int = 10) -> str:
    """Some names, and how many more there are: ages or scores in place of labels make a class of every case."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _only_tested(count: int, classes: Sequence[str]) -> ValueError:
    told = f"{count} of {len(classes)} classes occur in split test only; move some of their cases to train"
    return ValueError("; ".join(filter(None, [told, alike(classes)])))


def _warn(cohort: Cohort) -> None:
    """Log what may be a mistake."""
    if shared := set.intersection(*map(set, cohort.patients.values())):
        logger.warning("%d patients have cases both in split test and in a released split", len(shared))
    if told := alike(cohort.classes):
        logger.warning(told)
