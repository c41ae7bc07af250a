# SPDX-License-Identifier: Apache-2.0
"""Budgets with a meaning: presets by kind of image, and the images that they are not for."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file

from monai_salm.cli import main
from monai_salm.cli.codes import BAD_INPUT
from monai_salm.io.base import Case
from monai_salm.io.dicom import read
from monai_salm.perturbations.budget import Budget
from monai_salm.perturbations.presets import PRESETS
from monai_salm.stored import StoredCodec


def image_of(path, window="auto"):
    return read(Case("case-1", "dicom", (path,), ("a",), "group-1"), 2, window)


@pytest.fixture
def file_of(tmp_path):
    def write(name="CT_small.dcm", **attributes):
        dataset = dcmread(get_testdata_file(name, download=False))
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        dataset.save_as(tmp_path / "a.dcm")
        return tmp_path / "a.dcm"

    return write


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_budget_on_its_own_modality_only(name):
    preset = PRESETS[name]
    for modality in (*preset.modalities, ""):
        codec = StoredCodec("int16", (-160.0, 240.0), unit="HU", modality=modality)
        assert codec.levels(Budget.parse(name.upper())) == codec.levels(Budget.parse(preset.budget))
    codec = StoredCodec("int16", (-160.0, 240.0), modality="US")
    with pytest.raises(ValueError, match=rf"{name} \({preset.budget}\) is for .*{preset.modalities[0]}.* image is US"):
        codec.levels(Budget.parse(name))
    assert str(Budget.parse(name)) == str(Budget.parse(preset.budget)), "names do not change what a fit is known by"


def test_hounsfield_units_are_an_error_on_mr(file_of):
    assert image_of(file_of()).codec.levels(Budget.parse("5 HU")) == 5
    codec = image_of(file_of("MR_small.dcm")).codec
    with pytest.raises(ValueError, match="5 HU is for CT, and an image is MR"):
        codec.levels(Budget.parse("5 HU"))
    assert codec.levels(Budget.parse("5 physical")) == 5


def test_hounsfield_units_pass_where_the_file_does_not_tell_its_modality():
    assert StoredCodec("int16", (-100.0, 100.0), slope=2.0).levels(Budget.parse("5 HU")) == 2


def test_an_unknown_preset_lists_those_that_are_known():
    with pytest.raises(ValueError, match="ct-brain.*ct-body.*ct-lung.*mr.*cr-dx"):
        Budget.parse("ct-foot")


def test_a_preset_of_the_own_window_does_not_go_with_a_named_one(tmp_path, capsys):
    Budget.parse("mr").check_window("auto")
    Budget.parse("4/255").check_window((0, 100))
    Budget.parse("ct-body").check_window((0, 100))
    (tmp_path / "export").mkdir()
    arguments = ["protect", str(tmp_path / "export"), str(tmp_path / "out"), "--epsilon", "mr", "--window", "0", "9"]
    assert main(arguments) == BAD_INPUT
    assert "leave the window out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_radiograph_is_read_in_the_window_that_its_file_lists(file_of):
    options = {"WindowCenter": ["100", "60"], "WindowWidth": ["51", "21"], "Modality": "CR"}
    image = image_of(file_of("MR_small.dcm", **options, SOPClassUID="1.2.840.10008.5.1.4.1.1.1"))
    assert image.codec.window == (74.5, 124.5) == image.windows[0]
    assert image.windows == ((74.5, 124.5), (49.5, 69.5))


def test_mr_is_read_in_its_percentiles_whatever_the_scanner_lists(file_of):
    image = image_of(file_of("MR_small.dcm", WindowCenter="100", WindowWidth="51"))
    low, high = np.percentile(image.stored, [0.5, 99.5])
    assert image.codec.window == (low, high)
    assert image.windows == ((74.5, 124.5),)


def test_a_modality_that_is_free_text_is_not_repeated(file_of):
    assert image_of(file_of("MR_small.dcm", Modality="CANARY^NAME")).codec.modality == ""
