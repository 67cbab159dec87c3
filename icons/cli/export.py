"""`icons export`: the fine-tuned model as one folder, for evaluation."""

from icons.cli.console import console
from icons.cli.options.export import ExportOptions
from icons.models.export.folder import export_model
from icons.models.folder import ModelFolder
from icons.models.warmup_folder import open_warmup
from icons.output import check_output


def export(options: ExportOptions) -> int:
    """Merges the adapter into the model and writes it as one folder."""
    adapter = options.adapter
    if (options.checkpoint is None) == (options.model is None):
        got = "neither" if options.model is None else "both"
        raise ValueError(f"model: got {got} of --checkpoint and --model; give one: a warm-up folder, or the parts")
    if options.checkpoint is not None:
        for option, value in (
            ("--adapter", adapter), ("--vision-tower", options.vision_tower), ("--mm-projector", options.mm_projector)
        ):  # fmt: skip
            if value is not None:
                raise ValueError(
                    f"{option} {value}: the folder {options.checkpoint} names its own; leave the option out"
                )
        warmup = open_warmup(options.checkpoint)
        inputs = {"--checkpoint": options.checkpoint}  # under the name that was given, not that of the adapter in it
        check_output(options.out, kind="folder", inputs=inputs, ours=lambda _: True, overwrite=options.overwrite)
        folder, adapter = warmup.model_folder, warmup.adapter
    else:
        assert options.model is not None
        folder = ModelFolder.open(
            options.model, vision_tower=options.vision_tower, mm_projector=options.mm_projector, adapter=adapter
        )
    export_model(
        folder, adapter, options.out, options.format, options.dtype, options.trust_remote_code, options.overwrite
    )
    said = f"{options.out}: {'LLaVA' if options.format == 'llava' else 'Hugging Face'} layout"
    console.print(said, markup=False, soft_wrap=True)
    if options.format == "llava" and "llava" not in options.out.resolve().name.lower():
        said = f"LLaVA's scripts load a folder as LLaVA by its name; rename {options.out.name} to llava-..."
        console.print(said, style="yellow", markup=False, soft_wrap=True)
    return 0
