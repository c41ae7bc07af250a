# SPDX-License-Identifier: Apache-2.0
"""Canaries: what names a patient in an export is in nothing that is shared, logged or shown.

Planted in every text element of DICOM files, file meta and preamble, in NIfTI text fields and extensions, in names of
files and folders. Excepted by design: ``private/``, which is the owner's, and the content of images in ``protected/``:
headers are kept (a protected DICOM file keeps its clinical elements), for protection is not de-identification. UIDs of
DICOM files are looked for there too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cli_runs import STUB
from exports import edit_dicom, write_labels, write_nifti, write_series
from pydicom import Dataset
from pydicom.datadict import DicomDictionary
from pydicom.tag import Tag
from pydicom.uid import generate_uid

from monai_salm import workflows

CANARY = "CANARYDOE"
DATE = "19031207"
ROOT = "1.2.826.0.1.31337."
TEXT_VRS = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT", "AS"}
KEPT = {"Modality", "PhotometricInterpretation", "ImageType", "SpecificCharacterSet", "PatientOrientation"}
"""What decides whether and how the file can be read."""


def plant(dataset: Dataset) -> None:
    """Put a canary into every text element of the standard that a file may have at its top, and into private ones."""
    planted = 0
    for tag, (vr, vm, _, retired, keyword) in DicomDictionary.items():
        group = tag >> 16
        if group not in (0x0008, 0x0010, 0x0018, 0x0020, 0x0032, 0x0038, 0x0040) or keyword in KEPT or retired:
            continue
        if vr in TEXT_VRS and vm == "1":
            short = {"AE": CANARY, "CS": CANARY, "SH": f"{CANARY}{planted % 1000}", "AS": "031Y"}
            dataset.add_new(Tag(tag), vr, short.get(vr, f"{CANARY}^{planted}"))
            planted += vr != "AS"
        elif vr in ("DA", "DT", "TM") and vm == "1":
            dataset.add_new(Tag(tag), vr, {"DA": DATE, "DT": f"{DATE}120000", "TM": "120000"}[vr])
    assert planted > 200
    block = dataset.private_block(0x0099, f"{CANARY} private", create=True)
    block.add_new(1, "LO", CANARY)
    block.add_new(2, "UN", CANARY.encode() + b"!")
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        dataset[keyword].value = generate_uid(ROOT, entropy_srcs=[str(dataset[keyword].value)])
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.SourceApplicationEntityTitle = CANARY
    dataset.preamble = CANARY.encode().ljust(128, b"\0")


def plant_nifti(path: Path, seed: int, shape: tuple[int, ...] = (6, 7, 5)) -> None:
    """A volume with canaries wherever its header holds text."""
    image = nib.load(write_nifti(path, seed, shape))
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = CANARY
    for code in (4, 6):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, f"{CANARY} {DATE}".encode()))
    nib.save(image, path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder, and what each command printed."""
    folder = tmp_path_factory.mktemp("privacy")
    export = folder / "export"
    for index in range(4):
        series = export / f"{CANARY}^JANE{index}" / DATE
        for path in write_series(series, f"{CANARY}{index}", 3, patient=f"{CANARY}{index}", prefix=CANARY):
            edit_dicom(path, plant)
    plant_nifti(export / f"{CANARY}_{DATE}.nii.gz", 1)
    (export / f"{CANARY} letter.txt").write_text(CANARY)
    (export / f"{CANARY}.dcm").write_bytes(bytes(128) + b"DICM" + CANARY.encode() * 50)
    plant_nifti(export / f"torn {CANARY}.nii", 2)
    torn = export / f"torn {CANARY}.nii"
    torn.write_bytes(torn.read_bytes()[:600])
    (export / f"link {CANARY}").symlink_to(export / f"{CANARY} letter.txt")
    rows = [f"{CANARY}^JANE{index}/{DATE},{'ab'[index % 2]}" for index in range(4)]
    write_labels(export, [*rows, f"{CANARY}_{DATE}.nii.gz,a"])
    stub = workflows.copy_bundle("salm_3d_classification", folder / "stub")
    (stub / "configs" / "train.yaml").write_text(STUB)
    out = folder / "out"
    commands = {
        "inspect": ["inspect", export, "--dim", 3],
        "all": ["inspect", export, "--dim", 3, "--all"],
        "slices": ["inspect", export, "--dim", 2, "--all"],
        "gate": ["inspect", export, "--dim", 3, "--require-deidentified"],
        "plan": ["protect", export, out, "--bundle", stub, "--set", "spatial_dims=3", "--dry-run", "--no-verify"],
        "protect": ["protect", export, out, "--bundle", stub, "--no-verify", "--rename"],
        "again": ["protect", export, out, "--bundle", stub, "--no-verify", "--rename"],
        "other": ["protect", export, out, "--bundle", stub, "--no-verify", "--epsilon", "1 stored"],
        "verify": ["verify", out, "--files-only"],
        "fault": ["protect", export, out, "--bundle", stub, "--set", "at_fit=${}[str(list(@cohort.cases))]"],
    }
    code = """
        import json, os, sys
        from monai_salm.cli import main
        for name, arguments in json.loads(sys.argv[1]).items():
            for stream in (sys.stdout, sys.stderr):
                print(f"== {name}", file=stream, flush=True)
            try:
                print("code", main(arguments), flush=True)
            except SystemExit as stop:
                print("code", stop.code, flush=True)
    """
    import json

    listed = json.dumps({name: [str(each) for each in arguments] for name, arguments in commands.items()})
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), listed],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # the stub imports from the tests
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, str] = dict.fromkeys(commands, "")
    for stream in (done.stdout, done.stderr):
        for part in stream.split("== ")[1:]:
            name, _, text = part.partition("\n")
            said[name] += text
    return folder, said


CODES = {"inspect": 3, "all": 3, "slices": 3, "gate": 2, "plan": 3, "protect": 3, "again": 3, "verify": 0, "fault": 1}


def test_every_command_did_its_work(ran):
    folder, said = ran
    for name, code in CODES.items():
        assert f"code {code}\n" in said[name], f"{name}: {said[name]}"
    assert "5 cases of 2 patients: 4 dicom, 1 nifti" in said["inspect"]
    assert "not_deidentified" in said["gate"] and "case-" in said["all"]
    assert len(list((folder / "out" / "protected").rglob("*.dcm"))) == 12
    assert len(list((folder / "out" / "protected" / "images").glob("*.nii.gz"))) == 1


def test_nothing_is_printed_that_names_a_patient(ran):
    _, said = ran
    for name, text in said.items():
        for canary in (CANARY, DATE, ROOT):
            assert canary not in text, f"{name} printed {canary}: {text}"


def test_nothing_is_written_beside_private_that_names_a_patient(ran):
    out = ran[0] / "out"
    files = [path for path in out.rglob("*") if path.is_file() and "private" not in path.parts]
    assert len(files) >= 17
    for path in files:
        name = path.relative_to(out).as_posix()
        content = path.read_bytes()
        canaries = [ROOT] if name.endswith((".dcm", ".nii.gz")) else [CANARY, DATE, ROOT]
        for canary in canaries:
            assert canary not in name and canary.encode() not in content, f"{canary} is in {name}"
        assert content[:128] != CANARY.encode().ljust(128, b"\0")


def test_only_the_owners_journal_tells_which_original_a_file_came_from(ran):
    private = ran[0] / "out" / "private"
    assert CANARY in (private / "manifest.jsonl").read_text() and ROOT in (private / "manifest.jsonl").read_text()
    for name in ("refusals.jsonl", "run.json"):
        text = (private / name).read_text()
        assert CANARY not in text and ROOT not in text


def test_temporary_names_say_nothing(ran, monkeypatch, tmp_path):
    from test_protect import bank_of, nifti_cohort, protect

    from monai_salm.release import commit as door

    seen: list[str] = []
    stage = door._stage
    monkeypatch.setattr(door, "_stage", lambda part, content: (seen.append(part.name), stage(part, content))[1])
    cohort = nifti_cohort(tmp_path / CANARY)
    protect(cohort, bank_of(cohort), tmp_path / "out")
    assert len(seen) > 4 and all(CANARY not in name and len(name) == 37 for name in seen)
    assert np.unique(seen).size == len(seen)
