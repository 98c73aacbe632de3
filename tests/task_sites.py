"""The notes of `write_federation`, told for other tasks: several labels, numbers, pairs, spans."""

import csv
import json
import random
import tomllib

CASES = {
    "several": {
        "columns": 'text = "note"\nlabels = "codes"',
        "dataset": 'label_separator = ";"',
        "model": 'task = "text_classification"\nlabels = ["no", "yes"]\nmulti_label = true\n'
        "class_weights = { yes = 2.0 }",
        "metrics": {"macro_f1", "micro_f1"},
        "first": "always every label",
        "ask": ["gout of the left side"],
    },
    "number": {
        "columns": 'text = "note"\nvalue = "days"',
        "dataset": "",
        "model": 'task = "text_regression"\ntarget = { lower = 0.0, upper = 30.0 }',
        "metrics": {"mae", "r2", "spearman"},
        "first": "always the mean",
        "ask": ["gout of the left side"],
    },
    "pair": {
        "columns": 'text = "note"\ntext_b = "more"\nlabel = "chronic"',
        "dataset": "",
        "model": 'task = "pair_classification"\nlabels = ["no", "yes"]',
        "metrics": {"macro_f1", "accuracy"},
        "first": "always one label",
        "ask": ["gout of the left side", "a second text"],
    },
}
ILL = ("cough", "sprain", "fever", "cut", "asthma", "gout", "copd", "lupus")


def settings_of(case):
    """What a plan of `write_federation` says otherwise: values by dotted key, None for what goes."""
    said = {"labels": None, **tomllib.loads(case["model"])}
    return {f"model.{key}": value for key, value in said.items()}


def retell(folder, case):
    """Give the sites below a folder the columns of one of `CASES`."""
    rng = random.Random(3)
    for path in folder.glob("*/notes.csv"):
        with path.open() as file:
            _, *rows = csv.reader(file)
        more = []
        for i, (note, label, unit) in enumerate(rows):
            codes = rng.choice(["[]", label, f"{label};no"])
            days = 20 * (label == "yes") + i % 7
            more.append([note, label, unit, codes, days, f"it is {label}"])
        with path.open("w", newline="") as file:
            head = ["note", "chronic", "patient", "codes", "days", "more"]
            csv.writer(file).writerows([head, *more])
    for path in folder.glob("*/site.toml"):
        text = path.read_text().replace('text = "note"\nlabel = "chronic"', case["columns"])
        path.write_text(
            text.replace("[datasets.notes]\n", f"[datasets.notes]\n{case['dataset']}\n")
        )


def mark_spans(folder):
    """Three notes in each record, with their illnesses and sides marked."""
    for path in folder.glob("*/notes.csv"):
        with path.open(newline="") as file:
            notes = [row["note"] for row in csv.DictReader(file)]
        rows = []
        for number, text in enumerate(notes):
            whole = ". ".join([text, *notes[number - 2 : number]])
            spans = [
                [at, at + len(word), label]
                for label, words in (("ILL", ILL), ("SIDE", ("left", "right")))
                for word in words
                for at in (i for i in range(len(whole)) if whole.startswith(f"{word} ", i))
            ]
            rows.append([whole, json.dumps(spans), f"{path.parent.name}-{number // 2}"])
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["note", "marks", "patient"], *rows])
        config = path.with_name("site.toml")
        config.write_text(config.read_text().replace('label = "chronic"', 'spans = "marks"'))
