"""The folder of one run's working files, which come and go while it runs.

Goes in: paths below `<prefix>/runs/<run id>/`, bytes and local files. Comes out: what lies there. This module does not
know what the files mean, nor when several of them belong together.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from mint_lib.storage.client import S3, StoredObject
from mint_lib.storage.layout import Layout
from mint_lib.storage.manifest import FileEntry

_END_OF_TIME = datetime.max.replace(tzinfo=UTC)


class RunFolder:
    """One run's folder. Its methods raise as those of `S3`, and may be called from several threads."""

    def __init__(self, s3: S3, layout: Layout, run_id: str):
        self._s3 = s3
        self._root = layout.run(run_id) + "/"

    def put_file(self, path: str, local_path: Path) -> FileEntry:
        """Copy a local file of any size to `path`; the server checks its sha256."""
        return self._s3.put_file(self._root + path, local_path)

    def put(self, path: str, data: bytes) -> None:
        """Write a small object, over one that is there."""
        self._s3.put(self._root + path, data)

    def put_once(self, path: str, data: bytes) -> None:
        """Write a small object where there is none.

        Raises:
            Conflict: there is one already, with other bytes.
        """
        self._s3.put_if(self._root + path, data, etag=None, is_ours=lambda found: found == data)

    def get(self, path: str) -> bytes:
        """The bytes of a small object.

        Raises:
            NotFound: there is none.
        """
        return self._s3.get(self._root + path)[0]

    def get_file(self, path: str, entry: FileEntry, target: Path) -> None:
        """Copy an object to a local file, which appears when it is whole and checked.

        Raises:
            IntegrityError: the object is missing or is not `entry`.
            StoreError: the local file cannot be written.
        """
        self._s3.get_file(self._root + path, entry, target)

    def list_objects(self, prefix: str) -> Iterator[StoredObject]:
        """Every object whose path starts with `prefix`, in the order of paths; `key` is the path."""
        for item in self._s3.list_objects(self._root + prefix):
            yield item._replace(key=item.key.removeprefix(self._root))

    def delete(self, path: str) -> None:
        """Remove one object; one that is not there is no error."""
        self._s3.delete(self._root + path)

    def abort_uploads(self, prefix: str) -> None:
        """Forget unfinished uploads of objects whose path starts with `prefix`."""
        self._s3.abort_uploads(self._root + prefix, before=_END_OF_TIME)

    def locate(self, path: str) -> str:
        """`path` as a person finds it."""
        return self._s3.locate(self._root + path)
