"""The cells: their equations and the derivatives of these, one step at a time."""

import numpy as np

Array = np.ndarray
States = tuple[Array, ...]  # (h,) or (h, c), each (B, H)


def sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))  # never overflows


class RNN:
    """Elman's network (1990), the course's SimpleRNN: h' = tanh(W_ih x + b_ih + W_hh h + b_hh)."""

    gates = 1
    states = 1

    @staticmethod
    def step(p: Array, q: Array, prev: States) -> tuple[States, dict[str, Array]]:
        """States after the step, and the gates (none here) by name."""
        return (np.tanh(p + q),), {}

    @staticmethod
    def adjoint(
        saved: dict[str, Array], prev: States, after: States, d_after: States
    ) -> tuple[Array, Array, States, States]:
        """(d_p, d_q, d_prev, total): d_prev leaves out what flows through q = W_hh h + b_hh; total
        are the derivatives by the states after the step along every path."""
        (d_h,) = d_after
        d_sum = d_h * (1 - after[0] ** 2)
        return d_sum, d_sum, (np.zeros_like(d_h),), (d_h,)


class ReluRNN(RNN):
    """Elman's network with a rectifier: h' = max(0, W_ih x + b_ih + W_hh h + b_hh)."""

    @staticmethod
    def step(p: Array, q: Array, prev: States) -> tuple[States, dict[str, Array]]:
        return (np.maximum(p + q, 0),), {}

    @staticmethod
    def adjoint(
        saved: dict[str, Array], prev: States, after: States, d_after: States
    ) -> tuple[Array, Array, States, States]:
        (d_h,) = d_after
        d_sum = np.where(after[0] <= 0, 0, d_h)
        return d_sum, d_sum, (np.zeros_like(d_h),), (d_h,)


class LSTM:
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber &
    Cummins 2000), the course's SimpleLSTM.

    i, f, o = σ(p + q)     input, forget and output gate
    g       = tanh(p + q)  cell gate, the course's C̃
    c'      = f c + i g    cell state
    h'      = o tanh(c')   hidden state
    """

    gates = 4
    states = 2

    @staticmethod
    def step(p: Array, q: Array, prev: States) -> tuple[States, dict[str, Array]]:
        i, f, g, o = np.split(p + q, 4, axis=-1)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        c = f * prev[1] + i * g
        return (o * np.tanh(c), c), {"input": i, "forget": f, "cell": g, "output": o}

    @staticmethod
    def adjoint(
        saved: dict[str, Array], prev: States, after: States, d_after: States
    ) -> tuple[Array, Array, States, States]:
        i, f, g, o = (saved[name] for name in ("input", "forget", "cell", "output"))
        d_h, d_c = d_after
        tanh_c = np.tanh(after[1])
        d_c = d_c + d_h * o * (1 - tanh_c**2)  # c' acts through the next step and through h'
        d_i = d_c * g * i * (1 - i)
        d_f = d_c * prev[1] * f * (1 - f)
        d_g = d_c * i * (1 - g**2)
        d_o = d_h * tanh_c * o * (1 - o)
        d_sum = np.concatenate([d_i, d_f, d_g, d_o], axis=-1)
        # The path from c to c' is a product with f alone: where f is near 1 no gradient is lost.
        return d_sum, d_sum, (np.zeros_like(d_h), d_c * f), (d_h, d_c)


class GRU:
    """Gated recurrent unit (Cho et al. 2014) as torch.nn.GRU has it: the reset gate acts after the
    recurrent product, so the new gate's share of q, called q_n, is kept apart.

    r, z = σ(p + q)           reset and update gate
    n    = tanh(p + r q_n)    new gate
    h'   = (1 - z) n + z h
    """

    gates = 3
    states = 1

    @staticmethod
    def step(p: Array, q: Array, prev: States) -> tuple[States, dict[str, Array]]:
        (p_r, p_z, p_n), (q_r, q_z, q_n) = np.split(p, 3, axis=-1), np.split(q, 3, axis=-1)
        r, z = sigmoid(p_r + q_r), sigmoid(p_z + q_z)
        n = np.tanh(p_n + r * q_n)
        return ((1 - z) * n + z * prev[0],), {"reset": r, "update": z, "new": n, "q": q_n}

    @staticmethod
    def adjoint(
        saved: dict[str, Array], prev: States, after: States, d_after: States
    ) -> tuple[Array, Array, States, States]:
        r, z, n, q_n = (saved[name] for name in ("reset", "update", "new", "q"))
        (d_h,) = d_after
        d_n = d_h * (1 - z) * (1 - n**2)
        d_z = d_h * (prev[0] - n) * z * (1 - z)
        d_r = d_n * q_n * r * (1 - r)
        d_p = np.concatenate([d_r, d_z, d_n], axis=-1)
        d_q = np.concatenate([d_r, d_z, d_n * r], axis=-1)
        return d_p, d_q, (d_h * z,), (d_h,)


Cell = type[RNN] | type[LSTM] | type[GRU]
#: By torch.nn's mode.
CELLS: dict[str, Cell] = {"LSTM": LSTM, "GRU": GRU, "RNN_TANH": RNN, "RNN_RELU": ReluRNN}
