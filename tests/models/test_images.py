"""Images from files: what is read, how it looks, and what is never unpacked or opened."""

import io
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from silotune.models import images
from silotune.models.images import ImageUnread, channels, content_of, decoded, drawn
from tests.image_material import noisy

REAL = Path(pydicom.__file__).parent / "data" / "test_files"


def packed(picture, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(
        stream, kind, **options
    )
    return stream.getvalue()


def dicom(pixels, **values) -> bytes:
    """A CT slice of stored values."""
    found = pydicom.Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = CTImageStorage
    found.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    found.SOPClassUID, found.SOPInstanceUID = CTImageStorage, "1.2.3"
    found.PatientName = "Secret^Name"
    found.Rows, found.Columns = pixels.shape[-2:]
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated = found.BitsStored = 16
    found.HighBit, found.PixelRepresentation = 15, 1
    found.PixelData = pixels.astype("<i2").tobytes()
    for name, value in values.items():
        setattr(found, name, value)
    stream = io.BytesIO()
    found.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def refusal(content: bytes) -> str:
    with pytest.raises(ImageUnread) as caught:
        decoded(content)
    return str(caught.value)


# --- pictures ---


def test_png_comes_back_as_it_was_and_jpeg_nearly():
    grey, colour = noisy(1, 20, 30), drawn(3)
    assert np.array_equal(decoded(packed(grey)), grey)
    assert np.array_equal(decoded(packed(colour)), colour)
    smooth = np.asarray(Image.fromarray(noisy(2, 4, 4)).resize((64, 64), Image.Resampling.BICUBIC))
    near = decoded(packed(smooth, "JPEG", quality=95))
    assert np.abs(near.astype(int) - smooth).mean() < 2


def test_sixteen_bits_are_scaled_and_not_cut_off():
    wide = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(decoded(packed(wide)), (wide >> 8).astype(np.uint8))


def test_what_shines_through_is_black_and_palettes_are_colours():
    clear = np.zeros((5, 5, 4), dtype=np.uint8)
    clear[..., :3] = 200
    assert not decoded(packed(clear)).any()
    few = Image.fromarray(drawn(5)).quantize(8)
    assert np.array_equal(decoded(packed(few)), np.asarray(few.convert("RGB")))


def test_a_photograph_stands_upright_as_its_camera_noted():
    upright = np.zeros((8, 16), dtype=np.uint8)
    upright[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = decoded(packed(upright, "JPEG", exif=exif, quality=100))
    assert turned[:, :4].mean() > 250
    assert turned[:, -4:].mean() < 5


def test_several_frames_are_refused():
    frames = [Image.fromarray(drawn(n)) for n in range(3)]
    content = packed(frames[0], save_all=True, append_images=frames[1:])
    assert refusal(content) == "one of several frames"


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it has so many pixels, all of them black."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checked)

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_file_that_unpacks_to_gigabytes_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was unpacked"))
    content = bomb(60_000, 60_000)
    assert len(content) < 2_000
    assert refusal(content) == "an image of more than 40 million pixels"


@pytest.mark.parametrize(
    "content",
    [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(40), packed(drawn(1))[:200],
     b"\xff\xd8\xff\xe0" + bytes(60), packed(drawn(1), "GIF"), packed(drawn(1), "TIFF")],
)  # fmt: skip
def test_other_formats_and_damaged_files_are_refused_in_the_same_words(content):
    assert refusal(content) == "not a PNG, JPEG or DICOM image that can be read"


# --- DICOM ---


def test_a_window_shows_what_lies_within_it():
    """PS3.3 C.11.2.1.2: of centre 40 and width 400 the values -160 to 239, here after a rescale."""
    values = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    stored = np.array([[-2000, 864, 1064, 1263, 3000]])
    shown = decoded(dicom(stored, **values))  # fmt: skip
    expected = (np.array([-160, 40, 239]) - 39.5) / 399 + 0.5
    assert shown[0, [0, 4]].tolist() == [0, 255]
    assert shown[0, 1:4].tolist() == np.rint(expected * 255).tolist()


@pytest.mark.parametrize(
    "function, value", [("LINEAR", 0.5 + 0.5 / 3), ("LINEAR_EXACT", 0.5), ("SIGMOID", 0.5)]
)
def test_the_windows_function_is_followed(function, value):
    shown = decoded(
        dicom(np.array([[10]]), WindowCenter=10, WindowWidth=4, VOILUTFunction=function)
    )
    assert shown[0, 0] == round(value * 255)


def test_the_first_of_several_windows_counts_and_without_one_the_range_of_values():
    values = np.array([[0, 50, 100]])
    two = decoded(dicom(values, WindowCenter=[50.5, 0], WindowWidth=[101, 1]))
    assert two.tolist() == [[0, 128, 255]]
    assert decoded(dicom(values * 3 - 40)).tolist() == [[0, 128, 255]]
    assert decoded(dicom(np.full((2, 2), 7))).tolist() == [[0, 0], [0, 0]]


def test_monochrome1_is_turned_over():
    plain = dicom(np.array([[0, 1000]]))
    turned = dicom(np.array([[0, 1000]]), PhotometricInterpretation="MONOCHROME1")
    assert decoded(turned).tolist() == (255 - decoded(plain)).tolist()


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm",
                                  "MR_small_implicit.dcm", "MR_small_padded.dcm"])  # fmt: skip
def test_the_same_slice_is_the_same_image_however_it_is_stored(name):
    first = decoded((REAL / "MR_small_expb.dcm").read_bytes())
    found = decoded((REAL / name).read_bytes())
    assert found.shape == (64, 64)
    assert np.array_equal(found, first)


def test_a_real_ct_slice_has_the_values_that_its_stored_ones_say():
    """It has no window: from the smallest value to the largest, slope and intercept cancelling."""
    path = REAL / "CT_small.dcm"
    stored = pydicom.dcmread(path).pixel_array.astype(float)
    share = (stored - stored.min()) / (stored.max() - stored.min())
    assert np.array_equal(decoded(path.read_bytes()), np.rint(share * 255).astype(np.uint8))


@pytest.mark.parametrize(
    "content, told",
    [
        (dicom(noisy(1, 3, 4, 4), NumberOfFrames=3), "one of several frames"),
        (dicom(noisy(1, 4, 4), PhotometricInterpretation="RGB"), "a DICOM image in colour"),
        (dicom(noisy(1, 4, 4), Rows=9000, Columns=9000), "more than 40 million pixels"),
        ((REAL / "JPEG2000.dcm").read_bytes(), "compressed other than by RLE"),
        ((REAL / "reportsi.dcm").read_bytes(), "a DICOM file without an image"),
    ],
)  # fmt: skip
def test_what_is_no_single_grey_frame_is_refused_by_its_reason(content, told):
    assert told in refusal(content)


def test_a_dicom_file_that_is_packed_as_a_whole_is_not_unpacked():
    found = pydicom.dcmread(io.BytesIO(dicom(noisy(1, 4, 4))))
    found.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    stream = io.BytesIO()
    found.save_as(stream, enforce_file_format=True)
    assert "packed within" in refusal(stream.getvalue())


def test_runs_that_go_on_beyond_the_image_are_not_unpacked(monkeypatch):
    found = pydicom.dcmread(REAL / "MR_small_RLE.dcm")
    found.add_new(0x00091010, "OB", bytes(images._ROOM_OF_RLE + 2 * 64 * 64 * 2))
    stream = io.BytesIO()
    found.save_as(stream)
    unpack = property(lambda self: pytest.fail("was unpacked"))
    monkeypatch.setattr(pydicom.FileDataset, "pixel_array", unpack)  # fmt: skip
    assert refusal(stream.getvalue()) == "longer than its pixels"


def test_no_refusal_has_anything_of_the_header():
    content = dicom(noisy(1, 4, 4), PhotometricInterpretation="SECRET")
    assert "secret" not in refusal(content).lower()


# --- where files are ---


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "scans"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "x.png").write_bytes(b"inside")
    (tmp_path / "secret.png").write_bytes(b"outside")
    return root


def test_a_file_below_the_folder_is_read(folder):
    assert content_of(folder, "a/b/x.png") == b"inside"
    assert content_of(folder, "./a//b/x.png") == b"inside"


@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../secret.png", "/etc/passwd", "", ".", "a", "a/b/x.png/y",
             "none.png", "a\0b", "..", "x" * 5000]
)  # fmt: skip
def test_nothing_else_is(folder, name):
    with pytest.raises(ImageUnread) as caught:
        content_of(folder, name)
    assert "secret" not in str(caught.value)


def test_a_folder_that_is_gone_is_told_like_a_file_that_is(folder):
    with pytest.raises(ImageUnread, match=r"^not there, or behind a link$"):
        content_of(folder / "gone", "x.png")


def test_no_link_is_followed_not_even_on_the_way(folder, tmp_path):
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "a" / "within.png").symlink_to(folder / "a" / "b" / "x.png")
    for name in ("link.png", "up/secret.png", "a/within.png"):
        with pytest.raises(ImageUnread):
            content_of(folder, name)


def test_the_folder_may_be_a_link_for_it_is_the_sites_own_word(folder, tmp_path):
    (tmp_path / "mounted").symlink_to(folder)
    assert content_of(tmp_path / "mounted", "a/b/x.png") == b"inside"


def test_a_pipe_is_not_waited_for_and_a_large_file_not_read(folder, monkeypatch):
    os.mkfifo(folder / "pipe.png")
    monkeypatch.setattr(images, "LARGEST", 4)
    for name, told in (("pipe.png", "not a plain file"), ("a/b/x.png", "a file of more than")):
        with pytest.raises(ImageUnread, match=told):
            content_of(folder, name)


def test_no_descriptor_is_left_open(folder):
    def opened():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    for name in ("a/b/x.png", "a/b/none.png", "none/x.png", "a"):
        with suppress(ImageUnread):
            content_of(folder, name)
    assert opened() == before


def test_channels_are_repeated_or_weighed():
    grey, colour = noisy(1, 3, 4), noisy(2, 3, 4, 3)
    assert np.array_equal(channels(grey, 3), np.stack([grey] * 3, axis=2))
    assert np.array_equal(channels(colour, 3), colour)
    weighed = np.asarray(Image.fromarray(colour).convert("L"))
    assert np.abs(channels(colour, 1)[..., 0].astype(int) - weighed).max() <= 1
