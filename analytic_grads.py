"""Hand-derived gradients: softmax attention, its exact population average, the fully-connected network.

NumPy only, and complete: this file works when copied alone. README.md derives each tag such as (A5). Every
loss is L = (1/2) E ||f - target||^2. Above each function stands its contract; the end of the file keeps it.
"""
import collections.abc
import functools
import inspect
import math
import threading

import numpy as np


def checked(**contract):
    """What the arguments of the function below must be; without this line it is the mathematics alone."""
    return lambda function: functools.wraps(function)(
        lambda *args, **named: enter(function, contract, args, named))


@checked(V="d D", W="D D", Z="B D T", z_query="B D", target="B d")
def attention_lines(V, W, Z, z_query, target):
    """Every line of `attention_loss_and_grads` by its name: (A1)-(A8) for each sample, summed over the batch.

    Parameters, Raises, References: as there. Returns: a dictionary of s, a, g, grad_s (B, T), f, r (B, d),
    and of the sums over the batch loss, grad_V (d, D), grad_W (D, D)
    >>> attention_lines([[1.0]], [[0.0]], [[[1.0, 3.0]]], [[1.0]], [[2.0]])["a"].tolist()
    [[0.5, 0.5]]
    """
    s = each(Z.transpose(0, 2, 1), z_query @ W.T)                 # (A1) s = Z^T W z_q
    a = softmax(s)                                                # (A2) a = softmax(s)
    Za = each(Z, a)
    f = Za @ V.T                                                  # (A3) f = V Z a
    r = f - target                                                # (A4) r = f - target, L = (1/2) ||r||^2
    grad_V = r.T @ Za                                             # (A5) grad_V = r (Z a)^T
    g = each(Z.transpose(0, 2, 1), r @ V)                         # (A6) g = Z^T V^T r
    grad_s = a * (g - (a * g).sum(axis=1, keepdims=True))         # (A7) grad_s = a * (g - <a, g>)
    grad_W = each(Z, grad_s).T @ z_query                          # (A8) grad_W = Z grad_s z_q^T
    loss = 0.5 * float(np.vdot(r, r))
    return dict(s=s, a=a, f=f, r=r, loss=loss, grad_V=grad_V, g=g, grad_s=grad_s, grad_W=grad_W)


def each(matrices, vectors):
    """Matrix times vector for each sample: (B, m, n) and (B, n) give (B, m)."""
    return (matrices @ vectors[:, :, None])[:, :, 0]


@checked(scores="... T")
def softmax(scores):
    """Softmax over the last axis (A2): a_i = e^{s_i} / sum_j e^{s_j}. Scores up to 1e300 do not overflow.

    Parameters: scores : (..., T); Returns: (..., T), rows >= 0 that sum to 1
    Raises: ValueError : scores empty, a single number, not real, not finite, or integers beyond 2^53
    >>> softmax([0.0, 1e300]).tolist()
    [0.0, 1.0]
    """
    weights = scores - scores.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)                                  # in place: half the time
    return np.divide(weights, weights.sum(axis=-1, keepdims=True), out=weights)


@checked(V="d D", W="D D", Z="B D T", z_query="B D", target="B d")
def attention_loss_and_grads(V, W, Z, z_query, target):
    """Loss and gradients of a softmax-attention layer f = V Z softmax(Z^T W z_q), batch means (A1)-(A8).

    Parameters: V : (d, D) value matrix; W : (D, D) merged key-query matrix
        Z : (B, D, T) tokens, one a column; z_query : (B, D) query tokens; target : (B, d)
    Returns: loss, grad_V (d, D), grad_W (D, D)
    Raises: ValueError : shapes that do not fit, entries not finite; OverflowError : a result beyond float64
    References: the model is the paper's; the gradients are derived here.
    >>> loss, grad_V, grad_W = attention_loss_and_grads([[0.0]], [[0.0]], [[[1.0, 3.0]]], [[1.0]], [[2.0]])
    >>> loss, grad_V.tolist(), grad_W.tolist()
    (2.0, [[-4.0]], [[0.0]])
    """
    B, D, T = Z.shape
    piece = max(4, 300_000 // (D * T))  # 2.4 MB of Z at a time stay in cache for all four uses
    loss, grad_V, grad_W = 0.0, np.zeros_like(V), np.zeros_like(W)
    for start in range(0, B, piece):
        lines = attention_lines(V, W, *(x[start:start + piece] for x in (Z, z_query, target)))
        loss += lines["loss"]
        grad_V += lines["grad_V"]
        grad_W += lines["grad_W"]
    return loss / B, grad_V / B, grad_W / B


# ---- the population: exact over X (P), one-hot encodings (O), stochastic encodings (S) ---------------
@checked(V="d d", W="d_e d_e", E="d_e T | B d_e T", e_query="B d_e", selected="B T of 0/1")
def population_loss_and_grads(V, W, E, e_query, selected):
    """Population loss and gradients of f = V X softmax(E^T W e_y), exact over X (P1)-(P4).

    Tokens enter by E[x_i x_j^T] = 1[i = j] I alone (P5). The mean over the rows given: every q-subset once
    for the whole population over y (`all_subsets`), fresh draws for stochastic encodings.

    Parameters: V : (d, d); W : (d_e, d_e); E : (d_e, T) shared by all rows, or (B, d_e, T) one a row
        e_query : (B, d_e), for one-hot E `selected`; selected : (B, T) rows of 0 and 1 with q ones each
    Returns: loss, grad_V (d, d), grad_W (d_e, d_e)
    Raises: ValueError : shapes that do not fit, rows without q ones; OverflowError. References: derived here.
    >>> loss, grad_V, _ = population_loss_and_grads([[0.0]], np.zeros((2, 2)), np.eye(2), [[1, 0]], [[1, 0]])
    >>> loss, grad_V.item()
    (0.5, -0.5)
    """
    B, d, q, shared = len(selected), len(V), selected[0].sum(), E.ndim == 2
    key = e_query @ W.T
    a = softmax(key @ E if shared else each(E.transpose(0, 2, 1), key))
    on_y = np.einsum("bt,bt->b", a, selected)                         # <s_y, a>
    a_sq = np.einsum("bt,bt->b", a, a)                                # ||a||^2
    tr_V, V_sq = np.trace(V), np.vdot(V, V)
    # (P1) as a sum of squares, free of cancellation: V = vbar I + (V - vbar I), vbar = tr V / d.
    miss = (tr_V / d) * a - selected / q
    traceless = V - (tr_V / d) * np.eye(d)
    loss = 0.5 * (np.vdot(traceless, traceless) * a_sq.mean() + d * np.vdot(miss, miss) / B)
    grad_V = V * a_sq.mean() - (on_y.mean() / q) * np.eye(d)          # (P2)
    g = V_sq * a - (tr_V / q) * selected                              # (P3)
    grad_s = a * (g - np.einsum("bt,bt->b", a, g)[:, None])
    grad_W = (grad_s @ E.T if shared else each(E, grad_s)).T @ e_query / B  # (P4)
    return float(loss), grad_V, grad_W


@checked(alpha="numbers", omega="numbers", T="sizes", q="sizes <= T", d="sizes")
def one_hot_loss_and_grads(alpha, omega, T, q, d):
    """Loss and gradients on the line V = alpha I, W = omega (I - 11^T/T), orthonormal E (O2)-(O4).

    The gradients are the coefficients of the matrix gradients, grad_V = grad_alpha I and grad_W = grad_omega
    (I - 11^T/T), so that dL/dalpha = d grad_alpha and dL/domega = (T-1) grad_omega. At q = T grad_omega = 0.

    Parameters: alpha, omega : numbers or arrays; T, q, d : integers or arrays of them; all broadcast
    Returns: loss, grad_alpha, grad_omega, in the broadcast shape
    Raises: ValueError : bad sizes, q > T, parameters not finite; OverflowError. References: derived here.
    >>> [round(float(x), 6) for x in one_hot_loss_and_grads(1.0, 0.0, T=4, q=1, d=2)]
    [0.75, 0.0, -0.125]
    """
    others, shift = T - q, np.maximum(omega, 0.0)  # e^omega and 1, both times e^-shift, which drops out of a
    # Never 0/0: at q = T there is no other position, and the weight on y is 1 whatever omega.
    on, off = np.exp((omega - shift) * (others > 0)), np.exp(-shift)
    total = q * on + others * off
    a_on, a_off = on / total, off / total        # attention on one selected, on one other position
    p, rest = q * a_on, others * a_off           # their sums: p on y, 1 - p elsewhere
    miss = ((1 - alpha) + alpha * rest) / q      # (1 - alpha p)/q, no cancellation at alpha = p = 1
    loss = d / 2 * (q * miss**2 + others * (alpha * a_off)**2)        # (O2)
    grad_alpha = alpha * rest * a_off - p * miss                      # (O3) alpha N - p/q
    delta = d * alpha * (miss + alpha * a_off)                        # (O4)
    grad_omega = -p * rest * delta / np.maximum(T - 1, 1)
    return loss, grad_alpha + 0 * loss, grad_omega                    # grad_alpha in the shape of all


@checked(alpha="number", c="number", overlaps="B T", q="size <= T", d="size", d_e="size")
def stochastic_loss_and_grads(alpha, c, overlaps, q, d, d_e):
    """Loss and gradients on the line V = alpha I, W = c I, from overlaps u = E^T e_y (S2, S3).

    a = softmax(c u). The gradients are the coefficients of the matrix gradients, grad_V = grad_alpha I and
    grad_W = grad_c I, so that dL/dalpha = d grad_alpha and dL/dc = d_e grad_c.

    Parameters: alpha, c : numbers; overlaps : (B, T), the q selected positions first; q, d, d_e : integers
    Returns: loss, grad_alpha, grad_c, averaged over the rows
    Raises: ValueError : bad sizes, q > T, entries not finite; OverflowError. References: derived here.
    >>> [round(float(x), 6) for x in stochastic_loss_and_grads(1.0, 0.0, [[1.0, 0.0, 0.0, 0.0]], 1, 2, 8)]
    [0.75, 0.0, -0.046875]
    """
    a = softmax(c * overlaps)
    ua = overlaps * a
    p, N = a[:, :q].sum(axis=1), np.einsum("bt,bt->b", a, a)
    miss_off = np.einsum("bt,bt->", a[:, q:], a[:, q:])
    loss = d / 2 * (((alpha * a[:, :q] - 1 / q)**2).sum() + alpha * alpha * miss_off) / len(a)  # (P1)
    grad_alpha = alpha * N.mean() - p.mean() / q                      # (S2)
    # (S3) <u, grad_s> = <u a, g> - <a, g> <u, a> with g = d alpha (alpha a - s_y / q) from (P3)
    ua_g = alpha * np.einsum("bt,bt->b", ua, a) - ua[:, :q].sum(axis=1) / q
    grad_c = d * alpha * (ua_g - (alpha * N - p / q) * ua.sum(axis=1)).mean() / d_e
    return float(loss), grad_alpha, grad_c


# ---- fully-connected network (F) -------------------------------------------------------------------
@checked(W1="m n", b1="m", A="d m", b2="d", inputs="B n", target="B d")
def fcn_lines(W1, b1, A, b2, inputs, target):
    """Every line of `fcn_loss_and_grads` by its name: (F1, F2) for each sample, summed over the batch.

    Parameters, Raises, References: as there. Returns: a dictionary of pre, hidden, delta (B, m), f, r (B, d),
    and of the sums over the batch loss, grad_W1, grad_b1, grad_A, grad_b2
    >>> fcn_lines([[2.0]], [0.0], [[1.0]], [0.0], [[3.0]], [[5.0]])["hidden"].tolist()
    [[6.0]]
    """
    pre = inputs @ W1.T + b1                            # (F1) pre = W1 x + b1
    hidden = (pre > 0) * pre                            # (F1) hidden = relu(pre), NaN where pre is infinite
    f = hidden @ A.T + b2                               # (F1) f = A hidden + b2
    r = f - target                                      # (F1) r = f - target, L = (1/2) ||r||^2
    grad_A, grad_b2 = r.T @ hidden, r.sum(axis=0)       # (F2) grad_A = r hidden^T, grad_b2 = r
    delta = (r @ A) * (pre > 0)                         # (F2) delta = (A^T r) * relu'(pre)
    grad_W1, grad_b1 = delta.T @ inputs, delta.sum(axis=0)  # (F2) grad_W1 = delta x^T, grad_b1 = delta
    return dict(pre=pre, hidden=hidden, f=f, r=r, loss=0.5 * float(np.vdot(r, r)), grad_A=grad_A,
                grad_b2=grad_b2, delta=delta, grad_W1=grad_W1, grad_b1=grad_b1)


@checked(W1="m n", b1="m", A="d m", b2="d", inputs="B n", target="B d")
def fcn_loss_and_grads(W1, b1, A, b2, inputs, target):
    """Loss and gradients of the two-layer network f = A relu(W1 x + b1) + b2, means over the batch (F1, F2).

    Parameters: W1 : (m, n); b1 : (m,); A : (d, m); b2 : (d,); inputs : (B, n); target : (B, d)
    Returns: loss, grad_W1, grad_b1, grad_A, grad_b2; relu has derivative 0 at 0
    Raises: ValueError : shapes that do not fit, entries not finite; OverflowError. References: derived here.
    >>> [float(np.sum(x)) for x in fcn_loss_and_grads([[2.0]], [0.0], [[1.0]], [0.0], [[3.0]], [[5.0]])]
    [0.5, 3.0, 1.0, 6.0, 1.0]
    """
    lines = fcn_lines(W1, b1, A, b2, inputs, target)
    return tuple(lines[name] / len(inputs) for name in ("loss", "grad_W1", "grad_b1", "grad_A", "grad_b2"))


# ---- the door: what the words of a contract ask, and how it is refused ---------------------------------
running = threading.local()  # .checked while a checked function runs: what it calls needs no check
signature = functools.lru_cache(None)(inspect.signature)
OBJECTS = {"rng": np.random.Generator, "function": collections.abc.Callable, "flag": bool, "arrays": tuple}


def enter(function, contract, args, named):
    """The function's result for arguments that keep its contract; `returns` is what must be allocated."""
    if getattr(running, "checked", False):
        return function(*args, **named)
    call, known = signature(function).bind(*args, **named), {}  # known: the size of a name, and who has it
    given = call.arguments
    with np.errstate(all="ignore"):
        for name, value in given.items():
            given[name] = admit(name, value, contract[name], known)
        for shape in contract.get("returns", "").split(" | "):
            sizes = {name: known[name][0] for name in shape.split() if name in known}
            count = math.prod(sizes.get(name, 1) for name in shape.split())
            require(count <= 2**30, ", ".join(sizes), "so small that arrays have at most 2^30 numbers", sizes)
        try:
            running.checked = True
            result = function(*call.args, **call.kwargs)
        finally:
            running.checked = False
        if not all(map(finite, {tuple: list, dict: dict.values}.get(type(result), lambda x: [x])(result))):
            for name, value in given.items():
                require_finite(name, value)
            raise OverflowError(f"{function.__name__}: a result exceeds float64, the arguments are too large")
    return result


def require(holds, name, wanted, got):
    if not holds:
        raise ValueError(f"{name} must be {wanted}; got {got!r:.70}")


def finite(value):
    numbers = value if isinstance(value, (float, np.ndarray)) else 0.0
    return math.isfinite(np.add.reduce(numbers, axis=None)) or np.isfinite(numbers).all()  # seldom a copy


def require_finite(name, value):
    finite(value) or require(False, name, "finite", float(value[~np.isfinite(value)][0]))


def admit(name, value, kind, known):
    """value in float64, as int, or as the object that it is; else a ValueError: name, wanted, given."""
    if isinstance(kind, dict):
        require(isinstance(value, str) and value in kind, name, f"one of {', '.join(kind)}", value)
    elif kind in OBJECTS:
        require(isinstance(value, OBJECTS[kind]) and value != (), name, f"a {OBJECTS[kind].__name__}", value)
        if kind == "arrays":
            return tuple(admit(f"{name}[{k}]", part, "numbers", {}) for k, part in enumerate(value))
    elif value is not None or not kind.endswith("or None"):
        number = kind.startswith(("size", "count", "number"))
        return (admit_number if number else admit_array)(name, real(name, value), kind, known)
    return value


def real(name, value):
    """value as an array of real numbers: not ragged, masked, empty, text or complex."""
    array = value
    if not isinstance(value, np.ndarray):
        try:
            floats = np.asarray(value, dtype=float)  # refuses ragged rows, without a warning
            array = np.asarray(value)
            if array.dtype == object and all(isinstance(x, int) for x in array.flat):
                array = floats                       # Python integers beyond 64 bits
        except (TypeError, ValueError, OverflowError):
            array = np.array(None)
    usable = array.dtype.kind in "biuf" and array.size and not isinstance(array, np.ma.MaskedArray)
    require(usable, name, "real numbers, at least one", value)
    return array


def admit_number(name, array, kind, known):
    """Finite numbers, integers >= 1 (size) or >= 0 (count): one, or (plural) arrays that broadcast."""
    word, _, bound = kind.partition(" ")
    value, many, least = array.astype(float)[()], word.endswith("s"), {"s": 1, "c": 0, "n": None}[word[0]]
    if least is None:
        above = {"": True, ">= 0": value >= 0, ">= 1": value >= 1}.get(bound, value > 0)
        holds = array.dtype.kind != "b" and np.isfinite(value) & above & ((value < 1) | ("1)" not in bound))
        wanted = f"{'finite numbers' if many else 'one finite number'} {bound}".rstrip()
    else:
        holds = array.dtype.kind in "iu" and (array >= least) & (array < 2**63)
        wanted = f"{'integers' if many else 'an integer'} >= {least}, below 2^63"
    require(np.all(holds) and (many or not array.ndim), name, wanted, array.tolist())
    if least is not None:
        value = array.astype(np.int64) if array.ndim else int(array)
        known[name] = value, name
    known.setdefault("", {})[name] = array.shape
    try:
        np.broadcast_shapes(*known[""].values())
    except ValueError:
        require(False, ", ".join(known[""]), "of shapes that broadcast", known[""])
    if bound[:1] == "<":  # "< T", "<= T" or "< T/2"
        other, _, factor = bound.split()[1].partition("/")
        room = known[other][0] - value * int(factor or 1)
        wanted = f"{'at most' if '=' in bound else 'below'} {bound.split()[1]}, {other} = {known[other][0]}"
        require(np.all(room >= ("=" not in bound)), name, wanted, array.tolist())
    return value if many or least is not None else float(value)


def admit_array(name, array, kind, known):
    """An array in float64 whose shape agrees with the kind and with the arguments before it."""
    shapes = [tuple(shape.split()) for shape in kind.replace(" of 0/1", "").split(" | ")]
    shape = next((s for s in shapes if len(s) == array.ndim or (s[0] == "..." and array.ndim)), ())
    if not shape or "..." not in shape and any(
            known.setdefault(dim, (size, name))[0] != size for dim, size in zip(shape, array.shape)):
        fixed = [f"{dim} = {known[dim][0]} as in {known[dim][1]}" for dim in shape or shapes[0]
                 if known.get(dim, (0, name))[1] != name]
        wanted = " or ".join(map(str, shapes)).replace("'", "") + " with " * bool(fixed) + ", ".join(fixed)
        require(False, name, f"of shape {wanted}", array.shape)
    if array.dtype != float:
        large = array.dtype.kind in "iu" and ((array < -2**53) | (array > 2**53)).any()
        require(not large, name, "numbers that float64 holds, integers within 2^53", array)
        array = array.astype(float)
    if "B" not in kind:  # parameters; data are looked at where a result is not finite
        require_finite(name, array)
    if kind.endswith("of 0/1"):
        q = array[0].sum()
        equal = ((array == 0) | (array == 1)).all() and q >= 1 and (array.sum(axis=-1) == q).all()
        require(equal, name, "rows of 0 and 1 with the same number q >= 1 of ones", array)
        known["q"] = int(q), name
    return array
