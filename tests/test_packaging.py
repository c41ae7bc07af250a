# SPDX-License-Identifier: Apache-2.0
"""What a stranger gets: the wheel, the bundles in it, the pinned versions, the Makefile."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from monai_salm import __version__, workflows

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = ("salm_2d_classification", "salm_3d_classification", "salm_3d_segmentation")
FILES = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt")
FOLDERS = ("monai_salm", "bundles", "tests", "docs", "benchmarks", ".ci")
METADATA_KEYS = {
    *("schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version"),
    *("required_packages_version", "task", "description", "authors", "copyright", "network_data_format"),
}
TENSOR_KEYS = {
    *("type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def"),
}


def pins() -> dict[str, str]:
    """Version by normalized name."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}


def metadata(name: str) -> dict:
    return json.loads((workflows.bundle_path(name) / "configs" / "metadata.json").read_text())


def cli(*arguments: str, cwd: Path, **env: str) -> str:
    command = [sys.executable, "-m", "monai_salm.cli", *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the repository, so that no build folders appear in the working tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.rows.jsonl"))
    return copy


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, source) -> Path:
    """The wheel, unpacked."""
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (path,) = out.glob("monai_salm-*-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(out / "unpacked")
    return out / "unpacked"


def test_the_wheel_holds_every_file_of_package_and_bundles_and_nothing_else(wheel):
    found = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "monai_salm").rglob("*") if path.is_file()}
    expected |= {f"monai_salm/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "bundles").rglob("*") if p.is_file()}
    expected = {name for name in expected if "__pycache__" not in name}
    assert {name for name in found if ".dist-info/" not in name} == expected
    (info,) = wheel.glob("*.dist-info")
    assert (info / "licenses" / "LICENSE").is_file()
    assert "monai-salm = monai_salm.cli:main" in (info / "entry_points.txt").read_text()
    head = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in head and f"Version: {__version__}" in head


def test_the_source_distribution_is_enough_for_what_the_readme_says(tmp_path, source):
    """Installation with the pinned versions, make, tests, documents and benchmarks."""
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=source, check=True, capture_output=True, timeout=300)
    with tarfile.open(tmp_path / f"monai_salm-{__version__}.tar.gz") as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    given = {path.relative_to(source).as_posix() for name in FOLDERS for path in (source / name).rglob("*")}
    given = {name for name in given if (source / name).is_file()} | {*FILES}
    assert given - found == set()


@pytest.mark.parametrize("name", BUNDLES)
def test_bundles_are_found_in_an_installed_wheel_and_can_be_copied_when_it_is_read_only(wheel, tmp_path, name):
    site = tmp_path / "site"
    shutil.copytree(wheel, site)
    for path in site.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        env = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
        assert cli("bundle", "list", cwd=tmp_path, **env).split() == list(BUNDLES)
        found = Path(cli("bundle", "path", name, cwd=tmp_path, **env))
        assert found == site / "monai_salm" / "bundles" / name and (found / "configs" / "metadata.json").is_file()
        copy = Path(cli("bundle", "copy", name, cwd=tmp_path, **env))
        assert copy == tmp_path / name
        (copy / "configs" / "metadata.json").write_text("{}")  # a read-only original gives an editable copy
        (copy / "models").mkdir()
    finally:
        for path in site.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_the_package_is_the_command_too(tmp_path):
    told = [
        subprocess.run(
            [sys.executable, "-m", module, "--help"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        for module in ("monai_salm", "monai_salm.cli")
    ]
    assert told[0] == told[1] and told[0].startswith("usage: monai-salm ")


@pytest.mark.parametrize("name", BUNDLES)
def test_bundles_are_found_where_this_test_runs(tmp_path, name):
    found = Path(cli("bundle", "path", name, cwd=tmp_path))
    assert (found / "configs" / "metadata.json").is_file()
    assert (found / "configs" / "metadata.json").read_bytes() == (
        ROOT / "bundles" / name / "configs" / "metadata.json"
    ).read_bytes()


def test_a_copy_never_overwrites(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(ValueError, match="there already"):
        workflows.copy_bundle(BUNDLES[0], tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


@pytest.mark.parametrize("name", BUNDLES)
def test_metadata_has_what_the_specification_demands(name):
    content = metadata(name)
    assert METADATA_KEYS <= content.keys()
    assert content["version"] in content["changelog"]
    tensors = content["network_data_format"]
    image, pred = tensors["inputs"]["image"], tensors["outputs"]["pred"]
    assert TENSOR_KEYS | {"modality"} <= image.keys() and TENSOR_KEYS <= pred.keys()
    assert len(image["spatial_shape"]) == int(name[5])
    assert "logit" in content["pred_classes"] and pred["type"] != "probabilities"
    assert len(pred["channel_def"]) == pred["num_channels"] and len(image["channel_def"]) == image["num_channels"]


@pytest.mark.parametrize("name", BUNDLES)
def test_metadata_names_the_versions_that_are_pinned(name):
    content, pinned = metadata(name), pins()
    told = content["required_packages_version"] | {
        "monai": content["monai_version"],
        "torch": content["pytorch_version"],
        "numpy": content["numpy_version"],
    }
    assert told.pop("monai-salm") == __version__
    assert told == {name: pinned[name] for name in told}


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_is_complete(name):
    folder = workflows.bundle_path(name)
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    for part in ("configs/train.yaml", "configs/inference.yaml", "configs/logging.conf", "docs/README.md"):
        assert (folder / part).is_file(), f"{name} lacks {part}"


@pytest.mark.parametrize("name", BUNDLES)
def test_the_bundles_readme_explains_every_knob(name):
    from monai.bundle import ConfigParser

    folder = workflows.bundle_path(name)
    config = ConfigParser.load_config_file(str(folder / "configs" / "train.yaml"))
    knobs = {key for key, value in config.items() if not isinstance(value, dict)}
    knobs -= {"imports", "initialize", "run", "check", "fit", "protect", "verify", "finalize", "bundle_root"}
    knobs -= {"num_classes", "in_channels"}  # follow from the data
    text = (folder / "docs" / "README.md").read_text().split("\n## Settings\n")[1].split("\n## ")[0]
    told = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert told == knobs, f"{name}: not told {knobs - told}, not there {told - knobs}"


def test_constraints_pin_everything_and_name_no_place():
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.]+", line) for line in lines), "no URL, path or local version"
    assert lines == sorted(lines, key=str.lower) and len(pins()) == len(lines)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = "\n".join(setup["options.extras_require"].values())
    wanted = re.findall(r"^([A-Za-z][\w-]*)", setup["options"]["install_requires"] + extras, re.MULTILINE)
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in wanted} <= pins().keys()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_its_targets_and_installs_only_once(tmp_path):
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def make(*arguments: str) -> str:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        command = ["make", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, env=clean, check=True, capture_output=True, text=True, timeout=60).stdout

    assert {"demo", "demo-3d", "demo-seg", "test", "lint"} <= set(re.findall(r"^  make (\S+)", make(), re.MULTILINE))
    first = make("-n", "demo", "demo-3d", "demo-seg", "test")
    assert first.count("pip install") == 1 and first.count("monai.bundle run") == 3
    for name in BUNDLES:
        assert f"--config_file bundles/{name}/configs/train.yaml" in first
    asked = re.findall(r"benchmarks/\S+\.(?:py|yaml)", make("-n", "bench", "MONAI_SALM_DATA=images"))
    assert len(asked) == 3 and all((ROOT / name).is_file() for name in asked)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    assert "pip install" not in make("-n", "demo", "test")
    (tmp_path / "constraints.txt").touch()
    os.utime(tmp_path / "constraints.txt", (2**31, 2**31))
    assert "pip install" in make("-n", "demo"), "another pin is another installation"
    text = (ROOT / "Makefile").read_text()
    assert not re.search(r"https?://|index-url|find-links|/opt/|/work/", text), (
        "pip's own configuration says where from"
    )


def test_ci_script_runs_the_tests():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK) and path.read_text().startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", path], check=True)
    assert "set -euo pipefail" in path.read_text() and "make test" in path.read_text()
