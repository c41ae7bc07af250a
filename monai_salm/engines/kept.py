# SPDX-License-Identifier: Apache-2.0
"""What a fit keeps on disk besides its bank: weights of the surrogate, and what an unfinished round has done so far."""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_salm.release.commit import write_atomically

__all__ = ["UnfinishedRound", "load_weights", "save_weights"]

_OWNER_ONLY = 0o600
"""Permissions of all that is kept: whoever has it can undo a protection."""


class UnfinishedRound:
    """The perturbations of a round that is not over: a fit that was killed goes on with the others.

    Args:
        folder: where they are, as long as the round is not in the bank.
        fingerprint: of the fit; what another one left is passed over.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._parts = 0

    def begin(self, round_: int, state: Mapping[str, Any]) -> None:
        """Keep the fit's state before the first perturbation of a round, and nothing of earlier ones."""
        self.clear()
        self.folder.mkdir(mode=0o700)
        self._add({"fingerprint": self.fingerprint, "round": round_, "state": dict(state)})

    def add(self, deltas: Mapping[str, Tensor], tally: Mapping[str, float]) -> None:
        """Keep further perturbations, by ``sample_id``, and what the round has counted until then."""
        self._add({"deltas": dict(deltas), "tally": dict(tally)})

    def read(
        self, round_: int, device: torch.device
    ) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float]] | None:
        """State (on a device), perturbations and count of a round; None where nothing of it is kept."""
        first = self._part(0, device)
        if not first or (first.get("fingerprint"), first.get("round")) != (self.fingerprint, round_):
            return None
        deltas: dict[str, Tensor] = {}
        tally: dict[str, float] = {}
        self._parts = 1
        while part := self._part(self._parts):
            deltas |= part["deltas"]
            tally = part["tally"]
            self._parts += 1
        for path in self.folder.glob("*.pt"):  # behind a damaged one: their counts are not those of what is kept
            if int(path.stem) >= self._parts:
                path.unlink()
        return first["state"], deltas, tally

    def clear(self) -> None:
        """Forget what is kept: the round is in the bank."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder)
        self._parts = 0

    def _add(self, part: Mapping[str, Any]) -> None:
        blob = io.BytesIO()
        torch.save(dict(part), blob)
        content = hashlib.sha256(blob.getvalue()).digest() + blob.getvalue()
        write_atomically(content, self.folder / f"{self._parts}.pt", _OWNER_ONLY)
        self._parts += 1

    def _part(self, number: int, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        try:
            content = (self.folder / f"{number}.pt").read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            return None  # damaged: it is made again
        return torch.load(io.BytesIO(content[32:]), map_location=device, weights_only=True)


def save_weights(network: torch.nn.Module, path: Path) -> None:
    """Write a network's weights: all of them or none."""
    blob = io.BytesIO()
    torch.save(network.state_dict(), blob)
    write_atomically(blob.getvalue(), path, _OWNER_ONLY)


def load_weights(network: torch.nn.Module, path: Path) -> None:
    """Give a network the weights of a file.

    Raises:
        ValueError: When there are none, or not of this network.
    """
    if not path.is_file():
        raise ValueError(f"there are no weights of a surrogate at {path}; name a finished fit")
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"the weights at {path} are not of this network; use the bundle and the settings of the fit that made them"
        ) from error
