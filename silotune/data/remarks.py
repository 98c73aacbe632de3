"""What an examination of records means for a run, in sentences with their numbers."""

from __future__ import annotations

from collections.abc import Iterator

from silotune.data.examination import Examination, Remark
from silotune.percents import percent

_FAR, _OFF = 2.0, 1.25
_MUCH, _SOME = 0.5, 0.05
_FEW_UNITS = 10
_NOT_PERSONS = {"url", "date", "location", "organization"}


def remarks_on(found: Examination) -> list[Remark]:
    """Everything that the site's people should know, the gravest first."""
    made = [
        *_on_rows(found),
        *_on_units(found),
        *_on_labels(found),
        *_on_lengths(found),
        *_on_resemblance(found),
        *_on_identifiers(found),
    ]
    return sorted(made, key=lambda remark: ("wrong", "warning", "note").index(remark.level))


def _on_rows(found: Examination) -> Iterator[Remark]:
    gone = found.rows - found.records
    if not found.by_split["training"][1]:
        yield Remark(
            "wrong",
            "empty",
            f"No record is left to train on, of {found.rows:,} rows.",
            "See what is left out, and why; a plan with smaller held-out shares leaves more.",
        )
    elif gone >= _SOME * found.rows:
        yield Remark(
            "wrong" if gone >= _MUCH * found.rows else "warning",
            "left_out",
            f"{gone:,} of {found.rows:,} rows are left out.",
            "Mend them, or see whether site.toml names the right columns and labels.",
        )


def _on_units(found: Examination) -> Iterator[Remark]:
    true, said = found.units, found.declared_units
    factor = max(true, said) / max(1, min(true, said)) if said else 1.0
    if true and factor >= _OFF:
        yield Remark(
            "wrong" if factor >= _FAR else "warning",
            "declared_units",
            f"site.toml declares {said:,} units and there are {true:,}: steps draw and weigh by the "
            "first number.",
            "Declare a rounded number near the true one. Runs that are under way keep theirs.",
        )
    if found.over_bound:
        yield Remark(
            "note",
            "over_bound",
            f"{found.over_bound:,} of {true:,} units have more than the {found.bound:,} records that "
            "a step uses of one; each step draws them anew.",
        )


def _on_labels(found: Examination) -> Iterator[Remark]:
    kinds, hidden = len(found.labels), found.other_labels
    if hidden[1] > _MUCH * found.records:
        yield Remark(
            "wrong",
            "label_column",
            f"{hidden[0] + kinds:,} different labels in {found.records:,} records, most of them rare.",
            "See whether columns.label names the column of labels.",
        )
    elif hidden[0] + kinds == 1 and not found.of_spans:
        yield Remark(
            "wrong",
            "one_label",
            "All records have one label: a model learns to say it always.",
            "See whether columns.label and labels are right.",
        )
    if found.lacking:
        yield Remark(
            "note",
            "lacking",
            f"No record has the {_labels(len(found.lacking))} {', '.join(map(repr, found.lacking))}.",
            "Other sites may have them; a model of this site alone can't learn them.",
        )
    few = [one.label for one in found.labels if one.units < _FEW_UNITS]
    if few:
        yield Remark(
            "note",
            "rare_label",
            f"Fewer than {_FEW_UNITS} units have the {_labels(len(few))} "
            f"{', '.join(map(repr, few))}: under privacy too few to learn from here.",
        )


def _labels(number: int) -> str:
    return "label" if number == 1 else "labels"


def _on_lengths(found: Examination) -> Iterator[Remark]:
    lengths = found.lengths
    if lengths is None or not lengths.cut:
        return
    share, lost = lengths.cut / found.records, lengths.lost or 0.0
    yield Remark(
        "warning" if share >= _SOME else "note",
        "cut",
        f"{lengths.cut:,} of {found.records:,} records ({percent(share)}) are longer than the plan's "
        f"{lengths.limit:,} tokens; {percent(lost)} of all tokens are cut off.",
        f"data.max_length = {lengths.quantiles['99 of 100']} would cut one in a hundred.",
    )


def _on_resemblance(found: Examination) -> Iterator[Remark]:
    seen = found.resemblance
    if seen.share >= _SOME:
        gain = seen.flattery
        worth = (
            ""
            if gain is None
            else f" They are worth {_points(gain.nearest - gain.nearest_without)} of accuracy to a "
            f"model that remembers, {_points(gain.words - gain.words_without)} to one that counts words."
        )
        yield Remark(
            "warning",
            "across",
            f"{percent(seen.share)} of the held-out units have a text that resembles one of training."
            f"{worth}",
            'Give the dataset a group column and plan with data.split_by = "group", or read scores as '
            "too good.",
        )
    if seen.contradicting:
        share = seen.contradicting / found.records
        yield Remark(
            "warning" if share >= _SOME / 5 else "note",
            "contradicting",
            f"{seen.contradicting:,} records repeat a text word by word with another label.",
            "Ask who labels them, and how; no model can be right on both.",
        )


def _points(share: float) -> str:
    return f"{100 * share:+.1f} points".replace("-", "\N{MINUS SIGN}")


def _on_identifiers(found: Examination) -> Iterator[Remark]:
    likely = [seen for seen in found.identifiers if seen.likely]
    persons = [seen for seen in likely if seen.kind not in _NOT_PERSONS]
    if persons:
        most = max(seen.records for seen in persons)
        yield Remark(
            "warning",
            "identifiers",
            f"Texts look as if they had {', '.join(seen.title for seen in persons)}: in up to "
            f"{most:,} of {found.records:,} records.",
            "Take them out before training. Privacy bounds what a model can reveal of one unit, "
            "not of what many units share.",
        )
