# SPDX-License-Identifier: Apache-2.0
"""Files made to harm: each becomes a reason, the run goes on, and nothing unprotected gets out."""

from __future__ import annotations

import gzip
import io
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import hostile_codecs
import nibabel as nib
import numpy as np
import pytest
from exports import edit_dicom, write_nifti, write_series
from mutations import bank_of, cohort_of, deep_sequence, mutants, run, sources, with_value
from pydicom import dcmread
from pydicom.data import get_testdata_file

from monai_salm import cli
from monai_salm.cli.codes import NOT_PROTECTED
from monai_salm.io import dicom, formats, nifti, worker
from monai_salm.io.dicom_parse import LARGE_PRIVATE_BYTES, MAX_DEPTH
from monai_salm.release import pixel_check
from monai_salm.release.catalog import scan
from monai_salm.release.custody import read_refusals
from monai_salm.release.manifest import PROTECTED
from monai_salm.release.protect import protect_cohort

DATA = os.environ.get("MONAI_SALM_DATA")
MUTANTS = 2000
BATCH = 250


def bundled(name: str) -> bytes:
    return Path(get_testdata_file(name, download=False)).read_bytes()


def nifti_head(shape: tuple[int, ...], dtype: type = np.int16) -> bytes:
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header.binaryblock + bytes(4)


def zeros(size: int) -> bytes:
    """A gzip stream of so many zeros."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


def png(width: int, height: int, packed: bytes) -> bytes:
    def chunk(kind: bytes, value: bytes) -> bytes:
        return struct.pack(">I", len(value)) + kind + value + struct.pack(">I", zlib.crc32(kind + value))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def big_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "val", "test"):
            for kind in ("images", "labels"):
                archive.writestr(f"{split}_{kind}.npy", bytes(1000))
    content = buffer.getvalue()  # every size that the directory tells becomes 8 EiB - 1, or as much as fits
    return re.sub(
        rb"PK\x01\x02.{46}", lambda found: found[0][:24] + b"\xfe\xff\xff\x7f" + found[0][28:], content, flags=re.S
    )


def long_name() -> bytes:
    """A gzip stream whose file name never ends."""
    return b"\x1f\x8b\x08\x08" + bytes(6) + b"x" * (8 << 20)


def before_pixels(content: bytes, inserted: bytes) -> bytes:
    at = content.rindex(b"\xe0\x7f\x10\x00")
    return content[:at] + inserted + content[at:]


def nested(depth: int, *, defined: bool = False) -> bytes:
    return before_pixels(bundled("CT_small.dcm"), deep_sequence(depth, defined=defined))


def large_header() -> bytes:
    element = struct.pack("<HH", 0x7FDF, 0x1001) + b"OB\0\0" + struct.pack("<I", 65 << 20) + bytes(65 << 20)
    return before_pixels(bundled("CT_small.dcm"), element)


def small_png(packed: bytes) -> bytes:
    return png(20, 20, packed)


ATTACKS: dict[str, tuple[int, Callable[[], bytes], str]] = {
    "pixels that no file can hold": (2, lambda: with_size(bundled("MR_small_RLE.dcm"), 0xFFFF), "over_budget"),
    "a thousandfold expansion": (2, lambda: with_size(bundled("MR_small_jp2klossless.dcm"), 4000), "over_budget"),
    "more pixels than there are": (2, lambda: with_size(bundled("CT_small.dcm"), 900), "truncated_pixel_data"),
    "another codestream": (2, lambda: with_size(bundled("MR_small_jpeg_ls_lossless.dcm"), 65), "codestream_mismatch"),
    "many samples": (2, lambda: with_value(bundled("JPGExtended.dcm"), "SamplesPerPixel", b"\xff\xff"), "over_budget"),
    "a deflated file": (2, lambda: bundled("image_dfl.dcm"), "unsupported_transfer_syntax"),
    "deep sequences": (2, lambda: nested(5000), "nested_too_deep"),
    "deep sequences with lengths": (2, lambda: nested(900, defined=True), "nested_too_deep"),
    "one sequence too deep": (2, lambda: nested(MAX_DEPTH + 1), "nested_too_deep"),
    "a header without end": (2, large_header, "over_budget"),
    "a lying header": (3, lambda: nifti_head((30000, 30000, 300)) + bytes(1000), "truncated_file"),
    "a lying compressed header": (3, lambda: gzip.compress(nifti_head((30000, 30000, 300))), "truncated_file"),
    "a bomb behind an image": (
        3,
        lambda: gzip.compress(nifti_head((4, 4, 4)) + bytes(range(128))) + zeros(200 << 20),
        "trailing_data",
    ),
    "a file name without end": (3, long_name, "unknown_file"),
    "an archive of boundless size": (2, big_zip, "too_large"),
    "a PNG of boundless size": (2, lambda: png(60000, 60000, zlib.compress(bytes(1000))), "truncated_file"),
    "a PNG with a bomb inside": (2, lambda: small_png(zlib.compress(bytes(100 << 20))), "broken_file"),
}


def with_size(content: bytes, size: int) -> bytes:
    for keyword in ("Rows", "Columns"):
        content = with_value(content, keyword, struct.pack("<H", size))
    return content


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_becomes_a_reason_and_the_next_file_is_read(tmp_path, name):
    dims, make, reason = ATTACKS[name]
    (tmp_path / "attack").write_bytes(make())
    write_nifti(tmp_path / "image.nii.gz", shape=(6, 7, 5) if dims == 3 else (6, 7))
    catalog = scan(tmp_path, dims)
    assert [case.names[0] for case in catalog.cases] == ["image.nii.gz"]
    assert [refusal.reason for refusal in catalog.refusals] == [reason]


def test_sequences_may_be_as_deep_as_the_limit(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(nested(MAX_DEPTH))
    assert dicom.read_header(path).Rows == 128


def test_a_scan_keeps_the_headers_without_small_private_elements(tmp_path):
    path = tmp_path / "a"
    large = struct.pack("<HH", 0x7FDF, 0x1001) + b"OB\0\0" + struct.pack("<I", LARGE_PRIVATE_BYTES) + bytes(1 << 12)
    path.write_bytes(before_pixels(bundled("CT_small.dcm"), large))
    outline, header = dicom.read_scan_header(path), dicom.read_header(path)
    assert [tag for tag in outline.keys() if tag.is_private] == [0x7FDF1001]
    assert [tag for tag in outline.keys() if not tag.is_private] == [tag for tag in header.keys() if not tag.is_private]


def test_no_more_of_a_file_than_its_beginning_tells_what_it_is(tmp_path):
    (tmp_path / "a").write_bytes(long_name())
    assert nifti.read_head(tmp_path / "a") == b""
    image = write_nifti(tmp_path / "b.nii.gz")
    assert nifti.read_head(image) == gzip.decompress(image.read_bytes())[:544]


@pytest.mark.parametrize("make", [lambda: bundled("MR_small.dcm"), lambda: bundled("MR_small_RLE.dcm"), None])
def test_a_file_that_ends_anywhere_is_refused(tmp_path, make):
    whole = make() if make else write_nifti(tmp_path / "whole.nii.gz", shape=(16, 16)).read_bytes()
    (tmp_path / "whole.nii.gz").unlink(missing_ok=True)
    write_nifti(tmp_path / "in" / "image.nii", shape=(6, 7))
    for index, length in enumerate(np.linspace(1, len(whole) - 200, 40).astype(int)):
        (tmp_path / "in" / f"{index:02d}").write_bytes(whole[:length])
    catalog = scan(tmp_path / "in", 2)
    assert [case.names[0] for case in catalog.cases] == ["image.nii"] and len(catalog.refusals) == 40


def test_a_codec_that_dies_in_the_scan_costs_its_file(tmp_path, monkeypatch):
    write_series(tmp_path / "good", "good")
    write_series(tmp_path / "killer", "killer")
    monkeypatch.setattr(pixel_check, "examine", hostile_codecs.examine_or_die)
    catalog = scan(tmp_path, 3)
    assert [refusal.reason for refusal in catalog.refusals] == ["codec_crash"]
    assert len(catalog.cases) == 1 and catalog.cases[0].names[0].startswith("good")


def test_a_codec_that_dies_in_the_middle_of_a_series_leaves_none_of_it(tmp_path, monkeypatch):
    write_series(tmp_path / "in" / "good", "good")
    write_series(tmp_path / "in" / "killer", "killer")
    cohort = cohort_of(scan(tmp_path / "in", 3))
    bank = bank_of(cohort, 3, np.random.default_rng(0))
    monkeypatch.setattr(formats, "_protect", hostile_codecs.protect_and_die)
    rows = protect_cohort(cohort, bank, budget="2 stored", output_dir=tmp_path / "out", spatial_dims=3)
    assert sum(row.state == PROTECTED for row in rows) == 4
    assert [refusal.reason for refusal in read_refusals(tmp_path / "out")] == ["codec_crash"]
    assert len(list((tmp_path / "out").rglob("*.dcm"))) == 4 and not list((tmp_path / "out").rglob("*.part"))


CANARY = "CANARY^JANE"


def test_the_command_tells_reasons_and_nothing_from_inside_the_files(tmp_path, capfd):
    rng = np.random.default_rng(5)
    for number, content in enumerate(islice(mutants([bundled("CT_small.dcm"), bundled("MR_small_RLE.dcm")], rng), 150)):
        path = tmp_path / f"{number:03d}"
        path.write_bytes(content.replace(b"CompressedSamples", CANARY.encode() + b"\x1b[31m!"))
    (series,) = write_series(tmp_path / "series", "one", 1)
    edit_dicom(series, lambda dataset: setattr(dataset, "PatientName", CANARY))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        code = cli.main(["inspect", str(tmp_path), "--dim", "2", "--all"])
    seen = capfd.readouterr()
    assert code == NOT_PROTECTED and "Traceback" not in seen.err + seen.out
    assert CANARY not in seen.err + seen.out + "".join(str(each.message) for each in told)
    assert not [each for each in told if "pydicom" in each.filename]


def test_mutated_files_are_refused_or_protected(tmp_path):
    """More of this: ``python tests/fuzz/fuzz_files.py --help``."""
    folders = [Path(DATA, "dicom_awkward")] if DATA else []
    broken = mutants(sources(*folders), np.random.default_rng(20261124))
    outcome: Counter[str] = Counter()
    for batch in range(MUTANTS // BATCH):
        folder = tmp_path / str(batch)
        (folder / "in").mkdir(parents=True)
        for number, content in enumerate(islice(broken, BATCH)):
            (folder / "in" / f"{number:03d}").write_bytes(content)
        outcome += run(folder / "in", folder / "out", 3 if batch % 4 == 3 else 2, np.random.default_rng(batch))
    assert outcome["protected"] > 50, "the mutations break too much: nothing gets as far as the writers"
    assert len(outcome) > 20, "the mutations are all of one kind"
    assert dcmread(io.BytesIO(bundled("CT_small.dcm"))).Rows == 128
    assert worker.call(hostile_codecs.fine) == ()
