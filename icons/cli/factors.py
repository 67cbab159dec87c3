"""`icons factors`: the Kronecker factors that `--preconditioner kfac` divides by, in one pass over some rows."""

from pathlib import Path

from icons.cli.console import console, tell, warn
from icons.cli.estimate import estimate_factors_run
from icons.cli.gradients import TRAINER as TRAINER
from icons.cli.gradients import predict, predict_flags, replaces, shared
from icons.cli.model_source import ModelSource
from icons.cli.options.factors import FactorsOptions
from icons.kronecker import KroneckerFactors, is_factors
from icons.modules.factor_parts import FactorParts
from icons.modules.factor_pass import FactorPass, FactorSettings, FactorWriter, is_done
from icons.output import check_output
from icons.terminal import counted


def factors(options: FactorsOptions) -> int:
    """Makes a file of Kronecker factors; the same line, run again, goes on."""
    source = ModelSource.resolve(options, preparing=options)
    source.check_differentiable(options.target, "none", options.trust_remote_code)
    if source.warning:
        warn(source.warning)
    check_output(
        options.out,
        kind="file",
        inputs={"--data": options.data, **options.model_files},
        searched={"--images": options.images},
        ours=is_factors,
        overwrite=replaces(options.overwrite, options.shard),
    )
    flags = predict_flags(options.trainer)
    datamodule = source.datamodule(options, options.data, options.images)
    tell(datamodule.dataset.summary())
    settings = FactorSettings(options.rows, options.labels, options.width, options.seed)
    if options.dry_run:
        estimate_factors_run(options, settings, source.folder, source.adapter, datamodule.dataset).show(console)
        return 0
    network = source.load(target=options.target, dtype=options.model_dtype, **options.loading)
    module, given = FactorPass(network, settings), {"target": options.target}
    if is_done(options.out, {**datamodule.describe(), **module.describe(), **given}, options.overwrite):
        FactorParts(options.out, {}).remove()  # of a run that was killed at its very end
        return told(options.out)
    writer = FactorWriter(options.out, given, options.shard)
    runner = predict(flags, module, datamodule, writer)
    if not runner.is_global_zero:
        return shared(runner, 0)
    if writer.lacking:
        tell(
            f"{options.out}: share {options.shard} is done; {counted(len(writer.lacking), 'part')} of other shares "
            f"({writer.lacking[0]}, ...) are missing, the job that finishes last writes the factors"
        )
        return shared(runner, 0)
    return shared(runner, told(options.out))


def told(file: Path) -> int:
    """Prints what a file of factors holds; exit status 0."""
    made = KroneckerFactors.load(file)
    sides = [value for side in (made.left, made.right) for value in side.values()]
    whole = sum(value.ndim == 2 for value in sides)
    said = f"{file}: factors {made.fingerprint} of {len(made.left):,} layers from {made.rows:,} rows"
    tell(f"{said}; {whole:,} covariances whole, {len(sides) - whole:,} diagonal, {made.num_bytes / 1e6:,.1f} MB")
    if left_out := made.manifest.get("left_out"):
        warn(f"{left_out:,} rows were left out: they cannot be read, or have no finite gradient")
    if rest := made.unfactored:
        warn(
            f"{len(rest):,} trainable parameters ({rest[0]}, ...) are no plain linear layer's weight and have no "
            "factors: they are divided by their mean squared gradient alone"
        )
    if silent := made.silent:
        warn(
            f"{len(silent):,} trainable parameters ({silent[0]}, ...) had no gradient in these rows; rows in which "
            "they have one will fail as not finite: take more --rows if there are such"
        )
    return 0
