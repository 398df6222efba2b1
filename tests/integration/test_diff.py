"""`mint diff` on a real server: what it says of two versions, what it reads, and how it ends."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from mint_lib.data_difference.comparison import compare_versions
from mint_lib.errors import IntegrityError, InvalidInput, NotFound
from mint_lib.records import SPLITS, Case, PreferencePair, Ranking, Reference, Split, StageRecord, Turn
from mint_lib.rows import case_schema, pair_schema, ranking_schema
from mint_lib.store import Store
from pipelines.diff import diff, print_difference

LABELS = ("A:1", "A:2", "A:3", "A:4")
SCHEMAS = {"cases": case_schema, "rankings": ranking_schema, "preferences": pair_schema}
Rows = Mapping[Split, list[Any]]


def make_case(number: int, **changes: Any) -> Case:
    values = {
        "case_id": f"case-{number:04d}",
        "group_id": f"patient-{number // 2:04d}",
        "text": f"A boy of {number} years.",
        "label_id": LABELS[number % 4],
        "source": "demo",
        "synthetic": True,
    }
    return Case.model_validate(values | changes)


def make_cases() -> dict[Split, list[Case]]:
    """400 cases of 200 patients; two of a patient are in one split."""
    cases = [make_case(number) for number in range(400)]
    return {"train": cases[:300], "validation": cases[300:350], "test": cases[350:]}


def make_pair(number: int, **changes: Any) -> PreferencePair:
    values = {
        "case_id": f"case-{number:04d}",
        "prompt": (Turn(role="user", content=f"A boy of {number} years."),),
        "chosen": "one, two",
        "rejected": "three",
        "chosen_label_ids": ("A:1", "A:2"),
        "rejected_label_ids": ("A:3",),
        "teacher_digest": "sha256:1",
        "template_digest": "sha256:2",
        "policy": "top2-bottom1",
    }
    return PreferencePair.model_validate(values | changes)


def make_ranking(number: int, *order: str, teacher: str = "sha256:1") -> Ranking:
    return Ranking(
        case_id=f"case-{number:04d}",
        label_ids=order or LABELS,
        probabilities=(0.4, 0.3, 0.2, 0.1),
        teacher_digest=teacher,
    )


def count_cases(rows: Rows) -> dict[str, int]:
    """What the stage `data` states in its record."""
    counts: dict[str, int] = {}
    for split, cases in rows.items():
        counts[f"{split}/cases"] = len(cases)
        counts[f"{split}/patients"] = len({case.group_id for case in cases})
        counts[f"{split}/without label"] = sum(case.label_id is None for case in cases)
        counts[f"{split}/with image"] = sum(case.image is not None for case in cases)
        counts[f"{split}/synthetic"] = sum(case.synthetic for case in cases)
        for label in LABELS:
            counts[f"{split}/label/{label}"] = sum(case.label_id == label for case in cases)
    return counts


def write_version(
    store: Store,
    kind: Any,
    rows: Rows,
    *,
    name: str = "demo",
    base: Reference | None = None,
    added: Rows | None = None,
    files: Mapping[str, object] | None = None,
    **record: Any,
) -> Reference:
    """A version with `rows`; with a base, its tables with `added` behind them."""
    with store.write(kind, name, base=base) as version:
        for split, found in rows.items():
            if base is None:
                version.add_rows(split, found, SCHEMAS[kind]())
                continue
            version.carry_table(split)
            if added and added.get(split):
                version.add_rows(split, added[split], SCHEMAS[kind]())
        for path, value in (files or {}).items():
            version.add_json(path, value)
        values = {"stage": "data", "config": {}, "inputs": {}, "code_version": "1"} | record
        return version.commit(StageRecord.model_validate(values))


def run_diff(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(diff)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


def render(store: Store, before: Reference, after: Reference, *, width: int = 120) -> str:
    output = io.StringIO()
    print_difference(compare_versions(before, after, store=store), Console(file=output, width=width))
    return output.getvalue()


@pytest.fixture
def read_keys(store: Store) -> Iterator[list[str]]:
    """Keys of the objects that the store read since the list was last cleared."""
    keys: list[str] = []

    def note(params: dict[str, Any], **_: Any) -> None:
        keys.append(params["url_path"] if "url_path" in params else params["Key"])

    store._s3.client.meta.events.register("before-call.s3.GetObject", note)
    yield keys
    store._s3.client.meta.events.unregister("before-call.s3.GetObject", note)


def count_shards_read(keys: Iterable[str]) -> int:
    return sum(key.endswith(".parquet") for key in keys)


def test_diff_of_changed_cases_names_what_changed(store: Store):
    old = make_cases()
    new = {split: list(cases) for split, cases in old.items()}
    new["train"][3] = make_case(3, text="Another text.")
    new["train"][4] = make_case(4, label_id="A:2", attributes={"sex": "m"})
    new["train"] += [make_case(1000), make_case(1001)]
    del new["train"][10]
    new["validation"].append(new["train"].pop(0))
    before, after = (write_version(store, "cases", rows, counts=count_cases(rows)) for rows in (old, new))
    found = compare_versions(before, after, store=store)
    assert found.added["train"].case_ids == ("case-1000", "case-1001")
    assert [*found.added, *found.removed] == ["train", "train"]
    assert found.removed["train"].case_ids == ("case-0010",)
    assert found.changed.num_rows == 3
    assert {name: affected.case_ids for name, affected in found.changes.items()} == {
        "text": ("case-0003",),
        "label": ("case-0004",),
        "attributes": ("case-0004",),
        "split": ("case-0000",),
    }
    assert found.moves["train -> validation"].num_rows == 1
    assert found.leaked.num_rows == 0
    figures = found.splits["train"]
    assert figures.before is not None
    assert figures.after is not None
    assert (figures.before.num_rows, figures.after.num_rows) == (300, 300)
    assert (figures.before.num_patients, figures.after.num_patients) == (150, 151)
    assert figures.before.classes == dict.fromkeys(LABELS, 75)
    assert figures.shift == pytest.approx(2 / 300)
    assert found.splits["test"].shift == 0.0
    assert found.lengths["text"][0] is not None
    assert found.lengths["text"][0].num_rows == 350


def test_diff_patient_of_test_in_train_is_warned_of(store: Store):
    old = make_cases()
    other_case = make_case(2000, group_id=old["test"][7].group_id)
    new = old | {"train": [*old["train"], other_case, old["test"][0]], "test": old["test"][1:]}
    before, after = (write_version(store, "cases", rows) for rows in (old, new))
    found = compare_versions(before, after, store=store)
    assert found.leaked.case_ids == ("case-2000", "case-0350")
    assert found.moves["test -> train"].num_rows == 1
    assert "WARNING: 2 rows of train in B are of patients who were in test in A" in render(store, before, after)
    assert compare_versions(after, after, store=store).leaked.num_rows == 0
    backwards = compare_versions(after, before, store=store)
    assert backwards.leaked.num_rows == 0


def test_diff_of_appended_rows_reads_no_file_that_both_versions_have(store: Store, read_keys: list[str]):
    old = make_cases()
    added: Rows = {"train": [make_case(number, label_id="A:1") for number in range(1000, 1040)]}
    grown = {split: cases + added.get(split, []) for split, cases in old.items()}
    before = write_version(store, "cases", old, counts=count_cases(old))
    after = write_version(store, "cases", old, base=before, added=added, counts=count_cases(grown))
    read_keys.clear()
    found = compare_versions(before, after, store=store)
    assert count_shards_read(read_keys) == 1
    assert found.files.num_shared == found.num_unread_files == 3
    assert (found.files.num_new, found.files.num_gone) == (1, 0)
    assert {split: affected.num_rows for split, affected in found.added.items()} == {"train": 40}
    assert not found.changed.num_rows
    read_keys.clear()
    whole = compare_versions(before, after, store=store, read_shared=True)
    assert count_shards_read(read_keys) == 4
    assert whole.num_unread_files == 0
    assert whole.splits == found.splits
    train = found.splits["train"]
    assert train.after is not None
    assert train.after.num_patients == 150 + 20
    assert train.shift == pytest.approx(115 / 340 - 1 / 4)
    assert train.p_value is not None
    assert train.p_value < 1e-6
    assert found.splits["test"].p_value is None


def test_diff_never_needs_the_files_that_both_versions_have(store: Store):
    """They are deleted behind the store's back: the comparison does without them, unless it is told to read them."""
    old = make_cases()
    before = write_version(store, "cases", old)
    after = write_version(store, "cases", old, base=before, added={"train": [make_case(1000)]})
    for split in SPLITS:
        key = f"{store.settings.prefix}/cases/demo/{before.version}/{split}/000000.parquet"
        store._s3.client.delete_object(Bucket=store.settings.bucket, Key=key)
    found = compare_versions(before, after, store=store)
    assert found.added["train"].num_rows == 1
    assert found.splits["train"].before is None, "neither read nor stated"
    with pytest.raises(IntegrityError, match="missing"):
        compare_versions(before, after, store=store, read_shared=True)


def test_diff_statements_that_contradict_each_other_are_not_shown(store: Store):
    old = make_cases()
    before = write_version(store, "cases", old, counts=count_cases(old))
    wrong = count_cases(old) | {"train/cases": 299}
    after = write_version(store, "cases", old, base=before, counts=wrong, config={"seed": 2})
    found = compare_versions(before, after, store=store)
    assert found.splits["train"].before is None
    assert found.splits["train"].after is None
    assert found.splits["test"].before is not None


def test_diff_of_pairs_tells_sides_template_and_policy_apart(store: Store):
    old = [make_pair(number) for number in range(40)]
    old += [make_pair(0, rejected="four", rejected_label_ids=("A:4",))]
    other = {"prompt": (Turn(role="user", content="Asked otherwise."),), "template_digest": "sha256:3"}
    new = [pair.model_copy(update=other) for pair in reversed(old)]
    new[-1] = new[-1].model_copy(update={"chosen": "two, one", "chosen_label_ids": ("A:2", "A:1")})
    rows: list[Rows] = [{"train": old, "validation": [make_pair(90)]}, {"train": new, "validation": [make_pair(90)]}]
    checks = [{"train": {"num_pairs": 41}, "validation": {"num_pairs": 1}}] * 2
    before, after = (
        write_version(store, "preferences", item, files={"checks.json": check})
        for item, check in zip(rows, checks, strict=True)
    )
    found = compare_versions(before, after, store=store)
    assert (found.added, found.removed) == ({}, {})
    assert {name: affected.num_rows for name, affected in found.changes.items()} == {
        "prompt": 41,
        "prompt template": 41,
        "chosen": 1,
    }
    assert found.changes["chosen"].case_ids == ("case-0000",)
    assert (found.changes["prompt"].num_cases, len(set(found.changes["prompt"].case_ids))) == (40, 10)
    assert found.agreement is not None
    assert found.agreement.first_label_changed == pytest.approx(1 / 41)
    assert found.splits["train"].before is not None
    assert found.splits["train"].before.num_cases == 40
    assert found.splits["validation"].before is not None
    assert found.splits["validation"].before.num_rows == 1
    assert found.num_unread_files == 1


def test_diff_of_rankings_shows_the_teachers_and_how_they_agree(store: Store):
    old = [make_ranking(number) for number in range(8)]
    new = [make_ranking(number, teacher="sha256:2") for number in range(6)]
    new += [make_ranking(number, "A:2", "A:1", "A:3", "A:4", teacher="sha256:2") for number in (6, 7)]
    before, after = (write_version(store, "rankings", {"train": rows, "test": []}) for rows in (old, new))
    found = compare_versions(before, after, store=store)
    assert found.teachers == ({"sha256:1": 8}, {"sha256:2": 8})
    assert found.changes["teacher"].num_rows == 8
    assert found.changes["order of labels"].num_rows == 2
    assert found.agreement is not None
    assert found.agreement.first_label_changed == 0.25
    # The first two labels change places: nothing in common at depth 1, everything from depth 2 on.
    assert found.agreement.overlap == pytest.approx(0.75 + 0.25 * 3 / 4)


def test_diff_shows_settings_and_labels_that_differ_and_no_others(store: Store):
    rows = make_cases()
    labels = [{"id": "A:1", "name": "one"}, {"id": "A:2", "name": "two"}]
    before = write_version(
        store, "cases", rows, files={"labels.json": labels}, config={"seed": 1, "split": {"train": 8, "test": 1}}
    )
    labels = [{"id": "A:1", "name": "first"}, {"id": "A:3", "name": "three"}]
    after = write_version(
        store,
        "cases",
        rows,
        files={"labels.json": labels},
        config={"seed": 1, "split": {"train": 9, "test": 1}, "x": []},
    )
    found = compare_versions(before, after, store=store)
    assert found.settings == {"split.train": ("8", "9"), "x": (None, "[]")}
    assert found.labels == {"A:1": ("one", "first"), "A:2": ("two", None), "A:3": (None, "three")}
    assert not found.is_same_data
    assert "0 changed; 3 labels of the label set differ." in render(store, before, after)


def test_diff_holds_the_same_of_long_rows_as_of_short_ones(store: Store):
    held = []
    for num_characters in (10, 100_000):
        rows: list[Rows] = [{"train": [make_case(n, text=mark * num_characters) for n in range(50)]} for mark in "ab"]
        before, after = (write_version(store, "cases", item) for item in rows)
        held.append(compare_versions(before, after, store=store).bytes_per_row)
    assert held[0] == held[1] < 100


def test_diff_command_exits_as_diff_does(store: Store):
    rows = make_cases()
    before = write_version(store, "cases", rows)
    again = write_version(store, "cases", {split: cases[::-1] for split, cases in rows.items()}, code_version="2")
    other = write_version(store, "cases", rows | {"test": rows["test"][1:]}, name="other")
    same = run_diff(before, again)
    assert (same.exit_code, "The data are the same." in same.stdout) == (0, True)
    different = run_diff("cases/demo@v000001", other)
    assert different.exit_code == 1
    assert "0 rows added, 1 removed, 0 changed" in different.stdout
    for arguments in [(before, "cases/demo@v000009"), (before, "cases"), ("student/a", "student/b")]:
        failed = run_diff(*arguments)
        assert failed.exit_code == 2
        assert failed.stdout == ""
        assert failed.stderr.startswith("mint: ")


def test_diff_command_as_json_gives_all_case_ids_when_asked(store: Store):
    rows = make_cases()
    before = write_version(store, "cases", rows)
    after = write_version(store, "cases", rows | {"test": rows["test"][:10]})
    shown = json.loads(run_diff(before, after, "--json").stdout)
    assert shown["removed"]["test"]["num_rows"] == 40
    assert len(shown["removed"]["test"]["case_ids"]) == 10
    everything = json.loads(run_diff(before, after, "--json", "--ids").stdout)
    assert everything["removed"]["test"]["case_ids"] == [f"case-{number:04d}" for number in range(360, 400)]


@pytest.mark.parametrize("width", [80, 120])
def test_diff_for_people_fits_the_console_and_shows_no_content(store: Store, width: int):
    old = make_cases()
    sly = make_case(1, case_id="x\x1b[31m\n[bold]y", text="a canary in a note", attributes={"site": "a canary town"})
    new = old | {"train": [*old["train"][1:], sly, make_case(2, case_id="canary-id", text="another canary note")]}
    before = write_version(store, "cases", old, config={"seed": 1})
    after = write_version(store, "cases", new, config={"seed": 2, "path": "a/" * 90})
    text = render(store, before, after, width=width)
    assert "canary-id" in text
    assert "canary note" not in text
    assert "town" not in text
    assert "\x1b" not in text
    assert "x?[31m?[bold]y" in text
    lines = [line for line in text.splitlines() if "#sha256:" not in line]
    assert max(map(len, lines)) <= width


def test_diff_of_versions_that_cannot_be_compared_is_refused(store: Store):
    cases = write_version(store, "cases", make_cases())
    rankings = write_version(store, "rankings", {"train": [make_ranking(1)]})
    empty = write_version(store, "cases", {}, files={"labels.json": []})
    with pytest.raises(InvalidInput, match="different kinds"):
        compare_versions(cases, rankings, store=store)
    with pytest.raises(NotFound, match="no table"):
        compare_versions(cases, empty, store=store)
