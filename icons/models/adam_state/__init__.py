"""Where Adam's moments come from.

checkpoints.py      Lightning's, Hugging Face's and our own files -> moments by parameter name
deepspeed.py        DeepSpeed's, without DeepSpeed
"""

from icons.models.adam_state.checkpoints import load_adam_state

__all__ = ["load_adam_state"]
