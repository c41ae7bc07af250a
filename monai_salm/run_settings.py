# SPDX-License-Identifier: Apache-2.0
"""Settings of a run: from the options of the command line to config ids, kept beside a release, and compared later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from monai_salm.workflows import bundle_names, bundle_path, plain_settings

RUN_CONFIG = "private/run-config.json"
"""Where :py:func:`save_run` keeps bundle and settings of a release."""
BANK = "private/bank.sqlite"
"""Where the bundles keep the perturbations."""

_OF_EACH_RUN = ("dataset_dir", "output_dir", "labels", "visibility", "require_deidentified", "shard", "device")
"""Settings that do not change how perturbations are made; further cases may have others."""


def protect_overrides(
    export: Path,
    output_dir: Path,
    *,
    labels: Path | None = None,
    epsilon: str | None = None,
    mask_ratio: float | None = None,
    visibility: str | None = None,
    window: Sequence[float] | None = None,
    spatial_dims: int | None = None,
    require_deidentified: bool | None = None,
    rename: bool | None = None,
) -> dict[str, Any]:
    """Values by config id, for the options of the command line; what is None keeps the bundle's default."""
    named = {
        "dataset_dir": str(export.absolute()),
        "output_dir": str(output_dir.absolute()),
        "labels": str(labels.absolute()) if labels else None,
        "epsilon": epsilon,
        "mask_ratio": mask_ratio,
        "visibility": visibility,
        "window": list(window) if window else None,
        "spatial_dims": spatial_dims,
        "require_deidentified": require_deidentified,
        "rename": rename,
    }
    return {name: value for name, value in named.items() if value is not None}


def save_run(output_dir: Path, bundle: str, overrides: Mapping[str, Any], *, replace: bool = True) -> None:
    """Keep how a copy was made beside its key, so that it can be verified later.

    Does nothing where no release was begun, or while another process works on it.

    Args:
        output_dir: folder of the release.
        bundle: see :py:func:`bundle_path`.
        overrides: values by config id.
        replace: whether to replace what was kept before.
    """
    from monai_salm.release import lock
    from monai_salm.release.commit import RUN, clear_staging, write

    if not (output_dir / RUN).is_file():
        return
    with suppress(lock.LockedError), lock.holding(output_dir):
        if replace or not (output_dir / RUN_CONFIG).is_file():
            kept = {"schema_version": 1, "bundle": _full_name(bundle), "overrides": dict(overrides)}
            write(output_dir, {RUN_CONFIG: json.dumps(kept, indent=2) + "\n"}, "settings")
            clear_staging(output_dir, "settings")  # and nothing of shards that are being written


def load_run(output_dir: Path) -> tuple[str, dict[str, Any]]:
    """Bundle and overrides that :py:func:`save_run` kept.

    Raises:
        ValueError: When the folder has none, or not one that this version understands.
    """
    path = output_dir / RUN_CONFIG
    try:
        kept = json.loads(path.read_text())
        return str(kept["bundle"]), dict(kept["overrides"])
    except FileNotFoundError as error:
        raise ValueError(
            f"{output_dir} was not made by 'monai-salm protect' ({RUN_CONFIG} is missing); name the folder that "
            "protect wrote, or use the bundle that wrote it: its stage 'verify', or for further cases its settings "
            "'like' and 'key_file'"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be understood; run 'monai-salm protect' again, it will go on") from error


def like_overrides(output_dir: Path, said: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Bundle and settings with which further cases are protected as an earlier release was, without fitting again.

    Args:
        output_dir: folder of the earlier release.
        said: settings that the user gives for the further cases, as from :py:func:`protect_overrides`.

    Raises:
        ValueError: When the earlier release is not finished, its key is gone, or a setting contradicts it.
    """
    from monai_salm.release.custody import KEY
    from monai_salm.release.earlier import EarlierRelease

    bundle, before = load_run(output_dir)
    EarlierRelease(output_dir)
    for name in sorted(said.keys() - {*_OF_EACH_RUN, "rename"}):
        if said[name] != before.get(name):
            raise ValueError(f"{name} is that of the earlier release, whose surrogate was fitted so; leave it out")
    kept = {name: value for name, value in before.items() if name not in _OF_EACH_RUN}
    key_file = Path(before.get("key_file") or output_dir.absolute() / KEY)
    if not key_file.is_file():
        raise ValueError(
            f"the key of the earlier release is not at {key_file}; put it back there: with another key the copies "
            "would not belong together"
        )
    return bundle, {**kept, "key_file": str(key_file), **said, "like": str(output_dir.absolute())}


def is_begun(output_dir: Path) -> bool:
    """Whether a folder holds perturbations of a complete round; from then on the settings are fixed."""
    if not (output_dir / BANK).is_file():
        return False
    from monai_salm.bank import PerturbationBank

    try:
        return len(PerturbationBank(output_dir / BANK)) > 0
    except ValueError:  # empty, as a killed run leaves it, or damaged, which the fit reports
        return False


def check_same_fit(output_dir: Path, bundle: str, overrides: Mapping[str, Any]) -> None:
    """Refuse, before a scan, settings of our bundles that certainly cannot go on with the perturbations in a folder.

    The fit itself compares all that decides perturbations, which needs every image.

    Raises:
        ValueError: When the perturbations are of another bundle, budget or mask ratio.
    """
    if bundle in bundle_names() and is_begun(output_dir):
        changed = changed_settings(output_dir, bundle, overrides)
        if certain := [changed[name] for name in ("bundle", "epsilon", "mask_ratio") if name in changed]:
            raise ValueError(
                f"{output_dir} holds perturbations of other settings: {', '.join(certain)}; give the earlier ones, or "
                "another output folder"
            )


def check_same_run(output_dir: Path, bundle: str, overrides: Mapping[str, Any]) -> None:
    """Make sure that a shard is written with the settings of the perturbations; folders and tables may have moved.

    Raises:
        ValueError: When the settings are not those that :py:func:`save_run` kept, or none were kept.
    """
    load_run(output_dir)  # raises where there are none
    if changed := changed_settings(output_dir, bundle, overrides):
        raise ValueError(
            f"the perturbations were made with other settings; give the ones that --fit-only was given: "
            f"{', '.join(changed.values())}"
        )


def changed_settings(output_dir: Path, bundle: str, overrides: Mapping[str, Any]) -> dict[str, str]:
    """How settings differ from those that :py:func:`save_run` kept: a sentence by name of the setting.

    Empty where none were kept. Folders and tables may differ; a setting that was left out has the bundle's value.
    """
    if not (output_dir / RUN_CONFIG).is_file():
        return {}
    kept_bundle, kept = load_run(output_dir)
    if _full_name(bundle) != kept_bundle:
        ours = {kept_bundle, bundle} <= set(bundle_names())
        return {"bundle": f"bundle was {kept_bundle} and is {bundle}" if ours else "the bundle is another"}
    names = sorted((kept.keys() | overrides.keys()) - {"dataset_dir", "output_dir", "labels"})
    defaults = plain_settings(bundle, names)
    pairs = {name: [each.get(name, defaults.get(name)) for each in (kept, overrides)] for name in names}
    return {name: f"{name} was {old} and is {new}" for name, (old, new) in pairs.items() if _differ(name, old, new)}


def _differ(name: str, old: Any, new: Any) -> bool:
    from monai_salm.perturbations.budget import Budget

    if name == "epsilon" and None not in (old, new):
        old, new = (str(Budget.parse(value)) for value in (old, new))
    return json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True)


def _full_name(name: str) -> str:
    """A bundle's name that means the same from any working directory: one of ours, or an absolute path."""
    return name if name in bundle_names() else str(bundle_path(name))
