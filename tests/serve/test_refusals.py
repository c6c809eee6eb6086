"""What is refused, in one line that names the field, and that no path of a client ever gets into a job."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.requests_made import PROMPT, SERVER, admitted, config, job_of, refused
from vidgen.serve.admission import make_record, read_data_url
from vidgen.serve.errors import ApiError
from vidgen.serve.schema import VideoRequest, parse_request

PATHS = ["/etc/passwd", "../../etc/passwd", "C:\\x", "\\\\host\\share", "file:///etc/passwd", "a\0b"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "field",
    ["model", "lora", "lora.name", "lora.path", "extra_params.model", "extra_params.text_cache",
     "output.path", "extra_params.output", "extra_params.loras", "extra_params.input", "extra_params.backend",
     "input_reference.image_url", "input_reference.path", "output_path", "path", "input", "text_cache",
     "save_latents", "extra_params.queue", "extra_params.device", "extra_params.parallel"],
)  # fmt: skip
def test_no_path_of_a_client_gets_into_a_job(field: str, path: str):
    outer, _, inner = field.partition(".")
    value: Any = {inner: path} if inner else path
    if field == "input_reference.image_url":
        with pytest.raises(ApiError):
            read_data_url(path)
        return
    error = refused(**{outer: value})
    assert outer in str(error.param)


# what is asked, the parameter at fault, what the line has to say: the given, the allowed, the way out
REFUSALS: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"size": "100x100"}, "size", ("100x100", "multiple of 64", "128x128")),
    ({"width": 30}, "width", ("30", "64")),
    ({"size": "1x1"}, "size", ("1x1", "64x64")),
    ({"size": "6400x6400"}, "size", ("6400x6400", "2088960", "smaller")),
    ({"size": "64x64", "width": 64}, "width", ("size", "width")),
    ({"seconds": "4", "num_frames": 4}, "seconds", ("num_frames",)),
    ({"seconds": "99999"}, "seconds", ("1599984", "20000", "shorter")),
    ({"num_frames": 20_001}, "num_frames", ("20001", "20000")),
    ({"num_inference_steps": 201}, "num_inference_steps", ("201", "200")),
    ({"segments": [{"prompt": "a", "num_frames": 1}] * 65}, "segments", ("65", "64")),
    ({"segments": [{"prompt": "a", "num_frames": 10**15}] * 64}, "segments", ("20000",)),
    ({"segments": [{"prompt": " ", "num_frames": 1}]}, "segments.0.prompt", ("empty",)),
    ({"segments": [{"prompt": "a", "num_frames": 4}], "seconds": 4}, "seconds", ("segments",)),
    ({"prompt": ""}, "prompt", ("empty",)),
    ({"prompt": " \n\t"}, "prompt", ("empty",)),
    ({"prompt": None}, "prompt", ("missing",)),
    ({"prompt": None, "segments": []}, "prompt", ("missing",)),
    ({"prompt": "x" * 4001}, "prompt", ("4001", "4000", "shorter")),
    ({"negative_prompt": "x" * 4001}, "negative_prompt", ("4001", "4000")),
    ({"guidance_scale_2": 3}, "guidance_scale_2", ("one expert", "leave it out")),
    ({"model": "sora-2"}, "model", ("sora-2", "builtin")),
    ({"lora": "ink"}, "lora", ("ink", "none")),
    ({"extra_params": {"strde": 1}}, "extra_params.strde", ("stride",)),
    ({"extra_params": {"stride": 21}}, "extra_params.stride", ("21", "1 to 20")),
    ({"extra_params": {"stride": 3}, "num_inference_steps": 2}, "extra_params.stride", ("3", "1 to 2")),
    ({"extra_params": {"context_frames": 5}}, "extra_params.context_frames", ("5", "0 to 4")),
    ({"extra_params": {"solver": "magic"}}, "extra_params.solver", ("magic", "euler")),
    ({"siez": "64x64"}, "siez", ("did you mean size?",)),
    ({"fps": 0}, "fps", ("0", "greater")),
    ({"seed": -1}, "seed", ("-1",)),
    ({"seed": 2**63}, "seed", ("less than",)),
    ({"output": {"codec": "av1"}}, "output.codec", ("av1", "h264")),
    ({"output": {"container": "mkv"}}, "output.container", ("mkv", "mp4")),
    ({"output": {"crf": 52}}, "output.crf", ("52", "51")),
]  # fmt: skip


@pytest.mark.parametrize("fields, param, says", REFUSALS, ids=lambda value: str(value)[:40])
def test_a_refusal_names_the_field_the_given_and_the_way_out(
    fields: dict[str, Any], param: str, says: tuple[str, ...]
):
    error = refused(**fields)
    assert error.param == param
    assert not [word for word in says if word not in error.message], error.message


def test_work_is_capped_by_pixels_times_frames_times_steps():
    capped = config(limits={"max_work": 32 * 32 * 64 * 20})
    assert admitted(capped, num_frames=64).num_frames == 64
    for more in ({"num_frames": 65}, {"num_inference_steps": 21}, {"size": "320x256"}):
        assert "steps" in refused(capped, **{"num_frames": 64, **more}).message


def test_every_cap_is_the_operators():
    own = config(limits={"max_frames": 8, "max_pixels": 64 * 64, "max_steps": 2, "max_segments": 1,
                         "max_prompt_characters": 60})  # fmt: skip
    small = {"num_frames": 8, "size": "64x64", "num_inference_steps": 2}
    admitted(own, **small)
    for more in ({"num_frames": 9}, {"size": "128x64"}, {"num_inference_steps": 3}, {"prompt": "x" * 61}):
        assert refused(own, **{**small, **more}).code == "over_limit"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["64x64", "4", "builtin", "h264", "../x", "\ud800", 10**400, -1, 0, 2**64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = st.sampled_from([*VideoRequest.model_fields, "type", "path", ""])


@settings(max_examples=400)
@given(body=st.dictionaries(FIELDS, JSON_VALUES, max_size=5), has_prompt=st.booleans())
def test_any_body_is_a_video_within_the_caps_or_one_line(body: dict[str, Any], has_prompt: bool):
    if has_prompt:
        body = {"prompt": PROMPT, **body}
    try:
        record = make_record(parse_request(body), SERVER, "local")
    except ApiError as error:
        assert error.status in (400, 422) and error.message.isprintable() and error.message
        json.dumps(error.body()).encode()
        (error.message + str(error.param)).encode()
    else:
        assert record.num_frames <= SERVER.limits.max_frames
        assert record.width * record.height <= SERVER.limits.max_pixels
        json.dumps(record.request).encode()


@settings(max_examples=200)
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "num_frames": st.integers(1, 30_000),
            "num_inference_steps": st.integers(1, 250),
            "fps": st.integers(1, 240),
            "width": st.integers(1, 40).map(lambda n: 64 * n),
            "height": st.integers(1, 40).map(lambda n: 64 * n),
            "extra_params": st.fixed_dictionaries(
                {}, optional={"stride": st.integers(1, 30), "block_frames": st.integers(1, 9)}
            ),
        },
    )
)
def test_what_is_admitted_keeps_to_every_cap(fields: dict[str, Any]):
    limits = SERVER.limits
    try:
        record = admitted(**fields)
    except ApiError:
        return
    job = job_of(record)
    assert record.num_frames <= limits.max_frames and job.num_inference_steps <= limits.max_steps
    assert record.width * record.height <= limits.max_pixels
    assert job.width * job.height * record.num_frames * job.num_inference_steps <= limits.max_work
    for name in ("num_frames", "fps", "width", "height"):
        assert name not in fields or getattr(record, name) == fields[name]
