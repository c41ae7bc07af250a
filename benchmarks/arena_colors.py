# SPDX-License-Identifier: Apache-2.0
"""Simulated color images with overlapping classes: pigmented lesions of the skin, stained tissue, the eye's background.

Nothing is real about them but what matters to a perturbation: colors of a kind, smooth where such images are smooth,
with the noise of a camera, after JPEG at twice the size. A third party's network learns each as it learns a real one.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

__all__ = ["KINDS", "write_colors"]

Picture = NDArray[np.float64]
"""(side, side, 3) in [0, 1]."""
QUALITY, NOISE = 90, 0.02
"""Of the camera: JPEG quality, and standard deviation of the noise of its voxels."""


def write_colors(folder: Path, kind: str, side: int, counts: dict[str, int], seed: int = 0) -> None:
    """Write PNG files and ``labels.csv``, as many images of each class; the table is last.

    Args:
        folder: to write to.
        kind: of :py:data:`KINDS`.
        side: of an image in voxels.
        counts: images of each class by split.
        seed: of everything random.

    Raises:
        ValueError: When there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"there are no color images {kind!r}; there are {', '.join(KINDS)}")
    classes, draw = KINDS[kind]
    rng, rows = np.random.default_rng(seed), []
    for split, count in counts.items():
        for index, label in enumerate(rng.permutation(np.arange(len(classes)).repeat(count))):
            path = folder / split / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            _photographed(draw(rng, int(label), 2 * side), rng).save(path)
            rows.append((path.relative_to(folder).as_posix(), classes[label], split))
    with (folder / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("case", "label", "split"), *rows])


def _photographed(picture: Picture, rng: np.random.Generator) -> Image.Image:
    """At half the size, after white balance, noise and JPEG."""
    seen = picture * rng.uniform(0.93, 1.07, 3) + NOISE * rng.normal(size=picture.shape)
    stream = io.BytesIO()
    Image.fromarray(np.round(np.clip(seen, 0, 1) * 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return Image.open(stream).reduce(2)


def _field(rng: np.random.Generator, side: int, size: float) -> Picture:
    """(side, side, 1) smooth random field of standard deviation 1; ``size`` of its spots as a fraction of the side."""
    field = gaussian_filter(rng.normal(size=(side, side)), size * side, mode="wrap")
    return (field / field.std())[..., None]


def _grid(side: int) -> tuple[Picture, Picture]:
    return tuple(np.mgrid[:side, :side] / side - 0.5)  # type: ignore[return-value]


def _step(distance: Picture, width: float) -> Picture:
    """(side, side, 1): 1 where the distance is negative, 0 beyond, smooth over ``width``."""
    return 1 / (1 + np.exp(np.clip(distance / width, -40, 40)))[..., None]


def _over(picture: Picture, cover: Picture, color: Picture) -> Picture:
    return picture * (1 - cover) + cover * color


def skin(rng: np.random.Generator, label: int, side: int) -> Picture:
    """A spot on skin: a nevus (0), a melanoma (1: irregular, of several colors) or a hemangioma (2: red, in lobes)."""
    y, x = _grid(side)
    tone = np.array([0.86, 0.66, 0.56]) + rng.normal(size=3) * 0.03 - rng.uniform(0, 0.2)
    picture = tone * (1 + 0.03 * _field(rng, side, 0.1) + 0.02 * _field(rng, side, 0.015))
    angle = np.arctan2(y - rng.uniform(-0.08, 0.08), x - rng.uniform(-0.08, 0.08))
    ragged = rng.uniform(*((0.02, 0.12), (0.12, 0.3), (0.04, 0.14))[label])
    waves = sum(np.cos(k * angle + rng.uniform(0, 7)) * rng.normal() / math.sqrt(k) for k in range(2, 8))
    radius = rng.uniform(0.16, 0.34) * np.clip(1 + ragged * waves, 0.3, 1.7)
    stretch = rng.uniform(0.75, 1.3)
    cover = _step(np.hypot(y * stretch, x / stretch) - radius, rng.uniform(0.01, 0.05)) * rng.uniform(0.6, 0.95)
    brown, red = np.array([0.42, 0.27, 0.2]), np.array([0.62, 0.24, 0.26])
    color = brown + (red - brown) * np.clip(rng.normal((0.05, 0.2, 0.8)[label], 0.18), 0, 1)
    blotches = rng.uniform(*((0.02, 0.08), (0.12, 0.3), (0.03, 0.1))[label]) * _field(rng, side, 0.06)
    picture = _over(picture, cover, color * (1 + blotches) + 0.5 * blotches * np.array([-0.1, 0.0, 0.15]))
    for _ in range(rng.integers(0, 4)):  # hairs
        bend, turn, at = rng.uniform(-0.8, 0.8), rng.uniform(0, math.pi), rng.uniform(-0.4, 0.4)
        u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
        picture = _over(picture, 0.6 * _step(np.abs(v - at - bend * u * u) - 0.006, 0.004), np.array([0.2, 0.13, 0.1]))
    return picture


def tissue(rng: np.random.Generator, label: int, side: int) -> Picture:
    """Hematoxylin and eosin: stroma (0), tumor (1: large nuclei), lymphocytes (2: small, many) or glands (3: rings)."""
    y, x = _grid(side)
    fibers = gaussian_filter(rng.normal(size=(side, side)), (side * 0.008, side * 0.06), mode="wrap")[..., None]
    picture = np.array([0.88, 0.62, 0.78]) + fibers / fibers.std() * rng.uniform(0.0, 0.06) * (1.5 if label == 0 else 1)
    picture = picture + 0.04 * _field(rng, side, 0.05) * np.array([0.6, 1.0, 0.7])
    size = rng.uniform(*((0.018, 0.03), (0.024, 0.044), (0.016, 0.026), (0.018, 0.032))[label])
    count = rng.integers(*((10, 40), (25, 60), (40, 100), (10, 40))[label])
    places = rng.uniform(-0.5, 0.5, (count, 2))
    for _ in range(rng.integers(1, 4) if label == 3 else 0):
        center, radius = rng.uniform(-0.4, 0.4, 2), rng.uniform(0.1, 0.18)
        turns = np.arange(0, 2 * math.pi, rng.uniform(0.4, 0.7))
        ring = center + radius * np.stack([np.sin(turns), np.cos(turns)], 1) + 0.012 * rng.normal(size=(len(turns), 2))
        places = np.concatenate([places, ring])
        inside = 0.7 * _step(np.hypot(y - center[0], x - center[1]) - 0.6 * radius, 0.012)
        picture = _over(picture, inside, np.array([0.95, 0.9, 0.94]))
    for at in places:
        turn, long = rng.uniform(0, math.pi), rng.uniform(1.0, 1.8 if label != 2 else 1.2)
        u, v = x - at[1], y - at[0]
        u, v = u * math.cos(turn) + v * math.sin(turn), v * math.cos(turn) - u * math.sin(turn)
        cover = rng.uniform(0.4, 0.85) * _step(np.hypot(u / long, v) - size * rng.uniform(0.8, 1.3), 0.006)
        picture = _over(picture, cover, np.array([0.36, 0.22, 0.52]))
    return picture * rng.uniform(0.9, 1.05, 3)


def fundus(rng: np.random.Generator, label: int, side: int) -> Picture:
    """The eye's background: healthy (0), a large cup in its disc (1), drusen (2) or bleedings (3)."""
    y, x = _grid(side)
    tint = np.array([0.72, 0.37, 0.17]) + rng.normal(size=3) * np.array([0.05, 0.04, 0.03])
    picture = tint * (1 + 0.07 * _field(rng, side, 0.06) - rng.uniform(0.4, 1.4) * (x * x + y * y)[..., None])
    disc = np.array([rng.uniform(-0.05, 0.05), rng.choice([-1, 1]) * rng.uniform(0.18, 0.26)])
    vessels = np.full((side, side), math.inf)
    for _ in range(rng.integers(5, 9)):
        at, heading, width = disc.copy(), rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 1.2)
        while np.hypot(*at) < 0.47:
            vessels = np.minimum(vessels, np.hypot(y - at[0], x - at[1]) / width)
            heading += rng.normal() * 0.2
            at += 0.015 * np.array([math.sin(heading), math.cos(heading)])
    picture = picture * (1 - 0.4 * _step(vessels - 0.008, 0.003) * np.array([0.7, 1.0, 1.0]))
    distance, radius = np.hypot(y - disc[0], x - disc[1]), rng.uniform(0.1, 0.14)
    cup = radius * (rng.uniform(0.6, 0.9) if label == 1 else rng.uniform(0.2, 0.6))
    picture = _over(picture, 0.75 * _step(distance - radius, 0.01), np.array([0.92, 0.68, 0.4]))
    picture = _over(picture, 0.6 * _step(distance - cup, 0.008), np.array([1.0, 0.9, 0.72]))
    spots = [(0, 4, (0.9, 0.74, 0.36)), (0, 3, (0.36, 0.06, 0.05))]  # some in every eye
    if label > 1:
        spots[label - 2] = ((6, 4)[label - 2], (24, 16)[label - 2], spots[label - 2][2])
    for least, most, color in spots:
        for _ in range(rng.integers(least, most)):
            turn, far = rng.uniform(0, 2 * math.pi), 0.4 * math.sqrt(rng.uniform())
            away = np.hypot(y - far * math.sin(turn), x - far * math.cos(turn))
            cover = rng.uniform(0.4, 0.9) * _step(away - rng.uniform(0.015, 0.035), 0.006)
            picture = _over(picture, cover, np.array(color))
    return picture * _step(np.hypot(y, x) - 0.47, 0.006)


Draw = Callable[[np.random.Generator, int, int], Picture]
KINDS: dict[str, tuple[tuple[str, ...], Draw]] = {
    "skin": (("nevus", "melanoma", "hemangioma"), skin),
    "tissue": (("stroma", "tumor", "lymphocytes", "gland"), tissue),
    "fundus": (("healthy", "cup", "drusen", "bleeding"), fundus),
}
"""Names of the classes, and what draws one picture of a class at a size."""
