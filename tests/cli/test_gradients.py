"""`icons gradients`: broken records fail alone, wrong settings are one line, and nothing that was done is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from icons.batch import Status
from icons.cli import command_line as cli
from icons.cli.gradients import summary
from icons.store import GradientStore

DATA = Path(__file__).parents[1] / "data" / "original_llava"
pytestmark = pytest.mark.filterwarnings("ignore")
PARTS = ["--model", DATA / "vicuna-tiny", "--vision-tower", DATA / "clip", "--mm-projector", DATA / "mm_projector.bin"]
PARTS += ["--adapter", DATA / "llava-tiny-lora", "--preconditioner", "none", "--dim", 64, "--dtype", "float32"]


def run(data: Path, out: Path, *more: object) -> int:
    words = [*PARTS, "--data", data, "--images", DATA, "--chunk-rows", 2, "--out", out, "--trainer.accelerator", "cpu"]
    return cli.main(["gradients", *map(str, [*words, *more])])


def good() -> list[dict[str, Any]]:
    return json.loads((DATA / "data.json").read_text())


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good records in rows 0, 3 and 8; everything that real files contain between them."""
    first, second, third = good()
    (tmp_path / "zero.png").write_bytes(b"")
    turns = first["conversations"]
    rows: list[Any] = [
        first, {**first, "image": "nowhere.png"}, {"id": "none"}, second, {**first, "image": "../../../etc/passwd"},
        {**first, "image": "data.json"}, {**first, "conversations": [turns[0], {"from": "gpt", "value": ""}]}, 7, third,
    ]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    lines[7] = '{"id": "broken", '
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    return tmp_path / "mixed.jsonl"


def test_a_broken_record_fails_alone(mixed: Path, tmp_path: Path) -> None:
    assert run(DATA / "data.json", tmp_path / "good.zarr", "--batch-size", 1) == 0
    assert run(mixed, tmp_path / "mixed.zarr", "--batch-size", 1) == 0
    clean, store = GradientStore.open(tmp_path / "good.zarr"), GradientStore.open(tmp_path / "mixed.zarr")
    expected = [
        Status.DONE, Status.IMAGE_MISSING, Status.BAD_RECORD, Status.DONE, Status.IMAGE_MISSING, Status.IMAGE_BROKEN,
        Status.NO_SUPERVISED_TOKEN, Status.BAD_RECORD, Status.DONE,
    ]  # fmt: skip
    assert store.status[:].tolist() == expected
    assert np.array_equal(store.gradients[:][[0, 3, 8]], clean.gradients[:])
    assert not store.gradients[:][1].any()
    assert np.isnan(store.norm[:][1])


def test_failed_rows_change_the_exit_status_only_with_strict(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(mixed, tmp_path / "a.zarr") == 0
    assert run(mixed, tmp_path / "a.zarr", "--strict") == 1
    assert "a.zarr: 6 of 9 rows failed; expected none (--strict)" in capsys.readouterr().err


def test_the_summary_and_the_store_say_why_rows_failed(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(mixed, tmp_path / "a.zarr") == 0
    summary = capsys.readouterr().out
    assert cli.main(["status", str(tmp_path / "a.zarr")]) == 0
    for said in (summary, capsys.readouterr().out):
        assert f"row 1 (id {good()[0]['id']}): image nowhere.png is not in {DATA}" in said
        assert (
            "row 2 (id none): the record has id (empty); expected llava: `conversations` of `from` and `value`" in said
        )
        assert "row 7: the record cannot be read: not valid JSON" in said


def test_a_run_of_which_every_row_fails_ends_with_1_and_the_first_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{**one, "image": "img1.png"} for one in good()]))
    assert run(data, tmp_path / "a.zarr", "--images", tmp_path / "images") == 1
    said = capsys.readouterr().err
    assert "each of its rows failed (3); the first, row 0" in said and "image img1.png is not in" in said
    words = ["--train", tmp_path / "a.zarr", "--task", f"a={tmp_path / 'a.zarr'}", "--out", tmp_path / "scores.zarr"]
    assert cli.main(["influence", *map(str, words)]) == 1
    assert "each of its rows failed (3)" in capsys.readouterr().err


def test_failed_rows_are_retried_on_demand(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(DATA, folder)
    (folder / "img1.png").rename(folder / "away.png")
    words = ["--images", folder]
    assert run(DATA / "data.json", tmp_path / "a.zarr", *words) == 0
    assert GradientStore.open(tmp_path / "a.zarr").status[:].tolist() == [1, 1, int(Status.IMAGE_MISSING)]
    (folder / "away.png").rename(folder / "img1.png")
    assert run(DATA / "data.json", tmp_path / "a.zarr", *words) == 0
    assert GradientStore.open(tmp_path / "a.zarr").status[:].tolist()[2] == Status.IMAGE_MISSING
    assert run(DATA / "data.json", tmp_path / "a.zarr", *words, "--retry-failed") == 0
    assert GradientStore.open(tmp_path / "a.zarr").status[:].tolist() == [1, 1, 1]


def test_shards_fill_one_store(tmp_path: Path) -> None:
    assert run(DATA / "data.json", tmp_path / "whole.zarr") == 0
    for shard in ("1/2", "0/2"):
        assert run(DATA / "data.json", tmp_path / "parts.zarr", "--shard", shard) == 0
    whole, parts = GradientStore.open(tmp_path / "whole.zarr"), GradientStore.open(tmp_path / "parts.zarr")
    assert np.array_equal(whole.gradients[:], parts.gradients[:])
    assert parts.missing() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", 1], "projector.seed"),
        (["--dtype", "float16"], "dtype"),
        (["--preconditioner", "sign"], "preconditioner.form"),
        (["--target", "trainable"], "model.fingerprint"),
        (["--model-dtype", "bfloat16"], "the same in another number format: --model-dtype"),
        (["--max-length", 60], "preprocessing.max_length"),
    ],
)
def test_a_store_of_other_settings_is_not_touched(
    words: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(DATA / "data.json", tmp_path / "a.zarr") == 0
    before = GradientStore.open(tmp_path / "a.zarr").gradients[:]
    assert run(DATA / "data.json", tmp_path / "a.zarr", *words) == 1
    assert message in capsys.readouterr().err
    assert np.array_equal(GradientStore.open(tmp_path / "a.zarr").gradients[:], before)


def test_a_store_of_another_dimension_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with_dim(DATA / "data.json", tmp_path / "a.zarr", 64) == 0
    assert run_with_dim(DATA / "data.json", tmp_path / "a.zarr", 32) == 1
    assert "projector.dim" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.inference_mode", "true"], "--trainer.inference_mode: expected False"),
        (["--preconditioner", "adam"], "needs Adam's moments: got no --optimizer-state"),
        (["--checkpoint", "warmup"], "got both of --checkpoint and --model"),
        (["--data", "nowhere.json"], "nowhere.json: no such data file"),
        (
            ["--task", "--preconditioner", "adam"],
            "--task: a task's rows are plain gradients; got --preconditioner",
        ),
        (["--template", "vicuna"], "template 'vicuna'"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(DATA / "data.json", tmp_path / "a.zarr", *words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_model_without_an_adapter_is_refused_before_anything_is_read(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icons.cli.model_source.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    words = [*PARTS[:6], "--data", DATA / "data.json", "--out", tmp_path / "a.zarr", *more]
    assert cli.main(["gradients", "--preconditioner", "none", *map(str, words)]) == 1
    captured = capsys.readouterr()
    assert "got no --adapter, whose parameters --target lora differentiates; name one" in captured.err
    assert captured.err.count("\n") == 1 and captured.out == "" and not (tmp_path / "a.zarr").exists()


def test_a_target_that_the_model_has_nothing_of_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icons.cli.model_source.load_model", lambda *_, **__: nn.Linear(1, 1).requires_grad_(False))
    words = [*PARTS[:6], "--data", DATA / "data.json", "--images", DATA, "--out", tmp_path / "a.zarr"]
    assert cli.main(["gradients", "--preconditioner", "none", "--target", "trainable", *map(str, words)]) == 1
    assert "--target trainable: " in (error := capsys.readouterr().err)
    assert "has no such parameter; expected one at least: name an adapter" in error


def test_neither_checkpoint_nor_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gradients", "--data", str(DATA / "data.json"), "--out", str(tmp_path / "a.zarr")]) == 1
    assert "got neither of --checkpoint and --model" in capsys.readouterr().err


def test_a_warmup_folder_brings_its_own_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*PARTS[:6], "--data", DATA / "data.json", "--images", DATA, "--lora-rank", 2, "--held-out", 0.0]
    assert cli.main(["warmup", *map(str, [*words, "--out", tmp_path / "w"])]) == 0
    base = ["gradients", "--checkpoint", tmp_path / "w", "--data", DATA / "data.json", "--out", tmp_path / "a.zarr"]
    for more, message in (
        (["--adapter", DATA], "names its own; leave the option out"),
        (["--max-length", 60], "gradients of differently prepared text do not compare"),
    ):
        assert cli.main([*map(str, [*base, *more])]) == 1
        assert message in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(DATA / "data.json", tmp_path / "a.zarr", "--dry-run") == 0
    whole = capsys.readouterr().out
    assert "dry run: nothing was written" in whole
    shared = ["--trainer.strategy", "model_parallel", "--trainer.devices", 2]
    assert run(DATA / "data.json", tmp_path / "a.zarr", "--dry-run", *shared) == 0
    weights = [line for line in (whole + capsys.readouterr().out).splitlines() if "memory, weights" in line]
    assert len(set(weights)) == 2  # the ranks share them
    assert not (tmp_path / "a.zarr").exists()


def stored(path: Path) -> dict[str, np.ndarray]:
    store = GradientStore.open(path)
    return {name: store.arrays[name][:] for name in ("gradients", "norm", "loss", "tokens", "status")}


def assert_same_store(one: Path, other: Path) -> None:
    found, expected = stored(one), stored(other)
    for name, values in expected.items():
        assert np.array_equal(found[name], values, equal_nan=values.dtype.kind == "f"), name


def test_several_dimensions_in_one_pass_are_each_as_if_alone(mixed: Path, tmp_path: Path) -> None:
    more = ["--preconditioner", "sign"]
    assert run(mixed, tmp_path / "all.zarr", "--dim", 48, "--dim", 16, *more) == 0
    for dim in (64, 48, 16):  # PARTS ask for 64
        assert run_with_dim(mixed, tmp_path / f"{dim}.zarr", dim, *more) == 0
        assert_same_store(tmp_path / f"all-dim{dim}.zarr", tmp_path / f"{dim}.zarr")
    assert not (tmp_path / "all.zarr").exists()


def run_with_dim(data: Path, out: Path, dim: int, *more: object) -> int:
    parts = [*PARTS]
    parts[parts.index("--dim") + 1] = dim
    words = [*parts, "--data", data, "--images", DATA, "--chunk-rows", 2, "--out", out, "--trainer.accelerator", "cpu"]
    return cli.main(["gradients", *map(str, [*words, *more])])


def test_a_store_begun_alone_is_gone_on_with_beside_others(mixed: Path, tmp_path: Path) -> None:
    assert run_with_dim(mixed, tmp_path / "a-dim16.zarr", 16, "--shard", "1/2") == 0
    assert run(mixed, tmp_path / "a.zarr", "--dim", 16, "--shard", "0/2") == 0
    assert GradientStore.open(tmp_path / "a-dim16.zarr").missing() == []
    assert GradientStore.open(tmp_path / "a-dim64.zarr").missing() == [1, 3]
    assert run(mixed, tmp_path / "a.zarr", "--dim", 16) == 0
    assert run(mixed, tmp_path / "b.zarr", "--dim", 16) == 0
    for dim in (16, 64):
        assert_same_store(tmp_path / f"a-dim{dim}.zarr", tmp_path / f"b-dim{dim}.zarr")


def test_a_dimension_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(DATA / "data.json", tmp_path / "a.zarr", "--dim", 64) == 1
    assert "--dim: got [64, 64]; expected each dimension once" in capsys.readouterr().err


KINDS = ["gradients", "representations", "loss", "image_ablation"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_failed_rows_and_is_the_same_in_shards(kind: str, mixed: Path, tmp_path: Path) -> None:
    assert run(mixed, tmp_path / "whole.zarr", "--collect", kind) == 0
    for shard in ("1/2", "0/2", "0/1"):
        assert run(mixed, tmp_path / "parts.zarr", "--collect", kind, "--shard", shard) == 0
    assert_same_store(tmp_path / "parts.zarr", tmp_path / "whole.zarr")
    found = stored(tmp_path / "whole.zarr")
    assert np.flatnonzero(found["status"] == Status.DONE).tolist() == [0, 3, 8]
    assert run(mixed, tmp_path / "gradients.zarr") == 0
    plain = stored(tmp_path / "gradients.zarr")
    assert np.array_equal(found["status"], plain["status"]) and np.array_equal(found["tokens"], plain["tokens"])
    if kind != "image_ablation":
        np.testing.assert_allclose(found["loss"], plain["loss"], rtol=1e-6)


def test_what_each_kind_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {}
    for kind in KINDS:
        assert run(DATA / "data.json", tmp_path / f"{kind}.zarr", "--collect", kind) == 0
        rows[kind] = stored(tmp_path / f"{kind}.zarr")
    said = capsys.readouterr().out
    assert "representations: stored as it is; --projector, --dim and --preconditioner are for gradients" in " ".join(
        said.split()
    )
    assert rows["loss"]["gradients"].shape == (3, 1)
    assert np.array_equal(rows["loss"]["gradients"][:, 0], rows["loss"]["loss"])
    width = json.loads((DATA / "vicuna-tiny" / "config.json").read_text())["hidden_size"]
    assert rows["representations"]["gradients"].shape == (3, width)
    np.testing.assert_allclose(
        np.linalg.norm(rows["representations"]["gradients"], axis=1), rows["representations"]["norm"], rtol=1e-6
    )
    with_image = np.array(["image" in record for record in good()])
    same = [
        np.array_equal(a, b)
        for a, b in zip(rows["gradients"]["gradients"], rows["image_ablation"]["gradients"], strict=True)
    ]
    assert with_image.any() and not with_image.all()
    assert np.array_equal(~with_image, same)


def test_losses_are_called_losses_and_never_compared_as_gradients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "qa"):
        assert run(DATA / "data.json", tmp_path / f"{name}.zarr", "--collect", "loss") == 0
    assert "rows hold  loss" in capsys.readouterr().out
    words = ["--train", tmp_path / "train.zarr", "--task", f"qa={tmp_path / 'qa.zarr'}", "--out", tmp_path / "s.zarr"]
    assert cli.main(["influence", *map(str, words)]) == 1
    assert "train.zarr: holds losses alone (--collect loss), whose cosines say nothing" in capsys.readouterr().err
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize("other", KINDS[1:])
def test_a_store_of_another_kind_is_not_touched(other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(DATA / "data.json", tmp_path / "a.zarr") == 0
    before = stored(tmp_path / "a.zarr")["gradients"]
    assert run(DATA / "data.json", tmp_path / "a.zarr", "--collect", other) == 1
    assert f"has None, this run has {other!r}" in capsys.readouterr().err
    assert np.array_equal(stored(tmp_path / "a.zarr")["gradients"], before)
    assert run(DATA / "data.json", tmp_path / "b.zarr", "--collect", other) == 0
    assert run(DATA / "data.json", tmp_path / "b.zarr") == 1
    assert f"has {other!r}, this run has None" in capsys.readouterr().err
    words = ["--train", tmp_path / "a.zarr", "--task", f"qa={tmp_path / 'b.zarr'}", "--out", tmp_path / "s.zarr"]
    assert cli.main(["influence", *map(str, words)]) == 1
    assert ("collect: the training rows has None, task qa has" in capsys.readouterr().err) == (
        other == "image_ablation"  # the others have rows of another length, which is said first
    )


def test_a_dry_run_plans_what_is_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {}
    for kind in KINDS:
        assert run(DATA / "data.json", Path("a.zarr"), "--dry-run", "--collect", kind) == 0
        text = capsys.readouterr().out
        sizes[kind] = next(line for line in text.splitlines() if "writes gradients" in line).split("│")[2].strip()
        assert ("signs of the projection" in text) == (kind in KINDS[::3])
    assert sizes == {"gradients": "768 B", "image_ablation": "768 B", "representations": "384 B", "loss": "12 B"}
    assert run(DATA / "data.json", Path("a.zarr"), "--dry-run", "--dim", 128) == 0
    text = capsys.readouterr().out
    assert "2.3 kB" in text and "a-dim64.zarr, a-dim128.zarr" in text


def test_help_names_the_originals_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gradients", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("grads / reps / loss / delta", "adam / sgd / sign are adam / none / sign", "projection_dimension"):
        assert words in text


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--collect", "representations"], ["--dim", 16]])
def test_two_ranks_store_what_one_stores(more: list[object], mixed: Path, tmp_path: Path) -> None:
    assert run(mixed, tmp_path / "one.zarr", *more) == 0
    words = [*PARTS, "--data", mixed, "--images", DATA, "--chunk-rows", 2, "--out", tmp_path / "two.zarr", *more]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "icons", "gradients", *map(str, words)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = ["-dim64", "-dim16"] if "--dim" in more else [""]
    for name in names:
        assert_same_store(tmp_path / f"two{name}.zarr", tmp_path / f"one{name}.zarr")


def summarised(path: Path, status: list[int], norm: list[float], **options: Any) -> int:
    store = GradientStore.create(path, num_rows=len(status), dim=4, chunk_rows=2)
    rows = np.ones((len(status), 4), np.float32) * np.array(norm, np.float32)[:, None]
    found = {"gradient": rows, "norm": np.array(norm), "loss": np.ones(len(status)), "tokens": np.ones(len(status))}
    for unit in range(store.partition.num_units):
        span = store.partition.unit_rows(unit)
        part = {name: value[span.start : span.stop] for name, value in found.items()}
        store.write_unit(unit, part | {"status": np.array(status[span.start : span.stop], np.uint8)})
    return summary(GradientStore.open(path), strict=False, **options)


def test_zero_gradients_of_rows_with_a_loss_end_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert summarised(tmp_path / "s", [1, 1, 3, 1], [1, 0, 0, 0]) == 0
    assert "done with a gradient of zero and a loss that is not: 2 rows (1, 3), on which" in capsys.readouterr().out
