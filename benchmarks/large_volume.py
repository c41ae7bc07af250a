# SPDX-License-Identifier: Apache-2.0
"""What one large volume costs on its own grid, on one thread: reading it, perturbing it, and comparing it by SSIM.

python benchmarks/large_volume.py --output benchmarks/results/large_volume.json
"""

from __future__ import annotations

import torch
from convolution import least
from monai.metrics import SSIMMetric
from setting import command_line, configured, write

from monai_salm.perturbations.budget import Budget, Lattice
from monai_salm.similarity import structural_similarity
from monai_salm.stored import StoredCodec

SIZE = (256, 256, 100)
CODEC = StoredCodec("int16", window=(-1000.0, 1500.0))


def measure(repetitions: int) -> dict[str, float]:
    """Processor seconds, the least of some repetitions."""
    torch.manual_seed(0)
    parser = configured("salm_3d_classification", {"num_classes": 2, "device": "cpu"})
    objective = parser.get_parsed_content("train::trainer::objective")
    method = parser.get_parsed_content("perturbation")
    budget, stored = Budget.parse(parser["epsilon"]), (300 * torch.randn(1, *SIZE)).to(torch.int16)
    image, label = CODEC.to_unit(stored)[None], torch.tensor([1])
    bounds = (bound[None] for bound in CODEC.bounds(stored, budget))
    lattice = Lattice(*bounds, torch.full((1, 1, 1, 1, 1), CODEC.unit_step))
    seen = objective.network.view(image)

    def passes() -> None:
        for _ in range(method.steps):
            objective.gradient(seen, torch.zeros_like(seen), label, torch.Generator().manual_seed(0))

    def perturb() -> None:
        method(objective, image, label, lattice, generator=torch.Generator().manual_seed(0))

    moved = (image[0] + 0.03 * torch.randn(1, *SIZE)).clamp(0, 1)
    by_monai = SSIMMetric(3, data_range=1.0, reduction="none")
    calls = {
        "to_unit": lambda: CODEC.to_unit(stored),
        "bounds": lambda: CODEC.bounds(stored, budget),
        "perturbation": perturb,
        "its_passes_at_the_size_of_the_network": passes,
        "ssim": lambda: structural_similarity(image, moved[None]),
        "ssim_of_monai": lambda: by_monai(moved[None], image),
    }
    return dict(zip(calls, least(repetitions, *calls.values()), strict=True))


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = measure(options.repetitions)
    print(*(f"{name}: {each:.2f} s" for name, each in seconds.items()), sep="\n")
    write("large_volume", {"seed": 0, "size": SIZE, "processor_seconds": seconds}, options.output)


if __name__ == "__main__":
    main()
