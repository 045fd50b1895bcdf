"""Sparse token selection: the task, the encodings, the transformer, its descent, the closed forms.

The order is that of README.md: task, encodings, model, descent, one-hot laws (C), stochastic laws
(S, L), fixed encodings (G), finite samples (N), fully-connected networks (F). Gradients live in
analytic_grads.py. Losses are in the units of L, with L_0 = d/(2q) for the predictor that is always
zero.
"""
import bisect
import inspect
import itertools
import math

import numpy as np

from analytic_grads import checked, each, one_hot_loss_and_grads, require, softmax

# ---- the task ----------------------------------------------------------------------------------

STUDENT_DF = 10  # (A9) needs a third moment; the standard errors of sampled gradients the sixth

TOKENS = {  # each with mean 0 and variance 1
    "gaussian": lambda rng, size: rng.standard_normal(size),
    "rademacher": lambda rng, size: 2.0 * rng.integers(0, 2, size) - 1.0,
    "laplace": lambda rng, size: rng.laplace(scale=math.sqrt(0.5), size=size),
    "logistic": lambda rng, size: rng.logistic(scale=math.sqrt(3) / math.pi, size=size),
    "student_t": lambda rng, size:
        rng.standard_t(STUDENT_DF, size) * math.sqrt(1 - 2 / STUDENT_DF),
    "gumbel": lambda rng, size:
        (rng.gumbel(size=size) - np.euler_gamma) * math.sqrt(6) / math.pi,
}


@checked(rng="rng", B="size", T="size", q="size <= T", d="size", tokens=TOKENS, returns="B d T")
def sample_batch(rng, B, T, q, d, tokens="gaussian"):
    """B samples of the task: tokens x_i iid, mean 0 and covariance I; y uniform over q-subsets.

    Parameters: rng : numpy.random.Generator; B, T, q, d : integers, q <= T
        tokens : law of the entries, a key of `TOKENS`: "gaussian" is the paper's
    Returns: X (B, d, T), selected (B, T) of 0 and 1, q ones a row
    Raises: ValueError : rng no Generator, bad sizes, q > T, unknown tokens
    >>> X, selected = sample_batch(np.random.default_rng(0), B=2, T=5, q=3, d=4)
    >>> X.shape, selected.sum(axis=1).tolist()
    ((2, 4, 5), [3.0, 3.0])
    """
    X = TOKENS[tokens](rng, (B, d, T))

    keys = rng.random((B, T))
    lowest = np.argpartition(keys, q - 1, axis=1)[:, :q]  # a uniform q-subset of each row
    selected = np.zeros((B, T))
    np.put_along_axis(selected, lowest, 1.0, axis=1)
    return X, selected


@checked(X="B d T", selected="B T of 0/1")
def sts(X, selected):
    """The target STS_q(X, y) = (1/q) sum_{i in y} x_i (the paper).

    Parameters: X : (B, d, T); selected : (B, T) of 0 and 1, q ones a row
    Returns: (B, d)
    Raises: ValueError : shapes that do not fit, rows without q ones, entries not finite
        OverflowError : a result beyond float64
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
    count = math.inf  # 20 of 40 are too many already
    if min(q, T - q) < 20:
        count = math.comb(T, q)
    few = count * max(T, 10**4) <= 10**9
    require(few, "T, q", "sizes with at most 10^5 subsets, 10^9 numbers", (T, q))

    every = itertools.chain.from_iterable(itertools.combinations(range(T), q))
    positions = np.fromiter(every, int, count * q).reshape(count, q)
    subsets = np.zeros((count, T))
    np.put_along_axis(subsets, positions, 1.0, axis=1)
    return subsets


def first_subset(B, T, q):
    """B rows of y = {1, ..., q}: where encodings are drawn afresh, by symmetry any y will do."""
    return np.tile(1.0 * (np.arange(T) < q), (B, 1))


# ---- positional encodings and the query --------------------------------------------------------

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

    Parameters: rng : numpy.random.Generator; d_e, T : integers
        B : None for one set, or the number of sets
    Returns: (d_e, T), or (B, d_e, T)
    Raises: ValueError : rng no Generator, bad sizes
    >>> E = random_sign_encoding(np.random.default_rng(0), d_e=4, T=3)
    >>> E.shape, np.unique(abs(E)).tolist()
    ((4, 3), [0.5])
    """
    shape = (d_e, T) if B is None else (B, d_e, T)
    count = math.prod(shape)

    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    signs = (2.0 * bits - 1) / math.sqrt(d_e)  # each random byte picks a row, eight signs
    picks = np.frombuffer(rng.bytes(-(-count // 8)), np.uint8)
    return signs.take(picks, axis=0).ravel()[:count].reshape(shape)


@checked(E="d_e T | B d_e T", selected="B T of 0/1", returns="B d_e")
def sum_query(E, selected):
    """The query e_y = sum_{i in y} e_i.

    Parameters: E : (d_e, T) shared, or (B, d_e, T); selected : (B, T) of 0 and 1, q ones a row
    Returns: (B, d_e)
    Raises: ValueError : shapes that do not fit, rows without q ones, entries not finite
        OverflowError : a result beyond float64
    >>> sum_query(np.eye(3), [[1, 0, 1]]).tolist()
    [[1.0, 0.0, 1.0]]
    """
    return selected @ E.T if E.ndim == 2 else each(E, selected)


@checked(E="d_e T | B d_e T", selected="B T of 0/1", returns="B q d_e | B q q")
def dual_query(E, selected):
    """The least-norm least-squares solution of <e_i, e_y> = 1 on y: e_y = E_y (E_y^T E_y)^+ 1.

    Met exactly where 1 is in the range of E_y^T E_y. A solve of the q x q Gram matrix serves where
    that is well conditioned, the pseudo-inverse elsewhere (equal, opposite or more than d_e
    encodings).

    Parameters: E : (d_e, T) shared, or (B, d_e, T); selected : (B, T) of 0 and 1, q ones a row
    Returns: (B, d_e)
    Raises: ValueError : shapes that do not fit, rows without q ones, encodings not finite
        OverflowError : a result beyond float64
    >>> dual_query([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]], [[1, 1, 0]]).round(12).tolist()
    [[1.0, 0.0]]
    """
    B = len(selected)
    q = int(selected[0].sum())
    positions = np.nonzero(selected)[1].reshape(B, q)
    if E.ndim == 2:
        E_y = E.T[positions]  # (B, q, d_e)
    else:
        E_y = E.transpose(0, 2, 1)[np.arange(B)[:, None], positions]
    gram = E_y @ E_y.transpose(0, 2, 1)
    e_query = np.empty((B, E_y.shape[2]))

    # det / prod(diagonal) is 1 for orthogonal encodings, 0 for dependent ones (Hadamard)
    determinant = np.linalg.det(gram)
    diagonal = np.einsum("bii->bi", gram)
    dependent = determinant <= 1e-4 * diagonal.prod(axis=1)
    independent = ~dependent  # NaN is here, and stays NaN

    ones = np.ones((independent.sum(), q, 1))
    weights = np.linalg.solve(gram[independent], ones)
    combined = weights.transpose(0, 2, 1) @ E_y[independent]
    e_query[independent] = combined[:, 0, :]

    rounding = max(E_y.shape[1:]) * np.finfo(float).eps
    inverse = np.linalg.pinv(E_y[dependent], rcond=rounding)
    e_query[dependent] = inverse.sum(axis=2)
    return e_query


QUERIES = {"dual": dual_query, "sum": sum_query}


@checked(rng="rng", B="size", T="size", q="size <= T", d_e="size", query=QUERIES,
         returns="B T | d_e T | q q")
def overlaps(rng, B, T, q, d_e, query="dual"):
    """Draws of u = E^T e_y for fresh random signs E and y = {1, ..., q}, by symmetry any y.

    Made in pieces, so that no (B, d_e, T) array is held.

    Parameters: rng : numpy.random.Generator; B, T, q, d_e : integers, q <= T
        query : "dual" or "sum"
    Returns: (B, T), the q selected positions first
    Raises: ValueError : rng no Generator, bad sizes, q > T, unknown query
    >>> u = overlaps(np.random.default_rng(0), B=2, T=5, q=1, d_e=16)
    >>> u.shape, u[:, 0].tolist()
    ((2, 5), [1.0, 1.0])
    """
    u = np.empty((B, T))
    piece = max(1, 2**19 // (max(d_e, q) * T))
    for start in range(0, B, piece):
        E = random_sign_encoding(rng, d_e, T, min(piece, B - start))
        e_query = QUERIES[query](E, first_subset(len(E), T, q))
        u[start:start + piece] = each(E.transpose(0, 2, 1), e_query)
    return u


# ---- the one-layer transformer -----------------------------------------------------------------

@checked(X="B d T", E="d_e T | B d_e T", e_query="B d_e", returns="B d_e T")
def full_inputs(X, E, e_query):
    """The full model's tokens z_i = [x_i; e_i] and its query z_q = [0; e_y] (the paper).

    Parameters: X : (B, d, T); E : (d_e, T) shared, or (B, d_e, T); e_query : (B, d_e)
    Returns: Z (B, d + d_e, T), z_query (B, d + d_e)
    Raises: ValueError : shapes that do not fit, entries not real or not finite
    >>> Z, z_query = full_inputs([[[1.0, 2.0]]], np.eye(2), [[1.0, 0.0]])
    >>> Z.tolist(), z_query.tolist()
    ([[[1.0, 2.0], [1.0, 0.0], [0.0, 1.0]]], [[0.0, 1.0, 0.0]])
    """
    B, d, _ = X.shape
    encodings = np.broadcast_to(E, (B, *E.shape[-2:]))
    Z = np.concatenate([X, encodings], axis=1)
    z_query = np.concatenate([np.zeros((B, d)), e_query], axis=1)
    return Z, z_query


def in_full_model(V, W):
    """The full model's V = [V, 0] and W = diag(0, W), from the blocks V_1 and W_22."""
    d = len(V)
    d_e = len(W)
    full_V = np.pad(V, ((0, 0), (0, d_e)))
    full_W = np.pad(W, ((d, 0), (d, 0)))
    return full_V, full_W


@checked(V="d D", W="D D", Z="B D T", z_query="B D")
def transformer(V, W, Z, z_query):
    """The model's output f = V Z softmax(Z^T W z_q), (A1)-(A3) (the paper).

    Parameters: V : (d, D); W : (D, D); Z : (B, D, T); z_query : (B, D)
    Returns: (B, d)
    Raises: ValueError : shapes that do not fit, entries not real or not finite
        OverflowError : a result beyond float64
    >>> V, W = [[1.0, 0.0]], np.zeros((2, 2))
    >>> transformer(V, W, [[[1.0, 3.0], [0.0, 0.0]]], [[0.0, 1.0]]).tolist()
    [[2.0]]
    """
    s = each(Z.transpose(0, 2, 1), z_query @ W.T)
    a = softmax(s)
    return each(Z, a) @ V.T


# ---- descent -----------------------------------------------------------------------------------

@checked(params="arrays", loss_and_grads="function", learning_rate="number > 0", steps="count")
def gradient_descent(params, loss_and_grads, learning_rate, steps):
    """The one loop of the project: params <- params - learning_rate * grads.

    Parameters: params : tuple of arrays or numbers, copied before the first step
        loss_and_grads : of the params, returns (loss, *grads); fresh samples are a closure over a
            generator
        learning_rate : number > 0 (eta); steps : integer >= 0
    Returns: a generator of (t, params, loss) for t = 0 ... steps; nothing it yielded is changed
        afterwards
    Raises: ValueError : at the call, for bad arguments; at a step, for gradients that do not fit
        FloatingPointError : the loss or a parameter is not finite; names step and learning rate
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
        with np.errstate(all="ignore"):  # an overflow is an error here, not a warning
            if t > 0:
                params = tuple(x - learning_rate * grad for x, grad in zip(params, grads))
                if not all(np.isfinite(x).all() for x in params):
                    where = f"a parameter is not finite after step {t}"
                    raise FloatingPointError(f"{diverged}: {where}")
            try:
                loss, grads = loss_and_fitting_grads(loss_and_grads(*params), params)
            except OverflowError as error:
                raise FloatingPointError(f"{diverged}: at step {t} {error}") from None
            if not np.isfinite(loss).all():
                raise FloatingPointError(f"{diverged}: the loss is not finite at step {t}")
        yield t, params, loss


def loss_and_fitting_grads(result, params):
    """The loss, and the gradients in float64: real, and one in the shape of each parameter."""
    parts = parts_as_arrays(result)
    grads = parts[1:]

    shapes = [np.shape(param) for param in params]
    fit = [grad.shape for grad in grads] == shapes
    real = all(part.dtype.kind in "iuf" for part in parts)
    if not (parts and fit and real):
        wanted = f"(loss, *grads) with real gradients of shapes {shapes}"
        got = [f"{part.dtype} {part.shape}" for part in parts]
        require(False, "loss_and_grads(*params)", wanted, got or type(result).__name__)
    return result[0], [grad.astype(float, copy=False) for grad in grads]


def parts_as_arrays(result):
    """The parts of a tuple as arrays, of objects where they are no numbers; else no part."""
    if not isinstance(result, tuple):
        return []
    numbers = (np.ndarray, np.number, float, int)
    return [np.asarray(part if isinstance(part, numbers) else None) for part in result]


@checked(loss_and_grads="function", steps="size",
         beta1="number in (0, 1)", beta2="number in (0, 1)")
def adam(loss_and_grads, steps, beta1=0.9, beta2=0.999):
    """Wrap loss_and_grads so that `gradient_descent` takes Adam's steps: directions for gradients.

    m <- beta1 m + (1 - beta1) grad, s <- beta2 s + (1 - beta2) grad^2, both corrected for a start
    at 0; the direction is m/(sqrt(s) + 1e-8), and falls linearly to 0 over the last 30 % of the
    steps.

    Parameters: loss_and_grads : as for `gradient_descent`
        steps : integer, length of the one run it serves
        beta1, beta2 : decay of the first and second moment, in (0, 1)
    Returns: a function of the parameters that returns (loss, *directions)
    Raises: ValueError : bad arguments; at a call, gradients that do not fit, or a run longer than
        steps
        OverflowError : at a call, the square of a gradient beyond float64
    References: Kingma and Ba, "Adam", ICLR 2015, with its epsilon = 1e-8.
    >>> run = gradient_descent((5.0,), adam(lambda x: (x * x / 2, x), 10), 0.5, 10)
    >>> [round(float(x), 3) for _, (x,), _ in run][:3]
    [5.0, 4.5, 4.002]
    """
    t = 0
    mean = itertools.repeat(0.0)  # zeros, one for each parameter
    square = itertools.repeat(0.0)

    def directions(*params):
        nonlocal t, mean, square
        loss, grads = loss_and_fitting_grads(loss_and_grads(*params), params)
        t += 1
        one_run = "the length of one run, and each run has its own adam(...)"
        require(t <= steps + 1, "steps", one_run, steps)

        with np.errstate(all="ignore"):  # an overflow is an error here, not a warning
            mean = [beta1 * m + (1 - beta1) * grad for m, grad in zip(mean, grads)]
            square = [beta2 * s + (1 - beta2) * grad * grad for s, grad in zip(square, grads)]
            sizes = [np.sqrt(s / (1 - beta2**t)) for s in square]
            if any(np.isinf(size).any() for size in sizes):  # it would freeze the parameters
                raise OverflowError("the square of a gradient exceeds float64")

            fall = min(1.0, (steps - t + 1) / (0.3 * steps))
            rate = fall / (1 - beta1**t)
            return loss, *(rate * m / (size + 1e-8) for m, size in zip(mean, sizes))

    return directions


@checked(T="sizes", q="sizes <= T", d="sizes", eta="number > 0", steps="count")
def one_hot_recursion(T, q, d, eta, steps):
    """The two scalars (O3, O4) from alpha = omega = 0: `gradient_descent`, sizes checked once.

    Parameters: T, q, d : integers, or arrays of one shape for several runs at once
        eta : number > 0; steps : integer >= 0
    Returns: a generator of (t, (alpha, omega), loss) for t = 0 ... steps
    Raises: ValueError : bad sizes, q > T, eta <= 0
        FloatingPointError : the run diverges
    >>> for t, (alpha, omega), loss in one_hot_recursion(T=4, q=4, d=2, eta=2.0, steps=1): pass
    >>> float(alpha), float(omega), float(loss)
    (0.5, 0.0, 0.0625)
    """
    scalars = inspect.unwrap(one_hot_loss_and_grads)

    def loss_and_grads(alpha, omega):
        return scalars(alpha, omega, T, q, d)

    zero = np.zeros(np.broadcast(T, q, d).shape)
    return gradient_descent((zero, zero), loss_and_grads, eta, steps)


# ---- one-hot encodings: closed forms (C) -------------------------------------------------------

@checked(t="numbers >= 0", T="size", q="size < T", d="size", eta="number > 0",
         d_e="size or None", heads="size")
def one_hot_loss_at(t, T, q, d, eta, d_e=None, heads=1):
    """The loss after t steps in closed form, alpha in its valley: (C1) at the z that solves (C3).

    With r = T - q, w = e^omega and z = w^2, L = (d/2) r/(q (q z + r)), where

        eta t = T + r [ln w - 2q (w-1)^2/(q z + r)]
                + (T-1)/(2 d r) [q^2 (z-1) + 2 q r ln z + r^2 (1 - 1/z)];

    z = 1 for t < T/eta. The right side rises in ln z: bisection. It is the loss of population
    descent from 3T/eta on, to about .05 (d/q)^2 in the logarithm, for T >= 64. In arithmetic it is
    good to T = 10^9, t = 10^24.

    Parameters: t : number or array, >= 0, in steps; T, q, d : integers, q < T; eta : number > 0
        d_e : None for one-hot encodings; for one fixed random set, early in its descent and at
            q = 1, its dimension: T d_e/(T + d_e) stands for T - 1 (G1)
        heads : their number, all from zero: heads (T-1) stands for T - 1, and the rest of the right
            side is divided by heads (H); alpha needs heads eta < 2q
    Returns: the loss, in the shape of t
    Raises: ValueError : t negative, bad sizes, q >= T, eta <= 0
        OverflowError : a result beyond float64
    References: derived here.
    >>> float(one_hot_loss_at(0, T=4, q=1, d=2, eta=1.0))
    0.75
    >>> late = one_hot_loss_at(1e9, T=8, q=2, d=3, eta=1.0, heads=3)  # 3 (T-1)/(4 eta t), as (C4)
    >>> round(float(late) * 4e9 / (3 * 7), 4)
    1.0
    """
    time = eta * (t + 0.0)
    q = float(q)
    others = float(T - q)
    stiffness = T - 1.0 if d_e is None else T / (1 + T / d_e)
    stiffness = heads * stiffness

    def flow(log_z):  # the right side of (C3)
        u = np.exp(-log_z / 2)  # 1/w
        lag = others * (log_z / 2 - 2 * q * (1 - u)**2 / (q + others * u * u))
        rise = q**2 * np.expm1(log_z)
        valley = rise + 2 * q * others * log_z - others**2 * np.expm1(-log_z)
        return (T + lag) / heads + stiffness / (2 * d * others) * valley

    low = 0 * time
    high = np.log1p(2 * d * others / (stiffness * q**2) * time)  # from q^2 (z - 1) alone
    for _ in range(110):
        middle = (low + high) / 2
        below = flow(middle) < time
        low = np.where(below, middle, low)
        high = np.where(below, high, middle)
    return d / 2 * others / (q * (q * np.exp(low) + others))


@checked(T="size", q="size < T/2", d="size", eta="number > 0")
def escape_time(T, q, d, eta):
    """The step at which half of the attention is on y: (C3) at w = (T-q)/q (C5).

    Parameters: T, q, d : integers, T > 2q; eta : number > 0
    Returns: number of steps, a float; T^2/(eta d) to leading order
    Raises: ValueError : bad sizes, 2q >= T, eta <= 0
        OverflowError : a result beyond float64
    References: derived here.
    >>> round(escape_time(T=1024, q=2, d=4, eta=2.0) * 2.0 * 4 / 1024**2, 4)
    1.0419
    """
    q = float(q)
    others = float(T - q)
    log_w = math.log(others / q)
    valley = (T - 1) / (d * others) * (T * (others - q) + 2 * q * others * log_w)
    lag = others * log_w - 2 * (others - q)**2 / T + T
    return (valley + lag) / eta


@checked(T="size", q="size <= T", d="size", full="flag")
def largest_stable_eta(T, q, d, full=True):
    """The step size above which descent with one-hot encodings leaves the law: 2 over a curvature.

    The curvatures are 1/q for alpha, lambda of (O5) off the line (O1), and for the full model with
    its cross blocks the larger eigenvalue of (1/T) [[1, q-1], [q-1, (q-1)(q+d)]] (A11). To stay
    below is necessary and not enough: it is for the mean dynamics, Gaussian tokens and late. In
    mid-run curvatures can be larger, and small batches need less: use at most half of it.

    Parameters: T, q, d : integers, q <= T
        full : True for V and W whole, the model of the paper; False for the blocks V_1, W_22 alone
    Returns: the learning rate, a float
    Raises: ValueError : bad sizes, q > T
    References: derived here.
    >>> round(largest_stable_eta(T=5, q=4, d=6, full=False), 3)
    2.177
    >>> round(largest_stable_eta(T=5, q=4, d=6), 3)
    0.33
    """
    T = float(T)
    q = float(q)
    d = float(d)

    sideways = 0.0 if q in (1, T) else (T - q)**2 / (q**2 * (T - 2))  # q = T = 2 has no such term
    off_line = d * (q - 1) / (T * max(T - 1, 1)) * (1 + sideways)  # (O5)

    corner = (q - 1) * (q + d)
    cross = ((1 + corner) / 2 + math.hypot((1 - corner) / 2, q - 1)) / T  # (A11)
    return 2 / max(1 / q, off_line, cross * full)


@checked(q="size", d="size", eta="number > 0", B="size")
def online_excess(q, d, eta, B):
    """By how much the loss of online descent exceeds (C3), late and relative to it (A12).

    eta (q + d)/(2B) to first order in 1/B and eta, for the full model with one-hot encodings, fresh
    batches of B and Gaussian tokens: late the trace of the covariance of one sample's gradient is
    2 L (q + d). For eta up to a fifth of `largest_stable_eta` and eta (d + 4)(d + 6)/(4B) small;
    the next order adds to it. Not for stochastic encodings.

    Parameters: q, d, B : integers; eta : number > 0
    Returns: L_online/L - 1, a float; the batch for an excess of x is eta (q + d)/(2x)
    Raises: ValueError : bad sizes, eta <= 0
        OverflowError : a result beyond float64
    References: derived here.
    >>> online_excess(q=2, d=4, eta=0.5, B=150)
    0.01
    """
    return eta * (q + d) / (2 * B)


# ---- stochastic encodings: closed forms (S), longer sequences (L) ------------------------------

@checked(q="size", d_e="size", query=QUERIES)
def overlap_variance(q, d_e, query="dual"):
    """sigma^2 = E||e_y||^2/d_e, the variance of an overlap off y (S5).

    q/(d_e - q + 1) for the dual query, q/d_e for the sum.

    Parameters: q, d_e : integers, q <= d_e for the dual query; query : "dual" or "sum"
    Returns: a float; exact for the sum query and at q = 1. For the dual query a lower bound
        wherever the encodings of y are independent (to a probability of about q^2 2^-d_e), and
        close from d_e = 64 on
    Raises: ValueError : bad sizes, q > d_e (dual), unknown query
    References: derived here.
    >>> overlap_variance(q=3, d_e=8), overlap_variance(q=3, d_e=8, query="sum")
    (0.5, 0.375)
    """
    require(query == "sum" or q <= d_e, "q", f"at most d_e = {d_e} for the dual query", q)
    return q / (d_e - q + 1) if query == "dual" else q / d_e


@checked(c="number", overlaps="B T", q="size < T", d="size")
def overlap_loss(c, overlaps, q, d):
    """The loss at the best alpha, averaged over given overlaps, without cancellation (S4).

    L* = L_0 {q E[sum_off a^2 + sum_on (a - mean_on a)^2] + Var(sum_off a)} / (q E||a||^2),
    a = softmax(c u), "on" and "off" meaning y; u = 1 on y leaves no second term.

    Parameters: c : number; overlaps : (B, T), the q selected positions first
        q, d : integers, q < T
    Returns: the loss, a float
    Raises: ValueError : bad sizes, q >= T, entries not finite
        OverflowError : a result beyond float64
    References: derived here.
    >>> overlap_loss(0.0, [[1.0, 0.0, 0.0, 0.0]], q=1, d=2)
    0.75
    """
    a = softmax(c * overlaps)
    on = a[:, :q]
    off = a[:, q:]

    off_sq = np.einsum("bt,bt->b", off, off).mean()
    mean_sq = np.einsum("bt,bt->b", on, on).mean() + off_sq  # E||a||^2
    uneven = q * on.var(axis=1).mean()
    missed = off.sum(axis=1).var()
    return float(d / 2 * (q * (off_sq + uneven) + missed) / (q**2 * mean_sq))


def moments(c, T, q, sigma2):
    """m, M, v, h of (S5): means, variance, covariance of the sums of e^{c(u-1)} and its square.

    The sums are over the T - q positions off y.
    """
    others = T - q
    k = c * sigma2  # at most .3, so that no exponent is above 0
    in_range = np.all(k <= 0.3 * (1 + 1e-12))
    wanted = f"at most .3/sigma2 for (S5) and (L1), sigma2 = {sigma2:g}"
    require(in_range, "c", wanted, float(np.max(c)))

    mu_1 = np.exp(c * (k / 2 - 1))
    mu_2 = np.exp(c * (2 * k - 2))
    mu_1_sq = np.exp(c * (k - 2))
    mu_3 = np.exp(c * (4.5 * k - 3))
    mu_2_mu_1 = np.exp(c * (2.5 * k - 3))

    m = others * mu_1
    M = others * mu_2
    v = others * (mu_2 - mu_1_sq)
    h = others * (mu_3 - mu_2_mu_1)
    return m, M, v, h


def best_alpha(c, T, q, sigma2):
    """alpha* at W = c I, to leading order: (q+m)/(q+M), with m and M of (S5) (S6)."""
    m, M, _, _ = moments(c, T, q, sigma2)
    return (q + m) / (q + M)


@checked(c="numbers >= 0", T="size", q="size < T", d="size", sigma2="number >= 0")
def stochastic_loss(c, T, q, d, sigma2):
    """The loss at W = c I and the best alpha for overlaps N(0, sigma2) off y, in closed form (S5).

    L*/L_0 = M/(q+M) + q/(q+M) [v/(q+m)^2 - 2h/((q+m)(q+M))], where m = (T-q) mu_1,
    M = (T-q) mu_2, v = (T-q)(mu_2 - mu_1^2), h = (T-q)(mu_3 - mu_2 mu_1) and
    mu_k = e^{-kc + k^2 c^2 sigma2/2}. The first term is (C1) with z = e^{2c - 2c^2 sigma2}. For
    random signs it is too large by a fraction of about (4/3) c (c sigma2)^3/q^2, the next cumulant.

    Parameters: c : number or array, 0 <= c <= .3/sigma2
        T, q, d : integers, q < T; sigma2 : `overlap_variance`
    Returns: the loss, in the shape of c
    Raises: ValueError : c or sigma2 out of range, bad sizes, q >= T
    References: derived here.
    >>> float(stochastic_loss(0.0, T=4, q=1, d=2, sigma2=0.1))
    0.75
    """
    m, M, v, h = moments(c, T, q, sigma2)
    L_0 = d / (2 * q)
    second_order = v / (q + m)**2 - 2 * h / ((q + m) * (q + M))
    return L_0 * (M + q * second_order) / (q + M)


def sharpness_grid(sigma2):
    """The c at which (S6) and (N2) are solved: up to c sigma2 = .3, where (S5) ends."""
    last = min(0.3 / sigma2, 40.0)
    return np.linspace(0.0, last, 8001)


def c_after(t, start, grid, stiffness, loss, eta):
    """c after t steps of stiffness(c) dc/dt = -eta dloss/dc, c = 0 at t = start, by trapezoids."""
    slope = np.gradient(loss, grid, edge_order=2)
    slope = np.minimum(slope, -1e-300)  # rounding may hide that it falls
    steps_per_c = stiffness / (-eta * slope)
    passed = (steps_per_c[1:] + steps_per_c[:-1]) / 2 * np.diff(grid)
    time = start + np.append(0.0, np.cumsum(passed))

    wanted = f"at most {time[-1]:.3g}, where the range of (S5) ends"
    require(np.all(t <= time[-1]), "t", wanted, float(np.max(t)))
    return np.interp(t, time, grid)


@checked(t="numbers >= 0", T="size", q="size < T", d="size", d_e="size", eta="number > 0")
def stochastic_trajectory(t, T, q, d, d_e, eta):
    """c, alpha and the loss after t steps of population descent, dual query, by quadrature of (S6).

    (d_e + d alpha*'(c)^2) dc/dt = -eta dL*/dc from c = 0 at t = T/eta; before that c = 0. L*(c) is
    `stochastic_loss`, alpha*(c) = (q+m)/(q+M) with m and M as there. Within 5 % for d T <= q d_e
    and d_e >= 4q.

    Parameters: t : number or array, >= 0, in steps; T, q, d, d_e : integers, q < T, q <= d_e
        eta : number > 0
    Returns: c, alpha, loss, each in the shape of t
    Raises: ValueError : t so late that c sigma^2 > .3, bad sizes
        OverflowError : a result beyond float64
    References: derived here.
    >>> c, alpha, loss = stochastic_trajectory(1000, T=32, q=3, d=4, d_e=128, eta=2.0)
    >>> round(float(loss / (4 / 6)), 4)
    0.0617
    """
    sigma2 = overlap_variance(q, d_e)
    grid = sharpness_grid(sigma2)
    loss = stochastic_loss(grid, T, q, d, sigma2)
    alpha_slope = np.gradient(best_alpha(grid, T, q, sigma2), grid, edge_order=2)
    stiffness = d_e + d * alpha_slope**2

    c = c_after(t, T / eta, grid, stiffness, loss, eta)
    return c, best_alpha(c, T, q, sigma2), stochastic_loss(c, T, q, d, sigma2)


@checked(t="numbers > 0", T="size", q="size < T", d="size", eta="number > 0")
def best_dimension(t, T, q, d, eta):
    """The d_e that gives stochastic encodings, dual query, the least loss after t steps (S7).

    d_e = 4 q Lambda and L = 2 q Lambda/(eta t), where Lambda e^Lambda = L_1 eta t/(2 e q) and
    L_1 = d (T-q)(q+1)/(2 q^3). So no dimension beats (2q/eta) ln t/t to leading order. Late only:
    at t = 10^6, T <= 512, within 12 % of the least of (S6) over d_e and 6 % of its place; its
    corrections are of order 1/ln t, and the place is low where q is near T.

    Parameters: t : number or array, > 0, in steps; T, q, d : integers, q < T; eta : number > 0
    Returns: d_e, a float, and the loss, each in the shape of t
    Raises: ValueError : t so early that the loss is above .01 L_0, or d_e below 4q; bad sizes,
        q >= T, eta <= 0
    References: derived here.
    >>> d_e, loss = best_dimension(1e6, T=64, q=2, d=4, eta=1.0)
    >>> round(float(d_e)), round(float(loss) * 1e5, 2)
    (102, 5.09)
    """
    L_0 = d / (2 * q)
    L_1 = d * (T - q) * (q + 1) / (2 * q**3)
    log_growth = math.log(L_1 / (2 * math.e * q)) + math.log(eta) + np.log(t)

    Lambda = np.maximum(log_growth, 1.0)
    for _ in range(6):  # Newton's method for Lambda + ln Lambda = log_growth
        Lambda = Lambda * (1 + log_growth - np.log(Lambda)) / (1 + Lambda)

    d_e = 4 * q * Lambda
    loss = 2 * q * Lambda / (eta * t)

    late = np.all((loss <= 0.01 * L_0) & (log_growth >= 1))  # Lambda >= 1
    wanted = f"so late that (S7) gives a loss of at most .01 L_0 = {0.01 * L_0:g} and d_e >= 4q"
    require(late, "t", wanted, float(np.min(t)))
    return d_e, loss


@checked(alpha="numbers", c="numbers >= 0", T="size", q="size < T", d="size", sigma2="number >= 0")
def length_loss(alpha, c, T, q, d, sigma2):
    """The loss at V = alpha I, W = c I on sequences of length T, whatever the training length (L1).

    L = (d/2) (alpha^2 N - 2 alpha p/q + 1/q), N = p^2/q + p^4 v/q^3 + (p/q)^2 M, p = q/(q+m) the
    attention on y, and m, M, v as in `stochastic_loss`.

    Parameters: alpha, c : numbers or arrays, 0 <= c <= .3/sigma2
        T, q, d : integers, q < T; sigma2 : `overlap_variance`
    Returns: the loss, in the broadcast shape
    Raises: ValueError : c or sigma2 out of range, bad sizes
        OverflowError : a result beyond float64
    References: derived here.
    >>> round(float(length_loss(1.03, 6.0, T=2048, q=3, d=4, sigma2=3 / 126)) * 6 / 4, 2)
    0.51
    """
    m, M, v, _ = moments(c, T, q, sigma2)
    p = q / (q + m)
    rest = m / (q + m)
    spread = p**4 * v / q**3 + (p / q)**2 * M
    missed = (1 - alpha) + alpha * rest  # 1 - alpha p
    return d / 2 * (missed**2 / q + alpha**2 * spread)


@checked(c="numbers >= 0", T="size", q="size < T", eps="number in (0, 1)", sigma2="number >= 0")
def longest_sequence(c, T, q, eps, sigma2):
    """The length up to which a model trained at length T keeps L <= eps L_0 (L2).

    (q sqrt(eps) e^{c - c^2 sigma2/2} + T)/(1 - sqrt(eps)) at W = c I and the alpha of the end of
    training. It grows like the square root of the training time. Within 5 % where it is at least 8T
    and the loss at T at most .004 L_0.

    Parameters: c : number or array, 0 <= c <= .3/sigma2; T, q : integers, q < T
        eps : number in (0, 1); sigma2 : `overlap_variance`
    Returns: the length, a float, in the shape of c
    Raises: ValueError : c out of range, or so small that (T-q) e^{-c + c^2 sigma2/2}/q > .15;
        bad sizes, eps outside (0, 1)
        OverflowError : a result beyond float64
    References: derived here.
    >>> round(float(longest_sequence(6.0, T=32, q=3, eps=0.1, sigma2=3 / 126)))
    411
    """
    m, _, _, _ = moments(c, T, q, sigma2)
    wanted = "so large that (T-q) e^{-c + c^2 sigma2/2}/q is at most .15"
    require(np.all(m <= 0.15 * q), "c", wanted, float(np.min(c)))

    root = math.sqrt(eps)
    reach = np.exp(c * (1 - c * sigma2 / 2))
    return (q * root * reach + T) / (1 - root)


@checked(T="size", q="size < T", d="size", d_e="size", query=QUERIES)
def stochastic_floor(T, q, d, d_e, query="dual"):
    """The least loss over c that encodings of dimension d_e allow: (S10) for q <= 2, (S8), (S9).

    q <= 2, exact: L_0 E[k/(q+k)], k the positions off y that tie with y (S10). q >= 3, estimates:
    dual, L_0 ((T-q)/q) e^{-d_e/(2q)}, at most L_0, off by a factor of 2 or so (S8); sum,
    L_0 min_c M/(q+M) with M = c^2 (q-1)(q-2)/d_e + (T-q) e^{-2c + 2c^2 tau^2},
    tau^2 = (q + 2(q-1)/q)/d_e (S9).

    Parameters: T, q, d, d_e : integers, q < T; query : "dual" or "sum"
    Returns: the loss, a float
    Raises: ValueError : bad sizes, q >= T, unknown query
    References: derived here.
    >>> round(stochastic_floor(T=32, q=3, d=4, d_e=128, query="sum") * 6 / 4, 2)
    0.08
    """
    L_0 = d / (2 * q)
    others = float(T - q)
    if q <= 2:
        return float(L_0 * tie_floor(T, q, d_e))
    if query == "dual":
        return L_0 * min(1.0, others / q * math.exp(-d_e / (2 * q)))  # (S8)

    tau2 = (q + 2 * (q - 1) / q) / d_e
    last = min(math.log(T * d_e), 1 / (2 * tau2))  # the minimum lies before
    c = np.linspace(0.0, last, 10**4)
    off_y = others * np.exp(-2 * c + 2 * c**2 * tau2)
    M = c**2 * (q - 1) * (q - 2) / d_e + off_y  # (S9)
    floor = (M / (q + M)).min()
    return float(L_0 * floor)


def tie_floor(T, q, d_e):
    """E[k/(q+k)], k ~ Bin(T - q, 2^-a), a the coordinates on which the encodings of y agree (S10).

    a = d_e at q = 1, and a ~ Bin(d_e, 1/2) at q = 2. It is int_0^1 q x^{q-1} (1 - E[x^k]) dx, by
    Gauss-Legendre in h = sqrt(1 - x).
    """
    nodes, weights = np.polynomial.legendre.leggauss(100)
    h = (1 + nodes[:, None]) / 2
    measure = weights[:, None] * h * q * (1 - h**2)**(q - 1)

    if q == 1:
        chance = 1.0
        tie = 2.0**-d_e
    else:
        agree = np.arange(min(d_e, 1100) + 1.0)  # 2^-1100 is 0: no tie beyond
        ratios = (d_e - agree[:-1]) / (agree[:-1] + 1)
        log_ways = np.append(0.0, np.cumsum(np.log(ratios)))  # log of d_e over agree
        chance = np.exp(log_ways - d_e * math.log(2))
        tie = 2.0**-agree

    tied = -np.expm1(float(T - q) * np.log1p(-tie * h**2))  # 1 - E[x^k] given agree
    return (measure * chance * tied).sum()


@checked(T="size", q="size < T", eps="number in (0, 1)")
def required_dimension(T, q, eps):
    """The d_e for L/L_0 <= eps, dual query: exact for q <= 2 (S10), else 2 q log(T/(q eps)) (S8).

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

    def reached(d_e):
        return stochastic_floor(T, q, 2 * q, d_e) <= eps

    return 1 + bisect.bisect_left(range(1, 2 * enough + 8), True, key=reached)


# ---- fixed encodings (G) -----------------------------------------------------------------------

@checked(E="d_e T", q="size < T", query=QUERIES)
def widest_margin(E, q, query="dual"):
    """W*, the W of least norm with equal scores on y and scores at least 1 lower off y (G2).

    Minimise ||W||_F subject to, for every q-subset y with s = E^T W e_y: s_i = s_k for i, k in y,
    and mean_y s - s_j >= 1 for j off y. Descent on a fixed set ends in its direction.

    When it exists (G3):

    - q = 1, encodings of one length: W* exists if no two are equal;
    - independent encodings: it exists for q <= 2, and with the sum query for every q;
    - dual query, 3 <= q <= T - 2, general position: only if every overlap off y is below 1.

    Parameters: E : (d_e, T), one fixed set, with C(T, q) T min(d_e, T)^2 <= 2^26
        q : integer, q < T; query : "dual" or "sum"
    Returns: (d_e, d_e), right to 2e-6 of its norm, and its norm to 1e-12
    Raises: ValueError : E too large; no W does it; W* not reached, then with bounds on its norm.
        That no W does it is proved by an l >= 0: with G the margins, every W has
        ||W|| >= 1^T l/||G^T l||, and l is a proof where ||G^T l||, with all rounding, is at most
        1e-12 of 1^T l. So a W* of norm past 1e12 is missed, for encodings and queries with
        largest entry 1. Past about 1e9 at q = 1, and 1e6 at q > 1, it is not reached.
    References: derived here; `least_norm` names those of the solution.
    >>> round(float((widest_margin(np.eye(5), q=2)**2).sum()), 6)  # orthonormal: T - 1, as in (C4)
    4.0
    """
    d_e, T = E.shape
    small = math.comb(T, q) * T * min(d_e, T)**2 <= 2**26
    require(small, "E, q", "so small that C(T, q) T min(d_e, T)^2 <= 2^26", (E.shape, q))

    selected = all_subsets(T, q)
    U, size, _ = np.linalg.svd(E, full_matrices=False)
    U = U[:, size >= 1e-15 * size[0]]                # W = U A U^T: it stays in the span of E
    e = U.T @ E
    e_query = QUERIES[query](E, selected) @ U
    a = abs(e).max() or 1.0
    b = abs(e_query).max() or 1.0

    ahead = (selected @ e.T / q)[:, :, None] - e     # mean_y e - e_j
    rows = np.einsum("bet,bf->btef", ahead / a, e_query / b)
    rows = rows.reshape(selected.size, -1)           # <rows, a b A> = mean_y s - s_j
    x, lower, upper, none_below = least_norm(rows, selected.ravel() == 0)

    wanted = f"a set that some W separates, every y from the rest, at q = {q}, of norm below"
    require(none_below < 1e12, "E", f"{wanted} {none_below / (a * b):.0e}", E)
    wanted = "a set whose W* is reached, not only bounds on its norm,"
    require(x is not None, "E", f"{wanted} {lower / (a * b):.9g}, {upper / (a * b):.9g}", E)
    return U @ x.reshape(len(e), len(e)) @ U.T / (a * b)


def least_norm(G, apart):
    """The x of least norm with <g, x> >= 1 for the rows g apart, and <g, x> = 0 for all others.

    The dual, to maximise the sum of l over rows apart less ||G^T l||^2/2 with l >= 0 there, is
    solved by proximal steps, then x = G^T l. Each l bounds the norm from below, each x from above:
    they must meet to 1e-12. Where there is no x, the l grow for ever, and their differences tend
    to a proof of it, an l with G^T l = 0.

    Returns: x, or None; the bounds; a norm that no x is below, G known to 1e-14
    References: C. L. Lawson, R. J. Hanson, Solving Least Squares Problems, 1974, ch. 23 (the dual);
    R. T. Rockafellar, Math. Oper. Res. 1, 1976 (proximal steps); G. Banjac, P. Goulart,
    B. Stellato, S. Boyd, J. Optim. Theory Appl. 183, 2019 (such proofs, in a method akin to this)
    """
    size = np.maximum(np.linalg.norm(G, axis=1), 1e-10)
    G = G / size[:, None]
    h = apart / size
    l = np.zeros(len(h))
    best = None
    lower = 0.0
    upper = np.inf
    for rho in 10.0**np.arange(2, 14):
        old = l
        l = proximal_step(G, h, old, rho)
        x = G.T @ l
        lower = max(lower, h @ l / max(np.linalg.norm(x), 1e-100))

        tight = (l > 0) | ~apart
        x += G[tight].T @ damped_solve(G[tight], (h - G @ x)[tight], rho)
        w = G @ x
        length = np.linalg.norm(x)
        margin = (w[apart] / h[apart]).min()
        even = abs(w[~apart]).max() <= 1e-14 * length        # but for rounding
        if even and margin > 0 and length / margin < upper:
            upper = length / margin
            best = x / margin

        proof = np.where(apart, np.maximum(l - old, 0), l - old)
        residual = np.linalg.norm(G.T @ proof) + 1e-14 * abs(proof / size).sum()
        none_below = h @ proof / max(residual, 1e-100)
        if upper <= lower * (1 + 1e-12):
            return best, lower, upper, none_below
        if none_below >= 1e12:
            break
    return None, lower, upper, none_below


def proximal_step(G, h, old, rho):
    """The l of largest h^T l - ||G^T l||^2/2 - ||l - old||^2/(2 rho), with l >= 0 where h > 0.

    By Newton's method on l = rho excess(l), each step as long as the merit falls.
    """
    def excess(l):
        missing = h + old / rho - G @ (G.T @ l)
        return np.where(h > 0, np.maximum(missing, 0), missing)

    def merit(l):
        return ((G.T @ l)**2).sum() / 2 + rho / 2 * (excess(l)**2).sum()

    l = old
    for _ in range(60):
        on = (h == 0) | (excess(l) > 0)
        target = np.where(on, l, 0.0)
        missing = h + (old - target) / rho - G @ (G.T @ target)
        target[on] += damped_solve(G[on], missing[on], rho)

        step = target - l
        length = 1.0
        while merit(l + length * step) > merit(l) and length > 1e-6:
            length /= 2
        l = l + length * step
        if length == 1 and np.array_equal(on, (h == 0) | (excess(l) > 0)):
            break
    return np.where(h > 0, np.maximum(l, 0), l)


def damped_solve(G, r, rho):
    """(G G^T + I/rho)^-1 r, for many rows by the smaller G^T G, less exact."""
    m, n = G.shape
    if m <= max(n, 2000):
        return np.linalg.solve(G @ G.T + np.eye(m) / rho, r)
    return rho * (r - G @ np.linalg.solve(G.T @ G + np.eye(n) / rho, G.T @ r))


@checked(t="numbers > 0", W_star="d_e d_e", eta="number > 0")
def fixed_set_loss_at(t, W_star, eta):
    """The late loss of descent on a fixed set, ||W*||^2/(4 eta t), for every d: (G2).

    Asymptotic, as is the direction W/||W|| -> W*/||W*||: derived, checked, not proved.

    Parameters: t : number or array > 0, in steps; W_star : (d_e, d_e), `widest_margin`
        eta : number > 0
    Returns: the loss, in the shape of t
    Raises: ValueError : t or eta not > 0
        OverflowError : a result beyond float64
    References: derived here.
    >>> round(float(fixed_set_loss_at(1000, widest_margin(np.eye(5), q=2), eta=0.5)), 9)
    0.002
    """
    return (W_star**2).sum() / (4 * eta * t)


# ---- finite samples (N) ------------------------------------------------------------------------

def regression_losses(c, n, T, q, d, sigma2):
    """Training loss, test loss and E||dV/dc||^2 on a grid of c, at W = c I, the best V, n > d + 1.

    The letters are those of `finite_sample_loss`.
    """
    m, M, v, h = moments(c, T, q, sigma2)
    x = d / (n - d - 1)

    # attention, to second order in the sums of (S5)
    total = q + m
    p = q / total + q * v / total**3
    N = (q + M) / total**2 - 2 * h / total**3 + 3 * (q + M) * v / total**4  # E||a||^2

    # geometry: length of E[a], and its angle with s_y
    zeta = np.sqrt(p**2 / q + (1 - p)**2 / (T - q))
    theta = np.arctan2((1 - p) / np.sqrt(T - q), p / np.sqrt(q))
    length = np.sqrt(q) * zeta
    beta = np.cos(theta) / length
    b = np.sin(theta) / length

    # losses
    random = (N - zeta**2) * beta**2
    noise = np.sin(theta)**2 / q
    train = d / 2 * (random + noise * (1 - d / n))
    test = d / 2 * (random + noise * (1 + x))

    # how far V moves with c
    alpha = p / (q * N)
    alpha_c, b_c, theta_c = np.gradient([alpha, b, theta], c, axis=1, edge_order=2)
    turn = 2 * x * (1 + x) * (b * theta_c)**2
    moved = d * (alpha_c**2 + x * b_c**2 + turn)
    return train, test, moved


@checked(t="numbers >= 0", n="size", T="size", q="size < T", d="size", d_e="size", eta="number > 0")
def finite_sample_loss(t, n, T, q, d, d_e, eta):
    """Training and test loss after t steps on n fixed sequences, encodings drawn afresh (N2).

    V is a regression of the target on X E[a]. With zeta = ||E[a]|| and theta the angle between E[a]
    and s_y its slope is beta = cos(theta)/(sqrt(q) zeta), its noise has variance sin(theta)^2/q:
    1 - d/n of it is left on the sequences, 1 + x on others, x = d/(n-d-1). Random attention adds
    (E||a||^2 - zeta^2) beta^2. c descends the training loss,
    (d_e + E||dV/dc||^2) dc/dt = -eta dL_train/dc from c = 0 at t = T/eta, and V follows,
    E||dV/dc||^2 = d [alpha'^2 + x b'^2 + 2 x (1 + x) (b theta')^2], b = sin(theta)/(sqrt(q) zeta),
    alpha = p/(q E||a||^2), p the attention on y. For n < d - 1 the limit t -> infinity: V fits
    every sequence, at c = 0. An approximation: within 10 % for n >= 3d, late (from about .03 L_0
    on); else rough.

    Parameters: t : number or array, >= 0, in steps
        n, T, q, d, d_e : integers, q < T, q <= d_e, n < d - 1 or n > d + 1; eta : number > 0
    Returns: training loss, test loss (L, not L/L_0), each in the shape of t
    Raises: ValueError : n from d - 1 to d + 1; t so late that c sigma^2 > .3; bad sizes
    References: derived here.
    >>> train, test = finite_sample_loss(1200, n=48, T=16, q=2, d=16, d_e=64, eta=1.0)
    >>> round(float(train / 4), 4), round(float(test / 4), 4)
    (0.0078, 0.0126)
    """
    require(abs(n - d) > 1, "n", f"below d - 1 = {d - 1} or above d + 1 = {d + 1}", n)
    sigma2 = overlap_variance(q, d_e)
    if n < d:
        L_0 = d / (2 * q)
        test = (1 - q / T) * (d - 1) / (d - n - 1) + q / T * (1 - n / d)  # (N2), memorised
        return np.zeros(np.shape(t)), np.full(np.shape(t), L_0 * test)

    grid = sharpness_grid(sigma2)
    train, test, moved = regression_losses(grid, n, T, q, d, sigma2)
    c = c_after(t, T / eta, grid, d_e + moved, train, eta)  # (N2)
    return np.interp(c, grid, train), np.interp(c, grid, test)


# ---- fully-connected networks (F) --------------------------------------------------------------

@checked(X="B d T", selected="B T of 0/1")
def fcn_inputs(X, selected):
    """The network's input [vec(X); s_y]: x_1 ... x_T, d numbers each, then the 0/1 row of y (F1).

    Parameters: X : (B, d, T); selected : (B, T) of 0 and 1, q ones a row
    Returns: (B, T d + T)
    Raises: ValueError : shapes that do not fit, rows without q ones, entries not finite
    >>> fcn_inputs([[[1.0, 2.0], [3.0, 4.0]]], [[0, 1]]).tolist()
    [[1.0, 3.0, 2.0, 4.0, 0.0, 1.0]]
    """
    tokens = X.transpose(0, 2, 1).reshape(len(X), -1)
    return np.concatenate([tokens, selected], axis=1)


@checked(W1="m n", b1="m", A="d m", b2="d", inputs="B n", returns="B m")
def fcn(W1, b1, A, b2, inputs):
    """The two-layer network f = A relu(W1 x + b1) + b2 (F1).

    Parameters: W1 : (m, n); b1 : (m,); A : (d, m); b2 : (d,); inputs : (B, n)
    Returns: (B, d)
    Raises: ValueError : shapes that do not fit, entries not real or not finite
        OverflowError : a result beyond float64
    >>> fcn([[2.0]], [-1.0], [[3.0]], [0.5], [[1.0], [0.0]]).tolist()
    [[3.5], [0.5]]
    """
    pre = inputs @ W1.T + b1
    hidden = (pre > 0) * pre
    return hidden @ A.T + b2


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
    W1 = rng.standard_normal((m, n)) * math.sqrt(2 / n)
    A = rng.standard_normal((d, m)) / math.sqrt(m)
    return W1, np.zeros(m), A, np.zeros(d)


@checked(m="counts", T="size", q="size <= T", d="size", fisher="number >= 1")
def fcn_loss_floor(m, T, q, d, fisher=1.0):
    """The least loss of any network whose first layer has m neurons, of any depth (F4), (F6).

    L/L_0 >= 1 - q m/(Td) for m <= d, (1 - m/(Td)) (T-q)/(T-1) for d <= m <= Td, 0 beyond; all this
    divided by the Fisher information of the tokens' entries where they are not Gaussian: then a
    bound, not sharp. For Gaussian tokens `best_fcn` approaches it.

    Parameters: m : integer >= 0 or array of them; T, q, d : integers, q <= T
        fisher : E[(p'/p)^2], p the density of an entry at variance 1: Gaussian 1, logistic pi^2/9,
            Gumbel pi^2/6, Laplace 2
    Returns: the loss (L, not L/L_0), in the shape of m
    Raises: ValueError : m not integers >= 0, bad sizes, q > T, fisher below 1
    References: The order Td is the paper's; the number is derived here.
    >>> (fcn_loss_floor([0, 4, 16, 32], T=8, q=2, d=4) / (4 / 4)).round(3).tolist()
    [1.0, 0.75, 0.429, 0.0]
    """
    m = np.asarray(m, float)  # int64 products would overflow
    T = float(T)
    q = float(q)
    d = float(d)

    only_means = 1 - q * m / (T * d)
    beyond_means = 0.0
    if T > 1:
        beyond_means = (T - q) / (T - 1) * np.maximum(1 - m / (T * d), 0.0)
    return d / (2 * q) * np.where(m <= d, only_means, beyond_means) / fisher


@checked(W1="m n", T="size", q="size <= T", d="size", fisher="number >= 1")
def fcn_first_layer_floor(W1, T, q, d, fisher=1.0):
    """The least loss of any network with this first layer, of any depth (F3), (F6).

    (1/2) tr(P (M kron I_d)) / fisher, P the projection off the row space of the first Td columns of
    W1 and M = E s_y s_y^T/q^2 = ((T-q) I + (q-1) 11^T) / (q T (T-1)).

    Parameters: W1 : (m, n), n >= Td, of any rank; T, q, d : integers, q <= T, T d <= 10^4
        fisher : as in `fcn_loss_floor`
    Returns: the loss (L, not L/L_0), a float
    Raises: ValueError : W1 with fewer than Td columns, T d > 10^4, bad sizes, fisher below 1
    References: derived here.
    >>> round(fcn_first_layer_floor(np.eye(4, 32), T=8, q=2, d=4), 4)
    0.875
    """
    require(W1.shape[1] >= T * d, "W1", f"of at least T d = {T * d} columns", W1.shape)
    require(T * d <= 10**4, "T, d", "sizes with T d at most 10^4", (T, d))
    rows = W1[:, :T * d]
    largest = abs(rows).max(axis=1, keepdims=True)  # a small row counts as much as a large one
    rows = rows / np.where(largest > 0, largest, 1.0)

    triangle = np.linalg.qr(rows, mode="r")  # the same space in at most Td rows
    _, singular, directions = np.linalg.svd(triangle)
    rounding = max(W1.shape) * np.finfo(float).eps
    rank = int((singular > rounding * singular[0]).sum())
    unseen = directions[rank:].reshape(-1, T, d)  # an orthonormal basis of what W1 does not see

    apart = 0.0
    together = 1.0
    if T > 1:
        apart = (T - q) / (T - 1)
        together = (q - 1) / (T - 1)
    total = apart * (unseen**2).sum() + together * (unseen.sum(axis=1)**2).sum()
    return float(total / (2 * q * T * fisher))


@checked(m="size", T="size", q="size <= T", d="size", K="number > 0", returns="m T d")
def best_fcn(m, T, q, d, K=12.0):
    """The two-layer network of width m whose loss tends to the floor (F4) as K grows (F5).

    j = max(m - d, 0) entries (i, k) of X are read one by one: I_k has the positions i of those in
    coordinate k, and mu_k is the mean of x_ik over the other positions. With
    h_k = relu(mu_k + 2K - (K/q) sum_{i in I_k} s_i), always on for |mu_k| < K, and
    h_ik = relu(x_ik - mu_k + K - 2K (1 - s_i)), on where i is in y,
    f_k = h_k + (1/q) sum_{i in I_k} h_ik - 2K = mu_k + (1/q) sum_{i in I_k} s_i (x_ik - mu_k),
    the mean of the target given all that the first layer sees. For m < d only the first m of the
    f_k. For Gaussian tokens the loss is above (F4) by at most
    (d/2)(2 + T/q)^2 E relu(sqrt(2) g - K)^2, g standard normal; at m = Td it is 0 to rounding of
    numbers like K.

    Parameters: m, T, q, d : integers, q <= T, m <= T d; K : number > 0
    Returns: W1 (m, T d + T), b1 (m,), A (d, m), b2 (d,)
    Raises: ValueError : m > T d, bad sizes, q > T, K not a number > 0
        OverflowError : K beyond float64/2
    References: derived here.
    >>> fcn(*best_fcn(m=2, T=2, q=1, d=1), fcn_inputs([[[0.5, 7.0]]], [[1, 0]])).tolist()
    [[0.5]]
    """
    require(m <= T * d, "m", f"at most T d = {T * d}", m)
    means = min(m, d)
    entries = m - means
    n = T * d
    W1 = np.zeros((m, n + T))
    on_X = W1[:, :n].reshape(m, T, d)  # views of W1
    on_y = W1[:, n:]
    b1 = np.zeros(m)
    A = np.zeros((d, m))
    b2 = np.zeros(d)

    for k in range(means):
        size = len(range(k, entries, d))  # |I_k|: entries in the order of the input
        on_X[k, size:, k] = 1 / (T - size)
        on_y[k, :size] = -K / q
        b1[k] = 2 * K
        A[k, k] = 1.0
        b2[k] = -2 * K

    for entry in range(entries):
        i, k = divmod(entry, d)
        row = means + entry
        on_X[row] = -on_X[k]
        on_X[row, i, k] = 1.0
        on_y[row, i] = 2 * K
        b1[row] = -K
        A[k, row] = 1 / q
    return W1, b1, A, b2
