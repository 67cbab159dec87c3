"""A run that goes on notices that image files have been replaced, whatever holds them; mended ones stop nobody."""

import io
import json
import os
import shutil
import signal
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer
from PIL import Image

from icons.batch import Status
from icons.cli import call
from icons.cli import command_line as cli
from icons.store import GradientStore

DATA = Path(__file__).parents[1] / "data" / "original_llava"
BASE = ["--model", DATA / "vicuna-tiny", "--vision-tower", DATA / "clip", "--mm-projector", DATA / "mm_projector.bin"]
ADAPTED = [*BASE, "--adapter", DATA / "llava-tiny-lora"]
MODEL = [*ADAPTED, "--preconditioner", "none"]
IMAGES = ("img0.png", "img1.png")
pytestmark = pytest.mark.filterwarnings("ignore")


def run(out: Path, images: Path, *more: object) -> int:
    words = [*MODEL, "--data", DATA / "data.json", "--images", images, "--chunk-rows", 2, "--dim", 16, "--out", out]
    return cli.main(["gradients", *map(str, [*words, "--trainer.accelerator", "cpu", *more])])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in IMAGES:
        shutil.copy(DATA / name, tmp_path / "images" / name)
    return tmp_path / "images"


def contents(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}


def other_bytes(source: Path) -> None:
    """Replaces an image by its mirror image; in an archive, one byte of it by another."""
    if source.is_dir():
        content = (source / "img0.png").read_bytes()
        Image.open(io.BytesIO(content)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(source / "img0.png")
        return
    with zipfile.ZipFile(source) as archive:
        kept = {name: archive.read(name) for name in IMAGES}
    image = kept["img0.png"]
    write_zip(source, kept | {"img0.png": image[:-1] + bytes([image[-1] ^ 1])})


def write_zip(file: Path, members: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_an_image_that_was_replaced_since_the_store_was_begun_is_named(
    form: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = folder, tmp_path / "a.zarr"
    if form == "zip":
        write_zip(source := tmp_path / "images.zip", {name: (DATA / name).read_bytes() for name in IMAGES})
    assert run(out, source, "--shard", "0/2") == 0
    begun = contents(out)
    other_bytes(source)
    for more in (["--shard", "1/2"], ["--retry-failed"]):
        capsys.readouterr()
        assert run(out, source, *more) == 1
        said = capsys.readouterr().err
        assert f"image img0.png of row 0: has other bytes than when the store {out} was begun" in said
        assert "put them back, or give another place or --overwrite" in said and "Traceback" not in said
    assert contents(out) == begun
    if form == "zip":
        assert run(out, source, "--overwrite") == 0, "all of it anew"
        assert GradientStore.open(out).missing() == [] and contents(out)["zarr.json"] != begun["zarr.json"]
        return
    shutil.copy(DATA / "img0.png", folder / "img0.png")
    assert run(out, folder) == 0 and run(tmp_path / "b.zarr", folder) == 0
    assert contents(out).keys() == contents(tmp_path / "b.zarr").keys()
    both = (GradientStore.open(path) for path in (out, tmp_path / "b.zarr"))
    assert len({store.rows(slice(0, 3)).tobytes() for store in both}) == 1


def test_images_that_were_missing_or_broken_may_be_mended_and_then_stay(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.zarr"
    (folder / "img0.png").write_bytes(b"no image")
    (folder / "img1.png").unlink()
    assert run(out, folder) == 0
    assert GradientStore.open(out).status[:].tolist() == [Status.IMAGE_BROKEN, Status.DONE, Status.IMAGE_MISSING]
    for name in IMAGES:
        shutil.copy(DATA / name, folder / name)
    assert run(out, folder, "--retry-failed") == 0 and run(tmp_path / "b.zarr", folder) == 0
    both = [GradientStore.open(path) for path in (out, tmp_path / "b.zarr")]
    assert both[0].statuses().tolist() == [1, 1, 1]
    assert both[0].manifest["image_files"] == both[1].manifest["image_files"]
    (folder / "img1.png").unlink()
    assert run(out, folder) == 0, "a file that was there and is missing is no other one"
    shutil.copy(DATA / "img0.png", folder / "img1.png")
    assert run(out, folder) == 1
    assert "image img1.png of row 2: has other bytes" in capsys.readouterr().err


def test_a_store_of_former_versions_knows_of_no_images_and_is_gone_on_with(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    assert run(out, folder, "--shard", "0/2") == 0
    about = json.loads((out / "zarr.json").read_text())
    assert about["attributes"]["icons"].pop("image_files").keys() == {"0", "2"}
    (out / "zarr.json").write_text(json.dumps(about))
    other_bytes(folder)
    assert run(out, folder) == 0


class Terminate(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(folder: Path, out: Path, **more: Any) -> int:
    """A warm-up on `five.json` beside the image folder."""
    model = {name.removeprefix("--").replace("-", "_"): BASE[BASE.index(name) + 1] for name in BASE[::2]}
    flags = {"accelerator": "cpu", "enable_progress_bar": False, "callbacks": more.pop("callbacks", [])}
    few = {"lora_rank": 2, "batch_size": 3, "min_rows": 1, "epochs": 2, "held_out": 0.0, "trainer": flags}
    few["data"] = folder.parent / "five.json"
    return call("warmup", **model, **few | more, images=folder, out=out)


def test_a_fit_goes_on_with_the_images_that_it_was_begun_with(folder: Path, tmp_path: Path) -> None:
    record = json.loads((DATA / "data.json").read_text())[0]
    for name in range(5):
        shutil.copy(DATA / "img0.png", folder / f"{name}.png")
    (folder.parent / "five.json").write_text(json.dumps([{**record, "image": f"{name}.png"} for name in range(5)]))
    part, whole = {"fraction": 0.4, "seed": 1}, tmp_path / "whole"
    assert fit(folder, whole, **part) == 0
    used = json.loads((whole / "icons.json").read_text())["image_files"]
    assert len(used) == 2, "those of the rows that it has trained on"
    trained, other = f"{max(used)}.png", next(f"{row}.png" for row in range(5) if str(row) not in used)
    assert fit(folder, tmp_path / "out", callbacks=[Terminate()], **part) == 75
    shutil.copy(DATA / "img1.png", folder / other)
    shutil.copy(DATA / "img1.png", folder / trained)
    said = rf"image {trained} of row {max(used)}: has other bytes than when"
    begun = rf"{said} the interrupted fit was begun .* put them back, or start again with --resume false"
    with pytest.raises(ValueError, match=begun):
        fit(folder, tmp_path / "out", **part)
    shutil.copy(DATA / "img0.png", folder / trained)
    assert fit(folder, tmp_path / "out", **part) == 0
    for name in ("adapter_model.safetensors", "adam.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
    shutil.copy(DATA / "img1.png", folder / trained)
    with pytest.raises(ValueError, match=rf"{said} the fit in .*out was begun .* or --resume false to replace it"):
        fit(folder, tmp_path / "out", **part)
    assert fit(folder, tmp_path / "out", resume=False, **part) == 0
    assert (tmp_path / "out/adam.safetensors").read_bytes() != (whole / "adam.safetensors").read_bytes()


def test_scores_of_former_images_are_neither_taken_over_nor_gone_on_with(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(DATA / "data.json", tmp_path / "five.json")
    assert fit(DATA, tmp_path / "warm", data=tmp_path / "five.json") == 0
    shutil.copytree(folder, tmp_path / "tasks")
    task = [f"--task=a={DATA / 'data.json'}:{tmp_path / 'tasks'}", f"--task=b={DATA / 'data.json'}:{DATA}"]

    def score(out: str, *more: object) -> int:
        words = ["--checkpoint", tmp_path / "warm", "--data", DATA / "data.json", "--images", folder, *more]
        return cli.main(["score", *map(str, [*words, "--out", tmp_path / out, "--trainer.accelerator", "cpu"])])

    assert score("old.zarr", *task) == 0
    further, old = [*task, f"--task=c={DATA / 'data.json'}:{DATA}"], ["--reuse", tmp_path / "old.zarr"]
    other_bytes(tmp_path / "tasks")
    capsys.readouterr()
    assert score("new.zarr", *further, *old) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "old.zarr: b" in said and "old.zarr: a" not in said, "that of the task's former images is computed anew"
    other_bytes(folder)
    assert score("newer.zarr", *further, *old) == 1
    said = capsys.readouterr().err
    assert f"image img0.png of row 0: has other bytes than when the store {tmp_path / 'old.zarr'}" in said
    assert "put them back, or score all tasks without --reuse" in said
    assert not (tmp_path / "newer.zarr").exists()


def test_factors_of_former_images_are_not_taken_for_those_of_this_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f.safetensors"

    def factors(*more: object) -> int:
        words = [*ADAPTED, "--data", DATA / "data.json", "--images", folder, "--out", out, *more]
        return cli.main(["factors", *map(str, words), "--trainer.accelerator", "cpu"])

    assert factors() == 0
    made = out.read_bytes()
    other_bytes(folder)
    assert factors() == 1
    said = capsys.readouterr().err
    assert f"image img0.png of row 0: has other bytes than when {out} was begun" in said
    assert "put them back, or give another place or --overwrite" in said and out.read_bytes() == made
    assert factors("--overwrite") == 0 and out.read_bytes() != made
