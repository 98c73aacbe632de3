"""`silotune evaluate`: a trained model on labelled records that it did not learn from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from silotune.commands.asked import (
    Base,
    ColumnOption,
    Device,
    Images,
    Trained,
    counted,
    named_columns,
    require_sees,
)
from silotune.commands.folder import AsJson
from silotune.data.columns import STANDS_FOR
from silotune.inference.evaluated import (
    AgainstOther,
    Figure,
    Groups,
    ModelEvaluation,
    in_words,
    title_of,
)
from silotune.percents import said_percent
from silotune.terminal import headed, say, terminal


def evaluate(  # noqa: PLR0917 - one a command-line option
    run: Trained,
    data: Annotated[
        Path | None, typer.Option(help="Labelled records: .csv, .jsonl, .parquet and others.")
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Instead of --data: the folder of a site.toml. Its dataset's test part is evaluated, "
            "and its validation part chooses temperature and threshold.",
        ),
    ] = None,
    columns: ColumnOption = None,
    label_separator: Annotated[
        str | None,
        typer.Option(help="Between several labels of a record, where they are no JSON list."),
    ] = None,
    images: Images = None,
    unit: Annotated[
        str | None,
        typer.Option(help="The column that says whose records they are: intervals are over these."),
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Figures by this column, too; small groups are not shown.")
    ] = None,
    least: Annotated[
        int, typer.Option(min=2, help="Units that a shown group has at least, of either kind.")
    ] = 10,
    against: Annotated[
        Path | None,
        typer.Option(help="Another run or adapter to compare with, on the same records."),
    ] = None,
    choose_on: Annotated[
        Path | None,
        typer.Option(
            help="Records to choose temperature and threshold on; half of the units without."
        ),
    ] = None,
    positive: Annotated[
        str, typer.Option(help="The label that a threshold is for; of two labels the last one.")
    ] = "",
    threshold: Annotated[
        str, typer.Option(help="How it is chosen: max-f1, sensitivity=0.95 or specificity=0.9.")
    ] = "max-f1",
    draws: Annotated[int, typer.Option(min=100, help="Draws of the bootstrap.")] = 1000,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="Of every interval.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws and of the halves.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for evaluation.json, a page with pictures and temperature.json, mode 0600."
        ),
    ] = None,
    base: Base = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Evaluate the adapter of a run on labelled records; nothing of it is sent anywhere.

    For labels: precision, recall, F1, AUROC and average precision of each, the confusion matrix, and how
    far probabilities are frequencies. Intervals are a bootstrap over units. A temperature (saved for
    `silotune predict --temperature`) and a threshold are chosen on one part of the units and measured on
    the other. With --against, exact McNemar and DeLong tests. For numbers MAE, R2 and Spearman's
    correlation, for spans of texts whole entities by label, for language models loss and perplexity.
    Needs `pip install 'silotune[evaluate]'`.

    Records that the model learned from flatter it. With --site they are left out: the site's own split,
    which the run directory or the site's state knows, says which were held out.

    Figures are exact and of this site's own records: they are for its own people, not for sharing.
    """
    from silotune.api.evaluating import evaluate as evaluated
    from silotune.api.model import plan_of
    from silotune.inference.thresholds import ThresholdRule

    try:
        ThresholdRule.parse(threshold)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--threshold") from None
    _require_one(
        data,
        site,
        {"--column": columns, "--unit": unit, "--choose-on": choose_on}
        | {"--label-separator": label_separator, "--images": images},
    )
    plan = plan_of(run)
    require_sees(plan, images)
    done = evaluated(
        run,
        data,
        site=site,
        columns=None
        if site
        else named_columns(columns or [], plan.task.in_order, made_of=STANDS_FOR),
        label_separator=label_separator,
        images=images,
        unit=unit,
        group=group,
        least=least,
        against=against,
        choose_on=choose_on,
        positive=positive,
        threshold=threshold,
        draws=draws,
        confidence=confidence,
        seed=seed,
        base=base,
        device=device,
        progress=counted("looking at records"),
    )
    page = None if out is None else done.write(out)
    if as_json:
        typer.echo(done.figures.model_dump_json())
        return
    _print(done.figures)
    if page is not None:
        say(f"The page is {page}; it is for this site's own people.")


def _require_one(data: Path | None, site: Path | None, others: Mapping[str, object]) -> None:
    """Check that there are records, and that nothing is said of a site's that it says itself."""
    if site is None and data is None:
        raise typer.BadParameter("name labelled records", param_hint="--data or --site")
    for option, value in {"--data": data, **others}.items():
        if site is not None and value:
            raise typer.BadParameter("--site says it already", param_hint=option)


def _print(found: ModelEvaluation) -> None:
    console = terminal()
    whose = f", of {found.units:,} units" if found.unit_column else ""
    console.print(headed(found.data, f"{found.records:,} records{whose}, by {found.plan}"))
    for fault in found.left_out:
        console.print(Text(f"  left out: {fault}", style="yellow"))
    for name, figure in found.metrics.items():
        console.print(f"  {title_of(name)} {in_words(figure)}")
    if found.labels:
        _print_labels(found)
    _print_choices(found)
    if found.comparison is not None:
        _print_comparison(found.comparison)
    if found.groups is not None:
        _print_groups(found.groups)
    console.print(
        f"In brackets: {said_percent(found.confidence)} intervals, of {found.draws:,} bootstrap draws "
        "of units.",
        style="dim",
    )


def _print_labels(found: ModelEvaluation) -> None:
    keys = found.told_of_labels
    table = Table("label", found.counted, *map(title_of, keys))
    for row in found.labels:
        figures = (folded(getattr(row, key)) for key in keys)
        table.add_row(row.label, f"{row.records:,}", *figures)
    terminal().print(table)
    if not found.confusion:
        return
    answered = Table("truth, and what is answered", *found.label_names)
    for label, counts in zip(found.label_names, found.confusion, strict=True):
        answered.add_row(label, *(f"{count:,}" for count in counts))
    terminal().print(answered)


def _print_choices(found: ModelEvaluation) -> None:
    console = terminal()
    if (now := found.calibration) is not None:
        whose = f"the probability of {now.of}" if now.of else "the answered label's probability"
        console.print(
            f"Calibration of {whose}: expected error {now.ece:.3f} over {len(now.bins)} bins, "
            f"Brier score {now.brier:.3f}, log loss {now.log_loss:.3f}."
        )
    if (fit := found.temperature) is not None:
        console.print(
            f"Temperature {fit.value:.2f}, fitted on {fit.parts.chosen_on:,} records "
            f"({fit.parts.how}): on the other {fit.parts.scored_on:,} it takes the expected error "
            f"from {fit.before.ece:.3f} to {fit.after.ece:.3f}."
        )
    if (cut := found.threshold) is not None:
        figures = ", ".join(f"{title_of(n)} {in_words(f)}" for n, f in cut.figures.items())
        console.print(
            f"{cut.label} from a probability of {cut.value:.3f} on (rule {cut.rule}, chosen on "
            f"{cut.parts.chosen_on:,} records), on the other {cut.parts.scored_on:,}: {figures}."
        )


def _print_comparison(found: AgainstOther) -> None:
    console = terminal()
    for name, figure in found.differences.items():
        console.print(f"Against {found.other}: {title_of(name)} {in_words(figure, sign='+')}")
    if (exact := found.mcnemar) is not None:
        console.print(
            f"Exact McNemar test: {exact.only_this:,} records are right here only, "
            f"{exact.only_other:,} there only, p = {exact.p_value:.3g}."
        )
    if (areas := found.delong) is not None:
        console.print(
            f"DeLong test of {areas.label}: AUROC {areas.auroc:.3f} against {areas.other:.3f}, "
            f"difference {areas.difference:+.3f} ({areas.low:+.3f} to {areas.high:+.3f}), "
            f"p = {areas.p_value:.3g}."
        )


def _print_groups(found: Groups) -> None:
    if found.shown:
        names = list(found.shown[0].figures)
        table = Table(found.column, "units", "records", *map(title_of, names))
        for row in found.shown:
            figures = (folded(row.figures[name]) for name in names)
            table.add_row(row.group, f"{row.units:,}", f"{row.records:,}", *figures)
        terminal().print(table)
    if found.hidden:
        say(hidden_in_words(found))


def hidden_in_words(found: Groups) -> str:
    """Which groups are not shown, and why."""
    return (
        f"{found.hidden} groups of {found.column} with {found.hidden_records:,} records are not shown: "
        f"those with fewer than {found.least} units of either kind, and who would give them away."
    )


def folded(figure: Figure) -> str:
    """A figure over its interval, for a narrow column."""
    return in_words(figure).replace(" (", "\n(", 1)
