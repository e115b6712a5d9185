"""BaCon's loss from its definition, one class and one row at a time: shares no code with the package."""

import torch
import torch.nn.functional as F


def temperatures(counts, progress, temperature=0.1, bta=0.005, min_temperature=0.0):
    top = max(float(counts.max()), 1.0)
    return [
        max(temperature * (1 - bta * (1 - progress) ** 2 * (float(c) / top) ** 0.5), min_temperature) for c in counts
    ]


def bacon_loss(
    features,
    labels,
    logits,
    centers,
    reliable,
    counts,
    progress,
    temperature=0.1,
    bta=0.005,
    negative_weight=64.0,
    top_k=3,
    neg_mode="authors",
    has_center=None,
    min_temperature=0.0,
):
    """A loop over classes and their anchors in probability space, with torch's own cosine similarity."""
    batch, rows, num_classes = len(labels), len(features), len(centers)
    tau = temperatures(counts, progress, temperature, bta, min_temperature)
    candidates = [{int(y)} for y in labels]  # the classes a row may be of
    classes = [int(y) for y in labels]
    for j in range(rows - batch):
        order = logits[j].sort(descending=True).indices[: min(top_k, num_classes)].tolist()
        candidates.append(set(order))
        classes.append(order[0])
    total = features.new_zeros(())
    for c in range(num_classes):
        anchors = [r for r in range(rows) if classes[r] == c]
        negatives = [j for j in range(rows) if c not in candidates[j]]
        chosen = [r for r in anchors if reliable[r]]
        if not chosen or not negatives or (has_center is not None and not has_center[c]):
            continue
        similarity = {}
        for r in anchors if neg_mode == "authors" else chosen:
            similarity[r] = torch.stack([F.cosine_similarity(features[r], features[j], dim=0) for j in negatives])
        exps = {r: (s / temperature).exp() for r, s in similarity.items()}
        shared = torch.stack(list(exps.values())).mean()
        for r in chosen:
            mean = shared if neg_mode == "authors" else exps[r].mean()
            weight = len(negatives) if negative_weight is None else negative_weight
            positive = (F.cosine_similarity(features[r], centers[c], dim=0) / tau[c]).exp()
            total = total - (positive / (positive + weight * mean + 1e-8)).log()
    return total / max(int(reliable.sum()), 1)


def random_batch(batch=7, unlabeled=14, num_classes=5, dim=6, seed=0, select=0.6):
    """Float64 arguments of the loss, in order; every class may occur, many do."""
    g = torch.Generator().manual_seed(seed)
    rows = batch + unlabeled
    return [
        torch.randn(rows, dim, generator=g, dtype=torch.float64),
        torch.randint(num_classes, (batch,), generator=g),
        torch.randn(unlabeled, num_classes, generator=g, dtype=torch.float64),
        torch.randn(num_classes, dim, generator=g, dtype=torch.float64),
        torch.rand(rows, generator=g) < select,
        torch.randint(1, 1000, (num_classes,), generator=g).double(),
    ]
