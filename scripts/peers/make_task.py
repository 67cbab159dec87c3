"""Makes the common task: a start, a pool with wrong answers, tasks, checkpoints, and the losses of retrained models.

    python scripts/peers/make_task.py --out peers_task

Model: Llama-like, 1.0 M parameters (4 layers of 128, a byte-pair vocabulary of 512), or larger for costs. The same
line, run again, goes on where it was stopped.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from questions import TASKS, Question, cities, draw_pool, draw_start, draw_task
from task import Task
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training import BATCH, EPOCHS, LEARNING_RATE, measure, retrained, train
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from icons.datamodules.dataset import ConversationDataset
from icons.datamodules.preprocessing import Preprocessing
from icons.datamodules.records import open_records
from icons.models.folder import ModelFolder
from icons.validation.datamodel import draw_subsets

NUM_POOL, NUM_VALIDATION, NUM_START, START_EPOCHS = 1000, 60, 3000, 12
SHARE = 0.5
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}Q: {{ message['content'] }}\n"
    "{% else %}A: {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def save_start(folder: Path, texts: list[str], width: int, layers: int) -> None:
    """An untrained model and a tokenizer made of the texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tokenised(file: Path, model: Path) -> list[dict[str, list[int]]]:
    """Ids and labels as `icons` makes them."""
    data = ConversationDataset(open_records(file), None, ModelFolder.open(model), Preprocessing(template="chat"))
    rows = [data[place] for place in range(len(data))]
    return [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()} for row in rows]


def write(file: Path, questions: list[Question]) -> None:
    file.write_text(json.dumps([question.record() for question in questions], indent=0))


def make_data(out: Path, width: int, layers: int, epochs: int) -> None:
    """Records, tokens and the start, trained for some epochs."""
    known = cities()
    asked, kept = known[::2], known[1::2]  # of the pool and tasks; of the start alone
    parts = {"pool": draw_pool(NUM_POOL, asked, 0)} | {
        kind: draw_task(kind, NUM_VALIDATION, asked, 0) for kind in TASKS
    }
    start = draw_start(NUM_START, kept, 0)
    save_start(out / "raw", [f"{one.text}\n{one.answer}" for one in start], width, layers)
    write(out / "start.json", start)
    for name, questions in parts.items():
        write(out / f"{name}.json", questions)
    (out / "tokens.json").write_text(json.dumps({name: tokenised(out / f"{name}.json", out / "raw") for name in parts}))
    model = LlamaForCausalLM.from_pretrained(out / "raw", dtype=torch.float32)
    rows = tokenised(out / "start.json", out / "raw")
    if epochs:
        train(model, rows, 0, 1e-3, epochs)
    model.save_pretrained(out / "start")
    PreTrainedTokenizerFast.from_pretrained(out / "raw").save_pretrained(out / "start")


def make_checkpoints(task: Task, way: str, few: int | None) -> None:
    """Trains on the pool, or a few of its rows, saved after each epoch."""
    tokens = task.tokens
    pool = tokens["pool"][:few]
    torch.manual_seed(0)
    model = task.model(way)
    before = {name: round(measure(model, tokens[name]), 3) for name in task.names}
    settings = task.settings
    train(model, pool, 0, settings["rate"][way], settings["epochs"], task.folder / way)
    after = {name: round(measure(model, tokens[name]), 3) for name in task.names}
    print(f"{way}: losses before {before}, after {after}", flush=True)


def retrain(task: Task, way: str, num_subsets: int, seeds: int) -> None:
    """Losses of models trained on random halves of the pool, kept as they come."""
    file = task.folder / way / "losses.json"
    found: dict[str, list[float]] = json.loads(file.read_text()) if file.exists() else {}
    subsets = draw_subsets(len(task.tokens["pool"]), num_subsets, SHARE, 0)
    for seed in range(seeds):
        for place, rows in enumerate(subsets):
            name = f"{place}/{seed}"
            if name not in found:
                found[name] = retrained(task, way, rows.tolist(), seed)
                file.with_suffix(".partial").write_text(json.dumps(found))
                file.with_suffix(".partial").replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("peers_task"))
    parser.add_argument("--ways", nargs="+", default=["lora", "full"])
    parser.add_argument("--subsets", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each subset, whose losses are averaged")
    parser.add_argument("--width", type=int, default=128, help="of the model; 512 and 6 layers have 19.5 M parameters")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--cost-only", action="store_true", help="hardly any training: for cost.py alone")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    task = Task(out)
    if not (out / "start" / "tokenizer.json").exists():
        make_data(out, given.width, given.layers, 0 if given.cost_only else START_EPOCHS)
        settings = {"pool": NUM_POOL, "validation": NUM_VALIDATION, "epochs": EPOCHS, "batch": BATCH}
        (out / "settings.json").write_text(json.dumps(settings | {"rate": LEARNING_RATE, "share": SHARE}))
    for way in given.ways:
        if not (task.checkpoint(way, EPOCHS) / "rate.json").exists():
            make_checkpoints(task, way, 48 if given.cost_only else None)
    for seed in range(1, given.seeds + 1) if not given.cost_only else ():
        for way in given.ways:
            retrain(task, way, given.subsets, seed)


if __name__ == "__main__":
    main()
