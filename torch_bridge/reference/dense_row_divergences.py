"""Soft losses of whole rows of logits in plain PyTorch: every kernel and cost formed; float64-capable."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, pad


class RowDivergence(NamedTuple):
    """A function of both models' logits at the temperature, teacher (N, Vt) first, student (N, V): to (N,)."""

    function: Callable[[Tensor, Tensor], Tensor]
    is_common: bool = True  # whether both have to be brought to one vocabulary before


def _cosine_distance(teacher: Tensor, student: Tensor) -> Tensor:
    closed = (teacher == -torch.inf) | (student == -torch.inf)
    return 1 - cosine_similarity(teacher.masked_fill(closed, 0), student.masked_fill(closed, 0), dim=-1, eps=1e-300)


def _mse(teacher: Tensor, student: Tensor) -> Tensor:
    closed = (teacher == -torch.inf) | (student == -torch.inf)
    squares = (teacher.masked_fill(closed, 0) - student.masked_fill(closed, 0)).square()
    return squares.sum(-1) / (~closed).sum(-1)


def _earth_mover(teacher: Tensor, student: Tensor) -> Tensor:
    p, q = (z.softmax(-1).sort(-1, descending=True).values for z in (teacher, student))
    width = max(p.shape[-1], q.shape[-1])
    p, q = (pad(x, (0, width - x.shape[-1])) for x in (p, q))
    return (p - q).abs().sum(-1) / 2


cosine_distance = RowDivergence(_cosine_distance)
mse = RowDivergence(_mse)
earth_mover = RowDivergence(_earth_mover, is_common=False)


def kernel_distance(embeddings: Tensor | None = None, *, degree: int = 1, offset: float = 1.0) -> RowDivergence:
    """(p - q)' K (p - q) with the (V, V) kernel: the identity, e_v . e_w, or (e_v . e_w + offset)^degree."""

    def function(teacher: Tensor, student: Tensor) -> Tensor:
        gap = teacher.softmax(-1) - student.softmax(-1)
        if embeddings is None:
            return gap.square().sum(-1)
        e = embeddings[: gap.shape[-1]].to(gap)
        kernel = e @ e.T if degree == 1 else (e @ e.T + offset) ** degree
        return torch.einsum("nv,vw,nw->n", gap, kernel, gap)

    return RowDivergence(function)


def sinkhorn(
    embeddings: Tensor,
    student_embeddings: Tensor | None = None,
    *,
    top: int = 32,
    epsilon: float = 0.1,
    iterations: int = 20,
) -> RowDivergence:
    """The Sinkhorn divergence among the likeliest tokens of each side, by scalings of exp(-cost / epsilon)."""
    tables = embeddings, embeddings if student_embeddings is None else student_embeddings

    def function(teacher: Tensor, student: Tensor) -> Tensor:
        (p, p_points), (q, q_points) = (side(z, table) for z, table in zip((teacher, student), tables, strict=True))
        between = transport(p, q, p_points, q_points)
        return between - (transport(p, p, p_points, p_points) + transport(q, q, q_points, q_points)) / 2

    def side(z: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        values, tokens = z.topk(min(top, z.shape[-1]), -1)
        return values.softmax(-1), normalize(table.to(z), dim=-1)[tokens]

    def transport(p: Tensor, q: Tensor, p_points: Tensor, q_points: Tensor) -> Tensor:
        kernel = torch.exp(-(1 - p_points @ q_points.mT) / epsilon)
        u, v = torch.ones_like(p), torch.ones_like(q)

        def scalings() -> tuple[Tensor, Tensor]:
            return 1 / (kernel @ (q * v)[..., None])[..., 0], 1 / (kernel.mT @ (p * u)[..., None])[..., 0]

        for _ in range(iterations):
            new_u, new_v = scalings()
            u, v = (u * new_u).sqrt(), (v * new_v).sqrt()
        u, v = scalings()
        return epsilon * ((p * u.log()).sum(-1) + (q * v.log()).sum(-1))

    return RowDivergence(function, is_common=False)
