"""A posterior in words and numbers, for a terminal or a notebook."""

import html
import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .diagnostics import Diagnosis, diagnose
from .evidence import Evidence

if TYPE_CHECKING:
    from .posterior import Posterior

SHOWN = 8  # elements of a site that get a row each; larger sites are summarised
HEADER = ("site", "mean", "sd", "error of mean")
Row = tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """What came out, and whether it can be trusted: ``print`` it, or show it in a notebook.

    Attributes:
        title: the method and the size of its run.
        facts: labels and sentences on evidence, weights and verdict.
        rows: per site (or element of a small one): its name, mean, standard deviation, and the
            Monte Carlo error of the mean; of whole numbers, such as classes and tokens, the most
            probable values.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        label = max(len(name) for name, _ in self.facts)
        lines = [self.title, ""]
        lines += [f"{name:<{label}}  {text}".rstrip() for name, text in self.facts]
        table = [HEADER, *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(HEADER))]
        lines += ["", *(_line(row, widths) for row in table)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        facts = "".join(
            _html_row((f"<b>{html.escape(n)}</b>", html.escape(t))) for n, t in self.facts
        )
        cells = "".join(_html_row([html.escape(cell) for cell in row]) for row in self.rows)
        header = _html_row([f"<b>{name}</b>" for name in HEADER])
        return (
            f"<p><b>{html.escape(self.title)}</b></p><table>{facts}</table>"
            f"<table>{header}{cells}</table>"
        )


def summarise(posterior: "Posterior") -> Summary:
    """The table behind ``Posterior.summary()``."""
    *problems, runs, size = posterior.particles.axes
    prefix = f"{problems[0]} problems, " if problems else ""
    steps = max(len(posterior.history) - 1, 0)
    title = (
        f"{posterior.method}: {prefix}{_count(runs, 'run')} of {_count(size, 'particle')}, "
        f"{_count(steps, 'step')}, {_count(posterior.num_network_calls, 'network call')}"
    )
    if posterior.num_gradient_calls:
        title += f", {_count(posterior.num_gradient_calls, 'gradient call')}"
    diagnosis = diagnose(posterior)
    facts = [("log evidence", text) for text in _evidence(posterior)]
    if _unweighed(posterior):
        facts.append(("note", "nothing is observed, and no factor weighs: this is the prior"))
    facts += [("weights", _weights(diagnosis))] if diagnosis.weighted else []
    facts += _verdict(diagnosis)
    rows = [row for site in posterior.samples for row in _rows(posterior, site)]
    return Summary(title, tuple(_label_once(facts)), tuple(rows))


def _unweighed(posterior: "Posterior") -> bool:
    """Whether the program weighs nothing (perhaps an ``obs=`` was forgotten)."""
    sites = None if posterior.program is None else posterior.program.likelihoods.values()
    return sites is not None and not {site.kind for site in sites} & {"observed", "factor"}


def _evidence(posterior: "Posterior") -> list[str]:
    if not posterior.particles.weighted:
        return [f"none: {posterior.method} gives no valid weights"]
    evidence = posterior.evidence
    if not evidence.log_evidence.ndim:
        return [_log_evidence(evidence, ())]
    count = evidence.log_evidence.numel()
    lines = [f"problem {i}: {_log_evidence(evidence, (i,))}" for i in range(min(count, SHOWN))]
    return lines + ([f"... and {count - SHOWN} more problems"] if count > SHOWN else [])


def _log_evidence(evidence: Evidence, at: tuple[int, ...]) -> str:
    """log Z with its standard error: from the runs, or from the one run's genealogy."""
    value, spread = float(evidence.log_evidence[at]), float(evidence.spread[at])
    single = float(evidence.single_run_standard_error[at])
    if evidence.num_runs == 1:
        error = "unknown" if math.isnan(single) else f"{single:.2g}"
        return f"{value:.3f}, standard error {error} (from one run)"
    text = f"{value:.3f}, standard error {float(evidence.standard_error[at]):.2g}"
    text += f" (standard deviation over runs {spread:.2g})"
    return text + (
        ": above 1, so a few runs make the average, and it is likely too low" if spread > 1 else ""
    )


def _weights(d: Diagnosis) -> str:
    size = d.num_particles
    khat = "not estimable" if math.isnan(d.worst_khat) else f"{d.worst_khat:.2f}"
    if math.isinf(d.worst_khat):
        khat = "none (equal weights)"
    where = "" if d.problem is None else f"problem {d.problem}: "
    return (
        f"{where}effective sample size {d.final_ess * size:.1f} of {size} at the end, "
        f"{d.smallest_ess * size:.1f} at worst (t = {d.smallest_ess_at}); independent particles "
        f"{d.independent_particles:.1f}; worst k-hat {khat}"
    )


def _verdict(d: Diagnosis) -> list[tuple[str, str]]:
    where = "" if d.problem is None else f" (problem {d.problem}, the worst)"
    facts = [("verdict", d.verdict + where)]
    facts += [("because", reason) for reason in d.reasons]
    return facts + [("try", advice) for advice in d.advice]


def _label_once(facts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Repeated labels are left out."""
    before = [None, *(name for name, _ in facts)]
    return [("" if n == last else n, text) for (n, text), last in zip(facts, before, strict=False)]


def _rows(posterior: "Posterior", site: str) -> list[Row]:
    """One row per element of a small site, one for a large one; problem by problem."""
    if not posterior.samples[site].is_floating_point():
        return _discrete_rows(posterior, site)
    found = posterior.expectation(site)
    lead = len(posterior.particles.axes) - 2
    parts = found.mean, found.sd, found.standard_error
    rows = []
    for at in product(*(range(n) for n in found.mean.shape[:lead])):
        name = site + "".join(f" (problem {p})" for p in at)
        mean, sd, error = (part[at] for part in parts)
        if mean.numel() > SHOWN:
            rows.append(
                (f"{name} {tuple(mean.shape)}", *(_range(part) for part in (mean, sd, error)))
            )
            continue
        for index in product(*(range(n) for n in mean.shape)):
            label = name + (f"[{', '.join(map(str, index))}]" if index else "")
            rows.append((label, *(_number(part[index]) for part in (mean, sd, error))))
    return rows


def _discrete_rows(posterior: "Posterior", site: str) -> list[Row]:
    """The same for whole numbers, whose means say nothing: the most probable ones instead."""
    x, weights = posterior.samples[site], posterior.weights
    lead = len(posterior.particles.axes) - 2
    rows: list[Row] = []
    for at in product(*(range(n) for n in x.shape[:lead])):
        name = site + "".join(f" (problem {p})" for p in at)
        share, shape = weights[at].flatten(), tuple(x.shape[lead + 2 :])
        shares = [_shares(each, share) for each in x[at].reshape(len(share), -1).T]
        if len(shares) > SHOWN:
            best = torch.tensor([most[0][0] for most in shares])
            text = f"probability of the most probable value: {_range(best)}"
            rows.append((f"{name} {shape}", text, "", ""))
            continue
        for index, most in zip(product(*(range(n) for n in shape)), shares, strict=True):
            label = name + (f"[{', '.join(map(str, index))}]" if index else "")
            text = ", ".join(f"{v}: {p:.0%}" for p, v in most[:4] if p > 0.005)
            rows.append((label, text, "", ""))
    return rows


def _shares(x: Tensor, weights: Tensor) -> list[tuple[float, int]]:
    """The probabilities of the values of one whole number, the largest first."""
    values, which = x.unique(return_inverse=True)
    shares = weights.new_zeros(len(values)).index_add(0, which, weights)
    return sorted(zip(shares.tolist(), values.tolist(), strict=True), reverse=True)


def _range(values: Tensor) -> str:
    """What a large site is summarised by."""
    low, high = float(values.min()), float(values.max())
    if math.isnan(low):
        return "unknown"
    return f"{low:.3g} to {high:.3g}, average {float(values.mean()):.3g}"


def _number(value: Tensor) -> str:
    return "unknown" if bool(torch.isnan(value)) else f"{float(value):.4g}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _line(row: Row, widths: list[int]) -> str:
    first, *rest = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([first, *rest]).rstrip()


def _html_row(cells: list[str] | tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<td style='text-align: left'>{cell}</td>" for cell in cells) + "</tr>"
