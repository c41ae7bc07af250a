# SPDX-License-Identifier: Apache-2.0
"""On a GPU: methods, fits, trainings and bundles do what they do on the CPU. Skipped where there is no CUDA device."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from bundle_runs import FLAT, VOXELS, exact_deltas, run
from exports import write_decathlon, write_npz
from fits import Kill, Killed, trainer, voxel_trainer
from ignite.engine import Events
from test_conformance import Setting, build, each_method, refuses
from test_defenses import MAKE, QUICK, TASK
from test_defenses import cases as images

from monai_salm.perturbations.budget import Lattice
from monai_salm.release.labels import load_cohort
from monai_salm.surrogates import small_resnet
from monai_salm.verification.defenses import DEFENSES
from monai_salm.verification.training import train_network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(autouse=True)
def _single_precision(monkeypatch):
    """Convolutions as exact as those of the CPU: not in TF32, PyTorch's default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(setting: Setting) -> Setting:
    setting.objective.to("cuda")
    setting.image, setting.label = setting.image.cuda(), setting.label.cuda()
    setting.lattice = Lattice(*(part.cuda() for part in vars(setting.lattice).values()))
    return setting


@pytest.mark.parametrize("kind", ["voxels", "classes"])
@pytest.mark.parametrize("dims", [2, 3])
@each_method
def test_a_method_gives_what_it_gives_on_the_cpu(method, dims, kind):
    voxelwise = kind == "voxels"
    if refuses(method, dims, voxelwise):
        pytest.skip("not for such labels")
    settings = [Setting(dims, voxelwise, view=False) for _ in range(2)]
    for setting in settings:
        setting.objective.eval()
    expected = settings[0].apply(build(method, voxelwise=voxelwise))
    found = on_gpu(settings[1]).apply(build(method, voxelwise=voxelwise))
    assert found.is_cuda and found.dtype == expected.dtype
    assert float((found.cpu() == expected).double().mean()) > 0.97  # a sign where a gradient is next to zero


@pytest.mark.parametrize("make", [trainer, voxel_trainer], ids=["classes", "voxels"])
def test_a_fit_goes_on_after_a_kill_and_keeps_its_bounds(tmp_path, make):
    with pytest.raises(Killed):
        make(tmp_path, device="cuda", max_epochs=2, train_handlers=[Kill(Events.EPOCH_COMPLETED, 1)]).run()
    fit = make(tmp_path, device="cuda", max_epochs=2)
    assert fit.state.epoch == 1
    fit.run()
    assert fit.bank.finished and next(fit.objective.network.parameters()).is_cuda
    deltas = [fit.bank[fact.sample_id] for fact in fit.cases.facts]
    assert all(not delta.is_cuda and 0 < delta.abs().max() <= 8 for delta in deltas)


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda defense: defense.name)
def test_every_defense_trains(defense):
    options = {**QUICK, "device": "cuda", "recipe": defense.recipe(clean=images(6, 2))}
    result = train_network(TASK, MAKE, images(8), images(6, 1), **options)
    assert all(value.isfinite().all() for value in result.network.state_dict().values())


def test_a_victim_learns_as_on_the_cpu():
    found = {}
    for device in ("cpu", "cuda"):
        options = {**QUICK, "epochs": 4, "batch_size": 16, "device": device}
        result = train_network(TASK, partial(small_resnet, 2, 1, 2), images(96), images(64, 1), **options)
        found[device] = result.row["auc"]
    assert found["cpu"] > 0.9 and found["cuda"] > 0.9


def test_the_bundles_run(tmp_path):
    """To the end; with so few cases no verdict is possible, so the exit code is 3."""
    for name, export, dims in (
        (FLAT, write_npz(tmp_path / "in.npz", (16, 16), (16, 6, 6)), 2),
        (VOXELS, write_decathlon(tmp_path / "volumes", 6, (16, 18, 17)), 3),
    ):
        out = tmp_path / name
        result = run(name, None, tmp_path, 3, dataset_dir=export, output_dir=out, device="cuda")
        assert "Verdict: " in result.stdout, result.stderr
        assert json.loads((out / "report.json").read_text())["machine"]["gpu"]
        exact_deltas(load_cohort(export, spatial_dims=dims), out, dims)
