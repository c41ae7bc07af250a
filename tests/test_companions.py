# SPDX-License-Identifier: Apache-2.0
"""Segmentations, contours, reports and the like go along with their images under the same new UIDs, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from dicom_files import reason
from exports import edit_dicom, write_labels, write_segmentation, write_series
from pydicom import Dataset, dcmread, uid
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from test_protect import bank_of, protect, tree

from monai_salm.io import dicom
from monai_salm.release.catalog import scan
from monai_salm.release.companions import REFERENCES, reference_summary
from monai_salm.release.custody import KEY, read_refusals
from monai_salm.release.identity import UidMap, load_or_create_key
from monai_salm.release.integrity import check
from monai_salm.release.labels import Cohort, load_cohort
from monai_salm.release.listing import counts_line
from monai_salm.release.manifest import COMPANION
from monai_salm.release.plan import make_plan
from monai_salm.release.shards import Shard

CLASSES = {
    "rtstruct": uid.RTStructureSetStorage,
    "registration": uid.SpatialRegistrationStorage,
    "report": uid.ComprehensiveSRStorage,
}


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def item(**attributes: Any) -> Dataset:
    made = Dataset()
    for keyword, value in attributes.items():
        setattr(made, keyword, value)
    return made


def reference(source: Dataset) -> Dataset:
    return item(ReferencedSOPClassUID=source.SOPClassUID, ReferencedSOPInstanceUID=source.SOPInstanceUID)


def write_referring(
    path: Path, kind: str, sources: list[Path], change: Callable[[Dataset], None] | None = None
) -> Path:
    """A file of a kind that refers to slices, as deep as such files do."""
    images = [dcmread(source, stop_before_pixels=True) for source in sources]
    dataset = dcmread(get_testdata_file("CT_small.dcm", download=False), stop_before_pixels=True)
    for element in list(dataset):
        if element.tag.group not in (0x0008, 0x0010) or element.keyword == "ImageType":
            del dataset[element.tag]
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CLASSES[kind]
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    dataset.StudyInstanceUID = images[0].StudyInstanceUID
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[path.name, "series"])
    listed = [reference(image) for image in images]
    if kind == "rtstruct":
        series = item(SeriesInstanceUID=images[0].SeriesInstanceUID, ContourImageSequence=listed)
        study = item(
            ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",
            ReferencedSOPInstanceUID=images[0].StudyInstanceUID,
            RTReferencedSeriesSequence=[series],
        )
        frame = item(FrameOfReferenceUID=images[0].FrameOfReferenceUID, RTReferencedStudySequence=[study])
        dataset.ReferencedFrameOfReferenceSequence = [frame]
        contour = item(ContourImageSequence=listed[:1], ContourData=[1.0, 2.0, 3.0])
        dataset.ROIContourSequence = [item(ContourSequence=[contour], ReferencedROINumber=1)]
    elif kind == "registration":
        dataset.FrameOfReferenceUID = images[0].FrameOfReferenceUID
        dataset.RegistrationSequence = [item(ReferencedImageSequence=listed)]
    else:
        image = item(ValueType="IMAGE", RelationshipType="CONTAINS", ReferencedSOPSequence=listed[:1])
        dataset.ValueType, dataset.ContentSequence = "CONTAINER", [image]
        series = item(SeriesInstanceUID=images[0].SeriesInstanceUID, ReferencedSOPSequence=listed)
        evidence = item(StudyInstanceUID=images[0].StudyInstanceUID, ReferencedSeriesSequence=[series])
        dataset.CurrentRequestedProcedureEvidenceSequence = [evidence]
    if change:
        change(dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path)
    return path


def write_key_objects(path: Path, sources: list[Path]) -> Path:
    images = [dcmread(source) for source in sources]
    content = hd.ko.KeyObjectSelection(
        document_title=hd.sr.CodedConcept("113000", "DCM", "Of Interest"), referenced_objects=images[:2]
    )
    document = hd.ko.KeyObjectSelectionDocument(
        evidence=images[:2],
        content=content,
        series_instance_uid=generate_uid(entropy_srcs=[path.name, "series"]),
        series_number=8,
        sop_instance_uid=generate_uid(entropy_srcs=[path.name]),
        instance_number=1,
        manufacturer="Test",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    document.save_as(path)
    return path


def write_export(root: Path, *, refuse: str = "") -> Path:
    """Series A to D with two classes; of A and B one companion of each kind. ``refuse`` is broken in one slice."""
    series = {name: write_series(root / name, name, patient=f"P{name}") for name in "ABCD"}
    pixels = np.random.default_rng(0).random((4, 16, 16, 1)) < 0.4
    write_segmentation(root / "more" / "seg.dcm", sorted(series["A"]), pixels, ("Liver",))
    for kind in CLASSES:
        write_referring(root / "more" / f"{kind}.dcm", kind, series["A"])
    write_key_objects(root / "more" / "keys.dcm", series["A"])
    write_referring(root / "more" / "both.dcm", "report", [*series["A"][:2], *series["B"][:3]])
    write_referring(root / "more" / "only_b.dcm", "rtstruct", series["B"])
    write_labels(root, [f"{name},{'xy'[index % 2]}" for index, name in enumerate("ABCD")])
    if refuse:
        edit_dicom(series[refuse][0], lambda dataset: setattr(dataset, "PhotometricInterpretation", "RGB"))
    return root


def release(root: Path, out: Path, **options: Any) -> tuple[Cohort, dict[str, Path]]:
    """The cohort, and the released companions by the name of their original."""
    cohort = load_cohort(root, spatial_dims=3)
    rows = protect(cohort, bank_of(cohort), out, **options)
    return cohort, {Path(row.source).name: out / "protected" / row.file for row in rows if row.state == COMPANION}


def uids_in(dataset: Dataset) -> Iterator[tuple[str, str]]:
    for element in dataset.iterall():
        if element.VR == "UI" and element.value:
            values = [element.value] if isinstance(element.value, str) else element.value
            yield from ((element.keyword, str(value)) for value in values)


def test_companions_of_every_kind_follow_their_images(tmp_path: Path) -> None:
    out = tmp_path / "out"
    cohort, found = release(write_export(tmp_path / "in"), out)
    assert sorted(found) == sorted(
        ["seg.dcm", "rtstruct.dcm", "registration.dcm", "report.dcm", "keys.dcm", "both.dcm", "only_b.dcm"]
    )
    assert not read_refusals(out) and len(cohort.companions) == 7
    written = {dcmread(path).SOPInstanceUID for path in (out / "protected").rglob("*.dcm")}
    files = [path for path in (tmp_path / "in").rglob("*") if path.is_file() and path.suffix != ".csv"]
    sources = {dcmread(path).SOPInstanceUID for path in files}
    uids = UidMap(load_or_create_key(out / KEY))
    for name, path in found.items():
        before, after = dcmread(tmp_path / "in" / "more" / name), dcmread(path)
        assert after.SOPInstanceUID == uids(before.SOPInstanceUID) and path.stem == after.SOPInstanceUID
        pairs = list(zip(uids_in(before), uids_in(after), strict=True))
        instances = [(old, new) for (keyword, old), (_, new) in pairs if keyword == "ReferencedSOPInstanceUID"]
        images = [new for old, new in instances if old in sources]
        assert images and set(images) <= written and not {new for _, new in instances} & sources
        assert before.get("PixelData") == after.get("PixelData")
        assert after.PatientName == before.PatientName
    assert check(out).files == {"protected": 16, "companion": 7, "table": 1}


def test_segmentation_is_found_by_the_new_uids(tmp_path: Path) -> None:
    _, found = release(write_export(tmp_path / "in"), tmp_path / "out")
    segmentation = hd.seg.segread(found["seg.dcm"])
    series = {dcmread(path).SeriesInstanceUID for path in (tmp_path / "out" / "protected").rglob("*.dcm")}
    listed = segmentation.ReferencedSeriesSequence[0]
    assert listed.SeriesInstanceUID in series
    instances = [each.ReferencedSOPInstanceUID for each in listed.ReferencedInstanceSequence]
    pixels = segmentation.get_pixels_by_source_instance(instances)
    original = hd.seg.segread(tmp_path / "in" / "more" / "seg.dcm")
    before = [each.ReferencedSOPInstanceUID for each in original.ReferencedSeriesSequence[0].ReferencedInstanceSequence]
    assert np.array_equal(pixels, original.get_pixels_by_source_instance(before)) and pixels.any()


def test_companion_of_refused_images_is_refused_and_lost_references_are_counted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, found = release(write_export(tmp_path / "in", refuse="B"), out)
    assert "only_b.dcm" not in found and "both.dcm" in found
    assert sorted(refusal.reason for refusal in read_refusals(out)) == [
        "companion_without_image",
        "unsupported_photometric",
    ]
    listed = [json.loads(line) for line in (out / REFERENCES).read_text().splitlines()]
    assert sorted((each["references"], each["not_released"]) for each in listed)[-1] == (5, 3)
    assert sum(each["not_released"] for each in listed) == 3
    assert reference_summary(out).endswith(", 3 of them (in 1 files) are not in the copy: private/references.jsonl")
    assert not reference_summary(tmp_path)


def test_companion_of_a_case_that_fails_at_the_last_moment_is_refused_too(tmp_path: Path) -> None:
    cohort = load_cohort(write_export(tmp_path / "in"), spatial_dims=3)
    bank = bank_of(cohort)
    case = next(case for case in cohort.cases if case.files[0].parent.name == "B")
    del bank[case.sample_id]
    rows = protect(cohort, bank, tmp_path / "out")
    released = [Path(row.source).name for row in rows if row.state == COMPANION]
    assert "only_b.dcm" not in released and "both.dcm" in released
    assert {refusal.reason for refusal in read_refusals(tmp_path / "out")} == {
        "no_perturbation",
        "companion_without_image",
    }


def test_a_shard_that_is_written_again_forgets_companions_that_were_refused_before(tmp_path: Path) -> None:
    cohort = load_cohort(write_export(tmp_path / "in"), spatial_dims=3)
    bank = bank_of(cohort)
    later = next(case for case in cohort.cases if case.files[0].parent.name == "B")
    lacking = {name: delta for name, delta in bank.items() if name != later.sample_id}
    out, key = tmp_path / "out", tmp_path / "key"
    key.write_bytes(bytes(32))  # one with which B is not alone in its shard
    key.chmod(0o600)
    for deltas, refused in ((lacking, {"no_perturbation", "companion_without_image"}), (bank, set())):
        for index in (1, 2):
            protect(cohort, deltas, out, shard=Shard(index, 2), key_file=key)
        assert {refusal.reason for refusal in read_refusals(out)} == refused
        assert not check(out).problems


def test_companion_of_a_companion_goes_along(tmp_path: Path) -> None:
    root = write_export(tmp_path / "in", refuse="B")
    write_referring(root / "more" / "about_seg.dcm", "report", [root / "more" / "seg.dcm"])
    write_referring(root / "more" / "about_only_b.dcm", "report", [root / "more" / "only_b.dcm"])
    _, found = release(root, tmp_path / "out")
    assert "about_seg.dcm" in found and "about_only_b.dcm" not in found


def test_held_out_images_take_their_companions_with_them(tmp_path: Path) -> None:
    root = write_export(tmp_path / "in")
    write_labels(root, ["A,x,train", "B,y,test", "C,x,train", "D,y,train"])
    _, found = release(root, tmp_path / "out")
    assert "only_b.dcm" not in found and "both.dcm" in found


def test_a_second_run_and_shards_write_the_same_companions(tmp_path: Path) -> None:
    root = write_export(tmp_path / "in", refuse="B")
    _, found = release(root, tmp_path / "out")
    before = tree(tmp_path / "out")
    release(root, tmp_path / "out")
    assert tree(tmp_path / "out") == before
    key = tmp_path / "out" / KEY
    for index in (1, 2):
        release(root, tmp_path / "parts", shard=Shard(index, 2), key_file=key)
    protected = {name: digest for name, digest in before.items() if name.startswith("protected/")}
    parts = {name: digest for name, digest in tree(tmp_path / "parts").items() if name.startswith("protected/")}
    assert parts == protected and not check(tmp_path / "parts").problems
    assert "companion_without_image" in {refusal.reason for refusal in read_refusals(tmp_path / "parts")}


def with_pixels(dataset: Dataset) -> None:
    dataset.add_new("PixelData", "OW", bytes(512))
    dataset.Rows = dataset.Columns = 16


@pytest.mark.parametrize(
    ("refused", "change"),
    [
        ("companion_with_pixels", with_pixels),
        ("companion_with_pixels", lambda dataset: setattr(dataset, "EncapsulatedDocument", b"%PDF")),
        ("missing_uid", lambda dataset: setattr(dataset, "StudyInstanceUID", "")),
        ("unsupported_sop_class", lambda dataset: setattr(dataset, "SOPClassUID", uid.RTDoseStorage)),
        ("unsupported_sop_class", lambda dataset: setattr(dataset, "SOPClassUID", uid.EncapsulatedPDFStorage)),
        ("companion_without_image", lambda dataset: delattr(dataset, "CurrentRequestedProcedureEvidenceSequence")),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, refused: str, change: Callable[[Dataset], None]) -> None:
    series = write_series(tmp_path / "A", "A")

    def change_all(dataset: Dataset) -> None:
        if refused == "companion_without_image":
            del dataset.ContentSequence
        change(dataset)

    write_referring(tmp_path / "report.dcm", "report", series, change_all)
    catalog = scan(tmp_path, 3)
    assert [refusal.reason for refusal in catalog.refusals] == [refused] and not catalog.companions


def test_two_companions_of_one_uid_are_refused(tmp_path: Path) -> None:
    series = write_series(tmp_path / "A", "A")
    path = write_referring(tmp_path / "report.dcm", "report", series)
    (tmp_path / "copy.dcm").write_bytes(path.read_bytes())
    assert [refusal.reason for refusal in scan(tmp_path, 3).refusals] == ["duplicate_uid"] * 2


def test_2d_companions_follow_single_images(tmp_path: Path) -> None:
    series = write_series(tmp_path / "A", "A")
    write_referring(tmp_path / "report.dcm", "report", series[:2])
    (companion,) = scan(tmp_path, 2).companions
    assert companion.total == 2 and companion.lost({owner for owner, _ in companion.references}) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda dataset: setattr(dataset, "PatientName", "Other"),
        lambda dataset: setattr(dataset.ROIContourSequence[0].ContourSequence[0], "ContourData", [9.0, 2.0, 3.0]),
        lambda dataset: setattr(dataset, "SOPInstanceUID", "1.2.3"),
        lambda dataset: dataset.ROIContourSequence[0].ContourSequence.append(Dataset()),
        lambda dataset: setattr(dataset, "preamble", b"MZ" + bytes(126)),
        lambda dataset: setattr(dataset, "SOPClassUID", uid.CTImageStorage),
    ],
)
def test_verification_finds_what_must_not_be(tmp_path: Path, change: Callable[[Dataset], None]) -> None:
    source = write_referring(tmp_path / "rtstruct.dcm", "rtstruct", write_series(tmp_path / "A", "A"))
    _, content = dicom.protect_companion(source, UidMap(bytes(32)))
    (tmp_path / "written.dcm").write_bytes(content)
    dicom.verify_companion(source, tmp_path / "written.dcm")
    edit_dicom(tmp_path / "written.dcm", change)
    assert reason(lambda: dicom.verify_companion(source, tmp_path / "written.dcm")) == "verification_failed"
    assert reason(lambda: dicom.verify_companion(source, source)) == "verification_failed"


def test_big_endian_segmentation_keeps_its_pixels(tmp_path: Path) -> None:
    source = Path(get_testdata_file("liver_expb_1frame.dcm", download=False))
    _, content = dicom.protect_companion(source, UidMap(bytes(32)))
    (tmp_path / "written.dcm").write_bytes(content)
    dicom.verify_companion(source, tmp_path / "written.dcm")
    twin = pydicom.dcmread(get_testdata_file("liver_1frame.dcm", download=False))
    assert np.array_equal(dcmread(tmp_path / "written.dcm").pixel_array, twin.pixel_array)


def test_plan_and_listing_count_companions(tmp_path: Path) -> None:
    root = write_export(tmp_path / "in", refuse="B")
    catalog, cohort = scan(root, 3), load_cohort(root, spatial_dims=3)
    assert counts_line(catalog, cohort).endswith("; 6 companions go along with them")
    options = {"spatial_dims": 3, "window": "auto", "budget": "2 stored", "mask_ratio": 0.4}
    plan = make_plan(cohort, tmp_path / "out", **options)
    sizes = [companion.file.stat().st_size for companion in cohort.companions]
    assert plan.files["dicom", "companion"] == (6, sum(sizes)) and plan.files["dicom", "protected"][0] == 12
    assert plan.copy_bytes and plan.copy_bytes > sum(sizes)
