"""The files of a selection take their places together: of two runs at once none mixes its files with the other's."""

import threading
from pathlib import Path

import numpy as np
import pytest

import icons.consensus.selection_output as selection_output
from icons.consensus.selection_file import is_written_by, list_paths, note_path, open_selection, save_lists
from icons.consensus.selection_output import SelectionOutput


def publish(selection: Path, rows: list[int]) -> None:
    with SelectionOutput(selection, list_paths(selection)) as new:
        new.partials["data"].write_text(f"{rows}")
        save_lists(new.partials, np.array(rows), [f"r{row}" for row in rows])
        new.publish(np.array(rows), {"method": "vote"})


def contents(selection: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in selection.parent.iterdir()}


def test_of_two_that_publish_at_once_the_second_waits_and_replaces_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection, move, second = tmp_path / "selected.json", selection_output.move, threading.Thread()

    def slow(partial: Path, place: Path) -> None:
        nonlocal second
        move(partial, place)
        if second.ident is None:
            second = threading.Thread(target=publish, args=(selection, [2, 3]))
            second.start()
            second.join(0.3)
            assert second.is_alive(), "which waits"

    monkeypatch.setattr(selection_output, "move", slow)
    publish(selection, [0, 1])
    second.join()
    found = contents(selection)
    publish(tmp_path / "alone" / "selected.json", [2, 3])
    assert found == contents(tmp_path / "alone" / "selected.json")


@pytest.mark.parametrize("moved", range(3))
def test_a_run_that_is_killed_between_two_files_leaves_what_the_same_line_may_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    selection, move, calls = tmp_path / "selected.json", selection_output.move, list[Path]()

    class Killed(Exception):
        pass

    def killed(partial: Path, place: Path) -> None:
        if len(calls) == moved:
            raise Killed
        calls.append(place)
        move(partial, place)

    publish(selection, [0, 1])
    (tmp_path / "stranger.json").write_text("the user's")
    for rows in ([2, 3], [4, 5]):  # what the first one left is known after the second, too
        calls.clear()
        monkeypatch.setattr(selection_output, "move", killed)
        with pytest.raises(Killed):
            publish(selection, rows)
        monkeypatch.setattr(selection_output, "move", move)
        with pytest.raises(ValueError, match="a run was about to replace it and did not end"):
            open_selection(selection)
        for name, path in {"data": selection, **list_paths(selection)}.items():
            assert is_written_by(selection, name, path)
            assert not is_written_by(selection, name, tmp_path / "stranger.json")
    publish(selection, [6])
    assert open_selection(selection).rows.tolist() == [6] and not note_path(selection).exists()
