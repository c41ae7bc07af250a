# SPDX-License-Identifier: Apache-2.0
"""Finds a bundle, and runs it as ``python -m monai.bundle run`` does."""

from __future__ import annotations

import difflib
import math
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

    from monai_salm.release.labels import Cohort

ALL = ("run",)
"""Fit, protect and verify; like all of these, ids of the bundles' configs."""
CHECK = ("check",)
"""Whether there can be a study; ``run`` begins with it."""
FIT = ("fit",)
WRITE = ("protect",)
VERIFY = ("verify",)

_MARK = Path("configs", "metadata.json")
_WRAPPED = ("Failed to evaluate", "Failed to instantiate component")
_OF_LIBRARIES = re.compile(r"Failed to instantiate component '((?:torch\.optim|monai\.networks)\.[\w.]+)'")


def bundle_names() -> tuple[str, ...]:
    """Names of the bundles that came with monai_salm."""
    return tuple(sorted(path.parent.parent.name for path in _shelf().glob(f"*/{_MARK}")))


def bundle_path(name: str) -> Path:
    """Folder of a bundle.

    Args:
        name: one of :py:func:`bundle_names`, or the path of a bundle's folder (a copy that was edited).

    Raises:
        ValueError: When there is no such bundle.
    """
    if name in bundle_names():
        return _shelf() / name
    if (Path(name) / _MARK).is_file():
        return Path(name).absolute()
    raise ValueError(f"there is no bundle {name!r}; use one of {', '.join(bundle_names())}, or the folder of a bundle")


def bundle_for(spatial_dims: int, voxelwise: bool = False) -> str:
    """Name of the bundle for slices (2) or volumes (3), where voxels have labels or (else) whole cases.

    There is one for voxel labels; its setting ``spatial_dims`` tells slices from volumes.
    """
    return "salm_3d_segmentation" if voxelwise else f"salm_{spatial_dims}d_classification"


def copy_bundle(name: str, dest: Path | str) -> Path:
    """Copy a bundle to a new folder, where it can be edited whatever the permissions of the original are.

    Raises:
        ValueError: When there is no such bundle or the folder holds anything.
    """
    source, dest = bundle_path(name), Path(dest).absolute()
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ValueError(f"{dest} is there already; name a new folder for the copy")
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.parent.name != "__pycache__":
            target = dest / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return dest


def plain_settings(bundle: str, names: Sequence[str]) -> dict[str, Any]:
    """Values of the named settings of a bundle, without those that are expressions; read without MONAI."""
    import yaml

    content = yaml.safe_load((bundle_path(bundle) / "configs" / "train.yaml").read_text())
    found = {name: content.get(name) for name in names}
    return {name: value for name, value in found.items() if value is not None and not str(value).startswith(("$", "@"))}


def has_check(bundle: str) -> bool:
    """Whether a bundle has the stage ``check``; copies of bundles of earlier versions have not."""
    return bool(plain_settings(bundle, CHECK))


def check_study(bundle: str, overrides: Mapping[str, Any], cohort: Cohort) -> None:
    """Check, without writing anything, that a bundle can do its study with these settings and cases.

    Raises:
        ValueError: When it cannot.
    """
    from monai.bundle import ConfigParser

    if not has_check(bundle):
        cohort.tested()
        return
    config = bundle_path(bundle) / "configs" / "train.yaml"
    _check_settings(config, overrides)
    parser = ConfigParser()
    parser.read_config(str(config))
    parser.update({**{key: _as_config(value) for key, value in overrides.items()}, "cohort": cohort})
    try:
        parser.get_parsed_content(CHECK[0])
    except RuntimeError as error:
        raise _unwrapped(error) from None


def run_bundle(name: str, run_ids: Sequence[str], overrides: Mapping[str, Any]) -> None:
    """Run stages of a bundle's training config one after the other, in one workflow.

    ``SystemExit`` and ``KeyboardInterrupt`` of a stage pass through.

    Args:
        name: see :py:func:`bundle_path`.
        run_ids: for example :py:data:`ALL`; one id is the same as ``python -m monai.bundle run ID``.
        overrides: values by config id.

    Raises:
        ValueError: When there is no such bundle, or the config has no such id.
        Exception: What a stage raises, freed from MONAI's wrapping.
    """
    from monai.bundle import create_workflow

    configs = bundle_path(name) / "configs"
    _check_settings(configs / "train.yaml", overrides, run_ids)
    given = {key: _as_config(value) for key, value in overrides.items()}
    with warnings.catch_warnings():
        if name in bundle_names():  # ours; of a copy MONAI rightly warns that a config can run any code
            warnings.filterwarnings("ignore", message="parsing config_file")
        try:
            workflow = create_workflow(
                config_file=str(configs / "train.yaml"),
                meta_file=str(configs / "metadata.json"),
                logging_file=str(configs / "logging.conf"),
                run_id=run_ids[0],
                **given,
            )
            for run_id in run_ids:
                workflow.run_id = run_id
                workflow.run()
            workflow.finalize()
        except (RuntimeError, ImportError) as error:
            inner = _unwrapped(error)
            if inner is error:
                raise
            raise inner from inner.__cause__


def _as_config(value: Any) -> Any:
    """A value as MONAI's config keeps it: a plain None is dropped, and in a text, such as a folder's name, alone or in
    a list, ``#`` becomes ``::``, and ``@::`` the id of a part."""
    if value is None:
        return "$None"
    if isinstance(value, list):
        return [_as_config(part) for part in value]
    if isinstance(value, dict):
        return {key: _as_config(part) for key, part in value.items()}
    if not isinstance(value, str) or value.startswith(("$", "@", "%")) or not re.search("#|[@%]::", value):
        return value
    return "$" + re.sub("[#@%:]", lambda sign: f"\\x{ord(sign[0]):02x}", ascii(value))


def _check_settings(config_file: Path, overrides: Mapping[str, Any], run_ids: Sequence[str] = ()) -> None:
    """Check that the config has all these ids, and that numbers and booleans are not replaced by other kinds of values.

    MONAI adds an id that the config lacks, so a typing error would go unnoticed; and a value of the wrong kind would
    fail deep inside of a library, or count as true. Which numbers are allowed is for the parts to say that take them.

    Raises:
        ValueError: When an id is unknown, or a value is of the wrong kind.
    """
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(config_file))
    for name in (*run_ids, *overrides):
        if name not in parser:
            known = [key for key in parser.get() if not key.startswith("_")]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{config_file.parent.parent.name} has no setting {name!r}; {hint}")
    for name, value in overrides.items():
        is_expression = str(value).startswith(("$", "@", "%"))
        if not is_expression and name != "epsilon":  # a budget may be a number or text
            _check_kind(name, value, _usual(parser, name))


def _check_kind(name: str, value: Any, usual: Any) -> None:
    if isinstance(usual, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it takes true or false, such as {usual}")
    elif isinstance(usual, (int, float)):
        if isinstance(value, (bool, str, dict)) or value in (math.inf, -math.inf) or value != value:
            raise ValueError(f"{name} is {value!r}; it takes a number, such as {usual}")


def _usual(parser: ConfigParser, name: str) -> Any:
    """Value of a setting in the bundle; None for an expression that needs the input, or is a part of a component."""
    value = parser[name]
    if not str(value).startswith("$"):
        return value
    with suppress(Exception):  # an edited bundle may compute anything
        return None if "::" in name else parser.get_parsed_content(name)
    return None


def _unwrapped(error: BaseException) -> BaseException:
    """The error behind those that MONAI's config parser wraps around it, one for each level of the config.

    In our words, which can be shown, where the bundle is of another version or a library does not take its settings.
    """
    outer = ""
    while type(error) is RuntimeError and str(error).startswith(_WRAPPED) and error.__cause__ is not None:
        outer, error = str(error), error.__cause__
    is_gone = isinstance(error, ModuleNotFoundError) and "monai_salm." in str(error)
    if is_gone or isinstance(error, TypeError) and "'monai_salm." in outer:
        return ValueError(f"the bundle asks for what this version of monai_salm does not have; copy it anew: {error}")
    made = _OF_LIBRARIES.match(outer)
    if made and isinstance(error, (ValueError, TypeError)):
        return ValueError(f"{made[1]} does not take the settings that it is given: {error}")
    return error


def _shelf() -> Path:
    return Path(str(resources.files("monai_salm.bundles")))
