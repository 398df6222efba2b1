"""What only the people behind a data set can say of it: licence, consent, makers, limits.

Goes in: a section of a recipe. Comes out: `DatasetFacts`, in which everything that nobody said reads "not stated".
Everything else that a card tells is read from the store.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

NOT_STATED = "not stated"
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=10_000)]


class DatasetFacts(BaseModel):
    """Licence, consent and the like, as those who own the data state them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    licence: Text = NOT_STATED
    """Licence of the data, best as an SPDX identifier such as `CC-BY-4.0`, or the terms under which they were given."""
    consent: Text = NOT_STATED
    """On what ground patients' data are used: consent, ethics vote, waiver, or why none is needed."""
    creators: tuple[Text, ...] = ()
    """People or institutions who made or gave the data."""
    citation: Text = NOT_STATED
    """How to cite the data, best as BibTeX."""
    description: Text | None = None
    """A paragraph on what the data are. None: a sentence made from the figures."""
    limits: tuple[Text, ...] = ()
    """What the data must not be used for, and known defects, a sentence each."""
