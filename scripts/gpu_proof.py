"""Shows what only a GPU can show, in one command of at most ten minutes on one card of 80 GB; downloads nothing.

Usage: .venv/bin/python scripts/gpu_proof.py [--json gpu_proof.json] [--minutes 10]
       .venv/bin/python scripts/gpu_proof.py --small    # on the CPU with a tiny model, to see that it runs

First what is right: gradients on the GPU against one plain backward pass per sample on the CPU, in float32 (without
TF32), bfloat16 and float16; the count sketch and repeated runs bit for bit; flash-attention; 4-bit base weights. Then
what it costs: influence against the memory's bandwidth; LLaVA-1.5-7B from its configuration with random weights
(LoRA r = 128, frozen weights bfloat16, adapter float32) against a plain forward and backward pass of the same batch
whose output layer is narrowed to supervised positions too; and how long the device idles in `Trainer.predict`, whose
batches lie ready in memory.

A part has passed when every figure is within its limit. A part that cannot run here says why, and has not passed; with
`--small` none passes. Exit status 1 if one failed.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_proof.correctness import Correctness
from gpu_proof.cost import Cost
from gpu_proof.part import run


def machine(small: bool) -> dict[str, Any]:
    found = {"device": "CPU", "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    if small:
        return found
    card = torch.cuda.get_device_properties(0)
    return found | {"device": card.name, "memory_gb": card.total_memory / 1e9, "cuda": torch.version.cuda}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu_proof.json"), help="where the figures are written")
    parser.add_argument("--minutes", type=float, default=10, help="no part begins later than nine tenths of this")
    parser.add_argument("--part", default="", help="only parts whose name holds this, for example '700 tokens'")
    parser.add_argument("--small", action="store_true", help="on the CPU with a tiny model; shows nothing of a GPU")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        parser.error("no CUDA device is seen; expected one of 80 GB: or try --small, which runs on the CPU")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    begin = time.perf_counter()
    result: dict[str, Any] = {"small": options.small, "machine": machine(options.small), "parts": {}}
    parts = Correctness(options.small).parts() | Cost(options.small).parts()
    parts = {name: part for name, part in parts.items() if options.part in name}
    if not parts:
        parser.error(f"no part's name holds {options.part!r}")
    print(*result["machine"].values(), sep=", ")
    for name, part in parts.items():
        over = time.perf_counter() - begin > 0.9 * 60 * options.minutes
        found = run(part, options.small, over)
        result["parts"][name] = asdict(found)
        options.json.write_text(json.dumps(result, indent=1))  # what was found is kept, whatever comes
        figures = ", ".join(f"{key} {value:.3g}" for key, value in found.figures.items())
        print(f"{name:42} {found.status:10} {found.seconds:6.1f} s  {found.reason}\n{'':42} {figures}", flush=True)
    states = [each["status"] for each in result["parts"].values()]
    print(", ".join(f"{states.count(state)} {state}" for state in ("passed", "failed", "not run", "not shown")))
    sys.exit("failed" in states)


if __name__ == "__main__":
    main()
