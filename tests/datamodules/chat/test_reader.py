"""What reads a record is known by its content: not by its place, its spacing, or who wrote it."""

import json
import shutil
from pathlib import Path

import pytest

from icons.datamodules.chat.reader import describe_reader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "transformers_version": "4.57"}')
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "m" / "preprocessor_config.json").write_text('{"size": 336, "do_resize": true}')
    return tmp_path / "m"


def test_a_copy_written_by_another_version_reads_the_same(folder: Path, tmp_path: Path) -> None:
    before = describe_reader(folder, folder, None)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    settings = json.dumps({"transformers_version": "5.0", "chat_template": "x", "bos_token": "<s>"}, indent=4)
    (copy / "tokenizer_config.json").write_text(settings)
    assert describe_reader(copy, copy, None) == before


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("preprocessor_config.json", '{"size": 448, "do_resize": true}', "processor"),
        ("processor_config.json", "{}", "processor"),
        ("tokenizer.model", "pieces!", "tokenizer"),
        ("added_tokens.json", '{"<image>": 3}', "tokenizer"),
        ("tokenizer_config.json", "[broken", "tokenizer"),
    ],
)
def test_a_changed_file_changes_its_part_alone(folder: Path, file: str, content: str, part: str) -> None:
    before = describe_reader(folder, folder, "t")
    (folder / file).write_text(content)
    after = describe_reader(folder, folder, "t")
    assert {name for name in before if before[name] != after[name]} == {part}


def test_another_chat_template_is_another_reader(folder: Path) -> None:
    one, two = (describe_reader(folder, None, text)["chat_template"] for text in ("a", "b"))
    assert one != two and describe_reader(folder, None, None)["chat_template"] is None
    assert describe_reader(folder, None, None)["processor"] is None
