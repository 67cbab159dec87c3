"""NAME=VALUE options: names, paths, and what a comma or a colon in a path means."""

from pathlib import Path

import pytest

from icons.cli.pairs import files_of, several, stores_of


def test_tasks_are_named_files(tmp_path: Path) -> None:
    file = tmp_path / "gqa.json"
    file.write_text("[]")
    assert files_of([f"gqa={file}", f"pope={file}:{tmp_path}"]) == {"gqa": (file, None), "pope": (file, tmp_path)}
    with pytest.raises(ValueError, match=r"--task gqa: expected NAME=VALUE, for example --task gqa=gqa\.json:images/"):
        files_of(["gqa"])
    with pytest.raises(ValueError, match="gqa is given twice; expected different names"):
        files_of([f"gqa={file}", f"gqa={file}"])
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.json; expected NAME=FILE"):
        files_of([f"gqa={tmp_path}/none.json"])


def test_a_comma_in_the_name_of_a_store_that_is_there_parts_nothing(tmp_path: Path) -> None:
    for name in ("k=1,2,3.zarr", "b.zarr"):
        (tmp_path / name).mkdir()
    one, two = f"{tmp_path}/k=1,2,3.zarr", f"{tmp_path}/b.zarr"
    assert stores_of([f"gqa={one}"], "--task") == {"gqa": [one]}
    assert several(f"{one},{two},{one}", "--task gqa") == [one, two, one]
    assert several(f"{two},s3://bucket/c.zarr,none.zarr", "--task gqa") == [two, "s3://bucket/c.zarr", "none.zarr"]


@pytest.mark.parametrize("value", ["a.zarr,", ",a.zarr", "a.zarr,,b.zarr"])
def test_an_empty_path_among_several_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"--task gqa=.*: a path is empty; expected one before and behind each comma"):
        several(value, "--task gqa")
