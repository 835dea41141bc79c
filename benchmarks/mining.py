"""Cost of mining hard negatives: memory, and time beside the matrix product alone.

Letters: Q queries, N targets, D width, K results.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from benchmarks import Row
from benchmarks.selection import peak_gigabytes
from descant.modules.selection.mining import BLOCK, top_k_in_blocks

TARGETS, WIDTH, K, BELOW = 1_000_000, 256, 64, 0.3
#: Queries of one measurement, and number of measurements.
QUERIES, ROUNDS = 1024, 6


def mining(targets: int = TARGETS, rounds: int = ROUNDS) -> Iterator[Row]:
    """Find the top 64 of a million unit embeddings of width 256, with contents left out and a threshold.

    Each measurement is compared with the product of the same number of blocks of equal shape, which keeps no score. The
    memory includes embeddings, blocks and the results of all targets as queries.
    """
    before = peak_gigabytes()
    g = torch.Generator().manual_seed(0)
    target_ND = torch.empty(targets, WIDTH)
    for part_MD in target_ND.split(BLOCK[1]):
        part_MD.copy_(torch.nn.functional.normalize(torch.randn(part_MD.shape, generator=g), dim=1))
    content_N = torch.randint(targets // 4, (targets,), generator=g)
    product_QM = torch.empty(BLOCK)
    times = []
    for number in range(rounds):
        query_QD, content_Q = (x[number * QUERIES : (number + 1) * QUERIES] for x in (target_ND, content_N))
        began = time.perf_counter()
        for rows_QD in query_QD.split(BLOCK[0]):
            for part_MD in target_ND.split(BLOCK[1]):
                torch.mm(rows_QD, part_MD.T, out=product_QM[:, : len(part_MD)])
        product = time.perf_counter() - began
        began = time.perf_counter()
        found = top_k_in_blocks(query_QD, target_ND, K, (content_Q, content_N), BELOW)
        times.append((product, time.perf_counter() - began))
        assert bool((found.index_QK >= 0).all())
    results = targets * K * (4 + 8) / 1e9
    yield Row.at_most("mining/memory_gigabytes", peak_gigabytes() - before + results, 2.0)
    product, mined = (sum(column) for column in zip(*times, strict=True))
    yield Row.at_least("mining/share_of_matmul_peak", product / mined, 0.5)
