"""Train the classifier whose features are used by the fd_<data> scores: python -m src.train_classifier data=digits"""

import argparse
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import trange

from src.app.parts import source_named
from src.errors import UserError
from src.metrics.classifier import SmallClassifier, save_classifier
from src.metrics.features import WEIGHTS_FOLDER
from src.randomness import generator

ARCHITECTURES = {
    # 64 features: a full-rank covariance needs more images than features, and digits has 1,504
    "digits": {"widths": [32, 64], "num_features": 64},
    "fashion_mnist": {"widths": [16, 32, 64], "num_features": 128},
}
EPOCHS = {"digits": 60, "fashion_mnist": 8}


def shift(images: Tensor, random: torch.Generator, pixels: int = 1) -> Tensor:
    """Shifts each image of (B, C, H, W) randomly by up to `pixels` along both axes, padding with zeros."""
    batch, _, height, width = images.shape
    padded = nn.functional.pad(images, (pixels,) * 4)
    top = torch.randint(2 * pixels + 1, (batch, 1, 1, 1), generator=random)
    left = torch.randint(2 * pixels + 1, (batch, 1, 1, 1), generator=random)
    rows = (top + torch.arange(height).view(1, 1, -1, 1)).expand(images.shape)
    columns = (left + torch.arange(width).view(1, 1, 1, -1)).expand(images.shape)
    sample = torch.arange(batch).view(-1, 1, 1, 1)
    channel = torch.arange(images.shape[1]).view(1, -1, 1, 1)
    return padded[sample, channel, rows, columns]


def train(
    classifier: SmallClassifier, images: Tensor, labels: Tensor, epochs: int, seed: int, batch_size: int = 128
) -> None:
    """Trains in place: cross-entropy with label smoothing 0.1, AdamW, one-cycle learning rate, shifts by one pixel."""
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    learning_rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    classifier.train()
    step = 0
    for epoch in trange(epochs, desc="epochs", delay=2):
        order = torch.randperm(len(images), generator=generator(seed, "permutation", epoch))
        for indices in order.split(batch_size):
            if len(indices) < batch_size:
                break
            batch = shift(images[indices], generator(seed, "shift", step))
            loss = nn.functional.cross_entropy(classifier(batch), labels[indices], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            learning_rate.step()
            step += 1
    classifier.eval()


@torch.no_grad()
def accuracy(classifier: SmallClassifier, images: Tensor, labels: Tensor) -> float:
    """The fraction of images whose largest logit is that of their label, in [0, 1]."""
    correct = sum(
        (classifier(batch).argmax(1) == target).sum().item()
        for batch, target in zip(images.split(500), labels.split(500), strict=True)
    )
    return correct / len(images)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m src.train_classifier", description=__doc__)
    parser.add_argument(
        "data", metavar="data=NAME", help=" or ".join(f"data={name}" for name in ARCHITECTURES)
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: the weights that come with the project")
    arguments = parser.parse_args()
    name = arguments.data.removeprefix("data=")
    if name not in ARCHITECTURES:
        parser.error(f"data={name}: no classifier for it; choose one of {', '.join(ARCHITECTURES)}")
    output = arguments.output or WEIGHTS_FOLDER / f"{name}.safetensors"

    source = source_named(name)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        train_set, test_set = source.split("train"), source.split("test")
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output {output}: {error.strerror or error}")
    torch.manual_seed(arguments.seed)
    classifier = SmallClassifier(
        channels=source.channels,
        image_size=source.image_size,
        num_classes=source.num_classes,
        **ARCHITECTURES[name],
    )
    train(
        classifier,
        train_set.images(torch.arange(len(train_set))),
        train_set.labels,
        EPOCHS[name],
        arguments.seed,
    )
    test_accuracy = accuracy(classifier, test_set.images(torch.arange(len(test_set))), test_set.labels)

    metadata = {
        "data": f"{name}, train split, {len(train_set)} images",
        "test_accuracy": f"{test_accuracy:.4f}",
        "command": f"python -m src.train_classifier data={name} --seed {arguments.seed}",
    }
    try:
        save_classifier(classifier, output, metadata)
    except SafetensorError as error:  # also for a full disk or a missing permission
        parser.error(f"--output {output} cannot be written: {error}")
    print(f"{output}: test accuracy {test_accuracy:.4f} on {len(test_set)} images")


if __name__ == "__main__":
    main()
