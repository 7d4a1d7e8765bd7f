"""Layer maps: which teacher layer each student layer learns from.

Layers are 1-based. For a student of M layers and a teacher of N layers a map is (g(1), ..., g(M)) with
1 <= g(m) <= N. The embeddings are layer 0 of both and always map to each other, g(0) = 0.
Source: Jiao et al. 2019, arXiv:1909.10351, sections 3.1 and 4.4.
"""

from collections.abc import Sequence


def resolve(spec: str | Sequence[int], student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """(g(1), ..., g(M)) for M = ``student_layers`` and N = ``teacher_layers``.

    ``uniform``: g(m) = m N / M. ``last``: g(m) = N - M + m. ``skip``: g(m) = 2 m - 1. A sequence of M
    integers is taken as it is; it must not decrease and must stay within 1..N.

    Raises ValueError when the map does not exist for these depths, or when the sequence breaks a rule.
    """
    depths = f"student layers M={student_layers}, teacher layers N={teacher_layers}"
    if student_layers < 1 or teacher_layers < 1:
        raise ValueError(f"a layer map needs at least one layer on both sides; got {depths}")
    layers = range(1, student_layers + 1)
    if spec == "uniform":
        if teacher_layers % student_layers:
            raise ValueError(_no_uniform_map(depths, student_layers, teacher_layers))
        return tuple(m * (teacher_layers // student_layers) for m in layers)
    if spec == "last":
        if student_layers > teacher_layers:
            raise ValueError(f"layer_map=last needs M <= N; got {depths}: give an explicit list instead")
        return tuple(teacher_layers - student_layers + m for m in layers)
    if spec == "skip":
        if 2 * student_layers - 1 > teacher_layers:
            raise ValueError(
                f"layer_map=skip needs 2 M - 1 <= N; got {depths}: use at most {(teacher_layers + 1) // 2} "
                "student layers, or give an explicit list"
            )
        return tuple(2 * m - 1 for m in layers)
    if isinstance(spec, str):
        raise ValueError(f"layer_map={spec!r} is none of uniform, last, skip, nor a list of teacher layers")
    return _explicit(tuple(spec), student_layers, teacher_layers)


def _explicit(layer_map: tuple[int, ...], student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    shown = f"layer_map={list(layer_map)}"
    if not all(type(g) is int for g in layer_map):
        raise ValueError(f"{shown} must hold integers only: one teacher layer per student layer")
    if len(layer_map) != student_layers:
        raise ValueError(
            f"{shown} has {len(layer_map)} entries, but the student has {student_layers} layers: "
            "give one per layer"
        )
    if outside := [g for g in layer_map if not 1 <= g <= teacher_layers]:
        raise ValueError(f"{shown} names teacher layers {outside}, but they run from 1 to {teacher_layers}")
    if list(layer_map) != sorted(layer_map):
        raise ValueError(
            f"{shown} decreases; a later student layer never learns from an earlier teacher layer"
        )
    return layer_map


def _no_uniform_map(depths: str, student_layers: int, teacher_layers: int) -> str:
    divisors = [d for d in range(1, teacher_layers + 1) if teacher_layers % d == 0]
    below = [d for d in divisors if d < student_layers][-1:]
    above = [d for d in divisors if d > student_layers][:1]
    spread = [max(1, round(m * teacher_layers / student_layers)) for m in range(1, student_layers + 1)]
    return (
        f"layer_map=uniform needs N to be a multiple of M; got {depths}. Nearest depths that fit: "
        f"{', '.join(map(str, below + above))}; or give an explicit list such as {spread}"
    )
