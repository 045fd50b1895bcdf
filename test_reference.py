"""Every public function against an independent check, bad input, the command line, and the README.

A test never repeats the formula that it tests: gradients are checked against complex-step differentiation of
forward passes written again here, laws against enumeration, Monte Carlo with its error bar, quadrature or
linear algebra. Nothing depends on what one random stream gave: bounds on sampled numbers are normal bounds at
level 1e-6. Each message gives the largest difference.
"""
import ast
import collections
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
import shutil
import signal
import subprocess
import sys
import threading
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
          if hasattr(value, "__wrapped__") and getattr(value, "__module__", "") == module.__name__}
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
    excess = error / (allowed + 1e-12 * (1 + abs(np.asarray(exact))))
    assert (excess <= 1).all(), f"error over its bound: {excess.max():.3g}"


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


def attention(V, W, Z, z_query):
    return np.einsum("ci,bit,bt->bc", V, Z, attend(np.einsum("bit,ij,bj->bt", Z, W, z_query)))


def attention_loss(V, W, Z, z_query, target):
    return ((attention(V, W, Z, z_query) - target)**2).sum() / (2 * len(Z))


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
    E, D = lib.random_sign_encoding(rng, d_e, T, None if shared else B), d + d_e
    W1, b1, A, b2 = lib.init_fcn(rng, m, T, d)
    network = W1, b1 + rng.standard_normal(m), A, b2 + rng.standard_normal(d)
    return {"X": X, "selected": selected, "E": E, "query": query, "network": network,
            "overlaps": lib.overlaps(rng, B, T, q, d_e, query), "V": rng.standard_normal((d, D)),
            "W": sharp * rng.standard_normal((D, D)), "alpha": rng.standard_normal(),
            "c": sharp * rng.standard_normal()}


def cases(s, rows=slice(None)):
    """name -> (loss and derivatives, the same loss again, parameters, sizes, scores) on rows of a setting.

    sizes bound the loss and the norm of each derivative by the norms of their factors, scores the scores, before
    any cancellation: rounding is at most a few hundred eps times (1 + scores) sizes. A dual query that should
    be 0 is known to eps only, so queries count as 1 long at least.
    """
    X, selected, E, V, W = s["X"][rows], s["selected"][rows], s["E"], s["V"], s["W"]
    E, u, alpha, c = E if E.ndim == 2 else E[rows], s["overlaps"][rows], s["alpha"], s["c"]
    (_, d, T), q, d_e = X.shape, int(selected[0].sum()), E.shape[-2]
    e_query = lib.QUERIES[s["query"]](E, selected)
    Z, z_query, target = run_all.on_samples(E, X, selected, s["query"])
    inputs = lib.fcn_inputs(X, selected)
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
    first = lib.first_subset(1, T, q)
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
    for B, d, D, T in [(2, 3, 1, 5), (3, 1, 7, 2), (4, 2, 2, 1), (155, 2, 31, 127)]:  # pieces of 76, 76 and 3
        data = [rng.standard_normal(shape) for shape in ((B, D, T), (B, D), (B, d))]
        V, W = rng.standard_normal((d, D)), rng.standard_normal((D, D)) / D
        result = ag.attention_loss_and_grads(V, W, *data)
        for k, grad in enumerate(result[1:] if B < 155 else ()):
            want = run_all.complex_step(lambda V, W: attention_loss(V, W, *data), (V, W), k)
            close(grad, want, 1e-12, max(abs(want).max(), 1e-3))
        samples = [ag.attention_loss_and_grads(V, W, *(x[b:b + 1] for x in data)) for b in range(B)]
        for got, one in zip(result, zip(*samples)):
            close(got, np.mean(one, axis=0), 1e-12, max(abs(got).max(), 1e-3))
        close(lib.transformer(V, W, *data[:2]), attention(V, W, *data[:2]), 1e-12)


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
        s = setting(rng, B, T, q, d, d_e, m, tokens=list(lib.TOKENS)[rng.integers(len(FOURTH))],
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
                assert error <= allowed, where
            mean = [np.mean(one, axis=0) for one in zip(*(lone[name][0](*params) for lone in alone))]
            moved_result = list(again[name][0](*again[name][2]))
            if name == "network":
                moved_result[1] = moved_result[1][:, np.argsort(columns)]
            for got, batch, order, size in zip(result, mean, moved_result, sizes):
                error = max(np.max(abs(got - batch)), np.max(abs(got - order)))
                assert error <= rounding * size, f"batch or order, {where}"
        close(ag.softmax(s["c"] * s["overlaps"]).sum(axis=1), np.ones(B), 4 * EPS)
        top = d / (2 * q)
        least, own = float(lib.fcn_loss_floor(m, T, q, d)), lib.fcn_first_layer_floor(s["network"][0], T, q, d)
        assert 0 <= least <= own + 1e-12 * top and own <= top * (1 + 1e-12), (seed, least, own, top)


# ---- the population (P), one-hot (O) and stochastic (S) encodings -------------------------------------------

def full_model(V, W, E, X, selected, query="sum"):
    """Loss and gradients of the full model on samples, from its blocks V_1 and W_22."""
    return ag.attention_loss_and_grads(*lib.in_full_model(V, W), *run_all.on_samples(E, X, selected, query))


def all_tokens(values, d, T, q):
    """Every X with entries among equally likely values, each with every subset."""
    X, subsets = np.array(list(itertools.product(values, repeat=d * T))).reshape(-1, d, T), lib.all_subsets(T, q)
    return np.repeat(X, len(subsets), axis=0), np.tile(subsets, (len(X), 1))


@pytest.mark.parametrize("tokens", ["all signs", *lib.TOKENS])
def test_population(tokens):
    """(P1, P2, P4) are the means of (A4, A5, A8) over 2^6 sign tokens and all y (P5), and over samples of every
    law; the cross blocks average to 0 (A9), W_12 for laws without skewness."""
    rng, T, q, d, d_e = np.random.default_rng(4), 4, 2, 2, 3
    E, V, W = (rng.standard_normal(shape) for shape in ((d_e, T), (d, d), (d_e, d_e)))
    loss, *grads = ag.population_loss_and_grads(V, W, *run_all.on_population(E, lib.all_subsets(T, q), "sum"))
    exact = loss, *lib.in_full_model(*grads)
    if tokens == "all signs":
        for got, want in zip(full_model(V, W, E, *all_tokens([-1.0, 1.0], d, T, q)), exact):
            close(got, want, 1e-12)
        return
    found = []
    for _ in range(500):
        loss, grad_V, grad_W = full_model(V, W, E, *lib.sample_batch(rng, 40, T, q, d, tokens))
        assert not grad_W[:, :d].any()  # in every sample
        grad_W[:d] *= tokens != "gumbel"
        found.append(np.concatenate([[loss], grad_V.ravel(), grad_W.ravel()]))
    within_errors(found, np.concatenate([np.ravel(part) for part in exact]))


def test_skewed_tokens():
    """(A10): with one-hot encodings skewed tokens pull content into W_12; over all of a law of third moment 3/2,
    and by samples of Gumbel tokens, whose third moment is 12 sqrt(6) zeta(3)/pi^3."""
    def compare(check, results, skewness, T, q, d, alpha=0.7):
        on_y, a = lib.first_subset(1, T, q), attend(1.3 * lib.first_subset(1, T, q))
        pull = alpha * skewness * q / T * (a * (1 - a) * (alpha * a - on_y / q)).sum()
        samples = [full_model(alpha * np.eye(d), 1.3 * (np.eye(T) - 1 / T), np.eye(T), *data)[2][:d, d:]
                   for data in results]
        check(samples, np.full((d, T), pull))
    for T, q, d in [(3, 2, 1), (4, 1, 1), (2, 1, 2)]:
        data = all_tokens([2.0, -0.5, -0.5, -0.5, -0.5], d, T, q)
        compare(lambda got, want: close(got[0], want, 1e-13), [data], 1.5, T, q, d)
    rng = np.random.default_rng(5)
    batches = (lib.sample_batch(rng, 500, 8, 2, 4, "gumbel") for _ in range(100))
    compare(within_errors, batches, 12 * math.sqrt(6) * 1.2020569031595942 / math.pi**3, 8, 2, 4)


@pytest.mark.parametrize("T, q, d", [(5, 2, 3), (7, 1, 1), (4, 4, 2), (2, 1, 5), (6, 5, 2)])
def test_one_hot_line(T, q, d):
    """(O1): at V = alpha I, W = omega (I - 11^T/T) matrix gradients are scalars times the same matrices."""
    whole, centre = run_all.on_population(lib.one_hot_encoding(T), lib.all_subsets(T, q), "sum"), np.eye(T) - 1 / T
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
    d_e, T, d, c = 2, 3, 2, 1.7
    signs = run_all.all_signs(d_e, T)
    whole = run_all.on_population(signs, lib.first_subset(len(signs), T, q), query)
    u = np.einsum("bet,be->bt", signs, whole[1])
    loss, grad_V, grad_W = ag.population_loss_and_grads(0.8 * np.eye(d), c * np.eye(d_e), *whole)
    close(grad_W, grad_W[0, 0] * np.eye(d_e), 1e-14, 1.0)
    scalars = ag.stochastic_loss_and_grads(0.8, c, u, q, d, d_e)
    close((loss, grad_V[0, 0], grad_W[0, 0]), scalars, 1e-13, 1.0)
    rng = np.random.default_rng(6)
    for X, y in zip(rng.standard_normal((3, d, T)), np.eye(T)):  # data sets of one sequence: averages over E alone
        data = np.tile(X, (len(signs), 1, 1)), np.tile(y, (len(signs), 1))
        _, grad_V, grad_W = full_model(rng.standard_normal((d, d)), c * np.eye(d_e), signs, *data, query)
        close(grad_V[:, d:], np.zeros((d, d_e)), 1e-14)
        close(grad_W, np.diag([0, 0, *2 * [grad_W[d, d]]]), 1e-14, 1 + abs(grad_W).max())
    drawn = lib.overlaps(np.random.default_rng(7), 20_000, T, q, d_e, query)
    products = lambda u: np.hstack([u, np.einsum("bi,bj->bij", u, u).reshape(len(u), -1)])
    within_errors(products(drawn), products(u).mean(axis=0))
    if query == "sum" or q == 1:  # no less than exact
        assert abs(lib.overlap_variance(q, d_e, query) - (whole[1]**2).sum() / len(signs) / d_e) < 1e-14


def test_dual_query():
    """The least-norm least-squares solution, sample by sample; 1 on y wherever it can be."""
    rng, subsets, signs = np.random.default_rng(8), lib.all_subsets, lib.random_sign_encoding
    equal = np.array([[1.0, 1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]]) / math.sqrt(2)
    for E, selected in [(rng.standard_normal((5, 3, 7)), subsets(7, 3)[:5]), (equal, subsets(4, 2)),
                        (equal, subsets(4, 3)), (signs(rng, 4, 9), subsets(9, 4)), (np.ones((1, 1)), np.ones((1, 1))),
                        (signs(rng, 16, 32, 400), lib.sample_batch(rng, 400, 32, 5, 1)[1]),
                        (np.zeros((2, 3)), subsets(3, 1)),
                        (1e150 * np.eye(3), subsets(3, 2)), (1e-150 * np.eye(3), subsets(3, 2)),
                        # nearly opposite, nearly equal: independent all the same
                        (np.array([[1.0, -1.0], [0.0, 1e-3]]), np.ones((1, 2))),
                        (np.array([[1.0, 1.0], [0.0, 1e-5]]), np.ones((1, 2)))]:
        got = lib.dual_query(E, selected)
        for b, y in enumerate(selected > 0):
            E_y = (E if E.ndim == 2 else E[b])[:, y]
            want = np.linalg.lstsq(E_y.T, np.ones(y.sum()), rcond=1e-12)[0]
            close(got[b], want, 1e-10, 1 / (abs(E_y).max() or 1.0))
            if np.linalg.matrix_rank(E_y) == y.sum() or (E_y == E_y[:, :1]).all() and E_y.any():
                close(E_y.T @ got[b], np.ones(y.sum()), 1e-10)
        close(lib.sum_query(E, selected)[0], (E if E.ndim == 2 else E[0])[:, selected[0] > 0].sum(axis=1), 1e-15)


@pytest.mark.parametrize("T, q, d_e, B", [(32, 1, 64, 4000), (128, 2, 64, 4000), (32, 3, 64, 40_000), (64, 4, 256, 4000)])
def test_overlap_variance(T, q, d_e, B):
    """sigma^2 is a lower bound on the variance of the overlaps off y, within .2 % here, also by (E_y^T E_y)^-1."""
    E = np.random.default_rng(9).choice([-1.0, 1.0], (40_000, d_e, q)) / math.sqrt(d_e)
    norms = np.linalg.inv(np.einsum("bei,bej->bij", E, E)).sum(axis=(1, 2)) / d_e
    u = lib.overlaps(np.random.default_rng(10), B, T, q, d_e)[:, q:]
    for squares in (norms, (u**2).mean(axis=1)):
        error = normal_bound(8) * squares.std() / math.sqrt(len(squares)) / squares.mean() + 1e-12
        ratio = squares.mean() / lib.overlap_variance(q, d_e)
        assert 1 - error <= ratio <= 1.002 + error


def test_overlap_loss():
    """(S4) is the loss at the alpha where the gradient, linear in alpha, is 0."""
    for T, q, d, d_e, query in [(6, 2, 3, 8, "dual"), (5, 4, 1, 3, "sum"), (31, 3, 2, 24, "dual"), (2, 1, 1, 1, "sum")]:
        u = lib.overlaps(np.random.default_rng(10), 200, T, q, d_e, query)
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
                       *(ag.stochastic_loss_and_grads(1.1, c, rows, q, d, d_e)[0] for rows in (u[:, :T], u))]
                      for u in groups])
    predicted = np.array([lib.stochastic_loss(c, T, q, d, sigma2),
                          *(lib.length_loss(1.1, c, longer, q, d, sigma2) for longer in (T, 2 * T))])
    error = abs(found.mean(axis=0) - predicted)
    allowed = np.array([0.02, 0.04, 0.04]) * predicted + 4 * found.std(axis=0, ddof=1) / math.sqrt(len(groups))
    assert (error <= allowed).all(), f"error over its bound: {error / allowed}"


def test_stochastic_loss_normal_overlaps():
    """(S5) for overlaps normal off y, as it assumes: the next order is below 1e-3 here, its last term 9e-3. Its
    m, M, v, h from the moments of e^{c(u-1)} by quadrature."""
    T, q, sigma2, c, rng = 32, 3, 0.03, 2.0, np.random.default_rng(22)
    off_y = math.sqrt(sigma2) * rng.standard_normal((16, 8000, T - q))
    found = [lib.overlap_loss(c, np.hstack([np.ones((8000, q)), u]), q, 2) for u in off_y]
    error = 4 * np.std(found, ddof=1) / 4
    close(lib.stochastic_loss(c, T, q, 2, sigma2), np.mean(found), 1e-3 + error / np.mean(found))
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    for c, sigma2 in [(0.7, 0.3), (3.0, 0.04), (6.0, 0.02)]:
        x = np.exp(c * (math.sqrt(sigma2) * nodes - 1))
        one, two, three = (weights @ x**k / weights.sum() for k in (1, 2, 3))
        close(lib.moments(c, 9, 2, sigma2), 7 * np.array([one, two, two - one**2, three - two * one]), 1e-12)


def test_closed_forms_without_spread():
    """At sigma2 = 0 every overlap off y is 0: (S5) and (L1) are the one-hot loss at omega = c, exactly; with
    spread they are not below 0. L/L_0 row by row in run_all has the mean of the loss of the two scalars."""
    for (T, q, d), c in itertools.product([(2, 1, 1), (7, 3, 2), (101, 5, 3)], (0.0, 0.3, 2.0, 8.0)):
        curve = [float(ag.one_hot_loss_and_grads(alpha, c, T, q, d)[0]) for alpha in (0.0, 0.9, 1.8)]
        close(lib.length_loss([0.0, 0.9, 1.8], c, T, q, d, 0.0), curve, 1e-12)
        best = lib.overlap_loss(c, lib.first_subset(1, T, q), q, d)
        close(lib.stochastic_loss(c, T, q, d, 0.0), best, 1e-12)
    for T, q, d_e in itertools.product((2, 5, 40, 1000), (1, 3, 30), (30, 100)):
        if q < T:
            sigma2 = lib.overlap_variance(q, d_e)
            c = np.linspace(0, 0.3 / sigma2, 60)
            least = np.min([lib.stochastic_loss(c, T, q, 2, sigma2), lib.length_loss(1.0, c, T, q, 2, sigma2)])
            assert least >= 0, (T, q, d_e)
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
    assert lib.stochastic_loss(1e308, 4, 1, 2, 2e-309) == 0


def least_on_line(T, q, d_e):
    """(S9) over L_0 at the c where its derivative is 0."""
    uneven, tau2 = (q - 1) * (q - 2) / d_e, (q + 2 * (q - 1) / q) / d_e
    low, high = 0.0, 1 / (2 * tau2)
    for _ in range(60):
        c = (low + high) / 2
        falls = c * uneven < (1 - 2 * c * tau2) * (T - q) * math.exp(2 * c * (c * tau2 - 1))
        low, high = (c, high) if falls else (low, c)
    M = c**2 * uneven + (T - q) * math.exp(2 * c * (c * tau2 - 1))
    return M / (q + M)


def test_stochastic_floor_and_dimension():
    """(S8) bounds the least loss on draws from above (not at q = 16); (S9) is within 10 % of it, and the least
    over c; d_e is enough."""
    for T, q, d_e, query, low, high in [(32, 3, 24, "dual", 0.2, 1.0), (32, 3, 36, "dual", 0.1, 1.0),
                                        (32, 16, 96, "dual", 1.1, 1.5), (32, 3, 512, "sum", 0.9, 1.1)]:
        u = lib.overlaps(np.random.default_rng(13), 2000, T, q, d_e, query)
        least = min(lib.overlap_loss(c, u, q, 4) for c in np.linspace(0.5, 12, 47))
        assert low <= least / lib.stochastic_floor(T, q, 4, d_e, query) <= high, (q, d_e, query)
    for T, q, d_e in [(32, 3, 16), (16, 4, 16), (64, 3, 24), (32, 5, 4000)]:
        close(lib.stochastic_floor(T, q, 2 * q, d_e, "sum"), least_on_line(T, q, d_e), 1e-6)
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


# ---- closed forms of the one-hot law (C), step sizes (O5, A11) ---------------------------------------------

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
    return T / eta - ((stiffness + lag) / eta / (np.imag(best_loss(points, T, q, d)) / 1e-30) * weights * half).sum()


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
    for t in (1e24, 10**24):
        gap = abs(lib.one_hot_loss_at(t, T, q, d, eta) * 4 * eta * t / (T - 1) - 1)
        assert gap <= (T**2 + 120 * q * T) * (T - 1) / (T - q) / (2 * eta * d * t) + 1e-9  # what (C4) leaves out


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
    """The recursion is the descent of the scalars; q = T decays at 1 - eta/q; it meets (C3) early and late, and
    after the escape d(1/L)/dt is eta kappa^2/(T-1), kappa the slope of -ln L* (S7)."""
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
    T, q, d, eta = 16, 3, 2, 2.0
    params, loss = (np.array(part) for part in list(zip(*lib.one_hot_recursion(T, q, d, eta, 3000)))[1:])
    t = np.geomspace(2 * lib.escape_time(T, q, d, eta), 2850, 12).astype(int)
    kappa = -np.imag(np.log(best_loss(params[t, 1] + 1e-30j, T, q, d))) / 1e-30
    rate = (1 / loss[t + t // 50] - 1 / loss[t - t // 50]) / (2 * (t // 50))
    close(rate * (T - 1) / (eta * kappa**2), np.ones(12), 0.02)


def test_escape_time():
    """(C5) within 2 % of the recursion, and where (C3) has half of the attention on y."""
    T, q, d, eta = np.array([128, 256, 512]), 4, 8, 7.0
    omegas = np.array([omega for _, (_, omega), _ in lib.one_hot_recursion(T, q, d, eta, 6000)])
    half = np.log((T - q) / q)  # the omega that has half of the attention on y
    crossed = [np.interp(x, path, range(6001)) for x, path in zip(half, omegas.T)]
    close(np.divide(crossed, [lib.escape_time(int(x), q, d, eta) for x in T]), np.ones(3), 0.02)
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
        ends = [run_all.final(lib.one_hot_recursion(**row, eta=0.5, steps=20))[2] for row in (sizes, *rows)]
        close(ends[0], ends[1:], 1e-14)
    assert lib.fcn_loss_floor([10**10], T=10**9, q=10**9, d=10**10).tolist() == [0.0]
    assert lib.one_hot_loss_at([1.0, 2.0], T=2**33, q=2**32, d=1, eta=1.0).tolist() == [2**-34, 2**-34]


def late_curvature(gradient, size, h=1e-5):
    """The largest eigenvalue of the Hessian at 0, from differences of the gradient."""
    hessian = np.array([gradient(way) - gradient(-way) for way in h * np.eye(size)]) / (2 * h)
    return np.linalg.eigvalsh((hessian + hessian.T) / 2).max()


@pytest.mark.parametrize("T, q, d", [(5, 4, 6), (4, 2, 3), (5, 1, 2), (6, 5, 20), (3, 2, 1), (3, 3, 2), (2, 2, 9)])
def test_largest_stable_eta(T, q, d):
    """(O5): 2 over the largest eigenvalue of the late Hessian in V and W."""
    whole = run_all.on_population(np.eye(T), lib.all_subsets(T, q), "sum")

    def gradient(x):
        V, W = np.eye(d) + x[:d * d].reshape(d, d), 14 * (np.eye(T) - 1 / T) + x[d * d:].reshape(T, T)
        return np.concatenate([grad.ravel() for grad in ag.population_loss_and_grads(V, W, *whole)[1:]])
    close(lib.largest_stable_eta(T, q, d, full=False), 2 / late_curvature(gradient, d * d + T * T), 1e-4)


@pytest.mark.parametrize("T, q, d", [(3, 2, 1), (4, 3, 1), (2, 2, 2)])
def test_largest_stable_eta_full(T, q, d):
    """(A11): the late Hessian of the cross blocks V_2, W_12 over tokens with the first five normal moments."""
    X, selected = all_tokens([-math.sqrt(3), 0, 0, 0, 0, math.sqrt(3)], d, T, q)
    data = run_all.on_samples(np.eye(T), X, selected, "sum")
    V, W = lib.in_full_model(np.eye(d), 14 * (np.eye(T) - 1 / T))

    def gradient(x):
        V_2, W_12 = x.reshape(2, d, T)
        grads = ag.attention_loss_and_grads(V + np.pad(V_2, ((0, 0), (d, 0))),
                                            W + np.pad(W_12, ((0, T), (d, 0))), *data)
        return np.concatenate([grad[:d, d:].ravel() for grad in grads[1:]])
    close(lib.largest_stable_eta(T, q, d), 2 / late_curvature(gradient, 2 * d * T), 1e-4)


def test_long_run():
    """10^5 steps of matrices and scalars at 0.9 of the stable eta stay within 1e-10; 1 % below it, 1e-12."""
    eta, whole = 0.9 * lib.largest_stable_eta(3, 2, 1), run_all.on_population(np.eye(3), lib.all_subsets(3, 2))
    (V, W), (alpha, omega), centre, worst = (np.zeros((1, 1)), np.zeros((3, 3))), (0.0, 0.0), np.eye(3) - 1 / 3, 0.0
    matrices, scalars = (f.__wrapped__ for f in (ag.population_loss_and_grads, ag.one_hot_loss_and_grads))
    for _ in range(100_000):
        _, grad_V, grad_W = matrices(V, W, *whole)
        _, grad_alpha, grad_omega = scalars(alpha, omega, 3, 2, 1)
        V, W, alpha, omega = V - eta * grad_V, W - eta * grad_W, alpha - eta * grad_alpha, omega - eta * grad_omega
        worst = max(worst, abs(V[0, 0] - alpha), abs(W - omega * centre).max())
    assert worst <= 1e-10
    stable = lib.largest_stable_eta(8, 3, 12, full=False)
    assert run_all.off_the_line(np.eye(8), 3, 12, 0.99 * stable, 2500) <= 1e-12


# ---- fixed encodings (G) and finite samples (N) ---------------------------------------------------------------

def test_span_of_fixed_encodings():
    """Orthonormal sets stay on the line of (O3, O4). W stays in the span of any set, W = Pi W Pi, so its cosine
    with I is at most sqrt(T/d_e)."""
    rng = np.random.default_rng(23)
    for T, q, d, d_e in [(6, 2, 3, 6), (6, 3, 2, 10)]:
        E = np.linalg.qr(rng.standard_normal((d_e, T)))[0]
        assert run_all.off_the_line(E, q, d, 1.0, 1000) <= 1e-10
    for T, q, d, d_e in [(6, 2, 3, 24), (6, 1, 2, 5)]:
        E = lib.random_sign_encoding(rng, d_e, T)
        _, (_, W), _ = run_all.final(run_all.set_descent(E, q, d, 1.0, 400))
        span = E @ np.linalg.pinv(E)
        close(span @ W @ span, W, 1e-12)
        assert 0.1 < run_all.cosine(W, np.eye(d_e)) <= math.sqrt(T / d_e) + 1e-12


# ---- fully-connected networks (F) --------------------------------------------------------------------------

@pytest.mark.parametrize("T, q, d", [(1, 1, 3), (4, 2, 3), (5, 5, 2), (3, 1, 1), (7, 3, 2), (2, 1, 4)])
def test_fcn_floors(T, q, d):
    """(F4): the least eigenvalues of E s s^T/q^2 kron I, (F3): the part of the target that W1 does not see."""
    subsets, rng = lib.all_subsets(T, q), np.random.default_rng(14)
    moment = np.kron(subsets.T @ subsets / len(subsets) / q**2, np.eye(d))
    eigenvalues, widths, top = np.linalg.eigvalsh(moment), np.arange(T * d + 3), d / (2 * q)  # rising
    least = [eigenvalues[:max(T * d - m, 0)].sum() / 2 for m in widths]
    close(2 * lib.fcn_loss_floor(widths, T, q, d, fisher=2.0), least, 1e-12, top)
    targets = np.einsum("bt,kl->bktl", subsets, np.eye(d)).reshape(-1, T * d) / q  # target_k = <row, vec(X)>
    scales = 10.0**rng.integers(-30, 30, (T * d + 2, 1))
    for W1 in [rng.standard_normal((3, T * d)), rng.standard_normal((T * d + 2, T * d + T)), np.zeros((2, T * d)),
               rng.standard_normal((4, 2)) @ rng.standard_normal((2, T * d)), np.eye(1, T * d + 5), np.eye(T * d)]:
        rows = W1[:, :T * d]
        seen = np.linalg.lstsq(rows.T, targets.T, rcond=1e-10)[0]
        want = ((targets.T - rows.T @ seen)**2).sum() / (2 * len(subsets))
        for matrix in (W1, W1 * scales[:len(W1)]):  # the row space alone matters
            close(3 * lib.fcn_first_layer_floor(matrix, T, q, d, fisher=3.0), want, 1e-12, top)


def test_fcn_floor_by_regression():
    """(F3): what a regression of the targets of every y on W1 vec(X) leaves; above (F4), also after training, on
    rows of 0 and 1 and on the indices of y."""
    rng, T, q, d, B = np.random.default_rng(24), 5, 2, 3, 60
    subsets = lib.all_subsets(T, q)

    def by_indices(batch):
        inputs, target, _, selected = batch
        return np.hstack([inputs[:, :T * d], np.nonzero(selected)[1].reshape(-1, q), 0 * inputs[:, :T - q]]), target
    layers = [rng.standard_normal((m, rank)) @ rng.standard_normal((rank, T * d + T)) for m, rank in ((1, 1), (20, 13))]
    for change in (lambda batch: batch, by_indices):
        batches = (change(run_all.fcn_batch(rng, B, T, q, d)) for _ in itertools.count())
        layers.append(run_all.final(run_all.fcn_run(rng, 6, T, d, batches, 0.02, 100))[1][0])
    for W1 in layers:
        rank, losses = np.linalg.matrix_rank(W1[:, :T * d]), []
        for X in rng.standard_normal((200, B, d, T)):
            seen = np.linalg.svd(X.transpose(0, 2, 1).reshape(B, -1) @ W1[:, :T * d].T, full_matrices=False)[0][:, :rank]
            target = (X @ subsets.T / q).reshape(B, -1)
            losses.append(((target - seen @ (seen.T @ target))**2).sum() / (2 * (B - rank) * len(subsets)))
        floor = lib.fcn_first_layer_floor(W1, T, q, d)
        within_errors(losses, floor)
        assert floor >= lib.fcn_loss_floor(len(W1), T, q, d) - 1e-12


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
    for numbers, mean in ((W1**2, 2 / (T * d + T)), (A**2, 1 / m), (W1, 0.0)):
        within_errors(numbers.ravel(), mean)


# ---- the task ------------------------------------------------------------------------------------------

FOURTH = {"gaussian": 3.0, "rademacher": 1.0, "laplace": 6.0, "logistic": 4.2, "gumbel": 5.4,  # moments
          "student_t": 3 + 6 / (lib.STUDENT_DF - 4)}


@pytest.mark.parametrize("tokens", FOURTH)
def test_tokens(tokens):
    """Mean 0, variance 1, uncorrelated over entries and positions; error bars from the fourth moment."""
    assert set(FOURTH) == set(lib.TOKENS) and lib.STUDENT_DF > 8
    n = 400_000
    X = lib.sample_batch(np.random.default_rng(17), n, 3, 2, 2, tokens)[0].reshape(n, 6)
    bound, spread = normal_bound(6 + 36) / math.sqrt(n), math.sqrt(FOURTH[tokens] - 1)
    assert abs(X.mean(axis=0)).max() <= bound
    assert (abs(X.T @ X / n - np.eye(6)) <= bound * np.where(np.eye(6) == 1, spread, 1.0) + 1e-12).all()
    level = normal_bound(2) / math.sqrt(6 * n)
    assert abs(X.mean()) <= level and abs((X**2).mean() - 1) <= level * spread + 1e-12


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
    lambda x, y: [0.0, x, y], lambda x, y: (0.0, [1.0, 2.0], y),
    lambda x, y, calls=itertools.count(): (0.0, x if next(calls) % 3 < 2 else x[:1], y)])  # not broadcast later
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


def test_adam_refuses():
    """A second run, one beyond its length, and squares beyond float64 (3e155: after the correction of the start
    alone; 1e20 in float32 is no such square)."""
    used = lib.adam(bowl, 5)
    run = lambda wrapped: [float(x) for _, (x,), _ in lib.gradient_descent((1.0,), wrapped, 0.1, 5)]
    run(used)
    for wrapped in (used, lib.adam(bowl, 4)):
        with pytest.raises(ValueError, match="steps must be .* one run"):
            run(wrapped), run(wrapped)
    for size in (1e200, 3e155):
        with pytest.raises(FloatingPointError, match="step 0 the square of a gradient"):
            run(lib.adam(lambda x: (x, size * x), 5))
    assert run(lib.adam(lambda x: (x, np.float32(1e20)), 5))[1] == pytest.approx(0.9)


# ---- limits of size --------------------------------------------------------------------------------------

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
    close(lib.one_hot_loss_at(1e9, big, small, kind(9), 1.0),
          lib.one_hot_loss_at(1e9, 100_000, 70_000, 9, 1.0), 1e-14)
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
    for small, large in zip(*found):
        assert large <= 1.1 * small + 2**16


# ---- what is let in at the door -----------------------------------------------------------------------------

SIGNATURES = """softmax(scores); attention_lines(V, W, Z, z_query, target); fcn(W1, b1, A, b2, inputs);
attention_loss_and_grads(V, W, Z, z_query, target); population_loss_and_grads(V, W, E, e_query, selected);
one_hot_loss_and_grads(alpha, omega, T, q, d); stochastic_loss_and_grads(alpha, c, overlaps, q, d, d_e);
fcn_lines(W1, b1, A, b2, inputs, target); fcn_loss_and_grads(W1, b1, A, b2, inputs, target); sts(X, selected);
sample_batch(rng, B, T, q, d, tokens='gaussian'); all_subsets(T, q); one_hot_encoding(T); sum_query(E, selected);
dual_query(E, selected); full_inputs(X, E, e_query); transformer(V, W, Z, z_query); fcn_inputs(X, selected);
gradient_descent(params, loss_and_grads, learning_rate, steps); escape_time(T, q, d, eta); init_fcn(rng, m, T, d);
adam(loss_and_grads, steps, beta1=0.9, beta2=0.999); one_hot_recursion(T, q, d, eta, steps);
one_hot_loss_at(t, T, q, d, eta, d_e=None); largest_stable_eta(T, q, d, full=True); overlap_loss(c, overlaps, q, d);
random_sign_encoding(rng, d_e, T, B=None); overlaps(rng, B, T, q, d_e, query='dual'); exact_fcn(T, q, d, K=8.0);
overlap_variance(q, d_e, query='dual'); stochastic_floor(T, q, d, d_e, query='dual'); required_dimension(T, q, eps);
stochastic_loss(c, T, q, d, sigma2); stochastic_trajectory(t, T, q, d, d_e, eta);
length_loss(alpha, c, T, q, d, sigma2); fcn_loss_floor(m, T, q, d, fisher=1.0);
fcn_first_layer_floor(W1, T, q, d, fisher=1.0)"""
# Arguments that work, of small integers so that every kind of array can hold them; rng is a seed
Y, SIGNS = np.array([[1.0, 1, 0, 0], [0, 1, 0, 1]]), np.array([[1.0, -1, 1, 1], [1, 1, -1, 1], [1, 1, 1, -1]])
X, Z = np.arange(16.0).reshape(2, 2, 4) % 5 - 2, np.arange(24.0).reshape(2, 3, 4) % 5 - 2
KEY, U = np.array([[1.0, 0, 1], [0, 1, 1]]), np.array([[1.0, 1, 0, -1], [1, 1, 2, 0]])
MANY = np.arange(36.0).reshape(3, 12) % 7 - 3
USUAL = {"X": X, "selected": Y, "E": SIGNS, "e_query": KEY, "Z": Z, "z_query": KEY, "overlaps": U, "scores": U,
         "W1": MANY, "b1": np.array([1.0, -1, 0]), "A": np.array([[1.0, 0, 2], [0, 1, -1]]), "b2": np.array([0.0, 1]),
         "V": np.array([[1.0, 0, 2], [0, 1, -1]]), "W": np.eye(3), "inputs": np.eye(2, 12),
         "target": np.array([[1.0, 0], [0, 2]]), "rng": 0, "B": 3, "T": 4, "q": 2, "d": 3, "d_e": 5, "m": 3,
         "alpha": 2.0, "omega": 1.0, "c": 2.0, "t": 8.0, "eta": 0.5, "sigma2": 0.125, "eps": 0.5, "K": 4.0,
         "fisher": 2.0, "full": False, "tokens": "laplace", "query": "dual", "steps": 3, "learning_rate": 0.5,
         "beta1": 0.5, "beta2": 0.75, "loss_and_grads": bowl, "params": (np.array([1.0, 2.0]), 3.0)}
GOOD = {line.split("(")[0]: {key: USUAL[key] for key in re.findall(r"(\w+)(?:=[^,)]*)?[,)]", line)}
        for line in re.split(r";\s", SIGNATURES)}
for changed, values in {"population_loss_and_grads": {"V": np.array([[2.0, 1], [1, 3]])}, "escape_time": {"T": 9},
                        "stochastic_floor": {"q": 3, "query": "sum"}, "sample_batch": {"d": 2},
                        "stochastic_trajectory": {"t": 16.0, "T": 8, "d_e": 64, "eta": 1.0}}.items():
    GOOD[changed] |= values


def test_public_functions():
    for line in re.split(r";\s", SIGNATURES):
        name = line.split("(")[0]
        assert name + str(inspect.signature(PUBLIC[name])) == line
    for name, function in PUBLIC.items():
        missing = [part for part in ("Returns", "Raises", ">>> ", name) if part not in f"{function.__doc__} {[*GOOD]}"]
        assert not missing, f"{name}: no {missing} in its docstring or SIGNATURES"


def call(function, arguments):
    """The function's results as a flat list: generators run out, functions called."""
    result = function(**{key: np.random.default_rng(value) if key == "rng" and type(value) is int else value
                         for key, value in arguments.items()})
    if inspect.isgenerator(result):
        result = list(result)
    if callable(result):
        result = result(np.array([1.0, 2.0]))
    flat, waiting = [], [result]
    while waiting:
        item = waiting.pop()
        item = list(item.values()) if isinstance(item, dict) else item
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
    got, want = call(PUBLIC[name], arguments), call(PUBLIC[name], GOOD[name])
    assert np.geterr() == errors
    for key, value in before.items():
        assert callable(value) or str(value) == str(arguments[key]), f"{key} was changed"
    for left, right in zip(got, want):
        assert np.asarray(left).dtype == (int if type(right) is int else np.float64)
        close(left, right, 50 * EPS)  # sums run in another order


RAGGED, NAN, INF = [[1.0], [1.0, 2.0]], float("nan"), float("inf")
POSITIVE = [0.0, -1.0, NAN, INF, "1", None, 1j, True, [1.0, 2.0], RAGGED]
SIZE = [0, -1, 2.0, 2.5, True, "3", None, NAN, 1j, [2, 2], RAGGED, 2**63, np.uint64(2**63), 10**400]
KINDS = {"rng": [None, "0", np.random, np.random.RandomState(0)], "tokens": ["gauss", None, 3, ["gaussian"]],
         "query": ["both", None, 3, ["sum"]], "loss_and_grads": [None, 3, "f"], "full": [None, 1, 0.0, "no", [True]],
         "params": [None, 1.0, [1.0], (), ("x",), (NAN,), (1.0, None), (RAGGED,), (1j,), ([],), (True,)],
         "steps": [-1, 1.5, 0.0, True, False, None, "3", NAN, [1], np.array([0, 1]), RAGGED],
         **dict.fromkeys(("eta", "learning_rate", "K"), [*POSITIVE, np.longdouble("1e-4000")]),
         **dict.fromkeys(("beta1", "beta2", "eps"), [*POSITIVE, 1.0, 2]), "fisher": [*POSITIVE, 0.5],
         **dict.fromkeys(("alpha", "omega", "c", "t", "sigma2"), [NAN, INF, "1", None, 1j, RAGGED, [], [1.0, NAN]])}


def bad_values(name, key, value):
    """What each argument must refuse, by its kind."""
    if isinstance(value, np.ndarray):
        bad = ["text", None, RAGGED, value + 0j, value[:0], value.astype(object), 1.0, np.ma.masked_array(value)]
        bad += [] if key == "scores" else [value[None, None]]
        holes = [NAN, INF, np.longdouble("1e4000")] if name not in ("full_inputs", "fcn_inputs") else []
        return bad + [np.where(np.arange(value.size).reshape(value.shape) == 1, hole, value) for hole in holes]
    if (name, key) == ("fcn_loss_floor", "m"):
        return [-1, 2.0, True, "3", None, NAN, RAGGED, [], [1, -1]]
    allowed = ["None"] * ((name, key) in (("random_sign_encoding", "B"), ("one_hot_loss_at", "d_e")))
    allowed += ["[2, 2]"] * (name in ("one_hot_loss_and_grads", "one_hot_recursion"))
    return KINDS.get(key) or [bad for bad in SIZE if str(bad) not in allowed]


NOT_ALL = ("one_hot_loss_at", "escape_time", "stochastic_loss", "stochastic_trajectory", "length_loss",
           "overlap_loss", "stochastic_floor", "required_dimension")  # they need q < T
BAD = [(name, {key: bad}, [key]) for name, good in GOOD.items() for key, value in good.items()
       for bad in bad_values(name, key, value)]
BAD += [(name, {"q": good["T"] + 1}, ["q", "T"]) for name, good in GOOD.items() if "T" in good and "q" in good]
BAD += [(name, {"q": GOOD[name].get("T", 4)}, ["q", "T"]) for name in NOT_ALL]
BAD += [(name, {"selected": bad}, ["selected"]) for name, good in GOOD.items() if "selected" in good
        for bad in (0 * Y, 2 * Y, Y / 2, -Y, 1e308 * Y, 1e308 + 0 * Y, [[1, 1, 0, 0], [1, 0, 0, 0]], Y[:, :3], Y[0])]
BAD += [(name, {key: np.ones(tuple(map(int, shape.split())))}, words) for name, shapes in {  # and what to name
    "attention_loss_and_grads": "W 4 4:W V, W 3 2:W D, Z 2 4 4:Z V, Z 2 3 0:Z, z_query 3 3:z_query Z, "
                                "z_query 2 2:z_query V, target 2 3:target V, target 1 2:target Z",
    "transformer": "Z 2 4 4:Z V, z_query 1 3:z_query Z", "fcn": "inputs 12:inputs, A 3 2:A W1",
    "population_loss_and_grads": "V 2 3:V, E 4 4:E W, e_query 2 4:e_query W",
    "full_inputs": "E 3 5:E X, E 3 3 4:E X, e_query 2 2:e_query E, e_query 1 3:e_query X",
    "fcn_loss_and_grads": "inputs 2 11:inputs W1, b1 4:b1 W1, A 2 4:A W1, b2 3:b2 A, target 1 2:target inputs",
    "fcn_first_layer_floor": "W1 3 11:W1", "fcn_inputs": "selected 2 5:selected"}.items()
        for key, shape, words in [(part.split(" ")[0], part.split(":")[0].split(" ", 1)[1], part.split(":")[1].split())
                                  for part in shapes.split(", ")]]
BAD += [(name, {key: bad}, [key]) for name, several in {
    "all_subsets": [("T", 448), ("T", 1000), ("T", 10**6), ("T", 10**18)], "overlap_variance": [("q", 9)],
    "escape_time": [("q", 5)], "adam": [("steps", 0)], "softmax": [("scores", [10**400]), ("scores", [2**62, 2**62 + 1])],
    "stochastic_loss": [("c", -1.0), ("c", 4.5), ("sigma2", -0.1), ("sigma2", [0.1, 0.1])],
    "length_loss": [("c", -1.0), ("c", [1.0, 9.0]), ("sigma2", -0.1)],
    "one_hot_loss_at": [("t", -1.0), ("t", [1.0, -2.0])],
    "stochastic_trajectory": [("t", -1.0), ("t", 1e300), ("q", 65)], "overlap_loss": [("c", [1.0, 2.0])],
    "stochastic_loss_and_grads": [("c", [1.0, 2.0, 3.0, 4.0]), ("alpha", [1.0, 2.0]), ("q", 5)],
    "one_hot_loss_and_grads": [("T", [4, 1]), ("T", np.array([2**63], dtype=np.uint64))],
    "one_hot_recursion": [("d", [1, 0])]}.items() for key, bad in several]
BAD += [  # arguments that do not broadcast, sizes that cannot be allocated, and messages to the letter
    ("one_hot_loss_and_grads", {"alpha": [1.0, 2.0], "omega": [1.0, 2.0, 3.0]}, ["alpha", "omega"]),
    ("one_hot_recursion", {"T": [4, 5], "q": [1, 2, 3]}, ["T", "q"]),
    ("length_loss", {"alpha": [1.0, 2.0], "c": [1.0] * 3}, ["alpha", "c"]),
    ("all_subsets", {"T": 2**40, "q": 2**40}, ["T"]), ("one_hot_encoding", {"T": 2**31}, ["T"]),
    ("random_sign_encoding", {"d_e": 2**62, "T": 2**62}, ["d_e", "T"]), ("exact_fcn", {"T": 2**20}, ["T", "d"]),
    ("sample_batch", {"B": 2**62}, ["B"]), ("overlaps", {"B": 2**40}, ["B"]), ("overlaps", {"d_e": 2**40}, ["d_e"]),
    ("init_fcn", {"m": 2**40}, ["m"]),
    ("dual_query", {"E": np.ones((2**15, 16)), "selected": np.ones((2**12, 16))}, ["B", "q", "d_e"]),
    ("all_subsets", {"T": 4, "q": 9}, ["q must be at most T, T = 4; got 9"]), ("softmax", {"scores": [1.0, NAN]}, ["finite; got nan"]),
    ("fcn", {"b1": np.ones(4)}, ["b1 must be of shape (m,) with m = 3 as in W1; got (4,)"]),
    ("sts", {"X": np.ma.masked_array(X)}, ["got masked_array"])]
BAD += [("run_all", line.split(" "), [argument]) for argument, lines in {
    "--only": ["--only nothing", "--only ", "--only dynamics,"],
    "--seed": ["--seed -1", "--seed x", "--seed 1.5", "--seed"],
    "--trace": ["--trace 0", "--trace -2", "--trace 1e3", f"--trace {10**30}"],
    "T": ["--trace 1 --T 0", "--trace 1 --T -4", "--trace 1 --T x", "--trace 1 --T 40 --q 20",
          "--trace 1 --T 1000 --q 999 --d 1", "--trace 1 --T 90000 --q 1", f"--trace 1 --T {2**64 - 1}"],
    "q": ["--trace 1 --q 9", "--trace 1 --q 0"], "d": ["--trace 1 --d 0", "--trace 1 --d 10000000"],
    "eta": ["--trace 1 --eta 0", "--trace 1 --eta nan", "--trace 1 --eta inf"], "--nonsense": ["--nonsense"],
    "--T": ["--T 5", "--T 5 --quick"], "dynamics": ["dynamics"]}.items() for line in lines]
BAD += [("run_all", ["--out", str(ROOT / "run_all.py" / path)], ["--out"]) for path in ("", "below", "a\nb")]


@pytest.mark.parametrize("name, bad, words", BAD, ids=lambda value: str(value).replace("\n", "")[:30])
def test_bad_input(name, bad, words, capsys):
    """A ValueError, or exit status 2 with one line on stderr, that names the argument and says what was given."""
    if name == "run_all":
        with pytest.raises(SystemExit) as error:
            run_all.main(bad)
        message = capsys.readouterr().err
        assert error.value.code == 2 and message.count("\n") == 1 and "Traceback" not in message, message
    else:
        with pytest.raises(ValueError) as error:
            call(PUBLIC[name], GOOD[name] | bad)
        message = str(error.value)
        assert error.type is ValueError and "got " in message, f"{error.type.__name__}: {message}"
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message), f"{word} is not named: {message}"


def test_bad_input_is_complete():
    assert len(BAD) >= 80 and {name for name, _, _ in BAD} == {*PUBLIC, "run_all"} and set(GOOD) == set(PUBLIC)


@pytest.mark.parametrize("name, huge", [
    ("attention_loss_and_grads", {"V": 1e200, "Z": 1e200}), ("transformer", {"V": 1e200, "Z": 1e200}),
    ("fcn", {"W1": 1e200, "inputs": 1e200}), ("sts", {"X": 1.7e308}), ("sum_query", {"E": 1.7e308}),
    ("overlap_loss", {"c": 1e308}), ("length_loss", {"alpha": 1e200}),
    ("population_loss_and_grads", {"V": 1e200}), ("stochastic_loss_and_grads", {"alpha": 1e160}),
    ("one_hot_loss_at", {"t": 1e300, "eta": 1e300}), ("escape_time", {"eta": 5e-324}), ("exact_fcn", {"K": 1e308}),
    ("dual_query", {"E": 1e-310}), ("one_hot_loss_and_grads", {"alpha": 1e200}), ("fcn", {"W1": 1e200, "A": 1e200}),
    # one result alone: the loss, a gradient, the hidden layer
    ("attention_loss_and_grads", {"V": 0.0, "target": 1e155}), ("fcn_loss_and_grads", {"target": 1e155}),
    ("attention_loss_and_grads", {"V": 0.0, "W": 0.0, "Z": 1e200, "target": 1e150}),
    ("attention_loss_and_grads", {"V": 1e-150 * USUAL["V"], "W": 0.0, "Z": 1e150 * Z, "z_query": 1e200}),
    ("stochastic_loss_and_grads", {"alpha": 1e155, "overlaps": 0.0}),
    ("stochastic_loss_and_grads", {"alpha": 1e9, "c": 0.0, "overlaps": 1e300 * U}),
    ("fcn_loss_and_grads", {"W1": -1e200, "inputs": 1e200}), ("fcn", {"W1": -1e200, "inputs": 1e200}),
    ("fcn_loss_and_grads", {"W1": 1e-300, "b1": 0.0, "inputs": 1e200, "A": 1e107})])
def test_overflow(name, huge):
    """Finite input with a result beyond float64 is an error, not a warning."""
    with pytest.raises(OverflowError):
        call(PUBLIC[name], GOOD[name] | {key: np.broadcast_to(size, np.shape(GOOD[name][key]))
                                         for key, size in huge.items()})


def test_error_states():
    """Sharp attention works under np.seterr(all="raise"), and each of two threads at work keeps its own."""
    together = threading.Barrier(2, timeout=30)

    def work(mode):
        np.seterr(all=mode)
        together.wait()
        for _ in range(100):
            assert ag.softmax([0.0, -1000.0]).tolist() == [1.0, 0.0]
            ag.one_hot_loss_and_grads(1.0, 800.0, 4, 2, 3)
            lib.overlap_loss(900.0, [[1.0, 0.0, 0.0]], 1, 2)
            lib.stochastic_loss(900.0, 9, 2, 3, 0.0)
        lib.stochastic_trajectory(1e3, 9, 2, 3, 10**6, 1.0)
        return set(np.geterr().values())
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, ("raise", "warn"))) == [{"raise"}, {"warn"}]


# ---- functions alone ------------------------------------------------------------------------------------------

def definitions(*modules):
    """The functions and constants of modules by name, as ast nodes with their source; and the imports they need."""
    nodes, imports = {}, ""
    for module in modules:
        lines = inspect.getsource(module).splitlines()
        for node in ast.parse("\n".join(lines)).body:
            if isinstance(node, (ast.FunctionDef, ast.Assign)):
                doc = node.body[0] if isinstance(node, ast.FunctionDef) else None
                omit = range(doc.lineno, doc.end_lineno + 1) if isinstance(getattr(doc, "value", 0), ast.Constant) else ()
                source = [line for k, line in enumerate(lines[node.lineno - 1:node.end_lineno], node.lineno)
                          if k not in omit and line.strip() and not line.lstrip().startswith("#")]
                nodes[node.name if doc else node.targets[0].id] = node, source
            elif isinstance(node, ast.Import):
                imports += ast.unparse(node) + "\n"
    return nodes, imports


def copied(name, nodes, taken):
    """`name` and the definitions that it names, in an order that runs: what to copy with it."""
    parts = list(ast.walk(ast.Module(getattr(nodes[name][0], "body", [nodes[name][0]]), [])))
    own = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    own |= {arg.arg for part in ast.walk(nodes[name][0]) if isinstance(part, ast.arguments) for arg in part.args}
    for part in parts:
        if isinstance(part, ast.Name) and part.id in nodes and part.id not in {*own, *taken}:
            copied(part.id, nodes, taken)
    taken.append(name)
    return taken


@pytest.mark.parametrize("name", GOOD)
def test_copies(name):
    """`__wrapped__`, and the source without its decorator beside what it names, alone: the same bits."""
    in_ag = PUBLIC[name].__module__ == "analytic_grads"
    nodes, imports = definitions(*([ag] if in_ag else [ag, lib]))
    names, alone = copied(name, nodes, []), {}
    assert not in_ag or len({*names} - {name, "softmax"}) <= 2
    exec(imports + "\n".join("\n".join(nodes[part][1]) for part in names), alone)
    want = call(PUBLIC[name], GOOD[name])
    for function in (PUBLIC[name].__wrapped__, alone[name]):
        got = call(function, GOOD[name])
        assert len(got) == len(want)
        for left, right in zip(got, want):
            assert np.asarray(left).dtype == np.asarray(right).dtype and np.array_equal(left, right)


def test_shape_of_the_files():
    """(A1)-(A8) come first, one a line; files, lines and functions are short; names in use elsewhere are public."""
    start = [re.search(r"# \((A\d)\)", line) for line in inspect.getsource(ag).splitlines()[:40]]
    assert [found[1] for found in start if found] == [f"A{k}" for k in range(1, 9)]
    for name, most in ("analytic_grads", 330), ("sparse_token_selection", 800), ("run_all", 1150), ("test_reference", 1340):
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        assert source.count("\n") <= most and max(map(len, source.splitlines())) <= 110
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 90, node.name
            private = [alias.name for alias in getattr(node, "names", ()) if isinstance(node, ast.ImportFrom)]
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("ag", "lib", "run_all"):
                private.append(node.attr)
            assert not any(word.startswith("_") for word in private), private


# ---- documents --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", [ag, lib])
def test_docstring_examples(module):
    failed, tried = doctest.testmod(module)
    assert failed == 0 and tried >= 6, f"{failed} of {tried} examples failed"


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def numbers(text):
    return re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]\d+)?(?![\w]|\.\d)", text)


def test_readme_snippets(tmp_path, monkeypatch, capsys):
    """Every Python snippet runs, in order, in one namespace; the answer below an exercise has what it prints."""
    monkeypatch.chdir(tmp_path)
    before, exercises = readme().split("Exercises\n")
    names, exercises = {}, exercises.split("\n## ")[0]
    for snippet in re.findall(r"^```python\n(.*?)^```", before, flags=re.M | re.S):
        exec(snippet, names)
    answered = re.findall(r"^```python\n(.*?)^```(.*?)</details>", exercises, flags=re.M | re.S)
    assert len(answered) == len(re.findall(r"^\*\*\d+\.", exercises, flags=re.M)) >= 8
    for snippet, answer in answered:
        capsys.readouterr()
        exec(snippet, names)
        printed = sum((collections.Counter(set(numbers(line))) for line in capsys.readouterr().out.splitlines()),
                      collections.Counter())
        missing = printed - collections.Counter(numbers(answer))
        assert printed and not missing, f"{sorted(missing)} in no answer to\n{snippet}"


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
    """Every display has a tag; what is used is derived, what is derived is used."""
    text = readme()
    assert all("\\tag{" in display for display in re.findall(r"^```math\n(.*?)^```", text, flags=re.M | re.S))
    used = {Path(module.__file__).name: tags(inspect.getsource(module))
            for module in (ag, lib, run_all, sys.modules[__name__])}
    derived = {tag for tag in re.findall(r"\\tag\{\(?([A-Z]\d+)\)?\}", text)}
    derived |= set().union(*map(tags, re.findall(r"\*\*(\([^*]*\))", text)))
    for name, found in used.items():
        assert found <= derived, f"{name} uses what README.md does not derive: {sorted(found - derived)}"
    assert derived <= set().union(*used.values()), f"used nowhere: {sorted(derived - set().union(*used.values()))}"


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


def test_readme_is_short():
    """At most 3,000 words outside folds, code and tables; folds that close; lines to copy as its table says."""
    text = readme()
    assert text.count("<details>") == text.count("</details>") == text.count("<summary>") == text.count("</summary>")
    prose = re.sub(r"^```.*?^```|<details>.*?</details>|<!--.*?-->|^\s*\|.*?$", "", text, flags=re.M | re.S)
    assert len(prose.split()) <= 3000
    rows = re.findall(r"^\|[^|]*\| `(\w+)` \|([^|]*)\| (\d+) \|$", text, flags=re.M)
    assert len(rows) >= 4
    for name, beside, lines in rows:
        nodes = definitions(ag, lib)[0] if name not in vars(ag) else definitions(ag)[0]
        names = copied(name, nodes, [])
        assert set(re.findall(r"`(\w+)`", beside)) == {*names} - {name}
        assert sum(len(nodes[part][1]) for part in names) == int(lines), name


# ---- the command line: in this process ------------------------------------------------------------------------

@pytest.mark.parametrize("measured, wanted, worst", [
    (1.0, {"equals": 1}, "1 ok"), ([1.0, 1.03, 1.02], {"equals": 1, "within": 0.02}, "1.03 FAIL"),
    ([1.0, 1.04], {"equals": [1, 1.02], "within": [0.01, 0.03]}, "1.04 ok"), ([2, 3], {"at_most": 3}, "3 ok"),
    ([2, 3], {"at_most": 2.9}, "3 FAIL"), ([2, 3], {"at_least": 2}, "2 ok"), ([2, 3], {"at_least": 2.1}, "2 FAIL"),
    ([2, 3], {"at_least": [1, 3.5]}, "3 FAIL"), ([], {"equals": 0, "within": 9}, "nan FAIL"),
    *(([*before, bad, 1.0], wanted, f"{bad} FAIL") for bad in (NAN, INF, -INF) for before in ([], [1.0])
      for wanted in ({"equals": 1, "within": 9}, {"at_most": 9}, {"at_least": -9})),
    *((1.0, wanted, "1 FAIL") for bad in (NAN, INF) for wanted in (
        {"equals": bad}, {"equals": 1, "within": bad}, {"at_most": bad}, {"at_least": -bad}))])
def test_claim(measured, wanted, worst):
    """A claim is about the worst of its values, and anything that is not finite fails it."""
    row = run_all.claim("X", "Text.", measured, **wanted)
    assert f"{row['measured']} {row['verdict']}" == worst
    assert list(row) == ["id", "statement", "source", "predicted", "measured", "tolerance", "verdict"]


def test_crash_half_way(tmp_path, monkeypatch):
    """The table of what there is, the name of the experiment, one line, status 1; and main leaves the caller's
    process as it was, with an output that is no file."""
    monkeypatch.setitem(run_all.QUICK, "fixed", {"nonsense": 1})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # one after the other
    output, errors = io.StringIO(), io.StringIO()
    before = dict(os.environ), signal.getsignal(signal.SIGINT), repr(sys.modules.get("matplotlib"))
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", errors)
    assert run_all.main(["--quick", "--only", "dynamics,fixed", "--out", str(tmp_path)]) == 1
    monkeypatch.undo()
    assert before == (dict(os.environ), signal.getsignal(signal.SIGINT), repr(sys.modules.get("matplotlib")))
    assert re.fullmatch(r"run_all.py: fixed: TypeError: .*nonsense.*\n", errors.getvalue()), errors.getvalue()
    assert re.search(r"^id +verd.*\n(.* ok .*\n)+$", output.getvalue(), flags=re.M), output.getvalue()
    assert [path.name for path in tmp_path.iterdir()] == ["1_dynamics.png"]


def test_trace(capsys):
    assert run_all.main(["--trace", "2"]) == 0
    differences = [float(x) for x in re.findall(r"largest difference ([\d.e+-]+)", capsys.readouterr().out)]
    assert len(differences) == 10 and max(differences) < 1e-14, differences


# ---- in processes of their own ----------------------------------------------------------------------------------

def start(*arguments, env={}, **options):
    """A shell may have told its background jobs to ignore Ctrl-C: not these."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], **{
        "env": {**os.environ, **env}, "cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        "start_new_session": True, **options})


def python(*arguments, **options):
    """Status, output, errors."""
    process = start(*arguments, **options)
    output = process.communicate(timeout=60)
    return process.returncode, *output


RUN, QUICK = ROOT / "run_all.py", (ROOT / "run_all.py", "--quick", "--only", "dynamics", "--out")


@pytest.mark.parametrize("module", ["analytic_grads", "sparse_token_selection", "run_all"])
def test_import_is_quiet(module):
    """No output, no change of global state, no matplotlib, under 0.3 s of processor time beyond NumPy's import."""
    status, output, errors = python("-W", "error", "-c", f"""
import os, signal, sys, time, warnings, numpy as np
state = lambda: repr((np.random.get_state(), np.get_printoptions(), warnings.filters, np.geterr(), os.environ,
                      signal.getsignal(signal.SIGINT)))
before, start = state(), time.process_time()
import {module}
spent = time.process_time() - start
print([spent < 0.3, before == state(), "matplotlib" in sys.modules])""")
    assert (status, output, errors) == (0, "[True, True, False]\n", "")


def test_analytic_grads_alone(tmp_path):
    shutil.copy(ROOT / "analytic_grads.py", tmp_path)
    status, output, errors = python("-c", "import doctest, analytic_grads as ag; print(doctest.testmod(ag))",
                                    cwd=tmp_path, env={"PYTHONPATH": ""})
    assert status == 0 and "failed=0" in output, output + errors


def whole(folder):
    """claims.csv of a folder that has it and one figure, both whole, and nothing else; no cell is a formula."""
    assert sorted(path.name for path in folder.iterdir()) == ["1_dynamics.png", "claims.csv"]
    picture, text = (folder / "1_dynamics.png").read_bytes(), (folder / "claims.csv").read_bytes()
    assert picture[:4] == b"\x89PNG" and picture[-8:-4] == b"IEND"
    cells = [cell for row in csv.reader(io.StringIO(text.decode())) for cell in row]
    assert not [cell for cell in cells if re.match(r"[=+@\t\r]|-(?![\d.]+(e[-+]\d+)?$)", cell)]
    return text


def test_run_in_a_hostile_place(tmp_path):
    """A space in the path, no home, no display, an ASCII locale; then two runs at once into one folder, on
    terminals of 80 and of 0 columns: the same bytes, and rows that fit."""
    import fcntl, pty, struct, termios  # noqa: E401  (not on Windows)
    hostile = {"MPLBACKEND": "nonsense", "HOME": str(RUN / "home"), "LC_ALL": "C", "PYTHONUTF8": "0", "DISPLAY": "",
               "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "", "MPLCONFIGDIR": ""}
    status, output, errors = python(*QUICK, tmp_path / "a space" / "deeper", cwd=tmp_path, env=hostile)
    assert status == 0 and "claims hold" in output and "Traceback" not in errors, output + errors
    assert "\r" not in output and sorted(path.name for path in tmp_path.iterdir()) == ["a space"]
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
        assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
        rows = re.split(r"[\r\n]+", text.decode())
        assert max(map(len, rows)) < 80 and len(first.splitlines()) <= sum(" ok " in row for row in rows) + 1
    assert whole(tmp_path / "both") == first


@pytest.mark.parametrize("moment, times", [("import", 3), (0.0, 1), (0.1, 3), (0.7, 2), (1.4, 1)])
def test_interrupt(moment, times, tmp_path):
    """Ctrl-C from the first import on, also several times: status 130 within a second or so, one line, the old
    file whole, nothing half-written, no process left."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "claims.csv").write_text("old")
    (tmp_path / "argparse.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(20)")
    process = start(RUN, "--quick", "--out", out, env={"PYTHONPATH": str(tmp_path)} if moment == "import" else {})
    assert re.match("here|running: .*samples", process.stdout.readline())
    time.sleep(moment if moment != "import" else 0.0)
    begin = time.monotonic()
    for _ in range(times):
        os.kill(process.pid, signal.SIGINT) if times == 1 else os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)  # until the last process has let go of the pipe
    assert (process.returncode, errors) == (130, "run_all.py: interrupted\n") and time.monotonic() - begin < 3
    assert (out / "claims.csv").read_text() == "old" and not [*out.glob(".*")]


def test_output_that_is_lost(tmp_path):
    """A reader that has gone, also half-way, a full disk, a closed output: never a traceback, status 0 only if all
    was written."""
    ours, theirs = os.pipe()
    os.close(ours)
    assert python(RUN, "--help", stdout=theirs) == (1, None, "")
    process = start(*QUICK, tmp_path)
    assert "dynamics" in process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == ("", 1)
    with open("/dev/full", "w") as full:
        status, _, errors = python(RUN, "--help", stdout=full)
    assert status == 1 and re.fullmatch("run_all.py: .*No space left.*\n", errors), errors
    for arguments, status in (("--seed", "-1"), 2), (("--trace", "1"), 0):
        closed = python(RUN, *arguments, preexec_fn=lambda: os.close(1), stdout=None)
        assert (closed[0], closed[2].count("\n")) == (status, status // 2), closed


def test_command_in_a_process(tmp_path):
    status, output, errors = python(RUN, "--seed", "-1", cwd=tmp_path)
    assert (status, output, errors.count("\n")) == (2, "", 1), errors
    assert "--seed" in python(RUN, "--help")[1]
