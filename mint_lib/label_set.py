"""The closed label set that a version holds beside its rows.

Goes in: a version of cases, rankings, preferences or a student. Comes out: its labels in their order. It does not know
which stage wrote them.
"""

from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from mint_lib.records import Label, Reference

if TYPE_CHECKING:
    from mint_lib.store import Store

LABELS = "labels.json"
"""Where a version holds them."""


def read_labels(store: "Store", reference: Reference) -> list[Label]:
    """The labels of a version; raises as `Store.read_json` does."""
    return TypeAdapter(list[Label]).validate_python(store.read_json(reference, LABELS))
