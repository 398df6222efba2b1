"""How the store reaches any S3 server: certificates, regions, bucket names in hosts, sources of credentials, clocks.

A real SeaweedFS answers; where a cloud's own behaviour is needed, a proxy or a small token service plays it.
"""

import http.server
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from s3_proxy import ALWAYS, Fault, Proxy, running_proxy

from mint_lib.errors import AccessDenied, InvalidInput, StoreError, StoreUnreachable
from mint_lib.local_store import local_store
from mint_lib.records import Reference, StageRecord
from mint_lib.storage.settings import S3Settings
from mint_lib.store import Store

RECORD = StageRecord(stage="data", config={}, inputs={}, code_version="test")
DATA = b"d" * 100_000


def write_version(store: Store) -> Reference:
    with store.write("cases", "demo") as writer:
        writer.add_bytes("data.bin", DATA)
        return writer.commit(RECORD)


@pytest.fixture
def authority(tmp_path: Path) -> dict[str, Path]:
    """A certificate authority of our own, and the certificate of 127.0.0.1 that it signed."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("a certificate of our own needs the program openssl")
    names = {name: tmp_path / f"{name}.pem" for name in ("ca", "ca-key", "server", "server-key", "request", "ext")}
    names["ext"].write_text("subjectAltName=IP:127.0.0.1\n")
    new = ["req", "-newkey", "rsa:2048", "-nodes"]
    for arguments in (
        [*new, "-x509", "-days", "2", "-subj", "/CN=Test CA", "-keyout", names["ca-key"], "-out", names["ca"]],
        [*new, "-subj", "/CN=127.0.0.1", "-keyout", names["server-key"], "-out", names["request"]],
        [
            *("x509", "-req", "-days", "2", "-in", names["request"], "-CA", names["ca"], "-CAkey", names["ca-key"]),
            *("-CAcreateserial", "-extfile", names["ext"], "-out", names["server"]),
        ],
    ):
        subprocess.run([openssl, *map(str, arguments)], check=True, capture_output=True)
    return names


@pytest.fixture
def tls_proxy(s3_environment: dict[str, str], authority: dict[str, Path]) -> Iterator[Proxy]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority["server"], authority["server-key"])
    with running_proxy(urllib.parse.urlsplit(s3_environment["MINT_S3_ENDPOINT_URL"]).netloc, context) as server:
        yield server


def test_endpoint_with_an_authority_of_its_own_works_with_its_file(
    store: Store, tls_proxy: Proxy, authority: dict[str, Path]
):
    changes = {"endpoint_url": tls_proxy.endpoint_url, "deadline_seconds": 5.0, "ca_bundle": authority["ca"]}
    secured = Store(store.settings.model_copy(update=changes))
    assert secured.read_bytes(write_version(secured), "data.bin") == DATA
    secured.open_run("run-1").put("state", b"state")
    with secured.arrow_filesystem().open_input_stream(f"{secured.runs_path('run-1')}/state") as file:
        assert file.read() == b"state"


def test_endpoint_with_an_unknown_authority_says_what_to_set_at_once(store: Store, tls_proxy: Proxy, tmp_path: Path):
    settings = store.settings.model_copy(update={"endpoint_url": tls_proxy.endpoint_url, "deadline_seconds": 20.0})
    began = time.monotonic()
    with pytest.raises(StoreUnreachable, match="MINT_S3_CA_BUNDLE"):
        Store(settings).list_names("cases")
    assert time.monotonic() - began < 10
    with pytest.raises(InvalidInput, match=r"MINT_S3_CA_BUNDLE=.*none\.pem: there is no such file"):
        Store(settings.model_copy(update={"ca_bundle": tmp_path / "none.pem"})).list_names("cases")


def test_region_is_free_where_the_server_does_not_care(store: Store):
    elsewhere = Store(store.settings.model_copy(update={"region": "eu-nowhere-9"}))
    assert elsewhere.read_bytes(write_version(elsewhere), "data.bin") == DATA


@pytest.mark.parametrize("action", ["400 AuthorizationHeaderMalformed", "400 IllegalLocationConstraintException"])
def test_region_that_is_wrong_is_named(store: Store, action: str):
    with running_proxy(urllib.parse.urlsplit(store.settings.endpoint_url).netloc) as proxy:
        proxy.faults = [Fault(method, "", action, ALWAYS) for method in ("GET", "HEAD")]
        settings = store.settings.model_copy(update={"endpoint_url": proxy.endpoint_url})
        with pytest.raises(StoreError, match="MINT_S3_REGION"):
            Store(settings).list_names("cases")


def test_bucket_in_the_host_name_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mint_lib.local_store._start", start_with_domain)
    real = socket.getaddrinfo

    def resolve(host: str, *arguments: Any, **keywords: Any) -> Any:
        return real("127.0.0.1" if str(host).endswith("s3.test") else host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with local_store(tmp_path / "s3") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        port = urllib.parse.urlsplit(variables["MINT_S3_ENDPOINT_URL"]).port
        changes = {"endpoint_url": f"http://s3.test:{port}", "path_style": False, "deadline_seconds": 10.0}
        by_host = Store(S3Settings.from_environment().model_copy(update=changes))
        with running_proxy(f"127.0.0.1:{port}") as seen:
            through = {"endpoint_url": f"http://s3.test:{seen.server_address[1]}"}
            reference = write_version(Store(by_host.settings.model_copy(update=through)))
            assert {item.host.partition(":")[0] for item in seen.seen} == {"mint.s3.test"}
        assert by_host.read_bytes(reference, "data.bin") == DATA
        assert Store(S3Settings.from_environment()).read_bytes(reference, "data.bin") == DATA


def start_with_domain(folder: Path) -> "subprocess.Popen[bytes]":
    """What `local_store._start` does, with a server that knows buckets by their host names, too."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom mint_lib.storage import seaweedfs\n"
        "seaweedfs._FIXED_OPTIONS += ('-s3.domainName=s3.test',)\nseaweedfs.serve_folder(Path(sys.argv[1]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MINT_S3_"))}
    with (folder / "server.log").open("ab") as log:
        command = [sys.executable, "-c", program, str(folder)]
        root = Path(__file__).parents[2]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=root)


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The server's keys, which stand nowhere in the environment any more."""
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for name in (*keys, "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return keys


def test_credentials_of_a_profile_file_are_found(
    store: Store, no_keys: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    path = tmp_path / "credentials"
    lines = [f"{name.lower()} = {value}" for name, value in no_keys.items()]
    path.write_text("\n".join(["[hospital]", *lines, ""]))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_PROFILE", "hospital")
    assert Store(store.settings).list_names("cases") == []
    monkeypatch.setenv("AWS_PROFILE", "clinic")
    with pytest.raises(AccessDenied, match="clinic"):
        Store(store.settings).list_names("cases")


class TokenService(http.server.BaseHTTPRequestHandler):
    """Gives the server's keys to whoever brings the right token: AWS STS as far as boto3 needs it."""

    keys: ClassVar[dict[str, str]] = {}

    def do_POST(self) -> None:
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if form["WebIdentityToken"] == ["right"]:
            names = {"AccessKeyId": "AWS_ACCESS_KEY_ID", "SecretAccessKey": "AWS_SECRET_ACCESS_KEY"}
            found = "".join(f"<{tag}>{self.keys[name]}</{tag}>" for tag, name in names.items())
            found += "<SessionToken></SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration>"
            inner = (
                f"<AssumeRoleWithWebIdentityResult><Credentials>{found}</Credentials></AssumeRoleWithWebIdentityResult>"
            )
            status, body = 200, f"<AssumeRoleWithWebIdentityResponse>{inner}</AssumeRoleWithWebIdentityResponse>"
        else:
            error = "<Error><Code>InvalidIdentityToken</Code><Message>m</Message></Error>"
            status, body = 400, f"<ErrorResponse>{error}</ErrorResponse>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: Any) -> None:
        """Stay silent."""


def test_credentials_of_a_workload_identity_are_fetched_and_their_refusal_is_told(
    store: Store, no_keys: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(TokenService, "keys", no_keys)
    token = tmp_path / "token"
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/mint")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), TokenService) as service:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{service.server_address[1]}")
        threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        with pytest.raises(AccessDenied, match="token"):
            Store(store.settings).list_names("cases")
        token.write_text("right")
        assert Store(store.settings).list_names("cases") == []
        token.write_text("wrong-canary")
        with pytest.raises(AccessDenied, match="AssumeRoleWithWebIdentity: HTTP 400 InvalidIdentityToken") as caught:
            Store(store.settings).list_names("cases")
        assert "canary" not in str(caught.value)
        service.shutdown()


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_denied_without_showing_them(
    store: Store, monkeypatch: pytest.MonkeyPatch, variable: str
):
    monkeypatch.setenv(variable, "canary-of-a-secret")
    with pytest.raises(AccessDenied, match="credential") as caught:
        Store(store.settings).list_names("cases")
    assert "canary" not in str(caught.value)


def test_missing_credentials_are_denied(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bare = Store(store.settings)
    with pytest.raises(AccessDenied, match="no credentials were found"):
        bare.list_names("cases")
    with pytest.raises(AccessDenied, match="no credentials were found"):
        bare.arrow_filesystem()


def test_clock_that_runs_wrong_is_named(store: Store, monkeypatch: pytest.MonkeyPatch):
    import botocore.auth

    real = botocore.auth.get_current_datetime

    def late(*arguments: Any, **keywords: Any) -> Any:
        return real(*arguments, **keywords).replace(year=2020)

    monkeypatch.setattr(botocore.auth, "get_current_datetime", late)
    with pytest.raises(AccessDenied, match="clock"):
        store.list_names("cases")
