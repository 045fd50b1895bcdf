"""Hand-derived gradients for sparse token selection: attention, its exact population average, FCN.

NumPy only, and complete: this file works when copied alone. Tags such as (A5) are the equations that
README.md derives. Every loss is L = (1/2) E ||f - target||^2, factor 1/2 included, and every function
returns (loss, *grads), the gradients in the order and shape of the parameters.
"""
import numpy as np

PIECE = 300_000  # numbers of Z (2.4 MB) worked on at a time, so that they stay in cache for all four uses


def _quiet(function):
    """No warning of an overflow: it is raised as an error, by `_check_results`."""
    return np.errstate(all="ignore")(function)


# ---- the door: what each function asks of its arguments (for the mathematics go on to "attention") ------

def _one_or_all(values):
    return values if len(values) > 1 else values[0]


def _as_real(name, value):
    """value as an array of real numbers, else an error that names it."""
    try:
        array = np.asarray(None if isinstance(value, np.ma.MaskedArray) else value)
        if array.dtype.kind == "f" or array.dtype == object and all(isinstance(x, int) for x in array.flat):
            array = array.astype(float, copy=False)  # float32 and the like; Python integers beyond 64 bits
    except (ValueError, OverflowError, Warning):  # ragged rows; an integer beyond float64
        array = np.asarray(None)
    if array.dtype.kind not in "biuf" or array.size == 0:
        raise ValueError(f"{name} must be real numbers, at least one; got {type(value).__name__} {value!r:.60}")
    return array


def _arrays(spec, *values):
    """Each value as float64, its shape matched to a spec such as "V:dD Z:BDT E:eT|BeT" (e is d_e)."""
    sizes, arrays = {}, []
    for item, value in zip(spec.split(), values):
        name, shapes = item.split(":")
        shapes, array = shapes.split("|"), _as_real(name, value)
        shape = next((s for s in shapes if len(s) == array.ndim), shapes[0])
        known = {letter: sizes[letter] for letter in shape if letter in sizes}
        if len(shape) != array.ndim or any(
                sizes.setdefault(letter, size) != size for letter, size in zip(shape, array.shape)):
            wanted = " or ".join(str(tuple(s)).replace("'", "").replace("e", "d_e") for s in shapes)
            fixed = ", ".join(f"{x} = {size}" for x, size in known.items()).replace("e", "d_e")
            raise ValueError(f"{name} must have shape {wanted}{fixed and ' with ' + fixed}; got shape {array.shape}")
        arrays.append(array.astype(float, copy=False))
    return _one_or_all(arrays)


def _finite(**arrays):
    """Refuse NaN and infinities, naming the argument."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite; got {np.ravel(array)[~np.isfinite(np.ravel(array))][0]}")


def _reals(**values):
    """Numbers, or arrays of them: finite, in float64."""
    arrays = []
    for name, value in values.items():
        array = _as_real(name, value)
        if array.dtype.kind == "b":
            raise ValueError(f"{name} must be real numbers; got {value!r:.60}")
        _finite(**{name: array})
        arrays.append(array.astype(float)[()])
    return _one_or_all(arrays)


def _broadcast(**values):
    try:
        return np.broadcast_shapes(*map(np.shape, values.values()))
    except ValueError:
        raise ValueError(f"{', '.join(values)} must have shapes that broadcast; "
                         f"got {', '.join(str(np.shape(value)) for value in values.values())}") from None


def _numbers(above=-np.inf, below=np.inf, **values):
    """Single numbers strictly between the bounds, as floats."""
    numbers = []
    for name, value in values.items():
        number = _reals(**{name: value})
        if np.ndim(number) or not above < number < below:
            bounds = f"{f' above {above:g}' * (above > -np.inf)}{f' below {below:g}' * (below < np.inf)}"
            raise ValueError(f"{name} must be one finite number{bounds}; got {value!r:.60}")
        numbers.append(float(number))
    return _one_or_all(numbers)


def _sizes(many=False, least=1, **sizes):
    """Integers >= least that fit int64, as int (or arrays that broadcast, if many); q must be at most T."""
    out = []
    for name, size in sizes.items():
        array = _as_real(name, size)
        if array.dtype.kind not in "iu" or (array.ndim and not many) or not ((array >= least) & (array < 2**63)).all():
            raise ValueError(f"{name} must be {'integers' if many else 'an integer'} >= {least}, below 2^63; "
                             f"got {size!r:.60}")
        out.append(array.astype(np.int64) if array.ndim else int(array))
    if many:
        _broadcast(**sizes)
    if "q" in sizes and "T" in sizes and np.any(np.greater(sizes["q"], sizes["T"])):
        raise ValueError(f"q must be at most T = {sizes['T']}; got {sizes['q']}")
    return _one_or_all(out)


def _selection(selected):
    """q, after refusing rows that are not 0 and 1 with the same number q >= 1 of ones."""
    ones = selected.sum(axis=-1)
    if not ((selected == 0) | (selected == 1)).all() or ones[0] < 1 or (ones != ones[0]).any():
        raise ValueError("selected must have rows of 0 and 1 with the same number q >= 1 of ones; "
                         f"got row sums from {ones.min():g} to {ones.max():g}")
    return int(ones[0])


def _check_results(*results, **inputs):
    """Where a result is not finite, name the input that is not, or say that float64 overflows."""
    if not all(np.isfinite(result).all() for result in results):
        _finite(**inputs)
        raise OverflowError("the loss or a gradient exceeds float64: parameters or inputs too large")


# ---- attention (A) --------------------------------------------------------------------------------

@_quiet
def softmax(scores):
    """Softmax over the last axis (A2): a_i = e^{s_i} / sum_j e^{s_j}.

    The row's maximum is subtracted first, so that no finite score up to 1e300 in size overflows.

    Parameters: scores : (..., T)
    Returns: (..., T), rows >= 0 that sum to 1
    Raises: ValueError : scores empty, a single number, not real or not finite
    >>> softmax([0.0, 1e300]).tolist()
    [0.0, 1.0]
    """
    scores = _as_real("scores", scores)
    if scores.ndim == 0:
        raise ValueError(f"scores must have a last axis to sum over; got the number {scores}")
    _finite(scores=scores)
    return _softmax(scores)


def _softmax(scores):
    """`softmax` without the door: what is not finite comes out as NaN, for the caller to refuse."""
    weights = np.subtract(scores, scores.max(axis=-1, keepdims=True), dtype=float)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


@_quiet
def attention_loss_and_grads(V, W, Z, z_query, target):
    """Loss and gradients of one softmax-attention layer f = V Z softmax(Z^T W z_q) (A1)-(A8).

    With r = f - target and L = (1/2) mean ||r||^2 over the batch:
    grad_V = r (Z a)^T and grad_W = Z grad_s z_q^T, grad_s = a * (g - <a, g>), g = Z^T V^T r.

    Parameters: V : (d, D) value matrix; W : (D, D) merged key-query matrix
        Z : (B, D, T) tokens, one a column; z_query : (B, D) query tokens; target : (B, d)
    Returns: loss, grad_V (d, D), grad_W (D, D)
    Raises: ValueError : shapes that do not fit, entries not real or not finite
        OverflowError : finite inputs, but a result beyond float64
    References: The model is the paper's; the gradients are derived here.
    >>> loss, grad_V, grad_W = attention_loss_and_grads([[0.0]], [[0.0]], [[[1.0, 3.0]]], [[1.0]], [[2.0]])
    >>> loss, grad_V.tolist(), grad_W.tolist()
    (2.0, [[-4.0]], [[0.0]])
    """
    V, W, Z, z_query, target = _arrays("V:dD W:DD Z:BDT z_query:BD target:Bd", V, W, Z, z_query, target)
    _finite(V=V, W=W)
    B, D, T = Z.shape
    loss, grad_V, grad_W = 0.0, np.zeros_like(V), np.zeros_like(W)
    step = max(4, PIECE // (D * T))
    for start in range(0, B, step):
        Z_, z_q, y = (x[start:start + step] for x in (Z, z_query, target))
        s = ((z_q @ W.T)[:, None, :] @ Z_)[:, 0, :]                   # (A1) s = Z^T W z_q
        a = _softmax(s)                                               # (A2) a = softmax(s)
        Za = (Z_ @ a[:, :, None])[:, :, 0]
        f = Za @ V.T                                                  # (A3) f = V Z a
        r = f - y                                                     # (A4) r = f - target
        grad_V += r.T @ Za                                            # (A5) grad_V = r (Z a)^T
        g = ((r @ V)[:, None, :] @ Z_)[:, 0, :]                       # (A6) g = Z^T V^T r
        grad_s = a * (g - (a * g).sum(axis=1, keepdims=True))         # (A7) grad_s = a * (g - <a, g>)
        grad_W += (Z_ @ grad_s[:, :, None])[:, :, 0].T @ z_q          # (A8) grad_W = Z grad_s z_q^T
        loss += 0.5 * float(np.vdot(r, r))
    _check_results(loss, grad_V, grad_W, Z=Z, z_query=z_query, target=target)
    return loss / B, grad_V / B, grad_W / B


# ---- the population: exact over X (P), one-hot encodings (O), stochastic encodings (S) ---------------

@_quiet
def population_loss_and_grads(V, W, E, e_query, selected):
    """Population loss and gradients of f = V X softmax(E^T W e_y), exact over X (P1)-(P4).

    Tokens enter by E[x_i x_j^T] = 1[i = j] I alone (P5). Averaged over the rows given: every q-subset once for the
    whole population over y (`all_subsets` in sparse_token_selection.py), fresh draws for stochastic encodings.

    Parameters: V : (d, d); W : (d_e, d_e)
        E : (d_e, T) shared by all rows, or (B, d_e, T) one a row; e_query : (B, d_e), for one-hot E `selected`
        selected : (B, T) rows of 0 and 1 with q ones each
    Returns: loss, grad_V (d, d), grad_W (d_e, d_e)
    Raises: ValueError : shapes that do not fit, rows without q ones, entries not real or not finite
        OverflowError : finite inputs, but a result beyond float64
    References: Derived here.
    >>> loss, grad_V, _ = population_loss_and_grads([[0.0]], np.zeros((3, 3)), np.eye(3), [[1, 1, 0]], [[1, 1, 0]])
    >>> loss, round(grad_V.item(), 6)
    (0.25, -0.333333)
    """
    V, W, E, e_query, selected = _arrays("V:dd W:ee E:eT|BeT e_query:Be selected:BT", V, W, E, e_query, selected)
    _finite(V=V, W=W)
    B, d, q = len(selected), len(V), _selection(selected)
    key = e_query @ W.T
    s = key @ E if E.ndim == 2 else (key[:, None, :] @ E)[:, 0, :]
    a = _softmax(s)
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
    E_grad_s = grad_s @ E.T if E.ndim == 2 else (E @ grad_s[:, :, None])[:, :, 0]
    grad_W = E_grad_s.T @ e_query / B                                 # (P4)
    _check_results(loss, grad_V, grad_W, E=E, e_query=e_query)
    return float(loss), grad_V, grad_W


def _one_hot(alpha, omega, T, q, d):
    """`one_hot_loss_and_grads` without the door, for recursions that check once."""
    others, shift = T - q, np.maximum(omega, 0.0)  # e^omega and 1, both times e^-shift, which drops out of a
    # Never 0/0: at q = T there is no other position, and the weight on y is 1 whatever omega.
    on, off = np.exp((omega - shift) * (others > 0)), np.exp(-shift)
    total = q * on + others * off
    a_on, a_off = on / total, off / total        # attention on one selected, on one other position
    p, rest = q * a_on, others * a_off           # their sums: p on y, 1 - p elsewhere
    miss = ((1 - alpha) + alpha * rest) / q      # (1 - alpha p)/q, without cancellation at alpha = p = 1
    loss = d / 2 * (q * miss**2 + others * (alpha * a_off)**2)        # (O2)
    grad_alpha = alpha * rest * a_off - p * miss                      # (O3) alpha N - p/q; p miss = p/q - alpha p^2/q
    delta = d * alpha * (miss + alpha * a_off)                        # (O4)
    grad_omega = -p * rest * delta / np.maximum(T - 1, 1)
    return loss, grad_alpha, grad_omega


@_quiet
def one_hot_loss_and_grads(alpha, omega, T, q, d):
    """Loss and gradients on the line V = alpha I, W = omega (I - 11^T/T), orthonormal E (O2)-(O4).

    The gradients are the coefficients of the matrix gradients, grad_V = grad_alpha I and
    grad_W = grad_omega (I - 11^T/T): alpha - eta grad_alpha and omega - eta grad_omega are the next
    scalars. As derivatives of the loss, dL/dalpha = d grad_alpha and dL/domega = (T-1) grad_omega.
    For q = T attention cannot move: p = 1 and grad_omega = 0.

    Parameters: alpha, omega : numbers or arrays; T, q, d : integers or arrays of them; all broadcast
    Returns: loss, grad_alpha, grad_omega, in the broadcast shape
    Raises: ValueError : sizes that are not integers >= 1, q > T, parameters not real or not finite
        OverflowError : finite inputs, but a result beyond float64
    References: Derived here.
    >>> [round(float(x), 6) for x in one_hot_loss_and_grads(1.0, 0.0, T=4, q=1, d=2)]
    [0.75, 0.0, -0.125]
    """
    T, q, d = _sizes(many=True, T=T, q=q, d=d)
    alpha, omega = _reals(alpha=alpha, omega=omega)
    shape = _broadcast(alpha=alpha, omega=omega, T=T, q=q, d=d)
    loss, grad_alpha, grad_omega = _one_hot(alpha, omega, T, q, d)
    _check_results(loss, grad_alpha, grad_omega)
    return loss, grad_alpha + np.zeros(shape), grad_omega             # grad_alpha is the same for every d


@_quiet
def stochastic_loss_and_grads(alpha, c, overlaps, q, d, d_e):
    """Loss and gradients on the line V = alpha I, W = c I, from overlaps u = E^T e_y (S2, S3).

    a = softmax(c u). The gradients are the coefficients of the matrix gradients, grad_V = grad_alpha I
    and grad_W = grad_c I: alpha - eta grad_alpha and c - eta grad_c are the next scalars
    (dL/dalpha = d grad_alpha, dL/dc = d_e grad_c).

    Parameters: alpha, c : numbers; overlaps : (B, T), the q selected positions first; q, d, d_e : integers
    Returns: loss, grad_alpha, grad_c, averaged over the rows
    Raises: ValueError : sizes that are not integers >= 1, q > T, entries not real or not finite
        OverflowError : finite inputs, but a result beyond float64
    References: Derived here.
    >>> [round(float(x), 6) for x in stochastic_loss_and_grads(1.0, 0.0, [[1.0, 0.0, 0.0, 0.0]], 1, 2, 8)]
    [0.75, 0.0, -0.046875]
    """
    u = _arrays("overlaps:BT", overlaps)
    _, q, d, d_e = _sizes(T=u.shape[1], q=q, d=d, d_e=d_e)
    alpha, c = _numbers(alpha=alpha, c=c)
    a = _softmax(c * u)
    ua = u * a
    p, N = a[:, :q].sum(axis=1), np.einsum("bt,bt->b", a, a)
    miss_off = np.einsum("bt,bt->", a[:, q:], a[:, q:])
    miss_on = ((alpha * a[:, :q] - 1 / q)**2).sum()
    loss = d / 2 * (miss_on + alpha * alpha * miss_off) / len(u)      # (P1) at V = alpha I
    grad_alpha = alpha * N.mean() - p.mean() / q                      # (S2)
    # (S3) <u, grad_s> = <u a, g> - <a, g> <u, a> with g = d alpha (alpha a - s_y / q) from (P3)
    ua_g = alpha * np.einsum("bt,bt->b", ua, a) - ua[:, :q].sum(axis=1) / q
    a_g = alpha * N - p / q
    grad_c = d * alpha * (ua_g - a_g * ua.sum(axis=1)).mean() / d_e
    _check_results(loss, grad_alpha, grad_c, overlaps=u)
    return float(loss), grad_alpha, grad_c


# ---- fully-connected network (F) -------------------------------------------------------------------

@_quiet
def fcn_loss_and_grads(W1, b1, A, b2, inputs, target):
    """Loss and gradients of the two-layer network f = A relu(W1 x + b1) + b2 (F1, F2).

    Parameters: W1 : (m, n); b1 : (m,); A : (d, m); b2 : (d,)
        inputs : (B, n); target : (B, d)
    Returns: loss, grad_W1, grad_b1, grad_A, grad_b2; relu has derivative 0 at 0
    Raises: ValueError : shapes that do not fit, entries not real or not finite
        OverflowError : finite inputs, but a result beyond float64
    References: Derived here (standard back-propagation).
    >>> loss, *grads = fcn_loss_and_grads([[2.0]], [0.0], [[1.0]], [0.0], [[3.0]], [[5.0]])
    >>> loss, [grad.item() for grad in grads]
    (0.5, [3.0, 1.0, 6.0, 1.0])
    """
    W1, b1, A, b2, inputs, target = _arrays("W1:mn b1:m A:dm b2:d inputs:Bn target:Bd",
                                            W1, b1, A, b2, inputs, target)
    _finite(W1=W1, b1=b1, A=A, b2=b2)
    B = len(inputs)
    pre = inputs @ W1.T + b1
    hidden = np.maximum(pre, 0.0)
    r = hidden @ A.T + b2 - target                  # (F1) r = f - target
    loss = 0.5 * float(np.vdot(r, r)) / B
    r = r / B                                       # (F2) from here on, the average over the batch
    grad_A, grad_b2 = r.T @ hidden, r.sum(axis=0)   # f = A hidden + b2
    delta = (r @ A) * (pre > 0)                     # hidden = relu(pre)
    grad_W1, grad_b1 = delta.T @ inputs, delta.sum(axis=0)  # pre = W1 x + b1
    _check_results(pre, loss, grad_W1, grad_b1, grad_A, grad_b2, inputs=inputs, target=target)
    return loss, grad_W1, grad_b1, grad_A, grad_b2
