"""What a recipe says about de-identification, and the secret that surrogates are drawn with.

Goes in: a recipe's section and the environment. Comes out: a `DeidentificationConfig` and the key. Reads no text.
"""

import os
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.errors import InvalidInput

KEY_VARIABLE = "MINT_DEIDENTIFICATION_KEY"
_LEAST_KEY_BYTES = 32


class DeidentificationConfig(BaseModel):
    """How texts are freed of what identifies somebody."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    language: Literal["en"] = "en"
    """Language of the texts; a text that does not look like it is put aside."""
    least_recall: float = Field(default=0.98, gt=0, le=1)
    """Share of the identifiers of the bundled held-out notes that must be found, measured at the start of every run.
    The best published ensemble reaches 0.992 on real notes (i2b2 2014, PMC8212138)."""


def read_key(environment: Mapping[str, str] | None = None) -> bytes:
    """The secret key of `MINT_DEIDENTIFICATION_KEY`.

    Args:
        environment: where to look; the process's own if None.

    Raises:
        InvalidInput: it is missing or shorter than 32 bytes.
    """
    key = (os.environ if environment is None else environment).get(KEY_VARIABLE, "").strip().encode()
    if len(key) < _LEAST_KEY_BYTES:
        raise InvalidInput(
            f"De-identification needs a secret of at least {_LEAST_KEY_BYTES} bytes in {KEY_VARIABLE}, which "
            f"{'is not set' if not key else f'has {len(key)}'}. Make one with `openssl rand -hex 32`, keep it where "
            "other secrets are kept, and give the same one to every run whose patients are to stay the same people."
        )
    return key
