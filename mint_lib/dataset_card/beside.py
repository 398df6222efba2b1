"""The two files that stand beside the data: `README.md` for people and `croissant.json` for machines.

Goes in: a `Description`. Comes out: their names and bytes, the same for the same description.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mint_lib.dataset_card.card import render_card
from mint_lib.dataset_card.croissant import CROISSANT, render_croissant
from mint_lib.dataset_card.description import Description
from mint_lib.rows import case_schema, pair_schema

if TYPE_CHECKING:
    import pyarrow

    from mint_lib.storage.writer import VersionWriter

README = "README.md"
STORE_PATTERN = "{split}/*.parquet"
"""Where a version keeps the shards of a split."""


def render_beside(
    description: Description, schema: "pyarrow.Schema | None" = None, *, pattern: str = STORE_PATTERN
) -> Mapping[str, bytes]:
    """File name to content.

    Args:
        description: What is told; of a draft, as `describe_draft` makes it, for files that are committed with the data.
        schema: Arrow schema of the rows; None: that of the store.
        pattern: Glob pattern of a split's files.
    """
    if schema is None:
        schema = case_schema() if description.kind == "cases" else pair_schema()
    card = render_card(description, data_files={split: pattern.format(split=split) for split in description.splits})
    document = render_croissant(description, schema, shards=pattern)
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    return {README: card.encode(), CROISSANT: text.encode()}


def add_card(version: "VersionWriter", description: Description) -> None:
    """Write both files beside the data."""
    for path, data in render_beside(description).items():
        version.add_bytes(path, data)
