"""The S3 edge: objects and files of any size, checked on their way in both directions.

Goes in: keys, bytes and local files. Comes out: the same, or one of the store's errors. Any endpoint that speaks S3
will do; it is named by the environment. This module does not know what a version is.
"""

import base64
import collections
import contextlib
import functools
import hashlib
import itertools
import logging
import os
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from mint_lib.errors import Conflict, IntegrityError, NotFound, StoreError
from mint_lib.storage.connection import Connection
from mint_lib.storage.manifest import FileEntry

logger = logging.getLogger(__name__)
T = TypeVar("T")
PART_BYTES = 16 * 2**20
"""S3 allows parts of 5 MiB to 5 GiB; a few of these in memory stay small beside any model."""
MAX_PARTS = 10_000
"""S3's own limit (Amazon S3 User Guide, multipart upload limits)."""
NUM_TRANSFERS = 4
"""Parts of one file on their way at a time."""
_UPLOAD_TOKEN = "mint-upload"  # noqa: S105 (no secret: it tells a writer that the finished object is its own)


class StoredObject(NamedTuple):
    """One line of a listing."""

    key: str
    size: int
    modified: datetime


class S3(Connection):
    """One bucket. Every method retries what can pass by itself until the deadline, and raises a `StoreError` else."""

    def put(self, key: str, body: bytes) -> FileEntry:
        """Write one object; the server refuses it if its sha256 is not the one computed here."""
        digest = hashlib.sha256(body)
        self._retry(key, "put_object", Key=key, Body=body, ChecksumSHA256=_base64(digest))
        return FileEntry(size=len(body), sha256=digest.hexdigest())

    def put_if(self, key: str, body: bytes, *, etag: str | None, is_ours: Callable[[bytes], bool]) -> str:
        """Write one object if it is still the one with `etag`, or, with None, if there is none yet.

        Returns its new ETag. `is_ours` tells from the object's bytes whether an earlier attempt, whose reply was lost,
        wrote it.

        Raises:
            Conflict: somebody else wrote it first.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        try:
            checksum = _base64(hashlib.sha256(body))
            return self._retry(key, "put_object", Key=key, Body=body, ChecksumSHA256=checksum, **condition)["ETag"]
        except (Conflict, NotFound) as lost:
            try:
                found, found_etag = self.get(key)
                if is_ours(found):
                    return found_etag
            except NotFound:
                logger.info("%s vanished after a lost race", key)
            raise Conflict(f"{self.locate(key)} was written by somebody else first.") from lost

    def put_file(self, key: str, path: Path) -> FileEntry:
        """Write a local file of any size with bounded memory; every part's sha256 is checked by the server.

        Raises:
            IntegrityError: the file changed meanwhile.
        """
        before = path.stat()
        part_bytes = max(PART_BYTES, -(-before.st_size // MAX_PARTS))
        if before.st_size <= part_bytes:
            return self.put(key, path.read_bytes())
        token = secrets.token_hex(16)
        arguments = {"Key": key, "ChecksumAlgorithm": "SHA256", "Metadata": {_UPLOAD_TOKEN: token}}
        upload = self._retry(key, "create_multipart_upload", **arguments)["UploadId"]
        whole = hashlib.sha256()

        def put_part(number: int, body: bytes) -> dict[str, Any]:
            checksum = _base64(hashlib.sha256(body))
            place = {"Key": key, "UploadId": upload, "PartNumber": number}
            reply = self._retry(key, "upload_part", **place, Body=body, ChecksumSHA256=checksum)
            return {"PartNumber": number, "ETag": reply["ETag"], "ChecksumSHA256": checksum}

        def read_parts() -> Iterator[Callable[[], dict[str, Any]]]:
            with path.open("rb") as file:
                for number in itertools.count(1):
                    body = file.read(part_bytes)
                    if not body:
                        return
                    whole.update(body)
                    yield functools.partial(put_part, number, body)

        try:
            parts = list(_run_ahead(read_parts()))
            after = path.stat()
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise IntegrityError(f"{path} changed while it was stored as {self.locate(key)}. Store it again.")
            self._complete_upload(key, upload, parts, token)
        except (OSError, StoreError):
            self._abort_upload(key, upload)
            raise
        return FileEntry(size=before.st_size, sha256=whole.hexdigest())

    def _complete_upload(self, key: str, upload: str, parts: list[dict[str, Any]], token: str) -> None:
        try:
            self._retry(key, "complete_multipart_upload", Key=key, UploadId=upload, MultipartUpload={"Parts": parts})
        except NotFound:
            # A completed upload is forgotten by the server: this is what a retry after a lost reply meets.
            if self._retry(key, "head_object", Key=key)["Metadata"].get(_UPLOAD_TOKEN) != token:
                raise

    def _abort_upload(self, key: str, upload: str) -> None:
        try:
            self._retry(key, "abort_multipart_upload", Key=key, UploadId=upload)
        except StoreError as error:
            logger.warning("an unfinished upload stays until orphans are collected: %s", error)

    def get(self, key: str) -> tuple[bytes, str]:
        """The bytes and the ETag of one small object.

        Raises:
            NotFound: there is no such object.
        """
        data, etag = b"", ""

        def read() -> str:
            nonlocal data, etag
            reply = self._request("get_object", Key=key, ChecksumMode="ENABLED")
            data, etag = b"".join(self._receive(reply)), reply["ETag"]
            # Servers tell the sha256 that an object was written with; one of parts has another form.
            told, found = reply.get("ChecksumSHA256"), _base64(hashlib.sha256(data))
            return "" if told in (None, found) or "-" in told else "its sha256 is not the one it was written with"

        problem = self._read_twice(key, read)
        if problem:
            raise IntegrityError(
                f"{self.locate(key)} is damaged: {problem}. It was not used. Restore it from a backup."
            )
        return data, etag

    def get_verified(self, key: str, entry: FileEntry, sink: IO[bytes]) -> None:
        """Copy one object to `sink`, which must be seekable, checking size and sha256 on the way.

        Raises:
            IntegrityError: the object is missing, or is not what was committed, on two readings.
        """
        read = self._read_whole if entry.size <= PART_BYTES else self._read_parts
        try:
            problem = self._read_twice(key, functools.partial(read, key, entry, sink))
        except NotFound:
            problem = "it is missing"
        if problem:
            raise IntegrityError(
                f"{self.locate(key)} is damaged: {problem}. It was not used. Restore it from a backup, or make the "
                "version again under a new number."
            )

    def _read_twice(self, key: str, read: Callable[[], str]) -> str:
        """What is wrong with an object: what `read` says, which is asked again in case only its way here was bad."""
        problem = self._retry_action(key, read)
        if problem:
            logger.warning("%s: %s; reading it once more", self.locate(key), problem)
            problem = self._retry_action(key, read)
        return problem

    def _read_whole(self, key: str, entry: FileEntry, sink: IO[bytes]) -> str:
        sink.seek(0)
        sink.truncate()
        hasher, size = hashlib.sha256(), 0
        reply = self._request("get_object", Key=key)
        for chunk in self._receive(reply):
            size += len(chunk)
            if size > entry.size:
                reply["Body"].close()
                return f"it is longer than the committed {entry.size} bytes"
            hasher.update(chunk)
            sink.write(chunk)
        if size != entry.size:
            return f"it has {size} bytes where {entry.size} were committed"
        return _compare(hasher, entry)

    def _read_parts(self, key: str, entry: FileEntry, sink: IO[bytes]) -> str:
        """Several ranges at a time, each retried for itself: a cut connection costs one of them."""
        sink.seek(0)
        sink.truncate()
        hasher = hashlib.sha256()

        def read_part(begin: int) -> bytes | str:
            end = min(begin + PART_BYTES, entry.size)
            try:
                reply = self._request("get_object", Key=key, Range=f"bytes={begin}-{end - 1}")
            except self.client.exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 416:
                    raise
                return f"it ends before byte {begin} of the committed {entry.size}"
            size = int(reply.get("ContentRange", "").rpartition("/")[2] or reply["ContentLength"])
            if size != entry.size:
                reply["Body"].close()
                return f"it has {size} bytes where {entry.size} were committed"
            return b"".join(self._receive(reply))

        begins = range(0, entry.size, PART_BYTES)
        tasks = (functools.partial(self._retry_action, key, functools.partial(read_part, begin)) for begin in begins)
        with contextlib.closing(_run_ahead(tasks)) as parts:
            for part in parts:
                if isinstance(part, str):
                    return part
                hasher.update(part)
                sink.write(part)
        return _compare(hasher, entry)

    def get_file(self, key: str, entry: FileEntry, target: Path) -> None:
        """Copy one object to the local file `target`, which appears under its name when it is whole and checked.

        Raises:
            IntegrityError: the object is not what was committed.
            StoreError: the local folder cannot be written.
        """
        part = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("w+b") as sink:
                self.get_verified(key, entry, sink)
            os.replace(part, target)
        except StoreError:
            raise
        except OSError as error:
            advice = "Free some space there or choose another folder."
            raise StoreError(f"{target} cannot be written ({error.strerror}). {advice}") from error
        finally:
            part.unlink(missing_ok=True)

    def list_objects(self, prefix: str) -> Iterator[StoredObject]:
        """Every object whose key starts with `prefix`, in the order of keys."""
        for page in self._list_pages(prefix, delimiter=""):
            for item in page.get("Contents", ()):
                yield StoredObject(item["Key"], item["Size"], item["LastModified"].astimezone(UTC))

    def list_folders(self, prefix: str) -> Iterator[str]:
        """Names of the folders right below `prefix`, which ends in a slash."""
        for page in self._list_pages(prefix, delimiter="/"):
            for item in page.get("CommonPrefixes", ()):
                yield item["Prefix"].removeprefix(prefix).rstrip("/")

    def _list_pages(self, prefix: str, *, delimiter: str) -> Iterator[dict[str, Any]]:
        more: dict[str, str] = {}
        while True:
            page = self._retry(prefix, "list_objects_v2", Prefix=prefix, Delimiter=delimiter, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        """Remove one object; one that is not there is no error."""
        self._retry(key, "delete_object", Key=key)

    def abort_uploads(self, prefix: str, *, before: datetime) -> int:
        """Forget unfinished multipart uploads below `prefix` that began before a time; returns how many."""
        stale: dict[str, str] = {}
        more: dict[str, str] = {}
        while True:
            page = self._retry(prefix, "list_multipart_uploads", Prefix=prefix, **more)
            found = page.get("Uploads", ())
            stale |= {item["UploadId"]: item["Key"] for item in found if item["Initiated"].astimezone(UTC) < before}
            # SeaweedFS gives no marker of the key and goes by the upload's alone.
            markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
            following = {ours: page[theirs] for ours, theirs in markers.items() if page.get(theirs)}
            if not page.get("IsTruncated") or following == more:
                break
            more = following
        for upload, key in stale.items():
            self._retry(key, "abort_multipart_upload", Key=key, UploadId=upload)
        return len(stale)

    def create_bucket(self) -> None:
        """Create the bucket if it is missing."""
        try:
            self._retry("", "create_bucket")
        except Conflict:
            logger.debug("bucket %s exists", self.settings.bucket)


def _run_ahead(tasks: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """The results of `tasks` in their order; `NUM_TRANSFERS` of them run at a time, and one more is taken.

    Closing it, or a task that fails, waits for those that run.
    """
    waiting: collections.deque[Future[T]] = collections.deque()
    with ThreadPoolExecutor(max_workers=NUM_TRANSFERS) as pool:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > NUM_TRANSFERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _compare(hasher: "hashlib._Hash", entry: FileEntry) -> str:
    found = hasher.hexdigest()
    return "" if found == entry.sha256 else f"its sha256 is {found} where {entry.sha256} was committed"


def _base64(digest: "hashlib._Hash") -> str:
    return base64.b64encode(digest.digest()).decode()
