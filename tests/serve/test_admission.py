"""What a request becomes: whose settings win, what a session is, and that the job says what was asked."""

import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai.types import Video

from tests.serve.requests_made import PROMPT, SERVER, admitted, config, job_of, refused, session
from vidgen.config import parse_job
from vidgen.serve import admission
from vidgen.serve.admission import describe, load_facts, make_record
from vidgen.serve.errors import ApiError
from vidgen.serve.facts import ModelFacts, facts_of, read_facts
from vidgen.serve.records import Kind, Status, is_id, video_object
from vidgen.serve.schema import ModelObject, VideoObject, VideoRequest, parse_request
from vidgen.serve.settings import EXTRA_PARAMS

# whose settings win: (request's field, its value, job's setting, operator's value, model's value)
PRECEDENCE = [
    ("num_inference_steps", 7, "num_inference_steps", 11, 20),
    ("guidance_scale", 2.5, "guidance_scale", 4.5, None),
    ("flow_shift", 2.0, "shift", 6.0, None),
    ("fps", 8, "fps", 24, 16),
    ("num_frames", 20, "num_frames", 30, 65),
    ("seed", 5, "seed", 9, None),
    ("negative_prompt", "blue", "negative_prompt", "green", None),
]


@pytest.mark.parametrize("field, asked, setting, operators, models", PRECEDENCE, ids=lambda v: str(v))
def test_the_client_wins_over_the_operator_and_the_operator_over_the_model(
    field: str, asked: Any, setting: str, operators: Any, models: Any
):
    theirs = config(models={"builtin": {"job": {setting: operators}}})
    assert getattr(job_of(admitted(theirs, **{field: asked})), setting) == asked
    assert getattr(job_of(admitted(theirs)), setting) == operators
    left_out: dict[str, Any] = {field: None}
    assert getattr(job_of(admitted(theirs, **left_out)), setting) == operators, "null is left out"
    if field != "seed":
        assert getattr(job_of(admitted()), setting) == models


def test_a_value_that_equals_the_default_is_still_the_clients():
    theirs = config(models={"builtin": {"job": {"output": {"crf": 30}, "guidance_scale": 9}}})
    record = admitted(theirs, output={"crf": 16}, guidance_scale=3.0)
    assert job_of(record).output.crf == 16 and job_of(record).guidance_scale == 3.0
    assert job_of(admitted(theirs, output={"codec": "h264"})).output.crf == 30


def test_nested_settings_are_merged_not_replaced():
    theirs = config(models={"builtin": {"job": {"queue": {"block_frames": 2, "context_frames": 1}}}})
    job = job_of(admitted(theirs, extra_params={"anchor_frames": 1}))
    assert (job.queue.block_frames, job.queue.context_frames, job.queue.anchor_frames) == (2, 1, 1)


def test_a_seed_is_drawn_told_and_different_each_time():
    records = [admitted() for _ in range(20)]
    assert len({record.seed for record in records}) == 20
    for record in records:
        assert video_object(record, None)["seed"] == record.seed == job_of(record).seed
        assert 0 <= record.seed < 2**53, "JavaScript keeps it whole"
    assert admitted(seed=0).seed == 0 and admitted(seed=2**63 - 1).seed == 2**63 - 1


@pytest.mark.parametrize("written", ["128x192", "128*192", "128X192", "128×192"])
def test_size_is_that_of_the_frames_that_come_out(written: str):
    record = admitted(size=written)
    assert (record.width, record.height) == (128, 192)
    job = job_of(record)
    assert (job.width * job.output.upscale, job.height * job.output.upscale) == (128, 192)
    assert (job.width, job.height) == (16, 24)
    assert job_of(admitted(width=128, height=192)).width == 16
    assert admitted(width=128).height == 256, "the other one is the model's"


@pytest.mark.parametrize(
    "fields, frames",
    [
        ({"seconds": "4"}, 64), ({"seconds": 2.5}, 40), ({"seconds": "2", "fps": 8}, 16),
        ({"seconds": "0.001"}, 1), ({"num_frames": 33}, 33), ({}, 65),
        ({"segments": [{"prompt": "a", "num_frames": 10}, {"prompt": "b", "num_frames": 7}]}, 17),
    ],
)  # fmt: skip
def test_length_is_seconds_times_rate_or_frames_or_the_timelines_sum(fields: dict[str, Any], frames: int):
    record = admitted(**fields)
    assert record.num_frames == frames
    told = video_object(record, None)
    assert abs(float(told["seconds"]) - frames / record.fps) < 0.001
    latents = -(-frames // 4)
    assert record.chunks_total == -(-latents // 4)


def test_a_timeline_is_the_clients_and_the_prompt_then_a_title():
    theirs = config(models={"builtin": {"job": {"num_frames": 5}}})
    timeline = [{"prompt": "one", "num_frames": 30}, {"prompt": "two", "num_frames": 20}]
    record = admitted(theirs, segments=timeline)
    job = job_of(record)
    assert [(s.prompt, s.num_frames) for s in job.timeline()] == [("one", 30), ("two", 20)]
    assert record.prompt == PROMPT and job.prompt is None and job.num_frames is None
    assert make_record(VideoRequest(segments=timeline), SERVER, "local").prompt == "one"  # type: ignore[arg-type]


def test_the_job_names_no_place_and_the_worker_can_set_its_own():
    for record in (admitted(), session(), admitted(segments=[{"prompt": "a", "num_frames": 9}])):
        assert "path" not in record.job["output"] and "input" not in record.job
        assert json.loads(json.dumps(record.job)) == record.job
        job = parse_job({**record.job, "output": {**record.job["output"], "path": "/data/v/video.mp4"}})
        assert job.output.path == Path("/data/v/video.mp4") and job.output.upscale == 8


def test_loras_are_the_operators_by_name_and_scaled():
    theirs = config(
        models={"builtin": {"loras": {"ink": {"path": "/operator/ink.safetensors", "scale": 0.5}}}}
    )
    for wanted, scale in (("ink", 0.5), ({"name": "ink", "scale": 2}, 1.0), (["ink"], 0.5)):
        (lora,) = job_of(admitted(theirs, lora=wanted)).loras
        assert (str(lora.path), lora.scale) == ("/operator/ink.safetensors", scale)
    assert not job_of(admitted(theirs)).loras
    assert "ink" in refused(theirs, lora="/operator/ink.safetensors").message
    told = video_object(admitted(theirs, lora="ink"), None)
    assert "/operator" not in json.dumps(told) + json.dumps(admitted(theirs, lora="ink").request)


EXTRA = {
    "solver": "unipc", "timetable": "full", "block_frames": 2, "context_frames": 1, "context_mode": "cache",
    "anchor_frames": 1, "stride": 3, "noise": "independent", "guidance": "stacked", "transition_blocks": 2,
    "residual_guidance": "self", "static_threshold": 0.5, "speed": "fast",
}  # fmt: skip


@pytest.mark.parametrize("name", EXTRA_PARAMS)
def test_each_extra_parameter_reaches_its_place_in_the_job(name: str):
    job: Any = job_of(admitted(extra_params={name: EXTRA[name]}))
    for part in EXTRA_PARAMS[name]:
        job = getattr(job, part)
    assert job == EXTRA[name]
    error = refused(extra_params={name: {"a": [1] * 1000}})
    assert error.param == f"extra_params.{name}"


def test_a_session_is_long_made_block_by_block_and_fits_the_caps():
    record = session()
    job = job_of(record)
    assert is_id(record.id) and record.id.startswith("session_") and record.kind == Kind.SESSION
    assert (job.num_inference_steps, job.queue.timetable) == (8, "autoregressive")
    assert record.num_frames == 600 * 16
    assert record.chunks_total == 600, "a chunk a second: sixteen frames"
    strided = job_of(session(extra_params={"stride": 2})).queue
    assert (strided.stride, strided.timetable) == (2, "dualparal")
    assert job_of(session(extra_params={"timetable": "buffer"})).queue.timetable == "buffer"
    assert job_of(session(transition_chunks=2)).queue.transition_blocks == 2
    assert session(seconds="3").num_frames == 48
    tight = config(limits={"max_work": 32 * 32 * 8 * 100})
    assert session(tight).num_frames == 100
    assert "blocks" in refused(make=session, extra_params={"timetable": "full"}).message


def test_an_operators_stride_never_stands_in_the_way_of_few_steps():
    theirs = config(models={"builtin": {"job": {"queue": {"stride": 10}}}})
    assert job_of(admitted(theirs, num_inference_steps=4)).queue.stride == 4
    assert job_of(admitted(theirs)).queue.stride == 10


def test_priority_is_the_keys():
    keys = [{"name": "ada", "sha256": "0" * 64, "priority": 7}, {"name": "bob", "sha256": "1" * 64}]
    theirs = config(keys=keys)
    assert admitted(theirs, owner="ada").priority == 7
    assert admitted(theirs, owner="bob").priority == 0
    assert admitted(theirs, owner="ada").owner == "ada"


@pytest.mark.parametrize("pictures, has_one, says", [("none", True, "takes no"), ("must", False, "begins")])
def test_a_picture_is_refused_or_required_by_the_model(
    pictures: Any, has_one: bool, says: str, monkeypatch: pytest.MonkeyPatch
):
    facts = replace(facts_of({"model": "builtin"}), pictures=pictures)
    monkeypatch.setattr(admission, "facts_of", lambda job: facts)
    request = parse_request({"prompt": PROMPT})
    with pytest.raises(ApiError, match=says) as refusal:
        make_record(request, SERVER, "local", input_suffix=".png" if has_one else None)
    assert (refusal.value.status, refusal.value.param) == (400, "input_reference")
    record = make_record(request, SERVER, "local", input_suffix=None if has_one else ".png")
    assert record.input_suffix == (None if has_one else ".png")


def test_facts_from_a_file_or_another_process_are_the_models_own():
    there = facts_of({"model": "builtin"})
    assert isinstance(there, ModelFacts) and there.pictures == "may"
    # with a setting that only opening the model can judge
    assert there == read_facts({"model": "builtin"}) == facts_of({"model": "builtin", "dtype": "fp32"})
    from vidgen.engine import Engine

    family = Engine.from_pretrained("builtin", with_dit=False).family
    for frames in range(1, 40):
        assert there.num_latent_frames(frames) == family.sizes.num_latent_frames(frames)


def test_chunks_are_as_many_as_the_plan_has_blocks():
    from vidgen.engine import Engine

    engine = Engine.from_pretrained("builtin", with_dit=False)
    timetables = [{"timetable": name} for name in ("full", "autoregressive", "buffer")]
    for frames, extra in itertools.product((1, 4, 16, 17, 65), ({}, {"block_frames": 3}, *timetables)):
        record = admitted(num_frames=frames, extra_params=extra)
        plan = engine.plan(job_of(record))
        assert record.chunks_total == plan.task.timetable.num_blocks, (frames, extra)
        assert (record.fps, record.num_frames) == (plan.job.fps, plan.job.num_frames)
    live = session(seconds="9")
    assert live.chunks_total == engine.plan(job_of(live)).task.timetable.num_blocks == 9


def test_a_model_that_is_not_there_is_one_line_at_the_start():
    for model, says in (
        ({"model": "/no/such/model"}, "no such model"),
        ({"job": {"dtype": "fp8"}}, "dtype=fp8"),
        ({"job": {"width": 30}}, "width=30"),
        ({"session": {"queue": {"timetable": "full"}}}, "timetable"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says) as refusal:
            load_facts(config(models={"other": model}))
        assert str(refusal.value).startswith("models.other: ") and "\n" not in str(refusal.value)


def test_the_server_side_needs_no_torch():
    code = f"""
import sys
from vidgen.serve.admission import *
from vidgen.serve.schema import VideoRequest
from vidgen.serve.store import Store
config = ServerConfig()
load_facts(config)
make_record(VideoRequest(prompt={PROMPT!r}), config, "local")
print(sorted(name for name in ("torch", "numpy", "av", "ray") if name in sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout == "[]\n", run.stderr


def test_a_video_is_what_openais_client_reads():
    for record in (
        admitted(seconds="4"),
        replace(admitted(), status=Status.FAILED, error_code="cancelled", error_message="cancelled",
                completed_at=5, expires_at=9),
        replace(admitted(), status=Status.COMPLETED, frames_done=65),
        session(),
    ):  # fmt: skip
        told = video_object(record, 3)
        assert json.loads(VideoObject.model_validate(told).model_dump_json()) == told
        # OpenAI's own sizes are the only ones that its model names, so that one field stands in
        video = Video.model_validate({**told, "size": "1280x720"})
        assert (video.id, video.status, video.progress) == (record.id, record.status, record.progress)
        assert (video.seconds, video.created_at) == (told["seconds"], record.created_at)
        assert (video.error is None) == (record.error_code is None)
        assert Video.construct(**told).size == f"{record.width}x{record.height}"
    assert set(Video.model_fields) <= set(told)


def test_progress_is_100_only_when_completed():
    record = admitted(num_frames=50)
    shown = [replace(record, frames_done=done).progress for done in range(51)]
    assert shown == sorted(shown) and shown[0] == 0 and shown[-1] == 99
    assert replace(record, status=Status.COMPLETED).progress == 100


def test_a_model_is_described_with_what_a_request_may_say():
    told = ModelObject.model_validate({**describe("builtin", SERVER), "created": 1})
    assert told.defaults["size"] == "256x256" and told.takes_image
    assert admitted(**{name: value for name, value in told.defaults.items() if name != "id"}).width == 256


def test_time_is_when_it_was_asked_for():
    before = int(time.time())
    assert before <= admitted().created_at <= time.time()
