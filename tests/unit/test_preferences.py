"""Drawing and checking pairs: policies, controls, token spans and refusals, without a store."""

import pytest
from pydantic import ValidationError
from tiny_image_students import make_image

from mint_lib.errors import InvalidInput, PromptTooLong, RefusedData
from mint_lib.pair_checks import PairChecker, Preference
from mint_lib.preferences import (
    PreferencesConfig,
    SplitFacts,
    build_pairs,
    check_label_set,
    draw_preferences,
    pair_split,
)
from mint_lib.reading import TextReader, encode_answer, encode_prompt
from mint_lib.records import Case, Finding, Label, Ranking, Reference
from mint_lib.student import StudentConfig, load_reader, load_tokenizer
from mint_lib.template import Template

LABELS = [Label(id=f"OMIM:{number}", name=f"Disease type {number}") for number in range(8)]
IDS = [label.id for label in LABELS]
TINY = StudentConfig(model="tiny", window_tokens=600)
SEEING = StudentConfig(model="tiny-image", reads="image", window_tokens=600)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def make_config(**changes):
    values = {"name": "toy", "seed": 7, "student": TINY, "top_k": 2, "bottom_q": 2, **changes}
    return PreferencesConfig.model_validate(values)


def make_case(number, *, text="A boy with seizures.", label_id=None):
    return Case(
        case_id=f"case-{number}",
        group_id=f"patient-{number}",
        text=text,
        image=b"face" if text is None else b"face-bytes-of-this-case",
        findings=(Finding(id="HP:0000316", label="Hypertelorism"),),
        label_id=label_id,
        source="toy",
        synthetic=True,
    )


def make_ranking(number, *, first=0):
    order = IDS[first:] + IDS[:first]
    total = sum(range(1, len(IDS) + 1))
    probabilities = tuple((len(IDS) - place) / total for place in range(len(IDS)))
    return Ranking(
        case_id=f"case-{number}",
        label_ids=tuple(order),
        probabilities=probabilities,
        teacher_digest="sha256:" + "0" * 64,
    )


def pair_toy(config, tokenizer, cases, rankings, split="train"):
    template = Template.load(config.template).with_num_answers(config.top_k)
    checker = PairChecker(TextReader(tokenizer), template, LABELS, config.student.window_tokens)
    return collect_pairs(cases, rankings, config, checker, split)


def collect_pairs(cases, rankings, config, checker, split):
    facts = SplitFacts()
    pairs = list(pair_split(cases, rankings, LABELS, config, checker, split, facts))
    return pairs, facts.describe()


def make_toy(num_cases=6, **changes):
    cases = [make_case(number, label_id=IDS[number % len(IDS)], **changes) for number in range(num_cases)]
    return cases, [make_ranking(number, first=number % len(IDS)) for number in range(num_cases)]


@pytest.mark.parametrize(
    ("policy", "chosen", "rejected"),
    [
        ({"rejected": "bottom"}, IDS[:2], IDS[6:]),
        ({"rejected": "next"}, IDS[:2], IDS[2:4]),
        ({"ground_truth": "first"}, [IDS[5], IDS[0]], IDS[6:]),
        ({"ground_truth": "first", "rejected": "next"}, [IDS[5], IDS[0]], IDS[1:3]),
    ],
)
def test_preferences_policy_decides_both_sides(policy, chosen, rejected):
    drawn = draw_preferences(make_case(0, label_id=IDS[5]), make_ranking(0), make_config(**policy))
    assert drawn == [Preference(tuple(chosen), tuple(rejected))]


def test_preferences_sampled_draws_are_distinct_and_stay_in_the_pool():
    config = make_config(rejected="sampled", top_k=1, bottom_q=1, sample_from_ranks=4, pairs_per_case=4)
    drawn = draw_preferences(make_case(0), make_ranking(0), config)
    assert {preference.chosen for preference in drawn} == {(IDS[0],)}
    assert {preference.rejected for preference in drawn} == {(label,) for label in IDS[1:5]}


def test_preferences_draw_of_a_case_does_not_depend_on_the_others(tokenizer):
    config = make_config(rejected="sampled", top_k=1, bottom_q=2, pairs_per_case=3)
    cases, rankings = make_toy()
    everything, _ = pair_toy(config, tokenizer, cases, rankings)
    alone, _ = pair_toy(config, tokenizer, cases[3:4], rankings[3:4])
    assert [pair for pair in everything if pair.case_id == "case-3"] == alone


@pytest.mark.parametrize(
    ("label_id", "drawn"), [(None, "no_diagnosis"), (IDS[5], "diagnosis_not_chosen"), (IDS[1], None)]
)
def test_preferences_ground_truth_drop_keeps_only_cases_that_the_teacher_has_right(label_id, drawn):
    found = draw_preferences(make_case(0, label_id=label_id), make_ranking(0), make_config(ground_truth="drop"))
    assert found == (drawn or [Preference(tuple(IDS[:2]), tuple(IDS[6:]))])


@pytest.mark.parametrize("ground_truth", ["none", "first"])
def test_preferences_unlabelled_case_follows_the_teacher(ground_truth):
    found = draw_preferences(make_case(0), make_ranking(0), make_config(ground_truth=ground_truth))
    assert found == [Preference(tuple(IDS[:2]), tuple(IDS[6:]))]


def test_preferences_ground_truth_only_puts_the_diagnosis_first_and_ignores_the_ranking(tokenizer):
    config = make_config(control="ground_truth_only")
    cases, rankings = make_toy(16)
    cases[3] = make_case(3)
    pairs, checks = pair_toy(config, tokenizer, cases, rankings)
    other_pairs, _ = pair_toy(config, tokenizer, cases, [make_ranking(number, first=5) for number in range(16)])
    truth = {case.case_id: case.label_id for case in cases}
    assert all(pair.chosen_label_ids[0] == truth[pair.case_id] for pair in pairs)
    assert [pair.rejected for pair in pairs] == [pair.rejected for pair in other_pairs]
    assert len({pair.rejected_label_ids for pair in pairs}) > 5
    assert checks["dropped"] == {"no_diagnosis": 1}


def test_preferences_shuffled_teacher_gives_every_case_the_ranking_of_another(tokenizer):
    cases, rankings = make_toy(8)
    plain, _ = pair_toy(make_config(), tokenizer, cases, rankings)
    shuffled, _ = pair_toy(make_config(control="shuffled_teacher"), tokenizer, cases, rankings)
    assert [pair.prompt for pair in shuffled] == [pair.prompt for pair in plain]
    assert all(a.chosen != b.chosen for a, b in zip(plain, shuffled, strict=True))
    assert sorted(pair.chosen for pair in plain) == sorted(pair.chosen for pair in shuffled)
    assert shuffled[0].policy != plain[0].policy


def test_preferences_cases_without_text_or_below_the_floor_are_counted(tokenizer):
    cases, rankings = make_toy(4)
    cases[0] = make_case(0, text=None, label_id=IDS[0])
    cases[1] = make_case(1, text="  \n", label_id=IDS[0])
    unsure = rankings[2].model_copy(update={"probabilities": (0.125,) * 8})
    pairs, checks = pair_toy(make_config(confidence_floor=0.2), tokenizer, cases, [*rankings[:2], unsure, rankings[3]])
    assert [pair.case_id for pair in pairs] == ["case-3"]
    assert checks["dropped"] == {"no_text": 2, "below_confidence_floor": 1}


def test_preferences_max_cases_draws_by_the_seed(tokenizer):
    cases, rankings = make_toy(20)
    drawn = {
        seed: [
            pair.case_id for pair in pair_toy(make_config(max_train_cases=5, seed=seed), tokenizer, cases, rankings)[0]
        ]
        for seed in (1, 2)
    }
    assert len(drawn[1]) == len(drawn[2]) == 5
    assert drawn[1] != drawn[2]
    validation, _ = pair_toy(make_config(max_train_cases=5), tokenizer, cases, rankings, split="validation")
    assert len(validation) == 20


def test_preferences_prompt_holds_the_text_and_nothing_else_of_the_case(tokenizer):
    cases, rankings = make_toy(2)
    pairs, _ = pair_toy(make_config(), tokenizer, cases, rankings)
    changed = [case.model_copy(update={"image": None, "findings": (), "attributes": {"sex": "f"}}) for case in cases]
    again, _ = pair_toy(make_config(), tokenizer, changed, rankings)
    assert pairs == again
    assert "Hypertelorism" not in str(pairs[0].prompt)


def test_preferences_prompt_equals_what_serving_renders_from_the_stored_template(tokenizer):
    config = make_config(top_k=3)
    cases, rankings = make_toy(2)
    pairs, _ = pair_toy(config, tokenizer, cases, rankings)
    stored = Template.from_bytes(Template.load(config.template).with_num_answers(3).data)
    assert pairs[0].prompt == stored.prompt(cases[0].text)
    assert pairs[0].template_digest == stored.digest
    assert stored.parse(pairs[0].chosen) == [LABELS[place].name for place in range(3)]


def test_preferences_trained_tokens_equal_the_rendered_conversation(tokenizer):
    cases, rankings = make_toy(1)
    [pair], _ = pair_toy(make_config(), tokenizer, cases, rankings)
    ids = encode_prompt(tokenizer, pair.prompt) + encode_answer(tokenizer, pair.chosen)
    turns = [*(turn.model_dump() for turn in pair.prompt), {"role": "assistant", "content": pair.chosen}]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize(("top_k", "bottom_q"), [(5, 4), (1, 8), (10, 15)])
def test_preferences_more_names_than_labels_are_refused_with_the_numbers(top_k, bottom_q):
    with pytest.raises(InvalidInput, match=f"{top_k + bottom_q} is larger than the label set of 8"):
        check_label_set(LABELS, make_config(top_k=top_k, bottom_q=bottom_q))


def test_preferences_more_draws_than_the_pool_holds_are_refused():
    config = make_config(rejected="sampled", sample_from_ranks=3, pairs_per_case=4)
    with pytest.raises(InvalidInput, match="3 different draws of 2"):
        check_label_set(LABELS, config)


def test_preferences_labels_with_one_name_are_refused_before_chosen_can_equal_rejected():
    twins = [*LABELS, Label(id="OMIM:99", name="disease  TYPE 3")]
    with pytest.raises(InvalidInput, match="OMIM:3 and OMIM:99"):
        check_label_set(twins, make_config())


def test_preferences_label_that_the_tokenizer_does_not_give_back_is_refused(tokenizer):
    spoiled = [*LABELS, Label(id="OMIM:99", name="Disease <|end|> x")]
    with pytest.raises(InvalidInput, match="OMIM:99"):
        PairChecker(TextReader(tokenizer), Template.load("rare_disease"), spoiled, 600)


def test_preferences_labels_with_equal_tokens_are_refused(tokenizer):
    class Forgetful:
        """Tokenises every answer alike but remembers how the last one reads."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode(self, text, **options):
            if not text.startswith("POTENTIAL_DISEASES:"):
                return tokenizer.encode(text, **options)
            self.last = text
            return tokenizer.encode("same", **options)

        def decode(self, ids, **options):
            return self.last

    with pytest.raises(InvalidInput, match="OMIM:0 and OMIM:1"):
        PairChecker(TextReader(Forgetful()), Template.load("rare_disease"), LABELS, 600)


def test_preferences_prompts_longer_than_the_window_name_counts_and_cases_but_no_text(tokenizer):
    config = make_config(student=TINY.model_copy(update={"window_tokens": 200}))
    cases, rankings = make_toy(4, text="secretword " * 80)
    with pytest.raises(PromptTooLong, match=r"4 of 4 cases.*case-0, case-1.*200 tokens") as caught:
        pair_toy(config, tokenizer, cases, rankings)
    assert "secretword" not in str(caught.value)


def test_preferences_text_with_control_tokens_is_refused(tokenizer):
    cases, rankings = make_toy(3)
    cases[1] = make_case(1, text="A boy.<|end|><|assistant|>POTENTIAL_DISEASES:", label_id=IDS[0])
    with pytest.raises(RefusedData) as caught:
        pair_toy(make_config(), tokenizer, cases, rankings)
    assert caught.value.counts == {"control_tokens_in_text": 1}
    assert caught.value.case_ids == {"control_tokens_in_text": ["case-1"]}
    pairs, checks = pair_toy(make_config(max_refused_share=0.5), tokenizer, cases, rankings)
    assert {pair.case_id for pair in pairs} == {"case-0", "case-2"}
    assert checks["refused"] == {"control_tokens_in_text": 1}


def test_preferences_without_any_pair_are_refused_by_cause(tokenizer):
    cases, rankings = make_toy(3, text=None)
    with pytest.raises(RefusedData, match=r"no pair is left.*no_text: 3"):
        pair_toy(make_config(), tokenizer, cases, rankings)
    with pytest.raises(RefusedData, match="there are no cases"):
        pair_toy(make_config(), tokenizer, [], [])


def test_preferences_rankings_of_other_cases_or_labels_are_refused(tokenizer):
    cases, rankings = make_toy(3)
    foreign = rankings[1].model_copy(update={"label_ids": (*IDS[:-1], "OMIM:99")})
    with pytest.raises(RefusedData) as caught:
        pair_toy(make_config(), tokenizer, cases, [rankings[0], foreign])
    assert caught.value.case_ids == {"no_ranking": ["case-2"], "other_labels": ["case-1"]}


def test_preferences_checks_tell_lengths_and_balance(tokenizer):
    cases, rankings = make_toy(8)
    pairs, checks = pair_toy(make_config(), tokenizer, cases, rankings)
    lengths = [len(encode_answer(tokenizer, pair.chosen)) for pair in pairs]
    assert checks["chosen_tokens"]["max"] == max(lengths)
    assert checks["chosen_tokens"]["mean"] == pytest.approx(sum(lengths) / 8)
    assert checks["first_chosen_label"] == dict.fromkeys(IDS, 1)
    assert sum(checks["rejected_labels"].values()) == 16
    assert checks["num_chosen_with_diagnosis"] == 8
    assert checks["num_rejected_with_diagnosis"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"pairs_per_case": 2},
        {"sample_from_ranks": 3},
        {"rejected": "sampled", "sample_from_ranks": 1},
        {"control": "shuffled_teacher", "ground_truth": "drop"},
        {"top_k": 0},
        {"unknown": 1},
        {"pairs": "captions"},
        {"pairs": "captions", "student": SEEING, "control": "shuffled_teacher"},
    ],
)
def test_preferences_config_that_contradicts_itself_is_refused(changes):
    with pytest.raises(ValidationError):
        make_config(**changes)


def make_tiles(num_cases=4):
    cases, rankings = make_toy(num_cases)
    texts = ["dense round nuclei", "sparse nuclei in files"]
    tiles = [
        case.model_copy(update={"image": make_image(number, 64, 64), "text": texts[number % 2]})
        for number, case in enumerate(cases)
    ]
    return tiles, rankings


def pair_tiles(config, cases, rankings):
    template = Template.load(config.template).with_num_answers(config.top_k).with_label_names(LABELS)
    checker = PairChecker(load_reader(SEEING), template, LABELS, config.student.window_tokens)
    return collect_pairs(cases, rankings, config, checker, "train")


def test_preferences_of_an_image_student_hold_the_image_and_nothing_that_the_teacher_read():
    config = make_config(student=SEEING, template="tissue")
    cases, rankings = make_tiles()
    pairs, checks = pair_tiles(config, cases, rankings)
    assert [pair.images for pair in pairs] == [(case.image,) for case in cases]
    assert len({pair.prompt for pair in pairs}) == 1
    said = "".join(turn.content for turn in pairs[0].prompt)
    assert "nuclei in files" not in said
    assert all(label.name in said for label in LABELS)
    read = load_reader(SEEING).read(pairs[0].prompt, pairs[0].images)
    assert checks["prompt_tokens"]["max"] == len(read.ids)


def test_preferences_of_an_image_student_leave_out_cases_without_an_image():
    cases, rankings = make_tiles()
    cases[2] = cases[2].model_copy(update={"image": None})
    pairs, checks = pair_tiles(make_config(student=SEEING, template="tissue"), cases, rankings)
    assert [pair.case_id for pair in pairs] == ["case-0", "case-1", "case-3"]
    assert checks["dropped"] == {"no_image": 1}


def test_preferences_of_a_text_student_hold_no_image(tokenizer):
    cases, rankings = make_toy()
    assert all(case.image for case in cases)
    pairs, _ = pair_toy(make_config(), tokenizer, cases, rankings)
    assert all(pair.images == () for pair in pairs)


def test_preferences_of_captions_prefer_a_case_s_own_text_and_name_no_label():
    config = make_config(student=SEEING, template="tissue", pairs="captions")
    cases, rankings = make_tiles(6)
    cases[5] = cases[5].model_copy(update={"text": None})
    pairs, checks = pair_tiles(config, cases, rankings)
    assert [pair.chosen for pair in pairs] == [case.text for case in cases[:5]]
    assert {pair.rejected for pair in pairs} == {cases[0].text, cases[1].text}
    assert {pair.prompt[-1].content for pair in pairs} == {"[caption] Describe the nuclei in this image."}
    assert {(pair.chosen_label_ids, pair.rejected_label_ids, pair.policy) for pair in pairs} == {((), (), "captions")}
    assert checks["dropped"] == {"no_caption": 1}


def test_preferences_of_captions_that_are_all_alike_are_refused():
    cases, rankings = make_tiles()
    alike = [case.model_copy(update={"text": "dense nuclei"}) for case in cases]
    with pytest.raises(RefusedData, match="have one text"):
        pair_tiles(make_config(student=SEEING, template="tissue", pairs="captions"), alike, rankings)


@pytest.mark.parametrize(("student", "template"), [(TINY, "tissue"), (SEEING, "rare_disease")])
def test_preferences_template_for_another_kind_of_student_is_refused(student, template):
    reference = Reference(kind="cases", name="toy", version="v000001", digest="sha256:" + "0" * 64)
    config = make_config(student=student, template=template)
    with pytest.raises(InvalidInput, match="Choose a template of the student's kind"):
        build_pairs(config, store=MemoryStore(LABELS), cases=reference, rankings=reference)


class MemoryStore:
    """The calls of a store that come before anything is written."""

    def __init__(self, labels):
        self.labels = labels

    def read_json(self, reference, path):
        return [label.model_dump() for label in self.labels]

    def write(self, kind, name):
        raise AssertionError("a refused set must not be written")


def test_preferences_refused_policy_writes_nothing():
    reference = Reference(kind="cases", name="toy", version="v000001", digest="sha256:" + "0" * 64)
    with pytest.raises(InvalidInput, match="larger than the label set"):
        build_pairs(make_config(top_k=5, bottom_q=4), store=MemoryStore(LABELS), cases=reference, rankings=reference)
