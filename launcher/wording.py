"""Figures as people read them."""

import re
from collections.abc import Mapping

KINDS = ("embedding", "hidden", "cosine", "attention", "relation", "prediction", "logits", "labels")


def by_kind(figures: Mapping[str, float], prefix: str) -> str:
    """Return ``embedding 0.12 hidden 0.34 attention 0.56``: the mean over layers of every kind of loss.

    On several corpora their totals follow: ``; wiki 1.23 books 1.45``.
    """
    parts = []
    for kind in KINDS:
        values = [value for key, value in figures.items() if key.removeprefix(prefix).split("/")[0] == kind]
        if values:
            parts.append(f"{kind} {sum(values) / len(values):.4f}")
    of_corpus = re.compile(rf"{prefix}corpus/(.+)/total")
    named = [(found[1], value) for key, value in figures.items() if (found := of_corpus.fullmatch(key))]
    corpora = " ".join(f"{name} {value:.4f}" for name, value in named)
    return " ".join(parts) + (f"; {corpora}" if corpora else "")


def in_words(scores: Mapping[str, float]) -> str:
    """Return ``accuracy 0.9124, f1 0.9321``."""
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def duration(seconds: float) -> str:
    """Return seconds as ``2d03h``, ``3h07m``, ``4m05s`` or ``6s``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s" if minutes else f"{s}s"
