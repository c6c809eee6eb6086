"""`vidgen submit`, `status`, `watch`, `cancel`, `ls`, `download`: what a terminal asks of a server."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from vidgen.cli_asking import View, after, asking, check_target, pair, read_list, state
from vidgen.cli_exit import OK, write_line

if TYPE_CHECKING:
    from vidgen.serve.client import Client, Video

PROMPT_WIDTH = 48
HERE = "http://127.0.0.1:8711"
SUFFIXES = {"video": ".mp4", "thumbnail": ".png", "spritesheet": ".png"}
Server = Annotated[str, typer.Option("--server", metavar="URL", help="where `vidgen serve` said that it is")]
KeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="holds the API key, if one is needed")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout")]
Id = Annotated[str, typer.Argument(metavar="ID", help="A video's id, as submit and ls show it.")]


def submit(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", show_default=False)] = None,
    *,
    segments: Annotated[
        Path | None, typer.Option("--segments", metavar="FILE", help="YAML list of {prompt, num_frames}")
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", metavar="FILE", help="the first frame")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="of the server's")] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="of the frames")] = None,
    seconds: Annotated[str | None, typer.Option("--seconds", metavar="S", help="length")] = None,
    num_frames: Annotated[int | None, typer.Option("--num-frames", metavar="N", help="length")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="default: the server's choice")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", metavar="TEXT", help="what to steer away from")
    ] = None,
    steps: Annotated[int | None, typer.Option("--num-inference-steps", metavar="N")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance-scale", metavar="X", help="1 is none")] = None,
    more: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any other field, value in YAML")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="until it is completed")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="wait, then download it here")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file")] = False,
    server: Server = HERE,
    api_key_file: KeyFile = None,
    as_json: Json = False,
) -> int:
    """Queue a video; prints its id. With --wait or --output, Ctrl-C leaves the server at work."""
    fields = {
        "segments": None if segments is None else read_list(segments),
        "model": model, "size": size, "seconds": seconds, "num_frames": num_frames, "seed": seed,
        "negative_prompt": negative_prompt, "num_inference_steps": steps, "guidance_scale": guidance,
        **dict(map(pair, more or ())),
    }  # fmt: skip
    if output is not None:
        check_target(output, overwrite)
    view = View(as_json)
    with asking(server, api_key_file) as client:
        video = client.create(prompt, image=image, **fields)
        view.event("submitted", **video.facts)
        if not wait and output is None:
            view.say(video.id)
            return OK
        view.say(f"video   {video.id}")
        with after(video.id, view):
            done = client.wait(video.id, report=lambda found: view.state(state(found.facts)))
            view.event("completed", **done.facts)
            view.say(state(done.facts))
            if output is not None:
                client.download(video.id, output)
                view.event("downloaded", id=video.id, path=str(output))
                view.say(f"file    {output}")
    return OK


def status(video_id: Id, server: Server = HERE, api_key_file: KeyFile = None, as_json: Json = False) -> int:
    """Say how a video stands."""
    with asking(server, api_key_file) as client:
        video = client.get(video_id)
    if as_json:
        write_line("stdout", json.dumps(video.facts, indent=2))
    else:
        for line in _facts(video):
            write_line("stdout", line)
    return OK


def watch(
    video_id: Id,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="write chunks here as they are made; -: stdout"),
    ] = None,
    server: Server = HERE,
    api_key_file: KeyFile = None,
    as_json: Json = False,
) -> int:
    """Follow a video until it is over. Players that read fragmented MP4 from a pipe play `--output -`."""
    if output == "-" and as_json:
        raise ValueError("--output - and --json: both need stdout; give --output a file")
    if output not in (None, "-"):
        check_target(Path(output), False)
    view = View(as_json)
    with asking(server, api_key_file) as client, after(video_id, view):
        if output is None:
            _follow(client, video_id, view)
        else:
            _record(client, video_id, output, view)
    return OK


def cancel(video_id: Id, server: Server = HERE, api_key_file: KeyFile = None, as_json: Json = False) -> int:
    """Stop a video; what is finished of it stays. Returns when nothing works on it any more."""
    with asking(server, api_key_file) as client:
        video = client.cancel(video_id)
    write_line("stdout", json.dumps(video.facts, indent=2) if as_json else state(video.facts))
    return OK


def ls(
    limit: Annotated[int, typer.Option("--limit", min=1, metavar="N", help="the newest so many")] = 20,
    server: Server = HERE,
    api_key_file: KeyFile = None,
    as_json: Json = False,
) -> int:
    """List videos, newest first."""
    with asking(server, api_key_file) as client:
        videos = list(client.list(limit=limit))
    if as_json:
        write_line("stdout", json.dumps([video.facts for video in videos], indent=2))
        return OK
    for video in videos:
        prompt = video.prompt if len(video.prompt) <= PROMPT_WIDTH else f"{video.prompt[:PROMPT_WIDTH]}..."
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(video.created_at))
        shown = "".join(c if c.isprintable() else " " for c in prompt)
        write_line("stdout", f"{video.id}  {video.status:11} {video.progress:3} %  {when}  {shown}")
    return OK


def download(
    video_id: Id,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="default: ID and what it is")
    ] = None,
    variant: Annotated[
        str, typer.Option("--variant", metavar="KIND", help="video, thumbnail or spritesheet")
    ] = "video",
    partial: Annotated[bool, typer.Option("--partial", help="also what an unfinished video has")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file")] = False,
    server: Server = HERE,
    api_key_file: KeyFile = None,
    as_json: Json = False,
) -> int:
    """Download a video whole, going on after cuts; an interrupted download leaves nothing behind."""
    if variant not in SUFFIXES:
        raise ValueError(f"--variant {variant}: need one of {', '.join(SUFFIXES)}")
    name = video_id if variant == "video" else f"{video_id}-{variant}"
    target = output or Path(f"{name}{SUFFIXES[variant]}")
    with asking(server, api_key_file) as client:
        client.get(video_id)  # before its id becomes part of a file's name
        check_target(target, overwrite)
        client.download(video_id, target, variant=variant, partial=partial)  # type: ignore[arg-type]
    facts = {"id": video_id, "path": str(target), "bytes": target.stat().st_size}
    write_line("stdout", json.dumps(facts) if as_json else str(target))
    return OK


def _follow(client: "Client", video_id: str, view: View) -> None:
    """Show what happens to a video. VideoFailed when it does not end complete."""
    for event in client.events(video_id):
        view.event(event.name, **event.data)
        if event.name in ("chunk", "progress", "status"):
            if view.is_due:
                view.state(state(client.get(video_id).facts))
        else:
            view.say(f"{event.name:8}{event.data.get('message') or event.data}")
    view.say(state(client.wait(video_id).facts))


def _record(client: "Client", video_id: str, output: str, view: View) -> None:
    """Write a video while it is made; what came before an interruption stays, and can be played."""
    say = view.state if output != "-" else lambda text: None
    if output == "-":
        with suppress(BrokenPipeError):  # the player was closed
            _write_chunks(client, video_id, sys.stdout.buffer, say, view)
        return
    path = Path(output)
    with path.open("xb") as file:
        try:
            _write_chunks(client, video_id, file, say, view)
        finally:
            if not file.tell():
                path.unlink()
    view.say(f"file    {output}")


def _write_chunks(
    client: "Client", video_id: str, file: BinaryIO, say: Callable[[str], None], view: View
) -> None:
    num_bytes = 0
    for chunk in client.watch(video_id):
        data = chunk.data if num_bytes else chunk.start.init + chunk.data
        file.write(data)
        file.flush()
        num_bytes += len(data)
        facts = {"seq": chunk.seq, "first_frame": chunk.first_frame, "num_frames": chunk.num_frames}
        view.event("chunk", **facts, num_bytes=len(data))
        frames = chunk.first_frame + chunk.num_frames
        say(f"frames {frames}/{chunk.start.num_frames}  {num_bytes:,} bytes")


def _facts(video: "Video") -> list[str]:
    """All that a person may want to know of a video, a line each."""
    facts = video.facts
    lines = [state(facts), f"prompt  {video.prompt}", f"model   {facts.get('model')}, {video.size}"]
    if facts.get("num_frames"):
        lines[-1] += f", {facts['num_frames']} frames, seed {facts.get('seed')}"
    if video.error_message:
        lines.append(f"error   {video.error_code}: {video.error_message}")
    return ["".join(c if c.isprintable() else " " for c in line) for line in lines]
