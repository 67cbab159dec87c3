"""SelectionOutput: the files of one selection, which take their places together.

They are several (data, lists, table, manifest), and no file system replaces several at once. So all are written beside
their places first; then a note, `.SELECTION.unfinished`, says what is about to stand where; then each takes its place,
the manifest last, and the note goes. Whatever a killed run leaves is what the former manifest or the note states, and
the same line goes on from there.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from icons.consensus.selection_file import (
    NOTE,
    digests,
    manifest_path,
    manifest_text,
    note_path,
    noted,
)
from icons.folder_lock import in_turn
from icons.output import at_the_top, beside, flush_path, flush_tree, move_into, put, remove, sweep_partials


class SelectionOutput:
    """Where to write the files of a selection; `publish` puts them into their places. As a context manager it takes
    away what was not published.

    Args:
        selection: the selected data, a file or a folder.
        files: those beside it, by the names under which its manifest has them.
    """

    def __init__(self, selection: Path, files: Mapping[str, Path]) -> None:
        self.selection = selection
        # a link stays: what it leads to is replaced
        self.places = {name: Path(os.path.realpath(path)) for name, path in {"data": selection, **files}.items()}
        self.partials = {name: beside(path) for name, path in self.places.items()}

    def __enter__(self) -> "SelectionOutput":
        for target in [*self.places.values(), self.selection]:
            target.parent.mkdir(parents=True, exist_ok=True)
            sweep_partials(target.parent)
        return self

    def __exit__(self, *error: object) -> None:
        for partial in self.partials.values():
            remove(partial)

    def publish(self, rows: Int[np.ndarray, " selected"], manifest: Mapping[str, Any]) -> None:
        """Puts what was written into its places, whole or, if it is killed, so that the same line can do it again.

        Runs that publish into one folder at once do so one after the other: none mixes its files with another's.
        """
        written = {
            of: content for name, partial in self.partials.items() for of, content in digests(name, partial).items()
        }
        note = note_path(self.selection)
        with in_turn(self.selection.parent):
            accepted = {name: set(several) for name, several in noted(self.selection).items()}
            for name, content in written.items():
                accepted.setdefault(name, set()).add(content)
            stated = {"kind": NOTE, "written": {name: sorted(accepted[name]) for name in accepted}}
            put(note, json.dumps(stated) + "\n")
            for name, partial in self.partials.items():
                if partial.exists():
                    move(partial, self.places[name])
            put(manifest_path(self.selection), manifest_text(rows, manifest, written))
            note.unlink()


def move(partial: Path, target: Path) -> None:
    """Gives a file or a folder its place, durably. In a folder that is there, folders that it has beside stay."""
    flush_tree(partial)
    if target.is_dir() and any(target.iterdir()):
        move_into(partial, target, last="README.md", stale=at_the_top)
    else:
        partial.replace(target)
    flush_path(target.parent)
