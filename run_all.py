"""Run every experiment, draw its figure, check its claims: `python run_all.py`. Print each update of descent
beside its derivation: `python run_all.py --trace 2 --model attention`.
An experiment is a function whose keywords are its settings; it returns panels, title -> draw(ax), and claims.
"""
import os
import signal
import sys

unfinished = []  # folders that an interrupt must remove


def interrupted(*_):
    """Ctrl-C: one line, at any moment, however often."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(2, b"\n" * sys.stderr.isatty() + b"run_all.py: interrupted\n")
    for folder in unfinished:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(130)  # and the workers with it


script = __name__ == "__main__" and "IPython" not in sys.modules
if script and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, interrupted)  # before the imports, which take a moment
    os.environ["OMP_NUM_THREADS"] = "1"  # no thread of NumPy's may take the signal

import argparse
import bisect
import collections
import contextlib
import csv
import functools
import io
import itertools
import math
import multiprocessing
import shutil
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np

import sparse_token_selection as lib
from analytic_grads import (attention_lines, attention_loss_and_grads, fcn_lines, fcn_loss_and_grads, softmax,
                            one_hot_loss_and_grads, population_loss_and_grads, stochastic_loss_and_grads)

# Okabe and Ito's colours: safe for colour-blind readers
BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
STYLE = {"font.size": 11, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False,
         "axes.spines.right": False, "axes.titlesize": 11.5, "lines.markersize": 4.5, "legend.frameon": False,
         "legend.fontsize": 9, "legend.title_fontsize": 9, "legend.labelspacing": 0.3}
PREDICTED = {"color": "black", "linestyle": "--", "linewidth": 1.3, "zorder": 5}
COLUMNS = ("id", "statement", "source", "predicted", "measured", "tolerance", "verdict")  # of claims.csv


# ---- the trace: every update beside its derivation -----------------------------------------------------
TOLERANCE = 1e-12  # of the largest entry or term of a line
ATTENTION = ("(A1) s = Z^T W z_q", "(A2) a = softmax(s)", "(A3) f = V Z a", "(A4) r = f - target",
             "(A4) loss = ||r||^2 / 2", "(A5) grad_V = r (Z a)^T", "(A6) g = Z^T V^T r",
             "(A7) grad_s = a * (g - <a, g>)", "(A8) grad_W = Z grad_s z_q^T",
             "(A5) V <- V - eta/B grad_V", "(A8) W <- W - eta/B grad_W")
NETWORK = ("(F1) pre = W1 x + b1", "(F1) hidden = relu(pre)", "(F1) f = A hidden + b2", "(F1) r = f - target",
           "(F1) loss = ||r||^2 / 2", "(F2) grad_A = r hidden^T", "(F2) grad_b2 = r",
           "(F2) delta = (A^T r) relu'(pre)", "(F2) grad_W1 = delta x^T", "(F2) grad_b1 = delta",
           *(f"(F2) {name} <- {name} - eta/B grad_{name}" for name in ("A", "b2", "W1", "b1")))


def attention_forward(V, W, Z, z_query, target, s=None, a=None):
    """(A1)-(A4) a second time: by einsum, for complex numbers, from s or from a on where that is given."""
    s = np.einsum("bdt,de,be->bt", Z, W, z_query) if s is None else s
    weights = np.exp(s - s.real.max(axis=1, keepdims=True))
    a = weights / weights.sum(axis=1, keepdims=True) if a is None else a
    f = np.einsum("cd,bdt,bt->bc", V, Z, a)
    return dict(s=s, a=a, f=f, r=f - target, loss=((f - target)**2).sum() / 2)


def fcn_forward(W1, b1, A, b2, inputs, target, pre=None, hidden=None):
    """(F1) a second time, likewise; for complex numbers it is the linear piece that is active."""
    pre = np.einsum("mn,bn->bm", W1, inputs) + b1 if pre is None else pre
    hidden = np.where(pre.real > 0, pre, 0) if hidden is None else hidden
    f = np.einsum("dm,bm->bd", A, hidden) + b2
    return dict(pre=pre, hidden=hidden, f=f, r=f - target, loss=((f - target)**2).sum() / 2)


def both_sides(lines, forward, params, data, mirror, slopes, after, rate):
    """The code's lines; a separate forward pass and complex-step slopes of its loss; the size of terms."""
    at = params | data
    code, other, size = lines(**at), forward(**at), {}
    for name, slope in ({name: f"grad_{name}" for name in params} | slopes).items():
        other[slope] = complex_step(lambda x: forward(**at | {name: x})["loss"], (at | other)[name])
    # r = f - target and all that follows from it shrink, the rounding of f and target does not. Where f is
    # mirrored the two add: lines there are as large as their terms are here.
    for name, mirrored in lines(**at | {name: -params[name] for name in mirror}).items():
        size[name] = np.maximum(abs(code[name]), abs(mirrored))
    size["loss"] = np.vdot(abs(code["r"]) + TOLERANCE * size["r"], size["r"])  # d(r^2 / 2) = r dr
    for name, new in zip(params, after):
        code[name], other[name] = new, params[name] - rate * other[f"grad_{name}"]
        size[name] = np.maximum(abs(params[name]), rate * size[f"grad_{name}"])
    return code, other, size


def trace_attention(rng, steps, B=2, *, T=4, q=2, d=2, eta=0.5):
    """Full model, one-hot encodings, from V = W = 0; sample_batch(np.random.default_rng(seed), 2, T, q, d)
    code: attention_lines, loss and grad_ summed over the batch; complex step: a separate forward pass"""
    lib.require((T + d)**2 <= 2500, "the number of entries of W", "at most 2500", (T + d)**2)
    data = dict(zip(("Z", "z_query", "target"), on_samples(np.eye(T), *lib.sample_batch(rng, B, T, q, d))))
    descent = descend(attention_loss_and_grads, data.values, (d, d + T), d + T, eta, steps)
    for (t, (V, W), _), (_, after, _) in itertools.pairwise(descent):
        code, other, size = both_sides(attention_lines, attention_forward, dict(V=V, W=W), data, ["V"],
                                       {"a": "g", "s": "grad_s"}, after, eta / B)
        size["grad_s"] = size["a"] * size["g"]             # where attention is sharp, g - <a, g> shrinks too
        size["grad_W"] = np.einsum("bdt,bt,be->de", abs(data["Z"]), size["grad_s"], abs(data["z_query"]))
        size["W"] = np.maximum(size["W"], eta / B * size["grad_W"])
        yield f"step {t}", ATTENTION, code, other, size


def trace_fcn(rng, steps, B=4, *, T=3, q=1, d=2, m=5, eta=0.1):
    """W1, b1, A, b2 = init_fcn(rng, m, T, d) and sample_batch(rng, 4, T, q, d), rng = default_rng(seed)
    code: fcn_lines, loss and grad_ summed over the batch; complex step: a separate forward pass"""
    lib.require(m * (T * d + T) <= 5000, "the number of entries of W1", "at most 5000", m * (T * d + T))
    params, (inputs, target, _, _) = lib.init_fcn(rng, m, T, d), fcn_batch(rng, B, T, q, d)
    descent = lib.gradient_descent(params, lambda *now: fcn_loss_and_grads(*now, inputs, target), eta, steps)
    for (t, params, _), (_, after, _) in itertools.pairwise(descent):
        params, data = dict(zip(("W1", "b1", "A", "b2"), params)), dict(inputs=inputs, target=target)
        code, other, size = both_sides(fcn_lines, fcn_forward, params, data, ["A", "b2"],
                                       {"hidden": "from hidden", "pre": "from pre"}, after, eta / B)
        other["delta"] = np.array([other["from hidden"] * (other["pre"] > 0), other["from pre"]])
        kink = abs(other["pre"]) < 1e-6                    # relu has no derivative there: nothing to compare
        row = kink.any(axis=0)
        unsure = {"delta": kink, "grad_W1": row[:, None], "grad_b1": row, "W1": row[:, None], "b1": row}
        other |= {name: np.where(where, code[name], other[name]) for name, where in unsure.items()}
        note = f", {kink.sum()} at kink" if kink.any() else ""
        yield f"step {t}", [line + note * (line.split()[1] in unsure) for line in NETWORK], code, other, size


def beside_two_scalars(lines, scalars, whole, C, d, eta, steps, query=""):
    """Descent of V and W on a whole population beside V = alpha I and W = c C, moved by `scalars`."""
    (E, e_query, selected), identity, alpha, c = whole, np.eye(d), 0.0, 0.0
    u, on_y = (e_query[:, None, :] @ E)[:, 0, :], selected / selected[0].sum()
    descent = descend(population_loss_and_grads, lambda: whole, (d, d), len(C), eta, steps)
    for (t, (V, W), loss), (_, (new_V, new_W), _) in itertools.pairwise(descent):
        title = f"{query}step {t}: V = {alpha:.6g} I, W = {c:.6g} C"
        _, grad_V, grad_W = population_loss_and_grads(V, W, *whole)
        law, grad_alpha, grad_c = scalars(alpha, c, u)
        (mirrored, terms_V, _), a = scalars(-alpha, c, u), softmax(c * u)          # (P1)-(P4) shrink as well
        terms_W = (abs(alpha * u) * a * (abs(alpha) * a + on_y)).sum(axis=1).mean() * d / len(C)
        size = dict(loss=math.sqrt(law * mirrored) + TOLERANCE * mirrored, grad_V=abs(terms_V),
                    grad_W=terms_W, rest=terms_W, W=eta * terms_W)
        code = dict(loss=loss, grad_V=grad_V, grad_W=grad_W, V=new_V, W=new_W,
                    rest=grad_W - np.trace(grad_W) / max(1, np.trace(C)) * C)
        alpha, c = alpha - eta * grad_alpha, c - eta * grad_c
        other = dict(loss=law, grad_V=grad_alpha * identity, grad_W=grad_c * C, V=alpha * identity, W=c * C)
        yield title, lines, code, other, size


def trace_one_hot(rng, steps, *, T=8, q=3, d=5, eta=0.5):
    """One-hot encodings, all subsets y, from V = W = 0; C = I - 11^T/T, p is attention on y, N = ||a||^2
    code: population_loss_and_grads; derived: one_hot_loss_and_grads; above largest_stable_eta they part"""
    lib.require(T * math.comb(T, q) < 10**6, "T times all subsets", "below 10^6", float(T * math.comb(T, q)))
    lines = ["(O2) loss = d/2 ((1 - alpha p)^2/q + ..)", "(O3) grad_V = (alpha N - p/q) I",
             "(O4) grad_W = -p (1-p) Delta/(T-1) C", "(O1) rest of grad_W, off C, = 0",
             "(O3) V <- V - eta grad_V = alpha I", "(O4) W <- W - eta grad_W = omega C"]
    if d * T <= 16:
        tokens, lines = all_signs(d, T) * d**0.5, lines + ["(A9) grad_V_2 = 0 now", "(A9) grad_W_12 = 0 now"]
    else:
        yield f"(A9) is left out: 2^{d * T} signs of tokens, above 2^16 (try --T 4 --d 2)", (), {}, {}, {}
    for title, _, code, other, size in beside_two_scalars(
            lines, lambda alpha, omega, _: one_hot_loss_and_grads(alpha, omega, T, q, d),
            on_population(np.eye(T), lib.all_subsets(T, q), "sum"), np.eye(T) - 1 / T, d, eta, steps):
        if d * T <= 16:                                    # at the new V and W, y = {1 ... q}, in pieces
            model = lib.in_full_model(code["V"], code["W"])
            parts = [attention_lines(*model, *on_samples(np.eye(T), X, lib.first_subset(len(X), T, q), "sum"))
                     for X in np.array_split(tokens, -(-len(tokens) // 4096))]
            code["grad_V_2"] = sum(part["grad_V"][:, d:] for part in parts) / len(tokens)
            code["grad_W_12"] = sum(part["grad_W"][:d, d:] for part in parts) / len(tokens)
            size["grad_V_2"] = max(abs(part["r"]).max() * part["a"].max() for part in parts)
            size["grad_W_12"] = max(abs(part["grad_s"]).sum(axis=1).max() for part in parts)
        yield title, lines, code, other, size


def trace_signs(rng, steps, *, T=3, q=2, d=2, d_e=2, eta=0.5):
    """Stochastic encodings, all signs, dual and sum query, y = {1 ... q}, from V = W = 0; C = I, means N, p
    code: population_loss_and_grads; derived: stochastic_loss_and_grads"""
    lib.require(d_e * T <= 16, "the number of sign patterns", "at most 2^16", f"2^{d_e * T}")
    E = all_signs(d_e, T)
    lines = ("(P1) loss", "(S2) grad_V = (alpha N - p/q) I", "(S3) grad_W = E<u, grad_s>/d_e C",
             "(S1) rest of grad_W, off C, = 0", "(S2) V <- V - eta grad_V = alpha I",
             "(S3) W <- W - eta grad_W = c C")
    for query in lib.QUERIES:
        yield from beside_two_scalars(
            lines, lambda alpha, c, u: stochastic_loss_and_grads(alpha, c, u, q, d, d_e),
            on_population(E, lib.first_subset(len(E), T, q), query), np.eye(d_e), d, eta, steps, f"{query}, ")


TRACES = {"attention": trace_attention, "fcn": trace_fcn, "one-hot": trace_one_hot, "stochastic": trace_signs}


def trace(model, steps, settings, seed=0):
    """Print the lines of so many updates; the exit status is 0 only if both sides agree in each of them."""
    options, text, count, worst = TRACES[model].__kwdefaults__, TRACES[model].__doc__ or "", 0, 0.0
    for name, value in settings.items():
        lib.require(name in options, f"--{name}", f"left out: {model} has --{', --'.join(options)}", value)
        lib.require(0 < value < (math.inf if name == "eta" else 1001), name, "above 0, sizes to 1000", value)
    options = options | settings
    lib.require(options["q"] <= options["T"], "q", f"at most T = {options['T']}", options["q"])
    heading = [", ".join(f"{name} = {value:g}" for name, value in (options | {"seed": seed}).items()),
               text.replace("    ", ""), "shown: first two entries that are not 0; difference: largest "
               "of all, over the line's largest entry or term", f"\n{'':42}{'code':28}"
               f"{'derived' if 'derived' in text else 'complex step':28}difference", ""]
    with np.errstate(all="ignore"):                        # a run that diverges ends in one line
        for title, lines, code, other, size in TRACES[model](np.random.default_rng(seed), steps, **options):
            print(*heading, title, sep="\n")
            heading = [""]
            for line in lines:
                name = line.split()[1]
                here, there = np.broadcast_arrays(code[name], other.get(name, 0.0))
                gap, scale = np.max(abs(here - there)), max(np.max(abs(here)), np.max(size.get(name, 0.0)))
                share = np.nan_to_num(gap / scale, nan=math.inf) if gap != 0 else 0.0
                first = np.argsort(abs(here).ravel() <= TOLERANCE * scale, kind="stable")[:2]
                here, there = ("".join(f" {x:13.7g}" for x in x.ravel()[first] + 0.0) for x in (here, there))
                print(f"{line:40}{here:28}{there:28}{share:9.1e}{' <--' if share > TOLERANCE else ''}")
                count, worst = count + 1, max(worst, share)
    print(f"\n{count} lines compared, largest difference {worst:.1e} of a line's largest entry or term")
    return int(worst > TOLERANCE)


# ---- claims, panels and what the experiments share ------------------------------------------------------

def claim(id, text, measured, *, equals=None, within=0.0, at_most=None, at_least=None, source="derived here"):
    """A row of the table, about the worst of the values measured; one that is not finite fails it."""
    relation, wanted = next((name, value) for name, value in (
        ("equals", equals), ("at most", at_most), ("at least", at_least)) if value is not None)
    values = np.ravel(np.asarray(measured, dtype=float)) if np.size(measured) else [np.nan]
    values, wanted, within = np.broadcast_arrays(values, np.ravel(wanted), np.ravel(within))
    gap = (values - wanted) * (1 if relation == "at most" else -1)
    over = np.where(np.isfinite(gap - within), (abs(gap) if relation == "equals" else gap) - within, np.inf)
    k = over.argmax()
    return dict(zip(COLUMNS, (id, text, source, f"{relation} {wanted[k]:.6g}", f"{values[k]:.6g}",
                              f"{within[k]:.3g}", "ok" if over[k] <= 0 else "FAIL")))


def finish(ax, xlabel, ylabel, legend="lower left", heading=None, columns=1, yscale="log", **settings):
    """Scales, names of the axes, and the legend, with its place and heading."""
    ax.set(xscale="log", yscale=yscale, xlabel=xlabel, ylabel=ylabel, **settings)
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
    """The last state of a descent, the others forgotten on the way."""
    return collections.deque(states, maxlen=1).pop()


def cosine(matrix, direction):
    """The cosine of the angle between two matrices; nan where one is zero."""
    sizes = np.linalg.norm(matrix) * np.linalg.norm(direction)
    return np.vdot(matrix, direction) / sizes if sizes else math.nan


def mean_and_error(repeats):
    """The mean over repeats (the first axis) and its standard error."""
    return np.mean(repeats, axis=0), np.std(repeats, axis=0, ddof=1) / math.sqrt(len(repeats))


def complex_step(loss, x, h=1e-30):
    """dloss/dx by complex-step differentiation, entry by entry: nothing is subtracted, so nothing cancels."""
    ways = 1j * h * np.eye(np.size(x)).reshape(-1, *np.shape(x))
    return np.imag([loss(x + way) for way in ways]).reshape(np.shape(x)) / h


def gradient_errors(rng, loss_and_grads, forward, shapes, names):
    """Loss and gradients by hand, complex steps of a separate forward pass: errors over the largest entry."""
    given = {name: rng.standard_normal(shape) / 2 for name, shape in shapes.items()}
    slopes = [complex_step(lambda x: forward(**given | {name: x})["loss"], given[name]) for name in names]
    pairs, B = zip(loss_and_grads(**given), [forward(**given)["loss"], *slopes]), len(given["target"])
    return [np.max(abs(B * by_hand - other)) / np.max(abs(other)) for by_hand, other in pairs]


def on_population(E, selected, query="dual"):
    """What `population_loss_and_grads` takes after V and W: E, e_y, selected."""
    return E, lib.QUERIES[query](E, selected), selected


def on_samples(E, X, selected, query="dual"):
    """What `attention_loss_and_grads` takes after V and W: Z, z_query, target."""
    return *lib.full_inputs(X, E, lib.QUERIES[query](E, selected)), lib.sts(X, selected)


def fresh_signs(rng, selected, d_e):
    """Fresh encodings for each row of selected, as `population_loss_and_grads` takes them."""
    B, T = selected.shape
    return on_population(lib.random_sign_encoding(rng, d_e, T, B), selected)


def all_signs(d_e, T):
    """All 2^(d_e T) sets of random-sign encodings."""
    return np.array(list(itertools.product((-1, 1), repeat=d_e * T))).reshape(-1, d_e, T) / math.sqrt(d_e)


def descend(loss_and_grads, draw, V_shape, W_size, eta, steps):
    """Gradient descent on V and W from zero, at each step on the arguments that draw() gives."""
    return lib.gradient_descent((np.zeros(V_shape), np.zeros((W_size, W_size))),
                                lambda V, W: loss_and_grads(V, W, *draw()), eta, steps)


def set_descent(E, q, d, eta, steps):
    """Matrix descent on one set of encodings, the population over all subsets (P2, P4)."""
    whole = on_population(E, lib.all_subsets(E.shape[1], q))
    return descend(population_loss_and_grads, lambda: whole, (d, d), len(E), eta, steps)


def scalar_descent(times, T, q, d, eta):
    """alpha, omega and the loss at the given times of the recursion (O3, O4), as arrays."""
    _, params, loss = record(lib.one_hot_recursion(T, q, d, eta, int(max(times))), times)
    return *np.moveaxis(np.array(params), 1, 0), loss


def off_the_line(E, q, d, eta, steps):
    """Matrix descent, orthonormal encodings: largest distance from the line (O1) at the scalars (O3, O4)."""
    T = E.shape[1]
    direction = E @ (np.eye(T) - 1 / T) @ E.T
    both = zip(set_descent(E, q, d, eta, steps), lib.one_hot_recursion(T, q, d, eta, steps))
    return max(max(abs(V - alpha * np.eye(d)).max(), abs(W - omega * direction).max())
               for (_, (V, W), _), (_, (alpha, omega), _) in both)


def online(rng, E, q, d, eta, B, steps, query="sum", fresh=False):
    """Descent of the full model, V and W whole, on new samples at each step, new encodings if `fresh` (A)."""
    d_e, T = E.shape
    def draw():
        X, selected = lib.sample_batch(rng, B, T, q, d)
        return on_samples(lib.random_sign_encoding(rng, d_e, T, B) if fresh else E, X, selected, query)
    return descend(attention_loss_and_grads, draw, (d, d + d_e), d + d_e, eta, steps)


def two_scalars(draw, q, d, d_e, eta, steps):
    """alpha and c from zero, at each step on the overlaps that draw() gives: descent of V and W by (S1)."""
    return lib.gradient_descent(
        (0.0, 0.0), lambda alpha, c: stochastic_loss_and_grads(alpha, c, draw(), q, d, d_e), eta, steps)


def fcn_batch(rng, B, T, q, d, tokens="gaussian"):
    """Inputs and targets of the networks, and the tokens and subsets behind them."""
    X, selected = lib.sample_batch(rng, B, T, q, d, tokens)
    return lib.fcn_inputs(X, selected), lib.sts(X, selected), X, selected


def fcn_run(rng, m, T, d, batches, rate, steps, start=0.3):
    """Adam on a network of width m, a batch a step, from .3 of the usual start: wide ones learn sooner."""
    return lib.gradient_descent(tuple(start * param for param in lib.init_fcn(rng, m, T, d)), lib.adam(
        lambda *params: fcn_loss_and_grads(*params, *next(batches)[:2]), steps), rate, steps)


# ---- 1. one-hot encodings: the exact law (O, C) --------------------------------------------------------

def over_law(T, q, d, eta, until):
    """From t = 3T/eta until so many escapes: t in escapes, and |log(loss of (O3, O4) over (C3))|."""
    escape = lib.escape_time(T, q, d, eta)
    t = log_steps(until * escape, 200, 3 * T / eta)
    return t / escape, abs(np.log(scalar_descent(t, T, q, d, eta)[2] / lib.one_hot_loss_at(t, T, q, d, eta)))


def full_over_law(rng, T, q, d, B, steps, factor):
    """The full model online at `factor` times the largest stable eta: its loss over (C3), late."""
    eta = factor * lib.largest_stable_eta(T, q, d)
    loss = [loss for _, _, loss in online(rng, np.eye(T), q, d, eta, B, steps)]
    return np.median(loss[-(steps // 5):]) / lib.one_hot_loss_at(0.9 * steps, T, q, d, eta)


def dynamics(rng, steps=30_000, lengths=(64, 128, 256, 512, 1024), long=40_000, off=1500, online_steps=400,
             laws=((64, 8, 2, 4.0, 10.5, 0.005), (64, 2, 2, 2.0, 10.5, 0.05), (256, 4, 8, 6.0, 10.5, 0.15),
                   (512, 3, 3, 5.0, 1.2, 0.05), (8, 3, 5, 0.5, 8.0, 0.12))):
    """Matrix descent, the two scalars, closed forms; laws: T, q, d, eta, escapes, tolerance on the cliff."""
    small_t, _, small_loss = record(set_descent(np.eye(8), 3, 5, 0.5, 1000), log_steps(1000, 25))
    stable = lib.largest_stable_eta(8, 3, 12, full=False)
    below, above = (off_the_line(np.eye(8), 3, 12, factor * stable, off) for factor in (0.995, 1.005))
    full = (3, 2, 1, 512), (5, 3, 12, 256)                            # T, q, d and batch size
    kept, stalled = ([full_over_law(rng, *sizes, online_steps, k) for sizes in full] for k in (0.9, 1.1))
    times = log_steps(steps, 120)
    alpha, omega, loss = scalar_descent(times, 16, 3, 5, 3.0)
    _, omegas, curves = scalar_descent(range(long + 1), np.array(lengths), 4, 8, 7.0)
    half = [np.interp(math.log((T - 4) / 4), path, range(long + 1)) for T, path in zip(lengths, omegas.T)]
    escape, errors = [lib.escape_time(T, 4, 8, 7.0) for T in lengths], [over_law(*law[:5]) for law in laws]
    def loss_panel(ax):
        shown = log_steps(long)
        for T, colour, curve in zip(lengths[::2], (BLUE, ORANGE, GREEN), curves[shown].T[::2]):
            ax.plot(shown, curve, "o", color=colour, label=f"T = {T}: scalars (O3, O4)")
            after = shown[shown > T / 7]                              # from t = T/eta on
            ax.plot(after, lib.one_hot_loss_at(after, T, 4, 8, 7.0), **PREDICTED)
        after = log_steps(1000, first=16)
        ax.plot(small_t, small_loss, "s", color=PINK, label="T = 8: matrices (P2, P4)")
        ax.plot(after, lib.one_hot_loss_at(after, 8, 3, 5, 0.5), label="predicted (C1, C3)", **PREDICTED)
        t = 6 * math.sqrt(long)
        ax.text(t, (lengths[0] - 1) / (56 * t), "(C4): (T - 1)/(4ηt)\nslope -1", ha="right", va="top")
        finish(ax, "gradient steps t", "loss L", ylim=(curves[-1, 0] / 100, None))
    def escape_panel(ax):
        unit = np.array(lengths)**2 / (7 * 8)
        ax.plot(lengths, half / unit, "o", color=BLUE, label="measured: half of the attention on y")
        ax.plot(lengths, escape / unit, label="predicted (C5)", **PREDICTED)
        finish(ax, "sequence length T", "escape time in units of T²/(ηd)", "upper right", yscale="linear",
               ylim=(0.98, 1.1 * max(half / unit)))
    def scalars_panel(ax):
        after = times[times >= 16 / 3]
        z = 13 / 3 * (5 / (6 * lib.one_hot_loss_at(after, 16, 3, 5, 3.0)) - 1)           # (C1), solved for z
        ax.plot(times, alpha, "o", color=ORANGE, label="α (V = α I)")
        ax.plot(times, omega, "o", color=BLUE, label="ω (W = ω (I - 11ᵀ/T))")
        ax.plot(after, np.log(z) / 2, label="ω predicted (C3)", **PREDICTED)
        ax.plot(times, 3 / (3 + 13 * np.exp(-omega)), "o", color=GREEN, label="p: attention on y")
        finish(ax, "gradient steps t", "value", "upper left", yscale="linear")
    at = "(T, q, d) = " + ", ".join(str(sizes[:3]) for sizes in full)
    return {"Loss: descent and closed form": loss_panel, "Escape of the attention": escape_panel,
            "The two scalars at T = 16": scalars_panel}, [
        claim("O1", "Descent of V_1 and W_22 over all subsets stays on the two scalars (O3, O4) for 1,000 "
              "steps, (T, q, d) = (8, 3, 5): largest difference.",
              off_the_line(np.eye(8), 3, 5, 0.5, 1000), at_most=1e-12),
        claim("O5", "V_1 and W_22 leave the two scalars above the step 2/lambda of (O5), not below: distance "
              f"at .5 % above over that at .5 % below, {off} steps, (T, q, d) = (8, 3, 12).", above / below,
              at_least=100),
        claim("A11-below", "At .9 of the step 2/lambda_x of (A11) the full model online follows (C3): loss "
              f"over (C3) after {online_steps} steps, {at}.", kept, at_most=3),
        claim("A11-above", "At 1.1 times 2/lambda_x of (A11), which (O5) allows, the full model stalls: loss "
              f"over (C3) after {online_steps} steps, {at}.", stalled, at_least=4),
        claim("C4", f"The loss falls like (T-1)/(4 eta t): L 4 eta t/(T-1) at t = {steps}, (T, q, d) = "
              "(16, 3, 5).", loss[-1] * 12 * steps / 15, equals=1, within=90 / steps),
        claim("C3-cliff", "The loss follows (C3) over the cliff, t >= 3T/eta: largest |log(loss over (C3))|, "
              f"(T, q, d) = {', '.join(str(law[:3]) for law in laws)}.",
              [max(error) for _, error in errors], at_most=[law[5] for law in laws]),
        claim("C3-late", "Ten escapes on the loss is within .1 % of (C3): largest |log(loss over (C3))|, "
              f"(T, q, d) = {', '.join(str(law[:3]) for law in laws if law[4] > 10)}.",
              np.hstack([error[t > 10] for t, error in errors]), at_most=0.001),
        claim("C5", "Half of the attention is on y at the time (C5), within twice its next term, d^2/(15qT): "
              f"ratio, (q, d) = (4, 8), T = {lengths[0]} to {lengths[-1]}.",
              np.divide(half, escape), equals=1, within=2 * 8**2 / (15 * 4 * np.array(lengths)))]


# ---- 2. the full model, trained online (A, P) -----------------------------------------------------------

def heat_map(ax, matrix, d):
    """The blocks of V or W, content and positions, in the colours of their signs."""
    size, middles = abs(matrix).max() or 1.0, [d / 2 - 0.5, (d + matrix.shape[1] - 1) / 2]
    ax.imshow(matrix, cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto")
    ax.axvline(d - 0.5, color="black", linewidth=0.8)
    ax.set_xticks(middles, ["x", f"position (colours ±{size:.2g})"])
    names = ["output"] if len(matrix) == d else ["x", "position"]
    ax.set_yticks(middles[:len(names)], names, rotation=90, va="center")
    ax.axhline(d - 0.5, color="black", linewidth=0.8)
    ax.grid(False)


def matrices(rng, T=32, q=3, d=4, eta=2.0, B=256, steps=2000, early=(20, 100)):
    """Position-only attention is learned: the full V and W from zero, block by block."""
    descent = online(rng, lib.one_hot_encoding(T), q, d, eta, B, steps)
    t, params, _ = record(descent, np.union1d(log_steps(steps, 50), early))
    truth, norm = lib.in_full_model(np.eye(d), np.eye(T) - 1 / T), np.linalg.norm
    cosines = [[cosine(*pair) for pair in zip(V_W, truth)] for V_W in params]
    norms = {"V₁": [norm(V[:, :d]) for V, _ in params], "W₂₂": [norm(W[d:, d:]) for _, W in params],
             "V₂": [norm(V[:, d:]) for V, _ in params], "W₁₂": [norm(W[:d, d:]) for _, W in params]}
    def cosine_panel(ax):
        for name, colour, values in zip(("V with [I, 0]", "W with I - 11ᵀ/T"), (ORANGE, BLUE), zip(*cosines)):
            ax.plot(t, values, "o", color=colour, label=name)
        ax.axhline(1, **PREDICTED)
        finish(ax, "gradient steps t", "", "lower right", yscale="linear", ylim=(0, 1.08))
    def norm_panel(ax):
        for (name, values), colour in zip(norms.items(), (ORANGE, BLUE, PINK, GREEN)):
            ax.plot(t, values, "o", color=colour, label=name)
        finish(ax, "gradient steps t", "", "upper left", columns=2, ylim=(None, 2e3))
    def maps(name, k):
        titles = [*(f"{name} at step {step}" for step in early), f"{name}, at the end"]
        return {title: functools.partial(heat_map, matrix=params[i][k], d=d)
                for title, i in zip(titles, [*np.searchsorted(t, early), -1])}
    shapes = {"V": (2, 5), "W": (5, 5), "Z": (3, 5, 4), "z_query": (3, 5), "target": (3, 2)}
    learned = f"after {steps} steps of {B} fresh samples, one-hot, (T, q, d) = {T, q, d}."
    return {**maps("V", 0), "Cosine with the ground truth": cosine_panel,
            **maps("W", 1), "Norms: V₂, W₁₂ are noise": norm_panel}, [
        claim("A-gradient", "Loss and gradients (A4, A5, A8) of attention are those of complex-step "
              "differentiation: largest error over the largest entry.",
              gradient_errors(rng, attention_loss_and_grads, attention_forward, shapes, "VW"), at_most=1e-12),
        claim("A-truth", "The full model's V and W take the directions [I, 0] and I - 11^T/T of the truth: "
              f"cosines {learned}", cosines[-1], at_least=0.998, source="paper"),
        claim("A9", "Attention looks at positions only, and no position leaks out: norms of W_12 and of V_2 "
              f"over those of W_22 and V_1 {learned}",
              [norms[cross][-1] / norms[main][-1] for cross, main in (("W₁₂", "W₂₂"), ("V₂", "V₁"))],
              at_most=0.05, source="paper")]


# ---- 3. stochastic encodings (S) -----------------------------------------------------------------------

def sampled(loss, u):
    """loss(u) and its standard error, from the scatter between 20 groups of rows."""
    return loss(u), mean_and_error([loss(rows) for rows in np.array_split(u, 20)])[1]


def least_losses(rng, B, sizes, query="dual"):
    """At each (T, q, d_e) the least L/L_0 over c of B sampled sets, its standard error, and its law."""
    rows = []
    for T, q, d_e in sizes:
        u = lib.overlaps(rng, B, T, q, d_e, query)
        grid = np.linspace(0.5, 1.1, 9) * d_e / q if query == "dual" else np.linspace(1.25, 6, 20)
        c = min(grid if q > 2 else [300.0], key=lambda c: lib.overlap_loss(c, u, q, 1))  # q <= 2: c is large
        rows.append((*sampled(lambda rows: 2 * q * lib.overlap_loss(c, rows, q, 1), u),
                     lib.stochastic_floor(T, q, 2 * q, d_e, query)))
    return np.transpose(rows)


def stochastic(rng, T=32, q=3, d=6, d_e=96, eta=3.0, sets=1200, last=2500, full_steps=500, B=20_000,
               close=0.99):
    """Stochastic encodings: the law of two scalars, the directions learned, and the dimension needed."""
    ratios, within, shown = [], [], log_steps(last, 30)
    for size in (20, 1, 24), (16, 2, 48), (64, 3, 64), (32, 4, 64), (8, 4, 64):                   # T, q, d_e
        u, sigma2, q_ = lib.overlaps(rng, 64 // size[0] * B, *size), lib.overlap_variance(*size[1:]), size[1]
        for share in (0.1, 0.2):
            loss, error = sampled(lambda rows: lib.overlap_loss(share / sigma2, rows, q_, 1), u)
            ratios.append(lib.stochastic_loss(share / sigma2, *size[:2], 1, sigma2) / loss)
            within.append(4 / 3 * share**4 / sigma2 / q_**2 + 0.005 + 4 * error / loss)  # the next cumulant
    frozen, held = (lib.overlaps(rng, k * sets, T, q, d_e) for k in (1, 10))
    t, params, _ = record(two_scalars(lambda: frozen, q, d, d_e, eta, last), shown)
    measured = np.array([stochastic_loss_and_grads(*alpha_c, held, q, d, d_e)[0] for alpha_c in params])
    late = t >= 2 * T / eta
    predicted = lib.stochastic_trajectory(t[late], T, q, d, d_e, eta)[2]
    E, cosines, truth = lib.random_sign_encoding(rng, 48, 16), {}, lib.in_full_model(np.eye(4), np.eye(48))
    for name in ("stochastic", "fixed"):                                  # the step is half of what is stable
        descent = online(rng, E, 3, 4, 1.0, 128, full_steps, "dual", fresh=name == "stochastic")
        full_t, full, _ = record(descent, log_steps(full_steps, 25))
        cosines[name] = np.array([[cosine(*pair) for pair in zip(V_W, truth)] for V_W in full])
    needed = [lib.required_dimension(16, 3, eps) for eps in (0.03, 0.01)]
    dims = {("sum", 3): [16, 32, 64, 128, 512], ("dual", 3): [16, 24, *needed], ("dual", 2): [10, 16, 24]}
    floors = {(query, k): least_losses(rng, B if query == "sum" else 4 * B, [(16, k, d_e) for d_e in sizes],
                                       query) for (query, k), sizes in dims.items()}
    dual, dual_error, dual_law = floors["dual", 3]
    sums = least_losses(rng, 2 * B, [(16, 3, 128), (16, 3, 256)], "sum")
    ties = least_losses(rng, 2 * B, [(4, 1, 3), (12, 1, 6), (4, 2, 5), (6, 2, 8)])
    def law_panel(ax):
        ax.plot(t, measured * 2 * q / d, "o", color=BLUE, label="descent of two scalars")
        ax.plot(t[late], predicted * 2 * q / d, label="(S6)", **PREDICTED)
        finish(ax, "gradient steps t", "loss L/L₀, fresh encodings",
               heading=f"T = {T}, q = {q}, d = {d}, $d_e$ = {d_e}, η = {eta:g}")
    def direction_panel(ax):
        for name, fill in (("stochastic", "full"), ("fixed", "none")):
            for matrix, values, colour in zip("VW", cosines[name].T, (ORANGE, BLUE)):
                ax.plot(full_t, values, "o", color=colour, fillstyle=fill, label=f"{matrix}, {name} sets")
        for height, name in ((1, ""), (math.sqrt(16 / 48), "one set: ≤ √(T/$d_e$)")):
            ax.axhline(height, **PREDICTED)
            ax.text(1, height + 0.02, name)
        finish(ax, "gradient steps t", "cosine with truth", "lower right", yscale="linear", ylim=(0, 1.05))
    def dimension_panel(ax):
        laws = ("(S9)", 230, 0.07), ("(S8)", 41, 9e-3), ("(S10)", 12, 3e-3)
        for ((query, k), (loss, _, _)), colour, law in zip(floors.items(), (PINK, GREEN, SKY), laws):
            sizes = np.geomspace(dims[query, k][0], dims[query, k][-1], 60).astype(int).tolist()
            ax.plot(sizes, [lib.stochastic_floor(16, k, 2 * k, size, query) for size in sizes], **PREDICTED)
            ax.plot(dims[query, k], loss, "o", color=colour, label=f"{query} query, q = {k}")
            ax.text(*law[1:], law[0])
        finish(ax, "dimension of encodings $d_e$", "least loss over c, L/L₀", "upper right", ylim=(2e-3, 3))
    return {"Loss: nothing is fitted": law_panel, "Full model from samples, $d_e$ = 48": direction_panel,
            "Least loss at T = 16": dimension_panel}, [
        claim("S1", "Full model from samples, stochastic encodings: cosines of V and W with the truth after "
              f"{full_steps} steps, T = 16, q = 3, d_e = 48.", cosines["stochastic"][-1], at_least=close,
              source="paper"),
        claim("S5", "The loss (S5) over the sampled loss: q = 1 to 4, T = 8 to 64, c sigma^2 = .1 and .2.",
              ratios, equals=1, within=within),
        claim("S6", f"The loss (S6) over the measured loss from twice T/eta to {last} steps, "
              f"(T, q, d, d_e) = {T, q, d, d_e}.", predicted / measured[late], equals=1, within=0.03),
        claim("S8", "Dual query, q = 3, T = 16: 2q times the slope in d_e of log(sqrt(d_e) least loss/(S8)).",
              6 * np.polyfit(dims["dual", 3], np.log(dual / dual_law * np.sqrt(dims["dual", 3])), 1)[0],
              equals=0, within=0.1 + (dual_error / dual).max()),  # 4 standard errors and more
        claim("S8-eps", "Dual query, q = 3, T = 16: at the d_e required for eps = .03 and .01, "
              f"{needed}, least L/L_0 is .2 to 1 eps.", dual[-2:] / (0.03, 0.01), equals=0.6, within=0.4),
        claim("S9", "Sum query: the least loss over (S9), q = 3, T = 16, d_e = 128 and 256.",
              sums[0] / sums[2], equals=1, within=0.015 + 4 * sums[1] / sums[2]),
        claim("S10", "The least loss over (S10): q = 1 and 2, T = 4 to 12, d_e = 3 to 8.",
              ties[0] / ties[2], equals=1, within=4 * ties[1] / ties[2])]


# ---- 4. longer sequences (L) -------------------------------------------------------------------------------

def length(rng, T=32, q=2, d=16, d_e=128, eta=3.0, times=(100, 300, 1000, 3000), fixed_steps=1500, B=400):
    """Train at T, test at up to 64 T: stochastic encodings carry over, fixed ones and one-hot do not."""
    lengths, L_0, subsets = [T * 2**k for k in range(7)], d / (2 * q), lib.all_subsets(T, q)
    u, sigma2 = lib.overlaps(rng, 1000, T, q, d_e), lib.overlap_variance(q, d_e)
    _, trained, _ = record(two_scalars(lambda: u, q, d, d_e, eta, times[-1]), times)
    short, long = lib.overlaps(rng, 80 * B, 2 * T, q, d_e), lib.overlaps(rng, B, 64 * T, q, d_e)
    tests = [(short if k <= 2 * T else long)[:, :k] for k in lengths]     # k of the columns: length k
    measured, error = np.moveaxis([[sampled(
        lambda rows: stochastic_loss_and_grads(*params, rows, q, d, d_e)[0] / L_0, rows)
        for rows in tests] for params in trained], 2, 0)
    law = np.array([[lib.length_loss(*params, k, q, d, sigma2) / L_0 for k in lengths] for params in trained])
    alpha, omega = final(lib.one_hot_recursion(T, q, d, eta, times[-1]))[1]
    one_hot, others = (alpha * np.eye(d), omega * (np.eye(T) - 1 / T)), np.empty((3, 3, 7))
    for losses in others:                                                 # repeats; kinds, lengths
        E = lib.random_sign_encoding(rng, d_e, 64 * T)                    # trained on its first T columns
        draws = (subsets[rng.integers(len(subsets), size=48)] for _ in itertools.count())
        _, fixed, _ = final(descend(population_loss_and_grads, lambda: on_population(E[:, :T], next(draws)),
                                    (d, d), d_e, eta, fixed_steps))
        for j, k in enumerate(lengths):
            _, selected = lib.sample_batch(rng, B // 2, k, q, 1)
            kinds = (one_hot, np.eye(T, k)), (fixed, E[:, :k]), (fixed, lib.random_sign_encoding(rng, d_e, k))
            losses[:, j] = [population_loss_and_grads(*params, *on_population(tested, selected))[0] / L_0
                            for params, tested in kinds]
    untrained, own, other = np.median(others, axis=0)
    def by_length(ax, *legend, **settings):
        finish(ax, "length of the test sequences", "loss L/L₀", *legend, **settings)
        ax.set_xticks(lengths, ["T", *(f"{2**k} T" for k in range(1, 7))])
        ax.minorticks_off()
    def carries_over(ax):
        for losses, style, colour, label in (
                (untrained, "^-", GREEN, "one-hot"), (own, "s-", ORANGE, "fixed set, extended"),
                (other, "s:", PINK, "fixed set, on fresh sets"), (measured[-1], "o-", BLUE, "stochastic")):
            ax.plot(lengths, losses, style, color=colour, linewidth=2, label=label)
        ax.plot(lengths, law[-1], label="(L1)", **PREDICTED)
        by_length(ax, "upper left", f"trained at T = {T}, q = {q}, $d_e$ = {d_e}", 2, yscale="linear",
                  ylim=(-0.03, 1.4), yticks=np.linspace(0, 1, 6))
    def reach(ax):
        for losses, predicted, t, colour in zip(measured, law, times, (SKY, GREEN, ORANGE, BLUE)):
            ax.plot(lengths, losses, "o", color=colour, label=f"after {t:,} steps")
            ax.plot(lengths, predicted, **PREDICTED)
        by_length(ax, "lower right", "dashed: (L1)")
    at = f"Trained at T = {T}, q = {q}, d_e = {d_e}"
    return {"Trained at length T, tested on longer sequences": carries_over,
            "Stochastic: training longer reaches further": reach}, [
        claim("L1", f"{at} for {times[0]} to {times[-1]} steps: (L1) over the loss at lengths T to 64 T.",
              law / measured, equals=1, within=0.015 + 4 * error / measured),
        claim("L-fits", f"{at}: L/L_0 at length T, with stochastic encodings and with one fixed set.",
              [measured[-1, 0], own[0]], at_most=0.02, source="paper"),
        claim("L-fixed", f"{at}: at 2T the loss of a fixed set, extended, over that of stochastic sets.",
              own[1] / measured[-1, 1], at_least=5, source="paper")]


# ---- 5. fully-connected networks: the exact floor (F) ---------------------------------------------------

FISHER = {"laplace": 2.0, "logistic": math.pi**2 / 9, "gumbel": math.pi**2 / 6}  # information at variance 1


def with_error(f, target, q):
    """L/L_0 on a test set, its standard error; the predictor 0, known to have 1, is a control variate."""
    loss, zero = (q / target.shape[1] * ((g - target)**2).sum(axis=1) for g in (f, 0.0))
    return mean_and_error(loss - np.cov(loss, zero)[0, 1] / zero.var(ddof=1) * (zero - 1))


def trained(rng, widths, B, steps, rate, tests, T, q, d, tokens="gaussian", fisher=1.0):
    """FCNs by Adam on one stream. Rows: width, test L/L_0, its error, floors (F3, F6) and (F4) over L_0."""
    streams = itertools.tee((fcn_batch(rng, B, T, q, d, tokens) for _ in itertools.count()), len(widths))
    runs = [fcn_run(rng, m, T, d, stream, rate, steps) for m, stream in zip(widths, streams)]
    inputs, target, *_ = fcn_batch(rng, tests, T, q, d, tokens)
    return np.array([(m, *with_error(lib.fcn(*params, inputs), target, q),
                      2 * q / d * lib.fcn_first_layer_floor(params[0], T, q, d, fisher),
                      2 * q / d * lib.fcn_loss_floor(m, T, q, d, fisher))
                     for m, (_, params, _) in zip(widths, final(zip(*runs)))])


def against_width(ax, rows, exact, transformer, width, T, q, d):
    """Losses of trained networks, of the exact one and of a transformer, and the floors."""
    grid, (m, loss, _, of_layer, _) = np.geomspace(1, 2 * T * d, 200).astype(int), rows.T
    ax.plot(grid, lib.fcn_loss_floor(grid, T, q, d) * 2 * q / d, label="floor of the width (F4)", **PREDICTED)
    ax.plot(m, of_layer, "_", color=PINK, markersize=13, markeredgewidth=2.2, label="floor of its layer (F3)")
    ax.plot(m, loss, "o", color=BLUE, zorder=6, label="FCN trained by Adam")
    ax.plot(T * d, exact, "D", color=GREEN, markersize=7, zorder=7, clip_on=False,
            label=f"exact FCN, m = Td = {T * d} (F5)")
    ax.plot(width, transformer, "*", color=RED, markersize=14, zorder=8,
            label=f"trained transformer, d + $d_e$ = {width}")
    finish(ax, "width: m in the first layer; d + $d_e$", "loss L/L₀", yscale="linear", ylim=(0, 1.02))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")


def floor(rng, widths=(1, 2, 4, 8, 16, 8, 16, 32), steps=1500, rate=0.02, wide=(4, 16, 32, 128),
          wide_steps=800, other_steps=300, tests=40_000):
    """No first layer of m neurons beats (F4); trained networks come near it; exact_fcn ends it at m = Td."""
    small, large, panels, rows = {"T": 8, "q": 2, "d": 4}, {"T": 32, "q": 2, "d": 4}, [], []
    # Two starts at m = 8, 16: 1 in 50 ends with neurons in pairs relu(z) - relu(-z) = z, which see less.
    for size, d_e, *how in (small, 24, widths, 256, steps, rate), (large, 28, wide, 128, wide_steps, 0.01):
        T, q, d = size.values()
        rows.append(trained(rng, *how, 4 * tests // T, **size))
        inputs, target, *_ = fcn_batch(rng, 4000, **size)
        exact, _ = with_error(lib.fcn(*lib.exact_fcn(**size), inputs), target, q)
        alpha_c = final(two_scalars(lambda: lib.overlaps(rng, 64, T, q, d_e), q, d, d_e, 3.0, wide_steps))[1]
        loss, error = sampled(lambda u: stochastic_loss_and_grads(*alpha_c, u, q, d, d_e)[0] * 2 * q / d,
                              lib.overlaps(rng, 4000, T, q, d_e))
        panels.append({"rows": rows[-1], "exact": exact, "transformer": loss, "width": d + d_e, **size})
    others = [trained(rng, (2, 8), 256, other_steps, 0.02, tests // 4, **small, tokens=tokens,
                      fisher=J) for tokens, J in FISHER.items()]
    narrow = sorted({m for m in widths if m < 32})
    shapes = {"W1": (6, 9), "b1": (6,), "A": (2, 6), "b2": (2,), "inputs": (60, 9), "target": (60, 2)}
    m, loss_m, _, _, floor_m = rows[0].T
    def above(rows, *floors):  # test loss + 4 standard errors less floors
        return np.ravel([rows[:, 1] + 4 * rows[:, 2] - rows[:, k] for k in floors])
    titles = "T = 8, q = 2, d = 4: the floor is tight", "T = 32, q = 2, d = 4: a transformer is far below"
    return {title: functools.partial(against_width, **panel) for title, panel in zip(titles, panels)}, [
        claim("F-gradient", "Loss and gradients (F1, F2) of the FCN are those of complex steps on its linear "
              "piece: largest error over the largest entry.",
              gradient_errors(rng, fcn_loss_and_grads, fcn_forward, shapes, [*shapes][:4]), at_most=1e-12),
        claim("F3", f"{len(widths + wide)} FCNs on Gaussian tokens: test loss + 4 standard errors less "
              "the floors (F3) of the first layer and (F4) of the width, over L_0.",
              above(np.concatenate(rows), 3, 4), at_least=0),
        claim("F4-tight", "T = 8, q = 2, d = 4: the best FCN of width m = " + ", ".join(map(str, narrow)) +
              " comes near the floor (F4): test loss less floor, over L_0.",
              [min((loss_m - floor_m)[m == width]) for width in narrow], at_most=0.05),
        claim("F4-transformer", "T = 32, q = 2, d = 4: a trained transformer of width 32, loss + 4 standard "
              "errors, over the least loss of FCNs of that width (F4).",
              (loss + 4 * error) / lib.fcn_loss_floor(32, **large), at_most=0.1),
        claim("F5", "The network (F5) of width Td is exact: test loss over L_0 at T = 8, 32, q = 2, d = 4.",
              [panel["exact"] for panel in panels], at_most=1e-15),
        claim("F6", "FCNs trained on Laplace, logistic, Gumbel tokens: test loss + 4 standard errors less "
              "the floor (F6) of their first layer, over L_0.", above(np.concatenate(others), 3), at_least=0)]


# ---- 6. transformer and networks on the same samples (F, S) -----------------------------------------------

def least_dimension(rng, T, q, eps, B):
    """The least d_e whose sampled loss at the best c, alpha is at most eps L_0: dual query, bisection."""
    def reached(d_e):
        u = lib.overlaps(rng, B, T, q, d_e)
        return 2 * q * min(lib.overlap_loss(c, u, q, 1) for c in np.geomspace(10, 1000, 5)) <= eps
    return q + bisect.bisect_left(range(q, 60), True, key=reached)


def separation(rng, T=16, q=2, d=8, d_e=24, B=128, steps=800, points=24, tests=4000, lengths=(16, 128, 1024)):
    """Transformer and networks on the same stream of samples, and the width that each needs as T grows."""
    size, D, eps = {"T": T, "q": q, "d": d}, d + d_e, 0.1
    equal = round((d * D + D**2 - d) / (T * d + T + 1 + d))        # the parameters of V and W; of a network
    widths = {equal: "equal parameters", D: "equal width", 2 * T * d: "2Td"}
    times, curves = log_steps(steps, points)[4:], []
    def encoded(X, selected):
        return on_samples(lib.random_sign_encoding(rng, d_e, T, len(X)), X, selected)
    inputs, target, *task = fcn_batch(rng, tests, **size)
    Z, z_query, _ = encoded(*task)
    own, *others = itertools.tee((fcn_batch(rng, B, **size) for _ in itertools.count()), 4)
    runs = [descend(attention_loss_and_grads, lambda: encoded(*next(own)[2:]), (d, D), D, 1.0, steps),
            *(fcn_run(rng, m, T, d, stream, 0.01, steps) for m, stream in zip(widths, others))]
    for (t, V_W, _), *networks in zip(*runs):
        if t in times:
            outputs = lib.transformer(*V_W, Z, z_query), *(lib.fcn(*state[1], inputs) for state in networks)
            curves.append([with_error(f, target, q) for f in outputs])
    curves = np.moveaxis(curves, 0, 2)
    least = {m: lib.fcn_loss_floor(m, **size) * 2 * q / d for m in (equal, D)}
    dimensions = np.array([least_dimension(rng, k, q, eps, 1000) for k in lengths])
    def on_stream(ax):
        names = [f"transformer, width {D}", *(f"FCN, m = {m}: {name}" for m, name in widths.items())]
        for name, (loss, _), colour, marker in zip(names, curves, (RED, GREEN, BLUE, ORANGE), "*o^s"):
            ax.plot(times * B, loss, marker=marker, color=colour, label=name)
        for m, level in least.items():
            ax.axhline(level, **PREDICTED)
            ax.text(7500, level - 0.01, f"floor (F4), m = {m}", va="top", fontsize=9)
        finish(ax, "samples seen", "test loss L/L₀", "upper center", columns=2, yscale="linear",
               ylim=(0, 1.28), yticks=np.linspace(0, 1, 6))
    def width_needed(ax):
        grid, level = 2**np.arange(3, 13), eps * d / (2 * q)
        of_fcn = [np.argmax(lib.fcn_loss_floor(np.arange(k * d + 1), k, q, d) <= level) for k in grid]
        ax.plot(grid, of_fcn, label="predicted (F4), (S10)", **PREDICTED)
        ax.plot(grid, [d + lib.required_dimension(k, q, eps) for k in grid], **PREDICTED)
        ax.plot(lengths, d + dimensions, "*", color=RED, markersize=11, label="transformer, measured")
        ax.text(400, 4500, "FCN: slope 1", ha="right")
        finish(ax, "sequence length T", "width", "upper left", ylim=(10, 3e5))
    return {f"T = {T}, q = {q}, d = {d}: one stream of samples": on_stream,
            f"Width needed for L/L₀ ≤ {eps}, q = {q}, d = {d}": width_needed}, [
        claim("F4-separation", f"A transformer of width Td/4 = {D} online, (T, q, d) = {T, q, d}: "
              "loss + 4 standard errors over the least loss of FCNs of that width (F4).",
              (curves[0, 0, -1] + 4 * curves[0, 1, -1]) / least[D], at_most=0.1),
        claim("S10-dimension", f"The least d_e for L/L_0 <= {eps} is that of (S10), which grows like log T: "
              f"q = {q}, T = {', '.join(map(str, lengths))}.",
              dimensions, equals=[lib.required_dimension(k, q, eps) for k in lengths], within=1)]


# ---- 7. fixed encodings: the paper's open question (G) -----------------------------------------------

def directions(E):
    """The identity, the projector on the span of E, and the start of descent (G1)."""
    return np.eye(len(E)), E @ np.linalg.pinv(E), E @ (np.eye(E.shape[1]) - 1 / E.shape[1]) @ E.T


def early(rng, T, d_e, d=3, eta=1.5):
    """q = 1: steps to .9 and .5 of L_0 over (G1)'s, over one-hot's; cosine of W with the projector at .9."""
    E, levels, t = lib.random_sign_encoding(rng, d_e, T), np.array([0.9, 0.5]) * d / 2, np.arange(2 * T * T)
    laws = [np.interp(-levels, -lib.one_hot_loss_at(t, T, 1, d, eta, size), t) for size in (d_e, None)]
    _, params, loss = record(set_descent(E, 1, d, eta, int(1.2 * laws[0][1])), t)
    steps = (loss > levels[:, None]).sum(axis=1)
    return *steps / laws, cosine(params[min(steps)][1], directions(E)[1])


def late(E, q, d, eta, steps):
    """At the end L 4 eta t/||W*||^2, the cosine of W with W*, and the largest with other directions."""
    W_star, (_, (_, W), loss) = lib.widest_margin(E, q), final(set_descent(E, q, d, eta, steps))
    others = [cosine(W, direction) for direction in directions(E)]
    return loss / lib.fixed_set_loss_at(steps, W_star, eta), cosine(W, W_star), max(others)


def fixed(rng, d=4, eta=1.5, steps=2000, T_early=96, late_steps=1800, T_floor=12, sets=2, floor_steps=800):
    """A fixed set learns faster than one-hot (G1), ends at its widest margin (G2), may have a floor (G3)."""
    t, runs, floors = log_steps(steps), [], []
    for q, T, d_e in (1, 32, 24), (1, 32, 32), (1, 32, 48), (2, 12, 20):
        E = lib.random_sign_encoding(rng, d_e, T)
        runs.append((q, E, *record(set_descent(E, q, d, eta, steps), t)[1:]))
    for d_e in np.repeat(range(4, T_floor + 1), sets):
        E, fresh = lib.random_sign_encoding(rng, d_e, T_floor), lib.first_subset(500, T_floor, 2)
        _, params, own = final(set_descent(E, 2, d, eta, floor_steps))
        floors.append((d_e, population_loss_and_grads(*params, *fresh_signs(rng, fresh, d_e))[0], own,
                       lib.stochastic_floor(T_floor, 2, d, d_e)))
    over_law, over_one_hot, span = zip(*(early(rng, T_early, k * T_early // 2) for k in (1, 2, 3)))
    below, above = (min((all_signs(d_e, 1)[rng.choice(2**d_e, T, replace=False), :, 0].T for _ in range(6)),
                        key=lambda E: np.linalg.norm(lib.widest_margin(E, 1)))  # of six, the first to be late
                    for d_e, T in ((6, 7), (9, 6)))
    hadamard = functools.reduce(np.kron, 3 * [[[1, 1], [1, -1]]])  # for q = 2, where random sets are slower
    few, many = hadamard[1:5, [0, 1, 2, 4, 7]] / 2, hadamard[3:, :6].T / math.sqrt(6)
    cases = (below, 1, 32, eta), (above, 1, 32, eta), (few, 2, 2, 3.6), (many, 2, 2, 3.6)
    rate, along, others = np.transpose([late(*case, late_steps) for case in cases])
    _, _, stuck = final(set_descent(below[:, [0, 0, *range(2, 7)]], 1, 32, eta, late_steps))  # two are equal
    def loss_panel(ax):
        for (q, E, _, loss), colour in zip(runs, (RED, GREEN, BLUE, PINK)):
            (d_e, T), L_0, W_star = E.shape, d / (2 * q), lib.widest_margin(E, q)
            first, last = lib.one_hot_loss_at(t, T, q, d, eta, d_e), lib.fixed_set_loss_at(t, W_star, eta)
            ax.plot(t, loss / L_0, "o", color=colour, label=f"T = {T}, $d_e$ = {d_e}, q = {q}")
            ax.plot(t, np.where(first > 0.1 * L_0, first, np.nan) / L_0, **PREDICTED)
            ax.plot(t, np.where(last < 0.1 * L_0, last, np.nan) / L_0, **PREDICTED)
        finish(ax, "gradient steps t", "loss L/L₀", heading="dashed: early (G1), late (G2)")
    def direction_panel(ax):
        q, E, params, _ = runs[-1]
        names = "identity I", "projector on the span of E", "start: E (I - 11ᵀ/T) Eᵀ (G1)", "end: W* (G2)"
        styles = zip(names, "sv^o", (SKY, GREEN, ORANGE, BLUE))
        for (name, marker, colour), M in zip(styles, (*directions(E), lib.widest_margin(E, q))):
            ax.plot(t, [cosine(W, M) for _, W in params], marker, color=colour, label=name)
        finish(ax, "gradient steps t", "cosine of W with", "lower center", yscale="linear", ylim=(0.3, 1.02))
    def floor_panel(ax):
        d_e, fresh, own, law = np.transpose(floors) * [[1], [4 / d], [4 / d], [4 / d]]
        ax.plot(d_e, fresh, "^", color=ORANGE, label="fixed set, on fresh sets")
        ax.plot(d_e, own, "o", color=BLUE, label="fixed set, on itself")
        ax.plot(d_e, law, label="stochastic: floor (S10)", **PREDICTED)
        finish(ax, "dimension of the encodings $d_e$", "loss L/L₀", ylim=(0.01, 1.2))
        ax.set_xscale("linear")
    random_sets = f"random fixed sets, q = 1, T = {T_early}, d_e = T/2, T and 3T/2"
    four_sets = "fixed sets of (T, d_e, q) = (7, 6, 1), (6, 9, 1), (5, 4, 2) and (5, 6, 2)"
    return {"Loss on the set itself": loss_panel, "Where W points: T = 12, q = 2": direction_panel,
            f"Own set, fresh sets: T = {T_floor}, q = 2": floor_panel}, [
        claim("G1", f"On {random_sets}, descent reaches .9 and .5 of L_0 in the steps of the one-hot law "
              "with T d_e/(T + d_e) for T - 1: ratio.", over_law, equals=1, within=0.05),
        claim("G1-faster", f"On {random_sets}, descent reaches .9 and .5 of L_0 in fewer steps than with "
              "one-hot encodings (C3): ratio.", over_one_hot, at_most=0.75),
        claim("G1-span", f"On {random_sets}, at .9 L_0 the cosine of W with the projector on the span of E "
              "is 1/sqrt(1 + min(T/d_e, d_e/T)).", span, equals=1 / np.sqrt([1.5, 2, 5 / 3]), within=0.03),
        claim("G2", f"On {four_sets}, descent ends with a loss of ||W*||^2/(4 eta t), W* the widest margin: "
              "ratio.", rate, equals=1, within=0.05),
        claim("G2-direction", f"On {four_sets}, the cosine of W with W* ends above .97 and above those with "
              "I, E pinv(E), E (I - 11^T/T) E^T.", along, at_least=np.maximum(0.97, others)),
        claim("G3", "On a set of T = 7, d_e = 6, q = 1 with two equal encodings, which has no W*, descent "
              "stops at L_0/T: T L/L_0.", 7 * stuck * 2 / 32, equals=1, within=0.005)]


# ---- 8. finitely many sequences (N) ------------------------------------------------------------------

def sequence_descent(rng, encodings, S, n, T, q, d, d_e, eta, steps):
    """Descent on S data sets of n fixed sequences at once, each step on the next encodings; q = 1 or 2."""
    X, selected = lib.sample_batch(rng, S * n, T, q, d)
    target = lib.sts(X, selected).reshape(S, n, d)
    X, selected = X.reshape(S, n, d, T), selected.reshape(S, n, T)
    def loss_and_grads(V, W):  # V_1 and W_22 by (A1)-(A8): with fixed encodings V_2, W_12 would fit the noise
        E = next(encodings)
        e = selected @ E.swapaxes(1, 2)
        e_query = q * e / np.maximum((e**2).sum(axis=2, keepdims=True), 1e-9)    # dual
        a = softmax(e_query @ (W.swapaxes(1, 2) @ E))
        Xa = (X @ a[..., None])[..., 0]
        r = Xa @ V.swapaxes(1, 2) - target
        g = ((r @ V)[:, :, None] @ X)[:, :, 0]
        grad_s = a * (g - (a * g).sum(axis=2, keepdims=True))
        grad_W = E @ (grad_s.swapaxes(1, 2) @ e_query)
        return (r**2).sum(axis=(1, 2)) / (2 * n), r.swapaxes(1, 2) @ Xa / n, grad_W / n
    return lib.gradient_descent((np.zeros((S, d, d)), np.zeros((S, d_e, d_e))), loss_and_grads, eta, steps)


def fresh_run(rng, S, n, T, d, d_e, eta, times):
    """Fresh encodings, q = 2: test and training L/L_0, steps to a test L/L_0 of .05; the same by (N2)."""
    last, draws = times[-1], (E for _ in itertools.count()
                              for E in lib.random_sign_encoding(rng, d_e, T, 16 * S).reshape(16, S, d_e, T))
    stable = eta if n > d else eta / 2                        # V has curvature up to (1 + sqrt(d/n))^2/q
    t, models, loss = record(sequence_descent(rng, draws, S, n, T, 2, d, d_e, stable, last),
                             [*times, *range(last - 99, last)])
    models, subsets = dict(zip(t, models)), lib.first_subset(5000 // S, T, 2)
    test = [[population_loss_and_grads(*model, *fresh_signs(rng, subsets, d_e))[0]
             for model in zip(*models[step])] for step in times]
    test = (np.median if d < n < 3 * d else np.mean)(test, axis=1) * 4 / d  # some may stay memorised
    law = lib.finite_sample_loss(times, n, T, 2, d, d_e, eta)[1] * 4 / d
    train_law = lib.finite_sample_loss(last - 50, n, T, 2, d, d_e, eta)[0] * 4 / d
    slow, slow_law = (np.exp(np.interp(math.log(20), -np.log(each), np.log(times))) for each in (test, law))
    return (test[-1], loss[-100:].mean() * 4 / d, slow), (law[-1], train_law, slow_law)


def one_hot_run(rng, S, n, T, d, eta=1.0, steps=2000):
    """One-hot, q = 1: the median test L/L_0 of S data sets, and (N3)."""
    whole, never = on_population(np.eye(T), np.eye(T)), (1 - 1 / T)**n
    encodings = itertools.repeat(whole[0][None])
    _, (V, W), _ = final(sequence_descent(rng, encodings, S, n, T, 1, d, T, eta, steps))
    test = [population_loss_and_grads(*model, *whole)[0] * 2 / d for model in zip(V, W)]
    luck = (W == 0).all(axis=1).mean(axis=1) - never          # how many positions no sequence selects
    law = (1 - 1 / T) * never + (T - 1) / (2 * d * eta * steps)                                # (N3)
    return np.median(test - (1 - 1 / T) * luck), law


def samples(rng, lengths=(8, 12), d=12, d_e=40, eta=0.8, steps=1000, over_d=(1/3, 2/3, 3/2, 3, 6, 16),
            sets=(60, 7, 7, 28, 6, 3), positions=(14, 18), over_T=(1, 2, 2.5, 3), fcn_over_d=(2, 16)):
    """n fixed sequences: with fresh encodings n need only grow like d (N2), with one-hot ones like T (N3)."""
    over_d, over_T, times = np.array(over_d), np.array(over_T), log_steps(steps, 6, steps // 5)
    fresh = np.array([[fresh_run(rng, S, round(k * d), size, d, d_e, eta, times if k >= 3 else times[-1:])
                       for k, S in zip(over_d, sets)] for size in lengths])
    one_hot = np.array([[one_hot_run(rng, 7, round(k * size), size, 2 * size // 3) for k in over_T]
                        for size in positions])
    others, fcn = fcn_batch(rng, 500, 8, 2, d)[:2], []        # FCNs: loss on the sequences and on others
    for k in fcn_over_d:
        batches = itertools.repeat(fcn_batch(rng, k * d, 8, 2, d))
        _, params, fit = final(fcn_run(rng, 16 * d, 8, d, batches, 6e-3, 50, start=1.0))
        fcn.append((fit * 4 / d, fcn_loss_and_grads(*params, *others)[0] * 4 / d))
    fit, fcn = np.transpose(fcn)
    def fresh_panel(ax):
        for size, row, colour, marker in zip(lengths, fresh, (BLUE, RED), "os"):
            ax.plot(over_d, row[:, 0, 0], marker, color=colour, label=f"transformer, T = {size}")
            for n in log_steps(d - 2, 20), log_steps(16 * d, 60, d + 2):
                law = [lib.finite_sample_loss(steps, int(k), size, 2, d, d_e, eta)[1] for k in n]
                ax.plot(n / d, np.array(law) * 4 / d, **PREDICTED)
        ax.plot(fcn_over_d, fcn, "D", color="grey", label="FCN, T = 8, 2Td neurons")
        ax.axvspan(3, 18, color=GREEN, alpha=0.1, lw=0, label="range of (N2): n ≥ 3d")
        finish(ax, "training sequences per dimension, n/d", "test loss L/L₀", xlim=(0.28, 18), ylim=(1e-3, 8),
               heading="dashed: (N2); left of 1 memorised", xticks=over_d, xticklabels=over_d.round(2))
    def one_hot_panel(ax):
        for size, row, colour, marker in zip(positions, one_hot, (BLUE, RED), "os"):
            ax.plot(over_T, row[:, 0], marker, color=colour, label=f"T = {size}, d = {2 * size // 3}")
            ax.plot(over_T, row[:, 1], **PREDICTED)
        finish(ax, "training sequences per position, n/T", "test loss L/L₀", heading="dashed: (N3), n ≥ 2T")
        ax.set_xscale("linear")
    ratio, ends = fresh[:, over_d >= 3, 0] / fresh[:, over_d >= 3, 1], one_hot[:, over_T >= 2.5]
    setting = f"Fresh encodings, q = 2, d = {d}, d_e = {d_e}, T = {' and '.join(map(str, lengths))}"
    return {"Stochastic encodings, q = 2": fresh_panel, "One-hot encodings, q = 1": one_hot_panel}, [
        claim("N2", f"{setting}, {steps} steps on n = 3d to 16d sequences: test and training loss over (N2).",
              ratio[..., :2], equals=1, within=0.1),
        claim("N2-slower", f"{setting}: steps to a test loss of .05 L_0 at n = 3d over those at 16d, over "
              "(N2)'s ratio.", ratio[:, 0, 2] / ratio[:, -1, 2], equals=1, within=0.1),
        claim("N2-memorised", f"{setting}, n = d/3: V fits the sequences at uniform attention: test loss "
              "over (N2).", fresh[:, 0, 0, 0] / fresh[:, 0, 1, 0], equals=1, within=0.08),
        claim("N3", f"One-hot, q = 1, T = {' and '.join(map(str, positions))}, d about 2T/3, n = 2.5T and "
              "3T: test loss over (N3).", ends[..., 0] / ends[..., 1], equals=1, within=0.05),
        claim("N-fcn", f"An FCN of width 2Td, T = 8, q = 2, d = {d}, fits 2d to {fcn_over_d[-1]}d sequences "
              "to .1 L_0; its test loss is above L_0.", np.where(fit < 0.1, fcn, np.nan), at_least=1)]


QUICK = {  # what --quick changes in the settings of each experiment
    "dynamics": {"steps": 6000, "lengths": (64, 128, 256), "long": 2000, "off": 800, "online_steps": 250,
                 "laws": ((64, 8, 2, 6.0, 10.5, 0.005), (64, 2, 2, 3.0, 10.5, 0.05))},
    "matrices": {"steps": 800, "B": 128},
    "stochastic": {"sets": 1000, "last": 800, "full_steps": 160, "B": 4000, "close": 0.97},
    "length": {"times": (60, 120, 240, 480), "fixed_steps": 400, "B": 100},
    "floor": {"widths": (4, 8, 8), "steps": 800, "rate": 0.03, "wide": (8,), "wide_steps": 250,
              "other_steps": 60, "tests": 16_000},
    "separation": {"B": 96, "steps": 400, "points": 10, "tests": 2000, "lengths": (16, 64)},
    "fixed": {"steps": 200, "T_early": 80, "late_steps": 1500, "T_floor": 5, "sets": 1, "floor_steps": 200},
    "samples": {"lengths": (10,), "d": 10, "d_e": 28, "steps": 500, "over_d": (1/3, 3, 16),
                "sets": (100, 40, 6), "positions": (14,), "over_T": (2.5, 3), "fcn_over_d": (2, 4)}}


# ---- the command line -----------------------------------------------------------------------------------

EXPERIMENTS = {name: globals()[name] for name in QUICK}
SUMMARY = {  # experiment: the title of its panel that the summary shows, and its title there
    "dynamics": ("Loss: descent and closed form", "Descent follows a closed form"),
    "matrices": ("W, at the end", "What W learns: positions only"),
    "length": ("Trained at length T, tested on longer sequences", "It carries over to longer sequences"),
    "floor": ("T = 32, q = 2, d = 4: a transformer is far below", "A fully-connected net needs width T d")}


def figure(panels, size=None):
    """A figure with one titled panel for each draw function, drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # in the workers, and nowhere else
    from matplotlib.figure import Figure
    rows = 1 + (len(panels) > 3)
    fig = FigureCanvasAgg(Figure(figsize=size or (11, 2.8 + 1.4 * rows), layout="constrained")).figure
    axes = fig.subplots(rows, len(panels) // rows, squeeze=False).ravel()
    for ax, (title, draw) in zip(axes, panels.items()):
        ax.set_title(title)
        draw(ax)
    fig.canvas.draw()
    return fig


def work(task):
    """In a worker: name, claims of one experiment, figure as a PNG, pixels of its summary panel, seconds."""
    (name, seed, settings, dpi), start, picture, pixels = task, time.monotonic(), io.BytesIO(), None
    try:
        panels, claims = EXPERIMENTS[name](np.random.default_rng([seed, *name.encode()]), **settings)
        import matplotlib
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(STYLE | {"figure.dpi": dpi})
        figure(panels).savefig(picture, format="png")
        if name in SUMMARY:
            title, headline = SUMMARY[name]
            pixels = np.array(figure({headline: panels[title]}, size=(5.5, 4.2)).canvas.buffer_rgba())
        return name, claims, picture.getvalue(), pixels, time.monotonic() - start
    except Exception as error:
        return name, " ".join(f"{type(error).__name__}: {error}".split()), None, None, 0.0


def joined(pixels):
    """In a worker: four pictures of one size, two by two, as a PNG."""
    import matplotlib.image
    picture = io.BytesIO()
    matplotlib.image.imsave(picture, np.vstack([np.hstack(pixels[:2]), np.hstack(pixels[2:])]), format="png")
    return picture.getvalue()


def prepare_worker():
    """No display is needed, and no worker outlives the run."""
    os.environ["MPLBACKEND"] = "agg"
    run = multiprocessing.parent_process()
    threading.Thread(target=lambda: (run.join(), os._exit(1)), daemon=True).start()


def workers(count):
    """A pool of processes. They inherit that Ctrl-C is blocked: it is for this process to end them."""
    context, block = multiprocessing.get_context("spawn"), getattr(signal, "pthread_sigmask", lambda *_: None)
    quiet = os.environ.get("PYTHONWARNINGS", "") + ",ignore:resource_tracker"  # after Ctrl-C
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS=quiet):  # sums keep their order
        context.Lock()  # starts the tracker of locks, which would lift the block
        before = block(getattr(signal, "SIG_BLOCK", None), {signal.SIGINT})
        pool = context.Pool(count, prepare_worker)
        block(getattr(signal, "SIG_SETMASK", None), before)
    return pool


def run(names, seed, quick, out, beside):
    """Run the experiments named, write figures and claims.csv; the status is 0 only if all claims hold."""
    names, dpi = [name for name in EXPERIMENTS if name in names], 75 if quick else 150
    tasks = [(name, seed, QUICK[name] if quick else {}, dpi) for name in names]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found, pixels, failed, count = {}, {}, None, min(cores, len(tasks))
    def write(name, data):  # whole or not at all
        (beside / name).write_bytes(data)
        (beside / name).replace(out / name)
    with workers(count) as pool:
        print("running:", ", ".join(names[:count]), flush=True)
        processes, results = list(pool._pool), pool.imap_unordered(work, tasks)
        while names and not failed:
            try:
                name, claims, picture, pixels[name], seconds = results.next(timeout=1)
            except multiprocessing.TimeoutError:
                if any(process.exitcode for process in processes):    # its result would never come
                    failed = f"{' or '.join(names[:count])}: the process was killed; perhaps memory ran out"
                continue
            if picture is None:
                failed = f"{name}: {claims}"
                break
            write(f"{list(EXPERIMENTS).index(name) + 1}_{name}.png", picture)
            found[name], held = claims, sum(row["verdict"] == "ok" for row in claims)
            names.remove(name)
            print(f"{name}: {held} of {len(claims)} claims hold, {seconds:.1f} s; running:",
                  ", ".join(names[:count]) or "none", flush=True)
        if set(SUMMARY) <= set(found):
            write("summary.png", pool.apply(joined, ([pixels[name] for name in SUMMARY],)))
    rows = [dict(zip(COLUMNS, COLUMNS)), *(row for name in EXPERIMENTS for row in found.get(name, []))]
    width = shutil.get_terminal_size().columns - 1 if sys.stdout and sys.stdout.isatty() else None
    for row in rows:
        line = "{id:14} {verdict:7} {predicted:16} {measured:11} {tolerance:9} {statement}".format(**row)
        print(line[:width])
    if not failed:
        table = io.StringIO(newline="")
        csv.DictWriter(table, COLUMNS).writerows(rows)
        write("claims.csv", table.getvalue().encode())
    held = sum(row["verdict"] == "ok" for row in rows)
    print(f"{held} of {len(rows) - 1} claims hold" + f"; figures and claims.csv are in {out}" * (not failed))
    if failed:
        print(f"run_all.py: {failed}", file=sys.stderr)
    return int(failed is not None or held < len(rows) - 1)


def parse(argv):
    """The parser and the options of the command line; a bad one ends in one line and exit status 2."""
    parser = argparse.ArgumentParser(description="Run the experiments, draw the figures, check the claims.",
                                     epilog=f"experiments: {', '.join(EXPERIMENTS)}", add_help=False)
    parser.error = lambda message: parser.exit(2, f"run_all.py: {' '.join(message.split())}\n")  # one line
    parser.add_argument("--help", "-h", action="store_true", help="show this, and stop")
    parser.add_argument("--quick", action="store_true", help="smaller work, the same claims")
    parser.add_argument("--only", metavar="NAME[,NAME]", help="run these experiments alone")
    parser.add_argument("--seed", type=int, default=0, help="of every random number (default 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of figures and claims.csv (default: "
                        "figures, or figures/partial with --quick or --only)")
    parser.add_argument("--trace", type=int, metavar="N", help="print N updates beside their derivation")
    parser.add_argument("--model", choices=TRACES, help="for --trace (default one-hot)")
    for name in ("T", "q", "d", "d_e", "m", "eta"):
        parser.add_argument(f"--{name}", type=float if name == "eta" else int, help="for --trace")
    options = parser.parse_args(argv)
    options.names = list(EXPERIMENTS) if options.only is None else options.only.split(",")
    for name in options.names:
        if name not in EXPERIMENTS:
            parser.error(f"--only must name experiments of {', '.join(EXPERIMENTS)}; got {name!r}")
    if options.seed < 0:
        parser.error(f"--seed must be an integer >= 0; got {options.seed}")
    options.settings = {name: value for name, value in vars(options).items()
                        if name in ("model", "T", "q", "d", "d_e", "m", "eta") and value is not None}
    if options.settings and options.trace is None:
        parser.error(f"--{', --'.join(options.settings)} must go with --trace N; got no --trace")
    if not 1 <= (1 if options.trace is None else options.trace) <= 10**6:
        parser.error(f"--trace must be an integer from 1 to 10^6; got {options.trace}")
    return parser, options


def main(argv=None):
    """The command line; returns the exit status."""
    parser, options = parse(argv)
    if options.help:
        return print(parser.format_help()) or 0
    if options.trace is not None:
        try:
            model = options.settings.pop("model", "one-hot")
            return trace(model, options.trace, options.settings, options.seed)
        except ValueError as error:
            parser.error(str(error))
        except ArithmeticError as error:  # a descent that diverges
            return print(f"run_all.py: {error}", file=sys.stderr) or 1
    partial = "partial" if options.quick or options.only else ""
    out = options.out or Path(__file__).parent / "figures" / partial
    try:
        out.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=".", dir=out)
    except OSError as error:
        parser.error(f"--out must be a folder that can be written; got {out} ({error.strerror})")
    unfinished.append(beside.name)
    with beside:
        return run(options.names, options.seed, options.quick, out, Path(beside.name))


if __name__ == "__main__":
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal cannot spell
        try:
            status = main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:  # the reader has gone, as in `--trace 9 | head`; a full disk
        with contextlib.suppress(Exception):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"run_all.py: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)
