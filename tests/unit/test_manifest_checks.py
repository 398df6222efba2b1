"""Every check on rendered objects is proven to fail: one field of a good installation is broken at a time."""

import ast
import pathlib
import re

import crd_schema
import pytest
from manifests import access, everything, joins, sample
from manifests.breaks import CANARY, Break, apply, list_breaks, list_policy_breaks, list_step_breaks
from manifests.objects import Finding, Manifest, select
from manifests.steps import find_step_faults

MINOR = ("1.36",)
POLICIES = list(select(sample.list_sample(), "NetworkPolicy"))


def find_faults(objects: list[Manifest]) -> list[Finding]:
    allowed = access.load_allowed("mint", has_executor=False)
    return [
        *everything.find_object_faults(objects, minors=MINOR, canaries=[CANARY]),
        *everything.find_installation_faults(objects, sample.VALUES, allowed=allowed),
    ]


@pytest.fixture(scope="module")
def installation() -> list[Manifest]:
    return sample.list_sample()


def test_sample_installation_breaks_no_rule(installation: list[Manifest]) -> None:
    assert find_faults(installation) == []


@pytest.mark.parametrize("change", list_breaks(), ids=lambda change: change.name)
def test_installation_with_one_field_broken_breaks_exactly_that_rule(
    change: Break, installation: list[Manifest]
) -> None:
    expected = set(change.rules.split())
    if not crd_schema.CRD_FOLDER.is_dir() and expected & {"schema", "schema-unknown"}:
        pytest.skip(f"no CRD schemas in {crd_schema.CRD_FOLDER}")
    assert {finding.rule for finding in find_faults(apply(change, installation))} == expected


@pytest.mark.parametrize("change", list_policy_breaks(POLICIES), ids=lambda change: change.name)
def test_policy_with_one_part_broken_lets_through_more_or_less(change: Break, installation: list[Manifest]) -> None:
    rules = {finding.rule for finding in find_faults(apply(change, installation))}
    assert rules & {"flow-more", "flow-less"}
    assert rules <= {"flow-more", "flow-less", "selects-nothing"}


def test_sample_pipeline_breaks_no_rule() -> None:
    assert find_step_faults(sample.list_sample_pipeline(), canaries=[CANARY]) == []


@pytest.mark.parametrize("change", list_step_breaks(), ids=lambda change: change.name)
def test_pipeline_with_one_field_broken_breaks_exactly_that_rule(change: Break) -> None:
    found = find_step_faults(apply(change, sample.list_sample_pipeline()), canaries=[CANARY])
    assert {finding.rule for finding in found} == {change.rules}


def test_two_objects_of_one_name_are_a_fault(installation: list[Manifest]) -> None:
    found = joins.find_join_faults([*installation, installation[-1]])
    assert [finding.rule for finding in found] == ["duplicate"]


def test_breaks_reach_every_rule_that_a_check_can_report() -> None:
    """A rule that no mutation reaches could be dead: rules are read from the checkers' own text."""
    written = set()
    for file in pathlib.Path(access.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                written |= {part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)}
            if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
                first = node.value.elts[0]
                written |= {part.value for part in ast.walk(first) if isinstance(part, ast.Constant)}
    words = {word for word in written if isinstance(word, str) and re.fullmatch(r"[a-z]+(-[a-z]+)*", word)}
    reached = {rule for change in [*list_breaks(), *list_step_breaks()] for rule in change.rules.split()}
    # The first is of the network breaks, the others have tests of their own.
    reached |= {"flow-less", "duplicate", "schema-rule", "quota-small"}
    assert words - reached == set()
