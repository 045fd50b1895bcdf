"""Run every experiment, draw its figure, and check its claims: `python run_all.py --help`.

Each experiment reads set-up, run, draw, claims, and returns (figure, claims, headline): headline(ax) draws
the panel that tells its story on its own. A claim is a number predicted, a number measured and a tolerance.
"""
import argparse
import csv
import itertools
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import NormalDist


def interrupted(*_):
    """Ctrl-C: one line instead of a traceback; files already moved into place are whole."""
    print("\nrun_all.py: interrupted", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)  # before the imports, which take a moment
os.environ["MPLBACKEND"] = "agg"  # whatever it said before: no display is needed
os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small lose by more, and sums keep their order

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import sparse_token_selection as sts
from analytic_grads import (attention_loss_and_grads, fcn_loss_and_grads, one_hot_loss_and_grads,
                            population_loss_and_grads, softmax, stochastic_loss_and_grads)

BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
COLOURS = [BLUE, ORANGE, GREEN, PINK, SKY, RED]  # Okabe and Ito: safe for colour-blind readers
STYLE = {"font.size": 11, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False,
         "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9.5, "lines.markersize": 5,
         "figure.dpi": 150, "svg.hashsalt": "", "axes.titlesize": 11.5}
PREDICTED = {"color": "black", "linestyle": "--", "linewidth": 1.3, "zorder": 5}


# ---- what the experiments share --------------------------------------------------------------------

def claim(name, statement, source, relation, predicted, measured, tolerance=0.0):
    """A row of the table; relation is "=" (within the tolerance), "<=" or ">=" (up to the tolerance)."""
    gap = measured - predicted
    holds = {"=": abs(gap) <= tolerance, "<=": gap <= tolerance, ">=": gap >= -tolerance}[relation]
    return {"id": name, "statement": statement, "source": source, "predicted": f"{relation} {predicted:.6g}",
            "measured": f"{measured:.6g}", "tolerance": f"{tolerance:.3g}", "verdict": "ok" if holds else "FAIL"}


def figure(*titles, rows=1, height=4.2):
    """A figure of the README's width with one titled panel for each title."""
    fig = Figure(figsize=(11, height), layout="constrained")
    axes = fig.subplots(rows, -(-len(titles) // rows), squeeze=False).ravel()
    for ax, title in zip(axes, titles):
        ax.set_title(title)
    return fig, axes


def log_axes(ax, xlabel, ylabel):
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)


def log_steps(last, count=60):
    """About `count` steps from 1 to `last`, evenly spaced in the logarithm."""
    return np.unique(np.round(np.geomspace(1, last, count)).astype(int))


def record(descent, times, progress, label):
    """The states (t, params, loss) of a descent at the given times."""
    wanted, last, states = set(map(int, times)), int(max(times)), []
    for state in descent:
        if state[0] in wanted:
            states.append(state)
        if state[0] % 256 == 0:
            progress(f"{label}, step {state[0]} of {last}")
    return states


def cosine(matrix, direction):
    return np.vdot(matrix, direction) / (np.linalg.norm(matrix) * np.linalg.norm(direction))


def complex_step(loss, params, k):
    """dloss/dparams[k] by complex-step differentiation, entry by entry."""
    grad = np.zeros(np.shape(params[k]))
    for index in np.ndindex(grad.shape):
        shifted = [np.array(param, dtype=complex) for param in params]
        shifted[k][index] += 1e-30j
        grad[index] = np.imag(loss(*shifted)) / 1e-30
    return grad


def attention_loss(V, W, Z, z_query, target):
    """(A1)-(A4) a second time, by einsum and safe for complex numbers: what the gradients are checked against."""
    s = np.einsum("bdt,de,be->bt", Z, W, z_query)
    a = np.exp(s - s.real.max(axis=1, keepdims=True))
    a = a / a.sum(axis=1, keepdims=True)
    r = np.einsum("cd,bdt,bt->bc", V, Z, a) - target
    return np.einsum("bc,bc->", r, r) / (2 * len(Z))


def descend(loss_and_grads, draw, V_shape, size, eta, steps):
    """Gradient descent on V and W from zero, at each step on the arguments that draw() gives."""
    return sts.gradient_descent((np.zeros(V_shape), np.zeros((size, size))),
                                lambda V, W: loss_and_grads(V, W, *draw()), eta, steps)


def matrix_descent(T, q, d, eta, steps):
    """Matrix descent with one-hot encodings, the population over all subsets (P2, P4)."""
    E, selected = sts.one_hot_encoding(T), sts.all_subsets(T, q)
    whole = E, sts.sum_query(E, selected), selected
    return descend(population_loss_and_grads, lambda: whole, (d, d), T, eta, steps)


def off_the_line(T, q, d, eta, steps):
    """The largest distance of V, W from alpha I, omega (I - 11^T/T) with the scalars of (O3, O4)."""
    centre = np.eye(T) - 1 / T
    return max(max(abs(V - alpha * np.eye(d)).max(), abs(W - omega * centre).max())
               for (_, (V, W), _), (_, (alpha, omega), _) in zip(matrix_descent(T, q, d, eta, steps),
                                                                 sts.one_hot_recursion(T, q, d, eta, steps)))


def one_hot_z(loss, T, q, d):
    """z = e^{2 omega} from the loss: (C1) the other way round."""
    return (T - q) * (d / (2 * q * loss) - 1) / q


def one_hot_time(z, T, q, d, eta):
    """The time at which (C3) reaches z."""
    r = T - q
    return (q**2 * (z - 1) + 2 * q * r * np.log(z) + r**2 * (1 - 1 / z)) * (T - 1) / (2 * eta * d * r)


# ---- 1. one-hot encodings: the exact law (O, C) --------------------------------------------------------

def dynamics(rng, quick, progress):
    """The two scalars of the proof: matrix descent against the recursion against the closed forms."""
    # set-up
    late_T, q, d, eta, late = 16, 3, 5, 1.0, 20_000 if quick else 100_000
    escape_T, escape_eta = np.array([64, 128, 256] if quick else [64, 128, 256, 512, 1024, 2048]), 7.0
    mid = {"T": 256, "q": 4, "d": 4, "eta": 7.0 if quick else 2.0}
    beside, beside_steps = (0.05, 600) if quick else (0.01, 2500)  # off the stable eta, by this fraction

    # run
    times = log_steps(late, 120)
    states = record(sts.one_hot_recursion(late_T, q, d, eta, late), times, progress, "scalars at T = 16")
    late_loss = np.array([loss for _, _, loss in states])
    path = np.array([params for _, params, _ in states])
    small = record(matrix_descent(8, 3, 5, 1.0, 1000), log_steps(1000, 25), progress, "matrices at T = 8")

    crossing = np.full(escape_T.shape, np.nan)
    threshold, before, escape_loss = np.log((escape_T - 4) / 4), 0.0, []
    shown = log_steps(1500 if quick else 80_000, 60)
    keep = set(shown.tolist())
    for t, (_, omega), loss in sts.one_hot_recursion(escape_T, 4, 8, escape_eta, int(shown[-1])):
        crossed = np.isnan(crossing) & (omega >= threshold)
        if crossed.any():
            crossing[crossed] = (t - 1 + (threshold - before) / (omega - before))[crossed]
        before = omega
        if t in keep:
            escape_loss.append(loss)
        if t % 1024 == 0:
            progress(f"escape at T = {escape_T[0]} to {escape_T[-1]}, step {t} of {shown[-1]}")
    escape_loss = np.array(escape_loss)
    predicted_escape = np.array([sts.escape_time(int(T), 4, 8, escape_eta) for T in escape_T])

    escape = sts.escape_time(**mid)
    mid_times = np.unique(np.round(np.geomspace(mid["T"] / mid["eta"], 10.5 * escape, 200)).astype(int))
    mid_loss = np.array([loss for _, _, loss in record(sts.one_hot_recursion(**mid, steps=int(mid_times[-1])),
                                                       mid_times, progress, "scalars at T = 256")])
    mid_error = abs(mid_loss / sts.one_hot_loss_at(mid_times, **mid) - 1)
    mid_z = one_hot_z(mid_loss, mid["T"], mid["q"], mid["d"])
    lag = (mid_times - mid["T"] / mid["eta"]) / one_hot_time(mid_z, **mid) - 1

    stable = sts.largest_stable_eta(5, 4, 6)
    below, above = (off_the_line(5, 4, 6, factor * stable, beside_steps) for factor in (1 - beside, 1 + beside))
    on_line = off_the_line(8, 3, 5, 1.0, 1000)
    full = [params[0] for _, params, _ in sts.one_hot_recursion(6, 6, 5, 2.0, 200)]
    full_error = max(abs(1 - alpha - (1 - 2.0 / 6)**t) for t, alpha in enumerate(full))

    # draw
    fig, (left, middle, right) = figure("Loss: steps of descent on the closed form", "Escape of the attention",
                                        "The two scalars at T = 16")

    def law(ax):
        for T, colour, column in zip(escape_T[::2], COLOURS, escape_loss.T[::2]):
            ax.plot(shown, column, "o", color=colour, markersize=3.5, label=f"T = {T}: scalars (O3, O4)")
            after = shown[shown >= T / escape_eta]
            ax.plot(after, sts.one_hot_loss_at(after, int(T), 4, 8, escape_eta), **PREDICTED)
        ax.plot([t for t, _, _ in small if t], [loss for t, _, loss in small if t], "s", color=PINK, markersize=4,
                label="T = 8: matrices (P2, P4)")
        ax.plot(log_steps(1000)[6:], sts.one_hot_loss_at(log_steps(1000)[6:], 8, 3, 5, 1.0), label="predicted (C1, C3)",
                **PREDICTED)
        middle_step = math.sqrt(shown[-1]) * 8
        ax.text(middle_step, (escape_T[0] - 1) / (4 * escape_eta * middle_step) / 2, "(C4): (T - 1)/(4ηt)\nslope -1",
                ha="right", va="top", fontsize=10)
        log_axes(ax, "gradient steps t", "loss L")
        ax.set_ylim(bottom=escape_loss[-1, 0] / 300)
        ax.legend(fontsize=9, loc="lower left", borderaxespad=0.1, labelspacing=0.25)
    law(left)
    scaled = crossing * escape_eta * 8 / escape_T**2
    middle.plot(escape_T, scaled, "o", color=BLUE, label="measured: half of the attention on y")
    middle.plot(escape_T, predicted_escape * escape_eta * 8 / escape_T**2, label="predicted (C5)", **PREDICTED)
    middle.axhline(1, color="grey", linewidth=0.8)
    middle.set(xscale="log", xlabel="sequence length T", ylabel="escape time in units of T²/(ηd)",
               ylim=(0.98, 1.1 * scaled.max()))
    middle.legend()
    alpha, omega = path.T
    right.plot(times, alpha, "o", color=ORANGE, markersize=3.5, label="α (V = α I)")
    right.plot(times, omega, "o", color=BLUE, markersize=3.5, label="ω (W = ω (I - 11ᵀ/T))")
    z = one_hot_z(sts.one_hot_loss_at(times, late_T, q, d, eta), late_T, q, d)
    right.plot(times[times >= late_T], np.log(z[times >= late_T]) / 2, label="ω predicted (C3)", **PREDICTED)
    mass = q * np.exp(omega) / (q * np.exp(omega) + late_T - q)
    right.plot(times, mass, "o", color=GREEN, markersize=3.5, label="p: attention on y")
    right.set(xscale="log", xlabel="gradient steps t", ylabel="value")
    right.legend()

    # claims
    decade = times >= late / 10
    slope = np.polyfit(np.log(times[decade]), np.log(late_loss[decade]), 1)[0]
    log_rate = late_loss[times >= late / 100] * times[times >= late / 100] / np.log(times[times >= late / 100])
    early_or_late = (mid_times <= escape / 3) | (mid_times >= 10 * escape)
    looser = 100_000 / late  # the next term of (C3) falls like log(t)/t
    return fig, [
        claim("O1", "matrix descent stays on the two scalars, 1,000 steps: largest difference",
              "derived here", "<=", 0, on_line, 1e-12),
        claim("O5-below", f"{beside:.0%} below the stable eta it stays, {beside_steps} steps", "derived here", "<=", 0, below, 1e-12),
        claim("O5-above", f"{beside:.0%} above the stable eta it leaves", "derived here", ">=", 1e-6, above),
        claim("C4", f"L 4 eta t/(T-1) at t = {late}", "derived here", "=", 1,
              late_loss[-1] * 4 * eta * late / (late_T - 1), 0.005 * looser),
        claim("C4-slope", "slope of log L against log t, last decade", "derived here", "=", -1, slope, 0.01 * looser),
        claim("C4-rate", "L t/log t falls, better than the paper's log t/t: largest ratio of neighbours",
              "paper", "<=", 1, (log_rate[1:] / log_rate[:-1]).max()),
        claim("C5", f"escape time over (C5), T = 64 to {escape_T[-1]}: worst", "derived here", "=", 1,
              max(crossing / predicted_escape, key=lambda ratio: abs(ratio - 1)), 0.02),
        claim("C5-trend", "t_half eta d/T^2 falls towards 1: largest ratio of neighbours", "derived here", "<=", 1,
              (scaled[1:] / scaled[:-1]).max()),
        claim("C5-limit", "and stays above it: smallest", "derived here", ">=", 1, scaled.min()),
        claim("C3", "(C1, C3) over the recursion, to a third of the escape and from ten escapes on: worst error",
              "derived here", "<=", 0, mid_error[early_or_late].max(), 0.01),
        claim("C3-between", f"between: alpha's lag in time is below about d/(16q) (in loss up to "
              f"{mid_error[~early_or_late].max():.0%}, on the cliff)", "derived here", "<=",
              mid["d"] / (16 * mid["q"]), lag[~early_or_late].max()),
        claim("O-full", "q = T: 1 - alpha = (1 - eta/q)^t", "derived here", "<=", 0, full_error, 1e-12),
    ], law


# ---- 2. the full model, trained online (A, P) -----------------------------------------------------------

def population_check(rng, tokens, batches):
    """(P2, P4) against the mean of (A5, A8) over samples: the largest deviation in standard errors, and the
    bound that the normal law gives it at family level 1e-6 over five token laws."""
    T, q, d, d_e = 6, 2, 3, 4
    E, V, W = (rng.standard_normal(shape) for shape in ((d_e, T), (d, d), (d_e, d_e)))
    selected = sts.all_subsets(T, q)
    _, *exact = population_loss_and_grads(V, W, E, sts.sum_query(E, selected), selected)
    V_full, W_full = np.hstack([V, np.zeros((d, d_e))]), np.zeros((d + d_e, d + d_e))
    W_full[d:, d:] = W
    sampled = []
    for _ in range(batches):
        X, selected = sts.sample_batch(rng, 256, T, q, d, tokens)
        _, grad_V, grad_W = attention_loss_and_grads(V_full, W_full, *sts.full_inputs(X, E, sts.sum_query(E, selected)),
                                                     sts.sts(X, selected))
        sampled.append(np.concatenate([grad_V[:, :d].ravel(), grad_W[d:, d:].ravel()]))
    error = np.mean(sampled, axis=0) - np.concatenate([grad.ravel() for grad in exact])
    deviation = abs(error) / (np.std(sampled, axis=0, ddof=1) / math.sqrt(batches))
    return deviation.max(), NormalDist().inv_cdf(1 - 1e-6 / (2 * 5 * error.size))


def cross_block_check(rng, sizes, batches, T=8, q=2, d=4):
    """(A9): root mean square of the V_2 and W_12 gradients at V = [I/2, 0], omega = 1, for each batch size."""
    E = sts.one_hot_encoding(T)
    V, W = np.hstack([np.eye(d) / 2, np.zeros((d, T))]), np.zeros((d + T, d + T))
    W[d:, d:] = np.eye(T) - 1 / T
    squares, content = np.zeros((2, len(sizes))), 0.0
    for k, B in enumerate(sizes):
        for _ in range(batches):
            X, selected = sts.sample_batch(rng, B, T, q, d)
            _, grad_V, grad_W = attention_loss_and_grads(V, W, *sts.full_inputs(X, E, sts.sum_query(E, selected)),
                                                         sts.sts(X, selected))
            squares[:, k] += (grad_V[:, d:]**2).mean() / batches, (grad_W[:d, d:]**2).mean() / batches
            content = max(content, abs(grad_W[:, :d]).max())
    return np.sqrt(squares), content


def skewed_check(rng, batches, T=8, q=2, d=4, alpha=0.5):
    """(A10): grad W_12 for Gumbel tokens, predicted and measured, with its standard error."""
    E, skewness = sts.one_hot_encoding(T), 1.1395470994  # of the Gumbel law: 12 sqrt(6) zeta(3)/pi^3
    V, W = np.hstack([alpha * np.eye(d), np.zeros((d, T))]), np.zeros((d + T, d + T))
    W[d:, d:] = np.eye(T) - 1 / T
    a = softmax(np.where(np.arange(T) < q, 1.0, 0.0))
    predicted = alpha * skewness * q / T * (a * (1 - a) * (alpha * a - (np.arange(T) < q) / q)).sum()
    means = []
    for _ in range(batches):
        X, selected = sts.sample_batch(rng, 1024, T, q, d, "gumbel")
        grad_W = attention_loss_and_grads(V, W, *sts.full_inputs(X, E, sts.sum_query(E, selected)),
                                          sts.sts(X, selected))[2]
        means.append(grad_W[:d, d:].mean())
    return predicted, np.mean(means), np.std(means, ddof=1) / math.sqrt(batches)


def online(rng, T, q, d, eta, B, steps, tokens="gaussian"):
    """The full model, all of V and W, fresh samples at every step, one-hot encodings (A5, A8)."""
    E = sts.one_hot_encoding(T)

    def draw():
        X, selected = sts.sample_batch(rng, B, T, q, d, tokens)
        return *sts.full_inputs(X, E, sts.sum_query(E, selected)), sts.sts(X, selected)
    return descend(attention_loss_and_grads, draw, (d, d + T), d + T, eta, steps)


def matrices(rng, quick, progress):
    """Position-only attention is learned: the full V and W from zero, block by block."""
    # set-up
    T, q, d, eta, steps = 32, 3, 4, 2.0, 400 if quick else 2000
    direction_V, direction_W = np.hstack([np.eye(d), np.zeros((d, T))]), np.zeros((d + T, d + T))
    direction_W[d:, d:] = np.eye(T) - 1 / T

    # run
    progress("complex step")
    sample = (rng.standard_normal((2, 5)), rng.standard_normal((5, 5)), rng.standard_normal((3, 5, 4)),
              rng.standard_normal((3, 5)), rng.standard_normal((3, 2)))
    _, *grads = attention_loss_and_grads(*sample)
    gradient_error = max(abs(grad - complex_step(attention_loss, sample, k)).max() / abs(grad).max()
                         for k, grad in enumerate(grads))
    states = record(online(rng, T, q, d, eta, 128 if quick else 256, steps), np.append(0, log_steps(steps, 50)),
                    progress, "full model, T = 32")
    deviations = {}
    for tokens in sts.TOKENS:
        progress(f"population against samples, {tokens} tokens")
        deviations[tokens], bound = population_check(rng, tokens, 60 if quick else 400)
    progress("cross blocks")
    sizes = np.array([64, 256, 1024] if quick else [64, 256, 1024, 4096])
    cross, content = cross_block_check(rng, sizes, 30 if quick else 100)
    progress("skewed tokens")
    predicted, skewed, skewed_error = skewed_check(rng, 40 if quick else 200)
    laplace_T, laplace_B, laplace_steps = (4, 64, 100) if quick else (8, 128, 300)
    ends = np.empty((16, 2, 2))                                           # run, batch size B or 2B, alpha or omega
    for run, k in np.ndindex(16, 2):
        progress("Laplace tokens")
        *_, (_, (V, W), _) = online(rng, laplace_T, 2, 3, 0.25, laplace_B * (1 + k), laplace_steps, "laplace")
        centred = W[3:, 3:] - W[3:, 3:].mean()
        ends[run, k] = np.trace(V[:, :3]) / 3, np.trace(centred) / (laplace_T - 1)
    *_, (_, scalars, _) = sts.one_hot_recursion(laplace_T, 2, 3, 0.25, laplace_steps)
    extrapolated = 2 * ends[:, 1] - ends[:, 0]                            # noise in V and W has a mean effect of 1/B

    # draw
    fig = Figure(figsize=(11, 5.6), layout="constrained")
    heat, curves = fig.subfigures(1, 2, width_ratios=[2.2, 1])
    heat_axes = heat.subplots(2, 3, height_ratios=[d + 4, d + T])
    cosines_ax, norms_ax = curves.subplots(2, 1)

    def blocks(ax, matrix, name, t):
        size = abs(matrix).max() or 1.0
        ax.imshow(matrix, cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto")
        ax.axvline(d - 0.5, color="black", linewidth=0.8)
        if name == "W":
            ax.axhline(d - 0.5, color="black", linewidth=0.8)
        ax.set(title=f"{name}, step {t} (colours ±{size:.2g})", xticks=[d / 2 - 0.5, d + T / 2],
               xticklabels=["x", "position"], yticks=[d / 2 - 0.5, d + T / 2] if name == "W" else [d / 2 - 0.5])
        ax.set_yticklabels(["x", "position"] if name == "W" else ["output"], rotation=90, va="center")
        ax.tick_params(length=0)
        ax.grid(False)
    middle = next(k for k, (t, _, _) in enumerate(states) if t >= T**2 / (eta * d))
    for column, k in enumerate((0, middle, len(states) - 1)):
        t, (V, W), _ = states[k]
        blocks(heat_axes[0, column], V, "V", t)
        blocks(heat_axes[1, column], W, "W", t)
    moving = states[1:]
    steps_shown = [t for t, _, _ in moving]
    cosines = np.array([[cosine(V, direction_V) for _, (V, _), _ in moving],
                        [cosine(W, direction_W) if W.any() else np.nan for _, (_, W), _ in moving]])
    for values, colour, label in zip(cosines, (ORANGE, BLUE), ("V with [I, 0]", "W with I - 11ᵀ/T")):
        cosines_ax.plot(steps_shown, values, "o", color=colour, markersize=4, label=label)
    cosines_ax.axhline(1, **PREDICTED)
    cosines_ax.set(xscale="log", ylim=(0, 1.08), title="Cosine with the ground truth")
    cosines_ax.legend(loc="lower right")
    names = {"V₁": lambda V, W: V[:, :d], "W₂₂": lambda V, W: W[d:, d:], "V₂": lambda V, W: V[:, d:],
             "W₁₂": lambda V, W: W[:d, d:]}
    for (label, block), colour in zip(names.items(), (ORANGE, BLUE, PINK, GREEN)):
        norms_ax.plot(steps_shown, [np.linalg.norm(block(*params)) for _, params, _ in moving], "o",
                      color=colour, markersize=4, label=label)
    norms_ax.set(xscale="log", yscale="log", xlabel="gradient steps t", ylabel="Frobenius norm",
                 title="V₂, W₁₂: sampling noise", ylim=(None, 2e3))
    norms_ax.legend(ncol=4, loc="upper center", handletextpad=0, columnspacing=0.8)

    def learned(ax):
        t, (_, W), _ = states[-1]
        blocks(ax, W, "W", t)

    # claims
    slopes = [np.polyfit(np.log(sizes), np.log(row), 1)[0] for row in cross]
    claims = [claim("A-gradient", "(A5, A8) against complex-step differentiation: error over the largest entry",
                    "derived here", "<=", 0, gradient_error, 1e-12)]
    claims += [claim(f"P-{tokens}", f"(P2, P4) against samples, {tokens} tokens: standard errors",
                     "derived here", "<=", bound, deviation) for tokens, deviation in deviations.items()]
    claims += [
        claim("A-V", f"cosine of V with [I, 0] after {steps} steps online", "paper", ">=", 0.99,
              cosine(states[-1][1][0], direction_V)),
        claim("A-W", "cosine of W with I - 11^T/T", "paper", ">=", 0.9 if quick else 0.99,
              cosine(states[-1][1][1], direction_W)),
        claim("A9-V2", "cross block V_2: exponent of its gradient in B", "derived here", "=", -0.5, slopes[0], 0.05),
        claim("A9-W12", "cross block W_12: exponent of its gradient in B", "derived here", "=", -0.5, slopes[1], 0.05),
        claim("A9-zero", "columns of W against the query's content never move", "derived here", "=", 0, content),
        claim("A10", "Gumbel tokens pull W_12: measured with one-hot encodings", "derived here", "=", predicted,
              skewed, 4 * skewed_error)]
    for name, end, predicted in zip(("alpha", "omega"), extrapolated.T, scalars):
        claims.append(claim(f"O-laplace-{name}", f"Laplace tokens by samples, extrapolated in 1/B, end on the {name} "
                            "of (O3, O4)", "derived here", "=", float(predicted), end.mean(),
                            4 * end.std(ddof=1) / math.sqrt(len(end))))
    return fig, claims, learned


# ---- 3. stochastic encodings (S) -----------------------------------------------------------------------

def fresh_signs(rng, selected, d_e, query="dual"):
    """Fresh encodings for each row of selected: E, e_y, selected."""
    E = sts.random_sign_encoding(rng, d_e, selected.shape[1], len(selected))
    return E, sts.QUERIES[query](E, selected), selected


def two_scalars(u, q, d, d_e, eta, steps):
    """alpha and c from zero on frozen overlaps: by (S1) this is the descent of V and W."""
    return sts.gradient_descent((0.0, 0.0), lambda alpha, c: stochastic_loss_and_grads(alpha, c, u, q, d, d_e),
                                eta, steps)


def against(predicted, loss, u, tolerance):
    """predicted/loss(u), and the tolerance plus 4 standard errors, from the scatter between 20 groups of rows."""
    parts, whole = [loss(rows) for rows in np.array_split(u, 20)], loss(u)
    return predicted / whole, tolerance + 4 * np.std(parts, ddof=1) / math.sqrt(20) / whole


def furthest(pairs):
    """Of (ratio, tolerance) pairs the one that fills most of its tolerance around 1."""
    return max(pairs, key=lambda pair: abs(pair[0] - 1) / pair[1])


def least_loss(rng, B, T, q, d_e, query="dual"):
    """The least L/L_0 over c: c chosen on one half of the draws, the loss taken on the other, both ways."""
    grid = np.array([6, 7.5, 9, 11, 13.5, 16.5]) if query == "dual" else np.linspace(1.25, 5.0, 16)
    halves = np.array_split(sts.overlaps(rng, B, T, q, d_e, query), 2)
    losses = np.array([[sts.overlap_loss(c, u, q, 1) for c in grid] for u in halves])
    first, second = losses.argmin(axis=1)
    return (losses[1, first] + losses[0, second]) / 2 * 2 * q


def growth(states, u, q, eta, dimension):
    """(S7): d(1/L)/dt over eta kappa^2/dimension along a run, from twice the escape: the ratio furthest from 1."""
    escape, ratios = next(t for t, (_, c), _ in states if q * np.exp(c) >= u.shape[1] - q), []
    for t in np.geomspace(2 * escape, states[-1][0] / 1.05, 12).astype(int):
        c, h = states[t][1][1], max(1, t // 50)
        kappa = math.log(sts.overlap_loss(c - 1e-4, u, q, 1) / sts.overlap_loss(c + 1e-4, u, q, 1)) / 2e-4
        ratios.append((1 / states[t + h][2] - 1 / states[t - h][2]) / (2 * h) / (eta * kappa**2 / dimension))
    return max(ratios, key=lambda ratio: abs(ratio - 1))


def off_identity(query, q, T=3, d_e=2):
    """(S1) over all 2^6 sign patterns: how far grad W is from a multiple of I, at V = 0.7 I, W = 1.3 I."""
    bits = np.arange(2**(d_e * T))[:, None] >> np.arange(d_e * T) & 1
    E = (2 * bits - 1).reshape(-1, d_e, T) / math.sqrt(d_e)
    first = np.broadcast_to(np.arange(T) < q, (len(E), T))
    grad = population_loss_and_grads(0.7 * np.eye(3), 1.3 * np.eye(d_e), E, sts.QUERIES[query](E, first), first)[2]
    return abs(grad - np.trace(grad) / d_e * np.eye(d_e)).max()


def stochastic(rng, quick, progress):
    """Stochastic encodings: the law of two scalars, the directions learned, and the dimension needed."""
    # set-up
    T, q, d, d_e, eta, L_0 = 16, 3, 24, 192, 5.5, 24 / 6
    less, matrix_d_e, matrix_steps, full_steps = (8, 64, 160, 100) if quick else (1, d_e, 1000, 800)
    needed = {eps: sts.required_dimension(T, q, eps) for eps in (0.1, 0.01, 0.001)}     # 24, 38, 52
    dual_draws = {24: 40_000, 31: 40_000, 38: 80_000, 48: 240_000, 52: 80_000}          # the tail gets rare
    sum_draws = {16: 4000, 32: 4000, 64: 4000, 128: 20_000, 256: 20_000, 512: 20_000, 1024: 10_000}
    first = lambda B: np.broadcast_to(np.arange(T) < q, (B, T))                         # any y will do

    # run
    progress("gradients and moments")
    gaps = []
    for _ in range(200 // less):
        grad = population_loss_and_grads(0.7 * np.eye(3), 1.5 * np.eye(4), *fresh_signs(rng, first(256), 4))[2]
        trace = stochastic_loss_and_grads(0.7, 1.5, sts.overlaps(rng, 256, T, q, 4), q, 3, 4)[2]
        gaps.append(np.trace(grad) / 4 - trace)
    direct, closed = [], []
    for size, k, dimension in ((32, 1, 64), (128, 2, 64), (32, 3, 128), (64, 4, 256)):
        u, sigma2 = sts.overlaps(rng, 4000 // less, size, k, dimension), sts.overlap_variance(k, dimension)
        for c in (c for c in (0.5, 1.0, 2.0, 3.0, 4.0, 5.0) if c * sigma2 <= 0.15):
            zero, one = (stochastic_loss_and_grads(alpha, c, u, k, d, dimension)[1] for alpha in (0.0, 1.0))
            best = stochastic_loss_and_grads(zero / (zero - one), c, u, k, d, dimension)[0]
            direct.append(abs(sts.overlap_loss(c, u, k, d) / best - 1))
            closed.append(against(sts.stochastic_loss(c, size, k, d, sigma2),
                                  lambda rows: sts.overlap_loss(c, rows, k, d), u, 0.02))

    start = int(np.argmax(sts.stochastic_trajectory(np.arange(1000), T, q, d, d_e, eta)[2] <= 0.1 * L_0))
    last = (10 if quick else 100) * start
    checked = np.round(np.geomspace(start, last, 5)).astype(int)
    frozen, held = (sts.overlaps(rng, B, T, q, d_e) for B in ((600, 5000) if quick else (2000, 20_000)))
    states = record(two_scalars(frozen, q, d, d_e, eta, last), range(last + 1), progress, "two scalars")
    shown = np.union1d(log_steps(last, 25), checked)
    measured = np.array([stochastic_loss_and_grads(*states[t][1], held, q, d, d_e)[0] for t in shown]) / L_0
    predicted = sts.stochastic_trajectory(shown, T, q, d, d_e, eta)[2] / L_0
    ratios = (growth(states, frozen, q, eta, d_e),
              growth(list(sts.one_hot_recursion(T, q, 2, 2.0, 3000)), first(1) * 1.0, q, 2.0, T - 1))

    online = record(descend(population_loss_and_grads, lambda: fresh_signs(rng, first(64), matrix_d_e), (d, d),
                            matrix_d_e, eta, matrix_steps), log_steps(matrix_steps, 16), progress, "the whole W")
    test = fresh_signs(rng, first(1000), matrix_d_e)
    full, one_set = {}, sts.random_sign_encoding(rng, 64, T)
    for name in ("stochastic", "fixed"):
        def samples():
            X, selected = sts.sample_batch(rng, 128, T, q, 4)
            E = one_set if name == "fixed" else sts.random_sign_encoding(rng, 64, T, 128)
            return *sts.full_inputs(X, E, sts.dual_query(E, selected)), sts.sts(X, selected)
        run = record(descend(attention_loss_and_grads, samples, (4, 68), 68, 2.0, full_steps),
                     log_steps(full_steps, 25), progress, f"full model, {name} encodings")
        identity = np.diag(np.arange(68) >= 4)
        full[name] = np.array([[t, cosine(V, np.eye(4, 68)), cosine(W, identity) if W.any() else np.nan]
                               for t, (V, W), _ in run]).T
    progress("least loss over c")
    dual = {k: least_loss(rng, B // less, T, q, k) for k, B in dual_draws.items()}
    total = {k: least_loss(rng, B // less, T, q, k, "sum") for k, B in sum_draws.items()}
    apart = least_loss(rng, 4000, 32, q, 64, "sum") / least_loss(rng, 20_000 // less, 32, q, 64)

    # draw
    fig, (left, middle, right) = figure("Loss: nothing is fitted", "Full model from samples, $d_e$ = 64",
                                        f"Least loss at T = {T}, q = {q}", height=4.4)

    def law(ax):
        late = shown >= T / eta                                       # where (S6) starts
        ax.plot(shown, measured, "o", color=BLUE, label=f"two scalars, $d_e$ = {d_e}")
        ax.plot([t for t, _, _ in online], [population_loss_and_grads(*params, *test)[0] / L_0
                                            for _, params, _ in online], "s", color=ORANGE, markerfacecolor="none",
                label=f"whole W online, $d_e$ = {matrix_d_e}")
        ax.plot(shown[late], predicted[late], label="(S6)", **PREDICTED)
        log_axes(ax, "gradient steps t", "loss L / L₀, fresh encodings")
        ax.legend(loc="lower left", title=f"T = {T}, q = {q}, d = {d}, η = {eta:g}", alignment="left",
                  title_fontsize=9.5)
    law(left)
    bound = math.sqrt(T / 64)
    for name, (steps, *cosines) in full.items():
        for values, letter, colour in zip(cosines, "VW", (ORANGE, BLUE)):
            middle.plot(steps, values, "s" if name == "fixed" else "o", color=colour,
                        markerfacecolor="none" if name == "fixed" else colour, label=f"{letter}, {name} encodings")
    middle.axhline(1, **PREDICTED)
    middle.axhline(bound, **PREDICTED)
    middle.text(full_steps, bound + 0.02, "one set: at most √(T/$d_e$)", ha="right", fontsize=9.5)
    middle.set(xscale="log", ylim=(0, 1.05), xlabel="gradient steps t",
               ylabel="cosine of V, W with the ground truth")
    middle.legend(loc="lower right", borderaxespad=0, handletextpad=0.2, fontsize=9)
    for query, points, colour in (("sum", total, PINK), ("dual", dual, GREEN)):
        sizes = np.geomspace(14, 1100 if query == "sum" else 70, 100).astype(int)
        right.plot(sizes, [2 * q * sts.stochastic_floor(T, q, 1, int(k), query) for k in sizes], **PREDICTED)
        right.plot(list(points), list(points.values()), "o", color=colour, label=f"{query} query")
    right.text(230, 0.05, "(S9)\nlog²($d_e$)/$d_e$")
    right.text(68, 5e-4, "(S8), conservative\nexp(-$d_e$/2q)")
    log_axes(right, "dimension of the encodings $d_e$", "least loss over c, L / L₀")
    right.set(ylim=(1e-4, 1))
    right.legend(loc="lower right")

    # claims
    error = abs(measured / predicted - 1)[np.isin(shown, checked)].max()
    slope = np.polyfit([k for k in dual if k <= 48], [math.log(dual[k]) for k in dual if k <= 48], 1)[0]
    pairs = [(query, selected) for query in sts.QUERIES for selected in (1, 2)]
    return fig, [
        claim("S1-exact", "grad W is a multiple of I over all 2^6 sign patterns, both queries, q = 1, 2",
              "derived here", "<=", 0, max(off_identity(*pair) for pair in pairs), 1e-14),
        claim("S1-sampled", f"cosine of W with I, the whole W online, {matrix_steps} steps", "derived here", ">=",
              0.999, cosine(online[-1][1][1], np.eye(matrix_d_e))),
        *(claim(f"S1-full-{name}", f"full model by samples, {full_steps} steps: cosine of {name} with I", "paper",
                ">=", 0.95 if quick else 0.99, value) for name, value in zip("VW", full["stochastic"][1:, -1])),
        claim("S1-fixed-W", "one fixed set: W stays in its span, cosine at most sqrt(T/d_e)", "derived here", "<=",
              bound, full["fixed"][2, -1], 1e-12),
        claim("S3", "trace estimate against the matrix gradient: standard errors", "derived here", "<=", 4,
              abs(np.mean(gaps)) / (np.std(gaps, ddof=1) / math.sqrt(len(gaps)))),
        claim("S4", "against the loss at the best alpha: largest relative difference", "derived here", "<=", 0,
              max(direct), 1e-9),
        claim("S5", f"closed form over (S4) at {len(closed)} points (T, q, d_e, c): worst", "derived here", "=", 1,
              *furthest(closed)),
        claim("S6", f"predicted against measured loss, steps {start} to {last}: worst error", "derived here", "<=",
              0, error, 0.03),
        *(claim(f"S7-{name}", f"d(1/L)/dt over eta kappa^2/{size} after the escape: worst", "derived here", "=", 1,
                ratio, 0.02) for name, size, ratio in zip(("stochastic", "one-hot"), ("d_e", "(T-1)"), ratios)),
        claim("S8-slope", "dual query: slope of log(least loss) against d_e, times 2q", "derived here", "=", -1,
              slope * 2 * q, 0.25 if quick else 0.15),
        *(claim(f"S8-eps-{eps:g}", f"least L/L_0 at the required d_e = {k}", "derived here", "<=", eps, dual[k])
          for eps, k in needed.items()),
        claim("S9", "sum query: least loss over (S9), d_e = 128 to 1,024: worst", "derived here", "=", 1,
              *furthest((loss / (2 * q * sts.stochastic_floor(T, q, 1, k, "sum")), 0.1 if quick else 0.05)
                        for k, loss in total.items() if k >= 128)),
        claim("S9-dual", "sum over dual, least losses at T = 32, d_e = 64", "derived here", ">=", 100, apart),
    ], law


# ---- 4. longer sequences (L) -------------------------------------------------------------------------------

def one_hot_longer(alpha, omega, T, selected, d):
    """L/L_0 with one-hot encodings on longer sequences, W = omega (I - 11^T/T) on the T trained ones."""
    scores = np.zeros(selected.shape)
    scores[:, :T] = omega * (selected[:, :T] - selected[:, :T].mean(axis=1, keepdims=True))
    q = selected[0].sum()
    return q * np.vdot(miss := alpha * softmax(scores) - selected / q, miss) / len(selected)  # (P1), V = alpha I


def length(rng, quick, progress):
    """Train at T, test at up to 64 T: stochastic encodings carry over, fixed ones and one-hot do not."""
    # set-up
    T, q, d, eta, L_0 = 32, 3, 16, 4.0, 16 / 6
    steps, sets, B, rows = (360, 3, 40, 250) if quick else (3000, 5, 400, 600)
    lengths = T * 2**np.arange(7)
    checkpoints = [90, 140, 220, 360] if quick else [100, 300, 1000, 3000]

    # run
    trained, draws = {}, {}
    for d_e in (64, 128):
        trained[d_e] = record(two_scalars(sts.overlaps(rng, rows, T, q, d_e), q, d, d_e, eta, steps), checkpoints,
                              progress, f"stochastic encodings, d_e = {d_e}")
        short, long = sts.overlaps(rng, 8 * B, 4 * T, q, d_e), sts.overlaps(rng, B, 64 * T, q, d_e)
        draws[d_e] = {k: (short if k <= 4 * T else long)[:, :k] for k in lengths}  # T' of the columns: length T'
    law = lambda params, d_e: np.array([sts.length_loss(*params, int(k), q, d, sts.overlap_variance(q, d_e))
                                        for k in lengths]) / L_0
    loss = lambda params, u, d_e: stochastic_loss_and_grads(*params, u, q, d, d_e)[0] / L_0
    curves = np.array([[loss(params, u, 128) for u in draws[128].values()] for _, params, _ in trained[128]])
    ratios = [against(predicted, lambda u: loss(params, u, 128), u, 0.04) for _, params, _ in trained[128]
              for predicted, u in zip(law(params, 128), draws[128].values())]
    last = trained[64][-1][1]
    fresh = np.array([loss(last, u, 64) for u in draws[64].values()])

    own, other, subsets = np.empty((sets, 7)), np.empty((sets, 7)), sts.all_subsets(T, q)
    for i in range(sets):
        E = sts.random_sign_encoding(rng, 64, 64 * T)                 # trained on its first T columns
        queries, first = sts.dual_query(E[:, :T], subsets), E[:, :T].copy()
        run = descend(population_loss_and_grads, lambda: (first, queries[y := rng.integers(len(subsets), size=48)],
                                                          subsets[y]), (d, d), 64, eta, steps)
        (_, params, _), = record(run, [steps], progress, f"fixed set {i + 1} of {sets}")
        for j, k in enumerate(map(int, lengths)):
            selected = sts.sample_batch(rng, B // 2, k, q, 1)[1]
            for losses, tested in ((own, E[:, :k]), (other, sts.random_sign_encoding(rng, 64, k))):
                losses[i, j] = population_loss_and_grads(*params, tested, sts.dual_query(tested, selected),
                                                         selected)[0] / L_0
    own, other = np.median(own, axis=0), np.median(other, axis=0)
    *_, (_, scalars, _) = sts.one_hot_recursion(T, q, d, eta, steps)
    one_hot = [one_hot_longer(*scalars, T, sts.sample_batch(rng, B, int(k), q, 1)[1], d) for k in lengths]

    # draw
    fig, (left, right) = figure("Trained at length T, tested on longer sequences",
                                "Stochastic, $d_e$ = 128: training longer reaches further", height=4.6)

    def doubling(ax):
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, ["T", *(f"{k // T} T" for k in lengths[1:])])
        ax.set(xlabel="length of the test sequences", ylabel="loss L / L₀")

    def carries_over(ax):
        for losses, style, colour, label in (
                (one_hot, "^-", GREEN, "one-hot"), (own, "s-", ORANGE, "fixed set, extended"),
                (other, "s:", PINK, "fixed set, on fresh sets"), (fresh, "o-", BLUE, "stochastic")):
            ax.plot(lengths, losses, style, color=colour, linewidth=2, label=label)
        ax.plot(lengths, law(last, 64), label="(L1)", **PREDICTED)
        doubling(ax)
        ax.set(ylim=(-0.03, 1.4), yticks=np.linspace(0, 1, 6))
        ax.legend(ncols=2, loc="upper left", title=f"trained at T = {T}, {steps:,} steps, $d_e$ = 64",
                  alignment="left", title_fontsize=9.5)
    carries_over(left)
    for losses, (t, params, _), colour in zip(curves, trained[128], (SKY, GREEN, ORANGE, BLUE)):
        right.plot(lengths, losses, "o", color=colour, label=f"after {t:,} steps")
        right.plot(lengths, law(params, 128), label="(L1)" if t == steps else None, **PREDICTED)
    right.set_yscale("log")
    doubling(right)
    right.legend(loc="lower right")

    # claims
    return fig, [
        claim("L1", "(L1) over the loss at T to 64 T, after four training times: worst", "derived here", "=", 1,
              *furthest(ratios)),
        claim("L1-longer", "training longer lowers the loss at every length: largest ratio", "derived here", "<=",
              1, (curves[1:] / curves[:-1]).max()),
        claim("L-fits-stochastic", f"L/L_0 at T after {steps} steps, d_e = 64, stochastic encodings", "paper",
              "<=", 0.02, fresh[0]),
        claim("L-fits-fixed", f"and one fixed set, median of {sets}", "paper", "<=", 0.02, own[0]),
        claim("L-fixed", "at 2 T: loss of the fixed set, extended, over the stochastic one's", "paper", ">=", 5,
              own[1] / fresh[1]),
        claim("L-one-hot", "at 2 T: loss of one-hot over the stochastic one's", "derived here", ">=", 5,
              one_hot[1] / fresh[1]),
    ], carries_over


# ---- 5. fully-connected networks: the exact floor (F) ---------------------------------------------------

def fcn_batch(rng, B, T, q, d):
    X, selected = sts.sample_batch(rng, B, T, q, d)
    return sts.fcn_inputs(X, selected), sts.sts(X, selected), X, selected


def fcn_gradient_check(rng, T=3, q=2, d=2, m=6, h=1e-5):
    """(F2) away from kinks: errors against central differences and complex steps of the active piece."""
    params = [rng.standard_normal(param.shape) for param in sts.init_fcn(rng, m, T, d)]
    inputs, target = fcn_batch(rng, 400, T, q, d)[:2]
    away = abs(inputs @ params[0].T + params[1]).min(axis=1) > 0.05
    inputs, target = inputs[away], target[away]
    ends, kept = np.cumsum([param.size for param in params]), inputs @ params[0].T + params[1] > 0

    def loss(flat, active=None):
        W1, b1, A, b2 = (part.reshape(param.shape) for part, param in zip(np.split(flat, ends), params))
        pre = inputs @ W1.T + b1
        r = np.einsum("km,bm,bm->bk", A, pre, pre > 0 if active is None else active) + b2 - target
        return np.einsum("bk,bk->", r, r) / (2 * len(r))
    grads, flat = (np.concatenate([x.ravel() for x in xs])
                   for xs in (fcn_loss_and_grads(*params, inputs, target)[1:], params))
    differences = [(loss(flat + e) - loss(flat - e)) / (2 * h) for e in h * np.eye(flat.size)]
    complex_steps = [loss(flat + 1e-30j * e, kept).imag / 1e-30 for e in np.eye(flat.size)]
    return [abs(grads - other).max() / abs(grads).max() for other in (differences, complex_steps)]


def least_losses(T, q, d):
    """For m = 0 ... Td, half the sum of the Td - m least eigenvalues of M kron I, M summed over all subsets."""
    selected = sts.all_subsets(T, q)
    least = np.linalg.eigvalsh(np.kron(selected.T @ selected / (len(selected) * q**2), np.eye(d)))
    return np.append(0, np.cumsum(least))[::-1] / 2


def regression_check(rng, repeats, T=5, q=2, d=3, B=60):
    """(F3) against regression of the target on W1 vec(X), for every y: largest deviation in standard errors."""
    selected, deviations = sts.all_subsets(T, q), []
    for m, rank in ((1, 1), (4, 4), (6, 3), (20, 13)):
        W1, losses = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, T * d)), []
        for _ in range(repeats):
            X = rng.standard_normal((B, d, T))
            seen = np.linalg.svd(X.transpose(0, 2, 1).reshape(B, -1) @ W1.T, full_matrices=False)[0][:, :rank]
            target = (X @ selected.T / q).reshape(B, -1)
            losses.append(((target - seen @ (seen.T @ target))**2).sum() / (2 * (B - rank) * len(selected)))
        error = np.mean(losses) - sts.fcn_first_layer_floor(W1, T, q, d)
        deviations.append(abs(error) / (np.std(losses, ddof=1) / math.sqrt(repeats)))
    return max(deviations)


def exact_fcn_check(rng, T, q, d, K=8.0):
    """(F5): the largest error where all |x| < K, and the population L/L_0. An output's error is a sum over
    positions of functions of one normal number: read off the network, integrated by the trapezoid rule."""
    def error(X, selected):
        return sts.fcn(*sts.exact_fcn(T, q, d, K), sts.fcn_inputs(X, selected)) - sts.sts(X, selected)
    inside = abs(error(rng.uniform(-K, K, (4000, d, T)), sts.sample_batch(rng, 4000, T, q, d)[1])).max()
    x = np.linspace(-K - 12, K + 12, 8001)
    weight = np.exp(-x**2 / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    X, means, squares = np.zeros((x.size, d, T)), [], []
    X[:, 0, 0] = x
    for on_y in (np.arange(T) < q, np.arange(T) >= T - q):                      # x at a place in y, then off y
        at_x = error(X, np.broadcast_to(on_y.astype(float), (x.size, T)))[:, 0]
        means.append(weight @ at_x)
        squares.append(weight @ at_x**2)
    count, means = np.array([q, T - q]), np.array(means)
    return inside, q * (count @ (squares - means**2) + (count @ means)**2)


def fcn_run(rng, m, T, d, batch, rate, steps, plain=False):
    """Descent of a network of width m, by Adam or plain, on the inputs and targets that `batch` holds at each
    step, from 0.3 of the usual start: wide networks then learn the selection sooner."""
    def gradients(*params):
        return fcn_loss_and_grads(*params, *batch[:2])
    return sts.gradient_descent(tuple(0.3 * param for param in sts.init_fcn(rng, m, T, d)),
                                gradients if plain else sts.adam(gradients, steps), rate, steps)


def side_by_side(runs, batch, draw, steps, progress, label):
    """Descents on the same samples: a fresh draw into `batch` at each step. Yields t and the parameters of all."""
    for t in range(steps + 1):
        batch[:] = draw()
        yield t, [next(run)[1] for run in runs]
        if t % 64 == 0:
            progress(f"{label}, step {t} of {steps}")


def with_error(f, target, q):
    """L/L_0 on a test set and its standard error; the zero predictor, known to have 1, is a control variate."""
    loss, zero = (q / target.shape[1] * ((g - target)**2).sum(axis=1) for g in (f, 0.0))
    loss = loss - np.cov(loss, zero)[0, 1] / zero.var(ddof=1) * (zero - 1)
    return loss.mean(), loss.std(ddof=1) / math.sqrt(len(loss))


def judged(params, inputs, target, T, q, d):
    """Width, and over L_0: test loss, standard error, the floors of this first layer (F3) and its width (F4)."""
    floors = sts.fcn_first_layer_floor(params[0], T, q, d), sts.fcn_loss_floor(len(params[0]), T, q, d)
    return len(params[0]), *with_error(sts.fcn(*params, inputs), target, q), *(2 * q / d * x for x in floors)


def above_floors(name, networks):
    """The two rows that all trained networks must pass: their smallest margins, in units of L_0."""
    m, loss, error, own, least = np.array(networks).T
    return [claim(f"F3-{name}", f"{len(m)} networks: test loss + 4 standard errors less floor of the first layer",
                  "derived here", ">=", 0, (loss + 4 * error - own).min()),
            claim(f"F4-{name}", "and that floor less the floor of the width, where m < Td: least",
                  "derived here", ">=", 0, (own - least)[least > 0].min(), 1e-12)]


def scalar_transformer(rng, B, steps, T, q, d, d_e, eta=3.0):
    """L/L_0 and its standard error after descent of the two scalars (S1)-(S3): dual query, fresh encodings."""
    def loss_and_grads(alpha, c):
        return stochastic_loss_and_grads(alpha, c, sts.overlaps(rng, B, T, q, d_e), q, d, d_e)
    for _, (alpha, c), _ in sts.gradient_descent((0.0, 0.0), loss_and_grads, eta, steps):
        pass
    a = softmax(c * sts.overlaps(rng, 4000, T, q, d_e))
    loss = q * ((alpha * a - (np.arange(T) < q) / q)**2).sum(axis=1)            # (P1) at V = alpha I, over L_0
    return loss.mean(), loss.std(ddof=1) / math.sqrt(len(loss))


def floor(rng, quick, progress):
    """No first layer of m neurons beats (F4); trained networks come near it; exact_fcn ends it at m = Td."""
    # set-up
    small, long = {"T": 8, "q": 2, "d": 4}, {"T": 32, "q": 2, "d": 4}     # L_0 = d/(2q) = 1 in both
    # Three starts at m = 8 and 16: about 1 in 50 ends at m = 8 with neurons in pairs relu(z) - relu(-z) = z, which
    # see d directions only.
    adam = ([1, 2, 4, 32], [8, 32]) if quick else ([1, 2, 4, *[8, 16] * 3, 32, 64, 128], [4, 16, 32, 128, 256])
    plain = ([8], []) if quick else ([2, 8, 32], [32])
    steps, dimensions = (400, 120, 150) if quick else (2000, 1000, 800), (24, 28)

    def indices(B):  # the paper's own input: the q numbers y_1 < ... < y_q in place of the 0/1 row
        inputs, target, _, selected = fcn_batch(rng, B, **small)
        inputs[:, 32:] = 0
        inputs[:, 32:34] = 1 + np.nonzero(selected)[1].reshape(B, 2)
        return inputs, target

    # run
    progress("gradients, eigenvalues, regressions")
    differences, complex_steps = fcn_gradient_check(rng)
    sizes = (8, 2, 4), (5, 1, 3), (6, 5, 2), (9, 4, 3), (2, 1, 5), (4, 4, 3), (1, 1, 2)
    eigenvalue_error = max(abs(least_losses(T, q, d) - sts.fcn_loss_floor(np.arange(T * d + 1), T, q, d)).max()
                           for T, q, d in sizes)
    deviation = regression_check(rng, 60 if quick else 400)
    inside, exact_loss = exact_fcn_check(rng, **small)
    trained, batch = [], []                                               # at T = 8, at T = 32, by indices
    for k, (size, draw, B, rate, tests) in enumerate((
            (small, lambda B: fcn_batch(rng, B, **small), 256, 0.02, 20_000),
            (long, lambda B: fcn_batch(rng, B, **long), 128, 0.01, 4000), (small, indices, 256, 0.01, 10_000))):
        runs = [fcn_run(rng, m, size["T"], 4, batch, rate, steps[k]) for m in (*adam, (8, 24))[k]]
        runs += [fcn_run(rng, m, size["T"], 4, batch, 0.1, steps[k], plain=True) for m in (*plain, ())[k]]
        for _, networks in side_by_side(runs, batch, lambda: draw(B), steps[k], progress, f"networks at {size}"):
            pass
        inputs, target = draw(tests)[:2]
        trained.append(np.array([judged(params, inputs, target, **size) for params in networks]))
    progress("transformers")
    transformers = [scalar_transformer(rng, *((32, 300) if quick else (64, 1000)), **size, d_e=d_e)
                    for size, d_e in zip((small, long), dimensions)]

    # draw
    fig, axes = figure("T = 8, q = 2, d = 4: the floor is tight",
                       "T = 32, q = 2, d = 4: a transformer is far below")

    def against_width(ax, k=1):
        size, table, count, width = (small, long)[k], trained[k], len(adam[k]), 4 + dimensions[k]
        m = np.unique(np.append(np.geomspace(1, 16 * size["T"], 200).astype(int), 4 * size["T"]))
        ax.plot(m, sts.fcn_loss_floor(m, **size), label="floor of the width (F4)", **PREDICTED)
        ax.plot(*table[:, [0, 3]].T, "_", color=PINK, markersize=13, markeredgewidth=2.2,
                label="floor of each trained first layer (F3)")
        ax.plot(*table[:count, :2].T, "o", color=BLUE, zorder=6, label="FCN trained by Adam")
        ax.plot(*table[count:, :2].T, "s", color=ORANGE, zorder=6, label="FCN trained by plain descent")
        ax.plot(4 * size["T"], 0, "D", color=GREEN, markersize=7, zorder=7, clip_on=False,
                label=f"exact FCN, m = Td = {4 * size['T']} (F5)")
        ax.plot(width, transformers[k][0], "*", color=RED, markersize=14, zorder=8,
                label=f"trained transformer, d + d$_e$ = {width}")
        ax.set_xscale("log", base=2)
        ax.set(xlabel="width: neurons m in the first layer; d + d$_e$", ylabel="loss L/L$_0$", ylim=(0, 1.02))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.legend(loc="lower left", fontsize=9)
    for k, ax in enumerate(axes):
        against_width(ax, k)

    # claims
    gaps = {m: min(row[1] - row[4] for row in trained[0] if row[0] == m) for m in adam[0] if m <= 16}
    as_it_is = ", ".join(f"{row[1] - row[4]:.2f}" for row in trained[1][:len(adam[1])])
    loss, error = transformers[1]
    return fig, [
        claim("F2-differences", "(F2) against finite differences away from kinks: error over the largest entry",
              "derived here", "<=", 0, differences, 1e-7),
        claim("F2-complex", "(F2) against complex-step differentiation of the active linear piece", "derived here",
              "<=", 0, complex_steps, 1e-12),
        claim("F4-eigenvalues", "(F4) against the least eigenvalues of M kron I, all m, 7 sizes: worst difference",
              "derived here", "<=", 0, eigenvalue_error, 1e-12),
        claim("F3-regression", "(F3) against linear regression, 4 first layers of rank 1 to 13: standard errors",
              "derived here", "<=", 4, deviation),
        *above_floors("trained", [*trained[0], *trained[1]]),
        claim("F4-tight", f"T = 8, best start by Adam at m = {', '.join(map(str, gaps))} over (F4): largest gap "
              f"(T = 32, no claim: {as_it_is})", "derived here", "<=", 0.05, max(gaps.values())),
        claim("F5-exact", "exact_fcn where all |x| < K = 8: largest error, in roundings of 8", "derived here",
              "<=", 32, inside / (8 * np.finfo(float).eps)),
        claim("F5-loss", "its population L/L_0, by quadrature", "derived here", "<=", 1e-15, exact_loss),
        claim("F5-threshold", "what width Td reaches lies below the floor at Td - 1: the threshold is exactly Td",
              "derived here", ">=", exact_loss, sts.fcn_loss_floor(31, **small)),
        *above_floors("indices", trained[2]),
        claim("F4-transformer", "T = 32, transformer of width Td/4 = 32: loss + 4 standard errors over the floor",
              "derived here", "<=", 0.1, (loss + 4 * error) / sts.fcn_loss_floor(32, **long)),
    ], against_width


# ---- 6. transformer and networks on the same samples (F, S) -----------------------------------------------

def least_dimension(rng, T, q, eps, B):
    """The least d_e whose measured loss at the best c and alpha is at most eps L_0: dual query, bisection (S4)."""
    low, high = q - 1, 2 * sts.required_dimension(T, q, eps)
    while high - low > 1:
        middle = (low + high) // 2
        u = sts.overlaps(rng, B, T, q, middle)
        reached = 2 * q * min(sts.overlap_loss(c, u, q, 1) for c in np.linspace(1, 10, 19)) <= eps
        low, high = (low, middle) if reached else (middle, high)
    return high


def separation(rng, quick, progress):
    """Transformer and networks on the same stream of samples, and the width that each needs as T grows."""
    # set-up
    size, d_e, B, eta, eps = {"T": 16, "q": 2, "d": 8}, 24, 128, 1.0, 0.1
    (T, q, d), D, steps, starts = size.values(), 8 + d_e, 400 if quick else 1000, 2 if quick else 3
    equal = round((d * D + D**2 - d) / (T * d + T + 1 + d))           # the parameters of V and W; of a network
    widths = {equal: "equal parameters", D: "equal width"} | ({} if quick else {2 * T * d: "2Td"})
    times = log_steps(steps, 12 if quick else 24)[4:]
    lengths, needing = np.array([16, 64] if quick else [16, 64, 256, 1024]), np.array([8, 16, 32, 64])

    # run
    def encoded(X, selected):
        E = sts.random_sign_encoding(rng, d_e, T, len(X))
        return sts.full_inputs(X, E, sts.dual_query(E, selected))

    def attention(V, W):
        return attention_loss_and_grads(V, W, *encoded(*batch[2:]), batch[1])
    inputs, target, *task = fcn_batch(rng, 4000 if quick else 8000, **size)
    tokens = encoded(*task)
    batch, curves, networks, transformers = [], np.zeros((starts, 1 + len(widths), times.size)), [], []
    for start, curve in enumerate(curves, 1):
        runs = [sts.gradient_descent((np.zeros((d, D)), np.zeros((D, D))), attention, eta, steps)]
        runs += [fcn_run(rng, m, T, d, batch, 0.01, steps) for m in widths]
        for t, (V_W, *params) in side_by_side(runs, batch, lambda: fcn_batch(rng, B, **size), steps, progress,
                                              f"start {start} of {starts}"):
            if t in times:
                outputs = [sts.transformer(*V_W, *(x[:1000] for x in tokens)),
                           *(sts.fcn(*network, inputs[:1000]) for network in params)]
                curve[:, np.searchsorted(times, t)] = [with_error(f, target[:1000], q)[0] for f in outputs]
        networks += [judged(network, inputs, target, **size) for network in params]
        transformers.append(with_error(sts.transformer(*V_W, *tokens), target, q))
    progress("width needed")
    dimensions = np.array([least_dimension(rng, int(T), q, eps, 200 if quick else 400) for T in lengths])
    enough = np.array([sts.required_dimension(int(T), q, eps) for T in lengths])
    by_eigenvalues = [np.argmax(least_losses(int(T), q, d) <= eps * d / (2 * q)) for T in needing]

    # draw
    fig, (left, right) = figure(f"T = {T}, q = {q}, d = {d}: median and range of {starts} starts",
                                f"Width needed for L/L$_0$ ≤ {eps}, q = {q}, d = {d}")

    def on_samples(ax):
        names = [f"transformer, width {D}", *(f"FCN, m = {m}: {name}" for m, name in widths.items())]
        for k, (name, colour, marker) in enumerate(zip(names, (RED, GREEN, BLUE, ORANGE), "*o^s")):
            curve = curves[:, k]
            ax.plot(times * B, np.median(curve, axis=0), marker=marker, color=colour, label=name)
            ax.fill_between(times * B, curve.min(axis=0), curve.max(axis=0), color=colour, alpha=0.25, linewidth=0)
        for m in (equal, D):
            level = sts.fcn_loss_floor(m, **size) * 2 * q / d
            ax.axhline(level, **PREDICTED)
            ax.text(7500, level - 0.01, f"floor (F4), m = {m}", va="top", fontsize=9)
        ax.set(xscale="log", xlabel="samples seen", ylabel="test loss L/L$_0$", ylim=(0, 1.28),
               yticks=np.arange(6) / 5)
        ax.legend(loc="upper center", ncol=2, columnspacing=1, handlelength=1.5, fontsize=9)
    on_samples(left)
    long = 2**np.arange(3, 13)
    right.plot(long, [np.argmax(sts.fcn_loss_floor(np.arange(T * d + 1), int(T), q, d) <= eps * d / (2 * q))
                      for T in long], label="FCN: the floor (F4)", **PREDICTED)
    right.plot(needing, by_eigenvalues, "o", color=BLUE, label="FCN: eigenvalues of M")
    right.plot(long, [d + sts.required_dimension(int(T), q, eps) for T in long], color="black", linestyle=":",
               label="transformer: d + 2q log(T/(qε)) is enough (S8)")
    right.plot(lengths, d + dimensions, "*", color=RED, markersize=11,
               label="transformer: least d + d$_e$, measured")
    right.text(500, 5500, "slope 1", ha="right")
    right.text(4000, 60, f"+{2 * q * math.log(2):.1f} for each doubling of T", ha="right")
    log_axes(right, "sequence length T", "width")
    right.set_ylim(10, 3e5)
    right.legend()

    # claims
    worst = max(loss + 4 * error for loss, error in transformers)
    return fig, [
        *above_floors("stream", networks),
        claim("F4-separation", f"transformer of width Td/4 = {D}: loss + 4 standard errors over the floor, worst",
              "derived here", "<=", 0.1, worst / (sts.fcn_loss_floor(D, **size) * 2 * q / d)),
        claim("F4-linear", f"m needed for L/L_0 <= {eps}, by eigenvalues, T = 8 to 64: exponent in T", "paper",
              "=", 1, np.polyfit(np.log(needing), np.log(by_eigenvalues), 1)[0], 0.02),
        claim("S8-dimension", f"least d_e measured over 2 q log(T/(q eps)), T = 16 to {lengths[-1]}: largest",
              "paper", "<=", 1, (dimensions / enough).max()),
    ], on_samples


# ---- 7. beyond the paper: one fixed set of encodings (O, L) -------------------------------------------------

def fixed_descent(E, q, d, eta, steps):
    """Matrix descent with one set of encodings throughout, the population over all subsets."""
    selected = sts.all_subsets(E.shape[1], q)
    whole = E, sts.dual_query(E, selected), selected
    return descend(population_loss_and_grads, lambda: whole, (d, d), len(E), eta, steps)


def fixed(rng, quick, progress):
    """A random set, kept fixed, fits itself and little else; an orthonormal one follows the one-hot law."""
    # set-up
    T, q, d, eta, steps = (16, 2, 8, 2.5, 300) if quick else (20, 2, 8, 2.5, 600)
    L_0, centre, times = d / (2 * q), np.eye(T) - 1 / T, log_steps(steps, 25)
    sizes = np.array([T // 2, 3 * T // 4, 2 * T] if quick else [5, 10, 15, 20, 30, 40, 80])
    first, longer = (np.arange(T) < q) * np.ones((1024, 1)), sts.all_subsets(2 * T, q)

    # run
    law, orthonormal, off_line = list(sts.one_hot_recursion(T, q, d, eta, 1000)), {}, 0.0
    for d_e in (2 * T,) if quick else (T, 2 * T):
        progress(f"orthonormal set, d_e = {d_e}")
        E = np.linalg.qr(rng.standard_normal((d_e, T)))[0]
        direction, orthonormal[d_e] = E @ centre @ E.T, []
        for (_, (V, W), loss), (_, (alpha, omega), _) in zip(fixed_descent(E, q, d, eta, 1000), law):
            off_line = max(off_line, abs(V - alpha * np.eye(d)).max(), abs(W - omega * direction).max())  # (O1)
            orthonormal[d_e].append(loss / L_0)
    paths, found, floor, off_span = {}, {}, {}, 0.0
    for d_e in sizes.tolist():
        if d_e < T:
            u = sts.overlaps(rng, 8000, T, q, d_e)
            floor[d_e] = min(sts.overlap_loss(c, u, q, d) for c in np.linspace(1, 16, 31)) / L_0       # (S4)
        fresh, paths[d_e], found[d_e] = sts.random_sign_encoding(rng, d_e, T, len(first)), [], []
        for _ in range(5 if d_e < T else 2):  # below T sets differ, and it is their mean that is below the floor
            E_2T = sts.random_sign_encoding(rng, d_e, 2 * T)
            E = E_2T[:, :T]
            states = record(fixed_descent(E, q, d, eta, steps), times, progress, f"random set, d_e = {d_e}")
            _, (V, W), own = states[-1]
            elsewhere = [population_loss_and_grads(V, W, other, sts.dual_query(other, y), y)[0] / L_0
                         for other, y in ((fresh, first), (E_2T, longer))]
            span = E @ np.linalg.pinv(E)
            to_I, to_span = cosine(W, np.eye(d_e)), cosine(W, span)
            off_span = max(off_span, abs(to_I - to_span * math.sqrt(np.trace(span) / d_e)))
            paths[d_e].append([loss / L_0 for _, _, loss in states])
            found[d_e].append([own / L_0, *elsewhere, to_I, to_span, cosine(W, E @ centre @ E.T)])
    mean = np.array([np.mean(rows, axis=0) for rows in found.values()])

    # draw
    fig, (left, middle, right) = figure(f"T = {T}: loss on the set itself", "After training: there and elsewhere",
                                        "Where W points")
    for d_e, colour in zip(sizes[1::2].tolist(), (RED, ORANGE, GREEN)):
        left.plot(times, np.mean(paths[d_e], axis=0), ".-", color=colour, lw=1, label=f"random, d_e = {d_e}")
    for (d_e, losses), marker, size in zip(orthonormal.items(), "ox", (7, 5)):
        left.plot(times, np.array(losses)[times], marker, color=BLUE, markersize=size, fillstyle="none",
                  label=f"orthonormal, d_e = {d_e}")
    left.plot(times, [law[t][2] / L_0 for t in times], label="one-hot law (O2)-(O4)", **PREDICTED)
    log_axes(left, "gradient steps t", "loss L / L₀")

    def sets(ax, columns, labels):
        for k, label, colour, marker in zip(columns, labels, (BLUE, ORANGE, GREEN), "os^"):
            each = [(d_e, row[k]) for d_e, rows in found.items() for row in rows]
            ax.plot(*zip(*each), marker, color=colour, alpha=0.3)
            ax.plot(sizes, mean[:, k], marker + "-", color=colour, lw=1, label=label)

    def there_and_elsewhere(ax):
        sets(ax, (0, 1, 2), ("on its own set", "on fresh encodings", "on its set extended to 2T"))
        ax.plot(list(floor), list(floor.values()), "D", color=PINK, label="stochastic: floor")
        grid = np.arange(math.ceil(2 * q * math.log(T / q)), 1.3 * T, dtype=int).tolist()
        bound = [sts.stochastic_floor(T, q, d, d_e) / L_0 for d_e in grid]
        ax.plot(grid, bound, label="its bound (S8)", **PREDICTED)
        log_axes(ax, "dimension of the encodings d_e", "loss L / L₀")
        ax.set_xticks(sizes, sizes)
        ax.minorticks_off()
        ax.set_ylim(bottom=ax.get_ylim()[0] / 5)
        ax.legend(fontsize=8.5, loc="lower left")
    there_and_elsewhere(middle)
    sets(right, (3, 4, 5), ("I", "projector P on the span of E", "E (I - 11ᵀ/T) Eᵀ"))
    from_P = mean[:, 4] * np.sqrt(np.minimum(1, T / sizes))
    right.plot(sizes, from_P, label="I from P: times √(T/d_e)", **PREDICTED)
    right.set(xscale="log", ylim=(0, 1.05), xlabel="dimension of the encodings d_e", ylabel="cosine of W with ...")
    right.set_xticks(sizes, sizes)
    right.minorticks_off()
    left.legend(fontsize=8.5, loc="lower left")
    right.legend(fontsize=8.5, loc="lower left")

    # claims
    floors = np.array(list(floor.values()))  # of the first sizes
    return fig, [
        claim("O-orthonormal", "orthonormal sets: V and W off the scalars of (O3, O4), 1,000 steps",
              "derived here", "<=", 0, off_line, 1e-10),
        claim("fixed-own", f"fixed sets, d_e < T = {T}: own loss (mean of sets) over the stochastic floor: worst",
              "measured", "<=", 1, (mean[:len(floors), 0] / floors).max()),
        claim("fixed-fresh", "and on fresh encodings over that floor: worst", "measured", ">=", 1,
              (mean[:len(floors), 1] / floors).min()),
        claim("fixed-span", "W = P W, P the projector on the span of E: cos(W, I) = cos(W, P) sqrt(rank E/d_e)",
              "derived here", "<=", 0, off_span, 1e-12),
    ], there_and_elsewhere


# ---- 8. beyond the paper: finitely many sequences (N) -------------------------------------------------------

def sequence_loss_and_grads(V, W, X, E, e_query, target):
    """S data sets of n sequences at once: the loss, and the gradients of V_1 and W_22 alone (A1)-(A8).

    V (S, d, d), W (S, d_e, d_e), X (S, n, d, T), E (S, d_e, T), e_query (S, n, d_e), target (S, n, d). V_2 and
    W_12 are held at 0, as in the population. Free, they only get noise under fresh encodings (N1-cross), no drift,
    but they overfit under fixed ones (at n = 6T the test loss is .2 to .4 L_0): this is attention at its best."""
    a = softmax(e_query @ W.swapaxes(1, 2) @ E)
    Xa = (X @ a[..., None])[..., 0]
    r = Xa @ V.swapaxes(1, 2) - target
    g = ((r @ V)[:, :, None] @ X)[:, :, 0]
    grad_s = a * (g - (a * g).sum(axis=2, keepdims=True))
    n = X.shape[1]
    return (r**2).sum(axis=(1, 2)) / (2 * n), r.swapaxes(1, 2) @ Xa / n, E @ grad_s.swapaxes(1, 2) @ e_query / n


def dual_pairs(E, selected):
    """`dual_query` at q = 2 for S sets at once: 2 e/||e||^2, e the sum of the two (0 if they are opposite)."""
    e = selected @ E.swapaxes(1, 2)
    return 2 * e / np.maximum((e**2).sum(axis=-1, keepdims=True), 1e-9)


def sign_patterns(rng, c=1.5):
    """(N1): gradients of the full model on 3 sequences at W = c I for all 2^6 sign patterns of E, T = 3, d_e = 2,
    and the largest difference of `sequence_loss_and_grads` from them."""
    X, selected = sts.sample_batch(rng, 3, 3, 2, 2)
    V, W, target = np.zeros((2, 4)), np.diag([0, 0, c, c]), sts.sts(X, selected)
    V[:, :2] = rng.standard_normal((2, 2))
    signs = np.array(list(itertools.product((-1, 1), repeat=6))).reshape(64, 2, 3) / math.sqrt(2)
    full = [attention_loss_and_grads(V, W, *sts.full_inputs(X, E, sts.dual_query(E, selected)), target)
            for E in signs]
    grad_V, grad_W = (np.array([grads[k] for grads in full]) for k in (1, 2))
    _, own_V, own_W = sequence_loss_and_grads(V[None, :, :2], W[None, 2:, 2:], X[None], signs,
                                              dual_pairs(signs, selected), target[None])
    return grad_V, grad_W, max(abs(own_V - grad_V[:, :, :2]).max(), abs(own_W - grad_W[:, 2:, 2:]).max())


def fcn_test(rng, S, n, T, d, steps):
    """Test losses of S networks of width 2Td, each trained on n sequences by Adam."""
    test, losses = sts.sample_batch(rng, 500, T, 2, d), []
    for _ in range(S):
        train = sts.sample_batch(rng, n, T, 2, d)
        inputs, target = sts.fcn_inputs(*train), sts.sts(*train)
        *_, (_, net, _) = sts.gradient_descent(sts.init_fcn(rng, 2 * T * d, T, d), sts.adam(
            lambda *net: fcn_loss_and_grads(*net, inputs, target), steps), 6e-3, steps)
        losses.append(fcn_loss_and_grads(*net, sts.fcn_inputs(*test), sts.sts(*test))[0])
    return losses


def attention_test(rng, kind, S, n, T, d, time, fresh):
    """Test losses after full-batch descent to eta * steps = time on S data sets of n sequences: on each set's own
    encodings, or on the `fresh` ones if they are drawn afresh ("stochastic"), one set a step for all n."""
    X, selected = sts.sample_batch(rng, S * n, T, 2, d)
    target = sts.sts(X, selected).reshape(S, n, d)
    X, selected = X.reshape(S, n, d, T), selected.reshape(S, n, T)
    d_e = {"stochastic": 32, "fixed": 64, "one-hot": T}[kind]
    E = np.eye(T) * np.ones((S, 1, 1)) if kind == "one-hot" else sts.random_sign_encoding(rng, d_e, T, S)

    def encodings():
        e_query = dual_pairs(E, selected)
        while kind != "stochastic":
            yield E, e_query
        while True:
            for signs in sts.random_sign_encoding(rng, d_e, T, 64 * S).reshape(64, S, d_e, T):
                yield signs, dual_pairs(signs, selected)
    pairs = encodings()
    curvature = np.linalg.eigvalsh(target.swapaxes(1, 2) @ target / n).max()  # of V once attention is on y
    steps = math.ceil(time * curvature / 1.6)                                 # eta at most 0.8 times 2/curvature
    *_, (_, (V, W), _) = sts.gradient_descent(
        (np.zeros((S, d, d)), np.zeros((S, d_e, d_e))),
        lambda V, W: sequence_loss_and_grads(V, W, X, *next(pairs), target), time / steps, steps)
    y = sts.all_subsets(T, 2)
    scores = dual_pairs(E, y) @ W.swapaxes(1, 2) @ E
    if kind == "stochastic":
        y = (np.arange(T) < 2) * np.ones((len(fresh), 1))  # by symmetry any y will do
        scores = ((sts.dual_query(fresh, y) @ W.swapaxes(1, 2)).swapaxes(0, 1) @ fresh).swapaxes(0, 1)
    return [population_loss_and_grads(v, np.eye(T), np.eye(T), s, y)[0] for v, s in zip(V, scores)]


def crossing(n, loss, level=0.1):
    """The n from which on the loss is below the level, interpolated on log axes; nan if it never is or always."""
    k = max(np.flatnonzero(loss > level), default=-1)
    if not 0 <= k < len(n) - 1:
        return math.nan
    return n[k] * (n[k + 1] / n[k])**(math.log(loss[k] / level) / math.log(loss[k] / loss[k + 1]))


def samples(rng, quick, progress):
    """n fixed sequences: with fresh encodings n need only grow like d, with fixed ones it grows like T."""
    # set-up
    lengths, dims, time, most = ((8, 16), (16,), 8000, 7) if quick else ((8, 20), (10, 16), 12_000, 9)  # q = 2
    over_d = np.array([1/2, 7/8, 5/4, 3/2, 4, 32] if quick else [1/2, 7/8, 1, 5/4, 3/2, 2, 4, 32])
    over_T = np.array([1, 2, 3, 4, 6] if quick else [1/2, 1, 2, 3, 4, 8])
    fcn_over_d = np.array([2] if quick else [1/2, 4, 32])

    # run
    grad_V, grad_W, gradient_error = sign_patterns(rng)
    mean_V, mean_W = grad_V.mean(axis=0), grad_W.mean(axis=0)
    found = {}
    for T, d in itertools.product(lengths, dims):
        fresh = sts.random_sign_encoding(rng, 32, T, 1024)
        for kind in ("stochastic", "fixed", "one-hot", "fcn")[:None if d == dims[0] else 3]:
            n = {"stochastic": over_d * d, "fcn": fcn_over_d * d}.get(kind, over_T * T).astype(int)
            losses = []
            for size in n.tolist():
                progress(f"{kind}, T = {T}, d = {d}, n = {size}")
                S = 3 if kind == "fcn" or size > 4 * d else most if kind == "stochastic" else 5
                losses.append(fcn_test(rng, S, size, T, d, 50) if kind == "fcn" else attention_test(
                    rng, kind, S, size, T, d, time / d if kind == "stochastic" else 300 * T / d, fresh))
            losses = [np.array(row) * 4 / d for row in losses]  # over L_0 = d/4
            found[kind, T, d] = n, np.array([np.median(row) for row in losses]), losses

    # draw
    fig, (left, middle, right) = figure("Stochastic encodings: n over d", "Fixed encodings: n over T",
                                        f"All at T = {lengths[1]}, d = {dims[0]}")

    def curve(ax, key, unit, colour, marker, **style):
        n, median, losses = found[key]
        spread = abs(median - [[row.min() for row in losses], [row.max() for row in losses]])
        ax.errorbar(n / unit, median, spread, color=colour, marker=marker, lw=1, elinewidth=0.7, **style)
    for (T, colour, marker), (d, fill) in itertools.product(zip(lengths, (BLUE, RED), "os"),
                                                            zip(dims, ("full", "none"))):
        curve(left, ("stochastic", T, d), d, colour, marker, fillstyle=fill, label=f"T = {T}, d = {d}")
        curve(middle, ("fixed", T, d), T, colour, marker, fillstyle=fill)
        curve(middle, ("one-hot", T, d), T, colour, marker, fillstyle=fill, linestyle=":")

    def everyone(ax):
        for kind, colour, marker in (("fcn", "grey", "D"), ("one-hot", ORANGE, "^"), ("fixed", GREEN, "s"),
                                     ("stochastic", BLUE, "o")):
            label = {"fcn": "FCN, 2Td neurons", "fixed": "fixed, random"}.get(kind, kind)
            curve(ax, (kind, lengths[1], dims[0]), 1, colour, marker, label=label)
        log_axes(ax, "training sequences n", "test loss L / L₀")
        ax.set_ylim(bottom=1e-3)
        ax.legend(fontsize=8.5, loc="lower left")
    everyone(right)
    log_axes(left, "training sequences per dimension, n/d", "test loss L / L₀")
    log_axes(middle, "training sequences per position, n/T", "test loss L / L₀")
    for ax, ticks in ((left, (0.5, 1, 2, 4, 32)), (middle, over_T)):
        ax.axhline(0.1, color="grey", lw=0.8)
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
    middle.plot([], color="black", lw=1, label="random, d_e = 64; colours as left")
    middle.plot([], ":", color="black", lw=1, label="one-hot")
    left.legend(fontsize=8.5)
    middle.legend(fontsize=8.5, loc="lower left")

    # claims
    def over_dims(value):  # the geometric mean over d: one law in n/d, so both are draws of it
        return math.exp(np.mean([math.log(value(d)) for d in dims]))

    def growth(kind):
        short, long = (over_dims(lambda d: crossing(*found[kind, T, d][:2])) for T in lengths)
        return long / short
    median = {(T, d): found["stochastic", T, d][1] for T in lengths for d in dims}
    ratio, text = lengths[1] / lengths[0], f"n for 0.1 L_0 (V_1, W_22 alone), T = {lengths[1]} over {lengths[0]}"
    return fig, [
        claim("N1", "3 sequences, W = c I: grad W over all 2^6 sign patterns is a multiple of I: deviation",
              "derived here", "<=", 0, abs(mean_W[2:, 2:] - mean_W[2, 2] * np.eye(2)).max(), 1e-14),
        claim("N1-cross", "and the gradients of the cross blocks V_2, W_12 average to 0", "derived here", "<=", 0,
              max(abs(mean_V[:, 2:]).max(), abs(mean_W[:2, 2:]).max()), 1e-14),
        claim("N-gradient", "gradients on sequences against (A5, A8), each pattern: largest difference",
              "derived here", "<=", 0, gradient_error, 1e-14),
        claim("N-enough", "stochastic: test loss at n = 4d over n = 32d, mean over d: larger of the two T",
              "measured", "<=", 1.5,
              max(over_dims(lambda d: median[T, d][-2] / median[T, d][-1]) for T in lengths)),
        claim("N-peak", "stochastic: log2(n/d) at the largest test loss, between -1 and 1", "measured", "=", 0,
              max((math.log2(over_d[row.argmax()]) for row in median.values()), key=abs), 0.99),
        claim("N-scaling-stochastic", f"stochastic: {text}, mean over d", "measured", "<=", 1.5,
              growth("stochastic")),
        *(claim(f"N-scaling-{kind}", f"{kind}: {text}, mean over d", "measured", "=", ratio,
                growth(kind), 0.4 * ratio) for kind in ("fixed", "one-hot")),
        claim("N-fcn", f"FCN of width 2Td, n up to {fcn_over_d[-1]:g}d: least test loss over L_0", "measured",
              ">=", 1, min(found["fcn", T, dims[0]][1].min() for T in lengths)),
    ], everyone


EXPERIMENTS = {run.__name__: run for run in (dynamics, matrices, stochastic, length, floor, separation, fixed,
                                              samples)}


# ---- the command line -----------------------------------------------------------------------------------

def write_whole(path, write):
    """Write to a temporary name beside `path` and move it there: an interrupted run leaves the old file whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_table(claims, path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, claims[0])
        writer.writeheader()
        writer.writerows(claims)


def reporter(place, start):
    """progress(text): one line kept up to date on a terminal; elsewhere a line at most every five seconds."""
    live, last = sys.stdout.isatty(), [0.0 if sys.stdout.isatty() else time.monotonic()]

    def progress(text):
        now = time.monotonic()
        if now - last[0] > (0.1 if live else 5.0):
            last[0] = now
            line = f"{place}: {text} ({now - start:.0f} s)"
            print(f"\r{line:<100.100}" if live else line, end="" if live else "\n", flush=True)
    return progress


def trace(steps, T, q, d, eta):
    """Each update of matrix descent over all subsets next to the update that (O1)-(O4) predict."""
    one_hot_loss_and_grads(0.0, 0.0, T, q, d)  # refuses sizes that do not fit, by name
    descent, alpha, omega = matrix_descent(T, q, d, eta, steps), 0.0, 0.0
    (t, (V, W), loss), centre, identity = next(descent), np.eye(T) - 1 / T, np.eye(d)
    print(f"T = {T}, q = {q}, d = {d}, eta = {eta:g}, one-hot encodings, all {math.comb(T, q)} subsets, "
          f"from V = 0, W = 0\ncode : V, W and grad_V, grad_W of population_loss_and_grads (P2, P4)\n"
          f"proof: V = alpha I, W = omega (I - 11^T/T) (O1), alpha and omega moved by (O3, O4)")
    for t_next, (V_next, W_next), loss_next in descent:
        proof_loss, grad_alpha, grad_omega = one_hot_loss_and_grads(alpha, omega, T, q, d)
        rows = [("loss", loss, proof_loss, "(O2)"), ("V", V, alpha * identity, "(O1)"),
                ("W", W, omega * centre, "(O1)"),
                ("V update", V_next - V, -eta * grad_alpha * identity, "(O3)"),
                ("W update", W_next - W, -eta * grad_omega * centre, "(O4)")]
        print(f"\nstep {t}: alpha = {alpha:.12g}, omega = {omega:.12g}")
        for name, left, right, tag in rows:
            print(f"  {name:9s}code {shown_entries(left)}   proof {shown_entries(right)} {tag}   "
                  f"largest difference {np.max(np.abs(left - right)):.1e}")
        alpha, omega = alpha - eta * grad_alpha, omega - eta * grad_omega
        t, V, W, loss = t_next, V_next, W_next, loss_next


def shown_entries(matrix):
    """A matrix of the form a I + b 11^T by its first two entries: the diagonal one and the one beside it."""
    if np.ndim(matrix) == 0:
        return f"{matrix:+.9f}{'':17s}"
    return f"[{matrix[0, 0]:+.9f} {matrix[0, 1] if matrix.shape[1] > 1 else 0.0:+.9f} ..]"


SIZES = [(256, 32, 3, 8, 64), (256, 128, 4, 16, 128), (64, 1024, 4, 16, 128)]  # B, T, q, d, d_e


def median_ms(call, seconds=0.5):
    """Median time of a call in milliseconds, over at least five calls and about `seconds`."""
    call()
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return np.median(times)


def training_parts(rng, B, T, q, d, d_e):
    """The parts of a training step at one size, as name -> (call, the arrays it must read or write once)."""
    m, D = 2 * d_e, d + d_e
    X, selected = sts.sample_batch(rng, B, T, q, d)
    E, target = sts.random_sign_encoding(rng, d_e, T, B), sts.sts(X, selected)
    e_query, inputs = sts.dual_query(E, selected), sts.fcn_inputs(X, selected)
    Z, z_query = sts.full_inputs(X, E, e_query)
    V, W = rng.standard_normal((d, D)) / D, rng.standard_normal((D, D)) / D
    u, network = sts.overlaps(rng, B, T, q, d_e), sts.init_fcn(rng, m, T, d)
    return {
        "sample_batch": (lambda: sts.sample_batch(rng, B, T, q, d), [X]),
        "random_sign_encoding": (lambda: sts.random_sign_encoding(rng, d_e, T, B), [E]),
        "dual_query": (lambda: sts.dual_query(E, selected), [e_query]),
        "full_inputs": (lambda: sts.full_inputs(X, E, e_query), [Z]),
        "attention_loss_and_grads": (lambda: attention_loss_and_grads(V, W, Z, z_query, target), [Z]),
        "population_loss_and_grads": (lambda: population_loss_and_grads(V[:, :d], W[d:, d:], E, e_query, selected),
                                      [E]),
        "stochastic_loss_and_grads": (lambda: stochastic_loss_and_grads(1.0, 2.0, u, q, d, d_e), [u]),
        "fcn_loss_and_grads": (lambda: fcn_loss_and_grads(*network, inputs, target), [inputs, network[0]]),
    }


def benchmark(rng):
    """Time every part of a training step; the gradients also at twice the batch and twice the length."""
    print("median ms a call; passes: one pass over the arrays it must read; share: of a step on samples (the first,"
          "\nthird to fifth row) or on the population (second, third, sixth); 2B, 2T: growth of the time\n")
    for B, T, q, d, d_e in SIZES:
        print(f"B = {B}, T = {T}, q = {q}, d = {d}, d_e = {d_e}\n  {'':26s}{'ms':>9s}{'passes':>9s}{'ratio':>7s}"
              f"{'samples':>9s}{'popul.':>8s}{'2B':>6s}{'2T':>6s}")
        parts = training_parts(rng, B, T, q, d, d_e)
        ms = {name: median_ms(call) for name, (call, _) in parts.items()}
        steps = [("sample_batch", "dual_query", "full_inputs", "random_sign_encoding", "attention_loss_and_grads"),
                 ("random_sign_encoding", "dual_query", "population_loss_and_grads")]
        larger = [training_parts(rng, *size, q, d, d_e) for size in ((2 * B, T), (B, 2 * T))]
        for name, (_, arrays) in parts.items():
            passes = sum(median_ms(lambda: np.vdot(array, array), 0.1) for array in arrays)
            row = f"  {name:26s}{ms[name]:9.3f}{passes:9.3f}{ms[name] / passes:7.1f}"
            row += "".join(f"{ms[name] / sum(ms[part] for part in step):{width}.0%}" if name in step else " " * width
                           for step, width in zip(steps, (9, 8)))
            if name.endswith("grads"):
                row += "".join(f"{median_ms(more[name][0]) / ms[name]:6.1f}" for more in larger)
            print(row, flush=True)


def parse(argv):
    parser = argparse.ArgumentParser(description="Run the experiments, draw the figures, check the claims.",
                                     epilog=f"experiments: {', '.join(EXPERIMENTS)}")
    parser.error = lambda message: parser.exit(2, f"run_all.py: {message}\n")  # one line, without the usage
    parser.add_argument("--quick", action="store_true", help="smaller work, the same claims")
    parser.add_argument("--only", metavar="NAME[,NAME]", help="run these experiments alone")
    parser.add_argument("--seed", type=int, default=0, help="of every random number (default 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the figures and claims.csv (default: "
                        "figures, or figures/partial with --quick or --only)")
    parser.add_argument("--trace", type=int, metavar="N", help="print N updates beside the proof's, and stop")
    parser.add_argument("--benchmark", action="store_true", help="time each part of a training step, and stop")
    for name, kind, default in (("T", int, 8), ("q", int, 3), ("d", int, 5), ("eta", float, 1.0)):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"for --trace (default {default})")
    options = parser.parse_args(argv)
    names = options.only.split(",") if options.only is not None else list(EXPERIMENTS)
    for name in names:
        if name not in EXPERIMENTS:
            parser.error(f"--only must name experiments of {', '.join(EXPERIMENTS)}; got {name!r}")
    if options.seed < 0:
        parser.error(f"--seed must be an integer >= 0; got {options.seed}")
    if options.trace is not None and options.trace < 1:
        parser.error(f"--trace must be an integer >= 1; got {options.trace}")
    if not 0 < options.eta < math.inf:
        parser.error(f"--eta must be a number above 0; got {options.eta:g}")
    options.names = [name for name in EXPERIMENTS if name in names]
    partial = options.quick or options.only is not None
    options.out = options.out or Path(__file__).parent / ("figures/partial" if partial else "figures")
    return parser, options


SUMMARY = {"dynamics": "Descent follows a closed form", "matrices": "What W learns: positions only",
           "length": "It carries over to longer sequences", "floor": "A fully-connected net needs width T d"}


def summary(headlines):
    """The paper's story in four panels, drawn by the experiments' headlines."""
    fig, axes = figure(*SUMMARY.values(), rows=2, height=8.4)
    for ax, (name, title) in zip(axes, SUMMARY.items()):
        headlines[name](ax)
        ax.set_title(title)
    return fig


def run(options, start):
    """Run the experiments named, write figures and claims.csv; the exit status is 0 only if all claims hold."""
    claims, headlines = [], {}
    for i, name in enumerate(options.names, 1):
        place = f"[{i}/{len(options.names)}] {name}"
        progress = reporter(place, start)
        print(f"{place} ...", end="" if sys.stdout.isatty() else "\n", flush=True)
        rng = np.random.default_rng([options.seed, *name.encode()])
        with matplotlib.rc_context(STYLE):
            fig, found, headlines[name] = EXPERIMENTS[name](rng, options.quick, progress)
            number = list(EXPERIMENTS).index(name) + 1
            write_whole(options.out / f"{number}_{name}.png", fig.savefig)
        claims += found
        held = sum(row["verdict"] == "ok" for row in found)
        print(f"{chr(13) if sys.stdout.isatty() else ''}{place}: {held} of {len(found)} claims hold "
              f"({time.monotonic() - start:.1f} s){'':60s}".rstrip() + " " * 40 * sys.stdout.isatty(), flush=True)
    if set(SUMMARY) <= set(headlines):
        with matplotlib.rc_context(STYLE):
            write_whole(options.out / "summary.png", summary(headlines).savefig)
    write_whole(options.out / "claims.csv", lambda path: write_table(claims, path))
    widths = {"id": 18, "statement": 88, "source": 12, "predicted": 14, "measured": 13, "tolerance": 9, "verdict": 7}
    for row in [{key: key for key in widths}, *claims]:
        print("  ".join(f"{row[key]:<{width}}" for key, width in widths.items()).rstrip())
    held = sum(row["verdict"] == "ok" for row in claims)
    print(f"{held} of {len(claims)} claims hold; figures and claims.csv are in {options.out}")
    return 0 if held == len(claims) else 1


def main(argv=None):
    start = time.monotonic()
    parser, options = parse(argv)
    try:
        if options.trace is not None:
            try:
                trace(options.trace, options.T, options.q, options.d, options.eta)
                return 0
            except ValueError as error:
                parser.error(str(error))
            except MemoryError:
                parser.error(f"--T and --d must fit in memory; got {options.T} and {options.d}")
        if options.benchmark:
            benchmark(np.random.default_rng(options.seed))
            return 0
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=options.out).close()
        except OSError as error:
            parser.error(f"--out must be a folder that can be written; got {options.out} ({error.strerror})")
        return run(options, start)
    except FloatingPointError as error:
        print(f"\nrun_all.py: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has gone, as in `--trace 9 | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
