# SPDX-License-Identifier: Apache-2.0
"""The HTML report is complete, self-contained and safe; the terminal table shows what the report shows."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_results import BUDGET, FIDELITY

from monai_salm.verification import figures
from monai_salm.verification.report import Example, verdict_table, write_report
from monai_salm.verification.results import build_results

METRIC = "balanced_accuracy"
HOSTILE = "<script>alert('x')</script>"
LEVELS = {"clean": 0.9, "protected": 0.52, "random_noise": 0.89, "random_mask": 0.6, "blind": 0.5}


def make_rows(
    arms: dict[str, float] | None = None, victims: tuple[str, ...] = ("cnn", "resnet")
) -> list[dict[str, Any]]:
    def curve(level: float) -> list[dict[str, Any]]:
        return [{"epoch": e, "train_loss": 1 / e, "train_accuracy": 1 - 0.5 / e, METRIC: level} for e in (1, 2, 3)]

    return [
        {"arm": a, "victim": v, "seed": s, METRIC: x, "auc": x, "recall": {"a": x, HOSTILE: x}, "curve": curve(x)}
        for a, x in (LEVELS if arms is None else arms).items()
        for v in victims
        for s in range(3)
    ]


def make_results(**changes: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "task": "Level of a slice",
        "metric": METRIC,
        "rows": make_rows(),
        "classes": ["a", HOSTILE],
        "chance": 0.5,
        "fidelity": FIDELITY
        | {"ssim": {"mean": 0.9712, "std": 0.01, "min": 0.96}, "psnr": {"mean": 38.25, "std": 0.5}},
        "budget": BUDGET,
        "utility": [{"victim": "cnn", "seed": 0, "clean": 0.9, "protected": 0.95, "difference": 0.05}],
        "passes_per_image": {"surrogate_training": 10, "perturbation": 20, "total": 30},
        "timing": {"fit": 75.0},
        "cohort": {
            "cases": 9,
            "released": 4,
            "held_out": 4,
            "refused": [{"case": "c9", "reason": "mixed series & more"}],
        },
        "config": {"rounds": 12, "note": "</pre><script>1</script>"},
        "versions": {"torch": "2.13.0"},
        "not_tested": ["JPEG compression"],
    }
    return build_results(**{**parts, **changes})


def make_segmentation(**changes: Any) -> dict[str, Any]:
    """Two classes, the second with a hostile name and not protected."""

    def row(arm: str, victim: str, seed: int, level: float) -> dict[str, Any]:
        parts = {"a": level, HOSTILE: 0.8}
        curve = [{"epoch": e, "train_loss": 1 / e, "dice": level} for e in (1, 2)]
        hd95 = {"hd95": 7.125, "hd95_per_class": {"a": 5.0, HOSTILE: 9.25}, "hd95_unit": "mm"}
        row = {"arm": arm, "victim": victim, "seed": seed, "dice": (level + 0.8) / 2, "dice_per_class": parts}
        return {**row, **hd95, "curve": curve}

    levels = {**LEVELS, "label_marker": 0.3}
    each = {"mean": 0.4321, "std": 0.01}
    leak = {"n_cases": 40, "best": each, "support": each, "everything": each, "by_estimator": {"blur_2": each}}
    leak = {"protected": {**leak, "best": {"mean": 0.9876, "std": 0.01}}, "random_noise": leak}
    parts = {"a": {"clean": 0.9, "protected": 0.898, "difference": -0.0021}}
    utility = [{"victim": "cnn", "seed": 0, "clean": 0.9, "protected": 0.9, "difference": 0.0, "per_class": parts}]
    given = {
        "metric": "dice",
        "chance": None,
        "classes": ["background", "a", HOSTILE],
        "rows": [row(a, v, s, x) for a, x in levels.items() for v in ("cnn", "unet") for s in range(3)],
        "leakage": leak,
        "utility": utility,
    }
    return make_results(**{**given, **changes})


def make_example(size: tuple[int, int] = (24, 32), title: str = "case-1", limit: float = 8) -> Example:
    rng = np.random.default_rng(0)
    clean, mask = rng.random(size), rng.random(size) < 0.2
    delta = np.where(mask, rng.integers(-8, 9, size), 0)
    return Example(title, clean, np.clip(clean + delta / 255, 0, 1), delta, mask, limit)


def render(tmp_path: Path, results: dict[str, Any] | None = None, examples: tuple[Example, ...] = ()) -> str:
    path = tmp_path / "out" / "report.html"
    write_report(make_results() if results is None else results, examples, path)
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags, their attributes, and whether every tag that was opened was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def images_of(text: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(t))) for t in re.findall(r"data:image/png;base64,([^\"]+)", text)]


def test_report_is_self_contained(tmp_path: Path) -> None:
    text = render(tmp_path, examples=(make_example(),))
    page = Page(text)
    assert not page.open
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text


def test_every_image_has_alternative_text_and_anchors_lead_somewhere(tmp_path: Path) -> None:
    page = Page(render(tmp_path, examples=(make_example(),)))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4 + 1 + 1
    assert all(attributes["alt"] for attributes in images)
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {a["href"] for t, a in page.tags if t == "a"} <= {f"#{name}" for name in ids}


def test_report_shows_what_was_measured(tmp_path: Path) -> None:
    page = render(tmp_path)
    words = ("Protected", "Closed gap", "0.971", "38.2 dB", "8 HU", "+0.050", "1 min 15 s")
    missing = {each for each in (*words, "mixed series &amp; more", "JPEG compression") if each not in page}
    assert not missing


def test_report_of_a_segmentation_shows_what_was_measured_per_class(tmp_path: Path) -> None:
    page = render(tmp_path, make_segmentation())
    words = ("Dice per class", "HD95 per class", "HD95 (mm)", "7.125", "9.250", "Closed gap per class", "training loss")
    words += ("Label leakage", "Label marker", "0.988 \u00b1 0.010", "Blur \u03c3 2", "gives away where they lie")
    missing = {each for each in (*words, "\u22120.002") if each not in page}
    assert not missing
    assert not Page(page).open and "<script" not in page
    assert "Recall" not in page and "Balanced accuracy" not in page


def test_per_class_tables_have_every_victim(tmp_path: Path) -> None:
    text = render(tmp_path, make_segmentation())
    table = text.split("Dice per class")[1].split("</table>")[0]
    assert table.count("<td>cnn</td>") == table.count("<td>unet</td>") == table.count("<td>all</td>") == 2
    assert table.count('<th class="n"') == len(LEVELS) + 1
    gaps = text.split("Closed gap per class")[1].split("</table>")[0]
    assert gaps.count("<td>all</td>") == 2 * (len(LEVELS) - 1)  # of every arm but clean and blind


def test_label_borders_are_drawn_on_the_clean_panel_only(tmp_path: Path) -> None:
    label = np.zeros((24, 32), np.uint8)
    label[4:10, 4:10], label[14:20, 20:30] = 1, 2
    plain, outlined = make_example(), replace(make_example(), label=label)
    before, after = (images_of(render(tmp_path, examples=(each,))) for each in (plain, outlined))
    assert all(np.array_equal(*map(np.asarray, pair)) for pair in list(zip(before, after, strict=True))[1:])
    gray, colors = np.asarray(before[0]), np.asarray(after[0])
    changed = (colors != gray[..., None]).any(-1)
    inner = np.zeros_like(changed)
    inner[5:9, 5:9], inner[15:19, 21:29] = True, True
    assert np.array_equal(changed, (label > 0) & ~inner)
    assert not np.array_equal(colors[4, 4], colors[14, 20])
    with pytest.raises(ValueError, match="one shape"):
        replace(plain, label=label[:5])


def test_an_image_without_any_label_is_shown_as_it_is() -> None:
    image = np.linspace(0, 1, 48).reshape(6, 8)
    plain, labeled = (figures.image_panel(image, 64, label) for label in (None, np.zeros((6, 8), np.uint8)))
    gray, colors = (np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))) for uri in (plain, labeled))
    assert np.array_equal(np.repeat(gray[..., None], 3, axis=2), colors)


def test_outline_survives_the_reduction_of_a_large_image() -> None:
    label = np.zeros((600, 600), np.uint8)
    label[100:500, 100:500] = 1
    uri = figures.image_panel(np.full((600, 600), 0.5), 128, label)
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    assert image.shape == (128, 128, 3)
    assert (image[64] != 128).any(-1).sum() == 2


def test_terminal_shows_classes_where_they_fit() -> None:
    stream = io.StringIO()
    Console(file=stream, width=160).print(verdict_table(make_segmentation()))
    assert "[red]" not in stream.getvalue() and "0.520" in stream.getvalue() and "Label marker" in stream.getvalue()
    many = {f"class {index}": 0.5 for index in range(7)}
    rows = [{"arm": "clean", "victim": "cnn", "seed": 0, "dice": 0.5, "dice_per_class": many}]
    stream = io.StringIO()
    Console(file=stream, width=160).print(verdict_table(make_segmentation(rows=rows, leakage=None)))
    assert "class 0" not in stream.getvalue()


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    rows = make_rows(victims=(HOSTILE, "cnn $x$"))
    text = render(tmp_path, make_results(rows=rows, task=HOSTILE), (make_example(title=f'"><img onerror=1>{HOSTILE}'),))
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not any("onerror" in attributes for _, attributes in Page(text).tags)


def test_verdict_banner_names_the_reason(tmp_path: Path) -> None:
    results = make_results(rows=make_rows({**LEVELS, "clean": 0.55}))
    text = render(tmp_path, results)
    assert results["verdict"] == "inconclusive"
    assert "The clean arm did not learn" in text and 'class="banner unsure"' in text


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": []},
        {"rows": make_rows({"clean": 0.9})},
        {"rows": make_rows({"protected": 0.5})},
        {"rows": make_rows({**LEVELS, "later_arm": 0.7}, victims=("a", "b", "c", "d", "e"))},
        {"rows": [{"arm": "clean", "victim": "cnn", "seed": 0, METRIC: None, "curve": [{"epoch": 1, METRIC: None}]}]},
        {
            "fidelity": None,
            "budget": None,
            "chance": None,
            "utility": [],
            "cohort": None,
            "timing": None,
            "config": None,
        },
    ],
)
def test_report_survives_missing_pieces(tmp_path: Path, changes: dict[str, Any]) -> None:
    results = make_results(**changes)
    assert not Page(render(tmp_path, results)).open
    Console(file=io.StringIO()).print(verdict_table(results))


@pytest.mark.parametrize(
    ("make", "key"),
    [(make, key) for make in (make_results, make_segmentation) for key in sorted(set(make()) - {"verdict"})],
)
def test_report_survives_any_missing_key(tmp_path: Path, make: Callable[[], dict[str, Any]], key: str) -> None:
    results = {name: part for name, part in make().items() if name != key}
    for row in results.get("arms", ()):
        row["curve"] = []  # plots take most of the time
    assert not Page(render(tmp_path, results)).open
    Console(file=io.StringIO()).print(verdict_table(results))


def test_report_without_verdict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="verdict"):
        write_report({}, [], tmp_path / "report.html")


def test_panels_show_the_arrays_exactly(tmp_path: Path) -> None:
    example = make_example()
    clean, _, delta, mask = images_of(render(tmp_path, examples=(example,)))
    assert np.array_equal(np.asarray(clean), np.round(255 * example.clean).astype(np.uint8))
    assert np.array_equal(np.asarray(mask) < 128, example.mask)
    colors = np.asarray(delta.convert("RGB")).astype(int)
    assert (colors[example.delta == 0] == 255).all()
    red, blue = colors[..., 0], colors[..., 2]
    assert (red > blue)[example.delta > 0].all() and (red < blue)[example.delta < 0].all()


def test_color_bar_states_its_scale(tmp_path: Path) -> None:
    text = render(tmp_path, examples=(make_example(limit=12),))
    assert "+12" in text and "\u221212" in text and "stored units" in text


def test_many_large_examples_stay_below_the_limit(tmp_path: Path) -> None:
    examples = tuple(make_example((600, 500), f"case-{i}") for i in range(3))
    path = tmp_path / "report.html"
    write_report(make_results(), examples, path)
    assert path.stat().st_size < 3_000_000
    assert "Shown reduced" in path.read_text(encoding="utf-8")


def test_zero_scale_and_nan_do_not_break_panels(tmp_path: Path) -> None:
    nothing = np.zeros((5, 7))
    example = Example("flat", nothing + np.nan, nothing, nothing, nothing.astype(bool), 0)
    assert len(images_of(render(tmp_path, examples=(example,)))) == 4


def test_example_needs_one_shape() -> None:
    with pytest.raises(ValueError, match="one shape"):
        Example("x", np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 3)), np.zeros((2, 2), bool), 1)


def test_report_is_deterministic(tmp_path: Path) -> None:
    results = make_results()
    assert render(tmp_path, results) == render(tmp_path, results)


def test_verdict_table_shows_every_arm() -> None:
    stream = io.StringIO()
    Console(file=stream, width=120).print(verdict_table(make_results(rows=make_rows(victims=("[red]x", "y")))))
    text = stream.getvalue()
    for words in ("Verdict: protected", "Clean", "Protected", "Random noise", "Blind", "0.950", "0.9712"):
        assert words in text
