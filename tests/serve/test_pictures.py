"""Pictures from clients: whole ones pass, and nothing that would unpack to more than is allowed."""

import base64
import io
import struct
import tracemalloc
import zlib

import pytest
from PIL import Image

from vidgen.serve.errors import ApiError
from vidgen.serve.pictures import check_image, read_data_url


def picture(format: str, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, format)
    return buffer.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks after its header."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data


def refused(data: bytes, **how: int) -> ApiError:
    with pytest.raises(ApiError) as refusal:
        check_image(data, **how)
    assert refusal.value.param == "input_reference" and refusal.value.message.isprintable()
    return refusal.value


@pytest.mark.parametrize(
    "format, mode, suffix",
    [("PNG", "RGB", ".png"), ("PNG", "RGBA", ".png"), ("PNG", "P", ".png"), ("PNG", "1", ".png"),
     ("JPEG", "RGB", ".jpg"), ("JPEG", "CMYK", ".jpg"), ("WEBP", "RGB", ".webp"), ("MPO", "RGB", ".jpg")],
)  # fmt: skip
def test_whole_pictures_pass_with_the_suffix_of_what_they_are(format: str, mode: str, suffix: str):
    assert check_image(picture(format, mode=mode)) == suffix


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "ICO", "PPM", "PDF", "EPS"])
def test_other_formats_are_refused(format: str):
    assert refused(picture(format)).status == 400


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_cut_anywhere_is_refused_or_whole(format: str):
    data = picture(format)
    for length in range(
        0, len(data) - 40, max(1, len(data) // 60)
    ):  # without only its last checksums it is whole
        assert refused(data[:length]).status == 400, length


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_with_a_byte_changed_never_raises_anything_else(format: str):
    data = picture(format)
    for place in range(0, len(data), max(1, len(data) // 150)):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        try:
            check_image(bytes(changed), max_pixels=10**6)
        except ApiError as error:
            assert error.status in (400, 413)


def test_more_pixels_than_allowed_are_refused_by_the_header_alone():
    data = zlib.compress(bytes(1000))
    for width, height in ((10_001, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        bomb = png(width, height, (b"IDAT", data))
        tracemalloc.start()
        assert refused(bomb).status == 413
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10**6, "nothing of its size was made"
    assert check_image(picture("PNG", (100, 100)), max_pixels=10_000) == ".png"
    assert refused(picture("PNG", (101, 100)), max_pixels=10_000).status == 413


def test_text_in_a_picture_that_unpacks_to_much_is_refused():
    text = b"comment\0\0" + zlib.compress(bytes(200 * 10**6), 9)
    pixels = zlib.compress(bytes(11 * 10))
    bomb = png(10, 10, (b"zTXt", text), (b"IDAT", pixels))
    assert len(bomb) < 10**6
    assert refused(bomb).status in (400, 413)


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"A" * 9999]
)
def test_what_is_no_picture_is_refused(data: bytes):
    assert refused(data).status == 400


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/x.png", "https://example.org/x.png", "file:///etc/passwd", "/etc/passwd", "", "data:,",
     "data:image/svg+xml;base64,AAAA", "data:image/png;base64,***", "data:image/png;base64,AAA", "\n" * 300],
)  # fmt: skip
def test_links_are_never_followed(url: str):
    with pytest.raises(ApiError) as refusal:
        read_data_url(url)
    assert refusal.value.status == 400 and refusal.value.param == "input_reference.image_url"


def test_a_data_url_is_its_bytes():
    data = picture("WEBP")
    url = "data:image/webp;base64," + base64.b64encode(data).decode()
    assert read_data_url(url) == data and check_image(read_data_url(url)) == ".webp"
