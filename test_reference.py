"""Every public function against an independent check, bad input, the command line, and the README.

A test never repeats the formula that it tests: gradients are checked against complex-step differentiation of
forward passes written again, laws against enumeration, Monte Carlo with its error bar, quadrature or linear
algebra. Nothing depends on what one random stream gave: bounds on samples are normal bounds at level 1e-6.
"""
import ast
import concurrent.futures
import contextlib
import copy
import csv
import decimal
import doctest
import inspect
import io
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
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
ROOT = Path(__file__).resolve().parent
PUBLIC = {name: value for module in (ag, lib) for name, value in vars(module).items()
          if hasattr(value, "__wrapped__") and getattr(value, "__module__", "") == module.__name__}
EPS = np.finfo(float).eps
normal_bound = lambda comparisons: NormalDist().inv_cdf(1 - 1e-6 / (2 * comparisons))

# ---- how things are compared, and forward passes written again -------------------------------------------

def close(got, want, tolerance, scale=None):
    """The largest difference, over the largest entry wanted or the scale given, is at most the tolerance."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"shape {got.shape}, not {want.shape}"
    error = abs(got - want).max() / (scale or abs(want).max() or 1.0)
    assert error <= tolerance, f"largest difference {error:.3g}, allowed {tolerance:.3g}"

def within_errors(samples, exact):
    """The mean of independent samples (axis 0) is the exact value, up to its standard error."""
    error = abs(np.mean(samples, axis=0) - exact)
    allowed = normal_bound(error.size) * np.std(samples, axis=0, ddof=1) / math.sqrt(len(samples))
    excess = error / (allowed + 1e-12 * (1 + abs(np.asarray(exact))))
    assert (excess <= 1).all(), f"error over its bound: {excess.max():.3g}"

def uniform(rows, cells):
    """The rows are of so many kinds, equally likely: chi-square, its tail by Wilson and Hilferty."""
    _, counts = np.unique(rows, axis=0, return_counts=True)
    k, chi_square = max(cells - 1, 1), ((counts - counts.mean())**2).sum() / counts.mean()
    z = ((chi_square / k)**(1 / 3) - 1 + 2 / (9 * k)) / math.sqrt(2 / (9 * k))
    assert len(counts) == cells and z < normal_bound(1), f"chi-square {chi_square:.1f} with {k} free"

def attend(scores):
    x = np.exp(scores - np.real(scores).max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)

attention_loss, network_loss = (  # those of the trace: means in place of sums over the batch
    lambda *arguments, forward=forward: forward(*arguments)["loss"] / len(arguments[-1])
    for forward in (run_all.attention_forward, run_all.fcn_forward))

def population_loss(V, W, E, e_query, selected):
    """f - target = sum_t (a_t V - s_t I/q) x_t, and the x_t are independent with covariance I."""
    a = attend(np.einsum("bit,ij,bj->bt", np.broadcast_to(E, (len(selected), *E.shape[-2:])), W, e_query))
    target = selected[:, :, None, None] * np.eye(len(V)) / selected[0].sum()
    return ((a[:, :, None, None] * V - target)**2).sum() / (2 * len(selected))

def scalar_loss(alpha, c, u, q, d):
    return d * ((alpha * attend(c * u) - lib.first_subset(1, u.shape[1], q) / q)**2).sum() / (2 * len(u))

def setting(rng, B, T, q, d, d_e, m, tokens, query, shared, sharp):
    X, selected = lib.sample_batch(rng, B, T, q, d, tokens)
    E = lib.random_sign_encoding(rng, d_e, T, None if shared else B)
    W1, b1, A, b2 = lib.init_fcn(rng, m, T, d)
    shapes = {"Z": (B, d_e, T), "z_query": (B, d_e), "target": (B, m), "V": (m, d_e), "square": (d, d),
              "W": (d_e, d_e), "alpha": (), "c": ()}
    normal = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return {**normal, "X": X, "selected": selected, "E": E, "query": query, "W": sharp * normal["W"],
            "c": sharp * normal["c"], "overlaps": lib.overlaps(rng, B, T, q, d_e, query),
            "network": (W1, b1 + rng.standard_normal(m), A, b2 + rng.standard_normal(d))}

def cases(s, rows=slice(None)):
    """Name, function, the loss again, parameters, data, sizes, scores of each gradient on rows of a setting.
    Sizes bound the loss and the norm of each derivative by the norms of their factors, scores the scores,
    before any cancellation: rounding is at most a few hundred eps times (1 + scores) sizes. A dual query that
    should be 0 is known to eps only, so queries count as 1 long at least."""
    X, selected, u, Z, z_query, target = (s[key][rows] for key in (
        "X", "selected", "overlaps", "Z", "z_query", "target"))
    E, V, W, alpha, c = s["E"] if s["E"].ndim == 2 else s["E"][rows], s["V"], s["W"], s["alpha"], s["c"]
    (_, d, T), q, norm = X.shape, int(selected[0].sum()), np.linalg.norm
    e_query, inputs = lib.QUERIES[s["query"]](E, selected), lib.fcn_inputs(X, selected)
    longest = lambda vectors: norm(vectors, axis=1).max()
    sizes = lambda value, residual, token, key: (  # the norms of V, f - target, tokens, tokens times query
        residual**2 / 2, residual * token, 2 * residual * value * token * key)
    key = longest(Z) * max(longest(z_query), 1.0)
    yield ("attention", ag.attention_loss_and_grads, attention_loss, (V, W), (Z, z_query, target),
           sizes(norm(V), norm(V) * longest(Z) + longest(target), longest(Z), key), norm(W) * key)
    key, length = max(longest(e_query), 1.0), norm(s["square"])
    yield ("population", ag.population_loss_and_grads, population_loss, (s["square"], W),
           (E, e_query, selected), sizes(length, length + math.sqrt(d), 1.0, key), norm(W) * key)
    # a scalar's gradient is the coefficient of a matrix: the derivative is d, and T-1 or d_e, times as large
    bound = sizes(d * abs(alpha), math.sqrt(d) * (abs(alpha) + 1), math.sqrt(d), abs(u).max() + 1)
    yield ("one-hot", lambda alpha, c, u, q, d: np.multiply(
        ag.one_hot_loss_and_grads(alpha, c, T, q, d), (1, d, T - 1)),
        scalar_loss, (alpha, c), (lib.first_subset(1, T, q), q, d), bound, abs(c))
    yield ("stochastic", lambda alpha, c, u, q, d: np.multiply(
        ag.stochastic_loss_and_grads(alpha, c, u, q, d, len(W)), (1, d, len(W))),
        scalar_loss, (alpha, c), (u, q, d), bound, abs(c * u).max())
    W1, b1, A, b2 = s["network"]
    hidden, fed = norm(W1) * longest(inputs) + norm(b1), longest(inputs)
    residual = norm(A) * hidden + norm(b2) + longest(lib.sts(X, selected))
    yield ("network", ag.fcn_loss_and_grads, network_loss, s["network"], (inputs, lib.sts(X, selected)),
           np.multiply(residual, (residual / 2, norm(A) * fed, norm(A), hidden, 1.0)), 0.0)

def permuted(s, order):
    """The same setting with its positions in another order, and the order of the network's columns."""
    (d, T), q, (W1, *rest) = s["X"].shape[1:], int(s["selected"][0].sum()), s["network"]
    columns = np.concatenate([(order[:, None] * d + np.arange(d)).ravel(), T * d + order])
    within = np.concatenate([np.sort(order[order < q]), order[order >= q]])  # the q selected stay in front
    moved = {key: s[key][..., order] for key in ("X", "Z", "E", "selected")}
    return {**s, **moved, "overlaps": s["overlaps"][:, within], "network": (W1[:, columns], *rest)}, columns

@pytest.mark.parametrize("block", range(10))
def test_gradients_complex_step(block):
    """(A5, A8), (P2, P4), (O3, O4), (S2, S3), (F2) at 500 random sizes: every entry of each tenth to 1e-12 of
    the largest, derivatives along three directions, batch, permutation, signs, floors, attention."""
    for seed in range(50 * block, 50 * block + 50):
        rng, all_entries = default_rng([2024, seed]), seed % 10 == 0
        B, T, d, d_e, m = (int(rng.integers(1, high)) for high in (5, 10, 5, 10, 9))
        q = int(rng.integers(1, T + 1))
        s = setting(rng, B, T, q, d, d_e, m, list(lib.TOKENS)[rng.integers(len(lib.TOKENS))],
                    ("dual", "sum")[rng.integers(2)], bool(rng.integers(2)),
                    0.3 if all_entries else float(rng.choice([0.1, 1.0, 30.0])))
        moved, columns = permuted(s, rng.permutation(T))
        alone = zip(*(cases(s, slice(b, b + 1)) for b in range(B)))
        for case, again, each in zip(cases(s), cases(moved), alone):
            name, function, loss, params, data, sizes, scores = case
            where = f"seed {seed}, {name}, (B, T, q, d, d_e, m) = {B, T, q, d, d_e, m}"
            rounding = 400 * EPS * (1 + scores)
            value, *grads = result = function(*params, *data)
            assert value >= 0 and abs(value - loss(*params, *data)) <= rounding * sizes[0], where
            for _ in range(3):
                ways = [rng.standard_normal(np.shape(param)) for param in params]
                along = sum(np.vdot(grad, way) for grad, way in zip(grads, ways))
                stepped = loss(*(param + 1e-30j * way for param, way in zip(params, ways)), *data)
                allowed = rounding * sum(size * np.linalg.norm(way) for size, way in zip(sizes[1:], ways))
                assert abs(along - np.imag(stepped) / 1e-30) <= allowed, where
            for k, (grad, size) in enumerate(zip(grads, sizes[1:]) if all_entries else ()):
                at = lambda x: loss(*params[:k], x, *params[k + 1:], *data)
                want = run_all.complex_step(at, params[k])
                close(grad, want, 1e-12, max(abs(want).max(), 1e-3 * size))  # 0 in theory at T = 1, q = T
                close(value, loss(*params, *data), 1e-12)
            mean = [np.mean(one, axis=0) for one in zip(*(one[1](*params, *one[4]) for one in each))]
            moved_result = list(again[1](*again[3], *again[4]))
            if name == "network":
                moved_result[1] = moved_result[1][:, np.argsort(columns)]
            for got, batch, order, size in zip(result, mean, moved_result, sizes):
                assert max(np.max(abs(got - batch)), np.max(abs(got - order))) <= rounding * size, where
        close(ag.softmax(s["c"] * s["overlaps"]).sum(axis=1), np.ones(B), 4 * EPS)
        model = s["V"], s["W"], s["Z"], s["z_query"]
        close(lib.transformer(*model), run_all.attention_forward(*model, 0.0)["f"], 1e-12)
        top, least = d / (2 * q), float(lib.fcn_loss_floor(m, T, q, d))
        own = lib.fcn_first_layer_floor(s["network"][0], T, q, d)
        assert 0 <= least <= own + 1e-12 * top and own <= top * (1 + 1e-12), (seed, least, own, top)

def test_fcn_finite_differences():
    """Away from the kinks, central differences of the network itself, 1e-7."""
    shapes = (5, 4), (5,), (3, 5), (3,), (60, 4), (60, 3)
    *network, inputs, target = (default_rng(3).standard_normal(shape) for shape in shapes)
    away = abs(inputs @ network[0].T + network[1]).min(axis=1) > 0.01
    inputs, target = inputs[away], target[away]
    loss = lambda *network: ((lib.fcn(*network, inputs) - target)**2).sum() / (2 * len(inputs))
    for k, grad in enumerate(ag.fcn_loss_and_grads(*network, inputs, target)[1:]):
        ways = 1e-5 * np.eye(grad.size).reshape(-1, *grad.shape)
        ends = [loss(*network[:k], network[k] + way, *network[k + 1:]) for way in (*ways, *-ways)]
        close(grad.ravel(), (np.subtract(*np.split(np.array(ends), 2)) / 2e-5), 1e-7)
    grads = ag.fcn_loss_and_grads([[1.0]], [0.0], [[1.0]], [0.0], [[0.0]], [[1.0]])[1:]
    assert [float(grad.item()) for grad in grads] == [0, 0, 0, -1]  # relu has derivative 0 at 0

# ---- the population (P), one-hot (O) and stochastic (S) encodings ----------------------------------------

def full_model(V, W, E, X, selected, query="sum"):
    """Loss and gradients of the full model on samples, from its blocks V_1 and W_22."""
    return ag.attention_loss_and_grads(*lib.in_full_model(V, W), *run_all.on_samples(E, X, selected, query))

def all_tokens(values, d, T, q):
    """Every X with entries among equally likely values, each with every subset."""
    X = np.array(list(itertools.product(values, repeat=d * T))).reshape(-1, d, T)
    subsets = lib.all_subsets(T, q)
    return np.repeat(X, len(subsets), axis=0), np.tile(subsets, (len(X), 1))

@pytest.mark.parametrize("tokens", ["all signs", *lib.TOKENS])
def test_population(tokens):
    """(P1, P2, P4) are the means of (A4, A5, A8) over all sign tokens and all y (P5), and over samples of
    each law; the cross blocks average to 0 (A9), W_12 for laws without skewness."""
    rng, found, T, q, d, d_e = default_rng(4), [], 4, 2, 2, 3
    E, V, W = (rng.standard_normal(shape) for shape in ((d_e, T), (d, d), (d_e, d_e)))
    loss, *grads = ag.population_loss_and_grads(V, W, *run_all.on_population(E, lib.all_subsets(T, q), "sum"))
    exact = loss, *lib.in_full_model(*grads)
    if tokens == "all signs":
        for got, want in zip(full_model(V, W, E, *all_tokens([-1.0, 1.0], d, T, q)), exact):
            close(got, want, 1e-12)
        return
    for _ in range(500):
        loss, grad_V, grad_W = full_model(V, W, E, *lib.sample_batch(rng, 40, T, q, d, tokens))
        assert not grad_W[:, :d].any()  # in every sample
        grad_W[:d] *= tokens != "gumbel"
        found.append(np.concatenate([[loss], grad_V.ravel(), grad_W.ravel()]))
    within_errors(found, np.concatenate([np.ravel(part) for part in exact]))

def test_skewed_tokens():
    """(A10): with one-hot encodings skewed tokens pull content into W_12; all of a law with E x^3 = 3/2, and
    samples of Gumbel tokens, with E x^3 = 12 sqrt(6) zeta(3)/pi^3."""
    rng, fifths, gumbel = default_rng(5), [2.0, *4 * [-0.5]], 12 * 6**0.5 * 1.2020569031595942 / math.pi**3
    for skewness, T, q, d, data in [
            (1.5, 3, 2, 1, [all_tokens(fifths, 1, 3, 2)]), (1.5, 4, 1, 1, [all_tokens(fifths, 1, 4, 1)]),
            (1.5, 2, 1, 2, [all_tokens(fifths, 2, 2, 1)]),
            (gumbel, 8, 2, 4, [lib.sample_batch(rng, 500, 8, 2, 4, "gumbel") for _ in range(100)])]:
        on_y, W = lib.first_subset(1, T, q), 1.3 * (np.eye(T) - 1 / T)
        a = attend(1.3 * on_y)
        pull = np.full((d, T), 0.7 * skewness * q / T * (a * (1 - a) * (0.7 * a - on_y / q)).sum())
        found = [full_model(0.7 * np.eye(d), W, np.eye(T), *batch)[2][:d, d:] for batch in data]
        within_errors(found, pull) if len(data) > 1 else close(found[0], pull, 1e-13)

@pytest.mark.parametrize("T, q, d", [(5, 2, 3), (7, 1, 1), (4, 4, 2), (2, 1, 5), (6, 5, 2)])
def test_one_hot_line(T, q, d):
    """(O1): at V = alpha I, W = omega (I - 11^T/T) matrix gradients are scalars times the same matrices."""
    whole, centre = run_all.on_population(np.eye(T), lib.all_subsets(T, q), "sum"), np.eye(T) - 1 / T
    for alpha, omega in [(0.0, 0.0), (0.7, 1.3), (1.2, -2.0), (-0.5, 6.0)]:
        loss, grad_V, grad_W = ag.population_loss_and_grads(alpha * np.eye(d), omega * centre, *whole)
        scalars = ag.one_hot_loss_and_grads(alpha, omega, T, q, d)
        close(scalars[0], loss, 1e-13)
        close(grad_V, scalars[1] * np.eye(d), 1e-14, 1 + abs(alpha))
        close(grad_W, scalars[2] * centre, 1e-14, d * (1 + alpha**2))

@pytest.mark.parametrize("query", lib.QUERIES)
@pytest.mark.parametrize("q", [1, 2, 3])
def test_sign_encodings_enumerated(query, q):
    """Over all 2^6 sign patterns (d_e = 2, T = 3): (S1)-(S3), (N1), and the law of `overlaps`."""
    rng, d_e, T, d, c, signs = default_rng(6), 2, 3, 2, 1.7, run_all.all_signs(2, 3)
    whole = run_all.on_population(signs, lib.first_subset(len(signs), T, q), query)
    u = np.einsum("bet,be->bt", signs, whole[1])
    loss, grad_V, grad_W = ag.population_loss_and_grads(0.8 * np.eye(d), c * np.eye(d_e), *whole)
    close(grad_W, grad_W[0, 0] * np.eye(d_e), 1e-14, 1.0)
    scalars = ag.stochastic_loss_and_grads(0.8, c, u, q, d, d_e)
    close((loss, grad_V[0, 0], grad_W[0, 0]), scalars, 1e-13, 1.0)
    for X, y in zip(rng.standard_normal((3, d, T)), np.eye(T)):  # of one sequence: averages over E alone
        data = np.tile(X, (64, 1, 1)), np.tile(y, (64, 1))
        _, grad_V, grad_W = full_model(rng.standard_normal((d, d)), c * np.eye(d_e), signs, *data, query)
        close(grad_V[:, d:], np.zeros((d, d_e)), 1e-14)
        close(grad_W, np.diag([0, 0, *2 * [grad_W[d, d]]]), 1e-14, 1 + abs(grad_W).max())
    drawn = lib.overlaps(default_rng(7), 20_000, T, q, d_e, query)
    products = lambda u: np.hstack([u, np.einsum("bi,bj->bij", u, u).reshape(len(u), -1)])
    within_errors(products(drawn), products(u).mean(axis=0))
    if query == "sum" or q == 1:  # no less than exact
        assert abs(lib.overlap_variance(q, d_e, query) - (whole[1]**2).sum() / len(signs) / d_e) < 1e-14

def test_dual_query():
    """The least-norm least-squares solution, sample by sample; 1 on y wherever it can be."""
    rng, subsets, signs = default_rng(8), lib.all_subsets, lib.random_sign_encoding
    equal = np.array([[1.0, 1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]]) / math.sqrt(2)
    for E, selected in [(rng.standard_normal((5, 3, 7)), subsets(7, 3)[:5]), (equal, subsets(4, 2)),
                        (equal, subsets(4, 3)), (signs(rng, 4, 9), subsets(9, 4)), (np.eye(1), np.eye(1)),
                        (signs(rng, 16, 32, 400), lib.sample_batch(rng, 400, 32, 5, 1)[1]),
                        (np.zeros((2, 3)), subsets(3, 1)), (1e150 * np.eye(3), subsets(3, 2)),
                        (1e-150 * np.eye(3), subsets(3, 2)),  # then nearly opposite and equal: independent
                        (np.array([[1.0, -1.0], [0.0, 1e-3]]), np.ones((1, 2))),
                        (np.array([[1.0, 1.0], [0.0, 1e-5]]), np.ones((1, 2)))]:
        got, summed = lib.dual_query(E, selected), lib.sum_query(E, selected)
        for b, y in enumerate(selected > 0):
            E_y = (E if E.ndim == 2 else E[b])[:, y]
            close(summed[b], E_y.sum(axis=1), 1e-15, abs(E_y).sum())
            want = np.linalg.lstsq(E_y.T, np.ones(y.sum()), rcond=1e-12)[0]
            close(got[b], want, 1e-10, 1 / (abs(E_y).max() or 1.0))
            if np.linalg.matrix_rank(E_y) == y.sum() or (E_y == E_y[:, :1]).all() and E_y.any():
                close(E_y.T @ got[b], np.ones(y.sum()), 1e-10)

def test_overlap_variance():
    """sigma^2 bounds the variance of the overlaps off y, |e_y|^2/d_e, from below, within .2 % here."""
    rng, q, d_e = default_rng(9), 3, 64
    E = rng.choice([-1.0, 1.0], (40_000, d_e, q)) / math.sqrt(d_e)
    found = [(q, d_e, np.linalg.inv(np.einsum("bei,bej->bij", E, E)).sum(axis=(1, 2)) / d_e)]
    found += [(q, d_e, (lib.overlaps(rng, 4000, T, q, d_e)[:, q:]**2).mean(axis=1))
              for T, q, d_e in [(32, 1, 64), (128, 2, 64), (32, 3, 128), (64, 4, 256)]]
    for q, d_e, squares in found:
        error = normal_bound(5) * squares.std() / math.sqrt(len(squares)) / squares.mean() + 1e-12
        assert 1 - error <= squares.mean() / lib.overlap_variance(q, d_e) <= 1.002 + error, (q, d_e)

@pytest.mark.parametrize("c", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("d, sizes", [(3, (6, 2, 8, "dual")), (1, (5, 4, 3, "sum")), (2, (31, 3, 24, "dual")),
                                      (1, (2, 1, 1, "sum"))])
def test_overlap_loss(d, sizes, c):
    """(S4) is the loss at the alpha where the gradient, linear in alpha, is 0."""
    data = lib.overlaps(default_rng(10), 200, *sizes), sizes[1], d
    g0, g1 = (ag.stochastic_loss_and_grads(alpha, c, *data, sizes[2])[1] for alpha in (0.0, 1.0))
    best, _, _ = ag.stochastic_loss_and_grads(g0 / (g0 - g1), c, *data, sizes[2])
    close(lib.overlap_loss(c, *data), best, 1e-9)

@pytest.mark.parametrize("T, q, d_e, limit", [(32, 3, 128, 2.0), (64, 1, 64, 4.0), (32, 3, 128, 5.0)])
def test_stochastic_loss_sampled(T, q, d_e, limit):
    """(S5) against (S4) on draws, 2 %, (L1) at T and 2T against the loss, 4 %, plus 4 standard errors."""
    rng, d, sigma2 = default_rng(11), 4, lib.overlap_variance(q, d_e)
    c, found = min(limit, 0.15 / sigma2), []
    for u in (lib.overlaps(rng, 250, 2 * T, q, d_e) for _ in range(16)):
        losses = (ag.stochastic_loss_and_grads(1.1, c, u[:, :size], q, d, d_e)[0] for size in (T, 2 * T))
        found.append([lib.overlap_loss(c, u[:, :T], q, d), *losses])
    predicted = np.array([lib.stochastic_loss(c, T, q, d, sigma2), *(
        lib.length_loss(1.1, c, size, q, d, sigma2) for size in (T, 2 * T))])
    allowed = np.array([0.02, 0.04, 0.04]) * predicted + np.std(found, axis=0, ddof=1)  # 4/sqrt(16) of them
    close((np.mean(found, axis=0) - predicted) / allowed, np.zeros(3), 1.0)

def test_stochastic_loss_normal_overlaps():
    """(S5) for u normal off y: the next order is below 1e-3, its last term 9e-3; m, M, v, h by quadrature."""
    T, q, sigma2, c, rng = 32, 3, 0.03, 2.0, default_rng(22)
    off_y = math.sqrt(sigma2) * rng.standard_normal((16, 8000, T - q))
    found = [lib.overlap_loss(c, np.hstack([np.ones((8000, q)), u]), q, 2) for u in off_y]
    mean, error = np.mean(found), np.std(found, ddof=1)  # 4/sqrt(16) of it
    close(lib.stochastic_loss(c, T, q, 2, sigma2), mean, 1e-3 + error / mean)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    for c, sigma2 in [(0.7, 0.3), (3.0, 0.04), (6.0, 0.02)]:
        x = np.exp(c * (math.sqrt(sigma2) * nodes - 1))
        one, two, three = (weights @ x**k / weights.sum() for k in (1, 2, 3))
        close(lib.moments(c, 9, 2, sigma2), 7 * np.array([one, two, two - one**2, three - two * one]), 1e-12)

def test_closed_forms_without_spread():
    """At sigma2 = 0 (S5) and (L1) are the one-hot loss at omega = c; with spread they are not below 0."""
    for (T, q, d), c in itertools.product([(2, 1, 1), (7, 3, 2), (101, 5, 3)], (0.0, 0.3, 2.0, 8.0)):
        curve = ag.one_hot_loss_and_grads([0.0, 0.9, 1.8], c, T, q, d)[0]
        close(lib.length_loss([0.0, 0.9, 1.8], c, T, q, d, 0.0), curve, 1e-12)
        best = lib.overlap_loss(c, lib.first_subset(1, T, q), q, d)
        close(lib.stochastic_loss(c, T, q, d, 0.0), best, 1e-12)
    sizes = (2, 1), (5, 1), (5, 3), (40, 1), (40, 3), (40, 30), (1000, 1), (1000, 3), (1000, 30)
    for (T, q), d_e in itertools.product(sizes, (30, 100)):
        sigma2, c = lib.overlap_variance(q, d_e), np.linspace(0, 0.3 / lib.overlap_variance(q, d_e), 60)
        losses = lib.stochastic_loss(c, T, q, 2, sigma2), lib.length_loss(1.0, c, T, q, 2, sigma2)
        assert np.min(losses) >= 0

def test_stochastic_trajectory():
    """(S6) times dc/dt is d_e c'^2 + d alpha'^2 = -eta L' along the path; descent on frozen overlaps, 5 %."""
    T, q, d, d_e, eta = 32, 3, 4, 128, 2.0
    sigma2, times = lib.overlap_variance(q, d_e), np.array([30.0, 100.0, 300.0, 1000.0, 4000.0])
    before, now, after = (np.array(lib.stochastic_trajectory(times * (1 + h), T, q, d, d_e, eta))
                          for h in (-0.01, 0.0, 0.01))
    c, alpha, loss = (after - before) / (0.02 * times)
    close((d_e * c**2 + d * alpha**2) / (-eta * loss), np.ones(5), 2e-3)
    close(lib.stochastic_loss(now[0], T, q, d, sigma2), now[2], 1e-12)
    close(lib.length_loss(now[1], now[0], T, q, d, sigma2) / now[2], np.ones(5), 0.02)  # alpha is at its best
    start = [3 * [x] for x in (0, 1, d * (T - q) / (2 * q * T))]
    close(lib.stochastic_trajectory([0, 10, T / eta], T, q, d, d_e, eta), start, 1e-12)
    u = lib.overlaps(default_rng(12), 1000, T, q, d_e)
    _, _, measured = run_all.final(run_all.two_scalars(lambda: u, q, d, d_e, eta, 1000))
    close(measured, now[2, 3], 0.05)

def test_trajectory_to_its_end():
    """(S6) goes far where no tail ends it, to the last step that it allows, not beyond; T beyond float64."""
    T, q, d, d_e, eta, omega, last = 9, 2, 1, 10**6, 1.0, 30.0, 1e300
    t = time_to(omega, T, q, d, eta, d_e)  # no spread: the one-hot law with d_e for T - 1
    close(lib.stochastic_trajectory(t, T, q, d, d_e, eta)[0], omega, 1e-3)
    for late in (1, 1.02, [0.1, 1.02]):
        with pytest.raises(ValueError, match="t must be at most") as error:
            lib.stochastic_trajectory(np.multiply(late, last), 32, 3, 4, 64, 2.0)
        last = float(re.search(r"at most ([\d.e+]+),", str(error.value))[1])
    c = lib.stochastic_trajectory(0.99 * last, 32, 3, 4, 64, 2.0)[0]
    assert 0.29 < c * lib.overlap_variance(3, 64) <= 0.3
    assert lib.stochastic_trajectory(1e5, 10**17, 3, 4, 128, 2.0)[0] == 0
    assert lib.stochastic_loss(1e308, 4, 1, 2, 2e-309) == 0

def test_stochastic_floor_and_dimension():
    """(S8) bounds the least loss on draws (not at q = 16), at such c; (S9) is within 10 % of it."""
    for T, q, d_e, query, low, high in [(32, 3, 24, "dual", 0.2, 1.0), (32, 3, 36, "dual", 0.1, 1.0),
                                        (32, 16, 96, "dual", 1.1, 1.5), (32, 3, 512, "sum", 0.9, 1.1)]:
        u = lib.overlaps(default_rng(13), 2000, T, q, d_e, query)
        least, c = min((lib.overlap_loss(c, u, q, 4), c) for c in np.linspace(0.5, 12, 47))
        assert query == "sum" or abs(c * lib.overlap_variance(q, d_e) - (0.95 if q == 3 else 0.55)) < 0.1
        assert low <= least / lib.stochastic_floor(T, q, 4, d_e, query) <= high, (q, d_e, query)
    for T, q, d_e in [(32, 3, 16), (16, 4, 16), (64, 3, 24), (32, 5, 4000)]:
        tau2 = (q + 2 * (q - 1) / q) / d_e
        c = np.linspace(0, 1 / (2 * tau2), 10**6)
        M = c**2 * (q - 1) * (q - 2) / d_e + (T - q) * np.exp(2 * c * (c * tau2 - 1))
        close(lib.stochastic_floor(T, q, 2 * q, d_e, "sum"), (M / (q + M)).min(), 1e-7)
    for T, q, eps in [(10**9, 3, 0.5), (1024, 3, 0.01), (10**9, 7, 1e-9), (32, 31, 0.5)]:
        need, bound = lib.required_dimension(T, q, eps), lambda d_e: T / q * math.exp(-d_e / (2 * q))
        assert type(need) is int and need >= 1 and bound(need) <= eps * (1 + 1e-12) and bound(need - 1) > eps
        assert lib.stochastic_floor(T, q, 6, need) <= eps * 6 / (2 * q)
    assert lib.stochastic_floor(100, 3, 6, 1) == 1.0 > lib.stochastic_floor(100, 3, 6, 1, "sum")  # L_0

def test_exact_floor():
    """(S10): counted over all sign patterns at c = 10^5, both queries; summed over the ties; huge sizes."""
    for q, T, d_e in [(1, 3, 4), (2, 3, 4), (2, 4, 3), (1, 4, 3)]:
        signs = run_all.all_signs(d_e, T)
        for query, e_y in lib.QUERIES.items():
            u = np.einsum("bet,be->bt", signs, e_y(signs, lib.first_subset(len(signs), T, q)))
            close(lib.stochastic_floor(T, q, 3, d_e, query), lib.overlap_loss(1e5, u.round(9), q, 3), 1e-12)
    for q, T, d_e in [(1, 100, 3), (1, 40, 60), (2, 28, 14), (2, 60, 5)]:
        ways = {d_e: 1.0} if q == 1 else {A: math.comb(d_e, A) / 2**d_e for A in range(d_e + 1)}
        want = sum(ways[A] * math.comb(T - q, k) * 2.0**(-A * k) * (1 - 2.0**-A)**(T - q - k) * k / (q + k)
                   for A in ways for k in range(T - q + 1))
        close(lib.stochastic_floor(T, q, 2 * q, d_e), want, 1e-13)
    assert lib.stochastic_floor(10**9, 1, 2, 1) == pytest.approx(1 - 2e-9, abs=1e-8)
    for T, q, eps in [(2, 1, 0.9), (1024, 2, 0.01), (10**9, 1, 1e-9), (32, 2, 5e-324)]:
        need = lib.required_dimension(T, q, eps)
        floors = [lib.stochastic_floor(T, q, 2 * q, size) for size in (need, max(need - 1, 1))]
        assert type(need) is int and floors[0] <= eps and (floors[1] > eps or need == 1)

# ---- the one-hot law (C) and step sizes (O5, A11) --------------------------------------------------------

def best_loss(omega, T, q, d):
    """The loss at the best alpha by Lagrange's identity: |a|^2 |s|^2 - <a, s>^2 = sum of squared minors."""
    on = 1 / (q + (T - q) * np.exp(-omega))
    off = np.exp(-omega) * on
    return d / (2 * q) * (T - q) * off**2 / (q * on**2 + (T - q) * off**2)

def time_to(omega, T, q, d, eta, stiffness):
    """When (stiffness + d alpha*'^2) domega/dt = -eta dL*/domega, alpha* the best alpha for omega, is at
    omega, from t = T/eta: by Gauss-Legendre on short panels, derivatives by complex steps."""
    (nodes, weights), edges = np.polynomial.legendre.leggauss(30), np.linspace(0, omega, 2 + int(4 * omega))
    half = np.diff(edges)[:, None] / 2
    x = edges[:-1, None] + half * (1 + nodes) + 1e-30j
    on, off = 1 / (q + (T - q) * np.exp(-x)), 1 / (q * np.exp(x) + T - q)
    lag = d * (np.imag(on / (q * on**2 + (T - q) * off**2)) / 1e-30)**2
    slope = np.imag(best_loss(x, T, q, d)) / 1e-30
    return T / eta - ((stiffness + lag) / (eta * slope) * weights * half).sum()

@pytest.mark.parametrize("T, q, d, eta", [(2, 1, 1, 1.0), (4, 3, 2, 0.5), (257, 4, 4, 2.0), (64, 4, 300, 1.0),
                                          (10**6, 999_999, 3, 1.0), (10**9, 3, 7, 0.25)])
def test_one_hot_closed_form(T, q, d, eta):
    """(C1, C3) against (C2) integrated numerically, also with (G1)'s stiffness; (C4) at t = 10^24."""
    omegas = np.array([0.01, 0.5, 2.0, 7.0, 13.0, 25.0])
    for d_e, stiffness in ((None, T - 1), (40, T * 40 / (T + 40))):
        times = [time_to(omega, T, q, d, eta, stiffness) for omega in omegas]
        ratio = lib.one_hot_loss_at(times, T, q, d, eta, d_e) / best_loss(omegas, T, q, d)
        close(ratio, np.ones(6), 1e-11 + T * EPS)
    assert lib.one_hot_loss_at(0, T, q, d, eta) == pytest.approx(d * (T - q) / (2 * q * T), rel=1e-12)
    left_out = (T**2 + 120 * q * T) * (T - 1) / (T - q) / (2 * eta * d * 1e24) + 1e-9  # terms next to (C4)
    for t in (1e24, 10**24):
        close(lib.one_hot_loss_at(t, T, q, d, eta) * 4 * eta * t / (T - 1), 1, left_out)

@pytest.mark.parametrize("alpha, omega, T, q", [
    (0.7, 3.0, 8, 3), (1.0, 40.0, 8, 3), (1.0, -800.0, 8, 3), (-2.5, 0.0, 5, 4), (1e150, -701.0, 8, 3),
    (1.5, 50.0, 1000, 1), (1.0, 300.0, 9, 2), (3.0, 1.0, 4, 4)])
def test_one_hot_digits(alpha, omega, T, q, d=5):
    """(O2)-(O4) and, without spread, (L1) to the last digits: loss and differences in 600 decimals."""
    with decimal.localcontext() as context:
        context.prec, number = 600, decimal.Decimal

        def loss(alpha, omega):
            on = 1 / (q + (T - q) * (-omega).exp())
            off = on * (-omega).exp()
            return number(d) / 2 * (q * (number(1) / q - alpha * on)**2 + (T - q) * (alpha * off)**2)
        a, w, h = number(alpha), number(omega), number("1e-150")
        by_alpha = (loss(a + h, w) - loss(a - h, w)) / (2 * h * d)
        by_omega = (loss(a, w + h) - loss(a, w - h)) / (2 * h * (T - 1))
        wanted = [float(x) for x in (loss(a, w), by_alpha, by_omega)]
    for got, want in zip(ag.one_hot_loss_and_grads(alpha, omega, T, q, d), wanted):
        assert got == pytest.approx(want, rel=1e-13, abs=1e-300)
    if omega >= 0 and q < T:
        assert lib.length_loss(alpha, omega, T, q, d, 0.0) == pytest.approx(wanted[0], rel=1e-13, abs=0.0)

def test_one_hot_recursion():
    """It is the descent of the scalars; q = T decays at 1 - eta/q; it meets (C3) early and late; after escape
    d(1/L)/dt is eta kappa^2/(T-1), kappa the slope of -ln L* (S7)."""
    T, q, d, eta = 32, 4, 4, 2.0
    several = np.array(run_all.scalar_descent(range(61), np.array([8, T, 5]), np.array([3, q, 5]), d, eta))
    scalars = lambda alpha, omega: ag.one_hot_loss_and_grads(alpha, omega, T, q, d)
    alone = [(*params, loss) for _, params, loss in lib.gradient_descent((0.0, 0.0), scalars, eta, 60)]
    close([(*params, loss) for _, params, loss in lib.one_hot_recursion(T, q, d, eta, 60)], alone, 1e-14)
    close(several[:, :, 1].T, alone, 1e-13)
    close(several[0, :, 2], [1 - (1 - eta / 5)**t for t in range(61)], 1e-12)
    for T, d, eta, first, last in [(256, 4, 2.0, 1 / 64, 1 / 3), (128, 2, 4.0, 10, 10.5)]:  # in escape times
        escape = lib.escape_time(T, q, d, eta)
        times = np.arange(max(int(4 * T / eta), int(first * escape)), int(last * escape))
        loss = np.array([loss for _, _, loss in lib.one_hot_recursion(T, q, d, eta, int(times[-1]))])[times]
        close(loss / lib.one_hot_loss_at(times, T, q, d, eta), np.ones(len(times)), 0.01)
    T, q, d, eta = 16, 3, 2, 2.0
    _, omega, loss = run_all.scalar_descent(range(3001), T, q, d, eta)
    t = np.geomspace(2 * lib.escape_time(T, q, d, eta), 2850, 12).astype(int)
    kappa = -np.imag(np.log(best_loss(omega[t] + 1e-30j, T, q, d))) / 1e-30
    rate = (1 / loss[t + t // 50] - 1 / loss[t - t // 50]) / (2 * (t // 50))
    close(rate * (T - 1) / (eta * kappa**2), np.ones(12), 0.02)

def test_escape_time():
    """(C5) within 2 % of the recursion, and where (C3) has half of the attention on y."""
    T, q, d, eta = np.array([128, 256, 512]), 4, 8, 7.0
    _, omegas, _ = run_all.scalar_descent(range(6001), T, q, d, eta)
    half = np.log((T - q) / q)  # the omega that has half of the attention on y
    crossed = [np.interp(x, path, range(6001)) for x, path in zip(half, omegas.T)]
    close(np.divide(crossed, [lib.escape_time(int(x), q, d, eta) for x in T]), np.ones(3), 0.02)
    close(lib.escape_time(10**9, 2, 3, 1.0) * 3 / 1e18, 1.0, 1e-6)
    for T, q, d, eta in [(9, 4, 1, 1.0), (64, 3, 500, 0.1), (1000, 7, 2, 3.0)]:
        close(lib.escape_time(T, q, d, eta), time_to(math.log((T - q) / q), T, q, d, eta, T - 1), 1e-12)

def curvature(gradient, size):
    """The largest eigenvalue of the Hessian at 0, from differences of the gradient."""
    hessian = np.array([gradient(way) - gradient(-way) for way in 1e-5 * np.eye(size)]) / 2e-5
    return np.linalg.eigvalsh((hessian + hessian.T) / 2).max()

@pytest.mark.parametrize("T, q, d", [(5, 4, 6), (4, 2, 3), (5, 1, 2), (6, 5, 20), (3, 3, 2), (2, 2, 9),
                                     (3, 2, 1), (4, 3, 1), (2, 2, 2)])
def test_largest_stable_eta(T, q, d):
    """2 over the largest late curvature: in V and W (O5), and in the cross blocks V_2, W_12 over tokens with
    the first five moments of the normal (A11)."""
    whole, centre = run_all.on_population(np.eye(T), lib.all_subsets(T, q), "sum"), 14 * (np.eye(T) - 1 / T)
    gradient = lambda x: np.concatenate([grad.ravel() for grad in ag.population_loss_and_grads(
        np.eye(d) + x[:d * d].reshape(d, d), centre + x[d * d:].reshape(T, T), *whole)[1:]])
    close(lib.largest_stable_eta(T, q, d, full=False), 2 / curvature(gradient, d * d + T * T), 1e-4)
    if d * T <= 4:
        X, selected = all_tokens([-math.sqrt(3), 0, 0, 0, 0, math.sqrt(3)], d, T, q)
        data, (V, W) = run_all.on_samples(np.eye(T), X, selected, "sum"), lib.in_full_model(np.eye(d), centre)
        cross = lambda x: np.concatenate([grad[:d, d:].ravel() for grad in ag.attention_loss_and_grads(
            V + np.pad(x[:d * T].reshape(d, T), ((0, 0), (d, 0))),
            W + np.pad(x[d * T:].reshape(d, T), ((0, T), (d, 0))), *data)[1:]])
        close(lib.largest_stable_eta(T, q, d), 2 / curvature(cross, 2 * d * T), 1e-4)

def test_long_run():
    """10^5 steps of matrices and scalars at 0.9 of the stable eta stay within 1e-10; 1 % below it, 1e-12."""
    stable, whole = lib.largest_stable_eta, run_all.on_population(np.eye(3), 1 - np.eye(3))
    matrices, scalars = (f.__wrapped__ for f in (ag.population_loss_and_grads, ag.one_hot_loss_and_grads))
    V, W, alpha, omega, states, eta = np.zeros((1, 1)), np.zeros((3, 3)), 0.0, 0.0, [], 0.9 * stable(3, 2, 1)
    for _ in range(100_000):
        grads = *matrices(V, W, *whole)[1:], *scalars(alpha, omega, 3, 2, 1)[1:]
        V, W, alpha, omega = (x - eta * grad for x, grad in zip((V, W, alpha, omega), grads))
        states.append((V[0, 0], W, alpha, omega))
    V, W, alpha, omega = map(np.array, zip(*states))
    close(V, alpha, 1e-10, 1.0), close(W, omega[:, None, None] * (np.eye(3) - 1 / 3), 1e-10, 1.0)
    assert run_all.off_the_line(np.eye(8), 3, 12, 0.99 * stable(8, 3, 12, full=False), 2500) <= 1e-12

# ---- fixed encodings (G), finite samples (N), networks (F), descent --------------------------------------

def test_span_of_fixed_encodings():
    """Orthonormal sets stay on the line of (O3, O4). For all sets W = Pi W Pi, Pi the projector on the span:
    the cosine of W with I is at most sqrt(T/d_e)."""
    for q, d, d_e in [(2, 3, 6), (3, 2, 10)]:
        E = np.linalg.qr(default_rng(d_e).standard_normal((d_e, 6)))[0]
        assert run_all.off_the_line(E, q, d, 1.0, 1000) <= 1e-10
    for q, d, d_e in [(2, 3, 24), (1, 2, 9)]:
        E = lib.random_sign_encoding(default_rng(d_e), d_e, 6)
        (_, W), span = run_all.final(run_all.set_descent(E, q, d, 1.0, 400))[1], E @ np.linalg.pinv(E)
        close(span @ W @ span, W, 1e-12)
        assert 0.1 < run_all.cosine(W, np.eye(d_e)) <= math.sqrt(6 / d_e) + 1e-12

@pytest.mark.parametrize("d_e, T, q, query", [
    (5, 8, 1, "dual"), (9, 6, 1, "dual"), (12, 20, 1, "dual"), (7, 7, 1, "sum"), (30, 6, 2, "dual"),
    (8, 7, 3, "sum"), (40, 8, 7, "dual"), (5, 6, 2, "dual")])
def test_widest_margin(d_e, T, q, query):
    """(G2): W* meets the margins, pair by pair, and no W that meets them is shorter: each l >= 0 bounds their
    norms from below by 1^T l/||G^T l||."""
    E, two, apart, equal = default_rng(d_e).standard_normal((d_e, T)), np.array([[1, 1], [1, -1]]), [], []
    if (d_e, T) == (5, 6):  # at q = 2 and d_e < T most sets have no W*: rows of Hadamard's matrix do
        E = np.kron(np.kron(two, two), two)[3:, :6]
    E = E / np.linalg.norm(E, axis=0)
    W = lib.widest_margin(E, q, query).ravel()
    for row in lib.all_subsets(E.shape[1], q):
        e_y, on, off = lib.QUERIES[query](E, row[None])[0], np.flatnonzero(row), np.flatnonzero(1 - row)
        apart += [np.outer(E[:, on[0]] - E[:, j], e_y).ravel() for j in off]
        equal += [np.outer(E[:, i] - E[:, on[0]], e_y).ravel() for i in on[1:]]
    apart, equal = np.array(apart), np.array(equal).reshape(-1, W.size)
    assert (apart @ W).min() > 1 - 1e-9 and abs(equal @ W).max(initial=0) < 1e-9 * np.linalg.norm(W)
    G = apart - apart @ np.linalg.pinv(equal) @ equal
    l, old, rate = np.zeros(len(G)), np.zeros(len(G)), np.linalg.norm(G, 2)**-2
    for k in range(8_000):  # accelerated projected gradients
        ahead = l + k / (k + 3) * (l - old)
        l, old = np.maximum(ahead + rate * (1 - G @ (G.T @ ahead)), 0), l
    assert l.sum() / np.linalg.norm(G.T @ l) >= (1 - 1e-6) * np.linalg.norm(W)

def test_widest_margin_of_known_sets():
    """Orthonormal sets (C4), and d_e >= T for 3 <= q <= T - 2; sets that have no W* are refused."""
    rng, signs = default_rng(3), lib.random_sign_encoding
    for d_e, T, q in [(6, 6, 1), (9, 6, 2), (7, 5, 3), (4, 4, 3)]:
        E = np.linalg.qr(rng.standard_normal((d_e, T)))[0]
        close(W := lib.widest_margin(E, q), E @ (np.eye(T) - 1 / T) @ E.T, 1e-9)
        assert lib.fixed_set_loss_at(50.0, W, 0.5) == pytest.approx((T - 1) / (4 * 0.5 * 50))
    for d_e, T, q in [(40, 6, 3), (60, 7, 4), (50, 9, 3)]:
        E, selected = signs(rng, d_e, T), lib.all_subsets(T, q)
        u_max, w = (lib.dual_query(E, selected) @ E)[selected == 0].max(), np.linalg.pinv(E).T.sum(axis=1)
        W = (E @ np.linalg.pinv(E) - np.outer(w, w) / (w @ w)) / (1 - u_max)
        close(lib.widest_margin(E, q), W, 1e-7)
    for q, sign in itertools.product((1, 2, 3), (1, -1)):  # equal encodings; opposite ones, whose query is 0
        E = signs(default_rng(q), 12, 6)
        E[:, 4] = sign * E[:, 1]
        for few in ([E] * (q > 1 or sign > 0) + [signs(default_rng(q), 2, 6)]):  # then too few numbers
            with pytest.raises(ValueError, match="E must be a set that some W separates"):
                lib.widest_margin(few, q)

def test_sequence_descent(S=2, n=3, T=4, q=2, d=3, d_e=6):
    """The descent of `samples` on several data sets is, in each, that of the full model's blocks (A5, A8)."""
    encodings = default_rng(27).choice([-1.0, 1.0], (5, S, d_e, T)) / math.sqrt(d_e)
    X, selected = (np.split(x, S) for x in lib.sample_batch(default_rng(28), S * n, T, q, d))
    V, W = np.zeros((S, d, d)), np.zeros((S, d_e, d_e))
    descent = run_all.sequence_descent(default_rng(28), iter(encodings), S, n, T, q, d, d_e, 0.9, 4)
    for E, (_, now, losses) in zip(encodings, descent):
        close(now[0], V, 1e-13), close(now[1], W, 1e-13)
        for k in range(S):
            loss, grad_V, grad_W = full_model(V[k], W[k], E[k], X[k], selected[k], "dual")
            close(losses[k], loss, 1e-13)
            V[k], W[k] = V[k] - 0.9 * grad_V[:, :d], W[k] - 0.9 * grad_W[d:, d:]

@pytest.mark.parametrize("n, T, q, c", [(60, 10, 2, 1.0), (60, 10, 2, 3.0), (80, 12, 3, 2.0)])
def test_regression_losses(n, T, q, c, d=20, d_e=64, h=0.05):
    """(N2) at given c: losses, ||dV/dc||^2 of the V that a linear solve finds for random sequences."""
    found, points, u = [], c + np.array([-h, 0, h]), lib.overlaps(default_rng(1), 20_000, T, q, d_e)
    means = [(a.mean(axis=0), a.T @ a / len(a)) for a in (attend(point * u) for point in points)]
    mean, second = means[1]
    for X in default_rng(25).standard_normal((40, n, d, T)):
        target = X[:, :, :q].mean(axis=2)
        gram = lambda square: np.tensordot(X @ square, X, ((0, 2), (0, 2)))
        before, V, after = (np.linalg.solve(gram(a_sq), (X @ a).T @ target).T for a, a_sq in means)
        train = ((target**2).sum() - np.vdot(V, target.T @ (X @ mean))) / (2 * n)
        test = ((V**2).sum() * np.trace(second) - 2 / q * np.trace(V) * mean[:q].sum() + d / q) / 2  # (P1)
        found.append((train, test, ((after - before)**2).sum() / (2 * h)**2))
    law = np.array(lib.regression_losses(points, n, T, q, d, lib.overlap_variance(q, d_e)))[:, 1]
    error = 3 * np.std(found, axis=0) / math.sqrt(40) / law
    close((np.mean(found, axis=0) / law - 1) / (np.array([0.03, 0.03, 0.06]) + error), np.zeros(3), 1.0)

@pytest.mark.parametrize("n, T, q, d, d_e, eta", [(36, 16, 2, 12, 40, 0.8), (64, 12, 3, 16, 64, 1.0)])
def test_finite_sample_loss(n, T, q, d, d_e, eta, steps=600, h=1e-3):
    """(N2): the midpoint rule in t; regression up to t = T/eta; (S6) at n = 10^9; least V if n < d - 1."""
    setting = n, T, q, d, lib.overlap_variance(q, d_e)
    at = lambda c: np.array(lib.regression_losses(c + h * np.arange(-2, 3), *setting))
    speed = lambda c: eta * (at(c)[0, 1] - at(c)[0, 3]) / (2 * h) / (d_e + at(c)[2, 2])
    c, dt = 0.0, (steps - T / eta) / 400
    for _ in range(400):
        c += dt * speed(c + dt * speed(c) / 2)
    close(lib.finite_sample_loss(steps, n, T, q, d, d_e, eta) / at(c)[:2, 2], [1, 1], 1e-3)
    start = d / 2 * (1 / q - 1 / T) * np.array([[1 - d / n], [(n - 1) / (n - d - 1)]])
    close(lib.finite_sample_loss([0.0, T / eta], n, T, q, d, d_e, eta) / start, np.ones((2, 2)), 1e-5)
    rest, X = (T, q, d, d_e, 1.4), default_rng(26).standard_normal((4000, 6, d, T))
    for t in (160, 642, 900):
        many, law = lib.finite_sample_loss(t, 10**9, *rest), lib.stochastic_trajectory(t, *rest)[2]
        close(many, [law, law], 0.012)
    V = (np.linalg.pinv(X.mean(axis=3)) @ X[..., :q].mean(axis=3)).swapaxes(1, 2)
    test = ((V**2).sum(axis=(1, 2)) / T - 2 / T * np.trace(V, axis1=1, axis2=2) + d / q) / 2
    train, law = lib.finite_sample_loss([[5.0]], 6, T, q, d, d_e, eta)
    assert train == 0 and abs(test.mean() - law.item()) < 3 * test.std() / 4000**0.5 < 0.02 * law.item()

@pytest.mark.parametrize("T, q, d", [(1, 1, 3), (4, 2, 3), (5, 5, 2), (3, 1, 1), (7, 3, 2), (2, 1, 4)])
def test_fcn_floors(T, q, d):
    """(F4, F6): the least eigenvalues of E s s^T/q^2 kron I; (F3): the part of the target that W1 misses."""
    subsets, rng, top = lib.all_subsets(T, q), default_rng(14), d / (2 * q)
    moment, widths = np.kron(subsets.T @ subsets / len(subsets) / q**2, np.eye(d)), np.arange(T * d + 3)
    least = [np.linalg.eigvalsh(moment)[:max(T * d - m, 0)].sum() / 2 for m in widths]
    close(2 * lib.fcn_loss_floor(widths, T, q, d, fisher=2.0), least, 1e-12, top)
    targets = np.einsum("bt,kl->bktl", subsets, np.eye(d)).reshape(-1, T * d) / q  # target_k = <row, vec(X)>
    scales = 10.0**rng.integers(-30, 30, (T * d + 2, 1))
    shapes = (3, T * d), (T * d + 2, T * d + T), (4, 2), (2, T * d)
    small, large, left, right = (rng.standard_normal(shape) for shape in shapes)
    for W1 in (small, large, left @ right, np.eye(T * d), np.eye(1, T * d + 5), np.zeros((2, T * d))):
        rows = W1[:, :T * d]
        seen = np.linalg.lstsq(rows.T, targets.T, rcond=1e-10)[0]
        want = ((targets.T - rows.T @ seen)**2).sum() / (2 * len(subsets))
        for matrix in (W1, W1 * scales[:len(W1)]):  # the row space alone matters
            close(3 * lib.fcn_first_layer_floor(matrix, T, q, d, fisher=3.0), want, 1e-12, top)
    for W1 in ([[1.0, 0.0], [1.0, 1e-8]], [[1.0, 0.0, 1e30, 0.0], [0.0, 1.0, 0.0, 0.0]]):  # far apart in size
        assert lib.fcn_first_layer_floor(W1, T=2, q=1, d=1) == 0

def test_fcn_floor_by_regression():
    """(F3): what regression of the targets of each y on W1 vec(X) leaves; not below (F4), after training too,
    on rows of 0 and 1 or indices of y."""
    rng, T, q, d, B, subsets = default_rng(24), 5, 2, 3, 60, lib.all_subsets(5, 2)
    layers = [rng.standard_normal((m, k)) @ rng.standard_normal((k, 20)) for m, k in ((1, 1), (20, 13))]
    for by_indices in (False, True):
        def batch():
            inputs, target, _, selected = run_all.fcn_batch(rng, B, T, q, d)
            if by_indices:
                inputs[:, T * d:] = np.pad(np.nonzero(selected)[1].reshape(B, q), ((0, 0), (0, T - q)))
            return inputs, target
        batches = iter(batch, None)
        layers.append(run_all.final(run_all.fcn_run(rng, 6, T, d, batches, 0.02, 100))[1][0])
    for rows in (W1[:, :T * d] for W1 in layers):
        rank, losses = np.linalg.matrix_rank(rows), []
        for X in rng.standard_normal((200, B, d, T)):
            vec, target = X.transpose(0, 2, 1).reshape(B, -1), (X @ subsets.T / q).reshape(B, -1)
            seen = np.linalg.svd(vec @ rows.T, full_matrices=False)[0][:, :rank]
            losses.append(((target - seen @ (seen.T @ target))**2).sum() / (2 * (B - rank) * len(subsets)))
        within_errors(losses, floor := lib.fcn_first_layer_floor(rows, T, q, d))
        assert floor >= lib.fcn_loss_floor(len(rows), T, q, d) - 1e-12

def test_exact_fcn():
    """(F5): exact to rounding wherever |x| < K, of width Td, and not beyond."""
    rng = default_rng(15)
    for T, q, d, K in [(1, 1, 1, 8.0), (5, 2, 3, 8.0), (4, 4, 2, 3.0), (7, 3, 1, 0.5)]:
        network, selected = lib.exact_fcn(T, q, d, K), lib.sample_batch(rng, 300, T, q, d)[1]
        assert network[0].shape == (T * d, T * d + T) and network[0].max() == 2 * K + 2
        X, low = K * rng.uniform(-1, 1, (300, d, T)), np.full((1, d, T), -3 * K)
        close(lib.fcn(*network, lib.fcn_inputs(X, selected)), lib.sts(X, selected), 100 * EPS, K)
        close(lib.fcn(*network, lib.fcn_inputs(low, selected[:1])), np.full((1, d), -K), 100 * EPS, K)
        last, before = lib.fcn_loss_floor([T * d, T * d - 1], T, q, d)
        assert last == 0 and (q == T or before > 0)

FOURTH = {"gaussian": 3.0, "rademacher": 1.0, "laplace": 6.0, "logistic": 4.2, "gumbel": 5.4,  # moments
          "student_t": 3 + 6 / (lib.STUDENT_DF - 4)}

@pytest.mark.parametrize("tokens", FOURTH)
def test_tokens(tokens):
    """Mean 0, variance 1, uncorrelated over entries and positions; error bars from the fourth moment."""
    assert set(FOURTH) == set(lib.TOKENS) and lib.STUDENT_DF > 8
    n, spread = 400_000, math.sqrt(FOURTH[tokens] - 1)
    X = lib.sample_batch(default_rng(17), n, 3, 2, 2, tokens)[0].reshape(n, 6)
    mean, covariance, bound = X.mean(axis=0), X.T @ X / n, normal_bound(6 + 36) / math.sqrt(n)
    allowed = bound * np.where(np.eye(6) == 1, spread, 1.0) + 1e-12
    assert (abs(mean) <= bound).all() and (abs(covariance - np.eye(6)) <= allowed).all()
    level = normal_bound(2) / math.sqrt(6 * n)
    assert abs(X.mean()) <= level and abs((X**2).mean() - 1) <= level * spread + 1e-12

@pytest.mark.parametrize("T, q", [(5, 2), (7, 1), (4, 3), (13, 13)])
def test_subsets_uniform(T, q):
    subsets, (_, selected) = lib.all_subsets(T, q), lib.sample_batch(default_rng(18), 30_000, T, q, 1)
    assert subsets.tolist() == [[i in y for i in range(T)] for y in itertools.combinations(range(T), q)]
    assert set(np.unique(selected)) <= {0, 1} and (selected.sum(axis=1) == q).all()
    uniform(selected, len(subsets))
    assert len(lib.all_subsets(84, 3)) == 95_284  # just below the limit

def test_random_entries():
    """All 2^6 patterns of signs at d_e = 2, T = 3 equally likely, entries +-1/sqrt(d_e); `init_fcn`."""
    signs = lib.random_sign_encoding(default_rng(19), 2, 3, 33_333)
    close(abs(signs), np.full((33_333, 2, 3), math.sqrt(0.5)), 1e-15)
    uniform(signs.reshape(-1, 6) > 0, 64)
    assert lib.overlaps(default_rng(0), 2, 3000, 1, 200)[:, 0] == pytest.approx(1.0)  # one row a piece
    W1, b1, A, b2 = lib.init_fcn(default_rng(16), m=60, T=30, d=4)
    assert (W1.shape, A.shape, b1.tolist(), b2.tolist()) == ((60, 150), (4, 60), 60 * [0], 4 * [0])
    for sample, mean in ((W1**2, 2 / 150), (A**2, 1 / 60), (W1, 0.0)):
        within_errors(sample.ravel(), mean)

def test_task_by_loops():
    rng = default_rng(20)
    (X, selected), E = lib.sample_batch(rng, 3, 5, 2, 2), rng.standard_normal((3, 4, 5))
    e_query, inputs = lib.sum_query(E, selected), lib.fcn_inputs(X, selected)
    Z, z_query = lib.full_inputs(X, E, e_query)
    for b in range(3):
        chosen = [i for i in range(5) if selected[b, i]]
        close(lib.sts(X, selected)[b], sum(X[b, :, i] for i in chosen) / 2, 1e-15)
        close(e_query[b], sum(E[b, :, i] for i in chosen), 1e-15)
        assert all(Z[b, :, i].tolist() == [*X[b, :, i], *E[b, :, i]] for i in range(5))
        assert z_query[b].tolist() == [0, 0, *e_query[b]]
        assert inputs[b].tolist() == [x for i in range(5) for x in X[b, :, i]] + selected[b].tolist()
    assert lib.full_inputs(X, E[0], e_query)[0][2, 2:].tolist() == E[0].tolist()

def bowl(*params):
    return sum(np.sum(param * param) for param in params) / 2, *params

def test_gradient_descent():
    start = np.array([1.0, -2.0]), 3.0
    states = list(lib.gradient_descent(start, bowl, 0.5, 6))  # nothing that it yielded is changed later
    for k, (t, params, loss) in enumerate(states):
        assert (t, loss, *map(np.size, params)) == (k, 7 * 0.25**k, 2, 1)
        assert all(np.array_equal(param, np.multiply(first, 0.5**k)) for param, first in zip(params, start))
    assert len(states) == 7 and start[0].tolist() == [1.0, -2.0]
    states = lib.gradient_descent((given := np.array([1.0]),), bowl, 0.5, 1)
    given[0] = 7.0
    assert [param.item() for _, (param,), _ in states] == [1.0, 0.5]
    assert [t for t, *_ in lib.gradient_descent((1,), lambda x: (0.0, 1e308), 1e10, 0)] == [0]

@pytest.mark.parametrize("loss_and_grads, rate, step", [
    (lambda x: (x * x, 2 * x), 1e100, 2), (lambda x: (0.0 * x, x * 1e200), 1e200, 1),
    (lambda x: (x if x > 0.5 else np.nan, 1.0), 0.25, 2), (lambda x: (np.inf, x), 0.125, 0),
    (lambda x: (np.array([1.0, np.nan]), x), 0.125, 0), (lambda x: (0.0, 1e308), 1e10, 1),
    (lambda x: (x, x) if x > 0.6 else math.exp(1e3), 0.25, 2)])
@pytest.mark.parametrize("others", [False, True])
def test_divergence(loss_and_grads, rate, step, others):
    """Named with its step and rate, in the last of several parameters and in one entry alone too."""
    among_others = lambda x, y: (loss_and_grads(y[1])[0], 0.0, np.array([0.0, *loss_and_grads(y[1])[1:]]))
    start, run = ((0.0, [0.0, 1.0]), among_others) if others else ((1.0,), loss_and_grads)
    with pytest.raises(FloatingPointError, match=rf"{re.escape(f'{rate:g}')}\b.* step {step}\b"):
        list(lib.gradient_descent(start, run, rate, 50))

@pytest.mark.parametrize("grads", [
    lambda x, y: (0.0, x), lambda x, y: (0.0, y, y), lambda x, y: (0.0, x, y, y), lambda x, y: 0.0,
    lambda x, y: (0.0, x[None], y), lambda x, y: (0.0, x, None), lambda x, y: (0.0, x, "y"),
    lambda x, y: (0.0, 1j * x, y), lambda x, y: [0.0, x, y], lambda x, y: (0.0, [1.0, 2.0], y),
    lambda x, y, calls=itertools.count(): (0.0, x if next(calls) % 3 < 2 else x[:1], y)])
def test_gradients_that_do_not_fit(grads):
    """The last of them at the third step alone: not broadcast."""
    for run in (grads, lib.adam(grads, 3)):
        with pytest.raises(ValueError, match="loss_and_grads.* got "):
            list(lib.gradient_descent((np.ones(2), 1.0), run, 1.0, 3))

def test_adam():
    """The algorithm, its rate falling to 0 over the last 30 % of the steps; refused are a second run, a long
    one, and squares beyond float64 (3e155: after the correction of the start alone)."""
    x, h, first, second = np.array([1.0, -2.0, 0.5]), np.array([1.0, 10.0, 0.1]), 0.0, 0.0
    wrapped = lib.adam(lambda x: ((h * x * x).sum() / 2, h * x), 40, 0.8, 0.95)
    for t, (param,), _ in lib.gradient_descent((x,), wrapped, 0.1, 40):
        assert param == pytest.approx(x, rel=1e-12, abs=1e-14)
        first, second = 0.8 * first + 0.2 * h * x, 0.95 * second + 0.05 * (h * x)**2
        rate = 0.1 * min(1.0, (40 - t) / 12)
        x = x - rate * first / (1 - 0.8**(t + 1)) / (np.sqrt(second / (1 - 0.95**(t + 1))) + 1e-8)
    run = lambda wrapped: [x for _, (x,), _ in lib.gradient_descent((1.0,), wrapped, 0.1, 5)]
    used = lib.adam(bowl, 5)
    assert run(lib.adam(lambda x: (x, np.float32(1e20)), 5))[1] == pytest.approx(0.9) == run(used)[1]
    for wrapped in (used, lib.adam(bowl, 4)):
        with pytest.raises(ValueError, match="steps must be .* one run"):
            run(wrapped)
    for size in (1e200, 3e155):
        with pytest.raises(FloatingPointError, match="step 0 the square of a gradient"):
            run(lib.adam(lambda x: (x, size * x), 5))

# ---- limits of size, and what is let in at the door ------------------------------------------------------

@pytest.mark.parametrize("size", [800.0, 1e100, 1e300])
def test_one_hot_attention(size):
    """Scores up to 1e300: attention is one-hot, the loss that of reading one token, its gradients finite."""
    scores = default_rng(2).standard_normal((3, 2, 5)) * 10
    close(ag.softmax(scores), attend(scores), 1e-15)
    close(ag.softmax(scores + 1e6), ag.softmax(scores), 1e-8)
    close(ag.softmax([[size, 0.0], [0.0, math.log(3)]]), [[1, 0], [0.25, 0.75]], 1e-15)  # each row by itself
    rows = [[-size, size, 0.0], [size, size, -size], [-size, -2 * size, -size]]
    assert ag.softmax(rows).tolist() == [[0, 1, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]]
    Z, z_query, target = np.array([[[2.0, 3.0], [1.0, 0.0]]]), np.array([[0.0, 1.0]]), np.array([[2.5]])
    V, W = np.array([[1.0, 0.0]]), np.diag([0.0, size])
    loss, grad_V, grad_W = ag.attention_loss_and_grads(V, W, Z, z_query, target)
    assert (loss, grad_V.tolist(), abs(grad_W).max()) == (0.125, [[-1.0, -0.5]], 0.0)
    assert [lib.transformer(V, sign * W, Z, z_query).item() for sign in (1, -1)] == [2.0, 3.0]
    assert ag.population_loss_and_grads([[1.0]], [[size]], [[1.0, 0.0]], [[1.0]], [[1, 0]])[0] == 0
    for T, q, omega, loss in [(5, 2, size, 0.0), (5, 2, -size, 3 / 2 * (1 / 2 + 1 / 3)), (4, 4, size, 0.0),
                              (4, 4, -size, 0.0), (1, 1, -size, 0.0)]:
        assert ag.one_hot_loss_and_grads(1.0, omega, T, q, 3)[0] == pytest.approx(loss, rel=1e-14)
    u = [[1.0, 1.0, 0.5], [1.0, 1.0, -1.0]]
    assert ag.stochastic_loss_and_grads(1.0, size, u, 2, 3, 4) == (0, 0, 0)
    losses = lib.overlap_loss(size, u, 2, 3), lib.stochastic_loss(size, 9, 2, 3, 0.0)
    assert (*losses, lib.length_loss(1.0, size, 9, 2, 3, 0.0)) == (0, 0, 0)

@pytest.mark.parametrize("name, sizes, rest", [
    ("escape_time", (100_000, 3, 50_000), (0.5,)), ("largest_stable_eta", (100_000, 70_000, 9), ()),
    ("fcn_loss_floor", (100, 100_000, 70_000, 50_000), ()), ("overlap_variance", (60_000, 70_000), ()),
    ("stochastic_floor", (100_000, 3, 50_000, 100_000), ("sum",)), ("required_dimension", (10**5, 7), (0.1,)),
    ("one_hot_loss_at", (1e9, 100_000, 70_000, 9), (1.0,))])
def test_sizes(name, sizes, rest):
    """NumPy's integers give what Python's give, where products overflow; arrays of sizes broadcast."""
    for kind in (np.int32, np.int64):
        close(PUBLIC[name](*map(kind, sizes), *rest), PUBLIC[name](*sizes, *rest), 1e-14)
    assert lib.fcn_loss_floor([10**10], T=10**9, q=10**9, d=10**10).tolist() == [0.0]
    assert lib.one_hot_loss_at([1.0, 2.0], T=2**33, q=2**32, d=1, eta=1.0).tolist() == [2**-34, 2**-34]
    for key, several, others in [*((key, np.array([4, 5, 6]), (8, 2, 3)) for key in "Tqd"),
                                 ("T", np.int32([100_000]), np.int32([0, 70_000, 70_000]))]:
        sizes = {**dict(zip("Tqd", others)), key: several}
        rows = [{name: int(size) for name, size in {**sizes, key: one}.items()} for one in several]
        together, *alone = (ag.one_hot_loss_and_grads(1.0, 0.5, **row) for row in (sizes, *rows))
        for result, each in zip(together, zip(*alone)):
            close(result, each, 4 * EPS)
        ends = [run_all.final(lib.one_hot_recursion(**row, eta=0.5, steps=20))[2] for row in (sizes, *rows)]
        close(ends[0], ends[1:], 1e-14)

def test_pieces():
    """A batch of several pieces is the mean of its samples, and needs no more memory than a small one."""
    def peak(call):
        tracemalloc.start()
        result, size = call(), tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result, size
    rng, D, T, found = default_rng(21), 24, 64, []
    for B in (7803, 978):  # pieces of 195, at last of 3
        V, W, *data = (rng.standard_normal(shape) for shape in ((2, D), (D, D), (B, D, T), (B, D), (B, 2)))
        whole, size = peak(lambda: ag.attention_loss_and_grads(V, W / D, *data))
        found.append((size, peak(lambda: lib.overlaps(rng, 2 * B, T, 3, 64))[1] - 8 * 2 * B * T))
    assert all(large <= 1.1 * small + 2**16 for large, small in zip(*found))
    samples = [ag.attention_loss_and_grads(V, W / D, *(x[b:b + 1] for x in data)) for b in range(B)]
    for got, one in zip(whole, zip(*samples)):
        close(got, np.mean(one, axis=0), 1e-12)

SIGNATURES = """softmax(scores); attention_lines(V, W, Z, z_query, target); fcn(W1, b1, A, b2, inputs);
attention_loss_and_grads(V, W, Z, z_query, target); population_loss_and_grads(V, W, E, e_query, selected);
one_hot_loss_and_grads(alpha, omega, T, q, d); stochastic_loss_and_grads(alpha, c, overlaps, q, d, d_e);
fcn_lines(W1, b1, A, b2, inputs, target); fcn_loss_and_grads(W1, b1, A, b2, inputs, target); sts(X, selected);
sample_batch(rng, B, T, q, d, tokens='gaussian'); all_subsets(T, q); one_hot_encoding(T);
random_sign_encoding(rng, d_e, T, B=None); dual_query(E, selected); fixed_set_loss_at(t, W_star, eta);
overlaps(rng, B, T, q, d_e, query='dual'); full_inputs(X, E, e_query); widest_margin(E, q, query='dual');
transformer(V, W, Z, z_query); fcn_inputs(X, selected); init_fcn(rng, m, T, d); required_dimension(T, q, eps);
gradient_descent(params, loss_and_grads, learning_rate, steps); one_hot_recursion(T, q, d, eta, steps);
adam(loss_and_grads, steps, beta1=0.9, beta2=0.999); one_hot_loss_at(t, T, q, d, eta, d_e=None);
escape_time(T, q, d, eta); largest_stable_eta(T, q, d, full=True); overlap_variance(q, d_e, query='dual');
overlap_loss(c, overlaps, q, d); stochastic_loss(c, T, q, d, sigma2); length_loss(alpha, c, T, q, d, sigma2);
stochastic_trajectory(t, T, q, d, d_e, eta); stochastic_floor(T, q, d, d_e, query='dual');
finite_sample_loss(t, n, T, q, d, d_e, eta); sum_query(E, selected); fcn_loss_floor(m, T, q, d, fisher=1.0);
fcn_first_layer_floor(W1, T, q, d, fisher=1.0); exact_fcn(T, q, d, K=8.0)"""
# Arguments that work, of small integers so that every kind of array can hold them; rng is a seed
X, Z, MANY = (np.arange(size) % 5.0 - 2 for size in (16, 24, 36))
Y, U = np.array([[1.0, 1, 0, 0], [0, 1, 0, 1]]), np.array([[1.0, 1, 0, -1], [1, 1, 2, 0]])
KEY, VALUE = np.array([[1.0, 0, 1], [0, 1, 1]]), np.array([[1.0, 0, 2], [0, 1, -1]])
USUAL = {"X": X.reshape(2, 2, 4), "selected": Y, "e_query": KEY, "z_query": KEY, "Z": Z.reshape(2, 3, 4),
         "E": np.array([[1.0, -1, 1, 1], [1, 1, -1, 1], [1, 1, 1, -1]]), "overlaps": U, "W": np.eye(3),
         "V": VALUE, "A": VALUE, "scores": U, "target": KEY[:, :2] + 1, "W1": MANY.reshape(3, 12), "m": 3,
         "b1": np.array([1.0, -1, 0]), "b2": np.array([0.0, 1]), "inputs": np.eye(2, 12), "W_star": np.eye(2),
         "rng": 0, "B": 3, "T": 4, "q": 2, "d": 3, "d_e": 5, "n": 9, "alpha": 2.0, "omega": 1.0, "c": 2.0,
         "t": 8.0, "eta": 0.5, "sigma2": 0.125, "eps": 0.5, "K": 4.0, "fisher": 2.0, "full": False,
         "steps": 3, "tokens": "laplace", "query": "dual", "learning_rate": 0.5, "beta1": 0.5, "beta2": 0.75,
         "loss_and_grads": bowl, "params": (np.array([1.0, 2.0]), 3.0)}
GOOD = {line.split("(")[0]: {key: USUAL[key] for key in re.findall(r"(\w+)(?:=[^,)]*)?[,)]", line)}
        for line in re.split(r";\s", SIGNATURES)}
for name in ("stochastic_trajectory", "finite_sample_loss"):
    GOOD[name] |= {"t": 16.0, "T": 8, "d_e": 64, "eta": 1.0}
for name, key, value in [("population_loss_and_grads", "V", KEY[:, :2] + 1), ("escape_time", "T", 9),
                         ("stochastic_floor", "q", 3), ("stochastic_floor", "query", "sum"),
                         ("widest_margin", "E", np.eye(4))]:
    GOOD[name][key] = value

def test_public_functions():
    for line in re.split(r";\s", SIGNATURES):
        assert line.split("(")[0] + str(inspect.signature(PUBLIC[line.split("(")[0]])) == line
    assert {name for name, _, _ in BAD} == {*PUBLIC, "run_all"} and set(GOOD) == set(PUBLIC)
    for name, function in PUBLIC.items():
        assert all(part in function.__doc__ for part in ("Returns: ", "Raises", ">>> ")), name

def flat(result):
    """The leaves of a result: generators run out, functions called."""
    result = list(result) if inspect.isgenerator(result) else result
    result = result(np.array([1.0, 2.0])) if callable(result) else result
    parts = list(result.values()) if isinstance(result, dict) else result
    return [leaf for part in parts for leaf in flat(part)] if isinstance(parts, (tuple, list)) else [result]

def call(function, arguments):
    return flat(function(**{key: default_rng(value) if key == "rng" and type(value) is int else value
                            for key, value in arguments.items()}))

FORMS = {  # what becomes of arrays, sizes and numbers
    "lists": (np.ndarray.tolist, int, float), "fortran": (np.asfortranarray, int, np.array),
    "strided": (lambda array: np.repeat(array, 2, axis=-1)[..., ::2], int, float),
    "integers": (lambda array: array.astype(int), np.int64, lambda x: int(x) if x % 1 == 0 else x),
    "float32": (lambda array: array.astype(np.float32), np.uint8, np.float32),
    "read-only": (lambda array: np.broadcast_to(array, array.shape), int, np.float64)}

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GOOD)
def test_forms(name, form):
    """Lists, integers, float32, read-only and strided arrays give the same float64; no input changes."""
    kinds = {**dict(zip((np.ndarray, int, float), FORMS[form])), tuple: lambda v: tuple(map(convert, v))}
    convert = lambda value: kinds.get(type(value), lambda same: same)(value)
    arguments = {key: value if key == "rng" else convert(value) for key, value in GOOD[name].items()}
    before, errors = copy.deepcopy(arguments), np.geterr()
    got, want = call(PUBLIC[name], arguments), call(PUBLIC[name], GOOD[name])
    assert np.geterr() == errors
    for key, value in before.items():
        assert callable(value) or str(value) == str(arguments[key]), f"{key} was changed"
    for left, right in zip(got, want):
        assert np.asarray(left).dtype == (int if type(right) is int else np.float64)
        close(left, right, 50 * EPS)  # sums run in another order

RAGGED, NAN, INF = [[1.0], [1.0, 2.0]], float("nan"), float("inf")
POSITIVE = [0.0, -1.0, NAN, INF, "1", None, 1j, True, [1.0, 2.0], RAGGED, np.longdouble("1e-4000")]
SIZE = [0, -1, 2.0, 2.5, True, "3", None, NAN, 1j, [2, 2], RAGGED, 2**63, np.uint64(2**63), 10**400]
KINDS = {"rng": [None, "0", np.random, np.random.RandomState(0)], "tokens": ["gauss", None, 3, ["gaussian"]],
         "query": ["both", None, 3, ["sum"]], "loss_and_grads": [None, 3, "f"], "full": [None, 1, 0.0, "no"],
         "params": [None, 1.0, [1.0], (), ("x",), (NAN,), (1.0, None), (RAGGED,), (1j,), ([],), (True,)],
         "steps": [-1, 1.5, 0.0, True, False, None, "3", NAN, [1], np.array([0, 1]), RAGGED],
         **dict.fromkeys(("eta", "learning_rate", "K"), POSITIVE), "fisher": [*POSITIVE, 0.5],
         **dict.fromkeys(("beta1", "beta2", "eps"), [*POSITIVE, 1.0, 2]),
         **dict.fromkeys(["alpha", "omega", "c", "t", "sigma2"], [NAN, INF, "", None, 1j, RAGGED, [], [NAN]])}

def bad_values(name, key, value):
    """What each argument must refuse, by its kind."""
    if isinstance(value, np.ndarray):
        bad = ["text", None, RAGGED, value + 0j, value[:0], value.astype(object), 1.0, np.ma.array(value)]
        holes = [NAN, INF, np.longdouble("1e4000")] if name not in ("full_inputs", "fcn_inputs") else []
        bad += [np.where(np.arange(value.size).reshape(value.shape) == 1, hole, value) for hole in holes]
        return bad + [value[None, None]] * (key != "scores")
    if (name, key) == ("fcn_loss_floor", "m"):
        return [-1, 2.0, True, "3", None, NAN, RAGGED, [], [1, -1]]
    allowed = ["None"] * ((name, key) in (("random_sign_encoding", "B"), ("one_hot_loss_at", "d_e")))
    allowed += ["[2, 2]"] * (name in ("one_hot_loss_and_grads", "one_hot_recursion"))
    return KINDS.get(key) or [bad for bad in SIZE if str(bad) not in allowed]

BAD = [(name, {key: bad}, [key]) for name, good in GOOD.items() for key, value in good.items()
       for bad in bad_values(name, key, value)]
BAD += [(name, {"q": good["T"] + 1}, ["q", "T"]) for name, good in GOOD.items() if {"T", "q"} <= set(good)]
BAD += [(name, {"q": GOOD[name].get("T", 4)}, ["q"]) for name in (  # they need q < T
    "one_hot_loss_at", "escape_time", "stochastic_loss", "stochastic_trajectory", "length_loss",
    "overlap_loss", "stochastic_floor", "required_dimension", "widest_margin", "finite_sample_loss")]
BAD += [(name, {"selected": bad}, ["selected"]) for name in GOOD if "selected" in GOOD[name] for bad in (
    0 * Y, 2 * Y, Y / 2, -Y, 1e308 * Y, 1e308 + 0 * Y, [[1, 1, 0, 0], [1, 0, 0, 0]], Y[:, :3], Y[0])]
BAD += [(name, {key: np.ones(tuple(map(int, shape.split())))}, [key, other or key]) for name, shapes in {
    "attention_loss_and_grads": "W 4 4 as V, W 3 2 as V, Z 2 4 4 as V, Z 2 3 0, z_query 3 3 as Z, "
                                "z_query 2 2 as V, target 2 3 as V, target 1 2 as Z",
    "population_loss_and_grads": "V 2 3, E 4 4 as W, e_query 2 4 as W", "fcn_first_layer_floor": "W1 3 11",
    "full_inputs": "E 3 5 as X, E 3 3 4 as X, e_query 2 2 as E, e_query 1 3 as X", "sts": "selected 3 4 as X",
    "fcn_loss_and_grads": "inputs 2 11 as W1, b1 4 as W1, A 2 4 as W1, b2 3 as A, target 1 2 as inputs",
    "transformer": "Z 2 4 4 as V, z_query 1 3 as Z", "fcn": "inputs 12, A 3 2 as W1",
    "fcn_inputs": "selected 2 5 as X", "fixed_set_loss_at": "W_star 2 3"}.items()
        for key, shape, other in re.findall(r"(\w+) ([\d ]+)(?:as (\w+))?", shapes)]
BAD += [(name, {key: bad}, [key]) for name, key, *several in [
    ("all_subsets", "T", 448, 1000, 10**6, 10**18), ("overlap_variance", "q", 9), ("escape_time", "q", 5),
    ("adam", "steps", 0), ("softmax", "scores", [10**400], [2**62, 2**62 + 1]), ("overlap_loss", "c", [1, 2]),
    ("stochastic_loss", "c", -1.0, 4.5), ("stochastic_loss", "sigma2", -0.1, [0.1, 0.1]),
    ("length_loss", "c", -1.0, [1.0, 9.0]), ("length_loss", "sigma2", -1), ("one_hot_recursion", "d", [1, 0]),
    ("one_hot_loss_at", "t", -1.0, [1.0, -2.0]), ("stochastic_trajectory", "t", -1.0, 1e300),
    ("stochastic_trajectory", "q", 65), ("finite_sample_loss", "t", -1, 1e9), ("fixed_set_loss_at", "t", 0.0),
    ("finite_sample_loss", "n", 2, 3, 4), ("stochastic_loss_and_grads", "c", [1.0, 2.0, 3.0, 4.0]),
    ("stochastic_loss_and_grads", "alpha", [1.0, 2.0]), ("stochastic_loss_and_grads", "q", 5),
    ("one_hot_loss_and_grads", "T", [4, 1], np.array([2**63], dtype=np.uint64)), ("init_fcn", "m", 2**40),
    ("widest_margin", "E", np.eye(2, 200)), ("sample_batch", "B", 2**62), ("one_hot_encoding", "T", 2**31),
    ("overlaps", "B", 2**40), ("overlaps", "d_e", 2**40), ("exact_fcn", "T", 2**20)] for bad in several]
BAD += [(name, bad, [*bad]) for name, bad in [  # what does not broadcast, what cannot be allocated
    ("one_hot_loss_and_grads", {"alpha": [1.0, 2.0], "omega": [1.0, 2.0, 3.0]}),
    ("one_hot_recursion", {"T": [4, 5], "q": [1, 2, 3]}), ("length_loss", {"alpha": [1, 2], "c": [1, 2, 3]}),
    ("all_subsets", {"T": 2**40, "q": 2**40}), ("random_sign_encoding", {"d_e": 2**62, "T": 2**62})]]
BAD += [("dual_query", {"E": np.ones((2**15, 16)), "selected": np.ones((2**12, 16))}, ["B", "q", "d_e"]),
        ("all_subsets", {"T": 4, "q": 9}, ["q must be at most T, T = 4; got 9"]),
        ("softmax", {"scores": [1.0, NAN]}, ["scores must be finite; got nan"]),
        ("fcn", {"b1": np.ones(4)}, ["b1 must be of shape (m,) with m = 3 as in W1; got (4,)"]),
        ("sts", {"X": np.ma.masked_array(USUAL["X"])}, ["got masked_array"])]
BAD += [("run_all", line.split(" "), [argument]) for argument, lines in {
    "--only": ["--only nothing", "--only ", "--only dynamics,"],
    "--seed": ["--seed -1", "--seed x", "--seed 1.5", "--seed"],
    "--trace": ["--trace 0", "--trace -2", "--trace 1e3", f"--trace {10**30}"],
    "T": [f"--trace 1 --T {x}" for x in (0, -4, "x", "40 --q 20", "1000 --q 999 --d 1", 90_000, 2**64 - 1)],
    "q": ["--trace 1 --q 9", "--trace 1 --q 0"], "d": ["--trace 1 --d 0", "--trace 1 --d 10000000"],
    "eta": ["--trace 1 --eta 0", "--trace 1 --eta nan", "--trace 1 --eta inf"], "--nonsense": ["--nonsense"],
    "--T": ["--T 5", "--T 5 --quick"], "dynamics": ["dynamics"], "--m": ["--trace 1 --m 5"],
    **{word: [f"--trace 1 --model {line}"] for word, line in {
        "--d_e": "attention --d_e 2", "3844": "attention --T 60", "5400": "fcn --m 600", "--model": "x",
        "2^40": "stochastic --T 20"}.items()}}.items() for line in lines]
BAD += [("run_all", ["--out", str(ROOT / "run_all.py" / path)], ["--out"]) for path in ("", "below", "a\nb")]

@pytest.mark.parametrize("name", [*GOOD, "run_all"])
def test_bad_input(name, capsys):
    """A ValueError, or exit status 2 with one line on stderr, that names the argument and what was given."""
    for bad, words in [case[1:] for case in BAD if case[0] == name]:
        refused, message = False, "let in"
        try:
            run_all.main(bad) if name == "run_all" else call(PUBLIC[name], GOOD[name] | bad)
        except ValueError as error:
            refused, message = type(error) is ValueError and "got " in str(error), str(error)
        except SystemExit as end:
            output, message = capsys.readouterr()
            refused = end.code == 2 and (output, message.count("\n")) == ("", 1)
        missing = [word for word in words if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message)]
        assert refused and not missing, f"{bad}: {message}; not named: {missing}"

@pytest.mark.parametrize("name, huge", [
    ("attention_loss_and_grads", {"V": 1e200, "Z": 1e200}), ("transformer", {"V": 1e200, "Z": 1e200}),
    ("fcn", {"W1": 1e200, "inputs": 1e200}), ("sts", {"X": 1.7e308}), ("sum_query", {"E": 1.7e308}),
    ("overlap_loss", {"c": 1e308}), ("length_loss", {"alpha": 1e200}), ("fcn", {"W1": 1e200, "A": 1e200}),
    ("population_loss_and_grads", {"V": 1e200}), ("stochastic_loss_and_grads", {"alpha": 1e160}),
    ("one_hot_loss_at", {"t": 1e300, "eta": 1e300}), ("escape_time", {"eta": 5e-324}),
    ("exact_fcn", {"K": 1e308}), ("dual_query", {"E": 1e-310}), ("one_hot_loss_and_grads", {"alpha": 1e200}),
    ("fixed_set_loss_at", {"W_star": 1e160}),  # then one result alone: the loss, a gradient, the hidden layer
    ("attention_loss_and_grads", {"V": 0.0, "target": 1e155}), ("fcn_loss_and_grads", {"target": 1e155}),
    ("attention_loss_and_grads", {"V": 0.0, "W": 0.0, "Z": 1e200, "target": 1e150}),
    ("attention_loss_and_grads", {"V": 1e-150 * VALUE, "W": 0.0, "Z": 1e150 * USUAL["Z"], "z_query": 1e200}),
    ("stochastic_loss_and_grads", {"alpha": 1e155, "overlaps": 0.0}),
    ("stochastic_loss_and_grads", {"alpha": 1e9, "c": 0.0, "overlaps": 1e300 * U}),
    ("fcn_loss_and_grads", {"W1": -1e200, "inputs": 1e200}), ("fcn", {"W1": -1e200, "inputs": 1e200}),
    ("fcn_loss_and_grads", {"W1": 1e-300, "b1": 0.0, "inputs": 1e200, "A": 1e107})])
def test_overflow(name, huge):
    """Finite input with a result beyond float64 is an error, not a warning."""
    with pytest.raises(OverflowError):
        call(PUBLIC[name], GOOD[name] | {key: size + 0 * GOOD[name][key] for key, size in huge.items()})

def test_error_states():
    """Sharp attention works under np.seterr(all="raise"), and each of two threads at work keeps its own."""
    def work(mode, together=threading.Barrier(2, timeout=30)):
        np.seterr(all=mode)
        together.wait()
        for _ in range(100):
            assert ag.softmax([0.0, -1000.0]).tolist() == [1.0, 0.0]
            ag.one_hot_loss_and_grads(1.0, 800.0, 4, 2, 3), lib.overlap_loss(900.0, [[1.0, 0.0, 0.0]], 1, 2)
        lib.stochastic_loss(900.0, 9, 2, 3, 0.0), lib.stochastic_trajectory(1e3, 9, 2, 3, 10**6, 1.0)
        return set(np.geterr().values())
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, ("raise", "warn"))) == [{"raise"}, {"warn"}]

def source(name):
    """The lines of a definition of the library, if it is one, without decorator, docstring and comments."""
    library = inspect.getsource(ag) + inspect.getsource(lib)
    found = re.search(rf"^(def {name}\(|{name} = ).*\n((?:[ )}}].*)?\n)*", library, re.M)
    code = re.sub(r'^    """.*?"""\n', "", found[0] if found else "", count=1, flags=re.M | re.S)
    return [line for line in code.splitlines() if line.strip() and not line.lstrip().startswith("#")]

def globals_of(code):
    return set(code.co_names).union(*(globals_of(part) for part in code.co_consts if inspect.iscode(part)))

def copied(name, taken=()):
    """`name` after the definitions of the library that it names, to the last: what to copy with it."""
    for word in sorted(globals_of(compile("\n".join(source(name)), name, "exec")) - {name}):
        if word not in taken and source(word):
            taken = copied(word, taken)
    return [*taken, name]

@pytest.mark.parametrize("name", GOOD)
def test_copies(name):
    """`__wrapped__`, and the source without its decorator beside what it names, alone: the same bits."""
    imports = re.findall(r"^import .*", inspect.getsource(ag) + inspect.getsource(lib), re.M)
    code, alone, want = copied(name), {}, call(PUBLIC[name], GOOD[name])
    exec("\n".join([*imports, *itertools.chain(*map(source, code))]), alone)
    assert PUBLIC[name].__module__ != "analytic_grads" or len({*code} - {name, "softmax"}) <= 2
    for function in (PUBLIC[name].__wrapped__, alone[name]):
        got = call(function, GOOD[name])
        assert [np.asarray(x).dtype for x in got] == [np.asarray(x).dtype for x in want]
        assert len(got) == len(want) and all(map(np.array_equal, got, want))

def test_shape_of_the_files():
    """(A1)-(A8) come first, one a line; files, lines, functions are short; private names stay at home."""
    first = re.findall(r"# \((A\d)\).*", "\n".join(inspect.getsource(ag).splitlines()[:40]))
    assert first == [f"A{k}" for k in range(1, 9)]
    for module, most in (ag, 330), (lib, 800), (run_all, 1150), (sys.modules[__name__], 1340):
        text = inspect.getsource(module)
        assert text.count("\n") <= most and max(map(len, text.splitlines())) <= 110, module
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        assert [node.name for node in functions if node.end_lineno - node.lineno >= 90] == []
        assert not re.search(r"\b(ag|lib|run_all)\._[a-z]|^from .* import (\([^)]*|.*)\b_[a-z]", text, re.M)

README = (ROOT / "README.md").read_text(encoding="utf-8")
numbers = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]\d+)?(?!\w|\.\d)").findall

def test_docstring_examples(tmp_path):
    """Those of analytic_grads.py where it is alone."""
    failed, tried = doctest.testmod(lib)
    (tmp_path / "analytic_grads.py").write_bytes((ROOT / "analytic_grads.py").read_bytes())
    script = "import analytic_grads, doctest; print(*doctest.testmod(analytic_grads))"
    done = python("-c", script, cwd=tmp_path, env={"PYTHONPATH": ""})
    assert failed == 0 and tried >= 30 and re.fullmatch(r"0 \d\d\n", done[1]), done

def test_readme_snippets(tmp_path, monkeypatch, capsys):
    """Every snippet runs, in order, in one namespace; the answer to an exercise has all numbers it prints."""
    monkeypatch.chdir(tmp_path)
    names, (before, exercises) = {}, re.split(r"^## .*Exercises\n", README, flags=re.M)
    snippets = [(snippet, "") for snippet in re.findall(r"^```python\n(.*?)^```", before, re.M | re.S)]
    answered = re.findall(r"^```python\n(.*?)^```(.*?)(?=^\*\*\d+\.|^## )", exercises, re.M | re.S)
    assert snippets and len(answered) == len(re.findall(r"^\*\*\d+\. ", exercises, re.M)) >= 8
    for snippet, answer in snippets + answered:
        exec(snippet, names)
        left, lines = numbers(answer), capsys.readouterr().out.splitlines()
        for number in [number for line in lines for number in sorted(set(numbers(line)))] if answer else ():
            assert number in left, f"{number} is not in the answer to\n{snippet}"
            left.remove(number)

def tags(text):
    """The tags named in a text; ranges from the first to the last, and lists, are expanded."""
    one, found = r"[APOCSLFGN]\d+", set()
    group = rf"\(({one}(?:(?:,\s*|\s+and\s+|-){one})*)\)(?:\s*(?:-|–|to)\s*\(({one})\))?"
    for inside, last in re.findall(group, text):
        inside += f"-{last}" if last else ""
        found.update(re.findall(one, inside))
        for first, end in re.findall(rf"({one})-({one})", inside):
            found.update(f"{first[0]}{k}" for k in range(int(first[1:]), int(end[1:]) + 1))
    return found

def test_tags_are_honest():
    """Every display has a tag; what is used is derived, and what is derived is used."""
    assert all("\\tag{" in display for display in re.findall(r"^```math\n(.*?)^```", README, re.M | re.S))
    files = ag, lib, run_all, sys.modules[__name__]
    used = {file.__name__: tags(inspect.getsource(file)) for file in files}
    derived = set(re.findall(r"\\tag\{\(?([A-Z]\d+)\)?\}", README))
    derived |= set().union(*map(tags, re.findall(r"\*\*(\([^*]*\))", README)))
    assert {name: found - derived for name, found in used.items()} == dict.fromkeys(used, set())
    assert sorted(derived - set().union(*used.values())) == []

def test_readme_names_what_exists():
    """Figures, tests, claims; 3,000 words outside folds, code and tables; lines to copy as its table says."""
    assert all((ROOT / path).exists() for path in re.findall(r"figures/[\w.-]+\.\w+", README))
    assert set(re.findall(r"\btest_\w+", README)) <= {"test_reference", *globals()}
    claims = csv.DictReader((ROOT / "figures" / "claims.csv").read_text(encoding="utf-8").splitlines())
    named = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^(?:\|[^|\n]*){5}\|([^|\n]*)\|$", README, re.M)))
    assert named and set(named) <= {row["id"] for row in claims}
    assert len({README.count(part) for part in ("<details>", "</details>", "<summary>", "</summary>")}) == 1
    rest = re.sub(r"^```.*?^```|<details>.*?</details>|!\[.*?\)|^ *\|[^\n]*", "", README, flags=re.M | re.S)
    rows = re.findall(r"^\|[^|]*\| `(\w+)` \|([^|]*)\| (\d+) \|$", README, re.M)
    assert len(rest.split()) <= 3000 and len(rows) >= 4
    for name, beside, lines in rows:
        code = copied(name)
        assert ({*code} - {name}, sum(len(source(part)) for part in code)) == (
            set(re.findall(r"`(\w+)`", beside)), int(lines)), name

# ---- the command line ------------------------------------------------------------------------------------

@pytest.mark.parametrize("measured, wanted, worst", [
    (1, {"equals": 1}, "1 ok"), ([1, 1.03, 1.02], {"equals": 1, "within": 0.02}, "1.03 FAIL"),
    ([1, 1.04], {"equals": [1, 1.02], "within": [0.01, 0.03]}, "1.04 ok"), ([2, 3], {"at_most": 3}, "3 ok"),
    ([2, 3], {"at_most": 2.9}, "3 FAIL"), ([2, 3], {"at_least": 2}, "2 ok"), ([], {"at_most": 9}, "nan FAIL"),
    ([2, 3], {"at_least": 2.1}, "2 FAIL"), ([2, 3], {"at_least": [1, 3.5]}, "3 FAIL"),
    *((values, wanted, f"{bad} FAIL") for bad in (NAN, INF, -INF) for values in ([bad, 1.0], [1.0, bad, 1.0])
      for wanted in ({"equals": 1, "within": 9}, {"at_most": 9}, {"at_least": -9})),
    *((1.0, wanted, "1 FAIL") for bad in (NAN, INF) for wanted in (
        {"equals": bad}, {"equals": 1, "within": bad}, {"at_most": bad}, {"at_least": -bad}))])
def test_claim(measured, wanted, worst):
    """A claim is about the worst of its values, and anything that is not finite fails it."""
    row = run_all.claim("X", "Text.", measured, **wanted)
    assert f"{row['measured']} {row['verdict']}" == worst and row["predicted"].startswith(("equals ", "at "))
    assert list(row) == ["id", "statement", "source", "predicted", "measured", "tolerance", "verdict"]

@pytest.mark.parametrize("fault, message", [({"nonsense": 1}, "TypeError: .*nonsense"), (
    {"steps": type("Kill", (), {"__reduce__": lambda _: (os._exit, (9,))})()}, "the process was killed;")])
def test_crash_half_way(fault, message, tmp_path, monkeypatch):
    """The table so far, the name of the experiment, one line, status 1; main leaves the process as it was."""
    state = lambda: (dict(os.environ), signal.getsignal(signal.SIGINT), "matplotlib" in sys.modules)
    before, output, errors = state(), io.StringIO(), io.StringIO()
    monkeypatch.setitem(run_all.QUICK, "fixed", fault)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # one after the other
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        assert run_all.main(["--quick", "--only", "matrices,fixed", "--out", str(tmp_path)]) == 1
    assert state() == before and os.listdir(tmp_path) == ["2_matrices.png"]
    assert re.fullmatch(f"run_all.py: fixed: {message}.*\n", errors.getvalue()), errors.getvalue()
    assert re.search(r"^id +verdict .*\n([\w-]+ +ok .*\n)+", output.getvalue(), re.M), output.getvalue()

@pytest.mark.parametrize("options, lines", [
    ("3 --model attention", 33), ("2 --model attention --T 5 --q 1 --d 3 --seed 4 --eta 100", 22),
    ("3 --model fcn", 42), ("2 --model fcn --T 2 --q 2 --d 1 --m 1 --seed 1", 28), ("3", 18),
    ("3 --T 4 --q 2 --d 2", 24), ("40 --T 4 --q 4 --d 5 --eta 1.5", 240), ("3 --model stochastic", 36),
    ("2 --model stochastic --T 2 --q 2 --d_e 3 --d 1", 24), ("600 --eta 5.9", 3600),
    ("400 --model attention --eta 1", 4400)])  # to where f is the target to all digits
def test_trace(options, lines, capsys):
    assert run_all.main(["--trace", *options.split()]) == 0
    text = capsys.readouterr().out.splitlines()
    assert max(map(len, text)) <= 110 and "<--" not in "".join(text) and "proof" not in "".join(text)
    assert sum(line.startswith("(") and "left out" not in line for line in text) == lines
    assert text[-1].startswith(f"{lines} lines compared") and float(text[-1].split()[5]) < 1e-13
    assert options != "3" or f"step 2: V = {31 / 256:.6g} I, W = {25 / 14336:.6g} C" in text  # by hand

@pytest.mark.parametrize("model, function, wrong", [
    *(("attention", "attention_lines", name) for name in ("grad_V", "g", "grad_s", "grad_W")),
    *(("fcn", "fcn_lines", name) for name in ("grad_A", "grad_b2", "delta", "grad_W1", "grad_b1")),
    *((model, f"{name}_loss_and_grads", k) for k in (1, 2) for model, name in [
        ("attention", "attention"), ("fcn", "fcn"), ("one-hot", "population"), ("one-hot", "one_hot"),
        ("stochastic", "population"), ("stochastic", "stochastic")]),
    ("fcn", "fcn_loss_and_grads", 3), ("fcn", "fcn_loss_and_grads", 4)])
def test_trace_sees_a_wrong_sign(model, function, wrong, monkeypatch, capsys):
    def mutant(*args, right=getattr(run_all, function), **named):
        result = right(*args, **named)
        flipped = dict(result if isinstance(result, dict) else enumerate(result))
        flipped[wrong] = -flipped[wrong]
        return flipped if isinstance(result, dict) else tuple(flipped.values())
    monkeypatch.setattr(run_all, function, mutant)
    assert run_all.main(["--trace", "2", "--model", model]) == 1 and "<--" in capsys.readouterr().out

def test_trace_at_its_limits(monkeypatch, capsys):
    """A descent that diverges ends in one line; without one token (A9) fails; a kink is left out."""
    for model in run_all.TRACES:
        assert run_all.main(["--trace", "900", "--model", model, "--eta", "1e9"]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    signs, begin = run_all.all_signs, lib.init_fcn
    monkeypatch.setattr(run_all, "all_signs", lambda d, T: signs(d, T)[1:])
    assert run_all.main("--trace 2 --T 4 --q 2 --d 2".split()) == 1
    assert {line[:4] for line in capsys.readouterr().out.splitlines() if "<--" in line} == {"(A9)"}
    monkeypatch.setattr(lib, "init_fcn", lambda *sizes: (0 * begin(*sizes)[0], *begin(*sizes)[1:]))
    assert run_all.main("--trace 1 --model fcn".split()) == 0 and ", 20 at kink" in capsys.readouterr().out

RUN, QUICK = ROOT / "run_all.py", (ROOT / "run_all.py", "--quick", "--only", "matrices", "--out")

def start(*arguments, env={}, **options):
    """A process; a shell may have told its background jobs to ignore Ctrl-C, not these."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], env={**os.environ, **env}, text=True, **{
        "cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True,
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options})

def python(*arguments, **options):
    """Status, output, errors."""
    process = start(*arguments, **options)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors

@pytest.mark.parametrize("module", ["analytic_grads", "sparse_token_selection", "run_all"])
def test_import_is_quiet(module):
    """No output, no change of the process, no matplotlib, 0.3 s of processor time at most beyond NumPy's."""
    assert python("-W", "error", "-c", f"""
import os, signal, sys, time, warnings, numpy as np
state = lambda: repr((np.random.get_state(), np.get_printoptions(), warnings.filters, np.geterr(), os.environ,
                      signal.getsignal(signal.SIGINT)))
before, start = state(), time.process_time()
import {module}
spent = time.process_time() - start
print([spent < 0.3, before == state(), "matplotlib" in sys.modules])""") == (0, "[True, True, False]\n", "")

def whole(folder):
    """claims.csv and the one figure of a folder, both whole, nothing else there; no cell is a formula."""
    assert sorted(os.listdir(folder)) == ["2_matrices.png", "claims.csv"]
    picture, text = (folder / "2_matrices.png").read_bytes(), (folder / "claims.csv").read_bytes()
    assert picture[:4] == b"\x89PNG" and picture[-8:-4] == b"IEND"
    cells = itertools.chain(*csv.reader(io.StringIO(text.decode())))
    assert not [cell for cell in cells if re.match(r"[=+@\t\r]|-(?![\d.]+(e[-+]\d+)?$)", cell)]
    return text, picture

def test_run_in_a_hostile_place(tmp_path):
    """A space in the path, ASCII, a matplotlibrc; then two runs at once on terminals of 80 and 0 columns."""
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: red")
    import fcntl, pty, struct, termios  # noqa: E401  (not on Windows)
    hostile = {"MPLBACKEND": "nonsense", "HOME": str(RUN / "home"), "LC_ALL": "C", "PYTHONUTF8": "0",
               "DISPLAY": "", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "", "MPLCONFIGDIR": ""}
    status, output, errors = python(*QUICK, tmp_path / "a space" / "deeper", cwd=tmp_path, env=hostile)
    assert status == 0 and "claims hold" in output and "Traceback" not in errors, output + errors
    assert "\r" not in output and sorted(os.listdir(tmp_path)) == ["a space", "matplotlibrc"]
    first, runs = whole(tmp_path / "a space" / "deeper"), []
    for columns in (80, 0):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        runs.append((ours, start(*QUICK, tmp_path / "both", stdout=theirs, env={"COLUMNS": ""})))
        os.close(theirs)
    for ours, process in runs:
        text = b""
        with contextlib.suppress(OSError):  # the other end has closed
            while part := os.read(ours, 4096):
                text += part
        assert process.communicate(timeout=60) == (None, "") and process.returncode == 0
        rows = re.split(r"[\r\n]+", text.decode().split("claims hold; figures")[0])
        assert max(map(len, rows)) <= 80 and sum(" ok " in row for row in rows) == first[0].count(b"\n") - 1
    assert whole(tmp_path / "both") == first

@pytest.mark.parametrize("moment, times", [(None, 99), (0.0, 1), (0.1, 99), (0.7, 99), (1.4, 1)])
def test_interrupt(moment, times, tmp_path):
    """Ctrl-C from the first import on, also repeated: soon status 130, one line, old files whole."""
    (tmp_path / "claims.csv").write_text("old")
    (tmp_path / "argparse.py").write_text("import time\nprint('running', flush=True)\ntime.sleep(20)")
    first = {"PYTHONPATH": str(tmp_path) if moment is None else ""}
    process = start(RUN, "--quick", "--out", tmp_path, env=first)
    assert "running" in process.stdout.readline()
    time.sleep(moment or 0.0)
    for _ in range(times):
        os.kill(process.pid, signal.SIGINT) if times == 1 else os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=3)  # until the last process has let go of the pipe
    assert (process.returncode, errors) == (130, "run_all.py: interrupted\n")
    assert (tmp_path / "claims.csv").read_text() == "old" and not [*tmp_path.glob(".*")]

def test_output_that_is_lost(tmp_path):
    """A reader that has gone, a full disk, a closed output: one line at most, status 0 if all is written."""
    ours, theirs = os.pipe()
    os.close(ours)
    assert python(RUN, "--help", stdout=theirs) == (1, None, "")
    os.close(theirs)
    process = start(*QUICK, tmp_path)
    assert "running" in process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert (process.stderr.read(), process.wait(timeout=60)) == ("", 1)
    for arguments in ["--help"], ["--trace", "99"]:
        with open("/dev/full", "w") as full:
            status, _, errors = python(RUN, *arguments, stdout=full)
        assert status == 1 and re.fullmatch("run_all.py: .*No space left.*\n", errors), errors
    for arguments, status in (("--seed", "-1"), 2), (("--trace", "1"), 0):
        closed = python(RUN, *arguments, preexec_fn=lambda: os.close(1), stdout=None)
        assert (closed[0], closed[2].count("\n")) == (status, status // 2), closed
    assert python(RUN, "--seed", "-1", cwd=tmp_path)[:2] == (2, "") and "--seed" in python(RUN, "--help")[1]
