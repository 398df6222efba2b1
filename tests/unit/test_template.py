"""The template: what it renders, what it reads back, and what it refuses."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mint_lib.errors import InvalidInput, RecipeError
from mint_lib.records import Case, Label
from mint_lib.template import Template, normalise_name

TEMPLATE = Template.load("rare_disease")
NAMES = st.lists(
    st.text(min_size=1, max_size=40).map(str.strip).filter(lambda name: name and "\n" not in name and "\r" not in name),
    min_size=1,
    max_size=15,
)


@given(NAMES)
def test_template_parse_of_an_answer_gives_the_names_back(names):
    assert TEMPLATE.parse(TEMPLATE.answer(names)) == names


@given(st.text())
def test_template_parse_of_any_text_never_raises(text):
    assert all(name == name.strip() and name for name in TEMPLATE.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "POTENTIAL_DISEASES:\n1. 'Noonan syndrome 1'\n2. 'Kabuki syndrome'",
        "Potential diseases:\n\n1) Noonan syndrome 1\n\n2) Kabuki syndrome\n",
        '**POTENTIAL_DISEASES: **  \n**1.** "Noonan syndrome 1"\n**2.** "Kabuki syndrome"',
        "potential_diseases\r\n- 'Noonan syndrome 1'\r\n- 'Kabuki syndrome'\r\n",
        "POTENTIAL_DISEASES:\nNoonan syndrome 1\nKabuki syndrome",
        "1. 'Noonan syndrome 1'.\n2. 'Kabuki syndrome' (less likely)",
        "Here:\nPOTENTIAL_DISEASES:\n1. \u2018Noonan syndrome 1\u2019\n2. `Kabuki syndrome`\nI hope this helps.",
        "POTENTIAL_DISEASES:\n1. 'Noonan syndrome 1'\n2. 'Kabuki syndrome'\nPOTENTIAL_DISEASES:\n1. 'Other'",
    ],
)
def test_template_parse_of_a_variant_gives_the_names(text):
    assert TEMPLATE.parse(text) == ["Noonan syndrome 1", "Kabuki syndrome"]


@pytest.mark.parametrize("text", ["", "I cannot answer.", "POTENTIAL_DISEASES:", "\n\n1.\n2. ''\n"])
def test_template_parse_of_a_text_without_names_gives_none(text):
    assert TEMPLATE.parse(text) == []


def test_template_prompt_holds_the_text_verbatim_and_no_other_indentation():
    text = "Boy with {num_answers} seizures,\n    {case_text} and fever."
    turns = TEMPLATE.prompt(text)
    assert [turn.role for turn in turns] == ["system", "user"]
    assert turns[1].content.startswith(text + "\n\n")
    rest = turns[1].content.removeprefix(text)
    assert "{" not in rest
    assert "  " not in rest


@pytest.mark.parametrize("count", [1, 3, 10])
def test_template_with_another_count_asks_for_it_and_survives_storage(count):
    changed = TEMPLATE.with_num_answers(count)
    stored = Template.from_bytes(changed.data)
    assert stored.num_answers == count
    assert f"exactly {count} " in stored.prompt("text")[-1].content
    assert stored.digest == changed.digest
    assert (stored.digest == TEMPLATE.digest) == (count == TEMPLATE.num_answers)


def test_template_prompt_is_short():
    words = " ".join(turn.content for turn in TEMPLATE.prompt("")).split()
    assert len(words) <= 25


def make_case(**changes):
    values = {
        "case_id": "c",
        "group_id": "p",
        "source": "s",
        "synthetic": True,
        "text": "dense nuclei",
        "image": b"png",
    }
    return Case(**(values | changes))


def test_template_about_images_shows_the_image_and_not_the_text():
    template, case = Template.load("tissue_brief"), make_case()
    question = template.question(case)
    assert question.images == (b"png",)
    assert all("dense" not in turn.content for turn in question.turns)
    assert template.caption_question(case).images == (b"png",)
    assert template.can_ask(case)
    assert not template.can_ask(make_case(image=None))


def test_template_about_texts_shows_the_text_and_not_the_image():
    case = make_case()
    assert TEMPLATE.question(case) == (TEMPLATE.prompt("dense nuclei"), ())
    assert not TEMPLATE.can_ask(make_case(text=" "))
    with pytest.raises(InvalidInput, match="caption"):
        TEMPLATE.caption_question(case)


def test_template_with_label_names_lists_them_and_survives_storage():
    labels = [Label(id="a", name="Head & Neck"), Label(id="b", name="Bile: Duct 'x' #1")]
    stored = Template.from_bytes(Template.load("tissue").with_num_answers(1).with_label_names(labels).data)
    assert "Choose from: Head & Neck, Bile: Duct 'x' #1." in stored.prompt()[-1].content
    assert (stored.num_answers, stored.reads) == (1, "image")
    assert stored.with_label_names(labels).digest == stored.digest


@pytest.mark.parametrize("name", ["", " Noonan", "Noonan ", "Noonan\nsyndrome", "\t"])
def test_template_answer_with_an_unreadable_name_is_refused(name):
    with pytest.raises(InvalidInput, match="Mend the label set"):
        TEMPLATE.answer(["Kabuki syndrome", name])


def test_template_unknown_name_lists_the_known_ones():
    with pytest.raises(RecipeError, match="rare_disease"):
        Template.load("../rare_disease")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": "no place"}, "case_text"),
        ({"user": "{case_text} {case_text} {num_answers} POTENTIAL_DISEASES:"}, "1 times, not 2"),
        ({"user": "{case_text} {num_answers}"}, "header"),
        ({"reads": "image"}, "must hold {case_text} 0 times"),
        ({"num_answers": 0}, "num_answers"),
        ({"extra": 1}, "unknown key"),
    ],
)
def test_template_file_with_a_fault_is_refused_by_name(change, message):
    content = yaml.safe_load(TEMPLATE.data) | change
    with pytest.raises(InvalidInput, match=message):
        Template.from_bytes(yaml.safe_dump(content).encode())


@pytest.mark.parametrize("data", [b"\xff\xfe", b"- a\n- b", b"a: [", b""])
def test_template_bytes_that_are_no_mapping_are_refused(data):
    with pytest.raises(InvalidInput, match=r"template\.yaml"):
        Template.from_bytes(data)


def test_name_is_normalised_across_case_punctuation_and_form():
    assert normalise_name("Ehlers\u2013Danlos  Syndrome, Type\u00a0I") == normalise_name(
        "ehlers-danlos syndrome type i"
    )
    assert normalise_name("MRT7") != normalise_name("MRT72")
