"""The student: tokens, exact ranking, generation, and where weights may come from."""

import json

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mint_lib import student_weights
from mint_lib.errors import InvalidInput
from mint_lib.reading import TextReader, encode_answer, encode_prompt
from mint_lib.records import Label, Turn
from mint_lib.student import (
    StudentConfig,
    encode_first_items,
    generate_answers,
    load_student,
    load_tokenizer,
    rank_labels,
    student_digest,
)
from mint_lib.template import Template

TINY = StudentConfig(model="tiny")
NAMES = ["Noonan syndrome", "Noonan syndrome 2", "Kabuki syndrome 1", "Kabuki syndrome 2", "Marfan's disease"]
LABELS = [Label(id=f"OMIM:{index}", name=name) for index, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def model():
    return load_student(TINY)


def prompts_of(template):
    return [template.prompt(text) for text in ("Boy.", "Girl, 3 years, with seizures and a webbed neck.", "Man.")]


@given(st.text())
def test_student_tiny_tokenizer_gives_any_text_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_student_prompt_ends_where_the_answer_begins(tokenizer):
    turns = [Turn(role="system", content="s"), Turn(role="user", content="u")]
    whole = tokenizer.apply_chat_template(
        [*(turn.model_dump() for turn in turns), {"role": "assistant", "content": "Noonan"}], return_dict=False
    )
    assert encode_prompt(tokenizer, turns) + encode_answer(tokenizer, "Noonan") == whole


@pytest.mark.parametrize("num_answers", [1, 3])
def test_student_ranking_equals_full_rows(model, tokenizer, num_answers):
    template = Template.load("rare_disease").with_num_answers(num_answers)
    prompts = prompts_of(template)
    scores = rank_labels(model, TextReader(tokenizer), template, LABELS, prompts)
    expected = numpy.zeros_like(scores)
    for row, prompt in enumerate(prompts):
        for column, answer in enumerate(encode_first_items(tokenizer, template, LABELS)):
            ids = encode_prompt(tokenizer, prompt)
            with torch.inference_mode():
                log_p = model(torch.tensor([ids + answer])).logits[0].double().log_softmax(-1)
            expected[row, column] = sum(log_p[len(ids) - 1 + k, token].item() for k, token in enumerate(answer))
    expected -= numpy.log(numpy.exp(expected).sum(axis=1, keepdims=True))
    numpy.testing.assert_allclose(scores, expected, atol=1e-4)  # float32 forward passes of different shapes
    assert (scores.argsort(axis=1) == expected.argsort(axis=1)).all()


def test_student_ranking_does_not_depend_on_the_batch(model, tokenizer):
    template = Template.load("rare_disease")
    prompts = prompts_of(template)
    together = rank_labels(model, TextReader(tokenizer), template, LABELS, prompts)
    alone = rank_labels(model, TextReader(tokenizer), template, LABELS, prompts, batch_tokens=1)
    numpy.testing.assert_allclose(together, alone, atol=1e-4)
    numpy.testing.assert_allclose(numpy.exp(together).sum(axis=1), 1.0, atol=1e-9)


def test_student_first_item_is_cut_at_its_closing_quote(tokenizer):
    template = Template.load("rare_disease").with_num_answers(3)
    for answer, label in zip(encode_first_items(tokenizer, template, LABELS), LABELS, strict=True):
        assert tokenizer.decode(answer).rstrip("\n") == template.answer([label.name])


def test_student_equal_label_names_are_refused(tokenizer):
    twice = [LABELS[0], LABELS[0].model_copy(update={"id": "OMIM:9"})]
    with pytest.raises(InvalidInput, match="OMIM:0 begins the answer for OMIM:9"):
        encode_first_items(tokenizer, Template.load("rare_disease"), twice)


def test_student_generates_the_same_alone_and_batched(model, tokenizer):
    prompts = prompts_of(Template.load("rare_disease"))
    reader = TextReader(tokenizer)
    batched = generate_answers(model, reader, prompts, max_new_tokens=6)
    assert batched == [generate_answers(model, reader, [prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_student_cut_keeps_the_first_layers_and_changes_the_digest(model):
    cut = StudentConfig(model="tiny", num_layers=1)
    kept = load_student(cut).state_dict()
    assert not any(".layers.1." in name for name in kept)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in kept.items())
    assert student_digest(cut) != student_digest(TINY) == student_digest(StudentConfig(model="tiny"))


def test_student_cut_beyond_the_model_is_refused():
    with pytest.raises(InvalidInput, match="num_layers is 3, but tiny has 2 layers"):
        load_student(StudentConfig(model="tiny", num_layers=3))


def test_student_folder_with_pickled_weights_only_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match="safetensors"):
        load_tokenizer(StudentConfig(model=f"folder:{tmp_path}"))


def test_student_adapter_without_safetensors_is_refused(tmp_path):
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(InvalidInput, match=r"neither adapter_model\.safetensors"):
        load_student(TINY, tmp_path)


@pytest.mark.parametrize("name", ["", "pypi:torch", "hub:../x/y", "SmolLM2", "hub:a/b/c"])
def test_student_config_refuses_other_spellings(name):
    with pytest.raises(ValueError, match="model"):
        StudentConfig(model=name)


def test_student_failed_conversion_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINT_CACHE_DIR", str(tmp_path))

    def fail(folder):
        (folder / "config.json").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(student_weights, "_write_tiny", fail)
    with pytest.raises(OSError, match="disk full"):
        load_student(TINY)
    assert list(tmp_path.iterdir()) == []
