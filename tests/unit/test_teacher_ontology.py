"""The ontology teacher on a small ontology written here, whose similarities are known by hand."""

import math

import numpy as np
import pytest

from mint_lib.errors import IntegrityError, InvalidInput
from mint_lib.records import Case, Finding, Label
from mint_lib.teachers.ontology import OntologyTeacher

OBO = """format-version: 1.2
data-version: hp/releases/2020-01-01

[Term]
id: HP:0000118
name: Phenotypic abnormality

[Term]
id: HP:0000001
name: Heart
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:0000002
name: Septal defect
alt_id: HP:0000099
is_a: HP:0000001 ! Heart

[Term]
id: HP:0000003
name: Brain
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:0000004
name: Seizure
is_a: HP:0000003 ! Brain
"""
ROWS = [("OMIM:1", "A", "HP:0000002", "1/2"), ("OMIM:1", "A", "HP:0000004", "1/4")]
ROWS += [("OMIM:2", "B", "HP:0000004", "1/1"), ("OMIM:3", "C", "HP:0000001", "1/1")]
LABELS = [Label(id=f"OMIM:{number}", name=name) for number, name in ((1, "A"), (2, "B"), (3, "C"))]
CONTENT = {"septal": math.log(3), "heart": math.log(3 / 2), "seizure": math.log(3 / 2)}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hp.obo").write_text(OBO)
    lines = ["\t".join([i, n, "", t, "PMID:1", "PCS", "", f, "", "", "P", ""]) for i, n, t, f in ROWS]
    (tmp_path / "phenotype.hpoa").write_text("\n".join(lines) + "\n")
    return tmp_path


def make_teacher(folder, labels=LABELS):
    return OntologyTeacher(OntologyTeacher.Config(folder=str(folder)), labels, seed=0)


def make_case(*findings):
    return Case(case_id="case", group_id="case", text="t", findings=findings, source="toy", synthetic=True)


def find(term_id, label="", *, excluded=False):
    return Finding(id=term_id, label=label, excluded=excluded)


def test_ontology_score_is_the_best_match_average_in_both_directions(folder):
    [scores] = make_teacher(folder).score([make_case(find("HP:0000002"))])
    one_way = CONTENT["septal"]
    back = CONTENT["septal"] * 0.5 / 0.75
    assert scores[0] == pytest.approx((one_way + back) / 2)
    assert scores[1] == pytest.approx(0)
    assert scores[2] == pytest.approx(CONTENT["heart"])


@pytest.mark.parametrize(
    "finding", [find("HP:0000099"), find("", "septal defect"), find("HP:7777777", "Septal defect")]
)
def test_ontology_old_and_unknown_ids_fall_back_to_what_they_mean(folder, finding):
    teacher = make_teacher(folder)
    assert (teacher.score([make_case(finding)]) == teacher.score([make_case(find("HP:0000002"))])).all()


def test_ontology_excluded_repeated_and_unknown_findings_change_nothing(folder):
    teacher = make_teacher(folder)
    plain = teacher.score([make_case(find("HP:0000002"))])
    noisy = make_case(
        find("HP:0000002"), find("HP:0000099"), find("HP:0000004", excluded=True), find("HP:7777777", "no such thing")
    )
    assert (teacher.score([noisy]) == plain).all()


def test_ontology_case_without_known_findings_is_undecided_and_counted(folder):
    teacher = make_teacher(folder)
    silent = make_case(find("HP:7777777", "no such thing"))
    assert (teacher.score([silent, make_case()]) == 0).all()
    assert teacher.fit([], [silent, make_case(find("HP:0000002"))])["num_validation_cases_without_findings"] == 1


def test_ontology_label_without_annotations_is_refused(folder):
    with pytest.raises(InvalidInput, match="OMIM:9"):
        make_teacher(folder, [*LABELS, Label(id="OMIM:9", name="Z")])


def test_ontology_teacher_read_back_scores_alike_and_notices_other_files(folder, tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    teacher = make_teacher(folder)
    teacher.save(saved)
    case = make_case(find("HP:0000004"))
    assert np.array_equal(OntologyTeacher.load(saved, LABELS).score([case]), teacher.score([case]))
    other = tmp_path / "other"
    other.mkdir()
    (other / "hp.obo").write_text(OBO)
    (other / "phenotype.hpoa").write_text((folder / "phenotype.hpoa").read_text().replace("1/4", "3/4"))
    config = (saved / "config.json").read_text()
    (saved / "config.json").write_text(config.replace(str(folder), str(other)))
    with pytest.raises(IntegrityError, match="release 2020-01-01"):
        OntologyTeacher.load(saved, LABELS)
