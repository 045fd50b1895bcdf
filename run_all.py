"""Run every experiment, draw its figure, and check its claims: `python run_all.py --help`.

Each experiment reads set-up, run, draw, claims, and returns (figure, claims, headline): headline(ax) draws
the panel that tells its story on its own. A claim is a number predicted, a number measured and a tolerance.
"""
import argparse
import csv
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


def matrix_descent(T, q, d, eta, steps):
    """Gradient descent on V and W from zero, one-hot encodings, the population over all subsets (P2, P4)."""
    E, selected = sts.one_hot_encoding(T), sts.all_subsets(T, q)
    e_query = sts.sum_query(E, selected)
    return sts.gradient_descent((np.zeros((d, d)), np.zeros((T, T))),
                                lambda V, W: population_loss_and_grads(V, W, E, e_query, selected), eta, steps)


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
    mid = {"T": 256, "q": 4, "d": 4, "eta": 2.0}

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
    below, above = (off_the_line(5, 4, 6, factor * stable, 2500) for factor in (0.99, 1.01))
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
        claim("O5-below", "just below the stable eta it stays, 2,500 steps", "derived here", "<=", 0, below, 1e-12),
        claim("O5-above", "just above the stable eta it leaves", "derived here", ">=", 1e-6, above),
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
        claim("C3-between", f"between: alpha's lag in time is at most d/(16q) (in loss up to "
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
    """The full model, all of V and W from zero, fresh samples at every step, one-hot encodings (A5, A8)."""
    E = sts.one_hot_encoding(T)

    def loss_and_grads(V, W):
        X, selected = sts.sample_batch(rng, B, T, q, d, tokens)
        return attention_loss_and_grads(V, W, *sts.full_inputs(X, E, sts.sum_query(E, selected)),
                                        sts.sts(X, selected))
    return sts.gradient_descent((np.zeros((d, d + T)), np.zeros((d + T, d + T))), loss_and_grads, eta, steps)


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
        deviations[tokens], bound = population_check(rng, tokens, 100 if quick else 400)
    progress("cross blocks")
    sizes = np.array([64, 256, 1024] if quick else [64, 256, 1024, 4096])
    cross, content = cross_block_check(rng, sizes, 30 if quick else 100)
    progress("skewed tokens")
    predicted, skewed, skewed_error = skewed_check(rng, 40 if quick else 200)
    ends = []
    for _ in range(16):
        progress("Laplace tokens")
        for _, (V, W), _ in online(rng, 8, 2, 3, 0.25, 128 if quick else 256, 300, "laplace"):
            pass
        ends.append((np.trace(V[:, :3]) / 3, (np.trace(W[3:, 3:]) - W[3:, 3:].sum() / 8) / 7))
    for _, scalars, _ in sts.one_hot_recursion(8, 2, 3, 0.25, 300):
        pass

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
    for name, k in (("alpha", 0), ("omega", 1)):
        end = np.array([pair[k] for pair in ends])
        claims.append(claim(f"O-laplace-{name}", f"Laplace tokens by samples end on the {name} of (O3, O4)",
                            "derived here", "=", float(scalars[k]), end.mean(),
                            4 * end.std(ddof=1) / math.sqrt(len(end))))
    return fig, claims, learned


EXPERIMENTS = {run.__name__: run for run in (dynamics, matrices)}


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


SUMMARY = {"dynamics": "Descent follows an exact law", "matrices": "What W learns: positions only",
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
