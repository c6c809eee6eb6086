"""What a browser must be told of a segment before it can play it: the MIME type with the codecs string."""

from collections.abc import Iterator

# where avcC lies in an init segment, and the bytes before the boxes inside: a full box and a count in stsd,
# the fields of a VisualSampleEntry in avc1 (ISO/IEC 14496-12, 14496-15)
PATH = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1", b"avcC")
FIELDS_BYTES = {b"stsd": 8, b"avc1": 78}
BOX_HEADER_BYTES = 8


def mime_of(init: bytes) -> str:
    """video/mp4 with the profile and level of the avcC box of an init segment. ValueError without one."""
    payload = init
    for name in PATH:
        found = dict(_boxes(payload)).get(name)
        if found is None:
            raise ValueError(f"init segment of {len(init)} bytes: no {name.decode()} box, H.264 has one")
        payload = found[FIELDS_BYTES.get(name, 0) :]
    if len(payload) < 4:
        raise ValueError(f"avcC of {len(payload)} bytes: need 4 for profile and level")
    return f'video/mp4; codecs="avc1.{payload[1:4].hex()}"'


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and payload of the boxes that follow each other in `data`, as far as they are whole."""
    while len(data) >= BOX_HEADER_BYTES:
        size = int.from_bytes(data[:4])
        if not BOX_HEADER_BYTES <= size <= len(data):
            return
        yield data[4:8], data[BOX_HEADER_BYTES:size]
        data = data[size:]
