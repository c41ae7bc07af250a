# SPDX-License-Identifier: Apache-2.0
"""The arguments that each command takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monai_salm import __version__
from monai_salm.cli import commands
from monai_salm.cli.codes import EXIT_CODES

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

_DIM_HELP = "2: every slice is a case; 3: every volume (default: 3 where voxels have labels, else 2)"
_NAMES_HELP = "show the names of files in place of pseudonyms; names may be personal"


def parser() -> argparse.ArgumentParser:
    """The parser; each command's function is in ``command``."""
    parser = argparse.ArgumentParser(
        "monai-salm",
        description="Write a protected copy of a labeled medical image data set, from which networks\n"
        "learn little, and measure what it is worth. Begin with:\n\n"
        "  monai-salm inspect EXPORT        what is there, and what would be refused\n"
        "  monai-salm protect EXPORT OUT    write OUT/protected, the copy to share, and a report\n"
        "  monai-salm verify OUT            check the copy, and measure again what it is worth",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"monai-salm {__version__}")
    debug = "show the traceback and text of every error; the text of an unexpected one may hold names of patients"
    parser.add_argument("--debug", action="store_true", help=debug)
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_inspect, _add_protect, _add_verify, _add_push, _add_bundle):
        add(verbs)
    return parser


def _add_inspect(verbs: Verbs) -> None:
    inspect = verbs.add_parser("inspect", help="list what an export holds, and what would be refused and why")
    inspect.add_argument("export", type=Path, metavar="EXPORT", help="folder (or archive) with the images")
    _add_input(inspect)
    inspect.add_argument("--dim", type=int, choices=(2, 3), help=_DIM_HELP)
    inspect.add_argument("--all", action="store_true", help="list every case and every refusal")
    inspect.add_argument("--names", action="store_true", help=_NAMES_HELP)
    inspect.set_defaults(command=commands.inspect)


def _add_protect(verbs: Verbs) -> None:
    protect = verbs.add_parser("protect", help="write the protected copy of an export, and measure what it is worth")
    protect.add_argument("export", type=Path, metavar="EXPORT", help="folder (or archive) with the images")
    protect.add_argument("out", type=Path, metavar="OUT", help="new or empty folder; OUT/protected is what you share")
    _add_input(protect)
    which = protect.add_mutually_exclusive_group()
    which.add_argument("--dim", type=int, choices=(2, 3), help=_DIM_HELP)
    which.add_argument("--bundle", metavar="NAME", help="a bundle's name, or the folder of an edited copy")
    like = "an earlier release: protect further cases of its task with its surrogate and key, without fit or study"
    which.add_argument("--like", type=Path, metavar="OUT1", help=like)
    epsilon = (
        "largest change of a voxel: '8/255' (of the intensity window; the default), '5 HU', '12 stored' (integers of "
        "the file) or a preset: ct-brain, ct-body, ct-lung, mr, cr-dx"
    )
    protect.add_argument("--epsilon", metavar="BUDGET", help=epsilon)
    ratio = "fraction of the voxels that may change, in (0, 1] (default: 0.4, or 0.15 where voxels have labels)"
    protect.add_argument("--mask-ratio", type=float, metavar="R", help=ratio)
    visibility = "what to do with images that change more visibly than their JPEG 2000 copy at 5:1 (default: report)"
    protect.add_argument("--visibility", choices=("report", "refuse", "none"), help=visibility)
    _add_set(protect)
    rename = "give new names to files that would keep those of the export: NIfTI, PNG, TIFF, archives"
    protect.add_argument("--rename", action="store_true", help=rename)
    protect.add_argument("--dry-run", action="store_true", help="only tell what would be done; write nothing")
    protect.add_argument("--push", type=_target, metavar="AET@host:port", help="then send it to a PACS, as 'push' does")
    stages = protect.add_mutually_exclusive_group()
    stages.add_argument("--no-verify", action="store_true", help="write without a study; 'verify OUT' does it later")
    stages.add_argument("--fit-only", action="store_true", help="only make the perturbations; --shard writes later")
    shard = "only write part I of N, after --fit-only; other processes write the other parts into the same OUT"
    stages.add_argument("--shard", type=_shard, metavar="I/N", help=shard)
    protect.set_defaults(command=commands.protect)


def _add_verify(verbs: Verbs) -> None:
    verify = verbs.add_parser(
        "verify",
        help="check that a protected copy is what was written, then measure what it is worth",
        description="First, every file is compared with manifest, chain and signature. This needs\n"
        "neither the export nor OUT/private. Then, where OUT/private tells how the copy\n"
        "was made, the study is run: networks are trained on the clean and on the\n"
        "protected images and tested on clean ones. It ends with a report and a verdict.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("out", type=Path, metavar="OUT", help="folder that protect wrote, or a copy without private/")
    verify.add_argument("--files-only", action="store_true", help="only check the files")
    public_key = "the owner's release.pub, from a source that you trust (default: the one in OUT)"
    verify.add_argument("--public-key", type=Path, metavar="FILE", help=public_key)
    verify.add_argument("--names", action="store_true", help=_NAMES_HELP)
    defenses = "also measure what is left when a third party fights the protection; this does not change the verdict"
    verify.add_argument("--defenses", choices=("standard", "full"), help=defenses)
    verify.add_argument("--export", type=Path, help="the export, if it is no longer where protect found it")
    verify.add_argument("--labels", type=Path, metavar="CSV", help="the label table, if it moved")
    _add_set(verify)
    verify.set_defaults(command=commands.verify)


def _add_push(verbs: Verbs) -> None:
    push = verbs.add_parser("push", help="send a release to a PACS, and compare what the PACS gives back")
    push.add_argument("out", type=Path, metavar="OUT", help="folder that protect wrote")
    push.add_argument("target", type=_target, metavar="AET@host:port", help="title and address of the PACS")
    title = "our own AE title (default: %(default)s)"
    push.add_argument("--aet", type=_title, default="MONAI_SALM", metavar="TITLE", help=title)
    push.set_defaults(command=commands.push)


def _add_bundle(verbs: Verbs) -> None:
    bundle = verbs.add_parser("bundle", help="find the MONAI bundles that come with monai-salm")
    actions = bundle.add_subparsers(title="actions", required=True, metavar="ACTION")
    actions.add_parser("list", help="print the names").set_defaults(command=commands.bundle_list)
    path = actions.add_parser("path", help="print the folder of a bundle")
    path.add_argument("name", metavar="NAME")
    path.set_defaults(command=commands.bundle_path)
    copy = actions.add_parser("copy", help="copy a bundle to a folder of your own, to edit it")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("dest", type=Path, nargs="?", metavar="DEST", help="new folder (default: ./NAME)")
    copy.set_defaults(command=commands.bundle_copy)


def _add_input(parser: argparse.ArgumentParser) -> None:
    """What tells which cases an export holds, and which of them may be protected."""
    labels = "table case,label[,split] or case,mask[,split] (default: labels.csv in the export)"
    parser.add_argument("--labels", type=Path, metavar="CSV", help=labels)
    window = "intensity window in physical units"
    parser.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help=window)
    gate = (
        "refuse DICOM files that do not say PatientIdentityRemoved YES and BurnedInAnnotation NO, others with free text"
    )
    parser.add_argument("--require-deidentified", action="store_true", help=gate)


def _add_set(parser: argparse.ArgumentParser) -> None:
    help_ = "change any setting of the bundle's train.yaml; may be repeated"
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help=help_)


def _target(text: str) -> str:
    from monai_salm.release.pacs import Target

    return _checked(Target.parse, text)


def _title(text: str) -> str:
    from monai_salm.release.pacs import check_title

    return _checked(check_title, text)


def _shard(text: str) -> str:
    from monai_salm.release.shards import Shard

    return _checked(Shard.parse, text)


def _checked(parse: Callable[[str], Any], text: str) -> str:
    """The text as it is, if ``parse`` can read it: a typing error should end here, and not after hours."""
    try:
        parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def setting(text: str) -> tuple[str, Any]:
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
