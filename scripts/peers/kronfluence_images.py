"""kronfluence on a LLaVA with LoRA: its task as for text, its batches with images. Run by images.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.utils.dataset import DataLoaderKwargs
from kronfluence_peer import RowLoss
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

TASKS = ("colours", "shapes", "presence", "general")
BATCH = 32
Row = dict[str, Tensor]


class ImageRowLoss(RowLoss):
    """Each row's mean loss over its supervised tokens, with the images of the rows that have one."""

    INPUTS = (*RowLoss.INPUTS, "pixel_values")


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows padded on the right, with all their images."""
    length = max(row["input_ids"].shape[1] for row in rows)

    def padded(values: list[Tensor], fill: int) -> Tensor:
        return torch.cat([F.pad(value, (0, length - value.shape[1]), value=fill) for value in values])

    images = [row["pixel_values"] for row in rows if "pixel_values" in row]
    return {
        "input_ids": padded([row["input_ids"] for row in rows], 3),
        "labels": padded([row["labels"] for row in rows], -100),
        "attention_mask": padded([torch.ones_like(row["input_ids"]) for row in rows], 0),
    } | ({"pixel_values": torch.cat(images)} if images else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--demo", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    base: Any = LlavaForConditionalGeneration.from_pretrained(given.demo / "start", dtype=torch.float32)
    adapter = PeftConfig.from_pretrained(given.demo / "warmup")
    adapter.inference_mode = False  # it is differentiated
    model: Any = get_peft_model(base, adapter)
    model.load_state_dict(torch.load(given.task / "model.pt", weights_only=True))
    model.eval()
    modules = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.requires_grad for part in module.parameters())
    ]  # fmt: skip
    method = ImageRowLoss(modules)
    pool: Any = torch.load(given.task / "pool.pt")
    queries = [torch.load(given.task / f"{name}.pt") for name in TASKS]
    analyzer = Analyzer(
        "images", prepare_model(model, method), method, cpu=True, output_dir=str(given.task), disable_tqdm=True
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
    analyzer.fit_all_factors(
        "factors", pool, per_device_batch_size=BATCH, factor_args=FactorArguments(strategy="ekfac"),
        overwrite_output_dir=True,
    )  # fmt: skip
    every: Any = [row for rows in queries for row in rows]
    analyzer.compute_pairwise_scores(
        scores_name="scores", factors_name="factors", query_dataset=every, train_dataset=pool,
        per_device_query_batch_size=len(every), per_device_train_batch_size=BATCH,
        score_args=ScoreArguments(damping_factor=None), overwrite_output_dir=True,
    )  # fmt: skip
    each = analyzer.load_pairwise_scores("scores")["all_modules"].numpy()
    ends = np.cumsum([len(rows) for rows in queries])[:-1]
    np.save(given.task / "kronfluence.npy", np.stack([part.mean(axis=0) for part in np.split(each, ends)], axis=1))


if __name__ == "__main__":
    main()
