"""The store without a server: manifests, digests, paths, keys, settings, and what a fault means."""

import json
import pickle
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from botocore import exceptions
from hypothesis import given
from hypothesis import strategies as st

from mint_lib.errors import (
    AccessDenied,
    Conflict,
    IntegrityError,
    InvalidInput,
    NotFound,
    StoreError,
    StoreUnreachable,
)
from mint_lib.storage.faults import explain_fault
from mint_lib.storage.layout import Layout
from mint_lib.storage.manifest import FileEntry, Manifest, canonical_json, check_path, digest_files
from mint_lib.storage.settings import S3Settings
from mint_lib.store import Store

FILES = {
    "record.json": FileEntry(size=3, sha256="a" * 64),
    "teacher/model.safetensors": FileEntry(size=5, sha256="b" * 64),
}


def make_manifest(**changes: Any) -> bytes:
    values = {
        "format": 1,
        "kind": "cases",
        "name": "demo",
        "version": "v000001",
        "token": "t",
        "created_at": datetime(2026, 1, 2, tzinfo=UTC).isoformat(),
        "environment": {"python": "3.11"},
        "files": {path: entry.model_dump() for path, entry in FILES.items()},
        "digest": digest_files(FILES),
    }
    return canonical_json(values | changes)


def make_reply(code: str, status: int) -> exceptions.ClientError:
    reply = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return exceptions.ClientError(reply, "PutObject")  # type: ignore[arg-type]


def test_manifest_written_and_parsed_is_the_same():
    parsed = Manifest.parse(make_manifest(), where="here")
    assert parsed.files == FILES
    assert canonical_json(parsed.model_dump(mode="json")) == make_manifest(created_at="2026-01-02T00:00:00Z")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        make_manifest()[:-20],
        make_manifest(format=2),
        make_manifest(kind="weights"),
        make_manifest(version="1"),
        make_manifest(surprise=1),
        make_manifest(digest="sha256:" + "0" * 64),
        make_manifest(created_at="2026-01-02T00:00:00"),
        make_manifest(files={}),
        make_manifest(files={"record.json": {"size": -1, "sha256": "a" * 64}}),
        make_manifest(files={"record.json": {"size": 1, "sha256": "A" * 64}}),
        make_manifest(files={path: entry.model_dump() for path, entry in FILES.items()} | {"../up": {"size": 1}}),
    ],
)
def test_manifest_damaged_is_refused_by_name(data: bytes):
    with pytest.raises(IntegrityError, match="s3://bucket/place"):
        Manifest.parse(data, where="s3://bucket/place")


def test_manifest_with_climbing_path_is_refused_even_with_a_right_digest():
    files = {"record.json": FILES["record.json"], "../../up": FileEntry(size=1, sha256="c" * 64)}
    data = make_manifest(files={path: entry.model_dump() for path, entry in files.items()}, digest=digest_files(files))
    with pytest.raises(IntegrityError, match="cannot name a file"):
        Manifest.parse(data, where="here")


def test_digest_ignores_order_and_sees_every_change():
    digest = digest_files(FILES)
    assert digest == digest_files(dict(reversed(FILES.items())))
    renamed = {"record.json": FILES["record.json"], "teacher/other": FILES["teacher/model.safetensors"]}
    resized = FILES | {"record.json": FileEntry(size=4, sha256="a" * 64)}
    changed = FILES | {"record.json": FileEntry(size=3, sha256="c" * 64)}
    assert len({digest, digest_files(renamed), digest_files(resized), digest_files(changed)}) == 4


def test_canonical_json_of_equal_values_is_equal_and_keeps_large_integers():
    assert canonical_json({"b": 1, "a": "é"}) == canonical_json({"a": "é", "b": 1}) == '{"a":"é","b":1}'.encode()
    assert json.loads(canonical_json([2**53 + 1])) == [2**53 + 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"x", {1, 2}, object()])
def test_canonical_json_of_a_value_without_json_form_is_refused(value: object):
    with pytest.raises(InvalidInput):
        canonical_json([value])


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "..",
        "a/../b",
        "a/./b",
        "a//b",
        "a/",
        "a\\b",
        "a\0b",
        "a\nb",
        ".hidden",
        "a/.hidden",
        "C:x",
        "~/x",
        "manifest.json",
        "claim.json",
        "ä",
        "x" * 513,
    ],
)
def test_path_outside_the_allowed_is_refused(path: str):
    with pytest.raises(InvalidInput, match="cannot name a file"):
        check_path(path)


@pytest.mark.parametrize("path", ["train.parquet", "teacher/manifest.json", "a b/c-d_e+f=g@h.x", "_x"])
def test_path_inside_the_allowed_is_kept(path: str):
    assert check_path(path) == path


@given(st.text(alphabet="ab./\\~-_ \0\n:", max_size=12))
def test_path_that_passes_never_leaves_its_folder(path: str):
    try:
        check_path(path)
    except InvalidInput:
        return
    pure = PurePosixPath(path)
    assert not pure.is_absolute()
    assert ".." not in pure.parts
    assert pure.as_posix() == path


def test_layout_puts_every_key_below_the_prefix():
    layout = Layout("team/a")
    assert layout.manifest("cases", "demo", "v000012") == "team/a/cases/demo/v000012/manifest.json"
    assert layout.alias("model", "demo", "champion") == "team/a/model/demo/aliases/champion.json"
    assert layout.output("f" * 64) == f"team/a/outputs/{'f' * 64}.json"
    assert layout.run("r-1") == "team/a/runs/r-1"
    assert Layout("").folder("cases", "demo") == "cases/demo/"


@pytest.mark.parametrize(
    "place", [("weights", "demo", None), ("cases", "../x", None), ("cases", "Demo", None), ("cases", "demo", "7")]
)
def test_layout_with_a_misspelled_place_is_refused(place: tuple[str, str, str | None]):
    with pytest.raises(InvalidInput):
        Layout("").folder(*place)


@pytest.mark.parametrize("alias", ["latest", "v000001", "../x", "A", ""])
def test_alias_that_could_be_mistaken_is_refused(alias: str):
    with pytest.raises(InvalidInput):
        Layout("").alias("cases", "demo", alias)


@pytest.mark.parametrize("key", ["../x", "a/b", "", "x" * 201])
def test_output_key_and_run_id_outside_the_allowed_are_refused(key: str):
    with pytest.raises(InvalidInput):
        Layout("").output(key)
    with pytest.raises(InvalidInput):
        Layout("").run(key)


def test_settings_without_endpoint_say_what_to_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MINT_S3_ENDPOINT_URL", raising=False)
    with pytest.raises(InvalidInput, match="MINT_S3_ENDPOINT_URL"):
        Store.from_environment()


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    values = {
        "ENDPOINT_URL": "https://s3.example.org/",
        "BUCKET": "b",
        "PREFIX": "/team/a/",
        "REGION": "eu-central-1",
        "PATH_STYLE": "false",
        "CA_BUNDLE": str(tmp_path),
        "DEADLINE_SECONDS": "7",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"MINT_S3_{name}", value)
    settings = S3Settings.from_environment()
    assert settings == S3Settings(
        endpoint_url="https://s3.example.org",
        bucket="b",
        prefix="team/a",
        region="eu-central-1",
        path_style=False,
        ca_bundle=tmp_path,
        deadline_seconds=7,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ENDPOINT_URL", "localhost:8333"),
        ("ENDPOINT_URL", "http://key:secret@host"),
        ("DEADLINE_SECONDS", "0"),
        ("PATH_STYLE", "perhaps"),
    ],
)
def test_settings_with_a_wrong_value_name_the_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv("MINT_S3_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv(f"MINT_S3_{name}", value)
    with pytest.raises(InvalidInput, match=f"MINT_S3_{name}") as caught:
        S3Settings.from_environment()
    assert "secret" not in str(caught.value)


def test_settings_retry_longer_on_another_machine():
    def seconds(url: str) -> float:
        return S3Settings(endpoint_url=url).retry_seconds

    assert seconds("http://127.0.0.1:1") == seconds("http://[::1]:1") == seconds("http://localhost:1") == 20
    assert seconds("http://minio.svc:9000") == seconds("http://192.0.2.7") == 60


def test_store_pickles_without_credentials(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    store = Store(S3Settings(endpoint_url="http://127.0.0.1:1", prefix="p"))
    data = pickle.dumps(store)
    assert b"canary-secret" not in data
    assert pickle.loads(data).settings == store.settings


def test_resolve_of_a_misspelled_reference_says_how_to_write_one():
    store = Store(S3Settings(endpoint_url="http://127.0.0.1:1"))
    for text in ["", "cases", "cases/", "weights/demo", "cases/demo@", "cases/demo@x@y", "cases/a/b", "cases/demo#x"]:
        with pytest.raises(InvalidInput, match="kind"):
            store.resolve(text)


@pytest.mark.parametrize(
    ("cause", "error", "can_pass"),
    [
        (make_reply("NoSuchKey", 404), NotFound, False),
        (make_reply("404", 404), NotFound, False),
        (make_reply("NoSuchBucket", 404), StoreError, False),
        (make_reply("PreconditionFailed", 412), Conflict, False),
        (make_reply("ConditionalRequestConflict", 409), StoreUnreachable, True),
        (make_reply("OperationAborted", 409), StoreUnreachable, True),
        (make_reply("SlowDown", 503), StoreUnreachable, True),
        (make_reply("TooManyRequests", 429), StoreUnreachable, True),
        (make_reply("RequestTimeout", 400), StoreUnreachable, True),
        (make_reply("InternalError", 500), StoreUnreachable, True),
        (make_reply("InsufficientStorage", 507), StoreUnreachable, False),
        (make_reply("BadDigest", 400), IntegrityError, True),
        (make_reply("403", 403), AccessDenied, False),
        (make_reply("", 401), AccessDenied, False),
        (make_reply("InvalidAccessKeyId", 403), AccessDenied, False),
        (make_reply("ExpiredToken", 400), AccessDenied, False),
        (make_reply("RequestTimeTooSkewed", 403), AccessDenied, False),
        (make_reply("EntityTooLarge", 400), StoreError, False),
        (exceptions.NoCredentialsError(), AccessDenied, False),
        (exceptions.ProfileNotFound(profile="p"), AccessDenied, False),
        (exceptions.EndpointConnectionError(endpoint_url="u"), StoreUnreachable, True),
        (exceptions.ReadTimeoutError(endpoint_url="u"), StoreUnreachable, True),
        (exceptions.ConnectionClosedError(endpoint_url="u"), StoreUnreachable, True),
        (exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2), StoreUnreachable, True),
        (exceptions.ResponseStreamingError(error="e"), StoreUnreachable, True),
        (exceptions.SSLError(endpoint_url="u", error="e"), StoreUnreachable, False),
        (exceptions.ParamValidationError(report="r"), StoreError, False),
    ],
)
def test_fault_becomes_an_error_that_names_the_object(cause: Exception, error: type[StoreError], can_pass: bool):
    fault = explain_fault(cause, endpoint="http://host:1", bucket="mint", key="cases/demo/x")
    assert type(fault.error) is error
    assert fault.can_pass is can_pass
    assert "http://host:1" in str(fault.error)
    pickle.loads(pickle.dumps(fault.error))


def test_fault_of_clock_skew_and_full_disk_and_certificate_say_so():
    def explain(cause: Exception) -> str:
        return str(explain_fault(cause, endpoint="http://host:1", bucket="mint", key="k").error)

    assert "clock" in explain(make_reply("RequestTimeTooSkewed", 403))
    assert "disk" in explain(make_reply("InsufficientStorage", 507))
    assert "disk" in explain(make_reply("InternalError", 500))
    assert "MINT_S3_CA_BUNDLE" in explain(exceptions.SSLError(endpoint_url="u", error="e"))
    assert "'mint'" in explain(make_reply("NoSuchBucket", 404))
