# SPDX-License-Identifier: Apache-2.0
"""The gradient by the image of the surrogate's filters, PyTorch's and ours, on one thread.

python benchmarks/convolution.py --output benchmarks/results/convolution.json
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from setting import command_line, write

from monai_salm.convolution import convolve, image_gradient

WORKLOADS = (
    ("images of the 2D bundle", 32, (64, 64), 7),
    ("images of PneumoniaMNIST", 32, (28, 28), 7),
    ("volumes of the 3D bundle", 16, (24, 24, 24), 7),
    ("slices with voxel labels", 8, (80, 96), 7),
    ("a tile of a volume with voxel labels", 1, (64, 64, 64), 5),
)
"""Name, batch, size, side of a filter."""
FEATURES = 16


def least(repetitions: int, *calls: Callable[[], object]) -> list[float]:
    """Least processor seconds of each call; they take turns."""
    seconds = [float("inf")] * len(calls)
    for _ in range(repetitions):
        for at, call in enumerate(calls):
            start = time.process_time()
            call()
            seconds[at] = min(seconds[at], time.process_time() - start)
    return seconds


def measure(batch: int, size: tuple[int, ...], kernel_size: int, repetitions: int) -> dict[str, float]:
    """Milliseconds of the convolution and of both gradients, and their largest difference."""
    torch.manual_seed(0)
    weight = torch.randn(FEATURES, 1, *[kernel_size] * len(size))
    image = torch.rand(batch, 1, *size, requires_grad=True)
    result = convolve(image, weight)
    gradient = torch.randn_like(result)

    def by_torch() -> torch.Tensor:
        return torch.autograd.grad(result, image, gradient, retain_graph=True)[0]

    seconds = least(
        repetitions, lambda: convolve(image.detach(), weight), by_torch, lambda: image_gradient(gradient, weight)
    )
    names = ("convolution_ms", "torch_gradient_ms", "gradient_ms")
    difference = float((by_torch() - image_gradient(gradient, weight)).abs().max())
    return dict(zip(names, (1e3 * each for each in seconds), strict=True)) | {
        "times_faster": seconds[1] / seconds[2],
        "largest_difference": difference,
    }


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--repetitions", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, batch, size, kernel_size in WORKLOADS:
        shown = {"workload": name, "batch": batch, "size": size, "kernel_size": kernel_size}
        rows.append(shown | measure(batch, size, kernel_size, options.repetitions))
        print(f"{name}: {rows[-1]['times_faster']:.1f} times as fast as PyTorch's")
    write("convolution", {"seed": 0, "features": FEATURES, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
