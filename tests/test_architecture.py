# SPDX-License-Identifier: Apache-2.0
"""The house plan of docs/architecture.md, held by a test: who may import whom, and how a module looks."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "monai_salm"
ROOMS = (
    "__main__",
    "cli",
    "run_settings",
    "workflows",
    "verification",
    "engines",
    "transforms",
    "metrics",
    "release",
    "io",
    "bank",
    "records",
    "surrogates",
    "stored",
    "perturbations",
    "similarity",
    "convolution",
    "errors",
    "cohorts",
)
"""From the top floor down: a room may import from itself and from those below it."""
UNKNOWN_TO = {
    "verification": ("pydicom", "nibabel"),
    "engines": ("pydicom", "nibabel"),
    "release": ("monai", "monai_salm.surrogates", "monai_salm.bank"),
    "io": ("monai", "itk", "monai_salm.surrogates", "monai_salm.bank"),
    "bank": ("monai", "pydicom", "nibabel"),
    "records": ("monai", "pydicom", "nibabel"),
    "surrogates": ("pydicom", "nibabel", "pathlib"),
    "similarity": ("monai", "pydicom", "nibabel", "pathlib"),
    "convolution": ("monai", "pydicom", "nibabel", "pathlib"),
    "errors": ("monai", "torch", "numpy", "pydicom", "nibabel", "pathlib"),
    "stored": ("monai", "pydicom", "nibabel"),
    "perturbations": ("monai", "pydicom", "nibabel", "pathlib"),
}
"""What a room must not even know."""
MAX_LINES = 400

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted([*MODULES, *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "bundles").rglob("*.py")])
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "monai_salm" and len(parts) > 1 else ""


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            # "from monai_salm import bank" imports a room too
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@each_module
def test_imports_go_down_only(path):
    own = room_of(dotted(path))
    for line, name in imports(path):
        other = room_of(name)
        if other in ROOMS and own != other:
            assert own, f"{path}:{line}: the package itself imports no room, or every import gets slow"
            assert ROOMS.index(own) < ROOMS.index(other), f"{path}:{line}: {own} must not import {other}, above it"


@each_module
def test_no_room_knows_what_it_must_not(path):
    for line, name in imports(path):
        for unknown in UNKNOWN_TO.get(room_of(dotted(path)), ()):
            assert not is_below(name, unknown), f"{path}:{line}: this room knows nothing of {unknown}"


def test_formats_stay_behind_one_door():
    """Rooms above ``io`` use its formats' table; only ``release`` and ``transforms`` may."""
    for path in MODULES:
        own = room_of(dotted(path))
        for line, name in imports(path):
            if own not in ("io", "release", "transforms", "verification", "engines"):
                assert not is_below(name, "monai_salm.io"), f"{path}:{line}: {own} has no business with files"
            if own == "cohorts":
                assert not is_below(name, "monai_salm") or is_below(name, "monai_salm.cohorts"), f"{path}:{line}"
            else:
                assert not is_below(name, "monai_salm.cohorts"), f"{path}:{line}: nobody imports the demo cohort"


def test_every_module_has_a_room_and_the_plan_lists_it_in_order():
    present = {room_of(dotted(path)) for path in MODULES} - {""}
    assert present <= set(ROOMS), "a new room needs a place in ROOMS and in docs/architecture.md"
    table = re.findall(r"^\| `(\w+)(?:\.py|/)`", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert table == list(ROOMS), "docs/architecture.md and this test tell different orders"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_says_what_it_is_and_is_short(path):
    text = path.read_text()
    lines = text.splitlines()
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"
    assert ast.get_docstring(ast.parse(text)), "the first thing in a module is what it is for"
    assert len(lines) <= MAX_LINES, f"{len(lines)} lines: split it"
    assert path.stem not in ("utils", "helpers", "common", "misc"), "name what it does"


def test_bundles_hold_no_python():
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bundles").rglob("*.py")}
    assert found == {"bundles/__init__.py"}


@each_module
def test_examples_in_docstrings_hold(path):
    module = importlib.import_module(dotted(path))
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).failed == 0
