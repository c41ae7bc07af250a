# SPDX-License-Identifier: Apache-2.0
"""A real PACS for tests: Debian's Orthanc, started on free ports of the loopback interface."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

AE_TITLE = "TESTPACS"
RECEIVER = "RECEIVER"
SECONDS = 40


@dataclass(frozen=True)
class Orthanc:
    """A running server.

    Args:
        http: port of its own interface.
        dicom: port of C-STORE and the like.
        receiver: port that it sends to when it is asked to move files to ``RECEIVER``.
    """

    http: int
    dicom: int
    receiver: int

    @property
    def target(self) -> str:
        """As ``push`` takes it."""
        return f"{AE_TITLE}@127.0.0.1:{self.dicom}"

    def rest(self, path: str) -> bytes:
        """What a path of the server's own interface answers."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}{path}")
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.read()

    def instances(self) -> dict[str, str]:
        """The server's own id of each SOPInstanceUID."""
        return {
            entry["MainDicomTags"]["SOPInstanceUID"]: entry["ID"]
            for entry in json.loads(self.rest("/instances?expand"))
        }

    def file(self, uid: str) -> bytes:
        """The file that it keeps of an instance."""
        return self.rest(f"/instances/{self.instances()[uid]}/file")


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def running(folder: Path, **settings: object) -> Iterator[Orthanc]:
    """A server with its files below ``folder``; skips the test where Orthanc is not installed."""
    program = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")
    if program is None:
        pytest.skip("Orthanc is not installed (Debian: apt-get install orthanc)")
    http, dicom, receiver = free_ports(3)
    config = {
        "Name": AE_TITLE,
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "Plugins": [],
        "HttpPort": http,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAet": AE_TITLE,
        "DicomPort": dicom,
        **{f"DicomAlwaysAllow{what}": True for what in ("Store", "Find", "Get", "Move")},
        "DicomModalities": {RECEIVER: [RECEIVER, "127.0.0.1", receiver]},
        "OverwriteInstances": False,
        "WebDavEnabled": False,
        "SaveJobs": False,
        "DeflatedTransferSyntaxAccepted": True,
        **settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "orthanc.json").write_text(json.dumps(config))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log, cwd=folder)
    server = Orthanc(http, dicom, receiver)
    try:
        _wait(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Orthanc, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            server.rest("/system")
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    pytest.skip("Orthanc is installed, but does not start here")
