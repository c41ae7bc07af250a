# SPDX-License-Identifier: Apache-2.0
"""Label tables, splits and what is held out."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import pytest
from exports import write_labels, write_nifti, write_npz, write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian

from monai_salm.io import formats
from monai_salm.io.base import Case
from monai_salm.release.catalog import Catalog
from monai_salm.release.gates import Refusal
from monai_salm.release.labels import Cohort, LabelRow, count_classes, label_cases, load_cohort, read_labels


def table(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def catalog(count: int, per_patient: int = 1) -> Catalog:
    """Cases c0, c1, ...; patients of ``per_patient`` cases each."""
    cases = [Case(f"case-{i}", "nifti", (Path(f"/c{i}"),), (f"c{i}",), f"p{i // per_patient}") for i in range(count)]
    refused = Refusal("case-bad", "broken_file", "broken")
    return Catalog(Path("/export"), tuple(cases), (refused,), {"case-bad": ("bad.nii", "folder/bad")})


def rows(labels: str, splits: list[str] | None = None) -> list[LabelRow]:
    """One letter per case."""
    return [LabelRow(i + 2, f"c{i}", label, splits[i] if splits else None) for i, label in enumerate(labels)]


def ids(cases: tuple[Case, ...]) -> set[str]:
    return {case.sample_id for case in cases}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_is_read_with_any_line_end_and_byte_order_mark(tmp_path, newline, mark):
    text = mark + newline.join(["Case, label ,SPLIT", 'a\\b.nii,"yes, a lot",train', "", "./c, no ,test", ""])
    assert read_labels(table(tmp_path, text)) == [
        LabelRow(2, "a/b.nii", "yes, a lot", "train"),
        LabelRow(4, "c", "no", "test"),
    ]


BAD_TABLES = {
    "no_header": ("a.nii,1\n", "line 1"),
    "wrong_separator": ("case;label\na;1\n", "commas"),
    "extra_column": ("case,label,age\na,1,50\n", "line 1"),
    "empty": ("", "line 1"),
    "no_rows": ("case,label\n", "no rows"),
    "empty_label": ("case,label\na,1\nsecret,\n", "label is empty: line 3"),
    "empty_case": ("case,label\n,1\n", "case is empty: line 2"),
    "bad_split": ("case,label,split\na,1,train\nb,2,exam\n", "train, val or test: line 3"),
    "too_few_cells": ("case,label,split\na,1\n", "3 columns.*: line 2"),
    "too_many_cells": ("case,label\na,1,2\n", "2 columns.*: line 2"),
    "conflict": ("case,label\nsecret,1\nb,2\n./secret,2\n", "lines 2, 4"),
    "conflicting_split": ("case,label,split\na,1,train\na,1,test\n", "lines 2, 3"),
    "open_quote": ('case,label\n"a,1\n', "not CSV"),
    "latin_1": ("case,label\nä,1\n".encode("latin-1"), "UTF-8"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table_is_an_error_that_names_lines_and_not_their_content(tmp_path, name):
    text, message = BAD_TABLES[name]
    with pytest.raises(ValueError, match=message) as error:
        read_labels(table(tmp_path, text))
    assert "secret" not in str(error.value)


def test_a_missing_table_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_labels(tmp_path / "none.csv")


def test_a_table_may_name_masks_instead_of_labels(tmp_path):
    assert read_labels(table(tmp_path, "case,mask,split\n./a.nii, m\\a.nii,val\nb.nii,,train\n")) == [
        LabelRow(2, "a.nii", "", "val", "m/a.nii"),
        LabelRow(3, "b.nii", "", "train", ""),
    ]
    with pytest.raises(ValueError, match="lines 2, 3"):
        read_labels(table(tmp_path, "case,mask\na,m1\na,m2\n"))
    with pytest.raises(ValueError, match="mask instead"):
        read_labels(table(tmp_path, "case,label,mask\na,1,m\n"))


def test_equal_rows_count_once(tmp_path):
    assert len(read_labels(table(tmp_path, "case,label\na,1\na,1\n"))) == 2


@given(what=st.sampled_from(["label", "mask"]), text=st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_is_rows_or_a_value_error(tmp_path_factory, what, text):
    path = table(tmp_path_factory.mktemp("text"), (f"case,{what}\n" + text).encode("utf-8", "surrogatepass"))
    try:
        found = read_labels(path)
    except ValueError:
        return
    assert found and all(row.case and (row.label if what == "label" else row.mask is not None) for row in found)


_name = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"], exclude_characters="\\/."), min_size=1)


@given(st.dictionaries(_name, st.tuples(_name, st.sampled_from(["train", "val", "test"])), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_what_a_csv_writer_wrote_is_read_back(tmp_path_factory, expected):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["case", "label", "split"])
    writer.writerows([case, *rest] for case, rest in expected.items())
    found = read_labels(table(tmp_path_factory.mktemp("csv"), text.getvalue()))
    assert {row.case: (row.label, row.split) for row in found} == expected


def test_classes_are_sorted_numbers_by_value():
    cohort = label_cases(catalog(4), [LabelRow(i, f"c{i}", label) for i, label in enumerate(["10", "9", "b", "a"])])
    assert cohort.classes == ("9", "10", "a", "b")
    assert [case.label for case in cohort.cases] == [1, 0, 3, 2]


def test_a_case_without_a_row_is_refused_and_one_with_a_refused_file_is_not_missed():
    table_rows = [*rows("ab"), LabelRow(9, "bad.nii", "a")]
    cohort = label_cases(catalog(3), table_rows)
    assert ids(cohort.cases) == {"case-0", "case-1"}
    assert [(refusal.name, refusal.reason) for refusal in cohort.refusals] == [
        ("case-bad", "broken_file"),
        ("case-2", "no_label"),
    ]


def test_a_row_that_names_nothing_is_an_error_with_its_line():
    with pytest.raises(ValueError, match="nothing in the export has .* lines 7, 8 of") as error:
        label_cases(catalog(2), [*rows("ab"), LabelRow(7, "secret", "a"), LabelRow(8, "c9", "a")])
    assert "secret" not in str(error.value)


def test_rows_that_name_one_case_twice_must_agree(tmp_path):
    write_series(tmp_path / "A", "one", 3)
    write_series(tmp_path / "B", "two", 3)
    write_labels(tmp_path, ["A,ill", "B,well", "A/IM50,well"])
    with pytest.raises(ValueError, match="lines 2, 4"):
        load_cohort(tmp_path, spatial_dims=3)
    write_labels(tmp_path, ["A,ill", "B,well", "A/IM50,ill"])
    assert len(load_cohort(tmp_path, spatial_dims=3).cases) == 2


def test_a_folder_labels_all_its_slices_in_2d(tmp_path):
    write_series(tmp_path / "A", "one", 3)
    write_series(tmp_path / "B", "two", 2, patient="P2")
    write_labels(tmp_path, ["A,ill", "B,well"])
    cohort = load_cohort(tmp_path)
    assert Counter(cohort.classes[case.label] for case in cohort.cases) == {"ill": 3, "well": 2}


@pytest.mark.parametrize("labels", ["aaaa", ""])
def test_less_than_two_classes_is_an_error(labels):
    with pytest.raises(ValueError, match="two or more classes"):
        label_cases(catalog(4), rows(labels))


def test_a_class_that_is_only_tested_is_an_error():
    with pytest.raises(ValueError, match="1 of 2 classes"):
        label_cases(catalog(4), rows("aabb", ["train", "train", "test", "test"]))


def test_test_rows_are_held_out_and_never_released():
    cohort = label_cases(catalog(6), rows("ababab", ["train", "train", "val", "val", "test", "test"]))
    assert ids(cohort.train) == {"case-0", "case-1"}
    assert ids(cohort.val) == {"case-2", "case-3"}
    assert ids(cohort.held_out) == {"case-4", "case-5"} == cohort.held_out_ids
    assert ids(cohort.released) == {"case-0", "case-1", "case-2", "case-3"}


def held_out_ok(cohort: Cohort) -> None:
    out, train = cohort.held_out, cohort.train
    assert not {case.group for case in out} & {case.group for case in train}
    assert {case.label for case in train} == {case.label for case in cohort.cases}
    assert ids(cohort.released) == ids(cohort.cases)


@given(labels=st.text("ab", min_size=4, max_size=60), per_patient=st.integers(1, 4), seed=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_patients_stay_together_and_no_class_is_lost_to_the_held_out_part(labels, per_patient, seed):
    if len(set(labels)) < 2:
        return
    cohort = label_cases(catalog(len(labels), per_patient), rows(labels), seed=seed)
    held_out_ok(cohort)
    assert cohort == label_cases(catalog(len(labels), per_patient), rows(labels), seed=seed)
    if per_patient == 1:
        for label in (0, 1):
            total = sum(case.label == label for case in cohort.cases)
            held = sum(case.label == label for case in cohort.held_out)
            assert held == min(max(1, round(total / 4)), total - 1)


def test_the_seed_decides_what_is_held_out():
    chosen = {label_cases(catalog(40), rows("ab" * 20), seed=seed).held_out_ids for seed in range(5)}
    assert len(chosen) == 5


def test_an_archive_brings_its_own_labels_and_splits(tmp_path):
    cohort = load_cohort(write_npz(tmp_path / "a.npz"))
    assert cohort.classes == ("0", "1")
    assert (len(cohort.train), len(cohort.val), len(cohort.held_out), len(cohort.released)) == (8, 4, 4, 12)
    assert [case.label for case in cohort.train] == [0, 1] * 4


def test_an_export_without_labels_is_an_error(tmp_path):
    write_nifti(tmp_path / "a.nii")
    with pytest.raises(ValueError, match="labels.csv"):
        load_cohort(tmp_path, spatial_dims=3)


def test_patients_on_both_sides_of_a_given_split_are_warned_of(caplog):
    label_cases(catalog(4, per_patient=4), rows("abab", ["train", "train", "test", "test"]))
    assert "1 patients have cases both" in caplog.text


def test_names_that_differ_in_case_only_are_warned_of(caplog):
    label_cases(catalog(4), rows("abab"))
    assert not caplog.text
    assert label_cases(catalog(4), rows("aAba")).classes == ("A", "a", "b")
    assert "differ in capital letters or" in caplog.text and "count as different: A, a\n" in caplog.text


def test_numbers_that_are_written_in_two_ways_are_warned_of(caplog):
    told = [LabelRow(i, f"c{i}", label) for i, label in enumerate(["0", "1", "1.0", "2", "10", "nan", "1E2345678"])]
    assert label_cases(catalog(7), told).classes == ("0", "1", "2", "10", "1.0", "1E2345678", "nan")
    assert "count as different: 1, 1.0\n" in caplog.text


def test_a_class_that_is_only_tested_as_it_is_written_otherwise_is_told_so():
    with pytest.raises(ValueError, match="1 of 3 classes occur in split test only.* count as different: A, a"):
        label_cases(catalog(4), rows("aAbb", ["train", "test", "train", "test"]))


def test_missing_labels_are_told_before_any_image_is_decoded(tmp_path, monkeypatch):
    write_nifti(tmp_path / "a.nii")
    monkeypatch.setattr(formats, "read", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="has no labels.csv"):
        load_cohort(tmp_path, spatial_dims=3)


def test_a_class_without_any_usable_case_is_told_at_once():
    named = [*rows("aabb"), LabelRow(9, "bad.nii", "c")]
    with pytest.raises(ValueError, match="1 of 3 classes that the labels name have no usable case"):
        label_cases(catalog(4), named)


def test_a_study_needs_cases_of_each_class_to_test_on():
    cohort = label_cases(catalog(6), rows("aabbaa", ["train", "train", "train", "train", "test", "test"]))
    with pytest.raises(ValueError, match=r"no case of class b is held out for split 'test' \(2 of others are\)"):
        cohort.tested()
    with pytest.raises(ValueError, match="no case is held out for split 'val'"):
        cohort.tested("val")
    with pytest.raises(ValueError, match="use 'test' or 'val'"):
        cohort.tested("train")
    cohort = label_cases(catalog(6), rows("aabbab", ["train", "train", "train", "train", "test", "test"]))
    assert {case.sample_id for case in cohort.tested()} == {"case-4", "case-5"}


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"])
@pytest.mark.parametrize("how", ["unknown", "deflated", "no_file_meta"])
def test_a_row_may_name_a_file_that_cannot_be_read_by_its_uids(tmp_path, how, keyword):
    write_series(tmp_path / "A", "one", 1, patient="P1")
    write_series(tmp_path / "B", "two", 1, patient="P2")
    (path,) = write_series(tmp_path / "C", "three", 1, patient="P3")
    image = dcmread(path)
    if how == "no_file_meta":
        content = path.read_bytes()
        path.write_bytes(content[content.index(b"\x08\0\x05\0CS") :])
    elif how == "deflated":
        image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        image.save_as(path)
    else:
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.7\0", 1))
    write_labels(tmp_path, ["A,ill", "B,well", f"{image[keyword].value},ill"])
    cohort = load_cohort(tmp_path)
    assert len(cohort.cases) == 2
    reason = "no_file_meta" if how == "no_file_meta" else "unsupported_transfer_syntax"
    assert [refusal.reason for refusal in cohort.refusals] == [reason]


def test_accents_may_be_composed_or_not(tmp_path):
    decomposed, whole = "Mu\u0308ller", "M\u00fcller"
    cases = (
        Case("case-0", "nifti", (Path("/x"),), (decomposed,), "p0"),
        Case("case-1", "nifti", (Path("/y"),), ("b",), "p1"),
    )
    cohort = label_cases(Catalog(Path("/export"), cases, (), {}), [LabelRow(2, whole, "a"), LabelRow(3, "b", "b")])
    assert [case.label for case in cohort.cases] == [0, 1]


def test_an_archive_is_known_whatever_its_ending(tmp_path):
    write_npz(tmp_path / "a.npz").rename(tmp_path / "A.NPZ")
    assert count_classes(tmp_path) == len(load_cohort(tmp_path).classes)


def test_of_many_classes_without_test_cases_the_first_are_named():
    scores = [f"{at // 2:02d}" for at in range(80)]  # as ages or scores in place of labels
    cohort = label_cases(catalog(80), rows(scores, ["train"] * 79 + ["test"]))
    with pytest.raises(ValueError, match="of class 00, 01, 02, 03, 04, 05, 06, 07, 08, 09 and 29 more is held out"):
        cohort.tested()
