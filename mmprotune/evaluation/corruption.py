"""Mean corruption error."""
from __future__ import annotations

from collections.abc import Mapping


def mean_corruption_error(
        errors: Mapping[str, Mapping[int, float]],
        reference: Mapping[str, Mapping[int, float]] | None = None) -> tuple[float, dict]:
    r"""Mean over corruptions of the error summed over severities.

    Hendrycks and Dietterich, https://arxiv.org/abs/1903.12261, with a reference model r:

    .. math:: CE_c = \sum_s E_{s,c} \Big/ \sum_s E^r_{s,c}, \qquad mCE = \frac 1 C \sum_c CE_c

    Args:
        errors (Mapping): Error in percent by corruption and severity, e.g. ``{'fog': {3: 41.5}}``.
        reference (Mapping, optional): The errors of a reference model. Defaults to None: the mean
            of the errors themselves, which some call unnormalised mCE.

    Returns:
        tuple[float, dict]: The mCE and the CE of each corruption, in percent.

    Raises:
        ValueError: ``errors`` is empty, corruptions differ in their severities, or the reference
            lacks a corruption or severity, or has no errors there.
    """
    if not errors or not all(errors.values()):
        raise ValueError('no errors to take the mean of')
    severities = {name: sorted(by) for name, by in errors.items()}
    if len({tuple(s) for s in severities.values()}) > 1:
        raise ValueError(f'corruptions were measured at different severities: {severities}')
    result = {}
    for name, by_severity in errors.items():
        total = sum(by_severity.values())
        if reference is None:
            result[name] = total / len(by_severity)
            continue
        try:
            base = sum(reference[name][severity] for severity in by_severity)
        except KeyError as error:
            raise ValueError(f'the reference has no error for {name} at the severities '
                             f'{list(by_severity)}: {error} is missing') from error
        if base <= 0:
            raise ValueError(f'the reference makes no errors on {name}: nothing to divide by')
        result[name] = 100 * total / base
    return sum(result.values()) / len(result), result
