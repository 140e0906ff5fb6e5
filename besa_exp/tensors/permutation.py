"""Channel permutation for N:M (RIA, Zhang et al., ICLR 2024, Section 4): which inputs make up a group of M is free, as
long as the activations are gathered in the same order, so the groups are chosen such that little importance is lost.

There are two steps, as in the paper. First the inputs are distributed by their total importance, so that no group gets
all the important ones. Then, for each of the M places of a group in turn, the inputs at that place are reassigned to
the groups in the best way, a linear assignment. With the other inputs of group g fixed, adding input i raises the
importance that the rows keep by

    sum_r max(0, S_ri - T_rg),    T_rg the N-th largest importance in row r of the other inputs of g.

Since sum_r max(0, a_r - b_r) = (||a - b||_1 + sum_r a_r - sum_r b_r) / 2 and the last two sums are the same for every
assignment, the best assignment is the one with the largest total of the distances.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from besa_exp.tensors.masks import keep_n_of_m


def permuted_for(importance: Float[Tensor, "out in"], kept: int, group: int) -> Int[Tensor, " in"]:
    """The inputs in the order in which every `group` consecutive ones are a group; never worse than as they are."""
    columns = importance.shape[1]
    as_they_are = torch.arange(columns, device=importance.device)
    order = _dealt_out(importance, group)
    for place in range(group):
        order = _exchanged(importance, order, place, kept, group)
    if kept_importance(importance, order, kept, group) <= kept_importance(importance, as_they_are, kept, group):
        return as_they_are
    return order


def keep_n_of_m_permuted(
    importance: Float[Tensor, "out in"], order: Int[Tensor, " in"], kept: int, group: int
) -> Tensor:
    """The keep mask, in the inputs' own order, that is N:M in that of `order`."""
    return keep_n_of_m(importance[:, order], kept, group)[:, order.argsort()]


def kept_importance(importance: Float[Tensor, "out in"], order: Int[Tensor, " in"], kept: int, group: int) -> float:
    """The total importance of the weights that N:M keeps in this order of inputs."""
    grouped = importance[:, order].unflatten(1, (-1, group))
    return float(grouped.topk(kept, dim=2).values.sum(dtype=torch.float64))


def _dealt_out(importance: Float[Tensor, "out in"], group: int) -> Int[Tensor, " in"]:
    """The inputs by total importance, one to each group in turn, and back again."""
    turns = importance.sum(dim=0).argsort(descending=True, stable=True).view(group, -1).clone()
    turns[1::2] = turns[1::2].flip(1)
    return turns.T.flatten()


def _exchanged(
    importance: Float[Tensor, "out in"], order: Int[Tensor, " in"], place: int, kept: int, group: int
) -> Int[Tensor, " in"]:
    """The inputs at `place` of their groups, reassigned to the groups as well as possible while the others stay."""
    from scipy.optimize import linear_sum_assignment  # a third of a second, which no other run needs

    groups = order.view(-1, group).clone()
    movable = groups[:, place]
    others = torch.cat([groups[:, :place], groups[:, place + 1 :]], dim=1)
    last_kept = importance[:, others].topk(kept, dim=2).values[..., -1].T  # T: [group, out]
    moved = importance[:, movable].T
    distance = torch.cdist(moved[None], last_kept[None], p=1)[0]
    inputs, of_group = linear_sum_assignment(distance.double().cpu().numpy(), maximize=True)
    dealt = torch.as_tensor(inputs[of_group.argsort()], device=order.device)
    groups[:, place] = movable[dealt]
    return groups.flatten()
