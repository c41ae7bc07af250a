# SPDX-License-Identifier: Apache-2.0
"""The table of docs/dicom.md is what the code does; a validator finds no error in a copy that its source had not."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from dicom_files import UIDS, WHEN, bundled, case_of, fitting_delta, write_enhanced, write_mr_series
from pydicom import uid

from monai_salm.io import dicom
from monai_salm.io.base import Case, RefusedError
from monai_salm.release.catalog import scan

DOCS = Path(__file__).parent.parent / "docs" / "dicom.md"
HEAD = "| file | kind of object | transfer syntax | `--dim` | outcome |"
MINI_EXPORT = "| `dicomdirtests` |"
STRICTER_THAN_THE_STANDARD = re.compile(
    r"Attribute present when condition unsatisfied .* Module=<(MRPulseSequence|BulkMotionSynchronization)>"
)
"""dciodvfy wants no sequence parameters in a derived enhanced MR image, though PS3.3 C.8.13.4 lets them be present."""


def protect(case: Case, spatial_dims: int) -> list[tuple[Path, bytes]]:
    """The derived file of each source, verified."""
    delta = fitting_delta(dicom.read(case, spatial_dims))
    options = {"spatial_dims": spatial_dims, "window": "auto", "uids": UIDS, "when": WHEN}
    written = [content for _, content in dicom.protect(case, delta, **options)]
    for path, content in zip(case.files, written, strict=True):
        dicom.verify(path, content, 1, allow_unchanged=spatial_dims == 3)
    return list(zip(case.files, written, strict=True))


def outcome(path: Path) -> tuple[int, str]:
    """``--dim`` and what becomes of a file that is an export of its own."""
    reason = ""
    for spatial_dims in (2, 3):
        try:
            catalog = scan(path, spatial_dims)
        except ValueError as error:
            found = re.search(r"Refused: 1 (\w+)", str(error))
            assert found, "a file is a case or is refused by name"
            reason = found[1]
            if reason == "companion_without_image":
                return 2, "companion: copied with its images under new UIDs"
            if "--dim 3" not in str(error):
                return spatial_dims, f"refused: `{reason}`"
            continue
        ((_, content),) = protect(catalog.cases[0], spatial_dims)
        before, after = dicom.read_header(path), pydicom.filebase.DicomBytesIO(content)
        syntax = pydicom.dcmread(after, stop_before_pixels=True).file_meta.TransferSyntaxUID
        kept = syntax == pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID
        lossy = ", marked lossy" if before.get("LossyImageCompression") == "01" else ""
        return spatial_dims, f"protected, {'same syntax' if kept else 'as ' + syntax.name}{lossy}"
    return 3, f"refused: `{reason}`"


def awkward_table(data_dir: Path) -> list[str]:
    folder = data_dir / "dicom_awkward"
    lines = [HEAD, "| --- | --- | --- | --- | --- |"]
    for row in csv.DictReader((folder / "index.csv").open()):
        spatial_dims, what = outcome(folder / row["file"])
        kind = row["sop"].removesuffix(" Storage") or "none"
        syntax = re.sub(r"Image Compression |, Non-Hierarchical.*|MISSING", "", row["transfer_syntax"]) or "none"
        lines.append(f"| `{row['file']}` | {kind} | {syntax} | {spatial_dims} | {what} |")
    return lines


@pytest.mark.data
def test_table_of_awkward_files_is_true(data_dir: Path) -> None:
    lines = DOCS.read_text().splitlines()
    start = lines.index(HEAD)
    written = lines[start : start + 47]
    assert written == awkward_table(data_dir), "run this file as a script and put its output into docs/dicom.md"


def mini_export_lines() -> list[str]:
    folder, lines = bundled("dicomdirtests"), []
    for spatial_dims in (2, 3):
        catalog = scan(folder, spatial_dims)
        reasons = Counter(refusal.reason for refusal in catalog.refusals)
        refused = ", ".join(f"{count} `{reason}`" for reason, count in sorted(reasons.items()))
        lines.append(f"{MINI_EXPORT} {spatial_dims} | {len(catalog.cases)} | {refused} |")
    return lines


def test_numbers_of_the_mini_export_are_true() -> None:
    assert [line for line in DOCS.read_text().splitlines() if line.startswith(MINI_EXPORT)] == mini_export_lines()


def test_every_reason_for_a_refusal_is_explained() -> None:
    text = DOCS.read_text()
    sources = Path(dicom.__file__).parent.glob("dicom*.py")
    raised = {
        reason
        for source in sources
        if not source.name.startswith("dicom_seg")
        for reason in re.findall(r'(?:RefusedError|refusing)\(\s*"(\w+)"', source.read_text())
    }
    assert raised and not {reason for reason in raised if f"`{reason}`" not in text}


# What the validator says


def errors(path: Path) -> set[str] | None:
    """Errors of dciodvfy, without UIDs; None where it died."""
    run = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, errors="replace", check=False)
    if run.returncode < 0:
        return None
    lines = {re.sub(r"<[\d.]+>", "<UID>", line) for line in run.stderr.splitlines() if line.startswith("Error")}
    return {line for line in lines if not STRICTER_THAN_THE_STANDARD.search(line)}


def sources(folder: Path) -> Iterator[Path]:
    """Every DICOM file at hand, and made ones of the kinds that are not."""
    yield from sorted(bundled("README.txt").parent.rglob("*"))
    if os.environ.get("MONAI_SALM_DATA"):
        data = Path(os.environ["MONAI_SALM_DATA"])
        for name in ("pydicom-data", "dcm_qa_ts"):  # the third folder comes with pydicom
            yield from sorted((data / "dicom_awkward" / name).iterdir())
        yield from sorted(path for path in (data / "dicom_series").rglob("*") if path.is_file())[::30]
    yield write_enhanced(folder / "mr.dcm")
    yield write_enhanced(folder / "ct.dcm", sop_class=uid.EnhancedCTImageStorage)

    def as_pet(dataset: pydicom.Dataset, k: int) -> None:
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = uid.PositronEmissionTomographyImageStorage
        dataset.Modality, dataset.RescaleSlope, dataset.RescaleIntercept = "PT", 1 + k, 0

    yield from write_mr_series(folder, change=as_pet, n=2)


def copies(path: Path) -> bytes | None:
    """The released copy of a file, None where it is refused."""
    try:
        header = dicom.read_header(path)
        if dicom.is_companion(header):
            dicom.read_companion(path)
            return dicom.protect_companion(path, UIDS)[1]
        ((_, content),) = protect(case_of(path), 3 if dicom.is_enhanced(header) else 2)
        return content
    except RefusedError:
        return None


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy is not installed (Debian: dicom3tools)")
def test_no_copy_has_an_error_that_its_source_has_not(tmp_path: Path) -> None:
    checked, worse = Counter(), {}
    for path in sources(tmp_path):
        if not path.is_file() or path.suffix in (".txt", ".csv", ".md"):
            continue
        content = copies(path)
        if content is None:
            continue
        (tmp_path / "copy").write_bytes(content)
        before, after = errors(path), errors(tmp_path / "copy")
        checked[pydicom.dcmread(path, stop_before_pixels=True).SOPClassUID.name] += 1
        if before is not None and (after is None or after - before):
            worse[path.name] = after
    assert not worse
    assert checked.total() >= 50 and {"CT Image Storage", "Enhanced MR Image Storage"} <= set(checked)


if __name__ == "__main__":
    print("\n".join([*awkward_table(Path(os.environ["MONAI_SALM_DATA"])), "", *mini_export_lines()]))
