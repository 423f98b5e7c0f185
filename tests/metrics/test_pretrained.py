"""DINOv2 and CLIP as feature spaces, with small random networks in the published formats."""

import pytest
import torch
import torch_fidelity
from safetensors.torch import save_file
from torch import nn

from src.errors import UserError
from src.metrics.fidelity import FrechetDistance
from src.metrics.pretrained import ClipFeatures, DinoFeatures
from tests.metrics.pixels import give_reference
from tests.metrics.test_features import random_images
from tests.metrics.test_inception import Dataset

REAL, FAKE = random_images(14, (3, 12, 12), seed=1), random_images(12, (3, 12, 12), seed=2) // 2


class TinyDino(nn.Module):
    """In place of DINOv2: images (B, 3, 224, 224) to 5 features."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 56, stride=56)

    def forward(self, images):
        return self.convolution(images).square().mean(dim=(2, 3))


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=generator) / 50 for name, t in network.state_dict().items()}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """torch.hub with TinyDino, whose published weights are those of `weights_of`; and a folder for downloads."""

    def load(repository, name, pretrained=True, **_):
        assert (repository, name) == ("facebookresearch/dinov2", "dinov2_vits14")
        network = TinyDino()
        if pretrained:
            network.load_state_dict(weights_of(network))
        return network

    monkeypatch.setattr(torch.hub, "load", load)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
    """A small CLIP with random weights as TorchScript, as OpenAI publishes it, and as a state dict."""
    from torch_fidelity.feature_extractor_clip import CLIPVisual

    folder = tmp_path_factory.mktemp("clip")
    network = CLIPVisual(6, 16, 1, 64, 8)
    network.text_projection = nn.Parameter(torch.zeros(4, 6))
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            # in half precision, as published
            tensor.copy_(
                weights_of(network)[name].mul(5).half() + (1 if "ln" in name and "weight" in name else 0)
            )

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.text_projection = network.visual, network.text_projection

        def forward(self, x):
            return x

    torch.jit.script(Holder()).save(str(folder / "clip.pt"))
    state = {name: tensor.contiguous() for name, tensor in Holder().state_dict().items()}
    save_file(state, folder / "clip.safetensors")
    return folder


def distance(features) -> float:
    score = FrechetDistance(features)
    give_reference(score, *REAL.split(5))
    for batch in FAKE.split(7):
        score.update(batch)
    return score.compute()[score.name]


def theirs(**settings) -> float:
    settings |= {"fid": True, "cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True}
    found = torch_fidelity.calculate_metrics(input1=Dataset(FAKE), input2=Dataset(REAL), **settings)
    return found["frechet_inception_distance"]


def test_distance_in_dinov2_equals_torch_fidelitys_call(hub):
    features = DinoFeatures("vits14", chunk=3)
    assert FrechetDistance(features).name == "fd_dinov2_vits14"
    assert distance(features) == pytest.approx(theirs(feature_extractor="dinov2-vit-s-14"), rel=1e-6)
    torch.save(weights_of(TinyDino()), hub / "weights.pth")
    assert DinoFeatures("vits14", weights=str(hub / "weights.pth")).sha256 == features.sha256


def test_distance_in_clip_equals_torch_fidelitys_call(clip_files, monkeypatch):
    from torch_fidelity import feature_extractor_clip

    expected = theirs(
        feature_extractor="clip-vit-b-32", feature_extractor_weights_path=str(clip_files / "clip.pt")
    )
    features = ClipFeatures(weights=str(clip_files / "clip.safetensors"))
    assert FrechetDistance(features).name == "fd_clip"
    assert distance(features) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match="neither a safetensors file nor a PyTorch state dict"):
        ClipFeatures(weights=str(clip_files / "clip.pt"))  # TorchScript with an unknown hash is not opened
    from hashlib import sha256

    digest = sha256((clip_files / "clip.pt").read_bytes()).hexdigest()
    monkeypatch.setitem(feature_extractor_clip.MODEL_METADATA["clip-vit-b-32"], "hash", digest)
    assert ClipFeatures(weights=str(clip_files / "clip.pt")).sha256 == features.sha256


def test_missing_weights_are_one_line_that_names_the_option(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr(torch.hub, "load", offline)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for make, fix in (
        (DinoFeatures, r"facebookresearch_dinov2_main, and give metrics\.features\.weights=<file of"),
        (ClipFeatures, r"failed \(no network\): give metrics\.features\.weights=<file>"),
        (
            lambda: DinoFeatures(weights="nowhere.pth"),
            r"metrics\.features\.weights=nowhere\.pth: no such file",
        ),
        (lambda: ClipFeatures(weights="nowhere.pt"), r"metrics\.features\.weights=nowhere\.pt: no such file"),
    ):
        with pytest.raises(UserError, match=fix) as raised:
            make()
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="network='vit': choose one of rn50, "):
        ClipFeatures("vit")


def test_weights_of_another_network_are_refused(hub, clip_files):
    save_file({"x": torch.zeros(2)}, hub / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors is not dinov2_vits14"):
        DinoFeatures("vits14", weights=str(hub / "other.safetensors"))
    with pytest.raises(UserError, match=r"other\.safetensors is not clip-vit-b-32"):
        ClipFeatures(weights=str(hub / "other.safetensors"))
