"""Models: what a folder holds, loading, LoRA, parameter names, Adam's state, export."""
