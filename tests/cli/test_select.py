import csv
import json
from pathlib import Path

import numpy as np
import pytest

from icons.cli import main
from icons.consensus import select
from icons.consensus.selection_file import open_selection
from icons.store import GradientStore, ScoreStore

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(60, 3)).astype(np.float32)
SCORES[11] = np.nan
RECORDS = [
    {"id": f"r{row}", "image": f"{'coco' if row % 3 else 'gqa'}/{row}.jpg", "kind": row % 2} for row in range(60)
]
LINES = [json.dumps(record, separators=(", ", " :")).encode() for record in RECORDS]  # not as anyone would write it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scores = ScoreStore.create(
        tmp_path / "scores.zarr",
        num_rows=60,
        tasks=["gqa", "pope", "vqa"],
        manifest={"dim": 64, "warnings": ["the warm-up has hardly moved"]},
        extra={"tokens": ("int32", []), "loss": ("float32", [])},
    )
    status = np.where(np.isnan(SCORES[:, 0]), 3, 1).astype(np.uint8)
    extra = {"tokens": np.full(60, 10, np.int32), "loss": RNG.random(60).astype(np.float32)}
    scores.write_unit(0, SCORES, np.full_like(SCORES, 0.01), status, **extra)
    (tmp_path / "train.json").write_bytes(b"[" + b",\n ".join(LINES) + b"]")
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(LINES) + b"\n")
    return tmp_path


def run(folder: Path, *words: str, data: str = "train.json", out: str = "selected.json") -> int:
    return main(
        [
            "select",
            "--scores",
            f"{folder}/scores.zarr",
            "--data",
            f"{folder}/{data}",
            "--out",
            f"{folder}/{out}",
            *words,
        ]
    )


def test_the_selected_records_are_written_byte_for_byte_in_their_own_form(folder: Path) -> None:
    rows = select(SCORES).rows.tolist()
    assert run(folder) == 0
    content = (folder / "selected.json").read_bytes()
    assert [record["id"] for record in json.loads(content)] == [f"r{row}" for row in rows]
    assert all(LINES[row] in content for row in rows)
    assert run(folder, data="train.jsonl", out="selected.jsonl") == 0
    assert (folder / "selected.jsonl").read_bytes() == b"".join(LINES[row] + b"\n" for row in rows)


def test_the_manifest_lies_beside_and_the_border_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--fraction", "0.5") == 0
    saved = open_selection(folder / "selected.json")
    assert saved.rows.tolist() == select(SCORES, 0.5).rows.tolist()
    assert saved.manifest["method"] == "vote" and saved.manifest["fraction"] == 0.5 and saved.manifest["num_rows"] == 60
    assert saved.manifest["border"]["certain"] + saved.manifest["border"]["may_leave"] == 30
    said = capsys.readouterr().out
    assert "30 of 60 rows selected by vote; 1 failed row cannot be" in said and "certain at 95 %" in said
    assert "hardly moved" in said


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_table_has_the_best_row_first(folder: Path, suffix: str) -> None:
    assert run(folder, "--table", f"{folder}/table{suffix}") == 0
    if suffix == ".csv":
        with (folder / "table.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(folder / "table.parquet").to_pylist()
    chosen = select(SCORES)
    best = max(chosen.rows.tolist(), key=lambda row: (chosen.votes[row], chosen.percentile_rank[row]))
    assert len(table) == 60 and int(table[0]["row"]) == best and table[0]["id"] == f"r{best}"
    assert sorted(int(line["row"]) for line in table[:12]) == chosen.rows.tolist()
    assert [str(line["selected"]) for line in table] == ["True"] * 12 + ["False"] * 48
    assert int(table[-1]["row"]) == 11 and table[-1]["status"] == "image_missing"
    assert float(table[0]["influence_gqa"]) == pytest.approx(float(SCORES[best, 0]))
    assert [int(entry["rank"]) for entry in table] == list(range(1, 61))


def test_lists_quotas_and_budgets_reach_the_selection(folder: Path) -> None:
    (folder / "in.txt").write_text("59\n3\n")
    (folder / "out.json").write_text(json.dumps(["r1", "r2", {"id": "r4"}, 5]))
    assert run(folder, "--include", f"{folder}/in.txt", "--exclude", f"{folder}/out.json", "--max-tokens", "75") == 0
    rows = open_selection(folder / "selected.json").rows.tolist()
    assert {3, 59} <= set(rows) and not {1, 2, 4, 5} & set(rows) and len(rows) == 7
    assert run(folder, "--source-quota", "gqa=0.1") == 0
    assert sum(row % 3 == 0 for row in open_selection(folder / "selected.json").rows.tolist()) <= 1
    assert run(folder, "--source-field", "kind", "--source-weight", "1=9") == 0
    votes = select(SCORES).votes
    wanted = sorted(range(60), key=lambda row: -votes[row] * (9 if row % 2 else 1))[:12]
    found = open_selection(folder / "selected.json").rows
    assert sum(found % 2) == sum(row % 2 for row in wanted) > sum(select(SCORES).rows % 2)
    assert run(folder, "--weight", "pope=0", "--weight", "vqa=0", "--task-quota", "gqa=1") == 0
    assert open_selection(folder / "selected.json").rows.tolist() == sorted(
        np.argsort(-np.nan_to_num(SCORES[:, 0], nan=-9))[:12]
    )
    assert run(folder, "--method", "loss") == 0


def test_near_duplicates_of_scores_without_gradients_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--near-duplicates", "0.99") == 1
    assert "name no gradients of training rows" in capsys.readouterr().err


def test_near_duplicates_make_room_for_the_next_best(folder: Path) -> None:
    rows = RNG.normal(size=(60, 16)).astype(np.float32)
    plain = select(SCORES).rows
    rows[plain] = rows[plain[0]]  # all the same: one of them may stay
    train = GradientStore.create(folder / "train.zarr", num_rows=60, dim=16, manifest={})
    one = np.ones(60)
    train.write_unit(0, {"gradient": rows, "norm": one, "loss": one, "tokens": one, "status": one})
    assert run(folder, "--near-duplicates", "0.99", "--train", f"{folder}/train.zarr") == 0
    found = open_selection(folder / "selected.json").rows
    assert len(found) == 12 and len(np.intersect1d(found, plain)) == 1


def test_other_data_and_unfinished_scores_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "short.jsonl").write_bytes(b"\n".join(LINES[:59]) + b"\n")
    assert run(folder, data="short.jsonl") == 1
    assert "has 59 records, the scores" in capsys.readouterr().err
    known = {"data": {"fingerprint": "other"}}
    scores = ScoreStore.create(folder / "known.zarr", num_rows=60, tasks=["gqa"], manifest=known)
    words = [
        "select",
        "--scores",
        f"{folder}/known.zarr",
        "--data",
        f"{folder}/train.json",
        "--out",
        f"{folder}/s.json",
    ]
    assert main(words) == 1
    assert "60 of 60 rows are not scored yet" in capsys.readouterr().err
    scores.write_unit(0, SCORES[:, :1], SCORES[:, :1], np.ones(60, np.uint8))
    assert main(words) == 1
    assert "were made from other" in capsys.readouterr().err


CASES = [
    (["--weight", "pope=much"], "--weight pope=much: expected NAME=NUMBER"),
    (["--include", "nowhere.txt"], "list nowhere.txt: no such file"),
    (["--include", "."], "list .: is a folder; expected a selection, row numbers"),
    (["--table", "table.xlsx"], "expected .csv or .parquet"),
    (["--num-rows", "100"], "number of rows: got 100; expected 0 to 60, which the scores have"),
    (["--fraction", "0.01"], "selection: has none of 60 rows; expected one or more"),
    (["--format", "swift", "--images", "nowhere"], "--images nowhere: no such folder"),
]


@pytest.mark.parametrize(("words", "message"), CASES)
def test_wrong_options_are_said_in_one_line(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, *words) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "r5", "got 'r5'; expected row numbers"),
        ("a.json", "[true]", "expected row numbers, ids, or records with an id"),
        ("a.json", '["r77"]', "no record has the id 'r77'"),
    ],
)
def test_lists_that_cannot_be_read_are_refused(
    folder: Path, name: str, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_text(content)
    assert run(folder, "--exclude", f"{folder}/{name}") == 1
    assert message in capsys.readouterr().err


def test_compare_counts_rows_ids_and_tasks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0 and run(folder, "--method", "mean", out="mean.json") == 0
    one, other = (set(open_selection(folder / name).rows.tolist()) for name in ("selected.json", "mean.json"))
    words = ["compare", f"{folder}/selected.json", f"{folder}/mean.json", "--out", f"{folder}/overlap.json"]
    assert main(words) == 0
    found = json.loads((folder / "overlap.json").read_text())
    assert found["by"] == "row" and found["shared"] == len(one & other) and found["shared_by_chance"] == 12 * 12 / 60
    assert found["tasks"]["names"] == ["gqa", "pope", "vqa"] and found["tasks"]["overlap"][0][0] == 1
    assert main([*words, "--by", "id"]) == 0
    assert json.loads((folder / "overlap.json").read_text())["shared"] == len(one & other)
    (folder / "published.json").write_text(json.dumps([{"id": f"r{row}", "conversations": []} for row in range(30)]))
    assert (
        main(["compare", f"{folder}/selected.json", f"{folder}/published.json", "--out", f"{folder}/overlap.json"]) == 0
    )
    found = json.loads((folder / "overlap.json").read_text())
    assert found["by"] == "id" and found["shared"] == sum(row < 30 for row in one)
    assert "overlap by id" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("a", "b", "by", "message"),
    [
        ("ids.json", "rows.txt", "row", "ids.json: holds ids, no row numbers"),
        ("rows.txt", "ids.json", "id", "rows.txt: holds row numbers, no ids"),
        ("rows.json", "ids.json", "id", "rows.json: holds no ids"),
        ("rows.json", "nothing.json", "auto", "nothing.json: is empty; expected a selection"),
        ("nothing.txt", "rows.txt", "auto", "nothing.txt: is empty; expected a selection"),
        ("list.json", "rows.txt", "row", "list.json: is empty; expected a selection"),
    ],
)
def test_lists_without_what_is_compared_are_refused(
    tmp_path: Path, a: str, b: str, by: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {"ids.json": '["a"]', "rows.txt": "1\n2", "rows.json": "[1]", "list.json": "[]"}
    for name, content in (contents | {"nothing.json": "", "nothing.txt": "\n"}).items():
        (tmp_path / name).write_text(content)
    assert main(["compare", f"{tmp_path}/{a}", f"{tmp_path}/{b}", "--by", by]) == 1
    assert message in capsys.readouterr().err


def test_rules_of_ones_own_and_options_of_rules_reach_the_selection(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "my_rules.py").write_text(
        "import numpy as np\n"
        "def last_rows(scores):\n"
        "    assert scores.stored('influence', slice(0, 2)).shape == (2, 3)\n"
        "    return np.arange(scores.num_rows)[::-1]\n"
        "def few(scores):\n    return [1, 2]\n"
        "def broken(scores):\n    return scores.nothing\n"
    )
    monkeypatch.chdir(folder)
    assert run(folder, "--method", "my_rules:last_rows", "--num-rows", "50") == 0
    saved = open_selection(folder / "selected.json")
    assert saved.rows.tolist() == [row for row in range(9, 60) if row != 11]
    assert saved.manifest["method"] == "my_rules:last_rows"
    assert run(folder, "--method", "my_rules:few") == 1
    assert "rule my_rules:few: gave 2 rows that can be selected; expected 12 or more" in capsys.readouterr().err
    assert run(folder, "--method", "my_rules:broken") == 1
    assert "rule my_rules:broken: raised AttributeError: " in capsys.readouterr().err
    assert run(folder, "--method", "my_rules:none") == 1
    assert "my_rules has no function 'none'" in capsys.readouterr().err
    assert run(folder, "--method", "no_rules:none") == 1
    assert "there is no module 'no_rules'" in capsys.readouterr().err
    assert run(folder, "--method", "filtered_random", "--option", "better=0.2") == 0
    best = set(np.argsort(-np.nan_to_num(SCORES.mean(axis=1), nan=-9))[:12].tolist())
    assert set(open_selection(folder / "selected.json").rows.tolist()) == best
    assert run(folder, "--method", "balanced") == 1
    assert "expected --train STORE and --task NAME=STORE for gqa, pope, vqa" in capsys.readouterr().err
    assert run(folder, "--method", "best") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --method best: expected one of vote, mean, ")
    assert run(folder, "--num-rows", "5", "--fraction", "0.1") == 1
    assert "--num-rows 5 and --fraction 0.1: each says how many rows to select" in capsys.readouterr().err


def test_another_tools_form_is_a_folder_with_a_card(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    records = [{"id": f"r{row}", "image": f"{row}.jpg", "conversations": turns} for row in range(60)]
    (folder / "talk.json").write_text(json.dumps(records))
    words = ["--format", "swift", "--images", str(folder)]
    assert run(folder, *words, data="talk.json", out="swift") == 0
    rows = open_selection(folder / "swift").rows.tolist()
    lines = [json.loads(line) for line in (folder / "swift" / "data.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [[f"{folder}/{row}.jpg"] for row in rows]
    assert "| rule | vote at 20 % |" in (folder / "swift" / "README.md").read_text()
    assert run(folder, *words, data="talk.json", out="swift") == 0  # its own former output
    (folder / "mine").mkdir()
    (folder / "mine" / "letter.txt").write_text("")
    assert run(folder, *words, data="talk.json", out="mine") == 1
    assert [path.name for path in (folder / "mine").iterdir()] == ["letter.txt"]
    (folder / "swift" / "notes").mkdir()
    (folder / "swift" / "notes" / "mine.txt").write_text("stays")
    for name in ("mine.txt", "data.jsonl"):  # a file of the user's, and one that the user has changed
        with (folder / "swift" / name).open("a") as file:
            file.write("mine")
        capsys.readouterr()
        assert run(folder, *words, data="talk.json", out="swift") == 1
        assert f"swift: holds {name}, which is not as this command wrote it" in capsys.readouterr().err
        assert (folder / "swift" / name).read_text().endswith("mine")
        assert run(folder, *words, "--overwrite", data="talk.json", out="swift") == 0
    assert run(folder, *words[:1], "trl", *words[2:], data="talk.json", out="swift") == 0
    assert (folder / "swift" / "notes" / "mine.txt").read_text() == "stays"
    table = ["--table", str(folder / "new" / "table.csv")]
    assert run(folder, *words, *table, "--overwrite", data="talk.json", out="new") == 1
    assert "new/table.csv: lies in " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "file", "said"),
    [
        ("a.manifest.json", "", "is called as the manifest of a selection"),
        ("a.json", ".a.json.unfinished", "the note of --out"),
    ],
)
def test_no_name_of_a_selection_takes_anothers_place(
    folder: Path, capsys: pytest.CaptureFixture[str], out: str, file: str, said: str
) -> None:
    if file:
        (folder / file).write_text("mine")
    assert run(folder, out=out) == 1
    assert said in capsys.readouterr().err
    assert not (folder / out).exists() and (not file or (folder / file).read_text() == "mine")
