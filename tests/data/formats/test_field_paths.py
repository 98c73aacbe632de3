import pytest

from silotune.data.formats.paths import FieldPath

RECORD = {
    "a": [{"b": None}, {"b": [{"c": "one"}, {"c": "two"}]}, {"b": {"c": "three"}}],
    "n": 3,
    "coding": [{"system": "x", "code": "E11.9"}, {"system": "y", "code": "I10"}],
}


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a.b.c", ["one", "two", "three"]),
        ("n", [3]),
        ("n.deeper", []),
        ("absent.b", []),
        ("coding[system=y].code", ["I10"]),
        ("coding[system=x][code=E11*].code", ["E11.9"]),
        ("coding[code=E1*|I10].system", ["x", "y"]),
        ("coding[code=E11].system", []),
        ("a[b.c=three].b.c", ["three"]),
    ],
)
def test_lists_are_searched_and_brackets_pick(path, found):
    assert list(FieldPath.parse(path).all(RECORD)) == found


def test_the_first_plain_value_is_taken():
    assert FieldPath.parse("a.b.c").first(RECORD) == "one"
    assert FieldPath.parse("a.b").first(RECORD) is None
