"""How the server is set up: what is wrong is one line, and nothing listens to the world without keys."""

from pathlib import Path
from typing import Any

import pytest

from vidgen.config import JobConfig
from vidgen.serve.config import ServerConfig, input_file, load_server_config, merged, store_file, video_folder
from vidgen.serve.records import Kind, make_id

KEY = {"name": "ada", "sha256": "0" * 64}


def test_the_usual_server_is_local_and_shows_the_built_in_model_large():
    config = load_server_config()
    assert config == ServerConfig() and config.is_loopback and config.default_model == "builtin"
    assert config.models["builtin"].job["output"]["upscale"] == 8
    assert (config.port, config.replicas, config.keys) == (8711, 1, ())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "", "127.0.0.1.example.org"])
def test_a_host_that_others_can_reach_needs_keys(host: str):
    with pytest.raises(ValueError, match="no keys") as refusal:
        load_server_config(None, {"host": host})
    assert "\n" not in str(refusal.value) and "127.0.0.1" in str(refusal.value)
    assert load_server_config(None, {"host": host, "keys": [KEY]}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "[::1]", "localhost"])
def test_loopback_needs_none(host: str):
    assert load_server_config(None, {"host": host}).is_loopback


def test_flags_win_over_the_file_section_by_section(tmp_path: Path):
    path = tmp_path / "serve.yaml"
    path.write_text(
        "port: 9000\nreplicas: 3\nlimits: {max_queue: 5, max_steps: 7}\n"
        "models:\n  small: {job: {num_inference_steps: 4}}\n  other: {}\n"
    )
    config = load_server_config(path, {"replicas": 2, "limits": {"max_queue": 9}})
    assert (config.port, config.replicas) == (9000, 2)
    assert (config.limits.max_queue, config.limits.max_steps, config.limits.max_frames) == (9, 7, 20_000)
    assert list(config.models) == ["small", "other"] and config.default_model == "small"


def test_an_empty_file_is_the_usual_server(tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_server_config(tmp_path / "empty.yaml") == ServerConfig()


WRONG: list[tuple[Any, tuple[str, ...]]] = [
    ({"prot": 1}, ("unknown key prot", "port")),
    ({"limits": {"max_quee": 1}}, ("limits.max_quee", "max_queue")),
    ({"limits": {"max_queue": 0}}, ("limits.max_queue=0", "greater")),
    ({"port": 70_000}, ("port=70000",)),
    ({"models": {}}, ("models",)),
    ({"models": {"a b": {}}}, ("letters",)),
    ({"models": {"small": {"job": {"prompt": "x"}}}}, ("models.small", "job.prompt", "leave it out")),
    ({"models": {"small": {"job": {"output": {"path": "x"}}}}}, ("job.output.path",)),
    ({"models": {"small": {"session": {"input": {}}}}}, ("session.input",)),
    ({"models": {"small": {"job": {"guidance": 3}}}}, ("models.small", "guidance", "guidance_scale")),
    ({"models": {"small": {"job": {"num_frames": 0}}}}, ("num_frames=0",)),
    ({"models": {"small": {"jobs": {}}}}, ("models.small.jobs", "did you mean job?")),
    ({"keys": [{"name": "ada", "sha256": "secret"}]}, ("keys.0.sha256",)),
    ({"keys": [KEY, KEY]}, ("ada", "twice")),
    ({"keys": [{**KEY, "name": "../x"}]}, ("keys.0.name",)),
    ({"allowed_origins": ["*"]}, ("allowed_origins.0=*", "https://")),
    ({"timings": {"drain_s": float("inf")}}, ("timings.drain_s",)),
    ([1], ("mapping",)),
]


@pytest.mark.parametrize("values, says", WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_one_line_that_names_it(values: Any, says: tuple[str, ...], tmp_path: Path):
    import yaml

    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError) as refusal:
        load_server_config(path)
    message = str(refusal.value)
    assert "\n" not in message and str(path) in message
    assert not [word for word in says if word not in message], message


def test_a_file_that_is_missing_or_broken_is_one_line(tmp_path: Path):
    (tmp_path / "broken.yaml").write_text("a: [1")
    for name in ("none.yaml", "broken.yaml"):
        with pytest.raises(ValueError, match=name) as refusal:
            load_server_config(tmp_path / name)
        assert "\n" not in str(refusal.value)


def test_an_operator_may_set_any_setting_of_a_job_but_those_of_requests_and_places():
    for name in JobConfig.model_fields:
        values = {name: getattr(JobConfig(), name)}
        allowed = name not in ("model", "prompt", "segments", "input", "output")
        if name == "output":
            continue  # refused by its parts, above
        values = JobConfig(**values).model_dump(mode="json", include={name})
        if allowed:
            load_server_config(None, {"models": {"small": {"job": values}}})
        else:
            with pytest.raises(ValueError, match=f"job.{name}"):
                load_server_config(None, {"models": {"small": {"job": values}}})


def test_merging_leaves_both_as_they_were():
    first, second = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}, "d": {"e": 1}}
    assert merged(first, second) == {"a": {"b": 5, "c": 2}, "d": {"e": 1}}
    assert first == {"a": {"b": 1, "c": 2}, "d": 3} and second == {"a": {"b": 5}, "d": {"e": 1}}


def test_every_place_lies_in_the_data_folder_whatever_the_id_says():
    data = Path("/data")
    id = make_id(Kind.VIDEO)
    assert video_folder(data, id) == data / "videos" / id
    assert input_file(data, id, ".png").parent == data / "inputs"
    assert store_file(data).parent == data
    for wrong in ("..", "../x", "/etc", "", id + "/..", id + "\0", id + "\n", f"./{id}", "video_" + "A" * 32):
        for place in (video_folder, lambda data, id: input_file(data, id, ".png")):
            with pytest.raises(ValueError, match="no id"):
                place(data, wrong)


def test_keys_may_have_limits_of_their_own():
    other = {"name": "bob", "sha256": "1" * 64, "max_running": 5}
    config = load_server_config(None, {"keys": [KEY, other]})
    assert config.running_limits() == {"bob": 5}
    found = config.key("bob")
    assert found is not None and found.max_running == 5 and config.key("local") is None
