"""Which store a command talks to: the one the environment names, or an embedded server of its own."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from mint_lib.store import Store

LOCAL_FOLDER = pathlib.Path(".mint")


def is_store_configured() -> bool:
    """True if the environment names an S3 endpoint."""
    return bool(os.environ.get("MINT_S3_ENDPOINT_URL"))


@contextlib.contextmanager
def open_store() -> Iterator[Store]:
    """The configured store; without one, an embedded SeaweedFS on loopback for as long as the context lasts.

    The embedded server's address and credentials stand in the environment meanwhile, so that the processes of the
    pipeline find it.
    """
    if is_store_configured():
        yield Store.from_environment()
        return
    from mint_lib.local_store import local_store

    with local_store(LOCAL_FOLDER / "s3") as environment:
        before = {key: os.environ.get(key) for key in environment}
        os.environ.update(environment)
        try:
            yield Store.from_environment()
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value
