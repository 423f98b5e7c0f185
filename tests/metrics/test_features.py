import hashlib

import pytest
import torch
from safetensors.torch import save_file

from src.errors import UserError
from src.metrics.classifier import SmallClassifier, load_classifier, save_classifier
from src.metrics.features import WEIGHTS_FOLDER, ClassifierFeatures, full_precision, hash_tensors


def random_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)


def small_classifier(path, num_features: int = 5) -> SmallClassifier:
    classifier = SmallClassifier(1, 6, [4], num_features, 3)
    save_classifier(classifier, path, {"data": "none"})
    return classifier


SHIPPED = [("digits", (1, 8, 8), 64, 200_000), ("fashion_mnist", (1, 28, 28), 128, 600_000)]


@pytest.mark.parametrize(("name", "shape", "num_features", "bytes_at_most"), SHIPPED)
def test_shipped_weights_are_small_and_record_their_origin(name, shape, num_features, bytes_at_most):
    features = ClassifierFeatures(name)
    assert (WEIGHTS_FOLDER / f"{name}.safetensors").stat().st_size <= bytes_at_most
    assert features.name == name
    assert features.num_features == num_features
    assert f"data={name}" in features.origin
    assert "test accuracy 0.9" in features.origin or "test accuracy 1.0" in features.origin
    found = features(random_images(3, shape))
    assert found.shape == (3, num_features)
    assert found.dtype == torch.float32


def test_shipped_digits_classifier_has_the_recorded_accuracy():
    from src.data.digits import Digits
    from src.tools.train_classifier import accuracy

    classifier, metadata = load_classifier(WEIGHTS_FOLDER / "digits.safetensors")
    test_set = Digits().split("test")
    measured = accuracy(classifier.eval(), test_set.images(torch.arange(len(test_set))), test_set.labels)
    assert f"{measured:.4f}" == metadata["test_accuracy"]
    assert measured > 0.97


def test_features_do_not_depend_on_the_batch_or_on_training_mode_or_autocast():
    features = ClassifierFeatures("digits")
    images = random_images(7, (1, 8, 8))
    together = features(images)
    alone = torch.cat([features(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    features.train()
    assert torch.equal(features(images), together)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(images), together)
    assert not together.requires_grad


def test_loading_does_not_change_the_random_state():
    before = torch.random.get_rng_state()
    ClassifierFeatures("digits")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 8, 8),
        torch.zeros(1, 8, 8, dtype=torch.uint8),
        random_images(2, (3, 8, 8)),
        random_images(2, (1, 8, 12)),
    ],
    ids=["float", "no batch", "colour", "not square"],
)
def test_invalid_images_are_refused_in_one_line(images):
    with pytest.raises(ValueError, match="digits") as raised:
        ClassifierFeatures("digits")(images)
    assert "\n" not in str(raised.value)


def test_hash_depends_on_the_weights_and_not_on_the_file(tmp_path):
    classifier = small_classifier(tmp_path / "a.safetensors")
    save_classifier(classifier, tmp_path / "b.safetensors", {"data": "something else"})
    first = ClassifierFeatures(str(tmp_path / "a.safetensors"))
    assert first.sha256 == ClassifierFeatures(str(tmp_path / "b.safetensors")).sha256
    with torch.no_grad():
        classifier.head.bias[0] += 1e-7
    save_classifier(classifier, tmp_path / "b.safetensors", {"data": "something else"})
    assert first.sha256 != ClassifierFeatures(str(tmp_path / "b.safetensors")).sha256


def test_hash_equals_its_definition():
    weights = {"b": torch.tensor([1, 2], dtype=torch.uint8), "a": torch.zeros(1, 1)}
    text = b"a torch.float32 (1, 1)\n" + bytes(4) + b"b torch.uint8 (2,)\n" + bytes([1, 2])
    assert hash_tensors(weights) == hashlib.sha256(text).hexdigest()


def test_features_are_the_input_of_the_head(tmp_path):
    classifier = small_classifier(tmp_path / "c.safetensors").eval()
    images = random_images(4, (1, 6, 6))
    features = ClassifierFeatures(str(tmp_path / "c.safetensors"))(images)
    torch.testing.assert_close(classifier.head(features), classifier(images))


@pytest.mark.parametrize("content", ["missing", "text", "empty", "truncated", "other", "shape"])
def test_invalid_file_is_a_user_error(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    classifier = small_classifier(path)
    if content == "missing":
        path.unlink()
    elif content == "text":
        path.write_text("not weights")
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif content == "other":
        save_file({"x": torch.zeros(2)}, path)
    else:
        classifier.architecture["num_features"] = 6
        save_classifier(classifier, path, {})
    with pytest.raises(UserError, match=r"metrics\.features\.weights.*weights\.safetensors") as raised:
        ClassifierFeatures(str(path))
    assert "\n" not in str(raised.value)


def test_too_many_pooling_layers_are_refused():
    with pytest.raises(ValueError, match="widths: 3 poolings reduce 4 pixels to 0"):
        SmallClassifier(1, 4, [2, 2, 2], 4, 2)


def test_full_precision_is_limited_to_the_context_and_supports_both_interfaces():
    backends, conv = torch.backends, torch.backends.cudnn.conv
    before = backends.fp32_precision, conv.fp32_precision
    try:
        # the interface of torch 2.9; after its use, reading cudnn.allow_tf32 raises
        backends.fp32_precision, conv.fp32_precision = "tf32", "tf32"
        with full_precision():
            assert conv.fp32_precision == "ieee"
        assert conv.fp32_precision == "tf32"
        assert ClassifierFeatures("digits")(random_images(1, (1, 8, 8))).isfinite().all()
    finally:
        backends.fp32_precision, conv.fp32_precision = before
    with full_precision():
        pass
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_features_on_gpu_and_cpu_agree_if_training_allows_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    features = ClassifierFeatures("digits")
    images = random_images(64, (1, 8, 8))
    expected = features(images)
    found = features.cuda()(images.cuda()).cpu()
    # TF32 convolutions have errors of about 1e-3
    assert (found - expected).norm() < 1e-5 * expected.norm()
