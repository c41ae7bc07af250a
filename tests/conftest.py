# SPDX-License-Identifier: Apache-2.0
"""What every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    """Tiny networks are slowed down by many threads, and results depend on their number in the last bit."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The shared research data; a test that asks for it is skipped where there are none."""
    folder = os.environ.get("MONAI_SALM_DATA", "")
    if not folder:
        pytest.skip("MONAI_SALM_DATA is not set: no real images here")
    if not Path(folder).is_dir():
        pytest.fail(f"MONAI_SALM_DATA names {folder}, which is no folder")
    return Path(folder)
