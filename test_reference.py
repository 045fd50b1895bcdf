"""Every public function against an independent check, bad input, the command line, and the README.

A test never repeats the formula that it tests: gradients are checked against complex-step differentiation of
forward passes written again here, laws against enumeration, Monte Carlo with its error bar, quadrature or
linear algebra. Nothing depends on what one random stream gave: bounds on sampled numbers are normal bounds at
level 1e-6. Each message gives the largest difference.
"""
import copy
import csv
import decimal
import doctest
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

import analytic_grads as ag
import run_all
import sparse_token_selection as lib

pytestmark = pytest.mark.filterwarnings("error")
ROOT = Path(__file__).resolve().parent
PUBLIC = {name: value for module in (ag, lib) for name, value in vars(module).items()
          if hasattr(value, "__wrapped__") and inspect.isfunction(value) and value.__module__ == module.__name__}
EPS = np.finfo(float).eps


# ---- how things are compared ------------------------------------------------------------------------

def close(got, want, tolerance, scale=None):
    """The largest difference, over the largest entry wanted or the scale given, is at most the tolerance."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"shape {got.shape}, not {want.shape}"
    error = abs(got - want).max() / (scale or abs(want).max() or 1.0)
    assert error <= tolerance, f"largest difference {error:.3g}, allowed {tolerance:.3g}"


def normal_bound(comparisons):
    return NormalDist().inv_cdf(1 - 1e-6 / (2 * comparisons))


def within_errors(samples, exact):
    """The mean of independent samples (axis 0) is the exact value, up to its standard error."""
    samples = np.asarray(samples)
    error = abs(samples.mean(axis=0) - exact)
    allowed = normal_bound(error.size) * samples.std(axis=0, ddof=1) / math.sqrt(len(samples))
    rounding = 1e-12 * (1 + abs(np.asarray(exact)))
    assert (error <= allowed + rounding).all(), f"error over its bound: {(error / (allowed + rounding)).max():.3g}"


def uniform(counts):
    """Chi-square for equal cells, its tail by Wilson and Hilferty."""
    k = len(counts) - 1
    chi_square = ((counts - counts.mean())**2).sum() / counts.mean()
    z = ((chi_square / k)**(1 / 3) - 1 + 2 / (9 * k)) / math.sqrt(2 / (9 * k))
    assert z < normal_bound(1), f"chi-square {chi_square:.1f} with {k} degrees of freedom"


def slope(loss, params, directions):
    """The derivative of the loss along the directions by complex step: no difference, so no cancellation."""
    return np.imag(loss(*(param + 1e-30j * way for param, way in zip(params, directions)))) / 1e-30


# ---- forward passes, written again --------------------------------------------------------------------

def attend(scores):
    x = np.exp(scores - np.real(scores).max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def attention_loss(V, W, Z, z_query, target):
    a = attend(np.einsum("bit,ij,bj->bt", Z, W, z_query))
    return ((np.einsum("ci,bit,bt->bc", V, Z, a) - target)**2).sum() / (2 * len(Z))


def population_loss(V, W, E, e_query, selected):
    """f - target = sum_t (a_t V - s_t I/q) x_t, and the x_t are independent with covariance I."""
    a = attend(np.einsum("bit,ij,bj->bt", np.broadcast_to(E, (len(selected), *E.shape[-2:])), W, e_query))
    target = selected[:, :, None, None] * np.eye(len(V)) / selected[0].sum()
    return ((a[:, :, None, None] * V - target)**2).sum() / (2 * len(selected))


def scalar_loss(alpha, c, u, q, d):
    return d * ((alpha * attend(c * u) - (np.arange(u.shape[1]) < q) / q)**2).sum() / (2 * len(u))


def network_loss(W1, b1, A, b2, inputs, target):
    pre = np.einsum("mn,bn->bm", W1, inputs) + b1
    hidden = pre * (np.real(pre) > 0)  # a complex step stays on the linear piece
    return ((np.einsum("dm,bm->bd", A, hidden) + b2 - target)**2).sum() / (2 * len(inputs))


# ---- the five gradient functions, on settings of any size ------------------------------------------------

def setting(rng, B, T, q, d, d_e, m, tokens="gaussian", query="dual", shared=False, sharp=1.0):
    X, selected = lib.sample_batch(rng, B, T, q, d, tokens)
    E = lib.random_sign_encoding(rng, d_e, T, None if shared else B)
    D = d + d_e
    W1, b1, A, b2 = lib.init_fcn(rng, m, T, d)
    network = W1, b1 + rng.standard_normal(m), A, b2 + rng.standard_normal(d)
    return {"X": X, "selected": selected, "E": E, "query": query, "network": network,
            "overlaps": lib.overlaps(rng, B, T, q, d_e, query), "V": rng.standard_normal((d, D)),
            "W": sharp * rng.standard_normal((D, D)), "alpha": rng.standard_normal(),
            "c": sharp * rng.standard_normal()}


def cases(s, rows=slice(None)):
    """name -> (loss and derivatives, the same loss again, parameters, sizes, scores) on some rows of a setting.

    sizes bound the loss and the norm of each derivative by the norms of their factors, scores the scores, before
    any cancellation: rounding is at most a few hundred eps times (1 + scores) sizes. A dual query that should
    be 0 is known to eps only, so queries count as 1 long at least.
    """
    X, selected, E, V, W = s["X"][rows], s["selected"][rows], s["E"], s["V"], s["W"]
    E, u, alpha, c = E if E.ndim == 2 else E[rows], s["overlaps"][rows], s["alpha"], s["c"]
    (_, d, T), q, d_e = X.shape, int(selected[0].sum()), E.shape[-2]
    e_query = lib.QUERIES[s["query"]](E, selected)
    Z, z_query = lib.full_inputs(X, E, e_query)
    target, inputs = lib.sts(X, selected), lib.fcn_inputs(X, selected)
    norm, V1, W22 = np.linalg.norm, V[:, :d], W[d:, d:]
    longest = lambda vectors: norm(vectors, axis=1).max()
    query = max(longest(e_query), 1.0)

    def sizes(value, residual, token, key):  # the norms of V, f - target, the tokens, and tokens times query
        return residual**2 / 2, residual * token, 2 * residual * value * token * key

    key = longest(Z) * query
    yield "attention", (lambda V, W: ag.attention_loss_and_grads(V, W, Z, z_query, target),
                        lambda V, W: attention_loss(V, W, Z, z_query, target), (V, W),
                        sizes(norm(V), norm(V) * longest(Z) + longest(target), longest(Z), key), norm(W) * key)
    yield "population", (lambda V, W: ag.population_loss_and_grads(V, W, E, e_query, selected),
                         lambda V, W: population_loss(V, W, E, e_query, selected), (V1, W22),
                         sizes(norm(V1), norm(V1) + math.sqrt(d), 1.0, query), norm(W22) * query)
    # one scalar's gradient is the coefficient of a matrix: the derivative is d, and T-1 or d_e, times as large
    bound = sizes(d * abs(alpha), math.sqrt(d) * (abs(alpha) + 1), math.sqrt(d), abs(u).max() + 1)
    first = 1.0 * (np.arange(T) < q)[None]
    yield "one-hot", (
        lambda alpha, omega: np.multiply(ag.one_hot_loss_and_grads(alpha, omega, T, q, d), (1, d, T - 1)),
        lambda alpha, omega: scalar_loss(alpha, omega, first, q, d), (alpha, c), bound, abs(c))
    yield "stochastic", (
        lambda alpha, c: np.multiply(ag.stochastic_loss_and_grads(alpha, c, u, q, d, d_e), (1, d, d_e)),
        lambda alpha, c: scalar_loss(alpha, c, u, q, d), (alpha, c), bound, abs(c * u).max())
    W1, b1, A, b2 = s["network"]
    hidden, fed = norm(W1) * longest(inputs) + norm(b1), longest(inputs)
    residual = norm(A) * hidden + norm(b2) + longest(target)
    yield "network", (lambda *network: ag.fcn_loss_and_grads(*network, inputs, target),
                      lambda *network: network_loss(*network, inputs, target), s["network"], np.multiply(
                          residual, (residual / 2, norm(A) * fed, norm(A), hidden, 1.0)), 0.0)


SIZES = [(1, 1, 1, 1, 1, 1), (2, 1, 1, 3, 4, 1), (3, 7, 7, 1, 5, 2), (5, 11, 1, 2, 1, 7), (2, 5, 2, 3, 13, 5),
         (7, 3, 2, 1, 2, 3), (4, 6, 4, 2, 3, 11)]  # (B, T, q, d, d_e, m)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("query", ["dual", "sum"])
def test_gradients_complex_step(size, query):
    """(A5, A8), (P2, P4), (O3, O4), (S2, S3), (F2): every entry to 1e-12 of the largest."""
    s = setting(np.random.default_rng(size), *size, query=query, shared=size[0] % 2 == 0, sharp=0.3)
    for name, (call, loss, params, sizes, _) in cases(s):
        value, *grads = call(*params)
        close(value, loss(*params), 1e-12)
        for k, (grad, size) in enumerate(zip(grads, sizes[1:])):
            want = run_all.complex_step(loss, params, k)
            close(grad, want, 1e-12, max(abs(want).max(), 1e-3 * size))  # 0 in theory where T = 1 or q = T


def test_attention_any_width():
    """Queries with content, D below d and above, and a batch of several pieces: the mean of its samples."""
    rng = np.random.default_rng(1)
    for B, d, D, T in [(2, 3, 1, 5), (3, 1, 7, 2), (4, 2, 2, 1)]:
        data = [rng.standard_normal(shape) for shape in ((B, D, T), (B, D), (B, d))]
        V, W = rng.standard_normal((d, D)), rng.standard_normal((D, D)) / D
        for k, grad in enumerate(ag.attention_loss_and_grads(V, W, *data)[1:]):
            want = run_all.complex_step(lambda V, W: attention_loss(V, W, *data), (V, W), k)
            close(grad, want, 1e-12, max(abs(want).max(), 1e-3))
    D, T = 31, 127
    B = 155  # pieces of 76, 76 and 3
    data = [rng.standard_normal(shape) for shape in ((B, D, T), (B, D), (B, 2))]
    V, W = rng.standard_normal((2, D)), rng.standard_normal((D, D)) / D
    samples = [ag.attention_loss_and_grads(V, W, *(x[b:b + 1] for x in data)) for b in range(B)]
    for got, one in zip(ag.attention_loss_and_grads(V, W, *data), zip(*samples)):
        close(got, np.mean(one, axis=0), 1e-12)
    close(lib.transformer(V, W, *data[:2]),
          np.einsum("ci,bit,bt->bc", V, data[0], attend(np.einsum("bit,ij,bj->bt", data[0], W, data[1]))), 1e-12)


def test_softmax():
    scores = np.random.default_rng(2).standard_normal((3, 2, 5)) * 10
    close(ag.softmax(scores), attend(scores), 1e-15)
    close(ag.softmax(scores + 1e6), ag.softmax(scores), 1e-8)
    close(ag.softmax([[1e300, 0.0], [0.0, math.log(3)]]), [[1, 0], [0.25, 0.75]], 1e-15)  # each row by itself
    for size in (1e3, 1e150, 1e300):
        assert ag.softmax([-size, size, 0.0]).tolist() == [0, 1, 0]
        assert ag.softmax([size, size]).tolist() == ag.softmax([-size, -size]).tolist() == [0.5, 0.5]


def test_fcn_finite_differences():
    """Away from the kinks, central differences of the network itself, 1e-7."""
    rng = np.random.default_rng(3)
    W1, b1, A, b2 = network = [rng.standard_normal(shape) for shape in ((5, 4), (5,), (3, 5), (3,))]
    inputs, target = rng.standard_normal((60, 4)), rng.standard_normal((60, 3))
    away = abs(inputs @ W1.T + b1).min(axis=1) > 0.01
    inputs, target = inputs[away], target[away]
    loss = lambda *network: ((lib.fcn(*network, inputs) - target)**2).sum() / (2 * len(inputs))
    for k, grad in enumerate(ag.fcn_loss_and_grads(*network, inputs, target)[1:]):
        close(grad, run_all.complex_step(loss, network, k, h=1e-5), 1e-7)
    grads = ag.fcn_loss_and_grads([[1.0]], [0.0], [[1.0]], [0.0], [[0.0]], [[1.0]])[1:]
    assert [float(grad.item()) for grad in grads] == [0, 0, 0, -1]  # relu has derivative 0 at 0


# ---- random sizes -------------------------------------------------------------------------------------

def permuted(s, order):
    """The same setting with its positions in another order, and the order of the network's columns."""
    d, T = s["X"].shape[1:]
    columns = np.concatenate([(order[:, None] * d + np.arange(d)).ravel(), T * d + order])
    W1, *rest = s["network"]
    q = int(s["selected"][0].sum())
    within = np.concatenate([np.sort(order[order < q]), order[order >= q]])  # the q selected stay in front
    return {**s, "X": s["X"][:, :, order], "selected": s["selected"][:, order], "E": s["E"][..., order],
            "overlaps": s["overlaps"][:, within], "network": (W1[:, columns], *rest)}, columns


@pytest.mark.parametrize("block", range(10))
def test_random_settings(block):
    """500 settings: complex step along three directions, batch, permutation, signs, floors, attention."""
    for seed in range(50 * block, 50 * block + 50):
        rng = np.random.default_rng([2024, seed])
        B, T, d, d_e, m = (int(rng.integers(1, high)) for high in (5, 10, 5, 10, 9))
        q = int(rng.integers(1, T + 1))
        s = setting(rng, B, T, q, d, d_e, m, tokens=list(lib.TOKENS)[rng.integers(5)],
                    query=("dual", "sum")[rng.integers(2)], shared=bool(rng.integers(2)),
                    sharp=float(rng.choice([0.1, 1.0, 30.0])))
        moved, columns = permuted(s, rng.permutation(T))
        alone = [dict(cases(s, slice(b, b + 1))) for b in range(B)]
        again = dict(cases(moved))
        for name, (call, loss, params, sizes, scores) in cases(s):
            where = f"seed {seed}, {name}, (B, T, q, d, d_e, m) = {B, T, q, d, d_e, m}"
            rounding = 400 * EPS * (1 + scores)
            value, *grads = result = call(*params)
            assert value >= 0, where
            for _ in range(3):
                ways = [rng.standard_normal(np.shape(param)) for param in params]
                along = sum(np.vdot(grad, way) for grad, way in zip(grads, ways))
                error = abs(along - slope(loss, params, ways))
                allowed = rounding * sum(size * np.linalg.norm(way) for size, way in zip(sizes[1:], ways))
                assert error <= allowed, f"{where}: largest difference {error:.3g}, allowed {allowed:.3g}"
            mean = [np.mean(one, axis=0) for one in zip(*(lone[name][0](*params) for lone in alone))]
            moved_result = list(again[name][0](*again[name][2]))
            if name == "network":
                moved_result[1] = moved_result[1][:, np.argsort(columns)]
            for got, batch, order, size in zip(result, mean, moved_result, sizes):
                error = max(np.max(abs(got - batch)), np.max(abs(got - order)))
                assert error <= rounding * size, f"{where}: batch or order, difference {error:.3g}"
        close(ag.softmax(s["c"] * s["overlaps"]).sum(axis=1), np.ones(B), 4 * EPS)
        top = d / (2 * q)
        least, own = float(lib.fcn_loss_floor(m, T, q, d)), lib.fcn_first_layer_floor(s["network"][0], T, q, d)
        assert 0 <= least <= own + 1e-12 * top and own <= top * (1 + 1e-12), (seed, least, own, top)


# ---- the population (P), one-hot (O) and stochastic (S) encodings -------------------------------------------

def test_population_enumerated():
    """(P5): over all 2^6 sign tokens and all y, the full model's loss and gradients are the population's."""
    rng, T, q, d, d_e = np.random.default_rng(4), 3, 2, 2, 4
    E, V, W = (rng.standard_normal(shape) for shape in ((d_e, T), (d, d), (d_e, d_e)))
    tokens = np.array(list(itertools.product([-1.0, 1.0], repeat=d * T))).reshape(-1, d, T)
    subsets = lib.all_subsets(T, q)
    X, selected = np.repeat(tokens, len(subsets), axis=0), np.tile(subsets, (len(tokens), 1))
    loss, grad_V, grad_W = ag.attention_loss_and_grads(
        *lib.in_full_model(V, W), *lib.full_inputs(X, E, lib.sum_query(E, selected)), lib.sts(X, selected))
    want = ag.population_loss_and_grads(V, W, E, lib.sum_query(E, subsets), subsets)
    for got, exact in zip((loss, grad_V[:, :d], grad_W[d:, d:]), want):
        close(got, exact, 1e-12)
    close([abs(grad_V[:, d:]).max(), abs(grad_W[:d]).max()], [0, 0], 1e-14)  # (A9): cross blocks stay 0


@pytest.mark.parametrize("tokens", lib.TOKENS)
def test_population_sampled(tokens):
    """(P1, P2, P4) are the means of (A4, A5, A8) over samples, for every kind of token."""
    rng, T, q, d, d_e, found = np.random.default_rng(5), 5, 2, 2, 3, []
    E, V, W = (rng.standard_normal(shape) for shape in ((d_e, T), (d, d), (d_e, d_e)))
    for _ in range(500):
        X, selected = lib.sample_batch(rng, 40, T, q, d, tokens)
        loss, grad_V, grad_W = ag.attention_loss_and_grads(
            *lib.in_full_model(V, W), *lib.full_inputs(X, E, lib.sum_query(E, selected)), lib.sts(X, selected))
        found.append(np.concatenate([[loss], grad_V[:, :d].ravel(), grad_W[d:, d:].ravel()]))
    subsets = lib.all_subsets(T, q)
    exact = ag.population_loss_and_grads(V, W, E, lib.sum_query(E, subsets), subsets)
    within_errors(found, np.concatenate([np.ravel(part) for part in exact]))


@pytest.mark.parametrize("T, q, d", [(5, 2, 3), (7, 1, 1), (4, 4, 2), (2, 1, 5), (6, 5, 2)])
def test_one_hot_line(T, q, d):
    """(O1): at V = alpha I, W = omega (I - 11^T/T) matrix gradients are scalars times the same matrices."""
    E, subsets, centre = lib.one_hot_encoding(T), lib.all_subsets(T, q), np.eye(T) - 1 / T
    for alpha, omega in [(0.0, 0.0), (0.7, 1.3), (1.2, -2.0), (-0.5, 6.0)]:
        loss, grad_V, grad_W = ag.population_loss_and_grads(alpha * np.eye(d), omega * centre, E,
                                                            lib.sum_query(E, subsets), subsets)
        scalars = ag.one_hot_loss_and_grads(alpha, omega, T, q, d)
        close(scalars[0], loss, 1e-13)
        close(grad_V, scalars[1] * np.eye(d), 1e-14, 1 + abs(alpha))
        close(grad_W, scalars[2] * centre, 1e-14, d * (1 + alpha**2))


@pytest.mark.parametrize("query", ["dual", "sum"])
@pytest.mark.parametrize("q", [1, 2, 3])
def test_sign_encodings_enumerated(query, q):
    """Over all 2^6 sign patterns (d_e = 2, T = 3): (S1), (N1), and the law of `overlaps`."""
    d_e, T, d, c = 2, 3, 2, 1.7
    signs = run_all.all_signs(d_e, T)
    first = np.tile(1.0 * (np.arange(T) < q), (len(signs), 1))
    e_query = lib.QUERIES[query](signs, first)
    u = np.einsum("bet,be->bt", signs, e_query)
    loss, grad_V, grad_W = ag.population_loss_and_grads(0.8 * np.eye(d), c * np.eye(d_e), signs, e_query, first)
    close(grad_W, grad_W[0, 0] * np.eye(d_e), 1e-14, 1.0)
    scalars = ag.stochastic_loss_and_grads(0.8, c, u, q, d, d_e)
    close((loss, grad_V[0, 0], grad_W[0, 0]), scalars, 1e-13, 1.0)
    rng, total = np.random.default_rng(6), np.zeros((d_e, d_e))
    for X, y in zip(rng.standard_normal((3, d, T)), np.eye(T)):  # a data set of three: averaged over E alone
        selected = np.tile(y, (len(signs), 1))
        V, W = lib.in_full_model(rng.standard_normal((d, d)), c * np.eye(d_e))
        inputs = lib.full_inputs(np.tile(X, (len(signs), 1, 1)), signs, lib.QUERIES[query](signs, selected))
        total += ag.attention_loss_and_grads(V, W, *inputs, np.tile(X @ y, (len(signs), 1)))[2][d:, d:]
    close(total, total[0, 0] * np.eye(d_e), 1e-14, 1 + abs(total).max())
    drawn = lib.overlaps(np.random.default_rng(7), 20_000, T, q, d_e, query)
    products = lambda u: np.hstack([u, np.einsum("bi,bj->bij", u, u).reshape(len(u), -1)])
    within_errors(products(drawn), products(u).mean(axis=0))
    if query == "sum" or q == 1:  # no less than exact
        assert abs(lib.overlap_variance(q, d_e, query) - (e_query**2).sum() / len(signs) / d_e) < 1e-14


def test_dual_query():
    """The least-norm least-squares solution, sample by sample; 1 on y wherever it can be."""
    rng = np.random.default_rng(8)
    equal = np.array([[1.0, 1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]]) / math.sqrt(2)
    subsets, signs = lib.all_subsets, lib.random_sign_encoding
    for E, selected in [(rng.standard_normal((5, 3, 7)), subsets(7, 3)[:5]), (equal, subsets(4, 2)),
                        (equal, subsets(4, 3)), (signs(rng, 4, 9), subsets(9, 4)),
                        (np.ones((1, 1)), np.ones((1, 1))),
                        (signs(rng, 16, 32, 400), lib.sample_batch(rng, 400, 32, 5, 1)[1]),
                        (np.zeros((2, 3)), subsets(3, 1)),
                        (1e150 * np.eye(3), subsets(3, 2)),
                        (1e-150 * np.eye(3), subsets(3, 2))]:
        got = lib.dual_query(E, selected)
        for b, y in enumerate(selected > 0):
            E_y = (E if E.ndim == 2 else E[b])[:, y]
            want = np.linalg.lstsq(E_y.T, np.ones(y.sum()), rcond=1e-12)[0]
            close(got[b], want, 1e-10, 1 / (abs(E_y).max() or 1.0))
            if np.linalg.matrix_rank(E_y) == y.sum() or (E_y == E_y[:, :1]).all() and E_y.any():
                close(E_y.T @ got[b], np.ones(y.sum()), 1e-10)
        close(lib.sum_query(E, selected)[0], (E if E.ndim == 2 else E[0])[:, selected[0] > 0].sum(axis=1), 1e-15)


def test_overlap_variance():
    """For the dual query a lower bound, within .2 % at d_e = 64, q = 3: e_y^T e_y = 1^T G^-1 1."""
    rng, q, d_e = np.random.default_rng(9), 3, 64
    E = rng.choice([-1.0, 1.0], (40_000, d_e, q)) / math.sqrt(d_e)
    squares = np.linalg.inv(np.einsum("bei,bej->bij", E, E)).sum(axis=(1, 2)) / d_e
    error = normal_bound(1) * squares.std() / math.sqrt(len(squares))
    ratio = squares.mean() / lib.overlap_variance(q, d_e)
    assert 1 - error / squares.mean() <= ratio <= 1.002 + error / squares.mean(), f"ratio {ratio:.5f}"


def test_overlap_loss():
    """(S4) is the loss at the alpha where the gradient, linear in alpha, is 0."""
    rng = np.random.default_rng(10)
    for T, q, d, d_e, query in [(6, 2, 3, 8, "dual"), (5, 4, 1, 3, "sum"), (31, 3, 2, 24, "dual"),
                                (2, 1, 1, 1, "sum")]:
        u = lib.overlaps(rng, 200, T, q, d_e, query)
        for c in (0.0, 0.5, 3.0):
            g0, g1 = (ag.stochastic_loss_and_grads(alpha, c, u, q, d, d_e)[1] for alpha in (0.0, 1.0))
            best = ag.stochastic_loss_and_grads(g0 / (g0 - g1), c, u, q, d, d_e)[0]
            close(lib.overlap_loss(c, u, q, d), best, 1e-9)


@pytest.mark.parametrize("T, q, d_e, limit", [(32, 3, 128, 2.0), (64, 1, 64, 4.0), (32, 3, 128, 5.0)])
def test_stochastic_loss_sampled(T, q, d_e, limit):
    """(S5) against (S4) on draws, 2 %, (L1) at T and 2T against the loss, 4 %, plus 4 standard errors."""
    rng, d, sigma2 = np.random.default_rng(11), 4, lib.overlap_variance(q, d_e)
    c, groups = min(limit, 0.15 / sigma2), [lib.overlaps(rng, 250, 2 * T, q, d_e) for _ in range(16)]
    found = np.array([[lib.overlap_loss(c, u[:, :T], q, d),
                       ag.stochastic_loss_and_grads(1.1, c, u[:, :T], q, d, d_e)[0],
                       ag.stochastic_loss_and_grads(1.1, c, u, q, d, d_e)[0]] for u in groups])
    predicted = np.array([lib.stochastic_loss(c, T, q, d, sigma2), lib.length_loss(1.1, c, T, q, d, sigma2),
                          lib.length_loss(1.1, c, 2 * T, q, d, sigma2)])
    error = abs(found.mean(axis=0) - predicted)
    allowed = np.array([0.02, 0.04, 0.04]) * predicted + 4 * found.std(axis=0, ddof=1) / math.sqrt(len(groups))
    assert (error <= allowed).all(), f"error over its bound: {error / allowed}"


def test_stochastic_loss_normal_overlaps():
    """(S5) for overlaps normal off y, as it assumes: the next order is below 1e-3 here, its last term 9e-3."""
    T, q, sigma2, c, rng = 32, 3, 0.03, 2.0, np.random.default_rng(22)
    off_y = math.sqrt(sigma2) * rng.standard_normal((16, 8000, T - q))
    found = [lib.overlap_loss(c, np.hstack([np.ones((8000, q)), u]), q, 2) for u in off_y]
    error = 4 * np.std(found, ddof=1) / 4
    close(lib.stochastic_loss(c, T, q, 2, sigma2), np.mean(found), 1e-3 + error / np.mean(found))


def test_closed_forms_without_spread():
    """At sigma2 = 0 every overlap off y is 0: (S5) and (L1) are the one-hot loss at omega = c, exactly."""
    for T, q, d in [(2, 1, 1), (7, 3, 2), (101, 5, 3)]:
        for c in (0.0, 0.3, 2.0, 8.0):
            curve = [float(ag.one_hot_loss_and_grads(alpha, c, T, q, d)[0]) for alpha in (0.0, 0.9, 1.8)]
            close(lib.length_loss([0.0, 0.9, 1.8], c, T, q, d, 0.0), curve, 1e-12)
            u = 1.0 * (np.arange(T) < q)[None]
            close(lib.stochastic_loss(c, T, q, d, 0.0), lib.overlap_loss(c, u, q, d), 1e-12)
    for T, q, d_e in itertools.product((2, 5, 40, 1000), (1, 3, 30), (30, 100)):
        if q < T:
            sigma2 = lib.overlap_variance(q, d_e)
            c = np.linspace(0, 0.3 / sigma2, 60)
            losses = lib.stochastic_loss(c, T, q, 2, sigma2), lib.length_loss(1.0, c, T, q, 2, sigma2)
            least = np.min(losses)
            assert least >= 0, f"T, q, d_e = {T, q, d_e}: a loss of {least:.3g}"


def test_losses_on_line():
    """run_all's L/L_0 of each row against the loss of the two scalars."""
    u = np.random.default_rng(11).standard_normal((20, 7))
    rows = run_all.losses_on_line(0.8, attend(1.7 * u), lib.first_subset(20, 7, 3))
    close(rows.mean(), ag.stochastic_loss_and_grads(0.8, 1.7, u, 3, 5, 9)[0] * 6 / 5, 1e-14)


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
    start = np.outer([0, 1, d * (T - q) / (2 * q * T)], np.ones(3))
    close(lib.stochastic_trajectory([0, 10, T / eta], T, q, d, d_e, eta), start, 1e-12)
    u = lib.overlaps(np.random.default_rng(12), 1000, T, q, d_e)
    _, _, measured = run_all.final(run_all.two_scalars(lambda: u, q, d, d_e, eta, 1000))
    close(measured, now[2, 3], 0.05)


def test_moments_by_quadrature():
    """m, M, v, h of (S5) from the moments of e^{c(u-1)} at normal u."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    for c, sigma2 in [(0.7, 0.3), (3.0, 0.04), (6.0, 0.02)]:
        x = np.exp(c * (math.sqrt(sigma2) * nodes - 1))
        one, two, three = (weights @ x**k / weights.sum() for k in (1, 2, 3))
        close(lib.moments(c, 9, 2, sigma2), 7 * np.array([one, two, two - one**2, three - two * one]), 1e-12)


def test_trajectory_to_its_end():
    """(S6) goes far where no tail ends it, up to the last step that it allows, and not beyond; T beyond float64."""
    T, q, d, d_e, eta, omega = 9, 2, 1, 10**6, 1.0, 30.0
    t = time_to(omega, T, q, d, eta, d_e)  # no spread: the one-hot law with d_e for T - 1
    close(lib.stochastic_trajectory(t, T, q, d, d_e, eta)[0], omega, 1e-3)
    arguments = 32, 3, 4, 64, 2.0
    with pytest.raises(ValueError, match="t must be at most") as error:
        lib.stochastic_trajectory(1e300, *arguments)
    last = float(re.search(r"at most ([\d.e+]+),", str(error.value))[1])
    c = lib.stochastic_trajectory(0.99 * last, *arguments)[0]
    assert 0.29 < c * lib.overlap_variance(3, 64) <= 0.3
    for late in (1.02 * last, [1.0, 1.02 * last]):
        with pytest.raises(ValueError, match="t must be at most"):
            lib.stochastic_trajectory(late, *arguments)
    assert lib.stochastic_trajectory(1e5, 10**17, 3, 4, 128, 2.0)[0] == 0
    assert lib.stochastic_loss(1e308, 4, 1, 2, 5e-309) == 0


def test_stochastic_floor_and_dimension():
    """(S8) bounds the least loss on draws from above (not at q = 16); (S9) is within 10 % of it, and the least
    over c, found where its derivative is 0; d_e is enough."""
    rng, T, d = np.random.default_rng(13), 32, 4
    for q, d_e, query, low, high in [(3, 24, "dual", 0.2, 1.0), (3, 36, "dual", 0.1, 1.0),
                                     (16, 96, "dual", 1.1, 1.5), (3, 512, "sum", 0.9, 1.1)]:
        u = lib.overlaps(rng, 2000, T, q, d_e, query)
        least = min(lib.overlap_loss(c, u, q, d) for c in np.linspace(0.5, 12, 47))
        ratio = least / lib.stochastic_floor(T, q, d, d_e, query)
        assert low <= ratio <= high, f"q = {q}, {query}, d_e = {d_e}: ratio {ratio:.3f}"
    for T, q, d_e in [(32, 3, 16), (16, 4, 16), (64, 3, 24), (32, 5, 4000)]:
        uneven, tau2 = (q - 1) * (q - 2) / d_e, (q + 2 * (q - 1) / q) / d_e
        low, high = 0.0, 1 / (2 * tau2)
        for _ in range(60):
            c = (low + high) / 2
            falls = c * uneven < (1 - 2 * c * tau2) * (T - q) * math.exp(2 * c * (c * tau2 - 1))
            low, high = (c, high) if falls else (low, c)
        M = c**2 * uneven + (T - q) * math.exp(2 * c * (c * tau2 - 1))
        close(lib.stochastic_floor(T, q, 2 * q, d_e, "sum"), M / (q + M), 1e-6)
    for T, q, eps in [(10**9, 3, 0.5), (1024, 3, 0.01), (10**9, 7, 1e-9), (32, 31, 0.5)]:
        need = lib.required_dimension(T, q, eps)
        assert type(need) is int and need >= 1
        bounds = T / q * np.exp(-np.array([need, need - 1]) / (2 * q))
        assert bounds[0] <= eps * (1 + 1e-12) and bounds[1] > eps
        assert lib.stochastic_floor(T, q, 6, need) <= eps * 6 / (2 * q)
    assert lib.stochastic_floor(100, 3, 6, 1) == 1.0 > lib.stochastic_floor(100, 3, 6, 1, "sum")  # at most L_0


def test_exact_floor():
    """(S10): counted over all sign patterns at c = 10^5, both queries; summed over the ties; huge sizes."""
    for q, T, d_e in [(1, 3, 4), (2, 3, 4), (2, 4, 3), (1, 4, 3)]:
        signs = run_all.all_signs(d_e, T)
        for query, e_y in lib.QUERIES.items():
            u = np.einsum("bet,be->bt", signs, e_y(signs, lib.first_subset(len(signs), T, q)))
            close(lib.stochastic_floor(T, q, 3, d_e, query), lib.overlap_loss(1e5, u.round(9), q, 3), 1e-12)
    for q, T, d_e in [(1, 100, 3), (1, 40, 60), (2, 28, 14), (2, 60, 5)]:
        floor = Fraction(0)
        for agree in [d_e] if q == 1 else range(d_e + 1):
            n, tie = T - q, Fraction(1, 2**agree)
            mean = sum(math.comb(n, k) * tie**k * (1 - tie)**(n - k) * Fraction(k, q + k) for k in range(n + 1))
            floor += mean * (1 if q == 1 else Fraction(math.comb(d_e, agree), 2**d_e))
        close(lib.stochastic_floor(T, q, 2 * q, d_e), float(floor), 1e-13)
    assert lib.stochastic_floor(10**9, 1, 2, 1) == pytest.approx(1 - 2e-9, abs=1e-8)
    for T, q, eps in [(2, 1, 0.9), (1024, 2, 0.01), (10**9, 1, 1e-9), (32, 2, 5e-324)]:
        need = lib.required_dimension(T, q, eps)
        floors = [lib.stochastic_floor(T, q, 2 * q, size) for size in (need, max(need - 1, 1))]
        assert type(need) is int and floors[0] <= eps and (floors[1] > eps or need == 1)


# ---- closed forms of the one-hot law (C), step sizes (O5) ---------------------------------------------------

def best_loss(omega, T, q, d):
    """The loss at the best alpha by Lagrange's identity: |a|^2 |s|^2 - <a, s>^2 = sum of squared 2 x 2 minors."""
    on = 1 / (q + (T - q) * np.exp(-omega))
    off = np.exp(-omega) * on
    return d / (2 * q) * (T - q) * off**2 / (q * on**2 + (T - q) * off**2)


def time_to(omega, T, q, d, eta, stiffness):
    """The time at which (stiffness + d alpha*'^2) domega/dt = -eta dL*/domega, alpha* the best alpha for omega,
    reaches omega from t = T/eta: by Gauss-Legendre on short panels, derivatives by complex steps."""
    nodes, weights = np.polynomial.legendre.leggauss(30)
    edges = np.linspace(0, omega, 2 + int(4 * omega))
    half = np.diff(edges)[:, None] / 2
    points = edges[:-1, None] + half * (1 + nodes) + 1e-30j
    on, off = 1 / (q + (T - q) * np.exp(-points)), 1 / (q * np.exp(points) + T - q)
    lag = d * (np.imag(on / (q * on**2 + (T - q) * off**2)) / 1e-30)**2
    return T / eta + ((stiffness + lag) / -eta / (np.imag(best_loss(points, T, q, d)) / 1e-30) * weights * half).sum()


@pytest.mark.parametrize("T, q, d, eta", [(2, 1, 1, 1.0), (4, 3, 2, 0.5), (257, 4, 4, 2.0), (64, 4, 300, 1.0),
                                          (10**6, 999_999, 3, 1.0), (10**9, 3, 7, 0.25)])
def test_one_hot_closed_form(T, q, d, eta):
    """(C1, C3) against the differential equation (C2) integrated numerically; (C4) at t = 10^24; (G1)'s stiffness."""
    omegas = np.array([0.01, 0.5, 2.0, 7.0, 13.0, 25.0])
    for d_e, stiffness in ((None, T - 1), (40, T * 40 / (T + 40))):
        times = [time_to(omega, T, q, d, eta, stiffness) for omega in omegas]
        close(lib.one_hot_loss_at(times, T, q, d, eta, d_e) / best_loss(omegas, T, q, d), np.ones(6), 1e-11 + T * EPS)
    assert lib.one_hot_loss_at(0, T, q, d, eta) == pytest.approx(d * (T - q) / (2 * q * T), rel=1e-12)
    for t in (1e24, 10**24):
        gap = abs(lib.one_hot_loss_at(t, T, q, d, eta) * 4 * eta * t / (T - 1) - 1)
        allowed = (T**2 + 120 * q * T) * (T - 1) / (T - q) / (2 * eta * d * t) + 1e-9  # the terms (C4) leaves out
        assert gap <= allowed, f"largest difference {gap:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("alpha, omega, T, q", [
    (0.7, 3.0, 8, 3), (1.0, 40.0, 8, 3), (1.0, -800.0, 8, 3), (-2.5, 0.0, 5, 4), (1e150, -701.0, 8, 3),
    (1.5, 50.0, 1000, 1), (1.0, 300.0, 9, 2), (3.0, 1.0, 4, 4)])
def test_one_hot_digits(alpha, omega, T, q, d=5):
    """(O2)-(O4) and, without spread, (L1) to the last digits: the loss and its differences in 600 decimals."""
    with decimal.localcontext() as context:
        context.prec, number = 600, decimal.Decimal

        def loss(alpha, omega):
            on = 1 / (q + (T - q) * (-omega).exp())
            off = on * (-omega).exp()
            return number(d) / 2 * (q * (number(1) / q - alpha * on)**2 + (T - q) * (alpha * off)**2)
        at, h = (number(alpha), number(omega)), number("1e-150")
        by_alpha = (loss(at[0] + h, at[1]) - loss(at[0] - h, at[1])) / (2 * h * d)
        by_omega = (loss(at[0], at[1] + h) - loss(at[0], at[1] - h)) / (2 * h * (T - 1))
        wanted = [float(x) for x in (loss(*at), by_alpha, by_omega)]
    for got, want in zip(ag.one_hot_loss_and_grads(alpha, omega, T, q, d), wanted):
        assert got == pytest.approx(want, rel=1e-13, abs=1e-300)
    if omega >= 0 and q < T:
        assert lib.length_loss(alpha, omega, T, q, d, 0.0) == pytest.approx(wanted[0], rel=1e-13, abs=0.0)


def test_one_hot_recursion():
    """The recursion is the descent of the scalars; q = T decays at 1 - eta/q; it meets (C3) early and late."""
    T, q, d, eta = 32, 4, 4, 2.0
    states = list(lib.one_hot_recursion(T, q, d, eta, 60))
    scalars = lambda alpha, omega: ag.one_hot_loss_and_grads(alpha, omega, T, q, d)
    for (_, got, loss), (_, want, want_loss) in zip(states, lib.gradient_descent((0.0, 0.0), scalars, eta, 49)):
        close((*got, loss), (*want, want_loss), 1e-14)
    several = list(lib.one_hot_recursion(np.array([8, T, 5]), np.array([3, q, 5]), d, eta, 60))
    close([params[0][1] for _, params, _ in several], [params[0] for _, params, _ in states[:61]], 1e-13)
    close([params[0][2] for _, params, _ in several], [1 - (1 - eta / 5)**t for t in range(61)], 1e-12)
    for T, d, eta, first, last in [(256, 4, 2.0, 1 / 64, 1 / 3), (128, 2, 4.0, 10, 10.5)]:  # in escape times
        escape = lib.escape_time(T, q, d, eta)
        times = np.arange(max(int(4 * T / eta), int(first * escape)), int(last * escape))
        loss = np.array([loss for _, _, loss in lib.one_hot_recursion(T, q, d, eta, int(times[-1]))])[times]
        close(loss / lib.one_hot_loss_at(times, T, q, d, eta), np.ones(len(times)), 0.01)


def test_escape_time():
    """(C5) within 2 % of the recursion, and where (C3) has half of the attention on y."""
    T, q, d, eta = np.array([128, 256, 512]), 4, 8, 7.0
    omegas = np.array([omega for _, (_, omega), _ in lib.one_hot_recursion(T, q, d, eta, 6000)])
    half = np.log((T - q) / q)  # the omega that has half of the attention on y
    crossed = [np.interp(x, path, range(6001)) for x, path in zip(half, omegas.T)]
    ratio = np.divide(crossed, [lib.escape_time(int(x), q, d, eta) for x in T])
    assert (abs(ratio - 1) <= 0.02).all(), f"measured over (C5): {ratio}"
    close(lib.escape_time(10**9, 2, 3, 1.0) * 3 / 1e18, 1.0, 1e-6)
    for T, q, d, eta in [(9, 4, 1, 1.0), (64, 3, 500, 0.1), (1000, 7, 2, 3.0)]:
        close(lib.escape_time(T, q, d, eta), time_to(math.log((T - q) / q), T, q, d, eta, T - 1), 1e-12)


def test_arrays_of_sizes():
    """One size an array, the others numbers: every result in the broadcast shape."""
    for key in ("T", "q", "d"):
        sizes = {"T": 8, "q": 2, "d": 3, key: np.array([4, 5, 6])}
        rows = [{**sizes, key: int(size)} for size in sizes[key]]
        for result, each in zip(ag.one_hot_loss_and_grads(1.0, 0.5, **sizes),
                                zip(*(ag.one_hot_loss_and_grads(1.0, 0.5, **row) for row in rows))):
            close(result, each, 4 * EPS)
        ends = run_all.final(lib.one_hot_recursion(**sizes, eta=0.5, steps=20))
        close(ends[2], [run_all.final(lib.one_hot_recursion(**row, eta=0.5, steps=20))[2] for row in rows], 1e-14)
    assert lib.fcn_loss_floor([10**10], T=10**9, q=10**9, d=10**10).tolist() == [0.0]


@pytest.mark.parametrize("T, q, d", [(5, 4, 6), (4, 2, 3), (5, 1, 2), (6, 5, 20), (3, 2, 1), (3, 3, 2), (2, 2, 9)])
def test_largest_stable_eta(T, q, d):
    """(O5): 2 over the largest eigenvalue of the late Hessian in V and W, from differences of the gradient."""
    E, subsets, h = np.eye(T), lib.all_subsets(T, q), 1e-5
    start = np.concatenate([np.eye(d).ravel(), 14 * (np.eye(T) - 1 / T).ravel()])

    def gradient(x):
        grads = ag.population_loss_and_grads(x[:d * d].reshape(d, d), x[d * d:].reshape(T, T), E,
                                             lib.sum_query(E, subsets), subsets)[1:]
        return np.concatenate([grad.ravel() for grad in grads])
    hessian = np.array([gradient(start + way) - gradient(start - way) for way in h * np.eye(len(start))]) / (2 * h)
    close(lib.largest_stable_eta(T, q, d, full=False), 2 / np.linalg.eigvalsh((hessian + hessian.T) / 2).max(), 1e-4)


@pytest.mark.parametrize("T, q, d", [(3, 2, 1), (4, 3, 1), (2, 2, 2)])
def test_largest_stable_eta_full(T, q, d):
    """(A11): the late Hessian of the cross blocks V_2, W_12 over tokens with the first five moments of the normal."""
    six = np.array([-math.sqrt(3), 0, 0, 0, 0, math.sqrt(3)])  # equally likely
    X = np.array(list(itertools.product(six, repeat=d * T))).reshape(-1, d, T)
    subsets = lib.all_subsets(T, q)
    X, selected = np.repeat(X, len(subsets), axis=0), np.tile(subsets, (len(X), 1))
    data = *lib.full_inputs(X, np.eye(T), selected), lib.sts(X, selected)
    V, W = lib.in_full_model(np.eye(d), 14 * (np.eye(T) - 1 / T))

    def gradient(x):
        cross = x.reshape(2, d, T)
        _, grad_V, grad_W = ag.attention_loss_and_grads(
            V + np.pad(cross[0], ((0, 0), (d, 0))), W + np.pad(cross[1], ((0, T), (d, 0))), *data)
        return np.concatenate([grad_V[:, d:].ravel(), grad_W[:d, d:].ravel()])
    hessian = np.array([gradient(way) - gradient(-way) for way in 1e-5 * np.eye(2 * d * T)]) / 2e-5
    close(lib.largest_stable_eta(T, q, d), 2 / np.linalg.eigvalsh((hessian + hessian.T) / 2).max(), 1e-4)


# ---- fully-connected networks (F) --------------------------------------------------------------------------

@pytest.mark.parametrize("T, q, d", [(1, 1, 3), (4, 2, 3), (5, 5, 2), (3, 1, 1), (7, 3, 2), (2, 1, 4)])
def test_fcn_floors(T, q, d):
    """(F4): the least eigenvalues of E s s^T/q^2 kron I, (F3): the part of the target that W1 does not see."""
    subsets, rng = lib.all_subsets(T, q), np.random.default_rng(14)
    moment = np.kron(subsets.T @ subsets / len(subsets) / q**2, np.eye(d))
    eigenvalues = np.linalg.eigvalsh(moment)  # rising
    widths = np.arange(T * d + 3)
    close(2 * lib.fcn_loss_floor(widths, T, q, d, fisher=2.0), [eigenvalues[:max(T * d - m, 0)].sum() / 2 for m in widths], 1e-12,
          d / (2 * q))
    targets = np.einsum("bt,kl->bktl", subsets, np.eye(d)).reshape(-1, T * d) / q  # target_k = <row, vec(X)>
    scales = 10.0**rng.integers(-30, 30, (T * d + 2, 1))
    for W1 in [rng.standard_normal((3, T * d)), rng.standard_normal((T * d + 2, T * d + T)), np.zeros((2, T * d)),
               rng.standard_normal((4, 2)) @ rng.standard_normal((2, T * d)), np.eye(1, T * d + 5), np.eye(T * d)]:
        rows = W1[:, :T * d]
        seen = np.linalg.lstsq(rows.T, targets.T, rcond=1e-10)[0]
        want = ((targets.T - rows.T @ seen)**2).sum() / (2 * len(subsets))
        for matrix in (W1, W1 * scales[:len(W1)]):  # the row space alone matters
            close(3 * lib.fcn_first_layer_floor(matrix, T, q, d, fisher=3.0), want, 1e-12, d / (2 * q))


def test_first_layer_floor_scales():
    """Rows far apart in size, and columns beyond X, do not hide a direction."""
    for W1 in ([[1.0, 0.0], [1.0, 1e-8]], [[1.0, 0.0, 1e30, 0.0], [0.0, 1.0, 0.0, 0.0]]):
        assert lib.fcn_first_layer_floor(W1, T=2, q=1, d=1) == 0


def test_exact_fcn():
    """(F5): exact to rounding wherever |x| < K, of width Td, and not beyond."""
    rng = np.random.default_rng(15)
    for T, q, d, K in [(1, 1, 1, 8.0), (5, 2, 3, 8.0), (4, 4, 2, 3.0), (7, 3, 1, 0.5)]:
        network = lib.exact_fcn(T, q, d, K)
        assert [np.shape(x) for x in network] == [(T * d, T * d + T), (T * d,), (d, T * d), (d,)]
        assert network[0].max() == 2 * K + 2
        _, selected = lib.sample_batch(rng, 300, T, q, d)
        X = K * rng.uniform(-1, 1, (300, d, T))
        close(lib.fcn(*network, lib.fcn_inputs(X, selected)), lib.sts(X, selected), 100 * EPS, K)
        low = np.full((1, d, T), -3 * K)
        close(lib.fcn(*network, lib.fcn_inputs(low, selected[:1])), np.full((1, d), -K), 100 * EPS, K)
        assert lib.fcn_loss_floor(T * d, T, q, d) == 0 and (q == T or lib.fcn_loss_floor(T * d - 1, T, q, d) > 0)


def test_init_fcn():
    m, T, d = 60, 30, 4
    W1, b1, A, b2 = lib.init_fcn(np.random.default_rng(16), m, T, d)
    assert (W1.shape, b1.shape, A.shape, b2.shape) == ((m, T * d + T), (m,), (d, m), (d,))
    assert not b1.any() and not b2.any()
    within_errors((W1**2).ravel(), 2 / (T * d + T))
    within_errors((A**2).ravel(), 1 / m)
    within_errors(W1.ravel(), 0.0)


# ---- the task ------------------------------------------------------------------------------------------

FOURTH = {"gaussian": 3.0, "rademacher": 1.0, "laplace": 6.0, "logistic": 4.2, "gumbel": 5.4,  # moments
          "student_t": 3 + 6 / (lib.STUDENT_DF - 4)}


@pytest.mark.parametrize("tokens", FOURTH)
def test_tokens(tokens):
    """Mean 0, variance 1, uncorrelated over entries and positions; error bars from the fourth moment."""
    assert set(FOURTH) == set(lib.TOKENS) and lib.STUDENT_DF > 8
    n = 400_000
    X = lib.sample_batch(np.random.default_rng(17), n, 3, 2, 2, tokens)[0].reshape(n, 6)
    bound = normal_bound(6 + 36) / math.sqrt(n)
    mean, covariance = X.mean(axis=0), X.T @ X / n
    spread = np.where(np.eye(6, dtype=bool), math.sqrt(FOURTH[tokens] - 1), 1.0)
    assert (abs(mean) <= bound).all(), f"largest mean {abs(mean).max():.3g}, allowed {bound:.3g}"
    pooled, level = abs(X.mean()), normal_bound(2) / math.sqrt(6 * n)
    assert pooled <= level and abs((X**2).mean() - 1) <= level * math.sqrt(FOURTH[tokens] - 1) + 1e-12
    error = abs(covariance - np.eye(6))
    assert (error <= bound * spread + 1e-12).all(), f"largest error of the covariance {error.max():.3g}"


@pytest.mark.parametrize("T, q", [(5, 2), (7, 1), (4, 3), (13, 13)])
def test_subsets_uniform(T, q):
    n, subsets = 30_000, lib.all_subsets(T, q)
    assert subsets.tolist() == [[float(i in y) for i in range(T)] for y in itertools.combinations(range(T), q)]
    _, selected = lib.sample_batch(np.random.default_rng(18), n, T, q, 1)
    assert set(np.unique(selected)) <= {0, 1} and (selected.sum(axis=1) == q).all()
    _, counts = np.unique(selected, axis=0, return_counts=True)
    assert len(counts) == len(subsets)
    if len(subsets) > 1:
        uniform(counts)
    assert len(lib.all_subsets(84, 3)) == 95_284  # just below the limit


def test_dual_query_badly_conditioned():
    """Encodings that are nearly equal or opposite are independent all the same."""
    for E in ([[1.0, -1.0], [0.0, 1e-3]], [[1.0, 1.0], [0.0, 1e-5]]):
        close((lib.dual_query(E, [[1, 1]]) @ E)[0], np.ones(2), 1e-10)


def test_sign_encodings():
    """All 2^6 patterns of d_e = 2, T = 3 equally likely; entries +-1/sqrt(d_e)."""
    signs = lib.random_sign_encoding(np.random.default_rng(19), 2, 3, 33_333)
    assert signs.shape == (33_333, 2, 3)
    close(abs(signs), np.full(signs.shape, math.sqrt(0.5)), 1e-15)
    _, counts = np.unique(signs.reshape(-1, 6) > 0, axis=0, return_counts=True)
    assert len(counts) == 64
    uniform(counts)
    assert lib.random_sign_encoding(np.random.default_rng(0), 5, 1).shape == (5, 1)
    assert lib.overlaps(np.random.default_rng(0), 2, 3000, 1, 200)[:, 0] == pytest.approx(1.0)  # one row a piece
    assert lib.one_hot_encoding(3).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_task_by_loops():
    rng = np.random.default_rng(20)
    X, selected = lib.sample_batch(rng, 3, 5, 2, 2)
    E = rng.standard_normal((3, 4, 5))
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


# ---- descent -------------------------------------------------------------------------------------------

def bowl(*params):
    return sum((param * param).sum() for param in params) / 2, *params


def test_gradient_descent():
    start = np.array([1.0, -2.0]), 3.0
    states = lib.gradient_descent(start, bowl, 0.5, 6)
    seen = [(t, params, loss, copy.deepcopy(params)) for t, params, loss in states]
    assert [t for t, *_ in seen] == list(range(7))
    for t, params, loss, then in seen:
        for param, kept, first in zip(params, then, start):
            assert np.array_equal(param, kept) and np.array_equal(param, np.multiply(first, 0.5**t))
        assert loss == 7 * 0.25**t
    assert start[0].tolist() == [1.0, -2.0]
    given = np.array([1.0])
    states = lib.gradient_descent((given,), bowl, 0.5, 1)
    given[0] = 7.0
    assert [param.item() for _, (param,), _ in states] == [1.0, 0.5]
    assert [t for t, *_ in lib.gradient_descent((1,), bowl, 0.5, 0)] == [0]
    assert len(list(lib.gradient_descent((1.0,), lambda x: (0.0, 1e308), 1e10, 0))) == 1  # no step after the last


@pytest.mark.parametrize("loss_and_grads, rate, step", [
    (lambda x: (x * x, 2 * x), 1e100, 2), (lambda x: (0.0 * x, x * 1e200), 1e200, 1),
    (lambda x: (x if x > 0.5 else np.nan, 1.0), 0.25, 2), (lambda x: (np.inf, x), 0.125, 0),
    (lambda x: (np.array([1.0, np.nan]), x), 0.125, 0), (lambda x: (0.0, 1e308), 1e10, 1),
    (lambda x: (x, x) if x > 0.6 else math.exp(1e3), 0.25, 2)])
@pytest.mark.parametrize("others", [False, True])
def test_divergence(loss_and_grads, rate, step, others):
    """Named with its step and rate, in the last of several parameters and in one entry alone too."""
    def with_others(x, y):
        loss, *grads = loss_and_grads(y[1])
        return loss, 0.0, np.array([0.0, *grads])
    start, run = ((0.0, [0.0, 1.0]), with_others) if others else ((1.0,), loss_and_grads)
    with pytest.raises(FloatingPointError) as error:
        list(lib.gradient_descent(start, run, rate, 50))
    assert re.search(rf"step {step}\b", str(error.value)) and f"{rate:g}" in str(error.value), str(error.value)


@pytest.mark.parametrize("grads", [
    lambda x, y: (0.0, x), lambda x, y: (0.0, y, y), lambda x, y: (0.0, x, y, y), lambda x, y: (0.0, x[None], y),
    lambda x, y: 0.0, lambda x, y: (0.0, x, None), lambda x, y: (0.0, x, "y"), lambda x, y: (0.0, 1j * x, y),
    lambda x, y: [0.0, x, y], lambda x, y: (0.0, [1.0, 2.0], y)])
def test_gradients_that_do_not_fit(grads):
    for run in (grads, lib.adam(grads, 3)):
        with pytest.raises(ValueError, match="loss_and_grads.* got "):
            list(lib.gradient_descent((np.ones(2), 1.0), run, 1.0, 3))


def test_adam():
    """Against the algorithm in scalars, with the rate falling to 0 over the last 30 % of the steps."""
    curvature, start, rate, steps, beta1, beta2 = [1.0, 10.0, 0.1], [1.0, -2.0, 0.5], 0.1, 40, 0.8, 0.95
    loss = lambda x: ((np.array(curvature) * x * x).sum() / 2, np.array(curvature) * x)
    states = list(lib.gradient_descent((start,), lib.adam(loss, steps, beta1, beta2), rate, steps))
    for k, (h, x) in enumerate(zip(curvature, start)):
        first = second = 0.0
        for t in range(1, steps + 1):
            assert states[t - 1][1][0][k] == pytest.approx(x, rel=1e-12, abs=1e-14)
            first = beta1 * first + (1 - beta1) * h * x
            second = beta2 * second + (1 - beta2) * (h * x)**2
            left = min(1.0, (steps + 1 - t) / (0.3 * steps))
            x -= rate * left * (first / (1 - beta1**t)) / (math.sqrt(second / (1 - beta2**t)) + 1e-8)
        assert states[steps][1][0][k] == pytest.approx(x, rel=1e-12, abs=1e-14)
    used = lib.adam(loss, 5)
    list(lib.gradient_descent((start,), used, rate, 5))
    with pytest.raises(ValueError, match="steps must be .* one run"):  # no second run, and none beyond its length
        list(lib.gradient_descent((start,), used, rate, 5))
    for size in (1e200, 3e155):  # the second only after the correction of its start
        with pytest.raises(FloatingPointError, match="step 0 the square of a gradient"):
            list(lib.gradient_descent((1.0,), lib.adam(lambda x: (x, size * x), 5), rate, 5))
    small = lib.gradient_descent((1.0,), lib.adam(lambda x: (x, np.float32(1e20)), 5), rate, 5)
    assert [params[0] for _, params, _ in small][1] == pytest.approx(0.9)  # its square is beyond float32 alone
    for wrap in (lambda grads: grads, lambda grads: lib.adam(grads, 5)):
        calls = itertools.count()
        with pytest.raises(ValueError, match="loss_and_grads"):  # a shape that changes, not broadcast
            list(lib.gradient_descent((np.ones(2),), wrap(lambda x: (0.0, x if next(calls) < 2 else x[:1])), rate, 5))


# ---- limits of size --------------------------------------------------------------------------------------

def test_long_run():
    """10^5 steps of matrices and scalars at 0.9 of the stable eta stay within 1e-10."""
    worst = run_all.off_the_line(np.eye(3), 2, 1, 0.9 * lib.largest_stable_eta(3, 2, 1), 100_000)
    assert worst <= 1e-10, f"largest difference {worst:.3g}"


@pytest.mark.parametrize("size", [800.0, 1e100, 1e300])
def test_one_hot_attention(size):
    """Scores up to 1e300: attention is one-hot, the loss that of reading one token, its gradients finite."""
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
    assert lib.overlap_loss(size, u, 2, 3) == 0
    assert lib.stochastic_loss(size, 9, 2, 3, 0.0) == lib.length_loss(1.0, size, 9, 2, 3, 0.0) == 0


@pytest.mark.parametrize("name, sizes, rest", [
    ("escape_time", (100_000, 3, 50_000), (0.5,)), ("largest_stable_eta", (100_000, 70_000, 9), ()),
    ("fcn_loss_floor", (100, 100_000, 70_000, 50_000), ()), ("required_dimension", (100_000, 70_000), (0.01,)),
    ("stochastic_floor", (100_000, 3, 50_000, 100_000), ("sum",)), ("overlap_variance", (60_000, 70_000), ())])
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_numpy_sizes(name, sizes, rest, kind):
    """Sizes that are NumPy integers give what Python's give, where their products overflow."""
    close(PUBLIC[name](*map(kind, sizes), *rest), PUBLIC[name](*sizes, *rest), 1e-14)
    big, small = map(kind, (100_000, 70_000))
    close(lib.one_hot_loss_at(1e9, big, small, kind(9), 1.0), lib.one_hot_loss_at(1e9, 100_000, 70_000, 9, 1.0),
          1e-14)
    close(ag.one_hot_loss_and_grads(1.0, 2.0, np.array([big]), small, small),
          np.array(ag.one_hot_loss_and_grads(1.0, 2.0, 100_000, 70_000, 70_000))[:, None], 1e-14)


def test_memory():
    """Beyond inputs and outputs, memory does not grow with B."""
    def peak(call):
        tracemalloc.start()
        call()
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size
    rng, D, T, found = np.random.default_rng(21), 24, 64, []
    for B in (1024, 8192):
        data = [rng.standard_normal(shape) for shape in ((2, D), (D, D), (B, D, T), (B, D), (B, 2))]
        found.append((peak(lambda: ag.attention_loss_and_grads(*data)),
                      peak(lambda: lib.overlaps(rng, 2 * B, T, 3, 64)) - 8 * 2 * B * T))
    for name, small, large in zip(("attention", "overlaps"), *found):
        assert large <= 1.1 * small + 2**16, f"{name}: {small} bytes at B = 1024, {large} at 8192"


# ---- what is let in at the door -----------------------------------------------------------------------------

Y, SIGNS = np.array([[1.0, 1, 0, 0], [0, 1, 0, 1]]), np.array([[1.0, -1, 1, 1], [1, 1, -1, 1], [1, 1, 1, -1]])
X, Z = np.arange(16.0).reshape(2, 2, 4) % 5 - 2, np.arange(24.0).reshape(2, 3, 4) % 5 - 2
KEY, TARGET = np.array([[1.0, 0, 1], [0, 1, 1]]), np.array([[1.0, 0], [0, 2]])
U = np.array([[1.0, 1, 0, -1], [1, 1, 2, 0]])
NETWORK = {"W1": np.arange(36.0).reshape(3, 12) % 7 - 3, "b1": np.array([1.0, -1, 0]),
           "A": np.array([[1.0, 0, 2], [0, 1, -1]]), "b2": np.array([0.0, 1]), "inputs": np.eye(2, 12)}
ATTENTION = {"V": NETWORK["A"], "W": np.eye(3), "Z": Z, "z_query": KEY}
GOOD = {  # arguments that work, of small integers so that every kind of array can hold them; rng is a seed
    "softmax": {"scores": U}, "attention_loss_and_grads": {**ATTENTION, "target": TARGET},
    "transformer": ATTENTION,
    "population_loss_and_grads": {"V": TARGET + 1, "W": np.eye(3), "E": SIGNS, "e_query": KEY, "selected": Y},
    "one_hot_loss_and_grads": {"alpha": 2.0, "omega": 1.0, "T": 4, "q": 2, "d": 3},
    "stochastic_loss_and_grads": {"alpha": 2.0, "c": 1.0, "overlaps": U, "q": 2, "d": 3, "d_e": 5},
    "fcn_loss_and_grads": {**NETWORK, "target": TARGET}, "fcn": NETWORK, "fcn_inputs": {"X": X, "selected": Y},
    "sample_batch": {"rng": 0, "B": 3, "T": 5, "q": 2, "d": 2, "tokens": "laplace"},
    "sts": {"X": X, "selected": Y}, "all_subsets": {"T": 5, "q": 2}, "one_hot_encoding": {"T": 3},
    "random_sign_encoding": {"rng": 0, "d_e": 4, "T": 3, "B": 2},
    "sum_query": {"E": SIGNS, "selected": Y}, "dual_query": {"E": SIGNS, "selected": Y},
    "overlaps": {"rng": 0, "B": 3, "T": 5, "q": 2, "d_e": 4, "query": "dual"},
    "full_inputs": {"X": X, "E": SIGNS, "e_query": KEY},
    "gradient_descent": {"params": (np.array([1.0, 2.0]), 3.0), "loss_and_grads": bowl, "learning_rate": 0.5,
                         "steps": 2},
    "adam": {"loss_and_grads": bowl, "steps": 3, "beta1": 0.5, "beta2": 0.75},
    "one_hot_recursion": {"T": 4, "q": 2, "d": 3, "eta": 0.5, "steps": 3},
    "one_hot_loss_at": {"t": 8.0, "T": 4, "q": 2, "d": 3, "eta": 0.5},
    "escape_time": {"T": 9, "q": 2, "d": 3, "eta": 0.5}, "largest_stable_eta": {"T": 4, "q": 2, "d": 3},
    "overlap_variance": {"q": 2, "d_e": 8, "query": "dual"},
    "overlap_loss": {"c": 1.0, "overlaps": U, "q": 2, "d": 3},
    "stochastic_loss": {"c": 2.0, "T": 4, "q": 2, "d": 3, "sigma2": 0.125},
    "stochastic_trajectory": {"t": 16.0, "T": 8, "q": 2, "d": 3, "d_e": 64, "eta": 1.0},
    "length_loss": {"alpha": 1.0, "c": 2.0, "T": 4, "q": 2, "d": 3, "sigma2": 0.125},
    "stochastic_floor": {"T": 8, "q": 3, "d": 2, "d_e": 64, "query": "sum"},
    "required_dimension": {"T": 8, "q": 2, "eps": 0.5}, "init_fcn": {"rng": 0, "m": 3, "T": 2, "d": 2},
    "fcn_loss_floor": {"m": 3, "T": 4, "q": 2, "d": 3}, "exact_fcn": {"T": 3, "q": 2, "d": 2, "K": 4.0},
    "fcn_first_layer_floor": {"W1": NETWORK["W1"], "T": 4, "q": 2, "d": 3}}


def call(name, arguments):
    """The function's results as a flat list: generators run out, functions called."""
    arguments = {key: np.random.default_rng(value) if key == "rng" and type(value) is int else value
                 for key, value in arguments.items()}
    result = PUBLIC[name](**arguments)
    if inspect.isgenerator(result):
        result = list(result)
    if callable(result):
        result = result(np.array([1.0, 2.0]))
    flat, waiting = [], [result]
    while waiting:
        item = waiting.pop()
        waiting.extend(item) if isinstance(item, (tuple, list)) else flat.append(item)
    return flat


FORMS = {  # what becomes of arrays, sizes and numbers
    "lists": (np.ndarray.tolist, int, float),
    "strided": (lambda array: np.repeat(array, 2, axis=-1)[..., ::2], int, float),
    "integers": (lambda array: array.astype(int), np.int64, lambda x: int(x) if x % 1 == 0 else x),
    "float32": (lambda array: array.astype(np.float32), np.uint8, np.float32),
    "read-only": (lambda array: np.broadcast_to(array, array.shape), int, np.float64),
    "fortran": (np.asfortranarray, int, np.array)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GOOD)
def test_forms(name, form):
    """Lists, integers, float32, read-only and non-contiguous arrays give the same float64; no input changes."""
    arrays, sizes, numbers = FORMS[form]

    def convert(value):
        kind = {np.ndarray: arrays, float: numbers, int: sizes, tuple: lambda v: tuple(map(convert, v))}
        return kind.get(type(value), lambda same: same)(value)
    arguments = {key: value if key == "rng" else convert(value) for key, value in GOOD[name].items()}
    before, errors = copy.deepcopy(arguments), np.geterr()
    got, want = call(name, arguments), call(name, GOOD[name])
    assert np.geterr() == errors
    for key, value in before.items():
        if not callable(value):
            assert str(value) == str(arguments[key]), f"{key} was changed"
    for left, right in zip(got, want):
        assert np.asarray(left).dtype == (int if type(right) is int else np.float64)
        close(left, right, 50 * EPS)  # sums run in another order


RAGGED, NAN, INF = [[1.0], [1.0, 2.0]], float("nan"), float("inf")
SIZE = [0, -1, 2.0, 2.5, True, "3", None, NAN, 1j, [2, 2], RAGGED]
POSITIVE = [0.0, -1.0, NAN, INF, "1", None, 1j, True, [1.0, 2.0], RAGGED]
KINDS = {"rng": [None, "0", np.random, np.random.RandomState(0)], "tokens": ["gauss", None, 3, ["gaussian"]],
         "query": ["both", None, 3, ["sum"]], "loss_and_grads": [None, 3, "f"], "eps": [*POSITIVE, 1.0, 2],
         "params": [None, 1.0, [1.0], (), ("x",), (NAN,), (1.0, None), (RAGGED,), (1j,), ([],), (True,)],
         "steps": [-1, 1.5, 0.0, True, False, None, "3", NAN, [1], np.array([0, 1]), RAGGED],
         **dict.fromkeys(("eta", "learning_rate", "K"), POSITIVE),
         **dict.fromkeys(("beta1", "beta2"), [*POSITIVE, 1.0]),
         **dict.fromkeys(("alpha", "omega", "c", "t", "sigma2"),
                         [NAN, INF, "1", None, 1j, RAGGED, [], [1.0, NAN]])}


def bad_values(name, key, value):
    """What each argument must refuse, by its kind."""
    if isinstance(value, np.ndarray):
        bad = ["text", None, RAGGED, value + 0j, value[:0], value.astype(object), 1.0]
        bad += [] if key == "scores" else [value[None, None]]
        hole = np.arange(value.size).reshape(value.shape) == 1
        computes = name not in ("full_inputs", "fcn_inputs")
        return bad + [np.where(hole, number, value) for number in (NAN, INF) if computes]
    if (name, key) == ("fcn_loss_floor", "m"):
        return [-1, 2.0, True, "3", None, NAN, RAGGED, [], [1, -1]]
    if key in KINDS:
        return KINDS[key]
    several = name in ("one_hot_loss_and_grads", "one_hot_recursion")
    optional = (name, key) == ("random_sign_encoding", "B")
    return [bad for bad in SIZE if not (several and bad == [2, 2] or optional and bad is None)]


NOT_ALL = ("one_hot_loss_at", "escape_time", "stochastic_loss", "stochastic_trajectory", "length_loss",
           "overlap_loss", "stochastic_floor", "required_dimension")  # they need q < T
BAD = [(name, key, bad) for name, good in GOOD.items() for key, value in good.items()
       for bad in bad_values(name, key, value)]
BAD += [(name, "q", good["T"] + 1) for name, good in GOOD.items() if "T" in good and "q" in good]
BAD += [(name, "q", GOOD[name].get("T", 4)) for name in NOT_ALL]
BAD += [(name, "selected", bad) for name, good in GOOD.items() if "selected" in good
        for bad in (0 * Y, 2 * Y, Y / 2, -Y, [[1, 1, 0, 0], [1, 0, 0, 0]], Y[:, :3], Y[0])]
o = np.ones
BAD += [(name, *bad) for name, several in {
    "attention_loss_and_grads": [("W", o((4, 4))), ("W", o((3, 2))), ("Z", o((2, 4, 4))), ("Z", o((2, 3, 0))),
                                 ("z_query", o((3, 3))), ("z_query", o((2, 2))), ("target", o((2, 3))),
                                 ("target", o((1, 2)))],
    "transformer": [("Z", o((2, 4, 4))), ("z_query", o((1, 3)))],
    "population_loss_and_grads": [("V", o((2, 3))), ("E", o((4, 4))), ("e_query", o((2, 4)))],
    "full_inputs": [("E", o((3, 5))), ("E", o((3, 3, 4))), ("e_query", o((2, 2))), ("e_query", o((1, 3)))],
    "fcn_loss_and_grads": [("inputs", o((2, 11))), ("b1", o(4)), ("A", o((2, 4))), ("b2", o(3)),
                           ("target", o((1, 2)))],
    "fcn": [("inputs", o(12)), ("A", o((3, 2)))], "fcn_first_layer_floor": [("W1", o((3, 11)))],
    "all_subsets": [("T", 448), ("T", 1000), ("T", 10**6), ("T", 10**18)], "overlap_variance": [("q", 9)],
    "escape_time": [("q", 5), ("eta", np.longdouble("1e-4000"))], "adam": [("steps", 0)],
    "one_hot_encoding": [("T", 2**63), ("T", np.uint64(2**63)), ("T", 10**400)], "softmax": [("scores", [10**400])],
    "stochastic_loss": [("c", -1.0), ("c", 4.5), ("sigma2", -0.1), ("sigma2", [0.1, 0.1])],
    "length_loss": [("c", -1.0), ("c", [1.0, 9.0]), ("sigma2", -0.1)],
    "one_hot_loss_at": [("t", -1.0), ("t", [1.0, -2.0])],
    "stochastic_trajectory": [("t", -1.0), ("t", 1e300), ("q", 65)], "overlap_loss": [("c", [1.0, 2.0])],
    "stochastic_loss_and_grads": [("c", [1.0, 2.0, 3.0, 4.0]), ("alpha", [1.0, 2.0]), ("q", 5)],
    "one_hot_loss_and_grads": [("T", [4, 1]), ("T", np.array([2**63], dtype=np.uint64))],
    "one_hot_recursion": [("d", [1, 0])]}.items() for bad in several]
BAD += [("run_all", argument, line.split(" ")) for argument, lines in {
    "--only": ["--only nothing", "--only ", "--only dynamics,"],
    "--seed": ["--seed -1", "--seed x", "--seed 1.5", "--seed"],
    "--trace": ["--trace 0", "--trace -2", "--trace 1e3", f"--trace {10**30}"],
    "T": ["--trace 1 --T 0", "--trace 1 --T -4", "--trace 1 --T x", "--trace 1 --T 40 --q 20",
          "--trace 1 --T 90000 --q 1", f"--trace 1 --T {2**64 - 1}"],
    "q": ["--trace 1 --q 9", "--trace 1 --q 0"], "d": ["--trace 1 --d 0", "--trace 1 --d 10000000"],
    "eta": ["--trace 1 --eta 0", "--trace 1 --eta nan", "--trace 1 --eta inf"], "--nonsense": ["--nonsense"],
    "--T": ["--T 5", "--T 5 --quick"], "--eta": ["--eta 2 --benchmark"],
    "dynamics": ["dynamics"]}.items() for line in lines]
BAD += [("run_all", "--out", ["--out", str(ROOT / "run_all.py" / path)]) for path in ("", "below", "a\nb")]


@pytest.mark.parametrize("name, key, bad", BAD, ids=lambda value: str(value).replace("\n", "")[:30])
def test_bad_input(name, key, bad, capsys):
    """A ValueError, or exit status 2 with one line on stderr, that names the argument and says what was given."""
    if name == "run_all":
        with pytest.raises(SystemExit) as error:
            run_all.main(bad)
        message = capsys.readouterr().err
        assert error.value.code == 2 and message.count("\n") == 1 and "Traceback" not in message, message
    else:
        with pytest.raises(ValueError) as error:
            call(name, {**GOOD[name], key: bad})
        message = str(error.value)
        assert error.type is ValueError and "got " in message, f"{error.type.__name__}: {message}"
    assert re.search(rf"(?<!\w){re.escape(key)}(?!\w)", message), f"{key} is not named: {message}"


def test_bad_input_is_complete():
    assert len(BAD) >= 80 and {name for name, _, _ in BAD} == {*PUBLIC, "run_all"} and set(GOOD) == set(PUBLIC)


@pytest.mark.parametrize("name, bad", [
    ("one_hot_loss_and_grads", {"alpha": [1.0, 2.0], "omega": [1.0, 2.0, 3.0]}),
    ("one_hot_recursion", {"T": [4, 5], "q": [1, 2, 3]}), ("length_loss", {"alpha": [1.0, 2.0], "c": [1.0] * 3})])
def test_shapes_that_do_not_broadcast(name, bad):
    with pytest.raises(ValueError, match="got ") as error:
        call(name, {**GOOD[name], **bad})
    assert all(re.search(rf"\b{key}\b", str(error.value)) for key in bad), error.value


@pytest.mark.parametrize("name, huge", [
    ("attention_loss_and_grads", {"V": 1e200, "Z": 1e200}), ("transformer", {"V": 1e200, "Z": 1e200}),
    ("fcn", {"W1": 1e200, "inputs": 1e200}), ("sts", {"X": 1.7e308}), ("sum_query", {"E": 1.7e308}),
    ("overlap_loss", {"c": 1e308}), ("length_loss", {"alpha": 1e200}),
    ("population_loss_and_grads", {"V": 1e200}), ("stochastic_loss_and_grads", {"alpha": 1e160}),
    ("one_hot_loss_at", {"t": 1e300, "eta": 1e300}), ("escape_time", {"eta": 5e-324}), ("exact_fcn", {"K": 1e308}),
    ("dual_query", {"E": 1e-310}), ("one_hot_loss_and_grads", {"alpha": 1e200}),
    ("fcn", {"W1": 1e200, "A": 1e200}),
    # one result alone: the loss, a gradient, the hidden layer
    ("attention_loss_and_grads", {"V": 0.0, "target": 1e155}), ("fcn_loss_and_grads", {"target": 1e155}),
    ("attention_loss_and_grads", {"V": 0.0, "W": 0.0, "Z": 1e200, "target": 1e150}),
    ("attention_loss_and_grads", {"V": 1e-150 * NETWORK["A"], "W": 0.0, "Z": 1e150 * Z, "z_query": 1e200}),
    ("stochastic_loss_and_grads", {"alpha": 1e155, "overlaps": 0.0}),
    ("stochastic_loss_and_grads", {"alpha": 1e9, "c": 0.0, "overlaps": 1e300 * U}),
    ("fcn_loss_and_grads", {"W1": -1e200, "inputs": 1e200}), ("fcn", {"W1": -1e200, "inputs": 1e200}),
    ("fcn_loss_and_grads", {"W1": 1e-300, "b1": 0.0, "inputs": 1e200, "A": 1e107})])
def test_overflow(name, huge):
    """Finite input with a result beyond float64 is an error, not a warning."""
    with pytest.raises(OverflowError):
        call(name, {**GOOD[name], **{key: np.broadcast_to(size, np.shape(GOOD[name][key]))
                                     for key, size in huge.items()}})


def test_messages():
    """They print what was wrong, not its neighbour."""
    layers = np.ones((3, 2)), np.ones(4), np.ones((1, 3)), np.ones(1), np.ones((1, 2))
    for wrong, bad_call in [("q must be at most T, T = 4; got 9", lambda: lib.all_subsets(4, 9)),
                            ("finite; got nan", lambda: ag.softmax([1.0, NAN])),
                            ("b1 must be of shape (m,) with m = 3 as in W1; got (4,)", lambda: lib.fcn(*layers))]:
        with pytest.raises(ValueError, match=re.escape(wrong)):
            bad_call()


@pytest.mark.parametrize("name, key", [("softmax", "scores"), ("sts", "X"), ("attention_loss_and_grads", "V"),
                                       ("fcn_loss_and_grads", "inputs"), ("overlap_loss", "overlaps")])
def test_masked_arrays_are_refused(name, key):
    """A mask would be dropped without a word."""
    with pytest.raises(ValueError, match=rf"{key} must .* got masked_array"):
        call(name, {**GOOD[name], key: np.ma.masked_array(GOOD[name][key])})


def test_underflow_is_no_error():
    """Sharp attention works for callers who run under np.seterr(all="raise")."""
    with np.errstate(all="raise"):
        assert ag.softmax([0.0, -1000.0]).tolist() == [1.0, 0.0]
        ag.one_hot_loss_and_grads(1.0, 800.0, 4, 2, 3)
        lib.overlap_loss(900.0, [[1.0, 0.0, 0.0]], 1, 2)
        lib.stochastic_loss(900.0, 9, 2, 3, 0.0)
        lib.stochastic_trajectory(1e3, 9, 2, 3, 10**6, 1.0)


# ---- documents --------------------------------------------------------------------------------------------

SIGNATURES = """softmax(scores); attention_loss_and_grads(V, W, Z, z_query, target); fcn(W1, b1, A, b2, inputs);
population_loss_and_grads(V, W, E, e_query, selected); one_hot_loss_and_grads(alpha, omega, T, q, d);
stochastic_loss_and_grads(alpha, c, overlaps, q, d, d_e); fcn_loss_and_grads(W1, b1, A, b2, inputs, target);
sample_batch(rng, B, T, q, d, tokens='gaussian'); sts(X, selected); all_subsets(T, q); one_hot_encoding(T);
sum_query(E, selected); dual_query(E, selected); full_inputs(X, E, e_query); transformer(V, W, Z, z_query);
gradient_descent(params, loss_and_grads, learning_rate, steps); one_hot_loss_at(t, T, q, d, eta);
escape_time(T, q, d, eta); largest_stable_eta(T, q, d); random_sign_encoding(rng, d_e, T, B=None);
overlaps(rng, B, T, q, d_e, query='dual'); overlap_variance(q, d_e, query='dual'); required_dimension(T, q, eps);
stochastic_loss(c, T, q, d, sigma2); stochastic_trajectory(t, T, q, d, d_e, eta); fcn_inputs(X, selected);
length_loss(alpha, c, T, q, d, sigma2); init_fcn(rng, m, T, d); fcn_loss_floor(m, T, q, d);
fcn_first_layer_floor(W1, T, q, d); exact_fcn(T, q, d, K=8.0)"""


def test_public_functions():
    for line in re.split(r";\s", SIGNATURES):
        name = line.split("(")[0]
        assert name + str(inspect.signature(PUBLIC[name])) == line
    assert str(inspect.signature(lib.adam)).startswith("(loss_and_grads, ")
    for name, function in PUBLIC.items():
        missing = [part for part in ("Returns", "Raises", ">>> ") if part not in (function.__doc__ or "")]
        assert not missing, f"{name}: no {missing} in its docstring"
        assert function.__module__ == ("analytic_grads" if name.endswith("_and_grads") or name == "softmax"
                                       else "sparse_token_selection")


@pytest.mark.parametrize("module", [ag, lib])
def test_docstring_examples(module):
    failed, tried = doctest.testmod(module)
    assert failed == 0 and tried >= 6, f"{failed} of {tried} examples failed"


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_snippets(tmp_path, monkeypatch):
    """Every Python snippet runs, in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    snippets, names = re.findall(r"^```python\n(.*?)^```", readme(), flags=re.M | re.S), {}
    assert snippets
    for k, snippet in enumerate(snippets):
        if ">>>" in snippet:
            test = doctest.DocTestParser().get_doctest(snippet, names, f"snippet {k}", "README.md", 0)
            assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
            names = test.globs
        else:
            exec(compile(snippet, f"README.md, snippet {k}", "exec"), names)


def tags(text):
    """The tags named in a text; ranges from the first to the last, and lists, are expanded."""
    one, found = r"[APOCSLFN]\d+", set()
    group = rf"\(({one}(?:(?:,\s*|\s+and\s+|-){one})*)\)(?:\s*(?:-|–|to)\s*\(({one})\))?"
    for inside, last in re.findall(group, text):
        inside += f"-{last}" if last else ""
        found.update(re.findall(one, inside))
        for first, end in re.findall(rf"({one})-({one})", inside):
            found.update(f"{first[0]}{k}" for k in range(int(first[1:]), int(end[1:]) + 1))
    return found


def test_tags_are_honest():
    text = readme()
    used = {Path(module.__file__).name: tags(inspect.getsource(module))
            for module in (ag, lib, run_all, sys.modules[__name__])}
    derived = {tag for tag in re.findall(r"\\tag\{\(?([A-Z]\d+)\)?\}", text)}
    derived |= set().union(*map(tags, re.findall(r"\*\*(\([^*]*\))", text)))
    for name, found in used.items():
        assert found <= derived, f"{name} uses what README.md does not derive: {sorted(found - derived)}"
    unused = derived - set().union(*used.values())
    assert not unused, f"derived in README.md, used nowhere: {sorted(unused)}"


def test_readme_names_what_exists():
    text = readme()
    for path in re.findall(r"figures/[\w.-]+\.\w+", text):
        assert (ROOT / path).exists(), f"{path} is not there"
    for name in re.findall(r"\btest_\w+", text):
        assert name == "test_reference" or name in globals(), f"{name} is no test"
    with open(ROOT / "figures" / "claims.csv", newline="", encoding="utf-8") as file:
        known, named, in_map = {row["id"] for row in csv.DictReader(file)}, set(), False
    for line in text.splitlines():
        last = line.strip().strip("|").split("|")[-1]
        in_map = line.lstrip().startswith("|") and (in_map or "claim" in last.lower() and "`" not in last)
        named |= set(re.findall(r"`([^`]+)`", last)) if in_map else set()
    assert named and named <= known, f"no such claim: {sorted(named - known)}"


# ---- imports and the command line, in processes of their own --------------------------------------------------

def python(*arguments, cwd=ROOT, **options):
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=60, **options)


@pytest.mark.parametrize("module", ["analytic_grads", "sparse_token_selection"])
def test_import_is_quiet(module):
    """No output, no change of global state, no matplotlib, under 0.3 s of processor time beyond NumPy's import."""
    done = python("-W", "error", "-c", f"""
import json, sys, time, warnings, numpy as np
state = lambda: repr((np.random.get_state(), np.get_printoptions(), warnings.filters, np.geterr()))
before, start = state(), time.process_time()
import {module}
spent = time.process_time() - start
print(json.dumps([spent, before == state(), "matplotlib" in sys.modules]))""")
    assert done.stderr == "" and done.stdout.count("\n") == 1, done.stdout + done.stderr
    spent, same, matplotlib = json.loads(done.stdout)
    assert same and not matplotlib and spent < 0.3, done.stdout


def test_analytic_grads_alone(tmp_path):
    shutil.copy(ROOT / "analytic_grads.py", tmp_path)
    done = python("-c", "import doctest, analytic_grads; print(doctest.testmod(analytic_grads))", cwd=tmp_path,
                  env={"PYTHONPATH": ""})
    assert done.returncode == 0 and "failed=0" in done.stdout, done.stdout + done.stderr


def test_trace(capsys):
    assert run_all.main(["--trace", "2"]) == 0
    differences = [float(x) for x in re.findall(r"largest difference ([\d.e+-]+)", capsys.readouterr().out)]
    assert len(differences) == 10 and max(differences) < 1e-14, differences


QUICK = [str(ROOT / "run_all.py"), "--quick", "--only", "dynamics", "--out"]


def whole(folder):
    """claims.csv of a folder that has it and one figure, both whole, and nothing else."""
    assert sorted(path.name for path in folder.iterdir()) == ["1_dynamics.png", "claims.csv"]
    picture = (folder / "1_dynamics.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and picture[-8:-4] == b"IEND"
    return (folder / "claims.csv").read_bytes()


def test_run_in_a_hostile_place(tmp_path):
    """A space in the path, no home, no display, an ASCII locale; then two runs at once: the same bytes."""
    hostile = {"MPLBACKEND": "nonsense", "HOME": str(ROOT / "run_all.py/home"), "LC_ALL": "C", "PYTHONUTF8": "0",
               "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "", "MPLCONFIGDIR": "", "DISPLAY": ""}
    done = python(*QUICK, str(tmp_path / "a space" / "deeper"), cwd=tmp_path, env=hostile)
    assert done.returncode == 0 and "claims hold" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "\r" not in done.stdout and sorted(path.name for path in tmp_path.iterdir()) == ["a space"]
    first = whole(tmp_path / "a space" / "deeper")
    command = [sys.executable, *QUICK, str(tmp_path / "both")]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert whole(tmp_path / "both") == first


def test_interrupt(tmp_path):
    """Ctrl-C: status 130 within a second or so, one line, no half-written file, the old one whole."""
    (tmp_path / "claims.csv").write_text("old")
    process = subprocess.Popen([sys.executable, *QUICK, str(tmp_path)], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE,  # a shell may have told its background jobs to ignore it
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert "dynamics" in process.stdout.readline()
    time.sleep(0.3)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    spent = time.monotonic() - start
    assert process.returncode == 130 and len(errors.strip().splitlines()) == 1, errors
    assert spent < 3, f"{spent:.1f} s"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"claims.csv": "old"}


def test_bad_command_in_a_process(tmp_path):
    done = python(str(ROOT / "run_all.py"), "--seed", "-1", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "--seed" in python(str(ROOT / "run_all.py"), "--help").stdout
    for arguments, status in ("--seed -1", 2), ("--trace 1", 0):  # with its output closed
        closed = subprocess.run(["sh", "-c", f'"$@" {arguments} >&-', "sh", sys.executable, str(ROOT / "run_all.py")],
                                capture_output=True, text=True, timeout=60)
        assert (closed.returncode, closed.stderr.count("\n")) == (status, status // 2), closed.stderr
