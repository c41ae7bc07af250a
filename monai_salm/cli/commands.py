# SPDX-License-Identifier: Apache-2.0
"""The commands: each takes the parsed arguments and returns an exit code, and imports what is heavy by itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monai_salm.cli.codes import BAD_INPUT, DONE, FAILED, INTEGRITY, NOT_PROTECTED, pipe_broke, say

if TYPE_CHECKING:
    from rich.console import Console

    from monai_salm.release.catalog import Catalog
    from monai_salm.release.gates import Refusal

_SHOWN = 20
"""Rows of a list that are printed without ``--all``."""
_NAMES = "names of what was refused: 'monai-salm inspect EXPORT --all --names'"
"""A release keeps its refusals under pseudonyms, since names may be personal."""


def inspect(options: argparse.Namespace) -> int:
    """List what an export holds."""
    from rich.console import Console

    from monai_salm.release.catalog import scan
    from monai_salm.release.labels import LABELS_FILE, find_labels, label_cases
    from monai_salm.release.listing import cases_table, counts_line, counts_table
    from monai_salm.release.voxels import VoxelLabels

    labels = find_labels(options.export, options.labels)
    voxels = labels if isinstance(labels, VoxelLabels) else None
    catalog = scan(
        options.export,
        _dim(options, voxels is not None),
        window=options.window or "auto",
        voxels=voxels,
        require_deidentified=options.require_deidentified,
    )
    cohort, problem = None, None
    if labels is not None or any(case.label >= 0 for case in catalog.cases):
        try:
            cohort = label_cases(catalog, labels)
        except ValueError as error:  # raised at the end: the tables may show the user its reason
            problem = error
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(counts_line(catalog, cohort), counts_table(catalog, cohort), sep="\n")
    if labels is None and cohort is None:
        console.print(f"No label table: 'protect' needs one ({LABELS_FILE} in the export, or --labels).")
    if options.all:
        console.print(cases_table(catalog, cohort, options.names))
    refusals = cohort.refusals if cohort else catalog.refusals
    if refusals:
        _list_refusals(console, refusals, catalog, options)
    if problem:
        raise problem
    try:
        if cohort:
            cohort.tested()
    except ValueError as error:  # no refusal: without a study, it can be protected
        console.print(f"'protect' will need --no-verify, or end with: {error}", soft_wrap=True, markup=False)
    return NOT_PROTECTED if refusals else DONE


def _list_refusals(
    console: Console, refusals: Sequence[Refusal], catalog: Catalog, options: argparse.Namespace
) -> None:
    """Print how much was refused, and a table of it, or of its first rows."""
    from monai_salm.release.gates import tally
    from monai_salm.release.listing import refusals_table

    shown = refusals if options.all else refusals[:_SHOWN]
    console.print(f"{len(refusals)} refused: {tally(each.reason for each in refusals)}")
    console.print(refusals_table(shown, catalog, options.names))
    if len(shown) < len(refusals):
        console.print(f"and {len(refusals) - len(shown)} more; --all lists them")
    if not options.names:
        console.print(_NAMES, soft_wrap=True)


def _dim(options: argparse.Namespace, voxelwise: bool) -> int:
    """2 for slices or 3 for volumes. Labels of voxels are mostly drawn in volumes."""
    return options.dim or (3 if voxelwise else 2)


def protect(options: argparse.Namespace) -> int:
    """Fit, write and verify a protected copy, or parts of that."""
    from monai_salm import run_settings, workflows
    from monai_salm.release.labels import find_labels
    from monai_salm.release.voxels import VoxelLabels

    _check_arguments(options)
    voxelwise = isinstance(find_labels(options.export, options.labels), VoxelLabels)
    spatial_dims = _dim(options, voxelwise)
    bundle = options.bundle or workflows.bundle_for(spatial_dims, voxelwise)
    named = run_settings.protect_overrides(
        options.export,
        options.out,
        labels=options.labels,
        epsilon=options.epsilon,
        mask_ratio=options.mask_ratio,
        visibility=options.visibility,
        window=options.window,
        spatial_dims=options.dim if voxelwise else None,
        require_deidentified=options.require_deidentified or None,
        rename=options.rename or None,
    )
    overrides = _with_set(options, named)
    if options.like:
        bundle, overrides = run_settings.like_overrides(options.like, overrides)
    run_settings.check_same_fit(options.out, bundle, overrides)
    verified = not (options.no_verify or options.like)
    if options.dry_run:
        return _plan(options, bundle, overrides, spatial_dims, verified)
    if options.shard:
        run_settings.check_same_run(options.out, bundle, overrides)
        code = _run_stages(bundle, workflows.WRITE, overrides | {"shard": options.shard})
        return _outcome(options.out, code, told=True)
    if options.fit_only:
        can_check = verified and workflows.has_check(bundle)  # a study that cannot be is told before the fit
        return _make(options.out, bundle, (workflows.CHECK if can_check else ()) + workflows.FIT, overrides)
    code = _make(options.out, bundle, workflows.ALL if verified else workflows.FIT + workflows.WRITE, overrides)
    code = _outcome(options.out, code, verified=verified, told=True)
    if options.push and code == DONE:
        return _push(options.out, options.push)
    if options.push:
        say("not sent, for the reasons above; 'monai-salm push' sends what is there")
    return code


def _make(out: Path, bundle: str, stages: Sequence[str], overrides: dict[str, Any]) -> int:
    """Run stages, and keep in OUT the settings that what is there was made with; returns the exit code."""
    from monai_salm import run_settings
    from monai_salm.release.commit import PROTECTED

    is_new = not (run_settings.is_begun(out) or (out / PROTECTED).exists())
    if is_new:  # kept settings, if any, are of a run that made nothing
        run_settings.save_run(out, bundle, overrides)
    try:
        code = _run_stages(bundle, stages, overrides)
    except BaseException as error:
        _name_settings(error, out, bundle, overrides)
        run_settings.save_run(out, bundle, overrides, replace=is_new)
        raise
    run_settings.save_run(out, bundle, overrides)
    return code


def _with_set(options: argparse.Namespace, named: dict[str, Any]) -> dict[str, Any]:
    """The settings of ``--set``, and those that options of their own have ``named``.

    Raises:
        ValueError: When both give the same setting.
    """
    chosen = dict(options.set)
    taken = set(named)
    if getattr(options, "dim", None):  # where it chooses the bundle, it is not among the named
        taken.add("spatial_dims")
    if twice := sorted(chosen.keys() & taken):
        raise ValueError(f"{', '.join(twice)}: given by --set and by an option of its own; leave one of the two out")
    return chosen | named


def _name_settings(error: BaseException, out: Path, bundle: str, overrides: dict[str, Any]) -> None:
    """Where the error says that OUT was made with other settings, add to its text which those are."""
    from monai_salm import run_settings
    from monai_salm.records import OtherSettingsError

    if isinstance(error, OtherSettingsError) and (changed := run_settings.changed_settings(out, bundle, overrides)):
        error.args = (f"{error}. Of the settings, {', '.join(changed.values())}",)


def _check_arguments(options: argparse.Namespace) -> None:
    """Check at once what may be a typing error, and not after hours of fitting."""
    from monai_salm import run_settings, workflows
    from monai_salm.perturbations.budget import Budget, as_window
    from monai_salm.perturbations.masks import SparsityMask
    from monai_salm.release.commit import check_output

    if options.bundle:
        workflows.bundle_path(options.bundle)
    if options.window:
        as_window(options.window)
    if options.epsilon is not None:
        Budget.parse(options.epsilon).check_window(options.window)
    if options.mask_ratio is not None:
        SparsityMask(ratio=options.mask_ratio)
    if not options.export.exists():
        raise ValueError(f"export {options.export} does not exist; check the path")
    check_output(options.export, options.out)
    if options.push and (options.shard or options.fit_only):
        raise ValueError("--push sends a whole release; leave it out and run 'monai-salm push' when all is written")
    if options.shard and not (options.out / run_settings.BANK).is_file():
        raise ValueError(f"{options.out} has no perturbations yet; run the same command with --fit-only first")


def _plan(
    options: argparse.Namespace, bundle: str, overrides: dict[str, Any], spatial_dims: int, verified: bool
) -> int:
    """Print what the bundle would do with these settings; ``spatial_dims`` is for a bundle without this setting."""
    from monai_salm import workflows
    from monai_salm.perturbations.budget import as_window
    from monai_salm.release.labels import load_cohort
    from monai_salm.release.plan import make_plan
    from monai_salm.verification.visibility import VisibilityGate

    wanted = ("spatial_dims", "window", "epsilon", "mask_ratio", "visibility", "require_deidentified")
    settings = {"spatial_dims": spatial_dims} | workflows.plain_settings(bundle, wanted)
    settings |= {name: overrides[name] for name in wanted if name in overrides}
    for name in ("epsilon", "mask_ratio"):
        if name not in settings:
            raise ValueError(f"the bundle computes {name}; give --{name.replace('_', '-')} for a plan")
    grid = {"spatial_dims": settings["spatial_dims"], "window": as_window(settings.get("window", "auto"))}
    cohort = load_cohort(
        options.export,
        options.labels,
        **grid,
        require_deidentified=bool(settings.get("require_deidentified")),
        like=options.like,
        budget=settings["epsilon"],
    )
    if verified:
        workflows.check_study(bundle, overrides, cohort)
    plan = make_plan(
        cohort,
        options.out,
        **grid,
        budget=settings["epsilon"],
        mask_ratio=settings["mask_ratio"],
        gate=VisibilityGate(settings.get("visibility", "report")),
        banks=2 if verified and not options.fit_only else 1,  # a study makes the control's too
    )
    print(*plan.lines(), sep="\n")
    return NOT_PROTECTED if plan.refused or plan.refused_at_writing else DONE


def verify(options: argparse.Namespace) -> int:
    """Check the files of a copy, and measure what it is worth."""
    from monai_salm.release.integrity import check

    found = check(options.out, options.public_key)
    print(*found.lines(options.names), sep="\n", flush=True)
    if found.problems:
        return BAD_INPUT if found.unread else INTEGRITY
    if not found.conclusive:
        return NOT_PROTECTED
    if options.files_only:
        return DONE
    from monai_salm import run_settings, workflows

    wants_study = options.export or options.labels or options.set or options.defenses
    if not (wants_study or (options.out / run_settings.RUN_CONFIG).is_file()):
        print(f"only files were checked: a study needs {run_settings.RUN_CONFIG} of 'monai-salm protect'")
        return DONE
    bundle, overrides = run_settings.load_run(options.out)
    export = options.export or Path(overrides.get("dataset_dir", ""))
    if not export.exists():
        raise ValueError(f"the export is not at {export}; name its folder with --export")
    named = run_settings.protect_overrides(export, options.out, labels=options.labels)
    if options.defenses:
        named["defenses"] = options.defenses
    overrides |= _with_set(options, named)
    return _outcome(options.out, _run_stages(bundle, workflows.VERIFY, overrides), verified=True)


def push(options: argparse.Namespace) -> int:
    """Send a release to a PACS."""
    return _push(options.out, options.target, options.aet)


def _push(out: Path, target: str, *ae_title: str) -> int:
    from monai_salm.release.pacs import push

    sent = push(out, target, *ae_title)
    rest = f", and of {sent.files - sent.compared} without pixels the content" if sent.files > sent.compared else ""
    print(f"sent {sent.files} files; of {sent.compared} the PACS gives back the pixels that were sent{rest}")
    if sent.left:
        print(f"not sent: {sent.left} files that are not DICOM")
    return DONE


def bundle_list(options: argparse.Namespace) -> int:
    """Print the names of the bundles."""
    from monai_salm.workflows import bundle_names

    print("\n".join(bundle_names()))
    return DONE


def bundle_path(options: argparse.Namespace) -> int:
    """Print the folder of a bundle."""
    from monai_salm.workflows import bundle_path

    print(bundle_path(options.name))
    return DONE


def bundle_copy(options: argparse.Namespace) -> int:
    """Copy a bundle."""
    from monai_salm.workflows import bundle_path, copy_bundle

    print(copy_bundle(options.name, options.dest or bundle_path(options.name).name))
    return DONE


def _run_stages(bundle: str, stages: Sequence[str], overrides: dict[str, Any]) -> int:
    """Run stages of a bundle; returns the code that a stage wants to exit with."""
    import tempfile

    from monai_salm.workflows import run_bundle

    try:
        tempfile.gettempdir()  # which torch and matplotlib cannot do without
    except FileNotFoundError:
        raise ValueError("there is no folder for temporary files; let TMPDIR name one that can be written to") from None
    try:
        run_bundle(bundle, stages, overrides)
    except SystemExit as stop:
        if pipe_broke(stop):
            raise
        if isinstance(stop.code, str):
            say(stop.code)
            return FAILED
        return stop.code or DONE
    return DONE


def _outcome(out: Path, code: int, *, verified: bool = False, told: bool = False) -> int:
    """Print what a run made, and return the exit code.

    Args:
        out: the output folder.
        code: of the stages; if that is an error, nothing is printed.
        verified: whether there should be a report.
        told: whether the stages have printed the refusals.
    """
    import json

    from monai_salm.release.commit import PROTECTED
    from monai_salm.release.companions import reference_summary
    from monai_salm.release.custody import refusals_line
    from monai_salm.release.visibility import summary

    if code not in (DONE, NOT_PROTECTED):
        return code
    print(f"protected files: {out / PROTECTED}", *filter(None, [reference_summary(out), summary(out)]), sep="\n")
    refused = refusals_line(out)
    if refused:
        print(_NAMES if told else f"{refused}\n{_NAMES}")
        code = NOT_PROTECTED
    if verified and (code == DONE or (out / "report.json").is_file()):
        verdict = json.loads((out / "report.json").read_text())["verdict"]
        print(f"verdict: {verdict}; report: {out / 'report.html'}")
        code = code if verdict == "protected" else NOT_PROTECTED
    return code
