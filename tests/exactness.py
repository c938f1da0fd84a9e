"""Compare numbers with those of other code, and keep the largest difference of each kind for a table.

`make exactness` runs the tests that use it and prints the table of docs/published.md.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(order=True)
class Largest:
    """The largest difference so far, and the largest magnitude of the expected numbers."""

    difference: float = 0.0
    magnitude: float = 0.0


FOUND: dict[tuple[str, str], Largest] = {}


def assert_close(ours: Tensor, theirs: Tensor, *, of: str, what: str, atol: float, rtol: float = 0.0) -> None:
    """Assert that all numbers agree, and keep the largest difference.

    Args:
        ours, theirs: tensors of one shape.
        of: family of the model.
        what: what is compared.
        atol, rtol: largest difference that is accepted: atol + rtol * |theirs|.
    """
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    if not ours.numel():
        return
    largest = FOUND.setdefault((of, what), Largest())
    differences, sizes = (ours.double() - theirs.double()).abs(), theirs.double().abs()
    largest.difference = max(largest.difference, float(differences.max()))
    largest.magnitude = max(largest.magnitude, float(sizes.max()))
    assert (differences <= atol + rtol * sizes).all(), f"{what} of {of} differ by up to {float(differences.max())}"


def assert_equal(ours: object, theirs: object, *, of: str, what: str) -> None:
    """Assert that two lists of numbers are equal, and keep that they were compared."""
    assert ours == theirs, f"{what} of {of}"
    FOUND.setdefault((of, what), Largest())


def exactness_table() -> list[str]:
    """Return the lines of a Markdown table of all comparisons so far, by family."""
    rows = ["| family | compared | up to | largest difference |", "|---|---|---:|---:|"]
    for family in sorted({of for of, _ in FOUND}):
        compared = sorted((what, largest) for (of, what), largest in FOUND.items() if of == family)
        exact = ", ".join(what for what, largest in compared if not largest.magnitude)
        rows += [f"| {family} | {exact} | | 0 |"] if exact else []
        for what, largest in compared:
            if largest.magnitude:
                difference = f"{largest.difference:.1e}" if largest.difference else "0"
                rows.append(f"| {family} | {what} | {largest.magnitude:.2g} | {difference} |")
    return rows
