"""The connection to an S3 server: one client, its retries within a deadline, and what went wrong in words.

Goes in: `S3Settings` and requests. Comes out: replies and their bodies, or one of the store's errors. This module does
not know what is asked for.
"""

import contextlib
import functools
import logging
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self, TypeVar

from mint_lib.errors import InvalidInput
from mint_lib.storage.faults import Fault, explain_fault
from mint_lib.storage.settings import S3Settings

if TYPE_CHECKING:
    import pyarrow.fs

logger = logging.getLogger(__name__)
T = TypeVar("T")
CHUNK_BYTES = 2**20
MIN_WINDOW_BYTES = 2**16
"""A body that brings less than this within the read timeout (half of the deadline) counts as stalled."""
FIRST_PAUSE_SECONDS = 0.05
MAX_PAUSE_SECONDS = 2.0
MIN_ATTEMPTS = 2
"""However slow the first one was: it also pays for making the client."""


class Connection:
    """One bucket. Every request is tried again, if what hindered it can pass by itself, until the deadline."""

    def __init__(self, settings: S3Settings):
        self.settings = settings
        self._connecting = threading.Lock()

    def __reduce__(self) -> tuple[type[Self], tuple[S3Settings]]:
        return type(self), (self.settings,)

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
        if settings.ca_bundle is not None and not settings.ca_bundle.exists():
            raise InvalidInput(
                f"MINT_S3_CA_BUNDLE={settings.ca_bundle}: there is no such file. Give the PEM file of the authority "
                f"that signed the certificate of {settings.endpoint_url}, or leave it out to trust the usual ones."
            )
        config = Config(
            signature_version="s3v4",
            retries={"total_max_attempts": 1},
            connect_timeout=min(5.0, settings.retry_seconds),
            read_timeout=self._read_timeout,
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

    @property
    def _read_timeout(self) -> float:
        return max(1.0, self.settings.retry_seconds / 2)

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
        from botocore.exceptions import BotoCoreError, CredentialRetrievalError, HTTPClientError
        from botocore.parsers import ResponseParserError

        client = self.client
        try:
            # botocore reads the body of an error in a place where it does not translate what goes wrong meanwhile.
            with self._body_errors():
                return getattr(client, operation)(Bucket=self.settings.bucket, **arguments)
        except ResponseParserError as error:
            raise HTTPClientError(error="the reply is not what the operation replies") from error
        except OSError as error:
            if isinstance(error, BotoCoreError):
                raise
            # No argument here is a file: what cannot be read is a file that the credential chain names.
            raise CredentialRetrievalError(provider="the configured file", error_msg=str(error)) from error

    def _receive(self, reply: dict[str, Any]) -> Iterator[bytes]:
        """The body of a reply as it comes in.

        Raises:
            BotoCoreError: the connection ends early, stalls, or brings so little that it might as well be stalled.
        """
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError

        body, expected = reply["Body"], reply.get("ContentLength")
        size = window_size = 0
        window_ends = time.monotonic() + self._read_timeout
        with self._body_errors():
            while chunk := body._raw_stream.read1(CHUNK_BYTES):
                size += len(chunk)
                window_size += len(chunk)
                yield chunk
                if time.monotonic() > window_ends and size != expected:
                    if window_size < MIN_WINDOW_BYTES:
                        body.close()
                        raise ReadTimeoutError(endpoint_url=self.settings.endpoint_url)
                    window_size, window_ends = 0, time.monotonic() + self._read_timeout
        if expected is not None and size != expected:
            raise IncompleteReadError(actual_bytes=size, expected_bytes=expected)

    @contextlib.contextmanager
    def _body_errors(self) -> Iterator[None]:
        """What urllib3 raises while a body comes in, as what botocore raises elsewhere."""
        from botocore.exceptions import BotoCoreError, ReadTimeoutError, ResponseStreamingError
        from urllib3.exceptions import HTTPError, TimeoutError

        try:
            yield
        except HTTPError as error:
            if isinstance(error, BotoCoreError):
                raise
            if isinstance(error, TimeoutError):
                raise ReadTimeoutError(endpoint_url=self.settings.endpoint_url) from error
            raise ResponseStreamingError(error=error) from error
