"""Sparse token selection: the task, the encodings, the transformer, its descent, and the closed forms.

The order is that of the paper and of README.md: task, encodings, model, descent, one-hot laws (C),
stochastic laws (S, L), fully-connected networks (F). Gradients live in analytic_grads.py.
Losses are in the units of L, with L_0 = d/(2q) for the predictor that is always zero.
"""
import itertools
import math

import numpy as np

from analytic_grads import (_arrays, _broadcast, _check_results, _finite, _numbers, _one_hot, _quiet,
                            _reals, _selection, _sizes, _softmax)

# ---- the task -------------------------------------------------------------------------------------

STUDENT_DF = 10  # (A9) needs a third moment; the standard errors of sampled gradients the sixth

TOKENS = {  # each with mean 0 and variance 1
    "gaussian": lambda rng, size: rng.standard_normal(size),
    "rademacher": lambda rng, size: 2.0 * rng.integers(0, 2, size) - 1.0,
    "laplace": lambda rng, size: rng.laplace(scale=math.sqrt(0.5), size=size),
    "student_t": lambda rng, size: rng.standard_t(STUDENT_DF, size) * math.sqrt(1 - 2 / STUDENT_DF),
    "gumbel": lambda rng, size: (rng.gumbel(size=size) - np.euler_gamma) * math.sqrt(6) / math.pi,
}


def _generator(rng):
    if not isinstance(rng, np.random.Generator):
        raise ValueError(f"rng must be a numpy.random.Generator; got {type(rng).__name__}")


def _choice(name, value, known):
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def sample_batch(rng, B, T, q, d, tokens="gaussian"):
    """B samples of the task: tokens x_i iid with mean 0 and covariance I, y uniform over q-subsets.

    Parameters: rng : numpy.random.Generator; B, T, q, d : integers, q <= T
        tokens : law of the entries: "gaussian" (the paper's), "rademacher", "laplace", "student_t", "gumbel"
    Returns: X (B, d, T), selected (B, T) of 0 and 1, q ones a row
    Raises: ValueError : rng no Generator, sizes not integers >= 1, q > T, unknown tokens
    >>> X, selected = sample_batch(np.random.default_rng(0), B=2, T=5, q=3, d=4)
    >>> X.shape, selected.sum(axis=1).tolist()
    ((2, 4, 5), [3.0, 3.0])
    """
    _generator(rng)
    B, T, q, d = _sizes(B=B, T=T, q=q, d=d)
    _choice("tokens", tokens, TOKENS)
    X = TOKENS[tokens](rng, (B, d, T))
    selected = np.zeros((B, T))
    lowest = np.argpartition(rng.random((B, T)), q - 1, axis=1)[:, :q]  # a uniform q-subset of each row
    np.put_along_axis(selected, lowest, 1.0, axis=1)
    return X, selected


@_quiet
def sts(X, selected):
    """The target STS_q(X, y) = (1/q) sum_{i in y} x_i (the paper).

    Parameters: X : (B, d, T); selected : (B, T) of 0 and 1, q ones a row
    Returns: (B, d)
    Raises: ValueError : shapes that do not fit, rows without q ones, entries not finite; OverflowError : beyond float64
    >>> sts([[[1.0, 2.0, 9.0]]], [[1, 1, 0]]).tolist()
    [[1.5]]
    """
    X, selected = _arrays("X:BdT selected:BT", X, selected)
    q = _selection(selected)
    target = (X @ selected[:, :, None])[:, :, 0] / q
    _check_results(target, X=X)
    return target


def all_subsets(T, q):
    """Every q-subset of T positions: the whole population over y.

    Parameters: T, q : integers, q <= T
    Returns: (C(T, q), T) rows of 0 and 1, in lexicographic order
    Raises: ValueError : more than 10^5 subsets, sizes not integers >= 1, q > T
    >>> all_subsets(3, 2).tolist()
    [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    """
    T, q = _sizes(T=T, q=q)
    digits = (math.lgamma(T + 1) - math.lgamma(q + 1) - math.lgamma(T - q + 1)) / math.log(10)
    digits = max(digits, math.log10(T) * (q < T))             # there are at least T, whatever lgamma rounds to
    if digits > 5 + 1e-7:
        raise ValueError(f"T, q must have at most 10^5 subsets; got T = {T}, q = {q} with 10^{digits:.2f}")
    subsets = np.zeros((math.comb(T, q), T))
    np.put_along_axis(subsets, np.array(list(itertools.combinations(range(T), q))), 1.0, axis=1)
    return subsets


# ---- positional encodings and the query --------------------------------------------------------------

def one_hot_encoding(T):
    """One-hot encodings e_i, the columns of I_T: d_e = T (the paper).

    Parameters: T : integer
    Returns: (T, T)
    Raises: ValueError : T not an integer >= 1
    >>> one_hot_encoding(2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return np.eye(_sizes(T=T))


def random_sign_encoding(rng, d_e, T, B=None):
    """Stochastic encodings: entries +-1/sqrt(d_e), independent and fair, so ||e_i|| = 1.

    Parameters: rng : numpy.random.Generator; d_e, T : integers; B : None for one set, or the number of sets
    Returns: (d_e, T), or (B, d_e, T)
    Raises: ValueError : rng no Generator, sizes not integers >= 1
    >>> E = random_sign_encoding(np.random.default_rng(0), d_e=4, T=3)
    >>> E.shape, np.unique(abs(E)).tolist()
    ((4, 3), [0.5])
    """
    _generator(rng)
    d_e, T = _sizes(d_e=d_e, T=T)
    shape = (d_e, T) if B is None else (_sizes(B=B), d_e, T)
    count = math.prod(shape)
    eight = (2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) - 1) / math.sqrt(d_e)
    picks = np.frombuffer(rng.bytes(-(-count // 8)), np.uint8)  # each random byte picks eight signs
    return eight.take(picks, axis=0).ravel()[:count].reshape(shape)


def _encodings(E, selected):
    E, selected = _arrays("E:eT|BeT selected:BT", E, selected)
    return E, selected, _selection(selected)


@_quiet
def sum_query(E, selected):
    """The query e_y = sum_{i in y} e_i.

    Parameters: E : (d_e, T) shared, or (B, d_e, T); selected : (B, T) of 0 and 1, q ones a row
    Returns: (B, d_e)
    Raises: ValueError : shapes that do not fit, rows without q ones, entries not finite; OverflowError : beyond float64
    >>> sum_query(np.eye(3), [[1, 0, 1]]).tolist()
    [[1.0, 0.0, 1.0]]
    """
    E, selected, _ = _encodings(E, selected)
    e_query = selected @ E.T if E.ndim == 2 else (E @ selected[:, :, None])[:, :, 0]
    _check_results(e_query, E=E)
    return e_query


@_quiet
def dual_query(E, selected):
    """The query of least norm with <e_i, e_y> = 1 on y, in least squares: e_y = E_y (E_y^T E_y)^+ 1.

    Met exactly where 1 is in the range of E_y^T E_y. A solve of the q x q Gram matrix serves wherever
    that is well conditioned, the pseudo-inverse elsewhere (equal, opposite or more than d_e encodings).

    Parameters: E : (d_e, T) shared, or (B, d_e, T); selected : (B, T) of 0 and 1, q ones a row
    Returns: (B, d_e)
    Raises: ValueError : shapes that do not fit, rows without q ones, chosen encodings not finite
        OverflowError : a result beyond float64
    >>> dual_query([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]], [[1, 1, 0]]).round(12).tolist()
    [[1.0, 0.0]]
    """
    E, selected, q = _encodings(E, selected)
    B = len(selected)
    on_y = np.nonzero(selected)[1].reshape(B, q)
    E_y = E.T[on_y] if E.ndim == 2 else E.transpose(0, 2, 1)[np.arange(B)[:, None], on_y]  # (B, q, d_e)
    _finite(E=E_y)
    gram = E_y @ E_y.transpose(0, 2, 1)
    # det / prod(diagonal) is 1 for orthogonal encodings and 0 for dependent ones (Hadamard).
    safe = np.linalg.det(gram) > 1e-4 * np.einsum("bii->bi", gram).prod(axis=1)
    e_query = np.empty((B, E_y.shape[2]))
    weights = np.linalg.solve(gram[safe], np.ones((safe.sum(), q, 1)))
    e_query[safe] = (weights.transpose(0, 2, 1) @ E_y[safe])[:, 0, :]
    rounding = max(E_y.shape[1:]) * np.finfo(float).eps
    e_query[~safe] = np.linalg.pinv(E_y[~safe], rcond=rounding).sum(axis=2)
    _check_results(e_query, E=E)
    return e_query


QUERIES = {"dual": dual_query, "sum": sum_query}


def overlaps(rng, B, T, q, d_e, query="dual"):
    """Draws of u = E^T e_y for fresh random signs E and y = {1, ..., q}: by symmetry any y will do.

    Parameters: rng : numpy.random.Generator; B, T, q, d_e : integers, q <= T; query : "dual" or "sum"
    Returns: (B, T), the q selected positions first; made in pieces, so that no (B, d_e, T) array is held
    Raises: ValueError : rng no Generator, sizes not integers >= 1, q > T, unknown query
    >>> u = overlaps(np.random.default_rng(0), B=2, T=5, q=1, d_e=16)
    >>> u.shape, u[:, 0].tolist()
    ((2, 5), [1.0, 1.0])
    """
    _generator(rng)
    B, T, q, d_e = _sizes(B=B, T=T, q=q, d_e=d_e)
    _choice("query", query, QUERIES)
    u, step = np.empty((B, T)), max(1, 2**19 // (d_e * T))
    for start in range(0, B, step):
        E = random_sign_encoding(rng, d_e, T, min(step, B - start))
        first = np.broadcast_to(np.arange(T) < q, (len(E), T))
        u[start:start + step] = (QUERIES[query](E, first)[:, None, :] @ E)[:, 0, :]
    return u


# ---- the one-layer transformer ----------------------------------------------------------------------

def full_inputs(X, E, e_query):
    """The full model's tokens z_i = [x_i; e_i] and its query z_q = [0; e_y] (the paper).

    Parameters: X : (B, d, T); E : (d_e, T) shared, or (B, d_e, T); e_query : (B, d_e)
    Returns: Z (B, d + d_e, T), z_query (B, d + d_e)
    Raises: ValueError : shapes that do not fit, entries not real
    >>> Z, z_query = full_inputs([[[1.0, 2.0]]], np.eye(2), [[1.0, 0.0]])
    >>> Z.tolist(), z_query.tolist()
    ([[[1.0, 2.0], [1.0, 0.0], [0.0, 1.0]]], [[0.0, 1.0, 0.0]])
    """
    X, E, e_query = _arrays("X:BdT E:eT|BeT e_query:Be", X, E, e_query)
    B, d, T = X.shape
    Z = np.concatenate([X, np.broadcast_to(E, (B, *E.shape[-2:]))], axis=1)
    return Z, np.concatenate([np.zeros((B, d)), e_query], axis=1)


@_quiet
def transformer(V, W, Z, z_query):
    """The model's output f = V Z softmax(Z^T W z_q), (A1)-(A3) (the paper).

    Parameters: V : (d, D); W : (D, D); Z : (B, D, T); z_query : (B, D)
    Returns: (B, d)
    Raises: ValueError : shapes that do not fit, entries not real or not finite; OverflowError : beyond float64
    >>> transformer([[1.0, 0.0]], np.zeros((2, 2)), [[[1.0, 3.0], [0.0, 0.0]]], [[0.0, 1.0]]).tolist()
    [[2.0]]
    """
    V, W, Z, z_query = _arrays("V:dD W:DD Z:BDT z_query:BD", V, W, Z, z_query)
    scores = ((z_query @ W.T)[:, None, :] @ Z)[:, 0, :]
    _check_results(scores, V=V, W=W, Z=Z, z_query=z_query)
    f = (Z @ _softmax(scores)[:, :, None])[:, :, 0] @ V.T
    _check_results(f, V=V, Z=Z)
    return f


# ---- descent ----------------------------------------------------------------------------------------

def gradient_descent(params, loss_and_grads, learning_rate, steps):
    """The one loop of the project: params <- params - learning_rate * grads.

    Parameters: params : tuple of arrays or numbers, copied before the first step
        loss_and_grads : called as loss_and_grads(*params), returns (loss, *grads); fresh samples are a
            closure over a generator
        learning_rate : number > 0 (eta); steps : integer >= 0
    Returns: a generator of (t, params, loss) for t = 0 ... steps; nothing it has yielded is changed afterwards
    Raises: ValueError : at the call, for bad arguments; at step 0, for gradients that do not fit the parameters
        FloatingPointError : the loss or a parameter is not finite; names the step and the learning rate
    >>> for t, (x,), loss in gradient_descent((1.0,), lambda x: (x * x / 2, x), 0.5, steps=2):
    ...     print(t, x, loss)
    0 1.0 0.5
    1 0.5 0.125
    2 0.25 0.03125
    """
    learning_rate, steps = _numbers(above=0, learning_rate=learning_rate), _sizes(least=0, steps=steps)
    _callable(loss_and_grads)
    if not isinstance(params, tuple) or not params:
        raise ValueError(f"params must be a tuple of at least one array; got {type(params).__name__} {params!r:.60}")
    start = tuple(_reals(**{f"params[{k}]": param}) for k, param in enumerate(params))
    return _descend(start, loss_and_grads, learning_rate, steps)


def _callable(loss_and_grads):
    if not callable(loss_and_grads):
        raise ValueError(f"loss_and_grads must be callable; got {type(loss_and_grads).__name__}")


def _fits(result, params):
    """Refuse what is not (loss, *grads) with a real gradient in the shape of each parameter."""
    wanted = [np.shape(param) for param in params]
    parts = [np.asarray(part if isinstance(part, (np.ndarray, np.number, float, int)) else None)
             for part in result] if isinstance(result, tuple) else []
    if [part.shape for part in parts[1:]] != wanted or any(part.dtype.kind not in "iuf" for part in parts):
        raise ValueError(f"loss_and_grads must return (loss, *grads) with real gradients of shapes {wanted}; "
                         f"got {[f'{part.dtype} {part.shape}' for part in parts] or type(result).__name__}")


def _descend(params, loss_and_grads, learning_rate, steps):
    diverged = f"gradient descent diverged with learning_rate {learning_rate:g}"
    evaluate = _quiet(loss_and_grads)                         # an overflow is the error below, not a warning
    update = _quiet(lambda params, grads: tuple(param - learning_rate * grad for param, grad in zip(params, grads)))
    for t in range(steps + 1):
        try:
            result = evaluate(*params)
        except OverflowError as error:
            raise FloatingPointError(f"{diverged}: at step {t} {error}") from None
        if t == 0:
            _fits(result, params)
        loss, *grads = result
        if not np.isfinite(loss).all():
            raise FloatingPointError(f"{diverged}: the loss is not finite at step {t}")
        yield t, params, loss
        if t < steps:
            params = update(params, grads)
            if not all(np.isfinite(param).all() for param in params):
                raise FloatingPointError(f"{diverged}: a parameter is not finite after step {t + 1}")


def adam(loss_and_grads, steps, beta1=0.9, beta2=0.999):
    """Wrap loss_and_grads so that `gradient_descent` takes Adam's steps: directions in place of gradients.

    m <- beta1 m + (1 - beta1) grad, s <- beta2 s + (1 - beta2) grad^2, both corrected for their start at 0;
    the direction is m/(sqrt(s) + 1e-8), and falls linearly to 0 over the last 30 % of the steps.
    Each call counts as a step: make a new wrapper for each run.

    Parameters: loss_and_grads : as for `gradient_descent`; steps : integer, the length of the run
        beta1, beta2 : decay of the first and second moment, in (0, 1)
    Returns: a function of the parameters that returns (loss, *directions)
    Raises: ValueError : steps not an integer >= 1, a beta outside (0, 1), loss_and_grads not callable; at its first
            call, gradients that do not fit; OverflowError : at a call, the square of a gradient beyond float64
    References: Kingma and Ba, "Adam", ICLR 2015, with its epsilon = 1e-8.
    >>> run = gradient_descent((5.0,), adam(lambda x: (x * x / 2, x), 10), 0.5, 10)
    >>> [round(float(x), 3) for _, (x,), _ in run][:3]
    [5.0, 4.5, 4.002]
    """
    steps = _sizes(steps=steps)
    beta1, beta2 = _numbers(above=0, below=1, beta1=beta1, beta2=beta2)
    _callable(loss_and_grads)
    t, mean, square = 0, itertools.repeat(0.0), itertools.repeat(0.0)  # zeros, one for each parameter

    def directions(*params):
        nonlocal t, mean, square
        result = loss_and_grads(*params)
        if t == 0:
            _fits(result, params)
        loss, *grads = result
        t += 1
        mean = [beta1 * m + (1 - beta1) * grad for m, grad in zip(mean, grads)]
        square = [beta2 * s + (1 - beta2) * grad * grad for s, grad in zip(square, grads)]
        if any(np.isinf(s).any() for s in square):            # it would freeze the parameters without a word
            raise OverflowError("the square of a gradient exceeds float64")
        rate = min(1.0, max(0.0, steps - t + 1) / (0.3 * steps)) / (1 - beta1**t)
        return loss, *(rate * m / (np.sqrt(s / (1 - beta2**t)) + 1e-8) for m, s in zip(mean, square))
    return directions


def one_hot_recursion(T, q, d, eta, steps):
    """The two scalars (O3, O4) from alpha = omega = 0: `gradient_descent` with the sizes checked once.

    Parameters: T, q, d : integers, or arrays of one shape for several runs at once
        eta : number > 0; steps : integer >= 0
    Returns: a generator of (t, (alpha, omega), loss) for t = 0 ... steps
    Raises: ValueError : sizes not integers >= 1, q > T, eta <= 0
        FloatingPointError : the run diverges
    >>> for t, (alpha, omega), loss in one_hot_recursion(T=4, q=4, d=2, eta=2.0, steps=1): pass
    >>> float(alpha), float(omega), float(loss)
    (0.5, 0.0, 0.0625)
    """
    T, q, d = _sizes(many=True, T=T, q=q, d=d)
    zero, eta = np.zeros(_broadcast(T=T, q=q, d=d)), _numbers(above=0, eta=eta)
    return gradient_descent((zero, zero), lambda alpha, omega: _one_hot(alpha, omega, T, q, d), eta, steps)


# ---- one-hot encodings: closed forms (C) -------------------------------------------------------------

@_quiet
def one_hot_loss_at(t, T, q, d, eta):
    """The loss after t steps in closed form: (C1) at the z that solves (C3), alpha at its optimum.

    q^2 (z-1) + 2 q (T-q) ln z + (T-q)^2 (1 - 1/z) = 2 eta d (T-q)/(T-1) t, then
    L = (d/2) (T-q) / (q (q z + T - q)). The left side rises in ln z: bisection. Good to T = 10^9, t = 10^24.
    Leaves out alpha's lag: a delay of up to about d/(16q) of t, which matters where the loss falls steeply.

    Parameters: t : number or array, >= 0, in steps; T, q, d : integers, q < T; eta : number > 0
    Returns: the loss, in the shape of t
    Raises: ValueError : t negative or not finite, sizes not integers >= 1, q >= T, eta <= 0
        OverflowError : eta t beyond float64
    References: Derived here.
    >>> float(one_hot_loss_at(0, T=4, q=1, d=2, eta=1.0))
    0.75
    """
    T, q, d = _sizes_below(T=T, q=q, d=d)
    eta = _numbers(above=0, eta=eta)
    t = _at_least_zero("t", t)
    r = T - q
    time = 2 * eta * d * r / (T - 1) * t
    _check_results(time)
    low, high = np.zeros_like(time), np.log1p(time / q**2)    # q^2 (z - 1) alone is below the left side
    for _ in range(110):
        x = (low + high) / 2                                  # x = ln z
        below = q**2 * np.expm1(x) + 2.0 * q * r * x - float(r)**2 * np.expm1(-x) < time
        low, high = np.where(below, x, low), np.where(below, high, x)
    return d / 2 * r / (q * (q * np.exp(low) + r))


def _at_least_zero(name, value):
    array = _reals(**{name: value})
    if (array < 0).any():
        raise ValueError(f"{name} must be >= 0; got {array.min()!s}")
    return array


def _sizes_below(factor=1, **sizes):
    """The sizes T, q and others as `_sizes` gives them, with q < T/factor."""
    T, q, *_ = checked = _sizes(**sizes)
    if factor * q >= T:
        raise ValueError(f"q must be below {f'T/{factor}' if factor > 1 else 'T'}, T = {T}; got {q}")
    return checked


def escape_time(T, q, d, eta):
    """The step at which half of the attention is on y, z = ((T-q)/q)^2 in (C3), plus alpha's lag (C5).

    For large T and d not far above q. Measured: 4 % late or less for d <= 4q, T >= 16q; at d = 16q it is 25 % late
    at T = 32q, 4 % at T = 256q; not valid for d near T or above, where the lag is no small correction.

    Parameters: T, q, d : integers, T > 2q; eta : number > 0
    Returns: number of steps, a float; T^2/(eta d) to leading order
    Raises: ValueError : sizes not integers >= 1, 2q >= T, eta <= 0, d so large that the lag outweighs the rest
        OverflowError : steps beyond float64
    References: Derived here.
    >>> round(escape_time(T=1024, q=2, d=4, eta=2.0) * 2.0 * 4 / 1024**2, 4)
    1.0419
    """
    T, q, d = _sizes_below(T=T, q=q, d=d, factor=2)
    eta = _numbers(above=0, eta=eta)
    r = T - q
    at_optimum = (T - 1) / (eta * d * r) * (T * (T - 2 * q) + 2 * q * r * math.log(r / q))
    steps = float(at_optimum + T / eta * (math.log(T / q) - 1))
    _check_results(steps)
    if steps <= 0:
        raise ValueError(f"d must be smaller for (C5) to hold at T = {T}, q = {q}; got {d}")
    return steps


def largest_stable_eta(T, q, d):
    """The step size below which matrix descent stays on the line: min(2q, 2/lambda), lambda of (O5).

    Parameters: T, q, d : integers, q <= T
    Returns: the learning rate, a float
    Raises: ValueError : sizes not integers >= 1, q > T
    References: Derived here.
    >>> round(largest_stable_eta(T=5, q=4, d=6), 3)
    2.177
    """
    T, q, d = _sizes(T=T, q=q, d=d)
    if q == 1:
        return 2.0
    off_line = 0.0 if q == T else (T - q)**2 / (q**2 * (T - 2))  # q = T = 2 has no such term
    curvature = d * (q - 1) / (T * (T - 1)) * (1 + off_line)                                   # (O5)
    return float(min(2 * q, 2 / curvature))


# ---- stochastic encodings: closed forms (S), longer sequences (L) -----------------------------------------

def overlap_variance(q, d_e, query="dual"):
    """sigma^2 = E||e_y||^2/d_e, the variance of an overlap off y: q/(d_e - q + 1) dual, q/d_e sum (S5).

    Parameters: q, d_e : integers, q <= d_e for the dual query; query : "dual" or "sum"
    Returns: a float; exact for the sum query and at q = 1. For the dual query a lower bound wherever the encodings
        of y are independent (to a probability of about q^2 2^-d_e), and close from d_e = 64 on
    Raises: ValueError : sizes not integers >= 1, q > d_e (dual), unknown query
    References: Derived here.
    >>> overlap_variance(q=3, d_e=8), overlap_variance(q=3, d_e=8, query="sum")
    (0.5, 0.375)
    """
    q, d_e = _sizes(q=q, d_e=d_e)
    _choice("query", query, QUERIES)
    if query == "dual" and q > d_e:
        raise ValueError(f"q must be at most d_e = {d_e} for the dual query; got {q}")
    return q / (d_e - q + 1) if query == "dual" else q / d_e


@_quiet
def overlap_loss(c, overlaps, q, d):
    """The loss at the best alpha, averaged over given overlaps, without cancellation (S4).

    L* = L_0 {q E[sum_off a^2 + sum_on (a - mean_on a)^2] + Var(sum_off a)} / (q E||a||^2), a = softmax(c u),
    "on" and "off" meaning y; u = 1 on y leaves no second term.

    Parameters: c : number; overlaps : (B, T), the q selected positions first; q, d : integers, q < T
    Returns: the loss, a float
    Raises: ValueError : sizes not integers >= 1, q >= T, entries not real or not finite
        OverflowError : c u beyond float64
    References: Derived here.
    >>> overlap_loss(0.0, [[1.0, 0.0, 0.0, 0.0]], q=1, d=2)
    0.75
    """
    u = _arrays("overlaps:BT", overlaps)
    T, q, d = _sizes_below(T=u.shape[1], q=q, d=d)
    scores = _numbers(c=c) * u
    _check_results(scores, overlaps=u)
    a = _softmax(scores)
    on, off = a[:, :q], a[:, q:]
    off_sq = np.einsum("bt,bt->b", off, off).mean()
    uneven = q * on.var(axis=1).mean()
    mean_sq = np.einsum("bt,bt->b", on, on).mean() + off_sq                   # E||a||^2
    return float(d / 2 * (q * (off_sq + uneven) + off.sum(axis=1).var()) / (q**2 * mean_sq))


def _moments(c, T, q, sigma2):
    """m, M, v, h of (S5): means, variance and covariance of the sums of e^{c(u-1)} and its square off y."""
    k = c * sigma2                                            # at most 1/2, so that no exponent is above 0
    mu1, mu2 = np.exp(c * (k / 2 - 1)), np.exp(c * (2 * k - 2))
    v = (T - q) * (mu2 - np.exp(c * (k - 2)))
    h = (T - q) * (np.exp(c * (4.5 * k - 3)) - np.exp(c * (2.5 * k - 3)))
    return (T - q) * mu1, (T - q) * mu2, v, h


def _best_alpha(c, T, q, sigma2):
    m, M, _, _ = _moments(c, T, q, sigma2)
    return (q + m) / (q + M)                                  # (p/q)/A_0, A_0 = p^2/q + (p/q)^2 M


def _sharpness(c, T, q, d, sigma2):
    """The door of the closed forms in c: c >= 0, and below the floor, where they stop being valid."""
    T, q, d = _sizes_below(T=T, q=q, d=d)
    c, sigma2 = _at_least_zero("c", c), _at_least_zero("sigma2", _numbers(sigma2=sigma2))
    if (c * sigma2 > 0.5).any():
        raise ValueError(f"c must be at most 1/(2 sigma2) = {0.5 / sigma2:g}, where the overlaps' tail "
                         f"takes over; got {np.max(c):g}")
    return c, T, q, d, sigma2


@_quiet
def stochastic_loss(c, T, q, d, sigma2):
    """The loss at W = c I and the best alpha for overlaps N(0, sigma2) off y, in closed form (S5).

    L*/L_0 = M/(q+M) + q/(q+M) [v/(q+m)^2 - 2h/((q+m)(q+M))], where m = (T-q) mu_1, M = (T-q) mu_2,
    v = (T-q)(mu_2 - mu_1^2), h = (T-q)(mu_3 - mu_2 mu_1) and mu_k = e^{-kc + k^2 c^2 sigma2/2}. The first term is
    (C1) with z = e^{2c - 2c^2 sigma2}. Good while c sigma2 is small; not near the floor (S8).

    Parameters: c : number or array, 0 <= c <= 1/(2 sigma2); T, q, d : integers, q < T; sigma2 : `overlap_variance`
    Returns: the loss, in the shape of c
    Raises: ValueError : c or sigma2 out of range, sizes not integers >= 1, q >= T
    References: Derived here.
    >>> float(stochastic_loss(0.0, T=4, q=1, d=2, sigma2=0.1))
    0.75
    """
    c, T, q, d, sigma2 = _sharpness(c, T, q, d, sigma2)
    m, M, v, h = _moments(c, T, q, sigma2)
    ratio = (M + q * (v / (q + m)**2 - 2 * h / ((q + m) * (q + M)))) / (q + M)
    return d / (2 * q) * np.maximum(ratio, 0.0)               # near the floor the last term may overtake


@_quiet
def stochastic_trajectory(t, T, q, d, d_e, eta):
    """c, alpha and the loss after t steps of population descent, dual query, by quadrature of (S6).

    (d_e + d alpha*'(c)^2) dc/dt = -eta dL*/dc from c = 0 at t = T/eta; before that c = 0. L*(c) is
    `stochastic_loss`; alpha*(c) = (q+m)/(q+M) is the best alpha, with m and M as there.

    Parameters: t : number or array, >= 0, in steps; T, q, d, d_e : integers, q < T, q <= d_e; eta : number > 0
    Returns: c, alpha, loss, each in the shape of t
    Raises: ValueError : t negative or so late that (S5) has left its range; sizes; eta <= 0
        OverflowError : times beyond float64
    References: Derived here.
    >>> c, alpha, loss = stochastic_trajectory(1000, T=32, q=3, d=4, d_e=128, eta=2.0)
    >>> round(float(loss / (4 / 6)), 4)
    0.0617
    """
    T, q, d, d_e = _sizes_below(T=T, q=q, d=d, d_e=d_e)
    eta = _numbers(above=0, eta=eta)
    t, sigma2 = _at_least_zero("t", t), overlap_variance(q, d_e)
    grid = np.linspace(0.0, min(0.5 / sigma2, 40.0), 8001)
    slope = np.gradient(stochastic_loss(grid, T, q, d, sigma2), grid, edge_order=2)
    lag = d * np.gradient(_best_alpha(grid, T, q, sigma2), grid, edge_order=2)**2
    valid = max(1, int(np.argmax(np.append(slope, 0.0) >= 0)))  # up to the first place where L* stops falling
    steps_per_c = (d_e + lag[:valid]) / (-eta * slope[:valid])
    time = T / eta + np.append(0.0, np.cumsum((steps_per_c[1:] + steps_per_c[:-1]) / 2 * np.diff(grid[:valid])))
    _check_results(time)
    if (t > time[-1]).any():
        raise ValueError(f"t must be at most {time[-1]:.3g}, where (S5) stops being valid; got {t.max():g}")
    c = np.interp(t, time, grid[:valid])
    return c, _best_alpha(c, T, q, sigma2), stochastic_loss(c, T, q, d, sigma2)


@_quiet
def length_loss(alpha, c, T, q, d, sigma2):
    """The loss at V = alpha I, W = c I on sequences of length T, whatever length they were trained on (L1).

    L = (d/2) (alpha^2 A - 2 alpha p/q + 1/q), A = p^2/q + p^4 v/q^3 + (p/q)^2 M, p = q/(q+m) the attention on y,
    and m, M, v as in `stochastic_loss`.

    Parameters: alpha, c : numbers or arrays, 0 <= c <= 1/(2 sigma2)
        T, q, d : integers, q < T; sigma2 : `overlap_variance`
    Returns: the loss, in the broadcast shape
    Raises: ValueError : c or sigma2 out of range, sizes not integers >= 1, q >= T, alpha not finite
        OverflowError : a loss beyond float64
    References: Derived here.
    >>> round(float(length_loss(1.03, 6.0, T=2048, q=3, d=4, sigma2=3 / 126)) * 6 / 4, 2)
    0.51
    """
    c, T, q, d, sigma2 = _sharpness(c, T, q, d, sigma2)
    alpha = _reals(alpha=alpha)
    _broadcast(alpha=alpha, c=c)
    m, M, v, _ = _moments(c, T, q, sigma2)
    p, rest = q / (q + m), m / (q + m)
    spread = p**4 * v / q**3 + (p / q)**2 * M
    loss = d / 2 * (((1 - alpha) + alpha * rest)**2 / q + alpha**2 * spread)  # the square of 1 - alpha p completed
    _check_results(loss, alpha=alpha)
    return loss


def stochastic_floor(T, q, d, d_e, query="dual"):
    """The least loss over c that encodings of dimension d_e allow: (S8), and (S9) for the sum query.

    Dual: L_0 ((T-q)/q) e^{-d_e/(2q)}, conservative for q <= 4, up to 1.4 times too low from q = 8 on. Sum, q >= 3:
    L_0 min_c M/(q+M) with M = c^2 (q-1)(q-2)/d_e + (T-q) e^{-2c + 2c^2 tau^2} and tau^2 = (q + 2(q-1)/q)/d_e; at
    q = 1, 2 as the dual. Never above L_0. An estimate.

    Parameters: T, q, d, d_e : integers, q < T; query : "dual" or "sum"
    Returns: the loss, a float
    Raises: ValueError : sizes not integers >= 1, q >= T, unknown query
    References: Derived here.
    >>> round(stochastic_floor(T=32, q=3, d=4, d_e=128, query="sum") * 6 / 4, 2)
    0.08
    """
    T, q, d, d_e = _sizes_below(T=T, q=q, d=d, d_e=d_e)
    _choice("query", query, QUERIES)
    if query == "dual" or q <= 2:
        return d / (2 * q) * min(1.0, (T - q) / q * math.exp(-d_e / (2 * q)))                  # (S8)
    tau2 = (q + 2 * (q - 1) / q) / d_e
    c = np.linspace(0.0, min(math.log(T * d_e), 1 / (2 * tau2)), 10**4)        # the minimum lies inside
    M = c**2 * (q - 1) * (q - 2) / d_e + (T - q) * np.exp(-2 * c + 2 * c**2 * tau2)            # (S9)
    return float(d / (2 * q) * (M / (q + M)).min())


def required_dimension(T, q, eps):
    """The d_e that L/L_0 <= eps takes with the dual query: 2 q log(T/(q eps)), rounded up (S8).

    An estimate: conservative for q <= 4, q - 1 too small from q = 8 on.

    Parameters: T, q : integers, q < T; eps : number in (0, 1)
    Returns: an int
    Raises: ValueError : sizes not integers >= 1, q >= T, eps outside (0, 1)
    References: The order q log T is the paper's; the constant is derived here.
    >>> required_dimension(T=1024, q=3, eps=0.01)
    63
    """
    T, q = _sizes_below(T=T, q=q)
    eps = _numbers(above=0, below=1, eps=eps)
    return math.ceil(2 * q * (math.log(T / q) - math.log(eps)))


# ---- fully-connected networks (F) -------------------------------------------------------------------------

def fcn_inputs(X, selected):
    """The network's input [vec(X); s_y]: x_1 ... x_T, d numbers each, then the 0/1 row of y (F1).

    Parameters: X : (B, d, T); selected : (B, T) of 0 and 1, q ones a row
    Returns: (B, T d + T)
    Raises: ValueError : shapes that do not fit, rows without q ones
    >>> fcn_inputs([[[1.0, 2.0], [3.0, 4.0]]], [[0, 1]]).tolist()
    [[1.0, 3.0, 2.0, 4.0, 0.0, 1.0]]
    """
    X, selected = _arrays("X:BdT selected:BT", X, selected)
    _selection(selected)
    return np.concatenate([X.transpose(0, 2, 1).reshape(len(X), -1), selected], axis=1)


@_quiet
def fcn(W1, b1, A, b2, inputs):
    """The two-layer network f = A relu(W1 x + b1) + b2 (F1).

    Parameters: W1 : (m, n); b1 : (m,); A : (d, m); b2 : (d,); inputs : (B, n)
    Returns: (B, d)
    Raises: ValueError : shapes that do not fit, entries not real or not finite; OverflowError : beyond float64
    >>> fcn([[2.0]], [-1.0], [[3.0]], [0.5], [[1.0], [0.0]]).tolist()
    [[3.5], [0.5]]
    """
    W1, b1, A, b2, inputs = _arrays("W1:mn b1:m A:dm b2:d inputs:Bn", W1, b1, A, b2, inputs)
    _finite(W1=W1, b1=b1, A=A, b2=b2)
    pre = inputs @ W1.T + b1
    f = np.maximum(pre, 0.0) @ A.T + b2
    _check_results(pre, f, inputs=inputs)
    return f


def init_fcn(rng, m, T, d):
    """Random first and second layer, zero biases: N(0, 2/n) for the n = Td + T inputs, N(0, 1/m).

    Parameters: rng : numpy.random.Generator; m, T, d : integers
    Returns: W1 (m, T d + T), b1 (m,), A (d, m), b2 (d,)
    Raises: ValueError : rng no Generator, sizes not integers >= 1
    >>> [param.shape for param in init_fcn(np.random.default_rng(0), m=3, T=2, d=4)]
    [(3, 10), (3,), (4, 3), (4,)]
    """
    _generator(rng)
    m, T, d = _sizes(m=m, T=T, d=d)
    n = T * d + T
    return (rng.standard_normal((m, n)) * math.sqrt(2 / n), np.zeros(m),
            rng.standard_normal((d, m)) / math.sqrt(m), np.zeros(d))


def fcn_loss_floor(m, T, q, d):
    """The least loss of any network whose first layer has m neurons, Gaussian tokens, any depth (F4).

    L/L_0 >= 1 - q m/(Td) for m <= d, (1 - m/(Td)) (T-q)/(T-1) for d <= m <= Td, 0 beyond.

    Parameters: m : integer >= 0 or array of them; T, q, d : integers, q <= T
    Returns: the loss (L, not L/L_0), in the shape of m
    Raises: ValueError : m not integers >= 0, sizes not integers >= 1, q > T
    References: The order Td is the paper's; the number is derived here.
    >>> (fcn_loss_floor([0, 4, 16, 32], T=8, q=2, d=4) / (4 / 4)).round(3).tolist()
    [1.0, 0.75, 0.429, 0.0]
    """
    (T, q, d), m = _sizes(T=T, q=q, d=d), _sizes(many=True, least=0, m=m)
    m, Td = np.asarray(m, float), float(T * d)                # as int64 their products would overflow
    beyond_mean = 0.0 if T == 1 else (T - q) / (T - 1) * np.maximum(1 - m / Td, 0.0)
    return d / (2 * q) * np.where(m <= d, 1 - q * m / Td, beyond_mean)


def fcn_first_layer_floor(W1, T, q, d):
    """The least loss of any network with this first layer, Gaussian tokens, any depth (F3).

    (1/2) tr(P (M kron I_d)), P the projection off the row space of the first Td columns of W1 and
    M = E s_y s_y^T/q^2 = ((T-q) I + (q-1) 11^T) / (q T (T-1)).

    Parameters: W1 : (m, n), n >= Td, of any rank; T, q, d : integers, q <= T
    Returns: the loss (L, not L/L_0), a float
    Raises: ValueError : W1 no finite matrix or with fewer than Td columns, sizes not integers >= 1, q > T
    References: Derived here.
    >>> round(fcn_first_layer_floor(np.eye(4, 32), T=8, q=2, d=4), 4)
    0.875
    """
    W1 = _arrays("W1:mn", W1)
    T, q, d = _sizes(T=T, q=q, d=d)
    _finite(W1=W1)
    if W1.shape[1] < T * d:
        raise ValueError(f"W1 must have at least T d = {T * d} columns; got shape {W1.shape}")
    largest = abs(W1[:, :T * d]).max(axis=1, keepdims=True)   # a small row counts as much as a large one
    rows = W1[:, :T * d] / np.where(largest > 0, largest, 1.0)
    rows = np.linalg.qr(rows, mode="r")                       # the same row space in at most Td rows
    _, singular, directions = np.linalg.svd(rows)
    rank = int((singular > max(W1.shape) * np.finfo(float).eps * singular[0]).sum())
    unseen = directions[rank:].reshape(-1, T, d)              # an orthonormal basis of what W1 does not see
    each, shared = (0.0, 1.0) if T == 1 else ((T - q) / (T - 1), (q - 1) / (T - 1))
    return float((each * (unseen**2).sum() + shared * (unseen.sum(axis=1)**2).sum()) / (2 * q * T))


def exact_fcn(T, q, d, K=8.0):
    """A network of width Td that computes STS_q wherever all |x| < K, exact up to rounding of numbers like K (F5).

    h_ik = relu(x_ik + K - G (1 - s_i)) with G = 2K + 2, f_k = (1/q) sum_i h_ik - K.

    Parameters: T, q, d : integers, q <= T; K : number > 0
    Returns: W1 (T d, T d + T), b1 (T d,), A (d, T d), b2 (d,)
    Raises: ValueError : sizes not integers >= 1, q > T, K not a number > 0; OverflowError : 2K + 2 beyond float64
    References: Derived here.
    >>> fcn(*exact_fcn(T=2, q=1, d=1), fcn_inputs([[[0.5, 7.0]]], [[1, 0]])).tolist()
    [[0.5]]
    """
    (T, q, d), K = _sizes(T=T, q=q, d=d), _numbers(above=0, K=K)
    G = 2 * K + 2
    _check_results(G)
    W1 = np.hstack([np.eye(T * d), G * np.repeat(np.eye(T), d, axis=0)])
    return W1, np.full(T * d, float(K - G)), np.tile(np.eye(d), T) / q, np.full(d, -float(K))
