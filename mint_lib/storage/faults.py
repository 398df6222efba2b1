"""What a failed S3 request means: one of the store's errors in words, and whether trying again can help.

Goes in: an exception of botocore. Comes out: a `Fault`. This module sends no request.
"""

from typing import Any, NamedTuple

from mint_lib.errors import AccessDenied, Conflict, IntegrityError, NotFound, StoreError, StoreUnreachable

_ACCESS_CODES = frozenset(
    (
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
    )
)
_REGION_CODES = frozenset(("AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"))
_SKEW_CODES = frozenset(("RequestTimeTooSkewed", "RequestExpired"))
_TAKEN_CODES = frozenset(("BucketAlreadyExists", "BucketAlreadyOwnedByYou", "PreconditionFailed"))
_DAMAGE_CODES = frozenset(("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"))
_BUSY_CODES = frozenset(("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"))


class Fault(NamedTuple):
    """A failed request, explained."""

    error: StoreError
    can_pass: bool
    """The same request may succeed a moment later."""


def explain_fault(cause: Exception, *, endpoint: str, bucket: str, key: str) -> Fault:
    """`cause`, which botocore raised for a request about `key`, as an error a user can act on."""
    from botocore import exceptions

    place = f"s3://{bucket}/{key} at {endpoint}"
    if isinstance(cause, exceptions.ClientError):
        if cause.operation_name.startswith("AssumeRole"):
            return _explain_role(cause, place=place)
        return _explain_reply(cause.response, place=place, bucket=bucket, endpoint=endpoint)
    if isinstance(cause, exceptions.SSLError):
        advice = "Name the authority's PEM file in MINT_S3_CA_BUNDLE."
        return Fault(StoreUnreachable(f"The certificate of {endpoint} is not trusted ({cause}). {advice}"), False)
    if isinstance(cause, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        return Fault(_deny(place, "no credentials were found"), False)
    if isinstance(cause, (exceptions.CredentialRetrievalError, exceptions.ProfileNotFound)):
        return Fault(_deny(place, str(cause)), False)
    if isinstance(cause, (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError)):
        return Fault(_miss(place, f"no whole answer ({type(cause).__name__})"), True)
    return Fault(StoreError(f"{place}: the request cannot be sent: {cause}"), False)


def _explain_reply(reply: Any, *, place: str, bucket: str, endpoint: str) -> Fault:
    code = str(reply.get("Error", {}).get("Code", ""))
    status = int(reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    told = f"HTTP {status} {code}".strip()
    if code in _SKEW_CODES:
        advice = "Set the clock of this machine (for instance with NTP) and try again."
        return Fault(AccessDenied(f"{place} refuses the request for clock skew ({told}). {advice}"), False)
    if code in _REGION_CODES or status == 301:
        told_region = f", which names {region}" if (region := _find_region(reply)) else ""
        advice = "Set MINT_S3_REGION to the bucket's own region."
        return Fault(StoreError(f"{place} lies in another region ({told}{told_region}). {advice}"), False)
    if code in _TAKEN_CODES or status == 412:
        return Fault(Conflict(f"{place} was written by somebody else first ({told})."), False)
    if code in _BUSY_CODES or status in (409, 429):
        return Fault(_miss(place, told), True)
    if code == "NoSuchBucket":
        advice = "Create it, or name another one in MINT_S3_BUCKET; `mint doctor` checks it."
        return Fault(StoreError(f"There is no bucket {bucket!r} at {endpoint}. {advice}"), False)
    if code in _ACCESS_CODES or status in (401, 403):
        return Fault(_deny(place, told), False)
    if code in _DAMAGE_CODES:
        return Fault(IntegrityError(f"{place} was damaged on its way to the server ({told}). Try again."), True)
    if status == 404:
        return Fault(NotFound(f"There is no {place}."), False)
    if status == 507:
        return Fault(_miss(place, f"{told}: the server's disk is full"), False)
    if status >= 500:
        return Fault(_miss(place, told), True)
    return Fault(StoreError(f"{place}: the server refuses the request ({told})."), False)


def _explain_role(cause: Any, *, place: str) -> Fault:
    """What a token service says that was to give credentials for a workload identity."""
    status = int(cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    told = f"{cause.operation_name}: HTTP {status} {cause.response.get('Error', {}).get('Code', '')}"
    if status >= 500 or status == 429:
        return Fault(_miss(place, told), True)
    return Fault(_deny(place, f"the token service gives no credentials, {told}"), False)


def _find_region(reply: Any) -> str:
    headers = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(headers.get("x-amz-bucket-region") or reply.get("Error", {}).get("Region") or "")


def _deny(place: str, cause: str) -> AccessDenied:
    return AccessDenied(
        f"{place}: access denied ({cause}). Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or another source of "
        "boto3's credential chain, to an identity that may read and write this bucket; `mint doctor` checks it."
    )


def _miss(place: str, cause: str) -> StoreUnreachable:
    return StoreUnreachable(
        f"{place}: {cause}. Check that the server runs, that MINT_S3_ENDPOINT_URL is its address, and that its disk is "
        "not full; `mint doctor` tells which. MINT_S3_DEADLINE_SECONDS sets how long a request is retried."
    )
