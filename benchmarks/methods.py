# SPDX-License-Identifier: Apache-2.0
"""The methods that benchmarks compare, how each is fitted to a data set, and the victims."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from monai.data import CacheDataset
from monai.networks.nets import DenseNet
from monai.utils import set_determinism
from networks import SmallViT, small_densenet121
from setting import configured
from torch import Tensor, nn

import monai_salm
from monai_salm.records import image_digest
from monai_salm.surrogates import small_resnet
from monai_salm.transforms.meta import codec_of, meta_of, plain_array, stored_array
from monai_salm.verification.arms import Deltas
from monai_salm.verification.segmenters import Segmentation
from monai_salm.verification.training import Task
from monai_salm.verification.victims import Classification
from monai_salm.workflows import bundle_path

CNN = {
    "network_def::network": {
        "_target_": "monai_salm.surrogates.SmallCNN",
        "spatial_dims": "@spatial_dims",
        "in_channels": "@in_channels",
        "out_channels": "@num_classes",
    }
}
"""A convolutional network as surrogate: what methods are published with that minimize or maximize a network's loss."""
NO_SURROGATE = {"mask_ratio": 1.0, "rounds": 1, "surrogate_steps": 0, "transplant": False}
PLAIN_STEPS = {**CNN, "mask_ratio": 1.0, "psnr": None, "transplant": False, "perturbation::momentum": 0.0}
"""Signed steps in every voxel against such a network, which sees the images themselves."""
EM_AS_PUBLISHED = {
    **PLAIN_STEPS,
    "rounds": 15,
    "surrogate_steps": 20,
    "perturbation_steps": 20,
    "perturbation::step_size": 0.1,
}
"""Alternating min-min steps with the 20 plain sign steps of a tenth of the budget of arXiv 2101.04898; surrogate and
perturbation see the same random views as in all other fits."""


@dataclass(frozen=True)
class Method:
    """How perturbations come about: a trainer of the configuration, with other values; without them there are none."""

    overrides: Mapping[str, Any] | None = None


def _target(name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": f"monai_salm.perturbations.{name}", **options}


def _pattern(name: str, **options: Any) -> Method:
    """A method that asks no network and may touch every voxel."""
    return Method({**NO_SURROGATE, "perturbation": _target(name, **options)})


def _on_clean_images(name: str, steps: int, step_size: float, **overrides: Any) -> Method:
    """Plain steps against a surrogate that one round trained on the clean images."""
    fit = {"rounds": 1, "surrogate_steps": 600, "perturbation_steps": steps, "perturbation::step_size": step_size}
    return Method({**PLAIN_STEPS, **fit, "perturbation::_target_": f"monai_salm.perturbations.{name}", **overrides})


LINEAR = {
    "view": None,
    "network_def::network": {
        "_target_": "monai_salm.surrogates.LinearClassifier",
        "spatial_size": "@spatial_size",
        "in_channels": "@in_channels",
        "out_channels": "@num_classes",
    },
}
"""A linear surrogate that sees the images as they are."""
ROBUST = _target(
    "robust.RobustObjective",
    network="@network_def",
    loss="@loss",
    view="@view",
    steps=2,
    radius="$monai_salm.perturbations.budget.Budget.parse(@epsilon).epsilon / 2",
)
REM = {
    **EM_AS_PUBLISHED,
    "surrogate_steps": 80,
    "perturbation_steps": 10,
    "perturbation::step_size": 0.2,
    "train::trainer::objective": ROBUST,
}
"""Each of its passes costs three; adversarial training needs more steps of the surrogate."""
OTHER_CLASS = {"perturbation::num_classes": "@num_classes"}

METHODS: dict[str, Method] = {
    "clean": Method(),
    "blind": Method(),
    "random_noise": _pattern("salm.RandomSign", mask=_target("masks.SparsityMask", ratio="@mask_ratio")),
    "random_mask_0.4": Method({"mask_ratio": 0.4, "perturbation::mask::criterion": "random"}),
    "salm_1.0": Method({"mask_ratio": 1.0}),
    "salm_0.4": Method({"mask_ratio": 0.4}),
    "salm_0.2": Method({"mask_ratio": 0.2}),
    "salm_0.1": Method({"mask_ratio": 0.1}),
    "salm_0.4_ssim": Method({"mask_ratio": 0.4, "ssim": 0.95}),
    "salm_0.4_full": Method({"mask_ratio": 0.4, "psnr": None}),
    "em": Method(EM_AS_PUBLISHED),
    "em_masked_0.4": Method({**EM_AS_PUBLISHED, "mask_ratio": 0.4, "perturbation::mask::criterion": "gradient"}),
    "em_random_mask_0.4": Method({**EM_AS_PUBLISHED, "mask_ratio": 0.4, "perturbation::mask::criterion": "random"}),
    "em_classwise": Method({**EM_AS_PUBLISHED, "perturbation": _target("classwise.ClasswiseErrorMinimizing")}),
    "rem": Method(REM),
    "tap": _on_clean_images("targeted.TargetedAdversarial", 100, 0.05, **OTHER_CLASS),
    "error_maximizing": _on_clean_images("targeted.ErrorMaximizing", 100, 0.05),
    "pil": _on_clean_images("linear.PerturbationInducedLinearization", 30, 0.1, **OTHER_CLASS, **LINEAR),
    "lsp": _pattern("patterns.SeparablePatches", seed="@seed"),
    "ar": _pattern("patterns.AutoregressiveNoise", seed="@seed", count="@num_classes"),
    "classwise_noise": _pattern("patterns.ClasswiseNoise", seed="@seed"),
    "ops": Method({**NO_SURROGATE, "perturbation": _target("classwise.OnePixelShortcut"), "epsilon": "255/255"}),
    "ops_bounded": _pattern("classwise.OnePixelShortcut", ratio=0.05),
}
"""What each is: docs/rivals.md. ``clean`` and ``blind`` (uniform noise with the true labels) are no perturbations."""
FITTED = tuple(name for name, method in METHODS.items() if method.overrides is not None)
"""Names that :py:func:`fit` takes for images with one class each."""
UNBOUNDED = tuple(name for name in FITTED if "epsilon" in METHODS[name].overrides)
"""Of these, the names whose budget is their own, as published."""

ALTERNATING = {
    "transplant": False,
    "guard_weight": 0.0,
    "rounds": 8,
    "surrogate_steps": 40,
    "perturbation_steps": 10,
    "halo": 16,
    "network_def::network": {
        "_target_": "monai_salm.surrogates.PaddedNetwork",
        "multiple": 4,
        "network": {
            "_target_": "monai.networks.nets.UNet",
            "spatial_dims": "@spatial_dims",
            "in_channels": 1,
            "out_channels": "@num_classes",
            "channels": [8, 16, 32],
            "strides": [2, 2],
            "num_res_units": 1,
            "norm": "BATCH",
        },
    },
}
"""Setting of rivals for voxel labels: a U-Net is trained on the protected images, in turn with the perturbations."""


def _marker(name: str, **options: Any) -> dict[str, Any]:
    return {"perturbation": _target(f"markers.{name}", **options)}


VOXEL_METHODS: dict[str, Method] = {
    "random_noise": Method({**METHODS["random_noise"].overrides, "guard_weight": 0.0}),
    "label_marker": Method({**NO_SURROGATE, "guard_weight": 0.0, **_marker("LabelMarker", cell=2)}),
    "random_mask": Method({"mask_criterion": "random"}),
    "salm": Method({}),
    "em": Method({**ALTERNATING, "mask_ratio": 1.0, "perturbation::step_size": 0.1, "perturbation::momentum": 0.0}),
    "contour_interior": Method({**ALTERNATING, **_marker("ContourInterior", steps="@perturbation_steps")}),
    "slice_spectrum": Method({**ALTERNATING, **_marker("SliceSpectrum", steps="@perturbation_steps")}),
}
"""The same for voxel labels; ``salm`` is the shipped fit."""
VOLUMES_ONLY = ("slice_spectrum",)
"""Of these, the names that slices cannot be fitted by."""


def methods_of(voxelwise: bool) -> dict[str, Method]:
    """Methods that make perturbations, of images with one class each or with voxel labels."""
    return VOXEL_METHODS if voxelwise else {name: METHODS[name] for name in FITTED}


def bundle_of(spatial_size: Sequence[int], voxelwise: bool) -> tuple[str, dict[str, Any]]:
    """Name of the bundle, and what images of two or three axes need of its settings."""
    if voxelwise:
        return "salm_3d_segmentation", {"spatial_dims": len(spatial_size), "spatial_size": list(spatial_size)}
    return f"salm_{len(spatial_size)}d_classification", {}


@dataclass(frozen=True)
class Fitted:
    """Perturbations by ``sample_id``, what they cost, and those of other cases by the same surrogate."""

    deltas: Deltas
    seconds: float
    passes: dict[str, float]
    perturb: Callable[[CacheDataset], Deltas]


def fit(
    name: str,
    dataset: CacheDataset,
    classes: int,
    spatial_size: Sequence[int],
    seed: int,
    epsilon: str,
    work: Path,
    overrides: Mapping[str, Any] | None = None,
    voxelwise: bool = False,
) -> Fitted:
    """Perturbations of a data set; a finished fit of the same configuration is read from ``work``.

    Args:
        name: of :py:func:`methods_of`.
        dataset: items ``{"image": stored values from LoadStoredd, "label": class index, or mask from LoadMaskd}``.
        classes: number of classes.
        spatial_size: what the surrogate sees, two or three sizes; with voxel labels, of a patch.
        seed: of everything random in the fit.
        epsilon: budget of every method but those that are published without one, which have theirs in ``METHODS``.
        work: folder of the fits, one folder each.
        overrides: more values by config id, such as ``{"device": "cuda"}``; they win.
        voxelwise: each voxel has its own label.

    Raises:
        ValueError: When the method is none that makes perturbations.
    """
    known = methods_of(voxelwise)
    if name not in known:
        raise ValueError(f"{name!r} makes no perturbations; use one of {', '.join(known)}")
    bundle, given = bundle_of(spatial_size, voxelwise)
    values = {"device": "cpu", "spatial_size": list(spatial_size), "num_classes": classes, "seed": seed, **given}
    values |= {"epsilon": epsilon, "in_channels": len(dataset[0]["image"]), **known[name].overrides}
    values |= overrides or {}
    shipped = (bundle_path(bundle) / "configs/train.yaml").read_text()
    decisive = json.dumps([shipped, values, _digest(dataset), _code()], sort_keys=True)
    folder = work / hashlib.sha256(decisive.encode()).hexdigest()[:16]
    parser = configured(bundle, {**values, "output_dir": str(folder), "train::dataset": dataset})
    set_determinism(seed=seed)
    trainer = parser.get_parsed_content("train::trainer")
    trainer.run()
    return Fitted(trainer.bank, trainer.seconds, trainer.passes_per_image, trainer.perturb)


@lru_cache
def _code() -> str:
    """Digest of the code that fits are made by: whoever changes a method gets new fits."""
    package, digest = Path(monai_salm.__file__).parent, hashlib.sha256()
    parts = [*package.glob("perturbations/*.py"), *package.glob("engines/*.py")]
    for path in sorted([*parts, *(package / f"{name}.py" for name in ("surrogates", "convolution", "stored"))]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _digest(dataset: CacheDataset) -> str:
    """Digest of the cases: their ids, images and labels."""
    digest = hashlib.sha256()
    for item in dataset:
        image = item["image"]
        content = image_digest(stored_array(image, codec_of(image, None)))
        label = item["label"]
        told = image_digest(plain_array(label)) if isinstance(label, Tensor) else int(label)
        digest.update(repr((meta_of(image, "sample_id"), told, content)).encode())
    return digest.hexdigest()


def trained(
    classes: Sequence[str], spatial_size: tuple[int, ...], voxelwise: bool = False
) -> tuple[Task, dict[str, Any]]:
    """What victims learn and how they are trained: as in the shipped study, from images of another size.

    Args:
        classes: their names.
        spatial_size: of the images, two or three sizes; with voxel labels, of a patch.
        voxelwise: each voxel has its own label.

    Returns:
        The task, and its arguments of :py:func:`monai_salm.verification.training.train_network`.
    """
    bundle, given = bundle_of(spatial_size, voxelwise)
    shipped = configured(bundle, {**given, "num_classes": len(classes)})
    names = ("epochs", "batch_size", "learning_rate", "weight_decay")
    recipe = {name: shipped.get_parsed_content(f"study::{name}") for name in names}
    if voxelwise:
        return Segmentation(tuple(classes), spatial_size, shipped.get_parsed_content("study::transforms")), recipe
    return Classification(tuple(classes), shipped.get_parsed_content("study::augment"), spatial_size), recipe


def victims(
    classes: int, spatial_size: Sequence[int], channels: int = 1, voxelwise: bool = False
) -> dict[str, Callable[[], nn.Module]]:
    """Networks that learn from scratch: those of the shipped study, and for images with one class each a small DenseNet
    and what the field compares with: ResNet-18, DenseNet-121 and a small vision transformer.

    Args:
        classes: number of classes.
        spatial_size: of the images, two or three sizes; with voxel labels, of a patch.
        channels: of the images, 3 of color.
        voxelwise: each voxel has its own label.
    """
    bundle, own = bundle_of(spatial_size, voxelwise)
    parser = configured(bundle, {**own, "num_classes": classes, "in_channels": channels})
    shipped = {name: parser.get_parsed_content(f"study::victims::{name}") for name in parser["study::victims"]}
    if voxelwise:
        return shipped
    given = {"spatial_dims": len(spatial_size), "in_channels": channels, "out_channels": classes}
    return {
        **shipped,
        "densenet": partial(DenseNet, **given, init_features=16, growth_rate=8, block_config=(2, 2, 2)),
        "resnet18": partial(small_resnet, **given, width=64, blocks=(2, 2, 2, 2)),
        "densenet121": partial(small_densenet121, **given),
        "vit": partial(SmallViT, **given, spatial_size=tuple(spatial_size)),
    }
