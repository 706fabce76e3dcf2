"""The engine's functions for cells over their whole range, in units in the last place (ulp)."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from rnnkern import _numpy

BOUND = {np.float32: 2.0, np.float64: 4.0}
TWO_ULP = ("log", "softplus", "log_sigmoid")  # in either type


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x) without cancellation or overflow on either side."""
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1.0) / (1.0 + e)


EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp,
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "log": np.log,
    "softplus": lambda x: np.logaddexp(0, x),
    "log_sigmoid": lambda x: -np.logaddexp(0, -x),
}


@pytest.fixture(params=_numpy.isas())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _numpy.isa()
    _numpy.set_isa(request.param)
    yield request.param
    _numpy.set_isa(before)


def sweep(dtype: type) -> np.ndarray:
    """Both signs of every magnitude from the subnormals to the largest value, 64 Ki points each:
    evenly over the numbers' bit patterns, and evenly over the range where the functions move."""
    bits, info = {np.float32: np.uint32, np.float64: np.uint64}[dtype], np.finfo(dtype)
    largest = int(np.array(info.max, dtype).view(bits))
    patterns = np.linspace(0, largest, 2**16).astype(np.float64).astype(bits).view(dtype)
    patterns = patterns[np.isfinite(patterns)]
    limit = 1.1 * np.log(float(info.max))
    positive = np.concatenate([patterns, np.linspace(0, limit, 2**16).astype(dtype)])
    return np.concatenate([positive, -positive])


def ulps(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Error in units of the spacing of `got`'s dtype at the exact value, subnormal or not."""
    spacing = np.spacing(np.abs(exact).astype(got.dtype)).astype(np.longdouble)
    return np.abs(got - exact) / spacing


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", EXACT)
def test_ulp(level: str, name: str, dtype: type) -> None:
    """Against the functions in extended precision."""
    x = sweep(dtype)
    x = x[x > 0] if name == "log" else x
    with np.errstate(over="ignore", under="ignore"):
        exact = EXACT[name](x.astype(np.longdouble))
        representable = np.abs(exact) <= np.finfo(dtype).max
        got = _numpy.math(name, x)
        error = ulps(got[representable], exact[representable])
    worst = error.argmax()
    bound = 2.0 if name in TWO_ULP else BOUND[dtype]
    assert error[worst] <= bound, (x[representable][worst], error[worst])
    assert np.isposinf(got[~representable]).all()  # exp overflows to infinity, as NumPy's does


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(level: str, dtype: type) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], dtype)
    np.testing.assert_array_equal(_numpy.math("exp", x), [np.nan, np.inf, 0, 1, 1])
    np.testing.assert_array_equal(_numpy.math("sigmoid", x), [np.nan, 1, 0, 0.5, 0.5])
    tanh = _numpy.math("tanh", x)
    np.testing.assert_array_equal(tanh, [np.nan, 1, -1, 0, 0])
    np.testing.assert_array_equal(np.signbit(tanh[3:]), [False, True])
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0], dtype)
    infinity = np.inf
    np.testing.assert_array_equal(
        _numpy.math("log", x), [np.nan, infinity, np.nan, -infinity, -infinity, np.nan]
    )
    np.testing.assert_array_equal(_numpy.math("softplus", x)[:3], [np.nan, infinity, 0])
    np.testing.assert_array_equal(_numpy.math("log_sigmoid", x)[:3], [np.nan, 0, -infinity])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", EXACT)
def test_tails(level: str, name: str, dtype: type) -> None:
    """A value's result does not depend on its place in the vector."""
    x = np.linspace(0.1 if name == "log" else -5, 5, 67).astype(dtype)
    whole = _numpy.math(name, x)
    for count in range(1, 67):
        np.testing.assert_array_equal(_numpy.math(name, x[:count]), whole[:count])
