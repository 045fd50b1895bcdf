"""Hand-derived gradients: softmax attention, its exact population average, the network.

NumPy only, and complete: this file works when copied alone. README.md derives each tag such as
(A5). Every loss is L = (1/2) E ||f - target||^2. Above each function stands its contract: what
its arguments must be, which the end of the file (the door) reads.
"""
import collections.abc
import functools
import inspect
import math
import threading

import numpy as np


def checked(**contract):
    """Check the arguments of the function below; without this line it is the mathematics alone."""
    def decorate(function):
        function.contract = contract
        return functools.wraps(function)(lambda *args, **named: enter(function, args, named))
    return decorate


@checked(V="d D", W="D D", Z="B D T", z_query="B D", target="B d")
def attention_lines(V, W, Z, z_query, target):
    """Every line of `attention_loss_and_grads` by its name, loss and grad_V, grad_W summed over B.

    Parameters: as there
    Returns: a dictionary; s, a, g, grad_s (B, T), f, r (B, d), a_g (B,), the rest as there
    Raises: ValueError, OverflowError : as there
    >>> attention_lines([[1.0]], [[0.0]], [[[1.0, 3.0]]], [[1.0]], [[2.0]])["a"].tolist()
    [[0.5, 0.5]]
    """
    s = each(Z.transpose(0, 2, 1), z_query @ W.T)       # (A1) s = Z^T W z_q
    a = softmax(s)                                      # (A2) a = softmax(s)
    Za = each(Z, a)
    f = Za @ V.T                                        # (A3) f = V Z a
    r = f - target                                      # (A4) r = f - target, L = (1/2) ||r||^2
    grad_V = r.T @ Za                                   # (A5) grad_V = r (Z a)^T
    g = each(Z.transpose(0, 2, 1), r @ V)               # (A6) g = Z^T V^T r
    a_g = (a * g).sum(axis=1)                           # <a, g> of (A7)
    grad_s = a * (g - a_g[:, None])                     # (A7) grad_s = a * (g - <a, g>)
    grad_W = each(Z, grad_s).T @ z_query                # (A8) grad_W = Z grad_s z_q^T

    loss = 0.5 * float(np.vdot(r, r))
    return dict(s=s, a=a, f=f, r=r, g=g, a_g=a_g, grad_s=grad_s,
                loss=loss, grad_V=grad_V, grad_W=grad_W)


def each(matrices, vectors):
    """Matrix times vector for each sample: (B, m, n) and (B, n) give (B, m)."""
    return (matrices @ vectors[:, :, None])[:, :, 0]


@checked(scores="... T")
def softmax(scores):
    """Softmax over the last axis (A2): a_i = e^{s_i} / sum_j e^{s_j}.

    Parameters: scores : (..., T), up to 1e300 without overflow
    Returns: (..., T), rows >= 0 that sum to 1
    Raises: ValueError : scores empty, one number, not real, not finite, or integers beyond 2^53
    >>> softmax([0.0, 1e300]).tolist()
    [0.0, 1.0]
    """
    weights = scores - scores.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)                        # in place: half the time
    return np.divide(weights, weights.sum(axis=-1, keepdims=True), out=weights)


@checked(V="d D", W="D D", Z="B D T", z_query="B D", target="B d")
def attention_loss_and_grads(V, W, Z, z_query, target):
    """Loss and gradients of softmax attention f = V Z softmax(Z^T W z_q), batch means (A1)-(A8).

    Parameters: V : (d, D) value matrix; W : (D, D) merged key-query matrix
        Z : (B, D, T) tokens, one a column; z_query : (B, D) query tokens; target : (B, d)
    Returns: loss, grad_V (d, D), grad_W (D, D)
    Raises: ValueError : shapes that do not fit, not finite; OverflowError : a result beyond float64
    References: the model is the paper's; the gradients are derived here.
    >>> arrays = [[0.0]], [[0.0]], [[[1.0, 3.0]]], [[1.0]], [[2.0]]
    >>> loss, grad_V, grad_W = attention_loss_and_grads(*arrays)
    >>> loss, grad_V.tolist(), grad_W.tolist()
    (2.0, [[-4.0]], [[0.0]])
    """
    B, D, T = Z.shape
    piece = max(4, 300_000 // (D * T))  # 2.4 MB of Z at a time stay in cache for all four uses

    loss = 0.0
    grad_V = np.zeros_like(V)
    grad_W = np.zeros_like(W)
    for start in range(0, B, piece):
        rows = slice(start, start + piece)
        lines = attention_lines(V, W, Z[rows], z_query[rows], target[rows])
        loss += lines["loss"]
        grad_V += lines["grad_V"]
        grad_W += lines["grad_W"]
    return loss / B, grad_V / B, grad_W / B


# ---- the population: exact over X (P), one-hot encodings (O), stochastic encodings (S) ----

@checked(V="d d", W="d_e d_e", E="d_e T | B d_e T", e_query="B d_e", selected="B T of 0/1")
def population_loss_and_grads(V, W, E, e_query, selected):
    """Population loss and gradients of f = V X softmax(E^T W e_y), exact over X (P1)-(P4).

    Tokens enter by E[x_i x_j^T] = 1[i = j] I alone (P5). The mean is over the rows given: every
    q-subset once for the whole population over y (`all_subsets`), fresh draws for stochastic E.

    Parameters: V : (d, d); W : (d_e, d_e); E : (d_e, T) for all rows, or (B, d_e, T) one a row
        e_query : (B, d_e), for one-hot E `selected`
        selected : (B, T) rows of 0 and 1 with q ones each
    Returns: loss, grad_V (d, d), grad_W (d_e, d_e)
    Raises: ValueError : shapes that do not fit, rows without q ones; OverflowError
    References: derived here.
    >>> W = np.zeros((2, 2))
    >>> loss, grad_V, _ = population_loss_and_grads([[0.0]], W, np.eye(2), [[1, 0]], [[1, 0]])
    >>> loss, grad_V.item()
    (0.5, -0.5)
    """
    B = len(selected)
    d = len(V)
    q = selected[0].sum()
    shared = E.ndim == 2

    key = e_query @ W.T
    a = softmax(key @ E if shared else each(E.transpose(0, 2, 1), key))
    on_y = np.einsum("bt,bt->b", a, selected)           # <s_y, a>
    a_sq = np.einsum("bt,bt->b", a, a)                  # ||a||^2
    tr_V = np.trace(V)
    V_sq = np.vdot(V, V)

    # (P1) as a sum of squares, free of cancellation: V = vbar I + (V - vbar I), vbar = tr V / d.
    miss = (tr_V / d) * a - selected / q
    traceless = V - (tr_V / d) * np.eye(d)
    spread = np.vdot(traceless, traceless) * a_sq.mean()
    loss = 0.5 * (spread + d * np.vdot(miss, miss) / B)

    grad_V = V * a_sq.mean() - (on_y.mean() / q) * np.eye(d)            # (P2)
    g = V_sq * a - (tr_V / q) * selected                                # (P3)
    grad_s = a * (g - np.einsum("bt,bt->b", a, g)[:, None])
    grad_key = grad_s @ E.T if shared else each(E, grad_s)
    grad_W = grad_key.T @ e_query / B                                   # (P4)
    return float(loss), grad_V, grad_W


@checked(alpha="numbers", omega="numbers", T="sizes", q="sizes <= T", d="sizes")
def one_hot_loss_and_grads(alpha, omega, T, q, d):
    """Loss and gradients on the line V = alpha I, W = omega (I - 11^T/T), orthonormal E (O2)-(O4).

    They are the coefficients of the matrix gradients, grad_V = grad_alpha I and grad_W =
    grad_omega (I - 11^T/T): dL/dalpha = d grad_alpha, dL/domega = (T-1) grad_omega. At q = T
    grad_omega = 0.

    Parameters: alpha, omega : numbers or arrays; T, q, d : integers or arrays of them
    Returns: loss, grad_alpha, grad_omega, in the shape to which all of them broadcast
    Raises: ValueError : bad sizes, q > T, parameters not finite; OverflowError
    References: derived here.
    >>> [round(float(x), 6) for x in one_hot_loss_and_grads(1.0, 0.0, T=4, q=1, d=2)]
    [0.75, 0.0, -0.125]
    """
    others = T - q
    shift = np.maximum(omega, 0.0)                      # e^omega and 1, both times e^-shift
    # Never 0/0: at q = T there is no other position, and the weight on y is 1 whatever omega.
    on = np.exp((omega - shift) * (others > 0))
    off = np.exp(-shift)

    total = q * on + others * off
    a_on = on / total                                   # attention on one selected position
    a_off = off / total                                 # attention on one other position
    p = q * a_on                                        # on all of y
    rest = others * a_off                               # 1 - p
    miss = ((1 - alpha) + alpha * rest) / q             # (1 - alpha p)/q, without cancellation

    loss = d / 2 * (q * miss**2 + others * (alpha * a_off)**2)          # (O2)
    grad_alpha = alpha * rest * a_off - p * miss                        # (O3) alpha N - p/q
    delta = d * alpha * (miss + alpha * a_off)                          # (O4)
    grad_omega = -p * rest * delta / np.maximum(T - 1, 1)
    return loss, grad_alpha + 0 * loss, grad_omega      # grad_alpha in the shape of all


@checked(alpha="number", c="number", overlaps="B T", q="size <= T", d="size", d_e="size")
def stochastic_loss_and_grads(alpha, c, overlaps, q, d, d_e):
    """Loss and gradients on the line V = alpha I, W = c I, from overlaps u = E^T e_y (S2, S3).

    a = softmax(c u). They are the coefficients of the matrix gradients, grad_V = grad_alpha I and
    grad_W = grad_c I, so that dL/dalpha = d grad_alpha and dL/dc = d_e grad_c.

    Parameters: alpha, c : numbers; q, d, d_e : integers
        overlaps : (B, T), the q selected positions first
    Returns: loss, grad_alpha, grad_c, averaged over the rows
    Raises: ValueError : bad sizes, q > T, entries not finite; OverflowError
    References: derived here.
    >>> result = stochastic_loss_and_grads(1.0, 0.0, [[1.0, 0.0, 0.0, 0.0]], q=1, d=2, d_e=8)
    >>> [round(float(x), 6) for x in result]
    [0.75, 0.0, -0.046875]
    """
    a = softmax(c * overlaps)
    ua = overlaps * a
    p = a[:, :q].sum(axis=1)
    N = np.einsum("bt,bt->b", a, a)

    miss_on = ((alpha * a[:, :q] - 1 / q)**2).sum()
    miss_off = np.einsum("bt,bt->", a[:, q:], a[:, q:])
    loss = d / 2 * (miss_on + alpha * alpha * miss_off) / len(a)        # (P1)
    grad_alpha = alpha * N.mean() - p.mean() / q                        # (S2)

    # (S3) <u, grad_s> = <u a, g> - <a, g> <u, a> with g = d alpha (alpha a - s_y / q) from (P3)
    ua_g = alpha * np.einsum("bt,bt->b", ua, a) - ua[:, :q].sum(axis=1) / q
    a_g = alpha * N - p / q
    grad_c = d * alpha * (ua_g - a_g * ua.sum(axis=1)).mean() / d_e
    return float(loss), grad_alpha, grad_c


# ---- the fully-connected network (F) ----

@checked(W1="m n", b1="m", A="d m", b2="d", inputs="B n", target="B d")
def fcn_lines(W1, b1, A, b2, inputs, target):
    """Every line of `fcn_loss_and_grads` by its name, the loss and all gradients summed over B.

    Parameters: as there
    Returns: a dictionary of pre, hidden, delta (B, m), f, r (B, d), and the sums
    Raises: ValueError, OverflowError : as there
    >>> fcn_lines([[2.0]], [0.0], [[1.0]], [0.0], [[3.0]], [[5.0]])["hidden"].tolist()
    [[6.0]]
    """
    pre = inputs @ W1.T + b1                            # (F1) pre = W1 x + b1
    hidden = (pre > 0) * pre                            # (F1) relu(pre), NaN where pre is infinite
    f = hidden @ A.T + b2                               # (F1) f = A hidden + b2
    r = f - target                                      # (F1) r = f - target, L = (1/2) ||r||^2
    grad_A = r.T @ hidden                               # (F2) grad_A = r hidden^T
    grad_b2 = r.sum(axis=0)                             # (F2) grad_b2 = r
    delta = (r @ A) * (pre > 0)                         # (F2) delta = (A^T r) * relu'(pre)
    grad_W1 = delta.T @ inputs                          # (F2) grad_W1 = delta x^T
    grad_b1 = delta.sum(axis=0)                         # (F2) grad_b1 = delta

    loss = 0.5 * float(np.vdot(r, r))
    return dict(pre=pre, hidden=hidden, f=f, r=r, loss=loss, grad_A=grad_A, grad_b2=grad_b2,
                delta=delta, grad_W1=grad_W1, grad_b1=grad_b1)


@checked(W1="m n", b1="m", A="d m", b2="d", inputs="B n", target="B d")
def fcn_loss_and_grads(W1, b1, A, b2, inputs, target):
    """Loss and gradients of the network f = A relu(W1 x + b1) + b2, batch means (F1, F2).

    Parameters: W1 : (m, n); b1 : (m,); A : (d, m); b2 : (d,); inputs : (B, n); target : (B, d)
    Returns: loss, grad_W1, grad_b1, grad_A, grad_b2; relu has derivative 0 at 0
    Raises: ValueError : shapes that do not fit, entries not finite; OverflowError
    References: derived here.
    >>> result = fcn_loss_and_grads([[2.0]], [0.0], [[1.0]], [0.0], [[3.0]], [[5.0]])
    >>> [float(np.sum(x)) for x in result]
    [0.5, 3.0, 1.0, 6.0, 1.0]
    """
    lines = fcn_lines(W1, b1, A, b2, inputs, target)
    names = "loss", "grad_W1", "grad_b1", "grad_A", "grad_b2"
    return tuple(lines[name] / len(inputs) for name in names)


# ---- the door: what the words of a contract ask, and how it is refused ----
#
# A contract gives each argument a kind:
#   "B d T"                an array of this shape; a letter is one size throughout a call
#   "d_e T | B d_e T"      one shape or the other; "... T" is any shape with an axis at least
#   "B T of 0/1"           rows with the same number q of ones
#   "number", "size", ...  one, of NUMBERS or INTEGERS; "numbers", "sizes": arrays that broadcast
#   "size <= T"            with a bound; "size or None"
#   "rng", "flag", ...     one of OBJECTS; a dictionary stands for its keys
# `returns` is the largest array that the function makes.

OBJECTS = {  # the class, and its name in a message
    "rng": (np.random.Generator, "a numpy Generator"),
    "function": (collections.abc.Callable, "a function"),
    "flag": (bool, "True or False"),
    "arrays": (tuple, "a tuple of arrays, at least one"),
}
INTEGERS = {"size": 1, "count": 0}  # the least that is let in
NUMBERS = {  # those that are let in, where they are finite
    "": np.isfinite,
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    ">= 1": lambda x: x >= 1,
    "in (0, 1)": lambda x: (x > 0) & (x < 1),
}
PLURALS = "numbers", "sizes", "counts"  # one, or an array of them
running = threading.local()  # .checked while a checked function runs: what it calls needs no check
signature = functools.lru_cache(None)(inspect.signature)


def enter(function, args, named):
    """The function's result for arguments that keep its contract."""
    if getattr(running, "checked", False):
        return function(*args, **named)
    call = signature(function).bind(*args, **named)

    with np.errstate(all="ignore"):
        admit_all(call.arguments, function.contract)
        try:
            running.checked = True
            result = function(*call.args, **call.kwargs)
        finally:
            running.checked = False

        if not all(map(finite, parts(result))):
            for name, value in call.arguments.items():
                require_finite(name, value)
            wanted = "a result exceeds float64, the arguments are too large"
            raise OverflowError(f"{function.__name__}: {wanted}")
    return result


def require(holds, name, wanted, got):
    """The one way in which an argument is refused."""
    if not holds:
        raise ValueError(f"{name} must be {wanted}; got {got!r:.70}")


def parts(result):
    """The values of a dictionary or a tuple, or the result itself."""
    if isinstance(result, dict):
        return result.values()
    return result if isinstance(result, tuple) else (result,)


def finite(value):
    """Whether all numbers are finite; what is no number or array is."""
    numbers = value if isinstance(value, (float, np.ndarray)) else 0.0
    total = np.add.reduce(numbers, axis=None)
    return math.isfinite(total) or np.isfinite(numbers).all()  # seldom a copy


def require_finite(name, value):
    if not finite(value):
        require(False, name, "finite", float(value[~np.isfinite(value)][0]))


def admit_all(given, contract):
    """Put in place of each argument what is let in: float64, int, or the object that it is."""
    sizes = {}  # by the name of a dimension: its size, and the argument that has it
    for name, value in given.items():
        given[name] = admit(name, value, contract[name], sizes)

    require_broadcast(given, contract)
    require_bounds(given, contract, sizes)
    if "returns" in contract:
        require_room(contract["returns"], sizes)


def admit(name, value, kind, sizes):
    """One argument by its kind; a size that it fixes goes to `sizes`."""
    if isinstance(kind, dict):
        known = isinstance(value, str) and value in kind
        require(known, name, f"one of {', '.join(kind)}", value)
        return value
    if kind in OBJECTS:
        return admit_object(name, value, kind)
    if value is None and kind.endswith("or None"):
        return value

    array = real(name, value)
    word, _, bound = kind.partition(" ")
    one = word.rstrip("s")
    if one == "number":
        return admit_number(name, array, word, bound)
    if one in INTEGERS:
        return admit_integer(name, array, word, sizes)
    return admit_array(name, array, kind, sizes)


def admit_object(name, value, kind):
    """A Generator, a function, a flag, or a tuple of arrays."""
    wanted_class, wanted = OBJECTS[kind]
    require(isinstance(value, wanted_class), name, wanted, value)
    if kind != "arrays":
        return value
    require(len(value) > 0, name, wanted, value)
    return tuple(admit(f"{name}[{k}]", part, "numbers", {}) for k, part in enumerate(value))


def real(name, value):
    """value as an array of real numbers: not ragged, masked, empty, text or complex."""
    array = value
    kinds = "biuf"
    if not isinstance(value, np.ndarray):
        try:
            np.asarray(value, dtype=float)  # refuses ragged rows, without a warning
            array = np.asarray(value)
            if array.dtype == object and all(isinstance(x, int) for x in array.flat):
                kinds = "O"                 # Python integers beyond 64 bits
        except (TypeError, ValueError, OverflowError):
            array = np.array(None)

    usable = array.dtype.kind in kinds and array.size and not isinstance(array, np.ma.MaskedArray)
    require(usable, name, "real numbers, at least one", value)
    return np.asarray(array)  # without the rules of a subclass, such as a matrix's product


def admit_number(name, array, word, bound):
    """Finite numbers within a bound of NUMBERS: one, or (plural) an array."""
    many = word.endswith("s")
    value = array.astype(float)[()]
    holds = array.dtype.kind != "b" and np.isfinite(value) & NUMBERS[bound](value)
    wanted = f"{'finite numbers' if many else 'one finite number'} {bound}".strip()
    require(np.all(holds) and (many or not array.ndim), name, wanted, array.tolist())
    return value if many else float(value)


def admit_integer(name, array, word, sizes):
    """Integers from the least of INTEGERS on: one, or (plural) an array."""
    many = word.endswith("s")
    least = INTEGERS[word.rstrip("s")]
    holds = array.dtype.kind in "iu" and (array >= least) & (array < 2**63)
    wanted = f"{'integers' if many else 'an integer'} >= {least}, below 2^63"
    require(np.all(holds) and (many or not array.ndim), name, wanted, array.tolist())

    value = array.astype(np.int64) if array.ndim else int(array)
    sizes[name] = value, name
    return value


def admit_array(name, array, kind, sizes):
    """An array in float64, of a shape that agrees with the arguments before it."""
    require_shape(name, array.shape, shapes_of(kind), sizes)

    if array.dtype != float:
        large = array.dtype.kind in "iuO" and ((array < -2**53) | (array > 2**53)).any()
        require(not large, name, "numbers that float64 holds, integers within 2^53", array)
        array = array.astype(float)

    if kind.endswith("of 0/1"):
        q = array[0].sum()
        equal = ((array == 0) | (array == 1)).all() and q >= 1 and (array.sum(axis=-1) == q).all()
        require(equal, name, "rows of 0 and 1 with the same number q >= 1 of ones", array)
        sizes["q"] = int(q), name
    elif array.ndim < 3 or "B" not in kind:  # large data wait until a result is not finite
        require_finite(name, array)
    return array


def shapes_of(kind):
    """The shapes that a kind allows: "d_e T | B d_e T" gives [["d_e", "T"], ["B", "d_e", "T"]]."""
    return [shape.split() for shape in kind.removesuffix(" of 0/1").split(" | ")]


def require_shape(name, found, shapes, sizes):
    """One of the shapes has as many axes, of sizes that agree with those known."""
    if found and shapes[0][0] == "...":
        return
    shape = shapes[0] if len(shapes[0]) == len(found) else shapes[-1]
    agree = len(shape) == len(found)
    for dim, size in zip(shape, found):
        agree = agree and sizes.setdefault(dim, (size, name))[0] == size

    if not agree:
        fixed = [f"{dim} = {sizes[dim][0]} as in {sizes[dim][1]}" for dim in shape
                 if dim in sizes and sizes[dim][1] != name]
        wanted = " or ".join(str(tuple(shape)) for shape in shapes).replace("'", "")
        if fixed:
            wanted += f" with {', '.join(fixed)}"
        require(False, name, f"of shape {wanted}", found)


# ---- what arguments must be together ----

def require_broadcast(given, contract):
    """The arrays in places where one number would do broadcast, to what can be allocated."""
    shapes = {}
    for name, value in given.items():
        if isinstance(value, np.ndarray) and contract[name].startswith(PLURALS):
            shapes[name] = value.shape
    try:
        count = math.prod(np.broadcast_shapes(*shapes.values()))
    except ValueError:
        count = math.inf
    wanted = "of shapes that broadcast, to at most 2^30 numbers"
    require(count <= 2**30, ", ".join(shapes), wanted, shapes)


def require_bounds(given, contract, sizes):
    """Sizes are within bounds such as "<= T", "< T" and "< T/2"."""
    for name, value in given.items():
        if "<" in contract[name]:
            _, sign, limit = contract[name].split()
            other, _, factor = limit.partition("/")
            room = sizes[other][0] - value * int(factor or 1)
            holds = room > 0 if sign == "<" else room >= 0
            wanted = f"{'below' if sign == '<' else 'at most'} {limit}, {other} = {sizes[other][0]}"
            require(np.all(holds), name, wanted, np.asarray(value).tolist())


def require_room(shapes, sizes):
    """No array that a function returns is beyond what can be allocated."""
    wanted = "so small that arrays have at most 2^30 numbers"
    for shape in shapes_of(shapes):
        known = {dim: sizes[dim][0] for dim in shape if dim in sizes}
        count = math.prod(known.get(dim, 1) for dim in shape)
        require(count <= 2**30, ", ".join(known), wanted, known)
