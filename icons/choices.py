"""The values that settings take where several modules name the same ones; imports nothing, for `--help` to be instant.

Where a table exists (`icons.projection.PROJECTORS`, `icons.consensus.rules.METHODS`), its keys are the choices.
"""

from typing import Literal, TypeAlias

Target: TypeAlias = Literal["lora", "trainable"]
"""Which parameters are differentiated: the adapter's, or all that the warm-up trained."""
ModelDtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
WrittenDtype: TypeAlias = Literal["stored", "float32", "bfloat16", "float16"]
"""Of an exported model; stored: as the base model's."""
Attention: TypeAlias = Literal["sdpa", "eager", "flash_attention_2"]
Quantize: TypeAlias = Literal["4bit", "8bit"]
Preset: TypeAlias = Literal["llava-train", "icons-release"]
"""How conversations are prepared: as LLaVA trains, or as the released ICONS scripts do."""
Preconditioning: TypeAlias = Literal["adam", "diagonal", "sign", "kfac", "none"]
FactorLabels: TypeAlias = Literal["drawn", "own"]
"""Of the gradients that Kronecker factors are made of."""
StoreDtype: TypeAlias = Literal["float16", "float32", "int8"]
Collect: TypeAlias = Literal["gradients", "representations", "loss", "image_ablation"]
"""What a row of a gradient store holds."""
Normalize: TypeAlias = Literal["projected", "exact", "none"]
"""What a gradient is divided by: its norm after the projection, its norm before it, nothing."""
Reduce: TypeAlias = Literal["max", "mean"]
"""How a group of tasks becomes one."""
Layout: TypeAlias = Literal["huggingface", "llava"]
"""Of an exported folder."""
