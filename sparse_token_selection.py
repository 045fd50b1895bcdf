"""Sparse token selection: the task, the encodings, the transformer, its descent, and the closed forms.

The order is that of README.md: task, encodings, model, descent, one-hot laws (C), stochastic laws (S, L),
fixed encodings (G), finite samples (N), fully-connected networks (F). Gradients live in analytic_grads.py.
Losses are in the units of L, with L_0 = d/(2q) for the predictor that is always zero.
"""
import bisect
import inspect
import itertools
import math

import numpy as np

from analytic_grads import checked, each, one_hot_loss_and_grads, require, softmax

# ---- the task -------------------------------------------------------------------------------------

STUDENT_DF = 10  # (A9) needs a third moment; the standard errors of sampled gradients the sixth

TOKENS = {  # each with mean 0 and variance 1
    "gaussian": lambda rng, size: rng.standard_normal(size),
    "rademacher": lambda rng, size: 2.0 * rng.integers(0, 2, size) - 1.0,
    "laplace": lambda rng, size: rng.laplace(scale=math.sqrt(0.5), size=size),
    "logistic": lambda rng, size: rng.logistic(scale=math.sqrt(3) / math.pi, size=size),
    "student_t": lambda rng, size: rng.standard_t(STUDENT_DF, size) * math.sqrt(1 - 2 / STUDENT_DF),
    "gumbel": lambda rng, size: (rng.gumbel(size=size) - np.euler_gamma) * math.sqrt(6) / math.pi,
}


@checked(rng="rng", B="size", T="size", q="size <= T", d="size", tokens=TOKENS, returns="B d T")
def sample_batch(rng, B, T, q, d, tokens="gaussian"):
    """B samples of the task: tokens x_i iid with mean 0 and covariance I, y uniform over q-subsets.

    Parameters: rng : numpy.random.Generator; B, T, q, d : integers, q <= T
        tokens : law of the entries, a key of `TOKENS`: "gaussian" is the paper's
    Returns: X (B, d, T), selected (B, T) of 0 and 1, q ones a row
    Raises: ValueError : rng no Generator, bad sizes, q > T, unknown tokens
    >>> X, selected = sample_batch(np.random.default_rng(0), B=2, T=5, q=3, d=4)
    >>> X.shape, selected.sum(axis=1).tolist()
    ((2, 4, 5), [3.0, 3.0])
    """
    X = TOKENS[tokens](rng, (B, d, T))
    selected = np.zeros((B, T))
    lowest = np.argpartition(rng.random((B, T)), q - 1, axis=1)[:, :q]  # a uniform q-subset of each row
    np.put_along_axis(selected, lowest, 1.0, axis=1)
    return X, selected


@checked(X="B d T", selected="B T of 0/1")
def sts(X, selected):
    """The target STS_q(X, y) = (1/q) sum_{i in y} x_i (the paper).

    Parameters: X : (B, d, T); selected : (B, T) of 0 and 1, q ones a row
    Returns: (B, d)
    Raises: ValueError : shapes that do not fit, rows without q ones, entries not finite; OverflowError
    >>> sts([[[1.0, 2.0, 9.0]]], [[1, 1, 0]]).tolist()
    [[1.5]]
    """
    return each(X, selected) / selected[0].sum()


@checked(T="size", q="size <= T")
def all_subsets(T, q):
    """Every q-subset of T positions: the whole population over y.

    Parameters: T, q : integers, q <= T
    Returns: (C(T, q), T) rows of 0 and 1, in lexicographic order
    Raises: ValueError : more than 10^5 subsets or 10^9 numbers, bad sizes, q > T
    >>> all_subsets(3, 2).tolist()
    [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    """
    count = math.comb(T, q) if min(q, T - q) < 20 else math.inf  # 20 of 40 are too many already
    require(count * max(T, 10**4) <= 10**9, "T, q", "sizes with at most 10^5 subsets, 10^9 numbers", (T, q))
    subsets = np.zeros((count, T))
    every = itertools.chain.from_iterable(itertools.combinations(range(T), q))
    np.put_along_axis(subsets, np.fromiter(every, int, count * q).reshape(count, q), 1.0, axis=1)
    return subsets


def first_subset(B, T, q):
    """B rows of y = {1, ..., q}: where encodings are drawn afresh, by symmetry any y will do."""
    return np.tile(1.0 * (np.arange(T) < q), (B, 1))


# ---- positional encodings and the query --------------------------------------------------------------

@checked(T="size", returns="T T")
def one_hot_encoding(T):
    """One-hot encodings e_i, the columns of I_T: d_e = T (the paper).

    Parameters: T : integer
    Returns: (T, T)
    Raises: ValueError : T not an integer >= 1, or too large
    >>> one_hot_encoding(2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return np.eye(T)


@checked(rng="rng", d_e="size", T="size", B="size or None", returns="B d_e T")
def random_sign_encoding(rng, d_e, T, B=None):
    """Stochastic encodings: entries +-1/sqrt(d_e), independent and fair, so ||e_i|| = 1.

    Parameters: rng : numpy.random.Generator; d_e, T : integers; B : None for one set, or the number of sets
    Returns: (d_e, T), or (B, d_e, T)
    Raises: ValueError : rng no Generator, bad sizes
    >>> E = random_sign_encoding(np.random.default_rng(0), d_e=4, T=3)
    >>> E.shape, np.unique(abs(E)).tolist()
    ((4, 3), [0.5])
    """
    shape = (d_e, T) if B is None else (B, d_e, T)
    count = math.prod(shape)
    eight = (2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) - 1) / math.sqrt(d_e)
    picks = np.frombuffer(rng.bytes(-(-count // 8)), np.uint8)  # each random byte picks eight signs
    return eight.take(picks, axis=0).ravel()[:count].reshape(shape)


@checked(E="d_e T | B d_e T", selected="B T of 0/1")
def sum_query(E, selected):
    """The query e_y = sum_{i in y} e_i.

    Parameters: E : (d_e, T) shared, or (B, d_e, T); selected : (B, T) of 0 and 1, q ones a row
    Returns: (B, d_e)
    Raises: ValueError : shapes that do not fit, rows without q ones, entries not finite; OverflowError
    >>> sum_query(np.eye(3), [[1, 0, 1]]).tolist()
    [[1.0, 0.0, 1.0]]
    """
    return selected @ E.T if E.ndim == 2 else each(E, selected)


@checked(E="d_e T | B d_e T", selected="B T of 0/1", returns="B q d_e")
def dual_query(E, selected):
    """The query of least norm with <e_i, e_y> = 1 on y, in least squares: e_y = E_y (E_y^T E_y)^+ 1.

    Met exactly where 1 is in the range of E_y^T E_y. A solve of the q x q Gram matrix serves wherever
    that is well conditioned, the pseudo-inverse elsewhere (equal, opposite or more than d_e encodings).

    Parameters: E : (d_e, T) shared, or (B, d_e, T); selected : (B, T) of 0 and 1, q ones a row
    Returns: (B, d_e)
    Raises: ValueError : shapes that do not fit, rows without q ones, encodings not finite; OverflowError
    >>> dual_query([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]], [[1, 1, 0]]).round(12).tolist()
    [[1.0, 0.0]]
    """
    B, q = len(selected), int(selected[0].sum())
    on_y = np.nonzero(selected)[1].reshape(B, q)
    E_y = E.T[on_y] if E.ndim == 2 else E.transpose(0, 2, 1)[np.arange(B)[:, None], on_y]  # (B, q, d_e)
    gram = E_y @ E_y.transpose(0, 2, 1)
    # det / prod(diagonal) is 1 for orthogonal encodings and 0 for dependent ones (Hadamard); NaN stays NaN.
    dependent = np.linalg.det(gram) <= 1e-4 * np.einsum("bii->bi", gram).prod(axis=1)
    e_query = np.empty((B, E_y.shape[2]))
    weights = np.linalg.solve(gram[~dependent], np.ones((B - dependent.sum(), q, 1)))
    e_query[~dependent] = (weights.transpose(0, 2, 1) @ E_y[~dependent])[:, 0, :]
    rounding = max(E_y.shape[1:]) * np.finfo(float).eps
    e_query[dependent] = np.linalg.pinv(E_y[dependent], rcond=rounding).sum(axis=2)
    return e_query


QUERIES = {"dual": dual_query, "sum": sum_query}


@checked(rng="rng", B="size", T="size", q="size <= T", d_e="size", query=QUERIES, returns="B T | d_e T")
def overlaps(rng, B, T, q, d_e, query="dual"):
    """Draws of u = E^T e_y for fresh random signs E and y = {1, ..., q}: by symmetry any y will do.

    Parameters: rng : numpy.random.Generator; B, T, q, d_e : integers, q <= T; query : "dual" or "sum"
    Returns: (B, T), the q selected positions first; made in pieces, so that no (B, d_e, T) array is held
    Raises: ValueError : rng no Generator, bad sizes, q > T, unknown query
    >>> u = overlaps(np.random.default_rng(0), B=2, T=5, q=1, d_e=16)
    >>> u.shape, u[:, 0].tolist()
    ((2, 5), [1.0, 1.0])
    """
    u, piece = np.empty((B, T)), max(1, 2**19 // (d_e * T))
    for start in range(0, B, piece):
        E = random_sign_encoding(rng, d_e, T, min(piece, B - start))
        u[start:start + piece] = each(E.transpose(0, 2, 1), QUERIES[query](E, first_subset(len(E), T, q)))
    return u


# ---- the one-layer transformer ----------------------------------------------------------------------

@checked(X="B d T", E="d_e T | B d_e T", e_query="B d_e")
def full_inputs(X, E, e_query):
    """The full model's tokens z_i = [x_i; e_i] and its query z_q = [0; e_y] (the paper).

    Parameters: X : (B, d, T); E : (d_e, T) shared, or (B, d_e, T); e_query : (B, d_e)
    Returns: Z (B, d + d_e, T), z_query (B, d + d_e)
    Raises: ValueError : shapes that do not fit, entries not real or not finite
    >>> Z, z_query = full_inputs([[[1.0, 2.0]]], np.eye(2), [[1.0, 0.0]])
    >>> Z.tolist(), z_query.tolist()
    ([[[1.0, 2.0], [1.0, 0.0], [0.0, 1.0]]], [[0.0, 1.0, 0.0]])
    """
    B, d, T = X.shape
    Z = np.concatenate([X, np.broadcast_to(E, (B, *E.shape[-2:]))], axis=1)
    return Z, np.concatenate([np.zeros((B, d)), e_query], axis=1)


def in_full_model(V, W):
    """The full model's V = [V, 0] and W = diag(0, W), from the blocks V_1 and W_22."""
    d, d_e = len(V), len(W)
    return np.pad(V, ((0, 0), (0, d_e))), np.pad(W, ((d, 0), (d, 0)))


@checked(V="d D", W="D D", Z="B D T", z_query="B D")
def transformer(V, W, Z, z_query):
    """The model's output f = V Z softmax(Z^T W z_q), (A1)-(A3) (the paper).

    Parameters: V : (d, D); W : (D, D); Z : (B, D, T); z_query : (B, D)
    Returns: (B, d)
    Raises: ValueError : shapes that do not fit, entries not real or not finite; OverflowError
    >>> transformer([[1.0, 0.0]], np.zeros((2, 2)), [[[1.0, 3.0], [0.0, 0.0]]], [[0.0, 1.0]]).tolist()
    [[2.0]]
    """
    return each(Z, softmax(each(Z.transpose(0, 2, 1), z_query @ W.T))) @ V.T


# ---- descent ----------------------------------------------------------------------------------------

@checked(params="arrays", loss_and_grads="function", learning_rate="number > 0", steps="count")
def gradient_descent(params, loss_and_grads, learning_rate, steps):
    """The one loop of the project: params <- params - learning_rate * grads.

    Parameters: params : tuple of arrays or numbers, copied before the first step
        loss_and_grads : of the params, returns (loss, *grads); fresh samples are a closure over a generator
        learning_rate : number > 0 (eta); steps : integer >= 0
    Returns: a generator of (t, params, loss) for t = 0 ... steps; nothing it yielded is changed afterwards
    Raises: ValueError : at the call, for bad arguments; at a step, for gradients that do not fit
        FloatingPointError : the loss or a parameter is not finite; names the step and the learning rate
    >>> for t, (x,), loss in gradient_descent((1.0,), lambda x: (x * x / 2, x), 0.5, steps=2):
    ...     print(t, x, loss)
    0 1.0 0.5
    1 0.5 0.125
    2 0.25 0.03125
    """
    return descend(params, loss_and_grads, learning_rate, steps)


def descend(params, loss_and_grads, learning_rate, steps):
    """The loop of `gradient_descent`: its generator."""
    diverged = f"gradient descent diverged with learning_rate {learning_rate:g}"
    for t in range(steps + 1):
        with np.errstate(all="ignore"):                       # an overflow is an error here, not a warning
            if t > 0:
                params = tuple(param - learning_rate * grad for param, grad in zip(params, grads))
                if not all(np.isfinite(param).all() for param in params):
                    raise FloatingPointError(f"{diverged}: a parameter is not finite after step {t}")
            try:
                loss, grads = loss_and_fitting_grads(loss_and_grads(*params), params)
            except OverflowError as error:
                raise FloatingPointError(f"{diverged}: at step {t} {error}") from None
            if not np.isfinite(loss).all():
                raise FloatingPointError(f"{diverged}: the loss is not finite at step {t}")
        yield t, params, loss


def loss_and_fitting_grads(result, params):
    """The loss, and the gradients in float64: real, and one in the shape of each parameter."""
    parts = [np.asarray(part if isinstance(part, (np.ndarray, np.number, float, int)) else None)
             for part in result] if isinstance(result, tuple) else []
    wanted = [np.shape(param) for param in params]
    if [part.shape for part in parts[1:]] != wanted or any(part.dtype.kind not in "iuf" for part in parts):
        require(False, "loss_and_grads(*params)", f"(loss, *grads) with real gradients of shapes {wanted}",
                [f"{part.dtype} {part.shape}" for part in parts] or type(result).__name__)
    return result[0], [part.astype(float, copy=False) for part in parts[1:]]


@checked(loss_and_grads="function", steps="size", beta1="number in (0, 1)", beta2="number in (0, 1)")
def adam(loss_and_grads, steps, beta1=0.9, beta2=0.999):
    """Wrap loss_and_grads so that `gradient_descent` takes Adam's steps: directions in place of gradients.

    m <- beta1 m + (1 - beta1) grad, s <- beta2 s + (1 - beta2) grad^2, both corrected for a start at 0; the
    direction is m/(sqrt(s) + 1e-8), and falls linearly to 0 over the last 30 % of the steps.

    Parameters: loss_and_grads : as for `gradient_descent`; steps : integer, length of the one run it serves
        beta1, beta2 : decay of the first and second moment, in (0, 1)
    Returns: a function of the parameters that returns (loss, *directions)
    Raises: ValueError : bad arguments; at a call, gradients that do not fit, or a run longer than steps
        OverflowError : at a call, the square of a gradient beyond float64
    References: Kingma and Ba, "Adam", ICLR 2015, with its epsilon = 1e-8.
    >>> run = gradient_descent((5.0,), adam(lambda x: (x * x / 2, x), 10), 0.5, 10)
    >>> [round(float(x), 3) for _, (x,), _ in run][:3]
    [5.0, 4.5, 4.002]
    """
    t, mean, square = 0, itertools.repeat(0.0), itertools.repeat(0.0)  # zeros, one for each parameter

    def directions(*params):
        nonlocal t, mean, square
        loss, grads = loss_and_fitting_grads(loss_and_grads(*params), params)
        t += 1
        require(t <= steps + 1, "steps", "the length of one run, and each run has its own adam(...)", steps)
        mean = [beta1 * m + (1 - beta1) * grad for m, grad in zip(mean, grads)]
        square = [beta2 * s + (1 - beta2) * grad * grad for s, grad in zip(square, grads)]
        sizes = [np.sqrt(s / (1 - beta2**t)) for s in square]
        if any(np.isinf(size).any() for size in sizes):       # it would freeze the parameters without a word
            raise OverflowError("the square of a gradient exceeds float64")
        rate = min(1.0, (steps - t + 1) / (0.3 * steps)) / (1 - beta1**t)
        return loss, *(rate * m / (size + 1e-8) for m, size in zip(mean, sizes))
    return directions


@checked(T="sizes", q="sizes <= T", d="sizes", eta="number > 0", steps="count")
def one_hot_recursion(T, q, d, eta, steps):
    """The two scalars (O3, O4) from alpha = omega = 0: `gradient_descent` with the sizes checked once.

    Parameters: T, q, d : integers, or arrays of one shape for several runs at once
        eta : number > 0; steps : integer >= 0
    Returns: a generator of (t, (alpha, omega), loss) for t = 0 ... steps
    Raises: ValueError : bad sizes, q > T, eta <= 0; FloatingPointError : the run diverges
    >>> for t, (alpha, omega), loss in one_hot_recursion(T=4, q=4, d=2, eta=2.0, steps=1): pass
    >>> float(alpha), float(omega), float(loss)
    (0.5, 0.0, 0.0625)
    """
    zero, scalars = np.zeros(np.broadcast(T, q, d).shape), inspect.unwrap(one_hot_loss_and_grads)
    return gradient_descent((zero, zero), lambda alpha, omega: scalars(alpha, omega, T, q, d), eta, steps)


# ---- one-hot encodings: closed forms (C) -------------------------------------------------------------

@checked(t="numbers >= 0", T="size", q="size < T", d="size", eta="number > 0", d_e="size or None")
def one_hot_loss_at(t, T, q, d, eta, d_e=None):
    """The loss after t steps in closed form, alpha in its valley: (C1) at the z that solves (C3).

    With r = T - q, w = e^omega and z = w^2, L = (d/2) r/(q (q z + r)), where
    eta t = T + r [ln w - 2q (w-1)^2/(q z + r)] + (T-1)/(2 d r) [q^2 (z-1) + 2 q r ln z + r^2 (1 - 1/z)];
    z = 1 for t < T/eta. The right side rises in ln z: bisection. Good to T = 10^9, t = 10^24.

    Parameters: t : number or array, >= 0, in steps; T, q, d : integers, q < T; eta : number > 0
        d_e : None for one-hot encodings; for one fixed random set, early in its descent, its dimension:
            T d_e/(T + d_e) stands for T - 1 (G1)
    Returns: the loss, in the shape of t
    Raises: ValueError : t negative, bad sizes, q >= T, eta <= 0; OverflowError. References: derived here.
    >>> float(one_hot_loss_at(0, T=4, q=1, d=2, eta=1.0))
    0.75
    """
    q, r, stiffness = float(q), float(T - q), T - 1.0 if d_e is None else T / (1 + T / d_e)
    time = eta * (t + 0.0)

    def flow(x):                                              # the right side of (C3) at ln z = x
        u = np.exp(-x / 2)                                    # 1/w
        valley = q**2 * np.expm1(x) + 2 * q * r * x - r**2 * np.expm1(-x)
        return T + r * (x / 2 - 2 * q * (1 - u)**2 / (q + r * u * u)) + stiffness / (2 * d * r) * valley
    low, high = 0 * time, np.log1p(2 * d * r / (stiffness * q**2) * time)  # q^2 (z - 1) alone
    for _ in range(110):
        x = (low + high) / 2
        below = flow(x) < time
        low, high = np.where(below, x, low), np.where(below, high, x)
    return d / 2 * r / (q * (q * np.exp(low) + r))


@checked(T="size", q="size < T/2", d="size", eta="number > 0")
def escape_time(T, q, d, eta):
    """The step at which half of the attention is on y: (C3) at w = (T-q)/q (C5).

    Parameters: T, q, d : integers, T > 2q; eta : number > 0
    Returns: number of steps, a float; T^2/(eta d) to leading order
    Raises: ValueError : bad sizes, 2q >= T, eta <= 0; OverflowError. References: derived here.
    >>> round(escape_time(T=1024, q=2, d=4, eta=2.0) * 2.0 * 4 / 1024**2, 4)
    1.0419
    """
    q, r = float(q), float(T - q)
    valley = (T - 1) / (d * r) * (T * (r - q) + 2 * q * r * math.log(r / q))
    lag = r * math.log(r / q) - 2 * (r - q)**2 / T + T
    return (valley + lag) / eta


@checked(T="size", q="size <= T", d="size", full="flag")
def largest_stable_eta(T, q, d, full=True):
    """The step size below which descent with one-hot encodings is stable late: 2 over the largest curvature.

    The curvatures are 1/q for alpha, lambda of (O5) off the line (O1), and for the full model with its cross
    blocks the larger eigenvalue of (1/T) [[1, q-1], [q-1, (q-1)(q+d)]] (A11). In mid-run they can be larger.

    Parameters: T, q, d : integers, q <= T
        full : True for V and W whole, the model of the paper; False for the blocks V_1, W_22 alone
    Returns: the learning rate, a float
    Raises: ValueError : bad sizes, q > T. References: derived here.
    >>> round(largest_stable_eta(T=5, q=4, d=6, full=False), 3), round(largest_stable_eta(T=5, q=4, d=6), 3)
    (2.177, 0.33)
    """
    T, q, d = float(T), float(q), float(d)
    sideways = 0.0 if q in (1, T) else (T - q)**2 / (q**2 * (T - 2))           # q = T = 2 has no such term
    off_line = d * (q - 1) / (T * max(T - 1, 1)) * (1 + sideways)                           # (O5)
    square = (q - 1) * (q + d)
    cross = ((1 + square) / 2 + math.hypot((1 - square) / 2, q - 1)) / T                    # (A11)
    return 2 / max(1 / q, off_line, cross * full)


# ---- stochastic encodings: closed forms (S), longer sequences (L) -----------------------------------------

@checked(q="size", d_e="size", query=QUERIES)
def overlap_variance(q, d_e, query="dual"):
    """sigma^2 = E||e_y||^2/d_e, the variance of an overlap off y: q/(d_e - q + 1) dual, q/d_e sum (S5).

    Parameters: q, d_e : integers, q <= d_e for the dual query; query : "dual" or "sum"
    Returns: a float; exact for the sum query and at q = 1. For the dual query a lower bound wherever the
        encodings of y are independent (to a probability of about q^2 2^-d_e), and close from d_e = 64 on
    Raises: ValueError : bad sizes, q > d_e (dual), unknown query. References: derived here.
    >>> overlap_variance(q=3, d_e=8), overlap_variance(q=3, d_e=8, query="sum")
    (0.5, 0.375)
    """
    require(query == "sum" or q <= d_e, "q", f"at most d_e = {d_e} for the dual query", q)
    return q / (d_e - q + 1) if query == "dual" else q / d_e


@checked(c="number", overlaps="B T", q="size < T", d="size")
def overlap_loss(c, overlaps, q, d):
    """The loss at the best alpha, averaged over given overlaps, without cancellation (S4).

    L* = L_0 {q E[sum_off a^2 + sum_on (a - mean_on a)^2] + Var(sum_off a)} / (q E||a||^2), a = softmax(c u),
    "on" and "off" meaning y; u = 1 on y leaves no second term.

    Parameters: c : number; overlaps : (B, T), the q selected positions first; q, d : integers, q < T
    Returns: the loss, a float
    Raises: ValueError : bad sizes, q >= T, entries not finite; OverflowError. References: derived here.
    >>> overlap_loss(0.0, [[1.0, 0.0, 0.0, 0.0]], q=1, d=2)
    0.75
    """
    a = softmax(c * overlaps)
    on, off = a[:, :q], a[:, q:]
    off_sq = np.einsum("bt,bt->b", off, off).mean()
    uneven = q * on.var(axis=1).mean()
    mean_sq = np.einsum("bt,bt->b", on, on).mean() + off_sq                   # E||a||^2
    return float(d / 2 * (q * (off_sq + uneven) + off.sum(axis=1).var()) / (q**2 * mean_sq))


def moments(c, T, q, sigma2):
    """m, M, v, h of (S5): means, variance and covariance of the sums of e^{c(u-1)} and its square off y."""
    k = c * sigma2                                            # at most .3, so that no exponent is above 0
    in_range = np.all(k <= 0.3 * (1 + 1e-12))
    require(in_range, "c", f"at most .3/sigma2 for (S5) and (L1), sigma2 = {sigma2:g}", np.max(c))
    mu1, mu2 = np.exp(c * (k / 2 - 1)), np.exp(c * (2 * k - 2))
    v = (T - q) * (mu2 - np.exp(c * (k - 2)))
    h = (T - q) * (np.exp(c * (4.5 * k - 3)) - np.exp(c * (2.5 * k - 3)))
    return (T - q) * mu1, (T - q) * mu2, v, h


def best_alpha(c, T, q, sigma2):
    """alpha* at W = c I, to leading order: (p/q)/A_0 with p = q/(q+m) and A_0 = p^2/q + (p/q)^2 M (S6)."""
    m, M, _, _ = moments(c, T, q, sigma2)
    return (q + m) / (q + M)


@checked(c="numbers >= 0", T="size", q="size < T", d="size", sigma2="number >= 0")
def stochastic_loss(c, T, q, d, sigma2):
    """The loss at W = c I and the best alpha for overlaps N(0, sigma2) off y, in closed form (S5).

    L*/L_0 = M/(q+M) + q/(q+M) [v/(q+m)^2 - 2h/((q+m)(q+M))], where m = (T-q) mu_1, M = (T-q) mu_2,
    v = (T-q)(mu_2 - mu_1^2), h = (T-q)(mu_3 - mu_2 mu_1) and mu_k = e^{-kc + k^2 c^2 sigma2/2}. The first
    term is (C1) with z = e^{2c - 2c^2 sigma2}. Errs by about (4/3) c (c sigma2)^3/q^2, the next cumulant.

    Parameters: c : number or array, 0 <= c <= .3/sigma2
        T, q, d : integers, q < T; sigma2 : `overlap_variance`
    Returns: the loss, in the shape of c
    Raises: ValueError : c or sigma2 out of range, bad sizes, q >= T. References: derived here.
    >>> float(stochastic_loss(0.0, T=4, q=1, d=2, sigma2=0.1))
    0.75
    """
    m, M, v, h = moments(c, T, q, sigma2)
    return d / (2 * q) * (M + q * (v / (q + m)**2 - 2 * h / ((q + m) * (q + M)))) / (q + M)


def sharpness_grid(sigma2):
    """The c at which (S6) and (N2) are solved: up to c sigma2 = .3, the end of the range of (S5)."""
    return np.linspace(0.0, min(0.3 / sigma2, 40.0), 8001)


def c_after(t, start, grid, stiffness, loss, eta):
    """c after t steps of stiffness(c) dc/dt = -eta dloss/dc, c = 0 at t = start, by the trapezoid rule."""
    slope = np.minimum(np.gradient(loss, grid, edge_order=2), -1e-300)  # rounding may hide that it falls
    steps_per_c = stiffness / (-eta * slope)
    time = start + np.append(0.0, np.cumsum((steps_per_c[1:] + steps_per_c[:-1]) / 2 * np.diff(grid)))
    require(np.all(t <= time[-1]), "t", f"at most {time[-1]:.3g}, where the range of (S5) ends", np.max(t))
    return np.interp(t, time, grid)


@checked(t="numbers >= 0", T="size", q="size < T", d="size", d_e="size", eta="number > 0")
def stochastic_trajectory(t, T, q, d, d_e, eta):
    """c, alpha and the loss after t steps of population descent, dual query, by quadrature of (S6).

    (d_e + d alpha*'(c)^2) dc/dt = -eta dL*/dc from c = 0 at t = T/eta; before that c = 0. L*(c) is
    `stochastic_loss`, alpha*(c) = (q+m)/(q+M) with m and M as there. Within 2 % for d T <= q d_e.

    Parameters: t : number or array, >= 0, in steps; T, q, d, d_e : integers, q < T, q <= d_e
        eta : number > 0
    Returns: c, alpha, loss, each in the shape of t
    Raises: ValueError : t so late that c sigma^2 > .3, bad sizes; OverflowError. References: derived here.
    >>> c, alpha, loss = stochastic_trajectory(1000, T=32, q=3, d=4, d_e=128, eta=2.0)
    >>> round(float(loss / (4 / 6)), 4)
    0.0617
    """
    sigma2 = overlap_variance(q, d_e)
    grid = sharpness_grid(sigma2)
    lag = d * np.gradient(best_alpha(grid, T, q, sigma2), grid, edge_order=2)**2
    c = c_after(t, T / eta, grid, d_e + lag, stochastic_loss(grid, T, q, d, sigma2), eta)
    return c, best_alpha(c, T, q, sigma2), stochastic_loss(c, T, q, d, sigma2)


@checked(alpha="numbers", c="numbers >= 0", T="size", q="size < T", d="size", sigma2="number >= 0")
def length_loss(alpha, c, T, q, d, sigma2):
    """The loss at V = alpha I, W = c I on sequences of length T, whatever length they were trained on (L1).

    L = (d/2) (alpha^2 A - 2 alpha p/q + 1/q), A = p^2/q + p^4 v/q^3 + (p/q)^2 M, p = q/(q+m) the attention
    on y, and m, M, v as in `stochastic_loss`.

    Parameters: alpha, c : numbers or arrays, 0 <= c <= .3/sigma2
        T, q, d : integers, q < T; sigma2 : `overlap_variance`
    Returns: the loss, in the broadcast shape
    Raises: ValueError : c or sigma2 out of range, bad sizes; OverflowError. References: derived here.
    >>> round(float(length_loss(1.03, 6.0, T=2048, q=3, d=4, sigma2=3 / 126)) * 6 / 4, 2)
    0.51
    """
    m, M, v, _ = moments(c, T, q, sigma2)
    p, rest = q / (q + m), m / (q + m)
    spread = p**4 * v / q**3 + (p / q)**2 * M
    return d / 2 * (((1 - alpha) + alpha * rest)**2 / q + alpha**2 * spread)  # the square of 1 - alpha p


@checked(T="size", q="size < T", d="size", d_e="size", query=QUERIES)
def stochastic_floor(T, q, d, d_e, query="dual"):
    """The least loss over c that encodings of dimension d_e allow: exact for q <= 2 (S10), else (S8), (S9).

    q <= 2: L_0 E[k/(q+k)], k ~ Bin(T - q, 2^-A) the positions off y that tie with y, A = d_e at q = 1 and
    A ~ Bin(d_e, 1/2) at q = 2. q >= 3, estimates: dual, L_0 ((T-q)/q) e^{-d_e/(2q)}, at most L_0; sum,
    L_0 min_c M/(q+M) with M = c^2 (q-1)(q-2)/d_e + (T-q) e^{-2c + 2c^2 tau^2}, tau^2 = (q + 2(q-1)/q)/d_e.

    Parameters: T, q, d, d_e : integers, q < T; query : "dual" or "sum"
    Returns: the loss, a float
    Raises: ValueError : bad sizes, q >= T, unknown query. References: derived here.
    >>> round(stochastic_floor(T=32, q=3, d=4, d_e=128, query="sum") * 6 / 4, 2)
    0.08
    """
    L_0, others = d / (2 * q), float(T - q)
    if q <= 2:  # E[k/(q+k)] = int_0^1 q x^{q-1} (1 - E[x^k]) dx, by Gauss-Legendre in h = sqrt(1 - x)
        nodes, weights = np.polynomial.legendre.leggauss(100)
        h, A = (1 + nodes[:, None]) / 2, np.arange(d_e + 1.0)
        log_ways = np.append(0.0, np.cumsum(np.log((d_e - A[:-1]) / (A[:-1] + 1))))      # log of d_e over A
        tie, chance = (2.0**-d_e, 1.0) if q == 1 else (2.0**-A, np.exp(log_ways - d_e * math.log(2)))
        tied = -np.expm1(others * np.log1p(-tie * h**2))                                  # 1 - E[x^k] given A
        return float(L_0 * (weights[:, None] * h * q * (1 - h**2)**(q - 1) * chance * tied).sum())  # (S10)
    if query == "dual":
        return L_0 * min(1.0, others / q * math.exp(-d_e / (2 * q)))                           # (S8)
    tau2 = (q + 2 * (q - 1) / q) / d_e
    c = np.linspace(0.0, min(math.log(T * d_e), 1 / (2 * tau2)), 10**4)        # the minimum lies inside
    M = c**2 * (q - 1) * (q - 2) / d_e + others * np.exp(-2 * c + 2 * c**2 * tau2)             # (S9)
    return float(L_0 * (M / (q + M)).min())


@checked(T="size", q="size < T", eps="number in (0, 1)")
def required_dimension(T, q, eps):
    """The d_e for L/L_0 <= eps with the dual query: exact for q <= 2 (S10), else 2 q log(T/(q eps)) (S8).

    Parameters: T, q : integers, q < T; eps : number in (0, 1)
    Returns: an int
    Raises: ValueError : bad sizes, q >= T, eps outside (0, 1)
    References: The order q log T is the paper's; the constants are derived here.
    >>> required_dimension(T=1024, q=3, eps=0.01), required_dimension(T=1024, q=1, eps=0.01)
    (63, 16)
    """
    enough = math.ceil(2 * q * (math.log(T / q) - math.log(eps)))
    if q > 2:
        return enough
    reached = lambda d_e: stochastic_floor(T, q, 2 * q, d_e) <= eps
    return 1 + bisect.bisect_left(range(1, 2 * enough + 8), True, key=reached)


# ---- fixed encodings (G) ---------------------------------------------------------------------------

@checked(E="d_e T", q="size < T", query=QUERIES)
def widest_margin(E, q, query="dual"):
    """W*, the least-norm W with equal scores on y and scores at least 1 lower off y: where descent ends (G2).

    Minimise ||W||_F subject to, for every q-subset y with s = E^T W e_y: s_i = s_k for i, k in y, and
    mean_y s - s_j >= 1 for j off y. Linear in W; fast up to a few thousand of these C(T,q) (T-q) margins.

    Parameters: E : (d_e, T), one fixed set; q : integer, q < T; query : "dual" or "sum"
    Returns: (d_e, d_e), right to 1e-6 of its norm
    Raises: ValueError : no W does it (equal encodings, or too many ties): see (G3). References: derived here.
    >>> round(float((widest_margin(np.eye(5), q=2)**2).sum()), 6)  # orthonormal: T - 1, as in (C4)
    4.0
    """
    selected, T = all_subsets(E.shape[1], q), E.shape[1]
    require(len(selected) * (T - q) <= 10**4, "E, q", "small enough for at most 10^4 margins", (E.shape, q))
    U, size, _ = np.linalg.svd(E, full_matrices=False)
    U = U[:, size > 1e-10 * size[0]]                         # W = U A U^T: it stays in the span of E
    e, e_query = U.T @ E, QUERIES[query](E, selected) @ U
    lead = (selected @ e.T / q)[:, :, None] - e              # mean_y e - e_j; <rows, A> = mean_y s - s_j
    rows = np.einsum("bet,bf->btef", lead, e_query).reshape(*selected.shape, -1)
    equal, apart = rows[selected == 1], rows[selected == 0]
    _, size, basis = np.linalg.svd(equal, full_matrices=False)
    basis = basis[size > 1e-10 * np.linalg.norm(rows[0])]
    A = least_norm(apart - (apart @ basis.T) @ basis, np.linalg.norm(apart, axis=1).max() or 1.0)
    require(A is not None, "E", f"a set that some W separates, every y from the rest, at q = {q}", E)
    return U @ A.reshape(len(e), len(e)) @ U.T


def least_norm(G, unit):
    """The x of least norm with G x >= 1; None if there is none, or none of norm below 10^4/unit (rounding).

    The dual, max 1^T l - ||G^T l||^2/2 over l >= 0, in proximal steps, each less |l - old|^2/(2 rho),
    by Newton's method on the set where l > 0. x = G^T l. Any l bounds the norm from below, any x from above.
    """
    G = G / unit
    if np.linalg.norm(G, axis=1).min() < 1e-10:              # a pair that no W tells apart
        return None
    K, l, rho = G @ G.T, np.zeros(len(G)), 100.0
    for _ in range(40):
        old, w = l / rho, K @ l                              # w = G x, the margins

        def merit(l, w):
            return l @ w / 2 + rho / 2 * (np.maximum(1 - w + old, 0)**2).sum()
        for _ in range(100):
            on = np.flatnonzero(1 - w + old > 0)
            step = -l
            step[on] += np.linalg.solve(K[np.ix_(on, on)] + np.eye(len(on)) / rho, 1 + old[on])
            dw, length = K @ step, 1.0
            while merit(l + length * step, w + length * dw) > merit(l, w) and length > 1e-9:
                length /= 2
            l, w = l + length * step, w + length * dw
            if length == 1 and np.array_equal(on, np.flatnonzero(1 - w + old > 0)):
                break
        l = np.maximum(l, 0)
        x = G.T @ l
        lower = l.sum() / max(np.linalg.norm(x), 1e-300)     # ||x*|| >= 1^T l/||G^T l||
        if lower > 1e4:
            break
        found = [x]
        if rho > 1e6:                                        # rounding in l: x from the tight margins alone
            found.append(np.linalg.lstsq(G[l > 0], np.ones((l > 0).sum()), rcond=1e-10)[0])
        for x in found:
            margin = (G @ x).min()                           # |x - x*|^2 <= upper bound^2 - lower bound^2
            if margin > 0 and np.linalg.norm(x) < margin * lower * (1 + 1e-12):
                return x / margin / unit
        rho = min(10 * rho, 1e7)
    return None


@checked(t="numbers > 0", W_star="d_e d_e", eta="number > 0")
def fixed_set_loss_at(t, W_star, eta):
    """The late loss of descent on a fixed set, ||W*||^2/(4 eta t), for every d: (G2).

    Parameters: t : number or array > 0, in steps; W_star : (d_e, d_e), `widest_margin`; eta : number > 0
    Returns: the loss, in the shape of t; Raises: ValueError : t or eta not > 0. References: derived here.
    >>> round(float(fixed_set_loss_at(1000, widest_margin(np.eye(5), q=2), eta=0.5)), 9)
    0.002
    """
    return (W_star**2).sum() / (4 * eta * t)


# ---- finite samples (N) ------------------------------------------------------------------------------

def regression_losses(c, n, T, q, d, sigma2):
    """Training loss, test loss and E||dV/dc||^2 on a grid of c, at W = c I and the best V for n > d + 1."""
    m, M, v, h = moments(c, T, q, sigma2)
    s = q + m                                                 # to second order in the sums of (S5):
    p = q / s + q * v / s**3                                  # the mean attention on y
    N = (q + M) / s**2 - 2 * h / s**3 + 3 * (q + M) * v / s**4                # E||a||^2
    zeta = np.sqrt(p**2 / q + (1 - p)**2 / (T - q))
    theta = np.arctan2((1 - p) / np.sqrt(T - q), p / np.sqrt(q))
    beta, b = np.cos(theta) / (np.sqrt(q) * zeta), np.sin(theta) / (np.sqrt(q) * zeta)
    random, noise, x = (N - zeta**2) * beta**2, np.sin(theta)**2 / q, d / (n - d - 1)
    alpha_c, b_c, theta_c = np.gradient([p / (q * N), b, theta], c, axis=1, edge_order=2)
    moved = d * (alpha_c**2 + x * b_c**2 + 2 * x * (1 + x) * (b * theta_c)**2)
    return d / 2 * (random + noise * (1 - d / n)), d / 2 * (random + noise * (1 + x)), moved


@checked(t="numbers >= 0", n="size", T="size", q="size < T", d="size", d_e="size", eta="number > 0")
def finite_sample_loss(t, n, T, q, d, d_e, eta):
    """Training and test loss after t steps on n fixed sequences, encodings drawn afresh at every step (N2).

    V is a regression of the target on X E[a]. With zeta = ||E[a]|| and theta the angle between E[a] and s_y
    its slope is beta = cos(theta)/(sqrt(q) zeta), its noise has variance sin(theta)^2/q: 1 - d/n of it is
    left on the sequences, 1 + x on others, x = d/(n-d-1). Random attention adds (E||a||^2 - zeta^2) beta^2.
    c descends the training loss, (d_e + E||dV/dc||^2) dc/dt = -eta dL_train/dc from c = 0 at t = T/eta, and V
    follows, E||dV/dc||^2 = d [alpha'^2 + x b'^2 + 2 x (1 + x) (b theta')^2], b = sin(theta)/(sqrt(q) zeta),
    alpha = p/(q E||a||^2), p the attention on y. For n < d - 1 the limit t -> infinity: V fits every
    sequence, at c = 0. An approximation: within 10 % for n >= 3d, late (from about .03 L_0 on); else rough.

    Parameters: t : number or array, >= 0, in steps; n, T, q, d, d_e : integers, q < T, q <= d_e, n < d - 1 or
        n > d + 1; eta : number > 0
    Returns: training loss, test loss (L, not L/L_0), each in the shape of t
    Raises: ValueError : n from d - 1 to d + 1; t so late that c sigma^2 > .3. References: derived here.
    >>> train, test = finite_sample_loss(1200, n=48, T=16, q=2, d=16, d_e=64, eta=1.0)
    >>> round(float(train / 4), 4), round(float(test / 4), 4)
    (0.0078, 0.0126)
    """
    require(abs(n - d) > 1, "n", f"below d - 1 = {d - 1} or above d + 1 = {d + 1}", n)
    if n < d:
        test = (1 - q / T) * (d - 1) / (d - n - 1) + q / T * (1 - n / d)                  # (N2), memorised
        return np.zeros(np.shape(t)), np.full(np.shape(t), d / (2 * q) * test)
    sigma2 = overlap_variance(q, d_e)
    grid = sharpness_grid(sigma2)
    train, test, moved = regression_losses(grid, n, T, q, d, sigma2)
    c = c_after(t, T / eta, grid, d_e + moved, train, eta)                                     # (N2)
    return np.interp(c, grid, train), np.interp(c, grid, test)


# ---- fully-connected networks (F) -------------------------------------------------------------------------

@checked(X="B d T", selected="B T of 0/1")
def fcn_inputs(X, selected):
    """The network's input [vec(X); s_y]: x_1 ... x_T, d numbers each, then the 0/1 row of y (F1).

    Parameters: X : (B, d, T); selected : (B, T) of 0 and 1, q ones a row
    Returns: (B, T d + T)
    Raises: ValueError : shapes that do not fit, rows without q ones, entries not finite
    >>> fcn_inputs([[[1.0, 2.0], [3.0, 4.0]]], [[0, 1]]).tolist()
    [[1.0, 3.0, 2.0, 4.0, 0.0, 1.0]]
    """
    return np.concatenate([X.transpose(0, 2, 1).reshape(len(X), -1), selected], axis=1)


@checked(W1="m n", b1="m", A="d m", b2="d", inputs="B n")
def fcn(W1, b1, A, b2, inputs):
    """The two-layer network f = A relu(W1 x + b1) + b2 (F1).

    Parameters: W1 : (m, n); b1 : (m,); A : (d, m); b2 : (d,); inputs : (B, n)
    Returns: (B, d)
    Raises: ValueError : shapes that do not fit, entries not real or not finite; OverflowError
    >>> fcn([[2.0]], [-1.0], [[3.0]], [0.5], [[1.0], [0.0]]).tolist()
    [[3.5], [0.5]]
    """
    pre = inputs @ W1.T + b1
    return ((pre > 0) * pre) @ A.T + b2


@checked(rng="rng", m="size", T="size", d="size", returns="m T d")
def init_fcn(rng, m, T, d):
    """Random first and second layer, zero biases: N(0, 2/n) for the n = Td + T inputs, N(0, 1/m).

    Parameters: rng : numpy.random.Generator; m, T, d : integers
    Returns: W1 (m, T d + T), b1 (m,), A (d, m), b2 (d,)
    Raises: ValueError : rng no Generator, bad sizes
    >>> [param.shape for param in init_fcn(np.random.default_rng(0), m=3, T=2, d=4)]
    [(3, 10), (3,), (4, 3), (4,)]
    """
    n = T * d + T
    return (rng.standard_normal((m, n)) * math.sqrt(2 / n), np.zeros(m),
            rng.standard_normal((d, m)) / math.sqrt(m), np.zeros(d))


@checked(m="counts", T="size", q="size <= T", d="size", fisher="number >= 1")
def fcn_loss_floor(m, T, q, d, fisher=1.0):
    """The least loss of any network whose first layer has m neurons, of any depth (F4), (F6).

    L/L_0 >= 1 - q m/(Td) for m <= d, (1 - m/(Td)) (T-q)/(T-1) for d <= m <= Td, 0 beyond; all this divided by
    the Fisher information of the tokens' entries where they are not Gaussian.

    Parameters: m : integer >= 0 or array of them; T, q, d : integers, q <= T
        fisher : E[(p'/p)^2], p the density of an entry at variance 1: Gaussian 1, logistic pi^2/9, Gumbel
            pi^2/6, Laplace 2
    Returns: the loss (L, not L/L_0), in the shape of m
    Raises: ValueError : m not integers >= 0, bad sizes, q > T, fisher below 1
    References: The order Td is the paper's; the number is derived here.
    >>> (fcn_loss_floor([0, 4, 16, 32], T=8, q=2, d=4) / (4 / 4)).round(3).tolist()
    [1.0, 0.75, 0.429, 0.0]
    """
    m, T, q, d = np.asarray(m, float), float(T), float(q), float(d)            # int64 products would overflow
    beyond_mean = 0.0 if T == 1 else (T - q) / (T - 1) * np.maximum(1 - m / (T * d), 0.0)
    return d / (2 * q) * np.where(m <= d, 1 - q * m / (T * d), beyond_mean) / fisher


@checked(W1="m n", T="size", q="size <= T", d="size", fisher="number >= 1")
def fcn_first_layer_floor(W1, T, q, d, fisher=1.0):
    """The least loss of any network with this first layer, of any depth (F3), (F6).

    (1/2) tr(P (M kron I_d)) / fisher, P the projection off the row space of the first Td columns of W1 and
    M = E s_y s_y^T/q^2 = ((T-q) I + (q-1) 11^T) / (q T (T-1)).

    Parameters: W1 : (m, n), n >= Td, of any rank; T, q, d : integers, q <= T; fisher : as in `fcn_loss_floor`
    Returns: the loss (L, not L/L_0), a float
    Raises: ValueError : W1 with fewer than Td columns, bad sizes, fisher below 1. References: derived here.
    >>> round(fcn_first_layer_floor(np.eye(4, 32), T=8, q=2, d=4), 4)
    0.875
    """
    require(W1.shape[1] >= T * d, "W1", f"of at least T d = {T * d} columns", W1.shape)
    rows = W1[:, :T * d]
    largest = abs(rows).max(axis=1, keepdims=True)            # a small row counts as much as a large one
    rows = np.linalg.qr(rows / np.where(largest > 0, largest, 1.0), mode="r")  # the same space, Td rows
    _, singular, directions = np.linalg.svd(rows)
    rank = int((singular > max(W1.shape) * np.finfo(float).eps * singular[0]).sum())
    unseen = directions[rank:].reshape(-1, T, d)              # an orthonormal basis of what W1 does not see
    each_one, shared = (0.0, 1.0) if T == 1 else ((T - q) / (T - 1), (q - 1) / (T - 1))
    total = each_one * (unseen**2).sum() + shared * (unseen.sum(axis=1)**2).sum()
    return float(total / (2 * q * T * fisher))


@checked(T="size", q="size <= T", d="size", K="number > 0", returns="T d T d")
def exact_fcn(T, q, d, K=8.0):
    """A network of width Td that computes STS_q wherever all |x| < K, to rounding of numbers like K (F5).

    h_ik = relu(x_ik + K - G (1 - s_i)) with G = 2K + 2, f_k = (1/q) sum_i h_ik - K.

    Parameters: T, q, d : integers, q <= T; K : number > 0
    Returns: W1 (T d, T d + T), b1 (T d,), A (d, T d), b2 (d,)
    Raises: ValueError : bad sizes, q > T, K not a number > 0; OverflowError. References: derived here.
    >>> fcn(*exact_fcn(T=2, q=1, d=1), fcn_inputs([[[0.5, 7.0]]], [[1, 0]])).tolist()
    [[0.5]]
    """
    G = 2 * K + 2
    W1 = np.hstack([np.eye(T * d), G * np.repeat(np.eye(T), d, axis=0)])
    return W1, np.full(T * d, K - G), np.tile(np.eye(d), T) / q, np.full(d, -K)
