"""What an object store refuses is one line; the usual AWS profiles are read."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from icons.cli import main
from icons.store.object_store import open_url
from icons.store.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore:.*ObjectStore.*experimental")
DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'


class Service:
    """An S3 that answers every request with one status, and remembers who asked."""

    def __init__(self) -> None:
        service, self.status, self.signed = self, 403, ""

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                service.signed = self.headers.get("Authorization", "")
                self.send_response(service.status)
                self.send_header("content-length", str(len(DENIED)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(DENIED)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Service]:
    found = Service()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{found.server.server_port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "own")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.mark.parametrize(
    ("what", "does"),
    {
        "read": lambda storage: storage.get("zarr.json"),
        "looked for": lambda storage: storage.exists("zarr.json"),
        "written": lambda storage: storage.put("zarr.json", b"1"),
        "deleted": lambda storage: storage.delete("zarr.json"),
        "listed": lambda storage: storage.list("status"),
    }.items(),
)
def test_what_is_refused_is_one_line_with_its_cause(service: Service, keys: None, what: str, does: Any) -> None:
    with pytest.raises(
        OSError, match=rf"^store s3://bucket/a.zarr: .* could not be {what} \(.*run the same line"
    ) as error:
        does(Storage("s3://bucket/a.zarr", "w"))
    assert "\n" not in str(error.value) and "403 Forbidden" in str(error.value)
    assert what == "listed" or "credentials come from AWS_ACCESS_KEY_ID" in str(error.value)


def test_a_bucket_that_is_not_there_is_one_line(service: Service, keys: None) -> None:
    service.status = 404
    with pytest.raises(OSError, match=r"store s3://bucket/a.zarr: zarr.json could not be written \(.*404 Not Found"):
        Storage("s3://bucket/a.zarr", "w").put_new("zarr.json", b"1")


def test_the_command_says_it_and_ends_with_1(service: Service, keys: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "s3://bucket/a.zarr"]) == 1
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "icons status: error: store s3://bucket/a.zarr: zarr.json could not be read" in said
    )


@pytest.mark.parametrize("profile", ["default", "team"])
def test_profiles_are_read(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str) -> None:
    (tmp_path / "credentials").write_text(
        f"[{profile}]\naws_access_key_id = {profile}key\naws_secret_access_key = secret\n"
    )
    if profile != "default":
        monkeypatch.setenv("AWS_PROFILE", profile)
    service.status = 404
    assert Storage("s3://bucket/a.zarr").get("zarr.json") is None
    assert f"Credential={profile}key/" in service.signed


def test_keys_of_the_environment_come_before_a_profile(service: Service, keys: None, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = kept\naws_secret_access_key = secret\n")
    service.status = 404
    assert Storage("s3://bucket/a.zarr").get("zarr.json") is None and "Credential=own/" in service.signed


def test_a_profile_without_what_reads_it_or_that_is_not_there_is_named(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "team")
    with pytest.raises(
        ValueError, match=r"store s3://bucket/a: cannot be opened \(.*profile.*team.*could not be found"
    ):
        open_url("s3://bucket/a", "r")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ValueError, match="AWS_PROFILE is team, and profiles are read by boto3, which is not installed"):
        open_url("s3://bucket/a", "r")


def test_a_url_that_is_none_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"store nowhere://bucket/a: cannot be opened .*expected s3://bucket/name, gs://"
    ):
        open_url("nowhere://bucket/a", "r")
