"""JAX: a lax.scan over the steps under jit, the input's product ahead of it, gradients by vjp."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import torch
from jax import Array
from jax import numpy as jnp
from jax.extend.backend import clear_backends
from rows import Row
from torch import Tensor

Weights = dict[str, Array]
State = tuple[Array, ...]


def _direction(
    cell: str, weights: list[Array], x: Array, state: State, reverse: bool
) -> tuple[State, Array]:
    """One direction of one layer on x (T, B, I): the last state and the outputs."""
    w_ih, w_hh, b_ih, b_hh, *w_hr = weights

    def step(state: State, p: Array) -> tuple[State, Array]:
        h, *c = state
        q = h @ w_hh.T + b_hh
        if cell == "LSTM":
            i, f, g, o = jnp.split(p + q, 4, axis=-1)
            c = [jax.nn.sigmoid(f) * c[0] + jax.nn.sigmoid(i) * jnp.tanh(g)]
            h = jax.nn.sigmoid(o) * jnp.tanh(c[0])
            h = h @ w_hr[0].T if w_hr else h
        elif cell == "GRU":
            (pr, pz, pn), (qr, qz, qn) = jnp.split(p, 3, axis=-1), jnp.split(q, 3, axis=-1)
            n = jnp.tanh(pn + jax.nn.sigmoid(pr + qr) * qn)
            h = n + jax.nn.sigmoid(pz + qz) * (h - n)
        else:
            h = jnp.tanh(p + q)
        return (h, *c), h

    last: State
    last, y = jax.lax.scan(step, state, x @ w_ih.T + b_ih, reverse=reverse)
    return last, y


def _forward(row: Row, weights: Weights, x: Array, hx: State) -> dict[str, Array]:
    """The whole stack: the results by name."""
    x = x.swapaxes(0, 1) if row.batch_first else x
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", *(["weight_hr"] if row.proj else [])]
    suffixes = ["", "_reverse"][: row.directions]
    states: list[State] = []
    for layer in range(row.L):
        outputs = []
        for suffix in suffixes:
            own = [weights[f"{name}_l{layer}{suffix}"] for name in names]
            first = tuple(s[len(states)] for s in hx)
            last, y = _direction(row.cell, own, x, first, bool(suffix))
            states.append(last)
            outputs.append(y)
        x = jnp.concatenate(outputs, axis=-1)
    output = x.swapaxes(0, 1) if row.batch_first else x
    finals = map(jnp.stack, zip(*states, strict=True))
    return {"output": output, **dict(zip(("h_n", "c_n"), finals, strict=False))}


def _train(row: Row, weights: Weights, x: Array, hx: State, gradient: Array) -> dict[str, Array]:
    """Results and gradients by name."""

    def read_by_loss(weights: Weights, x: Array) -> tuple[Array, dict[str, Array]]:
        results = _forward(row, weights, x, hx)
        return results[row.loss_on], results

    if row.input_requires_grad:
        _, backward, results = jax.vjp(read_by_loss, weights, x, has_aux=True)
        grads, results["input.grad"] = backward(gradient)
    else:
        _, backward, results = jax.vjp(lambda w: read_by_loss(w, x), weights, has_aux=True)
        (grads,) = backward(gradient)
    found: dict[str, Array] = results | {f"{name}.grad": g for name, g in grads.items()}
    return found


def _array(t: Tensor) -> Array:
    return jnp.asarray(t.detach().numpy())


class Peer:
    def __init__(self, row: Row, threads: int) -> None:
        if os.environ.get("NPROC") != str(threads):
            os.environ["NPROC"] = str(threads)  # XLA reads it when it makes its pools
            clear_backends()
        weights = {k: _array(w) for k, w in row.layer(torch.nn).state_dict().items()}
        x, given = row.inputs()
        widths = (row.R, row.H) if row.has_c else (row.R,)
        zeros = [torch.zeros(row.num_states, row.B, width) for width in widths]
        states = tuple(map(_array, given or zeros))
        gradient = (_array(row.gradient()),) if row.train else ()
        args = (weights, _array(x), states, *gradient)
        run = jax.jit(partial(_train if row.train else _forward, row))
        self.run = partial(run, *args)

    @property
    def call(self) -> Callable[[], object]:
        return lambda: jax.block_until_ready(self.run())

    def results(self) -> dict[str, Tensor]:
        return {k: torch.from_numpy(np.array(v)) for k, v in self.run().items()}
