"""Where everything lies in the bucket.

Goes in: kinds, names, versions, aliases. Comes out: keys. Every word is checked here before it becomes part of a key.
"""

import re
from collections.abc import Iterable

from mint_lib.errors import InvalidInput
from mint_lib.records import KINDS
from mint_lib.storage.manifest import HOLDS, MANIFEST

LATEST = "latest"
"""Stands for the newest committed version wherever an alias can stand; nobody moves it."""
_VERSION = re.compile(r"v\d{6,}")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SHARD = re.compile(r".+/\d{6,}\.parquet")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def is_version(text: str) -> bool:
    """`text` is spelled as a version: v and at least six digits."""
    return _VERSION.fullmatch(text) is not None


def spell_version(number: int) -> str:
    """The version with this number."""
    return f"v{number:06d}"


def number_version(version: str) -> int:
    """The number in a version; versions are ordered by it."""
    return int(version[1:])


def spell_shard(table: str, number: int) -> str:
    """The path of a table's shard with this number."""
    return f"{table}/{number:06d}.parquet"


def number_shard(path: str) -> int:
    """The number in a shard's path."""
    return int(path.rpartition("/")[2].removesuffix(".parquet"))


def shards_of(table: str, paths: Iterable[str]) -> list[str]:
    """The shards of a table among `paths`, in their order."""
    found = [path for path in paths if _SHARD.fullmatch(path) and path.rpartition("/")[0] == table]
    return sorted(found, key=number_shard)


class Layout:
    """Keys below one prefix."""

    def __init__(self, prefix: str):
        self._prefix = prefix

    def path(self, *parts: str) -> str:
        """`parts` below the prefix; no slash at the end."""
        return "/".join(part for part in (self._prefix, *parts) if part)

    def folder(self, kind: str, name: str, version: str | None = None) -> str:
        """The folder of a name, or of one of its versions, with a slash at the end.

        Raises:
            InvalidInput: one of them is not spelled as a reference spells it.
        """
        if kind not in KINDS or not _NAME.fullmatch(name):
            raise InvalidInput(
                f"{kind}/{name} is not a place in the store. The kind is one of {', '.join(KINDS)}; the name has up to "
                "63 of a-z, 0-9 and -."
            )
        if version is None:
            return self.path(kind, name) + "/"
        if not is_version(version):
            raise InvalidInput(f"{version!r} is not a version. Write v and at least six digits, for instance v000001.")
        return self.path(kind, name, version) + "/"

    def manifest(self, kind: str, name: str, version: str) -> str:
        """The key of a version's manifest."""
        return self.folder(kind, name, version) + MANIFEST

    def hold(self, kind: str, name: str, version: str, *, by: str = "") -> str:
        """The key under which version `by` says that it uses bytes of `version`; without `by` their common prefix."""
        return f"{self.folder(kind, name, version)}{HOLDS}/" + (f"{by}.json" if by else "")

    def alias(self, kind: str, name: str, alias: str) -> str:
        """The key of an alias.

        Raises:
            InvalidInput: `alias` cannot be told from a version, or uses a character outside the allowed ones.
        """
        if alias == LATEST or is_version(alias) or not _NAME.fullmatch(alias):
            raise InvalidInput(
                f"{alias!r} cannot be an alias. Use up to 63 of a-z, 0-9 and -, but not {LATEST!r} or a version number."
            )
        return f"{self.folder(kind, name)}aliases/{alias}.json"

    def output(self, key: str) -> str:
        """The key under which a stage's output is remembered."""
        if not _KEY.fullmatch(key):
            raise InvalidInput(f"{key[:200]!r} is not an output key. Use up to 200 letters, digits and ._-")
        return self.path("outputs", f"{key}.json")

    def run(self, run_id: str) -> str:
        """The folder of running work; no slash at the end."""
        if not _KEY.fullmatch(run_id):
            raise InvalidInput(f"{run_id[:200]!r} is not a run id. Use up to 200 letters, digits and ._-")
        return self.path("runs", run_id)
