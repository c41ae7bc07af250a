# SPDX-License-Identifier: Apache-2.0
"""Out of a PACS, protected, into it again; and what a PACS may do wrong meanwhile."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import orthanc
import pydicom.data
import pytest
from exports import write_labels, write_nifti, write_series
from orthanc import Orthanc, free_ports
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pynetdicom import AE, AllStoragePresentationContexts, StoragePresentationContexts, evt
from pynetdicom.sop_class import (
    CTImageStorage,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)
from test_companions import write_export
from test_later_cases import BUNDLE, SETTINGS
from test_protect import DATA, bank_of

from monai_salm.cli import main
from monai_salm.cli.codes import BAD_INPUT, DONE, INTEGRITY, NOT_PROTECTED
from monai_salm.release import pacs
from monai_salm.release.custody import read_refusals
from monai_salm.release.labels import load_cohort
from monai_salm.release.manifest import PROTECTED, IntegrityError, read_manifest
from monai_salm.release.pacs import PushError, Target, push
from monai_salm.release.protect import protect_cohort

SYNTAXES = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5")


def pixels(content: bytes | Path) -> str:
    dataset = dcmread(io.BytesIO(content) if isinstance(content, bytes) else content)
    return hashlib.sha256(dataset.PixelData).hexdigest()


def originals() -> list[Path]:
    """A mini export of CR, CT and MR, single files of other kinds, and slices of a real series where it is there."""
    folder = Path(pydicom.data.__file__).parent / "test_files" / "dicomdirtests"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "DICOMDIR"]
    files = [path for path in files if path.read_bytes()[128:132] == b"DICM" and "PixelData" in dcmread(path)]
    files += [Path(get_testdata_file(name, download=False)) for name in ("CT_small.dcm", "J2K_pixelrep_mismatch.dcm")]
    files += sorted((DATA / "dicom_series").rglob("*.dcm"))[60:66] if DATA.name else []
    return files


def release(export: Path, out: Path) -> list[Path]:
    """Protect every slice of an export without a fit; the protected files."""
    cohort = load_cohort(export, spatial_dims=2)
    rows = protect_cohort(cohort, bank_of(cohort, 2), budget="2 stored", output_dir=out, spatial_dims=2)
    return [out / "protected" / row.file for row in rows if row.state == PROTECTED]


def store(server: Orthanc, files: Sequence[Path]) -> None:
    """As a scanner does."""
    ae = AE("SCANNER")
    for dataset in map(dcmread, files):
        context = (dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
        if context not in [(each.abstract_syntax, each.transfer_syntax[0]) for each in ae.requested_contexts]:
            ae.add_requested_context(*context)
    association = ae.associate("127.0.0.1", server.dicom, ae_title=orthanc.AE_TITLE)
    try:
        assert [association.send_c_store(path).Status for path in files] == [0] * len(files)
    finally:
        association.release()


@contextmanager
def receiving(port: int, folder: Path) -> Iterator[None]:
    """A station that files are moved to; it writes them without extension."""
    folder.mkdir(parents=True)

    def keep(event: evt.Event) -> int:
        (folder / f"IM{len(list(folder.iterdir())):04d}").write_bytes(event.encoded_dataset())
        return 0x0000

    ae = AE(orthanc.RECEIVER)
    for context in AllStoragePresentationContexts:
        ae.add_supported_context(context.abstract_syntax, SYNTAXES)
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, keep)])
    try:
        yield
    finally:
        server.shutdown()


def move(server: Orthanc, studies: Sequence[str]) -> None:
    """Ask for whole studies to be moved to the station."""
    ae = AE("STATION")
    ae.add_requested_context(StudyRootQueryRetrieveInformationModelMove)
    association = ae.associate("127.0.0.1", server.dicom, ae_title=orthanc.AE_TITLE)
    try:
        for study in studies:
            query = Dataset()
            query.QueryRetrieveLevel, query.StudyInstanceUID = "STUDY", study
            answers = list(association.send_c_move(query, orthanc.RECEIVER, StudyRootQueryRetrieveInformationModelMove))
            assert answers[-1][0].Status == 0
    finally:
        association.release()


def label_all(export: Path) -> None:
    """Two classes, by SOPInstanceUID."""
    uids = sorted(dcmread(path).SOPInstanceUID for path in export.rglob("IM*") if path.is_file())
    write_labels(export, [f"{uid},{'ab'[at % 2]}" for at, uid in enumerate(uids)])


def give_all(event: evt.Event, files: list[Dataset]) -> Iterator[int | tuple[int, Dataset]]:
    """Answer a C-GET."""
    yield len(files)
    for each in files:
        yield 0xFF00, each


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Orthanc]:
    with orthanc.running(tmp_path_factory.mktemp("orthanc")) as found:
        yield found


@pytest.fixture(scope="module")
def filled(server) -> dict[str, str]:
    """The server with the originals; digest of the pixels of each instance."""
    store(server, originals())
    return {str(dcmread(path).SOPInstanceUID): pixels(path) for path in originals()}


class TestOrthanc:
    @pytest.fixture(params=["move", "zip"])
    def export(self, request, server, filled, tmp_path) -> Path:
        """All that the server holds of the originals, by C-MOVE or as the archive that its web page offers."""
        studies = {str(dcmread(path).StudyInstanceUID) for path in originals()}
        if request.param == "move":
            with receiving(server.receiver, tmp_path / "export"):
                move(server, sorted(studies))
        else:
            for study in self._ids(server, studies):
                archive = zipfile.ZipFile(io.BytesIO(server.rest(f"/studies/{study}/media")))
                archive.extractall(tmp_path / "export" / study[:8])
        label_all(tmp_path / "export")
        return tmp_path / "export"

    def _ids(self, server: Orthanc, studies: set[str]) -> list[str]:

        known = json.loads(server.rest("/studies?expand"))
        return [entry["ID"] for entry in known if entry["MainDicomTags"]["StudyInstanceUID"] in studies]

    def test_protected_copies_go_back_beside_the_originals_with_the_pixels_that_were_written(
        self, server, filled, export, tmp_path
    ):
        written = release(export, tmp_path / "out")
        refused = [each.reason for each in read_refusals(tmp_path / "out")]
        assert set(refused) <= {"nothing_to_move", "empty_perturbation"}, "scouts have no voxel in their own window"
        assert len(written) + len(refused) == len(filled) and len(refused) <= 3
        before = set(server.instances())
        sent = push(tmp_path / "out", server.target)
        assert (sent.files, sent.compared) == (len(written), len(written)) and sent.left == 1, "labels.csv stays"
        headers = {str(dcmread(path, stop_before_pixels=True).SOPInstanceUID): path for path in written}
        assert set(server.instances()) == before | headers.keys() and before.isdisjoint(headers)
        assert {uid: pixels(server.file(uid)) for uid in headers} == {
            uid: pixels(path) for uid, path in headers.items()
        }
        assert {uid: pixels(server.file(uid)) for uid in filled} == filled, "the originals are as they were"
        assert not set(filled.values()) & {pixels(path) for path in written}
        again = push(tmp_path / "out", server.target)
        assert again == sent, "what is there already is no error"

    def test_copies_of_files_with_values_of_odd_length_are_taken(self, server, tmp_path):
        for name in ("odd0", "odd1"):
            for path in write_series(tmp_path / "in" / name, name, 2):
                dataset, tag = dcmread(path), Tag("ImageComments")
                dataset[tag] = RawDataElement(tag, "LT", 3, b"odd", 0, False, True)
                dataset.save_as(path)
        write_labels(tmp_path / "in", ["odd0,a", "odd1,b"])
        release(tmp_path / "in", tmp_path / "out")
        assert push(tmp_path / "out", server.target).compared == 4

    def test_success_is_not_believed_when_other_pixels_are_kept_under_the_uid(self, server, tmp_path):
        write_series(tmp_path / "in/s0", "trap", 3)
        write_series(tmp_path / "in/s1", "trap1", 3)
        write_labels(tmp_path / "in", ["s0,a", "s1,b"])
        written = release(tmp_path / "in", tmp_path / "out")
        trap = dcmread(written[0])
        trap.PixelData = bytes(len(trap.PixelData))
        trap.save_as(tmp_path / "trap.dcm")
        store(server, [tmp_path / "trap.dcm"])
        with pytest.raises(IntegrityError, match="holds other pixels or content of 1 files"):
            push(tmp_path / "out", server.target)


class TestCommand:
    @pytest.fixture
    def out(self, tmp_path) -> Path:
        for name in ("s0", "s1"):
            write_series(tmp_path / "in" / name, name, 2, patient="CANARY")
        write_labels(tmp_path / "in", ["s0,a", "s1,b"])
        release(tmp_path / "in", tmp_path / "out")
        return tmp_path / "out"

    @contextmanager
    def peer(self, contexts, handlers=()) -> Iterator[str]:
        """Another kind of PACS."""
        ae = AE("PEER")
        for context in contexts:
            ae.add_supported_context(*context)
        (port,) = free_ports(1)
        server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=list(handlers))
        try:
            yield f"PEER@127.0.0.1:{port}"
        finally:
            server.shutdown()

    @contextmanager
    def archive(self, held: dict[str, Dataset], get: Callable[..., Iterator], handlers: Sequence = ()) -> Iterator[str]:
        """A PACS that keeps files, gives them back by ``get``, and answers 0111 to those that it has."""

        def keep(event: evt.Event) -> int:
            uid = str(event.request.AffectedSOPInstanceUID)
            known, dataset = uid in held, event.dataset
            dataset.file_meta = event.file_meta
            held.setdefault(uid, dataset)
            return 0x0111 if known else 0

        def give(event: evt.Event) -> Iterator:
            return get(
                event, [each for each in held.values() if each.SeriesInstanceUID == event.identifier.SeriesInstanceUID]
            )

        contexts = [(each.abstract_syntax, SYNTAXES, True, True) for each in StoragePresentationContexts[:127]]
        handlers = [(evt.EVT_C_STORE, keep), (evt.EVT_C_GET, give), *handlers]
        with self.peer([*contexts, (StudyRootQueryRetrieveInformationModelGet,)], handlers) as target:
            yield target

    def test_what_a_pacs_has_already_is_taken_for_sent_if_it_is_the_same(self, out, capsys):
        held: dict[str, Dataset] = {}
        with self.archive(held, give_all) as target:
            for _ in range(2):
                assert main(["push", str(out), target]) == DONE
                assert "sent 4 files; of 4 the PACS gives back" in capsys.readouterr().out
            older = next(iter(held.values()))
            older.PixelData = bytes(len(older.PixelData))
            assert main(["push", str(out), target]) == INTEGRITY
        assert "other pixels or content of 1 files" in capsys.readouterr().err

    @pytest.mark.parametrize("answer", [0xA702, 0xB000, 0x0122, "abort"])
    def test_what_a_pacs_does_not_tell_is_not_told_as_damage(self, out, answer, capsys):
        asked: list[str] = []

        def first_not(event: evt.Event, files: list[Dataset]) -> Iterator:
            asked.append(event.identifier.SeriesInstanceUID)
            if len(asked) > 1:
                yield from give_all(event, files)
            elif answer == "abort":
                event.assoc.abort()
                yield 0
            else:
                yield 1
                yield answer, Dataset()

        with self.archive({}, first_not) as target:
            assert main(["push", str(out), target]) == BAD_INPUT
        why = "with no answer" if answer == "abort" else f"with status {answer:04x}"
        said = capsys.readouterr().err
        assert "no_read_back: all 4 files were sent and stored, but 2 of them" in said and f"(series: 1 {why})" in said

    def test_a_pacs_that_is_gone_after_the_last_file_is_told_with_what_was_stored(self, out, capsys):
        gone = [(evt.EVT_RELEASED, lambda event: event.assoc._server.server_close())]
        with self.archive({}, give_all, handlers=gone) as target:
            assert main(["push", str(out), target]) == BAD_INPUT
        said = capsys.readouterr().err
        assert "all 4 files were sent and stored, but 4 of them" in said and "(series: 2 not tried)" in said

    def test_a_file_that_a_pacs_says_it_has_not_is_missing(self, out, capsys):
        def none(event: evt.Event, files: list[Dataset]) -> Iterator:
            yield 0

        with self.archive({}, none) as target:
            assert main(["push", str(out), target]) == INTEGRITY
        assert "does not give back 4 of 4" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            (lambda dataset: dataset.pop("ROIContourSequence"), INTEGRITY),
            (lambda dataset: dataset.pop("ReferencedFrameOfReferenceSequence"), INTEGRITY),
            (lambda dataset: setattr(dataset, "PatientID", "corrected"), DONE),
            (lambda dataset: dataset.private_block(0x4321, "PACS", create=True).add_new(1, "LO", "x"), DONE),
        ],
    )
    def test_of_a_file_without_pixels_the_content_is_compared(self, tmp_path, change, code, capsys):
        write_export(tmp_path / "in")
        cohort = load_cohort(tmp_path / "in", spatial_dims=3)
        out = tmp_path / "out"
        protect_cohort(cohort, bank_of(cohort), budget="2 stored", output_dir=out, spatial_dims=3)

        def other(event: evt.Event, files: list[Dataset]) -> Iterator:
            for each in files:
                if "ROIContourSequence" in each:
                    change(each)
            yield from give_all(event, files)

        with self.archive({}, other) as target:
            assert main(["push", str(out), target]) == code
        told = capsys.readouterr()
        assert ("without pixels the content" in told.out) if code == DONE else ("content of 2 files" in told.err)

    def test_a_copy_without_the_private_part_is_sent_too(self, out, capsys):
        shutil.rmtree(out / "private")
        with self.archive({}, give_all) as target:
            assert main(["push", str(out), target]) == DONE

    def test_a_folder_that_holds_no_release_is_told_from_one_that_is_not_finished(self, tmp_path):
        (tmp_path / "private").mkdir()
        with pytest.raises(ValueError, match="holds no release; name what 'protect' wrote"):
            push(tmp_path, "X@127.0.0.1:104")
        (tmp_path / "private" / "run.json").write_text("{}")
        with pytest.raises(ValueError, match="holds no protected files yet; run 'protect'"):
            push(tmp_path, "X@127.0.0.1:104")

    @pytest.mark.parametrize("title", ["A" * 17, "", " ", " A", "\xfc", "A\\B", "A\nB"])
    def test_a_bad_title_is_told_before_anything_else(self, title, tmp_path, capsys):
        with pytest.raises(SystemExit, match=str(BAD_INPUT)):
            main(["push", str(tmp_path), "X@127.0.0.1:104", "--aet", title])
        assert "is no AE title" in capsys.readouterr().err

    def test_push_says_what_was_sent(self, server, out, capsys):
        assert main(["push", str(out), server.target]) == DONE
        told = capsys.readouterr()
        assert "sent 4 files; of 4 the PACS gives back the pixels" in told.out
        assert "CANARY" not in told.out + told.err

    @pytest.mark.filterwarnings("ignore:parsing config_file")
    def test_protect_sends_what_it_wrote_but_nothing_where_a_file_was_refused(self, server, tmp_path, capsys):
        for name in ("sent0", "sent1"):
            write_series(tmp_path / "in" / name, name, 2)
        write_labels(tmp_path / "in", ["sent0,a", "sent1,b"])
        before = set(server.instances())
        words = ["--bundle", BUNDLE, "--no-verify", "--push", server.target]
        words += [word for setting in SETTINGS for word in ("--set", setting)]
        assert main(["protect", str(tmp_path / "in"), str(tmp_path / "out"), *words]) == DONE
        assert "sent 4 files" in capsys.readouterr().out
        assert len(set(server.instances()) - before) == 4
        (tmp_path / "in/sent1/broken.dcm").write_bytes(bytes(128) + b"DICM")
        assert main(["protect", str(tmp_path / "in"), str(tmp_path / "out2"), *words]) == NOT_PROTECTED
        assert "not sent" in capsys.readouterr().err
        assert len(set(server.instances()) - before) == 4

    def test_a_release_that_was_changed_is_not_sent(self, server, out, capsys):
        before = set(server.instances())
        path = out / "protected" / next(row.file for row in read_manifest(out) if row.state == PROTECTED)
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        assert main(["push", str(out), server.target]) == INTEGRITY
        assert "nothing is sent" in capsys.readouterr().err
        assert set(server.instances()) == before

    def test_nobody_there_is_told(self, out, capsys):
        assert main(["push", str(out), f"X@127.0.0.1:{free_ports(1)[0]}"]) == BAD_INPUT
        told = capsys.readouterr()
        assert "no_connection" in told.err and "CANARY" not in told.out + told.err

    def test_a_syntax_that_is_not_taken_is_told_before_anything_is_sent(self, out):
        stored = []
        handlers = [(evt.EVT_C_STORE, lambda event: stored.append(event) or 0)]
        with self.peer([(Verification,), (CTImageStorage, ["1.2.840.10008.1.2.5"])], handlers) as target:
            with pytest.raises(
                PushError,
                match="not_accepted: the PACS does not take CT Image Storage as Explicit VR Little Endian. Allow",
            ):
                push(out, target)
        assert not stored

    def test_a_file_that_is_not_stored_is_counted(self, out):
        contexts = [(each.abstract_syntax, SYNTAXES) for each in StoragePresentationContexts]
        codes = iter([0x0000, 0xA700, 0xA700, 0xB000])
        with self.peer(contexts, [(evt.EVT_C_STORE, lambda event: next(codes))]) as target:
            with pytest.raises(
                PushError, match=r"not_stored: 2 of 4 files were not stored \(2 with status a700\), 2 were"
            ):
                push(out, target)

    def test_a_pacs_that_does_not_give_back_is_told(self, out):
        contexts = [(each.abstract_syntax, SYNTAXES) for each in StoragePresentationContexts]
        with self.peer(contexts, [(evt.EVT_C_STORE, lambda event: 0)]) as target:
            with pytest.raises(
                PushError, match=r"no_read_back: all 4 files .* stored, but 4 of .*\(series: 2 with status 0122\)"
            ):
                push(out, target)

    def test_a_connection_that_ends_is_told(self, out, monkeypatch):
        monkeypatch.setattr(pacs, "SECONDS", 2.0)
        contexts = [(each.abstract_syntax, SYNTAXES) for each in StoragePresentationContexts]

        def end(event: evt.Event) -> int:
            event.assoc.abort()
            return 0

        with self.peer(contexts, [(evt.EVT_C_STORE, end)]) as target:
            with pytest.raises(PushError, match=r"not_stored: 4 of 4 .*no answer"):
                push(out, target)

    def test_a_file_that_ends_the_connection_keeps_no_other_from_being_stored(self, out):
        contexts = [(each.abstract_syntax, SYNTAXES) for each in StoragePresentationContexts]
        uids = [str(dcmread(path).SOPInstanceUID) for path in sorted((out / "protected").rglob("*.dcm"))]
        bad, stored = uids[1], []

        def keep(event: evt.Event) -> int:
            uid = str(event.request.AffectedSOPInstanceUID)
            if uid == bad:
                event.assoc.abort()
            else:
                stored.append(uid)
            return 0

        with self.peer(contexts, [(evt.EVT_C_STORE, keep)]) as target:
            with pytest.raises(
                PushError, match=r"not_stored: 1 of 4 files .*\(1 with no answer\).*again: " + bad + "$"
            ):
                push(out, target)
        assert sorted([*stored, bad]) == sorted(uids)

    def test_a_pacs_that_never_answers_is_not_asked_for_each_file(self, out, monkeypatch):
        monkeypatch.setattr(pacs, "_IN_VAIN", 2)
        contexts = [(each.abstract_syntax, SYNTAXES) for each in StoragePresentationContexts]
        with self.peer(contexts, [(evt.EVT_C_STORE, lambda event: event.assoc.abort() or 0)]) as target:
            with pytest.raises(PushError, match=r"4 of 4 .*\(2 not tried, 2 with no answer\)"):
                push(out, target)

    def test_a_pacs_that_goes_meanwhile_is_told_with_the_files(self, out, monkeypatch):
        contexts = [(each.abstract_syntax, SYNTAXES) for each in StoragePresentationContexts]

        def go(event: evt.Event) -> int:
            event.assoc._server.server_close()
            event.assoc.abort()
            return 0

        with self.peer(contexts, [(evt.EVT_C_STORE, go)]) as target:
            with pytest.raises(PushError, match=r"4 of 4 .*\(3 not tried, 1 with no answer\), 0 were"):
                push(out, target)

    @pytest.mark.parametrize("again", ["refused", "takes nothing", "refused once"])
    def test_a_connection_that_is_not_made_again_is_told_with_what_was_stored(self, again, monkeypatch):
        def answer(left: int, contexts: list) -> SimpleNamespace:
            peer = SimpleNamespace(is_established=True, accepted_contexts=contexts, left=left)

            def send(path: Path) -> Dataset:
                peer.left -= 1
                peer.is_established = peer.left > 0  # it answers, and then it is gone
                status = Dataset()
                status.Status = 0x0000
                return status

            peer.send_c_store = send
            return peer

        taken = [SimpleNamespace(abstract_syntax="c", transfer_syntax=["t"])]
        peers = iter([answer(6, taken), *[answer(9, []) if again == "takes nothing" else None] * 5])
        if again == "refused once":
            peers = iter([answer(6, taken), None, answer(9, taken)])

        @contextmanager
        def associate(*arguments: object) -> Iterator[SimpleNamespace]:
            peer = next(peers)
            if peer is None:
                raise PushError("no_connection", "gone")
            yield peer

        monkeypatch.setattr(pacs, "_association", associate)
        files = [pacs._File(Path("x"), "1", "2", f"3.{number}", "c", "t", "", True) for number in range(10)]
        if again == "refused once":
            pacs._store(files, Target("X", "x", 1), "Y")
        else:
            with pytest.raises(PushError, match=r"4 of 10 files were not stored \(4 not tried\), 6 were"):
                pacs._store(files, Target("X", "x", 1), "Y")
        assert not list(peers)

    def test_a_release_without_dicom_is_told(self, tmp_path):
        for index in range(2):
            write_nifti(tmp_path / "in" / f"v{index}.nii", index, (6, 7, 1))
        write_labels(tmp_path / "in", ["v0.nii,a", "v1.nii,b"])
        release(tmp_path / "in", tmp_path / "out")
        with pytest.raises(ValueError, match="no DICOM files"):
            push(tmp_path / "out", "X@127.0.0.1:104")

    @pytest.mark.parametrize(
        "text", ["X", "X@host", "X@host:0", "X@host:65536", "@host:104", "A" * 17 + "@host:1", "\xfc@host:1"]
    )
    def test_a_bad_target_is_told_before_anything_else(self, text, tmp_path):
        with pytest.raises(ValueError, match="AET@host:port"):
            Target.parse(text)
        with pytest.raises(SystemExit, match=str(BAD_INPUT)):
            main(["protect", str(tmp_path), str(tmp_path / "out"), "--push", text])
        assert not (tmp_path / "out").exists()
