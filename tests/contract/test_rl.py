"""rnnkern.rl: the same training as with the libraries' own code, with less of it. Needs the extra
`rl`; what CleanRL does, which is no package, is here."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkern
import rnnkern.rl
from rnnkern.nn.layers import Layer

peers = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # they warn of their own ways


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], moved: dict[str, Tensor]) -> None:
    """Equal to rounding, after a training that has moved every one of them."""
    assert found.keys() == wanted.keys()
    for name, p in wanted.items():
        torch.testing.assert_close(found[name], p, rtol=0, atol=1e-6)
        assert not torch.equal(p, moved[name]), name


class TestSB3:
    pytestmark = peers

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        self.sb3 = pytest.importorskip("sb3_contrib", reason="pip install rnnkern[rl]")

    def model(self, **policy: Any) -> Any:
        """Episodes of CartPole are some 20 steps: many of them end inside a sequence's batch."""
        return self.sb3.RecurrentPPO(
            "MlpLstmPolicy",
            "CartPole-v1",
            n_steps=64,
            batch_size=64,
            n_epochs=4,
            seed=1,
            device="cpu",
            policy_kwargs={"lstm_hidden_size": 16, **policy},
        )

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "policy",
        [{}, {"n_lstm_layers": 2}, {"shared_lstm": True, "enable_critic_lstm": False}],
        ids=str,
    )
    def test_training(self, policy: dict[str, Any]) -> None:
        theirs, ours = self.model(**policy), self.model(**policy)
        before = parameters(ours.policy)
        assert rnnkern.rl.convert(ours) is ours
        assert isinstance(ours.policy.lstm_actor, Layer)
        for model in (theirs, ours):
            model.set_random_seed(1)
            model.learn(256)
        same(parameters(ours.policy), parameters(theirs.policy), before)

    def test_resets_inside_a_sequence(self) -> None:
        policy = rnnkern.rl.convert(self.model()).policy
        lstm = policy.lstm_actor
        x, starts = torch.randn(3 * 7, 4), (torch.rand(3 * 7) < 0.3).float()
        hx = tuple(torch.randn(2, 1, 3, 16))
        output, state = policy._process_sequence(x, hx, starts, lstm)
        own = type(policy)._process_sequence(x, hx, starts, rnnkern.revert(copy.deepcopy(lstm)))
        torch.testing.assert_close((output, state), own)

    def test_saved_and_reverted(self, tmp_path: Any) -> None:
        model = rnnkern.rl.convert(self.model())
        model.save(tmp_path / "model")
        loaded = self.sb3.RecurrentPPO.load(tmp_path / "model", env=model.env)
        assert type(loaded.policy.lstm_actor) is nn.LSTM
        rnnkern.rl.revert(model)
        assert type(model.policy.lstm_actor) is nn.LSTM
        assert "_process_sequence" not in vars(model.policy)

    @pytest.mark.slow
    @pytest.mark.sources("examples")
    def test_example(self, tmp_path: Path) -> None:
        figure = tmp_path / "figure.svg"
        script = Path(__file__).resolve().parents[2] / "examples" / "recurrent_ppo.py"
        done = subprocess.run(
            [sys.executable, script, "--steps", "1024", "--figure", figure],
            check=True,
            timeout=100,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert "the learning curves are the same for 1 of 1 rollouts" in done.stdout
        assert figure.stat().st_size > 5000


class TestTorchRL:
    pytestmark = peers

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        self.modules = pytest.importorskip("torchrl.modules", reason="pip install rnnkern[rl]")
        self.tensordict = pytest.importorskip("tensordict")

    def module(self, kind: str, layers: int = 1, **options: Any) -> Any:
        torch.manual_seed(2)
        states = ["h", "c"][: 2 if kind == "LSTM" else 1]
        return getattr(self.modules, f"{kind}Module")(
            input_size=3,
            hidden_size=5,
            num_layers=layers,
            in_keys=["x", *states],
            out_keys=["y", *[("next", s) for s in states]],
            **options,
        ).double()

    def data(self, module: Any, density: float, time: int = 9, batch: int = 4) -> Any:
        """A batch of rollouts, whose stored states are those of no step before."""
        generator = torch.Generator().manual_seed(3)
        layer = next(m for m in module.modules() if isinstance(m, nn.RNNBase))
        sizes = (batch, time, layer.num_layers * (1 + layer.bidirectional), 5)
        named = {s: torch.randn(*sizes, generator=generator) for s in ("h", "c")}
        named["x"] = torch.randn(batch, time, 3, generator=generator)
        named = {name: t.double() for name, t in named.items()}
        named["is_init"] = torch.rand(batch, time, 1, generator=generator) < density
        return self.tensordict.TensorDict(named, [batch, time])

    @pytest.mark.parametrize("density", [0.0, 0.3])
    @pytest.mark.parametrize(
        ("kind", "options"),
        [("LSTM", {}), ("LSTM", {"layers": 2, "bidirectional": True}), ("GRU", {"layers": 2})],
        ids=str,
    )
    def test_training(self, kind: str, options: dict[str, Any], density: float) -> None:
        theirs = self.module(kind, **options)
        ours = rnnkern.rl.convert(self.module(kind, **options))
        before, data = parameters(ours), self.data(ours, density)
        results = []
        for module in (theirs, ours):
            optimizer = torch.optim.SGD(module.parameters(), 0.1)
            with self.modules.set_recurrent_mode(True):
                for _ in range(5):
                    found = module(data.clone())
                    states = found["next", "h"].square().sum()
                    optimizer.zero_grad()
                    (found["y"].square().sum() + states).backward()
                    optimizer.step()
            results.append(found)
        for key in results[0].keys(True, True):
            torch.testing.assert_close(results[1][key], results[0][key], rtol=0, atol=1e-6)
        same(parameters(ours), parameters(theirs), before)

    @pytest.mark.slow
    def test_ppo(self) -> None:
        """A real environment's rollouts, GAE and PPO's loss, which run the module in their ways."""
        from tensordict.nn import TensorDictModule, TensorDictSequential
        from torchrl import envs
        from torchrl.objectives import ClipPPOLoss
        from torchrl.objectives.value import GAE

        modules = self.modules
        lstm = modules.LSTMModule(4, 8, in_key="observation", out_key="embed")
        tracked = envs.Compose(envs.InitTracker(), lstm.make_tensordict_primer())
        cart = envs.GymEnv("CartPole-v1", categorical_action_encoding=True)
        env = envs.TransformedEnv(cart, tracked)
        env.set_seed(0)
        head = TensorDictModule(nn.Linear(8, 2), in_keys=["embed"], out_keys=["logits"])
        actor = modules.ProbabilisticActor(
            TensorDictSequential(lstm, head),
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        )
        critic = TensorDictSequential(
            lstm, modules.ValueOperator(nn.Linear(8, 1), in_keys=["embed"])
        )
        with torch.no_grad():
            rollouts = [env.rollout(60, actor, break_when_any_done=False) for _ in range(3)]
        data = torch.stack(rollouts)
        assert data["is_init"][:, 1:].any()

        def trained(actor: Any, critic: Any) -> dict[str, Tensor]:
            advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic, shifted=True)
            ppo = ClipPPOLoss(actor, critic)
            optimizer = torch.optim.Adam(ppo.parameters(), 1e-3)
            own = data.clone()
            for _ in range(4):
                with torch.no_grad():
                    advantage(own)
                losses = ppo(own)
                optimizer.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                optimizer.step()
            return parameters(ppo)

        before = parameters(ClipPPOLoss(actor, critic))
        ours = rnnkern.rl.convert(nn.ModuleList(copy.deepcopy([actor, critic])))
        with modules.set_recurrent_mode(True):
            same(trained(*ours), trained(actor, critic), before)

    def test_the_mask_is_handed_on(self, monkeypatch: Any) -> None:
        """Nothing is split and padded any more."""
        from torchrl.modules.tensordict_module import rnn

        module = rnnkern.rl.convert(self.module("GRU"))
        monkeypatch.delattr(rnn, "_split_and_pad_for_reset")
        with self.modules.set_recurrent_mode(True):
            module(self.data(module, 0.3))

    def test_single_steps(self) -> None:
        theirs, ours = self.module("LSTM"), rnnkern.rl.convert(self.module("LSTM"))
        data = self.data(ours, 0.5)[:, 0]
        wanted, found = theirs(data.clone()), ours(data.clone())
        for key in wanted.keys(True, True):
            torch.testing.assert_close(found[key], wanted[key])

    def test_copies_and_reverse(self) -> None:
        model = nn.Sequential(self.module("LSTM"), nn.Identity())
        kind = type(model[0])
        rnnkern.rl.convert(model)
        for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(one[0]) is not kind
            assert isinstance(one[0].lstm, Layer)
        rnnkern.rl.revert(model)
        assert type(model[0]) is kind
        assert type(model[0].lstm) is nn.LSTM
        assert model[0].recurrent_backend == "pad"


class Agent(nn.Module):
    """The LSTM part of CleanRL's ppo_atari_lstm.py, word for word but for the network before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.network = nn.Linear(6, 10)
        self.lstm = nn.LSTM(10, 8)

    def get_states(self, x: Tensor, lstm_state: Any, done: Tensor) -> Any:
        hidden = self.network(x)
        batch_size = lstm_state[0].shape[1]
        hidden = hidden.reshape((-1, batch_size, self.lstm.input_size))
        done = done.reshape((-1, batch_size))
        new_hidden = []
        for h, d in zip(hidden, done, strict=True):
            h, lstm_state = self.lstm(
                h.unsqueeze(0),
                (
                    (1.0 - d).view(1, -1, 1) * lstm_state[0],
                    (1.0 - d).view(1, -1, 1) * lstm_state[1],
                ),
            )
            new_hidden += [h]
        new_hidden = torch.flatten(torch.cat(new_hidden), 0, 1)
        return new_hidden, lstm_state


class OurAgent(Agent):
    def __init__(self) -> None:
        super().__init__()
        rnnkern.convert(self)

    def get_states(self, x: Tensor, lstm_state: Any, done: Tensor) -> Any:
        return rnnkern.rl.get_states(self.lstm, self.network(x), lstm_state, done)


@pytest.mark.parametrize("steps", [1, 16])
def test_cleanrl(steps: int) -> None:
    theirs, ours = Agent(), OurAgent()
    before = parameters(ours)
    x, done = torch.randn(steps * 4, 6), (torch.rand(steps * 4) < 0.1).float()
    state = tuple(torch.randn(2, 1, 4, 8))
    for agent in (theirs, ours):
        optimizer = torch.optim.SGD(agent.parameters(), 0.01)
        for _ in range(5):
            hidden, (h, c) = agent.get_states(x, state, done)
            optimizer.zero_grad()
            (hidden.square().sum() + h.sum() + c.square().sum()).backward()
            optimizer.step()
    same(parameters(ours), parameters(theirs), before)


def test_other_agents() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    assert rnnkern.rl.convert(model) is model
    assert isinstance(model[0], rnnkern.LSTM)
    assert type(rnnkern.rl.revert(model)[0]) is nn.LSTM
    with pytest.raises(TypeError, match="a module or a model with a policy, got int"):
        rnnkern.rl.convert(3)
