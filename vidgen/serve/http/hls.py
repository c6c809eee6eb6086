"""HLS playlists (RFC 8216) of a video's chunks, which are fMP4 segments as they lie on the disk."""

from collections.abc import Sequence
from math import ceil
from urllib.parse import urlencode

from vidgen.serve.work.feeds import Chunk

MIME = "application/vnd.apple.mpegurl"


def playlist(
    chunks: Sequence[Chunk], fps: int, *, is_ended: bool, frames_per_chunk: int, ticket: str | None = None
) -> str:
    """The media playlist of the chunks so far. `ticket` goes with every address in it.

    Without PLAYLIST-TYPE:EVENT: Chromium's own player never fetches such a list again. `frames_per_chunk` is
    what a chunk may have at most: the target duration must not change while the list grows.
    """
    query = f"?{urlencode({'ticket': ticket})}" if ticket else ""
    longest = max([frames_per_chunk, *(chunk.num_frames for chunk in chunks)])
    lines = [
        "#EXTM3U",
        "#EXT-X-VERSION:7",
        f"#EXT-X-TARGETDURATION:{max(1, ceil(longest / fps))}",
        "#EXT-X-MEDIA-SEQUENCE:0",
        "#EXT-X-INDEPENDENT-SEGMENTS",
        f'#EXT-X-MAP:URI="init.mp4{query}"',
    ]
    for chunk in chunks:
        lines += [f"#EXTINF:{chunk.num_frames / fps:.6f},", f"{chunk.index}.m4s{query}"]
    if is_ended:
        lines.append("#EXT-X-ENDLIST")
    return "\n".join([*lines, ""])
