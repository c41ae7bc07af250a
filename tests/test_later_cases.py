# SPDX-License-Identifier: Apache-2.0
"""Further cases under the surrogate, key and classes of an earlier release."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import (
    class_map,
    write_decathlon,
    write_label,
    write_labels,
    write_nifti,
    write_segmentation,
    write_series,
)
from fits import cases, trainer

from monai_salm.bank import PerturbationBank
from monai_salm.cli import main
from monai_salm.cli.codes import BAD_INPUT, DONE, NOT_PROTECTED
from monai_salm.io.masks import read_mask
from monai_salm.release.catalog import scan
from monai_salm.release.custody import read_refusals
from monai_salm.release.earlier import CLASSES
from monai_salm.release.labels import label_cases, load_cohort
from monai_salm.release.manifest import read_manifest
from monai_salm.release.table import LabelRow

SETTINGS = ["surrogate_steps=6", "perturbation_steps=2", "spatial_size=[16,16]", "batch_size=4"]
BUNDLE = str(Path(__file__).resolve().parents[1] / "bundles" / "salm_2d_classification")


def tree(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


class TestTrainer:
    def test_the_surrogate_stays_as_it_was_and_further_cases_get_what_it_gives_them(self, tmp_path):
        first = trainer(tmp_path / "1", cases(8), model_file=tmp_path / "1/model.pt")
        first.run()
        further = cases(12)[8:]
        expected = first.perturb(further)
        later = trainer(tmp_path / "2", further, surrogate_file=tmp_path / "1/model.pt", model_file=tmp_path / "2/m.pt")
        later.run()
        assert later.bank.finished and set(later.bank) == set(expected)
        assert all(later.bank[name].abs().sum() > 0 for name in expected)
        before, after = (torch.load(path) for path in (tmp_path / "1/model.pt", tmp_path / "2/m.pt"))
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert later.passes_per_image["surrogate_training"] == 0
        again = trainer(tmp_path / "3", further, surrogate_file=tmp_path / "2/m.pt")
        again.run()
        assert all(torch.equal(later.bank[name], again.bank[name]) for name in expected)

    def test_it_lowers_the_loss_of_cases_that_it_never_saw(self, tmp_path):
        first = trainer(tmp_path / "1", cases(8), surrogate_steps=40, model_file=tmp_path / "1/model.pt")
        first.run()
        later = trainer(tmp_path / "2", cases(16)[8:], surrogate_file=tmp_path / "1/model.pt", steps=4)
        later.run()
        assert later.scores[-1] < later.scores[0]

    def test_another_surrogate_is_another_fit(self, tmp_path):
        for name, seed in (("1", 1), ("2", 2)):
            trainer(tmp_path / name, cases(8), rounds=1, seed=seed, model_file=tmp_path / name / "model.pt").run()
        trainer(tmp_path / "3", cases(2), surrogate_file=tmp_path / "1/model.pt").run()
        with pytest.raises(ValueError, match="the configuration, the images or monai_salm changed"):
            trainer(tmp_path / "3", cases(2), surrogate_file=tmp_path / "2/model.pt")

    def test_weights_of_another_network_and_none_are_told(self, tmp_path):
        with pytest.raises(ValueError, match="no weights"):
            trainer(tmp_path, surrogate_file=tmp_path / "model.pt")
        torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "model.pt")
        with pytest.raises(ValueError, match="not of this network"):
            trainer(tmp_path, surrogate_file=tmp_path / "model.pt")


class TestClasses:
    @pytest.fixture
    def catalog(self, tmp_path):
        for name in ("s0", "s1"):
            write_series(tmp_path / name, name, 2)
        return scan(tmp_path, 3)

    def test_positions_are_those_of_the_earlier_release_also_where_a_class_is_missing(self, catalog):
        rows = [LabelRow(2, "s0", "c", None), LabelRow(3, "s1", "b", None)]
        assert [case.label for case in label_cases(catalog, rows).cases] == [1, 0]
        cohort = label_cases(catalog, rows, classes=("a", "b", "c"))
        assert [case.label for case in cohort.cases] == [2, 1]
        assert cohort.classes == ("a", "b", "c")
        one = [LabelRow(2, "s0", "c", None), LabelRow(3, "s1", "c", None)]
        assert [case.label for case in label_cases(catalog, one, classes=("a", "b", "c")).cases] == [2, 2]

    def test_a_class_that_the_earlier_release_has_not_is_an_error(self, catalog):
        rows = [LabelRow(2, "s0", "a", None), LabelRow(3, "s1", "z", None)]
        with pytest.raises(ValueError, match=r"classes that the earlier release does not have \(z\); name"):
            label_cases(catalog, rows, classes=("a", "b"))


class TestVoxelClasses:
    """Classes of voxels are those of the earlier release, by name."""

    def like(self, folder: Path, *classes: str) -> Path:
        """What an earlier release of other cases has to have."""
        for name in ("private", "models"):
            (folder / name).mkdir(parents=True)
        (folder / CLASSES).write_text(json.dumps(classes))
        (folder / "models" / "model.pt").touch()
        return folder

    def decathlon(self, root: Path, **labels: int) -> Path:
        write_decathlon(root, 2)
        content = json.loads((root / "dataset.json").read_text())
        (root / "dataset.json").write_text(json.dumps(content | {"labels": labels}))
        return root

    def test_order_and_numbers_may_differ_and_a_class_may_be_missing(self, tmp_path):
        like = self.like(tmp_path / "like", "background", "Nerve", "Rim", "3", "Core")
        export = self.decathlon(tmp_path / "in", nothing=0, Core=1, Rim=2)
        cohort = load_cohort(export, spatial_dims=3, like=like)
        assert cohort.classes == ("background", "Nerve", "Rim", "3", "Core") and not cohort.refusals
        assert cohort.cases[0].mask.values == (0, -1, 2, -1, 1), "value 3 has no name in this export"
        np.testing.assert_array_equal(read_mask(cohort.cases[0], 3)[0], np.array([0, 4, 2])[class_map()])

    def test_later_cases_may_all_lack_foreground(self, tmp_path):
        export = self.decathlon(tmp_path / "in", background=0, Core=1, Rim=2)
        for path in (export / "labelsTr").iterdir():
            write_label(path, class_map() * 0)
        cohort = load_cohort(export, spatial_dims=3, like=self.like(tmp_path / "like", "background", "Core", "Rim"))
        assert len(cohort.released) == 2 and not cohort.refusals
        with pytest.raises(ValueError, match="no released case has a voxel of any class"):
            load_cohort(export, spatial_dims=3)

    def test_values_without_names_are_those_of_the_earlier_release(self, tmp_path):
        for index in range(2):
            write_nifti(tmp_path / "in" / f"v{index}.nii", index)
            write_label(tmp_path / "in" / f"m{index}.nii", class_map(seed=index, classes=2) * 3)
        write_labels(tmp_path / "in", [f"v{index}.nii,m{index}.nii" for index in range(2)], "mask")
        cohort = load_cohort(tmp_path / "in", spatial_dims=3, like=self.like(tmp_path / "like", "background", "1", "3"))
        assert cohort.classes == ("background", "1", "3") and read_mask(cohort.cases[0], 3).max() == 2
        with pytest.raises(ValueError, match="classes that the earlier release does not have"):
            load_cohort(tmp_path / "in", spatial_dims=3, like=self.like(tmp_path / "other", "background", "1", "2"))

    def test_segments_are_found_by_label(self, tmp_path):
        paths = write_series(tmp_path / "in" / "s", "s")
        write_segmentation(tmp_path / "in" / "seg", paths, np.ones((4, 16, 16, 1), np.uint8), labels=("Tumor",))
        like = self.like(tmp_path / "like", "background", "Liver", "Tumor")
        (case,) = load_cohort(tmp_path / "in", spatial_dims=3, like=like).cases
        assert case.mask.values == (0, -1, 1) and (read_mask(case, 3) == 2).all()

    def test_a_name_that_the_earlier_release_lacks_is_an_error(self, tmp_path):
        export = self.decathlon(tmp_path / "in", background=0, Core=1, Rim=2)
        with pytest.raises(ValueError, match=r"classes that the earlier release does not have \(Rim\); name"):
            load_cohort(export, spatial_dims=3, like=self.like(tmp_path / "like", "background", "Core", "Nerve"))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> tuple[Path, Path]:
    """An export of eight slices of two patients, and its release."""
    root = tmp_path_factory.mktemp("earlier")
    export = root / "in"
    for patient in range(2):
        write_series(export / f"s{patient}", f"s{patient}", 4, patient=f"P{patient}")
    write_labels(export, [f"s{patient},{'ab'[patient]}" for patient in range(2)])
    assert (
        protect(export, root / "out", "--bundle", BUNDLE, "--no-verify", "--epsilon", "ct-lung", settings=SETTINGS)
        == DONE
    )
    return export, root / "out"


def protect(export: Path, out: Path, *words: str, settings: list[str] | None = None) -> int:
    sets = [word for setting in settings or () for word in ("--set", setting)]
    return main(["protect", str(export), str(out), *words, *sets])


@pytest.mark.filterwarnings("ignore:parsing config_file")
class TestCommand:
    @pytest.fixture
    def export(self, tmp_path):
        """Further slices, all of one class."""
        write_series(tmp_path / "new/s7", "s7", 3, patient="P7")
        write_labels(tmp_path / "new", ["s7,b"])
        return tmp_path / "new"

    def test_further_cases_are_protected_without_touching_the_earlier_release(self, earlier, export, tmp_path):
        before = tree(earlier[1])
        assert protect(export, tmp_path / "out", "--like", str(earlier[1])) == DONE
        assert tree(earlier[1]) == before
        rows = [row for row in read_manifest(tmp_path / "out") if row.levels]
        assert len(rows) == 3 and all(row.levels == 8 and row.changed for row in rows), "the budget is ct-lung's"
        model, old = (torch.load(out / "models/model.pt") for out in (tmp_path / "out", earlier[1]))
        assert all(torch.equal(old[name], model[name]) for name in old)
        assert json.loads((tmp_path / "out" / CLASSES).read_text()) == ["a", "b"]
        assert not (tmp_path / "out/private/release.key").exists(), "the key is the earlier one"

    def test_further_cases_may_be_renamed_where_the_earlier_ones_were_not(self, earlier, export, tmp_path):
        assert protect(export, tmp_path / "out", "--like", str(earlier[1]), "--rename") == DONE

    def test_a_rerun_is_the_same_and_later_ones_may_follow_the_later(self, earlier, export, tmp_path):
        assert protect(export, tmp_path / "out", "--like", str(earlier[1])) == DONE
        before = tree(tmp_path / "out/protected")
        assert protect(export, tmp_path / "out", "--like", str(earlier[1])) == DONE
        assert tree(tmp_path / "out/protected") == before
        write_series(tmp_path / "third/s8", "s8", 2, patient="P8")
        write_labels(tmp_path / "third", ["s8,a"])
        assert protect(tmp_path / "third", tmp_path / "out3", "--like", str(tmp_path / "out")) == DONE

    def test_test_cases_alone_leave_nothing_to_protect(self, earlier, export, tmp_path, capsys):
        write_series(tmp_path / "third/s8", "s8", 2, patient="P8")
        shutil.copytree(earlier[0] / "s0", tmp_path / "third/s0")
        write_labels(tmp_path / "third", ["s8,b,test", "s0,a,train"])
        assert protect(tmp_path / "third", tmp_path / "out3", "--like", str(earlier[1])) == BAD_INPUT
        assert "no case is left: 2 are of split test" in capsys.readouterr().err

    def test_a_case_of_any_earlier_release_is_refused(self, earlier, export, tmp_path, capsys):
        second = tmp_path / "second"
        assert protect(export, second, "--like", str(earlier[1])) == DONE
        write_series(tmp_path / "third/s8", "s8", 2, patient="P8")
        shutil.copytree(earlier[0] / "s0", tmp_path / "third/s0")
        write_labels(tmp_path / "third", ["s8,b", "s0,a"])
        assert protect(tmp_path / "third", tmp_path / "out3", "--like", str(second)) == NOT_PROTECTED
        assert [each.reason for each in read_refusals(tmp_path / "out3")] == ["already_released"] * 4
        (second / "private/like.json").write_text('{"like": "/nowhere"}')
        assert protect(tmp_path / "third", tmp_path / "out4", "--like", str(second)) == BAD_INPUT
        assert "follows a release that is not at" in capsys.readouterr().err

    def test_without_the_key_of_the_earlier_release_nothing_is_written(self, earlier, export, tmp_path, capsys):
        copy = tmp_path / "copy"
        shutil.copytree(earlier[1], copy)
        (copy / "private/release.key").unlink()
        assert protect(export, tmp_path / "out", "--like", str(copy)) == BAD_INPUT
        assert "the key of the earlier release is not at" in capsys.readouterr().err
        assert not (copy / "private/release.key").exists() and not (tmp_path / "out/protected").exists()

    def test_a_case_of_the_earlier_release_is_refused(self, earlier, export, tmp_path):
        shutil.copytree(earlier[0] / "s0", export / "s0")
        write_labels(export, ["s7,b", "s0,a"])
        assert protect(export, tmp_path / "out", "--like", str(earlier[1])) == NOT_PROTECTED
        assert [each.reason for each in read_refusals(tmp_path / "out")] == ["already_released"] * 4
        assert len(PerturbationBank(tmp_path / "out/private/bank.sqlite")) == 3

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["--epsilon", "2 HU"], "epsilon is that of the earlier release"),
            (["--mask-ratio", "0.1"], "mask_ratio is that of the earlier release"),
            (["--set", "rounds=3"], "rounds is that of the earlier release"),
        ],
    )
    def test_what_was_fitted_cannot_be_changed(self, earlier, export, tmp_path, capsys, words, reason):
        assert protect(export, tmp_path / "out", "--like", str(earlier[1]), *words) == BAD_INPUT
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "out/protected").exists()

    def test_a_patient_who_is_tested_in_one_release_and_released_in_another_is_warned_of(
        self, earlier, export, tmp_path, caplog
    ):
        write_series(export / "s9", "s9", 1, patient="P9")
        write_labels(export, ["s7,b,train", "s9,a,test"])
        assert protect(export, tmp_path / "out", "--like", str(earlier[1])) == DONE
        third = tmp_path / "third"
        for name, patient in (("s10", "P9"), ("s11", "P1"), ("s12", "P12")):
            write_series(third / name, name, 1, patient=patient)
        write_labels(third, ["s10,a,train", "s11,b,test", "s12,b,train"])
        caplog.clear()
        load_cohort(third, like=tmp_path / "out")
        assert "2 patients have cases both in split test and released" in caplog.text

    def test_other_classes_are_an_error(self, earlier, export, tmp_path, capsys):
        write_labels(export, ["s7,z"])
        assert protect(export, tmp_path / "out", "--like", str(earlier[1])) == BAD_INPUT
        assert "classes that the earlier release does not have" in capsys.readouterr().err

    def test_a_release_that_is_not_finished_or_lacks_its_private_side_is_told(self, earlier, export, tmp_path, capsys):
        copy = tmp_path / "copy"
        shutil.copytree(earlier[1], copy)
        (copy / "models/model.pt").unlink()
        assert protect(export, tmp_path / "out", "--like", str(copy)) == BAD_INPUT
        assert "finished release" in capsys.readouterr().err
        shutil.rmtree(copy / "private")
        assert protect(export, tmp_path / "out", "--like", str(copy)) == BAD_INPUT
