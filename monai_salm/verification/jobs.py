# SPDX-License-Identifier: Apache-2.0
"""Trainings of a study: side by side in worker processes, kept as they finish, never done twice."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import connection, current_process, get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monai_salm.release import commit as door
from monai_salm.release.progress import track
from monai_salm.verification.arms import Arm, VolumeArm
from monai_salm.verification.setting import cores
from monai_salm.verification.training import Recipe, Task, train_network

__all__ = ["Job", "Ledger", "default_workers", "run_jobs", "start_worker"]

logger = logging.getLogger(__name__)

LEDGER = f"{door.PRIVATE}/study.jsonl"
WEIGHTS = f"{door.PRIVATE}/victims"


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        key: digest of everything that decides its result.
        make: builds the network.
        train: what it is trained on.
        test: what it is tested on.
        task: what is learned.
        options: other arguments of :py:func:`monai_salm.verification.training.train_network`.
        keep: whether the trained weights are kept.
        recipe: makes the recipe of the training, of the clean cases that the third party has (None: it has none).
        spare: places of these among the test cases; it is tested on the others.
    """

    key: str
    make: Callable[[], nn.Module]
    train: Arm | VolumeArm
    test: Arm | VolumeArm
    task: Task
    options: Mapping[str, Any]
    keep: bool
    recipe: Callable[..., Recipe] = Recipe
    spare: tuple[int, ...] = ()


class Ledger:
    """Finished trainings in ``private/study.jsonl`` and their weights in ``private/victims``.

    Args:
        output_dir: folder of the release.
        name: of the file in it.
    """

    def __init__(self, output_dir: Path, name: str = LEDGER) -> None:
        self._out, self._name = output_dir, name
        self._rows: dict[str, Mapping[str, Any]] = {}
        path = output_dir / name
        text = path.read_text() if path.is_file() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._rows[entry["key"]] = entry["row"]
            except (ValueError, KeyError, TypeError):  # the last line of a killed run
                continue
        if text and not text.endswith("\n"):
            door.append_line(output_dir, name, "\n")

    def __contains__(self, job: Job) -> bool:
        return job.key in self._rows and (not job.keep or self._weights(job.key).is_file())

    def __getitem__(self, job: Job) -> Mapping[str, Any]:
        return self._rows[job.key]

    def add(self, key: str, row: Mapping[str, Any], weights: bytes | None, **told: str) -> None:
        """Keep a finished training, and what is ``told`` of it to people.

        The weights come first, so that a row is never without them.
        """
        if weights is not None:
            door.write(self._out, {f"{WEIGHTS}/{key}.pt": weights})
        door.append_line(self._out, self._name, json.dumps({"key": key, **told, "row": row}) + "\n")
        self._rows[key] = row

    def network(self, job: Job) -> nn.Module:
        """The trained network of a job whose weights were kept, on CPU."""
        network = job.make()
        network.load_state_dict(torch.load(self._weights(job.key), map_location="cpu", weights_only=True))
        return network.eval()

    def _weights(self, key: str) -> Path:
        return self._out / WEIGHTS / f"{key}.pt"


def default_workers(device: torch.device) -> int:
    """Worker processes to train in: one per core on CPU; none besides this one on an accelerator, or in a daemon."""
    if device.type != "cpu" or current_process().daemon:
        return 1
    return cores()


def run_jobs(jobs: Sequence[Job], ledger: Ledger, workers: int) -> None:
    """Do the trainings that the ledger does not have, and show how far they are.

    Args:
        jobs: all of the study; those of one key are done once.
        ledger: gets each as it finishes, so that a killed run goes on from there.
        workers: processes with one thread each; 1: in this process, with its threads.
    """
    pending: dict[str, Job] = {}
    for job in jobs:
        if job not in ledger and (job.keep or job.key not in pending):
            pending[job.key] = job
    todo = list(pending.values())
    if not todo:
        return
    if workers > 1 and not _can_travel(todo):
        logger.warning("victims that cannot be pickled (lambdas, local functions) are trained in one process")
        workers = 1
    finished = _parallel(todo, min(workers, len(todo))) if min(workers, len(todo)) > 1 else map(_finish, todo)
    with closing(track(range(len(todo)), "training victims")) as steps:
        for _, (key, row, weights) in zip(steps, finished, strict=False):
            ledger.add(key, row, weights)


def _finish(job: Job) -> tuple[str, dict[str, Any], bytes | None]:
    task, test, clean = job.task, job.test.load(), None
    if job.spare:
        rest = sorted(set(range(task.count(test))) - set(job.spare))
        clean, test = task.part(test, job.spare), task.part(test, rest)
    result = train_network(task, job.make, job.train.load(), test, recipe=job.recipe(clean=clean), **job.options)
    if not job.keep:
        return job.key, result.row, None
    stream = io.BytesIO()
    torch.save(result.network.cpu().state_dict(), stream)
    return job.key, result.row, stream.getvalue()


def _can_travel(jobs: Sequence[Job]) -> bool:
    try:
        pickle.dumps(jobs)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def _parallel(jobs: Sequence[Job], workers: int) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
    """Results as they finish. Where workers cannot start or die, the rest is done in this process."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
    futures: dict[Future[Any], Job] = {}
    left = {job.key: job for job in jobs}
    try:
        futures = {pool.submit(_finish, job): job for job in jobs}
        for future in as_completed(futures):
            result = future.result()
            del left[result[0]]
            yield result
    except BrokenProcessPool:
        logger.warning("a worker process died (out of memory?); going on in one process with %d trainings", len(left))
        yield from map(_finish, left.values())
    finally:
        processes = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=not left, cancel_futures=True)
        for process in processes if left else ():
            process.terminate()


def start_worker() -> None:
    """What each process of a pool begins with: one thread, and an end when its parent ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers to stop."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
