# SPDX-License-Identifier: Apache-2.0
"""MedMNIST archives: one file, many cases, released as a whole."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from monai_salm.io import npz
from monai_salm.io.base import Case, RefusedError

DATA = Path(os.environ.get("MONAI_SALM_DATA", "")) / "pneumoniamnist.npz"
needs_data = pytest.mark.skipif("MONAI_SALM_DATA" not in os.environ, reason="MONAI_SALM_DATA is not set")


def arrays(shape: tuple[int, ...] = (6, 5), counts: tuple[int, ...] = (5, 3, 2)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for split, count in zip(npz.SPLITS, counts, strict=True):
        made[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        made[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % 2)[:, None]
    return made


def save(path: Path, content: dict[str, np.ndarray], *, compressed: bool = True) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **content)
    return path


def cases_of(path: Path, spatial_dims: int = 2, splits: tuple[str, ...] = npz.RELEASED) -> list[Case]:
    numbers = npz.labels(path, spatial_dims)
    name = PurePosixPath("sub") / path.name
    return [
        Case(f"case-{split}{index}", "npz", (path,), npz.case_names(name, split, index), "g", index, int(label), split)
        for split in splits
        for index, label in enumerate(numbers[split])
    ]


def delta_of(case: Case) -> np.ndarray:
    """One voxel towards the middle of the range."""
    stored = npz.read(case, npz._arrays(case.files[0])["train_images"].ndim - 1, "auto").stored
    delta = np.zeros(stored.shape, dtype=np.int8)
    at = case.index % stored.size
    delta.flat[at] = 1 if stored.flat[at] < 128 else -1
    return delta


def protect(path: Path, spatial_dims: int = 2) -> bytes:
    cases = cases_of(path, spatial_dims)
    ((name, content),) = npz.protect(cases, delta_of, spatial_dims=spatial_dims, window="auto")
    assert name == PurePosixPath("sub") / path.name
    return content


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(("shape", "spatial_dims"), [((6, 5), 2), ((4, 6, 5), 3)])
def test_only_train_and_val_images_change(tmp_path, shape, spatial_dims, compressed):
    source = save(tmp_path / "a.npz", arrays(shape), compressed=compressed)
    content = protect(source, spatial_dims)
    assert content == protect(source, spatial_dims)
    (written := tmp_path / "b.npz").write_bytes(content)
    check = npz.verify(source, written, 1)
    assert (check.changed, check.max_abs) == (8, 1.0)

    before, after = np.load(source), np.load(written)
    assert before.files == after.files
    for key in before.files:
        if key.startswith("test"):  # never released
            assert after[key].dtype == before[key].dtype and after[key].shape == (0, *before[key].shape[1:])
            continue
        assert (before[key].dtype, before[key].shape) == (after[key].dtype, after[key].shape)
        moved = np.abs(before[key].astype(int) - after[key])
        assert moved.max() == (1 if key in ("train_images", "val_images") else 0)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(written) as new:
        assert {info.compress_type for info in old.infolist()} == {info.compress_type for info in new.infolist()}


def test_members_keep_their_order_and_memory_layout(tmp_path):
    content = arrays()
    content["train_images"] = np.asfortranarray(content["train_images"])
    content = dict(reversed(content.items()))
    source = save(tmp_path / "a.npz", content)
    (written := tmp_path / "b.npz").write_bytes(protect(source))
    after = np.load(written)
    assert after.files == list(content) and after["train_images"].flags.f_contiguous
    npz.verify(source, written, 1)


def test_an_archive_is_decompressed_once(tmp_path, monkeypatch):
    source = save(tmp_path / "a.npz", arrays())
    opened = []
    monkeypatch.setattr(npz, "_members", lambda path, original=npz._members: opened.append(path) or original(path))
    images = [npz.read(case, 2, "auto").stored for case in cases_of(source)]
    assert len(opened) == 1 and all(image.flags.writeable for image in images)
    os.utime(source, ns=(1, 1))
    npz.read(cases_of(source)[0], 2, "auto")
    assert len(opened) == 2


def change(key: str, value: np.ndarray | None) -> dict[str, np.ndarray]:
    content = arrays()
    if value is None:
        del content[key]
    else:
        content[key] = value
    return content


REFUSED = {
    "missing_key": (change("val_labels", None), "not_medmnist"),
    "extra_key": (arrays() | {"notes": np.zeros(3)}, "not_medmnist"),
    "rgb": (arrays((6, 5, 3)), "color_image"),
    "volumes_in_2d": (arrays((4, 6, 5)), "not_2d"),
    "uint16": (change("train_images", np.zeros((5, 6, 5), np.uint16)), "unsupported_type"),
    "float_labels": (change("train_labels", np.zeros((5, 1))), "unsupported_type"),
    "multi_label": (change("train_labels", np.zeros((5, 14), np.uint8)), "multi_label"),
    "flat_labels": (change("train_labels", np.zeros(5, np.uint8)), "multi_label"),
    "too_few_labels": (change("train_labels", np.zeros((4, 1), np.uint8)), "broken_file"),
    "negative_label": (change("train_labels", np.full((5, 1), -1, np.int8)), "negative_label"),
    "pickled": (change("train_labels", np.array([[None]] * 5)), "pickled_data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_archives_are_refused_by_name(tmp_path, name):
    content, reason = REFUSED[name]
    with pytest.raises(RefusedError) as refusal:
        npz.labels(save(tmp_path / "a.npz", content), 2)
    assert refusal.value.reason == reason


def test_broken_archives_are_refused(tmp_path):
    source = save(tmp_path / "a.npz", arrays())
    content = bytearray(source.read_bytes())
    source.write_bytes(content[:-100])
    with pytest.raises(RefusedError, match="broken_file"):
        npz.labels(source, 2)
    content[80:90] = bytes(10)
    source.write_bytes(content)
    with pytest.raises(RefusedError, match="broken_file"):
        npz.labels(source, 2)


def test_an_array_that_claims_more_than_it_holds_is_refused(tmp_path):
    source = save(tmp_path / "a.npz", arrays(), compressed=False)
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["train_images.npy"] = members["train_images.npy"].replace(b"(5, 6, 5)", b"(9, 6, 5)")
    with zipfile.ZipFile(source, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(RefusedError, match="does not fit"):
        npz.labels(source, 2)


def test_an_archive_is_protected_whole_or_not_at_all(tmp_path):
    source = save(tmp_path / "a.npz", arrays())
    for cases in (cases_of(source)[1:], cases_of(source, splits=npz.SPLITS)):
        with pytest.raises(RefusedError, match="incomplete_archive"):
            list(npz.protect(cases, delta_of, spatial_dims=2, window="auto"))


def test_verify_refuses_what_was_not_declared(tmp_path):
    source = save(tmp_path / "a.npz", arrays())
    changed = dict(np.load(source))
    for split in npz.RELEASED:
        changed[f"{split}_images"] ^= 1
    whole = {key: changed[key] for key in ("test_images", "test_labels")}
    changed |= {key: values[:0] for key, values in whole.items()}
    npz.verify(source, save(tmp_path / "good.npz", changed), 1)
    bad = {
        "test_images differs": changed | {"test_images": whole["test_images"]},
        "test_labels differs": changed | {"test_labels": whole["test_labels"]},
        "train_labels differs": changed | {"train_labels": changed["train_labels"] ^ 1},
        "moved by 16": changed | {"val_images": changed["val_images"] ^ 17},
        "nothing was protected": changed | {"train_images": np.load(source)["train_images"]},
        "train_images differs": changed | {"train_images": changed["train_images"][:4]},
        "lacks": {key: value for key, value in changed.items() if key != "test_images"},
        "members are": dict(reversed(changed.items())),
    }
    for text, content in bad.items():
        with pytest.raises(RefusedError, match=text):
            npz.verify(source, save(tmp_path / "bad.npz", content), 2)


@pytest.mark.data
@needs_data
def test_the_real_archive_is_protected_with_its_test_split_untouched(tmp_path):
    (written := tmp_path / "b.npz").write_bytes(protect(DATA))
    check = npz.verify(DATA, written, 1)
    assert (check.changed, check.max_abs) == (4708 + 524, 1.0)
