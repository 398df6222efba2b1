"""Steps that show what they declare, and ranked lists as models write them."""

import json

import numpy as np
import pytest
from pydantic import ValidationError

from mint_lib.chat.chain import Step, check_steps, write_messages
from mint_lib.chat.ranked_list import RankedListReader, score_lists
from mint_lib.records import Label

LABELS = [
    Label(id="T:0", name="Kidney", synonyms=("Renal tissue",)),
    Label(id="T:1", name="Liver"),
    Label(id="T:2", name="Head & Neck"),
    Label(id="T:3", name="Bile Duct"),
]
DIFFERENTIAL = {"name": "differential", "shows": ["image"], "prompt": "Describe and propose.", "max_tokens": 50}
RANKING = {
    **{"name": "ranking", "shows": ["differential"], "system": "You rank.", "max_tokens": 50},
    "prompt": "A colleague says:\n{differential}\nChoose from:\n{label_names}",
}


def make_steps(*changes):
    return [Step.model_validate(step | change) for step, change in zip((DIFFERENTIAL, RANKING), changes, strict=True)]


def read(text, answer_format="numbered_list"):
    return RankedListReader(LABELS, answer_format=answer_format, num_answers=3).read(text)


def test_step_holds_what_it_shows_and_values_are_not_filled_again():
    [_, ranking] = make_steps({}, {})
    answers = {"differential": "either {label_names} or {case_text}", "other": "canary"}
    turns = write_messages(
        ranking, text="canary text", image=b"canary image", answers=answers, label_names=["A", "B"], ending="END"
    )
    assert [turn.role for turn in turns] == ["system", "user"]
    assert turns[1].text == "A colleague says:\neither {label_names} or {case_text}\nChoose from:\n- A\n- B\n\nEND"
    assert turns[1].images == ()


def test_step_that_shows_the_image_holds_it_and_one_that_shows_the_text_says_where_there_is_none():
    step = Step(name="look", shows=("image", "text"), prompt="Text: {case_text}", max_tokens=9)
    turns = write_messages(step, text=None, image=b"picture", answers={}, label_names=[])
    assert turns == (("user", "Text: (no text)", (b"picture",)),)


def test_prompt_may_hold_other_braces():
    [_, ranking] = make_steps({}, {"prompt": RANKING["prompt"] + ' {"a": {}} {} {A}'})
    check_steps([make_steps({}, {})[0], ranking], inputs="image")
    [_, user] = write_messages(ranking, text=None, image=None, answers={"differential": "x"}, label_names=["A"])
    assert user.text.endswith(' {"a": {}} {} {A}')


@pytest.mark.parametrize(
    ("changes", "inputs", "words"),
    [
        (({}, {}), "text", "differential shows image; it may show text"),
        (({}, {}), "image_and_text", "no step shows text"),
        (({}, {"shows": ["image"], "prompt": "{label_names}"}), "image", "no step shows differential"),
        (({"shows": ["ranking"]}, {}), "image", "shows ranking; it may show image"),
        (({"name": "ranking"}, {}), "image", "different names"),
        (({"name": "case_text"}, {}), "image", "different names"),
        (({"prompt": "{case_text}"}, {}), "image", "must hold no place but"),
        (({}, {"prompt": "{label_names}"}), "image", "must hold {differential}"),
        (({}, {"prompt": "{differential}"}), "image", "must hold {label_names}"),
        (({}, {"prompt": "{differential} {label_names} {unknown}"}), "image", "must hold {differential}"),
    ],
)
def test_steps_that_do_not_agree_with_themselves_are_refused(changes, inputs, words):
    with pytest.raises(ValueError, match=words):
        check_steps(make_steps(*changes), inputs=inputs)


@pytest.mark.parametrize("change", [{"shows": []}, {"max_tokens": 0}, {"name": "Two Words"}, {"schema": {}}])
def test_step_with_a_wrong_field_is_refused(change):
    with pytest.raises(ValidationError):
        Step.model_validate(DIFFERENTIAL | change)


@pytest.mark.parametrize(
    "text",
    [
        "RANKED_LIST:\n1. 'Liver'\n2. 'Kidney'",
        "Sure!\n\n**Ranked list:**\n1) liver\n2) Kidney\n\nLiver is likely because of its nuclei.",
        "<think>1. 'Bile Duct'\nRANKED_LIST:\n1. 'Head & Neck'</think>\nRANKED_LIST:\n1. 'Liver'\n2. 'Kidney'",
        "- Liver\n- KIDNEY",
        "RANKED_LIST:\n1. 'T:1'\n2. 'renal  tissue'\n3. 'Kidney'",
    ],
)
def test_list_is_read_whatever_its_dress(text):
    assert read(text).columns == (1, 0)


def test_list_resolves_names_by_form_and_counts_those_that_are_no_label_s():
    found = read("1. 'head and neck'\n2. 'HEAD & NECK'\n3. 'Kidnee'\n4. 'Bone'\n5. 'bile-duct'")
    assert found.columns == (2, 3)
    assert found.num_unknown == 3


@pytest.mark.parametrize("text", ["", "It is a kidney.", "RANKED_LIST:", "1. 'Bone'", "I cannot say.\n\n1. 'Kidnee'"])
def test_answer_without_a_label_lists_none(text):
    assert read(text).columns == ()


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ('{"ranked_list": ["Liver", "Kidney"]}', (1, 0)),
        ('```json\n{"ranked_list": ["Liver", 3, null, "Liver"]}\n```', (1,)),
        ("RANKED_LIST:\n1. 'Liver'", (1,)),
        ('{"ranked_list": []}', ()),
        ('{"ranked_list": "Liver"}', ()),
        ('{"ranked_list": ["Liver"', ()),
        ("{" * 100_000 + "}", ()),
    ],
)
def test_json_answer_is_read_and_anything_else_is_no_list(text, columns):
    assert read(text, "json_schema").columns == columns


def test_schema_names_the_labels_and_the_instruction_its_form():
    reader = RankedListReader(LABELS, answer_format="json_schema", num_answers=9)
    form = reader.fields["response_format"]
    assert form["json_schema"]["strict"] is True
    items = form["json_schema"]["schema"]["properties"]["ranked_list"]["items"]
    assert items["enum"] == [label.name for label in LABELS]
    assert "exactly 4 of" in reader.instruction
    example = reader.instruction[reader.instruction.index("{") : reader.instruction.index("}") + 1]
    assert list(json.loads(example.replace(", ...", ""))) == ["ranked_list"]


def test_schema_of_a_large_label_set_leaves_the_names_out():
    labels = [Label(id=f"T:{number}", name=f"Tissue {number}") for number in range(251)]
    reader = RankedListReader(labels, answer_format="json_schema", num_answers=9)
    assert "Tissue 7" not in json.dumps(reader.fields)


def test_instruction_s_own_example_is_no_answer():
    reader = RankedListReader(LABELS, answer_format="numbered_list", num_answers=3)
    assert reader.read(reader.instruction).columns == ()
    assert reader.fields is None


def test_scores_of_one_list_keep_its_order_and_put_the_rest_below_as_equals():
    scores = score_lists([(2, 0)], num_labels=4)
    assert scores[2] > scores[0] > scores[1] == scores[3]
    assert np.exp(scores[[2, 0]]) == pytest.approx([1 + 1 / 8, 1 / 2 + 1 / 8])


def test_scores_of_several_lists_are_those_of_the_mean_reciprocal_rank():
    scores = score_lists([(0, 1), (1, 2), (1,)], num_labels=4)
    assert np.exp(scores) == pytest.approx(np.array([1 / 3, (1 / 2 + 1 + 1) / 3, 1 / 6, 0]) + 1 / 24)


def test_label_that_is_listed_once_and_last_is_above_one_that_never_is():
    scores = score_lists([(0, 1, 2)] + [(0,)] * 63, num_labels=4)
    assert scores[2] > scores[3]


def test_scores_without_a_list_are_equal():
    assert score_lists([], num_labels=3).tolist() == [0.0, 0.0, 0.0]
