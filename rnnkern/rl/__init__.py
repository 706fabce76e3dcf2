"""Recurrent policies of reinforcement-learning libraries on layers that take resets.

    >>> model = RecurrentPPO("MlpLstmPolicy", "CartPole-v1")     # sb3-contrib
    >>> rnnkern.rl.convert(model)                                # the same training, faster

    >>> rnnkern.rl.convert(policy)                               # TorchRL: LSTMModule, GRUModule

    >>> def get_states(self, x, lstm_state, done):               # CleanRL: instead of its loop
    ...     return rnnkern.rl.get_states(self.lstm, self.network(x / 255), lstm_state, done)

TorchRL's modules are in torchrl.py.

RLlib and Sample Factory cut or pack their sequences themselves: `rnnkern.convert` is all they need.
"""

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ..convert import convert as convert_layers
from ..convert import revert as revert_layers
from ..nn.layers import Layer

__all__ = ["convert", "get_states", "process_sequence", "revert"]

State = tuple[Tensor, Tensor]


def convert(agent: Any, verbose: bool = False) -> Any:
    """Puts the recurrent layers of an agent on rnnkern's kernels, and resets in its loops' place.

    agent  a model of sb3-contrib (RecurrentPPO) or its policy; any module with TorchRL's LSTMModule
           or GRUModule in it. Other modules get what `rnnkern.convert` does

    In place, parameters stay the very same tensors; returns agent. Raises TypeError for what is no
    module and has no policy that is one.
    """
    policy = _policy(agent)
    convert_layers(policy, verbose)
    for module, theirs, ours in _recurrent_modules(policy):
        if type(module) is theirs:
            object.__setattr__(module, "__class__", ours)
    for module in policy.modules():
        if _loops_over_steps(module):
            vars(module)["_process_sequence"] = process_sequence
    return agent


def revert(agent: Any, verbose: bool = False) -> Any:
    """Undoes `convert`; returns agent."""
    policy = _policy(agent)
    for module, theirs, ours in _recurrent_modules(policy):
        if type(module) is ours:
            object.__setattr__(module, "__class__", theirs)
    for module in policy.modules():
        if vars(module).get("_process_sequence") is process_sequence:
            del vars(module)["_process_sequence"]
    revert_layers(policy, verbose)
    return agent


def _policy(agent: Any) -> nn.Module:
    policy = agent if isinstance(agent, nn.Module) else getattr(agent, "policy", None)
    if not isinstance(policy, nn.Module):
        raise TypeError(f"expected a module or a model with a policy, got {type(agent).__name__}")
    return policy


def _loops_over_steps(module: nn.Module) -> bool:
    """Whether it is a recurrent policy of sb3-contrib."""
    sb3 = sys.modules.get("sb3_contrib.common.recurrent.policies")
    return sb3 is not None and isinstance(module, sb3.RecurrentActorCriticPolicy)


def _recurrent_modules(policy: nn.Module) -> Iterator[tuple[nn.Module, type, type]]:
    """TorchRL's modules on a layer of rnnkern's, TorchRL's class of each and ours."""
    if "torchrl.modules" not in sys.modules:
        return
    room = import_module(f"{__name__}.torchrl")
    for module in policy.modules():
        for name, theirs, ours in room.MODULES:
            if type(module) in (theirs, ours) and isinstance(getattr(module, name), Layer):
                yield module, theirs, ours


def process_sequence(
    features: Tensor, lstm_states: State, episode_starts: Tensor, lstm: Layer
) -> tuple[Tensor, State]:
    """sb3-contrib's `_process_sequence` by one call of the layer.

    features        (B·T, I), the steps of a sequence one after the other
    lstm_states     (h, c), each (L, B, H)
    episode_starts  (B·T,), 1 where the state is set to zero before the step, else 0
    lstm            rnnkern's, not batch_first

    Returns (output (B·T, H), (h, c)).
    """
    sequences = lstm_states[0].shape[1]
    steps = features.reshape(sequences, -1, lstm.input_size).transpose(0, 1)
    starts = episode_starts.reshape(sequences, -1).transpose(0, 1)
    output, states = _run(lstm, steps, lstm_states, starts)
    return output.transpose(0, 1).flatten(0, 1), states


def get_states(lstm: Layer, x: Tensor, lstm_state: State, done: Tensor) -> tuple[Tensor, State]:
    """The part of CleanRL's `get_states` that runs the LSTM, by one call of the layer.

    lstm        rnnkern's, not batch_first
    x           (T·B, I), the rows of a step one after the other
    lstm_state  (h, c), each (L, B, H)
    done        (T·B,), 1 where the state is set to zero before the step, else 0

    Returns (output (T·B, H), (h, c)).
    """
    batch = lstm_state[0].shape[1]
    steps = x.reshape(-1, batch, lstm.input_size)
    output, state = _run(lstm, steps, lstm_state, done.reshape(-1, batch))
    return output.flatten(0, 1), state


def _run(lstm: Layer, steps: Tensor, state: State, starts: Tensor) -> tuple[Tensor, State]:
    """A call on (T, B, I), with zeros for the state where `starts`, (T, B), is not zero."""
    if len(steps) > 1:
        output, (h, c) = lstm(steps, state, resets=starts != 0)
    else:  # as rollouts are collected: nothing to look for in the mask
        kept = (starts == 0).view(1, -1, 1)
        output, (h, c) = lstm(steps, (state[0] * kept, state[1] * kept))
    return output, (h, c)
