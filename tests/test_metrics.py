# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.engines import Evaluator
from monai.handlers import IgniteMetricHandler

from monai_salm.metrics import PerturbationNorm, PerturbedFraction


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_the_norm_of_a_known_perturbation_is_its_largest_change(dtype: torch.dtype) -> None:
    clean = torch.tensor([[[[10, 20], [30, 40]]]], dtype=dtype)
    protected = torch.tensor([[[[10, 20], [33, 36]]]], dtype=dtype)
    assert PerturbationNorm()(protected, clean).tolist() == [[4.0]]


def test_the_norm_of_a_32_bit_difference_does_not_overflow() -> None:
    clean = torch.full((1, 1, 2), -(2**31), dtype=torch.int32)
    assert PerturbationNorm()(-1 - clean, clean).item() == 2**32 - 1


def test_values_accumulate_over_batches_lists_and_shapes() -> None:
    metric = PerturbationNorm(reduction="none")
    metric(torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    metric([torch.full((1, 2, 3, 4), 3.0)], [torch.zeros(1, 2, 3, 4)])
    assert metric.aggregate().tolist() == [[1.0], [1.0], [3.0]]
    assert metric.aggregate("mean").item() == pytest.approx(5 / 3)
    metric.reset()
    metric(MetaTensor(torch.ones(1, 1, 2)), MetaTensor(torch.zeros(1, 1, 2)))
    assert metric.aggregate().tolist() == [[1.0]]


def test_perturbed_fraction_counts_voxels_and_takes_nan_for_nan() -> None:
    nan = float("nan")
    clean = torch.tensor([[[nan, 1.0, 2.0, 3.0]], [[0.0, 0.0, 0.0, 0.0]]])
    protected = torch.tensor([[[nan, 1.0, 2.5, nan]], [[0.0, 0.0, 0.0, 0.0]]])
    metric = PerturbedFraction(reduction="none")
    metric(protected, clean)
    assert metric.aggregate().tolist() == [[0.5], [0.0]]


def test_images_of_different_shape_are_refused() -> None:
    for metric in (PerturbationNorm(), PerturbedFraction()):
        with pytest.raises(ValueError, match="shape"):
            metric(torch.zeros(1, 1, 2), torch.zeros(1, 1, 3))


def test_all_are_handlers_of_an_engine() -> None:
    clean, protected = torch.zeros(4, 1, 3, 3), torch.zeros(4, 1, 3, 3)
    protected[:, :, 0] = 2.0
    batches = [{"protected": protected, "clean": clean}] * 2

    def pair(output: list[dict]) -> tuple:
        return output[0]["protected"], output[0]["clean"]

    engine = Evaluator(
        device=torch.device("cpu"),
        val_data_loader=batches,
        iteration_update=lambda engine, batch: [batch],
        postprocessing=None,
        decollate=False,
        key_val_metric={"norm": IgniteMetricHandler(PerturbationNorm(), output_transform=pair)},
        additional_metrics={"fraction": IgniteMetricHandler(PerturbedFraction(), output_transform=pair)},
    )
    engine.run()
    assert engine.state.metrics == {"norm": 2.0, "fraction": pytest.approx(1 / 3)}
    assert engine.state.metric_details["norm"].shape == (8, 1)
