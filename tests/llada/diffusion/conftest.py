"""A toy language whose every probability is known: three positions, three words, and networks that are tables."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)


class Toy:
    """A distribution over 27 sequences of three words (ids 0, 1, 2; the mask is 3) and its exact conditionals."""

    mask_id = 3

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.joint = torch.rand(27, generator=generator, dtype=torch.float64) ** 2 + 0.01
        self.joint /= self.joint.sum()
        self.sequences = torch.tensor(list(itertools.product(range(3), repeat=3)))
        # What a reader of the canvas (a, b, c), each 0..3, believes about each position: (4, 4, 4, 3, 3).
        self.conditionals = torch.zeros(4, 4, 4, 3, 3, dtype=torch.float64)
        for canvas in itertools.product(range(4), repeat=3):
            fits = torch.ones(27, dtype=torch.bool)
            for i, token in enumerate(canvas):
                if token != self.mask_id:
                    fits &= self.sequences[:, i] == token
            for i in range(3):
                for word in range(3):
                    mass = self.joint[fits & (self.sequences[:, i] == word)].sum()
                    self.conditionals[(*canvas, i, word)] = mass / self.joint[fits].sum()

    def network(self, perturbation: float = 0.0) -> Callable[..., Tensor]:
        """A "network" with the true conditionals, or with all of its beliefs disturbed."""
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(self.conditionals.shape, generator=generator, dtype=torch.float64)
        table = (self.conditionals.log() + perturbation * noise).log_softmax(-1)
        never = torch.full((4, 4, 4, 3, 1), float("-inf"), dtype=torch.float64)
        table = torch.cat([table, never], dim=-1)

        def predict(tokens: Tensor, **_: Tensor) -> Tensor:
            return table[tokens[:, 0], tokens[:, 1], tokens[:, 2]]

        return predict

    def log_p_of_order(self, network: Callable[..., Tensor], row: Tensor, order: tuple[int, ...]) -> float:
        """log p of a sequence written word by word in this order."""
        canvas, total = torch.full((1, 3), self.mask_id), 0.0
        for i in order:
            total += float(network(canvas)[0, i].log_softmax(-1)[row[i]])
            canvas[0, i] = row[i]
        return total

    def log_p_of_orders(self, network: Callable[..., Tensor], row: Tensor) -> Tensor:
        """log p of a sequence in each of the six orders."""
        orders = itertools.permutations(range(3))
        return torch.tensor([self.log_p_of_order(network, row, o) for o in orders], dtype=torch.float64)


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy()
