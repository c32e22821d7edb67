"""Muon: momentum whose update is orthogonalised, for the matrices inside the layers.

After Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
torch has one too, whose Newton-Schulz steps run in bfloat16; many processors have no bfloat16
arithmetic, so this one stays in the gradient's dtype.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return `matrix` [rows, columns] with its singular values pushed to about 1."""
    a, b, c = _COEFFICIENTS
    # Work on the wide orientation: the products below are then of the smaller side.
    x: Tensor = matrix.mT if matrix.size(0) > matrix.size(1) else matrix
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.size(0) > matrix.size(1) else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. Two-dimensional parameters only."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # one gradient a step
        """Update every parameter that has a gradient, in place. There is nothing to re-evaluate."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                average = state["momentum"].lerp_(param.grad, 1 - momentum)
                update = orthogonalize(param.grad.lerp(average, momentum))
                # Tall matrices get longer steps, so that every output moves by about `lr`.
                scale = max(1.0, param.size(0) / param.size(1)) ** 0.5
                param.mul_(1 - lr * decay).add_(update, alpha=-lr * scale)
