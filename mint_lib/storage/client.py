"""The S3 edge: one client, its retries, and what went wrong in words.

Goes in: keys and bytes. Comes out: bytes, or one of the store's errors. Any endpoint that speaks S3 will do; it is
named by the environment. This module does not know what a version is.
"""

import base64
import functools
import hashlib
import logging
import os
import random
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

from mint_lib.errors import Conflict, IntegrityError, NotFound, StoreError
from mint_lib.storage.faults import Fault, explain_fault
from mint_lib.storage.manifest import FileEntry
from mint_lib.storage.settings import S3Settings

if TYPE_CHECKING:
    import pyarrow.fs

logger = logging.getLogger(__name__)
T = TypeVar("T")
PART_BYTES = 16 * 2**20
"""S3 allows parts of 5 MiB to 5 GiB; four of these in memory stay small beside any model."""
MAX_PARTS = 10_000
"""S3's own limit (Amazon S3 User Guide, multipart upload limits)."""
CHUNK_BYTES = 2**20
FIRST_PAUSE_SECONDS = 0.05
MAX_PAUSE_SECONDS = 2.0
MIN_ATTEMPTS = 2
"""However slow the first one was: it also pays for making the client."""


class StoredObject(NamedTuple):
    """One line of a listing."""

    key: str
    size: int
    modified: datetime


class S3:
    """One bucket. Every method retries what can pass by itself until the deadline, and raises a `StoreError` else."""

    def __init__(self, settings: S3Settings):
        self.settings = settings
        self._connecting = threading.Lock()

    def __reduce__(self) -> tuple[type["S3"], tuple[S3Settings]]:
        return S3, (self.settings,)

    @functools.cached_property
    def _session(self) -> Any:
        import boto3

        return boto3.session.Session()

    @functools.cached_property
    def client(self) -> Any:
        """A boto3 client that never retries by itself, so that the deadline is ours."""
        # A client serves many threads, but a session must not make two at once (boto3 guide, multithreading).
        with self._connecting:
            return self._connect()

    def _connect(self) -> Any:
        from botocore.config import Config

        settings = self.settings
        config = Config(
            signature_version="s3v4",
            retries={"total_max_attempts": 1},
            connect_timeout=min(5.0, settings.retry_seconds),
            read_timeout=max(1.0, settings.retry_seconds / 2),
            s3={"addressing_style": "path" if settings.path_style else "virtual"},
            # boto3's default trailers break some servers (aws-cli issue 9214); every PUT here carries its own sha256.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            proxies={} if settings.is_loopback else None,
        )
        return self._session.client(
            "s3",
            endpoint_url=settings.endpoint_url,
            region_name=settings.region,
            verify=str(settings.ca_bundle) if settings.ca_bundle else None,
            config=config,
        )

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
        """Write a local file of any size with bounded memory; every part's sha256 is checked by the server."""
        size = path.stat().st_size
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
        if size <= part_bytes:
            return self.put(key, path.read_bytes())
        whole, checksums = hashlib.sha256(), []
        with path.open("rb") as file:
            while part := file.read(part_bytes):
                whole.update(part)
                checksums.append(_base64(hashlib.sha256(part)))
        upload = self._retry(key, "create_multipart_upload", Key=key, ChecksumAlgorithm="SHA256")["UploadId"]

        def put_part(index: int) -> dict[str, Any]:
            with path.open("rb") as file:
                file.seek(index * part_bytes)
                body = file.read(part_bytes)
            place = {"Key": key, "UploadId": upload, "PartNumber": index + 1}
            reply = self._retry(key, "upload_part", **place, Body=body, ChecksumSHA256=checksums[index])
            return {"PartNumber": index + 1, "ETag": reply["ETag"], "ChecksumSHA256": checksums[index]}

        try:
            with ThreadPoolExecutor(max_workers=4) as pool:
                parts = list(pool.map(put_part, range(len(checksums))))
            self._complete_upload(key, upload, parts, size)
        except StoreError:
            self._abort_upload(key, upload)
            raise
        return FileEntry(size=size, sha256=whole.hexdigest())

    def _complete_upload(self, key: str, upload: str, parts: list[dict[str, Any]], size: int) -> None:
        try:
            self._retry(key, "complete_multipart_upload", Key=key, UploadId=upload, MultipartUpload={"Parts": parts})
        except NotFound:
            # A completed upload is forgotten by the server: this is what a retry after a lost reply meets.
            if self._retry(key, "head_object", Key=key)["ContentLength"] != size:
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

        def read() -> tuple[bytes, str]:
            reply = self._request("get_object", Key=key)
            return reply["Body"].read(), reply["ETag"]

        return self._retry_action(key, read)

    def get_verified(self, key: str, entry: FileEntry, sink: IO[bytes]) -> None:
        """Copy one object to `sink`, which must be seekable, checking size and sha256 on the way.

        Raises:
            IntegrityError: the object is missing, or is not what was committed, on two readings.
        """

        def read() -> str:
            sink.seek(0)
            sink.truncate()
            hasher, size = hashlib.sha256(), 0
            body = self._request("get_object", Key=key)["Body"]
            while chunk := body.read(CHUNK_BYTES):
                size += len(chunk)
                if size > entry.size:
                    body.close()
                    return f"it is longer than the committed {entry.size} bytes"
                hasher.update(chunk)
                sink.write(chunk)
            if size != entry.size:
                return f"it has {size} bytes where {entry.size} were committed"
            if hasher.hexdigest() != entry.sha256:
                return f"its sha256 is {hasher.hexdigest()} where {entry.sha256} was committed"
            return ""

        try:
            problem = self._retry_action(key, read)
            if problem:
                logger.warning("%s: %s; reading it once more", self.locate(key), problem)
                problem = self._retry_action(key, read)
        except NotFound:
            problem = "it is missing"
        if problem:
            raise IntegrityError(
                f"{self.locate(key)} is damaged: {problem}. It was not used. Restore it from a backup, or make the "
                "version again under a new number."
            )

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
        found = self._retry(prefix, "list_multipart_uploads", Prefix=prefix).get("Uploads", ())
        stale = [item for item in found if item["Initiated"].astimezone(UTC) < before]
        for item in stale:
            self._retry(item["Key"], "abort_multipart_upload", Key=item["Key"], UploadId=item["UploadId"])
        return len(stale)

    def create_bucket(self) -> None:
        """Create the bucket if it is missing."""
        try:
            self._retry("", "create_bucket")
        except Conflict:
            logger.debug("bucket %s exists", self.settings.bucket)

    def arrow_filesystem(self) -> "pyarrow.fs.S3FileSystem":
        """This server as a pyarrow filesystem.

        Credentials that expire, as those of a workload identity, are left to Arrow's own AWS client, which finds them
        in the same places and renews them: a training outlives them.

        Raises:
            AccessDenied: there are no credentials.
        """
        from botocore.credentials import RefreshableCredentials
        from botocore.exceptions import NoCredentialsError
        from pyarrow import fs

        credentials = self._session.get_credentials()
        if credentials is None:
            raise self._explain(NoCredentialsError(), "").error
        keys: dict[str, str] = {}
        if not isinstance(credentials, RefreshableCredentials):
            keys = {"access_key": credentials.access_key, "secret_key": credentials.secret_key}
            if credentials.token:
                keys["session_token"] = credentials.token
        url = urllib.parse.urlsplit(self.settings.endpoint_url)
        return fs.S3FileSystem(
            **keys,
            region=self.settings.region,
            scheme=url.scheme,
            endpoint_override=url.netloc,
            force_virtual_addressing=not self.settings.path_style,
            tls_ca_file_path=str(self.settings.ca_bundle) if self.settings.ca_bundle else None,
        )

    def locate(self, key: str) -> str:
        """`key` as a person finds it."""
        return f"s3://{self.settings.bucket}/{key}"

    def _retry(self, subject: str, operation: str, **arguments: Any) -> Any:
        """The reply of one request about the key (or prefix) `subject`, repeated while repeating can help."""
        return self._retry_action(subject, lambda: self._request(operation, **arguments))

    def _retry_action(self, subject: str, action: Callable[[], T]) -> T:
        from botocore.exceptions import BotoCoreError, ClientError

        give_up = time.monotonic() + self.settings.retry_seconds
        pause = FIRST_PAUSE_SECONDS
        num_attempts = 0
        while True:
            num_attempts += 1
            try:
                return action()
            except (BotoCoreError, ClientError) as cause:
                fault = self._explain(cause, subject)
                wait = random.uniform(pause / 2, pause)
                is_late = time.monotonic() + wait > give_up and num_attempts >= MIN_ATTEMPTS
                if not fault.can_pass or is_late:
                    raise fault.error from cause
                logger.info("%s; trying again", type(cause).__name__)
                time.sleep(wait)
                pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def _explain(self, cause: Exception, subject: str) -> Fault:
        return explain_fault(cause, endpoint=self.settings.endpoint_url, bucket=self.settings.bucket, key=subject)

    def _request(self, operation: str, **arguments: Any) -> Any:
        return getattr(self.client, operation)(Bucket=self.settings.bucket, **arguments)


def _base64(digest: "hashlib._Hash") -> str:
    return base64.b64encode(digest.digest()).decode()
