"""Errors a user can cause or meet, with a message that says what is wrong, what is allowed and what to do.

    MintError
    ├── InvalidInput (ValueError)      a recipe, a row, an image or a reference that cannot be accepted
    │   ├── RecipeError                a recipe key or value
    │   ├── RefusedData                a data set whose rows or splits break a rule; carries counts and case ids
    │   └── PromptTooLong              a prompt that does not fit the student's window
    ├── GateFailed                     a declared threshold was not met (teacher floor, promotion gate)
    ├── OutOfMemory (RuntimeError)     one pass of the training does not fit the memory; names the batch's shape
    ├── Interrupted (RuntimeError)     told to stop; a checkpoint was written and the same command goes on from it
    ├── StoreError (OSError)           the object store
    │   ├── NotFound                   no such version, alias or file
    │   ├── Conflict                   somebody else committed first
    │   ├── IntegrityError             the bytes read are not the bytes that were committed
    │   ├── AccessDenied               credentials are missing, wrong or not allowed
    │   └── StoreUnreachable           no answer within the deadline, or the disk behind it is full
    ├── ServingError (RuntimeError)    a request that the model server cannot answer
    │   ├── Overloaded                 the queue is full; carries when to try again
    │   ├── DeadlineExceeded           the answer was not ready in time
    │   ├── Draining                   the server is shutting down
    │   └── ComputationFailed          the model failed on this one request
    ├── ClusterError (RuntimeError)    Kubernetes, or something that runs on it, did not do what was asked
    └── MissingDependency (ImportError)  a package, a model or a tool that this machine lacks

Every one pickles (Ray and KFP carry errors between processes) and never holds the content of a case.
"""


class MintError(Exception):
    """Root of the errors that are shown to a user without a traceback."""


class InvalidInput(MintError, ValueError):
    """Something given from outside cannot be accepted."""


class RecipeError(InvalidInput):
    """A recipe key or value is wrong."""


class RefusedData(InvalidInput):
    """Rows or splits break a rule. `counts` maps cause to number of rows, `case_ids` names some of them."""

    def __init__(
        self, message: str, counts: dict[str, int] | None = None, case_ids: dict[str, list[str]] | None = None
    ):
        super().__init__(message, counts or {}, case_ids or {})
        self.counts = counts or {}
        self.case_ids = case_ids or {}

    def __str__(self) -> str:
        return str(self.args[0])


class PromptTooLong(InvalidInput):
    """A prompt does not fit the student's window."""


class GateFailed(MintError):
    """A declared threshold was not met."""


class OutOfMemory(MintError, RuntimeError):
    """One pass of the training does not fit the memory."""


class Interrupted(MintError, RuntimeError):
    """A training was told to stop. Its checkpoint is in the store, so that the same command goes on from there."""


class StoreError(MintError, OSError):
    """The object store did not do what was asked."""


class NotFound(StoreError):
    """No such version, alias or file."""


class Conflict(StoreError):
    """Somebody else committed first."""


class IntegrityError(StoreError):
    """The bytes read are not the bytes that were committed."""


class AccessDenied(StoreError):
    """Credentials are missing, wrong or not allowed to do this."""


class StoreUnreachable(StoreError):
    """No usable answer from the store within the deadline."""


class ServingError(MintError, RuntimeError):
    """The model server cannot answer a request that is in order."""


class Overloaded(ServingError):
    """The queue is full. `retry_after_seconds` estimates when it will not be."""

    def __init__(self, message: str, retry_after_seconds: float = 1.0):
        super().__init__(message, retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return str(self.args[0])


class DeadlineExceeded(ServingError):
    """The answer was not ready before the request's deadline."""


class Draining(ServingError):
    """The server is shutting down and takes no new request."""


class ComputationFailed(ServingError):
    """The model failed on this request: an exception or numbers that are not finite."""


class ClusterError(MintError, RuntimeError):
    """Kubernetes, or something that runs on it, did not do what was asked."""


class MissingDependency(MintError, ImportError):
    """A package, a model or a tool is not on this machine."""
