"""Bodies of requests and responses: what the API page shows, and what is refused before anything happens."""

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from vidgen.sections import MAX_COUNT, Strict, Text
from vidgen.serve.errors import error, from_validation
from vidgen.serve.http.forms import form_values as form_values
from vidgen.serve.records import Kind, Status

MAX_NAME_CHARACTERS = 128

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Scale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
ShortText = Annotated[Text, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]


def _read_size(value: Any) -> Any:
    """WIDTHxHEIGHT, also written with * or the sign for times."""
    if not isinstance(value, str) or not re.fullmatch(r"[1-9][0-9]{0,5}[xX*×][1-9][0-9]{0,5}", value):
        raise ValueError('need "WIDTHxHEIGHT" in pixels, for example "832x480"')
    return re.sub(r"[X*×]", "x", value)


def _read_seconds(value: Any) -> Any:
    """Seconds as a number; OpenAI's clients send text."""
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or float(text) <= 0:
        raise ValueError('need a length in seconds, for example "4" or "2.5"')
    return text


class SegmentRequest(Strict):
    """A prompt and for how many frames it holds."""

    prompt: Text
    num_frames: Count


class LoraRequest(Strict):
    """One of the LoRAs that the server's operator has named."""

    name: ShortText
    scale: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = 1.0


class OutputRequest(Strict):
    """How frames are encoded."""

    codec: Literal["h264"] = "h264"
    crf: int | None = Field(default=None, ge=0, le=51)
    """Lower is better and larger."""
    container: Literal["mp4"] = "mp4"


class ImageReference(Strict):
    """A picture inside a JSON body. Nothing is ever fetched from elsewhere."""

    image_url: str
    """data:image/png;base64,... (also jpeg, webp)."""


def _read_loras(value: Any) -> Any:
    """A name, a mapping, or a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    return [{"name": one} if isinstance(one, str) else one for one in values]


class VideoRequest(Strict):
    """What a client asks for. What is left out is the operator's choice, else the model's."""

    prompt: Text | None = None
    """What the video shows; with `segments` only what it is called."""
    model: ShortText | None = None
    """A name of GET /v1/models; by default the first."""
    seconds: Annotated[str, BeforeValidator(_read_seconds)] | None = None
    """Length, instead of num_frames."""
    size: Annotated[str, BeforeValidator(_read_size)] | None = None
    """"WIDTHxHEIGHT" of the frames that come out, instead of width and height."""
    input_reference: ImageReference | None = None
    """The picture that the video begins with; a form sends it as a file."""
    negative_prompt: Text | None = None
    width: Count | None = None
    height: Count | None = None
    num_frames: Count | None = None
    fps: int | None = Field(default=None, ge=1, le=240)
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    guidance_scale: Scale | None = None
    guidance_scale_2: Scale | None = None
    """Of the second expert, for models that have two."""
    flow_shift: float | None = Field(default=None, gt=0, le=100, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Drawn by the server if left out; the same seed gives the same frames."""
    lora: Annotated[tuple[LoraRequest, ...], BeforeValidator(_read_loras), Field(max_length=8)] | None = None
    """Names of GET /v1/models: "name", {"name", "scale"}, or a list of them."""
    extra_params: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    """More settings of a job: see GET /v1/models for which."""
    segments: tuple[SegmentRequest, ...] | None = None
    """A timeline of prompts; its lengths add up to the video's."""
    output: OutputRequest | None = None


class SessionStart(VideoRequest):
    """Begins a live session."""

    type: Literal["session.start"] = "session.start"
    policy: Literal["drop", "pause"] = "drop"
    """For a viewer that is too slow: chunks are left out, or generation waits."""
    transition_chunks: int = Field(default=0, ge=0, le=64)
    """Chunks over which one prompt turns into the next."""


class SessionResume(Strict):
    """Watches a video or session, live or finished."""

    type: Literal["session.resume"] = "session.resume"
    session_id: ShortText
    last_seq: int | Literal["live"] = Field(default=-1)
    """The last chunk that is there already; -1 for none, "live" for the newest."""
    policy: Literal["drop", "pause"] = "drop"


class NewPrompt(Strict):
    """What the video shows from now on."""

    prompt: Annotated[Text, Field(min_length=1)]


class Interaction(Strict):
    """Changes the prompt of a session from the next chunk that is not begun yet."""

    type: Literal["session.interaction"] = "session.interaction"
    event_id: ShortText
    event: NewPrompt
    transition_chunks: int | None = Field(default=None, ge=0, le=64)
    """By default the session's."""


class Ping(Strict):
    """Is answered with session.pong."""

    type: Literal["session.ping"] = "session.ping"
    nonce: ShortText | int | None = None


class Stop(Strict):
    """Ends a session; what there is of it is kept."""

    type: Literal["session.stop"] = "session.stop"


Message = SessionStart | SessionResume | Interaction | Ping | Stop
MESSAGES: dict[str, type[Message]] = {
    "session.start": SessionStart, "session.resume": SessionResume, "session.interaction": Interaction,
    "session.ping": Ping, "session.stop": Stop,
}  # fmt: skip


class VideoError(Strict):
    """Why a video failed; `cancelled` is a code too."""

    code: str
    message: str


class VideoObject(Strict):
    """A video: OpenAI's fields, then ours."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str | None
    seconds: str
    size: str
    remixed_from_video_id: str | None = None
    error: VideoError | None
    kind: Kind
    started_at: int | None
    queue_position: int | None
    """How many wait before this one; null when it does not wait."""
    priority: int
    num_frames: int
    fps: int
    seed: int
    chunks_done: int
    chunks_total: int
    frames_done: int
    eta_s: float | None
    attempt: int
    disk_bytes: int


class VideoList(Strict):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(Strict):
    """A video that is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class ErrorDetail(Strict):
    """What was refused and why, in one line."""

    type: str
    code: str
    message: str
    param: str | None


class ErrorBody(Strict):
    """The body of every refusal."""

    error: ErrorDetail


class ModelObject(Strict):
    """A model that the server offers."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vidgen"
    loras: list[str] = []
    extra_params: list[str] = []
    takes_image: bool = False
    defaults: dict[str, Any] = {}
    """What a video of it uses where the client says nothing."""


class ModelList(Strict):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


AnyRequest = TypeVar("AnyRequest", bound=Strict)


def parse_request(values: Any, model: type[AnyRequest] = VideoRequest) -> AnyRequest:
    """A body as its model. ApiError (422) in one line that names the field, what was given and is allowed."""
    if not isinstance(values, dict):
        raise error(422, "invalid_value", f"body: need a JSON object, found {type(values).__name__}")
    try:
        return model.model_validate(values)
    except ValidationError as found:
        raise from_validation(found.errors(), model) from None


def parse_message(values: Any) -> Message:
    """A message of a live socket as its model, by its `type`. ApiError (422) in one line."""
    name = values.get("type") if isinstance(values, dict) else None
    if not isinstance(name, str) or name not in MESSAGES:
        raise error(422, "unknown_type", f"type={name!r:.100}: need one of {', '.join(MESSAGES)}", "type")
    return parse_request(values, MESSAGES[name])
