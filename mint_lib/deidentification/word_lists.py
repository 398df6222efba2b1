"""The package's own word lists, read from `word_lists.yaml`: titles, kinship, heads of eponyms, surrogate names.

Goes in: the name of a list. Comes out: its words. Knows no use of them.
"""

import functools
import pathlib

import yaml


def read_words(name: str) -> tuple[str, ...]:
    """The words of the list `name`, in its order."""
    return tuple(_read_lists()[name].split())


@functools.cache
def _read_lists() -> dict[str, str]:
    path = pathlib.Path(__file__).with_name("word_lists.yaml")
    lists: dict[str, str] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return lists
