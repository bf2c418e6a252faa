"""PyTorch twins of `resnet_jax.contrastive`, for parity tests only, written from the papers.

Each takes one process's batch and returns a scalar, the mean over examples; views are lists of [B, D] or [B, K].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """SimCLR: https://arxiv.org/abs/2002.05709."""
    n = len(a)
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(logits, torch.arange(2 * n).roll(n))


def sup_con(features: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """SupCon's L_out of features [B, V, D]: https://arxiv.org/abs/2004.11362."""
    views = features.shape[1]
    z = F.normalize(features, dim=-1).flatten(0, 1)
    labels = labels.repeat_interleave(views)
    other = 1 - torch.eye(len(z))
    positive = (labels[:, None] == labels[None, :]).float() * other
    logits = z @ z.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    log_p = logits - torch.log((logits.exp() * other).sum(1, keepdim=True))
    return -((positive * log_p).sum(1) / positive.sum(1)).mean()


def moco(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """MoCo's loss against a queue [K, D]: https://arxiv.org/abs/1911.05722, temperature of v2."""
    q, k, queue = (F.normalize(x, dim=1) for x in (q, k, queue))
    positive = torch.einsum("nd,nd->n", q, k)[:, None]
    negative = torch.einsum("nd,kd->nk", q, queue)
    logits = torch.cat([positive, negative], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def moco_v3(q: Tensor, k: Tensor, temperature: float = 0.2) -> Tensor:
    """One half of MoCo v3's loss, against the batch's own keys, without its factor 2 T: https://arxiv.org/abs/2104.02057."""
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(q)))


def byol(prediction: Tensor, target: Tensor) -> Tensor:
    """One half of BYOL's loss: https://arxiv.org/abs/2006.07733."""
    return (F.normalize(prediction, dim=-1) - F.normalize(target.detach(), dim=-1)).pow(2).sum(-1).mean()


def off_diagonal(x: Tensor) -> Tensor:
    """All entries of [D, D] but the diagonal's, [D * (D - 1)]."""
    d = len(x)
    return x.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten()


def barlow_twins(a: Tensor, b: Tensor, lambd: float = 0.0051) -> Tensor:
    """Barlow Twins: https://arxiv.org/abs/2103.03230."""
    norm = nn.BatchNorm1d(a.shape[1], affine=False)
    c = norm(a).T @ norm(b) / len(a)
    return (torch.diagonal(c) - 1).pow(2).sum() + lambd * off_diagonal(c).pow(2).sum()


def vicreg(x: Tensor, y: Tensor, sim: float = 25.0, std: float = 25.0, cov: float = 1.0) -> Tensor:
    """VICReg as its repository weights it, the two hinges halved: https://arxiv.org/abs/2105.04906."""
    n, d = x.shape
    repr_loss = F.mse_loss(x, y)
    x, y = x - x.mean(0), y - y.mean(0)
    hinges = [F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean() / 2 for z in (x, y)]
    covariances = [off_diagonal(z.T @ z / (n - 1)).pow(2).sum() / d for z in (x, y)]
    return sim * repr_loss + std * sum(hinges) + cov * sum(covariances)


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """SwAV's algorithm 1, [B, K]: https://arxiv.org/abs/2006.09882."""
    q = torch.exp(scores / epsilon).T
    q /= q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * k
        q /= q.sum(0, keepdim=True) * b
    return (q * b).T


def swav(scores: Sequence[Tensor], crops_for_assign: Sequence[int] = (0, 1), temperature: float = 0.1) -> Tensor:
    """Swapped prediction with multi-crop: https://arxiv.org/abs/2006.09882."""
    loss = torch.zeros(())
    for i in crops_for_assign:
        q = sinkhorn(scores[i])
        others = [v for v in range(len(scores)) if v != i]
        loss = loss + sum(-(q * F.log_softmax(scores[v] / temperature, 1)).sum(1).mean() for v in others) / len(others)
    return loss / len(crops_for_assign)


class DINO(nn.Module):
    """DINO's loss with its center: https://arxiv.org/abs/2104.14294."""

    center: Tensor

    def __init__(self, center: Tensor, momentum: float = 0.9) -> None:
        super().__init__()
        self.register_buffer("center", center.clone()[None])
        self.momentum = momentum

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Student views with the teacher's first; moves the center afterwards."""
        targets = [F.softmax((t - self.center) / 0.04, dim=-1).detach() for t in teacher]
        terms = [
            torch.sum(-t * F.log_softmax(s / 0.1, dim=-1), dim=-1).mean()
            for i, t in enumerate(targets)
            for j, s in enumerate(student)
            if i != j
        ]
        batch_center = torch.cat(list(teacher)).detach().mean(dim=0, keepdim=True)
        self.center = self.center * self.momentum + batch_center * (1 - self.momentum)
        return sum(terms) / len(terms)
