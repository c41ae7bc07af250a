# SPDX-License-Identifier: Apache-2.0
"""Archives in the MedMNIST layout: ``{train,val,test}_{images,labels}`` in one ``.npz``.

An archive is released as a whole. The protected copy has the same members in the same order: voxels of train and val
images are patched, labels and array headers stay byte for byte. Test images are never released: their two members
become arrays of length 0. Volumes (N, D, H, W) have no orientation and keep their axes.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from monai_salm.io.base import (
    DEFLATE_RATIO,
    SPLITS,
    Case,
    FileCheck,
    RefusedError,
    StoredImage,
    Window,
    compare,
    move,
    window_of,
)
from monai_salm.io.kept import while_unchanged
from monai_salm.stored import StoredCodec

KEYS = tuple(f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels"))
RELEASED = ("train", "val")
MAX_BYTES = 2**34
"""Largest sum of decompressed members that is read."""
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


def sniff(head: bytes) -> bool:
    """True if a file that starts with ``head`` is a zip archive, which ``.npz`` files are."""
    return head[:4] == b"PK\x03\x04"


def is_archive(path: Path) -> bool:
    """Whether a zip archive holds arrays; for a broken archive, whether it is called ``.npz``."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError):
        return path.suffix == ".npz"


def labels(path: Path, spatial_dims: int) -> dict[str, np.ndarray]:
    """Integer labels (N,) of each split of an archive.

    Args:
        path: the archive.
        spatial_dims: 2 for images (N, H, W), 3 for volumes (N, D, H, W).

    Raises:
        RefusedError: When the archive is broken, lacks a key, or holds colors, several labels per case, another type
            than uint8, or images of another dimensionality.
    """
    arrays = _arrays(path)
    for split in SPLITS:
        _check(split, arrays[f"{split}_images"], arrays[f"{split}_labels"], spatial_dims)
    return {split: arrays[f"{split}_labels"][:, 0] for split in SPLITS}


def case_names(archive: PurePosixPath, split: str, index: int) -> tuple[str, str]:
    """Names of one image of an archive: ``"x.npz/train/12"`` and ``"train/12"``."""
    return f"{archive}/{split}/{index}", f"{split}/{index}"


def read(case: Case, spatial_dims: int, window: Window) -> StoredImage:
    """One image (1, *spatial) of an archive; the archive is decompressed once per process.

    Args:
        case: ``split`` and ``index`` name the image.
        spatial_dims: 2 or 3.
        window: ``"auto"`` (0 to 255) or (low, high).

    Raises:
        RefusedError: When the archive cannot be read or the image is not of ``spatial_dims`` dimensions.
    """
    labels_of_split = labels(case.files[0], spatial_dims)[case.split]
    if case.index is None or not 0 <= case.index < len(labels_of_split):
        raise RefusedError("no_such_image", f"{case.split} has {len(labels_of_split)} images, index is {case.index}")
    stored = _arrays(case.files[0])[f"{case.split}_images"][case.index][None]
    return StoredImage(stored.copy(), StoredCodec("uint8", window_of(stored, window)))


def protect(
    cases: Sequence[Case],
    deltas: Callable[[Case], np.ndarray],
    *,
    spatial_dims: int,
    window: Window,
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield the one protected archive: its path relative to the export, unchanged, and its bytes.

    Args:
        cases: every train and val image of one archive.
        deltas: (1, *spatial) lattice steps of a case.
        spatial_dims: 2 or 3.
        window: as for :py:func:`read`.

    Raises:
        RefusedError: When an image of train or val is missing among ``cases``: archives are all-or-nothing.
        ValueError: When a perturbation does not fit its image.
    """
    source = cases[0].files[0]
    _check_complete(cases, labels(source, spatial_dims))
    members = _members(source)
    views = {split: _view(members[f"{split}_images"]) for split in RELEASED}
    for case in cases:
        image = read(case, spatial_dims, window)
        views[case.split][case.index] = move(image.stored, np.asarray(deltas(case)), image.codec)[0]
    del views
    yield cases[0].file_name, _zip(source, members | _emptied(members))


def verify(source: Path, written: Path, limit: float) -> FileCheck:
    """Compare a written archive with its source, both parsed afresh.

    Args:
        source: the original.
        written: the protected archive.
        limit: largest change allowed, in stored units.

    Raises:
        RefusedError: When members other than train and val images differ, a test image is there, a voxel moved by more
            than ``limit``, or an image of train or val did not change.
    """
    before, after = _members(source), _members(written)
    if list(before) != list(after):
        raise RefusedError("verification_failed", f"members are {list(after)}, the source has {list(before)}")
    released = [f"{split}_images" for split in RELEASED]
    before |= _emptied(before)
    for key in before:
        start = _offset(before[key]) if key in released else len(before[key])
        if before[key][:start] != after[key][:start] or len(before[key]) != len(after[key]):
            raise RefusedError("verification_failed", f"{key} differs from the source where it must not")
    checks = []
    for old, new in ((_view(before[key]), _view(after[key])) for key in released):
        checks += [compare(image, protected, limit) for image, protected in zip(old, new, strict=True)]
    return FileCheck(sum(check.changed for check in checks), max(check.max_abs for check in checks))


def _emptied(members: dict[str, bytearray]) -> dict[str, bytearray]:
    """The members of the test split, as arrays of length 0."""
    found = {}
    for key in KEYS:
        if not key.startswith(RELEASED):
            stream = io.BytesIO()
            np.save(stream, _view(members[key])[:0], allow_pickle=False)
            found[key] = bytearray(stream.getvalue())
    return found


def _check(split: str, images: np.ndarray, label: np.ndarray, spatial_dims: int) -> None:
    if images.dtype != np.uint8:
        raise RefusedError("unsupported_type", f"{split}_images holds {images.dtype}; MedMNIST archives hold uint8")
    if images.ndim >= 4 and images.shape[-1] in (3, 4):
        raise RefusedError(
            "color_image", f"{split}_images has shape {images.shape}, colors; only grayscale is supported"
        )
    if images.ndim != spatial_dims + 1:
        fix = "use the bundle of the other dimensionality"
        raise RefusedError(f"not_{spatial_dims}d", f"{split}_images has shape {images.shape}; {fix}")
    if label.dtype.kind not in "iu":
        raise RefusedError("unsupported_type", f"{split}_labels holds {label.dtype}; class numbers must be integers")
    if label.ndim != 2 or label.shape[1] != 1:
        raise RefusedError(
            "multi_label", f"{split}_labels has shape {label.shape}; one label per case, (N, 1), is supported"
        )
    if len(label) != len(images):
        raise RefusedError("broken_file", f"{split} has {len(images)} images and {len(label)} labels")
    if label.size and label.min() < 0:
        raise RefusedError("negative_label", f"{split}_labels holds {label.min()}; class numbers start at 0")


def _check_complete(cases: Sequence[Case], numbers: dict[str, np.ndarray]) -> None:
    have = {(case.split, case.index) for case in cases}
    missing = sum((split, index) not in have for split in RELEASED for index in range(len(numbers[split])))
    if missing or len(have) != len(cases) or any(case.split not in RELEASED for case in cases):
        raise RefusedError("incomplete_archive", f"{missing} train or val images have no perturbation; fit all of them")


@while_unchanged(2)
def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Read-only arrays."""
    arrays = {key: _view(member) for key, member in _members(path).items()}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def _members(path: Path) -> dict[str, bytearray]:
    """Decompressed ``.npy`` members by key, in the archive's order, sizes checked first."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            _check_members(infos)
            return {info.filename.removesuffix(".npy"): bytearray(archive.read(info)) for info in infos}
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise RefusedError("broken_file", "the archive cannot be read to its end; download it again") from error


def _check_members(infos: list[zipfile.ZipInfo]) -> None:
    names = [info.filename for info in infos]
    missing = [key for key in KEYS if f"{key}.npy" not in names]
    if missing:
        raise RefusedError("not_medmnist", f"the archive lacks {', '.join(missing)}; it needs {', '.join(KEYS)}")
    if len(names) != len(KEYS):
        raise RefusedError(
            "not_medmnist", f"the archive has {len(names) - len(KEYS)} members besides {', '.join(KEYS)}"
        )
    total = sum(info.file_size for info in infos)
    if total > MAX_BYTES or any(info.file_size > info.compress_size * DEFLATE_RATIO + 64 for info in infos):
        raise RefusedError("too_large", f"the archive claims {total} decompressed bytes")


def _header(member: bytes | bytearray) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, type and start of the data of a ``.npy`` member; pickles are never loaded."""
    stream = io.BytesIO(member[:65536])
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
    except ValueError as error:
        raise RefusedError("broken_file", "an array of the archive has no readable header") from error
    if dtype.hasobject:
        raise RefusedError(
            "pickled_data", "the archive holds pickled objects, which are never loaded; save plain arrays"
        )
    return shape, fortran, dtype, stream.tell()


def _offset(member: bytes | bytearray) -> int:
    return _header(member)[3]


def _view(member: bytearray) -> np.ndarray:
    """The array inside a member, sharing its memory."""
    shape, fortran, dtype, offset = _header(member)
    count = int(np.prod(shape, dtype=object))
    if len(member) - offset != count * dtype.itemsize:
        raise RefusedError(
            "broken_file", f"an array of shape {shape} does not fit the {len(member) - offset} bytes it has"
        )
    return np.frombuffer(member, dtype, count, offset).reshape(shape, order="F" if fortran else "C")


def _zip(source: Path, members: dict[str, bytearray]) -> bytes:
    """Archive with the source's compression and no dates, so that equal arrays give equal files."""
    with zipfile.ZipFile(source) as archive:
        methods = {info.filename: info.compress_type for info in archive.infolist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key, member in members.items():
            info = zipfile.ZipInfo(f"{key}.npy", date_time=_ZIP_EPOCH)
            info.compress_type = methods[info.filename]
            info.external_attr = 0o600 << 16
            archive.writestr(info, bytes(member))
    return buffer.getvalue()
