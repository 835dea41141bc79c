"""Evaluation metrics as pure functions: retrieval, k-NN, probes, geometry of embeddings, hard negatives, PSNR, ridge.

Letters: Q queries, G gallery rows, N rows, D width, C classes, R query rows of one chunk, k neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CELLS = 1 << 24  # scores computed at once: 64 MB of float32, so a gallery of 100,000 rows needs no N x N memory


def retrieval_ranks(z_q_QD: Tensor, key_Q: Tensor, z_g_GD: Tensor, key_G: Tensor, cells: int = CELLS) -> Tensor:
    """Count the wrong gallery rows ranked before a query's best match; a match is a row of equal key.

        rank_q = #{g : key_g != key_q and not z_q . z_g < best_q}
        best_q = max over key_g = key_q of z_q . z_g

    Ties count against the query, so that a collapsed model has no hits. So does nan as the score of a wrong row; if all
    matches have nan, the rank is ``G``. hit@k is ``rank < k``.

    Shapes: ``z_q_QD, key_Q, z_g_GD, key_G -> rank_Q`` int64, 0 at best, -1 without a match in the gallery.

    >>> z_q_QD = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> z_g_GD = torch.tensor([[0.9, 0.1], [1.0, 0.0], [1.0, 0.2]])
    >>> retrieval_ranks(z_q_QD, torch.tensor([0, 9]), z_g_GD, torch.tensor([0, 1, 2])).tolist()
    [2, -1]
    """
    if len(z_q_QD) == 0 or len(z_g_GD) == 0:
        return torch.full_like(key_Q, -1)
    ranks = []
    for rows in _chunks(len(z_q_QD), len(z_g_GD), cells):
        score_RG = z_q_QD[rows] @ z_g_GD.T
        match_RG = key_Q[rows, None] == key_G
        best_R = score_RG.masked_fill(~match_RG | score_RG.isnan(), -torch.inf).amax(1)
        rank_R = (~match_RG & ~(score_RG < best_R[:, None])).sum(1)
        rank_R = rank_R.masked_fill(best_R == -torch.inf, len(z_g_GD))
        ranks.append(rank_R.masked_fill(~match_RG.any(1), -1))
    return torch.cat(ranks)


def recall_by_chance(matches_Q: Tensor, gallery: int, k: int) -> Tensor:
    """Compute, for each query, the expected recall at k if the gallery is in random order.

        p_q = 1 - C(G - m_q, k) / C(G, k),   m_q: matches among the G rows of the gallery

    Shapes: ``matches_Q`` whole numbers, 1 to G -> float64 ``[Q]``.

    >>> recall_by_chance(torch.tensor([1, 2]), gallery=4, k=1).tolist()
    [0.25, 0.5]
    """
    miss_Q = torch.ones_like(matches_Q, dtype=torch.float64)
    for taken in range(min(k, gallery)):
        miss_Q = miss_Q * ((gallery - matches_Q - taken).clamp(min=0) / (gallery - taken))
    return 1 - miss_Q


def average_precision(
    z_q_QD: Tensor,
    label_Q: Tensor,
    z_g_GD: Tensor,
    label_G: Tensor,
    id_Q: Tensor | None = None,
    id_G: Tensor | None = None,
    cells: int = CELLS,
) -> Tensor:
    """Compute the average precision of each query; a match is a row of equal label.

        AP_q = 1 / |matches_q|  sum over matches g of  #{matches up to rank g} / rank g

    Ties count against the query (a wrong row ranks before a match of the same score), and so does nan. A gallery row
    with the ``id`` of the query is excluded. (RetrievalMAP of torchmetrics 1.9 ignores matches with a score of 0 or
    below, which embeddings do have.)

    Shapes: ``z_q_QD, label_Q, z_g_GD, label_G``, ids int64 ``-> [Q]`` float64 (float32 if the device lacks float64);
    nan for a query without a match.

    >>> z_GD = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]])
    >>> label_G, id_G = torch.tensor([0, 1, 0, 0]), torch.arange(4)
    >>> round(float(average_precision(z_GD[:1], label_G[:1], z_GD, label_G, id_G[:1], id_G)), 4)  # (1/2 + 2/3) / 2
    0.5833
    """
    dtype = wide(z_q_QD.device)
    rank_G = torch.arange(1, len(z_g_GD) + 1, device=z_q_QD.device, dtype=dtype)
    precision = [rank_G[:0]]
    for rows in _chunks(len(z_q_QD), len(z_g_GD), cells):
        match_RG, self_RG = _matches(rows, label_Q, label_G, id_Q, id_G)
        score_RG = z_q_QD[rows] @ z_g_GD.T
        score_RG = score_RG.masked_fill(score_RG.isnan() & ~match_RG, torch.inf)
        score_RG = score_RG.masked_fill(score_RG.isnan() | self_RG, -torch.inf)
        # among equal scores, wrong rows come first, then matches; the query itself comes last
        order_RG = (match_RG.int() + 2 * self_RG.int()).argsort(dim=1, stable=True)
        order_RG = order_RG.gather(1, score_RG.gather(1, order_RG).argsort(dim=1, stable=True, descending=True))
        hit_RG = match_RG.gather(1, order_RG).to(dtype)
        count_R = hit_RG.sum(dim=1)
        precision.append((hit_RG * hit_RG.cumsum(dim=1) / rank_G).sum(dim=1) / count_R)  # 0 / 0 is nan
    return torch.cat(precision)


def chance_average_precision(
    label_Q: Tensor, label_G: Tensor, id_Q: Tensor | None = None, id_G: Tensor | None = None, cells: int = CELLS
) -> Tensor:
    """Compute the expected mean of :func:`average_precision` for these labels in random order.

        E AP = (H_G + (R - 1) / (G - 1) (G - H_G)) / G,   H_G = 1 + 1/2 + ... + 1/G,   R matches among G

    Shapes: as there, ``-> []`` float64 (float32 if the device lacks float64).

    >>> round(float(chance_average_precision(torch.tensor([0]), torch.tensor([0, 1]))), 4)  # rank 1 or rank 2
    0.75
    """
    dtype = wide(label_Q.device)
    h_G = (1 / torch.arange(1, len(label_G) + 1, device=label_Q.device, dtype=dtype)).cumsum(dim=0)
    chances = [h_G[:0]]
    for rows in _chunks(len(label_Q), len(label_G), cells):
        match_RG, self_RG = _matches(rows, label_Q, label_G, id_Q, id_G)
        count_R, size_R = match_RG.sum(dim=1), (~self_RG).sum(dim=1)
        count_R, size_R = count_R[count_R > 0], size_R[count_R > 0]
        h_R = h_G[size_R - 1]
        chances.append((h_R + (count_R - 1) / (size_R - 1).clamp(min=1) * (size_R - h_R)) / size_R)
    return torch.cat(chances).mean()


def _matches(
    rows: slice, label_Q: Tensor, label_G: Tensor, id_Q: Tensor | None, id_G: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return two bool ``[R, G]``: some queries' matches without the queries themselves, and the queries' own places."""
    match_RG = label_Q[rows, None] == label_G
    self_RG = torch.zeros_like(match_RG) if id_Q is None or id_G is None else id_Q[rows, None] == id_G
    return match_RG & ~self_RG, self_RG


def knn_scores(
    z_QD: Tensor, z_bank_ND: Tensor, label_N: Tensor, classes: int, k: int, temperature: float, cells: int = CELLS
) -> Tensor:
    """Compute class scores of weighted k-NN (instance discrimination, Wu et al. 2018, arXiv 1805.01978; DINO).

        score_c = sum over the k nearest n with label_n = c of exp(z . z_n / temperature)

    Shapes: ``z_QD, z_bank_ND, label_N -> score_QC``; ``k`` is at most the bank's size. Scores are relative to the
    nearest neighbour's, ``exp((s - s_1) / temperature)``, which changes no order and cannot overflow.

    >>> bank_ND, label_N = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    >>> score_QC = knn_scores(torch.tensor([[1.0, 0.0]]), bank_ND, label_N, classes=2, k=2, temperature=0.2)
    >>> score_QC.round(decimals=3)
    tensor([[1.0000, 0.3680]])
    """
    scores = [z_QD.new_zeros(0, classes)]
    for rows in _chunks(len(z_QD), len(z_bank_ND), cells):
        z_RD = z_QD[rows]
        near_Rk, place_Rk = (z_RD @ z_bank_ND.T).topk(min(k, len(z_bank_ND)), dim=1)
        weight_Rk = ((near_Rk - near_Rk[:, :1]) / temperature).exp()
        scores.append(z_RD.new_zeros(len(z_RD), classes).scatter_add_(1, label_N[place_Rk], weight_Rk))
    return torch.cat(scores)


def fit_logistic(x_ND: Tensor, y_N: Tensor, classes: int, l2: float = 1e-3, steps: int = 200) -> tuple[Tensor, Tensor]:
    """Fit multinomial logistic regression by L-BFGS, in the precision of ``x``, without a penalty on the biases.

        W, b = argmin  mean_n cross_entropy(W x_n + b, y_n) + l2 / 2 * ||W||^2

    Shapes: ``x_ND, y_N -> W_CD, b_C``. It also runs under ``no_grad`` and ``inference_mode``.

    >>> x_ND, y_N = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
    >>> w_CD, b_C = fit_logistic(x_ND, y_N, classes=2)
    >>> (x_ND @ w_CD.T + b_C).argmax(1).tolist()
    [0, 0, 1, 1]
    """
    with torch.inference_mode(False), torch.enable_grad():
        # inference tensors have no autograd; their clones do
        x_ND, y_N = x_ND.detach().clone(), y_N.detach().clone()
        w_CD = x_ND.new_zeros(classes, x_ND.shape[1], requires_grad=True)
        b_C = x_ND.new_zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([w_CD, b_C], max_iter=steps, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x_ND @ w_CD.T + b_C, y_N) + l2 / 2 * w_CD.square().sum()
            torch.autograd.backward(loss)
            return loss

        optimizer.step(closure)
    return w_CD.detach(), b_C.detach()


def balanced_accuracy(predicted_N: Tensor, label_N: Tensor, classes: int) -> Tensor:
    """Compute the mean recall of the classes that occur; nan without rows.

    A class that is predicted but does not occur has no recall and is left out (torchmetrics' macro average counts it
    as 0, so that the result would depend on the classes missing in a small set).

    Shapes: ``predicted_N, label_N`` int64 ``-> []``.

    >>> float(balanced_accuracy(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1]), classes=4))
    0.75
    """
    count_C = label_N.bincount(minlength=classes)
    correct_C = label_N[predicted_N == label_N].bincount(minlength=classes)
    return (correct_C / count_C)[count_C > 0].mean()


def swap_hits(score_N: Tensor, score_neg_N: Tensor, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Compare each positive with its hard negative: ``[s > s'] + [s ~ s'] / 2``, float64 ``[N]``, and whether they tie.

    Scores within ``tolerance`` are ties; nan is a miss and not a tie. Chance is 1/2, which a model that scores both the
    same gets exactly. For the mean by type of negative see :func:`descant.modules.evaluation.items.per_group`.

    >>> hit_N, tie_N = swap_hits(torch.tensor([0.9, 0.5]), torch.tensor([0.1, 0.5]))
    >>> hit_N.tolist(), tie_N.tolist()
    ([1.0, 0.5], [False, True])
    """
    tie_N = (score_N - score_neg_N).abs() <= tolerance
    return ((score_N > score_neg_N) & ~tie_N).double() + tie_N.double() / 2, tie_N


def psnr(mse: Tensor, span: Tensor) -> Tensor:
    """Compute peak signal-to-noise ratio in dB, ``10 log10(span^2 / mse)``; span: the largest number minus the least.

    >>> round(float(psnr(torch.tensor(0.01), torch.tensor(2.0))), 2)
    26.02
    """
    return 10 * (span.square() / mse).log10()


def ridge_weights(moments_RR: Tensor, features: int, l2: float) -> Tensor:
    """Fit ridge regression from moments that add up over batches and ranks, with an unpenalized intercept.

        W, b = argmin  mean_n ||y_n - W x_n - b||^2 + l2 v ||W||^2,   v: the mean variance of the features

    Directions in which the features do not vary have weight 0.

    Args:
        moments_RR: ``sum_n z_n z_n'`` of ``z = [1, x, y]``, float64.
        features: P, the width of x; the rest, Q, is the width of y.
        l2: strength of the penalty.

    Shapes: ``[1 + P + Q, 1 + P + Q] -> [1 + P, Q]``, b in the first row; nan if the moments are not finite.

    >>> z_N3 = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 3.0], [1.0, 2.0, 5.0]], dtype=torch.float64)  # y = 1 + 2 x
    >>> ridge_weights(z_N3.T @ z_N3, features=1, l2=0.0).flatten().round(decimals=6).tolist()
    [1.0, 2.0]
    """
    if not bool(moments_RR.isfinite().all()):
        return moments_RR.new_full((1 + features, len(moments_RR) - 1 - features), torch.nan)
    mean_R = moments_RR[0] / moments_RR[0, 0].clamp(min=1)
    cov_RR = moments_RR / moments_RR[0, 0].clamp(min=1) - mean_R[:, None] * mean_R
    x, y = slice(1, 1 + features), slice(1 + features, None)
    value_P, vector_PP = torch.linalg.eigh(cov_RR[x, x])
    varies_P = value_P > 1e-10 * value_P.amax().clamp(min=1e-300)
    strength_P = torch.where(varies_P, value_P + l2 * value_P.clamp(min=0).mean(), 1.0)
    w_PQ = vector_PP @ (vector_PP.T @ cov_RR[x, y] * (varies_P / strength_P)[:, None])
    return torch.cat([(mean_R[y] - mean_R[x] @ w_PQ)[None], w_PQ])


def matched_rows(present_a_N: Tensor, present_b_N: Tensor, key_N: Tensor) -> tuple[Tensor, Tensor]:
    """Find the P positive pairs of two modalities: a row with itself, or else with the first row of its key that has b.

    Shapes: bool ``[N]``, bool ``[N]``, ``key_N`` -> row numbers, two int64 ``[P]``, the first ascending.

    >>> present_a_N, present_b_N = torch.tensor([[True, True, True, False], [True, False, False, True]])
    >>> rows_a_P, rows_b_P = matched_rows(present_a_N, present_b_N, key_N=torch.tensor([7, 7, 8, 9]))
    >>> rows_a_P.tolist(), rows_b_P.tolist()
    ([0, 1], [0, 0])
    """
    rows_a, rows_b = present_a_N.nonzero().squeeze(1), present_b_N.nonzero().squeeze(1)
    if len(rows_a) == 0 or len(rows_b) == 0:
        return rows_a[:0], rows_b[:0]
    sorted_b, order_b = key_N[rows_b].sort(stable=True)
    place = torch.searchsorted(sorted_b, key_N[rows_a]).clamp(max=len(rows_b) - 1)
    partner = torch.where(present_b_N[rows_a], rows_a, rows_b[order_b[place]])
    matched = key_N[partner] == key_N[rows_a]
    return rows_a[matched], partner[matched]


def modality_gap(z_a_ND: Tensor, z_b_ND: Tensor) -> Tensor:
    """Compute the modality gap ``|| mean z_a - mean z_b ||`` over pairs (Liang et al. 2022, arXiv 2203.02053).

    Shapes: ``z_a_ND, z_b_ND -> []``.

    >>> float(modality_gap(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[-1.0, 0.0], [0.0, 1.0]])))
    1.0
    """
    return (z_a_ND.mean(0) - z_b_ND.mean(0)).norm()


def effective_rank(z_ND: Tensor) -> Tensor:
    """Compute the effective rank, ``exp(entropy(s / sum s))`` of the singular values s.

    This is RankMe (Garrido et al. 2023, arXiv 2210.02885). It lies between 1 (all rows on a line) and ``min(N, D)``; it
    is 0 if all rows are zero. It is computed from the smaller Gram matrix in float64, so that 100,000 rows cost one
    matrix product.

    Shapes: ``z_ND -> []`` float64 (float32 if the device lacks float64).

    >>> round(float(effective_rank(torch.eye(4))), 3), round(float(effective_rank(torch.ones(8, 4))), 3)
    (4.0, 1.0)
    """
    x_ND = z_ND.to(wide(z_ND.device))
    if not bool(x_ND.isfinite().all()):
        return x_ND.new_tensor(torch.nan)  # the eigenvalue solver would raise and end the run
    gram = x_ND.T @ x_ND if x_ND.shape[0] >= x_ND.shape[1] else x_ND @ x_ND.T
    value = torch.linalg.eigvalsh(gram)
    # square roots would turn the rounding errors of the product into rank
    noise = len(value) * torch.finfo(value.dtype).eps * value.amax()
    s = value.where(value > noise, torch.zeros_like(value)).sqrt()
    if not bool(s.sum() > 0):
        return s.sum()
    p = s / s.sum()
    return torch.special.entr(p).sum().exp()


def feature_std(z_ND: Tensor) -> Tensor:
    """Average the features' standard deviations over rows; 0 if collapsed (Chen & He 2020, arXiv 2011.10566).

    It is ``1 / sqrt(D)`` for unit-length rows that are spread evenly over all directions.

    Shapes: ``z_ND -> []``.

    >>> float(feature_std(torch.tensor([[1.0, 2.0], [-1.0, 2.0]])))
    0.5
    """
    return z_ND.std(dim=0, correction=0).mean()


def alignment(z_a_ND: Tensor, z_b_ND: Tensor) -> Tensor:
    """Compute the alignment ``mean ||z_a - z_b||^2`` over positive pairs (Wang & Isola 2020, arXiv 2005.10242).

    0 is best.

    Shapes: ``z_a_ND, z_b_ND -> []``.

    >>> float(alignment(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])))
    1.0
    """
    return (z_a_ND - z_b_ND).square().sum(1).mean()


def uniformity(z_ND: Tensor, t: float = 2.0, cells: int = CELLS) -> Tensor:
    """Compute uniformity, ``log mean over pairs n != m of exp(-t ||z_n - z_m||^2)`` (Wang & Isola 2020).

    A collapsed model has 0.

    Shapes: unit-length ``z_ND -> []``; nan with fewer than two rows.

    >>> round(float(uniformity(torch.eye(2))), 4), float(uniformity(torch.ones(3, 1)))
    (-4.0, 0.0)
    """
    n = len(z_ND)
    total = z_ND.new_zeros((), dtype=wide(z_ND.device))
    for rows in _chunks(n, n, cells):
        z_RD = z_ND[rows]
        square_RN = (z_RD.square().sum(1)[:, None] + z_ND.square().sum(1) - 2 * z_RD @ z_ND.T).clamp(min=0)
        total += (-t * square_RN).exp().sum(dtype=total.dtype)
    return ((total - n) / (n * (n - 1)) if n > 1 else total * torch.nan).log()


def _chunks(rows: int, columns: int, cells: int) -> list[slice]:
    size = max(cells // max(columns, 1), 1)
    return [slice(first, first + size) for first in range(0, rows, size)]


def wide(device: torch.device) -> torch.dtype:
    """Return float64, or float32 if the device lacks float64."""
    return torch.float32 if device.type == "mps" else torch.float64
