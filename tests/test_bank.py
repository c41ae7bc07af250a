# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import errno
import multiprocessing
import os
import pickle
import signal
import sqlite3
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from monai_salm import bank as bank_module
from monai_salm import records
from monai_salm.bank import PerturbationBank, Record, image_digest
from monai_salm.records import pack, unpack

IMAGE = np.arange(16, dtype=np.int16).reshape(1, 4, 4)


def record(name: str, value: int, levels: int = 100) -> Record:
    """A case whose perturbation is ``value`` everywhere and whose image is its own."""
    return Record(name, torch.full((1, 4, 4), value, dtype=torch.int32), image_digest(IMAGE), levels)


def cohort(value: int) -> list[Record]:
    return [record("a", value), record("b", -value)]


@pytest.fixture
def bank(tmp_path: Path) -> PerturbationBank:
    return PerturbationBank(tmp_path / "bank.sqlite", fingerprint="config", create=True)


def values(bank: PerturbationBank, *, current: bool = False) -> list[int]:
    return [int(bank.record(name, current=current).delta[0, 0, 0]) for name in sorted(bank)]


# -------------------------------------------------------------------- records


@settings(max_examples=60, deadline=None)
@given(
    delta=hnp.arrays(
        st.sampled_from([np.int8, np.int16, np.int32, np.int64]),
        hnp.array_shapes(min_dims=2, max_dims=4, max_side=9),
        elements={"min_value": -100, "max_value": 100},
    ),
    levels=st.sampled_from([100, 127, 128, 32767, 32768, 2**31 - 1]),
)
def test_packing_is_exact_and_takes_the_smallest_type_that_holds_the_budget(delta: np.ndarray, levels: int) -> None:
    back = unpack(pack(Record("x", torch.from_numpy(delta), "digest", levels, 0.25)))
    assert back.delta.dtype == (torch.int8 if levels <= 127 else torch.int16 if levels <= 32767 else torch.int32)
    assert back.delta.shape == delta.shape
    assert (back.delta.numpy() == delta).all()
    assert (back.image_digest, back.levels, back.step) == ("digest", levels, 0.25)


@pytest.mark.parametrize("value", [-128, 127, -1])
def test_extreme_values_of_the_type_survive(value: int) -> None:
    back = unpack(pack(Record("x", torch.full((1, 3), value), "digest", 128)))
    assert (back.delta == value).all()


@pytest.mark.parametrize("column", range(8))
def test_a_change_of_any_column_is_noticed(column: int) -> None:
    row = list(pack(record("a", 3)))
    row[column] = {0: "b", 1: "int16", 2: "[4, 4]", 3: 99, 4: 2.0, 5: "f", 6: "0" * 64, 7: row[7][:-1]}[column]
    with pytest.raises(ValueError, match="does not agree with its digest"):
        unpack(tuple(row))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Record("x", torch.zeros(1, 2), "d", 3), "integer"),
        (Record("x", torch.full((1, 2), -4), "d", 3), "4 lattice steps is over the budget of 3"),
        (Record("x", torch.zeros(1, 2, dtype=torch.int64), "d", 2**31), "32 bits"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(bank: PerturbationBank, bad: Record, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bank.commit([bad], round_=0, score=0, state=b"")
    assert len(bank) == 0 and bank.state() is None


def test_image_digest_tells_type_shape_and_values_but_not_byte_order_or_layout() -> None:
    digest = image_digest(IMAGE)
    assert digest == image_digest(torch.from_numpy(IMAGE)) == image_digest(IMAGE.astype(">i2"))
    assert digest == image_digest(np.asfortranarray(IMAGE))
    others = [IMAGE.astype(np.uint16), IMAGE.reshape(1, 2, 8), IMAGE.transpose(0, 2, 1), IMAGE + np.int16(1)]
    assert len({digest, *map(image_digest, others)}) == 5


# -------------------------------------------------------------------- rounds


def test_reading_returns_the_round_with_the_lowest_score_until_the_final_pass(bank: PerturbationBank) -> None:
    for round_, score in enumerate([3.0, 1.0, 2.0]):
        bank.commit(cohort(round_ + 1), round_=round_, score=score, state=bytes([round_]))
    assert values(bank) == [2, -2] and values(bank, current=True) == [3, -3]
    assert bank.state() == (2, b"\2") and not bank.finished
    assert int(bank.current("a")[0, 0, 0]) == 3
    bank.commit(cohort(9), round_=2, score=50.0, state=b"end", final=True)
    assert values(bank) == values(bank, current=True) == [9, -9] and bank.finished
    assert bank.verify() == 2


def test_no_more_than_two_rounds_are_kept(bank: PerturbationBank) -> None:
    for round_ in range(5):
        bank.commit(cohort(1), round_=round_, score=round_, state=b"")
    with sqlite3.connect(bank.path) as db:
        assert db.execute("SELECT DISTINCT generation FROM record ORDER BY 1").fetchall() == [(1,), (5,)]


def test_a_bank_is_a_read_only_mapping(bank: PerturbationBank) -> None:
    bank.commit(cohort(2), round_=0, score=0, state=b"")
    assert list(bank) == ["a", "b"] and len(bank) == 2 and "a" in bank and "c" not in bank and 3 not in bank
    assert bank.get("c") is None
    assert {name: int(delta.sum()) for name, delta in bank.items()} == {"a": 32, "b": -32}
    with pytest.raises(KeyError, match="fit it first"):
        bank["c"]


def test_an_empty_bank_is_empty(bank: PerturbationBank) -> None:
    assert (list(bank), bank.state(), bank.finished, bank.revision) == ([], None, False, "")
    assert bank.verify() == 0


def test_records_may_be_computed_from_the_current_round_while_it_is_committed(bank: PerturbationBank) -> None:
    names = [f"case-{number}" for number in range(40)]
    noise = torch.randint(-30000, 30000, (1, 4, 25000), dtype=torch.int16)  # several times SQLite's page cache

    def stepped(round_: int):
        for name in names:
            start = bank.current(name) if round_ else noise
            yield Record(name, start + 1, "d", 32767)

    for round_ in range(2):
        bank.commit(stepped(round_), round_=round_, score=-round_, state=b"")
    assert all((delta == noise + 2).all() for delta in bank.values())


@pytest.mark.parametrize(
    ("second", "arguments", "message"),
    [
        (cohort(1), {"round_": 0}, "does not follow round 0"),
        (cohort(1)[:1], {}, "cohort changed"),
        ([*cohort(1), record("c", 1)], {}, "cohort changed"),
        ([record("a", 1), Record("b", torch.zeros(1, 4, 4, dtype=torch.int8), "other", 3)], {}, "example b"),
        ([*cohort(1), record("a", 1)], {}, "twice"),
        ([], {}, "without any case"),
        (cohort(1), {"score": float("nan")}, "diverged"),
    ],
)
def test_a_round_that_is_no_successor_changes_nothing(
    bank: PerturbationBank, second: list[Record], arguments: dict, message: str
) -> None:
    bank.commit(cohort(7), round_=0, score=1, state=b"first")
    revision = bank.revision
    with pytest.raises(ValueError, match=message):
        bank.commit(second, **{"round_": 1, "score": 0.0, "state": b"second"} | arguments)
    assert values(bank) == [7, -7] and bank.state() == (0, b"first") and bank.revision == revision
    assert bank.verify() == 2
    bank.commit(cohort(8), round_=1, score=0.0, state=b"")  # what the failed round left behind is in nobody's way
    assert values(bank) == [8, -8]


def test_a_finished_bank_takes_no_more_rounds(bank: PerturbationBank) -> None:
    bank.commit(cohort(1), round_=0, score=1, state=b"", final=True)
    with pytest.raises(ValueError, match="finished"):
        bank.commit(cohort(1), round_=1, score=0, state=b"")


# -------------------------------------------------------------------- pairing with images


def test_load_gives_the_perturbation_of_exactly_this_image(bank: PerturbationBank) -> None:
    bank.commit([Record("a", torch.ones(1, 4, 4).int(), image_digest(IMAGE), 3, 0.5)], round_=0, score=0, state=b"")
    for image in (IMAGE, torch.from_numpy(IMAGE)):
        assert (bank.load("a", image) == 1).all()
    assert (bank.load("a", IMAGE, step=0.5) == 1).all()
    with pytest.raises(ValueError, match=r"a: the image is \(1, 2, 8\), its perturbation \(1, 4, 4\)"):
        bank.load("a", IMAGE.reshape(1, 2, 8))
    with pytest.raises(ValueError, match="a: the image .* is not the one"):
        bank.load("a", IMAGE + np.int16(1))
    with pytest.raises(ValueError, match="a: the image .int32. is not the one"):
        bank.load("a", IMAGE.astype(np.int32))
    with pytest.raises(ValueError, match="step is 0.25 stored units here and 0.5"):
        bank.load("a", IMAGE, step=0.25)
    with pytest.raises(KeyError, match="no perturbation for 'b'"):
        bank.load("b", IMAGE)


def test_the_digest_of_the_image_is_enough_to_load(bank: PerturbationBank) -> None:
    bank.commit([Record("a", torch.ones(1, 4, 4).int(), image_digest(IMAGE), 3, 0.5)], round_=0, score=0, state=b"")
    assert (bank.load_by_digest("a", image_digest(IMAGE), step=0.5) == 1).all()
    with pytest.raises(ValueError, match="a: the image is not the one"):
        bank.load_by_digest("a", image_digest(IMAGE + np.int16(1)), step=0.5)
    with pytest.raises(ValueError, match="step is 0.25 stored units here and 0.5"):
        bank.load_by_digest("a", image_digest(IMAGE), step=0.25)


def test_a_large_volume_is_digested_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = np.arange(7 * 5 * 6, dtype=np.int16).reshape(7, 5, 6)
    volume = slices.transpose(2, 1, 0)[None, ::-1]
    whole = image_digest(np.ascontiguousarray(volume))
    for size in (1, 100, 10**6):
        monkeypatch.setattr(records, "_SLAB_BYTES", size)
        assert image_digest(volume) == whole


@pytest.mark.parametrize("block", [1, 40, 10**6])
@pytest.mark.parametrize("axes", list(permutations(range(3))))
def test_an_array_is_put_in_order_whatever_its_axes(
    monkeypatch: pytest.MonkeyPatch, axes: tuple[int, ...], block: int
) -> None:
    monkeypatch.setattr(records, "_BLOCK_BYTES", block)
    values = np.arange(3 * 5 * 7, dtype=np.int16).reshape(3, 5, 7).transpose(axes)[::-1, :, 1:]
    found = records.contiguous(values)
    assert np.array_equal(found, values) and found.flags.c_contiguous and found.dtype == values.dtype


# -------------------------------------------------------------------- opening


def test_opening_with_another_configuration_names_the_way_out(bank: PerturbationBank) -> None:
    assert PerturbationBank(bank.path, fingerprint="other").fingerprint == "other", "nothing was fitted yet"
    bank.commit(cohort(1), round_=1, score=0.5, state=b"")
    for create in (False, True):
        assert PerturbationBank(bank.path, fingerprint="config", create=create).fingerprint == "config"
        with pytest.raises(ValueError, match="the images or monai_salm changed. Use a new output folder"):
            PerturbationBank(bank.path, fingerprint="other", create=create)
    assert len(PerturbationBank(bank.path)) == 2


def test_a_fit_does_not_go_into_the_round_of_another_that_began_beside_it(bank: PerturbationBank) -> None:
    other = PerturbationBank(bank.path, fingerprint="other")
    bank.commit(cohort(1), round_=1, score=0.5, state=b"")
    with pytest.raises(ValueError, match="the images or monai_salm changed"):
        other.commit(cohort(2), round_=1, score=0.1, state=b"", final=True)
    assert values(bank) == [1, -1]


def test_opening_what_is_not_there_or_no_bank_fails_clearly(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="fit first"):
        PerturbationBank(tmp_path / "none.sqlite")
    assert not (tmp_path / "none.sqlite").exists()
    (tmp_path / "text").write_text("not a database, but long enough to be read as one " * 20)
    with pytest.raises(ValueError, match="damaged .*not a database"):
        PerturbationBank(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE t (x)")
    for create in (False, True):
        with pytest.raises(ValueError, match="is not a perturbation bank"):
            PerturbationBank(tmp_path / "other", create=create)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="is not a perturbation bank"):
        PerturbationBank(tmp_path / "empty")
    assert len(PerturbationBank(tmp_path / "empty", create=True)) == 0  # a run that was killed while it made the file


def test_a_bank_of_another_version_is_refused(bank: PerturbationBank) -> None:
    with sqlite3.connect(bank.path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="bank version 99"):
        PerturbationBank(bank.path)


def test_the_file_is_for_its_owner_only_and_the_name_may_be_odd(tmp_path: Path) -> None:
    bank = PerturbationBank(tmp_path / "new folder" / "a?b#c%20 ü.sqlite", create=True)
    bank.commit(cohort(1), round_=0, score=0, state=b"")
    assert stat.S_IMODE(bank.path.stat().st_mode) == 0o600
    assert [entry.name for entry in bank.path.parent.iterdir()] == [bank.path.name]


def test_opening_a_bank_again_changes_no_byte_of_it(bank: PerturbationBank) -> None:
    bank.commit(cohort(1), round_=0, score=0, state=b"", final=True)
    content = bank.path.read_bytes()
    PerturbationBank(bank.path, fingerprint="config", create=True)
    assert bank.path.read_bytes() == content


# -------------------------------------------------------------------- processes and threads


def _read_in_child(bank: PerturbationBank, queue: multiprocessing.Queue) -> None:
    queue.put(values(bank))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_the_same(bank: PerturbationBank, method: str) -> None:
    bank.commit(cohort(5), round_=0, score=0, state=b"")
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(bank, queue))
    child.start()
    assert queue.get(timeout=30) == [5, -5]
    child.join()
    bank.commit(cohort(6), round_=1, score=-1, state=b"")


def test_threads_share_a_bank(bank: PerturbationBank) -> None:
    bank.commit(cohort(5), round_=0, score=0, state=b"")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: values(bank), range(20))) == [[5, -5]] * 20


def test_the_pickle_is_stable_until_the_content_changes(bank: PerturbationBank) -> None:
    bank.commit(cohort(5), round_=0, score=1, state=b"")
    pickled = pickle.dumps(bank)
    again = pickle.loads(pickled)
    assert values(again) == values(copy.deepcopy(bank)) == [5, -5]
    assert pickle.dumps(again) == pickled
    bank.commit(cohort(5), round_=1, score=2, state=b"worse: reading still returns round 0")
    assert pickle.dumps(bank) == pickled
    bank.commit(cohort(6), round_=2, score=0, state=b"")
    assert pickle.dumps(bank) != pickled


def test_a_second_writer_is_told_to_wait(bank: PerturbationBank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "TIMEOUT_S", 0.05)
    other = sqlite3.connect(bank.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(TimeoutError, match="another run is writing"):
        bank.commit(cohort(1), round_=0, score=0, state=b"")
    other.close()


def test_two_runs_cannot_mix_their_rounds(bank: PerturbationBank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "_BATCH_BYTES", 1)

    def interrupted():
        yield record("a", 1)
        PerturbationBank(bank.path).commit(cohort(2), round_=0, score=0, state=b"other")
        yield record("c", 1)

    with pytest.raises(ValueError, match="another run writes"):
        bank.commit(interrupted(), round_=0, score=-1, state=b"mine")
    assert values(bank) == [2, -2] and bank.state() == (0, b"other")


# -------------------------------------------------------------------- accidents

NOISE = np.random.default_rng(0).integers(-30000, 30000, (1, 200000), dtype=np.int16)


def _write_rounds(path: Path, told: Connection) -> None:
    """Go on from the last round for ever. Only numpy: torch's thread pool does not survive a fork."""
    bank = PerturbationBank(path, create=True)
    round_ = -1 if bank.state() is None else bank.state()[0]
    while True:
        told.send(round_)
        round_ += 1
        delta = torch.from_numpy(NOISE + np.int16(round_))
        records = (Record(f"case-{number}", delta, "d", 32767) for number in range(40))
        bank.commit(records, round_=round_, score=-round_, state=str(round_).encode() * 1000)


def test_a_killed_run_leaves_its_last_complete_round(tmp_path: Path) -> None:
    context, last = multiprocessing.get_context("fork"), -1
    for delay in (0.01, 0.1, 0.17, 0.25, 0.31):
        receiver, sender = context.Pipe(duplex=False)
        writer = context.Process(target=_write_rounds, args=(tmp_path / "bank.sqlite", sender))
        writer.start()
        sender.close()
        assert receiver.recv() == last  # a new run takes up where the killed one was
        told = receiver.recv()
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        while receiver.poll():
            try:
                told = receiver.recv()
            except EOFError:
                break
        bank = PerturbationBank(tmp_path / "bank.sqlite")
        last, state = bank.state()
        assert last in (told, told + 1) and state == str(last).encode() * 1000
        assert bank.verify() == 40
        assert all((bank[name].numpy() == NOISE + last).all() for name in ("case-0", "case-39"))


def test_a_full_disk_is_named_and_the_last_round_kept(bank: PerturbationBank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank.commit(cohort(4), round_=0, score=0, state=b"first")
    connect = sqlite3.connect

    def small(*args, **kwargs) -> sqlite3.Connection:
        db = connect(*args, **kwargs)
        db.execute("PRAGMA max_page_count = 12")
        return db

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(OSError, match="no space left while writing .* free some and run again") as caught:
        bank.commit(cohort(5), round_=1, score=-1, state=os.urandom(1 << 18))
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert values(bank) == [4, -4] and bank.state() == (0, b"first") and bank.verify() == 2
    bank.commit(cohort(5), round_=1, score=-1, state=b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_write_protected_bank_can_be_read_but_not_written(bank: PerturbationBank) -> None:
    bank.commit(cohort(4), round_=0, score=0, state=b"")
    bank.path.chmod(0o400)
    assert values(bank) == [4, -4]
    with pytest.raises(OSError, match="cannot be read or written"):
        bank.commit(cohort(5), round_=1, score=0, state=b"")


def test_damage_is_either_noticed_or_harmless(bank: PerturbationBank, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    delta = torch.randint(-100, 100, (1, 200, 200), generator=generator, dtype=torch.int16)
    bank.commit([Record(name, delta, "d", 100) for name in "ab"], round_=0, score=0, state=b"state" * 2000)
    intact = bank.path.read_bytes()
    damaged = tmp_path / "damaged.sqlite"
    noticed = 0
    for position in range(0, len(intact), 1733):
        damaged.write_bytes(intact[:position] + bytes([intact[position] ^ 0x55]) + intact[position + 1 :])
        try:
            other = PerturbationBank(damaged)
            assert (other["a"] == delta).all() and (other["b"] == delta).all() and other.state() == (0, b"state" * 2000)
            other.verify()
        except (ValueError, KeyError):
            noticed += 1
    assert noticed > 20


def test_a_record_that_was_replaced_or_removed_is_noticed(bank: PerturbationBank) -> None:
    bank.commit([record("a", 1), record("b", 2)], round_=0, score=0, state=b"s")
    with sqlite3.connect(bank.path) as db:
        db.execute("DELETE FROM record WHERE sample_id = 'b'")
    with pytest.raises(ValueError, match="set of cases has changed"):
        bank.verify()
    with sqlite3.connect(bank.path) as db:
        db.execute("UPDATE record SET sample_id = 'b'")
    with pytest.raises(ValueError, match="record of 'b' does not agree with its digest"):
        bank["b"]
    with sqlite3.connect(bank.path) as db:
        db.execute("UPDATE status SET state = x'00'")
    with pytest.raises(ValueError, match="trainer's state does not agree"):
        bank.state()


# -------------------------------------------------------------------- speed


def test_thousands_of_small_cases_and_one_volume_are_fast(bank: PerturbationBank, tmp_path: Path) -> None:
    small = torch.randint(-8, 9, (5000, 1, 28, 28), dtype=torch.int16)
    records = [Record(f"case-{number}", delta, "d", 8) for number, delta in enumerate(small)]
    start = time.perf_counter()
    bank.commit(records, round_=0, score=0, state=b"")
    assert time.perf_counter() - start < 3  # 0.4 s on an idle core
    volume = torch.randint(-8, 9, (1, 160, 256, 256), dtype=torch.int8)
    other = PerturbationBank(tmp_path / "volume.sqlite", create=True)
    start = time.perf_counter()
    other.commit([Record("v", volume, "d", 8)], round_=0, score=0, state=b"")
    assert (other["v"] == volume).all()
    assert time.perf_counter() - start < 4  # 0.5 s
    assert other.path.stat().st_size < 0.7 * volume.numel()
