"""Every public function against an independent check, bad input, the command line, the README.

A newcomer reads the first part: the task by loops, gradients by complex steps, the one-hot line,
the best network, the trace. A test never repeats the formula that it tests: gradients are checked
by complex steps of a forward pass written again, laws by enumeration, by sampling with its error
bar, by quadrature or by linear algebra. Nothing depends on what one random stream gave: bounds on
samples are normal bounds at level 1e-6.
"""
import ast
import bisect
import concurrent.futures
import contextlib
import csv
import doctest
import functools
import inspect
import io
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from numpy.random import default_rng

import analytic_grads as ag
import run_all
import sparse_token_selection as lib

pytestmark = pytest.mark.filterwarnings("error")
parametrize = pytest.mark.parametrize
ROOT = Path(__file__).resolve().parent
EPS = np.finfo(float).eps
PUBLIC = {
    name: value
    for module in (ag, lib)
    for name, value in vars(module).items()
    if hasattr(value, "__wrapped__") and getattr(value, "__module__", "") == module.__name__
}


# ---- how things are compared ----

def close(got, want, tolerance, scale=None):
    """The largest difference, over the largest entry wanted or the scale given."""
    got = np.asarray(got)
    want = np.asarray(want)
    assert got.shape == want.shape, f"shape {got.shape}, not {want.shape}"

    error = abs(got - want).max() / (scale or abs(want).max() or 1.0)
    assert error <= tolerance, f"largest difference {error:.3g}, allowed {tolerance:.3g}"


def normal_bound(comparisons):
    """What so many normal deviates exceed, in size, once in 10^6 times."""
    return NormalDist().inv_cdf(1 - 1e-6 / (2 * comparisons))


def within_errors(samples, exact, rounding=1e-12):
    """The mean of independent samples (axis 0) is the exact value, up to its standard error."""
    error = abs(np.mean(samples, axis=0) - exact)
    allowed = np.std(samples, axis=0, ddof=1) / math.sqrt(len(samples))
    allowed = normal_bound(error.size) * allowed + rounding * (1 + np.abs(exact))
    assert (error <= allowed).all(), f"error over its bound: {(error / allowed).max():.3g}"


def uniform(rows, cells):
    """The rows are of so many kinds, equally likely: chi-square, by Wilson and Hilferty."""
    _, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(counts) == cells

    free = max(cells - 1, 1)
    chi_square = ((counts - counts.mean())**2).sum() / counts.mean()
    spread = 2 / (9 * free)
    deviate = ((chi_square / free)**(1 / 3) - 1 + spread) / math.sqrt(spread)
    assert deviate < normal_bound(1), f"chi-square {chi_square:.1f} with {free} free"


# ---- the losses again, for complex numbers ----

def attend(scores):
    weights = np.exp(scores - np.real(scores).max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def attention_loss(V, W, Z, z_query, target):
    return run_all.attention_forward(V, W, Z, z_query, target)["loss"] / len(Z)


def network_loss(W1, b1, A, b2, inputs, target):
    return run_all.fcn_forward(W1, b1, A, b2, inputs, target)["loss"] / len(inputs)


def population_loss(V, W, E, e_query, selected):
    """f - target = sum_t (a_t V - s_t I/q) x_t, and the x_t are independent with covariance I."""
    B, T = selected.shape
    E = np.broadcast_to(E, (B, len(W), T))
    a = attend(np.einsum("bit,ij,bj->bt", E, W, e_query))
    target = np.einsum("bt,ij->btij", selected, np.eye(len(V)))
    miss = np.einsum("bt,ij->btij", a, V) - target / selected[0].sum()
    return (miss**2).sum() / (2 * B)


def scalar_loss(alpha, c, u, q, d):
    """The same on V = alpha I and scores c u, the q selected positions first."""
    B, T = u.shape
    miss = alpha * attend(c * u) - lib.first_subset(B, T, q) / q
    return d * (miss**2).sum() / (2 * B)


SIZES = [  # T, q, d
    (1, 1, 3), (4, 2, 3), (5, 5, 2),
    (3, 1, 1), (6, 5, 2), (2, 1, 4)]


def centre(T):
    """I - 11^T/T, the direction of W for one-hot encodings."""
    return np.eye(T) - 1 / T


# ---- a newcomer starts here ----

def test_task_by_loops():
    """Target, sum query and what both models read, number by number."""
    rng = default_rng(20)
    X, selected = lib.sample_batch(rng, B=3, T=5, q=2, d=2)
    E = rng.standard_normal((3, 4, 5))
    target = lib.sts(X, selected)
    e_query = lib.sum_query(E, selected)
    inputs = lib.fcn_inputs(X, selected)
    Z, z_query = lib.full_inputs(X, E, e_query)

    for b in range(3):
        i, j = np.flatnonzero(selected[b])
        close(target[b], (X[b, :, i] + X[b, :, j]) / 2, 1e-15)
        close(e_query[b], E[b, :, i] + E[b, :, j], 1e-15)
        assert Z[b].tolist() == [*X[b].tolist(), *E[b].tolist()]
        assert z_query[b].tolist() == [0, 0, *e_query[b]]
        assert inputs[b].tolist() == [*X[b].T.ravel(), *selected[b]]


def normals(rng, *shapes):
    return [rng.standard_normal(shape) for shape in shapes]


def sizes(rng):
    """B, T, q, d, d_e at random, T = 1 and q = T among them, and how sharp attention is."""
    B, T, d, d_e = rng.integers(1, (5, 9, 5, 9)).tolist()
    q = int(rng.integers(1, T + 1))
    return B, T, q, d, d_e, rng.choice([0.3, 1.0, 10.0])


def attention_case(rng):
    """Loss and gradients by hand, the loss again, parameters, data; so do the next four."""
    B, T, _, d, D, sharp = sizes(rng)
    V, W = normals(rng, (d, D), (D, D))
    data = normals(rng, (B, D, T), (B, D), (B, d))
    return ag.attention_loss_and_grads, attention_loss, (V, sharp * W), data


def population_case(rng):
    B, T, q, d, d_e, sharp = sizes(rng)
    V, W = normals(rng, (d, d), (d_e, d_e))
    E = lib.random_sign_encoding(rng, d_e, T, rng.choice([None, B]))
    _, selected = lib.sample_batch(rng, B, T, q, d)
    data = run_all.on_population(E, selected, rng.choice(list(lib.QUERIES)))
    return ag.population_loss_and_grads, population_loss, (V, sharp * W), data


def one_hot_case(rng):
    """A scalar's gradient is the coefficient of a matrix: the slope is d, or T - 1, as large."""
    _, T, q, d, _, sharp = sizes(rng)

    def by_hand(alpha, omega, *_):
        loss, grad_alpha, grad_omega = ag.one_hot_loss_and_grads(alpha, omega, T, q, d)
        return loss, d * grad_alpha, (T - 1) * grad_omega

    alpha, omega = rng.standard_normal(2)
    data = lib.first_subset(1, T, q), q, d
    return by_hand, scalar_loss, (alpha, sharp * omega), data


def stochastic_case(rng):
    B, T, q, d, d_e, sharp = sizes(rng)

    def by_hand(*arguments):
        loss, grad_alpha, grad_c = ag.stochastic_loss_and_grads(*arguments, d_e)
        return loss, d * grad_alpha, d_e * grad_c

    alpha, c = rng.standard_normal(2)
    u = lib.overlaps(rng, B, T, q, d_e, rng.choice(list(lib.QUERIES)))
    return by_hand, scalar_loss, (alpha, sharp * c), (u, q, d)


def network_case(rng):
    B, T, _, d, m, _ = sizes(rng)
    n = T * d + T
    network = normals(rng, (m, n), m, (d, m), d)
    data = normals(rng, (B, n), (B, d))
    return ag.fcn_loss_and_grads, network_loss, tuple(network), data


CASES = attention_case, population_case, one_hot_case, stochastic_case, network_case


@parametrize("seed", range(40))
@parametrize("case", CASES)
def test_gradients_complex_step(case, seed):
    """(A5, A8), (P2, P4), (O3, O4), (S2, S3), (F2): the loss and every entry, at random sizes."""
    by_hand, loss, params, data = case(default_rng(seed))
    value, *grads = by_hand(*params, *data)
    want = loss(*params, *data)
    close(value, want, 1e-12, 1 + want)
    for k, grad in enumerate(grads):

        def at(x):
            return loss(*params[:k], x, *params[k + 1:], *data)

        slope = run_all.complex_step(at, params[k])
        close(grad, slope, 1e-12, 1 + abs(slope).max())


@parametrize("alpha, omega", [(0.0, 0.0), (1.2, -2.0), (-0.5, 6.0)])
@parametrize("T, q, d", SIZES)
def test_one_hot_line(T, q, d, alpha, omega):
    """(O1): at V = alpha I, W = omega C the matrix gradients are scalars times I and C."""
    C = centre(T)
    population = run_all.on_population(np.eye(T), lib.all_subsets(T, q))
    loss, grad_V, grad_W = ag.population_loss_and_grads(
        alpha * np.eye(d), omega * C, *population)

    law, grad_alpha, grad_omega = ag.one_hot_loss_and_grads(alpha, omega, T, q, d)
    close(law, loss, 1e-13)
    close(grad_V, grad_alpha * np.eye(d), 1e-14, 1 + abs(alpha))
    close(grad_W, grad_omega * C, 1e-14, d * (1 + alpha**2))


@parametrize("T, q, d", SIZES)
def test_best_fcn_at_every_width(T, q, d):
    """(F5): its loss on samples is the floor (F4), and so is the floor (F3) of its first layer."""
    for m in range(1, T * d + 1):
        network = lib.best_fcn(m, T, q, d, K=10.0)
        floor = lib.fcn_loss_floor(m, T, q, d)
        own_floor = lib.fcn_first_layer_floor(network[0], T, q, d)
        close(own_floor, floor, 1e-12, d / (2 * q))

        X, selected = lib.sample_batch(default_rng(15), 20_000, T, q, d)
        miss = lib.fcn(*network, lib.fcn_inputs(X, selected)) - lib.sts(X, selected)
        within_errors((miss**2).sum(axis=1) / 2, floor)


def trace(capsys, options):
    """Exit status, the lines printed, and those of the errors."""
    try:
        status = run_all.main(["--trace", *options.split()])
    except SystemExit as stop:
        status = stop.code
    output, errors = capsys.readouterr()
    return status, output.splitlines(), errors.splitlines()


def marked(output):
    return [line for line in output if line.endswith("<--")]


@parametrize("options, lines", [
    ("3 --model attention", 45),
    ("3 --model fcn", 57),
    ("3 --model one-hot", 51),
    ("2 --model stochastic", 56),
    ("2 --model attention --T 3 --q 1 --d 4 --seed 4 --eta 2", 30),
    ("2 --model fcn --T 2 --q 2 --d 1 --m 1 --seed 1", 38),
    ("40 --T 4 --q 4 --d 5 --eta 1.5", 600),
    ("1 --T 1 --q 1 --d 1", 17),
    ("99 --T 8 --q 3 --d 5 --eta 5.9", 1485),
    *((f"2 --start zero --model {model}", None) for model in run_all.TRACES),
])
def test_trace(options, lines, capsys):
    """Every update agrees with its derivation, on lines of at most 88 columns."""
    status, output, errors = trace(capsys, options)
    assert (status, errors, marked(output)) == (0, [], [])
    assert max(map(len, output)) <= 88
    [count] = re.findall(r"^(\d+) lines compared, largest difference ", output[-1])
    assert lines in (None, int(count))


def test_trace_by_hand(capsys):
    """The first two updates from zero at (T, q, d) = (8, 3, 5), eta = 1/2, are fractions."""
    _, output, _ = trace(capsys, "3 --T 8 --q 3 --d 5 --start zero")
    alpha, omega = 31 / 256, 25 / 14336
    assert f"step 2: V = {alpha:.6g} I, W = omega C, omega = {omega:.6g}" in output


# ---- what is drawn: tokens, subsets, signs, weights ----

FOURTH = {
    "gaussian": 3.0, "rademacher": 1.0, "laplace": 6.0, "logistic": 4.2, "gumbel": 5.4,
    "student_t": 3 + 6 / (lib.STUDENT_DF - 4)}


@parametrize("tokens", lib.TOKENS)
def test_tokens(tokens):
    """Mean 0, variance 1, uncorrelated; error bars from the fourth moment, which is finite."""
    assert lib.STUDENT_DF > 8
    n = 400_000
    X, _ = lib.sample_batch(default_rng(17), n, 3, 2, 2, tokens)
    X = X.reshape(n, 6)
    bound = normal_bound(6 + 36) / math.sqrt(n)
    assert (abs(X.mean(axis=0)) <= bound).all()

    spread = 1 + (math.sqrt(FOURTH[tokens] - 1) - 1) * np.eye(6)
    error = abs(X.T @ X / n - np.eye(6))
    assert (error <= bound * spread + 1e-12).all()


@parametrize("T, q", [(5, 2), (7, 1), (4, 3), (13, 13)])
def test_subsets(T, q):
    """All of them in their order; those of a batch are equally likely."""
    subsets = lib.all_subsets(T, q)
    chosen = [tuple(np.flatnonzero(row == 1)) for row in subsets]
    assert chosen == list(itertools.combinations(range(T), q))

    _, selected = lib.sample_batch(default_rng(18), 30_000, T, q, 1)
    uniform(np.vstack([selected, subsets]), len(subsets))


def test_most_subsets():
    assert len(lib.all_subsets(84, 3)) == 95_284


def test_random_signs():
    """All 2^6 patterns at d_e = 2, T = 3 are equally likely."""
    E = lib.random_sign_encoding(default_rng(19), 2, 3, 33_333)
    close(abs(E), np.full(E.shape, math.sqrt(0.5)), 1e-15)
    uniform(E.reshape(-1, 6) > 0, 64)
    u = lib.overlaps(default_rng(0), 2, 3000, 1, 200)  # one row a piece
    assert u[:, 0] == pytest.approx(1.0)


def test_init_fcn():
    W1, b1, A, b2 = lib.init_fcn(default_rng(16), m=60, T=30, d=4)
    assert b1.tolist() == 60 * [0]
    assert b2.tolist() == 4 * [0]
    within_errors(W1.ravel(), 0.0)
    within_errors(W1.ravel()**2, 2 / 150)
    within_errors(A.ravel()**2, 1 / 60)


# ---- the models and the dual query; content stays out (A) ----

@parametrize("seed", range(10))
@parametrize("case, forward, model", [
    (attention_case, run_all.attention_forward, lib.transformer),
    (network_case, run_all.fcn_forward, lib.fcn),
])
def test_outputs_again(case, forward, model, seed):
    """(A1)-(A3), (F1): both models give what the forward passes written again give."""
    _, _, params, (*inputs, target) = case(default_rng(seed))
    f = forward(*params, *inputs, target)["f"]
    close(model(*params, *inputs), f, 1e-12, 1 + abs(f).max())


def test_relu_has_derivative_0_at_0():
    network = np.ones((1, 1)), np.zeros(1), np.ones((1, 1)), np.zeros(1)
    _, *grads = ag.fcn_loss_and_grads(*network, [[0.0]], [[1.0]])
    assert [grad.item() for grad in grads] == [0, 0, 0, -1]


SETS = [  # E, selected
    (lib.random_sign_encoding(default_rng(8), 3, 7, 35), lib.all_subsets(7, 3)),
    (lib.random_sign_encoding(default_rng(8), 4, 9), lib.all_subsets(9, 4)),
    (np.zeros((2, 3)), lib.all_subsets(3, 1)),
    (1e-150 * np.eye(3), lib.all_subsets(3, 2)),
    (np.array([[1.0, 1.0], [0.0, 1e-5]]), np.ones((1, 2))),
]


@parametrize("E, selected", SETS)
def test_dual_query(E, selected):
    """Sample by sample the solution of <e_i, e_y> = 1 on y, in least squares, of least norm."""
    got = lib.dual_query(E, selected)
    for b, y in enumerate(selected > 0):
        E_y = E[:, y] if E.ndim == 2 else E[b][:, y]
        want, *_ = np.linalg.lstsq(E_y.T, np.ones(y.sum()), rcond=1e-12)
        close(got[b], want, 1e-10, 1 / (abs(E_y).max() or 1.0))


def full_model(V, W, E, X, selected, query="sum"):
    """Loss and gradients of the full model on samples, from its blocks V_1 and W_22."""
    data = run_all.on_samples(E, X, selected, query)
    return ag.attention_loss_and_grads(*lib.in_full_model(V, W), *data)


def all_tokens(values, d, T, q):
    """Every X with entries among equally likely values, each with every subset."""
    X = np.array(list(itertools.product(values, repeat=d * T)))
    subsets = lib.all_subsets(T, q)
    repeated = np.repeat(X.reshape(-1, d, T), len(subsets), axis=0)
    return repeated, np.tile(subsets, (len(X), 1))


def test_population_over_all_sign_tokens():
    """(P1, P2, P4) are the means of (A4, A5, A8) over all X (P5); V_2's and W_12's are 0 (A9)."""
    V, W, E = normals(default_rng(4), (2, 2), (3, 3), (3, 4))
    population = run_all.on_population(E, lib.all_subsets(4, 2), "sum")
    loss, *grads = ag.population_loss_and_grads(V, W, *population)
    means = full_model(V, W, E, *all_tokens([-1.0, 1.0], 2, 4, 2))
    for mean, exact in zip(means, (loss, *lib.in_full_model(*grads))):
        close(mean, exact, 1e-12)


@parametrize("T, q, d", [(3, 2, 1), (4, 1, 1), (2, 1, 2)])
def test_skewed_tokens(T, q, d):
    """(A10): with one-hot encodings tokens of skewness 3/2 pull content into W_12."""
    data = all_tokens([2.0, -0.5, -0.5, -0.5, -0.5], d, T, q)
    _, _, grad_W = full_model(0.7 * np.eye(d), 1.3 * centre(T), np.eye(T), *data)

    on_y = lib.first_subset(1, T, q)
    a = attend(1.3 * on_y)
    pull = (a * (1 - a) * (0.7 * a - on_y / q)).sum()
    close(grad_W[:d, d:], np.full((d, T), 0.7 * 1.5 * q / T * pull), 1e-13)


def curvature(gradient, size):
    """The largest eigenvalue of the Hessian at 0, from differences of the gradient."""
    ways = 1e-5 * np.eye(size)
    hessian = np.array([gradient(way) - gradient(-way) for way in ways]) / 2e-5
    return np.linalg.eigvalsh((hessian + hessian.T) / 2).max()


@parametrize("T, q, d", [(3, 2, 1), (4, 3, 1), (2, 2, 2)])
def test_largest_stable_eta(T, q, d):
    """(A11): the curvature in V_2 and W_12, over tokens with five moments of the normal."""
    root = math.sqrt(3)
    batch = all_tokens([-root, 0, 0, 0, 0, root], d, T, q)
    data = run_all.on_samples(np.eye(T), *batch)
    V, W = lib.in_full_model(np.eye(d), 14 * centre(T))

    def gradient(x):
        V[:, d:], W[:d, d:] = x.reshape(2, d, T)
        _, grad_V, grad_W = ag.attention_loss_and_grads(V, W, *data)
        return np.hstack([grad_V[:, d:].ravel(), grad_W[:d, d:].ravel()])

    largest = curvature(gradient, 2 * d * T)
    close(lib.largest_stable_eta(T, q, d), 2 / largest, 1e-4)


@parametrize("T, q, d", [(8, 2, 4), (12, 1, 5)])
def test_noise_of_online_descent(T, q, d, B=20_000):
    """(A12): tr Cov(grad)/(2L) is q + d where attention is .999; the mean is nothing beside it."""
    batch = lib.sample_batch(default_rng(31), B, T, q, d)
    Z, z_query, target = run_all.on_samples(np.eye(T), *batch)
    omega = math.log(999 * (T - q) / q)
    model = lib.in_full_model(np.eye(d) / 0.999, omega * centre(T))
    lines = ag.attention_lines(*model, Z, z_query, target)

    def squares(vectors):
        return (vectors**2).sum(axis=1)

    Za = np.einsum("bit,bt->bi", Z, lines["a"])
    Z_grad_s = np.einsum("bit,bt->bi", Z, lines["grad_s"])
    noise = squares(lines["r"]) * squares(Za) + squares(Z_grad_s) * squares(z_query)
    ratio = noise / squares(lines["r"]).mean()
    within_errors(ratio / lib.online_excess(q, d, eta=6.0, B=3), 1.0, rounding=0.015)


def test_online_excess(T=8, q=2, d=4, eta=0.2, B=64, start=4000, steps=1600):
    """(A12): from a late start, the loss of the full model over that of the scalars, 20 %."""
    rng = default_rng(34)
    losses = []
    V = None
    for t, (alpha, omega), _ in lib.one_hot_recursion(T, q, d, eta, start + steps):
        if t < start:
            continue
        on_the_line = lib.in_full_model(alpha * np.eye(d), omega * centre(T))
        if V is None:
            V, W = on_the_line

        data = run_all.on_samples(np.eye(T), *lib.sample_batch(rng, B, T, q, d))
        law, _, _ = ag.attention_loss_and_grads(*on_the_line, *data)
        loss, grad_V, grad_W = ag.attention_loss_and_grads(V, W, *data)
        losses.append((loss, law))
        V = V - eta * grad_V
        W = W - eta * grad_W

    blocks = np.reshape(losses[201:], (14, -1, 2)).mean(axis=1)
    found = blocks[:, 0] / blocks[:, 1] - 1
    error = found.std(ddof=1) / 14**0.5
    excess = lib.online_excess(q, d, eta, B)
    assert abs(found.mean() - excess) <= 0.2 * excess + 4 * error < 0.8 * excess


# ---- one-hot encodings (O): the law (C), heads (H) ----

@parametrize("omega, T, q", [(40.0, 8, 3), (300.0, 9, 1)])
def test_one_hot_digits(omega, T, q, d=5):
    """(O2)-(O4), (L1) sharp and at alpha = 1, to the last digits: the first term in e^-omega."""
    u = math.exp(-omega)
    loss = d * T * (T - q) * u**2 / (2 * q**3)
    exact = loss, -(T - q) * u / q**2, -2 * loss / (T - 1)

    got = ag.one_hot_loss_and_grads(1.0, omega, T, q, d)
    assert got == pytest.approx(exact, rel=1e-13, abs=0.0)
    carried = lib.length_loss(1.0, omega, T, q, d, 0.0)
    assert carried == pytest.approx(loss, rel=1e-13, abs=0.0)


@parametrize("T, q, d", [(5, 4, 6), (5, 1, 2), (6, 5, 20), (2, 2, 9)])
def test_largest_stable_eta_of_the_blocks(T, q, d):
    """(O5): 2 over the largest late curvature in V_1 and W_22."""
    population = run_all.on_population(np.eye(T), lib.all_subsets(T, q))

    def gradient(x):
        V = np.eye(d) + x[:d * d].reshape(d, d)
        W = 14 * centre(T) + x[d * d:].reshape(T, T)
        _, grad_V, grad_W = ag.population_loss_and_grads(V, W, *population)
        return np.hstack([grad_V.ravel(), grad_W.ravel()])

    largest = curvature(gradient, d * d + T * T)
    close(lib.largest_stable_eta(T, q, d, full=False), 2 / largest, 1e-4)


@parametrize("T, q, d, d_e, share, steps", [(3, 2, 1, 3, 0.9, 7000), (8, 3, 12, 10, 0.99, 2500)])
def test_long_run(T, q, d, d_e, share, steps):
    """Below the stable eta an orthonormal set stays on the line (O1) of the scalars."""
    E, _ = np.linalg.qr(default_rng(29).standard_normal((d_e, T)))
    eta = share * lib.largest_stable_eta(T, q, d, full=False)
    assert run_all.off_the_line(E, q, d, eta, steps) <= 1e-10


def test_the_line_is_for_orthonormal_sets():
    """Else W leaves it with its first step, the second, where V is still on it."""
    E = lib.random_sign_encoding(default_rng(0), 3, 4)
    assert run_all.off_the_line(E, 2, 2, 1.0, 2) > 1e-3


def best_loss(omega, T, q, d):
    """The loss at the best alpha: |a|^2 |s|^2 - <a, s>^2 as Lagrange's sum of squared minors."""
    on = 1 / (q + (T - q) * np.exp(-omega))
    off = np.exp(-omega) * on
    size = q * on**2 + (T - q) * off**2
    return d / (2 * q) * (T - q) * off**2 / size


def time_to(omega, T, q, d, eta, stiffness, heads=1):
    """When (stiffness + d alpha*'^2/heads) domega/dt = -eta dL*/domega reaches omega.

    From t = T/(eta heads), by Gauss-Legendre on short panels, derivatives by complex steps.
    """
    nodes, weights = np.polynomial.legendre.leggauss(30)
    edges = np.linspace(0, omega, 2 + int(4 * omega))
    half = np.diff(edges)[:, None] / 2
    x = edges[:-1, None] + half * (1 + nodes) + 1e-30j

    on = 1 / (q + (T - q) * np.exp(-x))
    off = 1 / (q * np.exp(x) + T - q)
    best_alpha = on / (q * on**2 + (T - q) * off**2)
    lag = d * (np.imag(best_alpha) / 1e-30)**2 / heads
    slope = np.imag(best_loss(x, T, q, d)) / 1e-30
    steps = -(stiffness + lag) / (eta * slope)
    return T / (eta * heads) + (steps * weights * half).sum()


LAWS = [  # T, q, d, eta
    (2, 1, 1, 1.0), (4, 3, 2, 0.5), (64, 4, 300, 1.0),
    (10**6, 999_999, 3, 1.0), (10**9, 3, 7, 0.25)]


@parametrize("d_e, heads", [(None, 1), (40, 1), (None, 3)])
@parametrize("T, q, d, eta", LAWS)
def test_one_hot_closed_form(T, q, d, eta, d_e, heads):
    """(C1, C3) against (C2) integrated numerically, also with the stiffness of (G1) and of (H)."""
    omegas = np.array([0.01, 0.5, 2.0, 7.0, 13.0, 25.0])
    stiffness = heads * (T - 1) if d_e is None else T * d_e / (T + d_e)
    times = [time_to(omega, T, q, d, eta, stiffness, heads) for omega in omegas]
    law = lib.one_hot_loss_at(times, T, q, d, eta, d_e, heads)
    close(law / best_loss(omegas, T, q, d), np.ones(6), 1e-11 + T * EPS)


@parametrize("T, q, d, eta", LAWS)
def test_one_hot_closed_form_at_its_ends(T, q, d, eta):
    """The start, and (C4) at t = 10^24, given as an integer too."""
    start = lib.one_hot_loss_at(0, T, q, d, eta)
    assert start == pytest.approx(d / 2 * (1 / q - 1 / T), rel=1e-9)

    others = (T**2 + 120 * q * T) * (T - 1) / (T - q)  # in (C3), next to (C4)
    for t in (1e24, 10**24):
        late = lib.one_hot_loss_at(t, T, q, d, eta) * 4 * eta * t / (T - 1)
        close(late, 1, others / (2 * eta * d * t) + 1e-9)


def test_one_hot_recursion(T=32, q=4, d=3, eta=2.0, steps=60):
    """(O3, O4) and (S2, S3), without spread and at d_e = T - 1, are the same descent."""
    times = range(steps + 1)
    u = lib.first_subset(1, T, q)
    descent = run_all.two_scalars(lambda: u, q, d, T - 1, eta, steps)
    _, params, loss = run_all.record(descent, times)
    close(run_all.scalar_descent(times, T, q, d, eta), [*np.transpose(params), loss], 1e-12)


@parametrize("T, q, d, eta", [(9, 4, 1, 1.0), (64, 3, 500, 0.1), (1000, 7, 2, 3.0)])
def test_escape_time(T, q, d, eta):
    half = math.log((T - q) / q)
    want = time_to(half, T, q, d, eta, stiffness=T - 1)
    close(lib.escape_time(T, q, d, eta), want, 1e-12)


def test_heads_are_one_head(H=3, eta=0.2, T=5, q=2, d=2):
    """(H): equal heads from zero, online, are one head: V moved by H eta, W by eta/H."""
    rng = default_rng(30)
    V = V_h = np.zeros((d, d + T))
    W = W_h = np.zeros((d + T, d + T))
    for _ in range(100):
        batch = lib.sample_batch(rng, 16, T, q, d)
        Z, z_query, target = run_all.on_samples(np.eye(T), *batch)
        others = (H - 1) * lib.transformer(V_h, W_h, Z, z_query)
        _, grad_V, grad_W = ag.attention_loss_and_grads(V_h, W_h, Z, z_query, target - others)
        V_h = V_h - eta * grad_V
        W_h = W_h - eta * grad_W

        _, grad_V, grad_W = ag.attention_loss_and_grads(V, W, Z, z_query, target)
        V = V - H * eta * grad_V
        W = W - eta / H * grad_W
    close(H * V_h, V, 1e-13)
    close(W_h, W, 1e-13)


@parametrize("H", [1, 3])
def test_heads_follow_the_law(H, T=16, q=3, d=2, eta=0.5):
    """(H): the loss of H heads is within 3 % of its law, late."""

    def heads(alpha, omega):
        loss, grad_alpha, grad_omega = ag.one_hot_loss_and_grads(alpha, omega, T, q, d)
        return loss, H * grad_alpha, grad_omega / H

    t, _, loss = run_all.final(lib.gradient_descent((0.0, 0.0), heads, eta, 6000))
    close(lib.one_hot_loss_at(t, T, q, d, eta, heads=H), loss, 0.03)


# ---- stochastic encodings (S), longer sequences (L) ----

@pytest.fixture(scope="module")
def signs():
    """All 2^6 sets of random signs at d_e = 2, T = 3."""
    return run_all.all_signs(2, 3)


def on_signs(signs, q, query):
    """All sets with y = {1, ..., q}, and their overlaps."""
    population = run_all.on_population(signs, lib.first_subset(len(signs), 3, q), query)
    return population, np.einsum("bet,be->bt", signs, population[1])


@parametrize("query", lib.QUERIES)
@parametrize("q", [1, 2, 3])
def test_stochastic_line(signs, q, query):
    """(S1)-(S3): over all signs the gradients at V = alpha I, W = c I are scalars times I."""
    identity = np.eye(2)
    population, u = on_signs(signs, q, query)
    loss, grad_V, grad_W = ag.population_loss_and_grads(
        0.8 * identity, 1.7 * identity, *population)

    law, grad_alpha, grad_c = ag.stochastic_loss_and_grads(0.8, 1.7, u, q, 2, 2)
    close(loss, law, 1e-13)
    close(grad_V, grad_alpha * identity, 1e-13, 1.0)
    close(grad_W, grad_c * identity, 1e-13, 1.0)


@parametrize("query", lib.QUERIES)
@parametrize("q", [1, 2, 3])
def test_overlaps(signs, q, query):
    """Means and products of sampled overlaps are those over all signs."""

    def products(u):
        pairs = np.einsum("bi,bj->bij", u, u)
        return np.hstack([u, pairs.reshape(len(u), -1)])

    _, u = on_signs(signs, q, query)
    drawn = lib.overlaps(default_rng(7), 20_000, 3, q, 2, query)
    within_errors(products(drawn), products(u).mean(axis=0))


@parametrize("q, d_e, most", [(1, 16, 1.0), (3, 64, 1.002), (4, 128, 1.002)])
def test_overlap_variance(q, d_e, most):
    """A lower bound of |e_y|^2/d_e for the dual query, within .2 % here, and exact at q = 1."""
    E = default_rng(9).choice([-1.0, 1.0], (20_000, q, d_e))
    inverse = np.linalg.inv(E @ E.swapaxes(1, 2))
    ratio = inverse.sum(axis=(1, 2)) / lib.overlap_variance(q, d_e)
    error = normal_bound(1) * ratio.std() / math.sqrt(len(ratio)) + 1e-12
    assert 1 - error <= ratio.mean() <= most + error


@parametrize("q", [1, 2, 3])
def test_overlap_variance_of_sums(signs, q):
    (_, e_query, _), _ = on_signs(signs, q, "sum")
    variance = (e_query**2).sum() / 64 / 2
    close(lib.overlap_variance(q, 2, "sum"), variance, 1e-14)


@parametrize("c", [0.0, 0.5, 3.0])
@parametrize("d, T, q, d_e, query", [(3, 6, 2, 8, "dual"), (1, 5, 4, 3, "sum")])
def test_overlap_loss(d, T, q, d_e, query, c):
    """(S4) is the loss at the alpha where the gradient, linear in alpha, is 0."""
    u = lib.overlaps(default_rng(10), 200, T, q, d_e, query)
    _, at_0, _ = ag.stochastic_loss_and_grads(0.0, c, u, q, d, d_e)
    _, at_1, _ = ag.stochastic_loss_and_grads(1.0, c, u, q, d, d_e)
    alpha = at_0 / (at_0 - at_1)
    best, _, _ = ag.stochastic_loss_and_grads(alpha, c, u, q, d, d_e)
    close(lib.overlap_loss(c, u, q, d), best, 1e-9)


def test_stochastic_loss_for_normal_overlaps():
    """(S5) errs by the next order, below 1e-3 here, where its last term is 9e-3."""
    T, q, sigma2, c = 32, 3, 0.03, 2.0
    rng = default_rng(22)
    law = lib.stochastic_loss(c, T, q, 2, sigma2)
    losses = []
    for _ in range(16):
        off_y = math.sqrt(sigma2) * rng.standard_normal((8000, T - q))
        u = np.hstack([np.ones((8000, q)), off_y])
        losses.append(lib.overlap_loss(c, u, q, 2))
    within_errors(losses / law, 1.0, rounding=5e-4)


@parametrize("c, sigma2", [(0.7, 0.3), (3.0, 0.04), (6.0, 0.02)])
def test_moments(c, sigma2):
    """m, M, v, h of (S5) by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    x = np.exp(c * (math.sqrt(sigma2) * nodes - 1))
    one = np.average(x, weights=weights)
    two = np.average(x**2, weights=weights)
    three = np.average(x**3, weights=weights)
    want = [one, two, two - one**2, three - two * one]
    close(lib.moments(c, 9, 2, sigma2), np.multiply(7, want), 1e-12)


@parametrize("c", [0.0, 0.3, 2.0, 8.0])
@parametrize("T, q, d", [(2, 1, 1), (7, 3, 2), (99, 5, 3)])
def test_closed_forms_without_spread(T, q, d, c):
    """At sigma2 = 0 (S5) and (L1) are the one-hot loss at omega = c."""
    alpha = np.array([0.0, 0.9, 1.8])
    loss, _, _ = ag.one_hot_loss_and_grads(alpha, c, T, q, d)
    close(lib.length_loss(alpha, c, T, q, d, 0.0), loss, 1e-12)
    best = lib.overlap_loss(c, lib.first_subset(1, T, q), q, d)
    close(lib.stochastic_loss(c, T, q, d, 0.0), best, 1e-12)


def test_trajectory_is_a_gradient_flow():
    """(S6) times dc/dt: d_e c'^2 + d alpha'^2 = -eta L' along the path."""
    d, d_e, eta = 4, 128, 2.0
    times = np.array([30.0, 100.0, 300.0, 1000.0, 4000.0])
    before = lib.stochastic_trajectory(times * 0.99, 32, 3, d, d_e, eta)
    after = lib.stochastic_trajectory(times * 1.01, 32, 3, d, d_e, eta)
    c, alpha, loss = np.subtract(after, before) / (0.02 * times)
    moved = d_e * c**2 + d * alpha**2
    close(moved / (-eta * loss), np.ones(5), 2e-3)


@parametrize("t, T", [(0, 32), (10, 32), (16.0, 32), (1e5, 10**17)])
def test_trajectory_starts_late(t, T):
    """Up to t = T/eta attention is uniform."""
    start = 0, 1, 4 / 2 * (1 / 3 - 1 / T)
    close(lib.stochastic_trajectory(t, T, 3, 4, 128, 2.0), start, 1e-12)


def test_trajectory_without_spread():
    """It is the one-hot law, with d_e for T - 1, where nothing ends it."""
    t = time_to(30.0, 9, 2, 1, 1.0, stiffness=10**6)
    c, _, _ = lib.stochastic_trajectory(t, 9, 2, 1, 10**6, 1.0)
    close(c, 30.0, 1e-3)


def test_trajectory_to_its_end():
    """It goes to the last step that it names, where c sigma^2 = .3, and not beyond."""
    with pytest.raises(ValueError, match="t must be at most") as error:
        lib.stochastic_trajectory(1e300, 32, 3, 4, 64, 2.0)
    last = float(re.search(r"at most ([\d.e+]+),", str(error.value))[1])

    c, _, _ = lib.stochastic_trajectory(0.99 * last, 32, 3, 4, 64, 2.0)
    assert 0.29 < c * lib.overlap_variance(3, 64) <= 0.3
    with pytest.raises(ValueError, match="t must be at most"):
        lib.stochastic_trajectory([0.1 * last, 1.02 * last], 32, 3, 4, 64, 2.0)


@parametrize("T, q, d", [(64, 1, 4), (128, 3, 6)])
def test_best_dimension(T, q, d, t=10**6, eta=1.0):
    """(S7): the least loss of (S6) over d_e, 12 %, and where it is, 6 %."""
    best, least = lib.best_dimension(t, T, q, d, eta)
    losses = {}
    for d_e in range(int(0.75 * best), int(1.5 * best)):
        _, _, losses[d_e] = lib.stochastic_trajectory(t, T, q, d, d_e, eta)
    close(least, min(losses.values()), 0.12)
    close(best, min(losses, key=losses.get), 0.06)


@parametrize("t, q", [(1e6, 1), (1e9, 3)])
def test_best_dimension_is_the_best_of_each(t, q, T=64, d=4, eta=0.5):
    """The least root L over d_e of L (1 - (2q/d_e) ln(L_1/(e L))) = d_e/(4 eta t), regime (i)."""
    best, loss = lib.best_dimension(t, T, q, d, eta)
    L_1 = d * (T - q) * (q + 1) / (2 * q**3)
    L = loss * np.geomspace(0.9, 1.1, 100_001)
    roots = []
    for d_e in best * np.array([0.99, 1.0, 1.01]):
        slowed = 1 - 2 * q / d_e * np.log(L_1 / (math.e * L))
        roots.append(L[np.argmax(L * slowed > d_e / (4 * eta * t))])
    close(roots[1], loss, 1e-5)
    assert roots[1] == min(roots)


def test_floor_of_the_dual_query(T=16, q=3):
    """(S8): the least loss on draws is .2 to 1 of it; sqrt(d_e) times that falls no faster."""
    d_e = np.array([16, 22, 28, 34])
    ratios = []
    for size in d_e:
        u = lib.overlaps(default_rng(14), 60_000, T, q, size)
        grid = np.linspace(0.6, 1.1, 6) * size / q
        least = min(lib.overlap_loss(c, u, q, 2 * q) for c in grid)
        ratios.append(least / lib.stochastic_floor(T, q, 2 * q, size))
    assert 0.2 < min(ratios) and max(ratios) < 1

    slope, _ = np.polyfit(d_e, np.log(ratios * np.sqrt(d_e)), 1)
    assert 0 < 2 * q * slope < 0.14


@parametrize("T, q, d_e", [(32, 3, 128), (16, 4, 256)])
def test_floor_of_the_sum_query(T, q, d_e):
    """(S9): the least M/(q + M), M from draws: what is uneven on y and what is left off it."""
    u = lib.overlaps(default_rng(13), 40_000, q + 2, q, d_e, "sum")
    uneven = q * u[:, :q].var(axis=1).mean()
    gap = u[:, q:] - u[:, :q].mean(axis=1, keepdims=True)
    least = 1.0
    for c in np.linspace(1.5, 4, 51):
        M = c**2 * uneven + (T - q) * np.exp(2 * c * gap).mean()
        least = min(least, M / (q + M))
    close(lib.stochastic_floor(T, q, 2 * q, d_e, "sum"), least, 0.015)


@parametrize("T, q, eps", [
    (10**9, 3, 0.5), (10**9, 7, 1e-9), (32, 31, 0.5),
    (2, 1, 0.9), (1024, 2, 0.01), (32, 2, 5e-324),
])
def test_required_dimension(T, q, eps):
    """The least integer whose floor is at most eps L_0, where the floor is not cut at L_0."""
    need = lib.required_dimension(T, q, eps)
    assert type(need) is int and need >= 1
    assert lib.stochastic_floor(T, q, 2 * q, need) <= eps * (1 + 1e-12)
    if need > 1 and q < 31:
        assert lib.stochastic_floor(T, q, 2 * q, need - 1) > eps


def test_floor_is_at_most_L_0():
    assert lib.stochastic_floor(100, 3, 6, 1) == 1.0


@parametrize("query", lib.QUERIES)
@parametrize("T, q, d_e", [(3, 1, 4), (3, 2, 4), (4, 2, 3)])
def test_exact_floor(T, q, d_e, query):
    """(S10): over all sign patterns, at c = 10^5."""
    signs = run_all.all_signs(d_e, T)
    selected = lib.first_subset(len(signs), T, q)
    _, e_query, _ = run_all.on_population(signs, selected, query)
    u = np.einsum("bet,be->bt", signs, e_query).round(9)
    floor = lib.stochastic_floor(T, q, 3, d_e, query)
    close(floor, lib.overlap_loss(1e5, u, q, 3), 1e-12)


@parametrize("T, q, d_e", [(40, 1, 60), (28, 2, 14), (60, 2, 5)])
def test_exact_floor_as_a_sum(T, q, d_e):
    """(S10): E[k/(q+k)] over the number k of ties and, at q = 2, over the A equal signs on y."""
    want = 0.0
    for A in range(d_e + 1) if q == 2 else [d_e]:
        chance = math.comb(d_e, A) / 2**d_e if q == 2 else 1.0
        for k in range(T - q + 1):
            apart = (1 - 2.0**-A)**(T - q - k)
            ties = math.comb(T - q, k) * 2.0**(-A * k) * apart
            want += chance * ties * k / (q + k)
    close(lib.stochastic_floor(T, q, 2 * q, d_e), want, 1e-13)


@parametrize("fresh", [False, True])
def test_fresh_encodings_of_each_sample(fresh):
    """From zero one set for the whole batch moves V_2 by a matrix of rank 1, fresh sets do not."""
    E = lib.random_sign_encoding(default_rng(3), 12, 6)
    descent = run_all.online(default_rng(4), E, 2, 4, 1.0, 8, 1, "dual", fresh)
    _, (V, _), _ = run_all.final(descent)
    first, second, *_ = np.linalg.svd(V[:, 4:], compute_uv=False)
    assert (second > 0.05 * first) == fresh


@parametrize("longer", [1, 2])
def test_length_loss_sampled(longer, T=32, q=3, d=4, d_e=128, c=5.0):
    """(L1) over the loss at T and 2T on draws, within 4 % and the sampling error."""
    u = lib.overlaps(default_rng(11), 4000, longer * T, q, d_e)
    losses = []
    for rows in np.split(u, 16):
        loss, _, _ = ag.stochastic_loss_and_grads(1.1, c, rows, q, d, d_e)
        losses.append(loss)
    law = lib.length_loss(1.1, c, longer * T, q, d, lib.overlap_variance(q, d_e))
    within_errors(losses / law, 1.0, rounding=0.02)


@parametrize("T, q, d, d_e, t, eps", [(32, 3, 4, 128, 1e5, 0.1), (16, 1, 2, 100, 1e6, 0.03)])
def test_longest_sequence(T, q, d, d_e, t, eps):
    """(L2) within 5 % of where (L1) passes eps L_0, at 8T or more."""
    sigma2 = lib.overlap_variance(q, d_e)
    c, alpha, loss = lib.stochastic_trajectory(t, T, q, d, d_e, 2.0)
    assert loss <= 0.004 * d / (2 * q)

    def carried(length):
        return lib.length_loss(alpha, c, length, q, d, sigma2) * 2 * q / d

    reached = bisect.bisect(range(10**5), eps, lo=T, key=carried)
    assert reached >= 8 * T
    close(lib.longest_sequence(float(c), T, q, eps, sigma2), reached, 0.05)


# ---- fully-connected networks (F) ----

@parametrize("T, q, d", SIZES)
def test_fcn_loss_floor(T, q, d):
    """(F4, F6): the least eigenvalues of E s s^T/q^2 kron I."""
    subsets = lib.all_subsets(T, q)
    moment = np.kron(subsets.T @ subsets, np.eye(d)) / len(subsets) / q**2
    values = np.linalg.eigvalsh(moment)
    for m in range(T * d + 3):
        least = values[:max(T * d - m, 0)].sum() / 2
        floor = lib.fcn_loss_floor([m], T, q, d, fisher=2.0)
        close(2 * floor, [least], 1e-12, d / (2 * q))


@parametrize("T, q, d", SIZES)
def test_fcn_first_layer_floor(T, q, d):
    """(F3, F6): the part of the target that W1 misses; its row space alone matters."""
    size = T * d
    subsets = lib.all_subsets(T, q)
    targets = np.einsum("bt,kl->tlbk", subsets, np.eye(d)).reshape(size, -1) / q  # of vec(X)
    small, large, left, right = normals(
        default_rng(14), (3, size), (size + 2, size + T), (4, 2), (2, size))
    for W1 in (small, large, left @ right, np.zeros((2, size))):
        rows = W1[:, :size]
        seen, *_ = np.linalg.lstsq(rows.T, targets, rcond=1e-10)
        missed = ((targets - rows.T @ seen)**2).sum() / (2 * len(subsets))
        floor = lib.fcn_first_layer_floor(W1, T, q, d, fisher=3.0)
        close(3 * floor, missed, 1e-12, d / (2 * q))
        assert missed >= lib.fcn_loss_floor(len(W1), T, q, d) - 1e-12 * d / q


@parametrize("W1", [
    [[1.0, 0.0], [1.0, 1e-8]],
    [[1e30, 0.0], [0.0, 1e-30]],
    [[1.0, 0.0, 1e30, 0.0], [0.0, 1.0, 0.0, 0.0]],
])
def test_rows_far_apart_in_size(W1):
    assert lib.fcn_first_layer_floor(W1, T=2, q=1, d=1) == 0


@parametrize("share", [0.0, 0.5, 1.0])
def test_control_variate_of_the_test_loss(share):
    """f = share * target has the loss (1 - share)^2 L_0: the predictor 0 takes all noise away."""
    target = default_rng(33).standard_normal((50, 3))
    loss, error = run_all.with_error(share * target, target, 2)
    close([loss, error], [(1 - share)**2, 0.0], 1e-12, 1.0)


# ---- fixed encodings: the widest margin (G) ----

@parametrize("q, d, d_e", [(2, 3, 24), (1, 2, 9)])
def test_span_of_fixed_encodings(q, d, d_e):
    """W stays in the span of E, so that its cosine with I is at most sqrt(T/d_e)."""
    E = lib.random_sign_encoding(default_rng(d_e), d_e, 6)
    descent = run_all.set_descent(E, q, d, 1.0, 400)
    _, (_, W), _ = run_all.final(descent)
    basis, _ = np.linalg.qr(E)
    span = basis @ basis.T
    close(span @ W @ span, W, 1e-12)
    assert 0.1 < run_all.cosine(W, np.eye(d_e)) <= math.sqrt(6 / d_e) + 1e-12


def sphere(d_e, T):
    """T encodings of length 1 in random directions."""
    E = default_rng(d_e).standard_normal((d_e, T))
    return E / np.linalg.norm(E, axis=0)


def hadamard(d_e, T):
    """Rows of Hadamard's matrix: at q = 2 and d_e < T most other sets have no W*."""
    two = np.array([[1, 1], [1, -1]])
    return np.kron(np.kron(two, two), two)[-d_e:, :T] / math.sqrt(d_e)


def sinusoidal(d_e, T):
    """The usual encodings of positions: neighbours differ little, and the set has a low rank."""
    angle = np.arange(T) / 10_000**(np.arange(d_e // 2)[:, None] / (d_e // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)]) / math.sqrt(d_e // 2)


def constraints(E, q, query):
    """Matrices, flat, whose products with W must be at least 1, and those where they must be 0."""
    apart = []
    equal = [np.zeros(len(E)**2)]
    for row in lib.all_subsets(E.shape[1], q):
        e_y = lib.QUERIES[query](E, row[None])[0]
        first, *others = E.T[row == 1]
        apart += [np.outer(first - e, e_y).ravel() for e in E.T[row == 0]]
        equal += [np.outer(first - e, e_y).ravel() for e in others]
    return np.array(apart), np.array(equal)


MARGINS = [
    (sphere, 12, 20, 1, "dual"), (sphere, 7, 7, 1, "sum"), (sphere, 30, 6, 2, "dual"),
    (sphere, 8, 7, 3, "sum"), (sphere, 40, 8, 7, "dual"), (hadamard, 5, 6, 2, "dual"),
    (sinusoidal, 32, 32, 1, "dual")]


@parametrize("draw, d_e, T, q, query", MARGINS)
def test_widest_margin_is_shortest(draw, d_e, T, q, query):
    """W is a sum of l times its tight margins, l >= 0, and of ties: every W' that meets the margins
    has a product with it of at least the sum of l, so none is shorter."""
    E = draw(d_e, T)
    W = lib.widest_margin(E, q, query).ravel()
    apart, equal = constraints(E, q, query)
    assert (apart @ W).min() > 1 - 1e-9
    close(equal @ W, np.zeros(len(equal)), 1e-9, np.linalg.norm(W))

    tight = apart[apart @ W < 1 + 1e-8]
    rows = np.concatenate([tight, equal])
    least = np.where(np.arange(len(rows)) < len(tight), 0.0, -np.inf)
    rate = np.linalg.norm(rows, 2)**-2
    l = np.maximum(np.linalg.lstsq(rows.T, W, rcond=1e-13)[0], least)
    old = l
    for k in range(5_000):  # accelerated projected gradients, where l is not unique
        ahead = l + k / (k + 3) * (l - old)
        old = l
        l = np.maximum(ahead + rate * rows @ (W - rows.T @ ahead), least)
    lower = l[:len(tight)].sum() / np.linalg.norm(rows.T @ l)
    assert np.linalg.norm(W) <= (1 + 1e-6) * lower


def test_widest_margin_separates(d_e=32, T=48):
    """A large set, of which neighbours differ little."""
    E = sinusoidal(d_e, T)
    apart, _ = constraints(E, 1, "dual")
    assert (apart @ lib.widest_margin(E, 1).ravel()).min() > 1 - 1e-9


@parametrize("d_e, T, q", [(6, 6, 1), (9, 6, 2), (7, 5, 3), (4, 4, 3)])
def test_widest_margin_of_orthonormal_sets(d_e, T, q):
    """(C4): W* = E (I - 11^T/T) E^T, and so the late loss (T - 1)/(4 eta t)."""
    E = np.linalg.qr(default_rng(3).standard_normal((d_e, T)))[0]
    W = lib.widest_margin(E, q)
    close(W, E @ (np.eye(T) - 1 / T) @ E.T, 1e-9)
    assert lib.fixed_set_loss_at(50.0, W, 0.5) == pytest.approx((T - 1) / (4 * 0.5 * 50))


@parametrize("seed", range(20))
def test_widest_margin_of_independent_sets(seed, d_e=16, T=8, q=3):
    """(G3): for 3 <= q <= T - 2 it exists only if u_max < 1, and then it is known."""
    E = lib.random_sign_encoding(default_rng(seed), d_e, T)
    selected = lib.all_subsets(T, q)
    u_max = (lib.dual_query(E, selected) @ E)[selected == 0].max()
    dual = np.linalg.pinv(E, rcond=1e-12)
    w = dual.sum(axis=0)
    if u_max < 1 - 1e-9:
        close(lib.widest_margin(E, q), (E @ dual - np.outer(w, w) / (w @ w)) / (1 - u_max), 1e-7)
    else:
        with pytest.raises(ValueError, match="E must be a set that some W separates"):
            lib.widest_margin(E, q)


@parametrize("query, power", [("dual", 0), ("sum", 2)])
@parametrize("size", [1e-9, 1e9])
def test_widest_margin_of_other_units(query, power, size):
    """Encodings times a size: dual queries are divided by it, sum queries multiplied."""
    E = sphere(9, 6)
    close(lib.widest_margin(size * E, 2, query) * size**power, lib.widest_margin(E, 2, query), 1e-6)


@parametrize("delta", [0.5, 1e-2, 2e-4, 1e-5])
def test_widest_margin_of_a_pair(delta):
    """Scores must differ by 1 both ways: W* = 2 g g^T/delta^4, g = e_1 - e_2. A separable set is
    solved or said not to be reached, never said to have no W."""
    angle = 2 * math.asin(delta / 2)
    E = np.array([[1.0, math.cos(angle)], [0.0, math.sin(angle)]])
    g = E[:, 0] - E[:, 1]
    try:
        W = lib.widest_margin(E, 1)
    except ValueError as error:
        assert delta < 1e-4 and "whose W* is reached" in str(error)
    else:
        close(W, 2 * np.outer(g, g) / delta**4, 1e-6)


TWICE = sphere(12, 5)[:, [0, 1, 2, 3, 4, 1]]


@parametrize("E, q", [
    (TWICE, 1),
    (TWICE, 3),
    (TWICE * [1, 1, 1, 1, 1, -1], 2),
    (lib.random_sign_encoding(default_rng(1), 2, 6), 1),
    (np.zeros((3, 4)), 1),
])
def test_widest_margin_of_inseparable_sets(E, q):
    """Equal encodings, opposite ones (their query is 0), too few numbers; and no warning."""
    with pytest.raises(ValueError, match="E must be a set that some W separates"):
        lib.widest_margin.__wrapped__(E, q)


# ---- finite samples (N) ----

@parametrize("query", lib.QUERIES)
@parametrize("seed", range(3))
def test_one_sequence_over_all_signs(signs, seed, query):
    """(N1): whatever the sequence, grad_W is a multiple of I, V_2 and W_12 stay 0."""
    V, X = normals(default_rng(seed), (2, 2), (2, 3))
    selected = lib.first_subset(64, 3, 2)
    X = np.tile(X, (64, 1, 1))
    _, grad_V, grad_W = full_model(V, 1.7 * np.eye(2), signs, X, selected, query)
    close(grad_V[:, 2:], np.zeros((2, 2)), 1e-14)
    close(grad_W, grad_W[2, 2] * np.diag([0, 0, 1, 1]), 1e-14, 1 + abs(grad_W).max())


def regression(X, target, a):
    """The V that fits the targets best, all draws of attention together."""
    second = a.T @ a / len(a)
    gram = np.tensordot(X @ second, X, ((0, 2), (0, 2)))
    Xa = X @ a.mean(axis=0)
    return np.linalg.solve(gram, Xa.T @ target).T


@parametrize("n, T, q, c", [(40, 10, 2, 1.0), (60, 10, 2, 3.0)])
def test_regression_losses(n, T, q, c, d=20, d_e=64, h=0.05):
    """(N2) at given c: losses and |dV/dc|^2 of the V that a linear solve finds for sequences."""
    points = c + np.array([-h, 0.0, h])
    u = lib.overlaps(default_rng(1), 20_000, T, q, d_e)
    attention = [attend(point * u) for point in points]
    a = attention[1]
    on_y = a[:, :q].sum(axis=1).mean()
    square = (a**2).sum(axis=1).mean()

    samples = []
    for X in default_rng(25).standard_normal((60, n, d, T)):
        target = X[:, :, :q].mean(axis=2)
        before, V, after = (regression(X, target, each) for each in attention)
        fitted = np.vdot(target, X @ a.mean(axis=0) @ V.T)  # as V solves the normal equations
        train = ((target**2).sum() - fitted) / (2 * n)
        test = (V**2).sum() * square / 2 - np.trace(V) * on_y / q + d / (2 * q)
        slope = (after - before) / (2 * h)
        samples.append([train, test, (slope**2).sum()])
    law = lib.regression_losses(points, n, T, q, d, lib.overlap_variance(q, d_e))
    middle = np.array(law)[:, 1]
    within_errors(samples / middle, 1.0, rounding=np.array([0.015, 0.015, 0.03]))


@parametrize("n, d", [(6, 12), (16, 8), (30, 10)])
def test_regression_at_uniform_attention(n, d, T=5, q=2):
    """(N2): regression of the target on mean tokens, at t <= T/eta, or at the end if n < d - 1."""
    X = default_rng(26).standard_normal((4000, n, d, T))
    target = X[..., :q].mean(axis=3)
    Xa = X.mean(axis=3)
    V_T = np.linalg.pinv(Xa, rcond=1e-12) @ target
    train = ((Xa @ V_T - target)**2).sum(axis=(1, 2)) / (2 * n)
    size = (V_T**2).sum(axis=(1, 2))
    test = (size - 2 * np.trace(V_T, axis1=1, axis2=2)) / (2 * T) + d / (2 * q)
    for t in (0.0, 5.0):
        law = lib.finite_sample_loss(t, n, T, q, d, 40, 1.0)
        within_errors(np.transpose([train, test]), law, rounding=1e-5)


def test_finite_sample_loss(n=36, T=16, q=2, d=12, d_e=40, eta=0.8, steps=600, h=1e-3):
    """(N2) against small steps in t."""
    near = h * np.arange(-2, 3)
    sigma2 = lib.overlap_variance(q, d_e)
    c = 0.0
    dt = (steps - T / eta) / 2000
    for _ in range(2000):
        train, test, moved = lib.regression_losses(c + near, n, T, q, d, sigma2)
        slope = (train[3] - train[1]) / (2 * h)
        c -= dt * eta * slope / (d_e + moved[2])
    law = lib.finite_sample_loss(steps, n, T, q, d, d_e, eta)
    close(law, [train[2], test[2]], 2e-3)


def test_finite_samples_by_descent(n=36, T=8, d=12, d_e=40, steps=600):
    """(N2): descent on n sequences, encodings drawn at each step; 10 % and sampling error."""
    rng = default_rng(35)

    def gradients(V, W, E):
        loss, grad_V, grad_W = full_model(V, W, E, *sequences, "dual")
        return loss, grad_V[:, :d], grad_W[d:, d:]

    def fresh(B=None):
        return lib.random_sign_encoding(rng, d_e, T, B)

    losses = []
    for _ in range(4):
        sequences = lib.sample_batch(rng, n, T, 2, d)
        descent = run_all.train(gradients, lambda: [fresh()], (d, d), d_e, 0.8, steps)
        _, model, _ = run_all.final(descent)
        population = run_all.on_population(fresh(1000), lib.first_subset(1000, T, 2))
        losses.append(ag.population_loss_and_grads(*model, *population)[0])
    _, law = lib.finite_sample_loss(steps, n, T, 2, d, d_e, 0.8)
    within_errors(losses / law, 1.0, rounding=0.05)


# ---- descent ----

def bowl(*params):
    return sum(np.sum(param * param) for param in params) / 2, *params


def test_gradient_descent():
    """It copies its start at the call, and changes nothing that it yielded."""
    start = np.array([1.0, -2.0]), 3.0
    descent = lib.gradient_descent(start, bowl, 0.5, 6)
    start[0][:] = 7.0
    states = list(descent)
    assert len(states) == 7
    for k, (t, (x, y), loss) in enumerate(states):
        assert (t, loss) == (k, 7 * 0.25**k)
        assert x.tolist() == [0.5**k, -2 * 0.5**k]
        assert y == 3 * 0.5**k
    assert start[0].tolist() == [7.0, 7.0]


def test_gradient_descent_of_no_steps():
    """It takes no step, not even one that overflows."""
    [(t, _, _)] = lib.gradient_descent((1,), lambda x: (0.0, 1e308), 1e10, 0)
    assert t == 0


DIVERGING = [  # loss and gradient, rate, step
    (lambda x: (0.0 * x, x * 1e200), 1e200, 1),
    (lambda x: (x if x > 0.5 else np.nan, 1.0), 0.25, 2),
    (lambda x: (np.inf, x), 0.125, 0),
    (lambda x: (np.array([1.0, np.nan]), x), 0.125, 0),
    (lambda x: (x, x) if x > 0.6 else math.exp(1e3), 0.25, 2),
]


@parametrize("loss_and_grads, rate, step", DIVERGING)
def test_divergence(loss_and_grads, rate, step):
    """Named with its step and rate, in one entry of the last of several parameters."""

    def among_others(x, y):
        loss, grad = loss_and_grads(y[1])
        return loss, 0.0, np.array([0.0, grad])

    run = lib.gradient_descent((0.0, [0.0, 1.0]), among_others, rate, 50)
    with pytest.raises(FloatingPointError, match=rf"{re.escape(f'{rate:g}')}\b.* step {step}\b"):
        list(run)


UNFIT = [
    lambda x, y: (0.0, x),
    lambda x, y: (0.0, x, y, y),
    lambda x, y: (0.0, x[None], y),
    lambda x, y: (0.0, x, None),
    lambda x, y: (0.0, 1j * x, y),
    lambda x, y: [0.0, x, y],
    lambda x, y, calls=itertools.count(): (0.0, x[next(calls) % 3 // 2:], y),
]


@parametrize("grads", UNFIT)
def test_gradients_that_do_not_fit(grads):
    """The last of them at the third step alone: not broadcast."""
    for run in (grads, lib.adam(grads, 3)):
        with pytest.raises(ValueError, match="loss_and_grads.* got "):
            list(lib.gradient_descent((np.ones(2), 1.0), run, 1.0, 3))


def test_adam():
    """The algorithm, its rate falling to 0 over the last 30 % of the steps."""
    x = np.array([1.0, -2.0, 0.5])
    h = np.array([1.0, 10.0, 0.1])
    first = second = 0.0
    directions = lib.adam(lambda x: (0.0, h * x), 40, 0.8, 0.95)
    for t, (param,), _ in lib.gradient_descent((x,), directions, 0.1, 40):
        assert param == pytest.approx(x, rel=1e-12, abs=1e-14)
        first = 0.8 * first + 0.2 * h * x
        second = 0.95 * second + 0.05 * (h * x)**2
        size = np.sqrt(second / (1 - 0.95**(t + 1)))
        rate = 0.1 * min(1.0, (40 - t) / 12) / (1 - 0.8**(t + 1))
        x = x - rate * first / (size + 1e-8)


def adam_run(directions):
    return [x for _, (x,), _ in lib.gradient_descent((1.0,), directions, 0.1, 5)]


def test_adam_serves_one_run():
    """A second run and a longer one are refused."""
    directions = lib.adam(bowl, 5)
    assert adam_run(directions)[1] == pytest.approx(0.9)
    for used in (directions, lib.adam(bowl, 4)):
        with pytest.raises(ValueError, match="steps must be .* one run"):
            adam_run(used)


@parametrize("size", [1e200, 3e155])
def test_adam_refuses_squares_beyond_float64(size):
    """At 3e155 after the correction of the start alone."""
    with pytest.raises(FloatingPointError, match="step 0 the square of a gradient"):
        adam_run(lib.adam(lambda x: (x, size * x), 5))


def test_adam_in_float64():
    """The square of 1e20 is beyond float32."""
    directions = lib.adam(lambda x: (x, np.float32(1e20)), 5)
    assert adam_run(directions)[1] == pytest.approx(0.9)


# ---- sharp attention, sizes of integers, batches of several pieces ----

SHARP = parametrize("size", [800.0, 1e100, 1e300])


@SHARP
def test_sharp_softmax(size):
    """Scores up to 1e300, and each row by itself."""
    rows = [[-size, size, 0.0], [size, size, -size], [-size, -2 * size, -size]]
    assert ag.softmax(rows).tolist() == [[0, 1, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]]


@SHARP
@parametrize("T, q, sign, loss", [(5, 2, 1, 0.0), (5, 2, -1, 5 / 4), (4, 4, -1, 0.0)])
def test_sharp_one_hot(size, T, q, sign, loss):
    """Attention on y alone; on the three others alone; on y whatever omega."""
    found = ag.one_hot_loss_and_grads(1.0, sign * size, T, q, 3)
    assert found[0] == pytest.approx(loss, rel=1e-14) and np.isfinite(found).all()


@SHARP
def test_sharp_laws(size):
    """Full attention on y leaves no loss where overlaps have no spread."""
    one = [[1.0]]
    u = [[1.0, 1.0, 0.5], [1.0, 1.0, -1.0]]
    assert ag.attention_loss_and_grads(one, [[size]], [[[1.0, 0.0]]], one, one)[0] == 0
    assert ag.population_loss_and_grads(one, [[size]], [[1.0, 0.0]], one, [[1, 0]])[0] == 0
    assert ag.stochastic_loss_and_grads(1.0, size, u, 2, 3, 4) == (0, 0, 0)
    assert lib.overlap_loss(size, u, 2, 3) == 0


def test_numpy_integers():
    """They give what Python's give, where their products overflow."""
    sizes = dict(m=100, T=100_000, q=70_000, d=50_000)
    narrow = {key: np.int32(size) for key, size in sizes.items()}
    close(lib.fcn_loss_floor(**narrow), lib.fcn_loss_floor(**sizes), 1e-14)


@parametrize("sizes", [
    dict(T=8, q=[4, 5, 6], d=np.array([3, 2, 1])),
    dict(T=np.int32([100_000]), q=np.int32([70_000]), d=70_000),
])
def test_arrays_of_sizes(sizes):
    """Each row of the result is that of its own sizes."""
    def results(sizes):
        *_, (_, _, loss) = lib.one_hot_recursion(**sizes, eta=0.5, steps=20)
        return [loss, *ag.one_hot_loss_and_grads(1.0, 0.5, **sizes)]

    rows = [results(dict(zip(sizes, map(int, row)))) for row in np.broadcast(*sizes.values())]
    for together, alone in zip(results(sizes), zip(*rows)):
        close(together, alone, 1e-14)


def attention_batch(B, D=24, T=64):
    shapes = (2, D), (D, D), (B, D, T), (B, D), (B, 2)
    V, W, *data = (default_rng(21).standard_normal(shape) for shape in shapes)
    return V, W / D, *data


def test_pieces_add_up():
    """A batch of several pieces (of 195, the last of 3) has the sums of its lines."""
    batch = attention_batch(978)
    lines = ag.attention_lines(*batch)
    for mean, name in zip(ag.attention_loss_and_grads(*batch), ("loss", "grad_V", "grad_W")):
        close(978 * mean, lines[name], 1e-12)


def peak(function, *arguments):
    """The most memory that a call holds at once, in bytes."""
    tracemalloc.start()
    function(*arguments)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_pieces_save_memory():
    """Eight times the batch needs no more memory, its result aside."""
    small, large = (peak(ag.attention_loss_and_grads, *attention_batch(B)) for B in (978, 7803))
    assert large <= 1.1 * small + 2**16

    small, large = (peak(lib.overlaps, default_rng(0), B, 64, 3, 64) - 8 * 64 * B
                    for B in (2000, 16_000))
    assert large <= 1.1 * small + 2**16


# ---- the door: what every public function lets in, by its contract ----

KINDS = {  # the names of the arguments that may be of a kind, in any function
    "rng": "rng",
    "function": "loss_and_grads",
    "arrays": "params",
    "flag": "full",
    "size": "B T q d d_e m n steps heads",
    "sizes": "T d",
    "size <= T": "q",
    "sizes <= T": "q",
    "size < T": "q",
    "size < T/2": "q",
    "size or None": "B d_e",
    "count": "steps",
    "counts": "m",
    "number": "alpha c",
    "numbers": "alpha omega",
    "number > 0": "eta learning_rate K",
    "numbers > 0": "t",
    "number >= 0": "sigma2",
    "numbers >= 0": "t c",
    "number >= 1": "fisher",
    "number in (0, 1)": "eps beta1 beta2",
    "... T": "scores",
    "d D": "V",
    "d d": "V",
    "D D": "W",
    "d_e d_e": "W W_star",
    "B D T": "Z",
    "B D": "z_query",
    "B d": "target",
    "B d T": "X",
    "d_e T": "E",
    "d_e T | B d_e T": "E",
    "B d_e": "e_query",
    "B T of 0/1": "selected",
    "B T": "overlaps",
    "m n": "W1",
    "m": "b1",
    "d m": "A",
    "d": "b2",
    "B n": "inputs",
}
NAMED = {"tokens": lib.TOKENS, "query": lib.QUERIES}
DEFAULTS = dict(tokens="gaussian", query="dual", B=None, d_e=None, heads=1, full=True,
                beta1=0.9, beta2=0.999, fisher=1.0, K=12.0)
BELOW_T = (  # they need q < T; escape_time needs q < T/2
    "best_dimension", "escape_time", "finite_sample_loss", "length_loss", "longest_sequence",
    "one_hot_loss_at", "overlap_loss", "required_dimension", "stochastic_floor",
    "stochastic_loss", "stochastic_trajectory", "widest_margin",
)
EVERY = parametrize("name", PUBLIC)


def arguments_of(name):
    """The kind of each argument of a function, by its contract."""
    contract = PUBLIC[name].contract
    return {key: kind for key, kind in contract.items() if key != "returns"}


@EVERY
def test_contract(name):
    """Every argument has a kind that its name promises, and the same default in every function.

    None is a default where it is let in. Only two functions take arrays of sizes.
    """
    kinds = arguments_of(name)
    parameters = inspect.signature(PUBLIC[name]).parameters
    assert list(kinds) == list(parameters)
    for key, kind in kinds.items():
        assert kind is NAMED[key] if key in NAMED else key in KINDS[kind].split()
        optional = key in DEFAULTS and (DEFAULTS[key] is not None or kind == "size or None")
        assert parameters[key].default == (DEFAULTS[key] if optional else inspect.Parameter.empty)
    several = name in ("one_hot_loss_and_grads", "one_hot_recursion")
    assert several == ("sizes" in kinds.values())


@EVERY
def test_docstring(name):
    text = inspect.getdoc(PUBLIC[name])
    for word in ("Parameters", "Returns", "Raises"):
        assert f"\n{word}: " in text
    assert "\n>>> " in text


# Arguments that must be let in. Arrays hold small integers, so that every dtype holds them.

LENGTHS = {"...": 2, "B": 2, "T": 5, "q": 2, "d": 2, "D": 3, "d_e": 3, "m": 3, "n": 15,
           "steps": 3, "heads": 2}
NUMBERS = {"alpha": 2.0, "omega": 1.0, "t": 16.0, "fisher": 2.0, "K": 4.0}  # the rest are 1/2
SELECTED = np.array([[1.0, 1, 0, 0, 0], [0, 1, 0, 1, 0]])
INSTEAD = {  # where a closed form has a range
    "best_dimension": dict(t=1e6),
    "finite_sample_loss": dict(T=8, d_e=64, eta=1.0),
    "longest_sequence": dict(c=4.5, sigma2=0.0625),
    "stochastic_floor": dict(q=3),
    "stochastic_trajectory": dict(T=8, d_e=64, eta=1.0),
    "widest_margin": dict(E=np.eye(5)),
}


def half_squares(*params):
    return sum(np.sum(x * x) for x in params) / 2, *params


def example(key, kind):
    """A value of the argument `key`, of a kind, that must be let in."""
    if isinstance(kind, dict):
        return list(kind)[-1]
    if kind in ("rng", "function", "flag", "arrays"):
        return {"rng": default_rng(0), "function": half_squares, "flag": False,
                "arrays": (np.array([1.0, 2.0]), 3.0)}[kind]
    if kind.startswith(("size", "count")):
        return LENGTHS[key]
    if kind.startswith("number"):
        return NUMBERS.get(key, 0.5)
    if kind.endswith("of 0/1"):
        return SELECTED.copy()
    shape = [LENGTHS[dim] for dim in letters(kind)]
    return (np.arange(math.prod(shape)) * 3 % 7 - 2.0).reshape(shape)


def letters(kind):
    """The dimensions of the last shape that a kind of array names."""
    return kind.removesuffix(" of 0/1").split(" | ")[-1].split()


def good(name, **others):
    """Arguments that the function must let in, with others in place of some."""
    found = {key: example(key, kind) for key, kind in arguments_of(name).items()}
    return {**found, **INSTEAD.get(name, {}), **others}


def flat(result):
    """The leaves of a result: generators run out, functions called."""
    if inspect.isgenerator(result):
        result = list(result)
    if callable(result):
        result = result(np.array([1.0, 2.0]))
    if isinstance(result, dict):
        result = tuple(result.values())
    if not isinstance(result, (tuple, list)):
        return [result]
    return [leaf for part in result for leaf in flat(part)]


def flat_call(name, **others):
    return flat(PUBLIC[name](**good(name, **others)))


FORMS = {  # what becomes of arrays, sizes and numbers
    "lists": (np.ndarray.tolist, int, float),
    "Fortran": (np.asfortranarray, int, np.array),
    "integers": (lambda array: array.astype(int), np.int64, lambda x: x if x % 1 else int(x)),
    "float32": (lambda array: array.astype(np.float32), np.uint8, np.float32),
    "read-only": (lambda array: np.broadcast_to(array, array.shape), int, np.float64),
    "matrix": (lambda array: array.view(np.matrix) if array.ndim == 2 else array, int, float),
}


def in_form(value, form):
    arrays, sizes, numbers = FORMS[form]
    if isinstance(value, tuple):
        return tuple(in_form(part, form) for part in value)
    convert = {np.ndarray: arrays, int: sizes, float: numbers}.get(type(value))
    return convert(value) if convert else value


@parametrize("form", FORMS)
@EVERY
def test_forms(name, form):
    """Every form of the same numbers gives the same float64, up to the order of sums."""
    got = flat_call(name, **{key: in_form(value, form) for key, value in good(name).items()})
    for left, right in zip(got, flat_call(name)):
        assert np.asarray(left).dtype == (int if type(right) is int else np.float64)
        close(left, right, 50 * EPS)


@EVERY
def test_inputs_stay(name):
    arguments = good(name)
    before = {key: repr(value) for key, value in arguments.items() if key != "rng"}
    flat(PUBLIC[name](**arguments))
    assert before == {key: repr(arguments[key]) for key in before}


# ---- the door: what it refuses ----

NAN = float("nan")
INF = float("inf")
RAGGED = [[1.0], [1.0, 2.0]]
NO_NUMBER = [NAN, INF, "1", "", None, True, 1j, RAGGED, [], [NAN]]
NO_INTEGER = [*NO_NUMBER, False, 2.0, 2.5, 2**63, np.uint64(2**63), 10**400]
REFUSED = {  # by the first word of a kind
    "rng": [None, 0, "0", np.random, np.random.RandomState(0)],
    "function": [None, 3, "f"],
    "flag": [None, 1, 0.0, "no"],
    "arrays": [None, 1.0, [1.0], (), ("x",), (NAN,), (1.0, None), (RAGGED,), (1j,), ([],), (True,)],
    "size": [0, -1, *NO_INTEGER],
    "count": [-1, *NO_INTEGER],
    "number": NO_NUMBER,
}
OUTSIDE = {  # the rest of the kind
    "> 0": [-1.0, 0.0, np.longdouble("1e-4000")],
    ">= 0": [-1.0],
    ">= 1": [0.5],
    "in (0, 1)": [-1.0, 0.0, 1.0, 2],
}


def refused(kind, value):
    """What an argument of this kind must not let in, given a value that it does let in."""
    if isinstance(kind, dict):
        return ["both", None, 3, [value], value.upper()]
    word, _, bound = kind.partition(" ")
    one = word.rstrip("s") if kind != "arrays" else word
    if one not in REFUSED:
        return refused_arrays(kind, value)

    bad = OUTSIDE.get(bound, []) + REFUSED[one]
    if bound == "or None":
        bad.remove(None)
    if one in ("size", "count", "number"):
        bad.append([value, bad[0]] if word.endswith("s") else [value, value])
    return bad


def refused_arrays(kind, value):
    """No reals, no numbers at all, entries that are not finite or too large, too many axes."""
    bad = ["text", None, RAGGED, 1.0, value + 0j, value[:0], value.astype(object)]
    bad += [np.ma.array(value), np.full(value.shape, 2**53 + 1)]
    for hole in (NAN, INF, -INF, np.longdouble("1e4000")):
        place = np.arange(value.size).reshape(value.shape) == 1
        bad.append(np.where(place, hole, value))
    if "..." not in kind:
        bad.append(value[None, None])
    if kind.endswith("of 0/1"):
        unequal = np.arange(value.shape[1]) <= np.arange(len(value))[:, None]
        bad += [0 * value, 2 * value, value / 2, -value, 1e308 * value, 1e308 + 0 * value, unequal]
    return bad


def refusal(name, **bad):
    """The message with which a function refuses its good arguments with bad ones in place."""
    try:
        flat_call(name, **bad)
    except ValueError as error:
        assert type(error) is ValueError and re.fullmatch(".+ must be .+; got .+", str(error), re.S)
        return str(error)
    raise AssertionError(f"{name} lets in {bad}")


def named(word, message):
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message)


ARGUMENTS = [(name, key) for name in PUBLIC for key in arguments_of(name)]


@parametrize("name, key", ARGUMENTS)
def test_bad_values(name, key):
    """Each is refused by a message that names the argument."""
    for bad in refused(arguments_of(name)[key], good(name)[key]):
        assert named(key, refusal(name, **{key: bad})), repr(bad)


@EVERY
def test_shapes_that_disagree(name):
    """An array may not be one longer on an axis whose size another fixes."""
    arrays = {key: letters(kind) for key, kind in arguments_of(name).items()
              if isinstance(good(name)[key], np.ndarray)}
    every = [dim for shape in arrays.values() for dim in shape]
    for key, shape in arrays.items():
        for axis, dim in enumerate(shape):
            value = good(name)[key]
            longer = np.concatenate([value, value.take([0], axis)], axis)
            assert every.count(dim) == 1 or named(key, refusal(name, **{key: longer})), (key, axis)


NO_T = "online_excess", "overlap_variance"


@parametrize("name", [n for n, key in ARGUMENTS if key == "q" and n not in NO_T])
def test_largest_q(name):
    """At most T, or below it; T as given or as the arrays have it."""
    T = good(name).get("T", 5)
    message = refusal(name, q=T + 1)
    assert named("q", message) and named("T", message)
    if name in BELOW_T:
        assert named("q", refusal(name, q=T))
    else:
        assert np.isfinite(np.concatenate([np.ravel(x) for x in flat_call(name, q=T)])).all()


ROOMS = (
    "best_fcn", "init_fcn", "one_hot_encoding", "overlaps", "random_sign_encoding",
    "sample_batch")


@parametrize("name", ROOMS)
def test_room(name):
    """No size may ask for an array that cannot be allocated."""
    for key in {"B", "T", "d", "d_e", "m"} & set(arguments_of(name)):
        assert named(key, refusal(name, **{key: 2**40}))


BAD = [  # (name, what is refused, a word of the message)
    ("all_subsets", dict(T=448), "T"),
    ("all_subsets", dict(T=2**40, q=2**40), "q"),
    ("best_dimension", dict(t=1000.0), "t"),
    ("best_fcn", dict(m=11), "m"),
    ("dual_query", dict(E=np.ones((2**15, 16)), selected=np.ones((2**12, 16))), "d_e"),
    ("fcn_first_layer_floor", dict(W1=np.ones((3, 9))), "W1"),
    ("finite_sample_loss", dict(n=1), "n"),
    ("finite_sample_loss", dict(n=3), "n"),
    ("length_loss", dict(c=[0.5, 0.7]), "c"),
    ("longest_sequence", dict(c=2.0), "c"),
    ("one_hot_loss_and_grads", dict(T=[5, 1]), "q"),
    ("one_hot_loss_and_grads", dict(T=np.array([2**63], dtype=np.uint64)), "T"),
    ("one_hot_loss_and_grads", dict(alpha=np.ones((2**20, 1)), omega=np.ones(2**20)), "omega"),
    ("one_hot_recursion", dict(T=[4, 5], q=[1, 2, 3]), "T"),
    ("overlap_variance", dict(q=4, query="dual"), "q"),
    ("softmax", dict(scores=[-2**53 - 1, 0]), "scores"),
    ("softmax", dict(scores=[2**70, 0]), "scores"),
    ("softmax", dict(scores=[[[0.0, -INF]]]), "scores"),
    ("widest_margin", dict(E=np.eye(40, 400), q=1), "small"),
]


@parametrize("name, bad, word", BAD)
def test_bad_case(name, bad, word):
    assert named(word, refusal(name, **bad))


@parametrize("name, bad, message", [
    ("all_subsets", dict(T=4, q=9), "q must be at most T, T = 4; got 9"),
    ("escape_time", dict(T=4), "q must be below T/2, T = 4; got 2"),
    ("fcn", dict(b1=np.ones(4)), "b1 must be of shape (m,) with m = 3 as in W1; got (4,)"),
    ("sum_query", dict(E=np.ones(5)), "E must be of shape (d_e, T) or (B, d_e, T); got (5,)"),
    ("escape_time", dict(d=2.5), "d must be an integer >= 1, below 2^63; got 2.5"),
    ("escape_time", dict(eta=0), "eta must be one finite number > 0; got 0"),
    ("one_hot_loss_and_grads", dict(alpha=[1, 2], omega=[1, 2, 3]),
     "alpha, omega must be of shapes that broadcast, to at most 2^30 numbers; "
     "got {'alpha': (2,), 'omega': (3,)}"),
    ("one_hot_encoding", dict(T=2**16),
     "T must be so small that arrays have at most 2^30 numbers; got {'T': 65536}"),
])
def test_message(name, bad, message):
    """What is wrong, what is wanted, what was given."""
    assert refusal(name, **bad) == message


def test_long_values_are_cut():
    assert len(refusal("softmax", scores=["a"] * 1000)) < 200


# ---- results beyond float64, error states, threads ----

@parametrize("name, sizes", [
    ("transformer", dict(V=1e200, Z=1e200)),
    ("fcn", dict(W1=-1e200, inputs=1e200)),
    ("fcn_loss_and_grads", dict(W1=-1e200, inputs=1e200)),
    ("sts", dict(X=1.7e308)),
    ("dual_query", dict(E=1e-310)),
    ("population_loss_and_grads", dict(V=1e200)),
    ("one_hot_loss_and_grads", dict(alpha=1e200)),
    ("attention_lines", dict(target=1e200)),
    ("one_hot_loss_at", dict(t=1e300, eta=1e300)),
    ("escape_time", dict(eta=5e-324)),
    ("best_fcn", dict(K=1e308)),
])
def test_overflow(name, sizes):
    """Finite arguments, all entries of these sizes, with a result beyond float64: no warning."""
    huge = {key: size + 0 * good(name)[key] for key, size in sizes.items()}
    with pytest.raises(OverflowError, match=f"^{name}: .*float64"):
        flat_call(name, **huge)


@parametrize("place", range(3))
def test_overflow_of_one_result(place):
    """Every one is looked at."""
    @ag.checked(x="number")
    def three(x):
        results = [x, np.full(2, x), np.full((2, 2), x)]
        results[place] = results[place] * 1e200
        return tuple(results)

    with pytest.raises(OverflowError):
        three(1e200)


@parametrize("mode", ["raise", "warn", "print"])
def test_error_state(mode):
    """Where exponentials underflow and differences overflow, no call raises or warns under
    np.seterr, or changes it, a refused one neither."""
    with np.errstate(all=mode):
        assert ag.softmax([0.0, -1000.0]).tolist() == [1.0, 0.0]
        ag.one_hot_loss_and_grads(1.0, 800.0, 4, 2, 3)
        lib.overlap_loss(900.0, [[1.0, 0.0, 0.0]], 1, 2)
        lib.stochastic_trajectory(1e3, 9, 2, 3, 10**6, 1.0)
        refusal("softmax", scores="text")
        with pytest.raises(OverflowError):
            flat_call("one_hot_loss_and_grads", alpha=1e200)
        assert set(np.geterr().values()) == {mode}


@ag.checked(x="number")
def identity(x):
    return x


def test_inner_calls_are_not_checked_again():
    @ag.checked(x="number")
    def outer(x):
        return identity("text")

    assert outer(1.0) == "text"


def test_each_thread_has_its_own_door():
    """While one thread is inside a checked call, another's arguments are checked."""
    @ag.checked(x="number")
    def outer(x):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(identity, "text").exception()

    assert type(outer(1.0)) is ValueError


def test_door_after_an_error():
    """An error inside a call leaves the door shut."""
    @ag.checked(x="number")
    def fails(x):
        raise KeyError(x)

    with pytest.raises(KeyError):
        fails(1.0)
    refusal("softmax", scores="text")


# ---- copies of one function ----

def source(name):
    """The lines of a definition, if it is one of the library, without decorator and comments."""
    library = inspect.getsource(ag) + inspect.getsource(lib)
    found = re.search(rf"^(def {name}\(|{name} = ).*\n((?:[ )}}].*)?\n)*", library, re.M)
    code = re.sub(r'^    """.*?"""\n', "", found[0] if found else "", count=1, flags=re.M | re.S)
    return [line for line in code.splitlines() if re.match(" *[^ #]", line)]


def globals_of(code):
    """The global names that code uses, its inner functions too."""
    inner = [globals_of(part) for part in code.co_consts if inspect.iscode(part)]
    return set(code.co_names).union(*inner)


def copied(name, taken=()):
    """`name` after the definitions of the library that it names, to the last: what to copy."""
    words = globals_of(compile("\n".join(source(name)), name, "exec"))
    for word in sorted(words - {name}):
        if word not in taken and source(word):
            taken = copied(word, taken)
    return [*taken, name]


def same_bits(got, want):
    assert [np.asarray(x).dtype for x in got] == [np.asarray(x).dtype for x in want]
    assert len(got) == len(want) and all(map(np.array_equal, got, want))


@EVERY
def test_copies(name):
    """`__wrapped__` gives the same bits, and so does the source without its decorator, beside
    what it names."""
    want = flat_call(name)
    same_bits(flat(PUBLIC[name].__wrapped__(**good(name))), want)

    imports = re.findall(r"^import .*", inspect.getsource(ag) + inspect.getsource(lib), re.M)
    lines = [line for word in copied(name) for line in source(word)]
    alone = {}
    exec("\n".join(imports + lines), alone)
    same_bits(flat(alone[name](**good(name))), want)


# ---- the trace: the code's lines and the reader's own ----

ANEW = {}
ANEW["attention"] = """
import numpy as np

def attention_lines(V, W, Z, z_query, target):
    lines = {"s": [], "a": [], "f": [], "r": [], "g": [], "a_g": [], "grad_s": []}
    loss, grad_V, grad_W = 0.0, 0 * V, 0 * W
    for Z_b, z, y in zip(Z, z_query, target):
        s = Z_b.T @ (W @ z)
        a = np.exp(s) / np.exp(s).sum()
        f = V @ (Z_b @ a)
        r = f - y
        g = Z_b.T @ (V.T @ r)
        a_g = a @ g
        grad_s = a * (g - a_g)
        loss = loss + r @ r / 2
        grad_V = grad_V + np.outer(r, Z_b @ a)
        grad_W = grad_W + np.outer(Z_b @ grad_s, z)
        for name in lines:
            lines[name].append(vars()[name])
    return dict(lines, loss=loss, grad_V=grad_V, grad_W=grad_W)

def attention_loss_and_grads(V, W, Z, z_query, target):
    lines = attention_lines(V, W, Z, z_query, target)
    return [lines[name] / len(Z) for name in ("loss", "grad_V", "grad_W")]
"""
ANEW["fcn"] = """
import numpy as np

def fcn_lines(W1, b1, A, b2, inputs, target):
    lines = {"pre": [], "hidden": [], "f": [], "r": [], "delta": []}
    loss, grad_W1, grad_b1, grad_A, grad_b2 = 0.0, 0 * W1, 0 * b1, 0 * A, 0 * b2
    for x, y in zip(inputs, target):
        pre = W1 @ x + b1
        hidden = np.maximum(pre, 0)
        f = A @ hidden + b2
        r = f - y
        delta = (A.T @ r) * (pre > 0)
        loss = loss + r @ r / 2
        grad_A = grad_A + np.outer(r, hidden)
        grad_b2 = grad_b2 + r
        grad_W1 = grad_W1 + np.outer(delta, x)
        grad_b1 = grad_b1 + delta
        for name in lines:
            lines[name].append(vars()[name])
    return dict(lines, loss=loss, grad_W1=grad_W1, grad_b1=grad_b1, grad_A=grad_A, grad_b2=grad_b2)

def fcn_loss_and_grads(W1, b1, A, b2, inputs, target):
    lines = fcn_lines(W1, b1, A, b2, inputs, target)
    names = "loss", "grad_W1", "grad_b1", "grad_A", "grad_b2"
    return tuple(lines[name] / len(inputs) for name in names)
"""
POPULATION_ANEW = """
import numpy as np

def softmax(s):
    return np.exp(s) / np.exp(s).sum(axis=1, keepdims=True)

def population_loss_and_grads(V, W, E, e_query, selected):
    (B, T), d, q = selected.shape, len(V), selected[0].sum()
    E = np.broadcast_to(E, (B, len(W), T))
    a = softmax(np.einsum("bit,ij,bj->bt", E, W, e_query))
    p, N = (a * selected).sum() / B, (a * a).sum() / B
    loss = ((V * V).sum() * N - 2 * np.trace(V) * p / q + d / q) / 2
    g = (V * V).sum() * a - np.trace(V) / q * selected
    grad_s = a * (g - (a * g).sum(axis=1, keepdims=True))
    grad_W = np.einsum("bit,bt,bj->ij", E, grad_s, e_query) / B
    return loss, V * N - p / q * np.eye(d), grad_W
"""
ANEW["one-hot"] = POPULATION_ANEW + """
def one_hot_loss_and_grads(alpha, omega, T, q, d):
    p = q * np.exp(omega) / (q * np.exp(omega) + T - q)
    off = (1 - p) / (T - q)
    loss = d * ((1 - alpha * p)**2 / q + alpha**2 * (1 - p) * off) / 2
    Delta = d * alpha * ((1 - alpha * p) / q + alpha * off)
    return loss, alpha * (p * p / q + (1 - p) * off) - p / q, -p * (1 - p) * Delta / (T - 1)
"""
ANEW["stochastic"] = POPULATION_ANEW + """
def stochastic_loss_and_grads(alpha, c, overlaps, q, d, d_e):
    B, T = overlaps.shape
    a, s_y = softmax(c * overlaps), 1.0 * (np.arange(T) < q)
    loss = d * ((alpha * a - s_y / q)**2).sum() / (2 * B)
    g = d * alpha * (alpha * a - s_y / q)
    grad_s = a * (g - (a * g).sum(axis=1)[:, None])
    return loss, (alpha * a * a - a * s_y / q).sum() / B, (overlaps * grad_s).sum() / (B * d_e)
"""
WRONG_POPULATION = {  # a line of the right file, and what a reader may write instead
    "W, e_query))": ["W.T, e_query))", "W, e_query[::-1]))"],
    "* N - 2": ["* N + 2", "* N - 1"],
    "+ d / q) / 2": ["+ T / q) / 2", "+ len(W) / q) / 2"],
    "V * N": ["V.T * N"],
    "p / q * np.eye": ["p / d * np.eye", "p / T * np.eye"],
    "- np.trace(V) / q *": ["- np.trace(V) / d *"],
    "(g - (a * g).sum(axis=1, keepdims=True))": ["g"],
    "grad_s, e_query) / B": ["grad_s, e_query) / T", "grad_s[::-1], e_query) / B"],
    "bj->ij": ["bj->ji"],
}
WRONG = {
    "attention": {
        "s = Z_b.T @ (W @ z)": ["s = Z_b.T @ (W.T @ z)"],
        "np.exp(s) / np.exp(s).sum()": ["1 / len(s) + 0 * s"],
        "r @ r / 2": ["r @ r"],
        "np.outer(r, Z_b @ a)": ["np.outer(f, Z_b @ a)"],
        "Z_b.T @ (V.T @ r)": ["Z_b.T @ (V.T @ f)"],
        "a * (g - a_g)": ["a * g"],
        "np.outer(Z_b @ grad_s, z)": ["np.outer(z, Z_b @ grad_s)", "np.outer(Z_b @ g, z)"],
        "z_query, target):\n        s": ["z_query[::-1], target):\n        s"],
        "target):\n        s": ["target[::-1]):\n        s"],
        "V @ (Z_b": ["V @ (Z.mean(axis=0)"],
        "/ len(Z)": ["/ Z.shape[1]", "/ Z.shape[2]", "/ 1"],
    },
    "fcn": {
        "W1 @ x + b1": ["W1 @ x"],
        "np.maximum(pre, 0)": ["abs(pre)"],
        "A @ hidden + b2": ["A @ hidden"],
        "(A.T @ r) * (pre > 0)": ["A.T @ r", "(A.T @ r) * pre"],
        "r @ r / 2": ["r @ r"],
        "np.outer(r, hidden)": ["np.outer(r, pre)"],
        "zip(inputs, target)": ["zip(inputs, target[::-1])"],
        "/ len(inputs)": ["/ len(W1)", "/ len(A)"],
    },
    "one-hot": WRONG_POPULATION | {
        "loss = d *": ["loss = q *", "loss = T *"],
        "(T - q)\n    loss": ["(T - 1)\n    loss", "(T - d)\n    loss"],
        "q * np.exp(omega) / (": ["d * np.exp(omega) / ("],
        "Delta = d": ["Delta = q"],
        "Delta / (T - 1)": ["Delta / T", "Delta / (T - q)"],
    },
    "stochastic": {
        "+ d / q) / 2": ["+ T / q) / 2", "+ len(W) / q) / 2"],
        "bj->ij": ["bj->ji"],
        "loss = d *": ["loss = d_e *", "loss = q *", "loss = T *"],
        "g = d *": ["g = d_e *", "g = q *", "g = T *"],
        "(B * d_e)": ["(B * d)", "(B * q)", "(B * T)"],
        "< q)": ["< d_e)", "< d)"],
        "(2 * B)": ["B"],
        "(g - (a * g).sum(axis=1)[:, None])": ["g"],
    },
}


@pytest.fixture
def mine(tmp_path, capsys):
    """Runs the trace of a model with a text as the reader's file."""
    def run(model, text, options="1"):
        file = tmp_path / "homework.py"
        file.write_text(text)
        return trace(capsys, f"{options} --model {model} --mine {file}")
    return run


FUNCTIONS = [(model, name) for model in run_all.TRACES for name in run_all.TRACES[model][2]]


@parametrize("model, function", FUNCTIONS)
def test_trace_sees_each_line_of_the_code(model, function, monkeypatch, capsys):
    right = getattr(run_all, function)

    @functools.wraps(right)
    def mutant(*arguments):
        result = right(*arguments)
        if isinstance(result, dict):
            return result | {turned: -result[turned]}
        return tuple(-value if k == turned else value for k, value in enumerate(result))

    monkeypatch.setattr(run_all, function, mutant)
    lines = run_all.ATTENTION if model == "attention" else run_all.NETWORK
    for turned in lines if function.endswith("_lines") else range(3):
        status, output, _ = trace(capsys, f"1 --model {model}")
        assert status == 1 and marked(output), turned


def test_trace_needs_every_token(monkeypatch, capsys):
    signs = run_all.all_signs
    monkeypatch.setattr(run_all, "all_signs", lambda d, T: signs(d, T)[1:])
    status, output, _ = trace(capsys, "1")
    assert status == 1 and {line[:4] for line in marked(output)} == {"(A9)"}


@parametrize("model", run_all.TRACES)
def test_trace_that_diverges(model, capsys):
    status, _, errors = trace(capsys, f"900 --model {model} --T 3 --eta 1e9")
    assert status == 1 and len(errors) == 1 and "diverged" in errors[0]


@parametrize("name", ["grad_W", "a", "loss", "Z", "V"])
def test_trace_in_full(name, mine):
    """Every entry of each line and input stands there as NumPy prints it."""
    text, _, _ = ANEW["attention"].partition("def attention_loss_and_grads")
    name = "lines['a']" if name == "a" else name
    show = f"    print('<', np.array({name}), '>', sep='\\n')\n"
    text = text.replace("    return", f"{show}    return")
    for options, copies in ("1", 1), ("1 --full", 2):
        status, output, _ = mine("attention", text, options)
        whole = "\n".join(output)
        entries = whole.partition("<")[2].partition(">")[0]
        assert status == 0 and whole.count(entries) == copies
        assert max(map(len, output)) <= 88


@parametrize("model", run_all.TRACES)
def test_mine(model, mine):
    status, output, errors = mine(model, ANEW[model], "2")
    assert (status, errors, marked(output)) == (0, [], [])
    assert not re.search("not given|  code ", "\n".join(output)) and "yours" in "\n".join(output)


@parametrize("model, old, new", [
    (model, old, new) for model in WRONG for old in WRONG[model] for new in WRONG[model][old]])
def test_mine_wrong(model, old, new, mine):
    """One default step sees a sign, a factor, a transpose, a letter, another sample."""
    assert ANEW[model].count(old) == 1
    status, output, errors = mine(model, ANEW[model].replace(old, new))
    assert status == 1 and marked(output) and errors == []
    assert max(map(len, output)) <= 88


def test_mine_to_the_last_digits(mine):
    text = ANEW["attention"].replace("a * (g - a_g)", "a * (g - a_g) * (1 + 1e-10)")
    assert mine("attention", text)[0] == 1


def test_mine_one_function(mine):
    """What the file does not define is not shown; lines that it lacks are listed."""
    text = "def attention_lines(V, W, Z, z_query, target):\n    return {'s': "
    text += "(Z * (W @ z_query.T).T[:, :, None]).sum(axis=1)}"
    status, output, _ = mine("attention", text)
    assert status == 0 and output[-1].startswith("1 lines compared")
    assert sum(line.endswith(": not given") for line in output) == 9
    assert mine("attention", "def attention_lines(*given):\n    return {}")[0] == 1


def test_mine_leaves_descent_alone(mine):
    """Wrong means, and inputs overwritten: the lines of each sample stay right."""
    right = ANEW["attention"]
    wrong = right.replace("lines[name] / len(Z)", "lines[name]")
    assert len(marked(mine("attention", wrong, "3")[1])) == 9
    overwrites = right.replace("    return dict(lines", "    V *= 0\n    return dict(lines")
    assert mine("attention", overwrites, "3")[0] == 0


@parametrize("value", ["None", "'text'", "lines['g'][:1]", "[[1], [1, 2]]", "np.nan * Z[:, 0]",
                       "1j * Z[:, 0]", "{}"])
def test_mine_no_numbers(value, mine):
    text = ANEW["attention"].replace("dict(lines,", f"dict(lines | dict(g={value}),")
    status, output, errors = mine("attention", text)
    assert status == 1 and errors == [] and len(marked(output)) == 1
    assert marked(output)[0].startswith("attention_lines, g: ")


@parametrize("body", [
    "return 1 / 0",
    "return 1, 2",
    "return V.T @ W",
    "raise SystemExit",
    "raise ValueError('line\\n' * 99)",
    "return attention_loss_and_grads(V, W, Z, z_query, target)",
])
def test_mine_that_fails(body, mine):
    text = f"def attention_loss_and_grads(V, W, Z, z_query, target):\n    {body}"
    status, output, errors = mine("attention", text)
    assert status == 1 and errors == [] and len(marked(output)) == 1
    assert marked(output)[0].startswith("attention_loss_and_grads: ")
    assert max(map(len, output)) <= 88


@parametrize("text", [
    "def", "raise SystemExit(0)", "undefined", "import absent", "1 / 0"])
def test_mine_that_does_not_run(text, mine):
    status, output, errors = mine("fcn", text)
    assert (status, errors, len(output)) == (1, [], 1)
    assert output[0].startswith("homework.py: ")


def test_mine_without_a_function(mine, capsys):
    for status, output, errors in (
            mine("fcn", ANEW["attention"]), trace(capsys, "1 --mine absent.py")):
        assert (status, output, len(errors)) == (2, [], 1) and "--mine" in errors[0]


# ---- the command line ----

@parametrize("claim, values, wanted, verdict", [
    (run_all.equals, [1, 0.97, 1.02], (1, 0.02), "0.97 FAIL"),
    (run_all.equals, [1, 1.04], ([1, 1.02], [0.01, 0.03]), "1.04 ok"),
    (run_all.agrees, [2, 6], ([2, 4], 0.4), "1.5 FAIL"),
    (run_all.at_most, [2, 3], (3,), "3 ok"),
    (run_all.at_most, [2, 3], (2.9,), "3 FAIL"),
    (run_all.at_least, [2, 3], (2,), "2 ok"),
    (run_all.at_least, [2, 3], ([1, 3.5],), "3 FAIL"),
    (run_all.at_most, [], (9,), "nan FAIL"),
])
def test_claim_tells_its_worst_value(claim, values, wanted, verdict):
    row = claim("X", "Text.", values, *wanted)
    assert f"{row['measured']} {row['verdict']}" == verdict
    assert row["predicted"].startswith(("equals ", "at "))


@parametrize("bad", [math.nan, math.inf, -math.inf])
@parametrize("claim, wanted", [
    (run_all.equals, (1, 9)), (run_all.at_most, (9,)), (run_all.at_least, (-9,))])
def test_claim_fails_where_not_finite(claim, wanted, bad):
    first, *rest = wanted
    for values, one in ([1.0, bad, 1.0], first), ([1.0, 1.0], [bad, first]):
        assert claim("X", "Text.", values, one, *rest)["verdict"] == "FAIL"


def start(*arguments, env=None, **options):
    """A process that heeds Ctrl-C, whatever the shell told its background jobs."""
    def heed():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
    settings = {
        "cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": heed,
        "start_new_session": True, "env": {**os.environ, **(env or {})}, **options}
    return subprocess.Popen([sys.executable, *map(str, arguments)], text=True, **settings)


def python(*arguments, **options):
    """Status, output, errors."""
    process = start(*arguments, **options)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


RUN = ROOT / "run_all.py"
QUICK = "--quick", "--only", "learning", "--out"


def whole(folder):
    """claims.csv and the one figure of a folder, both whole, and nothing else there."""
    assert sorted(os.listdir(folder)) == ["3_learning.png", "claims.csv"]
    picture = (folder / "3_learning.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and picture[-8:-4] == b"IEND"
    return (folder / "claims.csv").read_text(), picture


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """What the quickest experiment writes."""
    folder = tmp_path_factory.mktemp("usual")
    assert run_all.main([*QUICK, str(folder)]) == 0
    return whole(folder)


def test_same_digits_on_one_core(usual, tmp_path):
    one = min(os.sched_getaffinity(0))
    status, *_ = python(RUN, *QUICK, tmp_path, preexec_fn=lambda: os.sched_setaffinity(0, {one}))
    assert status == 0 and whole(tmp_path) == usual


def test_run_in_a_hostile_place(usual, tmp_path):
    """Through a link, a space in the path, ASCII, a matplotlibrc, no home, no display."""
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: red")
    (tmp_path / "link.py").symlink_to(RUN)
    hostile = {"MPLBACKEND": "nonsense", "HOME": str(RUN / "home"), "LC_ALL": "C",
               "PYTHONUTF8": "0", "DISPLAY": "", "MPLCONFIGDIR": ""}
    out = tmp_path / "a space" / "déeper"
    status, output, errors = python(
        tmp_path / "link.py", *QUICK, out, cwd=tmp_path, env=hostile)
    assert (status, errors) == (0, "") and "claims hold" in output and "\r" not in output
    assert whole(out) == usual


def test_default_folder_is_beside_the_file(tmp_path):
    (tmp_path / "link.py").symlink_to(RUN)
    home = "import link; print(link.SCRIPT.parent)"
    assert python("-c", home, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})[1] == f"{ROOT}\n"


@parametrize("columns", [80, 0])
def test_table_on_a_terminal(columns, tmp_path, monkeypatch, capsys):
    """Rows are cut to its width; some terminals say 0."""
    size = os.terminal_size((columns, 24))
    monkeypatch.setattr(run_all.shutil, "get_terminal_size", lambda: size)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    claim = run_all.equals("X", 99 * "Text. ", 1, 1, 0) | {"seed": 0}
    assert run_all.report([claim], None, tmp_path, tmp_path) == 0
    _, row, _ = capsys.readouterr().out.splitlines()
    assert len(row) == 79 and " ok " in row


def test_seed_is_used_and_told(usual, tmp_path):
    """In the last column; and no cell is a formula of a spreadsheet."""
    assert run_all.main([*QUICK, str(tmp_path), "--seed", "5"]) == 0
    other, _ = whole(tmp_path)
    table, _ = usual
    assert re.findall(r",(\w+)$", table, re.M) == ["seed", "0", "0"]
    assert re.findall(r",(\w+)$", other, re.M) == ["seed", "5", "5"]
    assert other.replace(",5\n", ",0\n") != table
    assert not re.search(r"^[=+@\t]|,[=+@\t]", table, re.M)


def altered(folder, old, new):
    """run_all.py beside its library in a folder, with one change."""
    for name in ("analytic_grads.py", "sparse_token_selection.py", "run_all.py"):
        source = (ROOT / name).read_text(encoding="utf-8")
        (folder / name).write_text(source.replace(old, new), encoding="utf-8")
    return folder / "run_all.py"


def test_a_claim_that_fails(tmp_path):
    status, output, _ = python(
        altered(tmp_path, "0.998, source", "1.998, source"), *QUICK, tmp_path)
    assert status == 1 and "A-truth        FAIL" in output


@parametrize("old, new, message", [
    ("claims=claims_blocks, ", "claims=claims_blocks, nonsense=1, ", "TypeError: .*nonsense.*"),
    ("    V_truth, W_truth = in_full", "    os.kill(os.getpid(), 9)\n    V_truth = in_full",
     "killed by signal 9; perhaps memory ran out"),
])
def test_a_child_that_fails(old, new, message, tmp_path):
    """One line that names the experiment, status 1, the table so far; no other file is changed."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "claims.csv").write_text("old")
    status, output, errors = python(altered(tmp_path, old, new), *QUICK, out)
    assert status == 1 and re.fullmatch(f"run_all.py: learning: {message}\n", errors), errors
    assert "id  " in output and os.listdir(out) == ["claims.csv"]
    assert (out / "claims.csv").read_text() == "old"


def test_main_changes_nothing(tmp_path):
    """As in a notebook: neither the environment nor a handler nor Matplotlib."""
    def state():
        handlers = [signal.getsignal(number) for number in run_all.STOPPING]
        return dict(os.environ), handlers, np.geterr(), "matplotlib" in sys.modules
    before = state()
    assert run_all.main([*QUICK, str(tmp_path)]) == 0
    assert state() == before


@parametrize("module", ["analytic_grads", "sparse_token_selection", "run_all"])
def test_import_is_quiet(module):
    """No output, no change of the process, no Matplotlib, .3 s of processor time at most."""
    script = f"""
import os, signal, sys, time, warnings, numpy as np
def state():
    return repr((np.random.get_state(), np.get_printoptions(), warnings.filters, np.geterr(),
                 os.environ, signal.getsignal(signal.SIGINT)))
before, start = state(), time.process_time()
import {module}
print([time.process_time() - start < 0.3, before == state(), "matplotlib" in sys.modules])"""
    assert python("-W", "error", "-c", script) == (0, "[True, True, False]\n", "")


@parametrize("number, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@parametrize("wait, times", [(0.0, 1), (0.7, 99)])
def test_stopped(number, status, wait, times, tmp_path):
    """Soon one line and its status, children ended, no hidden folder, old files whole."""
    (tmp_path / "claims.csv").write_text("old")
    process = start(RUN, "--quick", "--out", tmp_path)
    assert "running" in process.stdout.readline()
    time.sleep(wait)
    for _ in range(times):
        os.killpg(process.pid, getattr(signal, number))
        time.sleep(0.002)
    _, errors = process.communicate(timeout=5)
    assert (process.returncode, errors) == (status, "run_all.py: interrupted\n")
    assert (tmp_path / "claims.csv").read_text() == "old" and not [*tmp_path.glob(".*")]
    time.sleep(1)  # a child that was just starting
    assert str(tmp_path) not in subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_a_reader_that_has_gone(tmp_path):
    ours, theirs = os.pipe()
    os.close(ours)
    assert python(RUN, "--trace", "1", stdout=theirs) == (1, None, "")
    os.close(theirs)
    process = start(RUN, *QUICK, tmp_path)
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert (process.stderr.read(), process.wait(timeout=60)) == ("", 1)


def test_a_full_disk():
    with open("/dev/full", "w") as full:
        status, _, errors = python(RUN, "--trace", "9", stdout=full)
    assert status == 1 and re.fullmatch("run_all.py: .*No space left.*\n", errors), errors


def test_output_that_is_closed():
    status, _, errors = python(RUN, "--trace", "1", preexec_fn=lambda: os.close(1), stdout=None)
    assert (status, errors) == (0, "")


def test_from_standard_input():
    with open(RUN) as source:
        status, _, errors = python("-", stdin=source)
    assert status == 1 and errors == (
        "run_all.py: it starts itself again for each experiment: run it as a file\n")


@parametrize("options, word", [
    ("--only nothing", "--only"), ("--only learning,", "--only"), ("--seed -1", "--seed"),
    ("--trace 0", "--trace"), (f"--trace {10**30}", "--trace"),
    ("--nonsense", "--nonsense"), ("--qui", "--qui"), ("learning", "learning"), ("--T 5", "--T"),
    ("--full", "--full"), ("--mine x.py", "--mine"), ("--trace 1 --start one", "--start"),
    ("--trace 1 --T 0", "--T"), ("--trace 1 --q 9", "--q"),
    ("--trace 1 --d 51", "--d"), ("--trace 1 --eta 0", "--eta"), ("--trace 1 --eta nan", "--eta"),
    ("--trace 1 --eta inf", "--eta"), ("--trace 1 --m 5", "--m"),
    ("--trace 1 --model stochastic --T 20", "2^60"),
    ("--out run_all.py", "--out"), ("--out run_all.py/below", "--out")])
def test_bad_options(options, word, capsys, monkeypatch):
    """Exit status 2 and one line that names the option."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        run_all.main(options.split())
    errors = capsys.readouterr().err
    assert end.value.code == 2 and errors.count("\n") == 1
    assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", errors), errors


# ---- the files ----

@parametrize("name", [
    "analytic_grads.py", "sparse_token_selection.py", "run_all.py", Path(__file__).name])
def test_style(name):
    """At most 100 columns, 60 lines a function, 30 names and 12 branches in it."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 100
    branches = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension)
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef):
            nodes = list(ast.walk(function))
            bound = {node.id for node in nodes
                     if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
            ways = 1 + sum(isinstance(node, branches) for node in nodes)
            ways += sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
            lines = function.end_lineno - function.lineno + 1
            assert lines <= 60 and len(bound) <= 30 and ways <= 12, function.name


def test_gradient_comes_first():
    """(A1)-(A8) stand on the first screen, one a line."""
    first = (ROOT / "analytic_grads.py").read_text().splitlines()[:45]
    assert re.findall(r"# \((A\d)\)", "\n".join(first)) == [f"A{k}" for k in range(1, 9)]


# ---- docstrings and the README ----

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
CODE = [block for language, block in BLOCKS if language != "math"]
MAP = re.findall(r"^\|([^|\n]*)\|([^|\n]*<br>[^|\n]*)\|([^|\n]*)\|([^|\n]*)\|$", README, re.M)
COPIES = re.findall(r"^\|[^|\n]*\| `(\w+)` \|([^|\n]*)\| (\d+) \|$", README, re.M)
EXERCISES = re.findall(
    r"<summary><b>\d+\. .*?^```python\n(.*?)^```.*?<summary>Answer(.*?)</details>",
    README, re.M | re.S)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]\d+)?(?!\w|\.\d)")
FILES = {file.__name__: inspect.getsource(file) for file in (ag, lib, run_all)}
FILES["tests"] = Path(__file__).read_text(encoding="utf-8")


def printed(snippet):
    """What a snippet prints, run alone."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(snippet, {})
    return out.getvalue()


def in_backticks(cells):
    return set(re.findall(r"`([^`]+)`", " ".join(cells)))


def tags(text):
    """The tags named in a text, with those in lists and between the ends of ranges."""
    one = r"(?:[APOCSLFGN]\d+|H)"
    joint = r"(?:,\s*|\s+and\s+|-)"
    last = rf"(?:\s*(?:-|–|to)\s*\(({one})\))?"
    found = set()
    for inside, end in re.findall(rf"\(({one}(?:{joint}{one})*)\){last}", text):
        names = f"{inside}-{end}" if end else inside
        found.update(re.findall(one, names))
        for letter, low, high in re.findall(r"([A-Z])(\d+)-[A-Z](\d+)", names):
            between = range(int(low), int(high))
            found.update(f"{letter}{k}" for k in between)
    return found


def derived_tags():
    """The tags of displays and of statements in bold."""
    displays = re.findall(r"\\tag\{([A-Z]\d*)\}", README)
    statements = re.findall(r"\*\*(\([^*]*\))\*\*", README)
    return set(displays) | tags(" ".join(statements))


def test_docstring_examples():
    failed, tried = doctest.testmod(lib)
    assert failed == 0
    assert tried >= 30


def test_docstring_examples_of_the_gradients_alone(tmp_path):
    """analytic_grads.py where nothing is beside it."""
    (tmp_path / "analytic_grads.py").write_text(FILES["analytic_grads"], encoding="utf-8")
    script = "import analytic_grads, doctest; print(*doctest.testmod(analytic_grads))"
    done = python("-c", script, cwd=tmp_path, env={"PYTHONPATH": ""})
    assert re.fullmatch(r"0 \d\d\n", done[1]), done


@parametrize("number", range(1, len(EXERCISES) + 1))
def test_answer(number):
    """An answer has every number that the snippet of its exercise prints."""
    snippet, answer = EXERCISES[number - 1]
    left = NUMBER.findall(answer)
    for line in printed(snippet).splitlines():
        for value in sorted(set(NUMBER.findall(line))):
            assert value in left
            left.remove(value)


def test_exercises_are_all_seen():
    numbers = re.findall(r"<summary><b>(\d+)\. ", README)
    assert numbers == [str(k) for k in range(1, len(EXERCISES) + 1)]
    assert len(EXERCISES) >= 8


def test_other_snippets_run():
    exercises = [snippet for snippet, _ in EXERCISES]
    others = [block for language, block in BLOCKS if language == "python"]
    others = [snippet for snippet in others if snippet not in exercises]
    assert len(others) == 2
    for snippet in others:
        printed(snippet)


def test_displays_have_tags():
    untagged = [block for language, block in BLOCKS if language == "math" and "\\tag{" not in block]
    assert untagged == []


@parametrize("name", [*FILES, "README"])
def test_used_tags_are_derived(name):
    text = FILES.get(name, README)
    assert sorted(tags(text) - derived_tags()) == []


def test_derived_tags_are_used():
    used = tags("\n".join(FILES.values()))
    assert sorted(derived_tags() - used) == []


def test_inline_math_survives_markdown():
    """A host may read a backslash before punctuation as an escape, and * and _ as emphasis."""
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", README, flags=re.M | re.S)
    formulas = re.findall(r"\$([^$\n]+)\$", prose)
    assert len(formulas) > 100
    assert [math for math in formulas if re.search(r"\\[^a-zA-Z]|\W_|[*<>|]", math)] == []


def test_figures_exist():
    named = set(re.findall(r"figures/[\w.-]+\.\w+", README))
    drawn = {f"figures/{path.name}" for path in (ROOT / "figures").glob("*.*")}
    assert named == drawn


def test_claims_are_mapped():
    """The map names every claim of the default run, and no other."""
    table = (ROOT / "figures" / "claims.csv").read_text(encoding="utf-8")
    claims = {row["id"] for row in csv.DictReader(table.splitlines())}
    assert in_backticks(row[3] for row in MAP) == claims


def test_map_names_what_exists():
    names = in_backticks(row[1] for row in MAP)
    assert len(names) >= 40
    assert names <= {*PUBLIC, *globals()}


def test_links_lead_to_headings():
    headings = re.findall(r"^#+ (.*)$", README, re.M)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]*)\)", README))
    assert len(links) >= 10
    assert links <= slugs


def test_folds_are_closed():
    parts = re.findall(r"</?details>|</?summary>", README)
    one = ["<details>", "<summary>", "</summary>", "</details>"]
    assert parts == one * README.count("<details>")


def test_open_story_is_short():
    """At most 2,300 words outside folds: displays and tables count, code and pictures do not."""
    text = re.sub(r"<details>.*?</details>|!\[.*?\)", "", README, flags=re.S)
    text = re.sub(r"^```(?!math)\w+\n.*?^```$|^```[^\n]*$", "", text, flags=re.M | re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    assert len(text.split()) <= 2300


def test_code_is_narrow():
    """88 columns fit the page of a code host."""
    lines = "".join(CODE).splitlines()
    assert [line for line in lines if len(line) > 88] == []


def test_trace_lines_are_printed(capsys):
    """The lines of the trace that the page shows are lines of that trace."""
    [shown] = [block for language, block in BLOCKS if language == "text"]
    labels = re.findall(r"^\([A-Z]\d\) .*?(?=  )", shown, re.M)
    run_all.main(["--trace", "1", "--model", "attention"])
    output = capsys.readouterr().out
    assert len(labels) >= 2
    assert [label for label in labels if f"\n{label}  " not in output] == []


def test_skeleton_agrees(tmp_path, capsys):
    """The homework that the page begins is right as far as it goes."""
    [skeleton] = [code for code in CODE if "def attention_lines" in code]
    path = tmp_path / "homework.py"
    path.write_text(skeleton, encoding="utf-8")
    assert run_all.main(["--trace", "1", "--model", "attention", "--mine", str(path)]) == 0
    assert "(A7) grad_s = a * (g - a_g): not given" in capsys.readouterr().out


@parametrize("name, beside, lines", COPIES)
def test_what_to_copy(name, beside, lines):
    code = copied(name)
    assert {*code} - {name} == in_backticks([beside])
    assert sum(len(source(part)) for part in code) == int(lines)


def test_copies_are_all_seen():
    assert len(COPIES) >= 4
