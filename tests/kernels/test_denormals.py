import torch

from vidgen.kernels.denormals import flushing_denormals, is_flushing
from vidgen.model import dit
from vidgen.model.context import Context

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


def test_denormals_are_zero_within_and_only_there():
    tiny = torch.tensor(1e-40)
    assert not is_flushing()
    with flushing_denormals(CPU):
        assert is_flushing() and (tiny * 1.0).item() == 0
        with flushing_denormals(CPU):
            assert is_flushing()
        assert is_flushing()  # an inner one leaves it to the outer one
    assert not is_flushing() and (tiny * 1.0).item() != 0


def test_it_ends_with_an_error_too_and_is_for_the_cpu_only():
    try:
        with flushing_denormals(CPU):
            raise KeyError
    except KeyError:
        assert not is_flushing()
    with flushing_denormals(ELSEWHERE):
        assert not is_flushing()


@torch.inference_mode()
def test_the_built_in_models_layers_say_the_same_to_the_last_bit(monkeypatch):
    from vidgen.builtin import load_small

    model, generator = load_small().dit, torch.Generator().manual_seed(0)
    width, text_width = model.config.width, model.config.text_width
    x_BFSD = 8 * torch.randn(1, 4, 16, width, generator=generator)  # large: GELU's tanh is all but one
    text = torch.randn(1, 6, text_width, generator=generator)
    conditioning = model.condition(torch.full((1, 4), 0.7), text)
    flushed, _ = model.run_layers(x_BFSD, conditioning, (4, 4, 4), Context())
    monkeypatch.setattr(dit, "flushing_denormals", lambda device: flushing_denormals(ELSEWHERE))
    plain, _ = model.run_layers(x_BFSD, conditioning, (4, 4, 4), Context())
    assert torch.equal(flushed, plain)
