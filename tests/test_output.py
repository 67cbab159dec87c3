"""What a command may write over, and that it is whole when it is there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icons.output import MARK, check_output, is_marked, mark, put, whole_file


def nobodys(path: Path) -> bool:
    return False


def check(out: Path | str, **options: Any) -> None:
    given: dict[str, Any] = {"kind": "folder", "inputs": {}, "ours": nobodys}
    check_output(out, **(given | options))


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A user's folder: a file, a folder with a file, and a folder with nothing."""
    (tmp_path / "data.json").write_text("[1]")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "nothing").mkdir()
    return tmp_path


def test_new_and_empty_places_may_be_written_to(user: Path) -> None:
    (user / "empty.json").touch()
    (user / "nothing" / ".0.partial.json").write_text("left by a killed run")
    for out in ("new", "nothing", "not/yet/there"):
        check(user / out, inputs={"--data": user / "data.json", "--model": user / "model"})
    check(user / "empty.json", kind="file")


@pytest.mark.parametrize("out", ["model", "data.json"])
def test_what_is_there_is_refused_unless_it_is_ours_or_the_user_says_so(user: Path, out: str) -> None:
    kind = "file" if "." in out else "folder"
    with pytest.raises(ValueError, match=r"no former output of this command; expected a new or empty place: .*--overw"):
        check(user / out, kind=kind)
    check(user / out, kind=kind, ours=lambda path: path == user / out)
    check(user / out, kind=kind, overwrite=True)


def symlink(user: Path) -> Path:
    (user / "link.json").symlink_to("data.json")
    return user / "link.json"


def hard_link(user: Path) -> Path:
    os.link(user / "data.json", user / "hard.json")
    return user / "hard.json"


def through_folder(user: Path) -> Path:
    (user / "here").symlink_to(user)
    return user / "here" / "nothing" / ".." / "data.json"


@pytest.mark.parametrize("spelled", [symlink, hard_link, through_folder])
def test_an_input_is_known_in_any_spelling(user: Path, spelled: Callable[[Path], Path]) -> None:
    options: dict[str, Any] = {"kind": "file", "inputs": {"--data": user / "data.json"}, "ours": lambda path: True}
    with pytest.raises(ValueError, match="is the file that --data names; expected a new or empty place"):
        check(spelled(user), **options)
    with pytest.raises(ValueError, match="is the file that --task names"):
        check(user / "data.json", **(options | {"inputs": {"--task": ["other", user / "data.json"]}}))
    check(user / "data.json", **options, overwrite=True)


def test_a_folder_that_is_read_is_never_written_over(user: Path) -> None:
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is the folder that --model names; expected another place"):
            check(user / "model", inputs={"--model": user / "model"}, overwrite=overwrite)
        with pytest.raises(ValueError, match="is the folder that --images names"):
            check(user / "model", inputs={}, searched={"--images": user / "model"}, overwrite=overwrite)


def test_an_output_lies_in_no_input_and_around_none(user: Path) -> None:
    inputs = {"--model": user / "model"}
    with pytest.raises(ValueError, match=r"lies in the folder .*model that --model names"):
        check(user / "model" / "deep" / "out", inputs=inputs)
    (user / "elsewhere").symlink_to(user / "model")
    with pytest.raises(ValueError, match=r"lies in the folder .*model that --model names"):
        check(user / "elsewhere" / "out", inputs=inputs)
    with pytest.raises(ValueError, match=r"is around .*config.json, which --data names"):
        check(user / "model", inputs={"--data": user / "model" / "config.json"}, ours=lambda path: True)
    check(user / "model" / "out", inputs=inputs, overwrite=True)
    check(user / "model" / "out", inputs={}, searched={"--images": user / "model"})


def test_object_stores_are_compared_by_name(user: Path) -> None:
    check("s3://bucket/out", inputs={"--train": ["s3://bucket/train"]})
    with pytest.raises(ValueError, match="is what --train names; expected another place"):
        check("s3://bucket/train/", inputs={"--train": ["s3://bucket/train"]})


def test_pipes_and_devices_are_no_output(user: Path) -> None:
    os.mkfifo(user / "pipe")
    for out in (user / "pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match="is neither a file nor a folder; expected a file"):
            check(out, kind="file", overwrite=True)


def test_a_file_is_no_folder(user: Path) -> None:
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        check(user / "data.json", overwrite=True)
    with pytest.raises(ValueError, match="is a folder; expected a file"):
        check(user / "nothing", kind="file")


def test_a_marked_folder_is_its_commands_own(user: Path) -> None:
    mark(user / "new", "warmup")
    assert is_marked(user / "new", "warmup")
    assert not is_marked(user / "new", "export")
    for content in ("", "[]", "{", "[" * 100_000, "\xff"):
        (user / "new" / MARK).write_text(content, encoding="latin-1")
        assert not is_marked(user / "new", "warmup")


def test_a_file_is_replaced_whole_or_stays(user: Path) -> None:
    with pytest.raises(RuntimeError), whole_file(user / "data.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (user / "data.json").read_text() == "[1]"
    put(user / "data.json", '[2, "é"]')
    assert (user / "data.json").read_bytes() == '[2, "é"]'.encode()
    assert sorted(path.name for path in user.iterdir()) == ["data.json", "model", "nothing"]


def test_writing_through_a_link_keeps_the_link(user: Path) -> None:
    put(symlink(user), "[3]")
    assert (user / "link.json").is_symlink()
    assert (user / "data.json").read_text() == "[3]"
