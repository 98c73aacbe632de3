import base64
import gzip
import json
import time
import tracemalloc

import pytest

from silotune.data.formats import fhir
from silotune.errors import ColumnMissing, DatasetUnreadable
from tests.data.formats.reading import faults, read

LOINC = "http://loinc.org"
SECRET = "Mrs Smith has gout"
TAKEN_BACK = "its status says superseded, cancelled or entered in error"
REPLACED = "replaced by another version of the same record"


def attachment(text=SECRET, kind="text/plain", **more):
    return {"contentType": kind, "data": base64.b64encode(text.encode()).decode(), **more}


def document(name="d1", text=SECRET, **more):
    return {
        "resourceType": "DocumentReference",
        "id": name,
        "status": "current",
        "type": {
            "coding": [{"system": "urn:local", "code": "N1"}, {"system": LOINC, "code": "34117-2"}]
        },
        "subject": {"reference": "Patient/1"},
        "content": [{"attachment": attachment(text)}],
        "context": {"encounter": [{"reference": "Encounter/e1"}]},
        **more,
    }  # fmt: skip


def write(path, *resources):
    lines = (r if isinstance(r, str) else json.dumps(r) for r in resources)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def of(path, *columns, resource="DocumentReference", **keys):
    return read(path, columns or ("text",), format="fhir", resource=resource, **keys)


def test_a_note_its_patient_its_code_and_its_encounter_are_columns(tmp_path):
    label = f"type.coding[system={LOINC}].code"
    table = of(
        write(tmp_path / "n.ndjson", document()), "text", "patient", label, "encounter", "id"
    )
    assert table.columns == {
        "text": [SECRET],
        "patient": ["Patient/1"],
        label: ["34117-2"],
        "encounter": ["Encounter/e1"],
        "id": ["d1"],
    }


def test_the_parts_of_a_folder_are_one_export_packed_or_not(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    write(folder / "DocumentReference.000.ndjson", document("a", "first"))
    with gzip.open(folder / "DocumentReference.001.ndjson.gz", "wt") as file:
        file.write(json.dumps(document("b", "second")) + "\n")
    write(folder / "Patient.000.ndjson", {"resourceType": "Patient", "id": "1"})
    (folder / "_SUCCESS").write_text("")
    assert of(folder).columns["text"] == ["first", "second"]
    assert str(folder) == of(folder).source


@pytest.mark.parametrize(
    ("subject", "patient"),
    [
        ({"reference": "Patient/123"}, "Patient/123"),
        ({"reference": "https://ehr.example/fhir/R4/Patient/123"}, "Patient/123"),
        ({"reference": "Patient/123/_history/2"}, "Patient/123"),
        ({"reference": "urn:uuid:8E1A0A7C-e308-444b-075a-3c2b1f60f881"},
         "Patient/8e1a0a7c-e308-444b-075a-3c2b1f60f881"),
        ({"reference": "Patient/8e1a0a7c-e308-444b-075a-3c2b1f60f881"},
         "Patient/8e1a0a7c-e308-444b-075a-3c2b1f60f881"),
        ({"reference": "#p1"}, ""),
        ({"reference": "Group/7"}, ""),
        ({"reference": "Patient?identifier=x|1"}, ""),
        ({"reference": "urn:uuid:1"}, ""),
        ({"identifier": {"system": "urn:mrn", "value": "9"}}, ""),
        ({"reference": ["Patient/1"]}, ""),
        ("Patient/1", ""),
        (None, ""),
    ],
)  # fmt: skip
def test_every_way_to_refer_to_a_patient_is_one_text_or_none(tmp_path, subject, patient):
    path = write(tmp_path / "n.ndjson", document(subject=subject))
    assert of(path, "patient").columns["patient"] == [patient]


def test_a_patient_in_contained_is_never_the_unit(tmp_path):
    other = {"resourceType": "Patient", "id": "2", "subject": {"reference": "Patient/2"}}
    path = write(
        tmp_path / "n.ndjson",
        document(contained=[other]),
        document("d2", contained=[other], subject={"reference": "#2"}),
    )
    assert of(path, "patient").columns["patient"] == ["Patient/1", ""]


def test_html_is_read_as_plain_text_and_plain_text_is_preferred(tmp_path):
    html = attachment(
        "<style>p{}</style><p>No <b>pain</b>&amp; <br>fever</p>", "text/html; charset=UTF-8"
    )
    plain = attachment("plain", "TEXT/PLAIN ; charset=utf-8")
    path = write(
        tmp_path / "n.ndjson",
        document("a", content=[{"attachment": html}]),
        document("b", content=[{"attachment": html}, {"attachment": plain}]),
    )  # fmt: skip
    assert of(path).columns["text"] == ["No pain&\nfever", "plain"]


def test_a_charset_is_honoured(tmp_path):
    data = base64.b64encode("Müller".encode("latin-1")).decode()
    content = {"attachment": {"contentType": "text/plain; charset=iso-8859-1", "data": data}}
    assert of(write(tmp_path / "n.ndjson", document(content=[content]))).columns["text"] == [
        "Müller"
    ]


NO_TEXT = "no attachment of text/plain or text/html"
NOT_BASE64 = "its attachment is not base64, or not text of its charset"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"attachment": attachment("{\\rtf1}", "application/rtf")}], NO_TEXT),
        ([{"attachment": {"contentType": "text/plain", "url": "Binary/1"}}],
         "its text is not inline: the attachment has a URL only"),
        ([{"attachment": {"contentType": "text/plain", "data": "Tm90ZXMhIGZ=}"}}], NOT_BASE64),
        ([{"attachment": {"contentType": "text/plain", "data": "/////w=="}}], NOT_BASE64),
        ([{"attachment": {"contentType": "text/plain; charset=klingon", "data": "YQ=="}}], NOT_BASE64),
        ([{"attachment": {"contentType": "text/plain", "data": {"a": 1}}}], NOT_BASE64),
        ([{"attachment": SECRET}], NO_TEXT),
        ([], NO_TEXT),
        (SECRET, NO_TEXT),
    ],
)  # fmt: skip
def test_a_document_without_readable_text_is_left_out_and_counted(tmp_path, content, reason):
    path = write(tmp_path / "n.ndjson", document("a"), document("b", content=content))
    table = of(path)
    assert table.columns["text"] == [SECRET]
    assert faults(table) == {reason: [2]}


@pytest.mark.parametrize(
    "more",
    [
        {"status": "superseded"},
        {"status": "entered-in-error"},
        {"docStatus": "entered-in-error"},
    ],
)
def test_what_its_author_took_back_is_not_trained_on(tmp_path, more):
    table = of(write(tmp_path / "n.ndjson", document("a", "kept"), document("b", **more)))
    assert table.columns["text"] == ["kept"]
    assert faults(table) == {TAKEN_BACK: [2]}


@pytest.mark.parametrize("newest_first", [False, True])
def test_of_one_id_the_newest_version_counts_wherever_it_stands(tmp_path, newest_first):
    old = document("a", "old", meta={"lastUpdated": "2026-03-01T23:30:00-05:00"})
    new = document("a", "new", meta={"lastUpdated": "2026-03-02T05:00:00Z"})
    order = [new, old] if newest_first else [old, new]
    table = of(write(tmp_path / "n.ndjson", *order))
    assert table.columns["text"] == ["new"]
    assert faults(table) == {REPLACED: [2 if newest_first else 1]}


def test_a_version_entered_in_error_takes_the_older_ones_with_it(tmp_path):
    wrong = document("a", status="entered-in-error", meta={"lastUpdated": "2026-03-02T00:00:00Z"})
    right = document("a", meta={"lastUpdated": "2026-03-01T00:00:00Z"})
    for order in ([wrong, right], [right, wrong]):
        table = of(write(tmp_path / "n.ndjson", *order))
        assert table.columns["text"] == []
        assert set(faults(table)) == {TAKEN_BACK, REPLACED}


@pytest.mark.parametrize("code", ["replaces", {"coding": [{"code": "replaces"}]}])
def test_a_document_that_another_one_replaces_is_left_out(tmp_path, code):
    relates = [{"code": code, "target": {"reference": "https://x/DocumentReference/a"}}]
    table = of(
        write(tmp_path / "n.ndjson", document("b", "new", relatesTo=relates), document("a", "old"))
    )
    assert table.columns["text"] == ["new"]
    assert faults(table) == {REPLACED: [2]}


def report(**more):
    return {
        "resourceType": "DiagnosticReport",
        "id": "r",
        "status": "final",
        "subject": {"reference": "Patient/1"},
        **more,
    }


@pytest.mark.parametrize(
    ("resource", "text"),
    [
        (report(conclusion="No stroke."), "No stroke."),
        (report(presentedForm=[attachment("CT")], conclusion="No stroke."), "No stroke.\n\nCT"),
        (report(presentedForm=[attachment("%PDF", "application/pdf")], conclusion="No"), "No"),
        ({"resourceType": "Condition", "code": {"coding": [{"display": "Gout"}]},
          "note": [{"text": "left toe"}, {"text": "acute"}]}, "Gout\nleft toe\nacute"),
        ({"resourceType": "Condition", "code": {"text": "Podagra", "coding": [{"display": "Gout"}]}},
         "Podagra"),
        ({"resourceType": "Observation", "valueString": "clear", "note": [{"text": "ok"}]},
         "clear\nok"),
        ({"resourceType": "Observation", "valueCodeableConcept": {"text": "positive"}}, "positive"),
        ({"resourceType": "Observation", "valueQuantity": {"value": 1.5}}, ""),
    ],
)  # fmt: skip
def test_reports_conditions_and_observations_have_texts_of_their_own(tmp_path, resource, text):
    path = write(tmp_path / "n.ndjson", document(), resource)
    assert of(path, resource=resource["resourceType"]).columns["text"] == [text]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("DiagnosticReport", {"status": "cancelled"}),
        ("Observation", {"status": "entered-in-error"}),
        ("Condition", {"verificationStatus": {"coding": [{"code": "entered-in-error"}]}}),
        ("Condition", {"verificationStatus": {"coding": [{"code": "refuted"}]}}),
    ],
)
def test_the_other_kinds_are_taken_back_by_their_own_status(tmp_path, kind, more):
    table = of(
        write(tmp_path / "n.ndjson", {"resourceType": kind, "id": "1", **more}), resource=kind
    )
    assert not table.rows
    assert faults(table) == {TAKEN_BACK: [1]}


def condition(encounter, code, **more):
    coding = [{"system": "http://hl7.org/fhir/sid/icd-10-cm", "code": code}]
    where = {"encounter": {"reference": f"Encounter/{encounter}"}}
    return {"resourceType": "Condition", "code": {"coding": coding}, **where, **more}


def test_a_label_may_say_whether_the_encounter_has_a_condition(tmp_path):
    label = "Condition.code.coding[system=http://hl7.org/fhir/sid/icd-10-cm][code=E10*|E11*|O24.4]"
    refuted = {"verificationStatus": {"coding": [{"code": "refuted"}]}}

    def note(name, encounter):
        context = {"encounter": [{"reference": encounter}]} if encounter else {}
        return document(name, context=context)

    folder = tmp_path / "export"
    folder.mkdir()
    write(
        folder / "notes.ndjson",
        note("a", "Encounter/e1"),
        note("b", "https://ehr.example/Encounter/e2"),
        note("c", "Encounter/e3"),
        note("d", None),
    )
    write(
        folder / "conditions.ndjson",
        condition("e1", "E119"),
        condition("e1", "I10"),
        condition("e2", "O24.49"),
        condition("e3", "E109", **refuted),
    )
    assert of(folder, label).columns[label] == ["true", "false", "false", ""]


def test_numbers_and_truths_of_a_path_are_the_text_they_are_in_every_format(tmp_path):
    resource = {
        "resourceType": "Observation",
        "valueQuantity": {"value": 7.0},
        "ok": True,
        "x": 1e3,
    }
    table = of(
        write(tmp_path / "o.ndjson", resource), "valueQuantity.value", "ok", resource="Observation"
    )
    assert table.columns == {"valueQuantity.value": ["7"], "ok": ["true"]}


@pytest.mark.parametrize(
    "column", ["type.[x=1]", "type..code", "[a=b]", "a[b]", "Patient.name", "type."]
)
def test_a_column_that_is_no_path_is_told(tmp_path, column):
    with pytest.raises(ColumnMissing):
        of(write(tmp_path / "n.ndjson", document()), column)


def test_lines_that_are_no_resource_are_counted_and_not_quoted(tmp_path):
    deep = '{"resourceType": "DocumentReference", "x": ' + "[" * 100_000
    half = document("\ud800", "x")
    path = write(
        tmp_path / "n.ndjson",
        f'{{"resourceType": "DocumentReference", "text": "{SECRET}',
        deep,
        f"[{SECRET}]",
        f'"{SECRET}"',
        "",
        document(),
        half,
    )
    table = of(path)
    assert table.columns["text"] == [SECRET, "x"]
    assert faults(table) == {"not a JSON object": [1, 2, 3, 4]}
    with pytest.raises(DatasetUnreadable, match=r"not a JSON object in 4 rows \(1, 2, 3, 4\)") as e:
        of(path, strict=True)
    assert SECRET not in str(e.value)


def test_a_file_without_such_a_resource_is_told_to_somebody_who_can_mend_it(tmp_path):
    bundle = {"resourceType": "Bundle", "entry": [{"resource": document()}]}
    path = write(tmp_path / "n.ndjson", bundle)
    assert not of(path).rows
    with pytest.raises(DatasetUnreadable, match="has no DocumentReference"):
        of(path, strict=True)
    with pytest.raises(DatasetUnreadable, match="No such file"):
        of(tmp_path / "absent.ndjson")


def test_a_line_that_is_too_long_is_left_out_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(fhir, "LONGEST_LINE", 2**20)
    path = tmp_path / "n.ndjson.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write(json.dumps(document("a", "before")) + "\n")
        file.write('{"resourceType": "DocumentReference", "x": "')
        for _ in range(48):
            file.write("A" * 2**20)
        file.write('"}\n' + json.dumps(document("b", "behind")) + "\n")
    tracemalloc.start()
    table = of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.columns["text"] == ["before", "behind"]
    assert faults(table) == {"a line of more than 64 MiB": [2]}
    assert peak < 16 * 2**20


def test_a_hundred_thousand_deep_costs_no_time(tmp_path):
    line = '{"resourceType": "DocumentReference", "x": ' + '{"a":' * 100_000 + "1" + "}" * 100_001
    begun = time.process_time()
    table = of(write(tmp_path / "n.ndjson", line))
    assert time.process_time() - begun < 2
    assert faults(table) == {"not a JSON object": [1]}
