import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from src.metrics.inception import empty_network


@pytest.fixture(scope="session")
def random_weights() -> dict[str, Tensor]:
    """Random InceptionV3 weights: He-initialised convolutions, non-trivial batch norms."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in empty_network("2048").state_dict().items():
        if name.endswith("conv.weight"):
            fan_in = tensor[0].numel()
            weights[name] = torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
        elif name.endswith(("bn.weight", "running_var")):
            weights[name] = 0.5 + torch.rand(tensor.shape, generator=generator)
        else:
            weights[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
    return weights


@pytest.fixture(scope="session")
def state_dict_file(random_weights, tmp_path_factory):
    """A file in the format of torch-fidelity: a PyTorch state dict with the head."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_weights, path)
    return path


@pytest.fixture(scope="session")
def pool3_file(random_weights, tmp_path_factory):
    """A file in the format of `make inception`: safetensors without the head."""
    path = tmp_path_factory.mktemp("weights") / "pool3.safetensors"
    save_file({n: t for n, t in random_weights.items() if "fc." not in n and "num_batches" not in n}, path)
    return path
