"""A recurrent policy trained by sb3-contrib's RecurrentPPO, before and after one line of rnnkern.

    pip install 'rnnkern[plot,rl]'
    python examples/recurrent_ppo.py                   # both to the stated return, and a figure
    python examples/recurrent_ppo.py --steps 2048      # only so many steps, as CI does

The task needs memory (Bakker 2001, the T-maze without its walls): the first observation says left
or right, then nothing is to be seen for 8 to 16 steps, and at the end of the corridor the agent
turns. Right as told gives 1, wrong −1; without memory no policy has a mean above 0. Both trainings
draw the same numbers: they have the same learning curve until a rounding changes an action, and
another time. It is that of the processor, of one thread: where nothing else runs, wall time.
"""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")  # the figure goes to a file, no display is needed
import matplotlib.pyplot as plt
import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

import rnnkern

RETURN = 0.9  # the mean of the last 100 episodes at which a training ends
STEPS = 200_000  # or here
LENGTHS = 8, 16  # of the corridor


class Corridor(gym.Env[np.ndarray, int]):
    """Observation (cue: −1, 0 or 1; whether this is the end); action 0 left, 1 right."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(LENGTHS[0], LENGTHS[1] + 1))
        self.cue = int(self.np_random.integers(2))
        return np.array([2 * self.cue - 1, 0], np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        at_end = self.left == 0
        reward = 0.0 if not at_end else 1.0 if action == self.cue else -1.0
        self.left -= 1
        return np.array([0, self.left == 0], np.float32), reward, at_end, False, {}


@dataclass
class Training(BaseCallback):
    """At each rollout's end: the steps and seconds so far, and the mean return."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    in_train: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()
        self.start = time.process_time()

    def _on_step(self) -> bool:
        return not (self.returns and self.returns[-1] >= RETURN)

    def _on_rollout_end(self) -> None:
        episodes = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        self.steps.append(self.num_timesteps)
        self.seconds.append(time.process_time() - self.start)
        self.returns.append(float(np.mean(episodes)) if episodes else -1.0)


class TimedPPO(RecurrentPPO):
    seconds_in_train = 0.0

    def train(self) -> None:
        start = time.process_time()
        super().train()
        self.seconds_in_train += time.process_time() - start


def train(convert: bool, steps: int) -> Training:
    model = TimedPPO(
        "MlpLstmPolicy",
        make_vec_env(Corridor, n_envs=8, seed=0),
        n_steps=128,
        batch_size=256,
        n_epochs=8,
        learning_rate=1e-3,
        gamma=0.98,
        ent_coef=0.01,
        policy_kwargs={"lstm_hidden_size": 128},
        seed=0,
        device="cpu",
    )
    if convert:
        rnnkern.rl.convert(model)  # the one line
    training = Training()
    model.learn(steps, callback=training)
    training.in_train = model.seconds_in_train
    return training


def report(name: str, training: Training) -> None:
    steps, seconds = training.steps[-1], training.seconds[-1]
    print(
        f"{name:9} return {training.returns[-1]:5.2f} after {steps} steps, {seconds:6.1f} s: "
        f"{training.in_train:6.1f} s in train(), {steps / seconds:5.0f} steps per second"
    )


def draw(trainings: dict[str, Training], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, training in trainings.items():
        axes.plot(training.seconds, training.returns, label=name)
    axes.axhline(RETURN, color="gray", linestyle=":")
    axes.set(xlabel="processor seconds", ylabel="mean return of 100 episodes")
    axes.legend()
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=STEPS, help="at most so many steps each")
    parser.add_argument("--figure", type=Path, default=Path("recurrent_ppo.svg"))
    arguments = parser.parse_args()
    trainings = {}
    for name in ("torch.nn", "rnnkern"):
        trainings[name] = train(name == "rnnkern", arguments.steps)
        report(name, trainings[name])
    one, other = (t.returns for t in trainings.values())
    alike = [abs(a - b) < 1e-6 for a, b in zip(one, other, strict=False)]
    count = alike.index(False) if False in alike else len(alike)
    print(f"the learning curves are the same for {count} of {len(alike)} rollouts")
    draw(trainings, arguments.figure)


if __name__ == "__main__":
    torch.set_num_threads(1)  # small layers: sb3 with more threads is slower on both sides
    main()
