"""Evaluations of a model, and the temperature that one of them fitted."""

import numpy as np

from silotune.inference.calibration import calibration_of, fitted_temperature, tempered
from silotune.inference.evaluated import (
    AgainstOther,
    Figure,
    FittedTemperature,
    GroupFigures,
    Groups,
    LabelFigures,
    ModelEvaluation,
    Temperature,
    Threshold,
    TwoParts,
    in_words,
)
from silotune.inference.significance import delong, mcnemar
from silotune.report.evaluation_page import render_evaluation
from tests.golden.registry import makes, reads


@makes("evaluation.json")
def evaluation(path):
    """One with every part."""
    rng = np.random.default_rng(7)
    truth = np.arange(40) % 2
    first = (0.25 + 0.5 * truth + rng.uniform(-0.25, 0.25, 40)).round(3)
    shares, worse = np.stack([1 - first, first], axis=1), rng.random(40).round(3)
    figure, parts = (
        Figure(value=0.75, low=0.5, high=0.875),
        TwoParts(how="half of the units", chosen_on=20, scored_on=20),
    )
    value = fitted_temperature(truth, shares)
    calibration, after = (
        calibration_of(truth, tempered(shares, t), positive=1, of="chronic") for t in (1.0, value)
    )
    names = ("precision", "recall", "f1", "auroc", "average_precision")
    labels = [
        LabelFigures(label=label, records=20, predicted=20, **dict.fromkeys(names, figure))
        for label in ("acute", "chronic")
    ]
    found = ModelEvaluation(
        plan="golden", plan_sha256="0" * 64, model="1" * 64, task="text_classification",
        kind="confusion", data="new.csv", data_sha256="2" * 64, records=40, units=20,
        unit_column="patient", left_out=("empty label in row 3",), confidence=0.95, draws=1000,
        metrics={"accuracy": figure, "auroc": Figure(value=None)},
        label_names=("acute", "chronic"), labels=tuple(labels), confusion=((15, 5), (5, 15)),
        positive="chronic", calibration=calibration,
        temperature=Temperature(parts=parts, value=value, before=calibration, after=after),
        threshold=Threshold(
            parts=parts, label="chronic", rule="max-f1", value=0.5, figures={"f1": figure}
        ),
        comparison=AgainstOther(
            other="before", metrics={"accuracy": figure}, differences={"accuracy": figure},
            mcnemar=mcnemar(first > 0.5, worse > 0.5),
            delong=delong(truth == 1, first, worse, label="chronic", confidence=0.95),
        ),
        groups=Groups(
            column="ward", least=10, hidden=2, hidden_records=12,
            shown=(GroupFigures(group="east", records=28, units=12, figures={"f1": figure}),),
        ),
    )  # fmt: skip
    path.write_text(found.model_dump_json(indent=2))


@reads("evaluation.json")
def read_evaluation(path):
    found = ModelEvaluation.model_validate_json(path.read_bytes())
    page = render_evaluation(found)
    told = [in_words(figure) for figure in found.metrics.values()]
    return {"found": found.model_dump(mode="json", exclude_unset=True), "said": told,
            "shown": [word in page for word in ("east", "before", "max-f1", "row 3")]}  # fmt: skip


@makes("temperature.json")
def temperature(path):
    path.write_text(FittedTemperature(model="1" * 64, value=1.75, records=20).model_dump_json())


@reads("temperature.json")
def read_temperature(path):
    return FittedTemperature.read(path, model="1" * 64).value
