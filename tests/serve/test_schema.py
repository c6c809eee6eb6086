"""Bodies, forms, messages and errors: one shape, one line, whatever comes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._qs import Querystring

from vidgen.serve import errors
from vidgen.serve.errors import ApiError, from_validation
from vidgen.serve.schema import (
    MESSAGES,
    ErrorBody,
    Interaction,
    SessionStart,
    VideoRequest,
    form_values,
    parse_message,
    parse_request,
)

MADE = [
    errors.invalid("size=1: need more", "size"), errors.over_limit("fps", 500, 240, "take fewer"),
    errors.unauthorized(), errors.forbidden("not yours"), errors.not_found("video_x\n\ud800"),
    errors.conflict("is done"), errors.not_ready("video_x", "queued"), errors.too_large("5 bytes"),
    errors.unsupported_media("text/plain\r\n"), errors.queue_full(7, 64), errors.unavailable("starting"),
    errors.disk_full(5, 4), errors.internal(), ApiError(418, "t", "c", "a\nb\r\n" + "x" * 9999, "p"),
]  # fmt: skip


@pytest.mark.parametrize("error", MADE, ids=lambda error: f"{error.status}-{error.code}")
def test_every_error_has_one_body_and_one_short_line(error: ApiError):
    body = error.body()
    assert list(body) == ["error"] and list(body["error"]) == ["type", "code", "message", "param"]
    assert ErrorBody.model_validate(body).error.message == error.message
    assert "\n" not in error.message and "\r" not in error.message and len(error.message) <= 600
    error.message.encode()


def test_those_who_should_wait_are_told_how_long():
    assert errors.queue_full(7).headers == {"Retry-After": "7"} and errors.queue_full(7).status == 429
    assert errors.unavailable("starting", 3).headers == {"Retry-After": "3"}
    assert errors.unauthorized().headers == {"WWW-Authenticate": "Bearer"}
    assert errors.disk_full().status == 507


@pytest.mark.parametrize("values", [None, 1, "x", [], [{}], True, 1.5])
def test_a_body_that_is_no_object_is_refused(values: Any):
    with pytest.raises(ApiError) as refusal:
        parse_request(values)
    assert refusal.value.status == 422


def test_the_part_of_the_request_that_fastapi_names_is_left_out_and_a_field_of_that_name_is_not():
    one = {
        "type": "int_parsing",
        "loc": ("query", "limit"),
        "msg": "Input should be an integer",
        "input": "x",
    }
    error = from_validation([one], VideoRequest)
    assert (error.param, error.message) == ("limit", "limit=x: input should be an integer")
    for name in ("body", "path", "query", "header", "cookie"):
        with pytest.raises(ApiError) as refusal:
            parse_request({"prompt": "a", name: 1})
        assert refusal.value.param == name and refusal.value.code == "unknown_field"


def test_a_message_is_read_by_its_type():
    for name, model in MESSAGES.items():
        assert model.model_fields["type"].default == name
    start = parse_message({"type": "session.start", "prompt": "a", "policy": "pause", "num_frames": 5})
    assert isinstance(start, SessionStart) and start.policy == "pause" and "type" in start.model_fields_set
    change = parse_message({"type": "session.interaction", "event_id": "e1", "event": {"prompt": "b"}})
    assert isinstance(change, Interaction) and change.event.prompt == "b"
    for wrong in (None, [], {}, {"type": 1}, {"type": "session.begin"}, {"type": []},
                  {"type": "session.interaction", "event_id": "", "event": {"prompt": "b"}},
                  {"type": "session.interaction", "event_id": "e", "event": {"prompt": ""}},
                  {"type": "session.ping", "nonce": {"a": 1}}, {"type": "session.stop", "now": True},
                  {"type": "session.resume", "session_id": "s", "last_seq": "newest"}):  # fmt: skip
        with pytest.raises(ApiError) as refusal:
            parse_message(wrong)
        assert refusal.value.status == 422 and "\n" not in refusal.value.message


def openai_pairs(body: dict[str, Any]) -> list[tuple[str, str]]:
    """A form's fields as OpenAI's client writes a body's."""
    return [
        (name, str(value)) for name, value in Querystring().stringify_items(body, array_format="brackets")
    ]


BODY = {
    "prompt": "a, [b] = c & d", "num_frames": 17, "guidance_scale": 2.5,
    "output": {"crf": 20, "codec": "h264"},
    "segments": [{"prompt": "one", "num_frames": 9}, {"prompt": "two, three", "num_frames": 8}],
    "extra_params": {"stride": 2}, "lora": [{"name": "ink", "scale": 0.5}, {"name": "oil", "scale": 1.0}],
}  # fmt: skip


def test_a_form_of_openais_client_is_the_json_body():
    values = form_values(openai_pairs(BODY))
    expected = parse_request(BODY)
    assert parse_request(values).model_dump(exclude={"extra_params"}) == expected.model_dump(
        exclude={"extra_params"}
    )
    assert values["extra_params"] == {"stride": "2"}  # read as a number with the job


def test_a_form_with_json_text_in_its_fields_is_the_json_body():
    import json

    pairs = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in BODY.items()]
    assert parse_request(form_values(pairs)) == parse_request(BODY)
    assert form_values([("lora", "ink")]) == {"lora": "ink"}


@pytest.mark.parametrize(
    "pairs",
    [
        [("prompt", "a"), ("prompt", "b")], [("output[crf]", "1"), ("output[crf]", "2")],
        [("segments[][prompt]", "a"), ("segments[][num_frames]", "1"), ("segments[][num_frames]", "2")],
        [("segments[]", "a"), ("segments[][prompt]", "b")], [("segments", "[]"), ("segments[]", "a")],
        [("segments", "[")], [("extra_params", "{")], [("output", "[" * 100_000)], [("output", "")],
    ],
)  # fmt: skip
def test_a_form_that_says_two_things_or_is_broken_is_refused(pairs: list[tuple[str, str]]):
    with pytest.raises(ApiError) as refusal:
        form_values(pairs)
    assert refusal.value.status == 400 and "\n" not in refusal.value.message


NAMES = st.sampled_from(
    ["prompt", "segments", "segments[]", "segments[][prompt]", "output[crf]", "output", "size", "lora",
     "lora[]", "a[b][c]", "[]", "[x]", "", "extra_params[stride]", "input_reference[image_url]"]
) | st.text(max_size=12)  # fmt: skip


@given(pairs=st.lists(st.tuples(NAMES, st.text(max_size=12) | st.sampled_from(["{}", "[]", "1", "NaN"]))))
def test_any_form_is_a_request_or_one_line(pairs: list[tuple[str, str]]):
    try:
        request = parse_request(form_values(pairs))
    except ApiError as error:
        assert error.status in (400, 422) and error.message.isprintable()
    else:
        assert isinstance(request, VideoRequest)
