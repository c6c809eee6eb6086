"""Pictures from clients: never trusted, never fetched, looked at before they are unpacked."""

import base64
import binascii
import io
import re
import struct

from vidgen.serve.errors import invalid, shown, too_large

FIELD = "input_reference"
MAX_PIXELS = 40 * 10**6
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp"}
# what Pillow's decoders raise for damaged data
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)


def check_image(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    """The file suffix of a whole picture in PNG, JPEG or WebP. ApiError (400, 413) for anything else.

    Its size is read from its header first, so one that would unpack to more pixels takes no memory. It
    decodes the picture, so an event loop calls it through asyncio.to_thread.
    """
    from PIL import Image, UnidentifiedImageError

    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    except bombs:
        raise too_large(f"{FIELD}: has more than {max_pixels} pixels; scale it down", FIELD) from None
    except UnidentifiedImageError:
        raise invalid(f"{FIELD}: is no PNG, JPEG or WebP picture; give one", FIELD) from None
    except DAMAGE as error:
        raise _damaged(error) from None
    with image:
        if image.width * image.height > max_pixels:
            raise too_large(
                f"{FIELD}: {image.width}x{image.height} has more than {max_pixels} pixels; scale it down",
                FIELD,
            )
        try:
            image.load()
        except bombs:
            raise too_large(f"{FIELD}: unpacks to too much; save it anew", FIELD) from None
        except DAMAGE as error:
            raise _damaged(error) from None
        return SUFFIXES[image.format or "PNG"]


def read_data_url(url: str) -> bytes:
    """The picture inside a JSON request's `image_url`. ApiError for a link: nothing is fetched."""
    match = re.match(r"data:image/(?:png|jpeg|webp);base64,", url)
    param = f"{FIELD}.image_url"
    if match is None:
        allowed = "need data:image/png;base64,... (or jpeg, webp); links are not followed"
        raise invalid(f"{param}={shown(url)}: {allowed}", param)
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"{param}: is no base64 after its comma; encode the file's bytes", param) from None


def _damaged(error: Exception) -> Exception:
    cause = shown(str(error) or type(error).__name__)
    return invalid(f"{FIELD}: is damaged ({cause}); give a whole picture", FIELD)
