"""The data stage with de-identification: what reaches the cases, what is put aside, and what nobody finds anywhere."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from mint_lib import data as data_module
from mint_lib.case_rows import LeftOut, Row
from mint_lib.data import DataConfig, DataSource, prepare_cases
from mint_lib.deidentification.config import KEY_VARIABLE
from mint_lib.errors import InvalidInput, RefusedData
from mint_lib.records import SPLITS, Case, Label
from mint_lib.store import Store

LABELS = (Label(id="D:1", name="Noonan syndrome"), Label(id="D:2", name="Kabuki syndrome"))
SURNAME, PHONE, RECORD_NUMBER = "Zwickelbauer", "617-555-0182", "88341207"


class Notes(DataSource):
    """Notes of observed patients, each with what identifies somebody."""

    doubtful = 0
    bad: tuple[Row | LeftOut, ...] = ()

    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid", frozen=True)

    def labels(self) -> list[Label]:
        return list(LABELS)

    def read(self, rng: np.random.Generator) -> Iterator[Row | LeftOut]:
        for number in range(24):
            text = (
                f"Patient: Mr. {SURNAME}. MRN: {RECORD_NUMBER}. Phone: {PHONE}. Seen on 03/04/2019 in clinic. "
                f"He has short stature, hypotonia and {number + 2} cafe-au-lait spots; Noonan syndrome is suspected."
            )
            if number < self.doubtful:
                text += " \u202e hidden"
            yield Row(
                case_id=f"{RECORD_NUMBER}-{number}",
                group_id=f"{SURNAME}-{number}",
                source="clinic",
                synthetic=False,
                text=text,
                label_id=LABELS[number % 2].id,
            )
        yield from self.bad

    def digest(self) -> str:
        return "sha256:notes"


@pytest.fixture
def use_notes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that makes the stage read the notes, so many of them with something that nobody can be sure of."""

    def use(doubtful: int) -> None:
        def open_source(config: Any, **_: Any) -> DataSource:
            source = Notes(Notes.Config())
            source.doubtful = doubtful
            return source

        monkeypatch.setattr(data_module, "open_source", open_source)

    monkeypatch.setenv(KEY_VARIABLE, "k" * 64)
    return use


def config(**changes: Any) -> DataConfig:
    values = {"name": "notes", "seed": 1, "source": "notes", "deidentify": {}}
    # Notes that differ in a number are near-duplicates.
    gate = {"max_near_duplicate_share": None, "max_leaked_share": None, "label_flips": None}
    return DataConfig.model_validate(values | {"gate": gate} | changes)


def test_canaries_are_nowhere_in_what_the_stage_writes_or_logs(
    store: Store, use_notes: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    use_notes(0)
    with caplog.at_level(logging.DEBUG, logger="mint_lib"):
        reference = prepare_cases(config(), store=store)
    cases = [case for split in SPLITS for case in store.read_rows(reference, split, Case)]
    assert len(cases) == 24
    written = [repr(case) for case in cases] + [caplog.text]
    written += [store.read_bytes(reference, path).decode() for path in store.files(reference) if "parquet" not in path]
    for canary in (SURNAME, PHONE, RECORD_NUMBER, "k" * 64):
        assert not any(canary in text for text in written)
    assert all("Noonan syndrome is suspected" in (case.text or "") for case in cases)
    assert len({case.group_id for case in cases}) == 24
    record = store.record(reference)
    assert record.metrics["deidentification_recall"] > 0.98
    assert record.counts["deidentification/replaced/name"] >= 24
    assert any(note.startswith("De-identified with surrogates: 24 cases") for note in record.notes)


def test_case_in_doubt_goes_to_quarantine_and_not_to_the_cases(
    store: Store, use_notes: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    use_notes(2)
    reference = prepare_cases(config(), store=store)
    assert sum(len(store.read_rows(reference, split, Case)) for split in SPLITS) == 22
    quarantined = store.resolve("quarantine/notes")
    assert len(store.read_rows(quarantined, "unsure", Case)) == 2
    assert sum(store.record(quarantined).counts.values()) == 2
    assert SURNAME not in caplog.text


def test_missing_key_is_refused_before_anything_is_written(
    store: Store, use_notes: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_notes(0)
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(InvalidInput, match="openssl rand"):
        prepare_cases(config(), store=store)
    assert store.list_names("cases") == []


def test_refused_rows_are_named_by_number_since_their_ids_tell_a_name(
    store: Store, use_notes: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_notes(0)
    unknown = Row(SURNAME, SURNAME, "clinic", synthetic=False, text="A short note.", label_id="D:9")
    monkeypatch.setattr(Notes, "bad", (unknown, LeftOut(f"{SURNAME}.json", "not JSON", refused=True)))
    with caplog.at_level(logging.DEBUG), pytest.raises(RefusedData, match=r"2 of 26 rows") as refused:
        prepare_cases(config(), store=store)
    assert refused.value.case_ids == {"unknown label": ["row 25"], "not JSON": ["row 26"]}
    assert "not JSON: 1 (row 26); unknown label: 1 (row 25)" in str(refused.value)
    assert SURNAME not in repr(refused.value.args) + caplog.text
    with pytest.raises(RefusedData, match=SURNAME):
        prepare_cases(config(deidentify=None), store=store)


def test_added_case_that_does_not_fit_is_named_by_its_pseudonym(
    store: Store, use_notes: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_notes(0)
    base = prepare_cases(config(), store=store)
    changed = [replace(row, text=f"{row.text} Seen again.") for row in Notes(Notes.Config()).read(None)]
    monkeypatch.setattr(Notes, "read", lambda self, rng: iter(changed))
    with pytest.raises(
        RefusedData, match=r"24 of 24 cases do not fit .* case id of another case: 24 \(case-"
    ) as refused:
        prepare_cases(config(), store=store, base=base)
    assert SURNAME not in repr(refused.value.args)
    assert RECORD_NUMBER not in repr(refused.value.args)


def test_observed_texts_that_are_taken_as_they_are_say_so(store: Store, use_notes: Callable[[int], None]) -> None:
    use_notes(0)
    record = store.record(prepare_cases(config(deidentify=None), store=store))
    assert any("not de-identified" in note for note in record.notes)
