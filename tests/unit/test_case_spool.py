"""The spool: what goes in comes out in any order, nothing is left on disk, and a full disk is named."""

import pathlib
import resource
import signal
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_lib.case_spool import CaseSpool
from mint_lib.errors import StoreError
from mint_lib.records import Case, Finding

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
CASES = st.builds(
    Case,
    case_id=TEXT,
    group_id=TEXT,
    text=st.one_of(st.none(), TEXT),
    image=st.binary(min_size=1, max_size=40),
    findings=st.lists(st.builds(Finding, id=TEXT, label=TEXT, excluded=st.booleans()), max_size=2).map(tuple),
    label_id=st.one_of(st.none(), TEXT),
    attributes=st.dictionaries(TEXT, TEXT, max_size=3),
    source=TEXT,
    synthetic=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(CASES, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_spool_gives_cases_back_in_any_order_between_appends(cases: list[Case], random: "st.randoms") -> None:
    with CaseSpool() as spool:
        for number, case in enumerate(cases):
            assert spool.append(case) == number
            chosen = random.randint(0, number)
            read = spool.read(chosen)
            assert read == cases[chosen]
            assert list(read.attributes) == list(cases[chosen].attributes)
        assert [spool.read(number) for number in reversed(range(len(spool)))] == cases[::-1]


def test_spool_without_an_image_keeps_that() -> None:
    case = Case(case_id="a", group_id="b", text="note", source="test", synthetic=True)
    with CaseSpool() as spool:
        assert spool.read(spool.append(case)) == case


def test_spool_has_no_name_on_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with CaseSpool() as spool:
        spool.append(Case(case_id="a", group_id="b", text="secret", source="test", synthetic=True))
        spool.read(0)
        assert list(tmp_path.iterdir()) == []


def test_spool_in_a_folder_that_cannot_be_written_names_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(StoreError, match=r"none \(No such file or directory\).*TMPDIR"), CaseSpool():
        pass


def test_spool_on_a_full_disk_says_what_to_do() -> None:
    case = Case(case_id="a", group_id="b", text="x" * 50_000, source="test", synthetic=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with CaseSpool() as spool, pytest.raises(StoreError, match="all cases of the run once: free some space there"):
            spool.read(spool.append(case))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
