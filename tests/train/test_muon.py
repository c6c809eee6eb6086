"""The grouped optimiser takes the steps of torch's own."""

import torch

from vidgen.train.muon import Muon


def test_steps_are_those_of_torch_within_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 24), (24, 24), (48, 24), (24, 48), (48, 24), (7, 9)]
    ours = [torch.randn(shape, generator=generator) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in ours]
    optimiser = Muon(ours, lr=0.02)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.0)
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        optimiser.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() < 0.02 * 5 * 0.02  # bf16 inside


def test_a_matrix_without_a_gradient_stays_as_it_is() -> None:
    used, unused = torch.ones(4, 4), torch.ones(4, 4)
    used.grad = torch.eye(4)
    Muon([used, unused], lr=0.1).step()
    assert torch.equal(unused, torch.ones(4, 4)) and not torch.equal(used, torch.ones(4, 4))
