# SPDX-License-Identifier: Apache-2.0
"""Broken copies of real files, and the path that they go through: nothing of them may get out unprotected.

Shared by ``test_fuzz.py`` (some seconds) and ``fuzz/fuzz_files.py`` (as long as one likes).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from dicom_files import write_enhanced
from exports import write_nifti, write_npz
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.datadict import tag_for_keyword
from pydicom.filereader import dcmread

from monai_salm.io import formats
from monai_salm.perturbations.budget import Budget
from monai_salm.release.catalog import Catalog, scan
from monai_salm.release.custody import read_refusals
from monai_salm.release.labels import Cohort
from monai_salm.release.manifest import PROTECTED, ManifestRow
from monai_salm.release.protect import protect_cohort

MAX_BYTES = 200_000
"""Larger files are left out: they take longer and break in no other way."""
BUDGET = Budget.parse("2 stored")
EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\xfe\xff\xff\xff", b"\x01\0\0\0", b"\0\0\0\x80")
EDITS = {
    "US": "Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation SamplesPerPixel PixelPaddingValue "
    "PixelPaddingRangeLimit PlanarConfiguration SmallestImagePixelValue",
    "text": "NumberOfFrames PhotometricInterpretation RescaleSlope RescaleIntercept WindowCenter WindowWidth ImageType "
    "ImagePositionPatient ImageOrientationPatient PixelSpacing TransferSyntaxUID SOPClassUID SOPInstanceUID Modality "
    "SeriesInstanceUID StudyInstanceUID FrameOfReferenceUID PatientID SeriesDescription LossyImageCompression",
}
TEXTS = (
    b"", b" ", b"0", b"-1", b"1e308", b"nan", b"99999999999999999999", b"../../../../tmp/x", b"\\\\\\\\", b"1\\2\\3",
    b"\0\0\0", b"\xff\xfe\xfd", b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.5", b"1.2.840.10008.1.2.1.99",
    b"MONOCHROME1",
    b"a" * 70, b"1A", b"/etc/passwd", b"..",
)  # fmt: skip
NIFTI_FIELDS = (
    0,
    40,
    42,
    44,
    46,
    48,
    50,
    52,
    54,
    56,
    70,
    72,
    76,
    80,
    84,
    88,
    108,
    112,
    116,
    120,
    123,
    252,
    254,
    280,
    344,
)

Mutate = Callable[[bytes, np.random.Generator], bytes]


def sources(*folders: Path) -> list[bytes]:
    """The bytes of the files to start from, in a fixed order: those of pydicom, of the folders, and some made here."""
    bundled = Path(get_testdata_file("CT_small.dcm", download=False)).parent
    found = [path for folder in (bundled, *folders) for path in sorted(folder.rglob("*")) if path.is_file()]
    contents = [path.read_bytes() for path in found if path.stat().st_size <= MAX_BYTES]
    return list(dict.fromkeys(content for content in (*contents, *_simple()) if len(content) > 200))


def _simple() -> Iterator[bytes]:
    """Images of noise in the simple formats, small enough that most mutations hit what matters."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 250, (24, 20), dtype=np.uint8)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_nifti(folder / "a.nii.gz", shape=(12, 9))
        write_nifti(folder / "b.nii", shape=(12, 9, 1))
        write_nifti(folder / "c.nii.gz", shape=(8, 9, 6))
        write_npz(folder / "d.npz", counts=(3, 2, 2))
        Image.fromarray(pixels).save(folder / "e.png")
        Image.fromarray(pixels.astype(np.uint16) * 200).save(folder / "f.png")
        Image.fromarray(pixels).save(folder / "g.tif")
        Image.fromarray(pixels).save(folder / "h.tif", compression="tiff_adobe_deflate")
        Image.fromarray(pixels).save(folder / "i.tif", compression="tiff_lzw")
        write_enhanced(folder / "j.dcm")
        for path in sorted(folder.iterdir()):
            yield path.read_bytes() if path.stat().st_size > 200 else b""


# ---------------------------------------------------------------- ways to break a file


def flip_bits(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    start = int(rng.choice([0, 0, len(content) // 2]))
    for position in rng.integers(
        start, max(start + 1, min(len(content), start + int(rng.choice([600, 3000, 10**9])))), 8
    ):
        changed[min(position, len(changed) - 1)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(1, len(content)))]


def lie(content: bytes, rng: np.random.Generator) -> bytes:
    """Put an extreme number where a length or a count may be."""
    size = int(rng.choice([2, 4]))
    at = int(rng.integers(0, min(len(content), int(rng.choice([1500, 10**9]))) - 4))
    return content[:at] + EXTREMES[rng.integers(len(EXTREMES))][:size] + content[at + size :]


def rearrange(content: bytes, rng: np.random.Generator) -> bytes:
    """Remove, repeat or overwrite a piece."""
    first, second = sorted(int(place) for place in rng.integers(0, len(content), 2))
    second = min(second, first + int(rng.choice([2, 64, 4096])))
    piece = content[first:second]
    choice = int(rng.integers(3))
    return content[:first] + (b"", piece * 2, rng.bytes(len(piece)))[choice] + content[second:]


def edit(content: bytes, rng: np.random.Generator) -> bytes:
    """Replace the value of an attribute, or of a NIfTI header field, by a hostile one of any length."""
    if content[128:132] != b"DICM":
        at = int(NIFTI_FIELDS[rng.integers(len(NIFTI_FIELDS))])
        value = rng.bytes(8) if rng.random() < 0.3 else EXTREMES[rng.integers(len(EXTREMES))]
        size = int(rng.choice([1, 2, 4]))
        return content[:at] + value[:size] + content[at + size :]
    kind = "US" if rng.random() < 0.5 else "text"
    keyword = str(rng.choice(EDITS[kind].split()))
    values = (0, 1, 2, 7, 8, 9, 12, 15, 16, 17, 32, 64, 255, 0xFFFF)
    value = struct.pack("<H", values[rng.integers(len(values))]) if kind == "US" else TEXTS[rng.integers(len(TEXTS))]
    return with_value(content, keyword, value + b" " * (len(value) % 2))


def with_value(content: bytes, keyword: str, value: bytes) -> bytes:
    """Every explicit or implicit little endian element of that tag gets another value, of another length maybe."""
    tag = tag_for_keyword(keyword)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    at = content.find(head, 132)
    if not 0 <= at < len(content) - 10:
        return content
    explicit = content[at + 4 : at + 6].isalpha()
    (length,) = struct.unpack_from("<H" if explicit else "<I", content, at + (6 if explicit else 4))
    prefix = content[at : at + 6] + struct.pack("<H", len(value)) if explicit else head + struct.pack("<I", len(value))
    return content[:at] + prefix + value + content[at + 8 + length :]


def nest(content: bytes, rng: np.random.Generator) -> bytes:
    """Put sequences in sequences in front of the pixel data, or at the end."""
    return content + deep_sequence(int(rng.choice([20, 33, 40, 400, 5000])), defined=bool(rng.integers(2)))


def deep_sequence(depth: int, *, defined: bool = False) -> bytes:
    """A private sequence (explicit VR) that holds itself ``depth`` times, with or without lengths."""
    tag = struct.pack("<HH", 0x7FE1, 0x1001) + b"SQ\0\0"
    if not defined:
        item = tag + b"\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
        return item * depth + b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0" * depth
    inner = b""
    for _ in range(min(depth, 1000)):
        inner = b"\xfe\xff\x00\xe0" + struct.pack("<I", len(inner)) + inner
        inner = tag + struct.pack("<I", len(inner)) + inner
    return inner


MUTATIONS: tuple[Mutate, ...] = (flip_bits, cut, lie, rearrange, edit, edit, nest)


def mutants(originals: list[bytes], rng: np.random.Generator) -> Iterator[bytes]:
    """Broken files without end; DICOM instances keep apart from each other by their UIDs."""
    dicom = [content for content in originals if content[128:132] == b"DICM"]
    others = [content for content in originals if content[128:132] != b"DICM"]
    number = 0
    while True:
        kind = others if others and rng.random() < 0.25 else dicom
        original = kind[int(rng.integers(len(kind)))]
        inner, wrap = _unwrap(original, rng)
        for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
            inner = MUTATIONS[rng.integers(len(MUTATIONS))](inner, rng) if len(inner) > 200 else inner
        number += 1
        yield _renumber(wrap(inner), number)


def _unwrap(content: bytes, rng: np.random.Generator) -> tuple[bytes, Callable[[bytes], bytes]]:
    """What is inside of a compressed file, half of the times, and how to compress it again."""
    if content[:2] == b"\x1f\x8b" and rng.random() < 0.5:
        return gzip.decompress(content), lambda inner: gzip.compress(inner, 1)
    if content[:2] == b"PK" and rng.random() < 0.8:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        which = list(members)[rng.integers(len(members))]

        def again(inner: bytes) -> bytes:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, member in members.items():
                    archive.writestr(name, inner if name == which else member)
            return buffer.getvalue()

        return members[which], again
    return content, lambda inner: inner


def _renumber(content: bytes, number: int) -> bytes:
    """Another instance UID of the same length, where one can be read: two files with one UID would both be refused."""
    if content[128:132] != b"DICM":
        return content
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            uid = str(dcmread(io.BytesIO(content), specific_tags=["SOPInstanceUID"]).SOPInstanceUID).encode()
    except Exception:  # a file that is too broken for that is refused for other reasons
        return content
    return content.replace(uid, uid[:-7] + b"%07d" % number) if len(uid) > 12 and uid[:2] != b".." else content


# ---------------------------------------------------------------- the way through the house


def run(export: Path, out: Path, spatial_dims: int, rng: np.random.Generator) -> Counter[str]:
    """Scan and protect an export; what became of its files, by reason.

    Raises:
        AssertionError: When something in the output is not protected.
    """
    try:
        catalog = scan(export, spatial_dims)
    except ValueError as error:  # nothing in there can be protected
        assert "holds no" in str(error)
        return Counter(all_refused=1)
    cohort = cohort_of(catalog)
    outcome = Counter(refusal.reason for refusal in catalog.refusals)
    try:
        rows = protect_cohort(
            cohort, bank_of(cohort, spatial_dims, rng), budget=BUDGET, output_dir=out, spatial_dims=spatial_dims
        )
    except ValueError as error:
        assert "nothing was protected" in str(error)
        rows = []
    outcome = Counter(refusal.reason for refusal in read_refusals(out))
    outcome["protected"] = sum(row.state == PROTECTED for row in rows)
    check_output(cohort, out, rows)
    return outcome


def cohort_of(catalog: Catalog) -> Cohort:
    return Cohort(catalog.cases, ("a",), catalog.refusals, catalog.root, companions=catalog.companions)


def bank_of(cohort: Cohort, spatial_dims: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """As far as the budget goes, in about a tenth of the voxels."""
    bank = {}
    for case in cohort.cases:
        image = formats.read(case, spatial_dims)
        lower, upper = image.codec.bounds(torch.from_numpy(image.stored.astype(np.float64)), BUDGET)
        delta = np.where(upper.numpy() > 0, upper.numpy(), lower.numpy()).astype(np.int8)
        delta[rng.random(delta.shape) > 0.1] = 0
        bank[case.sample_id] = delta
    return bank


def check_output(cohort: Cohort, out: Path, rows: list[ManifestRow]) -> None:
    """Every image in the output is in the manifest, and is no file of the export.

    A single slice of a volume may have no voxel that moved; then the manifest says so.
    """
    inputs = {hashlib.sha256(path.read_bytes()).digest() for case in cohort.cases for path in case.files}
    released = out / "protected"
    found = {path.relative_to(released).as_posix() for path in released.rglob("*") if path.is_file()}
    images = [row for row in rows if row.state == PROTECTED]
    assert found == {row.file for row in rows}, "a file in the output is not in the manifest"
    for name in found:
        assert hashlib.sha256((released / name).read_bytes()).digest() not in inputs, "an original is in the output"
    moved = {row.file for row in images if row.changed}
    assert {row.sample_id for row in images} == {row.sample_id for row in images if row.changed}, "a unit is as it was"
    pixels = {_pixels(path) for case in cohort.cases for path in case.files} - {b""}
    assert not any(_pixels(released / name) in pixels for name in moved), "original pixels are in the output"
    assert {path.name for path in out.parent.iterdir()} <= {out.name, "in"}, "a file got out of the output folder"


def _pixels(path: Path) -> bytes:
    """Digest of the encoded pixel data, as a parser that is not ours finds them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return hashlib.sha256(dcmread(path).PixelData).digest()
    except Exception:  # no DICOM, or one that only we can read
        return b""
