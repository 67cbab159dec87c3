"""The parts of `gpu_proof.py`.

part.py          what a part has found, and its verdict
models.py        a tiny LLaVA, LLaVA-1.5-7B, their batches, and plain passes over them
correctness.py   what is right on a GPU
cost.py          what it costs
"""
