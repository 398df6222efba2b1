"""What tests of pairs share: cases, rankings and settings of a toy label set, and the pairs that they give."""

from tiny_image_students import make_image

from mint_lib.pairing.checks import PairChecker
from mint_lib.pairing.facts import SplitFacts
from mint_lib.pairing.settings import PreferencesConfig
from mint_lib.pairing.split import pair_split
from mint_lib.reading import TextReader
from mint_lib.records import Case, Finding, Label, Ranking
from mint_lib.student import StudentConfig, load_reader
from mint_lib.template import Template

LABELS = [Label(id=f"OMIM:{number}", name=f"Disease type {number}") for number in range(8)]
IDS = [label.id for label in LABELS]
TINY = StudentConfig(model="tiny", window_tokens=600)
SEEING = StudentConfig(model="tiny-image", reads="image", window_tokens=600)


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
