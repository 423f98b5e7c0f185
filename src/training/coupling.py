"""Couplings: which noise of a batch belongs to which image."""

from abc import ABC, abstractmethod

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from src.conditioning import Condition


class Coupling(ABC):
    """Reorders the noise of a batch. Validation keeps its order.

    Attributes:
        needs_pairs: whether the noise of an image depends on the other images of its micro-batch.
    """

    needs_pairs = True

    @abstractmethod
    def __call__(self, x0: Tensor, eps: Tensor, condition: Condition | None) -> Tensor:
        """The noise of each image, a permutation of eps.

        Args:
            x0: images, shape (B, C, H, W).
            eps: standard normal noise, x0's shape.
            condition: the condition of the images that the network is given, or None.
        """


class Independent(Coupling):
    """The noise in the order in which it was drawn."""

    needs_pairs = False

    def __call__(self, x0, eps, condition):
        return eps


class OptimalTransport(Coupling):
    """The order with the smallest sum of ||x0 - eps||^2 in the batch (minibatch optimal transport).

    Pooladian et al. 2023 (arXiv:2304.14772) and Tong et al. 2023 (arXiv:2302.00482): lines from noise to image cross
    less, so that the flow is straighter. The batch is that of one device and micro-batch, so the result depends on how
    a batch is split. The step waits for the device.

    Args:
        per_class: only reorder the noise within each class. With a condition it is needed: otherwise the noise of a
            class would have another distribution than in sampling, where it does not depend on the class.
    """

    def __init__(self, per_class: bool = False):
        self.per_class = per_class

    def __call__(self, x0, eps, condition):
        labels = condition.labels if self.per_class and condition is not None else None
        groups = torch.zeros(len(x0), dtype=torch.long) if labels is None else labels.cpu()
        # sum ||x0 - eps||^2 is constant but for the products
        products = (x0.flatten(1).float() @ eps.flatten(1).float().T).cpu().double()
        order = torch.arange(len(x0))
        for group in groups.unique():
            rows = torch.nonzero(groups == group)[:, 0]
            _, columns = linear_sum_assignment(products[rows][:, rows].numpy(), maximize=True)
            order[rows] = rows[torch.as_tensor(columns)]
        return eps[order.to(eps.device)]
