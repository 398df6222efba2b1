"""The store: immutable versions and movable aliases in one S3 bucket.

    <prefix>/<kind>/<name>/<version>/claim.json       first: the number belongs to one writer
                                     <data files>     each with its sha256, `record.json` among them
                                     <table>/<shard>.parquet    rows, in files of bounded size
                                     holds/<version>.json       a later version was built on this one
                                     manifest.json    last: from here on the version exists
    <prefix>/<kind>/<name>/aliases/<alias>.json       one reference and the log of its moves
    <prefix>/outputs/<key>.json                       what a stage made from these inputs before
    <prefix>/runs/<run id>/                           checkpoints of running work

Goes in: files and a `StageRecord`. Comes out: a `Reference`, and whatever it refers to. Numbers may have gaps. An
empty manifest marks a number whose writer died or whose version was removed. The store does not know what the files
mean.
"""

import functools
import logging
import re
import secrets
from typing import TYPE_CHECKING, Self, cast

from mint_lib.errors import Conflict, IntegrityError, InvalidInput, NotFound
from mint_lib.records import KINDS, Kind, Reference
from mint_lib.storage import aliases, orphans
from mint_lib.storage.aliases import Alias
from mint_lib.storage.client import S3
from mint_lib.storage.layout import LATEST, Layout, is_version, number_version
from mint_lib.storage.manifest import MANIFEST
from mint_lib.storage.orphans import Orphan
from mint_lib.storage.reader import VersionReader, read_manifest
from mint_lib.storage.removal import Removed, remove_version, stop_removal
from mint_lib.storage.retention import OldVersion, list_old_versions, remove_old_version
from mint_lib.storage.run_folder import RunFolder
from mint_lib.storage.settings import S3Settings
from mint_lib.storage.verification import Verification, verify_version
from mint_lib.storage.writer import VersionWriter

if TYPE_CHECKING:
    import pyarrow.fs

logger = logging.getLogger(__name__)
_SHORT_REFERENCE = re.compile(r"(?P<kind>[a-z]+)/(?P<name>[^@#/]+)(@(?P<place>[^@#]+))?")


class Store(VersionReader):
    """Versions and aliases at one endpoint. It pickles, and connects at its first request."""

    def __init__(self, settings: S3Settings):
        super().__init__(S3(settings), Layout(settings.prefix))
        self.settings = settings

    def __reduce__(self) -> tuple[type["Store"], tuple[S3Settings]]:
        return Store, (self.settings,)

    @classmethod
    def from_environment(cls) -> Self:
        """The store that `MINT_S3_*` names.

        Raises:
            InvalidInput: the environment names none, or a value is not allowed.
        """
        return cls(S3Settings.from_environment())

    def write(
        self, kind: Kind, name: str, *, version: str | None = None, base: Reference | None = None
    ) -> VersionWriter:
        """A writer of a new version: of the next free number, or of `version`.

        A file whose bytes `base`, an earlier version of the same kind and name, has already is not stored again.

        Raises:
            InvalidInput: the kind, the name or the version is not spelled as a reference spells it, or the base is one
                of another kind or name.
            NotFound: the base does not exist.
        """
        self._layout.folder(kind, name, version)
        if base is not None and (base.kind, base.name) != (kind, name):
            raise InvalidInput(f"A version of {kind}/{name} cannot build on {base}. Give one of the same name.")
        return VersionWriter(self._s3, self._layout, kind, name, version, self._manifest(base) if base else None)

    def list_names(self, kind: Kind) -> list[str]:
        """Names of `kind` that somebody has begun to write, sorted."""
        if kind not in KINDS:
            raise InvalidInput(f"{kind!r} is not a kind. Use one of: {', '.join(KINDS)}.")
        return sorted(self._s3.list_folders(self._layout.path(kind) + "/"))

    def list_versions(self, kind: Kind, name: str) -> list[str]:
        """Committed versions, oldest number first."""
        folder = self._layout.folder(kind, name)
        found = []
        for item in self._s3.list_objects(folder):
            version, _, path = item.key.removeprefix(folder).partition("/")
            if path == MANIFEST and item.size and is_version(version):
                found.append(version)
        return sorted(found, key=number_version)

    def resolve(self, text: str) -> Reference:
        """The reference that `text` means: in full, `kind/name@v000001`, `kind/name@alias`, or `kind/name` (newest).

        Raises:
            InvalidInput: `text` is none of these.
            NotFound: there is no such version or alias.
            IntegrityError: a full reference has another digest than the version.
        """
        if "#" in text:
            reference = Reference.parse(text)
            self._manifest(reference)
            return reference
        match = _SHORT_REFERENCE.fullmatch(text.strip())
        if match is None or match["kind"] not in KINDS:
            raise InvalidInput(
                f"{text[:200]!r} is not a reference. Write kind/name, kind/name@alias or kind/name@v000001 with kind "
                f"one of {', '.join(KINDS)}; `mint ls` prints them."
            )
        kind, name, place = cast(Kind, match["kind"]), match["name"], match["place"] or LATEST
        if place == LATEST:
            versions = self.list_versions(kind, name)
            if not versions:
                where = self._s3.locate(self._layout.folder(kind, name))
                raise NotFound(f"{kind}/{name} has no version at {where}. `mint ls` shows what exists.")
            place = versions[-1]
        if not is_version(place):
            alias = self.alias(kind, name, place)
            if alias is None:
                raise NotFound(f"{kind}/{name} has no alias {place!r}. `mint ls {kind}` shows what exists.")
            return alias.reference
        manifest, _ = read_manifest(self._s3, self._layout, kind, name, place)
        return Reference(kind=manifest.kind, name=manifest.name, version=place, digest=manifest.digest)

    def alias(self, kind: Kind, name: str, alias: str) -> Alias | None:
        """Where `alias` of `kind/name` points; None if it was never set."""
        return aliases.read_alias(self._s3, self._layout.alias(kind, name, alias))

    def move_alias(self, alias: str, to: Reference, *, who: str, why: str, expected: Reference | None) -> Alias:
        """Point `alias` of `to`'s kind and name at `to`, if it points at `expected` (None: at nothing) until then.

        A removal of `to` that has begun is stopped.

        Raises:
            NotFound: `to` does not exist.
            Conflict: the alias points elsewhere, or somebody else moved it first.
        """
        self._manifest(to)
        key = self._layout.alias(to.kind, to.name, alias)
        stop = functools.partial(stop_removal, self._s3, self._layout, to)
        moved = aliases.swap_alias(self._s3, key, to, who=who, why=why, expected=expected, check_target=stop)
        logger.info("%s/%s@%s moved from %s to %s", to.kind, to.name, alias, expected, to)
        return moved

    def find_output(self, key: str) -> Reference | None:
        """What `remember_output` was told under `key`; None if nothing, or if that version is gone or damaged."""
        try:
            reference = Reference.parse(self._s3.get(self._layout.output(key))[0].decode())
            self._manifest(reference)
        except NotFound:
            return None
        except (IntegrityError, ValueError) as error:
            logger.warning("a remembered output is not usable and will be made again: %s", error)
            return None
        return reference

    def remember_output(self, key: str, reference: Reference) -> None:
        """Note that the inputs whose digest is `key` give `reference`."""
        self._s3.put(self._layout.output(key), str(reference).encode())

    def verify(self, reference: Reference, *, with_lineage: bool = False) -> Verification:
        """Read every byte of a version again; with `with_lineage` of those that it was made from, too.

        Raises:
            StoreUnreachable: the server does not answer: nothing is known then.
        """
        return verify_version(self._s3, self._layout, reference, with_lineage=with_lineage)

    def list_old_versions(self, kind: Kind, name: str, *, keep_last: int) -> list[OldVersion]:
        """Every version of a name but the newest `keep_last`, oldest first, with what still needs it.

        Raises:
            InvalidInput: `keep_last` is not positive, or kind and name are not spelled as a reference spells them.
        """
        return list_old_versions(self._s3, self._layout, kind, name, keep_last=keep_last)

    def remove_old_version(self, old: OldVersion) -> Removed:
        """Take an old version away that nobody needs. For an operator's command only.

        Raises:
            InvalidInput: something needs it.
            NotFound: there is no such version.
            Conflict: at the same time somebody else removed it, or moved an alias to it.
        """
        return remove_old_version(self._s3, self._layout, old)

    def remove(self, reference: Reference) -> Removed:
        """Take a version away, but for the bytes that other versions use. For an operator's command only.

        Raises:
            InvalidInput: an alias points at it, or would after a rollback.
            NotFound: there is no such version.
            Conflict: at the same time somebody else removed it, or moved an alias to it.
        """
        return remove_version(self._s3, self._layout, reference)

    def list_orphans(self) -> list[Orphan]:
        """What failed writers left behind; a live writer that has not committed yet is among it."""
        return orphans.list_orphans(self._s3, self._layout)

    def collect_orphans(self, *, older_than_seconds: float) -> list[Orphan]:
        """Delete the orphans in which nothing was written for so long; returns them. For an operator's command only."""
        return orphans.collect_orphans(self._s3, self._layout, older_than_seconds=older_than_seconds)

    def open_run(self, run_id: str) -> RunFolder:
        """The folder of a run's working files, which nothing but that run reads.

        Raises:
            InvalidInput: `run_id` uses a character outside the allowed ones.
        """
        return RunFolder(self._s3, self._layout, run_id)

    def runs_path(self, run_id: str) -> str:
        """`bucket/prefix/runs/<run_id>`: the folder of running work, as `arrow_filesystem` takes it."""
        return f"{self.settings.bucket}/{self._layout.run(run_id)}"

    def arrow_filesystem(self) -> "pyarrow.fs.S3FileSystem":
        """The same server as a pyarrow filesystem, with the credentials that boto3 finds at this moment.

        Raises:
            AccessDenied: there are no credentials.
        """
        return self._s3.arrow_filesystem()

    @property
    def location(self) -> str:
        """Where the store is, for people: bucket, prefix and endpoint, without credentials."""
        return f"s3://{self.settings.bucket}/{self.settings.prefix} at {self.settings.endpoint_url}"

    def check_access(self) -> None:
        """Prove on an object of its own that this store can be written, read, written on condition, and deleted from.

        Raises:
            StoreError: what is missing, in the words of the failed request; IntegrityError if the server ignores the
                condition, so that two writers could overwrite each other.
        """
        key = self._layout.path("checks", f"{secrets.token_hex(8)}.json")
        self._s3.put_if(key, b"1", etag=None, is_ours=lambda found: found == b"1")
        try:
            self._s3.put_if(key, b"2", etag=None, is_ours=lambda found: found == b"2")
        except Conflict:
            logger.debug("%s honours If-None-Match", self.location)
        else:
            raise IntegrityError(f"{self.location} ignores If-None-Match. Use a store with conditional writes.")
        finally:
            self._s3.delete(key)
