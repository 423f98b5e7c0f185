"""A network for tests of samplers."""

import torch


class Wavy(torch.nn.Module):
    """A smooth function of x and label, nowhere linear, so that a wrong time or a wrong coefficient shows."""

    def forward(self, x, label, condition=None):
        return torch.tanh(x * (0.5 + label.view(-1, 1, 1, 1) / 1000)) + 0.1 * x.flip(-1)


def standard_normal(shape, seed=0):
    """float32 noise that depends on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def recorded_noise(seed=1):
    """A source of float64 noise that gives the same again each time it is made."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=torch.float64, generator=generator)
