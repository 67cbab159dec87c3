"""A hub name is a folder of the cache; what is not there is said with how to get it."""

from pathlib import Path

import huggingface_hub
import pytest

from icons.models.folder import ModelFolder
from icons.models.hub import on_disk


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cached(cache: Path, name: str) -> Path:
    """As the hub's own client lays a model out."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123abc")
    snapshot = folder / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    return snapshot


def test_a_cached_model_is_found_by_its_name(cache: Path) -> None:
    snapshot = cached(cache, "Owner/Name-1.5")
    assert on_disk(Path("Owner/Name-1.5")) == snapshot
    assert ModelFolder.open("Owner/Name-1.5").model == snapshot


def test_what_is_a_path_stays_one(cache: Path) -> None:
    cached(cache, "owner/name")
    (cache / "owner" / "name").mkdir(parents=True)
    assert on_disk("owner/name") == Path("owner/name"), "a folder here comes first"
    for path in ("/owner/name", "./owner/name2", "a/b/c", "name"):
        assert on_disk(path) == Path(path)


def test_what_is_nowhere_is_said_with_how_to_get_it(cache: Path) -> None:
    text = r"owner/none: no such folder, .* run hf download owner/none --local-dir none"
    with pytest.raises(FileNotFoundError, match=text):
        ModelFolder.open(Path("owner/none"))
