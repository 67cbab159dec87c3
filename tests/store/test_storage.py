"""Files are whole or absent, durable once flushed, and object stores keep the same order."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import icons.store.file
import icons.store.folder
from icons.store import GradientStore
from icons.store.lease import Leases
from icons.store.storage import Storage
from icons.store.unit_writer import UnitWriter
from icons.store.verify import repair, verify


def results(rows: np.ndarray) -> dict[str, np.ndarray]:
    ones = np.ones(len(rows), np.float32)
    gradient = np.outer(rows + 1.0, np.arange(1.0, 7.0)).astype(np.float32)
    return {"gradient": gradient, "norm": ones, "loss": ones, "tokens": ones, "status": ones}


def test_keys_are_written_read_listed_and_deleted(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "s", "w")
    storage.put("a/b", b"one")
    assert storage.put_new("a/c", b"two") and not storage.put_new("a/c", b"three")
    assert (storage.get("a/b"), storage.get("a/c"), storage.get("absent")) == (b"one", b"two", None)
    assert storage.list("a") == ["a/b", "a/c"] and storage.exists("a/b") and not storage.exists("a")
    storage.delete("a/b")
    storage.delete("absent")
    assert storage.list("a") == ["a/c"] and storage.list("absent") == []


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "s", "w")
    contents = {bytes([number]) * 300_000 for number in range(20)}
    storage.put("chunk", next(iter(contents)))
    torn: list[int] = []
    end = threading.Event()

    def read() -> None:
        while not end.is_set():
            if (found := (tmp_path / "s/chunk").read_bytes()) not in contents:
                torn.append(len(found))

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        storage.put("chunk", content)
    end.set()
    reader.join()
    assert torn == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "s", "w")

    class Full:
        def __buffer__(self, flags: int) -> memoryview:
            raise OSError(28, "No space left on device")

    with pytest.raises((OSError, TypeError)):
        storage.put_together({"other": [b"whole"], "chunk": [b"first part", Full()]})  # type: ignore[list-item]
    assert list((tmp_path / "s").iterdir()) == []


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", unable)
    with pytest.raises(PermissionError, match=r"this file system has no hard links.*expected one that has them"):
        GradientStore.create(tmp_path / "s", num_rows=4, dim=6)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_status_is_written_only_after_the_rows_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = GradientStore.create(tmp_path / "s", num_rows=8, dim=6, chunk_rows=4)
    events: list[str] = []
    rename, flush = os.replace, icons.store.folder.flush_path

    def renaming(partial: str, path: str) -> None:
        events.append(f"name {Path(path).relative_to(tmp_path / 's')}")
        rename(partial, path)

    def flushing(path: str) -> None:
        events.append(f"flush {Path(path).relative_to(tmp_path / 's')}")
        flush(path)

    monkeypatch.setattr(os, "replace", renaming)
    monkeypatch.setattr(icons.store.folder, "flush_path", flushing)
    store.write_unit(1, results(np.arange(4, 8)))
    rows = ["gradients/c/1/0", "scale/c/1", "norm/c/1", "loss/c/1", "tokens/c/1", "status/digest/1"]
    assert events[:6] == [f"name {key}" for key in rows]
    folders = ["gradients/c/1", "gradients/c", "gradients", "norm/c", "norm"]
    assert {f"flush {key}" for key in [*rows, *folders]} <= set(events[6:])
    durable = [event.startswith("flush status/c/.1.") for event in events].index(True)
    assert 6 <= durable < len(events) - 1 == events.index("name status/c/1"), "which has its name once it is durable"
    events.clear()
    store.write_unit(1, results(np.arange(4, 8)))
    assert events[0] == "flush status/c", "a unit that is written again is first, durably, not written"


@pytest.mark.parametrize("again", [False, True])
def test_a_large_file_that_could_not_be_made_durable_early_writes_no_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Written once or twice before it is waited for."""
    monkeypatch.setattr(icons.store.folder, "_LARGE", 1)
    store = GradientStore.create(tmp_path / "s", num_rows=8, dim=6, chunk_rows=4)
    flush, failed = icons.store.folder.flush_path, []

    def failing(path: str) -> None:
        if path.endswith("c/0/0"):
            failed.append(path)
            raise OSError(5, "Input/output error")
        flush(path)

    monkeypatch.setattr(icons.store.folder, "flush_path", failing)
    columns = store.encode(results(np.arange(4)))
    for _ in range(2 if again else 1):
        store.write_rows(0, columns)
    with pytest.raises(OSError, match="Input/output error"):
        store.commit({0: columns["status"]})
    assert failed and store.missing() == [0, 1] and not (tmp_path / "s/status/c/0").exists()
    store.storage.folder.unflushed.clear()  # type: ignore[union-attr]
    store.write_unit(1, results(np.arange(4, 8)))
    assert store.missing() == [0]


def test_a_flush_that_fails_writes_no_status_then_or_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = GradientStore.create(tmp_path / "s", num_rows=8, dim=6, chunk_rows=4)

    def failing(path: str) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(icons.store.folder, "flush_path", failing)
    for unit in (0, 1):
        with pytest.raises(OSError, match="Input/output error"):
            store.write_unit(unit, results(np.arange(4)))
    assert store.missing() == [0, 1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a folder read-only")
def test_a_read_only_folder_can_be_read_and_is_an_error_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "s"
    GradientStore.create(path, num_rows=4, dim=6).write_unit(0, results(np.arange(4)))
    subprocess.run(["mount", "--bind", str(path), str(path)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(path)], check=True)
        assert GradientStore.open(path).counts()["done"] == 4
        with pytest.raises(PermissionError, match="the folder is read-only; expected one that can be written"):
            GradientStore.open_or_create(path, num_rows=4, dim=6)
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_url_without_obstore_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ModuleNotFoundError, match=r"object stores need obstore.*pip install 'icons-lightning\[s3\]'"):
        Storage("s3://bucket/store")


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket of a real S3 API on the loopback address; Google's client speaks to the same, see `as_s3`."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url, key = f"http://{host}:{port}", tmp_path_factory.mktemp("google") / "key.json"
    nobody = dict.fromkeys(["client_email", "private_key", "private_key_id"], "")
    key.write_text(json.dumps({"gcs_base_url": url, "disable_oauth": True, **nobody}))
    given = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "GOOGLE_SERVICE_ACCOUNT": str(key),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket=f"icons{request.param}")
        if request.param == "gs":
            patch.setattr(DomainDispatcherApplication, "__call__", as_s3(DomainDispatcherApplication.__call__))
        yield f"{request.param}://icons{request.param}"  # moto keeps both in one memory
    server.stop()


def as_s3(answer: Any) -> Any:
    """Google's XML API is S3's with another signature and another header for "unless it exists"."""

    def translated(self: Any, environ: dict[str, Any], start_response: Any) -> Any:
        scope = "Credential=test/20260101/us-east-1/s3/aws4_request"
        environ["HTTP_AUTHORIZATION"] = f"AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=0"
        if environ.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None) == "0":
            environ["HTTP_IF_NONE_MATCH"] = "*"
        return answer(self, environ, start_response)

    return translated


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that are put into the object store, in order."""
    import obstore

    put: list[str] = []
    original = obstore.put_async

    async def recording(store: Any, path: str, *rest: Any, **options: Any) -> Any:
        put.append(path)
        return await original(store, path, *rest, **options)

    monkeypatch.setattr(obstore, "put_async", recording)
    return put


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:moto"),
    pytest.mark.filterwarnings("ignore:.*ObjectStore.*experimental"),
]


def test_an_object_store_holds_the_same_store_in_the_same_order(
    bucket: str, requests: list[str], tmp_path: Path
) -> None:
    stores = [
        GradientStore.open_or_create(place, num_rows=10, dim=6, chunk_rows=4, manifest={"model": {"fingerprint": "m"}})
        for place in (f"{bucket}/train.zarr", tmp_path / "local")
    ]
    requests.clear()
    for store in stores:
        writer = UnitWriter(store)
        for rows in (np.arange(6), np.arange(6, 10)):
            writer.collect(rows, results(rows))
        writer.finish()
    for unit in range(3):
        order = [key.partition("/")[0] for key in requests if key.split("/")[1:3] == ["c", str(unit)]]
        assert order == ["gradients", "scale", "norm", "loss", "tokens", "status"]
    remote, local = GradientStore.open(f"{bucket}/train.zarr"), stores[1]
    assert remote.missing() == [] and list(verify(remote)) == [] and remote.storage.list("status/lease") == []
    keys = local.storage.list("")
    assert remote.storage.list("") == keys and len(keys) == 28
    assert all(remote.storage.get(key) == local.storage.get(key) for key in keys)
    np.testing.assert_array_equal(remote.read_unit(1).gradient, results(np.arange(4, 8))["gradient"])
    with pytest.raises(ValueError, match=rf"model.fingerprint: the store {bucket}.* has 'm', this run has 'n'"):
        GradientStore.open_or_create(remote.path, num_rows=10, dim=6, manifest={"model": {"fingerprint": "n"}})


def test_an_object_store_is_verified_repaired_and_resumed(bucket: str) -> None:
    store = GradientStore.create(f"{bucket}/damaged.zarr", num_rows=8, dim=6, chunk_rows=4)
    for unit in range(2):
        store.write_unit(unit, results(np.arange(unit * 4, unit * 4 + 4)))
    chunk = store.storage.get("gradients/c/1/0")
    assert chunk is not None
    store.storage.put("gradients/c/1/0", chunk[:-1] + b"x")
    assert repair(store, verify(store)) == [1] and GradientStore.open(store.path).missing() == [1]


def test_leases_hold_on_an_object_store(bucket: str) -> None:
    GradientStore.create(f"{bucket}/leases.zarr", num_rows=8, dim=6, chunk_rows=4)
    first, second = (Leases(Storage(f"{bucket}/leases.zarr", "r+"), 30.0) for _ in range(2))
    assert first.acquire(0) and not second.acquire(0) and second.acquire(1)
    first.release(0, done=True)
    assert second.acquire(0)
    for leases in (first, second):
        leases.close()
    assert first.keys.list("status/lease") == []


def test_a_bucket_of_somebody_else_is_refused_and_not_touched(bucket: str) -> None:
    Storage(f"{bucket}/theirs", "w").put("notes/a.txt", b"mine")
    with pytest.raises(ValueError, match=r"holds notes/a.txt, which no such store has"):
        GradientStore.open_or_create(f"{bucket}/theirs", num_rows=8, dim=6)
    assert Storage(f"{bucket}/theirs").list("") == ["notes/a.txt"]


def test_an_object_store_that_is_absent_is_named(bucket: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"store {bucket}/absent.zarr: has no zarr.json"):
        GradientStore.open(f"{bucket}/absent.zarr")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def writev(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "writev", writev)
    with pytest.raises(OSError, match=r"No space left on device: '.*/x/zarr\.json'"):
        icons.store.file.write_file(str(tmp_path), "x/zarr.json", [b"{}"])
    assert not list((tmp_path / "x").iterdir())


def test_of_files_written_together_none_is_left_beside_when_the_disk_fills_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    folder, write = icons.store.folder.DurableLocalStore(tmp_path / "store"), icons.store.folder.write_partial

    def fill(root: str, key: str, parts: Any) -> str:
        if key == "status/c/2":
            raise OSError(28, "No space left on device")
        return write(root, key, parts)

    monkeypatch.setattr(icons.store.folder, "write_partial", fill)
    files = {f"status/c/{unit}": [b"\1"] for unit in range(4)}
    for write_them in (lambda: folder.set_whole(files, {}), lambda: folder.set_together(files, lambda: None)):
        with pytest.raises(OSError, match="No space left"):
            write_them()
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
