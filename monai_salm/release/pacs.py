# SPDX-License-Identifier: Apache-2.0
"""Send a release to a PACS (C-STORE), and ask it for what it now holds (C-GET): its "success" is no proof.

A PACS may answer "success" and keep an older file of the same UID. So each series is fetched again, and of every image
the pixel data are compared with those of the file. Only what is in a verified manifest is sent, in the file's own
transfer syntax. Nothing of a file is logged.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread

from monai_salm.io.dicom import looks_like_dicom
from monai_salm.release import commit as door
from monai_salm.release.integrity import check
from monai_salm.release.manifest import IntegrityError, read_manifest
from monai_salm.release.progress import track

AE_TITLE = "MONAI_SALM"
"""What we call ourselves."""
SECONDS = 60.0
"""How long any answer may take."""
_CONTEXTS = 64
"""Presentation contexts of one association; there may be 128."""
_IN_VAIN = 5
"""So many files without an answer or refused connections in a row, and the rest is not sent."""
_NAMED = 20
"""Files that a message names at most."""
_TEXT = re.compile(r"([^@\\\s]{1,16})@([^@\s:]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", re.ASCII)
_UIDS = ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"]


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


@dataclass(frozen=True)
class Pushed:
    """What was sent.

    Args:
        files: DICOM files that the PACS holds now.
        compared: those of them with pixel data, which came back equal.
        left: files of the release that are not DICOM and were not sent.
    """

    files: int
    compared: int
    left: int


@dataclass(frozen=True)
class _File:
    """A file to send: its path, UIDs and transfer syntax, and the digest of its pixel data, empty without any."""

    path: Path
    study: str
    series: str
    instance: str
    sop_class: str
    syntax: str
    pixels: str

    @classmethod
    def read(cls, path: Path) -> _File:
        dataset = dcmread(path)
        uids = [str(dataset[name].value) for name in _UIDS]
        return cls(path, *uids, str(dataset.file_meta.TransferSyntaxUID), _pixels(dataset))


def push(output_dir: Path | str, target: Target | str, ae_title: str = AE_TITLE) -> Pushed:
    """Send the DICOM files of a release, and compare the pixels that the PACS then gives back.

    Args:
        output_dir: the output folder of a release; it is verified first.
        target: the PACS, see :py:meth:`Target.parse`.
        ae_title: what to call ourselves; some PACS only answer to those that they know.

    Raises:
        ValueError: When the release holds no DICOM file.
        ImportError: When pynetdicom is not installed.
        IntegrityError: When the release is not what was written; nothing is sent then. And when the PACS gives back
            other pixels than were sent, or none.
        PushError: When the PACS cannot be reached, or does not take or give back a kind of file.
    """
    target = Target.parse(target) if isinstance(target, str) else target
    _require_pynetdicom()
    found = check(output_dir)
    if found.problems:
        raise IntegrityError(f"{len(found.problems)} problems with the files, nothing is sent; 'verify' tells more")
    with _silent():
        paths = [Path(output_dir) / door.PROTECTED / row.file for row in read_manifest(output_dir)]
        files = [_File.read(path) for path in paths if looks_like_dicom(path)]
        if not files:
            raise ValueError(f"{output_dir} holds no DICOM files; a PACS takes nothing else")
        _store(files, target, ae_title)
        _compare(files, target, ae_title)
    return Pushed(len(files), sum(bool(file.pixels) for file in files), len(paths) - len(files))


def _require_pynetdicom() -> None:
    try:
        import pynetdicom  # noqa: F401
    except ImportError as error:
        raise ImportError("sending needs pynetdicom; run: pip install monai-salm[pacs]") from error


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
    """Files by what one association can negotiate."""
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
            raise PushError("not_accepted", f"the PACS takes none of our {len(kinds)} kinds of file; allow them there")
        raise PushError(
            "no_connection",
            "the PACS does not answer or rejects us; check host, port and both AE titles, and that it knows ours",
        )
    try:
        yield association
    finally:
        association.release()


def _store(files: Sequence[_File], target: Target, ae_title: str) -> None:
    from pynetdicom import _config

    before, _config.STORE_SEND_CHUNKED_DATASET = _config.STORE_SEND_CHUNKED_DATASET, True  # bytes as they are on disk
    failed: dict[str, str] = {}  # why, by the UID of the copy
    try:
        for number, group in enumerate(_kinds(files)):
            _store_kinds(group, target, ae_title, failed, first=number == 0)
    finally:
        _config.STORE_SEND_CHUNKED_DATASET = before
    if failed:
        told = ", ".join(f"{count} with {status}" for status, count in sorted(Counter(failed.values()).items()))
        named = ", ".join(list(failed)[:_NAMED]) + (f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else "")
        stored = len(files) - len(failed)
        detail = f"{len(failed)} of {len(files)} files were not stored ({told}), {stored} were; look at them and send "
        raise PushError("not_stored", f"{detail}again: {named}")


def _store_kinds(group: Sequence[_File], target: Target, ae_title: str, failed: dict[str, str], *, first: bool) -> None:
    """Send files of kinds that are negotiated together.

    A PACS may end the association on a file that it cannot read; the others go by a new one.
    """
    association, in_vain = None, 0
    with ExitStack() as stack:
        for file in track(group, "sending"):
            while in_vain < _IN_VAIN and (association is None or not association.is_established):
                stack.close()
                association = _open(stack, group, target, ae_title, first=first)
                first, in_vain = False, in_vain + (association is None)
            if association is None or not association.is_established:
                failed[file.instance] = "not sent"
                continue
            status = association.send_c_store(file.path)
            if "Status" not in status:
                failed[file.instance], in_vain, association = "no answer", in_vain + 1, None
                continue
            in_vain, code = 0, int(status.Status)
            if code != 0 and code >> 12 != 0xB:  # 0xBxxx: stored, with a warning
                failed[file.instance] = f"status {code:04x}"


def _open(stack: ExitStack, group: Sequence[_File], target: Target, ae_title: str, *, first: bool) -> Any:
    """An association that takes all of these files; None where there is none now, unless it is the first of all.

    Later ones raise nothing: what has been sent by then must be told.
    """
    try:
        association = stack.enter_context(_association(target, ae_title, group))
    except PushError:
        if first:
            raise
        return None
    accepted = {(c.abstract_syntax, c.transfer_syntax[0]) for c in association.accepted_contexts}
    refused = {(file.sop_class, file.syntax) for file in group} - accepted
    if refused and not first:
        return None
    if refused:
        raise PushError(
            "not_accepted",
            f"the PACS takes {len(refused)} of {len(accepted | refused)} kinds of file not in their "
            "transfer syntax; allow it there, or write the release in another one. Nothing was sent",
        )
    return association


def _compare(files: Sequence[_File], target: Target, ae_title: str) -> None:
    held: dict[str, str] = {}

    def keep(event: Any) -> int:
        held[str(event.request.AffectedSOPInstanceUID)] = _pixels(event.dataset)
        return 0x0000

    for group in _kinds(files):
        with _association(target, ae_title, group, keep) as association:
            groups = list(dict.fromkeys((file.study, file.series) for file in group))
            for study, series in track(groups, "reading back"):
                _fetch(association, study, series)
    missing = sum(file.instance not in held for file in files)
    other = sum(file.instance in held and held[file.instance] != file.pixels for file in files)
    if other or missing:
        raise IntegrityError(
            f"the PACS holds other pixels of {other} files than were sent, and does not give back {missing} of "
            f"{len(files)}; it may keep older files of the same UIDs, or change what it stores"
        )


def _fetch(association: Any, study: str, series: str) -> None:
    from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelGet

    query = Dataset()
    query.QueryRetrieveLevel, query.StudyInstanceUID, query.SeriesInstanceUID = "SERIES", study, series
    try:
        if not association.is_established:
            return  # what is missing is told together
        for status, _ in association.send_c_get(query, StudyRootQueryRetrieveInformationModelGet):
            if "Status" not in status:
                break
    except ValueError as error:  # no such context: the PACS does not offer C-GET
        raise PushError(
            "no_read_back",
            "the files were sent, but the PACS does not give them back by C-GET; what it holds is not known. Allow it "
            "there, or compare by other means",
        ) from error


def _pixels(dataset: Dataset) -> str:
    """Digest of the pixel data as they are stored or sent; empty where there are none."""
    value = dataset.get("PixelData")
    return hashlib.sha256(value).hexdigest() if value is not None else ""
