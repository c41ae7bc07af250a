# SPDX-License-Identifier: Apache-2.0
"""The command ``monai-salm``: arguments and exit codes. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from monai_salm import __version__

DONE, FAILED, BAD_INPUT, NOT_PROTECTED, INTEGRITY, LOCKED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
EXIT_CODES = """\
exit codes:
  0    done: everything is protected, and verified where asked
  1    an error in the program; the traceback says where
  2    the arguments or the input cannot be used, or OUT was made with other settings; nothing was written that was not
       whole
  3    a file was refused, or the verdict is not "protected", or there was nothing to check ("inconclusive")
  4    a file of OUT is not what was written, is missing, or does not belong; share nothing of the folder
  5    another process writes into OUT
  130  interrupted; the same command goes on
"""
_SHOWN = 20
"""Rows of a list on the screen unless all are asked for."""
_DIM_HELP = "2: every slice is a case; 3: every volume (default: 3 where voxels have labels, else 2)"

_NAMES_HELP = "show the names of files in place of pseudonyms; they may be personal"
_EPSILON_HELP = "largest change, as '8/255', '5 HU', '12 stored' or a preset: ct-brain, ct-body, ct-lung, mr, cr-dx"
_VISIBILITY_HELP = "of each image beside its own JPEG 2000 copy at 5:1: report it, or refuse what is more visible"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    _quiet_logs()
    umask = os.umask(0o077)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        _say("interrupted; what is finished is kept. Run the same command again to go on")
        return INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        code = _exit_code(error)
        if code is None:
            _say_where(error)
            return FAILED
        _say(_sentence(error, options))
        return code
    finally:
        os.umask(umask)


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "monai-salm",
        description="Protected copies of medical image data sets: sparsity-aware local masking (SALM) for MONAI.",
        epilog=EXIT_CODES,
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"monai-salm {__version__}")
    debug = "show the traceback and text of every error; the text of an unexpected one may hold names of patients"
    parser.add_argument("--debug", action="store_true", help=debug)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="list what an export holds and what would be refused, with reasons")
    inspect.add_argument("export", type=Path, metavar="EXPORT", help="folder (or archive) with the images")
    _add_input(inspect)
    inspect.add_argument("--dim", type=int, choices=(2, 3), help=_DIM_HELP)
    inspect.add_argument("--all", action="store_true", help="list every case and every refusal")
    inspect.add_argument("--names", action="store_true", help=_NAMES_HELP)
    inspect.set_defaults(command=_inspect)

    protect = commands.add_parser("protect", help="write the protected copy of an export, and verify it")
    protect.add_argument("export", type=Path, metavar="EXPORT", help="folder (or archive) with the images")
    protect.add_argument("out", type=Path, metavar="OUT", help="new or empty folder; OUT/protected is what you share")
    _add_input(protect)
    which = protect.add_mutually_exclusive_group()
    which.add_argument("--dim", type=int, choices=(2, 3), help=_DIM_HELP)
    which.add_argument("--bundle", metavar="NAME", help="a bundle's name, or the folder of an edited copy")
    protect.add_argument("--epsilon", metavar="BUDGET", help=_EPSILON_HELP)
    protect.add_argument("--mask-ratio", type=float, metavar="R", help="part of the voxels that may change, in (0, 1]")
    protect.add_argument("--visibility", choices=("report", "refuse", "none"), help=_VISIBILITY_HELP)
    _add_set(protect)
    protect.add_argument("--no-verify", action="store_true", help="only write; 'verify OUT' does the rest later")
    protect.set_defaults(command=_protect)

    verify = commands.add_parser(
        "verify",
        help="check that a protected copy is what was written, then measure what it is worth",
        description="First every file is held against manifest, chain and signature; this needs neither the export nor "
        "OUT/private. Then, where OUT/private tells how the copy was made, the study of victims is run, with a report "
        "and a verdict.",
        epilog=EXIT_CODES,
        formatter_class=formatter,
    )
    verify.add_argument("out", type=Path, metavar="OUT", help="folder that protect wrote, or a copy without private/")
    verify.add_argument("--files-only", action="store_true", help="only check the files")
    public_key = "the owner's release.pub, from a source that you trust (default: the one in OUT)"
    verify.add_argument("--public-key", type=Path, metavar="FILE", help=public_key)
    verify.add_argument("--names", action="store_true", help=_NAMES_HELP)
    verify.add_argument("--export", type=Path, help="the export, if it is no longer where protect found it")
    verify.add_argument("--labels", type=Path, metavar="CSV", help="the label table, if it moved")
    _add_set(verify)
    verify.set_defaults(command=_verify)

    bundle = commands.add_parser("bundle", help="find the MONAI bundles that come with monai-salm")
    actions = bundle.add_subparsers(title="actions", required=True, metavar="ACTION")
    actions.add_parser("list", help="print the names").set_defaults(command=_bundle_list)
    path = actions.add_parser("path", help="print the folder of a bundle")
    path.add_argument("name", metavar="NAME")
    path.set_defaults(command=_bundle_path)
    copy = actions.add_parser("copy", help="copy a bundle to a folder of your own, to edit it")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("dest", type=Path, nargs="?", metavar="DEST", help="new folder (default: ./NAME)")
    copy.set_defaults(command=_bundle_copy)
    return parser


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="CSV",
        help="table case,label[,split] or case,mask[,split] (default: labels.csv in the export)",
    )
    parser.add_argument(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="intensity window in physical units"
    )


def _add_set(parser: argparse.ArgumentParser) -> None:
    help_ = "override any setting of the bundle's train.yaml; may be repeated"
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="KEY=VALUE", help=help_)


def _setting(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` with a JSON or Python value; anything else is text."""
    import ast
    import json

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    if key.strip() in ("dataset_dir", "output_dir"):
        raise argparse.ArgumentTypeError(f"{key.strip()} is named by the arguments EXPORT and OUT")
    for read in (json.loads, ast.literal_eval):
        try:
            return key.strip(), read(value)
        except (ValueError, SyntaxError):
            continue
    return key.strip(), value


# -------------------------------------------------------------------- commands


def _inspect(options: argparse.Namespace) -> int:
    from rich.console import Console

    from monai_salm.release.catalog import scan
    from monai_salm.release.labels import LABELS_FILE, find_labels, label_cases
    from monai_salm.release.listing import cases_table, counts_line, counts_table, refusals_table
    from monai_salm.release.voxels import VoxelLabels

    labels = find_labels(options.export, options.labels)
    window = tuple(options.window) if options.window else "auto"
    voxels = labels if isinstance(labels, VoxelLabels) else None
    catalog = scan(options.export, _dim(options, voxels is not None), window=window, voxels=voxels)
    cohort, problem = None, None
    if labels is not None or any(case.label >= 0 for case in catalog.cases):
        try:
            cohort = label_cases(catalog, labels)
        except ValueError as error:  # told at the end: what the export holds may show the reason
            problem = error
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(counts_line(catalog, cohort), counts_table(catalog, cohort), sep="\n")
    if labels is None and cohort is None:
        console.print(f"No label table: 'protect' needs one ({LABELS_FILE} in the export, or --labels).")
    if options.all:
        console.print(cases_table(catalog, cohort, options.names))
    refusals = cohort.refusals if cohort else catalog.refusals
    if refusals:
        shown = refusals if options.all else refusals[:_SHOWN]
        console.print(f"{len(refusals)} refused: {_tally(each.reason for each in refusals)}")
        console.print(refusals_table(shown, catalog, options.names))
        if len(shown) < len(refusals):
            console.print(f"and {len(refusals) - len(shown)} more; --all lists them")
    if problem:
        raise problem
    return NOT_PROTECTED if refusals else DONE


def _dim(options: argparse.Namespace, voxelwise: bool) -> int:
    """Slices or volumes; labels of voxels are mostly drawn in volumes."""
    return options.dim or (3 if voxelwise else 2)


def _protect(options: argparse.Namespace) -> int:
    from monai_salm import workflows
    from monai_salm.perturbations.budget import Budget
    from monai_salm.perturbations.masks import SparsityMask
    from monai_salm.release.commit import check_output
    from monai_salm.release.labels import find_labels
    from monai_salm.release.voxels import VoxelLabels

    # What a typing error could spoil is checked now, and not after hours of fitting.
    if options.bundle:
        workflows.bundle_path(options.bundle)
    if options.epsilon is not None:
        Budget.parse(options.epsilon).check_window(options.window)
    if options.mask_ratio is not None:
        SparsityMask(ratio=options.mask_ratio)
    if not options.export.exists():
        raise ValueError(f"export {options.export} does not exist; check the path")
    check_output(options.export, options.out)
    voxelwise = isinstance(find_labels(options.export, options.labels), VoxelLabels)
    bundle = options.bundle or workflows.bundle_for(_dim(options, voxelwise), voxelwise)
    overrides = dict(options.set) | workflows.protect_overrides(
        options.export,
        options.out,
        labels=options.labels,
        epsilon=options.epsilon,
        mask_ratio=options.mask_ratio,
        visibility=options.visibility,
        window=options.window,
        spatial_dims=options.dim if voxelwise else None,
    )
    stages = workflows.WITHOUT_VERIFY if options.no_verify else workflows.ALL
    try:
        code = _stages(bundle, stages, overrides)
    finally:
        workflows.save_run(options.out, bundle, overrides)
    return _outcome(options.out, code, verified=not options.no_verify)


def _verify(options: argparse.Namespace) -> int:
    from monai_salm.release.integrity import check

    found = check(options.out, options.public_key)
    print(*found.lines(options.names), sep="\n", flush=True)
    if found.problems or not found.conclusive:
        return INTEGRITY if found.problems else NOT_PROTECTED
    from monai_salm import workflows

    asked = options.export or options.labels or options.set
    if options.files_only or not (asked or (options.out / workflows.RUN_CONFIG).is_file()):
        return DONE
    bundle, overrides = workflows.load_run(options.out)
    export = options.export or Path(overrides.get("dataset_dir", ""))
    if not export.exists():
        raise ValueError(f"the export is not at {export}; name its folder with --export")
    overrides |= dict(options.set) | workflows.protect_overrides(export, options.out, labels=options.labels)
    return _outcome(options.out, _stages(bundle, workflows.VERIFY, overrides), verified=True)


def _bundle_list(options: argparse.Namespace) -> int:
    from monai_salm.workflows import bundle_names

    print("\n".join(bundle_names()))
    return DONE


def _bundle_path(options: argparse.Namespace) -> int:
    from monai_salm.workflows import bundle_path

    print(bundle_path(options.name))
    return DONE


def _bundle_copy(options: argparse.Namespace) -> int:
    from monai_salm.workflows import bundle_path, copy_bundle

    print(copy_bundle(options.name, options.dest or bundle_path(options.name).name))
    return DONE


# -------------------------------------------------------------------- results


def _stages(bundle: str, stages: Sequence[str], overrides: dict[str, Any]) -> int:
    """Run stages of a bundle; the code a stage wants to exit with."""
    from monai_salm.workflows import run_bundle

    try:
        run_bundle(bundle, stages, overrides)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            _say(stop.code)
            return FAILED
        return stop.code or DONE
    return DONE


def _outcome(out: Path, code: int, *, verified: bool) -> int:
    """Say what came out, and how that counts, unless the stages ended with an error (any other ``code``)."""
    import json

    from monai_salm.release.commit import PROTECTED
    from monai_salm.release.protect import REFUSALS, read_refusals
    from monai_salm.release.visibility import summary

    if code not in (DONE, NOT_PROTECTED):
        return code
    print(f"protected files: {out / PROTECTED}", *filter(None, [summary(out)]), sep="\n")
    refusals = read_refusals(out)
    if refusals:
        print(f"refused and not in the copy: {_tally(each.reason for each in refusals)}; reasons in {out / REFUSALS}")
        code = NOT_PROTECTED
    if verified and (code == DONE or (out / "report.json").is_file()):
        verdict = json.loads((out / "report.json").read_text())["verdict"]
        print(f"verdict: {verdict}; report: {out / 'report.html'}")
        code = code if verdict == "protected" else NOT_PROTECTED
    return code


def _tally(values: Iterable[str]) -> str:
    return ", ".join(f"{count} {value}" for value, count in sorted(Counter(values).items()))


# -------------------------------------------------------------------- errors


def _exit_code(error: Exception) -> int | None:
    """Code of an error that its own text explains; None for a fault of the program."""
    if type(error).__module__.startswith("monai_salm."):
        return {"IntegrityError": INTEGRITY, "LockedError": LOCKED}.get(type(error).__name__, BAD_INPUT)
    explained = isinstance(error, OSError) or (isinstance(error, ValueError) and _raised_by_us(error))
    return BAD_INPUT if explained else None


def _raised_by_us(error: Exception) -> bool:
    """A ValueError of torch or NumPy is a fault of ours; one that we raise is about the input."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("monai_salm.")


def _sentence(error: Exception, options: argparse.Namespace) -> str:
    """Text of an explained error; of files only those are named that the command line named."""
    if isinstance(error, OSError) and error.strerror:
        named = {str(value) for value in vars(options).values() if isinstance(value, Path)}
        return f"{error.strerror}: {error.filename}" if str(error.filename) in named else error.strerror
    return str(error)


def _say_where(error: Exception) -> None:
    """The traceback of a fault, without texts: those of other libraries quote what they read, names included."""
    import traceback

    print("Traceback (most recent call last):", *traceback.format_tb(error.__traceback__), file=sys.stderr, sep="\n")
    _say(f"a fault of the program ({type(error).__name__}); its text is kept back, --debug shows it")


def _say(text: str) -> None:
    print(f"monai-salm: {text}", file=sys.stderr)


def _quiet_logs() -> None:
    import logging

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")


if __name__ == "__main__":
    sys.exit(main())
