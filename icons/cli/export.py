"""`icons export`: the fine-tuned model as one folder, for evaluation."""

from icons.cli.console import tell
from icons.cli.model_source import ModelSource
from icons.cli.options.export import ExportOptions
from icons.models.export.folder import export_model
from icons.output import check_output


def export(options: ExportOptions) -> int:
    """Merges the adapter into the model and writes it as one folder."""
    source, out = ModelSource.resolve(options), options.out
    if options.checkpoint is not None:
        inputs = {"--checkpoint": options.checkpoint}  # under the name that was given, not that of the adapter in it
        check_output(out, kind="folder", inputs=inputs, ours=lambda _: True, overwrite=options.overwrite)
    export_model(
        source.folder, source.adapter, out, options.format, options.dtype, options.trust_remote_code, options.overwrite
    )
    tell(f"{out}: {'LLaVA' if options.format == 'llava' else 'Hugging Face'} layout")
    if options.format == "llava" and "llava" not in out.resolve().name.lower():
        tell(f"LLaVA's scripts load a folder as LLaVA by its name; rename {out.name} to llava-...", "yellow")
    return 0
