"""Third-party training code, unchanged, with fastrnn's layers instead of torch's.

PyTorch Lightning, skorch and sb3-contrib, and tools that check for torch's exact types. The extra
`others` installs them; a test is skipped if its package is missing.
"""

import copy

import pytest
import torch
from torch import nn

import fastrnn

pytestmark = [pytest.mark.once, pytest.mark.cpu("third-party code, run on the CPU")]


class Tagger(nn.Module):
    """A classifier of sequences: a GRU, its mean over time, a linear layer."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 17, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(34, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 9, 5, generator=generator)
    return x, (x.mean((1, 2)) > 0).long()


def build_both(build):
    """`build()` under patch() and without it, from the same seed: ours and theirs."""
    torch.manual_seed(0)
    theirs = build()
    torch.manual_seed(0)
    with fastrnn.patch():
        ours = build()
    return ours, theirs


def layers(module):
    return [type(m) for m in module.modules() if isinstance(m, nn.RNNBase)]


def assert_same_training(ours, theirs, before):
    for found, expected, first in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        assert not torch.equal(found, first)
        torch.testing.assert_close(found, expected)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Tagger()

        def training_step(self, batch, _):
            x, y = batch
            return nn.functional.cross_entropy(self.model(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    models = build_both(Model)
    before = copy.deepcopy(list(models[0].parameters()))
    for model in models:
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            gradient_clip_val=1.0,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), 32)
        trainer.fit(model, loader)
    assert layers(models[0]) == [fastrnn.GRU]
    assert_same_training(*models, before)


def test_skorch():
    skorch = pytest.importorskip("skorch")
    x, y = (t.numpy() for t in data())

    def fitted():
        torch.manual_seed(0)
        net = skorch.NeuralNetClassifier(
            Tagger, criterion=nn.CrossEntropyLoss, max_epochs=2, lr=0.1, batch_size=32,
            train_split=None, verbose=0,
        )  # fmt: skip
        return net.fit(x, y)

    theirs = fitted()
    with fastrnn.patch():
        ours = fitted()
    assert layers(ours.module_) == [fastrnn.GRU]
    torch.manual_seed(0)
    assert_same_training(ours.module_, theirs.module_, list(Tagger().parameters()))
    torch.testing.assert_close(ours.predict_proba(x), theirs.predict_proba(x))


def test_recurrent_ppo():
    contrib = pytest.importorskip("sb3_contrib")

    def agent():
        return contrib.RecurrentPPO(
            "MlpLstmPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=1, seed=0,
            device="cpu", learning_rate=0.01,
            policy_kwargs={"lstm_hidden_size": 17, "optimizer_class": torch.optim.SGD},
        )  # fmt: skip

    ours, theirs = build_both(agent)
    assert set(layers(ours.policy)) == {fastrnn.LSTM}
    before = copy.deepcopy(list(ours.policy.parameters()))
    for model in ours, theirs:
        model.set_random_seed(0)  # numpy's seed too, which orders the batches
        model.learn(32)
    # Actions are sampled from their probabilities: equal unless rounding changes one.
    assert_same_training(ours.policy, theirs.policy, before)


def test_recurrent_ppo_with_resets(tmp_path):
    """Episodes of CartPole end within the sequences: sb3-contrib's policy loops over the steps."""
    contrib = pytest.importorskip("sb3_contrib")
    from fastrnn.integrations import sb3

    def agent(policy, **options):
        return contrib.RecurrentPPO(
            policy, "CartPole-v1", n_steps=64, batch_size=64, n_epochs=2, seed=0, device="cpu",
            learning_rate=0.01,
            policy_kwargs={
                "lstm_hidden_size": 17, "optimizer_class": torch.optim.SGD, **options
            },
        )  # fmt: skip

    for options in [{}, {"shared_lstm": True, "enable_critic_lstm": False}]:
        theirs, ours = (agent(p, **options) for p in ("MlpLstmPolicy", sb3.MlpLstmPolicy))
        assert set(layers(ours.policy)) == {fastrnn.LSTM}
        before = copy.deepcopy(list(theirs.policy.parameters()))
        for model in ours, theirs:
            model.set_random_seed(0)
            model.learn(64)
        assert_same_training(ours.policy, theirs.policy, before)
    ours.save(tmp_path / "model")
    loaded = contrib.RecurrentPPO.load(tmp_path / "model")
    assert type(loaded.policy) is sb3.MlpLstmPolicy
    observation = ours.env.reset()
    found, expected = (model.predict(observation, deterministic=True) for model in (loaded, ours))
    assert found[0] == expected[0]
    assert (found[1][0] == expected[1][0]).all()


def test_recurrent_policies_compute_what_the_loop_does():
    policies = pytest.importorskip("sb3_contrib.ppo_recurrent.policies")
    from fastrnn.integrations import sb3

    lstm, batch, steps = nn.LSTM(5, 17), 3, 8
    features, states = torch.randn(batch * steps, 5), (torch.randn(1, 3, 17), torch.randn(1, 3, 17))
    for starts in [torch.zeros(24), (torch.rand(24) < 0.3).float(), torch.ones(24)]:
        expected = policies.MlpLstmPolicy._process_sequence(features, states, starts, lstm)
        ours = fastrnn.accelerate(copy.deepcopy(lstm))
        for cls in (sb3.MlpLstmPolicy, sb3.CnnLstmPolicy, sb3.MultiInputLstmPolicy):
            found = cls._process_sequence(features, states, starts, ours)
            torch.testing.assert_close(found, expected)
            one = [t[:batch] for t in (features, starts)]
            torch.testing.assert_close(
                cls._process_sequence(one[0], states, one[1], ours),
                policies.MlpLstmPolicy._process_sequence(one[0], states, one[1], lstm),
            )


# ---- code that checks the exact types of layers: see docs/swapping.md ----------------------------


def for_each_type(look):
    """look(model) for torch's layers, fastrnn's layers, and layers with keep_types=True."""
    models = [Tagger() for _ in range(3)]
    fastrnn.accelerate(models[1])
    fastrnn.accelerate(models[2], keep_types=True)
    return [look(model) for model in models]


def test_thop():
    thop = pytest.importorskip("thop")
    theirs, ours, kept = for_each_type(lambda m: thop.profile(m, data()[:1], verbose=False)[0])
    assert ours < theirs / 10
    assert kept == theirs


def test_ptflops():
    ptflops = pytest.importorskip("ptflops")
    theirs, ours, kept = for_each_type(
        lambda m: ptflops.get_model_complexity_info(
            m, (9, 5), as_strings=False, print_per_layer_stat=False, backend="pytorch"
        )[0]
    )
    assert ours < theirs / 10
    assert kept == theirs


@pytest.mark.filterwarnings("ignore")
def test_opacus():
    validators = pytest.importorskip("opacus.validators")

    def look(model):
        validator = validators.ModuleValidator
        errors = [type(error).__name__ for error in validator.validate(model)]
        return errors, type(validator.fix(model).rnn).__name__

    refused = ["ShouldReplaceModuleError"], "DPGRU"
    assert for_each_type(look) == [refused, ([], "GRU"), refused]
