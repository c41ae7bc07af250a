# SPDX-License-Identifier: Apache-2.0
"""How time and memory of one case's perturbation grow with its volume, tile by tile; against the whole volume at once.

    python benchmarks/voxel_scaling.py --output benchmarks/results/voxel_scaling.json

One call of the segmentation bundle's perturbation on a cube of noise with voxel labels and no random view, by networks
with random weights: the bundle's own surrogate and a U-Net. Every measurement has a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import linear_regression
from typing import Any
from unittest import mock

import torch
from monai.networks.nets import UNet
from setting import command_line, configured, write
from torch import Tensor, nn

from monai_salm.perturbations.budget import Lattice
from monai_salm.perturbations.voxels import VoxelObjective
from monai_salm.surrogates import PaddedNetwork, Surrogate

BUNDLE = "salm_3d_segmentation"
CLASSES = 3
LEVELS = 8
NETWORKS = ("bundle", "unet", "pointwise")
"""The bundle's surrogate; a U-Net of stride 4 with 8, 16 and 32 channels; one weight per class, next to no network."""
SIZES = (64, 96, 128, 192, 256)
"""Voxels per axis."""
WHOLE_UP_TO = 128
"""Largest size that is also done at once."""
TILE, HALO = 64, 16
"""Of networks other than the bundle's, which has its own."""
STEPS = 2
"""Of the perturbation."""
NOTE = (
    "Volumes are uniform noise: time does not depend on what is in them.",
    "seen_voxels counts what the network sees in a step, halos included: at most ((tile + 2 halo) / tile) ** 3 times "
    "the volume, which large volumes approach. That makes the time grow faster than the volume at first.",
    "peak_bytes is the largest resident memory in the call above that before it, in a process that returns freed "
    "blocks to the system; seconds are those of another process. held_bytes_per_voxel is what the caller holds before "
    "the call: image, label and lattice.",
    "state is the peak of the same call by the pointwise network: image-sized intermediate values, the mask's sort.",
    "tile_bytes is the peak of one gradient on one tile with its full halo, whatever the volume.",
    "Whole and tiled may differ in single precision where a gradient is zero but for rounding, or two scores are equal "
    "but for rounding at the mask's edge.",
)


@dataclass(frozen=True)
class Work:
    """One measurement: a network on a cube, in tiles of ``tile`` voxels; ``whole`` is one tile of everything."""

    network: str
    size: int
    tile: int
    halo: int
    whole: bool = False
    double: bool = False

    def network_def(self) -> Surrogate:
        """Random weights, the same in every process."""
        torch.manual_seed(0)
        if self.network == "bundle":
            return configured(BUNDLE, {"spatial_dims": 3, "num_classes": CLASSES}).get_parsed_content("network_def")
        if self.network == "unet":
            unet = UNet(3, 1, CLASSES, (8, 16, 32), (2, 2), num_res_units=1, norm="BATCH")
            return Surrogate(PaddedNetwork(unet, multiple=4))
        return Surrogate(nn.Conv3d(1, CLASSES, 1))

    def objective(self) -> VoxelObjective:
        network = self.network_def().eval()
        tile = self.size if self.whole else self.tile
        return VoxelObjective(
            network.double() if self.double else network,
            nn.CrossEntropyLoss(reduction="none"),
            tile_size=(tile,) * 3,
            halo=self.halo,
        )

    def data(self) -> tuple[Tensor, Tensor, Lattice]:
        """Image, voxel labels (a block of each class) and lattice."""
        image = torch.rand((1, 1, *[self.size] * 3), generator=torch.Generator().manual_seed(0))
        label = torch.zeros(image.shape, dtype=torch.uint8)
        for index in range(1, CLASSES):
            label[(..., *[slice(self.size * index // 4, self.size * (index + 1) // 4)] * 3)] = index
        bound = torch.full(image.shape, LEVELS, dtype=torch.int16)
        return image.double() if self.double else image, label, Lattice(-bound, bound, torch.full((1,) * 5, 1 / 255))

    def seen_voxels(self) -> int:
        """Voxels that the network sees in one gradient."""
        tiles = self.objective().tiles((self.size,) * 3)
        return sum(math.prod(span.stop - span.start for span in outer[1:]) for _, outer in tiles)


def perturb(work: Work, file: str | None = None) -> dict[str, Any]:
    """Seconds and memory of one call; the perturbation goes to ``file``."""
    torch.set_num_threads(1)
    overrides = {"spatial_dims": 3, "num_classes": CLASSES, "perturbation_steps": STEPS}
    perturbation = configured(BUNDLE, overrides).get_parsed_content("perturbation")
    objective = work.objective()
    _warm_up(work, objective)
    image, label, lattice = work.data()
    held = [image, label, lattice.lower, lattice.upper]
    before = _memory("VmRSS")
    start = time.perf_counter()
    delta = perturbation(objective, image, label, lattice, generator=torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - start
    if file is not None:
        torch.save(delta, file)
    return {
        "size": work.size,
        "voxels": image.numel(),
        "seen_voxels": work.seen_voxels(),
        "seconds_per_step": seconds / STEPS,
        "peak_bytes": _memory("VmHWM") - before,
        "held_bytes_per_voxel": sum(part.element_size() for part in held),
        "sha256": hashlib.sha256(delta.numpy().tobytes()).hexdigest(),
    }


def tile_bytes(work: Work) -> int:
    """Peak memory of one gradient on one tile with its full halo."""
    torch.set_num_threads(1)
    one = replace(work, size=work.tile + 2 * work.halo, whole=True)
    objective = one.objective()
    _warm_up(work, objective)
    image, label, _ = one.data()
    before = _memory("VmRSS")
    objective.gradient(image, torch.zeros_like(image), label, torch.Generator())
    return _memory("VmHWM") - before


def _warm_up(work: Work, objective: VoxelObjective) -> None:
    """What a first call loads and allocates once."""
    image, label, _ = replace(work, size=16).data()
    objective.gradient(image, torch.zeros_like(image), label, torch.Generator())


def _memory(name: str) -> int:
    """A field of the process's status in bytes. ``VmHWM`` starts anew with a program, unlike ``getrusage``'s peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_fresh_process(function: Any, *arguments: Any, exact: bool = False) -> Any:
    """What the function returns in a process of its own.

    ``exact``: every larger block of memory goes back to the system when it is freed, so that the peak does not depend
    on what the allocator keeps. That costs time.
    """
    name, spawn = "MALLOC_MMAP_THRESHOLD_", multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, {name: str(2**16)}), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        if not exact:
            del os.environ[name]
        return pool.submit(function, *arguments).result()


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares ``y = intercept + slope * x``, and the largest residual."""
    slope, intercept = linear_regression(x, y)
    residuals = (abs(there - intercept - slope * here) for here, there in zip(x, y, strict=True))
    return {"intercept": intercept, "slope": slope, "largest_residual": max(residuals)}


def power(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """``y = a * x ** b`` by least squares of the logarithms; the largest residual as a factor."""
    found = line([math.log(value) for value in x], [math.log(value) for value in y])
    names = {"a": math.exp(found["intercept"]), "b": found["slope"]}
    return names | {"largest_residual_factor": math.exp(found["largest_residual"])}


def growth(work: Work) -> dict[str, Any]:
    """Rows of all sizes, and the laws that they follow."""
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        one = replace(work, size=size)
        timed, measured = (in_fresh_process(perturb, one, exact=exact) for exact in (False, True))
        if timed["sha256"] != measured["sha256"]:
            raise RuntimeError("two equal calls gave different perturbations; did the bundle change meanwhile?")
        state = in_fresh_process(perturb, replace(one, network="pointwise", halo=0), exact=True)
        rows.append(timed | {"peak_bytes": measured["peak_bytes"], "state_peak_bytes": state["peak_bytes"]})
        print(json.dumps(rows[-1]), flush=True)
    voxels, seen, seconds, peaks, states = (
        [row[name] for row in rows]
        for name in ("voxels", "seen_voxels", "seconds_per_step", "peak_bytes", "state_peak_bytes")
    )
    return {
        "tile_bytes": in_fresh_process(tile_bytes, work, exact=True),
        "rows": rows,
        "seconds_by_voxels": power(voxels, seconds),
        "seconds_by_seen_voxels": power(seen, seconds),
        "seen_by_voxels": power(voxels, seen),
        "peak_bytes_by_voxels": line(voxels, peaks),
        "state_bytes_by_voxels": line(voxels, states),
    }


def compare(work: Work) -> dict[str, Any]:
    """The whole volume as one tile against tiles: cost, and how far the perturbations differ."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("tiled.pt", "whole.pt")]
        rows = []
        for one, file in zip((work, replace(work, whole=True)), files, strict=True):
            peak = in_fresh_process(perturb, one, exact=True)["peak_bytes"]
            rows.append(in_fresh_process(perturb, one, file) | {"peak_bytes": peak})
        tiled, whole = rows
        deltas = [torch.load(file, weights_only=True) for file in files]
    names = ("seconds_per_step", "peak_bytes")
    found = {
        "size": work.size,
        "double": work.double,
        "tiled": {name: tiled[name] for name in names},
        "whole": {name: whole[name] for name in names},
        "equal": tiled["sha256"] == whole["sha256"],
        "equal_fraction": float((deltas[0] == deltas[1]).double().mean()),
        "voxels_that_differ": int((deltas[0] != deltas[1]).sum()),
    }
    print(json.dumps(found), flush=True)
    return found


def measure(network: str) -> dict[str, Any]:
    """All that is measured of a network, in the tiles that it is used with."""
    tile, halo = TILE, HALO
    if network == "bundle":
        parser = configured(BUNDLE, {"spatial_dims": 3, "num_classes": CLASSES})
        tile, halo = parser.get_parsed_content("tile_size")[0], parser.get_parsed_content("halo")
    work = Work(network, tile, tile, halo)
    both = [size for size in SIZES if tile < size <= WHOLE_UP_TO]
    pairs = [*(replace(work, size=size) for size in both), replace(work, size=min(both), double=True)]
    return {
        "network": str(work.network_def()),
        "tile": tile,
        "halo": halo,
        "steps": STEPS,
        **growth(work),
        "whole_against_tiled": [compare(pair) for pair in pairs],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["bundle", "unet"])
    parser.add_argument("--resume", action="store_true", help="keep the networks that the output has already")
    asked = parser.parse_args(arguments)
    results = json.loads(asked.output.read_text())["networks"] if asked.resume and asked.output.is_file() else {}
    torch.set_num_threads(1)
    for name in asked.networks:
        if name not in results:
            results[name] = measure(name)
            write("voxel_scaling", {"networks": results, "note": NOTE}, asked.output)
    for name, one in results.items():
        print(
            f"{name}: seconds ~ seen voxels ** {one['seconds_by_seen_voxels']['b']:.3f}, ~ voxels ** "
            f"{one['seconds_by_voxels']['b']:.3f}; memory {one['tile_bytes'] / 2**20:.0f} MiB for a tile, "
            f"{one['state_bytes_by_voxels']['slope']:.1f} bytes per voxel of state"
        )


if __name__ == "__main__":
    main()
