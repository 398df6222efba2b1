import pathlib
import pickle
import shutil
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mint_lib import errors
from mint_lib.code_version import code_version
from mint_lib.errors import InvalidInput, RefusedData
from mint_lib.records import KINDS, Case, Finding, PreferencePair, Ranking, Reference, Turn
from mint_lib.rows import case_schema, iterate_parquet, pair_schema, ranking_schema, write_shards

TEMPLATES = pathlib.Path(errors.__file__).parent / "templates"
REFERENCE = "preferences/rare-disease@v000003#sha256:" + "ab" * 32


@given(
    kind=st.sampled_from(KINDS),
    name=st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
    number=st.integers(0, 10**9),
    digest=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
)
def test_reference_printed_and_parsed_is_the_same(kind, name, number, digest):
    reference = Reference(kind=kind, name=name, version=f"v{number:06d}", digest=f"sha256:{digest}")
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        REFERENCE.replace("preferences", "pickles"),
        REFERENCE[:-1],
        REFERENCE.replace("rare-disease", "../etc"),
        REFERENCE.replace("v000003", "3"),
        REFERENCE + "\nx",
        REFERENCE.upper(),
    ],
)
def test_reference_of_other_text_is_refused(text):
    with pytest.raises(InvalidInput, match="is not a reference"):
        Reference.parse(text)


def test_case_with_neither_text_nor_image_is_refused():
    with pytest.raises(ValidationError, match="needs a text, an image, or both"):
        Case(case_id="a", group_id="a", text="  ", source="s", synthetic=False)


def test_ranking_whose_probabilities_rise_is_refused():
    with pytest.raises(ValidationError, match="do not fall"):
        Ranking(case_id="a", label_ids=("x", "y"), probabilities=(0.2, 0.8), teacher_digest="d")


def _pair(**changes):
    values = {
        "case_id": "a",
        "prompt": (Turn(role="user", content="q"),),
        "chosen": "1",
        "rejected": "2",
        "chosen_label_ids": ("x",),
        "rejected_label_ids": ("y",),
        "teacher_digest": "d",
        "template_digest": "t",
        "policy": "p",
    }
    return PreferencePair(**(values | changes))


def test_pair_whose_sides_are_equal_is_refused():
    with pytest.raises(ValidationError, match="chosen equals rejected"):
        _pair(rejected="1")


def test_pair_with_a_label_on_both_sides_is_refused():
    with pytest.raises(ValidationError, match="both sides"):
        _pair(rejected_label_ids=("y", "x"))


@pytest.mark.parametrize(
    ("row", "schema"),
    [
        (
            Case(
                case_id="a",
                group_id="g",
                text="t",
                image=b"\x89PNG",
                findings=(Finding(id="HP:1", label="l", excluded=True),),
                attributes={"sex": "female"},
                source="s",
                synthetic=True,
            ),
            case_schema,
        ),
        (Case(case_id="b", group_id="g", image=b"x", source="s", synthetic=False), case_schema),
        (Ranking(case_id="a", label_ids=("x",), probabilities=(1.0,), teacher_digest="d"), ranking_schema),
        (_pair(), pair_schema),
    ],
)
def test_row_written_and_read_is_the_same_and_its_bytes_repeat(row, schema, tmp_path):
    (path,) = write_shards([row], schema(), tmp_path)
    data = path.read_bytes()
    assert list(iterate_parquet(path, type(row))) == [row]
    (path,) = write_shards([row], schema(), tmp_path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("name", [name for name in vars(errors) if isinstance(vars(errors)[name], type)])
def test_every_error_pickles_with_its_message(name):
    error = vars(errors)[name]("what, allowed, to do")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == "what, allowed, to do"


def test_refused_data_pickled_keeps_its_counts():
    error = RefusedData("no", {"empty": 2}, {"empty": ["a", "b"]})
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.counts, copy.case_ids) == ("no", {"empty": 2}, {"empty": ["a", "b"]})


@pytest.mark.parametrize("name", sorted(path.name for path in TEMPLATES.iterdir()))
def test_code_version_changes_with_every_template(name, tmp_path, monkeypatch):
    shutil.copytree(TEMPLATES, tmp_path / "templates")
    monkeypatch.setattr(sys.modules[code_version.__module__], "__file__", str(tmp_path / "module.py"))
    before = code_version.__wrapped__()
    (tmp_path / "templates" / name).write_bytes(b"something else")
    assert code_version.__wrapped__() != before
