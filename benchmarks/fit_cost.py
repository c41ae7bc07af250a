# SPDX-License-Identifier: Apache-2.0
"""What a fit costs: passes per image, and wall time beside a bare loop of as many passes and nothing else.

    python benchmarks/fit_cost.py --output benchmarks/results/fit_cost.json

Both sides run the same network on the same batch sizes through the same random views. The bare loop has its images as
one tensor in the memory of the device that it computes on, resized to the network's input before the clock starts; it
steps the surrogate's optimizer and computes the gradients of perturbations (of the images' own size), which it throws
away: no masks, no lattice, no cases, no bank. The two take turns in one process, by default with one thread: with more,
time depends on what else runs.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose
from monai.utils import set_determinism
from setting import command_line, configured, write
from torch import Tensor

from monai_salm.perturbations.base import Objective, frozen
from monai_salm.stored import StoredCodec
from monai_salm.workflows import bundle_for

TARGET = 1.15
"""Wall time of the fit over that of the bare loop that we want at most."""
CLASSES = 2


@dataclass(frozen=True)
class Workload:
    """Synthetic uint8 images, and the size at which the network sees them."""

    count: int
    shape: tuple[int, ...]
    spatial_size: tuple[int, ...]

    def __str__(self) -> str:
        native, seen = ("x".join(map(str, size)) for size in (self.shape, self.spatial_size))
        return f"{self.count} of {native} seen at {seen}"

    def items(self) -> list[dict[str, Any]]:
        """What ``LoadStoredd`` gives."""
        generator = torch.Generator().manual_seed(0)
        codec = StoredCodec("uint8", (0.0, 255.0)).to_meta()
        items = []
        for at in range(self.count):
            stored = torch.randint(0, 256, (1, *self.shape), generator=generator, dtype=torch.uint8)
            meta = {"sample_id": f"case-{at:04d}", "stored_codec": codec, "intensity": "stored"}
            items.append({"image": MetaTensor(stored, meta=meta), "label": at % CLASSES})
        return items


WORKLOADS = (
    Workload(1200, (28, 28), (28, 28)),
    Workload(200, (128, 128), (64, 64)),
    Workload(8, (64, 64, 64), (32, 32, 32)),
)


@dataclass(frozen=True)
class Timed:
    """Wall and processor seconds of one side, its passes, and what of the time was not spent in ``run``."""

    wall: float
    processor: float
    passes: int
    per_image: dict[str, float]
    preparing: float = 0.0


def fit(workload: Workload, dataset: CacheDataset, overrides: Mapping[str, Any]) -> Timed:
    """The shipped fit, from the construction of the trainer to the bank's last byte."""
    with tempfile.TemporaryDirectory() as folder:
        parser = _parser(workload, {**overrides, "train::dataset": dataset, "output_dir": folder})
        for part in ("train::trainer::objective", "optimizer", "perturbation", "train::handlers"):
            parser.get_parsed_content(part)  # the bare loop does not parse a configuration either
        start, processor = time.perf_counter(), time.process_time()
        trainer = parser.get_parsed_content("train::trainer")
        preparing = time.perf_counter() - start
        trainer.run()
        wall, processor = time.perf_counter() - start, time.process_time() - processor
    passes = trainer.surrogate_passes + trainer.perturbation_passes
    return Timed(wall, processor, passes, trainer.passes_per_image, preparing)


def bare(workload: Workload, images: Tensor, labels: Tensor, overrides: Mapping[str, Any]) -> Timed:
    """As many forward and backward passes, and nothing else."""
    parser = _parser(workload, overrides)
    objective: Objective = parser.get_parsed_content("train::trainer::objective").to(images.device)
    optimizer = parser.get_parsed_content("optimizer")
    network, view, loss_of = objective.network, objective.view, objective.loss
    asked = ("rounds", "surrogate_steps", "perturbation_steps", "batch_size")
    rounds, surrogate_steps, perturbation_steps, batch_size = (parser.get_parsed_content(name) for name in asked)
    batch_size, passes = min(batch_size, len(images)), 0
    generator = torch.Generator().manual_seed(0)
    deltas, images = torch.zeros_like(images), network.view(images)

    def losses(seen: Tensor, label: Tensor) -> Tensor:
        return loss_of(network.network(view(seen, view.draw(len(seen), generator))), label)

    start, processor = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        network.train()
        for _ in range(surrogate_steps):
            chosen = torch.randperm(len(images), generator=generator)[:batch_size]
            loss = losses(images[chosen], labels[chosen]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            passes += len(chosen)
        with frozen(network):
            at_once = batch_size if images.device.type == "cpu" else len(images)  # as the trainer does
            for at in range(0, len(images), at_once):
                image, label = images[at : at + at_once], labels[at : at + at_once]
                for _ in range(perturbation_steps):
                    delta = deltas[at : at + at_once].detach().requires_grad_(True)
                    torch.autograd.grad(losses(image + network.view(delta), label).sum(), delta)
                    passes += len(image)
    if images.is_cuda:
        torch.cuda.synchronize()  # the fit ends with its perturbations on the CPU, and so with all work done
    return Timed(time.perf_counter() - start, time.process_time() - processor, passes, {})


def measure(workload: Workload, repetitions: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Fit and bare loop in turns, after a short one of each that does not count.

    Raises:
        RuntimeError: When the two did not do the same number of passes.
    """
    items = workload.items()
    dataset = CacheDataset(items, Compose([]), copy_cache=False, progress=False)
    device = overrides.get("device", "cpu")
    images = (torch.stack([item["image"].as_tensor() for item in items]).float() / 255).to(device)
    labels = torch.tensor([item["label"] for item in items]).to(device)
    brief = {**overrides, "surrogate_steps": 2, "perturbation_steps": 3, "rounds": 1}
    fit(workload, dataset, brief)
    bare(workload, images, labels, brief)
    pairs = []
    for turn in range(repetitions):
        pairs.append((fit(workload, dataset, overrides), bare(workload, images, labels, overrides)))
        print(f"{workload}: {turn + 1}/{repetitions}, {pairs[-1][0].wall / pairs[-1][1].wall:.3f}", flush=True)
    if any(ours.passes != theirs.passes for ours, theirs in pairs):
        raise RuntimeError(f"the fit did {pairs[0][0].passes} passes, the bare loop {pairs[0][1].passes}")
    parser = _parser(workload, overrides)
    return {
        "workload": str(workload),
        "passes_per_image": pairs[0][0].per_image,
        "ratio": _spread([ours.wall / theirs.wall for ours, theirs in pairs]),
        "ratio_of_processor_time": _spread([ours.processor / theirs.processor for ours, theirs in pairs]),
        "fit_seconds": _spread([ours.wall for ours, _ in pairs]),
        "bare_seconds": _spread([theirs.wall for _, theirs in pairs]),
        "preparing_seconds": _spread([ours.preparing for ours, _ in pairs]),
        "config": {
            name: parser.get_parsed_content(name)
            for name in ("rounds", "surrogate_steps", "perturbation_steps", "batch_size", "mask_ratio", "transplant")
        },
    }


def _parser(workload: Workload, overrides: Mapping[str, Any]) -> ConfigParser:
    fixed = {"device": "cpu", "num_classes": CLASSES, "spatial_size": list(workload.spatial_size)}
    parser = configured(bundle_for(len(workload.shape)), {**fixed, **overrides})
    set_determinism(seed=0)
    return parser


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--repetitions", type=int, default=5, help="pairs per workload")
    parser.add_argument("--only", type=int, choices=range(len(WORKLOADS)), help="one workload alone")
    parser.add_argument("--threads", type=int, default=1, help="threads of both sides")
    parser.add_argument("--device", default="cpu", help="of both sides, such as cuda")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    chosen = WORKLOADS if asked.only is None else WORKLOADS[asked.only : asked.only + 1]
    results = {
        "target_ratio": TARGET,
        "repetitions": asked.repetitions,
        "workloads": [measure(workload, asked.repetitions, {"device": asked.device}) for workload in chosen],
        "note": [
            "Images are uniform noise: time does not depend on what is in them.",
            "The ratio is that of neighbors in time (fit, bare, fit, bare, ...); it includes the construction of the "
            "trainer (digests of all images), the bank, and all else between the loaded images and the finished fit.",
        ],
    }
    write("fit_cost", results, asked.output, asked.device)
    for found in results["workloads"]:
        ratio, cost = found["ratio"], found["passes_per_image"]["total"]
        print(
            f"{found['workload']}: {cost:.1f} passes per image, {ratio['median']:.3f} times the bare loop "
            f"({ratio['min']:.3f} to {ratio['max']:.3f}; target {TARGET})"
        )


if __name__ == "__main__":
    main()
