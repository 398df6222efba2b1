"""A data source that gives the rows a test lists, for tests of the data stage."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from mint_lib.case_rows import LeftOut, Row
from mint_lib.data import DataSource
from mint_lib.records import Label

LABELS = (Label(id="D:1", name="First disease"), Label(id="D:2", name="Second disease"))


def row(number: int, **changes: Any) -> Row:
    """A row of a patient of its own, with a text and a label."""
    values: dict[str, Any] = {
        "case_id": f"case-{number}",
        "group_id": f"patient-{number}",
        "source": "test",
        "synthetic": True,
        "text": f"note {number}",
        "label_id": LABELS[number % 2].id,
    }
    return Row(**values | changes)


class ListSource(DataSource):
    """Gives the rows that a test lists."""

    rows: tuple[Row | LeftOut, ...] = ()

    class Config(BaseModel):
        """Nothing is set."""

        model_config = ConfigDict(extra="forbid", frozen=True)

    def labels(self) -> list[Label]:
        """Those asked for, or two."""
        return list(self.wanted or LABELS)

    def read(self, rng: np.random.Generator) -> Iterator[Row | LeftOut]:
        """The rows as they are."""
        yield from self.rows

    def digest(self) -> str:
        """Always the same."""
        return "sha256:list"

    def notes(self) -> tuple[str, ...]:
        """One."""
        return ("a note of the source",)
