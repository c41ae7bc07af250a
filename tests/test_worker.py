# SPDX-License-Identifier: Apache-2.0
"""The child process that reads untrusted bytes: what it may do, and that nothing it does harms its parent."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import hostile_codecs
import numpy as np
import pytest
from exports import write_nifti
from hostile_codecs import SECRET
from torch.utils.data import DataLoader

from monai_salm.io import formats, worker
from monai_salm.io.base import Case, RefusedError
from monai_salm.transforms import LoadStored


@pytest.fixture
def quick(monkeypatch):
    """One second of processor time, two by the clock; and a fresh child."""
    worker.stop()
    monkeypatch.setattr(worker, "SECONDS", 1.0)
    monkeypatch.setattr(worker, "WALL", 2)


def refused(function, *arguments) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        worker.call(function, *arguments)
    assert worker.call(hostile_codecs.fine, 7) == (7,), "the next file is read as if nothing had happened"
    return caught.value


def test_the_child_is_limited_and_small():
    facts = worker.call(hostile_codecs.process)
    assert facts["pid"] != os.getpid() and facts["modules"] == []
    assert facts["no_new_privs"] == "1"
    assert facts["RLIMIT_CORE"] == facts["RLIMIT_FSIZE"] == (0, 0)
    assert 0 < facts["RLIMIT_AS"][0] < worker.MEMORY_BYTES + (8 << 30)


def test_one_child_serves_all_calls():
    pids = {worker.call(hostile_codecs.process)["pid"] for _ in range(3)}
    assert len(pids) == 1


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL])
def test_a_codec_that_kills_its_process_costs_one_call(number):
    assert refused(hostile_codecs.die, int(number)).reason == "codec_crash"


def test_a_crash_in_one_thread_costs_the_file_of_that_thread_only():
    with ThreadPoolExecutor(4) as threads:
        deadly = [threads.submit(worker.call, hostile_codecs.die, int(signal.SIGABRT)) for _ in range(3)]
        others = [threads.submit(worker.call, hostile_codecs.fine, number) for number in range(20)]
        streams = [threads.submit(list, worker.stream(range, 3)) for _ in range(20)]
    assert {future.exception().reason for future in deadly} == {"codec_crash"}
    assert [future.result() for future in others] == [(number,) for number in range(20)]
    # A stream that has begun is its child's; one that has not is begun anew.
    assert all(future.exception() or future.result() == [0, 1, 2] for future in streams)
    assert {future.exception().reason for future in streams if future.exception()} <= {"codec_crash"}


def test_a_codec_that_leaves_quietly_costs_one_call():
    assert refused(hostile_codecs.leave).reason == "codec_crash"


@pytest.mark.parametrize("hang", [hostile_codecs.sleep, hostile_codecs.spin])
def test_a_codec_that_hangs_is_stopped(quick, hang):
    with pytest.raises(RefusedError) as caught:
        worker.call(hang)
    assert caught.value.reason == "too_slow"


def test_large_files_get_more_time(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3 << 20))
    case = Case("case-1", "nifti", (tmp_path / "a", tmp_path / "missing"), ("a",), "g")
    both = worker._seconds(((case, case), {tmp_path / "a": "x"}, 3))
    assert both == worker.SECONDS + 3 * (1 << 20) / worker.BYTES_PER_SECOND


def test_memory_is_bounded():
    assert refused(hostile_codecs.bloat).reason == "too_large"


def test_any_exception_becomes_a_refusal():
    assert refused(hostile_codecs.recurse).reason == "unreadable"
    assert refused(hostile_codecs.interrupt).reason == "unreadable"
    assert str(refused(hostile_codecs.refuse)) == "some_reason: what to do"


def test_nothing_that_a_library_says_is_seen(capfd):
    error = refused(hostile_codecs.tell)
    seen = capfd.readouterr()
    assert SECRET not in f"{error}{error.__cause__}{error.__context__}{seen.out}{seen.err}"


def test_the_child_writes_no_file(tmp_path):
    with pytest.raises(OSError, match="too large"):
        worker.call(hostile_codecs.write, str(tmp_path / "file"))
    assert (tmp_path / "file").stat().st_size == 0


def test_an_answer_cannot_run_anything(monkeypatch):
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("the answer ran a command"))
    assert refused(hostile_codecs.take_over).reason == "codec_crash"


@pytest.mark.parametrize(
    "what", ["monai_salm.io.worker:_Child", "subprocess:Popen", "builtins:eval", "pydicom:dcmread"]
)
def test_an_answer_holds_nothing_but_records(what):
    assert worker.call(hostile_codecs.give, "monai_salm.io.base:StoredImage").__name__ == "StoredImage"
    assert refused(hostile_codecs.give, what).reason == "codec_crash"


def test_arrays_come_back_whole_and_writable():
    given = {"a": np.arange(1 << 20, dtype=">u2").reshape(2, -1), "b": np.zeros(0), "c": np.arange(12.0)[::2]}
    (found,) = worker.call(hostile_codecs.fine, given)
    for name, array in given.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].flags.writeable and found[name].dtype == array.dtype


def test_a_stream_lets_other_calls_in_between():
    seen = []
    for item in worker.stream(hostile_codecs.count, 3):
        seen.append((item, worker.call(hostile_codecs.fine, item)[0]))
    assert seen == [(0, 0), (1, 1), (2, 2)]


def test_a_stream_whose_child_died_is_refused_though_there_is_a_new_child():
    stream = worker.stream(hostile_codecs.count, 3)
    assert next(stream) == 0
    refused(hostile_codecs.die, int(signal.SIGKILL))
    with pytest.raises(RefusedError, match="codec_crash"):
        next(stream)
    with pytest.raises(RefusedError, match="codec_crash"):
        list(worker.stream(hostile_codecs.count, 2, int(signal.SIGABRT)))


def test_threads_share_the_child():
    found: list[int] = []
    given = [threading.Thread(target=lambda n=n: found.extend(worker.call(hostile_codecs.fine, n))) for n in range(20)]
    for thread in given:
        thread.start()
    for thread in given:
        thread.join()
    assert sorted(found) == list(range(20))


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_a_data_loader_read_through_children_of_their_own(tmp_path, start, workers):
    paths = [write_nifti(tmp_path / f"{seed}.nii.gz", seed) for seed in range(4)]
    cases = [Case(f"case-{path.stem}", "nifti", (path,), (path.name,), "g") for path in paths]
    ours = [formats.read(case, 3).stored for case in cases]
    dataset = Loaded(cases)
    found = list(DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=start))
    for image, (pid, loaded) in zip(ours, found, strict=True):
        np.testing.assert_array_equal(loaded.numpy(), image)
        assert pid != worker.call(hostile_codecs.process)["pid"]


class Loaded:
    """A data set that also tells which process read."""

    def __init__(self, cases):
        self.cases, self.load = cases, LoadStored(spatial_dims=3)

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, index):
        image = self.load(self.cases[index])
        return worker.call(hostile_codecs.process)["pid"], image.as_tensor()


def test_a_forgotten_stream_may_end_in_the_middle_of_another_request(monkeypatch):
    """Python collects it whenever it likes; the request that goes on must not be waited for."""
    forgotten, receive, found = worker.stream(range, 3), worker.receive, []
    next(forgotten)

    def collecting(*arguments, **options):
        forgotten.close()
        return receive(*arguments, **options)

    monkeypatch.setattr(worker, "receive", collecting)
    thread = threading.Thread(target=lambda: found.append(worker.call(len, (1, 2))), daemon=True)
    thread.start()
    thread.join(20)
    assert found == [2]
