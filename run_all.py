"""Run every experiment, draw its figure, check its claims: `python run_all.py`. Print each update
of descent beside its derivation: `python run_all.py --trace 2 --model attention`.

Four parts: the trace; what the experiments share; the experiments, a figure each, of parts
`measure_...` (its settings are the keywords), `draw_...` (one panel) and `claims_...`, listed in
EXPERIMENTS at their end; the command line.
"""
import argparse
import bisect
import collections
import contextlib
import copy
import csv
import functools
import inspect
import itertools
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

SCRIPT = Path(__file__).resolve()  # the file itself, also where a link to it is run
if not SCRIPT.is_file():
    sys.exit("run_all.py: it starts itself again for each experiment: run it as a file")

import numpy as np

from analytic_grads import (
    attention_lines,
    attention_loss_and_grads,
    each,
    fcn_lines,
    fcn_loss_and_grads,
    one_hot_loss_and_grads,
    population_loss_and_grads,
    require,
    softmax,
    stochastic_loss_and_grads,
)
from sparse_token_selection import (
    QUERIES,
    adam,
    all_subsets,
    best_dimension,
    best_fcn,
    escape_time,
    fcn,
    fcn_first_layer_floor,
    fcn_inputs,
    fcn_loss_floor,
    first_subset,
    fixed_set_loss_at,
    full_inputs,
    gradient_descent,
    in_full_model,
    init_fcn,
    largest_stable_eta,
    length_loss,
    longest_sequence,
    one_hot_loss_at,
    one_hot_recursion,
    online_excess,
    overlap_loss,
    overlap_variance,
    overlaps,
    random_sign_encoding,
    required_dimension,
    sample_batch,
    stochastic_floor,
    stochastic_trajectory,
    sts,
    transformer,
    widest_margin,
)


# ---- 1. the trace: every update beside its derivation ----

TOLERANCE = 1e-12  # of the larger of 1 and the line's largest entry
MOST = 2500  # entries of a matrix: each takes a forward pass
COLUMN_HEADS = "code", "complex step"

ATTENTION = {
    "s": "(A1) s = Z^T W z_q",
    "a": "(A2) a = softmax(s)",
    "f": "(A3) f = V Z a",
    "r": "(A4) r = f - target",
    "loss": "(A4) loss = ||r||^2 / 2",
    "grad_V": "(A5) grad_V = r (Z a)^T",
    "g": "(A6) g = Z^T V^T r",
    "a_g": "(A7) a_g = <a, g>",
    "grad_s": "(A7) grad_s = a * (g - a_g)",
    "grad_W": "(A8) grad_W = Z grad_s z_q^T",
}
NETWORK = {
    "pre": "(F1) pre = W1 x + b1",
    "hidden": "(F1) hidden = relu(pre)",
    "f": "(F1) f = A hidden + b2",
    "r": "(F1) r = f - target",
    "loss": "(F1) loss = ||r||^2 / 2",
    "grad_A": "(F2) grad_A = r hidden^T",
    "grad_b2": "(F2) grad_b2 = r",
    "delta": "(F2) delta = A^T r [pre > 0]",
    "grad_W1": "(F2) grad_W1 = delta x^T",
    "grad_b1": "(F2) grad_b1 = delta",
}
POPULATION = {
    "loss": "(P1) loss",
    "grad_V": "(P2) grad_V",
    "grad_W": "(P4) grad_W",
}
ONE_HOT = {
    "loss": "(O2) loss = d/2 ((1 - alpha p)^2/q + ..)",
    "grad_alpha": "(O3) grad_alpha = alpha N - p/q",
    "grad_omega": "(O4) grad_omega = -p (1-p) Delta/(T-1)",
}
STOCHASTIC = {
    "loss": "(P1) loss = d/2 (alpha^2 N - .. + 1/q)",
    "grad_alpha": "(S2) grad_alpha = alpha N - p/q",
    "grad_c": "(S3) grad_c = mean <u, grad_s> / d_e",
}
MASS = {
    "p": "p = <s_y, a>, attention on y",
    "N": "N = ||a||^2",
    "Delta": "(O4) Delta = g off y - g on y",
}


def softmax_again(s):
    weights = np.exp(s - s.real.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def attention_forward(V, W, Z, z_query, target, s=None, a=None):
    """(A1)-(A4) again, by einsum, for complex numbers, from s or from a on where that is given."""
    if s is None:
        s = np.einsum("bdt,de,be->bt", Z, W, z_query)
    if a is None:
        a = softmax_again(s)
    f = np.einsum("cd,bdt,bt->bc", V, Z, a)
    r = f - target
    a_g = (r * f).sum(axis=1)  # <a, Z^T V^T r> = <V Z a, r>
    return dict(s=s, a=a, f=f, r=r, a_g=a_g, loss=(r**2).sum() / 2)


def fcn_forward(W1, b1, A, b2, inputs, target, pre=None):
    """(F1) again, for complex numbers, from pre on where that is given; the active linear piece."""
    if pre is None:
        pre = np.einsum("mn,bn->bm", W1, inputs) + b1
    hidden = np.where(pre.real > 0, pre, 0)
    f = np.einsum("dm,bm->bd", A, hidden) + b2
    r = f - target
    return dict(pre=pre, hidden=hidden, f=f, r=r, loss=(r**2).sum() / 2)


def population_forward(V, W, E, e_query, selected, tilt=0.0):
    """(P1) again, for complex numbers, means over the rows; `tilt` moves attention off y."""
    B, T = selected.shape
    q = selected[0].sum()
    off_y = (1 - selected) / max(1, T - q) - selected / q
    each_E = E + np.zeros((B, 1, 1))
    a = softmax_again(np.einsum("bit,ij,bj->bt", each_E, W, e_query)) + tilt * off_y

    p = (a * selected).sum() / B
    N = (a * a).sum() / B
    loss = ((V * V).sum() * N - 2 * np.trace(V) * p / q + len(V) / q) / 2
    return dict(p=p, N=N, loss=loss)


def again(forward, at, slopes):
    """A forward pass written again, with the slopes of its loss by complex steps, {x: its name}."""
    other = forward(**at)
    for name, slope in slopes.items():
        here = (at | other)[name]
        size = np.size(here)
        require(size <= MOST, f"the size of {name}", f"at most {MOST}", size)
        other[slope] = complex_step(lambda x: forward(**at | {name: x})["loss"], here)
    return other


def batch_stages(
        steps, eta, weights, batch, lines, loss_and_grads, forward, inner, texts):
    """Stages of descent on one batch: sums, the means that descent takes, its update (A), (F).

    A stage is its title, the heads of its columns, a function (or `dict`, for numbers that are
    there already), its arguments, the text of each line, and the other side of each.
    """
    B = len(batch["target"])
    grads = {name: f"grad_{name}" for name in weights}

    descent = gradient_descent(
        tuple(weights.values()), lambda *now: loss_and_grads(*now, *batch.values()), eta, steps)
    for (t, now, _), (_, after, _) in itertools.pairwise(descent):
        at = dict(zip(weights, now)) | batch
        arguments = tuple(at.values())
        other = again(forward, at, grads | inner)
        title = f"step {t}, {lines.__name__}: sums over {B} samples"
        yield title, COLUMN_HEADS, lines, arguments, texts, other

        means = {name: value / B for name, value in other.items()}
        text = {name: texts[name] for name in ("loss", *grads.values())}
        title = f"step {t}, {loss_and_grads.__name__}: means over {B} samples"
        yield title, COLUMN_HEADS, loss_and_grads, arguments, text, means

        text = {name: f"{name} <- {name} - eta {grad}" for name, grad in grads.items()}
        moved = {name: at[name] - eta * means[grad] for name, grad in grads.items()}
        yield "", COLUMN_HEADS, dict, [dict(zip(weights, after))], text, moved


def trace_attention(rng, steps, start, T, q, d, eta, B=2):
    """Full model (A), one-hot encodings; V, W of size 1/sqrt(d + T), or 0 at --start zero."""
    D = d + T
    size = 0 if start == "zero" else 1 / math.sqrt(D)
    weights = dict(V=size * rng.standard_normal((d, D)), W=size * rng.standard_normal((D, D)))
    samples = sample_batch(rng, B, T, q, d)
    batch = dict(zip(("Z", "z_query", "target"), on_samples(np.eye(T), *samples)))
    return batch_stages(
        steps, eta, weights, batch, attention_lines, attention_loss_and_grads,
        attention_forward, dict(a="g", s="grad_s"), ATTENTION)


def trace_fcn(rng, steps, start, T, q, d, m, eta, B=2):
    """Two-layer network (F); weights of init_fcn, biases random, or 0 at --start zero."""
    batch = dict(zip(("inputs", "target"), fcn_batch(rng, B, T, q, d)))
    weights = dict(zip(("W1", "b1", "A", "b2"), init_fcn(rng, m, T, d)))
    if start != "zero":
        weights |= dict(b1=rng.standard_normal(m) / 2, b2=rng.standard_normal(d) / 2)
    return batch_stages(
        steps, eta, weights, batch, fcn_lines, fcn_loss_and_grads,
        fcn_forward, dict(pre="delta"), NETWORK)


def line_stages(
        rng, steps, start, d, eta, *, population, C, law, sizes, lines, mass, every, label="",
        samples=()):
    """Stages of descent on V = alpha I, W = c C: two scalars beside the matrices (O), (S).

    population: what `population_loss_and_grads` takes after V and W; law: loss and slopes at alpha,
    c, *sizes, `lines` names them; mass: p, N and Delta there; samples: of the full model, or none.
    """
    size = max(1, np.trace(C))  # <C, C>, 0 at T = 1
    identity = np.eye(d)
    first, second = list(lines)[1:]
    name = second.removeprefix("grad_")
    alpha = 0.0 if start == "zero" else 0.5
    c = 2 * alpha

    def forward(alpha, c, tilt):
        return population_forward(alpha * identity, c * C, *population, tilt)

    descent = gradient_descent(
        (alpha * identity, c * C),
        lambda V, W: population_loss_and_grads(V, W, *population), eta, steps)
    for (t, (V, W), _), (_, (new_V, new_W), _) in itertools.pairwise(descent):
        step = f"{label}step {t}"
        heads = "two scalars", f"matrices, all {every}"
        arguments = alpha, c, *sizes
        shown = mass(*arguments)
        at = dict(alpha=alpha, c=c, tilt=0.0)
        other = again(forward, at, {"alpha": first, "c": second, "tilt": "Delta"})
        other[first] = other[first] / d
        other[second] = other[second] / size
        title = f"{step}: V = {alpha:.6g} I, W = {name} C, {name} = {c:.6g}"
        yield title, heads, dict, [shown], {key: MASS[key] for key in shown}, other
        yield f"{step}, {law.__name__}", heads, law, arguments, lines, other

        heads = heads[::-1]
        loss, grad_alpha, grad_c = law(*arguments)
        arguments = V, W, *population
        grads = dict(loss=loss, grad_V=grad_alpha * identity, grad_W=grad_c * C)
        title = f"{step}, population_loss_and_grads"
        yield title, heads, population_loss_and_grads, arguments, POPULATION, grads

        alpha -= eta * grad_alpha
        c -= eta * grad_c
        _, _, grad_W = population_loss_and_grads(*arguments)
        rest = np.linalg.norm(grad_W - np.vdot(grad_W, C) / size * C)
        moved = dict(alpha=np.trace(new_V) / d, c=np.vdot(new_W, C) / size, rest=rest)
        text = {
            "rest": "part of grad_W orthogonal to C = 0",
            "alpha": "alpha <- alpha - eta grad_alpha",
            "c": f"{name} <- {name} - eta {second}",
        }
        yield "", heads, dict, [moved], text, dict(alpha=alpha, c=c * np.trace(C) / size, rest=0.0)

        yield random_point(rng, step, len(V), len(W), *population)
        if samples:
            yield full_model(step, V, W, samples)


def random_point(rng, step, d, d_e, E, e_query, selected, B=3):
    """A stage off the line, where W and its gradient are not symmetric: a transpose shows."""
    rows = rng.integers(len(selected), size=B)
    at = dict(
        V=rng.standard_normal((d, d)),
        W=rng.standard_normal((d_e, d_e)),
        E=E if E.ndim == 2 else E[rows],
        e_query=e_query[rows],
        selected=selected[rows],
    )
    arguments = tuple(at.values())
    other = again(population_forward, at, dict(V="grad_V", W="grad_W"))
    title = f"{step}, off the line: V and W random, mean over {B} samples"
    return title, COLUMN_HEADS, population_loss_and_grads, arguments, POPULATION, other


def full_model(step, V, W, samples):
    """A stage of the full model, averaged over all signs of the tokens, y = {1 .. q} (A9)."""
    d = len(V)
    _, grad_V, grad_W = attention_loss_and_grads(*in_full_model(V, W), *samples)
    given = dict(V_2=grad_V[:, d:], W_12=grad_W[:d, d:])
    zeros = np.zeros((d, len(W)))
    text = {"V_2": "(A9) grad_V_2 = 0", "W_12": "(A9) grad_W_12 = 0"}
    title = f"{step}, mean over all {len(samples[0])} signs of the tokens, y = {{1 .. q}}"
    return title, ("full model", "proof"), dict, [given], text, dict(V_2=zeros, W_12=zeros)


def one_hot_mass(alpha, omega, T, q, d):
    """p, N and Delta of (O2)-(O4)."""
    others = max(1, T - q)
    p = q / (q + (T - q) * np.exp(-omega))
    N = p**2 / q + (1 - p)**2 / others
    Delta = d * alpha * ((1 - alpha * p) / q + alpha * (1 - p) / others)
    return dict(p=p, N=N, Delta=Delta)


def trace_one_hot(rng, steps, start, T, q, d, eta):
    """One-hot encodings (O), all subsets y; C = I - 11^T/T."""
    samples = ()
    if d * T <= 15:
        tokens = all_signs(d, T) * math.sqrt(d)
        samples = on_samples(np.eye(T), tokens, first_subset(len(tokens), T, q), "sum")

    return line_stages(
        rng, steps, start, d, eta, samples=samples,
        population=on_population(np.eye(T), all_subsets(T, q), "sum"),
        C=np.eye(T) - 1 / T,
        law=one_hot_loss_and_grads,
        sizes=(T, q, d),
        lines=ONE_HOT,
        mass=one_hot_mass,
        every="subsets",
    )


def stochastic_mass(alpha, c, overlaps, q, *_):
    """p and N, means over the overlaps."""
    a = softmax(c * overlaps)
    return dict(p=a[:, :q].sum() / len(a), N=(a * a).sum() / len(a))


def trace_stochastic(rng, steps, start, T, q, d, d_e, eta):
    """Stochastic encodings (S), all signs, y = {1 .. q}; C = I."""
    require(d_e * T <= 16, "the number of sign patterns", "at most 2^16", f"2^{d_e * T}")
    E = all_signs(d_e, T)
    for query in QUERIES:
        population = on_population(E, first_subset(len(E), T, q), query)
        overlaps = np.einsum("bit,bi->bt", *population[:2])
        yield from line_stages(
            rng, steps, start, d, eta, label=f"{query} query, ",
            population=population,
            C=np.eye(d_e),
            law=stochastic_loss_and_grads,
            sizes=(overlaps, q, d, d_e),
            lines=STOCHASTIC,
            mass=stochastic_mass,
            every="signs",
        )


# Of each model: its stages, its default settings, the functions that a reader's file may define.
TRACES = {
    "attention": (
        trace_attention,
        dict(T=5, q=2, d=3, eta=0.5),
        ("attention_lines", "attention_loss_and_grads"),
    ),
    "fcn": (
        trace_fcn,
        dict(T=4, q=2, d=3, m=5, eta=0.1),
        ("fcn_lines", "fcn_loss_and_grads"),
    ),
    "one-hot": (
        trace_one_hot,
        dict(T=5, q=2, d=3, eta=0.5),
        ("one_hot_loss_and_grads", "population_loss_and_grads"),
    ),
    "stochastic": (
        trace_stochastic,
        dict(T=5, q=2, d=4, d_e=3, eta=0.5),
        ("stochastic_loss_and_grads", "population_loss_and_grads"),
    ),
}
EXPLAIN = f"""\
complex step: dL/dx = Im L(x + ih)/h of a loss written again, which cancels nothing.
Two entries of a line are shown; the difference is the largest of all entries, over
the larger of 1 and the line's largest entry, and must be at most {TOLERANCE:g}."""


def admitted(model, settings, defaults):
    """The model's settings, defaults where none is given; a bad one is refused by its option."""
    for name, value in settings.items():
        options = f"left out: {model} has --{', --'.join(defaults)}"
        require(name in defaults, f"--{name}", options, value)
        wanted, most = ("above 0", math.inf) if name == "eta" else ("from 1 to 50", 51)
        require(0 < value < most, f"--{name}", wanted, value)
    settings = defaults | settings
    T = settings["T"]
    require(settings["q"] <= T, "--q", f"at most T = {T}", settings["q"])
    return settings


def attempt(name, function, arguments):
    """What the reader's code gives, and one line about what went wrong instead, if it did."""
    try:
        return function(*copy.deepcopy(arguments)), ""
    except (Exception, SystemExit) as error:
        text = f"{name}: {type(error).__name__}: {error}"
        return {}, textwrap.shorten(text, width=84, placeholder=" ...")


def read_mine(path, names):
    """Those of the functions that the reader's file defines, and one line if it does not run."""
    require(Path(path).is_file(), "--mine", "a Python file", str(path))
    given, problem = attempt(Path(path).name, runpy.run_path, [str(path)])
    found = {name: given[name] for name in names if name in given}
    require(found or problem, "--mine", f"a file that defines {' or '.join(names)}", str(path))
    return found, problem


def by_name(function, arguments, lines):
    """The result of a function by the names of its lines."""
    result = function(*arguments)
    if isinstance(result, dict):
        known = result.keys() <= lines.keys()
        require(known, "its lines", f"among {', '.join(lines)}", list(result))
        return result
    fits = isinstance(result, (tuple, list)) and len(result) == len(lines)
    require(fits, "its result", f"{', '.join(lines)}", result)
    return dict(zip(lines, result))


def as_numbers(value, shape):
    """The value of a line as an array of finite real numbers of that shape."""
    array = np.asarray(value)
    fits = array.shape == shape and array.dtype.kind in "biuf" and np.isfinite(array).all()
    got = value if array.shape == shape else array.shape
    require(fits, "it", f"finite numbers of shape {shape}", got)
    return array.astype(float)


def compared(title, heads, function, arguments, lines, other, yours, full):
    """Print each line of a function beside the other side's; yield its text and difference."""
    name = function.__name__
    asked = function
    left, right = heads
    if yours is not None:
        if name not in yours:
            return
        asked = yours[name]
        left = "yours"
    if title:
        print("", title, f"{left:>52}{right:>24}{'difference':>12}", sep="\n")
    if full and name != "dict":
        for parameter, value in zip(inspect.signature(function).parameters, arguments):
            print(f"{parameter} =", value, sep="\n")

    values, problem = attempt(name, by_name, (asked, arguments, lines))
    if problem:
        print(f"{problem} <--")
        yield name, math.inf
        return
    for key, text in lines.items():
        if key not in values:
            print(f"{text}: not given")
        else:
            yield text, print_line(text, f"{name}, {key}", values[key], other[key], full)


def print_line(text, name, value, other, full):
    """Print a line's first two entries that are not 0 (all if `full`); return the difference."""
    here, problem = attempt(name, as_numbers, (value, np.shape(other)))
    if problem:
        print(f"{problem} <--")
        return math.inf
    gap = np.max(abs(here - other))
    difference = np.nan_to_num(gap / max(1.0, np.max(abs(other))), nan=math.inf)
    wrong = int(difference > TOLERANCE)

    first = np.argsort(abs(here).ravel() <= TOLERANCE, kind="stable")[:2]
    left, right = (
        "".join(f"{x:12.5g}" for x in np.ravel(entries)[first] + 0.0) for entries in (here, other))
    print(f"{text}{left:>{52 - len(text)}}{right:>24}{difference:8.1e}{' <--' * wrong}")
    if full:
        for entries in (here, other)[:1 + wrong]:
            print(entries)
    return difference


def trace(model, steps, settings, seed=0, start="line", full=False, mine=None):
    """Print so many updates, line by line; the exit status is 0 only if both sides agree."""
    stages, defaults, functions = TRACES[model]
    settings = admitted(model, settings, defaults)
    yours = None
    if mine is not None:
        yours, problem = read_mine(mine, functions)
        if problem:
            print(problem)
            return 1

    sizes = (f"{name} = {value:g}" for name, value in settings.items())
    print(*sizes, f"seed = {seed}", f"start = {start}", sep=", ")
    print(inspect.getdoc(stages), EXPLAIN, sep="\n")
    first_wrong = ""
    count = 0
    worst = 0.0
    with np.errstate(all="ignore"):  # a descent that diverges ends in one line
        for stage in stages(np.random.default_rng(seed), steps, start, **settings):
            for text, difference in compared(*stage, yours, full):
                count += 1
                worst = max(worst, difference)
                if worst > TOLERANCE:
                    first_wrong = first_wrong or text
            if yours is not None and worst == math.inf:  # what cannot be compared ends the trace
                break

    print(f"\n{count} lines compared, largest difference {worst:.1e}")
    if first_wrong:
        print(f"the first wrong line: {first_wrong}")
    return int(first_wrong != "" or count == 0)


# ---- 2. what the experiments share: claims, panels, descents ----

COLUMNS = (
    "id", "statement", "source", "predicted", "measured", "tolerance", "verdict", "seed")

# Okabe and Ito's colours: safe for colour-blind readers
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
PINK, SKY, RED = "#CC79A7", "#56B4E9", "#D55E00"
PREDICTED = {"color": "black", "linestyle": "--", "linewidth": 1.3, "zorder": 5}
STYLE = {
    "font.size": 11,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.title_fontsize": 9,
}


def equals(id, statement, measured, wanted, within, source="derived here"):
    """A claim: every value measured is the one wanted, give or take `within`."""
    gap = np.abs(np.subtract(measured, wanted))
    return worst_row(id, statement, source, "equals", measured, wanted, within, gap)


def agrees(id, statement, value, law, within):
    """A claim: every value over its law is 1, give or take `within`."""
    return equals(id, statement, np.divide(value, law), 1, within)


def at_most(id, statement, measured, bound, source="derived here"):
    """A claim: no value measured is above its bound."""
    gap = np.subtract(measured, bound)
    return worst_row(id, statement, source, "at most", measured, bound, 0.0, gap)


def at_least(id, statement, measured, bound, source="derived here"):
    """A claim: no value measured is below its bound."""
    gap = np.subtract(bound, measured)
    return worst_row(id, statement, source, "at least", measured, bound, 0.0, gap)


def worst_row(id, statement, source, relation, measured, wanted, within, gap):
    """The row of a claim: its worst value, the one whose gap exceeds `within` most.

    One value that is not finite fails the claim, and so does having none.
    """
    if np.size(measured) == 0:
        measured = gap = np.nan
    values = np.broadcast_arrays(measured, wanted, within, np.subtract(gap, within))
    measured, wanted, within, excess = (value.ravel() for value in values)
    excess = np.where(np.isfinite(excess), excess, np.inf)
    worst = excess.argmax()
    return {
        "id": id,
        "statement": statement,
        "source": source,
        "predicted": f"{relation} {wanted[worst]:.6g}",
        "measured": f"{measured[worst]:.6g}",
        "tolerance": f"{within[worst]:.3g}",
        "verdict": "ok" if excess[worst] <= 0 else "FAIL",
    }


def listed(values):
    """Numbers or sizes in a row, as a claim names them."""
    return ", ".join(map(str, values))


def finish(ax, title, xlabel, ylabel, legend="lower left", heading=None, columns=1, **settings):
    """Title, axes (logarithmic unless the settings say otherwise), the legend with its heading."""
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.set(**{"xscale": "log", "yscale": "log", **settings})
    ax.legend(loc=legend, title=heading, ncols=columns, alignment="left")


def log_steps(last, count=60, first=1):
    """About `count` steps from `first` to `last`, evenly spaced in the logarithm."""
    return np.unique(np.round(np.geomspace(first, last, count)).astype(int))


def record(descent, times):
    """t, params and loss of a descent at the given times: an array, a tuple, an array."""
    wanted = set(map(int, times))
    t, params, loss = zip(*(state for state in descent if state[0] in wanted))
    return np.array(t), params, np.array(loss)


def final(states):
    """The last state of a descent; the others are forgotten on the way."""
    return collections.deque(states, maxlen=1).pop()


def cosine(matrix, direction):
    """The cosine of the angle between two matrices; nan where one is zero."""
    sizes = np.linalg.norm(matrix) * np.linalg.norm(direction)
    return np.vdot(matrix, direction) / sizes if sizes else math.nan


def mean_and_error(repeats):
    """The mean over repeats (the first axis) and its standard error."""
    return np.mean(repeats, axis=0), np.std(repeats, axis=0, ddof=1) / math.sqrt(len(repeats))


def sampled(loss, u):
    """loss(u) and its standard error, from the scatter between 20 groups of rows."""
    _, error = mean_and_error([loss(rows) for rows in np.array_split(u, 20)])
    return loss(u), error


def complex_step(loss, x, h=1e-30):
    """dloss/dx by complex steps, entry by entry: nothing is subtracted, so nothing cancels."""
    ways = 1j * h * np.eye(np.size(x)).reshape(-1, *np.shape(x))
    return np.imag([loss(x + way) for way in ways]).reshape(np.shape(x)) / h


def on_population(E, selected, query="dual"):
    """What `population_loss_and_grads` takes after V and W: E, e_y, selected."""
    return E, QUERIES[query](E, selected), selected


def on_samples(E, X, selected, query="dual"):
    """What `attention_loss_and_grads` takes after V and W: Z, z_query, target."""
    Z, z_query = full_inputs(X, E, QUERIES[query](E, selected))
    return Z, z_query, sts(X, selected)


def all_signs(d_e, T):
    """All 2^(d_e T) sets of random-sign encodings."""
    signs = itertools.product((-1, 1), repeat=d_e * T)
    return np.array(list(signs)).reshape(-1, d_e, T) / math.sqrt(d_e)


def train(loss_and_grads, draw, V_shape, W_size, eta, steps):
    """Descent of V and W from zero, at each step on the arguments that draw() gives."""
    zero = np.zeros(V_shape), np.zeros((W_size, W_size))

    def on_draw(V, W):
        return loss_and_grads(V, W, *draw())
    return gradient_descent(zero, on_draw, eta, steps)


def set_descent(E, q, d, eta, steps):
    """Population descent of V_1, W_22 on one set of encodings, over all subsets (P2, P4)."""
    whole = on_population(E, all_subsets(E.shape[1], q))
    return train(population_loss_and_grads, lambda: whole, (d, d), len(E), eta, steps)


def scalar_descent(times, T, q, d, eta):
    """alpha, omega and the loss at the given times of the recursion (O3, O4), as arrays."""
    _, params, loss = record(one_hot_recursion(T, q, d, eta, int(max(times))), times)
    alpha, omega = np.moveaxis(np.array(params), 1, 0)
    return alpha, omega, loss


def two_scalars(draw, q, d, d_e, eta, steps):
    """alpha and c from zero, at each step on the overlaps that draw() gives (S2, S3)."""
    def on_draw(alpha, c):
        return stochastic_loss_and_grads(alpha, c, draw(), q, d, d_e)
    return gradient_descent((0.0, 0.0), on_draw, eta, steps)


def online(rng, E, q, d, eta, B, steps, query="sum", fresh=False):
    """Descent of the full V and W, new samples at each step; encodings for each if `fresh`."""
    d_e, T = E.shape

    def draw():
        X, selected = sample_batch(rng, B, T, q, d)
        encodings = random_sign_encoding(rng, d_e, T, B) if fresh else E
        return on_samples(encodings, X, selected, query)
    return train(attention_loss_and_grads, draw, (d, d + d_e), d + d_e, eta, steps)


def off_the_line(E, q, d, eta, steps):
    """Population descent, orthonormal encodings: its largest distance from (O1), (O3, O4)."""
    T = E.shape[1]
    direction = E @ (np.eye(T) - 1 / T) @ E.T
    distance = 0.0
    both = zip(set_descent(E, q, d, eta, steps), one_hot_recursion(T, q, d, eta, steps))
    for (_, (V, W), _), (_, (alpha, omega), _) in both:
        off = abs(V - alpha * np.eye(d)).max(), abs(W - omega * direction).max()
        distance = max(distance, *off)
    return distance


def fcn_batch(rng, B, T, q, d, tokens="gaussian"):
    """Inputs and targets of the networks, and the tokens and subsets behind them."""
    X, selected = sample_batch(rng, B, T, q, d, tokens)
    return fcn_inputs(X, selected), sts(X, selected), X, selected


def fcn_run(rng, m, T, d, batches, rate, steps, start=0.3):
    """Adam on a network of width m, a batch a step; from .3 of the start wide ones learn sooner."""
    def on_batch(*params):
        inputs, target = next(batches)[:2]
        return fcn_loss_and_grads(*params, inputs, target)
    params = tuple(start * param for param in init_fcn(rng, m, T, d))
    return gradient_descent(params, adam(on_batch, steps), rate, steps)


def with_error(f, target, q):
    """L/L_0 on a test set and its standard error; predicting 0 (L_0) is a control variate."""
    unit = q / target.shape[1]
    loss = unit * ((f - target)**2).sum(axis=1)
    zero = unit * (target**2).sum(axis=1)
    slope = np.cov(loss, zero)[0, 1] / zero.var(ddof=1)
    return mean_and_error(loss - slope * (zero - 1))


# ---- 3. the experiments ----
# measure_... returns what it found; in draw_... and claims_... m holds that and its settings.

# ---- story: the paper in four panels ----

def measure_losses(rng, lengths=(16, 64, 256), q=3, d=4, eta=1.1, steps=30_000, B=256, runs=4,
                   online_steps=1500):
    """One-hot: population descent (O2)-(O4) at three T, the full V and W online at the smallest.

    eta is half of the largest step of the full model (A11) at the smallest T.
    """
    times = log_steps(steps, 90)
    _, _, loss = scalar_descent(times, np.array(lengths), q, d, eta)
    laws = [one_hot_loss_at(times, T, q, d, eta) for T in lengths]

    T = lengths[0]
    t = np.arange(online_steps + 1)
    online_loss = np.empty((runs, len(t)))
    for run in range(runs):
        descent = online(rng, np.eye(T), q, d, eta, B, online_steps)
        _, models, online_loss[run] = record(descent, t)
    late = slice(online_steps // 2, None)
    law = one_hot_loss_at(t[late], T, q, d, eta)
    ratio, error = mean_and_error((online_loss[:, late] / law).mean(axis=1))
    return dict(
        times=times, loss=loss.T, laws=laws, online_loss=online_loss.mean(axis=0), W=models[-1][1],
        ratio=ratio, error=error)


def draw_losses(ax, m):
    for T, loss, law, colour in zip(m.lengths, m.loss, m.laws, (BLUE, ORANGE, GREEN)):
        ax.plot(m.times, loss, "o", color=colour, label=f"population descent, T = {T}")
        after = m.times > T / m.eta
        ax.plot(m.times[after], law[after], **PREDICTED)
    shown = log_steps(m.online_steps, 30)
    ax.plot(shown, m.online_loss[shown], "s", color=PINK, fillstyle="none",
            label=f"full model online, B = {m.B}, T = {m.lengths[0]}")
    finish(ax, "Descent follows a closed form", "gradient steps t", "loss L",
           heading=f"q = {m.q}, d = {m.d}, η = {m.eta:g}, one-hot; dashed: (C3)")


def draw_learned(ax, m):
    heat_map(ax, m.W, m.d, abs(m.W).max())
    ax.set_title(f"What W learns: positions only, T = {m.lengths[0]}")


def heat_map(ax, matrix, d, size):
    """The blocks of V or W, content and positions, in the colours of their signs up to +-size."""
    middles = [d / 2 - 0.5, (d + matrix.shape[1] - 1) / 2]
    ax.imshow(matrix, cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto")
    ax.axvline(d - 0.5, color="black", linewidth=0.8)
    ax.axhline(d - 0.5, color="black", linewidth=0.8)
    ax.set_xticks(middles, ["x", f"position (colours ±{size:.2g})"])
    rows = ["output"] if len(matrix) == d else ["x", "position"]
    ax.set_yticks(middles[:len(rows)], rows, rotation=90, va="center")
    ax.grid(False)


def claims_losses(m):
    excess = online_excess(m.q, m.d, m.eta, m.B)
    return [
        equals(
            "A11-half",
            "The full model online at half of the largest step (A11), one-hot, "
            f"(T, q, d, B) = {m.lengths[0], m.q, m.d, m.B}: mean loss over (C3) in the second half "
            "of the steps is 1 plus the excess (A12), give or take half and 4 standard errors.",
            m.ratio, 1 + excess, within=excess / 2 + 4 * m.error),
    ]


def measure_closed_form(rng, sizes=((64, 8, 2), (64, 2, 4), (64, 4, 8), (256, 4, 8),
                                    (512, 3, 3)), escapes=1.3, last_size=(16, 2, 4), steps=20_000):
    """The recursion (O3, O4) at half of the largest step: over (C3) from t = 3T/eta over the cliff,
    and at one size L 4 eta t/(T - 1) after many steps."""
    worst = []
    for size in sizes:
        T, q, d = size
        eta = largest_stable_eta(*size) / 2
        times = log_steps(escapes * escape_time(*size, eta), 200, first=3 * T / eta)
        _, _, loss = scalar_descent(times, *size, eta)
        error = abs(np.log(loss / one_hot_loss_at(times, *size, eta)))
        worst.append(error.max() / (0.05 * (d / q)**2))

    eta = largest_stable_eta(*last_size) / 2
    _, _, (loss,) = scalar_descent([steps], *last_size, eta)
    return dict(worst=worst, share=loss * 4 * eta * steps / (last_size[0] - 1))


def claims_closed_form(m):
    return [
        at_most(
            "C3-cliff",
            "Population descent follows (C3) over the cliff, from t = 3T/eta on: largest "
            f"|log(loss over (C3))|, over .05 (d/q)^2, (T, q, d) = {listed(m.sizes)}.",
            m.worst, 1),
        equals(
            "C4", f"The loss falls like (T-1)/(4 eta t): L 4 eta t/(T-1) at t = {m.steps}, "
            f"(T, q, d) = {m.last_size}.",
            m.share, 1, within=0.01),
    ]


def measure_kinds(rng, T=32, q=2, d=16, d_e=128, eta=1.5, steps=4000, draws=800, fixed_steps=2000,
                  batch=48, B=8000):
    """Population descent at length T, tested at up to 64 T, for three kinds of encodings.

    Stochastic: two scalars on frozen draws; one fixed set: fresh subsets, `batch` a step; one-hot:
    two scalars. `draws` subsets test the matrices, B draws the stochastic encodings.
    """
    lengths = [T * 2**k for k in range(7)]
    frozen = overlaps(rng, draws, T, q, d_e)
    _, (alpha, c), _ = final(two_scalars(lambda: frozen, q, d, d_e, eta, steps))

    _, (beta, omega), _ = final(one_hot_recursion(T, q, d, eta, steps))
    one_hot = beta * np.eye(d), omega * (np.eye(T) - 1 / T)

    E = random_sign_encoding(rng, d_e, lengths[-1])  # trained on its first T columns

    def draw():
        _, selected = sample_batch(rng, batch, T, q, 1)
        return on_population(E[:, :T], selected)
    _, fixed, _ = final(train(population_loss_and_grads, draw, (d, d), d_e, eta, fixed_steps))

    losses = {"one-hot": [], "one fixed set, extended": []}
    for size in lengths:
        _, selected = sample_batch(rng, draws, size, q, 1)
        encodings = np.eye(T, size), E[:, :size]
        for kind, model, columns in zip(losses, (one_hot, fixed), encodings):
            loss, _, _ = population_loss_and_grads(*model, *on_population(columns, selected))
            losses[kind].append(loss * 2 * q / d)
    losses["stochastic"], _, law = at_lengths(rng, alpha, c, lengths, q, d, d_e, B)
    return dict(tested=lengths, losses=losses, law=law)


def at_lengths(rng, alpha, c, lengths, q, d, d_e, B):
    """L/L_0 at V = alpha I, W = c I on B draws, fewer of longer ones; standard error; (L1)."""
    rows = []
    for T in lengths:
        u = overlaps(rng, B * lengths[0] // T, T, q, d_e)
        loss, error = sampled(
            lambda rows: stochastic_loss_and_grads(alpha, c, rows, q, d, d_e)[0], u)
        law = length_loss(alpha, c, T, q, d, overlap_variance(q, d_e))
        rows.append((loss, error, law))
    return np.transpose(rows) * 2 * q / d


def by_length(ax, T, lengths):
    """Ticks at T, 2T, 4T, ... on the axis of lengths."""
    ax.set_xticks(lengths, [f"{size // T} T" if size > T else "T" for size in lengths])
    ax.minorticks_off()


def draw_kinds(ax, m):
    looks = ("^-", GREEN), ("s-", ORANGE), ("o-", BLUE)
    for (name, losses), (style, colour) in zip(m.losses.items(), looks):
        ax.plot(m.tested, losses, style, color=colour, linewidth=2, label=name)
    ax.plot(m.tested, m.law, label="(L1)", **PREDICTED)
    finish(ax, "Trained at length T, tested on longer sequences", "length of the test sequences",
           "loss L/L₀", "upper left", "population descent, "
           f"T = {m.T}, q = {m.q}, d = {m.d}, $d_e$ = {m.d_e}, η = {m.eta:g}", 2, yscale="linear",
           ylim=(-0.03, 1.4), yticks=np.linspace(0, 1, 6))
    by_length(ax, m.T, m.tested)


def claims_kinds(m):
    at = f"Trained at T = {m.T}, q = {m.q}, d_e = {m.d_e}"
    stochastic = m.losses["stochastic"]
    fixed = m.losses["one fixed set, extended"]
    return [
        at_most(
            "L-fits", f"{at}: L/L_0 at length T, with stochastic encodings and with one fixed set.",
            [stochastic[0], fixed[0]], 0.02, source="paper"),
        at_least(
            "L-fixed",
            f"{at}: at 2T the loss of a fixed set, extended, over that of stochastic sets.",
            fixed[1] / stochastic[1], 5, source="paper"),
    ]


def measure_same_samples(rng, T=16, q=2, d=8, d_e=24, eta=1.0, B=128, steps=800, tests=4000):
    """The full transformer, by plain descent, and networks, by Adam, on one stream of samples."""
    D = d + d_e
    widths = D, 2 * T * d
    times = log_steps(steps, 24)[4:]

    def encoded(X, selected):
        return on_samples(random_sign_encoding(rng, d_e, T, len(X)), X, selected)

    seed = rng.integers(2**32)

    def samples():
        same = np.random.default_rng(seed)
        while True:
            yield fcn_batch(same, B, T, q, d)

    own = samples()
    runs = [train(attention_loss_and_grads, lambda: encoded(*next(own)[2:]), (d, D), D, eta, steps)]
    runs += [fcn_run(rng, m, T, d, samples(), 0.01, steps) for m in widths]

    inputs, target, *task = fcn_batch(rng, tests, T, q, d)
    Z, z_query, _ = encoded(*task)
    losses = []
    for k, run in enumerate(runs):
        _, models, _ = record(run, times)
        outputs = [fcn(*model, inputs) if k else transformer(*model, Z, z_query)
                   for model in models]
        losses.append([with_error(f, target, q) for f in outputs])
    loss, error = np.moveaxis(losses, 2, 0)  # models, times
    floor = fcn_loss_floor(D, T, q, d) * 2 * q / d
    return dict(D=D, samples=times * B, widths=widths, loss=loss, error=error, floor=floor)


def draw_same_samples(ax, m):
    names = ["transformer, width", "network, width", "network, width 2Td ="]
    looks = zip(names, (m.D, *m.widths), m.loss, (RED, BLUE, ORANGE), "*os")
    for name, width, loss, colour, marker in looks:
        ax.plot(m.samples, loss, marker=marker, color=colour, label=f"{name} {width}")
    ax.axhline(m.floor, **PREDICTED)
    ax.text(m.samples[0], m.floor - 0.01, f"floor (F4) of width {m.D}", va="top")
    finish(ax, "The same samples: a network meets its floor", "samples seen", "test loss L/L₀",
           "upper right", f"T = {m.T}, q = {m.q}, d = {m.d}, η = {m.eta:g}, B = {m.B}", 2,
           yscale="linear", ylim=(0, 1.42), yticks=np.linspace(0, 1, 6))


def claims_same_samples(m):
    return [
        at_most(
            "F4-separation",
            f"A transformer of width {m.D} online, (T, q, d) = {m.T, m.q, m.d}: loss "
            "+ 4 standard errors over the least loss of networks of that width (F4).",
            (m.loss[0, -1] + 4 * m.error[0, -1]) / m.floor, 0.2, source="paper"),
    ]


# ---- one_hot: escape, and how large the step may be ----

def measure_escape(rng, lengths=(64, 128, 256, 512), q=4, d=4, eta=2.5, steps=32_000):
    """The step at which half of the attention is on y, by the recursion (O3, O4) and by (C5)."""
    _, omegas, _ = scalar_descent(range(steps + 1), np.array(lengths), q, d, eta)
    half = [np.interp(math.log((T - q) / q), omega, range(steps + 1))
            for T, omega in zip(lengths, omegas.T)]
    law = [escape_time(T, q, d, eta) for T in lengths]
    return dict(half=np.array(half), law=np.array(law), unit=np.array(lengths)**2 / (eta * d))


def draw_escape(ax, m):
    ax.plot(m.lengths, m.half / m.unit, "o", color=BLUE, label="half of the attention is on y")
    ax.plot(m.lengths, m.law / m.unit, label="(C5)", **PREDICTED)
    finish(ax, "Escape", "sequence length T", "time in units of T²/(ηd)", "upper right",
           f"population descent, q = {m.q}, d = {m.d}, η = {m.eta:g}", yscale="linear",
           ylim=(0.98, 1.2 * max(m.half / m.unit)))
    ax.set_xticks(m.lengths, m.lengths)
    ax.minorticks_off()


def claims_escape(m):
    return [
        equals(
            "C5", "Half of the attention is on y at the time (C5), within twice its next term, "
            f"d^2/(15 q T): ratio, (q, d) = {m.q, m.d}, T = {listed(m.lengths)}.",
            m.half / m.law, 1, within=2 * m.d**2 / (15 * m.q * np.array(m.lengths))),
    ]


def measure_line(rng, T=8, q=3, d=5, eta=0.45, steps=1000):
    """The largest distance of descent of V_1 and W_22 over all subsets from the two scalars."""
    return dict(distance=off_the_line(np.eye(T), q, d, eta, steps))


def claims_line(m):
    return [
        at_most(
            "O1", "Population descent of V_1 and W_22 over all subsets stays on the two scalars "
            f"(O3, O4) for {m.steps} steps, (T, q, d) = {m.T, m.q, m.d}: largest difference.",
            m.distance, 1e-12),
    ]


def measure_step(rng, T=5, q=3, d=12, B=256, steps=600, factors=(0.5, 1.2)):
    """The full model online below and above the largest step of (A11): its loss and (C3)."""
    t = np.arange(steps + 1)
    etas = [factor * largest_stable_eta(T, q, d) for factor in factors]
    losses = [record(online(rng, np.eye(T), q, d, eta, B, steps), t)[2] for eta in etas]
    laws = [one_hot_loss_at(t, T, q, d, eta) for eta in etas]
    return dict(etas=etas, losses=losses, laws=laws)


def draw_step(ax, m):
    shown = log_steps(m.steps, 60)
    for factor, eta, loss, law, colour in zip(m.factors, m.etas, m.losses, m.laws, (BLUE, RED)):
        label = f"{factor:g} of the largest: η = {eta:.2g}"
        ax.plot(shown, loss[shown], "o", color=colour, label=label)
        after = shown[shown > m.T / eta]
        ax.plot(after, law[after], **PREDICTED)
    finish(ax, "How large a step (A11)", "gradient steps t", "loss L",
           heading=f"full model online, T = {m.T}, q = {m.q}, d = {m.d}, B = {m.B}; dashed: (C3)")


def claims_step(m):
    _, loss = m.losses
    _, law = m.laws
    late = slice(-m.steps // 4, None)
    return [
        at_least(
            "A11-above",
            f"At {m.factors[1]:g} times the largest step of (A11), which (O5) allows, the "
            f"full model stalls: median loss over (C3) in the last quarter of {m.steps} steps, "
            f"(T, q, d, B) = {m.T, m.q, m.d, m.B}.",
            np.median(loss[late] / law[late]), 4),
    ]


def measure_sideways(rng, sizes=((5, 4, 6), (8, 3, 12), (6, 2, 9)), factors=(0.9, 1.1), steps=20,
                     push=1e-6, omega=14.0):
    """Late, a small push off the line (O1) along step 6 of (O5): how it grows, and the law."""
    growth = []
    law = []
    for T, q, d in sizes:
        quadratic = [[1, 0, 0], [0, T - 1, -1], [0, -1, T - 1]]
        beta, gamma, zeta = np.linalg.solve(quadratic, [1, q - 1, -1])
        v = np.linspace(-1, 1, T)
        U = gamma * v[:, None] + zeta * v
        np.fill_diagonal(U, beta * v)

        line = omega * (np.eye(T) - 1 / T)
        whole = on_population(np.eye(T), all_subsets(T, q))
        for factor in factors:
            eta = factor * largest_stable_eta(T, q, d, full=False)
            _, (_, W), _ = final(gradient_descent(
                (np.eye(d), line + push * U),
                lambda V, W: population_loss_and_grads(V, W, *whole), eta, steps))
            growth.append(np.vdot(W - line, U) / (push * np.vdot(U, U)))
            law.append((1 - 2 * factor)**steps)  # eta lambda = 2 factor
    return dict(growth=growth, law=law)


def claims_sideways(m):
    return [
        agrees(
            "O5",
            f"Late, a push off the two scalars grows like (1 - eta lambda)^{m.steps}, lambda of "
            f"(O5), at {listed(m.factors)} of the step 2/lambda: ratio, "
            f"(T, q, d) = {listed(m.sizes)}.",
            m.growth, m.law, within=0.01),
    ]


def measure_noise(rng, sizes=((8, 2, 4), (16, 3, 4), (6, 4, 3)), p=0.999, B=2000, batches=80):
    """The scatter of one sample's gradient late in training, one-hot: tr Cov(grad)/(2L)."""
    value = []
    for T, q, d in sizes:
        omega = math.log(p / (1 - p) * (T - q) / q)
        alpha = 1 / p  # its best value, but for terms in (1 - p)^2
        model = in_full_model(alpha * np.eye(d), omega * (np.eye(T) - 1 / T))
        squares = 0.0
        loss = 0.0
        for _ in range(batches):
            Z, z_query, target = on_samples(np.eye(T), *sample_batch(rng, B, T, q, d), "sum")
            lines = attention_lines(*model, Z, z_query, target)
            factors_V = lines["r"], each(Z, lines["a"])  # (A5): a column times a row
            factors_W = each(Z, lines["grad_s"]), z_query  # (A8)
            for left, right in (factors_V, factors_W):
                squares += ((left**2).sum(axis=1) * (right**2).sum(axis=1)).sum()
            loss += lines["loss"]
        value.append(squares / (2 * loss))
    return dict(value=value, law=[q + d for _, q, d in sizes])


def claims_noise(m):
    return [
        agrees(
            "A12",
            f"Late (attention {m.p} on y), one sample's gradient scatters with tr Cov(grad) = "
            f"2 (q + d) L: ratio, (T, q, d) = {listed(m.sizes)}.",
            m.value, m.law, within=0.03),
    ]


# ---- learning: the full V and W, block by block ----

def measure_blocks(rng, T=32, q=3, d=4, eta=2.0, B=256, steps=2000, early=(20, 100)):
    """The full model online from zero, one-hot: norms of its blocks, cosines with the truth."""
    descent = online(rng, np.eye(T), q, d, eta, B, steps)
    t, models, _ = record(descent, np.union1d(log_steps(steps, 50), early))
    V_truth, W_truth = in_full_model(np.eye(d), np.eye(T) - 1 / T)

    blocks = {"V₁": [], "W₂₂": [], "V₂": [], "W₁₂": []}
    for V, W in models:
        parts = V[:, :d], W[d:, d:], V[:, d:], W[:d, d:]
        for norms, block in zip(blocks.values(), parts):
            norms.append(np.linalg.norm(block))
    return dict(
        t=t, blocks=blocks,
        cosines_V=[cosine(V, V_truth) for V, _ in models],
        cosines_W=[cosine(W, W_truth) for _, W in models],
        shown=[models[i] for i in np.searchsorted(t, early)])


def draw_block(ax, m, k, which):
    """V (k = 0) or W (k = 1) at one of the two early times, both on the scale of the later one."""
    first, second = (model[k] for model in m.shown)
    heat_map(ax, (first, second)[which], m.d, abs(second).max())
    ax.set_title(f"{'VW'[k]} after {m.early[which]} steps")


def draw_norms(ax, m):
    for (name, norms), colour in zip(m.blocks.items(), (ORANGE, BLUE, PINK, GREEN)):
        ax.plot(m.t, norms, "o", color=colour, label=name)
    finish(ax, "Norms: V₂, W₁₂ are noise", "gradient steps t", "Frobenius norm", "upper left",
           f"T = {m.T}, q = {m.q}, d = {m.d}, η = {m.eta:g}, B = {m.B}", 2, ylim=(None, 2e4))


def draw_cosines(ax, m):
    ax.plot(m.t, m.cosines_V, "o", color=ORANGE, label="V with [I, 0]")
    ax.plot(m.t, m.cosines_W, "o", color=BLUE, label="W with I - 11ᵀ/T")
    ax.axhline(1, **PREDICTED)
    finish(ax, "Directions", "gradient steps t", "cosine with the truth", "lower right",
           yscale="linear", ylim=(0, 1.08))


def claims_blocks(m):
    after = f"after {m.steps} steps of {m.B} fresh samples, one-hot, (T, q, d) = {m.T, m.q, m.d}."
    V_1, W_22, V_2, W_12 = (norms[-1] for norms in m.blocks.values())
    return [
        at_least(
            "A-truth", "The full V and W take the directions [I, 0] and I - 11^T/T of the truth: "
            f"cosines {after}",
            [m.cosines_V[-1], m.cosines_W[-1]], 0.998, source="paper"),
        at_most(
            "A9",
            "Attention looks at positions only, and no position leaks out: norms of W_12 and of "
            f"V_2 over those of W_22 and V_1 {after}",
            [W_12 / W_22, V_2 / V_1], 0.05, source="paper"),
    ]


# ---- stochastic: random signs, not one set ----

def measure_law(rng, T=32, q=3, d=6, d_e=96, eta=2.0, sets=1200, steps=3000, B=128,
                online_steps=500):
    """Population descent of the two scalars on frozen draws, beside (S6); the full model online."""
    frozen = overlaps(rng, sets, T, q, d_e)
    held = overlaps(rng, 10 * sets, T, q, d_e)  # never trained on: S6 measures the loss here
    t, params, _ = record(two_scalars(lambda: frozen, q, d, d_e, eta, steps), log_steps(steps, 30))
    loss = [stochastic_loss_and_grads(alpha, c, held, q, d, d_e)[0] for alpha, c in params]
    late = t >= 2 * T / eta
    _, _, law = stochastic_trajectory(t[late], T, q, d, d_e, eta)

    E = random_sign_encoding(rng, d_e, T)
    descent = online(rng, E, q, d, eta, B, online_steps, "dual", fresh=True)
    shown, models, online_loss = record(descent, log_steps(online_steps, 25))
    V_truth, W_truth = in_full_model(np.eye(d), np.eye(d_e))
    cosines = [(cosine(V, V_truth), cosine(W, W_truth)) for V, W in models]
    return dict(
        t=t, late=late, loss=np.array(loss), law=law, shown=shown, online_loss=online_loss,
        cosines=cosines)


def draw_law(ax, m):
    unit = 2 * m.q / m.d
    ax.plot(m.t, m.loss * unit, "o", color=BLUE, label="population descent of two scalars")
    ax.plot(m.shown, m.online_loss * unit, "s", color=PINK, fillstyle="none",
            label=f"full model online, B = {m.B}")
    ax.plot(m.t[m.late], m.law * unit, label="(S6)", **PREDICTED)
    finish(ax, "Stochastic encodings: loss", "gradient steps t", "loss L/L₀, fresh encodings",
           heading=f"T = {m.T}, q = {m.q}, d = {m.d}, $d_e$ = {m.d_e}, η = {m.eta:g}")


def draw_directions(ax, m):
    for name, values, colour in zip("VW", zip(*m.cosines), (ORANGE, BLUE)):
        ax.plot(m.shown, values, "o", color=colour, label=f"{name} with the identity")
    ax.axhline(1, **PREDICTED)
    finish(ax, f"Full model online, B = {m.B}: directions", "gradient steps t",
           "cosine with the truth", "lower right", yscale="linear", ylim=(0, 1.08))


def claims_law(m):
    return [
        at_least(
            "S1",
            "Full model online, stochastic encodings: cosines of V and W with the truth after "
            f"{m.online_steps} steps, (T, q, d, d_e, B) = {m.T, m.q, m.d, m.d_e, m.B}.",
            m.cosines[-1], 0.98, source="paper"),
        agrees(
            "S6", "Population descent of the two scalars, stochastic encodings: the loss on fresh "
            f"draws over (S6), from twice T/eta on, (T, q, d, d_e) = {m.T, m.q, m.d, m.d_e}.",
            m.loss[m.late], m.law, within=0.03),
    ]


def least_loss(rng, B, T, q, d_e, query):
    """The least L/L_0 over c on B sampled sets, its standard error, and its law (S8)-(S10)."""
    u = overlaps(rng, B, T, q, d_e, query)
    if q <= 2:
        grid = [300.0]  # the larger c, the better
    elif query == "dual":
        grid = np.linspace(0.5, 1.1, 9) * d_e / q
    else:
        grid = np.linspace(1.25, 6, 20)
    losses = [overlap_loss(c, u, q, 1) for c in grid]
    c = grid[int(np.argmin(losses))]
    loss, error = sampled(lambda rows: 2 * q * overlap_loss(c, rows, q, 1), u)
    return loss, error, stochastic_floor(T, q, 2 * q, d_e, query)


def measure_dimensions(rng, T=16, B=15_000, eps=(0.03, 0.01), sum_dims=(32, 64, 128, 256),
                   two_dims=(8, 12, 16)):
    """The least loss over c: sum and dual query at q = 3, dual query at q = 2."""
    dual_dims = [16, 24] + [required_dimension(T, 3, target) for target in eps]
    curves = []
    for query, q, dims, draws in (
            ("sum", 3, sum_dims, B), ("dual", 3, dual_dims, 4 * B), ("dual", 2, two_dims, 2 * B)):
        rows = [least_loss(rng, draws, T, q, d_e, query) for d_e in dims]
        loss, error, law = np.transpose(rows)
        curves.append(SimpleNamespace(query=query, q=q, dims=dims, loss=loss, error=error, law=law))
    return dict(curves=curves, required=dual_dims[2:])


def draw_dimensions(ax, m):
    for curve, colour in zip(m.curves, (PINK, GREEN, SKY)):
        label = f"{curve.query} query, q = {curve.q}"
        ax.plot(curve.dims, curve.loss, "o", color=colour, label=label)
        ax.plot(curve.dims, curve.law, **PREDICTED)
    for name, x, y in (("(S9)", 180, 0.08), ("(S8), an estimate", 32, 0.025), ("(S10)", 8, 0.05)):
        ax.text(x, y, name)
    finish(ax, f"Least loss over c, T = {m.T}", "dimension of the encodings $d_e$", "loss L/L₀",
           "upper right", ylim=(2e-3, 3))


def claims_dimensions(m):
    sums, dual, two = m.curves
    return [
        equals(
            "S8-eps", f"Dual query, q = 3, T = {m.T}: at d_e = {listed(m.required)}, which (S8) "
            f"requires for eps = {listed(m.eps)}, the least L/L_0 is .2 to 1 eps.",
            dual.loss[2:] / m.eps, 0.6, within=0.4),
        agrees(
            "S9", f"Sum query, q = 3, T = {m.T}: the least loss over (S9), too coarse to see "
            f"tau^2, d_e = {listed(sums.dims[2:])}.",
            sums.loss[2:], sums.law[2:], within=0.015 + 5 * (sums.error / sums.law)[2:]),
        agrees(
            "S10", f"Dual query, q = 2, T = {m.T}: the least loss over (S10), "
            f"d_e = {listed(two.dims)}.",
            two.loss, two.law, within=5 * two.error / two.law),
    ]


def least_over_dimensions(t, T, q, d, eta):
    """The d_e with the least loss (S6) after t steps, and that loss."""
    guess, _ = best_dimension(t, T, q, d, eta)
    dims = range(int(0.8 * guess), int(1.25 * guess))
    losses = [float(stochastic_trajectory(t, T, q, d, d_e, eta)[2]) for d_e in dims]
    best = int(np.argmin(losses))
    return dims[best], losses[best]


def measure_rate(rng, sizes=((64, 2, 4), (64, 1, 4), (512, 3, 6)), eta=1.0,
                 times=(1e4, 1e5, 1e6, 1e7)):
    """Closed forms: the loss of one-hot, and of stochastic encodings of the best d_e at each t."""
    t = np.array(times)
    found = [[least_over_dimensions(now, *size, eta) for now in times] for size in sizes]
    place, least = np.transpose(found, (2, 0, 1))  # sizes, times
    place_law, least_law = np.moveaxis([best_dimension(t, *size, eta) for size in sizes], 1, 0)
    return dict(
        t=t, place=place, least=least, place_law=place_law, least_law=least_law,
        one_hot=one_hot_loss_at(t, *sizes[0], eta))


def draw_rate(ax, m):
    T, q, d = m.sizes[0]
    unit = m.eta * m.t
    ax.plot(m.t, m.one_hot * unit, "^", color=GREEN, label="one-hot (C3)")
    ax.axhline((T - 1) / 4, **PREDICTED)
    ax.text(m.t[0], (T - 1) / 4 - 8, "(C4)")
    label = "stochastic, the best $d_e$ for each t (S6)"
    ax.plot(m.t, m.least[0] * unit, "o", color=BLUE, label=label)
    ax.plot(m.t, m.least_law[0] * unit, label="(S7): rises like ln t", **PREDICTED)
    finish(ax, "A natural origin of log t/t", "gradient steps t", "L η t", "upper left",
           f"closed forms, T = {T}, q = {q}, d = {d}", yscale="linear", ylim=(0, 125))


def claims_rate(m):
    late = m.t == 1e6
    at = f"at t = 10^6, (T, q, d) = {listed(m.sizes)}"
    return [
        agrees(
            "S7-least", f"The least of (S6) over d_e over its law (S7), {at}.",
            m.least[:, late], m.least_law[:, late], within=0.12),
        agrees(
            "S7-place", f"The dimension where the loss (S6) is least, over that of (S7), {at}.",
            m.place[:, late], m.place_law[:, late], within=0.06),
    ]


def measure_bounded(rng, cases=((6, 1, 10, 0.4), (12, 1, 10, 0.4)), d=3, eta=1.0, sets=400,
                    steps=10_000):
    """Population descent of the two scalars on draws with overlaps off y of at most u_max (S7)."""
    value = []
    law = []
    for T, q, d_e, u_max in cases:
        u = overlaps(rng, 4 * sets, T, q, d_e)
        bounded = u[u[:, q:].max(axis=1) < u_max + 1e-9][:sets]
        _, _, loss = final(two_scalars(lambda: bounded, q, d, d_e, eta, steps))
        value.append(loss)
        law.append(d_e / (4 * eta * (1 - u_max)**2 * steps))
    return dict(value=value, law=law)


def claims_bounded(m):
    return [
        agrees(
            "S7-bounded",
            "Stochastic encodings kept to overlaps of at most u_max off y have no floor: "
            f"L over d_e/(4 eta (1 - u_max)^2 t), t = {m.steps}, "
            f"(T, q, d_e, u_max) = {listed(m.cases)}.",
            m.value, m.law, within=0.05),
    ]


# ---- length: how far training reaches ----

def measure_reach(rng, T=32, q=2, d=16, d_e=128, eta=3.0, times=(100, 300, 1000, 3000), sets=1000,
                  B=16_000):
    """Population descent of the two scalars at length T for several times, tested at T to 64 T."""
    lengths = [T * 2**k for k in range(7)]
    frozen = overlaps(rng, sets, T, q, d_e)
    _, trained, _ = record(two_scalars(lambda: frozen, q, d, d_e, eta, times[-1]), times)
    rows = [at_lengths(rng, alpha, c, lengths, q, d, d_e, B) for alpha, c in trained]
    loss, error, law = np.moveaxis(rows, 1, 0)
    return dict(tested=lengths, loss=loss, error=error, law=law)


def draw_reach(ax, m):
    for losses, law, t, colour in zip(m.loss, m.law, m.times, (SKY, GREEN, ORANGE, BLUE)):
        ax.plot(m.tested, losses, "o", color=colour, label=f"after {t:,} steps")
        ax.plot(m.tested, law, **PREDICTED)
    finish(ax, "Training longer reaches further", "length of the test sequences", "loss L/L₀",
           "lower right", "population descent; dashed: (L1)\n"
           f"T = {m.T}, q = {m.q}, d = {m.d}, $d_e$ = {m.d_e}, η = {m.eta:g}")
    by_length(ax, m.T, m.tested)


def claims_reach(m):
    return [
        agrees(
            "L1",
            f"Trained at (T, q, d, d_e) = {m.T, m.q, m.d, m.d_e} for {listed(m.times)} steps: "
            "the loss at lengths T to 64 T over (L1).",
            m.loss, m.law, within=0.015 + 4 * m.error / m.law),
    ]


def measure_longest(rng, T=32, q=3, d=4, d_e=128, eta=2.0, times=(100_000, 200_000, 400_000,
                    1_000_000), eps=0.1, B=150, most=2400):
    """The longest sequence with a loss of eps L_0: on draws, by bisection, and by (L2)."""
    sigma2 = overlap_variance(q, d_e)
    u = overlaps(rng, B, most, q, d_e)
    found = []
    law = []
    for t in times:
        c, alpha, _ = stochastic_trajectory(t, T, q, d, d_e, eta)

        def too_long(size):
            loss, _, _ = stochastic_loss_and_grads(alpha, c, u[:, :size], q, d, d_e)
            return loss > eps * d / (2 * q)
        found.append(T - 1 + bisect.bisect_left(range(T, most), True, key=too_long))
        law.append(longest_sequence(float(c), T, q, eps, sigma2))
    return dict(found=found, law=law)


def draw_longest(ax, m):
    ax.plot(m.times, m.found, "o", color=BLUE, label=f"longest with L ≤ {m.eps:g} L₀, on draws")
    ax.plot(m.times, m.law, label="(L2), slope about 1/2", **PREDICTED)
    finish(ax, "The reach grows like the root of time", "gradient steps t", "sequence length",
           "upper left", f"T = {m.T}, q = {m.q}, d = {m.d}, $d_e$ = {m.d_e}, η = {m.eta:g}")


def claims_longest(m):
    return [
        agrees(
            "L2", f"The longest sequence with a loss of {m.eps} L_0, all above 8 T, over (L2), "
            f"(T, q, d, d_e) = {m.T, m.q, m.d, m.d_e}, t = {listed(m.times)}.",
            m.found, m.law, within=0.05),
    ]


# ---- networks: the floor of fully-connected networks ----

def best_loss(rng, m, T, q, d, tests):
    """L/L_0 of `best_fcn` of width m on samples, its standard error, and the floor (F4)."""
    inputs, target, *_ = fcn_batch(rng, tests, T, q, d)
    loss, error = with_error(fcn(*best_fcn(m, T, q, d), inputs), target, q)
    return loss, error, fcn_loss_floor(m, T, q, d) * 2 * q / d


def measure_floor(rng, T=8, q=2, d=4, widths=(1, 2, 4, 8, 16, 32), steps=1500, rate=0.02,
                  B=256, best_widths=(1, 3, 4, 9, 20, 31, 32), tests=20_000):
    """Networks trained by Adam, and `best_fcn`: test losses beside the floors (F3), (F4)."""
    inputs, target, *_ = fcn_batch(rng, tests, T, q, d)
    rows = []
    for m in widths:
        batches = (fcn_batch(rng, B, T, q, d) for _ in range(steps + 1))
        _, params, _ = final(fcn_run(rng, m, T, d, batches, rate, steps))
        loss, error = with_error(fcn(*params, inputs), target, q)
        own = fcn_first_layer_floor(params[0], T, q, d) * 2 * q / d
        rows.append((loss, error, own, fcn_loss_floor(m, T, q, d) * 2 * q / d))
    loss, error, own, floor = np.transpose(rows)
    best = [best_loss(rng, m, T, q, d, tests)[0] for m in best_widths]
    return dict(loss=loss, error=error, own=own, floor=floor, best=best)


def draw_floor(ax, m):
    grid = np.geomspace(1, 2 * m.T * m.d, 200).astype(int)
    floor = fcn_loss_floor(grid, m.T, m.q, m.d) * 2 * m.q / m.d
    ax.plot(grid, floor, label="floor of the width (F4)", **PREDICTED)
    ax.plot(m.best_widths, m.best, "D", color=GREEN, markersize=6, zorder=6, label="best_fcn (F5)")
    ax.plot(m.widths, m.own, "_", color=PINK, markersize=13, markeredgewidth=2.2,
            label="floor of its first layer (F3)")
    label = f"trained by Adam, {m.steps:,} steps"
    ax.plot(m.widths, m.loss, "o", color=BLUE, zorder=7, label=label)
    finish(ax, "Two layers reach the floor; training comes near", "neurons m", "loss L/L₀",
           heading=f"T = {m.T}, q = {m.q}, d = {m.d}, B = {m.B}", yscale="linear",
           ylim=(-0.02, 1.02))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")


def claims_floor(m):
    above = m.loss + 4 * m.error
    return [
        at_least(
            "F3", f"{len(m.widths)} trained networks, (T, q, d) = {m.T, m.q, m.d}: test loss + 4 "
            "standard errors less the floors of the layer (F3) and of the width (F4), over L_0.",
            [above - m.own, above - m.floor], 0),
    ]


def measure_best(rng, sizes=((8, 2, 4), (6, 3, 2)), shares=(0.05, 0.15, 0.3, 0.5, 0.7, 0.9),
                 tests=80_000):
    """`best_fcn` at six widths below T d, and at T d: loss over L_0, standard error, floor (F4)."""
    below = []
    full = []
    for T, q, d in sizes:
        below += [best_loss(rng, math.ceil(share * T * d), T, q, d, tests) for share in shares]
        full.append(best_loss(rng, T * d, T, q, d, tests)[0])
    loss, error, floor = np.transpose(below)
    return dict(distance=(loss - floor) / error, full=full)


def claims_best(m):
    at = f"(T, q, d) = {listed(m.sizes)}"
    return [
        equals(
            "F4-best",
            f"`best_fcn` of width m = T d times {listed(m.shares)}, rounded up, is on the "
            f"floor (F4): loss less floor in standard errors, {at}.",
            m.distance, 0, within=4),
        at_most(
            "F5", f"`best_fcn` of width T d is exact: test loss over L_0, {at}.",
            m.full, 1e-15),
    ]


def measure_width(rng, q=2, d=8, eps=0.1, lengths=(16, 128, 1024), B=1000):
    """The width needed for L <= eps L_0: networks by (F4), the transformer by draws and (S10)."""
    level = eps * d / (2 * q)
    grid = 2**np.arange(3, 13)
    network = [np.argmax(fcn_loss_floor(np.arange(T * d + 1), T, q, d) <= level) for T in grid]

    needed = []
    for T in lengths:
        def reached(d_e):
            u = overlaps(rng, B, T, q, d_e)
            return 2 * q * min(overlap_loss(c, u, q, 1) for c in (30, 100, 300)) <= eps
        needed.append(q + bisect.bisect_left(range(q, 60), True, key=reached))
    required = [required_dimension(T, q, eps) for T in lengths]
    return dict(grid=grid, network=network, needed=np.array(needed), required=np.array(required))


def draw_width(ax, m):
    ax.plot(m.grid, m.network, **PREDICTED)
    ax.plot(m.lengths, m.d + m.required, **PREDICTED)
    ax.plot(m.lengths, m.d + m.needed, "*", color=RED, markersize=11, label="transformer, on draws")
    ax.text(400, 4500, "network (F4)", ha="right")
    ax.text(400, 17, "transformer (S10)", ha="center")
    finish(ax, f"Width needed for L/L₀ ≤ {m.eps}", "sequence length T", "width", "upper left",
           f"q = {m.q}, d = {m.d}", ylim=(10, 3e5))


def claims_width(m):
    return [
        equals(
            "S10-dimension",
            f"The least d_e for L/L_0 <= {m.eps} is that of (S10), which grows like "
            f"log T: q = {m.q}, T = {listed(m.lengths)}.",
            m.needed, m.required, within=1),
    ]


# ---- open: the paper's open question, one fixed set of encodings (G) ----

def measure_fixed(rng, sizes=((32, 24, 1), (32, 32, 1), (32, 48, 1), (12, 20, 2)), d=4, eta=1.5,
                  steps=2000):
    """Population descent on single sets of random signs; the laws of its start and its end."""
    t = log_steps(steps)
    runs = []
    for T, d_e, q in sizes:
        E = random_sign_encoding(rng, d_e, T)
        _, models, loss = record(set_descent(E, q, d, eta, steps), t)
        W_star = widest_margin(E, q)
        early = one_hot_loss_at(t, T, q, d, eta, d_e)
        late = fixed_set_loss_at(t, W_star, eta)
        runs.append(np.array([loss, early, late]) * 2 * q / d)
    targets = {"the end: W* (G2)": W_star, **directions(E)}  # of the last set
    cosines = {name: [cosine(W, target) for _, W in models] for name, target in targets.items()}
    return dict(t=t, runs=runs, cosines=cosines)


def directions(E):
    """The identity, the projector on the span of E, and the start of descent (G1)."""
    return {
        "identity": np.eye(len(E)),
        "projector on the span of E": E @ np.linalg.pinv(E, rcond=1e-10),
        "the start: E (I - 11ᵀ/T) Eᵀ (G1)": E @ (E - E.mean(axis=1, keepdims=True)).T,
    }


def draw_fixed(ax, m):
    for (T, d_e, q), run, colour in zip(m.sizes, m.runs, (RED, GREEN, BLUE, PINK)):
        loss, early, late = run
        ax.plot(m.t, loss, "o", color=colour, label=f"T = {T}, $d_e$ = {d_e}, q = {q}")
        if q == 1:
            ax.plot(m.t[early > 0.1], early[early > 0.1], **PREDICTED)
        ax.plot(m.t[late < 0.1], late[late < 0.1], **PREDICTED)
    finish(ax, "One fixed set: loss on the set", "gradient steps t", "loss L/L₀",
           heading=f"population descent, d = {m.d}, η = {m.eta:g}\ndashed: early (G1), late (G2)")


def draw_where(ax, m):
    T, d_e, q = m.sizes[-1]
    looks = zip(m.cosines.items(), "osv^", (BLUE, SKY, GREEN, ORANGE))
    for (name, cosines), look, colour in looks:
        ax.plot(m.t, cosines, look, color=colour, label=name)
    finish(ax, "Where W points", "gradient steps t", "cosine of W with", "lower center",
           f"T = {T}, $d_e$ = {d_e}, q = {q}, d = {m.d}, η = {m.eta:g}", yscale="linear",
           ylim=(0.2, 1.02))


def measure_start(rng, T=96, dims=(48, 96, 144), q=1, d=3, eta=1.5, levels=(0.9, 0.5)):
    """q = 1: the steps that descent on a fixed random set takes to the levels, and by (G1)."""
    steps = []
    law = []
    wanted = np.array(levels) * d / (2 * q)
    t = np.arange(2 * T**2)
    for d_e in dims:
        law.append(np.interp(-wanted, -one_hot_loss_at(t, T, q, d, eta, d_e), t))
        E = random_sign_encoding(rng, d_e, T)
        descent = set_descent(E, q, d, eta, int(1.2 * max(law[-1])))
        loss = np.array([loss for _, _, loss in descent])
        steps.append([int((loss > level).sum()) for level in wanted])
    return dict(steps=steps, law=law)


def claims_start(m):
    return [
        agrees(
            "G1",
            f"On fixed random sets population descent reaches {listed(m.levels)} of L_0 in the "
            "steps of the one-hot law with T d_e/(T + d_e) for T - 1: ratio, "
            f"q = {m.q}, T = {m.T}, d_e = {listed(m.dims)}.",
            m.steps, m.law, within=0.05),
    ]


def different_signs(rng, d_e, T):
    """Random signs of which no two encodings are equal: for those there is no W*."""
    while True:
        E = random_sign_encoding(rng, d_e, T)
        if len(np.unique(E.T, axis=0)) == T:
            return E


def measure_end(rng, sizes=((6, 12), (8, 12), (10, 8)), repeats=2, q=1, d=32, eta=1.5, steps=3000):
    """q = 1: the end of descent on random sets, none selected; and on a set without a W*."""
    ratios = []
    cosines = []
    others = []
    for T, d_e in repeats * sizes:
        E = different_signs(rng, d_e, T)
        W_star = widest_margin(E, q)
        _, (_, W), loss = final(set_descent(E, q, d, eta, steps))
        ratios.append(loss / fixed_set_loss_at(steps, W_star, eta))
        cosines.append(cosine(W, W_star))
        others.append(max(cosine(W, target) for target in directions(E).values()))

    E[:, 1] = E[:, 0]
    _, _, stuck = final(set_descent(E, q, d, eta, steps))
    return dict(ratios=ratios, cosines=cosines, others=others, stuck=stuck * 2 * q / d * T)


def claims_end(m):
    sets = f"{m.repeats} random fixed sets at each (T, d_e) = {listed(m.sizes)}, q = {m.q}"
    return [
        equals(
            "G2",
            f"On {sets}, d = {m.d}, none selected but that no two encodings are equal, the loss "
            f"after {m.steps} steps over ||W*||^2/(4 eta t), W* the widest margin.",
            m.ratios, 1, within=0.05),
        at_least(
            "G2-direction",
            "On the same sets the cosine of W with W* ends above .95 and above those "
            "with I, the projector on the span of E and the start (G1).",
            m.cosines, np.maximum(0.95, m.others)),
        equals(
            "G3",
            "On the last of them, with two encodings made equal, so that no W* exists, descent "
            "stops at L_0/T: T L/L_0.",
            m.stuck, 1, within=0.01),
    ]


# ---- the table of experiments: each is one figure ----

# To add one, write measure_NAME(rng, settings=...), which returns a dictionary of what it found;
# draw_NAME(ax, m) for each panel and claims_NAME(m), a list of rows of `equals`, `agrees`,
# `at_most`, `at_least`, where m has settings and findings by name (so no name may be both); and a
# part here. Panels stand in the order of the parts, and figures in that of the table; the name of
# a measurement is part of its seed. What follows claims= is what --quick changes; the settings of
# the figure are the defaults of the measurement.

def part(measure, *draws, claims=lambda m: [], **quick):
    """A measurement, the panels that show it, its claims; what --quick changes in its settings."""
    return SimpleNamespace(measure=measure, draws=draws, claims=claims, quick=quick)


EXPERIMENTS = {
    "story": [  # panels 1 and 2; no panel; panel 3; panel 4
        part(measure_losses, draw_losses, draw_learned, claims=claims_losses,
             lengths=(16, 64), steps=3000, runs=2, online_steps=500),
        part(measure_closed_form, claims=claims_closed_form, sizes=((64, 4, 8),)),
        part(measure_kinds, draw_kinds, claims=claims_kinds,
             steps=800, draws=300, fixed_steps=250, B=1300),
        part(measure_same_samples, draw_same_samples, claims=claims_same_samples,
             steps=250, tests=2000),
    ],
    "one_hot": [
        part(measure_escape, draw_escape, claims=claims_escape, lengths=(64, 128), steps=3000),
        part(measure_line, claims=claims_line),
        part(measure_step, draw_step, claims=claims_step, steps=400, B=128),
        part(measure_sideways, claims=claims_sideways),
        part(measure_noise, claims=claims_noise, batches=40),
    ],
    "learning": [
        part(measure_blocks,
             functools.partial(draw_block, k=0, which=0),
             functools.partial(draw_block, k=0, which=1), draw_norms,
             functools.partial(draw_block, k=1, which=0),
             functools.partial(draw_block, k=1, which=1), draw_cosines,
             claims=claims_blocks, steps=400),
    ],
    "stochastic": [
        part(measure_law, draw_law, draw_directions, claims=claims_law,
             T=16, d=4, d_e=48, eta=1.5, sets=800, steps=400, online_steps=200),
        part(measure_dimensions, draw_dimensions, claims=claims_dimensions, B=4000),
        part(measure_rate, draw_rate, claims=claims_rate),
        part(measure_bounded, claims=claims_bounded, cases=((6, 1, 10, 0.4),), steps=3000, eta=1.8),
    ],
    "length": [
        part(measure_reach, draw_reach, claims=claims_reach, times=(60, 120, 240), B=2000),
        part(measure_longest, draw_longest, claims=claims_longest,
             times=(100_000, 300_000), most=1000),
    ],
    "networks": [
        part(measure_floor, draw_floor, claims=claims_floor,
             widths=(4, 8), steps=400, tests=8000),
        part(measure_best, claims=claims_best, tests=20_000),
        part(measure_width, draw_width, claims=claims_width, lengths=(16, 64)),
    ],
    "open": [
        part(measure_fixed, draw_fixed, draw_where, sizes=((16, 24, 1), (6, 20, 2)), steps=300),
        part(measure_start, claims=claims_start, T=80, dims=(40, 80)),
        part(measure_end, claims=claims_end, sizes=((6, 12),), steps=2000),
    ],
}


# ---- 4. the command line: each experiment in a process of its own ----

CHILD = "RUN_ALL_CHILD"  # in the environment of a process that runs one experiment
STARTS = "line", "zero"  # of the trace
SETTINGS = "T", "q", "d", "d_e", "m", "eta"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # then sums keep their order


def draw_figure(panels, path, dpi):
    """A picture of panels, each a function and the measurement that it draws."""
    import matplotlib  # in a child, and nowhere else
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
    matplotlib.rcParams.update(STYLE)
    rows = 1 if len(panels) <= 3 else 2
    size = (11, 2.6 + 1.6 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, -(-len(panels) // rows), squeeze=False)
    for ax, (draw, m) in zip(axes.ravel(), panels):
        draw(ax, m)
    figure.savefig(path, dpi=dpi)


def run_experiment(name, seed, quick, folder):
    """In a child: measure, draw, check; the picture and the claims go into the folder."""
    panels = []
    claims = []
    for item in EXPERIMENTS[name]:
        rng = np.random.default_rng([seed, *item.measure.__name__.encode()])
        call = inspect.signature(item.measure).bind(rng, **(item.quick if quick else {}))
        call.apply_defaults()
        found = item.measure(**call.arguments)
        m = SimpleNamespace(**call.arguments, **found)
        panels += [(draw, m) for draw in item.draws]
        claims += item.claims(m)
    draw_figure(panels, folder / f"{name}.png", dpi=75 if quick else 150)
    (folder / f"{name}.json").write_text(json.dumps(claims))


def side_by_side(commands, cores, folder):
    """Run commands, by name, as many at a time as there are cores; yield (name, status, seconds).

    What they print goes into the folder. On any way out those still at work are ended.
    """
    waiting = list(commands)
    running = {}
    environment = {**os.environ, **ONE_THREAD, CHILD: "1", "MPLBACKEND": "agg"}
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                name = waiting.pop(0)
                with open(folder / f"{name}.txt", "w") as said:
                    process = subprocess.Popen(
                        commands[name], env=environment, stdin=subprocess.PIPE, stdout=said,
                        stderr=said, start_new_session=True)  # Ctrl-C is for this process alone
                running[name] = process, time.monotonic()
                print("running:", ", ".join(running), flush=True)
            time.sleep(0.02)
            for name, (process, start) in list(running.items()):
                if process.poll() is not None:
                    process.communicate()  # closes its input
                    del running[name]
                    yield name, process.returncode, time.monotonic() - start
    finally:
        for process, _ in running.values():
            with process:  # closes its input, and waits
                process.terminate()


def failure(name, status, folder):
    """Why a child failed, in one line: the signal that killed it, or the last line it printed."""
    if status < 0:
        return f"{name}: killed by signal {-status}; perhaps memory ran out"
    said = (folder / f"{name}.txt").read_text(errors="replace").strip()
    return f"{name}: {(said.splitlines() or [status])[-1]}"


def run(names, options, out, folder):
    """Run experiments; write figures and claims.csv; the status is 0 only if all claims hold."""
    settings = ["--seed", str(options.seed), "--out", str(folder)] + ["--quick"] * options.quick
    commands = {}
    for name in names:
        commands[name] = [sys.executable, str(SCRIPT), "--only", name, *settings]

    rows = {}
    failed = None
    with contextlib.closing(side_by_side(commands, available_cores(), folder)) as ended:
        for name, status, seconds in ended:
            if status:
                failed = failure(name, status, folder)
                break
            rows[name] = json.loads((folder / f"{name}.json").read_text())
            held = sum(row["verdict"] == "ok" for row in rows[name])
            print(f"{name}: {held} of {len(rows[name])} claims hold, {seconds:.1f} s", flush=True)

    claims = []
    for name in names:
        claims += [{**row, "seed": options.seed} for row in rows.get(name, [])]
    return report(claims, failed, out, folder)


def report(claims, failed, out, folder):
    """Print the claims; put them and the figures in place unless a child failed; the status."""
    width = None
    if sys.stdout and sys.stdout.isatty():
        width = (shutil.get_terminal_size().columns or 80) - 1  # some terminals say 0
    for row in [dict(zip(COLUMNS, COLUMNS)), *claims]:
        line = "{id:14} {verdict:7} {predicted:16} {measured:11} {tolerance:9} {statement}"
        print(line.format(**row)[:width])

    held = sum(row["verdict"] == "ok" for row in claims)
    if failed:
        print(f"{held} of {len(claims)} claims hold")
        print(f"run_all.py: {failed}", file=sys.stderr)
        return 1
    with open(folder / "claims.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(claims)
    os.replace(folder / "claims.csv", out / "claims.csv")
    for number, name in enumerate(EXPERIMENTS, 1):
        if (folder / f"{name}.png").exists():
            os.replace(folder / f"{name}.png", out / f"{number}_{name}.png")
    print(f"{held} of {len(claims)} claims hold; figures and claims.csv are in {out}")
    return int(held < len(claims))


def available_cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse(argv):
    """The parser and the options; a bad one ends in one line and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="run_all.py", allow_abbrev=False,
        description="Run the experiments, draw the figures, check the claims.",
        epilog=f"experiments: {', '.join(EXPERIMENTS)}")
    parser.error = lambda message: parser.exit(2, f"run_all.py: {' '.join(message.split())}\n")
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller work, the same claims")
    add("--only", metavar="NAME[,NAME]", help="run these experiments alone")
    add("--seed", type=int, default=0, help="of every random number (default 0)")
    add("--out", type=Path, metavar="DIR",
        help="folder of figures and claims.csv (default: figures; with --quick or --only: "
        "figures/partial)")
    add("--trace", type=int, metavar="N", help="print N updates beside their derivation")
    add("--model", choices=TRACES, help="default one-hot")
    add("--start", choices=STARTS, help="where descent starts: zero is the paper's start")
    add("--full", action="store_true", default=None, help="print every entry")
    add("--mine", metavar="FILE", help="your own functions in place of the code's")
    for name in SETTINGS:
        add(f"--{name}", type=float if name == "eta" else int)
    options = parser.parse_args(argv)

    options.names = list(EXPERIMENTS) if options.only is None else options.only.split(",")
    for name in options.names:
        if name not in EXPERIMENTS:
            parser.error(f"--only must name experiments of {', '.join(EXPERIMENTS)}; got {name!r}")
    if options.seed < 0:
        parser.error(f"--seed must be an integer >= 0; got {options.seed}")
    given = [name for name in ("model", "start", "full", "mine", *SETTINGS)
             if getattr(options, name) is not None]
    if given and options.trace is None:
        parser.error(f"--{', --'.join(given)} must go with --trace N; got no --trace")
    if options.trace is not None and not 1 <= options.trace <= 10**6:
        parser.error(f"--trace must be an integer from 1 to 10^6; got {options.trace}")
    return parser, options


def main(argv=None):
    """The command line; returns the exit status."""
    parser, options = parse(argv)
    if options.trace is not None:
        return main_trace(parser, options)
    if CHILD in os.environ:
        threading.Thread(target=end_with_parent, daemon=True).start()
        run_experiment(options.names[0], options.seed, options.quick, options.out)
        return 0

    names = [name for name in EXPERIMENTS if name in options.names]
    partial = "partial" if options.quick or options.only else ""
    out = options.out or SCRIPT.parent / "figures" / partial
    try:
        out.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=".", dir=out)
    except OSError as error:
        parser.error(f"--out must be a folder that can be written; got {out} ({error.strerror})")
    with beside as folder:
        return run(names, options, out, Path(folder))


def end_with_parent():
    """In a child: its input ends when the parent does, in whatever way, and so does the child."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def main_trace(parser, options):
    """The trace: 0 if all lines agree, 1 if one does not or descent diverges, 2 for bad options."""
    settings = {name: getattr(options, name) for name in SETTINGS
                if getattr(options, name) is not None}
    try:
        return trace(
            options.model or "one-hot", options.trace, settings, options.seed,
            options.start or "line", bool(options.full), options.mine)
    except ValueError as error:
        parser.error(str(error))
    except ArithmeticError as error:  # a descent that diverges
        print(f"run_all.py: {error}", file=sys.stderr)
        return 1


STOPPING = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]


def interrupted(number, frame):
    """Ctrl-C, a batch queue's SIGTERM, a closed terminal: later ones are ignored meanwhile."""
    for signal_number in STOPPING:
        signal.signal(signal_number, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def script():
    """main() as a command: one line for an interrupt, a full disk, a reader that has gone.

    Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt (`interrupted`). On its way out
    `side_by_side` ends the children and `main` removes the hidden folder of their results. Figures
    and claims.csv stay as they were, unless they are just being put in place. The status is 130,
    143 or 129.
    """
    if CHILD not in os.environ and "IPython" not in sys.modules:  # as in %run: it has its own
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, interrupted)
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # an odd path
        try:
            return main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print("run_all.py: interrupted", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except OSError as error:
        if sys.stdout is not None:  # what is left in it must not be tried again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"run_all.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(script())
