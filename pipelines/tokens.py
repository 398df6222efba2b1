"""Makes a token for the model server and adds its digest to a tokens file: what `mint token` does.

Goes in: whose token it is and what it may do. Comes out: the token, shown once, and a tokens file that accepts it. The
file is what `mint serve --tokens` reads and what the cluster's secret `mint-serving-tokens` holds.
"""

import datetime
import pathlib

from pydantic import ValidationError

from mint_lib.errors import InvalidInput
from mint_lib.plugins import describe_validation_error
from mint_lib.server.access import TokenEntry, TokensFile, issue_token
from mint_lib.server.calls import Scope
from pipelines.serve import write_private


def add_token(
    path: pathlib.Path, *, tenant: str, models: tuple[str, ...], scopes: tuple[Scope, ...], expires_days: float | None
) -> str:
    """A fresh token that the file at `path` accepts from here on; the file is made if it is not there.

    Args:
        path: the tokens file. Its other tokens stay as they are.
        tenant: whose token it is.
        models: names of models, or `*`.
        scopes: `infer` to ask, `metrics` to read metrics.
        expires_days: None never expires.

    Raises:
        InvalidInput: the file is not a tokens file, or a value is not allowed; the file is left as it was.
    """
    known = _read(path) if path.exists() else ()
    expires = None
    if expires_days is not None:
        if not 0 < expires_days <= 3650:
            raise InvalidInput(f"A token that expires after {expires_days:g} days: allowed is more than 0, up to 3650.")
        expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=expires_days)
    try:
        token, entry = issue_token(tenant, models=models, scopes=scopes, expires=expires)
    except ValidationError as error:
        raise InvalidInput(describe_validation_error(error, TokenEntry, where="token")) from None
    write_private(path, TokensFile(tokens=(*known, entry)).model_dump_json(indent=2).encode())
    return token


def _read(path: pathlib.Path) -> tuple[TokenEntry, ...]:
    try:
        return TokensFile.model_validate_json(path.read_bytes()).tokens
    except (OSError, ValidationError) as error:
        raise InvalidInput(
            f"{path} is no tokens file ({type(error).__name__}). Name another one, or move it away to begin anew."
        ) from None
