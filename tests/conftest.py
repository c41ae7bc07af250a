# SPDX-License-Identifier: Apache-2.0
"""What every test shares."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile("busy", deadline=None)  # a machine that has other work too is no failure
settings.load_profile("busy")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Threads slow tiny networks down, above all beside other processes, and their number decides last bits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The shared research data; a test that asks for it is skipped where there are none."""
    folder = os.environ.get("MONAI_SALM_DATA", "")
    if not folder:
        pytest.skip("MONAI_SALM_DATA is not set: no real images here")
    if not Path(folder).is_dir():
        pytest.fail(f"MONAI_SALM_DATA names {folder}, which is no folder")
    return Path(folder)


@pytest.fixture
def out(released, tmp_path) -> Path:
    """A copy of the module's release, the second part of ``released``: no test sees the trainings of another."""
    return Path(shutil.copytree(released[1], tmp_path / "out"))


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a bundled DICOM file with some attributes changed (None removes)."""
    import pydicom
    from dicom_files import bundled

    def edit(
        name: str = "CT_small.dcm", change: Callable[[pydicom.Dataset], None] | None = None, **attributes: Any
    ) -> Path:
        dataset = pydicom.dcmread(bundled(name))
        for keyword, value in attributes.items():
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)
        if change:
            change(dataset)
        path = tmp_path / "edited.dcm"
        dataset.save_as(path)
        return path

    return edit


@pytest.fixture
def trained(monkeypatch) -> list[dict[str, Any]]:
    """The options of each training that studies do in this process, from the start of the test on."""
    from monai_salm.verification import jobs, training

    done: list[dict[str, Any]] = []
    monkeypatch.setattr(
        jobs, "train_network", lambda *args, **options: done.append(options) or training.train_network(*args, **options)
    )
    return done
