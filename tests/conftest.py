"""Fixtures that every test may use: a real S3 server, started when the first test asks for it, and stores on it."""

import os
import secrets
from collections.abc import Callable, Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from mint_lib.local_store import local_store
from mint_lib.storage.settings import S3Settings
from mint_lib.store import Store


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment variables of a running SeaweedFS; they are set for the rest of the session."""
    with local_store(tmp_path_factory.mktemp("s3")) as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.fixture(scope="session")
def s3_store(s3_environment: dict[str, str]) -> Callable[[], Store]:
    """A function that gives a store under a fresh prefix, for fixtures that outlive one test."""

    def make() -> Store:
        settings = S3Settings.from_environment()
        return Store(settings.model_copy(update={"prefix": f"test-{secrets.token_hex(8)}"}))

    return make


@pytest.fixture
def store(s3_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store under a fresh prefix, which processes that the test starts find in their environment too."""
    store = s3_store()
    monkeypatch.setenv("MINT_S3_PREFIX", store.settings.prefix)
    return store
