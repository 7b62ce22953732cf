"""SparseVLM, VScan and MustDrop as slow loops, written from the papers."""

from __future__ import annotations

import math

import numpy as np
from zoo_llm_scenes import Scene


def slow_raters(image: np.ndarray, text: np.ndarray) -> list[int]:
    weights = np.zeros(len(text))
    for row in image:
        scores = [float(row @ token) for token in text]
        shares = [math.exp(score - max(scores)) for score in scores]
        weights += [share / sum(shares) / len(image) for share in shares]
    return [t for t in range(len(text)) if weights[t] > weights.mean()]


def slow_clusters(states: np.ndarray, count: int) -> list[np.ndarray]:
    """Sums of the clusters, in the order of their centres; of equal densities the first counts as larger."""
    n = len(states)
    gap = [[math.dist(a, b) / math.sqrt(states.shape[1]) for b in states] for a in states]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in gap]
    rank = sorted(range(n), key=lambda i: (-density[i], i))
    stands_out = []
    for i in range(n):
        denser = rank[: rank.index(i)]
        stands_out.append(density[i] * (min(gap[i][j] for j in denser) if denser else max(map(max, gap))))
    centres = sorted(range(n), key=lambda i: (-stands_out[i], i))[:count]
    members = [[i] for i in centres]
    for i in set(range(n)) - set(centres):
        members[min(range(count), key=lambda c: gap[i][centres[c]])].append(i)
    return [states[group].sum(0) / (len(group) + 1e-6) for group in members]


def slow_vscan(scene: Scene, keep: int) -> set[int]:
    tokens = scene.tokens()
    local, far = (tokens.vision.cls_attention[layer].mean(0).tolist() for layer in (5, -2))
    walk = sorted(range(scene.n_visual), key=lambda i: (-local[i], i))
    chosen: list[int] = []
    if (scene.rows, scene.cols) == (24, 24):
        for down in range(4):
            for across in range(4):
                inside = [i for i in walk if i // 24 // 6 == down and i % 24 // 6 == across]
                chosen += inside[: keep // 2 // 16]
    else:
        down, across = max(1, scene.rows // 4), max(1, scene.cols // 4)
        taken = [0] * (down * across)
        for i in walk:
            window = min(i // scene.cols // 4, down - 1) * across + min(i % scene.cols // 4, across - 1)
            if taken[window] < math.ceil(keep // 2 / (down * across)) and len(chosen) < keep // 2:
                chosen.append(i)
                taken[window] += 1
    rest = [i for i in sorted(range(scene.n_visual), key=lambda i: (-far[i], i)) if i not in chosen]
    return {*chosen, *rest[: keep - len(chosen)]}


def slow_inside(states: np.ndarray, grid: tuple[int, int], threshold: float) -> list[list[int]]:
    rows, cols = grid
    units = states / np.linalg.norm(states, axis=-1, keepdims=True)
    corners = [(r, c) for r in range(0, rows - rows % 3, 3) for c in range(0, cols - cols % 3, 3)]
    members = [[(r + i) * cols + c + j for i in range(3) for j in range(3)] for r, c in corners]
    alike = [[np.mean([view[a] @ view[b] for a in m for b in m if a != b]) for m in members] for view in units]
    count = min(sum(one >= threshold for one in view) for view in alike)
    groups = []
    for view in alike:
        best = sorted(range(len(members)), key=lambda w: (-view[w], w))[:count]
        number = {patch: i for i, w in enumerate(best) for patch in members[w]}
        rest = [patch for patch in range(rows * cols) if patch not in number]
        groups.append([number.get(patch, count + rest.index(patch) if patch in rest else -1) for patch in range(rows * cols)])
    return groups
