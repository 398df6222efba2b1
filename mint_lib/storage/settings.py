"""Where the store lies, read from the environment and from nowhere else.

Goes in: `MINT_S3_*` variables. Comes out: validated `S3Settings`. This module knows no secret: boto3's own chain finds
credentials.
"""

import ipaddress
import os
import re
import urllib.parse
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mint_lib.errors import InvalidInput

_ENVIRONMENT_PREFIX = "MINT_S3_"
_USER_INFO = re.compile(r"//[^/]*@")


class S3Settings(BaseModel):
    """Where the store lies. Credentials are not here: boto3's own chain finds them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    endpoint_url: str
    """For instance `http://127.0.0.1:8333` or `https://s3.eu-central-1.amazonaws.com`."""
    bucket: str = Field(default="mint", min_length=1)
    prefix: str = ""
    """Key prefix inside the bucket, without slashes at its ends."""
    region: str = "us-east-1"
    """Part of the signature; most self-hosted servers accept any."""
    path_style: bool = True
    """`endpoint/bucket/key` rather than `bucket.endpoint/key`; self-hosted servers need it."""
    ca_bundle: Path | None = None
    """PEM file of the authority that signed the endpoint's certificate; None trusts the usual ones."""
    deadline_seconds: float | None = Field(default=None, gt=0)
    """How long one request is retried. None: 20 on this machine's loopback, 60 elsewhere."""

    @field_validator("endpoint_url")
    @classmethod
    def _is_a_url(cls, value: str) -> str:
        url = urllib.parse.urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname or url.username:
            raise ValueError("write http://host:port or https://host, without credentials")
        return value.rstrip("/")

    @field_validator("prefix")
    @classmethod
    def _has_no_outer_slash(cls, value: str) -> str:
        return value.strip("/")

    @classmethod
    def from_environment(cls) -> Self:
        """Settings from `MINT_S3_ENDPOINT_URL`, `MINT_S3_BUCKET` and so on: one variable per field.

        Raises:
            InvalidInput: the endpoint is not set, or a variable's value is not allowed.
        """
        found = {name: os.environ.get(_ENVIRONMENT_PREFIX + name.upper()) for name in cls.model_fields}
        values = {name: value for name, value in found.items() if value}
        if "endpoint_url" not in values:
            raise InvalidInput(
                "No store is configured: MINT_S3_ENDPOINT_URL is not set. Set it to the address of an S3 server, or "
                "use `mint run`, which starts one on this machine. `mint doctor` says what is missing."
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [
                f"{_ENVIRONMENT_PREFIX}{str(item['loc'][0]).upper()}={_USER_INFO.sub('//***@', str(item['input']))}: "
                f"{item['msg']}."
                for item in error.errors(include_url=False)
            ]
            raise InvalidInput("The store's settings are not valid. " + " ".join(problems)) from None

    @property
    def is_loopback(self) -> bool:
        """The server is on this machine."""
        host = urllib.parse.urlsplit(self.endpoint_url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def retry_seconds(self) -> float:
        """`deadline_seconds`, or its default for this endpoint."""
        return self.deadline_seconds or (20.0 if self.is_loopback else 60.0)
