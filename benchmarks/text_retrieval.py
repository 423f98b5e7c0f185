"""Do images follow their prompts? Retrieval of the right picture among 100 by the image made from its caption.

    python -m benchmarks.text_retrieval <run folder>

For 100 captions of the training split and 100 of the test split, one image is made from each caption, and the 100
pictures are ranked by their distance from it. Shown are the share of images whose own picture comes first or among the
first five, and the mean rank; by chance 1 %, 5 % and 50.5. Distances are Euclidean, between pixels and between
InceptionV3's features (where `make inception` has stored them). For comparison, the generated image is replaced by the
training picture with the nearest other caption (cosine of the mean token). A grid of test captions, each with the
generated image at the left and the emoji at the right, is written to docs/images/emoji.png.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.loading import loaded_run
from src.conditioning import TextTable
from src.data.source import ImageSet
from src.generation.loaded import LoadedRun
from src.generation.pictures import captioned_grid
from src.metrics.features import InceptionFeatures
from src.metrics.inception import POOL3_FILE, expanded

N = 100


def chosen(images: ImageSet) -> list[int]:
    """N images, evenly spaced over a split."""
    return torch.linspace(0, len(images) - 1, N).round().long().tolist()


def made(loaded: LoadedRun, captions: list[str], batch_size: int = 50) -> Tensor:
    """One image for each caption."""
    conditioning = loaded.recipe.conditioning
    conditioning.prompts, conditioning._table = captions, None
    return torch.cat(
        [b.images for b in loaded.recipe.images(loaded.denoiser, range(len(captions)), batch_size)]
    )


def nearest_training_pictures(train: ImageSet, captions: TextTable, n: int, without: list[int]) -> Tensor:
    """The training pictures with the nearest captions, among those that are not excluded."""

    def means(table: TextTable, indices: list[int]) -> Tensor:
        condition = table.condition(indices)
        sums = (condition.tokens.float() * condition.mask[..., None]).sum(dim=1)
        return torch.nn.functional.normalize(sums, dim=1)

    others = [i for i in range(len(train)) if i not in set(without)]
    similarity = means(captions, list(range(n))) @ means(train.text, others).T
    return train.images([others[i] for i in similarity.argmax(dim=1).tolist()])


def ranks(images: Tensor, pictures: Tensor) -> Tensor:
    """The rank of picture i among all pictures by distance from image i, from 1; features (n, D) of both.

    Equal distances share the mean of their ranks.
    """
    distance = torch.cdist(images.double(), pictures.double())
    own = distance.diagonal()[:, None]
    return (distance < own).sum(dim=1) + ((distance == own).sum(dim=1) + 1) / 2


def main() -> None:
    """Prints the shares and ranks, and writes the grid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run folder or a checkpoint")
    parser.add_argument("--scale", default="3", help="guidance scale (default: 3)")
    parser.add_argument("--steps", default="25", help="DDIM steps (default: 25)")
    parser.add_argument("--grid", default="docs/images/emoji.png", help="file of the grid")
    arguments = parser.parse_args()
    steps = f"sampler.steps={arguments.steps}"
    guided = loaded_run(arguments.run, steps, "guidance=classifier_free", f"guidance.scale={arguments.scale}")
    train = guided.source.split("train")
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    for split in ("train", "test"):
        images = guided.source.split(split)
        which = chosen(images)
        captions, pictures = [images.captions[i] for i in which], images.images(which)
        generated = made(guided, captions)
        rows[f"{split} captions"] = generated, pictures
        text = guided.recipe.conditioning.encoder(captions)
        others = nearest_training_pictures(train, text, N, which if split == "train" else [])
        rows[f"{split} captions, nearest other picture"] = others, pictures
    shown = range(0, N, 3)  # of the test split
    pairs = torch.cat([generated[shown], pictures[shown]], dim=3)
    Path(arguments.grid).parent.mkdir(parents=True, exist_ok=True)
    captioned_grid(pairs, [captions[i] for i in shown], columns=6).save(arguments.grid)

    spaces = {"pixels": lambda images: images.flatten(1).float()}
    if expanded(POOL3_FILE).is_file():
        extractor = InceptionFeatures()
        spaces["Inception"] = lambda images: torch.cat([extractor(part) for part in images.split(25)])
    print(f"{'':<48}first  five  mean rank")
    for name, space in spaces.items():
        for row, (candidates, pictures) in rows.items():
            found = ranks(space(candidates), space(pictures))
            shares = f"{sum(found == 1):>3} % {sum(found <= 5):>3} %  {found.mean():.1f}"
            print(f"{f'{row}, {name}':<48}{shares}", flush=True)


if __name__ == "__main__":
    main()
