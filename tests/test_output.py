"""What a command may write over, and that it is whole when it is there."""

import ast
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import icons
from icons.folder_lock import in_turn
from icons.output import MARK, check_output, is_marked, mark, put, whole_file, whole_folder


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


def test_of_two_new_outputs_none_lies_in_the_other(user: Path) -> None:
    with pytest.raises(ValueError, match=r"lies in the folder .*new that --out names"):
        check(user / "new" / "kept", inputs={"--out": user / "new"})
    with pytest.raises(ValueError, match=r"is around .*kept, which --out names"):
        check(user / "new", inputs={"--out": user / "new" / "kept"})


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


def test_a_place_where_nothing_can_be_made_is_refused_before_anything_is_computed(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(out: Path) -> None:
        check_output(out, kind="folder", inputs={}, ours=lambda _: False)

    check(user / "new" / "out")
    with pytest.raises(ValueError, match=r"--out .*data.json/out: cannot be made: .*data.json is a file; give another"):
        check(user / "data.json" / "out")
    # root may write everywhere but on a read-only file system
    monkeypatch.setattr(os, "access", lambda path, mode: path != user)
    with pytest.raises(ValueError, match=rf"out: cannot be made: {user} may not be written by this user, or not at"):
        check(user / "new" / "out")


def test_writing_through_a_link_keeps_the_link(user: Path) -> None:
    put(symlink(user), "[3]")
    assert (user / "link.json").is_symlink()
    assert (user / "data.json").read_text() == "[3]"


def export(out: Path, weights: str) -> None:
    with whole_folder(out, last="mark.json", stale=lambda name: name.endswith(".safetensors")) as partial:
        (partial / "deep").mkdir()
        for name in ("mark.json", f"{weights}.safetensors", "deep/config.json"):
            (partial / name).write_text(weights)


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_appears_whole_and_takes_the_place_of_a_former_one(user: Path) -> None:
    export(user / "out", "one")
    assert files(user / "out") == {"mark.json": "one", "one.safetensors": "one", "deep/config.json": "one"}
    (user / "out" / "notes.txt").write_text("mine")
    export(user / "out", "two")  # the weights of two models in one folder would be neither
    expected = {"mark.json": "two", "two.safetensors": "two", "deep/config.json": "two"}
    assert files(user / "out") == expected | {"notes.txt": "mine"}
    with pytest.raises(RuntimeError), whole_folder(user / "not", last="m", stale=lambda name: False):
        raise RuntimeError
    assert sorted(path.name for path in user.iterdir()) == ["data.json", "model", "nothing", "out"]


def test_two_runs_put_their_files_into_one_folder_one_after_the_other(user: Path) -> None:
    export(user / "out", "one")
    second = threading.Thread(target=export, args=(user / "out", "two"))
    with in_turn(user):
        second.start()
        second.join(0.2)
        assert files(user / "out") == {"mark.json": "one", "one.safetensors": "one", "deep/config.json": "one"}
    second.join()
    assert files(user / "out") == {"mark.json": "two", "two.safetensors": "two", "deep/config.json": "two"}


WRITES = {"write_text", "write_bytes", "save_file", "savefig", "to_csv", "copyfile", "copy", "copytree", "mkstemp"}
BESIDE = {"whole_file", "whole_folder"}
PACKAGE = Path(icons.__file__).parent
# the store's own atomic files; a worker's log, which grows; what is written inside `with whole_folder` of a caller
ELSEWHERE = {"datamodules/training_formats.py", "datamodules/records/tar_file.py"} | {
    "datamodules/benchmarks/benchmark.py",
    "output.py",
    "store/file.py",
    "models/export/folder.py",
    "models/export/processor.py",
}


def test_nothing_is_written_but_beside_its_place() -> None:
    found = []
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if name not in ELSEWHERE:
            found += [f"{name}: {call}" for call in unguarded(ast.parse(file.read_text()))]
    allowed = [
        "cli/demo.py: copytree(start",
        "consensus/pairs.py: open('wb', buffering=1 << 22)",
        "validation/retraining.py: open('w', buffering=1)",
    ]
    assert [call for call in found if not call.startswith(tuple(allowed))] == []


def unguarded(node: ast.AST) -> Iterator[str]:
    """Calls that write a file, outside of a `with` that puts it in its place."""
    if isinstance(node, ast.With):
        calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        if BESIDE & {getattr(call.func, "id", "") for call in calls}:
            return
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        mode = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        opened = name == "open" and any(word[:1] in ("w", "a", "x") and len(word) <= 3 for word in mode)
        if opened or (name in WRITES and not is_copy_of_memory(node)):
            yield f"{name}({', '.join(ast.unparse(part) for part in [*node.args, *node.keywords])})"
    for child in ast.iter_child_nodes(node):
        yield from unguarded(child)


def is_copy_of_memory(call: ast.Call) -> bool:
    """`array.copy()`, unlike `shutil.copy(a, b)`."""
    return isinstance(call.func, ast.Attribute) and call.func.attr == "copy" and len(call.args) < 2


def test_a_file_system_that_cannot_make_names_durable_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, asked = os.fsync, []

    def of_files_alone(descriptor: int) -> None:
        asked.append(descriptor)
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    put(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole" and len(asked) == 2

    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        put(tmp_path / "a.txt", "other")
    assert (tmp_path / "a.txt").read_text() == "whole" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]
