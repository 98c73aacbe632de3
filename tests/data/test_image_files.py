"""Images of a dataset: what is left out and counted, which are copies, what a trainer may open."""

import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from silotune.client.training.bounds import record_paths, table_of
from silotune.data.checks import find_look_alikes
from silotune.data.examine import examine
from silotune.data.records import Split, load_records
from silotune.data.site import SiteConfig
from silotune.errors import DatasetUnreadable, SiteConfigInvalid
from tests.image_material import image_plan, noisy, write_image_site

ROLES = {"image", "label"}
AUGMENTED = "[datasets.scans.augmentation]\ncopies = 1\n"
SECRET = b"silotune values 2\0" + b"k" * 32


@pytest.fixture
def folder(tmp_path):
    """A site with six good images and one of everything else."""
    odd = {
        "../records.csv": "not below the folder of images",
        "/etc/passwd": "not below the folder of images",
        "link.png": "a link",
        "up/records.csv": "not there, or behind a link",
        "none.png": "not there, or behind a link",
        "text.png": "not a PNG, JPEG or DICOM image that can be read",
        "deep": "not a plain file",
    }
    more = "".join(f"{name},yes\n" for name in odd) + ",yes\n000.png,never\n"
    config = write_image_site(tmp_path / "north", base=tmp_path, number=6, more=more)
    scans = config.parent / "scans"
    (scans / "link.png").symlink_to(scans / "000.png")
    (scans / "up").symlink_to(tmp_path / "north")
    (scans / "text.png").write_text("secret words")
    (scans / "deep").mkdir()
    return config.parent, odd


def records_of(folder, **settings):
    return load_records(
        SiteConfig.load(folder / "site.toml"),
        image_plan(folder, **settings),
        roles=ROLES,
        secret=SECRET,
    )


def test_what_can_not_be_read_is_left_out_counted_and_never_quoted(folder):
    place, odd = folder
    found = records_of(place)
    assert len(found) == 6
    assert [example["label"] for example in found.examples] == ["no", "yes", "perhaps"] * 2
    told = {part.problem: len(part.rows) for part in found.left_out}
    expected = {"empty image": 1, "label is not one of model.labels": 1}
    for problem in odd.values():
        expected[f"the image is {problem}"] = expected.get(f"the image is {problem}", 0) + 1
    assert told == expected
    for part in found.left_out:
        assert not any(name in str(part) for name in odd)
        assert "secret" not in str(part)


def test_an_image_whose_format_has_no_library_here_is_left_out_and_stops_nothing(
    folder, monkeypatch
):
    """An error of the whole dataset would tell whoever asks for a round that it is there."""
    place, _ = folder
    with (place / "records.csv").open("a") as table:
        table.write("slice.dcm,yes\n")
    (place / "scans" / "slice.dcm").write_bytes(bytes(128) + b"DICM")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    found = records_of(place)
    assert len(found) == 6
    told = [part.problem for part in found.left_out if len(part.rows) == 1]
    assert "DICOM images need pydicom: pip install 'silotune[dicom]'" in told


def test_a_copy_is_on_the_same_side_whatever_it_is_called_and_however_it_is_packed(tmp_path):
    config = write_image_site(tmp_path / "north", base=tmp_path, number=60)
    scans, rows = config.parent / "scans", []
    (scans / "again").mkdir()
    for n in range(60):
        picture = Image.open(scans / f"{n:03}.png")
        picture.save(scans / "again" / f"{n}.png", compress_level=0)
        rows.append(f"again/{n}.png,yes")
    table = config.parent / "records.csv"
    table.write_text(table.read_text() + "\n".join(rows) + "\n")
    found = records_of(config.parent, data__test_share=0.3, data__validation_share=0.2)
    sides = found.split.tolist()
    assert set(sides) == {0, 1, 2}
    assert sides[:60] == sides[60:]
    assert find_look_alikes(found, image_plan(config.parent)).found == 0  # none across the split
    looked = examine(SiteConfig.load(config), "scans", plan=None)
    assert looked.resemblance.copies == 60
    assert looked.lengths is None
    assert looked.identifiers == ()


def test_another_image_under_the_same_name_is_another_content(tmp_path):
    config = write_image_site(tmp_path / "north", base=tmp_path, number=6)
    before = records_of(config.parent)
    Image.fromarray(noisy(1, 9, 9)).save(config.parent / "scans" / "003.png")
    after = records_of(config.parent)
    assert before.content != after.content
    assert before.fingerprint(SECRET) != after.fingerprint(SECRET)
    assert np.array_equal(before.rows(Split.TRAIN), before.rows(Split.TRAIN))


def test_a_site_without_the_folder_says_so_and_one_without_records_is_none(tmp_path):
    config = write_image_site(tmp_path / "north", base=tmp_path, number=3)
    shutil.rmtree(config.parent / "scans")
    with pytest.raises(DatasetUnreadable, match="scans is no folder"):
        records_of(config.parent)


@pytest.mark.parametrize(
    "old, new, told",
    [
        ('images = "scans"\n', "", "give both, or neither"),
        ('image = "file"', 'text = "file"', "give both, or neither"),
        ('image = "file"', 'image = "{file}.png"', "image is one column"),
        ("[datasets.scans.columns]", f"{AUGMENTED}[datasets.scans.columns]", "augmentation"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(old, new, told, tmp_path):
    config = write_image_site(tmp_path / "north", base=tmp_path, number=3)
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(SiteConfigInvalid, match=told):
        SiteConfig.load(config)


def test_a_trainer_may_open_the_table_and_exactly_the_folder_of_images(tmp_path):
    config = write_image_site(tmp_path / "north", base=tmp_path, number=3)
    real = tmp_path / "mounted"
    (config.parent / "scans").rename(real)
    (config.parent / "scans").symlink_to(real)
    site = SiteConfig.load(config)
    wanted = [config.parent / "records.csv", real]
    assert record_paths(site, site.dataset("scans")) == wanted
    table = table_of(site, scratch=tmp_path / "scratch")
    assert table["datasets"]["scans"]["read"] == [str(path) for path in wanted]
