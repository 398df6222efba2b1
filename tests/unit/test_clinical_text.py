"""Notes worded from coded findings."""

import numpy as np
import pytest

from mint_lib.clinical.clinical_text import Sex, TextConfig, describe_person, render_case_text
from mint_lib.clinical.ontology import Disease, Ontology, Synonym, Term
from mint_lib.records import Finding


@pytest.fixture(scope="module")
def ontology() -> Ontology:
    terms = {
        f"HP:{number}": Term(
            f"HP:{number}",
            f"Sign {number}",
            synonyms=(
                Synonym(f"Token {number}", "EXACT", ""),
                Synonym(f"Plain {number}", "EXACT", "layperson"),
                Synonym(f"Sign {number} told at a length that nobody would write", "EXACT", "layperson"),
            ),
        )
        for number in range(20)
    }
    terms["HP:90"] = Term("HP:90", "EEG abnormality, severe")
    # HP:n is annotated to n + 1 diseases: the lower the number, the more informative.
    diseases = {
        f"D:{index}": Disease(f"D:{index}", "D", ("D",), {f"HP:{n}": 0.5 for n in range(20) if n >= index}, frozenset())
        for index in range(20)
    }
    return Ontology(terms, diseases, version="test", digest="sha256:0")


def render(findings: list[Finding], ontology: Ontology, seed: int = 0, **config: float) -> tuple[str, tuple, int]:
    return render_case_text(
        findings,
        ontology=ontology,
        sex="female",
        age_years=4.0,
        rng=np.random.default_rng(seed),
        config=TextConfig.model_validate(config),
    )


def observed(*numbers: int) -> list[Finding]:
    return [Finding(id=f"HP:{number}", label="") for number in numbers]


def test_render_case_text_same_generator_gives_same_note(ontology: Ontology) -> None:
    assert render(observed(1, 2, 3), ontology, 5) == render(observed(1, 2, 3), ontology, 5)
    assert len({render(observed(1, 2, 3), ontology, seed)[0] for seed in range(20)}) > 10


def test_render_case_text_over_the_cap_leaves_out_the_least_informative_and_counts(ontology: Ontology) -> None:
    note = render(observed(*range(20)), ontology, max_observed=5)
    assert {item.id for item in note[1]} == {f"HP:{number}" for number in range(5)}
    assert note[2] == 15


def test_render_case_text_excluded_findings_are_denied_and_flagged(ontology: Ontology) -> None:
    excluded = [Finding(id=f"HP:{number}", label="", excluded=True) for number in (7, 8)]
    text, findings, num_left_out = render(observed(1) + excluded, ontology, synonym_share=0, lay_share=0)
    first, second = text.split(". ", 1)
    assert "sign 1" in first
    assert "sign 7" in second
    assert "sign 8" in second
    assert [item.excluded for item in findings] == [False, True, True]
    assert num_left_out == 0


def test_render_case_text_shares_choose_the_kind_of_word(ontology: Ontology) -> None:
    assert "plain 3" in render(observed(3), ontology, lay_share=1, synonym_share=0)[0]
    assert "token 3" in render(observed(3), ontology, lay_share=0, synonym_share=1)[0]
    assert "sign 3" in render(observed(3), ontology, lay_share=0, synonym_share=0)[0]


def test_render_case_text_label_without_id_is_worded_by_the_label(ontology: Ontology) -> None:
    text, findings, _ = render([Finding(id="", label="Unheard-of sign")], ontology)
    assert "unheard-of sign" in text
    assert findings[0] == Finding(id="", label="Unheard-of sign")


def test_render_case_text_name_with_comma_keeps_findings_apart(ontology: Ontology) -> None:
    text = render([*observed(1), Finding(id="HP:90", label="")], ontology, synonym_share=0, lay_share=0)[0]
    assert "EEG abnormality, severe" in text
    assert "; " in text


def test_render_case_text_without_findings_is_empty(ontology: Ontology) -> None:
    assert render([], ontology) == ("", (), 0)


@pytest.mark.parametrize(
    ("sex", "age_years", "expected"),
    [
        ("female", 4.9, "4-year-old girl"),
        ("male", 18.0, "18-year-old man"),
        ("male", 0.6, "7-month-old boy"),
        ("unknown", 0.0, "Newborn child"),
        ("female", None, "Female patient"),
        ("unknown", None, "Patient"),
    ],
)
def test_describe_person_age_and_sex_give_the_usual_words(sex: Sex, age_years: float | None, expected: str) -> None:
    assert describe_person(sex, age_years) == expected
