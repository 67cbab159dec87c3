"""An object store as zarr sees one: every error is one line, and a chunk that is missing is one too."""

import importlib
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import ObjectStore

from icons.store.chunk import missing, status_key_of

_LONGEST = 300  # letters of a service's own words
_CREDENTIALS = (
    "credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, from AWS_PROFILE or ~/.aws, or from the machine"
)


class CheckedObjectStore(ObjectStore[Any]):
    """zarr's ObjectStore, for which a chunk that is missing although its unit is finished is an error.

    Attributes:
        url: where it lies, for messages.

    Raises:
        OSError: from each operation that the service refuses or does not answer, in one line.
    """

    url = ""

    async def get(self, key: str, *rest: Any, **options: Any) -> Buffer | None:
        with self._told("read", key):
            value = await super().get(key, *rest, **options)
        status = status_key_of(key) if value is None else None
        if status is not None and await self.exists(status):
            raise ValueError(missing(key))
        return value

    async def exists(self, key: str) -> bool:
        with self._told("looked for", key):
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        with self._told("written", key):
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        with self._told("written", key):
            await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        with self._told("deleted", key):
            await super().delete(key)

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        with self._told("listed", prefix or "what is there"):
            async for key in super().list_prefix(prefix):
                yield key

    @contextmanager
    def _told(self, what: str, key: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            foreign = type(error).__module__.partition(".")[0] in ("obstore", "botocore")
            if not foreign and not isinstance(error, FileNotFoundError):  # that one: no such bucket
                raise
            raise OSError(
                f"store {self.url}: {key} could not be {what} ({_cause(error)}); finished units are kept: mend the "
                "cause, and run the same line again"
            ) from error


def _cause(error: Exception) -> str:
    """The service's own words, as far as a line has room for them; and where its credentials are looked for."""
    words = " ".join(str(error).partition("Debug source")[0].split())
    refused = type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError")
    said = words if len(words) <= _LONGEST else f"{words[:_LONGEST]} …"
    return f"{said}; {_CREDENTIALS}" if refused or "redential" in words or "token" in words else said


def open_url(url: str, mode: str) -> Store:
    """The object store that a URL names.

    Raises:
        ModuleNotFoundError: obstore is not installed.
        ValueError: the URL, a variable of the environment, or a profile is none that can be used.
    """
    try:
        obstore = importlib.import_module("obstore.store")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"store {url}: object stores need obstore, which is not installed; pip install 'icons-lightning[s3]'"
        ) from error
    try:
        options = _profile(url) if url.startswith(("s3://", "s3a://")) else {}
        store = CheckedObjectStore(obstore.from_url(url, **options), read_only=mode == "r")
    except Exception as error:  # of obstore, of boto3, and of the settings they read
        raise ValueError(
            f"store {url}: cannot be opened ({_cause(error)}); expected s3://bucket/name, gs://, az:// or memory://, "
            "and the service's usual settings in the environment"
        ) from error
    store.url = url
    return store


def _profile(url: str) -> dict[str, Any]:
    """Credentials, region and endpoint of an AWS profile, which obstore does not read by itself.

    Keys in the environment come first, as everywhere.

    Raises:
        ValueError: a profile is asked for, and boto3 is not installed.
    """
    asked = os.environ.get("AWS_PROFILE")
    files = [Path(os.environ.get(name) or kept).expanduser() for name, kept in _FILES.items()]
    if os.environ.get("AWS_ACCESS_KEY_ID") or not (asked or any(file.is_file() for file in files)):
        return {}
    try:
        boto3, auth = importlib.import_module("boto3"), importlib.import_module("obstore.auth.boto3")
    except ModuleNotFoundError:
        if asked is None:
            return {}
        raise ValueError(
            f"AWS_PROFILE is {asked}, and profiles are read by boto3, which is not installed: pip install boto3, or "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    session = boto3.Session()
    if session.get_credentials() is None:
        return {}
    options: dict[str, Any] = {"credential_provider": auth.Boto3CredentialProvider(session)}
    region = os.environ.get("AWS_REGION") or session.region_name
    endpoint = session.client("s3", region_name=region or "us-east-1").meta.endpoint_url
    options |= {"region": region} if region else {}
    return options | ({} if endpoint.endswith(".amazonaws.com") else {"endpoint": endpoint})


_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
