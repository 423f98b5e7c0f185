"""A network and noise sources for tests of samplers."""

import torch


class Wavy(torch.nn.Module):
    """A smooth non-linear function of x and label: a wrong time or coefficient changes the output."""

    second_time = True

    def forward(self, x, label, condition=None, to_label=None):
        return torch.tanh(x * (0.5 + label.view(-1, 1, 1, 1) / 1000)) + 0.1 * x.flip(-1)


def standard_normal(shape, seed=0):
    """float32 noise that depends only on the seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def recorded_noise(seed=1):
    """A source of float64 noise; sources with the same seed give the same sequence."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=torch.float64, generator=generator)
