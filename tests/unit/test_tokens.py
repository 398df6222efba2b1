import json
import pathlib

import pytest

from mint_lib.errors import InvalidInput
from mint_lib.server.access import TokenBook
from pipelines.tokens import add_token


def test_token_that_was_added_opens_what_it_says_and_leaves_the_others(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tokens.json"
    first = add_token(path, tenant="clinic-a", models=("*",), scopes=("infer",), expires_days=None)
    second = add_token(path, tenant="prometheus", models=("*",), scopes=("metrics",), expires_days=30)
    assert first not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    book = TokenBook(path, tell_failure=lambda: None)
    assert [book.find(first).tenant, book.find(second).tenant] == ["clinic-a", "prometheus"]
    assert book.find(second).scopes == ("metrics",)
    assert [entry["expires"] is None for entry in json.loads(path.read_text())["tokens"]] == [True, False]


@pytest.mark.parametrize(
    "values", [{"tenant": "a b"}, {"models": ()}, {"scopes": ("admin",)}, {"expires_days": 0}, {"expires_days": 1e9}]
)
def test_token_with_a_value_that_is_not_allowed_leaves_the_file_alone(tmp_path: pathlib.Path, values: dict) -> None:
    path = tmp_path / "tokens.json"
    good = {"tenant": "a", "models": ("*",), "scopes": ("infer",), "expires_days": None}
    add_token(path, **good)
    before = path.read_bytes()
    with pytest.raises(InvalidInput):
        add_token(path, **good | values)
    assert path.read_bytes() == before


def test_token_for_a_file_of_another_kind_is_refused_and_leaves_it(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text("{}")
    with pytest.raises(InvalidInput, match="no tokens file"):
        add_token(path, tenant="a", models=("*",), scopes=("infer",), expires_days=None)
    assert path.read_text() == "{}"
