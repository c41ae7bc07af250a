# SPDX-License-Identifier: Apache-2.0
"""Send a release to a PACS (C-STORE), and ask it for what it now holds (C-GET): its "success" is no proof.

A PACS may answer "success" and keep an older file of the same UID. So each series is fetched again, and of every image
the pixel data are compared with those of the file, of other files the content. Only what is in a verified manifest is
sent, in the file's own transfer syntax. Nothing of a file is logged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydicom import Dataset, dcmread
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from monai_salm.io.dicom import looks_like_dicom
from monai_salm.release import commit as door
from monai_salm.release.gates import tally
from monai_salm.release.integrity import check
from monai_salm.release.manifest import IntegrityError, read_chain
from monai_salm.release.progress import track

AE_TITLE = "MONAI_SALM"
"""What we call ourselves."""
SECONDS = 60.0
"""How long any answer may take."""
_CONTEXTS = 64
"""Presentation contexts of one association; there may be 128."""
_IN_VAIN = 5
"""After so many files without an answer, or refused connections, in a row the rest is not tried."""
_NAMED = 20
"""Most files that a message names."""
_TITLE = r"(?! )[ -?A-\[\]-~]{1,16}(?<! )"
_TEXT = re.compile(rf"({_TITLE})@([^@\s:]+|\[[0-9a-fA-F:]+\]):(\d{{1,5}})", re.ASCII)
_DUPLICATE = 0x0111
"""Status of a PACS that already holds a file of this UID, and keeps that."""
_NOT_OFFERED = 0x0122
"""Status "SOP class not supported"."""
_REFERENCES = Tag("ReferencedSeriesSequence")
_UIDS = ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"]

Item = TypeVar("Item")


class PushError(RuntimeError):
    """The PACS did not take all files, or cannot be asked for what it holds.

    Args:
        reason: ``no_connection``, ``not_accepted``, ``not_stored`` or ``no_read_back``.
        detail: what was found and what to do, without names, paths or UIDs of originals.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class Target:
    """Where to send to.

    Args:
        ae_title: what the PACS is called, at most 16 characters.
        host: its name or address.
        port: its DICOM port.

    Example:
        >>> Target.parse("ARCHIVE@127.0.0.1:104")
        Target(ae_title='ARCHIVE', host='127.0.0.1', port=104)
    """

    ae_title: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``AET@host:port``.

        Raises:
            ValueError: When it is not that.
        """
        match = _TEXT.fullmatch(text)
        if match is None or not 0 < int(match[3]) < 65536:
            raise ValueError(f"{text!r} is no PACS; write AET@host:port, for example ARCHIVE@127.0.0.1:104")
        return cls(match[1], match[2].strip("[]"), int(match[3]))


def check_title(text: str) -> None:
    """Check an AE title.

    Raises:
        ValueError: When it is not valid.
    """
    if not re.fullmatch(_TITLE, text):
        raise ValueError(f"{text!r} is no AE title; write 1 to 16 letters, digits or signs of ASCII, no @ or backslash")


@dataclass(frozen=True)
class Pushed:
    """What was sent.

    Args:
        files: DICOM files that were sent and came back equal.
        compared: how many of them have pixel data.
        left: files of the release that are not DICOM and were not sent.
    """

    files: int
    compared: int
    left: int


@dataclass(frozen=True)
class _File:
    """A file to send: its path, UIDs and transfer syntax, the digest of what a PACS must keep, and whether it has
    pixels."""

    path: Path
    study: str
    series: str
    instance: str
    sop_class: str
    syntax: str
    digest: str
    image: bool

    @classmethod
    def read(cls, path: Path) -> _File:
        dataset = dcmread(path)
        uids = [str(dataset[name].value) for name in _UIDS]
        return cls(path, *uids, str(dataset.file_meta.TransferSyntaxUID), _digest(dataset), "PixelData" in dataset)


def push(output_dir: Path | str, target: Target | str, ae_title: str = AE_TITLE) -> Pushed:
    """Send the DICOM files of a release, and compare the pixels that the PACS then gives back.

    Args:
        output_dir: the output folder of a release; it is verified first.
        target: the PACS, see :py:meth:`Target.parse`.
        ae_title: what to call ourselves; some PACS only answer to those that they know.

    Raises:
        ValueError: When there is no release, or it holds no DICOM file.
        ImportError: When pynetdicom is not installed.
        IntegrityError: When the release is not what was written; nothing is sent then. And when the PACS gives back
            other pixels than were sent, or says that it has none.
        PushError: When the PACS cannot be reached, does not take a kind of file, or does not say what it holds.
    """
    target = Target.parse(target) if isinstance(target, str) else target
    check_title(ae_title)
    try:
        import pynetdicom  # noqa: F401
    except ImportError as error:
        raise ImportError("sending needs pynetdicom; run: pip install monai-salm[pacs]") from error
    found = check(output_dir)
    if found.problems:
        raise IntegrityError(f"{len(found.problems)} problems with the files, nothing is sent; 'verify' tells more")
    if not found.conclusive:
        begun = (Path(output_dir) / door.RUN).is_file()
        why = "holds no protected files yet; run 'protect'" if begun else "holds no release; name what 'protect' wrote"
        raise ValueError(f"{output_dir} {why}")
    with _silent():
        manifests = sorted(Path(output_dir).glob(door.MANIFESTS))
        records = [record for path in manifests for record in read_chain(path)[0] if "file" in record]
        paths = [Path(output_dir) / door.PROTECTED / record["file"] for record in records]
        files = [_File.read(path) for path in paths if looks_like_dicom(path)]
        if not files:
            raise ValueError(f"{output_dir} holds no DICOM files; a PACS takes nothing else")
        _store(files, target, ae_title)
        _compare(files, target, ae_title)
    return Pushed(len(files), sum(file.image for file in files), len(paths) - len(files))


@contextmanager
def _silent() -> Iterator[None]:
    """Neither library may log or warn meanwhile: they quote what they read."""
    loggers = [logging.getLogger(name) for name in ("pynetdicom", "pydicom")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL + 1)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _kinds(files: Sequence[_File]) -> Iterator[list[_File]]:
    """Files in groups of which one association can negotiate all kinds."""
    by_kind: dict[tuple[str, str], list[_File]] = defaultdict(list)
    for file in files:
        by_kind[file.sop_class, file.syntax].append(file)
    kinds = list(by_kind.values())
    for at in range(0, len(kinds), _CONTEXTS):
        yield [file for kind in kinds[at : at + _CONTEXTS] for file in kind]


@contextmanager
def _association(target: Target, ae_title: str, files: Sequence[_File], get: Any = None) -> Iterator[Any]:
    """An association for files of these kinds: to store them, or with a handler ``get`` to fetch them."""
    from pynetdicom import AE, build_role, evt
    from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelGet

    ae = AE(ae_title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = SECONDS
    kinds = dict.fromkeys((file.sop_class, file.syntax) for file in files)
    for sop_class, syntax in kinds:
        ae.add_requested_context(sop_class, syntax)
    options: dict[str, Any] = {}
    if get is not None:
        ae.add_requested_context(StudyRootQueryRetrieveInformationModelGet)
        classes = dict.fromkeys(sop_class for sop_class, _ in kinds)
        options["ext_neg"] = [build_role(sop_class, scp_role=True) for sop_class in classes]
        options["evt_handlers"] = [(evt.EVT_C_STORE, get)]
    association = ae.associate(target.host, target.port, ae_title=target.ae_title, **options)
    if not association.is_established:
        if association.rejected_contexts:
            raise _not_accepted(kinds)
        raise PushError(
            "no_connection",
            "the PACS does not answer or rejects us; check host, port and both AE titles, and that it knows ours",
        )
    try:
        yield association
    finally:
        association.release()


def _not_accepted(kinds: Iterable[tuple[str, str]]) -> PushError:
    named = ", ".join(sorted(f"{UID(sop_class).name} as {UID(syntax).name}" for sop_class, syntax in kinds))
    return PushError(
        "not_accepted",
        f"the PACS does not take {named}. Allow that there, or convert the originals before they are protected. "
        "Nothing was sent",
    )


def _each(
    items: Sequence[Item], doing: str, connect: Callable[..., Any], ask: Callable[..., int | None], *, first: bool
) -> dict[Item, str]:
    """Make a request for each item over one association, or a new one whenever that has ended.

    Args:
        items: what to make requests for.
        doing: a verb for the progress.
        connect: opens an association that a stack closes, or returns None; with ``first`` it may raise instead.
        ask: makes a request; returns the status of the answer, or None where there was none.
        first: whether the first association is the first of all, see :py:func:`_open`.

    Returns:
        Why it failed, for each item that did.
    """
    failed: dict[Item, str] = {}
    association, in_vain = None, 0
    with ExitStack() as stack:
        for item in track(items, doing):
            while in_vain < _IN_VAIN and (association is None or not association.is_established):
                stack.close()
                association = connect(stack, first=first)
                first, in_vain = False, in_vain + (association is None)
            if association is None or not association.is_established:
                failed[item] = "not tried"
                continue
            try:
                code = ask(association, item)
            except RuntimeError:  # the association has ended in the meantime
                code = None
            if code is None:
                failed[item], in_vain, association = "with no answer", in_vain + 1, None
                continue
            in_vain = 0
            if code:
                failed[item] = f"with status {code:04x}"
    return failed


def _open(
    group: Sequence[_File], target: Target, ae_title: str, stack: ExitStack, get: Any = None, *, first: bool
) -> Any:
    """An association for these files; None where there is none.

    Only the first of all raises an error instead: later, the user must be told what has been sent by then.
    """
    try:
        association = stack.enter_context(_association(target, ae_title, group, get))
    except PushError:
        if first:
            raise
        return None
    accepted = {(c.abstract_syntax, c.transfer_syntax[0]) for c in association.accepted_contexts}
    refused = {(file.sop_class, file.syntax) for file in group} - accepted
    if refused and first:
        raise _not_accepted(refused)
    return None if refused and get is None else association


def _store(files: Sequence[_File], target: Target, ae_title: str) -> None:
    """Send all files."""
    from pynetdicom import _config

    def send(association: Any, file: _File) -> int | None:
        code = _status(association.send_c_store(file.path))
        return 0 if code is not None and (code >> 12 == 0xB or code == _DUPLICATE) else code  # 0xBxxx: with a warning

    before, _config.STORE_SEND_CHUNKED_DATASET = _config.STORE_SEND_CHUNKED_DATASET, True  # bytes as they are on disk
    failed: dict[_File, str] = {}
    try:
        for number, group in enumerate(_kinds(files)):
            failed |= _each(group, "sending", partial(_open, group, target, ae_title), send, first=number == 0)
    finally:
        _config.STORE_SEND_CHUNKED_DATASET = before
    if failed:
        named = ", ".join(file.instance for file in list(failed)[:_NAMED])
        named += f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        raise PushError(
            "not_stored",
            f"{len(failed)} of {len(files)} files were not stored ({tally(failed.values())}), "
            f"{len(files) - len(failed)} were; look at them (what got no answer may be stored) and send again: {named}",
        )


def _compare(files: Sequence[_File], target: Target, ae_title: str) -> None:
    """Fetch all series from the PACS, and compare the digests of what comes back."""
    held: dict[str, str] = {}

    def keep(event: Any) -> int:
        held[str(event.request.AffectedSOPInstanceUID)] = _digest(event.dataset)
        return 0x0000

    failed: dict[tuple[str, str], str] = {}
    for group in _kinds(files):
        series = list(dict.fromkeys((file.study, file.series) for file in group))
        connect = partial(_open, group, target, ae_title, get=keep)
        failed |= _each(series, "reading back", connect, _fetch, first=False)
    other = sum(held.get(file.instance, file.digest) != file.digest for file in files)
    absent = [file for file in files if file.instance not in held]
    unknown = sum((file.study, file.series) in failed for file in absent)
    if other or len(absent) > unknown:
        raise IntegrityError(
            f"the PACS holds other pixels or content of {other} files than were sent, and does not give back "
            f"{len(absent)} of {len(files)}; it may keep older files of the same UIDs, or change what it stores"
        )
    if unknown:
        raise PushError(
            "no_read_back",
            f"all {len(files)} files were sent and stored, but {unknown} of them the PACS does not give back by C-GET "
            f"(series: {tally(failed.values())}); what it holds of them is not known. Allow C-GET there for our AE "
            "title and send again, or compare by other means",
        )


def _fetch(association: Any, series: tuple[str, str]) -> int | None:
    """Ask for a series; its files go to the handler of the association."""
    from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelGet

    query, code = Dataset(), None
    query.QueryRetrieveLevel = "SERIES"
    query.StudyInstanceUID, query.SeriesInstanceUID = series
    try:
        for status, _ in association.send_c_get(query, StudyRootQueryRetrieveInformationModelGet):
            code = _status(status)
    except ValueError:  # no such context: the PACS does not offer C-GET
        return _NOT_OFFERED
    return code


def _status(answer: Dataset) -> int | None:
    return int(answer.Status) if "Status" in answer else None


def _digest(dataset: Dataset) -> str:
    """Digest of the pixel data as they are stored or sent; where there are none, of the content."""
    value = dataset.get("PixelData")
    if value is None:
        told = dataset.to_json_dict(suppress_invalid_tags=True)
        value = json.dumps({key: told[key] for key in sorted(told) if _is_content(Tag(key))}, sort_keys=True).encode()
    return hashlib.sha256(value).hexdigest()


def _is_content(tag: BaseTag) -> bool:
    """Whether a PACS must keep an element: it may correct those of patient, study and request, and add its own."""
    steps = tag.group in (0x0032, 0x0038, 0x4008) or (tag.group == 0x0040 and tag.element < 0xA000)
    return tag == _REFERENCES or (0x0028 <= tag.group < 0xFF00 and not tag.is_private and not steps)
