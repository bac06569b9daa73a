"""Preference losses and their gradients against TRL's own code on the same logits (the `[parity]` extra); test_losses.py has
closed forms for where it is missing."""

import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TEMPLATE, preference_rows

from model import ops
from training.data import Packed, pair
from training.losses import Preference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("trl")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.utils import selective_log_softmax

pytestmark = pytest.mark.filterwarnings("ignore")
PACKED = Packed.build([pair(TEMPLATE, row) for row in preference_rows(6)], 64, 8, 0)
BATCH, PAIRS, VOCAB = PACKED.block(0), PACKED.pairs, 272
LOGITS, REFERENCE = (
    np.random.default_rng(i).normal(0, 2, (BATCH["ids"].size, VOCAB)).astype(np.float32) for i in (0, 1)
)  # one row a position


def logprobs(logits_nv):
    """The path of training: an identity head turns hidden states into these logits."""
    return ops.token_logprobs(logits_nv[BATCH["at"]], jnp.eye(VOCAB), BATCH["targets"], "fp32")


def ours(loss: Preference, reference_n=None):
    """Loss and its gradient by logits."""
    known = {"reference": logprobs(REFERENCE) if reference_n is None else reference_n} if loss.needs_reference else {}

    def mean(logits_nv):
        total, (count, _) = loss(logprobs(logits_nv), BATCH | known)
        return total / count

    return jax.value_and_grad(mean)(jnp.asarray(LOGITS))


def branches():
    """Positions and targets of each branch: every chosen, then every rejected."""
    of = [np.flatnonzero(BATCH["branch"] == b) for b in range(2 * PAIRS)]
    return [(BATCH["at"][n], BATCH["targets"][n]) for n in of if len(n)]


def padded(logits, pad=7):
    """The logits as TRL sees them, 2P×S×V: a prompt of one token, the reply, padding with any token; and its ids and completion mask."""
    size = max(len(at) for at, _ in branches()) + 1
    rows, ids, mask = [], torch.full((2 * PAIRS, size), pad), torch.zeros((2 * PAIRS, size), dtype=torch.long)
    for row, (at, targets) in enumerate(branches()):
        rows.append(torch.cat([logits[torch.as_tensor(at).long()], torch.zeros(size - len(at), VOCAB)]))
        ids[row, 1 : len(at) + 1], mask[row, 1 : len(at) + 1] = torch.as_tensor(targets).long(), 1
    return torch.stack(rows), ids, mask


class Model(torch.nn.Module):
    """What TRL asks of a model with its fused head, from given logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, labels, **_):
        logits, _, mask = padded(self.logits)
        logp = selective_log_softmax(logits[:, :-1], labels[:, 1:].clamp(min=0)) * mask[:, 1:]
        nothing = torch.zeros_like(logp)
        return SimpleNamespace(log_probs=logp, entropy=nothing, mean_logits=nothing, is_top1=nothing > 0)


def trl_dpo(loss: Preference):
    logits, frozen = torch.tensor(LOGITS, requires_grad=True), torch.tensor(REFERENCE)
    model, reference, (_, ids, mask) = Model(logits), Model(frozen), padded(frozen)
    same = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    kinds = [loss.kind, "sft"] if loss.alpha else [loss.kind]
    me = SimpleNamespace(
        model=model, ref_model=reference, accelerator=same, args=SimpleNamespace(gradient_checkpointing_kwargs=None), beta=loss.beta,
        loss_types=kinds, loss_weights=[1.0, loss.alpha][: len(kinds)], ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False,
        aux_loss_enabled=False, precompute_ref_logps=True, _total_train_tokens=0, _tp_size=1,
        _metrics={"train": _Lists(), "eval": _Lists()})  # fmt: skip
    chosen, rejected = reference(labels=ids).log_probs.sum(1).chunk(2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask,
              "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}  # fmt: skip
    value = DPOTrainer._compute_loss(me, model, inputs, False)
    value.backward()
    return value.item(), logits.grad.numpy()


class _Lists(dict):
    def __missing__(self, key):
        return self.setdefault(key, [])


def trl_cpo(loss: Preference):
    """TRL's SimPO, and its smoothing, are those of its CPO trainer."""
    logits = torch.tensor(LOGITS, requires_grad=True)
    x, ids, mask = padded(logits)
    labels = torch.where(mask > 0, ids, -100)
    logp = CPOTrainer.get_batch_logps(x, labels, average_log_prob=loss.kind == "simpo")
    me = SimpleNamespace(alpha=0.0, accelerator=SimpleNamespace(device="cpu"), loss_type=loss.kind, simpo_gamma=loss.gamma, beta=loss.beta,
                         label_smoothing=loss.smoothing)  # fmt: skip
    value = CPOTrainer.cpo_loss(me, *logp.chunk(2))[0].mean()
    value.backward()
    return value.item(), logits.grad.numpy()


def agree(mine, theirs):
    value, grad = mine
    assert float(value) == pytest.approx(theirs[0], rel=1e-6)
    np.testing.assert_allclose(np.asarray(grad), theirs[1], rtol=1e-4, atol=1e-6 * np.abs(theirs[1]).max())
    assert np.abs(theirs[1]).max() > 1e-4


@pytest.mark.parametrize("beta", [0.1, 0.5, 5.0])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "sigmoid_norm", "apo_zero"])
def test_the_loss_is_trls(kind, beta):
    loss = Preference(kind, beta)
    agree(ours(loss), trl_dpo(loss))


@pytest.mark.parametrize(("smoothing", "gamma"), [(0.0, 0.5), (0.0, 1.0), (0.1, 0.5)])
def test_simpo_is_trls(smoothing, gamma):
    loss = Preference("simpo", 2.0, smoothing, gamma=gamma)
    agree(ours(loss), trl_cpo(loss))


def test_smoothing_is_trls():
    """TRL smooths this loss in CPO only: DPO whose reference says 0 everywhere."""
    loss = Preference("sigmoid", 0.3, 0.2)
    agree(ours(loss, np.zeros(BATCH["at"].shape, np.float32)), trl_cpo(loss))


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_nll_is_trls_sft_term(kind):
    """TRL takes one mean over all chosen tokens of a batch, ours one for each pair: the same here, where chosen replies are equally long."""
    assert len({len(at) for at, _ in branches()[:PAIRS]}) == 1 < len({len(at) for at, _ in branches()[PAIRS:]})
    loss = Preference(kind, 0.1, alpha=0.3)
    agree(ours(loss), trl_dpo(loss))
