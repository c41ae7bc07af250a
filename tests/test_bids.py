# SPDX-License-Identifier: Apache-2.0
"""A BIDS tree in, a derivative data set out that the official validator accepts."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from exports import class_map, write_labels
from test_protect import bank_of, protect

from monai_salm.io import formats
from monai_salm.io.base import RefusedError
from monai_salm.release import bids, integrity
from monai_salm.release.catalog import scan
from monai_salm.release.labels import load_cohort
from monai_salm.release.manifest import COMPANION, TABLE, read_manifest
from monai_salm.release.plan import make_plan
from monai_salm.release.protect import read_protected

SUBJECTS = [f"{number:02d}" for number in range(1, 7)]
GROUPS = {"01": "control", "02": "patient", "03": "control", "04": "patient", "05": "control", "06": "patient"}


def save(path: Path, voxels: np.ndarray, repetition: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, np.diag([1, 1, 2, 1]))
    image.header.set_xyzt_units("mm", "sec")
    if repetition:
        image.header["pixdim"][4] = repetition
    nib.save(image, path)


def note(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def tree(tmp_path) -> Path:
    """T1w with labels, functional and diffusion images of six subjects, of whom the last is held out."""
    root = tmp_path / "in"
    for number in SUBJECTS:
        rng, sub = np.random.default_rng(int(number)), root / f"sub-{number}"
        stem = f"sub-{number}"
        save(sub / "anat" / f"{stem}_T1w.nii.gz", rng.integers(0, 1000, (6, 7, 5)).astype(np.int16))
        note(sub / "anat" / f"{stem}_T1w.json", {"Manufacturer": "Maker", "PatientName": "CANARY", "EchoTime": 0.003})
        save(sub / "anat" / f"{stem}_label-lesion_mask.nii.gz", class_map(seed=int(number), classes=2))
        save(sub / "func" / f"{stem}_task-rest_bold.nii.gz", rng.integers(0, 900, (6, 7, 5, 3)).astype(np.int16), 2.0)
        note(sub / "func" / f"{stem}_task-rest_events.tsv", "onset\tduration\n1.0\t2.0\n")
        save(sub / "dwi" / f"{stem}_dwi.nii.gz", rng.integers(0, 900, (6, 7, 5, 2)).astype(np.int16), 2.0)
        note(sub / "dwi" / f"{stem}_dwi.bval", "0 1000\n")
        note(sub / "dwi" / f"{stem}_dwi.bvec", "0 1\n0 0\n0 0\n")
        note(sub / f"{stem}_scans.tsv", f"filename\tacq_time\nanat/{stem}_T1w.nii.gz\t1999-01-01T00:00:00\n")
    note(root / "task-rest_bold.json", {"TaskName": "rest", "RepetitionTime": 2.0})
    note(root / "participants.tsv", "participant_id\tage\n" + "".join(f"sub-{s}\t50\n" for s in SUBJECTS))
    note(root / "participants.json", {"age": {"Description": "in years"}})
    note(root / "README", "A tree of noise for tests. " * 12)
    note(
        root / "dataset_description.json",
        {"Name": "Noise", "BIDSVersion": "1.9.0", "License": "CC0", "Authors": ["A", "B"]},
    )
    note(root / "code" / "convert.py", "pass\n")
    write_labels(root, [f"sub-{s},{GROUPS[s]},{'test' if s == '06' else 'train'}" for s in SUBJECTS])
    return root


def release(root: Path, out: Path) -> Path:
    cohort = load_cohort(root, spatial_dims=3)
    protect(cohort, bank_of(cohort), out)
    return out / "protected"


def validator_errors(folder: Path) -> tuple[int, list[str]]:
    """Exit code of the validator and codes of the errors that it found."""
    command = Path(sys.executable).with_name("bids-validator-deno")
    if not command.is_file():
        pytest.skip("bids-validator-deno is not installed (pip install monai-salm[test])")
    result = subprocess.run([command, "--json", folder], capture_output=True, text=True, timeout=120)
    issues = json.loads(result.stdout)["issues"]["issues"]
    return result.returncode, [f"{each['code']} {each['location']}" for each in issues if each["severity"] == "error"]


def test_the_copy_of_a_tree_is_a_valid_derivative_and_a_misnamed_file_makes_it_invalid(tree, tmp_path):
    folder = release(tree, tmp_path / "out")
    assert validator_errors(folder) == (0, [])
    image = folder / "sub-01" / "anat" / "sub-01_desc-protected_T1w.nii.gz"
    shutil.copy(image, image.with_name("sub-01_T1w_protected.nii.gz"))
    code, errors = validator_errors(folder)
    assert code != 0 and any("sub-01_T1w_protected" in error for error in errors)


def test_a_row_may_name_a_session(tmp_path):
    root = tmp_path / "in"
    note(root / "dataset_description.json", {"Name": "Noise", "BIDSVersion": "1.9.0"})
    for number in ("01", "02"):
        for session in ("pre", "post"):
            stem = f"sub-{number}_ses-{session}"
            folder = root / f"sub-{number}" / f"ses-{session}" / "anat"
            for kind in ("T1w", "T2w"):
                voxels = np.random.default_rng([int(number), *session.encode()]).integers(0, 1000, (6, 7, 5))
                save(folder / f"{stem}_{kind}.nii.gz", voxels.astype(np.int16))
    told = {"sub-01/ses-pre": "ill", "sub-01/ses-post": "well", "sub-02/ses-pre": "ill", "sub-02/ses-post/anat": "well"}
    write_labels(root, [f"{folder},{label}" for folder, label in told.items()])
    cohort = load_cohort(root, spatial_dims=3)
    found = {(case.names[0].split("/")[1], cohort.classes[case.label]) for case in cohort.cases}
    assert len(cohort.cases) == 8 and found == {("ses-pre", "ill"), ("ses-post", "well")}


def test_images_are_renamed_and_what_accompanies_them_is_copied(tree, tmp_path):
    folder = release(tree, tmp_path / "out")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    of_subject = {name.removeprefix("sub-01/") for name in names if name.startswith("sub-01/")}
    assert of_subject == {
        "anat/sub-01_desc-protected_T1w.nii.gz",
        "anat/sub-01_desc-protected_T1w.json",
        "anat/sub-01_label-lesion_mask.nii.gz",
        "func/sub-01_task-rest_desc-protected_bold.nii.gz",
        "func/sub-01_task-rest_desc-protected_bold.json",
        "func/sub-01_task-rest_events.tsv",
        "dwi/sub-01_desc-protected_dwi.nii.gz",
        "dwi/sub-01_desc-protected_dwi.json",
        "dwi/sub-01_dwi.bval",
        "dwi/sub-01_dwi.bvec",
    }
    same = [
        name for name in names if (tree / name).is_file() and name not in ("dataset_description.json", "labels.csv")
    ]
    changed = [name for name in same if (tree / name).read_bytes() != (folder / name).read_bytes()]
    assert changed == ["participants.tsv"] and len(same) == 5 * 4 + 4
    assert not [name for name in names if "sub-06" in name], "who is held out is not in the copy"
    assert "sub-06" not in (folder / "participants.tsv").read_text()
    assert [line.split("\t")[0] for line in (folder / "participants.tsv").read_text().splitlines()] == [
        "participant_id",
        *(f"sub-{number}" for number in SUBJECTS[:5]),
    ]


def test_sidecars_name_their_source_and_no_person(tree, tmp_path):
    folder = release(tree, tmp_path / "out")
    sidecar = json.loads((folder / "sub-02" / "anat" / "sub-02_desc-protected_T1w.json").read_text())
    assert sidecar["Sources"] == ["bids:raw:sub-02/anat/sub-02_T1w.nii.gz"] and sidecar["EchoTime"] == 0.003
    description = json.loads((folder / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative" and description["GeneratedBy"][0]["Name"] == "monai-salm"
    assert description["License"] == "CC0" and description["SourceDatasets"] and "raw" in description["DatasetLinks"]
    assert not [path for path in folder.rglob("*") if path.is_file() and b"CANARY" in path.read_bytes()]
    assert not [path for path in folder.rglob("*") if path.is_file() and b"1999" in path.read_bytes()]


def test_every_file_of_the_copy_is_in_the_manifest_and_the_images_are_exact(tree, tmp_path):
    folder = release(tree, tmp_path / "out")
    rows = {row.file: row for row in read_manifest(tmp_path / "out")}
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == rows.keys()
    assert rows["sub-01/dwi/sub-01_dwi.bval"].state == COMPANION
    assert rows["dataset_description.json"].state == TABLE
    assert not integrity.check(tmp_path / "out").problems
    cohort = load_cohort(tree, spatial_dims=3)
    bank, twins = bank_of(cohort), read_protected(cohort, tmp_path / "out")
    for case in cohort.released:
        before, after = (formats.read(one, 3) for one in (case, twins[case.sample_id]))
        np.testing.assert_array_equal(after.stored.astype(int) - before.stored, bank[case.sample_id])
    (folder / "sub-01" / "dwi" / "sub-01_dwi.bval").write_text("0 2000\n")
    assert integrity.check(tmp_path / "out").problems


def test_voxel_labels_of_a_tree_are_paired_by_the_table_and_stay_as_they_are(tree, tmp_path):
    rows = [f"sub-{s}/anat/sub-{s}_T1w.nii.gz,sub-{s}/anat/sub-{s}_label-lesion_mask.nii.gz" for s in SUBJECTS]
    write_labels(tree, rows, "mask")
    folder = release(tree, tmp_path / "out")
    name = "sub-03/anat/sub-03_label-lesion_mask.nii.gz"
    assert (folder / name).read_bytes() == (tree / name).read_bytes()
    assert not list(folder.glob("sub-*/func")), "images without a label are not in the copy, nor is what goes with them"
    assert validator_errors(folder) == (0, [])


def test_what_is_hidden_behind_the_name_of_a_companion_is_refused(tree, tmp_path):
    anat = tree / "sub-01" / "anat"
    shutil.copy(anat / "sub-01_T1w.nii.gz", anat / "sub-01_dseg.nii.gz")
    (anat / "sub-01_events.tsv").write_bytes(b"\x93\0\1" * 99)
    (anat / "sub-01_physio.tsv.gz").write_bytes(gzip.compress(bytes(99)))
    (anat / "sub-01_T2w.json").write_text("[1, 2]")
    shutil.copy(anat / "sub-01_T1w.nii.gz", anat / "sub-01_channels.tsv")
    (anat / "notes.txt").write_text("about Jane")
    catalog = scan(tree, 3)
    reasons = {catalog.refused_names[each.name][0].split("/")[-1]: each.reason for each in catalog.refusals}
    assert reasons == {
        "sub-01_dseg.nii.gz": "mask_is_image",
        "sub-01_events.tsv": "not_text",
        "sub-01_physio.tsv.gz": "not_text",
        "sub-01_T2w.json": "broken_json",
        "sub-01_channels.tsv": "not_bids",
        "notes.txt": "unknown_file",
        "code": "no_subject",
    }
    folder = release(tree, tmp_path / "out")
    assert not {path.name for path in folder.rglob("*")} & reasons.keys()


def test_a_label_file_of_a_tree_that_names_somebody_is_refused_where_it_is_asked_for(tree):
    anat = tree / "sub-01" / "anat"
    label = np.zeros(nib.load(anat / "sub-01_T1w.nii.gz").shape, np.uint8)
    content = nib.Nifti1Image(label, np.eye(4)).to_bytes()
    with (anat / "sub-01_dseg.nii.gz").open("wb") as stream, gzip.GzipFile("Erika.nii", "wb", fileobj=stream) as packed:
        packed.write(content)
    assert "not_deidentified" not in {refusal.reason for refusal in scan(tree, 3).refusals}
    found = scan(tree, 3, require_deidentified=True)
    assert ["not_deidentified"] == [
        each.reason for each in found.refusals if "dseg" in found.refused_names[each.name][0]
    ]


def test_nothing_of_a_tree_is_unpacked_or_parsed_outside_of_the_child(tree, tmp_path, monkeypatch):
    for module, name in ((bids, "_text"), (bids, "_json"), (gzip, "open"), (zlib, "decompressobj")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("in this process"))
    sidecar = release(tree, tmp_path / "out") / "sub-01" / "anat" / "sub-01_desc-protected_T1w.json"
    assert json.loads(sidecar.read_text())["Manufacturer"] == "Maker"


def test_the_plan_counts_what_goes_along_with_the_images(tree, tmp_path):
    cohort = load_cohort(tree, spatial_dims=3)
    plan = make_plan(cohort, tmp_path / "out", spatial_dims=3, window="auto", budget="2 stored", mask_ratio=0.4)
    folder = release(tree, tmp_path / "out")
    written = {path for path in folder.rglob("*") if path.is_file() and path.name != "labels.csv"}
    beside = written - set(folder.rglob("*_desc-protected_*.nii.gz"))
    assert plan.files["bids", "companion"] == (len(beside), sum(path.stat().st_size for path in beside))
    assert any(path.name.endswith("_mask.nii.gz") for path in beside)


def test_names_of_images():
    assert bids.protected_name("sub-1/sub-1_desc-brain_T1w.nii") == "sub-1/sub-1_desc-brainprotected_T1w.nii"
    with pytest.raises(RefusedError, match="already_protected"):
        bids.protected_name("sub-1/sub-1_desc-protected_T1w.nii")
    for name in ("sub-1/anat/T1w.nii.gz", "sub-1/sub-1_T1w.json", "sub-1/sub-1-T1w.nii"):
        with pytest.raises(RefusedError, match="not_bids"):
            bids.protected_name(name)


@pytest.mark.parametrize("form", ["func/{0}_task-rest_bold.nii.gz", "bids::{0}/func/{0}_task-rest_bold.nii.gz"])
def test_sidecars_name_the_copies_and_no_person_at_any_depth(tree, tmp_path, form):
    for number in SUBJECTS:
        stem = f"sub-{number}"
        path = tree / stem / "anat" / f"{stem}_T1w.json"
        note(
            path,
            {
                "IntendedFor": [form.format(stem), "func/of-another.nii.gz", "bids::sub-02/anat/sub-02_T1w.nii.gz"],
                "global": {"const": {"PatientName": "CANARY", "EchoTime": 3}, "list": [{"OtherPatientIDs": "CANARY"}]},
                "NameOfPhysiciansReadingStudy": "CANARY",
                "ReferencedSOPInstanceUID": "CANARY",
                "PatientMotherBirthName": "CANARY",
                "DateOfSecondaryCapture": "CANARY",
                "InstitutionName": "H\udcf4pital",
            },
        )
        note(tree / stem / f"{stem}_sessions.tsv", "session_id\tacq_time\nses-1\tCANARY\n")
    folder = release(tree, tmp_path / "out")
    sidecar = json.loads((folder / "sub-01" / "anat" / "sub-01_desc-protected_T1w.json").read_text())
    expected = form.format("sub-01").replace("task-rest_bold", "task-rest_desc-protected_bold")
    other = "bids::sub-02/anat/sub-02_desc-protected_T1w.nii.gz"
    assert sidecar["IntendedFor"] == [expected, "func/of-another.nii.gz", other]
    assert (folder / expected.removeprefix("bids::sub-01/").replace("func", "sub-01/func", 1)).is_file()
    assert sidecar["InstitutionName"] == "H\udcf4pital", "what UTF-8 cannot hold stays an escape of JSON"
    assert sidecar["global"] == {"const": {"EchoTime": 3}, "list": [{}]}
    assert not list(folder.rglob("*_sessions.tsv"))
    assert "CANARY" not in "".join(path.read_text() for path in folder.rglob("*.json"))
